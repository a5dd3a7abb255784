"""`Record`: immutable classes of named fields, and nothing else.

msgspec and dataclasses have better ones; but to import either takes longer than all that polyvisor
does until a guest runs. So what is needed for that is made of these, and what has to be checked as
it comes from a file, of msgspec.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

    R = TypeVar("R", bound="Record")
else:

    def dataclass_transform(**_options):
        return lambda kind: kind


@dataclass_transform(frozen_default=True)
class Record:
    """A base class: what a subclass annotates are its fields, in that order, with their defaults.

    Two of the same class are equal when their fields are. A default that is a dict is copied.
    Subclasses have no subclasses.
    """

    if TYPE_CHECKING:
        _fields: ClassVar[tuple[str, ...]]
        _positional: ClassVar[tuple[str, ...]]
        _defaults: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        cls._fields = tuple(cls.__annotations__)
        cls._defaults = {name: vars(cls)[name] for name in cls._fields if name in vars(cls)}
        cls._positional = () if kw_only else cls._fields
        if not TYPE_CHECKING:  # which has its own idea of it
            cls.__match_args__ = cls._positional

    def __init__(self, *values: Any, **named: Any) -> None:
        fields = self.__dict__
        if values:
            positional = self._positional
            if len(values) > len(positional):
                raise TypeError(
                    f"{type(self).__name__} takes {len(positional)} values by position, "
                    f"not {len(values)}"
                )
            fields.update(zip(positional, values, strict=False))
        if named:
            for name in named:
                if name in fields or name not in self._fields:
                    problem = "twice the field" if name in fields else "no field"
                    raise TypeError(f"{type(self).__name__} has {problem} {name!r}")
            fields.update(named)
        if len(fields) == len(self._fields):
            return
        for name in self._fields:
            if name not in fields:
                if name not in self._defaults:
                    raise TypeError(f"{type(self).__name__} misses the field {name!r}")
                default = self._defaults[name]
                fields[name] = default.copy() if isinstance(default, dict) else default

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, name) for name in self._fields)))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({fields})"

    def __replace__(self, **changes: Any) -> Self:  # also copy.replace() of Python 3.13
        return type(self)(**(asdict(self) | changes))


def replace(record: R, **changes: Any) -> R:
    """The same with some fields changed."""
    return record.__replace__(**changes)


def asdict(record: Record) -> dict[str, Any]:
    """The fields by name; values as they are."""
    return {name: getattr(record, name) for name in record._fields}
