#!/usr/bin/env python3
"""What casts must give, by ml_dtypes and NumPy: tables for tests/kernels_oracle.c and streams for
tests/exhaustive.c.

    casts.py tables FOLDER             SRC.in (codes; all of them for 8- and 16-bit types) and SRC-DST-MODE.out
    casts.py stream SRC DST MODE       the codes of DST for all codes of SRC (16 or 32 bits), in order, on stdout

MODE is `saturating` or `plain`. Neither library saturates: for that the input is clamped, in F64 (which holds
every value of the smaller types) or its own type. NaN is made the one code that docs/kernels.md names.
"""
import os
import sys

import ml_dtypes
import numpy as np

# name: (type, unsigned integer of its size, NaN code, largest finite number where casts saturate)
TYPES = {
    "F64": (np.float64, np.uint64, 0x7FF8000000000000, None),
    "F32": (np.float32, np.uint32, 0x7FC00000, None),
    "F16": (np.float16, np.uint16, 0x7E00, None),
    "BF16": (ml_dtypes.bfloat16, np.uint16, 0x7FC0, None),
    "F8_E4M3": (ml_dtypes.float8_e4m3fn, np.uint8, 0x7F, 448.0),
    "F8_E5M2": (ml_dtypes.float8_e5m2, np.uint8, 0x7E, 57344.0),
    "F8_E4M3FNUZ": (ml_dtypes.float8_e4m3fnuz, np.uint8, 0x80, 240.0),
    "F8_E5M2FNUZ": (ml_dtypes.float8_e5m2fnuz, np.uint8, 0x80, 57344.0),
}

# Types that are only cast from, and to which. Tables hold a code's bits one after the other, the low ones first.
NARROW = {
    "F8_E8M0": (ml_dtypes.float8_e8m0fnu, 8),
    "F6_E2M3": (ml_dtypes.float6_e2m3fn, 6),
    "F6_E3M2": (ml_dtypes.float6_e3m2fn, 6),
    "F4": (ml_dtypes.float4_e2m1fn, 4),
}
NARROW_TARGETS = ("F32", "F16", "BF16")


# Bits of a number, and the exponent of the smallest subnormal, of those types that ml_dtypes makes from F64 by
# way of F32, which rounds twice.
GRIDS = {"BF16": (8, -133), "F8_E4M3": (4, -9), "F8_E5M2": (3, -16), "F8_E4M3FNUZ": (4, -10), "F8_E5M2FNUZ": (3, -17)}


def round_once(values, dst):
    """F64 -> the nearest number on dst's grid, still as F64, by NumPy's rint."""
    digits, least = GRIDS[dst]
    exponent = np.maximum(np.frexp(values)[1] - digits, least)
    return np.where(np.isfinite(values), np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent), values)


def cast(codes, src, dst, mode):
    """Codes of src (an array of its unsigned integer) -> codes of dst."""
    src_type, src_bits = TYPES[src][:2]
    dst_type, dst_bits, nan, largest = TYPES[dst]
    values = codes.view(src_type)
    if largest and mode == "saturating":
        if src_bits().itemsize < 4:
            values = values.astype(np.float64)
        values = np.clip(values, values.dtype.type(-largest), values.dtype.type(largest))
    if src == "F64" and dst in GRIDS:
        values = round_once(values, dst)
    result = values.astype(dst_type)
    out = result.view(dst_bits)
    is_nan = np.flatnonzero(np.isnan(result))
    if is_nan.size:
        bits = dst_bits().itemsize * 8
        negative = codes[is_nan] >> src_bits(src_bits().itemsize * 8 - 1)
        signed = negative.astype(np.uint64) << np.uint64(bits - 1) | np.uint64(nan)
        out = out.copy()
        out[is_nan] = signed.astype(dst_bits)
    return out


