"""What this host's /dev/kvm is worth: whether it opens, and how fast it really runs ring 0.

There are hosts (containers, nested virtual machines) whose /dev/kvm works, but executes
every instruction of ring 0 in software. So a loop is timed in a guest.
"""

from __future__ import annotations

from dataclasses import dataclass

PATH = "/dev/kvm"
#: The version of the KVM API; there has been no other since 2007.
API_VERSION = 12


@dataclass(frozen=True)
class Kvm:
    """What was found. `reason` is "" when it works, else a key of `EngineUnavailable.reason`;
    `advice` is what to do."""

    reason: str
    sentence: str
    advice: str = ""
    api_version: int | None = None
    #: Million instructions per second of a loop at ring 0 in a guest.
    mips: float | None = None


def probe(*, measure: bool = True) -> Kvm:
    """Opens /dev/kvm, asks what it is and (with `measure`) times a guest in it. Never raises."""
    from polyvisor import _native
    from polyvisor.errors import Error

    try:
        reason, message, mips = _native.probe_kvm(PATH, measure)
    except Error as error:  # of the host: no memory, no file descriptors
        return Kvm("broken", f"{PATH} cannot be tried: {error}")
    if reason:
        sentence, _, advice = message.partition("; ")
        return Kvm(reason, sentence, advice)
    return Kvm(
        "",
        f"{PATH} opens, API version {API_VERSION}",
        api_version=API_VERSION,
        mips=mips if measure else None,
    )
