// Packed integers: codes of 1 to 8 bits in words or bytes, less zero points, times scales.
// dst = round(RN32(f32(code - zero) * f32(scale))). The result is [rows, cols] however the codes lie.
#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "nvidia.h"
#include "packing.h"
#include "product.h"

namespace {

// NVIDIA has bodies of its own for what is aligned and whole.
#if defined(__CUDACC__) || defined(FST_NVIDIA_SHAPE)
#define FST_PACKED_WHOLE
#endif

FST_FN uint32_t scale_bits(uint64_t scales, int dtype, uint64_t index) {
    if (dtype == FST_T_F32) return global<const uint32_t>(scales)[index];
    const uint32_t code = global<const uint16_t>(scales)[index];
    return dtype == FST_T_BF16 ? code << 16 : fst_decode32(code, fst_float_of(FST_T_F16));
}

// Where a code lies in the words of its run: the stream of bits, or, padded, as many in a word as fill none of two.
template <class Index> struct At {
    Index word;
    unsigned shift;
};
// One formula for both: with two, CUDA 13.0's compiler does not come to an end.
template <unsigned Bits, class Index> FST_FN At<Index> place_of(Index i, bool padded) {
    const Index at = i * Bits + (padded ? i / (32 / Bits) * (32 % Bits) : 0);
    return {at / 32, static_cast<unsigned>(at % 32)};
}

// The result, and what scales its elements.
template <unsigned Bits, int Dst> struct Matrix {
    static constexpr unsigned dst_size = Dst == FST_T_F32 ? 4 : 2;
    static constexpr uint32_t mask = (1u << Bits) - 1;
    using Word = typename word_of<dst_size>::type;

    uint64_t src, dst, scales, zeros, groups;
    uint64_t rows, cols;
    uint64_t first, end;           // words, of bytes where two rows share them
    uint64_t scale_row, scale_col; // steps of the scales
    uint64_t zero_word, zero_step; // steps of packed zero points: from word to word, and across
    Divisor group;
    int32_t fixed;       // added to zero points; where there are none, the only one
    uint32_t zero_carry; // added to their words
    uint32_t flip;       // of each code: puts it on `base`, and turns two's complement
    int scale_dtype, zeros_kind;
    unsigned flags;
    bool aligned; // rows of the destination, to 16 bytes
    bool whole;   // eight columns that begin at a multiple of 8 have one group

    struct Scale {
        uint32_t scale, zero; // F32 bits; the zero point's on `base`
    };

    // A code less a zero point.
    FST_INLINE uint32_t above(uint32_t code, uint32_t zero) const {
        return fst_bits_of_float32(fst_float_of_bits32(code ^ flip) - fst_float_of_bits32(zero));
    }

    FST_INLINE uint64_t group_of(uint64_t col) const {
        return groups ? global<const uint32_t>(groups)[col] : group.divide(col);
    }

    FST_INLINE int32_t zero_of(uint64_t row, uint64_t j) const {
        if (zeros_kind == FST_ZEROS_NONE) return fixed;
        if (zeros_kind == FST_ZEROS_BYTES)
            return fixed + static_cast<int8_t>(global<const uint8_t>(zeros)[row * zero_step + j]);
        const uint32_t *words = global<const uint32_t>(zeros);
        const bool along_groups = zeros_kind == FST_ZEROS_GROUPS;
        At<uint64_t> at = place_of<Bits>(along_groups ? j : row, flags & FST_K_PADDED);
        if (Bits == 4 && (flags & FST_K_AWQ_ORDER)) at.shift = awq_shift(at.shift / 4);
        const uint64_t i = at.word * zero_word + (along_groups ? row : j) * zero_step;
        uint64_t code = words[i] + zero_carry; // of 32 bits
        if (32 % Bits) code |= static_cast<uint64_t>(words[at.shift + Bits > 32 ? i + zero_word : i]) << 32;
        return static_cast<int32_t>(static_cast<uint32_t>(code >> at.shift) & mask) + fixed;
    }

    FST_INLINE Scale scale_of(uint64_t row, uint64_t j) const {
        return {scale_bits(scales, scale_dtype, row * scale_row + j * scale_col),
                base + static_cast<uint32_t>(zero_of(row, j))};
    }

#ifdef FST_PACKED_WHOLE
    // The same in two steps, so that nothing waits for one of several: what is stored, and what it means. Indexes have
    // 31 bits.
    struct Stored {
        uint32_t scale, low, high; // words that the zero point lies in
        unsigned shift;
    };
    FST_INLINE Stored load_scale(uint32_t row, uint32_t j) const {
        Stored s = {0, 0, 0, 0};
        const uint32_t at = row * static_cast<uint32_t>(scale_row) + j * static_cast<uint32_t>(scale_col);
        if (scale_dtype == FST_T_F32) s.scale = global<const uint32_t>(scales)[at];
        else s.scale = global<const uint16_t>(scales)[at];
        if (zeros_kind != FST_ZEROS_NONE) load_zero(row, j, &s);
        return s;
    }
    FST_INLINE void load_zero(uint32_t row, uint32_t j, Stored *s) const {
        const uint32_t step = static_cast<uint32_t>(zero_step), next = static_cast<uint32_t>(zero_word);
        if (zeros_kind == FST_ZEROS_BYTES) {
            s->low = global<const uint8_t>(zeros)[row * step + j];
            return;
        }
        const uint32_t *words = global<const uint32_t>(zeros);
        const bool along_groups = zeros_kind == FST_ZEROS_GROUPS;
        At<uint32_t> at = place_of<Bits>(along_groups ? j : row, flags & FST_K_PADDED);
        if (Bits == 4 && (flags & FST_K_AWQ_ORDER)) at.shift = awq_shift(at.shift / 4);
        const uint32_t i = at.word * next + (along_groups ? row : j) * step;
        s->low = words[i], s->shift = at.shift;
        if (32 % Bits) s->high = words[at.shift + Bits > 32 ? i + next : i];
    }

    FST_INLINE Scale scale_in(const Stored &s) const {
        uint32_t scale = s.scale, zero = 0;
        if (scale_dtype == FST_T_BF16) scale <<= 16;
        else if (scale_dtype == FST_T_F16) scale = fst_decode32(scale, fst_float_of(FST_T_F16));
        if (zeros_kind > FST_ZEROS_BYTES) {
            uint64_t code = s.low + zero_carry; // of 32 bits
            if (32 % Bits) code |= static_cast<uint64_t>(s.high) << 32;
            zero = static_cast<uint32_t>(code >> s.shift) & mask;
        } else if (zeros_kind == FST_ZEROS_BYTES) {
            zero = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(s.low)));
        }
        return {scale, base + static_cast<uint32_t>(fixed) + zero};
    }
