/* The rules of the header, one case each; docs/format.md has the table. In the texts ' stands for ", and ^
 * marks the byte that the error must point at; two of them mark a range, where yyjson's versions differ. */
#include "header.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

#define ONE "{'dtype':'U8','shape':[1],'data_offsets':[0,1]}"
#define REST "'dtype':'U8','shape':[1],'data_offsets':[0,1]"
#define EMPTY "'dtype':'U8','shape':[0],'data_offsets':"

/* ---- How a case is put ---- */

/* Parses `length` bytes with memory of exactly that size and the padding, so that sanitizers see more. */
static fst_status parse_bytes(const char *json, size_t length, uint64_t data, fst_header *out,
                              fst_error *error) {
    char *copy = malloc(length + 8);
    CHECK(copy != NULL);
    memcpy(copy, json, length);
    fst_status status = fst_header_parse(copy, length, 8 + length + data, "model.safetensors", 3, out, error);
    memset(copy, '?', length + 8); /* the result must not point into it */
    free(copy);
    return status;
}

typedef struct range {
    int64_t first, last; /* -1: no mark */
} range;

static void check_refusal(const fst_header *out, const fst_error *error, fst_status want, range offsets) {
    static const fst_header zero;
    CHECK_STR(fst_status_name(want), fst_status_name(error->status));
    if (error->offset < offsets.first || error->offset > offsets.last) {
        test_fail(__FILE__, __LINE__, "byte %lld, not %lld to %lld: %s", (long long)error->offset,
                  (long long)offsets.first, (long long)offsets.last, error->text);
    }
    CHECK_INT(3, error->file);
    CHECK_STR("model.safetensors", error->path);
    CHECK(strlen(error->text) > 10);
    CHECK_BYTES(&zero, out, sizeof zero);
}

/* The bytes that `text` stands for, and its marks. The caller frees them. */
static char *unquote(const char *text, size_t *length, range *marks) {
    char *out = malloc(strlen(text) + 1);
    CHECK(out != NULL);
    *length = 0;
    marks->first = marks->last = -1;
    for (; *text; text++) {
        if (*text == '^') {
            marks->last = (int64_t)*length;
            if (marks->first < 0) marks->first = marks->last;
        } else {
            out[(*length)++] = *text == '\'' ? '"' : *text;
        }
    }
    return out;
}

static void refused(fst_status want, const char *text, uint64_t data) {
    fst_header out;
    fst_error error;
    size_t length;
    range marks;
    char *json = unquote(text, &length, &marks);
    fst_status got = parse_bytes(json, length, data, &out, &error);
    free(json);
    CHECK_STR(fst_status_name(want), fst_status_name(got));
    CHECK(marks.first >= 0);
    check_refusal(&out, &error, want, (range){8 + marks.first, 8 + marks.last});
}

/* The same for bytes that a C string cannot hold or must hold as they are; `at` counts in the JSON. */
static void refused_bytes(fst_status want, const char *json, size_t length, uint64_t data, int64_t at) {
    fst_header out;
    fst_error error;
    CHECK_STR(fst_status_name(want), fst_status_name(parse_bytes(json, length, data, &out, &error)));
    check_refusal(&out, &error, want, (range){8 + at, 8 + at});
}

/* The caller frees the result. */
static fst_header accepted(const char *text, uint64_t data) {
    fst_header out;
    fst_error error;
    size_t length;
    range marks;
    char *json = unquote(text, &length, &marks);
    fst_status got = parse_bytes(json, length, data, &out, &error);
    free(json);
    if (got) {
        test_fail(__FILE__, __LINE__, "%s at %lld: %s", fst_status_name(got), (long long)error.offset,
                  error.text);
    }
    return out;
}

static void accepts(const char *text, uint64_t data) {
    fst_header out = accepted(text, data);
    fst_header_free(&out);
}

/* One tensor of one U8 with this value in a field that nobody asked for. */
static void refused_ignored(fst_status want, const char *value) {
    char text[4096];
    snprintf(text, sizeof text, "{'a':{'x':%s," REST "}}", value);
    refused(want, text, 1);
}

static void accepts_ignored(const char *value) {
    char text[4096];
    snprintf(text, sizeof text, "{'a':{'x':%s," REST "}}", value);
    accepts(text, 1);
}

/* 1 inside `levels` brackets, one in the other. */
static void nested(char *out, const char *open, const char *close, int levels) {
    *out = 0;
    for (int i = 0; i < levels; i++) strcat(out, open);
    strcat(out, "1");
    for (int i = 0; i < levels; i++) strcat(out, close);
}

static void check_entry(const fst_entry *entry, const char *name, fst_dtype dtype, uint64_t begin,
                        uint64_t end) {
    CHECK_STR(name, entry->name);
    CHECK_INT(strlen(name), entry->name_length);
    CHECK_STR(fst_dtype_name(dtype), fst_dtype_name(entry->dtype));
    CHECK_INT(begin, entry->begin);
    CHECK_INT(end, entry->end);
}

/* ---- The length in front ---- */

static void check_length(fst_status want, const char *first, uint64_t size, int64_t offset) {
    fst_error error;
    uint64_t length = 99;
    CHECK_INT(want,
              fst_header_length((const unsigned char *)first, size, "a.safetensors", 1, &length, &error));
    CHECK_INT(0, length);
    CHECK_INT(want, error.status);
    CHECK_INT(offset, error.offset);
    CHECK_INT(1, error.file);
    CHECK_STR("a.safetensors", error.path);
}

