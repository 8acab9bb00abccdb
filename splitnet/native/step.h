/* Runs new positions through blocks with the usual parts; see splitnet/blocks/fast/native_step.py. Computations are in
float32. Keys and values are stored in the span's type, float32 or bfloat16, or as float16, or in the codes of
splitnet/blocks/kv_form.py. */

#ifndef SPLITNET_STEP_H
#define SPLITNET_STEP_H

#include "grouped.h"

#ifdef HAVE_VNNI

/* All fields have 8 bytes: Python writes them as a list of numbers. */
typedef struct {
    int64_t kind;
    const void *weights;
    const Grouped *description; /* for GROUPED */
    const float *bias;  /* or NULL */
    int64_t inputs, outputs;
} Matrix;

enum norm { NO_NORM, RMS_NORM, LAYER_NORM };

typedef struct {
    int64_t kind; /* enum norm */
    const float *weight, *bias; /* `bias` may be NULL */
    int64_t stride; /* distance between the weights of two heads; 0: all heads have the same weight */
    double epsilon;
} Norm;

enum activation { SILU, GELU, GELU_TANH, GELU_QUICK, RELU, RELU_SQUARED, XIELU };

typedef struct {
    Norm before, after;   /* of the input and the output of attention */
    Norm between, behind; /* of the input and the output of the MLP */
    Norm query_norm, key_norm;
    int64_t parallel;       /* the MLP has the input of attention, perhaps with another norm; otherwise the output of attention */
    double residual;        /* factor of the outputs of attention and MLP before they are added */
    const float *sinks;     /* per head, a logit that takes part in the softmax without a value; or NULL */
    const float *slopes;    /* per head, added to a logit for every position (ALiBi); or NULL */
    /* If `query` computes all three: the places of the heads of query, key and value in its output; else NULL */
    const int64_t *places;
    double scale, cap, clip; /* factor of logits, their soft limit, and the limit of the numbers of heads; 0: no limit */
    int64_t heads, stored_heads, size;
    int64_t value_size; /* of the output of attention, per head */
    int64_t rank;       /* number of latents from which keys and values are computed, or 0 */
    int64_t absorbed;   /* latents are stored in place of keys, and the rotated part of keys in place of values */
    int64_t window; /* positions that a position sees, or 0: all */
    int64_t joined; /* query_norm and key_norm normalise all heads together */
    int64_t late;   /* query_norm and key_norm come after the rotary embedding */
    int64_t rope;   /* index of the rotary embedding, or -1 */
    int64_t activation;
    double shape[4]; /* of XIELU: alpha of positive numbers, alpha of other numbers, beta, and the upper limit for the latter */
    Matrix query, key, value, out; /* `query` computes all three if there are `places` */
    /* The MLP of all positions; without weights in blocks with experts alone. If only `up` is missing, `gate` has its
    outputs, too; if only `gate` is missing, there is no gate */
    Matrix gate, up, down;
    Matrix opener; /* one output, whose sigmoid scales the MLP's output; or without weights */
    Norm lowered_norm, latent_norm;
    Matrix lowered; /* the normed output is the input of `query`; without weights, `query` has the input of attention */
    Matrix latent;  /* gives the latents, before the norm, and the rotated part of keys, which all heads share */
    Matrix expand;  /* computes, by head, the rest of the key and the value; in floats if latents are stored */
    int64_t experts, chosen; /* 0: there are none */
    int64_t sigmoid;         /* scores are sigmoids of logits; otherwise the softmax of the logits */
    int64_t normalised;      /* the shares of the chosen experts add up to one */
    int64_t groups, kept;    /* experts are chosen from the `kept` best groups */
    int64_t judges;          /* how many of a group's best scores are summed to rank the group: one or two */
    int64_t interleaved;     /* gate and up of an expert are interleaved; otherwise the gate comes first */
    const float *correction; /* added to scores for the choice alone, or NULL */
    double factor;           /* factor of shares */
    double alpha, limit, shift; /* (up + shift) * gate * sigmoid(alpha * gate), with gate and up limited by `limit` */
    Matrix router, inner, outer; /* the biases of the last two are [experts, outputs] */
} Block;

/* The memory of a block for keys and values of a position's sequence: [stored heads, capacity, size] each. With codes,
`near_keys` and `near_values` are [stored heads, SINKS + RING, size], in full, in the span's type: the first positions,
followed by the ring, which has the positions from `near_from` on that are among the last WINDOW positions. */
typedef struct {
    void *keys, *values;
    int64_t capacity;
    void *near_keys, *near_values;
    int64_t near_from;
} Store;

/* The types of stored numbers; with codes, the scales of a head follow its codes. */
enum stored { KV_BFLOAT16, KV_FLOAT32, KV_FLOAT16, KV_BYTES, KV_NIBBLES };

#define SINKS 4
#define WINDOW 64
#define RING 128

typedef struct {
    float *hidden; /* [count, width], overwritten with the output */
    int64_t count;
    const int64_t *indices; /* of the positions, in their stores */
    const float *cosines, *sines; /* [ropes, count, half] */
    int64_t half;    /* half of the rotated numbers of a head: its first numbers, or with latents its last numbers */
    /* Where the two numbers of a rotated pair lie: APART, half of the rotated numbers are between them; ADJACENT, side by
    side; PARTED, side by side before the rotation, apart after it */
    enum { APART, ADJACENT, PARTED } order;
    int stores_floats; /* float32, else bfloat16 */
    enum stored keys_as, values_as; /* either both are codes, or neither is */
    int threads;
} Step;

/* `bits`: 16 for float16, 8 or 4 for codes, 0 for the type of blocks. */
static enum stored stored_by(long long bits, int floats) {
    return bits == 16 ? KV_FLOAT16 : bits == 8 ? KV_BYTES : bits ? KV_NIBBLES : floats ? KV_FLOAT32 : KV_BFLOAT16;
}

/* The exponential function of the Cephes library; the error is one unit in the last place. */
INLINE VNNI __m512 exponential(__m512 x) {
    const __m512 most = _mm512_set1_ps(88.0f), least = _mm512_set1_ps(-103.0f);
    x = _mm512_max_ps(least, _mm512_min_ps(most, x)); /* this order keeps NaN */
    __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.0000001201e-1f));
    sum = _mm512_fmadd_ps(_mm512_mul_ps(rest, rest), sum, _mm512_add_ps(rest, _mm512_set1_ps(1)));
    return _mm512_scalef_ps(sum, twos);
}

INLINE VNNI __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

INLINE VNNI __m512 tangent(__m512 x) { /* the hyperbolic tangent */
    return _mm512_fmsub_ps(_mm512_set1_ps(2), sigmoid(_mm512_add_ps(x, x)), _mm512_set1_ps(1));
}

/* Normalises one head or several; `head`: the index of the first head. */
INLINE VNNI void normalise(const Norm *norm, const float *from, float *to, int64_t width, int64_t head) {
    const float *weight = norm->weight + head * norm->stride;
    __m512 squares = _mm512_setzero_ps(), mean = _mm512_setzero_ps();
    if (norm->kind == LAYER_NORM) {
        for (int64_t i = 0; i < width; i += 16) mean = _mm512_add_ps(mean, _mm512_maskz_loadu_ps(some_of(width - i), from + i));
        mean = _mm512_set1_ps(_mm512_reduce_add_ps(mean) / (float)width);
    }
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 mask = some_of(width - i);
        __m512 values = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, from + i), mean);
        squares = _mm512_fmadd_ps(values, values, squares);
    }
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + (float)norm->epsilon));
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 mask = some_of(width - i);
        __m512 values = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, from + i), mean), factor);
        values = _mm512_mul_ps(values, _mm512_maskz_loadu_ps(mask, weight + i));
        if (norm->bias) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, norm->bias + head * norm->stride + i));
        _mm512_mask_storeu_ps(to + i, mask, values);
    }
}

