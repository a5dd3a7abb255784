"""The files of a process VM: folders of the host at places of its tree, and folders of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from polyvisor.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    AnyPath = str | os.PathLike[str]
    #: Place in the program's tree, path of the host, whether it may be written to.
    Mount = tuple[str, str, bool]
    #: What has to be in a folder so that something can be mounted there: path, whether a folder.
    Place = tuple[str, bool]
    _Contents = dict[str, dict[str, tuple[int, int, int, int]]]
    #: Place in the tree, path of the host, whether it may be written to, whether it is a folder.
    _Grant = tuple[str, str, bool, bool]

#: What of the host a program finds when it is given no root folder: programs and libraries.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/mime.types")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
#: Where /dev leads to what a program has open.
DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}
#: The folders that every program has of its own, by name, and where.
OWN = {"work": "/work", "tmp": "/tmp", "shm": "/dev/shm"}
#: Places of what the monitor makes up itself.
MADE = ("/proc", "/sys")


class ProcessTree:
    """Which files a program finds where; `close()` when the program is gone.

    Raises `ConfigError` for what cannot be given to it.
    """

    #: Later ones over earlier ones.
    mounts: list[Mount]

    def __init__(
        self,
        root: AnyPath | None,
        ro: Iterable[AnyPath | tuple[AnyPath, str]],
        rw: Iterable[AnyPath | tuple[AnyPath, str]],
        files: Mapping[str, bytes | str],
    ) -> None:
        if root is not None and not os.path.isdir(root):
            raise ConfigError(f"there is no folder {root} to be a process's root", field="root")
        grants = [*_grants(ro, False), *_grants(rw, True)]
        self._folder = _store.take(_places_in_own(grants))
        self._clean = weakref.finalize(self, _remove, self._folder, os.getpid())
        try:
            top = "" if root is None else os.path.realpath(root)
            self.mounts = [("/", top, False), *(_store.system() if root is None else ())]
            self.mounts += [(at, f"{self._folder}/{name}", True) for name, at in OWN.items()]
            places = self._give(grants)
            if root is None:
                self.mounts[0] = ("/", _store.skeleton(places, self._folder), False)
            self._put(files)
        except BaseException:
            self.close()
            raise

    def _give(self, grants: Iterable[_Grant]) -> list[Place]:
        """Mounts more of the host. Returns what the root folder needs for that, if it is ours."""
        missing: list[Place] = []
        for where, host, writable, is_folder in grants:
            at, path = self._find(where)
            if at in OWN.values():
                _make_place(path, is_folder)
            elif at == "/" and not self.mounts[0][1]:
                missing.append((where, is_folder))
            elif not os.path.exists(path):
                raise _no_place(where)
            self.mounts.append((where, host, writable))
        return missing

    def _find(self, path: str) -> tuple[str, str]:
        """The mount that a path of the tree is in, and its path on the host, by mounts alone."""
        at, host, _ = max(
            (m for m in self.mounts if (path + "/").startswith(m[0].rstrip("/") + "/")),
            key=lambda mount: len(mount[0]),
        )
        return at, host + path[len(at.rstrip("/")) :]

    def on_host(self, path: str) -> str:
        """The host's path of a path of the tree, as far as mounts tell."""
        return self._find(path)[1]

    def _put(self, files: Mapping[str, bytes | str]) -> None:
        work = f"{self._folder}/work"
        for name, content in files.items():
            path = os.path.normpath(os.path.join(work, name))
            if not path.startswith(work + "/"):
                raise ConfigError(
                    f"{name!r} is no name of a file in /work: files have relative names without "
                    "'..'",
                    field="files",
                )
            if "/" in name:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)

    @property
    def own_mounts(self) -> list[Mount]:
        """Those that no other tree has."""
        return [(at, f"{self._folder}/{name}", True) for name, at in OWN.items()]

    def freeze(self) -> FrozenTree:
        """Its own folders as they are now."""
        return FrozenTree(self._folder)

    @classmethod
    def copy_of(cls, frozen: FrozenTree) -> ProcessTree:
        """A tree with folders of its own, and the same in them; its other mounts are the
        original's."""
        self = cls.__new__(cls)
        self._folder = _store.take()
        self._clean = weakref.finalize(self, _remove, self._folder, os.getpid())
        self.mounts = self.own_mounts
        try:
            self.restore(frozen)
        except BaseException:
            self.close()
            raise
        return self

    def restore(self, frozen: FrozenTree) -> None:
        """Its own folders become what they were then."""
        for name in OWN:
            ours, original = f"{self._folder}/{name}", frozen.folder(name)
            if not original:
                _empty(ours)
            elif _manifest(ours) != _manifest(original):
                _empty(ours)
                shutil.copytree(original, ours, symlinks=True, dirs_exist_ok=True)

    def close(self) -> None:
        """Its own folders are gone, with all that is in them."""
        if (ours := self._clean.detach()) and ours[2][1] == os.getpid():
            _store.give_back(self._folder)