TEST(header, length_of_empty_file) { check_length(FST_E_TRUNCATED, "", 0, 0); }
TEST(header, length_cut) { check_length(FST_E_TRUNCATED, "\2\0\0\0\0\0\0", 7, 7); }
TEST(header, length_past_end_of_file) { check_length(FST_E_TRUNCATED, "\3\0\0\0\0\0\0\0", 10, 10); }
TEST(header, length_over_limit) { check_length(FST_E_HEADER_SIZE, "\x01\xE1\xF5\x05\0\0\0\0", 200000000, 0); }
TEST(header, length_at_limit_but_file_short) {
    check_length(FST_E_TRUNCATED, "\x00\xE1\xF5\x05\0\0\0\0", 100000007, 100000007);
}
TEST(header, length_over_limit_in_short_file) {
    check_length(FST_E_HEADER_SIZE, "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 8, 0);
}
TEST(header, length_whose_sum_with_8_wraps) {
    check_length(FST_E_HEADER_SIZE, "\xF8\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 100, 0);
}
TEST(header, length_big_endian) { check_length(FST_E_HEADER_SIZE, "\0\0\0\0\0\0\0\2", 10, 0); }
TEST(header, length_at_limit) {
    uint64_t length;
    CHECK_INT(FST_OK, fst_header_length((const unsigned char *)"\x00\xE1\xF5\x05\0\0\0\0", 100000008, "a", 0,
                                        &length, NULL));
    CHECK_INT(100000000, length);
}
TEST(header, length_little_endian) {
    uint64_t length;
    CHECK_INT(FST_OK,
              fst_header_length((const unsigned char *)"\x01\x02\0\0\0\0\0\0", 1000, "a", 0, &length, NULL));
    CHECK_INT(0x201, length);
}
TEST(header, longer_than_file) {
    fst_header out;
    fst_error error;
    char json[16] = "{}";
    CHECK_INT(FST_E_TRUNCATED, fst_header_parse(json, 2, 9, "model.safetensors", 3, &out, &error));
    check_refusal(&out, &error, FST_E_TRUNCATED, (range){9, 9});
}

/* ---- UTF-8 ---- */

static void refused_utf8(const char *bytes) {
    char text[256];
    int length = snprintf(text, sizeof text, "{\"a\":{\"x\":\"%s\"}}", bytes);
    refused_bytes(FST_E_UTF8, text, (size_t)length, 1, 11);
}

TEST(header, utf8_stray_continuation) { refused_utf8("\x80"); }
TEST(header, utf8_byte_that_never_occurs) { refused_utf8("\xFF"); }
TEST(header, utf8_overlong_two) { refused_utf8("\xC0\x80"); }
TEST(header, utf8_overlong_three) { refused_utf8("\xE0\x9F\xBF"); }
TEST(header, utf8_overlong_four) { refused_utf8("\xF0\x8F\xBF\xBF"); }
TEST(header, utf8_surrogate) { refused_utf8("\xED\xA0\x80"); }
TEST(header, utf8_past_last_code_point) { refused_utf8("\xF4\x90\x80\x80"); }
TEST(header, utf8_character_cut_by_quote) { refused_utf8("\xE2\x82"); }
TEST(header, utf8_character_cut_by_end) { refused_bytes(FST_E_UTF8, "{}\xE2\x82", 4, 0, 2); }
TEST(header, utf8_wrong_in_tensor_name) { refused_bytes(FST_E_UTF8, "{\"a\xC3\":1}", 8, 0, 3); }
TEST(header, utf8_wrong_outside_strings) { refused_bytes(FST_E_UTF8, "{} \xFE", 4, 0, 3); }
TEST(header, utf8_checked_before_json) { refused_bytes(FST_E_UTF8, "}{\xFF", 3, 0, 2); }
TEST(header, utf8_wrong_after_long_ascii) {
    refused_bytes(FST_E_UTF8, "{\"0123456789012345678901234567890\xFF\":1}", 37, 0, 33);
}
TEST(header, utf8_all_lengths_in_name) {
    fst_header out = accepted(
        "{'a\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF':" ONE "}", 1);
    CHECK_STR("a\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF",
              out.tensors[0].name);
    fst_header_free(&out);
}

/* ---- JSON ---- */

TEST(header, json_nothing) { refused_bytes(FST_E_JSON, "", 0, 0, 0); }
TEST(header, json_only_space) { refused(FST_E_JSON, "^   ", 0); }
TEST(header, json_cut) { refused(FST_E_JSON, "{'a':" ONE "^", 1); }
TEST(header, json_cut_in_string) { refused_bytes(FST_E_JSON, "{\"a", 3, 0, 3); }
TEST(header, json_byte_order_mark) { refused_bytes(FST_E_JSON, "\xEF\xBB\xBF{}", 5, 0, 0); }
TEST(header, json_text_behind) { refused(FST_E_JSON, "{}^x", 0); }
TEST(header, json_second_object_behind) { refused(FST_E_JSON, "{} ^{}", 0); }
TEST(header, json_nul_behind) { refused_bytes(FST_E_JSON, "{}\0", 3, 0, 2); }
TEST(header, json_nul_between) { refused_bytes(FST_E_JSON, "{\0}", 3, 0, 1); }
TEST(header, json_form_feed_is_no_space) { refused(FST_E_JSON, "{}^\f", 0); }
TEST(header, json_vertical_tab_is_no_space) { refused(FST_E_JSON, "^\v{}", 0); }
TEST(header, json_no_break_space_is_no_space) { refused(FST_E_JSON, "^\xC2\xA0{}", 0); }
TEST(header, json_comma_after_last_field) { refused(FST_E_JSON, "{'a':{" REST "^,^}}", 1); }
TEST(header, json_comma_after_last_item) {
    refused(FST_E_JSON, "{'a':{'dtype':'U8','shape':[1^,]^,'data_offsets':[0,1]}}", 1);
}
TEST(header, json_comma_missing) {
    refused(FST_E_JSON, "{'a':{'dtype':'U8' ^'shape':[1],'data_offsets':[0,1]}}", 1);
}
TEST(header, json_colon_missing) { refused(FST_E_JSON, "{'a' ^" ONE "}", 1); }
TEST(header, json_key_without_quotes) { refused(FST_E_JSON, "{^a:" ONE "}", 1); }
TEST(header, json_single_quotes) { refused_bytes(FST_E_JSON, "{'a':1}", 7, 0, 1); }
TEST(header, json_comment) { refused(FST_E_JSON, "{^/**/'a':" ONE "}", 1); }
TEST(header, json_wrong_bracket) {
    refused(FST_E_JSON, "{'a':{'dtype':'U8','shape':[1^},'data_offsets':[0,1]}}", 1);
}
TEST(header, json_control_character_in_string) { refused(FST_E_JSON, "{'a':{'x':'^\x1F'}}", 0); }
TEST(header, json_tab_in_string) { refused(FST_E_JSON, "{'a':{'x':'^\t'}}", 0); }
TEST(header, json_nul_in_string) { refused_bytes(FST_E_JSON, "{\"a\0b\":1}", 9, 0, 3); }
TEST(header, json_unknown_escape) { refused_ignored(FST_E_JSON, "'^\\x41^'"); }
TEST(header, json_escape_with_few_digits) { refused_ignored(FST_E_JSON, "'^\\u12^'"); }
TEST(header, json_first_half_of_pair_alone) { refused_ignored(FST_E_JSON, "'^\\ud800^'"); }
TEST(header, json_second_half_of_pair_alone) { refused_ignored(FST_E_JSON, "'^\\udc00^'"); }
TEST(header, json_first_half_then_other_escape) { refused_ignored(FST_E_JSON, "'^\\ud83d\\u0041^'"); }
TEST(header, json_first_half_twice) { refused_ignored(FST_E_JSON, "'^\\ud83d\\ud83d\\ude00^'"); }
TEST(header, json_word_misspelt) { refused_ignored(FST_E_JSON, "^nul"); }
TEST(header, json_word_in_capitals) { refused_ignored(FST_E_JSON, "^True"); }
TEST(header, json_not_a_number) { refused_ignored(FST_E_JSON, "^NaN"); }
TEST(header, json_infinity) { refused_ignored(FST_E_JSON, "-^Infinity"); }
TEST(header, json_leading_zero) { refused_ignored(FST_E_JSON, "^01"); }
TEST(header, json_leading_plus) { refused_ignored(FST_E_JSON, "^+1"); }
TEST(header, json_point_without_digits) { refused(FST_E_JSON, "{'a':{'x':1^.,^" REST "}}", 1); }
TEST(header, json_point_first) { refused_ignored(FST_E_JSON, "^.5"); }
TEST(header, json_minus_alone) { refused_ignored(FST_E_JSON, "-^"); }
TEST(header, json_exponent_without_digits) { refused(FST_E_JSON, "{'a':{'x':1e^+,^" REST "}}", 1); }
TEST(header, json_hexadecimal) { refused_ignored(FST_E_JSON, "0^x10"); }
TEST(header, json_space_both_sides) { accepts(" \t\r\n{'a':" ONE "}\n\r\t ", 1); }
TEST(header, json_space_everywhere) {
    accepts("{ 'a' : {\n'dtype' :\t'U8' , 'shape' : [ 1 ] ,\r'data_offsets' : [ 0 , 1 ] } }", 1);
}
TEST(header, json_pair_of_escapes) {
    fst_header out = accepted("{'\\uD83D\\ude00':" ONE "}", 1);
    CHECK_STR("\xF0\x9F\x98\x80", out.tensors[0].name);
    fst_header_free(&out);
}
TEST(header, json_all_short_escapes) {
    fst_header out = accepted("{'\\\"\\\\\\/\\b\\f\\n\\r\\t':" ONE "}", 1);
    CHECK_STR("\"\\/\b\f\n\r\t", out.tensors[0].name);
    fst_header_free(&out);
}

/* ---- Depth ---- */

TEST(header, depth_127_arrays) {
    char value[4096];
    nested(value, "[", "]", 125);
    accepts_ignored(value);
}
TEST(header, depth_128_arrays) {
    char value[1024], text[4096];
    nested(value, "[", "]", 126);
    snprintf(text, sizeof text, "{'a':{^'x':%s," REST "}}", value);
    refused(FST_E_JSON, text, 1);
}
TEST(header, depth_127_objects) {
    char value[4096];
    nested(value, "{'k':", "}", 125);
    accepts_ignored(value);
}
TEST(header, depth_128_objects) {
    char around[2048] = "";
    for (int i = 0; i < 124; i++) strcat(around, "{'k':");
    strcat(around, "{^'k':{'k':1}}");
    for (int i = 0; i < 124; i++) strcat(around, "}");
    refused_ignored(FST_E_JSON, around);
}
TEST(header, depth_is_not_counted_along) { accepts_ignored("[[],[],[],{},{},[[[]]],[{}]]"); }
TEST(header, depth_beyond_any_stack) {
    enum { LEVELS = 5000000 };
    static const char head[] = "{\"a\":{\"x\":";
    static const char tail[] = ",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}";
    size_t length = sizeof head - 1 + 2 * LEVELS + sizeof tail - 1;
    char *json = malloc(length + 1);
    CHECK(json != NULL);
    memcpy(json, head, sizeof head - 1);
    memset(json + sizeof head - 1, '[', LEVELS);
    memset(json + sizeof head - 1 + LEVELS, ']', LEVELS);
    memcpy(json + length - (sizeof tail - 1), tail, sizeof tail);
    refused_bytes(FST_E_JSON, json, length, 1, 6);
    free(json);
}

/* ---- Numbers that nobody asked for ---- */

TEST(header, ignored_number_out_of_range) { refused_ignored(FST_E_JSON, "^1e999"); }
TEST(header, ignored_negative_number_out_of_range) { refused_ignored(FST_E_JSON, "^-1e999"); }
TEST(header, ignored_integer_out_of_range) {
    char digits[512] = "^";
    memset(digits + 1, '9', 309);
    refused_ignored(FST_E_JSON, digits);
}
TEST(header, ignored_number_just_out_of_range) { refused_ignored(FST_E_JSON, "^1.7976931348623159e308"); }
TEST(header, ignored_number_out_of_range_deep_inside) { refused_ignored(FST_E_JSON, "[{'k':[0,^1e309]}]"); }
TEST(header, ignored_exponent_beyond_integers) { refused_ignored(FST_E_JSON, "^1e99999999999999999999"); }
TEST(header, ignored_fraction_times_exponent_out_of_range) { refused_ignored(FST_E_JSON, "^0.1e310"); }
TEST(header, ignored_number_that_the_reference_rounds_up) {
    char digits[512] = "^17976931348623158"; /* a correctly rounding parser takes it for the largest double */
    memset(digits + strlen(digits), '0', 292);
    refused_ignored(FST_E_JSON, digits);
}
TEST(header, ignored_same_number_spelt_longer) { accepts_ignored("1.79769313486231580e308"); }
TEST(header, ignored_number_largest) { accepts_ignored("1.7976931348623157e308"); }
TEST(header, ignored_number_too_small) { accepts_ignored("1e-999"); }
TEST(header, ignored_zero_with_huge_exponent) { accepts_ignored("0e99999999999999999999"); }
TEST(header, ignored_long_integer) { accepts_ignored("123456789012345678901234567890"); }
TEST(header, ignored_long_integer_brought_back) {
    char number[512] = "1";
    memset(number + 1, '0', 400);
    strcat(number, "e-400");
    accepts_ignored(number);
}
TEST(header, ignored_odd_numbers) { accepts_ignored("[-0,-0.0,1E+0,2.50,-1]"); }

/* ---- The outermost value ---- */

TEST(header, root_array) { refused(FST_E_HEADER, "^[]", 0); }
TEST(header, root_null) { refused(FST_E_HEADER, "^null", 0); }
TEST(header, root_string) { refused(FST_E_HEADER, "^'a'", 0); }
TEST(header, root_number) { refused(FST_E_HEADER, "^1", 0); }
TEST(header, root_empty) {
    fst_header out = accepted("{}", 0);
    CHECK_INT(0, out.count);
    CHECK_INT(10, out.data_start);
    CHECK_INT(10, out.file_size);
    CHECK_INT(0, out.has_metadata);
    fst_header_free(&out);
}
TEST(header, root_empty_with_data) { refused(FST_E_OFFSETS, "{}^", 1); }

/* ---- Tensors ---- */

TEST(header, tensor_null) { refused(FST_E_HEADER, "{^'a':null}", 0); }
TEST(header, tensor_string) { refused(FST_E_HEADER, "{'a':^'U8'}", 0); }
TEST(header, tensor_number) { refused(FST_E_HEADER, "{'a':^1}", 0); }
TEST(header, tensor_without_fields) { refused(FST_E_HEADER, "{^'a':{}}", 0); }
TEST(header, tensor_without_dtype) { refused(FST_E_HEADER, "{^'a':{'shape':[1],'data_offsets':[0,1]}}", 1); }
TEST(header, tensor_without_shape) { refused(FST_E_HEADER, "{^'a':{'dtype':'U8','data_offsets':[0,1]}}", 1); }
TEST(header, tensor_without_offsets) { refused(FST_E_HEADER, "{^'a':{'dtype':'U8','shape':[1]}}", 1); }
TEST(header, tensor_with_dtype_twice) { refused(FST_E_HEADER, "{'a':{" REST ",^'dtype':'U8'}}", 1); }
TEST(header, tensor_with_shape_twice) { refused(FST_E_HEADER, "{'a':{" REST ",^'shape':[1]}}", 1); }
TEST(header, tensor_with_offsets_twice) {
    refused(FST_E_HEADER, "{'a':{" REST ",^'data_offsets':[0,1]}}", 1);
}
TEST(header, tensor_with_escaped_field_twice) {
    refused(FST_E_HEADER, "{'a':{" REST ",^'\\u0064type':'U8'}}", 1);
}
TEST(header, tensor_with_field_in_capitals) {
    refused(FST_E_HEADER, "{^'a':{'DTYPE':'U8','shape':[1],'data_offsets':[0,1]}}", 1);
}
TEST(header, tensor_with_field_and_nul) {
    refused(FST_E_HEADER, "{^'a':{'dtype\\u0000':'U8','shape':[1],'data_offsets':[0,1]}}", 1);
}
TEST(header, tensor_wrong_though_named_again) { refused(FST_E_HEADER, "{^'a':null,'a':" ONE "}", 1); }
TEST(header, tensor_fields_in_any_order) {
    fst_header out = accepted("{'a':{'data_offsets':[0,6],'shape':[3,1],'dtype':'BF16'}}", 6);
    check_entry(&out.tensors[0], "a", FST_BF16, 0, 6);
    CHECK_INT(2, out.tensors[0].ndim);
    CHECK_INT(3, out.tensors[0].shape[0]);
    CHECK_INT(1, out.tensors[0].shape[1]);
    fst_header_free(&out);
}
TEST(header, tensor_with_escaped_fields) {
    accepts("{'a':{'\\u0064type':'\\u00558','s\\u0068ape':[1],'data\\u005Foffsets':[0,1]}}", 1);
}
TEST(header, tensor_with_unknown_fields) {
    accepts("{'a':{'x':{'dtype':3},'x':[],'':null," REST ",'shape ':0}}", 1);
}
TEST(header, tensor_with_field_named_metadata) { accepts("{'a':{'__metadata__':7," REST "}}", 1); }
TEST(header, tensor_as_array) { refused(FST_E_HEADER, "{^'a':['U8',[1],[0,1]]}", 1); }

/* ---- Names ---- */

TEST(header, name_with_nul) { refused(FST_E_NAME, "{^'a\\u0000b':" ONE "}", 1); }
TEST(header, name_that_is_nul) { refused(FST_E_NAME, "{^'\\u0000':" ONE "}", 1); }
TEST(header, name_twice) { refused(FST_E_DUPLICATE, "{'a':" ONE ",^'a':" ONE "}", 1); }
TEST(header, name_twice_one_escaped) { refused(FST_E_DUPLICATE, "{'ab':" ONE ",^'\\u0061b':" ONE "}", 1); }
TEST(header, name_twice_with_other_values) {
    refused(FST_E_DUPLICATE, "{'a':" ONE ",^'a':{'dtype':'U8','shape':[1],'data_offsets':[1,2]}}", 2);
}
TEST(header, name_twice_earliest_is_told) {
    char text[8192] = "{", name[8];
    for (int i = 0; i < 48; i++) { /* n0 to n15, three times over */
        snprintf(name, sizeof name, "n%d", i % 16);
        sprintf(text + strlen(text), "%s%s'%s':" ONE, i ? "," : "", i == 16 ? "^" : "", name);
    }
    refused(FST_E_DUPLICATE, strcat(text, "}"), 1);
}
TEST(header, name_twice_among_many) {
    enum { MANY = 3000 };
    char *json = malloc(MANY * 80), *end = json;
    size_t second = 0;
    CHECK(json != NULL);
    for (int i = 0; i < MANY; i++) {
        if (i == MANY - 1) second = (size_t)(end + 1 - json);
        end += sprintf(end, "%c\"t%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
                       i ? ',' : '{', i == MANY - 1 ? 17 : i, i, i + 1);
    }
    *end++ = '}';
    refused_bytes(FST_E_DUPLICATE, json, (size_t)(end - json), MANY, (int64_t)second);
    free(json);
}
TEST(header, names_that_start_alike) {
    accepts("{'a':" ONE ",'ab':{'dtype':'U8','shape':[1],'data_offsets':[1,2]},"
            "'A':{'dtype':'U8','shape':[1],'data_offsets':[2,3]}}",
            3);
}
TEST(header, name_empty) {
    fst_header out = accepted("{'':" ONE "}", 1);
    check_entry(&out.tensors[0], "", FST_U8, 0, 1);
    fst_header_free(&out);
}
TEST(header, name_escaped_in_text) {
    fst_header out;
    fst_error error;
    const char json[] = "{\"a\\u001b\\n\":null}";
    CHECK_INT(FST_E_HEADER, parse_bytes(json, sizeof json - 1, 0, &out, &error));
    CHECK(strstr(error.text, "\"a\\x1B\\n\"") != NULL);
}
TEST(header, name_long_is_cut_in_text) {
    fst_header out;
    fst_error error;
    char json[3000] = "{\"", *end = json + 2;
    memset(end, 'n', 2000);
    strcpy(end + 2000, "\":null}");
    CHECK_INT(FST_E_HEADER, parse_bytes(json, strlen(json), 0, &out, &error));
    CHECK(strstr(error.text, "nnn...\" is null; it must be an object") != NULL);
}

/* ---- dtype ---- */

static void refused_dtype(fst_status want, const char *value) {
    char text[256];
    snprintf(text, sizeof text, "{'a':{'dtype':%s,'shape':[1],'data_offsets':[0,1]}}", value);
    refused(want, text, 1);
}

TEST(header, dtype_unknown) { refused_dtype(FST_E_DTYPE, "^'F128'"); }
TEST(header, dtype_in_small_letters) { refused_dtype(FST_E_DTYPE, "^'u8'"); }
TEST(header, dtype_empty) { refused_dtype(FST_E_DTYPE, "^''"); }
TEST(header, dtype_with_space) { refused_dtype(FST_E_DTYPE, "^'U8 '"); }
TEST(header, dtype_with_nul) { refused_dtype(FST_E_DTYPE, "^'U8\\u0000'"); }
TEST(header, dtype_native) { refused_dtype(FST_E_DTYPE, "^'NATIVE'"); }
TEST(header, dtype_of_other_libraries) { refused_dtype(FST_E_DTYPE, "^'F8_E4M3FN'"); }
TEST(header, dtype_number) { refused_dtype(FST_E_HEADER, "^1"); }
TEST(header, dtype_null) {
    refused(FST_E_HEADER, "{'a':{^'dtype':null,'shape':[1],'data_offsets':[0,1]}}", 1);
}
TEST(header, dtype_array) {
    refused(FST_E_HEADER, "{'a':{^'dtype':['U8'],'shape':[1],'data_offsets':[0,1]}}", 1);
}
TEST(header, dtype_as_map) {
    refused(FST_E_HEADER, "{'a':{^'dtype':{'U8':null},'shape':[1],'data_offsets':[0,1]}}", 1);
}
TEST(header, dtype_all_known) {
    for (int i = FST_NATIVE + 1; i < FST_DTYPE_COUNT; i++) {
        char text[256];
        unsigned bytes = fst_dtype_bits((fst_dtype)i);
        snprintf(text, sizeof text, "{'a':{'dtype':'%s','shape':[4,2],'data_offsets':[0,%u]}}",
                 fst_dtype_name((fst_dtype)i), bytes);
        fst_header out = accepted(text, bytes);
        CHECK_INT(i, out.tensors[0].dtype);
        fst_header_free(&out);
    }
}

/* ---- shape ---- */

static void refused_shape(fst_status want, const char *value) {
    char text[1024];
    snprintf(text, sizeof text, "{'a':{'dtype':'U8','shape':%s,'data_offsets':[0,2]}}", value);
    refused(want, text, 2);
}

static void refused_empty(fst_status want, const char *shape) {
    char text[1024];
    snprintf(text, sizeof text, "{'a':{'dtype':'U8','shape':%s,'data_offsets':[0,0]}}", shape);
    refused(want, text, 0);
}

/* `count` ones, the mark before the 65th. */
static void ones(char *out, int count) {
    for (int i = 0; i < count; i++) out += sprintf(out, "%s%s1", i ? "," : "[", i == 64 ? "^" : "");
    sprintf(out, "]");
}

TEST(header, shape_null) {
    refused(FST_E_HEADER, "{'a':{'dtype':'U8',^'shape':null,'data_offsets':[0,1]}}", 1);
}
TEST(header, shape_object) {
    refused(FST_E_HEADER, "{'a':{'dtype':'U8',^'shape':{},'data_offsets':[0,1]}}", 1);
}
TEST(header, shape_number) { refused_shape(FST_E_HEADER, "^2"); }
TEST(header, shape_string) { refused_shape(FST_E_HEADER, "^'2'"); }
TEST(header, extent_with_point) { refused_shape(FST_E_HEADER, "[^2.0]"); }
TEST(header, extent_with_exponent) { refused_shape(FST_E_HEADER, "[1,^2e0]"); }
TEST(header, extent_minus_zero) { refused_shape(FST_E_HEADER, "[2,^-0]"); }
TEST(header, extent_negative) { refused_shape(FST_E_HEADER, "[^-1,-2]"); }
TEST(header, extent_in_quotes) { refused_shape(FST_E_HEADER, "[^'2']"); }
TEST(header, extent_true) {
    refused(FST_E_HEADER, "{'a':{'dtype':'U8',^'shape':[true],'data_offsets':[0,1]}}", 1);
}
TEST(header, extent_null) {
    refused(FST_E_HEADER, "{'a':{'dtype':'U8',^'shape':[null],'data_offsets':[0,0]}}", 0);
}
TEST(header, extent_array) {
    refused(FST_E_HEADER, "{'a':{'dtype':'U8',^'shape':[[1]],'data_offsets':[0,1]}}", 1);
}
TEST(header, extent_over_64_bits) { refused_shape(FST_E_HEADER, "[^18446744073709551616]"); }
TEST(header, extent_of_21_digits) { refused_shape(FST_E_HEADER, "[0,^100000000000000000000]"); }
TEST(header, shape_product_overflows) { refused_shape(FST_E_SHAPE, "[4294967296,^4294967296]"); }
TEST(header, shape_product_overflows_to_the_size) {
    refused_shape(FST_E_SHAPE, "[9223372036854775809,^2]"); /* 2^64 + 2 wraps to the 2 that the offsets say */
}
TEST(header, shape_product_overflows_before_zero) {
    refused_empty(FST_E_SHAPE, "[1099511627776,^1099511627776,0]");
}
TEST(header, shape_product_overflows_after_zero) {
    refused_empty(FST_E_SHAPE, "[0,1099511627776,^1099511627776]");
}
TEST(header, shape_product_overflows_around_zero) {
    refused_empty(FST_E_SHAPE, "[1099511627776,0,^1099511627776]");
}
TEST(header, shape_bits_overflow) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'U8','shape':[2305843009213693952],'data_offsets':[0,0]}}", 0);
}
TEST(header, shape_of_65_dimensions) {
    char shape[512], text[1024];
    ones(shape, 65);
    snprintf(text, sizeof text, "{'a':{'dtype':'U8','data_offsets':[0,1],'shape':%s}}", shape);
    refused(FST_E_SHAPE, text, 1);
}
TEST(header, shape_of_64_dimensions) {
    char shape[512], text[1024];
    ones(shape, 64);
    snprintf(text, sizeof text, "{'a':{'dtype':'U8','data_offsets':[0,1],'shape':%s}}", shape);
    fst_header out = accepted(text, 1);
    CHECK_INT(64, out.tensors[0].ndim);
    CHECK_INT(1, out.tensors[0].shape[63]);
    fst_header_free(&out);
}
TEST(header, shape_empty_is_one_element) {
    fst_header out = accepted("{'a':{'dtype':'F64','shape':[],'data_offsets':[0,8]}}", 8);
    CHECK_INT(0, out.tensors[0].ndim);
    check_entry(&out.tensors[0], "a", FST_F64, 0, 8);
    fst_header_free(&out);
}
TEST(header, shape_empty_without_data) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'U8','shape':[],'data_offsets':[0,0]}}", 0);
}
TEST(header, extent_largest_beside_zero) {
    fst_header out =
        accepted("{'a':{'dtype':'F64','shape':[18446744073709551615,0],'data_offsets':[0,0]}}", 0);
    CHECK(out.tensors[0].shape[0] == UINT64_MAX);
    fst_header_free(&out);
}

