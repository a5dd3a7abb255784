"""Kernels that do nothing, made to measure: what a loader reads of one is all there."""

from __future__ import annotations

import struct


def bzimage(
    *,
    size: int = 0x4000,
    version: int = 0x20F,
    loadflags: int = 1,
    xloadflags: int = 1,
    pref_address: int = 0x1000000,
    init_size: int = 0x200000,
    alignment: int = 0x200000,
    relocatable: int = 1,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFFFFFF,
    setup_sects: int = 4,
    payload: bytes = b"",
) -> bytearray:
    """A bzImage whose code is NOPs, with `payload` behind its first KiB."""
    setup = (setup_sects + 1) * 512
    image = bytearray(setup) + bytearray(b"\x90" * size)
    image[setup + 0x400 : setup + 0x400 + len(payload)] = payload
    image[0x1F1] = setup_sects
    struct.pack_into("<I", image, 0x1F4, -(-(len(image) - setup) // 16))
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x201] = 0x6A
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    image[0x211] = loadflags
    struct.pack_into("<I", image, 0x22C, initrd_addr_max)
    struct.pack_into("<I", image, 0x230, alignment)
    image[0x234] = relocatable
    image[0x235] = 21
    struct.pack_into("<H", image, 0x236, xloadflags)
    struct.pack_into("<I", image, 0x238, cmdline_size)
    struct.pack_into("<II", image, 0x248, 0x400, len(payload))
    struct.pack_into("<Q", image, 0x258, pref_address)
    struct.pack_into("<I", image, 0x260, init_size)
    return image


def elf(
    *,
    bits: int = 64,
    machine: int | None = None,
    kind: int = 2,
    entry: int = 0x1000000,
    address: int = 0x1000000,
    virtual: int = 0xFFFFFFFF81000000,
    code: bytes = b"\x90" * 0x100,
    bss: int = 0x1000,
    pvh: int | None = None,
    interpreter: bool = False,
) -> bytearray:
    """An ELF file with one segment to load, and a PVH note if asked for."""
    wide = bits == 64
    if not wide:
        virtual &= 0xFFFFFFFF
    note = b""
    if pvh is not None:
        note = struct.pack("<III4s", 4, 4, 6, b"Xen\0") + b"x\0\0\0"  # another one, first
        note += struct.pack("<III4sI", 4, 4, 18, b"Xen\0", pvh)
    at = 0x1000
    segments = [(1, at, virtual, address, len(code), len(code) + bss)]
    if note:
        segments.append((4, at + len(code), 0, 0, len(note), len(note)))
    if interpreter:
        segments.append((3, at, 0, 0, 16, 16))
    header_size, segment_size = (64, 56) if wide else (52, 32)
    header = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH",
        kind,
        machine if machine is not None else (62 if wide else 3),
        1,
        entry,
        header_size,
        0,
        0,
        header_size,
        segment_size,
        len(segments),
        0,
        0,
        0,
    )
    for type_, offset, vaddr, paddr, filesz, memsz in segments:
        if wide:
            header += struct.pack("<IIQQQQQQ", type_, 7, offset, vaddr, paddr, filesz, memsz, 4)
        else:
            header += struct.pack("<IIIIIIII", type_, offset, vaddr, paddr, filesz, memsz, 7, 4)
    return bytearray(header.ljust(at, b"\0") + code + note)
