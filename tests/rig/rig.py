#!/usr/bin/env python3
"""Runs a command where /dev/kvm is complete, on a host that has none: tests/rig/rig.py -- COMMAND.

QEMU's TCG emulates AMD SVM with nested paging, so the distribution's own kvm-amd runs in it. The
rig is that and no more: Debian's kernel, five of its modules, and this host's own root file system,
shared over 9p, under a layer of memory. The command finds the same files, programs, working
directory and environment as here; what it writes is gone afterwards, and so is all of the rig. It
runs as root, its stdin is empty, and there is no network.

stdout, stderr and the exit status are the command's. 124: --timeout (boot included) expired.
125: the rig failed, and says why. 130, 143: Ctrl-C, SIGTERM.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from elftools.elf.elffile import ELFFile

from polyvisor.errors import Error, ImageError
from polyvisor.images import cache, cpio, initramfs, kernel, packages, vmlinux

TIMED_OUT, FAILED = 124, 125
QEMU = "qemu-system-x86_64"
# The cloud kernel has no 9p.
KERNEL = kernel.NAMES["generic"]
TIME_IS_RIGHT = "tsc=reliable no_timer_check"
#: Periodic ticks: with timers armed once, the whole PC stands still in one long run of three. It
#: looks as if QEMU's SVM, which changes a CPU's pending interrupts without a lock at every exit of
#: a guest, forgets one that arrives meanwhile. The next tick brings it back.
TICKS = "highres=off nohz=off lapic=notscdeadline"
#: Measured: with two CPUs one interrupt in some hundreds comes twice, with one none of 3 million.
#: It looks as if QEMU 7.2 leaves an interrupt that VMRUN injects in `exception_index`: told to
#: stop just then, as the CPUs of one PC tell each other all the time, it delivers it again.
CPUS_HELP = "with more than one, QEMU gives some interrupts to KVM's guests twice"
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd")
INIT = Path(__file__).with_name("init")
POLL = 0.05  # seconds


class RigError(Exception):
    """The rig itself failed; the message is for the user."""


def prepare() -> Path:
    """The folder with the kernel, as `vmlinux`, and its modules, named in loading order."""

    def make(directory: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="polyvisor-rig-") as scratch:
            apt = packages.Apt(KERNEL.architecture, Path(scratch), say)
            deb = apt.download(apt.find(KERNEL.packages).real)
            say("unpacking the rig's kernel")
            tree = Path(scratch) / "tree"
            subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
            [image] = tree.glob("boot/vmlinuz*")
            # Unpacked here, and started by its PVH entry: TCG takes seconds to unpack it.
            (directory / "vmlinux").write_bytes(vmlinux.extract(image))
            files = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
            for number, name in enumerate(loading_order(files)):
                shutil.copy(files[name], directory / f"{number:02}-{name}.ko")

    recipe = hashlib.sha256(repr((KERNEL, MODULES)).encode()).hexdigest()[:16]
    return cache.entry(f"rig/{recipe}", make)


def loading_order(files: Mapping[str, Path]) -> list[str]:
    """MODULES and all that they depend on, each behind its dependencies."""
    order: list[str] = []

    def add(name: str) -> None:
        if name not in files:
            raise ImageError(f"the kernel's package has no module {name}", reason="no-module")
        with files[name].open("rb") as file:
            entries = ELFFile(file).get_section_by_name(".modinfo").data().decode().split("\0")
        [depends] = [entry[8:] for entry in entries if entry.startswith("depends=")]
        for other in filter(None, depends.split(",")):
            add(other.replace("-", "_"))
        if name not in order:
            order.append(name)

    for name in MODULES:
        add(name)
    return order


def make_initramfs(prepared: Path, command: Sequence[str]) -> bytes:
    """Busybox, the modules, our init, and the command as a script for busybox's shell."""
    archive = cpio.Archive()
    for name in ("dev", "host", "memory", "root", ".rig"):
        archive.directory(name)
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", initramfs.find_busybox("amd64").read_bytes(), 0o755)
    for module in sorted(prepared.glob("*.ko")):
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("init", INIT.read_bytes(), 0o755)
    variables = [f"{name}={value}" for name, value in os.environ.items()]
    # (With its path, as busybox has an env of its own, which would run busybox's other programs.)
    words = ["/usr/bin/env", "-i", *variables, *command]
    script = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}\n"
    archive.file("command", os.fsencode(script))
    return archive.finish()


