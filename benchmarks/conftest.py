"""Benchmarks run alone, one after another: other tests' load would be measured with them."""

from __future__ import annotations

import pytest

from measure import FIGURES


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "benchmarks measure nothing under xdist; run them with 'make bench'"
        )
    # It says this when there is nothing to compare with yet, which is no fault of the code.
    config.addinivalue_line(
        "filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each benchmark found out: its table shows only how long it took."""
    if FIGURES:
        terminalreporter.section("figures")
    for name, figures in FIGURES:
        text = ", ".join(f"{figure} {value}" for figure, value in figures.items())
        terminalreporter.line(f"{name}: {text}")
