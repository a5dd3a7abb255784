"""What a guest may do to a shared folder: one method per FUSE operation, each on descriptors.

A method gets the node that the request is about, its arguments, and gives the answer's bytes; an
OSError becomes the guest's. All files belong, in the guest's eyes, to root when they belong to the
user who runs the machine, and to their owner's number otherwise; changes of owner are accepted and
forgotten. No file gets set-user-ID or set-group-ID, and no device node is made.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from functools import cache

from polyvisor.virtio import fuse
from polyvisor.virtio.fs_tree import Node, Tree, check_name, error
from polyvisor.virtio.fuse import Op

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    #: (node, arguments, room for the answer) to the answer.
    Operation = Callable[[int, bytes, int], bytes]

#: What of the guest's open flags counts on the host. No O_DIRECT: buffers may lie anywhere.
_OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
_NO_IDS = ~(stat.S_ISUID | stat.S_ISGID)
#: Modes of fallocate: keep the size, punch a hole, make zeroes.
_FALLOCATE = 0x01 | 0x02 | 0x10
_NOREPLACE, _EXCHANGE = 1, 2

#: Operations that change something: EROFS for a folder that is shared for reading.
CHANGES = frozenset(
    {
        Op.SETATTR, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.LINK,
        Op.WRITE, Op.SETXATTR, Op.REMOVEXATTR, Op.CREATE, Op.FALLOCATE, Op.RENAME2,
        Op.COPY_FILE_RANGE,
    }
)  # fmt: skip


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: Any) -> None:
    if getattr(_libc(), function)(*arguments) != 0:
        raise error(ctypes.get_errno())


def _user(name: bytes) -> str:
    """Only user attributes are shared; the others mean something to the host."""
    if not name.startswith(b"user."):
        raise error(errno.EOPNOTSUPP)
    return os.fsdecode(name)


def _names(data: bytes, count: int) -> list[bytes]:
    """The names that a request ends with. EINVAL when there are too few."""
    found = list(fuse.names(data, count))
    if len(found) < count:
        raise error(errno.EINVAL)
    return found


def _components(data: bytes, count: int) -> list[bytes]:
    """The same for names of files in a folder."""
    return [check_name(name) for name in _names(data, count)]


def _offset(value: int) -> int:
    if value >> 63:
        raise error(errno.EINVAL)
    return value


def _time(valid: int, which: int, now: int, old: int, seconds: int, ns: int) -> int:
    """A time to set, in nanoseconds: now, the given one (its seconds are signed), or the old."""
    if not valid & which:
        return old
    if valid & (fuse.SET_ATIME_NOW if which == fuse.SET_ATIME else fuse.SET_MTIME_NOW):
        return now
    return (seconds - (seconds >> 63 << 64)) * 1_000_000_000 + ns % 1_000_000_000


def _sized(value: bytes, size: int) -> bytes:
    """An attribute's value; its size when the guest has no room yet."""
    if size == 0:
        return fuse.GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise error(errno.ERANGE)
    return value


