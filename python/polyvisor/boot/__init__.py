"""Starting kernels: files in, a `Plan` of what goes where, and a machine that is ready to start.

plan = boot.plan(kernel, initrd, b"console=ttyS0", memory=512 << 20, cpus=2)   # pure
boot.load(machine, "vmlinuz", "initrd.img", "console=ttyS0")                   # reads and applies
"""

from __future__ import annotations

import mmap
import os

from polyvisor.boot import acpi, elf, layout, linux
from polyvisor.boot.layout import Chunk, Hardware, Plan, Range, VirtioMmio
from polyvisor.errors import ConfigError, ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

    from polyvisor.machine import Machine

    Choice = Literal["auto", "linux64", "linux32", "pvh", "elf"]

_PIECE = 2 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
}


def plan(
    kernel: bytes | memoryview,
    initrd: bytes | memoryview = b"",
    cmdline: bytes = b"",
    *,
    memory: int | Iterable[Range],
    cpus: int = 1,
    hardware: Hardware | None = None,
    protocol: Choice = "auto",
    path: str = "the kernel",
) -> Plan:
    """How to start a kernel in a PC with so much memory (bytes, or its whole map).

    `path` names the kernel in error messages. Raises `ImageError` for a kernel or initrd that
    cannot be used (`reason`: "not-a-kernel", "corrupt", "unsupported", "memory") and `ConfigError`
    for a command line that is too long.
    """
    ranges = layout.memory_map(memory) if isinstance(memory, int) else list(memory)
    tables = acpi.build(hardware or Hardware(), cpus)
    if elf.is_elf(kernel) and protocol in ("auto", "pvh", "elf"):
        made = elf.plan(kernel, path, initrd, cmdline, ranges, tables.gpa, protocol=protocol)
    elif linux.is_bzimage(kernel) and protocol in ("auto", "linux64", "linux32"):
        made = linux.plan(
            kernel,
            path,
            initrd,
            cmdline,
            ranges,
            tables.gpa,
            force_32bit=protocol == "linux32",
        )
    else:
        raise _not_a_kernel(kernel, path, protocol)
    chunks = (*(chunk for chunk in made.chunks if len(chunk.data)), tables)
    layout.check_apart(chunks)
    return Plan(made.protocol, made.mode, made.entry, made.registers, chunks, made.memory_map)


def load(
    machine: Machine,
    kernel: str | os.PathLike[str],
    initrd: str | os.PathLike[str] | bytes | None = None,
    cmdline: str = "",
    *,
    hardware: Hardware | None = None,
    protocol: Choice = "auto",
) -> Plan:
    """Reads the files, stores everything in the machine's memory and puts CPU 0 at the entry.

    The machine must not have been started. An initrd may be given as bytes. Raises what `plan`
    raises, and `ImageError` (reason "missing" or "unreadable") for a file.
    """
    image = read_file(kernel, "kernel")
    disk = (
        b""
        if initrd is None
        else initrd
        if isinstance(initrd, bytes)
        else read_file(initrd, "initrd")
    )
    made = plan(
        image,
        disk,
        cmdline.encode(),
        memory=[Range(*entry) for entry in machine.e820()],
        cpus=machine.cpus,
        hardware=hardware or board(machine),
        protocol=protocol,
        path=os.fspath(kernel),
    )
    apply(machine, made)
    return made


def board(machine: Machine) -> Hardware:
    """What the firmware tables of this machine describe."""
    from polyvisor import _native

    # The keyboard controller is there, but nothing is plugged in: a guest that was told of it would
    # look for keyboards.
    addresses = _native.pc_layout()
    virtio = tuple(
        VirtioMmio(place.gpa, addresses["virtio_mmio_size"], place.gsi)
        for place in machine.native.virtio_places()
        if place.transport == "mmio"
    )
    return Hardware.from_board(addresses, rtc="rtc" in machine.devices, i8042=False, virtio=virtio)


def apply(machine: Machine, made: Plan) -> None:
    """Stores a plan's chunks and sets the boot CPU's registers."""
    cpu = machine.cpu(0)
    if made.mode == "long":
        cpu.enter_long_mode(page_tables_at=layout.PAGE_TABLES, rip=made.entry)
    else:
        cpu.enter_protected_mode(rip=made.entry, gdt_at=layout.PROTECTED_GDT)
    if made.registers:
        machine.set_boot_registers(made.registers)
    for chunk in made.chunks:
        data = memoryview(chunk.data)
        for at in range(0, len(data), _PIECE):
            machine.memory.write(chunk.gpa + at, data[at : at + _PIECE])
            if isinstance(data.obj, mmap.mmap):
                # The file's pages would otherwise count as ours until the whole of it was copied.
                data.obj.madvise(mmap.MADV_DONTNEED)


def is_64bit(kernel: bytes | memoryview, path: str = "the kernel") -> bool:
    """Whether it is a kernel that runs 64-bit programs. Raises `ImageError` when it is none."""
    if elf.is_elf(kernel):
        return elf.parse(kernel, path).bits == 64
    if linux.is_bzimage(kernel):
        return linux.parse(kernel, path).is_64bit
    raise _not_a_kernel(kernel, path, "auto")


def read_file(path: str | os.PathLike[str], what: str) -> memoryview:
    """A guest file, mapped instead of copied: kernels have tens of megabytes, initrds hundreds."""
    name = os.fspath(path)

    def error(text: str, reason: str) -> ImageError:
        return ImageError(text, path=name, reason=reason)

    try:
        if not os.path.isfile(name):
            if not os.path.exists(name):
                raise error(f"there is no {what} {name}", "missing")
            raise error(f"the {what} {name} is not a regular file", "unreadable")
        with open(name, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise error(f"the {what} {name} is empty", "corrupt")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as problem:
        raise error(f"cannot read the {what} {name}: {problem.strerror}", "unreadable") from None


def _not_a_kernel(
    image: bytes | memoryview, path: str, protocol: Choice
) -> ImageError | ConfigError:
    if elf.is_elf(image) or linux.is_bzimage(image):
        kind = "an ELF kernel" if elf.is_elf(image) else "a bzImage"
        return ConfigError(
            f"{path} is {kind}, which protocol {protocol!r} cannot start", field="protocol"
        )
    head = bytes(image[:8])
    for magic, method in _COMPRESSED.items():
        if head.startswith(magic):
            return ImageError(
                f"{path} is a {method} file, not a kernel; decompress it first",
                path=path,
                reason="not-a-kernel",
            )
    return ImageError(
        f"{path} is not a kernel that can be booted: it is neither a Linux bzImage nor an ELF file",
        path=path,
        reason="not-a-kernel",
    )


__all__ = [
    "Chunk",
    "Hardware",
    "Plan",
    "Range",
    "apply",
    "board",
    "is_64bit",
    "load",
    "plan",
    "read_file",
]
