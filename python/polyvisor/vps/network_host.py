"""The host's network with only chosen addresses, as Linux-VServer's network contexts had it.

The VPS stays in the host's network namespace. Programs of BPF on its directory in the cgroup v2
tree see every socket that its processes make, whatever user they are, and go with that directory:

- bind: to the unspecified address or to loopback becomes the first chosen address of that family;
  to another address that is not a chosen one fails with EPERM.
- connect, sendmsg: loopback becomes the first chosen address; a socket that is not bound gets that
  as its source.
- Each packet of IPv4 or IPv6 that such a socket sends must come from a chosen address, and each
  that it receives go to one, however the socket was made; others are dropped.

Documentation: bpf(2), BPF_PROG_TYPE_CGROUP_SOCK_ADDR and _CGROUP_SKB; linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import platform
import socket
import struct

from polyvisor.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_NR_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
_PROG_LOAD, _PROG_ATTACH = 5, 8
_CGROUP_SKB, _CGROUP_SOCK_ADDR = 8, 18
_INGRESS, _EGRESS = 0, 1
#: Attach types by the family's length in 32-bit words.
_BIND = {1: 8, 4: 9}
_CONNECT = {1: 10, 4: 11}
_SENDMSG = {1: 14, 4: 15}

# struct bpf_sock_addr, struct __sk_buff; the headers' source and destination.
_USER_ADDRESS = {1: 4, 4: 8}
_SOURCE_ADDRESS = {1: 40, 4: 44}
_SKB_PROTOCOL = 16
_ETHER_TYPE = {1: 0x0800, 4: 0x86DD}
_PACKET_SOURCE = {1: 12, 4: 8}
_PACKET_TARGET = {1: 16, 4: 24}
_FAMILY = {1: socket.AF_INET, 4: socket.AF_INET6}
_SOCKADDR_ADDRESS = {1: 4, 4: 8}
_SOCKADDR_SIZE = {1: 16, 4: 28}

_SKB_LOAD_BYTES, _BIND_SOURCE = 26, 64  # helpers

# Operation codes: Documentation/bpf/standardization/instruction-set.rst
_MOVE, _MOVE_REGISTER, _ADD = 0xB7, 0xBF, 0x07
_LOAD, _STORE, _STORE_VALUE, _LOAD_HALF = 0x61, 0x63, 0x62, 0x69
_CALL, _EXIT, _JUMP = 0x85, 0x95, 0x05
_JUMP_DIFFERENT, _AND = 0x56, 0x54  # the lower 32 bits
_CTX, _FP = 6, 10  # where the context is kept; the frame


class _Program:
    """Instructions, with jumps to labels that are resolved by bytes()."""

    def __init__(self) -> None:
        self.code: list[tuple[int, int, int, int | str, int]] = []
        self.labels: dict[str, int] = {}
        self.emit(_MOVE_REGISTER, _CTX, 1)

    def emit(
        self, code: int, to: int = 0, source: int = 0, offset: int | str = 0, value: int = 0
    ) -> None:
        self.code.append((code, to, source, offset, value))

    def label(self, name: str) -> None:
        self.labels[name] = len(self.code)

    def fresh(self) -> str:
        return f".{len(self.code)}"

    def ends(self, verdict: int) -> None:
        self.emit(_MOVE, 0, value=verdict)
        self.emit(_EXIT)

    def equal_or(self, words: Sequence[int], base: int, offset: int, other: str) -> None:
        """Goes on if the words at `base` + `offset` are these, else at `other`."""
        for index, word in enumerate(words):
            self.emit(_LOAD, 2, base, offset + 4 * index)
            self.emit(_JUMP_DIFFERENT, 2, 0, other, word)

    def store(self, words: Sequence[int], offset: int) -> None:
        """These words into the context."""
        for index, word in enumerate(words):
            self.emit(_MOVE, 2, value=word)
            self.emit(_STORE, _CTX, 2, offset + 4 * index)

    def __bytes__(self) -> bytes:
        packed = b""
        for at, (code, to, source, offset, value) in enumerate(self.code):
            jump = self.labels[offset] - at - 1 if isinstance(offset, str) else offset
            signed = value - (1 << 32) if value >= 1 << 31 else value
            packed += struct.pack("=BBhi", code, to | source << 4, jump, signed)
        return packed


def confine(cgroup: str | None, addresses: Sequence[str]) -> None:
    """Leaves what is in the cgroup v2 directory `cgroup` only these `addresses` of the host.

    Raises:
        ConfigError: an address is none of the host's.
        HostError: no cgroup v2 tree, no BPF for cgroups in the kernel, or not root.
    """
    for address in addresses:
        _check_own(address)
    if cgroup is None:
        raise HostError(
            "network mode 'host' needs the cgroup v2 tree, whose programs hold a VPS to its "
            "addresses; mount it (mount -t cgroup2 none /sys/fs/cgroup/unified)",
            errno=0,
            path="cgroup2",
        )
    chosen: dict[int, list[tuple[int, ...]]] = {1: [], 4: []}
    for address in addresses:
        packed = ipaddress.ip_address(address).packed
        words = struct.unpack(f"={len(packed) // 4}I", packed)
        chosen[len(words)].append(words)
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for kind, attach, program in _programs(chosen):
            _attach(directory, kind, attach, bytes(program))
    finally:
        os.close(directory)


def _programs(
    chosen: dict[int, list[tuple[int, ...]]],
) -> Iterator[tuple[int, int, _Program]]:
    for size, own in chosen.items():
        yield _CGROUP_SOCK_ADDR, _BIND[size], _bind(size, own)
        yield _CGROUP_SOCK_ADDR, _CONNECT[size], _connect(size, own, from_first=_bind_source)
        yield _CGROUP_SOCK_ADDR, _SENDMSG[size], _connect(size, own, from_first=_set_source)
    yield _CGROUP_SKB, _EGRESS, _filter(chosen, _PACKET_SOURCE)
    yield _CGROUP_SKB, _INGRESS, _filter(chosen, _PACKET_TARGET)


def _bind(size: int, own: list[tuple[int, ...]]) -> _Program:
    program = _Program()
    if own:
        for words in own:
            other = program.fresh()
            program.equal_or(words, _CTX, _USER_ADDRESS[size], other)
            program.ends(1)
            program.label(other)
        _here_becomes(program, size, own[0])
    program.ends(0)
    return program


def _connect(
    size: int,
    own: list[tuple[int, ...]],
    from_first: Callable[[_Program, int, tuple[int, ...]], None],
) -> _Program:
    program = _Program()
    if own:
        from_first(program, size, own[0])
        _here_becomes(program, size, own[0])
    program.ends(1 if own else 0)  # every instruction must be reachable
    return program


def _here_becomes(program: _Program, size: int, first: tuple[int, ...]) -> None:
    """An address of this host that is meant for "here" becomes `first`, and is let through."""
    at = _USER_ADDRESS[size]
    places: list[tuple[int, ...]] = [(0,) * size]
    if size == 4:
        places.append(struct.unpack("=4I", socket.inet_pton(socket.AF_INET6, "::1")))
    for words in places:
        other = program.fresh()
        program.equal_or(words, _CTX, at, other)
        program.store(first, at)
        program.ends(1)
        program.label(other)
    if size == 1:
        other = program.fresh()
        program.emit(_LOAD, 2, _CTX, at)
        program.emit(_AND, 2, value=socket.htonl(0xFF000000))
        program.emit(_JUMP_DIFFERENT, 2, 0, other, socket.htonl(0x7F000000))
        program.store(first, at)
        program.ends(1)
        program.label(other)


def _bind_source(program: _Program, size: int, first: tuple[int, ...]) -> None:
    """bpf_bind() to `first`, any port; what is bound already stays so, which is no matter."""
    length = _SOCKADDR_SIZE[size]
    frame = -((length + 7) // 8 * 8)
    for offset in range(frame, 0, 4):
        program.emit(_STORE_VALUE, _FP, 0, offset, 0)
    (family,) = struct.unpack("=I", struct.pack("=HH", _FAMILY[size], 0))
    program.emit(_STORE_VALUE, _FP, 0, frame, family)
    for index, word in enumerate(first):
        program.emit(_STORE_VALUE, _FP, 0, frame + _SOCKADDR_ADDRESS[size] + 4 * index, word)
    program.emit(_MOVE_REGISTER, 1, _CTX)
    program.emit(_MOVE_REGISTER, 2, _FP)
    program.emit(_ADD, 2, value=frame)
    program.emit(_MOVE, 3, value=length)
    program.emit(_CALL, value=_BIND_SOURCE)


def _set_source(program: _Program, size: int, first: tuple[int, ...]) -> None:
    bound = program.fresh()
    program.equal_or((0,) * size, _CTX, _SOURCE_ADDRESS[size], bound)
    program.store(first, _SOURCE_ADDRESS[size])
    program.label(bound)


def _filter(chosen: dict[int, list[tuple[int, ...]]], where: dict[int, int]) -> _Program:
    program = _Program()
    frame = -16
    for size, own in chosen.items():
        next_family = f"not {size}"
        program.emit(_LOAD, 2, _CTX, _SKB_PROTOCOL)
        program.emit(_JUMP_DIFFERENT, 2, 0, next_family, socket.htons(_ETHER_TYPE[size]))
        for offset in range(frame, 0, 4):
            program.emit(_STORE_VALUE, _FP, 0, offset, 0)
        program.emit(_MOVE_REGISTER, 1, _CTX)
        program.emit(_MOVE, 2, value=where[size])
        program.emit(_MOVE_REGISTER, 3, _FP)
        program.emit(_ADD, 3, value=frame)
        program.emit(_MOVE, 4, value=4 * size)
        program.emit(_CALL, value=_SKB_LOAD_BYTES)
        for words in own:
            other = program.fresh()
            program.equal_or(words, _FP, frame, other)
            program.ends(1)
            program.label(other)
        program.ends(0)
        program.label(next_family)
    program.ends(0)
    return program


def _check_own(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ConfigError(
                f"{address} is none of this host's addresses ({error.strerror}); add it to an "
                "interface, or choose one that is there",
                field="addresses",
            ) from None


def _attach(directory: int, kind: int, attach: int, code: bytes) -> None:
    instructions = ctypes.create_string_buffer(code, len(code))
    # bpf_bind() and friends are for all; the text is what the kernel asks for.
    text = ctypes.create_string_buffer(b"Apache-2.0")
    load = bytearray(128)
    pointers = ctypes.addressof(instructions), ctypes.addressof(text)
    struct.pack_into("=IIQQ", load, 0, kind, len(code) // 8, *pointers)
    struct.pack_into("=I", load, 68, attach)
    program = _bpf(_PROG_LOAD, load)
    try:
        _bpf(_PROG_ATTACH, bytearray(struct.pack("=IIII", directory, program, attach, 0)))
    finally:
        os.close(program)


def _bpf(command: int, attributes: bytearray) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    block = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    result: int = libc.syscall(
        ctypes.c_long(_NR_BPF[platform.machine()]), command, block, len(attributes)
    )
    if result < 0:
        code = ctypes.get_errno()
        raise HostError(
            f"bpf() failed ({os.strerror(code)}); network mode 'host' needs root and a kernel with "
            "CONFIG_CGROUP_BPF",
            errno=code,
            path="bpf",
        )
    return result
