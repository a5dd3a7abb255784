"""polyvisor.vps.limits: what values mean, and that the host's kernel holds to them."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from leftovers import Leftovers
from polyvisor import _native
from polyvisor.errors import ConfigError, HostError, LimitUnavailable
from polyvisor.vps.limits import Cgroup, Limits, cpu_numbers

PATIENCE = 20.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture(scope="module")
def tree() -> Iterator[_native.CgroupTree]:
    """Cgroups of these tests alone; their directory goes with the last."""
    made = _native.CgroupTree(f"polyvisor-test-{os.getpid()}")
    parents = [parent for _, parent, _ in made.hierarchies()]
    yield made
    for name in made.names():
        left = Cgroup.open(name, tree=made)
        left.kill()
        left.remove()
    for parent in parents:
        os.rmdir(parent)


@contextlib.contextmanager
def running(cgroup: Cgroup, program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that begins once it is in the cgroup."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", f"input()\n{program}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as started:
        assert started.stdin is not None
        try:
            cgroup.attach(started.pid)
            started.stdin.write("\n")
            started.stdin.flush()
            yield started
        finally:
            started.kill()


def output(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("memory", bad) for bad in ("lots", -1, 100, True, 1.5)),
        *(("swap", bad) for bad in ("x", -5)),
        *(("cpus", bad) for bad in (-1, 0, 0.001, "half", True, float("nan"), float("inf"))),
        *(("cpu_shares", bad) for bad in (1, 300_000, "1024")),
        *(("pids", bad) for bad in (0, -3, 1.0, True, 1 << 40)),
        *(("io_read", bad) for bad in ("fast", 0, {"/dev/null": 1}, {"/nowhere": 1})),
        *(("cpuset", bad) for bad in ("", "a", "3-1", "0-", "99999")),
        *(("devices", bad) for bad in (["c 1:3"], ["x 1:3 rw"], ["c 1 rw"], "none", [7])),
    ],
)
def test_bad_values_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Limits(**{field: value})
    assert caught.value.field == field


def test_a_burst_is_saved_from_a_quota() -> None:
    for bad in ({"cpu_burst": 0.1}, {"cpus": 0.5, "cpu_burst": 0.06}, {"cpus": 1, "cpu_burst": -1}):
        with pytest.raises(ConfigError) as caught:
            Limits(**bad)
        assert caught.value.field == "cpu_burst"
    Limits(cpus=0.5, cpu_burst=0.05)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_lists_of_cpus(numbers: set[int]) -> None:
    assert cpu_numbers(",".join(map(str, numbers))) == sorted(numbers)
    assert cpu_numbers(f"{min(numbers)}-{max(numbers)}") == list(
        range(min(numbers), max(numbers) + 1)
    )


def test_without_cgroups_only_processes_are_counted() -> None:
    import resource

    assert Limits(pids=7).rlimits() == [(resource.RLIMIT_NPROC, 7, 7)]
    assert Limits().rlimits() == []
    for named, controller in (("memory", "memory"), ("cpus", "cpu"), ("io_write", "io")):
        values = {"memory": "1M", "cpus": 1, "io_write": {}}
        with pytest.raises(LimitUnavailable) as caught:
            Limits(**{named: values[named]}).rlimits()
        assert caught.value.controller == controller


def test_no_hierarchy_is_no_limit_and_said() -> None:
    nothing = _native.CgroupTree("polyvisor", "", "")
    with pytest.raises(LimitUnavailable) as caught:
        Cgroup.create("x", Limits(pids=3), tree=nothing)
    assert caught.value.controller == "pids"
    # A tree that this user may not write to: every user may read /proc.
    other = _native.CgroupTree("p", "9 8 0:1 / /proc/self/task rw - cgroup2 none rw\n", "0::/\n")
    with pytest.raises(LimitUnavailable, match=r"systemd-run|cannot be made"):
        Cgroup.create("x", Limits(memory="1M"), tree=other)


@pytest.mark.needs_root
class TestHost:
    """On the host's own hierarchies, whichever those are."""

    def test_life(self, tree: _native.CgroupTree) -> None:
        before = Leftovers()
        for complete in (True, False):
            limits = Limits(memory="64M", cpus=0.5, cpu_burst=0.02, pids=20)
            with Cgroup.create("life", limits, tree=tree, complete=complete) as cgroup:
                assert Cgroup.names(tree=tree) == ["life"]
                with pytest.raises(HostError):
                    Cgroup.create("life", limits, tree=tree)
                assert len(cgroup.fds()) >= 1
                for fd in cgroup.fds():
                    assert stat.S_ISDIR(os.fstat(fd).st_mode)
                with running(cgroup, "input()") as program:
                    again = Cgroup.open("life", tree=tree)
                    assert again.processes() == [program.pid]
                    assert again.stats().pids == 1
                    with pytest.raises(HostError):
                        again.remove()
                    cgroup.kill()
                    assert program.wait(PATIENCE) == -signal.SIGKILL
                cgroup.remove()
                again.remove()  # gone already
            assert Cgroup.names(tree=tree) == []
            with pytest.raises(HostError):
                Cgroup.open("life", tree=tree)
        del cgroup, again, program
        before.check()

    def test_bad_names(self, tree: _native.CgroupTree) -> None:
        for name in ("", ".", "..", "a/b", "a.b", "x" * 65, "a\n", "é"):
            with pytest.raises(ConfigError):
                Cgroup.create(name, tree=tree)

    def test_a_failed_creation_leaves_nothing(self, tree: _native.CgroupTree) -> None:
        wrong = _native.CgroupLimits(pids=3, cpu_quota=1)  # below the kernel's least
        with pytest.raises(ConfigError) as caught:
            _native.Cgroup.create(tree, "failed", wrong, True)
        assert caught.value.field == "cpus"
        assert tree.names() == []

    def test_what_was_left_out_cannot_come_later(self, tree: _native.CgroupTree) -> None:
        with Cgroup.create("few", Limits(pids=9, devices=None), tree=tree, complete=False) as few:
            few.change(Limits(pids=10, devices=None))
            with contextlib.suppress(LimitUnavailable):  # v2 has them all
                few.change(Limits(memory="1G", devices=None))
                assert few.unified

    def test_a_fork_bomb_is_contained(self, tree: _native.CgroupTree) -> None:
        bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
        limits = Limits(pids=30, cpus=0.5)
        with Cgroup.create("bomb", limits, tree=tree) as cgroup, running(cgroup, bomb):
            wait_until(lambda: cgroup.stats().pids == 30, "the bomb does not reach its limit")
            assert answers()
            assert len(cgroup.processes()) <= 30
            cgroup.kill()
            assert cgroup.processes() == []

    def test_a_memory_hog_is_killed(self, tree: _native.CgroupTree) -> None:
        hog = "kept = []\nwhile True: kept.append(b'x' * (1 << 20))"
        with Cgroup.create("hog", Limits(memory="32M"), tree=tree) as cgroup:
            with running(cgroup, hog) as program:
                assert program.wait(PATIENCE) == -signal.SIGKILL
            assert answers()
            found = cgroup.stats()
            assert found.oom_kills == 1
            assert 16 << 20 < (found.memory_peak or 0) <= 32 << 20

    def test_a_spinner_gets_its_quota(self, tree: _native.CgroupTree) -> None:
        with (
            Cgroup.create("spin", Limits(cpus=0.2), tree=tree) as cgroup,
            running(cgroup, "print(1, flush=True)\nwhile True: pass") as program,
        ):
            output(program)
            start, used = time.monotonic(), cgroup.stats().cpu_seconds
            assert answers()
            time.sleep(1.0)
            elapsed = time.monotonic() - start
            spent = (cgroup.stats().cpu_seconds or 0) - (used or 0)
            # A period may begin before and end after.
            assert spent <= 0.2 * (elapsed + 0.2) + 0.02
            throttled = cgroup.stats().throttled_seconds or 0
            assert throttled > 0
            # Lifted while it runs: nothing is throttled from then on.
            cgroup.change(Limits())
            time.sleep(0.2)
            settled = cgroup.stats().throttled_seconds
            time.sleep(0.3)
            assert cgroup.stats().throttled_seconds == settled

    def test_limits_change_while_it_runs(self, tree: _native.CgroupTree) -> None:
        fork = (
            "import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
            "for line in iter(input, ''):\n try:\n  if os.fork() == 0: os._exit(0)\n"
            "  print('yes', flush=True)\n except OSError: print('no', flush=True)"
        )
        with (
            Cgroup.create("change", Limits(pids=1), tree=tree) as cgroup,
            running(cgroup, fork) as program,
        ):
            assert program.stdin is not None
            for limits, answer in ((None, "no"), (Limits(), "yes"), (Limits(pids=1), "no")):
                if limits is not None:
                    cgroup.change(limits)
                    wait_until(lambda: cgroup.stats().pids == 1, "a child stays")
                program.stdin.write("fork\n")
                program.stdin.flush()
                assert output(program) == answer

    def test_which_cpus(self, tree: _native.CgroupTree) -> None:
        last = max(os.sched_getaffinity(0))
        show = "import os\nprint(os.sched_getaffinity(0), flush=True)"
        limits = Limits(cpuset=str(last))
        with Cgroup.create("set", limits, tree=tree) as cgroup, running(cgroup, show) as program:
            assert output(program) == str({last})

    def test_freeze(self, tree: _native.CgroupTree) -> None:
        count = "n = 0\nwhile True:\n n += 1\n print(n, flush=True)\n input()"
        with Cgroup.create("freeze", tree=tree) as cgroup, running(cgroup, count) as program:
            assert program.stdin is not None
            assert output(program) == "1"
            cgroup.freeze()
            program.stdin.write("\n")
            program.stdin.flush()
            used = cgroup.stats().cpu_seconds
            time.sleep(0.1)
            assert cgroup.stats().cpu_seconds == used
            cgroup.thaw()
            assert output(program) == "2"
            cgroup.freeze()
            cgroup.kill()  # also what stands still

    @pytest.mark.slow
    def test_a_disk_filler_is_slowed(self, tree: _native.CgroupTree, tmp_path: Path) -> None:
        try:
            disk = Cgroup.create("disk", Limits(io_write="1M"), tree=tree)
        except LimitUnavailable as error:
            pytest.skip(str(error))
        fill = (
            "import os, sys, mmap\nblock = mmap.mmap(-1, 1 << 18)\n"
            "file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_DIRECT)\n"
            "for _ in range(4): os.write(file, block)\nprint('done', flush=True)"
        )
        target = tmp_path / "filled"
        probe = subprocess.run(
            ["dd", "if=/dev/zero", f"of={target}", "bs=256K", "count=1", "oflag=direct"],
            check=False,
            capture_output=True,
        )
        with disk:
            if probe.returncode != 0:
                pytest.skip("no direct I/O here")
            times = []
            for limits in (None, Limits()):
                if limits is not None:
                    disk.change(limits)
                with running(disk, fill, str(target)) as program:
                    start = time.monotonic()
                    assert output(program) == "done"
                    times.append(time.monotonic() - start)
                    assert answers()
            assert times[0] > 0.6  # 1 MiB at 1 MiB/s, of which the first part may pass at once
            assert (disk.stats().io_written or 0) >= 2 << 20


