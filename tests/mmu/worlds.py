"""Random page tables, of every format, made so that walks get deep and go wrong in every way.

What is random comes from an object with the methods of `random.Random`, so that hypothesis can hold
the dice as well as a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import reference as ref

from polyvisor import _native
from polyvisor.mmu import MODES, AddressSpace, Ept, Npt

PAGE = 4096
#: Host memory: pages 0 to 15 are the guest's, 16 to 31 hold the second dimension's tables.
LOW_PAGES = 32
GUEST_PAGES = 16
#: Some memory that only long addresses reach, beyond a hole.
HIGH = 0x3F_0000_0000
HIGH_PAGES = 2
WIDTHS = (32, 36, 37, 39, 40, 46, 48, 51, 52)
FORMATS = ("none", "32-bit", "pae", "4-level", "5-level")
SECONDS = ("ept4", "ept5", "npt 32-bit", "npt pae", "npt 4-level", "npt 5-level")

#: CR4 bits that change walks: PSE, PGE, SMEP, SMAP, PKE, PKS.
CR4_CHOICES = (1 << 4, 1 << 7, 1 << 20, 1 << 21, 1 << 22, 1 << 24)
NXE = 1 << 11
WP = 1 << 16


@dataclass
class World:
    registers: ref.Registers
    second: ref.Ept | ref.Registers | None
    space: AddressSpace
    native: _native.GuestMemory
    contents: dict[int, bytes]

    def memory(self) -> ref.Memory:
        """The model's memory, in the state that the native one has now."""
        return ref.Memory(
            {
                start: bytearray(self.native.read(start, len(c)))
                for start, c in self.contents.items()
            }
        )


def new_memory() -> _native.GuestMemory:
    return _native.GuestMemory([(0, LOW_PAGES * PAGE), (HIGH, HIGH_PAGES * PAGE)])


def one_in(r: Random, n: int) -> bool:
    return r.randrange(n) == 0


