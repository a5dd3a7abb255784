"""Commands and files of a running guest, through its agent (guest/agent.c). See docs/agent.md.

Each command and each file has a vsock connection of its own, so any number may be under way, from
any number of threads, and none waits for another. What the guest sends is not trusted: anything
that the agent never says is a `GuestError`.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time

from polyvisor.errors import ConfigError, GuestError, HostError, MachineTimeout, StateMismatch
from polyvisor.guest.channel import Channel, Ended, FileInfo, NotRun, Output
from polyvisor.guest.command import CommandFailed, command_not_run, guest_failure
from polyvisor.guest.feeder import Feeder
from polyvisor.images import initramfs
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import IO

    from polyvisor.guest.channel import Event
    from polyvisor.guest.command import Sink, Stdin
    from polyvisor.machine import Machine
    from polyvisor.virtio.vsock import Vsock

#: The vsock port that the agent listens on.
PORT = 20566

_STDIN_FRAME = 32 << 10
_RECEIVE = 256 << 10
#: Bytes that wait for the socket, from which on no more stdin is made into frames.
_BACKLOG = 512 << 10
#: Seconds from one look at the machine, or for the agent, to the next.
_LOOK, _RETRY = 0.5, 0.05
#: Seconds that a guest may take to accept a connection.
_PATIENCE = 60.0
_ABUSE = "what answers in the guest is not polyvisor's agent, or one that was tampered with"


def program(architecture: initramfs.Architecture = "amd64") -> str:
    """The agent's file, for images: a static program that needs nothing. Beside it is
    polyvisor-agent.service, which starts it at /usr/sbin/polyvisor-agent."""
    name = {"amd64": "agent-x86_64", "i386": "agent-i386"}[architecture]
    return os.path.join(os.path.dirname(__file__), name)


class GuestFileError(GuestError):
    """A file of the guest could not be read or written: `errno` is Linux's, `path` the file."""

    def __init__(self, message: str, *, errno: int, path: str) -> None:
        super().__init__(message, reason="file")
        self.errno = errno
        self.path = path


class Ran(Record):
    """How a command ended."""

    argv: tuple[str, ...]
    #: The command's own exit status; 128 + n when signal n killed it.
    status: int
    #: The signal that killed it, 0 for none.
    signal: int
    #: What it wrote (b"" when it went to a callback).
    stdout: bytes
    stderr: bytes
    #: From the call to the end.
    seconds: float

    @property
    def text(self) -> str:
        """`stdout` as text."""
        return self.stdout.decode("utf-8", "replace")


class Exchange:
    """One connection to the agent: a request, what goes in, what comes out."""

    def __init__(
        self, machine: Machine, stream: socket.socket, request: bytes, stdin: Stdin = None
    ) -> None:
        self._machine = machine
        self._stream = stream
        self._outgoing = bytearray()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stream.setblocking(False)
        self.channel = Channel(self._send, stdin_frame=_STDIN_FRAME, abuse=_ABUSE)
        self.channel.request(request)
        try:
            self._feeder: Feeder | None = Feeder(self.channel, stdin)
        except BaseException:
            self._feeder = None
            self.close()
            raise
        #: Whoever uses the channel must hold it.
        self.lock = self._feeder.lock

    def close(self) -> None:
        """Ends the connection, and so the command."""
        if self._feeder is not None:
            self._feeder.stop()
            self._feeder = None
        self._stream.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def events(self, deadline: float | None) -> list[Event]:
        """Waits for what comes next. Raises `GuestError` when the agent or the guest is gone, and
        `TimeoutError` when `deadline` has passed."""
        while True:
            with self.lock:
                wanted = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
            poll = select.poll()
            poll.register(self._stream, wanted)
            poll.register(self._wake, select.POLLIN)
            left = _LOOK if deadline is None else min(_LOOK, deadline - time.monotonic())
            ready = dict(poll.poll(max(left, 0) * 1000))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            happened = ready.get(self._stream.fileno(), 0)
            if happened & select.POLLOUT:
                with self.lock:
                    self._flush()
            if happened & ~select.POLLOUT:
                return self._receive()
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError
            if not ready:
                check_alive(self._machine)

    def _receive(self) -> list[Event]:
        try:
            data = self._stream.recv(_RECEIVE)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            check_alive(self._machine)
            raise GuestError("the guest's agent has hung up before the end", reason="agent")
        with self.lock:
            events = self.channel.receive(data)
        if self._feeder is not None:
            self._feeder.wake()
        return events

    # With the lock, except at the very beginning.
    def _send(self, data: bytes) -> None:
        self._outgoing += data
        self._flush()
        if self._outgoing:
            os.eventfd_write(self._wake, 1)  # whoever waits, waits for room too

    def _flush(self) -> None:
        try:
            while self._outgoing:
                sent = self._stream.send(self._outgoing)
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()  # reading tells why
        congested = len(self._outgoing) > _BACKLOG
        if self.channel.congested and not congested:
            self.channel.congested = False
            self.channel.pump()
        else:
            self.channel.congested = congested


