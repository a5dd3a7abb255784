"""The firmware tables: checksums and places by our own reading, and all of it through iasl."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.boot import acpi, aml, layout
from polyvisor.boot.layout import Hardware, Isa

WITHOUT_ECAM = Hardware(ecam=None, i8042=True)
ALL = [Hardware(), WITHOUT_ECAM, Hardware(rtc=False, pci_buses=256)]


class Tables:
    """The tables as an operating system finds them, from the RSDP on."""

    def __init__(self, blob: bytes, at: int) -> None:
        self.at = at
        self.blob = blob
        assert blob[:8] == b"RSD PTR "
        assert sum(blob[:20]) % 256 == 0
        assert sum(blob[:36]) % 256 == 0
        assert blob[15] == 2
        xsdt = self.table(struct.unpack_from("<Q", blob, 24)[0])
        entries = struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:])
        found = [self.table(entry) for entry in entries]
        self.by_name = {table[:4].decode(): table for table in found}
        fadt = self.by_name["FACP"]
        self.by_name["DSDT"] = self.table(struct.unpack_from("<Q", fadt, 140)[0])
        facs_at = struct.unpack_from("<I", fadt, 36)[0] - at
        self.facs = blob[facs_at : facs_at + 64]

    def table(self, address: int) -> bytes:
        offset = address - self.at
        size = struct.unpack_from("<I", self.blob, offset + 4)[0]
        table = self.blob[offset : offset + size]
        assert len(table) == size
        assert sum(table) % 256 == 0
        return table


@pytest.mark.parametrize("cpus", [1, 2, 64, 254])
@pytest.mark.parametrize("hardware", ALL)
def test_found_from_the_root(hardware: Hardware, cpus: int) -> None:
    chunk = acpi.build(hardware, cpus)
    assert chunk.gpa == layout.TABLES
    assert chunk.end <= layout.TABLES_END
    tables = Tables(bytes(chunk.data), chunk.gpa)
    wanted = {"FACP", "APIC", "DSDT"} | ({"MCFG"} if hardware.ecam is not None else set())
    assert set(tables.by_name) == wanted
    assert tables.facs[:4] == b"FACS"
    assert (struct.unpack_from("<I", tables.by_name["FACP"], 36)[0]) % 64 == 0


def madt_entries(table: bytes) -> list[bytes]:
    entries, at = [], 44
    while at < len(table):
        entries.append(table[at : at + table[at + 1]])
        at += table[at + 1]
    assert at == len(table)
    return entries


@given(st.integers(1, 300))
def test_madt_names_every_cpu_once(cpus: int) -> None:
    entries = madt_entries(acpi.madt(Hardware(), cpus))
    ids = [e[3] for e in entries if e[0] == 0]
    ids += [struct.unpack_from("<I", e, 4)[0] for e in entries if e[0] == 9]
    assert ids == list(range(cpus))
    assert 0xFF not in [e[3] for e in entries if e[0] == 0]
    [ioapic] = [e for e in entries if e[0] == 1]
    assert struct.unpack_from("<II", ioapic, 4) == (Hardware().ioapic, 0)


def test_isa_interrupts() -> None:
    overrides = [e for e in madt_entries(acpi.madt(Hardware(), 1)) if e[0] == 2]
    found = {e[3]: struct.unpack_from("<IH", e, 4) for e in overrides}
    assert found == {0: (2, 0), 9: (9, 0b1101)}


def test_pci_interrupts_are_within_the_ioapic() -> None:
    gsis = {acpi.pci_gsi(device, pin) for device in range(32) for pin in range(4)}
    assert gsis == {16, 17, 18, 19}
    assert [acpi.pci_gsi(1, pin) for pin in range(4)] == [17, 18, 19, 16]


# --- AML ------------------------------------------------------------------------------------------


@given(st.integers(0, (1 << 64) - 1))
def test_integers(value: int) -> None:
    encoded = aml.integer(value)
    if len(encoded) == 1:
        assert encoded[0] == value
    else:
        assert {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[encoded[0]] == len(encoded) - 1
        assert int.from_bytes(encoded[1:], "little") == value


@pytest.mark.parametrize("size", [0, 1, 61, 62, 63, 64, 4092, 4093, 4094, 4095, 4096, 1 << 20])
def test_lengths_count_themselves(size: int) -> None:
    encoded = aml.buffer(bytes(size))
    lead = encoded[1]
    count = lead >> 6
    length = lead & (0x3F if count == 0 else 0x0F)
    for index in range(count):
        length |= encoded[2 + index] << 4 + 8 * index
    assert length == len(encoded) - 1


def test_eisa_ids() -> None:
    # The example of ACPI 6.5, 19.3.4, and the one everybody knows.
    assert aml.eisa_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"


@pytest.mark.parametrize("name", ["", "TOOLONG", "A-B", "ÄÖÜ"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="no ACPI name"):
        aml.path(name)


# --- as ACPI's own compiler sees them -------------------------------------------------------------


def iasl(*arguments: str, cwd: Path) -> str:
    program = shutil.which("iasl", path="/usr/bin:/usr/sbin:/bin")
    assert program, "iasl is missing: apt-get install acpica-tools"
    done = subprocess.run(
        [program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert not re.search(r"^(Error|Warning)|\*\*\*\*|invalid|Invalid", text, re.MULTILINE), text
    return text


@pytest.mark.parametrize("hardware", ALL)
def test_iasl_takes_them(hardware: Hardware, tmp_path: Path) -> None:
    chunk = acpi.build(hardware, 3)
    tables = Tables(bytes(chunk.data), chunk.gpa).by_name
    for name, table in tables.items():
        (tmp_path / f"{name}.dat").write_bytes(table)
        iasl("-d", f"{name}.dat", cwd=tmp_path)
    text = iasl("DSDT.dsl", cwd=tmp_path)
    assert "0 Errors, 0 Warnings" in text
    source = (tmp_path / "DSDT.dsl").read_text()
    assert "_S5" in source
    assert source.count('EisaId ("PNP0501")') == 2
    assert ('EisaId ("PNP0B00")' in source) == hardware.rtc
    assert ('EisaId ("PNP0303")' in source) == hardware.i8042
    assert ("PNP0A08" in source) == (hardware.ecam is not None)
    fadt = (tmp_path / "FACP.dsl").read_text()
    assert re.search(r"Reset Register Supported \(V2\) : 1", fadt)
    assert re.search(r"SMI Command Port : 00000000", fadt)
    assert re.search(rf"8042 Present on ports 60/64 \(V2\) : {int(hardware.i8042)}", fadt)
    assert re.search(rf"CMOS RTC Not Present \(V5\) : {int(not hardware.rtc)}", fadt)


def test_the_ports_of_a_device(tmp_path: Path) -> None:
    hardware = Hardware(isa=(Isa("PRN1", "PNP0400", ((0x378, 8), (0x778, 8)), 7, 1),))
    (tmp_path / "DSDT.dat").write_bytes(acpi.dsdt(hardware))
    iasl("-d", "DSDT.dat", cwd=tmp_path)
    source = (tmp_path / "DSDT.dsl").read_text()
    assert "0x0378,             // Range Minimum" in source
    assert "0x0778,             // Range Minimum" in source
    assert re.search(r"IRQNoFlags \(\)\s*\{7\}", source)
