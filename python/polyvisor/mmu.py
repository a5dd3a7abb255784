"""Page tables, looked at from outside: how an address of a guest is translated, and why not.

    space = AddressSpace(memory, cr3=0x1000, paging="4-level")
    space.translate(0xffffffff81000000)            # where the byte is in memory, or None
    print(space.walk(0xffffffff81000000, "write"))  # every entry on the way, and a fault if any

`docs/mmu.md` tells more. The rules are those of the processors' manuals: SDM 3A chapter 4 (paging),
3C 29.3 (EPT), APM volume 2, chapters 5 and 15.25 (nested paging).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from polyvisor import _native
from polyvisor.cpu import CR0_PG, EFER_LMA, EFER_LME
from polyvisor.errors import ConfigError
from polyvisor.mmu_decode import Asked, Decoder
from polyvisor.mmu_registers import (
    DEFAULT_MAXPHYADDR,
    MODES,
    Access,
    Ept,
    Npt,
    Paging,
    check_modes,
    control_registers,
    pdpte_registers,
    physical_mask,
    register,
    table_address,
)
from polyvisor.mmu_walk import Fault, Level, Walk
from polyvisor.virtual import VirtualMemory


class HasNative(Protocol):
    """`polyvisor.Memory`, a memory image, ...: what has guest memory inside."""

    @property
    def native(self) -> _native.GuestMemory: ...


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
    hold is an error. `access_many(gvas, write=..., fetch=..., user=..., set_bits=...)` is the same
    of a list of addresses, for an access that needs rights: None where it is refused.
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
        mask = physical_mask(maxphyaddr)
        defaults = control_registers(paging or "4-level")
        cr0 = defaults[0] if cr0 is None else register("cr0", cr0)
        cr4 = defaults[1] if cr4 is None else register("cr4", cr4)
        efer = defaults[2] if efer is None else register("efer", efer)
        if cr0 & CR0_PG and efer & EFER_LME:
            efer |= EFER_LMA  # as the processor does
        check_modes(cr0, cr4, efer)
        if ept is not None and npt is not None:
            raise ConfigError(
                "an address space has one second dimension: give ept or npt, not both", field="npt"
            )
        second = ept or npt
        super().__init__(
            memory if isinstance(memory, _native.GuestMemory) else memory.native,
            cr0=cr0,
            cr3=table_address("cr3", cr3, maxphyaddr),
            cr4=cr4,
            efer=efer,
            pkru=register("pkru", pkru, 32),
            pkrs=register("pkrs", pkrs, 32),
            physical_mask=mask,
            pages_1gb=pages_1gb,
            pse36=pse36,
            pdpte=pdpte_registers(pdpte),
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
            register("gva", gva),
            write=access == "write",
            fetch=access == "execute",
            user=user and not implicit,
            implicit=implicit,
            ac=ac,
            set_bits=set_bits,
            probe=probe,
        )
        regions = tuple((r.start, r.start + r.size) for r in self.guest_memory.regions)
        decoder = Decoder(self.mode, self._cr0, self._cr4, self._efer, self._second, regions)
        levels = tuple(decoder.levels(report.steps, gva))
        who = "implicit supervisor" if implicit else "user" if user else "supervisor"
        asked = Asked(access, user and not implicit, implicit, ac)
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
            fault=decoder.fault(report, levels, asked) if report.fault else None,
        )

    def __repr__(self) -> str:
        second = f", {self._second}" if self._second else ""
        return f"<AddressSpace: {self.mode} paging, cr3={self._cr3:#x}{second}>"


__all__ = [
    "DEFAULT_MAXPHYADDR",
    "MODES",
    "Access",
    "AddressSpace",
    "Ept",
    "Fault",
    "Level",
    "Npt",
    "Paging",
    "Walk",
]
