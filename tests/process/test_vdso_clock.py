"""The vDSO of process VMs: the time is no system call, and the same time."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from polyvisor import Process

if TYPE_CHECKING:
    from polyvisor import SystemCall

SOURCE = Path(__file__).with_name("clocks.c")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clocks")
    for name, options in (("static", ["-static"]), ("dynamic", [])):
        subprocess.run(
            ["cc", "-O1", "-Wall", "-Werror", *options, "-o", folder / name, SOURCE], check=True
        )
    return folder


@pytest.mark.parametrize("program", ["static", "dynamic"])
def test_it_agrees_with_the_system_call(engine: str, build: Path, program: str) -> None:
    times = 100_000 if engine == "soft" else 20_000
    argv = [f"/build/{program}", str(times)]
    with Process(argv, ro=[(build, "/build")], engine=engine) as process:
        result = process.run(timeout=100)
    lines = result.text.splitlines()
    assert len(lines) == 2, lines
    found = re.fullmatch(
        r"against the system call: back (\d+) times, by (\d+) ns; alone: (\d+) times", lines[0]
    )
    assert found, lines
    behind, nanoseconds, alone = map(int, found.groups())
    assert alone == 0
    # (While a host's clock is slewed: see native/process/clock_page.hpp.)
    assert behind < times / 10, lines
    assert nanoseconds < 25_000
    assert lines[1] == "0"
    # 400,000 more, which are no calls, but where the page was too old.
    assert result.system_calls["clock_gettime"][0] < times + 100
    assert "gettimeofday" not in result.system_calls
    assert "time" not in result.system_calls


def test_python_asks_it_too(engine: str) -> None:
    script = """
import time
before = time.monotonic()
times = [f() for _ in range(20000) for f in (time.time, time.monotonic, time.perf_counter)]
assert all(a <= b for n in range(3) for a, b in zip(times[n::3], times[n + 3::3]))
time.sleep(0.2)
print(0.2 < time.monotonic() - before < 60, time.thread_time() < 60, time.process_time() < 60)
"""
    with Process(["python3", "-c", script], engine=engine) as process:
        result = process.run(timeout=60)
    assert result.text == "True True True\n", result.stderr.decode()
    assert result.system_calls["clock_gettime"][0] < 500


ASK = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <sys/time.h>
#include <time.h>
int main(void) {
    struct timespec now;
    struct timeval day;
    unsigned cpu = 9;
    long sum = 0;
    for (int n = 0; n < 50; n++) {
        sum += clock_gettime(CLOCK_MONOTONIC, &now);
        sum += gettimeofday(&day, NULL);
        time_t second = time(NULL);
        sum += getcpu(&cpu, NULL) + clock_getres(CLOCK_REALTIME, NULL);
        /* time() tells the second of the last tick, which comes late to each second. */
        sum += second < day.tv_sec - 1 || second > day.tv_sec + 60;
    }
    return printf("%ld %ld %u\n", sum, (long)now.tv_sec, cpu) < 0;
}
"""


def test_hooks_see_what_it_would_answer(engine: str, tmp_path: Path) -> None:
    (tmp_path / "ask.c").write_text(ASK)
    subprocess.run(["cc", "-O1", "-o", tmp_path / "ask", tmp_path / "ask.c"], check=True)
    names = ("clock_gettime", "clock_getres", "gettimeofday", "time", "getcpu")
    with Process(["/p/ask"], ro=[(tmp_path, "/p")], engine=engine) as process:
        process.on_syscall(*names[1:])(lambda call: None)

        @process.on_syscall("clock_gettime")
        def answer(call: SystemCall) -> int:
            call.write(call.args[1], (4711).to_bytes(8, "little") + bytes(8))
            return 0

        result = process.run(timeout=60)
    assert result.text == "0 4711 0\n"
    assert [result.system_calls[name][0] for name in names] == [50] * 5
    # Nobody looks: hardly any of them is one.
    with Process(["/p/ask"], ro=[(tmp_path, "/p")], engine=engine) as process:
        process.on_syscall("write")(lambda call: None)
        result = process.run(timeout=60)
    assert result.text.startswith("0 ")
    assert result.system_calls["clock_gettime"][0] < 25
    assert "getcpu" not in result.system_calls
