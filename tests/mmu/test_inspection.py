"""Address spaces as a whole: their ranges, bytes and pictures, of images and of machines."""

from __future__ import annotations

import gc
import random
import struct
import threading
import time
import zlib
from array import array
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import FORMATS, SECONDS, build, new_memory, random_address

import polyvisor
from polyvisor import Machine, MemoryImage, mmu_picture
from polyvisor.errors import ConfigError, HostError, ImageError, MemoryFault, StateMismatch
from polyvisor.mmu import AddressSpace, Ept
from polyvisor.virtual import NOT_MAPPED, Range, Ranges

PAGE = 4096
ROOT = 0x1000
NX = 1 << 63


class Image:
    """A memory image with four-level tables, made page by page."""

    def __init__(self, pages: int = 1024, tables: int = 0x1000) -> None:
        self.data = bytearray(pages * PAGE)
        self.free = ROOT + PAGE

    def word(self, address: int) -> int:
        return int(struct.unpack_from("<Q", self.data, address)[0])

    def set(self, address: int, value: int) -> None:
        struct.pack_into("<Q", self.data, address, value)

    def map(self, gva: int, physical: int, flags: int = 7, shift: int = 12) -> None:
        table = ROOT
        for level in (39, 30, 21, 12):
            at = table + (gva >> level & 511) * 8
            if level == shift:
                self.set(at, physical | flags | (0x80 if shift > 12 else 0))
                return
            if not self.word(at):
                self.set(at, self.free | 7)
                self.free += PAGE
            table = self.word(at) & ~0xFFF
        raise AssertionError

    def space(self) -> AddressSpace:
        return MemoryImage(self.data, writable=True).mmu(cr3=ROOT)


# --- ranges ---------------------------------------------------------------------------------------


def test_joined_where_both_sides_and_the_rights_agree() -> None:
    image = Image()
    for n in range(4):
        image.map(0x400000 + n * PAGE, 0x80000 + n * PAGE)  # joined
    image.map(0x404000, 0x90000)  # elsewhere in memory
    image.map(0x405000, 0x91000, 5)  # read-only
    image.map(0x406000, 0x92000, 5 | NX)
    image.map(0x408000, 0x94000, 5 | NX)  # behind a hole
    image.map(0xFFFF_8000_0020_0000, 0x200000, 3, shift=21)
    space = image.space()
    ranges = space.ranges()
    assert [(r.gva, r.physical, r.size, r.page_size, r.rights) for r in ranges] == [
        (0x400000, 0x80000, 4 * PAGE, PAGE, "rwx user"),
        (0x404000, 0x90000, PAGE, PAGE, "rwx user"),
        (0x405000, 0x91000, PAGE, PAGE, "r-x user"),
        (0x406000, 0x92000, PAGE, PAGE, "r-- user"),
        (0x408000, 0x94000, PAGE, PAGE, "r-- user"),
        (0xFFFF_8000_0020_0000, 0x200000, 2 << 20, 2 << 20, "rwx"),
    ]
    assert not ranges.truncated
    assert ranges.next is None
    assert ranges.size == 8 * PAGE + (2 << 20) + PAGE - PAGE
    by_rights = space.ranges(join="rights")
    assert [(r.gva, r.size) for r in by_rights][:2] == [(0x400000, 5 * PAGE), (0x405000, PAGE)]
    assert ranges.at(0x403FFF) == ranges[0]
    assert ranges.at(0x407000) is None
    assert ranges.at(0x3FFFFF) is None
    assert str(ranges[0]) == (
        "0x0000000000400000-0x0000000000403fff -> 0x000000080000       16K  4K rwx user"
    )
    assert len(str(ranges).splitlines()) == 6


