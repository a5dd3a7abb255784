"""unify: what each VPS sees stays, whatever its files are; and the disk has less of them."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyvisor.errors import HostError
from polyvisor.vps.unify import Tree, copy_layer, unify

pytestmark = pytest.mark.needs_root

VPSES = 3
TIME = 1_600_000_000_000_000_000
CONTENTS = [b"", b"a", b"b" * 5000, b"c" * 5000, bytes(9000) + b"d"]


class Machine:
    """Some VPSs over one base; `model` has plain directories with what they should have."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.base = place / "base"
        self.store = place / "store"
        self.base.mkdir()
        for path in ("d/x", "d/y", "d/e/z", "f", "g"):
            (self.base / path).parent.mkdir(parents=True, exist_ok=True)
            (self.base / path).write_bytes(path.encode() * 1000)
        for path in [*self.base.rglob("*"), self.base]:
            os.utime(path, ns=(TIME, TIME))
        for number in range(VPSES):
            for name in ("upper", "work", "merged"):
                self.of(number, name).mkdir(parents=True)
            subprocess.run(["cp", "-a", self.base, self.of(number, "model")], check=True)

    def of(self, number: int, name: str) -> Path:
        return self.place / str(number) / name

    def trees(self, running: frozenset[int] = frozenset()) -> list[Tree]:
        return [
            Tree(str(n), self.of(n, "upper"), self.of(n, "shared"), n in running)
            for n in range(VPSES)
        ]

    @contextmanager
    def mounted(self, number: int) -> Iterator[Path]:
        at = self.of(number, "merged")
        shared = self.of(number, "shared")
        lower = f"{shared}:{self.base}" if shared.is_dir() else str(self.base)
        upper, work = self.of(number, "upper"), self.of(number, "work")
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        mount("overlay", at, options)
        try:
            yield at
        finally:
            unmount(at)

    def views(self) -> list[dict[str, object]]:
        found = []
        for number in range(VPSES):
            with self.mounted(number) as at:
                found.append(view(at))
        return found

    def difference(self, before: list[dict[str, object]]) -> object:
        """Where the VPSs are not as they were before, or as their models."""
        for number, now in enumerate(self.views()):
            then, model = before[number], view(self.of(number, "model"))
            for path in {*now, *then, *model}:
                if now.get(path) != then.get(path):
                    return number, path, now.get(path), then.get(path)
                # (The kernel decides about holes when it copies a file up into a layer.)
                if without_holes(now.get(path)) != without_holes(model.get(path)):
                    return number, path, now.get(path), model.get(path)
        return None

    def disk(self) -> int:
        seen = {}
        for top in [*(self.of(n, d) for n in range(VPSES) for d in ("upper", "shared"))]:
            for path in [*top.rglob("*"), *([top] if top.exists() else [])]:
                seen[path.lstat().st_ino] = path.lstat().st_blocks * 512
        for path in self.store.rglob("*"):
            seen[path.lstat().st_ino] = path.lstat().st_blocks * 512
        return sum(seen.values())


_LIBC = ctypes.CDLL(None, use_errno=True)


def mount(kind: str, at: Path, options: str) -> None:
    status = _LIBC.mount(b"test", bytes(at), kind.encode(), 0, options.encode())
    assert status == 0, os.strerror(ctypes.get_errno())


