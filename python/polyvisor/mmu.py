"""Page tables, looked at from outside: how an address of a guest is translated, and why not.

    space = AddressSpace(memory, cr3=0x1000, paging="4-level")
    space.translate(0xffffffff81000000)            # where the byte is in memory, or None
    print(space.walk(0xffffffff81000000, "write"))  # every entry on the way, and a fault if any

`docs/mmu.md` tells more. The rules are those of the processors' manuals: SDM 3A chapter 4 (paging),
3C 29.3 (EPT), APM volume 2, chapters 5 and 15.25 (nested paging).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index as as_int
from typing import Any, Literal, Protocol, cast

import msgspec

from polyvisor import _native
from polyvisor.cpu import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME
from polyvisor.errors import ConfigError
from polyvisor.mmu_walk import (
    EPT_BITS,
    MEMORY_TYPES,
    NPF_BITS,
    PAGE_FAULT_BITS,
    Fault,
    FaultKind,
    Level,
    Walk,
    decode,
)
from polyvisor.virtual import VirtualMemory

CR0_WP = 1 << 16
CR4_PSE = 1 << 4
CR4_PGE = 1 << 7
CR4_LA57 = 1 << 12
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
CR4_PKE = 1 << 22
CR4_PKS = 1 << 24
EFER_NXE = 1 << 11

Paging = Literal["none", "32-bit", "pae", "4-level", "5-level"]
Access = Literal["read", "write", "execute"]

#: Control registers (CR0, CR4, EFER) that an operating system would use for each kind of paging.
MODES: dict[str, tuple[int, int, int]] = {
    "none": (CR0_PE, 0, 0),
    "32-bit": (CR0_PG | CR0_WP | CR0_PE, CR4_PSE | CR4_PGE, 0),
    "pae": (CR0_PG | CR0_WP | CR0_PE, CR4_PAE | CR4_PGE, EFER_NXE),
    "4-level": (CR0_PG | CR0_WP | CR0_PE, CR4_PAE | CR4_PGE, EFER_LME | EFER_LMA | EFER_NXE),
    "5-level": (
        CR0_PG | CR0_WP | CR0_PE,
        CR4_PAE | CR4_PGE | CR4_LA57,
        EFER_LME | EFER_LMA | EFER_NXE,
    ),
}

#: MAXPHYADDR when nothing is said: what servers have, and below 52, so that an entry of all ones
#: (what is read where there is no memory) has reserved bits set and maps nothing.
DEFAULT_MAXPHYADDR = 46


class HasNative(Protocol):
    """`polyvisor.Memory`, a memory image, ...: what has guest memory inside."""

    @property
    def native(self) -> _native.GuestMemory: ...


class Ept(msgspec.Struct, frozen=True):
    """A second dimension as Intel's processors have it: extended page tables (SDM 3C, 29.3)."""

    #: The EPTP field: address of the root table, memory type, walk length - 1, A/D enable.
    eptp: int
    #: What the processor supports (IA32_VMX_EPT_VPID_CAP).
    execute_only: bool = True
    five_levels: bool = True
    pages_2mb: bool = True
    pages_1gb: bool = True
    access_dirty: bool = True
    #: The VM-execution control: bit 10 of entries is the right to execute at user-mode addresses.
    mode_based_execute: bool = False
    #: Of the processor itself; None: as the guest's.
    maxphyaddr: int | None = None

    def native(self, maxphyaddr: int) -> _native.EptState:
        """Checked; raises `ConfigError` ("eptp") for one that VM entry would refuse."""
        return _native.EptState(
            _register("eptp", self.eptp),
            execute_only=self.execute_only,
            mode_based_execute=self.mode_based_execute,
            five_levels=self.five_levels,
            pages_2mb=self.pages_2mb,
            pages_1gb=self.pages_1gb,
            access_dirty=self.access_dirty,
            physical_mask=_physical_mask(self.maxphyaddr or maxphyaddr),
        )


