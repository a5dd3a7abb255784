"""ELF kernels: by PVH (Xen's public/arch-x86/hvm/start_info.h), or by the entry of the file itself,
which for Linux is its 64-bit (i386: 32-bit) entry with a zero page."""

from __future__ import annotations

import struct

from polyvisor.boot import layout, linux
from polyvisor.boot.layout import Chunk, Plan, Range
from polyvisor.config import show_size
from polyvisor.errors import ImageError
from polyvisor.records import Record

_CLASS_64, _LITTLE_ENDIAN = 2, 1
_EXEC, _DYN = 2, 3
_386, _X86_64 = 3, 62
LOAD, _INTERP, _NOTE = 1, 3, 4
_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_START_MAGIC = 0x336EC578
#: What Linux on x86 takes (COMMAND_LINE_SIZE, with its NUL).
_CMDLINE_SIZE = 2047
_MODULES = layout.START_INFO + 0x100
_MEMORY_MAP = layout.START_INFO + 0x200


class Kernel(Record):
    """What an ELF file says of where it wants to be and to start."""

    bits: int
    entry: int
    pvh_entry: int | None
    chunks: tuple[Chunk, ...]
    #: Memory that it takes, with what is not in the file (bss).
    start: int
    end: int


def is_elf(image: bytes | memoryview) -> bool:
    """Whether the file begins as an ELF file does."""
    return bytes(image[:4]) == b"\x7fELF"


class Segment(Record):
    """A program header (ELF specification, chapter 2)."""

    #: Where in the file the header itself is.
    at: int
    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int


def segments(image: bytes | memoryview | bytearray) -> list[Segment]:
    """The program headers of an ELF file; raises what `struct` and indexing raise."""
    wide = image[4] == _CLASS_64
    [table] = struct.unpack_from("<Q" if wide else "<I", image, 32 if wide else 28)
    entry_size, count = struct.unpack_from("<HH", image, 54 if wide else 42)
    found = []
    for at in range(table, table + count * entry_size, entry_size or 1):
        if wide:
            kind, _, *rest = struct.unpack_from("<IIQQQQQ", image, at)
        else:
            kind, *rest = struct.unpack_from("<IIIIII", image, at)
        found.append(Segment(at, kind, *rest))
    return found


def set_file_size(image: bytearray, segment: Segment, size: int) -> None:
    """Changes how much of a segment is taken from the file."""
    if image[4] == _CLASS_64:
        struct.pack_into("<Q", image, segment.at + 32, size)
    else:
        struct.pack_into("<I", image, segment.at + 16, size)


def drop_sections(image: bytearray) -> None:
    """Makes an ELF file one without a table of sections."""
    wide = image[4] == _CLASS_64
    struct.pack_into("<Q" if wide else "<I", image, 40 if wide else 32, 0)
    struct.pack_into("<HH", image, 60 if wide else 48, 0, 0)


def parse(image: bytes | memoryview, path: str) -> Kernel:
    """The kernel in an ELF file; raises `ImageError` for one that is none, or is damaged."""

    def error(what: str, reason: str = "corrupt") -> ImageError:
        return ImageError(f"{path} {what}", path=path, reason=reason)

    try:
        wide, order = image[4] == _CLASS_64, image[5]
        kind, machine, _, entry = struct.unpack_from("<HHIQ" if wide else "<HHII", image, 16)
        if order != _LITTLE_ENDIAN or machine != (_X86_64 if wide else _386):
            raise error("is an ELF file for another kind of CPU, not for x86", "unsupported")
        if kind not in (_EXEC, _DYN):
            raise error(
                "is an ELF file, but no program (an object file or a core?)", "not-a-kernel"
            )
        headers = segments(image)
    except (struct.error, IndexError, OverflowError):
        raise error("is corrupt: its ELF or program headers are cut off") from None
    if any(header.type == _INTERP for header in headers):
        raise error("is a Linux program, not a kernel", "not-a-kernel")
    loads = [header for header in headers if header.type == LOAD and header.memsz]
    if not loads:
        raise error("has nothing to load", "not-a-kernel")
    chunks, start, end = [], 1 << 64, 0
    for header in loads:
        offset, size, memory = header.offset, header.filesz, header.memsz
        address = header.paddr
        if offset + size > len(image) or size > memory:
            raise error(f"is corrupt: it ends before its segment for {address:#x} does")
        if size:
            chunks.append(Chunk(address, memoryview(image)[offset : offset + size], "kernel"))
        start, end = min(start, address), max(end, address + memory)
    return Kernel(
        bits=64 if wide else 32,
        entry=_physical(entry, loads),
        pvh_entry=_pvh_entry(image, headers),
        chunks=tuple(chunks),
        start=start,
        end=end,
    )


