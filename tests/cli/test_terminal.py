"""Keys that are polyvisor's own, and raw mode on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import termios
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.cli.terminal import EscapeKeys, RawMode, Reader


@given(st.lists(st.binary(max_size=10)))
def test_other_keys_pass(pieces: list[bytes]) -> None:
    keys = EscapeKeys()
    pieces = [piece.replace(b"\x1d", b"") for piece in pieces]
    assert b"".join(keys.filter(piece) for piece in pieces) == b"".join(pieces)
    assert not keys.quit


@pytest.mark.parametrize(
    ("typed", "passed", "wants_out"),
    [
        (b"ab\x1dq", b"ab", True),
        (b"\x1d\x1d", b"\x1d", False),
        (b"\x1d\x1dq", b"\x1dq", False),
        (b"\x1dx", b"\x1dx", False),
        (b"\x1d", b"", False),
        (b"\x1dqrest", b"", True),
    ],
)
def test_escape(typed: bytes, passed: bytes, wants_out: bool) -> None:
    whole, bytewise = EscapeKeys(), EscapeKeys()
    assert whole.filter(typed) == passed
    assert whole.quit == wants_out
    out = b""
    for byte in typed:
        if not bytewise.quit:
            out += bytewise.filter(bytes([byte]))
    assert (out, bytewise.quit) == (passed, wants_out)


@pytest.fixture
def terminal() -> Iterator[int]:
    master, slave = pty.openpty()
    yield slave
    os.close(slave)
    os.close(master)


def test_raw_mode_is_undone(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    raw = RawMode(terminal)

    def fail_inside() -> None:
        with raw:
            assert raw.active
            local = termios.tcgetattr(terminal)[3]
            assert not local & (termios.ECHO | termios.ICANON | termios.ISIG)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert termios.tcgetattr(terminal) == before
    raw.restore()  # twice does no harm


def test_no_terminal_is_left_alone() -> None:
    read_end, write_end = os.pipe()
    with RawMode(read_end) as raw:
        assert not raw.active
    os.close(read_end)
    os.close(write_end)


def test_reader_passes_on_and_stops() -> None:
    read_end, write_end = os.pipe()
    got = bytearray()
    came = threading.Event()

    def take(data: bytes) -> None:
        got.extend(data)
        came.set()

    reader = Reader(read_end, take)
    os.write(write_end, b"data")
    assert came.wait(5)
    assert got == b"data"
    start = time.monotonic()
    reader.stop()  # though nothing comes
    assert time.monotonic() - start < 2
    os.close(read_end)
    os.close(write_end)


def test_reader_waits_for_room() -> None:
    read_end, write_end = os.pipe()
    room = threading.Event()
    came = threading.Event()
    reader = Reader(read_end, lambda data: came.set(), room=room.is_set)
    os.write(write_end, b"data")
    assert not came.wait(0.2)
    room.set()
    assert came.wait(5)
    os.close(write_end)  # the end of the input ends the thread by itself
    reader.stop()
    os.close(read_end)
