/* The command line of the example client; `kq-client --help` tells how it is used. */
#include "kq.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { DONE = 0, REFUSED = 1, FAILED = 2, LATENCY_MAX = 1000000 };

static const char USAGE[] =
    "usage: kq-client [OPTIONS] OPERATION KEY [FILE]\n"
    "       kq-client [OPTIONS] latency OPERATION KEY COUNT\n"
    "\n"
    "Use a key of a Keyquorum cluster. FILE, or the standard input, holds what the operation works on:\n"
    "  encrypt, decrypt     at most 48 KiB; what `engine.encrypt` writes (`keyquorum encrypt` writes chunks)\n"
    "  sign, mac            the message; the result is raw bytes\n"
    "  verify, verify-mac   the message; exit code 0 only if the signature or MAC is right\n"
    "  latency              COUNT warm operations (encrypt, sign or mac) one after the other; p50 and p99 in us\n"
    "\n"
    "  --config FILE      client.toml (KEYQUORUM_CONFIG if not given, else ./client.toml)\n"
    "  --out FILE         where the result goes (mode 0600); the standard output if not given\n"
    "  --signature FILE   the signature that verify checks\n"
    "  --mac FILE         the MAC that verify-mac checks\n"
    "  --aad TEXT         associated data of encrypt and decrypt: authenticated, not encrypted\n"
    "  --aad-file FILE    the same, from a file\n"
    "  --digested         FILE is the digest of the message (ECDSA and RSA)\n"
    "  --node NAME        ask this node first\n"
    "  --timeout SECONDS  deadline of the operation, 0.001 to 600 (timeout_s of client.toml if not given)\n"
    "  --size BYTES       latency: how much data each operation has (1024)\n"
    "  --rounds           latency: COUNT operations for each line of the standard input, all times on one line\n"
    "  --verbose          tell on the standard error whom it asks, and what they say\n"
    "  -h, --help         show this and exit\n"
    "\n"
    "Exit codes: 0 done, 1 your mistake or a failed check, 2 the cluster could not. An error is one line on the standard\n"
    "error, `kq-client: CODE: MESSAGE`; the codes are those of docs/protocol.md, and `usage` and `file`.\n";

struct options {
    const char *config, *out, *signature, *mac, *aad, *aad_file, *node;
    double timeout_s;
    long size;
    bool digested, rounds, verbose, latency;
    const char *operation, *key, *file;
    long count;
};

static int report(const struct failure *failure) {
    static const char *const refusals[] = {"access-denied", "config-error",    "invalid-signature", "invalid-tag",
                                           "key-exists",    "key-not-found",   "manifest-error",    "unsupported-algorithm",
                                           "usage",         "invalid-request", "file"};
    fprintf(stderr, "kq-client: %s: %s\n", failure->code, failure->message);
    for (size_t index = 0; index < sizeof refusals / sizeof refusals[0]; index++) {
        if (strcmp(failure->code, refusals[index]) == 0) {
            return REFUSED;
        }
    }
    return FAILED;
}

/* --- arguments ---------------------------------------------------------------------------------------------------- */

static bool number(const char *text, double least, double most, double *value) {
    char *end;
    *value = strtod(text, &end);
    return *text && *end == 0 && *value >= least && *value <= most;
}

static bool whole(const char *text, long least, long most, long *value) {
    char *end;
    errno = 0;
    *value = strtol(text, &end, 10);
    return *text && *end == 0 && errno == 0 && *value >= least && *value <= most;
}

static bool is_operation(const char *name, bool latency) {
    static const char *const known[] = {"encrypt", "sign", "mac", "decrypt", "verify", "verify-mac"};
    for (size_t index = 0; index < (latency ? 3U : 6U); index++) {
        if (strcmp(name, known[index]) == 0) {
            return true;
        }
    }
    return false;
}

