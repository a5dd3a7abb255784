"""One boot of Debian's kernel under every mode of the interrupt chips: they have one State."""

from __future__ import annotations

import time

import pytest

from polyvisor import Machine
from polyvisor.images import initramfs
from polyvisor.images import kernel as kernels
from polyvisor.images.cpio import Archive

PROOF = "2 CPUs and well"
#: Sleeps need timers, and two CPUs that answer need their local APICs.
INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
for n in 1 2 3 4 5 6; do
    /bin/busybox taskset 1 /bin/busybox sleep 0.05
    /bin/busybox taskset 2 /bin/busybox sleep 0.05
done
/bin/busybox echo $(/bin/busybox grep -c ^processor /proc/cpuinfo) CPUs and well
/bin/busybox poweroff -f
"""
#: KVM's own PIT counts on while the machine stands still, and may tick to the others.
CHIPS = {
    "kernel": ("lapic1", "ioapic", "pit"),
    "split": ("lapic0", "lapic1", "ioapic", "pic", "pit"),
    "user": ("lapic0", "lapic1", "ioapic", "pic", "pit"),
}


def machine(irqchip: str) -> Machine:
    """Portable, so that it has no services that only KVM's own local APICs can give."""
    return Machine(memory="192M", cpus=2, engine="kvm", irqchip=irqchip, portable=True)


def user_space() -> bytes:
    archive = Archive()
    archive.file("bin/busybox", initramfs.find_busybox("amd64").read_bytes(), 0o755)
    archive.file("init", INIT.encode(), 0o755)
    archive.device("dev/console", 5, 1)
    archive.directory("proc")
    return archive.finish()


def loaded(irqchip: str) -> Machine:
    made = machine(irqchip)
    made.load(
        kernel=kernels.fetch("cloud").image,
        initrd=user_space(),
        cmdline="console=ttyS0 quiet panic=-1",
    )
    return made


@pytest.mark.kvm_fast
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_boot_that_changes_its_chips() -> None:
    modes = ("kernel", "split", "user", "kernel")
    at = loaded(modes[0])
    said = ""
    try:
        for mode in modes[1:]:
            at.start()
            time.sleep(0.8)
            at.pause()
            snapshot = at.snapshot()
            said += at.console.transcript
            assert PROOF not in said
            at.close()
            at = machine(mode)
            at.restore(snapshot)
            there = at.snapshot().parts
            for chip in CHIPS[mode]:
                assert there[chip] == snapshot.parts[chip], (mode, chip)
        at.start()
        info = at.wait(timeout=240)
        said += at.console.transcript
        assert info is not None
        assert info.reason == "power_off", said[-2000:]
        assert PROOF in said
    finally:
        at.close()
