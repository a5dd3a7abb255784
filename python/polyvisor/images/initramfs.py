"""The initramfs of `polyvisor exec`: busybox, polyvisor's init, and the command to run.

Two cpio archives, one behind the other: the user space, which is the same for every command and
kept in the cache, and init with the command, a few kilobytes made for each run. Neither is
compressed: unpacking would cost the guest more than reading the bytes.
"""

from __future__ import annotations

import os

from polyvisor.errors import ConfigError, ImageError
from polyvisor.images import cache
from polyvisor.images.cpio import Archive
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Literal

    from polyvisor.images.modules import Module

    Architecture = Literal["amd64", "i386"]
    AnyPath = str | os.PathLike[str]

#: What the command finds in its environment unless told otherwise.
DEFAULT_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/sh",
    "TERM": "dumb",
}
#: guest/command.h has the same limits.
MAX_ARGUMENTS = 4096
MAX_VARIABLES = 1024
MAX_COMMAND = (2 << 20) - 1

_BUSYBOX_ADVICE = (
    "which is the guest's user space; install it with `apt-get install busybox-static`, "
    "or set POLYVISOR_BUSYBOX to a static one"
)
_LAYOUT = 2  # goes into the cache's key: raise it when base_archive() changes
_DIRECTORIES = ("bin", "sbin", "usr/bin", "usr/sbin", "etc", "proc", "sys", "dev", "run", "mnt")


class Command(Record):
    """What init runs in the guest, as root."""

    arguments: Sequence[str]
    #: Added to DEFAULT_ENVIRONMENT; a value of None takes a variable out.
    environment: Mapping[str, str | None] = {}
    directory: str = "/root"
    hostname: str = "polyvisor"
    #: Run it on a pseudo-terminal, stdout and stderr together, instead of on pipes.
    terminal: bool = False
    #: Of the terminal: rows and columns. None: 24 and 80.
    terminal_size: tuple[int, int] | None = None
    #: Numbers of the user and the group that it runs as.
    user: int = 0
    group: int = 0


def build(
    command: Command | None,
    *,
    architecture: Architecture = "amd64",
    files: Mapping[str, bytes] | None = None,
    modules: Sequence[Module] = (),
    busybox: AnyPath | None = None,
    init: AnyPath | None = None,
) -> bytes:
    """The whole initramfs. `files` are added as they are (path to content, mode 0755), `modules`
    loaded in their order before anything runs.

    Without a command, init starts a shell on the first serial port. Raises `ImageError` when
    busybox or init is missing, `ConfigError` for a command that no program can be given.
    """
    archive = Archive()
    archive.file("init", _read(init or _init_path(architecture)), 0o755)
    load = _loads(modules)
    if command is not None:
        load += encode(command)
    if load:
        archive.file(".polyvisor/command", load, 0o600)
    for module in modules:
        archive.file(module.path, module.data)
    for path, data in (files or {}).items():
        archive.file(path, data, 0o755)
    base = base_archive(busybox or _busybox_path(architecture))
    return base + archive.finish()


def for_disk(modules: Sequence[Module], architecture: Architecture = "amd64") -> bytes:
    """An initramfs for a guest whose root file system is on a disk: loads `modules`, mounts what
    the kernel's command line says (guest/root.h) and starts the system there."""
    archive = Archive()
    archive.file("init", _read(_init_path(architecture)), 0o755)
    for name in ("proc", "sys", "dev"):
        archive.directory(name)
    archive.device("dev/console", 5, 1)
    archive.file(".polyvisor/command", _loads(modules) + b"r\0", 0o600)
    for module in modules:
        archive.file(module.path, module.data)
    return archive.finish()


def _loads(modules: Sequence[Module]) -> bytes:
    return b"".join(os.fsencode(f"m/{module.path}") + b"\0" for module in modules)


def encode(command: Command) -> bytes:
    """The command as init reads it (guest/command.h)."""
    arguments = list(command.arguments)
    if not arguments:
        raise ConfigError("there is no command to run; give a program's name", field="argv")
    environment: dict[str, str | None] = {**DEFAULT_ENVIRONMENT, **command.environment}
    variables = {name: value for name, value in environment.items() if value is not None}
    for name in variables:
        if not name or "=" in name:
            raise ConfigError(f"{name!r} is no name for an environment variable", field="env")
    if len(arguments) > MAX_ARGUMENTS or len(variables) > MAX_VARIABLES:
        raise ConfigError(
            f"a command can have {MAX_ARGUMENTS} arguments and {MAX_VARIABLES} environment "
            f"variables, not {len(arguments)} and {len(variables)}",
            field="argv",
        )
    records = ["d" + command.directory, "h" + command.hostname]
    if command.terminal:
        rows, columns = command.terminal_size or (24, 80)
        records.append(f"t{rows} {columns}")
    if command.user or command.group:
        records += [f"u{command.user}", f"g{command.group}"]
    records += ["e" + name + "=" + value for name, value in variables.items()]
    records += ["a" + argument for argument in arguments]
    for record in records:
        if "\0" in record:
            raise ConfigError(
                f"{record[1:]!r} has a NUL character, which no argument can have", field="argv"
            )
    data = b"".join(os.fsencode(record) + b"\0" for record in records)
    if len(data) > MAX_COMMAND:
        raise ConfigError(
            f"the command and its environment have {len(data)} bytes; at most {MAX_COMMAND} can be "
            f"passed, send more by stdin",
            field="argv",
        )
    return data


