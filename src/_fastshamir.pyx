# cython: boundscheck=False, wraparound=False, initializedcheck=False
# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Owns the Python face of the GF(2^8) core: it checks arguments and owns buffers. It knows nothing of keys or nodes.

The arithmetic, its constant-time claim and the randomness are in src/gf256 (gf256.h states them). The contracts of the
functions are in _fastshamir.pyi. Error texts name indices, lengths and limits; they never hold bytes of a secret.
"""

from cpython.buffer cimport PyBUF_ND, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.list cimport PyList_CheckExact, PyList_New, PyList_SET_ITEM
from cpython.long cimport PyLong_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport PyObject, Py_INCREF
from cpython.tuple cimport PyTuple_CheckExact
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

import os


cdef extern from "gf256.h" nogil:
    const int GF256_SHARES_MAX
    const int GF256_SEED_BYTES
    ctypedef struct gf256_field:
        pass
    ctypedef struct gf256_kernel:
        const char *name
    ctypedef struct gf256_stream:
        uint64_t block
    ctypedef struct gf256_generator:
        const char *name
        void (*start)(gf256_stream *stream, const uint8_t *seed) noexcept
        void (*fill)(gf256_stream *stream, uint8_t *out, size_t length) noexcept
    const int GF256_SMALL_BYTES
    ctypedef struct gf256_prepared:
        const gf256_kernel *kernel
        unsigned rows, count
        size_t length_max
    void gf256_init() noexcept
    const gf256_field *gf256_field_of(unsigned polynomial) noexcept
    const gf256_kernel *gf256_kernel_at(unsigned position) noexcept
    const gf256_generator *gf256_generator_at(unsigned position) noexcept
    const gf256_generator *gf256_generator_of(const gf256_kernel *kernel) noexcept
    int gf256_split(const gf256_kernel *kernel, const gf256_generator *generator, const gf256_field *field,
                    const uint8_t *secret, size_t length, unsigned threshold, unsigned shares, const uint8_t *xs,
                    uint8_t *const *ys) noexcept
    void gf256_interpolate(const gf256_kernel *kernel, const gf256_field *field, const uint8_t *xs, unsigned count,
                           const uint8_t *const *ys, const uint8_t *targets, unsigned target_count,
                           uint8_t *const *outs, size_t length) noexcept
    int gf256_prepare(gf256_prepared *prepared, const gf256_kernel *kernel, const gf256_field *field, const uint8_t *xs,
                      unsigned count, const uint8_t *targets, unsigned target_count) noexcept
    void gf256_apply(const gf256_prepared *prepared, const uint8_t *const *ys, uint8_t *const *outs,
                     size_t length) noexcept
    int gf256_split_prepared(const gf256_prepared *prepared, const gf256_generator *generator, const uint8_t *secret,
                             size_t length, uint8_t *const *ys) noexcept


cdef extern from "Python.h":
    long PyLong_AsLongAndOverflow(object value, int *overflow) except? -1
    # Of lists and tuples alike. The items are borrowed; plain pointers spare the counting of references.
    Py_ssize_t PySequence_Fast_GET_SIZE(object sequence) noexcept
    PyObject **PySequence_Fast_ITEMS(object sequence) noexcept
    bint is_plain_int "PyLong_CheckExact"(PyObject *value) noexcept
    long long_of "PyLong_AsLongAndOverflow"(PyObject *value, int *overflow) noexcept
    bint is_plain_bytes "PyBytes_CheckExact"(PyObject *value) noexcept
    Py_ssize_t size_of "PyBytes_GET_SIZE"(PyObject *value) noexcept
    char *start_of "PyBytes_AS_STRING"(PyObject *value) noexcept


cdef extern from "string.h" nogil:
    void explicit_bzero(void *start, size_t length) noexcept


# Below this many bytes of rows, giving the lock away and back costs more than the work.
cdef enum:
    NOGIL_BYTES_MIN = 65536
    AES_POLY = 0x11B

cdef const gf256_kernel *_active = NULL
cdef const gf256_generator *_generator = NULL
cdef const gf256_field *_aes_field = NULL
# The very objects that are the defaults below: usual calls need no conversion of them.
cdef object _DEFAULT_POLY = 0x11B
cdef object _DEFAULT_TARGET = 0

# What the last small call of its kind had prepared, for callers that ask for the same again: for a key's few bytes this
# is most of the work. All of it is public. It is read, used and written under the interpreter's lock, and nothing that
# can run other Python code comes between a comparison with it and its use.
#
# Numbers are compared by their objects. Only those of _NUMBERS are ever kept, which live as long as this module, so that
# an equal address is an equal number; they are the interpreter's only plain ints of their value.
cdef tuple _NUMBERS = tuple(range(256))
cdef enum:
    KEPT_MAX = 16  # indices or shares; gf256_prepare says which of them are few enough

cdef struct last_combine:  # over AES_POLY
    gf256_prepared prepared
    PyObject *target
    PyObject *xs[KEPT_MAX]

cdef struct last_split:  # over AES_POLY, with the usual indices
    gf256_prepared prepared
    PyObject *threshold
    PyObject *shares

cdef last_combine _last_combine
cdef last_split _last_split


# --- arguments ---------------------------------------------------------------------------------------------------------


cdef int _small_int(object value, str what, int low, int high) except -1:
    cdef int overflow = 0
    cdef long number
    if PyLong_CheckExact(value):  # can't fail, and so needs no handler
        number = PyLong_AsLongAndOverflow(value, &overflow)
        if low <= number <= high and not overflow:
            return <int>number
    try:
        number = PyLong_AsLongAndOverflow(value, &overflow)
    except TypeError:
        raise TypeError(f"{what} must be an int, not {type(value).__name__}") from None
    if overflow or number < low or number > high:
        raise ValueError(f"{what} is {value}, but must be in {low}..{high}")
    return <int>number


cdef int _read_threshold(object threshold, int shares) except -1:
    cdef int overflow = 0
    cdef long number
    if PyLong_CheckExact(threshold):
        number = PyLong_AsLongAndOverflow(threshold, &overflow)
        if 1 <= number <= shares and not overflow:
            return <int>number
    try:
        return _small_int(threshold, "the threshold", 1, shares)
    except ValueError:
        raise ValueError(f"the threshold is {threshold}, but must be in 1..{shares}, the number of shares") from None


cdef int _read_plain_xs(object xs, uint8_t *numbers) noexcept:
    """As _read_xs for a list or tuple of right plain ints, which can't run code of the caller; -1 for anything else."""
    cdef Py_ssize_t count, j
    cdef PyObject **items
    cdef uint64_t[4] seen
    cdef uint64_t bit
    cdef int overflow = 0
    cdef long x
    if not (PyList_CheckExact(xs) or PyTuple_CheckExact(xs)):
        return -1
    count = PySequence_Fast_GET_SIZE(xs)
    items = PySequence_Fast_ITEMS(xs)
    if count > GF256_SHARES_MAX:
        return -1
    seen[0] = seen[1] = seen[2] = seen[3] = 0
    for j in range(count):
        if not is_plain_int(items[j]):
            return -1
        x = long_of(items[j], &overflow)
        bit = <uint64_t>1 << (x & 63)
        if overflow or x < 1 or x > GF256_SHARES_MAX or seen[x >> 6] & bit:
            return -1
        seen[x >> 6] |= bit
        numbers[j] = <uint8_t>x
    return <int>count


