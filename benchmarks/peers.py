"""Other virtual machines that boot the kernel and initramfs of `polyvisor exec`, to /init.

The guest's init says on its second serial port that it is ready. Each of these reads that port and
takes the process's CPU clock at that moment.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from measure import peer, process_cpu
from polyvisor.guest.command import DEFAULT_CMDLINE
from polyvisor.images import initramfs, kernel, vmlinux

#: The beginning of what init sends (guest/channel.h).
READY = b"PVX1"
_BOCHS_SHARE = Path("/usr/share/bochs")
#: Of ISOLINUX and its module, as Debian and Ubuntu install them.
_LOADER = (
    Path("/usr/lib/ISOLINUX/isolinux.bin"),
    Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"),
)


@dataclass(frozen=True)
class Guest:
    """What `polyvisor exec -- true` boots, as files for the others."""

    bzimage: Path
    unpacked: Path
    initrd: Path
    cmdline: str = DEFAULT_CMDLINE
    memory_mib: int = 512


@dataclass(frozen=True)
class Boot:
    """How far it came, and the CPU seconds that took."""

    cpu: float
    ready: bool
    #: What the guest wrote on its console meanwhile.
    console: str = ""


def guest(directory: Path) -> Guest:
    """The kernel from the cache (downloaded when it is not there), the initramfs made anew."""
    image = kernel.fetch("cloud").image
    initrd = directory / "initrd"
    initrd.write_bytes(initramfs.build(initramfs.Command(["true"])))
    return Guest(image, vmlinux.cached(image), initrd)


def qemu(given: Guest, image: Path, limit: float = 60) -> Boot:
    """QEMU with TCG, its engine that needs no hardware; gives up after `limit` CPU seconds.

    Without the devices that it adds unasked, which would cost it time."""
    command = [
        *(peer("qemu-system-x86_64"), "-M", "q35", "-accel", "tcg,thread=single", "-cpu", "max"),
        *("-m", str(given.memory_mib), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-kernel", str(image), "-initrd", str(given.initrd), "-append", given.cmdline),
        *("-serial", "null", "-serial", "stdio"),
    ]
    said = b""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            while READY not in said and (cpu := process_cpu(process.pid)) < limit:
                if not select.select([process.stdout], [], [], 0.5)[0]:
                    continue
                data = os.read(process.stdout.fileno(), 4096)
                cpu = process_cpu(process.pid)
                if not data:
                    break
                said += data
        finally:
            process.kill()
    return Boot(cpu, READY in said)


def qemu_kvm(given: Guest, image: Path, limit: float) -> float:
    """Wall seconds from the start of QEMU with KVM, and no device that it adds unasked, to init."""
    command = [
        *(peer("qemu-system-x86_64"), "-M", "q35", "-accel", "kvm", "-cpu", "host"),
        *("-m", str(given.memory_mib), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-kernel", str(image), "-initrd", str(given.initrd), "-append", given.cmdline),
        *("-serial", "null", "-serial", "stdio"),
    ]
    start, said = time.monotonic(), b""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            while READY not in said:
                left = start + limit - time.monotonic()
                if not select.select([process.stdout], [], [], max(left, 0))[0]:
                    raise TimeoutError(f"QEMU did not get to /init in {limit:g} s")
                data = os.read(process.stdout.fileno(), 4096)
                if not data:
                    raise ChildProcessError("QEMU ended before /init")
                said += data
            return time.monotonic() - start
        finally:
            process.kill()


def bochs(given: Guest, directory: Path, limit: float) -> Boot:
    """Debian's Bochs, which needs a disk to boot from; gives up after `limit` CPU seconds.

    Its build has a debugger, which has to be told to go on, and of the displays that need no
    screen only the one for terminals works.
    """
    program = peer("bochs-bin")
    console, channel = directory / "com1", directory / "com2"
    for old in (console, channel):
        old.unlink(missing_ok=True)
    (directory / "commands").write_text("continue\n")
    (directory / "bochsrc").write_text(
        f"megs: {given.memory_mib}\n"
        f"romimage: file={_BOCHS_SHARE}/BIOS-bochs-latest\n"
        f"vgaromimage: file={_BOCHS_SHARE}/VGABIOS-lgpl-latest\n"
        f"ata0-master: type=cdrom, path={_iso(given, directory)}, status=inserted\n"
        f"com1: enabled=1, mode=file, dev={console}\n"
        f"com2: enabled=1, mode=file, dev={channel}\n"
        f"log: {directory}/log\n"
        "boot: cdrom\n"
        "display_library: term\n"
        "config_interface: textconfig\n"
        "sound: waveoutdrv=dummy\n"
        "speaker: enabled=1, mode=none\n"
        "cpu: count=1, ips=50000000\n"  # near its real speed: what its clocks go by
        "clock: sync=none\n"
        "panic: action=fatal\n"
    )
    ours, its = pty.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while os.read(ours, 65536):
                pass

    process = subprocess.Popen(
        [program, "-q", "-f", str(directory / "bochsrc"), "-rc", str(directory / "commands")],
        stdin=its,
        stdout=its,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(its)
    reader = threading.Thread(target=drain)
    reader.start()
    cpu, ready = 0.0, False
    try:
        while not ready and cpu < limit and process.poll() is None:
            time.sleep(0.02)
            ready = channel.exists() and READY in channel.read_bytes()
            cpu = process_cpu(process.pid)
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(ours)
    said = console.read_text(errors="replace") if console.exists() else ""
    return Boot(cpu, ready, said)


def _iso(given: Guest, directory: Path) -> Path:
    """A bootable CD with the kernel and the initramfs."""
    for path in _LOADER:
        if not path.exists():
            pytest.skip(f"{path} is missing: Bochs has nothing to boot with")
    tree, image = directory / "cd", directory / "cd.iso"
    (tree / "isolinux").mkdir(parents=True, exist_ok=True)
    for path in _LOADER:
        shutil.copyfile(path, tree / "isolinux" / path.name)
    shutil.copyfile(given.bzimage, tree / "vmlinuz")
    shutil.copyfile(given.initrd, tree / "initrd")
    (tree / "isolinux" / "isolinux.cfg").write_text(
        "DEFAULT linux\nPROMPT 0\nTIMEOUT 0\nLABEL linux\n  KERNEL /vmlinuz\n"
        f"  APPEND initrd=/initrd {given.cmdline}\n"
    )
    subprocess.run(
        [
            *(peer("xorriso"), "-as", "mkisofs", "-quiet", "-o", str(image)),
            *("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"),
            *("-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", str(tree)),
        ],
        check=True,
        capture_output=True,
    )
    return image