def plan(
    image: bytes | memoryview,
    path: str,
    initrd: bytes | memoryview,
    cmdline: bytes,
    ranges: list[Range],
    rsdp: int,
    *,
    protocol: str = "auto",
) -> Plan:
    """How to start the ELF kernel `image`: by PVH when it has that entry, else by its own.

    `protocol`: "auto", "pvh" or "elf" to insist. Raises `ImageError`, `ConfigError`.
    """
    kernel = parse(image, path)
    linux.check_cmdline(cmdline, _CMDLINE_SIZE)
    _check_place(kernel, path, ranges)
    pvh = kernel.pvh_entry
    if protocol == "pvh" and pvh is None:
        raise ImageError(f"{path} has no PVH entry", path=path, reason="unsupported")
    initrd_at = linux.place_initrd(len(initrd), ranges, 4 * layout.GIB, kernel.start, kernel.end)
    chunks = [
        *kernel.chunks,
        Chunk(initrd_at, initrd, "initrd"),
        Chunk(layout.COMMAND_LINE, cmdline + b"\0", "command line"),
    ]
    if pvh is not None and protocol != "elf":
        chunks += _start_info(ranges, rsdp, initrd_at, len(initrd))
        return Plan(
            "pvh", "protected", pvh, {"rbx": layout.START_INFO}, tuple(chunks), tuple(ranges)
        )
    page = linux.build_zero_page(ranges, rsdp)
    linux.set_initrd(page, initrd_at, len(initrd))
    chunks.append(Chunk(layout.ZERO_PAGE, bytes(page), "zero page"))
    registers = {"rsi": layout.ZERO_PAGE}
    if kernel.bits == 64:
        return Plan("elf64", "long", kernel.entry, registers, tuple(chunks), tuple(ranges))
    return Plan("elf32", "protected", kernel.entry, registers, tuple(chunks), tuple(ranges))


def _start_info(ranges: list[Range], rsdp: int, initrd_at: int, initrd_size: int) -> list[Chunk]:
    modules = 1 if initrd_size else 0
    info = struct.pack(
        "<IIIIQQQQII",
        _START_MAGIC,
        1,  # version: with a memory map
        0,
        modules,
        _MODULES if modules else 0,
        layout.COMMAND_LINE,
        rsdp,
        _MEMORY_MAP,
        len(ranges),
        0,
    )
    memory = b"".join(struct.pack("<QQII", p.start, p.size, p.kind, 0) for p in ranges)
    chunks = [
        Chunk(layout.START_INFO, info, "PVH start info"),
        Chunk(_MEMORY_MAP, memory, "PVH memory map"),
    ]
    if modules:
        module = struct.pack("<QQQQ", initrd_at, initrd_size, 0, 0)
        chunks.append(Chunk(_MODULES, module, "PVH module"))
    return chunks


def _check_place(kernel: Kernel, path: str, ranges: list[Range]) -> None:
    """All of it must be in RAM, and the low memory that the loader uses is not for it."""
    pieces = layout.ram(ranges, below=1 << 64)
    if any(piece.start <= kernel.start and kernel.end <= piece.end for piece in pieces):
        return
    if kernel.start < layout.HIGH_START:
        raise ImageError(
            f"{path} wants to be loaded at {kernel.start:#x}, but kernels can only be loaded from "
            f"1 MiB on",
            path=path,
            reason="unsupported",
        )
    total = layout.installed(ranges)
    raise ImageError(
        f"{path} takes guest-physical memory up to {kernel.end:#x}, so at least "
        f"{show_size(-(-kernel.end // layout.MIB) * layout.MIB)}, but the machine has "
        f"{show_size(total)}; give it more",
        path=path,
        reason="memory",
    )


def _physical(entry: int, loads: list[Segment]) -> int:
    """The entry as a physical address: Linux's e_entry is one already, others' is virtual."""
    for header in loads:
        if header.paddr <= entry < header.paddr + header.memsz:
            return entry
    for header in loads:
        if header.vaddr <= entry < header.vaddr + header.memsz:
            return entry - header.vaddr + header.paddr
    return entry


def _pvh_entry(image: bytes | memoryview, headers: list[Segment]) -> int | None:
    for header in headers:
        if header.type != _NOTE:
            continue
        notes = bytes(image[header.offset : header.offset + header.filesz])
        at = 0
        while at + 12 <= len(notes):
            name_size, size, kind = struct.unpack_from("<III", notes, at)
            name = notes[at + 12 : at + 12 + name_size]
            start = at + 12 + (name_size + 3) // 4 * 4
            description = notes[start : start + size]
            if name == b"Xen\0" and kind == _PHYS32_ENTRY and len(description) >= 4:
                # Linux writes it as a number of its own width.
                return int.from_bytes(description[:8], "little") & 0xFFFFFFFF
            at = start + (size + 3) // 4 * 4
    return None
