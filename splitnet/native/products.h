/* Products of a few rows with held weights, for CPUs; splitnet/quant/native.py is the interface to them.

Decoding reads every weight once per step, so these kernels are made to read at the speed of the memory: weights stay
as they are stored until they are in registers.

Integer weights are multiplied with integers. Each row of activations becomes 16-bit numbers with one scale,
q = 255 * high + low with high and low in -127..127, so that products of bytes (VNNI) do all the work. The rounding error
of activations is 2^-15 of the row's largest number, so outliers cost almost no precision, unlike with 8 bits. */

#ifndef SPLITNET_PRODUCTS_H
#define SPLITNET_PRODUCTS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_VNNI 1
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11 /* compilers that know these instructions */
#define HAVE_BFLOATS 1
#define HAVE_AVXVNNI 1
#define BFLOATS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,avx512bf16,avx512vbmi")))
#endif
#endif

#if defined(__aarch64__) && defined(__GNUC__) /* older compilers know these instructions only where all code may have them */
#if defined(__ARM_FEATURE_DOTPROD) || (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 8)
#include <arm_neon.h>
#define HAVE_DOTPROD 1
#endif
#endif

#define BASE 255
#define LARGEST (BASE * 127 + 127)
#define SUMMED 16  /* numbers of a row per kept sum */
#define BLOCK 4    /* outputs that are computed at a time, in layouts with one row per output */
#define VECTOR 64  /* bytes, as a cache line */
#if defined(_MSC_VER) && !defined(__clang__) /* such compilers build only the plain loops */
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

/* How kernels prefetch weights: into which cache, and how many bytes ahead where weights are stored in the order of reading.
Processors predict reads only within a page. Processors differ: on Intel, ONCE halves the speed. splitnet/quant/native.py
measures and sets both. */
enum hint { NO_HINT, FIRST_CACHE, SECOND_CACHE, ONCE };
static int hint = SECOND_CACHE;
static int64_t ahead = 8192;

/* Prefetches some lines. Addresses past the end do no harm. */
INLINE void fetch(const void *at, int64_t count, int64_t stride) {
#if defined(__GNUC__)
#define FETCH(kind, level)                                                                                              \
    if (hint == kind) {                                                                                                 \
        _Pragma("GCC unroll 8") for (int64_t i = 0; i < count; i++) __builtin_prefetch((const char *)at + i * stride, 0, level); \
    }
    FETCH(SECOND_CACHE, 2) else FETCH(ONCE, 0) else FETCH(FIRST_CACHE, 3)
#undef FETCH
#else
    (void)at, (void)count, (void)stride;
#endif
}

enum kind { FLOAT32, BFLOAT16, FLOAT16, GROUPED };

typedef struct {
    const void *weights;
    const float *rows; /* [count, inputs] */
    float *products;   /* [count, outputs] */
    int64_t count, inputs, outputs;
    int threads;
} Job;

/* Rows as integers. Each row is padded with zeros to whole vectors. */
typedef struct {
    int64_t stride;      /* bytes per row */
    int8_t *high;     /* [count, stride] */
    int8_t *low;      /* [count, stride] */
    float *steps;     /* the value of 1, by row */
    float *sums;      /* sums of every 16 numbers, [count, stride / SUMMED] */
    float *highs;     /* the same sums of `high` only */
    float *pairs;     /* sums of two neighbouring sums, [count, stride / SUMMED / 2] */
    int16_t *words;   /* the numbers as 16 bits, [count, stride], for paths that take words */
} Quantised;

INLINE float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* The value of 1 in a row, from its largest number. NaN for rows with NaN or infinity, because integers cannot hold them. */
INLINE float step_of(float largest) { return isfinite(largest) ? largest / LARGEST : NAN; }

INLINE float factor_of(float step) { return step > 0 && isfinite(1 / step) ? 1 / step : 0; }

INLINE void add_up(const Quantised *to, int64_t row) {
    const int8_t *high = to->high + row * to->stride, *low = to->low + row * to->stride;
    for (int64_t some = 0; some < to->stride / SUMMED; some++) {
        int32_t upper = 0, lower = 0;
        for (int64_t i = some * SUMMED; i < (some + 1) * SUMMED; i++) {
            upper += high[i];
            lower += low[i];
        }
        int64_t at = row * (to->stride / SUMMED) + some;
        to->sums[at] = (float)(BASE * upper + lower);
        to->highs[at] = (float)upper;
        if (some % 2) to->pairs[at / 2] = to->sums[at - 1] + to->sums[at];
    }
}