#endif

    // Columns [col, stop) of a row; code(col) is one's code.
    template <class Code>
    FST_INLINE void elements(uint64_t row, uint64_t col, uint64_t stop, const Code &code) const {
        Word *__restrict to = global<Word>(dst) + row * cols;
        FST_ROLLED
        while (col < stop) {
            const uint64_t j = group_of(col);
            uint64_t until = groups ? col + 1 : (j + 1) * group.value;
            if (until > stop) until = stop;
            const Scale by = scale_of(row, j);
            FST_ROLLED
            for (; col < until; col++)
                to[col] =
                    static_cast<Word>(encode<Dst>(multiply(above(code(col), by.zero), by.scale)));
        }
    }

#ifndef FST_BY_ELEMENT
    FST_INLINE void element(uint64_t row, uint64_t col, uint32_t code) const {
        const Scale by = scale_of(row, group_of(col));
        global<Word>(dst)[row * cols + col] =
            static_cast<Word>(encode<Dst>(multiply(above(code, by.zero), by.scale)));
    }

    // Eight columns of a row, from a multiple of 8 on; rows are aligned.
    FST_INLINE void vector(uint64_t row, uint64_t col, const uint32_t (&codes)[8]) const {
        Vector<8 *dst_size> out = {};
        if (whole) results(codes, scale_of(row, group_of(col)), &out);
        else scattered(row, col, codes, &out);
        uint8_t *to = global<uint8_t>(dst) + (row * cols + col) * dst_size;
        Vector<16> part;
        FST_UNROLLED
        for (unsigned at = 0; at < 8 * dst_size / 4; at += 4) {
            FST_UNROLLED
            for (unsigned i = 0; i < 4; i++) part.word[i] = out.word[at + i];
            store_aligned(to + at * 4, part);
        }
    }

    // Of one group.
    template <unsigned n>
    FST_INLINE void results(const uint32_t (&codes)[n], Scale by, Vector<n * dst_size> *out) const {
#if FST_PACKED
        uint32_t x[n]; // before the branch, or codes alone would be made there, in as many instructions again
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++) x[i] = above(codes[i], by.zero);
        if ((by.scale & 0x7F800000) != 0x7F800000) { // of finite scales there is no NaN
            FST_UNROLLED
            for (unsigned i = 0; i < n; i++)
                x[i] = fst_bits_of_float32(fst_float_of_bits32(x[i]) * fst_float_of_bits32(by.scale));
            return narrow_numbers<Dst>(x, out->word);
        }
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++) put<dst_size>(out, i, encode<Dst>(multiply(x[i], by.scale)));
#else
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++)
            put<dst_size>(out, i, encode<Dst>(multiply(above(codes[i], by.zero), by.scale)));
#endif
    }

  private:
    // Of any groups. Codes and results move through their arrays, so that one copy of the body does for all eight and no
    // index is known only at run time: eight copies are more than registers hold.
    FST_INLINE void scattered(uint64_t row, uint64_t col, const uint32_t (&codes)[8],
                              Vector<8 * dst_size> *out) const {
        constexpr unsigned n = Vector<8 * dst_size>::words;
        uint32_t left[8];
        FST_UNROLLED
        for (unsigned i = 0; i < 8; i++) left[i] = codes[i];
        FST_ROLLED
        for (unsigned i = 0; i < 8; i++) {
            const Scale by = scale_of(row, group_of(col + i));
            const uint32_t x = encode<Dst>(multiply(above(left[0], by.zero), by.scale));
            FST_UNROLLED
            for (unsigned k = 0; k < 7; k++) left[k] = left[k + 1];
            FST_UNROLLED
            for (unsigned k = 0; k < n; k++) {
                const uint32_t next = k + 1 < n ? out->word[(k + 1) % n] : x;
                out->word[k] = dst_size == 4 ? next : funnel(out->word[k], next, 2);
            }
        }
    }
#endif
};

// A word of the range, at any alignment.
template <class M> FST_FN uint32_t word_at(const M &m, uint64_t i) {
    return load_element<4>(global<const uint8_t>(m.src) + (i - m.first) * 4);
}

// ---- Along the row ----

