#!/usr/bin/env python3
"""Tests of the build for AMD, without an AMD GPU. Run by ctest (CMakeLists.txt here).

    test_amd.py [--run COMMAND] [--build build/amd] CASE

    isa          every kernel of the library for gfx90a, gfx942 and gfx1100, by check_isa.py
    more.ARCH    the same for another processor; skipped (77), what includes rocPRIM, where its headers do not know it
    fault.NAME   check_isa.py finds the fault that faults.hip has when compiled with FST_FAULT_<NAME>, by name
    metadata     check_isa.py takes no field that is absent for a 0
    load         the program starts, finds no GPU, says so, and loads on the CPU

Compiler and programs are called behind COMMAND (scripts/amd-root, say), all paths are below the repository.
"""

import argparse
import json
import pathlib
import re
import shlex
import struct
import subprocess
import sys

import check_isa

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parents[1]
ARCHS = ["gfx90a", "gfx942", "gfx1100"]
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-Ikernels", "--offload-device-only", "--no-gpu-bundle-output"]
SKIPPED = 77
FAULTS = {  # what check_isa.py must say; None: no fault
    "none": None,
    "absent": "gfx1201: no kernels",  # a processor that must be there and is not
    "missing": "Rows<18, 15>: missing",  # one of the library's, in a file that must have them all
    "narrow_load": "Cast<18, 15>: 0 of 3 16-byte loads",
    "narrow_aligned": "Cast<18, 18>: 2 of 3 16-byte loads",
    "narrow_store": "Cast<15, 18>: 0 of 1 16-byte stores",
    "flat": "Cast<18, 18>: flat access",
    "scratch": "bytes of scratch",
    "spill": "spilled VGPRs",
    "shared": "waves a SIMD",
    "call": "Cast<18, 18>: call",
    "trap": "Cast<18, 18>: trap",
    "unknown": "Stranger<18, 18>: unknown kernel",
}


class Failure(Exception):
    pass


def want(condition, what):
    if not condition:
        raise Failure(what)


