// OCP fp8 to FNUZ: the bits stay, but 80 (-0) becomes 00 (quant-formats.md 9.3 has the reasons).
#include "launch.h"
#include "range.h"

namespace {

// A code above `largest` (sign apart) would turn into another number: Inf and NaN.
FST_FN uint32_t fnuz_byte(uint32_t code, uint32_t largest, uint32_t *bad) {
    *bad += (code & 0x7F) > largest;
    return code == 0x80 ? 0 : code;
}

// The same for 4 codes: a carry into the top bit of a byte says which.
FST_FN uint32_t fnuz_word(uint32_t codes, uint32_t largest, uint32_t *bad) {
    const uint32_t a = codes & 0x7F7F7F7F;
    *bad |= (a + (0x7F - largest) * 0x01010101) & 0x80808080;
    return codes ^ (~(a + 0x7F7F7F7F) & codes & 0x80808080);
}

FST_FN void add(uint64_t counter, uint32_t n) {
    if (!n) return;
    uint64_t *to = global<uint64_t>(counter);
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
    atomicAdd(reinterpret_cast<unsigned long long *>(to), static_cast<unsigned long long>(n));
#else
    __atomic_fetch_add(to, static_cast<uint64_t>(n), __ATOMIC_RELAXED);
#endif
}

struct Fnuz {
    static constexpr unsigned threads = by_element ? 1 : 256;
    static constexpr uint64_t width = by_element ? 1u << 20 : 16;

    uint64_t src, dst, count, nans;
    uint32_t largest;

    FST_INLINE unsigned skew() const { return by_element ? 0 : static_cast<unsigned>(dst % width); }
    FST_INLINE uint64_t blocks() const {
        return (count / width + (count % width + skew() + width - 1) / width + threads - 1) / threads;
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint64_t before = skew(), position = (block * threads + thread) * width;
        if (position >= count + before) return;
        const uint64_t begin = position > before ? position - before : 0, rest = position + width - before;
        const uint64_t end = rest < count ? rest : count;
#ifndef FST_BY_ELEMENT
        if (end - begin == width && vector(begin)) return;
#endif
        const uint8_t *__restrict from = global<const uint8_t>(src);
        uint8_t *__restrict to = global<uint8_t>(dst);
        uint32_t bad = 0;
        FST_ROLLED
        for (uint64_t i = begin; i < end; i++)
            to[i] = static_cast<uint8_t>(fnuz_byte(from[i], largest, &bad));
        add(nans, bad);
    }

  private:
#ifndef FST_BY_ELEMENT
    FST_INLINE bool vector(uint64_t begin) const {
        const uint8_t *from = global<const uint8_t>(src);
        Vector<16> v;
        if (!load_vector(from + begin, from, from + count, &v)) return false;
        uint32_t found = 0;
        FST_UNROLLED
        for (unsigned i = 0; i < 4; i++) {
            uint32_t bad = 0;
            v.word[i] = fnuz_word(v.word[i], largest, &bad);
            found |= bad >> i; // each word's in bits of its own
        }
        store_aligned(global<uint8_t>(dst) + begin, v);
        uint32_t n = 0;
        for (; found; found &= found - 1) n++;
        add(nans, n);
        return true;
    }
#endif
};

} // namespace

extern "C" int FST_SYMBOL(fst_fnuz)(fst_queue stream, const fst_fnuz_args *args) {
    if (args->src_dtype != FST_T_F8_E4M3 && args->src_dtype != FST_T_F8_E5M2) return FST_K_NO_KERNEL;
    const Fnuz body = {reinterpret_cast<uint64_t>(args->src), reinterpret_cast<uint64_t>(args->dst),
                       args->count, reinterpret_cast<uint64_t>(args->nans),
                       args->src_dtype == FST_T_F8_E4M3 ? 0x7Eu : 0x7Bu};
    uint64_t end;
    if (__builtin_add_overflow(body.src, body.count, &end) ||
        __builtin_add_overflow(body.dst, body.count, &end))
        return FST_K_SIZE;
    if (body.count == 0) return FST_K_OK;
    if (!body.src || !body.dst || !body.nans) return FST_K_NULL;
    if (body.nans % 8) return FST_K_ALIGN;
    return launch(stream, body, body.blocks());
}
