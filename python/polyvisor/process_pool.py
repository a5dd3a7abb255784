"""`ProcessPool`: machines that are ready for programs, and used again."""

from __future__ import annotations

import weakref

from polyvisor import _native
from polyvisor.config import parse_size
from polyvisor.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class ProcessPool:
    """Machines that are kept ready, so that a program starts in one without waiting for it::

        with ProcessPool(4) as pool:
            for text in texts:
                Process(["/usr/bin/wc"], stdin=text, pool=pool).run()

    `count` machines are made in the background, and made empty again when their program has ended;
    more that are in use at a time are made when they are needed, and closed afterwards. Each takes
    about a megabyte of the host's memory while it waits. `memory` and `engine` are those of
    `Process`, for all of them. Raises `ConfigError`, `EngineUnavailable`, `HostError`.
    """

    def __init__(self, count: int, *, memory: int | str = "256M", engine: str = "auto") -> None:
        if not 1 <= count <= 10_000:
            raise ConfigError(f"a pool has 1 to 10000 machines, not {count}", field="count")
        #: Bytes that each program may map to write to.
        self.memory = parse_size(memory, "memory")
        #: The engine of its machines: "kvm" or "soft".
        self.engine = _native.process_engine(engine)
        #: For polyvisor itself.
        self.native = _native.ProcessPool(memory=self.memory, count=count, engine=self.engine)
        # Its thread must not outlive the interpreter.
        self._close = weakref.finalize(self, self.native.close)

    @property
    def idle(self) -> int:
        """How many machines are ready."""
        return self.native.idle

    def close(self) -> None:
        """Closes the machines that are idle, and later those that are in use. Programs that are
        started from it now get machines of their own."""
        self._close()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
