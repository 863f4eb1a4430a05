/* What the client trusts, and who it is: its two files, the chain of cluster manifests, and what a node says a key is.
 * docs/protocol.md: "Files of a client", "Cluster manifest", "Key manifest". */
#include "kq.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

enum { TOML_MAX = 65536, CHAIN_MAX = 64 * 1048576, MANIFEST_MAX = 1048576, PATH_SIZE = 4096 };

/* --- files -------------------------------------------------------------------------------------------------------- */

bool read_file(const char *path, size_t limit, uint8_t **at, size_t *len, struct failure *failure) {
    bool is_stdin = path == NULL || strcmp(path, "-") == 0;
    const char *name = is_stdin ? "the standard input" : path;
    int file = is_stdin ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    size_t room = limit;
    ssize_t got = 0;
    *len = 0;
    *at = NULL;
    if (file < 0) {
        return fail(failure, "file", "%s: %s", name, strerror(errno));
    }
    /* A chain may have 64 MiB, and hardly ever has. */
    if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && (uint64_t)status.st_size < limit) {
        room = (size_t)status.st_size;
    }
    *at = sodium_malloc(room + 1);
    while (*at != NULL && *len <= room && (got = read(file, *at + *len, room + 1 - *len)) != 0) {
        if (got < 0 && errno != EINTR) {
            break;
        }
        *len += got > 0 ? (size_t)got : 0;
    }
    if (!is_stdin) {
        close(file);
    }
    if (*at == NULL || got < 0 || *len > room) {
        fail(failure, "file", "%s: %s", name,
             *at == NULL   ? "no memory"
             : got < 0     ? strerror(errno)
             : room < limit ? "it grew while it was read"
                            : "it is too long");
        sodium_free(*at);
        *at = NULL;
        return false;
    }
    return true;
}

/* The part of TOML that `keyquorum init` writes: one `key = value` a line, values numbers or basic strings. Copies the
 * value of `key` with its zero; an absent key gives an empty text. Nothing is said of a value, since it may be a secret. */
static bool toml_value(const char *text, const char *key, char *to, size_t size, const char *path,
                       struct failure *failure) {
    size_t wanted = strlen(key), used = 0;
    to[0] = 0;
    for (const char *line = text; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        const char *at = line + strspn(line, " \t");
        if (strncmp(at, key, wanted) != 0 || (at[wanted] != ' ' && at[wanted] != '=')) {
            continue;
        }
        at += wanted + strspn(at + wanted, " \t");
        if (*at++ != '=') {
            continue;
        }
        at += strspn(at, " \t");
        bool quoted = *at == '"';
        if (quoted) {
            at++;
        }
        while (*at && *at != '\n' && *at != '\r' && (quoted ? *at != '"' : *at != ' ' && *at != '#') && used + 1 < size) {
            char byte = *at++;
            if (quoted && byte == '\\') {
                const char *escape = *at ? strchr("n\nt\tr\r\"\"\\\\", *at) : NULL;
                if (escape == NULL) {
                    return fail(failure, "config-error", "%s: '%s' has an escape that this client does not read", path,
                                key);
                }
                byte = escape[1];
                at++;
            }
            to[used++] = byte;
        }
        to[used] = 0;
        if (used + 1 >= size || (quoted && *at != '"')) {
            sodium_memzero(to, size);
            return fail(failure, "config-error", "%s: '%s' is too long, or has no end", path, key);
        }
        return true;
    }
    return true;
}

static bool read_toml(const char *path, char **text, struct failure *failure) {
    size_t len;
    char version[8];
    if (!read_file(path, TOML_MAX, (uint8_t **)text, &len, failure)) {
        return false;
    }
    (*text)[len] = 0; /* read_file() has left room */
    if (!toml_value(*text, "version", version, sizeof version, path, failure)) {
        return false;
    }
    return strcmp(version, "1") == 0 || fail(failure, "config-error", "%s: version is not 1", path);
}

/* --- identity ----------------------------------------------------------------------------------------------------- */

/* PKCS#8 of an Ed25519 key (RFC 8410) is these bytes and the seed. */
static const uint8_t PKCS8[] = {0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06,
                                0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20};

static bool read_signing_key(const char *pem, struct identity *identity) {
    static const char begin[] = "-----BEGIN PRIVATE KEY-----", end[] = "-----END PRIVATE KEY-----";
    uint8_t *der;
    size_t len = 0;
    const char *from = strstr(pem, begin), *to = strstr(pem, end);
    bool good = false;
    if (from == NULL || to == NULL || to < from || (der = sodium_malloc(128)) == NULL) {
        return false;
    }
    from += sizeof begin - 1;
    if (sodium_base642bin(der, 128, from, (size_t)(to - from), "\r\n ", &len, NULL, sodium_base64_VARIANT_ORIGINAL) == 0 &&
        len == sizeof PKCS8 + 32 && memcmp(der, PKCS8, sizeof PKCS8) == 0) {
        crypto_sign_seed_keypair(identity->sign_public, identity->sign_secret, der + sizeof PKCS8);
        good = true;
    }
    sodium_free(der);
    return good;
}

/* Which pair is used decides the cluster manifest: while our CURVE key changes, the one of before. */
static bool choose_curve(struct identity *identity, const char *secret, const char *retiring_secret,
                         const struct cluster *cluster) {
    const char *chosen[] = {retiring_secret, secret};
    for (size_t index = 0; index < 2; index++) {
        uint8_t raw[32];
        if (strlen(chosen[index]) != 40 || zmq_curve_public(identity->curve_public, chosen[index]) != 0 ||
            zmq_z85_decode(raw, identity->curve_public) == NULL) {
            continue;
        }
        strcpy(identity->curve_secret, chosen[index]);
        if (index == 0 && cluster->retiring_name[0] && memcmp(raw, cluster->retiring_key, 32) == 0) {
            return true;
        }
        for (size_t each = 0; each < cluster->member_count; each++) {
            const struct member *member = &cluster->members[each];
            if (strcmp(member->name, identity->name) == 0 && member->role == CLIENT &&
                memcmp(member->sign_public, identity->sign_public, 32) == 0 &&
                memcmp(member->curve_public, raw, 32) == 0) {
                return true;
            }
        }
    }
    return false;
}

