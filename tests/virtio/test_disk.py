"""Disks with Linux's own driver: file systems, every kind of request, disks that change and fail,
drivers that come again, machines that stop under load or are killed."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from disk_crash import SLOT, Crashes, build

import polyvisor
from leftovers import Leftovers
from polyvisor.errors import GuestError
from polyvisor.machine import Machine
from polyvisor.virtio.disk import Disk

pytestmark = pytest.mark.boot

MIB = 1 << 20
#: What a guest writes, and how it reads past its own cache.
DROP = "echo 3 > /proc/sys/vm/drop_caches"


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def run(script: str, *disks: tuple[Any, dict[str, Any]], **options: Any) -> tuple[list[str], Any]:
    """The lines that a script says in a guest with these disks, and their counters."""
    counters: list[dict[str, Any]] = []
    plugged: list[Disk] = []

    def plug(machine: Machine) -> None:
        plugged.extend(machine.add_disk(image, **how) for image, how in disks)

    def count(*_: object) -> None:
        counters[:] = [disk.statistics() for disk in plugged]

    done = polyvisor.exec(
        ["sh", "-c", f"{script}\necho the end"],
        on_machine=plug,
        on_idle=count,
        engine="soft",
        timeout=100,
        **{"memory": "128M", **options},
    )
    lines = done.stdout.decode().splitlines()
    assert lines[-1:] == ["the end"], done.stderr.decode()
    return lines[:-1], counters


def file(path: Path, size: int, seed: int = 0) -> bytes:
    data = random.Random(seed).randbytes(size)
    path.write_bytes(data)
    return data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "packed", "queues", "how"),
    [
        ("pci", False, 1, {}),
        ("pci", True, 2, {"io": "threads"}),
        ("mmio", False, 2, {"cache": "none"}),
        ("mmio", True, 1, {"cache": "unsafe"}),
    ],
)
def test_file_system(
    tmp_path: Path,
    transport: Literal["pci", "mmio"],
    packed: bool,
    queues: int,
    how: dict[str, Any],
) -> None:
    """An ext4 of the host's making is read and written; the driver is taken off the disk and put
    back in between; afterwards the host finds the file system sound and the file in it."""
    (tmp_path / "root").mkdir()
    data = file(tmp_path / "root" / "file", 3 * MIB)
    image = tmp_path / "disk.img"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "root", image, "32M"], check=True
    )
    lines, _ = run(
        f"""
        ls /sys/block/vda/mq | wc -l; cat /sys/block/vda/serial; echo
        mount -t ext4 /dev/vda /mnt; md5sum < /mnt/file
        cp /mnt/file /mnt/copy; umount /mnt
        cd /sys/bus/virtio/drivers/virtio_blk; device=$(echo virtio*)
        echo $device > unbind; ls /sys/block; echo $device > bind; cd /
        mount -t ext4 /dev/vda /mnt; md5sum < /mnt/copy
        sync; {DROP}; md5sum < /mnt/copy; rm /mnt/file; umount /mnt
        """,
        (
            image,
            {"transport": transport, "packed": packed, "queues": queues, "serial": "me", **how},
        ),
        cpus=2,
        modules=["ext4"],
    )
    assert lines == [str(queues), "me", *[md5(data) + "  -"] * 3]
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)
    copy = tmp_path / "copy"
    subprocess.run(["debugfs", "-R", f"dump copy {copy}", image], check=True, capture_output=True)
    assert copy.read_bytes() == data


def test_requests(tmp_path: Path) -> None:
    """Reads, writes, flushes, discards and zeroes of the kernel's own arrive, and do what they
    should; the cache can be switched off."""
    image = tmp_path / "disk.img"
    data = file(image, 4 * MIB)
    lines, (counters, _) = run(
        f"""
        md5sum < /dev/vda
        dd if=/dev/vda of=/dev/vdb bs=1M 2>/dev/null; sync; {DROP}
        cmp /dev/vda /dev/vdb && echo same
        blkdiscard -o 1048576 -l 1048576 /dev/vda
        /disk_load zero /dev/vda 2097152 1048576
        cat /sys/block/vda/cache_type /sys/block/vda/ro
        echo "write through" > /sys/block/vda/cache_type; cat /sys/block/vda/cache_type
        sync; {DROP}; md5sum < /dev/vda
        """,
        (image, {}),
        (_Memory(4 * MIB), {}),
        files={"/disk_load": build(tmp_path).read_bytes()},
    )
    zeroed = data[: 2 * MIB] + bytes(MIB) + data[3 * MIB :]
    discarded = data[:MIB] + bytes(2 * MIB) + data[3 * MIB :]
    assert lines[:2] == [md5(data) + "  -", "same"]
    assert lines[2:5] == ["write back", "0", "write through"]
    assert lines[5] in (md5(zeroed) + "  -", md5(discarded) + "  -")
    assert image.read_bytes() in (zeroed, discarded)
    for kind in ("read", "discard", "write_zeroes"):
        assert counters[kind]["requests"] > 0, kind
        assert counters[kind]["errors"] == 0, kind


class _Memory:
    """A disk that is an array of bytes, with bad sectors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = bytearray(size)
        self.bad: set[int] = set()
        self.flushed = 0
        self.threads: set[int] = set()

    def _check(self, offset: int, size: int) -> None:
        self.threads.add(threading.get_ident())
        if any(offset <= bad * 512 < offset + size for bad in self.bad):
            raise OSError(errno.EIO, "a bad sector")

    def read(self, offset: int, size: int) -> bytes:
        self._check(offset, size)
        return bytes(self.bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self._check(offset, len(data))
        self.bytes[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushed += 1


def test_python_disk_with_bad_sectors() -> None:
    """Errors of the host are I/O errors of the guest where they are, and nowhere else."""
    disk = _Memory(MIB)
    disk.bytes[:] = random.Random(1).randbytes(MIB)
    before = bytes(disk.bytes)
    disk.bad = {800}
    lines, (counters,) = run(
        """
        dd if=/dev/vda bs=4096 count=100 2>/dev/null | md5sum
        dd if=/dev/vda bs=4096 skip=100 count=1 of=/dev/null 2>/dev/null || echo cannot read
        dd if=/dev/vda bs=4096 skip=101 2>/dev/null | md5sum
        dd if=/dev/zero of=/dev/vda bs=4096 seek=10 count=1 conv=fsync 2>/dev/null && echo written
        """,
        (disk, {}),
    )
    good = md5(before[: 100 * 4096]), md5(before[101 * 4096 :])
    assert lines == [f"{good[0]}  -", "cannot read", f"{good[1]}  -", "written"]
    assert disk.bytes[40960:45056] == bytes(4096)
    assert counters["read"]["errors"] > 0
    assert counters["write"]["errors"] == 0
    assert disk.flushed > 0
    assert len(disk.threads) == 1


def test_read_only_and_snapshot(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    data = file(image, MIB)
    lines, _ = run(
        f"""
        cat /sys/block/vda/ro /sys/block/vdb/ro
        dd if=/dev/zero of=/dev/vda bs=4096 count=1 2>/dev/null || echo refused
        dd if=/dev/zero of=/dev/vdb bs=512 seek=3 count=9 2>/dev/null; sync; {DROP}
        md5sum < /dev/vda; md5sum < /dev/vdb
        """,
        (image, {"read_only": True}),
        (image, {"snapshot": True}),
    )
    changed = data[: 3 * 512] + bytes(9 * 512) + data[12 * 512 :]
    assert lines == ["1", "0", "refused", md5(data) + "  -", md5(changed) + "  -"]
    assert image.read_bytes() == data


def test_resize(tmp_path: Path) -> None:
    """The guest hears of it while it runs, and can use what is new."""
    image = tmp_path / "disk.img"
    file(image, MIB)
    disks: list[Disk] = []
    said = bytearray()

    def listen(data: bytes) -> None:
        said.extend(data)
        if b"ready" in said and disks[0].size == MIB:
            disks[0].resize(3 * MIB)

    done = polyvisor.exec(
        ["sh", "-c", """
        echo ready
        while [ $(cat /sys/block/vda/size) != 6144 ]; do sleep 0.05; done
        echo more | dd of=/dev/vda bs=512 seek=6143 conv=fsync
        """],
        on_machine=lambda machine: disks.append(machine.add_disk(image)),
        on_stdout=listen,
        timeout=60,
    )  # fmt: skip
    assert done.status == 0
    data = image.read_bytes()
    assert (len(data), data[6143 * 512 :][:5]) == (3 * MIB, b"more\n")


@pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="needs qemu-nbd (package qemu-utils)")
def test_qcow2_chain(tmp_path: Path) -> None:
    """A raw image, a qcow2 on top of it, one on top of that: what is written is in the last."""
    from polyvisor.images import disk

    base, middle, top = tmp_path / "base.img", tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    data = file(base, 2 * MIB)
    disk.overlay(middle, base)
    disk.overlay(top, middle)
    found = disk.info(top)
    assert (found.format, found.size, found.backing) == ("qcow2", 2 * MIB, str(middle))
    unchanged = middle.read_bytes()
    lines, _ = run(
        f"""
        md5sum < /dev/vda
        dd if=/dev/zero of=/dev/vda bs=4096 seek=100 count=10 2>/dev/null; sync; {DROP}
        md5sum < /dev/vda
        """,
        (top, {}),
    )
    changed = data[:409600] + bytes(40960) + data[450560:]
    assert lines == [md5(data) + "  -", md5(changed) + "  -"]
    assert base.read_bytes() == data
    assert middle.read_bytes() == unchanged
    flat = tmp_path / "flat.img"
    disk.convert(top, flat)
    assert flat.read_bytes() == changed
    assert not _children("qemu-nbd")


def _with_libraries(program: str) -> dict[str, bytes]:
    """A program of the host, and what it is linked with, as files of a guest."""
    said = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    paths = [program, *re.findall(r"(/\S+) \(0x", said)]
    return {path: Path(path).read_bytes() for path in paths}


@pytest.mark.slow
def test_fio(tmp_path: Path) -> None:
    """fio reads what it wrote, by its checksums."""
    fio = shutil.which("fio")
    if fio is None:
        pytest.skip("needs fio")
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 16 * MIB)
    files = _with_libraries(fio)
    lines, (counters,) = run(
        f"""
        chmod +x {fio}; mkdir -p /tmp; cd /tmp
        {fio} --name=v --filename=/dev/vda --size=16m --rw=randwrite --bs=4k-64k --direct=1 \\
            --ioengine=libaio --iodepth=16 --fsync=64 --verify=crc32c --verify_fatal=1 > said \\
            && echo verified || cat said
        """,
        (image, {"packed": True, "queues": 2}),
        files=files,
        cpus=2,
        memory="600M",  # fio's libraries
    )
    assert lines == ["verified"]
    assert counters["write"]["requests"] > 100
    assert counters["flush"]["requests"] > 1


@pytest.mark.slow
@pytest.mark.needs_root
def test_block_device(tmp_path: Path) -> None:
    """Discards and zeroes of a block device, which has calls of its own for them."""
    image = tmp_path / "disk.img"
    data = file(image, 4 * MIB)
    loop = subprocess.run(
        ["losetup", "--find", "--show", image], check=False, capture_output=True, text=True
    )
    if loop.returncode:
        pytest.skip(f"no loop device: {loop.stderr.strip()}")
    device = loop.stdout.strip()
    try:
        lines, (counters,) = run(
            f"""
            blkdiscard -o 1048576 -l 1048576 /dev/vda; /disk_load zero /dev/vda 2097152 1048576
            dd if=/dev/vda of=/dev/vda bs=1M seek=3 count=1 2>/dev/null; sync; {DROP}
            md5sum < /dev/vda
            """,
            (device, {"cache": "none"}),
            files={"/disk_load": build(tmp_path).read_bytes()},
        )
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    changed = data[:MIB] + bytes(2 * MIB) + data[:MIB]
    assert lines == [md5(changed) + "  -"]
    assert image.read_bytes() == changed
    assert counters["discard"]["requests"] == counters["write_zeroes"]["requests"] == 1


def _children(name: str) -> list[int]:
    """Process ids of this process's children with that name, those that nobody waited for too."""
    tasks = Path("/proc/self/task").iterdir()
    children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return [pid for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == name]


@pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="needs qemu-nbd (package qemu-utils)")
def test_qemu_nbd_dies(tmp_path: Path) -> None:
    """The guest gets I/O errors, the machine goes on and ends, nothing is left behind."""
    from polyvisor.images import disk

    image = tmp_path / "disk.qcow2"
    disk.create(image, 4 * MIB)
    said = bytearray()

    def kill(data: bytes) -> None:
        said.extend(data)
        for child in _children("qemu-nbd"):
            os.kill(child, signal.SIGKILL)

    done = polyvisor.exec(
        ["sh", "-c", """
        dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null && echo written
        sleep 0.3
        dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null || echo failed
        """],
        on_machine=lambda machine: machine.add_disk(image),
        on_stdout=kill,
        timeout=60,
    )  # fmt: skip
    assert (done.status, bytes(said)) == (0, b"written\nfailed\n")
    assert not _children("qemu-nbd")


