"""Programs that start others: fork(), vfork(), wait(), pipes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_process import outside

from polyvisor import Process

PROGRAMS = [
    ["sh", "-c", "echo a | tr a b; (exit 3); echo $?; x=$(echo sub); echo $x; false || echo or"],
    ["sh", "-c", 'for i in 1 2 3; do sh -c "exit $i"; echo $?; done; seq 20000 | wc -l | cat'],
    ["bash", "-c", "sort <(printf 'b\\na\\n') && { sleep 0.05; echo late; } & wait; echo $?"],
    ["bash", "-c", "seq 1000 | while read n; do :; done; echo ${PIPESTATUS[@]}; kill -9 $BASHPID"],
    ["python3", "-c", "import subprocess as s; print(s.run(['sh', '-c', 'exit 4']).returncode)"],
    [
        "python3",
        "-c",
        """
import os, sys
r, w = os.pipe()
x = [1, 2]
if not (pid := os.fork()):
    x.append(os.getppid() > 1); os.write(w, repr(x).encode()); os._exit(5)
print(os.waitpid(pid, 0)[1], os.read(r, 100), x)
try: os.wait()
except ChildProcessError as e: print(e)
""",
    ],
    ["perl", "-e", 'print `echo from a child`; system("exit 3"); print $? >> 8, "\\n"'],
    ["find", ".", "-name", "t*", "-exec", "cat", "{}", ";"],
    ["xargs", "-n1", "-P3", "echo"],
    ["timeout", "0.2", "sleep", "10"],
]


@pytest.mark.parametrize("argv", PROGRAMS, ids=lambda argv: " ".join(argv)[:24])
def test_they_do_as_they_do_outside(engine: str, argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("of a file\n")
    wanted = outside(argv, tmp_path)
    with Process(argv, files={"text": "of a file\n"}, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.stderr.decode() == wanted.stderr.decode()
    assert result.stdout == wanted.stdout
    if wanted.returncode < 0:
        assert (result.reason, result.signal) == ("signal", -wanted.returncode)
    else:
        assert (result.reason, result.status) == ("exited", wanted.returncode)


def test_multiprocessing(engine: str) -> None:
    """Processes that share semaphores: files that are mapped to be written to."""
    script = """
import multiprocessing as m
if __name__ == "__main__":
    with m.Pool(3) as pool: print(sum(pool.map(abs, range(-20, 0))))
"""
    with Process(["python3", "-c", script], engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.stdout, result.stderr) == (b"210\n", b"")


def test_children_see_the_parents_memory_of_then(engine: str) -> None:
    """Random writes on both sides of many forks, and neither sees the other's."""
    script = """
import os, random
random.seed(4)
memory = bytearray(1 << 20)
model = bytes(memory)
for round in range(12):
    for _ in range(50): memory[random.randrange(len(memory))] = random.randrange(256)
    model = bytes(memory)
    pid = os.fork()
    if not pid:
        good = memory == model
        for _ in range(100): memory[random.randrange(len(memory))] ^= 255
        if round % 3 == 0 and not (inner := os.fork()): os._exit(0)
        if round % 3 == 0: os.waitpid(inner, 0)
        os._exit(0 if good else 1)
    for _ in range(20): memory[random.randrange(len(memory))] ^= 15
    changed = bytes(memory)
    assert os.waitpid(pid, 0)[1] == 0
    assert memory == changed
print("good")
"""
    with Process(["python3", "-c", script], engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.text, result.stderr) == ("good\n", b"")


def test_a_fork_bomb_ends_at_its_limit(engine: str) -> None:
    bomb = """
import os, time
n = 0
try:
    while True:
        if not os.fork(): time.sleep(1000)
        n += 1
except OSError as error: print(error, n)
"""
    with Process(["python3", "-c", bomb], engine=engine, threads=10) as process:
        result = process.run(timeout=60)
    assert result.text == "[Errno 11] Resource temporarily unavailable 9\n"
    assert result.status == 0


def test_the_end_of_the_first_is_everybodys(engine: str) -> None:
    with Process(["sh", "-c", "sleep 1000 & sleep 1000 & exit 3"], engine=engine) as process:
        assert process.run(timeout=20).status == 3


def test_compiling(engine: str, tmp_path: Path) -> None:
    """gcc, cc1, as, collect2 and ld, one after the other."""
    source = '#include <stdio.h>\nint main(void) { printf("%d\\n", 6 * 7); return 0; }\n'
    made = tmp_path / "made"
    made.mkdir()
    with Process(
        ["gcc", "-O1", "-o", "/made/program", "a.c"],
        files={"a.c": source},
        rw=[(made, "/made")],
        engine=engine,
    ) as process:
        result = process.run(timeout=120)
    assert (result.stderr, result.status) == (b"", 0)
    done = subprocess.run([made / "program"], capture_output=True, check=True)
    assert done.stdout == b"42\n"
