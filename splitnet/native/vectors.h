/* Types of vectors, for kernels.h: the compiler's own (GCC, clang), which have operators. */

#ifndef SPLITNET_VECTORS_H
#define SPLITNET_VECTORS_H

#include "products.h"

#define VECTORS(bits, size)                                              \
    typedef uint8_t Bytes_##bits __attribute__((vector_size(size)));      \
    typedef int16_t Words_##bits __attribute__((vector_size(size)));      \
    typedef uint16_t UWords_##bits __attribute__((vector_size(size)));    \
    typedef int32_t Ints_##bits __attribute__((vector_size(size)));       \
    typedef uint32_t UInts_##bits __attribute__((vector_size(size)));     \
    typedef float Floats_##bits __attribute__((vector_size(size)));       \
    typedef int16_t Halves_##bits __attribute__((vector_size(size / 2)));

#endif
