/* NVIDIA's packed instructions as functions, for the shape of the kernels that is tested on a CPU. They do what
 * PTX ISA says of them; NaN results are 7FFF and 7F, without a sign. */
#include <math.h>

namespace {

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t       d = 0;
    for (unsigned i = 0; i < 4; i++) {
        const uint32_t pick = selector >> (4 * i) & 15, byte = static_cast<uint32_t>(bytes >> (pick % 8 * 8)) & 0xFF;
        d |= (pick < 8 ? byte : byte & 0x80 ? 0xFFu : 0u) << (8 * i);
    }
    return d;
}

template <int T> uint32_t rounded(uint32_t bits) {
    const fst_float to = fst_float_of(T);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return T == FST_T_F16 || T == FST_T_BF16 ? 0x7FFF : 0x7F;
    return fst_encode32(bits, to, static_cast<int32_t>(fst_limit(fst_float_of(FST_T_F32), to, 1)));
}

template <int T> uint32_t product(uint32_t a, uint32_t b) {
    uint32_t d = 0;
    for (unsigned i = 0; i < 2; i++) {
        const float x = fst_float_of_bits32(fst_decode32(a >> (16 * i) & 0xFFFF, fst_float_of(T)));
        const float y = fst_float_of_bits32(fst_decode32(b >> (16 * i) & 0xFFFF, fst_float_of(T)));
        d |= rounded<T>(fst_bits_of_float32(x * y)) << (16 * i);
    }
    return d;
}

inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) { return product<FST_T_BF16>(a, b); }
inline uint32_t multiply_f16x2(uint32_t a, uint32_t b) { return product<FST_T_F16>(a, b); }
inline uint32_t bf16x2_of_f32(uint32_t low, uint32_t high) {
    return rounded<FST_T_BF16>(high) << 16 | rounded<FST_T_BF16>(low);
}
inline uint32_t f16x2_of_f32(uint32_t low, uint32_t high) {
    return rounded<FST_T_F16>(high) << 16 | rounded<FST_T_F16>(low);
}
inline void f32_of_f16x2(uint32_t pair, uint32_t *low, uint32_t *high) {
    *low = fst_decode32(pair & 0xFFFF, fst_float_of(FST_T_F16));
    *high = fst_decode32(pair >> 16, fst_float_of(FST_T_F16));
    if ((*low & 0x7FFFFFFF) > 0x7F800000) *low = 0x7FFFFFFF;
    if ((*high & 0x7FFFFFFF) > 0x7F800000) *high = 0x7FFFFFFF;
}
template <bool e5m2> uint32_t fp8x2_of_f32(uint32_t low, uint32_t high) {
    constexpr int to = e5m2 ? FST_T_F8_E5M2 : FST_T_F8_E4M3;
    return rounded<to>(high) << 8 | rounded<to>(low);
}
inline uint32_t f16x2_of_e4m3x2(uint32_t codes) {
    uint32_t d = 0;
    for (unsigned i = 0; i < 2; i++)
        d |= rounded<FST_T_F16>(fst_decode32(codes >> (8 * i) & 0xFF, fst_float_of(FST_T_F8_E4M3))) << (16 * i);
    return d;
}
template <bool e5m2> uint32_t fp8x2_of_f16x2(uint32_t pair) {
    uint32_t low, high;
    f32_of_f16x2(pair, &low, &high);
    return fp8x2_of_f32<e5m2>(low, high);
}

} // namespace
