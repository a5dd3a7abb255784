"""`polyvisor.mmu` as people meet it: tables of levels, faults that say why, refused arguments."""

from __future__ import annotations

from typing import Any

import pytest

from polyvisor import Error, _native
from polyvisor.errors import ConfigError
from polyvisor.mmu import AddressSpace, Ept, Npt, Walk

PAGE = 4096
PRESENT, WRITABLE, USER, LARGE, XD = 1, 2, 4, 0x80, 1 << 63
GVA = 0xFFFF_FFFF_8100_0123
ROOT = 0x1000


class Tables:
    """Memory of 64 pages, with entries put into it one by one."""

    def __init__(self) -> None:
        self.memory = _native.GuestMemory([(0, 64 * PAGE)])

    def put(self, address: int, entry: int, size: int = 8) -> None:
        self.memory.write(address, entry.to_bytes(size, "little"))

    def chain(self, root: int, gva: int, shifts: tuple[int, ...], flags: int) -> None:
        """A path from `root` through the pages behind it to the page 0x20000."""
        for n, shift in enumerate(shifts):
            last = n == len(shifts) - 1
            target = 0x20000 if last else root + PAGE
            self.put(root + (gva >> shift & 0x1FF) * 8, target | flags)
            root += PAGE


@pytest.fixture
def tables() -> Tables:
    result = Tables()
    result.chain(ROOT, GVA, (39, 30, 21, 12), 0x63)
    return result


def space(tables: Tables, **more: Any) -> AddressSpace:
    return AddressSpace(tables.memory, cr3=ROOT, **{"paging": "4-level"} | more)


def test_a_walk_is_an_aligned_table(tables: Tables) -> None:
    walk = space(tables).walk(GVA)
    assert str(walk) == (
        "0xffffffff81000123: read, supervisor, 4-level paging\n"
        "level  index  address               entry   covers  flags\n"
        "PML4E    511   0x1ff8  0x0000000000002063  512 GiB  P W A\n"
        "PDPTE    510   0x2ff0  0x0000000000003063    1 GiB  P W A\n"
        "PDE        8   0x3040  0x0000000000004063    2 MiB  P W A\n"
        "PTE        0   0x4000  0x0000000000020063    4 KiB  P W A D\n"
        "-> 0x20123, page of 4 KiB: supervisor, writable, executable, accessed, dirty"
    )
    assert walk.ok
    assert walk.mapped
    assert (walk.physical, walk.gpa, walk.page_size) == (0x20123, 0x20123, PAGE)
    assert [level.leaf for level in walk.levels] == [False, False, False, True]


def test_a_notebook_gets_a_table(tables: Tables) -> None:
    shown = space(tables).walk(GVA, "execute", user=True)._repr_html_()
    assert shown.count("<tr>") == 5
    assert '<td style="text-align:left">PML4E</td>' in shown
    assert "&gt; 0x20123" in shown
    assert "#PF(0x15)" in shown


def test_translate_needs_no_rights(tables: Tables) -> None:
    one = space(tables)
    assert one.translate(GVA) == 0x20123
    assert one.translate(GVA + PAGE) is None
    assert one.translate(1 << 47) is None  # not canonical
    assert one.translate(0) is None


class Index:
    def __index__(self) -> int:
        return GVA


def test_translate_takes_what_is_an_integer(tables: Tables) -> None:
    numpy = pytest.importorskip("numpy")
    one = space(tables)
    assert one.translate(Index()) == 0x20123  # type: ignore[arg-type]
    assert one.translate(numpy.uint64(GVA)) == 0x20123
    for wrong in ("0", None, 1.5):
        with pytest.raises(TypeError):
            one.translate(wrong)  # type: ignore[arg-type]
    for beyond in (-1, 1 << 64, 1 << 200):
        with pytest.raises(ConfigError, match="is no guest-virtual address") as caught:
            one.translate(beyond)
        assert caught.value.field == "gva"
        with pytest.raises(ConfigError, match="is no guest-virtual address"):
            one.walk(beyond)


