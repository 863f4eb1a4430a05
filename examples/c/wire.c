/* MessagePack in canonical form, and signed envelopes: docs/protocol.md, "Encoding" and "Envelope". */
#include "kq.h"

#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* The labels of what is signed; the zero byte of each counts. */
static const char LABEL[] = "keyquorum/signed/1", TREE[] = "keyquorum/signed-tree/1", LEAF[] = "keyquorum/signed-leaf/1",
                  FORK[] = "keyquorum/signed-fork/1";

enum { ENVELOPE_MAX = 1048576, SIGNATURES_MAX = 64 };

bool fail(struct failure *failure, const char *code, const char *format, ...) {
    va_list arguments;
    snprintf(failure->code, sizeof failure->code, "%s", code);
    va_start(arguments, format);
    vsnprintf(failure->message, sizeof failure->message, format, arguments);
    va_end(arguments);
    /* Part of it may come from a node: it must not steer a terminal. */
    for (char *each = failure->message; *each; each++) {
        if ((unsigned char)*each < 0x20 || (unsigned char)*each > 0x7e) {
            *each = '?';
        }
    }
    return false;
}

bool same(struct bytes one, struct bytes other) {
    return one.len == other.len && (one.len == 0 || memcmp(one.at, other.at, one.len) == 0);
}

bool same_text(struct bytes text, const char *other) {
    return same(text, bytes_of(other, strlen(other)));
}

struct bytes bytes_of(const void *at, size_t len) {
    return (struct bytes){at, len};
}

/* --- writing: msgpack-c takes the shortest form of each number and length by itself ------------------------------- */

static int write_to(void *to, const char *data, size_t len) {
    struct writer *writer = to;
    if (writer->full || len > writer->size - writer->len) {
        writer->full = true;
        return -1;
    }
    if (len > 0) {
        memcpy(writer->at + writer->len, data, len);
    }
    writer->len += len;
    return 0;
}

void writer_init(struct writer *writer, uint8_t *at, size_t size) {
    writer->at = at;
    writer->size = size;
    writer->len = 0;
    writer->full = false;
    msgpack_packer_init(&writer->pack, writer, write_to);
}

void put_array(struct writer *writer, size_t count) {
    msgpack_pack_array(&writer->pack, count);
}

void put_map(struct writer *writer, size_t count) {
    msgpack_pack_map(&writer->pack, count);
}

void put_uint(struct writer *writer, uint64_t value) {
    msgpack_pack_uint64(&writer->pack, value);
}

void put_bool(struct writer *writer, bool value) {
    if (value) {
        msgpack_pack_true(&writer->pack);
    } else {
        msgpack_pack_false(&writer->pack);
    }
}

void put_text(struct writer *writer, const char *text) {
    size_t len = strlen(text);
    msgpack_pack_str(&writer->pack, len);
    msgpack_pack_str_body(&writer->pack, text, len);
}

void put_bytes(struct writer *writer, struct bytes value) {
    msgpack_pack_bin(&writer->pack, value.len);
    msgpack_pack_bin_body(&writer->pack, value.at, value.len);
}

/* --- reading ------------------------------------------------------------------------------------------------------ */

static uint64_t big_endian(const uint8_t *at, size_t len) {
    uint64_t value = 0;
    for (size_t index = 0; index < len; index++) {
        value = value << 8 | at[index];
    }
    return value;
}

/* Whether every count and length fits in what there is: msgpack-c makes room for as many elements as a header promises,
 * before it looks whether they are there. Types that no message has are refused too. */
static bool counts_fit(struct bytes raw) {
    uint64_t wanted = 1; /* values that must still come, of at least a byte each */
    while (wanted > 0) {
        uint8_t type = raw.len > 0 ? raw.at[0] : 0xc1;
        size_t head = 0; /* bytes of the number behind the type */
        uint64_t number = 0, inside = 0, skipped = 0;
        if (type >= 0xcc && type <= 0xd3) { /* uint 8 to 64, int 8 to 64 */
            head = (size_t)1 << (type - (type < 0xd0 ? 0xcc : 0xd0));
        } else if ((type >= 0xc4 && type <= 0xc6) || (type >= 0xd9 && type <= 0xdb)) { /* bin, str */
            head = (size_t)1 << (type - (type < 0xd9 ? 0xc4 : 0xd9));
        } else if (type >= 0xdc && type <= 0xdf) { /* array 16, 32, map 16, 32 */
            head = type & 1 ? 4 : 2;
        } else if (type >= 0xc0 && type <= 0xdf && type != 0xc2 && type != 0xc3) {
            return false;
        }
        if (raw.len < 1 + head) {
            return false;
        }
        number = big_endian(raw.at + 1, head);
        if (type >= 0x80 && type <= 0x9f) {
            inside = (uint64_t)(type & 0x0f) * (type < 0x90 ? 2 : 1);
        } else if (type >= 0xdc && type <= 0xdf) {
            inside = number * (type < 0xde ? 1 : 2);
        } else if (type >= 0xa0 && type <= 0xbf) {
            skipped = type & 0x1f;
        } else if ((type >= 0xc4 && type <= 0xc6) || (type >= 0xd9 && type <= 0xdb)) {
            skipped = number;
        }
        raw = bytes_of(raw.at + 1 + head, raw.len - 1 - head);
        wanted = wanted - 1 + inside;
        if (skipped > raw.len || wanted > raw.len - skipped) {
            return false;
        }
        raw = bytes_of(raw.at + skipped, raw.len - (size_t)skipped);
    }
    return raw.len == 0;
}

