// Rows from anywhere to anywhere: slices, packing, every second row apart; with or without a cast.
#include "divide.h"
#include "launch.h"
#include "range.h"

namespace {

// The outer dimensions, the fastest first, after those that run on in both source and destination became one.
// Strides in bytes.
struct Box {
    uint32_t ndim;
    Divisor extent[FST_ROWS_DIMS];
    Divisor31 extent31[FST_ROWS_DIMS];
    uint64_t src_stride[FST_ROWS_DIMS], dst_stride[FST_ROWS_DIMS];
    uint64_t rows;
};

template <int Src, int Dst> struct Rows {
    using Row = Range<Src, Dst>;
    static constexpr unsigned threads = by_element ? 1 : 256;

    uint64_t src, dst, cols, limit;
    uint64_t readable_end; // of the whole source
    Box box;
    Divisor slots; // of a row; elements when rows are too short for vectors
    Divisor31 slots31;
    uint32_t single;
    uint32_t small; // all slots are counted in 31 bits

    FST_INLINE uint64_t blocks() const {
        return by_element ? 1 : box.rows * slots.value / threads + (box.rows * slots.value % threads != 0);
    }

    FST_INLINE void operator()(uint64_t block, unsigned thread) const {
        if (by_element) {
            for (uint64_t i = 0; i < box.rows; i++) row(i).elements(0, cols);
            return;
        }
        if (small) {
            const uint32_t index = static_cast<uint32_t>(block) * threads + thread,
                           i = slots31.divide(index);
            if (i < static_cast<uint32_t>(box.rows)) slot_of(row31(i), index - i * slots31.value);
        } else {
            const uint64_t index = block * threads + thread, i = slots.divide(index);
            if (i < box.rows) slot_of(row(i), index - i * slots.value);
        }
    }

  private:
    FST_INLINE void slot_of(const Row &range, uint64_t slot) const {
        if (single) range.elements(slot, slot + 1);
        else if (slot < range.slots()) range.slot_of_many(slot);
    }
    FST_INLINE Row row_at(uint64_t from, uint64_t to) const {
        return {
            global<const uint8_t>(from),        global<uint8_t>(to), cols, limit, global<const uint8_t>(src),
            global<const uint8_t>(readable_end)};
    }
    FST_INLINE Row row(uint64_t i) const {
        uint64_t from = src, to = dst;
        FST_ROLLED
        for (unsigned d = 0; d < box.ndim; d++) {
            const uint64_t rest = d + 1 < box.ndim ? box.extent[d].divide(i) : 0;
            const uint64_t at = i - rest * box.extent[d].value;
            from += at * box.src_stride[d], to += at * box.dst_stride[d];
            i = rest;
        }
        return row_at(from, to);
    }
    FST_INLINE Row row31(uint32_t i) const {
        uint64_t from = src, to = dst;
        const uint32_t last = box.ndim - 1; // without dimensions, any: there is one row
        FST_ROLLED
        for (unsigned d = 0; d < last && i; d++) {
            const uint32_t rest = box.extent31[d].divide(i), at = i - rest * box.extent31[d].value;
            from += at * box.src_stride[d], to += at * box.dst_stride[d];
            i = rest;
        }
        if (i) from += i * box.src_stride[last], to += i * box.dst_stride[last];
        return row_at(from, to);
    }
};

// What a launch needs, in bytes (a cast's elements) and checked.
struct Plan {
    uint64_t src, dst, cols, src_bytes; // of the whole source, gaps included
    Box box;
};

typedef int rows_fn(fst_queue, const Plan &, unsigned flags);

template <int Src, int Dst> int rows(fst_queue stream, const Plan &plan, unsigned flags) {
    using Row = Range<Src, Dst>;
    Rows<Src, Dst> body = {
        plan.src, plan.dst, plan.cols, limit_of<Src, Dst>(flags), plan.src + plan.src_bytes, plan.box, {}, {}, 0, 0};
    uint64_t bits = plan.dst; // its low ones are 0 where all rows start at a whole vector
    for (unsigned d = 0; d < plan.box.ndim; d++) bits |= plan.box.dst_stride[d];
    const bool aligned = bits % (Row::width * Row::dst_size) == 0;
    const uint64_t most_skew = aligned ? 0 : Row::width - 1;
    body.single = plan.cols < Row::width;
    const uint64_t slots =
        body.single
            ? plan.cols
            : plan.cols / Row::width + (plan.cols % Row::width + most_skew + Row::width - 1) / Row::width;
    body.slots = divisor(slots);
    uint64_t all;
    if (__builtin_mul_overflow(slots, plan.box.rows, &all)) return FST_K_SIZE;
    body.small = all <= 1u << 30;
    if (body.small) {
        body.slots31 = divisor31(slots);
        for (unsigned d = 0; d < plan.box.ndim; d++)
            body.box.extent31[d] = divisor31(body.box.extent[d].value);
    }
    return launch(stream, body, body.blocks());
}

template <int Src, int Dst> rows_fn *launcher() {
    if constexpr (is_cast(Src, Dst)) return rows<Src, Dst>;
    else return nullptr;
}

template <int Src> rows_fn *find_to(int dst) {
    switch (dst) {
#define X(name, ...) \
    case FST_T_##name: return launcher<Src, FST_T_##name>();
        FST_FLOAT_LIST(X)
#undef X
    default: return nullptr;
    }
}

rows_fn *find(int src, int dst) {
    if (src == dst && fst_type_bits(src)) return rows<bytes_type, bytes_type>;
    switch (src) {
#define X(name, ...) \
    case FST_T_##name: return find_to<FST_T_##name>(dst);
        FST_FLOAT_LIST(X)
#undef X
    default: return nullptr;
    }
}

// Elements -> bytes; false when they do not fill whole ones, or overflow.
bool in_bytes(uint64_t count, unsigned bits, uint64_t *bytes) {
    return count % 8 * bits % 8 == 0 &&
           !__builtin_mul_overflow(count / 8, static_cast<uint64_t>(bits), bytes) &&
           !__builtin_add_overflow(*bytes, count % 8 * bits / 8, bytes);
}

// The dimensions with more than one index, the fastest of the destination first. FST_K_STRIDE when a row, or what the
// faster dimensions of the destination cover, is longer than a step.
int gather(const fst_rows_args *args, unsigned src_bits, unsigned dst_bits, Plan *plan) {
    Box &box = plan->box;
    box.rows = 1;
    for (unsigned i = args->ndim; i-- > 0;) {
        const uint64_t extent = args->extent[i], src_step = args->src_stride[i],
                       dst_step = args->dst_stride[i];
        uint64_t src_bytes = 0, dst_bytes = 0;
        if (extent == 1) continue;
        if (src_step < args->cols || dst_step < args->cols) return FST_K_STRIDE;
        if (__builtin_mul_overflow(box.rows, extent, &box.rows) ||
            !in_bytes(src_step, src_bits, &src_bytes) || !in_bytes(dst_step, dst_bits, &dst_bytes))
            return FST_K_SIZE;
        unsigned d = box.ndim++;
        for (; d > 0 && box.dst_stride[d - 1] > dst_bytes; d--) {
            box.extent[d] = box.extent[d - 1];
            box.src_stride[d] = box.src_stride[d - 1], box.dst_stride[d] = box.dst_stride[d - 1];
        }
        box.extent[d] = divisor(extent);
        box.src_stride[d] = src_bytes, box.dst_stride[d] = dst_bytes;
    }
    return FST_K_OK;
}

// Bytes from the first to behind the last of the source; FST_K_SIZE when they go beyond the address space.
int span_source(uint64_t row_bytes, Plan *plan) {
    const Box &box = plan->box;
    uint64_t step, end;
    plan->src_bytes = row_bytes;
    for (unsigned d = 0; d < box.ndim; d++)
        if (__builtin_mul_overflow(box.extent[d].value - 1, box.src_stride[d], &step) ||
            __builtin_add_overflow(plan->src_bytes, step, &plan->src_bytes))
            return FST_K_SIZE;
    return __builtin_add_overflow(plan->src, plan->src_bytes, &end) ? FST_K_SIZE : FST_K_OK;
}

// The same for the destination; FST_K_STRIDE where its rows overlap.
int span_destination(uint64_t row_bytes, const Plan *plan) {
    const Box &box = plan->box;
    uint64_t step, end, bytes = row_bytes;
    for (unsigned d = 0; d < box.ndim; d++) {
        if (box.dst_stride[d] < bytes) return FST_K_STRIDE;
        if (__builtin_mul_overflow(box.extent[d].value - 1, box.dst_stride[d], &step) ||
            __builtin_add_overflow(bytes, step, &bytes))
            return FST_K_SIZE;
    }
    return __builtin_add_overflow(plan->dst, bytes, &end) ? FST_K_SIZE : FST_K_OK;
}

// Makes one of rows and dimensions that run on without a gap on both sides.
void collapse(unsigned src_size, unsigned dst_size, Plan *plan) {
    Box &box = plan->box;
    unsigned kept = 0;
    for (unsigned d = 0; d < box.ndim; d++) {
        const uint64_t extent = box.extent[d].value;
        if (kept == 0 && box.src_stride[d] == plan->cols * src_size &&
            box.dst_stride[d] == plan->cols * dst_size) {
            plan->cols *= extent;
            box.rows /= extent;
        } else if (kept && box.src_stride[d] == box.src_stride[kept - 1] * box.extent[kept - 1].value &&
                   box.dst_stride[d] == box.dst_stride[kept - 1] * box.extent[kept - 1].value) {
            box.extent[kept - 1] = divisor(box.extent[kept - 1].value * extent);
        } else {
            box.extent[kept] = box.extent[d];
            box.src_stride[kept] = box.src_stride[d], box.dst_stride[kept] = box.dst_stride[d];
            kept++;
        }
    }
    box.ndim = kept;
}

} // namespace

