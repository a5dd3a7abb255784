"""The set-up scripts, with stand-ins for the programs that would change this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = ("awk", "bash", "cat", "dirname", "env", "grep", "mktemp", "rm")


class Host:
    """A PATH with nothing but TOOLS and stand-ins that write down how they were called."""

    def __init__(self, root: Path, where: Path) -> None:
        self.script = root / "scripts" / "system-packages"
        self.bin = where / "bin"
        self.calls_file = where / "calls"
        self.bin.mkdir()
        for tool in TOOLS:
            path = shutil.which(tool)
            assert path, tool
            (self.bin / tool).symlink_to(path)
        self.stand_in("id", "echo 0")
        self.stand_in("sleep", "")
        self.stand_in("dpkg-query", "echo g++ installed")
        self.stand_in("apt-cache", "exit 100")

    def stand_in(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f'#!{self.bin}/bash\necho "{name} $*" >>{self.calls_file}\n{body}\n')
        path.chmod(0o755)

    def run(self, *groups: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.script, *groups],
            env={"PATH": str(self.bin)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, program: str) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def host(root: Path, tmp_path: Path) -> Host:
    return Host(root, tmp_path)


def test_nothing_missing_does_nothing(host: Host) -> None:
    names = " ".join(
        line.split()[1]
        for line in host.script.with_name("packages.txt").read_text().splitlines()
        if line.startswith("build ")
    )
    host.stand_in("dpkg-query", f"for name in {names}; do echo $name installed; done")
    host.stand_in("apt-get", "exit 100")
    done = host.run("build")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not host.calls("apt-get")


def test_a_removed_package_is_missing(host: Host) -> None:
    host.stand_in("dpkg-query", "echo mmdebstrap config-files")
    host.stand_in("apt-get", "")
    assert host.run("fresh").returncode == 0
    assert "mmdebstrap" in host.calls("apt-get")[-1]


def test_lists_that_cannot_be_refreshed_are_no_failure(host: Host) -> None:
    host.stand_in("apt-get", 'case "$*" in *update) exit 100 ;; esac')
    done = host.run("build")
    assert done.returncode == 0, done.stderr
    assert "could not be refreshed" in done.stderr
    assert host.calls("apt-get")[0].endswith(" update")
    install = host.calls("apt-get")[-1].split()
    assert "cmake" in install
    assert "g++" not in install  # it is there
    assert "mmdebstrap" not in install  # another group


def test_lists_that_are_there_are_not_refreshed(host: Host) -> None:
    host.stand_in("apt-cache", "")
    host.stand_in("apt-get", "")
    assert host.run("build").returncode == 0
    assert [line for line in host.calls("apt-get") if "update" in line] == []


def test_a_failure_is_tried_again_and_then_told(host: Host) -> None:
    host.stand_in("apt-get", "echo E: no such package; exit 100")
    done = host.run("build")
    assert done.returncode == 1
    assert "E: no such package" in done.stderr
    assert "could not install" in done.stderr.splitlines()[-1]
    assert len([line for line in host.calls("apt-get") if "install" in line]) == 3


def test_without_root_or_sudo_it_tells_what_to_install(host: Host) -> None:
    host.stand_in("id", "echo 1000")
    host.stand_in("apt-get", "")
    done = host.run("build")
    assert done.returncode == 1
    assert "apt-get install" in done.stderr
    assert "cmake" in done.stderr
    assert not host.calls("apt-get")


def test_with_sudo_it_uses_it(host: Host) -> None:
    host.stand_in("id", "echo 1000")
    host.stand_in("sudo", 'exec "$@"')
    host.stand_in("apt-get", "")
    assert host.run("build").returncode == 0
    assert "apt-get" in host.calls("sudo")[-1]


def test_another_distribution_is_told_and_goes_on(host: Host) -> None:
    (host.bin / "dpkg-query").unlink()
    done = host.run("build")
    assert done.returncode == 0
    assert "cmake" in done.stderr


@pytest.fixture
def fresh(root: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("fresh", root / "scripts" / "fresh.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_fresh_carries_what_the_network_needs_and_no_more(fresh: ModuleType) -> None:
    kept = {"PIP_INDEX_URL": "a", "https_proxy": "b", "NO_PROXY": "c", "SSL_CERT_FILE": "d"}
    other = {"PIP_CACHE_DIR": "e", "HOME": "f", "SECRET": "g", "MY_PIP_X": "h"}
    assert fresh.carried_environment(kept | other) == kept


def test_fresh_binds_local_indexes(
    fresh: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder around an index (its pages link to files beside it), and plain folders as such."""
    home, new, mirror, wheels = (tmp_path / name for name in ("home", "new", "mirror", "wheels"))
    for folder in (home / ".config/pip", new / "etc/apt/apt.conf.d", mirror / "simple", wheels):
        folder.mkdir(parents=True)
    certificate = tmp_path / "ca.pem"
    certificate.write_text("certificate")
    (home / ".config/pip/pip.conf").write_text(
        f"[global]\nextra-index-url = file://{mirror}/simple https://example.org/simple\n"
        f"find-links = {wheels} {tmp_path}/gone\ncert={certificate}\n"
    )
    for name in [name for name in os.environ if fresh.CARRIED.fullmatch(name)]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    binds = fresh.carry_configuration(new)
    assert {mirror, wheels} <= set(binds)
    assert tmp_path / "gone" not in binds
    assert Path(f"{new}{certificate}").read_text() == "certificate"
    assert (new / "root/.config/pip/pip.conf").is_file()
