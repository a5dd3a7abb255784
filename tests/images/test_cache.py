"""The cache: complete entries or none, made once, noticed when damaged."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from polyvisor.errors import HostError
from polyvisor.images import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path / "cache"))


def write(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "data").write_bytes(b"content")


def never(directory: Path) -> None:
    raise AssertionError("made again")


def test_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.root() == tmp_path / "cache"
    monkeypatch.delenv("POLYVISOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.root() == Path("/somewhere/polyvisor")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    monkeypatch.setenv("HOME", "/home/user")
    assert cache.root() == Path("/home/user/.cache/polyvisor")


def test_made_once() -> None:
    place = cache.entry("kind/key", write)
    assert (place / "sub" / "data").read_bytes() == b"content"
    assert cache.entry("kind/key", never) == place


def test_refresh_replaces() -> None:
    place = cache.entry("key", write)
    cache.entry("key", lambda directory: (directory / "new").touch(), refresh=True)
    assert (place / "new").exists()
    assert not (place / "sub").exists()


@pytest.mark.parametrize("damage", ["content", "cut", "gone", "manifest"])
def test_damage_is_noticed(damage: str) -> None:
    data = cache.entry("key", write) / "sub" / "data"
    if damage == "content":
        data.write_bytes(b"CONTENT")
    elif damage == "cut":
        data.write_bytes(b"cont")
    elif damage == "gone":
        data.unlink()
    else:
        (data.parent.parent / "manifest").write_text("{")
    place = cache.entry("key", write)
    assert (place / "sub" / "data").read_bytes() == b"content"


def test_files_are_summed_when_their_time_changed() -> None:
    data = cache.entry("key", write) / "sub" / "data"
    times = data.stat()
    data.write_bytes(b"CONTENT")
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    cache.entry("key", never)  # the price of not reading it
    os.utime(data)
    place = cache.entry("key", write)
    assert (place / "sub" / "data").read_bytes() == b"content"


def test_sums_that_are_known() -> None:
    data = cache.entry("flat", lambda directory: (directory / "data").touch()) / "data"
    empty = hashlib.sha256().hexdigest()
    assert cache.file_sum(data) == empty
    manifest = data.with_name("manifest")
    manifest.write_text(manifest.read_text().replace(empty, "0" * 64))
    assert cache.file_sum(data) == "0" * 64  # not read again
    os.utime(data)
    assert cache.file_sum(data) == empty


def test_a_failure_leaves_nothing_behind() -> None:
    def fail(directory: Path) -> None:
        write(directory)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.entry("kind/key", fail)
    left = [path.name for path in (cache.root() / "kind").iterdir()]
    assert left == ["key.lock"]


def test_a_full_disk_is_a_sentence() -> None:
    def fail(directory: Path) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(HostError, match=r"No space left.*POLYVISOR_CACHE") as caught:
        cache.entry("key", fail)
    assert caught.value.errno == 28


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(HostError, match="POLYVISOR_CACHE"):
        cache.entry("key", write)


def _make_slowly(counter: str) -> None:
    def make(directory: Path) -> None:
        with open(counter, "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        write(directory)

    cache.entry("shared", make)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=_make_slowly, args=(str(counter),)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(30)
        assert maker.exitcode == 0
    assert counter.read_text() == "made\n"
