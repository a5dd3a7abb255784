"""virtio-console: what can be said without a guest, and Linux's driver with all of it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from agent_guest import PATIENCE, running

from polyvisor.errors import ConfigError, ConsoleClosed, StateMismatch
from polyvisor.machine import Machine


@pytest.fixture
def bare() -> Iterator[Machine]:
    with Machine(memory="16M", engine="soft") as made:
        yield made


def test_what_it_is(bare: Machine) -> None:
    made = bare.add_console(["one", "two"], consoles=2, size=(24, 80), max_ports=6)
    assert repr(made) == "<VirtioConsole hvc0, hvc1, one, two, virtio-pci>"
    assert list(made.ports) == ["one", "two"]
    assert made.native.max_ports == 6
    assert not made.is_open("one")
    port = made.add_port("three")
    assert made.ports["three"] is port
    made.remove_port("one")
    assert list(made.ports) == ["two", "three"]
    assert made.add_port("again") is made.ports["again"]
    made.add_port("full")
    with pytest.raises(StateMismatch, match="max_ports"):
        made.add_port("more")
    made.resize(50, 132)
    bare.close()
    assert made.console.closed
    assert port.transcript == ""
    with pytest.raises(StateMismatch):
        made.resize(1, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ports": ["a", "a"]},
        {"ports": ["a/b"]},
        {"ports": [""]},
        {"consoles": 0},
        {"consoles": 40},
        {"max_ports": 1, "ports": "a"},
        {"size": (0, 80)},
        {"size": (1, 70000)},
        {"transport": "isa"},
    ],
)
def test_wrong_arguments(bare: Machine, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        bare.add_console(**arguments)


def test_wrong_ports(bare: Machine) -> None:
    only = bare.add_console()
    with pytest.raises(StateMismatch):
        only.remove_port(0)
    for call in (only.is_open, only.connect, only.disconnect):
        with pytest.raises(ConfigError):
            call("none")


SCRIPT = r"""
port() { for p in /sys/class/virtio-ports/*; do
    test "$(cat $p/name 2>/dev/null)" = "$1" && echo /dev/${p##*/} && return; done; }
exec 4<>/dev/hvc0  # a terminal that nobody has open loses what it hears of a new size
exec 3<>$(port data)
echo ready >&3
sum=$(head -c 300000 <&3 | sha256sum)
echo "sum $sum" >&3
head -c 300000 /dev/zero | tr '\0' 'z' >&3
echo "size $(stty size </dev/hvc0)" >/dev/hvc0
read line </dev/hvc0
while [ "$(stty size </dev/hvc0)" = "33 101" ]; do sleep 0.02; done
echo "line <$line> size $(stty size </dev/hvc0)" >/dev/hvc0
while [ -z "$(port late)" ]; do sleep 0.02; done
echo "found late" >$(port late)
while [ -n "$(port late)" ]; do sleep 0.02; done
read x <&3 || echo "data closed" >/dev/hvc0
# The driver lets go of the device and finds it again.
exec 3>&- 4>&-
cd /sys/bus/virtio/drivers/virtio_console
device=$(basename $(ls -d virtio*)); echo $device >unbind; sleep 0.1; echo $device >bind
while [ -z "$(port data)" ]; do sleep 0.02; done
echo "probed again" >$(port data)
echo "end" >/dev/hvc0
sleep 1000
"""


@pytest.mark.boot
@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize(("transport", "packed"), [("pci", False), ("mmio", True)])
def test_linux(transport: Any, packed: bool) -> None:
    import hashlib

    made: list[Any] = []

    def plug(machine: Machine) -> None:
        made.append(
            machine.add_console(
                "data", size=(33, 101), max_ports=4, transport=transport, packed=packed
            )
        )

    data = random.Random(5).randbytes(300_000)
    with running(plug, ["sh", "-c", SCRIPT]):
        console = made[0]
        stream, hvc = console.ports["data"], console.console
        stream.expect("ready\n", timeout=PATIENCE)
        assert console.is_open("data")
        stream.send(data)
        assert stream.expect("sum (.*)  -\n", 60).group(1) == hashlib.sha256(data).hexdigest()
        # More than is kept unread: the guest waits, and nothing is lost.
        time.sleep(0.3)
        got = b""
        while len(got) < 300_000:
            piece = stream.read_bytes(timeout=30)
            assert piece
            got += piece
        assert got == b"z" * 300_000
        hvc.expect("size 33 101\r?\n", 30)
        console.resize(50, 132)
        hvc.send("typed here\r")
        hvc.expect("line <typed here> size 50 132\r?\n", 30)
        late = console.add_port("late")
        late.expect("found late\n", 30)
        console.remove_port("late")
        console.disconnect("data")
        hvc.expect("data closed", 30)
        console.connect("data")
        stream.expect("probed again\n", 30)
        hvc.expect("end", 30)
        assert console.native.failure == ""


@pytest.mark.boot
@pytest.mark.timeout(PATIENCE + 60)
def test_the_kernels_console_and_a_stop_under_load() -> None:
    made: list[Any] = []
    with running(
        lambda machine: made.append(machine.add_console()),
        ["sh", "-c", "while :; do echo 0123456789 >/dev/hvc0; done"],
        append="console=hvc0",
    ) as machine:
        hvc = made[0].console
        hvc.expect("0123456789\r\n", PATIENCE)
        # With flow control the guest waits for whoever reads.
        hvc.flow_control()
        time.sleep(0.3)
        counted = sum(len(hvc.read_bytes(timeout=1)) for _ in range(20))
        assert counted > 0
        waiter: list[BaseException] = []

        def expect() -> None:
            with pytest.raises(ConsoleClosed) as caught:
                hvc.expect("never", None)
            waiter.append(caught.value)

        thread = threading.Thread(target=expect)
        thread.start()
        time.sleep(0.2)
        started = time.monotonic()
        machine.native.stop()
        thread.join(10)
        assert waiter
        assert time.monotonic() - started < 5
