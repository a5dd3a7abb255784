"""Breakpoints, watchpoints and steps, on every engine."""

from __future__ import annotations

import time

import pytest
from guestcode import HLT, LOOP_FOREVER, ORIGIN, STI, end, real_mode

import polyvisor
from polyvisor.debug import DebugStop, Kind
from polyvisor.errors import ConfigError, StateError, StateMismatch

DEADLINE = 30.0

# mov cx, 5; a: inc ax; call f; loop a; END; f: inc bx; ret
LOOP = b"\xb9\x05\x00" + b"\x40" + b"\xe8\x0c\x00" + b"\xe2\xfa"
CALLS = LOOP + end(3) + b"\x90"
FUNCTION = ORIGIN + len(CALLS)
CODE = CALLS + b"\x43\xc3"


def calls(engine: str) -> polyvisor.Machine:
    code = CODE.replace(b"\xe8\x0c\x00", b"\xe8" + (FUNCTION - ORIGIN - 7).to_bytes(2, "little"))
    return real_mode(code, engine=engine)


def add(machine: polyvisor.Machine, address: int, kind: Kind, size: int = 1) -> object:
    """The breakpoint; skips where this KVM has none of this kind."""
    try:
        return machine.breakpoints.add(address, kind, size=size)
    except StateMismatch as error:
        why = str(error)
    assert (machine.engine, kind) == ("kvm", "software")
    assert "take hardware breakpoints" in why
    assert len(machine.breakpoints) == 0
    pytest.skip(why)


def paused(machine: polyvisor.Machine) -> DebugStop:
    stop = machine.wait_pause(DEADLINE)
    assert stop is not None, machine.state
    assert machine.state == "paused"
    return stop


def needs_debug_registers(engine: str) -> None:
    """Emulated CPUs under KVM may not watch; a small guest tells."""
    if engine != "kvm":
        return
    with real_mode(b"\xa2\x00\x90" + end(), engine=engine) as machine:
        machine.breakpoints.add(0x9000, "write")
        machine.start()
        if machine.wait_pause(DEADLINE) is None:
            pytest.skip("the CPU under this KVM has no working debug registers")


def needs_code_registers(engine: str) -> None:
    if engine != "kvm":
        return
    with real_mode(b"\x90" + end(), engine=engine) as machine:
        machine.breakpoints.add(ORIGIN + 1, "hardware")
        machine.start()
        if machine.wait_pause(DEADLINE) is None:
            pytest.skip("the CPU under this KVM has no working debug registers")


@pytest.mark.parametrize("kind", ["software", "hardware"])
def test_a_breakpoint_is_hit_once_per_pass(engine: str, kind: Kind) -> None:
    if kind == "hardware":
        needs_code_registers(engine)
    with calls(engine) as machine:
        added = add(machine, FUNCTION, kind)
        machine.start()
        for n in range(5):
            stop = paused(machine)
            assert stop.reason == "breakpoint"
            assert stop.breakpoint == added
            assert (stop.cpu, stop.address) == (0, FUNCTION)
            registers = machine.cpu(0).registers
            assert (registers["rip"], registers["rax"], registers["rbx"]) == (FUNCTION, n + 1, n)
            # Whoever looks sees the guest's own code.
            assert machine.memory.read(FUNCTION, 2) == b"\x43\xc3"
            machine.resume()
        info = machine.wait(DEADLINE)
        assert info is not None
        assert info.status == 7
        assert machine.cpu(0).registers["rbx"] == 5
        assert machine.memory.read(FUNCTION, 2) == b"\x43\xc3"
        assert machine.wait_pause(0) is None


@pytest.mark.parametrize("kind", ["software", "hardware"])
def test_at_the_first_instruction_and_after_removal(engine: str, kind: Kind) -> None:
    if kind == "hardware":
        needs_code_registers(engine)
    with calls(engine) as machine:
        first = add(machine, ORIGIN, kind)
        second = add(machine, FUNCTION, kind)
        machine.start()
        assert paused(machine).breakpoint == first
        machine.resume()
        assert paused(machine).breakpoint == second
        machine.breakpoints.remove(second)  # type: ignore[arg-type]
        assert list(machine.breakpoints) == [first]
        machine.resume()
        info = machine.wait(DEADLINE)
        assert info is not None
        assert info.status == 7


