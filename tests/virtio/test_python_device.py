"""Virtio devices in Python, and the queues that they use: against a driver that means well, and
devices that do not."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

import pytest

from polyvisor.errors import ConfigError, StateError, StateMismatch
from polyvisor.virtio import VirtioDevice
from polyvisor.virtio.testing import FakeGuest

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyvisor._ring import Chain, Queue

both_rings = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


class Device(VirtioDevice):
    """Does with its queues what a test wants."""

    device_type = 42
    name = "virtio-test"
    queue_sizes = (64, 16)

    def __init__(self, body: Callable[[Queue], object] | None = None) -> None:
        self.body = body
        self.calls: list[object] = []

    def serve(self, queue: Queue) -> None:
        if self.body is not None:
            self.body(queue)


def keep(chains: list[Chain]) -> Callable[[Queue], object]:
    return lambda queue: chains.extend(queue)


# --- Chains --------------------------------------------------------------------------------------


@both_rings
@pytest.mark.parametrize("seed", range(20))
def test_chains_against_bytes(packed: bool, seed: int) -> None:
    """Any number of pieces of any size: reads, writes and views agree with a plain bytes object."""
    rng = random.Random(seed)

    def body(queue: Queue) -> None:
        for chain in queue:
            sent = sent_by_size[chain.readable]
            assert chain.read() == sent
            for _ in range(5):
                size, offset = rng.randrange(-1, 200), rng.randrange(200)
                expected = sent[offset:] if size < 0 else sent[offset : offset + size]
                assert chain.read(size, offset) == expected
                assert b"".join(chain.read_views(offset, size)) == expected
            answer = bytearray(chain.writable)
            chain.write(answer)
            for _ in range(3):
                data, offset = rng.randbytes(rng.randrange(100)), rng.randrange(200)
                room = max(0, min(len(data), len(answer) - offset))
                assert chain.write(rng.choice([bytes, bytearray])(data), offset) == room
                answer[offset : offset + room] = data[:room]
                for view in chain.write_views(offset, 30):
                    view[:] = bytes(len(view))
                answer[offset : offset + 30] = bytes(len(answer[offset : offset + 30]))
            answers.append(bytes(answer))
            chain.push(chain.writable)

    answers: list[bytes] = []
    sent_by_size: dict[int, bytes] = {}
    with FakeGuest(Device(body), packed=packed) as guest:
        for _ in range(30):
            out = [rng.randbytes(rng.randrange(1, 90)) for _ in range(rng.randrange(4))]
            into = [rng.randrange(1, 90) for _ in range(rng.randrange(4))]
            if not out and not into:
                continue
            sent_by_size = {sum(map(len, out)): b"".join(out)}
            guest.offer(0, out, into)
            guest.kick(0)
            used = guest.wait(0, 1)
            assert used is not None
            assert used[1:] == (answers[-1], len(answers[-1]))


@both_rings
def test_how_much_was_written_is_what_write_reached(packed: bool) -> None:
    def body(queue: Queue) -> None:
        for chain in queue:
            chain.write(b"abc", 4)
            chain.write(b"x")
            chain.push()

    with FakeGuest(Device(body), packed=packed) as guest:
        assert guest.request(0, b"", 100) == b"x\0\0\0abc"


def test_a_chain_is_pushed_once_and_not_used_afterwards() -> None:
    chains: list[Chain] = []

    def body(queue: Queue) -> None:
        for chain in queue:
            chains.append(chain)
            views = chain.write_views()
            part = views[0][1:3]
            with pytest.raises(ValueError, match="101 bytes"):
                chain.push(101)
            with pytest.raises(ValueError, match="-1 bytes"):
                chain.push(-1)
            assert chain.pending
            assert chain.push(1)
            assert not chain.pending
            with pytest.raises(StateMismatch, match="pushed before"):
                chain.push()
            for use in (chain.read, lambda: chain.write(b"x"), chain.write_views, chain.unpop):  # noqa: B023
                with pytest.raises(StateMismatch, match="queue 0 of virtio-test was pushed"):
                    use()
            with pytest.raises(ValueError, match="released"):
                views[0][0] = 1
            part[0] = 7  # made of a view: memory of the guest's, which is still there

    guest = FakeGuest(Device(body))
    guest.request(0, b"ab", 100)
    guest.close()
    assert not chains[0].pending


def test_views_keep_the_memory() -> None:
    kept: list[memoryview] = []
    chains: list[Chain] = []

    def body(queue: Queue) -> None:
        for chain in queue:
            chains.append(chain)
            kept.extend(chain.write_views())

    guest = FakeGuest(Device(body))
    guest.offer(0, b"", 4096)
    guest.kick(0)
    guest.close()
    del guest
    gc.collect()
    kept[0][:] = bytes(range(256)) * 16
    assert bytes(kept[0][:4]) == b"\0\1\2\3"
    assert not chains[0].pending
    assert chains[0].read() == b""


def test_read_views_are_read_only() -> None:
    def body(queue: Queue) -> None:
        for chain in queue:
            with pytest.raises(TypeError, match="read-only"):
                chain.read_views()[0][0] = 1
            with pytest.raises(IndexError, match="negative"):
                chain.read(1, -1)
            with pytest.raises(IndexError, match="negative"):
                chain.write(b"", -1)
            with pytest.raises(IndexError, match="negative"):
                chain.write_views(-1)
            chain.push()

    with FakeGuest(Device(body)) as guest:
        guest.request(0, b"ab", 1)


@both_rings
def test_unpop(packed: bool) -> None:
    ready = False

    def body(queue: Queue) -> None:
        for chain in queue:
            if not ready:
                chain.unpop()
                return
            chain.write(chain.read())
            chain.push()

    device = Device(body)
    with FakeGuest(device, packed=packed) as guest:
        guest.offer(0, b"first", 10)
        guest.offer(0, b"second", 10)
        guest.kick(0)
        assert guest.wait(0, 0) is None
        with device.queue(0) as queue:
            assert queue.available
            assert queue.outstanding == 0
            ready = True
            body(queue)
            assert not queue.available
        assert [guest.wait(0)[1] for _ in range(2)] == [b"first", b"second"]  # type: ignore[index]
        assert guest.request(0, b"third", 10) == b"third"  # the driver notified again


def test_only_the_last_chain_can_be_put_back() -> None:
    seen: list[bytes] = []

    def body(queue: Queue) -> None:
        one, two = queue.pop(), queue.pop()
        if one is None or two is None:
            return
        with pytest.raises(StateMismatch, match="not the last"):
            one.unpop()
        one.push()
        with pytest.raises(StateMismatch, match="something was pushed"):
            two.unpop()
        seen.append(two.read())
        two.push()

    with FakeGuest(Device(body)) as guest:
        guest.offer(0, b"one")
        guest.offer(0, b"two")
        guest.kick(0)
        assert seen == [b"two"]
        assert [guest.wait(0), guest.wait(0)] != [None, None]


# --- Holding -------------------------------------------------------------------------------------


@both_rings
def test_answers_from_another_thread(packed: bool) -> None:
    """Chains are answered by a thread, in any order, while the driver offers more."""
    todo: deque[Chain] = deque()
    wake, over = threading.Event(), threading.Event()
    rng = random.Random(5)

    def work() -> None:
        while not over.is_set():
            wake.wait(0.01)
            wake.clear()
            taken = [todo.popleft() for _ in range(len(todo))]
            rng.shuffle(taken)
            for chain in taken:
                chain.write(chain.read())
            if taken:
                with device.queue(0):
                    for chain in taken:
                        assert chain.push()

    def body(queue: Queue) -> None:
        todo.extend(queue)
        wake.set()

    device = Device(body)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        with FakeGuest(device, packed=packed) as guest:
            expected = {}
            for n in range(400):
                while len(expected) >= 20:
                    used = guest.wait(0)
                    assert used is not None
                    assert expected.pop(used[0]) == used[1]
                data = b"%d" % n
                expected[guest.offer(0, data, 10)] = data
                guest.kick(0)
            while expected:
                used = guest.wait(0)
                assert used is not None
                assert expected.pop(used[0]) == used[1]
    finally:
        over.set()
        thread.join()


def test_a_queue_that_is_not_held() -> None:
    chains: list[Chain] = []
    device = Device(keep(chains))
    with FakeGuest(device) as guest:
        guest.offer(0, b"a", 1)
        guest.kick(0)
        queue = device.queue(0)
        assert not queue.held
        uses: list[Callable[[], object]] = [
            queue.pop, lambda: next(queue), lambda: bool(queue), lambda: queue.available,
            lambda: list(queue), chains[0].push, chains[0].unpop,
            lambda: queue.__exit__(None, None, None),
        ]  # fmt: skip
        for use in (*uses[:6], uses[7]):
            with pytest.raises(StateMismatch, match="queue 0 of virtio-test is not held"):
                use()
        with queue:
            assert queue.held
            other: list[Exception] = []

            def elsewhere() -> None:
                try:
                    chains[0].push()
                except StateMismatch as error:
                    other.append(error)

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert "not held by this thread" in str(other[0])
            with pytest.raises(StateMismatch, match="cannot wait"), queue:
                pass
            with pytest.raises(StateMismatch, match="cannot be the driver"):
                guest.kick(0)
            assert chains[0].push()
        with device.queue(1) as one:
            with pytest.raises(StateMismatch, match="in the order of their numbers"), queue:
                pass
            assert one.held
        with queue, device.queue(1) as one:
            assert one.held
        with pytest.raises(ConfigError, match="no queue 2, only 2"):
            device.queue(2)
        assert guest.wait(0) is not None


def test_a_queue_that_is_not_alive() -> None:
    chains: list[Chain] = []
    device = Device(keep(chains))
    with FakeGuest(device) as guest:
        guest.offer(0, b"a", 1)
        guest.kick(0)
        guest.pause()
        with device.queue(0) as queue:
            assert not queue
            assert queue.held
            assert list(queue) == []
            assert not queue.available
            assert not chains[0].push()
        assert chains[0].pending
        guest.resume()
        with device.queue(0) as queue:
            assert queue
            assert chains[0].push()
        assert guest.wait(0) is not None
        guest.offer(0, b"a", 1)
        guest.kick(0)
        guest.restart()
        assert not chains[1].pending
        with device.queue(0) as queue:
            assert queue.outstanding == 0
            assert not chains[1].push()  # of a driver that is gone
        assert guest.wait(0, 0) is None
        assert guest.request  # and the next driver is served
        guest.offer(0, b"b", 1)
        guest.kick(0)
        assert chains[2].read() == b"b"
        guest.reset_queue(0)
        assert not chains[2].pending
        with device.queue(0) as queue:
            assert not queue
    with pytest.raises(StateMismatch, match="not plugged in"):
        device.queue(0)


def test_a_handler_that_stops_half_way_is_called_for_the_next_chain() -> None:
    seen = []

    def body(queue: Queue) -> None:
        for chain in queue:
            seen.append(chain.read())
            chain.push()
            break

    with FakeGuest(Device(body)) as guest:
        for n in range(5):
            guest.offer(0, b"%d" % n)
            guest.kick(0)
        assert seen == [b"0", b"1", b"2", b"3", b"4"]


# --- Handlers ------------------------------------------------------------------------------------


class Recorder(Device):
    features = 0b1011
    config = b"0123456789"
    writable_config = ((2, 3), (8, 1))

    def accept(self, features: int) -> bool:
        self.calls.append(("accept", features & 0xFF))
        return features & 0b1000 == 0

    def start(self, features: int) -> None:
        self.calls.append(("start", features & 0xFF))

    def stop(self) -> None:
        self.calls.append("stop")

    def stop_queue(self, index: int) -> None:
        self.calls.append(("stop_queue", index))

    def quiesce(self) -> None:
        self.calls.append("quiesce")

    def unquiesce(self) -> None:
        self.calls.append("unquiesce")

    def config_written(self, offset: int, size: int) -> None:
        self.calls.append((offset, size, self.read_config()))

    def save(self) -> bytes:
        return b"state"

    def restore(self, state: bytes) -> None:
        if state != b"state":
            raise ValueError("not mine")
        self.calls.append("restore")


def test_what_a_driver_does_is_told() -> None:
    device = Recorder()
    with pytest.raises(StateMismatch, match="refuses"):
        FakeGuest(device)
    assert device.calls == ["stop", ("accept", 0b1011), "stop"]
    device = Recorder()
    with FakeGuest(device, features=~0b1000) as guest:
        assert device.calls == ["stop", ("accept", 3), ("start", 3)]
        assert guest.features & 0xFF == 3
        assert device.started
        device.calls.clear()
        guest.write_config(0, b"abcdefghijklm")
        assert device.calls == [(0, 13, b"01cde567i9")]
        assert guest.read_config(8, 4) == b"i9\0\0"
        device.set_config(0, b"Z")
        device.set_config(0, b"Z")
        assert guest.config_interrupts == 1
        with pytest.raises(ConfigError, match="only 10 bytes"):
            device.set_config(8, b"abc")
        device.calls.clear()
        guest.pause()
        state = guest.save()
        with pytest.raises(StateError, match="cut short"):
            guest.restore(state[:20])
        with pytest.raises(StateError, match="not mine"):
            guest.restore(state + b"!")
        guest.restore(state)
        guest.resume()
        assert device.calls == ["quiesce", "stop", "restore", ("start", 3), "unquiesce"]
        guest.reset_queue(1)
        assert device.calls[-1] == ("stop_queue", 1)
        device.fail("the driver is a liar")
        assert guest.needs_reset
        assert guest.failure == "the driver is a liar"
        assert not device.started
        guest.restart()
        assert not guest.needs_reset


def test_an_exception_comes_out_and_the_device_fails() -> None:
    def body(queue: Queue) -> None:
        for chain in queue:
            raise LookupError(f"a mistake with {chain}")

    device = Device(body)
    with FakeGuest(device) as guest:
        with pytest.raises(LookupError, match="a mistake"):
            guest.request(0, b"a", 1)
        assert guest.needs_reset
        device.body = lambda queue: [chain.push() for chain in queue]
        guest.restart()
        assert guest.request(0, b"a", 1) == b""


def test_a_driver_that_lies() -> None:
    """An address outside of memory: the device is not even called."""
    device = Device(lambda queue: [chain.push() for chain in queue])
    with FakeGuest(device, memory="1M") as guest:
        guest.offer(0, b"a", 1)
        guest.memory.write(0x10000, (1 << 40).to_bytes(8, "little"))
        guest.kick(0)
        assert guest.needs_reset
        assert "queue 0" in guest.failure


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"queue_sizes": (3,)}, "powers of two"),
        ({"queue_sizes": (2048,)}, "powers of two"),
        ({"queue_sizes": 5}, "sequence"),
        ({"device_type": 0}, "cannot be 0"),
        ({"device_type": "net"}, "must be a number"),
        ({"features": 1 << 32}, "transport"),
        ({"features": -1}, "64 bits"),
        ({"config": "text"}, "bytes"),
        ({"writable_config": 1}, "offset, size"),
    ],
)
def test_descriptions_that_make_no_sense(change: dict[str, object], text: str) -> None:
    device = Device()
    for name, value in change.items():
        setattr(device, name, value)
    with pytest.raises(ConfigError, match=text) as caught:
        FakeGuest(device)
    assert caught.value.field == next(iter(change))
    assert device.port is None


def test_one_place_at_a_time() -> None:
    device = Device()
    with FakeGuest(device), pytest.raises(ConfigError, match="plugged in somewhere"):
        FakeGuest(device)
    FakeGuest(device).close()


def test_nothing_is_kept() -> None:
    device = Device(lambda queue: [chain.push() for chain in queue])
    guest = FakeGuest(device)
    guest.request(0, b"a", 1)
    seen = weakref.ref(device)
    guest.close()
    del guest, device
    gc.collect()
    assert seen() is None


def test_close_waits_for_who_holds_a_queue() -> None:
    device = Device()
    guest = FakeGuest(device)
    entered, left = threading.Event(), []

    def hold() -> None:
        with device.queue(0):
            entered.set()
            time.sleep(0.1)
            left.append(True)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    guest.close()
    assert left
    thread.join()