def drop_ids(fd: int) -> None:
    """What was written to has no set-user-ID any more, and no set-group-ID if it is executable."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & ~_NO_IDS:
        os.fchmod(fd, mode & _NO_IDS)


class Operations:
    """The operations on one tree. Those in `locked` are called with its lock held."""

    #: Seconds for which the guest may believe what it was told.
    VALID = 1

    def __init__(self, tree: Tree, *, read_only: bool) -> None:
        self.tree = tree
        self.read_only = read_only
        self._uid, self._gid = os.geteuid(), os.getegid()
        self._device = tree.root.key[0]
        self.locked: dict[int, Operation] = {
            Op.LOOKUP: self.lookup, Op.GETATTR: self.getattr, Op.SETATTR: self.setattr,
            Op.READLINK: self.readlink, Op.SYMLINK: self.symlink, Op.MKNOD: self.mknod,
            Op.MKDIR: self.mkdir, Op.UNLINK: self.unlink, Op.RMDIR: self.rmdir,
            Op.RENAME: self.rename, Op.RENAME2: self.rename2, Op.LINK: self.link,
            Op.OPEN: self.open, Op.CREATE: self.create, Op.RELEASE: self.release,
            Op.STATFS: self.statfs, Op.OPENDIR: self.opendir, Op.READDIR: self.readdir,
            Op.READDIRPLUS: self.readdirplus, Op.RELEASEDIR: self.releasedir,
            Op.ACCESS: self.access, Op.SETXATTR: self.setxattr, Op.GETXATTR: self.getxattr,
            Op.LISTXATTR: self.listxattr, Op.REMOVEXATTR: self.removexattr,
        }  # fmt: skip
        #: These may wait for the disk, and hold what they use themselves.
        self.slow: dict[int, Operation] = {
            Op.FSYNC: self.fsync, Op.FSYNCDIR: self.fsyncdir, Op.SYNCFS: self.syncfs,
            Op.FALLOCATE: self.fallocate, Op.LSEEK: self.lseek,
            Op.COPY_FILE_RANGE: self.copy_file_range,
        }  # fmt: skip

    # --- What a file looks like ------------------------------------------------------------------

    def _attributes(self, info: os.stat_result) -> bytes:
        inode = info.st_ino
        if info.st_dev != self._device:  # another file system's, mounted below
            inode = (inode + (info.st_dev << 40)) & 0xFFFFFFFFFFFFFFFF
        return fuse.attributes(
            info,
            0 if info.st_uid == self._uid else info.st_uid,
            0 if info.st_gid == self._gid else info.st_gid,
            inode,
        )

    def _entry(self, node: Node, info: os.stat_result) -> bytes:
        return fuse.entry(node.number, self.VALID, self._attributes(info))

    def _attr(self, info: os.stat_result) -> bytes:
        return fuse.ATTR_OUT.pack(self.VALID, 0, 0) + self._attributes(info)

    def lookup(self, number: int, data: bytes, room: int) -> bytes:
        (name,) = _components(data, 1)
        node, info = self.tree.lookup(self.tree.folder(number)[0], name)
        return self._entry(node, info)

    def getattr(self, number: int, data: bytes, room: int) -> bytes:
        flags, _, handle = fuse.GETATTR_IN.unpack_from(data)
        if flags & fuse.GETATTR_HANDLE:
            return self._attr(os.fstat(self.tree.handle(handle).fd))
        return self._attr(self.tree.stat(self.tree.node(number)))

    def setattr(self, number: int, data: bytes, room: int) -> bytes:
        fields = fuse.SETATTR_IN.unpack_from(data)
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode = fields[:12]
        node = self.tree.node(number)
        if valid & fuse.SET_SIZE:
            if valid & fuse.SET_HANDLE:
                self._truncate(self.tree.handle(handle).fd, size, valid)
            else:
                fd = self.tree.open_fd(node, os.O_WRONLY)
                try:
                    self._truncate(fd, size, valid)
                finally:
                    os.close(fd)
        if valid & fuse.SET_MODE:
            if node.kind == stat.S_IFLNK:
                raise error(errno.EOPNOTSUPP)
            os.chmod(self.tree.path(node), self._mode(node.kind, mode))
        if valid & (fuse.SET_ATIME | fuse.SET_MTIME):
            info = self.tree.stat(node)
            now = time.time_ns()
            times = (
                _time(valid, fuse.SET_ATIME, now, info.st_atime_ns, atime, atime_ns),
                _time(valid, fuse.SET_MTIME, now, info.st_mtime_ns, mtime, mtime_ns),
            )
            if node.kind == stat.S_IFLNK:  # no path leads to it but its own
                if node.parent is not None:
                    os.utime(
                        node.name,
                        ns=times,
                        dir_fd=self.tree.fd(node.parent),
                        follow_symlinks=False,
                    )
            else:
                os.utime(self.tree.path(node), ns=times)
        return self._attr(self.tree.stat(node))

    def _truncate(self, fd: int, size: int, valid: int) -> None:
        if size >> 63:
            raise error(errno.EINVAL)
        os.ftruncate(fd, size)
        if valid & fuse.SET_KILL_SUIDGID:
            drop_ids(fd)

    def _mode(self, kind: int, mode: int) -> int:
        """The permissions that a file gets: `mode` of the guest's without what would give the
        rights of its owner to who runs it on the host. (Of a folder, the group is inherited.)"""
        mode = stat.S_IMODE(mode)
        return mode & ~stat.S_ISUID if kind == stat.S_IFDIR else mode & _NO_IDS

    def access(self, number: int, data: bytes, room: int) -> bytes:
        (mask, _) = fuse.ACCESS_IN.unpack_from(data)
        if mask & os.W_OK and self.read_only:
            raise error(errno.EROFS)
        if mask & ~7 or not os.access(self.tree.path(self.tree.node(number)), mask):
            raise error(errno.EACCES)
        return b""

    def statfs(self, number: int, data: bytes, room: int) -> bytes:
        info = os.statvfs(self.tree.fd(self.tree.node(number)))
        return fuse.STATFS_OUT.pack(
            info.f_blocks,
            info.f_bfree,
            info.f_bavail,
            info.f_files,
            info.f_ffree,
            info.f_bsize,
            info.f_namemax,
            info.f_frsize,
        )

    # --- Names -----------------------------------------------------------------------------------

    def _made(self, parent: Node, name: bytes, mode: int | None) -> bytes:
        """The entry of what was just made, with the permissions that the guest meant: the umask of
        this process is not its own."""
        node, info = self.tree.lookup(parent, name)
        if mode is not None and stat.S_IMODE(info.st_mode) != mode and node.kind != stat.S_IFLNK:
            os.chmod(self.tree.path(node), mode)
            info = self.tree.stat(node)
        return self._entry(node, info)

    def mkdir(self, number: int, data: bytes, room: int) -> bytes:
        mode, _ = fuse.MKDIR_IN.unpack_from(data)
        (name,) = _components(data[fuse.MKDIR_IN.size :], 1)
        parent, folder = self.tree.folder(number)
        os.mkdir(name, stat.S_IMODE(mode) & 0o777, dir_fd=folder)
        inherited = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode & stat.S_ISGID
        return self._made(parent, name, self._mode(stat.S_IFDIR, mode) | inherited)

    def mknod(self, number: int, data: bytes, room: int) -> bytes:
        mode, _, _, _ = fuse.MKNOD_IN.unpack_from(data)
        (name,) = _components(data[fuse.MKNOD_IN.size :], 1)
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise error(errno.EPERM)
        parent, folder = self.tree.folder(number)
        os.mknod(name, kind | 0o600, dir_fd=folder)
        return self._made(parent, name, self._mode(kind, mode))

    def symlink(self, number: int, data: bytes, room: int) -> bytes:
        name, target = _names(data, 2)
        check_name(name)
        parent, folder = self.tree.folder(number)
        os.symlink(target, name, dir_fd=folder)
        return self._made(parent, name, None)

    def link(self, number: int, data: bytes, room: int) -> bytes:
        (old,) = fuse.LINK_IN.unpack_from(data)
        (name,) = _components(data[fuse.LINK_IN.size :], 1)
        node = self.tree.node(old)
        if node.kind == stat.S_IFDIR:
            raise error(errno.EPERM)
        parent, folder = self.tree.folder(number)
        os.link(self.tree.path(node), name, dst_dir_fd=folder, follow_symlinks=True)
        return self._made(parent, name, None)

    def readlink(self, number: int, data: bytes, room: int) -> bytes:
        node = self.tree.node(number)
        if node.kind != stat.S_IFLNK:
            raise error(errno.EINVAL)
        return os.readlink(b"", dir_fd=self.tree.fd(node))

    def unlink(self, number: int, data: bytes, room: int) -> bytes:
        return self._remove(number, data, os.unlink)

    def rmdir(self, number: int, data: bytes, room: int) -> bytes:
        return self._remove(number, data, os.rmdir)

    def _remove(self, number: int, data: bytes, remove: Any) -> bytes:
        (name,) = _components(data, 1)
        parent, _ = self.tree.folder(number)
        self.tree.hold_removed(parent, name)
        remove(name, dir_fd=self.tree.fd(parent))
        return b""

    def rename(self, number: int, data: bytes, room: int) -> bytes:
        (target,) = fuse.RENAME_IN.unpack_from(data)
        return self._rename(number, target, data[fuse.RENAME_IN.size :], 0)

    def rename2(self, number: int, data: bytes, room: int) -> bytes:
        target, flags, _ = fuse.RENAME2_IN.unpack_from(data)
        return self._rename(number, target, data[fuse.RENAME2_IN.size :], flags)

    def _rename(self, number: int, target: int, data: bytes, flags: int) -> bytes:
        name, new_name = _components(data, 2)
        if flags & ~(_NOREPLACE | _EXCHANGE):
            raise error(errno.EINVAL)
        source, _ = self.tree.folder(number)
        destination, _ = self.tree.folder(target)
        if not flags & _EXCHANGE:
            self.tree.hold_removed(destination, new_name)
        there = self.tree.fd(destination)
        here = self.tree.fd(source)
        if flags:
            _call("renameat2", here, name, there, new_name, flags)
        else:
            os.rename(name, new_name, src_dir_fd=here, dst_dir_fd=there)
        self.tree.moved(destination, new_name)
        if flags & _EXCHANGE:
            self.tree.moved(source, name)
        return b""

    # --- Open files ------------------------------------------------------------------------------

    def _open_flags(self, flags: int) -> int:
        if self.read_only and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC):
            raise error(errno.EROFS)
        if flags & os.O_ACCMODE == os.O_ACCMODE:
            raise error(errno.EINVAL)
        return flags & _OPEN_FLAGS

    def open(self, number: int, data: bytes, room: int) -> bytes:
        flags, more = fuse.OPEN_IN.unpack_from(data)
        node = self.tree.node(number)
        if node.kind == stat.S_IFDIR:
            raise error(errno.EISDIR)
        self.tree.room_for_handle()
        flags = self._open_flags(flags)
        fd = self.tree.open_fd(node, flags)
        if flags & os.O_TRUNC and more & fuse.OPEN_KILL_SUIDGID:
            drop_ids(fd)
        return fuse.OPEN_OUT.pack(self.tree.add_handle(fd, node, flags), 0, 0)

    def create(self, number: int, data: bytes, room: int) -> bytes:
        flags, mode, _, more = fuse.CREATE_IN.unpack_from(data)
        (name,) = _components(data[fuse.CREATE_IN.size :], 1)
        parent, folder = self.tree.folder(number)
        self.tree.room_for_handle()
        wanted = self._open_flags(flags)
        # What is there already may be anything: it is opened as what it is, or not at all.
        new = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, wanted | new, 0o600, dir_fd=folder)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            node, _ = self.tree.lookup(parent, name)
            try:
                opened = self.open(node.number, fuse.OPEN_IN.pack(flags, more), room)
            except OSError:
                self.tree.forget(node.number, 1)
                raise
            return self._entry(node, self.tree.stat(node)) + opened
        os.fchmod(fd, self._mode(stat.S_IFREG, mode))
        info = os.fstat(fd)
        node = self.tree.adopt(self.tree.reopen_path(fd), info)
        node.parent, node.name = parent, name
        node.lookups += 1
        handle = self.tree.add_handle(fd, node, wanted)
        return self._entry(node, info) + fuse.OPEN_OUT.pack(handle, 0, 0)

    def release(self, number: int, data: bytes, room: int) -> bytes:
        self.tree.release(*fuse.RELEASE_IN.unpack_from(data))
        return b""

    def fsync(self, number: int, data: bytes, room: int) -> bytes:
        handle, flags, _ = fuse.FSYNC_IN.unpack_from(data)
        with self.tree.using(handle) as file:
            fd = file.fd
            if flags & fuse.FSYNC_DATA:
                os.fdatasync(fd)
            else:
                os.fsync(fd)
        return b""

    def syncfs(self, number: int, data: bytes, room: int) -> bytes:
        if not self.read_only:
            fd = os.open(
                b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.tree.root.fd
            )
            try:
                _call("syncfs", fd)
            finally:
                os.close(fd)
        return b""

    def fallocate(self, number: int, data: bytes, room: int) -> bytes:
        handle, offset, length, mode, _ = fuse.FALLOCATE_IN.unpack_from(data)
        if mode & ~_FALLOCATE:
            raise error(errno.EOPNOTSUPP)
        with self.tree.using(handle) as file:
            fd = file.fd
            _call(
                "fallocate",
                fd,
                mode,
                ctypes.c_int64(_offset(offset)),
                ctypes.c_int64(_offset(length)),
            )
        return b""

    def lseek(self, number: int, data: bytes, room: int) -> bytes:
        handle, offset, whence, _ = fuse.LSEEK_IN.unpack_from(data)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise error(errno.EINVAL)
        with self.tree.using(handle) as file:
            fd = file.fd
            return fuse.LSEEK_OUT.pack(os.lseek(fd, _offset(offset), whence))

    def copy_file_range(self, number: int, data: bytes, room: int) -> bytes:
        source, at, _, target, to, length, flags = fuse.COPY_IN.unpack_from(data)
        if flags:
            raise error(errno.EINVAL)
        length = min(length, 1 << 26)  # as much again may be asked for
        with self.tree.using(source) as one, self.tree.using(target) as other:
            done = os.copy_file_range(one.fd, other.fd, length, _offset(at), _offset(to))
        return fuse.WRITE_OUT.pack(done, 0)

    # --- Folders ---------------------------------------------------------------------------------

    def opendir(self, number: int, data: bytes, room: int) -> bytes:
        node, _ = self.tree.folder(number)
        self.tree.room_for_handle()
        fd = self.tree.open_fd(node, os.O_RDONLY | os.O_DIRECTORY)
        return fuse.OPEN_OUT.pack(self.tree.add_handle(fd, node, 0), 0, 0)

    def releasedir(self, number: int, data: bytes, room: int) -> bytes:
        (handle,) = fuse.RELEASE_IN.unpack_from(data)
        self.tree.release(handle, folder=True)
        return b""

    def fsyncdir(self, number: int, data: bytes, room: int) -> bytes:
        handle, _, _ = fuse.FSYNC_IN.unpack_from(data)
        with self.tree.lock:
            fd = os.dup(self.tree.handle(handle, folder=True).fd)
        try:
            if not self.read_only:
                os.fsync(fd)
        finally:
            os.close(fd)
        return b""

    def _listing(self, data: bytes, room: int) -> tuple[Node, list[tuple[bytes, int]], int, int]:
        """The folder, its entries (name, inode) as they were when it was last read from the start,
        which of them is next, and the room for them."""
        number, offset, size, _ = fuse.READ_IN.unpack_from(data)
        handle = self.tree.listing(number, again=offset == 0)
        assert handle.entries is not None
        return handle.node, handle.entries, offset, min(size, room)

    def readdir(self, number: int, data: bytes, room: int) -> bytes:
        node, entries, offset, size = self._listing(data, room)
        result = bytearray()
        for at in range(offset, len(entries)):
            name, inode = entries[at]
            if len(result) + fuse.dirent_size(name) > size:
                break
            mode = 0 if inode else stat.S_IFDIR
            result += fuse.dirent(inode or node.key[1], at + 1, name, mode)
        return bytes(result)

    def readdirplus(self, number: int, data: bytes, room: int) -> bytes:
        node, entries, offset, size = self._listing(data, room)
        result = bytearray()
        for at in range(offset, len(entries)):
            name, inode = entries[at]
            if len(result) + fuse.ENTRY_SIZE + fuse.dirent_size(name) > size:
                break
            if inode == 0:  # "." and "..", which are no lookups
                result += bytes(fuse.ENTRY_SIZE)
                result += fuse.dirent(node.key[1], at + 1, name, stat.S_IFDIR)
                continue
            try:
                found, info = self.tree.lookup(node, name)
            except OSError:
                continue  # it has gone
            result += self._entry(found, info)
            result += fuse.dirent(inode, at + 1, name, info.st_mode)
        return bytes(result)

    # --- Extended attributes ---------------------------------------------------------------------

    def getxattr(self, number: int, data: bytes, room: int) -> bytes:
        size, _ = fuse.GETXATTR_IN.unpack_from(data)
        (name,) = _names(data[fuse.GETXATTR_IN.size :], 1)
        return _sized(os.getxattr(self._attributed(number), _user(name)), size)

    def listxattr(self, number: int, data: bytes, room: int) -> bytes:
        size, _ = fuse.GETXATTR_IN.unpack_from(data)
        names = os.listxattr(self._attributed(number))
        shared = (os.fsencode(name) + b"\0" for name in names if name.startswith("user."))
        return _sized(b"".join(shared), size)

    def setxattr(self, number: int, data: bytes, room: int) -> bytes:
        size, flags = fuse.SETXATTR_IN.unpack_from(data)
        (name,) = _names(data[fuse.SETXATTR_IN.size :], 1)
        start = fuse.SETXATTR_IN.size + len(name) + 1
        if len(data) < start + size:
            raise error(errno.EINVAL)
        os.setxattr(self._attributed(number), _user(name), data[start : start + size], flags)
        return b""

    def removexattr(self, number: int, data: bytes, room: int) -> bytes:
        (name,) = _names(data, 1)
        os.removexattr(self._attributed(number), _user(name))
        return b""

    def _attributed(self, number: int) -> bytes:
        node = self.tree.node(number)
        if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise error(errno.EOPNOTSUPP)
        return self.tree.path(node)
