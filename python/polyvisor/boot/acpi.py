"""The ACPI tables of polyvisor's PC: RSDP, XSDT, FADT, FACS, MADT, DSDT, MCFG (ACPI 6.5, 5.2).

They tell an operating system what it cannot find by itself: the CPUs, the IOAPIC and how ISA
interrupts reach it, the PCI root, the serial ports, and how to switch off and to reset. There is no
system management mode, so no SMI command port either: the machine is in ACPI mode from the start.
"""

from __future__ import annotations

import struct

from polyvisor.boot import aml, layout
from polyvisor.boot.layout import Chunk, Hardware, Isa, VirtioMmio

_OEM = b"PLYVSR"
_OEM_TABLE = b"POLYVISR"
_CREATOR = b"PVSR"
#: The first CPU that an xAPIC entry cannot name: 255 is the broadcast address.
_FIRST_X2APIC = 255
_SYSTEM_IO = 1
_LEVEL_HIGH = 0b1101  # MPS INTI flags: active high, level triggered (ACPI 6.5, 5.2.12.5)


def build(hardware: Hardware, cpus: int, at: int = layout.TABLES) -> Chunk:
    """All tables in one piece, for guest-physical address `at`, where the RSDP is."""
    blob = bytearray(64)  # the RSDP, filled in last

    def place(table: bytes) -> int:
        blob.extend(bytes(-len(blob) % 64))  # a FACS has to be aligned so; the others do not mind
        address = at + len(blob)
        blob.extend(table)
        return address

    dsdt_at = place(dsdt(hardware))
    facs_at = place(facs())
    tables = [fadt(hardware, dsdt_at, facs_at), madt(hardware, cpus)]
    if hardware.ecam is not None:
        tables.append(mcfg(hardware.ecam, hardware.pci_buses))
    addresses = [place(table) for table in tables]
    xsdt_at = place(table(b"XSDT", 1, b"".join(struct.pack("<Q", a) for a in addresses)))
    blob[:36] = rsdp(xsdt_at)
    if at + len(blob) > layout.TABLES_END and at < layout.TABLES_END:
        raise ValueError("the firmware tables do not fit below 1 MiB")
    return Chunk(at, bytes(blob), "ACPI tables")


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: header (ACPI 6.5, 5.2.6), body, checksum."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        36 + len(body),
        revision,
        0,
        _OEM,
        _OEM_TABLE,
        1,
        _CREATOR,
        1,
    )
    whole = bytearray(header + body)
    whole[9] = -sum(whole) & 0xFF
    return bytes(whole)


def rsdp(xsdt_at: int) -> bytes:
    """Root pointer, revision 2: an XSDT and no RSDT (ACPI 6.5, 5.2.5.3)."""
    whole = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt_at, 0))
    whole[8] = -sum(whole[:20]) & 0xFF
    whole[32] = -sum(whole) & 0xFF
    return bytes(whole)


def facs() -> bytes:
    """Firmware control structure: nothing to wake up to."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _register(port: int, size: int) -> bytes:
    """Generic address of an I/O register of `size` bytes; all zero when there is none."""
    if not size:
        return bytes(12)
    access = {1: 1, 2: 2, 4: 3}[min(size, 4)]
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * size, 0, access, port)


def fadt(hardware: Hardware, dsdt_at: int, facs_at: int) -> bytes:
    """Fixed hardware: power management ports, SCI, reset register (ACPI 6.5, 5.2.9)."""
    # ISA devices, no VGA, no PCIe ASPM; keyboard controller and clock as there are.
    boot_arch = 1 << 0 | hardware.i8042 << 1 | 1 << 2 | 1 << 4 | (not hardware.rtc) << 5
    # WBINVD works; C1 on all CPUs; no power or sleep button in the fixed registers, nor an RTC wake
    # status; 32-bit PM timer; there is a reset register.
    flags = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10
    body = struct.pack("<IIBBHIBBBB", facs_at, dsdt_at, 0, 0, hardware.sci_irq, 0, 0, 0, 0, 0)
    body += struct.pack(
        "<8I",
        hardware.pm1_event,
        0,
        hardware.pm1_control,
        0,
        0,
        hardware.pm_timer,
        hardware.gpe0,
        0,
    )
    # Lengths of those blocks; C2 and C3 latencies that say there is no such state.
    body += struct.pack("<8B", 4, 2, 0, 4, hardware.gpe0_size, 0, 0, 0)
    body += struct.pack("<HHHHBBBBB", 101, 1001, 0, 0, 0, 0, 0, 0, 0x32 if hardware.rtc else 0)
    body += struct.pack("<HBI", boot_arch, 0, flags)
    body += _register(hardware.reset_port, 1)
    body += struct.pack("<BHB", hardware.reset_value, 0, 5)
    # x_firmware_ctrl stays zero: the 32-bit field above has it (only one of them may).
    body += struct.pack("<QQ", 0, dsdt_at)
    body += _register(hardware.pm1_event, 4) + bytes(12)
    body += _register(hardware.pm1_control, 2) + bytes(12)
    body += bytes(12)
    body += _register(hardware.pm_timer, 4)
    body += _register(hardware.gpe0, hardware.gpe0_size) + bytes(12)
    body += bytes(24)  # sleep control and status: of hardware-reduced machines
    body += _OEM.ljust(8, b"\0")  # hypervisor vendor
    assert len(body) == 276 - 36
    return table(b"FACP", 6, body)


def madt(hardware: Hardware, cpus: int) -> bytes:
    """CPUs and interrupt controllers (ACPI 6.5, 5.2.12). APIC ids are the CPUs' numbers."""
    body = struct.pack("<II", hardware.lapic, 1)  # there are two 8259s as well
    for cpu in range(cpus):
        if cpu < _FIRST_X2APIC:
            body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, cpu, 1, cpu)
    body += struct.pack("<BBBBII", 1, 12, ioapic_id(cpus), 0, hardware.ioapic, 0)
    # The PIT is wired to pin 2, as pin 0 is the 8259's; the SCI is a level, ISA's are edges.
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, hardware.sci_irq, hardware.sci_irq, _LEVEL_HIGH)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # NMI is on LINT1 of all CPUs
    if cpus > _FIRST_X2APIC:
        body += struct.pack("<BBHIBBBB", 10, 12, 0, 0xFFFFFFFF, 1, 0, 0, 0)
    return table(b"APIC", 5, body)


