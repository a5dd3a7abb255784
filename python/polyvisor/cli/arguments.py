"""What several commands take on the command line, as the library takes it."""

from __future__ import annotations

from polyvisor.errors import ConfigError


def place(text: str) -> str | tuple[str, str]:
    """PATH, or PATH:PLACE."""
    host, colon, inside = text.partition(":")
    if not colon:
        return host
    if not inside.startswith("/"):
        raise ConfigError(
            f"{text!r}: the place that the program sees must begin with /, as in ./data:/data",
            field="place",
        )
    return host, inside


def variable(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"--env takes NAME=VALUE, not {text!r}", field="env")
    return name, value
