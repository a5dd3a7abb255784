"""Shared folders under Linux's virtiofs: what a guest does there is what the same commands do to a
folder of the host's."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

import polyvisor
from polyvisor.errors import GuestError
from polyvisor.virtio.fs import Fs

if TYPE_CHECKING:
    from pathlib import Path

    from polyvisor.guest import Completed
    from polyvisor.machine import Machine

pytestmark = [pytest.mark.boot, pytest.mark.slow]

MOUNT = "mkdir -p /mnt/share && mount -t virtiofs share /mnt/share && cd /mnt/share\n"


def in_guest(script: str, share: Path, check: bool = True, **options: object) -> Completed:
    """Runs a script in the mounted share."""
    inline = bool(options.pop("inline", True))
    transport, packed = str(options.pop("transport", "pci")), bool(options.pop("packed", False))
    read_only = bool(options.pop("read_only", False))

    def add(machine: Machine) -> None:
        fs = Fs(share, "share", read_only=read_only, inline=inline)
        machine.add_virtio(fs, transport=transport, packed=packed)

    return polyvisor.exec(
        ["sh", "-c", MOUNT + script],
        engine="soft",
        timeout=110,
        on_machine=add,
        check=check,
        **options,  # type: ignore[arg-type]
    )


def random_script(seed: int, count: int) -> str:
    """Commands on a few names, most of which make sense; each says how it ended."""
    rng = random.Random(seed)
    folders = ["."]
    files = [f"f{n}" for n in range(8)]

    def path() -> str:
        return f"{rng.choice(['.', rng.choice(folders)])}/{rng.choice(files)}"

    def mkdir() -> str:
        name = f"{rng.choice(folders)}/d{len(folders)}"
        folders.append(name)
        return f"mkdir -m {rng.choice(['755', '700', '775', '1777'])} {name}"

    def patch() -> str:
        return (
            f"echo {rng.randrange(10**9)} | dd of={path()} bs=1 seek={rng.randrange(300000)} "
            "conv=notrunc 2>/dev/null"
        )

    def times() -> str:
        return f"touch -h -d @{rng.randrange(2**31)} {path()}"

    commands = [
        mkdir,
        patch,
        times,
        lambda: f"echo {rng.randrange(10**9)} > {path()}",
        lambda: f"echo {rng.randrange(10**9)} >> {path()}",
        lambda: f"seq {rng.randrange(30000)} > {path()}",
        lambda: f"mv {path()} {path()}",
        lambda: f"mv {rng.choice(folders[1:] or ['f0'])} {rng.choice(folders)}",
        lambda: f"cp -p {path()} {path()}",
        lambda: f"ln {path()} {path()}",
        lambda: f"ln -s {rng.choice(['f1', '../f2', '/nowhere', 'd1'])} {path()}",
        lambda: f"rm {path()}",
        lambda: f"rmdir {rng.choice(folders)}",
        lambda: f"rm -r {rng.choice(folders[1:] or ['f0'])}" if rng.random() < 0.2 else "true",
        lambda: f"chmod {rng.choice(['644', '600', '755', '400', 'a+x', '4755'])} {path()}",
        lambda: f"truncate -s {rng.randrange(100000)} {path()}",
        lambda: f"mkfifo {path()}",
        lambda: f"cat < {path()} | md5sum",
    ]
    lines = [
        'run() { (eval "$1") 2>/dev/null </dev/null; echo $?; }',
        "for n in 0 1 2 3 4 5; do echo $n > f$n; done",
    ]
    for _ in range(count):
        command = rng.choice(commands)()
        lines.append(f"run '{command}'")
        if "mkfifo" in command:  # for which no command may wait
            lines.append("ls -R . ; find . -type p -exec rm {} +")
    return "\n".join(lines) + "\n"


def tree(folder: Path, times: bool = True) -> dict[str, tuple[object, ...]]:
    """What a folder has, by path. (Set-user-ID does not get through, which the test knows.)"""
    result: dict[str, tuple[object, ...]] = {}
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(at, name)
            info = os.lstat(path)
            kind = stat.S_IFMT(info.st_mode)
            mode = stat.S_IMODE(info.st_mode) & ~stat.S_ISUID
            known: tuple[object, ...] = (kind, mode)
            if stat.S_ISREG(info.st_mode):
                with open(path, "rb") as file:
                    known = (*known, hashlib.md5(file.read()).hexdigest(), info.st_nlink)
            elif stat.S_ISLNK(info.st_mode):
                known = (kind, os.readlink(path))
            # Those that a command chose.
            if times and info.st_mtime < 1_700_000_000 and not stat.S_ISDIR(info.st_mode):
                known = (*known, info.st_mtime)
            result[os.path.relpath(path, folder)] = known
    return result


@pytest.mark.parametrize(
    ("seed", "transport", "packed", "inline"),
    [(1, "pci", False, True), (2, "mmio", True, False)],
)
def test_random_commands(
    tmp_path: Path, seed: int, transport: str, packed: bool, inline: bool
) -> None:
    share, reference = tmp_path / "share", tmp_path / "reference"
    share.mkdir()
    reference.mkdir()
    script = random_script(seed, 100)
    listing = "find . -exec stat -c '%n %f %h %s %N' {} + | sort; find . -type f -exec md5sum {} +"
    busybox = shutil.which("busybox")
    assert busybox is not None
    expected = subprocess.run(
        [busybox, "sh", "-c", script],
        cwd=reference,
        env={"PATH": "/bin", "HOME": "/"},
        capture_output=True,
        check=True,
    )
    # The guest's view after its caches are gone is the host's.
    end = "sync; cd /; umount /mnt/share; mount -t virtiofs share /mnt/share; cd /mnt/share\n"
    done = in_guest(
        f"{script}echo ---\n{end}{listing}", share, transport=transport, packed=packed,
        inline=inline,
    )  # fmt: skip
    said, _, seen = done.text.partition("---\n")
    assert said == expected.stdout.decode()
    assert said.count("\n0") > 50, "most commands should work"
    assert tree(share) == tree(reference)
    here = subprocess.run(
        [busybox, "sh", "-c", listing], cwd=share, capture_output=True, check=True, text=True
    )
    sizes = [" ".join(line.split()) for line in here.stdout.splitlines()]
    assert sorted(" ".join(line.split()) for line in seen.splitlines()) == sorted(sizes)


def test_archives_and_comparisons(tmp_path: Path) -> None:
    """What compilers, tar and package managers do: many files, large ones, maps, renames."""
    share = tmp_path / "share"
    (share / "source").mkdir(parents=True)
    rng = random.Random(4)
    for n in range(80):
        folder = share / "source" / f"folder{n % 13}"
        folder.mkdir(exist_ok=True)
        (folder / f"file{n}").write_bytes(rng.randbytes(rng.randrange(20000)))
    (share / "source" / "large").write_bytes(rng.randbytes(3 << 20))
    script = """
        set -e
        tar cf archive.tar source && mkdir copy && tar xf archive.tar -C copy
        diff -r source copy/source && echo same
        cp -a source again && diff -r source again && echo same
        cd again && for f in folder*/*; do mv $f $f.new; done; cd ..
        dd if=source/large of=rewritten bs=13k 2>/dev/null
        cmp source/large rewritten && echo same
        cp /bin/busybox busybox && ./busybox echo runs
        df . | tail -1 | awk '{ print ($2 > 1000) }'
        mkfifo pipe && (echo through > pipe &) && cat pipe
        rm -r copy
    """
    done = in_guest(script, share)
    assert done.text.split() == ["same", "same", "same", "runs", "1", "through"]
    assert (share / "rewritten").read_bytes() == (share / "source" / "large").read_bytes()
    assert not (share / "copy").exists()
    assert len(list(share.glob("again/folder*/*.new"))) == 80


