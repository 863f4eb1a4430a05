# cython: boundscheck=False, wraparound=False, initializedcheck=False
# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Owns the calls of the PKCS#11 module that data and keys go through. It knows no slot, login, policy or error class.

python-pkcs11 keeps slots, tokens, sessions and login; the same module gives the same function list, so its handles work
here. Contracts are in _fasttoken.pyi. An operation is two calls of the module in one stretch without the interpreter's
lock, on memory that was there before. What held a plaintext that nobody asked to keep is overwritten.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pythread cimport (
    NOWAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
    PyThread_type_lock,
)
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

import os

from engine.errors import InvalidSignature, InvalidTag, TokenError
from engine.sharing import SecretBuffer


cdef extern from "pythread.h" nogil:
    const int PY_LOCK_ACQUIRED
    int PyThread_acquire_lock_timed(PyThread_type_lock lock, long long wait_us, int interruptible) noexcept

cdef extern from "string.h" nogil:
    void explicit_bzero(void *start, size_t length) noexcept

cdef extern from "dlfcn.h" nogil:
    const int RTLD_NOW
    const int RTLD_LOCAL
    void *dlopen(const char *path, int mode) noexcept
    void *dlsym(void *library, const char *name) noexcept
    char *dlerror() noexcept

cdef extern from "sys/random.h" nogil:
    ssize_t getrandom(void *out, size_t length, unsigned flags) noexcept

cdef extern from "sys/mman.h" nogil:
    const int PROT_READ
    const int PROT_WRITE
    const int MAP_PRIVATE
    const int MAP_ANONYMOUS
    const int MADV_WIPEONFORK
    void *MAP_FAILED
    void *mmap(void *place, size_t length, int protection, int flags, int file, long offset) noexcept
    int munmap(void *place, size_t length) noexcept
    int madvise(void *place, size_t length, int advice) noexcept

cdef extern from "time.h" nogil:
    const int CLOCK_MONOTONIC
    const int CLOCK_REALTIME
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now) noexcept


# --- PKCS#11 v2.40, as far as it is used; Linux packs these structures in C's own way -----------------------------------

ctypedef unsigned long ulong  # CK_ULONG, every handle, flag and type
ctypedef ulong (*ck_simple)(void *arguments) noexcept nogil
ctypedef ulong (*ck_init_token)(ulong slot, const void *pin, ulong pin_bytes, const void *label) noexcept nogil
ctypedef ulong (*ck_create)(ulong session, ck_attribute *attributes, ulong count, ulong *made) noexcept nogil
ctypedef ulong (*ck_destroy)(ulong session, ulong handle) noexcept nogil
ctypedef ulong (*ck_begin)(ulong session, const ck_mechanism *mechanism, ulong key) noexcept nogil
ctypedef ulong (*ck_transform)(ulong session, const void *data, ulong data_bytes, void *out,
                               ulong *out_bytes) noexcept nogil
ctypedef ulong (*ck_verify)(ulong session, const void *data, ulong data_bytes, const void *signature,
                            ulong signature_bytes) noexcept nogil
ctypedef ulong (*ck_random)(ulong session, void *out, ulong length) noexcept nogil

cdef struct ck_attribute:
    ulong type
    const void *value
    ulong length

cdef struct ck_mechanism:
    ulong mechanism
    void *parameter
    ulong length

cdef struct ck_gcm_params:
    const uint8_t *iv
    ulong iv_bytes
    ulong iv_bits
    const uint8_t *associated_data
    ulong associated_bytes
    ulong tag_bits

cdef struct ck_pss_params:
    ulong hash
    ulong mgf
    ulong salt_bytes

cdef struct ck_oaep_params:
    ulong hash
    ulong mgf
    ulong source
    void *source_data
    ulong source_bytes

cdef struct ck_initialize_args:
    void *mutex_functions[4]
    ulong flags
    void *reserved

# CK_FUNCTION_LIST down to the last function that is used (3.6; the order is that of the standard's pkcs11f.h).
cdef struct ck_functions:
    uint8_t version[2]
    ck_simple initialize
    ck_simple finalize
    void *from_get_info_to_get_mechanism_info[7]
    ck_init_token init_token
    void *from_init_pin_to_logout[10]
    ck_create create_object
    void *copy_object
    ck_destroy destroy_object
    void *from_get_object_size_to_find_objects_final[6]
    ck_begin encrypt_init
    ck_transform encrypt
    void *encrypt_update_and_final[2]
    ck_begin decrypt_init
    ck_transform decrypt
    void *from_decrypt_update_to_digest_final[7]
    ck_begin sign_init
    ck_transform sign
    void *from_sign_update_to_sign_recover[4]
    ck_begin verify_init
    ck_verify verify
    void *from_verify_update_to_seed_random[14]
    ck_random generate_random

ctypedef ulong (*ck_get_list)(ck_functions **functions) noexcept nogil

cdef enum:
    CKR_OK = 0
    CKR_SIGNATURE_INVALID = 0xC0
    CKR_SIGNATURE_LEN_RANGE = 0xC1
    CKR_BUFFER_TOO_SMALL = 0x150
    CKF_OS_LOCKING_OK = 2
    CKO_PUBLIC_KEY = 2
    CKO_PRIVATE_KEY = 3
    CKO_SECRET_KEY = 4
    CKK_RSA = 0
    CKK_EC = 3
    CKK_GENERIC_SECRET = 0x10
    CKK_AES = 0x1F
    CKK_EC_EDWARDS = 0x40
    CKM_RSA_PKCS = 1
    CKM_RSA_PKCS_OAEP = 9
    CKM_RSA_PKCS_PSS = 0xD
    CKM_SHA256 = 0x250
    CKM_SHA256_HMAC = 0x251
    CKM_SHA512_HMAC = 0x271
    CKM_ECDSA = 0x1041
    CKM_EDDSA = 0x1057
    CKM_AES_GCM = 0x1087
    CKG_MGF1_SHA256 = 2
    CKZ_DATA_SPECIFIED = 1
    CKA_CLASS = 0
    CKA_TOKEN = 1
    CKA_PRIVATE = 2
    CKA_VALUE = 0x11
    CKA_KEY_TYPE = 0x100
    CKA_SENSITIVE = 0x103
    CKA_ENCRYPT = 0x104
    CKA_DECRYPT = 0x105
    CKA_WRAP = 0x106
    CKA_UNWRAP = 0x107
    CKA_SIGN = 0x108
    CKA_SIGN_RECOVER = 0x109
    CKA_VERIFY = 0x10A
    CKA_VERIFY_RECOVER = 0x10B
    CKA_DERIVE = 0x10C
    CKA_MODULUS = 0x120
    CKA_PUBLIC_EXPONENT = 0x122
    CKA_PRIVATE_EXPONENT = 0x123
    CKA_EXTRACTABLE = 0x162
    CKA_EC_PARAMS = 0x180
    CKA_EC_POINT = 0x181

