/* Connections and calls: who is asked, with which grant, and until when. docs/protocol.md: "Transport", "Requests and
 * replies", "Using a key", "Grant". */
#include "kq.h"

#include <errno.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <zmq.h>

enum {
    VERSION = 1,
    FRAME_MAX = MESSAGE_MAX + 64, /* ZMQ_MAXMSGSIZE counts what CURVE adds too */
    HANDSHAKE_MS = 2000,
    CONNECT_MS = 1000,  /* at most, where another node could be asked */
    PATIENCE_MS = 250,  /* at least, likewise: a key may have to be gathered */
    SLICE_MS = 50,      /* how often a wait looks whether the connection still stands */
    QUEUE_MAX = 1000,
    PENDING_MS = 50,    /* between two questions whether a key was made */
    GRANT_LIFETIME_MS = 10000,
    MOVED_MAX = 8
};

struct link {
    void *socket;
    void *monitor;
    int timeout_ms; /* the socket's ZMQ_RCVTIMEO */
    uint64_t hello_id;
    bool up;
};

struct client {
    const struct config *config;
    const struct member *first; /* whom to ask first, or NULL; then whoever served last */
    bool trace;
    void *context;
    struct link *links; /* as many as members, most of them never used */
    uint64_t last_id;
    uint8_t *scratch; /* the verb's message while it is encoded, in locked memory */
    uint8_t *result;  /* the body of the last reply, in locked memory */
    size_t result_len;
    struct key key; /* the last one described */
    bool knows_key;
};

/* What a node said. */
struct answer {
    uint64_t status; /* 0 ok, 1 error, 2 moved */
    struct bytes body;
    struct failure error;
    char names[MOVED_MAX][NAME_SIZE];
    size_t name_count;
};

static int64_t clock_ms(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int64_t left_ms(int64_t deadline) {
    return deadline - clock_ms(CLOCK_MONOTONIC);
}

static void tell(const struct client *client, const struct member *node, const char *what) {
    if (client->trace) {
        fprintf(stderr, "kq-client: %s: %s\n", node->name, what);
    }
}

static struct link *link_of(struct client *client, const struct member *node) {
    return &client->links[node - client->config->cluster.members];
}

/* --- connections -------------------------------------------------------------------------------------------------- */

static void link_close(struct link *link) {
    if (link->socket != NULL) {
        zmq_socket_monitor(link->socket, NULL, 0);
        zmq_close(link->socket);
    }
    if (link->monitor != NULL) {
        zmq_close(link->monitor);
    }
    memset(link, 0, sizeof *link);
}

static bool set_int(void *socket, int option, int value) {
    return zmq_setsockopt(socket, option, &value, sizeof value) == 0;
}

static bool set_options(void *socket, const struct identity *identity, const struct member *node) {
    int64_t most = FRAME_MAX;
    return zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, node->curve_public, 32) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, identity->curve_public, 40) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, identity->curve_secret, 40) == 0 &&
           zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &most, sizeof most) == 0 && set_int(socket, ZMQ_LINGER, 0) &&
           set_int(socket, ZMQ_IMMEDIATE, 1) && set_int(socket, ZMQ_HANDSHAKE_IVL, HANDSHAKE_MS) &&
           set_int(socket, ZMQ_SNDHWM, QUEUE_MAX) && set_int(socket, ZMQ_RCVHWM, QUEUE_MAX) &&
           set_int(socket, ZMQ_SNDTIMEO, SLICE_MS) && set_int(socket, ZMQ_RCVTIMEO, SLICE_MS);
}

/* The next event of the connection, or 0 if there is none within `wait_ms`. */
static int next_event(struct link *link, int wait_ms) {
    zmq_msg_t frame;
    uint16_t event = 0;
    if (!set_int(link->monitor, ZMQ_RCVTIMEO, wait_ms)) {
        return 0;
    }
    zmq_msg_init(&frame);
    if (zmq_msg_recv(&frame, link->monitor, 0) >= 2) {
        memcpy(&event, zmq_msg_data(&frame), sizeof event);
        while (zmq_msg_more(&frame) && zmq_msg_recv(&frame, link->monitor, 0) >= 0) {
        }
    }
    zmq_msg_close(&frame);
    return event;
}

