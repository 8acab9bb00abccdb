/* All products for one kind of instructions. paths.h includes this file once for each kind, as Google's Highway does.
Before each inclusion, paths.h defines:

    NAME         the name of the path, as users write it
    NAMED(name)  the name of a function of this path; NAMED(is_here) tells whether the CPU has the instructions
    TARGET       the attribute that lets the compiler use the instructions
    BITS         bits of a vector; V(name) is the type or function of vectors_*.h for this size
    DOT          the function dot(sums, codes, numbers), which adds products of bytes, of four neighbours each
    WORDS        with PAIRED: the function that adds products of words, of two neighbours each
    SIGNED       whether the codes that DOT takes have a sign
    PAIRED       whether DOT is slow, but products of unsigned codes with few bits can be summed in 16 bits
    ROWS         rows that are multiplied at a time: 4 or 2
    SCALED       whether E4M3 codes are multiplied without a conversion, as floats that are 2^120 times too small */

#define LANES (BITS / 32)                /* 32-bit numbers in a vector */
#define WIDE (BITS / 8)                  /* bytes of a vector */
#define PARTS (VECTOR / WIDE)            /* vectors with four inputs of each output of a tile */
#define V(name) JOINED(name, BITS)
#define Bytes V(Bytes)
#define Ints V(Ints)
#define UInts V(UInts)
#define Words V(Words)
#define UWords V(UWords)
#define Floats V(Floats)
#define Halves V(Halves)

INLINE TARGET Bytes NAMED(load)(const void *at) {
    Bytes found;
    memcpy(&found, at, sizeof found);
    return found;
}

INLINE TARGET Floats NAMED(load_floats)(const float *at) {
    Floats found;
    memcpy(&found, at, sizeof found);
    return found;
}

INLINE TARGET Halves NAMED(load_halves)(const void *at) {
    Halves found;
    memcpy(&found, at, sizeof found);
    return found;
}

INLINE TARGET void NAMED(store)(float *to, Floats values) { memcpy(to, &values, sizeof values); }

INLINE TARGET Bytes NAMED(splat_byte)(int byte) { return (Bytes)V(splat_int)(byte * 0x01010101); }

/* The same four bytes in each 32 bits. */
INLINE TARGET Bytes NAMED(four_bytes)(const int8_t *from) {
    int32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return (Bytes)V(splat_int)(bytes);
}

INLINE TARGET Ints NAMED(clamped)(Ints numbers, int32_t limit) {
    Ints most = V(splat_int)(limit), least = V(splat_int)(-limit);
    Ints above = numbers > most, below = numbers < least;
    return (most & above) | (least & below) | (numbers & ~above & ~below);
}

/* ---- rows ---- */

/* As `quantise_plainly`. */
TARGET static void NAMED(quantise)(const Job *job, const Quantised *to) {
    for (int64_t index = 0; index < job->count; index++) {
        const float *row = job->rows + index * job->inputs;
        int8_t *high = to->high + index * to->stride, *low = to->low + index * to->stride;
        float last[LANES] = {0}, all[LANES];
        const int64_t whole = job->inputs / LANES * LANES, rest = job->inputs - whole;
        memcpy(last, row + whole, rest * sizeof(float));
        Floats most = V(splat)(0);
        Ints strange = V(splat_int)(0);
        for (int64_t i = 0; i < job->inputs; i += LANES) {
            Floats values = NAMED(load_floats)(i < whole ? row + i : last);
            strange |= values != values;
            most = V(max)(most, (Floats)((Ints)values & V(splat_int)(0x7fffffff)));
        }
        float largest = 0;
        NAMED(store)(all, most);
        for (int i = 0; i < LANES; i++) {
            largest = all[i] > largest ? all[i] : largest;
            if (strange[i]) largest = INFINITY;
        }
        float step = to->steps[index] = step_of(largest);
        Floats factor = V(splat)(factor_of(step));
        for (int64_t i = 0; i < to->stride; i += LANES) {
            Floats values = i < whole ? NAMED(load_floats)(row + i) : i == whole ? NAMED(load_floats)(last) : V(splat)(0);
            Ints number = NAMED(clamped)(V(rounded)(values * factor), LARGEST);
            Ints upper = V(rounded)(V(floats)(number) * V(splat)(1.0f / BASE));
            V(store_int8)(high + i, upper);
            V(store_int8)(low + i, number - upper * V(splat_int)(BASE));
        }
        add_up(to, index);
#if PAIRED
        for (int64_t i = 0; i < to->stride; i++) to->words[index * to->stride + i] = (int16_t)(BASE * high[i] + low[i]);
#endif
    }
}

/* ---- weights stored output by output ---- */

INLINE TARGET Floats NAMED(weights_at)(enum kind kind, const void *at) {
    if (kind == FLOAT32) return NAMED(load_floats)(at);
    if (kind == FLOAT16) return V(from_float16)(NAMED(load_halves)(at));
    return (Floats)(V(from_uint16)(at) << 16);
}