cdef int _read_xs(object xs, uint8_t *numbers) except -1:
    """Reads distinct share indices into `numbers` (255 bytes of room) and returns how many there are."""
    cdef int plain = _read_plain_xs(xs, numbers)
    cdef tuple items
    cdef Py_ssize_t count, j
    cdef uint8_t[256] seen
    cdef int x
    if plain >= 0:
        return plain
    items = tuple(xs)  # a copy: __index__ of an item may run code that changes the caller's list
    count = len(items)
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


cdef int _read_points(object xs, int shares, uint8_t *numbers) except -1:
    """The indices of a split: those given, or 1..shares."""
    cdef int given, j
    if xs is None:
        for j in range(shares):
            numbers[j] = <uint8_t>(j + 1)
        return 0
    given = _read_xs(xs, numbers)
    if given != shares:
        raise ValueError(f"xs holds {given} indices, but {shares} shares are asked for")
    return 0


cdef const gf256_field *_read_poly(object poly) except NULL:
    cdef const gf256_field *field = NULL
    cdef int overflow = 0
    cdef long number
    if poly is _DEFAULT_POLY:
        return _aes_field
    try:
        number = PyLong_AsLongAndOverflow(poly, &overflow)
    except TypeError:
        raise TypeError(f"poly must be an int, not {type(poly).__name__}") from None
    if not overflow and number > 0:
        field = gf256_field_of(<unsigned>number) if number < 0x200 else NULL
    if field == NULL:
        raise ValueError(f"poly is {poly}, but must be 0x11B or 0x11D")
    return field


