"""The frames between exec and a guest's init, with the guest's side played by the tests."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import GuestError
from polyvisor.guest.channel import (
    MAX_PAYLOAD,
    Channel,
    Ended,
    Event,
    FileInfo,
    NotRun,
    Output,
    Ready,
    frame,
)


def ready(credit: int = 1 << 20) -> bytes:
    return frame(b"R", b"PVX1" + struct.pack("<I", credit))


def credit(count: int) -> bytes:
    return frame(b"c", struct.pack("<I", count))


class Wire:
    """Takes apart what the host sends, as guest/channel.c does."""

    def __init__(self) -> None:
        self.bytes = bytearray()

    def send(self, data: bytes) -> None:
        self.bytes += data

    @property
    def frames(self) -> list[tuple[bytes, bytes]]:
        found, at = [], 0
        while at < len(self.bytes):
            size = int.from_bytes(self.bytes[at + 1 : at + 3], "little")
            found.append(
                (bytes(self.bytes[at : at + 1]), bytes(self.bytes[at + 3 : at + 3 + size]))
            )
            at += 3 + size
        assert at == len(self.bytes)
        return found

    @property
    def stdin(self) -> bytes:
        return b"".join(payload for kind, payload in self.frames if kind == b"i")


_EVENTS = st.lists(
    st.one_of(
        st.builds(Output, st.sampled_from(["stdout", "stderr"]), st.binary(max_size=300)),
        st.builds(Ended, st.integers(0, 255)),
        st.builds(Ended, st.just(0), st.integers(1, 64)),
        st.builds(NotRun, st.sampled_from(["start", "directory", "exec"]), st.integers(1, 133)),
        st.builds(FileInfo, *[st.integers(0, 2**32 - 1)] * 3, *[st.integers(0, 2**64 - 1)] * 2),
    ),
    max_size=10,
)


def encode(event: Event) -> bytes:
    match event:
        case Output(stream, data):
            return frame(b"o" if stream == "stdout" else b"r", data)
        case Ended(status, signal):
            return frame(b"x", bytes([1, signal] if signal else [0, status]))
        case NotRun(stage, errno):
            number = ["start", "directory", "exec"].index(stage)
            return frame(b"f", bytes([number]) + struct.pack("<I", errno))
        case FileInfo(mode, uid, gid, size, mtime):
            return frame(b"z", struct.pack("<IIIQQ", mode, uid, gid, size, mtime))
    raise AssertionError(event)


@given(_EVENTS, st.data())
def test_events_whatever_the_pieces(events: list[Event], data: st.DataObject) -> None:
    stream = ready() + b"".join(encode(event) for event in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    channel = Channel(Wire().send)
    found: list[Event] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += channel.receive(stream[start:end])
    assert found == [Ready(), *events]


@given(st.binary(max_size=40).filter(lambda noise: b"PVX1" not in noise))
def test_what_comes_before_init_is_ignored(noise: bytes) -> None:
    channel = Channel(Wire().send)
    assert channel.receive(noise) == []
    assert not channel.ready
    assert channel.receive(ready()) == [Ready()]


@given(
    st.lists(st.binary(max_size=5000), max_size=5),
    st.lists(st.integers(1, 3000), max_size=20),
    st.integers(0, 2000),
)
def test_stdin_keeps_to_the_credit(parts: list[bytes], grants: list[int], first: int) -> None:
    wire = Wire()
    channel = Channel(wire.send)
    for part in parts:
        channel.write(part)
    channel.end_input()
    assert not wire.bytes
    whole, given_credit = b"".join(parts), first
    channel.receive(ready(first))
    for count in grants:
        assert wire.stdin == whole[:given_credit]
        assert channel.unsent == max(0, len(whole) - given_credit)
        channel.receive(credit(count))
        given_credit += count
    assert wire.stdin == whole[:given_credit]
    ended = [kind for kind, _ in wire.frames].count(b"e")
    assert ended == (given_credit >= len(whole))
    if ended:
        assert wire.frames[-1] == (b"e", b"")


def test_signals_do_not_wait_for_credit() -> None:
    wire = Wire()
    channel = Channel(wire.send)
    channel.resize(50, 132)  # before init listens: sent when it does
    assert not wire.bytes
    channel.receive(ready(0))
    channel.write(b"data")
    channel.signal(15)
    assert wire.frames == [(b"w", struct.pack("<HH", 50, 132)), (b"s", b"\x0f")]


@pytest.mark.parametrize(
    "junk",
    [
        b"?\x00\x00",
        frame(b"x", b"1"),
        frame(b"f", b"\x09\0\0\0\0"),
        frame(b"f", b"\0\xff\xff\xff\xff"),  # no errno that there is
        frame(b"c", b""),
        frame(b"z", bytes(27)),
    ],
)
def test_other_writers_are_noticed(junk: bytes) -> None:
    channel = Channel(Wire().send)
    channel.receive(ready())
    with pytest.raises(GuestError, match="ttyS1") as caught:
        channel.receive(junk)
    assert caught.value.reason == "channel"


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_whatever_a_guest_sends(pieces: list[bytes]) -> None:
    """Events or a GuestError, and no more memory than a frame needs."""
    channel = Channel(Wire().send)
    channel.write(b"stdin")
    channel.receive(ready())
    with suppress(GuestError):
        for piece in pieces:
            for event in channel.receive(piece):
                assert isinstance(event, Ready | Output | Ended | NotRun | FileInfo)
            assert len(channel._received) <= MAX_PAYLOAD + 3


def test_requests_of_any_size() -> None:
    wire = Wire()
    request = bytes(range(256)) * 700
    Channel(wire.send).request(request)
    *parts, (last, _) = wire.frames
    assert {kind for kind, _ in parts} == {b"q"}
    assert b"".join(payload for _, payload in parts) == request
    assert last == b"b"


def test_stdin_waits_for_a_socket_that_is_full() -> None:
    wire = Wire()
    channel = Channel(wire.send)
    channel.receive(ready())
    channel.congested = True
    channel.write(b"data")
    assert wire.stdin == b""
    channel.congested = False
    channel.pump()
    assert wire.stdin == b"data"
