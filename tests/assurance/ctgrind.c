/*
 * Owns the proof by valgrind that no branch and no address depends on a secret ("ctgrind", A. Langley): secrets, shares
 * and seeds are marked as undefined memory, and memcheck reports every decision that is taken on them.
 *
 *   valgrind --error-exitcode=9 ctgrind kernel KERNEL|stream GENERATOR|split KERNEL GENERATOR|sums|memory|leaks
 *
 * It also compares each result with a slow one, so that emulated instructions are known to be right ones.
 */
#define _GNU_SOURCE
#include "gf256.h"
#include "row_sums.h"
#include "secret_arena.h"
#include "slow_product.h"
#include "table_kernel.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <valgrind/memcheck.h>

static const gf256_kernel TABLE = {
    .name = "table", .rows_max = 4, .scalar_bytes = 1, .block_bytes = 512, .list = table_list, .run = table_run};

#ifdef EMULATED
/* valgrind's CPU has none of these, so the dispatcher does not offer them. */
static const gf256_kernel KERNELS[] = {
    {.name = "gfni512", .rows_max = 8, .scalar_bytes = 8, .vector_bytes = 64, .block_bytes = 1024,
     .list = gf256_list_gfni512, .run = gf256_run_gfni512},
    {.name = "gfni256", .rows_max = 5, .scalar_bytes = 8, .vector_bytes = 32, .block_bytes = 512,
     .list = gf256_list_gfni256, .run = gf256_run_gfni256},
};
static const gf256_generator GENERATORS[] = {
    {.name = "aes256ctr-vaes512", .start = gf256_aes_start, .fill = gf256_aes_fill_vaes512},
    {.name = "aes256ctr-vaes256", .start = gf256_aes_start, .fill = gf256_aes_fill_vaes256},
};
#else
static const gf256_kernel KERNELS[] = {{.name = ""}};
static const gf256_generator GENERATORS[] = {{.name = ""}};
#endif

static const gf256_kernel *kernel_of(const char *name)
{
    const gf256_kernel *kernel;
    if (strcmp(name, "table") == 0)
        return &TABLE;
    for (size_t i = 0; i < sizeof KERNELS / sizeof KERNELS[0]; i++)
        if (strcmp(KERNELS[i].name, name) == 0)
            return &KERNELS[i];
    for (unsigned i = 0; (kernel = gf256_kernel_at(i)) != NULL; i++)
        if (strcmp(kernel->name, name) == 0)
            return kernel;
    fprintf(stderr, "no kernel %s here\n", name);
    exit(2);
}

static const gf256_generator *generator_of(const char *name)
{
    const gf256_generator *generator;
    for (size_t i = 0; i < sizeof GENERATORS / sizeof GENERATORS[0]; i++)
        if (strcmp(GENERATORS[i].name, name) == 0)
            return &GENERATORS[i];
    for (unsigned i = 0; (generator = gf256_generator_at(i)) != NULL; i++)
        if (strcmp(generator->name, name) == 0)
            return generator;
    fprintf(stderr, "no generator %s here\n", name);
    exit(2);
}

static void hide(const void *bytes, size_t length)
{
    (void)VALGRIND_MAKE_MEM_UNDEFINED(bytes, length);
}

static void show(const void *bytes, size_t length)
{
    (void)VALGRIND_MAKE_MEM_DEFINED(bytes, length);
}

static void expect(int right, const char *what, const char *of)
{
    show(&right, sizeof right);
    if (!right) {
        fprintf(stderr, "%s: %s\n", of, what);
        exit(1);
    }
}

/* The dispatcher's own call of it: seeds are secret, too. */
ssize_t getrandom(void *buffer, size_t length, unsigned flags)
{
    (void)flags;
    for (size_t i = 0; i < length; i++)
        ((uint8_t *)buffer)[i] = (uint8_t)rand();
    hide(buffer, length);
    return (ssize_t)length;
}

static uint8_t *secret_row(size_t length)
{
    uint8_t *row = malloc(length);
    for (size_t i = 0; i < length; i++)
        row[i] = (uint8_t)rand();
    hide(row, length);
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
        show(inputs[k], length);
    for (unsigned r = 0; r < rows; r++) {
        show(outputs[r], length);
        for (size_t i = 0; i < length; i++) {
            uint8_t sum = 0;
            for (unsigned k = 0; k < count; k++)
                sum ^= slow_product(polynomial, matrix[r * count + k], inputs[k][i]);
            expect(sum == outputs[r][i], "a wrong product", kernel->name);
        }
        free(outputs[r]);
    }
    for (unsigned k = 0; k < count; k++)
        free(inputs[k]);
    free(list);
}

static void check_split(const gf256_kernel *kernel, const gf256_generator *generator, unsigned threshold,
                        unsigned shares, size_t length)
{
    uint8_t *secret = secret_row(length), *ys[255], *back = malloc(length), xs[255];
    const gf256_field *field = gf256_field_of(0x11B);
    for (unsigned j = 0; j < shares; j++) {
        ys[j] = malloc(length);
        xs[j] = (uint8_t)(j + 1);
    }
    expect(gf256_split(kernel, generator, field, secret, length, threshold, shares, xs, ys) == 0, "error", "split");
    gf256_interpolate(kernel, field, xs + shares - threshold, threshold,
                      (const uint8_t *const *)ys + shares - threshold, (const uint8_t[]){0}, 1, &back, length);
    show(back, length);
    show(secret, length);
    expect(memcmp(back, secret, length) == 0, "the secret did not come back", kernel->name);
    for (unsigned j = 0; j < shares; j++)
        free(ys[j]);
    free(secret);
    free(back);
}

