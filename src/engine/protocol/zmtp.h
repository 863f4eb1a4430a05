/* ZMTP 3.1 (RFC 37) with the CURVE mechanism (RFC 26), both roles, for messages of one frame. It knows no socket: bytes
   come in and go out through memory, and whoever calls it owns both.

   Arithmetic and randomness are libsodium's, called through pointers, so that no header and no link is needed. A box is
   always an authenticator of 16 bytes and the ciphertext. Integers on the wire are big-endian. All lengths are bytes. */

#ifndef KEYQUORUM_ZMTP_H
#define KEYQUORUM_ZMTP_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    int (*beforenm)(uint8_t *shared, const uint8_t *public_key, const uint8_t *secret_key);
    int (*seal)(uint8_t *box, const uint8_t *plain, unsigned long long length, const uint8_t *nonce, const uint8_t *shared);
    int (*open)(uint8_t *plain, const uint8_t *box, unsigned long long length, const uint8_t *nonce, const uint8_t *shared);
    int (*keypair)(uint8_t *public_key, uint8_t *secret_key);
    void (*random)(void *out, size_t length);
    void (*wipe)(void *start, size_t length);
} kq_sodium;

#define KQ_KEY 32u
#define KQ_BOX 16u     /* what a box has more than its content */
#define KQ_GREETING 64u
#define KQ_COOKIE 96u
#define KQ_SEALED 33u  /* what a message of CURVE has more than its content: name, nonce, box, flags */
#define KQ_HEAD_MAX 9u /* of a frame */
#define KQ_HANDSHAKE_MAX 512u /* of a handshake's command that is sent, its frame included */
#define KQ_COMMAND_MAX 2048u  /* of a handshake's command that is taken in: metadata may be long */

enum kq_stage {
    KQ_GREETS,    /* waits for the peer's greeting */
    KQ_HELLO,     /* server: waits for HELLO */
    KQ_INITIATE,  /* server: waits for INITIATE */
    KQ_WELCOME,   /* client: waits for WELCOME */
    KQ_READY,     /* client: waits for READY */
    KQ_JUDGED,    /* server: the peer proved its key, and whoever owns the connection has to say yes or no */
    KQ_OPEN,      /* messages */
    KQ_ENDED      /* the peer broke a rule, or was refused: the connection is to be closed */
};

typedef struct {
    int stage;
    int server;
    int refused;                /* client: the peer answered ERROR 400, that is it does not take this key */
    uint64_t sent, seen;        /* the last nonces */
    /* The long-term keys, which are the caller's: they must stay until the handshake is over. The last one is the client's. */
    const uint8_t *own_public, *own_secret, *server_public;
    uint8_t short_public[KQ_KEY]; /* of this connection alone */
    uint8_t short_secret[KQ_KEY];
    uint8_t peer_short[KQ_KEY];
    uint8_t peer_public[KQ_KEY]; /* server: the client's long-term key, once it is proved */
    uint8_t cookie[KQ_COOKIE];
    uint8_t shared[KQ_KEY];
} kq_curve;

/* A frame that lies in memory: its body, and where the next one begins. */
typedef struct {
    uint8_t *body;
    size_t length;
    size_t whole;
    int command;
    int more;
} kq_frame;

static inline void kq_put_be(uint8_t *at, uint64_t value, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) at[i] = (uint8_t)(value >> 8 * (bytes - 1 - i));
}

static inline uint64_t kq_get_be(const uint8_t *at, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; i++) value = value << 8 | at[i];
    return value;
}

/* The frame at the beginning of so many bytes: 1; 0 if more are needed (*needed in all, as far as is known); -1 if it is
   none, or has a longer body than limit. */
static inline int kq_next_frame(uint8_t *at, size_t length, size_t limit, kq_frame *frame, size_t *needed) {
    *needed = 2;
    if (length < 2) return 0;
    uint8_t flags = at[0];
    if (flags & ~7u || (flags & 4 && flags & 1)) return -1;
    size_t head = flags & 2 ? 9 : 2;
    *needed = head;
    if (length < head) return 0;
    uint64_t body = flags & 2 ? kq_get_be(at + 1, 8) : at[1];
    if (body > limit) return -1;
    *needed = frame->whole = head + (size_t)body;
    frame->body = at + head;
    frame->length = (size_t)body;
    frame->command = flags & 4;
    frame->more = flags & 1;
    return length >= *needed;
}