static bool open_socket(struct client *client, const struct member *node, struct link *link) {
    char address[64];
    snprintf(address, sizeof address, "inproc://monitor-%llu", (unsigned long long)++client->last_id);
    link->socket = zmq_socket(client->context, ZMQ_DEALER);
    link->monitor = zmq_socket(client->context, ZMQ_PAIR);
    link->timeout_ms = SLICE_MS;
    /* Only events that end a wait: the rest would fill a queue that nobody empties. */
    return link->socket != NULL && link->monitor != NULL &&
           set_options(link->socket, client->config->identity, node) && set_int(link->monitor, ZMQ_LINGER, 0) &&
           zmq_socket_monitor(link->socket, address,
                              ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH |
                                  ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_CONNECT_RETRIED) == 0 &&
           zmq_connect(link->monitor, address) == 0 && zmq_connect(link->socket, node->endpoint) == 0;
}

static bool send_request(struct client *client, struct link *link, const char *verb, struct bytes body,
                         int64_t timeout_ms, uint64_t *id);

static bool greet(struct client *client, struct link *link) {
    uint8_t body[64];
    struct writer hello;
    writer_init(&hello, body, sizeof body);
    put_array(&hello, 2);
    put_uint(&hello, VERSION);
    put_text(&hello, "c-example");
    return send_request(client, link, "hello", bytes_of(hello.at, hello.len), 10000, &link->hello_id);
}

/* A connection whose handshake is over; `until` is when to give up. */
static bool link_open(struct client *client, const struct member *node, int64_t until, struct failure *failure) {
    struct link *link = link_of(client, node);
    int64_t left;
    if (link->up) {
        return true;
    }
    link_close(link);
    if (!open_socket(client, node, link)) {
        fail(failure, "node-unavailable", "%s: %s", node->name, zmq_strerror(errno));
        link_close(link);
        return false;
    }
    while ((left = left_ms(until)) > 0) {
        switch (next_event(link, (int)left)) {
        case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
            link->up = greet(client, link);
            if (link->up) {
                return true;
            }
            break;
        case ZMQ_EVENT_HANDSHAKE_FAILED_AUTH:
            /* libzmq would try again for ever. */
            link_close(link);
            return fail(failure, "access-denied", "%s lets nobody with this client's CURVE key in", node->name);
        case ZMQ_EVENT_DISCONNECTED:
        case ZMQ_EVENT_CONNECT_RETRIED:
            link_close(link);
            return fail(failure, "node-unavailable", "%s: no connection to %s, or it is not the member of the manifest",
                        node->name, node->endpoint);
        default:
            break;
        }
    }
    link_close(link);
    return fail(failure, "node-unavailable", "%s: no connection to %s in time", node->name, node->endpoint);
}

/* --- requests and replies ----------------------------------------------------------------------------------------- */

/* libzmq calls this when it has encrypted the frame. */
static void wipe(void *frame, void *size) {
    sodium_memzero(frame, (size_t)(uintptr_t)size);
    free(frame);
}

static bool send_request(struct client *client, struct link *link, const char *verb, struct bytes body,
                         int64_t timeout_ms, uint64_t *id) {
    size_t size = body.len + 128;
    uint8_t *frame = malloc(size);
    struct writer request;
    zmq_msg_t message;
    if (frame == NULL) {
        return false;
    }
    *id = ++client->last_id;
    writer_init(&request, frame, size);
    put_array(&request, 6);
    put_uint(&request, VERSION);
    put_uint(&request, *id);
    put_text(&request, verb);
    put_uint(&request, (uint64_t)timeout_ms);
    put_bytes(&request, body);
    put_map(&request, 0);
    if (request.full || request.len > MESSAGE_MAX ||
        zmq_msg_init_data(&message, frame, request.len, wipe, (void *)(uintptr_t)size) != 0) {
        wipe(frame, (void *)(uintptr_t)size);
        return false;
    }
    if (zmq_msg_send(&message, link->socket, 0) < 0) {
        zmq_msg_close(&message);
        return false;
    }
    return true;
}

