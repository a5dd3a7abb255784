"""The layers of native/ (docs/architecture.md), read from the sources themselves.

Each check is a function from a tree to a list of sentences, so that the same function is run on the
project (must find nothing) and on small trees with a planted fault (must find it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A folder may include strictly lower layers, and itself.
LAYERS = {
    "base": 0,
    "memory": 1,
    "host": 1,
    "mmu": 2,
    "bus": 3,
    "cpu": 4,
    "irqchip": 4,
    "soft": 5,
    "kvm": 5,
    "devices": 5,
    "pci": 5,
    "block": 5,
    "net": 5,
    "virtio": 6,
    "paravirt": 6,
    "process": 6,
    "machine": 7,
}
LINES = 800
# Tables of instructions are one thing, however long; and a module has one stub file.
LONG = ("native/soft/optab", "python/polyvisor/_native.pyi")
FOLDERS = ("native", "src", "python", "guest", "tests", "benchmarks", "scripts")
SOURCES = {".cpp", ".hpp", ".c", ".h", ".py", ".pyx", ".pxd", ".pyi"}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
MODULE = re.compile(r"pv_module\(\s*(\w+)([^)]*)\)")

Check = Callable[[Path], list[str]]


def native_files(root: Path) -> Iterator[Path]:
    for path in sorted((root / "native").rglob("*")):
        if path.suffix in {".hpp", ".cpp", ".inc", ".S"} and path.is_file():
            yield path


def includes(path: Path) -> Iterator[tuple[bool, str]]:
    """(whether it is one of ours, the name) of every #include of a file."""
    for bracket, name in INCLUDE.findall(path.read_text()):
        yield bracket == '"', name


def upward_includes(root: Path) -> list[str]:
    found = []
    for path in native_files(root):
        folder = path.relative_to(root / "native").parts[0]
        for ours, name in includes(path):
            other = Path(name).parts[0]
            if not ours or other == folder:
                continue
            where = f'{path.relative_to(root)} includes "{name}"'
            if not (root / "native" / name).is_file():
                found.append(f"{where}, which is no file of native/")
            elif folder in LAYERS and other in LAYERS and LAYERS[other] >= LAYERS[folder]:
                found.append(f"{where}: {other} is not below {folder}")
    return found


def unknown_folders(root: Path) -> list[str]:
    folders = {path.relative_to(root / "native").parts[0] for path in native_files(root)}
    return [f"native/{folder} has no layer" for folder in sorted(folders - LAYERS.keys())]


def python_in_native(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)} includes {name}"
        for path in native_files(root)
        for _, name in includes(path)
        if Path(name).name == "Python.h" or Path(name).parts[0] in {"pybind11", "numpy"}
    ]


def modules(root: Path) -> dict[str, set[str]]:
    """The DEPS of every pv_module() of native/."""
    found = {}
    for listing in sorted((root / "native").glob("*/CMakeLists.txt")):
        text = re.sub(r"#.*", "", listing.read_text())
        for name, rest in MODULE.findall(text):
            dependencies: set[str] = set()
            keyword = ""
            for word in rest.split():
                if word in {"SOURCES", "DEPS", "LIBS"}:
                    keyword = word
                elif keyword == "DEPS":
                    dependencies.add(word)
            found[name] = dependencies
    return found


def upward_links(root: Path) -> list[str]:
    return [
        f"native/{name}/CMakeLists.txt: DEPS {other} is not below {name}"
        for name, dependencies in modules(root).items()
        for other in sorted(dependencies)
        if LAYERS.get(other, 99) >= LAYERS.get(name, -1)
    ]


def unlinked_includes(root: Path) -> list[str]:
    linked = modules(root)

    def reachable(name: str) -> set[str]:
        return {name}.union(*(reachable(other) for other in linked.get(name, set())))

    found = []
    for path in native_files(root):
        folder = path.relative_to(root / "native").parts[0]
        for ours, name in includes(path):
            other = Path(name).parts[0]
            if ours and other in LAYERS and folder in linked and other not in reachable(folder):
                found.append(f'{path.relative_to(root)} includes "{name}" without DEPS {other}')
    return found


def long_files(root: Path) -> list[str]:
    found = []
    for path in (path for folder in FOLDERS for path in sorted((root / folder).rglob("*"))):
        name = str(path.relative_to(root))
        if path.suffix in SOURCES and path.is_file() and not name.startswith(LONG):
            lines = len(path.read_bytes().splitlines())
            if lines > LINES:
                found.append(f"{name} has {lines} lines; {LINES} is the limit")
    return found


def deep_files(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)} is more than 3 folders below native/"
        for path in native_files(root)
        if len(path.relative_to(root / "native").parts) > 4
    ]


CHECKS: list[Check] = [
    upward_includes,
    unknown_folders,
    python_in_native,
    upward_links,
    unlinked_includes,
    long_files,
    deep_files,
]


@pytest.mark.parametrize("check", CHECKS)
def test_tree(check: Check, root: Path) -> None:
    found = check(root)
    assert not found, "\n".join(found)


def test_the_tree_is_read(root: Path) -> None:
    assert {"base", "memory"} <= modules(root).keys()
    assert "base/types.hpp" in {name for path in native_files(root) for _, name in includes(path)}


# Files to add to a sound tree, and the checks that must notice.
FAULTS: dict[str, tuple[dict[str, str], list[Check]]] = {
    "sound": ({}, []),
    "up": (
        {"native/base/b.hpp": '#include "memory/m.hpp"\n'},
        [upward_includes, unlinked_includes],
    ),
    "sibling": (
        {
            "native/host/h.hpp": '#  include "memory/m.hpp"\n',
            "native/host/CMakeLists.txt": "pv_module(host DEPS base\n  memory)\n",
        },
        [upward_includes, upward_links],
    ),
    "no such file": ({"native/memory/n.cpp": '#include "base/gone.hpp"\n'}, [upward_includes]),
    "relative": ({"native/memory/n.cpp": '#include "../base/b.hpp"\n'}, [upward_includes]),
    "not linked": (
        {"native/memory/CMakeLists.txt": "pv_module(memory)  # DEPS base\n"},
        [unlinked_includes],
    ),
    "new folder": ({"native/misc/x.hpp": ""}, [unknown_folders]),
    "Python.h": ({"native/base/p.cpp": "#include <Python.h>\n"}, [python_in_native]),
    "pybind11": ({"native/base/p.cpp": "#include <pybind11/pybind11.h>\n"}, [python_in_native]),
    "too long": ({"native/base/l.cpp": "\n" * (LINES + 1)}, [long_files]),
    "too long in Python": ({"python/polyvisor/l.py": "\n" * (LINES + 1)}, [long_files]),
    "long table": ({"native/soft/optab.cpp": "\n" * (LINES + 1)}, []),
    "long": ({"native/base/l.cpp": "\n" * LINES}, []),
    "deep": ({"native/base/one/two/three/four.cpp": ""}, [deep_files]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    files = {
        "native/base/b.hpp": "#include <vector>\n",
        "native/base/CMakeLists.txt": "pv_module(base)\n",
        "native/memory/m.hpp": '#include "base/b.hpp"\n#include "memory/m.hpp"\n',
        "native/memory/CMakeLists.txt": "pv_module(memory SOURCES m.cpp DEPS base LIBS z)\n",
    }
    planted, expected = FAULTS[fault]
    for name, text in (files | planted).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert [check for check in CHECKS if check(tmp_path)] == expected
