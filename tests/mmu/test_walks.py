"""The walker against the model of the manuals (reference.py), on random tables (worlds.py).

Every format, alone and below every second dimension, with every combination of control bits and
every kind of access; walks that change nothing, walks that set accessed and dirty bits (all memory
is compared after them) and probing ones. hypothesis looks for small examples of a difference.
POLYVISOR_MMU_WALKS=1000000 adds that many walks from a seed, which POLYVISOR_MMU_SEED sets.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from random import Random

import pytest
import reference as ref
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import FORMATS, SECONDS, World, build, new_memory, random_access, random_address

from polyvisor import _native

#: Tables of the quick tests, and walks of each.
EXAMPLES = 16
WALKS = 12
LONG = int(os.environ.get("POLYVISOR_MMU_WALKS", "0"))
SEED = int(os.environ.get("POLYVISOR_MMU_SEED", "1"))


@cache
def memory() -> _native.GuestMemory:
    return new_memory()


def told(report: _native.WalkReport) -> dict[str, object]:
    """What native/mmu says, field by field."""
    result: dict[str, object] = {
        "fault": report.fault,
        "error_code": report.error_code,
        "qualification": report.qualification,
        "fault_gpa": report.fault_gpa,
        "during_walk": report.during_walk,
        "vector": report.vector,
        "mapped": report.mapped,
    }
    if report.mapped:
        result |= {
            "physical": report.physical,
            "gpa": report.gpa,
            "shift": report.shift,
            "user": report.user,
            "writable": report.writable,
            "executable": report.executable,
            "global": report.is_global,
            "accessed": report.accessed,
            "dirty": report.dirty,
            "memory_type": report.memory_type,
            "key": report.key,
        }
    return result


def expected(outcome: ref.Outcome) -> dict[str, object]:
    """The same of the model."""
    page = outcome.page
    result: dict[str, object] = {
        "fault": outcome.fault,
        "error_code": outcome.error_code,
        "qualification": outcome.qualification,
        "fault_gpa": outcome.fault_gpa,
        "during_walk": outcome.during_walk,
        "vector": {"not-canonical": 13, "page-fault": 14}.get(outcome.fault, 0),
        "mapped": page is not None,
    }
    if page:
        result |= {
            "physical": page.address,
            "gpa": outcome.gpa,
            "shift": page.shift,
            "user": page.user,
            "writable": page.writable,
            "executable": page.executable,
            "global": page.is_global,
            "accessed": page.accessed,
            "dirty": page.dirty,
            "memory_type": page.pat,
            "key": page.key,
        }
    return result


def compare(r: Random, world: World, walks: int, seen: Counter[str] | None = None) -> None:
    """Some walks, each after the other had its effect on the tables."""
    model = world.memory()
    for _ in range(walks):
        gva = random_address(r, world.registers.mode)
        access = random_access(r)
        asked = {
            "write": access.kind == "write",
            "fetch": access.kind == "execute",
            "user": access.user,
            "implicit": access.implicit,
            "ac": access.ac,
        }
        pure = ref.walk(model, world.registers, gva, access, world.second)
        report = world.space.report(gva, **asked)
        assert told(report) == expected(pure), (hex(gva), access)
        assert report.steps == pure.steps, (hex(gva), access)

        any_access = ref.Access(rights=False)
        probe = ref.walk(model, world.registers, gva, any_access, world.second)
        report = world.space.report(gva, **asked, probe=True)
        assert told(report) == expected(probe), (hex(gva), "probe")
        assert report.steps == probe.steps, (hex(gva), "probe")
        where = probe.page.address if probe.page else None
        assert world.space.translate(gva) == where, hex(gva)

        touched = ref.Touched()
        changed = ref.Memory({start: data[:] for start, data in model.regions.items()})
        setting = ref.walk(
            changed, world.registers, gva, access, world.second, set_bits=True, touched=touched
        )
        if touched.overlap:
            continue
        model = changed
        report = world.space.report(gva, **asked, set_bits=True)
        assert told(report) == expected(setting), (hex(gva), access, "set_bits")
        for start, data in model.regions.items():
            assert world.native.read(start, len(data)) == data, (hex(gva), access, "memory")
        if seen is not None:
            seen[f"{setting.fault or 'ok'} {len(setting.steps)}"] += 1


def compare_many(r: Random, world: World, count: int) -> int:
    """Many addresses at once, far from each other or near, whose walks share something or all.
    Twice with effects: the second time nothing is left to set. Returns how many were translated."""
    mode = world.registers.mode
    base = random_address(r, mode)
    spread = r.choice((12, 16, 21, 25, 30, 39, 0))
    noise = Random(r.getrandbits(32))
    gvas = [
        base ^ noise.getrandbits(spread) if spread else random_address(noise, mode)
        for _ in range(count)
    ]
    access = random_access(r)
    asked = {
        "write": access.kind == "write",
        "fetch": access.kind == "execute",
        "user": access.user,
        "implicit": access.implicit,
        "ac": access.ac,
    }

    def model_of(memory: ref.Memory, set_bits: bool, touched: ref.Touched) -> list[int | None]:
        outcomes = [
            ref.walk(
                memory,
                world.registers,
                gva,
                access,
                world.second,
                set_bits=set_bits,
                touched=touched,
            )
            for gva in gvas
        ]
        return [o.page.address if o.page and not o.fault else None for o in outcomes]

    model = world.memory()
    found = model_of(model, False, ref.Touched())
    assert world.space.access_many(gvas, **asked) == found, (hex(base), spread, access)
    touched = ref.Touched()
    for _ in range(2):
        found = model_of(model, True, touched)
        if touched.overlap:
            return 0
        assert world.space.access_many(gvas, **asked, set_bits=True) == found, (hex(base), access)
        for start, data in model.regions.items():
            assert world.native.read(start, len(data)) == data, (hex(base), spread, access)
    return count - found.count(None)


COMBINATIONS = [(mode, second) for mode in FORMATS for second in ("", *SECONDS)]
COMBINATIONS.remove(("none", ""))


@pytest.mark.parametrize(("mode", "second"), COMBINATIONS)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(r=st.randoms(use_true_random=False))
def test_every_walk_is_the_manuals(mode: str, second: str, r: Random) -> None:
    world = build(r, memory(), mode, second, 1)
    compare(r, world, WALKS)
    compare_many(r, world, 4)


@pytest.mark.parametrize(("mode", "second"), COMBINATIONS)
def test_many_walks_are_the_manuals(mode: str, second: str) -> None:
    """More different entries than hypothesis has patience for, from a fixed seed."""
    r = Random(f"{SEED} {mode} {second}")
    seen: Counter[str] = Counter()
    done = together = 0
    wanted = max(LONG // len(COMBINATIONS), 240)
    while done < wanted:
        world = build(r, memory(), mode, second, 4)
        together += compare_many(r, world, 70)
        compare(r, world, 20, seen)
        done += 20
    # The tables were worth walking: something was translated, and every kind of fault happened.
    kinds = Counter[str]()
    for what, count in seen.items():
        kinds[what.split()[0]] += count
    print(mode, second or "alone", dict(kinds))
    assert kinds["ok"] > done // 40, kinds
    assert together > 0
