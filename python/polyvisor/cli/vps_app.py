"""`polyvisor vps` and its options; what its commands do is in `vps_command`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_CREATE_EPILOG = """
Examples:

  polyvisor vps create web --from debian

  polyvisor vps create db --from debian-trixie --restart always

  polyvisor vps create tiny --from ./rootfs --init /bin/httpd --init -f

  polyvisor vps create old --from backup.tar.zst

Exit status: 0; 2 for values that make no sense, 125 when it failed, and then nothing is left.
"""
_START_EPILOG = """
Examples:

  polyvisor vps start web

  polyvisor vps start web --memory 256M --cpus 0.5 --pids 200 --net 10.9.0.2/24 --publish 8080:80

  polyvisor vps start --all

What is given is kept for the next start. Exit status: 0; 2 for values that make no sense, 125 when
one could not be started (the others are).
"""
_EXEC_EPILOG = """
Examples:

  polyvisor vps exec web -- ps aux

  polyvisor vps exec web --env LANG=C --workdir /srv -- sh -c 'tar -c . | gzip' >srv.tar.gz

  polyvisor vps exec web --tty -- top

Exit status: the command's own, 128 + n when signal n ended it; 124 after --timeout, 125 when
polyvisor failed, 126 when the command cannot be executed, 127 when there is none.
"""
_ENTER_EPILOG = """
Examples:

  polyvisor vps enter web

  polyvisor vps enter web --user 1000

Exit status: the shell's.
"""
_LIST_EPILOG = """
Examples:

  polyvisor vps list

  polyvisor vps list --json | jq -r '.[] | select(.status == "running") | .name'
"""
_STATS_EPILOG = """
Examples:

  polyvisor vps stats

  polyvisor vps stats web --json
"""
_LIMIT_EPILOG = """
Examples:

  polyvisor vps limit web --memory 512M

  polyvisor vps limit web --cpus 1.5 --pids 500

Changes what is given, at once if it runs. Exit status: 0; 2 for values that make no sense, 125 when
this host cannot set such a limit, and then nothing is changed.
"""
_SNAPSHOT_EPILOG = """
Examples:

  polyvisor vps snapshot web before-upgrade

  polyvisor vps snapshot web --list

  polyvisor vps snapshot web before-upgrade --restore

  polyvisor vps snapshot web before-upgrade --delete
"""
_CLONE_EPILOG = """
Examples:

  polyvisor vps clone web web2

  polyvisor vps clone web old --snapshot before-upgrade

The clone has no network until it is started with --net.
"""
_STOP_EPILOG = """
Examples:

  polyvisor vps stop web

  polyvisor vps stop web db --grace 0

  polyvisor vps stop --all

Exit status: 0, also when it did not run; 125 when there is no such VPS.
"""
_DELETE_EPILOG = """
Examples:

  polyvisor vps delete web

  polyvisor vps delete web db --force

Exit status: 0; 125 when there is no such VPS, or it runs and --force was not given.
"""
_UNIFY_EPILOG = """
Examples:

  polyvisor vps unify

  polyvisor vps unify --json
"""
_BASES_EPILOG = """
Examples:

  polyvisor vps bases build debian --package nginx

  polyvisor vps bases add alpine alpine-minirootfs.tar.gz

  polyvisor vps bases list

  polyvisor vps bases remove alpine
"""

_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    help="Virtual private servers: Linux systems of their own on this kernel.",
    no_args_is_help=True,
    context_settings=_SETTINGS,
)
bases_app = typer.Typer(
    help="The read-only file systems that VPSs share.",
    no_args_is_help=True,
    epilog=_BASES_EPILOG,
    context_settings=_SETTINGS,
)
app.add_typer(bases_app, name="bases")
Action = Callable[[], int]


class Restart(StrEnum):
    """--restart's choices."""

    no = "no"
    on_failure = "on-failure"
    always = "always"


