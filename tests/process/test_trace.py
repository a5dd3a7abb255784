"""Traces of process VMs: strace, outside, is the oracle of their lines."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from polyvisor import Process
from polyvisor.errors import ProcessTimeout
from polyvisor.process import ENVIRONMENT

#: Calls of files, each with arguments and a result that are the same wherever it is made.
SOURCE = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void) {
    char text[100];
    int pair[2];
    struct stat about;
    syscall(SYS_openat, AT_FDCWD, "none\n\1\"\377x\0017", O_RDONLY | O_CLOEXEC);
    syscall(SYS_openat, AT_FDCWD, "made", O_RDWR | O_CREAT | O_TRUNC | O_NOFOLLOW, 0640);
    syscall(SYS_write, 3, "a line of text\n", 15);
    syscall(SYS_write, 3, "\0\1\0001 and more than is shown of it, or is it?", 44);
    syscall(SYS_pwrite64, 3, "b", 1, 2);
    syscall(SYS_lseek, 3, 0, SEEK_SET);
    syscall(SYS_lseek, 3, -1, SEEK_SET);
    syscall(SYS_read, 3, text, 10);
    syscall(SYS_pread64, 3, text, 100, 4);
    syscall(SYS_read, 77, text, 10);
    syscall(SYS_fstat, 3, &about);
    syscall(SYS_newfstatat, AT_FDCWD, "/dev/null", &about, 0);
    syscall(SYS_newfstatat, AT_FDCWD, "folder", &about, AT_SYMLINK_NOFOLLOW);
    syscall(SYS_mkdir, "folder", 0755);
    syscall(SYS_mkdirat, AT_FDCWD, "folder", 0755);
    syscall(SYS_symlink, "made", "folder/link");
    syscall(SYS_readlink, "folder/link", text, 100);
    syscall(SYS_readlinkat, AT_FDCWD, "made", text, 100);
    syscall(SYS_open, "folder", O_RDONLY | O_DIRECTORY);
    syscall(SYS_unlinkat, 4, "link", 0);
    syscall(SYS_unlinkat, AT_FDCWD, "folder", AT_REMOVEDIR);
    syscall(SYS_rename, "made", "renamed");
    syscall(SYS_renameat2, AT_FDCWD, "none", AT_FDCWD, "other", 0);
    syscall(SYS_access, "renamed", F_OK);
    syscall(SYS_access, "renamed", R_OK | W_OK);
    syscall(SYS_faccessat2, AT_FDCWD, "renamed", X_OK, AT_EACCESS);
    syscall(SYS_fcntl, 3, F_GETFD);
    syscall(SYS_fcntl, 3, F_DUPFD_CLOEXEC, 10);
    syscall(SYS_dup2, 3, 20);
    syscall(SYS_dup3, 3, 21, O_CLOEXEC);
    syscall(SYS_dup, 55);
    syscall(SYS_pipe2, pair, O_CLOEXEC);
    syscall(SYS_ftruncate, 3, 5);
    syscall(SYS_fsync, 3);
    syscall(SYS_chdir, "/none");
    syscall(SYS_chdir, "/");
    syscall(SYS_getcwd, text, 100);
    syscall(SYS_umask, 022);
    syscall(SYS_close, 3);
    syscall(SYS_close, 3);
    syscall(SYS_kill, 1 << 30, 0);
    syscall(SYS_rt_sigaction, 1000, 0, 0, 8);
    syscall(SYS_open, (char*)8, O_WRONLY);
    syscall(SYS_nanosleep, 0, 0);
    syscall(SYS_exit_group, 3);
}
"""
CALLS = "openat|open|write|pwrite64|lseek|read|pread64|fstat|newfstatat|mkdir|mkdirat|symlink|\
readlink|readlinkat|unlinkat|rename|renameat2|access|faccessat2|fcntl|dup|dup2|dup3|pipe2|ftruncate\
|fsync|chdir|getcwd|umask|close|kill|rt_sigaction|nanosleep|exit_group"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program."""
    folder = tmp_path_factory.mktemp("trace")
    command = ["cc", "-w", "-O1", "-static", "-x", "c", "-o", folder / "calls", "-"]
    subprocess.run(command, input=SOURCE.encode(), check=True)
    return folder


def comparable(lines: str) -> list[str]:
    """From the program's first call on, with what strace is free to say otherwise made alike."""
    found = [line for line in lines.splitlines() if re.match(rf"({CALLS})\(", line)]
    first = next(n for n, line in enumerate(found) if "none" in line)
    addresses = [re.sub(r"0x7[0-9a-f]{11}", "0xADDRESS", line) for line in found[first:]]
    return [re.sub(r"\s+=", " =", line) for line in addresses]


