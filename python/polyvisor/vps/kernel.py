"""What the kernel says of a process that somebody else started, maybe before this program began."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import time
from functools import cache

#: PIDFD_GET_INFO of linux/pidfd.h: struct pidfd_info, version 0; the exit code is its last word.
_GET_INFO, _INFO_SIZE, _INFO_EXIT = 0xC040FF0B, 64, 1 << 3


@cache
def boot_id() -> str:
    """Of this boot of the host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def start_time(pid: int) -> int:
    """When a process began, in clock ticks after the boot; 0 if there is none, or only its exit
    status is left (a zombie). proc_pid_stat(5), fields 3 and 22."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


class Handle:
    """A process that cannot be mistaken for a later one with its number; a context manager."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @staticmethod
    def open(pid: int, started: int) -> Handle | None:
        """The process `pid` that began at `started`; None when it has gone."""
        if pid <= 0:
            return None
        try:
            handle = Handle(os.pidfd_open(pid))
        except OSError:
            return None
        if start_time(pid) == started:
            return handle
        handle.close()
        return None

    def signal(self, number: int) -> None:
        """Sends it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.descriptor, number)

    def wait(self, seconds: float) -> bool:
        """Waits for its end; False when it is still there after so many seconds."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            # Rounded up: what is less than a millisecond must not become a busy loop.
            if poll.poll(min(int(left * 1000) + 1, 3_600_000)):
                return True
            if left <= 0:
                return False

    def ending(self) -> bool:
        """Whether it has ended, or is about to: it has left its namespaces."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        if poll.poll(0):
            return True
        pid = self._pid()
        return not os.path.exists(f"/proc/{pid}/ns/mnt") if pid > 0 else True

    def _pid(self) -> int:
        """Its number; -1 when it has ended. pidfd_open(2)."""
        with open(f"/proc/self/fdinfo/{self.descriptor}") as file:
            return next((int(line[4:]) for line in file if line.startswith("Pid:")), -1)

    def exit_status(self) -> int | None:
        """Its exit status as a shell has it (128 + signal), once it was waited for by its parent;
        None when the kernel (before Linux 6.15) does not tell it to others."""
        info = bytearray(_INFO_SIZE)
        struct.pack_into("Q", info, 0, _INFO_EXIT)
        for _ in range(100):  # it is there a moment after the end
            try:
                fcntl.ioctl(self.descriptor, _GET_INFO, info)
            except OSError:
                return None
            if struct.unpack_from("Q", info)[0] & _INFO_EXIT:
                status = struct.unpack_from("i", info, _INFO_SIZE - 4)[0]
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            time.sleep(0.005)
        return None

    def close(self) -> None:
        """Lets go of it."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


__all__ = ["Handle", "boot_id", "start_time"]