def fill(r: Random, entries: list[int], size: int) -> bytes:
    """A table page in which a few entries repeat."""
    pattern = b"".join(entry.to_bytes(size, "little") for entry in entries)
    return pattern * (PAGE // len(pattern))


def frame(r: Random, pages: int, anywhere: int) -> int:
    """Where an entry points: mostly to a page of the tables; with `anywhere` often to any address
    of so many bits, which a second dimension translates."""
    if anywhere and one_in(r, 3):
        return r.getrandbits(anywhere - 12) << 12
    which = r.randrange(24)
    if which == 0:
        return HIGH + r.randrange(HIGH_PAGES) * PAGE
    if which == 1:
        return r.getrandbits(40) << 12
    return r.randrange(pages) * PAGE


def guest_entry(r: Random, mode: str, width: int, pages: int, anywhere: int, calm: bool) -> int:
    """Of any level of the formats of SDM 3A chapter 4."""
    if calm and not one_in(r, 32):
        rights = 3 if one_in(r, 4) else 7
        return calm_entry(r, frame(r, pages, 0) & ref.ones(min(width, 32) - 1, 12), rights, 0xF78)
    if one_in(r, 128):
        return r.getrandbits(32 if mode == "32-bit" else 64)
    entry = frame(r, pages, anywhere) & ref.ones(width - 1, 12)
    entry |= r.getrandbits(12) & ~0x87
    entry |= not one_in(r, 32)
    entry |= 0 if one_in(r, 6) else 2
    entry |= 0 if one_in(r, 6) else 4
    if one_in(r, 8):
        entry |= 0x80
        if not one_in(r, 4):  # as a large page wants it
            entry = entry & ~ref.ones(29, 13) | r.getrandbits(1) << 12
            if mode == "32-bit" and r.getrandbits(1):  # PSE-36
                entry |= 1 << r.randrange(13, 22)
    if mode == "32-bit":
        return entry & 0xFFFFFFFF
    if one_in(r, 12):
        entry |= 1 << 63
    if mode != "pae" or one_in(r, 16):
        entry |= r.getrandbits(11) << 52
    if one_in(r, 32):
        entry ^= 1 << r.randrange(64)
    return entry


#: Host pages that hold the second dimension's tables of each level; 1 maps pages of 4 KiB.
LEVELS = {5: [16], 4: [17, 18], 3: [19, 20, 21], 2: [22, 23, 24, 25], 1: list(range(26, 32))}


def second_target(r: Random, level: int, large: bool, width: int) -> int:
    """What an entry of the second dimension points to: the next level, or a page of the guest's.
    Large pages begin at 0: the offset does the rest."""
    if large:
        return 0
    if level > 1:
        return r.choice(LEVELS[level - 1]) * PAGE
    return frame(r, GUEST_PAGES, 0) & ref.ones(width - 1, 12)


def calm_entry(r: Random, target: int, rights: int, ignored: int) -> int:
    """One of those that all go well, as most do in a running system."""
    return target | rights | r.getrandbits(12) & ignored


def ept_entry(r: Random, level: int, ept: ref.Ept, calm: bool) -> int:
    """Mostly one that is accepted, as a walk in two dimensions needs up to 35 of them."""
    if calm and not one_in(r, 64):
        target = second_target(r, level, False, ept.maxphyaddr)
        return calm_entry(r, target, 0x437 if level == 1 else 0x407, 0xB00)
    if one_in(r, 512):
        return r.getrandbits(64)
    rights = r.getrandbits(3) if one_in(r, 16) else 7
    entry = rights | (r.getrandbits(2) << 8) | (r.getrandbits(12) << 52)
    if not one_in(r, 16):
        entry |= 1 << 10
    supported = {2: ept.pages_2mb, 3: ept.pages_1gb}.get(level, False)
    large = one_in(r, 6 if supported else 48) and level > 1
    if level == 1 or large:
        entry |= (r.randrange(8) if one_in(r, 64) else 6) << 3 | r.getrandbits(1) << 6
        entry |= 0x80 if large else 0
        if large and one_in(r, 3):
            entry &= ~0x78  # all that is wrong with it may be that it is large
    entry |= second_target(r, level, large, ept.maxphyaddr)
    if one_in(r, 128):
        entry ^= 1 << r.randrange(64)
    return entry


def npt_entry(r: Random, level: int, host: ref.Registers, calm: bool) -> int:
    if calm and not one_in(r, 64):
        width = 32 if host.mode == "32-bit" else host.maxphyaddr
        return calm_entry(r, second_target(r, level, False, width), 7, 0xF78)
    if one_in(r, 512):
        return r.getrandbits(32 if host.mode == "32-bit" else 64)
    entry = r.getrandbits(12) & ~0x87 | (not one_in(r, 64))
    entry |= 0 if one_in(r, 48) else 2
    entry |= 0 if one_in(r, 48) else 4
    supported = level == 2 or (level == 3 and host.pages_1gb)
    large = level in (2, 3) and one_in(r, 6 if supported else 128)
    entry |= 0x80 if large else r.getrandbits(1) << 7 if level == 1 else 0
    entry |= second_target(r, level, large, host.maxphyaddr)
    if host.mode == "32-bit":
        return entry & 0xFFFFFFFF
    if one_in(r, 32 if host.nxe else 128):
        entry |= 1 << 63
    if host.mode != "pae":
        entry |= r.getrandbits(11) << 52
    if one_in(r, 128):
        entry ^= 1 << r.randrange(64)
    return entry


def second_tables(
    r: Random, top: int, size: int, variety: int, entry: Callable[[int], int]
) -> dict[int, bytes]:
    return {
        page: fill(r, [entry(level) for _ in range(variety)], size)
        for level, numbers in LEVELS.items()
        for page in numbers
        if level <= top
    }


def pdptes(r: Random, width: int, pages: int) -> tuple[int, int, int, int]:
    """What loading CR3 lets through."""

    def one() -> int:
        address = frame(r, pages, 0) & ref.ones(width - 1, 12)
        return address | (r.getrandbits(12) & 0xE18) | (not one_in(r, 12))

    return (one(), one(), one(), one())


def random_registers(r: Random, mode: str, pages: int) -> ref.Registers:
    cr0, cr4, efer = MODES[mode]
    if mode != "none":
        cr0 = cr0 & ~WP | (WP if r.getrandbits(1) else 0)
        cr4 &= ~(1 << 4 | 1 << 7)
        chosen = r.getrandbits(len(CR4_CHOICES))
        for n, bit in enumerate(CR4_CHOICES):
            cr4 |= bit if chosen >> n & 1 else 0
        efer = efer & ~NXE | (0 if one_in(r, 5) else NXE)
    width = r.choice(WIDTHS)
    return ref.Registers(
        cr0=cr0,
        cr3=r.randrange(pages) * PAGE | r.getrandbits(12)
        if not one_in(r, 24)
        else r.getrandbits(32),
        cr4=cr4,
        efer=efer,
        pkru=r.getrandbits(32) & r.getrandbits(32),
        pkrs=r.getrandbits(32) & r.getrandbits(32),
        maxphyaddr=width,
        pages_1gb=not one_in(r, 4),
        pse36=not one_in(r, 4),
        pdpte=pdptes(r, width, pages),
    )


def random_ept(r: Random, levels: int) -> ref.Ept:
    return ref.Ept(
        LEVELS[levels][0] * PAGE,
        levels=levels,
        access_dirty=bool(r.getrandbits(1)),
        execute_only=not one_in(r, 3),
        pages_2mb=not one_in(r, 4),
        pages_1gb=not one_in(r, 4),
        mode_based_execute=bool(r.getrandbits(1)),
        maxphyaddr=r.choice(WIDTHS),
    )


def random_host(r: Random, mode: str) -> ref.Registers:
    """The registers of nested paging."""
    cr0, cr4, efer = MODES[mode]
    if mode != "32-bit" and one_in(r, 4):
        efer &= ~NXE
    top = {"32-bit": 2, "pae": 3, "5-level": 5}.get(mode, 4)
    pdpte = tuple(r.choice(LEVELS[2]) * PAGE | (not one_in(r, 24)) for _ in range(4))
    return ref.Registers(
        cr0=cr0,
        cr3=LEVELS[top][0] * PAGE,
        cr4=cr4,
        efer=efer,
        maxphyaddr=r.choice(WIDTHS),
        pages_1gb=not one_in(r, 4),
        pdpte=(pdpte[0], pdpte[1], pdpte[2], pdpte[3]),
    )


def build(
    r: Random,
    native: _native.GuestMemory,
    mode: str,
    second: str,
    variety: int,
    registers: ref.Registers | None = None,
) -> World:
    """Fills the memory with tables of a guest's `mode` below the second dimension `second` ("":
    none), `variety` different entries in each page, and makes both models' address spaces of it."""
    pages = GUEST_PAGES if second else LOW_PAGES
    regs = registers or random_registers(r, mode, pages)
    size = 4 if mode == "32-bit" else 8
    calm = one_in(r, 2)
    anywhere = 0 if not second else 32 if second in ("npt 32-bit", "npt pae") else 48
    tables = {
        page: fill(
            r,
            [guest_entry(r, mode, regs.maxphyaddr, pages, anywhere, calm) for _ in range(variety)],
            size,
        )
        for page in range(pages)
    }
    dimension: ref.Ept | ref.Registers | None = None
    ept: Ept | None = None
    npt: Npt | None = None
    if second.startswith("ept"):
        dimension = random_ept(r, int(second[3]))
        ept = Ept(
            dimension.root | (dimension.levels - 1) << 3 | dimension.access_dirty << 6 | 6,
            execute_only=dimension.execute_only,
            pages_2mb=dimension.pages_2mb,
            pages_1gb=dimension.pages_1gb,
            mode_based_execute=dimension.mode_based_execute,
            maxphyaddr=dimension.maxphyaddr,
        )
        known = dimension
        tables |= second_tables(r, known.levels, 8, variety, lambda n: ept_entry(r, n, known, calm))
    elif second:
        host = random_host(r, second.removeprefix("npt "))
        dimension = host
        npt = Npt(
            host.cr3,
            paging=host.mode,  # type: ignore[arg-type]
            nxe=host.nxe,
            pages_1gb=host.pages_1gb,
            maxphyaddr=host.maxphyaddr,
        )
        top = {"32-bit": 2, "pae": 2, "5-level": 5}.get(host.mode, 4)
        size_of = 4 if host.mode == "32-bit" else 8
        tables |= second_tables(r, top, size_of, variety, lambda n: npt_entry(r, n, host, calm))
        if host.mode == "pae":  # the PDPTEs lie at the root
            head = b"".join(entry.to_bytes(8, "little") for entry in host.pdpte)
            tables[host.cr3 // PAGE] = head + bytes(PAGE - len(head))
    low = bytearray(LOW_PAGES * PAGE)
    for page, data in tables.items():
        low[page * PAGE : (page + 1) * PAGE] = data
    contents = {0: bytes(low), HIGH: bytes(low[: HIGH_PAGES * PAGE])}
    for start, data in contents.items():
        native.write(start, data)
    space = AddressSpace(
        native,
        cr0=regs.cr0,
        cr3=regs.cr3,
        cr4=regs.cr4,
        efer=regs.efer,
        pkru=regs.pkru,
        pkrs=regs.pkrs,
        maxphyaddr=regs.maxphyaddr,
        pages_1gb=regs.pages_1gb,
        pse36=regs.pse36,
        pdpte=regs.pdpte,
        ept=ept,
        npt=npt,
    )
    assert space.mode == mode
    return World(regs, dimension, space, native, contents)


def random_address(r: Random, mode: str) -> int:
    """Mostly one that the mode translates."""
    gva = r.getrandbits(64)
    if one_in(r, 32):
        return gva
    if mode in ("4-level", "5-level"):
        top = 48 if mode == "4-level" else 57
        gva &= (1 << top) - 1
        return gva | (ref.ALL_ONES >> top << top if gva >> top - 1 else 0)
    return gva & 0xFFFFFFFF


def random_access(r: Random) -> ref.Access:
    who = r.randrange(8)
    return ref.Access(
        r.choice(("read", "write", "execute")),
        user=who < 4,
        implicit=who == 4,
        ac=bool(r.getrandbits(1)),
    )