def test_a_subclass_that_forgets_init_is_told(tables: Tables) -> None:
    class Forgetful(AddressSpace):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError):
        Forgetful().translate(0)


def fault_of(walk: Walk) -> tuple[str, int | None, str]:
    assert walk.fault
    assert walk.fault.level
    return walk.fault.level.name, walk.fault.error_code, walk.fault.reason


def test_the_fault_names_the_entry_that_is_the_reason(tables: Tables) -> None:
    one = space(tables, cr4=0x300020)  # PAE, SMEP, SMAP
    name, error, reason = fault_of(one.walk(GVA, user=True))
    assert (name, error) == ("PML4E", 5)
    assert reason == "PML4E 0x2063 (at 0x1ff8) is the supervisor's"

    tables.put(0x3040, 0x4061)
    assert fault_of(one.walk(GVA, "write"))[:2] == ("PDE", 3)
    assert "read-only" in fault_of(one.walk(GVA, "write"))[2]

    tables.put(0x2FF0, 0x3063 | XD)
    assert fault_of(one.walk(GVA, "execute"))[:2] == ("PDPTE", 0x11)
    assert "forbids execution" in fault_of(one.walk(GVA, "execute"))[2]

    tables.put(0x4000, 0x20062)
    assert fault_of(one.walk(GVA))[:2] == ("PTE", 0)
    assert "is not present" in fault_of(one.walk(GVA))[2]

    tables.put(0x3040, 0x4063 | 1 << 50)
    name, error, reason = fault_of(one.walk(GVA))
    assert (name, error) == ("PDE", 9)
    assert "reserved bit" in reason

    tables.chain(ROOT, GVA, (39, 30, 21, 12), 0x67)
    assert "SMAP" in fault_of(one.walk(GVA))[2]
    assert one.walk(GVA, ac=True).ok
    assert not one.walk(GVA, ac=True, implicit=True).ok
    assert "SMEP" in fault_of(one.walk(GVA, "execute"))[2]
    assert one.walk(GVA, "execute", user=True).ok


def test_protection_keys_are_named(tables: Tables) -> None:
    tables.chain(ROOT, GVA, (39, 30, 21, 12), 0x67 | 3 << 59)
    one = space(tables, cr4=0x400020, pkru=1 << 6)
    name, error, reason = fault_of(one.walk(GVA, user=True))
    assert (name, error) == ("PTE", 0x25)
    assert "protection key 3, to which PKRU forbids" in reason
    assert one.walk(GVA, "execute", user=True).ok
    tables.chain(ROOT, GVA, (39, 30, 21, 12), 0x63 | 3 << 59)
    one = space(tables, cr4=0x1000020, pkrs=1 << 6)
    assert "PKRS" in fault_of(one.walk(GVA))[2]


def test_bits_are_set_only_on_request(tables: Tables) -> None:
    tables.chain(ROOT, GVA, (39, 30, 21, 12), 3)
    one = space(tables)
    before = tables.memory.read(0, 64 * PAGE)
    assert one.walk(GVA, "write").ok
    assert one.walk(GVA, probe=True).ok
    assert one.translate(GVA) is not None
    assert tables.memory.read(0, 64 * PAGE) == before
    assert one.walk(GVA, "write", set_bits=True).dirty
    assert tables.memory.read(0x1FF8, 1) == b"\x23"
    assert tables.memory.read(0x4000, 1) == b"\x63"


def test_a_table_outside_memory_is_pointed_out(tables: Tables) -> None:
    tables.put(0x2FF0, 0x3F_0000_0063)
    walk = space(tables).walk(GVA)
    assert walk.levels[-1].in_memory is False
    assert "outside memory" in str(walk)
    assert walk.fault
    assert walk.fault.level == walk.levels[-1]
    assert walk.fault.error_code == 9


def test_cyclic_tables_end(tables: Tables) -> None:
    """A PML4 whose every entry is itself: the way Windows and others see their own tables."""
    for n in range(512):
        tables.put(ROOT + n * 8, ROOT | 3)
    walk = space(tables).walk(GVA)
    assert walk.physical == ROOT | 0x123
    assert len(walk.levels) == 4


