"""Guest memory as Python sees it: copies by address, zero-copy views by region, written pages."""

from __future__ import annotations

from polyvisor.errors import MemoryRangeError
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from polyvisor import _native


class DirtyPages(Record):
    """The pages that one `DirtyLog.fetch` reports: a sequence of `ranges`, false when empty."""

    #: (gpa, bytes) of what was written, ascending: pages of 4096 bytes, adjacent ones joined.
    ranges: list[tuple[int, int]]
    #: The same for bulk use, by the start of each region of memory: page n of the region is bit
    #: n % 8 of byte n // 8 (`numpy.unpackbits(..., bitorder="little")`).
    bitmaps: dict[int, bytes]

    @property
    def size(self) -> int:
        """Bytes in all ranges together."""
        return sum(size for _, size in self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.ranges)

    def __repr__(self) -> str:
        return f"DirtyPages(ranges={self.ranges!r})"

    def has(self, gpa: int) -> bool:
        """Whether the page of this address is among them."""
        from bisect import bisect_right

        at = bisect_right(self.ranges, (gpa, 1 << 64)) - 1
        return at >= 0 and gpa < sum(self.ranges[at])


class DirtyLog:
    """Which pages of guest memory are written, from `Memory.dirty` until `stop`.

    A context manager: leaving it stops the log, which costs the guest a little as long as it is on
    (the first store to each page after each `fetch`).
    """

    def __init__(self, native: _native.DirtyLog) -> None:
        self._native = native

    @property
    def active(self) -> bool:
        """Whether it can be fetched: not stopped, and the machine not closed."""
        return self._native.active

    @property
    def method(self) -> str:
        """How the engine does it: "marks" (`soft`), "log" (KVM's bitmaps) or "ring" (its rings)."""
        return self._native.method

    def fetch(self) -> DirtyPages:
        """The pages written since the last fetch (or the start), which count as clean from then on.

        By CPUs, devices and `Memory.write`, in any state of the machine, also while it runs: a
        write that is in progress meanwhile is in this fetch or the next one. KVM may report a page
        that was only read. To copy what changed, fetch first and read the pages after. Raises
        `StateMismatch` when the log was stopped or the machine closed, `HostError`.
        """
        ranges, bitmaps = self._native.fetch()
        return DirtyPages(ranges, dict(bitmaps))

    def stop(self) -> None:
        """Ends it. No effect when it has ended."""
        self._native.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class Memory:
    """The guest-physical address space that is RAM.

    `read` and `write` copy and may run across adjacent regions. `view` gives a writable memoryview
    of the guest's own bytes. Stores through a view to a page whose code the guest has executed are
    noticed when the machine next starts or resumes; a running machine has to be told with
    `note_write`, and so has a dirty log. `write` needs no such care.
    """

    def __init__(
        self, native: _native.GuestMemory, start_dirty: Callable[[], _native.DirtyLog]
    ) -> None:
        self._native = native
        self._start_dirty = start_dirty

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

    def dirty(self) -> DirtyLog:
        """Begins to note which pages are written, with all of them clean. The machine may run::

            with machine.memory.dirty() as log:
                ...
                for gpa, size in log.fetch():
                    copy[gpa] = machine.memory.read(gpa, size)

        One log at a time: raises `StateMismatch` when there is one already, or the machine is
        closed; `HostError` when the kernel cannot.
        """
        return DirtyLog(self._start_dirty())
