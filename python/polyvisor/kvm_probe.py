"""What this host's /dev/kvm is worth: whether it opens, and how fast it really runs ring 0.

There are hosts (containers, nested virtual machines) whose /dev/kvm works, but executes
every instruction of ring 0 in software. So a loop is timed in a guest.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import mmap
import os
import struct
import time
from dataclasses import dataclass

PATH = "/dev/kvm"

# Requests of Linux's KVM API (Linux: virt/kvm/api).
_GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_SET_TSS_ADDR = 0xAE47
_RUN = 0xAE80
_SET_REGS = 0x4090AE82
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_API_VERSION = 12
_EXIT_HLT = 5

_MEMORY = 1 << 16
_CODE = 0x1000
#: mov ecx, COUNT; loop: dec ecx; jnz loop; hlt, in 16-bit code with 32-bit operands.
_LOOP = b"\x66\xb9%s\x66\x49\x75\xfc\xf4"
_FIRST_COUNT = 2_000
_ENOUGH = 0.02  # seconds


@dataclass(frozen=True)
class Kvm:
    """What was found. `reason` is "" when it works, else a short key; `advice` is what to do."""

    reason: str
    sentence: str
    advice: str = ""
    api_version: int | None = None
    #: Million instructions per second of a loop at ring 0 in a guest.
    mips: float | None = None


def probe(*, measure: bool = True) -> Kvm:
    """Opens /dev/kvm, asks its version and (with `measure`) times a guest in it. Never raises."""
    try:
        device = os.open(PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return _cannot_open(error)
    try:
        version = fcntl.ioctl(device, _GET_API_VERSION, 0)
        if version != _API_VERSION:
            return Kvm(
                "version",
                f"{PATH} has API version {version}; only {_API_VERSION} is known",
                "use a Linux kernel of this century",
                version,
            )
        if not measure:
            return Kvm("", f"{PATH} opens, API version {version}", api_version=version)
        try:
            mips = _measure(device)
        except (OSError, ValueError) as error:
            return Kvm(
                "broken",
                f"{PATH} opens, but a guest does not run in it: {error}",
                "see the host's kernel log, and whether nested virtualization is on",
                version,
            )
        return Kvm("", f"{PATH} opens, API version {version}", api_version=version, mips=mips)
    except OSError as error:
        return Kvm("broken", f"{PATH} opens, but does not answer: {error.strerror}")
    finally:
        os.close(device)


def _cannot_open(error: OSError) -> Kvm:
    if error.errno == errno.ENOENT:
        return Kvm(
            "missing",
            f"there is no {PATH}",
            "turn virtualization on in the firmware (or nested virtualization in the hypervisor "
            "around this host), load kvm_intel or kvm_amd, or pass the device to the container",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        try:
            info = os.stat(PATH)
            group = grp.getgrgid(info.st_gid).gr_name
            advice = (
                f"join its group: sudo usermod -aG {group} $USER, and log in again"
                if info.st_mode & 0o060 == 0o060 and group != "root"
                else f"as root: chgrp kvm {PATH} && chmod 660 {PATH}"
            )
        except (OSError, KeyError):
            advice = f"ask for access to {PATH}"
        return Kvm("permission", f"{PATH} is there, but this user may not open it", advice)
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return Kvm(
            "missing",
            f"{PATH} is there, but no driver stands behind it",
            "load kvm_intel or kvm_amd, or turn virtualization on in the firmware",
        )
    return Kvm("broken", f"{PATH} cannot be opened: {error.strerror}")


def _measure(device: int) -> float:
    """Million instructions per second of a counting loop in a real-mode guest. Raises OSError."""
    opened: list[int] = []
    memory = mmap.mmap(-1, _MEMORY)
    run: mmap.mmap | None = None
    try:
        vm = fcntl.ioctl(device, _CREATE_VM, 0)
        opened.append(vm)
        fcntl.ioctl(vm, _SET_TSS_ADDR, 0x70000000)  # Intel needs three pages outside memory
        address = _address(memory)
        region = struct.pack("<IIQQQ", 0, 0, 0, _MEMORY, address)
        fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, region)
        vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
        opened.append(vcpu)
        run = mmap.mmap(vcpu, fcntl.ioctl(device, _GET_VCPU_MMAP_SIZE, 0))
        sregs = bytearray(312)
        fcntl.ioctl(vcpu, _GET_SREGS, sregs)
        struct.pack_into("<QIH", sregs, 0, 0, 0xFFFF, 0)  # CS: base, limit, selector
        fcntl.ioctl(vcpu, _SET_SREGS, bytes(sregs))

        def spin(count: int) -> float:
            code = _LOOP % struct.pack("<I", count)
            memory[_CODE : _CODE + len(code)] = code
            registers = struct.pack("<18Q", *[0] * 16, _CODE, 2)
            fcntl.ioctl(vcpu, _SET_REGS, registers)
            start = time.perf_counter()
            while True:
                try:
                    fcntl.ioctl(vcpu, _RUN, 0)
                except InterruptedError:
                    continue
                break
            assert run is not None
            reason = struct.unpack_from("<I", run, 8)[0]
            if reason != _EXIT_HLT:
                raise ValueError(f"it stopped for reason {reason} instead of HLT")
            return time.perf_counter() - start

        # Emulated and real ring 0 are a factor of a thousand apart: start short, and grow until it
        # takes long enough to be measured.
        count = _FIRST_COUNT
        while (seconds := spin(count)) < _ENOUGH:
            count *= 8
        return 2 * count / seconds / 1e6
    finally:
        if run is not None:
            run.close()
        for descriptor in reversed(opened):
            os.close(descriptor)
        memory.close()


def _address(memory: mmap.mmap) -> int:
    """Where a mapping is: KVM wants the number."""
    import ctypes

    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    try:
        return ctypes.addressof(view)
    finally:
        del view