/* ---- Sizes ---- */

TEST(header, size_smaller_than_offsets) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'U8','shape':[1],'data_offsets':[0,2]}}", 2);
}
TEST(header, size_larger_than_offsets) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'F32','shape':[1],'data_offsets':[0,2]}}", 2);
}
TEST(header, size_zero_with_data) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'U8','shape':[0],'data_offsets':[0,1]}}", 1);
}
TEST(header, size_f4_half_a_byte) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'F4','shape':[3],'data_offsets':[0,2]}}", 2);
}
TEST(header, size_f4_rounded_down) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'F4','shape':[],'data_offsets':[0,0]}}", 0);
}
TEST(header, size_f6_two_elements) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'F6_E3M2','shape':[2],'data_offsets':[0,2]}}", 2);
}
TEST(header, size_f6_as_bytes) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'F6_E2M3','shape':[4],'data_offsets':[0,4]}}", 4);
}
TEST(header, size_f4_pair) { accepts("{'a':{'dtype':'F4','shape':[2],'data_offsets':[0,1]}}", 1); }
TEST(header, size_f4_odd_rows) { accepts("{'a':{'dtype':'F4','shape':[2,3],'data_offsets':[0,3]}}", 3); }
TEST(header, size_f6_four_elements) {
    accepts("{'a':{'dtype':'F6_E2M3','shape':[4],'data_offsets':[0,3]}}", 3);
}

