"""The device of docs/virtio-devices.md: it answers each request with its own bytes, turned around
if the driver chose that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyvisor.virtio import VirtioDevice

if TYPE_CHECKING:
    from polyvisor._ring import Queue

BACKWARDS = 1 << 0  # a feature


class Echo(VirtioDevice):
    device_type = 42
    name = "virtio-echo"
    queue_sizes = (64,)
    features = BACKWARDS
    config = bytes(4)  # how many requests were answered

    def __init__(self) -> None:
        self.answered = 0

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            request = chain.read()
            if self.driver_features & BACKWARDS:
                request = request[::-1]
            chain.write(request)
            chain.push()
            self.answered += 1
        self.set_config(0, self.answered.to_bytes(4, "little"))

    def stop(self) -> None:
        self.answered = 0
