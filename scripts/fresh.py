#!/usr/bin/env python3
"""make fresh: proves `make demo` and `make test` in a new minimal Debian, nothing preinstalled.

A Debian root (mmdebstrap, minbase and `make`; its tarball is kept in .cache/fresh for two weeks)
gets the files that git tracks, as they are in the work tree, and becomes the root of mount and PID
namespaces of its own, where the targets run. When the last process of the namespaces is gone so are
the mounts, however this program ended; the root is removed at the end.

The network is reached as from the host: the host's pip configuration, Debian mirror, proxies and
certificates are carried in, with the local indexes they refer to (bound read-only). The compiler
cache is shared when the host has one: an object is reused only for identical sources, headers and
compiler. FRESH_CCACHE=0 compiles everything, FRESH_SUITE takes another release of Debian (trixie).

fresh.py [COMMAND...] runs other shell commands there: fresh.py 'make test' 'make bench'.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SUITE = os.environ.get("FRESH_SUITE", "bookworm")
TARBALL_DAYS = 14
TEST = "make test PYTEST_ARGS='-m \"not slow\"'"
TREE = "/root/polyvisor"

TOP = Path(__file__).resolve().parent.parent
CACHE = TOP / ".cache" / "fresh"

CARRIED = re.compile(
    r"PIP_\w+|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(https?|ftp|all|no)_proxy", re.I
)
NOT_CARRIED = {"PIP_CACHE_DIR"}  # nothing preinstalled
APT_SETTING = re.compile(r"Acquire::(https?|Retries|Check-Valid-Until|Check-Date|ForceIPv)\b")
REFERENCE = re.compile(r"(?:^|[\s='\"])(file://)?(/[^\s'\",;]+)")


def main() -> int:
    if os.geteuid() != 0:
        # sudo forgets the environment, and with it where the user's pip configuration is.
        kept = [f"{name}={value}" for name, value in carried_environment(os.environ).items()]
        kept += [f"HOME={Path.home()}", f"PATH={os.environ['PATH']}"]
        os.execvp("sudo", ["sudo", "env", *kept, sys.executable, *sys.argv])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    subprocess.run([TOP / "scripts" / "system-packages", "fresh"], check=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / "lock"):
        for leftover in CACHE.glob("root-*"):
            remove(leftover)
        tarball = base_tarball()
        root = Path(tempfile.mkdtemp(prefix="root-", dir=CACHE))
        try:
            root.chmod(0o755)
            with step("unpacking the root"):
                subprocess.run(["tar", "-xpf", tarball, "--numeric-owner", "-C", root], check=True)
                copy_tree(root)
                binds = carry_configuration(root)
            return run_inside(root, binds)
        finally:
            remove(root)


@contextmanager
def step(what: str) -> Iterator[None]:
    print(f"fresh: {what}", flush=True)
    start = time.monotonic()
    yield
    print(f"fresh: {what}: {time.monotonic() - start:.1f} s", flush=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"fresh: another 'make fresh' of this tree is running ({path} is locked)")
        yield


def apt_settings() -> str:
    """How the host's apt reaches its mirrors, in apt.conf's own form."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False)
    return "".join(f"{line}\n" for line in dump.stdout.splitlines() if APT_SETTING.match(line))


def apt_sources() -> str:
    """The host's mirrors of this release; empty when it has none: mmdebstrap knows Debian's."""
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT) origin=$(ORIGIN)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    )
    sources = [
        f"deb {uri} {release} {component}"
        for uri, release, component, origin in (
            line.split(maxsplit=3) for line in listing.stdout.splitlines()
        )
        # The origin is only known once the host has fetched its lists.
        if release in {SUITE, f"{SUITE}-updates", f"{SUITE}-security"}
        and component == "main"
        and uri.startswith("http")
        and origin in {"origin=Debian", "origin=", "origin=$(ORIGIN)"}
    ]
    if not any(f" {SUITE} " in line for line in sources):
        sources = []
    return "".join(f"{line}\n" for line in dict.fromkeys(sources))


def base_tarball() -> Path:
    """The minimal root, made now or at most TARBALL_DAYS ago from the same mirrors."""
    sources, settings = apt_sources(), apt_settings()
    key = hashlib.sha256((sources + settings).encode()).hexdigest()[:12]
    tarball = CACHE / f"debian-{SUITE}-{key}.tar"
    if tarball.exists() and time.time() - tarball.stat().st_mtime < TARBALL_DAYS * 86400:
        return tarball
    with step(f"making a minimal Debian {SUITE} root"), tempfile.TemporaryDirectory() as scratch:
        options = Path(scratch) / "apt.conf"
        options.write_text(settings)
        new = tarball.with_suffix(".new.tar")
        subprocess.run(
            [
                *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include=make"),
                *(f"--aptopt={options}", SUITE, str(new), *(["-"] if sources else [])),
            ],
            input=sources,
            text=True,
            check=True,
        )
        new.rename(tarball)
    if "SUDO_UID" in os.environ:
        for path in (CACHE, tarball):
            os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))
    return tarball


