"""`Machine`: a PC to run a guest in."""

from __future__ import annotations

import weakref

from polyvisor import _native
from polyvisor.config import MachineConfig
from polyvisor.console import Console
from polyvisor.cpu import Cpu
from polyvisor.errors import ConfigError, DeviceError, MachineTimeout, StateMismatch
from polyvisor.memory import Memory
from polyvisor.records import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Literal

    from typing_extensions import Buffer

    from polyvisor.config import EngineName, HugePagesName, IrqchipName
    from polyvisor.debug import Breakpoints, DebugStop
    from polyvisor.guest.agent import Agent, Ran
    from polyvisor.images.disk import Format
    from polyvisor.machine_mmu import Mmu
    from polyvisor.virtio.balloon import Balloon
    from polyvisor.virtio.base import VirtioDeviceT
    from polyvisor.virtio.console import VirtioConsole
    from polyvisor.virtio.disk import Cache, Disk, Io, Source, Transport
    from polyvisor.virtio.fs import Fs
    from polyvisor.virtio.net import Backend, Forward, Net
    from polyvisor.virtio.rng import Rng
    from polyvisor.virtio.rng import Source as RngSource
    from polyvisor.virtio.vsock import Vsock

    #: Why a machine ended.
    #:
    #: - ``power_off``: the guest switched itself off (ACPI S5).
    #: - ``reset``: the guest asked for a reset (keyboard controller, port 0xCF9, ACPI reset
    #:   register).
    #: - ``triple_fault``: a CPU shut down.
    #: - ``debug_exit``: the guest wrote to the debug-exit port; `ExitInfo.status` is the status.
    #: - ``halted``: every CPU is halted and nothing can ever wake one.
    #: - ``stopped``: the host stopped it.
    #: - ``device_error``: a device written in Python raised (`wait` raises `DeviceError` instead).
    #: - ``engine_failure``: the engine could not go on; `ExitInfo.detail` says why.
    Reason = Literal[
        "power_off",
        "reset",
        "triple_fault",
        "debug_exit",
        "halted",
        "stopped",
        "device_error",
        "engine_failure",
    ]

    #: What a machine is doing.
    State = Literal["created", "running", "paused", "ended", "closed"]

E820_RAM = 1
E820_RESERVED = 2


class ExitInfo(Record, kw_only=True):
    """How a machine ended."""

    reason: Reason
    #: What the guest wrote to the debug-exit port; 0 for every other reason.
    status: int = 0
    #: A sentence for people; may be "".
    detail: str = ""
    #: The CPU that ended it.
    cpu: int = 0

    def __str__(self) -> str:
        text = self.reason.replace("_", " ")
        if self.reason == "debug_exit":
            text += f" with status {self.status}"
        return f"{text}: {self.detail}" if self.detail else text


