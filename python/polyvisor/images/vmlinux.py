"""The ELF kernel inside a bzImage: compressed there, behind a small program that unpacks it."""

from __future__ import annotations

import os

from polyvisor.boot import elf, linux, read_file
from polyvisor.errors import ImageError
from polyvisor.images import cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: The most that any kernel unpacks to; guards against a corrupt or hostile file.
MAX_SIZE = 1 << 30
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20


def extract(bzimage: str | os.PathLike[str]) -> bytes:
    """The vmlinux in a bzImage; raises `ImageError` when there is none or it cannot be unpacked."""
    path = os.fspath(bzimage)
    image = read_file(path, "kernel")
    if not linux.is_bzimage(image):
        raise ImageError(f"{path} is not a bzImage", path=path, reason="not-a-kernel")
    header = linux.parse(image, path)
    payload = image[header.payload_offset : header.payload_offset + header.payload_size]
    for magic, decompress in _METHODS.items():
        if bytes(payload[: len(magic)]) == magic:
            try:
                kernel = decompress(payload)
            except ImageError:
                raise
            except Exception as error:  # each library has exceptions of its own
                raise ImageError(
                    f"{path} is corrupt: its compressed kernel cannot be unpacked ({error})",
                    path=path,
                    reason="corrupt",
                ) from error
            break
    else:
        kernel = bytes(payload)
    if not elf.is_elf(kernel):
        raise ImageError(
            f"the kernel in {path} is compressed by a method that polyvisor does not know",
            path=path,
            reason="unsupported",
        )
    return kernel


def cached(bzimage: str | os.PathLike[str]) -> Path:
    """The extracted vmlinux, `trimmed`, as a file in the cache; made on first use."""
    from pathlib import Path

    return Path(cached_path(bzimage))


def cached_path(bzimage: str | os.PathLike[str]) -> str:
    """`cached`, as text."""
    key = cache.file_sum(bzimage)

    def make(directory: Path) -> None:
        import contextlib
        import struct

        kernel = extract(bzimage)
        # (As it is when it is damaged: loading it will say how.)
        with contextlib.suppress(struct.error, IndexError, OverflowError):
            kernel = trimmed(kernel)
        (directory / "vmlinux").write_bytes(kernel)

    return os.path.join(cache.entry_path(f"vmlinux/{key[:32]}-trimmed", make), "vmlinux")


def trimmed(kernel: bytes) -> bytes:
    """An ELF kernel without the zeros that its segments end with, which memory has anyway, and
    without what is in no segment. For Linux that is half of the file: its bss is in there."""
    image = bytearray(kernel)
    end = 0
    for segment in elf.segments(kernel):
        size = segment.filesz
        if segment.type == elf.LOAD:
            size = len(kernel[segment.offset : segment.offset + size].rstrip(b"\0"))
            elf.set_file_size(image, segment, size)
        end = max(end, segment.offset + size)
    elf.drop_sections(image)
    return bytes(image[:end])


def _gzip(data: memoryview) -> bytes:
    import zlib

    return zlib.decompressobj(wbits=31).decompress(data, MAX_SIZE)


def _xz(data: memoryview) -> bytes:
    import lzma

    return lzma.LZMADecompressor().decompress(data, MAX_SIZE)


def _bzip2(data: memoryview) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(data, MAX_SIZE)


def _zstd(data: memoryview) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def _lz4(data: memoryview) -> bytes:
    """LZ4's legacy frames: blocks of at most 8 MiB, each with its size in front. Linux's build puts
    the unpacked size (4 bytes) behind the last, which no block's size can be taken for."""
    import importlib

    try:
        block = importlib.import_module("lz4.block")
    except ImportError:
        raise ImageError(
            "this kernel is compressed with LZ4; install the Python package lz4 to unpack it",
            reason="unsupported",
        ) from None
    at, blocks = len(_LZ4_LEGACY), []
    while len(data) - at > 4:
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if data[at - 4 : at] == _LZ4_LEGACY:  # another frame
            continue
        if not 0 < size <= len(data) - at:
            break
        blocks.append(block.decompress(data[at : at + size], uncompressed_size=_LZ4_BLOCK))
        at += size
    return b"".join(blocks)


_METHODS: dict[bytes, Callable[[memoryview], bytes]] = {
    b"\x1f\x8b": _gzip,
    b"\xfd7zXZ\x00": _xz,
    b"BZh": _bzip2,
    b"\x28\xb5\x2f\xfd": _zstd,
    _LZ4_LEGACY: _lz4,
}
