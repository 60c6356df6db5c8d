/* The safetensors header. yyjson reads the JSON; what the format and its reference implementation
 * demand beyond that is checked here. Rules, verdicts and tests: docs/format.md.
 *
 * yyjson reads in place and leaves numbers as text, so a string's or number's pointer tells its byte in
 * the file, and `2.0` is not taken for 2. Containers and literals have no pointer: errors about them
 * point at their key. */
#include "header.h"

#include <stdlib.h>
#include <string.h>
#include <yyjson.h>

#include "dtype.h"
#include "utf8.h"

#define LEVELS_MAX 127 /* of nesting, the header's own braces being the first */

/* ---- Memory of the result: a list of blocks, freed together ---- */

typedef struct block {
    struct block *next;
    size_t used, size;
    uint64_t data[];
} block;

static void *allocate(fst_header *header, size_t size) {
    block *last = header->memory;
    size = (size + 7) & ~(size_t)7;
    if (!last || last->size - last->used < size) {
        size_t room = last ? last->size * 2 : 4096;
        if (room > 1u << 20) room = 1u << 20;
        if (room < size) room = size;
        block *fresh = malloc(sizeof *fresh + room);
        if (!fresh) return NULL;
        *fresh = (block){.next = last, .used = 0, .size = room};
        header->memory = last = fresh;
    }
    void *out = (char *)last->data + last->used;
    last->used += size;
    return out;
}

static const char *copy_text(fst_header *header, const char *text, size_t length) {
    char *out = allocate(header, length + 1);
    if (!out) return NULL;
    memcpy(out, text, length);
    out[length] = 0;
    return out;
}

void fst_header_free(fst_header *header) {
    if (!header) return;
    for (block *each = header->memory, *next; each; each = next) {
        next = each->next;
        free(each);
    }
    memset(header, 0, sizeof *header);
}

/* ---- State of one reading ---- */

typedef struct row { /* a tensor on its way to an entry; positions are in the JSON */
    fst_entry entry;
    uint64_t elements;
    uint32_t name_at, begin_at, end_at;
} row;

typedef struct reader {
    const char *json;
    fst_header *header;
    row *rows;
    fst_where where;
    fst_error *error;
    const char *name; /* of the tensor at hand */
    size_t name_length;
    char label[160]; /* the same for texts: escaped, cut */
} reader;

static const fst_where *where_at(reader *r, uint64_t position) {
    r->where.offset = (int64_t)(8 + position);
    return &r->where;
}

static uint64_t key_position(const reader *r, yyjson_val *key) {
    return (uint64_t)(yyjson_get_str(key) - 1 - r->json);
}

/* A string's quote, a number's first digit, otherwise the key that leads to the value. */
static uint64_t value_position(const reader *r, yyjson_val *key, yyjson_val *value) {
    if (yyjson_is_str(value)) return key_position(r, value);
    if (yyjson_is_raw(value)) return (uint64_t)(yyjson_get_raw(value) - r->json);
    return key_position(r, key);
}

static void turn_to(reader *r, const char *name, size_t length) {
    r->name = name;
    r->name_length = length;
}

static const char *label(reader *r) { return fst_escape(r->label, sizeof r->label, r->name, r->name_length); }

static fst_status out_of_memory(reader *r) {
    r->where.offset = -1;
    return fst_fail(r->error, FST_E_MEMORY, 0, &r->where, "out of memory while reading the header");
}

static const char *kind(yyjson_val *value) {
    switch (yyjson_get_type(value)) {
    case YYJSON_TYPE_RAW: return "a number";
    case YYJSON_TYPE_STR: return "a string";
    case YYJSON_TYPE_ARR: return "an array";
    case YYJSON_TYPE_OBJ: return "an object";
    case YYJSON_TYPE_BOOL: return "a boolean";
    default: return "null";
    }
}

/* ---- Numbers ---- */

