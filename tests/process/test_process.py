"""Process VMs: real programs of the host, on both engines, beside the same programs outside."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from leftovers import Leftovers
from polyvisor import Process
from polyvisor.errors import ConfigError, HostError, ProcessTimeout, StateMismatch
from polyvisor.process import ENVIRONMENT

TEXT = "\n".join(f"line {n * 7919 % 1000} of the file" for n in range(400))
#: Programs that write the same wherever they run in a folder with `text` in it.
PROGRAMS = [
    ["/bin/busybox", "echo", "static", "and", "alone"],
    ["echo", "dynamic"],
    ["cat", "text"],
    ["sort", "-n", "-k2", "text"],
    ["sha256sum", "text"],
    ["gzip", "-9cn", "text"],
    ["awk", "{ s += $2 } END { print s }", "text"],
    ["grep", "-c", "9", "text"],
    ["sed", "-n", "s/line \\(.*\\) of/\\1/p", "text"],
    ["ls", "-1"],
    ["sh", "-c", "x=$((6 * 7)); for i in a b c; do echo $i $x; done; exit 3"],
    ["bash", "-c", 'mapfile -t l < text; echo "${#l[@]} ${l[7]}"; [[ -e none ]] || exit 4'],
    ["perl", "-e", 'open F, "text"; print scalar(() = <F>), "\\n"; printf "%.9f\\n", atan2(1, 3)'],
    [
        "python3",
        "-c",
        "import json, hashlib, re; print(json.dumps({'a': [1.5, 'b']}), sum(range(9)))",
    ],
    ["python3", "-c", "import sys; print(sys.argv); sys.exit(5)", "an argument"],
    ["env"],
    ["sh", "-c", "exec sort -r text"],
    ["env", "A=b", "python3", "-c", "import os; print(os.environ['A'])"],
    ["false"],
]


def outside(argv: list[str], folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        argv,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("argv", PROGRAMS, ids=lambda argv: " ".join(argv)[:30])
def test_programs_do_as_they_do_outside(engine: str, argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    wanted = outside(argv, tmp_path)
    with Process(argv, files={"text": TEXT}, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.stderr.decode() == wanted.stderr.decode()
    assert result.stdout == wanted.stdout
    assert (result.reason, result.status) == ("exited", wanted.returncode)
    calls = result.system_calls
    assert not [name for name in calls if name.startswith("syscall_")]
    assert calls["exit_group"] == (1, 0)


def test_standard_input_and_counts(engine: str) -> None:
    with Process(["wc", "-l"], stdin=b"x\n" * 100_000, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.text.strip() == "100000"
    assert result.system_calls["read"][0] >= 2
    assert result.engine == engine
    assert result.cpu_seconds > 0


def test_files_are_written_where_that_is_allowed(engine: str, tmp_path: Path) -> None:
    kept, seen = tmp_path / "kept", tmp_path / "seen"
    kept.mkdir()
    seen.mkdir()
    (seen / "there").write_text("before")
    script = """
import os
open("/work/a", "w").write("1"); os.mkdir("/tmp/d"); os.rename("/work/a", "/tmp/d/b")
print(open("/tmp/d/b").read(), os.listdir("/work"))
open("/kept/result", "w").write("from inside")
os.symlink("result", "/kept/link")
for name in ("/usr/x", "/seen/there", "/etc/x"):
    try:
        open(name, "a")
    except OSError as error:
        print(name, error.strerror)
for act in (lambda: os.unlink("/seen/there"), lambda: os.rename("/seen/there", "/kept/stolen"),
            lambda: os.chmod("/seen/there", 0o777), lambda: os.utime("/seen/there")):
    try:
        act()
    except OSError as error:
        print(error.strerror)
