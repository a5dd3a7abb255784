"""Kernel modules, from the very package that a kernel in the cache is from.

    kernel, modules = modules.fetch("cloud")
    for module in modules.closure(["virtio_blk"]):     # in the order to load them
        module.name, module.data

A package has thousands of modules, of which a guest wants a few. Its files are kept as one tar, not
compressed, with an index of what depends on what: asking for a few reads a few.
"""

from __future__ import annotations

import os
import re

import msgspec

from polyvisor.errors import ConfigError, ImageError
from polyvisor.images import cache, packages
from polyvisor.images import kernel as kernels

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import IO

    from polyvisor.machine import Machine

_LAYOUT = 1  # goes into the cache's key: raise it when the index changes
_TAR, _INDEX = "package.tar", "index.json"
_MODULE = re.compile(r"(?:\./)?(?:usr/)?(lib/modules/[^/]+/kernel/.+\.ko)(\.xz|\.zst|\.gz)?$")
#: What a module says of itself (its section .modinfo): depends=, softdep=, alias=.
_INFO = re.compile(rb"\0(depends|softdep|alias)=([^\0]*)(?=\0)")


#: Linux's drivers, by the numbers of virtio device types (virtio 1.2, 5) and by transport.
DRIVERS = {
    1: "virtio_net",
    2: "virtio_blk",
    3: "virtio_console",
    4: "virtio_rng",
    5: "virtio_balloon",
    19: "vmw_vsock_virtio_transport",
    26: "virtiofs",
}
TRANSPORTS = {"pci": "virtio_pci", "mmio": "virtio_mmio"}


class _Entry(msgspec.Struct, array_like=True):
    """A module in the tar: where it is, and what has to be loaded before it."""

    path: str
    offset: int
    size: int
    compression: str
    before: list[str]


class _Index(msgspec.Struct):
    modules: dict[str, _Entry]
    #: Other names, such as crypto-crc32c, of a module or of something built in. Those of hardware
    #: are left out.
    aliases: dict[str, str]
    builtin: list[str]


class Module(msgspec.Struct, frozen=True):
    """One module: its name as Linux shows it, its path below /, and its file's content."""

    name: str
    path: str
    data: bytes


class Modules:
    """The modules of one kernel."""

    def __init__(self, kernel: kernels.Kernel, directory: str) -> None:
        self.kernel = kernel
        self.tar = os.path.join(directory, _TAR)
        with open(os.path.join(directory, _INDEX), "rb") as file:
            self._index = msgspec.json.decode(file.read(), type=_Index)

    @property
    def names(self) -> list[str]:
        """Of all modules, sorted; what is built into the kernel is not among them."""
        return sorted(self._index.modules)

    def closure(self, names: Iterable[str]) -> list[Module]:
        """The named modules and all that they need, in the order to load them. What is built into
        the kernel is left out. Raises `ConfigError` for a name that the kernel does not have."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            if name in order:
                return
            for needed in self._index.modules[name].before:
                visit(needed)
            order[name] = None

        for name in names:
            found = self._find(name)
            if found is not None:
                visit(found)
        with open(self.tar, "rb") as tar:
            return [self._read(tar, name) for name in order]

    def _find(self, name: str) -> str | None:
        """The module's own name; None when it is built in."""
        own = _normal(name)
        if own not in self._index.modules:
            own = self._index.aliases.get(name, own)
        if own in self._index.modules:
            return own
        if own in self._index.builtin:
            return None
        import difflib

        near = difflib.get_close_matches(own, [*self._index.modules, *self._index.builtin])
        hint = f"; there is {', '.join(near)}" if near else ""
        raise ConfigError(
            f"the kernel {self.kernel.package} has no module {name!r}{hint}", field="modules"
        )

    def _read(self, tar: IO[bytes], name: str) -> Module:
        entry = self._index.modules[name]
        tar.seek(entry.offset)
        return Module(name, entry.path, _decompress(tar.read(entry.size), entry.compression))


def drivers(machine: Machine) -> list[str]:
    """The modules that a machine's virtio devices want."""
    found: dict[str, None] = {}
    for place in machine.native.virtio_places():
        found[TRANSPORTS[place.transport]] = None
        if place.type in DRIVERS:
            found[DRIVERS[place.type]] = None
    return list(found)


