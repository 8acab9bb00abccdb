/* Products with weights in the codes of a checkpoint; see splitnet/quant/tiles.py for their layout. `value(code) * scale +
zero` of a group of inputs is computed in two terms: scale times the product of the codes, plus zero times the sum of the
row. Codes of integers are multiplied as unsigned bytes, other codes as floats. */

#ifndef SPLITNET_GROUPED_H
#define SPLITNET_GROUPED_H

#include "products.h"

#define TILE 16      /* outputs that are stored together */
#define CHUNK 32     /* inputs whose codes are stored together */
#define UNITS 256    /* inputs that share a unit of steps */
#define MOST_GROUPS 64 /* maximum groups per panel */
#define MOST_ROWS 64 /* maximum rows that are multiplied with a tile before the next tile, so that the rows stay in a cache */

enum number { AS_FLOAT16, AS_BFLOAT16, AS_FLOAT32, E8M0, STEPS, UNSIGNED_STEPS, LOWER_STEPS, UPPER_STEPS, CODES, NONE, ONES };
enum code { PLAIN, TABLE, FLOAT_TABLE, E4M3, E5M2, ANY };

/* All fields have 8 bytes: Python writes them as a list of numbers. */
typedef struct {
    int64_t code; /* an `enum code`; only the plain loops take weights with ANY */
    int64_t bits, group, panel, inputs, outputs;
    int64_t offset;       /* the code of zero, without a table */
    int64_t scale, zero;  /* types of scales and zeros: an `enum number` */
    int64_t scales_at, zeros_at; /* bytes of the scales, and of the zeros, of one group of a tile */
    int64_t tile_bytes;
    int64_t pairs;        /* two of the four inputs of an output are stored 32 bytes after the other two */
    double factor;        /* TABLE: the value of 1 in a byte - 128; other codes: factor of their floats */
    const uint8_t *bytes; /* of TABLE, 16 */
    const float *values;  /* the value of each code */
    const int16_t *words; /* of FLOAT_TABLE, 16: the values as signed words of 14 bits */
    double unit;          /* the value of 1 in `words` */
} Grouped;

/* Rows that are multiplied with the same weight. */
typedef struct {
    const uint8_t *tiles;
    int64_t row, count;
} Run;

typedef struct {
    const Grouped *weight;
    const float *rows; /* [count, stride] */
    float *products;   /* [count, pitch] */
    int64_t count, stride, pitch;
    int threads;
} GroupedJob;

/* The sections of a panel. */
typedef struct {
    int64_t inputs, groups;
    const uint8_t *scales, *zeros, *scale_units, *zero_units, *codes;
} Panel;

INLINE int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

INLINE Panel panel_at(const Grouped *weight, const uint8_t *at, int64_t start) {
    int64_t left = weight->inputs - start, inputs = left < weight->panel ? left : weight->panel;
    int64_t groups = weight->group ? parts_of(inputs, weight->group) : 1;
    int64_t units = 2 * TILE * parts_of(inputs, UNITS);
    Panel panel = {.inputs = inputs, .groups = groups, .scales = at};
    panel.zeros = weight->zero == UPPER_STEPS ? at : at + groups * weight->scales_at;
    panel.scale_units = at + groups * (weight->scales_at + weight->zeros_at);
    int scale_steps = weight->scale >= STEPS && weight->scale <= UPPER_STEPS;
    int zero_steps = weight->zero >= STEPS && weight->zero <= UPPER_STEPS;
    panel.zero_units = panel.scale_units + (scale_steps ? units : 0);
    int64_t size = panel.zero_units + (zero_steps ? units : 0) - at;
    panel.codes = at + parts_of(size, VECTOR) * VECTOR;
    return panel;
}

INLINE const uint8_t *end_of(const Grouped *weight, const Panel *panel) {
    return panel->codes + parts_of(panel->inputs, CHUNK) * VECTOR * weight->bits;
}

/* ---- any CPU ---- */

INLINE float from_float16(uint16_t bits) {
    uint32_t wide = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float value;
    int special = (bits & 0x7c00) == 0x7c00;
    if (special) wide |= 0x7f800000;
    memcpy(&value, &wide, sizeof value);
    if (!special) value *= 0x1p112f;
    memcpy(&wide, &value, sizeof wide);
    wide |= sign;
    memcpy(&value, &wide, sizeof value);
    return value;
}