/* What is parsed out of an identity file, in locked memory too. */
struct identity_texts {
    char role[16];
    char pem[1024];
    char secret[64];
    char retiring[64];
};

static bool parse_identity(const char *path, const char *text, struct identity_texts *texts, struct identity *identity,
                           struct failure *failure) {
    if (!(toml_value(text, "name", identity->name, sizeof identity->name, path, failure) &&
          toml_value(text, "role", texts->role, sizeof texts->role, path, failure) &&
          toml_value(text, "signing_key", texts->pem, sizeof texts->pem, path, failure) &&
          toml_value(text, "curve_secret", texts->secret, sizeof texts->secret, path, failure) &&
          toml_value(text, "curve_retiring", texts->retiring, sizeof texts->retiring, path, failure))) {
        return false;
    }
    if (strcmp(texts->role, "client") != 0) {
        return fail(failure, "config-error", "%s: not the identity of a client", path);
    }
    return read_signing_key(texts->pem, identity) ||
           fail(failure, "config-error", "%s: signing_key is no Ed25519 key in PKCS#8 without a passphrase", path);
}

static bool load_identity(const char *path, struct identity **identity, struct identity_texts *texts,
                          struct failure *failure) {
    struct stat status;
    char *text = NULL;
    bool good;
    if (stat(path, &status) != 0) {
        return fail(failure, "config-error", "%s: %s", path, strerror(errno));
    }
    if (status.st_mode & 077) {
        return fail(failure, "config-error", "%s: others may read or write it; its mode must be 0600", path);
    }
    *identity = sodium_malloc(sizeof **identity);
    if (*identity == NULL) {
        return fail(failure, "error", "no memory");
    }
    sodium_memzero(*identity, sizeof **identity);
    good = read_toml(path, &text, failure) && parse_identity(path, text, texts, *identity, failure);
    sodium_free(text);
    return good;
}

/* --- cluster manifests -------------------------------------------------------------------------------------------- */

static bool malformed(struct failure *failure) {
    return fail(failure, "protocol-error", "cluster manifest: malformed");
}

static bool contradicts(struct failure *failure, const char *what, const char *name) {
    return fail(failure, "manifest-error", "cluster manifest: %s ('%s')", what, name);
}

static bool has_empty_part(struct bytes location) {
    bool empty = true;
    for (size_t index = 0; index < location.len; index++) {
        if (location.at[index] == '/' && empty) {
            return true;
        }
        empty = location.at[index] == '/';
    }
    return empty;
}

static bool read_member(const msgpack_object *object, struct member *member, struct failure *failure) {
    static const struct {
        const char *name;
        enum role role;
    } roles[] = {{"balancer", BALANCER}, {"client", CLIENT}, {"node", NODE}, {"operator", OPERATOR}};
    const msgpack_object *items;
    size_t count;
    struct bytes role, sign, curve, endpoint, publish, location;
    if (!(get_array(object, 7, 7, &items, &count) && get_name(&items[0], member->name) && get_text(&items[1], 16, &role) &&
          get_bytes(&items[2], 32, 32, &sign) && get_bytes(&items[3], 32, 32, &curve) &&
          get_text(&items[4], 256, &endpoint) && get_text(&items[5], 256, &publish) &&
          get_text(&items[6], 256, &location) && copy_text(endpoint, member->endpoint, sizeof member->endpoint))) {
        return malformed(failure);
    }
    member->role = 0;
    for (size_t index = 0; index < sizeof roles / sizeof roles[0]; index++) {
        if (same_text(role, roles[index].name)) {
            member->role = roles[index].role;
        }
    }
    memcpy(member->sign_public, sign.at, 32);
    memcpy(member->curve_public, curve.at, 32);
    if (member->role == 0) {
        return malformed(failure);
    }
    if ((member->role & (NODE | BALANCER)) && strncmp(member->endpoint, "tcp://", 6) != 0) {
        return contradicts(failure, "no endpoint tcp://host:port", member->name);
    }
    if (member->role == NODE && has_empty_part(location)) {
        return contradicts(failure, "no location, or an empty part in it", member->name);
    }
    return true;
}

static bool shares_a_key(const struct member *one, const struct member *other) {
    bool curves = one->role != OPERATOR && other->role != OPERATOR;
    return memcmp(one->sign_public, other->sign_public, 32) == 0 ||
           (curves && memcmp(one->curve_public, other->curve_public, 32) == 0) ||
           (other->role != OPERATOR && memcmp(one->sign_public, other->curve_public, 32) == 0) ||
           (one->role != OPERATOR && memcmp(one->curve_public, other->sign_public, 32) == 0);
}

static bool read_members(const msgpack_object *items, size_t count, struct member *members, uint64_t quorum,
                         struct failure *failure) {
    uint64_t operators = 0;
    for (size_t index = 0; index < count; index++) {
        if (!read_member(&items[index], &members[index], failure)) {
            return false;
        }
        operators += members[index].role == OPERATOR;
        for (size_t before = 0; before < index; before++) {
            if (strcmp(members[before].name, members[index].name) == 0 ||
                shares_a_key(&members[before], &members[index])) {
                return contradicts(failure, "a name or a key stands there twice", members[index].name);
            }
        }
    }
    return quorum <= operators || contradicts(failure, "fewer operators than its quorum", "");
}

