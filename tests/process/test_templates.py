"""Programs that are stopped, called, copied and reset."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from leftovers import Leftovers
from polyvisor import Process
from polyvisor.errors import (
    ConfigError,
    MemoryRangeError,
    ProcessEnded,
    ProcessTimeout,
    StateMismatch,
)

SOURCE = Path(__file__).with_name("service.c")


@pytest.fixture(scope="module", params=["-no-pie", "-pie", "-static"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("service") / "service"
    subprocess.run(["gcc", "-O1", "-fno-inline", request.param, "-o", path, SOURCE], check=True)
    return path


def started(service: Path, engine: str) -> Process:
    return Process([service, "abc"], files={"abc": b"abcdef"}, ro=[service], engine=engine)


def test_places_to_stop_at(engine: str, service: Path) -> None:
    with started(service, engine) as process:
        assert process.run_until("syscall:openat", timeout=20) is process
        assert process.stopped_at is not None
        assert (process.stopped_at.kind, process.stopped_at.name) == ("system call", "openat")
        process.run_until("ready", timeout=20)
        assert process.stopped_at.address == process.symbol("ready")
        assert process.stopped_at.kind == "address"
        assert process.run_until("syscall:write").stopped_at.name == "write"  # type: ignore[union-attr]
        assert process.run_until("exit_group", "syscall:openat").stopped_at.name == "exit_group"  # type: ignore[union-attr]
        result = process.run(timeout=20)
    assert (result.status, result.text) == (40, "starting\ndone\n")


def test_mistakes(engine: str, service: Path) -> None:
    with started(service, engine) as process:
        for name in ("no such thing", "syscall:handle"):
            with pytest.raises(ConfigError, match="neither a function"):
                process.run_until(name)
        with pytest.raises(ConfigError, match="no memory at 0x10"):
            process.run_until(16)
        with pytest.raises(ConfigError, match="needs a place"):
            process.run_until()
        process.run_until("ready", timeout=20)
        with pytest.raises(ConfigError, match="has no symbol 'absent'"):
            process.call("absent")
        with pytest.raises(ConfigError, match="6 arguments"):
            process.call("handle", 1, 2, 3, 4, 5, 6, 7)
        with pytest.raises(ConfigError, match="no room"):
            process.call("handle", bytes(16 << 20))
        with pytest.raises(MemoryRangeError):
            process.read(16, 4)
        with pytest.raises(MemoryRangeError):
            process.write(process.symbol("handle"), b"x")  # code cannot be written to
        with pytest.raises(StateMismatch, match="no copy"):
            process.reset()
        with pytest.raises(ProcessEnded) as ended:
            process.run_until("syscall:openat", timeout=20)
        assert ended.value.result.status == 40  # type: ignore[attr-defined]
        with pytest.raises(StateMismatch, match="has ended"):
            process.call("handle", b"", 0, b"")
        with pytest.raises(StateMismatch, match="has ended"):
            process.fork()


def test_calls(engine: str, service: Path) -> None:
    with started(service, engine) as process:
        process.run_until("ready", timeout=20)
        out = bytearray(8)
        for n in range(1, 5):
            assert process.call("handle", b"hello", 7, out) == 5000 + 7 + 1 + n
            assert out == bytes([97 + (40 + n) % 26]) * 8
        assert process.call("next_byte") == ord("b")
        assert process.call("half_of_seven") == 35
        assert process.read(process.symbol("counter"), 4) == (44).to_bytes(4, "little")
        process.write(process.symbol("counter"), (9).to_bytes(4, "little"))
        with pytest.raises(ProcessTimeout):
            process.call("spin", timeout=0.1)
    with started(service, engine) as process:
        process.run_until("ready", timeout=20)
        with pytest.raises(ProcessEnded) as ended:
            process.call("crash", timeout=20)
        assert ended.value.result.signal == 11  # type: ignore[attr-defined]
    with started(service, engine) as process:
        process.run_until("ready", timeout=20)
        with pytest.raises(ProcessEnded) as ended:
            process.call("leave", 3, timeout=20)
        assert ended.value.result.status == 3  # type: ignore[attr-defined]


def test_copies_are_alone(engine: str, service: Path) -> None:
    """Copies, and copies of copies, against what each was told."""
    rng = random.Random(5)
    with started(service, engine) as template:
        template.run_until("ready", timeout=20)
        out = bytearray(8)
        copies = [(template, dict[int, int]())]
        for _ in range(12):
            parent, counts = rng.choice(copies)
            copies.append((parent.fork(), dict(counts)))
            for _ in range(6):
                copy, counts = rng.choice(copies)
                where = rng.choice([0, 5, 4097, 3 << 20, 20 << 20])
                counts[where] = counts.get(where, 1 if where < 4 << 20 else 0) + 1
                assert copy.call("handle", b"", where, out) == where + counts[where]
        for copy, counts in copies[1:]:
            calls = sum(counts.values()) - sum(1 for where in counts if where < 4 << 20)
            result = copy.run(timeout=20)
            assert (result.status, result.text) == (40 + calls, "done\n")
            copy.close()


def test_reset(engine: str, service: Path) -> None:
    with started(service, engine) as template:
        template.run_until("ready", timeout=20)
        with template.fork() as copy:
            out = bytearray(8)
            for _ in range(5):
                assert copy.call("handle", b"xy", 9, out) == 2000 + 9 + 2
                assert copy.call("next_byte") == ord("b")
                assert copy.call("say", b"text") == 0
                assert copy.call("write_file", b"new") == 4
                assert copy.call("write_file", b"new") == -1
                assert copy.read(copy.symbol("counter"), 1) == bytes([41])
                copy.reset()
                assert copy.read(copy.symbol("counter"), 1) == bytes([40])
            with pytest.raises(ProcessTimeout):
                copy.call("spin", timeout=0.05)
            copy.reset()
            with pytest.raises(ProcessEnded):
                copy.call("crash", timeout=20)
            copy.reset()
            result = copy.run(timeout=20)
            assert (result.status, result.text) == (40, "done\n")
            copy.reset()
            assert copy.run(timeout=20).text == "done\n"
        assert template.run(timeout=20).text == "starting\ndone\n"


def test_nothing_stays_mapped(engine: str, service: Path) -> None:
    """Neither where the program's tables already reached, nor where it needed new ones."""
    with started(service, engine) as template:
        template.run_until("ready", timeout=20)
        near = (template.registers()["rsp"] & -4096) - (64 << 20)
        with template.fork() as copy:
            for place in (near, 0x300000000000, 0x310000000000, near):
                for other in (near, 0x300000000000, 0x310000000000):
                    with pytest.raises(ProcessEnded):
                        copy.call("peek", other, timeout=20)
                    copy.reset()
                assert copy.call("map_page", place) == place
                assert copy.call("peek", place) == 1
                copy.reset()
                with pytest.raises(ProcessEnded) as ended:
                    copy.call("peek", place, timeout=20)
                assert ended.value.result.signal == 11  # type: ignore[attr-defined]
                copy.reset()