INLINE float from_e8m0(uint8_t exponent) {
    uint32_t bits = exponent ? (uint32_t)exponent << 23 : 0x400000;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float number_at(enum number kind, const uint8_t *at, const uint8_t *units, int64_t group, int64_t index, int64_t lane) {
    int64_t place = index * TILE + lane;
    uint16_t half;
    float value, unit = 1;
    if (kind >= STEPS && kind <= UPPER_STEPS) {
        memcpy(&half, units + 2 * (index * group / UNITS * TILE + lane), sizeof half);
        unit = from_float16(half);
    }
    switch (kind) {
    case AS_FLOAT16: memcpy(&half, at + 2 * place, sizeof half); return from_float16(half);
    case AS_BFLOAT16: memcpy(&half, at + 2 * place, sizeof half); return from_bfloat16(half);
    case AS_FLOAT32: memcpy(&value, at + 4 * place, sizeof value); return value;
    case E8M0: return from_e8m0(at[place]);
    case STEPS: return (float)(int8_t)at[place] * unit;
    case UNSIGNED_STEPS: return (float)at[place] * unit;
    case LOWER_STEPS: return (float)(at[place] & 15) * unit;
    case UPPER_STEPS: return (float)(at[place] >> 4) * unit;
    case CODES: return (float)at[place];
    case ONES: return 1;
    default: return 0;
    }
}

/* The stored scales and zeros of a panel: [groups, TILE] each. */
INLINE void numbers_plainly(const Grouped *weight, const Panel *panel, float *scales, float *zeros) {
    for (int64_t group = 0; group < panel->groups; group++)
        for (int64_t lane = 0; lane < TILE; lane++) {
            int64_t to = group * TILE + lane;
            scales[to] = number_at(weight->scale, panel->scales, panel->scale_units, weight->group, group, lane);
            zeros[to] = number_at(weight->zero, panel->zeros, panel->zero_units, weight->group, group, lane);
            if (weight->zero == CODES) zeros[to] -= (float)weight->offset;
        }
}

/* The vectors of 3-, 5- and 6-bit codes that are split over the free bits of stored vectors, in up to three pieces, lowest
bits first: the stored vector, the first bit in its bytes, and the number of bits. */
static const int pieces[9][3][3][3] = {
    [3] = {{{0, 6, 2}, {2, 6, 1}}, {{1, 6, 2}, {2, 7, 1}}},
    [5] = {{{0, 5, 3}, {1, 5, 2}}, {{2, 5, 3}, {3, 5, 2}}, {{4, 5, 3}, {1, 7, 1}, {3, 7, 1}}},
    [6] = {{{0, 6, 2}, {1, 6, 2}, {2, 6, 2}}, {{3, 6, 2}, {4, 6, 2}, {5, 6, 2}}},
};

/* The codes of a chunk, in the order of its vectors. */
INLINE void codes_plainly(const Grouped *weight, const uint8_t *at, uint8_t codes[CHUNK * TILE]) {
    const int bits = (int)weight->bits, each = 8 / bits, whole = bits * each;
    memset(codes, 0, CHUNK * TILE);
    for (int vector = 0; vector < 8; vector++) {
        const int alone[3] = {vector / each, vector % each * bits, bits};
        for (int i = 0, shift = 0; i < (vector < whole ? 1 : 3); i++) {
            const int *piece = vector < whole ? alone : pieces[bits][vector - whole][i];
            const int mask = (1 << piece[2]) - 1;
            uint8_t some[VECTOR]; /* a local array, so that the compiler knows that the array does not overlap `codes` */
            for (int k = 0; k < VECTOR; k++) some[k] = (uint8_t)((at[piece[0] * VECTOR + k] >> piece[1] & mask) << shift);
            for (int k = 0; k < VECTOR; k++) codes[vector * VECTOR + k] |= some[k];
            shift += piece[2];
        }
    }
}

/* The index, in these codes, of an input of a chunk and a lane. */
INLINE int64_t place_of(const Grouped *weight, int64_t input, int64_t lane) {
    const int64_t i = input % 4;
    return input / 4 * VECTOR + (weight->pairs ? i / 2 * 32 + lane * 2 + i % 2 : lane * 4 + i);
}

/* Adds products of a vector of weights with four numbers of a row. */
INLINE void add_vector(const Grouped *weight, float sums[VECTOR], const float *values, const float *given) {
    if (weight->pairs)
        for (int64_t i = 0; i < VECTOR; i++) sums[i] += values[i] * given[i / 32 * 2 + i % 2];
    else
        for (int64_t i = 0; i < VECTOR; i += 4)
            for (int64_t k = 0; k < 4; k++) sums[i + k] += values[i + k] * given[k];
}

static void grouped_plainly(const GroupedJob *job, const Quantised *unused, const Run *run, int64_t start, int64_t end) {
    const Grouped *weight = job->weight;
    const int64_t group = weight->group && weight->group < CHUNK ? weight->group : CHUNK; /* inputs of a group within a chunk */
    (void)unused;
    uint8_t codes[CHUNK * TILE];
    float values[CHUNK * TILE], scales[MOST_GROUPS * TILE], zeros[MOST_GROUPS * TILE];
    for (int64_t tile = start; tile < end; tile++) {
        int64_t lanes = weight->outputs - tile * TILE < TILE ? weight->outputs - tile * TILE : TILE;
        for (int64_t row = run->row; row < run->row + run->count; row++)
            memset(job->products + row * job->pitch + tile * TILE, 0, lanes * sizeof(float));
        const uint8_t *at = run->tiles + tile * weight->tile_bytes;
        for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
            Panel panel = panel_at(weight, at, first);
            numbers_plainly(weight, &panel, scales, zeros);
            for (int64_t begin = 0; begin < panel.inputs; begin += CHUNK) {
                const int64_t inputs = panel.inputs - begin < CHUNK ? panel.inputs - begin : CHUNK;
                codes_plainly(weight, panel.codes + begin / CHUNK * VECTOR * weight->bits, codes);
                if (weight->code == PLAIN)
                    for (int64_t i = 0; i < CHUNK * TILE; i++) values[i] = (float)(codes[i] - (int32_t)weight->offset);
                else
                    for (int64_t i = 0; i < CHUNK * TILE; i++) values[i] = weight->values[codes[i]];
                for (int64_t row = run->row; row < run->row + run->count; row++) {
                    float *to = job->products + row * job->pitch + tile * TILE, given[CHUNK] = {0};
                    memcpy(given, job->rows + row * job->stride + first + begin, inputs * sizeof(float));
                    for (int64_t some = 0; some < inputs; some += group) {
                        const int64_t number = weight->group ? (begin + some) / weight->group * TILE : 0;
                        float sums[VECTOR] = {0}, dots[TILE] = {0}, total = 0;
                        for (int64_t i = some; i < some + group; i++) total += given[i];
                        for (int64_t i = some; i < some + group; i += 4)
                            add_vector(weight, sums, values + i / 4 * VECTOR, given + i);
                        for (int64_t i = 0; i < VECTOR; i++) dots[weight->pairs ? i % 32 / 2 : i / 4] += sums[i];
                        for (int64_t lane = 0; lane < lanes; lane++) {
                            const float scale = scales[number + lane], zero = zeros[number + lane] * total;
                            to[lane] += weight->zero == CODES ? (dots[lane] - zero) * scale : dots[lane] * scale + zero;
                        }
                    }
                }
            }
            at = end_of(weight, &panel);
        }
    }
}

