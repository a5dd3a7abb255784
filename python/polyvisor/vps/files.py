"""Trees of files that belong to a VPS's users: unpacked, copied, measured and removed.

As root this is done directly. Others have these files in a user namespace only, where they are root
and the ids of /etc/subuid are the other users; so it is done by programs in one.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from pathlib import Path

from polyvisor.errors import HostError, ImageError

_TIMEOUT = 1800


def remove(path: Path) -> None:
    """Removes a tree, on one file system and following no link."""
    if os.geteuid() == 0:
        shutil.rmtree(path, ignore_errors=True)
    else:
        # What was never anybody else's needs no namespace.
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            run("chmod", "-R", "u+rwX", str(path), check=False)
            run("rm", "-rf", "--one-file-system", str(path))
    if path.exists():
        raise HostError(f"cannot remove {path}; is something mounted in it?", path=str(path))


def copy(source: Path, target: Path) -> None:
    """Copies a tree to a place that does not exist, with owners, times, links, devices (overlayfs
    marks removed files so) and attributes; contents are shared where the file system can."""
    run("cp", "--archive", "--reflink=auto", "--no-target-directory", str(source), str(target))


def unpack(tar: Path, target: Path) -> None:
    """Unpacks a tar (compressed as GNU tar knows it) into a directory. Device files are left out:
    a VPS has its own /dev."""
    run(
        "tar", "--extract", f"--file={tar}", f"--directory={target}", "--preserve-permissions",
        "--numeric-owner", "--xattrs", "--xattrs-include=security.capability",
        "--exclude=./dev/*", "--exclude=dev/*", "--keep-directory-symlink",
    )  # fmt: skip


def used(*trees: Path) -> int:
    """Bytes that the files take on the disk, those with several links once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    places = [os.fspath(tree) for tree in trees]
    while places:
        try:
            entries = list(os.scandir(places.pop()))
        except OSError:  # removed meanwhile, or another user's
            continue
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                places.append(entry.path)
    return total


def replace_file(tree: Path, path: str, text: str) -> None:
    """Writes a file in a tree whose owner is not trusted: no link in `path` is followed. Its
    directories are made; what cannot be a directory any more is left alone, and so is the file."""
    *parents, name = path.strip("/").split("/")
    place = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parent in parents:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent, 0o755, dir_fd=place)
            try:
                below = os.open(
                    parent,
                    os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                    dir_fd=place,
                )
            except OSError:
                return
            os.close(place)
            place = below
        fresh = f".{name}.polyvisor"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=place)
        file = os.open(
            fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=place
        )
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)
        try:
            os.rename(fresh, name, src_dir_fd=place, dst_dir_fd=place)
        except OSError:
            os.unlink(fresh, dir_fd=place)
    finally:
        os.close(place)


def id_map(kind: str) -> list[tuple[int, int, int]]:
    """The ids of this ordinary user in a VPS: (inside, outside, count), `kind` "uid" or "gid". Root
    there is the user, the others are of /etc/subuid or /etc/subgid, of which 65535 are needed.

    Raises `HostError` when there is no such range.
    """
    me = os.getuid()
    own = me if kind == "uid" else os.getgid()
    name = pwd.getpwuid(me).pw_name
    table = Path(f"/etc/sub{kind}")
    lines = table.read_text().splitlines() if table.exists() else []
    for line in lines:
        owner, _, range_ = line.partition(":")
        start, _, count = range_.partition(":")
        if owner in (name, str(me)) and start.isdigit() and count.isdigit():
            return [(0, own, 1), (1, int(start), min(int(count), 65535))]
    raise HostError(
        f"{table} has no range of ids for {name}, which the users of a VPS need; as root, "
        f"`usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}`",
        path=str(table),
    )


def run(*argv: str, check: bool = True) -> str:
    """Runs a program of the host as root, in a user namespace if we are not; returns its output."""
    helper: list[str] = []
    if os.geteuid() != 0:
        helper = [_tool("unshare"), "--user", "--map-root-user", "--map-auto", "--"]
    try:
        done = subprocess.run(
            [*helper, _tool(argv[0]), *argv[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ImageError(f"{argv[0]} did not end within {_TIMEOUT} s", reason="build") from None
    text = done.stderr.decode("utf-8", "replace").strip()
    if check and done.returncode:
        if "No space left on device" in text:
            raise HostError(f"the disk is full: {argv[0]} failed; make room there", errno=28)
        last = text.splitlines()[-1] if text else f"status {done.returncode}"
        raise HostError(f"{' '.join(argv[:2])} failed: {last}", path=argv[-1])
    return done.stdout.decode("utf-8", "replace")


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise HostError(f"this needs the program {name}; install the package that has it")
    return found


__all__ = ["copy", "id_map", "remove", "replace_file", "run", "unpack", "used"]
