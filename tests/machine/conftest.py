"""Machines run on every engine: tests that do not choose one themselves get each in turn."""

from __future__ import annotations

import pytest

#: What they check is the same on every engine.
BOTH_ENGINES = {
    "test_actions",
    "test_console",
    "test_errors",
    "test_fast",
    "test_lifecycle",
    "test_python_devices",
    "test_registers",
    "test_signals",
    "test_snapshot",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A second run of each test on kvm."""
    name = metafunc.module.__name__.rpartition(".")[2]
    if name in BOTH_ENGINES and not {"engine", "fast_engine"} & set(metafunc.fixturenames):
        boots = metafunc.definition.get_closest_marker("boot") is not None
        marks = [pytest.mark.kvm, pytest.mark.kvm_fast] if boots else [pytest.mark.kvm]
        engines = ["soft", pytest.param("kvm", marks=marks)]
        metafunc.parametrize("default_engine", engines, indirect=True)


@pytest.fixture(autouse=True)
def default_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What engine="auto" means during the test, where it is parametrized."""
    engine: str = getattr(request, "param", "auto")
    if engine != "auto":
        monkeypatch.setenv("POLYVISOR_ENGINE", engine)
    return engine
