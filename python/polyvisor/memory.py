"""Guest memory as Python sees it: copies by address, and zero-copy views by region."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from polyvisor import _native
from polyvisor.errors import MemoryRangeError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Memory:
    """The guest-physical address space that is RAM.

    `read` and `write` copy and may run across adjacent regions. `view` gives a writable memoryview
    of the guest's own bytes. Stores through a view to a page whose code the guest has executed are
    noticed when the machine next starts or resumes; a running machine has to be told with
    `note_write`. `write` needs no such care.
    """

    def __init__(self, native: _native.GuestMemory) -> None:
        self._native = native

    @property
    def native(self) -> _native.GuestMemory:
        """The bound C++ object, for `polyvisor._fast`."""
        return self._native

    @property
    def size(self) -> int:
        """Bytes of all regions together."""
        return self._native.total_size

    @property
    def regions(self) -> list[_native.Region]:
        """All regions by address; ``memoryview(region)`` is the whole of one, without a copy."""
        return self._native.regions

    def __iter__(self) -> Iterator[_native.Region]:
        return iter(self._native.regions)

    def __len__(self) -> int:
        return self.size

    def region(self, gpa: int) -> _native.Region:
        """The region that holds `gpa`; raises `MemoryRangeError` when there is none."""
        for region in self._native.regions:
            if region.start <= gpa < region.start + region.size:
                return region
        raise MemoryRangeError(
            f"guest-physical address {gpa:#x} is not backed by memory", gpa=gpa, size=1
        )

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable, zero-copy memoryview of `size` bytes at `gpa`, all inside one region.

        It keeps the memory alive, also when the machine has been closed.
        """
        region = self.region(gpa)
        offset = gpa - region.start
        if size < 0 or size > region.size - offset:
            raise MemoryRangeError(
                f"guest-physical range {gpa:#x}+{size:#x} is not backed by one memory region",
                gpa=gpa,
                size=size,
            )
        return memoryview(region)[offset : offset + size]

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of `size` bytes at `gpa`; raises `MemoryRangeError` when not all are backed."""
        return self._native.read(gpa, size)

    def read_into(self, gpa: int, buffer: Buffer) -> None:
        """Fills a writable buffer from guest memory at `gpa`."""
        self._native.read_into(gpa, buffer)

    def write(self, gpa: int, data: Buffer) -> None:
        """Stores bytes at `gpa`, all or none; raises `MemoryRangeError` when not all are backed."""
        self._native.write(gpa, data)

    def read_int(self, gpa: int, size: int = 8) -> int:
        """A little-endian unsigned integer of `size` bytes."""
        return int.from_bytes(self._native.read(gpa, size), "little")

    def write_int(self, gpa: int, value: int, size: int = 8) -> None:
        """Stores a little-endian unsigned integer of `size` bytes."""
        self._native.write(gpa, value.to_bytes(size, "little"))

    def note_write(self, gpa: int, size: int) -> None:
        """Tells the engine that [gpa, gpa+size) was changed through a view while it runs."""
        self._native.note_write(gpa, size)
