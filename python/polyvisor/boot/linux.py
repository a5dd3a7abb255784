"""bzImage: Linux's x86 boot protocol, by the 64-bit and the 32-bit entry (Linux: x86/boot)."""

from __future__ import annotations

import struct

from polyvisor.boot import layout
from polyvisor.boot.layout import Chunk, Plan, Range
from polyvisor.config import show_size
from polyvisor.errors import ConfigError, ImageError
from polyvisor.records import Record

HEADER = 0x1F1
_MAGIC = b"HdrS"
_LOADED_HIGH = 1 << 0
_KERNEL_64 = 1 << 0
_E820_MAX = 128
#: type_of_loader: none of those that have a number.
_LOADER_UNDEFINED = 0xFF
#: From which protocol version on a field is there (Linux: x86/boot, "The Real-Mode Kernel Header").
_V_RELOCATABLE, _V_CMDLINE_SIZE, _V_INIT_SIZE, _V_XLOADFLAGS = 0x205, 0x206, 0x20A, 0x20C
_OLDEST = 0x204


class SetupHeader(Record):
    """What the header of a bzImage says."""

    version: int
    setup_size: int
    payload_offset: int
    payload_size: int
    kernel_size: int
    loadflags: int
    initrd_addr_max: int
    alignment: int
    min_alignment: int
    relocatable: bool
    xloadflags: int
    cmdline_size: int
    pref_address: int
    init_size: int
    raw: bytes

    @property
    def is_64bit(self) -> bool:
        """There is a 64-bit entry, at 0x200."""
        return bool(self.xloadflags & _KERNEL_64)


def is_bzimage(image: bytes | memoryview) -> bool:
    """Whether the file has the header of a bzImage."""
    return len(image) >= 0x264 and bytes(image[0x202:0x206]) == _MAGIC


def parse(image: bytes | memoryview, path: str) -> SetupHeader:
    """The setup header; raises `ImageError` for what no kernel of this protocol can have."""

    def u(offset: int, size: int) -> int:
        return int.from_bytes(image[offset : offset + size], "little")

    def corrupt(what: str) -> ImageError:
        return ImageError(f"{path} is corrupt: {what}", path=path, reason="corrupt")

    if len(image) < 0x264 or not is_bzimage(image):
        raise corrupt("its Linux header is cut off")
    if u(0x1FE, 2) != 0xAA55:
        raise corrupt("its boot sector has no signature")
    version = u(0x206, 2)
    loadflags = u(0x211, 1)
    if version < _OLDEST or not loadflags & _LOADED_HIGH:
        raise ImageError(
            f"{path} is a kernel for boot protocol {version >> 8}.{version & 255:02}, loaded low; "
            f"only bzImages of protocol 2.04 (Linux 2.6) or later can be booted",
            path=path,
            reason="unsupported",
        )
    setup_size = ((u(HEADER, 1) or 4) + 1) * 512
    kernel_size = u(0x1F4, 4) * 16
    # The file may end a few bytes before syssize, which counts whole paragraphs, says.
    if kernel_size < 1024 or setup_size + kernel_size > len(image) + 15:
        raise corrupt(
            f"its header promises {setup_size + kernel_size} bytes, but it has {len(image)}"
        )
    header_end = 0x202 + u(0x201, 1)
    if not 0x230 <= header_end <= 0x290:
        raise corrupt("its header has an impossible length")
    alignment = u(0x230, 4) if version >= _V_RELOCATABLE else 0x100000
    if alignment & (alignment - 1) or not 4096 <= alignment <= 1 << 30:
        raise corrupt(f"it wants an alignment of {alignment:#x}")
    has_init_size = version >= _V_INIT_SIZE
    pref_address = u(0x258, 8) if has_init_size else 0x100000
    init_size = u(0x260, 4) if has_init_size else kernel_size * 4
    if init_size < kernel_size // 2 or pref_address >= 1 << 32:
        raise corrupt("it wants an impossible place in memory")
    return SetupHeader(
        version=version,
        setup_size=setup_size,
        payload_offset=setup_size + u(0x248, 4),
        payload_size=u(0x24C, 4),
        kernel_size=kernel_size,
        loadflags=loadflags,
        initrd_addr_max=u(0x22C, 4),
        alignment=alignment,
        min_alignment=1 << u(0x235, 1) if version >= _V_INIT_SIZE else alignment,
        relocatable=version >= _V_RELOCATABLE and bool(u(0x234, 1)),
        xloadflags=u(0x236, 2) if version >= _V_XLOADFLAGS else 0,
        cmdline_size=u(0x238, 4) if version >= _V_CMDLINE_SIZE else 255,
        pref_address=pref_address,
        init_size=max(init_size, kernel_size),
        raw=bytes(image[HEADER:header_end]),
    )