NameArgument = Annotated[str, typer.Argument(help="The VPS.", metavar="NAME")]
NamesArgument = Annotated[
    list[str] | None, typer.Argument(help="VPSs.", metavar="[NAME]...", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them.")]
MemoryOption = Annotated[
    str | None, typer.Option(help="Memory, as 256M or 2G; none: no limit.", metavar="SIZE")
]
SwapOption = Annotated[str | None, typer.Option(help="Swap beyond that.", metavar="SIZE")]
CpusOption = Annotated[
    str | None, typer.Option(help="CPU time per time: 0.5 is half a CPU.", metavar="N")
]
PidsOption = Annotated[
    str | None, typer.Option(help="Processes and threads at a time.", metavar="N")
]
CpusetOption = Annotated[
    str | None, typer.Option(help="The CPUs that it may use, as 0-3,5.", metavar="LIST")
]
ReadOption = Annotated[
    str | None, typer.Option("--io-read", help="Bytes a second from disks.", metavar="SIZE")
]
WriteOption = Annotated[
    str | None, typer.Option("--io-write", help="Bytes a second to disks.", metavar="SIZE")
]
EnvOption = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", help="An environment variable.", metavar="NAME=VALUE"),
]
UserOption = Annotated[
    str, typer.Option("--user", "-u", help="The user and group ids to be.", metavar="UID[:GID]")
]


@app.command("create", epilog=_CREATE_EPILOG)
def create_command(
    name: Annotated[str, typer.Argument(help="Its name.", metavar="NAME")],
    base: Annotated[
        str,
        typer.Option(
            "--from",
            help="debian, debian-SUITE, a directory, a tar, or a base of `vps bases add`.",
            metavar="BASE",
        ),
    ] = "debian",
    init: Annotated[
        list[str] | None,
        typer.Option(help="The program to start, and, repeated, its arguments.", metavar="WORD"),
    ] = None,
    hostname: Annotated[str | None, typer.Option(help="Its host name.", metavar="NAME")] = None,
    restart: Annotated[Restart, typer.Option(help="Start it again when it ends.")] = Restart.no,
    json: JsonOption = False,
) -> Action:
    """Make a VPS. Its base is shared, read-only; it only stores what it changes."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.create(
        name,
        base=base,
        init=init,
        hostname=hostname,
        restart=restart.value,
        as_json=json,
    )


@app.command("start", epilog=_START_EPILOG)
def start_command(
    names: NamesArgument = None,
    everything: AllOption = False,
    memory: MemoryOption = None,
    swap: SwapOption = None,
    cpus: CpusOption = None,
    pids: PidsOption = None,
    cpuset: CpusetOption = None,
    io_read: ReadOption = None,
    io_write: WriteOption = None,
    net: Annotated[
        list[str] | None,
        typer.Option(
            help="An address in a network of VPSs, as 10.9.0.2/24; repeat it for more. Or none, or "
            "host.",
            metavar="ADDRESS/PREFIX",
        ),
    ] = None,
    bridge: Annotated[
        str | None, typer.Option(help="The network's name on the host.", metavar="NAME")
    ] = None,
    publish: Annotated[
        list[str] | None,
        typer.Option(
            help="A port of the host that leads to one of the VPS; repeat it.",
            metavar="[ADDRESS:]PORT:PORT[/udp]",
        ),
    ] = None,
    restart: Annotated[
        Restart | None, typer.Option(help="Start it again when it ends.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> Action:
    """Start VPSs, many at once. They go on without polyvisor."""
    from polyvisor.cli import vps_command

    limits = _limits(memory, swap, cpus, pids, cpuset, io_read, io_write)
    return lambda: vps_command.start(
        names or [],
        everything=everything,
        limits=limits,
        net=net or [],
        bridge=bridge,
        publish=publish or [],
        restart=restart.value if restart else None,
        as_json=json,
    )


@app.command(
    "exec", epilog=_EXEC_EPILOG, context_settings={"allow_interspersed_args": False, **_SETTINGS}
)
def exec_command(
    words: Annotated[
        list[str],
        typer.Argument(help="The VPS, the program and its arguments.", metavar="NAME COMMAND..."),
    ],
    env: EnvOption = None,
    workdir: Annotated[str, typer.Option(help="The directory it starts in.", metavar="DIR")] = "/",
    user: UserOption = "0",
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the command a terminal.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Kill it after so many seconds.", metavar="SECONDS")
    ] = None,
    json: JsonOption = False,
) -> Action:
    """Run a command in a VPS that runs, and exit with its status."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.execute(
        words,
        environment=env or [],
        directory=workdir,
        user=user,
        terminal=tty,
        timeout=timeout,
        as_json=json,
    )


@app.command("enter", epilog=_ENTER_EPILOG)
def enter_command(name: NameArgument, user: UserOption = "0") -> Action:
    """A shell in a VPS, on this terminal."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.enter(name, user=user)


@app.command("list", epilog=_LIST_EPILOG)
def list_command(json: JsonOption = False) -> Action:
    """List VPSs, as the kernel knows them; tidies up what killed programs left."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.list_all(as_json=json)


