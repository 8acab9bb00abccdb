/* Weights of any layout, for programs that try kernels. */

#include "../../splitnet/native/paths.h"

/* The sizes that follow from the other fields, as splitnet/quant/tiles.py has them. */
static void lay_out(Grouped *weight) {
    const int64_t scale = weight->scale, zero = weight->zero;
    weight->panel = weight->group ? 512 : parts_of(weight->inputs, CHUNK) * CHUNK;
    weight->scales_at = TILE * (scale == AS_FLOAT32 ? 4 : scale <= AS_BFLOAT16 ? 2 : 1);
    weight->zeros_at = zero == NONE ? 0 : TILE * (zero == AS_FLOAT32 ? 4 : zero <= AS_BFLOAT16 ? 2 : 1);
    weight->tile_bytes = 0;
    for (int64_t first = 0; first < weight->inputs; first += weight->panel) {
        Panel panel = panel_at(weight, NULL, first);
        weight->tile_bytes += end_of(weight, &panel) - (const uint8_t *)NULL;
    }
}
