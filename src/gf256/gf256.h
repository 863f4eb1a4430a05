/*
 * GF(2^8) arithmetic for Shamir's secret sharing: the private header of the native core.
 *
 * Scheme: A. Shamir, "How to share a secret", CACM 22(11), 1979, byte by byte over GF(2^8) with the polynomial
 * x^8 + x^4 + x^3 + x + 1 (0x11B, the field of FIPS 197). The secret is the value at 0. All t - 1 coefficients are
 * uniform, a zero leading one included: forcing it to be non-zero leaks the secret over many sharings
 * (RUSTSEC-2024-0398).
 *
 * Words: a *scalar* is a public multiplier and depends on share indices alone; a *row* is `length` bytes of a secret, a
 * coefficient or a share and is secret.
 *
 * Constant time: no branch and no address depends on the contents of a row. Indices, scalars, counts and lengths are
 * public and may be branched on and looked up.
 */
#ifndef KEYQUORUM_GF256_H
#define KEYQUORUM_GF256_H

#include <stddef.h>
#include <stdint.h>

enum {
    GF256_SHARES_MAX = 255, /* the non-zero elements of the field; 0 is where the secret lies */
    GF256_BLOCK_BYTES = 4096 /* of each row at a time, so that the random rows stay in the first-level cache */
};

/*
 * The one operation that an instruction set has to offer: outputs = matrix * inputs.
 *
 *   outputs[o][i] = sum over k of matrix[o * input_count + k] * inputs[k][i],  0 <= i < length
 *
 * Public: matrix, counts, length, the addresses. Secret: the contents of inputs and outputs.
 * Rows need no alignment. Outputs overlap neither inputs nor each other. Exactly `length` bytes of each output are
 * written, nothing is read beyond a row, and length 0 and output_count 0 are allowed. input_count is 1..255.
 * Copies of rows that a kernel makes in memory are wiped before it returns.
 */
typedef void gf256_multiply_fn(const uint8_t *matrix, unsigned output_count, unsigned input_count,
                               const uint8_t *const *inputs, uint8_t *const *outputs, size_t length);

/* One per file gf256_<name>.c. They know nothing of CPUs: calling one that the CPU has not is a crash. */
gf256_multiply_fn gf256_multiply_portable;

typedef struct gf256_kernel {
    const char *name;
    int (*supported)(void); /* whether this CPU and operating system can run it */
    gf256_multiply_fn *multiply;
} gf256_kernel;

/* Builds the tables for public elements. Call once, before anything else here; calling it again is harmless. */
void gf256_init(void);

/* The kernels that this machine can run, fastest first, the portable one last; NULL beyond the end. */
const gf256_kernel *gf256_kernel_at(unsigned position);

/*
 * y_j = f(x_j) for a fresh random polynomial f of degree < threshold with f(0) = secret.
 *
 * Public: length, threshold, shares, xs. Secret: secret, ys. xs are distinct and non-zero, 1 <= threshold <= 255,
 * 1 <= shares <= 255 (the caller has checked); a threshold above shares is meaningless, but safe.
 * Returns 0, or an errno value when memory or the kernel's random generator fails; then all of ys is zero.
 */
int gf256_split(const gf256_kernel *kernel, const uint8_t *secret, size_t length, unsigned threshold, unsigned shares,
                const uint8_t *xs, uint8_t *const *ys);

/*
 * out = f(target) of the polynomial of degree < count through (xs[j], ys[j]), by Lagrange's formula.
 *
 * Public: xs, count, target, length. Secret: ys, out. xs are distinct (the caller has checked), 1 <= count <= 255.
 * Out overlaps no row of ys. It can't fail.
 */
void gf256_combine(const gf256_kernel *kernel, const uint8_t *xs, unsigned count, uint8_t target,
                   const uint8_t *const *ys, size_t length, uint8_t *out);

#endif