/* `foreseen`: whether to prefetch the outputs of the next block. */
INLINE TARGET void NAMED(float_vectors)(enum kind kind, const char *weights, int64_t pitch, const float *rows, int64_t inputs,
                                        int64_t outputs, int64_t count, Floats sums[BLOCK][4], int foreseen) {
    Floats given[4];
    if (foreseen) fetch(weights + BLOCK * pitch, outputs, pitch);
#pragma GCC unroll 4
    for (int64_t r = 0; r < count; r++) given[r] = NAMED(load_floats)(rows + r * inputs);
#pragma GCC unroll 4
    for (int64_t o = 0; o < outputs; o++) {
        Floats weight = NAMED(weights_at)(kind, weights + o * pitch);
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) sums[o][r] = V(fma)(weight, given[r], sums[o][r]);
    }
}

INLINE TARGET void NAMED(float_block)(enum kind kind, const Job *job, int64_t output, int64_t outputs, int64_t row, int64_t count) {
    const int64_t width = kind == FLOAT32 ? 4 : 2, pitch = width * job->inputs, lines = VECTOR / width;
    const float *rows = job->rows + row * job->inputs;
    const char *weights = (const char *)job->weights + output * pitch;
    Floats sums[BLOCK][4];
#pragma GCC unroll 4
    for (int64_t o = 0; o < BLOCK; o++)
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) sums[o][r] = V(splat)(0);
    int64_t i = 0;
    for (; i + LANES <= job->inputs; i += LANES)
        NAMED(float_vectors)(kind, weights + i * width, pitch, rows + i, job->inputs, outputs, count, sums,
                             i % lines == 0);
    if (i < job->inputs) { /* copies, padded with zeros */
        const int64_t left = job->inputs - i;
        char last[BLOCK][LANES * 4] = {{0}};
        float given[4][LANES] = {{0}};
        for (int64_t o = 0; o < outputs; o++) memcpy(last[o], weights + o * pitch + i * width, left * width);
        for (int64_t r = 0; r < count; r++) memcpy(given[r], rows + r * job->inputs + i, left * sizeof(float));
        NAMED(float_vectors)(kind, last[0], LANES * 4, given[0], LANES, outputs, count, sums, 0);
    }
    for (int64_t r = 0; r < count; r++) {
        Floats of_row[BLOCK] = {sums[0][r], sums[1][r], sums[2][r], sums[3][r]};
        float found[BLOCK];
        V(store_sums)(found, of_row);
        memcpy(job->products + (row + r) * job->outputs + output, found, outputs * sizeof(float));
    }
}

INLINE TARGET void NAMED(floats)(enum kind kind, const Job *job, int64_t start, int64_t end) {
    int64_t output = start;
    for (; output + BLOCK <= end; output += BLOCK) {
        int64_t row = 0;
        for (; ROWS == 4 && row + 4 <= job->count; row += 4) NAMED(float_block)(kind, job, output, BLOCK, row, 4);
        for (; row + 2 <= job->count; row += 2) NAMED(float_block)(kind, job, output, BLOCK, row, 2);
        if (row < job->count) NAMED(float_block)(kind, job, output, BLOCK, row, 1);
    }
    for (; output < end; output++)
        for (int64_t row = 0; row < job->count; row++) NAMED(float_block)(kind, job, output, 1, row, 1);
}

TARGET static void NAMED(float32)(const Job *job, const Quantised *rows, int64_t start, int64_t end) {
    (void)rows;
    NAMED(floats)(FLOAT32, job, start, end);
}

TARGET static void NAMED(bfloat16)(const Job *job, const Quantised *rows, int64_t start, int64_t end) {
    (void)rows;
    NAMED(floats)(BFLOAT16, job, start, end);
}

TARGET static void NAMED(float16)(const Job *job, const Quantised *rows, int64_t start, int64_t end) {
    (void)rows;
    NAMED(floats)(FLOAT16, job, start, end);
}

/* ---- weights in tiles: scales and zeros ---- */

INLINE TARGET Floats NAMED(numbers_at)(enum number kind, const uint8_t *at, int64_t index) {
    switch (kind) {
    case AS_FLOAT16: return NAMED(weights_at)(FLOAT16, at + 2 * index);
    case AS_BFLOAT16: return NAMED(weights_at)(BFLOAT16, at + 2 * index);
    case AS_FLOAT32: return NAMED(weights_at)(FLOAT32, at + 4 * index);
    case E8M0: return (Floats)V(larger)(V(from_uint8)(at + index) << 23, V(splat_int)(0x400000));
    case STEPS: return V(floats)(V(from_int8)(at + index));
    case LOWER_STEPS: return V(floats)(V(from_uint8)(at + index) & V(splat_int)(15));
    case UPPER_STEPS: return V(floats)(V(from_uint8)(at + index) >> 4);
    case UNSIGNED_STEPS:
    case CODES: return V(floats)(V(from_uint8)(at + index));
    default: return V(splat)(0);
    }
}