static bool is_operation(struct bytes text) {
    static const char *const known[] = {"*",       "encrypt", "decrypt", "sign",     "verify", "mac",     "verify-mac", "generate",
                                        "import",  "rotate", "destroy", "refresh", "reshare",  "describe", "list", "prewarm",    "flush",    "status",
                                        "grow"};
    for (size_t index = 0; index < sizeof known / sizeof known[0]; index++) {
        if (same_text(text, known[index])) {
            return true;
        }
    }
    return false;
}

/* Of the policy a client needs only who may refresh, reshare or grow: the nodes decide on all else. */
static bool read_rules(const msgpack_object *items, size_t count, struct cluster *cluster, struct failure *failure) {
    void *grown = realloc(cluster->refresh_rules, (cluster->refresh_rule_count + count + 1) * sizeof(struct refresh_rule));
    if (grown == NULL) {
        return fail(failure, "error", "no memory");
    }
    cluster->refresh_rules = grown;
    for (size_t index = 0; index < count; index++) {
        struct refresh_rule *rule = &cluster->refresh_rules[cluster->refresh_rule_count];
        const msgpack_object *parts, *operations;
        struct bytes identity, keys, operation;
        size_t size, found;
        bool any = false;
        rule->refresh = rule->reshare = rule->grow = false;
        if (!(get_array(&items[index], 3, 3, &parts, &size) && get_text(&parts[0], 128, &identity) && identity.len > 0 &&
              get_text(&parts[1], 128, &keys) && keys.len > 0 && get_array(&parts[2], 1, 32, &operations, &found) &&
              copy_text(identity, rule->identity, sizeof rule->identity) && copy_text(keys, rule->keys, sizeof rule->keys))) {
            return malformed(failure);
        }
        for (size_t each = 0; each < found; each++) {
            if (!get_text(&operations[each], 32, &operation) || !is_operation(operation)) {
                return contradicts(failure, "unknown operation in a rule", rule->identity);
            }
            any = any || same_text(operation, "*");
            rule->refresh = any || rule->refresh || same_text(operation, "refresh");
            rule->reshare = any || rule->reshare || same_text(operation, "reshare");
            rule->grow = rule->grow || same_text(operation, "grow"); /* "*" does not include it */
        }
        cluster->refresh_rule_count += rule->refresh || rule->reshare || rule->grow;
    }
    return true;
}

static bool read_retiring(const msgpack_object *items, size_t count, const char *own_name, struct cluster *cluster,
                          struct failure *failure) {
    cluster->retiring_name[0] = 0;
    for (size_t index = 0; index < count; index++) {
        const msgpack_object *parts;
        size_t size;
        char name[NAME_SIZE], before[NAME_SIZE];
        struct bytes curve, other, endpoint, publish;
        const struct member *member = NULL;
        if (!(get_array(&items[index], 4, 4, &parts, &size) && get_name(&parts[0], name) &&
              get_bytes(&parts[1], 32, 32, &curve) && get_text(&parts[2], 256, &endpoint) &&
              get_text(&parts[3], 256, &publish))) {
            return malformed(failure);
        }
        for (size_t each = 0; each < cluster->member_count; each++) {
            const struct member *candidate = &cluster->members[each];
            if (strcmp(candidate->name, name) == 0 && candidate->role != OPERATOR) {
                member = candidate;
            }
            if (memcmp(candidate->sign_public, curve.at, 32) == 0 || memcmp(candidate->curve_public, curve.at, 32) == 0) {
                return contradicts(failure, "a retiring key is in use", name);
            }
        }
        for (size_t each = 0; each < index; each++) { /* these were well-formed */
            const msgpack_object *earlier = items[each].via.array.ptr;
            if (!get_name(&earlier[0], before) || !get_bytes(&earlier[1], 32, 32, &other) || strcmp(before, name) == 0 ||
                same(curve, other)) {
                return contradicts(failure, "two retiring keys of one member, or one of two", name);
            }
        }
        if (member == NULL) {
            return contradicts(failure, "a retiring key of no member", name);
        }
        if (member->role != CLIENT && (endpoint.len < 6 || memcmp(endpoint.at, "tcp://", 6) != 0)) {
            return contradicts(failure, "a retiring key without an endpoint", name);
        }
        if (strcmp(name, own_name) == 0) {
            strcpy(cluster->retiring_name, name);
            memcpy(cluster->retiring_key, curve.at, 32);
        }
    }
    return true;
}

/* Nodes that are being emptied serve what they hold as any other, so a client has no more to do than to check the list. */
static bool check_draining(const msgpack_object *items, size_t count, const struct cluster *cluster,
                           struct failure *failure) {
    for (size_t index = 0; index < count; index++) {
        char name[NAME_SIZE], before[NAME_SIZE];
        size_t at = 0;
        if (!get_name(&items[index], name)) {
            return malformed(failure);
        }
        while (at < cluster->member_count &&
               (cluster->members[at].role != NODE || strcmp(cluster->members[at].name, name) != 0)) {
            at++;
        }
        if (at == cluster->member_count) {
            return contradicts(failure, "what is no node is draining", name);
        }
        for (size_t each = 0; each < index; each++) {
            if (!get_name(&items[each], before) || strcmp(before, name) == 0) {
                return contradicts(failure, "a node is draining twice", name);
            }
        }
    }
    return true;
}

static bool remember_signers(struct cluster *cluster, struct failure *failure) {
    void *grown = realloc(cluster->signers, (cluster->signer_count + cluster->member_count) * sizeof(struct signer));
    if (grown == NULL) {
        return fail(failure, "error", "no memory");
    }
    cluster->signers = grown;
    for (size_t index = 0; index < cluster->member_count; index++) {
        const struct member *member = &cluster->members[index];
        size_t known = 0;
        while (known < cluster->signer_count &&
               (cluster->signers[known].role != member->role || strcmp(cluster->signers[known].name, member->name) != 0 ||
                memcmp(cluster->signers[known].key, member->sign_public, 32) != 0)) {
            known++;
        }
        if (known == cluster->signer_count) {
            struct signer *signer = &cluster->signers[cluster->signer_count++];
            strcpy(signer->name, member->name);
            signer->role = member->role;
            memcpy(signer->key, member->sign_public, 32);
        }
    }
    return true;
}

