# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Owns the Python face of the GF(2^8) core: it checks arguments and owns buffers. It knows nothing of keys or nodes.

The arithmetic, its constant-time claim and the randomness are in src/gf256 (gf256.h states them). The contracts of the
functions are in _fastshamir.pyi. Error texts name indices, lengths and limits; they never hold bytes of a secret.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF
from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t

import os


cdef extern from "gf256.h" nogil:
    const int GF256_SHARES_MAX
    ctypedef struct gf256_kernel:
        const char *name
    void gf256_init() noexcept
    const gf256_kernel *gf256_kernel_at(unsigned position) noexcept
    int gf256_split(const gf256_kernel *kernel, const uint8_t *secret, size_t length, unsigned threshold,
                    unsigned shares, const uint8_t *xs, uint8_t *const *ys) noexcept
    void gf256_combine(const gf256_kernel *kernel, const uint8_t *xs, unsigned count, uint8_t target,
                       const uint8_t *const *ys, size_t length, uint8_t *out) noexcept


cdef extern from "Python.h":
    long PyLong_AsLongAndOverflow(object value, int *overflow) except? -1


# Below this many bytes of arithmetic, giving the lock away and back costs more than the work.
cdef enum:
    NOGIL_BYTES_MIN = 16384

cdef const gf256_kernel *_active = NULL


cdef int _small_int(object value, str what, int low, int high) except -1:
    cdef int overflow = 0
    cdef long number
    try:
        number = PyLong_AsLongAndOverflow(value, &overflow)
    except TypeError:
        raise TypeError(f"{what} must be an int, not {type(value).__name__}") from None
    if overflow or number < low or number > high:
        raise ValueError(f"{what} is {value}, but must be in {low}..{high}")
    return <int>number


cdef int _read_xs(object xs, uint8_t *numbers) except -1:
    """Reads distinct share indices into `numbers` (255 bytes of room) and returns how many there are."""
    cdef tuple items = tuple(xs)  # a copy: __index__ of an item may run code that changes the caller's list
    cdef Py_ssize_t count = len(items), j
    cdef uint8_t[256] seen
    cdef int x
    if count > GF256_SHARES_MAX:
        raise ValueError(f"xs holds {count} indices, but at most {GF256_SHARES_MAX} shares exist")
    for j in range(256):
        seen[j] = 0
    for j in range(count):
        x = _small_int(items[j], "a share index x", 1, GF256_SHARES_MAX)
        if seen[x]:
            raise ValueError(f"xs holds the share index x = {x} twice, but each must be given once")
        seen[x] = 1
        numbers[j] = <uint8_t>x
    return <int>count


cdef int _open(object buffer, Py_buffer *view, int flags, str what) except -1:
    """PyObject_GetBuffer, but an unfit buffer (read-only, not contiguous) is a TypeError as any other wrong type."""
    try:
        PyObject_GetBuffer(buffer, view, flags)
    except (TypeError, BufferError):
        raise TypeError(f"{what} must be a C-contiguous {'writable ' if flags & PyBUF_WRITABLE else ''}bytes-like "
                        f"object, not {type(buffer).__name__}") from None
    return 0


def split(secret, threshold, shares, xs=None):
    """Split a secret into shares; see _fastshamir.pyi."""
    cdef uint8_t[255] numbers
    cdef uint8_t *rows[255]
    cdef int n = _small_int(shares, "the number of shares", 1, GF256_SHARES_MAX)
    cdef int t, j, given, error
    cdef Py_buffer view
    cdef list ys
    cdef bytes y
    try:
        t = _small_int(threshold, "the threshold", 1, n)
    except ValueError:
        raise ValueError(f"the threshold is {threshold}, but must be in 1..{n}, the number of shares") from None
    if xs is None:
        for j in range(n):
            numbers[j] = <uint8_t>(j + 1)
    else:
        given = _read_xs(xs, numbers)
        if given != n:
            raise ValueError(f"xs holds {given} indices, but {n} shares are asked for")
    _open(secret, &view, PyBUF_SIMPLE, "the secret")
    try:
        if view.len == 0:
            raise ValueError("the secret has 0 bytes, but needs at least 1")
        ys = PyList_New(n)
        for j in range(n):
            y = PyBytes_FromStringAndSize(NULL, view.len)
            rows[j] = <uint8_t *>PyBytes_AS_STRING(y)
            Py_INCREF(y)  # SET_ITEM takes this one
            PyList_SET_ITEM(ys, j, y)
        if view.len * (n + t) >= NOGIL_BYTES_MIN:
            with nogil:
                error = gf256_split(_active, <const uint8_t *>view.buf, view.len, t, n, numbers, rows)
        else:
            error = gf256_split(_active, <const uint8_t *>view.buf, view.len, t, n, numbers, rows)
    finally:
        PyBuffer_Release(&view)
    if error == ENOMEM:
        raise MemoryError(f"no memory for {t - 1} random rows")
    if error:
        raise OSError(error, f"getrandom gave no random coefficients: {os.strerror(error)}")
    return ys


