/*
 * The choice of a kernel, and split and combine on top of any: the only file that knows about CPUs and randomness.
 *
 * It knows nothing of Python. A new instruction set is one file gf256_<name>.c, one line in gf256.h and one line in
 * KERNELS with its test of the CPU.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/types.h>

static int always(void)
{
    return 1;
}

/* Fastest first; the portable one is last and runs everywhere. */
static const gf256_kernel KERNELS[] = {
    {"portable", always, gf256_multiply_portable},
};

const gf256_kernel *gf256_kernel_at(unsigned position)
{
    for (size_t i = 0; i < sizeof KERNELS / sizeof KERNELS[0]; i++)
        if (KERNELS[i].supported() && position-- == 0)
            return &KERNELS[i];
    return NULL;
}

/*
 * Logarithms to the base 3, for share indices and scalars only. They are public; a row is never looked up here.
 * Powers are kept twice over, so that a sum of two logarithms needs no reduction.
 */
static uint8_t public_power[510];
static uint8_t public_logarithm[256];

void gf256_init(void)
{
    unsigned element = 1;
    for (unsigned exponent = 0; exponent < 255; exponent++) {
        public_power[exponent] = public_power[exponent + 255] = (uint8_t)element;
        public_logarithm[element] = (uint8_t)exponent;
        element ^= element << 1; /* times 3, a generator */
        if (element & 0x100)
            element ^= 0x11B;
    }
}

/* Row j is 1, x_j, x_j^2, ..., x_j^(threshold - 1). No x is zero. */
static void write_vandermonde(uint8_t *matrix, const uint8_t *xs, unsigned shares, unsigned threshold)
{
    for (unsigned j = 0; j < shares; j++) {
        const unsigned step = public_logarithm[xs[j]];
        unsigned exponent = 0;
        for (unsigned k = 0; k < threshold; k++) {
            *matrix++ = public_power[exponent];
            exponent += step;
            if (exponent >= 255)
                exponent -= 255;
        }
    }
}

/* scalars[j] = product over m != j of (target - x_m) / (x_j - x_m); in this field minus is exclusive or. */
static void write_lagrange(uint8_t *scalars, const uint8_t *xs, unsigned count, uint8_t target)
{
    unsigned numerator = 0; /* the logarithm of the product of all (target - x_m) */
    for (unsigned m = 0; m < count; m++) {
        if (xs[m] == target) { /* the value asked for is one of those given */
            memset(scalars, 0, count);
            scalars[m] = 1;
            return;
        }
        numerator += public_logarithm[xs[m] ^ target];
    }
    for (unsigned j = 0; j < count; j++) {
        unsigned denominator = public_logarithm[xs[j] ^ target];
        for (unsigned m = 0; m < count; m++)
            if (m != j)
                denominator += public_logarithm[xs[j] ^ xs[m]];
        scalars[j] = public_power[(numerator + 255u * 255u - denominator) % 255u];
    }
}

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

int gf256_split(const gf256_kernel *kernel, const uint8_t *secret, size_t length, unsigned threshold, unsigned shares,
                const uint8_t *xs, uint8_t *const *ys)
{
    const size_t block_max = length < GF256_BLOCK_BYTES ? length : GF256_BLOCK_BYTES;
    const size_t random_max = (threshold - 1) * block_max;
    const uint8_t *inputs[GF256_SHARES_MAX];
    uint8_t *outputs[GF256_SHARES_MAX];
    uint8_t *const work = malloc(random_max + (size_t)shares * threshold); /* the random rows, then the matrix */
    int error = work == NULL ? ENOMEM : 0;

    if (!error)
        write_vandermonde(work + random_max, xs, shares, threshold);
    for (size_t offset = 0; offset < length && !error; offset += block_max) {
        const size_t block = length - offset < block_max ? length - offset : block_max;
        error = fill_random(work, (threshold - 1) * block);
        if (error)
            break;
        inputs[0] = secret + offset;
        for (unsigned k = 1; k < threshold; k++)
            inputs[k] = work + (k - 1) * block;
        for (unsigned j = 0; j < shares; j++)
            outputs[j] = ys[j] + offset;
        kernel->multiply(work + random_max, shares, threshold, inputs, outputs, block);
    }
    if (work != NULL)
        explicit_bzero(work, random_max);
    free(work);
    if (error) /* fail closed: no share of a part of the secret gets out */
        for (unsigned j = 0; j < shares; j++)
            explicit_bzero(ys[j], length);
    return error;
}

void gf256_combine(const gf256_kernel *kernel, const uint8_t *xs, unsigned count, uint8_t target,
                   const uint8_t *const *ys, size_t length, uint8_t *out)
{
    uint8_t scalars[GF256_SHARES_MAX];
    write_lagrange(scalars, xs, count, target);
    kernel->multiply(scalars, 1, count, ys, &out, length);
}