/* The payload of a manifest into the cluster, whose members are replaced. */
static bool read_manifest(struct bytes payload, const char *own_name, struct cluster *cluster, struct bytes *previous,
                          struct failure *failure) {
    struct reader reader;
    const msgpack_object *members, *rules, *retiring, *draining = NULL;
    size_t member_count, rule_count, retiring_count, draining_count = 0, fields = 0;
    uint64_t domain_level;
    bool good = reader_open_some(&reader, payload, MANIFEST_MAX, 8, 9, &fields, "cluster manifest", failure);
    if (good && !(get_name(&reader.fields[0], cluster->name) && get_bytes(&reader.fields[1], 0, 32, previous) &&
                  get_uint(&reader.fields[2], 1, 64, &cluster->quorum) &&
                  get_array(&reader.fields[3], 1, 4096, &members, &member_count) &&
                  get_array(&reader.fields[4], 0, 4096, &rules, &rule_count) &&
                  get_uint(&reader.fields[5], 1, 65536, &cluster->groups) &&
                  get_uint(&reader.fields[6], 1, 8, &domain_level) &&
                  get_array(&reader.fields[7], 0, 4096, &retiring, &retiring_count) &&
                  (fields < 9 || get_array(&reader.fields[8], 0, 4096, &draining, &draining_count)))) {
        good = malformed(failure);
    }
    if (good) {
        free(cluster->members);
        cluster->members = calloc(member_count, sizeof *cluster->members);
        cluster->member_count = cluster->members == NULL ? 0 : member_count;
        good = cluster->members != NULL ? read_members(members, member_count, cluster->members, cluster->quorum, failure)
                                        : fail(failure, "error", "no memory");
    }
    good = good && read_rules(rules, rule_count, cluster, failure) &&
           read_retiring(retiring, retiring_count, own_name, cluster, failure) &&
           check_draining(draining, draining_count, cluster, failure) && remember_signers(cluster, failure);
    reader_close(&reader);
    return good;
}

/* Who may sign the next manifest (the first one: itself): the operators of the one in force. */
static bool operators_of(const struct cluster *cluster, struct signer **operators, size_t *count,
                         struct failure *failure) {
    *count = 0;
    *operators = calloc(cluster->member_count + 1, sizeof **operators);
    if (*operators == NULL) {
        return fail(failure, "error", "no memory");
    }
    for (size_t index = 0; index < cluster->member_count; index++) {
        const struct member *member = &cluster->members[index];
        if (member->role == OPERATOR) {
            struct signer *signer = &(*operators)[(*count)++];
            strcpy(signer->name, member->name);
            signer->role = OPERATOR;
            memcpy(signer->key, member->sign_public, 32);
        }
    }
    return true;
}

/* The payload of an envelope that nobody has verified yet: the first manifest names its own operators. */
static bool peek(struct bytes raw, struct bytes *payload, struct failure *failure) {
    struct reader envelope, inner;
    struct bytes body;
    bool good = reader_open(&envelope, raw, MANIFEST_MAX, 2, "cluster manifest", failure);
    if (good && !get_bytes(&envelope.fields[0], 0, MANIFEST_MAX, &body)) {
        good = malformed(failure);
    }
    if (good) {
        good = reader_open(&inner, body, MANIFEST_MAX, 5, "cluster manifest", failure);
        if (good && !get_bytes(&inner.fields[4], 0, MANIFEST_MAX, payload)) {
            good = malformed(failure);
        }
        reader_close(&inner);
    }
    reader_close(&envelope);
    return good;
}

static bool first_manifest(struct bytes raw, const uint8_t pin[32], const char *own_name, struct cluster *cluster,
                           struct failure *failure) {
    struct bytes payload, previous;
    struct document document;
    struct signer *operators = NULL;
    size_t count;
    bool good = peek(raw, &payload, failure) && read_manifest(payload, own_name, cluster, &previous, failure) &&
                operators_of(cluster, &operators, &count, failure) &&
                open_envelope(raw, "cluster", operators, count, OPERATOR, cluster->quorum, &document, failure);
    free(operators);
    if (good && (sodium_memcmp(document.hash, pin, 32) != 0 || document.serial != 1 || previous.len != 0)) {
        return fail(failure, "manifest-error", "cluster manifest: the first one is not the pinned one");
    }
    if (good) {
        cluster->serial = 1;
        memcpy(cluster->hash, document.hash, 32);
    }
    return good;
}

static bool next_manifest(struct bytes raw, const char *own_name, struct cluster *cluster, struct failure *failure) {
    char name[NAME_SIZE];
    uint64_t groups = cluster->groups;
    struct bytes previous;
    struct document document;
    struct signer *operators = NULL;
    size_t count;
    bool good = operators_of(cluster, &operators, &count, failure) &&
                open_envelope(raw, "cluster", operators, count, OPERATOR, cluster->quorum, &document, failure);
    free(operators);
    strcpy(name, cluster->name);
    if (!good || !read_manifest(document.payload, own_name, cluster, &previous, failure)) {
        return false;
    }
    if (document.serial != cluster->serial + 1 || !same(previous, bytes_of(cluster->hash, 32)) ||
        strcmp(name, cluster->name) != 0 || groups != cluster->groups) {
        return fail(failure, "manifest-error", "cluster manifest: number %llu does not follow number %llu",
                    (unsigned long long)document.serial, (unsigned long long)cluster->serial);
    }
    cluster->serial = document.serial;
    memcpy(cluster->hash, document.hash, 32);
    return true;
}

