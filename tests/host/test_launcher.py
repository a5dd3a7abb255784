"""launch() and attach(): roots that mean harm, shifted owners, entering what runs, terminals."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leftovers import Leftovers
from polyvisor import _native
from polyvisor.errors import ConfigError, HostError
from readable import open_to_all

BASE = 100000  # of the ids outside
IDS: dict[str, Any] = {"uid_map": [(0, BASE, 65536)], "gid_map": [(0, BASE, 65536)]}
SHELL = "/bin/busybox"

pytestmark = pytest.mark.needs_root


@pytest.fixture
def root_folder(tmp_path: Path) -> Path:
    """A root file system of busybox, of root's."""
    busybox = next(
        (path for path in ("/bin/busybox", "/usr/bin/busybox") if os.path.exists(path)), ""
    )
    if not busybox:
        pytest.skip("busybox-static is not installed")
    open_to_all(tmp_path)
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    subprocess.run(["cp", busybox, root / "bin/busybox"], check=True)
    return root


def output(argv: list[str], **options: Any) -> tuple[str, int]:
    """What it writes, and its exit status."""
    out = os.memfd_create("out")
    try:
        spec = _native.LaunchSpec(argv, stdout=out, stderr=2, **{**IDS, **options})
        status = _native.run(spec, 60)
        assert status is not None
        return os.pread(out, 1 << 16, 0).decode(), os.waitstatus_to_exitcode(status)
    finally:
        os.close(out)


@pytest.mark.parametrize(
    "target",
    ["/proc", "/a/b/c", "/up/../../../../mark", "/link/x", "/deep/link/y", "/chain/z"],
)
def test_mount_targets_in_a_hostile_root(root_folder: Path, tmp_path: Path, target: str) -> None:
    """Where links of the root lead, from the host's point of view, nothing appears."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (root_folder / "link").symlink_to(outside)
    (root_folder / "deep").mkdir()
    (root_folder / "deep" / "link").symlink_to("../../outside")
    (root_folder / "chain").symlink_to("/deep/link")
    (root_folder / "proc").symlink_to("../outside")
    os.chown(root_folder, BASE, BASE)
    os.chown(root_folder / "deep", BASE, BASE)
    mount = _native.Mount("tmpfs", target=target)
    with contextlib.suppress(HostError):  # refused is as good
        output([SHELL, "true"], root=str(root_folder), mounts=[mount])
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "mark").exists()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_masks_are_not_led_out(root_folder: Path) -> None:
    (root_folder / "shadow").symlink_to("/etc/shadow")
    (root_folder / "dev").symlink_to("/")
    text, status = output(
        [SHELL, "true"],
        root=str(root_folder),
        masked=["/shadow", "/none"],
        read_only_paths=["/dev"],
    )
    assert (text, status) == ("", 0)
    assert stat.S_ISREG(os.stat("/etc/shadow").st_mode)


def test_an_idmapped_overlay(root_folder: Path, tmp_path: Path) -> None:
    """Files of root's on the host are root's inside, and what that makes is root's outside."""
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    (root_folder / "file").write_text("from below")
    layers: dict[str, Any] = {
        "lower": [str(root_folder)],
        "upper": f"{tmp_path}/upper",
        "work": f"{tmp_path}/work",
    }
    script = "busybox stat -c %u /file; busybox cat /file; echo new > /file; echo x > /other"
    text, status = output([SHELL, "sh", "-c", script], env=["PATH=/bin"], idmapped=True, **layers)
    assert (text, status) == ("0\nfrom below", 0)
    assert (root_folder / "file").read_text() == "from below"
    assert (tmp_path / "upper/file").read_text() == "new\n"
    assert (tmp_path / "upper/other").stat().st_uid == 0


def test_what_cannot_be_launched(root_folder: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "uid_map": {"uid_map": []},
        "argv": {"argv": [""]},
        "root": {"root": "relative"},
        "read_only_root": {"root": "", "read_only_root": False},
        "mounts": {"mounts": [_native.Mount("dev", target="/x")]},
        "namespaces": {"namespaces": 0},
        "cwd": {"cwd": ""},
    }
    for field, options in refused.items():
        wanted: dict[str, Any] = {"argv": ["true"], "root": str(root_folder), **IDS, **options}
        with pytest.raises(ConfigError) as error:
            _native.launch(_native.LaunchSpec(**wanted))
        assert error.value.field == field
    with pytest.raises(ConfigError):
        _native.LaunchSpec(["true"], seccomp="nonsense")
    with pytest.raises(HostError):
        output(["true"], root="/no/such/folder")