VNNI static void normalise_rows(const Norm *norm, const float *from, float *to, int64_t rows, int64_t width) {
    if (norm->kind == NO_NORM && from != to) memcpy(to, from, rows * width * sizeof(float));
    for (int64_t row = 0; norm->kind != NO_NORM && row < rows; row++)
        normalise(norm, from + row * width, to + row * width, width, 0);
}

/* Rotary embedding (Su et al., "RoFormer", arXiv:2104.09864). */
INLINE VNNI void turn(float *head, const float *cosines, const float *sines, const Step *step) {
    int64_t half = step->half;
    if (step->order != APART) {
        int parted = step->order == PARTED;
        float seconds[half + 1];
        for (int64_t i = 0; i < half; i++) {
            float first = head[2 * i], second = head[2 * i + 1];
            seconds[i] = second * cosines[i] + first * sines[i];
            head[parted ? i : 2 * i] = first * cosines[i] - second * sines[i];
        }
        for (int64_t i = 0; i < half; i++) head[parted ? half + i : 2 * i + 1] = seconds[i];
        return;
    }
    for (int64_t i = 0; i < half; i += 16) {
        __mmask16 mask = some_of(half - i);
        __m512 first = _mm512_maskz_loadu_ps(mask, head + i), second = _mm512_maskz_loadu_ps(mask, head + half + i);
        __m512 cosine = _mm512_maskz_loadu_ps(mask, cosines + i), sine = _mm512_maskz_loadu_ps(mask, sines + i);
        _mm512_mask_storeu_ps(head + i, mask, _mm512_fmsub_ps(first, cosine, _mm512_mul_ps(second, sine)));
        _mm512_mask_storeu_ps(head + half + i, mask, _mm512_fmadd_ps(second, cosine, _mm512_mul_ps(first, sine)));
    }
}

INLINE VNNI __m512 stored(const void *from, int64_t at, enum stored kind) {
    if (kind == KV_FLOAT32) return _mm512_loadu_ps((const float *)from + at);
    __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at));
    if (kind == KV_FLOAT16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE VNNI void store(void *to, int64_t at, const float *values, int64_t size, enum stored kind) {
    if (kind == KV_FLOAT32) {
        memcpy((float *)to + at, values, size * sizeof(float));
        return;
    }
    for (int64_t i = 0; kind == KV_FLOAT16 && i < size; i += 16) {
        __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256((__m256i *)((uint16_t *)to + at + i), halves);
    }
    for (int64_t i = 0; kind == KV_BFLOAT16 && i < size; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        int special = (bits & 0x7f800000) == 0x7f800000; /* infinity or NaN, which rounding could change to a number */
        ((uint16_t *)to)[at + i] = (bits + (special ? 0 : 0x7fff + (bits >> 16 & 1))) >> 16;
    }
}

/* ---- codes of keys and values: see splitnet/blocks/kv_form.py ---- */

static const float kv_levels[16] = {-2.7326f, -2.0690f, -1.6180f, -1.2562f, -0.9424f, -0.6568f, -0.3881f, -0.1284f,
                                    0.1284f,  0.3881f,  0.6568f,  0.9424f,  1.2562f,  1.6180f,  2.0690f,  2.7326f};

static int64_t kv_group(int64_t size, enum stored kind) {
    int64_t block = size & -size, most = kind == KV_BYTES ? 64 : 32;
    return block < most ? block : most;
}

static int64_t kv_code_bytes(int64_t size, enum stored kind) { return kind == KV_BYTES ? size : size / 2; }

static int is_coded(enum stored kind) { return kind >= KV_BYTES; }

/* Bytes of one head's key or value in one position. */
static int64_t kv_bytes(int64_t size, enum stored kind) {
    if (!is_coded(kind)) return size * (kind == KV_FLOAT32 ? 4 : 2);
    return kv_code_bytes(size, kind) + 2 * (size / kv_group(size, kind));
}

/* Multiplies by a Hadamard matrix, in blocks of a power of two. */
INLINE VNNI void turn_by_hadamard(float *numbers, int64_t size) {
    int64_t block = size & -size;
    for (int64_t half = 1; half < block; half *= 2)
        for (int64_t begin = 0; begin < size; begin += 2 * half)
            for (int64_t i = begin; i < begin + half; i++) {
                float first = numbers[i], second = numbers[i + half];
                numbers[i] = first + second, numbers[i + half] = first - second;
            }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)block));
    for (int64_t i = 0; i < size; i += 16)
        _mm512_storeu_ps(numbers + i, _mm512_mul_ps(_mm512_loadu_ps(numbers + i), scale));
}

INLINE VNNI float half_at(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, sizeof half);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}

INLINE VNNI void set_half(uint8_t *at, float value) {
    uint16_t half = (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT));
    memcpy(at, &half, sizeof half);
}

/* Encodes rotated numbers. An infinite or NaN scale makes its whole group NaN, so that errors show. */
VNNI static void encode(const float *numbers, int64_t size, enum stored kind, uint8_t *to) {
    int64_t group = kv_group(size, kind), half = size / 2;
    uint8_t *scales = to + kv_code_bytes(size, kind);
    if (kind == KV_NIBBLES) memset(to, 0, half);
    for (int64_t begin = 0; begin < size; begin += group, scales += 2) {
        const float *from = numbers + begin;
        __m512 most = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < group; i += 16) {
            __m512 values = _mm512_loadu_ps(from + i);
            most = _mm512_max_ps(most, _mm512_abs_ps(values));
            squares = _mm512_fmadd_ps(values, values, squares);
        }
        float sum = _mm512_reduce_add_ps(squares);
        if (kind == KV_BYTES) {
            /* The maximum ignores NaN, so `sum` detects it */
            set_half(scales, sum - sum != 0 ? NAN : _mm512_reduce_max_ps(most) / 127);
            float scale = half_at(scales);
            __m512 unit = _mm512_set1_ps(scale > 0x1p-24f ? scale : 0x1p-24f);
            const __m512i limit = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127);
            for (int64_t i = 0; i < group; i += 16) {
                __m512i codes = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(from + i), unit));
                codes = _mm512_max_epi32(least, _mm512_min_epi32(limit, codes));
                _mm_storeu_si128((__m128i *)(to + begin + i), _mm512_cvtepi32_epi8(codes));
            }
            continue;
        }
        float root = sqrtf(sum / (float)group);
        __m512 unit = _mm512_set1_ps(root > 1e-30f ? root : 1e-30f);
        __m512 products = _mm512_setzero_ps(), chosen = _mm512_setzero_ps(), levels = _mm512_loadu_ps(kv_levels);
        for (int64_t i = 0; i < group; i += 16) {
            __m512 values = _mm512_loadu_ps(from + i), scaled = _mm512_div_ps(values, unit);
            __m512i codes = _mm512_setzero_si512();
            for (int level = 0; level < 15; level++) {
                __m512 edge = _mm512_set1_ps((kv_levels[level] + kv_levels[level + 1]) / 2);
                codes = _mm512_mask_add_epi32(codes, _mm512_cmp_ps_mask(scaled, edge, _CMP_GT_OQ), codes, _mm512_set1_epi32(1));
            }
            __m512 level = _mm512_permutexvar_ps(codes, levels);
            products = _mm512_fmadd_ps(values, level, products), chosen = _mm512_fmadd_ps(level, level, chosen);
            int64_t at = begin + i, upper = at >= half;
            uint8_t *place = to + at - (upper ? half : 0);
            __m128i bytes = _mm512_cvtepi32_epi8(upper ? _mm512_slli_epi32(codes, 4) : codes);
            _mm_storeu_si128((__m128i *)place, _mm_or_si128(bytes, _mm_loadu_si128((const __m128i *)place)));
        }
        set_half(scales, _mm512_reduce_add_ps(products) / _mm512_reduce_add_ps(chosen));
    }
}

