"""Where loaders put things and what they say no to, for kernels made to measure."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels import bzimage, elf

from polyvisor import boot
from polyvisor.boot import layout
from polyvisor.boot.layout import GIB, KIB, MIB, Chunk, Plan
from polyvisor.errors import ConfigError, ImageError


def chunk(plan: Plan, what: str) -> Chunk:
    [found] = [chunk for chunk in plan.chunks if chunk.what == what]
    return found


def u(data: bytes | memoryview, offset: int, size: int = 4) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


# --- bzImage --------------------------------------------------------------------------------------


def test_bzimage_64bit() -> None:
    plan = boot.plan(bytes(bzimage()), b"initrd", b"quiet", memory=256 * MIB, cpus=2)
    assert (plan.protocol, plan.mode, plan.entry) == ("linux64", "long", 0x1000200)
    assert plan.registers == {"rsi": layout.ZERO_PAGE}
    assert chunk(plan, "kernel").gpa == 0x1000000
    assert chunk(plan, "kernel").data[:4] == b"\x90" * 4
    assert bytes(chunk(plan, "command line").data) == b"quiet\0"
    zero_page = chunk(plan, "zero page").data
    assert len(zero_page) == 4096
    assert zero_page[0x202:0x206] == b"HdrS"
    assert zero_page[0x210] == 0xFF
    assert u(zero_page, 0x228) == chunk(plan, "command line").gpa
    assert u(zero_page, 0x218) == chunk(plan, "initrd").gpa
    assert u(zero_page, 0x21C) == 6
    assert u(zero_page, 0x70, 8) == layout.TABLES
    assert bytes(chunk(plan, "ACPI tables").data[:8]) == b"RSD PTR "


def test_bzimage_e820() -> None:
    plan = boot.plan(bytes(bzimage()), memory=5 * GIB)
    zero_page = chunk(plan, "zero page").data
    entries = [
        struct.unpack_from("<QQI", zero_page, 0x2D0 + 20 * i) for i in range(zero_page[0x1E8])
    ]
    assert entries == [
        (0, 640 * KIB, 1),
        (640 * KIB, 384 * KIB, 2),
        (MIB, 3 * GIB - MIB, 1),
        (4 * GIB, 2 * GIB, 1),
    ]


def test_bzimage_without_64bit_entry() -> None:
    plan = boot.plan(bytes(bzimage(xloadflags=0)), memory=256 * MIB)
    assert (plan.protocol, plan.mode, plan.entry) == ("linux32", "protected", 0x1000000)
    old = boot.plan(bytes(bzimage(version=0x20B, xloadflags=1)), memory=256 * MIB)
    assert old.protocol == "linux32"  # the field means nothing before 2.12
    forced = boot.plan(bytes(bzimage()), memory=256 * MIB, protocol="linux32")
    assert forced.protocol == "linux32"


def test_bzimage_moves_when_memory_is_small() -> None:
    image = bytes(bzimage(pref_address=64 * MIB, init_size=4 * MIB))
    plan = boot.plan(image, memory=16 * MIB)
    assert chunk(plan, "kernel").gpa == 2 * MIB
    with pytest.raises(ImageError, match="68 MiB") as caught:
        boot.plan(
            bytes(bzimage(pref_address=64 * MIB, init_size=4 * MIB, relocatable=0)),
            memory=32 * MIB,
        )
    assert caught.value.reason == "memory"


@given(
    memory=st.integers(20, 6 * 1024).map(lambda m: m * MIB),
    size=st.integers(0, 2 * MIB),
    limit=st.sampled_from([0x37FFFFFF, 0x7FFFFFFF, 0xFFFFFFFF]),
    init_size=st.integers(64 * KIB, 3 * MIB),
)
def test_initrd_is_high_and_clear(memory: int, size: int, limit: int, init_size: int) -> None:
    image = bytes(bzimage(initrd_addr_max=limit, init_size=init_size))
    initrd = memoryview(bytes(size))
    plan = boot.plan(image, initrd, memory=memory)
    if not size:
        assert u(chunk(plan, "zero page").data, 0x218) == 0
        return
    place = chunk(plan, "initrd")
    assert place.gpa % 4096 == 0
    assert place.end <= min(limit + 1, memory, 3 * GIB)
    kernel = chunk(plan, "kernel").gpa
    assert place.gpa >= kernel + init_size or place.end <= kernel
    # As high as it goes: not a page higher would do. (Above the kernel there may be no room.)
    room = min(limit + 1, memory, 3 * GIB)
    below_kernel = place.end <= kernel and size > room - (kernel + init_size)
    assert place.end + 4096 > (kernel if below_kernel else room)


def test_initrd_larger_than_memory() -> None:
    with pytest.raises(ImageError, match=r"initrd of 64 MiB does not fit.*64 MiB") as caught:
        boot.plan(bytes(bzimage()), memoryview(bytes(64 * MIB)), memory=64 * MIB)
    assert caught.value.reason == "memory"


def test_command_lines() -> None:
    boot.plan(bytes(bzimage(cmdline_size=10)), b"", b"x" * 10, memory=64 * MIB)
    with pytest.raises(ConfigError, match=r"11 bytes.*at most 10") as caught:
        boot.plan(bytes(bzimage(cmdline_size=10)), b"", b"x" * 11, memory=64 * MIB)
    assert caught.value.field == "cmdline"
    with pytest.raises(ConfigError):
        boot.plan(bytes(bzimage()), b"", b"a\0b", memory=64 * MIB)
    with pytest.raises(ConfigError, match="2048"):
        boot.plan(bytes(elf()), b"", b"x" * 2048, memory=64 * MIB)


# --- ELF ------------------------------------------------------------------------------------------


def test_elf_by_pvh() -> None:
    plan = boot.plan(
        bytes(elf(pvh=0x1000040)), b"initrd", b"quiet", memory=64 * MIB, path="vmlinux"
    )
    assert (plan.protocol, plan.mode, plan.entry) == ("pvh", "protected", 0x1000040)
    assert plan.registers == {"rbx": layout.START_INFO}
    info = chunk(plan, "PVH start info").data
    magic, version, flags, modules = struct.unpack_from("<4I", info)
    modules_at, cmdline_at, rsdp_at, map_at = struct.unpack_from("<4Q", info, 16)
    assert (magic, version, flags, modules) == (0x336EC578, 1, 0, 1)
    assert (cmdline_at, rsdp_at) == (chunk(plan, "command line").gpa, layout.TABLES)
    module = chunk(plan, "PVH module")
    assert module.gpa == modules_at
    assert struct.unpack_from("<QQ", module.data) == (chunk(plan, "initrd").gpa, 6)
    memory = chunk(plan, "PVH memory map")
    assert memory.gpa == map_at
    assert struct.unpack_from("<I", info, 48) == (3,)
    assert struct.unpack_from("<QQI", memory.data, 48) == (MIB, 63 * MIB, 1)


def test_elf_without_initrd_has_no_module() -> None:
    plan = boot.plan(bytes(elf(pvh=0x1000040)), memory=64 * MIB)
    assert u(chunk(plan, "PVH start info").data, 12) == 0
    assert not [c for c in plan.chunks if c.what == "PVH module"]


def test_elf_by_its_own_entry() -> None:
    plan = boot.plan(bytes(elf()), memory=64 * MIB)
    assert (plan.protocol, plan.mode, plan.entry) == ("elf64", "long", 0x1000000)
    assert plan.registers == {"rsi": layout.ZERO_PAGE}
    insisted = boot.plan(bytes(elf(pvh=0x1000040)), memory=64 * MIB, protocol="elf")
    assert insisted.protocol == "elf64"
    narrow = boot.plan(bytes(elf(bits=32)), memory=64 * MIB)
    assert (narrow.protocol, narrow.mode) == ("elf32", "protected")


def test_elf_with_a_virtual_entry() -> None:
    assert boot.plan(bytes(elf(entry=0xFFFFFFFF81000010)), memory=64 * MIB).entry == 0x1000010


def test_elf_counts_what_is_not_in_the_file() -> None:
    with pytest.raises(ImageError, match="80 MiB") as caught:
        boot.plan(bytes(elf(bss=64 * MIB - 0x100)), memory=64 * MIB)
    assert caught.value.reason == "memory"


# --- bad input ------------------------------------------------------------------------------------


def broken(make: Callable[[], bytearray], offset: int, data: bytes) -> bytes:
    image = make()
    image[offset : offset + len(data)] = data
    return bytes(image)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "not-a-kernel"),
        (b"#!/bin/sh\n" * 100, "not-a-kernel"),
        (bytes(8192), "not-a-kernel"),
        (b"\x1f\x8b" + bytes(8192), "not-a-kernel"),
        (bytes(bzimage()[:0x210]), "not-a-kernel"),
        (bytes(bzimage()[:0x1000]), "corrupt"),
        (broken(bzimage, 0x1FE, b"\0\0"), "corrupt"),
        (broken(bzimage, 0x201, b"\xff"), "corrupt"),
        (broken(bzimage, 0x230, b"\3\0\0\0"), "corrupt"),
        (broken(bzimage, 0x1F4, b"\0\0\0\0"), "corrupt"),
        (bytes(bzimage(version=0x200)), "unsupported"),
        (bytes(bzimage(loadflags=0)), "unsupported"),
        (bytes(elf()[:4]), "corrupt"),
        (bytes(elf()[:40]), "corrupt"),
        (bytes(elf()[:100]), "corrupt"),
        (bytes(elf()[:0x1010]), "corrupt"),
        (bytes(elf(machine=183)), "unsupported"),
        (bytes(elf(kind=1)), "not-a-kernel"),
        (bytes(elf(interpreter=True)), "not-a-kernel"),
        (bytes(elf(address=0x7000, entry=0x7000)), "unsupported"),
        (bytes(elf(address=GIB, entry=GIB)), "memory"),
    ],
)
def test_files_that_are_no_kernels(image: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=r"^my-kernel ") as caught:
        boot.plan(image, memory=64 * MIB, path="my-kernel")
    assert caught.value.reason == reason
    assert caught.value.path == "my-kernel"


@given(st.binary(max_size=2000), st.sampled_from([b"", b"\x7fELF", b"\x7fELF\x02\x01\x01"]))
def test_noise_is_refused(noise: bytes, start: bytes) -> None:
    with pytest.raises((ImageError, ConfigError)):
        boot.plan(start + noise, memory=64 * MIB)


@given(st.data())
def test_a_damaged_header_is_an_error_or_a_plan(data: st.DataObject) -> None:
    """Whatever a header says, nothing else than our own exceptions comes out, and nothing is put
    where there is no memory."""
    make = data.draw(st.sampled_from([bzimage, lambda: elf(pvh=0x1000040)]))
    image = make()
    for _ in range(data.draw(st.integers(1, 8))):
        image[data.draw(st.integers(0, 0x290))] = data.draw(st.integers(0, 255))
    try:
        plan = boot.plan(bytes(image), b"initrd", b"quiet", memory=64 * MIB)
    except (ImageError, ConfigError):
        return
    for piece in plan.chunks:
        assert piece.end <= 64 * MIB


@pytest.mark.parametrize("protocol", ["pvh", "elf"])
def test_a_protocol_that_does_not_fit(protocol: boot.Choice) -> None:
    with pytest.raises(ConfigError) as caught:
        boot.plan(bytes(bzimage()), memory=64 * MIB, protocol=protocol)
    assert caught.value.field == "protocol"
    with pytest.raises(ImageError, match="PVH"):
        boot.plan(bytes(elf()), memory=64 * MIB, protocol="pvh")


@pytest.mark.parametrize("memory", [0, 1, MIB - 1])
def test_absurd_memory(memory: int) -> None:
    with pytest.raises(ConfigError):
        boot.plan(bytes(bzimage()), memory=memory)
    with pytest.raises(ImageError) as caught:
        boot.plan(bytes(bzimage()), memory=2 * MIB)
    assert caught.value.reason == "memory"