static bool open_chain(struct bytes chain, const uint8_t pin[32], const char *own_name, struct cluster *cluster,
                       struct failure *failure) {
    struct reader reader;
    const msgpack_object *items = NULL;
    size_t count = 0;
    struct bytes raw;
    bool good = reader_open(&reader, chain, CHAIN_MAX, 1, "chain of cluster manifests", failure) &&
                (get_array(&reader.fields[0], 1, 10000, &items, &count) || malformed(failure));
    for (size_t index = 0; good && index < count; index++) {
        good = get_bytes(&items[index], 0, MANIFEST_MAX, &raw) ? index == 0 ? first_manifest(raw, pin, own_name, cluster, failure)
                                                                            : next_manifest(raw, own_name, cluster, failure)
                                                               : malformed(failure);
    }
    reader_close(&reader);
    return good;
}

/* --- client.toml -------------------------------------------------------------------------------------------------- */

/* A path in the file is relative to the file's folder. */
static bool beside(const char *config, const char *value, char path[PATH_SIZE], struct failure *failure) {
    const char *slash = strrchr(config, '/');
    int folder = value[0] == '/' || slash == NULL ? 0 : (int)(slash - config + 1);
    int len = snprintf(path, PATH_SIZE, "%.*s%s", folder, config, value);
    return (len > 0 && len < PATH_SIZE && value[0]) || fail(failure, "config-error", "%s: a path in it is none", config);
}

static bool read_timeout(const char *text, double *timeout_s) {
    char *end = NULL;
    *timeout_s = text[0] ? strtod(text, &end) : 5.0;
    return text[0] == 0 || (*end == 0 && *timeout_s > 0 && *timeout_s <= 600);
}

static bool load_parts(const char *path, const char *text, struct config *config, struct identity_texts *texts,
                       struct failure *failure) {
    char value[PATH_SIZE], place[PATH_SIZE], pin_text[128], timeout[32];
    uint8_t pin[32], *chain = NULL;
    size_t len = 0;
    bool good;
    if (!(toml_value(text, "identity", value, sizeof value, path, failure) && beside(path, value, place, failure) &&
          load_identity(place, &config->identity, texts, failure) &&
          toml_value(text, "manifest_pin", pin_text, sizeof pin_text, path, failure) &&
          toml_value(text, "timeout_s", timeout, sizeof timeout, path, failure) &&
          toml_value(text, "manifest", value, sizeof value, path, failure) && beside(path, value, place, failure))) {
        return false;
    }
    if (strlen(pin_text) != 64 || sodium_hex2bin(pin, sizeof pin, pin_text, 64, NULL, &len, NULL) != 0 || len != 32) {
        return fail(failure, "config-error", "%s: manifest_pin must be 64 hex digits", path);
    }
    if (!read_timeout(timeout, &config->timeout_s)) {
        return fail(failure, "config-error", "%s: timeout_s must be above 0 and at most 600", path);
    }
    good = read_file(place, CHAIN_MAX, &chain, &len, failure) &&
           open_chain(bytes_of(chain, len), pin, config->identity->name, &config->cluster, failure);
    sodium_free(chain);
    return good && (choose_curve(config->identity, texts->secret, texts->retiring, &config->cluster) ||
                    fail(failure, "config-error", "%s: the cluster manifest has no client '%s' with this identity's keys",
                         path, config->identity->name));
}

bool config_load(const char *path, struct config *config, struct failure *failure) {
    char *text = NULL;
    struct identity_texts *texts = sodium_malloc(sizeof *texts);
    bool good;
    memset(config, 0, sizeof *config);
    good = texts != NULL ? read_toml(path, &text, failure) && load_parts(path, text, config, texts, failure)
                         : fail(failure, "error", "no memory");
    sodium_free(text);
    sodium_free(texts);
    if (!good) {
        config_close(config);
    }
    return good;
}

void config_close(struct config *config) {
    sodium_free(config->identity);
    free(config->cluster.members);
    free(config->cluster.signers);
    free(config->cluster.refresh_rules);
    memset(config, 0, sizeof *config);
}

const struct member *find_node(const struct cluster *cluster, const char *name) {
    for (size_t index = 0; index < cluster->member_count; index++) {
        if (cluster->members[index].role == NODE && strcmp(cluster->members[index].name, name) == 0) {
            return &cluster->members[index];
        }
    }
    return NULL;
}

/* --- what a key is ------------------------------------------------------------------------------------------------ */

struct holder {
    char node[NAME_SIZE];
    uint64_t x;
};

/* A key manifest as it was read, with what its checks need. */
struct manifest {
    struct key *key;
    uint8_t hash[32];
    uint64_t threshold;
    struct holder holders[HOLDERS_MAX];
    size_t holder_count;
    struct bytes order;
    struct bytes change;
    struct bytes sharing;
    struct bytes placing;
    bool reshared;            /* so that threshold and the number of holders are a later order's */
    uint64_t ordered, since;  /* n of that order, and the epoch that it replaces */
    bool may_grow;            /* by a balancer that may give the key more */
    char trial[NAME_SIZE];    /* who must have combined this epoch before it was valid; empty if nobody */
};

static bool not_good(struct failure *failure, const char *name, const char *what) {
    return fail(failure, "manifest-error", "what a node says of the key '%s' does not verify: %s", name, what);
}

static bool read_holders(const msgpack_object *items, size_t count, const struct cluster *cluster,
                         struct manifest *manifest, struct failure *failure) {
    struct key *key = manifest->key;
    key->holder_count = 0;
    for (size_t index = 0; index < count; index++) {
        struct holder *holder = &manifest->holders[index];
        const msgpack_object *parts;
        size_t size;
        struct bytes commitment;
        const struct member *node;
        if (!(get_array(&items[index], 3, 3, &parts, &size) && get_name(&parts[0], holder->node) &&
              get_uint(&parts[1], 1, 255, &holder->x) && get_bytes(&parts[2], 32, 32, &commitment))) {
            return not_good(failure, key->name, "a holder is malformed");
        }
        for (size_t before = 0; before < index; before++) {
            if (strcmp(manifest->holders[before].node, holder->node) == 0 || manifest->holders[before].x == holder->x) {
                return not_good(failure, key->name, "a node or an index stands there twice");
            }
        }
        /* A holder that has left the cluster can't be asked, and does no harm. */
        node = find_node(cluster, holder->node);
        if (node != NULL) {
            key->holders[key->holder_count++] = node;
        }
    }
    manifest->holder_count = count;
    return true;
}

