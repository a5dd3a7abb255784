"""Disk images: which format one has, and images in formats of QEMU's, through qemu-img.

A guest writes what it likes into its raw disk, also the header of a qcow2 image that names any file
of the host as its backing file. A host that looked at the contents to find the format would read
that file for it. So the format is what the caller says, or what the file's name says; contents are
only looked at to refuse a file that is probably something else.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path

from polyvisor.config import parse_size
from polyvisor.errors import ConfigError, HostError, ImageError
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    AnyPath = str | os.PathLike[str]
    Format = Literal["raw", "qcow2", "vmdk", "vdi", "vhdx"]

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
_MAGIC = b"QFI\xfb"


def format_of(path: str | os.PathLike[str], given: Format | str | None = None) -> str:
    """The format of a disk image: `given`, or what the end of its name says (".qcow2", ".vmdk",
    ".vdi", ".vhdx"), or "raw".

    Raises `ConfigError` for formats that do not exist, and when a file that would be raw begins as
    a qcow2 image does: then say which it is.
    """
    if given is not None:
        if given not in FORMATS:
            raise ConfigError(
                f"there is no image format {given!r}; choose one of {', '.join(FORMATS)}",
                field="format",
            )
        return given
    path = Path(path)
    by_name = path.suffix[1:].lower()
    if by_name in FORMATS:
        return by_name
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                raise ConfigError(
                    f"{str(path)!r} begins as a qcow2 image but is not named so; give "
                    'format="qcow2" if you trust it, or format="raw" for what a guest wrote there',
                    field="format",
                )
    return "raw"


class DiskInfo(Record, kw_only=True):
    """What `info` knows of an image."""

    path: str
    format: str
    #: Bytes that a guest sees.
    size: int
    #: Bytes that it takes on the host.
    allocated: int
    #: The image that it is on top of; None: none.
    backing: str | None = None
    backing_format: str | None = None


def info(path: AnyPath, format: Format | str | None = None) -> DiskInfo:  # noqa: A002
    """What an image is. It names its backing file itself: have a look before you use an image that
    you do not trust, for a guest that runs on it can read that file.

    Raises `ImageError` when qemu-img is missing or finds something else there."""
    path = os.fspath(path)
    said = json.loads(
        _qemu_img("info", "--output=json", *_opened(path, format_of(path, format)), path=path)
    )
    return DiskInfo(
        path=path,
        format=said["format"],
        size=said["virtual-size"],
        allocated=said.get("actual-size", 0),
        backing=said.get("full-backing-filename") or said.get("backing-filename"),
        backing_format=said.get("backing-filename-format"),
    )


def create(path: AnyPath, size: int | str, format: Format | None = None) -> None:  # noqa: A002
    """Makes an empty image of `size` bytes (or "10G"), which takes no room yet.

    Raises `ConfigError`, `HostError` (there is one already), `ImageError`."""
    path, size = os.fspath(path), parse_size(size)
    kind = format_of(path, format)
    if size <= 0 or size % 512:
        raise ConfigError(f"a disk has a multiple of 512 bytes, not {size}", field="size")
    with _new(path):
        if kind == "raw":
            os.truncate(path, size)
        else:
            _qemu_img("create", "-q", "-f", kind, _local(path), str(size), path=path)


def overlay(path: AnyPath, backing: AnyPath, backing_format: Format | None = None) -> None:
    """Makes a qcow2 image on top of `backing`: it reads as that one, and keeps what is written.
    Nobody may write to `backing` from then on.

    Raises `ConfigError`, `HostError` (there is one already), `ImageError`."""
    path, backing = os.fspath(path), os.path.abspath(backing)
    kind = format_of(backing, backing_format)
    info(backing, kind)  # qemu-img makes images on top of nothing, too
    below = ("-F", kind, "-b", _local(backing))
    with _new(path):
        _qemu_img("create", "-q", "-f", "qcow2", *below, _local(path), path=path)


def convert(
    source: AnyPath,
    target: AnyPath,
    source_format: Format | None = None,
    target_format: Format | None = None,
) -> None:
    """Copies an image into another format, with all that it is on top of.

    Raises `ConfigError`, `HostError` (`target` is there already), `ImageError`."""
    source, target = os.fspath(source), os.fspath(target)
    kind = format_of(target, target_format)
    opened = _opened(source, format_of(source, source_format))
    info(source, source_format)
    with _new(target):
        _qemu_img("convert", "-O", kind, *opened, _local(target), path=source)


def _opened(path: str, kind: str) -> tuple[str, ...]:
    """A local file, whatever it is called ("nbd:...", "json:..."), in a format that was chosen."""
    quoted = path.replace(",", ",,")
    return ("--image-opts", f"driver={kind},file.driver=file,file.filename={quoted}")


def _local(path: str) -> str:
    """The same for what takes nothing but a name."""
    return os.path.abspath(path)


@contextlib.contextmanager
def _new(path: str) -> Iterator[None]:
    """Makes the file, which must not be there, and takes it away again when what follows fails."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise HostError(
            f"cannot create disk image {path!r}: {error.strerror}",
            errno=error.errno or 0,
            path=path,
        ) from error
    try:
        yield
    except BaseException:
        os.unlink(path)
        raise


def _qemu_img(*arguments: str, path: str) -> str:
    try:
        done = subprocess.run(["qemu-img", *arguments], check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ImageError(
            "images of other formats than raw need the program qemu-img; install the package "
            "qemu-utils",
            path=path,
            reason="missing",
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split()).removeprefix("qemu-img: ")
        raise ImageError(f"cannot use disk image {path!r}: {said}", path=path, reason="format")
    return done.stdout
