"""`polyvisor.records`: what is expected of a frozen dataclass, as far as it goes."""

from __future__ import annotations

import copy
import pickle

import pytest

from polyvisor.records import Record, asdict, replace


class Point(Record):
    x: int
    y: int = 2
    tags: dict[str, int] = {}  # noqa: RUF012

    @property
    def sum(self) -> int:
        return self.x + self.y


class Named(Record, kw_only=True):
    name: str = "none"
    size: int


def test_values_by_position_and_name() -> None:
    assert asdict(Point(1)) == {"x": 1, "y": 2, "tags": {}}
    assert asdict(Point(1, y=5)) == {"x": 1, "y": 5, "tags": {}}
    assert asdict(Named(size=3)) == {"name": "none", "size": 3}
    assert Point(1, 5).sum == 6
    assert Point(1).tags is not Point(1).tags


@pytest.mark.parametrize(
    ("kind", "values", "named", "problem"),
    [
        (Point, (), {}, "misses the field 'x'"),
        (Point, (1, 2, {}, 4), {}, "takes 3 values by position, not 4"),
        (Point, (1,), {"x": 2}, "twice the field 'x'"),
        (Point, (1,), {"z": 2}, "no field 'z'"),
        (Named, (1,), {}, "takes 0 values by position"),
        (Named, (), {"name": "a"}, "misses the field 'size'"),
    ],
)
def test_values_that_do_not_fit(
    kind: type[Record], values: tuple[object, ...], named: dict[str, object], problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        kind(*values, **named)


def test_it_cannot_be_changed() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    assert replace(point, x=7) == Point(7)
    assert point == Point(1)
    with pytest.raises(TypeError, match="no field"):
        replace(point, z=1)


def test_equality_hash_and_text() -> None:
    assert Named(size=1) == Named(name="none", size=1)
    assert Named(size=1) != Named(size=2)
    assert Named(size=1) != ("none", 1)
    assert len({Named(size=1), Named(size=1), Named(size=2)}) == 2
    assert repr(Point(1)) == "Point(x=1, y=2, tags={})"


def test_matching_and_copies() -> None:
    match Point(1, 3):
        case Point(1, y):
            assert y == 3
        case _:
            pytest.fail("did not match")
    point = Point(1, tags={"a": 1})
    for other in (copy.copy(point), copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        assert other == point