/* ---- Offsets ---- */

static void refused_offsets(fst_status want, const char *value) {
    char text[256];
    snprintf(text, sizeof text, "{'a':{'dtype':'U8','shape':[1],'data_offsets':%s}}", value);
    refused(want, text, 1);
}

static void refused_offsets_key(const char *value) {
    char text[256];
    snprintf(text, sizeof text, "{'a':{'dtype':'U8','shape':[1],^'data_offsets':%s}}", value);
    refused(FST_E_HEADER, text, 1);
}

TEST(header, offsets_none) { refused_offsets_key("[]"); }
TEST(header, offsets_one) { refused_offsets_key("[0]"); }
TEST(header, offsets_three) { refused_offsets_key("[0,1,2]"); }
TEST(header, offsets_null) { refused_offsets_key("null"); }
TEST(header, offsets_object) { refused_offsets_key("{'begin':0,'end':1}"); }
TEST(header, offsets_string) { refused_offsets(FST_E_HEADER, "^'0,1'"); }
TEST(header, offset_with_point) { refused_offsets(FST_E_HEADER, "[0,^1.0]"); }
TEST(header, offset_with_exponent) { refused_offsets(FST_E_HEADER, "[^0e0,1]"); }
TEST(header, offset_minus_zero) { refused_offsets(FST_E_HEADER, "[^-0,1]"); }
TEST(header, offset_negative) { refused_offsets(FST_E_HEADER, "[^-1,0]"); }
TEST(header, offset_in_quotes) { refused_offsets(FST_E_HEADER, "[0,^'1']"); }
TEST(header, offset_null) { refused_offsets_key("[0,null]"); }
TEST(header, offset_over_64_bits) { refused_offsets(FST_E_HEADER, "[0,^18446744073709551617]"); }
TEST(header, offset_largest) {
    refused(FST_E_SIZE, "{^'a':{'dtype':'U8','shape':[1],'data_offsets':[0,18446744073709551615]}}", 1);
}
TEST(header, offsets_end_before_begin) { refused_offsets(FST_E_OFFSETS, "[1,^0]"); }
TEST(header, offsets_leave_first_byte) {
    refused(FST_E_OFFSETS, "{'a':{'dtype':'U8','shape':[1],'data_offsets':[^1,2]}}", 2);
}
TEST(header, offsets_leave_hole) {
    refused(FST_E_OFFSETS, "{'a':" ONE ",'b':{'dtype':'U8','shape':[1],'data_offsets':[^2,3]}}", 3);
}
TEST(header, offsets_overlap) {
    refused(FST_E_OFFSETS,
            "{'a':{'dtype':'U8','shape':[2],'data_offsets':[0,2]},"
            "'b':{'dtype':'U8','shape':[2],'data_offsets':[^1,3]}}",
            3);
}
TEST(header, offsets_same_range_twice) {
    refused(FST_E_OFFSETS, "{'a':" ONE ",'b':{'dtype':'U8','shape':[1],'data_offsets':[^0,1]}}", 1);
}
TEST(header, offsets_inside_another) {
    refused(FST_E_OFFSETS,
            "{'a':{'dtype':'U8','shape':[1],'data_offsets':[^1,2]},"
            "'b':{'dtype':'U8','shape':[3],'data_offsets':[0,3]}}",
            3);
}
TEST(header, offsets_empty_inside_another) {
    refused(FST_E_OFFSETS, "{'a':{'dtype':'U8','shape':[2],'data_offsets':[0,2]},'b':{" EMPTY "[^1,1]}}", 2);
}
TEST(header, offsets_empty_after_hole) { refused(FST_E_OFFSETS, "{'a':" ONE ",'b':{" EMPTY "[^2,2]}}", 2); }
TEST(header, offsets_empty_past_data) { refused(FST_E_OFFSETS, "{'a':{" EMPTY "[^1,1]}}", 0); }
TEST(header, data_cut) {
    refused(FST_E_OFFSETS, "{'a':{'dtype':'U8','shape':[2],'data_offsets':[0,^2]}}", 1);
}
TEST(header, data_lacking) {
    refused(FST_E_OFFSETS, "{'a':{'dtype':'U8','shape':[1],'data_offsets':[0,^1]}}", 0);
}
TEST(header, data_left_over) {
    static const char json[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}";
    refused_bytes(FST_E_OFFSETS, json, sizeof json - 1, 5, sizeof json - 1 + 2);
}
TEST(header, offsets_in_another_order_than_names) {
    fst_header out = accepted("{'z':{'dtype':'U8','shape':[1],'data_offsets':[2,3]},'a':" ONE ","
                              "'m':{'dtype':'U8','shape':[1],'data_offsets':[1,2]}}",
                              3);
    CHECK_INT(3, out.count);
    check_entry(&out.tensors[0], "a", FST_U8, 0, 1);
    check_entry(&out.tensors[1], "m", FST_U8, 1, 2);
    check_entry(&out.tensors[2], "z", FST_U8, 2, 3);
    fst_header_free(&out);
}
TEST(header, offsets_empty_share_with_neighbours) {
    fst_header out =
        accepted("{'e2':{" EMPTY "[1,1]},'a':" ONE ",'e0':{" EMPTY "[0,0]},'e1':{" EMPTY "[1,1]},"
                 "'b':{'dtype':'U8','shape':[1],'data_offsets':[1,2]},'e3':{" EMPTY "[2,2]}}",
                 2);
    const char *const names[] = {"e0", "a", "e2", "e1", "b", "e3"};
    for (size_t i = 0; i < 6; i++) CHECK_STR(names[i], out.tensors[i].name);
    fst_header_free(&out);
}
TEST(header, offsets_all_empty) { accepts("{'a':{" EMPTY "[0,0]},'b':{" EMPTY "[0,0]}}", 0); }

