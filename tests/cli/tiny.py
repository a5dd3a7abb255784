"""Kernels of a few instructions, so that the command line can be tested without booting Linux."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "boot"))
from kernels import bzimage

SERIAL, DEBUG_EXIT, PM1_CONTROL, RESET = 0x3F8, 0xF4, 0x604, 0xCF9
FOREVER = b"\xeb\xfe"  # jmp $
SLEEP = b"\xfa\xf4" + FOREVER  # cli; hlt
TRIPLE_FAULT = b"\x0f\x0b"  # ud2, and there is no IDT


def out8(port: int, value: int) -> bytes:
    """mov edx, port; mov al, value; out dx, al."""
    return b"\xba" + struct.pack("<I", port) + b"\xb0" + bytes([value]) + b"\xee"


def out16(port: int, value: int) -> bytes:
    """mov edx, port; mov eax, value; out dx, ax."""
    return b"\xba" + struct.pack("<I", port) + b"\xb8" + struct.pack("<I", value) + b"\x66\xef"


def say(text: bytes) -> bytes:
    """Writes to the first serial port."""
    return b"".join(out8(SERIAL, byte) for byte in text)


def say_forever(byte: bytes) -> bytes:
    """Writes one byte again and again, as fast as the port takes it."""
    wait = b"\xba" + struct.pack("<I", SERIAL + 5) + b"\xec\xa8\x20\x74\xfb"  # until THRE
    code = wait + out8(SERIAL, byte[0])
    return code + b"\xeb" + struct.pack("<b", -len(code) - 2)


#: mov edx, LSR; again: in al, dx; test al, 1; jz again; mov edx, RBR; in al, dx; out dx, al; loop
ECHO = (
    b"\xba" + struct.pack("<I", SERIAL + 5) + b"\xec\xa8\x01\x74\xfb"
    b"\xba" + struct.pack("<I", SERIAL) + b"\xec\xee\xeb\xed"
)
POWER_OFF = out16(PM1_CONTROL, 5 << 10 | 1 << 13) + FOREVER
RESTART = out8(RESET, 2) + out8(RESET, 6) + FOREVER


def debug_exit(value: int) -> bytes:
    """Ends the machine with status value * 2 + 1."""
    return out8(DEBUG_EXIT, value) + FOREVER


def kernel(code: bytes, directory: Path) -> Path:
    """A bzImage whose 64-bit entry is `code`."""
    image = bzimage()
    entry = (image[0x1F1] + 1) * 512 + 0x200
    image[entry : entry + len(code)] = code
    path = directory / "kernel"
    path.write_bytes(image)
    return path
