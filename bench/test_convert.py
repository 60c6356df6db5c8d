#!/usr/bin/env python3
"""bench_convert as a program: its JSON, picture and exit codes, and that it finds wrong results.

    test_convert.py --bench BENCH_CONVERT --wrong CONVERT_WRONG
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

import peers_convert

KERNELS = ("cast scale_tensor scale_row scale_group scale_block quantize_tensor quantize_row quantize_block "
           "realign slice pack transpose deinterleave batch dequant_bnb_nf4 dequant_bnb_int8 dequant_int8 "
           "dequant_fp8_block dequant_fp8_column dequant_mxfp4 dequant_nvfp4 dequant_gptq dequant_awq dequant_packed "
           "dequant_int4_rows dequant_int4_quark").split()
FLOATS = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ".split()
NARROW = "F8_E8M0 F6_E2M3 F6_E3M2 F4".split()
SMALL = ["--device", "cpu", "--bytes", "300K", "--runs", "3"]
args = None


def run(program, *options):
    return subprocess.run([*program, *options], capture_output=True, text=True, timeout=300)


class Convert(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.json, self.svg = (os.path.join(directory.name, name) for name in ("out.json", "out.svg"))

    def results(self):
        with open(self.json, encoding="utf-8") as file:
            return json.load(file)

    def test_every_kernel_is_right(self):
        done = run([args.bench], *SMALL, "--verify-only", "--json", self.json)
        self.assertEqual(0, done.returncode, done.stderr)
        results = self.results()["results"]
        self.assertEqual(set(KERNELS), {r["kernel"] for r in results})
        self.assertTrue(all(r["ok"] for r in results))
        casts = {(r["src"], r["dst"]) for r in results if r["kernel"] == "cast"}
        self.assertLessEqual({(a, b) for a in FLOATS for b in FLOATS if a != b}, casts)
        self.assertLessEqual({(a, b) for a in NARROW for b in ("F32", "F16", "BF16")}, casts)
        self.assertEqual(len(results), len(run([args.bench], "--list").stdout.splitlines()))

    def test_parts_are_right(self):
        """A range cut over threads: parts that begin in the middle of rows, blocks and lists."""
        done = run([args.bench], *SMALL, "--verify-only", "--threads", "3")
        self.assertEqual(0, done.returncode, done.stderr)

    def test_json(self):
        done = run([args.bench], *SMALL, "--filter", "cast F32->BF16", "--json", self.json, "--plot", self.svg)
        self.assertEqual(0, done.returncode, done.stderr)
        out = self.results()
        for key in ("machine", "device", "date", "commit"):
            self.assertIsInstance(out[key], str)
        self.assertEqual("cpu", out["device"])
        self.assertGreater(out["copy_gb_per_s"], 0)
        r = out["results"][0]
        self.assertEqual(("cast", "F32", "BF16", True), (r["kernel"], r["src"], r["dst"], r["ok"]))
        self.assertEqual(2 * r["bytes_written"], r["bytes_read"])
        rate = (r["bytes_read"] + r["bytes_written"]) / r["ms"] / 1e6
        self.assertAlmostEqual(rate, r["gb_per_s"], delta=rate / 50)
        self.assertAlmostEqual(r["copy_ms"] / r["ms"], r["share_of_copy"], delta=r["share_of_copy"] / 50)
        bars = xml.etree.ElementTree.parse(self.svg).getroot().findall("{http://www.w3.org/2000/svg}rect")
        self.assertEqual(1 + len(out["results"]), len(bars))

    def test_wrong_results_are_found(self):
        for way in ("last", "nothing", "beyond"):
            with self.subTest(way):
                done = run([args.wrong, way], "--device", "0", "--bytes", "300K", "--verify-only", "--json", self.json)
                self.assertEqual(1, done.returncode, done.stderr)
                results = self.results()["results"]
                self.assertEqual(set(KERNELS), {r["kernel"] for r in results})
                self.assertEqual([], [r for r in results if r["ok"]])

    def test_filter(self):
        names = run([args.bench], "--list", "--filter", "cast F32->*").stdout.splitlines()
        self.assertIn("cast F32->BF16", names)
        self.assertTrue(all(name.startswith("cast F32->") for name in names))
        self.assertEqual([], [n for n in run([args.bench], "--list", "--filter", "pack").stdout.splitlines()
                              if "pack" not in n])

    def test_peers_dequantize(self):
        """PyTorch's code of peers_convert.py, by the vectors of the formats' descriptions."""
        if not importlib.util.find_spec("torch"):
            self.skipTest("no torch")
        import torch

        def words(text):
            return torch.tensor([int(x, 16) - (int(x, 16) >> 31 << 32) for x in text.split()], dtype=torch.int32)

        def bits(x):
            return [f"{b & 0xFFFF:04X}" for b in x.to(torch.bfloat16).contiguous().view(torch.int16).flatten().tolist()]
        scales = words("1C002666 2E663C00 3555211F 04002A3D").view(torch.float16).view(1, 8)
        rows = words("52FC9630 A741EB85 FC9630DA 41EB852F 9630DA74 EB852FC9 30DA741E 852FC963").view(1, 8)
        got = peers_convert.gptq(torch, rows, words("28FEF067").view(1, 1), scales, 8)
        self.assertEqual("BE4D BC00 4110 BDCD BDE1 C015 3E7A 0000".split(), bits(got[:, 0]))
        self.assertEqual("BD9A 3C40 4160 BF9A BD76 BF2B BE96 39A0".split(), bits(got[:, 7]))
        got = peers_convert.awq(torch, words("86427531").view(1, 1), words("2F981078").view(1, 1), scales, 1)
        self.assertEqual("BE33 BCC0 C080 BF00 3D4D C040 3E96 39C0".split(), bits(got))
        scales = words("3CF63C23").view(torch.bfloat16).view(1, 2)
        got = peers_convert.packed(torch, words("76543210 FEDCBA98").view(1, 2), scales, 8)
        self.assertEqual("BDA3 BD8F".split(), bits(got[0, :2]))  # -8 and -7 times 3C23
        table = bytes.fromhex("10325476980FF071")
        got = peers_convert.four_bits(torch, torch.tensor(list(table), dtype=torch.uint8), peers_convert.E2M1,
                                      torch.tensor([1.0]), 16, False)
        self.assertEqual("0000 3F00 3F80 3FC0 4000 4040 4080 40C0 8000 BF00 C0C0 0000 0000 C0C0 3F00 40C0".split(),
                         bits(got))
        got = peers_convert.four_bits(torch, torch.tensor(list(bytes.fromhex("0F7AE158")), dtype=torch.uint8),
                                      peers_convert.NF4, words("3D4CCCCD").view(torch.float32), 8, True)
        self.assertEqual("BD4D 3D4D 0000 3C4A 3D14 BD0F BC17 3B82".split(), bits(got))

    def test_bad_arguments(self):
        for bad in (["--bytes", "0"], ["--bytes", "12Q"], ["--bytes"], ["--device", "gpu"], ["--runs", "-1"],
                    ["--threads", "100000"], ["--filter", "no such kernel"], ["what"]):
            with self.subTest(bad):
                done = run([args.bench], *bad)
                self.assertEqual(2, done.returncode)
                self.assertTrue(done.stderr.startswith("bench_convert: "))
                self.assertEqual("", done.stdout)

    def test_no_place_for_the_results(self):
        done = run([args.bench], *SMALL, "--filter", "cast F32->BF16", "--json", os.path.join(self.json, "x"))
        self.assertEqual(1, done.returncode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", required=True)
    parser.add_argument("--wrong", required=True)
    args, rest = parser.parse_known_args()
    unittest.main(argv=sys.argv[:1] + rest)
