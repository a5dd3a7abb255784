"""Tests of the command line."""

from __future__ import annotations

import pytest

from polyvisor import doctor


@pytest.fixture(autouse=True)
def settled_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that "auto" stands for here, without the note on stderr where KVM is there but
    slow: what comes over stderr is compared with what the guest's command wrote."""
    monkeypatch.setenv("POLYVISOR_ENGINE", doctor.taken_by_auto())