/* Decodes numbers, which stay rotated. */
INLINE VNNI void decode(const uint8_t *codes, int64_t size, enum stored kind, float *to) {
    int64_t shift = __builtin_ctzll(kv_group(size, kind)), groups = size >> shift, half = size / 2;
    const uint8_t *halves = codes + kv_code_bytes(size, kind);
    float scales[groups + 15];
    for (int64_t i = 0; i < groups; i += 16)
        _mm512_storeu_ps(scales + i, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some_of(groups - i), halves + 2 * i)));
    if (kind == KV_BYTES) {
        for (int64_t i = 0; i < size; i += 16) {
            __m512i numbers = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
            _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_cvtepi32_ps(numbers), _mm512_set1_ps(scales[i >> shift])));
        }
        return;
    }
    __m512 levels = _mm512_loadu_ps(kv_levels);
    for (int64_t i = 0; i < half; i += 16) {
        __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
        __m512 lower = _mm512_permutexvar_ps(both, levels), upper = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), levels);
        /* Shuffles use only the lowest four bits of a code */
        _mm512_storeu_ps(to + i, _mm512_mul_ps(lower, _mm512_set1_ps(scales[i >> shift])));
        _mm512_storeu_ps(to + half + i, _mm512_mul_ps(upper, _mm512_set1_ps(scales[(half + i) >> shift])));
    }
}

/* Keys, in one part or two, and values of the stored head that some query heads share. */
typedef struct {
    const void *keys, *rests, *values; /* `rests` may be NULL */
    int64_t size, rest, value_size; /* numbers per head of each */
    int64_t first;                  /* index of the sequence's first position in these */
    const void *near_keys, *near_values; /* with codes: positions in full of this head, as in `Store` */
    int64_t near_from;
    enum stored near_kind;
} Seen;

/* Maximum positions whose keys or values are read at a time. */
#define LINES 16

/* Reads `count` rows of `size` numbers from `first` on, at most LINES, padded with zeros to LINES rows. `room`: memory for
LINES rows. */
INLINE VNNI const float *read_lines(const void *from, int64_t first, int64_t count, int64_t size, float *room, enum stored kind) {
    int64_t bytes = kv_bytes(size, kind);
    fetch((const char *)from + first * bytes + ahead, parts_of(LINES * bytes, VECTOR), VECTOR);
    if (kind == KV_FLOAT32 && count == LINES) return (const float *)from + first * size;
    for (int64_t line = 0; is_coded(kind) && line < count; line++)
        decode((const uint8_t *)from + (first + line) * bytes, size, kind, room + line * size);
    for (int64_t i = 0; !is_coded(kind) && i < count * size; i += 16)
        _mm512_storeu_ps(room + i, stored(from, first * size + i, kind));
    memset(room + count * size, 0, (LINES - count) * size * sizeof(float));
    return room;
}

/* Replaces decoded positions in `room`, which begins with position `first`, by positions in full. */
INLINE VNNI void read_near(const Seen *seen, const void *in_full, int64_t first, int64_t count, int64_t size, int64_t from,
                           float *room) {
    int64_t since = from + 1 - WINDOW > seen->near_from ? from + 1 - WINDOW : seen->near_from;
    if (first >= SINKS && first + count <= since) return;
    for (int64_t index = first; index < first + count; index++) {
        int64_t place = index < SINKS ? index : SINKS + index % RING;
        for (int64_t i = 0; (index < SINKS || index >= since) && i < size; i += 16)
            _mm512_storeu_ps(room + (index - first) * size + i, stored(in_full, place * size + i, seen->near_kind));
    }
}

/* The sum of the numbers of each of 16 vectors. */
INLINE VNNI __m512 sum_each(__m512 *sums) {
    const __m512i evens = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i odds = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    __m512 fours[4];
    for (int64_t i = 0; i < 4; i++) { /* for each four vectors, every lane has one number of each */
        __m512 *of = sums + 4 * i;
        __m512 one = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
        __m512 two = _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
        fours[i] = _mm512_add_ps(_mm512_shuffle_ps(one, two, 0x44), _mm512_shuffle_ps(one, two, 0xee));
    }
    for (int64_t i = 0; i < 4; i += 2)
        fours[i] = _mm512_add_ps(_mm512_permutex2var_ps(fours[i], evens, fours[i + 1]),
                                 _mm512_permutex2var_ps(fours[i], odds, fours[i + 1]));
    return _mm512_add_ps(_mm512_permutex2var_ps(fours[0], evens, fours[2]), _mm512_permutex2var_ps(fours[0], odds, fours[2]));
}

/* A part of the positions that a position sees. The results of all parts are merged as in Dao et al., "Flash-Decoding". */
typedef struct {
    int64_t begin, end, from; /* positions; `from` is the position that sees the part */
} Reach;

#define PARTS 16     /* maximum number of parts per position, each of LEAST_PART positions or more */
#define LEAST_PART 1024

/* Positions per part, independent of the number of threads, so that sums are always the same. */
INLINE int64_t part_of(int64_t reach) {
    int64_t part = LEAST_PART;
    while (part * PARTS < reach) part *= 2;
    return part;
}

