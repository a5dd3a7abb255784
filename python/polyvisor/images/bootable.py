"""What a disk image boots: the kernel and the initial RAM disk in its file system, found and copied
out without mounting it.

    found = bootable.find("debian.img")
    machine.load(found.kernel, found.initrd, found.cmdline)

Images of `polyvisor image build` have an initial RAM disk of polyvisor's own; others, such as the
cloud images that Debian publishes, have the distribution's. Partition tables are understood (GPT
and MBR), and every image format that `Machine.add_disk` takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import uuid
from pathlib import Path

import msgspec

from polyvisor.errors import ConfigError, HostError, ImageError
from polyvisor.images import cache, extfs
from polyvisor.images.debian import INITRD, RELEASE
from polyvisor.images.disk import format_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SECTOR = 512
#: Where an ext file system's superblock has its magic number.
_MAGIC_AT, _MAGIC = 1024 + 56, b"\x53\xef"
#: What every guest of ours boots with: docs/exec.md says why.
_CMDLINE = "console=ttyS0 cryptomgr.notests tsc=reliable"


class Bootable(msgspec.Struct, frozen=True):
    """What `find` found. `ours`: the image is one of `polyvisor image build`."""

    kernel: str
    initrd: str
    cmdline: str
    #: "vda", or the partition with the root file system.
    root: str
    release: str
    ours: bool

    def fast_kernel(self) -> str:
        """The kernel unpacked, which boots faster, or as it is where that cannot be done."""
        from polyvisor.images import vmlinux

        try:
            return vmlinux.cached_path(self.kernel)
        except ImageError:  # a compression for which this Python has no library
            return self.kernel


def share_options(shares: Sequence[tuple[str, str, bool]], *, ours: bool) -> list[str]:
    """What has the guest mount shared folders (host path, guest path, read-only), for its kernel's
    command line. The tags are share0, share1, ...

    polyvisor's own initial RAM disk mounts them. For others it is left to systemd, from version 254
    on; older ones and other systems mount by hand: ``mount -t virtiofs share0 /mnt``.
    """
    options = []
    for number, (_, guest, read_only) in enumerate(shares):
        if set(guest) & set(" \t\n:"):
            raise ConfigError(
                f"the guest's path {guest!r} of a shared folder has a character that its kernel's "
                f"command line cannot have",
                field="share",
            )
        mode = "ro" if read_only else "rw"
        options.append(
            f"polyvisor.share=share{number}:{guest}:{mode}"
            if ours
            else f"systemd.mount-extra=share{number}:{guest}:virtiofs:{mode}"
        )
    return options


def find(path: str | os.PathLike[str], image_format: str | None = None) -> Bootable:
    """The kernel and initial RAM disk of an image, copied into the cache, and their command line.

    The image's first file system with a kernel in /boot counts. Raises `ImageError` when there is
    none (reason "no-kernel" or "no-filesystem"), `HostError` when the file cannot be read.
    """
    import hashlib

    source, kind = os.fspath(path), format_of(path, image_format)
    try:
        info = os.stat(source)
    except OSError as error:
        raise _unreadable(source, error) from None
    state = f"{info.st_size} {info.st_mtime_ns} {info.st_ino}"

    def make(directory: Path) -> None:
        found = _copy_out(source, kind, directory)
        (directory / "found").write_bytes(msgspec.json.encode(found))
        (directory / "state").write_text(state)

    name = f"{kind} {os.path.realpath(source)}".encode("utf-8", "surrogateescape")
    entry = f"boot/{hashlib.sha256(name).hexdigest()[:24]}"
    known = cache.root() / entry / "state"
    place = cache.entry_path(entry, make, refresh=known.is_file() and known.read_text() != state)
    with open(os.path.join(place, "found"), "rb") as file:
        number, release, ours = msgspec.json.decode(file.read(), type=tuple[int, str, bool])
    device = f"vda{number}" if number else "vda"
    return Bootable(
        kernel=os.path.join(place, "vmlinuz"),
        initrd=os.path.join(place, "initrd"),
        cmdline=f"{_CMDLINE} root=/dev/{device} rw",
        root=device,
        release=release,
        ours=ours,
    )


def _copy_out(source: str, kind: str, directory: Path) -> tuple[int, str, bool]:
    """Copies kernel and initial RAM disk; (partition, release, ours)."""
    with _raw(source, kind) as raw:
        for number, offset in _file_systems(raw, source):
            reader = extfs.Reader(raw, offset)
            chosen = _choose(reader.names("/boot"))
            if chosen is not None:
                release, kernel, initrd = chosen
                reader.copy(kernel, directory / "vmlinuz")
                reader.copy(initrd, directory / "initrd")
                return number, release, initrd.startswith(INITRD)
    raise ImageError(
        f"no file system in {source} has a kernel and an initial RAM disk in /boot; give them with "
        f"--kernel and --initrd",
        path=source,
        reason="no-kernel",
    )


def describe(path: str | os.PathLike[str], image_format: str | None = None) -> dict[str, str | int]:
    """What `polyvisor image build` wrote down in an image about it; empty for others."""
    import tempfile

    source = os.fspath(path)
    with (
        _raw(source, format_of(source, image_format)) as raw,
        tempfile.TemporaryDirectory(prefix="polyvisor-") as scratch,
    ):
        target = os.path.join(scratch, "about")
        for _, offset in _file_systems(raw, source):
            try:
                extfs.Reader(raw, offset).copy(RELEASE, target)
            except ImageError:
                continue
            with open(target, "rb") as file:
                found: dict[str, str | int] = msgspec.json.decode(file.read())
            return found
    return {}


@contextlib.contextmanager
def _raw(source: str, image_format: str) -> Iterator[str]:
    """The image as a raw file: itself, or a copy for as long as that takes."""
    if image_format == "raw":
        yield source
        return
    import subprocess
    import tempfile

    program = shutil.which("qemu-img")
    if program is None:
        raise ImageError(
            f"finding the kernel in a {image_format} image needs qemu-img; install it with "
            f"`apt-get install qemu-utils`, or give --kernel and --initrd",
            path=source,
            reason="no-tool",
        )
    with tempfile.TemporaryDirectory(prefix="polyvisor-raw-") as scratch:
        copy = os.path.join(scratch, "raw")
        done = subprocess.run(
            [program, "convert", "-U", "-f", image_format, "-O", "raw", source, copy],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            reason = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise ImageError(
                f"cannot read the image {source}: {reason.removeprefix('qemu-img: ')}",
                path=source,
                reason="unreadable",
            )
        yield copy


def _choose(names: dict[str, str]) -> tuple[str, str, str] | None:
    """(release, kernel, initrd) of the newest kernel in /boot that has both."""
    kernels = [name for name, kind in names.items() if re.match(r"vmlinuz-\d", name)]
    for name in sorted(kernels, key=_version, reverse=True):
        release = name.removeprefix("vmlinuz-")
        own = os.path.basename(INITRD) + release
        for initrd in (own, f"initrd.img-{release}", f"initramfs-{release}.img"):
            if initrd in names:
                return release, f"/boot/{name}", f"/boot/{initrd}"
    return None


def _version(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _file_systems(raw: str, source: str) -> list[tuple[int, int]]:
    """(partition, offset) of every ext file system; partition 0 is the whole disk."""
    try:
        with open(raw, "rb") as disk:
            places = [(0, 0), *_partitions(disk.read(34 * _SECTOR))]
            found = []
            for number, offset in places:
                disk.seek(offset + _MAGIC_AT)
                if disk.read(2) == _MAGIC:
                    found.append((number, offset))
    except OSError as error:
        raise _unreadable(source, error) from None
    if not found:
        raise ImageError(
            f"{source} has no ext2, ext3 or ext4 file system to boot from; give --kernel",
            path=source,
            reason="no-filesystem",
        )
    return found


def _partitions(head: bytes) -> Iterator[tuple[int, int]]:
    """(number, offset in bytes) from a GPT (UEFI 2.10, 5.3) or an MBR's four entries."""
    if head[_SECTOR : _SECTOR + 8] == b"EFI PART":
        first, count, size = struct.unpack_from("<QII", head, _SECTOR + 72)
        for index in range(min(count, 128)):
            at = first * _SECTOR + index * size
            entry = head[at : at + 48]
            if len(entry) == 48 and uuid.UUID(bytes_le=entry[:16]).int:
                yield index + 1, struct.unpack_from("<Q", entry, 32)[0] * _SECTOR
    elif head[510:512] == b"\x55\xaa":
        for index in range(4):
            entry = head[446 + 16 * index : 462 + 16 * index]
            if entry[4]:
                yield index + 1, struct.unpack_from("<I", entry, 8)[0] * _SECTOR


def _unreadable(source: str, error: OSError) -> HostError:
    return HostError(
        f"cannot read the image {source}: {error.strerror}", errno=error.errno or 0, path=source
    )


__all__ = ["Bootable", "describe", "find", "share_options"]
