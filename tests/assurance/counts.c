/*
 * Owns fixed pieces of work whose instructions callgrind counts: the same number on every run of one build.
 *
 *   valgrind --tool=callgrind --toggle-collect=counted counts KERNEL LENGTH
 */
#define _GNU_SOURCE
#include "gf256.h"

#include <stdlib.h>
#include <string.h>

__attribute__((noinline)) void counted(const gf256_kernel *kernel, uint8_t **rows, size_t length)
{
    static const uint8_t XS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, TARGETS[] = {10, 11, 12, 13, 14, 15, 16};
    const gf256_field *field = gf256_field_of(0x11B);
    const uint8_t *const *inputs = (const uint8_t *const *)rows;
    gf256_interpolate(kernel, field, XS, 3, inputs, XS + 3, 3, rows + 10, length);   /* 3-of-5 */
    gf256_interpolate(kernel, field, XS + 3, 3, inputs, XS, 1, rows + 10, length);   /* a combine of 3 */
    gf256_interpolate(kernel, field, XS, 10, inputs, TARGETS, 7, rows + 10, length); /* 10-of-16 */
}

int main(int argc, char **argv)
{
    uint8_t *rows[17];
    const gf256_kernel *kernel;
    const size_t length = argc == 3 ? (size_t)atoi(argv[2]) : 0;
    if (length == 0)
        return 2;
    gf256_init();
    for (unsigned i = 0; (kernel = gf256_kernel_at(i)) != NULL; i++)
        if (strcmp(kernel->name, argv[1]) == 0)
            break;
    if (kernel == NULL)
        return 2;
    for (int i = 0; i < 17; i++)
        rows[i] = aligned_alloc(64, (length + 63) / 64 * 64);
    counted(kernel, rows, length);
    return 0;
}