template <unsigned Bits, int Dst> struct PackedRows {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr bool straddles = 32 % Bits != 0;
    Matrix<Bits, Dst> m;
    uint64_t row_words, first_row, last_row;
    Divisor vectors; // of a row

    FST_INLINE uint64_t blocks() const {
        const uint64_t all = last_row - first_row + 1;
        return by_element ? all : (all * vectors.value + threads - 1) / threads;
    }

    FST_INLINE uint32_t code(uint64_t row, uint64_t col) const {
        const At<uint64_t> at = place_of<Bits>(col, m.flags & FST_K_PADDED);
        const uint64_t i = row * row_words + at.word;
        uint32_t word = word_at(m, i) >> at.shift;
        if (straddles && at.shift + Bits > 32) word |= word_at(m, i + 1) << (32 - at.shift);
        return word & m.mask;
    }

    // The column that a word of a row begins with; a range begins at no other.
    FST_INLINE uint64_t col_of(uint64_t word) const {
        const uint64_t col = straddles && !(m.flags & FST_K_PADDED) ? word * 32 / Bits : word * (32 / Bits);
        return col < m.cols ? col : m.cols;
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        uint64_t row = first_row + block, col = 0, stop = m.cols;
        if (!by_element) {
            const uint64_t i = block * threads + thread;
            row = first_row + vectors.divide(i);
            if (row > last_row) return;
            col = (i - (row - first_row) * vectors.value) * 8;
            if (stop > col + 8) stop = col + 8;
        }
        if (row == first_row) {
            const uint64_t begin = col_of(m.first - row * row_words);
            if (col < begin) col = begin;
        }
        if (row == last_row) {
            const uint64_t end = col_of(m.end - row * row_words);
            if (stop > end) stop = end;
        }
        if (col >= stop) return;
#ifndef FST_BY_ELEMENT
        if (stop - col == 8 && m.aligned && eight(row, col)) return;
#endif
        m.elements(row, col, stop, [&](uint64_t k) { return code(row, k); });
    }

#ifndef FST_BY_ELEMENT
  private:
    FST_INLINE bool eight(uint64_t row, uint64_t col) const {
        uint32_t codes[8];
        if (straddles && (m.flags & FST_K_PADDED)) {
            FST_UNROLLED
            for (unsigned i = 0; i < 8; i++) codes[i] = code(row, col + i);
        } else {
            constexpr unsigned bytes = Bits == 5 || Bits == 7 ? 8 : Bits;
            Vector<bytes> in = {};
            const uint8_t *begin = global<const uint8_t>(m.src);
            const uint8_t *from = begin + ((row * row_words - m.first) * 4 + col / 8 * Bits);
            const uint8_t *end = begin + (m.end - m.first) * 4;
            if (from + bytes > end || !load_vector(from, begin, end, &in)) return false;
            FST_UNROLLED
            for (unsigned i = 0; i < 8; i++) codes[i] = static_cast<uint32_t>(get_code<Bits>(in, i));
        }
        m.vector(row, col, codes);
        return true;
    }
#endif
};

#ifdef FST_PACKED_WHOLE
// Whether there is such a body: eight codes of 5 to 7 bits are more than a word.
template <unsigned Bits, int Dst> constexpr bool has_vectors = Dst == FST_T_F32 || Bits < 5 || Bits == 8;

// Whole rows, of as many columns as fill vectors of 16 bytes of the result; groups fill them, too. A thread has `each`
// vectors, whose codes, scales and zero points are all under way before the first is used. Indexes have 31 bits.
template <unsigned Bits, int Dst> struct PackedVectors {
    using M = Matrix<Bits, Dst>;
    static constexpr unsigned threads = 256, each = 4, n = 16 / M::dst_size;
    M m;                     // `src` and `dst` at the first row
    uint32_t row, row_words; // the first row
    uint32_t count;          // vectors
    Divisor31 vectors, group;

    FST_INLINE uint64_t blocks() const { return (count + threads * each - 1) / (threads * each); }

    FST_INLINE bool padded() const { return 32 % Bits != 0 && (m.flags & FST_K_PADDED); }

    struct Part {
        uint32_t low, high; // words, as far as codes lie in them
        unsigned shift;
        typename M::Stored by;
    };
    FST_INLINE Part load(uint32_t v) const {
        const uint32_t r = vectors.divide(v), col = (v - r * vectors.value) * n;
        const At<uint32_t> at = place_of<Bits>(col, padded());
        const uint32_t *from = global<const uint32_t>(m.src) + (r * row_words + at.word);
        Part p = {0, 0, at.shift, {}};
        if constexpr (n * Bits > 32) {
            const Vector<8> in = load_aligned<8>(reinterpret_cast<const uint8_t *>(from));
            p.low = in.word[0], p.high = in.word[1];
        } else {
            p.low = from[0];
            if (32 % Bits != 0 && at.shift + n * Bits > (padded() ? 32 - 32 % Bits : 32)) p.high = from[1];
        }
        p.by = m.load_scale(row + r, group.divide(col));
        return p;
    }

    FST_INLINE void store(const Part &p, uint8_t *to) const {
        uint32_t low = p.low, high = p.high, codes[n];
        if constexpr (32 % Bits != 0) // without what fills words
            if (padded()) low = low << 32 % Bits >> 32 % Bits | high << (32 - 32 % Bits), high >>= 32 % Bits;
        if (n * Bits < 32) low = static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> p.shift);
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++) codes[i] = (i * Bits < 32 ? low : high) >> (i * Bits % 32) & M::mask;
        Vector<16> out = {};
        m.results(codes, m.scale_in(p.by), &out);
        store_aligned(to, out);
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint32_t v = static_cast<uint32_t>(block) * (threads * each) + thread;
        Part parts[each];
        FST_UNROLLED
        for (unsigned k = 0; k < each; k++) {
            const uint32_t at = v + k * threads;
            parts[k] = load(at < count ? at : count - 1);
        }
        uint8_t *to = global<uint8_t>(m.dst);
        FST_UNROLLED
        for (unsigned k = 0; k < each; k++)
            if (v + k * threads < count) store(parts[k], to + static_cast<uint64_t>(v + k * threads) * 16);
    }
};
#endif