/* Scales; with `scales`: zeros times `factor`, minus `base` times the scales. */
INLINE TARGET void NAMED(convert)(enum number kind, const Numbers *these, float factor, const float *scales, float base,
                                  float offset) {
    const int64_t size = kind == AS_FLOAT32 ? 64 : kind <= AS_BFLOAT16 ? 32 : 16;
    const int steps = kind >= STEPS && kind <= UPPER_STEPS;
    const int64_t each = steps ? these->each : these->count;
    const uint8_t *at = these->at, *units = these->units;
    for (int64_t begin = 0; begin < these->count; begin += each, units += 2 * TILE) {
        int64_t end = begin + each < these->count ? begin + each : these->count;
        Floats unit[PARTS];
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++)
            unit[part] = steps ? NAMED(weights_at)(FLOAT16, units + 2 * LANES * part) * V(splat)(factor) : V(splat)(factor);
        for (int64_t i = begin; i < end; i++, at += size)
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) {
                Floats value = NAMED(numbers_at)(kind, at, part * LANES);
                if (steps || (scales && kind != CODES)) value *= unit[part];
                if (scales) {
                    Floats scale = NAMED(load_floats)(scales + i * TILE + part * LANES);
                    if (kind == CODES) value = (V(splat)(offset) - value) * (scale * unit[part]);
                    value = V(fma)(V(splat)(-base), scale, value);
                }
                NAMED(store)(these->to + i * TILE + part * LANES, value);
            }
    }
}

TARGET static void NAMED(convert_scales)(enum number kind, const Numbers *these) {
#define CONVERT(kind) case kind: NAMED(convert)(kind, these, 1, NULL, 0, 0); break
    switch (kind) {
        CONVERT(AS_FLOAT16);
        CONVERT(AS_BFLOAT16);
        CONVERT(AS_FLOAT32);
        CONVERT(E8M0);
        CONVERT(STEPS);
        CONVERT(UNSIGNED_STEPS);
    default: NAMED(convert)(LOWER_STEPS, these, 1, NULL, 0, 0);
    }
#undef CONVERT
}

TARGET static void NAMED(convert_zeros)(enum number kind, const Numbers *these, float factor, const float *scales, float base,
                                        float offset) {
#define CONVERT(kind) case kind: NAMED(convert)(kind, these, factor, scales, base, offset); break
    switch (kind) {
        CONVERT(AS_FLOAT16);
        CONVERT(AS_BFLOAT16);
        CONVERT(AS_FLOAT32);
        CONVERT(STEPS);
        CONVERT(UNSIGNED_STEPS);
        CONVERT(UPPER_STEPS);
    default: NAMED(convert)(CODES, these, factor, scales, base, offset);
    }
#undef CONVERT
}

/* Scales and zeros of a panel, followed by one zero scale and one zero. They are for codes that are too large by `base`,
without the weight's factor, by which the caller multiplies in the end. */
INLINE TARGET void NAMED(all_numbers)(const Grouped *weight, const Panel *panel, float base, float *scales, float *zeros) {
    Numbers these = {panel->scales, panel->scale_units, weight->group ? UNITS / weight->group : 1, panel->groups, scales};
    for (const uint8_t *line = panel->scales; line < panel->codes; line += VECTOR) fetch(line + ahead, 1, VECTOR);
    NAMED(convert_scales)(weight->scale, &these);
    memset(scales + panel->groups * TILE, 0, TILE * sizeof(float));
    if (zeros == NULL) return;
    these.at = panel->zeros, these.units = panel->zero_units, these.to = zeros;
    NAMED(convert_zeros)(weight->zero, &these, (float)(1 / weight->factor), scales, base, (float)weight->offset);
    memset(zeros + panel->groups * TILE, 0, TILE * sizeof(float));
}

/* ---- weights in tiles: codes for integers ---- */

/* Bits of the bytes of the vector at `at`, shifted left by `by`, or right if `by` is negative. */
INLINE TARGET Bytes NAMED(moved)(const uint8_t *at, int by, int mask) {
    Bytes bytes = NAMED(load)(at);
    Bytes there = by > 0 ? (Bytes)((UWords)bytes << by) : by < 0 ? (Bytes)((UWords)bytes >> -by) : bytes;
    return there & NAMED(splat_byte)(mask);
}

/* The part, at `at`, of one of the eight vectors of codes of a chunk. */
INLINE TARGET Bytes NAMED(codes_of)(int bits, const uint8_t *at, int vector) {
    const int each = 8 / bits, whole = bits * each;
    if (bits == 8) return NAMED(load)(at + vector * VECTOR);
    if (vector < whole) return NAMED(moved)(at + vector / each * VECTOR, -(vector % each * bits), (1 << bits) - 1);
    Bytes code = NAMED(splat_byte)(0);
#pragma GCC unroll 3
    for (int i = 0, shift = 0; i < 3; i++) {
        const int *piece = pieces[bits][vector - whole][i], mask = ((1 << piece[2]) - 1) << shift;
        if (mask) code |= NAMED(moved)(at + piece[0] * VECTOR, shift - piece[1], mask);
        shift += piece[2];
    }
    return code;
}

#define IS_PAIRED(bits, table) (PAIRED && ((table) ? (table) == NARROW : (bits) < 8))

