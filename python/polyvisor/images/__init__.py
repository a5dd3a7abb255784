"""Guest images: kernels from the distribution, the initramfs that runs one command, and disks."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from polyvisor.images.debian import Built, build

__all__ = ["Built", "build"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from polyvisor.images import debian as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
