"""What a process VM has only so much of: that it is enforced, and told."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from polyvisor import Process
from polyvisor.errors import ConfigError, ProcessTimeout

SPIN = ["sh", "-c", "while :; do :; done"]


def test_cpu_time(engine: str) -> None:
    with Process(SPIN, cpu=0.3, engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.reason, result.status, result.limits) == ("cpu", 152, ("cpu",))
    assert 0.3 <= result.cpu_seconds < 0.6


def test_cpu_time_is_that_of_all_threads(engine: str) -> None:
    script = """
import threading
def spin():
    while True: pass
for _ in range(3): threading.Thread(target=spin).start()
"""
    with Process(["python3", "-S", "-E", "-c", script], cpu=0.5, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.reason == "cpu"
    assert result.cpu_seconds < 1.0
    assert (result.processes, result.threads) == (1, 4)


def test_waiting_takes_no_cpu_time(engine: str) -> None:
    with Process(["sleep", "0.5"], cpu=0.4, engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.reason, result.status, result.limits) == ("exited", 0, ())


def test_output(engine: str) -> None:
    script = """
import os
print(os.write(1, b"x" * 60))
try: os.write(2, b"y" * 60)
except OSError as e: os._exit(e.errno)
"""
    argv = ["python3", "-u", "-S", "-E", "-c", script]
    with Process(argv, output=100, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.stdout == b"x" * 60 + b"60\n"
    assert result.stderr == b"y" * 37
    assert (result.status, result.limits, result.output) == (0, ("output",), 100)
    with Process(argv, output=63, engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.status, result.limits, result.output) == (27, ("output",), 63)
    with Process(argv, output=123, engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.status, result.limits, result.output) == (0, (), 123)


def test_open_files(engine: str) -> None:
    script = """
import os, resource
files = []
try:
    while True: files.append(os.open("/dev/null", os.O_RDONLY))
except OSError as e: print(e.errno, files[-1], resource.getrlimit(resource.RLIMIT_NOFILE))
try: os.dup2(0, files[-1] + 1)
except OSError as e: print(e.errno)
"""
    with Process(["python3", "-E", "-c", script], open_files=20, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.text == "24 19 (20, 20)\n9\n"
    assert result.limits == ("files",)


def test_threads_and_processes(engine: str) -> None:
    script = """
import threading, time
made = 0
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(0.5,)).start()
        made += 1
except RuntimeError: print(made)
"""
    argv = ["python3", "-S", "-E", "-c", script]
    with Process(argv, threads=5, engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.text, result.limits, result.threads) == ("4\n", ("threads",), 5)


def test_memory(engine: str) -> None:
    script = """
try: x = bytearray(100 << 20)
except MemoryError: print("none")
"""
    argv = ["python3", "-S", "-E", "-c", script]
    with Process(argv, memory="64M", engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.text, result.limits) == ("none\n", ("memory",))


def test_instructions() -> None:
    with Process(SPIN, instructions=10**7) as process:  # and so "auto" is soft
        result = process.run(timeout=60)
    assert (result.reason, result.status, result.engine) == ("instructions", 152, "soft")
    assert result.instructions == 10**7
    assert result.limits == ("instructions",)
    with Process(["true"], engine="soft") as process:
        once = process.run(timeout=60).instructions
    assert 10_000 < once < 10_000_000


def test_wall_time_and_others_are_told_meanwhile(engine: str) -> None:
    with Process(SPIN, engine=engine) as process:
        started = time.monotonic()
        with pytest.raises(ProcessTimeout):
            process.run(timeout=0.3)
        assert time.monotonic() - started < 2
        assert process.usage()["cpu_seconds"] > 0.05
        assert process.system_calls()["execve" if "execve" in process.system_calls() else "brk"]


def test_the_hosts_limits_are_not_the_programs(engine: str) -> None:
    """Nor is its output that of the host's files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Process(["true"], open_files=5, engine=engine) as process:
        process.run(timeout=30)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cpu": 0}, "cpu"),
        ({"cpu": float("nan")}, "cpu"),
        ({"open_files": 2}, "open_files"),
        ({"open_files": 1025}, "open_files"),
        ({"threads": 0}, "threads"),
        ({"instructions": 0}, "instructions"),
        ({"instructions": 10, "engine": "kvm"}, "instructions"),
        ({"events": -1}, "events"),
        ({"output": "-1"}, "output"),
    ],
)
def test_mistakes(options: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        Process(["true"], **options)  # type: ignore[arg-type]
    assert wrong.value.field == field


WRITES = """
import errno, mmap, os
def attempt(step):
    try: return step()
    except OSError as error: return errno.errorcode[error.errno]
fd = os.open("data", os.O_RDWR | os.O_CREAT)
print(attempt(lambda: os.write(fd, b"x" * 50_000)))
print(attempt(lambda: os.ftruncate(fd, 90_000)))
print(attempt(lambda: os.pwrite(fd, b"y", 200_000)), os.fstat(fd).st_size)
print(attempt(lambda: os.ftruncate(fd, 200_000)), os.fstat(fd).st_size)
print(attempt(lambda: os.posix_fallocate(fd, 0, 200_000)))
print(attempt(lambda: os.copy_file_range(fd, os.open("copy", os.O_CREAT | os.O_WRONLY), 50_000)))
print(attempt(lambda: os.write(fd, b"z" * 60_000)))
print(attempt(lambda: os.write(fd, b"z")), attempt(lambda: os.mkdir("folder")))
print(attempt(lambda: os.ftruncate(fd, 10)), attempt(lambda: os.unlink("copy")))
print(attempt(lambda: os.write(os.memfd_create("m"), b"z")))
"""


def test_writes(engine: str) -> None:
    argv = ["python3", "-S", "-E", "-c", WRITES]
    with Process(argv, writes=50_000 + 40_000 + 2 * 4096 + 60_000, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.text.splitlines() == [
        "50000",
        "None",
        "EDQUOT 90000",
        "EDQUOT 90000",
        "EDQUOT",
        "40000",
        "20000",
        "EDQUOT EDQUOT",
        "None None",
        "EDQUOT",
    ]
    assert (result.limits, result.written) == (("writes",), 158_192)


def test_writes_of_copies_and_none(engine: str) -> None:
    script = "for n in range(3): open(str(n), 'w').write('x' * 5000)"
    with Process(["python3", "-S", "-E", "-c", script], writes=None, engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.status, result.limits, result.written) == (0, (), 0)
    with Process(["sh", "-c", "echo 1 >a; echo 2 >b"], writes=8200, engine=engine) as template:
        template.run_until("openat")
        for _ in range(2):
            with template.fork() as copy:
                for _ in range(2):
                    result = copy.run(timeout=60)
                    assert (result.status, result.limits, result.written) == (0, (), 8196)
                    copy.reset()


def test_gaps_that_many_threads_leave(engine: str, tmp_path: Path) -> None:
    """However threads race, a file has no room to be filled that was not counted."""
    script = """
import os, threading
fd = os.open("data", os.O_RDWR | os.O_CREAT)
def move():
    for n in range(300): os.lseek(fd, (n % 2) << 40, os.SEEK_SET)
thread = threading.Thread(target=move)
thread.start()
for _ in range(20):
    try: os.write(fd, bytes(300_000))
    except OSError: pass
thread.join()
"""
    argv = ["python3", "-S", "-E", "-c", script]
    with Process(argv, writes="3M", rw=[(tmp_path, "/work")], engine=engine) as process:
        result = process.run(timeout=60)
    assert result.status == 0
    assert (tmp_path / "data").stat().st_size <= 3 << 20
    assert result.written <= 3 << 20
