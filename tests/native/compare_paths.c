/* Compares the kernels of every path that this CPU has with plain loops; prints the paths, and ends with 1 where they differ. */

#include <stdio.h>

#include "layout.h"

#define MOST 1300
#define OUTPUTS 37

static unsigned state = 1;

static unsigned number(void) { return (state = state * 1664525 + 1013904223) >> 8; }
static float between(void) { return (float)(number() % 2001) / 1000 - 1; }

static int differ(const char *path, const char *what, const float *found, const float *wanted, int64_t count) {
    double most = 0, off = 0;
    for (int64_t i = 0; i < count; i++) {
        most = fabs(wanted[i]) > most ? fabs(wanted[i]) : most;
        off = !(fabs(found[i] - wanted[i]) <= off) ? fabs(found[i] - wanted[i]) : off;
    }
    if (off <= 2e-4 * most) return 0;
    printf("%s: %s is off by %g of %g\n", path, what, off, most);
    return 1;
}

static int floats_differ(const Path *path, int64_t inputs, int64_t count) {
    static float rows[9 * MOST], found[9 * OUTPUTS], wanted[9 * OUTPUTS], floats[OUTPUTS * MOST];
    if (path->floats[FLOAT32] == NULL) return 0;
    for (int64_t i = 0; i < OUTPUTS * inputs; i++) floats[i] = between();
    for (int64_t i = 0; i < count * inputs; i++) rows[i] = between();
    for (int64_t row = 0; row < count; row++)
        for (int64_t o = 0; o < OUTPUTS; o++) {
            double sum = 0;
            for (int64_t i = 0; i < inputs; i++) sum += (double)rows[row * inputs + i] * floats[o * inputs + i];
            wanted[row * OUTPUTS + o] = (float)sum;
        }
    Job job = {floats, rows, found, count, inputs, OUTPUTS, 1};
    path->floats[FLOAT32](&job, NULL, 0, OUTPUTS);
    return differ(path->name, "float32", found, wanted, count * OUTPUTS);
}