/* Attention of the `group` query heads from `head` on to a part. `mixed`: weighted sums of values, with weights relative to
the largest logit. `found`: [heads, 2]: the largest logit and the sum of the weights. `room`: memory for LINES keys or
values, followed by scores, [heads, positions of the part in whole LINES]. */
INLINE VNNI void attend(const Block *block, const Seen *seen, const Reach *reach, int64_t head, int64_t group,
                        const float *queries, float *mixed, float *found, float *room, enum stored keys_as,
                        enum stored values_as) {
    int64_t size = seen->size, rest = seen->rest, width = seen->value_size, count = reach->end - reach->begin;
    int64_t first = seen->first + reach->begin, pitch = parts_of(count, LINES) * LINES;
    float *more = room + LINES * size, *scores = room + LINES * (size + rest > width ? size + rest : width);
    __m512 scale = _mm512_set1_ps((float)block->scale), cap = _mm512_set1_ps((float)block->cap);
    for (int64_t index = 0; index < count; index += LINES) {
        int64_t lines = count - index < LINES ? count - index : LINES;
        const float *keys = read_lines(seen->keys, first + index, lines, size, room, keys_as), *rests = NULL;
        if (is_coded(keys_as)) read_near(seen, seen->near_keys, reach->begin + index, lines, size, reach->from, room);
        if (rest) rests = read_lines(seen->rests, first + index, lines, rest, more, keys_as);
        for (int64_t query = 0; query < group; query++) {
            const float *own = queries + query * (size + rest);
            __m512 sums[LINES];
            for (int64_t line = 0; line < LINES; line++) sums[line] = _mm512_setzero_ps();
            for (int64_t i = 0; i < size; i += 16) {
                __m512 part = _mm512_loadu_ps(own + i);
                _Pragma("GCC unroll 16") for (int64_t line = 0; line < LINES; line++)
                    sums[line] = _mm512_fmadd_ps(part, _mm512_loadu_ps(keys + line * size + i), sums[line]);
            }
            for (int64_t i = 0; i < rest; i += 16) {
                __m512 part = _mm512_loadu_ps(own + size + i);
                _Pragma("GCC unroll 16") for (int64_t line = 0; line < LINES; line++)
                    sums[line] = _mm512_fmadd_ps(part, _mm512_loadu_ps(rests + line * rest + i), sums[line]);
            }
            _mm512_storeu_ps(scores + query * pitch + index, sum_each(sums));
        }
    }
    for (int64_t query = 0; query < group; query++) {
        float *score = scores + query * pitch;
        if (block->cap > 0)
            for (int64_t i = 0; i < count; i += 16) {
                __m512 part = _mm512_div_ps(_mm512_mul_ps(_mm512_loadu_ps(score + i), scale), cap);
                _mm512_storeu_ps(score + i, _mm512_div_ps(_mm512_mul_ps(tangent(part), cap), scale));
            }
        if (block->slopes)
            for (int64_t i = 0; i < count; i++)
                score[i] += block->slopes[head + query] / (float)block->scale * (float)(reach->begin + i - reach->from);
        __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16)
            most = _mm512_mask_max_ps(most, some_of(count - i), most, _mm512_mul_ps(_mm512_loadu_ps(score + i), scale));
        __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        for (int64_t i = 0; i < count; i += 16) {
            __m512 weight = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(score + i), scale, largest));
            weight = _mm512_maskz_mov_ps(some_of(count - i), weight);
            total = _mm512_add_ps(total, weight);
            _mm512_storeu_ps(score + i, weight);
        }
        found[2 * query] = _mm512_cvtss_f32(largest);
        found[2 * query + 1] = _mm512_reduce_add_ps(total);
    }
    memset(mixed, 0, group * width * sizeof(float));
    for (int64_t index = 0; index < count; index += LINES) {
        int64_t lines = count - index < LINES ? count - index : LINES;
        const float *values = read_lines(seen->values, first + index, lines, width, room, values_as);
        if (is_coded(values_as)) read_near(seen, seen->near_values, reach->begin + index, lines, width, reach->from, room);
        for (int64_t query = 0; query < group; query++)
            for (int64_t i = 0; i < width; i += 64) {
                __m512 sums[4];
                float *to = mixed + query * width + i;
                int64_t vectors = width - i >= 64 ? 4 : (width - i) / 16;
                if (vectors == 4) {
                    for (int64_t vector = 0; vector < 4; vector++) sums[vector] = _mm512_loadu_ps(to + vector * 16);
                    _Pragma("GCC unroll 16") for (int64_t line = 0; line < LINES; line++) {
                        __m512 weight = _mm512_set1_ps(scores[query * pitch + index + line]);
                        _Pragma("GCC unroll 4") for (int64_t vector = 0; vector < 4; vector++)
                            sums[vector] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(values + line * width + i + vector * 16), sums[vector]);
                    }
                    for (int64_t vector = 0; vector < 4; vector++) _mm512_storeu_ps(to + vector * 16, sums[vector]);
                    continue;
                }
                for (int64_t vector = 0; vector < vectors; vector++) {
                    __m512 sum = _mm512_loadu_ps(to + vector * 16);
                    for (int64_t line = 0; line < LINES; line++)
                        sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[query * pitch + index + line]),
                                              _mm512_loadu_ps(values + line * width + i + vector * 16), sum);
                    _mm512_storeu_ps(to + vector * 16, sum);
                }
            }
    }
}

/* Merges the results of all parts for a query head into the first one; parts have a distance of `stride` numbers of `mixed`
and `pairs` numbers of `found`. */
VNNI static void join_parts(const Block *block, int64_t head, int64_t parts, int64_t width, float *mixed, int64_t stride,
                            const float *found, int64_t pairs) {
    float sink = block->sinks ? block->sinks[head] : -INFINITY, largest = sink, total = 0;
    for (int64_t part = 0; part < parts; part++) largest = found[part * pairs] > largest ? found[part * pairs] : largest;
    float factors[PARTS];
    for (int64_t part = 0; part < parts; part++) {
        factors[part] = expf(found[part * pairs] - largest);
        total += factors[part] * found[part * pairs + 1];
    }
    if (block->sinks) total += expf(sink - largest);
    for (int64_t i = 0; i < width; i += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t part = 0; part < parts; part++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(factors[part] / total), _mm512_loadu_ps(mixed + part * stride + i), sum);
        _mm512_storeu_ps(mixed + i, sum);
    }
}

/* Rows of floats, `width` numbers each, that are summed at a time. */
#define ROWS 4

/* The sum of rows, each times its factor. */
INLINE VNNI void add_rows(const void *rows, int64_t at, int64_t count, int64_t width, const float *factors, float *sums, int floats) {
    memset(sums, 0, width * sizeof(float));
    for (int64_t row = 0; row < count; row += ROWS)
        for (int64_t i = 0; i < width; i += 16) {
            __m512 sum = _mm512_loadu_ps(sums + i);
            for (int64_t one = row; one < row + ROWS; one++)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(factors[one]), stored(rows, at + one * width + i, floats), sum);
            _mm512_storeu_ps(sums + i, sum);
        }
}

/* The products of rows with one vector. */
INLINE VNNI void multiply_rows(const void *rows, int64_t at, int64_t count, int64_t width, const float *vector, float *products,
                               int floats) {
    for (int64_t row = 0; row < count; row += ROWS) {
        __m512 sums[ROWS] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < width; i += 16) {
            __m512 part = _mm512_loadu_ps(vector + i);
            for (int64_t one = 0; one < ROWS; one++)
                sums[one] = _mm512_fmadd_ps(part, stored(rows, at + (row + one) * width + i, floats), sums[one]);
        }
        for (int64_t one = 0; one < ROWS; one++) products[row + one] = _mm512_reduce_add_ps(sums[one]);
    }
}

/* Products of the same rows with several matrices; each conversion of the rows is done once. */
INLINE VNNI void multiply(const Matrix *const *matrices, float *const *products, int many, const float *rows,
                          const Quantised *room, const Step *step) {
    static const Kernel kernels[] = {float32_vnni, bfloat16_vnni, float16_vnni};
    enum taken taken = AS_FLOATS;
    Quantised numbers = *room;
    for (int index = 0; index < many; index++) {
        const Matrix *matrix = matrices[index];
        Job job = {
            .weights = matrix->weights,
            .rows = rows,
            .products = products[index],
            .count = step->count,
            .inputs = matrix->inputs,
            .outputs = matrix->outputs,
            .threads = step->threads,
        };
        const Grouped *weight = matrix->kind == GROUPED ? matrix->description : NULL;
        enum taken wanted = weight != NULL ? taken_by(weight) : AS_FLOATS;
        if (wanted != AS_FLOATS && wanted != taken) take_rows(taken = wanted, rows, job.count, job.inputs, &numbers);
        if (weight != NULL) {
            GroupedJob grouped = {
                .weight = weight,
                .rows = rows,
                .products = job.products,
                .count = job.count,
                .stride = job.inputs,
                .pitch = job.outputs,
                .threads = job.threads,
            };
            Run all = {.tiles = matrix->weights, .row = 0, .count = job.count};
            run_grouped(&grouped, &numbers, &all, 1, 0);
        } else {
            run(kernels[matrix->kind], &job, &numbers, job.outputs, BLOCK);
        }
        if (matrix->bias != NULL)
            for (int64_t row = 0; row < job.count; row++)
                for (int64_t i = 0; i < job.outputs; i++) job.products[row * job.outputs + i] += matrix->bias[i];
    }
}

