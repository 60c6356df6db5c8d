#!/usr/bin/env python3
"""Checks the machine code of AMD kernels, without an AMD GPU.

    check_isa.py [--run COMMAND] [--arch gfx942]... [--complete] FILE...

A FILE is a library that hipcc linked, with code for several processors in it, or one bare code object. What is
checked, for every kernel that the file holds: no scratch memory, no spilled registers, no accumulation registers
(spills go there too), no flat accesses, no calls, no traps; registers and shared memory leave room for 4 waves a
SIMD; streaming kernels load and store 16 bytes at a time on their wider side, on each of their paths. The names of
the kernels come from the code object. One that RULES does not know is a fault, and so is code that belongs to no
kernel, and with --complete a kernel of `required` that is not there.

The LLVM tools llvm-readelf, llvm-objdump and llvm-cxxfilt are called behind COMMAND (scripts/amd-root, say).
"""

import argparse
import collections
import itertools
import pathlib
import re
import shlex
import struct
import subprocess
import sys
import tempfile

REPO = pathlib.Path(__file__).resolve().parents[2]
WAVES = 4  # a SIMD at least

# Per SIMD: vector registers of a lane, in what units a wave gets them, waves; bytes of shared memory of the four
# SIMDs (a gfx9 compute unit, a gfx11 or gfx12 work-group processor). AMD's "Instruction Set Architecture" guides.
Processor = collections.namedtuple("Processor", "registers unit waves shared")
PROCESSORS = {
    "gfx90a": Processor(512, 8, 8, 65536),
    "gfx942": Processor(512, 8, 8, 65536),
    "gfx950": Processor(512, 8, 8, 163840),
    "gfx1100": Processor(1536, 24, 16, 131072),
    "gfx1201": Processor(1536, 24, 16, 131072),
}

WIDE = {"load": re.compile(r"\bglobal_load_(dwordx4|b128)\b"), "store": re.compile(r"\bglobal_store_(dwordx4|b128)\b")}
BANNED = [(re.compile(r"\bflat_(load|store|atomic)\w*"), "flat access"),
          (re.compile(r"\bscratch_(load|store)\w*|\bbuffer_(load|store)\w*"), "scratch access"),
          (re.compile(r"\bv_accvgpr_\w+"), "accumulation register"),
          (re.compile(r"\bs_swappc_b64|\bs_call_b64"), "call"),
          (re.compile(r"\bs_trap\b"), "trap")]


def dtypes():
    """Name and bytes of an element by the number that kernels have for its type: its place in kernels/dtype_list.h."""
    entries = re.findall(r"^    X\((\w+), (\d+), \d+\)", (REPO / "kernels/dtype_list.h").read_text(), re.M)
    return {number: (name, int(bits) / 8) for number, (name, bits) in enumerate(entries, 1)}


SIZES = {number: size for number, (_, size) in dtypes().items()}
NUMBERS = {name: number for number, (name, _) in dtypes().items()}


# How many 16-byte loads and stores there must be: a load of what lies at any alignment is one of 16 bytes where it is
# aligned, and two where not; a kernel has them as often as it has vectors in flight and paths.
ALIGNED, ANY = 1, 3


def stream(times):
    """A cast with so many copies of its body: 16 bytes on the wider side, or on both."""
    def wide(source, target):
        a, b = SIZES[int(source)], SIZES[int(target)]
        return {"load": ANY * times * (a >= b), "store": ALIGNED * times * (b >= a)}
    return wide