/* A plain integer, 0 to 2^64 - 1: digits alone. yyjson has refused leading zeros. */
static int read_integer(yyjson_val *value, uint64_t *out) {
    const char *text = yyjson_get_raw(value);
    size_t length = yyjson_get_len(value);
    uint64_t number = 0;
    if (!text) return 0;
    for (size_t i = 0; i < length; i++) {
        unsigned digit = (unsigned)(unsigned char)text[i] - '0';
        if (digit > 9) return 0;
        if (__builtin_mul_overflow(number, 10, &number) || __builtin_add_overflow(number, digit, &number)) {
            return 0;
        }
    }
    *out = number;
    return 1;
}

static int append_digit(uint64_t *number, char digit) {
    uint64_t longer;
    if (__builtin_mul_overflow(*number, 10, &longer)) return 0;
    if (__builtin_add_overflow(longer, (unsigned)(digit - '0'), &longer)) return 0;
    *number = longer;
    return 1;
}

static int is_digit(const char *text, const char *end) { return text < end && *text >= '0' && *text <= '9'; }

/* significand x 10^exponent as a double is finite. One multiplication, as the reference does it: near
 * the largest double the rounding decides. */
static int is_finite(uint64_t significand, int64_t exponent) {
    static const double powers[] = {1e289, 1e290, 1e291, 1e292, 1e293, 1e294, 1e295, 1e296, 1e297, 1e298,
                                    1e299, 1e300, 1e301, 1e302, 1e303, 1e304, 1e305, 1e306, 1e307, 1e308};
    if (significand == 0 || exponent < 289) return 1; /* 2^64 x 10^288 is far below */
    if (exponent > 308) return 0;
    return __builtin_isfinite((double)significand * powers[exponent - 289]);
}

/* What the reference's JSON parser does to a number that nobody asked for: it still wants a finite
 * double. Digits past 2^64 - 1 only count as places; digits after the point are dropped with them. */
static int is_in_range(const char *text, size_t length) {
    const char *end = text + length;
    uint64_t significand = 0;
    int64_t exponent = 0;
    if (text < end && *text == '-') text++;
    while (is_digit(text, end) && append_digit(&significand, *text)) text++;
    for (; is_digit(text, end); text++) exponent++;
    if (text < end && *text == '.') {
        text++;
        for (; is_digit(text, end) && append_digit(&significand, *text); text++) exponent--;
        while (is_digit(text, end)) text++;
    }
    if (text == end) return is_finite(significand, exponent);
    text++; /* e */
    int negative = *text == '-';
    if (*text == '-' || *text == '+') text++;
    int64_t power = 0;
    for (; is_digit(text, end); text++) {
        power = power * 10 + (*text - '0');
        if (power > INT32_MAX) return negative || significand == 0;
    }
    return is_finite(significand, negative ? exponent - power : exponent + power);
}

/* ---- Equal names ---- */

typedef struct text {
    const char *data;
    uint64_t hash;
    uint32_t length;
    uint32_t index; /* order in the file */
} text;

static uint64_t hash_bytes(const char *data, size_t length) {
    const uint64_t factor = 0x9E3779B97F4A7C15u;
    uint64_t hash = length * factor, word;
    for (; length >= 8; data += 8, length -= 8) {
        memcpy(&word, data, 8);
        hash = (hash ^ word) * factor;
        hash ^= hash >> 32;
    }
    word = 0;
    memcpy(&word, data, length);
    hash = (hash ^ word) * factor;
    return hash ^ hash >> 32;
}

static text make_text(const char *data, size_t length, size_t index) {
    return (text){data, hash_bytes(data, length), (uint32_t)length, (uint32_t)index};
}

static int same_text(const text *a, const text *b) {
    return a->hash == b->hash && a->length == b->length && memcmp(a->data, b->data, a->length) == 0;
}

