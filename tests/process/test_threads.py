"""Programs with several threads, beside themselves outside."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from leftovers import Leftovers
from polyvisor import Process
from polyvisor.errors import ProcessTimeout

SOURCE = Path(__file__).with_name("threads.c")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "threads"
    subprocess.run(["gcc", "-O1", "-pthread", "-o", path, SOURCE], check=True)
    return path


@pytest.mark.parametrize(
    "what", ["count", "timeout", "exit", "crash", "execute", "exits", "main-exits"]
)
def test_they_do_as_they_do_outside(engine: str, program: Path, what: str) -> None:
    wanted = subprocess.run([program, what], capture_output=True, check=False, timeout=60)
    for _ in range(3):
        with Process([program, what], ro=[program], engine=engine) as process:
            result = process.run(timeout=60)
        assert result.stdout == wanted.stdout
        if wanted.returncode >= 0:
            assert (result.reason, result.status) == ("exited", wanted.returncode)
        else:
            assert (result.reason, result.signal) == ("signal", -wanted.returncode)


def test_python_threads(engine: str) -> None:
    script = """
import concurrent.futures, queue, threading
q = queue.Queue()
def produce(n):
    for i in range(50): q.put(n * i)
threads = [threading.Thread(target=produce, args=(n,)) for n in range(5)]
for t in threads: t.start()
for t in threads: t.join()
print(sum(q.get() for _ in range(250)))
with concurrent.futures.ThreadPoolExecutor(4) as pool: print(sum(pool.map(len, ["ab"] * 100)))
print(threading.active_count())
"""
    with Process(["python3", "-c", script], engine=engine) as process:
        assert process.run(timeout=60).text == "12250\n200\n1\n"


def test_they_stand_still_after_a_timeout(engine: str, program: Path) -> None:
    """Also threads that spin; and none of the host's is left at the end."""
    for _ in range(2):  # what is opened once stays; the second tells that a vCPU is worth keeping
        with Process(["true"], engine=engine) as process:
            process.run(timeout=30)
    before = Leftovers()
    for _ in range(5):
        with Process(
            [program, "exit-never"], ro=[program], engine=engine, env={"X": "1"}
        ) as process:
            # (Its third thread exits; so this is a race that either wins.)
            try:
                process.run(timeout=0.0)
            except ProcessTimeout:
                time.sleep(0.05)
                used = process._checked().cpu_seconds
                time.sleep(0.2)
                assert process._checked().cpu_seconds == pytest.approx(used, abs=0.01)
            assert process.run(timeout=30).status == 7
    before.check()


def test_as_many_as_it_may_have(engine: str) -> None:
    script = """
import threading
stop = threading.Event(); n = 0
try:
    while True:
        threading.Thread(target=stop.wait).start(); n += 1
except RuntimeError as error: print(error, n)
stop.set()
"""
    with Process(["python3", "-c", script], engine=engine, memory="4G", threads=40) as process:
        assert process.run(timeout=60).text == "can't start new thread 39\n"
