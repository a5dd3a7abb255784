from __future__ import annotations

from pathlib import Path

import pytest

import polyvisor
from polyvisor import _native
from polyvisor.config import (
    MAX_MEMORY,
    MachineConfig,
    from_dict,
    from_toml,
    host_memory,
    parse_size,
    show_size,
)
from polyvisor.errors import ConfigError, EngineUnavailable


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("1.5G", 3 << 29),
        ("2GiB", 2 << 30),
        ("64 KB", 64 << 10),
        ("4096", 4096),
        ("1T", 1 << 40),
        (8192, 8192),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "12X", "-1M", "1.3", "0x10", -4096, 1.5, None, True])
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)  # type: ignore[arg-type]
    assert caught.value.field == "memory"


@pytest.mark.parametrize(
    ("size", "text"),
    [(512 << 20, "512 MiB"), (3 << 29, "1.5 GiB"), (4096, "4 KiB"), (100, "100 bytes")],
)
def test_sizes_are_shown(size: int, text: str) -> None:
    assert show_size(size) == text


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("memory", {"memory": 0}),
        ("memory", {"memory": "0M"}),
        ("memory", {"memory": "4K"}),
        ("memory", {"memory": (1 << 20) + 1}),
        ("memory", {"memory": "900G"}),
        ("memory", {"memory": "lots"}),
        ("cpus", {"cpus": 0}),
        ("cpus", {"cpus": -1}),
        ("cpus", {"cpus": 100_000}),
        ("cpus", {"cpus": 1.5}),
        ("cpus", {"cpus": True}),
        ("cpus", {"cpus": 2, "deterministic": True}),
        ("engine", {"engine": "steam"}),
        ("engine", {"engine": "kvm", "deterministic": True}),
        ("tsc_khz", {"tsc_khz": 0}),
        ("serial_ports", {"serial_ports": 5}),
        ("serial_ports", {"serial_ports": 0}),
        ("ns_per_1000_instructions", {"ns_per_1000_instructions": 0}),
    ],
)
def test_what_cannot_work_is_refused(field: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        polyvisor.Machine(**options)  # type: ignore[arg-type]
    assert caught.value.field == field
    text = str(caught.value)
    assert text
    assert "\n" not in text


def test_more_memory_than_the_host_has() -> None:
    size = (host_memory() // 4096 + 1) * 4096
    if size > MAX_MEMORY:
        pytest.skip("this host has more than any machine may")
    with pytest.raises(ConfigError, match="more than this host has"):
        MachineConfig(memory=size).validated()


def test_an_engine_that_cannot_run_here_says_why() -> None:
    reasons = {name: reason for name, reason, _ in _native.engines()}
    assert reasons["soft"] == ""
    if not reasons["kvm"]:
        pytest.skip("KVM works here")
    with pytest.raises(EngineUnavailable) as caught:
        polyvisor.Machine(memory="1M", engine="kvm")
    assert caught.value.engine == "kvm"
    assert caught.value.reason == reasons["kvm"]
    with polyvisor.Machine(memory="1M", engine="auto") as machine:
        assert machine.engine == "soft"


def test_unknown_cpu_model_is_refused() -> None:
    with pytest.raises(ConfigError):
        polyvisor.Machine(memory="1M", cpu_model="z80")


def test_from_plain_data(tmp_path: Path) -> None:
    assert from_dict({"memory": "64M", "cpus": 2}).memory_size == 64 << 20
    for bad in ({"memori": "64M"}, {"cpus": "two"}, {"engine": "steam"}):
        with pytest.raises(ConfigError) as caught:
            from_dict(bad)
        assert caught.value.field == next(iter(bad))
    file = tmp_path / "machine.toml"
    file.write_text('[machine]\nmemory = "1G"\ncpus = 4\n')
    assert from_toml(file).cpus == 4
    file.write_text("[machine\n")
    with pytest.raises(ConfigError, match="not TOML"):
        from_toml(file)
    with pytest.raises(ConfigError, match="cannot read"):
        from_toml(tmp_path / "none.toml")


def test_a_config_and_changes_to_it() -> None:
    config = MachineConfig(memory="2M", name="base")
    with polyvisor.Machine(config, cpus=2) as machine:
        assert machine.cpus == 2
        assert machine.memory_size == 2 << 20
        assert machine.name == "base"
        assert "base" in repr(machine)