/* Converts some lanes of a tile to floats, `[lanes, inputs]`, rounded as `Codes.to_floats` rounds them. */
INLINE void dequantise_loops(const Grouped *weight, const uint8_t *at, int64_t lane, int64_t lanes, float *to) {
    uint8_t codes[CHUNK * TILE];
    float scales[MOST_GROUPS * TILE], zeros[MOST_GROUPS * TILE];
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, at, first);
        numbers_plainly(weight, &panel, scales, zeros);
        for (int64_t begin = 0; begin < panel.inputs; begin += CHUNK) {
            int64_t inputs = panel.inputs - begin < CHUNK ? panel.inputs - begin : CHUNK;
            codes_plainly(weight, panel.codes + begin / CHUNK * VECTOR * weight->bits, codes);
            int64_t group = weight->group && weight->group < inputs ? weight->group : inputs;
            for (int64_t some = 0; some < inputs; some += group) {
                int64_t number = weight->group ? (begin + some) / weight->group * TILE : 0;
                int64_t stop = some + group < inputs ? some + group : inputs;
                for (int64_t index = 0; index < lanes; index++) {
                    float scale = scales[number + lane + index], zero = zeros[number + lane + index];
                    float *row = to + index * weight->inputs + first + begin;
                    for (int64_t i = some; i < stop; i++) {
                        const float value = weight->values[codes[place_of(weight, i, lane + index)]];
                        row[i] = weight->zero == CODES ? (value - zero) * scale
                                 : weight->zero == NONE ? value * scale : value * scale + zero;
                    }
                }
            }
        }
        at = end_of(weight, &panel);
    }
}

static void dequantise_plainly(const Grouped *weight, const uint8_t *at, int64_t lane, int64_t lanes, float *to) {
    dequantise_loops(weight, at, lane, lanes, to);
}

/* ---- shared by all kernels for particular CPUs ---- */

/* Scales or zeros of a panel. */
typedef struct {
    const uint8_t *at, *units;
    int64_t each, count; /* groups that share a unit, and all groups */
    float *to;
} Numbers;

/* Pointers into rows of numbers, at the part of a row that a block reads. */
typedef struct {
    const int8_t *high, *low;
    const float *sums, *pairs;
    int64_t stride; /* of `high` and `low`; SUMMED times the stride of the sums, CHUNK times that of the pairs */
    const float *highs; /* with the same stride as `sums` */
} Numbered;

/* The difference between the unsigned bytes and the values that they encode. */
INLINE float base_of(const Grouped *weight) {
    return weight->code == PLAIN ? (float)weight->offset : weight->code == TABLE ? 128 : 0;
}

/* NARROW: tables whose bytes differ by less than 32, so that they are multiplied as codes of five bits. FINE: tables of
words. */
enum table { NO_TABLE, WIDE_TABLE, NARROW, FINE };

INLINE int least_of(const Grouped *weight) {
    int least = 255;
    for (int i = 0; i < 16; i++) least = weight->bytes[i] < least ? weight->bytes[i] : least;
    return least;
}

INLINE int is_narrow(const Grouped *weight) {
    const int least = least_of(weight);
    for (int i = 0; i < 16; i++)
        if (weight->bytes[i] - least > 31) return 0;
    return 1;
}

/* The types to which kernels convert rows. */
enum taken { AS_FLOATS, AS_INTEGERS, AS_BFLOATS };

INLINE enum taken taken_by(const Grouped *weight) {
    return weight->code <= TABLE ? AS_INTEGERS : weight->code == E4M3 && !weight->pairs ? AS_BFLOATS : AS_FLOATS;
}

/* Rows as floats, each times a power of 2 that brings its largest number to 2^100 to 2^101, or less, so that weights may be
2^120 times too small. Infinite numbers stay infinite. */
static void scale_rows(const Job *job, const Quantised *to) {
    for (int64_t row = 0; row < job->count; row++) {
        const float *from = job->rows + row * job->inputs;
        float *scaled = (float *)to->high + row * (to->stride / 2);
        int32_t most = 0;
        for (int64_t i = 0; i < job->inputs; i++) {
            int32_t bits;
            memcpy(&bits, from + i, sizeof bits);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        const int exponent = most >> 23 < 1 ? 1 : most >> 23 > 253 ? 253 : most >> 23;
        const float inverse = ldexpf(1, 127 - exponent);
        to->steps[row] = ldexpf(1, exponent - 127);
        for (int64_t i = 0; i < job->inputs; i++) scaled[i] = from[i] * inverse * 0x1p100f;
    }
}

/* The bytes of E4M3 codes without their sign as bfloat16 (the lower bytes, then the upper ones), 256 times too small. */
static uint8_t e4m3_bytes[2][128];

static void make_tables(void) {
    for (int code = 0; code < 128; code++) {
        float value = (float)(code < 8 ? code : (8 + code % 8) << (code / 8 - 1)) * 0x1p-17f;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        e4m3_bytes[0][code] = (uint8_t)(bits >> 16), e4m3_bytes[1][code] = (uint8_t)(bits >> 24);
    }
}

/* ---- x86 with AVX512 and VNNI ---- */

#ifdef HAVE_VNNI

INLINE VNNI __m128i sixteen_bytes(const uint8_t *at) { return _mm_loadu_si128((const __m128i *)at); }

INLINE VNNI __m512 sixteen_numbers(enum number kind, const uint8_t *at) {
    const __m128i half = _mm_set1_epi8(15);
    switch (kind) {
    case AS_FLOAT16: return sixteen(FLOAT16, (const char *)at, 0, 0xffff);
    case AS_BFLOAT16: return sixteen(BFLOAT16, (const char *)at, 0, 0xffff);
    case AS_FLOAT32: return _mm512_loadu_ps((const float *)at);
    case E8M0: {
        __m512i exponent = _mm512_cvtepu8_epi32(sixteen_bytes(at));
        __mmask16 least = _mm512_testn_epi32_mask(exponent, exponent);
        exponent = _mm512_mask_mov_epi32(_mm512_slli_epi32(exponent, 23), least, _mm512_set1_epi32(0x400000));
        return _mm512_castsi512_ps(exponent);
    }
    case STEPS: return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen_bytes(at)));
    case LOWER_STEPS: return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(sixteen_bytes(at), half)));
    case UPPER_STEPS:
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(sixteen_bytes(at), 4), half)));
    case UNSIGNED_STEPS:
    case CODES: return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen_bytes(at)));
    case ONES: return _mm512_set1_ps(1);
    default: return _mm512_setzero_ps();
    }
}