# --- buffers -----------------------------------------------------------------------------------------------------------


cdef int _open(object buffer, Py_buffer *view, int flags, str what) except -1:
    """PyObject_GetBuffer, but an unfit buffer (read-only, not contiguous) is a TypeError as any other wrong type."""
    try:
        PyObject_GetBuffer(buffer, view, flags)
    except (TypeError, BufferError, ValueError):  # numpy says ValueError
        if isinstance(buffer, SecretBuffer):
            raise  # it is closed, and says so
        raise TypeError(f"{what} must be a C-contiguous {'writable ' if flags & PyBUF_WRITABLE else ''}bytes-like "
                        f"object, not {type(buffer).__name__}") from None
    return 0


cdef str _shape_of(const Py_buffer *view):
    return f"({', '.join([str(view.shape[j]) for j in range(view.ndim)])})"


cdef int _open_out(object out, Py_buffer *view, tuple shape) except -1:
    """Opens a writable buffer of bytes that has the shape, or is flat and has as many bytes; then it must be released."""
    cdef Py_ssize_t total = 1, each
    cdef bint fits
    cdef int j
    _open(out, view, PyBUF_WRITABLE | PyBUF_ND, "out")
    for each in shape:
        total *= each
    fits = view.itemsize == 1 and view.len == total and (view.ndim == 1 or view.ndim == len(shape))
    if fits and view.ndim > 1:
        for j in range(view.ndim):
            fits = fits and view.shape[j] == shape[j]
    if not fits:
        given = f"{view.len} bytes" if view.itemsize == 1 and view.ndim == 1 else f"the shape {_shape_of(view)}"
        items = "" if view.itemsize == 1 else f" of items of {view.itemsize} bytes"
        PyBuffer_Release(view)
        raise ValueError(f"out has {given}{items}, but needs {total} bytes or the shape {shape} of bytes")
    return 0


cdef bint _overlap(const uint8_t *one, size_t one_length, const uint8_t *other, size_t other_length) noexcept nogil:
    return one < other + other_length and other < one + one_length


cdef list _fresh_rows(int count, Py_ssize_t length, uint8_t **rows):
    """`count` new bytes objects of `length` and their insides."""
    cdef list made = PyList_New(count)
    cdef bytes row
    cdef int j
    for j in range(count):
        row = PyBytes_FromStringAndSize(NULL, length)
        rows[j] = <uint8_t *>PyBytes_AS_STRING(row)
        Py_INCREF(row)  # SET_ITEM takes this one
        PyList_SET_ITEM(made, j, row)
    return made


cdef bint _is_number(PyObject *value, int number) noexcept:
    return value == PySequence_Fast_ITEMS(_NUMBERS)[number]


# --- split -------------------------------------------------------------------------------------------------------------


cdef int _run_split(const gf256_field *field, const uint8_t *secret, size_t length, int t, int n, const uint8_t *numbers,
                    uint8_t *const *rows) except -1:
    cdef int error
    if length * <size_t>(n + 1) >= NOGIL_BYTES_MIN:
        with nogil:
            error = gf256_split(_active, _generator, field, secret, length, t, n, numbers, rows)
    else:
        error = gf256_split(_active, _generator, field, secret, length, t, n, numbers, rows)
    return _check_random(error)


cdef int _check_random(int error) except -1:
    if error:
        raise OSError(error, f"getrandom gave no random coefficients: {os.strerror(error)}")
    return 0


cdef void _keep_split(object threshold, object shares, int t, int n) noexcept:
    """Prepares the split with the usual indices for _split_again, if it is small enough."""
    cdef uint8_t points[KEPT_MAX + 1]
    cdef int j
    _last_split.prepared.kernel = NULL
    if (2 <= t and n <= KEPT_MAX and _is_number(<PyObject *>threshold, t) and _is_number(<PyObject *>shares, n)):
        for j in range(n + 1):
            points[j] = <uint8_t>j
        _last_split.threshold = <PyObject *>threshold
        _last_split.shares = <PyObject *>shares
        gf256_prepare(&_last_split.prepared, _active, _aes_field, points, t, points + t, n - t + 1)