cdef dict _CODE_NAMES = {
    0x02: "CKR_HOST_MEMORY", 0x03: "CKR_SLOT_ID_INVALID", 0x05: "CKR_GENERAL_ERROR", 0x06: "CKR_FUNCTION_FAILED",
    0x07: "CKR_ARGUMENTS_BAD", 0x12: "CKR_ATTRIBUTE_TYPE_INVALID", 0x13: "CKR_ATTRIBUTE_VALUE_INVALID",
    0x20: "CKR_DATA_INVALID", 0x21: "CKR_DATA_LEN_RANGE", 0x30: "CKR_DEVICE_ERROR", 0x31: "CKR_DEVICE_MEMORY",
    0x32: "CKR_DEVICE_REMOVED", 0x40: "CKR_ENCRYPTED_DATA_INVALID", 0x41: "CKR_ENCRYPTED_DATA_LEN_RANGE",
    0x42: "CKR_AEAD_DECRYPT_FAILED", 0x54: "CKR_FUNCTION_NOT_SUPPORTED", 0x60: "CKR_KEY_HANDLE_INVALID",
    0x62: "CKR_KEY_SIZE_RANGE", 0x63: "CKR_KEY_TYPE_INCONSISTENT", 0x68: "CKR_KEY_FUNCTION_NOT_PERMITTED",
    0x70: "CKR_MECHANISM_INVALID", 0x71: "CKR_MECHANISM_PARAM_INVALID", 0x82: "CKR_OBJECT_HANDLE_INVALID",
    0x90: "CKR_OPERATION_ACTIVE", 0x91: "CKR_OPERATION_NOT_INITIALIZED", 0xA4: "CKR_PIN_LOCKED",
    0xB0: "CKR_SESSION_CLOSED", 0xB1: "CKR_SESSION_COUNT", 0xB3: "CKR_SESSION_HANDLE_INVALID",
    0xB5: "CKR_SESSION_READ_ONLY", 0xD0: "CKR_TEMPLATE_INCOMPLETE", 0xD1: "CKR_TEMPLATE_INCONSISTENT",
    0xE0: "CKR_TOKEN_NOT_PRESENT", 0xE1: "CKR_TOKEN_NOT_RECOGNIZED", 0x101: "CKR_USER_NOT_LOGGED_IN",
    0x150: "CKR_BUFFER_TOO_SMALL", 0x190: "CKR_CRYPTOKI_NOT_INITIALIZED",
}

# --- algorithms --------------------------------------------------------------------------------------------------------

cdef enum:
    NONCE_BYTES = 12
    TAG_BYTES = 16
    INPUT_MAX = 1 << 20       # of data, associated data and key material
    ROOM_MAX = INPUT_MAX + (1 << 16)
    ROOM_MIN = 4096
    NONCES = 21               # getrandom(2) gives up to 256 bytes whole, whatever signals come
    PAGE = 4096
    HALF_MAX = 48             # of an ECDSA signature: P-384
    DER_MAX = 2 + 2 * (2 + 1 + HALF_MAX)
    HMAC_BLOCK_MAX = 128
    HMAC_BYTES_MAX = 64
    RSA_PARTS = 8
    ATTRIBUTES_MAX = 24
    RANDOM_FAILED = -1        # beside the CKR codes, which are 32 bits wide
    WRONG_LENGTH = -2

cdef enum family:
    GCM, HMAC, ECDSA, EDDSA, PSS, PKCS1, OAEP

# The names of engine.keys -> family; bits of the key (RSA: of the modulus); bytes that are signed, 0 for any number.
cdef dict _ALGORITHMS = {
    "aes-128-gcm": (GCM, 128, 0),
    "aes-256-gcm": (GCM, 256, 0),
    "hmac-sha256": (HMAC, 256, 0),
    "hmac-sha512": (HMAC, 512, 0),
    "ecdsa-p256-sha256": (ECDSA, 256, 32),
    "ecdsa-p384-sha384": (ECDSA, 384, 48),
    "ed25519": (EDDSA, 256, 0),
    "rsa-2048-pss-sha256": (PSS, 2048, 32),
    "rsa-3072-pss-sha256": (PSS, 3072, 32),
    "rsa-4096-pss-sha256": (PSS, 4096, 32),
    "rsa-2048-pkcs1-sha256": (PKCS1, 2048, 32),
    "rsa-2048-oaep-sha256": (OAEP, 2048, 0),
}
ALGORITHM_NAMES = tuple(_ALGORITHMS)

cdef ck_pss_params _pss
_pss.hash, _pss.mgf, _pss.salt_bytes = CKM_SHA256, CKG_MGF1_SHA256, 32
cdef ck_oaep_params _oaep
_oaep.hash, _oaep.mgf, _oaep.source, _oaep.source_data = CKM_SHA256, CKG_MGF1_SHA256, CKZ_DATA_SPECIFIED, NULL
_oaep.source_bytes = 0

cdef const uint8_t *_NOTHING = b""  # where an empty buffer has no address: a NULL would ask for a length
cdef const uint8_t *_SHA256_DIGEST_INFO = (  # RFC 8017, 9.2, note 1
    b"\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"
)
cdef enum:
    DIGEST_INFO_BYTES = 19

# What comes before the point in a SubjectPublicKeyInfo (RFC 5480, 2; RFC 8410, 4), and the curve's parameters.
cdef const uint8_t *_P256_INFO = (
    b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04"
)
cdef const uint8_t *_P384_INFO = (
    b"\x30\x76\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22\x03\x62\x00\x04"
)
cdef const uint8_t *_ED25519_INFO = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00"
cdef const uint8_t *_P256 = b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07"
cdef const uint8_t *_P384 = b"\x06\x05\x2b\x81\x04\x00\x22"
cdef const uint8_t *_EDWARDS25519 = b"\x13\x0cedwards25519"  # PrintableString, PKCS#11 v3.0, 2.3.10

# A token's default for a use that is not named may be "yes" (SoftHSM's is), so every use is named.
cdef ulong[7] _SECRET_USES = [CKA_ENCRYPT, CKA_DECRYPT, CKA_SIGN, CKA_VERIFY, CKA_WRAP, CKA_UNWRAP, CKA_DERIVE]
cdef ulong[5] _PRIVATE_USES = [CKA_DECRYPT, CKA_SIGN, CKA_SIGN_RECOVER, CKA_UNWRAP, CKA_DERIVE]
cdef ulong[5] _PUBLIC_USES = [CKA_ENCRYPT, CKA_VERIFY, CKA_VERIFY_RECOVER, CKA_WRAP, CKA_DERIVE]
cdef uint8_t _YES = 1
cdef uint8_t _NO = 0


class CallError(Exception):
    """A function of the module did not return CKR_OK, or something of another length than it has to."""

    def __init__(self, function, code, detail=""):
        super().__init__(function, code, detail)
        self.function = function
        self.code = code
        self.detail = detail

    def __str__(self):
        if self.detail:
            return f"{self.function} {self.detail}"
        name = _CODE_NAMES.get(self.code)
        return f"{self.function} returned {f'{name} (0x{self.code:08x})' if name else f'0x{self.code:08x}'}"


cdef int _failed(const char *function, ulong code, size_t got=0, size_t expected=0) except -1:
    name = function.decode("ascii")
    if code == <ulong>RANDOM_FAILED:
        raise OSError(errno, f"{name} gave no random bytes: {os.strerror(errno)}")
    if code == <ulong>WRONG_LENGTH:
        raise CallError(name, CKR_OK, f"gave {got} bytes, but {expected} are expected")
    raise CallError(name, code)


# --- buffers -----------------------------------------------------------------------------------------------------------

cdef struct buffers:  # what a call was given; all are open until it ends
    Py_buffer view[4]
    int count


cdef const uint8_t *_read(buffers *given, object data, str what, size_t *length) except NULL:
    cdef Py_buffer *view = &given.view[given.count]
    PyObject_GetBuffer(data, view, PyBUF_SIMPLE)
    given.count += 1
    if view.len > INPUT_MAX:
        raise ValueError(f"{view.len} bytes of {what}, the limit is {INPUT_MAX}")
    length[0] = view.len
    return <const uint8_t *>view.buf if view.len else _NOTHING