def start(prepared: Path, out: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """QEMU, which ends when this process does, however that happens."""
    initrd = os.memfd_create("initrd")
    with open(initrd, "wb", closefd=False) as file:
        file.write(make_initramfs(prepared, options.command))

    def share(tag: str, path: str | Path, more: str) -> list[str]:
        place = str(path).replace(",", ",,")  # QEMU's way of quoting
        return [
            *("-fsdev", f"local,id={tag},path={place},security_model=none,{more}"),
            *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        ]

    command = [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35", "-accel", "tcg,thread=single,tb-size=1024", "-cpu", options.cpu),
        *("-smp", str(options.cpus), "-m", str(options.memory)),
        *("-kernel", prepared / "vmlinux", "-initrd", f"/proc/self/fd/{initrd}"),
        # TCG's CPUs share one clock, but Linux would not believe that, and measure for long.
        # Nor does its timer tick in time for a check of it when the host is busy.
        *(
            "-append",
            f"console=ttyS0 quiet panic=-1 mitigations=off nokaslr {TIME_IS_RIGHT} {TICKS}",
        ),
        *("-serial", f"file:{out / 'console'}".replace(",", ",,")),
        *share("root", "/", "readonly=on,multidevs=remap"),
        *share("out", out / "share", "multidevs=remap"),
    ]
    prctl = ctypes.CDLL(None).prctl
    try:
        with (out / "qemu").open("wb") as messages:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                pass_fds=[initrd],
                preexec_fn=lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
            )
    except FileNotFoundError:
        raise RigError(
            f"there is no {QEMU} here; install it with `apt-get install qemu-system-x86`"
        ) from None
    finally:
        os.close(initrd)


def run(options: argparse.Namespace) -> int:
    """Boots, passes the command's output on as it comes, and returns its exit status."""
    begin, booted = time.monotonic(), 0.0
    prepared = prepare()
    with tempfile.TemporaryDirectory(prefix="polyvisor-rig-") as scratch:
        out = Path(scratch)
        share = out / "share"
        share.mkdir()
        streams: list[tuple[BinaryIO, BinaryIO]] = []
        for name, target in (("stdout", sys.stdout.buffer), ("stderr", sys.stderr.buffer)):
            (share / name).touch()
            streams.append(((share / name).open("rb"), target))
        process = start(prepared, out, options)
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None  # first: what came before the end is there
                for source, target in streams:
                    target.write(source.read())
                    target.flush()
                if not booted and (share / "started").exists():
                    booted = time.monotonic()
                if time.monotonic() > begin + options.timeout and not ended:
                    say(f"stopped: not through after --timeout {options.timeout:g} seconds")
                    return TIMED_OUT
                time.sleep(0 if ended else POLL)
        finally:
            process.kill()
            process.wait()
            for source, _ in streams:
                source.close()
        try:
            status = int((share / "status").read_text())
        except (OSError, ValueError):
            raise RigError(f"the rig ended before the command did{last_words(out)}") from None
    if options.verbose:
        say(f"{booted - begin:.1f} s to the command, {time.monotonic() - booted:.1f} s for it")
    return status


def last_words(out: Path) -> str:
    """What QEMU complained of, and the end of the kernel's messages."""
    said = ""
    for name in ("qemu", "console"):
        if (out / name).exists():
            said += (out / name).read_text(errors="replace")
    lines = [line for line in said.splitlines() if line.strip()][-60:]
    return "; the last it said:\n" + "\n".join(lines) if lines else ""


def say(text: str) -> None:
    print(f"rig: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="rig.py [OPTIONS] -- COMMAND...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--timeout", type=float, default=600, metavar="SECONDS", help="boot included; 600")
    add("--cpus", type=int, default=1, metavar="N", help=f"{CPUS_HELP}; 1")
    add("--memory", type=int, default=2048, metavar="MIB", help="2048")
    add("--cpu", default="max,+svm,+npt,-la57", metavar="MODEL", help="for QEMU; %(default)s")
    add("-v", "--verbose", action="store_true", help="say how long it took")
    add("command", nargs="+", metavar="COMMAND", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return run(options)
    except (RigError, Error, OSError, subprocess.CalledProcessError) as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