def test_git_clones_a_local_repository(tmp_path: Path) -> None:
    """The host's own git, from the host's root folder, which is another share."""
    share = tmp_path / "share"
    (share / "origin").mkdir(parents=True)
    rng = random.Random(7)
    for n in range(30):
        (share / "origin" / f"file{n}").write_text(f"{rng.random()}\n" * rng.randrange(1000))
    git = ["git", "-c", "user.name=Test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=share / "origin", check=True)

    def add(machine: Machine) -> None:
        machine.add_share("/", "root", transport="mmio")
        machine.add_share(share, "share", read_only=False, packed=True)

    script = """
        set -e
        mkdir /root/host && mount -t virtiofs root /root/host
        mount -t virtiofs share /root/host/mnt && mount -t proc proc /root/host/proc
        mount -t tmpfs tmp /root/host/tmp
        exec chroot /root/host sh -ec '
            cd /mnt && git clone -q origin clone && cd clone
            git status --short && git fsck --no-progress
            echo new > new && git add new
            git -c user.name=Test -c user.email=test@localhost commit -qm second
            git log --format=%s
        '
    """
    done = polyvisor.exec(
        ["sh", "-c", script], engine="soft", on_machine=add, timeout=110, check=True
    )
    assert done.text == "second\nfirst\n", done.stderr
    log = subprocess.run(
        ["git", "-c", "safe.directory=*", "log", "--format=%s"],
        cwd=share / "clone",
        check=True,
        capture_output=True,
    )
    assert log.stdout == b"second\nfirst\n"
    assert not subprocess.run(
        ["git", "fsck", "--no-progress"], cwd=share / "clone", check=True, capture_output=True
    ).stdout


def test_read_only(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_bytes(b"content\n")
    before = tree(share)
    script = """
        cat file
        for c in "echo x > file" "echo x > new" "rm file" "mkdir d" "chmod 700 file" \\
                 'mv file other' 'ln file other' 'ln -s a b' 'touch file' 'truncate -s 0 file'; do
            sh -c "$c" 2>/dev/null && echo "$c worked"
        done
        echo x 2>&1 > file | grep -c 'Read-only'
        true
    """
    done = in_guest(script, share, read_only=True)
    assert done.text == "content\n1\n"
    assert tree(share) == before


def test_changes_of_the_host_are_seen(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_bytes(b"old\n")
    script = """
        cat file; touch ready
        for i in $(seq 100); do [ -e go ] && break; sleep 0.1; done
        sleep 1.2; cat file; ls
    """

    def on_idle() -> None:
        if (share / "ready").exists() and not (share / "go").exists():
            (share / "file").write_bytes(b"new content\n")
            (share / "go").touch()

    done = in_guest(script, share, on_idle=on_idle)
    assert done.text == "old\nnew content\nfile\ngo\nready\n"


def test_drivers_come_and_go(tmp_path: Path) -> None:
    """Each device is unbound from its driver and probed again, and works."""
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_bytes(b"content\n")

    def add(machine: Machine) -> None:
        machine.add_share(share, "share", packed=True)
        machine.add_rng(transport="mmio")
        machine.add_balloon("8M")

    script = """
        for round in 1 2 3; do
            mount -t virtiofs share /mnt && cat /mnt/file; umount /mnt
            dd if=/dev/hwrng bs=1k count=4 2>/dev/null | wc -c
            cd /sys/bus/virtio/drivers
            for driver in virtiofs virtio_rng virtio_balloon; do
                device=$(basename $(ls -d $driver/virtio*))
                echo $device > $driver/unbind; echo $device > $driver/bind
            done
            cd /
        done
    """
    done = polyvisor.exec(
        ["sh", "-c", "mkdir -p /mnt;" + script],
        engine="soft",
        on_machine=add,
        timeout=100,
        check=True,
    )
    assert done.text == "content\n4096\n" * 3, done.stderr


def test_stop_under_load(tmp_path: Path) -> None:
    """The machine ends within a second while the guest reads and writes as fast as it can."""
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_bytes(os.urandom(4 << 20))
    script = """
        (while true; do dd if=/dev/hwrng of=/dev/null bs=64k count=1; done) 2>/dev/null &
        (while true; do cat file > copy; done) &
        (while true; do ls -lR . ; touch now; done) >/dev/null &
        echo running; wait
    """
    machines: list[Machine] = []

    def add(machine: Machine) -> None:
        machines.append(machine)
        machine.add_share(share, "share", read_only=False)
        machine.add_rng()

    running = threading.Event()
    took: list[float] = []

    def stop() -> None:
        assert running.wait(60)
        time.sleep(1)
        started = time.monotonic()
        machines[0].stop()
        took.append(time.monotonic() - started)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(GuestError, match="was stopped"):
        polyvisor.exec(
            ["sh", "-c", MOUNT + script],
            engine="soft",
            on_machine=add,
            on_stdout=lambda data: running.set(),
            timeout=100,
        )
    stopper.join()
    assert took[0] < 1
    assert threading.active_count() < 20
