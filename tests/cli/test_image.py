"""`polyvisor image`, and the options that give a machine its devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyvisor.cli import devices
from polyvisor.errors import ConfigError
from polyvisor.images import cache

POLYVISOR = [sys.executable, "-m", "polyvisor.cli"]


def polyvisor(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*POLYVISOR, *arguments], capture_output=True, check=False, timeout=60, stdin=0
    )


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("a.img", {"path": "a.img"}),
        ("a,,b.img,ro", {"path": "a,b.img", "read_only": True}),
        (
            "a.img,snapshot,format=qcow2,queues=2",
            {"path": "a.img", "snapshot": True, "format": "qcow2", "queues": 2},
        ),
        (
            "a,bps=10M,iops=100,serial=x,cache=none",
            {
                "path": "a",
                "bytes_per_second": 10 << 20,
                "operations_per_second": 100,
                "serial": "x",
                "cache": "none",
            },
        ),
    ],
)
def test_disks(text: str, arguments: dict[str, Any]) -> None:
    assert devices.parse_disk(text) == arguments


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no file"),
        (",ro", "has no file"),
        ("a,rw", "an option 'rw'; there are ro, snapshot"),
        ("a,ro,ro", "'ro' twice"),
        ("a,format=", "no value for 'format'"),
        ("a,ro=1", "an option 'ro=1'"),
        ("a,iops=many", "iops"),
    ],
)
def test_disks_that_make_no_sense(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        devices.parse_disk(text)


def test_vsocks() -> None:
    assert devices.parse_vsock("3") == {"cid": 3}
    assert devices.parse_vsock("7,/run/vm.sock") == {"cid": 7, "path": "/run/vm.sock"}
    for text in ("", "x", "3,", "-1", "3 "):
        with pytest.raises(ConfigError, match="CID,PATH"):
            devices.parse_vsock(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--disk", "/nonexistent.img"], "/nonexistent.img: No such file"),
        (["run", "--disk", "/etc/passwd"], "no ext2, ext3 or ext4 file system"),
        (["run", "--disk", "x,what"], "an option 'what'"),
        (["run", "--disk", "x", "--initrd", "y"], "needs its --kernel"),
        (["run", "--kernel", "x", "--net", "warp"], "begins with 'warp'"),
        (["run", "--kernel", "x", "--share", "here"], "HOST:GUEST"),
        (["run", "--kernel", "x", "--vsock", "here"], "CID,PATH"),
        (["exec", "--net", "user,hostfwd=x", "true"], "forwarded port"),
        (["exec", "--share", "x:y", "true"], "HOST:GUEST"),
        (["exec", "--image", "/nonexistent.img", "true"], "/nonexistent.img: No such file"),
        (["exec", "--image", "x", "--kernel", "686", "true"], "boots its own kernel"),
        (["image", "build", "debian", "-o", "/nonexistent/x.img"], "no directory /nonexistent"),
        (["image", "build", "debian", "-o", "/tmp/x.img", "--hostname", "a b"], "host name"),
        (["image", "info", "/nonexistent.img"], "/nonexistent.img: No such file"),
        (["image", "remove"], "--all"),
        (["image", "remove", "kernels/none"], "polyvisor image list"),
    ],
)
def test_one_clear_sentence(arguments: list[str], words: str) -> None:
    done = polyvisor(*arguments)
    text = done.stderr.decode()
    assert done.returncode == 125, text
    assert text.startswith("polyvisor: ")
    assert words in text
    assert text.count("\n") == 1
    assert done.stdout == b""


@pytest.mark.parametrize("command", ["build", "info", "list", "remove"])
def test_help(command: str) -> None:
    done = polyvisor("image", command, "--help")
    assert done.returncode == 0
    assert b"polyvisor image" in done.stdout
    assert polyvisor("image", "warp").returncode == 2


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path))
    about = b'{"package": "linux-image-x", "version": "6.1"}'

    def make(directory: Path) -> None:
        (directory / "info.json").write_bytes(about)

    cache.entry("kernels/cloud", make)
    cache.entry("rootfs/1-x", lambda directory: (directory / "f").touch())
    listing = json.loads(polyvisor("image", "list", "--json").stdout)
    assert listing["cache"] == str(tmp_path)
    names = {entry["name"]: entry["what"] for entry in listing["entries"]}
    assert names == {
        "kernels/cloud": "kernel: linux-image-x 6.1",
        "rootfs/1-x": "root file system",
    }
    assert b"kernels/cloud" in polyvisor("image", "list").stdout
    assert polyvisor("image", "remove", "kernels/cloud", "kernels/none").returncode == 125
    assert polyvisor("image", "remove", "kernels/cloud").returncode == 0
    assert not (tmp_path / "kernels/cloud").exists()
    assert polyvisor("image", "remove", "--all").returncode == 0
    assert json.loads(polyvisor("image", "list", "--json").stdout)["entries"] == []


def test_json_of_a_failure(tmp_path: Path) -> None:
    (tmp_path / "x.img").touch()
    done = polyvisor("image", "build", "debian", "-o", tmp_path / "x.img", "--json")
    assert done.returncode == 125
    result = json.loads(done.stdout)
    assert result["status"] == 125
    assert result["error"]["type"] == "ConfigError"
