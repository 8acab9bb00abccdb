/* New positions through blocks that are built as Llama's; see splitnet/model/compiled_step.py.

Numbers are float32 throughout; keys and values are stored as the span computes, in float32 or bfloat16. */

#ifndef SPLITNET_STEP_H
#define SPLITNET_STEP_H

#include "grouped.h"

#ifdef HAVE_VNNI

/* All fields have 8 bytes: Python writes them as a list of numbers. */
typedef struct {
    int64_t kind;
    const void *weights;
    const Grouped *description; /* of GROUPED */
    const float *bias;  /* or NULL */
    int64_t inputs, outputs;
} Matrix;

typedef struct {
    const float *norm_before, *norm_between, *query_norm, *key_norm; /* the last two or NULL */
    const float *sinks; /* a logit of each head that takes part in its softmax and sees nothing, or NULL */
    double epsilon_before, epsilon_between, epsilon_query, epsilon_key, scale;
    int64_t heads, stored_heads, size;
    int64_t window; /* positions that one may see, or 0: all */
    int64_t joined; /* query_norm and key_norm are of all heads together */
    Matrix query, key, value, out;
    Matrix gate, up, down; /* of all positions; without weights where there are experts alone */
    Matrix opener; /* one number, of whose sigmoid the output of these is multiplied, or without weights */
    int64_t experts, chosen; /* 0: there are none */
    int64_t sigmoid;         /* what makes scores of logits, else softmax */
    int64_t normalised;      /* the shares of the chosen experts are made to add up to one */
    int64_t groups, kept;    /* experts are chosen in `kept` of the groups with the best two */
    int64_t interleaved;     /* gate and up of an expert take turns, else its gate is above its up */
    const float *correction; /* added to scores to choose, or NULL */
    double factor;           /* of shares */
    double alpha, limit, shift; /* (up + shift) * gate * sigmoid(alpha * gate), of gate and up within the limit */
    Matrix router, inner, outer; /* biases of the last two: [experts, outputs] */
} Block;

/* Where a block keeps keys and values of the sequence of a position: [stored heads, capacity, size] each. */
typedef struct {
    void *keys, *values;
    int64_t capacity;
} Store;

typedef struct {
    float *hidden; /* [count, width], replaced by what comes out */
    long count;
    const int64_t *indices; /* of the positions in their stores */
    const float *cosines, *sines; /* [count, turned] */
    long turned;  /* numbers of a head that rotary embeddings turn, the first ones */
    int adjacent; /* those that are turned together stand side by side, else half of them lie between */
    int stores_floats; /* float32, else bfloat16 */
    int threads;
} Step;

/* Cephes' exponential function: error of a unit in the last place. */
INLINE VNNI __m512 exponential(__m512 x) {
    const __m512 most = _mm512_set1_ps(88.0f), least = _mm512_set1_ps(-103.0f);
    x = _mm512_max_ps(least, _mm512_min_ps(most, x)); /* in this order NaN stays */
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

INLINE VNNI void normalise(const float *from, float *to, const float *weight, double epsilon, long width) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        __m512 values = _mm512_maskz_loadu_ps(some_of(width - i), from + i);
        squares = _mm512_fmadd_ps(values, values, squares);
    }
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + (float)epsilon));
    for (long i = 0; i < width; i += 16) {
        __mmask16 mask = some_of(width - i);
        __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + i), factor);
        _mm512_mask_storeu_ps(to + i, mask, _mm512_mul_ps(values, _mm512_maskz_loadu_ps(mask, weight + i)));
    }
}

/* Rotary embedding (Su et al., "RoFormer", arXiv:2104.09864). */
INLINE VNNI void turn(float *head, const float *cosines, const float *sines, const Step *step) {
    long half = step->turned / 2;
    for (long i = 0; i < half; i++) {
        float *one = head + (step->adjacent ? 2 * i : i), *other = step->adjacent ? one + 1 : one + half;
        float first = *one, second = *other;
        *one = first * cosines[i] - second * sines[i];
        *other = second * cosines[i + half] + first * sines[i + half];
    }
}