cdef bint _is_last_split(object threshold, object shares) noexcept:
    return (_last_split.prepared.kernel == _active and _last_split.threshold == <PyObject *>threshold
            and _last_split.shares == <PyObject *>shares)


cdef list _split_again(object secret, object threshold, object shares):
    """The split that was kept, of a short bytes object; None for anything else."""
    cdef uint8_t *rows[2 * KEPT_MAX]
    cdef size_t length, randoms
    cdef list ys
    if not (_is_last_split(threshold, shares) and is_plain_bytes(<PyObject *>secret)):
        return None
    length = size_of(<PyObject *>secret)
    randoms = _last_split.prepared.count - 1
    if length == 0 or length > _last_split.prepared.length_max or length * randoms > <size_t>GF256_SMALL_BYTES:
        return None
    ys = _fresh_rows(<int>(randoms + _last_split.prepared.rows), length, rows)
    if not _is_last_split(threshold, shares):  # making a list may collect garbage, whose finalizers may be callers
        return None
    _check_random(gf256_split_prepared(&_last_split.prepared, _generator,
                                       <const uint8_t *>start_of(<PyObject *>secret), length, rows))
    return ys


cdef list _split_rows(const gf256_field *field, const uint8_t *secret, Py_ssize_t length, int t, int n,
                      const uint8_t *numbers, object out, tuple shape):
    """Splits `length` bytes into fresh bytes objects, or into the n parts of `out` (and returns None)."""
    cdef uint8_t *rows[255]
    cdef Py_buffer sink
    cdef list ys
    cdef int j
    if out is None:
        ys = _fresh_rows(n, length, rows)
        _run_split(field, secret, length, t, n, numbers, rows)
        return ys
    _open_out(out, &sink, shape)
    try:
        if _overlap(<const uint8_t *>sink.buf, sink.len, secret, length):
            raise ValueError("out overlaps the secret, but must be apart from it")
        for j in range(n):
            rows[j] = <uint8_t *>sink.buf + j * length
        _run_split(field, secret, length, t, n, numbers, rows)
    finally:
        PyBuffer_Release(&sink)
    return None


def split(secret, threshold, shares, xs=None, *, out=None, poly=0x11B):
    """Split a secret into shares; see _fastshamir.pyi."""
    cdef bint is_usual = xs is None and out is None and poly is _DEFAULT_POLY
    cdef list ys
    if is_usual:
        ys = _split_again(secret, threshold, shares)
        if ys is not None:
            return ys
    cdef int n = _small_int(shares, "the number of shares", 1, GF256_SHARES_MAX)
    cdef int t = _read_threshold(threshold, n)
    if is_usual:
        _keep_split(threshold, shares, t, n)
        ys = _split_again(secret, threshold, shares)
        if ys is not None:
            return ys
    return _split(secret, t, n, xs, out, _read_poly(poly))


cdef object _split(object secret, int t, int n, object xs, object out, const gf256_field *field):
    cdef uint8_t[255] numbers
    cdef Py_buffer view
    _read_points(xs, n, numbers)
    _open(secret, &view, PyBUF_SIMPLE, "the secret")
    try:
        if view.len == 0:
            raise ValueError("the secret has 0 bytes, but needs at least 1")
        return _split_rows(field, <const uint8_t *>view.buf, view.len, t, n, numbers, out,
                           None if out is None else (n, view.len))
    finally:
        PyBuffer_Release(&view)


