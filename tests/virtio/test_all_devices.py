"""All virtio devices in one machine, under Linux's drivers, on each engine: what goes through them,
and who notified whom how (on KVM the queues' doorbells are ioeventfds)."""

from __future__ import annotations

import hashlib
import http.server
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import polyvisor
from polyvisor import Machine

CONTENT = random.Random(5).randbytes(1 << 20)
SCRIPT = """
set -e
md5sum < /dev/vda
mkdir /share
mount -t virtiofs folder /share
md5sum < /share/file
cp /share/file /share/copy
head -c 65536 /dev/hwrng | wc -c
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
wget -q -O - http://10.0.2.2:$PORT/ | md5sum
port=/dev/$(cd /sys/class/virtio-ports; grep -lx data */name | cut -d / -f 1)
echo "through the port" > $port
dd if=/share/file of=/dev/vda bs=64k conv=fsync 2> /dev/null
for path in /sys/bus/virtio/devices/*; do basename $(readlink $path/driver); done | sort
"""
DRIVERS = [
    *["virtio_balloon", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng", "virtiofs"],
    "vmw_vsock_virtio_transport",
]


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.boot
@pytest.mark.slow
@pytest.mark.parametrize(("transport", "packed"), [("pci", True), ("mmio", False)])
def test_all_of_them(
    tmp_path: Path,
    fast_engine: str,
    port: int,
    transport: Literal["pci", "mmio"],
    packed: bool,
) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "folder"
    disk.write_bytes(bytes(1 << 20))
    folder.mkdir()
    (folder / "file").write_bytes(CONTENT)
    said: list[str] = []

    def plug(machine: Machine) -> None:
        machine.add_disk(disk, transport=transport, packed=packed)
        machine.add_share(folder, "folder", read_only=False, transport=transport, packed=packed)
        machine.add_rng(transport=transport, packed=packed)
        machine.add_net("user", transport=transport, packed=packed)
        machine.add_vsock(transport=transport, packed=packed)
        machine.add_balloon(transport=transport, packed=packed)
        console = machine.add_console("data", transport=transport, packed=packed)

        def listen() -> None:
            said.append(console.ports["data"].expect(r"(.*)\n", timeout=200)[1])

        threads.append(threading.Thread(target=listen))

    threads: list[threading.Thread] = []
    result = polyvisor.exec(
        ["sh", "-c", SCRIPT],
        engine=fast_engine,
        env={"PORT": str(port)},
        on_machine=plug,
        on_start=lambda machine, channel: threads[0].start(),
        timeout=240,
    )
    threads[0].join(timeout=20)
    assert (result.status, result.stderr) == (0, b""), (result.stderr, result.console[-2000:])
    digest = f"{hashlib.md5(CONTENT).hexdigest()}  -"
    empty = f"{hashlib.md5(bytes(1 << 20)).hexdigest()}  -"
    first, second, count, third, *drivers = result.text.splitlines()
    assert [first, second, count, third] == [empty, digest, "65536", digest]
    assert drivers == DRIVERS
    assert said == ["through the port\r"] or said == ["through the port"]
    assert disk.read_bytes() == CONTENT
    assert (folder / "copy").read_bytes() == CONTENT