def unmount(at: Path) -> None:
    assert _LIBC.umount2(bytes(at), 0) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, which has nothing to wait for."""
    mount("tmpfs", tmp_path, "size=1g")
    yield tmp_path
    unmount(tmp_path)


def view(top: Path) -> dict[str, object]:
    """All that is seen of the files below `top`."""
    found: dict[str, object] = {}
    names: dict[int, list[str]] = {}
    for directory, folders, files in os.walk(top):
        for name in [".", *folders, *files]:
            path = Path(directory, name)
            status = path.lstat()
            relative = str(path.relative_to(top))
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = {"bytes": path.read_bytes(), "holes": holes(path)}
                names.setdefault(status.st_ino, []).append(relative)
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            marks = {
                mark: os.getxattr(path, mark, follow_symlinks=False)
                for mark in os.listxattr(path, follow_symlinks=False)
            }
            when = status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0
            owner = status.st_uid, status.st_gid
            found[relative] = (status.st_mode, owner, status.st_rdev, when, content, marks)
    found["hard links"] = sorted(tuple(sorted(group)) for group in names.values())
    return found


def without_holes(seen: object) -> object:
    if not isinstance(seen, tuple):
        return seen
    return [part["bytes"] if isinstance(part, dict) and "bytes" in part else part for part in seen]


def holes(path: Path) -> list[int]:
    """Where data and holes begin."""
    places = []
    with path.open("rb") as file, suppress(OSError):
        at = 0
        for whence in itertools.cycle((os.SEEK_DATA, os.SEEK_HOLE)):
            at = os.lseek(file.fileno(), at, whence)
            places.append(at)
    return places


def step(top: Path, action: str, path: str, other: str, number: int) -> None:
    """One thing that a program in a VPS may do; what cannot be done is left."""
    this, that = top / path, top / other
    if this.is_fifo() and action in ("write", "append", "overwrite", "sparse", "no directory"):
        return  # nobody is at its other end, which opening it waits for
    with suppress(OSError):
        match action:
            case "write":
                this.write_bytes(CONTENTS[number % len(CONTENTS)])
            case "append":
                with this.open("r+b") as file:
                    file.seek(0, os.SEEK_END)
                    file.write(b"more")
            case "overwrite":
                with this.open("r+b") as file:
                    file.write(b"!")
            case "sparse":
                with this.open("wb") as file:
                    file.truncate(1 << 20)
                    file.seek(1 << 18)
                    file.write(b"x" * 4096)
            case "remove":
                this.unlink()
            case "directory":
                this.mkdir()
            case "no directory":
                shutil.rmtree(this)
            case "rename":
                if not this.is_dir():
                    os.rename(this, that)
            case "link":
                os.link(this, that)
            case "symlink":
                os.symlink(other, this)
            case "mode":
                os.chmod(this, 0o600 if number % 2 else 0o4755)
            case "owner":
                os.chown(this, number % 3, number % 2)
            case "mark":
                os.setxattr(this, "user.note", b"%d" % (number % 2))
            case "fifo":
                os.mkfifo(this)
        if this.is_file():  # also by way of a link
            os.utime(this, ns=(TIME, TIME))


ACTIONS = ["write"] * 8 + ["append", "overwrite", "sparse", "remove", "directory", "directory"]
ACTIONS += ["no directory", "rename", "link", "symlink", "mode", "owner", "mark", "fifo"]
PATHS = ["f", "g", "h", "d", "d/x", "d/y", "d/n", "d/e", "d/e/z", "d/e/n", "n", "n/x", "n/y", "n/m"]
actions = st.tuples(
    st.sampled_from(ACTIONS),
    st.sampled_from(PATHS),
    st.sampled_from(PATHS),
    st.integers(0, 59),
)
#: Those of all VPSs, then of one of them.
rounds = st.tuples(
    st.lists(actions, max_size=12),
    st.lists(st.tuples(st.integers(0, VPSES - 1), actions), max_size=6),
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rounds, min_size=1, max_size=4))
def test_what_a_vps_sees_is_unchanged(
    memory: Path, done: list[tuple[list[tuple], list[tuple]]]
) -> None:
    place = memory / "machine"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    machine = Machine(place)
    for every, some in done:
        for number in range(VPSES):
            mine = [*every, *(action for owner, action in some if owner == number)]
            with machine.mounted(number) as at:
                for action in mine:
                    step(at, *action)
            for action in mine:
                step(machine.of(number, "model"), *action)
        before, views = machine.disk(), machine.views()
        report = unify(machine.trees(), machine.store)
        assert machine.disk() == before - report.saved_bytes
        assert machine.difference(views) is None


def populate(machine: Machine) -> None:
    """The same in each: new files, changed ones, opaque directories, whiteouts."""
    script = [
        ("write", "h", "", 2),
        ("write", "d/x", "", 3),
        ("remove", "f", "", 0),
        ("no directory", "d/e", "", 0),
        ("directory", "d/e", "", 0),
        ("write", "d/e/n", "", 2),
        ("directory", "n", "", 0),
        ("write", "n/x", "", 3),
        ("sparse", "n/y", "", 3),
        ("mark", "n/x", "", 1),
    ]
    for number in range(VPSES):
        with machine.mounted(number) as at:
            for one in script:
                step(at, *one)


def test_what_it_saves(machine: Machine) -> None:
    populate(machine)
    before, views = machine.disk(), machine.views()
    report = unify(machine.trees(), machine.store)
    # h, d/x, d/e/n, n/x and n/y of the second and third.
    assert (report.method, report.files, report.unified) == ("layers", 15, 10)
    assert report.saved_bytes == before - machine.disk()
    assert machine.views() == views
    inodes = {machine.of(n, "shared").joinpath("n/x").stat().st_ino for n in range(VPSES)}
    assert len(inodes) == 1
    assert unify(machine.trees(), machine.store).unified == 0
    # One that nobody has a link to any more goes.
    for number in range(VPSES):
        with machine.mounted(number) as at:
            (at / "h").unlink()
    before = machine.disk()
    assert unify(machine.trees(), machine.store).saved_bytes == before - machine.disk() > 0


def test_one_that_runs_is_left_alone(machine: Machine) -> None:
    populate(machine)
    with machine.mounted(1) as at:
        before = view(at)
        report = unify(machine.trees(running=frozenset({1})), machine.store)
        assert report.skipped == ("1",)
        assert report.unified == 5
        assert not machine.of(1, "shared").exists()
        assert view(at) == before


def test_a_write_stays_with_its_vps(machine: Machine) -> None:
    populate(machine)
    unify(machine.trees(), machine.store)
    views = machine.views()
    with machine.mounted(0) as at:
        for path in ("h", "n/x", "n/y"):
            (at / path).write_bytes(b"mine")
        shutil.rmtree(at / "d")
    assert machine.views()[1:] == views[1:]


def test_copies_of_a_layer(machine: Machine) -> None:
    populate(machine)
    unify(machine.trees(), machine.store)
    views = machine.views()
    copy = machine.place / "copy"
    copy_layer(machine.of(0, "shared"), copy)
    shutil.rmtree(machine.of(0, "shared"))
    os.rename(copy, machine.of(0, "shared"))
    assert machine.views() == views
    with pytest.raises(HostError):
        copy_layer(machine.of(0, "shared"), machine.of(1, "shared"))


STEPS = ["link", "unlink", "rename", "mkdir", "rmdir", "setxattr", "removexattr", "utime"]


def killed(action: Callable[[], object], calls: int) -> bool:
    """Whether a process that does `action` was killed, as it is before its system call `calls`."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    try:
        counted = itertools.count()

        def mortal(real: Callable[..., object]) -> Callable[..., object]:
            def called(*arguments: object, **options: object) -> object:
                if next(counted) == calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return called

        for name in STEPS:
            setattr(os, name, mortal(getattr(os, name)))
        action()
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_again_and_again(memory: Path) -> None:
    machine = Machine(memory)
    populate(machine)
    unify(machine.trees(), machine.store)
    with machine.mounted(0) as at:  # something to clean up, too
        (at / "h").write_bytes(b"new" * 3000)
        shutil.rmtree(at / "n")
    with machine.mounted(1) as at:
        (at / "h").write_bytes(b"new" * 3000)
        (at / "d/y").write_bytes(b"new" * 3000)
    for number in (0, 1):
        os.utime(machine.of(number, "upper") / "h", ns=(TIME, TIME))
    views = machine.views()
    calls = 0
    # Each one has the state that the one before left.
    while killed(lambda: unify(machine.trees(), machine.store), calls):
        calls += 1
        assert machine.views() == views
    assert calls > 4
    assert machine.views() == views
    assert unify(machine.trees(), machine.store).unified == 0
    assert not (machine.store / "fresh").exists()


