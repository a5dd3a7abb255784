"""Signals of programs in process VMs: what the same programs see of the host's kernel outside."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from polyvisor import Process
from polyvisor.process import ENVIRONMENT

SOURCE = Path(__file__).with_name("signals.c")
TOPICS = [
    "spin",
    "frame",
    "exceptions",
    "skip",
    "stacks",
    "masks",
    "waits",
    "queues",
    "timers",
    "mistakes",
    "spoil",
    "threads",
    "choice",
    "family",
    "copied",
]
ENDS = ["ends_blocked", "ends_ignored", "ends_without_stack", "ends_nested"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program."""
    folder = tmp_path_factory.mktemp("signals")
    command = ["cc", "-O1", "-static", "-pthread", "-o", folder / "signals", SOURCE, "-lm"]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def outside(build: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """What each topic does on the host."""
    return {
        topic: subprocess.run(
            [build / "signals", topic], capture_output=True, text=True, check=False
        )
        for topic in TOPICS + ENDS
    }


@pytest.mark.parametrize("topic", TOPICS + ENDS)
def test_topics_print_what_they_print_outside(
    engine: str,
    build: Path,
    outside: dict[str, subprocess.CompletedProcess[str]],
    topic: str,
) -> None:
    with Process(["/build/signals", topic], ro=[(build, "/build")], engine=engine) as process:
        result = process.run(timeout=60)
    wanted = outside[topic]
    assert result.text == wanted.stdout
    assert result.signal == max(0, -wanted.returncode)
    assert topic in ENDS or result.status == 0


def test_copies_have_its_timers_and_what_waits(engine: str, build: Path) -> None:
    with Process(["/build/signals", "copied"], ro=[(build, "/build")], engine=engine) as template:
        template.run_until("marked", timeout=20)
        with template.fork() as child:
            for _ in range(2):
                assert child.run(timeout=20).text == "three 1\n"
                child.reset()


@pytest.mark.parametrize("number", [1, 2, 3, 6, 9, 10, 11, 15, 17, 18, 23, 28, 30, 31, 34, 64])
def test_what_is_not_handled_ends_it_or_does_nothing(build: Path, number: int) -> None:
    argv = ["/build/signals", "send", str(number)]
    wanted = subprocess.run(
        [build / "signals", *argv[1:]], capture_output=True, text=True, check=False
    )
    with Process(argv, ro=[(build, "/build")], engine="soft") as process:
        result = process.run(timeout=20)
    assert result.text == wanted.stdout
    assert result.signal == max(0, -wanted.returncode)


SCRIPTS = {
    "KeyboardInterrupt": """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    while True: pass
except KeyboardInterrupt:
    print("interrupted")
""",
    "setitimer": """
import signal
seen = 0
def on_alarm(number, frame):
    global seen
    seen += 1
signal.signal(signal.SIGALRM, on_alarm)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
while seen < 10: pass
signal.setitimer(signal.ITIMER_REAL, 0)
print("ten")
""",
    "alarm ends a read": """
import os, signal
class Enough(Exception): pass
def on_alarm(number, frame): raise Enough
signal.signal(signal.SIGALRM, on_alarm)
signal.setitimer(signal.ITIMER_REAL, 0.05)
reading, writing = os.pipe()
try:
    os.read(reading, 1)
except Enough:
    print("enough")
""",
    "faulthandler": """
import ctypes, faulthandler, sys
faulthandler.enable(sys.stdout, all_threads=False)
ctypes.string_at(8)
""",
    "sigwait": """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
os.kill(os.getpid(), signal.SIGUSR2)
print(signal.sigpending(), signal.sigwait([signal.SIGUSR2]))
print(signal.sigtimedwait([signal.SIGUSR1], 0.01))
""",
    "wakeup": """
import os, select, signal
reading, writing = os.pipe()
os.set_blocking(writing, False)
signal.set_wakeup_fd(writing)
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.02)
print(select.select([reading], [], [], 10)[0] == [reading], os.read(reading, 9))
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_python(engine: str, name: str) -> None:
    argv = ["python3", "-c", SCRIPTS[name]]
    wanted = subprocess.run(argv, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    with Process(argv, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.text == wanted.stdout
    assert result.signal == max(0, -wanted.returncode)


SHELL = """
trap 'echo hup' HUP
trap 'echo usr1; trap - USR1' USR1
trap 'echo bye $?' EXIT
trap '' USR2
kill -HUP $$; kill -USR1 $$; kill -USR2 $$
(trap 'echo in a subshell; exit 3' TERM; kill -TERM $BASHPID; echo not reached)
echo $?
sleep 10 & p=$!; sleep 0.1; kill $p; wait $p; echo $?
timeout 0.1 sleep 10; echo $?
exit 7
"""


def test_bash_traps(engine: str) -> None:
    argv = ["bash", "-c", SHELL]
    wanted = subprocess.run(argv, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    with Process(argv, engine=engine) as process:
        result = process.run(timeout=60)
    assert result.text == wanted.stdout
    assert result.status == wanted.returncode == 7