static inline size_t kq_frame_head(uint8_t *to, size_t body, int command) {
    to[0] = command ? 4 : 0;
    if (body < 256) {
        to[1] = (uint8_t)body;
        return 2;
    }
    to[0] |= 2;
    kq_put_be(to + 1, body, 8);
    return 9;
}

static inline void kq_short_nonce(uint8_t *nonce, const char *prefix, uint64_t number) {
    memcpy(nonce, prefix, 16);
    kq_put_be(nonce + 16, number, 8);
}

static inline void kq_long_nonce(uint8_t *nonce, const char *prefix, const uint8_t *random) {
    memcpy(nonce, prefix, 8);
    memcpy(nonce + 8, random, 16);
}

static inline void kq_end_curve(kq_curve *curve, const kq_sodium *sodium) {
    sodium->wipe(curve, sizeof *curve);
    curve->stage = KQ_ENDED;
}

static inline size_t kq_write_greeting(uint8_t *to, int server) {
    memset(to, 0, KQ_GREETING);
    to[0] = 0xff;
    to[9] = 0x7f;
    to[10] = 3;
    to[11] = 1;
    memcpy(to + 12, "CURVE", 5);
    to[32] = (uint8_t)server;
    return KQ_GREETING;
}

/* Whether what came so far can be a greeting. Its as-server is not looked at: libzmq leaves it 0 in both roles, and who is
   who shows in the commands. */
static inline int kq_is_greeting(const uint8_t *at, size_t length) {
    static const uint8_t mechanism[20] = "CURVE";
    if (length > 0 && at[0] != 0xff) return 0;
    if (length > 9 && !(at[9] & 1)) return 0;
    if (length > 10 && at[10] < 3) return 0;
    return length < KQ_GREETING || memcmp(at + 12, mechanism, 20) == 0;
}

/* --- messages ------------------------------------------------------------------------------------------------------ */

/* The frame of a message, written around its content, which may already stand at to + kq_message_head(length). */
static inline size_t kq_message_head(size_t length) { return (length + KQ_SEALED < 256 ? 2 : 9) + KQ_SEALED; }

static inline size_t kq_write_message(uint8_t *to, kq_curve *curve, const kq_sodium *sodium, const uint8_t *content,
                                      size_t length, uint8_t flags) {
    uint8_t nonce[24];
    size_t head = kq_frame_head(to, length + KQ_SEALED, 0);
    uint8_t *at = to + head;
    uint8_t *plain = at + 8 + 8 + KQ_BOX;
    if (content != plain + 1) memmove(plain + 1, content, length);
    plain[0] = flags;
    memcpy(at, "\x07MESSAGE", 8);
    kq_short_nonce(nonce, curve->server ? "CurveZMQMESSAGES" : "CurveZMQMESSAGEC", ++curve->sent);
    memcpy(at + 8, nonce + 16, 8);
    sodium->seal(at + 16, plain, length + 1, nonce, curve->shared);
    return head + length + KQ_SEALED;
}

/* Open a message's frame where it lies: its content and flags (1: more frames follow, 2: a command); 0 if it is none. */
static inline int kq_open_message(kq_curve *curve, const kq_sodium *sodium, const kq_frame *frame, uint8_t **content,
                                  size_t *length, uint8_t *flags) {
    uint8_t nonce[24];
    if (frame->command || frame->more || frame->length < KQ_SEALED || memcmp(frame->body, "\x07MESSAGE", 8) != 0) return 0;
    uint64_t number = kq_get_be(frame->body + 8, 8);
    if (number <= curve->seen) return 0;
    kq_short_nonce(nonce, curve->server ? "CurveZMQMESSAGEC" : "CurveZMQMESSAGES", number);
    uint8_t *box = frame->body + 16;
    if (sodium->open(box, box, frame->length - 16, nonce, curve->shared) != 0) return 0;
    curve->seen = number;
    *flags = box[0];
    *content = box + 1;
    *length = frame->length - KQ_SEALED;
    return 1;
}

/* --- the handshake ------------------------------------------------------------------------------------------------- */

