"""Debian's kernel booted partly on one engine and partly on another: one State for both."""

from __future__ import annotations

import time

import pytest

from polyvisor import Machine
from polyvisor.images import initramfs
from polyvisor.images import kernel as kernels
from polyvisor.images.cpio import Archive

SHAPE = {"memory": "192M", "cpus": 1, "portable": True}
#: Said by the guest's /init.
PROOF = "moved and well"
INIT = f"""#!/bin/busybox sh
/bin/busybox echo {PROOF}
/bin/busybox poweroff -f
"""


def machine(engine: str, irqchip: str = "auto") -> Machine:
    return Machine(engine=engine, irqchip=irqchip, **SHAPE)  # type: ignore[arg-type]


def user_space() -> bytes:
    archive = Archive()
    archive.file("bin/busybox", initramfs.find_busybox("amd64").read_bytes(), 0o755)
    archive.file("init", INIT.encode(), 0o755)
    archive.device("dev/console", 5, 1)
    return archive.finish()


def loaded(engine: str, irqchip: str) -> Machine:
    """A machine about to boot the cloud kernel into a shell script."""
    made = machine(engine, irqchip)
    made.load(
        kernel=kernels.fetch("cloud").image,
        initrd=user_space(),
        cmdline="console=ttyS0 quiet panic=-1",
    )
    return made


def run_a_while(on: Machine, share: float) -> None:
    """Part of a boot: by instructions where they can be counted, else by time."""
    if on.engine == "soft":
        on.cpu(0).step(int(300_000_000 * share))
        return
    on.start()
    time.sleep(4 * share)
    on.pause()


@pytest.mark.kvm_fast
@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("first", "irqchip"),
    # Those that end on soft take half a minute each in the rig: not in every mode.
    [("soft", "kernel"), ("soft", "split"), ("soft", "user"), ("kvm", "kernel"), ("kvm", "user")],
)
def test_half_a_boot_on_each(first: str, irqchip: str) -> None:
    second = "kvm" if first == "soft" else "soft"
    modes = {"soft": "user", "kvm": irqchip}
    with loaded(first, modes[first]) as source:
        run_a_while(source, 0.4)
        assert PROOF not in source.console.transcript
        snapshot = source.snapshot()
    with machine(second, modes[second]) as target:
        target.restore(snapshot)
        target.start()
        info = target.wait(timeout=240)
        assert info is not None
        assert info.reason == "power_off", target.console.transcript[-2000:]
        assert PROOF in target.console.transcript
