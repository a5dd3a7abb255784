"""Ways out of a sandbox: each is tried, and refused for a reason that is known."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from sandbox_runs import Sandbox

from polyvisor import _native
from polyvisor.sandboxes import MASKED, READ_ONLY
from readable import open_to_all

SOURCE = Path(__file__).with_name("escapes.c")
#: What may refuse: being denied, being read-only, and not being there.
REFUSALS = {
    *(errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ESRCH, errno.EBADF),
    *(errno.ENOSYS, errno.EAFNOSUPPORT, errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EIO),
    # Of a sealed file, and of a program that runs.
    errno.ETXTBSY,
}
#: Where a vague errno would hide that nobody refused.
EXACT = {
    "mount tmpfs": {errno.EPERM},
    "remount writable": {errno.EPERM},
    "uncover /tmp": {errno.EPERM},
    "unshare user": {errno.EPERM},
    "clone user": {errno.EPERM},
    "clone3 user": {errno.ENOSYS},
    "chroot twice": {errno.EPERM},
    "mknod disk": {errno.EPERM},
    "signal outside": {errno.ESRCH},
    "write /etc": {errno.EROFS, errno.EACCES},
    "core_pattern": {errno.EROFS, errno.EACCES},
    "leaked descriptor": {errno.EBADF},
    "ptrace init": {errno.EPERM},
    "keyctl": {errno.EPERM},
    "bpf": {errno.EPERM},
    "vsock": {errno.EAFNOSUPPORT},
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("escapes") / "escapes"
    subprocess.run(["cc", "-O1", "-static", "-o", path, SOURCE], check=True)
    open_to_all(path.parent)
    return path


def outcomes(text: str) -> dict[str, int]:
    return {name: int(code) for name, code in (line.rsplit(" ", 1) for line in text.splitlines())}


def test_every_way_out_is_shut(sandbox: Sandbox, program: Path) -> None:
    run = sandbox("--ro", f"{program}:/tmp/escapes", "--", "/tmp/escapes", str(os.getpid()))
    found = outcomes(run.stdout)
    assert run.status == 0, run.stderr
    assert len(found) > 60
    open_doors = {name: code for name, code in found.items() if code not in REFUSALS}
    assert not open_doors
    assert {name: found[name] for name in EXACT if found[name] not in EXACT[name]} == {}
    assert not os.path.exists("/etc/polyvisor-escape")


@pytest.mark.needs_root
def test_the_program_finds_doors_that_are_open(program: Path) -> None:
    """(In namespaces that are thrown away, with all rights there and no filter.)"""
    out = os.memfd_create("out")
    try:
        spec = _native.LaunchSpec(
            ["/tmp/escapes", "2"],
            read_only_root=True,
            mounts=[
                _native.Mount("tmpfs", target="/tmp"),
                _native.Mount("proc", target="/proc"),
                _native.Mount("bind", str(program), "/tmp/escapes"),
            ],
            masked=MASKED,
            read_only_paths=READ_ONLY,
            uid_map=[(0, 100000, 65536)],
            gid_map=[(0, 100000, 65536)],
            capabilities=(1 << 41) - 1,
            seccomp="none",
            no_new_privs=False,
            stdout=out,
        )
        assert _native.run(spec, 30) == 0
        found = outcomes(os.pread(out, 1 << 16, 0).decode())
    finally:
        os.close(out)
    for name in ("mount tmpfs", "mount proc", "fsopen", "signal outside", "setuid other"):
        assert found[name] == 0, name
    # And yet these are shut.
    for name in ("mknod disk", "core_pattern", "write /etc", "init_module", "kexec_load"):
        assert found[name] in REFUSALS, name
