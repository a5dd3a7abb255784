"""Many kvm machines in one process leave nothing behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from guestcode import LOOP_FOREVER, end, real_mode

from leftovers import settled

pytestmark = pytest.mark.kvm


def inventory() -> dict[str, int]:
    """File descriptors, threads and mappings of this process."""
    settled()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "tasks": len(os.listdir("/proc/self/task")),
        "threads": threading.active_count(),
        # The allocator keeps anonymous memory; what a VM maps has a name.
        "mappings": sum("kvm" in line or "memfd" in line or "anon_inode" in line for line in maps),
        "all mappings": len(maps),
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("irqchip", ["kernel", "user"])
def test_a_hundred_machines(irqchip: str) -> None:
    def one(index: int) -> None:
        code = end() if index % 2 else LOOP_FOREVER
        with real_mode(code, engine="kvm", irqchip=irqchip, cpus=1 + index % 3) as machine:
            if index % 10 == 9:
                return  # never started
            machine.start()
            if index % 2:
                machine.wait(20)
            machine.stop()

    one(1)
    one(4)
    before = inventory()
    for index in range(100):
        one(index)
    after = inventory()
    # glibc may add arenas for threads, a few mappings each; 100 leaks would be more.
    spare = after.pop("all mappings") - before.pop("all mappings")
    assert after.pop("tasks") <= before.pop("tasks")  # another test's may have been on their way
    assert after == before
    assert spare < 50


@pytest.mark.timeout(300)
def test_many_at_once() -> None:
    before = inventory()
    machines = [real_mode(LOOP_FOREVER, engine="kvm") for _ in range(20)]
    for machine in machines:
        machine.start()
    during = inventory()
    assert during["descriptors"] > before["descriptors"]
    for machine in machines:
        machine.close()
    after = inventory()
    assert after["descriptors"] <= before["descriptors"] + 2  # /dev/kvm itself
    assert after["tasks"] <= before["tasks"]
    assert after["mappings"] == before["mappings"]