INLINE VNNI void add(float *to, const float *from, int64_t count, float share) {
    __m512 factor = _mm512_set1_ps(share);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 mask = some_of(count - i);
        __m512 sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, from + i), factor, _mm512_maskz_loadu_ps(mask, to + i));
        _mm512_mask_storeu_ps(to + i, mask, sum);
    }
}

/* The error function by 7.1.26 of Abramowitz and Stegun, "Handbook of Mathematical Functions": within 1.5e-7. */
INLINE VNNI __m512 error_function(__m512 x) {
    const __m512 one = _mm512_set1_ps(1), size = _mm512_abs_ps(x);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), size, one));
    __m512 sum = _mm512_set1_ps(1.061405429f);
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
    sum = _mm512_mul_ps(_mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f)), t);
    __m512 found = _mm512_fnmadd_ps(sum, exponential(_mm512_fnmadd_ps(x, x, _mm512_setzero_ps())), one);
    return _mm512_mask_sub_ps(found, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps(), found);
}

/* Expert Curvature-adapted ELU (Huang and Schlag, "Deriving Activation Functions Using Integration", arXiv:2411.13010). */
INLINE VNNI __m512 xielu(__m512 x, const double *shape) {
    __m512 linear = _mm512_mul_ps(x, _mm512_set1_ps((float)shape[2])), positive = _mm512_set1_ps((float)shape[0]);
    __m512 bent = exponential(_mm512_min_ps(_mm512_set1_ps((float)shape[3]), x));
    bent = _mm512_sub_ps(_mm512_sub_ps(bent, _mm512_set1_ps(1)), x);
    bent = _mm512_fmadd_ps(bent, _mm512_set1_ps((float)shape[1]), linear);
    __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_mov_ps(bent, above, _mm512_fmadd_ps(_mm512_mul_ps(positive, x), x, linear));
}

INLINE VNNI __m512 activate(__m512 x, enum activation kind, const double *shape) {
    const __m512 half = _mm512_set1_ps(0.5f), nothing = _mm512_setzero_ps();
    switch (kind) {
    case GELU: {
        __m512 error = error_function(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
        return _mm512_mul_ps(_mm512_mul_ps(x, half), _mm512_add_ps(error, _mm512_set1_ps(1)));
    }
    case GELU_TANH: {
        __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1));
        return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(_mm512_mul_ps(x, inner), _mm512_set1_ps(1.59576912f))));
    }
    case GELU_QUICK: return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(x, _mm512_set1_ps(1.702f))));
    case RELU: return _mm512_max_ps(nothing, x); /* this order keeps NaN */
    case RELU_SQUARED: return _mm512_mul_ps(_mm512_max_ps(nothing, x), _mm512_max_ps(nothing, x));
    case XIELU: return xielu(x, shape);
    default: return _mm512_mul_ps(x, sigmoid(x));
    }
}

/* The activation of the gate, times `up`; alone if `up` is NULL. `to` may be `gate`. */
INLINE VNNI void open_as(const float *gate, const float *up, float *to, int64_t count, enum activation kind, const double *shape) {
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 mask = some_of(count - i);
        __m512 value = activate(_mm512_maskz_loadu_ps(mask, gate + i), kind, shape);
        if (up != NULL) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(to + i, mask, value);
    }
}

VNNI static void open_gate(const Block *block, const float *gate, const float *up, float *to, int64_t count) {
    switch (block->activation) { /* so that the compiler knows the kind */
    case SILU: open_as(gate, up, to, count, SILU, NULL); break;
    case GELU: open_as(gate, up, to, count, GELU, NULL); break;
    case GELU_TANH: open_as(gate, up, to, count, GELU_TANH, NULL); break;
    default: open_as(gate, up, to, count, (enum activation)block->activation, block->shape);
    }
}

/* The gating of an expert, as the family defines gating. `inner`: gate and up of the expert. */
VNNI static void open_expert(const Block *block, const float *inner, float *gated, int64_t count) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 limit = _mm512_set1_ps((float)block->limit), least = _mm512_set1_ps(-(float)block->limit);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 mask = some_of(count - i);
        __m512 gate, up;
        if (block->interleaved) {
            __m512 first = _mm512_maskz_loadu_ps(some_of(2 * (count - i)), inner + 2 * i);
            __m512 second = _mm512_maskz_loadu_ps(some_of(2 * (count - i) - 16), inner + 2 * i + 16);
            gate = _mm512_permutex2var_ps(first, evens, second);
            up = _mm512_permutex2var_ps(first, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), second);
        } else {
            gate = _mm512_maskz_loadu_ps(mask, inner + i), up = _mm512_maskz_loadu_ps(mask, inner + count + i);
        }
        gate = _mm512_min_ps(limit, gate), up = _mm512_max_ps(least, _mm512_min_ps(limit, up)); /* this order keeps NaN */
        gate = _mm512_mul_ps(gate, sigmoid(_mm512_mul_ps(gate, _mm512_set1_ps((float)block->alpha))));
        gate = _mm512_mul_ps(gate, _mm512_add_ps(up, _mm512_set1_ps((float)block->shift)));
        _mm512_mask_storeu_ps(gated + i, mask, gate);
    }
}

/* A position of an expert, and the share of the expert's output. */
typedef struct {
    int64_t position;
    float share;
} Chosen;

INLINE VNNI int64_t best_of(const float *values, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++) best = values[i] > values[best] ? i : best;
    return best;
}

/* Excludes all groups of experts except the `kept` best groups. A group's rank is the sum of its best or two best scores. */
static void keep_groups(const Block *block, float *scores) {
    int64_t size = block->experts / block->groups;
    for (int64_t out = block->groups - block->kept; out > 0; out--) {
        float least = INFINITY;
        int64_t worst = 0;
        for (int64_t group = 0; group < block->groups; group++) {
            float first = -INFINITY, second = -INFINITY;
            for (const float *score = scores + group * size; score < scores + (group + 1) * size; score++) {
                if (*score > first) second = first, first = *score;
                else if (*score > second) second = *score;
            }
            float total = block->judges == 2 ? first + second : first;
            if (first > -INFINITY && total < least) least = total, worst = group;
        }
        for (int64_t i = worst * size; i < (worst + 1) * size; i++) scores[i] = -INFINITY;
    }
}

/* Chooses the experts of a position; replaces the logits by scores. `ranks`: memory for as many numbers. */
VNNI static void choose_experts(const Block *block, float *logits, float *ranks, int64_t position, Chosen *chosen,
                                int64_t *experts) {
    float most = -INFINITY, total = 0, kept = 0;
    for (int64_t i = 0; i < block->experts; i++) most = logits[i] > most ? logits[i] : most;
    for (int64_t i = 0; i < block->experts; i += 16) {
        __mmask16 mask = some_of(block->experts - i);
        __m512 values = _mm512_maskz_loadu_ps(mask, logits + i);
        values = block->sigmoid ? sigmoid(values) : exponential(_mm512_sub_ps(values, _mm512_set1_ps(most)));
        total += _mm512_reduce_add_ps(_mm512_maskz_mov_ps(mask, values));
        _mm512_mask_storeu_ps(logits + i, mask, values);
    }
    for (int64_t i = 0; i < block->experts; i++) {
        if (!block->sigmoid) logits[i] /= total;
        ranks[i] = block->correction ? logits[i] + block->correction[i] : logits[i];
    }
    if (block->kept < block->groups) keep_groups(block, ranks);
    for (int64_t index = 0; index < block->chosen; index++) {
        int64_t best = best_of(ranks, block->experts);
        chosen[index] = (Chosen){.position = position, .share = logits[best]};
        experts[index] = best;
        kept += logits[best];
        ranks[best] = -INFINITY;
    }
    for (int64_t index = 0; index < block->chosen; index++)
        chosen[index].share *= (float)block->factor / (block->normalised ? kept : 1);
}

