/* Converts weights in tiles to floats in rows, for products of many rows, for which each call converts the weight.

A vector of codes has inputs of all outputs of a tile, in the order of the scales. Transposing 16 x 16 numbers of 32 bits
(floats, or pairs of bfloat16) gives rows. */

#ifndef SPLITNET_CONVERTED_H
#define SPLITNET_CONVERTED_H

#include "grouped.h"

#ifdef HAVE_VNNI

INLINE VNNI void transpose(__m512i rows[16]) {
    __m512i some[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        some[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        some[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(some[i], some[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(some[i], some[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(some[i + 1], some[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(some[i + 1], some[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        some[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        some[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        some[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        some[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(some[i], some[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(some[i], some[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(some[i + 4], some[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(some[i + 4], some[i + 12], 0xdd);
    }
}

/* The values of the codes in byte `i` of each 32 bits; `values`: a table of up to 32 codes. */
INLINE VNNI __m512 values_of(int bits, enum code code, const __m512 values[2], __m512 offset, __m512i runs, int i) {
    if (code == E4M3 || code == E5M2) { /* as halves */
        __m512i upper = _mm512_slli_epi32(runs, 24 - 8 * i);
        if (code == E4M3) upper = _mm512_srai_epi32(upper, 1);
        upper = _mm512_and_si512(upper, _mm512_set1_epi32((int)(code == E4M3 ? 0xbf800000 : 0xff000000)));
        __m512 value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)));
        return code == E4M3 ? _mm512_mul_ps(value, _mm512_set1_ps(256)) : value;
    }
    __m512i codes = _mm512_srli_epi32(runs, 8 * i);
    if (bits <= 4) return _mm512_permutexvar_ps(codes, values[0]);
    if (bits == 5) return _mm512_permutex2var_ps(values[0], codes, values[1]);
    return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255))), offset);
}

/* The values of a chunk, input by input; `scales` and `zeros` begin with those of its first group. */
INLINE VNNI void convert_chunk(int bits, enum code code, const Grouped *weight, const uint8_t *at, const float *scales,
                               const float *zeros, __m512 to[CHUNK]) {
    const int subtracted = weight->zero == CODES, added = !subtracted && weight->zero != NONE;
    const __m512 offset = _mm512_set1_ps((float)weight->offset);
    __m512 values[2] = {offset, offset};
    if (bits <= 5) values[0] = _mm512_maskz_loadu_ps(some_of(1 << bits), weight->values);
    if (bits == 5) values[1] = _mm512_loadu_ps(weight->values + 16);
    __m512i stored[8];
#pragma GCC unroll 8
    for (int i = 0; i < bits; i++) stored[i] = _mm512_loadu_si512(at + i * VECTOR);
    fetch(at + ahead, bits, VECTOR);
#pragma GCC unroll 8
    for (int vector = 0; vector < 8; vector++) {
        __m512i runs = codes_of(bits, stored, vector);
        if (weight->pairs) {
            __m512i later = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(runs, 1));
            runs = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(runs)), _mm512_slli_epi32(later, 16));
        }
        const int64_t group = weight->group == 16 && vector >= 4 ? TILE : 0;
        __m512 scale = _mm512_loadu_ps(scales + group), zero = _mm512_loadu_ps(zeros + group);
        if (subtracted) zero = _mm512_sub_ps(zero, offset); /* the zero is a code */
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512 value = values_of(bits, code, values, offset, runs, i);
            if (subtracted) value = _mm512_sub_ps(value, zero);
            value = _mm512_mul_ps(value, scale);
            to[vector * 4 + i] = added ? _mm512_add_ps(value, zero) : value;
        }
    }
}

/* Stores the first `lanes` outputs of a chunk, of which the first `inputs` exist; `pitch`: distance between outputs. */
INLINE VNNI void store_floats(__m512 values[CHUNK], int64_t lanes, int64_t inputs, float *to, int64_t pitch) {
    for (int half = 0; half < 2; half++) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) rows[i] = _mm512_castps_si512(values[half * 16 + i]);
        transpose(rows);
        for (int64_t lane = 0; lane < lanes; lane++)
            _mm512_mask_storeu_epi32(to + lane * pitch + half * 16, some_of(inputs - half * 16), rows[lane]);
    }
}

#ifdef HAVE_BFLOATS
INLINE BFLOATS void store_bfloats(__m512 values[CHUNK], int64_t lanes, int64_t inputs, uint16_t *to, int64_t pitch) {
    static const uint16_t in_pairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __mmask32 mask = inputs >= CHUNK ? 0xffffffff : (1u << inputs) - 1;
    __m512i rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(values[2 * i + 1], values[2 * i]);
        rows[i] = _mm512_permutexvar_epi16(_mm512_loadu_si512(in_pairs), both);
    }
    transpose(rows);
    for (int64_t lane = 0; lane < lanes; lane++) _mm512_mask_storeu_epi16(to + lane * pitch, mask, rows[lane]);
}
#endif

/* Converts the first `lanes` outputs of a tile, `[lanes, inputs]`, as `dequantise_plainly` does, then rounds to bfloat16. */
#define CONVERT_TILE(name, target, type, store)                                                                            \
    INLINE target void name(int bits, enum code code, const Grouped *weight, const uint8_t *at, int64_t lanes, type *to) {   \
        float scales[(MOST_GROUPS + 1) * TILE], zeros[(MOST_GROUPS + 1) * TILE] = {0};                                     \
        for (int64_t first = 0; first < weight->inputs; first += weight->panel) {                                             \
            Panel panel = panel_at(weight, at, first);                                                                     \
            Numbers these = {panel.scales, panel.scale_units, weight->group ? UNITS / weight->group : 1, panel.groups,     \
                             scales};                                                                                      \
            convert(weight->scale, &these, 1, NULL, 0, 0);                                                                 \
            these.at = panel.zeros, these.units = panel.zero_units, these.to = zeros;                                      \
            if (weight->zero != NONE) convert(weight->zero, &these, 1, NULL, 0, 0);                                        \
            for (int64_t begin = 0; begin < panel.inputs; begin += CHUNK) {                                                   \
                const int64_t group = weight->group ? begin / weight->group * TILE : 0;                                       \
                __m512 values[CHUNK];                                                                                      \
                convert_chunk(bits, code, weight, panel.codes + begin / CHUNK * VECTOR * bits, scales + group,             \
                              zeros + group, values);                                                                      \
                store(values, lanes, panel.inputs - begin, to + first + begin, weight->inputs);                            \
            }                                                                                                              \
            at = end_of(weight, &panel);                                                                                   \
        }                                                                                                                  \
    }                                                                                                                      \
    target static void name##s(const Grouped *weight, const uint8_t *at, int64_t lanes, type *to) {                           \
        if (weight->code == E4M3) {                                                                                        \
            name(8, E4M3, weight, at, lanes, to);                                                                          \
            return;                                                                                                        \
        }                                                                                                                  \
        if (weight->code == E5M2) {                                                                                        \
            name(8, E5M2, weight, at, lanes, to);                                                                          \
            return;                                                                                                        \
        }                                                                                                                  \
        switch (weight->bits) {                                                                                            \
        case 2: name(2, PLAIN, weight, at, lanes, to); break;                                                              \
        case 3: name(3, PLAIN, weight, at, lanes, to); break;                                                              \
        case 4: name(4, PLAIN, weight, at, lanes, to); break;                                                              \
        case 5: name(5, PLAIN, weight, at, lanes, to); break;                                                              \
        case 6: name(6, PLAIN, weight, at, lanes, to); break;                                                              \
        default: name(8, PLAIN, weight, at, lanes, to);                                                                    \
        }                                                                                                                  \
    }

CONVERT_TILE(float_tile, VNNI, float, store_floats)
#ifdef HAVE_BFLOATS
CONVERT_TILE(bfloat_tile, BFLOATS, uint16_t, store_bfloats)
#endif
#endif

/* `bfloats`: the numbers are bfloat16; only a path that multiplies bfloat16 makes bfloat16 numbers. */
typedef struct {
    const Path *path; /* the path in use */
    const Grouped *weight;
    const uint8_t *tiles;
    int64_t outputs;
    int bfloats;
    void *to;
} Conversion;

static void convert_tile(const void *given, int64_t part) {
    const Conversion *job = given;
    const Grouped *weight = job->weight;
    const uint8_t *tile = job->tiles + part * weight->tile_bytes;
    const int64_t left = job->outputs - part * TILE, lanes = left < TILE ? left : TILE, at = part * TILE * weight->inputs;
#ifdef HAVE_BFLOATS
    if (job->bfloats) {
        bfloat_tiles(weight, tile, lanes, (uint16_t *)job->to + at);
        return;
    }
#endif
#ifdef HAVE_VNNI
    if (is_avx512(job->path) && weight->code != ANY) {
        float_tiles(weight, tile, lanes, (float *)job->to + at);
        return;
    }
#endif
    job->path->dequantise(weight, tile, 0, lanes, (float *)job->to + at);
}

static void convert_tiles(const Conversion *job, int threads) {
    run_parts(convert_tile, job, parts_of(job->outputs, TILE), threads);
}

#endif
