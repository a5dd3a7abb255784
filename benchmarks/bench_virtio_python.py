"""Claim: a virtio device written in Python serves at least 1.5 million chains per second: pops one,
reads its 16 bytes, writes 16, pushes it. Split and packed; the driver's side is not in the time."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import report
from polyvisor.virtio import VirtioDevice
from polyvisor.virtio.testing import FakeGuest

if TYPE_CHECKING:
    from polyvisor._ring import Queue

LEAST = 1.5e6


class Copier(VirtioDevice):
    device_type = 42
    name = "copier"
    queue_sizes = (1024,)

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            chain.write(chain.read(16))
            chain.push(16)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def bench_chains(benchmark: BenchmarkFixture, packed: bool) -> None:
    """CPU time from the driver's notification to its return, half a queue of chains each time."""

    def rate() -> float:
        with FakeGuest(Copier(), packed=packed, queue_size=1024) as guest:
            native, rates = guest.native, []
            for _ in range(400):
                offered = native.offer_many(0, 512, 16, 16)
                started = time.thread_time()
                native.kick(0)
                rates.append(offered / (time.thread_time() - started))
                assert native.discard_used(0) == offered
        return statistics.median(rates)

    chains = benchmark.pedantic(rate, rounds=1)
    report(benchmark, chains=chains, limit=LEAST)
    assert chains >= LEAST
