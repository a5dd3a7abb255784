"""Claim: the interpreter runs at least 300 million instructions per second over the boot of
Debian's kernel, and 700 million in hot loops of integer code.

Seconds are host CPU time. QEMU's TCG, a translator, runs the same bytes beside each loop.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import guests
import polyvisor
from measure import report, thread_cpu

BOOT_LIMIT = 300.0
LOOP_LIMIT = 700.0
ROUNDS = 5

#: Each ends with ret and repeats itself rdi times: body, repetitions, whether the limit is for it.
LOOPS = {
    # Table-driven CRC-32 of 32 KiB, as a compiler writes it: a byte load, a dependent table load.
    "crc": (
        """
        mov     r8d, 0x400000           # the table
        xor     ecx, ecx
1:      mov     eax, ecx
        mov     edx, 8
2:      shr     eax, 1
        jnc     3f
        xor     eax, 0xedb88320
3:      dec     edx
        jnz     2b
        mov     [r8+rcx*4], eax
        inc     ecx
        cmp     ecx, 256
        jne     1b
4:      mov     esi, 0x513000
        lea     ebx, [rsi+32768]
        mov     edx, -1
5:      movzx   ecx, byte ptr [rsi]
        add     rsi, 1
        xor     ecx, edx
        shr     edx, 8
        movzx   ecx, cl
        xor     edx, [r8+rcx*4]
        cmp     rbx, rsi
        jne     5b
        dec     rdi
        jnz     4b
        ret
        """,
        1500,
        True,
    ),
    # Recursive Fibonacci numbers: calls, returns, the stack, branches that are hard to foresee.
    "fib": (
        """
        mov     rbx, rdi
1:      mov     edi, 24
        call    fib
        dec     rbx
        jnz     1b
        ret
fib:    cmp     edi, 2
        jae     2f
        mov     eax, edi
        ret
2:      push    rdi
        dec     edi
        call    fib
        pop     rdi
        push    rax
        sub     edi, 2
        call    fib
        pop     rdx
        add     eax, edx
        ret
        """,
        200,
        True,
    ),
    # A row of a multi-precision product: what checking a signature while booting consists of.
    "multiply-add": (
        """
        mov     rsi, 0x400000
        mov     r11, 0x410000
        mov     r8, 0x123456789abcdef1
1:      xor     ecx, ecx
        xor     r9d, r9d
2:      mov     rax, [rsi+rcx*8]
        mul     r8
        add     rax, r9
        adc     rdx, 0
        add     [r11+rcx*8], rax
        adc     rdx, 0
        mov     r9, rdx
        inc     ecx
        cmp     ecx, 64
        jne     2b
        dec     rdi
        jnz     1b
        ret
        """,
        500_000,
        True,
    ),
    # Copying 32 KiB by words.
    "copy": (
        """
        mov     esi, 0x400000
        mov     r11d, 0x513000
1:      xor     ecx, ecx
2:      mov     rax, [rsi+rcx]
        mov     [r11+rcx], rax
        add     ecx, 8
        cmp     ecx, 32768
        jb      2b
        dec     rdi
        jnz     1b
        ret
        """,
        15_000,
        True,
    ),
    # The same between addresses whose pages collide in a directly mapped TLB of 256 entries: a
    # bad case, for comparison.
    "copy-colliding": (
        """
        mov     esi, 0x400000
        mov     r11d, 0x500000
1:      xor     ecx, ecx
2:      mov     rax, [rsi+rcx]
        mov     [r11+rcx], rax
        add     ecx, 8
        cmp     ecx, 32768
        jb      2b
        dec     rdi
        jnz     1b
        ret
        """,
        2_000,
        False,
    ),
    # y += a x over 4096 floats.
    "axpy": (
        """
        mov     esi, 0x400000
        mov     r11d, 0x513000
        mov     eax, 0x3f000000
        movd    xmm0, eax
        shufps  xmm0, xmm0, 0
1:      xor     ecx, ecx
2:      movups  xmm1, [rsi+rcx]
        mulps   xmm1, xmm0
        movups  xmm2, [r11+rcx]
        addps   xmm1, xmm2
        movups  [r11+rcx], xmm1
        add     ecx, 16
        cmp     ecx, 16384
        jb      2b
        dec     rdi
        jnz     1b
        ret
        """,
        8_000,
        False,
    ),
}


@pytest.fixture(scope="module")
def qemu_start(tmp_path_factory: pytest.TempPathFactory) -> float:
    """CPU seconds of QEMU for a guest that ends at once: its start and its firmware."""
    directory = tmp_path_factory.mktemp("empty")
    image = guests.assemble(directory, "ret", 1)
    return min(guests.run_in_qemu(image, directory).cpu for _ in range(3))


@pytest.mark.parametrize("name", LOOPS)
def bench_loop(benchmark: BenchmarkFixture, tmp_path: Path, qemu_start: float, name: str) -> None:
    """The best of a few rounds: what disturbs a loop of half a second can only slow it down."""
    body, count, limited = LOOPS[name]
    image = guests.assemble(tmp_path, body, count)
    runs: list[guests.Run] = []

    def ours() -> None:
        with guests.machine(image) as machine:
            runs.append(guests.run(machine))

    benchmark.pedantic(ours, rounds=ROUNDS)
    best = min(runs, key=lambda run: run.cpu)
    theirs = min(guests.run_in_qemu(image, tmp_path).cpu for _ in range(2)) - qemu_start
    report(
        benchmark,
        mips=best.mips,
        instructions=best.instructions,
        qemu_mips=best.instructions / theirs / 1e6,
        **({"limit": LOOP_LIMIT} if limited else {}),
    )
    if limited:
        assert best.mips >= LOOP_LIMIT, f"{best.mips:.0f} million instructions per second"


def bench_boot(benchmark: BenchmarkFixture) -> None:
    """Up to /init, the CPU's thread alone; instructions repeated by REP count once."""
    mips: list[float] = []
    millions: list[float] = []

    def boot() -> None:
        machines: list[polyvisor.Machine] = []

        def progress(text: str) -> None:
            if text == "" and machines:  # init is ready
                machine = machines.pop()
                machine.pause()
                instructions = machine.stats()["cpu0: instructions"]
                millions.append(instructions / 1e6)
                mips.append(millions[-1] / thread_cpu("vcpu0"))
                machine.resume()

        polyvisor.exec(
            ["true"],
            engine="soft",
            timeout=120,
            on_start=lambda machine, channel: machines.append(machine),
            progress=progress,
        )

    benchmark.pedantic(boot, rounds=ROUNDS)
    median = statistics.median(mips)
    report(
        benchmark,
        mips=median,
        best_mips=max(mips),
        million_instructions=statistics.median(millions),
        limit=BOOT_LIMIT,
    )
    assert median >= BOOT_LIMIT, f"{median:.0f} million instructions per second"
