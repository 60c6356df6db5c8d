// Quantization with computed scales: s = RN32(amax / M), code = encode(RN32(x / s)).
#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "nvidia.h"
#include "reduce.h"

namespace {

template <int Type>
constexpr unsigned size_of = Type == FST_T_F32                         ? 4
                             : Type == FST_T_F16 || Type == FST_T_BF16 ? 2
                                                                       : 1;

template <int Src> FST_FN uint32_t to_f32(uint32_t code) {
    if constexpr (Src == FST_T_F32) return code;
    else return fst_decode32(code, fst_float_of(Src));
}

template <int Src>
constexpr uint32_t infinity = Src == FST_T_F32    ? 0x7F800000
                              : Src == FST_T_BF16 ? 0x7F80
                                                  : 0x7C00;

// The code of a magnitude, as it enters amax: Inf as the largest finite number of the type. NaNs are above
// all. Codes are in the order of their magnitudes: amax is found among them, without decoding.
template <int Src, class Word> FST_FN Word magnitude(Word code) {
    const Word a = code & static_cast<Word>(static_cast<Word>(~static_cast<Word>(0)) >> 1);
    return a == infinity<Src> ? static_cast<Word>(a - 1) : a;
}

// The largest magnitude that codes get: 448, 57344, and 224 for FNUZ, so that its scales are those of OCP
// doubled.
template <int Dst> FST_FN float largest_code() {
    return Dst == FST_T_F8_E4M3 ? 448.0f : Dst == FST_T_F8_E5M2 ? 57344.0f : 224.0f;
}

// The scale is 1 where amax / M is 0. That is so for an amax of 0, and for subnormal ones so small (less than
// M / 2 times 2^-149) that the quotient rounds to 0: all codes are 0 then, where x / 0 would give NaNs.
template <int Dst> FST_FN uint32_t scale_of(uint32_t amax) {
    if (amax > 0x7F800000) return 0x7FC00000;
    const uint32_t scale = fst_bits_of_float32(fst_float_of_bits32(amax) / largest_code<Dst>());
    return scale == 0 ? 0x3F800000 : scale;
}

// False for NaN.
FST_FN bool is_usual(float scale) { return scale > 0x1p-60f && scale < 0x1p125f; }

// Divides by one scale, rounded to nearest like a division, but by multiplications: with r = RN(1/s), the
// correction of x*r by its exact remainder rounds right (Markstein 1990), as long as nothing under- or
// overflows. Scales below 2^-60 take the division. Large ones (none is beyond 2^121) make quotients underflow, but
// only such as are far below the least code: their sign is right, and that is all that is left of them.
class Quotient {
  public:
    FST_INLINE explicit Quotient(uint32_t scale)
        : scale_(fst_float_of_bits32(scale)), reciprocal_(1.0f / scale_), usual_(is_usual(scale_)) {}
    // Under a usual scale.
    FST_INLINE float of_finite(float x) const {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__) || defined(FST_DEVICE_SHAPE)
        const float q = x * reciprocal_; // the remainder is that of -x, or the sum would make 0 of -0
        return __builtin_fmaf(__builtin_fmaf(q, scale_, -x), -reciprocal_, q);
#else
        return x / scale_;
#endif
    }
    FST_INLINE uint32_t operator()(uint32_t bits) const {
        const float x = fst_float_of_bits32(bits), q = x * reciprocal_;
        if (!usual_) return fst_bits_of_float32(x / scale_);
        return (fst_bits_of_float32(q) & 0x7FFFFFFF) < 0x7F800000 ? fst_bits_of_float32(of_finite(x))
                                                                  : fst_bits_of_float32(q); // x is Inf or NaN
    }

  private:
    float scale_, reciprocal_;
    bool usual_;
};

// Whether there may be Inf under this scale: it is that of the largest finite number then.
template <int Src, int Dst> FST_FN bool is_largest(uint32_t scale) {
    return scale == scale_of<Dst>(to_f32<Src>(infinity<Src> - 1));
}

// False when there may be NaN (they make the scale NaN) or Inf under this scale, and when it is not a usual one.
template <int Src, int Dst> FST_FN bool is_tame(uint32_t scale) {
    return is_usual(fst_float_of_bits32(scale)) && !is_largest<Src, Dst>(scale);
}

// NaN results have the sign of x, whatever a device's division makes of it.
template <int Dst> FST_FN uint32_t encode(uint32_t quotient, uint32_t bits) {
    const fst_float to = fst_float_of(Dst);
    const int32_t limit = static_cast<int32_t>(fst_limit(fst_float_of(FST_T_F32), to, 1));
    return fst_encode32((quotient & 0x7FFFFFFF) | (bits & 0x80000000), to, limit);
}

