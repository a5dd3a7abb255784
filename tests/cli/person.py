"""A person in front of a terminal, for the tests of the command line."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 120


class Terminal:
    """polyvisor on a pseudo-terminal, with us as the person in front of it."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
        )
        self.output = b""

    def expect(self, text: bytes) -> None:
        """Waits until `text` is on the screen."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.output:
            left = deadline - time.monotonic()
            if left <= 0:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"{text!r} did not appear: {self.output!r}")
            if select.select([self.master], [], [], left)[0]:
                self.output += os.read(self.master, 1000)

    def type(self, keys: bytes) -> None:
        """Presses keys."""
        os.write(self.master, keys)

    def finish(self) -> int:
        """Waits for the program's end and its status; the terminal must be as it was."""
        try:
            return self.process.wait(15)
        finally:
            self.process.kill()
            self.process.wait()
            restored = termios.tcgetattr(self.slave)
            os.close(self.slave)
            os.close(self.master)
            assert restored == self.before