def tile(source, target):
    """A transpose. 256 threads (128 where the target has 8 bytes) take 128 bytes x 128 bytes: 16 on both sides,
    stored on two paths, for whole rows of the target and for ragged ones."""
    a, b = int(SIZES[int(source)]), int(SIZES[int(target)])
    threads = 128 if b == 8 else 256
    if (a, b) == (1, 8):  # 64 bytes x 128, to leave room for 4 waves: loads of 8
        return {"store": 2 * ALIGNED * (512 // threads)}
    return {"load": ANY * (1024 // b // threads), "store": 2 * ALIGNED * (1024 // a // threads or 1)}


def number_alone():
    return {}


# Parts: what the codes are, their type (PackedCodes: how they lie), the target's. An element a thread, no vectors.
BOX = re.compile(r"Box<(?:\(anonymous namespace\)::)?(\w+)(?:<(\d+)>)?, (\d+)>")

# What a kernel's body (the type that launch.h's `run` is given) must have. A new one needs a line here.
RULES = [(re.compile(r"(?:Cast|Batch|Scaled|Encode)<(\d+), (\d+)>"), stream(1)),
         (re.compile(r"Rows<(\d+), (\d+)>"), stream(2)),
         (re.compile(r"Amax<(\d+), (\d+)>"), stream(8)),
         (re.compile(r"Tile<(\d+), (\d+), \d+u?>"), stream(10)),
         (re.compile(r"Transpose<(\d+), (\d+)>"), tile),
         (re.compile(r"(?:Nvfp4|Bnb4)<(\d+)>"), lambda target: {"store": ALIGNED}),
         (re.compile(r"(?:Affine|Columns)<(\d+), (\d+)>"), lambda source, target: {"store": ALIGNED}),
         (re.compile(r"PackedRows<(\d+)u?, (\d+)>"), lambda bits, target: {"store": ALIGNED}),
         (re.compile(r"PackedPairs<(\d+)>"), lambda target: {"store": 2 * ALIGNED}),
         (re.compile(r"PackedTile<(\d+)u?, (\d+), (?:true|false)>"), lambda bits, target: {"load": ANY, "store": ALIGNED}),
         (BOX, lambda codes, kind, target: {}),
         (re.compile(r"Fnuz"), lambda: {"load": ANY, "store": ALIGNED}),
         (re.compile(r"Begin|MakeScale<\d+>"), number_alone)]
BODY = re.compile(r"^void (?:\(anonymous namespace\)::)?run(?:_reduce|_phases)?<(?:\(anonymous namespace\)::)?(?:fault::)?(.*)>\(")


def required():
    """The kernels that there must be: their family, and the types by their numbers. kernels/kernels.h says it in words."""
    floats = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ".split()
    narrow = "F8_E8M0 F6_E2M3 F6_E3M2 F4".split()
    plain = "F32 F16 BF16".split()
    casts = [pair for pair in itertools.product(floats, floats) if pair[0] != pair[1]]
    codes = list(itertools.product(plain, ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")))
    families = {
        "Cast": casts + list(itertools.product(narrow, plain)) + [("U8", "U8")],
        "Rows": casts + [("U8", "U8")],
        "Transpose": casts + [(name, name) for name in ("U8", "U16", "U32", "U64")],
        "Scaled": itertools.product([*floats[4:], "I8", "F4"], plain),
        "Nvfp4": [(name,) for name in plain],
        "Bnb4": [(name,) for name in plain],
        "Affine": itertools.product([*floats[4:], "I8"], plain),
        "Columns": itertools.product([*floats[4:], "I8"], plain),
        "Amax": codes, "Encode": codes, "Tile": codes,
        "MakeScale": sorted({(target,) for _, target in codes}),
        "Begin": [()], "Fnuz": [()],
        "ScaledCodes": itertools.product([*floats[4:], "I8", "F4"], plain),
        "NarrowCodes": itertools.product(narrow[1:], plain),
        "Nvfp4Codes": [(name,) for name in plain],
        "Bnb4Codes": [(name,) for name in plain],
    }
    families["Batch"] = families["Cast"]
    packed = {("PackedRows", bits, NUMBERS[name]) for bits in range(1, 9) for name in plain}
    packed |= {("PackedTile", bits, NUMBERS[name]) for bits in (2, 3, 4, 8) for name in plain}
    packed |= {("PackedPairs", NUMBERS[name]) for name in plain}
    packed |= {("PackedCodes", layout, NUMBERS[name]) for layout in range(4) for name in plain}
    return packed | {(family, *(NUMBERS[name] for name in types))
                     for family, all_types in families.items() for types in all_types}


def identity(name):
    """A kernel as `required` names it: without what comes after its types, such as a number of threads."""
    if box := BOX.fullmatch(short(name)):
        return (box[1], *(int(group) for group in box.groups()[1:] if group))
    family, _, types = short(name).partition("<")
    return (family, *map(int, re.findall(r"\d+", types)[:2]))


FOREIGN = re.compile(r"^\S*( |\b)(rocprim|hipcub)::")  # listed, not judged

Kernel = collections.namedtuple("Kernel", "name meta code")
Verdict = collections.namedtuple("Verdict", "name faults waves registers")


class Tools:
    def __init__(self, command):
        self.command = shlex.split(command)

    def __call__(self, tool, *args, **more):
        done = subprocess.run([*self.command, tool, *args], check=True, stdout=subprocess.PIPE, text=True, **more)
        return done.stdout


def code_objects(path):
    """(processor, bytes) of each code object in a file; no processor for a bare one, which knows its own."""
    data = path.read_bytes()
    if data[:4] == b"\x7fELF" and struct.unpack_from("<H", data, 18)[0] == 224:  # EM_AMDGPU
        return [(None, data)]
    found, magic = [], b"__CLANG_OFFLOAD_BUNDLE__"
    start = data.find(magic)
    while start >= 0:
        at = start + len(magic)
        (count,) = struct.unpack_from("<Q", data, at)
        at += 8
        for _ in range(count):
            offset, size, length = struct.unpack_from("<3Q", data, at)
            target = data[at + 24:at + 24 + length].decode()
            at += 24 + length
            if size and "amdgcn" in target:
                found.append((target.split("--")[-1].split(":")[0], data[start + offset:start + offset + size]))
        start = data.find(magic, at)
    if b"CCOB" in data and not found:
        raise SystemExit(f"{path}: its code objects are compressed: build without --offload-compress")
    return found


def metadata(notes):
    """The processor, and the fields of each kernel that are numbers or names."""
    target = re.search(r"^amdhsa.target: +'?\S*?(gfx\w+)", notes, re.M)
    kernels = []
    for block in re.split(r"^  - (?=\.)", notes, flags=re.M)[1:]:
        fields = dict(re.findall(r"^ {0,4}\.(\w+): +'?([^\s']+)'?$", block, re.M))
        if "symbol" in fields:
            kernels.append({key: int(value) if value.isdigit() else value for key, value in fields.items()})
    return target and target[1], kernels


def functions(assembly):
    """Instructions by the function that they are in. What lies before the first, if only padding, is none.

    Zeros are shown as "...".
    """
    found, current = {}, None
    for line in assembly.splitlines():
        label = re.match(r"^[0-9a-f]+ <(.+)>:$", line)
        if label:
            current = found.setdefault(label[1], [])
        elif current is not None and line.startswith("\t"):
            current.append(line.split("//")[0].strip())
    return {name: code for name, code in found.items()
            if name != ".text" or any(c.split()[0] not in ("s_nop", "s_code_end", "...") for c in code)}


def waves(processor, meta):
    """Waves that a SIMD can hold, of 4 SIMDs that share their memory."""
    p, lanes = PROCESSORS[processor], meta["wavefront_size"]
    registers, unit = p.registers, p.unit
    if p.waves == 16 and lanes == 64:  # two of its registers make one
        registers, unit = registers // 2, unit // 2
    used = max(meta["vgpr_count"], 1)
    possible = min(p.waves, registers // (-(-used // unit) * unit))
    if meta["group_segment_fixed_size"]:
        group = -(-meta["max_flat_workgroup_size"] // lanes)
        possible = min(possible, p.shared // meta["group_segment_fixed_size"] * group // 4)
    return possible


def fields_of(processor):
    """What the metadata must say, or nothing was checked."""
    fields = ["private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count", "uses_dynamic_stack", "vgpr_count",
              "wavefront_size", "group_segment_fixed_size", "max_flat_workgroup_size"]
    return fields + ["agpr_count"] * processor.startswith("gfx9")


def resource_faults(processor, meta):
    for field, what in (("private_segment_fixed_size", "bytes of scratch"), ("vgpr_spill_count", "spilled VGPRs"),
                        ("sgpr_spill_count", "spilled SGPRs"), ("agpr_count", "accumulation registers")):
        if meta.get(field, 0):
            yield f"{meta[field]} {what}"
    if meta.get("uses_dynamic_stack") == "true":
        yield "a stack that grows"
    fits = waves(processor, meta)
    if fits < WAVES:
        shared = meta["group_segment_fixed_size"]
        yield f"room for {fits} waves a SIMD ({meta['vgpr_count']} VGPRs, {shared} bytes shared)"


def code_faults(code, wide):
    text = "\n".join(code)
    for pattern, what in BANNED:
        hits = pattern.findall(text)
        if hits:
            first = next(line for line in code if pattern.search(line))
            yield f"{what}, {len(hits)} times ({first})"
    for side, least in wide.items():
        found = len(WIDE[side].findall(text))
        if found < least:
            yield f"{found} of {least} 16-byte {side}s"


def judge(processor, kernel):
    absent = [f"no {field} in the metadata" for field in fields_of(processor) if field not in kernel.meta]
    if absent:
        return Verdict(kernel.name, absent, 0, 0)
    faults = list(resource_faults(processor, kernel.meta))
    body = BODY.match(kernel.name)
    rule = next(((wide, m) for pattern, wide in RULES if (m := pattern.fullmatch(body[1] if body else ""))), None)
    if rule is None:
        faults.append("unknown kernel: give it a line in RULES of check_isa.py")
    faults += code_faults(kernel.code, rule[0](*rule[1].groups()) if rule else {})
    return Verdict(kernel.name, faults, waves(processor, kernel.meta), kernel.meta["vgpr_count"])


def examine(tools, processor, path):
    """(processor, verdicts on our kernels, names of others, faults of the whole) of one bare code object."""
    where = path.relative_to(REPO) if path.is_relative_to(REPO) else path
    target, metas = metadata(tools("llvm-readelf", "--notes", str(where)))
    if processor and target != processor:
        return processor, [], [], [f"the bundle says {processor}, its code object {target}"]
    if target not in PROCESSORS:
        return target, [], [], [f"unknown processor {target}: give it a line in PROCESSORS"]
    code = functions(tools("llvm-objdump", "-d", "--no-show-raw-insn", str(where)))
    symbols = set(re.findall(r"(\S+)\.kd$", tools("llvm-readelf", "-sW", str(where)), re.M))
    named = {meta["name"] for meta in metas}
    faults = [f"{name}: in the {a}, not in the {b}" for a, x, b, y in
              (("symbols", symbols, "metadata", named), ("metadata", named, "symbols", symbols),
               ("code", set(code), "metadata", named), ("metadata", named, "code", set(code))) for name in sorted(x - y)]
    names = dict(zip(named, tools("llvm-cxxfilt", input="\n".join(named) + "\n").splitlines())) if named else {}
    kernels = [Kernel(names[m["name"]], m, code.get(m["name"], [])) for m in metas]
    ours = [judge(target, k) for k in kernels if not FOREIGN.match(k.name)]
    return target, ours, [k.name for k in kernels if FOREIGN.match(k.name)], faults


def short(name):
    body = BODY.match(name)
    return body[1] if body else name


def check(tools, files, archs, complete, folder):
    """Faults of all files; prints what was examined."""
    faults, kernels_of, others = [], collections.defaultdict(set), set()
    lowest, most, objects = {}, {}, collections.Counter()
    for file in files:
        for number, (processor, data) in enumerate(code_objects(file)):
            path = folder / f"{file.name}.{number}.co"
            path.write_bytes(data)
            processor, ours, foreign, whole = examine(tools, processor, path)
            objects[processor] += 1
            faults += [f"{processor}: {fault}" for fault in whole]
            faults += [f"{processor}: {short(v.name)}: {fault}" for v in ours for fault in v.faults]
            others |= {f"{processor}: {name}" for name in foreign}
            for v in ours:
                if v.name in kernels_of[processor]:
                    faults.append(f"{processor}: {short(v.name)}: twice, so one of them is unnamed")
                kernels_of[processor].add(v.name)
                lowest[processor] = min(lowest.get(processor, (99, "")), (v.waves, short(v.name)))
                most[processor] = max(most.get(processor, (0, "")), (v.registers, short(v.name)))
    faults += [f"{arch}: no kernels" for arch in archs if not kernels_of[arch]]
    everything = set().union(*kernels_of.values()) if kernels_of else set()
    faults += [f"{arch}: {short(name)}: missing, others have it" for arch in kernels_of
               for name in sorted(everything - kernels_of[arch])]
    if complete:
        faults += [f"{arch}: {family}<{', '.join(map(str, types))}>: missing" for arch in kernels_of
                   for family, *types in sorted(required() - set(map(identity, kernels_of[arch])))]
    for arch in sorted(kernels_of):
        if kernels_of[arch]:
            print(f"{arch}: {len(kernels_of[arch])} kernels in {objects[arch]} code objects; most VGPRs "
                  f"{most[arch][0]} ({most[arch][1]}), fewest waves {lowest[arch][0]} ({lowest[arch][1]})")
    for name in sorted(others):
        print(f"not ours, not judged: {name}")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--run", default="", help="what the LLVM tools are called behind")
    parser.add_argument("--arch", action="append", default=[], help="must be there")
    parser.add_argument("--complete", action="store_true", help="every kernel of the library must be there")
    parser.add_argument("--folder", type=pathlib.Path, help="for the code objects, inside the repository; is kept")
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    tools = Tools(args.run)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        faults = check(tools, args.files, args.arch, args.complete, args.folder.resolve())
    else:
        with tempfile.TemporaryDirectory(dir=REPO / "build") as folder:
            faults = check(tools, args.files, args.arch, args.complete, pathlib.Path(folder))
    for fault in faults:
        print(f"FAULT {fault}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