def test_32_bit_tables() -> None:
    tables = Tables()
    tables.put(ROOT + 0x80 * 4, 0x2000 | 7, 4)
    tables.put(0x2000 + 5 * 4, 0x3000 | 5, 4)
    tables.put(ROOT + 0x81 * 4, 0x1 << 22 | 1 << 13 | LARGE | 7, 4)
    one = AddressSpace(tables.memory, cr3=ROOT, paging="32-bit")
    walk = one.walk(0x20005678, user=True)
    assert [level.name for level in walk.levels] == ["PDE", "PTE"]
    assert [level.index for level in walk.levels] == [0x80, 5]
    assert walk.physical == 0x3678
    assert not walk.writable
    assert one.translate(0x20400000) == 0x1_0040_0000  # PSE-36
    beyond = one.walk(1 << 32)
    assert beyond.fault
    assert "beyond the 4 GiB" in str(beyond.fault)


def test_pae_takes_its_pdptes_from_registers_or_from_memory() -> None:
    tables = Tables()
    for n in range(4):
        tables.put(ROOT + 0x20 + n * 8, 0x2000 | (n != 1))
    tables.put(0x2000, 0x20000 | LARGE * 0 | 3)
    tables.put(0x20000, 0x21000 | 3)
    one = AddressSpace(tables.memory, cr3=ROOT + 0x20, paging="pae")
    assert one.pdpte == (0x2001, 0x2000, 0x2001, 0x2001)
    assert one.translate(0xC0000000) == 0x21000
    walk = one.walk(0x40000000)
    assert walk.levels[0].address is None
    assert "in a register" in str(walk.fault)
    given = AddressSpace(tables.memory, paging="pae", pdpte=(0x2001, 0, 0, 0))
    assert given.translate(0) == 0x21000
    assert given.translate(0xC0000000) is None


def test_paging_off_is_identity() -> None:
    one = AddressSpace(Tables().memory, paging="none")
    assert one.translate(0x1234) == 0x1234
    assert one.translate(1 << 32) is None
    assert one.walk(0x1234).levels == ()


EPT_ROOT = 0x10000


@pytest.fixture
def nested(tables: Tables) -> Tables:
    """The guest's tables and its page, identically mapped by EPT, the page read-only."""
    tables.put(EPT_ROOT, 0x11000 | 7)
    tables.put(0x11000, 0x12000 | 7)
    tables.put(0x12000, 0x13000 | 7)
    for page in range(64):
        tables.put(0x13000 + page * 8, page * PAGE | (1 if page == 0x20 else 7) | 6 << 3)
    return tables


def test_a_nested_walk_shows_both_dimensions(nested: Tables) -> None:
    one = space(nested, ept=Ept(EPT_ROOT | 0x1E))
    walk = one.walk(GVA)
    assert walk.ok, walk
    assert len(walk.levels) == 24
    names = [level.name for level in walk.levels]
    assert names[:6] == ["EPT PML4E", "EPT PDPTE", "EPT PDE", "EPT PTE", "PML4E", "EPT PML4E"]
    assert walk.physical == 0x20123
    assert "EPT PTE" in str(walk)

    violation = one.walk(GVA, "write")
    assert violation.fault
    assert violation.fault.kind == "ept-violation"
    assert violation.fault.vector is None
    assert violation.fault.gpa == 0x20123
    assert violation.fault.qualification == 0x18A
    assert violation.fault.words == ("write", "readable", "linear address valid", "final")
    assert violation.fault.level
    assert violation.fault.level.name == "EPT PTE"
    assert "forbids writes" in str(violation)

    nested.put(0x13000 + 2 * 8, 0)
    during = one.walk(GVA).fault
    assert during
    assert during.during_walk
    assert during.gpa == 0x2FF0
    assert "a table of the guest" in str(during)

    nested.put(0x13000 + 2 * 8, 2)
    broken = one.walk(GVA).fault
    assert broken
    assert broken.kind == "ept-misconfiguration"