def test_two_in_a_row(engine: str) -> None:
    with real_mode(b"\x40\x40\x40" + end(), engine=engine) as machine:
        for n in range(3):
            add(machine, ORIGIN + n, "software")
        machine.start()
        for n in range(3):
            assert paused(machine).address == ORIGIN + n
            assert machine.cpu(0).registers["rax"] == n
            machine.resume()
        assert machine.wait(DEADLINE) is not None


def test_registers_changed_at_a_breakpoint(engine: str) -> None:
    needs_code_registers(engine)
    with calls(engine) as machine:
        machine.breakpoints.add(FUNCTION, "hardware")
        machine.start()
        paused(machine)
        machine.cpu(0).registers.update(rcx=1, rip=FUNCTION + 1)  # over `inc bx`, last time around
        machine.resume()
        assert machine.wait(DEADLINE) is not None
        assert machine.cpu(0).registers["rbx"] == 0


@pytest.mark.parametrize(
    ("kind", "size", "address", "offsets"),
    [
        ("write", 1, 0x9001, [5]),
        ("write", 4, 0x9000, [5, 8]),
        ("access", 2, 0x9000, [5, 8, 11]),
        ("access", 1, 0x9004, []),
    ],
)
def test_watchpoints(engine: str, kind: Kind, size: int, address: int, offsets: list[int]) -> None:
    needs_debug_registers(engine)
    # nop; nop; mov [0x9000], ax; mov [0x9000], al; mov al, [0x9000]; END
    code = b"\x90\x90" + b"\xa3\x00\x90" + b"\xa2\x00\x90" + b"\xa0\x00\x90" + end(1)
    with real_mode(code, engine=engine) as machine:
        watch = machine.breakpoints.add(address, kind, size=size)
        machine.start()
        for offset in offsets:
            stop = paused(machine)
            assert stop.reason == "watchpoint"
            assert stop.breakpoint == watch
            assert stop.address == ORIGIN + offset
            machine.resume()
        info = machine.wait(DEADLINE)
        assert info is not None
        assert info.status == 3


# Vector 3 leads to `inc bx; iret` at 0x8000.
def with_int3_handler(code: bytes, engine: str) -> polyvisor.Machine:
    machine = real_mode(code, engine=engine)
    machine.memory.write(3 * 4, b"\x00\x80\x00\x00")
    machine.memory.write(0x8000, b"\x43\xcf")
    return machine


def test_the_guests_own_int3_is_its_own(engine: str) -> None:
    code = b"\xcc\x40\xcc\x40" + end(2)
    with with_int3_handler(code, engine) as machine:
        add(machine, ORIGIN + 3, "software")
        machine.start()
        assert paused(machine).address == ORIGIN + 3
        assert machine.cpu(0).registers["rbx"] == 2
        machine.resume()
        info = machine.wait(DEADLINE)
        assert info is not None
        assert info.status == 5


def test_a_breakpoint_on_the_guests_own_int3(engine: str) -> None:
    with with_int3_handler(b"\x40\xcc\x40" + end(2), engine) as machine:
        add(machine, ORIGIN + 1, "software")
        machine.start()
        assert paused(machine).address == ORIGIN + 1
        assert machine.cpu(0).registers["rbx"] == 0
        machine.resume()
        assert machine.wait(DEADLINE) is not None
        assert machine.cpu(0).registers["rbx"] == 1  # and its handler ran
        assert machine.memory.read(ORIGIN + 1, 1) == b"\xcc"


def test_code_that_the_guest_rewrites(engine: str) -> None:
    # b: inc ax; mov byte [b], 0x43 (inc bx); cmp bx, 0; je b; END
    code = b"\x40" + b"\xc6\x06\x00\x7c\x43" + b"\x83\xfb\x00" + b"\x74\xf5" + end(2)
    with real_mode(code, engine=engine) as machine:
        add(machine, ORIGIN, "software")
        machine.start()
        assert paused(machine).address == ORIGIN
        machine.resume()
        # The guest has stored over the breakpoint, and what it stored is what runs.
        info = machine.wait(DEADLINE)
        assert info is not None
        registers = machine.cpu(0).registers
        assert (registers["rax"] & 0xFF00, registers["rbx"]) == (0, 1)
        assert machine.memory.read(ORIGIN, 1) == b"\x43"