/* FINE: three times a word is 255 * (one byte - 96) + another byte - 127. The other byte is multiplied only with the upper
bytes of rows: the omitted products are no larger than the rounding errors of rows. */
#define FINE_BASE 96
#define FINE_OTHER 127

/* Adds the products with a chunk of codes to `upper` and `lower`. `sets`: number of sets of sums, which vectors use
alternately, or, with groups of 16 inputs, in order. `merged`: adds all products to `upper`, which needs small groups. */
INLINE TARGET void NAMED(integer_chunk)(int bits, int table, int small, int sets, int merged, const uint8_t *codes,
                                        const Bytes values[2], const Numbered *from, int count, Ints upper[ROWS][2][PARTS],
                                        Ints lower[ROWS][2][PARTS]) {
    fetch(codes + ahead, bits, VECTOR);
    const int paired = IS_PAIRED(bits, table);
    const int many = bits == 6 ? 2 : bits == 5 || table || small ? 4 : 8; /* vectors whose products are summed in 16 bits */
    Words uppers[ROWS][PARTS], lowers[ROWS][PARTS];
#pragma GCC unroll 8
    for (int vector = 0; vector < 8; vector++) {
        const int set = sets == 1 ? 0 : small ? vector / 4 : vector % 2;
        Bytes code[PARTS];
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            code[part] = NAMED(codes_of)(bits, codes + part * WIDE, vector);
            if (table == FINE) continue;
            if (table) code[part] = V(look_up)(values[0], code[part]);
            else if (SIGNED && bits == 8) code[part] ^= NAMED(splat_byte)(0x80);
        }
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            Bytes high = NAMED(four_bytes)(from->high + r * from->stride + vector * 4);
            Bytes low = NAMED(four_bytes)(from->low + r * from->stride + vector * 4);
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) {
#if PAIRED
                if (paired) {
                    if (vector % many == 0) uppers[r][part] = lowers[r][part] = (Words)V(splat_int)(0);
                    uppers[r][part] = pairs_avx2(uppers[r][part], code[part], high);
                    lowers[r][part] = pairs_avx2(lowers[r][part], code[part], low);
                    if ((vector + 1) % many) continue;
                    Ints *high_sums = &upper[r][set][part], *low_sums = merged ? high_sums : &lower[r][set][part];
                    *high_sums = with_pairs_avx2(*high_sums, uppers[r][part], merged ? BASE : 1);
                    *low_sums = with_pairs_avx2(*low_sums, lowers[r][part], 1);
                    continue;
                }
#else
                (void)paired, (void)many, (void)merged, (void)uppers, (void)lowers;
#endif
                const Bytes number = table == FINE ? V(look_up)(values[0], code[part]) : code[part];
                upper[r][set][part] = DOT(upper[r][set][part], number, high);
                lower[r][set][part] = DOT(lower[r][set][part], number, low);
#if !SIGNED
                if (table != FINE) continue;
                Ints *other = &lower[r][small ? set : 1][part];
                *other = DOT(*other, V(look_up)(values[1], code[part]), high);
                V(keep)(&upper[r][set][part], &lower[r][set][part], other);
#endif
            }
        }
    }
}

INLINE TARGET Floats NAMED(joined)(Ints upper, Ints lower, int merged) {
    return merged ? V(floats)(upper) : V(fma)(V(floats)(upper), V(splat)(BASE), V(floats)(lower));
}

/* Adds a group to the sums of a row. `total`: the sum of the row's numbers in the group; `zero`: NULL if each zero is -base
* scale. */
INLINE TARGET Floats NAMED(with_group)(Floats sums, Floats dot, const float *scale, const float *zero, float base,
                                       float total) {
    if (zero == NULL) return V(fma)(NAMED(load_floats)(scale), dot - V(splat)(base * total), sums);
    sums = V(fma)(NAMED(load_floats)(zero), V(splat)(total), sums);
    return V(fma)(NAMED(load_floats)(scale), dot, sums);
}

INLINE TARGET void NAMED(store_lanes)(const GroupedJob *job, int64_t tile, int64_t row, const Floats sums[PARTS]) {
    int64_t left = job->weight->outputs - tile * TILE;
    memcpy(job->products + row * job->pitch + tile * TILE, sums, (left < TILE ? left : TILE) * sizeof(float));
}

