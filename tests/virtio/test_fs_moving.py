"""A guest with shared folders, entropy and a balloon at work goes on in other machines."""

from __future__ import annotations

import hashlib
import random
import re
import time
from typing import TYPE_CHECKING

import pytest

from polyvisor import Machine
from polyvisor.errors import StateError, StateMismatch
from polyvisor.images import initramfs, kernel, modules
from polyvisor.images.cpio import Archive

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 64 << 10
BLOCKS = 40
#: Reads one file, appends to another and makes many, with the files open all the time.
INIT = f"""#!/bin/busybox sh
export PATH=/bin
for module in /modules/*; do busybox insmod $module; done
busybox mkdir /dev /mnt
busybox mount -t devtmpfs dev /dev
busybox mount -t virtiofs share /mnt
cd /mnt/folder
exec 3< ../large 4>> ../log
n=0
while [ $n -lt {BLOCKS} ]; do
    set -- $(busybox dd bs={BLOCK} count=1 <&3 2>/dev/null | busybox md5sum)
    echo "block $n $1"
    echo $n >&4
    busybox head -c 100 /dev/hwrng > new.$n && busybox mv new.$n done.$n
    n=$((n + 1))
done
busybox poweroff -f
"""


def user_space() -> bytes:
    archive = Archive()
    archive.file("bin/busybox", initramfs.find_busybox("amd64").read_bytes(), 0o755)
    archive.file("init", INIT.encode(), 0o755)
    archive.device("dev/console", 5, 1)
    _, found = modules.fetch("cloud")
    names = ["virtio_pci", "virtiofs", "virtio_rng", "virtio_balloon"]
    for order, module in enumerate(found.closure(names)):
        archive.file(f"modules/{order:02}-{module.name}.ko", module.data)
    return archive.finish()


def machine(share: Path) -> Machine:
    made = Machine(memory="192M", cpus=1, engine="soft")
    made.add_share(share, "share", read_only=False, packed=True)
    made.add_rng()
    made.add_balloon("16M")
    return made


@pytest.mark.boot
@pytest.mark.slow
def test_a_guest_goes_on_in_other_machines(tmp_path: Path) -> None:
    rng = random.Random(3)
    share = tmp_path / "share"
    (share / "folder").mkdir(parents=True)
    content = rng.randbytes(BLOCK * BLOCKS)
    (share / "large").write_bytes(content)
    said, moves = "", 0
    current = machine(share)
    try:
        current.load(
            kernel=kernel.fetch("cloud").image,
            initrd=user_space(),
            cmdline="console=ttyS0 quiet panic=-1 cryptomgr.notests tsc=reliable",
        )
        current.start()
        current.console.expect("block 0 ", timeout=100)
        said = "block 0 "
        while current.state != "ended" and moves < 5:
            time.sleep(rng.uniform(0.02, 0.15))
            try:
                current.pause()
            except StateMismatch:  # it was through
                break
            snapshot = current.snapshot()
            said += current.console.read_bytes(timeout=0).decode()
            current.close()
            current = machine(share)
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
    sums = dict(re.findall(r"block (\d+) (\w{32})\r?\n", said))
    assert sums == {
        str(n): hashlib.md5(content[n * BLOCK : (n + 1) * BLOCK]).hexdigest() for n in range(BLOCKS)
    }
    assert (share / "log").read_text() == "".join(f"{n}\n" for n in range(BLOCKS))
    made = {path.name: path.stat().st_size for path in (share / "folder").iterdir()}
    assert made == {f"done.{n}": 100 for n in range(BLOCKS)}


def test_another_share_refuses_the_state(tmp_path: Path) -> None:
    with machine(tmp_path) as one, Machine(memory="192M", cpus=1, engine="soft") as other:
        snapshot = one.snapshot()
        other.add_rng()
        with pytest.raises(StateError):
            other.restore(snapshot)
