"""A package archive of our own making, for tests of what is fetched from one."""

from __future__ import annotations

import lzma
import os
import subprocess
from pathlib import Path

import pytest

_FAKE_APT = """#!/bin/sh
# apt-get and apt-cache: the options first, then what to do.
for argument; do
    case $argument in -*) ;; *) break ;; esac
    shift
done
echo "$0 $*" >>"$FAKE_LOG"
case "$1 $2 $3" in
    "show --no-all-versions linux-image-cloud-amd64")
        [ -z "$FAKE_UBUNTU" ] || exit 100
        printf 'Package: linux-image-cloud-amd64\\nVersion: 6.1\\n'
        printf 'Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1)\\n' ;;
    "show --no-all-versions linux-image-virtual")
        [ -n "$FAKE_UBUNTU" ] || exit 100
        printf 'Package: linux-image-virtual\\nVersion: 6.8\\n'
        printf 'Depends: linux-image-6.8.0-7-generic\\n' ;;
    "show --no-all-versions linux-image-6"*)
        printf 'Package: %s\\nVersion: %s\\n' "$3" "${FAKE_VERSION:-6.1.9-1}"
        printf 'Description: Linux\\n longer\\n' ;;
    "update  ")
        [ -z "$FAKE_OFFLINE" ] || { echo 'E: no network' >&2; exit 100; } ;;
    "download "*)
        [ -z "$FAKE_OFFLINE" ] || { echo 'E: Failed to fetch, no network' >&2; exit 100; }
        case "$2" in *"=${FAKE_GONE:-none}") echo 'E: no such version' >&2; exit 100 ;; esac
        cp "$FAKE_DEB" . ;;
    *) echo "E: Unable to locate package $3" >&2; exit 100 ;;
esac
"""


_TREE = "lib/modules/6.1.0-9/"


def _module(name: str, **info: str) -> bytes:
    """As much of a module as says what it is: its section .modinfo."""
    fields = "".join(f"{key}={value}\0" for key, value in info.items())
    return f"\x7fELF the code of {name}\0license=GPL\0{fields}name={name}\0".encode()


#: Modules of the packages. They need each other across all kinds of dependencies.
MODULES = {
    _TREE + "kernel/virtio.ko": _module("virtio", depends="virtio_ring"),
    _TREE + "kernel/virtio_ring.ko": _module("virtio_ring", depends=""),
    _TREE + "kernel/virtio-disk.ko": _module("virtio_disk", depends="virtio,virtio_ring"),
    _TREE + "kernel/fs/fat.ko.xz": lzma.compress(_module("fat", depends="")),
    _TREE + "kernel/fs/vfat.ko.xz": lzma.compress(
        _module("vfat", depends="fat", softdep="pre: crypto-sum post: later", alias="fs-vfat")
    ),
    _TREE + "kernel/sum-fast.ko": _module("sum_fast", depends="", alias="crypto-sum"),
    _TREE + "kernel/sum-other.ko": _module("sum_other", depends="", alias="crypto-sum"),
    _TREE + "kernel/sum-generic.ko": _module("sum_generic", depends="", alias="crypto-sum"),
    _TREE + "modules.builtin": b"kernel/fs/ext4/ext4.ko\nkernel/drivers/tty/serial-core.ko\n",
    _TREE + "modules.builtin.modinfo": b"ext4.alias=fs-ext4\0ext4.license=GPL\0",
}


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH whose apt knows two packages, both the same .deb; returns the log of calls."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("apt-get", "apt-cache"):
        (tools / name).write_text(_FAKE_APT)
        (tools / name).chmod(0o755)
    root = tmp_path / "deb"
    files = {"boot/vmlinuz-6.1.0-9": b"the kernel", "boot/config": b"x", **MODULES}
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        "Package: k\nVersion: 1\nArchitecture: all\nMaintainer: t <t@t>\nDescription: t\n"
    )
    deb = tmp_path / "k.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", root, deb], check=True, capture_output=True
    )
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_DEB", str(deb))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "log"
