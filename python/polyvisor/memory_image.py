"""Memory images: the physical memory of a machine that is not (or no longer) there.

image = polyvisor.MemoryImage("memory.raw")
space = image.mmu(cr3=0x2a10000)
print(space.walk(0xffffffff81000000))
"""

from __future__ import annotations

import mmap
import os
import stat
from types import TracebackType
from typing import TYPE_CHECKING, Any

from polyvisor import _native
from polyvisor.errors import ConfigError, HostError, ImageError
from polyvisor.memory import Memory

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Buffer

    from polyvisor.mmu import AddressSpace, Paging

PAGE = 4096


class MemoryImage:
    """A raw image of physical memory: byte n of it is at guest-physical address `base` + n.

    `source` is a file, which is mapped and not read (an image of many gigabytes opens at once and
    only costs what is looked at), or a buffer (bytes, bytearray, mmap, a NumPy array), which is
    used where it is, without a copy. With `writable`, what is written to it goes into the file or
    buffer; otherwise nothing changes it.

    `base` must be a multiple of 4096. When the size is none, the rest of the last page reads as
    zero, and the image cannot be writable. A file must not be truncated while it is open.

    Raises `ImageError` for a file that cannot be opened or is empty, `ConfigError`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Buffer,
        base: int = 0,
        *,
        writable: bool = False,
    ) -> None:
        self.base = base
        self.writable = writable
        #: The file; "" for a buffer.
        self.path = ""
        if base % PAGE or base < 0:
            raise ConfigError(
                f"an image cannot begin at {base:#x}: that is no multiple of 4096", field="base"
            )
        data: Any
        if isinstance(source, (str, os.PathLike)):
            self.path = os.fspath(source)
            data = _map(self.path, writable)
        else:
            data = source
        try:
            view = memoryview(data)
        except TypeError:
            raise ConfigError(
                "a memory image is a path or a buffer of bytes, not of type "
                f"{type(source).__name__}",
                field="source",
            ) from None
        if not view.c_contiguous:
            raise ConfigError("the buffer of an image must be contiguous", field="source")
        if writable and view.readonly:
            raise ConfigError(
                "the image cannot be writable, as its buffer is not; leave out writable",
                field="writable",
            )
        if view.nbytes and view.format != "B":
            try:
                view = view.cast("B")
            except (TypeError, ValueError):
                raise ConfigError(
                    f"the buffer of an image must be of bytes or numbers, not of format "
                    f"'{view.format}'",
                    field="source",
                ) from None
        self.size = view.nbytes
        name = os.path.basename(self.path) or "image"
        self._native = _build(view, base, name, writable)
        self._memory = Memory(self._native, _no_dirty_log)

    @property
    def memory(self) -> Memory:
        """Its bytes by guest-physical address."""
        return self._memory

    @property
    def native(self) -> _native.GuestMemory:
        """The bound C++ object."""
        return self._native

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.base + self.size

    def mmu(self, *, cr3: int, paging: Paging = "4-level", **registers: Any) -> AddressSpace:
        """The address space whose tables begin at `cr3` in this image.

        `registers` are the other arguments of `AddressSpace`: `cr0`, `cr4`, `efer`, `maxphyaddr`,
        `pdpte`, `ept`, ... Raises `ConfigError` when there is no such table in the image.
        """
        from polyvisor.mmu import AddressSpace

        space = AddressSpace(self, cr3=cr3, paging=paging, **registers)
        nested = registers.get("ept") is not None or registers.get("npt") is not None
        table = cr3 & ~0xFFF
        if paging != "none" and not nested and not self.base <= table < self.end:
            raise ConfigError(
                f"cr3 {cr3:#x} is not in the image, which has {self.base:#x} to "
                f"{self.end - 1:#x}; check cr3, the image's base, and whether it is complete",
                field="cr3",
            )
        return space

    def close(self) -> None:
        """Lets go of it. A file stays mapped as long as address spaces or views of it are used."""
        self._native = _native.GuestMemory([])
        self._memory = Memory(self._native, _no_dirty_log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = repr(self.path) if self.path else "of a buffer"
        return f"<MemoryImage {name}: {self.base:#x}+{self.size:#x}>"


def _map(path: str, writable: bool) -> mmap.mmap:
    try:
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as problem:
        raise ImageError(
            f"cannot open the memory image {path}: {problem.strerror}", path=path, reason="open"
        ) from None
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise ImageError(f"the memory image {path} is a folder", path=path, reason="folder")
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size == 0:
            raise ImageError(f"the memory image {path} is empty", path=path, reason="empty")
        return mmap.mmap(
            descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        )
    except (OSError, ValueError, OverflowError) as problem:
        raise HostError(
            f"cannot map the memory image {path}: {problem}",
            errno=getattr(problem, "errno", None) or 0,
            path=path,
        ) from None
    finally:
        os.close(descriptor)


def _build(view: memoryview, base: int, name: str, writable: bool) -> _native.GuestMemory:
    memory = _native.GuestMemory([])
    whole = view.nbytes // PAGE * PAGE
    if view.nbytes == 0:
        raise ConfigError("the image is empty", field="source")
    if whole != view.nbytes and writable:
        raise ConfigError(
            f"an image of {view.nbytes} bytes cannot be writable, as it does not consist of whole "
            "pages of 4096 bytes",
            field="writable",
        )
    if whole:
        _native.memory_add_buffer(memory, base, view[:whole], name, writable)
    if whole != view.nbytes:
        rest = bytes(view[whole:]).ljust(PAGE, b"\0")
        _native.memory_add_buffer(memory, base + whole, rest, name, False)
    return memory


def _no_dirty_log() -> _native.DirtyLog:
    raise ConfigError("a memory image has no dirty log", field="dirty")


__all__ = ["MemoryImage"]