/* Products of rows with the weights of their experts; rows are sorted by expert. */
VNNI static void multiply_by_expert(const Matrix *matrix, const int64_t *experts, int64_t held, int64_t pairs, const float *rows,
                                    float *products, const Quantised *room, Run *runs, int threads) {
    const Grouped *weight = matrix->description;
    int64_t expert_bytes = parts_of(weight->outputs, TILE) * weight->tile_bytes;
    int64_t many = find_runs(matrix->weights, expert_bytes, experts, held, pairs, runs);
    Quantised numbers = *room;
    take_rows(taken_by(weight), rows, pairs, matrix->inputs, &numbers);
    GroupedJob job = {.weight = weight,
                      .rows = rows,
                      .products = products,
                      .count = pairs,
                      .stride = matrix->inputs,
                      .pitch = matrix->outputs,
                      .threads = threads};
    run_grouped(&job, &numbers, runs, many, 0);
    for (int64_t pair = 0; matrix->bias != NULL && pair < pairs; pair++)
        add(products + pair * matrix->outputs, matrix->bias + experts[pair] * matrix->outputs, matrix->outputs, 1);
}

/* Adds the output of each position's experts to `sums`. `memory`: see `memory_of_experts`. */
VNNI static void run_experts(const Block *block, const Step *step, const float *normed, float *sums, const Quantised *room,
                             char *memory) {
    int64_t pairs = step->count * block->chosen, width = block->router.inputs, between = block->outer.inputs;
    Chosen *chosen = (Chosen *)memory;
    Run *runs = (Run *)(chosen + pairs);
    int64_t *experts = (int64_t *)(runs + pairs);
    float *logits = (float *)(experts + pairs), *rows = logits + step->count * block->experts;
    float *inner = rows + pairs * width, *gated = inner + pairs * 2 * between, *outer = gated + pairs * between;
    float *ranks = outer + pairs * width;
    multiply((const Matrix *[]){&block->router}, (float *[]){logits}, 1, normed, room, step);
    for (int64_t position = 0; position < step->count; position++)
        choose_experts(block, logits + position * block->experts, ranks, position, chosen + position * block->chosen,
                       experts + position * block->chosen);
    for (int64_t pair = 1; pair < pairs; pair++) { /* insertion sort, because pairs are few */
        Chosen one = chosen[pair];
        int64_t expert = experts[pair];
        int64_t at = pair;
        for (; at > 0 && experts[at - 1] > expert; at--) {
            chosen[at] = chosen[at - 1];
            experts[at] = experts[at - 1];
        }
        chosen[at] = one;
        experts[at] = expert;
    }
    for (int64_t pair = 0; pair < pairs; pair++)
        memcpy(rows + pair * width, normed + chosen[pair].position * width, width * sizeof(float));
    multiply_by_expert(&block->inner, experts, block->experts, pairs, rows, inner, room, runs, step->threads);
    for (int64_t pair = 0; pair < pairs; pair++)
        open_expert(block, inner + pair * 2 * between, gated + pair * between, between);
    multiply_by_expert(&block->outer, experts, block->experts, pairs, gated, outer, room, runs, step->threads);
    for (int64_t pair = 0; pair < pairs; pair++)
        add(sums + chosen[pair].position * width, outer + pair * width, width, chosen[pair].share);
}

static size_t memory_of_experts(const Block *block, int64_t count) {
    size_t pairs = count * block->chosen, width = block->router.inputs, between = block->outer.inputs;
    size_t floats = (count + 1) * block->experts + pairs * (2 * width + 3 * between);
    return pairs * (sizeof(Chosen) + sizeof(Run) + sizeof(int64_t)) + floats * sizeof(float);
}

/* Applies the clip, and `norm` if it comes before the rotary embedding, to the heads of a position. */
INLINE VNNI void prepare_heads(const Block *block, const Norm *norm, float *heads, int64_t many, int64_t size) {
    int64_t count = many * size;
    if (norm->kind != NO_NORM && block->joined) normalise(norm, heads, heads, count, 0);
    const __m512 clip = _mm512_set1_ps((float)block->clip), least = _mm512_set1_ps(-(float)block->clip);
    for (int64_t i = 0; block->clip > 0 && i < count; i += 16)
        _mm512_storeu_ps(heads + i, _mm512_max_ps(least, _mm512_min_ps(clip, _mm512_loadu_ps(heads + i))));
    if (norm->kind == NO_NORM || block->joined || block->late) return;
    for (int64_t head = 0; head < many; head++) normalise(norm, heads + head * size, heads + head * size, size, head);
}

INLINE VNNI void turn_heads(const Block *block, const Norm *norm, float *heads, int64_t many, int64_t size, int64_t position,
                            const Step *step) {
    int64_t at = (block->rope * step->count + position) * step->half;
    int64_t first = block->rank ? size - 2 * step->half : 0;
    for (int64_t head = 0; block->rope >= 0 && head < many; head++)
        turn(heads + head * size + first, step->cosines + at, step->sines + at, step);
    for (int64_t head = 0; block->late && norm->kind != NO_NORM && head < many; head++)
        normalise(norm, heads + head * size, heads + head * size, size, head);
}

/* Query heads that share a read of stored latents. */
#define TOGETHER 4

static int64_t room_to_absorb(const Block *block) {
    return block->absorbed ? TOGETHER * (2 * block->rank + block->latent.outputs - block->rank) : 0;
}

/* As `attend`, for stored latents: queries are mapped to latents, and weighted sums of latents to values. */
VNNI static void attend_to_latents(const Block *block, const Store *where, const Step *step, const Reach *reach, int64_t head,
                                   int64_t group, const float *queries, float *mixed, float *found, float *scores, float *room) {
    int64_t rank = block->rank, rest = block->latent.outputs - rank, plain = block->size - rest, width = block->value_size;
    int wide = block->expand.kind == FLOAT32;
    const void *expand = block->expand.weights;
    float *own = room, *made = room + group * (rank + rest);
    for (int64_t query = 0; query < group; query++) {
        const float *from = queries + query * block->size;
        float *to = own + query * (rank + rest);
        int64_t at = (head + query) * (plain + width) * rank;
        if (wide) add_rows(expand, at, plain, rank, from, to, 1);
        else add_rows(expand, at, plain, rank, from, to, 0);
        memcpy(to + rank, from + plain, rest * sizeof(float));
    }
    Seen seen = {.keys = where->keys, .rests = where->values, .values = where->keys, .size = rank, .rest = rest, .value_size = rank};
    if (step->stores_floats) attend(block, &seen, reach, head, group, own, made, found, scores, KV_FLOAT32, KV_FLOAT32);
    else attend(block, &seen, reach, head, group, own, made, found, scores, KV_BFLOAT16, KV_BFLOAT16);
    for (int64_t query = 0; query < group; query++) {
        int64_t at = ((head + query) * (plain + width) + plain) * rank;
        if (wide) multiply_rows(expand, at, width, rank, made + query * rank, mixed + query * width, 1);
        else multiply_rows(expand, at, width, rank, made + query * rank, mixed + query * width, 0);
    }
}

typedef struct {
    const Block *block;
    const Store *stores;
    const Step *step;
    const float *queries;
    float *mixed, *found, *scores; /* of each part, [count, heads, ...]; `scores`: `room` numbers per thread */
    int64_t room, threads, parts;
} Attention;


