"""A virtual machine of KVM that never runs: its page walker answers KVM_TRANSLATE.

What is compared with native/mmu is the walker that KVM emulates instructions with. It is told of
the guest's processor by CPUID, and sets accessed bits as a read does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from fcntl import ioctl
from typing import Self

_CREATE_VM = 0xAE01
_GET_SUPPORTED_CPUID = 0xC008AE05
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_TRANSLATE = 0xC018AE85
_SET_CPUID2 = 0x4008AE90
_SREGS_BYTES = 312
#: Offset of CR0, CR2, CR3, CR4, CR8, EFER in struct kvm_sregs.
_CONTROL = 8 * 24 + 2 * 16


class Vm:
    """Memory at guest-physical addresses, and one vCPU."""

    def __init__(self, regions: dict[int, int], maxphyaddr: int) -> None:
        self._fds: list[int] = []
        self.memory: dict[int, mmap.mmap] = {}
        try:
            self._make(regions, maxphyaddr)
        except BaseException:
            self.close()
            raise

    def _make(self, regions: dict[int, int], maxphyaddr: int) -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self._fds.append(kvm)
        vm = ioctl(kvm, _CREATE_VM, 0)
        self._fds.append(vm)
        for slot, (start, size) in enumerate(regions.items()):
            area = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.memory[start] = area
            anchor = ctypes.c_char.from_buffer(area)
            host = ctypes.addressof(anchor)
            del anchor  # it would keep the area from being closed
            ioctl(vm, _SET_USER_MEMORY_REGION, struct.pack("IIQQQ", slot, 0, start, size, host))
        self.vcpu = ioctl(vm, _CREATE_VCPU, 0)
        self._fds.append(self.vcpu)
        self._set_cpuid(kvm, maxphyaddr)
        sregs = bytearray(_SREGS_BYTES)
        ioctl(self.vcpu, _GET_SREGS, sregs)
        self._reset_sregs = bytes(sregs)

    def _set_cpuid(self, kvm: int, maxphyaddr: int) -> None:
        """The host's, but Intel's, whose rules for reserved bits are asked for: AMD has one more
        (bit 8 of a PML4E)."""
        room = 256
        cpuid = bytearray(8 + 40 * room)
        struct.pack_into("II", cpuid, 0, room, 0)
        ioctl(kvm, _GET_SUPPORTED_CPUID, cpuid)
        (count,) = struct.unpack_from("I", cpuid)
        self.features: set[str] = set()
        for at in range(8, 8 + 40 * count, 40):
            function, index, flags, a, b, c, d = struct.unpack_from("7I", cpuid, at)
            if function == 0:
                b, d, c = struct.unpack("3I", b"GenuineIntel")
            elif function == 1:
                self.features |= {"pse36"} if d >> 17 & 1 else set()
            elif function == 7 and index == 0:
                self.features |= {"smep"} if b >> 7 & 1 else set()
                self.features |= {"smap"} if b >> 20 & 1 else set()
                self.features |= {"la57"} if c >> 16 & 1 else set()
            elif function == 0x80000001:
                self.features |= {"1gb"} if d >> 26 & 1 else set()
                self.features |= {"nx"} if d >> 20 & 1 else set()
                self.features |= {"long"} if d >> 29 & 1 else set()
            elif function == 0x80000008:
                a = a & ~0xFF | maxphyaddr
            struct.pack_into("7I", cpuid, at, function, index, flags, a, b, c, d)
        ioctl(self.vcpu, _SET_CPUID2, cpuid)

    def set_registers(self, cr0: int, cr3: int, cr4: int, efer: int) -> bool:
        """Whether KVM has them now: some (PVM) have no paging outside of long mode, and say so by
        leaving CR0.PG clear."""
        sregs = bytearray(self._reset_sregs)
        struct.pack_into("QQQQQQ", sregs, _CONTROL, cr0, 0, cr3, cr4, 0, efer)
        ioctl(self.vcpu, _SET_SREGS, bytes(sregs))
        ioctl(self.vcpu, _GET_SREGS, sregs)
        now = struct.unpack_from("QQQQQQ", sregs, _CONTROL)
        return bool(now[0] >> 31 & 1) == bool(cr0 >> 31 & 1)

    def translate(self, gva: int) -> int | None:
        """The guest-physical address that a supervisor reads from, if it may."""
        answer = ioctl(self.vcpu, _TRANSLATE, struct.pack("QQ8x", gva, 0))
        physical, valid = struct.unpack("8xQB7x", answer)
        return physical if valid else None

    def close(self) -> None:
        for fd in reversed(self._fds):
            os.close(fd)
        self._fds.clear()
        for area in self.memory.values():
            area.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
