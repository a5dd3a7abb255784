"""Programs that mean harm: what they get is an errno or a signal, and nobody else notices."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from polyvisor import Process

SOURCE = Path(__file__).with_name("hostile.c")
THREADS = Path(__file__).with_name("hostile_threads.c")
CPU = Path(__file__).with_name("hostile_cpu.c")

#: Each is to end by this signal: what only a kernel may do, and where only a kernel may go.
INSTRUCTIONS = {
    "hlt": 11,
    "cli": 11,
    "out %al, $0x80": 11,
    "in $0x60, %al": 11,
    "mov %cr3, %rax": 11,
    "wrmsr": 11,
    "lgdt (%rsp)": 11,
    "mov $0x10, %eax; mov %eax, %ss": 11,
    "push $0x08; push $0; lretq": 11,
    "mov $0xffffffff80000000, %rax; mov (%rax), %rax": 11,
    "mov $0xffffffff80002000, %rax; jmp *%rax": 11,
    "mov $0xffffffff80003000, %rax; mov %rax, (%rax)": 11,
    "mov $0x8000000000000000, %rax; jmp *%rax": 11,
    "xor %esp, %esp; push %rax": 11,
    "mov $0x7ffffffff000, %rsp; pop %rax": 11,
    "ud2": 4,
    "int3": 5,
    "pushfq; orq $0x100, (%rsp); popfq; nop": 5,
    "xor %ecx, %ecx; div %ecx": 8,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of static programs."""
    folder = tmp_path_factory.mktemp("hostile")
    subprocess.run(["cc", "-O1", "-static", "-o", folder / "hostile", SOURCE], check=True)
    subprocess.run(
        ["cc", "-O1", "-w", "-static", "-pthread", "-o", folder / "threads", THREADS], check=True
    )
    subprocess.run(
        ["cc", "-O1", "-w", "-static", "-mno-red-zone", "-o", folder / "cpu", CPU], check=True
    )
    for number, text in enumerate(INSTRUCTIONS):
        program = f"void _start(void) {{ asm volatile({text!r}); for (;;) ; }}".replace("'", '"')
        subprocess.run(
            ["cc", "-static", "-nostdlib", "-x", "c", "-o", folder / f"try{number}", "-"],
            input=program.encode(),
            check=True,
        )
    return folder


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_what_only_a_kernel_may_do(engine: str, build: Path, text: str) -> None:
    name = f"/build/try{list(INSTRUCTIONS).index(text)}"
    with Process([name], ro=[(build, "/build")], engine=engine) as process:
        result = process.run(timeout=20)
    assert (result.reason, result.signal) == ("signal", INSTRUCTIONS[text])


def test_all_interrupts_selectors_and_bytes_of_what_stands_in_for_a_kernel(
    engine: str, build: Path
) -> None:
    with Process(["/build/cpu"], ro=[(build, "/build")], engine=engine) as process:
        result = process.run(timeout=60)
    assert result.text == "still here\n", (result.reason, result.signal, result.stderr)


#: Of the monitor and of the host, by what the host would call them.
OUT_OF_REACH = [
    "/proc/self/mem",
    "/proc/1000/mem",
    "/proc/1/mem",
    "/proc/self/map_files",
    "/proc/self/pagemap",
    "/proc/self/root/../../etc/shadow",
    "/proc/self/cwd/../../../../etc/shadow",
    f"/proc/{os.getpid()}/maps",
    f"/proc/{os.getpid()}/fd/0",
    "/proc/kcore",
    "/proc/sysrq-trigger",
    "/dev/mem",
    "/dev/kvm",
    "/sys/kernel/debug",
    "/sys/class",
    "/etc/shadow",
]


def test_files_of_the_host_are_out_of_reach(engine: str) -> None:
    script = """
import os, sys
for path in sys.argv[1:]:
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDONLY | os.O_DIRECTORY):
        try:
            print(path, os.open(path, flags))
        except OSError:
            pass
"""
    with Process(["python3", "-c", script, *OUT_OF_REACH], engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.text, result.status) == ("", 0), result.stderr.decode()


def test_what_is_kept_inside_of_what_is_given_stays_kept(engine: str, tmp_path: Path) -> None:
    """What may only be read, in what may be written to, cannot be moved out of its mount."""
    kept = tmp_path / "given" / "a" / "b" / "kept"
    kept.mkdir(parents=True)
    (kept / "file").write_text("as it was")
    script = """
import os
for old, new in (("a", "c"), ("a/b", "c"), ("a/b/kept", "c")):
    try:
        os.rename("/given/" + old, "/given/" + new)
    except OSError as error:
        print(error.errno)
for place in ("a/b/kept", "c", "c/kept", "c/b/kept"):
    for change in (lambda f: open(f, "w"), os.unlink, lambda f: os.link(f, "/given/other")):
        try:
            change(f"/given/{place}/file")
        except OSError:
            pass
"""
    with Process(
        ["python3", "-c", script],
        ro=[(kept, "/given/a/b/kept")],
        rw=[(tmp_path / "given", "/given")],
        engine=engine,
    ) as process:
        result = process.run(timeout=60)
    assert len(result.text.split()) == 3, result.text + result.stderr.decode()
    assert (kept / "file").read_text() == "as it was"
    assert (kept / "file").stat().st_nlink == 1


def test_calls_of_all_numbers_with_anything(engine: str, build: Path) -> None:
    calls = "200000" if engine == "soft" else "10000"
    with Process(["/build/hostile", calls], ro=[(build, "/build")], engine=engine) as process:
        result = process.run(timeout=100)
    assert result.text == "still here\n"
    assert sum(made for made, _ in result.system_calls.values()) > int(calls) * 0.7


@pytest.mark.parametrize("what", ["race", "truncate", "exhaust", "edges", "spread", "strings"])
def test_with_more_than_one_thread(engine: str, build: Path, what: str) -> None:
    with Process(
        ["/build/threads", what],
        ro=[(build, "/build")],
        memory="64M",
        threads=32,
        engine=engine,
    ) as process:
        result = process.run(timeout=60)
    assert result.text == "still here\n", (result.reason, result.signal, result.stderr)
    assert result.status == 0


def test_links_that_others_swap(engine: str, tmp_path: Path) -> None:
    """A folder that is at times a link to the outside never leads there."""
    (tmp_path / "secret").write_text("of the host")
    given, folder = tmp_path / "given", tmp_path / "given" / "x"
    folder.mkdir(parents=True)
    (folder / "secret").write_text("inside")
    script = """
import time
found, begin = set(), time.monotonic()
# (On a busy host it may take the other one long to have its turn.)
while time.monotonic() < begin + (1.5 if found else 30):
    for name in ("/given/x/secret", "/given/x/../x/secret", "/given/x/../secret"):
        try:
            found.add(open(name).read())
        except OSError:
            pass
print(*sorted(found))
"""
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            folder.rename(given / "y")
            folder.symlink_to(tmp_path)
            folder.unlink()
            (given / "y").rename(folder)

    other = threading.Thread(target=swap)
    other.start()
    try:
        with Process(["python3", "-c", script], rw=[(given, "/given")], engine=engine) as process:
            result = process.run(timeout=60)
    finally:
        done.set()
        other.join()
    assert result.text == "inside\n", result.stderr.decode()
