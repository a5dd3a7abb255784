"""Virtual private servers: Linux systems of their own on the host's kernel (docs/vps.md).

with polyvisor.Vps.create("web", base="debian") as web:
    web.start()
    print(web.exec(["ps", "aux"]).text)
"""

from __future__ import annotations

from polyvisor.vps.context import Vps
from polyvisor.vps.execution import Result

__all__ = ["Result", "Vps"]
