# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: embedsignature=False, binding=False
"""Virtqueues for devices that are written in Python (virtio 1.2, 2.6 to 2.8): see
polyvisor.virtio.base, which tells how to write one.

What a driver sends may be anything: sizes are checked here, and a chain that is too short reads and
writes less instead of raising. What raises is a mistake of the device's own.
"""

cimport cython
from cpython.buffer cimport (PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release,
                             PyObject_GetBuffer)
from cpython.bytes cimport (PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize,
                            PyBytes_GET_SIZE)
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport move

from polyvisor.errors import StateMismatch

cdef extern from "ring.hpp" nogil:
    """
    using polyvisor::GuestMemory;
    using polyvisor::python::Ring;
    using NativeBuffer = polyvisor::virtio::Buffer;
    using NativeChain = polyvisor::virtio::Chain;
    using SharedRing = std::shared_ptr<Ring>;
    // (The methods themselves take spans, which are nothing that Cython could make.)
    static inline polyvisor::u32 pv_read(const NativeChain& chain, polyvisor::u32 offset,
                                         char* into, std::size_t size) {
        return chain.read(offset, {reinterpret_cast<polyvisor::u8*>(into), size});
    }
    static inline polyvisor::u32 pv_write(const NativeChain& chain, polyvisor::u32 offset,
                                          const void* from, std::size_t size) {
        return chain.write(offset, {static_cast<const polyvisor::u8*>(from), size});
    }
    """
    cdef cppclass GuestMemory:
        pass
    cdef cppclass NativeBuffer:
        uint8_t* data
        uint32_t size
        uint64_t gpa
    cdef cppclass Buffers "std::span<const NativeBuffer>":
        size_t size()
        const NativeBuffer& operator[](size_t)
    cdef cppclass NativeChain:
        Buffers readable()
        Buffers writable()
        uint32_t readable_bytes()
        uint32_t writable_bytes()
    cdef cppclass NativeQueue "polyvisor::virtio::Queue":
        bool available()
    cdef cppclass Ring:
        unsigned index()
        const string& device()
        const shared_ptr[GuestMemory]& memory()
        string take()
        void give()
        bool taken_dead()
        bool mine()
        NativeQueue& queue()
        bool next(NativeChain& chain)
        void push(const NativeChain& chain, uint32_t written)
        bool unpop(const NativeChain& chain)
        uint64_t generation()
        uint32_t outstanding()
        unique_ptr[NativeChain] chain()
        void done(unique_ptr[NativeChain] chain)
    cdef cppclass SharedRing:
        Ring* get()
    uint32_t pv_read(const NativeChain& chain, uint32_t offset, char* into, size_t size)
    uint32_t pv_write(const NativeChain& chain, uint32_t offset, const void* at, size_t size)


@cython.freelist(64)
cdef class _Window:
    """One buffer of a chain. It keeps the memory, so what is made of it never dangles."""
    cdef shared_ptr[GuestMemory] memory
    cdef uint8_t* data
    cdef Py_ssize_t size
    cdef bint read_only

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, self.read_only, flags)


