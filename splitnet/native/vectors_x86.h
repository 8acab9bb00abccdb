/* Vectors of 256 bits on x86, for kernels.h: everything but the products of bytes, in which AVX2, AVX-VNNI and AVX512 differ. */

#ifndef SPLITNET_VECTORS_X86_H
#define SPLITNET_VECTORS_X86_H

#include "vectors.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVXVNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#define EVEX __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")))

VECTORS(256, 32)

typedef struct {
    __m256 lower, upper;
} FloatTable_256;

INLINE AVX2 Ints_256 splat_int_256(int32_t value) { return (Ints_256)_mm256_set1_epi32(value); }
INLINE AVX2 Floats_256 splat_256(float value) { return (Floats_256)_mm256_set1_ps(value); }
INLINE AVX2 Floats_256 fma_256(Floats_256 a, Floats_256 b, Floats_256 c) { return (Floats_256)_mm256_fmadd_ps(a, b, c); }

/* As `fma_256`, but keeps the compiler from computing so many at a time that sums spill to memory. */
INLINE AVX2 Floats_256 fma_now_256(Floats_256 a, Floats_256 b, Floats_256 c) {
    c = fma_256(a, b, c);
    __asm__("" : "+x"(c));
    return c;
}

/* Keeps the compiler from computing so many at a time that sums spill to memory. */
INLINE AVX2 void keep_256(Ints_256 *a, Ints_256 *b, Ints_256 *c) { __asm__("" : "+x"(*a), "+x"(*b), "+x"(*c)); }

INLINE AVX2 Floats_256 max_256(Floats_256 a, Floats_256 b) { return (Floats_256)_mm256_max_ps(a, b); }
INLINE AVX2 Ints_256 larger_256(Ints_256 a, Ints_256 b) { return (Ints_256)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE AVX2 Ints_256 rounded_256(Floats_256 a) { return (Ints_256)_mm256_cvtps_epi32(a); }
INLINE AVX2 Floats_256 floats_256(Ints_256 a) { return (Floats_256)_mm256_cvtepi32_ps((__m256i)a); }

/* Eight numbers of one or two bytes as numbers of 32 bits. */
INLINE AVX2 Ints_256 from_uint8_256(const void *at) { return (Ints_256)_mm256_cvtepu8_epi32(_mm_loadl_epi64(at)); }
INLINE AVX2 Ints_256 from_int8_256(const void *at) { return (Ints_256)_mm256_cvtepi8_epi32(_mm_loadl_epi64(at)); }
INLINE AVX2 Ints_256 from_uint16_256(const void *at) { return (Ints_256)_mm256_cvtepu16_epi32(_mm_loadu_si128(at)); }
INLINE AVX2 Floats_256 from_float16_256(Halves_256 a) { return (Floats_256)_mm256_cvtph_ps((__m128i)a); }

INLINE AVX2 void store_int8_256(int8_t *to, Ints_256 numbers) {
    __m256i all = (__m256i)numbers;
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(words, words));
}

/* The sum of each of four vectors. */
INLINE AVX2 void store_sums_256(float *to, const Floats_256 *sums) {
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

/* Interleaves two vectors: the first result has their lower halves, the second their upper halves. */
INLINE AVX2 void interleave_256(Floats_256 both[2]) {
    __m256 first = _mm256_unpacklo_ps((__m256)both[0], (__m256)both[1]);
    __m256 second = _mm256_unpackhi_ps((__m256)both[0], (__m256)both[1]);
    both[0] = (Floats_256)_mm256_permute2f128_ps(first, second, 0x20);
    both[1] = (Floats_256)_mm256_permute2f128_ps(first, second, 0x31);
}

/* The bytes of a table of 16 for indices of 0 to 15. */
INLINE AVX2 Bytes_256 look_up_256(Bytes_256 table, Bytes_256 places) {
    return (Bytes_256)_mm256_shuffle_epi8((__m256i)table, (__m256i)places);
}

/* Interleaves two vectors of bytes to words: of every 16 bytes first the lower eight, then the upper eight. */
INLINE AVX2 void join_bytes_256(Bytes_256 lower, Bytes_256 upper, Words_256 words[2]) {
    words[0] = (Words_256)_mm256_unpacklo_epi8((__m256i)lower, (__m256i)upper);
    words[1] = (Words_256)_mm256_unpackhi_epi8((__m256i)lower, (__m256i)upper);
}

/* The sums of neighbouring numbers; of every four results, two are from the first vector and two from the second. */
INLINE AVX2 Floats_256 neighbours_256(Floats_256 first, Floats_256 second) {
    return (Floats_256)_mm256_hadd_ps((__m256)first, (__m256)second);
}

INLINE AVX2 Words_256 four_words_256(const int16_t *from) {
    int64_t words;
    memcpy(&words, from, sizeof words);
    return (Words_256)_mm256_set1_epi64x(words);
}

INLINE AVX2 Bytes_256 table_256(const uint8_t *at) {
    return (Bytes_256)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)at));
}

INLINE AVX2 FloatTable_256 float_table_256(const float *at) {
    return (FloatTable_256){_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
}

/* Looks up numbers in a table of 16. Only the last four bits of an index count. */
INLINE AVX2 Floats_256 look_up_float_256(FloatTable_256 table, Ints_256 places) {
    __m256 lower = _mm256_permutevar8x32_ps(table.lower, (__m256i)places);
    __m256 upper = _mm256_permutevar8x32_ps(table.upper, (__m256i)places);
    return (Floats_256)_mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)places, 28)));
}

/* AVX2 adds two products of an unsigned and a signed byte in 16 bits, with saturation: the unsigned bytes must be at most
128, because 127 * 255 * 2 would saturate. Some sums of narrow codes are also added in 16 bits. */
INLINE AVX2 Words_256 pairs_avx2(Words_256 sums, Bytes_256 codes, Bytes_256 numbers) {
    sums += (Words_256)_mm256_maddubs_epi16((__m256i)codes, (__m256i)numbers);
    __asm__("" : "+x"(sums)); /* keeps the compiler from another order, in which it would keep all products in memory */
    return sums;
}

INLINE AVX2 Ints_256 with_pairs_avx2(Ints_256 sums, Words_256 pairs, int times) {
    sums += (Ints_256)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16((short)times));
    __asm__("" : "+x"(sums));
    return sums;
}

/* For signed codes, down to -128. */
INLINE AVX2 Ints_256 dot_avx2(Ints_256 sums, Bytes_256 codes, Bytes_256 numbers) {
    __m256i size = _mm256_abs_epi8((__m256i)codes), turned = _mm256_sign_epi8((__m256i)numbers, (__m256i)codes);
    return with_pairs_avx2(sums, (Words_256)_mm256_maddubs_epi16(size, turned), 1);
}

/* Adds products of words, two neighbours each. */
INLINE AVX2 Ints_256 words_avx2(Ints_256 sums, Words_256 codes, Words_256 numbers) {
    sums += (Ints_256)_mm256_madd_epi16((__m256i)codes, (__m256i)numbers);
    __asm__("" : "+x"(sums));
    return sums;
}

/* For unsigned codes. */
#ifdef HAVE_AVXVNNI
INLINE AVXVNNI Ints_256 dot_avxvnni(Ints_256 sums, Bytes_256 codes, Bytes_256 numbers) {
    return (Ints_256)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)numbers);
}
#endif

INLINE EVEX Ints_256 dot_evex(Ints_256 sums, Bytes_256 codes, Bytes_256 numbers) {
    return (Ints_256)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)codes, (__m256i)numbers);
}

#endif