/* ---- any CPU: plain loops ---- */

static void quantise_plainly(const Job *job, const Quantised *to) {
    for (int64_t index = 0; index < job->count; index++) {
        const float *row = job->rows + index * job->inputs;
        int8_t *high = to->high + index * to->stride, *low = to->low + index * to->stride;
        float largest = 0;
        for (int64_t i = 0; i < job->inputs; i++)
            if (!(fabsf(row[i]) <= largest)) largest = isnan(row[i]) ? INFINITY : fabsf(row[i]);
        float step = to->steps[index] = step_of(largest), factor = factor_of(step);
        for (int64_t i = 0; i < job->inputs; i++) {
            int64_t number = isfinite(row[i]) ? lrintf(row[i] * factor) : 0;
            number = number > LARGEST ? LARGEST : number < -LARGEST ? -LARGEST : number;
            int64_t upper = lrintf((float)number * (1.0f / BASE));
            high[i] = (int8_t)upper;
            low[i] = (int8_t)(number - BASE * upper);
        }
        memset(high + job->inputs, 0, to->stride - job->inputs);
        memset(low + job->inputs, 0, to->stride - job->inputs);
        add_up(to, index);
    }
}

/* ---- x86 with AVX512 and VNNI ---- */

#ifdef HAVE_VNNI

/* Mask of the first `left` of 16 numbers, where `left` is the count of numbers that are left in a row. */
INLINE VNNI __mmask16 some_of(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

VNNI static void quantise_vnni(const Job *job, const Quantised *to) {
    for (int64_t index = 0; index < job->count; index++) {
        const float *row = job->rows + index * job->inputs;
        int8_t *high = to->high + index * to->stride, *low = to->low + index * to->stride;
        __m512 most = _mm512_setzero_ps();
        __mmask16 strange = 0;
        for (int64_t i = 0; i < job->inputs; i += 16) {
            __m512 values = _mm512_maskz_loadu_ps(some_of(job->inputs - i), row + i);
            strange |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
            most = _mm512_max_ps(most, _mm512_abs_ps(values));
        }
        float step = to->steps[index] = step_of(strange ? INFINITY : _mm512_reduce_max_ps(most));
        __m512 factor = _mm512_set1_ps(factor_of(step));
        __m512i limit = _mm512_set1_epi32(LARGEST), base = _mm512_set1_epi32(BASE);
        for (int64_t i = 0; i < to->stride; i += 16) {
            __m512 values = _mm512_maskz_loadu_ps(some_of(job->inputs - i), row + i);
            __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(values, factor));
            number = _mm512_max_epi32(_mm512_min_epi32(number, limit), _mm512_sub_epi32(_mm512_setzero_si512(), limit));
            __m512i upper = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(number), _mm512_set1_ps(1.0f / BASE)));
            __m512i lower = _mm512_sub_epi32(number, _mm512_mullo_epi32(upper, base));
            _mm_storeu_si128((__m128i *)(high + i), _mm512_cvtepi32_epi8(upper));
            _mm_storeu_si128((__m128i *)(low + i), _mm512_cvtepi32_epi8(lower));
        }
        add_up(to, index);
    }
}

/* Sums of vectors without a reduction of each vector: pairs are added while they are interleaved. Each quarter of the result
has the sums of that quarter of the four vectors; `merge_floats` then adds the quarters of two results. */
INLINE VNNI __m512 float_sums_of_quarters(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512d first = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d second = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
}

