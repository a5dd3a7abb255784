"""`polyvisor process` and its options; what it does is in `process_command`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

_RUN_EPILOG = """
Examples:

  polyvisor process run -- python3 -c 'print(sum(range(10**7)))'

  polyvisor process run --rw ./out --memory 64M --timeout 5 -- ./untrusted input.txt

  polyvisor process run --root ./rootfs --json -- /bin/busybox ls -l /

  polyvisor process run --trace-file calls.txt --cpu 2 --output 1M -- python3 -m this

The program sees the host's /usr, /bin, /lib and a few files of /etc, read-only, an empty /work,
where it starts, and an empty /tmp. Limits that end it: --timeout, --cpu, --instructions. At the
others its system calls fail, as ENOMEM, EFBIG, EMFILE and EAGAIN, and it may go on.

Exit status: the program's own, 128 + n when signal n ended it; 124 after --timeout, 125 when
polyvisor failed, 126 when the program cannot be executed, 127 when there is none, 152 when its
--cpu or --instructions were used up.
"""

app = typer.Typer(
    help="Run one program in a machine of its own, without a kernel: a sandbox.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Action = Callable[[], int]


class Engine(StrEnum):
    """--engine's choices."""

    auto = "auto"
    soft = "soft"
    kvm = "kvm"


@app.callback()
def _main() -> None:
    """(So that `run` is a command, though it is the only one.)"""


@app.command("run", epilog=_RUN_EPILOG, context_settings={"allow_interspersed_args": False})
def run_command(
    command: Annotated[
        list[str], typer.Argument(help="The program and its arguments.", metavar="COMMAND...")
    ],
    engine: Annotated[
        Engine, typer.Option(help="What runs it: KVM, or a CPU in software; auto prefers KVM.")
    ] = Engine.auto,
    root: Annotated[
        str | None,
        typer.Option(help="The program's tree, read-only, instead of the host's.", metavar="DIR"),
    ] = None,
    ro: Annotated[
        list[str] | None,
        typer.Option(
            "--ro", help="More of the host, read-only; repeat it.", metavar="PATH[:PLACE]"
        ),
    ] = None,
    rw: Annotated[
        list[str] | None,
        typer.Option("--rw", help="More of the host, to write to.", metavar="PATH[:PLACE]"),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="What it may map to write to, as 64M or 2G.", metavar="SIZE")
    ] = "256M",
    output: Annotated[
        str, typer.Option(help="What it may write to stdout and stderr.", metavar="SIZE")
    ] = "64M",
    writes: Annotated[str, typer.Option(help="What it may write to files.", metavar="SIZE")] = "1G",
    timeout: Annotated[
        float | None, typer.Option(help="Stop it after so many seconds.", metavar="SECONDS")
    ] = None,
    instructions: Annotated[
        int | None,
        typer.Option(help="Stop it after so many instructions (engine soft).", metavar="N"),
    ] = None,
    cpu: Annotated[
        float | None,
        typer.Option(help="Stop it after so many seconds of CPU time.", metavar="SECONDS"),
    ] = None,
    open_files: Annotated[
        int, typer.Option(help="What each of its processes may have open.", metavar="N")
    ] = 1024,
    threads: Annotated[
        int, typer.Option(help="Of all its processes together, at a time.", metavar="N")
    ] = 256,
    network: Annotated[
        bool,
        typer.Option("--network/--no-network", help="It may connect to other machines, or not."),
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Print its system calls on stderr, as strace does.")
    ] = False,
    trace_file: Annotated[
        str | None, typer.Option("--trace-file", "-o", help="... to a file.", metavar="FILE")
    ] = None,
    trace_json: Annotated[
        bool, typer.Option("--trace-json", help="... a JSON object for each.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="The same addresses whenever N is the same.", metavar="N"),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", help="An environment variable.", metavar="NAME=VALUE"),
    ] = None,
    workdir: Annotated[str, typer.Option(help="The folder it starts in.", metavar="DIR")] = "/work",
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> Action:
    """Run COMMAND in a process VM, and exit with its status."""
    from polyvisor.cli import process_command

    return lambda: process_command.run(
        command,
        engine=engine.value,
        root=root,
        ro=ro or [],
        rw=rw or [],
        memory=memory,
        output=output,
        writes=writes,
        timeout=timeout,
        instructions=instructions,
        cpu=cpu,
        open_files=open_files,
        threads=threads,
        network=network,
        seed=seed,
        trace=trace_file or trace or trace_json,
        trace_json=trace_json,
        environment=env or [],
        directory=workdir,
        as_json=json,
    )