FST_FN void count_nans(uint64_t address, uint64_t found) {
    if (!found || !address) return;
    uint64_t *nans = global<uint64_t>(address);
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
    atomicAdd(reinterpret_cast<unsigned long long *>(nans), static_cast<unsigned long long>(found));
#else
    __atomic_fetch_add(nans, found, __ATOMIC_RELAXED);
#endif
}

// The same number, of which NVIDIA's compiler does not know that it is.
FST_FN unsigned anew(unsigned n) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(n));
#endif
    return n;
}

// `count` neighbouring elements. All are addresses (global() in pack.h).
template <int Src, int Dst> struct Stretch {
    static constexpr unsigned src_size = size_of<Src>;

    uint64_t src, dst, count;

    FST_INLINE typename word_of<src_size>::type element(uint64_t i) const {
        return load_element<src_size>(global<const uint8_t>(src) + i * src_size);
    }
};

#ifdef FST_BY_ELEMENT
// The largest magnitude of [begin, end), as a code. NaNs are counted in a second pass, if there are any.
template <int Src, int Dst>
FST_FN uint32_t amax_of(const Stretch<Src, Dst> &s, uint64_t begin, uint64_t end, uint32_t *nans) {
    typename word_of<size_of<Src>>::type amax = 0;
    for (uint64_t i = begin; i < end; i++) {
        const auto a = magnitude<Src>(s.element(i));
        amax = a > amax ? a : amax;
    }
    if (amax <= infinity<Src>) return amax;
    uint32_t found = 0;
    for (uint64_t i = begin; i < end; i++) found += magnitude<Src>(s.element(i)) > infinity<Src>;
    *nans += found;
    return amax;
}

// By value and by itself: inside the loops over rows gcc leaves this loop scalar, a tenth as fast.
template <int Src, int Dst>
__attribute__((noinline)) static void encode_elements(const Stretch<Src, Dst> s, const Quotient quotient) {
    uint8_t *__restrict to = global<uint8_t>(s.dst);
    for (uint64_t i = 0; i < s.count; i++) {
        const uint32_t bits = to_f32<Src>(s.element(i));
        to[i] = static_cast<uint8_t>(encode<Dst>(quotient(bits), bits));
    }
}

template <int Src, int Dst> FST_FN uint32_t amax_of(const Stretch<Src, Dst> &s, uint64_t *nans) {
    constexpr uint64_t piece = 1u << 20; // fewer than its NaNs are counted in 32 bits
    uint32_t amax = 0;
    for (uint64_t begin = 0; begin < s.count; begin += piece) {
        uint32_t found = 0;
        const uint32_t a = amax_of(s, begin, s.count - begin < piece ? s.count : begin + piece, &found);
        amax = a > amax ? a : amax;
        *nans += found;
    }
    return amax;
}
#else
template <int Src> FST_FN uint32_t from_vector(const Vector<16> &in, unsigned i) {
    return static_cast<uint32_t>(get<size_of<Src>>(in, i));
}

#if FST_PACKED >= 90
FST_FN uint32_t larger16x2(uint32_t a, uint32_t b) {
#ifdef FST_NVIDIA_SHAPE
    const uint32_t low = (a & 0xFFFF) > (b & 0xFFFF) ? a : b, high = a >> 16 > b >> 16 ? a : b;
    return (low & 0xFFFF) | (high & 0xFFFF0000);
#else
    uint32_t d;
    asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#endif
}

// The largest magnitude, without a look at Inf and NaN.
template <int Src, unsigned n> FST_FN uint32_t plain_amax(const Vector<16> (&in)[n]) {
    constexpr uint32_t mask = size_of<Src> == 4 ? 0x7FFFFFFF : 0x7FFF7FFF;
    uint32_t a = 0;
    FST_UNROLLED
    for (unsigned i = 0; i < 4 * n; i++) {
        const uint32_t b = in[i / 4].word[i % 4] & mask;
        if (size_of<Src> == 4) a = b > a ? b : a;
        else a = larger16x2(a, b);
    }
    if (size_of<Src> == 4) return a;
    return (a & 0xFFFF) > a >> 16 ? a & 0xFFFF : a >> 16;
}

template <int Src, unsigned n> FST_FN uint32_t nans_of(const Vector<16> (&in)[n]) {
    uint32_t found = 0; // of 16 bits: in either half
    FST_UNROLLED
    for (unsigned i = 0; i < 4 * n; i++) {
        const uint32_t word = in[i / 4].word[i % 4];
        if (size_of<Src> == 4) found += ((word & 0x7FFFFFFF) + to_nan<Src>()) >> 31;
        else found += ((word & 0x7FFF7FFF) + twice(to_nan<Src>())) >> 15 & 0x00010001;
    }
    return size_of<Src> == 4 ? found : (found & 0xFFFF) + (found >> 16);
}
#endif