/* Scales times `factor`; with `scales`: zeros minus `base` times the scales. */
INLINE VNNI void convert(enum number kind, const Numbers *these, float factor, const float *scales, float base, float offset) {
    const int64_t size = kind == AS_FLOAT32 ? 64 : kind <= AS_BFLOAT16 ? 32 : 16;
    const int steps = kind >= STEPS && kind <= UPPER_STEPS;
    const int64_t each = steps ? these->each : these->count;
    const uint8_t *at = these->at, *units = these->units;
    const __m512 factors = _mm512_set1_ps(factor), bases = _mm512_set1_ps(base), offsets = _mm512_set1_ps(offset);
    for (int64_t begin = 0; begin < these->count; begin += each) {
        int64_t end = begin + each < these->count ? begin + each : these->count;
        __m512 unit = _mm512_setzero_ps();
        if (steps) unit = sixteen(FLOAT16, (const char *)units, 0, 0xffff);
        units += 2 * TILE;
        for (int64_t i = begin; i < end; i++, at += size) {
            __m512 value = sixteen_numbers(kind, at);
            if (steps) value = _mm512_mul_ps(value, unit);
            if (scales == NULL) {
                value = _mm512_mul_ps(value, factors);
            } else {
                __m512 scale = _mm512_loadu_ps(scales + i * TILE);
                if (kind == CODES) value = _mm512_mul_ps(_mm512_sub_ps(offsets, value), _mm512_mul_ps(scale, factors));
                value = _mm512_fnmadd_ps(bases, scale, value);
            }
            _mm512_storeu_ps(these->to + i * TILE, value);
        }
    }
}

VNNI static void convert_scales(enum number kind, const Numbers *these, float factor) {
    switch (kind) {
    case AS_FLOAT16: convert(AS_FLOAT16, these, factor, NULL, 0, 0); break;
    case AS_BFLOAT16: convert(AS_BFLOAT16, these, factor, NULL, 0, 0); break;
    case AS_FLOAT32: convert(AS_FLOAT32, these, factor, NULL, 0, 0); break;
    case E8M0: convert(E8M0, these, factor, NULL, 0, 0); break;
    case STEPS: convert(STEPS, these, factor, NULL, 0, 0); break;
    case UNSIGNED_STEPS: convert(UNSIGNED_STEPS, these, factor, NULL, 0, 0); break;
    default: convert(LOWER_STEPS, these, factor, NULL, 0, 0);
    }
}

/* `factor`: restores stored scales from converted scales. */
VNNI static void convert_zeros(enum number kind, const Numbers *these, float factor, const float *scales, float base,
                               float offset) {
    switch (kind) {
    case AS_FLOAT16: convert(AS_FLOAT16, these, factor, scales, base, offset); break;
    case AS_BFLOAT16: convert(AS_BFLOAT16, these, factor, scales, base, offset); break;
    case AS_FLOAT32: convert(AS_FLOAT32, these, factor, scales, base, offset); break;
    case STEPS: convert(STEPS, these, factor, scales, base, offset); break;
    case UNSIGNED_STEPS: convert(UNSIGNED_STEPS, these, factor, scales, base, offset); break;
    case UPPER_STEPS: convert(UPPER_STEPS, these, factor, scales, base, offset); break;
    default: convert(CODES, these, factor, scales, base, offset);
    }
}

/* Scales and zeros of a panel, adapted to unsigned bytes, followed by one zero scale and one zero. */
INLINE VNNI void all_numbers(const Grouped *weight, const Panel *panel, float *scales, float *zeros) {
    const float base = base_of(weight);
    const float factor = (float)weight->factor;
    Numbers these = {panel->scales, panel->scale_units, weight->group ? UNITS / weight->group : 1, panel->groups, scales};
    for (const uint8_t *line = panel->scales; line < panel->codes; line += VECTOR) fetch(line + ahead, 1, VECTOR);
    convert_scales(weight->scale, &these, factor);
    _mm512_storeu_ps(scales + panel->groups * TILE, _mm512_setzero_ps());
    if (zeros == NULL) return;
    these.at = panel->zeros, these.units = panel->zero_units, these.to = zeros;
    convert_zeros(weight->zero, &these, 1 / factor, scales, base, (float)weight->offset);
    _mm512_storeu_ps(zeros + panel->groups * TILE, _mm512_setzero_ps());
}

/* `rest`, combined with bits of bytes, shifted left by `by`, or right if `by` is negative. */
INLINE VNNI __m512i with_bits(__m512i rest, __m512i bytes, int by, int mask) {
    __m512i there = by > 0 ? _mm512_slli_epi16(bytes, by) : by < 0 ? _mm512_srli_epi16(bytes, -by) : bytes;
    return _mm512_ternarylogic_epi32(there, _mm512_set1_epi8((char)mask), rest, 0xea); /* there & mask | rest */
}

INLINE VNNI __m512i low_bits(__m512i bytes, int by, int mask) {
    return _mm512_and_si512(by ? _mm512_srli_epi16(bytes, by) : bytes, _mm512_set1_epi8((char)mask));
}

/* One of the eight vectors of codes of a chunk; `stored`: all stored vectors of the chunk. */
INLINE VNNI __m512i codes_of(int bits, const __m512i *stored, int vector) {
    const int each = 8 / bits, whole = bits * each;
    if (bits == 8) return stored[vector];
    if (vector < whole) return low_bits(stored[vector / each], vector % each * bits, (1 << bits) - 1);
    __m512i code = _mm512_setzero_si512();
#pragma GCC unroll 3
    for (int i = 0, shift = 0; i < 3; i++) {
        const int *piece = pieces[bits][vector - whole][i], mask = ((1 << piece[2]) - 1) << shift;
        if (mask) code = with_bits(code, stored[piece[0]], shift - piece[1], mask);
        shift += piece[2];
    }
    return code;
}

VNNI static void chunk_codes(int bits, const uint8_t *at, uint32_t runs[8][TILE]) {
    __m512i stored[8];
    for (int i = 0; i < bits; i++) stored[i] = _mm512_loadu_si512(at + i * VECTOR);
#define STORE(bits)                                                                                     \
    case bits:                                                                                          \
        for (int vector = 0; vector < 8; vector++)                                                      \
            _mm512_storeu_si512(runs[vector], codes_of(bits, stored, vector));                          \
        break;
    switch (bits) { STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(8) }
#undef STORE
}

