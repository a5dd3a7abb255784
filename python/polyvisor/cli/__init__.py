"""The command line. `main` is the program `polyvisor`; everything heavy is imported when needed."""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status (docs/exec.md lists them)."""
    # Starting makes many objects and no garbage.
    gc.set_threshold(50_000)
    closed = _open_standard_files()
    from polyvisor.cli import status

    with status.signals_raise():
        try:
            return _run(sys.argv[1:] if arguments is None else arguments, closed)
        except BaseException as error:
            return status.report(error)
        finally:
            _flush()


def _run(arguments: list[str], closed: set[int]) -> int:
    from polyvisor.cli import quick

    plain = quick.parse(arguments)
    if plain is not None and 1 not in closed:
        from polyvisor.cli.exec_command import execute

        command, options = plain
        return execute(command, stdin_closed=0 in closed, **options)
    from polyvisor.cli.app import run

    return run(arguments, closed)


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
            _silence(stream)


def _silence(stream: TextIO) -> None:
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except OSError:
        return


__all__ = ["main"]