def test_windows_cut_pages_and_skip_what_is_not_canonical() -> None:
    image = Image()
    image.map(0x200000, 0x200000, shift=21)
    image.map(0xFFFF_8000_0000_0000, 0x5000)
    space = image.space()
    (one,) = space.ranges(0x201000, 0x203000)
    assert (one.gva, one.physical, one.size, one.page_size) == (
        0x201000, 0x201000, 2 * PAGE, 2 << 20,
    )  # fmt: skip
    (one,) = space.ranges(0x3FFFFF, 1 << 47)
    assert (one.gva, one.size) == (0x3FFFFF, 1)
    (one,) = space.ranges(1 << 60)
    assert one.gva == 0xFFFF_8000_0000_0000
    assert not space.ranges(0x400000, 1 << 60)
    assert not space.ranges(5, 5)
    assert not space.ranges(6, 5)
    assert [r.gva for r in space.ranges(0, 1 << 64)] == [0x200000, 0xFFFF_8000_0000_0000]


def test_tables_that_refer_to_themselves_end() -> None:
    """Every entry of the root is the root: 2^36 pages, every one of them really mapped."""
    data = bytearray(struct.pack("<Q", ROOT | 7) * 512 * 2)
    space = MemoryImage(data).mmu(cr3=ROOT)
    start = time.thread_time()
    ranges = space.ranges(limit=1000)
    assert len(ranges) == 1000
    assert ranges.truncated
    assert ranges.next == 1000 * PAGE
    assert [r.gva for r in space.ranges(ranges.next, limit=3)] == [
        n * PAGE for n in (1000, 1001, 1002)
    ]
    joined = space.ranges(join="rights", budget=1_000_000)
    assert joined.truncated
    assert joined.next == joined[-1].end
    assert 900_000 * PAGE < joined.size < 1_000_000 * PAGE
    found = space.find(b"not there at all")
    assert found == []
    assert found.truncated
    assert time.thread_time() - start < 20


def test_self_reference_as_windows_has_it() -> None:
    """One entry of the root is the root itself: the tables appear as pages, once."""
    image = Image()
    image.map(0x400000, 0x80000)
    image.set(ROOT + 0x1ED * 8, ROOT | 3)
    space = image.space()
    base = 0xFFFF_0000_0000_0000 | 0x1ED << 39
    pages = {r.gva + n: r.physical + n for r in space.ranges() for n in range(0, r.size, PAGE)}
    assert pages[0x400000] == 0x80000
    assert pages[base | 0x1ED << 30 | 0x1ED << 21 | 0x1ED << 12] == ROOT
    for gva, physical in pages.items():
        assert space.translate(gva) == physical


@pytest.mark.parametrize("second", ["", *SECONDS])
@pytest.mark.parametrize("mode", FORMATS)
@given(seed=st.integers(0, 1 << 62))
@settings(max_examples=12)
def test_ranges_are_what_walks_find(mode: str, second: str, seed: int) -> None:
    if mode == "none" and not second:  # nothing to walk
        mode = "pae"
    r = random.Random(seed)
    world = build(r, new_memory(), mode, second, 4)
    space = world.space
    for _ in range(4):
        middle = random_address(r, mode) & ~0xFFF
        start = max(0, middle - r.randrange(40) * PAGE)
        end = min(middle + r.randrange(1, 40) * PAGE, 1 << 64)
        found = space.ranges(start, end)
        assert not found.truncated
        for page in range(start, end, PAGE):
            walk, item = space.walk(page, probe=True), found.at(page)
            if item is None:
                assert not walk.mapped, f"{walk}\nis not in\n{found}"
                continue
            assert walk.physical == item.physical + page - item.gva, f"{walk}\n{item}"
            assert walk.physical == space.translate(page)
            assert walk.page_size == item.page_size, f"{walk}\n{item}"
            assert (walk.user, walk.writable, walk.executable, walk.is_global) == (
                item.user, item.writable, item.executable, item.is_global,
            ), f"{walk}\n{item}"  # fmt: skip


