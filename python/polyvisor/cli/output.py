"""Writing to the user: raw bytes to descriptors, JSON, and a sign of life while it takes long."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from typing import Any

#: Seconds that a step may take in silence.
PATIENCE = 1.0


def write_all(descriptor: int, data: bytes) -> None:
    """Writes everything, to any kind of descriptor; raises OSError (BrokenPipeError, ...)."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            # Somebody else made our terminal or pipe non-blocking.
            import select

            select.select([], [descriptor], [])


def write_json(value: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    import json

    write_all(1, (json.dumps(value, indent=2) + "\n").encode())


def write_statistics(statistics: dict[str, Any]) -> None:
    """What a machine counted, as a table on stderr."""
    from polyvisor.statistics import table

    write_all(2, table(statistics).encode())


def as_json(name: str, data: bytes) -> dict[str, str]:
    """Bytes as a JSON member: text when they are UTF-8, else base64 under a name that says so."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        import base64

        return {f"{name}_base64": base64.b64encode(data).decode()}


class Progress:
    """Says what is going on when it lasts, on a terminal only. Call it with a text for each step,
    and with "" when there is nothing to wait for any more."""

    def __init__(self) -> None:
        self._text = ""
        self._timer: threading.Timer | None = None
        self._spinner: Any = None
        self._lock: threading.Lock | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            import threading

            self._lock = threading.Lock()

    def __call__(self, text: str) -> None:
        if self._lock is None:
            return
        import threading

        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._text = text
            if not text:
                self._stop()
            elif self._spinner is not None:
                self._spinner.update(text)
            else:
                self._timer = threading.Timer(PATIENCE, self._show)
                self._timer.daemon = True
                self._timer.start()

    def _show(self) -> None:
        from rich.console import Console

        assert self._lock is not None
        with self._lock:
            if self._text and self._spinner is None:
                self._spinner = Console(stderr=True).status(self._text)
                self._spinner.start()

    def _stop(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