INLINE VNNI void store_lanes(const GroupedJob *job, int64_t tile, int64_t row, __m512 sums) {
    __mmask16 mask = some_of(job->weight->outputs - tile * TILE);
    _mm512_mask_storeu_ps(job->products + row * job->pitch + tile * TILE, mask, sums);
}

INLINE VNNI __m512i four_bytes(const int8_t *from) {
    int32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

/* Adds a group to the sums of a row. `total`: the sum of the row's numbers in the group; `zero`: NULL if each zero is -base
* scale. */
INLINE VNNI __m512 with_group(__m512 sums, __m512i upper, __m512i lower, const float *scale, const float *zero, float base,
                              float total) {
    __m512 dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper), _mm512_set1_ps(BASE), _mm512_cvtepi32_ps(lower));
    if (zero == NULL) return _mm512_fmadd_ps(_mm512_loadu_ps(scale), _mm512_sub_ps(dot, _mm512_set1_ps(base * total)), sums);
    sums = _mm512_fmadd_ps(_mm512_loadu_ps(zero), _mm512_set1_ps(total), sums);
    return _mm512_fmadd_ps(_mm512_loadu_ps(scale), dot, sums);
}

/* Adds the products with a chunk of codes to `upper` and `lower`. `sets`: number of sets of sums, which vectors use
alternately, or, with groups of 16 inputs, in order. */
INLINE VNNI void integer_chunk(int bits, int table, int small, int sets, const uint8_t *codes, __m512i values,
                               Numbered from, int count, __m512i upper[4][2], __m512i lower[4][2]) {
    __m512i stored[8];
#pragma GCC unroll 8
    for (int i = 0; i < bits; i++) stored[i] = _mm512_loadu_si512(codes + i * VECTOR);
    fetch(codes + ahead, bits, VECTOR);
#pragma GCC unroll 8
    for (int vector = 0; vector < 8; vector++) {
        __m512i code = codes_of(bits, stored, vector);
        if (table) code = _mm512_shuffle_epi8(values, code);
        const int set = sets == 1 ? 0 : small ? vector / 4 : vector % 2;
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            upper[r][set] = _mm512_dpbusd_epi32(upper[r][set], code, four_bytes(from.high + r * from.stride + vector * 4));
            lower[r][set] = _mm512_dpbusd_epi32(lower[r][set], code, four_bytes(from.low + r * from.stride + vector * 4));
        }
    }
}

/* `group`: 16, 32, or 0 for more. */
INLINE VNNI void integer_block(int bits, int table, int group, const GroupedJob *job, const Quantised *rows, const Run *run,
                               int64_t tile, int64_t row, int count) {
    const Grouped *weight = job->weight;
    const uint8_t *at = run->tiles + tile * weight->tile_bytes;
    const int small = group == 16, sets = small || (count == 1 && !group) ? 2 : 1; /* two sets halve the latency of additions */
    const int64_t chunks = small ? 1 : weight->group ? weight->group / CHUNK : weight->inputs; /* per group, at most */
    float scales[(MOST_GROUPS + 1) * TILE], zeros[(MOST_GROUPS + 1) * TILE];
    const float base = base_of(weight);
    __m512i values = _mm512_setzero_si512();
    if (table) values = _mm512_broadcast_i32x4(sixteen_bytes(weight->bytes));
    Numbered from = {rows->high + row * rows->stride, rows->low + row * rows->stride,
                     rows->sums + row * (rows->stride / SUMMED), rows->pairs + row * (rows->stride / CHUNK), rows->stride};
    __m512 sums[4];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) sums[r] = _mm512_setzero_ps();
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, at, first);
        const float *scale = scales, *zero = weight->zero == NONE ? NULL : zeros;
        all_numbers(weight, &panel, scales, weight->zero == NONE ? NULL : zeros);
        const uint8_t *codes = panel.codes;
        at = end_of(weight, &panel);
        while (codes < at) {
            __m512i upper[4][2], lower[4][2];
            float totals[4] = {0};
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
#pragma GCC unroll 2
                for (int set = 0; set < sets; set++) upper[r][set] = lower[r][set] = _mm512_setzero_si512();
            const uint8_t *stop = codes + (group ? 1 : chunks) * bits * VECTOR;
            if (!group && stop > at) stop = at;
            do {
                integer_chunk(bits, table, small, sets, codes, values, from, count, upper, lower);
                if (!group) {
#pragma GCC unroll 4
                    for (int r = 0; r < count; r++) totals[r] += from.pairs[r * (from.stride / CHUNK)];
                }
                from.high += CHUNK, from.low += CHUNK, from.sums += CHUNK / SUMMED, from.pairs++, codes += bits * VECTOR;
            } while (!group && codes < stop);
            const float *second = scale + TILE, *second_zero = zero ? zero + TILE : NULL;
#pragma GCC unroll 4
            for (int r = 0; r < count; r++) {
                if (small) {
                    const float *total = from.sums + r * (from.stride / SUMMED) - CHUNK / SUMMED;
                    sums[r] = with_group(sums[r], upper[r][0], lower[r][0], scale, zero, base, total[0]);
                    sums[r] = with_group(sums[r], upper[r][1], lower[r][1], second, second_zero, base, total[1]);
                    continue;
                }
                if (sets == 2) {
                    upper[r][0] = _mm512_add_epi32(upper[r][0], upper[r][1]);
                    lower[r][0] = _mm512_add_epi32(lower[r][0], lower[r][1]);
                }
                float total = group ? from.pairs[r * (from.stride / CHUNK) - 1] : totals[r];
                sums[r] = with_group(sums[r], upper[r][0], lower[r][0], scale, zero, base, total);
            }
            scale += small ? 2 * TILE : TILE;
            if (zero) zero += small ? 2 * TILE : TILE;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
        store_lanes(job, tile, row + r, _mm512_mul_ps(sums[r], _mm512_set1_ps(rows->steps[row + r])));
}