INLINE VNNI __m512 stored(const void *from, long at, int floats) {
    if (floats) return _mm512_loadu_ps((const float *)from + at);
    __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE VNNI void store(void *to, long at, const float *values, long size, int floats) {
    if (floats) {
        memcpy((float *)to + at, values, size * sizeof(float));
        return;
    }
    for (long i = 0; i < size; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        int special = (bits & 0x7f800000) == 0x7f800000; /* which rounding could make a number of */
        ((uint16_t *)to)[at + i] = (bits + (special ? 0 : 0x7fff + (bits >> 16 & 1))) >> 16;
    }
}

/* What one position sees with the query heads that share a stored head. `scores`: [heads, reach]. */
INLINE VNNI void attend(const Block *block, const Store *where, const Step *step, long position, long head, const float *queries,
                        float *mixed, float *scores, int floats) {
    long size = block->size, group = block->heads / block->stored_heads, end = step->indices[position] + 1;
    long begin = block->window && end > block->window ? end - block->window : 0, reach = end - begin;
    long base = (head * where->capacity + begin) * size;
    __m512 scale = _mm512_set1_ps((float)block->scale);
    for (long index = 0; index < reach; index++)
        for (long query = 0; query < group; query++) {
            __m512 sum = _mm512_setzero_ps();
            for (long i = 0; i < size; i += 16)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(queries + query * size + i),
                                      stored(where->keys, base + index * size + i, floats), sum);
            scores[query * reach + index] = _mm512_reduce_add_ps(sum);
        }
    for (long query = 0; query < group; query++) {
        float *score = scores + query * reach;
        __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (long i = 0; i < reach; i += 16) {
            __mmask16 mask = some_of(reach - i);
            most = _mm512_mask_max_ps(most, mask, most, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, score + i), scale));
        }
        float sink = block->sinks ? block->sinks[head * group + query] : -INFINITY;
        __m512 largest = _mm512_max_ps(_mm512_set1_ps(sink), _mm512_set1_ps(_mm512_reduce_max_ps(most)));
        for (long i = 0; i < reach; i += 16) {
            __mmask16 mask = some_of(reach - i);
            __m512 weight = _mm512_maskz_loadu_ps(mask, score + i);
            weight = _mm512_maskz_mov_ps(mask, exponential(_mm512_fmsub_ps(weight, scale, largest)));
            total = _mm512_add_ps(total, weight);
            _mm512_mask_storeu_ps(score + i, mask, weight);
        }
        if (block->sinks) {
            __m512 weight = exponential(_mm512_sub_ps(_mm512_set1_ps(sink), largest));
            total = _mm512_add_ps(total, _mm512_maskz_mov_ps(1, weight));
        }
        __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
        for (long i = 0; i < size; i += 64) {
            __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            long vectors = size - i >= 64 ? 4 : (size - i) / 16;
            for (long index = 0; index < reach; index++) {
                __m512 weight = _mm512_set1_ps(score[index]);
                for (long vector = 0; vector < vectors; vector++) {
                    __m512 values = stored(where->values, base + index * size + i + vector * 16, floats);
                    sums[vector] = _mm512_fmadd_ps(weight, values, sums[vector]);
                }
            }
            for (long vector = 0; vector < vectors; vector++)
                _mm512_storeu_ps(mixed + query * size + i + vector * 16, _mm512_mul_ps(sums[vector], share));
        }
    }
}

/* Products of the same rows with some matrices; what these take is made of rows once. */
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
            for (long row = 0; row < job.count; row++)
                for (long i = 0; i < job.outputs; i++) job.products[row * job.outputs + i] += matrix->bias[i];
    }
}

INLINE VNNI void add(float *to, const float *from, long count) {
    for (long i = 0; i < count; i += 16) {
        __mmask16 mask = some_of(count - i);
        __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to + i), _mm512_maskz_loadu_ps(mask, from + i));
        _mm512_mask_storeu_ps(to + i, mask, sum);
    }
}