// Two rows in a byte, the low half the first.
template <int Dst> struct PackedPairs {
    static constexpr unsigned threads = by_element ? 1 : 256;
    Matrix<4, Dst> m;
    uint64_t first_row, last_row; // of bytes
    Divisor vectors;

    FST_INLINE uint64_t blocks() const {
        const uint64_t all = last_row - first_row + 1;
        return by_element ? all : (all * vectors.value + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        uint64_t row = first_row + block, col = 0, stop = m.cols;
        if (!by_element) {
            const uint64_t i = block * threads + thread;
            row = first_row + vectors.divide(i);
            if (row > last_row) return;
            col = (i - (row - first_row) * vectors.value) * 8;
            if (stop > col + 8) stop = col + 8;
        }
        const uint64_t before = row * m.cols;
        if (before + col < m.first) col = m.first - before;
        if (before + stop > m.end) stop = m.end - before;
        if (col >= stop) return;
        const uint8_t *begin = global<const uint8_t>(m.src), *from = begin + (before + col - m.first);
        const uint64_t from_col = col;
#ifndef FST_BY_ELEMENT
        Vector<8> in;
        if (stop - col == 8 && col % 8 == 0 && m.aligned &&
            load_vector(from, begin, begin + (m.end - m.first), &in)) {
            FST_UNROLLED
            for (unsigned half = 0; half < 2; half++) {
                uint32_t codes[8];
                FST_UNROLLED
                for (unsigned i = 0; i < 8; i++) codes[i] = in.word[i / 4] >> (i % 4 * 8 + half * 4) & 15;
                m.vector(2 * row + half, col, codes);
            }
            return;
        }
#endif
        m.elements(2 * row, col, stop, [&](uint64_t k) -> uint32_t { return from[k - from_col] & 15; });
        m.elements(2 * row + 1, col, stop, [&](uint64_t k) -> uint32_t { return from[k - from_col] >> 4; });
    }
};

// ---- Transposed ----

// Codes are [cols, rows], packed along the columns of the result (GPTQ) or along its rows (AWQ, Quark). A block takes
// a tile of their words into shared memory, as they lie; then a thread makes eight columns of a row, so that neighbours
// store one after the other. What is packed stays so in shared memory: a quarter of the result, or less.
template <unsigned Bits, int Dst, bool Along> struct PackedTile {
    static constexpr unsigned threads = by_element ? 1 : 256;
#ifdef __CUDACC__
    static constexpr int resident = !Along || Bits == 3 ? 4 : Bits == 8 ? 5 : 6; // blocks: 64, 48, 40 registers
#else
    static constexpr int resident = 4; // waves
#endif
#ifdef FST_PACKED_WHOLE
    // 512 bytes of a row, as much of AWQ's as fills registers of 256 threads.
    static constexpr unsigned tile_cols = Along ? 512 / Matrix<Bits, Dst>::dst_size : 128;
#else
    static constexpr unsigned tile_cols = Along ? (Bits == 3 ? 128 : 16 * 32 / Bits) : 128;
#endif
    static constexpr unsigned tile_rows = Along ? 64 : 128;
    static constexpr unsigned high = Along ? tile_cols * Bits / 32 : tile_cols; // rows of words
    static constexpr unsigned wide = Along ? tile_rows : tile_rows / 8;
    static constexpr unsigned step = wide + 4; // so that threads of a warp touch all banks

#ifdef FST_PACKED_WHOLE
    static constexpr unsigned n = 16 / Matrix<Bits, Dst>::dst_size; // columns of a vector
    static constexpr unsigned most_scales = tile_rows * (tile_cols / 32);
#else
    static constexpr unsigned n = 8;
#endif

    struct Shared {
        alignas(16) uint32_t word[by_element ? 1 : high * step];
#ifdef FST_PACKED_WHOLE
        typename Matrix<Bits, Dst>::Scale by[most_scales];
#endif
    };

    Matrix<Bits, Dst> m;
    uint64_t width;      // words of a row of them
    uint64_t first_tile; // the tiles' row that the range begins in
    uint64_t tiles_down;
    Divisor tiles_across;
#ifdef FST_PACKED_WHOLE
    bool staged;          // scales of tiles that are whole go through shared memory
    unsigned groups_here; // of a tile: a power of two
    unsigned group_shift; // of a vector's number in its tile, to its group's
#endif

    FST_INLINE uint64_t blocks() const { return tiles_down * tiles_across.value; }

    struct Tile {
        uint64_t word_row, word_col, row, col; // of its corner
    };
    FST_INLINE Tile tile(uint64_t block) const {
        const uint64_t down = tiles_across.divide(block), across = block - down * tiles_across.value;
        return {(first_tile + down) * high, across * wide, across * tile_rows,
                (first_tile + down) * tile_cols};
    }

    // The word that a code begins in.
    FST_INLINE uint64_t word_of_code(uint64_t row, uint64_t col) const {
        return Along ? col * Bits / 32 * width + row : col * width + row / 8;
    }
    FST_INLINE bool is_there(uint64_t row, uint64_t col) const {
        return word_of_code(row, col) - m.first < m.end - m.first;
    }
    FST_INLINE uint32_t code(uint64_t row, uint64_t col) const {
        const uint64_t i = word_of_code(row, col);
        if constexpr (Along) {
            const unsigned shift = static_cast<unsigned>(col * Bits % 32);
            uint64_t word = word_at(m, i);
            if (32 % Bits) word |= static_cast<uint64_t>(word_at(m, shift + Bits > 32 ? i + width : i)) << 32;
            return static_cast<uint32_t>(word >> shift) & m.mask;
        } else {
            return word_at(m, i) >> shift_of(static_cast<unsigned>(row % 8)) & m.mask;
        }
    }
    FST_INLINE unsigned shift_of(unsigned i) const {
        return m.flags & FST_K_AWQ_ORDER ? awq_shift(i) : 4 * i;
    }

#ifdef FST_BY_ELEMENT
    // What of the columns is there.
    FST_INLINE void part(uint64_t row, uint64_t col, uint64_t stop) const {
        while (col < stop && !is_there(row, col)) col++;
        while (stop > col && !is_there(row, stop - 1)) stop--;
        m.elements(row, col, stop, [&](uint64_t k) { return code(row, k); });
    }

    FST_INLINE void operator()(uint64_t block, unsigned) const {
        const Tile t = tile(block);
        const uint64_t row_end = t.row + tile_rows < m.rows ? t.row + tile_rows : m.rows;
        const uint64_t stop = t.col + tile_cols < m.cols ? t.col + tile_cols : m.cols;
        for (uint64_t row = t.row; row < row_end; row++) part(row, t.col, stop);
    }
#else
    // Rows of words that one thread needs, of AWQ's, lie 16 rows apart (F32: 32).
    static FST_INLINE unsigned place(unsigned r) { return (Along ? r : r % n * (high / n) + r / n) * step; }

    FST_INLINE void before(uint64_t block, unsigned thread, Shared &shared) const {
        const Tile t = tile(block);
#ifdef FST_PACKED_WHOLE
        if (is_whole(t)) return stage(t, thread, shared);
#endif
        const uint8_t *begin = global<const uint8_t>(m.src), *end = begin + (m.end - m.first) * 4;
        FST_UNROLLED
        for (unsigned v = thread; v < high * wide / 4; v += threads) {
            const unsigned r = v / (wide / 4), c = v % (wide / 4) * 4;
            const uint64_t col = t.word_col + c, i = (t.word_row + r) * width + col;
            Vector<16> in = {};
            if (col >= width || i + 4 <= m.first || i >= m.end) continue;
            if (col + 4 > width || i < m.first || i + 4 > m.end ||
                !load_vector(begin + (i - m.first) * 4, begin, end, &in)) {
                FST_UNROLLED
                for (unsigned k = 0; k < 4; k++)
                    if (col + k < width && i + k >= m.first && i + k < m.end) in.word[k] = word_at(m, i + k);
            }
            *reinterpret_cast<uint4 *>(&shared.word[place(r) + c]) =
                make_uint4(in.word[0], in.word[1], in.word[2], in.word[3]);
        }
    }

    FST_INLINE void after(uint64_t block, unsigned thread, const Shared &shared) const {
        const Tile t = tile(block);
#ifdef FST_PACKED_WHOLE
        if (is_whole(t)) return finish(t, thread, shared);
#endif
        constexpr unsigned tasks = wide * tile_cols / 8;
        FST_ROLLED
        for (unsigned i = thread; i < tasks; i += threads) {
            const unsigned across = i % 8 + i / (8 * wide) * 8, down = i / 8 % wide;
            const uint64_t col = t.col + across * 8;
            if (col >= m.cols) continue;
            if constexpr (Along) along(shared, t.row + down, col, across, down);
            else transposed(shared, t.row + down * 8, col, across, down);
        }
    }

  private:
#ifdef FST_PACKED_WHOLE
    // All of a tile is there, and in the matrix.
    FST_INLINE bool is_whole(const Tile &t) const {
        return staged && t.row + tile_rows <= m.rows && t.col + tile_cols <= m.cols &&
               t.word_row * width + t.word_col >= m.first &&
               (t.word_row + high - 1) * width + t.word_col + wide <= m.end;
    }
    static FST_INLINE unsigned scale_place(unsigned r) { return Along ? r : r % 8 * (tile_rows / 8) + r / 8; }

    // Codes, scales and zero points are all under way before the first is put into shared memory.
    FST_INLINE void stage(const Tile &t, unsigned thread, Shared &shared) const {
        constexpr unsigned vectors = high * wide / 4, loads = (vectors + threads - 1) / threads;
        constexpr unsigned each = (most_scales + threads - 1) / threads;
        const uint8_t *begin = global<const uint8_t>(m.src), *end = begin + (m.end - m.first) * 4;
        const uint8_t *corner = begin + (t.word_row * width + t.word_col - m.first) * 4;
        const uint32_t j = static_cast<uint32_t>(m.group.divide(t.col)), row = static_cast<uint32_t>(t.row);
        Vector<16> in[loads] = {};
        typename Matrix<Bits, Dst>::Stored by[each];
        FST_UNROLLED
        for (unsigned k = 0; k < loads; k++) {
            const unsigned v = thread + k * threads, r = v / (wide / 4), c = v % (wide / 4) * 4;
            if (vectors % threads != 0 && v >= vectors) continue;
            const uint8_t *from = corner + (static_cast<uint64_t>(r * static_cast<uint32_t>(width)) + c) * 4;
            if (load_vector(from, begin, end, &in[k])) continue;
            FST_UNROLLED
            for (unsigned i = 0; i < 4; i++) in[k].word[i] = load_element<4>(from + i * 4);
        }
        FST_UNROLLED
        for (unsigned k = 0; k < each; k++) {
            const unsigned v = thread + k * threads;
            if (v < tile_rows * groups_here) by[k] = m.load_scale(row + v % tile_rows, j + v / tile_rows);
        }
        FST_UNROLLED
        for (unsigned k = 0; k < loads; k++) {
            const unsigned v = thread + k * threads, r = v / (wide / 4), c = v % (wide / 4) * 4;
            if (vectors % threads != 0 && v >= vectors) continue;
            *reinterpret_cast<uint4 *>(&shared.word[place(r) + c]) =
                make_uint4(in[k].word[0], in[k].word[1], in[k].word[2], in[k].word[3]);
        }
        FST_UNROLLED
        for (unsigned k = 0; k < each; k++) {
            const unsigned v = thread + k * threads;
            if (v < tile_rows * groups_here)
                shared.by[v / tile_rows * tile_rows + scale_place(v % tile_rows)] = m.scale_in(by[k]);
        }
    }

    // Eight neighbours have 128 bytes of a row, or of eight rows. What depends on the thread is said once: from vector to
    // vector addresses change by what is known when this is compiled, or for a launch.
    FST_INLINE void finish(const Tile &t, unsigned thread, const Shared &shared) const {
        constexpr unsigned rows_at_once = threads / 8, down_steps = wide > rows_at_once ? wide / rows_at_once : 1;
        constexpr unsigned all = wide * (tile_cols / n) / threads;
        constexpr unsigned next = wide > rows_at_once ? 8 : rows_at_once / wide * 8; // vectors across
        const unsigned down = thread / 8 % wide, across = thread % 8 + thread / (8 * wide) * 8;
        const uint64_t pitch = m.cols * m.dst_size;
        uint8_t *to = global<uint8_t>(m.dst) + (t.row + down * (Along ? 1 : 8)) * pitch +
                      t.col * m.dst_size + across * 16;
        FST_UNROLLED
        for (unsigned k = 0; k < all; k++) {
            const unsigned right = k / down_steps * next, below = k % down_steps * rows_at_once;
            const unsigned by = ((across + right) >> group_shift) * tile_rows + down + below;
            if constexpr (Along) {
                const unsigned bit = across * n * Bits;
                const unsigned from = (bit / 32 + right * n * Bits / 32) * step + down + below;
                finish_along(shared, from, bit % 32, by, to + right * 16 + below * pitch);
            } else {
                const unsigned from = place(across * n) + right * step + down;
                finish_transposed(shared, from, by, to + right * 16, pitch);
            }
        }
    }

    FST_INLINE void put_vector(const uint32_t (&codes)[n], typename Matrix<Bits, Dst>::Scale by,
                               uint8_t *to) const {
        Vector<16> out = {};
        m.results(codes, by, &out);
        store_aligned(to, out);
    }

    FST_INLINE void finish_along(const Shared &shared, unsigned from, unsigned skip, unsigned by,
                                 uint8_t *to) const {
        uint32_t low = shared.word[from], second = 0, codes[n];
        if (n * Bits > 32 || (32 % Bits != 0 && skip + n * Bits > 32)) second = shared.word[from + step];
        if (n * Bits < 32) low = static_cast<uint32_t>((static_cast<uint64_t>(second) << 32 | low) >> skip);
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++) codes[i] = (i * Bits < 32 ? low : second) >> (i * Bits % 32) & m.mask;
        put_vector(codes, shared.by[by], to);
    }

    FST_INLINE void finish_transposed(const Shared &shared, unsigned from, unsigned by, uint8_t *to,
                                      uint64_t pitch) const {
        uint32_t words[n];
        FST_UNROLLED
        for (unsigned i = 0; i < n; i++) words[i] = shared.word[from + i * (high / n) * step];
        FST_UNROLLED
        for (unsigned r = 0; r < 8; r++) {
            uint32_t codes[n];
            FST_UNROLLED
            for (unsigned i = 0; i < n; i++) codes[i] = words[i] >> shift_of(r) & 15;
            // r x pitch: with a sum that grows, CUDA 13.0's compiler does not come to an end.
            put_vector(codes, shared.by[by + r * (tile_rows / 8)], to + r * pitch);
        }
    }
#endif

    // The same for at most eight columns: one loop, as AMD's scalar registers do not hold more.
    FST_INLINE void part(uint64_t row, uint64_t col, uint64_t stop) const {
        FST_ROLLED
        for (; col < stop; col++)
            if (is_there(row, col)) m.element(row, col, code(row, col));
    }

    FST_INLINE bool is_whole(uint64_t row, uint64_t col) const {
        return m.aligned && m.cols - col >= 8 && is_there(row, col) && is_there(row, col + 7);
    }

    FST_INLINE void along(const Shared &shared, uint64_t row, uint64_t col, unsigned across,
                          unsigned down) const {
        if (row >= m.rows) return;
        if (!is_whole(row, col)) return part(row, col, m.cols - col < 8 ? m.cols : col + 8);
        const unsigned byte = across * Bits, skip = byte % 4;
        const uint32_t *from = &shared.word[byte / 4 * step + down];
        uint32_t low = from[0], high_word = 0, codes[8];
        if (Bits == 8 || (Bits == 3 && skip > 1)) high_word = from[step];
        if (Bits == 2 || Bits == 3) low = funnel(low, high_word, skip);
        FST_UNROLLED
        for (unsigned i = 0; i < 8; i++)
            codes[i] = (Bits == 8 && i >= 4 ? high_word : low) >> (i * Bits % 32) & m.mask;
        m.vector(row, col, codes);
    }

    FST_INLINE void transposed(const Shared &shared, uint64_t row, uint64_t col, unsigned across,
                               unsigned down) const {
        if (row >= m.rows) return;
        if (!is_whole(row, col)) {
            FST_ROLLED
            for (uint64_t r = row; r < row + 8 && r < m.rows; r++)
                part(r, col, m.cols - col < 8 ? m.cols : col + 8);
            return;
        }
        uint32_t words[8];
        FST_UNROLLED
        for (unsigned i = 0; i < 8; i++) words[i] = shared.word[place(across * 8 + i) + down];
        FST_ROLLED // eight copies of what a vector is made by would be much code
            for (unsigned r = 0; r < 8; r++) {
            if (row + r >= m.rows) break;
            uint32_t codes[8];
            FST_UNROLLED
            for (unsigned i = 0; i < 8; i++) codes[i] = words[i] >> shift_of(r) & 15;
            m.vector(row + r, col, codes);
        }
    }
#endif
};

