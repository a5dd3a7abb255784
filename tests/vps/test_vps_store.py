"""What is on the disk: names, numbers, locks, and what killed processes leave there. Needs no
namespaces, so nothing here runs a VPS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from polyvisor.errors import ConfigError, StateMismatch
from polyvisor.vps import files, layers
from polyvisor.vps.bases import Bases, find_init
from polyvisor.vps.context import Vps
from polyvisor.vps.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("POLYVISOR_VPS_DIR", str(tmp_path / "vps"))
    monkeypatch.setenv("POLYVISOR_ID_DIR", str(tmp_path / "ids"))
    return Store()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base/etc").mkdir(parents=True)
    return tmp_path / "base"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a-", "A", "a" * 64, ".new-x", "a\n"])
def test_bad_names(store: Store, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Vps.create(name, base="/")
    assert caught.value.field == "name"
    assert not store.root.exists()


def test_create_and_delete_leave_nothing(store: Store, base: Path, tmp_path: Path) -> None:
    first, second = Vps.create("one", base=base), Vps.create("two", base=base)
    assert [vps.name for vps in Vps.all()] == ["one", "two"]
    assert (first.id, second.id) == (1, 2)
    with pytest.raises(StateMismatch, match="already"):
        Vps.create("one", base=base)
    first.delete()
    with pytest.raises(StateMismatch, match="no VPS"):
        Vps("one")
    assert Vps.create("three", base=base).id == 1  # the number is free again
    for vps in Vps.all():
        vps.delete()
    assert os.listdir(store.root) == []
    assert os.listdir(tmp_path / "ids") == [".lock"]


def test_numbers_are_unique_among_roots(store: Store, base: Path, tmp_path: Path) -> None:
    here = Vps.create("one", base=base)
    there = Vps.create("one", base=base, root=tmp_path / "elsewhere")
    assert here.id != there.id
    assert store.known_ids() == {here.id, there.id}


def test_hostname_is_in_the_files(store: Store, base: Path) -> None:
    vps = Vps.create("one", base=base, hostname="front")
    assert (vps.path / "files/upper/etc/hostname").read_text() == "front\n"
    clone = vps.clone("two")
    assert (clone.path / "files/upper/etc/hostname").read_text() == "two\n"


@pytest.mark.parametrize("link", ["etc", "etc/hostname"])
def test_links_of_a_vps_lead_nowhere_on_the_host(
    store: Store, base: Path, tmp_path: Path, link: str
) -> None:
    """Its root may have replaced what we write when it is cloned."""
    vps = Vps.create("one", base=base)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "hostname").write_text("mine")
    place = vps.path / "files/upper" / link
    files.remove(place) if place.is_dir() else place.unlink()
    place.symlink_to(victim if link == "etc" else victim / "hostname")
    vps.clone("two")
    assert (victim / "hostname").read_text() == "mine"
    assert os.listdir(victim) == ["hostname"]


def test_snapshots_are_what_was_there(store: Store, base: Path) -> None:
    vps = Vps.create("one", base=base)
    file = vps.path / "files/upper/file"
    file.write_text("before")
    vps.snapshot("first")
    file.write_text("after")
    with pytest.raises(StateMismatch, match="already"):
        vps.snapshot("first")
    copy = vps.clone("two", snapshot="first")
    assert (copy.path / "files/upper/file").read_text() == "before"
    assert (vps.clone("three").path / "files/upper/file").read_text() == "after"
    vps.restore("first")
    assert file.read_text() == "before"
    assert [one.name for one in vps.snapshots()] == ["first"]
    vps.drop_snapshot("first")
    assert vps.snapshots() == []
    with pytest.raises(StateMismatch, match="no snapshot"):
        vps.restore("first")


@pytest.mark.parametrize("left", [".new-files", ".old-files"])
def test_restore_that_was_killed(store: Store, base: Path, left: str) -> None:
    vps = Vps.create("one", base=base)
    (vps.path / "files/upper/file").write_text("kept")
    if left == ".old-files":
        (vps.path / "files").rename(vps.path / left)
        (vps.path / ".new-files").mkdir()
    else:
        (vps.path / left).mkdir()
    layers.repair(vps.path)
    assert (vps.path / "files/upper/file").read_text() == "kept"
    assert not {".new-files", ".old-files"} & {*os.listdir(vps.path)}


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("layers.create = pause; context.Vps.create('half', base=sys.argv[1])", ["victim"]),
        ("files.remove = pause; context.Vps('victim').delete()", []),
    ],
)
def test_what_killed_programs_leave_goes(
    store: Store, base: Path, tmp_path: Path, step: str, left: list[str]
) -> None:
    """A child stops in the middle of create() or of delete(), and is killed there."""
    Vps.create("victim", base=base)
    script = (
        "import sys, time\n"
        "from polyvisor.vps import context, files, layers\n"
        "def pause(*_): print('here', flush=True); time.sleep(60)\n" + step
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(base)], stdout=subprocess.PIPE, text=True
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "here\n"
            assert [vps.name for vps in Vps.all()] == left, "while it is at it"
            assert any(name.startswith(".") for name in os.listdir(store.root))
        finally:
            child.kill()
    assert [vps.name for vps in Vps.all()] == left
    assert os.listdir(store.root) == left
    assert len(os.listdir(tmp_path / "ids")) == len(left) + 1


def test_two_creators_of_one_name(store: Store, base: Path) -> None:
    """One of many gets the name; the others are told so."""
    script = (
        "import sys\n"
        "from polyvisor import Vps\n"
        "from polyvisor.errors import StateMismatch\n"
        "sys.stdin.readline()\n"
        "try: Vps.create('one', base=sys.argv[1])\n"
        "except StateMismatch: sys.exit(3)\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(base)], stdin=subprocess.PIPE)
        for _ in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.close()
    assert sorted(child.wait(60) for child in children) == [0, 3, 3, 3]
    assert [vps.name for vps in Vps.all()] == ["one"]


def test_bases(store: Store, base: Path, tmp_path: Path) -> None:
    (base / "sbin").mkdir()
    (base / "sbin/init").symlink_to("/lib/systemd/systemd")
    bases = Bases(store)
    assert bases.get(base) == [str(base)]
    kept = bases.add("kept", base)
    assert bases.get("kept") == [kept.path]
    tar = tmp_path / "base.tar.gz"
    with tarfile.open(tar, "w:gz") as archive:
        archive.add(base, ".")
    (unpacked,) = bases.get(tar)
    assert bases.get(tar) == [unpacked], "unpacked once"
    for place in (kept.path, unpacked):
        assert find_init([place]).stop_signal == signal.SIGRTMIN + 3
    vps = Vps.create("one", base="kept")
    with pytest.raises(StateMismatch, match="in use by one"):
        bases.remove("kept")
    vps.delete()
    bases.remove("kept")
    assert [one.name for one in bases.all()] == [Path(unpacked).parent.name]
    for nothing in ("nothing", str(tmp_path / "nothing")):
        with pytest.raises(ConfigError) as caught:
            bases.get(nothing)
        assert caught.value.field == "base"