class Npt(msgspec.Struct, frozen=True):
    """A second dimension as AMD's processors have it: nested page tables (APM 2, 15.25)."""

    #: nCR3: address of the root table.
    ncr3: int
    #: The format of the nested tables is that of the host's own paging.
    paging: Paging = "4-level"
    #: EFER.NXE of the host.
    nxe: bool = True
    pages_1gb: bool = True
    #: Of the processor itself; None: as the guest's.
    maxphyaddr: int | None = None

    def native(self, maxphyaddr: int) -> _native.NptState:
        """Checked; raises `ConfigError`."""
        if self.paging == "none":
            raise ConfigError(
                "nested paging needs paging in the host: npt.paging is '32-bit', 'pae', "
                "'4-level' or '5-level'",
                field="paging",
            )
        cr0, cr4, efer = _mode(self.paging)
        limit = self.maxphyaddr or maxphyaddr
        return _native.NptState(
            _table_address("ncr3", self.ncr3, limit),
            cr0=cr0,
            cr4=cr4,
            efer=efer if self.nxe else efer & ~EFER_NXE,
            pages_1gb=self.pages_1gb,
            physical_mask=_physical_mask(limit),
        )


class AddressSpace(_native.AddressSpace, VirtualMemory):
    """One address space: page tables in a memory, and the registers that say how to read them.

    `memory` is a `Machine.memory`, a memory image or a `_native.GuestMemory`. The registers are
    those of a CPU: `cr0`, `cr3`, `cr4`, `efer`, `pkru`, `pkrs` (IA32_PKRS); or `paging` names the
    kind of paging and stands for CR0, CR4 and EFER as an operating system would set them. PAE
    paging translates with four PDPTE registers, `pdpte`; without them they are read once from
    where CR3 points, as loading CR3 does. With `ept` or `npt`, all of the guest's addresses are
    translated a second time, and `memory` is the host's.

    Raises `ConfigError` (its `field` names the argument) for values that no processor takes.

    `translate(gva)` gives the address in `memory` of the byte at `gva`, whatever the rights, or
    None when there is none. Tables outside of the memory read as all ones; nothing that tables
    hold is an error.
    """

    def __init__(
        self,
        memory: HasNative | _native.GuestMemory,
        *,
        cr3: int = 0,
        paging: Paging | None = None,
        cr0: int | None = None,
        cr4: int | None = None,
        efer: int | None = None,
        pkru: int = 0,
        pkrs: int = 0,
        maxphyaddr: int = DEFAULT_MAXPHYADDR,
        pages_1gb: bool = True,
        pse36: bool = True,
        pdpte: Sequence[int] | None = None,
        ept: Ept | None = None,
        npt: Npt | None = None,
    ) -> None:
        mask = _physical_mask(maxphyaddr)
        defaults = _mode(paging or "4-level")
        cr0 = defaults[0] if cr0 is None else _register("cr0", cr0)
        cr4 = defaults[1] if cr4 is None else _register("cr4", cr4)
        efer = defaults[2] if efer is None else _register("efer", efer)
        if cr0 & CR0_PG and efer & EFER_LME:
            efer |= EFER_LMA  # as the processor does
        _check_modes(cr0, cr4, efer)
        if ept is not None and npt is not None:
            raise ConfigError(
                "an address space has one second dimension: give ept or npt, not both", field="npt"
            )
        second = ept or npt
        super().__init__(
            memory if isinstance(memory, _native.GuestMemory) else memory.native,
            cr0=cr0,
            cr3=_table_address("cr3", cr3, maxphyaddr),
            cr4=cr4,
            efer=efer,
            pkru=_register("pkru", pkru, 32),
            pkrs=_register("pkrs", pkrs, 32),
            physical_mask=mask,
            pages_1gb=pages_1gb,
            pse36=pse36,
            pdpte=_pdptes(pdpte),
            second=None if second is None else second.native(maxphyaddr),
        )
        if paging is not None and self.mode != paging:
            raise ConfigError(
                f"CR0 {cr0:#x}, CR4 {cr4:#x} and EFER {efer:#x} make {self.mode} paging, not "
                f"{paging}; leave out one or the other",
                field="paging",
            )
        self._cr0, self._cr3, self._cr4, self._efer = cr0, cr3, cr4, efer
        self._second = second
        self._others = {
            "pkru": pkru,
            "pkrs": pkrs,
            "maxphyaddr": maxphyaddr,
            "pages_1gb": pages_1gb,
            "pse36": pse36,
        }

    def registers(self) -> dict[str, Any]:
        """All but CR3 and what follows from it, as arguments for another `AddressSpace`."""
        return {"cr0": self._cr0, "cr4": self._cr4, "efer": self._efer, **self._others}

    @property
    def cr3(self) -> int:
        """As it was given."""
        return self._cr3

    @property
    def second(self) -> Ept | Npt | None:
        """The second dimension, if there is one."""
        return self._second

    def walk(
        self,
        gva: int,
        access: Access = "read",
        *,
        user: bool = False,
        implicit: bool = False,
        ac: bool = False,
        set_bits: bool = False,
        probe: bool = False,
    ) -> Walk:
        """Translates `gva` for one access, and tells each entry on the way.

        The access is made at CPL 3 (`user`), or at a lower CPL; `implicit` is one by the processor
        itself, to a descriptor table or TSS, which is a supervisor's at any CPL. `ac` is EFLAGS.AC,
        which lets a supervisor through SMAP. With `set_bits` the accessed and dirty bits are set in
        memory, as the processor does; otherwise nothing changes. With `probe` no rights are asked
        for: only what is not mapped is a fault. Raises `ConfigError` for an impossible argument.
        """
        if access not in ("read", "write", "execute"):
            raise ConfigError(
                f"an access is 'read', 'write' or 'execute', not {access!r}", field="access"
            )
        if set_bits and probe:
            raise ConfigError(
                "a probing walk changes nothing: give set_bits or probe", field="probe"
            )
        report = self.report(
            _register("gva", gva),
            write=access == "write",
            fetch=access == "execute",
            user=user and not implicit,
            implicit=implicit,
            ac=ac,
            set_bits=set_bits,
            probe=probe,
        )
        levels = tuple(self._levels(report.steps, gva))
        who = "implicit supervisor" if implicit else "user" if user else "supervisor"
        asked = _Asked(access, user and not implicit, implicit, ac)
        mapped = report.mapped
        return Walk(
            gva=gva,
            access="any access" if probe else f"{access}, {who}",
            mode=self.mode,
            physical=report.physical if mapped else None,
            gpa=report.gpa if mapped else None,
            page_size=1 << report.shift if mapped else 0,
            user=mapped and report.user,
            writable=mapped and report.writable,
            executable=mapped and report.executable,
            is_global=mapped and report.is_global,
            accessed=mapped and report.accessed,
            dirty=mapped and report.dirty,
            memory_type=report.memory_type if mapped else 0,
            key=report.key if mapped else 0,
            levels=levels,
            fault=self._fault(report, levels, asked) if report.fault else None,
        )

    def __repr__(self) -> str:
        second = f", {self._second}" if self._second else ""
        return f"<AddressSpace: {self.mode} paging, cr3={self._cr3:#x}{second}>"

    # The entries of a report, named and decoded.

    def _levels(self, steps: Iterable[tuple[int, int, int, bool]], gva: int) -> list[Level]:
        memory = self.guest_memory
        regions = [(r.start, r.start + r.size) for r in memory.regions]
        levels = []
        for address, entry, shift, second in steps:
            register = address == (1 << 64) - 1
            size = 4 if shift == 22 or (shift == 12 and self._is_32bit(second)) else 8
            flags, leaf = self._decode(entry, shift, second)
            # The guest's own tables lie behind the second dimension: what was translated is there.
            outside = not register and (second or self._second is None)
            in_memory = not outside or any(lo <= address < hi for lo, hi in regions)
            name = {48: "PML5E", 39: "PML4E", 30: "PDPTE", 12: "PTE"}.get(shift, "PDE")
            if second:
                name = ("EPT " if isinstance(self._second, Ept) else "NPT ") + name
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
            return isinstance(self._second, Npt) and self._second.paging == "32-bit"
        return self.mode == "32-bit"

    def _decode(self, entry: int, shift: int, second: bool) -> tuple[tuple[str, ...], bool]:
        if second and isinstance(self._second, Ept):
            return _decode_ept(entry, shift, self._second)
        if not entry & 1:
            return (), False
        mode = self._second.paging if second and isinstance(self._second, Npt) else self.mode
        if mode == "pae" and shift == 30:  # a PDPTE of PAE has no rights
            return ("P", *decode(entry, {8: "PWT", 16: "PCD"})), False
        large = bool(entry & 0x80) and shift != 12
        if mode == "32-bit" and not second and not self._cr4 & CR4_PSE:
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

    # Why an access was refused.

    def _fault(self, report: _native.WalkReport, levels: tuple[Level, ...], asked: _Asked) -> Fault:
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
        self, error: int, levels: list[Level], asked: _Asked
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
            if self._efer & EFER_NXE and (level := first("XD", False)):
                return level, f"{level} forbids execution"
            return leaf, f"{leaf} is a user page, which SMEP forbids the supervisor to execute"
        if not asked.user and not first("U", True) and self._cr4 & CR4_SMAP:
            if asked.implicit or not asked.ac:
                return leaf, f"{leaf} is a user page, which SMAP forbids the supervisor to access"
        if asked.access == "write" and (level := first("W", True)):
            if asked.user or self._cr0 & CR0_WP:
                return level, f"{level} is read-only"
        if error & 32:
            key = leaf.entry >> 59 & 15
            register = "PKRS" if first("U", True) else "PKRU"
            return leaf, f"{leaf} has protection key {key}, to which {register} forbids this access"
        return leaf, f"{leaf} forbids the access"