// ---- Launching ----

template <unsigned Bits, int Dst> Matrix<Bits, Dst> matrix(const fst_packed_args *a) {
    const uint64_t groups = a->groups_count;
    const bool transposed = a->layout == FST_PACKED_COLUMN || a->layout == FST_PACKED_TRANSPOSED;
    const uint64_t dst = reinterpret_cast<uint64_t>(a->dst);
    Matrix<Bits, Dst> m = {};
    m.src = reinterpret_cast<uint64_t>(a->src), m.dst = dst;
    m.scales = reinterpret_cast<uint64_t>(a->scales), m.zeros = reinterpret_cast<uint64_t>(a->zeros);
    m.groups = reinterpret_cast<uint64_t>(a->groups);
    m.rows = a->rows, m.cols = a->cols;
    m.first = a->first, m.end = a->first + a->count;
    m.scale_row = transposed ? 1 : groups, m.scale_col = transposed ? a->rows : 1;
    m.group = divisor(a->group);
    m.fixed = fixed_zero(a);
    m.zero_carry = zero_carry(a);
    m.flip = base | sign_flip(a);
    m.scale_dtype = a->scale_dtype, m.zeros_kind = a->zeros_kind;
    m.flags = a->flags;
    const bool padded = a->flags & FST_K_PADDED;
    m.zero_word = a->zeros_kind == FST_ZEROS_COLUMNS ? groups : 1;
    m.zero_step = a->zeros_kind == FST_ZEROS_ROWS     ? words_of(a->rows, Bits, padded)
                  : a->zeros_kind == FST_ZEROS_GROUPS ? words_of(groups, Bits, padded)
                  : a->zeros_kind == FST_ZEROS_BYTES  ? groups
                                                      : 1;
    m.aligned = (dst | a->cols * m.dst_size) % 16 == 0;
    m.whole = !a->groups && a->group % 8 == 0;
    return m;
}