def fetch(
    kernel: str = "cloud", *, progress: packages.Progress | None = None
) -> tuple[kernels.Kernel, Modules]:
    """A kernel by name (see `kernel.NAMES`) and its modules, downloaded on first use.

    When the archive no longer has the package that the kernel in the cache is from, the kernel is
    replaced by the present one. Raises what `kernel.fetch` raises.
    """
    found = kernels.fetch(kernel, progress=progress)
    try:
        return found, _of(found, progress)
    except ImageError as error:
        if error.reason not in ("download", "no-package"):
            raise
    found = kernels.fetch(kernel, refresh=True, progress=progress)
    return found, _of(found, progress)


def _of(kernel: kernels.Kernel, progress: packages.Progress | None) -> Modules:
    def make(directory: Path) -> None:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory(prefix="polyvisor-apt-") as scratch:
            apt = packages.Apt(kernel.architecture, Path(scratch), progress or (lambda text: None))
            # (Ubuntu has the modules in a package of their own.)
            for name in (kernel.package, kernel.package.replace("-image-", "-modules-")):
                deb = apt.download(f"{name}={kernel.version}")
                packages.save_tar(deb, directory / _TAR)
                index = _make_index(directory / _TAR)
                if index.modules:
                    break
            else:
                raise ImageError(f"the package {kernel.package} has no modules", reason="corrupt")
        (directory / _INDEX).write_bytes(msgspec.json.encode(index))

    entry = f"modules/{_LAYOUT}-{kernel.package}-{kernel.architecture}-{kernel.version}"
    return Modules(kernel, cache.entry_path(entry, make))


def _make_index(tar: Path) -> _Index:
    import tarfile

    index = _Index({}, {}, [])
    soft: list[tuple[str, list[str]]] = []
    builtin_aliases: dict[str, str] = {}
    try:
        with tarfile.open(tar, mode="r:") as archive:
            for member in archive:
                if member.name.endswith("/modules.builtin"):
                    content = archive.extractfile(member)
                    assert content is not None
                    index.builtin = [
                        _normal(os.path.basename(line).removesuffix(".ko"))
                        for line in content.read().decode().split()
                    ]
                elif member.name.endswith("/modules.builtin.modinfo"):
                    content = archive.extractfile(member)
                    assert content is not None
                    for line in content.read().decode("utf-8", "replace").split("\0"):
                        owner, _, alias = line.partition(".alias=")
                        builtin_aliases[alias] = owner
                found = _MODULE.match(member.name)
                if not found or not member.isfile():
                    continue
                name = _normal(os.path.basename(found[1]).removesuffix(".ko"))
                content = archive.extractfile(member)
                assert content is not None
                compression = found[2] or ""
                entry = _Entry(found[1], member.offset_data, member.size, compression, [])
                index.modules[name] = entry
                for key, value in _INFO.findall(_decompress(content.read(), compression)):
                    text = value.decode("utf-8", "replace")
                    if key == b"depends":
                        entry.before = [_normal(word) for word in text.split(",") if word]
                    elif key == b"softdep" and text.startswith("pre:"):
                        soft.append((name, text[4:].partition("post:")[0].split()))
                    elif key == b"alias" and ":" not in text and "*" not in text:
                        # Of several ways to do it, the one that every CPU can.
                        if text not in index.aliases or name.endswith("_generic"):
                            index.aliases[text] = name
    except tarfile.TarError as error:
        raise ImageError(f"{tar.name} is corrupt: {error}", reason="corrupt") from error
    index.aliases |= builtin_aliases  # what is there already is what the kernel takes
    for name, wanted in soft:
        for word in wanted:
            own = _normal(word)
            first = own if own in index.modules else index.aliases.get(word, "")
            if first in index.modules and first != name:
                index.modules[name].before.append(first)
    return index


def _normal(name: str) -> str:
    """Linux takes - and _ in a module's name for the same."""
    return name.replace("-", "_")


def _decompress(data: bytes, compression: str) -> bytes:
    if compression == ".xz":
        import lzma

        return lzma.decompress(data)
    if compression == ".gz":
        import gzip

        return gzip.decompress(data)
    if compression == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


__all__ = ["DRIVERS", "TRANSPORTS", "Module", "Modules", "drivers", "fetch"]
