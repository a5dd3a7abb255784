"""`polyvisor exec` as a program: what a shell sees of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from person import Terminal

EXEC = [sys.executable, "-m", "polyvisor.cli", "exec"]
Done = subprocess.CompletedProcess[bytes]


def execute(*arguments: str | Path, stdin: bytes = b"", timeout: float = 300) -> Done:
    return subprocess.run(
        [*EXEC, *map(str, arguments)], input=stdin, capture_output=True, timeout=timeout
    )


@pytest.mark.boot
@pytest.mark.timeout(400)
def test_streams_and_status() -> None:
    done = execute(
        "--env",
        "WORD=x",
        "--",
        "sh",
        "-c",
        "echo out $WORD; echo err >&2; cat; exit 7",
        stdin=b"in",
    )
    assert done.stdout == b"out x\nin"
    assert done.stderr == b"err\n"
    assert done.returncode == 7


@pytest.mark.boot
@pytest.mark.timeout(400)
def test_json() -> None:
    done = execute("--json", "--", "sh", "-c", r"printf '\377'; echo text >&2; kill -9 $$")
    result = json.loads(done.stdout)
    assert done.returncode == result["status"] == 137
    assert result["signal"] == 9
    assert result["stdout_base64"] == "/w=="
    assert result["stderr"] == "text\n"
    assert result["argv"][0] == "sh"
    assert result["seconds"] >= result["boot_seconds"] > 0
    assert done.stderr == b""


@pytest.mark.boot
@pytest.mark.timeout(400)
def test_not_found() -> None:
    done = execute("--", "nonesuch", "argument")
    assert done.returncode == 127
    assert done.stderr == b"polyvisor: nonesuch: there is no such command in the guest\n"


@pytest.mark.boot
@pytest.mark.timeout(400)
def test_a_panic_shows_the_console() -> None:
    done = execute("--", "sh", "-c", "echo c >/proc/sysrq-trigger")
    assert done.returncode == 125
    sentence, *tail = done.stderr.decode().splitlines()
    assert sentence.startswith("polyvisor: the guest's kernel panicked: ")
    assert tail
    assert all(line.startswith("  | ") for line in tail)
    assert any("Kernel panic - not syncing" in line for line in tail)


@pytest.mark.boot
@pytest.mark.timeout(400)
def test_a_reader_that_goes_away() -> None:
    process = subprocess.Popen(
        [*EXEC, "--", "yes"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(1000) == b"y\n" * 500
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.boot
@pytest.mark.timeout(400)
def test_a_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [*EXEC, "--", "echo", "text"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=300,
        )
    assert process.returncode == 125
    assert b"No space left on device" in process.stderr
    assert process.stderr.count(b"\n") == 1


@pytest.mark.boot
@pytest.mark.timeout(400)
def test_a_terminal_of_its_own() -> None:
    script = "trap 'echo caught; tty; exit 6' INT; echo ready; while :; do sleep 0.1; done"
    terminal = Terminal([*EXEC, "--tty", "--", "sh", "-c", script])
    terminal.expect(b"ready")
    terminal.type(b"\x03")  # the guest's, not polyvisor's
    terminal.expect(b"caught\r\n/dev/pts/0\r\n")
    assert terminal.finish() == 6


@pytest.mark.boot
@pytest.mark.timeout(400)
@pytest.mark.parametrize("delay", [0.3, 1.0, 5.0])
def test_out_of_a_terminal(delay: float) -> None:
    """Before there is a machine, while it boots, and when the command runs."""
    terminal = Terminal([*EXEC, "-t", "--", "sleep", "1000"])
    wait_for_main(terminal.process)
    time.sleep(delay)
    terminal.type(b"\x1dq")
    terminal.expect(b"quit")
    assert terminal.finish() == 130


def wait_for_main(process: subprocess.Popen[bytes]) -> None:
    """Until polyvisor has control: before, a signal ends Python, in Python's way."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:") and int(line.split()[1], 16) >> signal.SIGTERM - 1 & 1:
                return
        time.sleep(0.01)
    raise AssertionError("it never got there")