def combine(xs, ys, target=0, *, out=None):
    """Interpolate at `target`; see _fastshamir.pyi."""
    cdef uint8_t[255] numbers
    cdef const uint8_t *rows[255]
    cdef Py_buffer views[255]
    cdef Py_buffer sink
    cdef int t = _read_xs(xs, numbers)
    cdef int at = _small_int(target, "the target x", 0, GF256_SHARES_MAX)
    cdef tuple items = tuple(ys)
    cdef int opened = 0, sunk = 0, j
    cdef Py_ssize_t length
    cdef uint8_t *result
    cdef bytes fresh = None
    if t < 1:
        raise ValueError("0 shares were given, but at least 1 is needed")
    if len(items) != t:
        raise ValueError(f"{t} share indices and {len(items)} values were given, but their numbers must agree")
    try:
        for j in range(t):
            _open(items[j], &views[j], PyBUF_SIMPLE, "a share")
            opened += 1
            rows[j] = <const uint8_t *>views[j].buf
        length = views[0].len
        if length == 0:
            raise ValueError("the shares have 0 bytes, but need at least 1")
        for j in range(1, t):
            if views[j].len != length:
                raise ValueError(f"the share of x = {numbers[j]} has {views[j].len} bytes, but that of "
                                 f"x = {numbers[0]} has {length}: they are of different secrets")
        if out is None:
            fresh = PyBytes_FromStringAndSize(NULL, length)
            result = <uint8_t *>PyBytes_AS_STRING(fresh)
        else:
            _open(out, &sink, PyBUF_WRITABLE, "out")
            sunk = 1
            result = <uint8_t *>sink.buf
            if sink.len != length:
                raise ValueError(f"out has {sink.len} bytes, but the shares have {length}")
            for j in range(t):
                if result < rows[j] + length and rows[j] < result + length:
                    raise ValueError(f"out overlaps the share of x = {numbers[j]}, but must be apart from all shares")
        if length * (t + 1) >= NOGIL_BYTES_MIN:
            with nogil:
                gf256_combine(_active, numbers, t, <uint8_t>at, rows, length, result)
        else:
            gf256_combine(_active, numbers, t, <uint8_t>at, rows, length, result)
    finally:
        for j in range(opened):
            PyBuffer_Release(&views[j])
        if sunk:
            PyBuffer_Release(&sink)
    return fresh


def kernel_name():
    """Return the name of the kernel in force; see _fastshamir.pyi."""
    return _active.name.decode("ascii")


def available_kernels():
    """Return the names of the kernels that this machine can run; see _fastshamir.pyi."""
    cdef const gf256_kernel *kernel
    cdef unsigned position = 0
    names = []
    while True:
        kernel = gf256_kernel_at(position)
        if kernel == NULL:
            return tuple(names)
        names.append(kernel.name.decode("ascii"))
        position += 1


def use_kernel(name=None):
    """Put a kernel in force for the whole process; see _fastshamir.pyi."""
    global _active
    names = available_kernels()
    if name is None:
        _active = gf256_kernel_at(0)
    elif not isinstance(name, str):
        raise TypeError(f"the kernel's name must be str or None, not {type(name).__name__}")
    elif name in names:
        _active = gf256_kernel_at(names.index(name))
    else:
        raise ValueError(f"there is no kernel {name!r} on this machine, but only: {', '.join(names)}")
    return kernel_name()


gf256_init()
try:
    use_kernel(os.environ.get("KEYQUORUM_KERNEL") or None)
except ValueError as error:
    # An operator who forces a kernel must not silently get another one.
    raise ImportError(f"KEYQUORUM_KERNEL: {error}") from None


# --- Sums and dot products of rows, for work on shares; see row_sums.h ------------------------------------------------

cimport cython

