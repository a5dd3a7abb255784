"""The names of the package, which are loaded when they are used."""

from __future__ import annotations

import subprocess
import sys

import polyvisor

#: What takes long to import, and the start of a guest does without.
HEAVY = ("msgspec", "typing", "re", "enum", "json", "pathlib", "contextlib", "threading", "rich")


def test_every_public_name_is_there() -> None:
    assert set(polyvisor.__all__) <= set(dir(polyvisor))
    for name in polyvisor.__all__:
        assert getattr(polyvisor, name) is not None
    assert set(polyvisor._HOMES) == set(polyvisor.__all__) - {"errors"}
    assert not hasattr(polyvisor, "nonsense")


def test_a_star_import_has_them_all() -> None:
    names: dict[str, object] = {}
    exec("from polyvisor import *", names)
    assert set(polyvisor.__all__) <= set(names)


def loaded(program: str) -> set[str]:
    """The modules that a program has loaded at its end."""
    # -S: what site loads (.pth files of others) is not ours.
    program = (
        f"import sys\nsys.path[:] = {sys.path}\n{program}\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return set(done.stderr.split())


def test_starting_a_guest_imports_little() -> None:
    machine = "from polyvisor import Machine\nMachine(memory='2M', engine='soft').close()"
    without = loaded(f"import polyvisor.cli\nimport polyvisor.guest\n{machine}")
    assert "polyvisor.machine" in without
    # (importlib is for `from polyvisor import Machine`, and takes warnings along.)
    assert not without & set(HEAVY)