def ioapic_id(cpus: int) -> int:
    """The IOAPIC's id: one that no CPU has, as far as eight bits go."""
    return min(cpus, 0xFE)


def mcfg(ecam: int, buses: int) -> bytes:
    """The memory-mapped configuration space, of buses from 0 on (PCI Firmware 3.3, 4.1.2)."""
    return table(b"MCFG", 1, bytes(8) + struct.pack("<QHBB4x", ecam, 0, 0, buses - 1))


def pci_gsi(device: int, pin: int) -> int:
    """The global system interrupt of pin 0 (INTA) to 3 of a PCI device: 16 to 19, spread out.

    `pci::HostBridge::gsi` says the same.
    """
    return 16 + (device + pin) % 4


def dsdt(hardware: Hardware) -> bytes:
    """The devices that cannot be enumerated, in AML."""
    s5 = aml.integer(hardware.sleep_s5)
    terms = [
        aml.name("\\_S5", aml.package(s5, s5, aml.integer(0), aml.integer(0))),
        aml.scope(
            "\\_SB",
            _pci_root(hardware),
            *(_isa_device(isa) for isa in _isa(hardware)),
            *(_virtio_device(number, place) for number, place in enumerate(hardware.virtio)),
        ),
    ]
    return table(b"DSDT", 2, b"".join(terms))


def _pci_root(hardware: Hardware) -> bytes:
    routes = [
        aml.package(
            aml.integer(device << 16 | 0xFFFF),
            aml.integer(pin),
            aml.integer(0),
            aml.integer(pci_gsi(device, pin)),
        )
        for device in range(32)
        for pin in range(4)
    ]
    express = hardware.ecam is not None
    identity = [aml.name("_HID", aml.eisa_id("PNP0A08" if express else "PNP0A03"))]
    if express:
        identity.append(aml.name("_CID", aml.eisa_id("PNP0A03")))
    windows = aml.resources(
        aml.bus_numbers(0, hardware.pci_buses - 1),
        aml.io(0xCF8, 8),
        aml.io_window(0x0000, 0x0CF7),
        aml.io_window(0x0D00, 0xFFFF),
        aml.memory_window(*hardware.pci_window),
    )
    root = aml.device(
        "PCI0",
        *identity,
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", windows),
        aml.name("_PRT", aml.package(*routes)),
    )
    if not express:
        return root
    assert hardware.ecam is not None
    reserved = aml.resources(aml.memory32_fixed(hardware.ecam, hardware.pci_buses << 20))
    return root + aml.device(
        "MCFG", aml.name("_HID", aml.eisa_id("PNP0C02")), aml.name("_CRS", reserved)
    )


def _isa(hardware: Hardware) -> list[Isa]:
    devices = list(hardware.isa)
    if hardware.rtc:
        devices.append(Isa("RTC0", "PNP0B00", ((0x70, 2),), 8))
    if hardware.i8042:
        devices.append(Isa("KBD0", "PNP0303", ((0x60, 1), (0x64, 1)), 1))
        devices.append(Isa("PS2M", "PNP0F13", (), 12))
    return devices


def _isa_device(isa: Isa) -> bytes:
    descriptors = [aml.io(port, size) for port, size in isa.ports]
    if isa.irq is not None:
        descriptors.append(aml.irq(isa.irq))
    terms = [aml.name("_HID", aml.eisa_id(isa.hid))]
    if isa.uid is not None:
        terms.append(aml.name("_UID", aml.integer(isa.uid)))
    terms.append(aml.name("_CRS", aml.resources(*descriptors)))
    return aml.device(isa.name, *terms)


def _virtio_device(number: int, place: VirtioMmio) -> bytes:
    """The identifier is the one that Linux's virtio_mmio knows."""
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.name(
            "_CRS",
            aml.resources(aml.memory32_fixed(place.gpa, place.size), aml.interrupt(place.gsi)),
        ),
    )