static inline size_t kq_command(uint8_t *to, size_t body) {
    size_t head = body < 256 ? 2 : 9;
    if (head == 9) memmove(to + 9, to + 2, body);
    kq_frame_head(to, body, 1);
    return head + body;
}

/* Socket-Type and an empty Identity. */
static inline size_t kq_put_metadata(uint8_t *to, const char *type, size_t length) {
    uint8_t *at = to;
    *at++ = 11;
    memcpy(at, "Socket-Type", 11);
    kq_put_be(at + 11, length, 4);
    memcpy(at + 15, type, length);
    at += 15 + length;
    *at++ = 8;
    memcpy(at, "Identity", 8);
    kq_put_be(at + 8, 0, 4);
    return (size_t)(at + 12 - to);
}

static inline int kq_same_name(const uint8_t *at, size_t length, const char *name) {
    if (length != strlen(name)) return 0;
    for (size_t i = 0; i < length; i++) {
        uint8_t one = at[i] >= 'A' && at[i] <= 'Z' ? at[i] + 32 : at[i];
        uint8_t other = name[i] >= 'A' && name[i] <= 'Z' ? (uint8_t)name[i] + 32 : (uint8_t)name[i];
        if (one != other) return 0;
    }
    return 1;
}

/* Whether it is well-formed metadata that names a socket type which talks to this role. */
static inline int kq_good_metadata(const uint8_t *at, size_t length, int server) {
    const uint8_t *end = at + length;
    int good = 0;
    while (at < end) {
        size_t name = *at++;
        if (!name || (size_t)(end - at) < name + 4) return 0;
        const uint8_t *named = at;
        at += name;
        uint64_t value = kq_get_be(at, 4);
        at += 4;
        if (value > (uint64_t)(end - at)) return 0;
        if (kq_same_name(named, name, "Socket-Type")) {
            const char *fits[] = {server ? "DEALER" : "ROUTER", server ? "ROUTER" : "DEALER", server ? "REQ" : "REP"};
            for (size_t i = 0; i < 3; i++) good |= value == strlen(fits[i]) && memcmp(at, fits[i], (size_t)value) == 0;
        }
        at += value;
    }
    return good;
}

/* Begin: what is to be sent at once. The keys and the role stand in the struct, whose other members are 0. */
static inline size_t kq_begin(kq_curve *curve, uint8_t *to) {
    curve->stage = KQ_GREETS;
    return kq_write_greeting(to, curve->server);
}

static inline size_t kq_say_hello(kq_curve *curve, const kq_sodium *sodium, uint8_t *to) {
    uint8_t nonce[24], zeros[64] = {0}, shared[KQ_KEY];
    uint8_t *body = to + 2;
    sodium->keypair(curve->short_public, curve->short_secret);
    if (sodium->beforenm(shared, curve->server_public, curve->short_secret) != 0) return 0;
    memset(body, 0, 200);
    memcpy(body, "\x05HELLO\x01", 7);
    memcpy(body + 80, curve->short_public, KQ_KEY);
    kq_short_nonce(nonce, "CurveZMQHELLO---", ++curve->sent);
    memcpy(body + 112, nonce + 16, 8);
    sodium->seal(body + 120, zeros, 64, nonce, shared);
    sodium->wipe(shared, sizeof shared);
    curve->stage = KQ_WELCOME;
    return kq_command(to, 200);
}

static inline size_t kq_heard_hello(kq_curve *curve, const kq_sodium *sodium, const kq_frame *frame, uint8_t *to) {
    uint8_t nonce[24], shared[KQ_KEY], plain[KQ_KEY + KQ_COOKIE];
    const uint8_t *heard = frame->body;
    uint8_t *body = to + 2;
    size_t said = 0;
    if (frame->length != 200 || memcmp(heard, "\x05HELLO\x01\x00", 8) != 0) return 0;
    memcpy(curve->peer_short, heard + 80, KQ_KEY);
    if (sodium->beforenm(shared, curve->peer_short, curve->own_secret) != 0) return 0;
    curve->seen = kq_get_be(heard + 112, 8);
    kq_short_nonce(nonce, "CurveZMQHELLO---", curve->seen);
    uint8_t zeros[64];
    uint8_t any = 0;
    if (sodium->open(zeros, heard + 120, 80, nonce, shared) == 0) {
        for (size_t i = 0; i < 64; i++) any |= zeros[i];
        if (!any) {
            sodium->keypair(curve->short_public, curve->short_secret);
            sodium->random(curve->cookie, KQ_COOKIE); /* this side keeps its state, so the cookie need not hold it */
            memcpy(plain, curve->short_public, KQ_KEY);
            memcpy(plain + KQ_KEY, curve->cookie, KQ_COOKIE);
            memcpy(body, "\x07WELCOME", 8);
            sodium->random(body + 8, 16);
            kq_long_nonce(nonce, "WELCOME-", body + 8);
            sodium->seal(body + 24, plain, sizeof plain, nonce, shared);
            curve->stage = KQ_INITIATE;
            said = kq_command(to, 24 + sizeof plain + KQ_BOX);
        }
    }
    sodium->wipe(shared, sizeof shared);
    return said;
}

