"""Kernels by name, from the distribution's own packages, cached.

    path = kernel.fetch("cloud").image     # Debian's cloud kernel: a bzImage

On Ubuntu, which has no such packages, its own kernels of the same kind take their place.
"""

from __future__ import annotations

import os

from polyvisor.errors import ConfigError, ImageError
from polyvisor.images import cache
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from polyvisor.images import packages
    from polyvisor.images.initramfs import Architecture


class Source(Record):
    """Where a named kernel comes from: the first of `packages` that the host's sources have."""

    architecture: Architecture
    packages: tuple[str, ...]
    description: str


NAMES = {
    "cloud": Source(
        "amd64",
        ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm"),
        "the distribution's kernel for virtual machines",
    ),
    "generic": Source(
        "amd64",
        ("linux-image-amd64", "linux-image-generic"),
        "the distribution's kernel for any PC",
    ),
    "686": Source("i386", ("linux-image-686",), "Debian's kernel for 32-bit PCs"),
}


class Kernel(Record):
    """A kernel in the cache."""

    name: str
    architecture: Architecture
    directory: str

    @property
    def image_path(self) -> str:
        """The bzImage, as text."""
        return os.path.join(self.directory, "vmlinuz")

    @property
    def image(self) -> Path:
        """The bzImage."""
        from pathlib import Path

        return Path(self.image_path)

    @property
    def package(self) -> str:
        """The name of the package that it is from."""
        return self._info["package"]

    @property
    def version(self) -> str:
        """That package's version."""
        return self._info["version"]

    @property
    def release(self) -> str:
        """What the kernel calls itself (`uname -r`), and its modules' folder is called."""
        return self._info["release"]

    @property
    def _info(self) -> dict[str, str]:
        import json

        with open(os.path.join(self.directory, "info.json"), "rb") as file:
            info: dict[str, str] = json.load(file)
        return info


def fetch(
    name: str = "cloud", *, refresh: bool = False, progress: packages.Progress | None = None
) -> Kernel:
    """The kernel called `name` (see NAMES), downloaded on first use.

    `refresh` fetches the present version though another is in the cache. `progress` is told what is
    being done when it takes longer than a moment. Raises `ImageError` when the host has no such
    package or cannot download it, `HostError` when the cache cannot be written.
    """
    if name not in NAMES:
        raise ConfigError(
            f"there is no kernel called {name!r}; choose one of {', '.join(NAMES)}, or give a file",
            field="kernel",
        )
    source = NAMES[name]
    report = progress or (lambda text: None)

    def make(directory: Path) -> None:
        # (Most calls find it in the cache, and need none of this.)
        import tempfile
        from pathlib import Path

        from polyvisor.images import packages

        with tempfile.TemporaryDirectory(prefix="polyvisor-apt-") as scratch:
            apt = packages.Apt(source.architecture, Path(scratch), report)
            found = apt.find(source.packages)
            deb = apt.download(found.real)
            report(f"unpacking {found.real}")
            unpacked = Path(scratch) / "unpacked"
            packages.unpack(deb, unpacked, r"(usr/)?(boot/|lib/modules/[^/]+/)(vmlinuz|config)")
            _keep(unpacked, directory, found)

    place = cache.entry_path(f"kernels/{name}", make, refresh=refresh)
    return Kernel(name, source.architecture, place)


def cached(name: str = "cloud") -> bool:
    """Whether `fetch` would need no network."""
    return (cache.root() / "kernels" / name / "info.json").is_file()


def _keep(unpacked: Path, directory: Path, found: packages.Found) -> None:
    import json
    import re
    import shutil

    images = [path for path in unpacked.rglob("vmlinuz*") if path.is_file()]
    if not images:
        raise ImageError(f"the package {found.real} has no vmlinuz", reason="corrupt")
    image = images[0]
    shutil.copyfile(image, directory / "vmlinuz")
    os.chmod(directory / "vmlinuz", 0o644)
    release = re.sub(r"^vmlinuz-?", "", image.name)
    info = {"package": found.real, "version": found.version, "release": release}
    (directory / "info.json").write_text(json.dumps(info, indent=1))
