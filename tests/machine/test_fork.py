"""Forks, signals and ends of machines, on every engine: nothing hangs, nothing harms another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guestcode import CLI, HLT, LOOP_FOREVER, ORIGIN, STI, real_mode

import polyvisor
from polyvisor.errors import StateMismatch

HERE = str(Path(__file__).parent)

PROLOGUE = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {HERE!r})
from guestcode import *
from polyvisor.errors import StateMismatch
engine = sys.argv[1]
COUNT = b"\\x66\\xff\\x06\\x00\\x90\\xeb\\xf9"  # a: inc dword [0x9000]; jmp a

def goes_on(machine):
    before = machine.memory.read(0x9000, 4)
    deadline = time.monotonic() + 20
    while machine.memory.read(0x9000, 4) == before:
        assert time.monotonic() < deadline, "the guest stands still"
        time.sleep(0.001)

def status_of(child):
    deadline = time.monotonic() + 20
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "the child hangs"
        time.sleep(0.01)

machine = real_mode(COUNT, engine=engine)
machine.start()
goes_on(machine)
"""


def python(engine: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, engine],
        capture_output=True,
        text=True,
        timeout=80,
    )


def succeeds(engine: str, code: str) -> None:
    done = python(engine, code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "done\n"


# --- Forks ---------------------------------------------------------------------------------------


def test_a_child_that_just_exits(engine: str) -> None:
    succeeds(
        engine,
        """
child = os.fork()
if child == 0:
    sys.exit(5)  # by way of all that an interpreter does at its end
assert status_of(child) == 5
goes_on(machine)
assert machine.stop().reason == "stopped"
print("done")
""",
    )


def test_a_child_that_uses_the_machine_is_told(engine: str) -> None:
    succeeds(
        engine,
        """
child = os.fork()
if child == 0:
    uses = [
        machine.pause, machine.stop, lambda: machine.wait(0),
        lambda: machine.cpu(0).registers["rax"],
        machine.cpu(0).nmi, machine.cpu(0).step, machine.snapshot, machine.resume, machine.start,
        lambda: machine.breakpoints.add(0x7c00), lambda: machine.irq(1), machine.stats,
        machine.wait_pause,
    ]
    for number, use in enumerate(uses):
        try:
            use()
        except StateMismatch as error:
            assert "forked" in str(error), error
        else:
            sys.exit(100 + number)
    machine.close()
    machine.close()
    assert machine.state == "closed"
    sys.exit(0)
assert status_of(child) == 0
goes_on(machine)
machine.close()
print("done")
""",
    )


def test_a_child_has_machines_of_its_own(engine: str) -> None:
    succeeds(
        engine,
        """
child = os.fork()
if child == 0:
    with real_mode(end(9), engine=engine) as own:
        assert own.run(timeout=30).status == 19
    sys.exit(0)
assert status_of(child) == 0
goes_on(machine)
machine.close()
print("done")
""",
    )


def test_a_fork_of_a_paused_machine_and_of_a_stopped_one(engine: str) -> None:
    succeeds(
        engine,
        """
machine.pause()
child = os.fork()
if child == 0:
    sys.exit(0)
assert status_of(child) == 0
machine.resume()
goes_on(machine)
machine.stop()
child = os.fork()
if child == 0:
    sys.exit(0)
assert status_of(child) == 0
print("done")
""",
    )


# --- Signals -------------------------------------------------------------------------------------


def test_signals_while_a_guest_runs(engine: str) -> None:
    succeeds(
        engine,
        """
seen = {signal.SIGALRM: 0, signal.SIGCHLD: 0, signal.SIGUSR1: 0}
def handler(number, frame):
    seen[number] += 1
for number in seen:
    signal.signal(number, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
# mov cx, 0; a: inc dword [0x9100]; loop a: 65536 times; END
code = b"\\xb9\\x00\\x00" + b"\\x66\\xff\\x06\\x00\\x91" + b"\\xe2\\xf9" + end(3)
for round in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0)
    with real_mode(code, engine=engine, cpus=2) as other:
        other.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        info = other.wait(60)
        assert info is not None and info.status == 7, info
        assert int.from_bytes(other.memory.read(0x9100, 4), "little") == 65536
    os.waitpid(child, 0)
signal.setitimer(signal.ITIMER_REAL, 0)
goes_on(machine)
machine.close()
assert all(seen.values()), seen
print("done")
""",
    )


@pytest.mark.parametrize("wait", ["wait()", "wait_pause()", "run()"])
def test_ctrl_c_ends_waiting(engine: str, wait: str) -> None:
    code = f"""
machine.pause()
machine.resume()
print("ready", flush=True)
try:
    machine.{wait}
except KeyboardInterrupt:
    print("interrupted")
machine.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + code, engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (output, errors, process.returncode) == ("interrupted\n", "", 0)


def test_signals_stay_with_the_main_thread(engine: str) -> None:
    """A process-directed signal is never handled on a vCPU's thread."""
    threads: set[int] = set()

    def handler(number: int, frame: object) -> None:
        threads.add(threading.get_ident())

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with real_mode(LOOP_FOREVER, engine=engine, cpus=2) as machine:
            machine.start()
            for _ in range(50):
                os.kill(os.getpid(), signal.SIGUSR2)
                time.sleep(0.001)
            assert machine.state == "running"
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert threads == {threading.get_ident()}


# --- Ends ----------------------------------------------------------------------------------------


class Slow:
    """A device that takes its time, and says when it has been reached."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.reached.set()
        time.sleep(0.3)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.read(offset, size)


@pytest.mark.parametrize("irqchip", ["auto", "user"])
@pytest.mark.parametrize("where", ["spinning", "halted", "halted_for_good", "device"])
def test_stop_whatever_all_cpus_do(engine: str, irqchip: str, where: str) -> None:
    last = {
        "spinning": LOOP_FOREVER,
        "halted": STI + HLT + LOOP_FOREVER,
        "halted_for_good": CLI + b"\xf3\x90\xeb\xfc",
        "device": b"\xa1\x00\x00\x00\xd0\xeb\xf9",  # a: mov eax, [0xd0000000]; jmp a
    }[where]
    # INIT and a start-up IPI at 0x8000 to all others; they count and go to 32-bit code.
    wake = bytes.fromhex("c7050003e0fe00450c00 c7050003e0fe08460c00")
    with polyvisor.Machine(memory="2M", cpus=3, engine=engine, irqchip=irqchip) as machine:
        others = LOOP_FOREVER if where != "halted" else STI + HLT + LOOP_FOREVER
        machine.load_raw(0x8000, bytes.fromhex("f0fe060090") + others)
        machine.load_raw(0x10000, wake + last)
        machine.cpu(0).enter_protected_mode(rip=0x10000, rsp=0x7000)
        slow = Slow()
        machine.add_memory_device(0xD0000000, slow, 0x1000)
        machine.start()
        deadline = time.monotonic() + 30
        while machine.memory.read(0x9000, 1) != b"\x02":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if where == "device":
            assert slow.reached.wait(30)
        begin = time.monotonic()
        assert machine.stop().reason == "stopped"
        assert time.monotonic() - begin < 1


def test_use_after_close(engine: str) -> None:
    machine = real_mode(LOOP_FOREVER, engine=engine)
    cpu = machine.cpu(0)
    breakpoints = machine.breakpoints
    machine.start()
    machine.close()
    machine.close()
    uses: list[Callable[[], object]] = [
        machine.start,
        machine.pause,
        machine.resume,
        machine.snapshot,
        machine.power_button,
        machine.ranges,
        machine.stops,
        cpu.nmi,
        cpu.step,
        lambda: cpu.registers["rip"],
        lambda: cpu.state,
        lambda: cpu.translate(0),
        lambda: machine.cpu(0),
        lambda: machine.memory,
        lambda: machine.irq(1),
        lambda: breakpoints.add(ORIGIN, "hardware"),
        lambda: list(breakpoints),
    ]
    for use in uses:
        with pytest.raises(StateMismatch, match="closed"):
            use()
    assert machine.stop().reason == "stopped"


def test_a_cpu_that_is_running(engine: str) -> None:
    with real_mode(LOOP_FOREVER, engine=engine) as machine:
        machine.start()
        cpu = machine.cpu(0)
        for use in (
            machine.start,
            machine.resume,
            machine.snapshot,
            cpu.step,
            lambda: cpu.registers["rip"],
            lambda: cpu.registers.update(rip=0),
            lambda: cpu.translate(0),
        ):
            with pytest.raises(StateMismatch, match="is running"):
                use()
        assert machine.state == "running"


@pytest.mark.parametrize("fault", ["triple", "wild"])
def test_a_guest_ends_only_its_own_machine(engine: str, fault: str) -> None:
    with real_mode(b"\x66\xff\x06\x00\x90\xeb\xf9", engine=engine) as other:
        other.start()
        with real_mode(b"\x0f\x0b" + LOOP_FOREVER, engine=engine) as machine:
            # UD2 with an empty IDT; or code where nothing is, which KVM cannot emulate.
            rip = ORIGIN if fault == "triple" else 0xD0000000
            machine.cpu(0).enter_protected_mode(rip=rip)
            info = machine.run(timeout=30)
            assert info.reason in ("triple_fault", "engine_failure"), info
            if info.reason == "engine_failure":
                assert "rip 0010:d0000000" in info.detail  # registers, not a bare number
        before = other.memory.read(0x9000, 4)
        deadline = time.monotonic() + 30
        while other.memory.read(0x9000, 4) == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert other.stop().reason == "stopped"
