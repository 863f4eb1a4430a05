/*
 * An example client for Keyquorum in C, written from docs/protocol.md: the parts and what each owns.
 *
 *   wire.c    MessagePack in canonical form, signed envelopes
 *   trust.c   client.toml and identity.toml, the chain of cluster manifests, what a node says a key is
 *   client.c  connections and calls: who is asked, with which grant, until when
 *   main.c    the command line
 *
 * It keeps no routing table: it asks a node what the key is, follows `moved`, checks what comes back, and then asks the
 * key's holders one after the other. It signs a grant only for a node that says it needs one.
 *
 * Data and keys are in libsodium's locked memory, and what goes to libzmq or comes from it is wiped after use. What libzmq
 * itself keeps, such as its copies of the CURVE keys, is not in our hands.
 */
#ifndef KQ_H
#define KQ_H

#include <msgpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MESSAGE_MAX = 65536,
    DATA_MAX = 49152,
    RESULT_MAX = 49280,
    AAD_MAX = 4096,
    PROOF_MAX = 1024,
    GRANT_MAX = 2048,
    TIMEOUT_MAX_MS = 600000,
    HOLDERS_MAX = 64,
    NAME_SIZE = 129,     /* a name and its zero */
    PATTERN_SIZE = 513,  /* 128 code points and a zero */
    ENDPOINT_SIZE = 1025 /* 256 code points and a zero */
};

/* --- errors: a code of docs/protocol.md, or one of our own, and a sentence ---------------------------------------- */

struct failure {
    char code[65];
    char message[1200];
};

