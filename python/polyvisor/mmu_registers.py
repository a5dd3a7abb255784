"""What paging depends on: control registers, the second dimension, and which of their values no
processor takes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_int
from typing import Literal

import msgspec

from polyvisor import _native
from polyvisor.cpu import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME
from polyvisor.errors import ConfigError

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
            register("eptp", self.eptp),
            execute_only=self.execute_only,
            mode_based_execute=self.mode_based_execute,
            five_levels=self.five_levels,
            pages_2mb=self.pages_2mb,
            pages_1gb=self.pages_1gb,
            access_dirty=self.access_dirty,
            physical_mask=physical_mask(self.maxphyaddr or maxphyaddr),
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
        cr0, cr4, efer = control_registers(self.paging)
        limit = self.maxphyaddr or maxphyaddr
        return _native.NptState(
            table_address("ncr3", self.ncr3, limit),
            cr0=cr0,
            cr4=cr4,
            efer=efer if self.nxe else efer & ~EFER_NXE,
            pages_1gb=self.pages_1gb,
            physical_mask=physical_mask(limit),
        )


def register(field: str, value: int, bits: int = 64) -> int:
    value = as_int(value)
    if not 0 <= value < 1 << bits:
        what = "guest-virtual address" if field == "gva" else f"value of {field}"
        raise ConfigError(f"{value:#x} is no {what}: those have {bits} bits", field=field)
    return value


def physical_mask(maxphyaddr: int) -> int:
    if not 32 <= maxphyaddr <= 52:
        raise ConfigError(
            f"MAXPHYADDR is {maxphyaddr}, but processors have 32 to 52 physical address bits",
            field="maxphyaddr",
        )
    return (1 << maxphyaddr) - 1


def table_address(field: str, value: int, maxphyaddr: int) -> int:
    value = register(field, value)
    if value >> maxphyaddr:
        raise ConfigError(
            f"{field} {value:#x} is beyond MAXPHYADDR: the processor has {maxphyaddr} physical "
            f"address bits; check {field}, or give its maxphyaddr",
            field=field,
        )
    return value


def control_registers(paging: str) -> tuple[int, int, int]:
    if paging not in MODES:
        names = ", ".join(map(repr, MODES))
        raise ConfigError(f"there is no {paging!r} paging; it is one of {names}", field="paging")
    return MODES[paging]


def check_modes(cr0: int, cr4: int, efer: int) -> None:
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


def pdpte_registers(values: Sequence[int] | None) -> list[int] | None:
    if values is None:
        return None
    if len(values) != 4:
        raise ConfigError(f"PAE paging has four PDPTE registers, not {len(values)}", field="pdpte")
    return [register("pdpte", value) for value in values]
