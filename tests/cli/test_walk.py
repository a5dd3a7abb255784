"""`polyvisor walk`: tables in an image, walked from the shell."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from polyvisor.cli import main

PML4, PDPT, PD, PT, PAGE = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
SIZE = 0x8000


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """0x400000 is a user's page, 0x401000 the supervisor's and read-only, 0x402000 is elsewhere,
    0x600000 has a table that is not in the image."""
    data = bytearray(SIZE)
    for at, entry in (
        (PML4, PDPT | 7),
        (PDPT, PD | 7),
        (PD + 2 * 8, PT | 7),
        (PD + 3 * 8, 0x10_0000 | 7),
        (PT, PAGE | 0x67),
        (PT + 8, (PAGE + 0x1000) | 1 | 1 << 63),
        (PT + 16, 0x7000_0000 | 7),
    ):
        struct.pack_into("<Q", data, at, entry)
    path = tmp_path / "memory.raw"
    path.write_bytes(data)
    return path


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Walk = Callable[..., Done]


@pytest.fixture
def walk(capfd: pytest.CaptureFixture[str]) -> Walk:
    """Runs the command in this process, which is much quicker than in one of its own."""

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        code = main(["walk", *map(str, arguments)])
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run


def test_a_table_of_every_level(image: Path, walk: Walk) -> None:
    before = image.read_bytes()
    done = walk(image, "--cr3", "0x1000", "0x400123")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "0x400123: read, supervisor, 4-level paging\n"
        "level  index  address               entry   covers  flags\n"
        "PML4E      0   0x1000  0x0000000000002007  512 GiB  P W U\n"
        "PDPTE      0   0x2000  0x0000000000003007    1 GiB  P W U\n"
        "PDE        2   0x3010  0x0000000000004007    2 MiB  P W U\n"
        "PTE        0   0x4000  0x0000000000005067    4 KiB  P W U A D\n"
        "-> 0x5123, page of 4 KiB: user, writable, executable, accessed, dirty\n"
    )
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0x500000"], "PTE 0x0 (at 0x4800) is not present"),
        (["0x401000", "--user"], "is the supervisor's"),
        (["0x401000", "--access", "write"], "is read-only"),
        (["0x401000", "--access", "execute"], "forbids execution"),
        (["0x800000000000"], "the address is not canonical"),
        (["0x600000"], "outside memory"),
        (["0x400000", "0x500000"], "is not present"),
    ],
)
def test_what_cannot_be_accessed(arguments: list[str], words: str, image: Path, walk: Walk) -> None:
    done = walk(image, "--cr3", "4096", *arguments)
    assert (done.returncode, done.stderr) == (1, "")
    assert words in done.stdout


def test_a_page_that_is_not_in_the_image(image: Path, walk: Walk) -> None:
    done = walk(image, "--cr3", "0x1000", "0x402000")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("0x70000000 is not in the image, which ends at 0x8000\n")


def test_json(image: Path, walk: Walk) -> None:
    done = walk(image, "--cr3", "0x1000", "--json", "--ranges", "0x400123", "0x402000", "0")
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert found["image"] == str(image)
    assert found["paging"] == "4-level"
    first, second, third = found["walks"]
    assert (first["ok"], first["physical"], first["in_image"]) == (True, "0x5123", True)
    assert [level["name"] for level in first["levels"]] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert first["levels"][3]["entry"] == "0x5067"
    assert (second["ok"], second["physical"], second["in_image"]) == (True, "0x70000000", False)
    assert (third["ok"], third["physical"], third["fault"]["vector"]) == (False, None, 14)
    assert [item["gva"] for item in found["ranges"]] == ["0x400000", "0x401000", "0x402000"]
    assert found["ranges"][1]["writable"] is False
    assert found["truncated"] is False


def test_ranges_and_pictures(image: Path, tmp_path: Path, walk: Walk) -> None:
    done = walk(image, "--cr3", "0x1000", "--ranges", "--map", tmp_path / "it.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "0x0000000000400000-0x0000000000400fff",
        "0x0000000000401000-0x0000000000401fff",
        "0x0000000000402000-0x0000000000402fff",
    ]
    text = (tmp_path / "it.svg").read_text()
    ElementTree.fromstring(text)
    assert "memory.raw, cr3 0x1000, 4-level paging" in text
    done = walk(image, "--cr3", "0x1000", "--map", tmp_path / "it.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("paging", ["32-bit", "pae", "5-level"])
def test_other_formats(paging: str, tmp_path: Path, walk: Walk) -> None:
    data = bytearray(0x10000)
    if paging == "32-bit":
        struct.pack_into("<I", data, 0x1000 + 4, 0x2000 | 7)
        struct.pack_into("<I", data, 0x2000, 0x5000 | 7)
    elif paging == "pae":
        struct.pack_into("<Q", data, 0x1000, 0x2000 | 1)
        struct.pack_into("<Q", data, 0x2000 + 2 * 8, 0x3000 | 7)
        struct.pack_into("<Q", data, 0x3000, 0x5000 | 7)
    else:
        for table in (0x1000, 0x2000, 0x3000):
            struct.pack_into("<Q", data, table, table + 0x1000 | 7)
        struct.pack_into("<Q", data, 0x4000 + 2 * 8, 0x6000 | 7)
        struct.pack_into("<Q", data, 0x6000, 0x5000 | 7)
    path = tmp_path / "memory.raw"
    path.write_bytes(data)
    done = walk(path, "--cr3", "0x1000", "--paging", paging, "0x400010")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{paging} paging" in done.stdout
    assert "-> 0x5010, page of 4 KiB" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cr3", "0x1000"], "give addresses, --ranges or --map"),
        (["--cr3", "0x1000", "zz"], "'zz' is not a number"),
        (["--cr3", "0x1000", "ff00"], "looks hexadecimal; write 0xff00"),
        (["--cr3", "0x1000", "0x10000000000000000"], "more than 64 bits"),
        (["--cr3", "here", "0"], "--cr3 'here' is not a number"),
        (["--cr3", "0x8000", "0"], "cr3 0x8000 is not in the image, which has 0x0 to 0x7fff"),
        (["--cr3", "0x1000000000000", "0"], "beyond MAXPHYADDR"),
        (["--cr3", "0x1000", "--base", "0x10000", "0"], "cr3 0x1000 is not in the image"),
        (["--cr3", "0x1000", "--base", "1", "0"], "multiple of 4096"),
        (["--cr3", "0x1000", "--paging", "3-level", "0"], "no format '3-level'; choose one of"),
        (["--cr3", "0x1000", "--maxphyaddr", "99", "0"], "MAXPHYADDR is 99"),
        (["--cr3", "0x1000", "--map", "picture.gif"], ".svg or .png"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    arguments: list[str], words: str, image: Path, walk: Walk
) -> None:
    done = walk(image, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr
    assert done.stderr.startswith("polyvisor: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("what", ["missing", "empty", "folder", "map"])
def test_files_that_cannot_be_used(what: str, image: Path, tmp_path: Path, walk: Walk) -> None:
    path, extra = tmp_path / "other", ["0"]
    if what == "empty":
        path.write_bytes(b"")
    elif what == "folder":
        path.mkdir()
    elif what == "map":
        path, extra = image, ["--map", "/nowhere/it.svg"]
    done = walk(path, "--cr3", "0x1000", *extra)
    assert done.returncode == 125
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert ("/nowhere/it.svg" if what == "map" else str(path)) in done.stderr


def test_help_has_examples(walk: Walk) -> None:
    done = walk("--help")
    assert done.returncode == 0
    assert "polyvisor walk memory.raw --cr3" in done.stdout
    assert "Exit status" in done.stdout


def test_as_a_program(image: Path) -> None:
    """In a process of its own, with a reader that goes away."""
    process = subprocess.Popen(
        [sys.executable, "-m", "polyvisor.cli", "walk", str(image), "--cr3", "0x1000"]
        + ["0x400000"] * 2000,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(8) == b"0x400000"
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
