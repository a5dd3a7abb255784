"""Virtio devices (docs/virtio-devices.md). What is written in Python here is a model of how to
write more of them: `polyvisor.virtio.base` begins."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from polyvisor.virtio.base import VirtioDevice

__all__ = ["VirtioDevice"]


def __getattr__(name: str) -> object:
    if name == "VirtioDevice":
        from polyvisor.virtio.base import VirtioDevice

        return VirtioDevice
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