template <unsigned Bits, int Dst> int run_rows_by_word(fst_queue stream, const fst_packed_args *a) {
    const uint64_t row_words = words_of(a->cols, Bits, a->flags & FST_K_PADDED);
    PackedRows<Bits, Dst> body = {matrix<Bits, Dst>(a), row_words, a->first / row_words,
                                  (a->first + a->count - 1) / row_words, divisor(ceil_of(a->cols, 8))};
    return launch(stream, body, body.blocks());
}

#ifdef FST_PACKED_WHOLE
// Words [first, end) of the same.
fst_packed_args part_of(const fst_packed_args *a, uint64_t first, uint64_t end) {
    fst_packed_args part = *a;
    part.src = static_cast<const uint8_t *>(a->src) + (first - a->first) * 4;
    part.first = first, part.count = end - first;
    return part;
}

// Whole rows, where they and their groups are made of vectors; what is left of rows at both ends goes by words.
template <unsigned Bits, int Dst> int run_whole_rows(fst_queue stream, const fst_packed_args *a) {
    using Body = PackedVectors<Bits, Dst>;
    constexpr uint64_t most = 1u << 30; // elements, scales
    const uint64_t row_words = words_of(a->cols, Bits, a->flags & FST_K_PADDED), end = a->first + a->count;
    const uint64_t from = ceil_of(a->first, row_words), to = end / row_words;
    const uint64_t begin = from * row_words, stop = to * row_words;
    const Matrix<Bits, Dst> m = matrix<Bits, Dst>(a);
    const fst_packed_args whole = part_of(a, begin, stop);
    const uint64_t unit = Body::n * Bits > 32 ? 8 : 4; // bytes of a load
    if (from >= to || !m.aligned || a->groups || a->group % Body::n != 0 || a->rows > most / a->cols ||
        a->groups_count > most / a->rows || (reinterpret_cast<uint64_t>(whole.src) | row_words * 4) % unit != 0)
        return run_rows_by_word<Bits, Dst>(stream, a);
    const fst_packed_args head = part_of(a, a->first, begin), tail = part_of(a, stop, end);
    int code = head.count ? run_rows_by_word<Bits, Dst>(stream, &head) : FST_K_OK;
    if (!code && tail.count) code = run_rows_by_word<Bits, Dst>(stream, &tail);
    if (code) return code;
    const uint64_t vectors = a->cols / Body::n;
    Body body = {m, static_cast<uint32_t>(from), static_cast<uint32_t>(row_words),
                 static_cast<uint32_t>((to - from) * vectors), divisor31(vectors),
                 divisor31(a->group < a->cols ? a->group : a->cols)};
    body.m.src = reinterpret_cast<uint64_t>(whole.src), body.m.dst += from * a->cols * m.dst_size;
    return launch(stream, body, body.blocks());
}
#endif

