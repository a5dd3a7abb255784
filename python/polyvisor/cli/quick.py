"""`polyvisor exec` in its plain form, understood without the parser.

Importing typer takes longer than all else that `exec` does before the guest runs (on a slow host,
seconds). So the options of `exec` stand here once more, as a table. Whatever is not plain (another
command, an option unknown here, an abbreviation, a value that does not convert, --help) is left to
typer, which then says what is wrong; tests/cli/test_quick.py holds the two together.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ENGINES = ("auto", "soft", "kvm")
IRQCHIPS = ("auto", "kernel", "split", "user")


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return convert


#: Option: the argument of `exec_command.execute`, and what makes its value of the text.
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--engine": ("engine", _one_of(ENGINES)),
    "--irqchip": ("irqchip", _one_of(IRQCHIPS)),
    "--memory": ("memory", str),
    "--cpus": ("cpus", int),
    "--timeout": ("timeout", float),
    "--kernel": ("kernel", str),
    "--append": ("append", str),
    "--workdir": ("directory", str),
    "--image": ("image", str),
}
FLAGS = {
    "--json": "as_json",
    "--stats": "stats",
    "--tty": "terminal",
    "-t": "terminal",
    "--write": "write",
}
LISTS = {"--env": "environment", "-e": "environment", "--net": "nets", "--share": "shares"}
DEFAULTS: dict[str, Any] = {
    "engine": "auto",
    "irqchip": "auto",
    "memory": "512M",
    "cpus": 1,
    "timeout": None,
    "kernel": "cloud",
    "append": "",
    "directory": "/root",
    "image": None,
    "write": False,
    "terminal": False,
    "as_json": False,
    "stats": False,
}


def parse(arguments: list[str]) -> tuple[list[str], dict[str, Any]] | None:
    """The command and the keyword arguments of `execute`; None for what typer has to look at."""
    if not arguments or arguments[0] != "exec":
        return None
    found: dict[str, Any] = {**DEFAULTS, "environment": [], "nets": [], "shares": []}
    rest = iter(range(1, len(arguments)))
    for at in rest:
        word = arguments[at]
        if word == "--":
            command = arguments[at + 1 :]
            return (command, found) if command else None
        if not word.startswith("-"):
            return arguments[at:], found
        if word in FLAGS:
            found[FLAGS[word]] = True
            continue
        value_at = next(rest, None)
        if value_at is None or arguments[value_at].startswith("-"):
            return None
        value = arguments[value_at]
        if word in LISTS:
            found[LISTS[word]].append(value)
        elif word in OPTIONS:
            name, convert = OPTIONS[word]
            try:
                found[name] = convert(value)
            except ValueError:
                return None
        else:
            return None
    return None
