"""The commands and their options; what they do is in modules of their own.

A command here only says what is to be done, as a function that `run` calls when the parser is
through: the parser has ideas of its own about closed pipes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from polyvisor.cli import image_app, process_app, status, vps_app
from polyvisor.errors import ConfigError

_EXEC_EPILOG = """
Examples:

  polyvisor exec -- uname -a

  echo hello | polyvisor exec -- tr a-z A-Z

  polyvisor exec --cpus 2 --memory 1G -- sh -c 'nproc; free -m'

  polyvisor exec --tty -- sh

  polyvisor exec --share .:/src -- du -s /src

  polyvisor exec --image debian.img -- apt list --installed

  polyvisor exec --image debian.img --share .:/src:rw --net user -- make -C /src test

Exit status: the command's own; 124 after --timeout, 125 when polyvisor or the guest failed, 126
when the guest cannot execute the command, 127 when it has no such command, 130 after Ctrl-C.
"""
_RUN_EPILOG = """
Examples:

  polyvisor run --disk debian.img --net user,hostfwd=tcp:127.0.0.1:2222-:22 --share ./src:/mnt/src

  polyvisor run --disk debian-12-genericcloud-amd64.qcow2,snapshot --memory 2G --cpus 2

  polyvisor run --kernel vmlinuz --initrd initrd.img --append 'console=ttyS0'

  polyvisor run --kernel vmlinux --serial console.log --timeout 60

Ctrl-] then q quits, Ctrl-] twice sends one. Exit status: 0 when the guest powered off or rebooted,
its own when it used the debug-exit port, 1 when it crashed, 124 after --timeout, 125 when polyvisor
failed.
"""
_SANDBOX_EPILOG = """
Examples:

  polyvisor sandbox -- make -j4 check

  polyvisor sandbox --rw . --memory 512M --pids 100 --timeout 60 -- ./untrusted input.txt

  polyvisor sandbox --net host --ro ~/data:/tmp/data -- curl -T /tmp/data/file https://example.org/

The command sees the host's files as you do, but read-only, with /tmp, /var/tmp and /run of its own,
no network and no other processes. It may write to the paths of --rw. An ordinary user needs
no rights for that; limits need root, or a cgroup of one's own.

Exit status: the command's own, 128 + n when signal n ended it; 124 after --timeout, 125 when
polyvisor failed, 126 when the command cannot be executed, 127 when there is none.
"""
_WALK_EPILOG = """
Examples:

  polyvisor walk memory.raw --cr3 0x2a10000 0xffffffff81000000

  polyvisor walk memory.raw --cr3 0x2a10000 0x7ffd1000 --access write --user

  polyvisor walk memory.raw --cr3 0x2a10000 --ranges --map space.svg

  polyvisor walk old.raw --cr3 0x1000 --paging pae --base 0x100000 --json 0x8048000

Exit status: 0 when every address can be accessed that way, 1 when one cannot (the table says why),
2 for a command line that makes no sense (no such format or number, a CR3 that is not in the image
or beyond --maxphyaddr), 125 when a file cannot be used.
"""

app = typer.Typer(
    name="polyvisor",
    help="Virtual machines as a library: run a command, or any kernel, in a fresh one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_closed: set[int] = set()
Action = Callable[[], int]


class Engine(StrEnum):
    """--engine's choices."""

    auto = "auto"
    soft = "soft"
    kvm = "kvm"


class Irqchip(StrEnum):
    """--irqchip's choices."""

    AUTO = "auto"
    USER = "user"
    SPLIT = "split"  # a str has a method of that name in lower case
    KERNEL = "kernel"


EngineOption = Annotated[
    Engine,
    typer.Option(
        help="What runs the CPUs: Linux's KVM, or a CPU in software; auto takes the fastest here."
    ),
]
IrqchipOption = Annotated[
    Irqchip,
    typer.Option(
        help="Who plays the interrupt chips: KVM (kernel), KVM only the local APICs (split), or "
        "polyvisor (user)."
    ),
]
StatsOption = Annotated[
    bool,
    typer.Option("--stats", help="Show at the end what was counted: exits, accesses, KVM's own."),
]
MemoryOption = Annotated[
    str, typer.Option(help="RAM, with a unit of K, M, G or T.", metavar="SIZE")
]
CpusOption = Annotated[int, typer.Option(help="Virtual CPUs.", metavar="N")]
TimeoutOption = Annotated[
    float | None,
    typer.Option(help="Stop the machine after so many seconds.", metavar="SECONDS"),
]
NetOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A network card: user (no privileges needed), with hostfwd=tcp:ADDRESS:PORT-:PORT and "
        "others behind commas, or none. Repeat it for more.",
        metavar="user[,OPTION=...]",
    ),
]
ShareOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A folder of the host's, mounted in the guest; it can be changed there only with :rw.",
        metavar="HOST:GUEST[:rw]",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def run(arguments: list[str], closed: set[int]) -> int:
    """Parses and runs; `closed` are standard files that were not open. Returns the exit status."""
    _closed.clear()
    _closed.update(closed)
    command = typer.main.get_command(app)
    try:
        result = command.main(arguments, prog_name="polyvisor", standalone_mode=False)
    except Exception as error:
        # A usage error. Its class is click's, which newer versions of typer have inside.
        if not hasattr(error, "show") or not hasattr(error, "exit_code"):
            raise
        error.show()
        return int(error.exit_code)
    return result() if callable(result) else int(result or status.OK)


