"""Where things are in a program's memory: elsewhere every time, unless it has a seed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from polyvisor import Process
from polyvisor.errors import ConfigError

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>
static int variable;
__attribute__((noinline)) void ready(void) { __asm__ volatile(""); }
int main(int count, char **names) {
    ready();
    int local;
    void *at = mmap(NULL, 1 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    printf("%p %p %p %p %p\n", &local, at, sbrk(0), &variable,
           (void *)*(unsigned long *)getauxval(AT_RANDOM));
    fflush(stdout);
    if (count > 1) execl(names[0], names[0], NULL);
}
"""
#: Where each of them is on Linux.
RANGES = [
    (0x7FFB_0000_0000, 0x7FFF_FFFF_F000),
    (0x7E00_0000_0000, 0x7FFF_FFFF_F000),
    (0x5555_5555_4000, 0x6565_5555_4000),
    (0x5555_5555_4000, 0x6565_5555_4000),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says where its stack, a mapping, its heap and a variable are, and AT_RANDOM."""
    folder = tmp_path_factory.mktemp("layout")
    (folder / "layout.c").write_text(SOURCE)
    for name, options in (("pie", ["-pie", "-fPIE"]), ("static", ["-static", "-no-pie"])):
        subprocess.run(
            ["cc", "-O1", *options, "-o", folder / name, folder / "layout.c"], check=True
        )
    return folder


def addresses(engine: str, program: Path, name: str, seed: int | None, *more: str) -> list[str]:
    """The lines that the program writes."""
    argv = [f"/p/{name}", *more]
    with Process(argv, ro=[(program, "/p")], seed=seed, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.status == 0
    return result.text.splitlines()


def test_others_every_time(engine: str, program: Path) -> None:
    lines = [addresses(engine, program, "pie", None)[0].split() for _ in range(4)]
    for column in zip(*lines, strict=True):
        assert len(set(column)) == 4
    for line in lines:
        for address, (low, high) in zip(line, RANGES, strict=False):
            assert low <= int(address, 16) < high


def test_a_seed_has_its_addresses(engine: str, program: Path) -> None:
    first = addresses(engine, program, "pie", 5, "again")
    assert first == addresses(engine, program, "pie", 5, "again")
    assert len(set(first)) == 2  # execve() has others
    assert first[0] not in addresses(engine, program, "pie", 6)


def test_what_is_linked_to_an_address_has_it(engine: str, program: Path) -> None:
    one, other = (addresses(engine, program, "static", None)[0].split() for _ in range(2))
    assert one[3] == other[3]
    assert all(a != b for a, b in zip(one[:3], other[:3], strict=True))


def test_copies_have_their_templates(engine: str, program: Path) -> None:
    with Process(["/p/pie"], ro=[(program, "/p")], engine=engine) as template:
        template.run_until("ready", timeout=60)
        texts = set()
        for _ in range(2):
            with template.fork() as copy:
                texts.add(copy.run(timeout=60).text)
    assert len(texts) == 1
    assert re.match("0x7f", texts.pop())


def test_seeds_that_are_none() -> None:
    for seed in (-1, 1 << 64):
        with pytest.raises(ConfigError) as caught:
            Process(["true"], seed=seed)
        assert caught.value.field == "seed"
