"""Debian's kernel as the oracle: where it says its own and a program's pages are, the walker must
find them, and where it says that there is nothing, nothing."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from polyvisor import Machine, guest
from polyvisor.guest.channel import Channel
from polyvisor.mmu import AddressSpace

pytestmark = [pytest.mark.boot, pytest.mark.slow]

#: Addresses that are compared, in all.
ADDRESSES = 10_000

# Maps memory of several kinds with holes in it, tells for every page what /proc/self/pagemap says,
# and then stays where it is, in user mode.
PROBE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul
#define MIB (1ul << 20)

static char maps[1 << 16];
static char output[1 << 16];
static uint64_t entries[1 << 16];
static uint64_t state = 0x9e3779b97f4a7c15;

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* Touches one page in four, reading some: those share a page of zeros. */
static volatile char *area(unsigned long size, int prot, int flags) {
    volatile char *at = mmap(0, size, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) exit(3);
    for (unsigned long page = 0; page < size; page += PAGE) {
        uint64_t dice = next() % 16;
        if (dice < 3) at[page] = 1;
        if (dice == 3) (void)at[page];
    }
    if (mprotect((void *)at, size, prot) != 0) exit(4);
    return at;
}

int main(void) {
    area(8 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE);
    area(6 * MIB, PROT_READ, MAP_PRIVATE);
    area(6 * MIB, PROT_READ | PROT_EXEC, MAP_PRIVATE);
    area(4 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED);
    char *huge = mmap(0, 8 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    huge = (char *)(((uintptr_t)huge + 2 * MIB - 1) & -(2 * MIB));
    madvise(huge, 4 * MIB, MADV_HUGEPAGE);
    huge[5] = huge[2 * MIB + 7] = 1;
    /* What is used from here on must be there before it is looked at. */
    memset(output, 1, sizeof output);
    memset(maps, 1, sizeof maps);
    memset(entries, 1, sizeof entries);
    setvbuf(stdout, output, _IOFBF, sizeof output);
    printf("probe\n");
    fflush(stdout);

    int pagemap = open("/proc/self/pagemap", O_RDONLY), file = open("/proc/self/maps", O_RDONLY);
    long size = 0, got;
    while ((got = read(file, maps + size, sizeof maps - 1 - size)) > 0) size += got;
    maps[size] = 0;
    for (char *line = maps; *line; line = strchr(line, '\n') + 1) {
        unsigned long start, end;
        char rights[5];
        if (sscanf(line, "%lx-%lx %4s", &start, &end, rights) != 3) return 5;
        if (start >> 47) continue;
        long bytes = (end - start) / PAGE * 8;
        if (pread(pagemap, entries, bytes, start / PAGE * 8) != bytes) return 6;
        printf("area %lx %s", start, rights);
        for (long n = 0; n < bytes / 8; ++n) {
            if (entries[n] >> 63) printf(" %lx", (unsigned long)(entries[n] & (~0ul >> 9)));
            else printf(" -");
        }
        printf("\n");
    }
    printf("ready\n");
    fflush(stdout);
    for (;;) __asm__ volatile("pause");
}
"""
SYMBOLS = ("_text", "_etext", "__start_rodata", "__end_rodata", "_sdata", "_edata",
           "page_offset_base")  # fmt: skip
SCRIPT = f"grep -E ' ({'|'.join(SYMBOLS)})$' /proc/kallsyms; cat /proc/iomem; exec /root/probe"


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The program, for a guest without libraries."""
    folder = tmp_path_factory.mktemp("probe")
    source: Path = folder / "probe.c"
    source.write_text(PROBE)
    subprocess.run(
        ["gcc", "-O1", "-static", "-o", folder / "probe", source], check=True, timeout=60
    )
    return (folder / "probe").read_bytes()


@dataclass
class Told:
    """What the guest says."""

    #: Page: (page frame or None, rights as in /proc/PID/maps).
    pages: dict[int, tuple[int | None, str]] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    #: (first, last, name) of /proc/iomem.
    memory: list[tuple[int, int, str]] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Told:
        told = cls()
        for line in text.splitlines():
            if match := re.fullmatch(r"([0-9a-f]{16}) \w (\w+)", line):
                told.symbols[match[2]] = int(match[1], 16)
            elif match := re.fullmatch(r" *([0-9a-f]+)-([0-9a-f]+) : (.*)", line):
                told.memory.append((int(match[1], 16), int(match[2], 16), match[3]))
            elif line.startswith("area "):
                _, start, rights, *frames = line.split()
                for number, frame in enumerate(frames):
                    known = None if frame == "-" else int(frame, 16)
                    told.pages[int(start, 16) + 4096 * number] = (known, rights)
        return told

    def resource(self, name: str) -> tuple[int, int]:
        """The first and last address of one of /proc/iomem's."""
        return next((first, last) for first, last, what in self.memory if what == name)


