"""What a machine counts, on every engine; doorbells of Python devices."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest
from guestcode import HLT, LOOP_FOREVER, end, in8, out8, out32, real_mode

from polyvisor import _native, statistics
from polyvisor.errors import ConfigError

PORT = 0x500


class Register:
    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_counts(engine: str) -> None:
    code = out8(PORT, 1) * 3 + in8(PORT) * 2 + in8(0x999) + end()
    with real_mode(code, engine=engine) as machine:
        machine.add_port_device(PORT, Register(), size=4)
        machine.run(timeout=20)
        counted = machine.statistics()
        assert counted["engine"] == engine
        assert counted["devices"]["Register@0x500"] == {"reads": 2, "writes": 3}
        assert counted["devices"]["debug-exit@0xf4"] == {"reads": 0, "writes": 1}
        assert counted["unclaimed"] == {"ports": 1, "memory": 0}
        (cpu,) = counted["cpus"]
        assert cpu["returns"]["interrupted"] >= 1  # the end
        json.dumps(counted)  # plain data, all of it
        assert machine.statistics()["devices"] == counted["devices"]
    assert machine.statistics()["devices"] == counted["devices"]  # also when closed


@pytest.mark.kvm
def test_kvm_exits_and_kernel_statistics() -> None:
    with real_mode(out8(PORT, 1) * 10 + end(), engine="kvm") as machine:
        machine.add_port_device(PORT, Register())
        machine.run(timeout=20)
        counted = machine.statistics()
    (cpu,) = counted["cpus"]
    assert cpu["exits"]["io"] >= 11
    assert all(name.isidentifier() for name in cpu["exits"])
    kvm = counted["kvm"]
    assert len(kvm["vcpus"]) == 1
    if not kvm["vm"]:
        pytest.skip("this kernel has no binary statistics")
    assert kvm["vcpus"][0]["exits"] >= 11
    assert isinstance(kvm["vcpus"][0]["halt_wait_hist"], list)
    assert kvm["units"]["exits"] == {"kind": "cumulative", "unit": "none", "factor": 1}
    assert kvm["units"]["halt_wait_ns"]["unit"] == "seconds"
    assert kvm["units"]["halt_wait_ns"]["factor"] == 1e-9
    assert kvm["units"].keys() >= kvm["vm"].keys()


def test_soft_has_no_kvm_part() -> None:
    with real_mode(end(), engine="soft") as machine:
        machine.run(timeout=20)
        counted = machine.statistics()
        assert counted["kvm"] is None
        assert counted["cpus"][0]["exits"] == {}
        assert counted["cpus"][0]["counters"]["instructions"] > 0


def test_while_running(engine: str) -> None:
    """From several threads at once, and no count ever goes back."""
    with real_mode(out8(PORT, 1) + b"\xeb\xf8", engine=engine, cpus=2) as machine:
        device = Register()
        machine.add_port_device(PORT, device)
        machine.start()
        failures: list[str] = []

        def watch() -> None:
            last = 0
            for _ in range(50):
                now = machine.statistics()["devices"]["Register@0x500"]["writes"]
                if now < last:
                    failures.append(f"{now} after {last}")
                last = now
            if last == 0:
                failures.append("nothing was counted")

        deadline = time.monotonic() + 10
        while not device.writes and time.monotonic() < deadline:
            time.sleep(0.01)
        threads = [threading.Thread(target=watch) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failures
        machine.stop()


def test_table_and_units() -> None:
    raw = {
        "engine": "kvm",
        "counters": {"posted_writes": 0, "doorbells": 2},
        "cpus": [
            {
                "exits": {"io": 1234567},
                "returns": {},
                "counters": {},
                "host": [
                    ("wait_hist", "log_histogram", "seconds", 10, -9, 0, [0, 4]),
                    ("fill", "linear_histogram", "none", 10, 0, 5, [1]),
                    ("pages", "peak", "bytes", 2, 12, 0, [3]),
                ],
            }
        ],
        "devices": [("serial", "pio", 0x3F8, 0, 7)],
        "host": [("mmu_shadow_zapped", "instant", "none", 10, 0, 0, [9])],
        "unclaimed": (0, 5),
        "log": {"pci": 1},
    }
    native = _native.statistics
    try:
        _native.statistics = lambda machine: raw
        found = statistics.collect(None)  # type: ignore[arg-type]
    finally:
        _native.statistics = native
    assert found["kvm"]["vcpus"] == [{"wait_hist": [0, 4], "fill": [1], "pages": 3}]
    assert found["kvm"]["units"]["wait_hist"] == {
        "kind": "log_histogram",
        "unit": "seconds",
        "factor": 1e-9,
    }
    assert found["kvm"]["units"]["fill"]["bucket"] == 5
    assert found["kvm"]["units"]["pages"]["factor"] == 4096
    text = statistics.table(found).splitlines()
    assert [line.split() for line in text] == [
        ["cpu", "0", "exits:", "io", "1,234,567"],
        ["engine", "doorbells", "2"],
        ["serial@0x3f8", "writes", "7"],
        ["unclaimed", "memory", "5"],
        ["log", "pci", "1"],
        ["kvm:", "vm", "mmu_shadow_zapped", "9"],
        ["kvm:", "vcpu", "0", "pages", "3"],
    ]
    assert len({len(line) for line in text}) == 1


class Bell(Register):
    def __init__(self, *bells: tuple[object, ...]) -> None:
        super().__init__()
        self.doorbells = bells


def test_doorbells_of_a_python_device(engine: str) -> None:
    with OpenEvent() as any_size, OpenEvent() as seven:
        device = Bell((0, 0, None, any_size.fd), (4, 4, 7, seven.fd))
        code = out8(PORT, 1) + out32(PORT, 2) + out32(PORT + 4, 7) + out32(PORT + 4, 8)
        with real_mode(code + out8(PORT + 4, 7) + end(), engine=engine) as machine:
            machine.add_port_device(PORT, device, size=8)
            machine.run(timeout=20)
            counted = machine.statistics()
        assert any_size.rings() == 2
        assert seven.rings() == 1
        assert device.writes == [(4, 4, 8), (4, 1, 7)]
        if engine == "kvm":
            assert counted["counters"]["doorbells"] == 2
            assert counted["devices"]["Bell@0x500"]["writes"] == 2


def test_doorbell_wakes_while_the_guest_runs(engine: str) -> None:
    with OpenEvent() as event, real_mode(out8(PORT, 1) + LOOP_FOREVER, engine=engine) as machine:
        machine.add_port_device(PORT, Bell((0, 1, 1, event.fd)))
        machine.start()
        os.set_blocking(event.fd, True)
        assert os.eventfd_read(event.fd) == 1
        machine.stop()


@pytest.mark.parametrize(
    "bell",
    [
        (0, 3, None, 0),
        (0, 1, 256, 0),
        (0, 1, None, 0),
        (0, 1, None, 10_000),
        (0, 1, None, "event"),
        (-1, 1, None, 0),
        (0, 1),
        None,
    ],
    ids=str,
)
def test_bad_doorbells(bell: tuple[object, ...]) -> None:
    reading, writing = os.pipe()
    try:
        if bell and len(bell) == 4 and bell[3] == 0:
            bell = (*bell[:3], writing)  # a file that takes writes, but no eventfd
        with real_mode(HLT, engine="soft") as machine:
            with pytest.raises(ConfigError, match="doorbells of a Bell") as caught:
                machine.add_port_device(PORT, Bell(bell))
            assert caught.value.field == "doorbells"
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
    finally:
        os.close(reading)
        os.close(writing)


def test_doorbells_leave_no_descriptors(engine: str) -> None:
    with OpenEvent() as event:
        before = len(os.listdir("/proc/self/fd"))
        with real_mode(end(), engine=engine) as machine:
            machine.add_port_device(PORT, Bell((0, 0, None, event.fd)))
            machine.remove_port_device(PORT)
            machine.add_port_device(PORT, Bell((0, 0, None, event.fd)))
            machine.run(timeout=20)
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # an open /dev/kvm is kept


class OpenEvent:
    def __enter__(self) -> OpenEvent:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def rings(self) -> int:
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0