cdef extern from "row_sums.h" nogil:
    const int ROW_SUMS_WEIGHTS_MAX
    void row_sum(const uint8_t *const *inputs, size_t count, size_t length, uint8_t *out) noexcept
    void row_dot(const uint8_t *row, size_t length, const uint8_t *const *weights, size_t count,
                 uint8_t *out) noexcept


@cython.auto_pickle(False)
cdef class _Rows:
    """Some buffers of one length, held open; every one is released with the object, also after an error."""

    cdef Py_buffer[255] views
    cdef const uint8_t *rows[255]
    cdef int count
    cdef Py_ssize_t length

    def __cinit__(self, object buffers, str what):
        cdef tuple items = tuple(buffers)
        self.count = 0
        if not 1 <= len(items) <= GF256_SHARES_MAX:
            raise ValueError(f"{len(items)} {what}s were given, but 1..{GF256_SHARES_MAX} are allowed")
        for item in items:
            _open(item, &self.views[self.count], PyBUF_SIMPLE, f"a {what}")
            self.rows[self.count] = <const uint8_t *>self.views[self.count].buf
            self.count += 1
            if self.views[self.count - 1].len != self.views[0].len:
                raise ValueError(f"a {what} has {self.views[self.count - 1].len} bytes, but the first one has "
                                 f"{self.views[0].len}")
        self.length = self.views[0].len

    def __dealloc__(self):
        for j in range(self.count):
            PyBuffer_Release(&self.views[j])


def add(ys):
    """Add rows byte by byte; see _fastshamir.pyi."""
    cdef _Rows rows = _Rows(ys, "row")
    cdef bytes result = PyBytes_FromStringAndSize(NULL, rows.length)
    cdef uint8_t *sink = <uint8_t *>PyBytes_AS_STRING(result)
    with nogil:
        row_sum(rows.rows, rows.count, rows.length, sink)
    return result


def dot(ys, weights):
    """Dot products of rows and weights; see _fastshamir.pyi."""
    cdef _Rows rows = _Rows(ys, "row")
    cdef _Rows scales = _Rows(weights, "weight")
    cdef list results = []
    cdef bytes result
    cdef uint8_t *sink
    cdef int j
    if scales.count > ROW_SUMS_WEIGHTS_MAX:
        raise ValueError(f"{scales.count} weights were given, but at most {ROW_SUMS_WEIGHTS_MAX} are allowed")
    if scales.length != rows.length:
        raise ValueError(f"the weights have {scales.length} bytes, but the rows have {rows.length}")
    for j in range(rows.count):
        result = PyBytes_FromStringAndSize(NULL, scales.count)
        sink = <uint8_t *>PyBytes_AS_STRING(result)
        with nogil:
            row_dot(rows.rows[j], rows.length, scales.rows, scales.count, sink)
        results.append(result)
    return results


# --- Memory for secrets; see secret_arena.h ---------------------------------------------------------------------------

from cpython.buffer cimport PyBuffer_FillInfo
from libc.string cimport memcpy


cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX


cdef extern from "secret_arena.h" nogil:
    ctypedef struct secret_piece:
        uint8_t *bytes
        size_t length
        unsigned generation
    int secret_allocate(size_t length, secret_piece *piece, const char **failed_call) noexcept
    void secret_release(const secret_piece *piece) noexcept
    int secret_is_own(const secret_piece *piece) noexcept
    void secret_wipe(uint8_t *bytes, size_t length) noexcept
    int secret_equal(const uint8_t *a, const uint8_t *b, size_t length) noexcept
    int secret_random(uint8_t *bytes, size_t length) noexcept
    void secret_usage(size_t *locked, size_t *used) noexcept


cdef str _why_no_memory(int error, str call, size_t length):
    text = f"no locked memory for {length} bytes of a secret: {call} failed: {os.strerror(error)}"
    if call == "mlock":
        import resource
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        told = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
        text += (f". This process may lock {told}; raise it with LimitMEMLOCK= in a systemd unit, --ulimit memlock= in "
                 "a container, or memlock in /etc/security/limits.conf")
    return text


