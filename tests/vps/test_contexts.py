"""VPSs that run, as root: starting, commands in them, snapshots, and whatever way they end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyvisor import Vps
from polyvisor.errors import HostError, ProcessTimeout, StateMismatch
from polyvisor.vps.limits import Cgroup, Limits
from polyvisor.vps.store import UID_BASE, Store

pytestmark = pytest.mark.needs_root
PATIENCE = 30.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def answers(vps: Vps) -> bool:
    """Whether commands run in it; False when it has ended, or ends and takes them along."""
    try:
        return vps.exec(["true"]).status == 0
    except StateMismatch:
        return False


def processes_of(number: int) -> list[str]:
    """The host's processes with user ids of that VPS, without those whose end nobody saw yet."""
    first = UID_BASE + number * 65536
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and first <= os.stat(f"/proc/{name}").st_uid < first + 65536:
                status = Path(f"/proc/{name}/stat").read_text()
                if status.rpartition(")")[2].split()[0] not in "ZX":
                    found.append(status)
        except OSError:
            continue
    return found


def assert_nothing_of(number: int, root: Path) -> None:
    """No process, cgroup, network interface, mount or file of VPS `number`."""
    assert processes_of(number) == []
    assert f"vps-{number}" not in Cgroup.names()
    assert not [name for name in os.listdir("/sys/class/net") if name.startswith(f"pv{number}-")]
    assert str(root) not in Path("/proc/self/mountinfo").read_text()


def test_start_exec_stop(vps_root: Path, tiny_base: Path) -> None:
    with Vps.create("one", base=tiny_base) as vps:
        with pytest.raises(StateMismatch, match="does not run"):
            vps.exec(["true"])
        vps.start()
        assert vps.status == "running"
        with pytest.raises(StateMismatch, match="runs already"):
            vps.start()
        result = vps.exec(["sh", "-c", "id -u; hostname; cat; echo no >&2; exit 3"], stdin=b"in")
        assert result == (3, b"0\none\nin", b"no\n")
        assert vps.exec(["sh", "-c", "kill -9 $$"]).status == 137
        with pytest.raises(HostError):
            vps.exec(["/bin/nothing"])
        with pytest.raises(ProcessTimeout):
            vps.exec(["sleep", "60"], timeout=0.2)
        until(lambda: "sleep" not in vps.exec(["ps"]).text)
        big = os.urandom(1 << 20)
        assert vps.exec(["cat"], stdin=big).stdout == big
        number = vps.id
    assert vps.status == "stopped"
    assert_nothing_of(number, vps_root)
    vps.stop()  # no error


def test_processes_are_nobody_on_the_host(vps_root: Path, tiny_base: Path) -> None:
    with Vps.create("one", base=tiny_base).start() as vps:
        assert processes_of(vps.id)
        vps.exec(["touch", "/file"])
        # On the disk ids are those of inside, so that a clone may have other ones on the host.
        assert (vps.path / "files/upper/file").stat().st_uid == 0
        clone = vps.clone("two")
        with clone.start():
            assert clone.exec(["ls", "-ln", "/file"]).text.split()[2] == "0"


def test_files_stay_and_the_base_does_too(vps_root: Path, tiny_base: Path) -> None:
    before = sorted(os.listdir(tiny_base))
    with Vps.create("one", base=tiny_base) as vps:
        vps.start()
        vps.exec(["sh", "-c", "echo kept >/root/file; rm /bin/false"])
        vps.snapshot("first")
        vps.exec(["sh", "-c", "echo lost >/root/file"])
        vps.stop(grace=0)
        vps.restore("first")
        vps.start()
        assert vps.exec(["cat", "/root/file"]).text == "kept\n"
        assert "false" not in vps.exec(["ls", "/bin"]).text
    assert sorted(os.listdir(tiny_base)) == before
    assert (tiny_base / "bin/false").is_symlink()


def test_ends_by_itself(vps_root: Path, tiny_base: Path) -> None:
    vps = Vps.create("one", base=tiny_base, init=["/bin/true"]).start()
    until(lambda: vps.status == "stopped")
    vps.tidy()
    assert_nothing_of(vps.id, vps_root)


def test_monitor_starts_it_again(vps_root: Path, tiny_base: Path) -> None:
    vps = Vps.create("one", base=tiny_base, restart="always").start()
    first = vps.info().pid
    os.kill(first, signal.SIGKILL)
    until(lambda: vps.status == "running" and vps.info().pid != first)
    assert vps.info().restarts == 1
    number = vps.id
    vps.stop(grace=0)
    assert vps.status == "stopped"
    assert_nothing_of(number, vps_root)


def test_commands_while_it_ends(vps_root: Path, tiny_base: Path) -> None:
    """They run, are killed along with it, or are told that it does not run: nothing else."""
    vps = Vps.create("ends", base=tiny_base)
    for _ in range(8):
        vps.start()
        pid = vps.info().pid
        killer = threading.Timer(0.03, os.kill, (pid, signal.SIGKILL))
        killer.start()
        until(lambda: not answers(vps))
        killer.join()
        vps.stop(grace=0)
    vps.delete()


def test_limits_that_change_are_seen(vps_root: Path, tiny_base: Path) -> None:
    vps = Vps.create("one", base=tiny_base, limits=Limits(memory=64 << 20))
    vps.start()
    for megabytes in (64, 128, 96):
        vps.limit(memory=megabytes << 20)
        seen = vps.exec(["cat", "/proc/meminfo"]).stdout.decode().splitlines()[0].split()
        assert seen == ["MemTotal:", str(megabytes << 10), "kB"]
    vps.stop(grace=0)


_VICTIM = """
import sys
from polyvisor import Vps
print(flush=True)
while True:
    vps = Vps.create("victim", base=sys.argv[1])
    vps.start()
    vps.exec(["true"])
    vps.stop(grace=0)
    vps.delete()
"""


def test_killed_at_any_moment(vps_root: Path, tiny_base: Path) -> None:
    """Whatever it was doing: the list is true, and stop and delete leave nothing."""
    moments = random.Random(7)
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, str(tiny_base)], stdout=subprocess.PIPE
        )
        with child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(moments.uniform(0, 0.4))
            child.kill()
        found = Vps.all()
        assert {vps.name for vps in found} <= {"victim"}
        for vps in found:
            number, info = vps.id, vps.info()
            if info.status == "running":
                # Or it was killed while it stopped, and is about to end.
                until(lambda vps=vps: answers(vps) or vps.status == "stopped")
            else:
                until(lambda number=number: processes_of(number) == [])
            vps.stop(grace=0)
            assert_nothing_of(number, vps_root)
            vps.delete()
        assert os.listdir(vps_root) == []
        assert str(vps_root) not in " ".join(
            os.readlink(f"/var/lib/polyvisor/ids/{number}") for number in Store().known_ids()
        )