class _Asked(msgspec.Struct, frozen=True):
    access: Access
    user: bool
    implicit: bool
    ac: bool


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


# Arguments.


def _register(field: str, value: int, bits: int = 64) -> int:
    value = as_int(value)
    if not 0 <= value < 1 << bits:
        what = "guest-virtual address" if field == "gva" else f"value of {field}"
        raise ConfigError(f"{value:#x} is no {what}: those have {bits} bits", field=field)
    return value


def _physical_mask(maxphyaddr: int) -> int:
    if not 32 <= maxphyaddr <= 52:
        raise ConfigError(
            f"MAXPHYADDR is {maxphyaddr}, but processors have 32 to 52 physical address bits",
            field="maxphyaddr",
        )
    return (1 << maxphyaddr) - 1


def _table_address(field: str, value: int, maxphyaddr: int) -> int:
    value = _register(field, value)
    if value >> maxphyaddr:
        raise ConfigError(
            f"{field} {value:#x} is beyond MAXPHYADDR: the processor has {maxphyaddr} physical "
            f"address bits; check {field}, or give its maxphyaddr",
            field=field,
        )
    return value


def _mode(paging: str) -> tuple[int, int, int]:
    if paging not in MODES:
        names = ", ".join(map(repr, MODES))
        raise ConfigError(f"there is no {paging!r} paging; it is one of {names}", field="paging")
    return MODES[paging]


def _check_modes(cr0: int, cr4: int, efer: int) -> None:
    if not cr0 & CR0_PG:
        return
    if not cr0 & CR0_PE:
        raise ConfigError(
            f"CR0 {cr0:#x} has paging (PG) without protected mode (PE), which no processor takes",
            field="cr0",
        )
    if efer & EFER_LMA and not cr4 & CR4_PAE:
        raise ConfigError(
            f"CR4 {cr4:#x} lacks PAE, which long mode (EFER {efer:#x}) needs", field="cr4"
        )


def _pdptes(values: Sequence[int] | None) -> list[int] | None:
    if values is None:
        return None
    if len(values) != 4:
        raise ConfigError(f"PAE paging has four PDPTE registers, not {len(values)}", field="pdpte")
    return [_register("pdpte", value) for value in values]


__all__ = ["Access", "AddressSpace", "Ept", "Fault", "Level", "Npt", "Paging", "Walk"]