/* Instead of encoding again into a buffer, each piece is compared where it would go. */
static int compare_to(void *to, const char *data, size_t len) {
    struct bytes *rest = to;
    if (len > rest->len || (len > 0 && memcmp(rest->at, data, len) != 0)) {
        return -1;
    }
    rest->at += len;
    rest->len -= len;
    return 0;
}

static bool is_canonical(struct bytes raw, msgpack_object object) {
    struct bytes rest = raw;
    msgpack_packer pack;
    msgpack_packer_init(&pack, &rest, compare_to);
    return msgpack_pack_object(&pack, object) == 0 && rest.len == 0;
}

bool reader_open(struct reader *reader, struct bytes raw, size_t limit, size_t count, const char *what,
                 struct failure *failure) {
    size_t found;
    return reader_open_some(reader, raw, limit, count, count, &found, what, failure);
}

bool reader_open_some(struct reader *reader, struct bytes raw, size_t limit, size_t least, size_t most, size_t *count,
                      const char *what, struct failure *failure) {
    size_t end = 0;
    bool good;
    msgpack_unpacked_init(&reader->unpacked);
    if (raw.len > limit) {
        return fail(failure, "protocol-error", "%s: %zu bytes, the limit is %zu", what, raw.len, limit);
    }
    good = counts_fit(raw) &&
           msgpack_unpack_next(&reader->unpacked, (const char *)raw.at, raw.len, &end) == MSGPACK_UNPACK_SUCCESS &&
           is_canonical(raw, reader->unpacked.data);
    if (!good) {
        fail(failure, "protocol-error", "%s: not in canonical form", what);
    } else if (!get_array(&reader->unpacked.data, least, most, &reader->fields, count)) {
        good = fail(failure, "protocol-error", "%s: no array of %zu elements", what, most);
    }
    if (!good) {
        reader_close(reader);
    }
    return good;
}

void reader_close(struct reader *reader) {
    msgpack_unpacked_destroy(&reader->unpacked);
}

bool get_uint(const msgpack_object *object, uint64_t low, uint64_t high, uint64_t *value) {
    if (object->type != MSGPACK_OBJECT_POSITIVE_INTEGER || object->via.u64 < low || object->via.u64 > high) {
        return false;
    }
    *value = object->via.u64;
    return true;
}

bool get_bool(const msgpack_object *object, bool *value) {
    if (object->type != MSGPACK_OBJECT_BOOLEAN) {
        return false;
    }
    *value = object->via.boolean;
    return true;
}

/* Continuation bytes of UTF-8 do not count. Whether it is UTF-8 at all is not looked at: it is compared with ASCII, or
 * shown by fail(), which lets ASCII alone through. */
bool get_text(const msgpack_object *object, size_t most, struct bytes *value) {
    size_t points = 0;
    if (object->type != MSGPACK_OBJECT_STR) {
        return false;
    }
    *value = bytes_of(object->via.str.ptr, object->via.str.size);
    for (size_t index = 0; index < value->len; index++) {
        points += (value->at[index] & 0xc0) != 0x80;
    }
    return points <= most && value->len <= 4 * most;
}

static bool is_alphanumeric(uint8_t byte) {
    return (byte >= '0' && byte <= '9') || (byte >= 'A' && byte <= 'Z') || (byte >= 'a' && byte <= 'z');
}

bool get_name(const msgpack_object *object, char name[NAME_SIZE]) {
    struct bytes text;
    if (!get_text(object, NAME_SIZE - 1, &text) || text.len == 0 || !is_alphanumeric(text.at[0])) {
        return false;
    }
    for (size_t index = 0; index < text.len; index++) {
        if (text.at[index] == 0 || (!is_alphanumeric(text.at[index]) && strchr("._:/@+-", text.at[index]) == NULL)) {
            return false;
        }
    }
    return copy_text(text, name, NAME_SIZE);
}