@cython.final
@cython.auto_pickle(False)
cdef class SecretBuffer:
    """A writable buffer in locked memory; see _fastshamir.pyi."""

    cdef secret_piece piece
    cdef Py_ssize_t exports
    cdef bint held      # the piece has not been given back yet
    cdef bint is_closed

    def __cinit__(self, length, /):
        cdef const char *call = NULL
        cdef int error
        cdef Py_ssize_t size
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"the length must be an int, not {type(length).__name__}")
        if not 1 <= length <= PY_SSIZE_T_MAX // 2:
            raise ValueError(f"the length is {length}, but must be in 1..{PY_SSIZE_T_MAX // 2}")
        size = length
        with nogil:
            error = secret_allocate(size, &self.piece, &call)
        if error:
            raise OSError(error, _why_no_memory(error, call.decode("ascii"), size))
        self.held = True

    def __dealloc__(self):
        if self.held:
            secret_release(&self.piece)

    cdef int _check(self) except -1:
        if self.is_closed:
            raise ValueError("the secret buffer is closed")
        if not secret_is_own(&self.piece):
            raise ValueError("the secret buffer is that of the process this one was forked from, and empty here")
        return 0

    @staticmethod
    def copy_of(data, /):
        """A new buffer with a copy of the bytes."""
        cdef Py_buffer view
        cdef SecretBuffer made
        _open(data, &view, PyBUF_SIMPLE, "the secret")
        try:
            made = SecretBuffer(view.len)
            memcpy(made.piece.bytes, view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        return made

    @staticmethod
    def random(length, /):
        """A new buffer of random bytes."""
        cdef SecretBuffer made = SecretBuffer(length)
        cdef int error
        with nogil:
            error = secret_random(made.piece.bytes, made.piece.length)
        if error:
            raise OSError(error, f"getrandom gave no random bytes: {os.strerror(error)}")
        return made

    def add(self, data, /):
        """Add bytes to the contents."""
        cdef Py_buffer view
        cdef const uint8_t *pair[2]
        self._check()
        _open(data, &view, PyBUF_SIMPLE, "what is added")
        try:
            if <size_t>view.len > self.piece.length:
                raise ValueError(f"{view.len} bytes can't be added to {self.piece.length}")
            if (<uint8_t *>view.buf < self.piece.bytes + self.piece.length
                    and self.piece.bytes < <uint8_t *>view.buf + view.len):
                raise ValueError("what is added overlaps the secret buffer, but must be apart from it")
            pair[0] = self.piece.bytes
            pair[1] = <const uint8_t *>view.buf
            if view.len:
                row_sum(pair, 2, view.len, self.piece.bytes)
        finally:
            PyBuffer_Release(&view)

    def wipe(self):
        """Overwrite with zeros."""
        self._check()
        secret_wipe(self.piece.bytes, self.piece.length)

    def close(self):
        """Overwrite with zeros and give the memory back."""
        if self.is_closed:
            return
        self.is_closed = True
        if self.exports:
            secret_wipe(self.piece.bytes, self.piece.length)
        else:
            self.held = False
            secret_release(&self.piece)

    @property
    def closed(self):
        """Whether it was closed."""
        return bool(self.is_closed)

    def __enter__(self):
        self._check()
        return self

    def __exit__(self, *exception):
        self.close()

    def __len__(self):
        return <Py_ssize_t>self.piece.length

    def __repr__(self):
        return f"SecretBuffer({self.piece.length} bytes{', closed' if self.is_closed else ''})"

    def __eq__(self, other):
        cdef Py_buffer view
        cdef bint equal
        if self is other:
            return True
        self._check()
        try:
            PyObject_GetBuffer(other, &view, PyBUF_SIMPLE)
        except (TypeError, BufferError):
            return NotImplemented
        equal = (<size_t>view.len == self.piece.length
                 and secret_equal(self.piece.bytes, <const uint8_t *>view.buf, self.piece.length))
        PyBuffer_Release(&view)
        return bool(equal)

    __hash__ = None

    def __copy__(self):
        raise TypeError("a SecretBuffer is not copied by chance; copy_of does it")

    def __deepcopy__(self, memo):
        raise TypeError("a SecretBuffer is not copied by chance; copy_of does it")

    def __reduce_ex__(self, protocol):
        raise TypeError("a SecretBuffer is never pickled")

    def __getbuffer__(self, Py_buffer *view, int flags):
        self._check()
        PyBuffer_FillInfo(view, self, self.piece.bytes, <Py_ssize_t>self.piece.length, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1
        if self.is_closed and self.held and self.exports == 0:
            self.held = False
            secret_release(&self.piece)

    # PEP 688, which Python 3.12 derives from the two above and 3.11 does not know.
    def __buffer__(self, flags, /):
        return memoryview(self)

    def __release_buffer__(self, buffer, /):
        buffer.release()


def secret_memory():
    """Locked and used bytes of the arena; see _fastshamir.pyi."""
    cdef size_t locked, used
    secret_usage(&locked, &used)
    return locked, used