def test_pause_is_told_apart(engine: str) -> None:
    with real_mode(LOOP_FOREVER, engine=engine) as machine:
        with pytest.raises(StateMismatch):
            machine.wait_pause(0)
        machine.start()
        assert machine.wait_pause(0.02) is None
        machine.pause()
        assert machine.wait_pause(1) == DebugStop(reason="pause")
        now = machine.now
        time.sleep(0.02)
        assert machine.now == now
        machine.resume()
        with pytest.raises(StateMismatch):
            machine.breakpoints.add(ORIGIN)
        machine.stop()
    assert machine.wait_pause(0) is None


def test_time_stands_still_at_a_breakpoint(engine: str) -> None:
    needs_code_registers(engine)
    with calls(engine) as machine:
        machine.breakpoints.add(FUNCTION, "hardware")
        machine.start()
        paused(machine)
        now = machine.now
        time.sleep(0.05)
        assert machine.now == now


def test_impossible_breakpoints(engine: str) -> None:
    with real_mode(end(), engine=engine) as machine:
        add_ = machine.breakpoints.add
        with pytest.raises(ConfigError, match="watch 3 bytes"):
            add_(0x9000, "write", size=3)
        with pytest.raises(ConfigError, match="aligned"):
            add_(0x9001, "write", size=4)
        with pytest.raises(ConfigError, match="choose one of"):
            add_(0x9000, "wish")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="no CPU 1"):
            add_(0x9000, cpu=1)
        with pytest.raises(StateError, match="no memory"):
            add_(0x500000)
        first = add_(0x9000, "write")
        with pytest.raises(ConfigError, match="already"):
            add_(0x9000, "write")
        for n in range(3):
            add_(0xA000 + n, "hardware")
        with pytest.raises(ConfigError, match="has 4 hardware breakpoints, not 5"):
            add_(0xB000, "hardware")
        assert len(machine.breakpoints) == 4
        assert first in machine.breakpoints
        machine.breakpoints.clear()
        assert list(machine.breakpoints) == []
        with pytest.raises(ConfigError, match="removed before"):
            machine.breakpoints.remove(first)


def test_a_snapshot_has_no_breakpoints_in_it(engine: str) -> None:
    with calls(engine) as machine:
        add(machine, FUNCTION, "software")
        machine.start()
        paused(machine)
        snapshot = machine.snapshot()
        machine.breakpoints.clear()
        machine.restore(snapshot)
        machine.resume()
        info = machine.wait(DEADLINE)
        assert info is not None
        assert info.status == 7


def test_every_cpu_stops(engine: str) -> None:
    # All CPUs meet the breakpoint at 0x8000, where the others start.
    wake = bytes.fromhex("c7050003e0fe00450c00 c7050003e0fe08460c00 ebfe")
    with polyvisor.Machine(memory="2M", cpus=3, engine=engine) as machine:
        machine.load_raw(0x8000, bytes.fromhex("f0fe060090 fa f4 ebfd"))
        machine.load_raw(0x10000, wake)
        machine.cpu(0).enter_protected_mode(rip=0x10000, rsp=0x7000)
        add(machine, 0x8000, "software")
        machine.start()
        seen: set[int] = set()
        while seen != {1, 2}:
            assert paused(machine).address == 0x8000
            seen |= {stop.cpu for stop in machine.stops()}
            machine.resume()
        deadline = time.monotonic() + DEADLINE
        while machine.memory.read(0x9000, 1) != b"\x02":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        machine.stop()


# --- Steps ---------------------------------------------------------------------------------------