def _version(wanted: bool) -> None:
    if wanted:
        from polyvisor import __version__

        print(f"polyvisor {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command(
    "exec",
    epilog=_EXEC_EPILOG,
    context_settings={"allow_interspersed_args": False},
)
def exec_command(
    command: Annotated[
        list[str], typer.Argument(help="The program and its arguments.", metavar="COMMAND...")
    ],
    engine: EngineOption = Engine.auto,
    irqchip: IrqchipOption = Irqchip.AUTO,
    memory: MemoryOption = "512M",
    cpus: CpusOption = 1,
    timeout: TimeoutOption = None,
    kernel: Annotated[
        str, typer.Option(help="A kernel file, or one of cloud, generic, 686.", metavar="KERNEL")
    ] = "cloud",
    append: Annotated[
        str, typer.Option(help="More for the kernel's command line.", metavar="CMDLINE")
    ] = "",
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", help="An environment variable.", metavar="NAME=VALUE"),
    ] = None,
    workdir: Annotated[
        str, typer.Option(help="The command's directory in the guest.", metavar="DIR")
    ] = "/root",
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the command a terminal.")] = False,
    image: Annotated[
        str | None,
        typer.Option(
            help="Run it in the system on this disk image; see polyvisor image build.",
            metavar="FILE",
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Keep what the command changes in the image.")
    ] = False,
    net: NetOption = None,
    share: ShareOption = None,
    json: JsonOption = False,
    stats: StatsOption = False,
) -> Action:
    """Run COMMAND as root in a fresh virtual machine, and exit with its status.

    Boots the distribution's kernel for virtual machines with a busybox user space, or the system on
    a disk image. Stdin, stdout and stderr are the command's.
    """
    from polyvisor.cli.exec_command import execute

    if 1 in _closed:
        raise ConfigError(
            "standard output is closed, so the command's would be lost; redirect it "
            "to /dev/null if that is meant",
            field="stdout",
        )
    return lambda: execute(
        command,
        engine=engine.value,
        irqchip=irqchip.value,
        memory=memory,
        cpus=cpus,
        timeout=timeout,
        kernel=kernel,
        append=append,
        environment=env or [],
        directory=workdir,
        image=image,
        write=write,
        nets=net or [],
        shares=share or [],
        terminal=tty,
        as_json=json,
        stats=stats,
        stdin_closed=0 in _closed,
    )


@app.command("run", epilog=_RUN_EPILOG)
def run_command(
    kernel: Annotated[
        Path | None,
        typer.Option(
            help="A bzImage, or an ELF kernel; without one, that on the first disk.",
            metavar="FILE",
        ),
    ] = None,
    initrd: Annotated[
        Path | None, typer.Option(help="Its initial RAM disk.", metavar="FILE")
    ] = None,
    append: Annotated[
        str | None,
        typer.Option(
            help="The kernel's command line (console=ttyS0); for a disk's kernel, more of it.",
            metavar="CMDLINE",
        ),
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            help="A disk image, with ro, snapshot (throw changes away), format=qcow2 and others "
            "behind commas. Repeat it for more.",
            metavar="FILE[,OPTION]...",
        ),
    ] = None,
    net: NetOption = None,
    share: ShareOption = None,
    vsock: Annotated[
        str | None,
        typer.Option(
            help="Sockets between guest and host, through a Unix socket.", metavar="CID[,PATH]"
        ),
    ] = None,
    rng: Annotated[bool, typer.Option("--rng", help="A source of random numbers.")] = False,
    memory: MemoryOption = "512M",
    cpus: CpusOption = 1,
    engine: EngineOption = Engine.auto,
    irqchip: IrqchipOption = Irqchip.AUTO,
    serial: Annotated[
        str,
        typer.Option(
            help="Where the first serial port goes: stdio, pty, or a file.",
            metavar="stdio|pty|FILE",
        ),
    ] = "stdio",
    timeout: TimeoutOption = None,
    stats: StatsOption = False,
) -> Action:
    """Boot a kernel, or the system on a disk; the first serial port is this terminal.

    Ends when the guest powers off or reboots.
    """
    if kernel is None and not disk:
        raise typer.BadParameter(
            "there is nothing to boot; give a kernel, or a --disk with a system on it",
            param_hint="--kernel",
        )
    from polyvisor.cli.devices import Devices
    from polyvisor.cli.run_command import boot

    return lambda: boot(
        devices=Devices(disk or [], net or [], share or [], vsock, rng),
        kernel=kernel,
        initrd=initrd,
        append=append,
        memory=memory,
        cpus=cpus,
        engine=engine.value,
        irqchip=irqchip.value,
        serial=serial,
        timeout=timeout,
        stats=stats,
        closed=frozenset(_closed),
    )