/* Four vectors of 16 weights, from one of the eight vectors of a chunk: its first inputs, second inputs and so on. */
INLINE VNNI void floats_of(enum code kind, const uint8_t *codes, int vector, __m512 table, __m512 *to) {
    if (kind == FLOAT_TABLE) {
        __m512i both = _mm512_loadu_si512(codes + vector / 2 * VECTOR);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            to[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 8 * i + vector % 2 * 4), table);
        return;
    }
    __m512i pairs = _mm512_loadu_si512(codes + vector * VECTOR);
    __m512i first = _mm512_slli_epi16(pairs, 8), second = pairs;
    if (kind == E4M3) {
        const __m512i kept = _mm512_set1_epi16((short)0xbf80);
        first = _mm512_and_si512(_mm512_srai_epi16(first, 1), kept);
        second = _mm512_and_si512(_mm512_srai_epi16(second, 1), kept);
    } else {
        second = _mm512_and_si512(second, _mm512_set1_epi16((short)0xff00));
    }
    to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(first));
    to[1] = _mm512_cvtph_ps(_mm512_castsi512_si256(second));
    to[2] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(first, 1));
    to[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(second, 1));
}

INLINE VNNI void code_float_block(enum code kind, const GroupedJob *job, const Run *run, int64_t tile, int64_t row, int count) {
    const Grouped *weight = job->weight;
    const uint8_t *at = run->tiles + tile * weight->tile_bytes;
    const int bytes = kind == FLOAT_TABLE ? 4 * VECTOR : 8 * VECTOR;
    const int64_t half = weight->group == CHUNK / 2;
    float scales[(MOST_GROUPS + 1) * TILE];
    __m512 table = _mm512_setzero_ps();
    if (kind == FLOAT_TABLE) table = _mm512_loadu_ps(weight->values);
    __m512 sums[4];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) sums[r] = _mm512_setzero_ps();
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, at, first);
        all_numbers(weight, &panel, scales, NULL);
        const float *scale = scales;
        int64_t vectors = parts_of(panel.inputs, CHUNK) * 8; /* of four inputs */
        int64_t each = half ? 4 : weight->group ? weight->group / 4 : vectors;
        for (int64_t begin = 0; begin < vectors; begin += each, scale += TILE) {
            int64_t end = begin + each < vectors ? begin + each : vectors;
            __m512 group[4][4];
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) group[r][i] = _mm512_setzero_ps();
            for (int64_t some = begin; some < end; some += 4) {
                const uint8_t *codes = panel.codes + some / 8 * bytes;
                const int later = some % 8 != 0;
                const float *given = job->rows + row * job->stride + first + some * 4;
                codes += later * (bytes / 2);
                fetch(codes + ahead, bytes / 2 / VECTOR, VECTOR);
#pragma GCC unroll 4
                for (int vector = 0; vector < 4; vector++) {
                    __m512 values[4];
                    floats_of(kind, codes, vector, table, values);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                        for (int r = 0; r < count; r++)
                            group[r][i] = _mm512_fmadd_ps(
                                values[i], _mm512_set1_ps(given[r * job->stride + vector * 4 + i]), group[r][i]);
                }
            }
            __m512 own = _mm512_loadu_ps(scale);
#pragma GCC unroll 4
            for (int r = 0; r < count; r++) {
                __m512 all = _mm512_add_ps(_mm512_add_ps(group[r][0], group[r][1]), _mm512_add_ps(group[r][2], group[r][3]));
                sums[r] = _mm512_fmadd_ps(own, all, sums[r]);
            }
        }
        at = end_of(weight, &panel);
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) store_lanes(job, tile, row + r, sums[r]);
}

/* Rows as sums of two bfloat16, in the bytes of the stride. */
VNNI static void split_rows(const Job *job, const Quantised *to) {
    for (int64_t row = 0; row < job->count; row++)
        for (int64_t i = 0; i < to->stride / 2; i += 16) {
            __m512i value = _mm512_castps_si512(_mm512_maskz_loadu_ps(some_of(job->inputs - i), job->rows + row * job->inputs + i));
            __m512i upper = _mm512_and_si512(value, _mm512_set1_epi32((int)0xffff0000));
            __m512i rest = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(value), _mm512_castsi512_ps(upper)));
            __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(value, 16));
            __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rest, 16));
            _mm256_storeu_si256((__m256i *)(to->high + row * to->stride + 2 * i), high);
            _mm256_storeu_si256((__m256i *)(to->low + row * to->stride + 2 * i), low);
        }
}

#ifdef HAVE_BFLOATS
INLINE VNNI __m512i eight_bytes(const int8_t *from) {
    int64_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi64(bytes);
}

/* For E4M3 codes that are not in pairs: the codes become bfloat16 numbers, which the CPU multiplies in pairs. */
INLINE BFLOATS void bfloat_block(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t tile, int64_t row, int count) {
    const Grouped *weight = job->weight;
    const uint8_t *at = run->tiles + tile * weight->tile_bytes;
    const int8_t *high = rows->high + row * rows->stride, *low = rows->low + row * rows->stride;
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512i table[2][2];
    for (int byte = 0; byte < 2; byte++)
        for (int half = 0; half < 2; half++) table[byte][half] = _mm512_loadu_si512(e4m3_bytes[byte] + half * VECTOR);
    float scales[(MOST_GROUPS + 1) * TILE];
    __m512 sums[4];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) sums[r] = _mm512_setzero_ps();
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, at, first);
        all_numbers(weight, &panel, scales, NULL);
        at = end_of(weight, &panel);
        const float *scale = scales;
        const int64_t each = weight->group ? weight->group / 4 * VECTOR : at - panel.codes;
        for (const uint8_t *codes = panel.codes; codes < at; scale += TILE) {
            const uint8_t *stop = codes + each < at ? codes + each : at;
            __m512 pairs[4][2][2];
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) pairs[r][half][0] = pairs[r][half][1] = _mm512_setzero_ps();
            for (; codes < stop; codes += VECTOR, high += 8, low += 8) {
                __m512i code = _mm512_loadu_si512(codes);
                fetch(codes + ahead, 1, VECTOR);
                __m512i lower = _mm512_permutex2var_epi8(table[0][0], code, table[0][1]);
                __m512i upper = _mm512_permutex2var_epi8(table[1][0], code, table[1][1]);
                upper = _mm512_ternarylogic_epi32(code, sign, upper, 0xea); /* code & sign | upper */
                const __m512bh values[2] = {(__m512bh)_mm512_unpacklo_epi8(lower, upper),
                                            (__m512bh)_mm512_unpackhi_epi8(lower, upper)};
#pragma GCC unroll 4
                for (int r = 0; r < count; r++)
#pragma GCC unroll 2
                    for (int half = 0; half < 2; half++) {
                        __m512 *sum = pairs[r][half];
                        sum[0] = _mm512_dpbf16_ps(sum[0], values[half], (__m512bh)eight_bytes(high + r * rows->stride));
                        sum[1] = _mm512_dpbf16_ps(sum[1], values[half], (__m512bh)eight_bytes(low + r * rows->stride));
                    }
            }
