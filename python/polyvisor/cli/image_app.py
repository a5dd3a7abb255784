"""`polyvisor image` and its options; what its commands do is in `image_command`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_BUILD_EPILOG = """
Examples:

  polyvisor image build debian --size 1G -o debian.img

  polyvisor image build debian --suite trixie --package git --package gcc --size 2G -o dev.img

  polyvisor image build debian -o web.img --hostname web --ssh-key ~/.ssh/id_ed25519.pub

Needs mmdebstrap and e2fsprogs, and root or user namespaces (package uidmap); nothing is mounted.
Exit status: 0; 2 for options that make no sense, 125 when it failed, and then no file is left.
"""
_INFO_EPILOG = """
Examples:

  polyvisor image info debian.img

  polyvisor image info debian-12-genericcloud-amd64.qcow2 --json

Exit status: 0; 125 when the image cannot be read, or has no kernel to boot.
"""
_REMOVE_EPILOG = """
Examples:

  polyvisor image remove rootfs/1-bookworm-0123456789abcdef

  polyvisor image remove --all

Exit status: 0; 125 when there is no such entry, and then nothing is removed.
"""

app = typer.Typer(
    help="Build disk images with a complete Debian, and look at them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Action = Callable[[], int]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


class Distribution(StrEnum):
    """What can be built."""

    debian = "debian"


@app.command("build", epilog=_BUILD_EPILOG)
def build_command(
    distribution: Annotated[Distribution, typer.Argument(help="What to build.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The image's file.", metavar="FILE")
    ],
    size: Annotated[
        str, typer.Option(help="The file system's size: K, M, G or T.", metavar="SIZE")
    ] = "1G",
    suite: Annotated[
        str, typer.Option(help="The release: bookworm, trixie, sid.", metavar="NAME")
    ] = "bookworm",
    package: Annotated[
        list[str] | None,
        typer.Option("--package", "-p", help="A package to install; repeat it.", metavar="NAME"),
    ] = None,
    hostname: Annotated[str, typer.Option(help="The host's name.", metavar="NAME")] = "debian",
    root_password: Annotated[
        str | None,
        typer.Option(
            help="Root's password; - reads it from stdin. Without, the console asks for none.",
            metavar="TEXT",
        ),
    ] = None,
    ssh_key: Annotated[
        list[Path] | None,
        typer.Option(
            help="A public key that logs in as root; repeat it. Without, ~/.ssh/id_*.pub.",
            metavar="FILE",
        ),
    ] = None,
    autologin: Annotated[
        bool, typer.Option("--autologin", help="No login on the console: root's shell at once.")
    ] = False,
    mirror: Annotated[
        str, typer.Option(help="The archive to take packages from.", metavar="URL")
    ] = "",
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Get the present packages, not those in the cache.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    json: JsonOption = False,
) -> Action:
    """Build a disk image with a complete Debian: systemd, login, ssh, network.

    The packages are kept in the cache, so that the next image with the same ones takes seconds.
    """
    del distribution  # there is but one
    from polyvisor.cli import image_command

    return lambda: image_command.build(
        as_json=json,
        password=root_password,
        output=output,
        size=size,
        suite=suite,
        packages=package or [],
        hostname=hostname,
        ssh_keys=ssh_key,
        autologin=autologin,
        mirror=mirror,
        refresh=refresh,
        force=force,
    )


@app.command("info", epilog=_INFO_EPILOG)
def info_command(
    image: Annotated[Path, typer.Argument(help="A disk image.", metavar="IMAGE")],
    format: Annotated[  # noqa: A002 -- the option's name
        str | None,
        typer.Option(
            help="Its format, when its name does not say: raw, qcow2, ...", metavar="NAME"
        ),
    ] = None,
    json: JsonOption = False,
) -> Action:
    """Say what is in a disk image, and which kernel it boots."""
    from polyvisor.cli import image_command

    return lambda: image_command.info(image, format, as_json=json)


@app.command("list")
def list_command(json: JsonOption = False) -> Action:
    """List what is in the cache: kernels, root file systems, and what was made of them."""
    from polyvisor.cli import image_command

    return lambda: image_command.list_cache(as_json=json)


@app.command("remove", epilog=_REMOVE_EPILOG)
def remove_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="As `image list` shows them.", metavar="[NAME]...")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
) -> Action:
    """Remove entries from the cache. They are fetched or made again when they are needed."""
    from polyvisor.cli import image_command

    return lambda: image_command.remove(names or [], everything=everything)
