"""`polyvisor sandbox`, as root and as an ordinary user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sandbox_runs import Sandbox

import polyvisor
from leftovers import Leftovers
from polyvisor.errors import ConfigError, HostError, ProcessTimeout
from polyvisor.vps.limits import Cgroup
from readable import open_to_all


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 128 + 15),
        ("kill -KILL $$", 128 + 9),
        ("(sleep 1000 &) ; exit 3", 3),  # what is left is ended
    ],
)
def test_the_status_is_the_commands(sandbox: Sandbox, script: str, status: int) -> None:
    assert sandbox("--", "sh", "-c", script).status == status


def test_statuses_of_our_own(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox("--timeout", "0.3", "--", "sleep", "1000").status == 124
    assert sandbox("--", "no-such-command").status == 127
    assert sandbox("--", "/etc").status == 126
    assert sandbox("--timeout", "0", "--", "true").status == 125
    assert sandbox("--env", "x", "--", "true").status == 125
    assert sandbox("--no-such-option").status == 2


def test_what_it_sees(sandbox: Sandbox, uid: int | None) -> None:
    script = """
        id -u; echo $HOME $SECRET; ls -A /tmp /run | tr -d '\\n'; echo
        test -w /usr && echo writable; cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l
        ls /sys/class/net /proc/self/fd 2>/dev/null | wc -l >/dev/null
        cut -d: -f1 /proc/net/dev | tail -n +3 | tr -d ' '; hostname; cat
    """
    os.environ["SECRET"] = "s3cret"
    try:
        run = sandbox("--", "sh", "-c", script, input="from stdin")
    finally:
        del os.environ["SECRET"]
    lines = run.stdout.splitlines()
    assert lines[0] == str(os.geteuid() if uid is None else uid)
    assert lines[1].strip() == "/tmp"
    assert lines[2] == "/run:/tmp:"
    assert lines[3] == "polyvisor-init"
    assert int(lines[4]) <= 6  # init, the shell and what it runs
    assert lines[5:] == ["lo", "sandbox", "from stdin"]


def test_what_it_may_write_to(sandbox: Sandbox, uid: int | None, tmp_path: Path) -> None:
    open_to_all(tmp_path)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "seen").write_text("seen")
    run = sandbox(
        *("--rw", f"{shared}:/tmp/a/b", "--ro", tmp_path / "seen"),
        *("--", "sh", "-c", f"cat {tmp_path}/seen; echo new > /tmp/a/b/file; > {tmp_path}/seen"),
    )
    assert run.stdout == "seen"
    assert (shared / "file").read_text() == "new\n"
    assert (shared / "file").stat().st_uid == (os.geteuid() if uid is None else uid)
    assert run.status != 0  # the last redirection
    assert (tmp_path / "seen").read_text() == "seen"


def test_json(sandbox: Sandbox) -> None:
    run = sandbox("--json", "--", "sh", "-c", "echo out; echo err >&2; exit 4")
    assert run.status == 4
    assert run.json == {
        "argv": ["sh", "-c", "echo out; echo err >&2; exit 4"],
        "status": 4,
        "signal": 0,
        "limits": [],
        "stdout": "out\n",
        "stderr": "err\n",
    }


def test_from_python() -> None:
    before = None
    for _ in range(3):
        result = polyvisor.sandbox(["cat"], stdin=b"hello", env={"A": "b"})
        assert (result.text, result.status, result.limits) == ("hello", 0, ())
        with pytest.raises(ProcessTimeout) as timeout:
            polyvisor.sandbox(["sh", "-c", "echo so far; sleep 1000"], timeout=0.3)
        assert timeout.value.stdout == b"so far\n"
        with pytest.raises(HostError) as missing:
            polyvisor.sandbox(["/no/such/program"])
        assert missing.value.path == "/no/such/program"
        with pytest.raises(ConfigError):
            polyvisor.sandbox(["true"], ro=["/no/such/file"])
        with pytest.raises(ConfigError):
            polyvisor.sandbox([])
        if before is None:
            before = Leftovers()  # (what is opened once is)
    assert before is not None
    before.check()


def test_many_at_once() -> None:
    statuses: list[int] = []

    def work() -> None:
        for n in range(5):
            statuses.append(polyvisor.sandbox(["sh", "-c", f"exit {n}"]).status)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(statuses) == sorted([0, 1, 2, 3, 4] * 4)


def processes_with(word: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_caller(number: signal.Signals) -> None:
    seconds = str(100000 + os.getpid() * 10 + number)  # a word that nobody else has
    caller = subprocess.Popen(
        [sys.executable, "-m", "polyvisor.cli", "sandbox", "--", "sh", "-c", f"sleep {seconds}; :"],
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 30
        while len(processes_with(seconds)) < 3 and time.monotonic() < end:
            time.sleep(0.02)
        assert len(processes_with(seconds)) >= 3  # the caller, the shell, sleep
        caller.send_signal(number)
        status = caller.wait(30)
        assert status == (-9 if number == signal.SIGKILL else 128 + number)
        while processes_with(seconds) and time.monotonic() < end:
            time.sleep(0.02)
        assert not processes_with(seconds)
    finally:
        caller.kill()
        caller.wait()


@pytest.mark.needs_root
def test_limits_hold() -> None:
    hog = "import sys; x = bytearray(200 << 20); print('survived')"
    # (The interpreter itself: an environment below /tmp is not there inside.)
    python = os.path.realpath(sys.executable)
    result = polyvisor.sandbox([python, "-c", hog], memory="64M", timeout=60)
    assert (result.text, result.signal, result.limits) == ("", 9, ("memory",))
    bomb = "i=0; while [ $i -lt 50 ]; do sleep 100 & i=$((i+1)); done"
    result = polyvisor.sandbox(["sh", "-c", bomb], pids=20, timeout=60)
    assert b"fork" in result.stderr.lower()
    assert result.status != 0
    assert not [name for name in Cgroup.names() if name.startswith(f"sandbox-{os.getpid()}-")]


def test_a_limit_that_cannot_be_set_is_refused(sandbox: Sandbox, uid: int | None) -> None:
    run = sandbox("--memory", "64M", "--", "true")
    if (os.geteuid() if uid is None else uid) == 0:
        assert run.status == 0, run.stderr
    else:
        assert run.status == 125
        assert "memory" in run.stderr
