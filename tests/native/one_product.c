/* Multiplies a row with a weight of some tiles, whose numbers are all 0; benchmarks/instructions.py counts what that takes.

    one_product PATH CODE BITS GROUP SCALE ZERO INPUTS TILES */

#include "layout.h"

int main(int count, char **given) {
    if (count != 9) return 2;
    int64_t numbers[9];
    for (int i = 2; i < 9; i++) numbers[i] = atol(given[i]);
    const int64_t code = numbers[2], inputs = numbers[7], tiles = numbers[8];
    Grouped weight = {.code = code, .bits = numbers[3], .group = numbers[4], .scale = numbers[5], .zero = numbers[6],
                      .inputs = inputs, .outputs = tiles * TILE, .pairs = code == E4M3 || code == E5M2, .factor = 1,
                      .bytes = calloc(16, 1), .values = calloc(256, sizeof(float)),
                      .words = calloc(16, sizeof(int16_t)), .unit = 1};
    lay_out(&weight);
    uint8_t *at = calloc(tiles * weight.tile_bytes + 8192, 1);
    float *rows = calloc(inputs, sizeof(float)), *products = calloc(tiles * TILE, sizeof(float));
    Quantised quantised;
    for (int i = 0; i < PATHS; i++) {
        GroupedJob job = {&weight, rows, products, 1, inputs, tiles * TILE, 1};
        Run all = {at, 0, 1};
        const GroupedKernel kernel = kernel_of(paths[i], &weight);
        if (strcmp(paths[i]->name, given[1]) || !paths[i]->is_here() || !take(paths[i], kernel, &job, &quantised)) continue;
        kernel(&job, &quantised, &all, 0, tiles);
        return 0;
    }
    return 3;
}
