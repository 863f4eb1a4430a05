/*
 * The choice of a kernel and a generator, and split and interpolation on top of any: the only file that knows about
 * CPUs and the system's randomness.
 *
 * It knows nothing of Python. A new instruction set is one file gf256_<name>.c, one line in gf256.h and one line in
 * KERNELS with its test of the CPU.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <sys/types.h>

static int always(void)
{
    return 1;
}

#if defined(__x86_64__)
/*
 * gcc's run-time test says whether the operating system saves the vector registers only with the flags of their width;
 * GFNI, AES and VAES alone it sets even where they don't. So each test asks for the width too.
 */
static int has_gfni512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("gfni");
}

static int has_gfni256(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("gfni");
}

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") != 0;
}

static int has_aesni(void)
{
    return __builtin_cpu_supports("aes") && __builtin_cpu_supports("ssse3");
}

static int has_vaes256(void)
{
    return has_aesni() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vaes");
}

static int has_vaes512(void)
{
    return has_vaes256() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
#endif

/* Fastest first; the portable one is last and runs everywhere. */
static const gf256_kernel KERNELS[] = {
#if defined(__x86_64__)
    {"gfni512", has_gfni512, gf256_multiply_gfni512, "aes256ctr-vaes512 aes256ctr-vaes256 aes256ctr-aesni "},
    {"gfni256", has_gfni256, gf256_multiply_gfni256, "aes256ctr-vaes256 aes256ctr-aesni "},
    {"avx2", has_avx2, gf256_multiply_avx2, "aes256ctr-vaes256 aes256ctr-aesni "},
#elif defined(__aarch64__)
    {"neon", always, gf256_multiply_neon, ""},
#endif
    {"portable", always, gf256_multiply_portable, ""},
};

/* As above. ChaCha20 serves every kernel for which nothing better is there. */
static const gf256_generator GENERATORS[] = {
#if defined(__x86_64__)
    {"aes256ctr-vaes512", has_vaes512, gf256_aes_start, gf256_aes_fill_vaes512},
    {"aes256ctr-vaes256", has_vaes256, gf256_aes_start, gf256_aes_fill_vaes256},
    {"aes256ctr-aesni", has_aesni, gf256_aes_start, gf256_aes_fill_aesni},
#endif
    {"chacha20", always, gf256_chacha20_start, gf256_chacha20_fill},
};

enum { KERNEL_COUNT = sizeof KERNELS / sizeof KERNELS[0], GENERATOR_COUNT = sizeof GENERATORS / sizeof GENERATORS[0] };

const gf256_kernel *gf256_kernel_at(unsigned position)
{
    for (size_t i = 0; i < KERNEL_COUNT; i++)
        if (KERNELS[i].supported() && position-- == 0)
            return &KERNELS[i];
    return NULL;
}

const gf256_generator *gf256_generator_at(unsigned position)
{
    for (size_t i = 0; i < GENERATOR_COUNT; i++)
        if (GENERATORS[i].supported() && position-- == 0)
            return &GENERATORS[i];
    return NULL;
}

const gf256_generator *gf256_generator_of(const gf256_kernel *kernel)
{
    for (size_t i = 0; i < GENERATOR_COUNT; i++) {
        const char *found = strstr(kernel->generators, GENERATORS[i].name);
        if (found != NULL && found[strlen(GENERATORS[i].name)] == ' ' && GENERATORS[i].supported())
            return &GENERATORS[i];
    }
    return &GENERATORS[GENERATOR_COUNT - 1];
}

/* --- the tables of public elements --------------------------------------------------------------------------------- */

static gf256_field fields[] = {{.polynomial = 0x11B}, {.polynomial = 0x11D}};

static unsigned doubled(const gf256_field *field, unsigned element)
{
    return element & 0x80 ? element << 1 ^ field->polynomial : element << 1;
}

static void write_field(gf256_field *field)
{
    unsigned element = 1;
    for (unsigned exponent = 0; exponent < 768; exponent++) {
        field->power[exponent] = (uint8_t)element;
        if (exponent < 255)
            field->logarithm[element] = (uint8_t)exponent;
        element = field->polynomial == 0x11B ? element ^ doubled(field, element) : doubled(field, element); /* 3 or 2 */
    }
    for (unsigned scalar = 0; scalar < 256; scalar++) {
        uint8_t multiple[8]; /* scalar * 2^bit */
        uint64_t matrix = 0;
        multiple[0] = (uint8_t)scalar;
        for (unsigned bit = 1; bit < 8; bit++)
            multiple[bit] = (uint8_t)doubled(field, multiple[bit - 1]);
        /* Byte 7 - i of gf2p8affineqb's matrix says which bits of the input make up bit i of the output. */
        for (unsigned bit = 0; bit < 8; bit++)
            for (unsigned i = 0; i < 8; i++)
                matrix |= (uint64_t)(multiple[bit] >> i & 1) << (8 * (7 - i) + bit);
        field->affine[scalar] = matrix;
        for (unsigned nibble = 0; nibble < 16; nibble++) {
            unsigned low = 0, high = 0;
            for (unsigned bit = 0; bit < 4; bit++)
                if (nibble >> bit & 1) {
                    low ^= multiple[bit];
                    high ^= multiple[bit + 4];
                }
            field->nibbles[scalar][nibble] = (uint8_t)low;
            field->nibbles[scalar][nibble + 16] = (uint8_t)high;
        }
    }
}

void gf256_init(void)
{
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        write_field(&fields[i]);
}

const gf256_field *gf256_field_of(unsigned polynomial)
{
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        if (fields[i].polynomial == polynomial)
            return &fields[i];
    return NULL;
}

/* --- interpolation ------------------------------------------------------------------------------------------------- */

/* A sum of fewer than 2^16 modulo 255, as 0..255: both ends are the same exponent. 256 is 1 modulo 255. */
static unsigned folded(unsigned sum)
{
    sum = (sum & 255) + (sum >> 8);
    return (sum & 255) + (sum >> 8);
}

/*
 * matrix[o * count + j] = product over m != j of (targets[o] - x_m) / (x_j - x_m); minus is exclusive or.
 * All of it is in logarithms; the differences of the xs are the same for every target.
 */
static void write_lagrange(const gf256_field *field, uint8_t *matrix, const uint8_t *xs, unsigned count,
                           const uint8_t *targets, unsigned target_count)
{
    const uint8_t *const logarithm = field->logarithm;
    unsigned inverse[GF256_SHARES_MAX]; /* the logarithm of 1 / product over m != j of (x_j - x_m) */
    for (unsigned j = 0; j < count; j++)
        inverse[j] = 0;
    for (unsigned j = 1; j < count; j++)
        for (unsigned m = 0; m < j; m++) {
            const unsigned difference = logarithm[xs[j] ^ xs[m]];
            inverse[j] += difference;
            inverse[m] += difference;
        }
    for (unsigned j = 0; j < count; j++)
        inverse[j] = 255 - folded(inverse[j]);
    for (unsigned o = 0; o < target_count; o++, matrix += count) {
        unsigned numerator = 0; /* the logarithm of the product of all (target - x_m) */
        unsigned given = count;
        for (unsigned m = 0; m < count; m++) {
            if (xs[m] == targets[o])
                given = m;
            numerator += logarithm[xs[m] ^ targets[o]];
        }
        if (given < count) { /* the value asked for is one of those given */
            memset(matrix, 0, count);
            matrix[given] = 1;
            continue;
        }
        numerator = folded(numerator);
        for (unsigned j = 0; j < count; j++)
            matrix[j] = field->power[numerator + inverse[j] + 255 - logarithm[xs[j] ^ targets[o]]];
    }
}

enum {
    MATRIX_BYTES_MAX = 128 * 128,    /* (n - t + 1) * t with n = 255 is at most that */
    BYPASS_BYTES_MIN = 24 * 1024 * 1024 /* rows that are larger together stay in no cache, so writing around it saves reads */
};

static int is_large(size_t length, unsigned rows)
{
    return length >= BYPASS_BYTES_MIN / rows;
}

void gf256_interpolate(const gf256_kernel *kernel, const gf256_field *field, const uint8_t *xs, unsigned count,
                       const uint8_t *const *ys, const uint8_t *targets, unsigned target_count, uint8_t *const *outs,
                       size_t length)
{
    uint8_t matrix[MATRIX_BYTES_MAX];
    while (target_count > 0) {
        const unsigned rows = target_count < MATRIX_BYTES_MAX / count ? target_count : MATRIX_BYTES_MAX / count;
        write_lagrange(field, matrix, xs, count, targets, rows);
        kernel->multiply(field, matrix, rows, count, ys, outs, length, is_large(length, count + rows));
        targets += rows;
        outs += rows;
        target_count -= rows;
    }
}

/* --- splitting ----------------------------------------------------------------------------------------------------- */

/* Fills from the operating system's generator. Returns 0 or an errno value, never fewer bytes. */
static int fill_random(uint8_t *buffer, size_t length)
{
    while (length > 0) {
        const ssize_t got = getrandom(buffer, length, 0);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (got == 0) /* getrandom(2) never says so; but a loop on it would never end */
            return EIO;
        buffer += got;
        length -= (size_t)got;
    }
    return 0;
}

/*
 * Both fill the rows `randoms` and then compute the rows `outputs` from the secret and them.
 */
typedef struct {
    const gf256_kernel *kernel;
    const gf256_field *field;
    const uint8_t *matrix;
    const uint8_t *secret;
    uint8_t *const *ys;
    unsigned threshold, shares;
} plan;

static void compute(const plan *p, size_t offset, size_t length, int bypass)
{
    const uint8_t *inputs[GF256_SHARES_MAX];
    uint8_t *outputs[GF256_SHARES_MAX];
    inputs[0] = p->secret + offset;
    for (unsigned k = 1; k < p->threshold; k++)
        inputs[k] = p->ys[k - 1] + offset;
    for (unsigned j = p->threshold - 1; j < p->shares; j++)
        outputs[j - (p->threshold - 1)] = p->ys[j] + offset;
    p->kernel->multiply(p->field, p->matrix, p->shares - p->threshold + 1, p->threshold, inputs, outputs, length, bypass);
}

/* Few random bytes: one call of the system's generator gives them all. */
static int split_direct(const plan *p, size_t length)
{
    uint8_t randoms[GF256_DIRECT_BYTES];
    const size_t wanted = (p->threshold - 1) * length;
    const int error = fill_random(randoms, wanted);
    if (error)
        return error;
    for (unsigned k = 0; k + 1 < p->threshold; k++)
        memcpy(p->ys[k], randoms + k * length, length);
    explicit_bzero(randoms, wanted);
    compute(p, 0, length, 0);
    return 0;
}

/* Many: a generator that is seeded once, and works block by block, so that the random rows are read from the cache. */
static int split_streamed(const plan *p, const gf256_generator *generator, size_t length)
{
    gf256_stream stream;
    uint8_t seed[GF256_SEED_BYTES];
    const int bypass = is_large(length, p->shares + 1);
    const int error = fill_random(seed, sizeof seed);
    if (error)
        return error;
    generator->start(&stream, seed);
    explicit_bzero(seed, sizeof seed);
    for (size_t offset = 0; offset < length; offset += GF256_BLOCK_BYTES) {
        const size_t block = length - offset < GF256_BLOCK_BYTES ? length - offset : GF256_BLOCK_BYTES;
        for (unsigned k = 0; k + 1 < p->threshold; k++)
            generator->fill(&stream, p->ys[k] + offset, block);
        compute(p, offset, block, bypass);
    }
    explicit_bzero(&stream, sizeof stream);
    return 0;
}

int gf256_split(const gf256_kernel *kernel, const gf256_generator *generator, const gf256_field *field,
                const uint8_t *secret, size_t length, unsigned threshold, unsigned shares, const uint8_t *xs,
                uint8_t *const *ys)
{
    uint8_t matrix[MATRIX_BYTES_MAX], given[GF256_SHARES_MAX];
    const plan p = {kernel, field, matrix, secret, ys, threshold, shares};
    int error = 0;
    given[0] = 0; /* the secret's place */
    memcpy(given + 1, xs, threshold - 1);
    write_lagrange(field, matrix, given, threshold, xs + threshold - 1, shares - threshold + 1);
    if (threshold == 1)
        compute(&p, 0, length, is_large(length, shares + 1));
    else if (length <= GF256_DIRECT_BYTES / (threshold - 1))
        error = split_direct(&p, length);
    else
        error = split_streamed(&p, generator, length);
    if (error) /* fail closed: nothing that a caller could take for a share */
        for (unsigned j = 0; j < shares; j++)
            explicit_bzero(ys[j], length);
    return error;
}
