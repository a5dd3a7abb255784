"""`polyvisor vps`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from polyvisor.cli import output, status
from polyvisor.cli.arguments import variable
from polyvisor.config import show_size
from polyvisor.errors import ConfigError, Error, HostError, ProcessTimeout
from polyvisor.vps.bases import Base, Bases
from polyvisor.vps.context import Vps
from polyvisor.vps.store import Store

#: VPSs that are started or stopped at a time: most of that is waiting, for them or for the kernel.
_AT_ONCE = 8


def create(name: str, *, as_json: bool, **options: Any) -> int:
    """Makes a VPS, and its base if that is not there yet."""
    vps = _with_progress(lambda progress: Vps.create(name, progress=progress, **options))
    if as_json:
        output.write_json(msgspec.to_builtins(vps.info()))
    return status.OK


def start(
    names: list[str],
    *,
    everything: bool,
    limits: dict[str, str],
    net: list[str],
    bridge: str | None,
    publish: list[str],
    restart: str | None,
    as_json: bool,
) -> int:
    """Starts VPSs; what is not given is as it was the last time."""
    network = _network(net, bridge, publish)
    chosen = _chosen(names, everything)
    if network is not None and len(chosen) > 1 and net not in (["none"], ["host"]):
        raise ConfigError("two VPSs cannot have one address; start them one by one", field="net")

    def one(vps: Vps) -> None:
        wanted = _parsed(vps.config.limits, limits) if limits else None
        vps.start(limits=wanted, network=network, restart=restart)

    code = _each(chosen, one, "starting")
    if as_json:
        output.write_all(1, msgspec.json.encode([vps.info() for vps in chosen]) + b"\n")
    return code


def execute(
    words: list[str],
    *,
    environment: list[str],
    directory: str,
    user: str,
    terminal: bool,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Runs a command; its standard files are ours, or with --json members of the result."""
    name, *command = words
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        raise ConfigError(f"give a command to run in {name}", field="command")
    uid, gid = _user(user)
    options: dict[str, Any] = {
        "env": dict(variable(text) for text in environment),
        "cwd": directory,
        "uid": uid,
        "gid": gid,
        "timeout": timeout,
    }
    vps = Vps(name)
    try:
        if as_json:
            result = vps.exec(command, **options)
            output.write_json(
                {
                    "argv": command,
                    "status": result.status,
                    **output.as_json("stdout", result.stdout),
                    **output.as_json("stderr", result.stderr),
                }
            )
            return result.status
        if terminal:
            options["env"].setdefault("TERM", os.environ.get("TERM", "vt100"))
        return vps.run(command, terminal=terminal, **options)
    except ProcessTimeout as error:
        status.say(str(error))
        return status.TIMEOUT
    except HostError as error:
        status.say(str(error))
        return status.of_execution(error)


def enter(name: str, *, user: str) -> int:
    """A login shell."""
    uid, gid = _user(user)
    return Vps(name).enter(uid=uid, gid=gid)


def list_all(*, as_json: bool) -> int:
    """Lists all VPSs."""
    from polyvisor.vps import monitor

    vpss = Vps.all()
    for vps in vpss:
        vps.tidy()
    if vpss:
        monitor.ensure(Store())
    found = [vps.info() for vps in vpss]
    if as_json:
        output.write_all(1, msgspec.json.encode(found) + b"\n")
        return status.OK
    rows = [("NAME", "ID", "STATUS", "PID", "UP", "BASE", "ADDRESSES")]
    for info in found:
        rows.append(
            (
                info.name,
                str(info.id),
                info.status,
                str(info.pid or "-"),
                _duration(time.time() - info.started) if info.started else "-",
                info.base,
                ",".join(info.addresses) or "-",
            )
        )
    _write_table(rows)
    return status.OK


