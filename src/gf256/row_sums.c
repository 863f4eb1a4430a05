/*
 * Sums and dot products of rows, written so that a compiler turns the loops into vectors. It knows no CPU and no shares.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "row_sums.h"

#include <string.h>

enum { BLOCK_BYTES = 1024 }; /* at a time: stays in the first-level cache, however many rows there are */

void row_sum(const uint8_t *const *inputs, size_t count, size_t length, uint8_t *out)
{
    for (size_t offset = 0; offset < length; offset += BLOCK_BYTES) {
        const size_t block = length - offset < BLOCK_BYTES ? length - offset : BLOCK_BYTES;
        if (out != inputs[0])
            memcpy(out + offset, inputs[0] + offset, block);
        for (size_t k = 1; k < count; k++) {
            uint8_t *restrict sum = out + offset;
            const uint8_t *restrict row = inputs[k] + offset;
            for (size_t i = 0; i < block; i++)
                sum[i] ^= row[i];
        }
    }
}

/* sum[i] += a[i] * b[i], bit by bit of b: 0 - bit is a mask of all ones or none, so there is no branch and no table. */
static void add_products(uint8_t *restrict sum, const uint8_t *restrict a, const uint8_t *restrict b, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        uint8_t power = a[i], product = 0;
        for (unsigned bit = 0; bit < 8; bit++) {
            product ^= (uint8_t)(power & (uint8_t)(0 - (b[i] >> bit & 1)));
            power = (uint8_t)((uint8_t)(power << 1) ^ (0x1B & (uint8_t)(0 - (power >> 7))));
        }
        sum[i] ^= product;
    }
}

void row_dot(const uint8_t *row, size_t length, const uint8_t *const *weights, size_t count, uint8_t *out)
{
    uint8_t products[BLOCK_BYTES];
    for (size_t k = 0; k < count; k++) {
        memset(products, 0, sizeof products);
        for (size_t offset = 0; offset < length; offset += BLOCK_BYTES) {
            const size_t block = length - offset < BLOCK_BYTES ? length - offset : BLOCK_BYTES;
            add_products(products, row + offset, weights[k] + offset, block);
        }
        out[k] = 0;
        for (size_t i = 0; i < sizeof products; i++)
            out[k] ^= products[i];
    }
    explicit_bzero(products, sizeof products);
}