INLINE Reach reach_of(const Block *block, int64_t from) {
    return (Reach){.begin = block->window && from >= block->window ? from + 1 - block->window : 0, .end = from + 1, .from = from};
}

/* A thread takes neighbouring units, so that positions of one sequence share cached keys and values. */
VNNI static void attend_some(const void *given, int64_t thread) {
    const Attention *all = given;
    const Block *block = all->block;
    const Step *step = all->step;
    int64_t size = block->size, width = block->value_size;
    int64_t group = block->absorbed ? TOGETHER : block->heads / block->stored_heads;
    int64_t units = step->count * all->parts * parts_of(block->heads, group);
    float *own = all->scores + thread * all->room;
    for (int64_t unit = units * thread / all->threads; unit < units * (thread + 1) / all->threads; unit++) {
        int64_t position = unit % step->count, part = unit / step->count % all->parts, shared = unit / step->count / all->parts;
        Reach reach = reach_of(block, step->indices[position]);
        if (!block->absorbed) {
            int64_t some = part_of(reach.end - reach.begin);
            reach.begin += part * some;
            reach.end = reach.end - reach.begin < some ? reach.end : reach.begin + some;
        }
        if (reach.begin >= reach.end) continue;
        int64_t head = shared * group, at = position * block->heads + head;
        const Store *where = all->stores + position;
        const float *queries = all->queries + at * size;
        at += part * step->count * block->heads;
        float *mixed = all->mixed + at * width, *found = all->found + 2 * at;
        if (block->absorbed) {
            int64_t many = block->heads - head < group ? block->heads - head : group;
            attend_to_latents(block, where, step, &reach, head, many, queries, mixed, found, own + room_to_absorb(block), own);
            continue;
        }
        Seen seen = {.keys = where->keys, .values = where->values, .size = size, .value_size = width,
                     .first = shared * where->capacity, .near_from = where->near_from};
        seen.near_kind = step->stores_floats ? KV_FLOAT32 : KV_BFLOAT16;
        seen.near_keys = (const char *)where->near_keys + shared * (SINKS + RING) * kv_bytes(size, seen.near_kind);
        seen.near_values = (const char *)where->near_values + shared * (SINKS + RING) * kv_bytes(width, seen.near_kind);
#define ATTEND(keys, values) attend(block, &seen, &reach, head, group, queries, mixed, found, own, keys, values)
        switch (step->keys_as) { /* so that the compiler knows the types */
        case KV_FLOAT32: ATTEND(KV_FLOAT32, KV_FLOAT32); break;
        case KV_FLOAT16: ATTEND(KV_FLOAT16, KV_FLOAT16); break;
        case KV_NIBBLES: ATTEND(KV_NIBBLES, KV_NIBBLES); break;
        case KV_BYTES:
            if (step->values_as == KV_BYTES) ATTEND(KV_BYTES, KV_BYTES);
            else ATTEND(KV_BYTES, KV_NIBBLES);
            break;
        default: ATTEND(KV_BFLOAT16, KV_BFLOAT16);
        }
    }
}

/* Stores the key or the value of a head at a position. With codes, the codes and the numbers in full are rotated. */
VNNI static void keep(void *to, void *in_full, int64_t capacity, int64_t head, int64_t index, float *numbers, int64_t size,
                      enum stored kind, const Step *step) {
    enum stored plain = step->stores_floats ? KV_FLOAT32 : KV_BFLOAT16;
    int64_t at = head * capacity + index;
    if (!is_coded(kind)) {
        store(to, at * size, numbers, size, kind);
        return;
    }
    turn_by_hadamard(numbers, size);
    encode(numbers, size, kind, (uint8_t *)to + at * kv_bytes(size, kind));
    store(in_full, (head * (SINKS + RING) + SINKS + index % RING) * size, numbers, size, plain);
    if (index < SINKS) store(in_full, (head * (SINKS + RING) + index) * size, numbers, size, plain);
}

/* `mixed`, `found`: memory for `parts` parts. `scores`: `room` numbers per thread. */
VNNI static void attend_all(const Block *block, const Store *stores, const Step *step, float *queries, float *keys,
                            float *values, float *mixed, float *found, float *scores, int64_t room, int64_t parts) {
    static const Norm none = {.kind = NO_NORM};
    int coded = is_coded(step->keys_as);
    int64_t size = block->size, width = block->value_size;
    int64_t key_size = block->absorbed ? block->rank : size;
    int64_t value_size = block->absorbed ? block->latent.outputs - block->rank : width;
    for (int64_t position = 0; position < step->count; position++) {
        float *query = queries + position * block->heads * size, *key = keys + position * block->stored_heads * key_size;
        float *value = values + position * block->stored_heads * value_size;
        prepare_heads(block, &block->query_norm, query, block->heads, size);
        prepare_heads(block, &block->key_norm, key, block->stored_heads, key_size);
        prepare_heads(block, &none, value, block->stored_heads, value_size);
        turn_heads(block, &block->query_norm, query, block->heads, size, position, step);
        if (block->absorbed) turn_heads(block, &none, value, 1, value_size, position, step);
        else turn_heads(block, &block->key_norm, key, block->stored_heads, size, position, step);
        for (int64_t head = 0; coded && head < block->heads; head++) turn_by_hadamard(query + head * size, size);
        for (int64_t head = 0; head < block->stored_heads; head++) {
            const Store *to = stores + position;
            keep(to->keys, to->near_keys, to->capacity, head, step->indices[position], key + head * key_size, key_size,
                 step->keys_as, step);
            keep(to->values, to->near_values, to->capacity, head, step->indices[position], value + head * value_size, value_size,
                 step->values_as, step);
        }
    }
    Attention all = {block, stores, step, queries, mixed, found, scores, room, step->threads < 1 ? 1 : step->threads, parts};
    run_parts(attend_some, &all, all.threads, all.threads);
    for (int64_t at = 0; at < step->count * block->heads; at++) {
        Reach reach = reach_of(block, step->indices[at / block->heads]);
        int64_t seen = reach.end - reach.begin, many = block->absorbed ? 1 : parts_of(seen, part_of(seen));
        join_parts(block, at % block->heads, many, width, mixed + at * width,
                   step->count * block->heads * width, found + 2 * at, 2 * step->count * block->heads);
        if (coded) turn_by_hadamard(mixed + at * width, width);
    }
}

/* Query, key and value of normed positions, in a block with latents. If latents are stored, they are the keys, and the
rotated part of keys is the values. `latents`: memory for the latents. */
VNNI static void make_latent_heads(const Block *block, const Step *step, const float *normed, float *product, float *latents,
                                   float *queries, float *keys, float *values, const Quantised *room) {
    int64_t heads = block->heads, size = block->size, width = block->value_size, count = step->count;
    int64_t rank = block->rank, rest = block->latent.outputs - rank, plain = size - rest;
    if (block->lowered.weights != NULL) {
        multiply((const Matrix *[]){&block->lowered}, (float *[]){product}, 1, normed, room, step);
        normalise_rows(&block->lowered_norm, product, product, count, block->lowered.outputs);
        multiply((const Matrix *[]){&block->query}, (float *[]){queries}, 1, product, room, step);
    } else multiply((const Matrix *[]){&block->query}, (float *[]){queries}, 1, normed, room, step);
    multiply((const Matrix *[]){&block->latent}, (float *[]){product}, 1, normed, room, step);
    for (int64_t row = 0; row < count; row++) {
        const float *given = product + row * (rank + rest);
        normalise_rows(&block->latent_norm, given, (block->absorbed ? keys : latents) + row * rank, 1, rank);
        if (block->absorbed) memcpy(values + row * rest, given + rank, rest * sizeof(float));
        for (int64_t head = 0; !block->absorbed && head < heads; head++)
            memcpy(keys + (row * heads + head) * size + plain, given + rank, rest * sizeof(float));
    }
    if (block->absorbed) return;
    multiply((const Matrix *[]){&block->expand}, (float *[]){product}, 1, latents, room, step);
    for (int64_t head = 0; head < count * heads; head++) {
        const float *given = product + head * (plain + width);
        memcpy(keys + head * size, given, plain * sizeof(float));
        memcpy(values + head * width, given + plain, width * sizeof(float));
    }
}

