"""Signals that end polyvisor are never lost."""

from __future__ import annotations

import signal
import time
import weakref

import pytest

from polyvisor.cli.status import Terminated, report, signals_raise


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_native_import(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """A native module's initialization makes an ImportError of whatever is raised in it."""
    with pytest.raises(ImportError) as raised, signals_raise():  # noqa: PT012
        try:
            signal.raise_signal(number)
        except Terminated as terminated:
            raise ImportError("initialization failed") from terminated
    assert report(raised.value) == 128 + number
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ImportError, match="really"):
        report(ImportError("really"))
