"""`polyvisor process run`: what it prints, and its exit statuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


def polyvisor(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "polyvisor.cli", "process", "run", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_streams_and_status_are_the_programs() -> None:
    done = polyvisor("--", "sh", "-c", "cat; echo wrong >&2; exit 7", stdin=b"through\n")
    assert (done.stdout, done.stderr, done.returncode) == (b"through\n", b"wrong\n", 7)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--timeout", "0.3", "sleep", "9"], 124, "sleep did not end within 0.3 s"),
        (["--cpu", "0.2", "sh", "-c", "while :; do :; done"], 152, "sh used up its 0.2 s of CPU"),
        (
            ["--instructions", "1000000", "sh", "-c", "while :; do :; done"],
            152,
            "sh used up its 1000000 instructions",
        ),
        (["--output", "1K", "yes"], 1, "yes wrote more than its 1K of output"),
        (["no-such-program"], 127, "there is no program called 'no-such-program'"),
        (["/usr/bin/no-such-program"], 127, "/usr/bin/no-such-program"),
        (["/etc/localtime"], 126, "/etc/localtime"),
        (["/usr"], 126, "/usr"),
        (["--memory", "lots", "true"], 125, "cannot read memory 'lots'"),
        (["--memory", "-1", "true"], 125, "cannot read memory '-1'"),
        (["--timeout", "0", "true"], 125, "--timeout must be more than 0"),
        (["--cpu", "-1", "true"], 125, "cpu must be from"),
        (["--open-files", "9999", "true"], 125, "open_files must be from 3 to 1024"),
        (["--ro", "/no/such", "true"], 125, "there is no /no/such"),
        (["--rw", "/tmp:place", "true"], 125, "'/tmp:place': the place"),
        (["--env", "NAME", "true"], 125, "--env takes NAME=VALUE"),
        (["--root", "/no/such", "true"], 125, "/no/such"),
        (["--engine", "kvm", "--instructions", "5", "true"], 125, "instructions are counted by"),
        (["--trace-file", "/no/such/file", "true"], 125, "/no/such/file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_one_sentence_and_a_status_that_means_something(
    arguments: list[str], status: int, sentence: str
) -> None:
    done = polyvisor(*arguments)
    said = [line for line in done.stderr.decode().splitlines() if "polyvisor: " in line]
    assert len(said) == 1, done.stderr
    assert sentence in said[0]
    assert done.returncode == status
    assert len(done.stderr.splitlines()) <= 2  # (`yes` has a word of its own)


def test_scripts_and_what_is_none(tmp_path: Path) -> None:
    for name, text in (
        ("good", "#!/bin/sh -e\necho $0 $1\n"),
        ("lost", "#!/no/such/shell\n"),
        ("text", "no program\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    place = f"{tmp_path}:/p"
    done = polyvisor("--ro", place, "/p/good", "x")
    assert (done.stdout, done.returncode) == (b"/p/good x\n", 0)
    for name, status in (("lost", 127), ("text", 126)):
        done = polyvisor("--ro", place, f"/p/{name}")
        assert done.returncode == status
        assert done.stderr.startswith(b"polyvisor: ")
        assert len(done.stderr.splitlines()) == 1


def test_json_has_all_of_it() -> None:
    done = polyvisor("--json", "--output", "20", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stderr) == (3, b"")
    told = json.loads(done.stdout)
    assert told["argv"][0] == "sh"
    assert (told["reason"], told["status"], told["signal"]) == ("exited", 3, 0)
    assert (told["stdout"], told["stderr"]) == ("out\n", "err\n")
    assert (told["limits"], told["output"]) == ([], 8)
    assert (told["processes"], told["threads"]) == (1, 1)
    assert told["cpu_seconds"] > 0
    assert told["system_calls"]["exit_group"] == {"calls": 1, "failed": 0}
    done = polyvisor("--json", "--timeout", "0.4", "--", "sh", "-c", "echo out; sleep 9")
    assert done.returncode == 124
    told = json.loads(done.stdout)
    assert (told["reason"], told["status"], told["stdout"]) == ("timeout", 124, "out\n")


def test_traces(tmp_path: Path) -> None:
    done = polyvisor("--trace", "cat", "/none")
    assert done.returncode == 1
    assert re.search(
        rb'^openat\(AT_FDCWD, "/none", O_RDONLY\)\s+= -1 ENOENT \(No such', done.stderr, re.M
    )
    assert done.stderr.endswith(b"+++ exited with 1 +++\n")
    log = tmp_path / "log"
    done = polyvisor("-o", str(log), "echo", "x")
    assert (done.stdout, done.stderr) == (b"x\n", b"")
    assert 'write(1, "x\\n", 2)' in log.read_text()
    done = polyvisor("--trace-json", "-o", str(log), "echo", "x")
    written = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(one.get("name") == "write" and one["text"][1] == '"x\\n"' for one in written)


def test_help_has_examples_and_statuses() -> None:
    text = polyvisor("--help").stdout.decode()
    for word in ("Examples", "--trace-file", "--cpu", "--open-files", "124", "152"):
        assert word in text
