"""What a machine is made of, as validated data, given in Python, TOML or JSON."""

from __future__ import annotations

import os

from polyvisor.errors import ConfigError
from polyvisor.records import Record, asdict, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    EngineName = Literal["auto", "soft", "kvm"]
    IrqchipName = Literal["auto", "user", "split", "kernel"]
    HugePagesName = Literal["auto", "none", "transparent", "2M", "1G"]

# The same as values.
ENGINES = ("auto", "soft", "kvm")
IRQCHIPS = ("auto", "user", "split", "kernel")
HUGE_PAGES = ("auto", "none", "transparent", "2M", "1G")

PAGE_SIZE = 4096
MIN_MEMORY = 1 << 20
#: Guest-physical addresses have 40 bits; the top of them is left to devices.
MAX_MEMORY = 1 << 39
#: APIC ids fit the 8 bits of xAPIC mode; 0xff is the broadcast address.
MAX_CPUS = 254

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class MachineConfig(Record, kw_only=True):
    """The arguments of `polyvisor.Machine`. Checked by `validated()`, not when constructed."""

    #: Bytes of RAM, or text with a unit: "512M", "2G" (powers of 1024); a multiple of 4096.
    memory: int | str = 512 << 20
    #: Virtual CPUs, each with a host thread of its own.
    cpus: int = 1
    #: "auto": what the environment variable POLYVISOR_ENGINE says, or else the faster one here.
    engine: EngineName = "auto"
    #: "host" (all that engine and host have), "baseline", "x86-64-v2" or "x86-64-v3". The named
    #: models have the same instructions on every host and engine. What a guest defends itself
    #: against speculation with follows the engine.
    cpu_model: str = "host"
    #: Single features on top of the model, by their names in /proc/cpuinfo: {"xsave": False}
    #: hides one and what depends on it, {"aes": True} adds one that engine and host have.
    cpu_features: dict[str, bool] = {}  # noqa: RUF012 -- copied by Record
    #: Only what every engine that works on this host offers, with a TSC that all can have, so that
    #: a snapshot or state made on one continues on another. Such a guest is told of no immunity
    #: of the soft engine, and given no speculation control of the hardware.
    portable: bool = False
    #: Time is a function of the instructions executed; two runs are identical. One CPU, `soft`
    #: only.
    deterministic: bool = False
    #: The guest's time-stamp counter, in kHz. None: the host's own on `kvm`, 1 GHz on `soft`.
    tsc_khz: int | None = None
    #: Who plays the interrupt chips: the engine if it can ("auto"), polyvisor alone ("user"), the
    #: engine for the local APICs ("split") or for all of them ("kernel"). `soft` has only "user".
    irqchip: IrqchipName = "auto"
    #: What the host backs RAM with: this process's own memory, in which the host joins pages where
    #: it can ("transparent"), 4 KiB pages of shared memory ("none"), or pages of its pool ("2M",
    #: "1G": `memory` in multiples of that, reserved by the host's administrator). "auto" is
    #: "transparent" on `kvm` and "none" on `soft`.
    hugepages: HugePagesName = "auto"
    #: `kvm`: entries of each CPU's dirty ring, a power of two from 1024, for `Memory.dirty`. 0: the
    #: kernel keeps bitmaps, which is best unless memory is large and little of it is written.
    dirty_ring: int = 0
    #: Deterministic mode: virtual nanoseconds that a thousand instructions take.
    ns_per_1000_instructions: int = 1000
    #: Serial ports (COM1 to COM4); `Machine.console` is the first.
    serial_ports: int = 2
    #: What the RTC says at start, in seconds since 1970 (UTC). None: the host's time, and in
    #: deterministic mode the start of 2026.
    wall_clock: float | None = None
    #: For people: in error messages and the names of host threads.
    name: str = "machine"

    @property
    def memory_size(self) -> int:
        """`memory` in bytes."""
        return parse_size(self.memory)

    def validated(self) -> MachineConfig:
        """This configuration with `memory` as an int; raises `ConfigError` when it cannot work."""
        asked = os.environ.get("POLYVISOR_ENGINE")
        if self.engine == "auto" and asked and not self.deterministic:
            return replace(self, engine=asked).validated()
        size = parse_size(self.memory)
        if size < MIN_MEMORY:
            raise ConfigError(
                f"memory is {show_size(size)}, but a PC needs at least {show_size(MIN_MEMORY)}; "
                f'give for example memory="512M"',
                field="memory",
            )
        if size % PAGE_SIZE:
            raise ConfigError(
                f"memory of {size} bytes is not a whole number of 4096-byte pages", field="memory"
            )
        if size > MAX_MEMORY:
            raise ConfigError(
                f"memory of {show_size(size)} is beyond the most a machine can have, "
                f"{show_size(MAX_MEMORY)}",
                field="memory",
            )
        host = host_memory()
        if host and size > host:
            raise ConfigError(
                f"memory of {show_size(size)} is more than this host has with its swap, "
                f"{show_size(host)}; give the machine less",
                field="memory",
            )
        self._check_int("cpus", 1, MAX_CPUS)
        self._check_int("serial_ports", 1, 4)
        if self.tsc_khz is not None:
            self._check_int("tsc_khz", 1_000, 100_000_000)
        self._check_int("ns_per_1000_instructions", 1, 1_000_000_000)
        if self.engine not in ENGINES:
            raise ConfigError(
                f"there is no engine {self.engine!r}; choose one of {', '.join(ENGINES)}",
                field="engine",
            )
        self._check_features()
        if self.irqchip not in IRQCHIPS:
            raise ConfigError(
                f"there is no irqchip mode {self.irqchip!r}; choose one of {', '.join(IRQCHIPS)}",
                field="irqchip",
            )
        if self.hugepages not in HUGE_PAGES:
            raise ConfigError(
                f"there are no huge pages of kind {self.hugepages!r}; choose one of "
                f"{', '.join(HUGE_PAGES)}",
                field="hugepages",
            )
        self._check_int("dirty_ring", 0, 1 << 20)
        if self.dirty_ring & (self.dirty_ring - 1):
            raise ConfigError(
                f"dirty_ring is {self.dirty_ring}, but must be a power of two, or 0 for none",
                field="dirty_ring",
            )
        if self.deterministic and self.cpus != 1:
            raise ConfigError(
                f"deterministic mode runs one CPU, not {self.cpus}; give cpus=1", field="cpus"
            )
        if self.deterministic and self.engine == "kvm":
            raise ConfigError(
                'deterministic mode needs an engine that counts instructions; give engine="soft"',
                field="engine",
            )
        return replace(self, memory=size)

    def _check_features(self) -> None:
        if not isinstance(self.portable, bool):
            raise ConfigError(
                f"portable must be True or False, not {self.portable!r}", field="portable"
            )
        features = self.cpu_features
        if not isinstance(features, dict) or not all(
            isinstance(name, str) and isinstance(on, bool) for name, on in features.items()
        ):
            raise ConfigError(
                'cpu_features must be names with True or False, as in {"xsave": False}, '
                f"not {features!r}",
                field="cpu_features",
            )

    def _check_int(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{field} must be a whole number, not {value!r}", field=field)
        if not low <= value <= high:
            raise ConfigError(f"{field} is {value}, but must be from {low} to {high}", field=field)


def parse_size(value: int | str, field: str = "memory") -> int:
    """Bytes of a size: an int, or text such as "64K", "512M", "1.5G", "2GiB" (powers of 1024)."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(
            f'{field} must be a number of bytes or text such as "512M", not {value!r}', field=field
        )
    if isinstance(value, int):
        if value < 0:
            raise ConfigError(f"{field} cannot be negative: {value}", field=field)
        return value
    text = value.strip().lower()
    number = text.rstrip("bikmgt")
    unit = text[len(number) :].removesuffix("b")
    factor = _UNITS.get(unit.removesuffix("i") if text.endswith("ib") else unit, 0)
    whole, point, fraction = number.rstrip().partition(".")
    if not factor or not whole.isdecimal() or (point and not fraction.isdecimal()):
        raise ConfigError(
            f'cannot read {field} {value!r}; give bytes or a unit of K, M, G or T, as in "512M"',
            field=field,
        )
    if not point:
        return int(number) * factor
    size = float(number) * factor
    if size != int(size):
        raise ConfigError(f"{field} {value!r} is not a whole number of bytes", field=field)
    return int(size)


def show_size(size: int) -> str:
    """A size for people: "512 MiB", "4 KiB", "100 bytes"."""
    for letter in "tgmk":
        unit = _UNITS[letter]
        if size >= unit and size * 10 % unit == 0:
            return f"{size / unit:g} {letter.upper()}iB"
    for letter in "gm":
        if size >= _UNITS[letter]:
            return f"{size / _UNITS[letter]:.1f} {letter.upper()}iB"
    return f"{size} bytes"


def host_memory() -> int:
    """RAM and swap of this host in bytes; 0 when it cannot be told."""
    total = 0
    try:
        with open("/proc/meminfo", "rb") as file:
            for line in file:
                if line.startswith((b"MemTotal:", b"SwapTotal:")):
                    total += int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return total


def from_dict(values: dict[str, object]) -> MachineConfig:
    """A validated configuration from plain data, as TOML or JSON give it."""
    import re

    import msgspec

    try:
        checked = msgspec.convert(values, _struct())
    except msgspec.ValidationError as error:
        found = re.search(r"\$\.(\w+)|field `(\w+)`", str(error))
        field = next((group for group in found.groups() if group), "") if found else ""
        raise ConfigError(f"machine configuration: {error}", field=field) from None
    return MachineConfig(**msgspec.structs.asdict(checked)).validated()


def _struct() -> type[Any]:
    """`MachineConfig` as a msgspec struct, by which plain data is checked."""
    from typing import Literal, get_type_hints

    import msgspec

    names = {
        "EngineName": Literal[ENGINES],
        "IrqchipName": Literal[IRQCHIPS],
        "HugePagesName": Literal[HUGE_PAGES],
    }
    types = get_type_hints(MachineConfig, localns=names)
    defaults = asdict(MachineConfig())
    return msgspec.defstruct(
        "MachineConfig",
        [(name, types[name], default) for name, default in defaults.items()],
        kw_only=True,
        forbid_unknown_fields=True,
    )


def from_toml(path: str | os.PathLike[str]) -> MachineConfig:
    """A validated configuration from the table ``[machine]`` (or the top) of a TOML file."""
    import tomllib

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"cannot read configuration {os.fspath(path)!r}: {error.strerror}", field=""
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{os.fspath(path)!r} is not TOML: {error}", field="") from None
    table = values.get("machine", values)
    if not isinstance(table, dict):
        raise ConfigError(f"'machine' in {os.fspath(path)!r} must be a table", field="machine")
    return from_dict(table)
