"""A complete Debian on an image that polyvisor built: systemd, login, network, ssh, shared folders,
commands, and what is left of them."""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import debian
import pytest
from stopwatch import PATIENCE

import polyvisor
from polyvisor import images
from polyvisor.console import Console
from polyvisor.images import bootable, extfs

pytestmark = [
    pytest.mark.boot,
    pytest.mark.slow,
    pytest.mark.needs_root,
    pytest.mark.timeout(PATIENCE + 300),
]
PROMPT = r"root@tested:~# "
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image, the key, and `shared`: a folder with a git repository."""
    place = tmp_path_factory.mktemp("debian")
    debian.build(place)
    repository = place / "shared/repository"
    repository.mkdir(parents=True)
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        (repository / "file").write_text("versioned\n")
        subprocess.run([*GIT, *command], cwd=repository, check=True)
    return place


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        number: int = listener.getsockname()[1]
        return number


class Session:
    """A booted machine, at its login prompt."""

    def __init__(self, machine: polyvisor.Machine, port: int, folder: Path) -> None:
        self.machine, self.port, self.folder = machine, port, folder


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Session]:
    port = free_port()
    image = folder / "debian.img"
    with polyvisor.Machine(memory="1G", engine="soft") as machine:
        machine.add_disk(image, snapshot=True)
        machine.add_net("user", forward=[f"tcp:127.0.0.1:{port}-:22"])
        machine.add_share(folder / "shared", "share0", read_only=False)
        machine.add_vsock()
        shares = bootable.share_options([("", "/mnt/src", False)], ours=True)
        machine.load_disk(image, " ".join(shares))
        machine.start()
        machine.console.expect("tested login: ", timeout=PATIENCE)
        yield Session(machine, port, folder)


def test_login_on_the_console(session: Session) -> None:
    console: Console = session.machine.console
    console.send("root\n")
    console.expect(PROMPT, timeout=PATIENCE)
    console.send("systemctl is-system-running --wait; tty\n")
    seen = console.expect("/dev/ttyS0", timeout=PATIENCE)
    assert "running\r\n" in str(seen) or "running" in console.transcript[-400:]
    assert "degraded" not in console.transcript[-400:]


def test_ssh(session: Session) -> None:
    done = subprocess.run(
        [
            *("ssh", "-i", session.folder / "key", "-p", str(session.port)),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "BatchMode=yes", "-o", "ConnectTimeout=60", "-o", "LogLevel=ERROR"),
            *("root@127.0.0.1", "hostname; cat"),
        ],
        input=b"through ssh",
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout == b"tested\nthrough ssh", done.stderr


def test_packages(session: Session) -> None:
    ran = session.machine.exec(["apt", "list", "--installed"], timeout=PATIENCE)
    packages = {line.split("/")[0] for line in ran.text.splitlines()}
    assert {"git", "openssh-server", "systemd"} <= packages
    assert ran.status == 0


def test_git_clone_in_a_shared_folder(session: Session) -> None:
    """Of a repository that is in it, into it: the host sees the clone."""
    script = """
    git config --global --add safe.directory '*'
    cd /mnt/src && git clone -q repository clone && cat clone/file
    """
    ran = session.machine.exec(["sh", "-c", script], timeout=PATIENCE)
    assert (ran.status, ran.text) == (0, "versioned\n"), ran.stderr
    clone = session.folder / "shared/clone"
    status = subprocess.run(
        [*GIT, "-c", "safe.directory=*", "status", "--porcelain", "--branch"],
        cwd=clone,
        check=True,
        capture_output=True,
        text=True,
    )
    assert status.stdout == "## main...origin/main\n"


def test_a_command_whose_changes_are_kept(folder: Path) -> None:
    """From the command line."""
    image = folder / "copy.img"  # the other one is in use
    subprocess.run(["cp", "--sparse=always", folder / "debian.img", image], check=True)
    script = "cat >/root/note; cat /root/note; echo oops >&2; exit 7"
    options = ["--image", image, "--write", "--engine", "soft"]
    done = subprocess.run(
        [sys.executable, "-m", "polyvisor.cli", "exec", *options, "--", "sh", "-c", script],
        input=b"from stdin\n",
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, b"from stdin\n", b"oops\n")
    assert "note" in extfs.Reader(image).names("/root")
    checked = subprocess.run(["/sbin/e2fsck", "-fn", image], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_example_of_the_documentation(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/images.md, with the image that is there already."""
    text = (root / "docs/images.md").read_text()
    example = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert len([line for line in example.splitlines() if line]) <= 11
    asked, signature = [], inspect.signature(images.build)

    def build(*arguments: object, **options: object) -> None:
        asked.append(signature.bind(*arguments, **options).arguments)

    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("POLYVISOR_ENGINE", "soft")
        patch.setattr(polyvisor.images, "build", build, raising=False)
        exec(example.replace("2222", str(free_port())), {})
    assert asked == [{"output": "debian.img", "size": "1G", "packages": ["git"]}]
    assert "openssh-server/" in capsys.readouterr().out


def test_nothing_was_written_to_an_image_with_snapshots(folder: Path) -> None:
    """All machines above had it as their disk."""
    assert "clone" not in extfs.Reader(folder / "debian.img").names("/root")
    assert (folder / "debian.img").stat().st_mtime <= (folder / "shared/repository").stat().st_mtime
