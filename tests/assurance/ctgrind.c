/*
 * Owns the proof by valgrind that no branch and no address depends on a secret ("ctgrind", A. Langley): secrets, shares
 * and seeds are marked as undefined memory, and memcheck reports every decision that is taken on them.
 *
 *   valgrind --error-exitcode=9 ctgrind KERNEL|stream GENERATOR|split KERNEL
 *
 * It also compares each product with a slow one, bit by bit, so that emulated kernels are known to be right ones.
 */
#define _GNU_SOURCE
#include "gf256.h"
#include "table_kernel.h"

#include <stdio.h>
#include <stdlib.h>
#include <valgrind/memcheck.h>

static const gf256_kernel TABLE = {"table", NULL, 4, 1, 16, 512, table_list, table_run, NULL, ""};
#ifdef GF256_EMULATE_GFNI
static const gf256_kernel GFNI512 = {"gfni512", NULL, 8, 8, 64, 512, gf256_list_gfni512, gf256_run_gfni512, NULL, ""};
static const gf256_kernel GFNI256 = {"gfni256", NULL, 5, 8, 32, 512, gf256_list_gfni256, gf256_run_gfni256, NULL, ""};
#endif

static const gf256_kernel *kernel_of(const char *name)
{
    const gf256_kernel *kernel;
    if (strcmp(name, "table") == 0)
        return &TABLE;
#ifdef GF256_EMULATE_GFNI
    if (strcmp(name, "gfni512") == 0)
        return &GFNI512;
    if (strcmp(name, "gfni256") == 0)
        return &GFNI256;
#endif
    for (unsigned i = 0; (kernel = gf256_kernel_at(i)) != NULL; i++)
        if (strcmp(kernel->name, name) == 0)
            return kernel;
    fprintf(stderr, "no kernel %s here\n", name);
    exit(2);
}

/* The dispatcher's own call of it: seeds are secret, too. */
ssize_t getrandom(void *buffer, size_t length, unsigned flags)
{
    (void)flags;
    for (size_t i = 0; i < length; i++)
        ((uint8_t *)buffer)[i] = (uint8_t)rand();
    (void)VALGRIND_MAKE_MEM_UNDEFINED(buffer, length);
    return (ssize_t)length;
}

static uint8_t slow_product(unsigned polynomial, unsigned a, unsigned b)
{
    unsigned product = 0;
    for (unsigned bit = 8; bit-- > 0;) {
        product = product << 1 ^ (product >> 7 & 1) * polynomial;
        product ^= (b >> bit & 1) * a;
    }
    return (uint8_t)product;
}

static uint8_t *secret_row(size_t length)
{
    uint8_t *row = malloc(length);
    for (size_t i = 0; i < length; i++)
        row[i] = (uint8_t)rand();
    (void)VALGRIND_MAKE_MEM_UNDEFINED(row, length);
    return row;
}

static void check_kernel(const gf256_kernel *kernel, unsigned polynomial, unsigned rows, unsigned count, size_t length)
{
    const gf256_field *field = gf256_field_of(polynomial);
    uint8_t *inputs[16], *outputs[8], matrix[8 * 16], *list = malloc((size_t)rows * count * kernel->scalar_bytes + 64);
    for (unsigned i = 0; i < rows * count; i++)
        matrix[i] = (uint8_t)rand();
    for (unsigned k = 0; k < count; k++)
        inputs[k] = secret_row(length);
    for (unsigned r = 0; r < rows; r++)
        outputs[r] = malloc(length);
    kernel->list(list, field, matrix, rows, count);
    kernel->run(list, rows, count, (const uint8_t *const *)inputs, outputs, 0, length, 0);
    for (unsigned k = 0; k < count; k++)
        (void)VALGRIND_MAKE_MEM_DEFINED(inputs[k], length);
    for (unsigned r = 0; r < rows; r++) {
        (void)VALGRIND_MAKE_MEM_DEFINED(outputs[r], length);
        for (size_t i = 0; i < length; i++) {
            uint8_t sum = 0;
            for (unsigned k = 0; k < count; k++)
                sum ^= slow_product(polynomial, matrix[r * count + k], inputs[k][i]);
            if (sum != outputs[r][i]) {
                fprintf(stderr, "%s is wrong: %u x %u, length %zu, at %zu\n", kernel->name, rows, count, length, i);
                exit(1);
            }
        }
        free(outputs[r]);
    }
    for (unsigned k = 0; k < count; k++)
        free(inputs[k]);
    free(list);
}

static void check_split(const gf256_kernel *kernel, unsigned threshold, unsigned shares, size_t length)
{
    uint8_t *secret = secret_row(length), *ys[255], *back = malloc(length), xs[255];
    for (unsigned j = 0; j < shares; j++) {
        ys[j] = malloc(length);
        xs[j] = (uint8_t)(j + 1);
    }
    if (gf256_split(kernel, gf256_generator_of(kernel), gf256_field_of(0x11B), secret, length, threshold, shares, xs, ys))
        exit(1);
    gf256_interpolate(kernel, gf256_field_of(0x11B), xs + shares - threshold, threshold,
                      (const uint8_t *const *)ys + shares - threshold, (const uint8_t[]){0}, 1, &back, length);
    (void)VALGRIND_MAKE_MEM_DEFINED(back, length);
    (void)VALGRIND_MAKE_MEM_DEFINED(secret, length);
    if (memcmp(back, secret, length) != 0) {
        fprintf(stderr, "%s: the secret did not come back\n", kernel->name);
        exit(1);
    }
    for (unsigned j = 0; j < shares; j++)
        free(ys[j]);
    free(secret);
    free(back);
}

int main(int argc, char **argv)
{
    static const size_t LENGTHS[] = {1, 5, 31, 32, 33, 63, 64, 65, 130, 257, 700, 4099};
    static const unsigned COUNTS[] = {1, 2, 3, 5, 10};
    gf256_init();
    srand(1);
    if (argc == 3 && strcmp(argv[1], "split") == 0) {
        for (size_t i = 0; i < sizeof LENGTHS / sizeof LENGTHS[0]; i++) {
            check_split(kernel_of(argv[2]), 2, 3, LENGTHS[i]);
            check_split(kernel_of(argv[2]), 3, 5, LENGTHS[i]);
            check_split(kernel_of(argv[2]), 10, 16, LENGTHS[i]);
        }
    } else if (argc == 3 && strcmp(argv[1], "stream") == 0) {
        const gf256_generator *generator;
        uint8_t seed[GF256_SEED_BYTES], out[1000];
        gf256_stream stream;
        for (unsigned i = 0; (generator = gf256_generator_at(i)) != NULL; i++)
            if (strcmp(generator->name, argv[2]) == 0)
                break;
        if (generator == NULL)
            return 2;
        getrandom(seed, sizeof seed, 0);
        generator->start(&stream, seed);
        for (size_t length = 1; length < sizeof out; length += 77)
            generator->fill(&stream, out, length);
    } else if (argc == 2) {
        const gf256_kernel *kernel = kernel_of(argv[1]);
        for (size_t i = 0; i < sizeof LENGTHS / sizeof LENGTHS[0]; i++)
            for (size_t j = 0; j < sizeof COUNTS / sizeof COUNTS[0]; j++)
                for (unsigned rows = 1; rows <= kernel->rows_max; rows++)
                    check_kernel(kernel, rows % 2 ? 0x11B : 0x11D, rows, COUNTS[j], LENGTHS[i]);
    } else {
        return 2;
    }
    return 0;
}