static int compare_texts(const void *left, const void *right) {
    const text *a = left, *b = right;
    if (a->hash != b->hash) return a->hash < b->hash ? -1 : 1;
    if (a->length != b->length) return a->length < b->length ? -1 : 1;
    int order = memcmp(a->data, b->data, a->length);
    return order ? order : a->index < b->index ? -1 : a->index > b->index;
}

/* Puts equal texts side by side, in the order of their indexes: buckets by hash, each one sorted, so
 * that names made to collide cost a sort and no more. 0 when memory ran out. */
static int group_texts(const text *in, text *out, size_t count) {
    size_t buckets = 16;
    while (buckets < count) buckets *= 2;
    uint32_t *ends = calloc(buckets, sizeof *ends);
    if (!ends) return 0;
    for (size_t i = 0; i < count; i++) ends[in[i].hash & (buckets - 1)]++;
    uint32_t total = 0;
    for (size_t i = 0; i < buckets; i++) {
        total += ends[i];
        ends[i] = total - ends[i];
    }
    for (size_t i = 0; i < count; i++) out[ends[in[i].hash & (buckets - 1)]++] = in[i];
    for (size_t i = 0, begin = 0; i < buckets; begin = ends[i++]) {
        if (ends[i] - begin > 1) qsort(out + begin, ends[i] - begin, sizeof *out, compare_texts);
    }
    free(ends);
    return 1;
}

/* ---- Values that nobody asked for ---- */

static fst_status check_ignored(reader *r, yyjson_val *key, yyjson_val *value, int level) {
    if (yyjson_is_raw(value) && !is_in_range(yyjson_get_raw(value), yyjson_get_len(value))) {
        return fst_fail(r->error, FST_E_JSON, 0, where_at(r, value_position(r, key, value)),
                        "tensor \"%s\": a number is out of a double's range", label(r));
    }
    if (!yyjson_is_ctn(value)) return FST_OK;
    if (level > LEVELS_MAX) {
        return fst_fail(r->error, FST_E_JSON, 0, where_at(r, key_position(r, key)),
                        "tensor \"%s\": the header is nested more than %d levels deep here", label(r),
                        LEVELS_MAX);
    }
    fst_status status = FST_OK;
    yyjson_val *inner, *inner_key;
    if (yyjson_is_arr(value)) {
        yyjson_arr_iter items = yyjson_arr_iter_with(value);
        while (!status && (inner = yyjson_arr_iter_next(&items))) {
            status = check_ignored(r, key, inner, level + 1);
        }
        return status;
    }
    yyjson_obj_iter fields = yyjson_obj_iter_with(value);
    while (!status && (inner_key = yyjson_obj_iter_next(&fields))) {
        status = check_ignored(r, inner_key, yyjson_obj_iter_get_val(inner_key), level + 1);
    }
    return status;
}

/* ---- One tensor ---- */

enum { DTYPE, SHAPE, OFFSETS, FIELDS };
static const char *const field_names[FIELDS] = {"dtype", "shape", "data_offsets"};

typedef struct field {
    yyjson_val *key, *value;
} field;

static int field_of(yyjson_val *key) {
    if (yyjson_equals_strn(key, "dtype", 5)) return DTYPE;
    if (yyjson_equals_strn(key, "shape", 5)) return SHAPE;
    return yyjson_equals_strn(key, "data_offsets", 12) ? OFFSETS : FIELDS;
}

static fst_status wrong_kind(reader *r, const field *f, const char *name, const char *wanted) {
    return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, value_position(r, f->key, f->value)),
                    "tensor \"%s\": `%s` is %s; it must be %s", label(r), name, kind(f->value), wanted);
}

static fst_status read_number(reader *r, const field *f, const char *name, yyjson_val *value, uint64_t *out) {
    if (read_integer(value, out)) return FST_OK;
    char shown[32] = "";
    if (yyjson_is_raw(value)) fst_escape(shown, sizeof shown, yyjson_get_raw(value), yyjson_get_len(value));
    return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, value_position(r, f->key, value)),
                    "tensor \"%s\": `%s` holds %s%s%s; it must hold plain integers, 0 to 2^64 - 1", label(r),
                    name, kind(value), *shown ? ", " : "", shown);
}

