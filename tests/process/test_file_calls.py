"""Files of a process VM answer as the host's do: the same program makes the same calls in a folder
that it was given and, outside, in one that it is confined to by chroot(); results, errors, contents
and metadata are compared. It is random what it does, but the same for each seed."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from polyvisor import Process

SOURCE = Path(__file__).with_name("file_calls.c")
CALLS = 1500
#: Set times lie before it; the others are of when the test ran.
SET_BEFORE = 1_200_000_000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    built = tmp_path_factory.mktemp("file-calls") / "file_calls"
    subprocess.run(["cc", "-O1", "-w", "-static", "-o", built, SOURCE], check=True)
    return built.read_bytes()


def make_root(folder: Path, program: bytes) -> Path:
    folder.mkdir()
    (folder / "program").write_bytes(program)
    (folder / "program").chmod(0o755)
    return folder


def everything(folder: Path) -> dict[str, tuple[object, ...]]:
    """All that a program may have changed, by path."""
    found: dict[str, tuple[object, ...]] = {}
    names: dict[int, str] = {}  # of files with several names, the first one
    for top, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(top) / name
            about = path.lstat()
            where = str(path.relative_to(folder))
            content: object = None
            if stat.S_ISREG(about.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(about.st_mode):
                content = os.readlink(path)
            same = where if path.is_dir() else names.setdefault(about.st_ino, where)
            set_time = about.st_mtime_ns if about.st_mtime < SET_BEFORE else None
            found[where] = (about.st_mode, about.st_nlink, content, same, set_time)
    return found


@pytest.mark.parametrize("seed", range(1, 4))
def test_calls_on_files_end_as_on_the_host(
    engine: str, tmp_path: Path, program: bytes, seed: int
) -> None:
    shared = "1" if engine == "kvm" else "0"  # soft refuses shared mappings that are written to
    words = [str(seed), str(CALLS), shared]
    outside, inside = (make_root(tmp_path / name, program) for name in ("outside", "inside"))
    host = subprocess.run(
        [outside / "program", *words, outside], capture_output=True, timeout=60, check=False
    )
    if host.returncode == 77:
        pytest.skip("this host lets nobody chroot")
    with Process(
        ["/program", *words], root=inside, rw=[(inside, "/")], output="16M", engine=engine
    ) as process:
        result = process.run(timeout=60)
    expected, got = host.stdout.splitlines(), result.stdout.splitlines()
    assert expected[-1] == b"done", host.stderr
    for at, (wanted, found) in enumerate(zip(expected, got, strict=False)):
        assert found == wanted, expected[max(0, at - 12) : at]
    assert len(got) == len(expected), result
    assert everything(inside) == everything(outside)
