#!/usr/bin/env python3
"""The conversions of bench_convert in PyTorch and Triton, timed in the same way; and the table of both.

    peers_convert.py measure --device cpu|cuda [--bench BENCH_CONVERT] [--bytes N] [--runs N] [--filter TEXT]
                             --json FILE
    peers_convert.py table FILE...

`measure` times each conversion against torch's own copy of as many bytes (median of runs, alternated, buffers
rotated). With --bench it runs bench_convert for the same case just before, so that one file holds both. On the CPU
everything has one thread. `table` joins files of `measure` and of bench_convert to a Markdown table.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
COLS = 4096  # of matrices, as in bench_convert
BLOCK = 128
FLOATS = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ".split()


def torch_dtypes(torch):
    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
            "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
            "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "U8": torch.uint8, "I32": torch.int32}


# ---- Dequantization as one writes it in PyTorch: shifts, masks, a table, times scales ----

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
AWQ_SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]


def gptq(torch, qweight, qzeros, scales, group):
    """[in / 8, out], [G, out / 8], [G, out] -> [out, in], F32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=qweight.device)
    codes = (qweight[:, None, :] >> shifts[None, :, None] & 15).view(scales.shape[0], group, scales.shape[1])
    zeros = (qzeros[:, :, None] >> shifts & 15).view(scales.shape) + 1
    return ((codes - zeros[:, None, :]) * scales.float()[:, None, :]).view(-1, scales.shape[1]).t()


def awq(torch, qweight, qzeros, scales, group):
    """[in, out / 8], [G, out / 8], [G, out] -> [out, in], F32."""
    shifts = torch.tensor(AWQ_SHIFTS, dtype=torch.int32, device=qweight.device)
    codes = (qweight[:, :, None] >> shifts & 15).view(scales.shape[0], group, scales.shape[1])
    zeros = (qzeros[:, :, None] >> shifts & 15).view(scales.shape)
    return ((codes - zeros[:, None, :]) * scales.float()[:, None, :]).view(-1, scales.shape[1]).t()


def packed(torch, words, scales, group):
    """compressed-tensors' 4 bits: [out, in / 8], [out, G] -> [out, in], F32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = (words[:, :, None] >> shifts & 15).view(*scales.shape, group) - 8
    return (codes * scales.float()[:, :, None]).view(scales.shape[0], -1)


def four_bits(torch, bytes_, table, scales, group, high_first):
    """A table's values of both halves of each byte, times one scale for each `group` of them; F32."""
    table = torch.tensor(table, dtype=torch.float32, device=bytes_.device)
    halves = [(bytes_ & 15).int(), (bytes_ >> 4).int()]
    values = torch.stack([table[half] for half in (halves[::-1] if high_first else halves)], dim=-1)
    return values.view(-1, group) * scales.view(-1, 1)


# ---- Triton ----

