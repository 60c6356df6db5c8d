// Division by an invariant number, which kernels use for indexes: C++, as divide.h is.
#include "divide.h"

#include <random>

#include "harness.h"

static void check(uint64_t n, const Divisor &d) {
    if (d.divide(n) != n / d.value)
        test_fail(__FILE__, __LINE__, "%llu / %llu: want %llu, got %llu", static_cast<unsigned long long>(n),
                  static_cast<unsigned long long>(d.value), static_cast<unsigned long long>(n / d.value),
                  static_cast<unsigned long long>(d.divide(n)));
}

// Around the multiples of the divisor, where a quotient one off would show, and at the ends.
static void check_around(uint64_t value, std::mt19937_64 &random) {
    const Divisor d = divisor(value);
    for (uint64_t i = 0; i < 4; i++) {
        check(i, d);
        check(UINT64_MAX - i, d);
        check((1ull << 63) - 2 + i, d);
        check((1ull << 32) - 2 + i, d);
    }
    const uint64_t most = UINT64_MAX / value;
    for (int i = 0; i < 8; i++) {
        const uint64_t multiple = (i == 0 ? most : i == 1 ? 1 : random() % most + (most > 1)) * value;
        check(multiple, d);
        check(multiple - 1, d);
        check(multiple + 1, d);
        check(multiple + value - 1, d);
    }
}

TEST(kernels_divide, by_powers_of_two_and_their_neighbours) {
    std::mt19937_64 random;
    check_around(1, random);
    for (unsigned k = 1; k < 64; k++)
        for (uint64_t step = 0; step < 5; step++)
            if ((1ull << k) + step > 2) check_around((1ull << k) + step - 2, random);
}

TEST(kernels_divide, by_the_largest_numbers) {
    std::mt19937_64 random;
    for (uint64_t i = 0; i < 100; i++) check_around(UINT64_MAX - i, random);
}

TEST(kernels_divide, by_small_numbers) {
    std::mt19937_64 random;
    for (uint64_t value = 1; value < 70000; value++) check_around(value, random);
}

TEST(kernels_divide, by_any_number) {
    std::mt19937_64 random;
    for (int i = 0; i < 200000; i++) {
        const uint64_t value = random() >> random() % 64;
        if (value == 0) continue;
        check_around(value, random);
        for (int j = 0; j < 4; j++) check(random() >> random() % 64, divisor(value));
    }
}

static void check31(uint32_t n, const Divisor31 &d) {
    if (d.divide(n) != n / d.value)
        test_fail(__FILE__, __LINE__, "%u / %u: want %u, got %u", n, d.value, n / d.value, d.divide(n));
}

static void check_around31(uint32_t value, std::mt19937_64 &random) {
    constexpr uint32_t last = (1u << 31) - 1;
    const Divisor31 d = divisor31(value);
    const uint32_t most = last / value;
    for (uint32_t i = 0; i < 4; i++) check31(i, d), check31(last - i, d);
    for (int i = 0; i < 8; i++) {
        const uint32_t multiple =
            (i == 0 ? most : i == 1 && most ? 1 : most ? static_cast<uint32_t>(random() % most) : 0) * value;
        check31(multiple, d);
        if (multiple) check31(multiple - 1, d);
        if (multiple < last) check31(multiple + 1, d);
        check31(last - multiple < value - 1 ? last : multiple + value - 1, d);
    }
}

TEST(kernels_divide, in_31_bits) {
    std::mt19937_64 random;
    for (unsigned k = 0; k <= 31; k++)
        for (int step = -2; step <= 2; step++) {
            const int64_t value = (int64_t(1) << k) + step;
            if (value > 0 && value <= int64_t(1) << 31) check_around31(static_cast<uint32_t>(value), random);
        }
    for (uint32_t value = 1; value < 70000; value++) check_around31(value, random);
    for (int i = 0; i < 200000; i++)
        check_around31((static_cast<uint32_t>(random()) >> 1 >> random() % 31) + 1, random);
}
