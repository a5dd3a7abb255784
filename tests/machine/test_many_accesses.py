"""Device accesses in a row, without anything else that would leave the guest."""

from __future__ import annotations

import pytest
from guestcode import SERIAL, end, real_mode

DEVICE = 0x100000  # ffff:0010, which real mode just reaches


class Counter:
    def __init__(self) -> None:
        self.reads = self.writes = 0

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return 0x5A

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes += 1


def repeat(body: bytes, times: int) -> bytes:
    """mov ecx, times; body; addr32 loop body."""
    loop = b"\x67\xe2"
    return (
        b"\x66\xb9"
        + times.to_bytes(4, "little")
        + body
        + loop
        + (-(len(body) + 3) & 0xFF).to_bytes(1, "little")
    )


LOAD = bytes.fromhex("a01000")  # mov al, [0x10]
STORE = bytes.fromhex("a21000")  # mov [0x10], al
MODIFY = bytes.fromhex("fe061000")  # inc byte [0x10]
TO_DEVICE = bytes.fromhex("b8ffff8ed8")  # mov ax, 0xffff; mov ds, ax


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("body", "reads", "writes"),
    [
        pytest.param(LOAD, 50_000, 0, id="loads"),
        pytest.param(LOAD * 20, 50_000, 0, id="loads, many in a block"),
        pytest.param(STORE * 20, 0, 50_000, id="stores"),
        pytest.param(MODIFY * 10, 25_000, 25_000, id="both"),
    ],
)
def test_python_memory_device(body: bytes, reads: int, writes: int) -> None:
    """Each is a slow access of the soft engine, none of which may stay on the host's stack."""
    times = 50_000 // (len(body) // 3 if body[:1] != MODIFY[:1] else 20)
    device = Counter()
    with real_mode(TO_DEVICE + repeat(body, times) + end(), engine="soft", memory="1M") as machine:
        machine.add_memory_device(DEVICE, device, size=0x1000)
        info = machine.run(timeout=100)
        assert info.reason == "debug_exit", info
    assert (device.reads, device.writes) == (reads, writes)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("times", [200_000])
def test_native_port_device(times: int) -> None:
    body = b"\xba" + (SERIAL + 5).to_bytes(2, "little") + b"\xec" * 20  # in al, dx
    with real_mode(repeat(body, times // 20) + end(), engine="soft") as machine:
        assert machine.run(timeout=50).reason == "debug_exit"