static bool parse_options(int count, char **words, struct options *options, bool *help, struct failure *failure) {
    enum { OUT = 256, CONFIG, SIGNATURE, MAC, AAD, AAD_FILE, DIGESTED, AT_NODE, TIMEOUT, SIZE, ROUNDS, VERBOSE };
    static const struct option known[] = {{"config", required_argument, NULL, CONFIG},
                                          {"out", required_argument, NULL, OUT},
                                          {"signature", required_argument, NULL, SIGNATURE},
                                          {"mac", required_argument, NULL, MAC},
                                          {"aad", required_argument, NULL, AAD},
                                          {"aad-file", required_argument, NULL, AAD_FILE},
                                          {"digested", no_argument, NULL, DIGESTED},
                                          {"node", required_argument, NULL, AT_NODE},
                                          {"timeout", required_argument, NULL, TIMEOUT},
                                          {"size", required_argument, NULL, SIZE},
                                          {"rounds", no_argument, NULL, ROUNDS},
                                          {"verbose", no_argument, NULL, VERBOSE},
                                          {"help", no_argument, NULL, 'h'},
                                          {NULL, 0, NULL, 0}};
    const char **texts[] = {[CONFIG - OUT] = &options->config,       [0] = &options->out,
                            [SIGNATURE - OUT] = &options->signature, [MAC - OUT] = &options->mac,
                            [AAD - OUT] = &options->aad,             [AAD_FILE - OUT] = &options->aad_file,
                            [AT_NODE - OUT] = &options->node};
    opterr = 0;
    for (int found; (found = getopt_long(count, words, "h", known, NULL)) != -1;) {
        bool good = true;
        switch (found) {
        case 'h':
            *help = true;
            return true;
        case DIGESTED:
            options->digested = true;
            break;
        case ROUNDS:
            options->rounds = true;
            break;
        case VERBOSE:
            options->verbose = true;
            break;
        case TIMEOUT:
            good = number(optarg, 0.001, 600, &options->timeout_s);
            break;
        case SIZE:
            good = whole(optarg, 0, DATA_MAX, &options->size);
            break;
        case '?':
            return fail(failure, "usage", "%s: unknown option, or its value is missing", words[optind - 1]);
        default:
            *texts[found - OUT] = optarg;
        }
        if (!good) {
            return fail(failure, "usage", "%s: out of range", words[optind - 1]);
        }
    }
    return true;
}

static bool parse(int count, char **words, struct options *options, bool *help, struct failure *failure) {
    if (!parse_options(count, words, options, help, failure) || *help) {
        return *help;
    }
    words += optind;
    count -= optind;
    options->latency = count > 0 && strcmp(words[0], "latency") == 0;
    if (options->latency) {
        words++;
        count--;
    }
    if (count < (options->latency ? 3 : 2) || count > 3) {
        return fail(failure, "usage", "wrong number of arguments");
    }
    options->operation = words[0];
    options->key = words[1];
    options->file = count == 3 ? words[2] : NULL;
    if (!is_operation(options->operation, options->latency)) {
        return fail(failure, "usage", "'%s' is no operation here", options->operation);
    }
    if (options->latency && !whole(options->file, 1, LATENCY_MAX, &options->count)) {
        return fail(failure, "usage", "COUNT must be from 1 to %d", LATENCY_MAX);
    }
    if ((strcmp(options->operation, "verify") == 0) != (options->signature != NULL) ||
        (strcmp(options->operation, "verify-mac") == 0) != (options->mac != NULL)) {
        return fail(failure, "usage", "verify needs --signature and verify-mac --mac, and no other operation takes them");
    }
    if (options->aad != NULL && options->aad_file != NULL) {
        return fail(failure, "usage", "--aad and --aad-file do not go together");
    }
    return true;
}

/* --- one operation ------------------------------------------------------------------------------------------------ */

static bool write_result(const char *path, struct bytes result, struct failure *failure) {
    int file = path == NULL ? STDOUT_FILENO : open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    size_t done = 0;
    while (file >= 0 && done < result.len) {
        ssize_t now = write(file, result.at + done, result.len - done);
        if (now < 0 && errno != EINTR) {
            break;
        }
        done += now > 0 ? (size_t)now : 0;
    }
    if (file < 0 || done < result.len || (path != NULL && close(file) != 0)) {
        return fail(failure, "file", "%s: %s", path == NULL ? "the standard output" : path, strerror(errno));
    }
    return true;
}

struct inputs {
    uint8_t *data, *aad, *proof; /* each in locked memory */
    size_t data_len, aad_len, proof_len;
};

static bool read_inputs(const struct options *options, struct inputs *inputs, struct failure *failure) {
    const char *proof = options->signature != NULL ? options->signature : options->mac;
    size_t most = strcmp(options->operation, "decrypt") == 0 ? RESULT_MAX : DATA_MAX;
    return (proof == NULL || read_file(proof, PROOF_MAX, &inputs->proof, &inputs->proof_len, failure)) &&
           (options->aad_file == NULL || read_file(options->aad_file, AAD_MAX, &inputs->aad, &inputs->aad_len, failure)) &&
           read_file(options->file, most, &inputs->data, &inputs->data_len, failure);
}

