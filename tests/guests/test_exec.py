"""exec with Debian's own kernels: what goes in, what comes out, and how it ends."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from stopwatch import PATIENCE, Stopwatch

import polyvisor
from polyvisor.errors import ConfigError, GuestError, MachineTimeout
from polyvisor.guest import CommandFailed, CommandNotRun, GuestPanic
from polyvisor.images import kernel, vmlinux

pytestmark = [pytest.mark.boot, pytest.mark.timeout(PATIENCE + 60)]

EVERYTHING = """
echo "user $(id -u) pid $$ in $(pwd)"
echo "word=$WORD home=$HOME unset=${USER-none}"
echo "arg1=<$1> arg2=<$2>"
hostname
echo "to stderr" >&2
ping -c 1 -q 127.0.0.1 >/dev/null && echo loopback
for p in /proc/self /sys/class /dev/null /dev/pts /dev/shm; do test -e $p || echo no $p; done
touch /tmp/file && echo tmp
cat
exit 42
"""


def test_everything_about_a_command() -> None:
    done = polyvisor.exec(
        ["sh", "-c", EVERYTHING, "sh", "a b", "ünï'\"$x\n"],
        stdin="from stdin\n",
        env={"WORD": "set here", "USER": None},
        cwd="/tmp",
        timeout=PATIENCE,
    )
    lines = done.text.split("\n")
    assert lines[0].startswith("user 0 pid ")
    assert lines[0].endswith(" in /tmp")
    assert lines[1:] == [
        "word=set here home=/root unset=none",
        "arg1=<a b> arg2=<ünï'\"$x",
        ">",
        "polyvisor",
        "loopback",
        "tmp",
        "from stdin",
        "",
    ]
    assert done.stderr == b"to stderr\n"
    assert (done.status, done.signal) == (42, 0)
    assert done.engine in ("soft", "kvm")
    assert 0 < done.boot_seconds <= done.seconds
    assert 0 < done.boot_cpu_seconds <= done.cpu_seconds


@pytest.mark.parametrize("cpus", [1, 2])
def test_every_cpu_is_found(cpus: int) -> None:
    done = polyvisor.exec(
        ["sh", "-c", "nproc; grep -c ^processor /proc/cpuinfo; dmesg | grep -ci 'mce\\|BUG:'"],
        cpus=cpus,
        timeout=PATIENCE,
    )
    found, listed, complaints = done.text.split()
    assert (int(found), int(listed)) == (cpus, cpus)
    assert int(complaints) == 0, done.console


def test_two_cpus_at_work() -> None:
    """Both CPUs count at the same time, and shared state stays whole."""
    script = """
    count() { i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $i >/tmp/$1; done; echo done $1; }
    count a & count b & wait
    cat /tmp/a /tmp/b
    """
    done = polyvisor.exec(["sh", "-c", script], cpus=2, timeout=PATIENCE)
    lines = done.text.split("\n")
    assert sorted(lines[:2]) == ["done a", "done b"]
    assert lines[2:] == ["3000", "3000", ""]


def test_memory_is_what_was_asked_for() -> None:
    done = polyvisor.exec(
        ["awk", "/MemTotal/ {print $2}", "/proc/meminfo"], memory="256M", timeout=PATIENCE
    )
    assert 200 << 10 < int(done.stdout) < 256 << 10


def test_streams_of_any_size() -> None:
    """Bytes of every value both ways, more than any buffer on the way holds, with a slow reader."""
    data = random.Random(1).randbytes(300_000)
    got, errors = bytearray(), bytearray()

    def slow(part: bytes) -> None:
        if len(got) < 50_000:
            time.sleep(0.02)
        got.extend(part)

    read_end, write_end = os.pipe()

    def feed() -> None:
        with open(write_end, "wb") as file:
            file.write(data)

    writer = threading.Thread(target=feed)
    writer.start()
    done = polyvisor.exec(
        ["sh", "-c", "tee /dev/stderr"],
        stdin=read_end,
        on_stdout=slow,
        on_stderr=errors.extend,
        timeout=PATIENCE,
    )
    writer.join()
    os.close(read_end)
    assert done.status == 0
    assert bytes(got) == data
    assert bytes(errors) == data
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_command_that_does_not_read_its_stdin() -> None:
    done = polyvisor.exec(["head", "-c", "5"], stdin=b"x" * 200_000, timeout=PATIENCE)
    assert (done.status, done.stdout) == (0, b"xxxxx")


def test_killed_by_a_signal() -> None:
    done = polyvisor.exec(["sh", "-c", "kill -SEGV $$"], timeout=PATIENCE)
    assert (done.status, done.signal) == (128 + signal.SIGSEGV, signal.SIGSEGV)


def test_signals_can_be_sent() -> None:
    channels = []
    script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    done = polyvisor.exec(
        ["sh", "-c", script],
        on_start=lambda machine, channel: channels.append(channel),
        on_stdout=lambda data: channels[0].signal(signal.SIGTERM) if b"ready" in data else None,
        timeout=PATIENCE,
    )
    assert done.status == 9


def test_a_terminal() -> None:
    script = "tty; stty size; stty -echo; read line; echo got $line; exit 4"
    done = polyvisor.exec(["sh", "-c", script], stdin=b"typed\n", tty=(50, 132), timeout=PATIENCE)
    assert done.status == 4
    lines = done.text.replace("typed\r\n", "", 1).split("\r\n")
    assert lines == ["/dev/pts/0", "50 132", "got typed", ""]


def test_background_processes_are_not_waited_for() -> None:
    start = time.monotonic()
    done = polyvisor.exec(["sh", "-c", "sleep 1000 & echo started"], timeout=PATIENCE)
    assert done.text == "started\n"
    assert time.monotonic() - start < PATIENCE / 2


@pytest.mark.parametrize(
    ("argv", "cwd", "status", "stage"),
    [
        (["no-such-command"], "/root", 127, "exec"),
        (["/etc/passwd"], "/root", 126, "exec"),
        (["true"], "/no/such/directory", 126, "directory"),
    ],
)
def test_commands_that_do_not_start(argv: list[str], cwd: str, status: int, stage: str) -> None:
    with pytest.raises(CommandNotRun, match=argv[0]) as caught:
        polyvisor.exec(argv, cwd=cwd, timeout=PATIENCE)
    assert (caught.value.status, caught.value.stage) == (status, stage)


def test_check() -> None:
    with pytest.raises(CommandFailed, match="status 3") as caught:
        polyvisor.exec(["sh", "-c", "echo out; exit 3"], check=True, timeout=PATIENCE)
    assert caught.value.completed.stdout == b"out\n"


# --- time -----------------------------------------------------------------------------------------


def test_sleep_takes_its_time() -> None:
    """Never less than a second, and not much more; the best of a few, as this host may be busy."""
    stopwatch = Stopwatch()
    script = "for i in 1 2 3 4 5; do echo start$i; sleep 1; echo end$i; done"
    polyvisor.exec(["sh", "-c", script], on_stdout=stopwatch, timeout=PATIENCE)
    times = [stopwatch.between(f"start{i}", f"end{i}") for i in range(1, 6)]
    # (When a line reaches us late, the next interval looks shorter by as much.)
    assert sum(times) > 4.9
    # Waking up takes a turn on a host CPU, which on a crowded host is long in coming.
    crowd = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    assert min(times) == pytest.approx(1, abs=0.1 * max(1, crowd * 3))


@pytest.mark.slow
def test_the_clock_keeps_time() -> None:
    """Within 1 % of the host's over 10 s, and the date is the host's."""
    stopwatch = Stopwatch()
    script = """
    for mark in a b; do read up rest </proc/uptime; echo $mark $up $(date +%s); sleep 10; done
    """
    polyvisor.exec(["sh", "-c", script], on_stdout=stopwatch, timeout=PATIENCE)
    (first, second) = (line.split() for _, line in stopwatch.lines)
    guest = float(second[1]) - float(first[1])
    assert guest == pytest.approx(stopwatch.between("a", "b"), rel=0.01)
    assert int(second[2]) == pytest.approx(time.time() - 10, abs=5)


# --- guests that end before the command -----------------------------------------------------------


def test_power_off() -> None:
    with pytest.raises(GuestError, match="switched itself off") as caught:
        polyvisor.exec(["sh", "-c", "poweroff -f; sleep 100"], timeout=PATIENCE)
    assert caught.value.reason == "power_off"


def test_reset() -> None:
    with pytest.raises(GuestError, match="reset itself") as caught:
        polyvisor.exec(["sh", "-c", "reboot -f; sleep 100"], timeout=PATIENCE)
    assert caught.value.reason == "reset"


@pytest.mark.parametrize("append", ["", "panic=0"])
def test_panic(append: str) -> None:
    with pytest.raises(GuestPanic, match="sysrq") as caught:
        polyvisor.exec(["sh", "-c", "echo c >/proc/sysrq-trigger"], append=append, timeout=PATIENCE)
    assert "Kernel panic - not syncing" in caught.value.tail


def test_too_little_memory_for_the_user_space() -> None:
    """The kernel starts, and has no room left to unpack its initramfs: a panic, or a dead init."""
    with pytest.raises(GuestError):
        polyvisor.exec(["true"], files={"/big": bytes(80 << 20)}, memory="160M", timeout=PATIENCE)


def test_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(MachineTimeout, match="init"):
        polyvisor.exec(["true"], timeout=0.3)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("timeout", [0, -1])
def test_timeouts_that_are_none(timeout: float) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        polyvisor.exec(["true"], timeout=timeout)


# --- other kernels, other ways in -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generic", "686"])
def test_other_kernels(name: str) -> None:
    done = polyvisor.exec(
        ["sh", "-c", "uname -rm; cat; nproc"],
        kernel=name,
        stdin="hello\n",
        cpus=2,
        timeout=PATIENCE,
    )
    release, hello, cpus = done.text.splitlines()
    assert release.endswith("i686" if name == "686" else "x86_64")
    assert hello == "hello"
    assert cpus == "2"
    assert "cloud" not in release


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["linux32", "pvh", "elf"])
def test_every_way_in(protocol: polyvisor.boot.Choice) -> None:
    from polyvisor import boot
    from polyvisor.guest import DEFAULT_CMDLINE
    from polyvisor.images import initramfs

    image: Path = kernel.fetch("cloud").image
    if protocol != "linux32":
        image = vmlinux.cached(image)
    initrd = initramfs.build(None, files={"/init": b"#!/bin/sh\necho by $0\npoweroff -f\n"})
    with polyvisor.Machine(memory="256M") as machine:
        plan = boot.load(machine, image, initrd, DEFAULT_CMDLINE, protocol=protocol)
        assert plan.protocol.startswith(protocol)
        info = machine.run(timeout=PATIENCE)
        assert "by /init" in machine.console.transcript
        assert info.reason == "power_off"


def test_a_shell_on_the_console() -> None:
    """An initramfs without a command: the first serial port has a shell."""
    from polyvisor.guest import DEFAULT_CMDLINE
    from polyvisor.images import initramfs

    with polyvisor.Machine(memory="256M") as machine:
        from polyvisor import boot

        boot.load(machine, kernel.fetch().image, initramfs.build(None), DEFAULT_CMDLINE)
        machine.start()
        console = machine.console
        console.expect("# ", timeout=PATIENCE)
        console.send("echo $((6 * 7)) $(tty)\n")
        console.expect("42 /dev/ttyS0", timeout=60)
        console.send("exit\n")
        info = machine.wait(60)
        assert info is not None
        assert info.reason == "power_off"
