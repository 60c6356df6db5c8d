#!/usr/bin/env python3
"""peers.py on the CPU device, with small files and loaders that are made to be right, wrong, slow or broken.

    test_peers.py --lib LIBFST.SO

None of the real libraries is needed, nor torch; what was left out without it is said at the end. This file is also the one
that peers.py takes those loaders from (--loaders).
"""
import argparse
import importlib.util
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import peers  # noqa: E402

lib = None  # set by main
left_out = []


# ---- Loaders, for peers.py ----

def to_bf16(data):
    """To nearest, ties to even; the numbers are small."""
    words = struct.unpack(f"<{len(data) // 4}I", data)
    return struct.pack(f"<{len(words)}H", *((w + 0x7FFF + (w >> 16 & 1)) >> 16 for w in words))


class Plain(peers.Library):
    """Reads with Python alone: the reference here."""
    loads_parts = True

    def start(self):
        pass

    def load(self, files, cast):
        log = os.environ.get("PEERS_TEST_LOG")
        if log:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{self.spec['library']} {os.getpid()} {cast}\n")
        tensors = {}
        for path in files:
            with open(path, "rb") as file:
                whole = file.read()
            for name, (dtype, shape, at, nbytes) in peers.read_header(path).items():
                data = whole[at:at + nbytes]
                tensors[name] = (cast, shape, to_bf16(data)) if cast and dtype == "F32" else (dtype, shape, data)
        return tensors

    def load_part(self, files, cast):
        tensors = {}
        for name, (dtype, shape, data) in self.load(files, cast).items():
            cut = self.part(name, shape)
            if cut:
                row, (dim, begin, end) = len(data) // shape[0], cut
                size = row // shape[1]
                data = data[begin * row:end * row] if dim == 0 else b"".join(
                    data[at + begin * size:at + end * size] for at in range(0, len(data), row))
                shape = [*shape[:dim], end - begin, *shape[dim + 1:]]
            tensors[name] = (dtype, shape, data)
        return tensors

    def checksums(self, result):
        return {name: [dtype, shape, peers.plain_checksum(data)] for name, (dtype, shape, data) in result.items()}


class Other(Plain):
    pass


class NoParts(Plain):
    loads_parts = False


class OneRank(Plain):
    """Rank 1 has the other's part, or fails."""

    def load_part(self, files, cast):
        if self.spec["rank"] == 1 and self.spec["library"] == "one-fails":
            raise ValueError("not mine")
        return super().load_part(files, cast)

    def part(self, name, shape):
        return peers.part_of(name, shape, 0, self.spec["ranks"])


class LastByte(Plain):
    def load(self, files, cast):
        tensors = super().load(files, cast)
        name = list(tensors)[-1]
        dtype, shape, data = tensors[name]
        return {**tensors, name: (dtype, shape, data[:-1] + bytes([data[-1] ^ 1]))}


class Truncates(Plain):
    """Its casts are not rounded."""

    def load(self, files, cast):
        return {name: (d, s, b"".join(x[i + 2:i + 4] for i in range(0, len(x), 4))) if d == "F32" and cast else (d, s, x)
                for name, (d, s, x) in super().load(files, None).items()}

    def checksums(self, result):
        cast = self.spec["cast"]
        return super().checksums({n: (cast if d == "F32" and cast else d, s, x) for n, (d, s, x) in result.items()})


class Missing(Plain):
    def load(self, files, cast):
        tensors = super().load(files, cast)
        del tensors["w"]
        return tensors


class Surplus(Plain):
    def load(self, files, cast):
        return {**super().load(files, cast), "more": ("U8", [0], b"")}


class OtherDtype(Plain):
    def load(self, files, cast):
        return {name: ("U32" if d == "F32" else d, s, x) for name, (d, s, x) in super().load(files, cast).items()}


class OtherShape(Plain):
    def load(self, files, cast):
        return {name: (d, s[::-1], x) for name, (d, s, x) in super().load(files, cast).items()}


class Raises(Plain):
    def load(self, files, cast):
        raise ValueError("no such\nformat")


class NotThere(Plain):
    def start(self):
        import no_module_of_this_name  # noqa: F401