@cython.final
@cython.freelist(64)
cdef class Chain:
    """One request of the driver's: bytes to read, then room to write to.

    Get it from a `Queue`, and give it back with `push` exactly once. Its bytes may be read and
    written on any thread until then, also by a thread that does not hold the queue. The guest may
    change them at any time: read once, then check what was read.
    """
    cdef SharedRing ring
    cdef unique_ptr[NativeChain] chain
    cdef list views
    cdef uint64_t generation
    cdef uint32_t filled
    cdef bint live

    def __dealloc__(self):
        if self.chain.get() != NULL:
            self.ring.get().done(move(self.chain))

    @property
    def readable(self):
        """Bytes that the driver sends."""
        return self.chain.get().readable_bytes()

    @property
    def writable(self):
        """Bytes that the device can answer with."""
        return self.chain.get().writable_bytes()

    @property
    def pending(self):
        """Not pushed yet, and the driver has not reset the queue since."""
        return self.live and self.generation == self.ring.get().generation()

    cdef int _check(self) except -1:
        if not self.live:
            raise StateMismatch(
                f"this chain of {_name(self.ring.get())} was pushed; its bytes are the driver's")
        return 0

    def read(self, Py_ssize_t size=-1, Py_ssize_t offset=0):
        """`size` bytes (-1: all) of what the driver sends, from `offset` on; fewer when there are
        no more."""
        self._check()
        cdef Py_ssize_t there = self.chain.get().readable_bytes()
        if offset < 0:
            raise IndexError(f"an offset cannot be negative: {offset}")
        there = there - offset if offset < there else 0
        if size < 0 or size > there:
            size = there
        data = PyBytes_FromStringAndSize(NULL, size)
        if size != 0:
            pv_read(self.chain.get()[0], <uint32_t>offset, PyBytes_AS_STRING(data), size)
        return data

    def write(self, object data, Py_ssize_t offset=0):
        """Stores bytes in the answer, from `offset` on; how many found room."""
        cdef Py_buffer view
        cdef uint32_t done
        self._check()
        if offset < 0:
            raise IndexError(f"an offset cannot be negative: {offset}")
        if offset >= self.chain.get().writable_bytes():
            return 0
        if PyBytes_CheckExact(data):
            done = pv_write(self.chain.get()[0], <uint32_t>offset, PyBytes_AS_STRING(data),
                            PyBytes_GET_SIZE(data))
        else:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            done = pv_write(self.chain.get()[0], <uint32_t>offset, view.buf, view.len)
            PyBuffer_Release(&view)
        if <uint32_t>offset + done > self.filled:
            self.filled = <uint32_t>offset + done
        return done

    def read_views(self, Py_ssize_t offset=0, Py_ssize_t size=-1):
        """The same bytes as `read`, in place: a list of memoryviews, as os.pwritev() takes it.
        `push` ends their use."""
        return self._windows(True, offset, size)

    def write_views(self, Py_ssize_t offset=0, Py_ssize_t size=-1):
        """The room for the answer, in place: a list of memoryviews, as os.preadv() takes it. Say at
        `push` how many bytes of the answer are good; it ends the views' use."""
        return self._windows(False, offset, size)

    def write_ranges(self):
        """Where the room for the answer is: a list of (guest-physical address, size)."""
        self._check()
        cdef Buffers buffers = self.chain.get().writable()
        return [(buffers[i].gpa, buffers[i].size) for i in range(<Py_ssize_t>buffers.size())]

    cdef list _windows(self, bint reading, Py_ssize_t offset, Py_ssize_t size):
        self._check()
        if offset < 0:
            raise IndexError(f"an offset cannot be negative: {offset}")
        cdef Buffers buffers = (
            self.chain.get().readable() if reading else self.chain.get().writable())
        cdef list result = []
        cdef size_t i
        cdef Py_ssize_t here
        cdef _Window window
        for i in range(buffers.size()):
            if size == 0:
                break
            here = buffers[i].size
            if offset >= here:
                offset -= here
                continue
            window = _Window.__new__(_Window)
            window.memory = self.ring.get().memory()
            window.data = buffers[i].data + offset
            window.size = here - offset if size < 0 or here - offset < size else size
            window.read_only = reading
            offset = 0
            if size > 0:
                size -= window.size
            result.append(PyMemoryView_FromObject(window))
        if self.views is None:
            self.views = list(result)
        else:
            self.views.extend(result)
        return result

    def push(self, object written=None):
        """Gives the chain back to the driver, which may then use its memory for anything.

        `written` bytes of the answer, from the first, are good; None: as far as `write` went. True,
        or False when there is nobody to give it to: the driver reset the queue, or the machine
        stands still. The driver hears of it when the queue is let go of. Raises StateMismatch when
        this thread does not hold the queue, or the chain was pushed.
        """
        cdef Ring* ring = self.ring.get()
        cdef uint32_t count = self.filled
        if not self.live:
            raise StateMismatch(f"this chain of {_name(ring)} was pushed before")
        if written is not None:
            if not 0 <= written <= self.chain.get().writable_bytes():
                raise ValueError(f"{written} bytes cannot have been written to a chain with room "
                                 f"for {self.chain.get().writable_bytes()}")
            count = written
        cdef bint stale = self.generation != ring.generation()
        if not stale:
            if not _held(ring):
                return False
            ring.push(self.chain.get()[0], count)
        self._end()
        return not stale

    def unpop(self):
        """Puts the chain back as if it had not been popped, for a device that cannot serve it now:
        only the last that was popped, and before anything is pushed."""
        cdef Ring* ring = self.ring.get()
        self._check()
        if self.generation == ring.generation() and _held(ring):
            if not ring.unpop(self.chain.get()[0]):
                raise StateMismatch(f"this chain of {_name(ring)} cannot be put back: it is not the "
                                    "last that was popped, or something was pushed since")
        self._end()

    cdef int _end(self) except -1:
        self.live = False
        if self.views is not None:
            for view in self.views:
                try:
                    view.release()
                except BufferError:
                    pass  # something made of it is in use; the memory stays
            self.views = None
        return 0