@app.command("stats", epilog=_STATS_EPILOG)
def stats_command(names: NamesArgument = None, json: JsonOption = False) -> Action:
    """Show what VPSs use: memory, CPU time, processes, disk. Without a name, those that run."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.stats(names or [], as_json=json)


@app.command("limit", epilog=_LIMIT_EPILOG)
def limit_command(
    name: NameArgument,
    memory: MemoryOption = None,
    swap: SwapOption = None,
    cpus: CpusOption = None,
    pids: PidsOption = None,
    cpuset: CpusetOption = None,
    io_read: ReadOption = None,
    io_write: WriteOption = None,
    json: JsonOption = False,
) -> Action:
    """Change limits, while it runs. "none" takes one away."""
    from polyvisor.cli import vps_command

    limits = _limits(memory, swap, cpus, pids, cpuset, io_read, io_write)
    return lambda: vps_command.limit(name, limits, as_json=json)


@app.command("snapshot", epilog=_SNAPSHOT_EPILOG)
def snapshot_command(
    name: NameArgument,
    snapshot: Annotated[
        str | None, typer.Argument(help="The snapshot's name.", metavar="[SNAPSHOT]")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List them.")] = False,
    restore: Annotated[
        bool, typer.Option("--restore", help="Go back to it; the VPS must be stopped.")
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it.")] = False,
    json: JsonOption = False,
) -> Action:
    """Keep a VPS's files as they are now; or list, restore and delete what was kept."""
    from polyvisor.cli import vps_command

    if sum((listing, restore, delete)) > 1 or listing != (snapshot is None):
        raise typer.BadParameter("give the name of a snapshot, or --list", param_hint="SNAPSHOT")
    action = "list" if listing else "restore" if restore else "delete" if delete else "take"
    return lambda: vps_command.snapshot(name, snapshot or "", action=action, as_json=json)


@app.command("clone", epilog=_CLONE_EPILOG)
def clone_command(
    name: NameArgument,
    clone: Annotated[str, typer.Argument(help="The new VPS's name.", metavar="CLONE")],
    snapshot: Annotated[
        str | None, typer.Option(help="Of that snapshot, not of what is now.", metavar="NAME")
    ] = None,
    json: JsonOption = False,
) -> Action:
    """Make a VPS with the files and settings of another."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.clone(name, clone, snapshot=snapshot, as_json=json)


@app.command("stop", epilog=_STOP_EPILOG)
def stop_command(
    names: NamesArgument = None,
    everything: AllOption = False,
    grace: Annotated[
        float, typer.Option(help="Kill what is left after so long.", metavar="SECONDS")
    ] = 10.0,
) -> Action:
    """Stop VPSs: their init is asked to end, then everything is killed."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.stop(names or [], everything=everything, grace=grace)


@app.command("delete", epilog=_DELETE_EPILOG)
def delete_command(
    names: Annotated[list[str], typer.Argument(help="VPSs.", metavar="NAME...")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Kill it if it runs.")] = False,
) -> Action:
    """Remove VPSs with their files and snapshots."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.delete(names, force=force)


@app.command("unify", epilog=_UNIFY_EPILOG)
def unify_command(json: JsonOption = False) -> Action:
    """Make identical files of all VPSs one on the disk, until somebody writes to one."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.unify_all(as_json=json)


@bases_app.command("list")
def bases_list_command(json: JsonOption = False) -> Action:
    """List the bases that polyvisor keeps, and how many VPSs are on each."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.list_bases(as_json=json)


@bases_app.command("build")
def bases_build_command(
    name: Annotated[
        str, typer.Argument(help="debian, or debian-SUITE.", metavar="NAME")
    ] = "debian",
    package: Annotated[
        list[str] | None,
        typer.Option("--package", "-p", help="A package to install; repeat it.", metavar="NAME"),
    ] = None,
    mirror: Annotated[
        str, typer.Option(help="The archive to take packages from.", metavar="URL")
    ] = "",
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Get the present packages, not those in the cache.")
    ] = False,
    json: JsonOption = False,
) -> Action:
    """Build a Debian as a base; no VPS may be on the one that it replaces."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.build_base(
        name, packages=package or [], mirror=mirror, refresh=refresh, as_json=json
    )


@bases_app.command("add")
def bases_add_command(
    name: Annotated[str, typer.Argument(help="Its name.", metavar="NAME")],
    source: Annotated[Path, typer.Argument(help="A directory or a tar.", metavar="SOURCE")],
    json: JsonOption = False,
) -> Action:
    """Keep a copy of a directory, or what is in a tar, as a base."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.add_base(name, source, as_json=json)


@bases_app.command("remove")
def bases_remove_command(
    names: Annotated[list[str], typer.Argument(help="Bases.", metavar="NAME...")],
) -> Action:
    """Remove bases that no VPS is on."""
    from polyvisor.cli import vps_command

    return lambda: vps_command.remove_bases(names)


def _limits(
    memory: str | None,
    swap: str | None,
    cpus: str | None,
    pids: str | None,
    cpuset: str | None,
    io_read: str | None,
    io_write: str | None,
) -> dict[str, str]:
    """Those that were given, as text."""
    given = {
        "memory": memory,
        "swap": swap,
        "cpus": cpus,
        "pids": pids,
        "cpuset": cpuset,
        "io_read": io_read,
        "io_write": io_write,
    }
    return {name: text for name, text in given.items() if text is not None}
