"""`unify` for all VPSs of a store: the files of each are its own again when it writes to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from polyvisor.vps import unify
from polyvisor.vps.context import Vps
from polyvisor.vps.store import Store


def unify_all(store: Store, progress: Callable[[str], None] | None = None) -> unify.UnifyReport:
    """Makes identical files one on the disk. Nobody can start, stop or change VPSs meanwhile."""
    report = progress or (lambda text: None)
    with contextlib.ExitStack() as stack:
        trees = []
        for vps in Vps.all(root=store.root):
            stack.enter_context(store.lock(vps.name))
            folder = vps.path / "files"
            trees.append(
                unify.Tree(vps.name, folder / "upper", folder / "shared", vps.status != "stopped")
            )
        report(f"comparing the files of {len(trees)} VPSs")
        return unify.unify(trees, store.root / ".unify" / "objects")


__all__ = ["unify_all"]