@pytest.mark.parametrize("delay", [0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_at_any_moment(delay: float, number: signal.Signals, tmp_path: Path) -> None:
    """While it starts, loads, and boots: one sentence at most, the status, nothing left."""
    path = tiny.kernel(tiny.FOREVER, tmp_path)
    process = subprocess.Popen(
        [*EXEC, "--kernel", path, "--", "true"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for_main(process)
    time.sleep(delay)
    process.send_signal(number)
    output, errors = process.communicate(timeout=15)
    assert process.returncode == 128 + number, errors
    assert output == b""
    assert errors.startswith(b"polyvisor: ")
    assert errors.count(b"\n") == 1, errors.decode()


def test_a_guest_that_never_boots(tmp_path: Path) -> None:
    path = tiny.kernel(tiny.FOREVER, tmp_path)
    start = time.monotonic()
    done = execute("--kernel", path, "--timeout", "1", "--", "true")
    assert done.returncode == 124
    assert b"did not get as far as init within 1 s" in done.stderr
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (tiny.TRIPLE_FAULT, b"triple fault"),
        (tiny.SLEEP, b"halted"),
        (tiny.POWER_OFF, b"switched itself off"),
        (tiny.say(b"Kernel panic - not syncing: x\n") + tiny.RESTART, b"panicked: x"),
    ],
    ids=["triple-fault", "halted", "power-off", "panic"],
)
def test_guests_that_do_not_survive(code: bytes, words: bytes, tmp_path: Path) -> None:
    done = execute("--kernel", tiny.kernel(code, tmp_path), "--", "true")
    assert done.returncode == 125
    assert words in done.stderr.splitlines()[0]


def test_an_error_as_json(tmp_path: Path) -> None:
    done = execute("--json", "--kernel", tiny.kernel(tiny.POWER_OFF, tmp_path), "--", "true")
    result = json.loads(done.stdout)
    assert done.returncode == result["status"] == 125
    assert result["error"]["type"] == "GuestError"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--kernel", "/nonexistent", "--", "true"], 125, "/nonexistent"),
        (["--kernel", "/etc/passwd", "--", "true"], 125, "not a kernel"),
        (["--kernel", "hurd", "--", "true"], 125, "cloud, generic, 686"),
        (["--memory", "0", "--", "true"], 125, "memory"),
        (["--memory", "99999T", "--", "true"], 125, "memory"),
        (["--memory", "2M", "--kernel", "K", "--", "true"], 125, "needs at least"),
        (["--cpus", "0", "--", "true"], 125, "cpus"),
        (["--cpus", "-3", "--", "true"], 125, "cpus"),
        (["--cpus", "many", "--", "true"], 2, "cpus"),
        (["--timeout", "0", "--", "true"], 125, "timeout"),
        (["--engine", "soft", "--irqchip", "split", "--", "true"], 125, "interrupt chips"),
        (["--env", "POLYVISOR_UNSET_VARIABLE", "--", "true"], 125, "POLYVISOR_UNSET_VARIABLE"),
        ([], 2, "COMMAND"),
        (["--nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input(arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
    path = str(tiny.kernel(tiny.POWER_OFF, tmp_path))
    done = execute(*(path if argument == "K" else argument for argument in arguments))
    text = done.stderr.decode()
    assert done.returncode == status, text
    assert words in text
    assert done.stdout == b""
    if status == 125:
        assert text.startswith("polyvisor: ")
        assert text.count("\n") == 1


def test_closed_stdout(tmp_path: Path) -> None:
    path = tiny.kernel(tiny.POWER_OFF, tmp_path)
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *EXEC, "--kernel", path, "--", "true"],
        stderr=subprocess.PIPE,
        timeout=60,
    )
    assert done.returncode == 125
    assert b"standard output is closed" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """No process, no temporary file, no shared memory."""
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    shared = set(os.listdir("/dev/shm"))
    path = tiny.kernel(tiny.FOREVER, tmp_path)
    process = subprocess.Popen(
        [*EXEC, "--kernel", path, "--timeout", "1", "--", "true"],
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    assert process.wait(30) == 124
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert os.listdir(tmp_path / "tmp") == []
    assert set(os.listdir("/dev/shm")) <= shared