/* A code that we do not know counts as `error`. */
static const char *known_code(struct bytes code) {
    static const char *const known[] = {
        "key-not-found",      "key-exists",       "stale-key",         "access-denied",        "invalid-signature", "invalid-tag",
        "quorum-unavailable", "share-corrupt",    "deadline-exceeded", "unsupported-algorithm", "node-unavailable",  "overloaded",
        "need-grant",         "protocol-error",   "manifest-error",    "registry-unavailable", "token-error",       "moved",
        "audit-unavailable",  "store-unavailable", "invalid-request",  "error",             "key-pending",
        "key-disabled",       "version-retired"};
    for (size_t index = 0; index < sizeof known / sizeof known[0]; index++) {
        if (same_text(code, known[index])) {
            return known[index];
        }
    }
    return "error";
}

static bool read_error(const struct member *node, struct answer *answer, struct failure *failure) {
    struct reader reader;
    struct bytes code, text;
    const msgpack_object *names;
    char name[NAME_SIZE];
    size_t count;
    bool good = reader_open(&reader, answer->body, MESSAGE_MAX, 3, "error reply", failure);
    if (good && !(get_text(&reader.fields[0], 64, &code) && code.len > 0 && get_text(&reader.fields[1], 1024, &text) &&
                  get_array(&reader.fields[2], 0, 255, &names, &count))) {
        good = fail(failure, "protocol-error", "%s: malformed error reply", node->name);
    }
    for (size_t index = 0; good && index < count; index++) {
        good = get_name(&names[index], name) || fail(failure, "protocol-error", "%s: malformed name", node->name);
        if (good && answer->name_count < MOVED_MAX) {
            strcpy(answer->names[answer->name_count++], name);
        }
    }
    if (good) {
        fail(&answer->error, known_code(code), "%.*s", (int)text.len, text.len ? (const char *)text.at : "");
    }
    reader_close(&reader);
    return good;
}

/* A Welcome whose range holds our version, or a server that is too old to know `hello` in it. */
static bool check_welcome(const struct client *client, const struct member *node, struct bytes body,
                          struct failure *failure) {
    struct reader reader;
    struct bytes software, boot, hash;
    char name[NAME_SIZE];
    uint64_t version, lowest, highest, serial;
    bool good = reader_open(&reader, body, MESSAGE_MAX, 9, "welcome", failure);
    if (good && !(get_uint(&reader.fields[0], 0, INT64_MAX, &version) && get_uint(&reader.fields[1], 0, INT64_MAX, &lowest) &&
                  get_uint(&reader.fields[2], 0, INT64_MAX, &highest) && get_text(&reader.fields[3], 32, &software) &&
                  get_name(&reader.fields[4], name) && get_bytes(&reader.fields[5], 16, 16, &boot) &&
                  get_uint(&reader.fields[6], 0, INT64_MAX, &serial) && get_bytes(&reader.fields[7], 32, 32, &hash))) {
        good = fail(failure, "protocol-error", "%s: malformed welcome", node->name);
    }
    if (good && (lowest > VERSION || highest < VERSION)) {
        good = fail(failure, "protocol-error", "%s takes protocol versions %llu to %llu, this client speaks %d", node->name,
                    (unsigned long long)lowest, (unsigned long long)highest, VERSION);
    }
    if (good && serial > client->config->cluster.serial) {
        tell(client, node, "the cluster has a newer manifest than this client's file");
    }
    reader_close(&reader);
    return good;
}

