"""Programs in machines of a pool: they find nothing of each other, and the pool outlives them."""

from __future__ import annotations

import gc
import subprocess
import sys
import time

import pytest

from polyvisor import Process, ProcessPool
from polyvisor.errors import ConfigError


def wait_for(pool: ProcessPool, count: int) -> None:
    deadline = time.monotonic() + 20
    while pool.idle != count and time.monotonic() < deadline:
        time.sleep(0.002)
    assert pool.idle == count


def test_programs_take_turns(engine: str) -> None:
    with ProcessPool(2, memory="64M", engine=engine) as pool:
        wait_for(pool, 2)
        for n in range(6):
            argv = ["sh", "-c", f"cat; echo {n}"]
            with Process(argv, stdin=b"in ", pool=pool) as process:
                assert process.engine == pool.engine == engine
                assert process.run(timeout=60).text == f"in {n}\n"
        # One that is killed in the middle, and one that never ran.
        endless = Process(["sh", "-c", "while :; do :; done"], pool=pool)
        with endless, pytest.raises(TimeoutError):
            endless.run(timeout=0.05)
        Process(["sh"], pool=pool).close()
        wait_for(pool, 2)
        process = Process(["sh", "-c", "echo after"], pool=pool)
    assert pool.idle == 0
    assert process.run(timeout=60).text == "after\n"
    process.close()
    with Process(["sh", "-c", "echo closed"], pool=pool) as process:
        assert process.run(timeout=60).text == "closed\n"


def test_memory_limit_is_the_pools(engine: str) -> None:
    script = "x = bytearray(100 << 20)"
    with ProcessPool(1, memory="64M", engine=engine) as pool:
        for _ in range(2):
            with Process(["python3", "-S", "-c", script], memory="1G", pool=pool) as process:
                assert process.run(timeout=60).status != 0


def test_a_pool_that_nobody_closes(engine: str) -> None:
    pool = ProcessPool(1, engine=engine)
    process = Process(["sh", "-c", "echo 1"], pool=pool)
    del pool
    gc.collect()
    assert process.run(timeout=60).text == "1\n"
    process.close()
    script = (
        "from polyvisor import ProcessPool, Process\n"
        f"pool = ProcessPool(3, engine={engine!r})\n"
        "process = Process(['sh', '-c', 'echo done'], pool=pool)\n"
        "print(process.run(timeout=60).text, end='')\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"done\n", b"")


@pytest.mark.parametrize("count", [0, -1, 10_001])
def test_impossible_pools(count: int) -> None:
    with pytest.raises(ConfigError):
        ProcessPool(count, engine="soft")