def stats(names: list[str], *, as_json: bool) -> int:
    """Shows what VPSs use."""
    chosen = [Vps(name) for name in names] or [vps for vps in Vps.all() if vps.status != "stopped"]
    found = [vps.stats() for vps in chosen]
    if as_json:
        output.write_all(1, msgspec.json.encode(found) + b"\n")
        return status.OK
    rows = [("NAME", "STATUS", "UP", "MEMORY", "PEAK", "CPU", "PIDS", "OOM", "DISK")]
    for one in found:
        group = one.cgroup
        rows.append(
            (
                one.name,
                one.status,
                _duration(one.uptime) if group else "-",
                _size(group.get("memory")),
                _size(group.get("memory_peak")),
                f"{group['cpu_seconds']:.2f}s" if group.get("cpu_seconds") is not None else "-",
                str(group.get("pids", "-")),
                str(group.get("oom_kills", "-")),
                _size(one.disk),
            )
        )
    _write_table(rows)
    return status.OK


def limit(name: str, limits: dict[str, str], *, as_json: bool) -> int:
    """Changes limits."""
    if not limits:
        raise ConfigError("give a limit to change, as --memory 512M", field="limits")
    vps = Vps(name)
    vps.limit(**_values(limits))
    if as_json:
        output.write_json(vps.config.limits)
    return status.OK


def snapshot(name: str, wanted: str, *, action: str, as_json: bool) -> int:
    """Takes, lists, restores or deletes snapshots."""
    vps = Vps(name)

    def act(progress: Callable[[str], None]) -> None:
        progress(f"copying the files of {name}")
        if action == "take":
            vps.snapshot(wanted)
        elif action == "restore":
            vps.restore(wanted)
        elif action == "delete":
            vps.drop_snapshot(wanted)

    _with_progress(act)
    found = vps.snapshots()
    if as_json:
        output.write_all(1, msgspec.json.encode(found) + b"\n")
    elif action == "list":
        _write_table(
            [
                ("SNAPSHOT", "TAKEN", "SIZE"),
                *(
                    (one.name, time.strftime("%F %T", time.localtime(one.created)), _size(one.size))
                    for one in found
                ),
            ]
        )
    return status.OK


def clone(name: str, new: str, *, snapshot: str | None, as_json: bool) -> int:
    """Makes a VPS with the files of another."""
    vps = Vps(name)

    def act(progress: Callable[[str], None]) -> Vps:
        progress(f"copying the files of {name}")
        return vps.clone(new, snapshot=snapshot)

    made: Vps = _with_progress(act)
    if as_json:
        output.write_json(msgspec.to_builtins(made.info()))
    return status.OK


def stop(names: list[str], *, everything: bool, grace: float) -> int:
    """Stops VPSs."""
    return _each(_chosen(names, everything), lambda vps: vps.stop(grace), "stopping")


def delete(names: list[str], *, force: bool) -> int:
    """Removes VPSs."""
    return _each([Vps(name) for name in names], lambda vps: vps.delete(force=force), "deleting")


def unify_all(*, as_json: bool) -> int:
    """Shares identical files among all VPSs."""
    from polyvisor.vps import sharing

    report = _with_progress(lambda progress: sharing.unify_all(Store(), progress))
    plain = msgspec.to_builtins(report)
    if as_json:
        output.write_json(plain)
    else:
        lines = [f"{name.replace('_', ' ')}: {value}" for name, value in plain.items()]
        output.write_all(1, ("\n".join(lines) + "\n").encode())
    return status.OK


def list_bases(*, as_json: bool) -> int:
    """Lists the bases in the store."""
    store = Bases(Store())
    found = [{**msgspec.to_builtins(base), "vps": store.users(base.path)} for base in store.all()]
    if as_json:
        output.write_all(1, msgspec.json.encode(found) + b"\n")
        return status.OK
    rows = [("BASE", "MADE OF", "SIZE", "VPS")]
    rows += [
        (base["name"], base["origin"], _size(base["size"]), str(len(base["vps"]))) for base in found
    ]
    _write_table(rows)
    return status.OK


