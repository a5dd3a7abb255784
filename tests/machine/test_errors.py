from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path

import pytest

from polyvisor import errors


def native_classes(root: Path) -> dict[str, set[str]]:
    """The classes of base/error.hpp, with the fields that they have besides the text."""
    text = (root / "native/base/error.hpp").read_text()
    found = {}
    for name, body in re.findall(r"^class (\w+) : public \w[\w:]* \{(.*?)^\};", text, re.M | re.S):
        found[name] = set(re.findall(r"^ {4}(?:std::string|u64|int) (\w+);", body, re.M))
    assert len(found) >= 7, "the pattern no longer fits the header"
    return found


def test_every_native_error_has_a_python_twin(root: Path) -> None:
    table = (root / "src/errors.cpp").read_text()
    for name, fields in native_classes(root).items():
        twin = getattr(errors, name)
        wanted = {"errno" if field == "code" else field for field in fields}
        assert not wanted or wanted <= set(inspect.signature(twin).parameters), name
        assert f"const {name}& e" in table, f"src/errors.cpp does not translate {name}"


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_found_by_their_base(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.Error)
    error = kind("what happened")
    assert str(error) == "what happened"
    assert str(pickle.loads(pickle.dumps(error))) == "what happened"
    assert kind.__doc__


def test_errors_fit_pythons_own_kinds() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.ConsoleTimeout, TimeoutError)
    assert issubclass(errors.MachineTimeout, TimeoutError)
    assert issubclass(errors.MemoryRangeError, IndexError)