/* Against AES-NI, which valgrind knows itself; that one and ChaCha20 have known answers in the suite. */
static void check_stream(const gf256_generator *generator, const gf256_generator *other)
{
    uint8_t seed[GF256_SEED_BYTES], out[1500], expected[1500];
    gf256_stream stream, reference;
    getrandom(seed, sizeof seed, 0);
    generator->start(&stream, seed);
    other->start(&reference, seed);
    for (size_t length = 1; length < sizeof out; length += 77) {
        generator->fill(&stream, out, length);
        other->fill(&reference, expected, length);
        show(out, length);
        show(expected, length);
        expect(memcmp(out, expected, length) == 0, "another stream than that of AES-NI", generator->name);
    }
}

/* What refresh, recovery and error correction do with shares. */
static void check_sums(size_t length, unsigned count)
{
    uint8_t *rows[9], *sum = malloc(length), products[8];
    for (unsigned k = 0; k <= count; k++)
        rows[k] = secret_row(length);
    row_sum((const uint8_t *const *)rows, count + 1, length, sum);
    row_dot(rows[0], length, (const uint8_t *const *)rows + 1, count, products);
    for (unsigned k = 0; k <= count; k++)
        show(rows[k], length);
    show(sum, length);
    show(products, count);
    for (size_t i = 0; i < length; i++) {
        uint8_t expected = 0;
        for (unsigned k = 0; k <= count; k++)
            expected ^= rows[k][i];
        expect(sum[i] == expected, "a wrong sum", "row_sum");
    }
    for (unsigned k = 0; k < count; k++) {
        uint8_t expected = 0;
        for (size_t i = 0; i < length; i++)
            expected ^= slow_product(0x11B, rows[0][i], rows[k + 1][i]);
        expect(products[k] == expected, "a wrong product", "row_dot");
    }
    for (unsigned k = 0; k <= count; k++)
        free(rows[k]);
    free(sum);
}

/* Only the answer of a comparison is public. */
static void check_memory(size_t length)
{
    const char *failed_call;
    secret_piece piece;
    uint8_t *other = secret_row(length);
    expect(secret_allocate(length, &piece, &failed_call) == 0, "no memory", "secret_allocate");
    expect(secret_random(piece.bytes, length) == 0, "error", "secret_random");
    memcpy(other, piece.bytes, length);
    expect(secret_equal(piece.bytes, other, length) == 1, "equal bytes differ", "secret_equal");
    other[length - 1] ^= 1;
    expect(secret_equal(piece.bytes, other, length) == 0, "different bytes are equal", "secret_equal");
    secret_wipe(other, length);
    secret_release(&piece);
    free(other);
}

int main(int argc, char **argv)
{
    static const size_t LENGTHS[] = {1, 5, 31, 32, 33, 63, 64, 65, 130, 257, 700, 4099};
    static const unsigned COUNTS[] = {1, 2, 3, 5, 10};
    enum { LENGTH_COUNT = sizeof LENGTHS / sizeof LENGTHS[0], COUNT_COUNT = sizeof COUNTS / sizeof COUNTS[0] };
    const char *const what = argc > 1 ? argv[1] : "";
    gf256_init();
    srand(1);
    if (argc == 4 && strcmp(what, "split") == 0) {
        static const unsigned SHARINGS[][2] = {{2, 2}, {2, 3}, {2, 4}, {2, 5}, {3, 3},
                                               {3, 4}, {3, 5}, {3, 6}, {10, 16}};
        for (size_t i = 0; i < LENGTH_COUNT; i++)
            for (size_t j = 0; j < sizeof SHARINGS / sizeof SHARINGS[0]; j++)
                check_split(kernel_of(argv[2]), generator_of(argv[3]), SHARINGS[j][0], SHARINGS[j][1], LENGTHS[i]);
    } else if (argc == 3 && strcmp(what, "stream") == 0) {
        const gf256_generator *generator = generator_of(argv[2]);
        check_stream(generator, strncmp(argv[2], "aes", 3) == 0 ? generator_of("aes256ctr-aesni") : generator);
    } else if (argc == 3 && strcmp(what, "kernel") == 0) {
        const gf256_kernel *kernel = kernel_of(argv[2]);
        for (size_t i = 0; i < LENGTH_COUNT; i++)
            for (size_t j = 0; j < COUNT_COUNT; j++)
                for (unsigned rows = 1; rows <= kernel->rows_max; rows++)
                    check_kernel(kernel, rows % 2 ? 0x11B : 0x11D, rows, COUNTS[j], LENGTHS[i]);
    } else if (argc == 2 && strcmp(what, "sums") == 0) {
        for (size_t i = 0; i < LENGTH_COUNT; i++)
            for (unsigned count = 1; count < 9; count += 3)
                check_sums(LENGTHS[i], count);
    } else if (argc == 2 && strcmp(what, "memory") == 0) {
        for (size_t i = 0; i < LENGTH_COUNT; i++)
            check_memory(LENGTHS[i]);
        check_memory(SECRET_SMALL_BYTES + 1);
    } else if (argc == 2 && strcmp(what, "leaks") == 0) { /* the control of `memory`: it stops at the first difference */
        const uint8_t *const a = secret_row(32), *const b = secret_row(32);
        expect(memcmp(a, b, 32) != 0, "equal", "leaks");
    } else {
        return 2;
    }
    return 0;
}
