"""The user's terminal in raw mode, and the keys that are for polyvisor and not for the guest."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import termios
import threading
import tty
from collections.abc import Callable
from types import TracebackType

ESCAPE = 0x1D  # Ctrl-]
QUIT = ord("q")


class RawMode:
    """Raw mode for a terminal, undone when the context ends, at the latest when the process does.

    What is no terminal is left alone: `active` tells.
    """

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._saved: list[object] | None = None
        self.active = os.isatty(descriptor)

    def __enter__(self) -> RawMode:
        if self.active:
            self._saved = termios.tcgetattr(self._descriptor)
            atexit.register(self.restore)
            tty.setraw(self._descriptor, termios.TCSADRAIN)
        return self

    def restore(self) -> None:
        """Puts the settings back that were there before."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        with contextlib.suppress(termios.error):  # the terminal is gone: so are its settings
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, saved)  # type: ignore[arg-type]
        atexit.unregister(self.restore)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()


class EscapeKeys:
    """Takes Ctrl-] q (quit) out of what is typed; Ctrl-] Ctrl-] is one Ctrl-] for the guest."""

    def __init__(self) -> None:
        self._pending = False
        self.quit = False

    def filter(self, data: bytes) -> bytes:
        """What of `data` is for the guest; `quit` is set when the user wants out."""
        out = bytearray()
        for byte in data:
            if self._pending:
                self._pending = False
                if byte == QUIT:
                    self.quit = True
                    break
                if byte != ESCAPE:  # no command of ours: both keys were meant
                    out.append(ESCAPE)
                out.append(byte)
            elif byte == ESCAPE:
                self._pending = True
            else:
                out.append(byte)
        return bytes(out)


class Reader:
    """Reads a descriptor on a thread and passes on what comes, until it ends or `stop`."""

    def __init__(
        self,
        descriptor: int,
        take: Callable[[bytes], object],
        *,
        room: Callable[[], bool] | None = None,
    ) -> None:
        self._descriptor = descriptor
        self._take = take
        self._room = room or (lambda: True)
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="polyvisor-input", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; the descriptor stays open."""
        os.write(self._wake[1], b"x")
        self._thread.join()
        for end in self._wake:
            os.close(end)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake[0], select.POLLIN)
        poll.register(self._descriptor, select.POLLIN)
        while True:
            if not self._room():
                if select.select([self._wake[0]], [], [], 0.02)[0]:
                    return
                continue
            ready = {number for number, _ in poll.poll()}
            if self._wake[0] in ready:
                return
            try:
                data = os.read(self._descriptor, 4096)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            self._take(data)