def ties(src):
    """Codes of src at every value of every smaller type, half-way between neighbours, and one beside each."""
    src_type, src_bits = TYPES[src][:2]
    found = []
    for dst_type, dst_bits in (row[:2] for row in TYPES.values()):
        if dst_bits().itemsize >= src_bits().itemsize:
            continue
        size = dst_bits().itemsize * 8
        if size == 32:
            pick = np.random.default_rng(2).integers(0, 0x7F800000, 60000, dtype=np.uint32)
            edges = np.array([0, 1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFE, 0x7F7FFFFF], np.uint32)
            low = np.unique(np.concatenate([pick, edges]))
        else:
            low = np.arange(1 << (size - 1), dtype=dst_bits)
        value = low.view(dst_type).astype(np.float64)
        high = (low + dst_bits(1)).view(dst_type).astype(np.float64)
        middle = (value + high) / 2
        # What lies half a step beyond the largest one, where the next code is not a number.
        last = value[np.isfinite(value)].max()
        step = last - value[value < last].max()
        points = np.concatenate([value, middle, [last + step / 2, last + step, last + 2 * step]])
        points = points[np.isfinite(points)].astype(src_type)
        codes = points.view(src_bits)
        found += [codes, codes + src_bits(1), codes[codes > 0] - src_bits(1)]
    return np.unique(np.concatenate(found))


def inputs(src):
    src_type, src_bits = TYPES[src][:2]
    bits = src_bits().itemsize * 8
    if bits <= 16: # all in order, then beside others: nothing may pass from one to the next
        codes = np.arange(1 << bits, dtype=src_bits)
        return np.concatenate([codes, np.random.default_rng(4).permutation(np.tile(codes, 20 if bits == 8 else 1))])
    sign = src_bits(1 << (bits - 1))
    inf = src_bits({32: 0x7F800000, 64: 0x7FF0000000000000}[bits])
    special = np.array([0, 1, 2, int(inf) - 1, int(inf), int(inf) + 1, int(inf) + 2, int(sign) - 1,
                        TYPES[src][2]], src_bits)
    random = np.random.default_rng(1)
    if bits == 32:
        spread = np.arange(0, 1 << 32, 65537, dtype=np.uint64).astype(np.uint32)
    else:
        exponents = random.integers(1023 - 170, 1023 + 140, 100000, dtype=np.uint64) << np.uint64(52)
        mantissas = random.integers(0, 1 << 52, 100000, dtype=np.uint64)
        spread = np.concatenate([random.integers(0, 1 << 64, 50000, dtype=np.uint64), exponents | mantissas])
    positive = np.concatenate([special, ties(src)])
    return np.concatenate([positive, positive | sign, spread])


def modes(dst):
    return ("saturating", "plain") if TYPES[dst][3] else ("plain",)


def make_tables(folder):
    os.makedirs(folder, exist_ok=True)
    for src in TYPES:
        codes = inputs(src)
        codes.tofile(os.path.join(folder, f"{src}.in"))
        for dst in TYPES:
            if dst == src:
                continue
            for mode in modes(dst):
                cast(codes, src, dst, mode).tofile(os.path.join(folder, f"{src}-{dst}-{mode}.out"))


def make_narrow_tables(folder):
    for src, (src_type, bits) in NARROW.items():
        codes = np.arange(1 << bits, dtype=np.uint8)
        codes = np.concatenate([codes, np.random.default_rng(3).permutation(np.tile(codes, 5000 >> bits))])
        stream = (codes[:, None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(-1)
        np.packbits(stream, bitorder="little").tofile(os.path.join(folder, f"{src}.in"))
        values = codes.view(src_type).astype(np.float64)
        for dst in NARROW_TARGETS:
            dst_type, dst_bits, nan, _ = TYPES[dst]
            out = values.astype(dst_type).view(dst_bits)
            np.where(np.isnan(values), dst_bits(nan), out).tofile(os.path.join(folder, f"{src}-{dst}-plain.out"))


def make_stream(src, dst, mode):
    bits = TYPES[src][1]().itemsize * 8
    chunk = min(1 << 22, 1 << bits)
    for first in range(0, 1 << bits, chunk):
        codes = np.arange(first, first + chunk, dtype=np.uint64).astype(TYPES[src][1])
        sys.stdout.buffer.write(cast(codes, src, dst, mode).tobytes())


def main():
    np.seterr(all="ignore")
    if len(sys.argv) == 3 and sys.argv[1] == "tables":
        make_tables(sys.argv[2])
        make_narrow_tables(sys.argv[2])
    elif len(sys.argv) == 5 and sys.argv[1] == "stream":
        make_stream(*sys.argv[2:])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