static bool read_key_manifest(struct bytes payload, const struct cluster *cluster, struct manifest *manifest,
                              const char *name, struct failure *failure) {
    struct reader reader;
    struct bytes id, algorithm, public_key, check_value, previous;
    const msgpack_object *holders;
    size_t count;
    uint64_t attempt;
    struct key *key = manifest->key;
    size_t fields = 0;
    bool good = reader_open_some(&reader, payload, MESSAGE_MAX, 13, 15, &fields, "key manifest", failure);
    manifest->sharing = manifest->placing = bytes_of(NULL, 0);
    if (good && !(get_bytes(&reader.fields[0], 16, 16, &id) && get_name(&reader.fields[1], key->name) &&
                  get_uint(&reader.fields[2], 1, UINT32_MAX, &key->version) && get_uint(&reader.fields[3], 1, UINT32_MAX, &key->epoch) &&
                  get_uint(&reader.fields[4], 1, 2147483648U, &attempt) && get_text(&reader.fields[5], 64, &algorithm) &&
                  get_uint(&reader.fields[6], 1, 64, &manifest->threshold) &&
                  get_array(&reader.fields[7], 1, HOLDERS_MAX, &holders, &count) &&
                  get_bytes(&reader.fields[8], 0, 1024, &public_key) && get_bytes(&reader.fields[9], 32, 32, &check_value) &&
                  get_bytes(&reader.fields[10], 0, 2048, &manifest->order) &&
                  get_bytes(&reader.fields[11], 0, 32, &previous) &&
                  get_bytes(&reader.fields[12], 0, 2048, &manifest->change) &&
                  (fields < 14 || get_bytes(&reader.fields[13], 0, 2048, &manifest->sharing)) &&
                  (fields < 15 || get_bytes(&reader.fields[14], 0, 2048, &manifest->placing)) &&
                  copy_text(algorithm, key->algorithm, sizeof key->algorithm))) {
        good = not_good(failure, name, "the manifest is malformed");
    }
    if (good && strcmp(key->name, name) != 0) {
        good = not_good(failure, name, "it is of another key");
    }
    if (good && (key->epoch == 1 ? previous.len != 0 || manifest->change.len != 0 || manifest->sharing.len != 0 ||
                                       manifest->placing.len != 0
                                 : previous.len != 32)) {
        good = not_good(failure, name, "its epoch does not fit its predecessor");
    }
    if (good && (strncmp(key->algorithm, "aes-", 4) == 0 || strncmp(key->algorithm, "hmac-", 5) == 0) !=
                    (public_key.len == 0)) {
        good = not_good(failure, name, "a public key is missing or out of place");
    }
    if (good) {
        memcpy(key->id, id.at, 16);
        good = read_holders(holders, count, cluster, manifest, failure);
    }
    reader_close(&reader);
    return good;
}

/* The client's order is what binds the name to the id: a dealer alone could not pass one key off as another. */
static bool check_order(struct manifest *manifest, const struct cluster *cluster, struct failure *failure) {
    struct document document;
    struct reader reader;
    struct bytes id, algorithm, operation;
    char name[NAME_SIZE];
    uint64_t threshold, shares, expires;
    const struct key *key = manifest->key;
    if (!open_envelope(manifest->order, "order.create", cluster->signers, cluster->signer_count, CLIENT, 1, &document,
                       failure)) {
        return false;
    }
    uint64_t version = 1;
    size_t fields = 0;
    struct bytes lineage = bytes_of(NULL, 0);
    uint64_t uses_max = 0;
    bool good = reader_open_some(&reader, document.payload, 2048, 7, 10, &fields, "create order", failure);
    if (good && !(get_bytes(&reader.fields[0], 16, 16, &id) && get_name(&reader.fields[1], name) &&
                  get_text(&reader.fields[2], 64, &algorithm) && get_uint(&reader.fields[3], 1, 64, &threshold) &&
                  get_uint(&reader.fields[4], 1, 64, &shares) && get_text(&reader.fields[5], 16, &operation) &&
                  (fields < 8 || get_uint(&reader.fields[7], 1, UINT32_MAX, &version)) &&
                  (fields < 9 || get_bytes(&reader.fields[8], 0, 16, &lineage)) &&
                  (fields < 10 || get_uint(&reader.fields[9], 0, INT64_MAX, &uses_max)) && version == key->version &&
                  lineage.len == (version > 1 ? 16 : 0) &&
                  (version > 1 ? same_text(operation, "rotate")
                               : same_text(operation, "generate") || same_text(operation, "import")) &&
                  get_uint(&reader.fields[6], 0, INT64_MAX, &expires) && same(id, bytes_of(key->id, 16)) &&
                  strcmp(name, key->name) == 0 && same_text(algorithm, key->algorithm) &&
                  threshold <= shares && manifest->threshold <= manifest->holder_count &&
                  (manifest->reshared || threshold == manifest->threshold))) {
        good = not_good(failure, key->name, "it differs from the client's order");
    }
    if (good && !manifest->reshared) {
        manifest->ordered = shares;
    }
    if (good && (manifest->may_grow ? manifest->holder_count < manifest->ordered
                                    : manifest->holder_count != manifest->ordered)) {
        good = not_good(failure, key->name, "it has another number of holders than its client ordered");
    }
    reader_close(&reader);
    return good;
}

enum right { REFRESH, RESHARE, GROW };