template <int Src> FST_FN uint32_t amax_of_vector(const Vector<16> &in, uint32_t *nans) {
    uint32_t amax = 0;
    FST_UNROLLED
    for (unsigned i = 0; i < 16 / size_of<Src>; i++) {
        const uint32_t a =
            magnitude<Src>(static_cast<typename word_of<size_of<Src>>::type>(from_vector<Src>(in, i)));
        amax = a > amax ? a : amax;
        *nans += a > infinity<Src>;
    }
    return amax;
}

template <int Src> using Codes = Vector<16 / size_of<Src>>; // of 16 bytes of the source

template <int Src, int Dst> FST_FN Codes<Src> codes_of(const Vector<16> &in, const Quotient &quotient) {
    Codes<Src> out = {};
    FST_UNROLLED
    for (unsigned i = 0; i < 16 / size_of<Src>; i++) {
        const uint32_t bits = to_f32<Src>(from_vector<Src>(in, i));
        put<1>(&out, i, encode<Dst>(quotient(bits), bits));
    }
    return out;
}

// The same under a tame scale. No quotient is beyond M by more than a rounding.
#if FST_PACKED >= 89
// A code of FNUZ is that of twice the number in OCP, but for -0: half the scale is divided by.
template <int Dst> FST_FN uint32_t tame_divisor(uint32_t scale) {
    return fst_is_fnuz(fst_float_of(Dst)) ? scale - 0x00800000 : scale;
}

template <int Src, int Dst> FST_FN Codes<Src> tame_codes(const Vector<16> &in, const Quotient &quotient) {
    Codes<Src> out;
    FST_UNROLLED
    for (unsigned i = 0; i < 16 / size_of<Src>; i += 4) {
        uint32_t x[4];
        FST_UNROLLED
        for (unsigned k = 0; k < 4; k++) {
            const uint32_t word = in.word[size_of<Src> == 4 ? k : (i + k) / 2];
            if (Src == FST_T_F32) x[k] = word;
            else if (k % 2 == 0) widen16<Src>(word, &x[k], &x[k + 1]);
        }
        FST_UNROLLED
        for (unsigned k = 0; k < 4; k++)
            x[k] = fst_bits_of_float32(quotient.of_finite(fst_float_of_bits32(x[k])));
        uint32_t codes = fp8x2_of_f32<as_e5m2<Dst>>(x[0], x[1]) | fp8x2_of_f32<as_e5m2<Dst>>(x[2], x[3])
                                                                      << 16;
        if (fst_is_fnuz(fst_float_of(Dst))) codes &= ((codes & four(0x7F)) + four(0x7F)) | four(0x7F);
        out.word[i / 4] = codes;
    }
    return out;
}

// Numbers that may be Inf, with the largest finite number for it.
template <int Src> FST_FN Vector<16> without_infinity(const Vector<16> &in) {
    Vector<16> out;
    FST_UNROLLED
    for (unsigned i = 0; i < 4; i++) {
        const uint32_t word = in.word[i];
        if (size_of<Src> == 4) out.word[i] = word - ((word & 0x7FFFFFFF) == infinity<Src>);
        else out.word[i] = word - (((word & 0x7FFF7FFF) + twice(0x8000 - infinity<Src>)) >> 15 & 0x00010001);
    }
    return out;
}

// Under a scale that is NaN.
template <int Src, int Dst> FST_FN Codes<Src> nan_codes(const Vector<16> &in) {
    const uint32_t nan = four(static_cast<uint32_t>(fst_float_of(Dst).nan));
    Codes<Src> out;
    FST_UNROLLED
    for (unsigned i = 0; i < 16 / size_of<Src>; i += 4) {
        uint32_t signs;
        if constexpr (size_of<Src> == 2) signs = permute(in.word[i / 2], in.word[i / 2 + 1], 0x7531);
        else signs = permute(permute(in.word[0], in.word[1], 0x0073), permute(in.word[2], in.word[3], 0x0073), 0x5410);
        out.word[i / 4] = fst_is_fnuz(fst_float_of(Dst)) ? nan : nan | (signs & four(0x80));
    }
    return out;
}
#else
template <int Dst> FST_FN uint32_t tame_divisor(uint32_t scale) { return scale; }

template <int Src, int Dst> FST_FN Codes<Src> tame_codes(const Vector<16> &in, const Quotient &quotient) {
    Codes<Src> out = {};
    FST_UNROLLED
    for (unsigned i = 0; i < 16 / size_of<Src>; i++) {
        const uint32_t bits = to_f32<Src>(from_vector<Src>(in, i));
        const float q = quotient.of_finite(fst_float_of_bits32(bits));
        put<1>(&out, i, encode<Dst>(fst_bits_of_float32(q), bits));
    }
    return out;
}
#endif

