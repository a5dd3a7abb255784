"""Where things are in the PC: what the loaders and the firmware tables have to agree on with it."""

from __future__ import annotations

import itertools

from polyvisor.errors import ConfigError
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Literal

    Mode = Literal["long", "protected"]
    Protocol = Literal["linux64", "linux32", "pvh", "elf64", "elf32"]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# Below 640 KiB, as guest-physical addresses; Linux reads these before it hands the memory out.
PAGE_TABLES = 0x1000  # 7 pages: page tables and GDT for the 64-bit entry
ZERO_PAGE = 0x8000  # boot_params of Linux's boot protocol
START_INFO = 0x9000  # hvm_start_info of PVH, with its module list and memory map behind it
PROTECTED_GDT = 0xB000
COMMAND_LINE = 0x20000
LOW_END = 0xA0000

#: Firmware tables; the RSDP is looked for from 0xE0000 on, every 16 bytes (ACPI 6.5, 5.2.5.1).
TABLES = 0xE0000
TABLES_END = 0x100000
#: Kernels are loaded here or above.
HIGH_START = 0x100000

E820_RAM = 1
E820_RESERVED = 2
E820_ACPI = 3


class Range(Record):
    """A piece of the guest-physical address space, as firmware reports it (ACPI 6.5, 15)."""

    start: int
    size: int
    kind: int = E820_RAM

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.size


class Isa(Record):
    """A device at fixed ports, for the DSDT."""

    name: str
    hid: str
    ports: tuple[tuple[int, int], ...]
    irq: int | None = None
    uid: int | None = None


class VirtioMmio(Record):
    """The registers and the interrupt of a virtio-mmio device, for the DSDT."""

    gpa: int
    size: int
    gsi: int

    @property
    def parameter(self) -> str:
        """The same for the command line of a kernel that does not ask ACPI."""
        return f"virtio_mmio.device={self.size:#x}@{self.gpa:#x}:{self.gsi}"


class Hardware(Record):
    """Addresses of the chips that ACPI tells the guest of. The defaults are polyvisor's PC."""

    lapic: int = 0xFEE00000
    ioapic: int = 0xFEC00000
    sci_irq: int = 9
    pm1_event: int = 0x600
    pm1_control: int = 0x604
    pm_timer: int = 0x608
    gpe0: int = 0x60C
    gpe0_size: int = 4
    reset_port: int = 0xCF9
    reset_value: int = 0x06
    #: What SLP_TYP is for S5, soft off.
    sleep_s5: int = 5
    #: Where PCI BARs may be placed, below 4 GiB.
    pci_window: tuple[int, int] = (0xC0000000, 0xDFFFFFFF)
    #: The memory-mapped configuration space (None: there is none), 1 MiB for each bus.
    ecam: int | None = 0xE0000000
    pci_buses: int = 1
    rtc: bool = True
    i8042: bool = False
    isa: tuple[Isa, ...] = (
        Isa("COM1", "PNP0501", ((0x3F8, 8),), 4, 1),
        Isa("COM2", "PNP0501", ((0x2F8, 8),), 3, 2),
    )
    virtio: tuple[VirtioMmio, ...] = ()

    @classmethod
    def from_board(
        cls,
        board: Mapping[str, int],
        *,
        rtc: bool,
        i8042: bool,
        virtio: tuple[VirtioMmio, ...] = (),
    ) -> Hardware:
        """The hardware of a machine, by the names of `_native.pc_layout()`."""
        return cls(
            lapic=board["lapic"],
            ioapic=board["ioapic"],
            sci_irq=board["sci_gsi"],
            pm1_event=board["acpi_pm_event"],
            pm1_control=board["acpi_pm_control"],
            pm_timer=board["acpi_pm_timer"],
            gpe0=board["acpi_gpe0"],
            reset_port=board["reset_port"],
            reset_value=board["reset_value"],
            sleep_s5=board["acpi_sleep_type_s5"],
            pci_window=(board["pci_mmio"], board["pci_mmio_end"] - 1),
            ecam=board["ecam"],
            pci_buses=board["ecam_size"] >> 20,
            rtc=rtc,
            i8042=i8042,
            virtio=virtio,
        )


def memory_map(memory: int, *, hole_start: int = 3 * GIB, hole_end: int = 4 * GIB) -> list[Range]:
    """The map of a PC with `memory` bytes: RAM up to `hole_start` and from `hole_end` on."""
    if memory < MIB:
        raise ConfigError(f"a PC needs more than {memory} bytes of memory", field="memory")
    low = min(memory, hole_start)
    ranges = [Range(0, LOW_END), Range(LOW_END, HIGH_START - LOW_END, E820_RESERVED)]
    if low > HIGH_START:
        ranges.append(Range(HIGH_START, low - HIGH_START))
    if memory > low:
        ranges.append(Range(hole_end, memory - low))
    return ranges


def ram(ranges: Iterable[Range], *, below: int = 4 * GIB) -> list[Range]:
    """The RAM from 1 MiB up to `below`, where loaders may put things."""
    found = []
    for piece in ranges:
        start, end = max(piece.start, HIGH_START), min(piece.end, below)
        if piece.kind == E820_RAM and start < end:
            found.append(Range(start, end - start))
    return found


def installed(ranges: Iterable[Range]) -> int:
    """How much memory that is to a person: all RAM, with what tables and ROMs cover of it."""
    total = sum(piece.size for piece in ranges if piece.kind == E820_RAM)
    return -(-total // MIB) * MIB


class Chunk(Record):
    """Bytes to be stored at a guest-physical address; `what` is for people."""

    gpa: int
    data: bytes | memoryview
    what: str

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.gpa + len(self.data)


class Plan(Record):
    """All that starting a kernel takes: what to store where, and the boot CPU's state.

    `mode` "long" is 64-bit mode with the first 4 GiB mapped one to one, "protected" is 32-bit
    without paging; both with flat segments (CS 0x10, data 0x18) and interrupts off. `registers` are
    those that the protocol asks for; the others are zero.
    """

    protocol: Protocol
    mode: Mode
    entry: int
    registers: dict[str, int]
    chunks: tuple[Chunk, ...]
    memory_map: tuple[Range, ...]


def check_apart(chunks: Sequence[Chunk]) -> None:
    """Nothing may lie over something else: a mistake of ours, not of a user."""
    ordered = sorted((chunk for chunk in chunks if len(chunk.data)), key=lambda chunk: chunk.gpa)
    for before, after in itertools.pairwise(ordered):
        assert before.end <= after.gpa, f"{before.what} runs into {after.what}"
