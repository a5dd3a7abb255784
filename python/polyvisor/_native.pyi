"""The C++ core as bound by src/bind_*.cpp. `polyvisor.Machine` is the interface for people."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

from typing_extensions import Buffer  # in the standard library from Python 3.12 on

from polyvisor.machine import Reason, State

__version__: str
_Tuple = TypeVar("_Tuple", bound=tuple[Any, ...])

@final
class Region:
    """One region of guest memory. Supports the buffer protocol, without a copy: a memoryview of
    it keeps the memory alive, also after the machine was closed."""

    @property
    def start(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class GuestMemory:
    def __init__(self, regions: Sequence[tuple[int, int]]) -> None:
        """Zeroed memory of no machine: (start, bytes) of each region, multiples of 4096."""

    @property
    def regions(self) -> list[Region]: ...
    @property
    def total_size(self) -> int: ...
    def read(self, gpa: int, size: int) -> bytes: ...
    def read_into(self, gpa: int, buffer: Buffer) -> None: ...
    def write(self, gpa: int, data: Buffer) -> None: ...
    def note_write(self, gpa: int, size: int) -> None: ...

@final
class DirtyLog:
    @property
    def active(self) -> bool: ...
    @property
    def method(self) -> str: ...
    def fetch(self) -> tuple[list[tuple[int, int]], list[tuple[int, bytes]]]: ...
    def stop(self) -> None: ...

@final
class WalkReport:
    """How a walk of page tables ended; `polyvisor.mmu.Walk` is the interface for people."""

    @property
    def fault(self) -> str:
        """ "", "not-canonical", "page-fault", "ept-violation", "ept-misconfiguration" or
        "nested-page-fault"."""

    @property
    def vector(self) -> int: ...
    @property
    def error_code(self) -> int: ...
    @property
    def qualification(self) -> int: ...
    @property
    def fault_gpa(self) -> int: ...
    @property
    def during_walk(self) -> bool: ...
    @property
    def mapped(self) -> bool: ...
    @property
    def physical(self) -> int: ...
    @property
    def gpa(self) -> int: ...
    @property
    def shift(self) -> int: ...
    @property
    def user(self) -> bool: ...
    @property
    def writable(self) -> bool: ...
    @property
    def executable(self) -> bool: ...
    @property
    def is_global(self) -> bool: ...
    @property
    def accessed(self) -> bool: ...
    @property
    def dirty(self) -> bool: ...
    @property
    def memory_type(self) -> int: ...
    @property
    def key(self) -> int: ...
    @property
    def steps(self) -> list[tuple[int, int, int, bool]]:
        """(address, entry, shift, of the second dimension); a PDPTE register has address 2**64-1"""

@final
class EptState:
    def __init__(
        self,
        eptp: int,
        *,
        execute_only: bool,
        mode_based_execute: bool,
        five_levels: bool,
        pages_2mb: bool,
        pages_1gb: bool,
        access_dirty: bool,
        physical_mask: int,
    ) -> None: ...

@final
class NptState:
    def __init__(
        self, ncr3: int, *, cr0: int, cr4: int, efer: int, pages_1gb: bool, physical_mask: int
    ) -> None: ...

class AddressSpace:
    def __init__(
        self,
        memory: GuestMemory,
        *,
        cr0: int,
        cr3: int,
        cr4: int,
        efer: int,
        pkru: int,
        pkrs: int,
        physical_mask: int,
        pages_1gb: bool,
        pse36: bool,
        pdpte: Sequence[int] | None,
        second: EptState | NptState | None,
    ) -> None: ...
    def translate(self, gva: int, /) -> int | None:
        """Where the byte at `gva` is in memory, whatever the rights; None when it is not mapped."""

    def report(
        self,
        gva: int,
        *,
        write: bool = False,
        fetch: bool = False,
        user: bool = False,
        implicit: bool = False,
        ac: bool = False,
        set_bits: bool = False,
        probe: bool = False,
    ) -> WalkReport: ...
    def access_many(
        self,
        gvas: Sequence[int],
        *,
        write: bool = False,
        fetch: bool = False,
        user: bool = False,
        implicit: bool = False,
        ac: bool = False,
        set_bits: bool = False,
    ) -> list[int | None]:
        """Where each address leads, None when this access to it is refused."""

    @property
    def mode(self) -> str:
        """none, 32-bit, pae, 4-level or 5-level"""

    @property
    def pdpte(self) -> tuple[int, int, int, int]: ...
    @property
    def guest_memory(self) -> GuestMemory: ...

@final
class Segment:
    def __init__(
        self, selector: int = 0, base: int = 0, limit: int = 0xFFFF, attributes: int = 0
    ) -> None: ...
    selector: int
    base: int
    limit: int
    attributes: int

@final
class InFlightEvent:
    """An event that the CPU has begun to deliver: its handler is entered before the next
    instruction. `length`: bytes of the instruction at RIP that makes a software event."""

    def __init__(
        self, kind: str, vector: int, *, error_code: int | None = None, length: int = 0
    ) -> None: ...
    def __eq__(self, other: object, /) -> bool: ...
    @property
    def kind(self) -> str:
        """interrupt, nmi, exception, software_interrupt or software_exception"""

    @property
    def vector(self) -> int: ...
    @property
    def error_code(self) -> int | None: ...
    @property
    def length(self) -> int: ...

@final
class CpuState:
    """The architectural state of a CPU. ``state["rax"]``, ``state["cs.base"]``: see `names()`."""

    def __init__(self, bootstrap: bool = True) -> None: ...
    @staticmethod
    def names() -> tuple[str, ...]: ...
    def __getitem__(self, name: str, /) -> int: ...
    def __setitem__(self, name: str, value: int, /) -> None: ...
    def __eq__(self, other: object, /) -> bool: ...
    def copy(self) -> CpuState: ...
    def segment(self, name: str) -> Segment: ...
    def set_segment(self, name: str, value: Segment) -> None: ...
    activity: str
    interrupt_shadow: bool
    nmi_blocked: bool
    nmi_pending: bool
    event: InFlightEvent | None
    fxsave: bytes
    def xmm(self, index: int) -> bytes: ...
    def ymm(self, index: int) -> bytes: ...

@final
class IrqLine:
    """A wire into the machine's interrupt chips. Level: set(True) ... set(False). Edge: pulse()."""

    def set(self, level: bool) -> None: ...
    def pulse(self) -> None: ...

