"""Deterministic mode: what a guest sees is a function of its input alone."""

from __future__ import annotations

import time

from guestcode import HLT, LOOP_FOREVER, STI, end, out8, real_mode, say

from polyvisor import _fast

# A guest that records every clock it has, 200 times, at 0x10000: TSC, PIT counter, ACPI timer, RTC.
CLOCKS = (
    b"\xb8\x00\x10\x8e\xc0"  # mov ax, 0x1000; mov es, ax
    + b"\x31\xff\xbb\xc8\x00"  # xor di, di; mov bx, 200
    # again:
    + b"\x0f\x31\x66\xab"  # rdtsc; stosd
    + b"\xb0\x00\xe6\x43\xe4\x40\xaa\xe4\x40\xaa"  # latch channel 0, read it
    + b"\xba\x08\x06\x66\xed\x66\xab"  # ACPI timer
    + b"\xb0\x00\xe6\x70\xe4\x71\xaa"  # RTC seconds
    + b"\xb9\x00\x40\xe2\xfe"  # mov cx, 0x4000; loop $
    + b"\x4b\x75\xdc"  # dec bx; jnz again
)


def run(code: bytes, delay: float = 0.0) -> tuple[int, int, int, str]:
    with real_mode(code, deterministic=True) as machine:
        machine.start()
        if delay:
            time.sleep(delay)  # the host's time must not show
            machine.pause()
            time.sleep(delay)
            machine.resume()
        info = machine.wait(60)
        assert info is not None
        assert info.reason == "debug_exit", info
        memory = _fast.fnv1a(memoryview(machine.memory.region(0)))
        return memory, machine.cpu(0).registers["instructions"], machine.now, str(info)


def test_clocks_repeat_exactly() -> None:
    first = run(CLOCKS + end(1))
    assert run(CLOCKS + end(1)) == first
    assert run(CLOCKS + end(1), delay=0.01) == first
    assert first[1] > 200 * 0x4000
    assert first[2] >= first[1] - 1000  # a nanosecond each


def test_halts_take_no_host_time_and_interrupts_come_at_the_same_instruction() -> None:
    # IRQ 0 at 18 Hz through the 8259; the handler counts in [0x9000]; ends after 40 (2.2 s).
    pic = out8(0x20, 0x11) + out8(0x21, 0x20) + out8(0x21, 4) + out8(0x21, 1) + out8(0x21, 0xFE)
    pit = out8(0x43, 0x34) + out8(0x40, 0) + out8(0x40, 0)
    loop = STI + HLT + b"\x80\x3e\x00\x90\x28\x75\xf8"  # cmp byte [0x9000], 40; jne back
    handler = b"\xfe\x06\x00\x90" + out8(0x20, 0x20) + b"\xcf"  # inc; EOI; iret

    def once() -> tuple[int, int, int]:
        with real_mode(pic + pit + loop + say(b".") + end(2), deterministic=True) as machine:
            machine.load_raw(0x8000, handler)
            machine.memory.write(0x20 * 4, b"\x00\x80\x00\x00")
            begin = time.monotonic()
            info = machine.run(timeout=30)
            assert info.status == 5
            assert time.monotonic() - begin < 2.0
            assert machine.console.transcript == "."
            registers = machine.cpu(0).registers
            return machine.now, registers["instructions"], registers["rax"]

    first = once()
    assert 2_100_000_000 < first[0] < 2_300_000_000
    assert once() == first


def test_a_halt_that_nothing_ends() -> None:
    for deterministic in (False, True):
        with real_mode(b"\xfa" + HLT + LOOP_FOREVER, deterministic=deterministic) as machine:
            assert machine.run(timeout=10).reason == "halted"
    with real_mode(b"\xfa" + HLT + LOOP_FOREVER, cpus=3) as machine:
        assert machine.run(timeout=10).reason == "halted"
