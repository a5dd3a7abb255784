"""`polyvisor run`: how guests end, where their serial port goes, what is left of the terminal."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tiny
from person import Terminal

RUN = [sys.executable, "-m", "polyvisor.cli", "run", "--memory", "64M"]
Done = subprocess.CompletedProcess[bytes]


def run(*arguments: str | Path, stdin: bytes = b"", timeout: float = 60) -> Done:
    return subprocess.run(
        [*RUN, *map(str, arguments)], input=stdin, capture_output=True, timeout=timeout
    )


@pytest.mark.parametrize(
    ("code", "status", "sentence"),
    [
        (tiny.POWER_OFF, 0, b""),
        (tiny.RESTART, 0, b""),
        (tiny.debug_exit(3), 7, b""),
        (tiny.TRIPLE_FAULT, 1, b"triple fault"),
        (tiny.SLEEP, 1, b"halted"),
    ],
    ids=["power-off", "reset", "debug-exit", "triple-fault", "halted"],
)
def test_how_guests_end(code: bytes, status: int, sentence: bytes, tmp_path: Path) -> None:
    done = run("--kernel", tiny.kernel(tiny.say(b"hello\n") + code, tmp_path))
    assert done.returncode == status, done.stderr
    assert done.stdout == b"hello\n"
    assert sentence in done.stderr
    assert done.stderr.count(b"\n") == bool(sentence)


def test_a_panic_in_a_file_shows_its_tail(tmp_path: Path) -> None:
    text = b"line one\nKernel panic - not syncing: no fun\n"
    path = tiny.kernel(tiny.say(text) + tiny.RESTART, tmp_path)
    done = run("--kernel", path, "--serial", tmp_path / "log")
    assert done.returncode == 1
    assert b"panicked: no fun" in done.stderr
    assert b"| line one" in done.stderr
    assert (tmp_path / "log").read_bytes() == text
    assert done.stdout == b""


def test_stdin_reaches_the_guest(tmp_path: Path) -> None:
    path = tiny.kernel(tiny.ECHO, tmp_path)
    process = subprocess.Popen(
        [*RUN, "--kernel", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    text = bytes(range(256)) * 40
    process.stdin.write(text)
    process.stdin.close()  # the guest goes on without
    assert process.stdout.read(len(text)) == text
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    process.stdout.close()


def test_timeout(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run("--kernel", tiny.kernel(tiny.FOREVER, tmp_path), "--timeout", "0.5")
    assert done.returncode == 124
    assert b"within 0.5 s" in done.stderr
    assert time.monotonic() - start < 20


def test_ctrl_c(tmp_path: Path) -> None:
    path = tiny.kernel(tiny.say(b"up\n") + tiny.FOREVER, tmp_path)
    process = subprocess.Popen(
        [*RUN, "--kernel", path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.read(3) == b"up\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors.count(b"\n") == 1
    assert b"interrupted" in errors


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = tiny.kernel(tiny.say_forever(b"y"), tmp_path)
    process = subprocess.Popen(
        [*RUN, "--kernel", path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(1000) == b"y" * 1000
    process.stdout.close()
    assert process.wait(10) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_full_disk(tmp_path: Path) -> None:
    path = tiny.kernel(tiny.say_forever(b"y"), tmp_path)
    done = run("--kernel", path, "--serial", "/dev/full")
    assert done.returncode == 125
    assert b"/dev/full: No space left" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_serial_on_a_pty(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*RUN, "--kernel", tiny.kernel(tiny.ECHO, tmp_path), "--serial", "pty"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    name = process.stderr.readline().split()[-1].decode()
    port = os.open(name, os.O_RDWR | os.O_NOCTTY)
    os.write(port, b"typed")
    got = b""
    while len(got) < 5 and select.select([port], [], [], 10)[0]:
        got += os.read(port, 100)
    assert got == b"typed"
    process.terminate()
    process.wait(10)
    process.stderr.close()
    os.close(port)


def test_raw_terminal_and_escape(tmp_path: Path) -> None:
    terminal = Terminal([*RUN, "--kernel", tiny.kernel(tiny.say(b"up") + tiny.ECHO, tmp_path)])
    terminal.expect(b"up")
    assert not termios.tcgetattr(terminal.slave)[3] & termios.ICANON
    terminal.type(b"\x03key")  # Ctrl-C is the guest's
    terminal.expect(b"up\x03key")
    terminal.type(b"\x1d\x1d")
    terminal.expect(b"key\x1d")
    terminal.type(b"\x1dq")
    terminal.expect(b"quit")
    assert terminal.finish() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_terminal_is_restored_after_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    terminal = Terminal([*RUN, "--kernel", tiny.kernel(tiny.say(b"up") + tiny.FOREVER, tmp_path)])
    terminal.expect(b"up")
    terminal.process.send_signal(number)
    assert terminal.finish() == 128 + number


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernel", "/nonexistent"], "no kernel /nonexistent"),
        (["--kernel", "/etc"], "not a regular file"),
        (["--kernel", "/etc/passwd"], "not a kernel"),
        (["--kernel", "/dev/null"], "not a regular file"),
        (["--kernel", "K", "--initrd", "/nonexistent"], "no initrd /nonexistent"),
        (["--kernel", "K", "--initrd", "BIG"], "does not fit"),
        (["--kernel", "K", "--memory", "0"], "memory"),
        (["--kernel", "K", "--memory", "2M"], "needs at least"),
        (["--kernel", "K", "--memory", "lots"], "memory"),
        (["--kernel", "K", "--memory", "100000T"], "memory"),
        (["--kernel", "K", "--cpus", "0"], "cpus"),
        (["--kernel", "K", "--cpus", "100000"], "cpus"),
        (["--kernel", "K", "--append", "x" * 5000], "command line"),
        (["--kernel", "K", "--timeout", "-1"], "timeout"),
        (["--kernel", "K", "--serial", "/nonexistent/log"], "/nonexistent/log"),
        (["--kernel", "K", "--engine", "soft", "--irqchip", "kernel"], "interrupt chips"),
    ],
)
def test_one_clear_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(70 << 20)
    names = {"K": tiny.kernel(tiny.POWER_OFF, tmp_path), "BIG": big}
    done = run(*(names.get(argument, argument) for argument in arguments))
    text = done.stderr.decode()
    assert done.returncode == 125, text
    assert text.startswith("polyvisor: ")
    assert words in text
    assert text.count("\n") == 1
    assert done.stdout == b""


@pytest.mark.parametrize("arguments", [[], ["--kernel"], ["--kernel", "x", "--engine", "warp"]])
def test_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert b"--kernel" in done.stderr or b"--engine" in done.stderr