def base_archive(busybox: AnyPath) -> bytes:
    """Busybox with a link for each of its applets, and the directories of a Linux system."""
    # By what changes when the file does: to sum two megabytes for every machine takes longer.
    version = _version(busybox)

    def make(directory: Path) -> None:
        if not is_static(busybox):
            raise ImageError(
                f"{busybox} needs shared libraries that the guest does not have, {_BUSYBOX_ADVICE}",
                path=str(busybox),
                reason="dynamic",
            )
        archive = Archive()
        for name in _DIRECTORIES:
            archive.directory(name)
        archive.directory("root", 0o700)
        archive.directory("tmp", 0o1777)
        archive.device("dev/console", 5, 1)
        archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        archive.file("etc/group", b"root:x:0:\ntty:x:5:\n")
        archive.file("etc/hosts", b"127.0.0.1 localhost polyvisor\n")
        archive.file("bin/busybox", _read(busybox), 0o755)
        for applet in _applets(busybox):
            if applet != "bin/busybox":
                archive.symlink(applet, "/bin/busybox")
        (directory / "base.cpio").write_bytes(archive.finish())

    place = cache.entry_path(f"initramfs/{_LAYOUT}-{version}", make)
    return _read(os.path.join(place, "base.cpio"))


def find_init(architecture: Architecture) -> Path:
    """The init that was built with polyvisor, for a kernel of the given architecture."""
    from pathlib import Path

    return Path(_init_path(architecture))


def _init_path(architecture: Architecture) -> str:
    name = {"amd64": "init-x86_64", "i386": "init-i386"}[architecture]
    directory = os.path.join(os.path.dirname(os.path.dirname(__file__)), "guest")
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
        raise ImageError(
            f"polyvisor's own {name} is missing from {directory}; build it with `make build`",
            path=path,
            reason="missing",
        )
    return path


def find_busybox(architecture: Architecture) -> Path:
    """A static busybox: POLYVISOR_BUSYBOX, this host's, or (other architectures) the archive's."""
    from pathlib import Path

    return Path(_busybox_path(architecture))


def _busybox_path(architecture: Architecture) -> str:
    given = os.environ.get("POLYVISOR_BUSYBOX")
    if given and architecture == "amd64":
        return given
    if architecture != "amd64":
        from polyvisor.images import packages

        return str(packages.fetch("busybox-static", architecture, _keep_busybox) / "busybox")
    for directory in ("/bin", "/usr/bin", *os.get_exec_path()):
        found = os.path.join(directory, "busybox")
        if os.path.isfile(found) and os.access(found, os.X_OK):
            return found
    raise ImageError(f"there is no busybox here, {_BUSYBOX_ADVICE}", reason="missing")


def _keep_busybox(unpacked: Path, directory: Path) -> None:
    import shutil

    for name in ("bin/busybox", "usr/bin/busybox"):
        if (unpacked / name).is_file():
            shutil.copyfile(unpacked / name, directory / "busybox")
            return
    raise ImageError("the package busybox-static has no busybox", reason="corrupt")


def is_static(path: AnyPath) -> bool:
    """No PT_INTERP: nothing else is needed to run it."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with open(path, "rb") as file:
            segments = ELFFile(file).iter_segments()
            return all(segment["p_type"] != "PT_INTERP" for segment in segments)
    except (OSError, ELFError):
        return False


def _applets(busybox: AnyPath) -> list[str]:
    """Where busybox wants its links, as "usr/bin/env"; asked of the program itself."""
    import subprocess

    for program in (busybox, "/bin/busybox", "/usr/bin/busybox"):
        # The second and third: a host that cannot run the guest's (i386) programs asks its own.
        try:
            listing = subprocess.run(
                [program, "--list-full"], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return sorted(set(listing.stdout.split()) - {"init", "linuxrc", "sbin/init"})
    raise ImageError(
        f"{busybox} does not say which applets it has; is it a busybox for this machine?",
        path=str(busybox),
        reason="corrupt",
    )


def _version(path: AnyPath) -> str:
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return f"{found.st_size:x}-{found.st_mtime_ns:x}"


def _read(path: AnyPath) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: AnyPath, error: OSError) -> ImageError:
    return ImageError(f"cannot read {path}: {error.strerror}", path=str(path), reason="unreadable")
