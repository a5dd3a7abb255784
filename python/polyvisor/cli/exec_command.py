"""`polyvisor exec`."""

from __future__ import annotations

import os
import sys

from polyvisor.cli import output, status
from polyvisor.errors import ConfigError, Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from polyvisor.guest.channel import Channel
    from polyvisor.guest.command import Completed
    from polyvisor.guest.image import Remote
    from polyvisor.machine import Machine


def execute(
    command: list[str],
    *,
    engine: str,
    irqchip: str,
    memory: str,
    cpus: int,
    timeout: float | None,
    kernel: str,
    append: str,
    environment: list[str],
    directory: str,
    image: str | None,
    write: bool,
    nets: list[str],
    shares: list[str],
    terminal: bool,
    as_json: bool,
    stats: bool,
    stdin_closed: bool,
) -> int:
    """Runs the command and returns the exit status for the shell."""
    status.note_engine(engine)
    progress = output.Progress()
    options: dict[str, Any] = {
        "engine": engine,
        "irqchip": irqchip,
        "memory": memory,
        "cpus": cpus,
        "timeout": timeout,
        "kernel": kernel,
        "append": append,
        "env": _environment(environment, terminal),
        "cwd": directory,
        "progress": progress,
        "statistics": stats,
    }
    if image is not None:
        options |= {"image": image, "write": write}
    if nets or shares:
        from polyvisor.cli.devices import Devices
        from polyvisor.images.bootable import share_options

        parsed = Devices(nets=nets, shares=shares).parsed()
        options["on_machine"] = parsed.plug
        options["append"] = " ".join([append, *share_options(parsed.shares, ours=True)]).strip()
    from polyvisor.guest import exec  # noqa: A004

    try:
        if as_json:
            completed = exec(command, stdin=None if stdin_closed else 0, **options)
            output.write_json({**_result(completed)})
            return completed.status
        options["on_stdout"] = lambda data: output.write_all(1, data)
        options["on_stderr"] = lambda data: output.write_all(2, data)
        if terminal:
            attended = _on_terminal(command, options)
            if attended is None:
                return status.INTERRUPTED
            completed = attended
        else:
            completed = exec(command, stdin=None if stdin_closed else 0, **options)
        if completed.statistics is not None:
            output.write_statistics(completed.statistics)
        return completed.status
    except Error as error:
        if as_json:
            code = status.report(error)
            details = {"type": type(error).__name__, "message": str(error)}
            output.write_json({"argv": command, "status": code, "error": details})
            return code
        raise
    finally:
        progress("")


def _on_terminal(command: list[str], options: dict[str, Any]) -> Completed | None:
    """The command gets a terminal of the user's size, whose keys go straight to it. None when the
    user quit."""
    import shutil
    import signal

    from polyvisor.cli.terminal import EscapeKeys, RawMode, Reader
    from polyvisor.guest import exec  # noqa: A004

    keys = EscapeKeys()
    state: dict[str, Any] = {}

    def size() -> tuple[int, int]:
        found = shutil.get_terminal_size()
        return found.lines, found.columns

    def resized(number: int, frame: FrameType | None) -> None:
        # Not from the handler itself: it may have interrupted the holder of the channel's lock.
        state["resized"] = True

    def started(machine: Machine, channel: Channel | Remote) -> None:
        state["machine"], state["channel"] = machine, channel
        if keys.quit:  # typed before there was a machine
            machine.end("stopped", detail="Ctrl-] q")

    def output_and_size(data: bytes) -> None:
        output.write_all(1, data)

    with RawMode(0) as raw:
        if not raw.active:
            return exec(command, stdin=0, tty=size(), **options)
        read_end, write_end = os.pipe()
        before = signal.signal(signal.SIGWINCH, resized)

        def typed(data: bytes) -> None:
            for_guest = keys.filter(data)
            if for_guest:
                os.write(write_end, for_guest)
            if keys.quit and "machine" in state:
                state["machine"].end("stopped", detail="Ctrl-] q")

        def tick() -> None:
            if state.pop("resized", False) and "channel" in state:
                state["channel"].resize(*size())

        reader = Reader(0, typed)
        try:
            options["on_stdout"] = output_and_size
            return exec(
                command, stdin=read_end, tty=size(), on_start=started, on_idle=tick, **options
            )
        except Error:
            if keys.quit:
                raw.restore()
                status.say("quit; the machine was stopped")
                return None
            raise
        finally:
            reader.stop()
            signal.signal(signal.SIGWINCH, before)
            os.close(read_end)
            os.close(write_end)


def _environment(given: list[str], terminal: bool) -> dict[str, str | None]:
    variables: dict[str, str | None] = {}
    if terminal and sys.stdin is not None:
        variables["TERM"] = os.environ.get("TERM", "vt100")
    for entry in given:
        name, separator, value = entry.partition("=")
        if not separator:
            if entry not in os.environ:
                raise ConfigError(
                    f"--env {entry}: there is no such variable here; give NAME=VALUE", field="env"
                )
            value = os.environ[entry]
        variables[name] = value
    return variables


def _result(completed: Completed) -> dict[str, Any]:
    return {
        "argv": list(completed.argv),
        "status": completed.status,
        "signal": completed.signal,
        **output.as_json("stdout", completed.stdout),
        **output.as_json("stderr", completed.stderr),
        "engine": completed.engine,
        "boot_seconds": round(completed.boot_seconds, 3),
        "seconds": round(completed.seconds, 3),
        "boot_cpu_seconds": round(completed.boot_cpu_seconds, 3),
        "cpu_seconds": round(completed.cpu_seconds, 3),
        "console": completed.console,
        **({"statistics": completed.statistics} if completed.statistics is not None else {}),
    }