/* `group`: 16, 32, or 0 for more; `values`: the bytes of a table. */
INLINE TARGET void NAMED(integer_block)(int bits, int table, int group, const Bytes values[2], const GroupedJob *job,
                                        const Quantised *rows, const Run *run, int64_t tile, int64_t row, int count) {
    const Grouped *weight = job->weight;
    const uint8_t *at = run->tiles + tile * weight->tile_bytes;
    const int small = group == 16, sets = small || (count == 1 && !group && !PAIRED && table != FINE) ? 2 : 1;
    const int64_t chunks = small ? 1 : weight->group ? weight->group / CHUNK : weight->inputs; /* per group, at most */
    const int merged = group && IS_PAIRED(bits, table);
    const float unit = (float)(table == FINE ? weight->unit * BASE / 3 : weight->factor);
    const int flipped = SIGNED && (table || bits == 8) && table != NARROW;
    const int least = flipped ? 128 : table == NARROW ? least_of(weight) : 0;
    float scales[(MOST_GROUPS + 1) * TILE], zeros[(MOST_GROUPS + 1) * TILE];
    const float base = table == FINE ? FINE_BASE : base_of(weight) - (float)least;
    /* Factor of the totals of upper bytes, relative to `base` */
    const float other = table == FINE ? (float)FINE_OTHER / FINE_BASE : 0;
    Numbered from = {rows->high + row * rows->stride, rows->low + row * rows->stride,
                     rows->sums + row * (rows->stride / SUMMED), rows->pairs + row * (rows->stride / CHUNK), rows->stride,
                     rows->highs + row * (rows->stride / SUMMED)};
    Floats sums[ROWS][PARTS];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) sums[r][part] = V(splat)(0);
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, at, first);
        const float *scale = scales, *zero = weight->zero == NONE ? NULL : zeros;
        NAMED(all_numbers)(weight, &panel, base, scales, weight->zero == NONE ? NULL : zeros);
        const uint8_t *codes = panel.codes;
        at = end_of(weight, &panel);
        while (codes < at) {
            Ints upper[ROWS][2][PARTS], lower[ROWS][2][PARTS];
            float totals[4] = {0};
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
#pragma GCC unroll 2
                for (int set = 0; set < 2; set++)
#pragma GCC unroll 4
                    for (int part = 0; part < PARTS; part++)
                        upper[r][set][part] = lower[r][set][part] = V(splat_int)(0);
            const uint8_t *stop = codes + (group ? 1 : chunks) * bits * VECTOR;
            if (!group && stop > at) stop = at;
            do {
                NAMED(integer_chunk)(bits, table, small, sets, merged, codes, values, &from, count, upper, lower);
#pragma GCC unroll 4
                for (int r = 0; r < count; r++) {
                    const float *highs = from.highs + r * (from.stride / SUMMED);
                    if (!group || table == FINE) totals[r] += from.pairs[r * (from.stride / CHUNK)];
                    if (table == FINE) totals[r] += other * (highs[0] + highs[1]);
                }
                from.high += CHUNK, from.low += CHUNK, from.sums += CHUNK / SUMMED, from.highs += CHUNK / SUMMED;
                from.pairs++, codes += bits * VECTOR;
            } while (!group && codes < stop);
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                for (int part = 0; part < PARTS; part++) {
                    const float *own = scale + part * LANES, *own_zero = zero ? zero + part * LANES : NULL;
                    Ints *high = &upper[r][0][part], *low = &lower[r][0][part];
                    if (small) {
                        const float *total = from.sums + r * (from.stride / SUMMED) - CHUNK / SUMMED;
                        const float *highs = from.highs + r * (from.stride / SUMMED) - CHUNK / SUMMED;
                        const float both[2] = {total[0] + other * highs[0], total[1] + other * highs[1]};
                        if (table == FINE) total = both;
                        Floats dot = NAMED(joined)(high[0], low[0], merged);
                        sums[r][part] = NAMED(with_group)(sums[r][part], dot, own, own_zero, base, total[0]);
                        own += TILE, own_zero = zero ? own_zero + TILE : NULL;
                        dot = NAMED(joined)(high[PARTS], low[PARTS], merged);
                        sums[r][part] = NAMED(with_group)(sums[r][part], dot, own, own_zero, base, total[1]);
                        continue;
                    }
                    if (sets == 2) high[0] += high[PARTS], low[0] += low[PARTS];
                    float total = group && table != FINE ? from.pairs[r * (from.stride / CHUNK) - 1] : totals[r];
                    if (table == FINE) low[0] += low[PARTS];
                    const Floats dot = NAMED(joined)(high[0], low[0], merged);
                    sums[r][part] = NAMED(with_group)(sums[r][part], dot, own, own_zero, base, total);
                }
            scale += small ? 2 * TILE : TILE;
            if (zero) zero += small ? 2 * TILE : TILE;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) sums[r][part] *= V(splat)(rows->steps[row + r] * unit);
        NAMED(store_lanes)(job, tile, row + r, sums[r]);
    }
}

/* ---- weights in tiles: codes of four bits, multiplied as words ---- */

