"""Raw bytes as page tables: whatever memory holds, a walk ends, and ends with an answer.

Two kinds of bytes: hypothesis's own, which it can take apart when something is found, and pages of
a seed's noise, some of whose entries are made to point back into the tables, so that walks go round
in circles. POLYVISOR_MMU_FUZZ=100000 makes it that many address spaces.
"""

from __future__ import annotations

import os
from functools import cache
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvisor import _native
from polyvisor.errors import ConfigError
from polyvisor.mmu import AddressSpace, Ept, Npt

PAGE = 4096
PAGES = 8
SPACES = max(int(os.environ.get("POLYVISOR_MMU_FUZZ", "0")), 600)
SEED = int(os.environ.get("POLYVISOR_MMU_SEED", "1"))
#: A walk in two dimensions of five levels each reads so many entries.
MOST_STEPS = 5 * 6 + 5


@cache
def memory() -> _native.GuestMemory:
    """Two regions: tables may reach over the end of one, and into the next."""
    return _native.GuestMemory([(0, PAGES * PAGE // 2), (PAGES * PAGE // 2, PAGES * PAGE // 2)])


def any_registers(r: Random) -> dict[str, Any]:
    """Mostly what a CPU can have."""
    long_mode = r.getrandbits(1)
    cr0 = 0x80000001 if r.randrange(16) else r.getrandbits(32)
    cr4 = r.getrandbits(25) | (0x20 if long_mode else 0)
    result: dict[str, Any] = {
        "cr0": cr0 | (r.getrandbits(1) << 16),
        "cr3": r.randrange(PAGES + 2) * PAGE if r.randrange(8) else r.getrandbits(47),
        "cr4": cr4,
        "efer": (0x500 if long_mode else 0) | r.getrandbits(1) << 11,
        "pkru": r.getrandbits(32),
        "pkrs": r.getrandbits(32),
        "maxphyaddr": r.randrange(32, 53),
        "pages_1gb": bool(r.getrandbits(1)),
        "pse36": bool(r.getrandbits(1)),
    }
    if r.getrandbits(1):
        result["pdpte"] = [r.randrange(PAGES) * PAGE | r.getrandbits(1) for _ in range(4)]
    second = r.randrange(4)
    if second == 1:
        eptp = r.randrange(PAGES) * PAGE | r.choice((0x1E, 0x5E, 0x26, 0x66, r.getrandbits(12)))
        result["ept"] = Ept(
            eptp,
            execute_only=bool(r.getrandbits(1)),
            mode_based_execute=bool(r.getrandbits(1)),
        )
    elif second == 2:
        paging = r.choice(("32-bit", "pae", "4-level", "5-level"))
        result["npt"] = Npt(r.randrange(PAGES) * PAGE, paging=paging, nxe=bool(r.getrandbits(1)))
    return result


def explore(r: Random) -> str:
    """Makes an address space of what is in memory, and asks it everything. How that ended."""
    try:
        space = AddressSpace(memory(), **any_registers(r))
    except ConfigError as refused:
        return f"refused {refused.field}"
    end = "fault"
    for _ in range(6):
        gva = r.getrandbits(64) if r.getrandbits(1) else r.getrandbits(32)
        if r.getrandbits(1) and gva >> 47 & 1:
            gva |= 0xFFFF << 48
        assert space.translate(gva) == space.walk(gva, probe=True).physical
        walk = space.walk(
            gva,
            r.choice(("read", "write", "execute")),
            user=bool(r.getrandbits(1)),
            implicit=not r.randrange(8),
            ac=bool(r.getrandbits(1)),
            set_bits=bool(r.getrandbits(1)),
        )
        assert len(walk.levels) <= MOST_STEPS
        assert walk.fault or walk.physical is not None
        if not walk.fault:
            end = "translated"
        else:
            assert str(walk.fault)
            assert walk.fault.level in (None, *walk.levels)
        assert str(walk).count("\n") >= len(walk.levels)
    return end


@settings(max_examples=100)
@given(r=st.randoms(use_true_random=False), raw=st.binary(max_size=256))
def test_any_bytes_may_be_tables(r: Random, raw: bytes) -> None:
    page = (raw + bytes(8))[: max(8, len(raw) // 8 * 8)]
    memory().write(0, (page * (PAGES * PAGE // len(page) + 1))[: PAGES * PAGE])
    explore(r)


def test_noise_that_points_into_itself() -> None:
    r = Random(SEED)
    ends = []
    for _ in range(SPACES):
        noise = bytearray(r.randbytes(PAGE))
        size = r.choice((4, 8))
        for at in range(0, PAGE, size):
            if r.randrange(4):  # a link to some table, with random rights
                flags = r.getrandbits(12) & ~0x80 | 1 if r.randrange(8) else r.getrandbits(12)
                entry = r.randrange(PAGES) * PAGE | flags
                noise[at : at + size] = entry.to_bytes(size, "little")
        for page in range(PAGES):
            memory().write(page * PAGE, noise[page * 8 :] + noise[: page * 8])
        ends.append(explore(r))
    refused = {end for end in ends if end.startswith("refused")}
    assert refused <= {f"refused {name}" for name in ("cr0", "cr3", "cr4", "eptp", "ncr3", "pdpte")}
    assert ends.count("translated") > SPACES // 20
    assert ends.count("fault") > SPACES // 20


@pytest.mark.parametrize("mode", ["32-bit", "pae", "4-level", "5-level"])
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x63, 0x67, 0xE7, 0xFF])
def test_one_byte_everywhere(mode: Any, byte: int) -> None:
    memory().write(0, bytes([byte]) * (PAGES * PAGE))
    space = AddressSpace(memory(), cr3=0, paging=mode, pdpte=(1, 1, 1, 1))
    for gva in (0, 0xFFFFFFFF, (1 << 64) - 1, 1 << 47, 1 << 56):
        walk = space.walk(gva, "write", user=True, set_bits=True)
        assert walk.fault or walk.mapped
        assert len(walk.levels) <= 5