def test_rights_are_what_they_were(engine: str, service: Path) -> None:
    """Whatever a program did with pages of the template, beside them, and elsewhere."""

    def survey(process: Process) -> bytes:
        out = bytearray(4 * 96)
        assert process.call("survey", out, timeout=60) == 96
        return bytes(out)

    with started(service, engine) as template:
        template.run_until("ready", timeout=20)
        with template.fork() as copy:
            wanted = survey(copy)
        assert {0, 1, 3} == set(wanted[::2])
        with template.fork() as copy:
            for seed in range(2, 14):
                for _ in range(seed % 3):
                    assert copy.call("mix", seed, 20, timeout=60) == 20
                    assert survey(copy) != wanted
                copy.reset()
                assert survey(copy) == wanted, seed
                copy.reset()


def test_python_that_is_warm(engine: str) -> None:
    """An interpreter with its modules, copied for each script."""
    script = """
import json, re, sys
memory = {n: str(n) for n in range(1000)}
open("/dev/null").close()
exec(sys.stdin.read())
"""
    with Process(["python3", "-c", script], engine=engine) as template:
        template.run_until("read", timeout=60)
        while template.read(template.symbol("_Py_NoneStruct"), 8) and not _reads_standard(template):
            template.run_until("read", timeout=60)
        for n in range(4):
            source = f"print(json.dumps([{n}, memory[{n}], len(memory)])); memory.clear()"
            with template.fork(stdin=source.encode()) as copy:
                assert copy.run(timeout=60).text == f'[{n}, "{n}", 1000]\n'


def _reads_standard(process: Process) -> bool:
    return process.registers()["rdi"] == 0


def test_nothing_is_left(engine: str, service: Path) -> None:
    def once() -> None:
        with started(service, engine) as template:
            template.run_until("ready", timeout=20)
            copies = [template.fork() for _ in range(5)]
            copies[0].call("say", b"x")
            copies[1].run(timeout=20)
        assert copies[2].call("next_byte") == ord("b")  # without its template
        for copy in copies:
            copy.close()

    once()
    before = Leftovers()
    for _ in range(3):
        once()
    before.check()


def test_only_what_stands_alone_is_copied(engine: str) -> None:
    script = (
        "import threading, os\nthreading.Thread(target=lambda: os.read(0, 9)).start()\nos.getppid()"
    )
    reading, writing = os.pipe()
    try:
        with Process(["python3", "-c", script], engine=engine, stdin=reading) as process:
            process.run_until("getppid", timeout=60)
            with pytest.raises(StateMismatch, match="one process and one thread"):
                process.fork()
    finally:
        os.close(reading)
        os.close(writing)
