"""`exec`: boot the distribution's kernel with a small user space and run one command in it.

The command's stdin, stdout and stderr go over the machine's second serial port (channel.py); the
first is the guest's console, which is shown only when something went wrong.
"""

from __future__ import annotations

import os
import time

from polyvisor.errors import ConfigError, GuestError, ImageError, MachineTimeout
from polyvisor.guest.channel import Channel, Ended, NotRun, Output, Ready
from polyvisor.guest.feeder import Feeder
from polyvisor.images import initramfs, vmlinux
from polyvisor.images import kernel as kernels
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import IO, Any

    from polyvisor.guest.agent import Ran
    from polyvisor.guest.image import Remote
    from polyvisor.images import modules as modules_
    from polyvisor.images import packages
    from polyvisor.machine import ExitInfo, Machine

    Stdin = bytes | str | int | IO[bytes] | None
    Sink = Callable[[bytes], object]

#: What exec adds to the kernel's command line, in front of the caller's own. docs/exec.md says why
#: for each.
DEFAULT_CMDLINE = "console=ttyS0 quiet panic=-1 cryptomgr.notests tsc=reliable"

_PANIC = "Kernel panic - not syncing:"
_PANIC_END = b"---[ end Kernel panic"
#: Seconds from one call of `on_idle` to the next, and from one look for a panic to the next. Ctrl-C
#: ends a wait within. Each takes of the guest's time where there is but one CPU.
_IDLE, _LOOK = 0.1, 0.5


class GuestPanic(GuestError):
    """The guest's kernel panicked; `text` is what it said, `tail` the console's end."""

    def __init__(self, message: str, *, text: str = "", tail: str = "") -> None:
        super().__init__(message, reason="panic", tail=tail)
        self.text = text


class CommandNotRun(GuestError):
    """The guest could not start the command: `errno` is Linux's, `status` what a shell would make
    of it (127: not found, 126: not executable), `stage` "exec", "directory", "start", or "module"
    when the kernel refused one of `modules`."""

    def __init__(
        self, message: str, *, errno: int, status: int, stage: str, tail: str = ""
    ) -> None:
        super().__init__(message, reason="not-run", tail=tail)
        self.errno = errno
        self.status = status
        self.stage = stage


class CommandFailed(GuestError):
    """With ``check=True``: the command ended with a status other than 0. `completed` has it all."""

    def __init__(self, message: str, *, completed: Completed | Ran, tail: str = "") -> None:
        super().__init__(message, reason="status", tail=tail)
        self.completed = completed


class Completed(Record):
    """How a command ended."""

    argv: tuple[str, ...]
    #: The command's own exit status; 128 + n when signal n killed it.
    status: int
    #: The signal that killed it, 0 for none.
    signal: int
    #: What it wrote (b"" when it went to a callback).
    stdout: bytes
    stderr: bytes
    #: What the guest's kernel said on its console.
    console: str
    engine: str
    #: Seconds from the call to when init was ready to run the command, and to the command's end.
    boot_seconds: float
    seconds: float
    #: Host CPU seconds of this process meanwhile, to init and to the end.
    boot_cpu_seconds: float
    cpu_seconds: float
    #: With ``statistics=True``: what the machine counted (see `polyvisor.statistics`).
    statistics: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """`stdout` as text."""
        return self.stdout.decode("utf-8", "replace")