// What a thread has of a row or a tile: vectors of 16 bytes of the source, a step apart. At either end of a row, some of a
// vector's elements may not exist.
template <int Src> struct Strip {
    static constexpr unsigned size = size_of<Src>, width = 16 / size;

    uint64_t src, dst, step;      // addresses of the first vector's first element; source bytes, % 16 is 0
    uint64_t col, col_step, cols; // its place in a row of so many; wraps around before the row
    uint64_t all_begin, all_end;  // the whole source: nothing outside it is read
    uint32_t count;               // of vectors
    unsigned unit;                // the codes of a vector are stored in pieces of so many bytes
    bool straight;                // all vectors are whole, and aligned in the source

    // Those of the first vectors that are whole; zeros for the others. Bit k of the result: in[k] is the k-th. No branch:
    // all loads are under way before the first is used.
    template <unsigned n> FST_INLINE uint32_t load(Vector<16> (&in)[n]) const {
        uint32_t loaded = 0;
        if (straight) {
            FST_UNROLLED
            for (unsigned k = 0; k < n; k++) {
                in[k] = {};
                if (k < count) in[k] = load_aligned<16>(global<const uint8_t>(src + k * step));
            }
            return count < n ? (1u << count) - 1 : (1u << n) - 1;
        }
#if FST_PACKED
        // Only the first and the last can be ragged or lie at an end of the source: a step is 32 bytes at least.
        const uint32_t last = count - 1;
        loaded = count < n ? (1u << count) - 1 : (1u << n) - 1;
        if (!is_near(0)) loaded &= ~1u;
        if (last < n && !is_near(last)) loaded &= ~(1u << last);
        const unsigned skew = src % 16;
        const uint64_t behind = skew ? 16 : 0;
        uint64_t low = src - skew;
        FST_UNROLLED
        for (unsigned k = 0; k < n; k++) {
#ifdef __CUDA_ARCH__ // four at a time: there are no registers for more
            if (size == 2 && k == 4) asm volatile("" : "+l"(low) : "r"(in[3].word[0]));
#endif
            const uint8_t *from = global<const uint8_t>(low + k * step);
            Vector<16> a = {}, b = {};
            if (loaded >> k & 1) a = load_aligned<16>(from), b = load_aligned<16>(from + behind);
            in[k] = shift_pair(a, b, skew);
        }
        if (is_cut()) { // not above: loads would wait for one another
            FST_UNROLLED
            for (unsigned k = 0; k < n; k++) cut(&in[k]);
        }
#else // AMD's compiler would keep all conditions, in more registers than there are
        FST_UNROLLED
        for (unsigned k = 0; k < n; k++) {
            in[k] = {};
            const bool whole = k < count && is_whole(k) && load_near(k, &in[k]);
            loaded |= static_cast<uint32_t>(whole) << k;
        }
#endif
        return loaded;
    }

    // The first of the vectors that are not among `loaded`, or those before it.
    FST_INLINE uint32_t begin_rest(uint32_t loaded, unsigned n) const {
        return count <= n && loaded == (1u << count) - 1 ? count : 0;
    }

    // Any vector, with zeros for the elements that do not exist.
    FST_INLINE Vector<16> load_any(uint32_t k) const {
        const uint8_t *from = global<const uint8_t>(src + k * step);
        Vector<16> in = {};
        if (is_whole(k) && load_near(k, &in)) return in;
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            if (exists(k, i)) put<size>(&in, i, load_element<size>(from + i * size));
        return in;
    }

    // The vectors that all threads of a warp have: those of a tile's whole rows, side by side.
    FST_INLINE uint32_t shared_of(uint32_t loaded) const {
#if defined(__CUDA_ARCH__) && FST_PACKED >= 89
        return unit != width ? __reduce_and_sync(~0u, loaded) : 0;
#else
        (void)loaded;
        return 0;
#endif
    }

    // A vector among `shared` is stored by all threads of a warp: aligned ones, each of what two neighbours have. The first
    // of a row takes the bytes before the row's first aligned address and those behind its last.
    FST_INLINE void store(uint32_t k, const Codes<Src> &codes, uint32_t shared = 0) const {
        uint8_t *to = global<uint8_t>(dst + k * (step / size));
        if (unit == width) return store_aligned(to, codes);
#ifdef __CUDA_ARCH__
        if (shared >> k & 1) return store_shared(to, codes);
#else
        (void)shared;
#endif
        if (unit >= 4) return store_units<4>(to, codes);
        if (unit == 2) return store_units<2>(to, codes);
        store_units<1>(to, codes);
    }
    // The vectors are those of a tile that it has only in part, all of them.
    FST_INLINE bool is_cut() const { return (col_step == 0) & (count != 0) & (cols - col < width); }

    FST_INLINE void store_any(uint32_t k, const Codes<Src> &codes) const {
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            if (exists(k, i)) store_piece<1>(global<uint8_t>(dst + k * (step / size)), codes, i);
    }

  private:
    // Whole or a tile's, and what must be read for it inside the source.
    FST_INLINE bool is_near(uint32_t k) const {
        const uint64_t low = src / 16 * 16 + k * step, high = low + (src % 16 ? 32 : 16);
        return (is_whole(k) | (col_step == 0)) & (low >= all_begin) & (high <= all_end);
    }
    // Zeros for what a tile's last vectors have beyond its columns.
    FST_INLINE void cut(Vector<16> *in) const {
        const unsigned bytes = static_cast<unsigned>(cols - col) * size;
        FST_UNROLLED
        for (unsigned i = 0; i < 4; i++)
            in->word[i] &= bytes >= 4 * i + 4 ? ~0u : bytes > 4 * i ? 0xFFFFu : 0;
    }
    FST_INLINE bool load_near(uint32_t k, Vector<16> *in) const {
        return load_vector(global<const uint8_t>(src + k * step), global<const uint8_t>(all_begin),
                           global<const uint8_t>(all_end), in);
    }
    FST_INLINE bool exists(uint32_t k, unsigned i) const { return col + k * col_step + i < cols; }
    FST_INLINE bool is_whole(uint32_t k) const {
        const uint64_t at = col + k * col_step;
        return (at < cols) & (cols - at >= width);
    }
#ifdef __CUDA_ARCH__
    FST_INLINE void store_shared(uint8_t *to, const Codes<Src> &codes) const {
        constexpr unsigned lanes = 128 / width; // of a row
        const unsigned skew = static_cast<unsigned>(dst % width), lane = threadIdx.x % lanes;
        Codes<Src> before;
        FST_UNROLLED
        for (unsigned i = 0; i < Codes<Src>::words; i++)
            before.word[i] = __shfl_sync(~0u, codes.word[i], lane + lanes - 1, lanes);
        // One path for all lanes: rows of a warp differ in their alignment.
        const Codes<Src> both = shift_pair(skew ? before : codes, codes, (width - skew) % width);
        if (lane == 0 && skew) store_around(to - skew, both, skew);
        else store_aligned(to - skew, both);
    }
    FST_INLINE void store_around(uint8_t *to, const Codes<Src> &codes, unsigned skew) const {
        if (unit == 4) {
            FST_UNROLLED
            for (unsigned at = 0; at < width; at += 4) store_piece<4>(at < skew ? to + 128 : to, codes, at);
        } else {
            FST_UNROLLED
            for (unsigned at = 0; at < width; at++) store_piece<1>(at < skew ? to + 128 : to, codes, at);
        }
    }
#endif
    template <unsigned bytes> static FST_INLINE void store_units(uint8_t *to, const Codes<Src> &codes) {
        FST_UNROLLED
        for (unsigned at = 0; at < width; at += bytes) store_piece<bytes>(to, codes, at);
    }
};