def answers() -> bool:
    """Whether a neighbour, a process outside of the cgroup, does its work meanwhile."""
    done = subprocess.run(["echo", "here"], capture_output=True, timeout=PATIENCE, check=True)
    return done.stdout == b"here\n"


#: Devices that exist on every Linux, to be opened for reading and writing.
DEVICES = {name: os.stat(f"/dev/{name}").st_rdev for name in ("null", "zero", "full", "urandom")}

TRY = """
import os
for name in ('null', 'zero', 'full', 'urandom'):
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        try: os.close(os.open('/dev/' + name, flags)); print(1, end='')
        except PermissionError: print(0, end='')
print(flush=True)
"""

RULES = st.lists(
    st.tuples(
        st.sampled_from("cccb"),
        st.sampled_from(["1", "*", "5"]),
        st.sampled_from(["3", "5", "7", "9", "*"]),
        st.sampled_from(["r", "w", "rw", "m", "rwm"]),
    ),
    max_size=4,
)


def allowed(rules: list[tuple[str, str, str, str]], number: int, access: str) -> bool:
    """cgroup-v1/devices.rst: one rule has to allow all of what is asked for, and rules for the same
    devices are one."""
    merged: dict[tuple[str, str, str], str] = {}
    for kind, major, minor, may in rules:
        merged[kind, major, minor] = merged.get((kind, major, minor), "") + may
    return any(
        kind == "c"
        and major in ("*", str(os.major(number)))
        and minor in ("*", str(os.minor(number)))
        and set(access) <= set(may)
        for (kind, major, minor), may in merged.items()
    )


