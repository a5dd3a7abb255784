"""The plain form of `exec`, understood without typer, against typer."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.cli import app, exec_command, quick
from polyvisor.errors import Error

VALUES = ["kvm", "soft", "split", "4", "0", "-1", "0.5", "1e3", "x", "", "A=1", "--", "-t", "1G"]
WORDS = [*quick.OPTIONS, *quick.FLAGS, *quick.LISTS, *VALUES, "true", "--help", "--eng", "--cpus=2"]


def by_typer(arguments: list[str]) -> tuple[list[str], dict[str, Any]] | None:
    """What typer makes of it: as `quick.parse`, None when it refuses or does something else."""
    calls: list[tuple[list[str], dict[str, Any]]] = []

    def execute(command: list[str], **options: Any) -> int:
        del options["stdin_closed"]
        calls.append((command, options))
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exec_command, "execute", execute)
        try:
            app.run(arguments, set())
        except (Error, SystemExit):
            return None
    return calls[0] if calls else None


def same(ours: tuple[list[str], dict[str, Any]], theirs: Any) -> bool:
    return repr((ours[0], sorted(ours[1].items()))) == repr((theirs[0], sorted(theirs[1].items())))


@given(st.lists(st.sampled_from(WORDS), max_size=8))
def test_what_it_takes_typer_takes_the_same_way(words: list[str]) -> None:
    ours = quick.parse(["exec", *words])
    if ours is not None:
        theirs = by_typer(["exec", *words])
        assert theirs is not None
        assert same(ours, theirs)


@pytest.mark.parametrize(
    "words",
    [
        ["true"],
        ["--", "ls", "-l", "--", "-x"],
        ["ls", "-l", "--json"],
        ["--engine", "kvm", "--cpus", "2", "--memory", "1G", "--timeout", "5", "--", "sh"],
        ["-e", "A=1", "--env", "B", "-t", "--json", "--stats", "--irqchip", "user", "sh"],
        ["--kernel", "generic", "--append", "a b", "--workdir", "/tmp", "true"],
    ],
)
def test_plain_forms_are_taken(words: list[str]) -> None:
    ours = quick.parse(["exec", *words])
    assert ours is not None
    assert same(ours, by_typer(["exec", *words]))


@pytest.mark.parametrize(
    "words",
    [[], ["run"], ["exec"], ["exec", "--"], ["exec", "--help"], ["exec", "--engine", "x", "true"]],
)
def test_the_rest_is_left_to_typer(words: list[str]) -> None:
    assert quick.parse(words) is None


def test_no_option_is_missing() -> None:
    group: Any = typer.main.get_command(app.app)
    known = {
        name
        for parameter in group.commands["exec"].params
        if parameter.param_type_name == "option"
        for name in parameter.opts
    }
    assert known - {"--help", "-h"} == {*quick.OPTIONS, *quick.FLAGS, *quick.LISTS}
