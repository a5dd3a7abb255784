"""A whole boot on the specialised handlers against one on the generic operations alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from polyvisor import Machine, _native
from polyvisor import machine as machine_module
from polyvisor.images import kernel as kernels


def boot(kernel: Path, append: str = "") -> tuple[str, str, dict[str, Any], str]:
    """How a deterministic boot without a root file system ended: reason, RAM, registers, output."""
    with Machine(memory="256M", engine="soft", deterministic=True) as machine:
        machine.load(kernel=kernel, cmdline=f"console=ttyS0 panic=-1 {append}")
        info = machine.run(timeout=240)
        digest = hashlib.sha256(memoryview(machine.memory.region(0))).hexdigest()
        return info.reason, digest, dict(machine.cpu(0).registers), machine.console.transcript


@pytest.mark.slow
@pytest.mark.boot
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["cloud"])
def test_fast_and_generic_boots_are_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels.fetch(name).image
    fast = boot(kernel)
    assert "Unable to mount root fs" in fast[3]
    assert fast == boot(kernel), "two equal runs differ"

    class Reference(_native.Machine):
        def __init__(self, **config: Any) -> None:
            super().__init__(**{**config, "engine": "soft-reference"})

    monkeypatch.setattr(machine_module._native, "Machine", Reference)
    assert fast == boot(kernel), "specialised handlers and generic operations differ"