/* The rules of the policy are shell globs, which fnmatch() reads as the page says (with the names that there are). */
static bool may(const struct cluster *cluster, const char *member, const char *key, enum right right) {
    for (size_t index = 0; index < cluster->refresh_rule_count; index++) {
        const struct refresh_rule *rule = &cluster->refresh_rules[index];
        bool given = right == REFRESH ? rule->refresh : right == RESHARE ? rule->reshare : rule->grow;
        if (given && fnmatch(rule->identity, member, FNM_NOESCAPE) == 0 && fnmatch(rule->keys, key, FNM_NOESCAPE) == 0) {
            return true;
        }
    }
    return false;
}

/* The last field of an order to change a key: none or 0 in a client's, a fencing epoch in a balancer's. */
static bool good_fencing(const struct reader *reader, bool there, size_t field, enum role role) {
    uint64_t fencing = 0;
    return (!there || get_uint(&reader->fields[field], 0, INT64_MAX, &fencing)) && (role == BALANCER) == (fencing > 0);
}

static bool is_signed(struct bytes raw, const char *kind, const struct cluster *cluster, enum role role) {
    struct document document;
    struct failure other;
    return open_envelope(raw, kind, cluster->signers, cluster->signer_count, role, 1, &document, &other);
}

/* An order that threshold and number of holders rest on (a client's) or who they are (a balancer's after it). */
static bool check_sharing(struct bytes raw, enum role role, bool places, struct manifest *manifest,
                          const struct cluster *cluster, struct failure *failure) {
    struct document document;
    struct reader reader;
    struct bytes id, nonce;
    char name[NAME_SIZE];
    uint64_t from_epoch, threshold, expires;
    const msgpack_object *holders, *without;
    size_t count, gone, fields = 0;
    const struct key *key = manifest->key;
    bool earlier = raw.at != manifest->change.at, moves = role == BALANCER;
    if (!open_envelope(raw, moves ? "order.move" : "order.reshare", cluster->signers, cluster->signer_count, role, 1,
                       &document, failure)) {
        return false;
    }
    struct bytes trial = bytes_of(NULL, 0);
    bool good = reader_open_some(&reader, document.payload, 2048, 8, 10, &fields, "reshare order", failure);
    if (good && !(get_bytes(&reader.fields[0], 16, 16, &id) && get_name(&reader.fields[1], name) &&
                  get_uint(&reader.fields[2], 1, UINT32_MAX - 1, &from_epoch) &&
                  get_uint(&reader.fields[3], 1, 64, &threshold) &&
                  get_array(&reader.fields[4], 1, HOLDERS_MAX, &holders, &count) &&
                  get_array(&reader.fields[5], 0, HOLDERS_MAX, &without, &gone) &&
                  get_bytes(&reader.fields[6], 16, 16, &nonce) && get_uint(&reader.fields[7], 0, INT64_MAX, &expires) &&
                  good_fencing(&reader, fields > 8, 8, role) &&
                  (fields < 10 || get_text(&reader.fields[9], 128, &trial)) && (!moves || trial.len == 0) &&
                  same(id, bytes_of(key->id, 16)) && strcmp(name, key->name) == 0 && from_epoch > manifest->since &&
                  (earlier ? from_epoch + 1 < key->epoch : from_epoch + 1 == key->epoch) &&
                  threshold == manifest->threshold && (!places || count == manifest->holder_count))) {
        good = not_good(failure, key->name, "it differs from its reshare order");
    }
    for (size_t index = 0; good && places && index < count; index++) {
        if (!get_name(&holders[index], name) || strcmp(name, manifest->holders[index].node) != 0 ||
            manifest->holders[index].x != index + 1) {
            good = not_good(failure, key->name, "its holders are not those of its reshare order");
        }
    }
    if (good && !earlier && !copy_text(trial, manifest->trial, sizeof manifest->trial)) {
        good = not_good(failure, key->name, "the name of who tries it is malformed");
    }
    if (good && !moves && !may(cluster, document.issuer, key->name, RESHARE)) {
        good = not_good(failure, key->name, "its client was never allowed to reshare it");
    }
    if (good && moves) {
        manifest->may_grow = may(cluster, document.issuer, key->name, GROW);
    } else if (good) {
        manifest->reshared = true;
        manifest->ordered = count;
        manifest->since = from_epoch;
    }
    reader_close(&reader);
    return good;
}

static bool check_refresh(enum role role, const struct manifest *manifest, const struct cluster *cluster,
                          struct failure *failure) {
    struct document document;
    struct reader reader;
    struct bytes id, nonce;
    char name[NAME_SIZE];
    uint64_t from_epoch, expires;
    size_t fields = 0;
    const struct key *key = manifest->key;
    if (!open_envelope(manifest->change, role == BALANCER ? "order.renew" : "order.refresh", cluster->signers,
                       cluster->signer_count, role, 1, &document, failure)) {
        return false;
    }
    bool good = reader_open_some(&reader, document.payload, 2048, 5, 6, &fields, "refresh order", failure);
    if (good && !(get_bytes(&reader.fields[0], 16, 16, &id) && get_name(&reader.fields[1], name) &&
                  get_uint(&reader.fields[2], 1, UINT32_MAX - 1, &from_epoch) && get_bytes(&reader.fields[3], 16, 16, &nonce) &&
                  get_uint(&reader.fields[4], 0, INT64_MAX, &expires) && good_fencing(&reader, fields > 5, 5, role) &&
                  same(id, bytes_of(key->id, 16)) && strcmp(name, key->name) == 0 && from_epoch + 1 == key->epoch)) {
        good = not_good(failure, key->name, "it differs from its refresh order");
    }
    if (good && role == CLIENT && !may(cluster, document.issuer, key->name, REFRESH)) {
        good = not_good(failure, key->name, "its client was never allowed to refresh it");
    }
    reader_close(&reader);
    return good;
}

