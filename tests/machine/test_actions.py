from __future__ import annotations

import base64
import json

import pytest
from guestcode import LOOP_FOREVER, real_mode, say

from polyvisor import actions
from polyvisor.errors import ConfigError, MemoryRangeError, StateMismatch


def do(machine: object, **fields: object) -> object:
    action = actions.decode(json.dumps(fields))
    assert actions.decode(actions.encode(action)) == action
    return actions.apply(machine, action)  # type: ignore[arg-type]


def test_a_machine_by_actions_alone() -> None:
    with real_mode(say(b"hi") + LOOP_FOREVER) as machine:
        data = base64.b64encode(b"\x01\x02").decode()
        assert do(machine, action="write_memory", gpa=0x9000, data=data) is None
        assert do(machine, action="read_memory", gpa=0x9000, size=2) == data
        assert do(machine, action="write_registers", values={"rbx": 7}) is None
        assert do(machine, action="read_registers")["rbx"] == 7  # type: ignore[index]
        do(machine, action="start")
        with pytest.raises(StateMismatch):
            do(machine, action="read_registers")
        text = ""
        while text != "hi":
            text += do(machine, action="read_console", timeout=5)  # type: ignore[operator]
        do(machine, action="send_console", text="x")
        do(machine, action="power_button")
        do(machine, action="nmi")
        do(machine, action="pause")
        assert do(machine, action="describe")["state"] == "paused"  # type: ignore[index]
        do(machine, action="resume")
        assert do(machine, action="wait", timeout=0.01) is None
        assert do(machine, action="stop")["reason"] == "stopped"  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"action": "explode"}',
        '{"action": "nmi", "cpu": "first"}',
        '{"action": "start", "now": true}',
        '{"action": "send_console"}',
    ],
)
def test_what_is_no_action(text: str) -> None:
    with pytest.raises(ConfigError):
        actions.decode(text)


def test_actions_fail_as_the_machine_does() -> None:
    with real_mode(LOOP_FOREVER) as machine:
        for error, fields in (
            (MemoryRangeError, {"action": "read_memory", "gpa": 1 << 40, "size": 1}),
            (ConfigError, {"action": "read_memory", "gpa": 0, "size": 1 << 40}),
            (ConfigError, {"action": "write_memory", "gpa": 0, "data": "*"}),
            (ConfigError, {"action": "nmi", "cpu": 5}),
            (ConfigError, {"action": "send_console", "text": "", "port": 9}),
            (StateMismatch, {"action": "resume"}),
        ):
            with pytest.raises(error):
                do(machine, **fields)
