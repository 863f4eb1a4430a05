"""How valid inputs are changed: MessagePack trees, DER, TOML and other text, bytes. It knows no decoder.

Everything is drawn from one ``Random`` that the caller seeds, so an input can be made again. A change of a MessagePack
value is a splice at the places where its elements begin and end, which are found once: that is what makes it quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Final, NamedTuple

SPANS_MAX: Final = 4_096
"""Elements of one message that are told apart."""
DEPTH_MAX: Final = 64
GROWTH_MAX: Final = 80 * 1024
"""What one change makes no longer than this, whatever it repeats."""
_CACHE_MAX: Final = 2_000


class Span(NamedTuple):
    """One element: where it begins, where its content does, where it ends; its kind, its parent's place, its count."""

    start: int
    head: int
    end: int
    kind: str
    parent: int
    count: int


# --- MessagePack by hand, so that it can be wrong too ---


def pack_int(value: int, width: int = 0) -> bytes:
    """An integer; ``width`` 1, 2, 4 or 8 makes it longer than it need be."""
    if not width:
        if 0 <= value < 128:
            return bytes([value])
        if -32 <= value < 0:
            return bytes([value & 0xFF])
        for width in (1, 2, 4, 8):
            if value >> (8 * width) == 0 or (value < 0 and -(1 << (8 * width - 1)) <= value):
                break
    code = {1: 0, 2: 1, 4: 2, 8: 3}[width]
    if value >= 0:
        return bytes([0xCC + code]) + (value & ((1 << (8 * width)) - 1)).to_bytes(width, "big")
    return bytes([0xD0 + code]) + (value & ((1 << (8 * width)) - 1)).to_bytes(width, "big")


def head(kind: str, count: int, width: int = 0) -> bytes:
    """The head of a str, bin, arr or map of ``count``; ``width`` makes it longer than it need be."""
    short, codes = {
        "str": ((0xA0, 32), (0xD9, 0xDA, 0xDB)),
        "bin": ((0, 0), (0xC4, 0xC5, 0xC6)),
        "arr": ((0x90, 16), (0, 0xDC, 0xDD)),
        "map": ((0x80, 16), (0, 0xDE, 0xDF)),
    }[kind]
    if not width and count < short[1]:
        return bytes([short[0] + count])
    for index, size in enumerate((1, 2, 4)):
        if codes[index] and size >= width and count < 1 << (8 * size):
            return bytes([codes[index]]) + count.to_bytes(size, "big")
    return bytes([codes[2]]) + (count & 0xFFFFFFFF).to_bytes(4, "big")