@final
class Timer:
    """Calls back once when virtual time reaches the armed deadline; arm again for a period."""

    def arm(self, deadline_ns: int) -> None: ...
    def disarm(self) -> None: ...
    @property
    def deadline(self) -> int | None: ...

@final
class StopInfo:
    @property
    def reason(self) -> Reason: ...
    @property
    def status(self) -> int: ...
    @property
    def detail(self) -> str: ...
    @property
    def cpu(self) -> int: ...

@final
class SerialPort:
    """What is plugged into a serial port: all it sent, by offset, and a queue of what is typed."""

    @property
    def size(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def unsent(self) -> int: ...
    def read(self, offset: int, limit: int = ...) -> tuple[int, bytes]: ...
    def wait(self, offset: int, timeout: float | None = None) -> bool: ...
    def send(self, data: Buffer) -> None: ...
    def set_flow_control(self, on: bool) -> None: ...

@final
class Snapshot:
    """A machine's whole state, taken while it stood still."""

    @property
    def now(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def cpus(self) -> list[CpuState]: ...
    @property
    def parts(self) -> dict[str, bytes]: ...

@final
class Machine:
    def __init__(
        self,
        *,
        memory: int,
        cpus: int = 1,
        engine: str = "auto",
        cpu_model: str = "host",
        deterministic: bool = False,
        tsc_khz: int = 0,
        ns_per_1000_instructions: int = 1000,
        serial_ports: int = 2,
        irqchip: str = "auto",
        cpu_features: dict[str, bool] = ...,
        portable: bool = False,
        hugepages: str = "auto",
        dirty_ring: int = 0,
        name: str = "machine",
    ) -> None: ...
    @property
    def tsc_khz(self) -> int: ...
    @property
    def physical_bits(self) -> int:
        """Of guest-physical addresses, as the guest's CPUID says."""

    @property
    def memory(self) -> GuestMemory: ...
    def dirty_log(self) -> DirtyLog: ...
    @property
    def engine(self) -> str: ...
    @property
    def state(self) -> State: ...
    @property
    def now(self) -> int: ...
    @property
    def exception(self) -> BaseException | None: ...
    @property
    def stop_info(self) -> StopInfo | None: ...

    # Running. All of these release the GIL while they wait; wait() and step() look for signals.
    def start(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def wait(self, timeout: float | None = None) -> StopInfo | None: ...
    def request_end(self, reason: str, status: int = 0, detail: str = "") -> None: ...

    # CPUs: the machine must not be running.
    def save_cpu(self, index: int) -> CpuState: ...
    def restore_cpu(self, index: int, state: CpuState) -> None: ...
    def translate(self, index: int, gva: int) -> int | None: ...
    def step(self, index: int, instructions: int) -> None: ...
    def nmi(self, index: int) -> None: ...
    def add_breakpoint(self, index: int, address: int, kind: str, size: int) -> int: ...
    def remove_breakpoint(self, number: int) -> None: ...
    def breakpoints(self) -> list[tuple[int, int, str, int]]: ...
    def debug_stops(self) -> list[tuple[int, int, str, int]]: ...
    def wait_stopped(self, timeout: float | None = None) -> bool: ...

    # Devices.
    def add_port_device(self, port: int, size: int, device: object, base: int = 0) -> None: ...
    def add_memory_device(self, gpa: int, size: int, device: object, base: int = 0) -> None: ...
    def remove_port_device(self, port: int) -> None: ...
    def remove_memory_device(self, gpa: int) -> None: ...
    def irq(self, gsi: int) -> IrqLine: ...
    def timer(self, callback: Callable[[], None]) -> Timer: ...
    def power_button(self) -> None: ...
    def serial(self, index: int = 0) -> SerialPort: ...
    @property
    def debug_console(self) -> SerialPort: ...
    def snapshot(self) -> Snapshot: ...
    def restore(self, snapshot: Snapshot) -> None: ...
    def ranges(self) -> list[tuple[str, int, int, str]]: ...
    def counters(self) -> dict[str, int]: ...
    def log(self) -> list[str]: ...

def statistics(machine: Machine) -> dict[str, Any]:
    """All that the machine counts; `polyvisor.statistics` gives it its shape."""

def engines() -> list[tuple[str, str, str]]:
    """(name, reason, sentence) of each engine, best first; reason is "" if it works here."""

def choose_engine(name: str, deterministic: bool = False) -> tuple[str, str]:
    """The engine that "auto" or another name stands for here, and a sentence about a better one
    that was passed over ("": none, or told before in this process)."""

def engine_speed(name: str) -> float:
    """Million instructions per second at ring 0, measured once per process."""

def probe_kvm(path: str, measure: bool = True) -> tuple[str, str, float]:
    """(reason, sentence, million instructions per second) of a KVM device."""

def pc_layout() -> dict[str, int]:
    """Addresses and interrupts of the board, which firmware tables have to name."""

class CpuSpace:
    """The address space of a vCPU while it stands still: what `make(state, physical address bits,
    1 GB pages?)` returns, made again when registers may have changed."""

    def __init__(
        self, machine: Machine, index: int, make: Callable[[CpuState, int, bool], AddressSpace]
    ) -> None: ...
    def translate(self, gva: int, /) -> int | None:
        """As `AddressSpace.translate`. Raises `StateMismatch` while the machine runs."""

    @property
    def space(self) -> Any: ...
    @property
    def index(self) -> int: ...

def mmu_ranges(
    space: AddressSpace,
    item: type[_Tuple],
    start: int,
    last: int,
    by_rights: bool,
    limit: int,
    budget: int,
) -> tuple[list[_Tuple], int | None]:
    """(ranges, where to go on). `item` is a named tuple (gva, physical, size, page_size, user,
    writable, executable, is_global)."""

def mmu_find(
    space: AddressSpace, pattern: Buffer, start: int, last: int, limit: int, most: int
) -> tuple[list[int], int | None]:
    """(addresses, where to go on); looks at about `most` bytes."""

def mmu_read(space: AddressSpace, gva: int, size: int) -> bytes | tuple[str, int, int]:
    """The bytes, or (reason, gva, physical address) of the first that cannot be read. The reason is
    "not mapped" or "no memory"."""

def mmu_write(space: AddressSpace, gva: int, data: Buffer) -> tuple[str, int, int] | None:
    """None, or as `mmu_read`; the reason may also be "read-only"."""

def mmu_translate_many(space: AddressSpace, addresses: Buffer, out: Buffer) -> None: ...
def memory_add_buffer(
    memory: GuestMemory, start: int, buffer: Buffer, name: str, writable: bool
) -> None:
    """Adds a buffer as a region, where it is. Otherwise than `writable` nobody writes to it."""