INLINE VNNI __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* SiLU of the gate, times what it lets through. */
INLINE VNNI void open_gate(float *gate, const float *up, long count) {
    for (long i = 0; i < count; i += 16) {
        __mmask16 mask = some_of(count - i);
        __m512 value = _mm512_maskz_loadu_ps(mask, gate + i);
        value = _mm512_mul_ps(_mm512_mul_ps(value, sigmoid(value)), _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(gate + i, mask, value);
    }
}

/* The same of an expert, as its family has it. `inner`: its gate and its up. */
VNNI static void open_expert(const Block *block, const float *inner, float *gated, long count) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 limit = _mm512_set1_ps((float)block->limit), least = _mm512_set1_ps(-(float)block->limit);
    for (long i = 0; i < count; i += 16) {
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
        gate = _mm512_min_ps(limit, gate), up = _mm512_max_ps(least, _mm512_min_ps(limit, up)); /* so that NaN stays */
        gate = _mm512_mul_ps(gate, sigmoid(_mm512_mul_ps(gate, _mm512_set1_ps((float)block->alpha))));
        gate = _mm512_mul_ps(gate, _mm512_add_ps(up, _mm512_set1_ps((float)block->shift)));
        _mm512_mask_storeu_ps(gated + i, mask, gate);
    }
}

/* What an expert computes: a position, of which its product counts by so much. */
typedef struct {
    long position;
    float share;
} Chosen;

INLINE VNNI long best_of(const float *values, long count) {
    long best = 0;
    for (long i = 1; i < count; i++) best = values[i] > values[best] ? i : best;
    return best;
}

/* Leaves the groups of experts whose two best make the most. */
static void keep_groups(const Block *block, float *scores) {
    long size = block->experts / block->groups;
    for (long out = block->groups - block->kept; out > 0; out--) {
        float least = INFINITY;
        long worst = 0;
        for (long group = 0; group < block->groups; group++) {
            float first = -INFINITY, second = -INFINITY;
            for (const float *score = scores + group * size; score < scores + (group + 1) * size; score++) {
                if (*score > first) second = first, first = *score;
                else if (*score > second) second = *score;
            }
            if (first > -INFINITY && first + second < least) least = first + second, worst = group;
        }
        for (long i = worst * size; i < (worst + 1) * size; i++) scores[i] = -INFINITY;
    }
}

/* The best experts of a position; replaces the logits by their scores. `ranks`: room for as many. */
VNNI static void choose_experts(const Block *block, float *logits, float *ranks, long position, Chosen *chosen,
                                int64_t *experts) {
    float most = -INFINITY, total = 0, kept = 0;
    for (long i = 0; i < block->experts; i++) most = logits[i] > most ? logits[i] : most;
    for (long i = 0; i < block->experts; i += 16) {
        __mmask16 mask = some_of(block->experts - i);
        __m512 values = _mm512_maskz_loadu_ps(mask, logits + i);
        values = block->sigmoid ? sigmoid(values) : exponential(_mm512_sub_ps(values, _mm512_set1_ps(most)));
        total += _mm512_reduce_add_ps(_mm512_maskz_mov_ps(mask, values));
        _mm512_mask_storeu_ps(logits + i, mask, values);
    }
    for (long i = 0; i < block->experts; i++) {
        if (!block->sigmoid) logits[i] /= total;
        ranks[i] = block->correction ? logits[i] + block->correction[i] : logits[i];
    }
    if (block->kept < block->groups) keep_groups(block, ranks);
    for (long index = 0; index < block->chosen; index++) {
        long best = best_of(ranks, block->experts);
        chosen[index] = (Chosen){.position = position, .share = logits[best]};
        experts[index] = best;
        kept += logits[best];
        ranks[best] = -INFINITY;
    }
    for (long index = 0; index < block->chosen; index++)
        chosen[index].share *= (float)block->factor / (block->normalised ? kept : 1);
}

/* Products of rows with the weights of their experts, which are sorted. */
VNNI static void multiply_by_expert(const Matrix *matrix, const int64_t *experts, long held, long pairs, const float *rows,
                                    float *products, const Quantised *room, Run *runs, int threads) {
    const Grouped *weight = matrix->description;
    int64_t expert_bytes = parts_of(weight->outputs, TILE) * weight->tile_bytes;
    long many = find_runs(matrix->weights, expert_bytes, experts, held, pairs, runs);
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
    for (long pair = 0; matrix->bias != NULL && pair < pairs; pair++)
        add(products + pair * matrix->outputs, matrix->bias + experts[pair] * matrix->outputs, matrix->outputs);
}