cdef uint8_t *_write(buffers *given, object out, size_t needed, size_t *length) except NULL:
    """Open what is written to; it must have room for what is needed, and lie apart from what was opened before."""
    cdef Py_buffer *view = &given.view[given.count]
    cdef Py_buffer *other
    cdef int i
    PyObject_GetBuffer(out, view, PyBUF_WRITABLE)
    given.count += 1
    if <size_t>view.len < needed:
        raise ValueError(f"the output has room for {view.len} bytes, {needed} are needed")
    for i in range(given.count - 1):
        other = &given.view[i]
        if <char *>view.buf < <char *>other.buf + other.len and <char *>other.buf < <char *>view.buf + view.len:
            raise ValueError("the output overlaps an input")
    length[0] = view.len
    return <uint8_t *>view.buf if view.len else <uint8_t *>_NOTHING


cdef void _release(buffers *given) noexcept:
    while given.count:
        given.count -= 1
        PyBuffer_Release(&given.view[given.count])


cdef struct room:  # of a session; its contents never outlast a call
    uint8_t *start
    size_t length


cdef int _grow(room *place, size_t needed) noexcept nogil:
    """Have so many bytes. Fails beyond ROOM_MAX and where there is no memory."""
    cdef size_t length = place.length or ROOM_MIN
    cdef uint8_t *start
    if needed <= place.length:
        return 0
    if needed > ROOM_MAX:
        return -1
    while length < needed:
        length *= 2
    start = <uint8_t *>malloc(length)
    if start == NULL:
        return -1
    free(place.start)
    place.start, place.length = start, length
    return 0


# --- DER (X.690) -------------------------------------------------------------------------------------------------------


cdef size_t _put_integer(uint8_t *out, const uint8_t *number, size_t length) noexcept nogil:
    """A non-negative big-endian number as a DER INTEGER of less than 128 bytes; how many bytes it took."""
    cdef size_t sign
    while length > 1 and not number[0]:
        number += 1
        length -= 1
    sign = number[0] >> 7
    out[0], out[1], out[2] = 2, <uint8_t>(length + sign), 0
    memcpy(out + 2 + sign, number, length)
    return 2 + sign + length


cdef size_t _put_signature(uint8_t *out, const uint8_t *raw, size_t half) noexcept nogil:
    """r || s as an Ecdsa-Sig-Value (RFC 3279, 2.2.3), shorter than 130 bytes; how many it took."""
    cdef size_t length = _put_integer(out + 2, raw, half)
    length += _put_integer(out + 2 + length, raw + half, half)
    out[0], out[1] = 0x30, <uint8_t>length
    return 2 + length


cdef size_t _get_element(const uint8_t *data, size_t length, uint8_t tag, size_t *value) noexcept nogil:
    """Where the value of the first element begins and, in ``value``, how long it is; 0 if it is not that, or no DER."""
    cdef size_t begin = 2, size
    if length < 2 or data[0] != tag:
        return 0
    size = data[1]
    if size == 0x81:
        if length < 3 or data[2] < 0x80:
            return 0
        begin, size = 3, data[2]
    elif size == 0x82:
        if length < 4 or not data[2]:
            return 0
        begin, size = 4, (<size_t>data[2] << 8) | data[3]
    elif size >= 0x80:
        return 0
    if size > length - begin:
        return 0
    value[0] = size
    return begin


cdef size_t _get_integer(const uint8_t *data, size_t length, const uint8_t **number, size_t *size) noexcept nogil:
    """A non-negative INTEGER without the octet of its sign, and how many bytes it took; 0 if it is none."""
    cdef size_t begin = _get_element(data, length, 2, size)
    if not begin or not size[0] or data[begin] & 0x80:
        return 0
    number[0] = data + begin
    if size[0] > 1 and not data[begin]:
        if not data[begin + 1] & 0x80:
            return 0
        number[0] += 1
        size[0] -= 1
        return begin + size[0] + 1
    return begin + size[0]


cdef bint _get_signature(const uint8_t *der, size_t length, uint8_t *raw, size_t half) noexcept nogil:
    """r || s of an Ecdsa-Sig-Value; false if it is none, or a number does not fit."""
    cdef const uint8_t *number
    cdef size_t size, taken, i
    cdef size_t begin = _get_element(der, length, 0x30, &size)
    if not begin or begin + size != length:
        return False
    der, length = der + begin, size
    for i in range(2):
        taken = _get_integer(der, length, &number, &size)
        if not taken or size > half:
            return False
        explicit_bzero(raw + i * half, half - size)
        memcpy(raw + (i + 1) * half - size, number, size)
        der, length = der + taken, length - taken
    return not length


cdef bint _get_rsa(const uint8_t *der, size_t length, ck_attribute *parts) noexcept nogil:
    """The eight numbers of a two-prime RSAPrivateKey (RFC 8017, A.1.2) as attributes, in its order; false if none."""
    cdef const uint8_t *number
    cdef size_t size, taken
    cdef int i
    cdef size_t begin = _get_element(der, length, 0x30, &size)
    if not begin or begin + size != length:
        return False
    der, length = der + begin, size
    for i in range(-1, RSA_PARTS):
        taken = _get_integer(der, length, &number, &size)
        if not taken or (i < 0 and (size != 1 or number[0])):  # the version is 0
            return False
        der, length = der + taken, length - taken
        if i >= 0:
            # CKA_MODULUS is 0x120, and 0x121 is its length in bits, for keys that are yet to be made.
            parts[i].type = CKA_MODULUS if i == 0 else CKA_PUBLIC_EXPONENT + i - 1
            parts[i].value, parts[i].length = number, size
    return not length