def exec(  # noqa: A001
    argv: Sequence[str],
    *,
    engine: str = "auto",
    irqchip: str = "auto",
    memory: int | str = "512M",
    cpus: int = 1,
    timeout: float | None = None,
    stdin: Stdin = None,
    env: Mapping[str, str | None] | None = None,
    cwd: str = "/root",
    tty: tuple[int, int] | None = None,
    files: Mapping[str, bytes] | None = None,
    kernel: str | os.PathLike[str] = "cloud",
    append: str = "",
    modules: Sequence[str] = (),
    on_machine: Callable[[Machine], object] | None = None,
    image: str | os.PathLike[str] | None = None,
    write: bool = False,
    on_stdout: Sink | None = None,
    on_stderr: Sink | None = None,
    on_start: Callable[[Machine, Channel | Remote], object] | None = None,
    on_idle: Callable[[], object] | None = None,
    progress: packages.Progress | None = None,
    statistics: bool = False,
    check: bool = False,
) -> Completed:
    """Runs `argv` as root in a fresh virtual machine and waits for its end.

    `stdin` is bytes or text, a file descriptor or binary file that is read as the command reads, or
    None for an empty one. Output is collected, or given to `on_stdout` and `on_stderr` as it comes.
    `env` is added to a usual environment (None removes a variable), `files` to the guest's root.
    `tty` (rows, columns) runs the command on a terminal of that size. `kernel` is a name ("cloud",
    "generic", "686") or a file; `append` is added to its command line. `modules` are modules of
    a kernel with a name that are loaded, with what they need, before the command runs. `on_machine`
    gets the machine before anything is loaded into it, to add devices; their drivers are loaded
    too. With `image` the command runs in the system on that disk image, which stays as it is unless
    `write` is True (see docs/images.md). `on_start` gets the machine,
    just started, and the channel (to send signals). `on_idle` is called at least every 0.1 s or so,
    with the channel free to use. `progress` is told what takes long, and "" when the command runs.
    With `statistics` the result has what the machine counted until the command's end.

    Raises `CommandNotRun` when the guest has no such program, `GuestPanic` or `GuestError` when the
    guest does not survive, `MachineTimeout` after `timeout` seconds, with ``check``
    `CommandFailed`, and `ImageError`, `ConfigError`, `EngineUnavailable` for what keeps it from
    starting. Whatever happens, the machine is gone when it returns.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    if isinstance(argv, str):
        raise ConfigError('argv must be a list of strings, such as ["ls", "-l"]', field="argv")
    if timeout is not None and timeout <= 0:
        raise ConfigError(f"timeout must be more than 0 seconds, not {timeout:g}", field="timeout")
    command = initramfs.Command(
        [os.fspath(argument) for argument in argv], env or {}, cwd, terminal=tty is not None
    )
    initramfs.encode(command)  # complains before anything is downloaded or allocated
    from polyvisor.machine import Machine

    report = progress or (lambda text: None)
    if image is not None:
        if modules or kernel != "cloud":
            raise ConfigError(
                "an image boots its own kernel, with its own modules; leave kernel and modules out",
                field="kernel",
            )
        from polyvisor.guest.image import Job
        from polyvisor.guest.image import run as run_on_image

        job = Job(
            argv=command.arguments,
            image=image,
            write=write,
            append=append,
            files=files or {},
            timeout=timeout,
            start={
                "stdin": stdin,
                "env": env,
                "cwd": cwd,
                "tty": tty,
                "on_stdout": on_stdout,
                "on_stderr": on_stderr,
            },
            on_machine=on_machine,
            on_start=on_start,
            on_idle=on_idle,
            progress=progress,
            statistics=statistics,
            check=check,
        )
        with Machine(
            memory=memory, cpus=cpus, engine=engine, irqchip=irqchip, name="exec"
        ) as machine:
            return run_on_image(job, machine)
    with Machine(
        memory=memory, cpus=cpus, engine=engine, irqchip=irqchip, serial_ports=2, name="exec"
    ) as machine:
        if on_machine is not None:
            on_machine(machine)
        loaded = _modules(machine, kernel, modules, progress) if on_machine or modules else []
        image, architecture = _kernel(kernel, progress)
        report("building the initramfs")
        initrd = initramfs.build(command, architecture=architecture, files=files, modules=loaded)
        _load(machine, image, initrd, f"{DEFAULT_CMDLINE} {append}".strip())
        del initrd
        run = _Run(machine, tuple(command.arguments), on_stdout, on_stderr)
        run.on_ready = lambda: report("")
        if tty is not None:
            run.channel.resize(*tty)
        run.port.flow_control()
        report("booting the guest")
        machine.start()
        if on_start is not None:
            on_start(machine, run.channel)
        feeder = Feeder(run.channel, stdin)
        try:
            outcome = run.wait(started, timeout, feeder, on_idle)
        finally:
            feeder.stop()
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
        if statistics:
            machine.native.stop()  # some engines tell all of it only then
        completed = Completed(
            argv=run.argv,
            status=128 + outcome.signal if outcome.signal else outcome.status,
            signal=outcome.signal,
            stdout=bytes(run.stdout),
            stderr=bytes(run.stderr),
            console=machine.console.transcript,
            engine=machine.engine,
            boot_seconds=run.ready_at - started,
            seconds=seconds,
            boot_cpu_seconds=run.ready_cpu - cpu_started,
            cpu_seconds=cpu_seconds,
            statistics=machine.statistics() if statistics else None,
        )
    if check and completed.status:
        raise CommandFailed(
            f"{completed.argv[0]} ended with status {completed.status}",
            completed=completed,
            tail=completed.console[-2000:],
        )
    return completed


class _Run:
    """One command in a machine that is running."""

    def __init__(
        self,
        machine: Machine,
        argv: tuple[str, ...],
        on_stdout: Sink | None,
        on_stderr: Sink | None,
    ) -> None:
        self.machine = machine
        self.argv = argv
        self.port = machine.serial(1)
        self.channel = Channel(self.port.send)
        self.stdout, self.stderr = bytearray(), bytearray()
        self.ready_at = self.ready_cpu = 0.0
        self._sinks = {
            "stdout": on_stdout or self.stdout.extend,
            "stderr": on_stderr or self.stderr.extend,
        }
        self.on_ready: Callable[[], object] = lambda: None
        self._panic_seen = 0

    def wait(
        self,
        started: float,
        timeout: float | None,
        feeder: Feeder,
        on_idle: Callable[[], object] | None,
    ) -> Ended:
        """Serves the command until it ended; raises when that will not happen."""
        deadline = None if timeout is None else started + timeout
        pause = _LOOK if on_idle is None else _IDLE
        while True:
            left = pause if deadline is None else min(pause, deadline - time.monotonic())
            data = self.port.read_bytes(timeout=max(left, 0))
            if data:
                with feeder.lock:
                    events = self.channel.receive(data)
                feeder.wake()
                for event in events:
                    if isinstance(event, Output):
                        self._sinks[event.stream](event.data)
                    elif isinstance(event, Ready):
                        self.ready_at, self.ready_cpu = time.monotonic(), time.process_time()
                        self.on_ready()
                    elif isinstance(event, Ended):
                        return event
                    elif isinstance(event, NotRun):
                        tail = self.machine.console.tail()
                        raise command_not_run(event, self.argv[0], tail)
            elif self.port.closed:
                self._ended_early()
            else:
                self._look_for_panic()
            if on_idle is not None:
                with feeder.lock:
                    on_idle()
            if deadline is not None and time.monotonic() >= deadline:
                assert timeout is not None
                what = "end" if self.ready_at else "get as far as init"
                raise MachineTimeout(
                    f"the guest did not {what} within {timeout:g} s and was stopped"
                    + ("" if self.ready_at else "; --timeout gives it longer"),
                    seconds=timeout,
                )

    def _ended_early(self) -> None:
        """The machine ended and the command did not: finds the reason to raise."""
        info = self.machine.wait(1.0)  # raises DeviceError when that was it
        raise guest_failure(info, self.machine.console.transcript)

    def _look_for_panic(self) -> None:
        """A kernel that was told to stay after a panic (panic=0) never ends by itself."""
        text = self.machine.console.transcript_bytes
        if len(text) != self._panic_seen:
            self._panic_seen = len(text)
            if _PANIC_END in text:
                raise guest_failure(None, text.decode("utf-8", "replace"))


def command_not_run(event: NotRun, name: str, tail: str) -> CommandNotRun:
    """The exception for a command `name` that the guest could not start."""
    reason = os.strerror(event.errno)
    if event.stage == "exec" and event.errno == 2:
        status, message = 127, f"{name}: there is no such command in the guest"
    elif event.stage == "exec":
        status, message = 126, f"{name}: the guest cannot execute it: {reason}"
    elif event.stage == "module":
        name = os.path.basename(event.module)
        status, message = 125, f"the guest's kernel does not load {name}: {reason}"
    elif event.stage == "directory":
        status, message = 126, f"the guest cannot start {name} in its directory: {reason}"
    else:
        status, message = 126, f"the guest cannot start a process: {reason}"
    return CommandNotRun(message, errno=event.errno, status=status, stage=event.stage, tail=tail)


def guest_failure(info: ExitInfo | None, transcript: str) -> GuestError:
    """The exception for a guest that ended before its time, from its end and its console."""
    tail = transcript[-2000:]
    panic = transcript.find(_PANIC)
    if panic >= 0:
        text = (transcript[panic + len(_PANIC) :].splitlines() or [""])[0].strip()
        # What led to it, and all it says, however long its trace is.
        begin = transcript.rfind("\n", 0, max(0, panic - 500)) + 1
        tail = transcript[begin : begin + 4500]
        return GuestPanic(f"the guest's kernel panicked: {text}", text=text, tail=tail)
    how = {
        "power_off": "switched itself off",
        "reset": "reset itself",
        "triple_fault": "crashed (triple fault)",
        "halted": "halted for good",
        "stopped": "was stopped",
        "debug_exit": "ended by its debug-exit port",
    }
    reason = info.reason if info is not None else "ended"
    detail = f" ({info.detail})" if info is not None and info.detail else ""
    return GuestError(
        f"the guest {how.get(reason, reason.replace('_', ' '))}{detail} before the command ended",
        reason=reason,
        tail=tail,
    )


def _kernel(
    given: str | os.PathLike[str], progress: packages.Progress | None
) -> tuple[str, initramfs.Architecture]:
    """The kernel file, and which programs it runs."""
    if isinstance(given, str) and given in kernels.NAMES:
        found = kernels.fetch(given, progress=progress)
        try:
            # Unpacked once here, instead of by the guest's own first instructions each time.
            return vmlinux.cached_path(found.image_path), found.architecture
        except ImageError:  # a compression for which this Python has no library
            return found.image_path, found.architecture
    from polyvisor import boot

    path = os.fspath(given)
    if isinstance(given, str) and "/" not in given and not os.path.exists(path):
        raise ConfigError(
            f"there is no kernel called {given!r}; choose one of {', '.join(kernels.NAMES)}, or "
            f"give a file",
            field="kernel",
        )
    return path, "amd64" if boot.is_64bit(boot.read_file(path, "kernel"), path) else "i386"


def _modules(
    machine: Machine,
    kernel: str | os.PathLike[str],
    names: Sequence[str],
    progress: packages.Progress | None,
) -> list[modules_.Module]:
    """What to load, in its order: the drivers of the machine's virtio devices, and `names`."""
    from polyvisor.images import modules

    if isinstance(names, str):
        raise ConfigError(
            'modules must be a list of names, such as ["virtio_blk"]', field="modules"
        )
    if not isinstance(kernel, str) or kernel not in kernels.NAMES:
        if not names:  # a kernel of the user's own may have the drivers built in
            return []
        raise ConfigError(
            f"modules are known for the kernels {', '.join(kernels.NAMES)} only, not for "
            f"{os.fspath(kernel)!r}",
            field="modules",
        )
    wanted = [*modules.drivers(machine), *names]
    return modules.fetch(kernel, progress=progress)[1].closure(wanted) if wanted else []


def _load(machine: Machine, image: str, initrd: bytes, cmdline: str) -> None:
    from polyvisor import boot

    boot.load(machine, image, initrd, cmdline)
