"""The host's end of the agent's connections, with an agent that says what it likes."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

import pytest

from polyvisor.errors import GuestError, HostError, MachineTimeout
from polyvisor.guest.agent import Agent, GuestFileError
from polyvisor.guest.channel import frame
from polyvisor.machine import Machine
from polyvisor.virtio.vsock import Vsock

READY = frame(b"R", b"PVX1" + struct.pack("<I", 1 << 18))


class FakeMachine:
    """Runs, for ever."""

    name = "fake"
    state = "running"


class FakeVsock:
    """Connects to `play`, which gets the other end of the stream, on a thread."""

    def __init__(self, play: Callable[[socket.socket], None]) -> None:
        self.play = play
        self.threads: list[threading.Thread] = []

    def connect(self, port: int, timeout: float | None) -> socket.socket:
        ours, theirs = socket.socketpair()

        def run() -> None:
            with theirs, suppress(OSError):  # the host hung up
                self.play(theirs)

        thread = threading.Thread(target=run)
        thread.start()
        self.threads.append(thread)
        return ours


@contextmanager
def peer(play: Callable[[socket.socket], None]) -> Iterator[Agent]:
    vsock = FakeVsock(play)
    before = set(os.listdir("/proc/self/fd"))
    yield Agent(cast(Machine, FakeMachine()), cast(Vsock, vsock))
    for thread in vsock.threads:
        thread.join()
    assert set(os.listdir("/proc/self/fd")) == before


def read_request(stream: socket.socket) -> bytes:
    data = b""
    while frame(b"b") not in data:
        some = stream.recv(4096)
        if not some:
            raise OSError("the host hung up")
        data += some
    return data


def saying(*frames: bytes) -> Callable[[socket.socket], None]:
    def play(stream: socket.socket) -> None:
        stream.sendall(READY)
        read_request(stream)
        stream.sendall(b"".join(frames))

    return play


def test_a_hang_up_is_told() -> None:
    with peer(saying(frame(b"o", b"some"))) as agent, pytest.raises(GuestError) as caught:
        agent.exec(["true"])
    assert caught.value.reason == "agent"


def test_silence_is_bounded() -> None:
    def wait(stream: socket.socket) -> None:
        while stream.recv(1000):
            pass

    with peer(wait) as agent:
        with pytest.raises(MachineTimeout):
            agent.exec(["true"], timeout=0.2)
        with pytest.raises(MachineTimeout):
            agent.read_file("/x", timeout=0.2)
        with pytest.raises(TimeoutError):
            agent.ping(0.2)
        with pytest.raises(MachineTimeout):
            agent.exec(["cat"], stdin=bytes(10_000_000), timeout=0.2)


def test_credit_without_end_is_not_memory_without_end() -> None:
    """An agent that gives any credit and reads nothing holds the stdin up, in the host's hands."""
    grant = frame(b"c", struct.pack("<I", 0xFFFFFFFF))
    stop = threading.Event()

    def play(stream: socket.socket) -> None:
        stream.sendall(READY + grant * 20)
        stop.wait(10)

    # (The pipe is there before and after.)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as source, peer(play) as agent:
        process = agent.start(["cat"], stdin=source)
        written = 0
        os.set_blocking(writer, False)
        for _ in range(300):
            try:
                written += os.write(writer, bytes(65536))
            except BlockingIOError:
                with pytest.raises(TimeoutError):
                    process.wait(0.005)
        assert written < 4 << 20
        process.close()
        stop.set()
    os.close(writer)


@pytest.mark.parametrize("seed", range(30))
def test_garbage(seed: int) -> None:
    source = random.Random(seed)

    def play(stream: socket.socket) -> None:
        if source.random() < 0.8:
            stream.sendall(READY)
        if source.random() < 0.5:
            read_request(stream)
        for _ in range(source.randrange(30)):
            kind = source.choice(b"Rcorfxz?qib")
            size = source.choice([0, 2, 4, 5, 8, 28, source.randrange(3000)])
            payload = source.randbytes(size)
            data = frame(bytes([kind]), payload)
            stream.sendall(data if source.random() < 0.9 else data[: source.randrange(len(data))])

    with peer(play) as agent:
        for call in (
            lambda: agent.exec(["x"], stdin=b"abc" * 1000, timeout=5),
            lambda: agent.read_file("/x", timeout=5),
            lambda: agent.write_file("/x", bytes(1000), timeout=5),
        ):
            with suppress(GuestError, MachineTimeout):
                call()


def test_files_only_when_they_were_asked_for(tmp_path: object) -> None:
    """Bytes before what the file is are nobody's; two of them are one."""
    info = frame(b"z", struct.pack("<IIIQQ", 0o104755, 0, 0, 3, 0))
    end = frame(b"x", bytes(2))
    with peer(saying(frame(b"o", b"early"), info, info, frame(b"o", b"abc"), end)) as agent:
        assert agent.read_file("/x") == b"abc"
        target = f"{tmp_path}/copy"
        assert agent.copy_out("/x", target) == 3
        assert os.stat(target).st_mode & 0o7777 == 0o755  # never setuid
        with pytest.raises(HostError):
            agent.copy_out("/x", "/dev/full")
    with peer(saying(frame(b"f", b"\x04\x0d\0\0\0"))) as agent:
        with pytest.raises(GuestFileError) as caught:
            agent.write_file("/x", b"")
        assert caught.value.errno == 13