/* Finds the three fields, each once; the others are only looked through. */
static fst_status find_fields(reader *r, yyjson_val *name, yyjson_val *tensor, field fields[FIELDS]) {
    yyjson_obj_iter iter = yyjson_obj_iter_with(tensor);
    yyjson_val *key;
    while ((key = yyjson_obj_iter_next(&iter))) {
        yyjson_val *value = yyjson_obj_iter_get_val(key);
        int which = field_of(key);
        if (which == FIELDS) {
            fst_status status = check_ignored(r, key, value, 3);
            if (status) return status;
        } else if (fields[which].key) {
            return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, key_position(r, key)),
                            "tensor \"%s\": `%s` is there twice", label(r), field_names[which]);
        } else {
            fields[which] = (field){key, value};
        }
    }
    for (int i = 0; i < FIELDS; i++) {
        if (fields[i].key) continue;
        return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, key_position(r, name)),
                        "tensor \"%s\" has no `%s`", label(r), field_names[i]);
    }
    return FST_OK;
}

static fst_status read_dtype(reader *r, const field *f, fst_entry *entry) {
    if (!yyjson_is_str(f->value)) return wrong_kind(r, f, "dtype", "a string such as \"BF16\"");
    const char *name = yyjson_get_str(f->value);
    entry->dtype = fst_dtype_parse(name, yyjson_get_len(f->value));
    if (entry->dtype != FST_NATIVE) return FST_OK;
    char shown[64];
    return fst_fail(r->error, FST_E_DTYPE, 0, where_at(r, key_position(r, f->value)),
                    "tensor \"%s\": dtype \"%s\" is none of safetensors 0.8", label(r),
                    fst_escape(shown, sizeof shown, name, yyjson_get_len(f->value)));
}

/* The shape, and the number of elements. Zeros are left out of the overflow check: a product that
 * overflows in some order is refused in every order. */
static fst_status read_shape(reader *r, const field *f, row *out) {
    if (!yyjson_is_arr(f->value)) return wrong_kind(r, f, "shape", "an array of integers");
    size_t ndim = yyjson_arr_size(f->value), i, max;
    uint64_t shape[FST_MAX_DIMS], product = 1;
    int empty = 0;
    yyjson_val *value;
    yyjson_arr_foreach(f->value, i, max, value) {
        if (i == FST_MAX_DIMS) {
            return fst_fail(r->error, FST_E_SHAPE, 0, where_at(r, value_position(r, f->key, value)),
                            "tensor \"%s\" has %zu dimensions; at most %d are supported", label(r), ndim,
                            FST_MAX_DIMS);
        }
        fst_status status = read_number(r, f, "shape", value, &shape[i]);
        if (status) return status;
        empty |= shape[i] == 0;
        if (shape[i] && __builtin_mul_overflow(product, shape[i], &product)) {
            return fst_fail(r->error, FST_E_SHAPE, 0, where_at(r, value_position(r, f->key, value)),
                            "tensor \"%s\": the product of its extents is over 2^64 - 1", label(r));
        }
    }
    uint64_t *copy = allocate(r->header, ndim * sizeof *copy);
    if (!copy) return out_of_memory(r);
    if (ndim) memcpy(copy, shape, ndim * sizeof *copy);
    out->entry.shape = copy;
    out->entry.ndim = (uint32_t)ndim;
    out->elements = empty ? 0 : product;
    return FST_OK;
}

