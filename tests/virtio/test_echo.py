"""How a virtio device is tested without a machine."""

from __future__ import annotations

import pytest
from echo import BACKWARDS, Echo

from polyvisor.virtio.testing import FakeGuest


@pytest.mark.parametrize("packed", [False, True])
def test_it_answers(packed: bool) -> None:
    with FakeGuest(Echo(), features=~BACKWARDS, packed=packed) as guest:
        assert guest.request(0, b"hello", into=100) == b"hello"
        assert guest.request(0, [b"two ", b"pieces"], into=6) == b"two pi"
        assert guest.read_config(0, 4) == b"\2\0\0\0"


def test_it_turns_around_what_it_is_asked_to() -> None:
    with FakeGuest(Echo()) as guest:
        assert guest.request(0, b"stressed", into=8) == b"desserts"


def test_a_request_without_room_is_no_error() -> None:
    with FakeGuest(Echo()) as guest:
        assert guest.request(0, b"hello", into=0) == b""
        assert not guest.needs_reset
