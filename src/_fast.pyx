# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: embedsignature=False, freethreading_compatible=False
"""Bulk access to guest memory from Python, on anything that has the buffer protocol.

Offsets are into the buffer (a `polyvisor.memory` region or view), integers are little-endian as the
guest's. Aligned loads and stores of 1, 2, 4 and 8 bytes are single accesses of the host, so a running
guest never sees half of one. Stores through a buffer are not reported to the engine: see
`Memory.note_write`.
"""

from cpython.buffer cimport (PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset

cdef extern from *:
    """
    #include <cstdint>
    #include <cstring>
    // Unaligned ones go through memcpy, which is the same instruction on x86-64.
    template <class T> static inline T pv_load(const void* at) {
        T value;
        if (reinterpret_cast<std::uintptr_t>(at) % sizeof(T) == 0)
            return __atomic_load_n(static_cast<const T*>(at), __ATOMIC_ACQUIRE);
        std::memcpy(&value, at, sizeof value);
        return value;
    }
    template <class T> static inline void pv_store(void* at, T value) {
        if (reinterpret_cast<std::uintptr_t>(at) % sizeof(T) == 0)
            __atomic_store_n(static_cast<T*>(at), value, __ATOMIC_RELEASE);
        else
            std::memcpy(at, &value, sizeof value);
    }
    static inline bool pv_is_zero(const unsigned char* at, std::size_t size) {
        return size == 0 || (at[0] == 0 && std::memcmp(at, at + 1, size - 1) == 0);
    }
    """
    T pv_load[T](const void* at) nogil
    void pv_store[T](void* at, T value) nogil
    bint pv_is_zero(const unsigned char* at, size_t size) nogil
    void* memmem(const void* haystack, size_t size, const void* needle, size_t length) nogil



cdef class _View:
    """A buffer, held while this lives."""
    cdef Py_buffer buffer
    cdef bint held

    def __cinit__(self, object source, bint writable):
        self.held = False
        PyObject_GetBuffer(source, &self.buffer, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.buffer)

    cdef unsigned char* at(self, Py_ssize_t offset, Py_ssize_t size) except NULL:
        if offset < 0 or size < 0 or offset > self.buffer.len or size > self.buffer.len - offset:
            raise IndexError(
                f"bytes {offset:#x}+{size:#x} are outside of a buffer of {self.buffer.len:#x} bytes")
        return <unsigned char*>self.buffer.buf + offset


cdef inline Py_ssize_t _rest(_View view, Py_ssize_t offset, object size) except -1:
    if size is not None:
        if size < 0:
            raise IndexError(f"a size cannot be negative: {size}")
        return size
    if offset < 0 or offset > view.buffer.len:
        raise IndexError(
            f"offset {offset:#x} is outside of a buffer of {view.buffer.len:#x} bytes")
    return view.buffer.len - offset


cdef object _width(int width):
    return ValueError(f"a width must be 1, 2, 4 or 8 bytes, not {width}")


def load(object buffer, Py_ssize_t offset, int width=8):
    """The unsigned integer of `width` bytes (1, 2, 4 or 8) at `offset`."""
    cdef _View view = _View(buffer, False)
    if width == 8:
        return pv_load[uint64_t](view.at(offset, 8))
    if width == 4:
        return pv_load[uint32_t](view.at(offset, 4))
    if width == 2:
        return pv_load[uint16_t](view.at(offset, 2))
    if width == 1:
        return pv_load[uint8_t](view.at(offset, 1))
    raise _width(width)


def store(object buffer, Py_ssize_t offset, object value, int width=8):
    """Stores an unsigned integer of `width` bytes; OverflowError when it does not fit."""
    cdef _View view = _View(buffer, True)
    if width == 8:
        pv_store[uint64_t](view.at(offset, 8), <uint64_t>value)
    elif width == 4:
        pv_store[uint32_t](view.at(offset, 4), <uint32_t>value)
    elif width == 2:
        pv_store[uint16_t](view.at(offset, 2), <uint16_t>value)
    elif width == 1:
        pv_store[uint8_t](view.at(offset, 1), <uint8_t>value)
    else:
        raise _width(width)


cdef list _load_list(_View view, Py_ssize_t offset, Py_ssize_t count, int width):
    cdef unsigned char* at = view.at(offset, count * width)
    cdef Py_ssize_t i
    if width == 8:
        return [pv_load[uint64_t](at + 8 * i) for i in range(count)]
    if width == 4:
        return [pv_load[uint32_t](at + 4 * i) for i in range(count)]
    if width == 2:
        return [pv_load[uint16_t](at + 2 * i) for i in range(count)]
    return [at[i] for i in range(count)]


def load_many(object buffer, Py_ssize_t offset, Py_ssize_t count, int width=8):
    """`count` unsigned integers of `width` bytes each, as a list."""
    cdef _View view = _View(buffer, False)
    if width not in (1, 2, 4, 8):
        raise _width(width)
    if count < 0 or count > view.buffer.len:
        raise IndexError(f"{count} values are outside of a buffer of {view.buffer.len:#x} bytes")
    return _load_list(view, offset, count, width)


def store_many(object buffer, Py_ssize_t offset, object values, int width=8):
    """Stores the integers of a sequence, `width` bytes each. All of them are checked first."""
    cdef _View view = _View(buffer, True)
    cdef list numbers = list(values)
    cdef Py_ssize_t count = len(numbers), i
    cdef uint64_t value, limit
    if width not in (1, 2, 4, 8):
        raise _width(width)
    cdef unsigned char* at = view.at(offset, count * width)
    limit = (<uint64_t>-1) if width == 8 else ((<uint64_t>1) << (8 * width)) - 1
    for number in numbers:
        value = <uint64_t>number
        if value > limit:
            raise OverflowError(f"{number} does not fit {width} bytes")
    for i in range(count):
        value = <uint64_t>numbers[i]
        if width == 8:
            pv_store[uint64_t](at + 8 * i, value)
        elif width == 4:
            pv_store[uint32_t](at + 4 * i, <uint32_t>value)
        elif width == 2:
            pv_store[uint16_t](at + 2 * i, <uint16_t>value)
        else:
            at[i] = <uint8_t>value


def fill(object buffer, Py_ssize_t offset=0, object size=None, int value=0):
    """Sets `size` bytes (None: to the end) to `value`."""
    cdef _View view = _View(buffer, True)
    cdef Py_ssize_t length = _rest(view, offset, size)
    cdef unsigned char* at = view.at(offset, length)
    if not 0 <= value <= 255:
        raise OverflowError(f"{value} is not a byte")
    with nogil:
        memset(at, value, length)


def find(object buffer, object needle, Py_ssize_t start=0, object end=None, Py_ssize_t align=1):
    """The offset of the first occurrence of the bytes `needle` in [start, end) that is a multiple of
    `align`; -1 when there is none."""
    cdef _View view = _View(buffer, False), wanted = _View(needle, False)
    cdef Py_ssize_t stop = view.buffer.len if end is None else end
    if align < 1:
        raise ValueError(f"an alignment must be at least 1, not {align}")
    if start < 0 or stop > view.buffer.len or start > stop:
        raise IndexError(
            f"[{start:#x}, {stop:#x}) is outside of a buffer of {view.buffer.len:#x} bytes")
    cdef Py_ssize_t length = wanted.buffer.len
    if length == 0:
        raise ValueError("cannot look for nothing")
    cdef unsigned char* base = <unsigned char*>view.buffer.buf
    cdef unsigned char* hit
    cdef Py_ssize_t at = start, found = -1
    with nogil:
        if align == 1:
            hit = <unsigned char*>memmem(base + at, stop - at, wanted.buffer.buf, length)
            if hit != NULL:
                found = hit - base
        else:
            at = (at + align - 1) // align * align
            while at + length <= stop:
                if memcmp(base + at, wanted.buffer.buf, length) == 0:
                    found = at
                    break
                at += align
    return found


def find_all(object buffer, object needle, Py_ssize_t start=0, object end=None,
             Py_ssize_t align=1, Py_ssize_t limit=1000):
    """The offsets of up to `limit` occurrences, which may overlap; see `find`."""
    cdef list found = []
    cdef Py_ssize_t at = start
    cdef Py_ssize_t stop
    if end is None:
        with memoryview(buffer) as view:
            stop = view.nbytes
    else:
        stop = end
    while len(found) < limit:
        at = find(buffer, needle, at, stop, align)
        if at < 0:
            break
        found.append(at)
        at += 1
    return found


def sum8(object buffer, Py_ssize_t offset=0, object size=None):
    """The sum of the bytes modulo 256; 0 for an intact ACPI table."""
    cdef _View view = _View(buffer, False)
    cdef Py_ssize_t length = _rest(view, offset, size), i
    cdef unsigned char* at = view.at(offset, length)
    cdef unsigned char total = 0
    with nogil:
        for i in range(length):
            total = <unsigned char>(total + at[i])
    return total


def internet_checksum(object buffer, Py_ssize_t offset=0, object size=None):
    """The ones' complement checksum of RFC 1071, as IP and TCP use it."""
    cdef _View view = _View(buffer, False)
    cdef Py_ssize_t length = _rest(view, offset, size), i
    cdef unsigned char* at = view.at(offset, length)
    cdef uint64_t total = 0
    with nogil:
        for i in range(0, length - 1, 2):
            total += (<uint64_t>at[i] << 8) | at[i + 1]
        if length % 2:
            total += <uint64_t>at[length - 1] << 8
        while total >> 16:
            total = (total & 0xffff) + (total >> 16)
    return <uint16_t>(~total)


def fnv1a(object buffer, Py_ssize_t offset=0, object size=None):
    """A 64-bit FNV-1a hash over 8-byte words and the rest's bytes: equal memory, equal hash. Not
    for anything that an adversary chooses."""
    cdef _View view = _View(buffer, False)
    cdef Py_ssize_t length = _rest(view, offset, size), i = 0
    cdef unsigned char* at = view.at(offset, length)
    cdef uint64_t value = <uint64_t>0xcbf29ce484222325, word
    with nogil:
        while i + 8 <= length:
            memcpy(&word, at + i, 8)
            value = (value ^ word) * <uint64_t>0x100000001b3
            value = value ^ (value >> 32)
            i += 8
        while i < length:
            value = (value ^ at[i]) * <uint64_t>0x100000001b3
            i += 1
    return value


def is_zero(object buffer, Py_ssize_t offset=0, object size=None):
    """Whether all bytes are zero."""
    cdef _View view = _View(buffer, False)
    cdef Py_ssize_t length = _rest(view, offset, size)
    cdef unsigned char* at = view.at(offset, length)
    cdef bint result
    with nogil:
        result = pv_is_zero(at, length)
    return result


def nonzero_pages(object buffer, Py_ssize_t page=4096):
    """The numbers of the pages that hold anything but zeros. (Looking at untouched guest memory
    makes the host provide it: ask only where data is expected.)"""
    cdef _View view = _View(buffer, False)
    if page < 1:
        raise ValueError(f"a page has at least one byte, not {page}")
    cdef unsigned char* base = <unsigned char*>view.buffer.buf
    cdef Py_ssize_t length = view.buffer.len, at = 0, n = 0
    cdef list result = []
    while at < length:
        if not pv_is_zero(base + at, min(page, length - at)):
            result.append(n)
        at += page
        n += 1
    return result


def first_difference(object one, object other):
    """The first offset at which two buffers of the same size differ; -1 when they do not."""
    cdef _View a = _View(one, False), b = _View(other, False)
    if a.buffer.len != b.buffer.len:
        raise ValueError(f"buffers of {a.buffer.len} and {b.buffer.len} bytes cannot be compared")
    cdef unsigned char* p = <unsigned char*>a.buffer.buf
    cdef unsigned char* q = <unsigned char*>b.buffer.buf
    cdef Py_ssize_t length = a.buffer.len, at = 0, chunk, result = -1
    with nogil:
        while at < length:
            chunk = length - at if length - at < 4096 else 4096
            if memcmp(p + at, q + at, chunk) != 0:
                while p[at] == q[at]:
                    at += 1
                result = at
                break
            at += chunk
    return result


def c_string(object buffer, Py_ssize_t offset, Py_ssize_t limit=4096):
    """The bytes from `offset` up to, not including, the first zero byte, at most `limit`."""
    cdef _View view = _View(buffer, False)
    cdef Py_ssize_t length = _rest(view, offset, None)
    if limit < 0:
        raise ValueError(f"a limit cannot be negative: {limit}")
    if length > limit:
        length = limit
    cdef char* at = <char*>view.at(offset, length)
    cdef char* end = <char*>memchr(at, 0, length)
    return PyBytes_FromStringAndSize(at, length if end == NULL else end - at)