/* Adds to the hidden states what the experts of each position make of it. `memory`: see `memory_of_experts`. */
VNNI static void run_experts(const Block *block, const Step *step, const float *normed, const Quantised *room, char *memory) {
    long pairs = step->count * block->chosen, width = block->router.inputs, between = block->outer.inputs;
    Chosen *chosen = (Chosen *)memory;
    Run *runs = (Run *)(chosen + pairs);
    int64_t *experts = (int64_t *)(runs + pairs);
    float *logits = (float *)(experts + pairs), *rows = logits + step->count * block->experts;
    float *inner = rows + pairs * width, *gated = inner + pairs * 2 * between, *outer = gated + pairs * between;
    float *ranks = outer + pairs * width;
    multiply((const Matrix *[]){&block->router}, (float *[]){logits}, 1, normed, room, step);
    for (long position = 0; position < step->count; position++)
        choose_experts(block, logits + position * block->experts, ranks, position, chosen + position * block->chosen,
                       experts + position * block->chosen);
    for (long pair = 1; pair < pairs; pair++) { /* few: sorted where they are */
        Chosen one = chosen[pair];
        int64_t expert = experts[pair];
        long at = pair;
        for (; at > 0 && experts[at - 1] > expert; at--) {
            chosen[at] = chosen[at - 1];
            experts[at] = experts[at - 1];
        }
        chosen[at] = one;
        experts[at] = expert;
    }
    for (long pair = 0; pair < pairs; pair++)
        memcpy(rows + pair * width, normed + chosen[pair].position * width, width * sizeof(float));
    multiply_by_expert(&block->inner, experts, block->experts, pairs, rows, inner, room, runs, step->threads);
    for (long pair = 0; pair < pairs; pair++)
        open_expert(block, inner + pair * 2 * between, gated + pair * between, between);
    multiply_by_expert(&block->outer, experts, block->experts, pairs, gated, outer, room, runs, step->threads);
    for (long pair = 0; pair < pairs; pair++) {
        float *to = step->hidden + chosen[pair].position * width;
        const float *from = outer + pair * width;
        for (long i = 0; i < width; i++) to[i] += chosen[pair].share * from[i];
    }
}

static size_t memory_of_experts(const Block *block, long count) {
    size_t pairs = count * block->chosen, width = block->router.inputs, between = block->outer.inputs;
    size_t floats = (count + 1) * block->experts + pairs * (2 * width + 3 * between);
    return pairs * (sizeof(Chosen) + sizeof(Run) + sizeof(int64_t)) + floats * sizeof(float);
}

VNNI static void attend_all(const Block *block, const Store *stores, const Step *step, float *queries, float *keys,
                            const float *values, float *mixed, float *scores, long most) {
    long size = block->size, group = block->heads / block->stored_heads;
    for (long position = 0; position < step->count; position++) {
        const float *cosines = step->cosines + position * step->turned, *sines = step->sines + position * step->turned;
        if (block->joined) {
            float *query = queries + position * block->heads * size, *key = keys + position * block->stored_heads * size;
            normalise(query, query, block->query_norm, block->epsilon_query, block->heads * size);
            normalise(key, key, block->key_norm, block->epsilon_key, block->stored_heads * size);
        }
        const float *query_norm = block->joined ? NULL : block->query_norm, *key_norm = block->joined ? NULL : block->key_norm;
        for (long head = 0; head < block->heads; head++) {
            float *query = queries + (position * block->heads + head) * size;
            if (query_norm) normalise(query, query, query_norm, block->epsilon_query, size);
            turn(query, cosines, sines, step);
        }
        for (long head = 0; head < block->stored_heads; head++) {
            float *key = keys + (position * block->stored_heads + head) * size;
            if (key_norm) normalise(key, key, key_norm, block->epsilon_key, size);
            turn(key, cosines, sines, step);
            long at = (head * stores[position].capacity + step->indices[position]) * size;
            store(stores[position].keys, at, key, size, step->stores_floats);
            const float *value = values + (position * block->stored_heads + head) * size;
            store(stores[position].values, at, value, size, step->stores_floats);
        }
    }
    long units = step->count * block->stored_heads;
    long threads = step->threads < 1 ? 1 : step->threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long thread = 0; thread < threads; thread++)
        for (long unit = thread; unit < units; unit += threads) {
            long position = unit / block->stored_heads, head = unit % block->stored_heads;
            long at = (position * block->heads + head * group) * size;
            float *own = scores + thread * group * most;
            if (step->stores_floats)
                attend(block, stores + position, step, position, head, queries + at, mixed + at, own, 1);
            else
                attend(block, stores + position, step, position, head, queries + at, mixed + at, own, 0);
        }
}