def copy_tree(root: Path) -> None:
    """What git tracks, as it is in the work tree now."""
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={TOP}", "ls-files", "-z"],
        cwd=TOP,
        capture_output=True,
        check=True,
    )
    for name in sorted(listing.stdout.decode().split("\0")):
        source = TOP / name
        if name and source.is_symlink() | source.is_file():
            target = Path(f"{root}{TREE}") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def carried_environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if CARRIED.fullmatch(name) and name not in NOT_CARRIED
    }


def references(texts: Iterable[str]) -> Iterator[tuple[Path, bool]]:
    """The absolute paths in configuration texts, and whether each is written as a file: URL."""
    for text in texts:
        for url, path in REFERENCE.findall(text):
            yield Path(path), bool(url)


def carry_configuration(root: Path) -> list[Path]:
    """Copies the host's network and pip configuration; gives the directories to bind."""

    def carry(source: Path, target: Path | None = None) -> None:
        if source.is_file():
            into = Path(f"{root}{target or source}")
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, into)

    for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
        carry(Path(name))
    for certificate in Path("/usr/local/share/ca-certificates").rglob("*.crt"):
        carry(certificate)
    (root / "etc/apt/apt.conf.d/50host").write_text(apt_settings())

    home = Path.home()
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = {
        Path("/etc/xdg/pip/pip.conf"): None,
        Path("/etc/pip.conf"): None,
        home / ".pip/pip.conf": Path("/root/.pip/pip.conf"),
        config_home / "pip/pip.conf": Path("/root/.config/pip/pip.conf"),
    }
    for source, target in files.items():
        carry(source, target)
    texts = list(carried_environment(os.environ).values())
    texts += [path.read_text() for path in files if path.is_file()]
    if os.environ.get("PIP_CONFIG_FILE"):
        carry(Path(os.environ["PIP_CONFIG_FILE"]))
        texts.append(Path(os.environ["PIP_CONFIG_FILE"]).read_text())

    binds: set[Path] = set()
    for path, is_url in references(texts):
        if path.is_file():
            carry(path)
        elif path.is_dir() and path.parts[1:2] != ("etc",):
            # The pages of an index link to files beside it.
            beside = path.parent if is_url and path.parent != Path("/") else path
            whole = beside if not Path(f"{root}{beside}").exists() else path
            if not Path(f"{root}{whole}").exists():
                binds.add(whole)
    return sorted(binds)


def compiler_cache() -> Path | None:
    """The host's, unless it belongs to the user who called sudo: root's files would spoil it."""
    if os.environ.get("FRESH_CCACHE") == "0" or "SUDO_UID" in os.environ:
        return None
    if not shutil.which("ccache"):
        return None
    asked = subprocess.run(
        ["ccache", "--get-config", "cache_dir"], capture_output=True, text=True, check=False
    )
    cache = Path(asked.stdout.strip() or "/nonexistent")
    return cache if cache.is_dir() else None


def run_inside(root: Path, binds: list[Path]) -> int:
    # pivot_root rather than chroot: who is in a chroot may not have user namespaces.
    mounts = ['mount --bind "$PWD" "$PWD"', 'cd "$PWD"']
    mounts += ["mount -t proc proc proc", "mount --rbind /dev dev", "mount --rbind /sys sys"]
    for path in binds:
        target = shlex.quote(f".{path}")
        mounts.append(f"mkdir -p {target}")
        mounts.append(f"mount --bind {shlex.quote(str(path))} {target}")
        mounts.append(f"mount -o remount,bind,ro {target}")
    if cache := compiler_cache():
        mounts.append("mkdir -p root/.cache/ccache")
        mounts.append(f"mount --bind {shlex.quote(str(cache))} root/.cache/ccache")
    environment = carried_environment(os.environ) | {
        "HOME": "/root",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "CCACHE_DIR": "/root/.cache/ccache",
    }
    environment |= {name: os.environ[name] for name in ("CI", "TERM") if name in os.environ}
    for target in sys.argv[1:] or ("make demo", "make demo", TEST):
        script = "\n".join(
            [
                "set -e",
                *mounts,
                "mkdir -p old",
                "pivot_root . old",
                f"exec sh -c {shlex.quote(f'umount -l /old && cd {TREE} && {target}')}",
            ]
        )
        with step(target):
            status = in_namespaces(["sh", "-c", script], root, environment)
        if status != 0:
            print(f"fresh: {target} failed with status {status}", flush=True)
            return 1
    print("fresh: all of it works in a new Debian", flush=True)
    return 0


def in_namespaces(command: list[str], root: Path, environment: dict[str, str]) -> int:
    """Runs a command with its own mounts and processes, none of which outlive this call."""
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    process = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", *command],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()


def remove(root: Path) -> None:
    """Removes a root; its mounts are gone with their namespace, which is checked all the same."""
    for _ in range(50):
        if f" {root}/" in Path("/proc/self/mountinfo").read_text():
            sys.exit(f"fresh: something is mounted below {root}; unmount it, then remove it")
        shutil.rmtree(root, ignore_errors=True)
        if not root.exists():
            return
        time.sleep(0.2)  # killed processes may still be going
    sys.exit(f"fresh: {root} could not be removed")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"fresh: {shlex.join(map(str, error.cmd))} gave status {error.returncode}")