@pytest.mark.needs_root
@pytest.mark.parametrize("version", [1, 2])
def test_devices(version: int) -> None:
    """v1's files and v2's BPF program against the rule as the manual has it."""
    kinds = {1: " - cgroup ", 2: " - cgroup2 "}
    mounts = [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines(True)
        if kinds[version] in line
    ]
    own = Path("/proc/self/cgroup").read_text()
    tree = _native.CgroupTree(f"polyvisor-dev{version}-{os.getpid()}", "".join(mounts), own)
    try:
        cgroup = Cgroup.create("dev", Limits(devices=[]), tree=tree, complete=False)
    except LimitUnavailable as error:
        pytest.skip(f"cgroup v{version}: {error}")
    parents = [Path(f"/proc/self/fd/{fd}").resolve().parent for fd in cgroup.fds()]

    @settings(max_examples=12)
    @given(RULES)
    @example([("c", "1", "3", "r"), ("c", "1", "3", "w")])
    @example([("c", "1", "*", "r"), ("c", "1", "5", "w")])
    def agrees(rules: list[tuple[str, str, str, str]]) -> None:
        texts = [f"{kind} {major}:{minor} {may}" for kind, major, minor, may in rules]
        cgroup.change(Limits(devices=texts))
        with running(cgroup, TRY) as program:
            wanted = "".join(
                str(int(allowed(rules, number, access)))
                for number in DEVICES.values()
                for access in ("r", "w", "rw")
            )
            assert output(program) == wanted

    try:
        with cgroup:
            agrees()
            cgroup.change(Limits(devices=None))
            with running(cgroup, TRY) as program:
                assert output(program) == "1" * 12
    finally:
        for parent in parents:
            os.rmdir(parent)
