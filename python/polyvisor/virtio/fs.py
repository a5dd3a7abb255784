"""virtio-fs: a folder of the host's in the guest (virtio 1.2, 5.11). See docs/shared-folders.md.

The device's part: queues, threads, sizes. What the requests mean is in fs_operations.py, what keeps
the guest inside of the folder in fs_tree.py.
"""

from __future__ import annotations

import errno
import json
import os
import queue as queues
import resource
import struct
import threading

from polyvisor.errors import ConfigError, HostError
from polyvisor.virtio import fuse
from polyvisor.virtio.base import VirtioDevice
from polyvisor.virtio.fs_operations import CHANGES, Operations, drop_ids
from polyvisor.virtio.fs_tree import Tree
from polyvisor.virtio.fuse import Op

TYPE_CHECKING = False
if TYPE_CHECKING:
    from polyvisor._ring import Chain, Queue

_TAG_MAX = 36
#: The largest request: 256 pages of data.
_PAGES = 256
_DATA = _PAGES * 4096
_INIT_FLAGS = (
    fuse.ASYNC_READ
    | fuse.ATOMIC_O_TRUNC
    | fuse.BIG_WRITES
    | fuse.AUTO_INVAL_DATA
    | fuse.DO_READDIRPLUS
    | fuse.READDIRPLUS_AUTO
    | fuse.ASYNC_DIO
    | fuse.PARALLEL_DIROPS
    | fuse.MAX_PAGES
    | fuse.HANDLE_KILLPRIV_V2
)
_HEADER = fuse.IN_HEADER.size
_REPLY = fuse.OUT_HEADER.size
_READ_DATA = _HEADER + fuse.WRITE_IN_SIZE
#: Arguments of other requests; the largest is an extended attribute.
_ARGUMENTS = 1 << 17
_SYNC = os.O_SYNC | os.O_DSYNC


def parse(text: str) -> tuple[str, str, bool]:
    """``HOST:GUEST[:ro|rw]``, as on the command line: (host path, guest path, read-only).

    Raises `ConfigError`. A share is read-only unless it says ``rw``.
    """
    path, mode = text, "ro"
    for suffix in ("ro", "rw"):
        if text.endswith(":" + suffix):
            path, mode = text[: -len(suffix) - 1], suffix
    host, colon, guest = path.rpartition(":")
    if not colon or not host or not guest.startswith("/"):
        raise ConfigError(
            f"a share is HOST:GUEST or HOST:GUEST:rw, with an absolute path in the guest, such as "
            f"./src:/mnt/src; not {text!r}",
            field="share",
        )
    return host, guest, mode == "ro"