_FIXED: Final = {
    0xC0: ("nil", 0), 0xC1: ("nil", 0), 0xC2: ("bool", 0), 0xC3: ("bool", 0), 0xCA: ("flt", 4), 0xCB: ("flt", 8),
    0xCC: ("int", 1), 0xCD: ("int", 2), 0xCE: ("int", 4), 0xCF: ("int", 8),
    0xD0: ("int", 1), 0xD1: ("int", 2), 0xD2: ("int", 4), 0xD3: ("int", 8),
    0xD4: ("ext", 2), 0xD5: ("ext", 3), 0xD6: ("ext", 5), 0xD7: ("ext", 9), 0xD8: ("ext", 17),
}  # fmt: skip
_SIZED: Final = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("arr", 2), 0xDD: ("arr", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip


def _read(data: bytes, at: int, parent: int, depth: int, out: list[Span]) -> int:
    """Append the element at ``at`` and those in it; where it ends. It never looks past the data."""
    if at >= len(data) or len(out) >= SPANS_MAX or depth > DEPTH_MAX:
        return len(data)
    code = data[at]
    body, count = at + 1, 0
    if code < 0x80 or code >= 0xE0:
        kind = "int"
    elif code < 0x90:
        kind, count = "map", code - 0x80
    elif code < 0xA0:
        kind, count = "arr", code - 0x90
    elif code < 0xC0:
        kind, count = "str", code - 0xA0
    elif code in _FIXED:
        kind, count = _FIXED[code]
    else:
        kind, size = _SIZED[code]
        count = int.from_bytes(data[body : body + size], "big") + (kind == "ext")
        body += size
    place = len(out)
    out.append(Span(at, min(body, len(data)), 0, kind, parent, count))
    if kind in ("arr", "map"):
        end = body
        for _ in range(min(count * (1 + (kind == "map")), SPANS_MAX)):
            if end >= len(data):
                break
            end = _read(data, end, place, depth + 1, out)
    else:
        end = body + (0 if kind == "int" and body == at + 1 and code not in _FIXED else count)
    end = min(end, len(data))
    out[place] = out[place]._replace(end=end)
    return end


_known: dict[bytes, tuple[Span, ...]] = {}


def spans(data: bytes) -> tuple[Span, ...]:
    """The elements of a MessagePack value in their order, as far as it is one."""
    found = _known.get(data)
    if found is None:
        out: list[Span] = []
        _read(data, 0, -1, 0, out)
        found = tuple(out)
        if len(_known) >= _CACHE_MAX:
            _known.clear()
        _known[data] = found
    return found


# --- what is put in ---

EDGES: Final = sorted(
    {
        edge + step
        for bits in (7, 8, 15, 16, 31, 32, 63, 64)
        for edge in (1 << bits, -(1 << (bits - 1)))
        for step in (-1, 0, 1)
    }
    | {
        *range(-2, 4),
        15,
        16,
        17,
        63,
        64,
        65,
        254,
        300,
        1_000,
        600_000,
        600_001,
        -32,
        -33,
        4096,
        4097,
        1_800_000_000_000,
    }
)
INTS: Final = tuple(pack_int(value) for value in EDGES if -(1 << 63) <= value < 1 << 64)
LENGTHS: Final = (
    0,
    0,
    1,
    2,
    15,
    16,
    17,
    31,
    32,
    32,
    33,
    34,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    1023,
    1024,
    1025,
)
LONG_LENGTHS: Final = (2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 49151, 49152, 49153, 49281, 65535, 65536)
COUNTS: Final = (2, 3, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 200, 201, 255, 256, 257, 512, 513)
TEXTS: Final = (
    b"", b"a", b"*", b"**", b"?", b"[", b"[!-~]*", b"a\n", b"\n", b"a\0", b"\0", b"../..", b"..", b"/", b"a/b", b"-a",
    b".a", b"op", b"alice", b"bob", b"carol", b"node1", b"node9", b"balancer", b"stranger", b"encrypt", b"generate",
    b"destroy", b"refresh", b"import", b"x" * 33, b"a" * 64, b"a" * 65, b"a" * 128, b"a" * 129, b"*a" * 60, b"A" * 1024,
    b"A" * 1025, "é".encode(), "\u202e".encode(), "\ud83d\ude00".encode("utf-16",
    "surrogatepass").decode("utf-16").encode(),
    b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"%s%n{0}", b"tcp://", b"tcp://127.0.0.1:1",
    b"aes-256-gcm", b"ed25519", b"rsa-2048-pss-sha256", b"no-such", b"grant", b"key", b"operator", b"client", b"node",
)  # fmt: skip
ATOMS: Final = (
    *INTS,
    b"\xc0", b"\xc1", b"\xc2", b"\xc3", b"\x90", b"\x80", b"\xa0", b"\xc4\x00", b"\x91\xc0", b"\x81\xa0\xc0",
    b"\x81\x90\xc0",
    b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xcb\x7f\xf0\0\0\0\0\0\0", b"\xcb\x3f\xf0\0\0\0\0\0\0", b"\xca\x3f\x80\0\0",
    b"\xd4\x01\x00", b"\xd6\xff\0\0\0\0", b"\xd7\xff\0\0\0\0\0\0\0\1", b"\xc7\x0c\xff" + bytes(12),
    b"\xc9\xff\xff\xff\xff\x00",
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdc\xff\xff",
    b"\xc4\x10" + bytes(16), b"\xc4\x20" + bytes(32), b"\xc4\x20" + b"\xff" * 32, b"\xc4\x40" + bytes(64),
    b"\x91" * 40 + b"\xc0", b"\x91" * 1_200 + b"\xc0", b"\x81\xa1a" * 40 + b"\xc0", b"\xcc\x05", b"\xcd\x00\x05",
    b"\xd0\x05", b"\xd3\0\0\0\0\0\0\0\5", b"\xc5\x00\x01a", b"\xd9\x01a", b"\xda\x00\x01a", b"\xdc\x00\x00",
    b"\xde\x00\x00",
)  # fmt: skip


def _index(rnd: Callable[[], float], count: int) -> int:
    return int(rnd() * count)


def _content(rnd: Callable[[], float], old: bytes, size: int) -> bytes:
    """``size`` bytes that go on like the old ones."""
    if not old:
        return b"a" * size if rnd() < 0.5 else bytes(size)
    return (old * (size // len(old) + 1))[:size]


def _recount(data: bytes, all_spans: Sequence[Span], place: int, by: int, data_after: bytes) -> bytes:
    """``data_after`` with the head of the parent of ``place`` telling ``by`` more elements."""
    parent = all_spans[place].parent
    if parent < 0:
        return data_after
    above = all_spans[parent]
    count = max(0, above.count + (by if above.kind == "arr" else (1 if by > 0 else -1) * ((abs(by) + 1) // 2)))
    return data_after[: above.start] + head(above.kind, count) + data_after[above.head :]


def change_element(r: Random, data: bytes, donor: bytes) -> bytes:
    """One element of a MessagePack value changed, its surroundings fitted to it more often than not."""
    rnd = r.random
    every = spans(data)
    if not every:
        return change_bytes(r, data)
    place = _index(rnd, len(every))
    span = every[place]
    start, body, end, kind, _, count = span
    kind_of_change = rnd()
    if kind_of_change < 0.16:
        return data[:start] + ATOMS[_index(rnd, len(ATOMS))] + data[end:]
    if kind_of_change < 0.30:  # an element of another sample: the one at the same place, or any
        theirs = spans(donor)
        if theirs:
            other = theirs[place if place < len(theirs) and rnd() < 0.7 else _index(rnd, len(theirs))]
            return data[:start] + donor[other.start : other.end] + data[end:]
    if kind_of_change < 0.36:
        changed = data[:start] + data[end:]
        return changed if rnd() < 0.2 else _recount(data, every, place, -1, changed)
    if kind_of_change < 0.44:
        times = 1 if rnd() < 0.7 else COUNTS[_index(rnd, len(COUNTS))]
        if (end - start) * times > GROWTH_MAX:
            times = 1
        changed = data[:end] + data[start:end] * times + data[end:]
        return changed if rnd() < 0.15 else _recount(data, every, place, times, changed)
    if kind_of_change < 0.48:  # two elements change places
        other = every[_index(rnd, len(every))]
        low, high = (span, other) if span.start <= other.start else (other, span)
        if low.end <= high.start:
            return (
                data[: low.start]
                + data[high.start : high.end]
                + data[low.end : high.start]
                + data[low.start : low.end]
                + data[high.end :]
            )
    if kind_of_change < 0.54:
        cut = start if rnd() < 0.5 else end if rnd() < 0.5 else _index(rnd, len(data) + 1)
        return data[:cut]
    if kind_of_change < 0.58:
        return data + (data if rnd() < 0.3 else ATOMS[_index(rnd, len(ATOMS))])
    if kind_of_change < 0.62:
        wrapped = (b"\x91", b"\x92\xc0", b"\x81\xa0", head("bin", end - start))[_index(rnd, 4)]
        return data[:start] + wrapped + data[start:end] + data[end:]
    if kind == "int":
        value = _int_at(data, span)
        if rnd() < 0.2:
            width = (1, 2, 4, 8)[_index(rnd, 4)]
            return data[:start] + pack_int(value, width) + data[end:]
        value += (1, -1, 1, -1, 2, 256, -256, 5_000, -5_000, 60_000, 1 << 32)[_index(rnd, 11)]
        return data[:start] + pack_int(max(-(1 << 63), min(value, (1 << 64) - 1))) + data[end:]
    if kind in ("str", "bin"):
        return data[:start] + _changed_text(rnd, data[body:end], kind) + data[end:]
    if kind in ("arr", "map"):
        lying = (0, count + 1, max(0, count - 1), count * 2, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)[_index(rnd, 7)]
        if rnd() < 0.4:
            return data[:start] + head(kind, count, (2, 4)[_index(rnd, 2)]) + data[body:]
        return data[:start] + head(kind, lying) + data[body:]
    return data[:start] + ATOMS[_index(rnd, len(ATOMS))] + data[end:]


def _int_at(data: bytes, span: Span) -> int:
    code = data[span.start]
    if code < 0x80:
        return code
    if code >= 0xE0:
        return code - 256
    return int.from_bytes(data[span.head : span.end], "big", signed=code >= 0xD0)


def _changed_text(rnd: Callable[[], float], old: bytes, kind: str) -> bytes:
    """A changed str or bin, with its head."""
    choice = rnd()
    if choice < 0.30:
        at = _index(rnd, len(old) + 1)
        new = old[:at] + bytes([_index(rnd, 256)]) + old[at + 1 :]
    elif choice < 0.42:
        new = TEXTS[_index(rnd, len(TEXTS))]
    elif choice < 0.52:
        new = old + (b"\n", b"\0", b"a", b" ", b"\xff", b"/")[_index(rnd, 6)]
    elif choice < 0.60:
        new = old[:-1] if rnd() < 0.6 else old[1:]
    elif choice < 0.78:
        size = LENGTHS[_index(rnd, len(LENGTHS))] if rnd() < 0.97 else LONG_LENGTHS[_index(rnd, len(LONG_LENGTHS))]
        new = _content(rnd, old, size)
    elif choice < 0.84:
        return head("bin" if kind == "str" else "str", len(old)) + old
    elif choice < 0.92:
        return head(kind, len(old), (1, 2, 4)[_index(rnd, 3)]) + old
    elif choice < 0.97:
        lying = (len(old) + 1, max(0, len(old) - 1), 0, 0xFFFF, 0xFFFFFFFF)[_index(rnd, 5)]
        return head(kind, lying) + old
    else:
        new = bytes(len(old))
    return head(kind, len(new)) + new


def resized(r: Random, data: bytes, length: int) -> bytes:
    """The same value with one str or bin in it longer or shorter, so that the whole has ``length`` bytes, if it can."""
    every = spans(data)
    fits = [span for span in every if span.kind in ("bin", "str")]
    if not fits:
        return data
    span = fits[_index(r.random, len(fits))]
    rest = len(data) - (span.end - span.start)
    for overhead in (1, 2, 3, 5):
        size = length - rest - overhead
        if size >= 0 and len(head(span.kind, size)) == overhead:
            content = _content(r.random, data[span.head : span.end], size)
            return data[: span.start] + head(span.kind, size) + content + data[span.end :]
    return data


def change_message(r: Random, data: bytes, donor: bytes) -> bytes:
    """A MessagePack value changed in one to four places."""
    rnd = r.random
    data = change_element(r, data, donor) if rnd() < 0.9 else change_bytes(r, data)
    while rnd() < 0.22 and len(data) < 4_096:
        data = change_element(r, data, donor) if rnd() < 0.7 else change_bytes(r, data)
    return data


# --- bytes ---


def change_bytes(r: Random, data: bytes) -> bytes:
    """Bytes changed at one place: flipped, set, cut, put in, moved, repeated."""
    rnd = r.random
    size = len(data)
    at = _index(rnd, size) if size else 0
    kind = _index(rnd, 9)
    if kind == 0 and size:
        return data[:at] + bytes([data[at] ^ (1 << _index(rnd, 8))]) + data[at + 1 :]
    if kind == 1 and size:
        return data[:at] + bytes([(0, 0xFF, 0x7F, 0x80, 1, _index(rnd, 256))[_index(rnd, 6)]]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + bytes(_index(rnd, 256) for _ in range(1 + _index(rnd, 4))) + data[at:]
    if kind == 3:
        return data[:at] + data[at + 1 + _index(rnd, 8) :]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data + bytes(_index(rnd, 256) for _ in range(1 + _index(rnd, 8)))
    if kind == 6 and size:
        length = 1 + _index(rnd, min(64, size))
        to = _index(rnd, size)
        return data[:to] + data[at : at + length] + data[to + length :]
    if kind == 7:
        length = 1 + _index(rnd, 32)
        return data[:at] + (bytes(length) if rnd() < 0.5 else b"\xff" * length) + data[at + length :]
    times = 1 + _index(rnd, 3 if rnd() < 0.9 else 200)
    length = 1 + _index(rnd, 16)
    return data[:at] + data[at : at + length] * min(times, GROWTH_MAX // length) + data[at:]


def change_blob(r: Random, data: bytes, donor: bytes) -> bytes:
    """Bytes changed at one to six places, or joined with another sample's."""
    rnd = r.random
    if rnd() < 0.08:
        return data[: _index(rnd, len(data) + 1)] + donor[_index(rnd, len(donor) + 1) :]
    data = change_bytes(r, data)
    while rnd() < 0.3:
        data = change_bytes(r, data)
    return data


# --- text ---

PIECES: Final = tuple(
    piece.encode()
    for piece in (
        "\n", "\r\n", "=", '"', "'", '"""', "'''", "[", "]", "[[", "{", "}", "#", ".", ",", "\\", "\\u0000",
        "\\ud800", "\0",
        "0", "-1", "1", "9223372036854775808", "-9223372036854775809", "1e400", "nan", "inf", "0x7f", "1_000", "true",
        "1979-05-27T07:32:00Z", "[]", "{}", '""', '"a"', "file:", "env:", "env:PIN", "env:1", "file://", "pkcs11:",
        ";", "?",
        "&", "%00", "%ff", "%", "pin-value=1234", "pin-source=", "module-path=", "token=", "token", ":", "é",
        "\u202e", "=" * 20,
        "a" * 33, "a" * 300, "9" * 40, "9" * 5_000, "[" * 200, "[" * 3_000, "{a=" * 100, "{a=" * 3_000, "a." * 200,
        "version = 1\n", "*", "tcp://", " ", "\t",
    )
)  # fmt: skip


def change_text(r: Random, data: bytes, donor: bytes) -> bytes:
    """Text changed: its lines, its values, its characters."""
    rnd = r.random
    kind = rnd()
    if kind < 0.35:
        lines = data.split(b"\n")
        at = _index(rnd, len(lines))
        how = _index(rnd, 6)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(_index(rnd, len(lines)), lines[at])
        elif how == 2:
            theirs = donor.split(b"\n")
            lines[at] = theirs[_index(rnd, len(theirs))]
        elif how == 3 or b"=" not in lines[at]:
            lines[at] += PIECES[_index(rnd, len(PIECES))]
        else:
            key, _, value = lines[at].partition(b"=")
            if how == 4:
                value = b" " + PIECES[_index(rnd, len(PIECES))]
            else:
                value = value.strip()
                value = b" [" + value + b"]" if rnd() < 0.3 else b" " + value.strip(b'"')
            lines[at] = key + b"=" + value
        data = b"\n".join(lines)
    elif kind < 0.75:
        at = _index(rnd, len(data) + 1)
        cut = _index(rnd, 4) if rnd() < 0.5 else 0
        data = data[:at] + PIECES[_index(rnd, len(PIECES))] + data[at + cut :]
    else:
        data = change_blob(r, data, donor)
    while rnd() < 0.15 and len(data) < 8_192:
        data = change_text(r, data, donor)
    return data


# --- DER ---


def _der_elements(data: bytes, at: int, end: int, depth: int, out: list[tuple[int, int, int, int]]) -> None:
    """(start, content, end, depth) of the elements between ``at`` and ``end``, as far as they are DER."""
    while at + 2 <= end and len(out) < 200 and depth < 8:
        tag, length, body = data[at], data[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, body = int.from_bytes(data[body : body + size], "big"), body + size
        if body + length > end:
            return
        out.append((at, body, body + length, depth))
        if tag & 0x20 or (tag in (0x03, 0x04) and length > 2 and data[body : body + 1] in (b"\x30", b"\x02")):
            _der_elements(data, body, body + length, depth + 1, out)
        at = body + length


def der_length(length: int, extra: int = 0) -> bytes:
    """A DER length; ``extra`` octets more than it need have."""
    if length < 0x80 and not extra:
        return bytes([length])
    size = max(1, (length.bit_length() + 7) // 8) + max(0, extra - 1)
    return bytes([0x80 | size]) + length.to_bytes(size, "big")


def change_der(r: Random, data: bytes, donor: bytes) -> bytes:
    """One DER element changed, the lengths around it mended more often than not."""
    rnd = r.random
    if rnd() < 0.25:
        return change_blob(r, data, donor)
    found: list[tuple[int, int, int, int]] = []
    _der_elements(data, 0, len(data), 0, found)
    if not found:
        return change_blob(r, data, donor)
    place = _index(rnd, len(found))
    start, body, end, depth = found[place]
    tag, content = data[start : start + 1], data[body:end]
    kind = _index(rnd, 8)
    if kind == 0:
        new = b""
    elif kind == 1:
        new = data[start:end] * 2
    elif kind == 2:
        new = bytes([_index(rnd, 256)]) + data[start + 1 : end]
    elif kind == 3:
        new = tag + der_length(len(content), 1 + _index(rnd, 4)) + content
    elif kind == 4:
        content = (b"\0" + content, content[1:], b"\xff" + content, b"", content + b"\0", bytes(len(content)))[
            _index(rnd, 6)
        ]
        new = tag + der_length(len(content)) + content
    elif kind == 5:
        new = (
            tag + der_length((len(content) + 1, max(0, len(content) - 1), 0xFFFF, 0x7FFFFFFF)[_index(rnd, 4)]) + content
        )
    elif kind == 6:
        content = change_bytes(r, content)
        new = tag + der_length(len(content)) + content
    else:
        theirs: list[tuple[int, int, int, int]] = []
        _der_elements(donor, 0, len(donor), 0, theirs)
        other = theirs[_index(rnd, len(theirs))] if theirs else (0, 0, 0, 0)
        new = donor[other[0] : other[2]]
    changed = data[:start] + new + data[end:]
    if rnd() < 0.8:
        by = len(new) - (end - start)
        for above in reversed(found[:place]):
            if above[3] < depth and above[0] <= start and above[2] >= end:
                depth = above[3]
                length = above[2] - above[1] + by
                mended = der_length(max(0, length))
                changed = changed[: above[0] + 1] + mended + changed[above[1] :]
                by += len(mended) - (above[1] - above[0] - 1)
    return changed
