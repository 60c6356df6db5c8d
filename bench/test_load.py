#!/usr/bin/env python3
"""bench_load as a program: every case on a small checkpoint, its JSON, picture and exit codes, and that it finds what is
wrong: on the CPU device, and on a GPU that is made of host memory (FAKE).

    test_load.py --bench BENCH_LOAD --fake LOAD_FAKE
"""
import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1 << 20
args = None
checkpoint = None  # set by setUpModule
folder = None


def run(program, *options, input_=None, **environment):
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FST_")}
    return subprocess.run([program, *map(str, options)], capture_output=True, text=True, timeout=120, check=False,
                          input=input_, env={**settings, **environment})


def read_header(path):
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))


def files_of(directory):
    return [os.path.join(directory, name) for name in sorted(os.listdir(directory))]


def setUpModule():
    global checkpoint, folder
    folder = tempfile.TemporaryDirectory(prefix="fst-bench-load-")
    checkpoint = os.path.join(folder.name, "checkpoint")
    done = run(args.bench, "--device", "cpu", "--runs", 1, "--no-verify", "--generate", checkpoint, "8M", "--small", 100,
               "--files", 3)
    assert done.returncode == 0, done.stderr


def tearDownModule():
    folder.cleanup()


class Load(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.json, self.svg = (os.path.join(directory.name, name) for name in ("out.json", "out.svg"))

    def measure(self, program, *options, **environment):
        done = run(program, "--runs", 2, "--json", self.json, *options, **environment)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        with open(self.json, encoding="utf-8") as file:
            return json.load(file), done.stdout

    def check_run(self, r, is_part=False):
        for key in ("seconds", "gb_per_s", "peak_device_bytes", "cpu_seconds", "cpu_seconds_per_gb", "bytes_read",
                    "bytes_out", "threads", "slots", "slot_bytes", "chunks", "measured"):
            self.assertGreater(r[key], 0, (r["case"], key))
        for key in ("pinned_bytes", "open_seconds", "allocate_seconds", "read_seconds", "wait_seconds", "kernel_seconds",
                    "copy_seconds", "convert_seconds", "slots_busy", "host_growth_bytes"):
            self.assertGreaterEqual(r[key], 0, (r["case"], key))
        if not is_part:
            self.assertEqual(sum(map(os.path.getsize, files_of(checkpoint))), r["bytes_read"])
        rate = r["bytes_read"] / r["seconds"] / 1e9
        self.assertAlmostEqual(rate, r["gb_per_s"], delta=rate / 50 + 0.001)
        self.assertEqual(r["measured"], len(r["all_seconds"]))
        self.assertGreaterEqual(r["seconds"], min(r["all_seconds"]))
        self.assertLessEqual(r["seconds"], max(r["all_seconds"]))
        self.assertIn(r["limit"], ("read", "copy", "kernel", "allocation", "consumer"))
        self.assertTrue(r["reader"])
        if r["share_of_ceiling"] is not None and r["case"] != "half cached":
            share = r["gb_per_s"] / r["ceiling_gb_per_s"]
            self.assertAlmostEqual(share, r["share_of_ceiling"], delta=share / 50 + 0.01)

    def check_whole(self, out, cases):
        for key in ("machine", "device", "date", "commit"):
            self.assertTrue(out[key])
        self.assertLessEqual({"h2d_gb_per_s", "page_cache_gb_per_s", "direct_gb_per_s"}, set(out["ceilings"]))
        self.assertGreater(out["ceilings"]["h2d_gb_per_s"], 0)
        self.assertGreater(out["ceilings"]["page_cache_gb_per_s"], 0)
        self.assertEqual([], out["doubts"])
        self.assertEqual(cases, [r["case"] for r in out["runs"]])
        for r in out["runs"]:
            self.check_run(r, "ranks" in r)
        return {r["case"]: r for r in out["runs"]}

    def test_every_case(self):
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else self.directory
        before = set(os.listdir(memory))
        out, text = self.measure(args.bench, "--device", "cpu", "--cast", "f16", "--cast", "F8_E4M3", "--stream", "--cold",
                                 "--advise", "--cold-runs", 2, "--first", 3, "--tmpfs", memory, "--timeline", self.svg, checkpoint)
        runs = self.check_whole(out, ["first as is", "warm as is", "warm to F16", "warm to F8_E4M3", "warm stream", "warm stream as ready",
                                      "tmpfs as is", "tmpfs to F16", "tmpfs to F8_E4M3"] +
                                (["cold", "after cold", "half cached", "cold direct", "cold uring", "cold uring direct"]
                                 if out["cold_by"] else []))
        new = set(os.listdir(memory)) - before  # other programs have theirs there, too
        self.assertEqual([], [name for name in new if name.startswith("bench_load-")])
        self.assertEqual("cpu", out["device"])
        self.assertGreater(out["ceilings"]["memory_gb_per_s"], 0)
        self.assertGreater(out["ceilings"]["tmpfs_gb_per_s"], 0)
        self.assertEqual((3, 2), (runs["first as is"]["measured"], runs["warm as is"]["measured"]))
        stored = runs["warm as is"]["bytes_out"]
        self.assertEqual((stored, stored / 2), (runs["warm to F16"]["bytes_out"], runs["warm to F8_E4M3"]["bytes_out"]))
        first, whole = (runs["warm stream"][key] for key in ("first_tensor_seconds", "seconds"))
        self.assertTrue(0 < first <= whole)
        self.assertLess(runs["tmpfs as is"]["disk_bytes"] or 0, stored / 10)
        self.assertIn("results of", text)
        self.check_cold(out, runs, stored)
        self.assertIsNotNone(xml.etree.ElementTree.parse(self.svg).getroot().find(SVG + "path"))

    def test_computed_scales(self):
        out, _ = self.measure(args.fake, "--device", 0, "--cast", "F8_E4M3:row", "--cast", "f8_e5m2:tensor", "--cast",
                              "F8_E4M3FNUZ:block", "--runs", 2, "--threads", 2, "--slot", "256K", checkpoint)
        runs = self.check_whole(out, ["first as is", "warm as is", "warm to F8_E4M3 row", "warm to F8_E5M2 tensor",
                                      "warm to F8_E4M3FNUZ block"])
        for name in ("warm to F8_E4M3 row", "warm to F8_E5M2 tensor", "warm to F8_E4M3FNUZ block"):
            self.assertLess(runs[name]["bytes_out"], runs["warm as is"]["bytes_out"])

    def needed(self, rank, ranks, rows):
        """What the headers say that a part has; q_proj is whole here."""
        total = 0
        for path in files_of(checkpoint):
            _, header = read_header(path)
            for name, t in header.items():
                if name == "__metadata__":
                    continue
                nbytes, dim = t["data_offsets"][1] - t["data_offsets"][0], None
                if re.search(r"\.(k|v|gate|up)_proj\.weight$", name):
                    dim = 0
                if re.search(r"\.(o|down)_proj\.weight$", name):
                    dim = 0 if rows else 1
                if dim is None:
                    total += nbytes
                    continue
                each = -(-t["shape"][dim] // ranks)
                begin, end = (min(k * each, t["shape"][dim]) for k in (rank, rank + 1))
                total += nbytes // t["shape"][dim] * (end - begin)
        return total

    def test_parts(self):
        """On the CPU device, and with copies; what a part has is counted here, from the headers."""
        cases = [f"warm {what} {way}{cast}" for what in ("tp", "rows") for way in ("exact", "auto") for cast in ("", " to F32")]
        headers = sum(read_header(path)[0] for path in files_of(checkpoint))
        for program, device in ((args.bench, "cpu"), (args.fake, 0)):
            with self.subTest(device):
                out, text = self.measure(program, "--device", device, "--tp", "2/3", "--rows", "--read", "exact", "--read", "auto",
                                         "--shard", "*.q_proj.weight=replicate", "--cast", "F32", checkpoint)
                runs = self.check_whole(out, ["first as is", "warm as is", "warm to F32"] + cases)
                for name in cases:
                    r = runs[name]
                    self.assertEqual((2, 3), (r["rank"], r["ranks"]))
                    self.assertEqual(self.needed(2, 3, "rows" in name), r["bytes_needed"], name)
                    self.assertLessEqual(r["bytes_read"] - headers, (1.02 if "exact" in name else 2) * r["bytes_needed"])
                    self.assertAlmostEqual(r["bytes_read"], r["asked_bytes"], delta=MIB)
                    self.assertAlmostEqual(r["bytes_needed"] / r["seconds"] / 1e9, r["needed_gb_per_s"], delta=0.05 * r["gb_per_s"])
                self.assertIn("results of 10 cases", text)

    def test_parts_by_ones_own_rules(self):
        out, _ = self.measure(args.bench, "--device", "cpu", "--rank", "0/2", "--shard", "small.*=0/64", checkpoint)
        runs = self.check_whole(out, ["first as is", "warm as is", "warm rank auto"])
        sizes = [t["data_offsets"][1] - t["data_offsets"][0] for path in files_of(checkpoint)
                 for name, t in read_header(path)[1].items() if name.startswith("small.")]
        self.assertEqual(runs["warm as is"]["bytes_needed"] - sum(sizes) // 2, runs["warm rank auto"]["bytes_needed"])

    def test_wrong_parts_are_found(self):
        done = run(args.fake, "--device", 0, "--runs", 1, "--tp", "0/2", "--turns", checkpoint, FST_FAKE="copy", input_="warm tp auto\n")
        self.assertEqual(1, done.returncode, done.stdout)
        self.assertIn("bench: warm tp auto", done.stderr)
        self.assertIn("is wrong: its bytes", done.stderr)

    def test_turns(self):
        """Loads begin when they are told to; results are compared at the end."""
        at = time.monotonic() + 1.5
        done = run(args.bench, "--device", "cpu", "--tp", "1/2", "--read", "exact", "--turns", checkpoint,
                   input_=f"warm tp exact\npage cache\nwarm as is\t{at}\n")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        hello, part, ceiling, whole, *right, said = done.stdout.splitlines()
        self.assertEqual(["first as is", "warm as is", "warm tp exact"], json.loads(hello)["cases"])
        self.assertGreater(json.loads(ceiling)["gb_per_s"], 0)
        self.assertLess(json.loads(part)["bytes_read"], json.loads(whole)["bytes_read"])
        self.assertTrue(at <= json.loads(whole)["started"] < at + 1)
        self.assertEqual(["warm as is: right", "warm tp exact: right"], right)
        self.assertIn("results of 2 cases are right", said)
        done = run(args.bench, "--device", "cpu", "--turns", checkpoint, input_="lukewarm\n")
        self.assertEqual(1, done.returncode)
        self.assertIn("there is no case lukewarm", done.stderr)

    def test_copies_are_removed_when_it_is_ended(self):
        with subprocess.Popen([args.bench, "--device", "cpu", "--runs", "64", "--tmpfs", self.directory, checkpoint],
                              stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline and not any(
                    len(files) == 3 for _, _, files in os.walk(self.directory)):
                time.sleep(0.001)
            process.terminate()
            self.assertEqual(128 + 15, process.wait(60))
        self.assertEqual([], os.listdir(self.directory))

    def check_cold(self, out, runs, stored):
        if not out["cold_by"]:
            self.assertIsNone(out["ceilings"]["direct_gb_per_s"])
            return
        self.assertEqual("fadvise", out["cold_by"])
        half = runs["half cached"]["uncached_bytes"]
        if self.fadvise_works():
            for name in ("cold", "cold direct", "cold uring", "cold uring direct"):
                self.assertGreater(runs[name]["uncached_bytes"], stored * 0.9, name)
            self.assertTrue(stored * 0.25 < half < stored * 0.75, half)
            self.assertLess(runs["after cold"]["uncached_bytes"], stored * 0.1)
        if runs["half cached"]["share_of_ceiling"] is not None:
            share = half / (runs["half cached"]["ceiling_gb_per_s"] * 1e9) / runs["half cached"]["seconds"]
            self.assertAlmostEqual(share, runs["half cached"]["share_of_ceiling"], delta=share / 20)
            self.assertAlmostEqual(1.1, runs["half cached"]["limit_seconds"] / (share * runs["half cached"]["seconds"]),
                                   delta=0.05)

    def fadvise_works(self):
        done = subprocess.run(["stat", "-f", "-c", "%T", checkpoint], capture_output=True, text=True, check=True)
        return done.stdout.strip() in ("ext2/ext3", "xfs", "btrfs")

    def test_gpu(self):
        """The same program with copies, pinned memory and the driver's word on device memory."""
        out, _ = self.measure(args.fake, "--device", 0, "--cast", "F16", "--stream", "--threads", 2, "--slot", "256K",
                              "--slots", 6, "--timeline", self.svg, checkpoint, FST_TEST_DEVICE="0")
        runs = self.check_whole(out, ["first as is", "warm as is", "warm to F16", "warm stream", "warm stream as ready"])
        self.assertEqual("fake:0", out["device"])
        for r in runs.values():
            self.assertEqual((2, 6, 256 << 10), (r["threads"], r["slots"], r["slot_bytes"]))
            self.assertGreater(r["pinned_bytes"], 6 * r["slot_bytes"])
        for name in ("warm as is", "warm to F16"):
            self.assertTrue(0 <= runs[name]["peak_beyond_results"] < 8 * MIB, runs[name]["peak_beyond_results"])
        self.check_picture(runs["warm as is"])

    def check_picture(self, r):
        root = xml.etree.ElementTree.parse(self.svg).getroot()
        words = ["".join(node.itertext()) for node in root.iter(SVG + "text")]
        # One thread may have read it all before the other woke up.
        self.assertIn([w for w in words if w.startswith("thread")], (["thread 0"], ["thread 1"], ["thread 0", "thread 1"]))
        if r["pinned_bytes"]:
            self.assertEqual(["slot %d" % i for i in range(6)], [w for w in words if re.match(r"slot \d", w)])
        self.assertTrue(any("warm as is" in w for w in words), words)
        self.assertTrue(any("Limit" in w for w in words), words)
        bars = [path.get("d") for path in root.iter(SVG + "path") if "scale" in (path.get("transform") or "")]
        self.assertGreaterEqual(sum(bar.count("h") for bar in bars), r["chunks"])  # at least one for each read

    def test_picture_of_another_case(self):
        self.measure(args.bench, "--device", "cpu", "--cast", "F16", "--timeline", self.svg, "--timeline-of", "warm to F16",
                     "--no-verify", checkpoint)
        with open(self.svg, encoding="utf-8") as file:
            self.assertIn("warm to F16", file.read())

    def test_sweep(self):
        out, _ = self.measure(args.bench, "--device", "cpu", "--tune", "--seconds", 2, "--timeline", self.svg, checkpoint)
        runs = [r for r in out["runs"] if r["case"] != "first as is"]
        self.assertGreater(len(runs), 1)
        rates = [r["gb_per_s"] for r in out["runs"]]
        self.assertEqual(sorted(rates, reverse=True), rates)
        for r in runs:
            threads, slots, slot = map(int, re.fullmatch(r"(\d+) threads, (\d+) x (\d+) MiB", r["case"]).groups())
            self.assertEqual((threads, 2 * threads, slot * MIB),  # on a GPU as many slots as asked for
                             (r["threads"], r["slots"], r["slot_bytes"]))
            self.assertTrue(24 * MIB <= slots * slot * MIB <= 96 * MIB)
            self.assertGreaterEqual(r["measured"], 2)

    def test_wrong_results_are_found(self):
        for what, cast, case in (("copy", "F8_E5M2", "warm as is"), ("cast", "F8_E5M2", "warm to F8_E5M2"),
                                 ("scale", "F8_E5M2:row", "warm to F8_E5M2 row")):
            with self.subTest(what):
                done = run(args.fake, "--device", 0, "--runs", 1, "--cast", cast, checkpoint, FST_FAKE=what)
                self.assertEqual(1, done.returncode, done.stdout)
                self.assertIn(f"bench: {case}", done.stderr)
                self.assertIn("is wrong: its bytes", done.stderr)
                self.assertNotIn("results of", done.stdout)

    def test_the_library_is_not_believed(self):
        """A device that loses memory: more is in use than the library knows of."""
        done = run(args.fake, "--device", 0, "--runs", 3, "--json", self.json, "--no-verify", checkpoint,
                   FST_FAKE="memory")
        self.assertEqual(1, done.returncode)
        self.assertIn("the driver saw", done.stderr)
        with open(self.json, encoding="utf-8") as file:
            self.assertIn("the driver saw", json.load(file)["doubts"][0])

    def test_what_was_measured_before_a_failure_is_told(self):
        done = run(args.fake, "--device", 0, "--runs", 3, "--threads", 2, "--slot", "8M", "--json", self.json,
                   checkpoint, FST_FAKE="fourth")
        self.assertEqual(1, done.returncode)
        self.assertIn("out of memory", done.stderr)
        with open(self.json, encoding="utf-8") as file:
            self.assertEqual([("first as is", 1), ("warm as is", 1)],
                             [(r["case"], r["measured"]) for r in json.load(file)["runs"]])
        self.assertIn("warm as is", done.stdout)

    def test_generated_files(self):
        """Shapes, sizes and numbers are as asked for, in every dtype, and the library takes them."""
        for dtype, nbytes in (("F32", 4), ("BF16", 2), ("F8_E4M3", 1), ("F4", 0.5), ("F6_E2M3", 0.75)):
            with self.subTest(dtype):
                directory = os.path.join(self.directory, dtype)
                done = run(args.bench, "--device", "cpu", "--runs", 1, "--generate", directory, "1M", "--small", 5,
                           "--dtype", dtype, "--files", 2)
                self.assertEqual((0, ""), (done.returncode, done.stderr))
                tensors, data = {}, 0
                for path in files_of(directory):
                    start, header = read_header(path)
                    header.pop("__metadata__")
                    tensors.update(header)
                    data += os.path.getsize(path) - start
                self.assertEqual(2, len(os.listdir(directory)))
                self.assertTrue(0.9 * MIB < data - 5 * 4096 <= MIB, data)
                self.assertEqual({dtype}, {t["dtype"] for t in tensors.values()})
                width, = tensors["model.layers.0.input_layernorm.weight"]["shape"]
                self.assertEqual([width * 7 // 2, width], tensors["model.layers.0.mlp.gate_proj.weight"]["shape"])
                small = tensors["small.0000004.weight"]
                self.assertLessEqual(abs(4096 - small["shape"][0] * nbytes), 3)

    def test_numbers_are_finite(self):
        path = files_of(checkpoint)[0]
        start, _ = read_header(path)
        with open(path, "rb") as file:
            data = file.read()[start:]
        exponents = {word >> 7 & 0xFF for word in struct.unpack(f"<{len(data) // 2}H", data)}
        self.assertEqual(set(range(112, 128)), exponents)

    def test_another_checkpoint_is_left_alone(self):
        other = os.path.join(self.directory, "other.safetensors")
        with open(other, "w", encoding="utf-8") as file:
            file.write("mine")
        done = run(args.bench, "--generate", self.directory, "1M")
        self.assertEqual(1, done.returncode)
        self.assertIn("other.safetensors", done.stderr)
        self.assertEqual(["other.safetensors"], os.listdir(self.directory))

    def test_bad_arguments(self):
        path = checkpoint
        for bad in ([], ["--runs", "0", path], ["--runs", "65", path], ["--runs"], ["--device", "gpu", path],
                    ["--cast", "F17", path], ["--cast", "F8_E4M3:column", path], ["--cast", "BF16:row", path],
                    ["--cast", "F8_E4M3:", path], ["--slot", "1K", path], ["--slots", "257", path], ["--what", "1", path],
                    ["--seconds", "soon", path], ["--generate", self.directory], ["--generate", self.directory, "0"],
                    ["--generate", self.directory, "1M", path], ["--small", "3", path], ["--tune", "--cold", path],
                    ["--tp", "2/2", path], ["--tp", "1", path], ["--tp", "-1/2", path], ["--rank", "0/2x", path], ["--rows", path],
                    ["--tp", "0/2", "--rank", "0/2", path], ["--rank", "0/2", "--rows", path], ["--read", "exact", path],
                    ["--tp", "0/2", "--read", "all", path], ["--shard", "a=0", path], ["--rank", "0/2", "--shard", "a=-1", path],
                    ["--rank", "0/2", "--shard", "=0", path], ["--rank", "0/2", "--shard", "a=0/", path],
                    ["--tp", "0/2", "--cast", "F8_E4M3:row", path], ["--tp", "0/2", "--tune", path],
                    ["--timeline", self.svg, "--timeline-of", "lukewarm", path], ["--json", "", path]):
            with self.subTest(bad):
                done = run(args.bench, *bad)
                self.assertEqual(2, done.returncode, done.stderr)
                self.assertTrue(done.stderr.startswith("bench_load: "), done.stderr)
                self.assertEqual("", done.stdout)
        self.assertEqual([], os.listdir(self.directory))

    def test_failures(self):
        for options, environment, words in (
                ([os.path.join(self.directory, "none")], {}, "none"),
                (["--json", os.path.join(self.directory, "no", "x"), checkpoint], {}, "cannot write"),
                (["--device", "cpu", checkpoint], {"FST_TEST_DEVICE": "0"}, "FST_TEST_DEVICE"),
                ([checkpoint], {"FST_TEST_DEVICE": "7"}, "7")):
            with self.subTest(words):
                done = run(args.bench, "--runs", 1, *options, **environment)
                self.assertEqual(1, done.returncode, done.stdout)
                self.assertIn(words, done.stderr)
        done = run(args.fake, "--runs", 1, "--device", "auto", checkpoint, FST_TEST_DEVICE="1")
        self.assertEqual(1, done.returncode, "it was measured on another GPU")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", required=True)
    parser.add_argument("--fake", required=True)
    args, rest = parser.parse_known_args()
    unittest.main(argv=sys.argv[:1] + rest)
