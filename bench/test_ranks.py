#!/usr/bin/env python3
"""What ranks ask of the files, and what all of them together cause to be read from storage; and bench/ranks.py as a program.

    test_ranks.py --bench BENCH_LOAD --fst FST --fake LOAD_FAKE --nccl FAKE_LIBNCCL

LOAD_FAKE is bench_load with a GPU of host memory; FAKE_LIBNCCL (tests/nccl/between_processes.c) passes parts between processes.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import peers  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
args = None
folder = None

# Which dimension a Llama's tensors are cut along, among ranks that work together (Megatron's scheme).
DIMENSIONS = [(r"\.(q|k|v|gate|up)_proj\.weight$", 0), (r"\.(o|down)_proj\.weight$", 1),
              (r"(^|\.)(embed_tokens|lm_head)\.weight$", 0)]


def dimension(name):
    return next((dim for pattern, dim in DIMENSIONS if re.search(pattern, name)), None)


def setUpModule():
    global folder
    folder = tempfile.TemporaryDirectory(prefix="fst-bench-ranks-")
    sys.dont_write_bytecode = True


def tearDownModule():
    folder.cleanup()


def llama(width, middle, heads, vocabulary, layers):
    """Name -> shape."""
    shapes = {"model.embed_tokens.weight": [vocabulary, width]}
    for i in range(layers):
        parts = {"input_layernorm": [width], "self_attn.q_proj": [width, width], "self_attn.k_proj": [heads, width],
                 "self_attn.v_proj": [heads, width], "self_attn.o_proj": [width, width], "post_attention_layernorm": [width],
                 "mlp.gate_proj": [middle, width], "mlp.up_proj": [middle, width], "mlp.down_proj": [width, middle]}
        shapes.update({f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()})
    shapes["model.norm.weight"] = [width]
    shapes["lm_head.weight"] = [vocabulary, width]
    return shapes


def size_of(shape):
    count = 2
    for extent in shape:
        count *= extent
    return count


def write(path, shapes):
    """BF16, of random bytes. Returns name -> bytes."""
    at, header, data = 0, {}, {}
    for name, shape in shapes.items():
        data[name] = os.urandom(size_of(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + len(data[name])]}
        at += len(data[name])
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in data.values():
            file.write(piece)
    return data


def part(shape, dim, rank, ranks):
    """torch.chunk's: [begin, end)."""
    each = -(-shape[dim] // ranks)
    return min(rank * each, shape[dim]), min((rank + 1) * each, shape[dim])


def needed(shapes, rank, ranks):
    """A rank's part and what all have, in bytes."""
    total = 0
    for name, shape in shapes.items():
        dim = dimension(name)
        begin, end = (0, 1) if dim is None else part(shape, dim, rank, ranks)
        total += size_of(shape) * (end - begin) // (1 if dim is None else shape[dim])
    return total


def cut(data, shape, dim, begin, end):
    """The bytes of a part of a matrix of BF16."""
    row = 2 * shape[1]
    if dim == 0:
        return data[begin * row:end * row]
    return b"".join(data[at + 2 * begin:at + 2 * end] for at in range(0, len(data), row))


def load(path, rank, ranks, read):
    done = subprocess.run([args.fst, "load", "--json", "--device", "cpu", "--tp", f"{rank}/{ranks}", "--read", read, path],
                          capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise AssertionError(done.stderr)
    return json.loads(done.stdout)


class Bytes(unittest.TestCase):
    """Counted, from the header alone: docs/shards.md's table has nothing to do with it."""

    def setUp(self):
        # The second: nothing is a multiple of anything, and rows of down_proj are cut within 32 bytes.
        self.models = {"even": llama(512, 1792, 128, 4000, 2), "odd": llama(387, 1031, 131, 1009, 2)}
        self.paths = {name: os.path.join(folder.name, name + ".safetensors") for name in self.models}
        self.data = {name: write(self.paths[name], shapes) for name, shapes in self.models.items()}

    def test_each_rank_asks_for_its_part(self):
        for name, shapes in self.models.items():
            path = self.paths[name]
            header = os.path.getsize(path) - sum(map(size_of, shapes.values()))
            for ranks in (2, 4, 8):
                for rank in range(ranks):
                    with self.subTest(name, ranks=ranks, rank=rank):
                        want = needed(shapes, rank, ranks)
                        exact, auto = (load(path, rank, ranks, read) for read in ("exact", "auto"))
                        for out in (exact, auto):
                            self.assertEqual((want, want), (out["bytes_needed"], out["bytes_out"]))
                            self.assertGreaterEqual(out["bytes_read"] - header, want)
                        self.assertLessEqual(exact["bytes_read"] - header, 1.02 * want)
                        self.assertLessEqual(auto["bytes_read"] - header, 2 * want)

    def test_all_ranks_together_have_everything(self):
        """And each just what is its own."""
        name, ranks = "odd", 4
        shapes, data, out = self.models[name], self.data[name], os.path.join(folder.name, "part.safetensors")
        covered = dict.fromkeys(shapes, 0)
        for rank in range(ranks):
            done = subprocess.run([args.fst, "convert", "--device", "cpu", "--tp", f"{rank}/{ranks}", "-o", out, self.paths[name]],
                                  capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual(0, done.returncode, done.stderr)
            header = peers.read_header(out)
            self.assertEqual(set(shapes), set(header))
            with open(out, "rb") as file:
                whole = file.read()
            for tensor, (_, shape, at, nbytes) in header.items():
                dim, got = dimension(tensor), whole[at:at + nbytes]
                if dim is None:
                    self.assertEqual(data[tensor], got, tensor)
                    continue
                begin, end = part(shapes[tensor], dim, rank, ranks)
                self.assertEqual(end - begin, shape[dim], tensor)
                self.assertEqual(cut(data[tensor], shapes[tensor], dim, begin, end), got, tensor)
                self.assertEqual(covered[tensor], begin)
                covered[tensor] = end
        for tensor, shape in shapes.items():
            if dimension(tensor) is not None:
                self.assertEqual(shape[dimension(tensor)], covered[tensor], tensor)


class Cold(unittest.TestCase):
    def why_not(self, path):
        """Why reading from storage cannot be counted here; None: it can. Leaves the file cold."""
        if peers.in_memory(path):
            return "the files are in memory: nothing is ever read from storage"
        peers.drop_caches([path], "advise")
        if peers.cached_share([path]) != 0:
            return "what was dropped (fadvise) stays in the page cache here"
        before = read_bytes()
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        counted = None if before is None else read_bytes() - before
        if counted is None or counted < os.path.getsize(path) * 0.98:
            return f"of {os.path.getsize(path)} cold bytes that were read, the system counts {counted} as read from storage"
        peers.drop_caches([path], "advise")
        return None

    def test_files_are_read_once_by_all_ranks_together(self):
        path = os.path.join(folder.name, "cold.safetensors")
        write(path, llama(1024, 3584, 256, 4096, 2))
        size = os.path.getsize(path)
        why = self.why_not(path)
        if why:
            self.skipTest(why)
        for ranks in (2, 4):
            for case in ("warm tp exact", "warm tp auto"):  # by name; nobody warms it
                with self.subTest(case, ranks=ranks):
                    answers = self.load_together(path, ranks, case)
                    read = sum(a["disk_bytes"] for a in answers)
                    self.assertLessEqual(read, 1.05 * size)
                    self.assertGreaterEqual(read, 0.95 * size)  # it was cold

    def load_together(self, path, ranks, case):
        processes = [subprocess.Popen([args.bench, "--turns", "--device", "cpu", "--tp", f"{rank}/{ranks}", "--read", "exact",
                                       "--read", "auto", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                     for rank in range(ranks)]
        try:
            for process in processes:
                self.assertIn(case, json.loads(process.stdout.readline())["cases"])
            peers.drop_caches([path], "advise")
            self.assertEqual(0, peers.cached_share([path]))
            at = time.monotonic() + 0.05
            for process in processes:
                process.stdin.write(f"{case}\t{at}\n")
                process.stdin.flush()
            answers = [json.loads(process.stdout.readline()) for process in processes]
            for process in processes:
                said, _ = process.communicate(timeout=60)
                self.assertEqual(0, process.returncode)
                self.assertIn("are right", said)
            return answers
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def read_bytes():
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))
    except (OSError, StopIteration):
        return None


class Runs(unittest.TestCase):
    """bench/ranks.py as a program."""

    def run_it(self, *options, **environment):
        return subprocess.run([sys.executable, os.path.join(HERE, "ranks.py"), *map(str, options)], capture_output=True, text=True,
                              timeout=120, check=False, env={**os.environ, "TMPDIR": folder.name, **environment})


class Program(Runs):
    def setUp(self):
        self.path = os.path.join(folder.name, "small.safetensors")
        self.shapes = llama(256, 896, 64, 512, 2)
        write(self.path, self.shapes)
        self.json = os.path.join(folder.name, "out.json")

    def test_figures(self):
        done = self.run_it("--bench", args.bench, "--ranks", "2,3", "--runs", 2, "--cast", "f32", "--cold", "advise", "--json",
                           self.json, self.path)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        with open(self.json, encoding="utf-8") as file:
            out = json.load(file)
        self.assertEqual((["cpu"], os.path.getsize(self.path), "fadvise"), (out["devices"], out["bytes"], out["cold_by"]))
        warm = [f"{kind} {way}{cast}" for kind in ("tp", "rows") for way in ("exact", "auto") for cast in ("", " to F32")]
        self.assertEqual([(n, c) for n in (2, 3) for c in warm + ["cold tp exact", "cold tp auto"]] + [(1, "cold once")],
                         sorted(((r["ranks"], r["case"]) for r in out["runs"]), key=lambda r: r[0] == 1)[:-1])
        for r in out["runs"]:
            if r["ranks"] == 1:
                continue
            self.assertEqual(sum(needed(self.shapes, i, r["ranks"]) for i in range(r["ranks"])), r["bytes_needed"])
            self.assertAlmostEqual(r["bytes_needed"] / r["seconds"] / 1e9, r["needed_gb_per_s"], delta=0.01 * r["needed_gb_per_s"])
            if "alone_seconds" in r:
                self.assertEqual((2, 2), (len(r["all_seconds"]), len(r["all_alone_seconds"])))
                one = needed(self.shapes, 0, r["ranks"]) / r["alone_seconds"] / 1e9
                self.assertAlmostEqual(one, r["alone_needed_gb_per_s"], delta=0.01 * one)
        for result in out["results"]:
            self.assertEqual(set(warm), set(result["times_one"]))
            self.assertEqual({"tp", "tp to F32"}, set(result["mix_by_rows"]))
            for key in ("cold_by_once", "disk_by_files"):
                self.assertEqual({"cold tp exact", "cold tp auto", "cold tp shared"}, set(result[key]))
                self.assertIsNone(result[key]["cold tp shared"])
            self.assertEqual({"tp": None, "tp to F32": None, "rows": None, "rows to F32": None}, result["shared_by_own"])
            self.assertEqual("NCCL's communicators are for GPUs", result["shared"]["why_not"])
            self.assertTrue(all(value >= 1 for value in result["auto_by_faster"].values()))
        done = self.run_it("--table", self.json)
        self.assertEqual(0, done.returncode)
        self.assertIn("mix_by_rows (at least 0.85)", done.stdout)
        self.assertIn("2 ranks, shared reading was not measured, or not all of it: NCCL's communicators are for GPUs", done.stdout)

    def test_failures(self):
        done = self.run_it("--bench", args.bench, "--ranks", 2, "--devices", 99, self.path)
        self.assertEqual(1, done.returncode)
        self.assertRegex(done.stderr, "rank [01] of 2 ended with status 1: bench: no GPU 99")
        for bad in ([self.path], ["--bench", args.bench], ["--bench", args.bench, "--ranks", "0", self.path],
                    ["--bench", args.bench, "--devices", "gpu", self.path], ["--bench", args.bench, folder.name + "/none"],
                    ["--bench", args.bench, "--runs", "0", self.path], ["--bench", args.bench, "--limit", "0", self.path]):
            with self.subTest(bad):
                self.assertEqual(2, self.run_it(*bad).returncode)

    def test_a_rank_that_fails_later(self):
        done = self.run_it("--bench", args.fake, "--devices", 0, "--runs", 1, "--json", self.json, self.path, FST_FAKE="fourth")
        self.assertEqual(1, done.returncode)
        self.assertIn("of 2 ended with status 1: bench: ", done.stderr)
        with open(self.json, encoding="utf-8") as file:
            out = json.load(file)
        self.assertEqual((1, [], {"tp": None}), (len(out["doubts"]), out["runs"], out["results"][0]["mix_by_rows"]))

    def test_a_rank_that_says_nothing(self):
        silent = os.path.join(folder.name, "silent")
        with open(silent, "w", encoding="ascii") as file:
            file.write("#!/bin/sh\nexec sleep 60\n")
        os.chmod(silent, 0o755)
        done = self.run_it("--bench", silent, "--limit", 1, self.path)
        self.assertEqual(1, done.returncode)
        self.assertIn("rank 0 of 2 said nothing for 1 s, and was ended", done.stderr)


    def test_time_is_up(self):
        done = self.run_it("--bench", args.bench, "--runs", 9, "--seconds", 0, "--cold", "advise", "--json", self.json, self.path)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        with open(self.json, encoding="utf-8") as file:
            out = json.load(file)
        self.assertEqual((7, {1}, []), (len(out["runs"]), {run["measured"] for run in out["runs"]}, out["doubts"]))

    def test_silence_while_results_are_compared(self):
        """What was measured is there."""
        slow = os.path.join(folder.name, "slow")
        with open(slow, "w", encoding="ascii") as file:
            file.write(f"#!/bin/sh\n{args.bench} \"$@\" --no-verify\nexec sleep 20\n")
        os.chmod(slow, 0o755)
        done = self.run_it("--bench", slow, "--runs", 1, "--limit", 4, "--json", self.json, self.path)
        self.assertEqual(1, done.returncode)
        with open(self.json, encoding="utf-8") as file:
            out = json.load(file)
        self.assertEqual((["rank 0 of 2 said nothing for 4 s, and was ended"], 4), (out["doubts"], len(out["runs"])))


class Shared(Runs):
    """Over a libnccl.so.2 that is not NCCL, on GPUs that are none: two entries in --devices are two GPUs to ranks.py."""

    def setUp(self):
        self.path, self.json = os.path.join(folder.name, "shared.safetensors"), os.path.join(folder.name, "shared.json")
        self.shapes = llama(512, 1792, 128, 4000, 2)  # several units of 4 MiB
        if not os.path.exists(self.path):
            write(self.path, self.shapes)

    def measure(self, *options, devices="0,0", wrong=""):
        done = self.run_it("--bench", args.fake, "--devices", devices, "--runs", 1, "--json", self.json, *options, self.path,
                           FST_FAKE_NCCL=wrong, FST_NCCL=args.nccl)
        with open(self.json, encoding="utf-8") as file:
            return done, json.load(file)

    def check_own(self, out):
        """Whatever becomes of shared reading, the others are all there."""
        runs = {run["case"]: run for run in out["runs"]}
        for case in ("tp exact", "tp auto", "rows exact", "rows auto"):
            self.assertEqual(1, runs[case]["measured"])
            self.assertIsNotNone(out["results"][0]["times_one"][case])
        self.assertIsNotNone(out["results"][0]["mix_by_rows"]["tp"])
        return runs

    def test_files_are_read_once_for_all_ranks(self):
        done, out = self.measure("--shared", args.nccl, "--cold", "advise", "--cast", "f32")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        runs, result, size = self.check_own(out), out["results"][0], os.path.getsize(self.path)
        self.assertEqual({"nccl": "2.18.3", "library": args.nccl, "why_not": None}, result["shared"])
        header = size - sum(map(size_of, self.shapes.values()))
        for case in ("tp shared", "tp shared to F32", "rows shared", "rows shared to F32", "cold tp shared"):
            self.assertEqual(sum(needed(self.shapes, i, 2) for i in range(2)), runs[case]["bytes_needed"], case)
            self.assertEqual(size + 2 * header, runs[case]["bytes_read"], case)
        for cast in ("", " to F32"):
            best = {kind: max(runs[f"{kind} {way}{cast}"]["needed_gb_per_s"] for way in ("exact", "auto", "shared"))
                    for kind in ("tp", "rows")}
            mix = best["tp"] / best["rows"]
            self.assertAlmostEqual(mix, result["mix_by_rows"]["tp" + cast], delta=0.001 * mix)
            by_own = runs["tp shared" + cast]["seconds"] / min(runs[f"tp {way}{cast}"]["seconds"] for way in ("exact", "auto"))
            self.assertAlmostEqual(1 / by_own, result["shared_by_own"]["tp" + cast], delta=0.01 / by_own)
        by_once = runs["cold tp shared"]["seconds"] / runs["cold once"]["seconds"]
        self.assertAlmostEqual(by_once, result["cold_by_once"]["cold tp shared"], delta=0.001 * by_once)
        by_files = runs["cold tp shared"]["disk_bytes"] / size
        self.assertAlmostEqual(by_files, result["disk_by_files"]["cold tp shared"], delta=0.001)
        self.assertLessEqual(by_files, 1.05)

    def test_what_is_found_is_used(self):
        done, out = self.measure()
        self.assertEqual((0, args.nccl), (done.returncode, out["results"][0]["shared"]["library"]))
        self.assertIn("tp shared", self.check_own(out))

    def test_not_asked_for_or_not_possible(self):
        for options, devices, why in ((["--shared", "no"], "0,0", "--shared no"),
                                      ([], "0", "NCCL wants several ranks, and a GPU for each: there are 2 on 1")):
            done, out = self.measure(*options, devices=devices)
            self.assertEqual((0, ""), (done.returncode, done.stderr))
            self.assertEqual({"nccl": None, "library": None, "why_not": why}, out["results"][0]["shared"])
            self.assertNotIn("tp shared", self.check_own(out))

    def test_nccl_refuses(self):
        """Found by itself it need not work; asked for, it must."""
        for options, status in (([], 0), (["--shared", args.nccl], 1)):
            done, out = self.measure(*options, wrong="refuse")
            self.assertEqual(status, done.returncode)
            self.assertIn("NCCL: meeting the other ranks: invalid usage: Duplicate GPU detected", out["results"][0]["shared"]["why_not"])
            self.assertNotIn("tp shared", self.check_own(out))

    def test_no_such_library(self):
        done, out = self.measure("--shared", folder.name + "/none.so")
        self.assertEqual(1, done.returncode)
        self.assertIn("none.so: cannot open shared object file", out["results"][0]["shared"]["why_not"])
        self.check_own(out)

    def test_wrong_bytes(self):
        done, out = self.measure(wrong="spoil")
        self.assertEqual(1, done.returncode)
        self.assertRegex(done.stderr, "of 2, shared ended with status 1: .*bench: warm tp shared: tensor .* is wrong: its bytes")
        self.assertEqual({"tp": None, "rows": None}, out["results"][0]["shared_by_own"])
        self.check_own(out)

    def test_a_rank_that_goes_away(self):
        """In its third load: the case that it was about is lost, the others are measured by new processes."""
        done, out = self.measure(wrong="leave 25")
        self.assertEqual(1, done.returncode)
        self.assertEqual(["tp shared: rank 1 of 2, shared ended with status 3: NCCL version 2.18.3; NCCL WARN it leaves"], out["doubts"])
        self.assertEqual(out["doubts"][0], out["results"][0]["shared"]["why_not"])
        self.assertIsNone(out["results"][0]["shared_by_own"]["tp"])
        self.assertIsNotNone(out["results"][0]["shared_by_own"]["rows"])
        self.assertIn("rows shared", self.check_own(out))

    def test_a_rank_that_stops(self):
        begun = time.monotonic()
        done, out = self.measure("--limit", 4, wrong="stop 35")
        self.assertEqual(1, done.returncode)
        self.assertRegex(out["doubts"][0], "rows shared: .* waited 4000 ms for the others' (data|plans), round .*a rank did not come, or went away")
        self.assertLess(time.monotonic() - begun, 60)
        self.check_own(out)

    def test_ranks_that_do_not_meet(self):
        place = os.path.join(folder.name, "alone")
        for bench, more, said in ((args.fake, [], "NCCL: not all ranks came in time"),
                                  (args.bench, [], "NCCL: its communicators are for GPUs, this is the CPU"),
                                  (args.fake, ["--nccl-library", folder.name + "/none.so"], "NCCL: .*none.so: cannot open shared object"),
                                  (args.fake, ["--nccl", folder.name + "/no/id"], "cannot write .*/no/id.part")):
            for rank in (0, 1) if not more else (0,):
                with self.subTest(said, rank=rank):
                    done = subprocess.run([bench, "--turns", "--device", "cpu" if bench == args.bench else "0", "--tp", f"{rank}/2",
                                           "--timeout", "1", "--nccl-library", args.nccl, "--nccl", place, *more, self.path],
                                          input="", capture_output=True, text=True, timeout=60, check=False,
                                          env={**os.environ, "TMPDIR": folder.name})
                    if os.path.exists(place):
                        os.remove(place)
                    self.assertEqual((1, ""), (done.returncode, done.stdout))
                    self.assertRegex(done.stderr, said)
        for bad in (["--nccl", place, self.path], ["--turns", "--nccl", place, self.path],
                    ["--tp", "0/2", "--nccl", place, self.path], ["--turns", "--tp", "0/2", "--nccl-library", "x", self.path],
                    ["--turns", "--tp", "0/2", "--nccl", place, "--timeout", "0", self.path]):
            with self.subTest(bad):
                self.assertEqual(2, subprocess.run([args.bench, *bad], capture_output=True, timeout=60, check=False).returncode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", required=True)
    parser.add_argument("--fst", required=True)
    parser.add_argument("--fake", required=True)
    parser.add_argument("--nccl", required=True)
    args, rest = parser.parse_known_args()
    unittest.main(argv=sys.argv[:1] + rest)