class SandboxNet(StrEnum):
    """sandbox --net's choices."""

    none = "none"
    host = "host"


@app.command("sandbox", epilog=_SANDBOX_EPILOG, context_settings={"allow_interspersed_args": False})
def sandbox_command(
    command: Annotated[
        list[str], typer.Argument(help="The program and its arguments.", metavar="COMMAND...")
    ],
    rw: Annotated[
        list[str] | None,
        typer.Option("--rw", "--bind", help="What it may write to.", metavar="PATH[:PLACE]"),
    ] = None,
    ro: Annotated[
        list[str] | None,
        typer.Option("--ro", help="More of the host, read-only.", metavar="PATH[:PLACE]"),
    ] = None,
    net: Annotated[
        SandboxNet, typer.Option(help="No network but its own loopback, or the host's.")
    ] = SandboxNet.none,
    memory: Annotated[
        str | None, typer.Option(help="Of all its processes together.", metavar="SIZE")
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(help="CPU time per time; 0.5 is half of one.", metavar="N")
    ] = None,
    pids: Annotated[
        int | None, typer.Option(help="Processes and threads at a time.", metavar="N")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Kill it after so many seconds.", metavar="SECONDS")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", help="An environment variable.", metavar="NAME=VALUE"),
    ] = None,
    workdir: Annotated[
        str | None,
        typer.Option(help="The folder it starts in; this one if it is there.", metavar="DIR"),
    ] = None,
    json: JsonOption = False,
) -> Action:
    """Run COMMAND on the host's files without letting it change them, and exit with its status.

    A sandbox of the kernel's namespaces, which starts in milliseconds.
    """
    from polyvisor.cli import sandbox_command as implementation

    return lambda: implementation.execute(
        command,
        ro=ro or [],
        rw=rw or [],
        net=net.value,
        memory=memory,
        cpus=cpus,
        pids=pids,
        timeout=timeout,
        environment=env or [],
        directory=workdir,
        as_json=json,
    )


app.add_typer(image_app.app, name="image")
app.add_typer(process_app.app, name="process")
app.add_typer(vps_app.app, name="vps")


@app.command("doctor")
def doctor_command(json: JsonOption = False) -> Action:
    """Show what works on this host, how fast it really is, and what to do about the rest."""
    from polyvisor.cli.doctor_command import examine

    return lambda: examine(as_json=json)


class Access(StrEnum):
    """--access's choices."""

    read = "read"
    write = "write"
    execute = "execute"


@app.command("walk", epilog=_WALK_EPILOG)
def walk_command(
    image: Annotated[Path, typer.Argument(help="A raw image of physical memory.", metavar="IMAGE")],
    cr3: Annotated[
        str, typer.Option(help="Where the tables begin, as in register CR3.", metavar="ADDRESS")
    ],
    addresses: Annotated[
        list[str] | None,
        typer.Argument(help="Guest-virtual addresses, as 0x... or decimal.", metavar="[GVA]..."),
    ] = None,
    paging: Annotated[
        str,
        typer.Option(help="The tables' format: 32-bit, pae, 4-level or 5-level.", metavar="FORMAT"),
    ] = "4-level",
    access: Annotated[Access, typer.Option(help="What the address is accessed for.")] = Access.read,
    user: Annotated[bool, typer.Option("--user", help="Access it as a user program does.")] = False,
    ranges: Annotated[
        bool, typer.Option("--ranges", help="List everything that is mapped, joined.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--map", help="Draw the address space: an .svg or .png.", metavar="FILE"),
    ] = None,
    base: Annotated[
        str, typer.Option(help="The physical address of the image's first byte.", metavar="ADDRESS")
    ] = "0",
    maxphyaddr: Annotated[
        int | None,
        typer.Option(help="Physical address bits of the processor (46).", metavar="BITS"),
    ] = None,
    json: JsonOption = False,
) -> Action:
    """Translate virtual addresses with the page tables in a memory image, showing every step.

    Changes nothing in the image.
    """
    from polyvisor.cli.walk_command import walk

    return lambda: walk(
        image,
        addresses or [],
        cr3=cr3,
        paging=paging,
        base=base,
        maxphyaddr=maxphyaddr,
        access=access.value,
        user=user,
        ranges=ranges,
        picture=picture,
        as_json=json,
    )