"""
    with Process(
        ["python3", "-c", script], ro=[(seen, "/seen")], rw=[(kept, "/kept")], engine=engine
    ) as process:
        result = process.run(timeout=60)
    assert result.stderr == b""
    assert result.text.splitlines() == [
        "1 []",
        *(f"{name} Read-only file system" for name in ("/usr/x", "/seen/there", "/etc/x")),
        *["Read-only file system"] * 4,
    ]
    assert (kept / "result").read_text() == "from inside"
    assert (seen / "there").read_text() == "before"


def test_nothing_leads_out_of_the_tree(tmp_path: Path) -> None:
    """Links and dots of a hostile folder, and names that the host would resolve otherwise."""
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "proc").mkdir()
    (tmp_path / "secret").write_text("of the host")
    os.link("/bin/busybox", root / "bin" / "busybox") if os.stat("/bin/busybox").st_dev == os.stat(
        tmp_path
    ).st_dev else (root / "bin" / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    (root / "up").symlink_to("../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "far").symlink_to("../" * 40 + str(tmp_path / "secret").lstrip("/"))
    (root / "self").symlink_to("/proc/self/root" + str(tmp_path / "secret"))
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    names = ["up", "absolute", "far", "self", "loop", "fifo", "../secret", "/../../secret"]
    for name in [*names, "/proc/1/root/etc/passwd", "/proc/self/mem", str(tmp_path / "secret")]:
        with Process(["/bin/busybox", "cat", name], root=root, cwd="/", engine="soft") as process:
            result = process.run(timeout=20)
        assert result.status == 1, name
        assert result.stdout == b"", name


@pytest.mark.parametrize(
    ("script", "signal"),
    [
        ("import ctypes; ctypes.string_at(8)", 11),
        ("import os; os.abort()", 6),
        ("import os; os.kill(os.getpid(), 9)", 9),
    ],
)
def test_signals_end_it(engine: str, script: str, signal: int) -> None:
    with Process(["python3", "-c", script], engine=engine) as process:
        result = process.run(timeout=60)
    assert (result.reason, result.signal, result.status) == ("signal", signal, 128 + signal)


def test_limits(engine: str) -> None:
    hog = """
x = []
try:
    while True: x.append(bytes(1 << 20))
except MemoryError: print(len(x) > 20)
"""
    with Process(["python3", "-c", hog], memory="64M", engine=engine) as process:
        assert process.run(timeout=60).text == "True\n"
    with Process(["yes"], output="10K", engine=engine) as process:
        result = process.run(timeout=60)
    assert len(result.stdout) == 10 << 10
    assert result.status == 1


@pytest.mark.parametrize(
    "program", [["sleep", "100"], ["sh", "-c", "while :; do :; done"], ["cat"]]
)
def test_timeouts_come_whatever_it_does(engine: str, program: list[str]) -> None:
    reading, writing = os.pipe()
    try:
        with Process(program, stdin=reading, engine=engine) as process:
            started = time.monotonic()
            with pytest.raises(ProcessTimeout) as caught:
                process.run(timeout=0.3)
            assert time.monotonic() - started < 3
            assert caught.value.seconds == 0.3
    finally:
        os.close(reading)
        os.close(writing)


def test_it_goes_on_after_a_timeout(engine: str) -> None:
    script = "import time\nfor n in range(4): print(n, flush=True); time.sleep(0.2)"
    with Process(["python3", "-c", script], engine=engine) as process:
        written = b""
        for _ in range(100):
            try:
                result = process.run(timeout=0.1)
                break
            except ProcessTimeout as error:
                before, written = written, error.stdout
            assert written.startswith(before)
        assert result.text == "0\n1\n2\n3\n"


def test_instructions_are_counted() -> None:
    with Process(["sh", "-c", "while :; do :; done"], instructions=10**7, engine="soft") as process:
        assert process.run(timeout=30).reason == "instructions"
    with Process(["true"], instructions=10**8, engine="soft") as process:
        assert process.run(timeout=30).reason == "exited"


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a program")
    with pytest.raises(HostError) as missing:
        Process(["/usr/bin/no-such-program"])
    assert missing.value.errno == 2
    with pytest.raises(HostError) as refused:
        Process([tmp_path / "text"], ro=[tmp_path])
    assert refused.value.errno == 13
    for options, field in [
        ({"argv": "ls"}, "argv"),
        ({"argv": []}, "argv"),
        ({"argv": ["no-such-program"]}, "argv"),
        ({"argv": ["true"], "files": {"../x": b""}}, "files"),
        ({"argv": ["true"], "ro": ["/no/such/folder"]}, "ro"),
        ({"argv": ["true"], "memory": "lots"}, "memory"),
    ]:
        with pytest.raises(ConfigError) as wrong:
            Process(**options)  # type: ignore[arg-type]
        assert wrong.value.field == field
    process = Process(["true"])
    process.close()
    with pytest.raises(StateMismatch):
        process.run()


def test_nothing_is_left(engine: str) -> None:
    for _ in range(2):  # the second one tells polyvisor that a vCPU is worth keeping for KVM's sake
        with Process(["true"], engine=engine) as process:
            process.run(timeout=30)
    before = Leftovers()
    for _ in range(20):
        with Process(["true"], engine=engine) as process:
            process.run(timeout=30)
    before.check()