def test_a_second_dimension_cuts_pages() -> None:
    """A 2 MiB page of the guest, of which EPT maps three pages, one of them not writable."""
    image = Image()
    image.map(0, 0, shift=21)  # guest: at guest-physical ROOT
    second = Image()
    second.free, data = 0x101000, image.data

    def nested(gpa: int, hpa: int, rights: int) -> None:
        table = 0x100000
        for level in (39, 30, 21):
            at = table + (gpa >> level & 511) * 8
            if not image.word(at):
                image.set(at, second.free | 7)
                second.free += PAGE
            table = image.word(at) & ~0xFFF
        image.set(table + (gpa >> 12 & 511) * 8, hpa | rights | 6 << 3)

    for page in range(ROOT, image.free, PAGE):
        nested(page, page, 7)
    nested(0x40000, 0x52000, 5)
    nested(0x41000, 0x53000, 7)
    nested(0x50000, 0x40000, 4)  # may only be executed
    space = MemoryImage(data).mmu(cr3=ROOT, ept=Ept(0x100000 | 6 | 3 << 3))
    found = {r.gva: (r.physical, r.size, r.rights) for r in space.ranges()}
    assert found[0x40000] == (0x52000, PAGE, "r-x user")
    assert found[0x41000] == (0x53000, PAGE, "rwx user")
    assert found[0x50000] == (0x40000, PAGE, "r-x user")
    assert set(found) - {0x40000, 0x41000, 0x50000} == {ROOT}  # the tables, joined


# --- bytes ----------------------------------------------------------------------------------------


def spread(image: Image, text: bytes, gva: int, pages: list[int]) -> None:
    """Writes `text` at `gva`, across pages that are anywhere in memory."""
    for n, page in enumerate(pages):
        image.map((gva & ~0xFFF) + n * PAGE, page)
    for n, byte in enumerate(text):
        at = gva + n
        image.data[pages[(at >> 12) - (gva >> 12)] + (at & 0xFFF)] = byte


def test_copies_across_pages() -> None:
    image = Image()
    text = bytes(random.Random(1).randbytes(3 * PAGE))
    spread(image, text, 0x400F00, [0x90000, 0x80000, 0xA0000, 0x82000])
    space = image.space()
    assert space.read_virtual(0x400F00, len(text)) == text
    assert space.read_virtual(0x400FFF, 2) == text[0xFF:0x101]
    assert space.read_virtual(0x12345, 0) == b""
    space.write_virtual(0x400F80, b"abc" * 1000)
    assert space.read_virtual(0x400F00, len(text)) == text[:0x80] + b"abc" * 1000 + text[0xC38:]
    assert image.data[0x90F80:0x90F83] == b"abc"


def test_faults_name_the_entry_and_write_nothing() -> None:
    image = Image()
    spread(image, b"x" * PAGE, 0x400000, [0x90000])
    image.map(0x402000, 0x91000)
    space = image.space()
    before = bytes(image.data)
    with pytest.raises(MemoryFault, match=r"0x401000.*PTE 0x0 .*not present") as caught:
        space.write_virtual(0x400FFC, b"y" * 8)
    assert bytes(image.data) == before
    fault = caught.value
    assert (fault.gva, fault.level, fault.entry, fault.physical) == (0x401000, "PTE", 0, None)
    assert fault.entry_address is not None
    assert image.word(fault.entry_address) == 0
    with pytest.raises(MemoryFault, match="not canonical") as caught:
        space.read_virtual(1 << 47, 1)
    assert (caught.value.level, caught.value.entry) == ("", None)
    with pytest.raises(MemoryFault, match="not present"):
        space.read_virtual((1 << 64) - 4, 8)
    with pytest.raises(MemoryFault):
        space.read_virtual(0x400000, 1 << 60)  # and no memory is asked for


def test_the_last_address_is_the_last() -> None:
    image = Image()
    spread(image, b"z" * PAGE, (1 << 64) - PAGE, [0x90000])
    image.map(0, 0x91000)
    space = image.space()
    assert space.read_virtual((1 << 64) - 4, 4) == b"zzzz"
    with pytest.raises(MemoryFault) as caught:
        space.read_virtual((1 << 64) - 4, 8)
    assert caught.value.gva == 0
    assert space.find(b"zzzz", limit=5000)[-1] == (1 << 64) - 4


