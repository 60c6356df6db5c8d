// F4 under scales of E4M3 for groups of a row, and those under one F32 for all: NVFP4. A file of its own: with this as one
// more way to scale, CUDA 13.0's compiler does not come to an end with scaled.hip.
#include "launch.h" // first: it brings the device's keywords
#include "divide.h"
#include "nvidia.h"
#include "product.h"

namespace {

template <int Dst> struct Nvfp4 {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr unsigned dst_size = Dst == FST_T_F32 ? 4 : 2;
    static constexpr uint32_t width = by_element ? 1u << 16 : 16 / dst_size;

    uint64_t src, dst, scales, global_scale, first; // the first element, from its group's own on
    uint32_t count;
    Divisor group; // elements; a row is whole groups
    Divisor31 group31;
    uint32_t divides;
    bool vectors;   // there are any: codes begin with a byte, groups are no shorter than they, and counted in 31 bits
    bool straddles; // some lie under two scales
    bool aligned;   // all vectors of codes

    FST_INLINE unsigned skew() const {
        return by_element ? 0 : static_cast<unsigned>(dst / dst_size % width);
    }
    FST_INLINE uint64_t blocks() const {
        return ((count + skew() + width - 1) / width + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint32_t position = (static_cast<uint32_t>(block) * threads + thread) * width, before = skew();
        if (position >= count + before) return;
        const uint32_t begin = position > before ? position - before : 0;
        const uint32_t end = position + width - before < count ? position + width - before : count;
#ifndef FST_BY_ELEMENT
        if (vectors && end - begin == width && vector(begin)) return;
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
    // Under one scale or two. False, with nothing done, where the codes cannot be loaded.
    FST_INLINE bool vector(uint32_t begin) const {
        const uint8_t *from = global<const uint8_t>(src);
        Vector<width / 2> in;
        if (aligned) in = load_aligned<width / 2>(from + begin / 2);
        else if (!load_vector(from + begin / 2, from, from + (count + 1) / 2, &in)) return false;
        const uint32_t at = static_cast<uint32_t>(first) + begin, cell = group31.divide(at);
        const uint32_t left = (cell + 1) * group31.value - at;
        Vector<16> out;
        if (!straddles) out = products(in.word[0], cell, cell, width);
        else out = products(in.word[0], cell, left < width ? cell + 1 : cell, left < width ? left : width);
        store_aligned(global<uint8_t>(dst) + static_cast<uint64_t>(begin) * dst_size, out);
        return true;
    }

    // The first `split` codes under one scale, the others under another.
    FST_INLINE Vector<16> products(uint32_t codes, uint32_t cell, uint32_t cell2, uint32_t split) const {
        Vector<16> out = {};
#if FST_PACKED
        const uint32_t by = number_of(cell), by2 = split == width ? by : number_of(cell2);
        if (static_cast<int>(is_plain<FST_T_F4>(by)) & static_cast<int>(is_plain<FST_T_F4>(by2))) {
            FST_UNROLLED
            for (unsigned i = 0; i < width; i += 4) {
                const uint32_t each[4] = {i < split ? by : by2, i + 1 < split ? by : by2,
                                          i + 2 < split ? by : by2, i + 3 < split ? by : by2};
                scale4<FST_T_F4, Dst>(codes >> (4 * i), each, &out.word[i * dst_size / 4]);
            }
            return out;
        }
#endif
        const uint32_t scale = scale_of(cell), scale2 = split == width ? scale : scale_of(cell2);
        FST_UNROLLED
        for (unsigned i = 0; i < width; i++)
            put<dst_size>(&out, i, result(codes >> (4 * i) & 15, i < split ? scale : scale2));
        return out;
    }
#if FST_PACKED
    // The scale of a group by NVIDIA's instructions, or some NaN.
    FST_INLINE uint32_t number_of(uint32_t cell) const {
        const float scale = fst_float_of_bits32(f32_of_e4m3(global<const uint8_t>(scales)[cell]));
        const float all = fst_float_of_bits32(global<const uint32_t>(global_scale)[0]);
        return fst_bits_of_float32(divides ? scale / all : scale * all);
    }
#endif
#endif
};

// In pieces whose elements are counted in 31 bits.
template <int Dst> int run_nvfp4(fst_queue stream, const fst_scaled_args *args) {
    using Body = Nvfp4<Dst>;
    const uint64_t group = args->block_cols;
    const bool small = group < limit31;
    int code = FST_K_OK;
    for (uint64_t done = 0; done < args->count && code == FST_K_OK; done += fst_launch31) {
        const uint64_t first = args->first + done;
        Body body = {reinterpret_cast<uint64_t>(args->src) + done / 2,
                     reinterpret_cast<uint64_t>(args->dst) + done * Body::dst_size,
                     reinterpret_cast<uint64_t>(args->scales) + first / group,
                     reinterpret_cast<uint64_t>(args->global_scale),
                     first % group,
                     static_cast<uint32_t>(args->count - done < fst_launch31 ? args->count - done : fst_launch31),
                     divisor(group),
                     divisor31(small ? group : 1),
                     (args->flags & FST_K_DIVIDE) != 0,
                     false,
                     false,
                     false};
        body.vectors = small && group >= body.width && body.skew() % 2 == 0;
        body.straddles = (group | (body.first - body.skew())) % body.width != 0;
        body.aligned = (body.src - body.skew() / 2) % (body.width / 2) == 0;
        code = launch(stream, body, body.blocks());
    }
    return code;
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
