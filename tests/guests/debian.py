"""A disk image with Debian for tests, built once; the packages come from the cache."""

from __future__ import annotations

import subprocess
from pathlib import Path

from polyvisor import images


def build(directory: Path) -> Path:
    """debian.img, and beside it the ssh key `key` that logs in as root."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key"], check=True
    )
    image = directory / "debian.img"
    images.build(image, packages=["git"], ssh_keys=[directory / "key.pub"], hostname="tested")
    return image
