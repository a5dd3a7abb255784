"""Writing to the user: raw bytes to descriptors, JSON, and a sign of life while it takes long."""

from __future__ import annotations

import base64
import json
import os
import select
import sys
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
            select.select([], [descriptor], [])


def write_json(value: dict[str, Any]) -> None:
    """One JSON document on stdout."""
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
        return {f"{name}_base64": base64.b64encode(data).decode()}


class Progress:
    """Says what is going on when it lasts, on a terminal only. Call it with a text for each step,
    and with "" when there is nothing to wait for any more."""

    def __init__(self) -> None:
        self._text = ""
        self._timer: threading.Timer | None = None
        self._spinner: Any = None
        self._lock = threading.Lock()
        self._wanted = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if not self._wanted:
            return
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

        with self._lock:
            if self._text and self._spinner is None:
                self._spinner = Console(stderr=True).status(self._text)
                self._spinner.start()

    def _stop(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