bool get_bytes(const msgpack_object *object, size_t least, size_t most, struct bytes *value) {
    if (object->type != MSGPACK_OBJECT_BIN || object->via.bin.size < least || object->via.bin.size > most) {
        return false;
    }
    *value = bytes_of(object->via.bin.ptr, object->via.bin.size);
    return true;
}

bool get_array(const msgpack_object *object, size_t least, size_t most, const msgpack_object **items, size_t *count) {
    if (object->type != MSGPACK_OBJECT_ARRAY || object->via.array.size < least || object->via.array.size > most) {
        return false;
    }
    *items = object->via.array.ptr;
    *count = object->via.array.size;
    return true;
}

bool get_extensions(const msgpack_object *object) {
    struct bytes key, value, other;
    if (object->type != MSGPACK_OBJECT_MAP || object->via.map.size > 8) {
        return false;
    }
    for (uint32_t index = 0; index < object->via.map.size; index++) {
        const msgpack_object_kv *pairs = object->via.map.ptr;
        if (!get_text(&pairs[index].key, 32, &key) || key.len == 0 || !get_bytes(&pairs[index].val, 0, 4096, &value)) {
            return false;
        }
        for (uint32_t before = 0; before < index; before++) {
            if (get_text(&pairs[before].key, 32, &other) && same(key, other)) {
                return false;
            }
        }
    }
    return true;
}

bool copy_text(struct bytes text, char *to, size_t size) {
    if (text.len >= size || (text.len > 0 && memchr(text.at, 0, text.len) != NULL)) {
        return false;
    }
    if (text.len > 0) {
        memcpy(to, text.at, text.len);
    }
    to[text.len] = 0;
    return true;
}

/* --- envelopes ---------------------------------------------------------------------------------------------------- */

/* What a signature is made over: label, zero byte and body. On the heap, since a cluster manifest may have a mebibyte. */
static uint8_t *labelled(struct bytes body) {
    uint8_t *joined = malloc(sizeof LABEL + body.len);
    if (joined != NULL) {
        memcpy(joined, LABEL, sizeof LABEL);
        memcpy(joined + sizeof LABEL, body.at, body.len);
    }
    return joined;
}

/* Whether it is a signature by the key: over the labelled body, or over the root of a tree with the body as a leaf. */
static bool is_signed_by(struct bytes value, const uint8_t *joined, size_t len, const uint8_t key[32]) {
    const size_t depth = (value.len - crypto_sign_BYTES) / crypto_hash_sha256_BYTES;
    uint8_t pair[sizeof FORK + 2 * crypto_hash_sha256_BYTES], root[sizeof TREE + crypto_hash_sha256_BYTES];
    uint8_t *found = root + sizeof TREE;
    crypto_hash_sha256_state leaf;
    if (value.len == crypto_sign_BYTES) {
        return crypto_sign_verify_detached(value.at, joined, len, key) == 0;
    }
    size_t place = value.at[crypto_sign_BYTES];
    if (value.len != crypto_sign_BYTES + 1 + depth * crypto_hash_sha256_BYTES || depth == 0 || place >> depth != 0) {
        return false;
    }
    memcpy(root, TREE, sizeof TREE);
    memcpy(pair, FORK, sizeof FORK);
    crypto_hash_sha256_init(&leaf);
    crypto_hash_sha256_update(&leaf, (const uint8_t *)LEAF, sizeof LEAF);
    crypto_hash_sha256_update(&leaf, joined + sizeof LABEL, len - sizeof LABEL);
    crypto_hash_sha256_final(&leaf, found);
    for (size_t level = 0; level < depth; level++, place >>= 1) {
        const uint8_t *beside = value.at + crypto_sign_BYTES + 1 + level * crypto_hash_sha256_BYTES;
        memcpy(pair + sizeof FORK, place & 1 ? beside : found, crypto_hash_sha256_BYTES);
        memcpy(pair + sizeof FORK + crypto_hash_sha256_BYTES, place & 1 ? found : beside, crypto_hash_sha256_BYTES);
        crypto_hash_sha256(found, pair, sizeof pair);
    }
    return crypto_sign_verify_detached(value.at, root, sizeof root, key) == 0;
}

static bool check_signature(const char *name, struct bytes value, const uint8_t *joined, size_t len,
                            const struct signer *signers, size_t count, enum role role, const char *kind,
                            struct failure *failure) {
    bool known = false;
    for (size_t index = 0; index < count; index++) {
        if (signers[index].role != role || strcmp(signers[index].name, name) != 0) {
            continue;
        }
        known = true;
        if (is_signed_by(value, joined, len, signers[index].key)) {
            return true;
        }
    }
    return fail(failure, "manifest-error", known ? "%s: the signature of '%s' is wrong" : "%s: '%s' may not sign this",
                kind, name);
}