def boot(engine: str, probe: bytes, look: Callable[[Machine, str], None]) -> None:
    """Boots, and calls `look` with the machine paused in the program, and what it said."""
    output = bytearray()
    state: dict[str, object] = {}

    def started(machine: Machine, channel: Channel) -> None:
        state["machine"], state["channel"] = machine, channel

    def idle() -> None:
        if "done" in state or b"\nready\n" not in output:
            return
        machine, channel = state["machine"], state["channel"]
        assert isinstance(machine, Machine)
        assert isinstance(channel, Channel)
        machine.pause()
        while machine.cpu(0).registers["cs"] & 3 != 3:  # in the kernel, which has pages to itself
            machine.resume()
            time.sleep(0.001)
            machine.pause()
        state["done"] = True
        look(machine, output.decode())
        machine.resume()
        channel.signal(9)

    completed = guest.exec(
        ["sh", "-c", SCRIPT],
        engine=engine,
        memory="640M",  # Linux has no huge pages with less than 512 MiB
        timeout=200,
        files={"root/probe": probe},
        append="nopti transparent_hugepage=madvise",
        on_stdout=output.extend,
        on_start=started,
        on_idle=idle,
    )
    assert "done" in state, output[-500:]
    assert completed.signal == 9


def check_user(space: AddressSpace, told: Told, dice: random.Random, count: int) -> None:
    present = [page for page, (frame, _) in told.pages.items() if frame is not None]
    absent = [page for page, (frame, _) in told.pages.items() if frame is None]
    assert len(present) > 1000
    assert len(absent) > 1000
    for number in range(count):
        page = dice.choice(absent if number % 5 == 0 else present)
        gva = page + dice.randrange(4096)
        frame, rights = told.pages[page]
        found = space.walk(gva, user=True)
        where = f"{found}\nbut Linux says {frame} {rights}"
        if frame is None:
            assert not found.mapped, where
            assert space.translate(gva) is None
            continue
        assert found.ok, where
        assert found.physical == frame << 12 | gva & 4095, where
        assert space.translate(gva) == found.physical
        assert found.user, where
        assert found.accessed, where
        assert found.executable == (rights[2] == "x"), where
        assert not found.writable or rights[1] == "w", where


def check_kernel(space: AddressSpace, told: Told, dice: random.Random, count: int) -> None:
    # Linux has the base of its map of all memory in a variable of its own (KASLR moves it).
    direct = int.from_bytes(space.read_virtual(told.symbols["page_offset_base"], 8), "little")
    ram = [(first, last) for first, last, name in told.memory if name == "System RAM"]
    code = told.resource("Kernel code")
    sections = [  # symbols, /proc/iomem's name, writable, executable
        ("_text", "_etext", "Kernel code", False, True),
        ("__start_rodata", "__end_rodata", "Kernel rodata", False, False),
        ("_sdata", "_edata", "Kernel data", True, False),
    ]
    for number in range(count):
        if number % 2:
            first, last = dice.choice(ram)
            physical = dice.randrange(max(first, 0x1000), last + 1)
            found = space.walk(direct + physical)
            where = f"{found}\nbut it is {physical:#x}, of /proc/iomem"
            if physical >= 1 << 20:  # below is what starts other CPUs, in real mode
                assert not found.executable, where
        else:
            begin, end, name, writable, executable = dice.choice(sections)
            gva = dice.randrange(told.symbols[begin], told.symbols[end])
            physical = code[0] + gva - told.symbols["_text"]
            found = space.walk(gva, "execute" if executable else "read")
            where = f"{found}\nbut it is {physical:#x}, of {name}"
            low, high = told.resource(name)
            assert low <= physical <= high, where
            assert found.writable == writable, where
            assert found.executable == executable, where
        assert found.ok, where
        assert found.physical == physical, where
        assert not found.user, where


@pytest.mark.timeout(280)
def test_what_linux_says(fast_engine: str, probe: bytes) -> None:
    looked: list[str] = []

    def look(machine: Machine, text: str) -> None:
        told = Told.parse(text)
        dice = random.Random(4)
        space = machine.mmu.space
        assert space.mode in ("4-level", "5-level")
        check_user(space, told, dice, ADDRESSES // 2)
        check_kernel(space, told, dice, ADDRESSES // 2)
        check_ranges(machine, told)
        looked.append(text)

    boot(fast_engine, probe, look)
    assert looked


def check_ranges(machine: Machine, told: Told) -> None:
    """All mappings at once: exactly the pages that Linux tells of, in the user's half."""
    ranges = machine.mmu.ranges()
    assert not ranges.truncated
    found = {
        page: item.physical + page - item.gva
        for item in ranges
        if item.gva >> 47 == 0
        for page in range(item.gva, item.end, 4096)
    }
    expected = {page: frame << 12 for page, (frame, _) in told.pages.items() if frame is not None}
    assert found == expected
    huge = [item for item in ranges if item.user and item.page_size == 2 << 20]
    assert sum(item.size for item in huge) == 4 << 20
    # The same page in two places: as the program has it, and in the kernel's map of all memory.
    page = next(page for page, (frame, rights) in told.pages.items() if frame and rights[1] == "w")
    mark = b"found by its bytes, whoever maps them"
    machine.mmu.write_virtual(page, mark)
    places = machine.mmu.find(mark)
    assert page in places
    assert any(place >> 63 for place in places)