static inline size_t kq_heard_welcome(kq_curve *curve, const kq_sodium *sodium, const kq_frame *frame, uint8_t *to) {
    uint8_t nonce[24], shared[KQ_KEY], plain[KQ_KEY + KQ_COOKIE], vouched[2 * KQ_KEY], inner[256];
    const uint8_t *heard = frame->body;
    uint8_t *body = to + 2;
    size_t said = 0;
    if (frame->length != 168 || memcmp(heard, "\x07WELCOME", 8) != 0) return 0;
    if (sodium->beforenm(shared, curve->server_public, curve->short_secret) != 0) return 0;
    kq_long_nonce(nonce, "WELCOME-", heard + 8);
    if (sodium->open(plain, heard + 24, 144, nonce, shared) == 0) {
        memcpy(curve->peer_short, plain, KQ_KEY);
        memcpy(curve->cookie, plain + KQ_KEY, KQ_COOKIE);
        if (sodium->beforenm(shared, curve->peer_short, curve->own_secret) == 0 &&
            sodium->beforenm(curve->shared, curve->peer_short, curve->short_secret) == 0) {
            memcpy(inner, curve->own_public, KQ_KEY);
            sodium->random(inner + 32, 16);
            kq_long_nonce(nonce, "VOUCH---", inner + 32);
            memcpy(vouched, curve->short_public, KQ_KEY);
            memcpy(vouched + KQ_KEY, curve->server_public, KQ_KEY);
            sodium->seal(inner + 48, vouched, sizeof vouched, nonce, shared);
            size_t length = 128 + kq_put_metadata(inner + 128, "DEALER", 6);
            memcpy(body, "\x08INITIATE", 9);
            memcpy(body + 9, curve->cookie, KQ_COOKIE);
            kq_short_nonce(nonce, "CurveZMQINITIATE", ++curve->sent);
            memcpy(body + 105, nonce + 16, 8);
            sodium->seal(body + 113, inner, length, nonce, curve->shared);
            curve->stage = KQ_READY;
            said = kq_command(to, 113 + length + KQ_BOX);
        }
    }
    sodium->wipe(shared, sizeof shared);
    return said;
}

/* The client has proved its key, which is then asked about. */
static inline int kq_heard_initiate(kq_curve *curve, const kq_sodium *sodium, const kq_frame *frame) {
    uint8_t nonce[24], shared[KQ_KEY], vouched[2 * KQ_KEY];
    uint8_t *heard = frame->body;
    int good = 0;
    if (frame->length < 113 + 128 + KQ_BOX || memcmp(heard, "\x08INITIATE", 9) != 0) return 0;
    if (memcmp(heard + 9, curve->cookie, KQ_COOKIE) != 0) return 0;
    uint64_t number = kq_get_be(heard + 105, 8);
    if (number <= curve->seen) return 0;
    if (sodium->beforenm(curve->shared, curve->peer_short, curve->short_secret) != 0) return 0;
    kq_short_nonce(nonce, "CurveZMQINITIATE", number);
    uint8_t *inner = heard + 113;
    if (sodium->open(inner, inner, frame->length - 113, nonce, curve->shared) != 0) return 0;
    curve->seen = number;
    kq_long_nonce(nonce, "VOUCH---", inner + 32);
    if (sodium->beforenm(shared, inner, curve->short_secret) != 0) return 0;
    if (sodium->open(vouched, inner + 48, 80, nonce, shared) == 0 && memcmp(vouched, curve->peer_short, KQ_KEY) == 0 &&
        memcmp(vouched + KQ_KEY, curve->own_public, KQ_KEY) == 0 &&
        kq_good_metadata(inner + 128, frame->length - 113 - KQ_BOX - 128, 1)) {
        memcpy(curve->peer_public, inner, KQ_KEY);
        curve->stage = KQ_JUDGED;
        good = 1;
    }
    sodium->wipe(shared, sizeof shared);
    return good;
}