class Process:
    """A command that runs in a guest: what `Agent.start` returns. `wait` has to be called for its
    output to be taken. Use it as a context manager, or `close` it: that ends the command."""

    def __init__(
        self,
        exchange: Exchange,
        machine: Machine,
        argv: tuple[str, ...],
        on_stdout: Sink | None,
        on_stderr: Sink | None,
    ) -> None:
        self.argv = argv
        self._exchange = exchange
        self._machine = machine
        self._started = time.monotonic()
        self._stdout, self._stderr = bytearray(), bytearray()
        self._sinks = {
            "stdout": on_stdout or self._stdout.extend,
            "stderr": on_stderr or self._stderr.extend,
        }
        self._ran: Ran | None = None

    def signal(self, number: int) -> None:
        """Sends the command (its process group) a signal. From any thread."""
        if not 0 < number <= 64:
            raise ConfigError(f"a signal is a number from 1 to 64, not {number}", field="number")
        with self._exchange.lock:
            self._exchange.channel.signal(number)

    def resize(self, rows: int, columns: int) -> None:
        """The size of the command's terminal, if it has one. From any thread."""
        with self._exchange.lock:
            self._exchange.channel.resize(rows, columns)

    def wait(self, timeout: float | None = None) -> Ran:
        """Takes the command's output until it has ended.

        Raises `TimeoutError` after `timeout` seconds (the command goes on), `CommandNotRun`, and
        `GuestError` when the agent or the guest is gone.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._ran is None:
            for event in self._exchange.events(deadline):
                if isinstance(event, Output):
                    self._sinks[event.stream](event.data)
                elif isinstance(event, Ended):
                    self._ran = self._end(event)
                elif isinstance(event, NotRun):
                    raise command_not_run(event, self.argv[0], self._machine.console.tail())
        return self._ran

    def _end(self, event: Ended) -> Ran:
        self._exchange.close()
        return Ran(
            argv=self.argv,
            status=128 + event.signal if event.signal else event.status,
            signal=event.signal,
            stdout=bytes(self._stdout),
            stderr=bytes(self._stderr),
            seconds=time.monotonic() - self._started,
        )

    def close(self) -> None:
        """Kills the command, if it has not ended."""
        self._exchange.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Agent:
    """A guest's agent; what `Machine.agent` returns. Safe to use from several threads."""

    def __init__(self, machine: Machine, vsock: Vsock) -> None:
        self._machine = machine
        self._vsock = vsock

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: Stdin = None,
        env: Mapping[str, str | None] | None = None,
        cwd: str = "/root",
        user: tuple[int, int] = (0, 0),
        timeout: float | None = None,
        tty: tuple[int, int] | None = None,
        check: bool = False,
        on_stdout: Sink | None = None,
        on_stderr: Sink | None = None,
    ) -> Ran:
        """Runs a command in the guest and waits for its end.

        `stdin` is bytes or text, a file descriptor or binary file that is read as the command
        reads, or None for an empty one. Output is collected, or given to `on_stdout` and
        `on_stderr` as it comes. `env` is added to a usual environment (None removes a variable).
        `user` is the numbers of a user and a group. `tty` (rows, columns) runs it on a terminal.

        Raises `CommandNotRun` when the guest has no such program, `MachineTimeout` after `timeout`
        seconds (the command is killed, the guest goes on), with ``check`` `CommandFailed`, and
        `GuestError` when the agent or the guest is gone.
        """
        with self.start(
            argv,
            stdin=stdin,
            env=env,
            cwd=cwd,
            user=user,
            tty=tty,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
        ) as process:
            try:
                ran = process.wait(timeout)
            except TimeoutError:
                assert timeout is not None
                raise MachineTimeout(
                    f"{process.argv[0]} did not end within {timeout:g} s and was killed",
                    seconds=timeout,
                ) from None
        if check and ran.status:
            raise CommandFailed(
                f"{ran.argv[0]} ended with status {ran.status}",
                completed=ran,
                tail=ran.stderr[-2000:].decode("utf-8", "replace"),
            )
        return ran

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: Stdin = None,
        env: Mapping[str, str | None] | None = None,
        cwd: str = "/root",
        user: tuple[int, int] = (0, 0),
        tty: tuple[int, int] | None = None,
        on_stdout: Sink | None = None,
        on_stderr: Sink | None = None,
    ) -> Process:
        """Starts a command; as `exec`, without waiting."""
        if isinstance(argv, str):
            raise ConfigError('argv must be a list of strings, such as ["ls", "-l"]', field="argv")
        command = initramfs.Command(
            [os.fspath(argument) for argument in argv],
            env or {},
            cwd,
            terminal=tty is not None,
            terminal_size=tty,
            user=user[0],
            group=user[1],
        )
        request = initramfs.encode(command)
        exchange = Exchange(self._machine, self._connect(None), request, stdin)
        argv = tuple(command.arguments)
        return Process(exchange, self._machine, argv, on_stdout, on_stderr)

    def _connect(self, limit: float | None) -> socket.socket:
        patience = _PATIENCE if limit is None else min(limit, _PATIENCE)
        try:
            return self._vsock.connect(PORT, patience)
        except ConnectionRefusedError:
            check_alive(self._machine)
            raise GuestError("no agent listens in the guest", reason="agent") from None
        except StateMismatch:  # the machine was closed
            check_alive(self._machine)
            raise
        except TimeoutError:
            if patience == limit:
                raise
            raise GuestError(
                f"the guest does not answer for {patience:g} s", reason="agent"
            ) from None

    def ping(self, timeout: float | None = 10.0) -> float:
        """Seconds until the agent answered. Raises `TimeoutError`, `GuestError`."""
        started = time.monotonic()
        deadline = None if timeout is None else started + timeout
        exchange = Exchange(self._machine, self._connect(timeout), b"")
        try:
            while not any(isinstance(event, Ended) for event in exchange.events(deadline)):
                pass
        finally:
            exchange.close()
        return time.monotonic() - started

    # --- files -----------------------------------------------------------------------------------

    def copy_in(
        self,
        source: str | os.PathLike[str],
        target: str,
        *,
        mode: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Copies a file of the host to `target` in the guest, with its permissions (or `mode`).
        Returns its size. Raises `GuestFileError`, `HostError`, `MachineTimeout`."""
        path = os.fspath(source)
        try:
            with open(path, "rb") as file:
                about = os.fstat(file.fileno())
                mode = stat.S_IMODE(about.st_mode) if mode is None else mode
                self._put(target, mode, file, timeout)
                return os.lseek(file.fileno(), 0, os.SEEK_CUR)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise HostError(
                f"cannot read {path!r}: {error.strerror}", errno=error.errno or 0, path=path
            ) from error

    def copy_out(
        self, source: str, target: str | os.PathLike[str], *, timeout: float | None = None
    ) -> int:
        """Copies a file of the guest to the host, with its permissions for the user (never setuid
        and the like); into `target`, if that is a directory. Returns its size. Raises
        `GuestFileError`, `HostError`, `MachineTimeout`."""
        path = os.fspath(target)
        if os.path.isdir(path):
            path = os.path.join(path, os.path.basename(source))
        try:
            # Made when the guest's file is there: a failure leaves an old one as it was.
            opened: list[IO[bytes]] = []

            def begin(info: FileInfo) -> Sink:
                opened.append(open(path, "wb"))  # noqa: SIM115 -- closed below
                os.fchmod(opened[0].fileno(), info.mode & 0o777 | 0o600)
                return opened[0].write

            try:
                return self._get(source, begin, timeout)
            finally:
                for file in opened:
                    file.close()
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise HostError(
                f"cannot write {path!r}: {error.strerror}", errno=error.errno or 0, path=path
            ) from error

    def read_file(self, path: str, *, timeout: float | None = None) -> bytes:
        """The contents of a file of the guest. Raises `GuestFileError`, `MachineTimeout`."""
        data = bytearray()
        self._get(path, lambda info: data.extend, timeout)
        return bytes(data)

    def write_file(
        self, path: str, data: bytes | str, *, mode: int = 0o644, timeout: float | None = None
    ) -> None:
        """Makes (or empties) a file of the guest and writes `data`. Raises `GuestFileError`,
        `MachineTimeout`."""
        self._put(path, mode, data, timeout)

    def _put(self, path: str, mode: int, source: Stdin, timeout: float | None) -> None:
        records = [b"P" + _path(path), b"o%d" % stat.S_IMODE(mode)]
        self._transfer(path, records, source, None, timeout)

    def _get(self, path: str, begin: Callable[[FileInfo], Sink], timeout: float | None) -> int:
        return self._transfer(path, [b"G" + _path(path)], None, begin, timeout)

    def _transfer(
        self,
        path: str,
        records: list[bytes],
        source: Stdin,
        begin: Callable[[FileInfo], Sink] | None,
        timeout: float | None,
    ) -> int:
        """One file, in or out. Bytes that came."""
        deadline = None if timeout is None else time.monotonic() + timeout
        request = b"".join(record + b"\0" for record in records)
        exchange = Exchange(self._machine, self._connect(timeout), request, source)
        sink: Sink | None = None
        size = 0
        try:
            while True:
                for event in exchange.events(deadline):
                    if isinstance(event, FileInfo) and begin is not None and sink is None:
                        sink = begin(event)
                    elif isinstance(event, Output) and sink is not None:
                        sink(event.data)
                        size += len(event.data)
                    elif isinstance(event, NotRun):
                        reason = os.strerror(event.errno)
                        raise GuestFileError(
                            f"{path!r} in the guest: {reason}", errno=event.errno, path=path
                        )
                    elif isinstance(event, Ended):
                        return size
        except TimeoutError:
            assert timeout is not None
            raise MachineTimeout(
                f"{path!r} was not copied within {timeout:g} s", seconds=timeout
            ) from None
        finally:
            exchange.close()


def check_alive(machine: Machine) -> None:
    """Raises the `GuestError` of a machine that has ended."""
    if machine.state in ("ended", "closed"):
        raise guest_failure(machine.wait(1.0), machine.console.transcript)


def connect(machine: Machine, timeout: float | None) -> Agent:
    """See `Machine.agent`."""
    vsock = machine.vsock
    if vsock is None:
        raise StateMismatch(
            f"machine {machine.name!r} has no vsock, which the agent is reached by; call add_vsock "
            "before it starts"
        )
    agent = Agent(machine, vsock)
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
        try:
            agent.ping(left)
            return agent
        except (GuestError, TimeoutError) as error:
            check_alive(machine)
            # Neither the driver nor the agent need be there yet.
            if isinstance(error, GuestError) and error.reason != "agent":
                raise
        if deadline is not None and time.monotonic() + _RETRY >= deadline:
            raise MachineTimeout(
                f"no agent answered in the guest within {timeout:g} s; is it in its image, and "
                "has it a driver for vsock?",
                seconds=timeout or 0.0,
            )
        time.sleep(_RETRY)


def _path(path: str) -> bytes:
    encoded = os.fsencode(path)
    if not encoded or b"\0" in encoded:
        raise ConfigError(f"{path!r} is no path in the guest", field="path")
    return encoded
