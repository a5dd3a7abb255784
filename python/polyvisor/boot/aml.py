"""As much of ACPI's machine language as the DSDT of a PC takes (ACPI 6.5, 20.2 and 6.4).

Each function returns the encoded bytes of one construct, so that a table reads like ASL::

    device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", resources(io(0x3F8, 8), irq(4))))
"""

from __future__ import annotations

import struct

_ZERO, _ONE, _NAME, _BYTE, _WORD, _DWORD, _STRING, _QWORD = 0, 1, 8, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E
_SCOPE, _BUFFER, _PACKAGE, _EXTENDED, _DEVICE = 0x10, 0x11, 0x12, 0x5B, 0x82


def integer(value: int) -> bytes:
    """An integer constant in its shortest form."""
    if value in (0, 1):
        return bytes([_ZERO if value == 0 else _ONE])
    for prefix, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} is no 64-bit number")


def string(text: str) -> bytes:
    """A string constant."""
    return bytes([_STRING]) + text.encode("ascii") + b"\0"


def path(text: str) -> bytes:
    r"""A name: "_CRS", or "\_SB" from the root."""
    root = text.startswith("\\")
    segments = [part and part.ljust(4, "_") for part in text.lstrip("\\").split(".")]
    for part in segments:
        if len(part) != 4 or not part.isascii() or not part.replace("_", "A").isalnum():
            raise ValueError(f"{text!r} is no ACPI name")
    encoded = "".join(segments).encode()
    if len(segments) == 2:
        encoded = b"\x2e" + encoded
    elif len(segments) > 2:
        encoded = bytes([0x2F, len(segments)]) + encoded
    return (b"\\" if root else b"") + encoded


def name(identifier: str, value: bytes) -> bytes:
    """Name (identifier, value)."""
    return bytes([_NAME]) + path(identifier) + value


def package(*elements: bytes) -> bytes:
    """Package {...}."""
    return bytes([_PACKAGE]) + _sized(bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Buffer {...}."""
    return bytes([_BUFFER]) + _sized(integer(len(data)) + data)


def scope(identifier: str, *terms: bytes) -> bytes:
    """Scope (identifier) {...}."""
    return bytes([_SCOPE]) + _sized(path(identifier) + b"".join(terms))


def device(identifier: str, *terms: bytes) -> bytes:
    """Device (identifier) {...}."""
    return bytes([_EXTENDED, _DEVICE]) + _sized(path(identifier) + b"".join(terms))


def eisa_id(text: str) -> bytes:
    """EISAID ("PNP0501"), a compressed identifier (ACPI 6.5, 19.3.4)."""
    letters, number = text[:3], int(text[3:], 16)
    value = number
    for index, letter in enumerate(letters):
        value |= (ord(letter) - 0x40) << (26 - 5 * index)
    return integer(int.from_bytes(value.to_bytes(4, "big"), "little"))


# --- resources -----------------------------------------------------------------------------------


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {...}: the descriptors and an end tag without a checksum."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(port: int, size: int) -> bytes:
    """IO (Decode16, port, port, 1, size)."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, size)


def irq(*numbers: int) -> bytes:
    """IRQNoFlags () {...}: edge-triggered, active high, not shared."""
    return struct.pack("<BH", 0x22, sum(1 << number for number in numbers))


def interrupt(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Level, ActiveHigh, Shared) {gsi}."""
    return struct.pack("<BHBBI", 0x89, 6, 0x09, 1, gsi)


def memory32_fixed(start: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, start, size)."""
    return struct.pack("<BHBII", 0x86, 9, 1, start, size)


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, ...)."""
    return _word_space(2, 0, first, last)


def io_window(first: int, last: int) -> bytes:
    """WordIO (ResourceProducer, ..., EntireRange, ...)."""
    return _word_space(1, 3, first, last)


def memory_window(first: int, last: int) -> bytes:
    """DWordMemory (ResourceProducer, ..., NonCacheable, ReadWrite, ...)."""
    fields = (0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB5I", 0x87, 23, 0, 0x0C, 1, *fields)


def _word_space(kind: int, specific: int, first: int, last: int) -> bytes:
    fields = (0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB5H", 0x88, 13, kind, 0x0C, specific, *fields)


def _sized(content: bytes) -> bytes:
    """PkgLength, which counts itself, and what it is the length of (ACPI 6.5, 20.2.4)."""
    for extra in range(4):
        total = len(content) + 1 + extra
        if extra == 0:
            if total < 1 << 6:
                return bytes([total]) + content
        elif total < 1 << 4 + 8 * extra:
            high = (total >> 4).to_bytes(extra, "little")
            return bytes([extra << 6 | total & 15]) + high + content
    raise ValueError("an ACPI package of more than 256 MiB")
