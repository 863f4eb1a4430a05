/*
 * Owns the comparison of a kernel with the slow oracle where Python can't run it: under an emulator of another CPU.
 *
 *   oracle KERNEL...       prints each kernel's name when it is right; the suite does the same through the package
 *
 * All scalars with all bytes in both fields; lengths 1..257 and at block ends, for all numbers of outputs and some of
 * inputs, unaligned and between guard bytes; sums alone; whole splits in both fields.
 */
#define _GNU_SOURCE
#include "gf256.h"
#include "slow_product.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64, LENGTH_MAX = 9000, ROWS = 8, COUNT_MAX = 12 };

static uint8_t products[2][256][256];
static uint8_t given[COUNT_MAX][LENGTH_MAX + 2 * GUARD], made[ROWS][LENGTH_MAX + 2 * GUARD];
static const unsigned POLYNOMIALS[2] = {0x11B, 0x11D};

static void fail(const char *kernel, const char *what, unsigned rows, unsigned count, size_t length)
{
    fprintf(stderr, "%s: %s (%u outputs, %u inputs, length %zu)\n", kernel, what, rows, count, length);
    exit(1);
}

static void check(const gf256_kernel *kernel, int field, const uint8_t *matrix, unsigned rows, unsigned count,
                  size_t length, unsigned shift)
{
    const uint8_t *inputs[COUNT_MAX];
    uint8_t *outputs[ROWS], *list = aligned_alloc(64, (rows * count * kernel->scalar_bytes + 127) / 64 * 64);
    for (unsigned k = 0; k < count; k++)
        inputs[k] = given[k] + GUARD + shift;
    for (unsigned r = 0; r < rows; r++) {
        memset(made[r], 0xA5, sizeof made[r]);
        outputs[r] = made[r] + GUARD + shift;
    }
    kernel->list(list, gf256_field_of(POLYNOMIALS[field]), matrix, rows, count);
    kernel->run(list, rows, count, inputs, outputs, 0, length, 0);
    for (unsigned r = 0; r < rows; r++)
        for (size_t i = 0; i < sizeof made[r]; i++) {
            const size_t at = i - GUARD - shift; /* beyond any length before the row */
            uint8_t sum = 0xA5;
            if (at < length) {
                sum = 0;
                for (unsigned k = 0; k < count; k++)
                    sum ^= products[field][matrix[r * count + k]][inputs[k][at]];
            }
            if (made[r][i] != sum)
                fail(kernel->name, at < length ? "a wrong product" : "a guard byte is changed", rows, count, length);
        }
    free(list);
}

static void check_products(const gf256_kernel *kernel)
{
    for (int field = 0; field < 2; field++)
        for (unsigned scalar = 0; scalar < 256; scalar++) {
            const uint8_t matrix[1] = {(uint8_t)scalar};
            for (unsigned i = 0; i < 256; i++)
                given[0][GUARD + i] = (uint8_t)i;
            check(kernel, field, matrix, 1, 1, 256, 0);
        }
}

static void check_lengths(const gf256_kernel *kernel)
{
    static const unsigned COUNTS[] = {1, 2, 3, 4, 5, 12};
    uint8_t matrix[ROWS * COUNT_MAX];
    for (unsigned k = 0; k < COUNT_MAX; k++)
        for (size_t i = 0; i < sizeof given[k]; i++)
            given[k][i] = (uint8_t)(rand() >> 4);
    for (unsigned rows = 1; rows <= kernel->rows_max; rows++)
        for (size_t c = 0; c < sizeof COUNTS / sizeof COUNTS[0]; c++) {
            for (size_t i = 0; i < sizeof matrix; i++)
                matrix[i] = (uint8_t)(rand() >> 4);
            for (size_t length = 1; length < LENGTH_MAX; length += length < 258 ? 1 : 1937)
                check(kernel, (int)(length & 1), matrix, rows, COUNTS[c], length, (unsigned)length % 3);
            check(kernel, 0, matrix, rows, COUNTS[c], GF256_BLOCK_BYTES, 1);
        }
}

static void check_sums(const gf256_kernel *kernel)
{
    for (unsigned count = 1; kernel->add != NULL && count <= 4; count++)
        for (size_t length = 1; length < 300; length++) {
            const uint8_t *inputs[4];
            uint8_t *const out = made[0] + GUARD + 1;
            for (unsigned k = 0; k < count; k++)
                inputs[k] = given[k] + GUARD + k;
            memset(made[0], 0xA5, sizeof made[0]);
            kernel->add(count, inputs, out, 0, length);
            for (size_t i = 0; i < length + GUARD; i++) {
                uint8_t sum = i < length ? 0 : 0xA5;
                for (unsigned k = 0; i < length && k < count; k++)
                    sum ^= inputs[k][i];
                if (out[i] != sum || made[0][i % (GUARD + 1)] != 0xA5)
                    fail(kernel->name, "a wrong sum", 1, count, length);
            }
        }
}

/* Any t of the shares, here the last ones, give the secret back; the first t - 1 are random. */
static void check_splits(const gf256_kernel *kernel)
{
    static const unsigned SHARINGS[][2] = {{1, 2}, {2, 3}, {3, 5}, {3, 8}, {10, 16}, {128, 255}};
    static const size_t LENGTHS[] = {1, 16, 32, 255, 256, 257, 4096, 8999};
    for (size_t s = 0; s < sizeof SHARINGS / sizeof SHARINGS[0]; s++)
        for (size_t l = 0; l < sizeof LENGTHS / sizeof LENGTHS[0]; l++) {
            const unsigned t = SHARINGS[s][0], n = SHARINGS[s][1];
            const size_t length = LENGTHS[l];
            const gf256_field *field = gf256_field_of(POLYNOMIALS[l & 1]);
            uint8_t xs[255], *ys[255], *back = malloc(length);
            for (unsigned j = 0; j < n; j++) {
                xs[j] = (uint8_t)(j + 1);
                ys[j] = malloc(length);
            }
            if (gf256_split(kernel, gf256_generator_of(kernel), field, given[0], length, t, n, xs, ys))
                fail(kernel->name, "split failed", n, t, length);
            gf256_interpolate(kernel, field, xs + n - t, t, (const uint8_t *const *)ys + n - t, (const uint8_t[]){0}, 1,
                              &back, length);
            if (memcmp(back, given[0], length) != 0)
                fail(kernel->name, "the secret did not come back", n, t, length);
            for (unsigned j = 0; j < n; j++)
                free(ys[j]);
            free(back);
        }
}

int main(int argc, char **argv)
{
    gf256_init();
    srand(1);
    for (int field = 0; field < 2; field++)
        for (unsigned a = 0; a < 256; a++)
            for (unsigned b = 0; b < 256; b++)
                products[field][a][b] = slow_product(POLYNOMIALS[field], a, b);
    for (int i = 1; i < argc; i++) {
        const gf256_kernel *kernel;
        for (unsigned at = 0; (kernel = gf256_kernel_at(at)) != NULL; at++)
            if (strcmp(kernel->name, argv[i]) == 0)
                break;
        if (kernel == NULL) {
            fprintf(stderr, "no kernel %s here\n", argv[i]);
            return 2;
        }
        check_products(kernel);
        check_lengths(kernel);
        check_sums(kernel);
        check_splits(kernel);
        printf("%s\n", kernel->name);
    }
    return 0;
}
