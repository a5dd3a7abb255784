"""Virtual memory as a whole: the ranges that an address space maps, its bytes, its translations.

`polyvisor.mmu.AddressSpace` has all of this as methods, and `Machine.mmu` passes on to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex, cast, overload

from polyvisor import _native
from polyvisor.errors import ConfigError, MemoryFault, StateMismatch

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from polyvisor.mmu_walk import Walk

LAST = (1 << 64) - 1
#: What `translate_many` gives for addresses that are not mapped.
NOT_MAPPED = LAST

#: How `ranges` joins pages: "physical" those that are neighbours in virtual and in physical memory
#: and have the same rights and page size; "rights" those that are neighbours in virtual memory and
#: have the same rights.
Join = Literal["physical", "rights"]


class Range(NamedTuple):
    """Adjacent pages with the same rights."""

    #: Guest-virtual address of the first byte.
    gva: int
    #: Where that byte is in memory (with a second dimension: in the host's).
    physical: int
    #: Bytes.
    size: int
    #: Bytes of a page; of the smallest when joined by rights or cut by a second dimension.
    page_size: int
    #: What every level of the tables allows. Supervisors may do more: write without CR0.WP, ...
    user: bool
    writable: bool
    executable: bool
    #: The pages stay in the TLB when CR3 is loaded.
    is_global: bool

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.gva + self.size

    @property
    def rights(self) -> str:
        """As in /proc/PID/maps, then who may and whether it is global: "rw- user", "r-x global"."""
        text = f"r{'w' if self.writable else '-'}{'x' if self.executable else '-'}"
        return text + (" user" if self.user else "") + (" global" if self.is_global else "")

    def __str__(self) -> str:
        return (
            f"{self.gva:#018x}-{self.gva + self.size - 1:#018x} -> {self.physical:#014x} "
            f"{size_text(self.size):>9} {size_text(self.page_size):>3} {self.rights}"
        )


class Ranges(Sequence[Range]):
    """What an address space maps, ascending: a sequence of `Range`, and a picture in notebooks."""

    def __init__(self, items: list[Range], following: int | None, title: str = "") -> None:
        self._items = items
        self._next = following
        #: What it is of, for captions.
        self.title = title

    @property
    def truncated(self) -> bool:
        """Whether a limit was met, so that this is not all; see `next`."""
        return self._next is not None

    @property
    def next(self) -> int | None:
        """The `start` with which the rest would be found; None when this is all."""
        return self._next

    @property
    def size(self) -> int:
        """Bytes that are mapped."""
        return sum(item.size for item in self._items)

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Range: ...
    @overload
    def __getitem__(self, index: slice, /) -> Ranges: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> Range | Ranges:
        if isinstance(index, slice):
            return Ranges(self._items[index], self._next, self.title)
        return self._items[index]

    def __iter__(self) -> Iterator[Range]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def at(self, gva: int) -> Range | None:
        """The range that `gva` is in; None when there is none."""
        low, high = 0, len(self._items)
        while low < high:
            middle = (low + high) // 2
            if self._items[middle].gva <= gva:
                low = middle + 1
            else:
                high = middle
        if low and gva - (item := self._items[low - 1]).gva < item.size:
            return item
        return None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ranges):
            return NotImplemented
        return self._items == other._items and self._next == other._next

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        lines = [str(item) for item in self._items]
        if self._next is not None:
            lines.append(f"... and more, from {self._next:#x} on")
        return "\n".join(lines) or "nothing is mapped"

    def __repr__(self) -> str:
        more = ", truncated" if self._next is not None else ""
        return f"<Ranges: {len(self._items)} ranges, {size_text(self.size)}{more}>"

    def picture(self) -> str:
        """The address space as a picture, in SVG: a row per stretch of it, coloured by rights."""
        from polyvisor.mmu_picture import svg

        return svg(self)

    def save(self, path: str) -> None:
        """Writes the picture to a file: SVG, or PNG when its name ends so."""
        from polyvisor.mmu_picture import save

        save(self, path)

    def _repr_svg_(self) -> str:
        return self.picture()


class Matches(list[int]):
    """Where a pattern was found, ascending."""

    def __init__(self, addresses: list[int], following: int | None) -> None:
        super().__init__(addresses)
        #: The `start` with which to go on, when a limit was met; None when these are all.
        self.next = following

    @property
    def truncated(self) -> bool:
        """Whether a limit was met, so that there may be more."""
        return self.next is not None


class VirtualMemory:
    """What can be done with a `_native.AddressSpace` as a whole; a base of `AddressSpace`."""

    if TYPE_CHECKING:

        def walk(self, gva: int, *, probe: bool = False) -> Walk:
            """As `AddressSpace` has it."""

    def ranges(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        join: Join = "physical",
        limit: int = 1 << 20,
        budget: int = 1 << 28,
    ) -> Ranges:
        """Everything that is mapped from `start` up to `end` (exclusive; None: to the very end).

        At most `limit` ranges are kept and `budget` table entries looked at, which takes about a
        second: tables that refer to themselves may map far more than there is memory. `truncated`
        of the result tells when it is not all. Rights do not matter; entries with reserved bits map
        nothing. Raises `ConfigError`.
        """
        if join not in ("physical", "rights"):
            raise ConfigError(f"join is 'physical' or 'rights', not {join!r}", field="join")
        first, last = _bounds(start, end)
        if last < first:
            return Ranges([], None, repr(self))
        items, following = _native.mmu_ranges(
            self._space(),
            Range,
            first,
            last,
            join == "rights",
            _count("limit", limit),
            _count("budget", budget),
        )
        return Ranges(items, following, repr(self))

    def find(
        self, pattern: Buffer | str, start: int = 0, end: int | None = None, *, limit: int = 1000
    ) -> Matches:
        """The addresses at which `pattern` (bytes, or a str in UTF-8) is in mapped memory.

        Matches lie between `start` and `end` (exclusive; None: the last address), may overlap and
        run across pages. Memory that is mapped more than once is found more than once. Stops after
        `limit` matches, and when it has looked at many times the size of the memory (tables that
        refer to themselves); `truncated` of the result tells. Raises `ConfigError`.
        """
        data: Buffer = pattern.encode() if isinstance(pattern, str) else pattern
        first, last = _bounds(start, end)
        if last < first:
            return Matches([], None)
        most = 16 * self._space().guest_memory.total_size + (1 << 30)
        found, following = _native.mmu_find(
            self._space(), data, first, last, _count("limit", limit), most
        )
        return Matches(found, following)

    def read_virtual(self, gva: int, size: int) -> bytes:
        """A copy of `size` bytes at a guest-virtual address, whatever pages they are in, and
        whatever the rights. Raises `MemoryFault` when not all of it is there."""
        if size < 0:
            raise ConfigError(f"cannot read {size} bytes", field="size")
        result = _native.mmu_read(self._space(), _address("gva", gva), size)
        if isinstance(result, bytes):
            return result
        raise self._memory_fault("read", *result)

    def write_virtual(self, gva: int, data: Buffer) -> None:
        """Stores bytes at a guest-virtual address, across pages, also where the guest itself may
        not write. All or nothing: raises `MemoryFault` when not all of it is there, `StateMismatch`
        for an image that is open for reading only."""
        fault = _native.mmu_write(self._space(), _address("gva", gva), data)
        if fault is not None:
            raise self._memory_fault("write", *fault)

    def translate_many(self, addresses: Any, out: Any = None) -> Any:
        """Translates an array of addresses: where each byte is in memory, whatever the rights, or
        `NOT_MAPPED` (all ones).

        `addresses` is an array of 64-bit integers: of NumPy, of any shape and strides, or any
        buffer (array.array("Q")). The result is a new array of the same shape, NumPy's when NumPy
        is there and else an array.array; or `out`, which may be `addresses`. Lets other threads
        run meanwhile. Raises `ConfigError` for arrays of another kind.
        """
        if out is None:
            out = _array_like(addresses)
        _native.mmu_translate_many(self._space(), addresses, out)
        return out

    def _space(self) -> _native.AddressSpace:
        return cast("_native.AddressSpace", self)

    def _memory_fault(self, what: str, reason: str, gva: int, physical: int) -> Exception:
        if reason == "read-only":
            return StateMismatch(
                f"cannot write to guest-virtual address {gva:#x}: the image is open for reading "
                "only; open it with writable=True"
            )
        if reason == "no memory":
            return MemoryFault(
                f"cannot {what} guest-virtual address {gva:#x}: it is mapped to {physical:#x}, "
                "where there is no memory",
                gva=gva,
                physical=physical,
            )
        walk = self.walk(gva, probe=True)
        fault = walk.fault
        level = fault.level if fault else None
        return MemoryFault(
            f"cannot {what} guest-virtual address {gva:#x}: "
            f"{fault.reason if fault else 'it was not mapped a moment ago'}",
            gva=gva,
            level=level.name if level else "",
            entry=level.entry if level else None,
            entry_address=level.address if level else None,
        )


def _array_like(addresses: Any) -> Any:
    view = _view(addresses)
    try:
        import numpy
    except ImportError:
        return array("Q", bytes(view.nbytes))
    return numpy.empty(view.shape, numpy.uint64)


def _view(addresses: Any) -> memoryview:
    try:
        return memoryview(addresses)
    except TypeError:
        raise ConfigError(
            "addresses must be an array of 64-bit integers (NumPy's uint64), not "
            f"{type(addresses).__name__}",
            field="addresses",
        ) from None


def _address(field: str, value: int) -> int:
    if not 0 <= value <= LAST:
        raise ConfigError(
            f"{value:#x} is no guest-virtual address: those have 64 bits", field=field
        )
    return value


def _bounds(start: int, end: int | None) -> tuple[int, int]:
    first = _address("start", start)
    if end is None or end == LAST + 1:
        return first, LAST
    return first, _address("end", end) - 1


def _count(field: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{field} must be at least 1, not {value}", field=field)
    return min(value, LAST)


def size_text(size: int) -> str:
    """A size for people, exact: 4K, 2M, 1G, 12K, 3M, ..."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


__all__ = ["NOT_MAPPED", "Matches", "Range", "Ranges", "VirtualMemory"]
