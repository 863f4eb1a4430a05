/*
 * Owns a statistical test of constant time (O. Reparaz et al., "Dude, is my code constant time?", DATE 2017): products of
 * fixed and of random rows are timed in random order, and Welch's t says whether the two differ.
 *
 *   dudect KERNEL|table      prints the largest |t| over several percentiles at which slow outliers are cut off
 */
#define _GNU_SOURCE
#include "gf256.h"
#include "table_kernel.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { MEASUREMENTS = 60000, LENGTH = 512, COUNT = 3, ROWS = 1, FIXED = 16 };

static uint64_t now(void)
{
#if defined(__x86_64__)
    unsigned low, high, which;
    __asm__ volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(which)::"memory");
    return (uint64_t)high << 32 | low;
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
#endif
}

static int by_size(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static double welch(const uint64_t *spent, const uint8_t *classes, uint64_t limit)
{
    double n[2] = {0}, mean[2] = {0}, square[2] = {0};
    for (int i = 0; i < MEASUREMENTS; i++) {
        const int c = classes[i];
        double step;
        if (spent[i] > limit)
            continue;
        n[c]++;
        step = (double)spent[i] - mean[c];
        mean[c] += step / n[c];
        square[c] += step * ((double)spent[i] - mean[c]);
    }
    if (n[0] < 1000 || n[1] < 1000)
        return 0;
    return fabs(mean[0] - mean[1]) / sqrt(square[0] / (n[0] - 1) / n[0] + square[1] / (n[1] - 1) / n[1] + 1e-12);
}

int main(int argc, char **argv)
{
    static uint64_t spent[MEASUREMENTS], sorted[MEASUREMENTS];
    static uint8_t classes[MEASUREMENTS], rows[2][COUNT][LENGTH], given[COUNT][LENGTH], out[LENGTH];
    static uint8_t evict[64 * 1024];
    static _Alignas(64) uint8_t list[4096];
    static const gf256_kernel TABLE = {"table", NULL, 4, 1, 16, 512, table_list, table_run, NULL, ""};
    const uint8_t matrix[COUNT] = {0x57, 0x83, 0xC1};
    const uint8_t *inputs[COUNT] = {given[0], given[1], given[2]};
    uint8_t *outputs[ROWS] = {out};
    const gf256_kernel *kernel = &TABLE;
    double largest = 0;
    if (argc != 2)
        return 2;
    gf256_init();
    for (unsigned i = 0; strcmp(kernel->name, argv[1]) != 0; i++) {
        kernel = gf256_kernel_at(i);
        if (kernel == NULL)
            return 2;
    }
    kernel->list(list, gf256_field_of(0x11B), matrix, ROWS, COUNT);
    memset(rows[0], FIXED, sizeof rows[0]);
    srand((unsigned)time(NULL));
    for (int i = 0; i < MEASUREMENTS; i++) {
        const uint8_t which = (uint8_t)(rand() >> 7 & 1);
        uint64_t start;
        for (size_t j = 0; j < sizeof rows[1]; j++)
            ((uint8_t *)rows[1])[j] = (uint8_t)(rand() >> 5);
        for (size_t j = 0; j < sizeof evict; j += 64) /* tables leave the first-level cache */
            evict[j]++;
        for (size_t j = 0; j < sizeof given; j++) { /* both classes take the same way here */
            const uint8_t one = ((uint8_t *)rows[0])[j], other = ((uint8_t *)rows[1])[j];
            ((volatile uint8_t *)given)[j] = (uint8_t)(one ^ ((one ^ other) & -which));
        }
        classes[i] = which;
        start = now();
        kernel->run(list, ROWS, COUNT, inputs, outputs, 0, LENGTH, 0);
        spent[i] = now() - start;
    }
    memcpy(sorted, spent, sizeof spent);
    qsort(sorted, MEASUREMENTS, sizeof sorted[0], by_size);
    for (int percent = 50; percent <= 95; percent += 15) {
        const double t = welch(spent, classes, sorted[(size_t)MEASUREMENTS * percent / 100 - 1]);
        largest = t > largest ? t : largest;
    }
    printf("%.2f\n", largest);
    return 0;
}
