"""Guests of a few instructions: how they start, end, and are stopped."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
from guestcode import (
    CLI,
    DEBUG_EXIT,
    HLT,
    LOOP_FOREVER,
    ORIGIN,
    STI,
    end,
    in8,
    out8,
    real_mode,
    say,
    store_al,
)

import polyvisor
from leftovers import Leftovers
from polyvisor.errors import MachineTimeout, StateMismatch


def test_debug_exit_gives_its_status() -> None:
    with real_mode(end(20)) as machine:
        info = machine.run(timeout=10)
        assert info.reason == "debug_exit"
        assert info.status == 41
        assert str(info) == "debug exit with status 41"
        assert machine.state == "ended"
        assert machine.wait() == info  # again, at once
    assert machine.state == "closed"
    assert machine.wait() == info


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (out8(0xCF9, 6), "reset"),
        (out8(0x92, 1), "reset"),
        (out8(0x64, 0xFE), "reset"),  # the keyboard controller, in Python
        (b"\xb8\x00\x34\xba\x04\x06\xef", "power_off"),  # SLP_TYP 5, SLP_EN to PM1 control
    ],
)
def test_ways_to_end(code: bytes, reason: str) -> None:
    with real_mode(code + LOOP_FOREVER) as machine:
        assert machine.run(timeout=10).reason == reason


def test_a_triple_fault_ends_it(fast_engine: str) -> None:
    code = b"\x0f\x01\x1e\x00\x05\xcc"  # lidt of an empty table; int3
    with real_mode(code + LOOP_FOREVER, engine=fast_engine) as machine:
        info = machine.run(timeout=10)
        assert info.reason == "triple_fault"
        assert "triple fault" in info.detail


@pytest.mark.parametrize(
    "code", [LOOP_FOREVER, STI + HLT + LOOP_FOREVER, CLI + b"\xf3\x90\xeb\xfc"]
)
def test_stop_is_quick_whatever_the_guest_does(code: bytes) -> None:
    with real_mode(code) as machine:
        machine.start()
        time.sleep(0.02)
        begin = time.monotonic()
        info = machine.stop()
        assert time.monotonic() - begin < 0.5
        assert info.reason == "stopped"


def test_timeout_stops_the_machine() -> None:
    with real_mode(LOOP_FOREVER) as machine:
        with pytest.raises(MachineTimeout) as caught:
            machine.run(timeout=0.05)
        assert caught.value.seconds == 0.05
        assert machine.state == "ended"


def test_pause_and_resume() -> None:
    # inc dword [0x9000] for ever
    with real_mode(b"\x66\xff\x06\x00\x90\xeb\xf9") as machine:
        counter = machine.memory.view(0x9000, 4)
        machine.start()
        while not any(counter):
            time.sleep(0.001)
        with pytest.raises(StateMismatch):
            machine.cpu(0).registers["rip"]
        machine.pause()
        assert machine.state == "paused"
        before, now = bytes(counter), machine.now
        time.sleep(0.02)
        assert (bytes(counter), machine.now) == (before, now)
        assert ORIGIN <= machine.cpu(0).registers["rip"] <= ORIGIN + 5
        machine.resume()
        while bytes(counter) == before:
            time.sleep(0.001)
        machine.stop()
        assert machine.cpu(0).registers["rip"] >= ORIGIN


def test_code_changed_while_paused_is_what_runs() -> None:
    with real_mode(LOOP_FOREVER + b"\x90" + end(3)) as machine:
        machine.start()
        time.sleep(0.02)
        machine.pause()
        machine.memory.view(ORIGIN, 2)[:] = b"\x90\x90"  # a store that the engine cannot see
        assert machine.run(timeout=10).status == 7


def test_a_machine_runs_once() -> None:
    with real_mode(end()) as machine:
        with pytest.raises(StateMismatch):
            machine.wait(0)
        with pytest.raises(StateMismatch):
            machine.resume()
        with pytest.raises(StateMismatch):
            machine.pause()
        machine.run(timeout=10)
        with pytest.raises(StateMismatch):
            machine.start()
        assert machine.stop().reason == "debug_exit"  # the first end counts
    with pytest.raises(StateMismatch):
        machine.start()
    machine.close()


def test_stop_from_another_thread_while_waiting() -> None:
    with real_mode(LOOP_FOREVER) as machine:
        machine.start()
        threading.Timer(0.05, machine.stop).start()
        info = machine.wait(10)
        assert info is not None
        assert info.reason == "stopped"


def test_real_protected_and_long_mode() -> None:
    exit_code = b"\xb0\x05\xe6" + bytes([DEBUG_EXIT]) + HLT  # mov al, 5; out 0xf4, al
    for mode in ("real", "protected", "long"):
        with polyvisor.Machine(memory="16M") as machine:
            machine.load_raw(0x8000, exit_code)
            cpu = machine.cpu(0)
            if mode == "real":
                cpu.enter_real_mode(ip=0x8000)
            elif mode == "protected":
                cpu.enter_protected_mode(rip=0x8000)
            else:
                cpu.enter_long_mode(page_tables_at=0x1000, rip=0x8000, rsp=0x7000)
            assert machine.run(timeout=10).status == 11


def test_steps_are_exact() -> None:
    with real_mode(b"\x40" * 100) as machine:  # inc ax
        cpu = machine.cpu(0)
        cpu.step(3)
        assert (cpu.registers["rax"], cpu.registers["rip"]) == (3, ORIGIN + 3)
        cpu.step()
        assert cpu.registers["rax"] == 4
        cpu.registers["rax"] = 0x100
        cpu.step(2)
        assert cpu.registers["rax"] == 0x102
        assert machine.state == "created"


def test_stepping_can_end_the_machine() -> None:
    with real_mode(end(1)) as machine:
        machine.cpu(0).step(1000)
        assert machine.state == "ended"
        info = machine.wait(1)
        assert info is not None
        assert info.status == 3


def test_unclaimed_ports_float_and_are_counted() -> None:
    with real_mode(in8(0x5555) + store_al(0x9000) + end()) as machine:
        machine.memory.write(0x9000, b"\0")
        machine.run(timeout=10)
        assert machine.memory.read(0x9000, 1) == b"\xff"
        assert machine.stats()["unclaimed port accesses"] == 1
    assert machine.stats()["unclaimed port accesses"] == 1  # still there after close


def test_ranges_name_what_is_where() -> None:
    with real_mode(end(), irqchip="user") as machine:
        found = {(bus, start): name for bus, start, _, name in machine.ranges()}
        assert found["pio", 0x3F8] == "serial"
        assert found["pio", 0x70] == "Rtc"
        assert found["mmio", 0xFEC00000] == "ioapic"


def test_a_hundred_machines_leave_nothing_behind() -> None:
    def cycle(i: int) -> None:
        machine = real_mode(say(b"x") + LOOP_FOREVER)
        if i % 3:
            machine.start()
        if i % 2:
            machine.close()  # the others are collected

    cycle(1)
    before = Leftovers()
    for i in range(100):
        cycle(i)
    before.check()


def test_memory_goes_with_the_machine() -> None:
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    for _ in range(4):
        with polyvisor.Machine(memory="64M") as machine:
            machine.memory.write(0x100000, b"\x55" * (48 << 20))
    assert resident() - before < 40 << 20


def test_two_machines_do_not_mix() -> None:
    with real_mode(say(b"one") + end(1)) as one, real_mode(say(b"two") + end(2)) as two:
        one.start()
        two.start()
        assert two.wait(10).status == 5  # type: ignore[union-attr]
        assert one.wait(10).status == 3  # type: ignore[union-attr]
        assert one.console.transcript == "one"
        assert two.console.transcript == "two"


# 32-bit code: INIT, then a start-up IPI at 0x8000, to all CPUs but this one.
WAKE_OTHERS = bytes.fromhex("c7050003e0fe00450c00 c7050003e0fe08460c00")
COUNT_AND_HALT = bytes.fromhex("f0fe060090 fa f4 ebfd")  # lock inc byte [0x9000]; cli; hlt


def smp(code: bytes, cpus: int) -> polyvisor.Machine:
    machine = polyvisor.Machine(memory="2M", cpus=cpus)
    machine.load_raw(0x8000, COUNT_AND_HALT)
    machine.load_raw(0x10000, code)
    machine.cpu(0).enter_protected_mode(rip=0x10000, rsp=0x7000)
    return machine


@pytest.mark.parametrize("cpus", [2, 4])
def test_cpus_wake_each_other(cpus: int) -> None:
    # spin: cmp byte [0x9000], cpus - 1; jne spin; mov al, 7; out 0xf4, al
    wait = bytes.fromhex("803d00900000") + bytes([cpus - 1]) + bytes.fromhex("75f7 b007e6f4f4")
    with smp(WAKE_OTHERS + wait, cpus) as machine:
        assert machine.run(timeout=20).status == 15
        assert machine.memory.read(0x9000, 1)[0] == cpus - 1
        assert all(machine.cpu(n).state.activity != "wait_for_sipi" for n in range(cpus))


def test_the_last_cpu_that_halts_ends_the_machine() -> None:
    with smp(WAKE_OTHERS + CLI + HLT + LOOP_FOREVER, 3) as machine:
        assert machine.run(timeout=20).reason == "halted"
        assert machine.memory.read(0x9000, 1) == b"\x02"
