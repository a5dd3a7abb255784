"""Claim: one `AddressSpace.translate()` from Python takes at most 400 ns."""

from __future__ import annotations

import timeit
from random import Random

from pytest_benchmark.fixture import BenchmarkFixture

from measure import report
from polyvisor import _native
from polyvisor.mmu import AddressSpace

LIMIT_NS = 400.0
PAGE = 4096
#: 16 MB of pages, mapped anywhere: the tables fit into a CPU's second-level cache, barely.
MAPPED = 4096
CALLS = 20_000


def make_space() -> tuple[AddressSpace, list[int]]:
    """Four levels, and the addresses that they map, shuffled."""
    tables = 3 + MAPPED // 512
    memory = _native.GuestMemory([(0, (tables + MAPPED) * PAGE)])
    frames = [(tables + n) * PAGE for n in range(MAPPED)]
    r = Random(1)
    r.shuffle(frames)

    def put(table: int, index: int, entry: int) -> None:
        memory.write(table * PAGE + index * 8, entry.to_bytes(8, "little"))

    put(0, 256, 1 * PAGE | 3)
    put(1, 0, 2 * PAGE | 3)
    for n in range(MAPPED // 512):
        put(2, n, (3 + n) * PAGE | 3)
    for n, frame in enumerate(frames):
        put(3 + n // 512, n % 512, frame | 0x63)
    base = 0xFFFF_8000_0000_0000
    space = AddressSpace(memory, cr3=0, paging="4-level")
    addresses = [base + n * PAGE + r.randrange(PAGE) for n in range(MAPPED)]
    for n in range(0, MAPPED, 37):
        assert space.translate(addresses[n]) == frames[n] | addresses[n] & 0xFFF
    r.shuffle(addresses)
    return space, addresses


def bench_translate(benchmark: BenchmarkFixture) -> None:
    """Each call as one writes it, looking the method up; the cost of the loop is part of it."""
    space, addresses = make_space()
    many = (addresses * (CALLS // MAPPED + 1))[:CALLS]

    def loop() -> None:
        for gva in many:
            space.translate(gva)

    benchmark.pedantic(loop, rounds=20, warmup_rounds=2)
    ns = min(timeit.repeat(loop, number=1, repeat=20)) / CALLS * 1e9
    missing = min(timeit.repeat(lambda: space.translate(5), number=CALLS, repeat=5)) / CALLS * 1e9
    walk = min(timeit.repeat(lambda: space.walk(many[0]), number=500, repeat=5)) / 500 * 1e6
    report(benchmark, ns_per_translate=ns, limit=LIMIT_NS, ns_not_mapped=missing, us_per_walk=walk)
    assert ns <= LIMIT_NS, f"{ns:.0f} ns"
