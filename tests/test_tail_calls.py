"""Handlers of the soft engine must tail-call: a call would grow the host's stack with each uop.

Compilers do not promise it (a local whose address escapes is enough to lose it), so the machine
code is looked at: a handler jumps to the next one through a register; the only indirect calls are
those of the generic operations.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

#: The handlers that call an operation through a pointer, which is their one indirect call.
GENERIC = {
    "run_plain",
    "run_mem64",
    "run_mem64_aligned",
    "run_mem_any",
    "run_simd_checked",
    "run_ending",
    "execute_generic",
}
FOLDER = Path("native/soft/CMakeFiles/pv_soft.dir")
SOURCES = Path(__file__).parents[1] / "native/soft"


def indirect_calls(listing: str) -> list[str]:
    """The functions of an objdump listing that call through a register or memory."""
    found, function = [], ""
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = start[1]
        elif re.search(r"\bcall\s+\*", line):
            found.append(function)
    return found


def test_the_reader_sees_calls() -> None:
    assert indirect_calls("0 <good>:\n 1:\tjmp    *%rax\n5 <bad>:\n 6:\tcall   *0x8(%rdi)") == [
        "bad"
    ]


@pytest.mark.parametrize(
    "source", [*sorted(p.name for p in SOURCES.glob("fast*.cpp")), "generic.cpp"]
)
def test_handlers_tail_call(source: str, native_build: Path) -> None:
    done = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", native_build / FOLDER / f"{source}.o"],
        check=True,
        capture_output=True,
        text=True,
    )
    calls = indirect_calls(done.stdout.replace("(anonymous namespace)::", ""))
    names = {name.split("(")[0].rsplit("::")[-1] for name in calls}
    assert names <= GENERIC, f"{source}: {names - GENERIC} call through a pointer"
