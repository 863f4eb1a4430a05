/*
 * GF(2^8) arithmetic for Shamir's secret sharing: the private header of the native core.
 *
 * Scheme: A. Shamir, "How to share a secret", CACM 22(11), 1979, byte by byte over GF(2^8). The secret is the value at
 * 0. The shares at the first t - 1 indices are the random stream itself, the others are interpolated from them and the
 * secret; that is the same distribution as drawing all t - 1 coefficients uniformly, a zero leading one included
 * (docs/shamir.md has the proof; forcing it to be non-zero leaks the secret, RUSTSEC-2024-0398).
 *
 * Representation: a byte is a polynomial over GF(2), bit i the coefficient of x^i, modulo 0x11B (FIPS 197, Vault,
 * SLIP-39) or 0x11D (libgfshare, ISA-L).
 *
 * Words: a *scalar* is a public multiplier and depends on share indices alone; a *row* is `length` bytes of a secret or
 * a share and is secret.
 *
 * Constant time: no branch and no address depends on the contents of a row, a seed or a key stream. Indices, scalars,
 * counts and lengths are public and may be branched on and looked up.
 */
#ifndef KEYQUORUM_GF256_H
#define KEYQUORUM_GF256_H

#include <stddef.h>
#include <stdint.h>

enum {
    GF256_SHARES_MAX = 255,   /* the non-zero elements of the field; 0 is where the secret lies */
    GF256_BLOCK_BYTES = 4096, /* of each row at a time, so that rows which are read again are in the first-level cache */
    GF256_SEED_BYTES = 32,    /* of the generator: a 256-bit key */
    GF256_SMALL_BYTES = 512,  /* of random rows: so few are drawn in one piece */
    GF256_PREPARED_SCALARS = 16,
    GF256_SCALAR_BYTES_MAX = 32 /* of any kernel's list for each scalar */
};

/* For short loops over public bytes, which gcc would turn into long vector code that costs more than it saves. */
#if defined(__GNUC__) && !defined(__clang__)
#define GF256_NO_VECTORS __attribute__((optimize("no-tree-vectorize")))
#else
#define GF256_NO_VECTORS
#endif

/* Everything that multiplication by a *public* scalar needs. A row is never looked up in it. */
typedef struct gf256_field {
    unsigned polynomial;      /* 0x11B or 0x11D */
    uint8_t power[768];       /* of the generator; three periods, so that a sum of three logarithms needs no reduction */
    uint8_t logarithm[256];   /* to the base of the generator; that of 0 is meaningless */
    uint64_t affine[256];     /* multiplication as a bit matrix, in the layout of gf2p8affineqb */
    uint8_t nibbles[256][32]; /* products with 0x00..0x0F, then with 0x00, 0x10 .. 0xF0, for pshufb and tbl */
} gf256_field;

/*
 * What an instruction set has to offer: outputs = matrix * inputs for a few outputs at a time,
 *
 *   outputs[o][i] = sum over k of matrix[o * count + k] * inputs[k][i],  offset <= i < length
 *
 * in two steps: `list` writes what the loops need of each scalar, in their order, and `run` does the work, any number of
 * times. `add` is the sum of 1..4 inputs alone, offset <= i < length; it is NULL where that is no quicker than a product.
 *
 * Public: field, matrix, list, counts, offset, length, the addresses. Secret: the contents of inputs and outputs.
 * Rows need no alignment. Outputs overlap neither inputs nor each other. 1 <= rows <= rows_max, 1 <= count <= 255,
 * offset < length. No byte of an output from `length` on is written and none of an input read; those before `offset`
 * are valid, and a kernel may compute them again. With `bypass` the outputs are too large for the caches and a kernel may
 * write around them; outputs + offset then lie on vectors. Copies of rows that a kernel makes in memory are wiped.
 */
typedef void gf256_list_fn(void *list, const gf256_field *field, const uint8_t *matrix, unsigned rows, unsigned count);
typedef void gf256_run_fn(const void *list, unsigned rows, unsigned count, const uint8_t *const *inputs,
                          uint8_t *const *outputs, size_t offset, size_t length, int bypass);
typedef void gf256_add_fn(unsigned count, const uint8_t *const *inputs, uint8_t *output, size_t offset, size_t length);

typedef struct gf256_kernel {
    const char *name;
    int (*supported)(void); /* whether this CPU and operating system can run it */
    unsigned rows_max;      /* outputs at a time */
    unsigned scalar_bytes;  /* of the list for each scalar */
    unsigned vector_bytes;  /* what bypass aligns to */
    unsigned block_bytes;   /* of each row at a time while random rows are drawn: small, where that is quick */
    gf256_list_fn *list;
    gf256_run_fn *run;
    gf256_add_fn *add;
    const char *generators; /* names of those that fit it, best first, each ended by a space */
} gf256_kernel;

/* One set per file gf256_<name>.c. They know nothing of CPUs: calling one that the CPU has not is a crash. */
#define GF256_DECLARE(name)                                                                                           \
    gf256_list_fn gf256_list_##name;                                                                                  \
    gf256_run_fn gf256_run_##name;                                                                                    \
    gf256_add_fn gf256_add_##name
GF256_DECLARE(gfni512);
GF256_DECLARE(gfni256);
GF256_DECLARE(avx2);
GF256_DECLARE(neon);
GF256_DECLARE(portable);

/*
 * Whether 2..4 rows of gf256_list_gfni512's list for 3 inputs are those of the shares 3, 4 .. from the secret and the
 * shares 1 and 2, which takes one product instead of up to four: row 0 is the sum of all inputs, row 2 is row 1 plus the
 * inputs 0 and 1, and row 3 is row 1 plus the inputs 0 and 2 (docs/shamir.md says why).
 */