def build_base(name: str, *, as_json: bool, **options: Any) -> int:
    """Builds a Debian."""
    return _made(
        _with_progress(lambda progress: Bases(Store()).build(name, progress=progress, **options)),
        as_json,
    )


def add_base(name: str, source: Path, *, as_json: bool) -> int:
    """Keeps a directory or a tar as a base."""
    return _made(
        _with_progress(lambda progress: Bases(Store()).add(name, source, progress)), as_json
    )


def remove_bases(names: list[str]) -> int:
    """Removes bases."""
    for name in names:
        Bases(Store()).remove(name)
    return status.OK


def _made(base: Base, as_json: bool) -> int:
    if as_json:
        output.write_json(msgspec.to_builtins(base))
    return status.OK


def _with_progress(action: Callable[[Callable[[str], None]], Any]) -> Any:
    progress = output.Progress()
    try:
        return action(progress)
    finally:
        progress("")


def _chosen(names: list[str], everything: bool) -> list[Vps]:
    if bool(names) == everything:
        raise ConfigError("give the names of VPSs, or --all", field="name")
    return Vps.all() if everything else [Vps(name) for name in names]


def _each(chosen: list[Vps], action: Callable[[Vps], object], what: str) -> int:
    """Does it to all, several at a time; one that fails does not keep the others from it."""
    from concurrent.futures import ThreadPoolExecutor

    failed = status.OK

    def all_of_them(progress: Callable[[str], None]) -> None:
        nonlocal failed
        progress(f"{what} {chosen[0].name if len(chosen) == 1 else f'{len(chosen)} VPSs'}")
        if len(chosen) == 1:
            action(chosen[0])
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for future in [pool.submit(action, vps) for vps in chosen]:
                try:
                    future.result()
                except Error as error:
                    failed = status.report(error)

    _with_progress(all_of_them)
    return failed


def _parsed(before: dict[str, Any], limits: dict[str, str]) -> Any:
    from polyvisor.vps.limits import Limits

    return Limits(**{**before, **_values(limits)})


def _values(limits: dict[str, str]) -> dict[str, Any]:
    """Limits as text with their types; sizes are parsed by `Limits`."""
    values: dict[str, Any] = {}
    for name, text in limits.items():
        if text == "none":
            values[name] = None
        elif name in ("cpus", "pids"):
            try:
                values[name] = float(text) if name == "cpus" else int(text)
            except ValueError:
                raise ConfigError(f"--{name} takes a number, not {text!r}", field=name) from None
        else:
            values[name] = text
    return values


def _network(net: list[str], bridge: str | None, publish: list[str]) -> Any:
    if not net and not publish and bridge is None:
        return None
    from polyvisor.vps.network import Network, parse_publish

    options: dict[str, Any] = {"publish": [parse_publish(text) for text in publish]}
    if bridge is not None:
        options["bridge"] = bridge
    if net[:1] in (["none"], ["host"]):
        return Network(mode=net[0], addresses=net[1:], **options)
    return Network(addresses=net, **options)


def _user(text: str) -> tuple[int, int]:
    uid, _, gid = text.partition(":")
    if not uid.isdigit() or not (gid or uid).isdigit():
        raise ConfigError(f"--user takes UID or UID:GID, not {text!r}", field="user")
    return int(uid), int(gid or uid)


def _write_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    output.write_all(1, ("\n".join(lines) + "\n").encode())


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    return show_size(-(-size // (1 << 20)) << 20) if size > 1 << 20 else show_size(size)


def _duration(seconds: float) -> str:
    whole = int(max(0.0, seconds))
    days, rest = divmod(whole, 86400)
    hours, minutes = rest // 3600, rest % 3600 // 60
    if days:
        return f"{days}d{hours}h"
    return f"{hours}h{minutes}m" if hours else f"{minutes}m{whole % 60}s"
