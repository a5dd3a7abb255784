"""The FUSE protocol 7.31 as virtio-fs carries it: numbers and layouts of Linux's linux/fuse.h.

A request is an in-header, arguments and perhaps names or data; the answer an out-header and its
result. All is little-endian.
"""

from __future__ import annotations

import os
import stat
from enum import IntEnum
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAJOR, MINOR = 7, 31
ROOT = 1


class Op(IntEnum):
    """What a request asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50


# Flags of INIT.
ASYNC_READ = 1 << 0
ATOMIC_O_TRUNC = 1 << 3
BIG_WRITES = 1 << 5
AUTO_INVAL_DATA = 1 << 12
DO_READDIRPLUS = 1 << 13
READDIRPLUS_AUTO = 1 << 14
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
HANDLE_KILLPRIV_V2 = 1 << 28

# What a SETATTR is to change.
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME = (1 << n for n in range(6))
SET_HANDLE, SET_ATIME_NOW, SET_MTIME_NOW = 1 << 6, 1 << 7, 1 << 8
SET_KILL_SUIDGID = 1 << 11
GETATTR_HANDLE = 1
WRITE_KILL_SUIDGID = 1 << 2
OPEN_KILL_SUIDGID = 1 << 0
FSYNC_DATA = 1

# length, opcode, unique, node, uid, gid, pid, -
IN_HEADER = Struct("<IIQQIIII")
# length, -errno, unique
OUT_HEADER = Struct("<IiQ")

INIT_IN = Struct("<IIII")  # major, minor, readahead, flags
# major, minor, readahead, flags, background, congestion, max_write, granularity, max_pages, -
INIT_OUT = Struct("<IIIIHHIIHH28x4x")
FORGET = Struct("<Q")
BATCH_FORGET = Struct("<II")
FORGET_ONE = Struct("<QQ")
GETATTR_IN = Struct("<IIQ")  # flags, -, handle
# valid, -, handle, size, lock owner, atime, mtime, ctime, and their ns, mode, -, uid, gid, -
SETATTR_IN = Struct("<IIQQQQQQIIIIIIII")
MKNOD_IN = Struct("<IIII")  # mode, rdev, umask, -
MKDIR_IN = Struct("<II")  # mode, umask
RENAME_IN = Struct("<Q")  # new directory
RENAME2_IN = Struct("<QII")  # new directory, flags, -
LINK_IN = Struct("<Q")  # old node
OPEN_IN = Struct("<II")  # flags, open flags
CREATE_IN = Struct("<IIII")  # flags, mode, umask, open flags
OPEN_OUT = Struct("<QII")  # handle, open flags, -
RELEASE_IN = Struct("<Q")  # handle; flags, release flags, lock owner follow
READ_IN = Struct("<QQII")  # handle, offset, size, flags; lock owner, flags, - follow
READ_IN_SIZE = 40
WRITE_IN, WRITE_IN_SIZE = READ_IN, READ_IN_SIZE
WRITE_OUT = Struct("<II")  # size, -
STATFS_OUT = Struct("<QQQQQIII4x24x")
FSYNC_IN = Struct("<QII")  # handle, flags, -
SETXATTR_IN = Struct("<II")  # size, flags
GETXATTR_IN = Struct("<II")  # size, -
GETXATTR_OUT = Struct("<II")  # size, -
ACCESS_IN = Struct("<II")  # mask, -
FALLOCATE_IN = Struct("<QQQII")  # handle, offset, length, mode, -
LSEEK_IN = Struct("<QQII")  # handle, offset, whence, -
LSEEK_OUT = Struct("<Q")
COPY_IN = Struct("<QQQQQQQ")  # handle, offset, other node, handle, offset, length, flags
ATTR_OUT = Struct("<QII")  # seconds that it is good for, ns, -; the attributes follow
# node, generation, seconds that the name and the attributes are good for, their ns
ENTRY_OUT = Struct("<QQQQII")
# inode, size, blocks, atime, mtime, ctime, and their ns, mode, links, uid, gid, rdev, block size, -
ATTR = Struct("<QQQQQQIIIIIIIIII")
DIRENT = Struct("<QQII")  # inode, offset of the next, length of the name, type; the name follows

ENTRY_SIZE = ENTRY_OUT.size + ATTR.size


def attributes(info: os.stat_result, uid: int, gid: int, inode: int) -> bytes:
    """The attributes of a file, as the guest is to see them."""
    atime, mtime, ctime = info.st_atime_ns, info.st_mtime_ns, info.st_ctime_ns
    second = 1_000_000_000
    return ATTR.pack(
        inode,
        info.st_size,
        info.st_blocks,
        atime // second & 0xFFFFFFFFFFFFFFFF,
        mtime // second & 0xFFFFFFFFFFFFFFFF,
        ctime // second & 0xFFFFFFFFFFFFFFFF,
        atime % second,
        mtime % second,
        ctime % second,
        info.st_mode,
        info.st_nlink & 0xFFFFFFFF,
        uid,
        gid,
        device_number(info.st_rdev),
        info.st_blksize,
        0,
    )


def device_number(rdev: int) -> int:
    """Linux's 32-bit encoding of a device number (new_encode_dev)."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12) & 0xFFFFFFFF


def entry(node: int, seconds: int, attr: bytes) -> bytes:
    """The answer to a lookup."""
    return ENTRY_OUT.pack(node, 0, seconds, seconds, 0, 0) + attr


def dirent(inode: int, offset: int, name: bytes, mode: int) -> bytes:
    """One entry of a directory; `mode` has its type (0: unknown)."""
    padding = -len(name) % 8
    kind = stat.S_IFMT(mode) >> 12
    return DIRENT.pack(inode, offset, len(name), kind) + name + bytes(padding)


def dirent_size(name: bytes) -> int:
    """How many bytes `dirent` makes."""
    return DIRENT.size + (len(name) + 7 & ~7)


def names(data: bytes, count: int) -> Iterator[bytes]:
    """The first `count` zero-terminated strings; fewer when there are not so many."""
    start = 0
    for _ in range(count):
        end = data.find(b"\0", start)
        if end < 0:
            return
        yield data[start:end]
        start = end + 1