static fst_status read_offsets(reader *r, const field *f, row *out) {
    if (!yyjson_is_arr(f->value)) return wrong_kind(r, f, "data_offsets", "an array of two integers");
    if (yyjson_arr_size(f->value) != 2) {
        return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, key_position(r, f->key)),
                        "tensor \"%s\": `data_offsets` holds %zu values; it must hold two, begin and end",
                        label(r), yyjson_arr_size(f->value));
    }
    yyjson_val *begin = yyjson_arr_get_first(f->value), *end = yyjson_arr_get_last(f->value);
    fst_status status = read_number(r, f, "data_offsets", begin, &out->entry.begin);
    if (!status) status = read_number(r, f, "data_offsets", end, &out->entry.end);
    if (status) return status;
    out->begin_at = (uint32_t)value_position(r, f->key, begin);
    out->end_at = (uint32_t)value_position(r, f->key, end);
    return FST_OK;
}

static fst_status read_tensor(reader *r, yyjson_val *key, yyjson_val *value, row *out) {
    const char *name = yyjson_get_str(key);
    size_t length = yyjson_get_len(key);
    field fields[FIELDS] = {{NULL, NULL}};
    turn_to(r, name, length);
    out->name_at = (uint32_t)key_position(r, key);
    if (memchr(name, 0, length)) {
        return fst_fail(r->error, FST_E_NAME, 0, where_at(r, out->name_at),
                        "tensor \"%s\": a name may not hold a NUL", label(r));
    }
    if (!yyjson_is_obj(value)) {
        return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, value_position(r, key, value)),
                        "tensor \"%s\" is %s; it must be an object with dtype, shape and data_offsets",
                        label(r), kind(value));
    }
    fst_status status = find_fields(r, key, value, fields);
    if (!status) status = read_dtype(r, &fields[DTYPE], &out->entry);
    if (!status) status = read_shape(r, &fields[SHAPE], out);
    if (!status) status = read_offsets(r, &fields[OFFSETS], out);
    if (status) return status;
    out->entry.name = copy_text(r->header, name, length);
    out->entry.name_length = (uint32_t)length;
    return out->entry.name ? FST_OK : out_of_memory(r);
}

/* ---- __metadata__ ---- */

/* Of a repeated key the first place and the last value stay. `grouped` has room for `count`. */
static size_t drop_repeated(fst_string *pairs, text *grouped, size_t count) {
    for (size_t i = 0, first = 0; i < count; i++) {
        if (!same_text(&grouped[i], &grouped[first])) first = i;
        if (i == first) continue;
        pairs[2 * grouped[first].index + 1] = pairs[2 * grouped[i].index + 1];
        pairs[2 * grouped[i].index].data = NULL;
    }
    size_t kept = 0;
    for (size_t i = 0; i < count; i++) {
        if (!pairs[2 * i].data) continue;
        pairs[2 * kept] = pairs[2 * i];
        pairs[2 * kept + 1] = pairs[2 * i + 1];
        kept++;
    }
    return kept;
}

static fst_status merge_repeated(reader *r) {
    fst_header *header = r->header;
    size_t count = header->metadata_count;
    text *texts = calloc(2 * count + 1, sizeof *texts);
    if (!texts) return out_of_memory(r);
    text *grouped = texts + count;
    for (size_t i = 0; i < count; i++) {
        const fst_string *key = &header->metadata[2 * i];
        texts[i] = make_text(key->data, key->length, i);
    }
    int grouped_all = group_texts(texts, grouped, count);
    if (grouped_all) header->metadata_count = drop_repeated(header->metadata, grouped, count);
    free(texts);
    return grouped_all ? FST_OK : out_of_memory(r);
}