class Rig:
    def __init__(self, command, build):
        self.command, self.build = command, build

    def run(self, *args):
        return subprocess.run([*shlex.split(self.command), *map(str, args)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, check=False, cwd=REPO)

    def folder(self, name):
        path = self.build / "checks" / name
        (REPO / path).mkdir(parents=True, exist_ok=True)
        return path

    def compile(self, source, arch, output, *flags):
        """The code object of one source for one processor; made again only for a source that is newer."""
        if (REPO / output).exists() and (REPO / output).stat().st_mtime > (REPO / source).stat().st_mtime:
            return None
        return self.run("hipcc", *FLAGS, *flags, f"--offload-arch={arch}", "-c", source, "-o", output)

    def check(self, folder, *args):
        """check_isa.py's exit status and what it printed."""
        command = [sys.executable, HERE / "check_isa.py", "--run", self.command, "--folder", self.folder(folder) / "isa"]
        done = subprocess.run([*command, *args], stdout=subprocess.PIPE, text=True, check=False, cwd=REPO)
        print(done.stdout)
        return done.returncode, done.stdout


def isa(rig):
    archs = [word for arch in ARCHS for word in ("--arch", arch)]
    status, _ = rig.check("isa", *archs, "--complete", rig.build / "lib/libfst-hip.so")
    want(status == 0, "faults in the machine code")


def rocprim_lacks(text):
    """True when rocPRIM's headers say that they do not know the processor, and nothing else is wrong."""
    errors = [line for line in text.splitlines() if re.search(r"\berror: ", line)]
    return any("128-bit atomics not implemented for current architecture" in line for line in errors) and all(
        re.match(r"\S*/rocprim/\S*: error: ", line) for line in errors)


def more(rig, arch):
    folder, objects, lacking = rig.folder(f"more.{arch}"), [], []
    for source in sorted((REPO / "kernels").glob("*.hip")):
        output = folder / f"{source.stem}.co"
        (REPO / output).unlink(missing_ok=True)  # headers may have changed
        done = rig.compile(source.relative_to(REPO), arch, output, "-ferror-limit=0")
        if done.returncode and rocprim_lacks(done.stderr):
            lacking.append(source.name)
            continue
        want(done.returncode == 0, done.stderr)
        objects.append(output)
    complete = [] if lacking else ["--complete"]
    status, _ = rig.check(f"more.{arch}", "--arch", arch, *complete, *objects)
    want(status == 0, "faults in the machine code")
    if lacking:
        print(f"not compiled, rocPRIM does not know {arch}: {', '.join(lacking)}")
        sys.exit(SKIPPED)


def metadata(_):
    field_values = {field: 0 for field in check_isa.fields_of("gfx942")}
    field_values.update(uses_dynamic_stack="false", vgpr_count=8, wavefront_size=64, max_flat_workgroup_size=256)
    code = ["global_load_dwordx4 v[0:3]"] * 3 + ["global_store_dwordx4 v[0:3]"]

    def faults(meta):
        return check_isa.judge("gfx942", check_isa.Kernel("void run<Cast<18, 18>>(Cast<18, 18>)", meta, code)).faults

    want(faults(field_values) == [], faults(field_values))
    for field in field_values:
        found = faults({key: value for key, value in field_values.items() if key != field})
        want(found == [f"no {field} in the metadata"], f"{field} is absent: {found}")


def fault(rig, name):
    folder = rig.folder(f"fault.{name}")
    options = {"absent": ["--arch", "gfx1201"], "missing": ["--complete"]}.get(name, [])
    define = f"-DFST_FAULT_{'NONE' if options else name.upper()}"
    for arch in ARCHS:
        output = folder / f"{arch}.co"
        done = rig.compile("tests/amd/faults.hip", arch, output, define)
        want(done is None or done.returncode == 0, done and done.stderr)
        status, text = rig.check(f"fault.{name}", *options, output)
        found = [line for line in text.splitlines() if line.startswith("FAULT ")]
        if FAULTS[name] is None:
            want(status == 0 and not found, f"{arch}: a fault where there is none")
        else:
            want(status == 1 and any(FAULTS[name] in line for line in found), f"{arch}: not found: {FAULTS[name]}")


def load(rig):
    path = rig.folder("load") / "small.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                         "b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]}}).encode()
    data = struct.pack("<6fq", 1, -2, 0.5, 3e38, 1e-40, 256.5, 7)
    (REPO / path).write_bytes(struct.pack("<Q", len(header)) + header + data)
    fst = rig.build / "bin/fst"
    done = rig.run(fst, "load", "--cast", "bf16", "--json", path)
    print(done.stdout, done.stderr)
    want(done.returncode == 0, f"exit status {done.returncode}")
    said = json.loads(done.stdout)
    want(said["device"] == "cpu" and said["tensors"] == 2 and said["bytes_out"] == 20, "not the load on the CPU")
    want("hip: " in said["device_reason"] and "no ROCm-capable device" in said["device_reason"],
         "the reason is not the HIP runtime's own")
    done = rig.run(fst, "load", "--device", "0", path)
    print(done.stdout, done.stderr)
    want(done.returncode == 1 and "FST_E_NO_DEVICE" in done.stderr, "GPU 0 was asked for: FST_E_NO_DEVICE is due")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--run", default="")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/amd"), help="below the repository")
    parser.add_argument("case")
    args = parser.parse_args()
    build = (REPO / args.build).resolve().relative_to(REPO)
    rig = Rig(args.run, build)
    case, _, name = args.case.partition(".")
    try:
        {"isa": isa, "load": load, "more": more, "fault": fault, "metadata": metadata}[case](rig, *([name] if name else []))
    except Failure as failure:
        sys.exit(f"FAILED {args.case}: {failure}")


if __name__ == "__main__":
    main()
