#!/usr/bin/env python3
"""fst_demo on a small file: every line of its table, and what it says when it cannot.

    test_demo.py --demo PROGRAM
"""
import argparse
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import unittest

demo = None  # set by main

# In BF16 (8 bits of mantissa, rounded to nearest, ties to even): 1 + 2^-8 is a tie and goes to 1, 1 + 3 * 2^-8 is one
# and goes to 1 + 2^-6; 1/3 is 171/512; pi is 201/64; 2^100 is itself.
TENSORS = {
    "w": ("F32", [2, 3], struct.pack("<6f", 1 + 2**-8, 1 + 3 * 2**-8, 1 / 3, -3.14159265, 0, 7)),
    "kept": ("I64", [2], struct.pack("<2q", -(2**40), 12)),
    "scalar": ("F32", [], struct.pack("<f", 2**100)),
    "empty": ("F32", [0], b""),
    "half": ("F16", [1], struct.pack("<e", 0.5)),
}
TABLE = """\
w [2, 3] F32 -> BF16
  F32      1.00390625    1.01171875   0.333333343   -3.14159274
  BF16              1      1.015625   0.333984375     -3.140625
kept [2] I64 -> I64
  I64   -1099511627776            12
  I64   -1099511627776            12
scalar [] F32 -> BF16
  F32   1.2676506e+30
  BF16  1.2676506e+30
empty [0] F32 -> BF16
  F32  
  BF16 
half [1] F16 -> BF16
  F16             ...
  BF16            0.5
"""


def write(path, tensors, cut=0):
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    whole = struct.pack("<Q", len(text)) + text + data
    path.write_bytes(whole[: len(whole) - cut])
    return path


class Demo(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="fst-demo-test-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.scratch = self.folder / "scratch"
        self.scratch.mkdir()

    def run_demo(self, *args, scratch=None):
        environment = {**os.environ, "TMPDIR": str(scratch or self.scratch)}
        return subprocess.run([demo, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              check=False, env=environment)

    def check_failed(self, done, status, *words):
        self.assertEqual((done.returncode, done.stdout), (status, ""), done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)
        self.assertEqual(list(self.scratch.iterdir()), [])

    def test_table(self):
        done = self.run_demo(write(self.folder / "a.safetensors", TENSORS))
        self.assertEqual((done.returncode, done.stderr, done.stdout), (0, "", TABLE))
        self.assertEqual(list(self.scratch.iterdir()), [])  # the saved file is gone

    def test_eight_rows_of_many_the_last_among_them(self):
        tensors = {f"t{i}": ("F32", [1], struct.pack("<f", i)) for i in range(50)}
        done = self.run_demo(write(self.folder / "a.safetensors", tensors))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        names = [line.split()[0] for line in done.stdout.splitlines() if "->" in line]
        self.assertEqual(names, ["t0", "t7", "t14", "t21", "t28", "t35", "t42", "t49"])

    def test_no_file_named(self):
        self.check_failed(self.run_demo(), 2, "usage")

    def test_no_such_file(self):
        self.check_failed(self.run_demo(self.folder / "none.safetensors"), 1, "FST_E_IO", "none.safetensors")

    def test_file_cut_short(self):
        path = write(self.folder / "short.safetensors", TENSORS, cut=1)
        self.check_failed(self.run_demo(path), 1, "FST_E_OFFSETS", "short.safetensors")

    def test_nowhere_to_save(self):
        path = write(self.folder / "a.safetensors", TENSORS)
        self.check_failed(self.run_demo(path, scratch=self.folder / "none"), 1, "none")


def main():
    global demo
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--demo", required=True)
    arguments, rest = parser.parse_known_args()
    demo = os.path.abspath(arguments.demo)
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