static fst_status read_metadata(reader *r, yyjson_val *key, yyjson_val *value) {
    fst_header *header = r->header;
    if (yyjson_is_null(value)) return FST_OK;
    if (!yyjson_is_obj(value)) {
        return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, value_position(r, key, value)),
                        "`__metadata__` is %s; it must be an object of strings, or null", kind(value));
    }
    header->has_metadata = 1;
    header->metadata = allocate(header, 2 * yyjson_obj_size(value) * sizeof *header->metadata);
    if (!header->metadata) return out_of_memory(r);
    size_t i, max;
    yyjson_val *inner_key, *inner;
    yyjson_obj_foreach(value, i, max, inner_key, inner) {
        if (!yyjson_is_str(inner)) {
            turn_to(r, yyjson_get_str(inner_key), yyjson_get_len(inner_key));
            return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, value_position(r, inner_key, inner)),
                            "`__metadata__`: the value of \"%s\" is %s; it must be a string", label(r),
                            kind(inner));
        }
        yyjson_val *both[2] = {inner_key, inner};
        for (int part = 0; part < 2; part++) {
            size_t length = yyjson_get_len(both[part]);
            const char *copy = copy_text(header, yyjson_get_str(both[part]), length);
            if (!copy) return out_of_memory(r);
            header->metadata[2 * i + (size_t)part] = (fst_string){copy, length};
        }
    }
    header->metadata_count = yyjson_obj_size(value);
    return merge_repeated(r);
}

/* ---- All tensors together ---- */

/* Refuses the earliest name that was there before. */
static fst_status check_names(reader *r) {
    size_t count = r->header->count;
    text *texts = calloc(2 * count + 1, sizeof *texts);
    if (!texts) return out_of_memory(r);
    text *grouped = texts + count;
    for (size_t i = 0; i < count; i++) {
        texts[i] = make_text(r->rows[i].entry.name, r->rows[i].entry.name_length, i);
    }
    const text *again = NULL, *before = NULL;
    int grouped_all = group_texts(texts, grouped, count);
    for (size_t i = 1; grouped_all && i < count; i++) {
        if (!same_text(&grouped[i], &grouped[i - 1]) || (again && again->index < grouped[i].index)) continue;
        again = &grouped[i];
        before = &grouped[i - 1];
    }
    fst_status status = grouped_all ? FST_OK : out_of_memory(r);
    if (again) {
        const row *second = &r->rows[again->index];
        turn_to(r, again->data, again->length);
        status = fst_fail(r->error, FST_E_DUPLICATE, 0, where_at(r, second->name_at),
                          "tensor \"%s\" is there twice, first at byte %llu", label(r),
                          8 + (unsigned long long)r->rows[before->index].name_at);
    }
    free(texts);
    return status;
}

/* One tensor's elements and its range say the same. */
static fst_status check_size(reader *r, const row *in) {
    const fst_entry *entry = &in->entry;
    const char *dtype = fst_dtype_name(entry->dtype);
    unsigned bits = fst_dtype_bits(entry->dtype);
    unsigned long long all_bits, count = in->elements, begin = entry->begin, end = entry->end;
    turn_to(r, entry->name, entry->name_length);
    if (end < begin) {
        return fst_fail(r->error, FST_E_OFFSETS, 0, where_at(r, in->end_at),
                        "tensor \"%s\": its data ends at %llu, before it begins at %llu", label(r), end,
                        begin);
    }
    if (__builtin_mul_overflow(count, bits, &all_bits)) {
        return fst_fail(r->error, FST_E_SIZE, 0, where_at(r, in->name_at),
                        "tensor \"%s\": %llu elements of %s are more than 2^64 - 1 bits", label(r), count,
                        dtype);
    }
    if (all_bits % 8) {
        return fst_fail(r->error, FST_E_SIZE, 0, where_at(r, in->name_at),
                        "tensor \"%s\": %llu elements of %s, %u bits each, do not fill whole bytes", label(r),
                        count, dtype, bits);
    }
    if (all_bits / 8 == end - begin) return FST_OK;
    return fst_fail(r->error, FST_E_SIZE, 0, where_at(r, in->name_at),
                    "tensor \"%s\": %llu elements of %s take %llu bytes, but its offsets hold %llu", label(r),
                    count, dtype, all_bits / 8, end - begin);
}

static int compare_rows(const void *left, const void *right) {
    const row *a = *(const row *const *)left, *b = *(const row *const *)right;
    if (a->entry.begin != b->entry.begin) return a->entry.begin < b->entry.begin ? -1 : 1;
    if (a->entry.end != b->entry.end) return a->entry.end < b->entry.end ? -1 : 1;
    return a < b ? -1 : a > b; /* rows lie in the order of the file */
}

