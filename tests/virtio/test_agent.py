"""The agent in a guest: commands, files, many at once, and what goes wrong."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from agent_guest import PATIENCE, running

from polyvisor.errors import ConfigError, GuestError, HostError, MachineTimeout, StateMismatch
from polyvisor.guest import CommandFailed, CommandNotRun
from polyvisor.guest.agent import Agent, GuestFileError
from polyvisor.machine import Machine

pytestmark = [pytest.mark.boot, pytest.mark.timeout(PATIENCE + 60)]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with running(lambda made: made.add_vsock()) as made:
        yield made


@pytest.fixture(scope="module")
def agent(machine: Machine) -> Agent:
    return machine.agent(timeout=PATIENCE)


def test_everything_about_a_command(agent: Agent) -> None:
    script = (
        'echo "in $(pwd) as $(id -u):$(id -g) word=$WORD user=${USER-none} <$1>"; cat; '
        "echo to stderr >&2; exit 42"
    )
    ran = agent.exec(
        ["sh", "-c", script, "sh", "ä b"],
        stdin="from stdin\n",
        env={"WORD": "set here", "USER": None},
        cwd="/tmp",
        user=(1000, 100),
    )
    assert ran.text == "in /tmp as 1000:100 word=set here user=none <ä b>\nfrom stdin\n"
    assert ran.stderr == b"to stderr\n"
    assert (ran.status, ran.signal) == (42, 0)
    assert 0 < ran.seconds < PATIENCE


def test_machine_exec(machine: Machine, agent: Agent) -> None:
    assert machine.exec(["echo", "hello"]).text == "hello\n"


def test_how_it_ends(agent: Agent) -> None:
    assert agent.exec(["true"]).status == 0
    ran = agent.exec(["sh", "-c", "kill -9 $$"])
    assert (ran.status, ran.signal) == (137, 9)
    with pytest.raises(CommandNotRun, match="no such command") as not_run:
        agent.exec(["/no/such"])
    assert (not_run.value.errno, not_run.value.status) == (2, 127)
    with pytest.raises(CommandNotRun, match="directory") as not_run:
        agent.exec(["true"], cwd="/nowhere")
    assert not_run.value.stage == "directory"
    with pytest.raises(CommandFailed, match="status 3") as failed:
        agent.exec(["sh", "-c", "echo why >&2; exit 3"], check=True)
    assert failed.value.completed.stderr == b"why\n"
    assert failed.value.tail == "why\n"
    with pytest.raises(ConfigError):
        agent.exec("ls -l")


def test_megabytes_each_way(agent: Agent) -> None:
    data = random.Random(1).randbytes(3_000_001)
    ran = agent.exec(["cat"], stdin=data)
    assert ran.stdout == data
    pieces: list[bytes] = []
    ran = agent.exec(["cat", "/dev/stdin"], stdin=data, on_stdout=pieces.append)
    assert b"".join(pieces) == data
    assert ran.stdout == b""


def test_stdin_from_a_file_and_from_a_pipe(agent: Agent, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(700_000)
    (tmp_path / "data").write_bytes(data)
    with (tmp_path / "data").open("rb") as file:
        assert agent.exec(["sha256sum"], stdin=file).text[:64] == hashlib.sha256(data).hexdigest()
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as source:
        process = agent.start(["head", "-n", "2"], stdin=source)
        os.write(writer, b"one\n")
        os.write(writer, b"two\nthree\n")
        assert process.wait(PATIENCE).text == "one\ntwo\n"
        os.close(writer)


def test_a_command_that_does_not_read_its_stdin(agent: Agent) -> None:
    assert agent.exec(["echo", "done"], stdin=bytes(5_000_000)).text == "done\n"


def test_twenty_at_once(agent: Agent) -> None:
    def run(number: int) -> str:
        script = f"read x; sleep 0.2; echo $x {number}; head -c 20000 /dev/zero | wc -c"
        return agent.exec(["sh", "-c", script], stdin=f"{number * number}\n").text

    with ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(run, range(20)))
    assert texts == [f"{n * n} {n}\n20000\n" for n in range(20)]


def test_a_slow_reader_stalls_nobody_else(agent: Agent) -> None:
    """The first command's output is not taken until the end, and it waits for that."""
    with agent.start(["head", "-c", "2000000", "/dev/zero"]) as slow:
        for _ in range(3):
            assert agent.exec(["echo", "quick"]).text == "quick\n"
        assert len(slow.wait(PATIENCE).stdout) == 2_000_000


def test_timeouts_and_kills(agent: Agent) -> None:
    started = time.monotonic()
    with pytest.raises(MachineTimeout) as caught:
        agent.exec(["sh", "-c", "sleep 1234"], timeout=0.5)
    assert caught.value.seconds == 0.5
    with agent.start(["sleep", "1234"]) as process:
        with pytest.raises(TimeoutError):
            process.wait(0.2)
        process.signal(signal.SIGTERM)
        assert process.wait(PATIENCE).signal == signal.SIGTERM
    with agent.start(["sleep", "1234"]):
        pass
    assert time.monotonic() - started < 60

    def sleepers() -> bool:
        return "sleep 1234" in agent.exec(["ps"]).text

    deadline = time.monotonic() + 20
    while sleepers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not sleepers()


