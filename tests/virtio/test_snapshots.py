"""Snapshots of machines whose virtio devices are at work, and a guest that goes on in another."""

from __future__ import annotations

import hashlib
import random
import re
import time
from pathlib import Path
from typing import Literal

import pytest

from polyvisor import Machine
from polyvisor.errors import StateError, StateMismatch
from polyvisor.images import initramfs, kernel, modules
from polyvisor.images.cpio import Archive

BLOCK = 64 << 10
BLOCKS = 48
#: Reads each block of the disk, and writes its number over the block's first bytes.
INIT = f"""#!/bin/busybox sh
export PATH=/bin
for module in /modules/*; do busybox insmod $module; done
busybox mkdir /dev
busybox mount -t devtmpfs dev /dev
n=0
while [ $n -lt {BLOCKS} ]; do
    set -- $(busybox dd if=/dev/vda bs={BLOCK} count=1 skip=$n 2>/dev/null | busybox md5sum)
    echo "block $n $1"
    busybox printf %08d $n |
        busybox dd of=/dev/vda bs={BLOCK} seek=$n conv=notrunc,fsync 2>/dev/null
    n=$((n + 1))
done
busybox poweroff -f
"""


def user_space(transport: str) -> bytes:
    archive = Archive()
    archive.file("bin/busybox", initramfs.find_busybox("amd64").read_bytes(), 0o755)
    archive.file("init", INIT.encode(), 0o755)
    archive.device("dev/console", 5, 1)
    _, found = modules.fetch("cloud")
    names = [modules.TRANSPORTS[transport], "virtio_blk"]
    for order, module in enumerate(found.closure(names)):
        archive.file(f"modules/{order:02}-{module.name}.ko", module.data)
    return archive.finish()


Transport = Literal["pci", "mmio"]


def machine(
    disk: Path, transport: Transport, packed: bool, *, engine: str = "auto", second: bool = False
) -> Machine:
    made = Machine(memory="192M", cpus=1, engine=engine, portable=True)
    made.add_disk(disk, transport=transport, packed=packed)
    if second:
        made.add_disk(disk.with_name("second"), transport=transport)
    return made


@pytest.mark.boot
@pytest.mark.slow
@pytest.mark.parametrize(("transport", "packed"), [("pci", True), ("mmio", False)])
def test_a_guest_goes_on_in_other_machines(
    tmp_path: Path, fast_engine: str, transport: Transport, packed: bool
) -> None:
    rng = random.Random(f"{transport} {packed}")
    content = rng.randbytes(BLOCK * BLOCKS)
    disk = tmp_path / "disk"
    disk.write_bytes(content)
    said, moves = "", 0
    current = machine(disk, transport, packed, engine=fast_engine)
    try:
        current.load(
            kernel=kernel.fetch("cloud").image,
            initrd=user_space(transport),
            cmdline="console=ttyS0 quiet panic=-1 cryptomgr.notests tsc=reliable",
        )
        current.start()
        current.console.expect("block 0 ", timeout=100)
        said = "block 0 "
        while current.state != "ended" and moves < 6:
            time.sleep(rng.uniform(0.01, 0.15))
            try:
                current.pause()
            except StateMismatch:  # it was through
                break
            snapshot = current.snapshot()
            said += current.console.read_bytes(timeout=0).decode()
            current.close()
            current = machine(disk, transport, packed, engine=fast_engine)
            current.restore(snapshot)
            current.start()
            moves += 1
        info = current.wait(timeout=100)
        said += current.console.read_bytes(timeout=0).decode()
        assert info is not None
        assert info.reason == "power_off"
    finally:
        current.close()
    assert moves >= 2
    sums = re.findall(r"block (\d+) (\w{32})\r?\n", said)
    wanted = [
        (str(n), hashlib.md5(content[n * BLOCK : (n + 1) * BLOCK]).hexdigest())
        for n in range(BLOCKS)
    ]
    assert sums == wanted
    after = disk.read_bytes()
    assert [after[n * BLOCK : n * BLOCK + 8] for n in range(BLOCKS)] == [
        b"%08d" % n for n in range(BLOCKS)
    ]


def test_snapshots_of_other_devices_are_refused(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    (tmp_path / "second").write_bytes(bytes(1 << 20))
    with machine(disk, "pci", False, second=True) as source:
        snapshot = source.snapshot()
    with machine(disk, "pci", False) as target, pytest.raises(StateError):
        target.restore(snapshot)
    with machine(disk, "mmio", False, second=True) as target, pytest.raises(StateError):
        target.restore(snapshot)
    with machine(disk, "pci", False, second=True) as target:
        target.restore(snapshot)


def test_devices_come_before_the_start(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with Machine(memory="16M") as started:
        started.load_raw(0x1000, b"\xeb\xfe")  # jmp $
        started.cpu(0).enter_real_mode(cs=0, ip=0x1000)
        started.start()
        with pytest.raises(StateMismatch, match="before that starts"):
            started.add_disk(disk)
