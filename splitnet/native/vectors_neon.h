/* Vectors of 128 bits on ARM, for kernels.h. */

#ifndef SPLITNET_VECTORS_NEON_H
#define SPLITNET_VECTORS_NEON_H

#include "vectors.h"

#define NEON
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))

VECTORS(128, 16)

typedef uint8x16x4_t FloatTable_128;

INLINE NEON Ints_128 splat_int_128(int32_t value) { return (Ints_128)vdupq_n_s32(value); }
INLINE NEON Floats_128 splat_128(float value) { return (Floats_128)vdupq_n_f32(value); }
INLINE NEON Floats_128 fma_128(Floats_128 a, Floats_128 b, Floats_128 c) {
    return (Floats_128)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE NEON Floats_128 max_128(Floats_128 a, Floats_128 b) { return (Floats_128)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE NEON Ints_128 larger_128(Ints_128 a, Ints_128 b) { return (Ints_128)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
INLINE NEON Ints_128 rounded_128(Floats_128 a) { return (Ints_128)vcvtnq_s32_f32((float32x4_t)a); }
INLINE NEON Floats_128 floats_128(Ints_128 a) { return (Floats_128)vcvtq_f32_s32((int32x4_t)a); }

/* Four numbers of one or two bytes as numbers of 32 bits. */
INLINE NEON Ints_128 from_uint8_128(const void *at) {
    uint32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return (Ints_128)vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)))));
}

INLINE NEON Ints_128 from_int8_128(const void *at) {
    uint32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return (Ints_128)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)))));
}

INLINE NEON Ints_128 from_uint16_128(const void *at) {
    uint16x4_t words;
    memcpy(&words, at, sizeof words);
    return (Ints_128)vmovl_u16(words);
}

INLINE NEON Floats_128 from_float16_128(Halves_128 a) { return (Floats_128)vcvt_f32_f16(vreinterpret_f16_s16((int16x4_t)a)); }

INLINE NEON void store_int8_128(int8_t *to, Ints_128 numbers) {
    int16x4_t words = vmovn_s32((int32x4_t)numbers);
    uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
    memcpy(to, &bytes, sizeof bytes);
}

/* The sum of each of four vectors. */
INLINE NEON void store_sums_128(float *to, const Floats_128 *sums) {
    float32x4_t first = vpaddq_f32((float32x4_t)sums[0], (float32x4_t)sums[1]);
    vst1q_f32(to, vpaddq_f32(first, vpaddq_f32((float32x4_t)sums[2], (float32x4_t)sums[3])));
}

/* The bytes of a table of 16 for indices of 0 to 15. */
INLINE NEON Bytes_128 look_up_128(Bytes_128 table, Bytes_128 places) {
    return (Bytes_128)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)places);
}

INLINE NEON Bytes_128 table_128(const uint8_t *at) { return (Bytes_128)vld1q_u8(at); }

INLINE NEON FloatTable_128 float_table_128(const float *at) {
    const uint8_t *bytes = (const uint8_t *)at;
    return (FloatTable_128){{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}

/* Looks up numbers in a table of 16. Only the last four bits of an index count. */
INLINE NEON Floats_128 look_up_float_128(FloatTable_128 table, Ints_128 places) {
    Ints_128 bytes = (places & splat_int_128(15)) * splat_int_128(0x04040404) + splat_int_128(0x03020100);
    return (Floats_128)vqtbl4q_u8(table, (uint8x16_t)bytes);
}

/* For signed codes. */
INLINE DOTPROD Ints_128 dot_dotprod(Ints_128 sums, Bytes_128 codes, Bytes_128 numbers) {
    return (Ints_128)vdotq_s32((int32x4_t)sums, (int8x16_t)codes, (int8x16_t)numbers);
}

#endif
