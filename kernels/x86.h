// Casts by x86's own instructions, for levels that have them: the values of numeric.h, tested against the same tables.
// They are those that compilers do not find in its integer code, and where that code is slower than memory.
#ifndef FST_X86_H
#define FST_X86_H

#include "numeric.h"

#if defined(FST_CPU_LEVEL) && FST_CPU_LEVEL >= 3
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__) // its own headers warn of what they leave undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace {

// The first elements of `count`, as many as fill vectors; returned is how many those were.
template <int Src, int Dst> FST_FN uint64_t cast_vectors(const uint8_t *, uint8_t *, uint64_t) { return 0; }

#if defined(FST_CPU_LEVEL) && FST_CPU_LEVEL >= 4

// 16 F32 that are NaN where `nan` says so.
FST_FN __m256i halves_of(__m512 x, __mmask16 nan) {
    const __m256i y = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i quiet = _mm256_or_si256(_mm256_and_si256(y, _mm256_set1_epi16(static_cast<short>(0x8000))),
                                          _mm256_set1_epi16(0x7E00));
    return _mm256_mask_blend_epi16(nan, y, quiet);
}

template <>
FST_INLINE uint64_t cast_vectors<FST_T_F32, FST_T_F16>(const uint8_t *from, uint8_t *to, uint64_t count) {
    for (uint64_t i = 0; i + 16 <= count; i += 16) {
        const __m512 x = _mm512_loadu_ps(from + i * 4);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i * 2),
                            halves_of(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q)));
    }
    return count / 16 * 16;
}

template <>
FST_INLINE uint64_t cast_vectors<FST_T_F64, FST_T_F32>(const uint8_t *from, uint8_t *to, uint64_t count) {
    const __m256 sign = _mm256_set1_ps(-0.0f), nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
    for (uint64_t i = 0; i + 8 <= count; i += 8) {
        const __m512d x = _mm512_loadu_pd(from + i * 8);
        const __m256 y = _mm512_cvtpd_ps(x);
        const __mmask8 is_nan = _mm512_cmp_pd_mask(x, x, _CMP_UNORD_Q);
        const __m256 quiet = _mm256_or_ps(_mm256_and_ps(y, sign), nan);
        _mm256_storeu_ps(reinterpret_cast<float *>(to + i * 4), _mm256_mask_blend_ps(is_nan, y, quiet));
    }
    return count / 8 * 8;
}

// Rounded once: towards zero to an F32, whose last bit also says whether anything was lost, and from there to nearest.
// (What is lost when that F32 is subnormal is far below F16's numbers.)
FST_FN __m256 odd_of(__m512d x) {
    const __m512i bits = _mm512_castpd_si512(x);
    const __mmask8 lost = _mm512_test_epi64_mask(bits, _mm512_set1_epi64((1ll << 29) - 1));
    const __m512i odd = _mm512_mask_or_epi64(bits, lost, bits, _mm512_set1_epi64(1ll << 29));
    return _mm512_cvt_roundpd_ps(_mm512_castsi512_pd(odd), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}

template <>
FST_INLINE uint64_t cast_vectors<FST_T_F64, FST_T_F16>(const uint8_t *from, uint8_t *to, uint64_t count) {
    for (uint64_t i = 0; i + 16 <= count; i += 16) {
        const __m256 low = odd_of(_mm512_loadu_pd(from + i * 8)),
                     high = odd_of(_mm512_loadu_pd(from + i * 8 + 64));
        const __m512 x = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i * 2),
                            halves_of(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q)));
    }
    return count / 16 * 16;
}

#elif defined(FST_CPU_LEVEL) && FST_CPU_LEVEL == 3

FST_FN __m128i halves_of(__m256 x) {
    const __m128i y = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i nans = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m128i nan = _mm_packs_epi32(_mm256_castsi256_si128(nans), _mm256_extracti128_si256(nans, 1));
    const __m128i quiet =
        _mm_or_si128(_mm_and_si128(y, _mm_set1_epi16(static_cast<short>(0x8000))), _mm_set1_epi16(0x7E00));
    return _mm_blendv_epi8(y, quiet, nan);
}

template <>
FST_INLINE uint64_t cast_vectors<FST_T_F32, FST_T_F16>(const uint8_t *from, uint8_t *to, uint64_t count) {
    for (uint64_t i = 0; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i * 2),
                         halves_of(_mm256_loadu_ps(reinterpret_cast<const float *>(from + i * 4))));
    return count / 8 * 8;
}

template <>
FST_INLINE uint64_t cast_vectors<FST_T_F64, FST_T_F32>(const uint8_t *from, uint8_t *to, uint64_t count) {
    const __m128 sign = _mm_set1_ps(-0.0f), nan = _mm_castsi128_ps(_mm_set1_epi32(0x7FC00000));
    for (uint64_t i = 0; i + 4 <= count; i += 4) {
        const __m128 y = _mm256_cvtpd_ps(_mm256_loadu_pd(reinterpret_cast<const double *>(from + i * 8)));
        const __m128 quiet = _mm_or_ps(_mm_and_ps(y, sign), nan);
        _mm_storeu_ps(reinterpret_cast<float *>(to + i * 4), _mm_blendv_ps(y, quiet, _mm_cmpunord_ps(y, y)));
    }
    return count / 4 * 4;
}

#endif

} // namespace
#endif
