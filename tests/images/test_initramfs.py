"""The user space of exec, and the encoding of its command."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import ConfigError, ImageError
from polyvisor.images import cpio, initramfs
from polyvisor.images.initramfs import Command

_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
_NAME = st.text(st.characters(codec="ascii", exclude_characters="\0="), min_size=1, max_size=10)


def decode(data: bytes) -> dict[str, list[str]]:
    """As guest/command.c reads it."""
    assert data.endswith(b"\0")
    records: dict[str, list[str]] = {}
    for record in data[:-1].split(b"\0"):
        text = record.decode("utf-8", "surrogateescape")
        records.setdefault(text[0], []).append(text[1:])
    return records


@given(st.lists(_TEXT, min_size=1, max_size=5), st.dictionaries(_NAME, _TEXT, max_size=5))
def test_the_command_comes_back(arguments: list[str], environment: dict[str, str]) -> None:
    records = decode(initramfs.encode(Command(arguments, environment, "/tmp", "host")))
    assert records["a"] == arguments
    variables = dict(entry.split("=", 1) for entry in records["e"])
    assert variables == {**initramfs.DEFAULT_ENVIRONMENT, **environment}
    assert records["d"] == ["/tmp"]
    assert records["h"] == ["host"]
    assert "t" not in records


def test_bytes_that_are_no_text_survive() -> None:
    argument = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert b"acaf\xe9\0" in initramfs.encode(Command([argument]))


def test_a_variable_can_be_taken_out() -> None:
    records = decode(initramfs.encode(Command(["true"], {"PATH": None}, terminal=True)))
    assert not any(entry.startswith("PATH=") for entry in records["e"])
    assert records["t"] == ["24 80"]


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (Command([]), "argv"),
        (Command(["a\0b"]), "argv"),
        (Command(["true"], {"A=B": "c"}), "env"),
        (Command(["true"], {"": "c"}), "env"),
        (Command(["true"] * 5000), "argv"),
        (Command(["x" * (3 << 20)]), "argv"),
    ],
)
def test_commands_that_cannot_be_passed(command: Command, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        initramfs.encode(command)
    assert caught.value.field == field


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_what_is_in_it(own_cache: Path) -> None:
    image = initramfs.build(Command(["true"]), files={"/opt/tool": b"#!/bin/sh\n"})
    members = {m.name: m for m in cpio.read(image)}
    for name in ("init", "bin/busybox", "opt/tool"):
        assert stat.S_IMODE(members[name].mode) == 0o755
        assert stat.S_ISREG(members[name].mode)
    assert members["bin/sh"].data == b"/bin/busybox"
    assert members["init"].data.startswith(b"\x7fELF")
    assert stat.S_ISCHR(members["dev/console"].mode)
    assert members[".polyvisor/command"].data == initramfs.encode(Command(["true"]))


def test_both_inits_are_small_and_static() -> None:
    for architecture in ("amd64", "i386"):
        init = initramfs.find_init(architecture)  # type: ignore[arg-type]
        assert initramfs.is_static(init)
        assert init.stat().st_size < 20_000


def test_a_busybox_that_needs_libraries(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYVISOR_BUSYBOX", "/bin/ls")
    with pytest.raises(ImageError, match="busybox-static") as caught:
        initramfs.build(Command(["true"]))
    assert caught.value.reason == "dynamic"


def test_no_busybox(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYVISOR_BUSYBOX", str(own_cache / "nothing"))
    with pytest.raises(ImageError, match="nothing") as caught:
        initramfs.build(Command(["true"]))
    assert caught.value.reason == "unreadable"
