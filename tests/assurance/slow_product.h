/* Owns the slow oracle of C programs: a product in the field, bit by bit as in its definition. */
#ifndef SLOW_PRODUCT_H
#define SLOW_PRODUCT_H

#include <stdint.h>

static inline uint8_t slow_product(unsigned polynomial, unsigned a, unsigned b)
{
    unsigned product = 0;
    for (unsigned bit = 8; bit-- > 0;) {
        product = product << 1 ^ (product >> 7 & 1) * polynomial;
        product ^= (b >> bit & 1) * a;
    }
    return (uint8_t)product;
}

#endif