class Fs(VirtioDevice):
    """A shared folder, which a guest mounts by its tag: ``mount -t virtiofs TAG /mnt``.

    The guest gets what this process may do in `path` and below, and nothing else. Changes need
    ``read_only=False``. Requests are served where they arrive unless they would wait for the disk;
    with ``inline=False`` always by `threads` threads of the device's own.
    """

    device_type = 26
    name = "virtio-fs"
    queue_sizes = (128, 1024)  # one for what cannot wait, one for requests
    pci_class = 0x018000

    def __init__(
        self,
        path: str | os.PathLike[str],
        tag: str,
        *,
        read_only: bool = True,
        inline: bool = True,
        threads: int = 2,
    ) -> None:
        encoded = tag.encode()
        if not 0 < len(encoded) <= _TAG_MAX or "\0" in tag:
            raise ConfigError(
                f"the tag of a shared folder has 1 to {_TAG_MAX} bytes, not {tag!r}", field="tag"
            )
        self.path = os.fspath(path)
        self.tag = tag
        self.read_only = read_only
        self.inline = inline
        self.config = encoded.ljust(_TAG_MAX, b"\0") + struct.pack("<I", 1)
        try:
            root = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"cannot share {self.path!r}: {error.strerror}",
                errno=error.errno or 0,
                path=self.path,
            ) from None
        # The rest of what this process may open is for its own use.
        self.tree = Tree(root, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 5, 16384))
        self.operations = Operations(self.tree, read_only=read_only)
        self.requests = 0
        self._jobs: queues.SimpleQueue[tuple[Queue, Chain] | None] = queues.SimpleQueue()
        self._thread_count = threads
        self._workers: list[threading.Thread] = []
        self._idle = threading.Condition()
        self._under_way = 0

    # --- Requests arrive -------------------------------------------------------------------------

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            written = self._answer(chain, wait=False) if self.inline else None
            if written is not None:
                chain.push(written)
                continue
            with self._idle:
                self._under_way += 1
            self._jobs.put((queue, chain))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            queue, chain = job
            try:
                written = self._answer(chain, wait=True)
                with queue:
                    chain.push(written)
            except Exception as error:
                self.fail(f"its thread raised {error!r}")
                raise
            finally:
                del job, chain
                with self._idle:
                    self._under_way -= 1
                    self._idle.notify_all()

    def _answer(self, chain: Chain, *, wait: bool) -> int | None:
        """Serves a request; the bytes of its answer, which are in place. None: it would have to
        wait for the disk, and nothing was done."""
        header = chain.read(_HEADER)
        if len(header) < _HEADER:
            return 0
        _, op, unique, node, *_ = fuse.IN_HEADER.unpack(header)
        self.requests += 1
        room = chain.writable - _REPLY
        number = 0
        answer: bytes | int | None = b""
        try:
            if self.read_only and op in CHANGES:
                raise OSError(errno.EROFS, "the folder is shared for reading")
            if op == Op.READ:
                answer = self._read(chain, room, wait)
            elif op == Op.WRITE:
                answer = self._write(chain, wait)
            else:
                answer = self._other(op, node, chain, room, wait)
        except OSError as error:
            number = error.errno or errno.EIO
        except (struct.error, ValueError, OverflowError):  # sizes and numbers that cannot be
            number = errno.EINVAL
        if answer is None:
            return None
        if room < 0 or op in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT):
            return 0  # nobody waits for an answer
        size = 0
        if not number:
            if isinstance(answer, int):
                size = answer
            elif len(answer) <= room:
                size = chain.write(answer, _REPLY)
            else:
                number = errno.EINVAL
        chain.write(fuse.OUT_HEADER.pack(_REPLY + size, -number, unique))
        return _REPLY + size

    def _other(self, op: int, node: int, chain: Chain, room: int, wait: bool) -> bytes | None:
        operations = self.operations
        slow = operations.slow.get(op)
        if slow is not None:
            return slow(node, chain.read(_ARGUMENTS, _HEADER), room) if wait else None
        data = chain.read(_ARGUMENTS, _HEADER)
        with self.tree.lock:
            operation = operations.locked.get(op)
            if operation is not None:
                return operation(node, data, room)
            if op == Op.FORGET:
                self.tree.forget(node, *fuse.FORGET.unpack_from(data))
            elif op == Op.BATCH_FORGET:
                count, _ = fuse.BATCH_FORGET.unpack_from(data)
                end = fuse.BATCH_FORGET.size + count * fuse.FORGET_ONE.size
                for one in fuse.FORGET_ONE.iter_unpack(data[fuse.BATCH_FORGET.size : end]):
                    self.tree.forget(*one)
            elif op == Op.INIT:
                return self._init(data)
            elif op == Op.DESTROY:
                self.tree.clear()
            else:  # FLUSH is one of them: nothing is left to be written at close()
                raise OSError(errno.ENOSYS, "there is no such operation")
        return b""

    def _init(self, data: bytes) -> bytes:
        major, minor, readahead, flags = fuse.INIT_IN.unpack_from(data)
        if major < fuse.MAJOR or (major == fuse.MAJOR and minor < 27):
            raise OSError(errno.EPROTO, "the guest's FUSE is too old")
        self.tree.clear()
        return fuse.INIT_OUT.pack(
            fuse.MAJOR,
            fuse.MINOR,
            min(readahead, _DATA),
            flags & _INIT_FLAGS,
            64,
            48,
            _DATA,
            1,
            _PAGES,
            0,
        )

    # --- Data: straight between the file and the guest's memory ----------------------------------

    def _read(self, chain: Chain, room: int, wait: bool) -> int | None:
        number, offset, size, _ = fuse.READ_IN.unpack(chain.read(fuse.READ_IN.size, _HEADER))
        size = min(size, room)
        if size <= 0:
            return 0
        with self.tree.using(number) as handle:
            fd = handle.fd
            views = chain.write_views(_REPLY, size)
            if wait:
                return os.preadv(fd, views, offset)
            try:
                done = os.preadv(fd, views, offset, os.RWF_NOWAIT)
            except OSError:  # not in the page cache, or a file system that cannot tell
                return None
            # Fewer: the end of the file, or of what is in the cache.
            return done if done == size or offset + done >= os.fstat(fd).st_size else None

    def _write(self, chain: Chain, wait: bool) -> bytes | None:
        number, offset, size, flags = fuse.WRITE_IN.unpack(chain.read(fuse.WRITE_IN.size, _HEADER))
        with self.tree.using(number) as handle:
            if not wait and handle.flags & _SYNC:
                return None
            fd = handle.fd
            size = min(size, chain.readable - _READ_DATA)
            done = os.pwritev(fd, chain.read_views(_READ_DATA, size), offset) if size > 0 else 0
            if flags & fuse.WRITE_KILL_SUIDGID:
                drop_ids(fd)
        return fuse.WRITE_OUT.pack(done, 0)

    # --- Life ------------------------------------------------------------------------------------

    def start(self, features: int) -> None:
        for _ in range(self._thread_count):
            worker = threading.Thread(target=self._work, name=f"virtio-fs {self.tag}", daemon=True)
            worker.start()
            self._workers.append(worker)

    def stop(self) -> None:
        self.quiesce()
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        self._workers.clear()
        with self.tree.lock:
            self.tree.clear()

    def stop_queue(self, index: int) -> None:
        self.quiesce()

    def quiesce(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._under_way == 0)

    def save(self) -> bytes:
        with self.tree.lock:
            return json.dumps(self.tree.save()).encode()

    def restore(self, state: bytes) -> None:
        try:
            with self.tree.lock:
                self.tree.restore(json.loads(state))
        except (KeyError, TypeError, OSError) as error:
            raise ValueError(f"this is not the state of a shared folder: {error}") from None
