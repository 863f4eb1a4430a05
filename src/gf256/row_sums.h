/*
 * Sums of whole rows and dot products of rows, for what is done on shares: refresh, recovery and error correction.
 *
 * The field, the words *row* and *secret* and the constant-time claim are those of gf256.h: neither a branch nor an
 * address depends on the contents of a row or of a weight. Counts and lengths are public. Nothing here can fail.
 */
#ifndef KEYQUORUM_ROW_SUMS_H
#define KEYQUORUM_ROW_SUMS_H

#include <stddef.h>
#include <stdint.h>

enum { ROW_SUMS_WEIGHTS_MAX = 32 }; /* weights of one call of row_dot */

/* out[i] = inputs[0][i] + ... + inputs[count - 1][i], 0 <= i < length. Out may be inputs[0], and overlaps no other. */
void row_sum(const uint8_t *const *inputs, size_t count, size_t length, uint8_t *out);

/* out[k] = sum over i of row[i] * weights[k][i], 0 <= k < count, over 0x11B. Row and weights are secret. */
void row_dot(const uint8_t *row, size_t length, const uint8_t *const *weights, size_t count, uint8_t *out);

#endif