int gf256_are_sums(const uint64_t *scalars, unsigned rows);

/* A cipher in counter mode under a key that is used for one call and then wiped: a generator without kept state. */
typedef struct gf256_stream {
    _Alignas(64) uint8_t keys[15 * 16]; /* AES-256: the round keys. ChaCha20: the key. Secret. */
    uint64_t block;                     /* number of the next cipher block (16 bytes; ChaCha20: 64). Public. */
} gf256_stream;

/*
 * A generator of random rows. `start` expands a seed of GF256_SEED_BYTES; `fill` writes the next `length` bytes and then
 * skips the rest of the last cipher block. AES-256-CTR (SP 800-38A) starts at the counter block 0; ChaCha20 (RFC 8439)
 * at block 0 with the nonce 0. The caller wipes the stream.
 */
typedef struct gf256_generator {
    const char *name;
    int (*supported)(void);
    void (*start)(gf256_stream *stream, const uint8_t *seed);
    void (*fill)(gf256_stream *stream, uint8_t *out, size_t length);
} gf256_generator;

/*
 * Fills random rows and multiplies them in one go, as far as whole steps go, from the front of the rows on: the number of
 * bytes done, which is 0 for counts that it has no loop for. `list` is of gf256_list_gfni512 for one group of `rows`;
 * inputs are the secret and the `count` - 1 random rows.
 */
size_t gf256_draw_vaes512(const void *list, unsigned rows, unsigned count, const uint8_t *secret,
                          uint8_t *const *randoms, uint8_t *const *outputs, gf256_stream *stream, size_t length);

void gf256_aes_start(gf256_stream *stream, const uint8_t *seed);
void gf256_aes_fill_vaes512(gf256_stream *stream, uint8_t *out, size_t length);
void gf256_aes_fill_vaes256(gf256_stream *stream, uint8_t *out, size_t length);
void gf256_aes_fill_aesni(gf256_stream *stream, uint8_t *out, size_t length);
void gf256_chacha20_start(gf256_stream *stream, const uint8_t *seed);
void gf256_chacha20_fill(gf256_stream *stream, uint8_t *out, size_t length);

/* Builds the tables for public elements. Call once, before anything else here; calling it again is harmless. */
void gf256_init(void);

/* The field of a polynomial, 0x11B or 0x11D; NULL for any other. */
const gf256_field *gf256_field_of(unsigned polynomial);

/* The kernels that this machine can run, fastest first, the portable one last; NULL beyond the end. */
const gf256_kernel *gf256_kernel_at(unsigned position);

/* The generators that this machine can run, fastest first, ChaCha20 last; NULL beyond the end. */
const gf256_generator *gf256_generator_at(unsigned position);

/* The best generator for a kernel; never NULL. */
const gf256_generator *gf256_generator_of(const gf256_kernel *kernel);

/*
 * outs[o] = f(targets[o]) of the polynomial f of degree < count through (xs[j], ys[j]), by Lagrange's formula.
 *
 * Public: xs, count, targets, target_count, length. Secret: ys, outs. xs are distinct (the caller has checked),
 * 1 <= count <= 255. No row of outs overlaps another row. It can't fail.
 */
void gf256_interpolate(const gf256_kernel *kernel, const gf256_field *field, const uint8_t *xs, unsigned count,
                       const uint8_t *const *ys, const uint8_t *targets, unsigned target_count, uint8_t *const *outs,
                       size_t length);

/*
 * What an interpolation at few indices needs besides its rows, ready for one kernel: all of it is public, and depends on
 * kernel, field, xs and targets alone. So it can be kept for other rows of the same.
 */
typedef struct gf256_prepared {
    const gf256_kernel *kernel; /* NULL: nothing is ready */
    unsigned rows, count;
    size_t length_max;
    _Alignas(64) uint8_t list[GF256_PREPARED_SCALARS * GF256_SCALAR_BYTES_MAX];
} gf256_prepared;

/* As gf256_interpolate in two steps, for length <= length_max. 0, and nothing is ready: these are too many for it. */
int gf256_prepare(gf256_prepared *prepared, const gf256_kernel *kernel, const gf256_field *field, const uint8_t *xs,
                  unsigned count, const uint8_t *targets, unsigned target_count);
void gf256_apply(const gf256_prepared *prepared, const uint8_t *const *ys, uint8_t *const *outs, size_t length);

/*
 * As gf256_split, with what was prepared for the values at 0 (the secret) and the first count - 1 of the shares' indices,
 * at all others. 2 <= count, (count - 1) * length <= GF256_SMALL_BYTES, length <= length_max.
 */
int gf256_split_prepared(const gf256_prepared *prepared, const gf256_generator *generator, const uint8_t *secret,
                         size_t length, uint8_t *const *ys);

/*
 * y_j = f(x_j) for a fresh random polynomial f of degree < threshold with f(0) = secret.
 *
 * Public: length, threshold, shares, xs. Secret: secret, ys. xs are distinct and non-zero,
 * 1 <= threshold <= shares <= 255 (the caller has checked); the rows of ys and secret are apart from each other.
 * Returns 0, or an errno value when the system's random generator fails; then all of ys is zero.
 */
int gf256_split(const gf256_kernel *kernel, const gf256_generator *generator, const gf256_field *field,
                const uint8_t *secret, size_t length, unsigned threshold, unsigned shares, const uint8_t *xs,
                uint8_t *const *ys);

#endif
