"""One virtual CPU: its registers, and the modes a loader starts it in.

Everything here needs the machine not to be running: before `start()`, while paused, or after its
end.
"""

from __future__ import annotations

import struct

from polyvisor import _native
from polyvisor.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyvisor.machine_mmu import Mmu
    from polyvisor.memory import Memory
    from polyvisor.registers import Registers

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10

# Attributes of flat segments, as _native.Segment packs them: access byte, then AVL, L, D, G from
# bit 12 (SDM 3A 3.4.5).
CODE64 = 0xA09B
CODE32 = 0xC09B
DATA32 = 0xC093
CODE16 = 0x009B
DATA16 = 0x0093
TSS64 = 0x008B
UNUSABLE = 1 << 16

#: Selectors of the flat descriptors that `enter_long_mode` and `enter_protected_mode` install:
#: those that Linux's boot protocols ask for (__BOOT_CS, __BOOT_DS).
BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20

#: Bytes that `enter_long_mode` uses at `page_tables_at`: PML4, PDPT, four page directories, GDT.
LONG_MODE_TABLES = 7 * 4096


class Cpu:
    """Virtual CPU `index` of a machine."""

    def __init__(self, machine: _native.Machine, memory: Memory, index: int) -> None:
        self._machine = machine
        self._memory = memory
        self.index = index
        self._mmu: Mmu | None = None

    @property
    def registers(self) -> Registers:
        """The registers by name, as a mapping."""
        from polyvisor.registers import Registers  # not needed to run a guest

        return Registers(self)

    def set_registers(self, values: Mapping[str, int]) -> None:
        """Sets several registers by name in one step; raises `StateError`, setting none, on a bad
        one."""
        state = self.state
        for name, value in values.items():
            state[name] = value
        self.state = state

    @property
    def mmu(self) -> Mmu:
        """The address space it is in: translations, page tables, virtual memory (docs/mmu.md)."""
        if self._mmu is None:
            from polyvisor.machine_mmu import Mmu  # not needed to import polyvisor

            self._mmu = Mmu(self._machine, self.index)
        return self._mmu

    @property
    def state(self) -> _native.CpuState:
        """The whole architectural state, as a copy. Assigning one restores it."""
        return self._machine.save_cpu(self.index)

    @state.setter
    def state(self, value: _native.CpuState) -> None:
        self._machine.restore_cpu(self.index, value)

    def translate(self, gva: int) -> int | None:
        """The guest-physical address of a guest-virtual one now; None when it is not mapped."""
        return self._machine.translate(self.index, gva)

    def step(self, instructions: int = 1) -> None:
        """Executes exactly so many instructions in the calling thread, then returns.

        The machine must be created or paused. Fewer are executed only when it ends meanwhile, or
        halts with interrupts off. Breakpoints are passed. Engine soft takes interrupts as they
        come; with engine kvm they wait until the machine runs again, and an instruction that faults
        takes its handler along (docs/debugging.md).
        """
        self._machine.step(self.index, instructions)

    def nmi(self) -> None:
        """Sends a non-maskable interrupt; also while running."""
        self._machine.nmi(self.index)

    def read_virtual(self, gva: int, size: int) -> bytes:
        """Copies `size` bytes at a guest-virtual address; raises `StateError` when not mapped."""
        parts = []
        while size > 0:
            gpa = self.translate(gva)
            if gpa is None:
                raise StateError(f"guest-virtual address {gva:#x} is not mapped", field="gva")
            chunk = min(size, 4096 - (gva & 4095))
            parts.append(self._memory.read(gpa, chunk))
            gva += chunk
            size -= chunk
        return b"".join(parts)

    def enter_real_mode(self, *, cs: int = 0, ip: int = 0, ss: int = 0, sp: int = 0) -> None:
        """Real mode at cs:ip, data segments 0, interrupts off."""
        state = _native.CpuState()
        state["rip"] = ip
        state["rsp"] = sp
        for name in ("ds", "es", "fs", "gs"):
            state.set_segment(name, _native.Segment(0, 0, 0xFFFF, DATA16))
        state.set_segment("ss", _native.Segment(ss, ss << 4, 0xFFFF, DATA16))
        state.set_segment("cs", _native.Segment(cs, cs << 4, 0xFFFF, CODE16))
        self.state = state

    def enter_protected_mode(self, *, rip: int, rsp: int = 0, gdt_at: int | None = None) -> None:
        """32-bit protected mode without paging, flat segments, interrupts off.

        With `gdt_at`, a GDT with the same descriptors (BOOT_CS, BOOT_DS) is written there, so that
        the guest may load segment registers.
        """
        state = _native.CpuState()
        self._flat(state, CODE32)
        state["cr0"] = CR0_PE | CR0_ET | CR0_NE
        state["rip"] = rip
        state["rsp"] = rsp
        if gdt_at is not None:
            self._write_gdt(state, gdt_at, CODE32)
        self.state = state

    def enter_long_mode(self, *, page_tables_at: int, rip: int, rsp: int = 0) -> None:
        """64-bit mode, flat segments, the first 4 GiB mapped one to one, interrupts off.

        Writes page tables and a GDT (BOOT_CS, BOOT_DS) to the `LONG_MODE_TABLES` bytes at
        `page_tables_at` (page aligned). This is the state that Linux's 64-bit boot protocol wants.
        """
        if page_tables_at & 4095:
            raise StateError(
                f"page tables must be at a page boundary, not at {page_tables_at:#x}",
                field="page_tables_at",
            )
        pml4, pdpt = page_tables_at, page_tables_at + 0x1000
        directories = [page_tables_at + 0x2000 + 0x1000 * i for i in range(4)]
        self._memory.write(pml4, struct.pack("<Q", pdpt | 3).ljust(4096, b"\0"))
        self._memory.write(
            pdpt, b"".join(struct.pack("<Q", pd | 3) for pd in directories).ljust(4096, b"\0")
        )
        for gigabyte, directory in enumerate(directories):
            first = gigabyte << 30
            pages = (first + (i << 21) | 0x83 for i in range(512))  # present, writable, 2 MiB
            self._memory.write(directory, struct.pack("<512Q", *pages))
        state = _native.CpuState()
        self._flat(state, CODE64)
        state["cr0"] = CR0_PE | CR0_ET | CR0_NE | CR0_PG
        state["cr3"] = pml4
        state["cr4"] = CR4_PAE
        state["efer"] = EFER_LME | EFER_LMA
        state["rip"] = rip
        state["rsp"] = rsp
        self._write_gdt(state, page_tables_at + 0x6000, CODE64)
        self.state = state

    def _flat(self, state: _native.CpuState, code: int) -> None:
        for name in ("ds", "es", "fs", "gs", "ss"):
            state.set_segment(name, _native.Segment(BOOT_DS, 0, 0xFFFFFFFF, DATA32))
        state.set_segment("cs", _native.Segment(BOOT_CS, 0, 0xFFFFFFFF, code))
        state.set_segment("tr", _native.Segment(BOOT_TSS, 0, 0x67, TSS64))
        state.set_segment("ldtr", _native.Segment(0, 0, 0, UNUSABLE))
        state["idtr.base"] = 0
        state["idtr.limit"] = 0
        state["rflags"] = 2

    def _write_gdt(self, state: _native.CpuState, gpa: int, code: int) -> None:
        table = struct.pack(
            "<6Q",
            0,
            0,
            _descriptor(0xFFFFF, code),
            _descriptor(0xFFFFF, DATA32),
            _descriptor(0x67, TSS64),
            0,
        )
        self._memory.write(gpa, table)
        state["gdtr.base"] = gpa
        state["gdtr.limit"] = len(table) - 1


def _descriptor(limit: int, attributes: int) -> int:
    """A descriptor with base 0; `limit` as its 20-bit field (SDM 3A 3.4.5)."""
    return limit & 0xFFFF | (attributes & 0xF0FF) << 40 | (limit >> 16 & 15) << 48
