// Quantization with computed scales: s = RN32(amax / M), code = encode(RN32(x / s)).
#include "launch.h"
#include "nvidia.h"
#include "reduce.h"

namespace {

#ifdef FST_BY_ELEMENT
constexpr bool by_element = true;
#else
constexpr bool by_element = false;
#endif

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

// Divides by one scale, rounded to nearest like a division, but by multiplications: with r = RN(1/s), the
// correction of x*r by its exact remainder rounds right (Markstein 1990), as long as nothing under- or
// overflows. Scales outside 2^-60..2^60 take the division.
class Quotient {
  public:
    // `tame`: only finite numbers will be divided.
    FST_INLINE Quotient(uint32_t scale, bool tame)
        : scale_(fst_float_of_bits32(scale)), reciprocal_(1.0f / scale_),
          usual_(scale_ > 0x1p-60f && scale_ < 0x1p60f), tame_(tame && usual_) {}
    FST_INLINE bool tame() const { return tame_; }
    FST_INLINE float of_finite(float x) const {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__) || defined(FST_DEVICE_SHAPE)
        const float q = x * reciprocal_;
        const uint32_t bits =
            fst_bits_of_float32(__builtin_fmaf(__builtin_fmaf(-q, scale_, x), reciprocal_, q));
        // Of -0 the sum makes 0.
        return fst_float_of_bits32((bits & 0x7FFFFFFF) | (fst_bits_of_float32(x) & 0x80000000));
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
    bool usual_, tame_;
};

// True unless there may be NaN or Inf under this scale: they make it NaN, or that of the largest finite number.
template <int Src, int Dst> FST_FN bool is_tame(uint32_t scale) {
    return (scale & 0x7FFFFFFF) < 0x7F800000 && scale != scale_of<Dst>(to_f32<Src>(infinity<Src> - 1));
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

// `count` neighbouring elements, cut into slots of 16 bytes of the source, where the destination is aligned.
// [all_begin, all_end) is the whole source: nothing outside it is read. All are addresses (global() in
// pack.h).
template <int Src, int Dst> struct Stretch {
    static constexpr unsigned src_size = size_of<Src>;
    static constexpr unsigned width = 16 / src_size;

    uint64_t src, all_begin, all_end, dst, count;

    FST_INLINE unsigned skew() const { return static_cast<unsigned>(dst % width); }
    FST_INLINE uint64_t slots() const { return (count + skew() + width - 1) / width; }
    // The elements of a slot; false when there are none.
    FST_INLINE bool range(uint64_t slot, uint64_t *begin, uint64_t *end) const {
        const uint64_t position = slot * width, before = skew();
        *begin = position > before ? position - before : 0;
        *end = position + width - before < count ? position + width - before : count;
        return *begin < *end;
    }
    FST_INLINE typename word_of<src_size>::type element(uint64_t i) const {
        return load_element<src_size>(global<const uint8_t>(src) + i * src_size);
    }
#ifndef FST_BY_ELEMENT
    FST_INLINE bool load(uint64_t begin, uint64_t end, Vector<16> *in) const {
        return end - begin == width &&
               load_vector(global<const uint8_t>(src) + begin * src_size, global<const uint8_t>(all_begin),
                           global<const uint8_t>(all_end), in);
    }
#endif
};

// The largest magnitude of [begin, end), as a code. NaNs are counted in a second pass, if there are any.
template <int Src, int Dst>
FST_FN uint32_t amax_of(const Stretch<Src, Dst> &s, uint64_t begin, uint64_t end, uint32_t *nans) {
    typename word_of<size_of<Src>>::type amax = 0;
    FST_ROLLED
    for (uint64_t i = begin; i < end; i++) {
        const auto a = magnitude<Src>(s.element(i));
        amax = a > amax ? a : amax;
    }
    if (amax <= infinity<Src>) return amax;
    uint32_t found = 0;
    FST_ROLLED
    for (uint64_t i = begin; i < end; i++) found += magnitude<Src>(s.element(i)) > infinity<Src>;
    *nans += found;
    return amax;
}

template <int Src, int Dst>
FST_FN void encode_elements(const Stretch<Src, Dst> &s, uint64_t begin, uint64_t end,
                            const Quotient &quotient) {
    uint8_t *__restrict to = global<uint8_t>(s.dst);
    FST_ROLLED
    for (uint64_t i = begin; i < end; i++) {
        const uint32_t bits = to_f32<Src>(s.element(i));
        to[i] = static_cast<uint8_t>(encode<Dst>(quotient(bits), bits));
    }
}

#ifdef FST_BY_ELEMENT
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
template <int Src> FST_FN uint32_t plain_amax(const Vector<16> &in) {
    constexpr uint32_t mask = size_of<Src> == 4 ? 0x7FFFFFFF : 0x7FFF7FFF;
    uint32_t a = in.word[0] & mask;
    FST_UNROLLED
    for (unsigned i = 1; i < 4; i++) {
        const uint32_t b = in.word[i] & mask;
        if (size_of<Src> == 4) a = b > a ? b : a;
        else a = larger16x2(a, b);
    }
    if (size_of<Src> == 4) return a;
    return (a & 0xFFFF) > a >> 16 ? a & 0xFFFF : a >> 16;
}
#endif

template <int Src> FST_FN uint32_t amax_of_vector(const Vector<16> &in, uint32_t *nans) {
    uint32_t amax = 0;
#if FST_PACKED >= 90
    amax = plain_amax<Src>(in);
    if (amax < infinity<Src>) return amax;
    amax = 0;
#endif
    FST_UNROLLED
    for (unsigned i = 0; i < 16 / size_of<Src>; i++) {
        const uint32_t a =
            magnitude<Src>(static_cast<typename word_of<size_of<Src>>::type>(from_vector<Src>(in, i)));
        amax = a > amax ? a : amax;
        *nans += a > infinity<Src>;
    }
    return amax;
}

#if FST_PACKED >= 89
// Four codes of finite numbers under a scale in the usual range. No quotient is beyond M by more than a rounding. A code
// of FNUZ is that of twice the number in OCP, but for -0.
template <int Src, int Dst>
FST_FN uint32_t tame_codes(const Vector<16> &in, unsigned i, const Quotient &quotient) {
    uint32_t x[4];
    FST_UNROLLED
    for (unsigned k = 0; k < 4; k++) {
        const uint32_t word = in.word[size_of<Src> == 4 ? k : (i + k) / 2];
        if (Src == FST_T_F32) x[k] = word;
        else if (k % 2 == 0) widen16<Src>(word, &x[k], &x[k + 1]);
    }
    FST_UNROLLED
    for (unsigned k = 0; k < 4; k++) {
        const float q = quotient.of_finite(fst_float_of_bits32(x[k]));
        x[k] = fst_bits_of_float32(fst_is_fnuz(fst_float_of(Dst)) ? q + q : q);
    }
    const uint32_t codes = fp8x2_of_f32<as_e5m2<Dst>>(x[0], x[1]) | fp8x2_of_f32<as_e5m2<Dst>>(x[2], x[3])
                                                                        << 16;
    if (!fst_is_fnuz(fst_float_of(Dst))) return codes;
    return codes & (((codes & four(0x7F)) + four(0x7F)) | four(0x7F));
}
#endif

template <int Src, int Dst>
FST_FN void store_codes(uint8_t *to, const Vector<16> &in, const Quotient &quotient) {
    Vector<16 / size_of<Src>> out = {};
#if FST_PACKED >= 89
    if (quotient.tame()) {
        FST_UNROLLED
        for (unsigned i = 0; i < 16 / size_of<Src>; i += 4)
            out.word[i / 4] = tame_codes<Src, Dst>(in, i, quotient);
        store_aligned(to, out);
        return;
    }
    FST_UNROLLED
    for (unsigned i = 0; i < 16 / size_of<Src>; i += 4) {
        uint32_t x[4], signs[4]; // the conversion of F16 loses the sign of a NaN, and so does the quotient
        FST_UNROLLED
        for (unsigned k = 0; k < 4; k++) {
            const uint32_t word = in.word[size_of<Src> == 4 ? k : (i + k) / 2];
            if (Src == FST_T_F32) x[k] = word;
            else if (k % 2 == 0) widen16<Src>(word, &x[k], &x[k + 1]);
            signs[k] = (size_of<Src> == 4 || k % 2 ? word : word << 16) & 0x80000000;
        }
        FST_UNROLLED
        for (unsigned k = 0; k < 4; k++) x[k] = (quotient(x[k]) & 0x7FFFFFFF) | signs[k];
        out.word[i / 4] = to_bytes<FST_T_F32, Dst>(x, true);
    }
    store_aligned(to, out);
    return;
#endif
    FST_UNROLLED
    for (unsigned i = 0; i < 16 / size_of<Src>; i++) {
        const uint32_t bits = to_f32<Src>(from_vector<Src>(in, i));
        put<1>(&out, i, encode<Dst>(quotient(bits), bits));
    }
    store_aligned(to, out);
}

template <int Src, int Dst>
FST_FN void encode_slot(const Stretch<Src, Dst> &s, uint64_t slot, const Quotient &quotient) {
    uint64_t begin, end;
    Vector<16> in;
    if (!s.range(slot, &begin, &end)) return;
    if (s.load(begin, end, &in)) store_codes<Src, Dst>(global<uint8_t>(s.dst) + begin, in, quotient);
    else encode_elements<Src, Dst>(s, begin, end, quotient);
}
#endif

// A block quantizes one row, or one tile of 128 x 128. What it reads stays in registers, as far as they go.
template <int Src, int Dst, unsigned Threads> struct Tile {
    static constexpr unsigned threads = by_element ? 1 : Threads;
    static constexpr unsigned src_size = size_of<Src>;
    static constexpr unsigned width = Stretch<Src, Dst>::width;
    static constexpr unsigned kept = 8; // vectors of a thread

    uint64_t src, dst, scales, nans, rows, cols, tile_rows, tile_cols, grid_cols;

    struct State {
#ifndef FST_BY_ELEMENT
        Vector<16> in[kept];
        uint32_t whole; // bit k: in[k] holds the thread's k-th slot
#endif
    };

    FST_INLINE uint32_t gather(uint64_t block, unsigned thread, State &state) const {
        uint32_t amax = 0;
#ifdef FST_BY_ELEMENT
        uint64_t found = 0;
        (void)thread, (void)state;
        for (uint64_t row = first_row(block); row < last_row(block); row++)
            amax = larger(amax, amax_of(stretch(block, row), &found));
#else
        uint32_t found = 0;
        const Places places(*this, block, thread);
        state.whole = 0;
        FST_UNROLLED
        for (unsigned k = 0; k < kept; k++) { // all loads are under way before the first is used
            uint64_t slot, begin, end;
            Stretch<Src, Dst> s;
            const bool whole =
                places.find(k, &s, &slot) && s.range(slot, &begin, &end) && s.load(begin, end, &state.in[k]);
            state.whole |= static_cast<uint32_t>(whole) << k;
        }
        FST_UNROLLED
        for (unsigned k = 0; k < kept; k++)
            if (state.whole >> k & 1) amax = larger(amax, amax_of_vector<Src>(state.in[k], &found));
        FST_ROLLED
        for (unsigned k = places.begin_rest(state.whole, kept); k < places.count; k++) {
            uint64_t slot, begin, end;
            Stretch<Src, Dst> s;
            Vector<16> in;
            if ((k < kept && state.whole >> k & 1) || !places.find(k, &s, &slot) ||
                !s.range(slot, &begin, &end))
                continue;
            amax = larger(amax, s.load(begin, end, &in) ? amax_of_vector<Src>(in, &found)
                                                        : amax_of(s, begin, end, &found));
        }
#endif
        count_nans(nans, found);
        return to_f32<Src>(amax);
    }

    FST_INLINE void finish(uint64_t block, unsigned thread, const State &state, uint32_t amax) const {
        const uint32_t scale = scale_of<Dst>(amax);
        const Quotient quotient(scale, is_tame<Src, Dst>(scale));
        if (thread == 0) global<uint32_t>(scales)[block] = scale;
#ifdef FST_BY_ELEMENT
        (void)state;
        for (uint64_t row = first_row(block); row < last_row(block); row++) {
            const Stretch<Src, Dst> s = stretch(block, row);
            encode_elements<Src, Dst>(s, 0, s.count, quotient);
        }
#else
        const Places places(*this, block, thread);
        FST_UNROLLED
        for (unsigned k = 0; k < kept; k++) {
            uint64_t slot, begin, end;
            Stretch<Src, Dst> s;
            if (!(state.whole >> k & 1)) continue;
            places.find(k, &s, &slot);
            s.range(slot, &begin, &end);
            store_codes<Src, Dst>(global<uint8_t>(s.dst) + begin, state.in[k], quotient);
        }
        FST_ROLLED
        for (unsigned k = places.begin_rest(state.whole, kept); k < places.count; k++) {
            uint64_t slot;
            Stretch<Src, Dst> s;
            if (!(k < kept && state.whole >> k & 1) && places.find(k, &s, &slot))
                encode_slot<Src, Dst>(s, slot, quotient);
        }
#endif
    }

  private:
    static FST_INLINE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
    FST_INLINE uint64_t first_row(uint64_t block) const { return block / grid_cols * tile_rows; }
    FST_INLINE uint64_t last_row(uint64_t block) const {
        const uint64_t end = first_row(block) + tile_rows;
        return end < rows ? end : rows;
    }
    FST_INLINE Stretch<Src, Dst> stretch(uint64_t block, uint64_t row) const {
        const uint64_t col = grid_cols == 1 ? 0 : block % grid_cols * tile_cols;
        const uint64_t left = cols - col, at = row * cols + col;
        return {src + at * src_size, src, src + rows * cols * src_size, dst + at,
                left < tile_cols ? left : tile_cols};
    }

#ifndef FST_BY_ELEMENT
    // The slots of a thread: every `threads`-th of the tile's, which are numbered row by row. Each row has as many as
    // the one that has most.
    struct Places {
        Stretch<Src, Dst> first; // row
        uint64_t cols;
        uint32_t each, row, slot, row_step, slot_step; // from one slot of the thread to the next
        uint32_t count;

        FST_INLINE Places(const Tile &tile, uint64_t block, unsigned thread)
            : first(tile.stretch(block, tile.first_row(block))), cols(tile.cols) {
            const bool aligned =
                (tile.dst | tile.cols | (tile.grid_cols == 1 ? 0 : tile.tile_cols)) % width == 0;
            const uint64_t in_row = (first.count + (aligned ? 0 : width - 1) + width - 1) / width;
            const uint64_t all = (tile.last_row(block) - tile.first_row(block)) * in_row;
            each = static_cast<uint32_t>(
                in_row); // a row of 2^32 slots and more has no tile beside it: not divided
            row = slot = row_step = slot_step = 0;
            count = thread < all ? static_cast<uint32_t>((all - thread - 1) / threads + 1) : 0;
            if (tile.tile_rows == 1) {
                slot = thread, slot_step = threads;
            } else {
                row = thread / each, slot = thread % each, row_step = threads / each,
                slot_step = threads % each;
            }
        }
        // The k-th: its row and its place there. False past the end.
        FST_INLINE bool find(unsigned k, Stretch<Src, Dst> *s, uint64_t *at) const {
            uint32_t r = row + k * row_step;
            uint64_t c = slot + static_cast<uint64_t>(k) * slot_step;
            if (row_step && slot_step)
                r += static_cast<uint32_t>(c) / each, c = static_cast<uint32_t>(c) % each;
            *s = first;
            s->src += r * cols * src_size, s->dst += r * cols;
            *at = c;
            return k < count;
        }
        // The first that may not be kept: past the end when all are.
        FST_INLINE unsigned begin_rest(uint32_t whole, unsigned most) const {
            return count <= most && whole == (1u << count) - 1 ? count : 0;
        }
    };
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

template <int Src, int Dst> struct Amax {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned each = 8; // slots of a thread

    struct State {};
    Stretch<Src, Dst> all;
    uint64_t scale, nans;

    FST_INLINE uint64_t blocks() const {
        return by_element ? 1 : (all.slots() + threads * each - 1) / (threads * each);
    }
    FST_INLINE uint32_t gather(uint64_t block, unsigned thread, State &) const {
#ifdef FST_BY_ELEMENT
        uint64_t found = 0;
        (void)block, (void)thread;
        const uint32_t amax = amax_of(all, &found);
#else
        uint32_t amax = 0, found = 0;
        FST_UNROLLED
        for (unsigned k = 0; k < each; k++) {
            const uint64_t slot = (block * each + k) * threads + thread;
            uint64_t begin, end;
            Vector<16> in;
            if (!all.range(slot, &begin, &end)) continue;
            const uint32_t a = all.load(begin, end, &in) ? amax_of_vector<Src>(in, &found)
                                                         : amax_of(all, begin, end, &found);
            amax = a > amax ? a : amax;
        }
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

    Stretch<Src, Dst> all;
    uint64_t scale;

    FST_INLINE uint64_t blocks() const { return by_element ? 1 : (all.slots() + threads - 1) / threads; }
    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint32_t one = global<const uint32_t>(scale)[0];
        const Quotient quotient(one, is_tame<Src, Dst>(one));
#ifdef FST_BY_ELEMENT
        (void)block, (void)thread;
        const Stretch<Src, Dst> s = all; // not the member: stores of bytes might change that
        encode_elements<Src, Dst>(s, 0, s.count, quotient);
#else
        encode_slot<Src, Dst>(all, block * threads + thread, quotient);
#endif
    }
};

// ---- Launchers ----

typedef int quantize_fn(fst_queue, const fst_quantize_args *);

template <int Src, int Dst> int quantize_tensor(fst_queue stream, const fst_quantize_args *args) {
    const uint64_t count = args->rows * args->cols, scale = reinterpret_cast<uint64_t>(args->scales);
    const uint64_t src = reinterpret_cast<uint64_t>(args->src), dst = reinterpret_cast<uint64_t>(args->dst);
    const Stretch<Src, Dst> all = {src, src, src + count * size_of<Src>, dst, count};
    const Amax<Src, Dst> amax = {all, scale, reinterpret_cast<uint64_t>(args->nans)};
    const Encode<Src, Dst> encode = {all, scale};
    int code = launch(stream, Begin{scale}, 1);
    if (!code) code = launch_reduce(stream, amax, amax.blocks());
    if (!code) code = launch(stream, MakeScale<Dst>{scale}, 1);
    return code ? code : launch(stream, encode, encode.blocks());
}

template <int Src, int Dst, unsigned Threads>
int quantize_tiles(fst_queue stream, const fst_quantize_args *args) {
    const bool block = args->kind == FST_SCALE_BLOCK;
    const uint64_t rows = block ? 128 : 1, cols = block ? 128 : args->cols;
    const uint64_t grid_rows = (args->rows - 1) / rows + 1,
                   grid_cols = block ? (args->cols - 1) / cols + 1 : 1;
    const Tile<Src, Dst, Threads> body = {reinterpret_cast<uint64_t>(args->src),
                                          reinterpret_cast<uint64_t>(args->dst),
                                          reinterpret_cast<uint64_t>(args->scales),
                                          reinterpret_cast<uint64_t>(args->nans),
                                          args->rows,
                                          args->cols,
                                          rows,
                                          cols,
                                          grid_cols};
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