cdef str _name(Ring* ring):
    return f"queue {ring.index()} of {ring.device().decode()}"


cdef bint _held(Ring* ring) except -1:
    """True: held and alive; False: held, but dead. Raises for who does not hold it."""
    if ring.mine():
        return True
    if ring.taken_dead():
        return False
    raise StateMismatch(f"{_name(ring)} is not held by this thread; use it in its handler, or in "
                        f"`with device.queue({ring.index()}) as queue:`")


@cython.final
cdef class Queue:
    """A virtqueue, the device's side. Iterating takes the driver's chains until there are no more::

        for chain in queue:
            chain.write(answer(chain.read()))
            chain.push()

    A handler's argument is held already. Elsewhere, also in other threads, hold it first: ``with
    device.queue(0) as queue:`` waits until nobody else has it. It is false, gives no chains and
    takes none, while the driver has not started it or the machine stands still.
    """
    cdef SharedRing ring

    @property
    def index(self):
        """Its number."""
        return self.ring.get().index()

    @property
    def held(self):
        """This thread holds it."""
        return self.ring.get().mine() or self.ring.get().taken_dead()

    @property
    def outstanding(self):
        """How many chains were popped and not pushed."""
        return self.ring.get().outstanding()

    @property
    def available(self):
        """There is a chain to be popped."""
        return _held(self.ring.get()) and self.ring.get().queue().available()

    def __bool__(self):
        return _held(self.ring.get())

    def pop(self):
        """The next chain; None: there is none, and the driver will notify of the next."""
        return self._next()

    def __iter__(self):
        return self

    def __next__(self):
        chain = self._next()
        if chain is None:
            raise StopIteration
        return chain

    cdef Chain _next(self):
        cdef Ring* ring = self.ring.get()
        if not _held(ring):
            return None
        cdef unique_ptr[NativeChain] native = ring.chain()
        if not ring.next(native.get()[0]):
            ring.done(move(native))
            return None
        cdef Chain chain = Chain.__new__(Chain)
        chain.ring = self.ring
        chain.chain = move(native)
        chain.generation = ring.generation()
        chain.filled = 0
        chain.live = True
        return chain

    def __enter__(self):
        cdef string problem
        with nogil:
            problem = self.ring.get().take()
        if not problem.empty():
            raise StateMismatch(problem.decode())
        return self

    def __exit__(self, kind, error, traceback):
        _held(self.ring.get())
        with nogil:
            self.ring.get().give()

    def __repr__(self):
        return f"<{_name(self.ring.get())}>"


def _queue(capsule):
    """For polyvisor._native: a Queue on the std::shared_ptr<Ring> that the capsule has."""
    cdef SharedRing* ring = <SharedRing*>PyCapsule_GetPointer(capsule, "polyvisor.Ring")
    cdef Queue queue = Queue.__new__(Queue)
    queue.ring = ring[0]
    return queue
