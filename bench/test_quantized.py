#!/usr/bin/env python3
"""quantized.py as a program, on the CPU device: what it makes, compares and says, and what it refuses.

    test_quantized.py --bench BENCH_LOAD
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

PROGRAM = pathlib.Path(__file__).resolve().parent / "quantized.py"
args = None


class Quantized(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory, self.json = directory.name, os.path.join(directory.name, "out.json")

    def run_it(self, *options):
        return subprocess.run([sys.executable, PROGRAM, "--bench", args.bench, "--dir", self.directory, "--device", "cpu", "--bytes",
                               "4e6", "--files", "2", "--runs", "1", "--peer", "no", "--json", self.json, *options],
                              capture_output=True, text=True, timeout=200)

    def test_every_format_is_measured_and_right(self):
        done = self.run_it()
        self.assertEqual(0, done.returncode, done.stderr)
        with open(self.json, encoding="utf-8") as file:
            found = json.load(file)
        self.assertEqual("cpu", found["device"])
        self.assertEqual(["fp8", "mxfp4", "gptq"], [r["format"] for r in found["results"]])
        for result in found["results"]:
            files = pathlib.Path(self.directory, result["format"]).glob("*.safetensors")
            self.assertEqual(sum(f.stat().st_size for f in files), result["bytes"])
            self.assertTrue(result["right"])
            self.assertLess(result["bytes"] * 1.2, result["bytes_out"])  # narrow codes became wide
            self.assertAlmostEqual(result["seconds"] / result["as_stored_seconds"], result["times_as_stored"], places=3)
            self.assertEqual({"seconds": None, "why": "not asked for"}, result["peer"])

    def test_a_checkpoint_that_is_there_is_taken(self):
        self.assertEqual(0, self.run_it("--formats", "mxfp4").returncode)
        index = pathlib.Path(self.directory, "mxfp4", "model.safetensors.index.json")
        before = index.stat().st_mtime_ns
        self.assertEqual(0, self.run_it("--formats", "mxfp4").returncode)
        self.assertEqual(before, index.stat().st_mtime_ns)

    def test_weights_without_scales_fail(self):
        self.assertEqual(0, self.run_it("--formats", "fp8").returncode)
        for path in pathlib.Path(self.directory, "fp8").glob("*.safetensors"):
            path.write_bytes(path.read_bytes().replace(b"o_proj.weight_scale_inv", b"o_proj.weight_scale_odd"))
        done = self.run_it("--formats", "fp8")
        self.assertNotEqual(0, done.returncode)
        self.assertIn("o_proj", done.stderr)

    def test_a_format_that_it_does_not_know(self):
        done = self.run_it("--formats", "fp8,exl2")
        self.assertEqual(2, done.returncode)
        self.assertIn("exl2", done.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", required=True)
    args, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0], *rest])
