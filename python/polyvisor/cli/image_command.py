"""`polyvisor image`."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from polyvisor.cli import output, status
from polyvisor.config import show_size
from polyvisor.errors import ConfigError, Error

#: What of the cache is listed: the folder, and what is in it.
_KINDS = {
    "kernels": "kernel",
    "modules": "kernel modules",
    "rootfs": "root file system",
    "boot": "kernel of an image",
    "vmlinux": "unpacked kernel",
    "initramfs": "initramfs",
    "packages": "package",
}


def build(*, as_json: bool, password: str | None, **options: Any) -> int:
    """Builds an image; says what it is, and how to start it."""
    from polyvisor import images

    progress = output.Progress()
    started = time.monotonic()
    try:
        built = images.build(root_password=_password(password), progress=progress, **options)
    except Error as error:
        progress("")
        if as_json:
            code = status.report(error)
            details = {"type": type(error).__name__, "message": str(error)}
            output.write_json({"path": str(options["output"]), "status": code, "error": details})
            return code
        raise
    finally:
        progress("")
    seconds = time.monotonic() - started
    if as_json:
        output.write_json({**msgspec.structs.asdict(built), "seconds": round(seconds, 1)})
        return status.OK
    keys = f"by ssh with {', '.join(built.ssh_keys)}" if built.ssh_keys else "by ssh with no key"
    login = "with its password" if built.password else "without a password"
    lines = [
        f"{built.path}: Debian {built.suite}, {show_size(built.size)}, {built.kernel}, "
        f"in {seconds:.0f} s",
        f"root logs in on the console {login}, and {keys}",
        f"start it: polyvisor run --disk {built.path} --net user,hostfwd=tcp:127.0.0.1:2222-:22",
    ]
    output.write_all(1, ("\n".join(lines) + "\n").encode())
    return status.OK


def info(path: Path, image_format: str | None, *, as_json: bool) -> int:
    """Says what an image is and what it boots."""
    from polyvisor.images import bootable, disk

    kind = disk.format_of(path, image_format)
    found = bootable.find(path, kind)
    stat = path.stat()
    about = bootable.describe(path, kind)
    details = {
        "path": str(path),
        "format": kind,
        "size": stat.st_size,
        "allocated": stat.st_blocks * 512,
        "root": found.root,
        "kernel": found.release,
        "initrd": "polyvisor" if found.ours else "its own",
        "cmdline": found.cmdline,
        "built": about,
    }
    if as_json:
        output.write_json(details)
        return status.OK
    origin = "not built by polyvisor"
    if about:
        date = time.strftime("%Y-%m-%d", time.gmtime(int(about["date"])))
        origin = f"Debian {about['suite']}, packages of {date}"
    sizes = f"{show_size(stat.st_size)}, of which {_about(stat.st_blocks * 512)} are on the disk"
    text = (
        f"{path}: {kind}, {sizes}\n  system   {origin}\n"
        f"  kernel   {found.release}, initial RAM disk: {details['initrd']}\n"
        f"  root     /dev/{found.root}\n  cmdline  {found.cmdline}\n"
    )
    output.write_all(1, text.encode())
    return status.OK


def list_cache(*, as_json: bool) -> int:
    """Lists what is in the cache, by the names that `remove` takes."""
    entries = [_entry(place) for place in _places()]
    if as_json:
        output.write_json({"cache": str(_root()), "entries": entries})
        return status.OK
    width = max((len(entry["name"]) for entry in entries), default=0)
    lines = [
        f"{entry['name']:{width}}  {_about(entry['size']):>10}  {entry['what']}"
        for entry in entries
    ]
    total = _about(sum(entry["size"] for entry in entries))
    lines.append(f"{_root()}: {total}; all of it is fetched or made again when it is needed")
    output.write_all(1, ("\n".join(lines) + "\n").encode())
    return status.OK


def remove(names: list[str], *, everything: bool) -> int:
    """Removes entries of the cache."""
    places = {_name(place): place for place in _places()}
    if everything:
        names = list(places)
    elif not names:
        raise ConfigError(
            "give the names that `polyvisor image list` shows, or --all", field="name"
        )
    for name in names:
        if name not in places:
            raise ConfigError(
                f"there is no {name!r} in the cache; `polyvisor image list` shows what there is",
                field="name",
            )
    for name in names:
        shutil.rmtree(places[name])
        lock = places[name].with_name(places[name].name + ".lock")
        lock.unlink(missing_ok=True)
    return status.OK


def _root() -> Path:
    from polyvisor.images import cache

    return cache.root()


def _places() -> list[Path]:
    root = _root()
    return sorted(
        place
        for kind in _KINDS
        for place in (root / kind).glob("*")
        if place.is_dir() and (place / "manifest").is_file()
    )


def _about(size: int) -> str:
    """A size that nobody needs to the byte."""
    return show_size(-(-size // (1 << 20)) << 20) if size > 1 << 20 else show_size(size)


def _name(place: Path) -> str:
    return f"{place.parent.name}/{place.name}"


def _entry(place: Path) -> dict[str, Any]:
    files = [path.stat() for path in place.iterdir() if path.is_file()]
    what = _KINDS[place.parent.name]
    info = place / "info.json"
    if info.is_file():
        known = msgspec.json.decode(info.read_bytes())
        about = known.get("package") or f"Debian {known.get('suite')}"
        what += f": {about} {known.get('version', '')}".rstrip()
    return {
        "name": _name(place),
        "what": what,
        "size": sum(file.st_blocks * 512 for file in files),
        "date": int(max((file.st_mtime for file in files), default=0)),
    }


def _password(given: str | None) -> str | None:
    """ "-" reads it from stdin, so that it is not on the command line, which everybody can see."""
    if given != "-":
        return given
    if os.isatty(0):
        import getpass

        return getpass.getpass("root's password: ")
    return sys.stdin.readline().rstrip("\n")
