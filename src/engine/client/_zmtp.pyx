"""ZMTP with CURVE as ``zmtp.h`` speaks it, with the libsodium that pyzmq brings; see _zmtp.pyi."""

import ctypes
import ctypes.util
from pathlib import Path

import zmq

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t

cimport cython


def _load():
    """libsodium: the one in pyzmq's wheel, or the system's."""
    found = sorted((Path(zmq.__file__).parents[1] / "pyzmq.libs").glob("libsodium*.so*"))
    name = str(found[0]) if found else ctypes.util.find_library("sodium")
    if not name:
        raise ImportError("libsodium is needed; on Debian it is in the package libsodium23")
    return ctypes.CDLL(name)


cdef void *_address(library, str name) except NULL:
    return <void *><size_t>ctypes.cast(getattr(library, name), ctypes.c_void_p).value


_library = _load()
if _library.sodium_init() < 0:
    raise ImportError("libsodium can't be initialised")
sodium.beforenm = <int (*)(uint8_t *, const uint8_t *, const uint8_t *) noexcept nogil>_address(
    _library, "crypto_box_beforenm")
sodium.seal = <int (*)(uint8_t *, const uint8_t *, unsigned long long, const uint8_t *,
                       const uint8_t *) noexcept nogil>_address(_library, "crypto_box_easy_afternm")
sodium.open = <int (*)(uint8_t *, const uint8_t *, unsigned long long, const uint8_t *,
                       const uint8_t *) noexcept nogil>_address(_library, "crypto_box_open_easy_afternm")
sodium.keypair = <int (*)(uint8_t *, uint8_t *) noexcept nogil>_address(_library, "crypto_box_keypair")
sodium.random = <void (*)(void *, size_t) noexcept nogil>_address(_library, "randombytes_buf")
sodium.wipe = <void (*)(void *, size_t) noexcept nogil>_address(_library, "sodium_memzero")


@cython.final
@cython.auto_pickle(False)
cdef class Peer:
    """One end of a connection, in memory; see _zmtp.pyi."""

    cdef kq_curve _curve
    cdef bytes _own_public, _own_secret, _server_public
    cdef bytearray _came
    cdef bytearray _out
    cdef readonly size_t limit

    def __cinit__(self, *, bytes own_public not None, bytes own_secret not None, bytes server_public=None,
                  size_t limit=65600):
        cdef uint8_t[64] greeting
        for key in (own_public, own_secret, *([] if server_public is None else [server_public])):
            if len(key) != KQ_KEY:
                raise ValueError(f"a key of {len(key)} bytes")
        self._own_public, self._own_secret, self._server_public = own_public, own_secret, server_public
        self._curve.server = server_public is None
        self._curve.own_public = <const uint8_t *>PyBytes_AS_STRING(own_public)
        self._curve.own_secret = <const uint8_t *>PyBytes_AS_STRING(own_secret)
        if server_public is not None:
            self._curve.server_public = <const uint8_t *>PyBytes_AS_STRING(server_public)
        self.limit = limit
        self._came, self._out = bytearray(), bytearray()
        kq_begin(&self._curve, greeting)
        self._out += greeting[:64]

    def __dealloc__(self):
        kq_end_curve(&self._curve, &sodium)

    @property
    def judged(self):
        """Whether the peer has proved its key, and waits for ``judge``."""
        return self._curve.stage == KQ_JUDGED

    @property
    def open(self):
        """Whether messages go both ways."""
        return self._curve.stage == KQ_OPEN

    @property
    def ended(self):
        """Whether the connection is to be closed: the peer broke a rule, or was refused."""
        return self._curve.stage == KQ_ENDED

    @property
    def refused(self):
        """Whether the server does not take this key."""
        return bool(self._curve.refused)

    @property
    def peer_public(self):
        """The client's long-term key, once it is proved."""
        return self._curve.peer_public[:32]

    def judge(self, bint welcome):
        """Let the peer in, or tell it that its key is refused."""
        cdef uint8_t[512] said
        cdef size_t length
        if self._curve.stage != KQ_JUDGED:
            raise ValueError("nobody waits to be judged")
        length = kq_judge(&self._curve, &sodium, welcome, said)
        self._out += said[:length]

    def take(self):
        """What is to be sent, once."""
        out, self._out = bytes(self._out), bytearray()
        return out

    def send(self, bytes content not None, int flags=0):
        """Have a frame of a message sent; flags: 1, more follow; 2, it is a command."""
        cdef bytearray room = bytearray(kq_message_head(len(content)) + len(content))
        if self._curve.stage != KQ_OPEN:
            raise ValueError("the connection is not open")
        length = kq_write_message(<uint8_t *><char *>room, &self._curve, &sodium,
                                  <const uint8_t *>PyBytes_AS_STRING(content), len(content), flags)
        self._out += room[:length]

    def feed(self, bytes data not None):
        """Take in what came: the frames of messages in it, as (flags, content)."""
        cdef uint8_t[512] said
        cdef size_t used, length, needed
        cdef kq_frame frame
        cdef uint8_t *content
        cdef uint8_t flags
        cdef uint8_t *at
        frames = []
        self._came += data
        while self._came and self._curve.stage != KQ_ENDED and self._curve.stage != KQ_JUDGED:
            at = <uint8_t *><char *>self._came
            if self._curve.stage != KQ_OPEN:
                used = kq_shake(&self._curve, &sodium, at, len(self._came), said, &length)
                self._out += said[:length]
                if not used:
                    break
                del self._came[:used]
                continue
            found = kq_next_frame(at, len(self._came), self.limit, &frame, &needed)
            if not found:
                break
            if found < 0 or not kq_open_message(&self._curve, &sodium, &frame, &content, &length, &flags):
                kq_end_curve(&self._curve, &sodium)
                break
            frames.append((flags, PyBytes_FromStringAndSize(<char *>content, length)))
            del self._came[:frame.whole]
        return frames
