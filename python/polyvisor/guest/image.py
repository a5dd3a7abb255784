"""`exec` in the system on a disk image: boots it, and has its agent run the command."""

from __future__ import annotations

import contextlib
import os
import time

from polyvisor.errors import GuestError, MachineTimeout
from polyvisor.guest.command import CommandFailed, Completed
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from polyvisor.guest.agent import Agent, Process, Ran
    from polyvisor.images import packages
    from polyvisor.images.bootable import Bootable
    from polyvisor.machine import Machine

#: Seconds that a guest may take to its agent, to a network, and to switch itself off.
_BOOT, _NETWORK, _POWER_OFF = 300.0, 60.0, 60.0
#: From one look to the next, at what the caller wants done meanwhile.
_IDLE, _AGENT = 0.1, 1.0
_NET, _VSOCK = 1, 19  # virtio device types (virtio 1.2, 5)


class Job(Record, kw_only=True):
    """What to run, and how: the arguments of `exec` that are left when there is a machine."""

    argv: Sequence[str]
    image: str | os.PathLike[str]
    write: bool
    append: str
    files: Mapping[str, bytes]
    timeout: float | None
    #: Arguments of `Agent.start`.
    start: dict[str, Any]
    on_machine: Callable[[Machine], object] | None
    on_start: Callable[[Machine, Remote], object] | None
    on_idle: Callable[[], object] | None
    progress: packages.Progress | None
    statistics: bool
    check: bool


class Remote:
    """The command's other end, before there is one and after: what `on_start` gets."""

    def __init__(self) -> None:
        self.process: Process | None = None

    def signal(self, number: int) -> None:
        """Sends the command a signal, once it runs."""
        if self.process is not None:
            self.process.signal(number)

    def resize(self, rows: int, columns: int) -> None:
        """Tells the command's terminal its size."""
        if self.process is not None:
            self.process.resize(rows, columns)


def run(job: Job, machine: Machine) -> Completed:
    """Boots the image in a machine that has been made and has nothing in it, runs the command, and
    switches the machine off. Raises what `exec` raises."""
    from polyvisor.images import bootable

    started, cpu_started = time.monotonic(), time.process_time()
    report = job.progress or (lambda text: None)
    found = bootable.find(job.image)
    machine.add_disk(job.image, snapshot=not job.write)
    if job.on_machine is not None:
        job.on_machine(machine)
    devices = {place.type for place in machine.native.virtio_places()}
    if _VSOCK not in devices:
        machine.add_vsock()
    machine.load(found.fast_kernel(), found.initrd, f"{found.cmdline} quiet {job.append}".strip())
    remote = Remote()
    report("booting the image")
    machine.start()
    if job.on_start is not None:
        job.on_start(machine, remote)
    deadline = None if job.timeout is None else started + job.timeout
    agent = _agent(machine, found, deadline, job)
    for path, data in job.files.items():
        agent.write_file("/" + path.lstrip("/"), data, mode=0o755)
    _wait_for_system(agent, network=_NET in devices)
    ready_at, ready_cpu = time.monotonic(), time.process_time()
    report("")
    with agent.start(job.argv, **job.start) as process:
        remote.process = process
        try:
            ran = _wait(process, deadline, job)
        finally:
            remote.process = None
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    if job.write:
        _power_off(machine, agent)
    elif job.statistics:
        machine.native.stop()  # some engines tell all of it only then
    completed = Completed(
        argv=ran.argv,
        status=ran.status,
        signal=ran.signal,
        stdout=ran.stdout,
        stderr=ran.stderr,
        console=machine.console.transcript,
        engine=machine.engine,
        boot_seconds=ready_at - started,
        seconds=seconds,
        boot_cpu_seconds=ready_cpu - cpu_started,
        cpu_seconds=cpu_seconds,
        statistics=machine.statistics() if job.statistics else None,
    )
    if job.check and completed.status:
        raise CommandFailed(
            f"{completed.argv[0]} ended with status {completed.status}",
            completed=completed,
            tail=completed.console[-2000:],
        )
    return completed


def _agent(machine: Machine, found: Bootable, deadline: float | None, job: Job) -> Agent:
    """Waits until the agent answers, with `on_idle` called meanwhile."""
    limit = time.monotonic() + _BOOT if deadline is None else deadline
    while True:
        try:
            return machine.agent(timeout=max(min(_AGENT, limit - time.monotonic()), 0.001))
        except MachineTimeout:
            if job.on_idle is not None:
                job.on_idle()
            if time.monotonic() < limit:
                continue
            if deadline is not None:
                assert job.timeout is not None
                raise _timeout(job.timeout, "get as far as its agent") from None
            hint = "" if found.ours else "; was it built by `polyvisor image build`?"
            raise GuestError(
                f"no agent answers in the guest on {os.fspath(job.image)} after {_BOOT:g} s{hint}",
                reason="agent",
                tail=machine.console.tail(),
            ) from None


def _wait_for_system(agent: Agent, network: bool) -> None:
    """Until systemd has everything ready that services expect, and with `network` an address. The
    agent is up long before, and a command need not wait for the services themselves."""
    online = "/lib/systemd/systemd-networkd-wait-online"
    script = "systemctl start basic.target"
    if network:
        script += f"; test -x {online} && {online} --any --timeout={_NETWORK:.0f}"
    agent.exec(["/bin/sh", "-c", script], timeout=_BOOT)


def _wait(process: Process, deadline: float | None, job: Job) -> Ran:
    while True:
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            assert job.timeout is not None
            raise _timeout(job.timeout, "end")
        left = None if deadline is None else deadline - now
        pause = left if job.on_idle is None else _IDLE if left is None else min(_IDLE, left)
        try:
            return process.wait(pause)
        except TimeoutError:
            if job.on_idle is not None:
                job.on_idle()


def _power_off(machine: Machine, agent: Agent) -> None:
    """So that everything written is in the image. What still runs is killed, not stopped."""
    with contextlib.suppress(GuestError):  # it may be faster than its answer
        agent.exec(["systemctl", "--force", "poweroff"], timeout=_POWER_OFF)
    if machine.wait(_POWER_OFF) is None:
        raise GuestError(
            f"the guest did not switch itself off within {_POWER_OFF:g} s; the image is as after a "
            f"power failure",
            reason="power-off",
            tail=machine.console.tail(),
        )


def _timeout(seconds: float, what: str) -> MachineTimeout:
    return MachineTimeout(
        f"the guest did not {what} within {seconds:g} s and was stopped", seconds=seconds
    )


__all__ = ["Job", "Remote", "run"]