#pragma GCC unroll 4
            for (int r = 0; r < count; r++) {
                __m512 first = _mm512_add_ps(pairs[r][0][0], pairs[r][0][1]);
                __m512 second = _mm512_add_ps(pairs[r][1][0], pairs[r][1][1]);
                __m512 all = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x88), _mm512_shuffle_ps(first, second, 0xdd));
                sums[r] = _mm512_fmadd_ps(_mm512_loadu_ps(scale), all, sums[r]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) store_lanes(job, tile, row + r, sums[r]);
}

#endif

/* Calls `block` for four, two or one row at a time. */
#define FOR_ROWS(block, ...)                                              \
    for (int64_t tile = start; tile < end; tile++) {                         \
        int64_t row = run->row, last = run->row + run->count;                \
        for (; row + 4 <= last; row += 4) block(__VA_ARGS__, tile, row, 4); \
        if (row + 2 <= last) block(__VA_ARGS__, tile, row, 2), row += 2;  \
        if (row < last) block(__VA_ARGS__, tile, row, 1);                 \
    }

#define INTEGER_KERNEL(name, bits, table)                                                                                  \
    VNNI static void name(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) {            \
        if (job->weight->group == 16) {                                                                                    \
            FOR_ROWS(integer_block, bits, table, 16, job, rows, run)                                                       \
        } else if (job->weight->group == CHUNK) {                                                                          \
            FOR_ROWS(integer_block, bits, table, CHUNK, job, rows, run)                                                    \
        } else {                                                                                                           \
            FOR_ROWS(integer_block, bits, table, 0, job, rows, run)                                                        \
        }                                                                                                                  \
    }

#define FLOAT_KERNEL(name, kind)                                                                                           \
    VNNI static void name(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) {            \
        (void)rows;                                                                                                        \
        FOR_ROWS(code_float_block, kind, job, run)                                                                         \
    }

INTEGER_KERNEL(two_bits, 2, 0)
INTEGER_KERNEL(three_bits, 3, 0)
INTEGER_KERNEL(four_bits, 4, 0)
INTEGER_KERNEL(five_bits, 5, 0)
INTEGER_KERNEL(six_bits, 6, 0)
INTEGER_KERNEL(eight_bits, 8, 0)
INTEGER_KERNEL(table_bits, 4, 1)
FLOAT_KERNEL(float_table, FLOAT_TABLE)
FLOAT_KERNEL(e4m3, E4M3)
FLOAT_KERNEL(e5m2, E5M2)

#ifdef HAVE_BFLOATS
BFLOATS static void e4m3_bfloat(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) {
    FOR_ROWS(bfloat_block, job, rows, run)
}
#else
#define e4m3_bfloat e4m3
#endif

/* Converts rows to `numbers`, whose memory `prepare` has allocated. */
VNNI static void take_rows(enum taken taken, const float *rows, int64_t count, int64_t inputs, Quantised *numbers) {
    Job job = {.rows = rows, .count = count, .inputs = inputs};
    numbers->stride = padded(taken == AS_BFLOATS ? 2 * inputs : inputs);
    numbers->low = numbers->high + count * numbers->stride;
    if (taken == AS_INTEGERS) quantise_vnni(&job, numbers);
    if (taken == AS_BFLOATS) split_rows(&job, numbers);
}
#endif

#ifdef HAVE_VNNI
/* As `dequantise_plainly`, for groups of 16 inputs or more. */
VNNI static void dequantise_vnni(const Grouped *weight, const uint8_t *at, int64_t lane, int64_t lanes, float *to) {
    uint32_t runs[8][TILE], codes[TILE][8]; /* of four inputs */
    float scales[MOST_GROUPS * TILE], zeros[MOST_GROUPS * TILE];
    const __m512 offset = _mm512_set1_ps((float)weight->offset);
    const int plain = weight->code == PLAIN, subtracted = weight->zero == CODES, added = !subtracted && weight->zero != NONE;
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, at, first);
        numbers_plainly(weight, &panel, scales, zeros);
        for (int64_t begin = 0; begin < panel.inputs; begin += CHUNK) {
            chunk_codes(weight->bits, panel.codes + begin / CHUNK * VECTOR * weight->bits, runs);
            if (weight->pairs) {
                for (int64_t index = lane; index < lane + lanes; index++)
                    for (int half = 0; half < 16; half++)
                        ((uint16_t *)codes[index])[half] = ((const uint16_t *)runs[half / 2])[half % 2 * TILE + index];
            } else {
                for (int64_t index = lane; index < lane + lanes; index++)
                    for (int run = 0; run < 8; run++) codes[index][run] = runs[run][index];
            }
            for (int64_t some = begin; some < begin + CHUNK && some < panel.inputs; some += 16) {
                const float *scale = scales, *zero = zeros;
                if (weight->group) scale += some / weight->group * TILE, zero += some / weight->group * TILE;
                for (int64_t index = lane; index < lane + lanes; index++) {
                    __m512i code = _mm512_cvtepu8_epi32(sixteen_bytes((const uint8_t *)codes[index] + (some - begin)));
                    __m512 value = plain ? _mm512_sub_ps(_mm512_cvtepi32_ps(code), offset)
                                         : _mm512_i32gather_ps(code, weight->values, 4);
                    if (subtracted) value = _mm512_sub_ps(value, _mm512_set1_ps(zero[index]));
                    value = _mm512_mul_ps(value, _mm512_set1_ps(scale[index]));
                    if (added) value = _mm512_add_ps(value, _mm512_set1_ps(zero[index]));
                    float *row = to + (index - lane) * weight->inputs + first + some;
                    _mm512_mask_storeu_ps(row, some_of(panel.inputs - some), value);
                }
            }
        }
        at = end_of(weight, &panel);
    }
}
#endif

