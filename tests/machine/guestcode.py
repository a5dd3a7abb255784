"""Machine code for guests of a few instructions, and the machine they run in."""

from __future__ import annotations

import polyvisor

ORIGIN = 0x7C00
DEBUG_EXIT = 0xF4
SERIAL = 0x3F8

HLT = b"\xf4"
CLI = b"\xfa"
STI = b"\xfb"
LOOP_FOREVER = b"\xeb\xfe"  # jmp $


def out8(port: int, value: int) -> bytes:
    """mov al, value; mov dx, port; out dx, al."""
    return bytes([0xB0, value & 0xFF, 0xBA]) + port.to_bytes(2, "little") + b"\xee"


def out32(port: int, value: int) -> bytes:
    """mov eax, value; mov dx, port; out dx, eax (from 16-bit code)."""
    eax = b"\x66\xb8" + value.to_bytes(4, "little")
    return eax + b"\xba" + port.to_bytes(2, "little") + b"\x66\xef"


def in8(port: int) -> bytes:
    """mov dx, port; in al, dx."""
    return b"\xba" + port.to_bytes(2, "little") + b"\xec"


def in32(port: int) -> bytes:
    """mov dx, port; in eax, dx (from 16-bit code)."""
    return b"\xba" + port.to_bytes(2, "little") + b"\x66\xed"


def store_al(address: int) -> bytes:
    """mov [address], al, 16-bit addressing."""
    return b"\xa2" + address.to_bytes(2, "little")


def store_eax(address: int) -> bytes:
    """mov [address], eax from 16-bit code."""
    return b"\x66\xa3" + address.to_bytes(2, "little")


def say(text: bytes) -> bytes:
    """Writes text to the first serial port, which is always ready."""
    return b"".join(out8(SERIAL, byte) for byte in text)


def end(value: int = 0) -> bytes:
    """Ends the machine through the debug-exit port, with status value * 2 + 1."""
    return out8(DEBUG_EXIT, value) + HLT + LOOP_FOREVER


def real_mode(code: bytes, **options: object) -> polyvisor.Machine:
    """A small machine about to run `code` in real mode at 0:7c00."""
    options.setdefault("memory", "2M")
    machine = polyvisor.Machine(**options)  # type: ignore[arg-type]
    machine.load_raw(ORIGIN, code)
    machine.cpu(0).enter_real_mode(ip=ORIGIN, sp=0x7000)
    return machine
