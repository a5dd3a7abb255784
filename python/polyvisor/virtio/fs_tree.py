"""The files of a shared folder, as the guest knows them: nodes by number, open files by handle.

Nothing here ever walks a path. A node is a file that was found by one name in the folder of another
node (openat with O_PATH and O_NOFOLLOW), so a guest gets to nothing but the root folder and what is
below, whatever symbolic links there are and whoever renames folders meanwhile. Everything that is
done to a node is done to a descriptor of it.

Descriptors are few, and nodes are many: as many as the guest has names in its cache. So a node's
descriptor may be closed and is opened again when it is needed, through its folder's and by its
name; when that is another file by then, the node is stale (ESTALE). Nothing is opened for reading
or writing but regular files and folders.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

ROOT = 1
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME_MAX = 255
_LISTINGS = 64


def error(number: int) -> OSError:
    """What an operation raises; the guest gets the number."""
    return OSError(number, os.strerror(number))


def check_name(name: bytes) -> bytes:
    """A name is one component of a path, and not one that leads elsewhere."""
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise error(errno.EINVAL)
    if len(name) > _NAME_MAX:
        raise error(errno.ENAMETOOLONG)
    return name


class Node:
    """A file that the guest knows."""

    __slots__ = ("fd", "key", "kind", "lookups", "name", "number", "parent")

    def __init__(self, number: int, key: tuple[int, int], kind: int) -> None:
        self.number = number
        self.key = key  # device and inode number
        self.kind = kind  # the type bits of its mode
        self.fd = -1  # O_PATH; -1: none now
        self.lookups = 0  # how many of them the guest has not forgotten
        self.parent: Node | None = None
        self.name = b""


class Handle:
    """An open file or folder. Who uses the descriptor says so, as the guest may close it."""

    __slots__ = ("closed", "entries", "fd", "flags", "node", "users")

    def __init__(self, fd: int, node: Node, flags: int) -> None:
        self.fd = fd
        self.node = node
        self.flags = flags
        self.entries: list[tuple[bytes, int]] | None = None  # of a folder, as it was when opened
        self.users = 0
        self.closed = False


class Using:
    """`with tree.using(number) as handle`: the descriptor stays open meanwhile."""

    __slots__ = ("_handle", "_tree")

    def __init__(self, tree: Tree, handle: Handle) -> None:
        self._tree, self._handle = tree, handle

    def __enter__(self) -> Handle:
        return self._handle

    def __exit__(self, *_error: object) -> None:
        handle = self._handle
        with self._tree.lock:
            handle.users -= 1
            if handle.closed and not handle.users:
                os.close(handle.fd)


class Tree:
    """Nodes and handles of the folder `root`, which is opened now and for good.

    `descriptors` are how many it may have open at a time for nodes; as many again for handles. All
    calls but the use of a handle are made with `lock` held.
    """

    def __init__(self, root: int, descriptors: int) -> None:
        self.lock = threading.RLock()
        self._proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        info = os.fstat(root)
        self.root = Node(ROOT, (info.st_dev, info.st_ino), stat.S_IFDIR)
        self.root.fd = root
        self.most = max(16, descriptors)
        self.clear()

    def clear(self) -> None:
        """Forgets all nodes and handles, as at a new mount."""
        for handle in getattr(self, "handles", {}).values():
            self._close(handle)
        for node in getattr(self, "_open", {}):
            os.close(node.fd)
            node.fd = -1
        self.nodes: dict[int, Node] = {ROOT: self.root}
        self._by_key: dict[tuple[int, int], Node] = {self.root.key: self.root}
        self._open: dict[Node, None] = {}  # with a descriptor, the one used longest ago first
        self.handles: dict[int, Handle] = {}
        self._listed: deque[Handle] = deque()
        self._next_node, self._next_handle = ROOT + 1, 1

    def __del__(self) -> None:
        if hasattr(self, "_next_handle"):
            self.clear()
            os.close(self.root.fd)
            os.close(self._proc)

    # --- Nodes -----------------------------------------------------------------------------------

    def node(self, number: int) -> Node:
        """The node of that number. ESTALE for one that the guest was never told."""
        node = self.nodes.get(number)
        if node is None:
            raise error(errno.ESTALE)
        return node

    def fd(self, node: Node) -> int:
        """Its O_PATH descriptor, good until the next call."""
        if node.fd >= 0:
            if node is not self.root:  # which is not among those that are closed
                self._open[node] = self._open.pop(node, None)
            return node.fd
        way: list[Node] = []  # up to a folder that has one
        at: Node | None = node
        while at is not None and at.fd < 0:
            way.append(at)
            at = at.parent
            if len(way) > len(self.nodes) + 1:  # folders that the host moved into each other
                at = None
        if at is None:
            raise error(errno.ESTALE)
        found = at.fd
        for step in reversed(way):
            found = os.open(step.name, _PATH, dir_fd=found)
            info = os.fstat(found)
            if (info.st_dev, info.st_ino) != step.key or stat.S_IFMT(info.st_mode) != step.kind:
                os.close(found)
                raise error(errno.ESTALE)
            self._keep(step, found)
        return found

    def folder(self, number: int) -> tuple[Node, int]:
        """A node that is a folder, and its descriptor."""
        node = self.node(number)
        if node.kind != stat.S_IFDIR:
            raise error(errno.ENOTDIR)
        return node, self.fd(node)

    def stat(self, node: Node) -> os.stat_result:
        """What the host says of it now."""
        return os.fstat(self.fd(node))

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """The file of that name, which the guest knows once more from now on."""
        folder = self.fd(parent)
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        node = self._by_key.get((info.st_dev, info.st_ino))
        if node is None or node.kind != stat.S_IFMT(info.st_mode):
            found = os.open(name, _PATH, dir_fd=folder)
            info = os.fstat(found)  # it may be another one by now
            node = self.adopt(found, info)
        if node is not self.root:
            node.parent, node.name = parent, name
        node.lookups += 1
        return node, info

    def adopt(self, found: int, info: os.stat_result) -> Node:
        """The node of a descriptor (O_PATH), which is its own from now on."""
        key, kind = (info.st_dev, info.st_ino), stat.S_IFMT(info.st_mode)
        node = self._by_key.get(key)
        if node is not None and node.kind == kind:
            if node.fd >= 0:
                os.close(found)
            else:
                self._keep(node, found)
            return node
        node = Node(self._next_node, key, kind)
        self._next_node += 1
        self.nodes[node.number] = node
        self._by_key[key] = node
        self._keep(node, found)
        return node

    def forget(self, number: int, lookups: int) -> None:
        """The guest forgets some of its lookups of a node."""
        node = self.nodes.get(number)
        if node is None or node is self.root:
            return
        node.lookups = max(0, node.lookups - lookups)
        if node.lookups == 0:
            self._drop(node)

    def _drop(self, node: Node) -> None:
        del self.nodes[node.number]
        if self._by_key.get(node.key) is node:
            del self._by_key[node.key]
        if node.fd >= 0:
            self._open.pop(node, None)
            os.close(node.fd)
            node.fd = -1

    def moved(self, parent: Node, name: bytes) -> Node | None:
        """A file is to be found here: its node, if there is one, is told."""
        try:
            info = os.stat(name, dir_fd=self.fd(parent), follow_symlinks=False)
        except OSError:
            return None
        node = self._by_key.get((info.st_dev, info.st_ino))
        if node is None or node is self.root:
            return None
        node.parent, node.name = parent, name
        return node

    def hold_removed(self, parent: Node, name: bytes) -> None:
        """Before a name goes: its node, if the guest knows it, needs a descriptor, as there may be
        no other name to find it by."""
        node = self.moved(parent, name)
        if node is not None:
            self.fd(node)

    def _keep(self, node: Node, found: int) -> None:
        node.fd = found
        self._open[node] = None
        while len(self._open) > self.most:
            oldest = next(iter(self._open))
            del self._open[oldest]
            os.close(oldest.fd)
            oldest.fd = -1

    # --- Open files ------------------------------------------------------------------------------

    def path(self, node: Node) -> bytes:
        """A path that leads to the file of its descriptor and nowhere else, for calls that take no
        descriptor. Good until the next call of `fd`."""
        return b"/proc/self/fd/%d" % self.fd(node)

    def open_fd(self, node: Node, flags: int) -> int:
        """A descriptor to read or write. Special files are never opened: EACCES."""
        if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise error(errno.ELOOP if node.kind == stat.S_IFLNK else errno.EACCES)
        return os.open(b"%d" % self.fd(node), flags | os.O_CLOEXEC, dir_fd=self._proc)

    def reopen_path(self, fd: int) -> int:
        """An O_PATH descriptor of an open file."""
        return os.open(b"%d" % fd, os.O_PATH | os.O_CLOEXEC, dir_fd=self._proc)

    def room_for_handle(self) -> None:
        """EMFILE when there are as many open files as there may be."""
        if len(self.handles) >= self.most:
            raise error(errno.EMFILE)

    def add_handle(self, fd: int, node: Node, flags: int) -> int:
        """The number of a new open file."""
        number = self._next_handle
        self._next_handle += 1
        self.handles[number] = Handle(fd, node, flags)
        return number

    def handle(self, number: int, *, folder: bool = False) -> Handle:
        """An open file (or folder). EBADF when there is none of that number."""
        handle = self.handles.get(number)
        if handle is None or (handle.node.kind == stat.S_IFDIR) != folder:
            raise error(errno.EBADF)
        return handle

    def using(self, number: int) -> Using:
        """An open file, to be used without the lock. EBADF."""
        with self.lock:
            handle = self.handle(number)
            handle.users += 1
            return Using(self, handle)

    def listing(self, number: int, *, again: bool) -> Handle:
        """An open folder with its entries, read anew with `again`. Few folders' are kept: a guest
        that reads more of them at a time has them read anew."""
        handle = self.handle(number, folder=True)
        if handle.entries is None or again:
            with os.scandir(handle.fd) as found:
                entries = [(os.fsencode(entry.name), entry.inode()) for entry in found]
            handle.entries = [(b".", 0), (b"..", 0), *entries]
            self._listed.append(handle)
            if len(self._listed) > _LISTINGS:
                oldest = self._listed.popleft()
                if oldest not in self._listed:
                    oldest.entries = None
        return handle

    def release(self, number: int, *, folder: bool = False) -> None:
        """The guest has closed it."""
        handle = self.handle(number, folder=folder)
        del self.handles[number]
        self._close(handle)

    def _close(self, handle: Handle) -> None:
        handle.closed = True
        if not handle.users:
            os.close(handle.fd)

    # --- Snapshots -------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Nodes and handles by name, for json."""

        def nodes() -> Iterator[list[Any]]:
            for node in self.nodes.values():
                if node.parent is not None:
                    name = os.fsdecode(node.name)
                    yield [
                        node.number,
                        node.parent.number,
                        name,
                        *node.key,
                        node.kind,
                        node.lookups,
                    ]

        files = [[n, h.node.number, h.flags] for n, h in self.handles.items()]
        return {
            "next": [self._next_node, self._next_handle],
            "nodes": list(nodes()),
            "handles": files,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Puts back what `save` gave. What is not there any more is stale."""
        self.clear()
        for number, _parent, name, device, inode, kind, lookups in state["nodes"]:
            node = Node(number, (device, inode), kind)
            node.name, node.lookups = check_name(os.fsencode(name)), lookups
            self.nodes[number] = self._by_key[node.key] = node
        for number, parent, *_rest in state["nodes"]:
            self.nodes[number].parent = self.nodes.get(parent)
        for number, of, flags in state["handles"]:
            try:
                node = self.node(of)
                self.handles[number] = Handle(self.open_fd(node, flags & ~os.O_TRUNC), node, flags)
            except OSError:
                continue  # the guest gets EBADF
        self._next_node, self._next_handle = state["next"]