/* ---- running the kernels ---- */

typedef void (*GroupedKernel)(const GroupedJob *, const Quantised *, const Run *, int64_t, int64_t);

/* The kernels for one kind of instructions. Without a kernel, the plain loops run; floats have no plain loops, so torch
multiplies them. */
typedef struct {
    const char *name;
    int (*is_here)(void); /* whether this CPU has the instructions */
    void (*quantise)(const Job *, const Quantised *);
    void (*split)(const Job *, const Quantised *); /* for E4M3; NULL: E4M3 is multiplied with unconverted rows */
    Kernel floats[3];                              /* by `enum kind` */
    GroupedKernel plain[9];                        /* by bits */
    GroupedKernel coded[ANY + 1];                  /* by `enum code`; E4M3 in pairs */
    GroupedKernel bfloats;                         /* E4M3 that is not in pairs */
    int in_words;                                  /* whether FLOAT_TABLE is multiplied with integers */
    void (*dequantise)(const Grouped *, const uint8_t *, int64_t, int64_t, float *);
} Path;

static GroupedKernel kernel_of(const Path *path, const Grouped *weight) {
    GroupedKernel found = path->coded[weight->code];
    if (weight->code == PLAIN) found = path->plain[weight->bits];
    if (weight->code == E4M3 && !weight->pairs) found = path->bfloats;
    return found ? found : grouped_plainly;
}

/* Converts the rows of a job to the type that a kernel takes; allocates `numbers->high` if necessary. Returns 0 if
memory cannot be allocated. */
static int take(const Path *path, GroupedKernel kernel, const GroupedJob *job, Quantised *numbers) {
    const Grouped *weight = job->weight;
    const int integers = taken_by(weight) == AS_INTEGERS || (weight->code == FLOAT_TABLE && path->in_words);
    Job rows = {.rows = job->rows, .count = job->count, .inputs = job->stride}, room = rows;
    numbers->high = NULL;
    if (kernel == grouped_plainly || !(integers || (weight->code == E4M3 && path->split))) return 1;
    if (!integers) room.inputs *= 2;
    if (!prepare(&room, numbers)) return 0;
    (integers ? path->quantise : path->split)(&rows, numbers);
    return 1;
}

/* Joins neighbouring rows with the same expert to runs. Returns 0 for an unknown expert. */
static int find_runs(const uint8_t *tiles, int64_t expert_bytes, const int64_t *experts, int64_t held, int64_t count, Run *runs) {
    int many = 0;
    for (int64_t row = 0; row < count; row++) {
        if (experts[row] < 0 || experts[row] >= held) return 0;
        if (many && experts[row] == experts[row - 1])
            runs[many - 1].count++;
        else
            runs[many++] = (Run){.tiles = tiles + experts[row] * expert_bytes, .row = row, .count = 1};
    }
    return many;
}

typedef struct {
    GroupedKernel kernel;
    const GroupedJob *job;
    const Quantised *rows;
    const Run *runs;
    int64_t many, tiles, threads;
} TiledRuns;

static void run_some_tiles(const void *given, int64_t thread) {
    const TiledRuns *all = given;
    int64_t start = all->tiles * thread / all->threads, stop = all->tiles * (thread + 1) / all->threads;
    for (int64_t i = 0; i < all->many; i++) {
        Run some = all->runs[i];
        for (int64_t end = some.row + some.count; some.row < end; some.row += MOST_ROWS) {
            some.count = end - some.row < MOST_ROWS ? end - some.row : MOST_ROWS;
            all->kernel(all->job, all->rows, &some, start, stop);
        }
    }
}

/* Each thread computes the products of some of the tiles with all runs of rows. */
static void run_tiles(GroupedKernel kernel, const GroupedJob *job, const Quantised *rows, const Run *runs, int64_t many) {
    TiledRuns all = {kernel, job, rows, runs, many, parts_of(job->weight->outputs, TILE), job->threads < 1 ? 1 : job->threads};
    run_parts(run_some_tiles, &all, all.threads, all.threads);
}

#ifdef HAVE_VNNI
VNNI static void dequantise_groups_vnni(const Grouped *weight, const uint8_t *at, int64_t lane, int64_t lanes, float *to) {
    (weight->group == 8 ? dequantise_plainly : dequantise_vnni)(weight, at, lane, lanes, to);
}

#define AVX512                                                                                                            \
    .quantise = quantise_vnni, .floats = {float32_vnni, bfloat16_vnni, float16_vnni},                                     \
    .plain = {NULL, NULL, two_bits, three_bits, four_bits, five_bits, six_bits, NULL, eight_bits},                        \
    .coded = {[TABLE] = table_bits, [FLOAT_TABLE] = float_table, [E4M3] = e4m3, [E5M2] = e5m2},                           \
    .dequantise = dequantise_groups_vnni

static const Path avx512 = {.name = "avx512", .is_here = has_vnni, AVX512};
static const Path avx512_bf16 = {
    .name = "avx512-bf16", .is_here = has_bfloats, .split = split_rows, .bfloats = e4m3_bfloat, AVX512};

static int is_avx512(const Path *path) { return path == &avx512 || path == &avx512_bf16; }

/* The entry point for steps. */
INLINE void run_grouped(const GroupedJob *job, const Quantised *rows, const Run *runs, int64_t many, int plainly) {
    run_tiles(plainly ? grouped_plainly : kernel_of(&avx512_bf16, job->weight), job, rows, runs, many);
}
#else
static int is_avx512(const Path *path) { return (void)path, 0; }
#endif

#endif
