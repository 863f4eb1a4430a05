/* The frames of a warm operation, read and written without an object in between. It knows no socket and no key.

   What is read here is a part of what engine.protocol.wire reads, in the very same meaning: a request without extensions
   and without a grant, a reply that is ok. Anything else, valid or not, is answered with 0, and then the caller has the
   ordinary decoder look at it, which says what is wrong. So nothing is refused here, and nothing is accepted here that
   the ordinary decoder would refuse, but for the patterns of names: the caller looks a key's name up byte by byte among
   names that were checked.

   MessagePack in canonical form (the shortest encoding of each value): docs/protocol.md. All lengths are in bytes. */

#ifndef KEYQUORUM_FASTWIRE_H
#define KEYQUORUM_FASTWIRE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define KQ_MAX_MESSAGE 65536u
#define KQ_MAX_DATA (48u * 1024u + 128u)
#define KQ_MAX_AAD 4096u
#define KQ_MAX_PROOF 1024u
#define KQ_MAX_NAME 128u
#define KQ_MAX_VERB 31u
#define KQ_MAX_TIMEOUT_MS 600000u
#define KQ_KEY_ID 16u
#define KQ_OVERHEAD 256u /* more than all that a request or reply has beside its name, data, associated data and proof */

typedef struct {
    const uint8_t *at;
    size_t length;
} kq_span;

/* A request for a use of a key; the spans point into the message that was read. */
typedef struct {
    uint8_t version; /* any of 0 to 127: the caller knows which are spoken */
    uint64_t id;
    uint32_t timeout_ms;
    kq_span verb;
    kq_span key;
    kq_span key_id; /* empty or KQ_KEY_ID bytes */
    kq_span data;
    kq_span associated_data;
    kq_span proof;
    int digested;
} kq_operate;

/* An ok reply with one blob in it, and the snapshot that rides on it. */
typedef struct {
    uint8_t version; /* as of a request */
    uint64_t id;
    kq_span data;
    uint64_t queue;
    uint64_t service_us;
    int loaded;
} kq_result;

/* Where frames are written, one after the other. */
typedef struct {
    uint8_t *at;
    size_t length;
} kq_room;

/* Have room for so many bytes; what was written is gone then. 0 if there is no memory. */
static inline int kq_reserve(kq_room *room, size_t wanted) {
    if (wanted <= room->length) return 1;
    uint8_t *at = (uint8_t *)malloc(wanted);
    if (at == NULL) return 0;
    free(room->at);
    room->at = at;
    room->length = wanted;
    return 1;
}

typedef struct {
    const uint8_t *at;
    const uint8_t *end;
} kq_reader;

static inline size_t kq_left(const kq_reader *reader) { return (size_t)(reader->end - reader->at); }

/* The next byte if it is this one. */
static inline int kq_byte(kq_reader *reader, uint8_t wanted) {
    if (reader->at == reader->end || *reader->at != wanted) return 0;
    reader->at++;
    return 1;
}

/* A protocol version, which is a small integer. */
static inline int kq_version(kq_reader *reader, uint8_t *version) {
    if (reader->at == reader->end || *reader->at > 0x7f) return 0;
    *version = *reader->at++;
    return 1;
}

static inline uint64_t kq_big_endian(const uint8_t *at, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; i++) value = value << 8 | at[i];
    return value;
}

/* An unsigned integer of at most 2^63 - 1 in its shortest form. */
static inline int kq_uint(kq_reader *reader, uint64_t *value) {
    if (reader->at == reader->end) return 0;
    uint8_t first = *reader->at;
    if (first < 0x80) {
        *value = first;
        reader->at++;
        return 1;
    }
    if (first < 0xcc || first > 0xcf) return 0;
    size_t bytes = (size_t)1 << (first - 0xcc);
    if (kq_left(reader) < 1 + bytes) return 0;
    uint64_t read = kq_big_endian(reader->at + 1, bytes);
    uint64_t least = bytes == 1 ? 0x80 : (uint64_t)1 << (bytes * 4); /* 2^8, 2^16, 2^32: what half the bytes can't hold */
    if (read < least || read > INT64_MAX) return 0;
    *value = read;
    reader->at += 1 + bytes;
    return 1;
}

static inline int kq_take(kq_reader *reader, size_t header, size_t length, size_t limit, kq_span *span) {
    if (length > limit || kq_left(reader) < header + length) return 0;
    span->at = reader->at + header;
    span->length = length;
    reader->at += header + length;
    return 1;
}

