"""virtio-balloon: takes memory from a guest that it can do without (virtio 1.2, 5.5)."""

from __future__ import annotations

import struct
import sys
import threading
from array import array

from polyvisor.config import parse_size
from polyvisor.errors import ConfigError, HostError, MemoryRangeError
from polyvisor.virtio.base import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyvisor._ring import Chain, Queue

_PAGE = 4096
_F_STATS, _F_DEFLATE_ON_OOM, _F_REPORTING = 1 << 1, 1 << 2, 1 << 5
_ACTUAL = 4  # its place in the configuration space
#: Pages of one request that are looked at; Linux sends 256.
_MOST = 1 << 16

#: What the guest tells, by tag (virtio 1.2, 5.5.6.3).
_STATISTICS = (
    "swapped_in", "swapped_out", "major_faults", "minor_faults", "free", "total", "available",
    "caches", "huge_page_allocations", "huge_page_failures", "oom_kills", "allocation_stalls",
    "async_scans", "direct_scans", "async_reclaims", "direct_reclaims",
)  # fmt: skip
_ENTRY = struct.Struct("<HQ")


def ranges(pages: array[int]) -> Iterator[tuple[int, int]]:
    """(start, size) in bytes of adjacent pages joined, in the order of addresses."""
    first, last = -1, -2
    for page in sorted(pages):
        if page == last + 1:
            last = page
            continue
        if page == last:
            continue
        if first >= 0:
            yield first * _PAGE, (last + 1 - first) * _PAGE
        first = last = page
    if first >= 0:
        yield first * _PAGE, (last + 1 - first) * _PAGE


class Balloon(VirtioDevice):
    """A memory balloon: what is in it, the guest does not use and the host has back.

    `target` is how many bytes it should have; the guest's driver sees to it as fast as it can. With
    `deflate_on_oom` the guest takes from it what it cannot do without. With `free_page_reporting`
    the guest also tells of memory that it has no use for at the moment, whatever the target. Both
    are the driver's choice. `interval` is how often, in seconds, `statistics` are renewed by
    themselves; None: when they are asked for.
    """

    device_type = 5
    name = "virtio-balloon"
    queue_sizes = (128, 128, 64, 128)
    config = bytes(16)
    writable_config = ((_ACTUAL, 4),)
    pci_class = 0x00FF00

    def __init__(
        self,
        target: int | str = 0,
        *,
        deflate_on_oom: bool = True,
        free_page_reporting: bool = True,
        interval: float | None = None,
    ) -> None:
        if interval is not None and interval <= 0:
            raise ConfigError(
                f"statistics cannot be renewed every {interval:g} s", field="interval"
            )
        self.features = _F_STATS
        self.features |= _F_DEFLATE_ON_OOM if deflate_on_oom else 0
        self.features |= _F_REPORTING if free_page_reporting else 0
        self._target = _bytes(target)
        self.config = struct.pack("<I12x", self._target // _PAGE)
        self.interval = interval
        #: Bytes that the host got back: of the balloon, and that were reported as free.
        self.inflated_bytes = 0
        self.reported_bytes = 0
        self._statistics: dict[str, int] = {}
        self._news = threading.Condition()
        self._count = 0
        self._stopping = threading.Event()
        self._poller: threading.Thread | None = None

    # --- For the host ----------------------------------------------------------------------------

    @property
    def target(self) -> int:
        """How large it should be, in bytes; sizes as text ("64M") can be set too."""
        return self._target

    @target.setter
    def target(self, size: int | str) -> None:
        self._target = _bytes(size)
        pages = struct.pack("<I", self._target // _PAGE)
        if self.port is None:
            self.config = pages + self.config[4:]
        else:
            self.set_config(0, pages)

    @property
    def actual(self) -> int:
        """How large the guest says it is, in bytes."""
        return int.from_bytes(self.read_config(_ACTUAL, 4), "little") * _PAGE

    def statistics(self, timeout: float = 1.0) -> dict[str, int]:
        """What the guest's kernel says of its memory, in bytes and events: "free", "available",
        "total", "caches", "major_faults"... Asks, unless it is asked at an `interval`, and waits up
        to `timeout` seconds; what it said last when no answer comes, {} when it never did."""
        seen = self._count
        # (Not with the lock: who has the queue may be waiting for it.)
        asked = self.interval is None and self.started and self._ask()
        with self._news:
            if asked:
                self._news.wait_for(lambda: self._count != seen, timeout)
            return dict(self._statistics)

    # --- Queues ----------------------------------------------------------------------------------

    def _role(self, index: int) -> str:
        """What a queue is for. Queues of features that the driver did not take do not exist, and
        the next moves up."""
        roles = ["inflate", "deflate"]
        features = self.driver_features
        roles += ["statistics"] if features & _F_STATS else []
        roles += ["report"] if features & _F_REPORTING else []
        return roles[index] if index < len(roles) else ""

    def serve(self, queue: Queue) -> None:
        role = self._role(queue.index)
        for chain in queue:
            if role == "statistics":
                self._note(chain.read(_ENTRY.size * 64))
                # The buffer waits here until the guest is asked again. It stays in the ring, so
                # that a snapshot has it.
                chain.unpop()
                return
            if role == "inflate":
                self.inflated_bytes += self._take(chain)
            elif role == "report":
                self.reported_bytes += self._take_reported(chain)
            chain.push(0)

    def _take(self, chain: Chain) -> int:
        pages = array("I", chain.read(min(chain.readable & ~3, 4 * _MOST)))
        if sys.byteorder != "little":
            pages.byteswap()
        return sum(self._discard(start, size) for start, size in ranges(pages))

    def _take_reported(self, chain: Chain) -> int:
        return sum(self._discard(start, size) for start, size in chain.write_ranges())

    def _discard(self, start: int, size: int) -> int:
        try:
            return self.memory.discard(start, size)
        except (MemoryRangeError, HostError):
            return 0  # there is no memory, or the host cannot: then nothing is gained

    # --- Statistics ------------------------------------------------------------------------------

    def _note(self, data: bytes) -> None:
        found = {}
        for tag, value in _ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size]):
            if tag < len(_STATISTICS):
                found[_STATISTICS[tag]] = value
        with self._news:
            self._statistics = found
            self._count += 1
            self._news.notify_all()

    def _ask(self) -> bool:
        """Gives the buffer back, which the driver then fills again."""
        if not self.driver_features & _F_STATS:
            return False
        with self.queue(2) as queue:
            chain = queue.pop()
            return chain is not None and chain.push(0)

    def _poll(self, stopping: threading.Event) -> None:
        while not stopping.wait(self.interval):
            self._ask()

    def start(self, features: int) -> None:
        if self.interval is not None and features & _F_STATS:
            self._stopping = threading.Event()
            self._poller = threading.Thread(
                target=self._poll, args=(self._stopping,), name="virtio-balloon", daemon=True
            )
            self._poller.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._poller is not None:
            self._poller.join()
            self._poller = None


def _bytes(size: int | str) -> int:
    """The size of a balloon: whole pages, of which there may be 2^32."""
    value = parse_size(size, "target") if size else 0
    if value >> 44:
        raise ConfigError(f"a balloon has less than 16 TiB, not {size}", field="target")
    return value & ~(_PAGE - 1)