/* Runs the positions through the blocks. `stores`: [blocks, positions]. Gives 0 where there is no memory for it. */
VNNI static int run_blocks(const Block *blocks, long many, const Store *stores, const Step *step) {
    long count = step->count, most = 1, widest = 0, attention = 0, between = 0, group = 1, rows = count, inner = 0;
    size_t of_experts = 0;
    for (long i = 0; i < count; i++) most = step->indices[i] + 1 > most ? step->indices[i] + 1 : most;
    for (long i = 0; i < many; i++) {
        const Block *block = blocks + i;
        long heads = block->heads * block->size;
        attention = heads > attention ? heads : attention;
        between = block->gate.outputs > between ? block->gate.outputs : between;
        group = block->heads / block->stored_heads > group ? block->heads / block->stored_heads : group;
        widest = block->query.inputs > widest ? block->query.inputs : widest;
        if (!block->experts) continue;
        size_t needed = memory_of_experts(block, count);
        of_experts = needed > of_experts ? needed : of_experts;
        rows = count * block->chosen > rows ? count * block->chosen : rows;
        inner = block->outer.inputs > inner ? block->outer.inputs : inner;
    }
    Job largest = {.count = rows, .inputs = widest > between ? widest : between};
    largest.inputs = inner > largest.inputs ? inner : largest.inputs;
    largest.inputs = attention > largest.inputs ? attention : largest.inputs;
    largest.inputs *= 2; /* where rows become bfloat16 */
    Quantised room;
    if (!prepare(&largest, &room)) return 0;
    long threads = step->threads < 1 ? 1 : step->threads;
    float *memory = malloc(sizeof(float) * (count * (2 * widest + 4 * attention + 2 * between) + threads * group * most + count));
    char *more = malloc(of_experts + 1);
    if (memory == NULL || more == NULL) {
        free(memory);
        free(more);
        free(room.high);
        return 0;
    }
    float *normed = memory, *product = normed + count * widest, *queries = product + count * widest;
    float *keys = queries + count * attention, *values = keys + count * attention, *mixed = values + count * attention;
    float *gate = mixed + count * attention, *up = gate + count * between, *scores = up + count * between;
    for (long index = 0; index < many; index++) {
        const Block *block = blocks + index;
        long width = block->query.inputs;
        for (long row = 0; row < count; row++)
            normalise(step->hidden + row * width, normed + row * width, block->norm_before, block->epsilon_before, width);
        multiply((const Matrix *[]){&block->query, &block->key, &block->value}, (float *[]){queries, keys, values}, 3, normed,
                 &room, step);
        attend_all(block, stores + index * count, step, queries, keys, values, mixed, scores, most);
        multiply((const Matrix *[]){&block->out}, (float *[]){product}, 1, mixed, &room, step);
        add(step->hidden, product, count * width);
        for (long row = 0; row < count; row++)
            normalise(step->hidden + row * width, normed + row * width, block->norm_between, block->epsilon_between, width);
        if (block->experts) run_experts(block, step, normed, &room, more);
        if (block->gate.weights == NULL) continue;
        multiply((const Matrix *[]){&block->gate, &block->up}, (float *[]){gate, up}, 2, normed, &room, step);
        open_gate(gate, up, count * block->gate.outputs);
        multiply((const Matrix *[]){&block->down}, (float *[]){product}, 1, gate, &room, step);
        if (block->opener.weights != NULL) {
            multiply((const Matrix *[]){&block->opener}, (float *[]){scores}, 1, normed, &room, step);
            for (long row = 0; row < count; row++)
                for (long i = 0; i < width; i++) product[row * width + i] /= 1 + expf(-scores[row]);
        }
        add(step->hidden, product, count * width);
    }
    free(memory);
    free(more);
    free(room.high);
    return 1;
}

#endif
#endif