def plan(
    image: bytes | memoryview,
    path: str,
    initrd: bytes | memoryview,
    cmdline: bytes,
    ranges: list[Range],
    rsdp: int,
    *,
    force_32bit: bool = False,
) -> Plan:
    """How to start the bzImage `image` (from file `path`, for messages) in memory like `ranges`.

    Takes the 64-bit entry when the kernel has one, else the 32-bit one. Raises `ImageError`,
    `ConfigError` (the command line).
    """
    header = parse(image, path)
    check_cmdline(cmdline, header.cmdline_size)
    place = _place_kernel(header, path, ranges)
    kernel = Chunk(place, image[header.setup_size :], "kernel")
    limit = header.initrd_addr_max + 1
    initrd_at = place_initrd(len(initrd), ranges, limit, place, place + header.init_size)
    zero_page = build_zero_page(ranges, rsdp, header.raw)
    set_initrd(zero_page, initrd_at, len(initrd))
    chunks = [
        kernel,
        Chunk(initrd_at, initrd, "initrd"),
        Chunk(layout.ZERO_PAGE, bytes(zero_page), "zero page"),
        Chunk(layout.COMMAND_LINE, cmdline + b"\0", "command line"),
    ]
    long = header.is_64bit and not force_32bit
    return Plan(
        protocol="linux64" if long else "linux32",
        mode="long" if long else "protected",
        entry=place + 0x200 if long else place,
        registers={"rsi": layout.ZERO_PAGE},
        chunks=tuple(chunks),
        memory_map=tuple(ranges),
    )


def check_cmdline(cmdline: bytes, limit: int) -> None:
    """Raises `ConfigError` when a kernel that takes `limit` bytes cannot be given this line."""
    if b"\0" in cmdline:
        raise ConfigError("the kernel command line has a NUL character in it", field="cmdline")
    if len(cmdline) > limit:
        raise ConfigError(
            f"the kernel command line has {len(cmdline)} bytes, but this kernel takes at most "
            f"{limit}; make it shorter",
            field="cmdline",
        )


def place_initrd(
    size: int, ranges: list[Range], limit: int, kernel_start: int, kernel_end: int
) -> int:
    """The highest page-aligned address for `size` bytes below `limit`, clear of the kernel.

    0 when there is none to place. Raises `ImageError` (reason "memory") when it fits nowhere.
    """
    if not size:
        return 0
    best = -1
    for piece in layout.ram(ranges, below=min(limit, 4 * layout.GIB)):
        # What the kernel leaves of the piece: above it and below it.
        for start, end in (
            (max(piece.start, kernel_end), piece.end),
            (piece.start, min(piece.end, kernel_start)),
        ):
            at = (end - size) & ~0xFFF
            if at >= start:
                best = max(best, at)
    if best < 0:
        total = layout.installed(ranges)
        raise ImageError(
            f"the initrd of {show_size(size)} does not fit beside the kernel into a memory of "
            f"{show_size(total)}; give the machine more memory or a smaller initrd",
            reason="memory",
        )
    return best


def build_zero_page(ranges: list[Range], rsdp: int, header: bytes = b"") -> bytearray:
    """boot_params (Linux: x86/zero-page) with the memory map, ACPI's root and a setup header: that
    of a bzImage, or (an ELF kernel has none) one that says as much as such a kernel looks at."""
    page = bytearray(4096)
    struct.pack_into("<Q", page, 0x70, rsdp)
    if header:
        page[HEADER : HEADER + len(header)] = header
    else:
        struct.pack_into("<H", page, 0x1FE, 0xAA55)
        page[0x202:0x206] = _MAGIC
        struct.pack_into("<H", page, 0x206, 0x20C)
        page[0x211] = _LOADED_HIGH
        struct.pack_into("<I", page, 0x230, 0x1000000)
    struct.pack_into("<H", page, 0x1FA, 0xFFFF)  # vid_mode: leave the (missing) screen alone
    page[0x210] = _LOADER_UNDEFINED
    struct.pack_into("<I", page, 0x228, layout.COMMAND_LINE)
    if len(ranges) > _E820_MAX:
        raise ConfigError(f"a memory map of more than {_E820_MAX} ranges", field="memory")
    page[0x1E8] = len(ranges)
    for index, piece in enumerate(ranges):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * index, piece.start, piece.size, piece.kind)
    return page


def set_initrd(page: bytearray, at: int, size: int) -> None:
    """Tells the kernel where its initrd is; both halves of the 64-bit fields."""
    struct.pack_into("<II", page, 0x218, at & 0xFFFFFFFF, size & 0xFFFFFFFF)
    struct.pack_into("<II", page, 0xC0, at >> 32, size >> 32)


def _place_kernel(header: SetupHeader, path: str, ranges: list[Range]) -> int:
    """Where the protected-mode part goes: where it would like to be, else (when it can be moved) at
    the first aligned address with room for all of init_size."""
    wanted = header.pref_address
    pieces = layout.ram(ranges)
    for piece in pieces:
        if piece.start <= wanted and wanted + header.init_size <= piece.end:
            return wanted
    if header.relocatable:
        for piece in pieces:
            at = -(-piece.start // header.alignment) * header.alignment
            if at + header.init_size <= piece.end:
                return at
    floor = layout.HIGH_START if header.relocatable else wanted
    needed = -(-(floor + header.init_size) // layout.MIB) * layout.MIB
    total = layout.installed(ranges)
    raise ImageError(
        f"{path} needs at least {show_size(needed)} of memory to start, and more to run, but the "
        f"machine has {show_size(total)}; give it more",
        path=path,
        reason="memory",
    )
