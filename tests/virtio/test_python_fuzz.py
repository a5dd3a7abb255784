"""The devices written in Python with a driver that does anything: no exception, no hang."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import pytest

from polyvisor.errors import StateMismatch
from polyvisor.virtio.balloon import Balloon
from polyvisor.virtio.fs import Fs
from polyvisor.virtio.rng import Rng
from polyvisor.virtio.testing import FakeGuest

if TYPE_CHECKING:
    from pathlib import Path

    from polyvisor.virtio import VirtioDevice


def devices(path: Path) -> dict[str, VirtioDevice]:
    (path / "file").write_bytes(b"content")
    return {
        "rng": Rng(),
        "slow rng": Rng(rate=1_000_000),
        "balloon": Balloon("1M"),
        "polled balloon": Balloon(interval=0.001),
        "fs": Fs(path, "tag", read_only=False),
        "threaded fs": Fs(path, "tag", inline=False),
    }


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(
    "name", ["rng", "slow rng", "balloon", "polled balloon", "fs", "threaded fs"]
)
def test_a_driver_that_does_anything(tmp_path: Path, name: str, packed: bool) -> None:
    rng = random.Random(f"{name} {packed}")
    device = devices(tmp_path)[name]
    queues = len(device.queue_sizes)
    with FakeGuest(device, memory="8M", packed=packed) as guest:
        for _ in range(2500):
            queue = rng.randrange(queues)
            what = rng.random()
            if what < 0.7:
                out = [rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(4))]
                into = [rng.choice([1, 16, 5000]) for _ in range(rng.randrange(4))]
                if any(out) or into:
                    with contextlib.suppress(StateMismatch):  # it is full
                        guest.offer(queue, out, into)
            elif what < 0.9:
                guest.kick(queue)
            elif what < 0.96:
                while guest.wait(queue, 0) is not None:
                    pass
            elif what < 0.98:
                guest.write_config(rng.randrange(60), rng.randbytes(rng.randrange(1, 9)))
            elif what < 0.985:
                guest.reset_queue(queue)
                guest.restart()
            elif what < 0.99:
                guest.pause()
                guest.restore(guest.save())
                guest.resume()
            elif what < 0.995:  # a descriptor or an index that is not what was offered
                guest.memory.write(0x10000 + rng.randrange(0x6000), rng.randbytes(4))
                guest.kick(queue)
                guest.restart()
            else:
                guest.restart()
            if guest.needs_reset:
                guest.restart()
        guest.restart()
        assert not guest.needs_reset
