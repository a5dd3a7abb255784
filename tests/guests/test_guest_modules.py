"""exec's modules, loaded by Debian's own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from stopwatch import PATIENCE

import polyvisor
from polyvisor.guest import CommandNotRun

pytestmark = [pytest.mark.boot, pytest.mark.timeout(PATIENCE + 60)]


def test_loaded_before_the_command() -> None:
    states = []
    done = polyvisor.exec(
        ["cut", "-d ", "-f1", "/proc/modules"],
        modules=["virtio_blk", "vfat"],
        on_machine=lambda machine: states.append(machine.state),
        timeout=PATIENCE,
    )
    assert states == ["created"]
    assert set(done.text.split()) == {"virtio", "virtio_ring", "virtio_blk", "fat", "vfat"}


def test_one_that_the_kernel_refuses() -> None:
    with pytest.raises(CommandNotRun, match=r"does not load kvm-amd\.ko") as caught:
        polyvisor.exec(["true"], modules=["vfat", "kvm_amd"], engine="soft", timeout=PATIENCE)
    assert (caught.value.stage, caught.value.status) == ("module", 125)


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_the_drivers_of_added_devices(tmp_path: Path, transport: Literal["pci", "mmio"]) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"what the disk says".ljust(512))

    def add_devices(machine: polyvisor.Machine) -> None:
        machine.add_disk(disk, transport=transport)
        machine.add_rng(transport=transport)

    script = "cat /dev/vda; cat /sys/class/misc/hw_random/rng_available"
    done = polyvisor.exec(["sh", "-c", script], on_machine=add_devices, timeout=PATIENCE)
    assert done.text.startswith("what the disk says")
    assert "virtio_rng.0" in done.text