/* ---- __metadata__ ---- */

static void check_pair(const fst_header *header, size_t i, const char *key, const char *value) {
    CHECK_STR(key, header->metadata[2 * i].data);
    CHECK_INT(strlen(key), header->metadata[2 * i].length);
    CHECK_STR(value, header->metadata[2 * i + 1].data);
    CHECK_INT(strlen(value), header->metadata[2 * i + 1].length);
}

TEST(header, metadata_array) { refused(FST_E_HEADER, "{^'__metadata__':[]}", 0); }
TEST(header, metadata_string) { refused(FST_E_HEADER, "{'__metadata__':^'x'}", 0); }
TEST(header, metadata_false) { refused(FST_E_HEADER, "{^'__metadata__':false}", 0); }
TEST(header, metadata_like_a_tensor) {
    refused(FST_E_HEADER, "{'__metadata__':{'dtype':'U8',^'shape':[1],'data_offsets':[0,1]}}", 1);
}
TEST(header, metadata_value_number) { refused(FST_E_HEADER, "{'__metadata__':{'a':'b','k':^1}}", 0); }
TEST(header, metadata_value_null) { refused(FST_E_HEADER, "{'__metadata__':{^'k':null}}", 0); }
TEST(header, metadata_value_object) { refused(FST_E_HEADER, "{'__metadata__':{^'k':{}}}", 0); }
TEST(header, metadata_value_dropped_later) { refused(FST_E_HEADER, "{'__metadata__':{'k':^1,'k':'v'}}", 0); }
TEST(header, metadata_twice) {
    refused(FST_E_HEADER, "{'__metadata__':{},'a':" ONE ",^'__metadata__':{}}", 1);
}
TEST(header, metadata_twice_null_first) {
    refused(FST_E_HEADER, "{'__metadata__':null,^'__metadata__':{}}", 0);
}
TEST(header, metadata_twice_one_escaped) {
    refused(FST_E_HEADER, "{'\\u005f_metadata__':{},^'__metadata__':{}}", 0);
}
TEST(header, metadata_misspelt_is_a_tensor) { refused(FST_E_HEADER, "{^'__Metadata__':{'k':'v'}}", 0); }
TEST(header, metadata_null) {
    fst_header out = accepted("{'__metadata__':null}", 0);
    CHECK_INT(0, out.has_metadata);
    CHECK_INT(0, out.count);
    fst_header_free(&out);
}
TEST(header, metadata_empty) {
    fst_header out = accepted("{'__metadata__':{}}", 0);
    CHECK_INT(1, out.has_metadata);
    CHECK_INT(0, out.metadata_count);
    fst_header_free(&out);
}
TEST(header, metadata_escaped_key) {
    fst_header out = accepted("{'__metadata\\u005f_':{'format':'pt'}}", 0);
    CHECK_INT(0, out.count);
    CHECK_INT(1, out.metadata_count);
    check_pair(&out, 0, "format", "pt");
    fst_header_free(&out);
}
TEST(header, metadata_in_order_behind_tensors) {
    fst_header out = accepted("{'a':" ONE ",'__metadata__':{'z':'1','a':'2','':'3'}}", 1);
    CHECK_INT(1, out.count);
    CHECK_INT(3, out.metadata_count);
    check_pair(&out, 0, "z", "1");
    check_pair(&out, 1, "a", "2");
    check_pair(&out, 2, "", "3");
    fst_header_free(&out);
}
TEST(header, metadata_repeated_key_keeps_last) {
    fst_header out = accepted("{'__metadata__':{'k':'1','l':'2','\\u006b':'3','m':'4','k':'5'}}", 0);
    CHECK_INT(3, out.metadata_count);
    check_pair(&out, 0, "k", "5");
    check_pair(&out, 1, "l", "2");
    check_pair(&out, 2, "m", "4");
    fst_header_free(&out);
}
TEST(header, metadata_with_nul) {
    fst_header out = accepted("{'__metadata__':{'k\\u0000l':'\\u0000'}}", 0);
    CHECK_INT(3, out.metadata[0].length);
    CHECK_BYTES("k\0l", out.metadata[0].data, 4);
    CHECK_INT(1, out.metadata[1].length);
    CHECK_BYTES("\0", out.metadata[1].data, 2);
    fst_header_free(&out);
}

