"""The command line. `main` is the program `polyvisor`; everything heavy is imported when needed."""

from __future__ import annotations

import contextlib
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status (docs/exec.md lists them)."""
    closed = _open_standard_files()
    from polyvisor.cli import status

    with status.signals_raise():
        try:
            from polyvisor.cli.app import run

            return run(sys.argv[1:] if arguments is None else arguments, closed)
        except BaseException as error:
            return status.report(error)
        finally:
            _flush()


def _open_standard_files() -> set[int]:
    """Fills in standard files that were closed (`>&-`), so that no file opened later takes their
    number and gets what was meant for them. Returns which they were."""
    closed = set()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    return closed


def _flush() -> None:
    """Python's own buffers; what cannot be written any more must not become a second complaint."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


__all__ = ["main"]
