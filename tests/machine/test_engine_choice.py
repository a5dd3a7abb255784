"""Which engine a machine gets, and what its CPU says of itself on each."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
from guestcode import end, real_mode

import polyvisor
from polyvisor import _native, kvm_probe
from polyvisor.errors import ConfigError

#: Of every leaf that tells a guest something that it may act upon.
LEAVES = [
    *[(leaf, 0) for leaf in (0, 1, 2, 5, 6, 0xA, 0x15, 0x16)],
    *[(4, n) for n in range(5)],
    *[(leaf, n) for leaf in (7, 0xB, 0xD) for n in range(3)],
    *[(0x40000000 + n, 0) for n in (0, 1, 0x10)],
    *[(0x80000000 + n, 0) for n in (*range(9), 0x1E, 0x21)],
    *[(0x8000001D, n) for n in range(5)],
]
BUFFER = 0x10000


def cpuid(leaves: list[tuple[int, int]], **options: object) -> list[tuple[int, ...]]:
    """What CPUID gives in a guest in real mode: EAX, EBX, ECX, EDX of each leaf."""
    code = b"\xb8" + struct.pack("<H", BUFFER >> 4) + b"\x8e\xd8"  # ds: the buffer
    code += b"\x31\xff"
    for leaf, subleaf in leaves:
        code += b"\x66\xb8" + struct.pack("<I", leaf) + b"\x66\xb9" + struct.pack("<I", subleaf)
        code += b"\x0f\xa2"
        for store in (
            b"\x66\x89\x05",
            b"\x66\x89\x5d\x04",
            b"\x66\x89\x4d\x08",
            b"\x66\x89\x55\x0c",
        ):
            code += store  # [di], [di + 4], ...
        code += b"\x83\xc7\x10"
    with real_mode(code + end(), **options) as machine:
        assert machine.run(timeout=30).reason == "debug_exit"
        data = machine.memory.read(BUFFER, 16 * len(leaves))
    return list(struct.iter_unpack("<4I", data))


def run_python(code: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "POLYVISOR_ENGINE"}
    return subprocess.run(
        [*prefix, sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- which one -----------------------------------------------------------------------------------


def test_auto_takes_the_fastest_that_works() -> None:
    works = kvm_probe.probe(measure=False).reason == ""
    fast = works and _native.engine_speed("kvm") >= _native.engine_speed("soft")
    assert _native.choose_engine("auto")[0] == ("kvm" if fast else "soft")
    with polyvisor.Machine(memory="2M") as machine:
        assert machine.engine == ("kvm" if fast else "soft")


SAY = """
import polyvisor
for engine in ("soft", "auto", "auto"):
    with polyvisor.Machine(memory="2M", engine=engine) as machine:
        print(machine.engine, [line for line in machine.log() if line.startswith("engine:")])
