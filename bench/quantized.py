#!/usr/bin/env python3
"""Loads of quantized checkpoints, dequantized to BF16, beside the load of the same bytes as stored; and what is usual instead:
safetensors onto the device, then PyTorch's arithmetic, tensor by tensor.

    quantized.py --bench BENCH_LOAD --dir DIR [--formats fp8,mxfp4,gptq] [--bytes 8e9] [--files 4] [--device cpu|N]
                 [--runs 5] [--peer auto|no] [--json FILE]

Checkpoints are made below DIR by tests/oracle/checkpoint.py, unless they are there, and stay. Both loads are bench_load's warm
ones, in turns, medians; `times_as_stored` is the quotient of their seconds. bench_load compares the results with the CPU
device's. The peer needs torch and safetensors; without them its entry says why there is none.
"""
import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import peers_convert

HERE = pathlib.Path(__file__).resolve().parent
ORACLE = HERE.parent / "tests" / "oracle"
ASKED = {"fp8": 1.05, "mxfp4": 1.10, "gptq": 1.10}
GROUP = 128


def generate(name, args):
    folder = os.path.join(args.dir, name)
    if not os.path.exists(os.path.join(folder, "model.safetensors.index.json")):
        subprocess.run([sys.executable, ORACLE / "checkpoint.py", name, folder, "--bytes",
                        str(args.bytes), "--files", str(args.files)], check=True)
    return folder


def measure(folder, args):
    """bench_load's JSON."""
    out = os.path.join(args.dir, "quantized.json")
    done = subprocess.run([args.bench, "--device", args.device, "--runs", str(args.runs), "--cast", "BF16", "--json", out, folder],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    with open(out) as file:
        found = json.load(file)
    os.unlink(out)
    wrong = "" if "are right, byte for byte" in done.stdout else "results were not compared or are wrong"
    return found, wrong


# ---- What is usual ----

def dequantize_fp8(_, tensors, name):
    from fp8_cast_bf16 import dequantize
    return dequantize(tensors[name], tensors.pop(name + "_scale_inv"))


def dequantize_mxfp4(torch, tensors, name):
    """Each code is a row of a table, times a power of two."""
    blocks, scales = tensors[name], tensors.pop(name.removesuffix("_blocks") + "_scales")
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(half + [-x for x in half], dtype=torch.bfloat16, device=blocks.device)
    out = torch.empty(*blocks.shape[:-1], 32, dtype=torch.bfloat16, device=blocks.device)
    exponents = scales.int().sub_(127).unsqueeze(-1)
    for i in range(blocks.shape[0]):  # by expert, as the whole would take many times its memory
        out[i, ..., 0::2] = table[(blocks[i] & 15).int()]
        out[i, ..., 1::2] = table[(blocks[i] >> 4).int()]
        out[i] = torch.ldexp(out[i], exponents[i])
    return out.view(*blocks.shape[:2], -1)


def dequantize_gptq(torch, tensors, name):
    stem = name.removesuffix("qweight")
    zeros, scales = tensors.pop(stem + "qzeros"), tensors.pop(stem + "scales")
    tensors.pop(stem + "g_idx")
    return peers_convert.gptq(torch, tensors[name], zeros, scales, GROUP).bfloat16().contiguous()


def quantized_names(name, keys):
    if name == "fp8":
        return [k for k in keys if k + "_scale_inv" in keys]
    return [k for k in keys if k.endswith({"mxfp4": "_blocks", "gptq": ".qweight"}[name])]


def load_peer(torch, load_file, name, folder, device):
    dequantize = {"fp8": dequantize_fp8, "mxfp4": dequantize_mxfp4, "gptq": dequantize_gptq}[name]
    tensors = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors.update(load_file(path, device=device))
    for key in quantized_names(name, set(tensors)):
        tensors[key] = dequantize(torch, tensors, key)
    if device != "cpu":
        torch.cuda.synchronize()


def measure_peer(name, folder, args):
    if args.peer == "no":
        return {"seconds": None, "why": "not asked for"}
    try:
        import safetensors.torch
        import torch
    except ImportError as error:
        return {"seconds": None, "why": str(error)}
    sys.path.append(str(ORACLE))
    device, seconds = "cpu" if args.device == "cpu" else f"cuda:{args.device}", []
    for _ in range(1 + min(args.runs, 3)):
        start = time.perf_counter()
        load_peer(torch, safetensors.torch.load_file, name, folder, device)
        seconds.append(time.perf_counter() - start)
        if device != "cpu":
            torch.cuda.empty_cache()
    return {"seconds": round(statistics.median(seconds[1:]), 4), "torch": torch.__version__, "safetensors": safetensors.__version__}


def line(entry):
    peer = entry["peer"]["seconds"]
    times = f"{peer / entry['seconds']:.1f} times as long" if peer else "none: " + entry["peer"]["why"]
    return (f"{entry['format']}: {entry['bytes'] / 1e9:.2f} GB in {entry['seconds']:.3f} s, {entry['gb_per_s']:.1f} GB/s read; "
            f"{entry['times_as_stored']:.3f} of as stored (asked for: {entry['asked_for']}); torch: {times}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--formats", default=",".join(ASKED))
    parser.add_argument("--bytes", type=float, default=8e9)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--device", default="0")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", choices=("auto", "no"), default="auto")
    parser.add_argument("--json")
    args = parser.parse_args()
    unknown = [name for name in args.formats.split(",") if name not in ASKED]
    if unknown:
        parser.error(f"no such format: {unknown[0]}")
    os.makedirs(args.dir, exist_ok=True)
    entries, head, failed = [], None, False
    for name in args.formats.split(","):
        folder = generate(name, args)
        found, wrong = measure(folder, args)
        runs = {run["case"]: run for run in found["runs"]}
        stored, cast = runs["warm as is"], runs["warm to BF16"]
        head = head or {key: found[key] for key in ("machine", "device", "commit")}
        entries.append({"format": name, "bytes": found["bytes"], "seconds": cast["seconds"], "gb_per_s": cast["gb_per_s"],
                        "share_of_ceiling": cast["share_of_ceiling"], "as_stored_seconds": stored["seconds"],
                        "as_stored_gb_per_s": stored["gb_per_s"],
                        "times_as_stored": round(cast["seconds"] / stored["seconds"], 4), "asked_for": ASKED[name],
                        "bytes_out": cast["bytes_out"], "bytes_read": cast["bytes_read"],
                        "peak_beyond_results": cast["peak_beyond_results"], "right": not wrong, "doubts": found["doubts"],
                        "ceilings": found["ceilings"], "peer": measure_peer(name, folder, args)})
        failed = failed or bool(wrong)
        print(line(entries[-1]) + (f"; {wrong}" if wrong else ""), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**head, "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "results": entries},
                      file, indent=1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