// The largest magnitude, as a code.
template <int Src, unsigned n>
FST_FN uint32_t amax_of(const Strip<Src> &strip, const Vector<16> (&in)[n], uint32_t loaded, uint32_t *nans) {
    uint32_t amax = 0;
#if FST_PACKED >= 90
    amax = plain_amax<Src>(in);
    if (amax == infinity<Src>) amax--;
    if (amax > infinity<Src>) *nans += nans_of<Src>(in);
#else
    FST_UNROLLED
    for (unsigned k = 0; k < n; k++) {
        if (!(loaded >> k & 1)) continue; // also that AMD's compiler takes one after the other
        const uint32_t a = amax_of_vector<Src>(in[k], nans);
        amax = a > amax ? a : amax;
    }
#endif
    FST_ROLLED
    for (uint32_t k = strip.begin_rest(loaded, n); k < strip.count; k++) {
        if (k < n && loaded >> k & 1) continue;
        const uint32_t a = amax_of_vector<Src>(strip.load_any(k), nans);
        amax = a > amax ? a : amax;
    }
    return amax;
}

#if FST_PACKED >= 89
template <int Src> FST_FN void store_codes(const Strip<Src> &strip, uint32_t k, const Codes<Src> &codes, uint32_t shared) {
    if (strip.is_cut()) strip.store_any(k, codes);
    else strip.store(k, codes, shared);
}
#endif