class Machine:
    """A PC: CPUs, memory, interrupt chips, clocks, a serial port, a PCI bus, and your devices.

    The arguments are the fields of `MachineConfig`. Use it as a context manager, or `close` it::

        with polyvisor.Machine(memory="256M") as machine:
            machine.load(kernel="vmlinuz", initrd="initrd.gz", cmdline="console=ttyS0")
            machine.start()
            machine.console.expect("login: ", timeout=30)
            print(machine.stop())

    A machine runs once: when it has ended it can be looked at, but not started again.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        memory: int | str | None = None,
        cpus: int | None = None,
        engine: EngineName | str | None = None,
        cpu_model: str | None = None,
        cpu_features: dict[str, bool] | None = None,
        portable: bool | None = None,
        deterministic: bool | None = None,
        tsc_khz: int | None = None,
        irqchip: IrqchipName | str | None = None,
        hugepages: HugePagesName | str | None = None,
        dirty_ring: int | None = None,
        ns_per_1000_instructions: int | None = None,
        serial_ports: int | None = None,
        wall_clock: float | None = None,
        name: str | None = None,
        standard_devices: bool = True,
    ) -> None:
        given = {
            "memory": memory,
            "cpus": cpus,
            "engine": engine,
            "cpu_model": cpu_model,
            "cpu_features": cpu_features,
            "portable": portable,
            "deterministic": deterministic,
            "tsc_khz": tsc_khz,
            "irqchip": irqchip,
            "hugepages": hugepages,
            "dirty_ring": dirty_ring,
            "ns_per_1000_instructions": ns_per_1000_instructions,
            "serial_ports": serial_ports,
            "wall_clock": wall_clock,
            "name": name,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        config = replace(config or MachineConfig(), **changes).validated()
        self.config: MachineConfig = config
        self._native = _native.Machine(
            memory=config.memory_size,
            cpus=config.cpus,
            engine=config.engine,
            cpu_model=config.cpu_model,
            cpu_features=config.cpu_features,
            portable=config.portable,
            deterministic=config.deterministic,
            tsc_khz=config.tsc_khz or 0,
            irqchip=config.irqchip,
            hugepages=config.hugepages,
            dirty_ring=config.dirty_ring,
            ns_per_1000_instructions=config.ns_per_1000_instructions,
            serial_ports=config.serial_ports,
            name=config.name,
        )
        self._tsc_khz = self._native.tsc_khz
        # A machine that nobody closed must not keep its threads past the interpreter's end.
        self._finalizer = weakref.finalize(self, self._native.close)
        self._memory: Memory | None = Memory(self._native.memory, self._native.dirty_log)
        self._serial = [Console(self._native.serial(i)) for i in range(config.serial_ports)]
        self._cpus = [Cpu(self._native, self._memory, i) for i in range(config.cpus)]
        self._mmu: Mmu | None = None
        self._vsock: Vsock | None = None
        #: The standard devices that are written in Python, by name ("rtc", "i8042").
        self.devices: dict[str, object] = {}
        if standard_devices:
            from polyvisor.devices import install_standard  # not needed to import polyvisor

            self.devices.update(install_standard(self))

    # --- what it is ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name given in the configuration."""
        return self.config.name

    @property
    def native(self) -> _native.Machine:
        """The bound C++ object."""
        return self._native

    @property
    def engine(self) -> str:
        """The engine that runs it: "soft" or "kvm"."""
        return self._native.engine

    @property
    def memory_size(self) -> int:
        """Bytes of RAM."""
        return self.config.memory_size

    @property
    def cpus(self) -> int:
        """How many virtual CPUs it has."""
        return self.config.cpus

    @property
    def state(self) -> State:
        """What it is doing now."""
        return self._native.state

    @property
    def now(self) -> int:
        """Virtual time: nanoseconds since the machine was made, not counting pauses."""
        return self._native.now

    @property
    def tsc_khz(self) -> int:
        """The frequency of the guest's time-stamp counter, in kHz."""
        return self._tsc_khz

    @property
    def memory(self) -> Memory:
        """The guest's physical memory."""
        if self._memory is None:
            raise StateMismatch(f"machine {self.name!r} is closed")
        return self._memory

    @property
    def mmu(self) -> Mmu:
        """The address space that CPU 0 is in: translations, page tables, virtual memory. Of another
        CPU: `machine.cpu(1).mmu`. See docs/mmu.md."""
        mmu = self._mmu
        if mmu is None:
            mmu = self._mmu = self.cpu(0).mmu
        return mmu

    @property
    def console(self) -> Console:
        """The first serial port. What it said can be read after the machine was closed too."""
        return self._serial[0]

    def serial(self, index: int) -> Console:
        """Serial port `index`, from 0; `MachineConfig.serial_ports` says how many there are."""
        if not 0 <= index < len(self._serial):
            raise ConfigError(
                f"there is no serial port {index}; machine {self.name!r} has {len(self._serial)}",
                field="index",
            )
        return self._serial[index]

    def cpu(self, index: int = 0) -> Cpu:
        """Virtual CPU `index`, from 0."""
        if self._memory is None:
            raise StateMismatch(f"machine {self.name!r} is closed")
        if not 0 <= index < len(self._cpus):
            raise ConfigError(
                f"there is no CPU {index}; machine {self.name!r} has {self.cpus}", field="index"
            )
        return self._cpus[index]

    def e820(self) -> list[tuple[int, int, int]]:
        """(start, size, type) of physical memory as firmware would report it (ACPI 6.5, 15).

        RAM below 640 KiB, the area of ROMs and tables up to 1 MiB reserved, then RAM up to 3 GiB
        and from 4 GiB on. (The reserved area is backed by memory, for the tables.)
        """
        entries = [(0, 0xA0000, E820_RAM), (0xA0000, 0x60000, E820_RESERVED)]
        for region in self.memory.regions:
            start, end = max(region.start, 0x100000), region.start + region.size
            if end > start:
                entries.append((start, end - start, E820_RAM))
        return entries

    @property
    def breakpoints(self) -> Breakpoints:
        """Breakpoints and watchpoints of the host; see `wait_pause`."""
        from polyvisor.debug import Breakpoints  # not needed to run a guest

        return Breakpoints(self._native)

    # --- what is in it ---------------------------------------------------------------------------

    def load(
        self,
        kernel: str | os.PathLike[str],
        initrd: str | os.PathLike[str] | bytes | None = None,
        cmdline: str = "",
    ) -> None:
        """Puts a kernel (bzImage, or ELF with a PVH or 64-bit entry) into memory and CPU 0 at its
        start. Raises `ImageError` when a file cannot be used."""
        from polyvisor import boot

        boot.load(self, kernel, initrd, cmdline)

    def load_disk(self, image: str | os.PathLike[str], append: str = "") -> None:
        """Puts the kernel and the initial RAM disk that are on a disk image into memory, as `load`;
        the image is to be the machine's first disk (`add_disk`). `append` is added to the kernel's
        command line. Raises `ImageError` when there is none on it. See docs/images.md."""
        from polyvisor.images import bootable

        found = bootable.find(image)
        self.load(found.fast_kernel(), found.initrd, f"{found.cmdline} {append}".strip())

    def load_raw(self, gpa: int, data: Buffer) -> None:
        """Stores bytes at a guest-physical address; see `Cpu.enter_real_mode` and its likes."""
        self.memory.write(gpa, data)

    def set_boot_registers(self, registers: Mapping[str, int]) -> None:
        """Sets registers of CPU 0 by name, in one step (see `Registers`)."""
        self.cpu(0).set_registers(registers)

    def add_port_device(self, port: int, device: object, size: int = 1, *, base: int = 0) -> None:
        """Gives ports [port, port+size) to `device`, a Python object (see `polyvisor.devices`).

        It sees offsets from `base` on, so that one device can serve several ranges. Raises
        `MemoryRangeError` when a port is taken. Also while the machine runs.
        """
        _note_main_thread()
        self._native.add_port_device(port, size, device, base)

    def add_memory_device(self, gpa: int, device: object, size: int, *, base: int = 0) -> None:
        """Gives guest-physical [gpa, gpa+size) to `device`; see `add_port_device`."""
        _note_main_thread()
        self._native.add_memory_device(gpa, size, device, base)

    def remove_port_device(self, port: int) -> None:
        """Takes away the device that starts at `port`."""
        self._native.remove_port_device(port)

    def remove_memory_device(self, gpa: int) -> None:
        """Takes away the device that starts at `gpa`."""
        self._native.remove_memory_device(gpa)

    def add_disk(
        self,
        path: Source,
        *,
        read_only: bool = False,
        format: Format | None = None,  # noqa: A002 -- the word that every tool has for it
        cache: Cache = "writeback",
        snapshot: bool = False,
        serial: str | None = None,
        queues: int = 1,
        bytes_per_second: int | None = None,
        operations_per_second: int | None = None,
        io: Io = "auto",
        transport: Transport = "pci",
        packed: bool = False,
    ) -> Disk:
        """Plugs a disk in (virtio-blk), before the machine starts: an image, a block device, or an
        object with `size`, `read(offset, size)` and perhaps `write(offset, data)` and `flush()`.

        `format`: see `polyvisor.images.disk.format_of`. `cache`: the host's page cache
        ("writeback"), none (O_DIRECT), or a cache that the guest's flushes do not empty ("unsafe").
        `snapshot`: what the guest writes is thrown away with the machine. `serial`: up to 20 bytes.
        Limits hold per second, for all queues together. Raises `ConfigError`, `HostError` (EBUSY:
        another machine has the image), `StateMismatch` once the machine has started."""
        from polyvisor.virtio.disk import add_disk

        return add_disk(
            self,
            path,
            read_only=read_only,
            format=format,
            cache=cache,
            snapshot=snapshot,
            serial=serial,
            queues=queues,
            bytes_per_second=bytes_per_second,
            operations_per_second=operations_per_second,
            io=io,
            transport=transport,
            packed=packed,
        )

    def add_net(
        self,
        backend: Backend = "user",
        *,
        mac: str | None = None,
        forward: list[str | Forward] | tuple[str | Forward, ...] = (),
        restrict: bool = False,
        ipv6: bool = True,
        hostname: str = "guest",
        tap: str | None = None,
        socket: str | os.PathLike[str] | None = None,
        listen: bool = False,
        peer: str | os.PathLike[str] | None = None,
        capture: str | os.PathLike[str] | None = None,
        queues: int = 1,
        mtu: int | None = None,
        transport: Transport = "pci",
        packed: bool = False,
    ) -> Net:
        """Plugs a network card in (virtio-net), before the machine starts.

        `backend`: "user" (a network behind NAT in this process, without privileges: DHCP, names,
        `forward` for ports of the host, `restrict` for no other way out), "tap" (the interface
        `tap` of the host, made if it is not there), "stream" and "dgram" (Unix sockets, to join
        machines: `socket` is a path; a stream connects or `listen`s, datagrams go to `peer`),
        "none" (no cable), or an object with `send(frame)`. `queues`: pairs, up to 16. `mtu`: None
        leaves it to the driver (1500). `capture`: a new pcap file. See docs/network.md. Raises
        `ConfigError`, `HostError`, `StateMismatch` once the machine has started."""
        from polyvisor.virtio.net import add_net

        return add_net(
            self,
            backend,
            mac=mac,
            forward=forward,
            restrict=restrict,
            ipv6=ipv6,
            hostname=hostname,
            tap=tap,
            socket=socket,
            listen=listen,
            peer=peer,
            capture=capture,
            queues=queues,
            mtu=mtu,
            transport=transport,
            packed=packed,
        )

    def add_virtio(
        self, device: VirtioDeviceT, *, transport: str = "pci", packed: bool = False
    ) -> VirtioDeviceT:
        """Plugs in a virtio device that is written in Python (see `polyvisor.virtio.base`), before
        the machine starts: on PCI or, with "mmio", as a block of registers. `packed` offers packed
        rings too. Returns the device. Raises `ConfigError`, `StateMismatch`."""
        from polyvisor.virtio.base import plug

        return plug(self, device, transport, packed)

    def add_console(
        self,
        ports: Sequence[str] | str = (),
        *,
        consoles: int = 1,
        size: tuple[int, int] | None = None,
        max_ports: int | None = None,
        transport: Transport = "pci",
        packed: bool = False,
    ) -> VirtioConsole:
        """Plugs in a virtio console, before the machine starts: `consoles` terminals (/dev/hvc0 and
        on; the kernel's with ``console=hvc0``) and named `ports` (/dev/virtio-ports/NAME). `size`
        is the consoles', (rows, columns). With `max_ports`, ports can be added later. Raises
        `ConfigError`, `StateMismatch` once the machine has started."""
        from polyvisor.virtio.console import add_console

        return add_console(
            self,
            ports,
            consoles=consoles,
            size=size,
            max_ports=max_ports,
            transport=transport,
            packed=packed,
        )

    def add_vsock(
        self,
        cid: int = 3,
        path: str | os.PathLike[str] | None = None,
        *,
        transport: Transport = "pci",
        packed: bool = False,
    ) -> Vsock:
        """Plugs in a vsock, before the machine starts: sockets between the guest (`cid`) and the
        host. Programs of the host connect to the socket `path` and write "CONNECT PORT\\n"; the
        guest's connections to port P go to the socket ``path_P``. Without a path, only this process
        has part in it. Raises `ConfigError`, `HostError`, `StateMismatch` once the machine has
        started."""
        from polyvisor.virtio.vsock import add_vsock

        vsock = add_vsock(self, cid, path, transport=transport, packed=packed)
        if self._vsock is None:
            self._vsock = vsock
        return vsock

    @property
    def vsock(self) -> Vsock | None:
        """The first vsock that was plugged in."""
        return self._vsock

    def add_rng(
        self,
        source: RngSource | None = None,
        *,
        rate: int | None = None,
        transport: str = "pci",
        packed: bool = False,
    ) -> Rng:
        """Plugs in an entropy source (virtio-rng). `source(size)` gives bytes, None: the host's;
        `rate` limits them, in bytes per second."""
        from polyvisor.virtio.rng import Rng

        return self.add_virtio(Rng(source, rate=rate), transport=transport, packed=packed)

    def add_share(
        self,
        path: str | os.PathLike[str],
        tag: str = "share",
        *,
        read_only: bool = True,
        transport: str = "pci",
        packed: bool = False,
    ) -> Fs:
        """Shares a folder of the host's (virtio-fs), before the machine starts. The guest mounts it
        by its tag, ``mount -t virtiofs TAG /mnt``, and gets to nothing outside of it. It may change
        things there only with ``read_only=False``. See docs/shared-folders.md."""
        from polyvisor.virtio.fs import Fs

        # Where a thread serves all devices, nothing may wait for a disk.
        fs = Fs(path, tag, read_only=read_only, inline=self.engine == "soft")
        return self.add_virtio(fs, transport=transport, packed=packed)

    def add_balloon(
        self,
        target: int | str = 0,
        *,
        deflate_on_oom: bool = True,
        free_page_reporting: bool = True,
        interval: float | None = None,
        transport: str = "pci",
        packed: bool = False,
    ) -> Balloon:
        """Plugs in a memory balloon (virtio-balloon), before the machine starts. Its `target` says
        how much the guest is to give back, `statistics()` how it is doing; see
        `polyvisor.virtio.balloon.Balloon` and docs/balloon.md."""
        from polyvisor.virtio.balloon import Balloon

        balloon = Balloon(
            target,
            deflate_on_oom=deflate_on_oom,
            free_page_reporting=free_page_reporting,
            interval=interval,
        )
        return self.add_virtio(balloon, transport=transport, packed=packed)

    def irq(self, gsi: int) -> _native.IrqLine:
        """The wire of global system interrupt `gsi` (0 to 15 are the ISA IRQs, up to 23 PCI)."""
        return self._native.irq(gsi)

    def timer(self, callback: Callable[[], None]) -> _native.Timer:
        """A one-shot timer on virtual time. The callback runs on the machine's event-loop thread
        (in deterministic mode: the CPU's thread); an exception in it stops the machine."""
        _note_main_thread()
        return self._native.timer(callback)

    # --- running it ------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the CPUs and returns at once."""
        self._native.start()

    def pause(self) -> None:
        """Returns when all CPUs stand still; virtual time stands still with them."""
        self._native.pause()

    def resume(self) -> None:
        """Continues after `pause`."""
        self._native.resume()

    def wait(self, timeout: float | None = None) -> ExitInfo | None:
        """Waits for the end; None when it has not come within `timeout` seconds.

        Raises `DeviceError` when a Python device raised; the original exception is its cause.
        """
        return self._exit_info(self._native.wait(timeout))

    def wait_pause(self, timeout: float | None = None) -> DebugStop | None:
        """Waits until the machine is paused, by one of its `breakpoints` or by `pause`, and tells
        why. None when it has ended instead, or `timeout` seconds are over.

        Several CPUs may have met breakpoints before all stood still: see `stops`.
        """
        if not self._native.wait_stopped(timeout) or self.state != "paused":
            return None
        from polyvisor.debug import DebugStop

        return next(iter(self.stops()), DebugStop(reason="pause"))

    def stops(self) -> list[DebugStop]:
        """The breakpoints that CPUs have met since the machine last ran, the first first."""
        from polyvisor.debug import stops

        return stops(self._native)

    def run(self, timeout: float | None = None) -> ExitInfo:
        """Starts (or resumes) and waits for the end.

        After `timeout` seconds the machine is stopped and `MachineTimeout` raised. Ctrl-C stops it
        too, before KeyboardInterrupt is passed on.
        """
        if self.state == "paused":
            self.resume()
        elif self.state != "running":
            self.start()
        try:
            info = self.wait(timeout)
        except BaseException:
            self._native.stop()
            raise
        if info is None:
            self._native.stop()
            raise MachineTimeout(
                f"machine {self.name!r} did not end within {timeout:g} s and was stopped",
                seconds=timeout or 0.0,
            )
        return info

    def stop(self) -> ExitInfo:
        """Ends it from outside, within a second; the way it ended first counts.

        Called from a device or timer of the machine itself, it only asks for the end.
        """
        self._native.stop()
        info = self._exit_info(self._native.stop_info)
        return info if info is not None else ExitInfo(reason="stopped")

    def end(self, reason: Reason, status: int = 0, detail: str = "") -> None:
        """Asks for the end in the guest's name: how a device switches the machine off. Returns at
        once; safe from devices and timers."""
        self._native.request_end(reason, status, detail)

    def close(self) -> None:
        """Stops it and releases threads, devices and memory. Views of the memory taken before stay
        valid, and console, log and counters can still be read."""
        self._native.close()
        self._finalizer.detach()
        self._memory = None
        self._cpus = []
        self._mmu = None
        self.devices = {}

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _exit_info(self, info: _native.StopInfo | None) -> ExitInfo | None:
        if info is None:
            return None
        cause = self._native.exception
        if cause is not None:
            raise device_error(cause, info.detail) from cause
        return ExitInfo(
            reason=info.reason,
            status=info.status,
            detail=info.detail,
            cpu=info.cpu,
        )

    def snapshot(self) -> _native.Snapshot:
        """The whole state, to `restore` into this machine or one of the same shape. It must not be
        running."""
        return self._native.snapshot()

    def restore(self, snapshot: _native.Snapshot) -> None:
        """Puts a snapshot's state in place. The machine must be created or paused; raises
        `StateError`, leaving it as it is, for a snapshot that does not fit."""
        self._native.restore(snapshot)

    # --- commands in the guest -------------------------------------------------------------------

    def agent(self, timeout: float | None = 60.0) -> Agent:
        """Polyvisor's agent in the guest, which runs commands and copies files; waits until it
        answers. The machine needs a vsock (`add_vsock`); images that `polyvisor image` builds have
        the agent. Raises `MachineTimeout` after `timeout` seconds, `GuestError` when the guest ends
        meanwhile, `StateMismatch` without a vsock. See docs/agent.md."""
        from polyvisor.guest.agent import connect

        return connect(self, timeout)

    def exec(self, argv: Sequence[str], **options: Any) -> Ran:
        """Runs a command in the guest: `agent`, and its `Agent.exec` with the same options."""
        return self.agent().exec(argv, **options)

    # --- looking at it ---------------------------------------------------------------------------

    def power_button(self) -> None:
        """Presses the power button: an ACPI event, which a guest may answer by switching off."""
        self._native.power_button()

    def stats(self) -> dict[str, int]:
        """Counters by name: exits, unclaimed accesses, and the engine's own per CPU."""
        return self._native.counters()

    def statistics(self) -> dict[str, Any]:
        """Everything that is counted, as plain dicts: exits by reason, accesses per device, KVM's
        own statistics. `polyvisor.statistics` says what is in it. Safe while the machine runs."""
        from polyvisor import statistics  # not needed to import polyvisor

        return statistics.collect(self._native)

    def ranges(self) -> list[tuple[str, int, int, str]]:
        """(bus, start, size, device) of everything on the buses."""
        return self._native.ranges()

    def log(self) -> list[str]:
        """Notes on what the guest did wrong; repetitions are only counted."""
        return self._native.log()

    def __repr__(self) -> str:
        if not hasattr(self, "_native"):  # its making failed
            return "<Machine>"
        return (
            f"<Machine {self.name!r}: {self.cpus} CPU{'s' if self.cpus > 1 else ''}, "
            f"{self.memory_size >> 20} MiB, {self.engine}, {self.state}>"
        )


def _note_main_thread() -> None:
    """Python takes the thread that imports `threading` for the main one. That must not become a
    thread of the machine, by what a device imports there."""
    import threading  # noqa: F401


def device_error(cause: BaseException, detail: str) -> DeviceError:
    """The `DeviceError` for an exception that came out of a device; `detail` says where."""
    where: dict[str, Any] = getattr(cause, "__polyvisor_access__", {})
    return DeviceError(f"{detail}: {type(cause).__name__}: {cause}", **where)
