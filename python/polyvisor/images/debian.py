"""`build`: a disk image with a complete Debian, made without root and without mounting anything.

    polyvisor.images.build("debian.img", size="1G", packages=["git"])

The root file system comes from mmdebstrap (rootfs.py), the kernel and its modules from the package
that `exec` has its kernel from, and everything becomes a file system by mke2fs (extfs.py).
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from polyvisor.config import parse_size
from polyvisor.errors import ConfigError, HostError
from polyvisor.images import initramfs, modules, packages, rootfs
from polyvisor.images.extfs import Tree

#: Where a built image has its own initial RAM disk, for the kernel of the release that follows, and
#: what it says about itself.
INITRD = "/boot/polyvisor-initrd-"
RELEASE = "/etc/polyvisor-image.json"
#: What the initrd loads: all that a root file system can be behind, and shared folders.
_EARLY = ("virtio_pci", "virtio_mmio", "virtio_blk", "ext4", "virtiofs")
_NETWORK = """\
# Whatever network card there is asks for an address.
[Match]
Type=ether

[Network]
DHCP=yes

# The image has a name of its own, and no daemon needs to start to set another.
[DHCPv4]
UseHostname=no
"""
_FSTAB = """\
# The initial RAM disk has mounted it already.
/dev/vda / ext4 defaults,errors=remount-ro 0 0
"""
_HVC = """\
# A login on the first virtio console, when there is one.
SUBSYSTEM=="tty", KERNEL=="hvc0", TAG+="systemd", ENV{SYSTEMD_WANTS}+="serial-getty@hvc0.service"
"""
_AUTOLOGIN = """\
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 - $TERM
"""
#: What cannot work: there is no screen, no memory that survives a reset, and no LVM to snapshot.
_MASKED = (
    "getty@tty1.service",
    "systemd-pstore.service",
    "e2scrub_reap.service",
    "e2scrub_all.timer",
)


class Built(msgspec.Struct, frozen=True):
    """An image that `build` made."""

    path: str
    size: int
    suite: str
    kernel: str
    hostname: str
    #: The files with the keys that may log in as root by ssh.
    ssh_keys: list[str]
    #: The root password is that of `build`; without one, root logs in on the console without.
    password: bool


def build(
    output: str | os.PathLike[str],
    *,
    size: int | str = "1G",
    suite: str = "bookworm",
    packages: Sequence[str] = (),
    hostname: str = "debian",
    root_password: str | None = None,
    ssh_keys: Sequence[str | os.PathLike[str]] | None = None,
    autologin: bool = False,
    mirror: str = "",
    refresh: bool = False,
    force: bool = False,
    progress: packages.Progress | None = None,
) -> Built:
    """Builds an image with Debian `suite` and further `packages`, a raw ext4 file system.

    `ssh_keys` are files of public keys that may log in as root; None takes those of the user
    (~/.ssh/id_*.pub). Without `root_password` root logs in on the console without one, and by ssh
    with a key only. `autologin` leaves the console's login out. `refresh` gets the present packages
    instead of those in the cache. An `output` that exists is replaced only with `force`.

    Raises `ConfigError` for values that cannot be used (field "size": it is too small, and the
    message says what is needed), `ImageError` when mmdebstrap or e2fsprogs are missing or fail, and
    `HostError` when the disk is full.
    """
    report = progress or (lambda text: None)
    target = Path(output)
    _check_target(target, force)
    _check_hostname(hostname)
    if root_password is not None and (not root_password or {"\n", "\0"} & set(root_password)):
        raise ConfigError(
            "a root password has at least one character, and is one line", field="root_password"
        )
    bytes_ = parse_size(size, "size") // 4096 * 4096
    keys = _find_keys() if ssh_keys is None else [Path(path) for path in ssh_keys]
    authorized = "".join(_read_key(path) for path in keys)
    base = rootfs.fetch(suite, packages, mirror=mirror, refresh=refresh, progress=progress)
    kernel, known = modules.fetch("cloud", progress=progress)
    initrd = initramfs.for_disk(known.closure(_EARLY))
    about = {"suite": suite, "kernel": kernel.package, "version": kernel.version, "date": base.date}

    files = _Files(base.date)
    files.add("etc/hostname", f"{hostname}\n")
    files.add("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n::1 localhost\n")
    files.add("etc/fstab", _FSTAB)
    files.add("etc/systemd/network/80-ethernet.network", _NETWORK)
    files.add("etc/udev/rules.d/80-polyvisor.rules", _HVC)
    files.add(INITRD + kernel.release, initrd)
    files.add(RELEASE, msgspec.json.encode(about))
    if authorized:
        files.add("root/.ssh/authorized_keys", authorized, 0o600)
    if root_password is not None:
        files.add("etc/ssh/sshd_config.d/polyvisor.conf", "PermitRootLogin yes\n")
    if autologin:
        files.add("etc/systemd/system/serial-getty@.service.d/autologin.conf", _AUTOLOGIN)
    enabled = ["systemd-networkd.service"]
    enabled += _add_agent(files)

    report("unpacking the root file system")
    with Tree() as tree:
        tree.unpack(base.tar)
        report("unpacking the kernel's modules")
        tree.unpack(known.tar, "./lib/modules", "./boot")
        with tempfile.TemporaryFile() as archive:
            files.write(archive)
            tree.unpack(archive)
        release = kernel.release
        tree.run("touch", "/dev/null")  # for programs that want one
        tree.run("ln", "-sf", f"vmlinuz-{release}", "/boot/vmlinuz")
        tree.run("depmod", release)
        tree.run("sh", "-c", _DNS)
        tree.run("systemctl", "--quiet", "enable", *enabled)
        tree.run("systemctl", "--quiet", "mask", *_MASKED)
        # Users and caches are as the packages have them: the first boot need not look.
        tree.run("touch", "/etc/.updated", "/var/.updated")
        # A machine that others have the key of is nobody's: each image has its own.
        tree.run("sh", "-c", "rm -f /etc/ssh/ssh_host_*; ssh-keygen -q -A; : >/etc/machine-id")
        if root_password is None:
            tree.run("passwd", "--quiet", "--delete", "root")
        else:
            tree.run("chpasswd", stdin=f"root:{root_password}\n".encode())
        tree.run("rm", "/dev/null")
        report("making the file system")
        tree.make_image(target, bytes_, "polyvisor")
    return Built(
        path=str(target),
        size=bytes_,
        suite=suite,
        kernel=kernel.package,
        hostname=hostname,
        ssh_keys=[str(path) for path in keys],
        password=root_password is not None,
    )


#: mmdebstrap left the host's name server, which a guest may not reach. This one is that of user
#: networking; with systemd-resolved the file is a link already, and DHCP says who it is.
_DNS = (
    "test -L /etc/resolv.conf || printf 'nameserver 10.0.2.3\\n' >/etc/resolv.conf; "
    "rm -f /boot/System.map-*"
)


class _Files:
    """The image's own files, all of them root's."""

    def __init__(self, date: int) -> None:
        self._date = date
        self._members: dict[str, tarfile.TarInfo] = {}
        self._data: dict[str, bytes] = {}

    def add(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        """A file, and the directories above it (0700 above a file that only root may read)."""
        name = path.lstrip("/")
        parts = name.split("/")
        for depth in range(1, len(parts)):
            directory = tarfile.TarInfo("/".join(parts[:depth]))
            directory.type = tarfile.DIRTYPE
            directory.mode = 0o700 if name.startswith("root/") else 0o755
            self._members.setdefault(directory.name, directory)
        member = tarfile.TarInfo(name)
        member.mode = mode
        self._members[name] = member
        self._data[name] = content.encode() if isinstance(content, str) else content

    def write(self, file: IO[bytes]) -> None:
        """Writes the tar, and goes back to its start."""
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, member in self._members.items():
                data = self._data.get(name, b"")
                member.size, member.mtime = len(data), self._date
                archive.addfile(member, io.BytesIO(data))
        file.seek(0)


def _add_agent(files: _Files) -> list[str]:
    """The program that runs commands for the host (`Machine.agent`), and its unit."""
    here = Path(__file__).resolve().parent.parent / "guest"
    program, unit = here / "agent-x86_64", here / "polyvisor-agent.service"
    if not program.is_file() or not unit.is_file():
        return []
    files.add("usr/sbin/polyvisor-agent", program.read_bytes(), 0o755)
    files.add("etc/systemd/system/polyvisor-agent.service", unit.read_bytes())
    return ["polyvisor-agent.service"]


def _check_target(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise ConfigError(
            f"{target} exists; give --force to replace it (force=True in Python)", field="output"
        )
    if not target.parent.is_dir():
        raise HostError(
            f"there is no directory {target.parent} for the image", errno=2, path=str(target)
        )


def _check_hostname(name: str) -> None:
    import re

    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,62}(?<!-))?", name):
        raise ConfigError(
            f"{name!r} is no host name: letters, digits and hyphens, at most 63", field="hostname"
        )


def _find_keys() -> list[Path]:
    return sorted(Path.home().glob(".ssh/id_*.pub"))


def _read_key(path: Path) -> str:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"cannot read the ssh key {path}: {reason}", field="ssh_keys") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or any("PRIVATE KEY" in line for line in lines):
        raise ConfigError(
            f"{path} is no public ssh key; give the file that ends in .pub", field="ssh_keys"
        )
    return "".join(f"{line}\n" for line in lines)


__all__ = ["INITRD", "RELEASE", "Built", "build"]
