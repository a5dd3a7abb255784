from __future__ import annotations

import re
import time

import pytest
from guestcode import LOOP_FOREVER, SERIAL, end, out8, real_mode, say

from polyvisor.errors import ConfigError, ConsoleClosed, ConsoleTimeout

# Echoes every byte that comes on the first serial port: wait for LSR.DR, in, out.
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee ebf1")


def test_transcript_and_reading() -> None:
    with real_mode(say(b"hello\n") + say(b"world\n") + end()) as machine:
        machine.run(timeout=10)
        console = machine.console
        assert console.read() == "hello\nworld\n"
        assert console.read() == ""
        assert console.read(timeout=5) == ""  # ended: does not wait
        assert console.transcript == "hello\nworld\n"
        assert console.tail(6) == "world\n"
        assert console.closed
    assert console.transcript_bytes == b"hello\nworld\n"  # and after close


def test_expect_and_send() -> None:
    with real_mode(say(b"login: ") + ECHO) as machine:
        machine.start()
        assert machine.console.expect("login: ", timeout=10)
        machine.console.send("root\n")
        match = machine.console.expect(r"r(.*)t\n", timeout=10)
        assert match.group(1) == "oo"
        machine.console.send(b"\xffnext")
        assert machine.console.expect("n.xt", timeout=10)
        text = "x" * 500 + "!"  # more than the FIFO takes
        machine.console.send(text)
        assert machine.console.expect("x{500}!", timeout=10)
        assert machine.console.read() == ""


def test_matches_do_not_swallow_what_follows() -> None:
    with real_mode(say(b"one two three") + LOOP_FOREVER) as machine:
        machine.start()
        machine.console.expect("one", timeout=10)
        machine.console.expect("two", timeout=10)
        machine.console.expect(re.compile("THREE", re.IGNORECASE), timeout=10)


def test_timeout_shows_the_tail() -> None:
    with real_mode(say(b"panic: out of tea") + LOOP_FOREVER) as machine:
        machine.start()
        begin = time.monotonic()
        with pytest.raises(ConsoleTimeout) as caught:
            machine.console.expect("login", timeout=0.1)
        assert 0.1 <= time.monotonic() - begin < 2
        assert caught.value.tail == "panic: out of tea"
        assert caught.value.pattern == "login"
        assert machine.console.expect("tea", timeout=1)  # nothing was lost


def test_end_of_the_machine_shows_the_tail() -> None:
    with real_mode(say(b"bye") + end()) as machine:
        machine.start()
        with pytest.raises(ConsoleClosed) as caught:
            machine.console.expect("login", timeout=30)
        assert caught.value.tail == "bye"


def test_other_ports() -> None:
    code = say(b"first") + b"".join(out8(0x2F8, c) for c in b"second") + out8(0xE9, 0x44)
    with real_mode(code + end()) as machine:
        machine.run(timeout=10)
        assert machine.serial(0).transcript == "first"
        assert machine.serial(1).transcript == "second"
        assert machine.native.debug_console.read(0)[1] == b"D"
        with pytest.raises(ConfigError):
            machine.serial(2)
        assert machine.console is machine.serial(0)


def test_flow_control_holds_the_guest_and_loses_nothing() -> None:
    # mov dx, lsr; wait: in al, dx; test al, 0x20; jz wait; mov dx, thr; inc cl; mov al, cl; out;
    # loop
    flood = bytes.fromhex("bafd03 ec a820 74fb baf803 fec1 88c8 ee ebee")
    assert SERIAL == 0x3F8
    with real_mode(flood) as machine:
        console = machine.console
        console.flow_control()
        machine.start()
        time.sleep(0.5)
        held = machine.native.serial(0).size
        assert held < 1 << 20
        time.sleep(0.1)
        got = b""
        while len(got) < held + 100_000:
            got += console.read_bytes(timeout=5)
        first = got[0]
        assert got == bytes((first + i) & 0xFF for i in range(len(got)))