"""


def test_passing_kvm_over_is_said_once() -> None:
    found = kvm_probe.probe(measure=False)
    done = run_python(SAY)
    explicit, first, second = done.stdout.splitlines()
    assert explicit == "soft []"
    if first.startswith("kvm") or found.reason == "missing":
        assert first.endswith(" []")
    elif not found.reason:
        # Both figures, so that anybody can judge.
        assert re.search(r"runs [\d.]+ million instructions .* ring 0, and soft \d+", first), first
    assert second.endswith(" []")


@pytest.mark.needs_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_a_device_that_is_no_kvm() -> None:
    """The file is there but something else: auto goes on and says so, kvm does not."""
    code = (
        "import polyvisor\n"
        "from polyvisor.errors import EngineUnavailable\n"
        "with polyvisor.Machine(memory='2M') as machine:\n"
        "    print(machine.engine, *machine.log())\n"
        "try:\n"
        "    polyvisor.Machine(memory='2M', engine='kvm')\n"
        "except EngineUnavailable as error:\n"
        "    print(error.engine, error.reason)\n"
    )
    if not os.path.exists("/dev/kvm"):
        pytest.skip("no /dev/kvm to put something else over")
    cover = 'mount --bind /dev/null /dev/kvm && exec "$@"'
    done = run_python(code, "unshare", "-m", "sh", "-c", cover, "sh")
    if done.stderr.startswith(("unshare:", "mount:")):
        # Not allowed, or the root is no mount point (a chroot).
        pytest.skip(f"/dev/null cannot stand for /dev/kvm here: {done.stderr.strip()}")
    first, second = done.stdout.splitlines()
    assert first.startswith("soft engine: engine auto takes soft: /dev/kvm is not KVM's device")
    assert second == "kvm broken"


@pytest.mark.kvm
def test_kvm_by_name_works_even_if_it_is_slow() -> None:
    with real_mode(end(7), engine="kvm") as machine:
        assert machine.engine == "kvm"
        assert machine.run(timeout=30).status == 15
        assert not [line for line in machine.log() if line.startswith("engine:")]


def test_deterministic_is_soft() -> None:
    with polyvisor.Machine(memory="2M", deterministic=True) as machine:
        assert machine.engine == "soft"


def test_names_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="choose one of auto"):
        _native.choose_engine("hvf")
    with pytest.raises(ConfigError) as caught:
        _native.engine_speed("hvf")
    assert caught.value.field == "engine"


def test_speed_is_that_of_ring_0(engine: str) -> None:
    """Plausible, and not the time of starting a machine."""
    assert 0.1 < _native.engine_speed(engine) < 100_000


# --- the CPU -------------------------------------------------------------------------------------


def test_single_features() -> None:
    [one] = cpuid([(1, 0)], engine="soft")
    assert one[2] >> 23 & 1  # popcnt
    [less] = cpuid([(1, 0)], engine="soft", cpu_features={"popcnt": False, "xsave": False})
    assert less[2] >> 23 & 1 == 0
    assert less[2] >> 26 & 1 == 0
    assert less[2] >> 28 & 1 == 0  # avx needs xsave
    [more] = cpuid([(1, 0)], engine="soft", cpu_model="baseline", cpu_features={"popcnt": True})
    assert more[2] >> 23 & 1
    assert more[2] >> 20 & 1 == 0  # sse4_2


@pytest.mark.parametrize(
    ("features", "field"),
    [
        ({"warp": True}, "warp"),
        ({"": False}, '""'),
        ({"pku": True}, "pku"),  # no engine has it
        ({"avx": True}, "avx"),  # without xsave
    ],
)
def test_features_that_cannot_be(features: dict[str, bool], field: str, engine: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        polyvisor.Machine(memory="2M", engine=engine, cpu_model="baseline", cpu_features=features)
    assert caught.value.field == "cpu_features"


@pytest.mark.parametrize("bad", [{"xsave": 1}, {1: True}, ["xsave"], "xsave"])
def test_features_of_the_wrong_kind(bad: object) -> None:
    with pytest.raises(ConfigError) as caught:
        polyvisor.Machine(memory="2M", cpu_features=bad)  # type: ignore[arg-type]
    assert caught.value.field == "cpu_features"
    with pytest.raises(ConfigError) as caught:
        polyvisor.Machine(memory="2M", portable="yes")  # type: ignore[arg-type]
    assert caught.value.field == "portable"


@pytest.mark.parametrize("model", ["host", "baseline", "x86-64-v2", "x86-64-v3"])
def test_models(engine: str, model: str) -> None:
    """Every one either runs, or names the feature that this host lacks."""
    try:
        machine = real_mode(end(1), engine=engine, cpu_model=model)
    except ConfigError as error:
        refusal = error
    else:
        with machine:
            assert machine.run(timeout=30).status == 3
        return
    assert model.startswith("x86-64-v")
    assert refusal.field == "cpu_model"
    assert re.search(rf'"{model}" needs \w+, which', str(refusal))


@pytest.mark.kvm
@pytest.mark.kvm_fast
def test_a_portable_cpu_is_the_same_on_every_engine() -> None:
    def seen(engine: str, **options: object) -> dict[tuple[int, int], tuple[int, ...]]:
        return dict(zip(LEAVES, cpuid(LEAVES, engine=engine, cpus=3, **options), strict=True))

    soft, kvm = seen("soft", portable=True), seen("kvm", portable=True)
    assert soft == kvm
    for model in ("baseline", "x86-64-v2"):
        assert seen("soft", portable=True, cpu_model=model) == seen(
            "kvm", portable=True, cpu_model=model
        )
    # Only because it is asked for: otherwise each engine shows what it has.
    assert seen("soft") != soft
    with (
        polyvisor.Machine(memory="2M", engine="soft", portable=True) as one,
        polyvisor.Machine(memory="2M", engine="kvm", portable=True) as other,
    ):
        assert one.tsc_khz == other.tsc_khz


@pytest.mark.kvm
def test_a_portable_tsc_is_the_hosts(engine: str) -> None:
    with polyvisor.Machine(memory="2M", engine="kvm") as machine:
        own = machine.tsc_khz
    with polyvisor.Machine(memory="2M", engine=engine, portable=True) as machine:
        assert machine.tsc_khz == own