#if PAIRED
/* `fine`: tables of words, whose products fit in 32-bit sums of only 16 inputs; else unsigned bytes. */
INLINE TARGET void NAMED(word_block)(int fine, const Bytes tables[2], const GroupedJob *job, const Quantised *rows,
                                     const Run *run, int64_t tile, int64_t row, int count) {
    const Grouped *weight = job->weight;
    const uint8_t *at = run->tiles + tile * weight->tile_bytes;
    const float base = fine ? 0 : 128;
    float scales[(MOST_GROUPS + 1) * TILE], zeros[(MOST_GROUPS + 1) * TILE];
    const int16_t *from = rows->words + row * rows->stride;
    const float *totals = rows->sums + row * (rows->stride / SUMMED);
    Floats sums[ROWS][PARTS];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) sums[r][part] = V(splat)(0);
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, at, first);
        const float *scale = scales, *zero = weight->zero == NONE ? NULL : zeros;
        NAMED(all_numbers)(weight, &panel, base, scales, weight->zero == NONE ? NULL : zeros);
        const int64_t halves = 2 * parts_of(panel.inputs, CHUNK), group = weight->group ? weight->group / SUMMED : halves;
        for (int64_t begin = 0; begin < halves; begin += group) {
            const int64_t end = begin + group < halves ? begin + group : halves;
            Floats dots[ROWS][PARTS][2];
            float total[ROWS] = {0};
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                for (int part = 0; part < PARTS; part++) dots[r][part][0] = dots[r][part][1] = V(splat)(0);
            for (int64_t some = begin; some < end;) {
                const int64_t stop = fine || some + 16 > end ? fine ? some + 1 : end : some + 16;
                Ints both[ROWS][PARTS][2];
#pragma GCC unroll 4
                for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                    for (int part = 0; part < PARTS; part++) both[r][part][0] = both[r][part][1] = V(splat_int)(0);
                do {
                    const uint8_t *codes = panel.codes + some * 2 * VECTOR;
                    fetch(codes + ahead, 2, VECTOR);
#pragma GCC unroll 4
                    for (int vector = 0; vector < 4; vector++)
#pragma GCC unroll 4
                        for (int part = 0; part < PARTS; part++) {
                            const Bytes code = NAMED(codes_of)(4, codes + part * WIDE, vector);
                            Words words[2];
                            V(join_bytes)(V(look_up)(tables[0], code), fine ? V(look_up)(tables[1], code) : tables[1], words);
#pragma GCC unroll 4
                            for (int r = 0; r < count; r++) {
                                const Words numbers = V(four_words)(from + r * rows->stride + vector * 4);
                                both[r][part][0] = WORDS(both[r][part][0], words[0], numbers);
                                both[r][part][1] = WORDS(both[r][part][1], words[1], numbers);
                            }
                        }
#pragma GCC unroll 4
                    for (int r = 0; r < count; r++) total[r] += totals[r * (rows->stride / SUMMED)];
                    from += SUMMED, totals++;
                } while (++some < stop);
#pragma GCC unroll 4
                for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                    for (int part = 0; part < PARTS; part++)
#pragma GCC unroll 2
                        for (int i = 0; i < 2; i++) dots[r][part][i] += V(floats)(both[r][part][i]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                for (int part = 0; part < PARTS; part++)
                    sums[r][part] = NAMED(with_group)(sums[r][part], V(neighbours)(dots[r][part][0], dots[r][part][1]),
                                                      scale + part * LANES, zero ? zero + part * LANES : NULL, base, total[r]);
            scale += TILE;
            if (zero) zero += TILE;
        }
        at = end_of(weight, &panel);
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) {
        const float unit = rows->steps[row + r] * (float)(fine ? weight->unit : weight->factor);
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) sums[r][part] *= V(splat)(unit);
        NAMED(store_lanes)(job, tile, row + r, sums[r]);
    }
}
#endif

/* ---- weights in tiles: codes for floats ---- */

/* Four times as many weights as a vector has numbers, from one of the eight vectors of a chunk: its first inputs, second
inputs and so on. */
INLINE TARGET void NAMED(floats_of)(enum code kind, const uint8_t *codes, int vector, int part, V(FloatTable) table,
                                    Floats to[4]) {
    if (kind == FLOAT_TABLE) {
        Ints both = (Ints)NAMED(load)(codes + vector / 2 * VECTOR + part * WIDE);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) to[i] = V(look_up_float)(table, (Ints)((UInts)both >> (8 * i + vector % 2 * 4)));
        return;
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        Halves pairs = NAMED(load_halves)(codes + vector * VECTOR + half * (VECTOR / 2) + part * (WIDE / 2));
        Halves first = pairs << 8, second = pairs, none = pairs ^ pairs;
        if (kind == E4M3) {
            first = (first >> 1) & (none + (short)0xbf80);
            second = (second >> 1) & (none + (short)0xbf80);
        } else {
            second &= none + (short)0xff00;
        }
        to[2 * half] = V(from_float16)(first);
        to[2 * half + 1] = V(from_float16)(second);
    }
}

/* Adds products with four inputs of E4M3 times 2^-120, without a conversion: the bits of a code are placed at a float's
bits, and codes without an exponent become denormal floats. The first parts of sums belong to even outputs. */
#if SCALED
INLINE TARGET void NAMED(add_scaled)(const uint8_t *codes, const float *given, int64_t stride, int count, int sets,
                                     Floats group[ROWS][4][PARTS]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        Words pairs = (Words)NAMED(load)(codes + i / 2 * WIDE);
        if (i % 2 == 0) pairs <<= 8;
        Ints both = (Ints)(pairs >> 4 & (Words)V(splat_int)((int)0x87f087f0));
        Floats even = (Floats)(both << 16), odd = (Floats)(both & V(splat_int)((int)0xffff0000));
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            const Floats number = V(splat)(given[r * stride + i]);
            group[r][i % sets][0] = V(fma_now)(even, number, group[r][i % sets][0]);
            group[r][i % sets][1] = V(fma_now)(odd, number, group[r][i % sets][1]);
        }
    }
}
#endif

