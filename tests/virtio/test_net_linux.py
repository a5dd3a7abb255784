"""Network cards with Linux's own driver: addresses, data both ways, forwarded ports, cables that
are pulled, drivers that come again, machines that stop under load."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import random
import socket
import struct
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Literal

import pytest
from net_peers import DHCP, read_all, serving

import polyvisor
from polyvisor.errors import DeviceError, GuestError
from polyvisor.images import initramfs, kernel, modules
from polyvisor.images.cpio import Archive
from polyvisor.machine import Machine
from polyvisor.virtio.net import Net

pytestmark = pytest.mark.boot

SIZE = 1 << 20


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def lines(done: polyvisor.Completed) -> list[str]:
    return done.stdout.decode().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "packed", "queues"),
    [("pci", False, 1), ("pci", True, 2), ("mmio", False, 2), ("mmio", True, 1)],
)
def test_data_both_ways(transport: Literal["pci", "mmio"], packed: bool, queues: int) -> None:
    """A driver takes an address, sends and receives megabytes and answers on a forwarded port; then
    it is taken off its device, put back, and does so again."""
    data = random.Random(f"{transport} {packed} {queues}").randbytes(SIZE)
    nets: list[Net] = []
    forwarded: list[str] = []

    def forward(control: socket.socket) -> None:
        (made,) = nets[0].forwards
        assert made.host_port != 0
        with socket.create_connection((made.host_address, made.host_port), 20) as peer:
            threading.Thread(target=peer.sendall, args=(data,)).start()
            received = bytearray()
            while len(received) < SIZE:
                received += peer.recv(1 << 18)
            forwarded.append(md5(bytes(received)))

    def plug(machine: Machine) -> None:
        nets.append(
            machine.add_net(
                forward=["tcp:127.0.0.1:0-:77"], transport=transport, packed=packed, queues=queues
            )
        )

    uploads: list[str] = []
    with serving(
        lambda connection: connection.sendall(data),
        lambda connection: uploads.append(md5(read_all(connection))),
        forward,
    ) as (down, up, control):
        exchange = f"""{DHCP}
            nc 10.0.2.2 {down} < /dev/null > /tmp/data; md5sum < /tmp/data
            nc 10.0.2.2 {up} < /tmp/data
            (nc -l -p 77 < /tmp/data | head -c {SIZE} | md5sum > /tmp/sum) &
            sleep 0.2; nc 10.0.2.2 {control} < /dev/null
            for i in 1 2 3 4 5 6 7 8 9 10; do [ -s /tmp/sum ] && break; sleep 0.1; done
            cat /tmp/sum; rm /tmp/sum
        """
        done = polyvisor.exec(
            ["sh", "-c", f"""
            {exchange}
            cd /sys/bus/virtio/drivers/virtio_net; device=$(echo virtio*)
            cat $device/net/eth0/queues/*/*/inflight 2>/dev/null | wc -l
            echo $device > unbind; ls /sys/class/net; echo $device > bind; cd /
            {exchange}
            """],
            on_machine=plug,
            cpus=2,
            timeout=90,
        )  # fmt: skip
    assert done.status == 0
    address = "address 10.0.2.15 router 10.0.2.2 dns 10.0.2.3"
    sums = [address, f"{md5(data)}  -", f"{md5(data)}  -"]
    assert lines(done) == [*sums, str(queues), "lo", *sums]
    assert uploads == [md5(data)] * 2
    assert forwarded == [md5(data)] * 2


def test_cable() -> None:
    """The guest sees a cable that is pulled and plugged in again, and connections survive it."""
    nets: list[Net] = []
    waiting = threading.Event()

    def pull(connection: socket.socket) -> None:
        assert connection.recv(1) == b"h"
        nets[0].link = False
        assert not nets[0].link
        waiting.wait(0.3)
        nets[0].link = True
        connection.sendall(b"again\n")

    with serving(pull) as (port,):
        done = polyvisor.exec(
            ["sh", "-c", f"""
            {DHCP}
            cat /sys/class/net/eth0/carrier
            echo h | nc 10.0.2.2 {port} > /tmp/said &
            while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.02; done; echo pulled
            while [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.02; done; echo plugged
            wait; cat /tmp/said; cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address
            """],
            on_machine=lambda m: nets.append(m.add_net(mac="52:54:00:00:00:07", mtu=1400)),
            timeout=60,
        )  # fmt: skip
    assert lines(done)[1:] == ["1", "pulled", "plugged", "again", "1400", "52:54:00:00:00:07"]


@pytest.mark.slow
def test_restricted() -> None:
    """The guest gets nowhere but to its own network; forwarded ports work, also one that is added
    while it runs; it has an address of IPv6, too."""
    nets: list[Net] = []

    def reach(_machine: Machine, _channel: object) -> None:
        def fetch() -> None:
            made = nets[0].add_forward("tcp::0-:80")
            url = f"http://{made.host_address}:{made.host_port}/"
            for _ in range(100):  # until the guest's server is there
                try:
                    with urllib.request.urlopen(url + "hello", timeout=20) as answer:
                        answers.append(answer.read())
                    with urllib.request.urlopen(url + "cgi-bin/end", timeout=20) as answer:
                        answer.read()
                    return
                except (OSError, http.client.HTTPException):
                    time.sleep(0.1)

        threading.Thread(target=fetch).start()

    answers: list[bytes] = []
    end = b"#!/bin/sh\necho Content-type: text/plain; echo; touch /tmp/end\n"
    with serving(lambda connection: connection.sendall(b"out")) as (port,):
        done = polyvisor.exec(
            ["sh", "-c", f"""
            {DHCP}
            chmod +x /www/cgi-bin/end
            nc -w 2 10.0.2.2 {port} < /dev/null && echo out || echo in
            for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
                ping6 -c 1 -w 2 fec0::2 > /dev/null 2>&1 && echo ipv6 && break; sleep 0.3
            done
            httpd -p 80 -h /www
            while [ ! -e /tmp/end ]; do sleep 0.05; done
            """],
            on_machine=lambda machine: nets.append(machine.add_net(restrict=True)),
            on_start=reach,
            files={"/www/hello": b"hello", "/www/cgi-bin/end": end},
            timeout=60,
        )  # fmt: skip
    assert lines(done)[1:] == ["in", "ipv6"]
    assert answers == [b"hello"]


class Wire:
    """A network in Python: answers ARP requests for anything, and ICMP echo requests."""

    MAC = bytes.fromhex("525400ffffff")

    def __init__(self) -> None:
        self.net: Net | None = None
        self.echoes: list[int] = []

    def send(self, frame: bytes) -> None:
        kind = struct.unpack_from(">H", frame, 12)[0]
        if kind == 0x0806 and frame[20:22] == b"\0\1":
            answer = frame[14:20] + b"\0\2" + self.MAC + frame[38:42] + frame[22:32]
        elif kind == 0x0800 and frame[23] == 1 and frame[34] == 8:
            self.echoes.append(len(frame))
            checksum = struct.unpack_from(">H", frame, 36)[0] + 0x800
            checksum = (checksum & 0xFFFF) + (checksum >> 16)
            ip = frame[14:26] + frame[30:34] + frame[26:30]
            answer = ip + struct.pack(">BBH", 0, 0, checksum) + frame[38:]
        else:
            return
        assert self.net is not None
        self.net.receive(frame[6:12] + self.MAC + frame[12:14] + answer)


def test_network_in_python() -> None:
    wire = Wire()

    def plug(machine: Machine) -> None:
        wire.net = machine.add_net(wire)

    done = polyvisor.exec(
        ["sh", "-c", "ip link set eth0 up; ip addr add 10.9.0.1/24 dev eth0; "
         "ping -c 3 -i 0.1 -s 1000 -q 10.9.0.77"],
        on_machine=plug,
        timeout=60,
    )  # fmt: skip
    assert b"3 packets transmitted, 3 packets received" in done.stdout
    assert wire.echoes == [1042] * 3


def test_exception_in_a_network() -> None:
    class Broken:
        def send(self, frame: bytes) -> None:
            raise ValueError("no wire")

    with pytest.raises(DeviceError, match="Broken raised in send") as caught:
        polyvisor.exec(
            ["sh", "-c", "ip link set eth0 up; ping -c 1 10.0.2.2; sleep 10"],
            on_machine=lambda machine: machine.add_net(Broken()),
            timeout=60,
        )
    assert isinstance(caught.value.__cause__, ValueError)


def test_capture(tmp_path: Path) -> None:
    """The capture has the frames of both directions, with the times at which they passed."""
    file = tmp_path / "net.pcap"
    before = time.time()
    polyvisor.exec(["sh", "-c", DHCP], on_machine=lambda m: m.add_net(capture=file), timeout=60)
    data = file.read_bytes()
    assert struct.unpack_from("<IHH", data) == (0xA1B23C4D, 2, 4)
    assert struct.unpack_from("<I", data, 20) == (1,)
    at, messages = 24, []
    while at < len(data):
        seconds, nanoseconds, size, whole = struct.unpack_from("<IIII", data, at)
        assert size == whole
        assert before - 1 < seconds + nanoseconds / 1e9 < time.time() + 1
        frame = data[at + 16 : at + 16 + size]
        if frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] in (b"\0C", b"\0D"):
            messages.append(frame[284])  # DHCP option 53
        at += 16 + size
    assert at == len(data)
    assert messages == [1, 2, 3, 5]  # discover, offer, request, acknowledge


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(2))
def test_stop_under_load(round_: int) -> None:
    """A machine that is stopped in the middle of traffic leaves no descriptor and no thread."""

    def resources() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    loaded = threading.Semaphore(0)

    def flood(connection: socket.socket) -> None:
        loaded.release()
        try:
            while connection.send(bytes(1 << 16)):
                pass
        except OSError:
            pass

    def swallow(connection: socket.socket) -> None:
        loaded.release()
        with contextlib.suppress(OSError):
            read_all(connection)

    machines: list[Any] = []

    def stop() -> None:
        for _ in range(4):
            assert loaded.acquire(timeout=60)
        time.sleep(0.2 + 0.1 * round_)
        machines[0].stop()

    with serving(flood, swallow, flood, swallow) as ports:
        before = resources()
        stopper = threading.Thread(target=stop)
        stopper.start()
        script = DHCP
        for port, source in zip(ports, ("null", "zero", "null", "zero"), strict=True):
            script += f"nc 10.0.2.2 {port} < /dev/{source} > /dev/null &\n"
        with pytest.raises(GuestError):
            polyvisor.exec(
                ["sh", "-c", script + "wait"],
                on_machine=lambda machine: (machines.append(machine), machine.add_net()),
                timeout=60,
            )
        stopper.join()
        machines.clear()
        for _ in range(50):  # the peers' threads are told by the closed connections
            if resources() <= before:
                break
            time.sleep(0.1)
        after = resources()
        # The four connections of `serving` may be in accept() again or not yet.
        assert after[1] <= before[1]
        assert after[0] <= before[0]


INIT = """#!/bin/busybox sh
export PATH=/bin
for module in /modules/*; do busybox insmod $module; done
busybox mkdir /dev /proc /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
busybox ip addr add 10.0.2.15/24 dev eth0
busybox ip link set eth0 up
busybox ping -i 0.1 10.0.2.2
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_guest_goes_on_in_another_machine(packed: bool) -> None:
    """A restored card has its queues and filters; its network begins anew around it."""
    archive = Archive()
    archive.file("bin/busybox", initramfs.find_busybox("amd64").read_bytes(), 0o755)
    archive.file("init", INIT.encode(), 0o755)
    archive.device("dev/console", 5, 1)
    found = modules.fetch("cloud")[1].closure([modules.TRANSPORTS["pci"], "virtio_net"])
    for order, module in enumerate(found):
        archive.file(f"modules/{order:02}-{module.name}.ko", module.data)

    def make() -> tuple[Machine, Net]:
        machine = Machine(memory="192M", engine="soft")
        return machine, machine.add_net(mac="52:54:00:00:00:01", packed=packed)

    first, _ = make()
    with first:
        first.load(
            kernel=kernel.fetch("cloud").image,
            initrd=archive.finish(),
            cmdline="console=ttyS0 quiet panic=-1 cryptomgr.notests tsc=reliable",
        )
        first.start()
        first.console.expect("seq=2 ", timeout=60)
        first.pause()
        snapshot = first.snapshot()
    second, net = make()
    with second:
        second.restore(snapshot)
        second.start()
        for seq in (5, 6, 7):
            second.console.expect(f"seq={seq} ", timeout=30)
        assert net.statistics()["rx_frames"] >= 3
        assert net.statistics()["rx_filtered"] == 0
