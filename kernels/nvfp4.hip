// F4 under scales of E4M3 for groups of a row, and those under one F32 for all: NVFP4. A file of its own: with this as one
// more way to scale, CUDA 13.0's compiler does not come to an end with scaled.hip.
#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "pack.h"
#include "product.h"

namespace {

template <int Dst> struct Nvfp4 {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned dst_size = Dst == FST_T_F32 ? 4 : 2;
    static constexpr uint64_t width = by_element ? 1u << 16 : 16 / dst_size;

    uint64_t src, dst, scales, global_scale, first, count;
    Divisor group; // elements; a row is whole groups
    uint32_t divides;

    FST_INLINE unsigned skew() const {
        return by_element ? 0 : static_cast<unsigned>(dst / dst_size % width);
    }
    FST_INLINE uint64_t blocks() const {
        return ((count + skew() + width - 1) / width + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint64_t position = (block * threads + thread) * width, before = skew();
        if (position >= count + before) return;
        const uint64_t begin = position > before ? position - before : 0;
        const uint64_t end = position + width - before < count ? position + width - before : count;
#ifndef FST_BY_ELEMENT
        if (end - begin == width && vector(begin)) return;
#endif
        elements(begin, end);
    }

  private:
    FST_INLINE uint32_t scale_of(uint64_t cell) const {
        const uint32_t scale = fst_decode32(global<const uint8_t>(scales)[cell], fst_float_of(FST_T_F8_E4M3));
        const uint32_t all = global<const uint32_t>(global_scale)[0];
        return divides ? divide(scale, all) : multiply(scale, all);
    }

    static FST_INLINE typename word_of<dst_size>::type result(uint32_t code, uint32_t scale) {
        const uint32_t x = fst_decode32(code, fst_float_of(FST_T_F4));
        return static_cast<typename word_of<dst_size>::type>(encode<Dst>(multiply(x, scale)));
    }

    FST_INLINE void elements(uint64_t begin, uint64_t end) const {
        const uint8_t *__restrict from = global<const uint8_t>(src);
        typename word_of<dst_size>::type *__restrict to = global<typename word_of<dst_size>::type>(dst);
        while (begin < end) {
            const uint64_t cell = group.divide(first + begin), stop = (cell + 1) * group.value - first;
            const uint64_t until = stop < end ? stop : end;
            const uint32_t scale = scale_of(cell);
            FST_ROLLED
            for (uint64_t i = begin; i < until; i++) to[i] = result(from[i / 2] >> (i % 2 * 4) & 15, scale);
            begin = until;
        }
    }

#ifndef FST_BY_ELEMENT
    // Under one scale or two. False where codes begin half a byte off, or a group is shorter than a vector.
    FST_INLINE bool vector(uint64_t begin) const {
        const uint8_t *from = global<const uint8_t>(src);
        Vector<width / 2> in;
        if (begin % 2 || group.value < width) return false;
        if (!load_vector(from + begin / 2, from, from + (count + 1) / 2, &in)) return false;
        const uint64_t cell = group.divide(first + begin), left = (cell + 1) * group.value - first - begin;
        const uint32_t scale = scale_of(cell), scale2 = left < width ? scale_of(cell + 1) : scale;
        Vector<16> out = {};
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            put<dst_size>(&out, i, result(in.word[0] >> (4 * i) & 15, i < left ? scale : scale2));
        store_aligned(global<uint8_t>(dst) + begin * dst_size, out);
        return true;
    }
#endif
};

template <int Dst> int run_nvfp4(fst_queue stream, const fst_scaled_args *args) {
    const Nvfp4<Dst> body = {reinterpret_cast<uint64_t>(args->src),
                             reinterpret_cast<uint64_t>(args->dst),
                             reinterpret_cast<uint64_t>(args->scales),
                             reinterpret_cast<uint64_t>(args->global_scale),
                             args->first,
                             args->count,
                             divisor(args->block_cols),
                             (args->flags & FST_K_DIVIDE) != 0};
    return launch(stream, body, body.blocks());
}

} // namespace

extern "C" int FST_SYMBOL(fst_nvfp4)(fst_queue stream, const fst_scaled_args *args);
extern "C" int FST_SYMBOL(fst_nvfp4)(fst_queue stream, const fst_scaled_args *args) {
    uint64_t elements, end;
    if (args->src_dtype != FST_T_F4 || args->kind != FST_SCALE_GROUP) return FST_K_NO_KERNEL;
    if (args->dst_dtype != FST_T_F32 && args->dst_dtype != FST_T_F16 && args->dst_dtype != FST_T_BF16)
        return FST_K_NO_KERNEL;
    if (__builtin_mul_overflow(args->rows, args->cols, &elements) || elements > UINT64_MAX / 16 ||
        __builtin_add_overflow(args->first, args->count, &end) || end > elements)
        return FST_K_SIZE;
    if (args->first % 2 || (args->count % 2 && end != elements)) return FST_K_SIZE;
    if (args->scale_dtype != FST_T_F8_E4M3 || args->block_cols == 0 || args->cols % args->block_cols ||
        args->scales_count != elements / args->block_cols)
        return FST_K_SCALE;
    if (args->count == 0) return FST_K_OK;
    if (!args->src || !args->dst || !args->scales) return FST_K_NULL;
    if (reinterpret_cast<uint64_t>(args->dst) % (args->dst_dtype == FST_T_F32 ? 4 : 2) ||
        reinterpret_cast<uint64_t>(args->global_scale) % 4)
        return FST_K_ALIGN;
    if (args->dst_dtype == FST_T_F32) return run_nvfp4<FST_T_F32>(stream, args);
    if (args->dst_dtype == FST_T_F16) return run_nvfp4<FST_T_F16>(stream, args);
    return run_nvfp4<FST_T_BF16>(stream, args);
}
