"""The type stubs of the extension modules against the modules themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What pybind11 and Cython add by themselves, and what Python 3.11 cannot show (PEP 688).
ARTIFACTS = re.compile(
    r"metaclass differs$"
    r'|__init__ is inconsistent, stub does not have \*args parameter "args"$'
    r"|\.__buffer__ is not present at runtime$"
    r"|\._(fast|ring)\.\S*__(reduce_cython|setstate_cython|test|pyx_\w+)__ is not present in stub$"
)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stubs_and_modules_agree(root: Path) -> None:
    modules = ("polyvisor._native", "polyvisor._fast", "polyvisor._ring")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy.stubtest", *modules, "--concise"),
            *("--mypy-config-file", root / "pyproject.toml"),
        ],
        cwd=root,
        env=os.environ | {"MYPYPATH": str(root / "python")},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert all(line.startswith(modules) for line in lines), done.stdout + done.stderr
    differences = [line for line in lines if not ARTIFACTS.search(line)]
    assert not differences, "\n".join(differences)
    assert lines or done.returncode == 0, done.stderr