/* Takes the error down and returns false, so that a check can end with `return fail(...)`. */
bool fail(struct failure *failure, const char *code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* --- wire.c ------------------------------------------------------------------------------------------------------- */

struct bytes {
    const uint8_t *at;
    size_t len;
};

bool same(struct bytes one, struct bytes other);
bool same_text(struct bytes text, const char *other);
struct bytes bytes_of(const void *at, size_t len);

/* Where a message is encoded to. It never grows, so that no copy of what is in it is left behind. */
struct writer {
    uint8_t *at;
    size_t size;
    size_t len;
    bool full;
    msgpack_packer pack;
};

void writer_init(struct writer *writer, uint8_t *at, size_t size);
void put_array(struct writer *writer, size_t count);
void put_map(struct writer *writer, size_t count);
void put_uint(struct writer *writer, uint64_t value);
void put_bool(struct writer *writer, bool value);
void put_text(struct writer *writer, const char *text);
void put_bytes(struct writer *writer, struct bytes value);

/* A decoded message. What is read from it points into the bytes that it was decoded from. */
struct reader {
    msgpack_unpacked unpacked;
    const msgpack_object *fields;
};

/* Decodes an array of exactly `count` elements in canonical form. A reader that could not be opened may be closed, but
 * need not. */
bool reader_open(struct reader *reader, struct bytes raw, size_t limit, size_t count, const char *what,
                 struct failure *failure);
/* The same of an array whose last elements beyond `least` may be left out; `count` is how many there are. */
bool reader_open_some(struct reader *reader, struct bytes raw, size_t limit, size_t least, size_t most, size_t *count,
                      const char *what, struct failure *failure);
void reader_close(struct reader *reader);

bool get_uint(const msgpack_object *object, uint64_t low, uint64_t high, uint64_t *value);
bool get_bool(const msgpack_object *object, bool *value);
bool get_text(const msgpack_object *object, size_t most, struct bytes *value);
bool get_name(const msgpack_object *object, char name[NAME_SIZE]);
bool get_bytes(const msgpack_object *object, size_t least, size_t most, struct bytes *value);
bool get_array(const msgpack_object *object, size_t least, size_t most, const msgpack_object **items, size_t *count);
bool get_extensions(const msgpack_object *object);

/* Copies text with a zero at its end; false if there is no room, or a zero in it. */
bool copy_text(struct bytes text, char *to, size_t size);

enum role { BALANCER = 1, CLIENT = 2, NODE = 4, OPERATOR = 8 };

/* Who may sign: a name may appear several times, with keys of before. */
struct signer {
    char name[NAME_SIZE];
    enum role role;
    uint8_t key[32];
};

struct document {
    char issuer[NAME_SIZE];
    uint64_t serial;
    struct bytes payload;
    uint8_t hash[32];
};

/* Checks an envelope as docs/protocol.md says, "Envelope"; the payload points into `raw`. */
bool open_envelope(struct bytes raw, const char *kind, const struct signer *signers, size_t count, enum role role,
                   uint64_t quorum, struct document *document, struct failure *failure);

/* Writes the envelope of a payload; `secret` is libsodium's 64-byte form of an Ed25519 key. */
bool sign_envelope(struct writer *out, const char *kind, const char *issuer, uint64_t serial, struct bytes payload,
                   const uint8_t secret[64], struct failure *failure);

/* --- trust.c ------------------------------------------------------------------------------------------------------ */

struct member {
    char name[NAME_SIZE];
    enum role role;
    uint8_t sign_public[32];
    uint8_t curve_public[32];
    char endpoint[ENDPOINT_SIZE];
};

/* Who may refresh, reshare or (a balancer) grow which keys, by some manifest of the chain. */
struct refresh_rule {
    char identity[PATTERN_SIZE];
    char keys[PATTERN_SIZE];
    bool refresh, reshare, grow;
};

struct cluster {
    char name[NAME_SIZE];
    uint64_t serial;
    uint8_t hash[32];
    uint64_t quorum;
    uint64_t groups;
    struct member *members;
    size_t member_count;
    struct signer *signers; /* of every manifest of the chain */
    size_t signer_count;
    struct refresh_rule *refresh_rules; /* of every manifest of the chain */
    size_t refresh_rule_count;
    char retiring_name[NAME_SIZE]; /* the one entry of `retiring` that is about us, if there is one */
    uint8_t retiring_key[32];
};

/* In libsodium's locked memory, which is wiped when it is freed. */
struct identity {
    char name[NAME_SIZE];
    uint8_t sign_public[32];
    uint8_t sign_secret[64];
    char curve_public[41];
    char curve_secret[41];
};

struct config {
    struct cluster cluster;
    struct identity *identity;
    double timeout_s;
};

bool config_load(const char *path, struct config *config, struct failure *failure);
void config_close(struct config *config);

/* The node of that name, or NULL. */
const struct member *find_node(const struct cluster *cluster, const char *name);

/* What a checked description says of a key. */
struct key {
    char name[NAME_SIZE];
    uint8_t id[16];
    uint64_t version;
    uint64_t epoch;
    char algorithm[257];
    const struct member *holders[HOLDERS_MAX];
    size_t holder_count;
};

/* Checks the manifest and the certificate of a KeyDescription ("Key manifest" and what follows it in the page). */
bool open_description(struct bytes body, const char *name, const struct cluster *cluster, struct key *key,
                      struct failure *failure);

/* Reads a whole file (NULL or "-": the standard input) of at most `limit` bytes into locked memory that the caller frees
 * with sodium_free(). */
bool read_file(const char *path, size_t limit, uint8_t **at, size_t *len, struct failure *failure);

/* --- client.c ----------------------------------------------------------------------------------------------------- */

struct client;

struct use {
    const char *operation;
    const char *key;
    struct bytes data;
    struct bytes associated_data;
    struct bytes proof;
    bool digested;
};

/* `first` is the node to ask first, or NULL; with `trace` each step is told on the standard error. */
bool client_open(struct client **client, const struct config *config, const char *first, bool trace,
                 struct failure *failure);
void client_close(struct client *client);

/* One use of a key. The result points into the client's memory until the next call, and is wiped by it. */
bool client_use(struct client *client, const struct use *use, int64_t timeout_ms, struct bytes *result,
                struct failure *failure);

/* Wipes the last result. */
void client_forget(struct client *client);

#endif