/* A byte string (bin 8, bin 16) of at most limit bytes. */
static inline int kq_bin(kq_reader *reader, size_t limit, kq_span *span) {
    if (kq_left(reader) < 2) return 0;
    if (reader->at[0] == 0xc4) return kq_take(reader, 2, reader->at[1], limit, span);
    if (reader->at[0] != 0xc5 || kq_left(reader) < 3) return 0;
    size_t length = (size_t)kq_big_endian(reader->at + 1, 2);
    return length > 0xff && kq_take(reader, 3, length, limit, span);
}

/* A text (fixstr, str 8) of 1 to limit bytes, limit below 256. */
static inline int kq_text(kq_reader *reader, size_t limit, kq_span *span) {
    if (kq_left(reader) < 2) return 0;
    uint8_t first = reader->at[0];
    if (first > 0xa0 && first < 0xc0) return kq_take(reader, 1, first & 0x1f, limit, span);
    return first == 0xd9 && reader->at[1] > 31 && kq_take(reader, 2, reader->at[1], limit, span);
}

static inline int kq_bool(kq_reader *reader, int *value) {
    if (reader->at == reader->end || (*reader->at & 0xfe) != 0xc2) return 0;
    *value = *reader->at++ & 1;
    return 1;
}

/* [version, id, verb, timeout_ms, [key, key_id, data, associated_data, proof, digested, b""], {}]: 1, or 0 for anything else. */
static inline int kq_read_operate(const uint8_t *message, size_t length, kq_operate *read) {
    kq_reader outer = {message, message + length};
    kq_span body, grant;
    uint64_t timeout_ms;
    if (length > KQ_MAX_MESSAGE) return 0;
    if (!kq_byte(&outer, 0x96) || !kq_version(&outer, &read->version) || !kq_uint(&outer, &read->id)) return 0;
    if (!kq_text(&outer, KQ_MAX_VERB, &read->verb) || !kq_uint(&outer, &timeout_ms)) return 0;
    if (timeout_ms < 1 || timeout_ms > KQ_MAX_TIMEOUT_MS || !kq_bin(&outer, KQ_MAX_MESSAGE, &body)) return 0;
    if (!kq_byte(&outer, 0x80) || outer.at != outer.end) return 0;
    read->timeout_ms = (uint32_t)timeout_ms;
    kq_reader inner = {body.at, body.at + body.length};
    if (!kq_byte(&inner, 0x97) || !kq_text(&inner, KQ_MAX_NAME, &read->key)) return 0;
    if (!kq_bin(&inner, KQ_KEY_ID, &read->key_id) || (read->key_id.length && read->key_id.length != KQ_KEY_ID)) return 0;
    if (!kq_bin(&inner, KQ_MAX_DATA, &read->data) || !kq_bin(&inner, KQ_MAX_AAD, &read->associated_data)) return 0;
    if (!kq_bin(&inner, KQ_MAX_PROOF, &read->proof) || !kq_bool(&inner, &read->digested)) return 0;
    return kq_bin(&inner, 0, &grant) && inner.at == inner.end;
}

/* [version, id, 0, [data], [queue, service_us, loaded], {}]: 1, or 0 for anything else. */
static inline int kq_read_result(const uint8_t *message, size_t length, kq_result *read) {
    kq_reader outer = {message, message + length};
    kq_span body;
    if (length > KQ_MAX_MESSAGE) return 0;
    if (!kq_byte(&outer, 0x96) || !kq_version(&outer, &read->version) || !kq_uint(&outer, &read->id)) return 0;
    if (!kq_byte(&outer, 0) || !kq_bin(&outer, KQ_MAX_MESSAGE, &body) || !kq_byte(&outer, 0x93)) return 0;
    if (!kq_uint(&outer, &read->queue) || !kq_uint(&outer, &read->service_us) || !kq_bool(&outer, &read->loaded)) return 0;
    if (!kq_byte(&outer, 0x80) || outer.at != outer.end) return 0;
    kq_reader inner = {body.at, body.at + body.length};
    return kq_byte(&inner, 0x91) && kq_bin(&inner, KQ_MAX_DATA, &read->data) && inner.at == inner.end;
}

/* --- writing: each returns where the next byte goes --- */

static inline uint8_t *kq_put_big_endian(uint8_t *to, uint64_t value, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) to[i] = (uint8_t)(value >> (8 * (bytes - 1 - i)));
    return to + bytes;
}