template <int Src, int Dst, unsigned n>
FST_FN void encode_strip(const Strip<Src> &strip, const Vector<16> (&in)[n], uint32_t loaded,
                         uint32_t scale) {
#if FST_PACKED >= 89
    if (is_usual(fst_float_of_bits32(scale))) {
        const Quotient quotient(tame_divisor<Dst>(scale));
        const bool largest = is_largest<Src, Dst>(scale);
        const uint32_t shared = strip.shared_of(strip.is_cut() ? 0 : loaded);
        FST_UNROLLED
        for (unsigned k = 0; k < n; k++) {
            const Codes<Src> codes =
                tame_codes<Src, Dst>(largest ? without_infinity<Src>(in[k]) : in[k], quotient);
            if (loaded >> k & 1) store_codes<Src>(strip, k, codes, shared);
        }
    } else if (scale == 0x7FC00000) {
        FST_UNROLLED
        for (unsigned k = 0; k < n; k++)
            if (loaded >> k & 1) store_codes<Src>(strip, k, nan_codes<Src, Dst>(in[k]), 0);
    } else {
        loaded = 0;
    }
#else
    if (is_tame<Src, Dst>(scale)) {
        const Quotient quotient(tame_divisor<Dst>(scale));
        FST_UNROLLED
        for (unsigned k = 0; k < n; k++) {
            if (!FST_PACKED && !(loaded >> k & 1)) continue;
            const Codes<Src> codes = tame_codes<Src, Dst>(in[k], quotient);
            if (loaded >> k & 1) strip.store(k, codes);
        }
    } else {
        loaded = 0;
    }
#endif
    uint32_t k = strip.begin_rest(loaded, n);
    if (k >= strip.count) return;
    const Quotient quotient(scale);
    FST_ROLLED
    for (; k < strip.count; k++)
        if (!(k < n && loaded >> k & 1)) strip.store_any(k, codes_of<Src, Dst>(strip.load_any(k), quotient));
}
#endif

// A block quantizes one row, or one tile of 128 x 128. What it reads stays in registers, as far as they go.
template <int Src, int Dst, unsigned Threads> struct Tile {
    static constexpr unsigned threads = by_element ? 1 : Threads;
    static constexpr unsigned src_size = size_of<Src>, width = 16 / src_size;
    static constexpr unsigned kept = 8; // vectors of a thread

    uint64_t src, dst, scales, nans, rows, cols, tile_rows, tile_cols;
    Divisor across; // tiles
    unsigned unit;
    bool straight;

    struct State {
#ifndef FST_BY_ELEMENT
        Vector<16> in[kept];
        uint32_t loaded;
#endif
    };

    FST_INLINE uint32_t gather(uint64_t block, unsigned thread, State &state) const {
#ifdef FST_BY_ELEMENT
        uint32_t amax = 0;
        uint64_t found = 0;
        (void)thread, (void)state;
        const Place place = find(block);
        for (uint64_t row = 0; row < place.rows; row++) {
            const uint32_t a = amax_of(stretch(place, row), &found);
            amax = a > amax ? a : amax;
        }
#else
        uint32_t found = 0;
        const Strip<Src> mine = strip(find(block), thread);
        state.loaded = mine.load(state.in);
        const uint32_t amax = amax_of<Src>(mine, state.in, state.loaded, &found);
#endif
        count_nans(nans, found);
        return to_f32<Src>(amax);
    }

    FST_INLINE void finish(uint64_t block, unsigned thread, const State &state, uint32_t amax) const {
        const uint32_t scale = scale_of<Dst>(amax);
        // Where registers would not do for the place too, it is computed once more: they are for what was read.
        if (src_size == 2) thread = anew(thread);
        if (thread == 0) global<uint32_t>(scales)[block] = scale;
#ifdef FST_BY_ELEMENT
        (void)state;
        const Place place = find(block);
        const Quotient quotient(scale);
        for (uint64_t row = 0; row < place.rows; row++)
            encode_elements<Src, Dst>(stretch(place, row), quotient);
#else
        encode_strip<Src, Dst>(strip(find(block), thread), state.in, state.loaded, scale);
#endif
    }

  private:
    struct Place {
        uint64_t first, rows, cols; // the tile's first element; its size
    };
    FST_INLINE Place find(uint64_t block) const {
        const uint64_t down = across.divide(block), row = down * tile_rows,
                       col = (block - down * across.value) * tile_cols;
        return {row * cols + col, rows - row < tile_rows ? rows - row : tile_rows,
                cols - col < tile_cols ? cols - col : tile_cols};
    }

#ifdef FST_BY_ELEMENT
    FST_INLINE Stretch<Src, Dst> stretch(const Place &place, uint64_t row) const {
        const uint64_t at = place.first + row * cols;
        return {src + at * src_size, dst + at, place.cols};
    }
#else
    // Vectors of a row start where the destination is aligned; those of a tile with each of its rows.
    FST_INLINE Strip<Src> strip(const Place &place, unsigned thread) const {
        constexpr unsigned lanes = 128 / width; // a row of a tile
        const bool row = tile_rows == 1;
        const unsigned skew = row ? static_cast<unsigned>((dst + place.first) % width) : 0;
        const uint64_t down = row ? 0 : thread / lanes,
                       col = static_cast<uint64_t>(row ? thread : thread % lanes) * width - skew;
        const uint64_t at = place.first + down * cols + col;
        const uint64_t slots = row ? (place.cols + skew + width - 1) / width : place.rows;
        const uint64_t slot = row ? thread : down;
        const unsigned step = row ? threads : threads / lanes;
        const bool some = (slot < slots) & (row | (col < place.cols));
        const uint64_t next = row ? threads * width : threads / lanes * cols;
        return {src + at * src_size,
                dst + at,
                next * src_size,
                col,
                row ? threads * width : 0,
                place.cols,
                src,
                src + rows * cols * src_size,
                some ? static_cast<uint32_t>((slots - slot - 1) / step + 1) : 0,
                row ? width : unit,
                straight};
    }
#endif
};