/* What is taken in goes into client->result; libzmq's copy is wiped. */
static bool take(struct client *client, const struct member *node, struct link *link, zmq_msg_t *message, uint64_t id,
                 bool *mine, struct answer *answer, struct failure *failure) {
    struct reader reader;
    const msgpack_object *load;
    size_t count;
    struct bytes body;
    uint64_t version, told_id, queue, service_us;
    bool loaded, good;
    *mine = false;
    good = !zmq_msg_more(message) &&
           reader_open(&reader, bytes_of(zmq_msg_data(message), zmq_msg_size(message)), MESSAGE_MAX, 6, "reply", failure);
    if (!good) {
        return fail(failure, "protocol-error", "%s: what came is no reply", node->name);
    }
    good = get_uint(&reader.fields[0], 0, INT64_MAX, &version) && get_uint(&reader.fields[1], 0, INT64_MAX, &told_id) &&
           get_uint(&reader.fields[2], 0, 2, &answer->status) && get_bytes(&reader.fields[3], 0, MESSAGE_MAX, &body) &&
           get_array(&reader.fields[4], 3, 3, &load, &count) && get_uint(&load[0], 0, INT64_MAX, &queue) &&
           get_uint(&load[1], 0, INT64_MAX, &service_us) && get_bool(&load[2], &loaded) &&
           get_extensions(&reader.fields[5]);
    if (!good) {
        fail(failure, "protocol-error", "%s: malformed reply", node->name);
    } else if (told_id == link->hello_id) {
        good = answer->status == 0 ? check_welcome(client, node, body, failure)
                                   : fail(failure, "protocol-error", "%s refuses this client's hello", node->name);
    } else if (version < 1 || version > VERSION + 1) {
        good = fail(failure, "protocol-error", "%s speaks version %llu", node->name, (unsigned long long)version);
    } else if (told_id == 0) {
        good = fail(failure, "protocol-error", "%s could not read a request", node->name);
    } else if (told_id == id) {
        *mine = true;
        client->result_len = body.len;
        if (body.len > 0) {
            memcpy(client->result, body.at, body.len);
        }
        answer->body = bytes_of(client->result, body.len);
        answer->name_count = 0;
        good = answer->status == 0 || read_error(node, answer, failure);
    }
    /* Anything else is the answer to a request that was given up. */
    reader_close(&reader);
    return good;
}

static bool still_up(struct link *link) {
    for (int event; (event = next_event(link, 0)) != 0;) {
        if (event == ZMQ_EVENT_DISCONNECTED) {
            return false;
        }
    }
    return true;
}

/* Waits for the reply to `id`, not longer than `until`. */
static bool receive(struct client *client, const struct member *node, struct link *link, uint64_t id, int64_t until,
                    struct answer *answer, struct failure *failure) {
    int64_t left;
    while ((left = left_ms(until)) > 0) {
        int slice = left < SLICE_MS ? (int)left : SLICE_MS;
        bool mine = false, good;
        zmq_msg_t message;
        if (slice != link->timeout_ms && set_int(link->socket, ZMQ_RCVTIMEO, slice)) {
            link->timeout_ms = slice;
        }
        zmq_msg_init(&message);
        if (zmq_msg_recv(&message, link->socket, 0) < 0) {
            zmq_msg_close(&message);
            if (errno != EINTR && !still_up(link)) {
                link_close(link);
                return fail(failure, "node-unavailable", "%s: the connection broke", node->name);
            }
            continue;
        }
        good = take(client, node, link, &message, id, &mine, answer, failure);
        sodium_memzero(zmq_msg_data(&message), zmq_msg_size(&message));
        zmq_msg_close(&message);
        if (!good) {
            link_close(link); /* what is under way on it has no sense any more */
            return false;
        }
        if (mine) {
            return true;
        }
    }
    return fail(failure, "deadline-exceeded", "%s: no reply in time", node->name);
}

/* One request to one node. True: it answered, with whatever status. `others` says that another could be asked as well, so
 * that some of the time is left for it. The message is in client->scratch, which is wiped. */
static bool ask(struct client *client, const struct member *node, const char *verb, const struct writer *message,
                int64_t deadline, bool others, struct answer *answer, struct failure *failure) {
    struct link *link = link_of(client, node);
    int64_t left = left_ms(deadline), connect = left, patience;
    uint64_t id;
    bool sent;
    if (message->full) {
        sodium_memzero(client->scratch, MESSAGE_MAX);
        return fail(failure, "invalid-request", "the request does not fit in %d bytes", MESSAGE_MAX);
    }
    if (others && connect > CONNECT_MS) {
        connect = CONNECT_MS;
    }
    sent = left > 0 && link_open(client, node, clock_ms(CLOCK_MONOTONIC) + connect, failure);
    left = left_ms(deadline);
    if (sent && left > 0 &&
        !send_request(client, link, verb, bytes_of(message->at, message->len), left, &id)) {
        link_close(link);
        sent = fail(failure, "node-unavailable", "%s: the request could not be sent", node->name);
    }
    sodium_memzero(client->scratch, message->len);
    if (left <= 0) {
        return fail(failure, "deadline-exceeded", "%s: no time was left to ask it", node->name);
    }
    patience = others && left / 2 > PATIENCE_MS ? left / 2 : others && left > PATIENCE_MS ? PATIENCE_MS : left;
    return sent && receive(client, node, link, id, clock_ms(CLOCK_MONOTONIC) + patience, answer, failure);
}

