#!/usr/bin/env python3
"""`fst convert` of a checkpoint directory in block FP8 to BF16 on the CPU, beside a PyTorch script that does the same
(tests/oracle/fp8_cast_bf16.py, what DeepSeek's fp8_cast_bf16.py does).

    convert_dir.py --fst build/release/bin/fst [--bytes 4e9] [--files 8] [--rounds 3] [--tmpfs /dev/shm] [--cpus 2]
                   [--json FILE]

The checkpoint is generated (tests/oracle/checkpoint.py fp8) and lies on tmpfs, as do the results. Both sides take turns, each
in a process of its own, on the same CPUs; a result is removed at once. Seconds are of the whole process for
both, imports included, and, `work_seconds`, as each says itself: without Python's start and imports. Memory is the
process's most resident set; `anonymous_bytes` is the part of it, sampled, that no file is behind. After the first
round the tensors of both results are compared, byte for byte.
"""
import argparse
import datetime
import hashlib
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ORACLE = HERE.parent / "tests" / "oracle"
INDEX = "model.safetensors.index.json"


def anonymous(process):
    try:
        with open(f"/proc/{process}/status") as file:
            lines = dict(line.split(":", 1) for line in file if line.startswith("Rss"))
        return int(lines["RssAnon"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0


def run(command):
    """Seconds, CPU seconds, memory, and the last line, which is JSON."""
    start, most = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    done = threading.Event()

    def sample():
        nonlocal most
        while not done.wait(0.01):
            most = max(most, anonymous(process.pid))

    thread = threading.Thread(target=sample)
    thread.start()
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    if status:
        sys.exit(f"{command[0]} failed: {status}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_host_bytes": usage.ru_maxrss * 1024,
            "anonymous_bytes": most, "said": json.loads(out.splitlines()[-1])}


def digests(folder):
    """Of each tensor: dtype, shape, and a hash of its bytes, where the index says it is."""
    weight_map = json.loads((pathlib.Path(folder) / INDEX).read_text())["weight_map"]
    found = {}
    for name in sorted(set(weight_map.values())):
        with open(os.path.join(folder, name), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for key, tensor in header.items():
                if key == "__metadata__":
                    continue
                begin, end = tensor["data_offsets"]
                file.seek(8 + size + begin)
                digest = hashlib.blake2b(file.read(end - begin)).hexdigest()
                found[key] = (weight_map[key] == name, tensor["dtype"], tensor["shape"], digest)
    return found


def available():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def commit():
    done = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def report(runs, out_bytes):
    sides = {}
    for side in ("fst", "torch"):
        mine = [r for r in runs if r["side"] == side]
        sides[side] = {"seconds": statistics.median(r["seconds"] for r in mine),
                       "work_seconds": statistics.median(r["said"]["seconds"] for r in mine),
                       "cpu_seconds": statistics.median(r["cpu_seconds"] for r in mine),
                       "peak_host_bytes": max(r["peak_host_bytes"] for r in mine),
                       "anonymous_bytes": max(r["anonymous_bytes"] for r in mine),
                       "all_seconds": [round(r["seconds"], 3) for r in mine],
                       "all_work_seconds": [round(r["said"]["seconds"], 3) for r in mine],
                       "load_averages": [r["load_average"] for r in mine]}
        sides[side]["gb_per_s"] = out_bytes / sides[side]["seconds"] / 1e9
    return sides


def measure(args, folder):
    source, targets = os.path.join(folder, "in"), {side: os.path.join(folder, side) for side in ("fst", "torch")}
    subprocess.run([sys.executable, ORACLE / "checkpoint.py", "fp8", source, "--bytes", str(args.bytes), "--files",
                    str(args.files)], check=True)
    commands = {"fst": [args.fst, "convert", "--device", "cpu", "--cast", "bf16", "--json", "-o", targets["fst"], source],
                "torch": [sys.executable, str(ORACLE / "fp8_cast_bf16.py"), source, targets["torch"]]}
    runs, results = [], {}
    for i in range(args.rounds):
        for side in ("fst", "torch") if i % 2 == 0 else ("torch", "fst"):
            load = os.getloadavg()[0]
            runs.append({"side": side, "load_average": round(load, 2), **run(commands[side])})
            if side not in results:
                results[side] = digests(targets[side])
            shutil.rmtree(targets[side])
            print(f"{side}: {runs[-1]['seconds']:.2f} s, load average {load:.2f}", file=sys.stderr)
    in_bytes = sum(p.stat().st_size for p in pathlib.Path(source).iterdir())
    a, b = results["fst"], results["torch"]
    return runs, sorted(name for name in {*a, *b} if a.get(name) != b.get(name)), in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fst", required=True)
    parser.add_argument("--bytes", type=float, default=4e9)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tmpfs", default="/dev/shm")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    if available() < 4 * args.bytes + (2 << 30):
        parser.error("tmpfs is memory: the checkpoint, its result and what converts it do not fit")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cpus])
    folder = tempfile.mkdtemp(prefix="fst-convert-", dir=args.tmpfs)
    try:
        runs, wrong, in_bytes = measure(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    out_bytes = runs[0]["said"].get("bytes_out", 0)
    sides = report(runs, out_bytes)
    import safetensors
    import torch
    result = {"machine": machine(), "device": "cpu", "cpus": args.cpus,
              "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": commit(),
              "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__},
              "case": "block FP8 to BF16, directory to directory, on tmpfs", "bytes_in": in_bytes, "bytes_out": out_bytes,
              "rounds": args.rounds, "same_bytes": not wrong, "different": wrong, **sides,
              "ratio": sides["torch"]["seconds"] / sides["fst"]["seconds"],
              "work_ratio": sides["torch"]["work_seconds"] / sides["fst"]["work_seconds"]}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        pathlib.Path(args.json).write_text(text + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