template <unsigned Bits, int Dst> int run_rows(fst_queue stream, const fst_packed_args *a) {
#ifdef FST_PACKED_WHOLE
    if constexpr (has_vectors<Bits, Dst>) return run_whole_rows<Bits, Dst>(stream, a);
#endif
    return run_rows_by_word<Bits, Dst>(stream, a);
}

template <int Dst> int run_pairs(fst_queue stream, const fst_packed_args *a) {
    PackedPairs<Dst> body = {matrix<4, Dst>(a), a->first / a->cols, (a->first + a->count - 1) / a->cols,
                             divisor(ceil_of(a->cols, 8))};
    return launch(stream, body, body.blocks());
}

template <unsigned Bits, int Dst, bool Along> int run_tiles(fst_queue stream, const fst_packed_args *a) {
    using Body = PackedTile<Bits, Dst, Along>;
    const uint64_t width = Along ? a->rows : ceil_of(a->rows, 8);
    const uint64_t first = a->first / width / Body::high,
                   last = (a->first + a->count - 1) / width / Body::high;
    Body body = {};
    body.m = matrix<Bits, Dst>(a), body.width = width;
    body.first_tile = first, body.tiles_down = last - first + 1;
    body.tiles_across = divisor(ceil_of(width, Body::wide));
#ifdef FST_PACKED_WHOLE
    constexpr uint64_t most = 1u << 30; // elements, scales
    const bool many = a->group >= 32 && a->group < Body::tile_cols && Body::tile_cols % a->group == 0;
    const bool one = a->group % Body::tile_cols == 0 || a->group >= a->cols;
    body.staged = body.m.aligned && !a->groups && (many || one) &&
                  a->rows <= most / a->cols && a->groups_count <= most / a->rows;
    body.groups_here = many ? static_cast<unsigned>(Body::tile_cols / a->group) : 1;
    body.group_shift = many ? divisor(a->group / Body::n).shift : 31;
#endif
#ifdef FST_BY_ELEMENT
    return launch(stream, body, body.blocks());
#else
    return launch_phases(stream, body, body.blocks());
#endif
}

