/*
 * Owns a kernel that leaks: it looks secret bytes up in a table, as many libraries do. Every check of constant time runs
 * it as the control that must be found out. It is no part of the package.
 */
#ifndef TABLE_KERNEL_H
#define TABLE_KERNEL_H

#include "gf256.h"

#include <string.h>

static uint8_t leaking_products[256][256];

static void table_list(void *list, const gf256_field *field, const uint8_t *matrix, unsigned rows, unsigned count)
{
    for (unsigned a = 0; a < 256; a++)
        for (unsigned b = 0; b < 256; b++)
            leaking_products[a][b] = field->nibbles[a][b & 15] ^ field->nibbles[a][16 + (b >> 4)];
    memcpy(list, matrix, (size_t)rows * count);
}

static void table_run(const void *list, unsigned rows, unsigned count, const uint8_t *const *inputs,
                      uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    const uint8_t *const matrix = list;
    (void)bypass;
    for (unsigned r = 0; r < rows; r++)
        for (size_t i = offset; i < length; i++) {
            uint8_t sum = 0;
            for (unsigned k = 0; k < count; k++)
                sum ^= leaking_products[matrix[r * count + k]][inputs[k][i]];
            outputs[r][i] = sum;
        }
}

#endif