/* Query, key and value of normed positions. `product`: memory for all three. */
VNNI static void make_heads(const Block *block, const Step *step, const float *normed, float *product, float *queries,
                            float *keys, float *values, const Quantised *room) {
    int64_t size = block->size, width = block->query.outputs;
    if (block->places == NULL) {
        multiply((const Matrix *[]){&block->query, &block->key, &block->value}, (float *[]){queries, keys, values}, 3, normed,
                 room, step);
        return;
    }
    multiply((const Matrix *[]){&block->query}, (float *[]){product}, 1, normed, room, step);
    float *to[] = {queries, keys, values};
    int64_t many[] = {block->heads, block->stored_heads, block->stored_heads};
    for (int64_t row = 0; row < step->count; row++) {
        const int64_t *place = block->places;
        for (int64_t of = 0; of < 3; of++)
            for (int64_t head = 0; head < many[of]; head++, place++)
                memcpy(to[of] + (row * many[of] + head) * size, product + row * width + *place * size, size * sizeof(float));
    }
}

/* The output of the MLP for normed positions. `inner`: memory for its gate and up. */
VNNI static void run_mlp(const Block *block, const Step *step, const float *normed, float *product, float *inner,
                         const Quantised *room) {
    int64_t between = block->down.inputs, width = block->down.outputs, count = step->count;
    if (block->gate.weights == NULL) {
        multiply((const Matrix *[]){&block->up}, (float *[]){inner}, 1, normed, room, step);
        open_gate(block, inner, NULL, inner, count * between);
    } else if (block->up.weights == NULL) {
        multiply((const Matrix *[]){&block->gate}, (float *[]){inner}, 1, normed, room, step);
        for (int64_t row = 0; row < count; row++) {
            const float *gate = inner + row * 2 * between;
            open_gate(block, gate, gate + between, inner + row * between, between);
        }
    } else {
        float *up = inner + count * between;
        multiply((const Matrix *[]){&block->gate, &block->up}, (float *[]){inner, up}, 2, normed, room, step);
        open_gate(block, inner, up, inner, count * between);
    }
    multiply((const Matrix *[]){&block->down}, (float *[]){product}, 1, inner, room, step);
    if (block->opener.weights == NULL) return;
    multiply((const Matrix *[]){&block->opener}, (float *[]){inner}, 1, normed, room, step);
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < width; i++) product[row * width + i] /= 1 + expf(-inner[row]);
}

/* Runs the positions through the blocks. `stores`: [blocks, positions]. Returns 0 if memory cannot be allocated. */
VNNI static int run_blocks(const Block *blocks, int64_t many, const Store *stores, const Step *step) {
    int64_t count = step->count, most = 1, widest = 0, attention = 0, between = 0, rows = count, of_expert = 0, own = 0;
    int64_t parts = 1, heads_most = 0;
    size_t of_experts = 0;
    for (int64_t i = 0; i < count; i++) most = step->indices[i] + 1 > most ? step->indices[i] + 1 : most;
    for (int64_t i = 0; i < many; i++) {
        const Block *block = blocks + i;
        int64_t heads = block->heads * block->size, fused = block->places == NULL ? 0 : block->query.outputs;
        attention = heads > attention ? heads : attention;
        heads = block->heads * block->value_size > block->rank ? block->heads * block->value_size : block->rank;
        attention = heads > attention ? heads : attention;
        between = block->down.inputs > between ? block->down.inputs : between;
        widest = fused > widest ? fused : widest;
        int64_t latent[] = {block->out.outputs, block->lowered.outputs, block->latent.outputs, block->expand.outputs};
        for (int64_t one = 0; one < 4; one++) widest = latent[one] > widest ? latent[one] : widest;
        int64_t lines = block->absorbed ? block->latent.outputs : block->size > block->value_size ? block->size : block->value_size;
        int64_t together = block->absorbed ? TOGETHER : block->heads / block->stored_heads;
        int64_t seen = block->absorbed ? most : part_of(most);
        int64_t needed_here = together * parts_of(seen, LINES) * LINES + LINES * lines + room_to_absorb(block);
        if (!block->absorbed) parts = most > PARTS * LEAST_PART ? PARTS : parts_of(most, LEAST_PART);
        heads_most = block->heads > heads_most ? block->heads : heads_most;
        own = needed_here > own ? needed_here : own;
        if (!block->experts) continue;
        size_t needed = memory_of_experts(block, count);
        of_experts = needed > of_experts ? needed : of_experts;
        rows = count * block->chosen > rows ? count * block->chosen : rows;
        of_expert = block->outer.inputs > of_expert ? block->outer.inputs : of_expert;
    }
    Job largest = {.count = rows, .inputs = widest > between ? widest : between};
    largest.inputs = of_expert > largest.inputs ? of_expert : largest.inputs;
    largest.inputs = attention > largest.inputs ? attention : largest.inputs;
    largest.inputs *= 2; /* for rows as bfloat16 */
    Quantised room;
    if (!prepare(&largest, &room)) return 0;
    int64_t threads = step->threads < 1 ? 1 : step->threads;
    float *memory = malloc(sizeof(float) * (count * (2 * widest + (3 + parts) * attention + 2 * parts * heads_most + 2 * between + 1) + threads * own));
    char *more = malloc(of_experts + 1);
    if (memory == NULL || more == NULL) {
        free(memory);
        free(more);
        free(room.high);
        return 0;
    }
    float *normed = memory, *product = normed + count * widest, *queries = product + count * widest;
    float *keys = queries + count * attention, *values = keys + count * attention, *mixed = values + count * attention;
    float *found = mixed + parts * count * attention, *inner = found + 2 * parts * count * heads_most;
    float *scores = inner + count * (2 * between + 1);
    for (int64_t index = 0; index < many; index++) {
        const Block *block = blocks + index;
        int64_t width = block->out.outputs;
        float residual = (float)block->residual;
        normalise_rows(&block->before, step->hidden, normed, count, width);
        if (block->rank) make_latent_heads(block, step, normed, product, mixed, queries, keys, values, &room);
        else make_heads(block, step, normed, product, queries, keys, values, &room);
        attend_all(block, stores + index * count, step, queries, keys, values, mixed, found, scores, own, parts);
        multiply((const Matrix *[]){&block->out}, (float *[]){product}, 1, mixed, &room, step);
        normalise_rows(&block->after, product, product, count, width);
        if (block->parallel && block->between.kind != NO_NORM)
            normalise_rows(&block->between, step->hidden, normed, count, width);
        add(step->hidden, product, count * width, residual);
        if (!block->parallel) normalise_rows(&block->between, step->hidden, normed, count, width);
        if (block->down.weights != NULL) run_mlp(block, step, normed, product, inner, &room);
        else memset(product, 0, count * width * sizeof(float));
        if (block->experts) run_experts(block, step, normed, product, &room, more);
        normalise_rows(&block->behind, product, product, count, width);
        add(step->hidden, product, count * width, residual);
    }
    free(memory);
    free(more);
    free(room.high);
    return 1;
}

#endif
#endif