class FrozenTree:
    """What was in a tree's own folders."""

    def __init__(self, folder: str) -> None:
        self._full = [name for name in OWN if os.listdir(f"{folder}/{name}")]
        self._folder = _store.take() if self._full else ""
        if self._folder:
            weakref.finalize(self, _remove, self._folder, os.getpid())
        for name in self._full:
            shutil.copytree(
                f"{folder}/{name}", f"{self._folder}/{name}", symlinks=True, dirs_exist_ok=True
            )

    def folder(self, name: str) -> str:
        """Where it is; "" for an empty one."""
        return f"{self._folder}/{name}" if name in self._full else ""


class _Store:
    """Folders of this host process. Making and removing them takes longer than starting a program,
    so what is empty again is used again, and all trees that look the same share their root."""

    _MOST_IDLE = 32
    _MOST_SKELETONS = 64

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Everything there is belongs to the parent."""
        self._folder = ""
        self._idle: dict[tuple[Place, ...], list[str]] = {}
        self._made: dict[str, tuple[tuple[Place, ...], _Contents]] = {}
        self._skeletons: dict[tuple[Place, ...], str] = {}
        self._system: list[Mount] = []

    def _make(self) -> str:
        if not self._folder:
            self._folder = tempfile.mkdtemp(prefix="polyvisor-process-")
            weakref.finalize(self, _remove, self._folder, os.getpid())
        return tempfile.mkdtemp(dir=self._folder)

    def take(self, places: tuple[Place, ...] = ()) -> str:
        """A folder with one for each of OWN, in which there are these places and nothing else."""
        if folders := self._idle.get(places):
            return folders.pop()
        folder = self._make()
        for name in OWN:
            os.mkdir(f"{folder}/{name}")
        for at, is_folder in places:
            name = next(name for name, own in OWN.items() if at.startswith(own + "/"))
            _make_place(f"{folder}/{name}{at[len(OWN[name]) :]}", is_folder)
        self._made[folder] = (places, _contents(folder))
        return folder

    def give_back(self, folder: str) -> None:
        """Nobody uses it any more."""
        places, made = self._made.get(folder, ((), None))
        if made and sum(map(len, self._idle.values())) < self._MOST_IDLE:
            try:
                if self._restored(folder, places, made):
                    self._idle.setdefault(places, []).append(folder)
                    return
            except OSError:
                pass
        self._made.pop(folder, None)
        shutil.rmtree(folder, ignore_errors=True)

    def _restored(self, folder: str, places: tuple[Place, ...], made: _Contents) -> bool:
        """Whether there is again in it what there was, so that the next program finds no trace."""
        found = _contents(folder)
        if found[""] != made[""]:
            return False
        if found != made:
            if places:
                return False
            for name in OWN:
                _empty(f"{folder}/{name}")
        return True

    def system(self) -> list[Mount]:
        """What every program finds that is given no root folder."""
        if not self._system:
            self._system = [
                (path, path, False)
                for path in (*SYSTEM, *SYSTEM_FILES, *DEVICES)
                if not _is_link_of_system(path) and os.path.exists(path)
            ]
        return self._system

    def skeleton(self, places: Iterable[Place], own: str) -> str:
        """A root folder with a place for all of system(), and these; in `own` when it is one too
        many to be kept."""
        key = tuple(places)
        made = self._skeletons.get(key)
        if made is not None:
            return made
        keep = len(self._skeletons) < self._MOST_SKELETONS
        folder = self._make() if keep else tempfile.mkdtemp(dir=own)
        # A place for it, so that listing the folder shows it.
        for path, _, _ in self.system():
            _make_place(folder + path, os.path.isdir(path))
        for path in SYSTEM:
            if _is_link_of_system(path):
                os.symlink(os.readlink(path), folder + path)  # /bin is usr/bin
        for place, target in DEVICE_LINKS.items():
            os.symlink(target, folder + place)
        for place in (*OWN.values(), *MADE):
            os.mkdir(folder + place)
        for path, is_folder in key:
            try:
                _make_place(folder + path, is_folder)
            except OSError:  # behind a link of SYSTEM
                raise _no_place(path) from None
        if keep:
            self._skeletons[key] = folder
        return folder


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: str) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _manifest(folder: str) -> dict[str, tuple[int, int, int]]:
    """Mode, size, and time of the last change in ns, by relative path."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = f"{parent}/{name}"
            about = os.lstat(path)  # copytree() keeps modes and times
            size = 0 if name in folders else about.st_size
            found[path.removeprefix(folder)] = (about.st_mode, size, about.st_mtime_ns)
    return found