def test_pages_beyond_the_image() -> None:
    image = Image()
    image.map(0x400000, 0x7000_0000)
    image.map(0x401000, 0x90000)
    space = image.space()
    with pytest.raises(MemoryFault, match="0x70000000, where there is no memory") as caught:
        space.read_virtual(0x400000, PAGE)
    assert caught.value.physical == 0x7000_0000
    assert space.find(b"\0" * 8, 0x400000, 0x402000, limit=1) == [0x401000]


@given(st.data())
@settings(max_examples=30)
def test_find_finds_what_a_plain_search_does(data: st.DataObject) -> None:
    """Pages in any order, holes between them; few different bytes, so that much matches."""
    dice = random.Random(data.draw(st.integers(0, 1 << 60)))
    image = Image(256)
    frames = dice.sample(range(64, 200), 20)
    virtual: dict[int, int] = {}
    for n in dice.sample(range(24), 20):
        virtual[0x7000000 + n * PAGE] = frames.pop() * PAGE
    for gva, frame in virtual.items():
        image.map(gva, frame)
        for _ in range(40):
            at = dice.choice([0, 1, 2, PAGE - 1, PAGE - 2, PAGE - 3, dice.randrange(PAGE)])
            image.data[frame + at] = dice.randrange(2)
    size = dice.choice([1, 2, 3, 5, PAGE - 1, PAGE + 3, 2 * PAGE + 1])
    space = image.space()
    start = 0x7000000 + dice.randrange(4 * PAGE)
    end = start + dice.randrange(20 * PAGE)
    # What is mapped, as runs of bytes.
    plain: list[int] = []
    flat = b"".join(
        bytes(image.data[virtual[gva] : virtual[gva] + PAGE]) if gva in virtual else b"\xff" * PAGE
        for gva in range(0x7000000, 0x7000000 + 24 * PAGE, PAGE)
    )
    where = dice.randrange(len(flat) - size)
    pattern = dice.choice([flat[where : where + size], b"\1" + b"\0" * (size - 1)])
    if b"\xff" in pattern:
        return
    at = flat.find(pattern, start - 0x7000000, end - 0x7000000)
    while at >= 0:
        plain.append(0x7000000 + at)
        at = flat.find(pattern, at + 1, end - 0x7000000)
    found = space.find(pattern, start, end, limit=1 << 20)
    assert found == plain
    assert not found.truncated
    if len(plain) > 3:  # piece by piece
        pieces: list[int] = []
        following: int | None = start
        while following is not None:
            part = space.find(pattern, following, end, limit=1 + len(plain) // 3)
            pieces += part
            following = part.next
        assert pieces == plain


def test_find_text_and_bad_patterns() -> None:
    image = Image()
    spread(image, "größe".encode(), 0x400FFC, [0x90000, 0x80000])
    space = image.space()
    assert space.find("größe") == [0x400FFC]
    with pytest.raises(ConfigError, match="empty"):
        space.find(b"")
    with pytest.raises(ConfigError, match="limit"):
        space.find(b"x", limit=0)
    with pytest.raises(ConfigError, match="-0x1 is no guest-virtual address"):
        space.find(b"x", -1)


def resident() -> int:
    """Bytes of this process that are shared memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssShmem:")[1].split()[0]) << 10


def test_searching_does_not_touch_what_the_guest_has_not() -> None:
    with Machine(memory="256M", engine="soft", hugepages="none") as machine:
        machine.cpu(0).enter_long_mode(page_tables_at=0x10000, rip=0x1000)
        edge = 0x8000000
        machine.memory.write(edge - 3, b"abc")  # the last of its page: what follows is zero
        machine.memory.write(0xC000000, b"abc\0")
        before = resident()
        assert machine.mmu.find(b"abc" + b"\0" * 9000) == [edge - 3, 0xC000000]
        assert machine.mmu.find(b"\0" * 5000 + b"abc") == [edge - 5003, 0xC000000 - 5000]
        assert machine.mmu.find(b"not there") == []
        assert machine.mmu.find(b"\0" * 100, edge, edge + 105) == [edge + n for n in range(6)]
        assert machine.mmu.find(b"\0" * 200_000, 0x9000000, 0x9000000 + 200_002) == [
            0x9000000 + n for n in range(3)
        ]
        assert resident() - before < 8 << 20


# --- arrays ---------------------------------------------------------------------------------------


def test_arrays_of_any_shape() -> None:
    image = Image()
    for n in range(64):
        image.map(0x400000 + n * PAGE, 0x100000 + (n * 7 % 64) * PAGE)
    space = image.space()
    dice = np.random.default_rng(3)
    flat = dice.integers(0x3F0000, 0x450000, 30_000, np.uint64)
    flat[::1000] = [1 << 47, 1 << 63, NOT_MAPPED, 0, 5] * 6
    expected = np.array(
        [NOT_MAPPED if (at := space.translate(int(g))) is None else at for g in flat], np.uint64
    )
    assert (expected == NOT_MAPPED).any()
    assert np.array_equal(space.translate_many(flat), expected)
    cube = flat.reshape(10, 100, 30)
    for view, same in (
        (cube[::-1, ::3, 1::2], expected.reshape(10, 100, 30)[::-1, ::3, 1::2]),
        (cube.T, expected.reshape(10, 100, 30).T),
        (flat[5:6].reshape(()), expected[5:6].reshape(())),
        (flat[:0], expected[:0]),
    ):
        found = space.translate_many(view)
        assert found.shape == view.shape
        assert np.array_equal(found, same)
        out = np.zeros((*view.shape, 2), np.uint64)[..., 0]
        assert space.translate_many(view, out) is out
        assert np.array_equal(out, same)
    signed = flat.astype(np.int64)
    assert np.array_equal(space.translate_many(signed), expected)
    words = array("Q", flat.tolist())
    assert space.translate_many(words).tolist() == expected.tolist()
    in_place = flat.copy()
    space.translate_many(in_place, in_place)
    assert np.array_equal(in_place, expected)


@pytest.mark.parametrize(
    ("addresses", "out", "words"),
    [
        (np.zeros(4, np.uint32), None, "format 'I'"),
        (np.zeros(4, np.float64), None, "format 'd'"),
        (np.zeros(4, ">u8"), None, "format '>Q'|format '>L'"),
        (b"12345678", None, "format 'B'"),
        ([1, 2, 3], None, "not list"),
        (5, None, "not int"),
        (np.zeros(4, np.uint64), np.zeros(5, np.uint64), "shape"),
        (np.zeros(4, np.uint64), np.zeros((2, 2), np.uint64), "shape"),
        (np.zeros(4, np.uint64), bytes(32), "writable"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused(addresses: object, out: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Image().space().translate_many(addresses, out)


def test_other_threads_run_during_long_translations() -> None:
    image = Image()
    image.map(0x400000, 0x90000)
    space = image.space()
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    addresses = np.full(1 << 22, 0x400000, np.uint64)
    before, start = ticks, time.monotonic()
    while ticks - before < 5:
        space.translate_many(addresses)
        assert time.monotonic() - start < 30
    done.set()
    thread.join()


# --- images ---------------------------------------------------------------------------------------


def test_a_file_is_mapped_and_stays_as_it_is(tmp_path: Path) -> None:
    image = Image()
    spread(image, b"in a file", 0x400FFC, [0x90000, 0x80000])
    path = tmp_path / "memory.raw"
    path.write_bytes(image.data)
    with MemoryImage(path) as opened:
        space = opened.mmu(cr3=ROOT)
        assert space.read_virtual(0x400FFC, 9) == b"in a file"
        walked = space.walk(0x400FFC, "write", set_bits=True)  # has nowhere to set them
        assert walked.ok
        with pytest.raises(StateMismatch, match="reading only"):
            space.write_virtual(0x400FFC, b"no")
        with pytest.raises(StateMismatch, match="reading only"):
            opened.memory.write(0x90000, b"no")
        assert memoryview(opened.memory.regions[0]).readonly
        view = opened.memory.view(0x90FFC, 4)
    assert bytes(view) == b"in a"  # stays valid
    assert space.read_virtual(0x400FFC, 9) == b"in a file"
    assert path.read_bytes() == image.data
    with MemoryImage(path, writable=True) as opened:
        opened.mmu(cr3=ROOT).write_virtual(0x400FFC, b"to a file")
    assert path.read_bytes()[0x90FFC:0x91000] == b"to a"
    assert path.read_bytes()[0x80000:0x80005] == b" file"


def test_images_lie_where_they_are_said_to() -> None:
    image = Image(16)
    high = MemoryImage(bytes(image.data), base=0x1_0000_0000)
    assert high.end == 0x1_0001_0000
    assert high.memory.read(0x1_0000_0000, 4) == b"\0\0\0\0"
    with pytest.raises(ConfigError, match="0x1000 is not in the image, which has 0x100000000"):
        high.mmu(cr3=ROOT)
    odd = MemoryImage(b"\1" * 5000)
    assert odd.memory.read(4990, 20) == b"\1" * 10 + b"\0" * 10
    assert odd.size == 5000


def test_a_buffer_is_used_where_it_is() -> None:
    buffer = bytearray(4 * PAGE)
    opened = MemoryImage(buffer, writable=True)
    buffer[100] = 7
    assert opened.memory.read_int(100, 1) == 7
    opened.memory.write_int(101, 8, 1)
    assert buffer[101] == 8
    with pytest.raises(BufferError):
        buffer.append(1)  # it is held
    del opened
    gc.collect()
    buffer.append(1)


def test_images_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ImageError, match="is empty"):
        MemoryImage(tmp_path / "empty")
    with pytest.raises(ImageError, match="No such file"):
        MemoryImage(tmp_path / "none")
    with pytest.raises(ImageError, match="is a folder"):
        MemoryImage(tmp_path)
    with pytest.raises(ConfigError, match="empty"):
        MemoryImage(b"")
    with pytest.raises(ConfigError, match="multiple of 4096"):
        MemoryImage(b"x", base=5)
    with pytest.raises(ConfigError, match="not of type int"):
        MemoryImage(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be writable"):
        MemoryImage(b"x" * PAGE, writable=True)
    with pytest.raises(ConfigError, match="contiguous"):
        MemoryImage(memoryview(b"x" * PAGE)[::2])
    with pytest.raises(ConfigError, match="MAXPHYADDR"):
        MemoryImage(b"x" * PAGE).mmu(cr3=1 << 50)
    with pytest.raises(ConfigError, match="no '3-level' paging"):
        MemoryImage(b"x" * PAGE).mmu(cr3=0, paging="3-level")  # type: ignore[arg-type]


def test_an_image_smaller_than_its_tables_say() -> None:
    image = Image()
    image.map(0x400000, 0x90000)
    cut = MemoryImage(bytes(image.data[: ROOT + PAGE]))
    space = cut.mmu(cr3=ROOT)
    walk = space.walk(0x400000)
    assert not walk.ok
    assert not walk.levels[-1].in_memory
    assert "outside memory" in str(walk)
    assert space.translate(0x400000) is None
    assert not space.ranges()


# --- machines -------------------------------------------------------------------------------------


def long_mode(engine: str) -> Machine:
    machine = Machine(memory="64M", engine=engine)
    machine.load_raw(0x1000, b"\xeb\xfe")  # jmp .
    machine.cpu(0).enter_long_mode(page_tables_at=0x10000, rip=0x1000)
    return machine


def test_a_machine_that_stands_still(engine: str) -> None:
    with long_mode(engine) as machine:
        assert machine.mmu is machine.cpu(0).mmu
        assert machine.mmu.translate(0x1234567) == 0x1234567
        assert machine.mmu.translate(1 << 32) is None
        assert machine.mmu.space.mode == "4-level"
        assert machine.mmu.walk(0x1000, "execute").ok
        (everything,) = machine.mmu.ranges()
        assert (everything.gva, everything.size) == (0, 4 << 30)
        machine.mmu.write_virtual(0x1FFFFA, b"across pages")
        assert machine.memory.read(0x1FFFFA, 12) == b"across pages"
        assert machine.mmu.find("across pages") == [0x1FFFFA]
        found = machine.mmu.translate_many(np.array([5, 1 << 32], np.uint64))
        assert found.tolist() == [5, NOT_MAPPED]
        with pytest.raises(ConfigError, match="64 bits"):
            machine.mmu.translate(-1)
        with pytest.raises(ConfigError, match="64 bits"):
            machine.mmu.translate(1 << 64)
        with pytest.raises(TypeError):
            machine.mmu.translate("x")  # type: ignore[arg-type]
        assert machine.mmu.translate(np.uint64(7)) == 7  # type: ignore[arg-type]
        assert machine.mmu.translate((1 << 64) - 1) is None


def test_new_registers_are_a_new_address_space(engine: str) -> None:
    with long_mode(engine) as machine:
        kept = machine.mmu.space
        assert machine.mmu.space is kept
        assert machine.mmu.translate(0x400000) == 0x400000
        # Another PML4, in which 0x400000 is elsewhere.
        machine.memory.write_int(0x20000, 0x21003)
        machine.memory.write_int(0x21000, 0x22003)
        machine.memory.write_int(0x22000 + 2 * 8, 0x600083)
        machine.cpu(0).registers["cr3"] = 0x20000
        assert machine.mmu.translate(0x400000) == 0x600000
        assert machine.mmu.space is not kept
        assert kept.translate(0x400000) == 0x400000
        # Tables are read anew at every call.
        machine.memory.write_int(0x22000 + 2 * 8, 0x800083)
        assert machine.mmu.translate(0x400000) == 0x800000
        assert machine.mmu.at(cr3=0x10000).translate(0x400000) == 0x400000
        snapshot = machine.snapshot()
        machine.cpu(0).registers["cr3"] = 0x10000
        assert machine.mmu.translate(0x400000) == 0x400000
        machine.restore(snapshot)
        assert machine.mmu.translate(0x400000) == 0x800000


def test_what_a_guest_loads_is_noticed(engine: str) -> None:
    with long_mode(engine) as machine:
        code = b"\xb8\x00\x00\x02\x00\x0f\x22\xd8\xeb\xfe"  # mov eax, 0x20000; mov cr3, rax; jmp .
        machine.load_raw(0x1000, code)
        machine.memory.write_int(0x20000, 0x21003)
        machine.memory.write_int(0x21000, 0x22003)
        machine.memory.write_int(0x22000, 0x83)
        machine.memory.write_int(0x22000 + 2 * 8, 0x600083)
        assert machine.mmu.translate(0x400000) == 0x400000
        machine.cpu(0).step(2)
        assert machine.mmu.translate(0x400000) == 0x600000
        machine.cpu(0).registers["cr3"] = 0x10000
        assert machine.mmu.translate(0x400000) == 0x400000
        machine.cpu(0).registers["rip"] = 0x1000
        machine.start()
        time.sleep(0.2)
        machine.pause()
        assert machine.mmu.translate(0x400000) == 0x600000


def test_a_machine_that_runs(engine: str) -> None:
    with long_mode(engine) as machine:
        assert machine.mmu.translate(0x1000) == 0x1000
        machine.start()
        for call in (
            lambda: machine.mmu.translate(0x1000),
            lambda: machine.mmu.walk(0x1000),
            lambda: machine.mmu.ranges(),
            lambda: machine.mmu.space,
        ):
            with pytest.raises(StateMismatch, match="is running, but must be paused"):
                call()
        with pytest.raises(StateMismatch, match="paging='4-level'"):
            machine.mmu.at(cr3=0x10000)
        space = machine.mmu.at(cr3=0x10000, paging="4-level")
        assert space.translate(0x1000) == 0x1000
        assert "running" in repr(machine.mmu)
        machine.pause()
        assert machine.mmu.translate(0x1000) == 0x1000
        mmu = machine.mmu
        machine.stop()
        assert machine.mmu.translate(0x1000) == 0x1000  # its last state
    with pytest.raises(StateMismatch, match="closed"):
        mmu.translate(0x1000)
    with pytest.raises(StateMismatch, match="closed"):
        _ = machine.mmu
    assert space.read_virtual(0x1000, 2) == b"\xeb\xfe"  # keeps the memory


def test_a_machine_without_paging_and_its_other_cpus(engine: str) -> None:
    with Machine(memory="64M", engine=engine, cpus=2) as machine:
        assert machine.mmu.space.mode == "none"
        assert machine.mmu.translate(0xFFFF0) == 0xFFFF0
        machine.cpu(1).enter_long_mode(page_tables_at=0x10000, rip=0x1000)
        assert machine.mmu.space.mode == "none"
        assert machine.cpu(1).mmu.space.mode == "4-level"
        with pytest.raises(MemoryFault):
            machine.cpu(1).mmu.read_virtual(1 << 40, 1)


def test_nothing_keeps_a_machine_alive() -> None:
    import weakref

    machine = long_mode("soft")
    mmu = machine.mmu
    mmu.translate(0)
    gone, native_gone = weakref.ref(machine), weakref.ref(mmu)
    machine.close()
    del machine, mmu
    gc.collect()
    assert gone() is None
    assert native_gone() is None


# --- pictures -------------------------------------------------------------------------------------


def test_the_picture_shows_every_kind() -> None:
    image = Image()
    image.map(0x400000, 0x90000, 5)
    image.map(0x401000, 0x91000, 7 | NX)
    image.map(0xFFFF_8000_0000_0000, 0x92000, 3 | NX)
    ranges = image.space().ranges()
    text = ranges.picture()
    assert ranges._repr_svg_() == text
    tree = ElementTree.fromstring(text)
    words = [item.text for item in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "0x0000000000400000" in words
    assert "... the upper half of the address space" in words
    assert "user code: 4 KiB" in words
    assert "supervisor, writable: 4 KiB" in words
    width, height = (int(float(tree.attrib[name])) for name in ("width", "height"))
    png = mmu_picture.png(ranges)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", png, at + 8 + size)[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (2 * width, 2 * height)
    rows = zlib.decompress(chunks[b"IDAT"])
    assert len(rows) == (2 * width + 1) * 2 * height
    colours = [chunks[b"PLTE"][3 * n : 3 * n + 3].hex() for n in range(len(chunks[b"PLTE"]) // 3)]
    drawn = {colours[number] for number in set(rows)}
    kinds = [(True, False, True), (True, True, False), (False, True, False)]
    assert drawn >= {mmu_picture.KINDS[kind][1][1:] for kind in kinds} | {"ffffff"}


def test_stretches_are_cut_at_the_largest_holes() -> None:
    def pages(*addresses: int) -> list[Range]:
        return [Range(a, 0, PAGE, PAGE, True, True, True, False) for a in addresses]

    assert mmu_picture.stretches([]) == []
    assert mmu_picture.stretches(pages(0, 0x1000, 0x3000)) == [(0, 1), (2, 2)]
    assert mmu_picture.stretches(pages(*range(0, 0x20000, 0x2000))) == [(0, 15)]
    many = pages(*(1 << n for n in range(12, 64)))
    cut = mmu_picture.stretches(many)
    assert len(cut) == mmu_picture.ROWS
    assert [first for first, _ in cut[1:]] == [last + 1 for _, last in cut[:-1]]


def test_pictures_of_nothing_and_of_too_much(tmp_path: Path) -> None:
    nothing = Ranges([], None)
    ElementTree.fromstring(nothing.picture())
    assert str(nothing) == "nothing is mapped"
    data = bytearray(struct.pack("<Q", ROOT | 7) * 512 * 2)
    cyclic = MemoryImage(data).mmu(cr3=ROOT).ranges(limit=5000)
    assert "there is more from" in cyclic.picture()
    cyclic.save(str(tmp_path / "it.PNG"))
    assert (tmp_path / "it.PNG").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        cyclic.save(str(tmp_path / "it.gif"))
    with pytest.raises(HostError, match="cannot write the picture"):
        cyclic.save(str(tmp_path / "none" / "it.svg"))


def test_the_image_class_is_loaded_when_wanted() -> None:
    assert polyvisor.MemoryImage is MemoryImage