/* Say READY, or ERROR 400 to a key that is refused (RFC 27: the status of ZAP). */
static inline size_t kq_judge(kq_curve *curve, const kq_sodium *sodium, int welcome, uint8_t *to) {
    uint8_t nonce[24], metadata[64];
    uint8_t *body = to + 2;
    if (!welcome) {
        memcpy(body, "\x05" "ERROR" "\x03" "400", 10);
        curve->stage = KQ_ENDED;
        return kq_command(to, 10);
    }
    size_t length = kq_put_metadata(metadata, "ROUTER", 6);
    memcpy(body, "\x05READY", 6);
    kq_short_nonce(nonce, "CurveZMQREADY---", ++curve->sent);
    memcpy(body + 6, nonce + 16, 8);
    sodium->seal(body + 14, metadata, length, nonce, curve->shared);
    sodium->wipe(curve->short_secret, KQ_KEY);
    curve->own_public = curve->own_secret = curve->server_public = NULL;
    curve->stage = KQ_OPEN;
    return kq_command(to, 14 + length + KQ_BOX);
}

static inline int kq_heard_ready(kq_curve *curve, const kq_sodium *sodium, const kq_frame *frame) {
    uint8_t nonce[24];
    uint8_t *heard = frame->body;
    if (frame->length < 14 + KQ_BOX || memcmp(heard, "\x05READY", 6) != 0) return 0;
    curve->seen = kq_get_be(heard + 6, 8);
    kq_short_nonce(nonce, "CurveZMQREADY---", curve->seen);
    if (sodium->open(heard + 14, heard + 14, frame->length - 14, nonce, curve->shared) != 0) return 0;
    if (!kq_good_metadata(heard + 14, frame->length - 14 - KQ_BOX, 0)) return 0;
    sodium->wipe(curve->short_secret, KQ_KEY);
    curve->own_public = curve->own_secret = curve->server_public = NULL;
    curve->stage = KQ_OPEN;
    return 1;
}

/* Take in what came in the handshake: how many bytes of it were used; 0 if more is needed. What is to be sent is written
   to ``to`` (KQ_HANDSHAKE_MAX bytes), *said of it. The stage tells how it goes on. */
static inline size_t kq_shake(kq_curve *curve, const kq_sodium *sodium, uint8_t *at, size_t length, uint8_t *to,
                              size_t *said) {
    kq_frame frame;
    size_t needed;
    *said = 0;
    if (curve->stage == KQ_GREETS) {
        if (!kq_is_greeting(at, length)) {
            curve->stage = KQ_ENDED;
            return 0;
        }
        if (length < KQ_GREETING) return 0;
        if (curve->server) {
            curve->stage = KQ_HELLO;
        } else if (!(*said = kq_say_hello(curve, sodium, to))) {
            curve->stage = KQ_ENDED;
        }
        return KQ_GREETING;
    }
    int found = kq_next_frame(at, length, KQ_COMMAND_MAX, &frame, &needed);
    if (found == 0) return 0;
    int good = 0;
    if (found > 0 && frame.command) {
        if (!curve->server && frame.length == 10 && memcmp(frame.body, "\x05" "ERROR" "\x03" "400", 10) == 0) {
            curve->refused = 1;
        } else if (curve->stage == KQ_HELLO) {
            good = (*said = kq_heard_hello(curve, sodium, &frame, to)) > 0;
        } else if (curve->stage == KQ_INITIATE) {
            good = kq_heard_initiate(curve, sodium, &frame);
        } else if (curve->stage == KQ_WELCOME) {
            good = (*said = kq_heard_welcome(curve, sodium, &frame, to)) > 0;
        } else if (curve->stage == KQ_READY) {
            good = kq_heard_ready(curve, sodium, &frame);
        }
    }
    if (!good) {
        curve->stage = KQ_ENDED;
        return 0;
    }
    return frame.whole;
}

#endif