/* Tensors in the order of their data, into the result. Most files have them so already. */
static fst_status sort_rows(reader *r, const row **order) {
    fst_header *header = r->header;
    int sorted = 1;
    for (size_t i = 0; i < header->count; i++) {
        order[i] = &r->rows[i];
        sorted &= i == 0 || compare_rows(&order[i - 1], &order[i]) < 0;
    }
    if (!sorted) qsort(order, header->count, sizeof *order, compare_rows);
    header->tensors = allocate(header, header->count * sizeof *header->tensors);
    if (!header->tensors) return out_of_memory(r);
    for (size_t i = 0; i < header->count; i++) header->tensors[i] = order[i]->entry;
    return FST_OK;
}

static fst_status wrong_begin(reader *r, const row *in, uint64_t covered) {
    const fst_entry *entry = &in->entry;
    turn_to(r, entry->name, entry->name_length);
    return fst_fail(r->error, FST_E_OFFSETS, 0, where_at(r, in->begin_at),
                    "tensor \"%s\": its data begins at %llu, %s that before it, which ends at %llu", label(r),
                    (unsigned long long)entry->begin,
                    entry->begin < covered ? "inside" : "leaving a hole after", (unsigned long long)covered);
}

/* The ranges, one after the other, are the data section. */
static fst_status check_cover(reader *r, const row *const *order) {
    const fst_header *header = r->header;
    uint64_t covered = 0;
    unsigned long long data = header->file_size - header->data_start;
    for (size_t i = 0; i < header->count; i++) {
        const fst_entry *entry = &order[i]->entry;
        if (entry->begin != covered) return wrong_begin(r, order[i], covered);
        if (entry->end > data) {
            turn_to(r, entry->name, entry->name_length);
            return fst_fail(r->error, FST_E_OFFSETS, 0, where_at(r, order[i]->end_at),
                            "tensor \"%s\": its data ends at %llu, but the file holds %llu bytes of data: it "
                            "is cut short, or not the file that was written; fetch it again",
                            label(r), (unsigned long long)entry->end, data);
        }
        covered = entry->end;
    }
    if (covered == data) return FST_OK;
    return fst_fail(r->error, FST_E_OFFSETS, 0, where_at(r, header->data_start - 8 + covered),
                    "%llu bytes at the end of the file belong to no tensor",
                    data - (unsigned long long)covered);
}

static fst_status arrange(reader *r) {
    fst_status status = check_names(r);
    for (size_t i = 0; !status && i < r->header->count; i++) status = check_size(r, &r->rows[i]);
    const row **order = malloc((r->header->count + 1) * sizeof *order);
    if (!status && !order) status = out_of_memory(r);
    if (!status) status = sort_rows(r, order);
    if (!status) status = check_cover(r, order);
    free(order);
    return status;
}

/* ---- The header ---- */

static fst_status read_root(reader *r, yyjson_val *root) {
    yyjson_val *key, *metadata_key = NULL;
    if (!yyjson_is_obj(root)) {
        return fst_fail(r->error, FST_E_HEADER, 0, where_at(r, 0), "the header is %s; it must be an object",
                        kind(root));
    }
    r->rows = calloc(yyjson_obj_size(root) + 1, sizeof *r->rows);
    if (!r->rows) return out_of_memory(r);
    yyjson_obj_iter iter = yyjson_obj_iter_with(root);
    fst_status status = FST_OK;
    while (!status && (key = yyjson_obj_iter_next(&iter))) {
        yyjson_val *value = yyjson_obj_iter_get_val(key);
        if (!yyjson_equals_strn(key, "__metadata__", 12)) {
            status = read_tensor(r, key, value, &r->rows[r->header->count]);
            r->header->count++;
        } else if (metadata_key) {
            status = fst_fail(r->error, FST_E_HEADER, 0, where_at(r, key_position(r, key)),
                              "`__metadata__` is there twice");
        } else {
            metadata_key = key;
            status = read_metadata(r, key, value);
        }
    }
    if (!status) status = arrange(r);
    free(r->rows);
    return status;
}