/* --- whom to ask -------------------------------------------------------------------------------------------------- */

/* Each node once: those that a `moved` names first, then `first`, then the rest in order. */
struct turn {
    const struct member *hints[MOVED_MAX];
    size_t hint_count;
    const struct member *first;
    const struct member **nodes;
    size_t node_count;
    bool *asked; /* by member */
};

static const struct member *next_node(struct client *client, struct turn *turn, bool *others) {
    const struct member *members = client->config->cluster.members, *chosen = NULL;
    size_t total = turn->hint_count + 1 + turn->node_count;
    *others = false;
    for (size_t index = 0; index < total; index++) {
        const struct member *node = index < turn->hint_count    ? turn->hints[index]
                                    : index == turn->hint_count ? turn->first
                                                                : turn->nodes[index - turn->hint_count - 1];
        if (node == NULL || node == chosen || turn->asked[node - members]) {
            continue;
        }
        if (chosen != NULL) {
            *others = true;
            break;
        }
        chosen = node;
    }
    if (chosen != NULL) {
        turn->asked[chosen - members] = true;
    }
    return chosen;
}

static void follow(struct client *client, struct turn *turn, const struct answer *answer) {
    turn->hint_count = 0;
    for (size_t index = 0; index < answer->name_count; index++) {
        const struct member *node = find_node(&client->config->cluster, answer->names[index]);
        if (node != NULL) {
            turn->hints[turn->hint_count++] = node;
        }
    }
}

static bool turn_open(struct client *client, struct turn *turn) {
    size_t count = client->config->cluster.member_count;
    memset(turn, 0, sizeof *turn);
    turn->nodes = calloc(count, sizeof *turn->nodes);
    turn->asked = calloc(count, sizeof *turn->asked);
    return turn->nodes != NULL && turn->asked != NULL;
}

static void turn_close(struct turn *turn) {
    free(turn->nodes);
    free(turn->asked);
}

static bool is_code(const struct failure *failure, const char *code) {
    return strcmp(failure->code, code) == 0;
}

/* No other node would say otherwise. */
static bool is_final(const struct failure *failure) {
    return is_code(failure, "access-denied") || is_code(failure, "invalid-request") || is_code(failure, "invalid-tag") ||
           is_code(failure, "invalid-signature") || is_code(failure, "unsupported-algorithm") ||
           is_code(failure, "key-exists");
}

/* --- what a key is ------------------------------------------------------------------------------------------------ */

/* Asks nodes until one knows the key and can prove what it says of it. Nothing secret goes to a node in this. */
static bool describe_once(struct client *client, const char *name, int64_t deadline, struct failure *failure) {
    struct turn turn;
    const struct member *node;
    const struct cluster *cluster = &client->config->cluster;
    struct failure missing = {"", ""}, now;
    bool others, found = false, ended = false, unclear = false;
    if (!turn_open(client, &turn)) {
        turn_close(&turn);
        return fail(failure, "error", "no memory");
    }
    turn.first = client->first;
    for (size_t index = 0; index < cluster->member_count; index++) {
        if (cluster->members[index].role == NODE) {
            turn.nodes[turn.node_count++] = &cluster->members[index];
        }
    }
    fail(&missing, "key-not-found", "no node of the cluster knows the key '%s'", name);
    while (!found && !ended && (node = next_node(client, &turn, &others)) != NULL) {
        struct writer body;
        struct answer answer;
        bool answered;
        writer_init(&body, client->scratch, MESSAGE_MAX);
        put_array(&body, 2);
        put_text(&body, name);
        put_uint(&body, 0); /* the newest version */
        answered = ask(client, node, "describe", &body, deadline, others, &answer, &now);
        found = answered && answer.status == 0 && open_description(answer.body, name, cluster, &client->key, &now);
        if (answered && answer.status != 0) {
            now = answer.error;
        }
        tell(client, node, found ? "describes the key" : now.message);
        if (found) {
            client->first = node;
        } else if (answered && answer.status == 2) {
            follow(client, &turn, &answer);
        } else if (!answered || !is_code(&now, "key-not-found")) {
            if (!unclear || !is_code(failure, "key-pending")) {
                *failure = now;
            }
            unclear = true;
            ended = answered && is_final(&now);
        }
    }
    turn_close(&turn);
    client->knows_key = found;
    /* Only where every node had its say, nobody has the key. */
    if (!found && !unclear) {
        *failure = missing;
    }
    return found;
}