def test_nested_page_faults_are_amds(tables: Tables) -> None:
    tables.put(EPT_ROOT, 0x11000 | 7)
    tables.put(0x11000, 0x12000 | 7)
    tables.put(0x12000, 0x13000 | 7)
    for page in range(64):
        tables.put(0x13000 + page * 8, page * PAGE | (5 if page == 0x20 else 7))
    one = space(tables, npt=Npt(EPT_ROOT))
    assert one.walk(GVA).ok
    fault = one.walk(GVA, "write").fault
    assert fault
    assert fault.kind == "nested-page-fault"
    assert fault.qualification == 1 << 32 | 7
    assert fault.words == ("present", "write", "user", "final")
    assert fault.level
    assert fault.level.name == "NPT PTE"
    assert "read-only" in fault.reason


@pytest.mark.parametrize(
    ("arguments", "field", "text"),
    [
        ({"cr3": 1 << 46}, "cr3", "beyond MAXPHYADDR"),
        ({"cr3": -1}, "cr3", "64 bits"),
        ({"cr3": 1 << 64}, "cr3", "64 bits"),
        ({"paging": "6-level"}, "paging", "there is no '6-level' paging"),
        ({"maxphyaddr": 31}, "maxphyaddr", "32 to 52"),
        ({"maxphyaddr": 53}, "maxphyaddr", "32 to 52"),
        ({"cr0": 1 << 31, "paging": None}, "cr0", "without protected mode"),
        ({"cr4": 0, "paging": None}, "cr4", "lacks PAE"),
        ({"cr0": 1}, "paging", "make none paging, not 4-level"),
        ({"pkru": 1 << 32}, "pkru", "32 bits"),
        ({"pkrs": -1}, "pkrs", "32 bits"),
        ({"ept": Ept(0x1001)}, "eptp", "memory type"),
        ({"ept": Ept(0x1E | 1 << 46)}, "eptp", "MAXPHYADDR"),
        ({"ept": Ept(0x26, five_levels=False)}, "eptp", "levels"),
        ({"ept": Ept(0x5E, access_dirty=False)}, "eptp", "not supported"),
        ({"ept": Ept(0x9E)}, "eptp", "reserved"),
        ({"ept": Ept(0x1E, maxphyaddr=60)}, "maxphyaddr", "32 to 52"),
        ({"npt": Npt(1 << 46)}, "ncr3", "beyond MAXPHYADDR"),
        ({"npt": Npt(0, paging="none")}, "paging", "nested paging needs paging"),
        ({"npt": Npt(0x800000, paging="pae")}, "ncr3", "outside memory"),
        ({"npt": Npt(0), "ept": Ept(0x1E)}, "npt", "not both"),
        ({"paging": "pae", "cr3": 0x800000}, "cr3", "outside memory"),
        ({"paging": "pae", "pdpte": (1, 2, 3)}, "pdpte", "four PDPTE registers, not 3"),
        ({"paging": "pae", "pdpte": (1, 0, 0x1007, 0)}, "pdpte", "PDPTE 2 of cr3"),
        ({"paging": "pae", "pdpte": (1, 0, 1 << 64, 0)}, "pdpte", "64 bits"),
        ({"paging": "pae", "ept": Ept(0x1E)}, "cr3", "second dimension does not map"),
    ],
)
def test_impossible_arguments_are_refused_by_name(
    arguments: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        AddressSpace(Tables().memory, **{"paging": "4-level"} | arguments)
    assert caught.value.field == field
    assert isinstance(caught.value, Error)


def test_impossible_walks_are_refused(tables: Tables) -> None:
    one = space(tables)
    with pytest.raises(ConfigError, match="'read', 'write' or 'execute'"):
        one.walk(GVA, "fetch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="set_bits or probe"):
        one.walk(GVA, set_bits=True, probe=True)


def test_memory_outlives_its_names(tables: Tables) -> None:
    one = space(tables)
    del tables
    assert one.translate(GVA) == 0x20123