/* ---- The result ---- */

TEST(header, result_tells_places) {
    static const char json[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}   ";
    fst_header out;
    CHECK_INT(FST_OK, parse_bytes(json, sizeof json - 1, 2, &out, NULL));
    CHECK_INT(8 + sizeof json - 1, out.data_start);
    CHECK_INT(8 + sizeof json - 1 + 2, out.file_size);
    fst_header_free(&out);
    fst_header_free(&out); /* once more does nothing */
    CHECK(out.memory == NULL);
    fst_header_free(NULL);
}
TEST(header, result_of_many_tensors) {
    enum { MANY = 20000 };
    char *json = malloc(MANY * 96), *end = json;
    CHECK(json != NULL);
    for (int i = MANY - 1; i >= 0; i--) { /* last data first: nothing is sorted yet */
        end +=
            sprintf(end, "%c\"model.layers.%d\":{\"dtype\":\"I16\",\"shape\":[1,1],\"data_offsets\":[%d,%d]}",
                    i == MANY - 1 ? '{' : ',', i, 2 * i, 2 * i + 2);
    }
    *end++ = '}';
    fst_header out;
    fst_status status = parse_bytes(json, (size_t)(end - json), 2 * MANY, &out, NULL);
    free(json);
    CHECK_INT(FST_OK, status);
    CHECK_INT(MANY, out.count);
    for (uint64_t i = 0; i < MANY; i++) {
        char name[64];
        snprintf(name, sizeof name, "model.layers.%d", (int)i);
        check_entry(&out.tensors[i], name, FST_I16, 2 * i, 2 * i + 2);
    }
    fst_header_free(&out);
}
TEST(header, refusal_without_error_record) {
    fst_header out;
    CHECK_INT(FST_E_JSON, parse_bytes("{", 1, 0, &out, NULL));
    CHECK(out.memory == NULL);
}
