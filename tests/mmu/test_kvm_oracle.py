"""Random tables, translated by KVM's own walker (KVM_TRANSLATE) and by native/mmu.

KVM tells whether a supervisor may read there, and from which guest-physical address; and sets the
accessed bits, which are compared too. Walks of tables that are outside memory are left out: KVM
takes those for not present, this walker reads all ones, as from an empty bus.
POLYVISOR_MMU_WALKS=100000 makes it that many walks.
"""

from __future__ import annotations

import os
from random import Random

import pytest
import reference as ref
from kvm_translate import Vm
from worlds import HIGH, HIGH_PAGES, LOW_PAGES, PAGE, build, new_memory, random_address

from polyvisor.mmu import MODES

WALKS = max(int(os.environ.get("POLYVISOR_MMU_WALKS", "0")), 1500)
SEED = int(os.environ.get("POLYVISOR_MMU_SEED", "1"))
REGIONS = {0: LOW_PAGES * PAGE, HIGH: HIGH_PAGES * PAGE}
PSE, SMEP, SMAP, NXE = 1 << 4, 1 << 20, 1 << 21, 1 << 11


def registers(r: Random, vm: Vm, mode: str, width: int) -> ref.Registers:
    cr0, cr4, efer = MODES[mode]
    cr4 &= ~PSE
    for bit, feature in ((PSE, "pse36"), (SMEP, "smep"), (SMAP, "smap")):
        if feature in vm.features and r.getrandbits(1):
            cr4 |= bit
    if mode != "32-bit":
        efer = efer & ~NXE | (NXE if "nx" in vm.features and r.randrange(5) else 0)
    low = LOW_PAGES * PAGE
    return ref.Registers(
        cr0=cr0,
        cr3=r.randrange(LOW_PAGES) * PAGE,
        cr4=cr4,
        efer=efer,
        maxphyaddr=width,
        pages_1gb="1gb" in vm.features,
        pdpte=tuple(r.randrange(0, low, PAGE) | (r.randrange(12) > 0) for _ in range(4)),  # type: ignore[arg-type]
    )


# KVM knows PSE-36 with 36 bits only, whatever MAXPHYADDR is.
@pytest.mark.kvm
@pytest.mark.parametrize(
    ("mode", "width"),
    [("32-bit", 36), ("pae", 36), ("pae", 40), ("4-level", 39), ("4-level", 46), ("5-level", 46)],
)
def test_walks_are_kvms(mode: str, width: int) -> None:
    r = Random(f"{SEED} {mode} {width}")
    native = new_memory()
    valid = compared = 0
    with Vm(REGIONS, width) as vm:
        if mode == "5-level" and "la57" not in vm.features:
            pytest.skip("this processor has no 5-level paging")
        if mode.endswith("-level") and "long" not in vm.features:
            pytest.skip("this KVM has no long mode")
        while compared < WALKS:
            regs = registers(r, vm, mode, width)
            world = build(r, native, mode, "", 4, regs)
            if mode == "pae":
                native.write(regs.cr3, b"".join(p.to_bytes(8, "little") for p in regs.pdpte))
            for start, area in vm.memory.items():
                area[:] = native.read(start, len(area))
            if not vm.set_registers(regs.cr0, regs.cr3, regs.cr4, regs.efer):
                pytest.skip(f"this KVM has no {mode} paging")
            # As loading CR3 did, whatever is written to the PDPTEs later.
            for _ in range(50):
                gva = random_address(r, mode)
                if not ref.canonical(mode, gva):
                    continue  # KVM_TRANSLATE does not look
                walk = world.space.walk(gva)
                if not all(level.in_memory for level in walk.levels):
                    continue
                answer = vm.translate(gva)
                ours = walk.physical if walk.ok else None
                assert answer == ours, f"KVM: {answer}\n{walk}"
                world.space.walk(gva, set_bits=True)
                compared += 1
                valid += walk.ok
            for start, area in vm.memory.items():
                assert native.read(start, len(area)) == area[:], f"accessed bits at {start:#x}"
    assert valid > compared // 20