static bool check_change(struct manifest *manifest, const struct cluster *cluster, struct failure *failure) {
    struct bytes reshare = manifest->sharing, move = manifest->placing;
    const struct key *key = manifest->key;
    bool reshares = false, moves = false;
    manifest->reshared = manifest->may_grow = false;
    manifest->ordered = manifest->since = 0;
    if (key->epoch == 1) {
        return true;
    }
    if (is_signed(manifest->change, "order.reshare", cluster, CLIENT)) {
        reshares = true;
        reshare = manifest->change;
    } else if (is_signed(manifest->change, "order.move", cluster, BALANCER)) {
        moves = true;
        move = manifest->change;
    }
    if ((reshares && manifest->sharing.len != 0) || ((reshares || moves) && manifest->placing.len != 0)) {
        return not_good(failure, key->name, "it has two reshare orders");
    }
    if (reshare.len != 0 && !check_sharing(reshare, CLIENT, move.len == 0, manifest, cluster, failure)) {
        return false;
    }
    if (move.len != 0 && !check_sharing(move, BALANCER, true, manifest, cluster, failure)) {
        return false;
    }
    return reshares || moves ||
           check_refresh(is_signed(manifest->change, "order.renew", cluster, BALANCER) ? BALANCER : CLIENT, manifest, cluster,
                         failure);
}

static bool check_receipt(struct bytes raw, const struct manifest *manifest, const struct cluster *cluster,
                          bool stored[HOLDERS_MAX], struct failure *failure) {
    struct document document;
    struct reader reader;
    struct bytes id, hash;
    uint64_t x;
    size_t fields = 0;
    bool tried = false;
    if (!open_envelope(raw, "receipt", cluster->signers, cluster->signer_count, NODE, 1, &document, failure)) {
        return false;
    }
    bool good = reader_open_some(&reader, document.payload, 1024, 3, 4, &fields, "receipt", failure);
    if (good) {
        size_t at = 0;
        while (at < manifest->holder_count && strcmp(manifest->holders[at].node, document.issuer) != 0) {
            at++;
        }
        good = (at < manifest->holder_count && get_bytes(&reader.fields[0], 16, 16, &id) &&
                get_bytes(&reader.fields[1], 32, 32, &hash) && get_uint(&reader.fields[2], 1, 255, &x) &&
                same(id, bytes_of(manifest->key->id, 16)) && same(hash, bytes_of(manifest->hash, 32)) &&
                x == manifest->holders[at].x && (fields < 4 || get_bool(&reader.fields[3], &tried))) ||
               not_good(failure, manifest->key->name, "a receipt is not for this manifest");
        good = good && (tried || strcmp(manifest->trial, document.issuer) != 0 ||
                        not_good(failure, manifest->key->name, "it was not tried before it was valid"));
        stored[at < HOLDERS_MAX ? at : 0] |= good;
    }
    reader_close(&reader);
    return good;
}

static bool check_certificate(struct bytes raw, const struct manifest *manifest, const struct cluster *cluster,
                              struct failure *failure) {
    struct document document;
    struct reader reader;
    struct bytes id, hash, receipt;
    const msgpack_object *receipts = NULL;
    size_t count = 0, found = 0, needed = manifest->holder_count;
    bool stored[HOLDERS_MAX] = {false};
    if (!open_envelope(raw, "certificate", cluster->signers, cluster->signer_count, BALANCER, 1, &document, failure)) {
        return false;
    }
    bool good = reader_open(&reader, document.payload, MESSAGE_MAX, 3, "commit certificate", failure);
    if (good && !(get_bytes(&reader.fields[0], 16, 16, &id) && get_bytes(&reader.fields[1], 32, 32, &hash) &&
                  get_array(&reader.fields[2], 1, HOLDERS_MAX, &receipts, &count) &&
                  same(id, bytes_of(manifest->key->id, 16)) && same(hash, bytes_of(manifest->hash, 32)))) {
        good = not_good(failure, manifest->key->name, "the certificate is not for this manifest");
    }
    for (size_t index = 0; good && index < count; index++) {
        good = (get_bytes(&receipts[index], 0, 1024, &receipt) || not_good(failure, manifest->key->name, "malformed")) &&
               check_receipt(receipt, manifest, cluster, stored, failure);
    }
    for (size_t index = 0; index < manifest->holder_count; index++) {
        found += stored[index];
    }
    if (manifest->key->epoch == 1 && manifest->threshold + 1 < needed) {
        needed = (size_t)manifest->threshold + 1;
    }
    if (good && found < needed) {
        good = not_good(failure, manifest->key->name, "too few receipts");
    }
    reader_close(&reader);
    return good;
}

bool open_description(struct bytes body, const char *name, const struct cluster *cluster, struct key *key,
                      struct failure *failure) {
    struct reader reader;
    struct document document;
    struct manifest manifest = {.key = key};
    struct bytes raw, certificate, settings;
    const msgpack_object *warnings;
    size_t count;
    bool good = reader_open(&reader, body, MESSAGE_MAX, 4, "description of a key", failure);
    if (good && !(get_bytes(&reader.fields[0], 0, DATA_MAX, &raw) && get_bytes(&reader.fields[1], 0, DATA_MAX, &certificate) &&
                  get_array(&reader.fields[2], 0, 16, &warnings, &count) && get_bytes(&reader.fields[3], 0, 2048, &settings))) {
        good = not_good(failure, name, "malformed");
    }
    good = good && open_envelope(raw, "key", cluster->signers, cluster->signer_count, NODE, 1, &document, failure);
    if (good) {
        memcpy(manifest.hash, document.hash, 32);
        good = read_key_manifest(document.payload, cluster, &manifest, name, failure) &&
               check_change(&manifest, cluster, failure) && check_order(&manifest, cluster, failure) &&
               check_certificate(certificate, &manifest, cluster, failure);
    }
    reader_close(&reader);
    return good;
}