// ---- One scale for the whole tensor: amax, scale, codes ----

struct Begin {
    static constexpr unsigned threads = 1;
    uint64_t scale;
    FST_INLINE void operator()(uint64_t, unsigned) const { global<uint32_t>(scale)[0] = 0; }
};

template <int Dst> struct MakeScale {
    static constexpr unsigned threads = 1;
    uint64_t scale;
    FST_INLINE void operator()(uint64_t, unsigned) const {
        global<uint32_t>(scale)[0] = scale_of<Dst>(global<uint32_t>(scale)[0]);
    }
};

#ifndef FST_BY_ELEMENT
// The strip of a thread of `threads`, of the `block`-th part of `n` vectors a thread of all elements.
template <int Src>
FST_FN Strip<Src> strip_of(uint64_t src, uint64_t dst, uint64_t count, uint64_t slot, unsigned threads,
                           unsigned n) {
    constexpr unsigned size = size_of<Src>, width = 16 / size;
    const unsigned skew = static_cast<unsigned>(dst % width);
    const uint64_t col = slot * width - skew, slots = (count + skew + width - 1) / width;
    const uint64_t left = slot < slots ? (slots - slot - 1) / threads + 1 : 0;
    return {src + col * size,
            dst + col,
            threads * 16,
            col,
            threads * width,
            count,
            src,
            src + count * size,
            static_cast<uint32_t>(left < n ? left : n),
            width,
            skew == 0 && src % 16 == 0 && count % width == 0};
}
#endif

template <int Src, int Dst> struct Amax {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned each = 8; // vectors of a thread

    struct State {};
    Stretch<Src, Dst> all;
    uint64_t scale, nans;

    FST_INLINE uint64_t blocks() const {
        return by_element ? 1 : all.count / (threads * each * (16 / size_of<Src>)) + 1;
    }
    FST_INLINE uint32_t gather(uint64_t block, unsigned thread, State &) const {
#ifdef FST_BY_ELEMENT
        uint64_t found = 0;
        (void)block, (void)thread;
        const uint32_t amax = amax_of(all, &found);
#else
        uint32_t found = 0;
        Vector<16> in[each];
        const Strip<Src> strip =
            strip_of<Src>(all.src, 0, all.count, block * each * threads + thread, threads, each);
        const uint32_t loaded = strip.load(in), amax = amax_of<Src>(strip, in, loaded, &found);
#endif
        count_nans(nans, found);
        return to_f32<Src>(amax);
    }
    FST_INLINE void finish(uint64_t, unsigned thread, const State &, uint32_t amax) const {
        if (thread != 0) return;
        uint32_t *to = global<uint32_t>(scale);
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
        atomicMax(to, amax);
#else
        *to = amax > *to ? amax : *to;
#endif
    }
};

template <int Src, int Dst> struct Encode {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned each = 4; // vectors of a thread

    Stretch<Src, Dst> all;
    uint64_t scale;

    FST_INLINE uint64_t blocks() const {
        return by_element ? 1 : (all.count + 16) / (threads * each * (16 / size_of<Src>)) + 1;
    }
    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
#ifdef FST_BY_ELEMENT
        (void)block, (void)thread;
        const Stretch<Src, Dst> s = all; // not the member: stores of bytes might change that
        encode_elements<Src, Dst>(s, Quotient(global<const uint32_t>(scale)[0]));
#else
        Vector<16> in[each];
        const Strip<Src> strip =
            strip_of<Src>(all.src, all.dst, all.count, block * each * threads + thread, threads, each);
        const uint32_t loaded = strip.load(in);
        encode_strip<Src, Dst>(strip, in, loaded, global<const uint32_t>(scale)[0]);
#endif
    }
};