static int codes_differ(const Path *path, int code, int bits, int64_t group, int scale, int zero, int64_t inputs, int64_t count) {
    static float rows[9 * (MOST + CHUNK)], found[9 * OUTPUTS], wanted[9 * OUTPUTS], values[256];
    static uint8_t bytes[16];
    static int16_t words[16];
    for (int i = 0; i < 256; i++) values[i] = code == PLAIN ? (float)(i - 3) : between();
    if (code == TABLE) {
        const unsigned range = scale == E8M0 ? 32 : 255;
        for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)(number() % range + 1), values[i] = 0.5f * (bytes[i] - 128.0f);
    }
    if (code == FLOAT_TABLE)
        for (int i = 0; i < 16; i++) words[i] = (int16_t)lrintf(8191 * values[i]), values[i] = words[i] / 8191.0f;
    if (code == E4M3 || code == E5M2)
        for (int i = 0; i < 256; i++) {
            int size = i & 127;
            values[i] = code == E5M2 ? from_float16((uint16_t)(i << 8)) : (i & 128 ? -1.0f : 1.0f) *
                        (float)(size < 8 ? size : (8 + size % 8) << (size / 8 - 1)) * 0x1p-9f;
        }
    int64_t whole = parts_of(inputs, CHUNK) * CHUNK;
    Grouped weight = {.code = code, .bits = bits, .group = group, .inputs = inputs,
                      .outputs = OUTPUTS, .offset = 3, .scale = scale, .zero = zero, .pairs = code == E4M3 || code == E5M2,
                      .factor = code == TABLE ? 0.5 : code == E4M3 ? 256 : 1, .bytes = bytes, .values = values,
                      .words = words, .unit = 1.0 / 8191};
    lay_out(&weight);
    int64_t tiles = parts_of(OUTPUTS, TILE);
    uint8_t *at = calloc(tiles * weight.tile_bytes + 8192, 1);
    for (int64_t tile = 0; tile < tiles; tile++) {
        uint8_t *begin = at + tile * weight.tile_bytes;
        for (int64_t first = 0; first < inputs; first += weight.panel) {
            Panel panel = panel_at(&weight, begin, first);
            uint8_t *end = (uint8_t *)end_of(&weight, &panel);
            for (uint8_t *byte = begin; byte < panel.codes; byte++) *byte = (uint8_t)(scale == E8M0 ? 120 + number() % 8 : number());
            for (int64_t i = 0; scale <= AS_FLOAT32 && i < panel.groups * TILE; i++) {
                float value = between();
                uint16_t half = scale == AS_FLOAT16 ? 0x2c00 + number() % 1024 : 0x3c00 + number() % 256;
                if (scale == AS_FLOAT32) memcpy(begin + 4 * i, &value, 4);
                else memcpy(begin + 2 * i, &half, 2);
            }
            for (int64_t i = 0; zero <= AS_BFLOAT16 && i < panel.groups * TILE; i++) {
                uint16_t half = zero == AS_FLOAT16 ? 0x2c00 + number() % 1024 : 0x3c00 + number() % 256;
                memcpy((uint8_t *)panel.zeros + 2 * i, &half, 2);
            }
            for (uint8_t *unit = (uint8_t *)panel.scale_units; unit + 1 < panel.codes; unit += 2) {
                uint16_t half = 0x1c00 + number() % 1024;
                memcpy(unit, &half, 2);
            }
            for (uint8_t *byte = (uint8_t *)panel.codes; byte < end; byte++) {
                *byte = (uint8_t)number();
                if (code == E4M3 && (*byte & 127) == 127) *byte = 1;
                if (code == E5M2 && (*byte & 124) == 124) *byte = 1;
            }
            begin = end;
        }
    }
    for (int64_t i = 0; i < count * whole; i++) rows[i] = i % whole < inputs ? between() : 0;
    GroupedJob job = {&weight, rows, wanted, count, whole, OUTPUTS, 1};
    Run all = {at, 0, count};
    grouped_plainly(&job, NULL, &all, 0, tiles);
    job.products = found;
    Quantised numbers;
    const GroupedKernel kernel = kernel_of(path, &weight);
    if (!take(path, kernel, &job, &numbers)) return 1;
    kernel(&job, &numbers, &all, 0, tiles);
    free(numbers.high);
    free(at);
    char what[99];
    snprintf(what, sizeof what, "code %d, %d bits, groups of %lld, scales %d, zeros %d", code, bits, (long long)group, scale, zero);
    return differ(path->name, what, found, wanted, count * OUTPUTS);
}

int main(void) {
    static const int64_t sizes[][2] = {{64, 1}, {97, 3}, {1300, 9}};
    static const int widths[] = {2, 3, 4, 5, 6, 8};
    static const int64_t groups[] = {0, 16, 32, 128};
    int bad = 0;
    for (int i = 0; i < PATHS; i++) {
        if (!paths[i]->is_here()) continue;
        for (int size = 0; size < 3; size++) {
            const int64_t inputs = sizes[size][0], count = sizes[size][1];
            bad |= floats_differ(paths[i], inputs, count);
            for (int group = 0; group < 4; group++) {
                for (int bits = 0; bits < 6; bits++)
                    for (int scale = AS_FLOAT16; scale <= STEPS; scale++) {
                        if (scale == STEPS && !groups[group]) continue;
                        bad |= codes_differ(paths[i], PLAIN, widths[bits], groups[group], scale, NONE, inputs, count);
                    }
                for (int zero = AS_FLOAT16; zero <= AS_BFLOAT16; zero++)
                    bad |= codes_differ(paths[i], PLAIN, 4, groups[group], AS_FLOAT16, zero, inputs, count);
                bad |= codes_differ(paths[i], PLAIN, 8, groups[group], AS_FLOAT16, CODES, inputs, count);
                bad |= codes_differ(paths[i], TABLE, 4, groups[group], E8M0, NONE, inputs, count);
                bad |= codes_differ(paths[i], TABLE, 4, groups[group], AS_FLOAT16, NONE, inputs, count);
                bad |= codes_differ(paths[i], FLOAT_TABLE, 4, groups[group], AS_FLOAT32, NONE, inputs, count);
                bad |= codes_differ(paths[i], E4M3, 8, groups[group], AS_FLOAT32, NONE, inputs, count);
                bad |= codes_differ(paths[i], E5M2, 8, groups[group], E8M0, NONE, inputs, count);
            }
        }
        puts(paths[i]->name);
    }
    return bad;
}
