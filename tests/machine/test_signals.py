"""Ctrl-C, and the end of the interpreter, while a guest runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)

PROLOGUE = f"""
import sys
sys.path.insert(0, {HERE!r})
from guestcode import *
machine = real_mode(LOOP_FOREVER)
"""


def start(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    "wait",
    [
        "machine.run()",
        "machine.start(); machine.wait()",
        "machine.start(); machine.console.expect('x', timeout=None)",
        "machine.start(); machine.console.read(timeout=None)",
        "machine.cpu(0).step(10**12)",
    ],
)
def test_ctrl_c_interrupts_waiting(wait: str) -> None:
    process = start(f"print('ready', flush=True)\n{wait}\n")
    time.sleep(0.3)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - begin < 5
    assert "KeyboardInterrupt" in errors
    assert process.returncode == -signal.SIGINT


def test_ctrl_c_ends_the_machine_of_run() -> None:
    process = start("""
print("ready", flush=True)
try:
    machine.run()
except KeyboardInterrupt:
    print(machine.state, machine.wait().reason)
""")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert output == "ended stopped\n"
    assert process.returncode == 0


def test_the_interpreter_may_end_with_a_running_machine() -> None:
    process = start("""
class Device:
    def write(self, offset, size, value):
        pass
machine.add_port_device(0x500, Device())
machine.load_raw(ORIGIN, b"\\xba\\x00\\x05\\xee\\xeb\\xfd")  # out 0x500 for ever
machine.start()
print("ready", flush=True)
""")
    _, errors = process.communicate(timeout=20)
    assert errors == ""
    assert process.returncode == 0
