"""--stats and --irqchip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

CLI = [sys.executable, "-m", "polyvisor.cli"]
Done = subprocess.CompletedProcess[str]


def polyvisor(*arguments: str | Path) -> Done:
    return subprocess.run(
        [*CLI, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def run(directory: Path, *arguments: str) -> Done:
    path = tiny.kernel(tiny.say(b"hello\n") + tiny.debug_exit(0), directory)
    return polyvisor("run", "--memory", "64M", "--kernel", path, *arguments)


def test_run_shows_a_table(engine: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--engine", engine, "--stats")
    assert done.returncode == 1, done.stderr
    assert done.stdout == "hello\n"
    rows = [line.rsplit(maxsplit=2) for line in done.stderr.splitlines()]
    counted = {
        (" ".join(what.split()), which): int(count.replace(",", "")) for what, which, count in rows
    }
    assert counted["serial@0x3f8", "writes"] == 6
    assert counted["debug-exit@0xf4", "writes"] == 1
    if engine == "kvm":
        assert counted["cpu 0 exits:", "io"] >= 7


def test_nothing_is_shown_unasked(tmp_path: Path) -> None:
    assert run(tmp_path, "--engine", "soft").stderr == ""


@pytest.mark.kvm
@pytest.mark.parametrize("irqchip", ["auto", "user", "split", "kernel"])
def test_every_irqchip(irqchip: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--engine", "kvm", "--irqchip", irqchip)
    assert (done.returncode, done.stdout, done.stderr) == (1, "hello\n", "")


def test_an_irqchip_that_the_engine_has_not(tmp_path: Path) -> None:
    done = run(tmp_path, "--engine", "soft", "--irqchip", "kernel")
    assert done.returncode == 125
    assert "irqchip user" in done.stderr
    assert run(tmp_path, "--irqchip", "none").returncode == 2


@pytest.mark.boot
def test_exec_json() -> None:
    done = polyvisor("exec", "--engine", "soft", "--json", "--stats", "--", "true")
    result = json.loads(done.stdout)
    assert result["status"] == 0
    counted = result["statistics"]
    assert counted["engine"] == "soft"
    assert counted["kvm"] is None
    assert counted["cpus"][0]["counters"]["instructions"] > 1_000_000
    assert counted["devices"]["serial@0x2f8"]["writes"] > 0


@pytest.mark.boot
def test_exec_table() -> None:
    done = polyvisor("exec", "--engine", "soft", "--stats", "--", "echo", "out")
    assert done.stdout == "out\n"
    assert any(line.split()[:2] == ["serial@0x2f8", "writes"] for line in done.stderr.splitlines())