static bool operate(struct client *client, const struct options *options, int64_t timeout_ms, struct failure *failure) {
    struct inputs inputs = {NULL, NULL, NULL, 0, 0, 0};
    struct bytes result;
    bool good = read_inputs(options, &inputs, failure);
    if (good) {
        struct use use = {.operation = options->operation,
                          .key = options->key,
                          .data = bytes_of(inputs.data, inputs.data_len),
                          .associated_data = options->aad != NULL ? bytes_of(options->aad, strlen(options->aad))
                                                                  : bytes_of(inputs.aad, inputs.aad_len),
                          .proof = bytes_of(inputs.proof, inputs.proof_len),
                          .digested = options->digested};
        good = use.associated_data.len <= AAD_MAX || fail(failure, "invalid-request", "more than 4096 bytes of --aad");
        good = good && client_use(client, &use, timeout_ms, &result, failure);
        /* A verified signature leaves nothing to write. */
        good = good && (options->signature != NULL || options->mac != NULL ||
                        write_result(options->out, result, failure));
        client_forget(client);
    }
    sodium_free(inputs.data);
    sodium_free(inputs.aad);
    sodium_free(inputs.proof);
    return good;
}

/* --- latency ------------------------------------------------------------------------------------------------------ */

static int ascending(const void *one, const void *other) {
    double first = *(const double *)one, second = *(const double *)other;
    return (first > second) - (first < second);
}

static double now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static bool run(struct client *client, const struct use *use, long count, int64_t timeout_ms, double *taken,
                struct failure *failure) {
    struct bytes result;
    for (long index = 0; index < count; index++) {
        double begun = now_us();
        if (!client_use(client, use, timeout_ms, &result, failure)) {
            return false;
        }
        taken[index] = now_us() - begun;
    }
    return true;
}

static bool measure(struct client *client, const struct options *options, int64_t timeout_ms, struct failure *failure) {
    uint8_t data[DATA_MAX];
    double warm[10], *taken = calloc((size_t)options->count, sizeof *taken);
    struct use use = {.operation = options->operation, .key = options->key, .digested = options->digested};
    bool good;
    int line;
    if (taken == NULL) {
        return fail(failure, "error", "no memory");
    }
    for (size_t index = 0; index < sizeof data; index++) {
        data[index] = (uint8_t)index;
    }
    use.data = bytes_of(data, (size_t)options->size);
    good = run(client, &use, 10, timeout_ms, warm, failure);
    if (good && !options->rounds) {
        good = run(client, &use, options->count, timeout_ms, taken, failure);
        if (good) {
            /* The nearest rank, as in bench/rig.py. */
            qsort(taken, (size_t)options->count, sizeof *taken, ascending);
            printf("%s, %ld operations one after the other: p50 %.1f us, p99 %.1f us\n", options->operation, options->count,
                   taken[options->count / 2], taken[options->count * 99 / 100]);
        }
    }
    while (good && options->rounds && (line = getchar()) != EOF) {
        if (line != '\n') {
            continue;
        }
        good = run(client, &use, options->count, timeout_ms, taken, failure);
        for (long index = 0; good && index < options->count; index++) {
            printf("%.2f%c", taken[index], index + 1 < options->count ? ' ' : '\n');
        }
        fflush(stdout);
    }
    free(taken);
    return good;
}

int main(int count, char **words) {
    struct options options = {.size = 1024};
    struct rlimit no_core = {0, 0};
    struct config config;
    struct client *client = NULL;
    struct failure failure = {"", ""};
    bool help = false, good;
    if (!parse(count, words, &options, &help, &failure)) {
        report(&failure);
        fputs("try: kq-client --help\n", stderr);
        return REFUSED;
    }
    if (help) {
        fputs(USAGE, stdout);
        return DONE;
    }
    if (sodium_init() < 0 || setrlimit(RLIMIT_CORE, &no_core) != 0) { /* no secret of ours in a core file */
        fail(&failure, "error", "libsodium, or the limit on core files, could not be set up");
        return report(&failure);
    }
    if (options.config == NULL) {
        options.config = getenv("KEYQUORUM_CONFIG");
    }
    good = config_load(options.config != NULL && options.config[0] ? options.config : "client.toml", &config, &failure);
    if (good) {
        double timeout_s = options.timeout_s > 0 ? options.timeout_s : config.timeout_s;
        int64_t timeout_ms = (int64_t)(timeout_s * 1000 + 0.5);
        good = client_open(&client, &config, options.node, options.verbose, &failure) &&
               (options.latency ? measure : operate)(client, &options, timeout_ms > 0 ? timeout_ms : 1, &failure);
        client_close(client);
        config_close(&config);
    }
    return good ? DONE : report(&failure);
}
