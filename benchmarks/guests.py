"""Small 64-bit guests without an operating system, the same bytes for polyvisor and for QEMU.

An image starts as Multiboot kernels do, in 32-bit mode; its first instructions map the first GiB,
enable SSE and go to 64-bit mode. The body finds in `rdi` how often to do what it does, and may use
memory from DATA on. At its end the guest writes to the debug-exit port, which ends the machine.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import polyvisor
from measure import children_cpu, peer

ORIGIN = 0x100000
DATA = 0x400000
MEMORY_MIB = 16
DEBUG_EXIT = 0xF4

_IMAGE = """
        .intel_syntax noprefix
        .code32
start:  jmp     entry
        .balign 4
header: .long   0x1badb002, 0x00010000, -(0x1badb002 + 0x00010000)
        .long   {origin} + header - start, {origin}, 0, 0, {origin} + entry - start
        # One GiB in pages of 2 MiB: tables at 0x1000, 0x2000, 0x3000.
entry:  mov     esp, 0x80000
        xor     eax, eax
        mov     edi, 0x1000
        mov     ecx, 0x3000 / 4
        cld
        rep stosd
        mov     dword ptr [0x1000], 0x2003
        mov     dword ptr [0x2000], 0x3003
        mov     eax, 0x83
        mov     edi, 0x3000
page:   mov     [edi], eax
        add     eax, 0x200000
        add     edi, 8
        cmp     edi, 0x4000
        jne     page
        mov     eax, 0x1000
        mov     cr3, eax
        mov     eax, cr4
        or      eax, 0x620              # PAE, OSFXSR, OSXMMEXCPT
        mov     cr4, eax
        mov     ecx, 0xc0000080         # EFER
        rdmsr
        or      eax, 0x100              # LME
        wrmsr
        mov     eax, cr0
        and     eax, ~4                 # EM
        or      eax, 0x80000002         # PG, MP
        mov     cr0, eax
        lgdt    [{origin} + gdtr - start]
        push    8
        push    {origin} + (long_mode - start)
        retf
        .balign 8
gdt:    .quad   0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdtr:   .word   gdtr - gdt - 1
        .long   {origin} + gdt - start
        .code64
long_mode:
        mov     eax, 16
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, 0x80000
        mov     rdi, {count}
        call    body
        xor     eax, eax
        mov     dx, {debug_exit}
        out     dx, eax
stop:   hlt
        jmp     stop
        .balign 64
body:
{body}
"""


@dataclass(frozen=True)
class Run:
    """Host seconds of CPU and wall-clock time, and how many instructions (0: not counted)."""

    cpu: float
    wall: float
    instructions: int = 0

    @property
    def mips(self) -> float:
        """Million instructions per second of CPU time."""
        return self.instructions / self.cpu / 1e6


def assemble(directory: Path, body: str, count: int) -> bytes:
    """The image whose `body` (GNU assembler, ends with ret) is asked to do it `count` times."""
    source, elf, binary = (directory / f"guest.{suffix}" for suffix in ("s", "o", "bin"))
    source.write_text(
        _IMAGE.format(
            origin=hex(ORIGIN), debug_exit=hex(DEBUG_EXIT), count=count, body=body, data=hex(DATA)
        )
    )
    subprocess.run([peer("as"), "--64", "-o", elf, source], check=True)
    subprocess.run([peer("objcopy"), "-O", "binary", elf, binary], check=True)
    return binary.read_bytes()


def machine(image: bytes) -> polyvisor.Machine:
    """A machine on the soft engine about to start the image, as a Multiboot loader would."""
    made = polyvisor.Machine(memory=MEMORY_MIB << 20, engine="soft", name="bench")
    made.memory.write(ORIGIN, image)
    entry = ORIGIN + int.from_bytes(image[1:2], "little") + 2  # the jump at the start
    made.cpu(0).enter_protected_mode(rip=entry)
    return made


def run(made: polyvisor.Machine, timeout: float = 60) -> Run:
    """Runs it to its debug exit. The CPU time is this process's: nothing else goes on in it."""
    cpu, wall = time.process_time(), time.perf_counter()
    end = made.run(timeout=timeout)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert end.reason == "debug_exit", f"the guest ended otherwise: {end}"
    return Run(cpu, wall, made.stats()["cpu0: instructions"])


def run_in_qemu(image: bytes, directory: Path) -> Run:
    """The whole of QEMU's process, its start and its firmware included."""
    path = directory / "multiboot"
    path.write_bytes(image)
    command = [
        *(peer("qemu-system-x86_64"), "-M", "q35", "-accel", "tcg,thread=single", "-cpu", "max"),
        *("-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-device", f"isa-debug-exit,iobase={DEBUG_EXIT:#x},iosize=4", "-kernel", str(path)),
    ]
    cpu, wall = children_cpu(), time.perf_counter()
    done = subprocess.run(command, check=False, timeout=120)
    cpu, wall = children_cpu() - cpu, time.perf_counter() - wall
    assert done.returncode == 1, f"QEMU ended with status {done.returncode}"
    return Run(cpu, wall)
