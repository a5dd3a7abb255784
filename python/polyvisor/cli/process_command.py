"""`polyvisor process run`."""

from __future__ import annotations

from polyvisor.cli import status
from polyvisor.cli.arguments import place, variable
from polyvisor.cli.output import as_json as encoded
from polyvisor.cli.output import write_json
from polyvisor.errors import ConfigError, HostError, ProcessTimeout
from polyvisor.process import Process


def run(
    command: list[str],
    *,
    engine: str,
    root: str | None,
    ro: list[str],
    rw: list[str],
    memory: str,
    output: str,
    writes: str,
    timeout: float | None,
    instructions: int | None,
    cpu: float | None,
    open_files: int,
    threads: int,
    network: bool,
    trace: str | bool,
    trace_json: bool,
    seed: int | None,
    environment: list[str],
    directory: str,
    as_json: bool,
) -> int:
    """Runs the program and returns the exit status for the shell."""
    if timeout is not None and timeout <= 0:
        raise ConfigError(
            f"--timeout must be more than 0 seconds, not {timeout:g}", field="timeout"
        )
    try:
        process = Process(
            command,
            engine=engine,
            root=root,
            ro=[place(text) for text in ro],
            rw=[place(text) for text in rw],
            memory=memory,
            output=output,
            writes=writes,
            instructions=instructions,
            cpu=cpu,
            open_files=open_files,
            threads=threads,
            network=network,
            trace=trace,
            trace_json=trace_json,
            seed=seed,
            env=dict(variable(text) for text in environment),
            cwd=directory,
            stdin=0,
            stdout=None if as_json else 1,
            stderr=None if as_json else 2,
        )
    except ConfigError as error:
        if error.field != "argv":
            raise
        status.say(str(error))
        return status.NOT_FOUND
    except HostError as error:
        status.say(str(error))
        return status.of_execution(error)
    with process:
        try:
            result = process.run(timeout)
        except ProcessTimeout as error:
            _say_limit("timeout", f"did not end within {timeout:g} s", command, as_json)
            if as_json:
                ended = {"reason": "timeout", "status": status.TIMEOUT, "signal": 0}
                _write_json(process, ended, error.stdout, error.stderr)
            return status.TIMEOUT
        used_up = {
            "instructions": f"used up its {instructions} instructions",
            "cpu": f"used up its {cpu} s of CPU time",
            "memory": f"was ended for it used more than its {memory} of memory",
            "output": f"wrote more than its {output} of output, which ends there",
            "writes": f"wrote more than its {writes} to files, which end there",
        }
        for limit in dict.fromkeys((result.reason, *result.limits)):
            if limit == result.reason or limit in ("output", "writes"):
                _say_limit(limit, used_up.get(limit), command, as_json)
        if as_json:
            ended = {"reason": result.reason, "status": result.status, "signal": result.signal}
            _write_json(process, ended, result.stdout, result.stderr)
    return result.status


def _say_limit(limit: str, sentence: str | None, command: list[str], as_json: bool) -> None:
    """(With --json it is in the object.)"""
    if sentence and not as_json:
        status.say(f"{command[0]} {sentence}; --{limit} gives it more")


def _write_json(process: Process, ended: dict[str, object], stdout: bytes, stderr: bytes) -> None:
    write_json(
        {
            "argv": list(process.argv),
            **ended,
            "engine": process.engine,
            **process.usage(),
            "system_calls": {
                name: {"calls": calls, "failed": failed}
                for name, (calls, failed) in process.system_calls().items()
            },
            **encoded("stdout", stdout),
            **encoded("stderr", stderr),
        }
    )
