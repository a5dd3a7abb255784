"""Devices and timers that are written in Python."""

from __future__ import annotations

import gc
import threading
import time
import traceback
import weakref

import pytest
from guestcode import (
    HLT,
    LOOP_FOREVER,
    STI,
    end,
    in8,
    in32,
    out8,
    out32,
    real_mode,
    say,
    store_al,
    store_eax,
)

import polyvisor
from polyvisor.errors import ConfigError, DeviceError, MemoryRangeError, StateMismatch

PORT = 0x500


class Recorder:
    """Ten lines are enough for a device."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.parts: tuple[object, ...] = ()
        self.seen: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size, value))


def test_ports() -> None:
    device = Recorder(0x12345678)
    code = out8(PORT, 0x42) + out32(PORT + 4, 0xCAFEBABE) + in32(PORT) + store_eax(0x9000)
    with real_mode(code + in8(PORT + 7) + store_al(0x9004) + end()) as machine:
        machine.add_port_device(PORT, device, size=8)
        assert machine.run(timeout=10).reason == "debug_exit"
        assert machine.memory.read(0x9000, 5) == bytes.fromhex("7856341278")
    assert device.seen == [
        ("write", 0, 1, 0x42),
        ("write", 4, 4, 0xCAFEBABE),
        ("read", 0, 4),
        ("read", 7, 1),
    ]


def test_memory() -> None:
    device = Recorder(0x1122334455667788)
    # mov ebx, 0xd0000000; mov rax, [rbx+8]; mov [0x9000], rax; mov byte [rbx], 7; out 0xf4, al
    code = bytes.fromhex("bb000000d0 488b4308 488904250090 0000 c60307 e6f4 f4")
    with polyvisor.Machine(memory="16M") as machine:
        machine.add_memory_device(0xD000_0000, device, size=0x1000)
        machine.load_raw(0x8000, code)
        machine.cpu(0).enter_long_mode(page_tables_at=0x1000, rip=0x8000)
        assert machine.run(timeout=10).reason == "debug_exit"
        assert machine.memory.read_int(0x9000) == 0x1122334455667788
    assert device.seen == [("read", 8, 8), ("write", 0, 1, 7)]


@pytest.mark.parametrize(("answer", "seen"), [(-1, 0xFF), (0x1FF, 0xFF), (True, 1), (1 << 80, 0)])
def test_only_the_low_bits_of_an_answer_count(answer: int, seen: int) -> None:
    with real_mode(in8(PORT) + store_al(0x9000) + end()) as machine:
        machine.add_port_device(PORT, Recorder(answer))
        machine.run(timeout=10)
        assert machine.memory.read(0x9000, 1)[0] == seen


def test_half_devices() -> None:
    class Reader:
        def read(self, offset: int, size: int) -> int:
            return 0x33

    class Writer:
        def __init__(self) -> None:
            self.value = 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.value = value

    writer = Writer()
    code = out8(PORT, 1) + out8(PORT + 1, 2) + in8(PORT) + store_al(0x9000)
    with real_mode(code + in8(PORT + 1) + store_al(0x9001) + end()) as machine:
        machine.add_port_device(PORT, Reader())
        machine.add_port_device(PORT + 1, writer)
        machine.run(timeout=10)
        assert machine.memory.read(0x9000, 2) == b"\x33\xff"
        assert writer.value == 2
        for thing in (object(), 5, None):
            with pytest.raises(ConfigError, match="neither read"):
                machine.add_port_device(0x600 + 0x100, thing)


def test_one_device_in_several_places() -> None:
    device = Recorder()
    with real_mode(out8(PORT, 1) + out8(0x510, 2) + end()) as machine:
        machine.add_port_device(PORT, device)
        machine.add_port_device(0x510, device, base=4)
        machine.run(timeout=10)
    assert device.seen == [("write", 0, 1, 1), ("write", 4, 1, 2)]


def test_ranges_do_not_overlap() -> None:
    with real_mode(end()) as machine:
        with pytest.raises(MemoryRangeError):
            machine.add_port_device(0x3FB, Recorder(), size=2)
        with pytest.raises(MemoryRangeError):
            machine.add_port_device(0xFFFF, Recorder(), size=2)
        with pytest.raises(ConfigError):
            machine.add_port_device(PORT, Recorder(), size=0)
        machine.add_port_device(PORT, Recorder())
        machine.remove_port_device(PORT)
        machine.add_port_device(PORT, Recorder())
        with pytest.raises(MemoryRangeError):
            machine.remove_port_device(PORT + 1)


class Broken:
    def read(self, offset: int, size: int) -> int:
        raise ValueError("the disk is full")

    def write(self, offset: int, size: int, value: int) -> None:
        self.read(offset, size)


@pytest.mark.parametrize(
    ("access", "code"), [("read", in8(PORT + 3)), ("write", out8(PORT + 3, 1))]
)
def test_an_exception_ends_the_machine(access: str, code: bytes) -> None:
    with real_mode(code + LOOP_FOREVER) as machine:
        machine.add_port_device(PORT, Broken(), size=4)
        with pytest.raises(DeviceError) as caught:
            machine.run(timeout=10)
        error = caught.value
        assert (error.device, error.access, error.offset, error.size) == ("Broken", access, 3, 1)
        assert isinstance(error.__cause__, ValueError)
        assert "the disk is full" in str(error)
        text = "".join(traceback.format_exception(error))
        assert 'raise ValueError("the disk is full")' in text
        assert machine.state == "ended"
        with pytest.raises(DeviceError):  # whoever asks again hears it again
            machine.wait(0)
    with pytest.raises(DeviceError):
        machine.wait()


@pytest.mark.parametrize("answer", [None, "ff", 1.0])
def test_an_answer_that_is_no_number(answer: object) -> None:
    with real_mode(in8(PORT) + LOOP_FOREVER) as machine:
        machine.add_port_device(PORT, Recorder(answer))  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match="must return an int"):
            machine.run(timeout=10)


def test_a_device_may_end_and_stop_its_machine() -> None:
    class Switch:
        def __init__(self, machine: polyvisor.Machine, stop: bool) -> None:
            self.machine, self.stop = machine, stop

        def write(self, offset: int, size: int, value: int) -> None:
            if self.stop:
                self.machine.stop()
            else:
                self.machine.end("power_off", detail="by the switch")

    for stop, reason in ((True, "stopped"), (False, "power_off")):
        with real_mode(out8(PORT, 1) + LOOP_FOREVER) as machine:
            machine.add_port_device(PORT, Switch(machine, stop))
            assert machine.run(timeout=10).reason == reason


def test_a_device_may_pause_its_machine_but_not_wait_for_it() -> None:
    class Breakpoint:
        def __init__(self, machine: polyvisor.Machine) -> None:
            self.machine = machine
            self.refused = 0

        def write(self, offset: int, size: int, value: int) -> None:
            for call in (self.machine.wait, self.machine.close):
                try:
                    call()
                except StateMismatch:
                    self.refused += 1
            self.machine.pause()

    with real_mode(out8(PORT, 1) + end(4)) as machine:
        device = Breakpoint(machine)
        machine.add_port_device(PORT, device)
        machine.start()
        while machine.state != "paused":
            time.sleep(0.001)
        machine.pause()  # waits until it really stands still
        assert device.refused == 2
        assert machine.run(timeout=10).status == 9


def test_interrupts_reach_the_guest() -> None:
    # The 8259 gets vectors 0x20.. and lets IRQ 5 through; the handler ends the machine.
    setup = out8(0x20, 0x11) + out8(0x21, 0x20) + out8(0x21, 4) + out8(0x21, 1) + out8(0x21, 0xDF)
    with real_mode(setup + say(b"ready") + STI + HLT + LOOP_FOREVER) as machine:
        machine.load_raw(0x8000, end(6))
        machine.memory.write(0x25 * 4, b"\x00\x80\x00\x00")  # IRQ 5 -> 0:8000
        line = machine.irq(5)
        machine.start()
        machine.console.expect("ready", timeout=10)
        line.pulse()
        info = machine.wait(10)
        assert info is not None
        assert info.status == 13
        with pytest.raises(ConfigError):
            machine.irq(99)


def test_timers_call_back_on_virtual_time() -> None:
    with real_mode(LOOP_FOREVER) as machine:
        times: list[int] = []
        done = threading.Event()

        def tick() -> None:
            times.append(machine.now)
            if len(times) < 3:
                timer.arm(times[-1] + 5_000_000)
            else:
                done.set()

        timer = machine.timer(tick)
        assert timer.deadline is None
        timer.arm(machine.now + 5_000_000)
        assert timer.deadline == 5_000_000
        machine.start()
        assert done.wait(10)
        machine.stop()
        assert times[0] >= 5_000_000
        assert times[2] >= times[0] + 10_000_000
    with pytest.raises(StateMismatch):
        timer.arm(1)


def test_an_exception_in_a_timer_ends_the_machine() -> None:
    def explode() -> None:
        raise RuntimeError("tick")

    with real_mode(LOOP_FOREVER) as machine:
        machine.timer(explode).arm(1)  # nobody else holds it: it must not fire then
        timer = machine.timer(explode)
        timer.arm(1_000_000)
        with pytest.raises(DeviceError) as caught:
            machine.run(timeout=10)
        assert caught.value.access == "timer"
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_two_cpus_take_turns_in_a_device() -> None:
    class Slow:
        def __init__(self) -> None:
            self.inside = 0
            self.most = 0
            self.calls = 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.001)  # gives the GIL up
            self.calls += 1
            self.inside -= 1

    device = Slow()
    with real_mode(out8(PORT, 1) * 20 + LOOP_FOREVER, cpus=2) as machine:
        machine.add_port_device(PORT, device)
        machine.cpu(1).state = machine.cpu(0).state
        machine.start()
        while device.calls < 40:
            time.sleep(0.005)
        machine.stop()
    assert device.most == 1


def test_a_device_that_does_not_return() -> None:
    release = threading.Event()

    class Stuck:
        def write(self, offset: int, size: int, value: int) -> None:
            release.wait(20)

    with real_mode(out8(PORT, 1) + LOOP_FOREVER) as machine:
        machine.add_port_device(PORT, Stuck())
        machine.start()
        time.sleep(0.02)
        begin = time.monotonic()
        with pytest.raises(StateMismatch, match="does not return"):
            machine.stop()
        assert time.monotonic() - begin < 1.0
        release.set()
        assert machine.stop().reason == "stopped"


def test_devices_go_with_their_machine() -> None:
    device = Recorder()
    alive = weakref.ref(device)
    with real_mode(end()) as machine:
        machine.add_port_device(PORT, device)
        device.parts = (machine, machine.irq(5), machine.timer(lambda: None))
    del device, machine
    gc.collect()
    assert alive() is None