/* The same, and again while a node does not know yet whether the key was made. */
static bool describe(struct client *client, const char *name, int64_t deadline, struct failure *failure) {
    const struct timespec pause = {0, PENDING_MS * 1000000L};
    while (!describe_once(client, name, deadline, failure)) {
        if (!is_code(failure, "key-pending") || deadline - clock_ms(CLOCK_MONOTONIC) <= PENDING_MS) {
            return false;
        }
        nanosleep(&pause, NULL);
    }
    return true;
}

/* --- grants ------------------------------------------------------------------------------------------------------- */

/* Permission for one node to gather the shares of one key, once, within ten seconds. */
static bool make_grant(const struct client *client, const char *operation, const struct member *combiner,
                       struct writer *envelope, struct failure *failure) {
    uint8_t payload[GRANT_MAX], nonce[16];
    uint64_t now_ms = (uint64_t)clock_ms(CLOCK_REALTIME);
    struct writer grant;
    randombytes_buf(nonce, sizeof nonce);
    writer_init(&grant, payload, sizeof payload);
    put_array(&grant, 8);
    put_bytes(&grant, bytes_of(client->key.id, 16));
    put_uint(&grant, client->key.version);
    put_uint(&grant, client->key.epoch);
    put_array(&grant, 1);
    put_text(&grant, operation);
    put_text(&grant, combiner->name);
    put_uint(&grant, now_ms);
    put_uint(&grant, now_ms + GRANT_LIFETIME_MS);
    put_bytes(&grant, bytes_of(nonce, sizeof nonce));
    return sign_envelope(envelope, "grant", client->config->identity->name, now_ms, bytes_of(grant.at, grant.len),
                         client->config->identity->sign_secret, failure);
}

/* --- using a key -------------------------------------------------------------------------------------------------- */

/* One holder: without a grant at first, and again with one if it asks for it. */
static bool use_at(struct client *client, const struct member *node, const struct use *use, int64_t deadline, bool others,
                   struct answer *answer, struct failure *failure) {
    uint8_t room[GRANT_MAX];
    struct writer body, grant;
    writer_init(&grant, room, sizeof room);
    for (;;) {
        writer_init(&body, client->scratch, MESSAGE_MAX);
        put_array(&body, 7);
        put_text(&body, use->key);
        put_bytes(&body, bytes_of(client->key.id, 16));
        put_bytes(&body, use->data);
        put_bytes(&body, use->associated_data);
        put_bytes(&body, use->proof);
        put_bool(&body, use->digested);
        put_bytes(&body, bytes_of(grant.at, grant.len));
        if (!ask(client, node, use->operation, &body, deadline, others, answer, failure)) {
            return false;
        }
        if (answer->status == 0) {
            return true;
        }
        *failure = answer->error;
        tell(client, node, failure->message);
        if (grant.len > 0 || !is_code(failure, "need-grant")) {
            return false;
        }
        if (!make_grant(client, use->operation, node, &grant, failure)) {
            return false;
        }
        tell(client, node, "asked again with a grant");
    }
}

static bool read_result(const struct member *node, const struct answer *answer, struct bytes *result,
                        struct failure *failure) {
    struct reader reader;
    bool good = reader_open(&reader, answer->body, MESSAGE_MAX, 1, "result", failure) &&
                (get_bytes(&reader.fields[0], 0, RESULT_MAX, result) ||
                 fail(failure, "protocol-error", "%s: malformed result", node->name));
    reader_close(&reader);
    return good;
}

