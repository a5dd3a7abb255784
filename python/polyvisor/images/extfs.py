"""ext4 file systems in files, by e2fsprogs: made from tars, and read, without mounting anything.

As root everything is done directly; for others, in a user namespace whose root owns the files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from polyvisor.config import show_size
from polyvisor.errors import ConfigError, HostError, ImageError

_TIMEOUT = 1800
#: Space that a file system takes for itself: inodes, bitmaps, and a journal of up to 64 MiB.
_OVERHEAD = 80 << 20


class Tree:
    """A directory tree in the making, owned by root. A context manager: it is gone at the end."""

    def __init__(self) -> None:
        self._helper = () if os.geteuid() == 0 else (_tool("mmdebstrap"), "--unshare-helper")
        self._scratch = Path(tempfile.mkdtemp(prefix="polyvisor-tree-"))
        self._scratch.chmod(0o777)  # the namespace's root is another user to this directory
        self.root = self._scratch / "root"
        self._run(["mkdir", str(self.root)])

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *error: object) -> None:
        self._run(["rm", "-rf", "--one-file-system", str(self.root)])
        self._scratch.rmdir()

    def unpack(self, tar: str | os.PathLike[str] | IO[bytes], *members: str) -> None:
        """Adds the files of a tar, or some of them; links to directories stay what they are.
        Without devices, which a namespace's root may not make: the kernel does that in the guest.
        """
        command = ["tar", "--extract", "--file=-", "--preserve-permissions", "--numeric-owner"]
        command += [
            "--exclude=./dev/*",
            "--keep-directory-symlink",
            f"--directory={self.root}",
            *members,
        ]
        if isinstance(tar, str | os.PathLike):
            with open(tar, "rb") as file:
                self._run(command, stdin=file)
        else:
            self._run(command, stdin=tar)

    def run(self, *argv: str, stdin: bytes = b"") -> None:
        """Runs one of the tree's own programs in it."""
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            self._run([_tool("chroot"), str(self.root), *argv], stdin=file)

    def used(self) -> int:
        """Bytes that its files take on a disk."""
        text = self._run(["du", "--summarize", "--block-size=1", str(self.root)])
        return int(text.split()[0])

    def make_image(self, path: str | os.PathLike[str], size: int, label: str) -> None:
        """Writes the tree as an ext4 file system of `size` bytes. Nothing is left when it fails."""
        needed = _needed(self.used())
        if size < needed:
            raise ConfigError(
                f"an image of {show_size(size)} is too small for this system, which needs "
                f"{show_size(needed)}; give --size {_round(needed)}",
                field="size",
            )
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with open(partial, "xb") as file:
                file.truncate(size)
                partial.chmod(0o666)
                # By number, as the namespace's root may be kept out of the directory it is in.
                self._run(
                    [
                        _tool("mke2fs"), "-q", "-F", "-t", "ext4", "-L", label, "-m", "1",
                        # The file is new: there are no old tables to wipe, here or in the guest.
                        "-E", "assume_storage_prezeroed=1,lazy_itable_init=0",
                        "-d", str(self.root), f"/proc/self/fd/{file.fileno()}",
                    ],
                    keep=file.fileno(),
                )  # fmt: skip
            partial.chmod(0o666 & ~_umask())
            partial.replace(target)
        except OSError as error:
            raise HostError(
                f"cannot write the image {target}: {error.strerror}",
                errno=error.errno or 0,
                path=str(target),
            ) from None
        finally:
            partial.unlink(missing_ok=True)

    def _run(self, command: list[str], stdin: IO[bytes] | None = None, keep: int = -1) -> str:
        try:
            done = subprocess.run(
                [*self._helper, *command],
                stdin=stdin or subprocess.DEVNULL,
                capture_output=True,
                pass_fds=[keep] if keep >= 0 else [],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ImageError(
                f"{command[0]} did not end within {_TIMEOUT} s", reason="build"
            ) from None
        if done.returncode:
            text = done.stderr.decode("utf-8", "replace").strip()
            if "No space left on device" in text:
                raise HostError(
                    f"the disk is full: {os.path.basename(command[0])} could not write all of the "
                    f"image; make room for it",
                    errno=28,
                )
            if "Could not allocate" in text:
                raise ConfigError(
                    "the image is too small for this system; give a larger --size", field="size"
                )
            lines = [line for line in text.splitlines() if line != "E: unshared command failed"]
            last = lines[-1] if lines else f"status {done.returncode}"
            raise ImageError(f"{' '.join(command[:3])} failed: {last}", reason="build")
        return done.stdout.decode("utf-8", "replace")


class Reader:
    """Reads an ext2, ext3 or ext4 file system in a file, `offset` bytes from its start."""

    def __init__(self, path: str | os.PathLike[str], offset: int = 0) -> None:
        self._path = os.fspath(path)
        self._device = f"{self._path}?offset={offset}" if offset else self._path

    def names(self, directory: str) -> dict[str, str]:
        """The entries of a directory, and what each is: "file", "directory", "link" or "other". An
        empty dict when there is no such directory."""
        kinds = {"04": "directory", "10": "file", "12": "link"}
        found = {}
        for line in self._ask(f'ls -p "{directory}"').splitlines():
            parts = line.split("/")
            if len(parts) >= 7 and parts[5] not in (".", "..", ""):
                found[parts[5]] = kinds.get(parts[2][:2], "other")
        return found

    def copy(self, path: str, target: str | os.PathLike[str]) -> None:
        """Copies a regular file out. Raises `ImageError` when there is none or no room."""
        self._ask(f'dump "{path}" "{os.fspath(target)}"')
        if not os.path.isfile(target) or not os.path.getsize(target):
            raise ImageError(
                f"cannot read {path} from the file system in {self._path}",
                path=self._path,
                reason="corrupt",
            )

    def _ask(self, request: str) -> str:
        done = subprocess.run(
            [_tool("debugfs"), "-R", request, self._device],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            timeout=_TIMEOUT,
            check=False,
        )
        complaint = done.stderr.decode("utf-8", "replace")
        if "No space left on device" in complaint:
            raise HostError(
                f"the disk is full: cannot copy out of {self._path}", errno=28, path=self._path
            )
        if "while trying to open" in complaint or "Bad magic number" in complaint:
            raise ImageError(
                f"{self._path} has no file system that e2fsprogs can read",
                path=self._path,
                reason="no-filesystem",
            )
        return done.stdout.decode("utf-8", "surrogateescape")


def _tool(name: str) -> str:
    """A program, also where other users than root do not look for it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        package = {"mke2fs": "e2fsprogs", "debugfs": "e2fsprogs", "chroot": "coreutils"}
        raise ImageError(
            f"this needs {name}; install it with `apt-get install {package.get(name, name)}`",
            reason="no-tool",
        )
    return found


def _needed(used: int) -> int:
    return -(-(used * 107 // 100 + _OVERHEAD) // (1 << 20)) << 20


def _round(size: int) -> str:
    """As a person would write it, and not less."""
    return f"{-(-size // (100 << 20)) * 100}M"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["Reader", "Tree"]