INLINE TARGET void NAMED(code_float_block)(enum code kind, const GroupedJob *job, const Quantised *scaled, const Run *run,
                                           int64_t tile, int64_t row, int count) {
    const Grouped *weight = job->weight;
    const uint8_t *at = run->tiles + tile * weight->tile_bytes;
    const int bytes = kind == FLOAT_TABLE ? 4 * VECTOR : 8 * VECTOR;
    const int apart = SCALED && kind == E4M3, sets = apart && count == 1 ? 4 : 2;
    const int64_t half = weight->group == CHUNK / 2;
    const int64_t stride = apart ? scaled->stride / 2 : job->stride;
    const float *from = (apart ? (const float *)scaled->high : job->rows) + row * stride;
    float scales[(MOST_GROUPS + 1) * TILE];
    V(FloatTable) table = V(float_table)(weight->values);
    Floats sums[ROWS][PARTS];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) sums[r][part] = V(splat)(0);
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, at, first);
        NAMED(all_numbers)(weight, &panel, 0, scales, NULL);
        const float *scale = scales;
        int64_t vectors = parts_of(panel.inputs, CHUNK) * 8; /* of four inputs */
        int64_t each = half ? 4 : weight->group ? weight->group / 4 : vectors;
        for (int64_t begin = 0; begin < vectors; begin += each, scale += TILE) {
            int64_t end = begin + each < vectors ? begin + each : vectors;
            Floats group[ROWS][4][PARTS];
#pragma GCC unroll 4
            for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                for (int set = 0; set < sets; set++)
#pragma GCC unroll 4
                    for (int part = 0; part < PARTS; part++) group[r][set][part] = V(splat)(0);
            for (int64_t some = begin; some < end; some += 4) {
                const uint8_t *codes = panel.codes + some / 8 * bytes;
                const int later = some % 8 != 0;
                const float *given = from + first + some * 4;
                codes += later * (bytes / 2);
                fetch(codes + ahead, bytes / 2 / VECTOR, VECTOR);
#pragma GCC unroll 4
                for (int vector = 0; vector < 4; vector++) {
#if SCALED
                    if (apart) {
                        NAMED(add_scaled)(codes + vector * VECTOR, given + vector * 4, stride, count, sets, group);
                        continue;
                    }
#endif
#pragma GCC unroll 4
                    for (int part = 0; part < PARTS; part++) {
                        Floats values[4];
                        NAMED(floats_of)(kind, codes, vector, part, table, values);
#pragma GCC unroll 4
                        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                            for (int r = 0; r < count; r++)
                                group[r][i % 2][part] = V(fma)(values[i], V(splat)(given[r * stride + vector * 4 + i]),
                                                               group[r][i % 2][part]);
                    }
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < count; r++) {
                Floats dots[PARTS];
#pragma GCC unroll 4
                for (int part = 0; part < PARTS; part++) {
                    dots[part] = group[r][0][part] + group[r][1][part];
                    if (sets == 4) dots[part] += group[r][2][part] + group[r][3][part];
                }
#if SCALED
                if (apart) V(interleave)(dots);
#endif
#pragma GCC unroll 4
                for (int part = 0; part < PARTS; part++)
                    sums[r][part] = V(fma)(NAMED(load_floats)(scale + part * LANES), dots[part], sums[r][part]);
            }
        }
        at = end_of(weight, &panel);
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++)
            sums[r][part] = apart ? sums[r][part] * V(splat)(0x1p20f) * V(splat)(scaled->steps[row + r])
                                  : sums[r][part] * V(splat)((float)weight->factor);
        NAMED(store_lanes)(job, tile, row + r, sums[r]);
    }
}

/* ---- entry points ---- */

/* Calls `block` for as many rows at a time as possible. */
#define FOR_SOME_ROWS(block, ...)                                                             \
    for (int64_t tile = start; tile < end; tile++) {                                             \
        int64_t row = run->row, last = run->row + run->count;                                    \
        for (; ROWS == 4 && row + 4 <= last; row += 4) NAMED(block)(__VA_ARGS__, tile, row, ROWS); \
        for (; row + 2 <= last; row += 2) NAMED(block)(__VA_ARGS__, tile, row, 2);            \
        if (row < last) NAMED(block)(__VA_ARGS__, tile, row, 1);                              \
    }

#define NO_BYTES {NAMED(splat_byte)(0), NAMED(splat_byte)(0)}
#define BYTES(less) {V(table)(job->weight->bytes) - NAMED(splat_byte)(less), NAMED(splat_byte)(0)}

