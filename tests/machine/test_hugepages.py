"""Huge pages behind the guest's memory: given, or refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from guestcode import end, real_mode

import polyvisor
from polyvisor.errors import ConfigError

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def free_pages() -> int:
    try:
        return int((POOL / "free_hugepages").read_text()) - int(
            (POOL / "resv_hugepages").read_text()
        )
    except OSError:
        return 0


def test_transparent_ones_are_a_wish(engine: str) -> None:
    with real_mode(end(3), engine=engine, memory="8M", hugepages="transparent") as machine:
        assert machine.run(timeout=10).status == 7


def test_none_of_that_kind() -> None:
    with pytest.raises(ConfigError, match="choose one of auto, none, transparent") as caught:
        polyvisor.Machine(memory="2M", hugepages="4K")
    assert caught.value.field == "hugepages"


@pytest.mark.parametrize(("memory", "kind"), [("3M", "2M"), ("512M", "1G")])
def test_memory_of_whole_pages(memory: str, kind: str) -> None:
    with pytest.raises(ConfigError, match="whole pages of") as caught:
        polyvisor.Machine(memory=memory, hugepages=kind)
    assert caught.value.field == "hugepages"


def test_a_pool_that_is_too_small() -> None:
    pages = free_pages()
    memory = (pages + 8) << 21
    with pytest.raises(ConfigError, match=r"hugepages|has no pages") as caught:
        polyvisor.Machine(memory=memory, engine="soft", hugepages="2M")
    assert caught.value.field == "hugepages"
    if POOL.is_dir():
        assert f"needs {pages + 8} pages of 2 MiB" in str(caught.value)
        assert f"{POOL}/nr_hugepages" in str(caught.value)


@pytest.mark.skipif(free_pages() < 4, reason="no free huge pages on this host")
def test_from_the_pool(engine: str) -> None:
    before = free_pages()
    with real_mode(end(3), engine=engine, memory="8M", hugepages="2M") as machine:
        assert free_pages() == before - 4
        assert machine.run(timeout=10).status == 7
    del machine
    assert free_pages() == before