def triton_kernels():
    """As one writes them: a cast, DeepSeek's dequantization of 128x128 blocks, GPTQ of 4 bits. None without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def cast(src, dst, count, SIZE: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        inside = at < count
        tl.store(dst + at, tl.load(src + at, mask=inside).to(dst.dtype.element_ty), mask=inside)

    @triton.jit
    def dequant(src, scales, dst, rows, cols, SIZE: tl.constexpr):
        y = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        x = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        at = y[:, None].to(tl.int64) * cols + x[None, :]
        inside = (y[:, None] < rows) & (x[None, :] < cols)
        scale = tl.load(scales + tl.program_id(0) * tl.cdiv(cols, SIZE) + tl.program_id(1))
        code = tl.load(src + at, mask=inside).to(tl.float32)
        tl.store(dst + at, (code * scale).to(dst.dtype.element_ty), mask=inside)

    @triton.jit
    def gptq4(src, zeros, scales, dst, rows, cols, group, K: tl.constexpr, N: tl.constexpr):
        """A tile of N rows and K columns of the result: a group has all of these columns."""
        k = tl.program_id(0) * K + tl.arange(0, K)
        n = tl.program_id(1) * N + tl.arange(0, N)
        j = tl.program_id(0) * K // group
        word = tl.load(src + (k[None, :] // 8).to(tl.int64) * rows + n[:, None], mask=n[:, None] < rows)
        zero = (tl.load(zeros + j * (rows // 8) + n // 8, mask=n < rows) >> n % 8 * 4 & 15) + 1
        scale = tl.load(scales + j * rows + n, mask=n < rows).to(tl.float32)
        value = ((word >> k[None, :] % 8 * 4 & 15) - zero[:, None]).to(tl.float32) * scale[:, None]
        tl.store(dst + n[:, None].to(tl.int64) * cols + k[None, :], value.to(dst.dtype.element_ty),
                 mask=n[:, None] < rows)

    def run_gptq4(src, zeros, scales, dst, group):
        grid = (dst.shape[1] // 64, triton.cdiv(dst.shape[0], 64))
        gptq4[grid](src, zeros, scales, dst, dst.shape[0], dst.shape[1], group, K=64, N=64)

    def run_cast(src, dst):
        cast[(triton.cdiv(src.numel(), 1024),)](src, dst, src.numel(), SIZE=1024)

    def run_dequant(src, scales, dst):
        grid = (triton.cdiv(src.shape[0], BLOCK), triton.cdiv(src.shape[1], BLOCK))
        dequant[grid](src, scales, dst, src.shape[0], src.shape[1], SIZE=BLOCK)

    return {"version": triton.__version__, "cast": run_cast, "dequant": run_dequant, "gptq4": run_gptq4}


# ---- Cases ----

class Case:
    """A conversion: `make(bytes)` gives the buffers of one set, `run(set)` does it. The buffers are what is timed."""

    def __init__(self, by, kernel, src, dst, make, run, variant="", traffic=None, expect=None):
        self.by, self.kernel, self.src, self.dst, self.variant = by, kernel, src, dst, variant
        self.make, self.run, self.traffic, self.expect = make, run, traffic, expect
        self.name = f"{kernel} {src}->{dst}" + (f" {variant}" if variant else "")


class Cases:
    def __init__(self, torch, device, bytes_):
        self.torch, self.device, self.bytes = torch, device, bytes_
        self.types = torch_dtypes(torch)
        self.bits = self.random(16 * MIB + 8)

    def random(self, size):
        return self.torch.randint(0, 256, (size,), dtype=self.torch.uint8, device=self.device)

    def source(self, dtype, count):
        """Random bits."""
        size = count * self.size(dtype)
        return self.bits[:16 * MIB].repeat(-(-size // (16 * MIB)))[:size].view(self.types[dtype])

    def empty(self, dtype, *shape):
        return self.torch.empty(shape, dtype=self.types[dtype], device=self.device)

    def size(self, dtype):
        return self.types[dtype].itemsize

    def count(self, src, dst):
        return self.bytes // (self.size(src) + self.size(dst)) // 64 * 64

    def matrix(self, src, dst, unit=1):
        return max(self.bytes // (self.size(src) + self.size(dst)) // COLS // unit, 1) * unit, COLS

    @staticmethod
    def copy(s):
        s["dst"].copy_(s["src"])

    def flat(self, src, dst):
        n = self.count(src, dst)
        return lambda: {"src": self.source(src, n), "dst": self.empty(dst, n)}

    def casts(self):
        for src in FLOATS:
            for dst in FLOATS:
                if src != dst:
                    yield Case("torch", "cast", src, dst, self.flat(src, dst), self.copy)

    def realign(self):
        n = self.count("U8", "U8")

        def make():
            return {"src": self.source("U8", n + 8)[1:n + 1], "dst": self.empty("U8", n)}
        yield Case("torch", "realign", "U8", "U8", make, self.copy, "from byte 1")

    def slices(self):
        for src, dst in (("BF16", "BF16"), ("F8_E4M3", "F8_E4M3"), ("F32", "F32"), ("BF16", "F16"), ("F8_E4M3", "BF16"),
                         ("F32", "BF16")):
            cols = 512 // self.size(src)
            rows = self.count(src, dst) // cols

            def make(src=src, dst=dst, cols=cols, rows=rows):
                whole = self.source(src, rows * cols * 4).view(rows, cols * 4)
                return {"src": whole[:, :cols], "dst": self.empty(dst, rows, cols)}
            yield Case("torch", "slice", src, dst, make, self.copy, "rows of 512 B")

    def transposes(self):
        for src, dst in (("BF16", "BF16"), ("F8_E4M3", "F8_E4M3"), ("F32", "F32"), ("BF16", "F16"), ("F32", "BF16")):
            rows, cols = self.matrix(src, dst)

            def make(src=src, dst=dst, rows=rows, cols=cols):
                return {"src": self.source(src, rows * cols).view(rows, cols).t(), "dst": self.empty(dst, cols, rows)}
            yield Case("torch", "transpose", src, dst, make, self.copy)

    def scales(self, rows, cols):
        return self.torch.rand(rows, cols, dtype=self.torch.float32, device=self.device) + 0.5

    def dequants(self, kernels):
        src, dst = "F8_E4M3", "BF16"
        rows, cols = self.matrix(src, dst, BLOCK)
        blocks = (rows // BLOCK, cols // BLOCK)

        def make(shape):
            return {"src": self.source(src, rows * cols).view(rows, cols), "dst": self.empty(dst, rows, cols),
                    "scales": self.scales(*shape)}

        def scaled(s):
            s["dst"].copy_(s["src"].to(self.torch.float32) * s["scales"])

        def blockwise(s):
            code = s["src"].to(self.torch.float32).view(blocks[0], BLOCK, blocks[1], BLOCK)
            s["dst"].copy_((code * s["scales"][:, None, :, None]).view(rows, cols))
        traffic = rows * cols * 3
        yield Case("torch", "scale_tensor", src, dst, lambda: make((1, 1)), scaled, "x F32", traffic + 4)
        yield Case("torch", "scale_row", src, dst, lambda: make((rows, 1)), scaled, "x F32", traffic + 4 * rows)
        by_block = traffic + 4 * blocks[0] * blocks[1]
        yield Case("torch", "scale_block", src, dst, lambda: make(blocks), blockwise, "x F32", by_block)
        if kernels:
            yield Case("triton", "scale_block", src, dst, lambda: make(blocks),
                       lambda s: kernels["dequant"](s["src"], s["scales"], s["dst"]), "x F32", by_block, blockwise)

    def packed_matrices(self, kernels):
        """Integers of 4 bits in words, 14336 columns, groups of 128."""
        torch, src, cols, group = self.torch, "I32", 14336, 128
        for dst, scale, kernel in (("BF16", "F16", "gptq"), ("F16", "F16", "gptq"), ("BF16", "F16", "awq"),
                                   ("BF16", "BF16", "packed")):
            size, groups = self.size(dst), cols // group
            rows = max(self.bytes * 2 // (2 * size + 1) // cols // 32 * 32, 32)
            flat = kernel == "packed"
            shapes = {"gptq": ((cols // 8, rows), (groups, rows // 8)), "awq": ((cols, rows // 8), (groups, rows // 8)),
                      "packed": ((rows, cols // 8), (0, 0))}[kernel]

            def make(dst=dst, scale=scale, rows=rows, groups=groups, flat=flat, shapes=shapes):
                scales = self.scales(*((rows, groups) if flat else (groups, rows))).to(self.types[scale])
                (a, b), (c, d) = shapes
                return {"src": self.source(src, a * b).view(a, b), "zeros": self.source(src, c * d + 1)[:-1].view(c, d),
                        "scales": scales, "dst": self.empty(dst, rows, cols)}

            def eager(s, kernel=kernel):
                if kernel == "packed":
                    s["dst"].copy_(packed(torch, s["src"], s["scales"], group))
                else:
                    s["dst"].copy_((gptq if kernel == "gptq" else awq)(torch, s["src"], s["zeros"], s["scales"], group))
            scale_bytes = rows * groups * 2
            traffic = rows * cols // 2 + rows * cols * size + scale_bytes + (0 if flat else scale_bytes // 4)
            variant = f"4 bits x {scale} by {group}"
            yield Case("torch", f"dequant_{kernel}", src, dst, make, eager, variant, traffic)
            if kernels and kernel == "gptq":
                yield Case("triton", "dequant_gptq", src, dst, make,
                           lambda s: kernels["gptq4"](s["src"], s["zeros"], s["scales"], s["dst"], group), variant, traffic,
                           eager)

    def four_bits(self):
        """Two codes of a table in a byte."""
        torch, dst = self.torch, "BF16"
        for kernel, cols, group, table, variant in (("dequant_mxfp4", 2880, 32, E2M1, "x F8_E8M0 by 32"),
                                                    ("dequant_bnb_nf4", COLS, 64, NF4, "x F32 by 64")):
            rows = max(self.bytes * 2 // 5 // cols, 1)
            nf4 = kernel == "dequant_bnb_nf4"

            def make(rows=rows, cols=cols, group=group, nf4=nf4):
                count = rows * cols // group
                scales = self.scales(count, 1) if nf4 else self.source("U8", count) // 16 + 120
                return {"src": self.source("U8", rows * cols // 2), "scales": scales, "dst": self.empty(dst, rows, cols)}

            def run(s, group=group, table=table, nf4=nf4):
                scales = s["scales"] if nf4 else torch.exp2(s["scales"].float() - 127)
                s["dst"].view(-1, group).copy_(four_bits(torch, s["src"], table, scales, group, nf4))
            traffic = rows * cols * 5 // 2 + rows * cols // group * (4 if nf4 else 1)
            yield Case("torch", kernel, "F4", dst, make, run, variant, traffic)

    def quantizes(self):
        src, dst, torch = "BF16", "F8_E4M3", self.torch
        rows, cols = self.matrix(src, dst)

        def make():
            source = torch.randn(rows, cols, device=self.device).to(torch.bfloat16)
            return {"src": source, "dst": self.empty(dst, rows, cols)}

        def run(s):
            x = s["src"].to(torch.float32)
            scale = x.abs().amax(dim=1, keepdim=True) / 448.0
            s["dst"].copy_((x / scale).clamp(-448, 448))
        yield Case("torch", "quantize_row", src, dst, make, run, "", rows * cols * 3 + 4 * rows)

    def triton_casts(self, kernels):
        for src, dst in (("F8_E4M3", "BF16"), ("BF16", "F16"), ("F32", "BF16"), ("BF16", "F8_E4M3")):
            yield Case("triton", "cast", src, dst, self.flat(src, dst),
                       lambda s: kernels["cast"](s["src"], s["dst"]), expect=self.copy)

    def all(self, kernels):
        found = [*self.casts(), *self.realign(), *self.slices(), *self.transposes(), *self.dequants(kernels),
                 *self.packed_matrices(kernels), *self.four_bits(), *self.quantizes()]
        return found + ([*self.triton_casts(kernels)] if kernels else [])


# ---- Timing ----

class Clock:
    def __init__(self, torch, device):
        self.torch, self.cuda = torch, device == "cuda"

    def now(self):
        if not self.cuda:
            return time.perf_counter() * 1e3
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a, b):
        return a.elapsed_time(b) if self.cuda else b - a

    def wait(self):
        if self.cuda:
            self.torch.cuda.synchronize()


def copy_half(torch, device, traffic, footprint):
    """Buffers of a copy that moves as many bytes in total."""
    half = traffic // 2
    sets = max(2, footprint // traffic + 1)
    return [tuple(torch.empty(half, dtype=torch.uint8, device=device).fill_(i) for i in (1, 2))
            for _ in range(min(sets, 64))]


def measure(torch, device, case, runs):
    footprint = (512 if device == "cuda" else 384) * MIB
    sets = [case.make()]
    s = sets[0]
    traffic = case.traffic or s["src"].numel() * s["src"].itemsize + s["dst"].numel() * s["dst"].itemsize
    while len(sets) < max(2, min(64, footprint // traffic + 1)):
        sets.append(case.make())
    copies = copy_half(torch, device, traffic, footprint)
    clock = Clock(torch, device)
    launches = 1
    for s in sets:  # no page is touched for the first time while the clock runs
        s["dst"].view(torch.uint8).fill_(0)
    for round_ in range(2):  # the first one warms up, and says how long it takes
        marks = [clock.now()]
        turn = 0
        for _ in range(runs if round_ else 3):
            for i in range(launches):
                copies[(turn + i) % len(copies)][1].copy_(copies[(turn + i) % len(copies)][0])
            marks.append(clock.now())
            for i in range(launches):
                case.run(sets[(turn + i) % len(sets)])
            marks.append(clock.now())
            turn += launches
        clock.wait()
        times = [clock.between(a, b) / launches for a, b in zip(marks, marks[1:])]
        copy_ms, ms = statistics.median(times[0::2]), statistics.median(times[1::2])
        if device == "cuda":
            launches = min(64, int(0.1 / copy_ms) + 1)
    ok = True
    if case.expect:
        got = sets[0]["dst"].clone()
        case.expect(sets[0])
        ok = bool(torch.equal(torch.nan_to_num(got.float()), torch.nan_to_num(sets[0]["dst"].float())))
    return {"by": case.by, "kernel": case.kernel, "src": case.src, "dst": case.dst, "variant": case.variant,
            "bytes_moved": traffic, "ms": round(ms, 6), "gb_per_s": round(traffic / ms / 1e6, 3),
            "share_of_copy": round(copy_ms / ms, 4), "copy_ms": round(copy_ms, 6), "ok": ok}


def ours(bench, device, bytes_, runs, case):
    """bench_convert's whole file, and in it the result of the same case."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "ours.json")
        done = subprocess.run([bench, "--device", "cpu" if device == "cpu" else "0", "--bytes", str(bytes_),
                               "--runs", str(runs), "--filter", case.name, "--json", path],
                              stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(f"peers_convert: {bench} failed for {case.name}")
        with open(path, encoding="utf-8") as file:
            out = json.load(file)
    for r in out["results"]:
        if (r["kernel"], r["src"], r["dst"], r["variant"]) == (case.kernel, case.src, case.dst, case.variant):
            return out, {"by": "fst", **r}
    sys.exit(f"peers_convert: {bench} has no {case.name}")


def run_measure(options):
    import torch
    torch.set_num_threads(1)
    device = options.device
    bytes_ = options.bytes or (256 if device == "cuda" else 64) * MIB
    kernels = triton_kernels() if device == "cuda" else None
    results, seen, head = [], set(), {}
    for case in Cases(torch, device, bytes_).all(kernels):
        if options.filter not in case.name:
            continue
        if options.bench and case.name not in seen:
            head, result = ours(options.bench, device, bytes_, options.runs, case)
            results.append(result)
        seen.add(case.name)
        try:
            results.append(measure(torch, device, case, options.runs))
        except (RuntimeError, NotImplementedError) as error:  # a pair that the peer does not have
            results.append({"by": case.by, "kernel": case.kernel, "src": case.src, "dst": case.dst,
                            "variant": case.variant, "error": str(error).splitlines()[0]})
        print(case.name, *(f"{r['by']} {r.get('gb_per_s', r.get('error'))}" for r in results[-2:]), flush=True)
    copies = [r["gb_per_s"] / r["share_of_copy"] for r in results if r["by"] == "torch" and r.get("share_of_copy")]
    out = {"machine": head.get("machine", options.machine or "unknown"),
           "device": head.get("device", "cuda:0" if device == "cuda" else "cpu"),
           "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
           "commit": head.get("commit", "unknown"), "torch": torch.__version__,
           "triton": kernels["version"] if kernels else None, "threads": None if device == "cuda" else 1, "bytes": bytes_,
           "copy_gb_per_s": round(statistics.median(copies), 3) if copies else None, "results": results}
    with open(options.json, "w", encoding="utf-8") as file:
        rows = ",\n".join("    " + json.dumps(r) for r in results)
        text = json.dumps({**out, "results": []}, indent=2)
        file.write(text.replace('"results": []', f'"results": [\n{rows}\n  ]') + "\n")


# ---- The table ----

def cell(r):
    if not r:
        return "–"
    return f"{r['gb_per_s']:,.1f} ({r['share_of_copy']:.2f})" if "gb_per_s" in r else "none"


def run_table(options):
    cases = {}  # the case -> {who: its result in the largest size}
    for path in options.files:
        with open(path, encoding="utf-8") as file:
            for r in json.load(file)["results"]:
                key = (r["kernel"], r["src"], r["dst"], r.get("variant", ""))
                mine = cases.setdefault(key, {})
                by = r.get("by", "fst")
                if r.get("bytes", 0) >= mine.get(by, {}).get("bytes", 0):
                    mine[by] = r
    peers = [p for p in ("torch", "triton") if any(p in c for c in cases.values())]
    print("| " + " | ".join(["kernel", "from", "to", "", "fst", *peers, *(f"fst / {p}" for p in peers)]) + " |")
    print("|---|---|---|---|" + "---:|" * (1 + 2 * len(peers)))
    for key, who in cases.items():
        if "fst" not in who or len(who) < 2:
            continue
        ratios = (f"{who['fst']['gb_per_s'] / who[p]['gb_per_s']:.2f}" if "gb_per_s" in who.get(p, {}) else "–"
                  for p in peers)
        print("| " + " | ".join([*key, cell(who["fst"]), *(cell(who.get(p)) for p in peers), *ratios]) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--device", choices=("cpu", "cuda"), required=True)
    one.add_argument("--bench", help="bench_convert, to run beside")
    one.add_argument("--bytes", type=int, default=0, help="of traffic: 256 MiB on a GPU, 64 MiB on the CPU")
    one.add_argument("--runs", type=int, default=21)
    one.add_argument("--filter", default="", help="only cases with this text in their name")
    one.add_argument("--machine", help="for the JSON, when there is no --bench to ask")
    one.add_argument("--json", required=True)
    two = commands.add_parser("table")
    two.add_argument("files", nargs="+")
    options = parser.parse_args()
    if options.command == "measure":
        run_measure(options)
    else:
        run_table(options)


if __name__ == "__main__":
    main()
