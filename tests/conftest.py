"""Options and fixtures that the whole suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root")
    for item in items:
        if item.get_closest_marker("needs_root"):
            item.add_marker(skip)


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
