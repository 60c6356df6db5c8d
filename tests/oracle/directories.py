#!/usr/bin/env python3
"""`fst convert` of whole checkpoint directories: against what NumPy, ml_dtypes and the reference reader (PyPI's
safetensors) make of the formula, and killed at random points.

    directories.py --fst build/bin/fst [--kills 20] [--seed 1]
"""
import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import ml_dtypes
import numpy as np
import safetensors

OPTIONS = None
INDEX = "model.safetensors.index.json"
DTYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F32": np.float32, "BF16": ml_dtypes.bfloat16}


def contents(folder):
    """Of each file, by its name in the folder."""
    root = pathlib.Path(folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def tensors(folder):
    """Of a checkpoint with an index, by the reference reader: every tensor where the index says."""
    weight_map = json.loads((pathlib.Path(folder) / INDEX).read_text())["weight_map"]
    found = {}
    for name in sorted(set(weight_map.values())):
        data = (pathlib.Path(folder) / name).read_bytes()
        with safetensors.safe_open(os.path.join(folder, name), framework="np") as file:
            assert file.metadata()["format"] == "pt", name
        for key, tensor in safetensors.deserialize(data):
            assert weight_map[key] == name and key not in found, key
            found[key] = (tensor["dtype"], list(tensor["shape"]), bytes(tensor["data"]))
    assert sorted(found) == sorted(weight_map)
    return found


def dequantized(weight, scale):
    """round(RN32(f32(code) * scale)) to BF16."""
    rows, cols = weight[1]
    codes = np.frombuffer(weight[2], DTYPES["F8_E4M3"]).reshape(rows, cols).astype(np.float32)
    scales = np.frombuffer(scale[2], np.float32).reshape(scale[1])
    scales = scales.repeat(128, axis=0).repeat(128, axis=1)[:rows, :cols]
    return ("BF16", [rows, cols], (codes * scales).astype(DTYPES["BF16"]).tobytes())


class Directories(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # nothing waits for a disk there
        cls.folder = tempfile.mkdtemp(prefix="fst-directories-", dir=memory)
        cls.source = os.path.join(cls.folder, "in")
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoint.py")
        subprocess.run([sys.executable, script, "fp8", cls.source, "--bytes", "6e6", "--files", "3"], check=True)
        os.makedirs(os.path.join(cls.source, "sub"))
        pathlib.Path(cls.source, "sub", "caf\u00e9 \udcff.txt").write_text("x")

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    def setUp(self):
        self.target = os.path.join(self.folder, "out")
        shutil.rmtree(self.target, ignore_errors=True)

    def command(self, *flags):
        return [OPTIONS.fst, "convert", "--device", "cpu", "--cast", "bf16", "--shard-size", "4e5", "--json", *flags,
                "-o", self.target, self.source]

    def convert(self, *flags):
        done = subprocess.run(self.command(*flags), capture_output=True)
        self.assertEqual(0, done.returncode, done.stderr)
        return json.loads(done.stdout)

    def test_every_tensor_is_what_the_formula_gives(self):
        facts = self.convert()
        want, got = tensors(self.source), tensors(self.target)
        scales = {name for name in want if name.endswith("_scale_inv")}
        self.assertTrue(scales)
        self.assertEqual(sorted(set(want) - scales), sorted(got))
        for name, tensor in got.items():
            scale = want.get(name + "_scale_inv")
            self.assertEqual(dequantized(want[name], scale) if scale else want[name], tensor, name)
        self.assertEqual(facts["tensors"], len(got))
        self.assertEqual(facts["bytes_out"], sum(len(t[2]) for t in got.values()))
        total = json.loads(pathlib.Path(self.target, INDEX).read_text())["metadata"]["total_size"]
        self.assertEqual(total, facts["bytes_out"])
        for path in pathlib.Path(self.target).glob("*.safetensors"):
            tensor_bytes = [len(t["data"]) for _, t in safetensors.deserialize(path.read_bytes())]
            self.assertTrue(sum(tensor_bytes) <= 4e5 or len(tensor_bytes) == 1, path)

    def test_config_and_other_files(self):
        self.convert()
        config = json.loads(pathlib.Path(self.source, "config.json").read_text())
        del config["quantization_config"]
        self.assertEqual(config, json.loads(pathlib.Path(self.target, "config.json").read_text()))
        for name, data in contents(self.source).items():
            if not name.endswith((".safetensors", INDEX)) and name != "config.json":
                self.assertEqual(data, contents(self.target)[name], name)

    def test_killed_at_random_points(self):
        """Whatever has its final name is whole, and the next run ends with the same bytes. Some are killed twice."""
        start = time.perf_counter()
        self.convert()
        seconds = time.perf_counter() - start
        whole, source, pick, kept, killed = contents(self.target), contents(self.source), random.Random(OPTIONS.seed), 0, 0
        for i in range(50 * OPTIONS.kills):
            if killed == OPTIONS.kills:
                break
            if i % 3 != 2:
                shutil.rmtree(self.target, ignore_errors=True)
            process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            time.sleep(pick.random() * seconds)
            process.kill()
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
            there = contents(self.target) if os.path.isdir(self.target) else {}
            for name, data in there.items():
                if not name.startswith(".fst-convert"):
                    self.assertEqual(whole.get(name), data, name)
            if i % 3 == 1:
                continue  # and once more
            done = subprocess.run(self.command(), capture_output=True)
            if done.returncode:  # it had come to its end
                self.assertIn(b"it is not empty", done.stderr)
            else:
                kept += json.loads(done.stdout)["shards_kept"]
            self.assertEqual(whole, contents(self.target))
        self.assertEqual(source, contents(self.source))
        print(f"{killed} killed, {kept} files kept", file=sys.stderr)
        self.assertEqual(OPTIONS.kills, killed)

    def test_changed_input_starts_over(self):
        self.interrupted()
        path = pathlib.Path(self.source, "config.json")
        os.utime(path, ns=(1, 1))
        self.assertEqual(0, self.convert()["shards_kept"])

    def interrupted(self):
        """Until some files are finished, but not all."""
        while True:
            shutil.rmtree(self.target, ignore_errors=True)
            process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and len(list(pathlib.Path(self.target).glob("*.safetensors"))) < 2:
                time.sleep(0.001)
            process.kill()
            process.wait()
            if os.path.exists(os.path.join(self.target, ".fst-convert", "journal")):
                return

    def test_finished_files_are_kept(self):
        self.interrupted()
        self.assertGreater(self.convert()["shards_kept"], 0)


def main():
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fst", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    OPTIONS, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