def ecdsa_to_der(raw, /):
    """r || s as DER."""
    cdef buffers given
    cdef uint8_t[DER_MAX] der
    cdef size_t length = 0
    cdef const uint8_t *data
    given.count = 0
    try:
        data = _read(&given, raw, "the signature", &length)
        if length % 2 or not 2 <= length <= 2 * HALF_MAX:
            raise ValueError(f"a signature of {length} bytes, but an even number up to {2 * HALF_MAX} is needed")
        return PyBytes_FromStringAndSize(<char *>der, _put_signature(der, data, length // 2))
    finally:
        _release(&given)


def ecdsa_from_der(der, half, /):
    """r || s, or None."""
    cdef buffers given
    cdef uint8_t[2 * HALF_MAX] raw
    cdef size_t length = 0, size = half
    cdef const uint8_t *data
    if not 1 <= size <= HALF_MAX:
        raise ValueError(f"numbers of {size} bytes, but 1..{HALF_MAX} is possible")
    given.count = 0
    try:
        data = _read(&given, der, "the signature", &length)
        if not _get_signature(data, length, raw, size):
            return None
        return PyBytes_FromStringAndSize(<char *>raw, 2 * size)
    finally:
        _release(&given)


def rsa_from_der(der, /):
    """Where the numbers are, or None."""
    cdef buffers given
    cdef ck_attribute[RSA_PARTS] parts
    cdef size_t length = 0
    cdef const uint8_t *data
    given.count = 0
    try:
        data = _read(&given, der, "the key", &length)
        if not _get_rsa(data, length, parts):
            return None
        return [(<const uint8_t *>parts[i].value - data, parts[i].length) for i in range(RSA_PARTS)]
    finally:
        _release(&given)


# --- nonces ------------------------------------------------------------------------------------------------------------

cdef struct reserve:  # drawn ahead, as the system call takes a fifth of an encryption's time
    int left
    uint8_t nonces[NONCES * NONCE_BYTES]


cdef reserve *_make_reserve() noexcept:
    """A page that a forked child finds empty, so that it never repeats its parent's nonces; NULL if there is none."""
    cdef void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if page == MAP_FAILED:
        return NULL
    if madvise(page, PAGE, MADV_WIPEONFORK) != 0:
        munmap(page, PAGE)
        return NULL
    return <reserve *>page


cdef int _draw_nonce(reserve *ahead, uint8_t *nonce) noexcept nogil:
    """96 random bits. The time is mixed in: copies of a virtual machine have the same reserve, but never the same time."""
    cdef timespec now
    cdef int64_t *half
    cdef int64_t mixed
    if not ahead.left:
        if getrandom(ahead.nonces, sizeof(ahead.nonces), 0) != sizeof(ahead.nonces):
            return -1
        ahead.left = NONCES
    ahead.left -= 1
    memcpy(nonce, ahead.nonces + ahead.left * NONCE_BYTES, NONCE_BYTES)
    explicit_bzero(ahead.nonces + ahead.left * NONCE_BYTES, NONCE_BYTES)
    clock_gettime(CLOCK_REALTIME, &now)
    memcpy(&mixed, nonce + 4, sizeof(mixed))
    mixed ^= now.tv_sec * <int64_t>1000000000 + now.tv_nsec
    memcpy(nonce + 4, &mixed, sizeof(mixed))
    return 0


# --- the module --------------------------------------------------------------------------------------------------------


@cython.final
@cython.auto_pickle(False)
cdef class Module:
    """The function list of a PKCS#11 module; see _fasttoken.pyi."""

    cdef ck_functions *functions

    def __cinit__(self, path, /):
        cdef bytes name = os.fsencode(path)
        cdef const char *file = name
        cdef void *library
        cdef ck_get_list get
        cdef ulong code
        with nogil:
            library = dlopen(file, RTLD_NOW | RTLD_LOCAL)
        if library == NULL:
            raise OSError(f"the PKCS#11 module can't be loaded: {dlerror().decode('utf-8', 'replace')}")
        get = <ck_get_list>dlsym(library, b"C_GetFunctionList")
        if get == NULL:
            raise OSError(f"{path} is no PKCS#11 module: it has no C_GetFunctionList")
        with nogil:
            code = get(&self.functions)
        if code != CKR_OK:
            _failed(b"C_GetFunctionList", code)
        # It stays loaded as long as the process lives: python-pkcs11 has it open as well.
        if self.functions == NULL or self.functions.version[0] < 2:
            raise OSError(f"{path} has no functions of PKCS#11 v2 or newer")

    def initialize(self):
        """C_Initialize for several threads."""
        cdef ck_initialize_args arguments
        cdef ulong code
        explicit_bzero(&arguments, sizeof(arguments))
        arguments.flags = CKF_OS_LOCKING_OK
        with nogil:
            code = self.functions.initialize(&arguments)
        if code != CKR_OK:
            _failed(b"C_Initialize", code)

    def finalize(self):
        """C_Finalize."""
        cdef ulong code
        with nogil:
            code = self.functions.finalize(NULL)
        if code != CKR_OK:
            _failed(b"C_Finalize", code)

    def init_token(self, slot, so_pin, label, /):
        """C_InitToken."""
        cdef bytes pin = so_pin.encode()
        cdef bytes padded = label.encode().ljust(32)
        cdef const char *pin_start = pin
        cdef const char *label_start = padded
        cdef ulong where = slot, pin_bytes = len(pin), code
        if len(padded) != 32:
            raise ValueError(f"a label of {len(padded)} bytes, the limit is 32")
        with nogil:
            code = self.functions.init_token(where, pin_start, pin_bytes, label_start)
        if code != CKR_OK:
            _failed(b"C_InitToken", code)


@cython.final
@cython.auto_pickle(False)
cdef class Key:
    """Handles of a key in the token, and what is needed to use them; see _fasttoken.pyi."""

    cdef readonly str algorithm
    cdef readonly ulong private
    cdef readonly ulong public
    cdef family kind
    cdef size_t result_bytes   # of a signature (ECDSA: r || s), a MAC, or an RSA block
    cdef size_t signed_bytes   # that a signature is over; 0: any number
    cdef ck_mechanism mechanism

    def __init__(self):
        raise TypeError("keys come from a session")

    @property
    def result_max(self):
        """Length of the longest signature, of a MAC, or of an RSA block."""
        return self.longest()

    cdef size_t longest(self) noexcept:
        return 2 + 2 * (3 + self.result_bytes // 2) if self.kind == ECDSA else self.result_bytes


cdef Key _key(str algorithm, ulong rsa_bits):
    cdef Key made
    cdef ulong bits
    row = _ALGORITHMS.get(algorithm)
    if row is None:
        raise ValueError(f"unknown algorithm {algorithm[:80]!r}")
    made = Key.__new__(Key)
    made.algorithm = algorithm
    made.kind, bits, made.signed_bytes = row
    if made.kind == GCM:
        made.mechanism.mechanism = CKM_AES_GCM
    elif made.kind == HMAC:
        made.mechanism.mechanism = CKM_SHA256_HMAC if bits == 256 else CKM_SHA512_HMAC
        made.result_bytes = bits // 8
    elif made.kind == ECDSA:
        made.mechanism.mechanism = CKM_ECDSA
        made.result_bytes = bits // 4
    elif made.kind == EDDSA:
        made.mechanism.mechanism = CKM_EDDSA
        made.result_bytes = 64
    else:
        made.result_bytes = (rsa_bits or bits) // 8
        if made.kind == PSS:
            made.mechanism.mechanism = CKM_RSA_PKCS_PSS
            made.mechanism.parameter, made.mechanism.length = &_pss, sizeof(_pss)
        elif made.kind == PKCS1:
            made.mechanism.mechanism = CKM_RSA_PKCS
        else:
            made.mechanism.mechanism = CKM_RSA_PKCS_OAEP
            made.mechanism.parameter, made.mechanism.length = &_oaep, sizeof(_oaep)
    return made


# --- templates ---------------------------------------------------------------------------------------------------------


cdef struct template:
    ck_attribute rows[ATTRIBUTES_MAX]
    ulong count
    ulong object_class
    ulong key_type


cdef void _begin(template *made, ulong object_class, ulong key_type) noexcept:
    made.object_class, made.key_type, made.count = object_class, key_type, 0
    _add(made, CKA_CLASS, &made.object_class, sizeof(ulong))
    _add(made, CKA_KEY_TYPE, &made.key_type, sizeof(ulong))
    _say(made, CKA_TOKEN, False)
    if object_class != CKO_PUBLIC_KEY:
        _say(made, CKA_PRIVATE, True)
        _say(made, CKA_SENSITIVE, True)
        _say(made, CKA_EXTRACTABLE, False)


cdef void _add(template *made, ulong kind, const void *value, ulong length) noexcept:
    made.rows[made.count].type, made.rows[made.count].value, made.rows[made.count].length = kind, value, length
    made.count += 1


cdef void _say(template *made, ulong kind, bint value) noexcept:
    _add(made, kind, &_YES if value else &_NO, 1)


cdef void _allow(template *made, const ulong *uses, int count, ulong first, ulong second) noexcept:
    """Name every use, and allow these two."""
    cdef int i
    for i in range(count):
        _say(made, uses[i], uses[i] == first or uses[i] == second)


# --- sessions ----------------------------------------------------------------------------------------------------------


@cython.final
@cython.auto_pickle(False)
cdef class Session:
    """A session of the token, and the memory that its operations use; see _fasttoken.pyi."""

    cdef Module module
    cdef ck_functions *functions
    cdef readonly ulong handle
    cdef readonly ulong made
    cdef bint busy
    cdef room work          # plaintexts
    cdef room spare         # what a token wanted more room for than there was
    cdef room joined        # a header with the associated data that follows it
    cdef reserve *ahead     # NULL where it can't be kept from a forked child
    cdef ck_gcm_params gcm
    cdef ck_mechanism gcm_mechanism

    def __cinit__(self, Module module not None, handle, /):
        self.module = module
        self.functions = module.functions
        self.handle = handle
        self.ahead = _make_reserve()
        self.gcm.iv_bytes, self.gcm.iv_bits, self.gcm.tag_bits = NONCE_BYTES, NONCE_BYTES * 8, TAG_BYTES * 8
        self.gcm_mechanism.mechanism = CKM_AES_GCM
        self.gcm_mechanism.parameter, self.gcm_mechanism.length = &self.gcm, sizeof(self.gcm)

    def __dealloc__(self):
        free(self.work.start)
        free(self.spare.start)
        free(self.joined.start)
        if self.ahead != NULL:
            munmap(self.ahead, PAGE)

    cdef int _enter(self) except -1:
        """Two threads in one session would overwrite each other's memory; the lock of its owner prevents that."""
        if self.busy:
            raise RuntimeError("the session is in use by another thread")
        self.busy = True
        return 0

    # --- keys ---

    def adopt(self, str algorithm not None, private, public=0, /):
        """A key that is in the token already."""
        cdef Key key = _key(algorithm, 0)
        key.private, key.public = private, public
        return key

    def load(self, str algorithm not None, material, public_key=b"", /, *, rsa_bits=0):
        """C_CreateObject of a key, and of its public half."""
        cdef Key key = _key(algorithm, rsa_bits)
        cdef buffers given
        cdef template secret, public
        cdef const uint8_t *value
        cdef size_t length = 0
        cdef uint8_t[2 + 2 * HALF_MAX + 1] point
        cdef ulong code
        cdef bint pair = key.kind != GCM and key.kind != HMAC
        padded = None
        public.count = 0
        given.count = 0
        self._enter()
        try:
            value = _read(&given, material, "key material", &length)
            if key.kind == HMAC and length < HMAC_BLOCK_MAX:
                # Zeros up to the block change no MAC (RFC 2104, 2), and tokens refuse keys shorter than the hash.
                if not length:
                    raise ValueError("an empty key")
                padded = SecretBuffer(max(length, key.result_bytes * 2))
                padded.add(material)
                value = _read(&given, padded, "key material", &length)
            code = self._load(key, &given, value, length, public_key, &secret, &public, point, pair)
            if code != CKR_OK:
                _failed(b"C_CreateObject", code)
        finally:
            _release(&given)
            if padded is not None:
                padded.close()
            self.busy = False
        return key

    cdef ulong _load(self, Key key, buffers *given, const uint8_t *value, size_t length, object public_key,
                     template *secret, template *public, uint8_t *point, bint pair) except? 7:
        cdef ulong code
        if key.kind == GCM or key.kind == HMAC:
            self._describe_secret(key, value, length, secret)
        elif key.kind == ECDSA or key.kind == EDDSA:
            self._describe_curve(key, given, value, length, public_key, secret, public, point)
        else:
            self._describe_rsa(key, value, length, secret, public)
        with nogil:
            code = self.functions.create_object(self.handle, secret.rows, secret.count, &key.private)
            if code == CKR_OK:
                self.made += 1
                if pair:
                    code = self.functions.create_object(self.handle, public.rows, public.count, &key.public)
                    if code == CKR_OK:
                        self.made += 1
                    else:
                        self.functions.destroy_object(self.handle, key.private)
        return code

    cdef int _describe_secret(self, Key key, const uint8_t *value, size_t length, template *secret) except -1:
        cdef bint is_aes = key.kind == GCM
        cdef size_t bits = _ALGORITHMS[key.algorithm][1]
        if is_aes and length * 8 != bits:
            raise ValueError(f"{length} bytes, {bits // 8} are needed")
        _begin(secret, CKO_SECRET_KEY, CKK_AES if is_aes else CKK_GENERIC_SECRET)
        _add(secret, CKA_VALUE, value, length)
        _allow(secret, _SECRET_USES, 7, CKA_ENCRYPT if is_aes else CKA_SIGN, CKA_DECRYPT if is_aes else CKA_VERIFY)
        return 0

    cdef int _describe_curve(self, Key key, buffers *given, const uint8_t *value, size_t length, object public_key,
                             template *secret, template *public, uint8_t *point) except -1:
        """The public key is a SubjectPublicKeyInfo with an uncompressed point, of which there is one encoding."""
        cdef const uint8_t *info
        cdef const uint8_t *before
        cdef const uint8_t *curve
        cdef size_t info_length = 0, before_length, point_length, needed, curve_length
        if key.kind == EDDSA:
            before, before_length, needed, point_length = _ED25519_INFO, 12, 32, 32
            curve, curve_length = _EDWARDS25519, 14
        elif key.result_bytes == 64:
            before, before_length, needed, point_length = _P256_INFO, 27, 32, 65
            curve, curve_length = _P256, 10
        else:
            before, before_length, needed, point_length = _P384_INFO, 24, 48, 97
            curve, curve_length = _P384, 7
        if length != needed:
            raise ValueError(f"{length} bytes, {needed} are needed")
        info = _read(given, public_key, "public key", &info_length)
        if key.kind == ECDSA:
            before_length -= 1  # the last byte, 04 for an uncompressed point, is a part of it
        if (info_length != before_length + point_length
                or memcmp(info, before, before_length + (key.kind == ECDSA)) != 0):
            raise ValueError(f"its public key is none of {key.algorithm}")
        point[0], point[1] = 4, <uint8_t>point_length  # CKA_EC_POINT is a DER OCTET STRING
        memcpy(point + 2, info + before_length, point_length)
        _begin(secret, CKO_PRIVATE_KEY, CKK_EC_EDWARDS if key.kind == EDDSA else CKK_EC)
        _add(secret, CKA_EC_PARAMS, curve, curve_length)
        _add(secret, CKA_VALUE, value, length)
        _allow(secret, _PRIVATE_USES, 5, CKA_SIGN, CKA_SIGN)
        _begin(public, CKO_PUBLIC_KEY, CKK_EC_EDWARDS if key.kind == EDDSA else CKK_EC)
        _add(public, CKA_EC_PARAMS, curve, curve_length)
        _add(public, CKA_EC_POINT, point, 2 + point_length)
        _allow(public, _PUBLIC_USES, 5, CKA_VERIFY, CKA_VERIFY)
        return 0

    cdef int _describe_rsa(self, Key key, const uint8_t *value, size_t length, template *secret,
                           template *public) except -1:
        cdef ck_attribute[RSA_PARTS] parts
        cdef bint encrypts = key.kind == OAEP
        cdef int i
        if not _get_rsa(value, length, parts):
            raise ValueError("it is no DER RSAPrivateKey of two primes")
        if parts[0].length != key.result_bytes or not (<const uint8_t *>parts[0].value)[0] & 0x80:
            raise ValueError(f"its modulus has not {key.result_bytes * 8} bits")
        _begin(secret, CKO_PRIVATE_KEY, CKK_RSA)
        _begin(public, CKO_PUBLIC_KEY, CKK_RSA)
        for i in range(RSA_PARTS):
            _add(secret, parts[i].type, parts[i].value, parts[i].length)
            if i < 2:
                _add(public, parts[i].type, parts[i].value, parts[i].length)
        i = CKA_DECRYPT if encrypts else CKA_SIGN
        _allow(secret, _PRIVATE_USES, 5, i, i)
        i = CKA_ENCRYPT if encrypts else CKA_VERIFY
        _allow(public, _PUBLIC_USES, 5, i, i)
        return 0

    def destroy(self, Key key not None, /):
        """C_DestroyObject of all that a key has."""
        cdef ulong private, public, code = CKR_OK, other = CKR_OK
        self._enter()
        private, public = key.private, key.public
        key.private = key.public = 0
        try:
            with nogil:
                if private:
                    code = self.functions.destroy_object(self.handle, private)
                if public:
                    other = self.functions.destroy_object(self.handle, public)
        finally:
            self.busy = False
        if code != CKR_OK or other != CKR_OK:
            _failed(b"C_DestroyObject", code or other)

    # --- operations ---

    cdef ulong _transform(self, ck_transform call, const uint8_t *data, size_t length, uint8_t *out, size_t capacity,
                          size_t *taken) noexcept nogil:
        """One call that gives data out. A token that wants more room than the result takes is given ours."""
        cdef ulong got = capacity
        cdef ulong code = call(self.handle, data, length, out, &got)
        if code == CKR_BUFFER_TOO_SMALL:  # and the operation goes on
            if _grow(&self.spare, got if got > capacity else capacity + ROOM_MIN) == 0:
                got = self.spare.length
                code = call(self.handle, data, length, self.spare.start, &got)
                if code == CKR_OK and got <= capacity:
                    memcpy(out, self.spare.start, got)
                explicit_bzero(self.spare.start, self.spare.length)
        taken[0] = got
        return <ulong>WRONG_LENGTH if code == CKR_OK and got > capacity else code

    cdef int _associate(self, const uint8_t *header, size_t header_length, const uint8_t *data,
                        size_t length) except -1:
        """Header and data, one after the other, are what the next operation authenticates."""
        if header_length and length:
            if _grow(&self.joined, header_length + length) != 0:
                raise MemoryError(f"no memory for {header_length + length} bytes of associated data")
            memcpy(self.joined.start, header, header_length)
            memcpy(self.joined.start + header_length, data, length)
            data = self.joined.start
        elif header_length:
            data = header
        self.gcm.associated_data, self.gcm.associated_bytes = data, header_length + length
        return 0

    cdef int _nonce(self, uint8_t *out) noexcept nogil:
        if self.ahead != NULL:
            return _draw_nonce(self.ahead, out)
        if getrandom(out, NONCE_BYTES, 0) != NONCE_BYTES:
            return -1
        return 0

    def encrypt(self, Key key not None, plaintext, associated_data=b"", header=b"", /):
        """AES-GCM or RSA-OAEP into fresh bytes."""
        return self._encrypt(key, plaintext, associated_data, header, None)

    def encrypt_into(self, Key key not None, plaintext, associated_data, header, out, /):
        """The same into a buffer."""
        if out is None:
            raise TypeError("the output must be a writable buffer, not None")
        return self._encrypt(key, plaintext, associated_data, header, out)

    cdef object _encrypt(self, Key key, object plaintext, object associated_data, object header, object out):
        cdef buffers given
        cdef bytes made = None
        cdef span plain, associated, before
        cdef uint8_t *sink
        cdef size_t needed, room_length = 0
        given.count = 0
        self._enter()
        try:
            plain.start = _read(&given, plaintext, "plaintext", &plain.length)
            associated.start = _read(&given, associated_data, "associated data", &associated.length)
            before.start = _read(&given, header, "header", &before.length)
            needed = self._encrypted_bytes(key, &plain, &associated, &before)
            if out is None:
                made = PyBytes_FromStringAndSize(NULL, needed)
                sink = <uint8_t *>PyBytes_AS_STRING(made)
            else:
                sink = _write(&given, out, needed, &room_length)
            self._encrypt_at(key, &plain, &associated, &before, sink, needed)
        finally:
            _release(&given)
            self.busy = False
        return needed if made is None else made

    cdef size_t _encrypted_bytes(self, Key key, const span *plain, const span *associated,
                                 const span *before) except 0:
        """How long the result is."""
        if key.kind == GCM:
            return before.length + NONCE_BYTES + plain.length + TAG_BYTES
        if key.kind != OAEP:
            raise ValueError(f"{key.algorithm} does not encrypt")
        if associated.length or before.length:
            raise ValueError(f"{key.algorithm} takes no associated data and no header")
        return key.result_bytes

    cdef int _encrypt_at(self, Key key, const span *plain, const span *associated, const span *before, uint8_t *sink,
                         size_t needed) except -1:
        cdef size_t skipped = 0, taken = 0
        cdef ulong code, handle = key.public
        cdef ck_mechanism *mechanism = &key.mechanism
        cdef const char *function = b"C_EncryptInit"
        if key.kind == GCM:
            self._associate(before.start, before.length, associated.start, associated.length)
            memcpy(sink, before.start, before.length)
            mechanism, handle, skipped = &self.gcm_mechanism, key.private, before.length + NONCE_BYTES
            self.gcm.iv = sink + before.length
        with nogil:
            if skipped and self._nonce(sink + before.length) != 0:
                code, function = <ulong>RANDOM_FAILED, b"getrandom"
            else:
                code = self.functions.encrypt_init(self.handle, mechanism, handle)
                if code == CKR_OK:
                    function = b"C_Encrypt"
                    code = self._transform(self.functions.encrypt, plain.start, plain.length, sink + skipped,
                                           needed - skipped, &taken)
                    if code == CKR_OK and taken != needed - skipped:
                        code = <ulong>WRONG_LENGTH
        if code != CKR_OK:
            _failed(function, code, taken, needed - skipped)
        return 0

    def decrypt(self, Key key not None, ciphertext, associated_data=b"", header=b"", /):
        """The plaintext of AES-GCM or RSA-OAEP in fresh bytes."""
        return self._decrypt(key, ciphertext, associated_data, header, None)

    def decrypt_into(self, Key key not None, ciphertext, associated_data, header, out, /):
        """The same into a buffer."""
        if out is None:
            raise TypeError("the output must be a writable buffer, not None")
        return self._decrypt(key, ciphertext, associated_data, header, out)

    cdef object _decrypt(self, Key key, object ciphertext, object associated_data, object header, object out):
        cdef buffers given
        cdef span sealed, associated, before
        cdef uint8_t *sink = NULL
        cdef uint8_t *used
        cdef size_t taken, wanted, room_length = 0
        given.count = 0
        self._enter()
        try:
            sealed.start = _read(&given, ciphertext, "ciphertext", &sealed.length)
            associated.start = _read(&given, associated_data, "associated data", &associated.length)
            before.start = _read(&given, header, "header", &before.length)
            wanted = self._opening(key, &sealed, &associated, &before)
            if out is not None:
                sink = _write(&given, out, sealed.length - TAG_BYTES if key.kind == GCM else 0, &room_length)
            if room_length >= wanted:
                used = sink
            elif _grow(&self.work, wanted) != 0:
                raise MemoryError(f"no memory for {wanted} bytes of plaintext")
            else:
                used = self.work.start
            taken = self._decrypt_at(key, &sealed, used, wanted)
            if used == sink:
                return taken
            try:
                if out is None:
                    return PyBytes_FromStringAndSize(<char *>used, taken)
                if taken > room_length:
                    raise ValueError(f"the output has room for {room_length} bytes, {taken} are needed")
                memcpy(sink, used, taken)
                return taken
            finally:
                explicit_bzero(used, taken)
        finally:
            _release(&given)
            self.busy = False

    cdef size_t _opening(self, Key key, span *sealed, const span *associated, const span *before) except 0:
        """Go to what is deciphered: how much room that takes. SoftHSM asks for as much as there is ciphertext with tag."""
        if key.kind == GCM:
            if sealed.length < before.length + NONCE_BYTES + TAG_BYTES:
                raise InvalidTag(f"a ciphertext of {sealed.length} bytes is too short")
            if memcmp(sealed.start, before.start, before.length) != 0:
                raise InvalidTag("the ciphertext does not begin with its header")
            self._associate(before.start, before.length, associated.start, associated.length)
            self.gcm.iv = sealed.start + before.length
            sealed.start += before.length + NONCE_BYTES
            sealed.length -= before.length + NONCE_BYTES
            return sealed.length
        if key.kind != OAEP:
            raise ValueError(f"{key.algorithm} does not decrypt")
        if associated.length or before.length:
            raise ValueError(f"{key.algorithm} takes no associated data and no header")
        return key.result_bytes

    cdef size_t _decrypt_at(self, Key key, const span *sealed, uint8_t *used, size_t wanted) except <size_t>-1:
        """Decipher into memory of ``wanted`` bytes; how many of them are plaintext. The others are overwritten."""
        cdef size_t taken = 0
        cdef ulong code
        cdef ck_mechanism *mechanism = &self.gcm_mechanism if key.kind == GCM else &key.mechanism
        cdef const char *function = b"C_DecryptInit"
        with nogil:
            code = self.functions.decrypt_init(self.handle, mechanism, key.private)
            if code == CKR_OK:
                function = b"C_Decrypt"
                code = self._transform(self.functions.decrypt, sealed.start, sealed.length, used, wanted, &taken)
                if code == CKR_OK and key.kind == GCM and taken != sealed.length - TAG_BYTES:
                    code = <ulong>WRONG_LENGTH
        if code != CKR_OK:
            explicit_bzero(used, wanted)
            _failed(function, code, taken, sealed.length - TAG_BYTES if key.kind == GCM else wanted)
        explicit_bzero(used + taken, wanted - taken)
        return taken

    def sign(self, Key key not None, data, /):
        """A signature or MAC in fresh bytes."""
        return self._sign(key, data, None)

    def sign_into(self, Key key not None, data, out, /):
        """The same into a buffer."""
        if out is None:
            raise TypeError("the output must be a writable buffer, not None")
        return self._sign(key, data, out)

    cdef int _to_sign(self, Key key, span *message, uint8_t *room) except -1:
        """What the token signs for this message."""
        if key.kind == GCM or key.kind == OAEP:
            raise ValueError(f"{key.algorithm} does not sign")
        if key.signed_bytes and message.length != key.signed_bytes:
            raise ValueError(f"{key.algorithm} signs a digest of {key.signed_bytes} bytes, not of {message.length}")
        if key.kind == PKCS1:
            memcpy(room, _SHA256_DIGEST_INFO, DIGEST_INFO_BYTES)
            memcpy(room + DIGEST_INFO_BYTES, message.start, message.length)
            message.start = room
            message.length += DIGEST_INFO_BYTES
        return 0

    cdef object _sign(self, Key key, object data, object out):
        cdef buffers given
        cdef bytes made = None
        cdef span message
        cdef uint8_t[DER_MAX] der
        cdef uint8_t *sink
        cdef size_t taken, room_length = 0
        given.count = 0
        self._enter()
        try:
            message.start = _read(&given, data, "data to sign", &message.length)
            if out is not None:
                sink = _write(&given, out, key.result_max, &room_length)
            elif key.kind == ECDSA:
                sink = der
            else:
                made = PyBytes_FromStringAndSize(NULL, key.result_bytes)
                sink = <uint8_t *>PyBytes_AS_STRING(made)
            taken = self._sign_at(key, &message, sink)
            if out is not None:
                return taken
            return PyBytes_FromStringAndSize(<char *>der, taken) if made is None else made
        finally:
            _release(&given)
            self.busy = False

    cdef size_t _sign_at(self, Key key, span *message, uint8_t *sink) except 0:
        """Sign into memory of ``key.result_max`` bytes; how many of them the signature has."""
        cdef uint8_t[2 * HALF_MAX] raw
        cdef uint8_t[DIGEST_INFO_BYTES + 32] prefixed
        cdef bint is_ecdsa = key.kind == ECDSA
        cdef uint8_t *signature = sink
        cdef size_t taken = 0, needed = key.result_bytes
        cdef ulong code
        cdef const char *function = b"C_SignInit"
        if is_ecdsa:
            signature = raw
        self._to_sign(key, message, prefixed)
        with nogil:
            code = self.functions.sign_init(self.handle, &key.mechanism, key.private)
            if code == CKR_OK:
                function = b"C_Sign"
                code = self._transform(self.functions.sign, message.start, message.length, signature, needed, &taken)
                if code == CKR_OK and taken != needed:
                    code = <ulong>WRONG_LENGTH
                if code == CKR_OK and is_ecdsa:
                    taken = _put_signature(sink, raw, needed // 2)
        if code != CKR_OK:
            _failed(function, code, taken, needed)
        return taken

    def verify(self, Key key not None, data, signature, /):
        """Whether a signature or MAC belongs to the data."""
        cdef buffers given
        cdef span message, proof
        given.count = 0
        self._enter()
        try:
            message.start = _read(&given, data, "data to sign", &message.length)
            proof.start = _read(&given, signature, "the signature", &proof.length)
            return self._verify_at(key, &message, &proof)
        finally:
            _release(&given)
            self.busy = False

    cdef bint _verify_at(self, Key key, span *message, const span *given) except -1:
        cdef uint8_t[2 * HALF_MAX] raw
        cdef uint8_t[DIGEST_INFO_BYTES + 32] prefixed
        cdef span proof = given[0]
        cdef ulong code
        cdef bint begun = False
        self._to_sign(key, message, prefixed)
        if key.kind == ECDSA:
            if not _get_signature(proof.start, proof.length, raw, key.result_bytes // 2):
                return False
            proof.start, proof.length = raw, key.result_bytes
        elif proof.length != key.result_bytes:
            return False
        if key.kind == HMAC:
            return self._verify_mac(key, message.start, message.length, proof.start)
        with nogil:
            code = self.functions.verify_init(self.handle, &key.mechanism, key.public)
            if code == CKR_OK:
                begun = True
                code = self.functions.verify(self.handle, message.start, message.length, proof.start, proof.length)
        if code == CKR_OK:
            return True
        if begun and (code == CKR_SIGNATURE_INVALID or code == CKR_SIGNATURE_LEN_RANGE):
            return False
        return _failed(b"C_Verify" if begun else b"C_VerifyInit", code)

    cdef bint _verify_mac(self, Key key, const uint8_t *message, size_t length, const uint8_t *proof) except -1:
        """By C_Sign and a comparison whose time says nothing: a token's own may stop early, and NSS's answers an error."""
        cdef uint8_t[HMAC_BYTES_MAX] mac
        cdef size_t taken = 0, i
        cdef uint8_t differs = 0
        cdef ulong code
        cdef bint begun = False
        with nogil:
            code = self.functions.sign_init(self.handle, &key.mechanism, key.private)
            if code == CKR_OK:
                begun = True
                code = self._transform(self.functions.sign, message, length, mac, key.result_bytes, &taken)
                if code == CKR_OK and taken != key.result_bytes:
                    code = <ulong>WRONG_LENGTH
            if code == CKR_OK:
                for i in range(taken):
                    differs |= mac[i] ^ proof[i]
            explicit_bzero(mac, sizeof(mac))  # the right one for what somebody else has chosen
        if code != CKR_OK:
            _failed(b"C_Sign" if begun else b"C_SignInit", code, taken, key.result_bytes)
        return not differs

    def random(self, length, /):
        """C_GenerateRandom."""
        cdef size_t count = length
        cdef bytes made
        cdef uint8_t *sink
        cdef ulong code
        if not 1 <= count <= INPUT_MAX:
            raise ValueError(f"{count} random bytes, but 1..{INPUT_MAX} are possible")
        made = PyBytes_FromStringAndSize(NULL, count)
        sink = <uint8_t *>PyBytes_AS_STRING(made)
        self._enter()
        try:
            with nogil:
                code = self.functions.generate_random(self.handle, sink, count)
        finally:
            self.busy = False
        if code != CKR_OK:
            _failed(b"C_GenerateRandom", code)
        return made


# --- who may call, and uses of one key ---------------------------------------------------------------------------------


cdef double _now_s() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


@cython.final
@cython.auto_pickle(False)
cdef class Guard:
    """Who makes calls of the token's module under it does so alone; see _fasttoken.pyi."""

    cdef PyThread_type_lock _lock
    cdef object _watch
    cdef readonly double since_s
    cdef public str closed

    def __cinit__(self, watch, /):
        self._lock = PyThread_allocate_lock()
        if self._lock == NULL:
            raise MemoryError("no lock")
        self._watch = watch
        self.closed = ""

    def __dealloc__(self):
        if self._lock != NULL:
            PyThread_free_lock(self._lock)

    def acquire(self, double timeout_s):
        """Have it, without a call; whether that came about in time."""
        cdef long long wait_us = <long long>(timeout_s * 1e6) if timeout_s > 0 else 0
        cdef bint got
        with nogil:
            got = PyThread_acquire_lock_timed(self._lock, wait_us, 0) == PY_LOCK_ACQUIRED
        return got

    def release(self):
        """Give back what ``acquire`` got."""
        PyThread_release_lock(self._lock)

    cdef int enter(self) except -1:
        if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK) and not self.acquire(self._watch.patience_s()):
            raise TokenError("the token is being opened anew")
        if self.closed:
            PyThread_release_lock(self._lock)
            raise TokenError(self.closed)
        self.since_s = _now_s()
        return 0

    cdef void leave(self) noexcept:
        self.since_s = 0
        PyThread_release_lock(self._lock)

    def __enter__(self):
        self.enter()

    def __exit__(self, *_):
        self.leave()


cdef enum deed:
    ENCRYPTS
    DECRYPTS
    SIGNS
    VERIFIES


cdef dict _DEEDS = {"encrypt": ENCRYPTS, "decrypt": DECRYPTS, "sign": SIGNS, "mac": SIGNS, "verify": VERIFIES,
                    "verify-mac": VERIFIES}


@cython.final
@cython.auto_pickle(False)
cdef class Use:
    """One kind of use of one loaded key; see _fasttoken.pyi."""

    def __cinit__(self, lane, loaded, Guard guard not None, Session session not None, str verb not None,
                  bytes header not None, hashed, str unlike not None, /):
        self.lane, self.loaded, self.guard, self.session = lane, loaded, guard, session
        self.key = <Key?>loaded.handles
        self.does = _DEEDS[verb]
        self.header, self.hashed, self.unlike = header, hashed, unlike
        self.before.start, self.before.length = <const uint8_t *>PyBytes_AS_STRING(header), len(header)

    def __call__(self, data, associated_data=b"", proof=b"", /):
        """The result in fresh bytes."""
        cdef buffers given
        cdef span message, associated, about
        cdef bytes made
        cdef size_t length
        given.count = 0
        try:
            message.start = _read(&given, data, "data", &message.length)
            associated.start = _read(&given, associated_data, "associated data", &associated.length)
            about.start = _read(&given, proof, "proof", &about.length)
            made = PyBytes_FromStringAndSize(NULL, self.most(message.length))
            length = self.into(message, associated, about, <uint8_t *>PyBytes_AS_STRING(made))
            return made[:length]
        finally:
            _release(&given)

    def then(self, Use following, data, associated_data, /):
        """See _fasttoken.pyi."""
        cdef buffers given
        cdef span message, associated, none
        cdef bytes made
        cdef uint8_t *between = NULL
        cdef size_t room = 0, length
        given.count = 0
        none.start, none.length = NULL, 0
        try:
            message.start = _read(&given, data, "data", &message.length)
            associated.start = _read(&given, associated_data, "associated data", &associated.length)
            room = self.most(message.length)
            between = <uint8_t *>malloc(room or 1)
            if between == NULL:
                raise MemoryError
            message.length = self.into(message, associated, none, between)
            message.start = between
            if following is None:
                return b""
            made = PyBytes_FromStringAndSize(NULL, following.most(message.length))
            length = following.into(message, associated, none, <uint8_t *>PyBytes_AS_STRING(made))
            return made[:length]
        finally:
            if between != NULL:
                explicit_bzero(between, room)
                free(between)
            _release(&given)

    cdef size_t most(self, size_t length) noexcept:
        """Bytes that the result of so much data may have, and those that the token writes on the way to it."""
        cdef Key key = <Key>self.key
        if key.kind != GCM:
            return key.longest()
        return self.before.length + NONCE_BYTES + length + TAG_BYTES

    cdef size_t into(self, span data, span associated, span proof, uint8_t *out) except <size_t>-1:
        """Do it, into memory of ``most`` bytes; the length of the result."""
        cdef Session session = <Session>self.session
        cdef Key key = <Key>self.key
        cdef Guard guard = <Guard>self.guard
        cdef object digest
        cdef bint good = True
        cdef size_t length = 0
        cdef span sealed = data
        if self.hashed is not None:
            digest = self.hashed(PyBytes_FromStringAndSize(<const char *>data.start, data.length)).digest()
            data.start, data.length = <const uint8_t *>PyBytes_AS_STRING(digest), len(digest)
        guard.enter()
        try:
            self.lane.check(self.loaded)
            session._enter()
            try:
                if self.does == ENCRYPTS:
                    length = session._encrypted_bytes(key, &data, &associated, &self.before)
                    session._encrypt_at(key, &data, &associated, &self.before, out, length)
                elif self.does == DECRYPTS:
                    if data.length >= self.before.length and memcmp(data.start, self.before.start, self.before.length):
                        raise InvalidTag(self.unlike)
                    length = session._decrypt_at(key, &sealed, out, session._opening(key, &sealed, &associated,
                                                                                     &self.before))
                elif self.does == SIGNS:
                    length = session._sign_at(key, &data, out)
                else:
                    good = session._verify_at(key, &data, &proof)
            finally:
                session.busy = False
        except CallError as error:
            length = self._failed(error, &data, &associated, out)
        finally:
            guard.leave()
        if not good:
            raise InvalidSignature("the signature or MAC does not belong to the message")
        return length

    cdef size_t _failed(self, error, const span *data, const span *associated, uint8_t *out) except <size_t>-1:
        """The lane knows what a failed call says of the token; a ciphertext may have a second try."""
        cdef bytes made
        if self.does != DECRYPTS:
            self.lane.failed(error)
        made = self.lane.decrypt_after(
            error, self.loaded, PyBytes_FromStringAndSize(<const char *>data.start, data.length),
            PyBytes_FromStringAndSize(<const char *>associated.start, associated.length), self.header)
        memcpy(out, PyBytes_AS_STRING(made), len(made))
        return len(made)
