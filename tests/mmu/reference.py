"""Paging as the manuals tell it: slow, plain, and independent of how native/mmu does it.

SDM is Intel's manual (volume 3A chapter 4, volume 3C chapter 29), APM is AMD's (volume 2, chapter 5
and 15.25). A walk returns an `Outcome`; with `set_bits` it also changes the memory as a processor
would. Where the manuals leave the order open, it is that of native/mmu/walker.hpp: accessed and
dirty bits are set, from the root, once nothing in this dimension forbids the access.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

ALL_ONES = (1 << 64) - 1


class Memory:
    """Bytes at physical addresses; what is not there reads as all ones and swallows writes."""

    def __init__(self, regions: dict[int, bytearray]) -> None:
        self.regions = regions

    def load(self, address: int, size: int) -> int:
        for start, data in self.regions.items():
            if start <= address and address + size <= start + len(data):
                return int.from_bytes(data[address - start : address - start + size], "little")
        return (1 << size * 8) - 1

    def store(self, address: int, size: int, value: int) -> None:
        for start, data in self.regions.items():
            if start <= address and address + size <= start + len(data):
                data[address - start : address - start + size] = value.to_bytes(size, "little")


@dataclass
class Registers:
    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    pkru: int = 0
    pkrs: int = 0
    maxphyaddr: int = 46
    pages_1gb: bool = True
    pse36: bool = True
    pdpte: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def pg(self) -> bool:
        return bool(self.cr0 >> 31 & 1)

    @property
    def wp(self) -> bool:
        return bool(self.cr0 >> 16 & 1)

    @property
    def pse(self) -> bool:
        return bool(self.cr4 >> 4 & 1)

    @property
    def pae(self) -> bool:
        return bool(self.cr4 >> 5 & 1)

    @property
    def pge(self) -> bool:
        return bool(self.cr4 >> 7 & 1)

    @property
    def la57(self) -> bool:
        return bool(self.cr4 >> 12 & 1)

    @property
    def smep(self) -> bool:
        return bool(self.cr4 >> 20 & 1)

    @property
    def smap(self) -> bool:
        return bool(self.cr4 >> 21 & 1)

    @property
    def lma(self) -> bool:
        return bool(self.efer >> 10 & 1)

    @property
    def nxe(self) -> bool:
        return bool(self.efer >> 11 & 1)

    @property
    def pke(self) -> bool:
        return bool(self.cr4 >> 22 & 1) and self.lma  # SDM 3A 4.6.2: 4-level and 5-level only

    @property
    def pks(self) -> bool:
        return bool(self.cr4 >> 24 & 1) and self.lma

    @property
    def mode(self) -> str:
        """SDM 3A 4.1.1."""
        if not self.pg:
            return "none"
        if not self.pae:
            return "32-bit"
        if not self.lma:
            return "pae"
        return "5-level" if self.la57 else "4-level"


@dataclass
class Access:
    kind: str = "read"  # "read", "write", "execute"
    user: bool = False
    implicit: bool = False
    ac: bool = False
    #: False: asks for no rights at all.
    rights: bool = True


@dataclass
class Ept:
    root: int
    levels: int = 4
    access_dirty: bool = False
    execute_only: bool = True
    pages_2mb: bool = True
    pages_1gb: bool = True
    mode_based_execute: bool = False
    maxphyaddr: int = 46


@dataclass
class Page:
    """A translation, and the rights that it gives."""

    address: int
    shift: int
    user: bool
    writable: bool
    executable: bool
    is_global: bool = False
    accessed: bool = False
    dirty: bool = False
    pat: int = 0
    key: int = 0


#: (address, entry, log2 of what it covers, of the second dimension)
Step = tuple[int, int, int, bool]


@dataclass
class Outcome:
    fault: str = ""
    error_code: int = 0
    qualification: int = 0
    fault_gpa: int = 0
    during_walk: bool = False
    page: Page | None = None
    gpa: int = 0
    steps: list[Step] = field(default_factory=list)


class PageFault(Exception):
    def __init__(self, error: int, page: Page | None = None) -> None:
        self.error = error
        #: Known when only rights are missing.
        self.page = page


class SecondFault(Exception):
    def __init__(self, kind: str, gpa: int, qualification: int, table: bool) -> None:
        self.outcome = Outcome(kind, 0, qualification, gpa, table)


def ones(high: int, low: int) -> int:
    """A mask of bits high:low; 0 when high < low."""
    return ((1 << max(high + 1 - low, 0)) - 1) << low


# One dimension. `load(address, size)` and `store(address, size, bits to set)` get at the tables.

Load = Callable[[int, int], int]
Store = Callable[[int, int, int], None]


@dataclass
class Entry:
    address: int
    size: int
    value: int
    shift: int

    def bit(self, number: int) -> int:
        return self.value >> number & 1


def error_code(regs: Registers, access: Access, cause: int) -> int:
    """SDM 3A 4.7."""
    error = cause
    if access.kind == "write":
        error |= 2
    if access.user:
        error |= 4
    if access.kind == "execute" and (regs.smep or (regs.pae and regs.nxe)):
        error |= 16
    return error


def walk_32bit(regs: Registers, gva: int, load: Load, steps: list[Step], access: Access) -> Page:
    """SDM 3A 4.3. Raises PageFault; the entries are left in `steps`."""
    pde_at = (regs.cr3 & 0xFFFFF000) + (gva >> 22 & 0x3FF) * 4
    pde = load(pde_at, 4)
    steps.append((pde_at, pde, 22, False))
    if not pde & 1:
        raise PageFault(error_code(regs, access, 0))
    if regs.pse and pde >> 7 & 1:
        # Figure 4-4: bits 20:13 are address bits 39:32, those of them beyond MAXPHYADDR reserved.
        reserved = 1 << 21
        width = min(regs.maxphyaddr, 40) if regs.pse36 else 32
        reserved |= ones(20, 13 + width - 32)
        if pde & reserved:
            raise PageFault(error_code(regs, access, 9))
        base = (pde & 0xFFC00000) | (pde >> 13 & 0xFF) << 32
        return finish(regs, [pde], base | gva & 0x3FFFFF, 22, access)
    pte_at = (pde & 0xFFFFF000) + (gva >> 12 & 0x3FF) * 4
    pte = load(pte_at, 4)
    steps.append((pte_at, pte, 12, False))
    if not pte & 1:
        raise PageFault(error_code(regs, access, 0))
    return finish(regs, [pde, pte], pte & 0xFFFFF000 | gva & 0xFFF, 12, access)


def walk_pae(regs: Registers, gva: int, load: Load, steps: list[Step], access: Access) -> Page:
    """SDM 3A 4.4.2."""
    pdpte = regs.pdpte[gva >> 30 & 3]
    steps.append((ALL_ONES, pdpte, 30, False))
    if not pdpte & 1:
        raise PageFault(error_code(regs, access, 0))
    high = ones(62, regs.maxphyaddr)
    if not regs.nxe:
        high |= 1 << 63
    address = ones(regs.maxphyaddr - 1, 12)

    pde_at = (pdpte & address) + (gva >> 21 & 0x1FF) * 8
    pde = load(pde_at, 8)
    steps.append((pde_at, pde, 21, False))
    if not pde & 1:
        raise PageFault(error_code(regs, access, 0))
    if pde >> 7 & 1:
        if pde & (high | ones(20, 13)):
            raise PageFault(error_code(regs, access, 9))
        return finish(regs, [pde], pde & address & ~ones(20, 0) | gva & ones(20, 0), 21, access)
    if pde & high:
        raise PageFault(error_code(regs, access, 9))

    pte_at = (pde & address) + (gva >> 12 & 0x1FF) * 8
    pte = load(pte_at, 8)
    steps.append((pte_at, pte, 12, False))
    if not pte & 1:
        raise PageFault(error_code(regs, access, 0))
    if pte & high:
        raise PageFault(error_code(regs, access, 9))
    return finish(regs, [pde, pte], pte & address | gva & 0xFFF, 12, access)


def walk_long(regs: Registers, gva: int, load: Load, steps: list[Step], access: Access) -> Page:
    """SDM 3A 4.5: 4-level and 5-level paging."""
    address = ones(regs.maxphyaddr - 1, 12)
    high = ones(51, regs.maxphyaddr)
    if not regs.nxe:
        high |= 1 << 63
    table = regs.cr3 & address
    used = []
    for shift in (48, 39, 30, 21, 12) if regs.mode == "5-level" else (39, 30, 21, 12):
        at = table + (gva >> shift & 0x1FF) * 8
        entry = load(at, 8)
        steps.append((at, entry, shift, False))
        used.append(entry)
        if not entry & 1:
            raise PageFault(error_code(regs, access, 0))
        reserved = high
        is_page = shift == 12
        if shift in (48, 39):
            reserved |= 1 << 7
        elif shift == 30 and entry >> 7 & 1:
            reserved |= ones(29, 13) if regs.pages_1gb else 1 << 7
            is_page = True
        elif shift == 21 and entry >> 7 & 1:
            reserved |= ones(20, 13)
            is_page = True
        if entry & reserved:
            raise PageFault(error_code(regs, access, 9))
        if is_page:
            low = ones(shift - 1, 0)
            return finish(regs, used, entry & address & ~low | gva & low, shift, access)
        table = entry & address
    raise AssertionError("a PTE is always the last")


def finish(regs: Registers, entries: list[int], address: int, shift: int, access: Access) -> Page:
    """The rights of all entries together, and whether they are enough (SDM 3A 4.6)."""
    leaf = entries[-1]
    pat = leaf >> (7 if shift == 12 else 12) & 1
    page = Page(
        address=address,
        shift=shift,
        user=all(entry >> 2 & 1 for entry in entries),
        writable=all(entry >> 1 & 1 for entry in entries),
        executable=not (regs.nxe and any(entry >> 63 & 1 for entry in entries)),
        is_global=regs.pge and bool(leaf >> 8 & 1),
        accessed=bool(leaf >> 5 & 1),
        dirty=bool(leaf >> 6 & 1),
        pat=leaf >> 3 & 3 | pat << 2,
        key=leaf >> 59 & 15 if regs.lma else 0,
    )
    cause = 0
    if access.rights:
        if not allowed(regs, page, access):
            cause |= 1
        if key_forbids(regs, page, access):
            cause |= 1 | 32
    if cause:
        raise PageFault(error_code(regs, access, cause), page)
    return page


def allowed(regs: Registers, page: Page, access: Access) -> bool:
    """SDM 3A 4.6.1, sentence by sentence."""
    if access.user:
        if not page.user:
            return False
        if access.kind == "write":
            return page.writable
        if access.kind == "execute":
            return page.executable
        return True
    if access.kind == "execute":
        return page.executable and not (page.user and regs.smep)
    if page.user and regs.smap and (access.implicit or not access.ac):
        return False
    if access.kind == "write":
        return page.writable or not regs.wp
    return True


def key_forbids(regs: Registers, page: Page, access: Access) -> bool:
    """SDM 3A 4.6.2: keys of user-mode addresses by PKRU, of supervisor-mode ones by IA32_PKRS."""
    if access.kind == "execute":
        return False
    if page.user and regs.pke:
        access_disable = regs.pkru >> page.key * 2 & 1
        write_disable = regs.pkru >> page.key * 2 + 1 & 1
        applies = access.user or regs.wp
    elif not page.user and regs.pks:
        access_disable = regs.pkrs >> page.key * 2 & 1
        write_disable = regs.pkrs >> page.key * 2 + 1 & 1
        applies = regs.wp
    else:
        return False
    return bool(access_disable or (write_disable and applies and access.kind == "write"))


def walk_one(
    regs: Registers, gva: int, access: Access, load: Load, steps: list[Step], store: Store | None
) -> Page:
    """One dimension, in whatever mode the registers select. `load` may add to `steps` too."""
    mode = regs.mode
    if mode == "none":
        return Page(gva & 0xFFFFFFFF, 12, True, True, True, dirty=True)
    walker = {"32-bit": walk_32bit, "pae": walk_pae}.get(mode, walk_long)
    page = walker(regs, gva, load, steps, access)
    if store is not None:
        size = 4 if mode == "32-bit" else 8
        mine = [step for step in steps if not step[3] and step[0] != ALL_ONES]
        for step in mine:
            bits = 1 << 5
            if step is mine[-1] and access.kind == "write":
                bits |= 1 << 6
            if step[1] & bits != bits:
                store(step[0], size, bits)
        page.accessed = True
        page.dirty = page.dirty or access.kind == "write"
    return page


# The second dimension.


@dataclass
class SecondPage:
    address: int
    shift: int
    writable: bool
    executable: bool


@dataclass
class Touched:
    """Where, in the host's memory, a walk found entries. When the tables of the two dimensions
    overlap, what a walk that sets bits finds depends on an order that the manuals leave open."""

    guest: set[int] = field(default_factory=set)
    second: set[int] = field(default_factory=set)

    @property
    def overlap(self) -> bool:
        return not self.guest.isdisjoint(self.second)


@dataclass
class SecondAccess:
    """`kinds`: what the access counts as; none at all when no rights are asked for."""

    kinds: frozenset[str]
    #: The guest's page is a user-mode one.
    user_page: bool = False
    #: To an entry of the guest's paging structures.
    table: bool = False


def walk_ept(
    memory: Memory,
    ept: Ept,
    gpa: int,
    access: SecondAccess,
    steps: list[Step],
    set_bits: bool,
    touched: Touched,
) -> SecondPage:
    """SDM 3C 29.3.2 and 29.3.3."""
    kinds = set(access.kinds)
    if access.table and kinds and ept.access_dirty:
        kinds |= {"read", "write"}  # 29.3.3.2: treated as writes
    entries: list[int] = []

    def violation() -> SecondFault:
        """Table 28-7."""
        together = ALL_ONES
        for entry in entries:
            together &= entry
        if not entries:
            together = 0
        qualification = ("read" in kinds) | ("write" in kinds) << 1 | ("execute" in kinds) << 2
        qualification |= (together & 7) << 3
        if ept.mode_based_execute:
            qualification |= (together >> 10 & 1) << 6
        qualification |= 1 << 7
        if not access.table:
            qualification |= 1 << 8
        return SecondFault("ept-violation", gpa, qualification, access.table)

    misconfiguration = SecondFault("ept-misconfiguration", gpa, 0, access.table)
    if gpa >> (57 if ept.levels == 5 else 48):
        raise violation()
    used: list[Step] = []
    table = ept.root
    for shift in (48, 39, 30, 21, 12) if ept.levels == 5 else (39, 30, 21, 12):
        at = table + (gpa >> shift & 0x1FF) * 8
        entry = memory.load(at, 8)
        touched.second.add(at)
        entries.append(entry)
        used.append((at, entry, shift, True))
        steps.append(used[-1])
        present = entry & 7 or (ept.mode_based_execute and entry >> 10 & 1)
        if not present:
            raise violation()
        # 29.3.3.1
        if entry & 3 == 2:
            raise misconfiguration
        if not entry & 1 and not ept.execute_only:
            raise misconfiguration
        if entry & ones(51, ept.maxphyaddr):
            raise misconfiguration
        is_page = shift == 12 or (
            bool(entry >> 7 & 1)
            and ((shift == 30 and ept.pages_1gb) or (shift == 21 and ept.pages_2mb))
        )
        if is_page:
            if entry & ones(shift - 1, 12):
                raise misconfiguration
            if entry >> 3 & 7 in (2, 3, 7):
                raise misconfiguration
            break
        if entry & ones(7, 3):
            raise misconfiguration
        table = entry & ones(ept.maxphyaddr - 1, 12)

    readable, writable, executable = (all(e >> n & 1 for e in entries) for n in (0, 1, 2))
    if ept.mode_based_execute and access.user_page:
        executable = all(e >> 10 & 1 for e in entries)
    if (
        ("read" in kinds and not readable)
        or ("write" in kinds and not writable)
        or ("execute" in kinds and not executable)
    ):
        raise violation()
    if set_bits and ept.access_dirty:  # 29.3.5
        for step in used:
            bits = 1 << 8
            if step is used[-1] and "write" in kinds:
                bits |= 1 << 9
            or_into(memory, step[0], 8, bits)
    low = ones(shift - 1, 0)
    address = entry & ones(ept.maxphyaddr - 1, 12) & ~low | gpa & low
    return SecondPage(address, shift, writable, executable)


def walk_npt(
    memory: Memory,
    host: Registers,
    gpa: int,
    access: SecondAccess,
    steps: list[Step],
    set_bits: bool,
    touched: Touched,
) -> SecondPage:
    """APM 2 15.25: every nested access is a user's, and one to a guest's table is a write."""
    kinds = set(access.kinds)
    if access.table and kinds:
        kinds |= {"write"}
    kind = "execute" if "execute" in kinds else "write" if "write" in kinds else "read"
    asked = Access(kind, user=bool(kinds), rights=bool(kinds))
    where = 1 << (33 if access.table else 32)
    host = replace(host, cr4=host.cr4 & ~(1 << 22 | 1 << 24))  # keys are the guest's own affair
    if gpa >> {"4-level": 48, "5-level": 57}.get(host.mode, 32):
        raise SecondFault(
            "nested-page-fault", gpa, where | error_code(host, asked, 0), access.table
        )
    mine: list[Step] = []
    try:
        page = walk_one(
            host,
            gpa,
            asked,
            memory.load,
            mine,
            (lambda at, size, bits: or_into(memory, at, size, bits)) if set_bits else None,
        )
    except PageFault as fault:
        raise SecondFault("nested-page-fault", gpa, where | fault.error, access.table) from fault
    finally:
        touched.second |= {at for at, _, _, _ in mine}
        steps += [(at, entry, shift, True) for at, entry, shift, _ in mine]
    return SecondPage(
        page.address, page.shift, page.user and page.writable, page.user and page.executable
    )


def or_into(memory: Memory, at: int, size: int, bits: int) -> None:
    value = memory.load(at, size)
    if value & bits != bits:
        memory.store(at, size, value | bits)


# Both together.


def canonical(mode: str, gva: int) -> bool:
    if mode in ("4-level", "5-level"):
        top = gva >> (47 if mode == "4-level" else 56)
        return top in (0, ALL_ONES >> (47 if mode == "4-level" else 56))
    return gva < 1 << 32


def walk(
    memory: Memory,
    regs: Registers,
    gva: int,
    access: Access,
    second: Ept | Registers | None = None,
    *,
    set_bits: bool = False,
    touched: Touched | None = None,
) -> Outcome:
    """The whole of it. `touched` receives where the entries of both dimensions were."""
    if not canonical(regs.mode, gva):
        return Outcome("not-canonical")
    touched = Touched() if touched is None else touched
    steps: list[Step] = []

    def translate(gpa: int, asked: SecondAccess) -> SecondPage:
        if isinstance(second, Ept):
            return walk_ept(memory, second, gpa, asked, steps, set_bits, touched)
        assert second is not None
        return walk_npt(memory, second, gpa, asked, steps, set_bits, touched)

    def load(at: int, size: int) -> int:
        if second is not None:
            kinds = frozenset({"read"} if access.rights else ())
            at = translate(at, SecondAccess(kinds, table=True)).address
        touched.guest.add(at & ~7)
        return memory.load(at, size)

    def store(at: int, size: int, bits: int) -> None:
        if second is not None:
            kinds = frozenset({"read", "write"})
            # Not a load of the walk: what it reads is not part of the steps.
            before = len(steps)
            at = translate(at, SecondAccess(kinds, table=True)).address
            del steps[before:]
        or_into(memory, at, size, bits)

    try:
        page = walk_one(regs, gva, access, load, steps, store if set_bits else None)
    except PageFault as fault:
        result = Outcome("page-fault", error_code=fault.error, steps=steps)
        page_or_none = fault.page
        if page_or_none is not None and second is None:
            result.page = page_or_none
            result.gpa = page_or_none.address
        elif second is not None:
            result = known(result, memory, regs, gva, access, second)
        return result
    except SecondFault as fault:
        result = replace(fault.outcome, steps=steps)
        return known(result, memory, regs, gva, access, second)
    if second is None:
        return Outcome(page=page, gpa=page.address, steps=steps)
    try:
        kinds = frozenset({access.kind} if access.rights else ())
        found = translate(page.address, SecondAccess(kinds, user_page=page.user))
    except SecondFault as fault:
        result = replace(fault.outcome, steps=steps)
        return known(result, memory, regs, gva, access, second)
    both = replace(
        page,
        address=found.address,
        shift=min(page.shift, found.shift),
        writable=page.writable and found.writable,
        executable=page.executable and found.executable,
    )
    return Outcome(page=both, gpa=page.address, steps=steps)


def known(
    result: Outcome,
    memory: Memory,
    regs: Registers,
    gva: int,
    access: Access,
    second: Ept | Registers | None,
) -> Outcome:
    """After a fault of a nested walk: where the page is all the same, if it is anywhere."""
    if access.rights:
        anyway = walk(memory, regs, gva, replace(access, rights=False), second)
        result.page, result.gpa = anyway.page, anyway.gpa
    return result