def _contents(folder: str) -> _Contents:
    """What is in it: for each folder, by relative path, the names, and of each of them mode, owner,
    group, and size, which for a folder says nothing."""
    found: _Contents = {}
    waiting = [""]
    while waiting:
        path = waiting.pop()
        found[path] = names = {}
        with os.scandir(folder + path) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                is_folder = entry.is_dir(follow_symlinks=False)
                size = 0 if is_folder else about.st_size
                names[entry.name] = (about.st_mode, about.st_uid, about.st_gid, size)
                if is_folder:
                    waiting.append(f"{path}/{entry.name}")
    return found


def _grants(given: Iterable[AnyPath | tuple[AnyPath, str]], writable: bool) -> Iterable[_Grant]:
    """What of the host goes where."""
    for one in given:
        host, place = one if isinstance(one, tuple) else (one, None)
        host = os.path.abspath(host)
        if not os.path.exists(host):
            kind = "rw" if writable else "ro"
            raise ConfigError(f"there is no {host} to give to a process", field=kind)
        where = os.path.normpath(place or host)
        if not where.startswith("/"):
            raise ConfigError(
                f"{where!r} is no place in a process's tree: places are absolute paths",
                field="place",
            )
        yield "/" + where.lstrip("/"), host, writable, os.path.isdir(host)


def _places_in_own(grants: Iterable[_Grant]) -> tuple[Place, ...]:
    """What the folders of OWN need, where something is to be mounted in them; but for what is in
    something else that is mounted there."""
    found: list[Place] = []
    for where, _, _, is_folder in grants:
        inside = any(where.startswith(own + "/") for own in OWN.values())
        if inside and not any((where + "/").startswith(place + "/") for place, _ in found):
            found.append((where, is_folder))
    return tuple(found)


def _no_place(where: str) -> ConfigError:
    return ConfigError(
        f"a process's tree has no {where} to put anything at; make it, or choose another place",
        field="place",
    )


def _is_link_of_system(path: str) -> bool:
    return path in SYSTEM and os.path.islink(path)


def _make_place(path: str, is_folder: bool) -> None:
    """What is mounted somewhere needs something there."""
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.mkdir(path) if is_folder else Path(path).touch()


_store = _Store()
