/* The table of kernels: one path for each kind of instructions. One path is in use. */

#ifndef SPLITNET_PATHS_H
#define SPLITNET_PATHS_H

#include "grouped.h"

#define JOIN(one, other) one##_##other
#define JOINED(one, other) JOIN(one, other)

#ifdef HAVE_VNNI
#include <cpuid.h>

#include "vectors_x86.h"

static int is_here_avx2(void) {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

#define NAME "avx2"
#define NAMED(name) JOINED(name, avx2)
#define TARGET AVX2
#define BITS 256
#define DOT dot_avx2
#define WORDS words_avx2
#define SIGNED 1
#define PAIRED 1
#define ROWS 2
#define SCALED 1
#include "kernels.h"

#ifdef HAVE_AVXVNNI
static int is_here_avxvnni(void) {
    unsigned a, b, c, d;
    return is_here_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
}

#define NAME "avx-vnni"
#define NAMED(name) JOINED(name, avxvnni)
#define TARGET AVXVNNI
#define BITS 256
#define DOT dot_avxvnni
#define SIGNED 0
#define PAIRED 0
#define ROWS 2
#define SCALED 1
#include "kernels.h"
#endif

/* As avx-vnni, with AVX512's encoding of the instructions, so that CPUs with AVX512 but without AVX-VNNI can test these kernels. */
#define NAME "avx512-256"
#define NAMED(name) JOINED(name, evex)
#define is_here_evex has_vnni
#define TARGET EVEX
#define BITS 256
#define DOT dot_evex
#define SIGNED 0
#define PAIRED 0
#define ROWS 2
#define SCALED 1
#include "kernels.h"
#endif

#ifdef HAVE_DOTPROD
#include "vectors_neon.h"

#if defined(__linux__)
#include <sys/auxv.h>
static int is_here_dotprod(void) { return (getauxval(AT_HWCAP) & 1 << 20) != 0; }
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static int is_here_dotprod(void) {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, NULL, 0) == 0 && found;
}
#else
static int is_here_dotprod(void) { return 0; }
#endif

#define NAME "neon-dotprod"
#define NAMED(name) JOINED(name, dotprod)
#define TARGET DOTPROD
#define BITS 128
#define DOT dot_dotprod
#define SIGNED 1
#define PAIRED 0
#define ROWS 2
#define SCALED 0
#include "kernels.h"
#endif

static int is_here_always(void) { return 1; }

static const Path plain = {
    .name = "plain",
    .is_here = is_here_always,
    .quantise = quantise_plainly,
    .dequantise = dequantise_plainly,
};

/* Best first. */
static const Path *const paths[] = {
#ifdef HAVE_VNNI
    &avx512_bf16, &avx512,
#ifdef HAVE_AVXVNNI
    &path_avxvnni,
#endif
    &path_evex, &path_avx2,
#endif
#ifdef HAVE_DOTPROD
    &path_dotprod,
#endif
    &plain,
};
#define PATHS ((int)(sizeof paths / sizeof *paths))

#endif
