"""A VPS as processes: what `start` makes of a configuration, and how it all ends.

Names of what is made outside of the VPS's directory (cgroup, network interfaces) come from its
number, so that everything can be found and removed when nobody lived to write down what was made.
Until go() the launcher's child ends with its parent; its process id is in state.json before that.
So at no moment there is a process that state.json does not know and that goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

from polyvisor import _native
from polyvisor.errors import HostError
from polyvisor.vps import files, kernel, layers
from polyvisor.vps.limits import Cgroup, Limits
from polyvisor.vps.store import UID_BASE, UID_COUNT, Config, State, write

#: Seconds in which everything in a cgroup must be dead once it was killed.
_KILL_SECONDS = 20.0

#: CLONE_NEW* of namespaces(7): all eight, and that of the network.
_NAMESPACES, _NEW_NETWORK = 0x7E020080, 0x40000000
#: capabilities(7), all of them in the VPS's own user namespace. Every VPS: chown, dac_override,
#: fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, sys_boot,
#: mknod, lease, audit_write, setfcap.
_CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 22, 27, 28, 29, 31)
#: With an init of its own also what that needs to make mounts, networks and namespaces in it:
#: dac_read_search, linux_immutable, net_broadcast, net_admin, ipc_lock, ipc_owner, sys_ptrace,
#: sys_admin, sys_nice, sys_resource, sys_tty_config, audit_control.
_INIT_CAPABILITIES = (2, 9, 11, 12, 14, 15, 19, 21, 23, 24, 26, 30)

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    # systemd.io/CONTAINER_INTERFACE: what runs there is told that it is in no machine of its own.
    "container": "polyvisor",
}


def cgroup_name(config: Config) -> str:
    """Of the VPS's cgroup in every hierarchy."""
    return f"vps-{config.id}"


def find_cgroup(config: Config) -> Cgroup | None:
    """The VPS's cgroup, None when there is none."""
    try:
        return Cgroup.open(cgroup_name(config))
    except HostError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def id_maps(config: Config) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """The VPS's user and group ids on the host: (inside, outside, count)."""
    if os.geteuid() == 0:
        range_ = [(0, UID_BASE + config.id * UID_COUNT, UID_COUNT)]
        return range_, range_
    return files.id_map("uid"), files.id_map("gid")


def find(state: State | None) -> kernel.Handle | None:
    """The running init of a VPS, None when there is none (any more)."""
    if state is None or state.boot != kernel.boot_id():
        return None
    return kernel.Handle.open(state.pid, state.start_time)


def launch(place: Path, config: Config, before: State | None = None) -> State:
    """Starts a VPS whose leftovers were released; again, after it was as `before`. When it raises,
    nothing is left, but state.json if it was there before."""
    from polyvisor.vps import network

    limits = Limits(**config.limits)
    net = network.Network(**config.network) if config.network else None
    state = State(boot=kernel.boot_id(), wanted=True)
    state.restarts = before.restarts + 1 if before else 0
    cgroup = Cgroup.create(cgroup_name(config), limits)
    launched = None
    try:
        uid_map, _ = id_maps(config)
        if config.own_init:
            cgroup.delegate(uid_map[0][1], uid_map[0][1])
        spec = _spec(place, config, cgroup, limits, net)
        launched = _native.launch(spec)
        state.pid, state.start_time = launched.pid, kernel.start_time(launched.pid)
        state.started = time.time()
        if net is not None and net.mode != "none":
            namespace = launched.namespace("net") if net.mode != "host" else -1
            try:
                state.network = network.connect(
                    config.name, config.id, namespace, net, cgroup=cgroup.unified
                )
            finally:
                if namespace >= 0:
                    os.close(namespace)
        write(place / "state.json", state, durable=False)
        launched.go()
    except BaseException:
        if launched is not None:
            launched.kill()
        release(place, config, state, keep=before is not None)
        raise
    finally:
        if launched is not None:
            launched.close()
    return state


def release(place: Path, config: Config, state: State | None, *, keep: bool = False) -> None:
    """Ends every process of a VPS for certain, and removes what was made for it on the host; with
    `keep` all but state.json. May be called at any time, and again."""
    cgroup = find_cgroup(config)
    if cgroup is not None:
        cgroup.kill(_KILL_SECONDS)
        cgroup.remove()
    handle = find(state)
    if handle is not None:  # there is no cgroup: the pid namespace dies with its init
        with handle:
            handle.signal(9)
            if not handle.wait(_KILL_SECONDS):
                raise HostError(
                    f"process {state.pid if state else 0} of VPS {config.name} was killed and does "
                    f"not end; what does it wait for in the kernel?"
                )
    if state is not None and state.pid:
        # It may be our own child: then nobody else takes its exit status.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(state.pid, os.WNOHANG)
    if config.network:
        from polyvisor.vps import network

        network.disconnect((state.network if state else None) or {"id": config.id})
    shutil.rmtree(_views(place, config), ignore_errors=True)
    (place / "frozen").unlink(missing_ok=True)
    if not keep:
        (place / "state.json").unlink(missing_ok=True)


