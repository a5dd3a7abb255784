"""The rig itself: that it adds nothing to what the command does, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

RIG = Path(__file__).with_name("rig.py")
#: For a boot that takes four seconds, on a machine that is busy with other tests.
PATIENCE = 200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(PATIENCE + 60),
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
]


def rig(*words: str | Path, timeout: float = PATIENCE) -> list[str | Path]:
    return [sys.executable, RIG, "--timeout", str(timeout), *words]


def run(
    command: Sequence[str | Path], directory: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, cwd=directory)


def test_a_command_is_as_it_would_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output of any bytes, status, arguments, environment, directory, files; and there is a KVM."""
    data = random.Random(1).randbytes(200_000)
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "script").write_text(
        'cat data; cat data >&2; printf %s "$1$WORD"; ls -d --color=never /dev/kvm\n'
        "touch new && rm data || echo cannot write\nsleep 1000 & exit 42\n"
    )
    monkeypatch.setenv("WORD", "<üb'er\n>")
    done = run(rig("--", "bash", "script", "a '\"$\n b"), tmp_path)
    assert done.returncode == 42, done.stderr[-1000:]
    assert done.stdout == data + "a '\"$\n b<üb'er\n>/dev/kvm\n".encode()
    assert done.stderr == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "script"]


def test_a_time_limit() -> None:
    done = run(rig("--", "sleep", "1000", timeout=1))
    assert done.returncode == 124
    assert done.stderr == b"rig: stopped: not through after --timeout 1 seconds\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_running(number: int, status: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(rig("--", "sleep", "1000"), env=environment)
    try:
        for _ in range(PATIENCE * 10):
            if qemus(process.pid):
                break
            time.sleep(0.1)
        [qemu] = qemus(process.pid)
        process.send_signal(number)
        assert process.wait(30) == status
        # Stopped while it was being started, QEMU dies of its parent's death.
        for _ in range(50):
            if not Path(f"/proc/{qemu}").exists():
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{qemu}").exists()
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.wait()


def test_a_rig_that_is_killed_takes_qemu_along() -> None:
    process = subprocess.Popen(rig("--", "sleep", "1000"))
    try:
        for _ in range(PATIENCE * 10):
            if qemus(process.pid):
                break
            time.sleep(0.1)
        [qemu] = qemus(process.pid)
    finally:
        process.kill()
        process.wait()
    for _ in range(100):
        if state(qemu) in "ZX":
            return
        time.sleep(0.1)
    pytest.fail(f"QEMU (process {qemu}) lives on")


def qemus(parent: int) -> list[int]:
    """The children of the rig that have become QEMU."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in map(int, listed) if "qemu" in Path(f"/proc/{pid}/comm").read_text()]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def test_a_rig_that_crashes_says_what_it_said_last() -> None:
    done = run(rig("--", "sh", "-c", "echo before; echo c >/proc/sysrq-trigger"))
    assert (done.returncode, done.stdout) == (125, b"before\n")
    assert done.stderr.startswith(b"rig: the rig ended before the command did")
    assert b"Kernel panic - not syncing: sysrq" in done.stderr


def test_a_rig_that_does_not_start_says_why() -> None:
    done = run(rig("--cpu", "no-such-model", "--", "true"))
    assert done.returncode == 125
    assert b"no-such-model" in done.stderr


def test_without_qemu() -> None:
    done = subprocess.run(
        rig("--", "true"), capture_output=True, env={**os.environ, "PATH": "/nonexistent"}
    )
    assert done.returncode == 125
    assert b"apt-get install qemu-system-x86" in done.stderr