/* The first byte that is not UTF-8, or `length`. */
static size_t utf8_prefix(const unsigned char *bytes, size_t length) {
    size_t i = 0;
    while (i < length) {
        uint64_t word = 0;
        while (length - i >= 8 && (memcpy(&word, bytes + i, 8), (word & 0x8080808080808080u) == 0)) i += 8;
        if (i == length) break;
        size_t size = fst_utf8_character(bytes + i, length - i);
        if (size == 0) break;
        i += size;
    }
    return i;
}

static fst_status read_json(reader *r, char *json, size_t length) {
    size_t valid = utf8_prefix((const unsigned char *)json, length);
    if (valid < length) {
        return fst_fail(r->error, FST_E_UTF8, 0, where_at(r, valid), "the header is not UTF-8 at byte 0x%02X",
                        (unsigned char)json[valid]);
    }
    if (length == 0) return fst_fail(r->error, FST_E_JSON, 0, where_at(r, 0), "the header is empty: no JSON");
    memset(json + length, 0, YYJSON_PADDING_SIZE);
    yyjson_read_err problem;
    yyjson_doc *doc =
        yyjson_read_opts(json, length, YYJSON_READ_INSITU | YYJSON_READ_NUMBER_AS_RAW, NULL, &problem);
    if (!doc && problem.code == YYJSON_READ_ERROR_MEMORY_ALLOCATION) return out_of_memory(r);
    if (!doc) {
        return fst_fail(r->error, FST_E_JSON, 0, where_at(r, problem.pos), "the header is not JSON: %s",
                        problem.msg);
    }
    fst_status status = read_root(r, yyjson_doc_get_root(doc));
    yyjson_doc_free(doc);
    return status;
}

fst_status fst_header_parse(char *json, size_t length, uint64_t file_size, const char *path, int file,
                            fst_header *out, fst_error *error) {
    reader r = {.json = json, .header = out, .where = {path, file, -1}, .error = error};
    memset(out, 0, sizeof *out);
    if (file_size < 8 || length > file_size - 8) {
        r.where.offset = (int64_t)file_size;
        return fst_fail(error, FST_E_TRUNCATED, 0, &r.where, "the file ends inside its header");
    }
    out->data_start = 8 + (uint64_t)length;
    out->file_size = file_size;
    fst_status status = read_json(&r, json, length);
    if (status) fst_header_free(out);
    return status;
}

fst_status fst_header_length(const unsigned char *first, uint64_t file_size, const char *path, int file,
                             uint64_t *length, fst_error *error) {
    fst_where where = {path, file, 0};
    uint64_t value = 0;
    *length = 0;
    if (file_size < 8) {
        where.offset = (int64_t)file_size;
        return fst_fail(error, FST_E_TRUNCATED, 0, &where,
                        "%llu bytes are too few for a safetensors file: it starts with an 8-byte length",
                        (unsigned long long)file_size);
    }
    for (int i = 7; i >= 0; i--) value = value << 8 | first[i];
    if (value > FST_HEADER_MAX) {
        return fst_fail(error, FST_E_HEADER_SIZE, 0, &where,
                        "a header of %llu bytes; at most %u are allowed: is this a safetensors file?",
                        (unsigned long long)value, FST_HEADER_MAX);
    }
    if (value > file_size - 8) {
        where.offset = (int64_t)file_size;
        return fst_fail(error, FST_E_TRUNCATED, 0, &where,
                        "the file ends at byte %llu, inside its header of %llu bytes; fetch it again",
                        (unsigned long long)file_size, (unsigned long long)value);
    }
    *length = value;
    return FST_OK;
}
