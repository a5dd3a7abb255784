"""`Process`: one Linux program in a machine of its own, without a kernel.

The program runs at user level in a vCPU. Each system call leaves the vCPU and is served here,
within what the program was given: a tree of files, memory, output. See docs/process.md.
"""

from __future__ import annotations

import os

from polyvisor import _native
from polyvisor.config import parse_size
from polyvisor.errors import (
    ConfigError,
    EngineFailure,
    ProcessEnded,
    ProcessTimeout,
    StateMismatch,
)
from polyvisor.process_events import Hooks, Observed
from polyvisor.process_streams import check_limits, streams, trace_descriptor
from polyvisor.process_tree import ProcessTree
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Literal

    from polyvisor.process_pool import ProcessPool
    from polyvisor.process_streams import SupportsFileno
    from polyvisor.process_tree import FrozenTree

    AnyPath = str | os.PathLike[str]
    _Frozen = tuple[_native.ProcessImage, FrozenTree]

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}

#: What Linux would have sent at these limits: SIGXCPU, SIGKILL.
_SIGNALS = {"instructions": 24, "cpu": 24, "memory": 9}


class Result(Record, kw_only=True):
    """How a program ended."""

    argv: tuple[str, ...]
    #: "exited", "signal", or the limit that ended it.
    reason: Literal["exited", "signal", "instructions", "cpu", "memory"]
    #: The program's exit status; 128 + n when signal n ended it, or Linux would have ended it so at
    #: that limit: 152 (SIGXCPU) for "instructions" and "cpu", 137 (SIGKILL) for "memory".
    status: int
    #: The signal that ended it, 0 for none.
    signal: int
    #: What it wrote, b"" when that went elsewhere.
    stdout: bytes
    stderr: bytes
    #: Host CPU seconds: the program's own, and those of its system calls.
    cpu_seconds: float
    #: Instructions that it has executed; 0 where nobody counts them (engine kvm).
    instructions: int
    #: Bytes written to its standard output and error.
    output: int
    #: Bytes written to files, and 4096 for each name that was made: as far as `writes` counts them.
    written: int
    #: How many processes and threads there have been, its first ones with them.
    processes: int
    threads: int
    #: The limits that it has met, whether it ended for that or saw errors and went on: "memory",
    #: "cpu", "instructions", "output", "files", "threads", "writes".
    limits: tuple[str, ...]
    #: Calls by name: (made, failed). Those that are not served count as failed.
    system_calls: dict[str, tuple[int, int]]
    engine: str

    @property
    def text(self) -> str:
        """`stdout` as text."""
        return self.stdout.decode("utf-8", "replace")


class StoppedAt(Record, kw_only=True):
    """Where `Process.run_until()` has stopped a program."""

    kind: Literal["system call", "address"]
    #: Of the system call or function; "" for an address that was given as a number.
    name: str
    address: int
    pid: int
    tid: int