cdef uint8_t *_gather(object secrets, Py_ssize_t *count, Py_ssize_t *length) except NULL:
    """A copy of equally long secrets one after the other, which the caller wipes and frees."""
    cdef tuple items = tuple(secrets)
    cdef uint8_t *room = NULL
    cdef Py_ssize_t j
    cdef Py_buffer view
    count[0] = len(items)
    length[0] = 0
    if not items:
        raise ValueError("0 secrets were given, but at least 1 is needed")
    for j in range(count[0]):
        try:
            _open(items[j], &view, PyBUF_SIMPLE, "a secret")
            try:
                if j == 0:
                    length[0] = view.len
                    if view.len == 0:
                        raise ValueError("the secrets have 0 bytes, but need at least 1")
                    room = <uint8_t *>PyMem_Malloc(count[0] * view.len)
                    if room == NULL:
                        raise MemoryError(f"no memory for {count[0]} secrets of {view.len} bytes")
                if view.len != length[0]:
                    raise ValueError(f"secret {j} has {view.len} bytes, but secret 0 has {length[0]}: "
                                     "those of one batch have the same length")
                memcpy(room + j * length[0], view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
        except BaseException:
            if room != NULL:
                explicit_bzero(room, count[0] * length[0])
                PyMem_Free(room)
            raise
    return room


def split_many(secrets, threshold, shares, xs=None, *, out=None, poly=0x11B):
    """Split equally long secrets in one go; see _fastshamir.pyi."""
    cdef uint8_t[255] numbers
    cdef int n = _small_int(shares, "the number of shares", 1, GF256_SHARES_MAX)
    cdef int t = _read_threshold(threshold, n)
    cdef const gf256_field *field = _read_poly(poly)
    cdef Py_buffer view
    cdef Py_ssize_t count, length
    cdef uint8_t *room
    _read_points(xs, n, numbers)
    if isinstance(secrets, (list, tuple)):
        room = _gather(secrets, &count, &length)
        try:
            return _split_rows(field, room, count * length, t, n, numbers, out, (n, count, length))
        finally:
            explicit_bzero(room, count * length)
            PyMem_Free(room)
    _open(secrets, &view, PyBUF_ND, "the secrets")
    try:
        if view.ndim != 2 or view.itemsize != 1 or view.len == 0:
            raise ValueError(f"the secrets have the shape {_shape_of(&view)} of items of {view.itemsize} bytes, but need "
                             "(count, length) of single bytes, neither of them 0")
        return _split_rows(field, <const uint8_t *>view.buf, view.len, t, n, numbers, out,
                           (n, view.shape[0], view.shape[1]))
    finally:
        PyBuffer_Release(&view)


# --- interpolation -----------------------------------------------------------------------------------------------------


cdef void _run_interpolate(const gf256_field *field, const uint8_t *xs, int count, const uint8_t *const *ys,
                           const uint8_t *targets, int target_count, uint8_t *const *outs, size_t length) noexcept:
    if length * <size_t>(count + target_count) >= NOGIL_BYTES_MIN:
        with nogil:
            gf256_interpolate(_active, field, xs, count, ys, targets, target_count, outs, length)
    else:
        gf256_interpolate(_active, field, xs, count, ys, targets, target_count, outs, length)


cdef bytes _combine_plain(const gf256_field *field, const uint8_t *xs, int count, object ys, uint8_t target):
    """The usual small case, without opening buffers: a list or tuple of bytes. None for anything else.

    The values are borrowed from the caller's list: nothing here runs Python code or gives the lock away.
    """
    cdef const uint8_t *rows[255]
    cdef PyObject **items
    cdef Py_ssize_t length, j
    cdef uint8_t *result
    cdef bytes fresh
    if not (PyList_CheckExact(ys) or PyTuple_CheckExact(ys)) or PySequence_Fast_GET_SIZE(ys) != count:
        return None
    items = PySequence_Fast_ITEMS(ys)
    if not is_plain_bytes(items[0]):
        return None
    length = size_of(items[0])
    if length == 0 or length * (count + 1) >= NOGIL_BYTES_MIN:
        return None
    for j in range(count):
        if not is_plain_bytes(items[j]) or size_of(items[j]) != length:
            return None
        rows[j] = <const uint8_t *>start_of(items[j])
    fresh = PyBytes_FromStringAndSize(NULL, length)
    result = <uint8_t *>PyBytes_AS_STRING(fresh)
    gf256_interpolate(_active, field, xs, count, rows, &target, 1, &result, length)
    return fresh


cdef void _keep_combine(object xs, object target, const uint8_t *numbers, int count, uint8_t at) noexcept:
    """Prepares the combine at `target` (read as `at`) of `xs` (read as `numbers`) for _combine_again, if it is small."""
    cdef PyObject **given
    cdef int j
    _last_combine.prepared.kernel = NULL
    if not (PyList_CheckExact(xs) or PyTuple_CheckExact(xs)) or PySequence_Fast_GET_SIZE(xs) != count:
        return
    if not 1 <= count <= KEPT_MAX or not _is_number(<PyObject *>target, at):
        return
    given = PySequence_Fast_ITEMS(xs)
    for j in range(count):
        if not _is_number(given[j], numbers[j]):
            return
        _last_combine.xs[j] = given[j]
    _last_combine.target = <PyObject *>target
    gf256_prepare(&_last_combine.prepared, _active, _aes_field, numbers, count, &at, 1)


cdef bytes _combine_again(object xs, object ys, object target):
    """The combine that was kept, of other short values; None for anything else. As _combine_plain it borrows them."""
    cdef const uint8_t *rows[KEPT_MAX]
    cdef PyObject **given
    cdef PyObject **items
    cdef Py_ssize_t count = _last_combine.prepared.count, length = 0, j
    cdef uint8_t *result
    cdef bytes fresh
    if _last_combine.prepared.kernel != _active or _last_combine.target != <PyObject *>target:
        return None
    if not (PyList_CheckExact(xs) or PyTuple_CheckExact(xs)) or PySequence_Fast_GET_SIZE(xs) != count:
        return None
    if not (PyList_CheckExact(ys) or PyTuple_CheckExact(ys)) or PySequence_Fast_GET_SIZE(ys) != count:
        return None
    given = PySequence_Fast_ITEMS(xs)
    items = PySequence_Fast_ITEMS(ys)
    for j in range(count):
        if given[j] != _last_combine.xs[j] or not is_plain_bytes(items[j]):
            return None
        if j == 0:
            length = size_of(items[0])
        if size_of(items[j]) != length:
            return None
        rows[j] = <const uint8_t *>start_of(items[j])
    if length == 0 or <size_t>length > _last_combine.prepared.length_max:
        return None
    fresh = PyBytes_FromStringAndSize(NULL, length)
    result = <uint8_t *>PyBytes_AS_STRING(fresh)
    gf256_apply(&_last_combine.prepared, rows, &result, length)
    return fresh


cdef object _interpolate(const gf256_field *field, const uint8_t *numbers, int t, tuple items, const uint8_t *targets,
                         int target_count, object out, Py_ssize_t parts):
    """Values at `targets`: fresh bytes objects in a list, or in `out` of (target_count, length) (then None).

    With `parts` there is one target, and the list has the value cut into so many equal parts, for which `out` has the
    shape (parts, length / parts).
    """
    cdef const uint8_t *rows[255]
    cdef uint8_t *results[256]
    cdef Py_buffer views[255]
    cdef Py_buffer sink
    cdef int opened = 0, sunk = 0, j
    cdef Py_ssize_t length
    cdef list fresh = None
    cdef bytes whole
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
        if parts and length % parts:
            raise ValueError(f"the shares have {length} bytes, but must be cut into {parts} equally long parts")
        if out is None:
            fresh = _fresh_rows(target_count, length, results)
        else:
            if parts:
                _open_out(out, &sink, (parts, length // parts))
            elif target_count == 1:
                _open_flat(out, &sink, length)
            else:
                _open_out(out, &sink, (target_count, length))
            sunk = 1
            for j in range(t):
                if _overlap(<const uint8_t *>sink.buf, sink.len, rows[j], length):
                    raise ValueError(f"out overlaps the share of x = {numbers[j]}, but must be apart from all shares")
            for j in range(target_count):
                results[j] = <uint8_t *>sink.buf + j * length
        _run_interpolate(field, numbers, t, rows, targets, target_count, results, length)
    finally:
        for j in range(opened):
            PyBuffer_Release(&views[j])
        if sunk:
            PyBuffer_Release(&sink)
    if parts and fresh is not None:
        whole = fresh[0]
        length //= parts
        fresh = [PyBytes_FromStringAndSize(PyBytes_AS_STRING(whole) + j * length, length) for j in range(parts)]
        explicit_bzero(PyBytes_AS_STRING(whole), length * parts)  # it was never anyone else's
    return fresh


cdef int _open_flat(object out, Py_buffer *view, Py_ssize_t length) except -1:
    _open(out, view, PyBUF_WRITABLE, "out")
    if view.len != length:
        given = view.len
        PyBuffer_Release(view)
        raise ValueError(f"out has {given} bytes, but the shares have {length}")
    return 0


cdef int _read_target(object target) except -1:
    if target is _DEFAULT_TARGET:
        return 0
    return _small_int(target, "the target x", 0, GF256_SHARES_MAX)


def combine(xs, ys, target=0, *, out=None, poly=0x11B):
    """Interpolate at `target`; see _fastshamir.pyi."""
    cdef bytes result
    if out is None and poly is _DEFAULT_POLY:
        result = _combine_again(xs, ys, target)
        if result is not None:
            return result
    return _combine(xs, ys, target, out, poly)


cdef object _combine(object xs, object ys, object target, object out, object poly):
    cdef uint8_t[255] numbers
    cdef int t = _read_xs(xs, numbers)
    cdef uint8_t at = <uint8_t>_read_target(target)
    cdef const gf256_field *field = _read_poly(poly)
    cdef bytes result
    if out is None and field == _aes_field:
        _keep_combine(xs, target, numbers, t, at)
        result = _combine_again(xs, ys, target)
        if result is not None:
            return result
    if out is None and t > 0:
        result = _combine_plain(field, numbers, t, ys, at)
        if result is not None:
            return result
    made = _interpolate(field, numbers, t, tuple(ys), &at, 1, out, 0)
    return None if made is None else made[0]


def combine_many(xs, ys, count, target=0, *, out=None, poly=0x11B):
    """Interpolate a batch at `target`; see _fastshamir.pyi."""
    cdef uint8_t[255] numbers
    cdef int t = _read_xs(xs, numbers)
    cdef uint8_t at = <uint8_t>_read_target(target)
    cdef const gf256_field *field = _read_poly(poly)
    cdef int parts = _small_int(count, "the number of secrets", 1, 2**31 - 1)
    return _interpolate(field, numbers, t, tuple(ys), &at, 1, out, parts)


def interpolate(xs, ys, targets, *, out=None, poly=0x11B):
    """Interpolate at several targets; see _fastshamir.pyi."""
    cdef uint8_t[255] numbers
    cdef uint8_t[256] at
    cdef int t = _read_xs(xs, numbers)
    cdef const gf256_field *field = _read_poly(poly)
    cdef tuple wanted = tuple(targets)
    cdef Py_ssize_t j
    if not 1 <= len(wanted) <= 256:
        raise ValueError(f"{len(wanted)} targets are asked for, but their number must be in 1..256")
    for j in range(len(wanted)):
        at[j] = <uint8_t>_small_int(wanted[j], "a target x", 0, GF256_SHARES_MAX)
    return _interpolate(field, numbers, t, tuple(ys), at, <int>len(wanted), out, 0)


# --- kernels and generators --------------------------------------------------------------------------------------------


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
    global _active, _generator
    names = available_kernels()
    if name is None:
        _active = gf256_kernel_at(0)
    elif not isinstance(name, str):
        raise TypeError(f"the kernel's name must be str or None, not {type(name).__name__}")
    elif name in names:
        _active = gf256_kernel_at(names.index(name))
    else:
        raise ValueError(f"there is no kernel {name!r} on this machine, but only: {', '.join(names)}")
    _generator = gf256_generator_of(_active)
    return kernel_name()


def generator_name():
    """Return the name of the generator in force; see _fastshamir.pyi."""
    return _generator.name.decode("ascii")


def available_generators():
    """Return the names of the generators that this machine can run; see _fastshamir.pyi."""
    cdef const gf256_generator *generator
    cdef unsigned position = 0
    names = []
    while True:
        generator = gf256_generator_at(position)
        if generator == NULL:
            return tuple(names)
        names.append(generator.name.decode("ascii"))
        position += 1


def key_stream(name, seed, length, block=0):
    """Return the stream that a generator makes of a seed; see _fastshamir.pyi."""
    cdef tuple names = available_generators()
    cdef const gf256_generator *generator
    cdef gf256_stream stream
    cdef Py_buffer view
    cdef bytes made
    if name not in names:
        raise ValueError(f"there is no generator {name!r} on this machine, but only: {', '.join(names)}")
    generator = gf256_generator_at(names.index(name))
    made = PyBytes_FromStringAndSize(NULL, _small_int(length, "the length", 0, 2**30))
    _open(seed, &view, PyBUF_SIMPLE, "the seed")
    try:
        if view.len != GF256_SEED_BYTES:
            raise ValueError(f"the seed has {view.len} bytes, but needs {GF256_SEED_BYTES}")
        generator.start(&stream, <const uint8_t *>view.buf)
        stream.block = block
        generator.fill(&stream, <uint8_t *>PyBytes_AS_STRING(made), len(made))
        explicit_bzero(&stream, sizeof(stream))
    finally:
        PyBuffer_Release(&view)
    return made


gf256_init()
_aes_field = gf256_field_of(AES_POLY)
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