def test_lines_are_those_of_strace(engine: str, build: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    log = tmp_path / "strace"
    environment = {"LC_ALL": "C.UTF-8", **ENVIRONMENT}
    subprocess.run(
        ["strace", "-o", log, build / "calls"],
        cwd=tmp_path / "work",
        env=environment,
        check=False,
        umask=0o22,
    )
    trace = tmp_path / "trace"
    with Process(["/b/calls"], ro=[(build, "/b")], trace=trace, engine=engine) as process:
        result = process.run(timeout=30)
    wanted, got = comparable(log.read_text()), comparable(trace.read_text())
    assert got == wanted
    assert len(wanted) > 40
    assert result.status == 3
    assert trace.read_text().splitlines()[-1] == "+++ exited with 3 +++"


def test_events(engine: str) -> None:
    script = "import os; os.open('/work/ß\\udcff', os.O_CREAT | os.O_RDWR, 0o600); os.stat('/none')"
    argv = ["python3", "-S", "-E", "-c", f"try:\n {script}\nexcept OSError: pass"]
    with Process(argv, events=100_000, engine=engine) as process:
        assert process.run(timeout=60).status == 0
        events = process.events()
        assert process.events() == []
        assert process.events_lost == 0
    made = next(e for e in events if e.strings.get(1, "").startswith("/work/ß"))
    assert made.strings == {1: "/work/ß\udcff"}
    assert made.name == "openat"
    assert made.text == ("AT_FDCWD", r'"/work/\303\237\377"', "O_RDWR|O_CREAT|O_CLOEXEC", "0600")
    assert made.args[2] == os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
    assert (made.result, made.errno) == (3, 0)
    assert (made.pid, made.tid) == (1000, 1000)
    assert str(made).endswith(" = 3")
    missing = next(e for e in events if "/none" in e.strings.values())
    assert (missing.result, missing.errno) == (-errno.ENOENT, errno.ENOENT)
    assert str(missing).endswith("= -1 ENOENT (No such file or directory)")
    calls = [e for e in events if e.kind == "call"]
    assert all(a.start <= b.start for a, b in itertools.pairwise(calls))
    assert all(0 <= e.duration < 10 for e in calls)
    assert calls[-1].name == "exit_group"
    assert calls[-1].result is None
    assert str(events[-1]) == "+++ exited with 0 +++"


def test_only_so_many_are_kept(engine: str) -> None:
    with Process(["sh", "-c", "for i in 1 2 3; do :; done"], events=5, engine=engine) as process:
        process.run(timeout=30)
        events = process.events()
        assert len(events) == 5
        assert events[-1].kind == "end"
        assert process.events_lost > 10


def test_json(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    argv = ["sh", "-c", "echo 'a \"\t' >$'\\xff\\x01'; exit 2"]
    argv = ["bash", *argv[1:]]
    with Process(argv, trace=trace, trace_json=True, events=9999, engine="soft") as process:
        process.run(timeout=30)
        events = process.events()
    objects = [json.loads(line) for line in trace.read_text().splitlines()]
    assert len(objects) == len(events)
    for one, event in zip(objects, events, strict=True):
        assert one["type"] == event.kind
        assert (one["pid"], one["tid"]) == (event.pid, event.tid)
        assert one["start"] == pytest.approx(event.start, abs=1e-8)
        if event.kind == "call":
            assert (one["name"], one["result"]) == (event.name, event.result)
            assert tuple(one["args"]) == event.args
            assert tuple(one["text"]) == event.text
            assert {int(n): text for n, text in one["strings"].items()} == event.strings
            assert one["errno"] == (errno.errorcode[event.errno] if event.errno else None)
    assert any("\udcff\x01" in event.strings.values() for event in events)


def test_what_ends_it_is_recorded(engine: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    argv = ["python3", "-c", "import ctypes; ctypes.string_at(8)"]
    with Process(argv, trace=trace, engine=engine) as process:
        process.run(timeout=60)
    lines = trace.read_text().splitlines()
    assert lines[-2] == "--- SIGSEGV {si_signo=SIGSEGV, si_code=SEGV_MAPERR, si_addr=0x8} ---"
    assert lines[-1] == "+++ killed by SIGSEGV +++"
    with (
        Process(["sleep", "100"], trace=trace, engine=engine) as process,
        pytest.raises(ProcessTimeout),
    ):
        process.run(timeout=0.3)
    lines = trace.read_text().splitlines()
    assert re.match(r"(clock_)?nanosleep\(.*tv_sec=100.* <unfinished \.\.\.>\)\s+= \?", lines[-2])
    assert lines[-1] == "+++ killed by SIGKILL +++"


def test_several_processes_are_told_apart(engine: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with Process(["sh", "-c", "/bin/true; echo x"], trace=trace, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.text == "x\n"
    text = trace.read_text()
    assert re.search(r"^\[pid 1001\] execve\(\"/bin/true\", \[\"/bin/true\"\], ", text, re.M)
    assert "[pid 1001] +++ exited with 0 +++" in text
    assert re.search(r"wait4\(-1, \[{WIFEXITED\(s\) && WEXITSTATUS\(s\) == 0}\], .*= 1001", text)


def test_a_pipe_that_nobody_reads_holds_up_nobody_else(engine: str) -> None:
    reading, writing = os.pipe()
    try:
        argv = ["sh", "-c", "while :; do echo; done"]
        with Process(argv, trace=writing, engine=engine) as process:
            with pytest.raises(ProcessTimeout):
                process.run(timeout=0.5)
            assert process.usage()["output"] < 64 << 10
            os.read(reading, 1 << 20)
            with pytest.raises(ProcessTimeout):
                process.run(timeout=0.5)
    finally:
        os.close(reading)
        os.close(writing)


def test_any_arguments_can_be_told(engine: str, tmp_path: Path) -> None:
    """Calls of all numbers with wild pointers and lengths, by a program that means harm."""
    source = Path(__file__).with_name("hostile.c")
    subprocess.run(["cc", "-O1", "-static", "-o", tmp_path / "hostile", source], check=True)
    trace = tmp_path / "trace"
    argv = ["/b/hostile", "30000" if engine == "soft" else "3000"]
    with Process(
        argv, ro=[(tmp_path, "/b")], trace=trace, trace_json=True, events=9999, engine=engine
    ) as process:
        result = process.run(timeout=100)
        assert result.text == "still here\n"
        kept = len(process.events()) + process.events_lost
    calls = [json.loads(line) for line in trace.read_text().splitlines()]
    told = Counter(call["name"] for call in calls if call["type"] == "call")
    assert told == {name: made for name, (made, _) in result.system_calls.items()}
    assert len(told) > 300
    assert kept == len(calls)