class Crashes(Plain):
    def load(self, files, cast):
        print("it goes down", file=sys.stderr, flush=True)
        os.abort()


class Hangs(Plain):
    def load(self, files, cast):
        time.sleep(60)


class OnlyCuda(Plain):
    devices = ("cuda",)


WRONG = {"last-byte": LastByte, "missing": Missing, "surplus": Surplus, "dtype": OtherDtype, "shape": OtherShape}
BROKEN = {"raises": Raises, "not-there": NotThere, "crashes": Crashes, "only-cuda": OnlyCuda}
LIBRARIES = {"plain": Plain, "other": Other, "hangs": Hangs, "truncates": Truncates, "no-parts": NoParts, "one-rank": OneRank,
             "one-fails": OneRank, **WRONG, **BROKEN}


# ---- Cases ----

def write_checkpoint(folder):
    os.makedirs(folder)
    floats = [(i - 350) / 37 for i in range(700)]
    for at, tensors in enumerate([{"w": ("F32", [35, 20], struct.pack("<700f", *floats)), "none": ("F32", [0, 3], b"")},
                                  {"ids": ("I64", [2, 1], struct.pack("<2q", -5, 2**40)),
                                   "odd": ("F32", [3, 1], struct.pack("<3f", 1 / 3, -2.5, 0.1)),
                                   "b": ("U8", [5], bytes(range(5)))}]):
        header, data = {}, b""
        for name, (dtype, shape, values) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
            data += values
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        with open(os.path.join(folder, f"{at}.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + data)
    return folder


class Peers(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="fst-peers-test-")
        self.addCleanup(directory.cleanup)
        self.folder = directory.name
        self.model = write_checkpoint(os.path.join(self.folder, "model"))
        self.bytes = sum(os.path.getsize(path) for path in peers.checkpoint_files(self.model))
        self.json = os.path.join(self.folder, "out.json")
        self.place = "tmpfs" if peers.in_memory(self.model) else "page cache"

    def run_peers(self, *options, environment=()):
        return subprocess.run([sys.executable, os.path.join(HERE, "peers.py"), *options], capture_output=True, text=True,
                              timeout=250, env={**os.environ, "TMPDIR": self.folder, **dict(environment)})

    def measure(self, libraries, *options, status=0, **more):
        done = self.run_peers("--device", "cpu", "--lib", lib, "--loaders", os.path.abspath(__file__), "--reference", "plain",
                              "--libraries", libraries, "--rounds", "1", "--warm", "1", "--json", self.json, *options,
                              self.model, **more)
        self.assertEqual(status, done.returncode, done.stderr)
        self.assertEqual([], [name for name in os.listdir(self.folder) if name.startswith("fst-peers-")])
        with open(self.json, encoding="utf-8") as file:
            return json.load(file), done

    def runs(self, out, library):
        return [run for run in out["runs"] if run["library"] == library]

    def test_json(self):
        out, _ = self.measure("fst,plain,other", "--rounds", "2", "--warm", "2")
        for key in ("machine", "device", "date", "commit"):
            self.assertIsInstance(out[key], str)
        self.assertEqual(("cpu", 2, 2, []), (out["device"], out["rounds"], out["warm"], out["left_out"]))
        self.assertRegex(out["versions"]["fst"], r"^\d+\.\d+\.\d+$")
        key = self.place.replace(" ", "_")
        self.assertEqual({f"{key}_gb_per_s", f"{key}_fresh_gb_per_s"}, set(out["ceilings"]))
        cases = [f"{first}{self.place} F32 {what}" for what in ("as is", "to BF16") for first in ("first ", "")]
        for library in ("fst", "plain", "other"):
            self.assertEqual(cases, [run["case"] for run in self.runs(out, library)])
        for run in out["runs"]:
            with self.subTest(run["library"] + " " + run["case"]):
                self.assertIs(True, run["right"])
                self.assertNotIn("error", run)
                self.assertEqual(2 if run["case"].startswith("first") else 4, len(run["all_seconds"]))
                self.assertAlmostEqual(statistics.median(run["all_seconds"]), run["seconds"], delta=2e-6)
                rate = self.bytes / run["seconds"] / 1e9
                self.assertAlmostEqual(rate, run["gb_per_s"], delta=rate / 50)
                share = run["gb_per_s"] / out["ceilings"][f"{key}_gb_per_s"]
                self.assertAlmostEqual(share, run["share_of_ceiling"], delta=share / 50)
                self.assertGreaterEqual(run["cpu_seconds"], 0)
                self.assertIsNone(run["peak_device_bytes"])
                self.assertEqual(0 if run["library"] == "fst" else None, run["pinned_bytes"])

    def test_table(self):
        out, done = self.measure("fst,plain,raises", "--table")
        again = self.run_peers("--table", self.json)
        self.assertEqual((0, done.stdout), (again.returncode, again.stdout))
        rows = {line.split("|")[1].split()[0]: [c.strip() for c in line.split("|")[2:-1]]
                for line in done.stdout.splitlines() if line.startswith("| ")}
        self.assertEqual([f"{self.place} F32 as is", f"{self.place} F32 to BF16"], rows["library"])
        ours, theirs = ({run["case"]: run for run in self.runs(out, name)} for name in ("fst", "plain"))
        for case, mine, cell in zip(rows["library"], rows["fst"], rows["plain"]):
            self.assertEqual(f"{ours[case]['gb_per_s']:.2f} ({ours['first ' + case]['gb_per_s']:.2f})", mine)
            self.assertTrue(cell.endswith(f", {theirs[case]['seconds'] / ours[case]['seconds']:.2f}×"), cell)
        self.assertEqual(["fails", "fails"], rows["raises"])
        self.assertIn("- raises: ValueError: no such format", done.stdout)

    def test_wrong_bytes_are_found(self):
        out, done = self.measure(",".join(["fst", "plain", *WRONG]), "--casts", "none", "--table", status=1)
        first = {"last-byte": "1 of 5 tensors differ from plain's, the first is b:", "missing": "first is w: None instead of",
                 "surplus": "the first is more:", "dtype": "3 of 5", "shape": "4 of 5"}
        for name in WRONG:
            with self.subTest(name):
                for run in self.runs(out, name):
                    self.assertIs(False, run["right"])
                    self.assertIn(first[name], run["difference"])
                    self.assertIn(f"peers: {name}, {run['case']}: ", done.stderr)
        self.assertEqual(len(WRONG), done.stdout.count("WRONG BYTES"))
        self.assertTrue(all(run["right"] for name in ("fst", "plain") for run in self.runs(out, name)))

    def test_a_wrong_cast_is_found(self):
        out, _ = self.measure("fst,plain,truncates", status=1)
        self.assertEqual({True}, {run["right"] for run in self.runs(out, "fst")})
        for run in self.runs(out, "truncates"):
            self.assertIs("as is" in run["case"], run["right"])

    def test_what_fails_is_listed(self):
        out, done = self.measure(",".join(["fst", "plain", *BROKEN]), "--table", "--rounds", "2")
        said = {"raises": "ValueError: no such format", "not-there": "ModuleNotFoundError: No module named",
                "crashes": "ended with signal 6: it goes down", "only-cuda": "has no cpu device"}
        for name in BROKEN:
            with self.subTest(name):
                runs = self.runs(out, name)
                self.assertEqual(4, len(runs))
                for run in runs:
                    self.assertTrue(run["error"].startswith(said[name]), run["error"])
                    self.assertIsNone(run["seconds"])
                self.assertIn(f"- {name}: {said[name]}", done.stdout)

    def test_what_hangs_is_ended(self):
        out, _ = self.measure("plain,hangs", "--limit", "5", "--casts", "none")
        self.assertEqual({"took longer than 5 s"}, {run["error"] for run in self.runs(out, "hangs")})

    def test_fst_itself_fails(self):
        out, done = self.measure("fst,plain", "--lib", os.path.join(self.folder, "none.so"), status=1)
        self.assertIn("none.so", self.runs(out, "fst")[0]["error"])
        self.assertIn("peers: fst, ", done.stderr)
        self.assertTrue(all(run["right"] for run in self.runs(out, "plain")))

    def test_nothing_measured(self):
        self.measure("raises,not-there", status=1)

    def test_no_reference(self):
        out, done = self.measure("fst", "--table", "--casts", "none")
        for run in out["runs"]:
            self.assertIsNone(run["right"])
            self.assertEqual("not compared: no checksums of plain", run["difference"])
        self.assertIn("not compared", done.stdout)

    def test_libraries_take_turns_in_processes_of_their_own(self):
        log = os.path.join(self.folder, "log")
        self.measure("plain,other", "--rounds", "3", "--warm", "2", environment={"PEERS_TEST_LOG": log})
        with open(log, encoding="utf-8") as file:
            lines = [line.split() for line in file]
        self.assertEqual(3 * 2 * 2 * 3, len(lines))
        processes = [lines[i:i + 3] for i in range(0, len(lines), 3)]
        self.assertTrue(all(p[0] == p[1] == p[2] for p in processes))
        self.assertEqual(12, len({p[0][1] for p in processes}))
        one, two = (["plain", "other"] * 2), (["other", "plain"] * 2)
        self.assertEqual(one + two + one, [p[0][0] for p in processes])
        self.assertEqual(["None", "None", "BF16", "BF16"] * 3, [p[0][2] for p in processes])

    def test_no_time(self):
        out, done = self.measure("fst,plain", "--budget", "0.000001", "--table", "--casts", "none", status=1)
        case = f"{self.place} F32 as is"
        self.assertEqual([], out["runs"])
        self.assertEqual([{"library": name, "case": case, "round": 1} for name in ("fst", "plain")], out["left_out"])
        self.assertIn(f"- left out of {case}, no time: fst in round 1, plain in round 1", done.stdout)

    def test_cold(self):
        if self.place == "tmpfs":
            self.skipTest("temporary files are in memory")
        out, _ = self.measure("fst,plain", "--cold", "advise", "--casts", "none")
        self.assertEqual([f"{self.place} F32 as is"] * 2 + ["cold F32 as is"] * 2,
                         [run["case"].removeprefix("first ") for run in self.runs(out, "fst")])
        files = peers.checkpoint_files(self.model)
        for path in files:
            peers.read_header(path)
        self.assertEqual(1, peers.cached_share(files))
        self.assertEqual("fadvise", peers.drop_caches(files, "advise"))
        if peers.cached_share(files) == 1:
            self.skipTest("fadvise does nothing on this file system")
        self.assertEqual(0, peers.cached_share(files))

    def test_tmpfs(self):
        if not peers.in_memory("/dev/shm") or not os.access("/dev/shm", os.W_OK) or self.place == "tmpfs":
            self.skipTest("no /dev/shm, or temporary files are there already")
        before = set(os.listdir("/dev/shm"))
        out, _ = self.measure("fst,plain", "--tmpfs", "/dev/shm", "--casts", "none")
        self.assertEqual({"page cache F32 as is", "tmpfs F32 as is"},
                         {run["case"].removeprefix("first ") for run in out["runs"]})
        self.assertIn("tmpfs_gb_per_s", out["ceilings"])
        self.assertEqual([], [n for n in set(os.listdir("/dev/shm")) - before if n.startswith("fst-peers-")])

    def test_bad_arguments(self):
        other = os.path.join(self.folder, "other.json")
        with open(other, "w", encoding="utf-8") as file:
            file.write("{")
        for bad in ([], ["--device", "gpu", self.model], ["--device", "cuda:x", self.model], [self.folder],
                    [os.path.join(self.folder, "none")], ["--casts", "I64", self.model], ["--rounds", "0", self.model],
                    ["--warm", "-1", self.model], ["--libraries", "nobody", self.model], ["--cold", "never", self.model],
                    ["--tmpfs", HERE, self.model], ["--loaders", "/none.py", self.model], ["--table", other],
                    ["--table", "/none.json"], ["--what"]):
            with self.subTest(bad):
                done = self.run_peers(*bad)
                self.assertEqual((2, ""), (done.returncode, done.stdout))
                self.assertIn("peers", done.stderr)

    # ---- Parts ----

    def test_checksum(self):
        data = bytes(os.urandom(61))
        whole = peers.plain_checksum(data)
        for i in range(len(data)):
            self.assertNotEqual(whole, peers.plain_checksum(data[:i] + bytes([data[i] ^ 0x80]) + data[i + 1:]))
        self.assertNotEqual(peers.plain_checksum(b"A" * 8 + b"B" * 8), peers.plain_checksum(b"B" * 8 + b"A" * 8))
        self.assertEqual("0" * 16, peers.plain_checksum(b""))

    def test_checksum_on_a_device(self):
        if not importlib.util.find_spec("torch"):
            left_out.append("checksums made by torch")
            self.skipTest("no torch")
        import torch
        data = os.urandom(1003)
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [(0, 1003), (0, 1000), (3, 1003), (8, 8), (5, 6)]
        self.assertEqual([peers.plain_checksum(data[a:b]) for a, b in parts],
                         peers.torch_checksums(torch, [flat[a:b] for a, b in parts]))

    def test_real_libraries(self):
        real = [name for name, cls in peers.LIBRARIES.items() if "cpu" in cls.devices and cls.package and
                importlib.util.find_spec("torch") and importlib.util.find_spec(cls.package.replace("-", "_"))]
        left_out.extend(f"{name} itself" for name in peers.LIBRARIES if name != "fst" and name not in real)
        if not real:
            self.skipTest("no torch, or none of the libraries")
        out, _ = self.measure(",".join(["fst", "plain", *real]))
        self.assertEqual({True}, {run["right"] for run in out["runs"]})

    def test_parts(self):
        """Two ranks' parts of the names of a Llama, cut along rows and columns; what is wrong with one of them is told."""
        self.model = os.path.join(self.folder, "llama")
        os.makedirs(self.model)
        shapes = {"model.layers.0.self_attn.q_proj.weight": [6, 5], "model.layers.0.mlp.down_proj.weight": [5, 7], "model.norm.weight": [5]}
        header, at = {}, 0
        for name, shape in shapes.items():
            nbytes = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header).encode()
        with open(os.path.join(self.model, "m.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + os.urandom(at))
        real = [name for name in ("safetensors",) if importlib.util.find_spec("torch") and importlib.util.find_spec(name)]
        libraries = ["plain", "fst", *real]
        out, _ = self.measure(",".join(libraries), "--ranks", "2", "--casts", "none")
        self.assertEqual({(name, f"{first}{self.place} F32 as is, 2 ranks") for name in libraries for first in ("", "first ")},
                         {(run["library"], run["case"]) for run in out["runs"]})
        self.assertEqual({True}, {run["right"] for run in out["runs"]})
        out, _ = self.measure("plain,one-rank,one-fails,no-parts", "--ranks", "2", "--casts", "none", status=1)
        self.assertIn("of rank 1", self.runs(out, "one-rank")[0]["difference"])
        self.assertIn("rank 1: ValueError: not mine", self.runs(out, "one-fails")[0]["error"])
        self.assertEqual("loads no parts", self.runs(out, "no-parts")[0]["error"])

    def test_sampler_without_nvml(self):
        free = iter([1000] + [900, 400, 700] + [800] * 10000)
        cuda = types.SimpleNamespace(get_device_properties=lambda _: types.SimpleNamespace(uuid="none"),
                                     mem_get_info=lambda _: (next(free), 5000))
        sampler = peers.Sampler(types.SimpleNamespace(cuda=cuda), "cuda:0")
        time.sleep(0.1)
        self.assertEqual(600, sampler.stop())

    def test_wheels(self):
        """What --carry asks for is what the page says."""
        for wheel in peers.WHEELS:
            name, version = wheel.split("==")
            self.assertIn(f"{name.replace('-', '_')}-{version}-", peers.__doc__)


def main():
    global lib
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--lib", required=True)
    options, rest = parser.parse_known_args()
    lib = os.path.abspath(options.lib)
    program = unittest.main(argv=[sys.argv[0], *rest], exit=False)
    for what in sorted(set(left_out)):
        print(f"left out: {what}", file=sys.stderr)
    sys.exit(not program.result.wasSuccessful())


if __name__ == "__main__":
    main()