def _views(place: Path, config: Config) -> Path:
    """Where the files are that a VPS sees in /proc: its root, which is another user on the host,
    must be able to get there."""
    if os.geteuid() == 0:
        return Path("/run/polyvisor/views") / str(config.id)
    return place / "views"


def refresh_views(place: Path, config: Config, limits: Limits, cgroup: Cgroup) -> None:
    """What a VPS that runs sees in /proc agrees with these limits, if it was given files for it."""
    from polyvisor.vps import views

    folder = _views(place, config)
    if folder.is_dir() and any(folder.iterdir()):
        views.refresh(limits, cgroup.stats(), folder)


def _spec(
    place: Path, config: Config, cgroup: Cgroup, limits: Limits, net: Any
) -> _native.LaunchSpec:
    from polyvisor.vps import views

    uid_map, gid_map = id_maps(config)
    mount = _native.Mount
    mounts = [
        mount("proc", target="/proc"),
        mount("sysfs", target="/sys", read_only=True),
        mount("dev", target="/dev"),
        mount("mqueue", target="/dev/mqueue"),
        mount("tmpfs", target="/run", nosuid=True, nodev=True, options="mode=755"),
    ]
    if config.own_init:
        mounts += _cgroup_mounts()
    folder = _views(place, config)
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    mounts += views.mounts(limits, folder)
    options: dict[str, Any] = {}
    if net is not None and net.mode == "host":
        options["namespaces"] = _NAMESPACES & ~_NEW_NETWORK
    return _native.LaunchSpec(
        argv=config.init,
        env=[f"{name}={value}" for name, value in ENVIRONMENT.items()],
        lower=layers.lower(place, config.lower),
        upper=str(place / "files/upper"),
        work=str(place / "files/work"),
        idmapped=os.geteuid() == 0,
        mounts=mounts,
        uid_map=uid_map,
        gid_map=gid_map,
        hostname=config.hostname,
        cgroups=cgroup.fds(),
        init=not config.own_init,
        detached=True,
        **_rights(config),
        **options,
    )


def attach(
    handle: kernel.Handle,
    config: Config,
    argv: list[str],
    env: dict[str, str],
    *,
    cwd: str,
    uid: int,
    gid: int,
    stdio: tuple[int, int, int] | None,
) -> _native.Launched:
    """Starts a command in a running VPS, in its cgroups, with its rights; `stdio` None: on a
    terminal of its own."""
    cgroup = find_cgroup(config)
    stdin, stdout, stderr = stdio or (None, None, None)
    spec = _native.LaunchSpec(
        argv=argv,
        env=[f"{name}={value}" for name, value in env.items()],
        cwd=cwd,
        uid=uid,
        gid=gid,
        cgroups=cgroup.fds() if cgroup else [],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        terminal=stdio is None,
        **_rights(config),
    )
    launched = _native.attach(handle.descriptor, spec)
    try:
        launched.go()
    except BaseException:
        launched.close()
        raise
    return launched


def _rights(config: Config) -> dict[str, Any]:
    """What the programs of a VPS may: systemd and its like mount file systems, and make namespaces
    of their own."""
    allowed = _CAPABILITIES + (_INIT_CAPABILITIES if config.own_init else ())
    return {
        "capabilities": sum(1 << number for number in allowed),
        "no_new_privs": False,  # su and ping are programs that get privileges
        "seccomp": "system" if config.own_init else "default",
    }


def _cgroup_mounts() -> list[_native.Mount]:
    """Where an init finds the cgroups that it may make groups of its own in."""
    mount = _native.Mount
    unified = Path("/sys/fs/cgroup/cgroup.controllers")
    if unified.exists():
        return [mount("cgroup2", target="/sys/fs/cgroup")]
    return [
        mount("tmpfs", target="/sys/fs/cgroup", nosuid=True, nodev=True, options="mode=755"),
        mount("cgroup", target="/sys/fs/cgroup/systemd", options="none,name=systemd"),
    ]


__all__ = ["ENVIRONMENT", "attach", "cgroup_name", "find", "id_maps", "launch", "release"]
