from __future__ import annotations

import pytest
from guestcode import LOOP_FOREVER, ORIGIN, end, real_mode

import polyvisor
from polyvisor.errors import StateError, StateMismatch
from polyvisor.images import kernel as kernels


def test_a_machine_goes_on_elsewhere() -> None:
    # inc byte [0x9000] three times, then end with it
    code = b"\xfe\x06\x00\x90" * 3 + b"\xa0\x00\x90\xe6\xf4\xf4"
    with real_mode(code) as machine:
        machine.cpu(0).step(2)
        snapshot = machine.snapshot()
        assert snapshot.memory_bytes < 64 << 10
        assert "pit" in snapshot.parts
        assert snapshot.cpus[0]["rip"] == ORIGIN + 8
        assert machine.run(timeout=10).status == 7
    with polyvisor.Machine(memory="2M") as other:
        other.memory.write(0x100000, b"not in the snapshot")
        other.restore(snapshot)
        assert other.now == snapshot.now
        assert not any(other.memory.read(0x100000, 32))
        assert other.memory.read(0x9000, 1) == b"\x02"
        assert other.run(timeout=10).status == 7


def test_going_back_in_the_same_machine() -> None:
    with real_mode(b"\x40" * 10 + end()) as machine:
        cpu = machine.cpu(0)
        cpu.step(3)
        snapshot = machine.snapshot()
        cpu.step(4)
        assert cpu.registers["rax"] == 7
        machine.restore(snapshot)
        assert cpu.registers["rax"] == 3
        again = machine.snapshot()
        assert again.parts == snapshot.parts
        assert again.cpus == snapshot.cpus


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "4M"},
        {"cpus": 2},
        {"serial_ports": 1},
        {"tsc_khz": 2_000_000},
        {"cpu_features": {"cx16": False}},
    ],
)
def test_other_machines_refuse_it(options: dict[str, object], default_engine: str) -> None:
    with real_mode(end()) as machine:
        snapshot = machine.snapshot()
    if "tsc_khz" in options and default_engine == "kvm":
        pytest.skip("most hosts' KVM has one TSC frequency")
    with polyvisor.Machine(**{"memory": "2M", **options}) as other:  # type: ignore[arg-type]
        other.memory.write(0x9000, b"kept")
        before = other.cpu(0).state
        with pytest.raises(StateError):
            other.restore(snapshot)
        assert other.cpu(0).state == before
        assert other.memory.read(0x9000, 4) == b"kept"


@pytest.mark.kvm
def test_services_of_kvms_own_local_apics_do_not_get_lost() -> None:
    """A guest that was offered hypercalls between CPUs waits for ever where none are served."""
    with polyvisor.Machine(memory="2M", engine="kvm", irqchip="kernel") as machine:
        snapshot = machine.snapshot()
    with (
        polyvisor.Machine(memory="2M", engine="kvm", irqchip="user") as other,
        pytest.raises(StateError, match=r"kvm_pv_ipi.*portable=True") as caught,
    ):
        other.restore(snapshot)
    assert caught.value.field == "cpu_features"


def test_a_part_that_refuses_leaves_all_as_it_was() -> None:
    class Counter:
        def __init__(self) -> None:
            self.count = 5

        def write(self, offset: int, size: int, value: int) -> None:
            self.count += 1

        def save(self) -> bytes:
            return bytes([self.count])

        def restore(self, state: bytes) -> None:
            if state[0] > 10:
                raise ValueError("too much")
            self.count = state[0]

    device = Counter()
    with real_mode(end()) as machine:
        machine.add_port_device(0x500, device)
        device.count = 50
        snapshot = machine.snapshot()
        device.count = 5
        machine.cpu(0).registers["rax"] = 77
        with pytest.raises(StateError, match="too much"):
            machine.restore(snapshot)
        assert device.count == 5
        assert machine.cpu(0).registers["rax"] == 77
        device.count = 6
        snapshot = machine.snapshot()
        device.count = 7
        machine.restore(snapshot)
        assert device.count == 6


def test_only_while_it_stands_still() -> None:
    with real_mode(LOOP_FOREVER) as machine:
        early = machine.snapshot()
        machine.start()
        with pytest.raises(StateMismatch):
            machine.snapshot()
        with pytest.raises(StateMismatch):
            machine.restore(early)
        machine.pause()
        machine.restore(early)
        machine.snapshot()
        machine.stop()
        machine.snapshot()
        with pytest.raises(StateMismatch):
            machine.restore(early)


@pytest.mark.slow
@pytest.mark.boot
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_booting_linux_goes_on_in_another_machine(cpus: int) -> None:
    kernel = kernels.fetch("cloud").image
    with polyvisor.Machine(memory="256M", cpus=cpus) as machine:
        machine.load(kernel, cmdline="console=ttyS0 panic=-1")
        machine.start()
        machine.console.expect("NET: Registered PF_NETLINK", timeout=120)
        machine.pause()
        snapshot = machine.snapshot()
    with polyvisor.Machine(memory="256M", cpus=cpus) as machine:
        machine.restore(snapshot)
        assert machine.run(timeout=120).reason == "reset"
        console = machine.console.transcript
        assert "Linux version" not in console  # that was the other machine's
        assert "Unable to mount root fs" in console
