"""`polyvisor sandbox`."""

from __future__ import annotations

import os

from polyvisor.cli import status
from polyvisor.cli.arguments import place, variable
from polyvisor.cli.output import as_json as encoded
from polyvisor.cli.output import write_json
from polyvisor.errors import HostError, ProcessTimeout
from polyvisor.sandboxes import SandboxResult, sandbox


def execute(
    command: list[str],
    *,
    ro: list[str],
    rw: list[str],
    net: str,
    memory: str | None,
    cpus: float | None,
    pids: int | None,
    timeout: float | None,
    environment: list[str],
    directory: str | None,
    as_json: bool,
) -> int:
    """Runs the command and returns the exit status for the shell."""
    try:
        result = sandbox(
            command,
            ro=[place(text) for text in ro],
            rw=[place(text) for text in rw],
            net="host" if net == "host" else "none",
            memory=memory,
            cpus=cpus,
            pids=pids,
            timeout=timeout,
            env=dict(variable(text) for text in environment),
            cwd=directory,
            stdin=0,
            stdout=None if as_json else 1,
            stderr=None if as_json else 2,
        )
    except ProcessTimeout as error:
        if not as_json:
            status.say(f"{error}; --timeout gives it more")
        else:
            ended = {"argv": command, "status": status.TIMEOUT, "signal": 9, "limits": ["timeout"]}
            write_json(
                {**ended, **encoded("stdout", error.stdout), **encoded("stderr", error.stderr)}
            )
        return status.TIMEOUT
    except HostError as error:
        if error.path != command[0]:
            raise
        status.say(f"{command[0]}: {os.strerror(error.errno)}")
        return status.of_execution(error)
    if as_json:
        _write(result)
    elif "memory" in result.limits:
        status.say(f"something in the sandbox was killed for using more than {memory} of memory")
    return result.status


def _write(result: SandboxResult) -> None:
    write_json(
        {
            "argv": list(result.argv),
            "status": result.status,
            "signal": result.signal,
            "limits": list(result.limits),
            **encoded("stdout", result.stdout),
            **encoded("stderr", result.stderr),
        }
    )
