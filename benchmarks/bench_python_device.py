"""Claim: a port access that a Python device serves takes at most 1.5 us, guest to guest."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import polyvisor

LIMIT = 1.5e-6
ACCESSES = 200_000
PORT = 0x500
IN_AL_DX, OUT_DX_AL = b"\xec", b"\xee"


class Register:
    """The device: one byte."""

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


def guest(access: bytes) -> bytes:
    """Real-mode code that makes the accesses and ends the machine."""
    return (
        b"\x66\xb9"
        + ACCESSES.to_bytes(4, "little")  # mov ecx, ACCESSES
        + b"\xba"
        + PORT.to_bytes(2, "little")  # mov dx, PORT
        + access
        + b"\x66\x49\x75\xfb"  # dec ecx; jnz access
        + b"\xe6\xf4\xf4"  # out debug-exit, al; hlt
    )


def make(access: bytes) -> polyvisor.Machine:
    machine = polyvisor.Machine(memory="2M", engine="soft")
    machine.load_raw(0x7C00, guest(access))
    machine.cpu(0).enter_real_mode(ip=0x7C00)
    machine.add_port_device(PORT, Register())
    return machine


@pytest.mark.parametrize("access", [OUT_DX_AL, IN_AL_DX], ids=["write", "read"])
def bench_port_access(benchmark: BenchmarkFixture, access: bytes) -> None:
    machines: list[polyvisor.Machine] = []

    def setup() -> tuple[tuple[polyvisor.Machine], dict[str, object]]:
        while machines:
            machines.pop().close()
        machines.append(make(access))
        return (machines[0],), {}

    benchmark.pedantic(lambda machine: machine.run(timeout=60), setup=setup, rounds=10)
    machines.pop().close()
    if benchmark.stats is None:  # --benchmark-disable: run, not measured
        return
    each = benchmark.stats.stats.min / ACCESSES
    benchmark.extra_info["seconds_per_access"] = each
    assert each <= LIMIT, f"one access takes {each * 1e6:.2f} us"
