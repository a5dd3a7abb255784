"""What a machine counts: the dict of `Machine.statistics`, and the same as a table for people.

::

    {
        "engine": "kvm",
        "counters": {"posted_writes": 0, ...},
        "cpus": [{"exits": {"io": 123, "hlt": 4, ...}, "returns": {...}, "counters": {...}}],
        "devices": {"serial@0x3f8": {"reads": 40, "writes": 61}, ...},
        "kvm": {"vm": {...}, "vcpus": [{"halt_wait_ns": 0, ...}], "units": {...}},
        "unclaimed": {"ports": 0, "memory": 0},
        "log": {"pci": 2},
    }

``counters``
    Of the engine as a whole. kvm: ``doorbells`` and ``posted_ranges`` are ranges of devices that
    the kernel serves at present without an exit, ``refused_ranges`` those that it did not take,
    ``posted_writes`` the writes that it collected so far.
``cpus[].exits``
    How often the CPU left the guest, by reason, since the machine was made. kvm: KVM's exit reasons
    in lower case (Linux' Documentation/virt/kvm/api.rst, "The kvm_run structure"); "other" are
    those that this version has no name for. Empty on soft, whose guest never leaves anything.
``cpus[].returns``
    How often the engine had to ask the machine, because no device of its own answers: io, mmio,
    halt, ...
``cpus[].counters``
    The engine's own. soft: only while the machine is not running.
``devices``
    Reads and writes that reached each device, by its name and first address. A doorbell that the
    kernel rings (ioeventfd) does not reach the device and is not counted.
``kvm``
    The kernel's own statistics, under its names; None on other engines, empty on kernels before
    5.14. A histogram is a list of buckets. ``units[name]`` says what a number means: ``kind``
    (cumulative, instant, peak, linear_histogram, log_histogram), ``unit`` (none, bytes, seconds,
    cycles, boolean) and ``factor``: value times factor is in that unit. ``bucket`` is the width of
    a linear histogram's buckets; bucket n of a log_histogram counts from 2**(n-1) below 2**n.
``unclaimed``
    Accesses to addresses where there is no device.
``log``
    How often the guest did something that is worth a note, by topic; see `Machine.log`.
"""

from __future__ import annotations

from typing import Any

from polyvisor import _native


def collect(machine: _native.Machine) -> dict[str, Any]:
    """The dict above; safe while the machine runs, and after it was closed (its last numbers)."""
    raw = _native.statistics(machine)
    ports, memory = raw["unclaimed"]
    return {
        "engine": raw["engine"],
        "counters": raw["counters"],
        "cpus": [
            {key: cpu[key] for key in ("exits", "returns", "counters")} for cpu in raw["cpus"]
        ],
        "devices": {
            f"{name}@{start:#x}": {"reads": reads, "writes": writes}
            for name, _bus, start, reads, writes in raw["devices"]
        },
        "kvm": _kvm(raw) if raw["engine"] == "kvm" else None,
        "unclaimed": {"ports": ports, "memory": memory},
        "log": raw["log"],
    }


def _kvm(raw: dict[str, Any]) -> dict[str, Any]:
    described = [*raw["host"], *(entry for cpu in raw["cpus"] for entry in cpu["host"])]
    return {
        "vm": _values(raw["host"]),
        "vcpus": [_values(cpu["host"]) for cpu in raw["cpus"]],
        "units": {name: _unit(*description) for name, *description, _values in described},
    }


def _values(entries: list[Any]) -> dict[str, int | list[int]]:
    return {
        name: values if kind.endswith("histogram") or len(values) != 1 else values[0]
        for name, kind, _unit, _base, _exponent, _bucket, values in entries
    }


def _unit(kind: str, unit: str, base: int, exponent: int, bucket: int) -> dict[str, Any]:
    factor: float = base**exponent
    if base == 10 and exponent < 0:
        factor = float(f"1e{exponent}")  # the nearest, which 10**-9 need not be
    result: dict[str, Any] = {"kind": kind, "unit": unit, "factor": factor}
    if kind == "linear_histogram":
        result["bucket"] = bucket
    return result


def rows(statistics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(of what, which, how many) of everything that is not zero, for a table."""
    found: list[tuple[str, str, str]] = []

    def add(what: str, values: dict[str, Any], shown: str = "{}") -> None:
        for name, value in values.items():
            if isinstance(value, int) and value != 0:
                found.append((what, shown.format(name), f"{value:,}"))

    for index, cpu in enumerate(statistics["cpus"]):
        add(f"cpu {index}", cpu["exits"], "exits: {}")
        add(f"cpu {index}", cpu["returns"], "unserved: {}")
        add(f"cpu {index}", cpu["counters"])
    add("engine", statistics["counters"])
    for name, counts in statistics["devices"].items():
        add(name, counts)
    add("unclaimed", statistics["unclaimed"])
    add("log", statistics["log"])
    kvm = statistics["kvm"]
    if kvm is not None:
        add("kvm: vm", kvm["vm"])
        for index, values in enumerate(kvm["vcpus"]):
            add(f"kvm: vcpu {index}", values)
    return found


def table(statistics: dict[str, Any]) -> str:
    """The rows as aligned text, one a line."""
    lines = rows(statistics)
    if not lines:
        return ""
    what, which, count = (max(len(row[column]) for row in lines) for column in range(3))
    return "".join(f"{a:{what}}  {b:{which}}  {c:>{count}}\n" for a, b, c in lines)