typedef int packed_fn(fst_queue, const fst_packed_args *);

template <int Dst> packed_fn *find_layout(int layout, unsigned bits) {
    static packed_fn *const rows[] = {run_rows<1, Dst>, run_rows<2, Dst>, run_rows<3, Dst>, run_rows<4, Dst>,
                                      run_rows<5, Dst>, run_rows<6, Dst>, run_rows<7, Dst>, run_rows<8, Dst>};
    switch (layout) {
    case FST_PACKED_ROW: return bits - 1 < 8 ? rows[bits - 1] : nullptr;
    case FST_PACKED_PAIRS: return bits == 4 ? run_pairs<Dst> : nullptr;
    case FST_PACKED_TRANSPOSED: return bits == 4 ? run_tiles<4, Dst, false> : nullptr;
    case FST_PACKED_COLUMN:
        return bits == 2   ? run_tiles<2, Dst, true>
               : bits == 3 ? run_tiles<3, Dst, true>
               : bits == 4 ? run_tiles<4, Dst, true>
               : bits == 8 ? run_tiles<8, Dst, true>
                           : nullptr;
    default: return nullptr;
    }
}

packed_fn *find(const fst_packed_args *a) {
    switch (a->dst_dtype) {
    case FST_T_F32: return find_layout<FST_T_F32>(a->layout, a->bits);
    case FST_T_F16: return find_layout<FST_T_F16>(a->layout, a->bits);
    case FST_T_BF16: return find_layout<FST_T_BF16>(a->layout, a->bits);
    default: return nullptr;
    }
}

// Whether a range may begin or end at a word.
bool is_cut(const fst_packed_args *a, uint64_t at, uint64_t width, uint64_t unit) {
    return (a->layout == FST_PACKED_ROW ? at % width : at) % unit == 0;
}

} // namespace

extern "C" int FST_SYMBOL(fst_packed)(fst_queue stream, const fst_packed_args *args) {
    packed_fn *const launcher = find(args);
    uint64_t elements, all = 0, end, width = 0, unit = 1;
    if (!launcher) return FST_K_NO_KERNEL;
    if (__builtin_mul_overflow(args->rows, args->cols, &elements) || elements > UINT64_MAX / 16)
        return FST_K_SIZE;
    if (args->count == 0) return FST_K_OK;
    if (!shape_of(args, &all, &width, &unit) || __builtin_add_overflow(args->first, args->count, &end) ||
        end > all)
        return FST_K_SIZE;
    if (!is_cut(args, args->first, width, unit) || !is_cut(args, end, width, unit)) return FST_K_SIZE;
    const int code = check_packed(args);
    if (code) return code;
    return launcher(stream, args);
}