#define INTEGERS(name, bits, table, ...)                                                                                  \
    TARGET static void NAMED(name)(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) { \
        const Bytes values[2] = __VA_ARGS__;                                                                            \
        if (job->weight->group == 16) {                                                                                 \
            FOR_SOME_ROWS(integer_block, bits, table, 16, values, job, rows, run)                                       \
        } else if (job->weight->group == CHUNK) {                                                                       \
            FOR_SOME_ROWS(integer_block, bits, table, CHUNK, values, job, rows, run)                                    \
        } else {                                                                                                        \
            FOR_SOME_ROWS(integer_block, bits, table, 0, values, job, rows, run)                                        \
        }                                                                                                               \
    }

#define FLOATS(name, kind)                                                                                              \
    TARGET static void NAMED(name)(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) { \
        FOR_SOME_ROWS(code_float_block, kind, job, rows, run)                                                           \
    }

INTEGERS(two_bits, 2, 0, NO_BYTES)
INTEGERS(three_bits, 3, 0, NO_BYTES)
INTEGERS(four_bits, 4, 0, NO_BYTES)
INTEGERS(five_bits, 5, 0, NO_BYTES)
INTEGERS(six_bits, 6, 0, NO_BYTES)
INTEGERS(eight_bits, 8, 0, NO_BYTES)
#if PAIRED
INTEGERS(narrow_table, 4, NARROW, BYTES(least_of(job->weight)))

TARGET static void NAMED(wide_table)(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) {
    const Bytes tables[2] = {V(table)(job->weight->bytes), NAMED(splat_byte)(0)};
    FOR_SOME_ROWS(word_block, 0, tables, job, rows, run)
}

TARGET static void NAMED(table_bits)(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) {
    (is_narrow(job->weight) ? NAMED(narrow_table) : NAMED(wide_table))(job, rows, run, start, end);
}
#else
INTEGERS(table_bits, 4, WIDE_TABLE, BYTES(SIGNED ? 128 : 0))
#endif

#if PAIRED
TARGET static void NAMED(float_table)(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) {
    uint8_t bytes[2][16];
    for (int i = 0; i < 32; i++) bytes[i % 2][i / 2] = (uint8_t)(job->weight->words[i / 2] >> i % 2 * 8);
    const Bytes tables[2] = {V(table)(bytes[0]), V(table)(bytes[1])};
    FOR_SOME_ROWS(word_block, 1, tables, job, rows, run)
}
#define IN_WORDS 1
#elif !SIGNED
INLINE TARGET Bytes NAMED(fine_bytes)(const int16_t *words, int other) {
    uint8_t bytes[16];
    for (int i = 0; i < 16; i++) {
        const int number = 3 * words[i] + BASE * FINE_BASE + FINE_OTHER;
        bytes[i] = (uint8_t)(other ? number % BASE : number / BASE);
    }
    return V(table)(bytes);
}

INTEGERS(float_table, 4, FINE, {NAMED(fine_bytes)(job->weight->words, 0), NAMED(fine_bytes)(job->weight->words, 1)})
#define IN_WORDS 1
#else
FLOATS(float_table, FLOAT_TABLE)
#define IN_WORDS 0
#endif
#if SCALED
FLOATS(scaled_e4m3, E4M3)

TARGET static void NAMED(e4m3)(const GroupedJob *job, const Quantised *rows, const Run *run, int64_t start, int64_t end) {
    const unsigned mode = _mm_getcsr(); /* enables denormal numbers, whatever the settings of this thread */
    _mm_setcsr(mode & ~0x8040u);
    NAMED(scaled_e4m3)(job, rows, run, start, end);
    _mm_setcsr(mode);
}
#else
FLOATS(e4m3, E4M3)
#endif
FLOATS(e5m2, E5M2)

TARGET static void NAMED(dequantise)(const Grouped *weight, const uint8_t *at, int64_t lane, int64_t lanes, float *to) {
    dequantise_loops(weight, at, lane, lanes, to);
}

static const Path NAMED(path) = {
    .name = NAME,
    .is_here = NAMED(is_here),
    .quantise = NAMED(quantise),
    .split = SCALED ? scale_rows : NULL,
    .in_words = IN_WORDS,
    .floats = {NAMED(float32), NAMED(bfloat16), NAMED(float16)},
    .plain = {NULL, NULL, NAMED(two_bits), NAMED(three_bits), NAMED(four_bits), NAMED(five_bits), NAMED(six_bits), NULL,
              NAMED(eight_bits)},
    .coded = {[TABLE] = NAMED(table_bits), [FLOAT_TABLE] = NAMED(float_table), [E4M3] = NAMED(e4m3), [E5M2] = NAMED(e5m2)},
    .dequantise = NAMED(dequantise),
};

#undef LANES
#undef WIDE
#undef PARTS
#undef V
#undef Bytes
#undef Ints
#undef UInts
#undef Words
#undef UWords
#undef Floats
#undef Halves
#undef FOR_SOME_ROWS
#undef INTEGERS
#undef NO_BYTES
#undef BYTES
#undef FINE_BASE
#undef FINE_OTHER
#undef FLOATS
#undef NAME
#undef NAMED
#undef TARGET
#undef BITS
#undef DOT
#undef SIGNED
#undef PAIRED
#undef IS_PAIRED
#undef ROWS
#undef SCALED
#undef WORDS
#undef IN_WORDS