@pytest.mark.slow
def test_stop_under_load(tmp_path: Path) -> None:
    """A machine that ends while its disks work leaves no thread, descriptor or process."""

    image = tmp_path / "disk.img"
    file(image, 8 * MIB)
    machines: list[Machine] = []

    def stop(data: bytes) -> None:
        time.sleep(0.1)
        machines.pop().stop()

    before = None
    ways: list[dict[str, Any]] = [{"cache": "none"}, {"cache": "none"}, {"io": "threads"}]
    for how in ways:

        def plug(machine: Machine, how: dict[str, Any] = how) -> None:
            machines.append(machine)
            machine.add_disk(image, queues=2, **how)

        with pytest.raises(GuestError):
            polyvisor.exec(
                ["sh", "-c", """
                for i in 1 2 3 4; do
                    (while true; do dd if=/dev/urandom of=/dev/vda bs=64k count=64 conv=fsync; done
                    ) 2>/dev/null &
                done
                sleep 0.1; echo working; wait
                """],
                on_machine=plug,
                on_stdout=stop,
                cpus=2,
                timeout=60,
            )  # fmt: skip
        before = before or Leftovers()  # after the first one: what is opened once stays
        before.check()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["writeback", "none", "threads", "qcow2"])
def test_kill(tmp_path: Path, how: str) -> None:
    """The process of a machine that writes is killed. What it has flushed is in the image."""
    image = tmp_path / ("disk.qcow2" if how == "qcow2" else "disk.img")
    slots = 256
    if how == "qcow2":
        if not shutil.which("qemu-nbd"):
            pytest.skip("needs qemu-nbd (package qemu-utils)")
        from polyvisor.images import disk

        disk.create(image, slots * SLOT)
    else:
        image.touch()
        os.truncate(image, slots * SLOT)
    options = {"none": {"cache": "none"}, "threads": {"io": "threads"}}.get(how, {})
    crashes = Crashes(build(tmp_path), image, slots, options, raw=how != "qcow2")
    for seconds in (0.1, 0.3) if how == "writeback" else (0.2,):
        crashes.kill(seconds)
    assert crashes.flushes > 2


def test_a_loss_is_found(tmp_path: Path) -> None:
    """The same on a disk that keeps nothing: the check is able to fail."""
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 64 * SLOT)
    crashes = Crashes(build(tmp_path), image, 64, {"snapshot": True})
    with pytest.raises(AssertionError, match="was flushed"):
        crashes.kill(0.1)
