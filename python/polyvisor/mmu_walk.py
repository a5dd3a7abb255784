"""What one walk of page tables met: every entry by level, where it led, or why it led nowhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Literal

import msgspec

#: Why an access was refused.
FaultKind = Literal[
    "not-canonical",
    "page-fault",
    "ept-violation",
    "ept-misconfiguration",
    "nested-page-fault",
]

#: Bits of the page-fault error code (SDM 3A, figure 4-12).
PAGE_FAULT_BITS = {
    1: "present",
    2: "write",
    4: "user",
    8: "reserved bit",
    16: "fetch",
    32: "protection key",
}
#: ... and of EXITINFO1 of a nested page fault beyond those (APM 2, 15.25.6).
NPF_BITS = {1 << 32: "final", 1 << 33: "guest table"}
#: Bits of an EPT violation's exit qualification (SDM 3C, table 28-7).
EPT_BITS = {
    1: "read",
    2: "write",
    4: "fetch",
    8: "readable",
    16: "writable",
    32: "executable",
    64: "user-executable",
    128: "linear address valid",
    256: "final",
}
MEMORY_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}


def decode(value: int, names: dict[int, str]) -> tuple[str, ...]:
    """The names of the bits that are set."""
    return tuple(name for bit, name in names.items() if value & bit)


def size_text(size: int) -> str:
    """4096 as "4 KiB"."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"


class Level(msgspec.Struct, frozen=True):
    """One entry that a walk read."""

    #: "PML5E", "PML4E", "PDPTE", "PDE" or "PTE"; of a second dimension with "EPT " or "NPT " first.
    name: str
    #: Of the entry: guest-physical for the guest's own tables, host-physical for the second
    #: dimension's. None for a PDPTE register of PAE paging.
    address: int | None
    entry: int
    #: Of the entry in its table.
    index: int
    #: Bytes that the entry covers, as a page or as a table.
    size: int
    #: What is set of the entry, by the manuals' names: "P", "W", "U", "A", "D", "PS", "XD", ...
    flags: tuple[str, ...]
    #: It maps a page: the walk of this dimension ends here.
    leaf: bool
    #: Of the second dimension.
    second: bool
    #: Whether there is memory at `address`; otherwise the entry was read as all ones.
    in_memory: bool

    @property
    def present(self) -> bool:
        """Whether the entry is used at all."""
        return bool(self.flags)

    def __str__(self) -> str:
        where = "in a register" if self.address is None else f"at {self.address:#x}"
        if not self.in_memory:
            where += ", outside memory"
        return f"{self.name} {self.entry:#x} ({where})"


class Fault(msgspec.Struct, frozen=True):
    """Why an access is refused: what the processor reports, and which entry was the reason."""

    kind: FaultKind
    #: 13 (#GP) or 14 (#PF) when the guest gets an exception; None when its hypervisor gets an exit.
    vector: int | None
    #: Of #PF; 0 of #GP.
    error_code: int | None
    #: Exit qualification of an EPT violation; EXITINFO1 of a nested page fault.
    qualification: int | None
    #: What the second dimension could not translate, guest-physical.
    gpa: int | None
    #: The second dimension failed for one of the guest's table entries, not for its page.
    during_walk: bool
    #: The entry that forbids the access; None when no entry does (a non-canonical address).
    level: Level | None
    #: The bits of `error_code` or `qualification` in words.
    words: tuple[str, ...]
    #: One clause: what about the entry.
    reason: str

    def __str__(self) -> str:
        text = {
            "not-canonical": "#GP(0)",
            "page-fault": f"#PF({self.error_code or 0:#x})",
            "ept-violation": f"EPT violation, qualification {self.qualification or 0:#x}",
            "ept-misconfiguration": "EPT misconfiguration",
            "nested-page-fault": f"nested page fault, EXITINFO1 {self.qualification or 0:#x}",
        }[self.kind]
        if self.words:
            text += f" [{', '.join(self.words)}]"
        if self.gpa is not None:
            text += f" at guest-physical {self.gpa:#x}"
            if self.during_walk:
                text += " (a table of the guest)"
        return f"{text}: {self.reason}"


