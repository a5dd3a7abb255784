"""`Machine.mmu`: a virtual CPU's own view of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polyvisor import _native
from polyvisor.errors import StateMismatch
from polyvisor.mmu import Access, AddressSpace, Ept, Npt, Paging

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from polyvisor.mmu import Walk
    from polyvisor.virtual import Join, Matches, Ranges


class Mmu(_native.CpuSpace):
    """The address space that CPU `index` is in, as long as it stands still::

        machine.pause()
        print(machine.mmu.walk(machine.cpu(0).registers["rip"], "execute"))

    The methods are those of `AddressSpace`, for the address space that the CPU's registers select
    at that moment (`space` is that one, as an object of its own). It is made once, and again when
    the machine has run or registers were set; the page tables themselves are read at every call.
    While the machine runs, the registers cannot be read: `StateMismatch`. Then `at` still works,
    for an address space whose CR3 is known.
    """

    def __init__(self, machine: _native.Machine, index: int) -> None:
        self._machine = machine
        self._memory = memory = machine.memory

        # A function that knows nothing of `self`: the C++ side of it would keep itself alive.
        def make(state: _native.CpuState, physical_bits: int, pages_1gb: bool) -> AddressSpace:
            return AddressSpace(
                memory,
                cr0=state["cr0"],
                cr3=state["cr3"],
                cr4=state["cr4"],
                efer=state["efer"],
                maxphyaddr=physical_bits,
                pages_1gb=pages_1gb,
            )

        super().__init__(machine, index, make)

    @property
    def space(self) -> AddressSpace:
        """The `AddressSpace` of this moment; it stays what it is when the machine runs on."""
        space: AddressSpace = super().space
        return space

    def at(
        self,
        *,
        cr3: int,
        paging: Paging | None = None,
        pdpte: Sequence[int] | None = None,
        ept: Ept | None = None,
        npt: Npt | None = None,
    ) -> AddressSpace:
        """Another address space in the same memory, of another process for instance.

        Everything but CR3 is as in the CPU's registers, or as an operating system would set it for
        `paging`. A running machine needs `paging`, else `StateMismatch` is raised; what its page
        tables say then is true for a moment only. `ept` or `npt`: a nested guest's.
        """
        options: dict[str, Any] = {"cr3": cr3, "pdpte": pdpte, "ept": ept, "npt": npt}
        if paging is not None:
            options["paging"] = paging
            options["maxphyaddr"] = self._machine.physical_bits
            return AddressSpace(self._memory, **options)
        try:
            now = self.space
        except StateMismatch as error:
            if self._machine.state != "running":
                raise
            raise StateMismatch(
                f"{error}; or say what kind of paging CR3 {cr3:#x} is for, as in paging='4-level'"
            ) from None
        return AddressSpace(self._memory, **(now.registers() | options))

    def walk(self, gva: int, access: Access = "read", **options: Any) -> Walk:
        """See `AddressSpace.walk`."""
        return self.space.walk(gva, access, **options)

    def ranges(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        join: Join = "physical",
        limit: int = 1 << 20,
        budget: int = 1 << 28,
    ) -> Ranges:
        """See `AddressSpace.ranges`."""
        return self.space.ranges(start, end, join=join, limit=limit, budget=budget)

    def find(
        self, pattern: Buffer | str, start: int = 0, end: int | None = None, *, limit: int = 1000
    ) -> Matches:
        """See `AddressSpace.find`."""
        return self.space.find(pattern, start, end, limit=limit)

    def read_virtual(self, gva: int, size: int) -> bytes:
        """See `AddressSpace.read_virtual`."""
        return self.space.read_virtual(gva, size)

    def write_virtual(self, gva: int, data: Buffer) -> None:
        """See `AddressSpace.write_virtual`."""
        self.space.write_virtual(gva, data)

    def translate_many(self, addresses: Any, out: Any = None) -> Any:
        """See `AddressSpace.translate_many`."""
        return self.space.translate_many(addresses, out)

    def __repr__(self) -> str:
        try:
            return f"<Mmu of CPU {self.index}: {self.space!r}>"
        except StateMismatch as error:
            return f"<Mmu of CPU {self.index}: {error}>"


__all__ = ["Mmu"]
