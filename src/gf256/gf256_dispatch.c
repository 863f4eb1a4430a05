/*
 * The choice of a kernel and a generator, and split and interpolation on top of any: the only file that knows about
 * CPUs and the system's randomness.
 *
 * It knows nothing of Python. A new instruction set is one file gf256_<name>.c, one line in gf256.h and one line in
 * KERNELS with its test of the CPU.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <sys/types.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

static int always(void)
{
    return 1;
}

#if defined(__x86_64__)
/*
 * gcc's run-time test says whether the operating system saves the vector registers only with the flags of their width;
 * GFNI, AES and VAES alone it sets even where they don't. So each test asks for the width too.
 */
static int has_gfni512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("gfni");
}

static int has_gfni256(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("gfni");
}

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") != 0;
}

static int has_aesni(void)
{
    return __builtin_cpu_supports("aes") && __builtin_cpu_supports("ssse3");
}

static int has_vaes256(void)
{
    return has_aesni() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vaes");
}

static int has_vaes512(void)
{
    return has_vaes256() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
#endif

/* A recipe takes 2 bytes of remainder and top, 16 of ends and 8 for each scalar; 32 are enough for one scalar too. */
enum { PORTABLE_SCALAR_BYTES = 32 };
_Static_assert(PORTABLE_SCALAR_BYTES <= GF256_SCALAR_BYTES_MAX, "a prepared list has room for any kernel's");

/* Fastest first; the portable one is last and runs everywhere. */
static const gf256_kernel KERNELS[] = {
#if defined(__x86_64__)
    {"gfni512", has_gfni512, 8, 8, 64, 1024, gf256_list_gfni512, gf256_run_gfni512, NULL,
     "aes256ctr-vaes512 aes256ctr-vaes256 aes256ctr-aesni "},
    {"gfni256", has_gfni256, 5, 8, 32, 512, gf256_list_gfni256, gf256_run_gfni256, NULL,
     "aes256ctr-vaes256 aes256ctr-aesni "},
    {"avx2", has_avx2, 4, 32, 32, 1024, gf256_list_avx2, gf256_run_avx2, gf256_add_avx2,
     "aes256ctr-vaes256 aes256ctr-aesni "},
#elif defined(__aarch64__)
    {"neon", always, 4, 32, 16, 1024, gf256_list_neon, gf256_run_neon, gf256_add_neon, ""},
#endif
    {"portable", always, 1, PORTABLE_SCALAR_BYTES, 16, 4096, gf256_list_portable, gf256_run_portable,
     gf256_add_portable, ""},
};

/* As above. ChaCha20 serves every kernel for which nothing better is there. */
static const gf256_generator GENERATORS[] = {
#if defined(__x86_64__)
    {"aes256ctr-vaes512", has_vaes512, gf256_aes_start, gf256_aes_fill_vaes512},
    {"aes256ctr-vaes256", has_vaes256, gf256_aes_start, gf256_aes_fill_vaes256},
    {"aes256ctr-aesni", has_aesni, gf256_aes_start, gf256_aes_fill_aesni},
#endif
    {"chacha20", always, gf256_chacha20_start, gf256_chacha20_fill},
};

enum { KERNEL_COUNT = sizeof KERNELS / sizeof KERNELS[0], GENERATOR_COUNT = sizeof GENERATORS / sizeof GENERATORS[0] };

const gf256_kernel *gf256_kernel_at(unsigned position)
{
    for (size_t i = 0; i < KERNEL_COUNT; i++)
        if (KERNELS[i].supported() && position-- == 0)
            return &KERNELS[i];
    return NULL;
}

const gf256_generator *gf256_generator_at(unsigned position)
{
    for (size_t i = 0; i < GENERATOR_COUNT; i++)
        if (GENERATORS[i].supported() && position-- == 0)
            return &GENERATORS[i];
    return NULL;
}

const gf256_generator *gf256_generator_of(const gf256_kernel *kernel)
{
    for (size_t i = 0; i < GENERATOR_COUNT; i++) {
        const char *found = strstr(kernel->generators, GENERATORS[i].name);
        if (found != NULL && found[strlen(GENERATORS[i].name)] == ' ' && GENERATORS[i].supported())
            return &GENERATORS[i];
    }
    return &GENERATORS[GENERATOR_COUNT - 1];
}

/* --- the tables of public elements --------------------------------------------------------------------------------- */

static gf256_field fields[] = {{.polynomial = 0x11B}, {.polynomial = 0x11D}};

static unsigned doubled(const gf256_field *field, unsigned element)
{
    return element & 0x80 ? element << 1 ^ field->polynomial : element << 1;
}

static void write_field(gf256_field *field)
{
    unsigned element = 1;
    for (unsigned exponent = 0; exponent < 768; exponent++) {
        field->power[exponent] = (uint8_t)element;
        if (exponent < 255)
            field->logarithm[element] = (uint8_t)exponent;
        element = field->polynomial == 0x11B ? element ^ doubled(field, element) : doubled(field, element); /* 3 or 2 */
    }
    for (unsigned scalar = 0; scalar < 256; scalar++) {
        uint8_t multiple[8]; /* scalar * 2^bit */
        uint64_t matrix = 0;
        multiple[0] = (uint8_t)scalar;
        for (unsigned bit = 1; bit < 8; bit++)
            multiple[bit] = (uint8_t)doubled(field, multiple[bit - 1]);
        /* Byte 7 - i of gf2p8affineqb's matrix says which bits of the input make up bit i of the output. */
        for (unsigned bit = 0; bit < 8; bit++)
            for (unsigned i = 0; i < 8; i++)
                matrix |= (uint64_t)(multiple[bit] >> i & 1) << (8 * (7 - i) + bit);
        field->affine[scalar] = matrix;
        for (unsigned nibble = 0; nibble < 16; nibble++) {
            unsigned low = 0, high = 0;
            for (unsigned bit = 0; bit < 4; bit++)
                if (nibble >> bit & 1) {
                    low ^= multiple[bit];
                    high ^= multiple[bit + 4];
                }
            field->nibbles[scalar][nibble] = (uint8_t)low;
            field->nibbles[scalar][nibble + 16] = (uint8_t)high;
        }
    }
}

void gf256_init(void)
{
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        write_field(&fields[i]);
}

const gf256_field *gf256_field_of(unsigned polynomial)
{
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        if (fields[i].polynomial == polynomial)
            return &fields[i];
    return NULL;
}

/* --- interpolation ------------------------------------------------------------------------------------------------- */

/* A sum of fewer than 2^16 modulo 255, as 0..255: both ends are the same exponent. 256 is 1 modulo 255. */
static unsigned folded(unsigned sum)
{
    sum = (sum & 255) + (sum >> 8);
    return (sum & 255) + (sum >> 8);
}

/*
 * matrix[o * count + j] = product over m != j of (targets[o] - x_m) / (x_j - x_m); minus is exclusive or.
 *
 * All of it is in logarithms; the differences of the xs are the same for every target. For a key's few shares this is
 * the larger part of the work, and vector code for such short loops would double it.
 */
GF256_NO_VECTORS static void write_lagrange(const gf256_field *field, uint8_t *matrix, const uint8_t *xs,
                                            unsigned count, const uint8_t *targets, unsigned target_count)
{
    const uint8_t *const logarithm = field->logarithm;
    unsigned inverse[GF256_SHARES_MAX]; /* the logarithm of 1 / product over m != j of (x_j - x_m) */
    inverse[0] = 0;
    for (unsigned j = 1; j < count; j++) {
        unsigned sum = 0;
        for (unsigned m = 0; m < j; m++) {
            const unsigned difference = logarithm[xs[j] ^ xs[m]];
            sum += difference;
            inverse[m] += difference;
        }
        inverse[j] = sum;
    }
    for (unsigned j = 0; j < count; j++)
        inverse[j] = 2 * 255 - folded(inverse[j]);
    for (unsigned o = 0; o < target_count; o++, matrix += count) {
        const uint8_t target = targets[o];
        unsigned numerator = 0; /* the logarithm of the product of all (target - x_m) */
        unsigned given = count;
        for (unsigned m = 0; m < count; m++) {
            if (xs[m] == target)
                given = m;
            numerator += logarithm[xs[m] ^ target];
        }
        numerator = folded(numerator);
        for (unsigned j = 0; j < count; j++)
            matrix[j] = field->power[numerator + inverse[j] - logarithm[xs[j] ^ target]];
        if (given < count) /* the value asked for is one of those given */
            for (unsigned j = 0; j < count; j++)
                matrix[j] = j == given;
    }
}

/* --- matrix times rows --------------------------------------------------------------------------------------------- */

enum {
    MATRIX_BYTES_MAX = 128 * 128,        /* (n - t + 1) * t with n = 255 is at most that */
    LIST_BYTES_MAX = 32 * 4 * 255,       /* a group of any kernel fits, and all groups of the usual sharings do */
    BYPASS_BYTES_MIN = 24 * 1024 * 1024, /* larger rows stay in no cache, so writing around it saves reading them */
    DERIVE_BYTES_MIN = 256,              /* shorter rows don't repay the search for sums */
    DERIVE_INPUTS_MAX = 3,
    SHORT_BYTES_MAX = 65535
};

/* Random rows to be drawn block by block just before they are read. */
typedef struct {
    const gf256_generator *generator;
    gf256_stream *stream;
    uint8_t *const *rows;
    unsigned count;
} feed;

/* An output that is a sum of inputs and perhaps one output before it. */
typedef struct {
    uint8_t *output;
    const uint8_t *terms[DERIVE_INPUTS_MAX + 1];
    unsigned count;
} derived;

typedef struct {
    const gf256_kernel *kernel;
    const gf256_field *field;
    const uint8_t *matrix;
    unsigned output_count, input_count;
    const uint8_t *const *inputs;
    uint8_t *const *outputs;
    const derived *sums;
    unsigned sum_count;
    const feed *source; /* NULL: the inputs are all there */
} product;

static int is_large(size_t length, unsigned rows)
{
    return length >= BYPASS_BYTES_MIN / rows;
}

/* How many of the outputs that are left go together: groups alike in size. */
static unsigned group_of(unsigned left, unsigned most)
{
    unsigned groups;
    if (left <= most)
        return left;
    groups = (left + most - 1) / most;
    return (left + groups - 1) / groups;
}

/* Writes the lists of all groups, one behind the other. */
static void list_all(const product *p, uint8_t *lists)
{
    unsigned rows;
    for (unsigned done = 0; done < p->output_count; done += rows) {
        rows = group_of(p->output_count - done, p->kernel->rows_max);
        p->kernel->list(lists, p->field, p->matrix + (size_t)done * p->input_count, rows, p->input_count);
        lists += (size_t)rows * p->input_count * p->kernel->scalar_bytes;
    }
}

/* offset <= i < length of all rows. `lists` has all groups' lists, or room for that of one group when `ready` is 0. */
static void run_block(const product *p, uint8_t *lists, int ready, size_t offset, size_t length, int bypass)
{
    unsigned rows;
    if (p->source != NULL)
        for (unsigned k = 0; k < p->source->count; k++)
            p->source->generator->fill(p->source->stream, p->source->rows[k] + offset, length - offset);
    for (unsigned done = 0; done < p->output_count; done += rows) {
        rows = group_of(p->output_count - done, p->kernel->rows_max);
        if (!ready)
            p->kernel->list(lists, p->field, p->matrix + (size_t)done * p->input_count, rows, p->input_count);
        p->kernel->run(lists, rows, p->input_count, p->inputs, p->outputs + done, offset, length, bypass);
        if (ready)
            lists += (size_t)rows * p->input_count * p->kernel->scalar_bytes;
    }
    for (unsigned i = 0; i < p->sum_count; i++)
        p->kernel->add(p->sums[i].count, p->sums[i].terms, p->sums[i].output, offset, length);
}

/* How many bytes before the first vector of all outputs, or -1 when they don't begin alike. */
static ptrdiff_t bypass_head(const product *p)
{
    const size_t vector = p->kernel->vector_bytes, head = -(uintptr_t)p->outputs[0] % vector;
    for (unsigned o = 1; o < p->output_count; o++)
        if (-(uintptr_t)p->outputs[o] % vector != head)
            return -1;
    return (ptrdiff_t)head;
}

static void run_product(const product *p, size_t length, int bypass)
{
    _Alignas(64) uint8_t lists[LIST_BYTES_MAX]; /* public */
    const size_t list_bytes = (size_t)p->output_count * p->input_count * p->kernel->scalar_bytes;
    const int ready = list_bytes <= sizeof lists;
    size_t offset = 0, step = length;
    if (p->output_count > p->kernel->rows_max || p->sum_count > 0 || p->source != NULL)
        step = p->source != NULL && ready ? p->kernel->block_bytes : GF256_BLOCK_BYTES;
    if (ready)
        list_all(p, lists);
    if (bypass) {
        const ptrdiff_t head = p->output_count > 0 ? bypass_head(p) : -1;
        bypass = head >= 0;
        if (head > 0 && (size_t)head < length) {
            run_block(p, lists, ready, 0, (size_t)head, 0);
            offset = (size_t)head;
        }
    }
#if defined(__x86_64__)
    if (p->source != NULL && !bypass && offset == 0 && p->output_count <= p->kernel->rows_max &&
        p->kernel->run == gf256_run_gfni512 && p->source->generator->fill == gf256_aes_fill_vaes512)
        offset = gf256_draw_vaes512(lists, p->output_count, p->input_count, p->inputs[0], p->source->rows, p->outputs,
                                    p->source->stream, length);
#endif
    while (offset < length) {
        const size_t end = length - offset < step ? length : offset + step;
        run_block(p, lists, ready, offset, end, bypass);
        offset = end;
    }
#if defined(__x86_64__)
    if (bypass)
        _mm_sfence();
#endif
}

/* Whether all scalars of a row, plus those of another one if there is one, are 0 or 1. */
static int is_sum(const uint8_t *row, const uint8_t *base, unsigned count)
{
    unsigned all = 0;
    for (unsigned k = 0; k < count; k++)
        all |= row[k] ^ (base != NULL ? base[k] : 0);
    return all <= 1;
}

/*
 * Up to t = 3 a polynomial minus its constant term is additive (squaring is in these fields), so many shares are sums
 * of others: of x = 1, 2 and the secret, share 3 is the sum, and share 5 is share 4 plus the secret plus share 1. That
 * saves most products where a product costs more than a sum.
 */
static void run_with_sums(product p, size_t length, int bypass)
{
    uint8_t matrix[GF256_SHARES_MAX * DERIVE_INPUTS_MAX];
    uint8_t *outputs[GF256_SHARES_MAX];
    derived sums[GF256_SHARES_MAX];
    const unsigned count = p.input_count;
    unsigned kept = 0, found = 0;
    for (unsigned o = 0; o < p.output_count; o++) {
        const uint8_t *const row = p.matrix + (size_t)o * count;
        const uint8_t *base = NULL;
        derived *const sum = &sums[found];
        unsigned terms = 0, h = 0;
        if (!is_sum(row, NULL, count)) {
            while (h < kept && !is_sum(row, matrix + (size_t)h * count, count))
                h++;
            base = matrix + (size_t)h * count;
            if (h == kept) {
                memcpy(matrix + (size_t)kept * count, row, count);
                outputs[kept++] = p.outputs[o];
                continue;
            }
            sum->terms[terms++] = outputs[h];
        }
        for (unsigned k = 0; k < count; k++)
            if (row[k] ^ (base != NULL ? base[k] : 0))
                sum->terms[terms++] = p.inputs[k];
        sum->output = p.outputs[o];
        sum->count = terms;
        found++;
    }
    p.matrix = matrix;
    p.outputs = outputs;
    p.output_count = kept;
    p.sums = sums;
    p.sum_count = found;
    run_product(&p, length, found == 0 && bypass);
}

static void multiply(const product *p, size_t length, int bypass)
{
    if (p->kernel->add != NULL && p->input_count <= DERIVE_INPUTS_MAX && length >= DERIVE_BYTES_MIN)
        run_with_sums(*p, length, bypass);
    else
        run_product(p, length, bypass);
}

/* The longest rows of few for which none of the above pays. */
static size_t short_max(const gf256_kernel *kernel)
{
    return kernel->add == NULL ? SHORT_BYTES_MAX : DERIVE_BYTES_MIN - 1;
}

int gf256_prepare(gf256_prepared *prepared, const gf256_kernel *kernel, const gf256_field *field, const uint8_t *xs,
                  unsigned count, const uint8_t *targets, unsigned target_count)
{
    uint8_t matrix[GF256_PREPARED_SCALARS];
    prepared->kernel = NULL;
    if (target_count > kernel->rows_max || target_count * count > GF256_PREPARED_SCALARS)
        return 0;
    write_lagrange(field, matrix, xs, count, targets, target_count);
    kernel->list(prepared->list, field, matrix, target_count, count);
    prepared->rows = target_count;
    prepared->count = count;
    prepared->length_max = short_max(kernel);
    prepared->kernel = kernel;
    return 1;
}

void gf256_apply(const gf256_prepared *prepared, const uint8_t *const *ys, uint8_t *const *outs, size_t length)
{
    prepared->kernel->run(prepared->list, prepared->rows, prepared->count, ys, outs, 0, length, 0);
}

void gf256_interpolate(const gf256_kernel *kernel, const gf256_field *field, const uint8_t *xs, unsigned count,
                       const uint8_t *const *ys, const uint8_t *targets, unsigned target_count, uint8_t *const *outs,
                       size_t length)
{
    uint8_t matrix[MATRIX_BYTES_MAX];
    gf256_prepared prepared;
    if (length <= short_max(kernel) && gf256_prepare(&prepared, kernel, field, xs, count, targets, target_count)) {
        gf256_apply(&prepared, ys, outs, length);
        return;
    }
    while (target_count > 0) {
        const unsigned rows_max = MATRIX_BYTES_MAX / count < GF256_SHARES_MAX ? MATRIX_BYTES_MAX / count : GF256_SHARES_MAX;
        const unsigned rows = target_count < rows_max ? target_count : rows_max;
        const product p = {kernel, field, matrix, rows, count, ys, outs, NULL, 0, NULL};
        write_lagrange(field, matrix, xs, count, targets, rows);
        multiply(&p, length, is_large(length, count + rows));
        targets += rows;
        outs += rows;
        target_count -= rows;
    }
}

/* --- splitting ----------------------------------------------------------------------------------------------------- */

/* Fills from the operating system's generator. Returns 0 or an errno value, never fewer bytes. */
static int fill_random(uint8_t *buffer, size_t length)
{
    while (length > 0) {
        const ssize_t got = getrandom(buffer, length, 0);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (got == 0) /* getrandom(2) never says so; but a loop on it would never end */
            return EIO;
        buffer += got;
        length -= (size_t)got;
    }
    return 0;
}

/* Few random bytes: drawn in one piece, straight from the system where a seed would take as many. */
static int draw_small(const gf256_generator *generator, uint8_t *const *randoms, unsigned count, size_t length)
{
    uint8_t drawn[GF256_SMALL_BYTES];
    const size_t wanted = count * length;
    const int error = fill_random(drawn, wanted < GF256_SEED_BYTES ? wanted : GF256_SEED_BYTES);
    if (error)
        return error;
    if (wanted > GF256_SEED_BYTES) {
        gf256_stream stream;
        generator->start(&stream, drawn);
        generator->fill(&stream, drawn, wanted);
        explicit_bzero(&stream, sizeof stream);
    }
    for (unsigned k = 0; k < count; k++)
        memcpy(randoms[k], drawn + k * length, length);
    explicit_bzero(drawn, wanted);
    return 0;
}

/* Fail closed: nothing that a caller could take for a share. */
static void wipe_all(uint8_t *const *ys, unsigned shares, size_t length)
{
    for (unsigned j = 0; j < shares; j++)
        explicit_bzero(ys[j], length);
}

int gf256_split_prepared(const gf256_prepared *prepared, const gf256_generator *generator, const uint8_t *secret,
                         size_t length, uint8_t *const *ys)
{
    const uint8_t *inputs[GF256_PREPARED_SCALARS];
    const unsigned randoms = prepared->count - 1;
    const int error = draw_small(generator, ys, randoms, length);
    if (error) {
        wipe_all(ys, randoms + prepared->rows, length);
        return error;
    }
    inputs[0] = secret;
    for (unsigned k = 0; k < randoms; k++)
        inputs[k + 1] = ys[k];
    gf256_apply(prepared, inputs, ys + randoms, length);
    return 0;
}

/* Many: a generator that is seeded once, and works block by block, so that the random rows are read from the cache. */
static int split_streamed(product p, const gf256_generator *generator, uint8_t *const *randoms, size_t length,
                          int bypass)
{
    gf256_stream stream;
    uint8_t seed[GF256_SEED_BYTES];
    const feed source = {generator, &stream, randoms, p.input_count - 1};
    const int error = fill_random(seed, sizeof seed);
    if (error)
        return error;
    generator->start(&stream, seed);
    explicit_bzero(seed, sizeof seed);
    p.source = &source;
    multiply(&p, length, bypass);
    explicit_bzero(&stream, sizeof stream);
    return 0;
}

int gf256_split(const gf256_kernel *kernel, const gf256_generator *generator, const gf256_field *field,
                const uint8_t *secret, size_t length, unsigned threshold, unsigned shares, const uint8_t *xs,
                uint8_t *const *ys)
{
    uint8_t matrix[MATRIX_BYTES_MAX], given[GF256_SHARES_MAX];
    const uint8_t *inputs[GF256_SHARES_MAX];
    const unsigned randoms = threshold - 1;
    const product p = {kernel, field, matrix, shares - randoms, threshold, inputs, ys + randoms, NULL, 0, NULL};
    int error = 0;
    given[0] = 0; /* the secret's place */
    inputs[0] = secret;
    for (unsigned k = 0; k < randoms; k++) {
        given[k + 1] = xs[k];
        inputs[k + 1] = ys[k];
    }
    write_lagrange(field, matrix, given, threshold, xs + randoms, shares - randoms);
    if (randoms == 0)
        multiply(&p, length, is_large(length, shares + 1));
    else if (length > GF256_SMALL_BYTES / randoms)
        error = split_streamed(p, generator, ys, length, is_large(length, shares + 1));
    else if ((error = draw_small(generator, ys, randoms, length)) == 0)
        multiply(&p, length, 0);
    if (error)
        wipe_all(ys, shares, length);
    return error;
}
