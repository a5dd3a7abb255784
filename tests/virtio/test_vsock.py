"""virtio-vsock from Python, without a guest. (test_agent.py has Linux's driver.)"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_guest import PATIENCE, running

from polyvisor.errors import ConfigError, HostError, StateMismatch
from polyvisor.machine import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(memory="16M", engine="soft") as made:
        yield made


def test_what_it_is(machine: Machine, tmp_path: Path) -> None:
    assert machine.vsock is None
    path = tmp_path / "v"
    made = machine.add_vsock(42, path)
    assert machine.vsock is made
    assert (made.cid, made.path, made.connections) == (42, str(path), 0)
    assert path.is_socket()
    assert path.stat().st_mode & 0o777 == 0o600
    assert repr(made) == f"<Vsock 42 at {str(path)!r}, virtio-pci>"
    machine.close()
    assert not path.exists()
    with pytest.raises(StateMismatch):
        made.connect(1)


def test_no_driver(machine: Machine, tmp_path: Path) -> None:
    made = machine.add_vsock(path=tmp_path / "v")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConnectionRefusedError):
        made.connect(22)
    with made.listen(80) as listener:
        with pytest.raises(ConfigError, match="taken"):
            made.listen(80)
        with pytest.raises(TimeoutError):
            listener.accept(0.01)
    with made.listen(80) as listener:
        machine.close()
        with pytest.raises(ConnectionAbortedError):
            listener.accept(1.0)
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"cid": 2}, ConfigError),
        ({"cid": 1 << 32}, ConfigError),
        ({"path": "/no/such/folder/v"}, HostError),
        ({"path": "/" + "x" * 120}, ConfigError),
        ({"transport": "usb"}, ConfigError),
    ],
)
def test_wrong_arguments(machine: Machine, arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        machine.add_vsock(**arguments)


@pytest.mark.boot
@pytest.mark.timeout(PATIENCE + 60)
def test_linux_and_a_program_of_the_host(tmp_path: Path) -> None:
    """The agent's greeting comes through the socket that any program of the host can use, also when
    the guest's driver was taken off the device and put on it again."""
    path = tmp_path / "v"
    with running(lambda made: made.add_vsock(path=path)) as machine:
        agent = machine.agent(timeout=PATIENCE)
        for again in (False, True):
            if again:
                script = (
                    "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport; "
                    "(sleep 0.2; d=$(ls -d virtio*); echo $d >unbind; echo $d >bind) & "
                )
                assert agent.exec(["sh", "-c", script]).status == 0
                agent = _patient(machine)
            with socket.socket(socket.AF_UNIX) as stream:
                stream.connect(str(path))
                stream.sendall(b"CONNECT 20566\n")
                stream.settimeout(30)
                said = b""
                while b"PVX1" not in said:
                    more = stream.recv(100)
                    assert more
                    said += more
                assert said.startswith(b"OK ")
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(str(path))
            stream.sendall(b"CONNECT 4\n")
            assert stream.recv(10) == b""


def _patient(machine: Machine) -> Any:
    import time

    time.sleep(1.0)
    agent = machine.agent(timeout=30)
    assert agent.exec(["echo", "again"]).text == "again\n"
    return agent


@pytest.mark.boot
@pytest.mark.timeout(PATIENCE + 60)
def test_a_guest_that_goes_on_in_another_machine() -> None:
    """Its connections did not come along: it hears of that, and new ones work."""
    with running(lambda made: made.add_vsock()) as machine:
        agent = machine.agent(timeout=PATIENCE)
        with agent.start(["sleep", "1234"]) as process:
            with pytest.raises(TimeoutError):
                process.wait(0.3)
            machine.pause()
            snapshot = machine.snapshot()
    with Machine(machine.config) as second:
        second.add_vsock()
        second.restore(snapshot)
        second.start()
        agent = second.agent(timeout=PATIENCE)
        for _ in range(200):
            if "sleep 1234" not in (text := agent.exec(["ps"]).text):
                break
        assert "sleep 1234" not in text
