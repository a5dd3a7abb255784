"""virtio-blk: disks of a machine (virtio 1.2, 5.2). See docs/disks.md."""

from __future__ import annotations

import os

from polyvisor import _native
from polyvisor.errors import ConfigError
from polyvisor.images.disk import format_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, Protocol, TypeAlias

    from typing_extensions import Buffer

    from polyvisor.images.disk import Format
    from polyvisor.machine import Machine

    Cache = Literal["writeback", "none", "unsafe"]
    Io = Literal["auto", "io_uring", "threads"]
    Transport = Literal["pci", "mmio"]

    class ReadOnlyDisk(Protocol):
        """A disk whose bytes come from Python. An `OSError` becomes an I/O error of the guest."""

        #: Bytes, a multiple of 512.
        size: int

        def read(self, offset: int, size: int, /) -> Buffer: ...

    class WritableDisk(ReadOnlyDisk, Protocol):
        def write(self, offset: int, data: bytes, /) -> object: ...

        # def flush(self) -> object: when it has this, it is called for the guest's flushes

    Source: TypeAlias = str | os.PathLike[str] | ReadOnlyDisk | WritableDisk


class Disk:
    """A disk of a machine; what `Machine.add_disk` returns."""

    def __init__(self, native: _native.VirtioBlk, path: str, image_format: str, read_only: bool):
        self._native = native
        #: The image's path, or the class's name of a disk that is written in Python.
        self.path = path
        #: "raw", "qcow2", ...; "python".
        self.format = image_format
        self.read_only = read_only

    def __repr__(self) -> str:
        return f"<Disk {self.path!r}, {self.format}, virtio-{self.native.transport}>"

    @property
    def native(self) -> _native.VirtioBlk:
        """The bound C++ object: where it is plugged, how its driver is doing."""
        return self._native

    @property
    def size(self) -> int:
        """Bytes, as the guest knows it."""
        return self._native.size

    @property
    def io(self) -> str:
        """How requests are done: "io_uring" or "threads"."""
        return self._native.io

    def resize(self, size: int) -> None:
        """Gives the image another size (a multiple of 512) and tells the guest, also while it
        runs. Only raw files. Raises `StateMismatch`, `HostError`."""
        self._native.resize(size)

    def refresh(self) -> None:
        """Looks at the image's size again, which somebody else has changed, and tells the guest."""
        self._native.refresh()

    def statistics(self) -> dict[str, Any]:
        """Requests, bytes and errors so far, by kind: "read", "write", "flush", "discard",
        "write_zeroes"; under "other" how many were none of these."""
        return self._native.statistics()


def add_disk(
    machine: Machine,
    path: Source,
    *,
    read_only: bool = False,
    format: Format | None = None,  # noqa: A002 -- the word that every tool has for it
    cache: Cache = "writeback",
    snapshot: bool = False,
    serial: str | None = None,
    queues: int = 1,
    bytes_per_second: int | None = None,
    operations_per_second: int | None = None,
    io: Io = "auto",
    transport: Transport = "pci",
    packed: bool = False,
) -> Disk:
    """See `Machine.add_disk`."""
    for name, rate in (
        ("bytes_per_second", bytes_per_second),
        ("operations_per_second", operations_per_second),
    ):
        if rate is not None and rate <= 0:
            raise ConfigError(
                f"{name} of a disk is a positive number, or None for no limit; not {rate}",
                field=name,
            )
    store, name, kind = _open(path, read_only, format, cache, snapshot)
    try:
        taken = store.read_only
        native = _native.VirtioBlk(
            machine.native,
            store,
            io=io,
            queues=queues,
            serial=serial or "",
            bytes_per_second=bytes_per_second or 0,
            operations_per_second=operations_per_second or 0,
            transport=transport,
            packed=packed,
        )
    finally:
        del store  # a traceback would keep the image open, and locked
    return Disk(native, name, kind, taken)


def _open(
    path: Source, read_only: bool, given: Format | None, cache: Cache, snapshot: bool
) -> tuple[_native.BlockStore, str, str]:
    """The store, its name, its format."""
    if not isinstance(path, str | os.PathLike):
        size = getattr(path, "size", 0)
        store = _native.block_object(path, size=size, read_only=read_only, snapshot=snapshot)
        return store, store.name, "python"
    name = os.fspath(path)
    kind = format_of(name, given)
    store = _native.open_image(
        name, image_format=kind, read_only=read_only, cache=cache, snapshot=snapshot
    )
    return store, name, kind
