"""From a native walk's numbers to what people call them: levels, flags, and why not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import msgspec

from polyvisor import _native
from polyvisor.mmu_registers import (
    CR0_WP,
    CR4_PSE,
    CR4_SMAP,
    EFER_NXE,
    Access,
    Ept,
    Npt,
)
from polyvisor.mmu_walk import (
    EPT_BITS,
    MEMORY_TYPES,
    NPF_BITS,
    PAGE_FAULT_BITS,
    Fault,
    FaultKind,
    Level,
    decode,
)


class Asked(msgspec.Struct, frozen=True):
    """The access that was walked for."""

    access: Access
    user: bool
    implicit: bool
    ac: bool


class Decoder(msgspec.Struct, frozen=True):
    """What the meaning of an entry depends on."""

    mode: str
    cr0: int
    cr4: int
    efer: int
    second: Ept | Npt | None
    #: [start, end) of what is memory.
    regions: tuple[tuple[int, int], ...]

    def levels(self, steps: Iterable[tuple[int, int, int, bool]], gva: int) -> list[Level]:
        """The entries of a report."""
        levels = []
        for address, entry, shift, second in steps:
            register = address == (1 << 64) - 1
            size = 4 if shift == 22 or (shift == 12 and self._is_32bit(second)) else 8
            flags, leaf = self._decode(entry, shift, second)
            # The guest's own tables lie behind the second dimension: what was translated is there.
            outside = not register and (second or self.second is None)
            in_memory = not outside or any(lo <= address < hi for lo, hi in self.regions)
            name = {48: "PML5E", 39: "PML4E", 30: "PDPTE", 12: "PTE"}.get(shift, "PDE")
            if second:
                name = ("EPT " if isinstance(self.second, Ept) else "NPT ") + name
            levels.append(
                Level(
                    name=name,
                    address=None if register else address,
                    entry=entry,
                    index=(gva >> 30) & 3 if register else (address & 0xFFF) // size,
                    size=1 << shift,
                    flags=flags,
                    leaf=leaf,
                    second=second,
                    in_memory=in_memory,
                )
            )
        return levels

    def _is_32bit(self, second: bool) -> bool:
        if second:
            return isinstance(self.second, Npt) and self.second.paging == "32-bit"
        return self.mode == "32-bit"

    def _decode(self, entry: int, shift: int, second: bool) -> tuple[tuple[str, ...], bool]:
        if second and isinstance(self.second, Ept):
            return _decode_ept(entry, shift, self.second)
        if not entry & 1:
            return (), False
        mode = self.second.paging if second and isinstance(self.second, Npt) else self.mode
        if mode == "pae" and shift == 30:  # a PDPTE of PAE has no rights
            return ("P", *decode(entry, {8: "PWT", 16: "PCD"})), False
        large = bool(entry & 0x80) and 12 < shift < 39
        if mode == "32-bit" and not second and not self.cr4 & CR4_PSE:
            large = False
        leaf = shift == 12 or large
        flags = ["P", *decode(entry, {2: "W", 4: "U", 8: "PWT", 16: "PCD", 32: "A"})]
        if leaf:
            flags += decode(entry, {64: "D", 256: "G"})
            flags += ["PS"] if large else []
            flags += ["PAT"] if entry & (0x1000 if large else 0x80) else []
        if entry >> 63:
            flags.append("XD")
        if leaf and mode in ("4-level", "5-level") and (key := entry >> 59 & 15):
            flags.append(f"key {key}")
        return tuple(flags), leaf

    def fault(self, report: _native.WalkReport, levels: tuple[Level, ...], asked: Asked) -> Fault:
        """Of a report that has one."""
        kind = cast("FaultKind", report.fault)
        level: Level | None = None
        words: tuple[str, ...] = ()
        gpa = qualification = error = None
        if kind == "not-canonical":
            error = 0
            reason = (
                "the address is not canonical"
                if self.mode in ("4-level", "5-level")
                else f"the address is beyond the 4 GiB of {self.mode} paging"
            )
        elif kind == "page-fault":
            error = report.error_code
            words = decode(error, PAGE_FAULT_BITS)
            level, reason = self._page_fault(
                error, [item for item in levels if not item.second], asked
            )
        else:
            gpa = report.fault_gpa
            # The entries that translated this one address: back to the last of the guest's.
            last = len(levels)
            while last and levels[last - 1].second:
                last -= 1
            level, reason = _second_fault(kind, report.qualification, levels[last:])
            if kind != "ept-misconfiguration":
                qualification = report.qualification
                names = EPT_BITS if kind == "ept-violation" else PAGE_FAULT_BITS | NPF_BITS
                words = decode(qualification, names)
        return Fault(
            kind=kind,
            vector=report.vector or None,
            error_code=error,
            qualification=qualification,
            gpa=gpa,
            during_walk=report.during_walk,
            level=level,
            words=words,
            reason=reason,
        )

    def _page_fault(
        self, error: int, levels: list[Level], asked: Asked
    ) -> tuple[Level | None, str]:
        if not levels:
            return None, "no entry was read"
        leaf = levels[-1]
        if not error & 1:
            return leaf, f"{leaf} is not present"
        if error & 8:
            return leaf, f"{leaf} has a reserved bit set"
        # A PDPTE register has no rights to look at.
        rights = [level for level in levels if level.address is not None]

        def first(flag: str, missing: bool) -> Level | None:
            return next((item for item in rights if (flag not in item.flags) == missing), None)

        if asked.user and (level := first("U", True)):
            return level, f"{level} is the supervisor's"
        if asked.access == "execute":
            if self.efer & EFER_NXE and (level := first("XD", False)):
                return level, f"{level} forbids execution"
            return leaf, f"{leaf} is a user page, which SMEP forbids the supervisor to execute"
        if not asked.user and not first("U", True) and self.cr4 & CR4_SMAP:
            if asked.implicit or not asked.ac:
                return leaf, f"{leaf} is a user page, which SMAP forbids the supervisor to access"
        if asked.access == "write" and (level := first("W", True)):
            if asked.user or self.cr0 & CR0_WP:
                return level, f"{level} is read-only"
        if error & 32:
            key = leaf.entry >> 59 & 15
            register = "PKRS" if first("U", True) else "PKRU"
            return leaf, f"{leaf} has protection key {key}, to which {register} forbids this access"
        return leaf, f"{leaf} forbids the access"


def _decode_ept(entry: int, shift: int, ept: Ept) -> tuple[tuple[str, ...], bool]:
    rights = {1: "R", 2: "W", 4: "X"}
    if ept.mode_based_execute:
        rights[1 << 10] = "XU"
    flags = decode(entry, rights)
    if not flags:
        return (), False
    large = bool(entry & 0x80) and shift in (30, 21)
    leaf = shift == 12 or large
    flags += ("PS",) if large else ()
    flags += decode(entry, {1 << 8: "A"})
    if leaf:
        kind = entry >> 3 & 7
        flags += decode(entry, {1 << 9: "D"})
        flags += (MEMORY_TYPES.get(kind, f"type {kind}"), *decode(entry, {1 << 6: "IPAT"}))
    return flags, leaf


def _second_fault(
    kind: FaultKind, qualification: int, levels: Sequence[Level]
) -> tuple[Level | None, str]:
    if not levels:
        return None, "the address is wider than the second dimension translates"
    leaf = levels[-1]
    if kind == "ept-misconfiguration":
        return leaf, f"{leaf} is no entry that the processor accepts"
    if not leaf.present:
        return leaf, f"{leaf} is not present"
    if kind == "nested-page-fault":
        if qualification & 8:
            return leaf, f"{leaf} has a reserved bit set"
        wanted = {4: "U", 2: "W"}
        for bit, flag in wanted.items():
            for level in levels:
                if qualification & bit and level.address is not None and flag not in level.flags:
                    what = "the supervisor's" if flag == "U" else "read-only"
                    return level, f"{level} is {what}"
        for level in levels:
            if "XD" in level.flags:
                return level, f"{level} forbids execution"
        return leaf, f"{leaf} forbids the access"
    for bit, flag, what in ((1, "R", "reads"), (2, "W", "writes"), (4, "X", "execution")):
        for level in levels:
            if qualification & bit and flag not in level.flags:
                return level, f"{level} forbids {what}"
    return leaf, f"{leaf} forbids the access"