class Process(Observed):
    """A program, loaded and about to run::

        with polyvisor.Process(["/usr/bin/python3", "hi.py"], files={"hi.py": "print(1)"}) as p:
            print(p.run(timeout=5).text)

    `files` are put into the folder /work, where the program starts, and which is gone afterwards,
    as is /tmp. With `root`, the program's tree is that folder, read-only; otherwise it is the
    host's programs and libraries. `ro` and `rw` give more of the host, each a path or
    (host path, program's path).

    Limits, of all its processes together: `output`, the bytes that it writes to its standard output
    and error (it sees EFBIG beyond it); `writes`, those that it writes to files, whether they are
    still there or not, with the gaps that it leaves in them and 4096 for each name that it makes
    (EDQUOT; None for no limit); `threads`, at a time (EAGAIN); `cpu`, seconds of the host's
    CPUs, and `instructions` (engine soft, which is then what "auto" takes), which end it; `memory`,
    what they have beside what they only read of files (ENOMEM, or the end). Of each process:
    `open_files`, at most 1024 (EMFILE). `Result.limits` says which were met.

    `trace` records what it does, in lines as strace prints them (with `trace_json`, a JSON object
    each): True, to the standard error; a path, a file, or a descriptor. `events` is how many of
    these are kept for `events()`, the last ones. Copies have their original's hooks, and no trace.

    The addresses of its stack, its heap, its mappings and of a position-independent program are
    others in every run, and copies (`fork()`) have their original's; with a `seed`, 0 to 2**64 - 1,
    they are the same whenever it is.

    `stdin` is bytes, or a file descriptor; `stdout` and `stderr` are collected, or go to the file
    descriptors given. With a `pool` the machine is one of its machines, and `memory` and `engine`
    are the pool's. Raises `ConfigError`, `HostError` (`errno` as execve() would have it),
    `EngineUnavailable`.

    Its processes can always connect to each other, by local sockets and on a loopback that is
    theirs alone; with `network` also to other machines, as the host can.

    The monitor's threads that run the program cannot make system calls of the host that serving it
    does not take; with `confine` False they can, on hosts that have no seccomp filters.
    """

    def __init__(
        self,
        argv: Sequence[AnyPath],
        *,
        files: Mapping[str, bytes | str] | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: str = "/work",
        root: AnyPath | None = None,
        ro: Iterable[AnyPath | tuple[AnyPath, str]] = (),
        rw: Iterable[AnyPath | tuple[AnyPath, str]] = (),
        memory: int | str = "256M",
        output: int | str = "64M",
        writes: int | str | None = "1G",
        instructions: int | None = None,
        cpu: float | None = None,
        open_files: int = 1024,
        threads: int = 256,
        network: bool = False,
        confine: bool = True,
        trace: bool | int | AnyPath | SupportsFileno | None = None,
        trace_json: bool = False,
        events: int = 0,
        seed: int | None = None,
        stdin: bytes | int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        engine: str = "auto",
        pool: ProcessPool | None = None,
    ) -> None:
        if isinstance(argv, str):
            raise ConfigError('argv must be a list of strings, such as ["ls", "-l"]', field="argv")
        self.argv = tuple(os.fspath(argument) for argument in argv)
        if not self.argv:
            raise ConfigError("argv must name a program", field="argv")
        engine = engine if pool is None else pool.engine
        engine = check_limits(engine, instructions, cpu, open_files, threads, events, seed)
        self._native: _native.Process | None = None
        self._hooks = Hooks()
        self._tree = ProcessTree(root, ro, rw, files or {})
        self._output: dict[str, int] = {}
        #: What copies are made from, until it runs again; and what this is a copy of.
        self._frozen: _Frozen | None = None
        self._origin: _Frozen | None = None
        self._names: dict[int, str] = {}
        #: Where `run_until()` stopped last.
        self.stopped_at: StoppedAt | None = None
        try:
            environment = {**ENVIRONMENT, **(env or {})}
            with (
                streams(self._output, stdin, stdout, stderr) as standard,
                trace_descriptor(trace) as trace_fd,
            ):
                self._native = _native.Process(
                    arguments=list(self._resolve(environment)),
                    environment=[f"{k}={v}" for k, v in environment.items() if v is not None],
                    directory=cwd,
                    mounts=self._tree.mounts,
                    memory=parse_size(memory, "memory") if pool is None else pool.memory,
                    output=parse_size(output, "output"),
                    writes=None if writes is None else parse_size(writes, "writes"),
                    instructions=instructions,
                    cpu=cpu,
                    files=open_files,
                    threads=threads,
                    network=network,
                    confine=confine,
                    trace=trace_fd,
                    trace_json=trace_json,
                    events=events,
                    seed=seed,
                    standard=standard,
                    engine=engine,
                    pool=None if pool is None else pool.native,
                )
        except BaseException:
            self.close()
            raise

    def _resolve(self, environment: Mapping[str, str | None]) -> Iterable[str]:
        """The arguments, the first one found in PATH as a shell would."""
        program = self.argv[0]
        if "/" in program:
            return self.argv
        for folder in (environment.get("PATH") or "").split(":"):
            candidate = f"{folder}/{program}"
            on_host = self._tree.on_host(candidate)
            if os.access(on_host, os.X_OK) and not os.path.isdir(on_host):
                return (candidate, *self.argv[1:])
        raise ConfigError(
            f"there is no program called {program!r} in the process's PATH", field="argv"
        )

    @property
    def engine(self) -> str:
        """The engine that runs it: "kvm" or "soft"."""
        return self._checked().engine

    def run(self, timeout: float | None = None) -> Result:
        """Runs the program to its end, and tells how that was.

        After `timeout` seconds it stands still and `ProcessTimeout` is raised, with what it had
        written; another call goes on with it. Ctrl-C stops it too, and so does what a hook raises,
        which comes out of here. Raises `EngineFailure` when the engine cannot go on.
        """
        native = self._checked()
        native.clear_stops()
        self._frozen = None
        end = self._outcome(native.run(timeout, self._hooks), timeout, "end")
        if isinstance(end, Result):
            return end
        raise StateMismatch(f"{self.argv[0]} stopped unexpectedly at 0x{end.address:x}")

    def run_until(self, *places: str | int, timeout: float | None = None) -> Process:
        """Runs the program to the first of `places`, where it stands still, and returns itself.

        A place is an address, the name of a function of the program (its symbol table has to be
        there), or that of a system call, which is then about to be made; "syscall:read" where a
        function has the same name. What is reached is in `stopped_at`.

        Raises `ConfigError` for a name that is none, `ProcessEnded` (with its `result`) when the
        program ends before, and as `run()`.
        """
        native = self._checked()
        native.clear_stops()
        self._frozen = None
        for place in places:
            self._stop_at(native, place)
        if not places:
            raise ConfigError("run_until() needs a place to stop at", field="places")
        reached = self._outcome(native.run(timeout, self._hooks), timeout, f"reach {places[0]}")
        native.clear_stops()
        if isinstance(reached, Result):
            raise ProcessEnded(
                f"{self.argv[0]} ended before it reached {places[0]}", result=reached
            )
        self.stopped_at = StoppedAt(
            kind="system call" if reached.kind == "system call" else "address",
            name=reached.name or self._names.get(reached.address, ""),
            address=reached.address,
            pid=reached.pid,
            tid=reached.tid,
        )
        return self

    def call(
        self,
        function: str | int,
        *arguments: int | bytes | bytearray,
        timeout: float | None = None,
    ) -> int:
        """Calls a function of the program, which stands still (`run_until()`).

        Returns RAX as a signed number.

        At most six arguments: integers as they are; bytes as the address of a copy on the
        program's stack, with a zero behind it; a bytearray likewise, and it has what the function
        left there afterwards. The program's registers are then as before; its memory is as the
        function left it (`reset()`).

        Raises `ProcessEnded` when the program ends meanwhile, `ProcessTimeout`, `StateMismatch`
        when the program has not stopped at a place, `ConfigError`.
        """
        native = self._checked()
        if len(arguments) > 6:
            raise ConfigError(
                f"a function can be given 6 arguments, not {len(arguments)}", field="arguments"
            )
        address = function if isinstance(function, int) else self.symbol(function)
        self._frozen = None
        outcome, copies = native.call(address, arguments, timeout, self._hooks)
        returned = self._outcome(outcome, timeout, f"return from {function}")
        if isinstance(returned, Result):
            raise ProcessEnded(f"{self.argv[0]} ended in {function}", result=returned)
        buffers = [one for one in arguments if not isinstance(one, int)]
        for buffer, after in zip(buffers, copies, strict=True):
            if isinstance(buffer, bytearray):
                buffer[:] = after
        return returned.value

    def fork(
        self,
        *,
        stdin: bytes | int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> Process:
        """A copy of the program as it stands still here, copy on write: as many as you like.

        The copies share what they do not write to, with each other and with this one, which may
        go on, or be closed. Each has its own standard input and output, its own copy of /work and
        /tmp, and its files stand where they stand here; pipes and sockets are shared. `reset()`
        makes a copy again what it was.

        Raises `StateMismatch` when the program has not stopped at a place (`run_until()`), has
        ended, or has more than one thread or process.
        """
        native = self._checked()
        if self._frozen is None:
            self._frozen = (native.freeze(), self._tree.freeze())
        copy = Process.__new__(Process)
        copy.argv = self.argv
        copy._native = copy._frozen = None
        copy._names = dict(self._names)
        copy.stopped_at = self.stopped_at
        copy._origin = self._frozen
        copy._output = {}
        copy._hooks = self._hooks.copy()
        image, tree = self._frozen
        copy._tree = ProcessTree.copy_of(tree)
        try:
            with streams(copy._output, stdin, stdout, stderr) as standard:
                copy._native = image.start(copy._tree.own_mounts, standard)
                copy._hooks.watch(copy._native)
        except BaseException:
            copy.close()
            raise
        return copy

    def reset(self) -> None:
        """Makes a copy again what it was when `fork()` made it: memory, registers, files, output.

        Raises `StateMismatch` when this process is no copy.
        """
        native = self._checked()
        if self._origin is None:
            raise StateMismatch(f"process {self.argv[0]} is no copy that could be reset; fork() it")
        native.reset()
        for fd in self._output.values():
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        self._frozen = None
        self._tree.restore(self._origin[1])

    def symbol(self, name: str) -> int:
        """The address of a function or variable of the program. Raises `ConfigError`."""
        address = self._checked().symbol(name)
        if address is None:
            raise ConfigError(
                f"{self.argv[0]} has no symbol {name!r}; link it without stripping it",
                field="symbol",
            )
        return address

    def registers(self) -> dict[str, int]:
        """The general registers of the first thread, "rax" to "r15", "rip" and "rflags".

        Raises `StateMismatch` when the program has not stopped at a place.
        """
        return self._checked().registers()

    def read(self, address: int, size: int) -> bytes:
        """Memory of the program. Raises `MemoryRangeError` where it has none."""
        return self._checked().read(address, size)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Writes to the program's memory, where the program could. Raises `MemoryRangeError`."""
        self._frozen = None
        self._checked().write(address, data)

    def _stop_at(self, native: _native.Process, place: str | int) -> None:
        if isinstance(place, str):
            explicit = place.removeprefix("syscall:")
            symbol = None if explicit != place else native.symbol(place)
            number = _native.system_call_number(explicit)
            if symbol is not None:
                self._names[symbol] = place
                place = symbol
            elif number is not None:
                native.stop_before_call(number)
                return
            else:
                raise ConfigError(
                    f"{place!r} is neither a function of {self.argv[0]} nor a system call",
                    field="places",
                )
        if not native.stop_before_address(place):
            raise ConfigError(f"{self.argv[0]} has no memory at 0x{place:x}", field="places")

    def _outcome(
        self,
        outcome: _native.ProcessEnd | _native.ProcessStop | None,
        timeout: float | None,
        goal: str,
    ) -> Result | _native.ProcessStop:
        native = self._checked()
        if outcome is None:
            raise ProcessTimeout(
                f"{self.argv[0]} did not {goal} within {timeout:g} s",
                seconds=timeout or 0.0,
                stdout=self._written("stdout"),
                stderr=self._written("stderr"),
            )
        if isinstance(outcome, _native.ProcessStop):
            return outcome
        end = outcome
        reason = end.reason
        if reason == "engine_failure":
            raise EngineFailure(f"the engine could not go on with {self.argv[0]}: {end.text}")
        return Result(
            argv=self.argv,
            reason=reason,
            status=end.status if reason == "exited" else 128 + (end.signal or _SIGNALS[reason]),
            signal=end.signal,
            stdout=self._written("stdout"),
            stderr=self._written("stderr"),
            **native.usage(),
            system_calls=native.counts(),
            engine=native.engine,
        )

    def _checked(self) -> _native.Process:
        if self._native is None:
            raise StateMismatch(f"process {self.argv[0]} is closed")
        return self._native

    def _written(self, name: str) -> bytes:
        fd = self._output.get(name)
        if fd is None:
            return b""
        return os.pread(fd, os.fstat(fd).st_size, 0)

    def close(self) -> None:
        """Ends it, and removes its /work and /tmp."""
        if self._native is not None:
            self._native.close()
            self._native = None
        for fd in self._output.values():
            os.close(fd)
        self._output = {}
        self._tree.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