@pytest.fixture
def running(root_folder: Path) -> Iterator[_native.Launched]:
    """Only init, with a /proc and /dev."""
    os.chown(root_folder, BASE, BASE)
    mounts = [_native.Mount("proc", target="/proc"), _native.Mount("dev", target="/dev")]
    spec = _native.LaunchSpec([], root=str(root_folder), mounts=mounts, hostname="inside", **IDS)
    with _native.launch(spec) as launched:
        launched.go()
        yield launched


def enter(running: _native.Launched, script: str, **options: Any) -> tuple[str, int]:
    out = os.memfd_create("out")
    try:
        spec = _native.LaunchSpec(
            [SHELL, "sh", "-c", script],
            env=["PATH=/bin"],
            stdout=out,
            stderr=2,
            **{**IDS, **options},
        )
        with _native.attach(running.pidfd, spec) as attached:
            attached.go()
            status = attached.wait(60)
        assert status is not None
        return os.pread(out, 1 << 16, 0).decode(), os.waitstatus_to_exitcode(status)
    finally:
        os.close(out)


def test_entering(running: _native.Launched) -> None:
    enter(running, ":")
    before = Leftovers()
    text, status = enter(
        running, "busybox hostname; busybox id -u; busybox cat /proc/1/comm; exit 9"
    )
    assert (text, status) == ("inside\n0\npolyvisor-init\n", 9)
    # In all of the namespaces, with the same filter and no capability.
    text, _ = enter(running, "busybox grep -E 'CapBnd|Seccomp:|NoNewPrivs' /proc/self/status")
    assert text.split() == ["CapBnd:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2"]
    text, _ = enter(
        running, "for n in user mnt pid net ipc uts; do busybox readlink /proc/self/ns/$n; done"
    )
    inside = [os.readlink(f"/proc/{running.pid}/ns/{kind}") for kind in ("user", "mnt", "pid")]
    assert text.split()[:3] == inside
    # What it has open is its own, and the host's processes are not to be seen.
    text, _ = enter(running, "busybox ls /proc/self/fd; busybox ls -d /proc/[0-9]* | busybox wc -l")
    assert text.split()[:3] == ["0", "1", "2"]
    assert int(text.split()[-1]) <= 4
    before.check()


def test_what_enters_dies_with_the_namespaces(running: _native.Launched) -> None:
    spec = _native.LaunchSpec([SHELL, "sleep", "1000"], **IDS)
    with _native.attach(running.pidfd, spec) as attached:
        attached.go()
        assert attached.wait(0.05) is None
        running.kill()
        assert attached.wait(30) == 9
    with pytest.raises(HostError):
        enter(running, ":")


def test_entering_what_is_not_there(running: _native.Launched) -> None:
    spec = _native.LaunchSpec(["/no/such/program"], **IDS)
    with _native.attach(running.pidfd, spec) as attached, pytest.raises(HostError) as error:
        attached.go()
    assert error.value.path == "/no/such/program"


def test_a_terminal(running: _native.Launched) -> None:
    spec = _native.LaunchSpec(
        [SHELL, "sh", "-c", "busybox tty; read line; echo got $line"],
        env=["PATH=/bin"],
        terminal=True,
        **IDS,
    )
    with _native.attach(running.pidfd, spec) as attached:
        attached.go()
        assert attached.terminal is not None
        os.write(attached.terminal, b"word\n")
        assert attached.wait(30) == 0
        text = os.read(attached.terminal, 4096).decode()
    assert "/dev/pts/0" in text
    assert "got word" in text


def test_a_detached_one_outlives_its_launcher(root_folder: Path) -> None:
    os.chown(root_folder, BASE, BASE)
    program = (
        "from polyvisor import _native\n"
        f"spec = _native.LaunchSpec([], root={str(root_folder)!r}, detached=True, **{IDS})\n"
        "launched = _native.launch(spec)\nlaunched.go()\nprint(launched.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    pid = int(done.stdout)
    pidfd = os.pidfd_open(pid)
    try:
        assert Path(f"/proc/{pid}/comm").read_text() == "polyvisor-init\n"
        os.kill(pid, 15)  # (init alone ends at SIGTERM)
        end = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":
                break  # whoever adopted it is in no hurry
            time.sleep(0.02)
        assert time.monotonic() < end
    finally:
        os.close(pidfd)
