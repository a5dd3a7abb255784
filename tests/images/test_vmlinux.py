"""Getting the ELF kernel out of a bzImage, for every compression that Linux uses."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from polyvisor.boot import elf as boot_elf
from polyvisor.errors import ImageError
from polyvisor.images import vmlinux

sys.path.insert(0, str(Path(__file__).parent.parent / "boot"))
from kernels import bzimage, elf

KERNEL = bytes(elf(code=b"kernel code" * 1000, pvh=0x1000040))
# What Linux's build puts behind the compressed data.
SIZE = struct.pack("<I", len(KERNEL))


def _lz4(data: bytes) -> bytes:
    block = pytest.importorskip("lz4.block")
    packed: bytes = block.compress(data, store_size=False)
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(packed)) + packed


@pytest.mark.parametrize(
    "compress",
    [
        bytes,
        gzip.compress,
        bz2.compress,
        lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
        zstandard.compress,
        _lz4,
    ],
    ids=["none", "gzip", "bzip2", "xz", "zstd", "lz4"],
)
def test_extracted(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    tail = b"" if compress is bytes else SIZE
    path.write_bytes(bzimage(size=0x10000, payload=compress(KERNEL) + tail))
    assert vmlinux.extract(path) == KERNEL


def test_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(size=0x10000, payload=gzip.compress(KERNEL, mtime=0) + SIZE))
    place = vmlinux.cached(path)
    assert place.read_bytes() == KERNEL
    assert vmlinux.cached(path) == place


@pytest.mark.parametrize("bits", [32, 64])
def test_trimmed(bits: int) -> None:
    """The same to load, without the zeros at the end and without what belongs to no segment."""
    code = b"\x90" * 0x1000
    full = elf(bits=bits, code=code + bytes(0x5000)) + b"sections"
    offset = 40 if bits == 64 else 32
    full[offset : offset + 4] = (len(full) - 8).to_bytes(4, "little")
    small = vmlinux.trimmed(bytes(full))
    assert len(small) == 0x2000
    before, after = (boot_elf.parse(image, "kernel") for image in (bytes(full), small))
    assert [bytes(chunk.data) for chunk in after.chunks] == [code]
    assert (after.start, after.end, after.entry) == (before.start, before.end, before.entry)
    assert not any(small[offset : offset + 4])


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"no known compression", "unsupported"),
        (gzip.compress(b"not an ELF file", mtime=0) + SIZE, "unsupported"),
        (gzip.compress(KERNEL, mtime=0)[:20] + b"garbage" * 20, "corrupt"),
        (zstandard.compress(KERNEL)[:20], "unsupported"),
    ],
)
def test_what_cannot_be_unpacked(payload: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(size=0x10000, payload=payload))
    with pytest.raises(ImageError) as caught:
        vmlinux.extract(path)
    assert caught.value.reason == reason


def test_no_bzimage(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(KERNEL)
    with pytest.raises(ImageError, match="not a bzImage"):
        vmlinux.extract(path)