class Walk(msgspec.Struct, frozen=True):
    """What `AddressSpace.walk` found. ``print(walk)`` is a table of all levels."""

    gva: int
    #: As it was asked for: "read, supervisor", ...
    access: str
    #: "4-level", ...: see `AddressSpace.mode`.
    mode: str
    #: Where the byte is in the memory that was given, whether or not the access is allowed;
    #: None when it is not mapped.
    physical: int | None
    #: Guest-physical; without a second dimension the same.
    gpa: int | None
    #: Bytes of the page (the smaller one of the two dimensions); 0 when not mapped.
    page_size: int
    #: Rights by all levels together (of both dimensions); False when not mapped.
    user: bool
    writable: bool
    executable: bool
    #: Of the guest's entries.
    is_global: bool
    accessed: bool
    dirty: bool
    #: Index into IA32_PAT: PWT | PCD << 1 | PAT << 2.
    memory_type: int
    #: Protection key.
    key: int
    #: Every entry that was read, in order.
    levels: tuple[Level, ...]
    #: None when the access is allowed.
    fault: Fault | None

    @property
    def ok(self) -> bool:
        """Whether the access is allowed."""
        return self.fault is None

    @property
    def mapped(self) -> bool:
        """Whether the address is mapped, be this access allowed or not."""
        return self.physical is not None

    def rights(self) -> str:
        """In words: "user, writable, no-execute, ..."."""
        words = [
            "user" if self.user else "supervisor",
            "writable" if self.writable else "read-only",
            "executable" if self.executable else "no-execute",
        ]
        words += ["accessed"] if self.accessed else []
        words += ["dirty"] if self.dirty else []
        words += ["global"] if self.is_global else []
        words += [f"PAT {self.memory_type}"] if self.memory_type else []
        words += [f"key {self.key}"] if self.key else []
        return ", ".join(words)

    def outcome(self) -> list[str]:
        """One or two lines: where it is, and the fault."""
        lines = []
        if self.physical is not None:
            line = f"-> {self.physical:#x}"
            if self.gpa is not None and self.gpa != self.physical:
                line += f" (guest-physical {self.gpa:#x})"
            lines.append(f"{line}, page of {size_text(self.page_size)}: {self.rights()}")
        if self.fault:
            lines.append(f"!! {self.fault}")
        return lines

    def rows(self) -> list[tuple[str, ...]]:
        """Level, index, address, entry, covers, flags: one line for each entry."""
        rows: list[tuple[str, ...]] = []
        for level in self.levels:
            flags = " ".join(level.flags) or "not present"
            if not level.in_memory:
                flags = "outside memory"
            address = "register" if level.address is None else f"{level.address:#x}"
            rows.append(
                (
                    level.name,
                    str(level.index),
                    address,
                    f"{level.entry:#018x}",
                    size_text(level.size),
                    flags,
                )
            )
        return rows

    def __str__(self) -> str:
        title = f"{self.gva:#x}: {self.access}, {self.mode} paging"
        return "\n".join([title, *_aligned(HEADINGS, self.rows()), *self.outcome()])

    def _repr_html_(self) -> str:
        def cells(kind: str, row: Sequence[str]) -> str:
            return "".join(
                f'<{kind} style="text-align:{"right" if at in RIGHT else "left"}">'
                f"{html.escape(cell)}</{kind}>"
                for at, cell in enumerate(row)
            )

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows())
        lines = "<br>".join(html.escape(line) for line in self.outcome())
        title = html.escape(f"{self.gva:#x}: {self.access}, {self.mode} paging")
        return (
            f"<table><caption>{title}</caption><thead><tr>{cells('th', HEADINGS)}</tr></thead>"
            f"<tbody>{body}</tbody></table><p>{lines}</p>"
        )


HEADINGS = ("level", "index", "address", "entry", "covers", "flags")
#: Columns of numbers.
RIGHT = {1, 2, 3, 4}


def _aligned(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in RIGHT else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (headings, *rows)
    ]
