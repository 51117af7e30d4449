/* The instructions of AVX-VNNI that native.c uses, for a machine that has only AVX2: as Intel's manual
 * (volume 2, VPDPBUSD and VPDPWSSD) gives them, one element at a time. */
#include <immintrin.h>
#include <stdint.h>

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 dpbusd
#define _mm256_dpwssd_avx_epi32 dpwssd

static inline __m256i dpbusd(__m256i sum, __m256i u, __m256i s) {
    int32_t sums[8];
    uint8_t a[32];
    int8_t b[32];
    _mm256_storeu_si256((__m256i *)sums, sum);
    _mm256_storeu_si256((__m256i *)a, u);
    _mm256_storeu_si256((__m256i *)b, s);
    for (int i = 0; i < 32; i++) sums[i / 4] += (int16_t)(a[i] * b[i]);
    return _mm256_loadu_si256((const __m256i *)sums);
}

static inline __m256i dpwssd(__m256i sum, __m256i x, __m256i y) {
    int32_t sums[8];
    int16_t a[16], b[16];
    _mm256_storeu_si256((__m256i *)sums, sum);
    _mm256_storeu_si256((__m256i *)a, x);
    _mm256_storeu_si256((__m256i *)b, y);
    for (int i = 0; i < 16; i++) sums[i / 2] += a[i] * b[i];
    return _mm256_loadu_si256((const __m256i *)sums);
}