static bool check_signatures(const msgpack_object *items, size_t found, struct bytes body, const char *kind,
                             const struct signer *signers, size_t count, enum role role, const char *issuer,
                             struct failure *failure) {
    char names[SIGNATURES_MAX][NAME_SIZE];
    bool issued = false, good = true;
    uint8_t *joined = labelled(body);
    if (joined == NULL) {
        return fail(failure, "error", "no memory");
    }
    for (size_t index = 0; good && index < found; index++) {
        const msgpack_object *pair;
        size_t parts;
        struct bytes value;
        good = get_array(&items[index], 2, 2, &pair, &parts) && get_name(&pair[0], names[index]) &&
               get_bytes(&pair[1], crypto_sign_BYTES, crypto_sign_BYTES + 1 + 6 * crypto_hash_sha256_BYTES, &value);
        for (size_t before = 0; good && before < index; before++) {
            good = strcmp(names[before], names[index]) != 0;
        }
        if (!good) {
            fail(failure, "protocol-error", "%s: a signature is malformed, or a signer appears twice", kind);
            break;
        }
        issued = issued || strcmp(names[index], issuer) == 0;
        good = check_signature(names[index], value, joined, sizeof LABEL + body.len, signers, count, role, kind, failure);
    }
    free(joined);
    if (good && !issued) {
        return fail(failure, "manifest-error", "%s: the issuer '%s' did not sign it", kind, issuer);
    }
    return good;
}

bool open_envelope(struct bytes raw, const char *kind, const struct signer *signers, size_t count, enum role role,
                   uint64_t quorum, struct document *document, struct failure *failure) {
    struct reader envelope, inner;
    struct bytes body = {NULL, 0}, told_kind = {NULL, 0};
    const msgpack_object *signatures = NULL;
    size_t found = 0;
    uint64_t format;
    bool good = reader_open(&envelope, raw, ENVELOPE_MAX, 2, kind, failure);
    if (good && !(get_bytes(&envelope.fields[0], 0, ENVELOPE_MAX, &body) &&
                  get_array(&envelope.fields[1], 1, SIGNATURES_MAX, &signatures, &found))) {
        good = fail(failure, "protocol-error", "%s: no signed envelope", kind);
    }
    if (good) {
        good = reader_open(&inner, body, ENVELOPE_MAX, 5, kind, failure);
        if (good && !(get_uint(&inner.fields[0], 1, 1, &format) && get_text(&inner.fields[1], 32, &told_kind) &&
                      get_name(&inner.fields[2], document->issuer) &&
                      get_uint(&inner.fields[3], 0, INT64_MAX, &document->serial) &&
                      get_bytes(&inner.fields[4], 0, ENVELOPE_MAX, &document->payload))) {
            good = fail(failure, "protocol-error", "%s: the body of the envelope is malformed", kind);
        }
        if (good && !same_text(told_kind, kind)) {
            good = fail(failure, "manifest-error", "another kind of document came where '%s' was expected", kind);
        }
        reader_close(&inner);
    }
    if (good && found < quorum) {
        good = fail(failure, "manifest-error", "%s: %zu of %llu signatures needed", kind, found,
                    (unsigned long long)quorum);
    }
    if (good) {
        good = check_signatures(signatures, found, body, kind, signers, count, role, document->issuer, failure);
        crypto_hash_sha256(document->hash, body.at, body.len);
    }
    reader_close(&envelope);
    return good;
}

bool sign_envelope(struct writer *out, const char *kind, const char *issuer, uint64_t serial, struct bytes payload,
                   const uint8_t secret[64], struct failure *failure) {
    uint8_t body[sizeof LABEL + GRANT_MAX], signature[crypto_sign_BYTES];
    struct writer inner;
    memcpy(body, LABEL, sizeof LABEL);
    writer_init(&inner, body + sizeof LABEL, sizeof body - sizeof LABEL);
    put_array(&inner, 5);
    put_uint(&inner, 1);
    put_text(&inner, kind);
    put_text(&inner, issuer);
    put_uint(&inner, serial);
    put_bytes(&inner, payload);
    if (inner.full) {
        return fail(failure, "error", "%s: too long", kind);
    }
    crypto_sign_detached(signature, NULL, body, sizeof LABEL + inner.len, secret);
    put_array(out, 2);
    put_bytes(out, bytes_of(inner.at, inner.len));
    put_array(out, 1);
    put_array(out, 2);
    put_text(out, issuer);
    put_bytes(out, bytes_of(signature, sizeof signature));
    return !out->full || fail(failure, "error", "%s: too long", kind);
}