/* The holders in turn, until one gives a result or the error is one that no other would mend. */
static bool use_round(struct client *client, const struct use *use, int64_t deadline, struct bytes *result,
                      struct failure *failure) {
    struct turn turn;
    const struct member *node;
    bool others, done = false, ended = false;
    fail(failure, "node-unavailable", "no holder of the key '%s' is in the cluster manifest", use->key);
    if (!turn_open(client, &turn)) {
        turn_close(&turn);
        return fail(failure, "error", "no memory");
    }
    for (size_t index = 0; index < client->key.holder_count; index++) {
        turn.nodes[turn.node_count++] = client->key.holders[index];
        if (client->key.holders[index] == client->first) {
            turn.first = client->first;
        }
    }
    while (!done && !ended && (node = next_node(client, &turn, &others)) != NULL) {
        struct answer answer;
        done = use_at(client, node, use, deadline, others, &answer, failure) &&
               read_result(node, &answer, result, failure);
        if (done) {
            client->first = node;
            tell(client, node, "done");
        }
        ended = !done && (is_final(failure) || is_code(failure, "stale-key") || is_code(failure, "key-not-found"));
    }
    turn_close(&turn);
    return done;
}

static bool is_name(const char *text) {
    msgpack_object object = {.type = MSGPACK_OBJECT_STR};
    char name[NAME_SIZE];
    object.via.str.ptr = text;
    object.via.str.size = (uint32_t)strlen(text);
    return strlen(text) < NAME_SIZE && get_name(&object, name);
}

bool client_use(struct client *client, const struct use *use, int64_t timeout_ms, struct bytes *result,
                struct failure *failure) {
    int64_t deadline = clock_ms(CLOCK_MONOTONIC) + timeout_ms;
    client_forget(client);
    if (!is_name(use->key)) {
        return fail(failure, "invalid-request", "the key's name is none");
    }
    for (int again = 0; again < 2; again++) {
        if ((!client->knows_key || strcmp(client->key.name, use->key) != 0) &&
            !describe(client, use->key, deadline, failure)) {
            return false;
        }
        if (use_round(client, use, deadline, result, failure)) {
            return true;
        }
        if (!is_code(failure, "stale-key") && !is_code(failure, "key-not-found")) {
            return false;
        }
        client->knows_key = false; /* it was refreshed, or another key has the name now */
    }
    return false;
}

void client_forget(struct client *client) {
    sodium_memzero(client->result, client->result_len);
    client->result_len = 0;
}

bool client_open(struct client **made, const struct config *config, const char *first, bool trace,
                 struct failure *failure) {
    struct client *client = calloc(1, sizeof *client);
    *made = NULL;
    if (client == NULL) {
        return fail(failure, "error", "no memory");
    }
    client->config = config;
    client->trace = trace;
    client->first = first != NULL ? find_node(&config->cluster, first) : NULL;
    client->context = zmq_ctx_new();
    client->links = calloc(config->cluster.member_count, sizeof *client->links);
    client->scratch = sodium_malloc(MESSAGE_MAX);
    client->result = sodium_malloc(MESSAGE_MAX);
    if (first != NULL && client->first == NULL) {
        fail(failure, "config-error", "the cluster manifest has no node '%s'", first);
    } else if (client->context == NULL || client->links == NULL || client->scratch == NULL || client->result == NULL) {
        fail(failure, "error", "no memory");
    } else if (!zmq_has("curve")) {
        fail(failure, "error", "this libzmq has no CURVE");
    } else {
        *made = client;
        return true;
    }
    client_close(client);
    return false;
}

void client_close(struct client *client) {
    if (client == NULL) {
        return;
    }
    for (size_t index = 0; client->links != NULL && index < client->config->cluster.member_count; index++) {
        link_close(&client->links[index]);
    }
    if (client->context != NULL) {
        zmq_ctx_term(client->context); /* after it no frame of ours is left unwiped */
    }
    free(client->links);
    sodium_free(client->scratch);
    sodium_free(client->result);
    free(client);
}
