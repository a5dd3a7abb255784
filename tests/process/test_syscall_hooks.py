"""System calls that Python observes, answers and denies."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from polyvisor import Process
from polyvisor.errors import ConfigError, MemoryFault, ProcessTimeout, StateMismatch

if TYPE_CHECKING:
    from polyvisor import SystemCall


def python(script: str, engine: str, **options: object) -> Process:
    return Process(["python3", "-S", "-E", "-c", script], engine=engine, **options)  # type: ignore[arg-type]


def test_a_hook_observes(engine: str) -> None:
    seen: list[tuple[str, str, int]] = []
    with Process(["cat", "text"], files={"text": "hello"}, engine=engine) as process:

        @process.on_syscall("openat")
        def opened(call: SystemCall) -> None:
            assert call.args[0] & 0xFFFFFFFF == 0xFFFFFF9C
            seen.append((call.string(1), call.path(1), call.pid))

        @process.on_syscall("read", after=True)
        def was_read(call: SystemCall) -> None:
            assert call.result is not None
            if call.fd_path(call.args[0]) == "/work/text":
                seen.append((call.name, call.read(call.args[1], call.result).decode(), call.result))
                assert 0 <= call.duration < 10

        result = process.run(timeout=30)
    assert result.text == "hello"
    assert seen[-3:] == [("text", "/work/text", 1000), ("read", "hello", 5), ("read", "", 0)]


def test_a_hook_answers_and_denies(engine: str) -> None:
    script = """
import os
print(os.getppid(), os.getpgid(0))
try: os.mkdir("/work/d")
except OSError as e: print(e.errno)
print(os.listdir("/work"))
fd = os.open("/work/given", os.O_RDONLY)
print(os.read(fd, 100))
"""
    with python(script, engine, files={"given": "as it is"}) as process:
        process.on_syscall("getppid")(lambda call: 4711)
        process.on_syscall("mkdir", "mkdirat")(lambda call: call.deny(errno.EDQUOT))

        @process.on_syscall("read")
        def invent(call: SystemCall) -> int | None:
            if call.fd_path(call.args[0]) != "/work/given":
                return None
            call.write(call.args[1], b"invented")
            return 8

        result = process.run(timeout=60)
    assert result.stderr == b""
    lines = result.text.splitlines()
    assert lines[0] == "4711 1000"
    assert lines[1:] == [str(errno.EDQUOT), "['given']", "b'invented'"]
    assert result.system_calls["getppid"] == (1, 0)
    assert result.system_calls.get("mkdir", result.system_calls.get("mkdirat")) == (1, 1)


def test_all_calls_are_shown_to_a_hook_without_names(engine: str) -> None:
    made: dict[str, int] = {}
    with Process(["true"], engine=engine) as process:

        @process.on_syscall()
        def count(call: SystemCall) -> None:
            made[call.name] = made.get(call.name, 0) + 1

        result = process.run(timeout=30)
    assert made == {name: calls for name, (calls, _) in result.system_calls.items()}


def test_what_a_hook_raises_comes_out(engine: str) -> None:
    class Mine(Exception):
        pass

    raising = True
    with python("import os; print(os.getppid())", engine) as process:

        @process.on_syscall("getppid")
        def fail(call: SystemCall) -> int:
            if raising:
                raise Mine("of the hook")
            return 5

        for _ in range(2):  # and it is shown the call again
            with pytest.raises(Mine) as caught:
                process.run(timeout=60)
            assert caught.traceback[-1].name == "fail"
        raising = False
        assert process.run(timeout=60).text == "5\n"


@pytest.mark.parametrize(
    ("answer", "error"), [("text", TypeError), (True, TypeError), (1 << 64, OverflowError)]
)
def test_answers_that_are_none(answer: object, error: type[Exception]) -> None:
    with Process(["true"], engine="soft") as process:
        process.on_syscall("brk")(lambda call: answer)  # type: ignore[arg-type, return-value]
        with pytest.raises(error):
            process.run(timeout=30)


def test_memory_that_is_not_there(engine: str) -> None:
    faults: list[int] = []
    with python("import os; os.getppid()", engine) as process:

        @process.on_syscall("getppid")
        def look(call: SystemCall) -> None:
            for address in (0, 8, 1 << 47, (1 << 64) - 8, 0xFFFF_8000_0000_0000):
                for reach in (
                    lambda at: call.read(at, 16),
                    lambda at: call.read(at, (1 << 64) - 1),
                    lambda at: call.write(at, b"12345678"),
                ):
                    with pytest.raises(MemoryFault) as caught:
                        reach(address)
                    faults.append(caught.value.gva)
            with pytest.raises(IndexError):
                call.string(6)
            with pytest.raises(ConfigError):
                call.deny(0)
            assert call.fd_path(999) is None
            assert call.fd_path(-1) is None

        process.run(timeout=60)
    assert len(faults) == 15


def test_a_call_is_of_use_in_its_hook_only(engine: str) -> None:
    kept: list[SystemCall] = []
    with Process(["cat", "/dev/null"], engine=engine) as process:
        process.on_syscall("openat")(kept.append)
        process.run(timeout=30)
        assert kept[-1].name == "openat"
        for use in (
            lambda: kept[-1].string(1),
            lambda: kept[-1].read(kept[-1].args[1], 1),
            lambda: kept[-1].fd_path(0),
        ):
            with pytest.raises(StateMismatch):
                use()


RACE = r"""
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static char path[32] = "/work/public";
static volatile int end;
static void* change(void* none) {
    while (!end) {
        memcpy(path, "/work/public", 13);
        asm volatile("" ::: "memory");
        memcpy(path, "/work/secret", 13);
        asm volatile("" ::: "memory");
    }
    return none;
}
int main(void) {
    pthread_t other;
    char text[8];
    int secrets = 0, opened = 0;
    pthread_create(&other, NULL, change, NULL);
    for (int n = 0; n < 300; ++n) {
        int fd = open(path, O_RDONLY);
        if (fd < 0) continue;
        ++opened;
        if (read(fd, text, 1) == 1 && *text == 's') ++secrets;
        close(fd);
    }
    end = 1;
    pthread_join(other, NULL);
    printf("%d %d\n", opened > 0, secrets);
}
"""


def test_the_string_that_was_shown_is_the_one_that_is_served(engine: str, tmp_path: Path) -> None:
    """Another thread writes into the path all the time."""
    command = ["cc", "-O1", "-static", "-pthread", "-x", "c", "-o", tmp_path / "race", "-"]
    subprocess.run(command, input=RACE.encode(), check=True)
    files = {"public": "public", "secret": "secret"}
    shown: set[str] = set()
    with Process(["/b/race"], ro=[(tmp_path, "/b")], files=files, engine=engine) as process:

        @process.on_syscall("openat", "open")
        def guard(call: SystemCall) -> int | None:
            path = call.string(call.name == "openat")
            shown.add(path)
            time.sleep(0.0005)  # ... in which the other thread has its turn
            return None if path == "/work/public" else call.deny(errno.EACCES)

        result = process.run(timeout=60)
    assert result.text == "1 0\n"
    assert shown >= {"/work/public", "/work/secret"}


def test_several_processes_and_threads(engine: str) -> None:
    script = """