INLINE VNNI __m512 merge_floats(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Sixteen weights of a float type. */
INLINE VNNI __m512 sixteen(enum kind kind, const char *weights, int64_t at, __mmask16 mask) {
    if (kind == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)weights + at);
    __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)weights + at);
    if (kind == FLOAT16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE VNNI void float_block(enum kind kind, const Job *job, int64_t output, int64_t outputs, int64_t row, int64_t count) {
    const int64_t width = kind == FLOAT32 ? 4 : 2;
    const float *rows = job->rows + row * job->inputs;
    const char *weights = job->weights;
    __m512 sums[BLOCK][4];
#pragma GCC unroll 4
    for (int64_t o = 0; o < outputs; o++)
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) sums[o][r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < job->inputs; i += 16) {
        __mmask16 mask = some_of(job->inputs - i);
        __m512 given[4];
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) given[r] = _mm512_maskz_loadu_ps(mask, rows + r * job->inputs + i);
        if (width == 4 || i % 32 == 0)
            fetch(weights + ((output + BLOCK) * job->inputs + i) * width, outputs, job->inputs * width);
#pragma GCC unroll 4
        for (int64_t o = 0; o < outputs; o++) {
            __m512 weight = sixteen(kind, weights, (output + o) * job->inputs + i, mask);
#pragma GCC unroll 4
            for (int64_t r = 0; r < count; r++) sums[o][r] = _mm512_fmadd_ps(weight, given[r], sums[o][r]);
        }
    }
    if (outputs == BLOCK) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) {
            __m512 quarters = float_sums_of_quarters(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
            quarters = merge_floats(quarters, quarters);
            quarters = merge_floats(quarters, quarters);
            _mm_storeu_ps(job->products + (row + r) * job->outputs + output, _mm512_castps512_ps128(quarters));
        }
        return;
    }
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t r = 0; r < count; r++)
            job->products[(row + r) * job->outputs + output + o] = _mm512_reduce_add_ps(sums[o][r]);
}

INLINE VNNI void floats(enum kind kind, const Job *job, int64_t start, int64_t end) {
    int64_t output = start;
    for (; output + BLOCK <= end; output += BLOCK) {
        int64_t row = 0;
        for (; row + 4 <= job->count; row += 4) float_block(kind, job, output, BLOCK, row, 4);
        if (row + 2 <= job->count) float_block(kind, job, output, BLOCK, row, 2), row += 2;
        if (row < job->count) float_block(kind, job, output, BLOCK, row, 1);
    }
    for (; output < end; output++)
        for (int64_t row = 0; row < job->count; row++) float_block(kind, job, output, 1, row, 1);
}

VNNI static void float32_vnni(const Job *job, const Quantised *rows, int64_t start, int64_t end) {
    (void)rows;
    floats(FLOAT32, job, start, end);
}

VNNI static void bfloat16_vnni(const Job *job, const Quantised *rows, int64_t start, int64_t end) {
    (void)rows;
    floats(BFLOAT16, job, start, end);
}

VNNI static void float16_vnni(const Job *job, const Quantised *rows, int64_t start, int64_t end) {
    (void)rows;
    floats(FLOAT16, job, start, end);
}
#endif


/* ---- running the kernels ---- */

typedef void (*Kernel)(const Job *, const Quantised *, int64_t, int64_t);

static int has_vnni(void) {
#ifdef HAVE_VNNI
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni"); /* these CPUs also have fma and f16c */
#else
    return 0;
#endif
}

/* Whether the CPU also multiplies bfloat16, and looks bytes up in tables. */
static int has_bfloats(void) {
#ifdef HAVE_BFLOATS
    return has_vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
#else
    return 0;
#endif
}

/* Inputs, padded to whole vectors and groups. */
static int64_t padded(int64_t inputs) { return (inputs + 63) / 64 * 64; }

static int prepare(const Job *job, Quantised *to) {
    int64_t stride = padded(job->inputs), sums = stride / SUMMED;
    char *memory = malloc(job->count * (4 * stride + (2 * sums + sums / 2 + 1) * 4) + 64);
    if (memory == NULL) return 0;
    *to = (Quantised){.stride = stride, .high = (int8_t *)memory, .low = (int8_t *)memory + job->count * stride};
    to->words = (int16_t *)(memory + 2 * job->count * stride);
    to->sums = (float *)(memory + 4 * job->count * stride);
    to->highs = to->sums + job->count * sums;
    to->pairs = to->highs + job->count * sums;
    to->steps = to->pairs + job->count * sums / 2;
    return 1;
}

typedef struct {
    Kernel kernel;
    const Job *job;
    const Quantised *rows;
    int64_t units, share;
} Units;

static void run_some_units(const void *given, int64_t thread) {
    const Units *all = given;
    int64_t start = thread * all->share, end = start + all->share < all->units ? start + all->share : all->units;
    if (start < end) all->kernel(all->job, all->rows, start, end);
}

/* Divides the outputs into equal parts, one per thread, in multiples of `unit` outputs, which a kernel computes at a time.
*/
static void run(Kernel kernel, const Job *job, const Quantised *rows, int64_t units, int64_t unit) {
    int64_t threads = job->threads < 1 ? 1 : job->threads;
    int64_t share = ((units + threads - 1) / threads + unit - 1) / unit * unit;
    Units all = {kernel, job, rows, units, share};
    run_parts(run_some_units, &all, threads, threads);
}

#endif