static inline uint8_t *kq_put_uint(uint8_t *to, uint64_t value) {
    if (value < 0x80) {
        *to++ = (uint8_t)value;
        return to;
    }
    unsigned size = value <= 0xff ? 0 : value <= 0xffff ? 1 : value <= 0xffffffff ? 2 : 3;
    *to++ = (uint8_t)(0xcc + size);
    return kq_put_big_endian(to, value, (size_t)1 << size);
}

static inline size_t kq_bin_header(size_t length) { return length <= 0xff ? 2 : 3; }

/* The header of a byte string of less than 64 KiB. */
static inline uint8_t *kq_put_bin_header(uint8_t *to, size_t length) {
    *to++ = length <= 0xff ? 0xc4 : 0xc5;
    return kq_put_big_endian(to, length, length <= 0xff ? 1 : 2);
}

static inline uint8_t *kq_put_bin(uint8_t *to, kq_span span) {
    to = kq_put_bin_header(to, span.length);
    if (span.length) memcpy(to, span.at, span.length);
    return to + span.length;
}

static inline uint8_t *kq_put_text(uint8_t *to, kq_span span) {
    if (span.length > 31) {
        *to++ = 0xd9;
        *to++ = (uint8_t)span.length;
    } else {
        *to++ = (uint8_t)(0xa0 | span.length);
    }
    memcpy(to, span.at, span.length);
    return to + span.length;
}

/* The room that kq_write_operate may need. */
static inline size_t kq_operate_room(const kq_operate *from) {
    return KQ_OVERHEAD + from->verb.length + from->key.length + from->key_id.length + from->data.length +
           from->associated_data.length + from->proof.length;
}

/* Write a request with an empty grant; its length, or 0 if it or a part of it would be longer than it may be. */
static inline size_t kq_write_operate(uint8_t *to, const kq_operate *from) {
    if (from->verb.length > KQ_MAX_VERB || from->key.length > KQ_MAX_NAME || from->key_id.length > KQ_KEY_ID) return 0;
    size_t body = 1 + (from->key.length > 31 ? 2 : 1) + from->key.length + kq_bin_header(from->key_id.length) +
                  from->key_id.length + kq_bin_header(from->data.length) + from->data.length +
                  kq_bin_header(from->associated_data.length) + from->associated_data.length +
                  kq_bin_header(from->proof.length) + from->proof.length + 1 + 2;
    if (body > 0xffff) return 0;
    uint8_t *at = to;
    *at++ = 0x96;
    *at++ = from->version;
    at = kq_put_uint(at, from->id);
    at = kq_put_text(at, from->verb);
    at = kq_put_uint(at, from->timeout_ms);
    at = kq_put_bin_header(at, body);
    *at++ = 0x97;
    at = kq_put_text(at, from->key);
    at = kq_put_bin(at, from->key_id);
    at = kq_put_bin(at, from->data);
    at = kq_put_bin(at, from->associated_data);
    at = kq_put_bin(at, from->proof);
    *at++ = from->digested ? 0xc3 : 0xc2;
    *at++ = 0xc4;
    *at++ = 0;
    *at++ = 0x80;
    size_t length = (size_t)(at - to);
    return length <= KQ_MAX_MESSAGE ? length : 0;
}

/* Bytes that kq_write_result puts before the data; the data may already stand there when it is called. */
static inline size_t kq_result_head(uint64_t id, size_t data) {
    uint8_t room[16];
    return 2 + (size_t)(kq_put_uint(room, id) - room) + 1 + kq_bin_header(1 + kq_bin_header(data) + data) + 1 +
           kq_bin_header(data);
}

/* Write an ok reply around its data, which is copied unless it stands in its place already; its length. */
static inline size_t kq_write_result(uint8_t *to, const kq_result *from) {
    size_t body = 1 + kq_bin_header(from->data.length) + from->data.length;
    uint8_t *at = to;
    *at++ = 0x96;
    *at++ = from->version;
    at = kq_put_uint(at, from->id);
    *at++ = 0;
    at = kq_put_bin_header(at, body);
    *at++ = 0x91;
    at = kq_put_bin_header(at, from->data.length);
    if (from->data.length && at != from->data.at) memcpy(at, from->data.at, from->data.length);
    at += from->data.length;
    *at++ = 0x93;
    at = kq_put_uint(at, from->queue);
    at = kq_put_uint(at, from->service_us);
    *at++ = from->loaded ? 0xc3 : 0xc2;
    *at++ = 0x80;
    return (size_t)(at - to);
}

#endif