def test_killed_at_every_step(memory: Path) -> None:
    """From the beginning each time."""
    machine = Machine(memory)
    populate(machine)
    views = machine.views()
    saved = memory / "saved"
    vpses = [str(number) for number in range(VPSES)]
    saved.mkdir()
    subprocess.run(["cp", "-a", *(memory / name for name in vpses), saved], check=True)
    for calls in itertools.count():
        for name in vpses:
            shutil.rmtree(memory / name)
        shutil.rmtree(machine.store, ignore_errors=True)
        subprocess.run(["cp", "-a", *(saved / name for name in vpses), memory], check=True)
        alive = not killed(lambda: unify(machine.trees(), machine.store), calls)
        assert machine.views() == views
        unify(machine.trees(), machine.store)
        assert machine.views() == views
        assert len({machine.of(n, "shared").joinpath("h").stat().st_ino for n in range(3)}) == 1
        if alive:
            break
    assert calls > 20


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_shared_extents(tmp_path: Path, kind: str) -> None:
    """Where the file system can: VPSs that run take part, and files that differ in their owners."""
    if not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"needs mkfs.{kind}")
    image, at = tmp_path / "image", tmp_path / "at"
    image.write_bytes(b"")
    os.truncate(image, 512 << 20)
    at.mkdir()
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, at], check=True)
    try:
        trees = [Tree(str(n), at / str(n) / "upper", at / str(n) / "shared", True) for n in (0, 1)]
        large = os.urandom(20 << 20)
        for n, tree in enumerate(trees):
            tree.upper.mkdir(parents=True)
            (tree.upper / "large").write_bytes(large)
            (tree.upper / "other").write_bytes(b"%d" % n * 8192)
            (tree.upper / "small").write_bytes(b"same")
            os.link(tree.upper / "large", tree.upper / "name")
            os.chown(tree.upper / "large", n, n)
        os.sync()
        views = [view(tree.upper) for tree in trees]
        before = used(at)
        report = unify(trees, at / "store")
        assert (report.method, report.unified, report.saved_bytes) == ("extents", 1, 20 << 20)
        os.sync()
        assert before - used(at) > 18 << 20
        assert [view(tree.upper) for tree in trees] == views
        assert unify(trees, at / "store").unified == 0
        with (trees[0].upper / "large").open("r+b") as file:
            file.write(b"mine")
        assert view(trees[1].upper) == views[1]
    finally:
        subprocess.run(["umount", at], check=True)


def used(at: Path) -> int:
    status = os.statvfs(at)
    return (status.f_blocks - status.f_bfree) * status.f_frsize
