// Casts between float types, and copies of any type from any alignment.
#include "launch.h"
#include "range.h"

namespace {

template <int Src, int Dst>
FST_FN Range<Src, Dst> range_of(uint64_t src, uint64_t dst, uint64_t count, uint64_t limit) {
    const uint8_t *from = global<const uint8_t>(src);
    return {from, global<uint8_t>(dst), count, limit, from, from + bytes_of<bits_of<Src>::value>(count)};
}

template <int Src, int Dst> struct Cast {
    static constexpr unsigned threads = by_element ? 1 : 256;

    uint64_t src, dst, count, limit;

    FST_INLINE Range<Src, Dst> range() const { return range_of<Src, Dst>(src, dst, count, limit); }
    FST_INLINE uint64_t blocks() const { return (range().slots() + threads - 1) / threads; }
    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const uint64_t index = block * threads + thread;
        if (index < range().slots()) range().slot(index);
    }
};

// A block is a tile of one job; by element a whole job. `unit` is the bits of a copied element (a cast's
// elements are its own unit, 8).
template <int Src, int Dst> struct Batch {
    using Part = Range<Src, Dst>;
    static constexpr unsigned tile_slots = FST_BATCH_TILE / Part::width;
    static constexpr unsigned threads = by_element ? 1 : tile_slots < 256 ? tile_slots : 256;

    uint64_t jobs;
    uint32_t jobs_count, unit;
    uint64_t tiles, limit;

    FST_INLINE uint64_t blocks() const { return by_element ? jobs_count : tiles; }
    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        const fst_batch_job *list = global<const fst_batch_job>(jobs);
        const fst_batch_job job = list[by_element ? block : find(list, block)];
        const Part range = range_of<Src, Dst>(job.src, job.dst, job.count * unit / 8, limit);
        const uint64_t slots = range.slots();
        if (by_element) {
            for (uint64_t i = 0; i < slots; i++) range.slot(i);
            return;
        }
        // The last tile also takes the slot that a destination between two vectors adds.
        const uint64_t each = static_cast<uint64_t>(tile_slots) * unit / 8;
        const uint64_t tile = block - job.first_tile;
        const uint64_t begin = tile * each;
        const uint64_t end = (tile + 1) * FST_BATCH_TILE < job.count ? begin + each : slots;
        for (uint64_t i = begin + thread; i < end; i += threads) range.slot(i);
    }

  private:
    // The last job whose first tile is not beyond `tile`: empty jobs share theirs with the next one. Jobs are mostly of
    // one size: the search begins where it would be then, and widens.
    FST_INLINE uint32_t find(const fst_batch_job *list, uint64_t tile) const {
        const float share = static_cast<float>(tile) / static_cast<float>(tiles);
        const uint32_t guess = static_cast<uint32_t>(share * static_cast<float>(jobs_count));
        uint32_t low = guess < jobs_count ? guess : jobs_count - 1, high = low + 1, step = 1;
        while (low > 0 && list[low].first_tile > tile)
            high = low, low = low > step ? low - step : 0, step *= 2;
        while (high < jobs_count && list[high].first_tile <= tile)
            low = high, high = jobs_count - high > step ? high + step : jobs_count, step *= 2;
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            if (list[middle].first_tile <= tile) low = middle;
            else high = middle;
        }
        return low;
    }
};

typedef int cast_fn(fst_queue, const fst_cast_args *);
typedef int batch_fn(fst_queue, const fst_batch_args *);

struct Launchers {
    cast_fn *cast;
    batch_fn *batch;
};

template <int Src, int Dst> int cast(fst_queue stream, const fst_cast_args *args) {
    const unsigned unit = Src == Dst ? fst_type_bits(args->src_dtype) : 8;
    const Cast<Src, Dst> body = {reinterpret_cast<uint64_t>(args->src), reinterpret_cast<uint64_t>(args->dst),
                                 unit % 8 ? args->count / 8 * unit + args->count % 8 * unit / 8
                                          : args->count * (unit / 8),
                                 limit_of<Src, Dst>(args->flags)};
    return launch(stream, body, body.blocks());
}

template <int Src, int Dst> int batch(fst_queue stream, const fst_batch_args *args) {
    const unsigned unit = Src == Dst ? fst_type_bits(args->src_dtype) : 8;
    const Batch<Src, Dst> body = {reinterpret_cast<uint64_t>(args->jobs), args->jobs_count, unit, args->tiles,
                                  limit_of<Src, Dst>(args->flags)};
    return launch(stream, body, body.blocks());
}

template <int Src, int Dst> Launchers launchers() {
    if constexpr (!is_cast(Src, Dst)) return {nullptr, nullptr};
    else return {cast<Src, Dst>, batch<Src, Dst>};
}

template <int Src> Launchers find_to(int dst) {
    switch (dst) {
#define X(name, ...) \
    case FST_T_##name: return launchers<Src, FST_T_##name>();
        FST_FLOAT_LIST(X)
#undef X
    default: return {nullptr, nullptr};
    }
}

// The launchers of a pair; NULL where it does not exist.
Launchers find(int src, int dst) {
    if (src == dst && fst_type_bits(src))
        return {cast<bytes_type, bytes_type>, batch<bytes_type, bytes_type>};
    switch (src) {
#define X(name, ...) \
    case FST_T_##name: return find_to<FST_T_##name>(dst);
        FST_FLOAT_LIST(X)
        FST_NARROW_LIST(X)
#undef X
    default: return {nullptr, nullptr};
    }
}

// True when `count` elements of `type` fill whole bytes and end before the address space does.
bool fits(int type, uint64_t address, uint64_t count) {
    const unsigned bits = fst_type_bits(type);
    if (count % 8 * bits % 8) return false;
    uint64_t bytes, last;
    return !__builtin_mul_overflow(count / 8, static_cast<uint64_t>(bits), &bytes) &&
           !__builtin_add_overflow(bytes, count % 8 * bits / 8, &bytes) &&
           !__builtin_add_overflow(address, bytes, &last);
}

} // namespace

extern "C" int FST_SYMBOL(fst_cast)(fst_queue stream, const fst_cast_args *args) {
    const Launchers pair = find(args->src_dtype, args->dst_dtype);
    if (!pair.cast) return FST_K_NO_KERNEL;
    const uint64_t src = reinterpret_cast<uint64_t>(args->src), dst = reinterpret_cast<uint64_t>(args->dst);
    if (!fits(args->src_dtype, src, args->count) || !fits(args->dst_dtype, dst, args->count))
        return FST_K_SIZE;
    if (args->count == 0) return FST_K_OK;
    if (!src || !dst) return FST_K_NULL;
    const unsigned size = fst_type_bits(args->dst_dtype) / 8;
    if (size > 1 && dst % size) return FST_K_ALIGN;
    return pair.cast(stream, args);
}

extern "C" int FST_SYMBOL(fst_batch)(fst_queue stream, const fst_batch_args *args) {
    const Launchers pair = find(args->src_dtype, args->dst_dtype);
    if (!pair.batch) return FST_K_NO_KERNEL;
    if (args->tiles == 0 || args->jobs_count == 0) return FST_K_OK;
    if (!args->jobs) return FST_K_NULL;
    return pair.batch(stream, args);
}