def test_a_terminal(agent: Agent) -> None:
    assert agent.exec(["stty", "size"], tty=(33, 101)).text == "33 101\r\n"
    output: list[bytes] = []
    script = "trap 'stty size; exit 0' WINCH; echo go; while :; do sleep 0.05; done"
    with agent.start(["sh", "-c", script], tty=(24, 80), on_stdout=output.append) as process:
        deadline = time.monotonic() + PATIENCE
        while b"".join(output) != b"go\r\n" and time.monotonic() < deadline:
            with pytest.raises(TimeoutError):
                process.wait(0.1)
        assert b"".join(output) == b"go\r\n"
        process.resize(50, 132)
        assert process.wait(PATIENCE).status == 0
    assert b"".join(output) == b"go\r\n50 132\r\n"


def test_files(agent: Agent, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(2_000_003)
    source = tmp_path / "source"
    source.write_bytes(data)
    source.chmod(0o751)
    assert agent.copy_in(source, "/tmp/copy") == len(data)
    ran = agent.exec(["sh", "-c", "sha256sum /tmp/copy; stat -c %a /tmp/copy"])
    assert ran.text.split() == [hashlib.sha256(data).hexdigest(), "/tmp/copy", "751"]
    assert agent.copy_out("/tmp/copy", tmp_path / "back") == len(data)
    assert (tmp_path / "back").read_bytes() == data
    assert (tmp_path / "back").stat().st_mode & 0o7777 == 0o751
    folder = tmp_path / "folder"
    folder.mkdir()
    agent.copy_out("/tmp/copy", folder)
    assert (folder / "copy").read_bytes() == data
    agent.write_file("/tmp/text", "short\n", mode=0o600)
    agent.write_file("/tmp/copy", b"")  # shorter than before
    assert agent.read_file("/tmp/text") == b"short\n"
    assert agent.read_file("/tmp/copy") == b""
    assert agent.read_file("/proc/version").startswith(b"Linux version ")  # of no known size


def test_files_that_cannot_be(agent: Agent, tmp_path: Path) -> None:
    for path, errno in (("/no/such", 2), ("/tmp", 21)):
        with pytest.raises(GuestFileError) as caught:
            agent.read_file(path)
        assert (caught.value.errno, caught.value.path) == (errno, path)
        with pytest.raises(GuestFileError):
            agent.write_file(path, "x")
    with pytest.raises(HostError):
        agent.copy_in(tmp_path / "none", "/tmp/x")
    with pytest.raises(HostError):
        agent.copy_in(tmp_path, "/tmp/x")  # a directory
    old = tmp_path / "old"
    old.write_text("old")
    with pytest.raises(GuestFileError):
        agent.copy_out("/no/such", old)
    assert old.read_text() == "old"
    with pytest.raises(HostError):
        agent.copy_out("/proc/version", tmp_path / "no" / "folder")
    # A full file system of the guest, and one of the host.
    with pytest.raises(GuestFileError) as full:
        agent.write_file("/dev/full", bytes(100_000))
    assert full.value.errno == 28
    agent.write_file("/tmp/big", bytes(3_000_000))
    with pytest.raises(HostError) as host:
        agent.copy_out("/tmp/big", "/dev/full")
    assert host.value.errno == 28


def test_nothing_leaks(machine: Machine, agent: Agent) -> None:
    def look() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    agent.exec(["true"], stdin=b"x")
    before = look()
    for _ in range(20):
        agent.exec(["true"], stdin=b"x" * 1000)
        agent.start(["sleep", "9"]).close()
    deadline = time.monotonic() + 20
    assert machine.vsock is not None
    while (look() != before or machine.vsock.connections) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert look() == before
    assert machine.vsock.connections == 0
    assert not [line for line in machine.log() if "virtio" in line]


@pytest.mark.parametrize(("transport", "packed"), [("pci", True), ("mmio", False), ("mmio", True)])
def test_other_transports_and_rings(transport: Any, packed: bool) -> None:
    data = random.Random(4).randbytes(1_000_001)
    with running(lambda made: made.add_vsock(transport=transport, packed=packed)) as machine:
        agent = machine.agent(timeout=PATIENCE)
        assert machine.vsock is not None
        handle = machine.vsock.native
        assert handle.transport == transport
        assert bool(handle.driver_features & 1 << 34) == packed
        for _ in range(3):
            assert agent.exec(["cat"], stdin=data).stdout == data


def test_without_vsock_and_without_agent() -> None:
    with Machine(memory="16M", engine="soft") as bare, pytest.raises(StateMismatch, match="vsock"):
        bare.agent()
    with (
        running(lambda machine: machine.add_vsock(), ["sleep", "1000"]) as machine,
        pytest.raises(MachineTimeout, match="no agent answered"),
    ):
        machine.agent(timeout=4.0)


def test_the_guest_ends_meanwhile() -> None:
    with running(lambda machine: machine.add_vsock()) as machine:
        agent = machine.agent(timeout=PATIENCE)
        with agent.start(["sleep", "1000"]) as process:
            threading.Timer(0.3, machine.native.stop).start()
            with pytest.raises(GuestError, match="was stopped"):
                process.wait(PATIENCE)
        with pytest.raises(GuestError, match="was stopped"):
            agent.exec(["true"])


@pytest.mark.slow
def test_hot_stop_under_load() -> None:
    for _ in range(2):
        with (
            running(lambda machine: machine.add_vsock()) as machine,
            Path("/dev/zero").open("rb") as endless,
        ):
            agent = machine.agent(timeout=PATIENCE)
            processes = [agent.start(["cat", "/dev/zero"]) for _ in range(3)]
            processes.append(agent.start(["sha256sum"], stdin=endless))
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                for process in processes:
                    with pytest.raises(TimeoutError):
                        process.wait(0.02)
            started = time.monotonic()
            machine.native.stop()
            assert time.monotonic() - started < 5
            for process in processes:
                process.close()
