"""virtio-rng: the entropy source, with FakeGuest and under Linux."""

from __future__ import annotations

import time

import pytest

import polyvisor
from polyvisor.errors import ConfigError, DeviceError
from polyvisor.virtio import VirtioDevice
from polyvisor.virtio.rng import Rng
from polyvisor.virtio.testing import FakeGuest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from polyvisor._ring import Queue
    from polyvisor.machine import Machine


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_differ(packed: bool) -> None:
    rng = Rng()
    with FakeGuest(rng, packed=packed) as guest:
        one, two = (guest.request(0, b"", 4096) for _ in range(2))
        assert len(one) == len(two) == 4096
        assert one != two
        assert len(set(one)) > 200
        guest.offer(0, b"", [10, 20, 30])
        guest.kick(0)
        used = guest.wait(0)
        assert used is not None
        assert used[2] == 60
        assert rng.bytes_given == 8252


def test_a_source_of_ones_own() -> None:
    with FakeGuest(Rng(lambda size: b"abc")) as guest:
        assert guest.request(0, b"", 100) == b"abc", "fewer is fine"
        assert guest.request(0, b"", 2) == b"ab"
        assert guest.request(0, b"what is this?", 0) == b""


def test_long_requests_are_cut() -> None:
    with FakeGuest(Rng()) as guest:
        assert len(guest.request(0, b"", 1 << 20)) == 1 << 16


def test_the_rate() -> None:
    """A second's worth at once, and then no more than the rate."""
    with FakeGuest(Rng(rate=20_000)) as guest:
        assert len(guest.request(0, b"", 60_000)) == 20_000
        started = time.monotonic()
        got = sum(len(guest.request(0, b"", 500)) for _ in range(20))
        seconds = time.monotonic() - started
        assert got / seconds < 25_000
        guest.offer(0, b"", 60_000)
        guest.restart()  # while it waits
    with pytest.raises(ConfigError, match="at least 1 byte"):
        Rng(rate=0)


@pytest.mark.boot
@pytest.mark.parametrize(("transport", "packed"), [("pci", True), ("mmio", False)])
def test_linux_has_a_hwrng(transport: str, packed: bool) -> None:
    given: list[Rng] = []

    def add(machine: Machine) -> None:
        given.append(machine.add_rng(transport=transport, packed=packed))

    done = polyvisor.exec(
        [
            "sh",
            "-c",
            "cat /sys/class/misc/hw_random/rng_current; head -c 100000 /dev/hwrng | md5sum",
        ],
        engine="soft",
        on_machine=add,
        check=True,
        timeout=60,
    )
    assert done.text.startswith("virtio_rng.0\n")
    assert given[0].bytes_given >= 100_000


class Broken(VirtioDevice):
    device_type = 4
    name = "broken"
    queue_sizes = (8,)

    def serve(self, queue: Queue) -> None:
        for _ in queue:
            raise LookupError("a bug in the device")


@pytest.mark.boot
def test_an_exception_in_a_handler_ends_the_machine() -> None:
    with pytest.raises(DeviceError, match="broken raised in serve") as caught:
        polyvisor.exec(
            ["head", "-c", "10", "/dev/hwrng"],
            engine="soft",
            on_machine=lambda machine: machine.add_virtio(Broken()),
            timeout=60,
        )
    assert isinstance(caught.value.__cause__, LookupError)
    assert caught.value.device == "broken"


def test_devices_in_a_machine() -> None:
    """What it says of itself, and that closing the machine lets go of it."""
    device = Rng()
    with polyvisor.Machine(memory="16M", engine="soft") as machine:
        assert machine.add_virtio(device, transport="mmio", packed=True) is device
        assert device.place is not None
        assert device.place.transport == "mmio"
        assert not device.started
        with pytest.raises(ConfigError, match="plugged in somewhere"):
            machine.add_virtio(device)
        with pytest.raises(ConfigError, match="no virtio device"):
            machine.add_virtio(object())  # type: ignore[type-var]
        with pytest.raises(ConfigError):
            machine.add_virtio(Rng(), transport="isa")
        with device.queue(0) as queue:
            assert not queue
            for wait in (machine.start, machine.pause, machine.snapshot, machine.stop):
                with pytest.raises(polyvisor.errors.StateMismatch, match="holds a virtio queue"):
                    wait()
            machine.end("power_off")
    with pytest.raises(polyvisor.errors.StateMismatch, match="closed"):
        device.queue(0)