// ---- Launchers ----

typedef int quantize_fn(fst_queue, const fst_quantize_args *);

template <int Src, int Dst> int quantize_tensor(fst_queue stream, const fst_quantize_args *args) {
    const uint64_t count = args->rows * args->cols, scale = reinterpret_cast<uint64_t>(args->scales);
    const uint64_t src = reinterpret_cast<uint64_t>(args->src), dst = reinterpret_cast<uint64_t>(args->dst);
    const Stretch<Src, Dst> all = {src, dst, count};
    const Amax<Src, Dst> amax = {all, scale, reinterpret_cast<uint64_t>(args->nans)};
    const Encode<Src, Dst> encode = {all, scale};
    int code = launch(stream, Begin{scale}, 1);
    if (!code) code = launch_reduce(stream, amax, amax.blocks());
    if (!code) code = launch(stream, MakeScale<Dst>{scale}, 1);
    return code ? code : launch(stream, encode, encode.blocks());
}

template <int Src, int Dst, unsigned Threads>
int quantize_tiles(fst_queue stream, const fst_quantize_args *args) {
    using Body = Tile<Src, Dst, Threads>;
    const bool block = args->kind == FST_SCALE_BLOCK;
    const uint64_t rows = block ? 128 : 1, cols = block ? 128 : args->cols;
    const uint64_t grid_rows = (args->rows - 1) / rows + 1,
                   grid_cols = block ? (args->cols - 1) / cols + 1 : 1;
    const uint64_t src = reinterpret_cast<uint64_t>(args->src), dst = reinterpret_cast<uint64_t>(args->dst);
    const uint64_t bits = dst | args->cols | Body::width; // the lowest: what all rows are aligned to
    const Body body = {src,
                       dst,
                       reinterpret_cast<uint64_t>(args->scales),
                       reinterpret_cast<uint64_t>(args->nans),
                       args->rows,
                       args->cols,
                       rows,
                       cols,
                       divisor(grid_cols),
                       static_cast<unsigned>(bits & (0 - bits)),
                       src % 16 == 0 && (dst | args->cols) % Body::width == 0};
    return launch_reduce(stream, body, grid_rows * grid_cols);
}

template <int Src, int Dst> int quantize(fst_queue stream, const fst_quantize_args *args) {
    if (args->kind == FST_SCALE_TENSOR) return quantize_tensor<Src, Dst>(stream, args);
    // As many threads as hold a row of 4,096, or a tile of 128 x 128, in registers.
    constexpr unsigned tile = 256 * (size_of<Src> / 2);
    if (args->kind == FST_SCALE_ROW && args->cols <= 4096)
        return quantize_tiles<Src, Dst, tile / 4>(stream, args);
    return quantize_tiles<Src, Dst, tile>(stream, args);
}

template <int Src> quantize_fn *find_to(int dst) {
    switch (dst) {
    case FST_T_F8_E4M3: return quantize<Src, FST_T_F8_E4M3>;
    case FST_T_F8_E5M2: return quantize<Src, FST_T_F8_E5M2>;
    case FST_T_F8_E4M3FNUZ: return quantize<Src, FST_T_F8_E4M3FNUZ>;
    default: return nullptr;
    }
}

quantize_fn *find(int src, int dst) {
    switch (src) {
    case FST_T_F32: return find_to<FST_T_F32>(dst);
    case FST_T_F16: return find_to<FST_T_F16>(dst);
    case FST_T_BF16: return find_to<FST_T_BF16>(dst);
    default: return nullptr;
    }
}

} // namespace

extern "C" int FST_SYMBOL(fst_quantize)(fst_queue stream, const fst_quantize_args *args) {
    quantize_fn *const launcher = find(args->src_dtype, args->dst_dtype);
    uint64_t elements;
    if (!launcher) return FST_K_NO_KERNEL;
    if (args->kind != FST_SCALE_TENSOR && args->kind != FST_SCALE_ROW && args->kind != FST_SCALE_BLOCK)
        return FST_K_NO_KERNEL;
    if (__builtin_mul_overflow(args->rows, args->cols, &elements) || elements > UINT64_MAX / 16)
        return FST_K_SIZE;
    // Without elements there are still the scales of the tensor, or of its rows: amax is 0.
    if (elements == 0 && (args->kind == FST_SCALE_BLOCK || (args->kind == FST_SCALE_ROW && args->rows == 0)))
        return FST_K_OK;
    if ((elements && (!args->src || !args->dst)) || !args->scales) return FST_K_NULL;
    if (reinterpret_cast<uint64_t>(args->scales) % 4 || reinterpret_cast<uint64_t>(args->nans) % 8)
        return FST_K_ALIGN;
    return launcher(stream, args);
}
