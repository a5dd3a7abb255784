"""Signals that end polyvisor are never lost."""

from __future__ import annotations

import signal
import time
import weakref

import pytest

from polyvisor.cli.status import Terminated, signals_raise


class Thing:
    """Something that a weak reference can point to."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_where_exceptions_are_dropped_comes_again(number: signal.Signals) -> None:
    thing = Thing()
    called = []

    def gone(reference: weakref.ref[Thing]) -> None:
        called.append(reference)
        signal.raise_signal(number)

    reference = weakref.ref(thing, gone)
    with pytest.raises(Terminated) as raised, signals_raise():  # noqa: PT012
        del thing  # Terminated is raised in gone(), and dropped
        time.sleep(10)
    assert called == [reference]
    assert raised.value.number == number


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with signals_raise():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
