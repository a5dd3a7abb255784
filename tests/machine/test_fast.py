"""polyvisor._fast on plain buffers, against Python's own arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor import _fast


@given(st.binary(min_size=8, max_size=64), st.sampled_from([1, 2, 4, 8]), st.data())
def test_load_and_store(data: bytes, width: int, draw: st.DataObject) -> None:
    offset = draw.draw(st.integers(0, len(data) - width))
    assert _fast.load(data, offset, width) == int.from_bytes(
        data[offset : offset + width], "little"
    )
    value = draw.draw(st.integers(0, (1 << 8 * width) - 1))
    buffer = bytearray(data)
    _fast.store(buffer, offset, value, width)
    assert buffer == data[:offset] + value.to_bytes(width, "little") + data[offset + width :]


@given(st.lists(st.integers(0, 255)), st.sampled_from([1, 2, 4, 8]))
def test_many(values: list[int], width: int) -> None:
    values = [value << (8 * (width - 1)) for value in values]
    buffer = bytearray(len(values) * width + 3)
    _fast.store_many(buffer, 3, values, width)
    assert _fast.load_many(buffer, 3, len(values), width) == values
    assert buffer[:3] == bytes(3)


@given(st.binary(max_size=200), st.binary(min_size=1, max_size=3), st.integers(1, 8))
def test_find(data: bytes, needle: bytes, align: int) -> None:
    wanted = [at for at in range(0, len(data), align) if data[at : at + len(needle)] == needle]
    assert _fast.find(data, needle, align=align) == (wanted[0] if wanted else -1)
    assert _fast.find_all(data, needle, align=align) == wanted
    assert _fast.find_all(data, needle, align=align, limit=1) == wanted[:1]


@given(st.binary(max_size=100))
def test_sums(data: bytes) -> None:
    assert _fast.sum8(data) == sum(data) % 256
    padded = data + b"\0" * (len(data) % 2)
    total = sum(int.from_bytes(padded[i : i + 2], "big") for i in range(0, len(padded), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert _fast.internet_checksum(data) == total ^ 0xFFFF
    assert _fast.is_zero(data) == (not any(data))


@given(st.binary(min_size=1, max_size=100), st.data())
def test_hash_and_difference(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    other = bytearray(data)
    other[at] ^= draw.draw(st.integers(1, 255))
    assert _fast.fnv1a(data) == _fast.fnv1a(bytearray(data))
    assert _fast.fnv1a(data) != _fast.fnv1a(other)
    assert _fast.first_difference(data, other) == at
    assert _fast.first_difference(data, bytearray(data)) == -1


def test_fill_and_pages() -> None:
    buffer = bytearray(3 * 4096 + 10)
    _fast.fill(buffer, 4096, 2, 0xAA)
    assert buffer[4095:4099] == b"\0\xaa\xaa\0"
    _fast.fill(buffer, 3 * 4096, None, 1)
    assert _fast.nonzero_pages(buffer) == [1, 3]
    assert _fast.c_string(b"abc\0def", 1) == b"bc"
    assert _fast.c_string(b"abc", 0, 2) == b"ab"
    assert _fast.c_string(b"abc", 1) == b"bc"


@pytest.mark.parametrize(
    "call",
    [
        lambda b: _fast.load(b, 9, 8),
        lambda b: _fast.load(b, -1, 1),
        lambda b: _fast.store(b, 16, 0, 1),
        lambda b: _fast.load_many(b, 0, 3, 8),
        lambda b: _fast.load_many(b, 0, 1 << 61, 8),
        lambda b: _fast.load_many(b, 0, -1, 8),
        lambda b: _fast.store_many(b, 12, [1, 2], 4),
        lambda b: _fast.fill(b, 10, 7),
        lambda b: _fast.fill(b, 0, -1),
        lambda b: _fast.find(b, b"a", 3, 17),
        lambda b: _fast.find(b, b"a", -3),
        lambda b: _fast.sum8(b, 17),
        lambda b: _fast.c_string(b, 17),
    ],
)
def test_out_of_bounds(call: object) -> None:
    buffer = bytearray(range(16))
    with pytest.raises(IndexError):
        call(buffer)  # type: ignore[operator]
    assert buffer == bytearray(range(16))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda b: _fast.load(b, 0, 3), ValueError),
        (lambda b: _fast.store(b, 0, 256, 1), OverflowError),
        (lambda b: _fast.store(b, 0, -1, 8), OverflowError),
        (lambda b: _fast.store_many(b, 0, [1, 256], 1), OverflowError),
        (lambda b: _fast.fill(b, 0, 1, 256), OverflowError),
        (lambda b: _fast.find(b, b""), ValueError),
        (lambda b: _fast.find(b, b"x", align=0), ValueError),
        (lambda b: _fast.first_difference(b, b"x"), ValueError),
        (lambda b: _fast.nonzero_pages(b, 0), ValueError),
        (lambda b: _fast.store(bytes(b), 0, 1, 1), BufferError),
    ],
)
def test_bad_arguments(call: object, error: type[Exception]) -> None:
    buffer = bytearray(16)
    with pytest.raises(error):
        call(buffer)  # type: ignore[operator]
    assert not any(buffer)