def test_steps_are_exact(engine: str) -> None:
    # inc ax; push ax; pop bx; jmp +1; nop; mov cx, 3; rep stosb; sti; nop; cli; inc dx
    code = b"\x40\x50\x5b\xeb\x01\x90\xb9\x03\x00\xf3\xaa\xfa\x42" + HLT
    with real_mode(code, engine=engine) as machine:
        cpu = machine.cpu(0)
        cpu.registers.update(rdx=0, rdi=0x9000)
        seen = []
        for _ in range(8):
            cpu.step()
            seen.append(cpu.registers["rip"] - ORIGIN)
        assert seen == [1, 2, 3, 6, 9, 11, 12, 13]
        registers = cpu.registers.as_dict()
        names = ("rax", "rbx", "rcx", "rdx", "rdi", "rsp")
        assert [registers[name] for name in names] == [1, 1, 0, 1, 0x9003, 0x7000]
        assert machine.memory.read(0x9000, 4) == b"\1\1\1\0"
        assert machine.state == "created"


def test_many_steps_at_once(engine: str) -> None:
    with real_mode(b"\x40\xeb\xfd", engine=engine) as machine:  # a: inc ax; jmp a
        machine.cpu(0).step(201)
        registers = machine.cpu(0).registers
        assert (registers["rax"], registers["rip"]) == (101, ORIGIN + 1)


def test_a_step_leaves_no_trap_flag(engine: str) -> None:
    with real_mode(b"\x9c\x58\x40" + end(), engine=engine) as machine:  # pushf; pop ax; inc ax
        machine.cpu(0).step(2)
        registers = machine.cpu(0).registers
        assert registers["rax"] & 0x100 == 0
        assert registers["rflags"] & 0x100 == 0
        assert machine.run(timeout=DEADLINE).reason == "debug_exit"


def test_steps_over_device_accesses(engine: str) -> None:
    class Port:
        def __init__(self) -> None:
            self.written: list[int] = []

        def read(self, offset: int, size: int) -> int:
            return 0x5A

        def write(self, offset: int, size: int, value: int) -> None:
            self.written.append(value)

    # mov al, 7; out 0x50, al; in al, 0x50; out 0x51, al (nobody's); inc bx
    with real_mode(b"\xb0\x07\xe6\x50\xe4\x50\xe6\x51\x43" + end(), engine=engine) as machine:
        port = Port()
        machine.add_port_device(0x50, port)
        cpu = machine.cpu(0)
        for want in (2, 4, 6, 8, 9):
            cpu.step()
            assert cpu.registers["rip"] == ORIGIN + want
        assert port.written == [7]
        assert cpu.registers["rax"] & 0xFF == 0x5A
        assert cpu.registers["rbx"] == 1


def test_stepping_can_end_the_machine(engine: str) -> None:
    with real_mode(end(1), engine=engine) as machine:
        machine.cpu(0).step(1000)
        assert machine.state == "ended"
        info = machine.wait(1)
        assert info is not None
        assert info.status == 3


def test_steps_pass_breakpoints(engine: str) -> None:
    with real_mode(b"\x40" * 8 + end(), engine=engine) as machine:
        machine.breakpoints.add(ORIGIN + 2, "hardware")
        machine.cpu(0).step(4)
        assert machine.cpu(0).registers["rax"] == 4
        assert machine.state == "created"


def test_an_nmi_while_it_spins(engine: str) -> None:
    # a: cmp bx, 1; jne a; END. Vector 2: inc bx; iret.
    with real_mode(b"\x83\xfb\x01\x75\xfb" + end(6), engine=engine) as machine:
        machine.memory.write(2 * 4, b"\x00\x80\x00\x00")
        machine.memory.write(0x8000, b"\x43\xcf")
        machine.start()
        assert machine.wait(0.05) is None
        machine.cpu(0).nmi()
        info = machine.wait(DEADLINE)
        assert info is not None
        assert info.status == 13


def test_an_nmi_ends_a_halt(engine: str) -> None:
    # sti; hlt; END. Vector 2: inc bx; iret.
    with real_mode(STI + HLT + end(6), engine=engine) as machine:
        machine.memory.write(2 * 4, b"\x00\x80\x00\x00")
        machine.memory.write(0x8000, b"\x43\xcf")
        machine.start()
        assert machine.wait(0.05) is None
        machine.cpu(0).nmi()
        info = machine.wait(DEADLINE)
        assert info is not None
        assert info.status == 13
        assert machine.cpu(0).registers["rbx"] == 1
