"""What works on this host, how fast it really is, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from polyvisor import kvm_probe
from polyvisor.errors import Error

#: "good": works. "poor": works, with a drawback. "missing": does not; `advice` says what helps.
Verdict = Literal["good", "poor", "missing"]

#: CPU features that decide what guests can be given, and how fast the soft engine is.
_FEATURES = (
    "vmx", "svm", "ept", "npt", "avx2", "avx512f", "fma", "bmi2", "adx", "aes", "sha_ni",
    "invariant_tsc", "hypervisor",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    text: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything `polyvisor doctor` shows."""

    version: str
    host: dict[str, Any]
    engines: list[Finding]
    tools: list[Finding]
    #: The engine that "auto" takes; "" when none works.
    engine: str

    @property
    def ok(self) -> bool:
        """Whether a machine can be run, and `exec` has all it needs."""
        return bool(self.engine) and all(tool.verdict != "missing" for tool in self.tools)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "ok": self.ok}


def examine() -> Report:
    """Looks at the host and measures the engines; takes less than a second. Never raises."""
    from polyvisor import __version__

    engines = [soft_engine(), kvm_engine()]
    return Report(
        version=__version__,
        host=host(),
        engines=engines,
        tools=[init(), busybox(), apt(), kernel(), cache_directory()],
        engine=taken_by_auto(),
    )


def taken_by_auto() -> str:
    """The engine that "auto" stands for; "" when none works."""
    from polyvisor import _native

    try:
        return _native.choose_engine("auto")[0]
    except Error:
        return ""


def host() -> dict[str, Any]:
    """CPU, its features, memory and kernel of this host."""
    from polyvisor.config import host_memory

    model, flags = "", set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass
    if {"constant_tsc", "nonstop_tsc"} <= flags:
        flags.add("invariant_tsc")
    return {
        "cpu": model or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "features": [name for name in _FEATURES if name in flags],
        "memory": host_memory(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


# --- engines -------------------------------------------------------------------------------------


def soft_engine() -> Finding:
    """Runs a counting loop on our own CPU."""
    from polyvisor import _native

    try:
        mips = _native.engine_speed("soft")
    except Error as error:
        return Finding("soft", "missing", str(error), values={"available": False})
    return Finding(
        "soft",
        "good",
        f"works everywhere; {mips:.0f} million instructions per second in a hot loop",
        values={"available": True, "mips": round(mips, 1)},
    )


def kvm_engine() -> Finding:
    """What /dev/kvm is worth; measured, not believed."""
    from polyvisor import _native

    found = kvm_probe.probe()
    values: dict[str, Any] = {"device": found.reason or "works", "available": False}
    if found.api_version is not None:
        values["api_version"] = found.api_version
    if found.reason:
        return Finding("kvm", "missing", found.sentence, found.advice, values)
    assert found.mips is not None
    values["mips"] = round(found.mips, 1)
    values["available"] = True
    text = f"{found.sentence}; ring 0 runs {found.mips:.4g} million instructions per second"
    # The rule by which "auto" chooses.
    if found.mips >= _native.engine_speed("soft"):
        return Finding("kvm", "good", text, values=values)
    return Finding(
        "kvm",
        "poor",
        f"{text}: this host emulates it, and the soft engine is faster",
        "use a host with hardware virtualization, or one that passes it on (nested)",
        values,
    )


# --- what exec needs -----------------------------------------------------------------------------


def init() -> Finding:
    """polyvisor's own init for guests."""
    from polyvisor.images import initramfs

    try:
        path = initramfs.find_init("amd64")
    except Error as error:
        return Finding("guest init", "missing", str(error), "make build")
    return Finding("guest init", "good", str(path))


def busybox() -> Finding:
    """The guest's user space."""
    from polyvisor.images import initramfs

    try:
        path = initramfs.find_busybox("amd64")
    except Error as error:
        return Finding("busybox", "missing", str(error), "apt-get install busybox-static")
    if not initramfs.is_static(path):
        return Finding(
            "busybox",
            "missing",
            f"{path} needs shared libraries, which a guest does not have",
            "apt-get install busybox-static",
        )
    return Finding("busybox", "good", f"{path}, static")


def apt() -> Finding:
    """Where kernels come from."""
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        return Finding(
            "packages",
            "poor",
            f"there is no {', '.join(missing)}, so kernels cannot be fetched",
            "give a kernel file with --kernel",
        )
    return Finding("packages", "good", f"{shutil.which('apt-get')} fetches kernels")


def kernel() -> Finding:
    """The kernel of `exec`."""
    from polyvisor.images import kernel as kernels

    if not kernels.cached():
        return Finding(
            "kernel",
            "poor",
            "not fetched yet: the first `polyvisor exec` downloads some 30 MB",
            values={"cached": False},
        )
    try:
        found = kernels.fetch()
    except Error as error:
        return Finding("kernel", "missing", str(error), "remove it from the cache")
    return Finding(
        "kernel", "good", f"{found.package} {found.version}, cached", values={"cached": True}
    )


def cache_directory() -> Finding:
    """Whether downloads can be kept."""
    from polyvisor.images import cache

    root = cache.root()
    place = root
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            "cache",
            "missing",
            f"{root} cannot be written",
            "set POLYVISOR_CACHE to a directory that can",
        )
    free = shutil.disk_usage(place).free
    if free < 100 << 20:
        return Finding(
            "cache",
            "poor",
            f"{root} has only {free >> 20} MiB free",
            "make room, or set POLYVISOR_CACHE to a directory elsewhere",
        )
    return Finding("cache", "good", str(root), values={"path": str(root)})
