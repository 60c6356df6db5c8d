#!/usr/bin/env python3
"""Compares what `fst convert` writes, bit for bit, with the reference reader's tensors (PyPI's safetensors),
cast by ml_dtypes and NumPy.

    compare.py --fst build/bin/fst [--device cpu] [--cast bf16 ...] PATH...
    compare.py --fst build/bin/fst --mixed 20e6      a generated checkpoint of so many bytes instead of PATH
    compare.py --fst build/bin/fst --real            the one of scripts/setup --model; exit status 77 when it is not there

PATH is a .safetensors file. Without --cast: as stored, and every target that has kernels. Without --device: the CPU
and, with FST_TEST_DEVICE=N, GPU N.
"""
import argparse
import itertools
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import safetensors

from casts import NARROW, NARROW_TARGETS, TYPES

CAST = {*TYPES, *NARROW} - {"F8_E8M0"}  # by a load: a bare F8_E8M0 is a scale, and kept
REPO = pathlib.Path(__file__).resolve().parents[2]
SKIPPED = 77
STEP = 1 << 22  # elements that are cast at a time


def odd(values):
    """F64 -> F32 rounded to odd: casting the result on, to nearest, rounds once in effect."""
    near = values.astype(np.float32)
    toward = np.where(np.abs(near.astype(np.float64)) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    inexact = np.isfinite(values) & (toward.astype(np.float64) != values)
    return (toward.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)


def widen(data, src, dst):
    """Codes are a stream of bits, the low ones first; every number is exact in the target, and none is NaN."""
    src_type, bits = NARROW[src]
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(-1, bits)
    codes = np.packbits(stream, axis=1, bitorder="little").reshape(-1)
    return codes.view(src_type).astype(np.float64).astype(TYPES[dst][0]).tobytes()


def cast(data, src, dst):
    """The bytes of dst that the rules of docs/design.md give for the bytes of src."""
    if src == dst or src not in CAST:
        return data
    if src in NARROW:
        return widen(data, src, dst)
    dst_type, dst_bits, nan, largest = TYPES[dst]
    bits = np.dtype(dst_bits)
    source = np.frombuffer(data, TYPES[src][0])
    result = np.empty(source.size, bits)
    for at in range(0, source.size, STEP):
        values = source[at:at + STEP]
        negative, is_nan = np.signbit(values), np.isnan(values)
        if src in ("F8_E4M3FNUZ", "F8_E5M2FNUZ"):
            negative = values.view(np.uint8) >= 0x80  # their one NaN has the sign bit set
        if src == "F64" and bits.itemsize < 4 and dst != "F16":
            values = odd(values)
        elif bits.itemsize == 1 and src != "F32":
            values = values.astype(np.float32)
        if largest:
            values = np.clip(values, np.float32(-largest), np.float32(largest))
        codes = values.astype(dst_type).view(bits).copy()
        signed = np.where(negative[is_nan], bits.type(1 << (8 * bits.itemsize - 1)), bits.type(0))
        codes[is_nan] = signed | bits.type(nan)
        result[at:at + STEP] = codes
    return result.tobytes()


def read(path):
    """What the reference says is in a file, in the order of the data, and its metadata."""
    with open(path, "rb") as file:
        raw = file.read()
    tensors = safetensors.deserialize(raw)
    with safetensors.safe_open(path, "np") as file:
        names, metadata = file.offset_keys(), file.metadata()
    order = {name: i for i, name in enumerate(names)}
    return sorted(tensors, key=lambda item: order[item[0]]), metadata or {}


def differences(inputs, output, target):
    """Lines about what is wrong with the output."""
    want, metadata = [], {}
    for tensors, more in inputs:
        want += tensors
        metadata.update(more)
    got, got_metadata = read(output)
    with open(output, "rb") as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
    if start % 4096:
        yield f"data starts at {start}"
    if metadata != got_metadata:
        yield f"metadata {got_metadata} instead of {metadata}"
    # Tensors of no bytes may stand anywhere among their neighbours.
    if [n for n, t in want if t["data"]] != [n for n, t in got if t["data"]]:
        yield "the order is not that of the inputs"
    found = dict(got)
    if sorted(found) != sorted(name for name, _ in want):
        yield "the names are not those of the inputs"
        return
    for name, tensor in want:
        src = tensor["dtype"]
        dst = target if target and src in CAST else src
        other = found[name]
        if (other["dtype"], other["shape"]) != (dst, tensor["shape"]):
            yield f"{name}: {other['dtype']} {other['shape']} instead of {dst} {tensor['shape']}"
        expected = cast(tensor["data"], src, dst)
        if expected != other["data"]:
            a, b = (np.frombuffer(x, np.uint8) for x in (expected, other["data"]))
            at = int(np.flatnonzero(a != b)[0]) if a.size == b.size else -1
            yield f"{name}: {src} to {dst}: byte {at} of {a.size} differs"


def check(args, paths, targets, folder):
    inputs, failed = [read(path) for path in paths], 0
    output = os.path.join(folder, "out.safetensors")
    for device, target in itertools.product(args.device, targets):
        flags = ["--cast", target.lower()] if target else []
        subprocess.run([args.fst, "convert", "--device", device, *flags, "-o", output, *paths], check=True,
                       stdout=subprocess.DEVNULL)
        lines = list(differences(inputs, output, target))
        print(f"{device}: {target or 'as stored'}: {sum(len(i[0]) for i in inputs)} tensors, "
              f"{os.path.getsize(output)} bytes: {'DIFFERENT' if lines else 'equal'}")
        for line in lines[:20]:
            print("   ", line)
        failed |= bool(lines)
    return failed


def generate(path, nbytes, *flags):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoint.py")
    subprocess.run([sys.executable, script, "mixed", path, "--bytes", str(nbytes), "--odd-header", *flags],
                   check=True)
    return [path]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fst", required=True)
    parser.add_argument("--device", action="append")
    parser.add_argument("--cast", action="append", choices=[f.lower() for f in TYPES] + ["none"])
    parser.add_argument("--mixed", type=float)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("paths", nargs="*")
    args = parser.parse_args()
    args.device = args.device or ["cpu", *filter(None, [os.environ.get("FST_TEST_DEVICE")])]
    if args.real:
        args.paths = [os.path.join(os.environ.get("FST_DEPS", REPO / ".deps"), "model/model.safetensors")]
        if not os.path.exists(args.paths[0]):
            print(f"skipped: no {args.paths[0]}: scripts/setup --model fetches it")
            return SKIPPED
    np.seterr(all="ignore")
    warnings.simplefilter("ignore")
    targets = [None if c == "none" else c.upper() for c in args.cast or ["none", *map(str.lower, TYPES)]]
    with tempfile.TemporaryDirectory() as folder:
        if not args.mixed:
            return check(args, args.paths, targets, folder)
        everything = generate(os.path.join(folder, "all.safetensors"), args.mixed)
        failed = check(args, everything, [t for t in targets if t in (None, *NARROW_TARGETS)], folder)
        # The other targets have no kernels for F4 and F6.
        castable = generate(os.path.join(folder, "castable.safetensors"), args.mixed, "--castable")
        return failed | check(args, castable, [t for t in targets if t not in (None, *NARROW_TARGETS)], folder)


if __name__ == "__main__":
    sys.exit(main())