import os, threading
def work():
    for _ in range(20): os.getppid()
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
"""
    tids: dict[int, int] = {}
    with python(script, engine) as process:

        @process.on_syscall("getppid")
        def count(call: SystemCall) -> None:
            tids[call.tid] = tids.get(call.tid, 0) + 1

        assert process.run(timeout=60).status == 0
    assert sorted(tids.values()) == [20] * 4


def test_a_timeout_while_a_hook_takes_long(engine: str) -> None:
    with python("import os; os.getppid(); os.getppid(); print(1)", engine) as process:

        @process.on_syscall("getppid")
        def slow(call: SystemCall) -> None:
            time.sleep(0.4)

        with pytest.raises(ProcessTimeout):
            process.run(timeout=0.02)
        for _ in range(100):
            try:
                assert process.run(timeout=0.3).text == "1\n"
                break
            except ProcessTimeout:
                pass


def test_ctrl_c_in_a_hook(engine: str) -> None:
    with python("import os; os.getppid()", engine) as process:

        @process.on_syscall("getppid")
        def interrupted(call: SystemCall) -> None:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            while True:
                time.sleep(0.01)

        with pytest.raises(KeyboardInterrupt):
            process.run(timeout=60)


def test_a_hook_ends_the_process(engine: str) -> None:
    process = python("import os; os.getppid(); print('never')", engine)

    @process.on_syscall("getppid")
    def close(call: SystemCall) -> None:
        with pytest.raises(StateMismatch):
            process.run()
        process.close()

    with pytest.raises(StateMismatch):
        process.run(timeout=60)


def test_mistakes() -> None:
    with Process(["true"], engine="soft") as process:
        with pytest.raises(ConfigError) as wrong:
            process.on_syscall("no_such_call")(lambda call: None)
        assert "no_such_call" in str(wrong.value)
        with pytest.raises(ConfigError):
            process.on_syscall("read")(5)  # type: ignore[type-var]
    with pytest.raises(StateMismatch):
        process.on_syscall("read")(lambda call: None)