extern "C" int FST_SYMBOL(fst_rows)(fst_queue stream, const fst_rows_args *args) {
    rows_fn *const run_rows = find(args->src_dtype, args->dst_dtype);
    if (!run_rows) return FST_K_NO_KERNEL;
    if (args->ndim > FST_ROWS_DIMS) return FST_K_SIZE;
    bool empty = args->cols == 0;
    for (unsigned d = 0; d < args->ndim; d++) empty |= args->extent[d] == 0;
    if (empty) return FST_K_OK;

    const unsigned src_bits = fst_type_bits(args->src_dtype), dst_bits = fst_type_bits(args->dst_dtype);
    const bool copy = args->src_dtype == args->dst_dtype;
    Plan plan = {};
    plan.src = reinterpret_cast<uint64_t>(args->src), plan.dst = reinterpret_cast<uint64_t>(args->dst);
    uint64_t src_row = 0, dst_row = 0;
    if (!in_bytes(args->cols, src_bits, &src_row) || !in_bytes(args->cols, dst_bits, &dst_row))
        return FST_K_SIZE;
    int status = gather(args, src_bits, dst_bits, &plan);
    if (status == FST_K_OK) status = span_source(src_row, &plan);
    if (status == FST_K_OK) status = span_destination(dst_row, &plan);
    if (status != FST_K_OK) return status;
    if (!args->src || !args->dst) return FST_K_NULL;
    if (dst_bits > 8 && plan.dst % (dst_bits / 8)) return FST_K_ALIGN;
    plan.cols = copy ? src_row : args->cols;
    collapse(copy ? 1 : src_bits / 8, copy ? 1 : dst_bits / 8, &plan);
    return run_rows(stream, plan, args->flags);
}
