"""Options and fixtures that the whole suite shares."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from polyvisor import kvm_probe

# A loaded machine is slow, which is no failure; CI must fail for what was changed, not by chance.
settings.register_profile("polyvisor", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("polyvisor")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native-build",
        type=Path,
        default=Path(os.environ.get("POLYVISOR_NATIVE_BUILD", ROOT / "build" / "default")),
        help="CMake build directory with the native tests (default: build/default)",
    )


#: Million instructions per second at ring 0 that tests marked kvm_fast want. Hosts that emulate it
#: manage one or two, hardware hundreds, even hardware that is busy or is itself an emulator's.
FAST_MIPS = 50.0
KVM_MARKERS = {"kvm", "kvm_fast", "kvm_native"}


@cache
def no_kvm(fast: bool) -> str:
    """Why tests that need KVM (a fast one?) cannot run here; empty when they can."""
    found = kvm_probe.probe(measure=fast)
    if found.reason:
        return found.sentence
    if fast and (found.mips or 0) < FAST_MIPS:
        return "this /dev/kvm emulates ring 0, which is slower than the soft engine"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")
    fast = item.get_closest_marker("kvm_fast") is not None
    if (fast or item.get_closest_marker("kvm")) and (reason := no_kvm(fast)):
        pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of what needs KVM was left out, which a green run must not hide."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
        if KVM_MARKERS & report.keywords.keys() and isinstance(report.longrepr, tuple)
    )
    for reason, count in reasons.most_common():
        terminalreporter.line(f"KVM tests skipped: {count} ({reason})")


@pytest.fixture(params=["soft", pytest.param("kvm", marks=pytest.mark.kvm)])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine's name, for tests with guests of a few thousand instructions."""
    name: str = request.param
    return name


@pytest.fixture(params=["soft", pytest.param("kvm", marks=[pytest.mark.kvm, pytest.mark.kvm_fast])])
def fast_engine(request: pytest.FixtureRequest) -> str:
    """Each engine's name, for tests whose guests run for long: booted kernels, long loops."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def native_build(pytestconfig: pytest.Config) -> Path:
    """The CMake build directory that holds the native tests and libraries."""
    build: Path = pytestconfig.getoption("native_build")
    if not (build / "CMakeCache.txt").is_file():
        pytest.fail(f"{build} is not a CMake build directory; run 'make build-all' first")
    return build.resolve()
