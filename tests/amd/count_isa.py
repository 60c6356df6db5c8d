#!/usr/bin/env python3
"""Counts the instructions that a wave of each kernel issues for one vector, without an AMD GPU: no measurement.

    count_isa.py [--run COMMAND] [--table] [--filter TEXT] FILE...
    count_isa.py --self-test

FILE is what check_isa.py takes; its code for gfx942 is used. One lane of a wave is followed through the machine code,
with arguments of a large, aligned tensor: what the kernel does for almost all of its elements. All lanes of such a
wave take the same way, so the lane's instructions are the wave's; what it reads of other lanes is its own. That the way
was right shows in what it stored: as many bytes as it had to, and of copies and exact conversions the right ones.
"""

import argparse
import collections
import ctypes
import pathlib
import re
import struct
import sys
import tempfile

import check_isa

# MI300X: compute units, SIMDs of each, lanes of each, clock at its peak, memory.
# A SIMD issues a vector instruction of a wave of 64 in 4 cycles; transcendental ones, and those between integers and
# F32, take four times as long (llvm-mca -mcpu=gfx942 -instruction-info: a latency of 4 instead of 1; 64-bit and
# packed ones have 1). AMD's profiler has seen two issued at once "in specific circumstances": not counted on here.
# A scalar instruction of another wave is issued beside it, one a SIMD in these 4 cycles.
LANE_OPERATIONS, MEMORY = 304 * 4 * 16 * 2.1e9, 5.3e12
SLOW = re.compile(r"v_(rcp|rsq|sqrt|exp|log|sin|cos)_|v_cvt_(f32_[ui]32|[ui]32_f32)")

Instruction = collections.namedtuple("Instruction", "name operands modifiers next target")
Count = collections.namedtuple("Count", "vector passes scalar memory shared loaded stored")


def parse(assembly):
    """Of llvm-objdump's text: names of functions to (address of the first, instructions by address)."""
    found, lines = {}, []
    for line in assembly.splitlines():
        label = re.match(r"^[0-9a-f]+ <(.+)>:$", line)
        if label:
            lines = found.setdefault(label[1], [])
        elif match := re.match(r"^\t(\S+) *(.*?) *// ([0-9A-F]+):", line):
            lines.append((int(match[3], 16), match[1], match[2]))
    return {name: (code[0][0], decode(code)) for name, code in found.items() if code}


def decode(lines):
    code = {}
    for (at, name, text), following in zip(lines, [at for at, *_ in lines[1:]] + [None]):
        modifiers = dict(re.findall(r"\b(\w+):(\[[-\d,]+\]|\w+)", text))
        modifiers["clamp"] = " clamp" in text
        plain = re.split(r" (?:offset|op_sel|neg_lo|dst_sel|src0_sel|row_|quad_perm|clamp|nt\b|sc0)", text)[0]
        operands = [o.strip() for o in re.split(r",(?![^\[]*\])", plain)] if plain else []
        target = None
        if name.startswith(("s_branch", "s_cbranch")):
            words = int(operands[0].split()[0])
            target = at + 4 + 4 * (words - 0x10000 if words >= 0x8000 else words)
        code[at] = Instruction(re.sub(r"_(e32|e64|sdwa|dpp)$", "", name), operands, modifiers, following, target)
    return code


# ---- Numbers ----

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def signed(x, bits=32):
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def f32(bits):
    return struct.unpack("<f", struct.pack("<I", bits & MASK32))[0]


def bits32(x):
    return struct.unpack("<I", bytes(ctypes.c_float(x)))[0]


def f64(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def bits64(x):
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def divide(a, b):
    return a / b if b else float("inf") if a else float("nan")


def perm(a, b, select):
    both, out = a << 32 | b, 0
    for i in range(4):
        s = select >> 8 * i & 0xFF
        if s < 8:
            byte = both >> 8 * s & 0xFF
        elif s < 12:  # the sign of every second one
            byte = 255 * (both >> (16 * s - 113) & 1)
        else:
            byte = 255 * (s > 12)
        out |= byte << 8 * i
    return out


def floats(f):
    return lambda *x: bits32(f(*map(f32, x)))


def shorts(f):
    return lambda *x: f(*(a & 0xFFFF for a in x)) & 0xFFFF


# Vector instructions that are functions of their sources.
VECTOR = {
    "v_mov_b32": lambda a: a, "v_mov_b64": lambda a: a, "v_not_b32": lambda a: ~a,
    "v_bfrev_b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "v_and_b32": lambda a, b: a & b, "v_or_b32": lambda a, b: a | b, "v_xor_b32": lambda a, b: a ^ b,
    "v_and_or_b32": lambda a, b, c: a & b | c, "v_or3_b32": lambda a, b, c: a | b | c,
    "v_lshl_or_b32": lambda a, b, c: (a << (b & 31)) | c, "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
    "v_add_u32": lambda a, b: a + b, "v_sub_u32": lambda a, b: a - b, "v_subrev_u32": lambda a, b: b - a,
    "v_add3_u32": lambda a, b, c: a + b + c, "v_lshl_add_u32": lambda a, b, c: (a << (b & 31)) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) << (c & 31), "v_lshl_add_u64": lambda a, b, c: (a << (b & 7)) + c,
    "v_lshlrev_b32": lambda a, b: b << (a & 31), "v_lshrrev_b32": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32": lambda a, b: signed(b) >> (a & 31),
    "v_lshlrev_b64": lambda a, b: b << (a & 63), "v_lshrrev_b64": lambda a, b: b >> (a & 63),
    "v_lshlrev_b16": shorts(lambda a, b: b << (a & 15)), "v_lshrrev_b16": shorts(lambda a, b: b >> (a & 15)),
    "v_add_u16": shorts(lambda a, b: a + b), "v_max_u16": shorts(max), "v_max3_u16": shorts(max),
    "v_bfe_u32": lambda a, b, c: a >> (b & 31) & ((1 << (c & 31)) - 1),
    "v_bfe_i32": lambda a, b, c: signed(a >> (b & 31) & ((1 << (c & 31)) - 1), c & 31),
    "v_alignbyte_b32": lambda a, b, c: (a << 32 | b) >> 8 * (c & 3),
    "v_alignbit_b32": lambda a, b, c: (a << 32 | b) >> (c & 31), "v_perm_b32": perm,
    "v_min_u32": min, "v_max_u32": max, "v_max3_u32": max,
    "v_min_i32": lambda a, b: min(signed(a), signed(b)), "v_max_i32": lambda a, b: max(signed(a), signed(b)),
    "v_mul_lo_u32": lambda a, b: a * b, "v_mul_hi_u32": lambda a, b: a * b >> 32,
    "v_mul_u32_u24": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_bcnt_u32_b32": lambda a, b: bin(a).count("1") + b,
    "v_add_f32": floats(lambda a, b: a + b), "v_sub_f32": floats(lambda a, b: a - b),
    "v_mul_f32": floats(lambda a, b: a * b), "v_fma_f32": floats(lambda a, b, c: a * b + c),
    "v_div_fmas_f32": floats(lambda a, b, c: a * b + c), "v_rcp_f32": floats(lambda a: divide(1.0, a)),
    "v_div_fixup_f32": floats(lambda q, a, b: divide(b, a)), "v_add_f64": lambda a, b: bits64(f64(a) + f64(b)),
    "v_cvt_f32_u32": lambda a: bits32(a), "v_cvt_f32_i32": lambda a: bits32(signed(a)),
    "v_cvt_u32_f32": lambda a: max(0, int(f32(a))), "v_ldexp_f32": lambda a, b: bits32(f32(a) * 2.0 ** signed(b)),
}
PACKED = {"v_pk_add_f32": lambda a, b: a + b, "v_pk_mul_f32": lambda a, b: a * b,
          "v_pk_fma_f32": lambda a, b, c: a * b + c}
COMPARE = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lg": lambda a, b: a != b, "gt": lambda a, b: a > b,
           "lt": lambda a, b: a < b, "ge": lambda a, b: a >= b, "le": lambda a, b: a <= b,
           "nlt": lambda a, b: not a < b, "ngt": lambda a, b: not a > b}
# Scalar ones: the result and what becomes of the condition: a bit, or None where it stays.
LOGIC = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "andn2": lambda a, b: a & ~b,
         "orn2": lambda a, b: a | ~b, "lshl": lambda a, b: a << b, "lshr": lambda a, b: a >> b}


def carry(x):
    return x & MASK32, int(not 0 <= x <= MASK32)


SCALAR = {
    "s_add_u32": lambda a, b, c: carry(a + b), "s_addc_u32": lambda a, b, c: carry(a + b + c),
    "s_sub_u32": lambda a, b, c: carry(a - b), "s_subb_u32": lambda a, b, c: carry(a - b - c),
    "s_add_i32": lambda a, b, c: (a + b, int(signed((a + b) & MASK32) != signed(a) + signed(b))),
    "s_sub_i32": lambda a, b, c: (a - b, int(signed((a - b) & MASK32) != signed(a) - signed(b))),
    "s_mul_i32": lambda a, b, c: (a * b, None), "s_mul_hi_u32": lambda a, b, c: (a * b >> 32, None),
    "s_min_u32": lambda a, b, c: (min(a, b), int(a < b)), "s_max_u32": lambda a, b, c: (max(a, b), int(a > b)),
    "s_bfe_u32": lambda a, b, c: (x := a >> (b & 31) & ((1 << (b >> 16 & 127)) - 1), int(x != 0)),
    "s_cselect_b32": lambda a, b, c: (a if c else b, None), "s_cselect_b64": lambda a, b, c: (a if c else b, None),
    "s_mov_b32": lambda a, c: (a, None), "s_mov_b64": lambda a, c: (a, None), "s_movk_i32": lambda a, c: (a, None),
    "s_brev_b32": lambda a, c: (int(f"{a:032b}"[::-1], 2), None),
    "s_flbit_i32_b32": lambda a, c: (32 - a.bit_length() if a else MASK32, None),
    "s_ff1_i32_b64": lambda a, c: ((a & -a).bit_length() - 1, None),
}
BRANCH = {"s_branch": lambda l: True, "s_cbranch_scc0": lambda l: not l.condition,
          "s_cbranch_scc1": lambda l: l.condition, "s_cbranch_vccz": lambda l: not l.get("vcc", 64),
          "s_cbranch_vccnz": lambda l: l.get("vcc", 64), "s_cbranch_execz": lambda l: not l.active(),
          "s_cbranch_execnz": lambda l: l.active()}
IDLE = ("s_waitcnt", "s_nop", "s_barrier", "s_endpgm", "s_sleep", "s_branch", "s_cbranch")
NAMED = {"vcc": 106, "vcc_lo": 106, "vcc_hi": 107, "m0": 124, "exec": 126, "exec_lo": 126, "exec_hi": 127}
SIZES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16,
         "b32": 4, "b64": 8, "b128": 16}


class Memory:
    """Ranges that may be touched; what was not written is what `fill` says of its offset."""

    def __init__(self):
        self.ranges, self.bytes = [], {}

    def add(self, base, size, fill=lambda offset: 0):
        self.ranges.append((base, base + size, fill))
        return base

    def range_of(self, at, size):
        for begin, end, fill in self.ranges:
            if begin <= at and at + size <= end:
                return begin, fill
        raise SystemExit(f"access outside of all buffers: {size} bytes at {at:#x}")

    def load(self, at, size):
        begin, fill = self.range_of(at, size)
        return bytes(self.bytes.get(i, fill(i - begin) & 255) for i in range(at, at + size))

    def store(self, at, data):
        self.range_of(at, len(data))
        self.bytes.update(zip(range(at, at + len(data)), data))


class Lane:
    """One lane of a wave: its vector registers, the wave's scalar ones."""

    def __init__(self, code, memory, shared, arguments, block, thread):
        self.code, self.memory, self.shared, self.lane = code, memory, shared, thread % 64
        self.vector, self.scalar, self.condition = [0] * 512, [0] * 128, 0
        self.counted = collections.Counter()
        self.stored = {}
        self.vector[0] = thread
        self.put("s[0:1]", arguments, 64)
        self.scalar[2] = block
        self.put("exec", 1 << self.lane, 64)

    # -- Registers --
    def place(self, operand):
        if operand in NAMED:
            return self.scalar, NAMED[operand]
        kind, number = re.match(r"^([vs])\[?(\d+)", operand).groups()
        return (self.vector if kind == "v" else self.scalar), int(number)

    def get(self, operand, bits=32, kind="u"):
        if re.match(r"^-?(0x[0-9a-f]+|\d+)$", operand):
            return int(operand, 0) & ((1 << bits) - 1)
        if re.match(r"^-?\d+\.\d+$", operand):
            return bits64(float(operand)) if kind == "f64" else bits32(float(operand))
        if operand.startswith("-"):
            return self.get(operand[1:], bits, kind) ^ 1 << (bits - 1)
        if operand.startswith("|"):
            return self.get(operand[1:-1], bits, kind) & ((1 << (bits - 1)) - 1)
        if operand.startswith("sext("):
            return self.get(operand[5:-1], bits, kind)
        file, at = self.place(operand)
        return sum(file[at + i] << 32 * i for i in range((bits + 31) // 32))

    def put(self, operand, value, bits=32):
        file, at = self.place(operand)
        for i in range((bits + 31) // 32):
            file[at + i] = value >> 32 * i & MASK32

    def active(self):
        return self.get("exec", 64)

    def bit(self, operand):
        return self.get(operand, 64) >> self.lane & 1

    # -- Execution --
    def run(self, at):
        """Yields at each barrier."""
        for _ in range(100000):
            i = self.code[at]
            self.count(i.name)
            if i.name == "s_endpgm":
                return
            if i.name == "s_barrier":
                yield
            at = i.target if i.name in BRANCH and BRANCH[i.name](self) else i.next
            try:
                if i.name not in BRANCH:
                    self.step(i)
            except (KeyError, AttributeError, ValueError) as error:
                raise SystemExit(f"not understood, to be added here: {i.name} {', '.join(i.operands)}") from error
        raise SystemExit("100,000 instructions: no end in sight")

    def count(self, name):
        kind = ("vector" if name.startswith("v_") else "memory" if name.startswith("global_") else
                "shared" if name.startswith("ds_") else "idle" if name.startswith(IDLE) else
                "load" if name.startswith("s_load") else "scalar")
        self.counted[kind] += 1
        self.counted["slow"] += bool(SLOW.match(name))

    def step(self, i):
        if i.name.startswith(("s_waitcnt", "s_nop", "s_barrier", "s_sleep")):
            return
        prefix = i.name.split("_")[0]
        {"s": self.step_scalar, "v": self.step_vector, "global": self.step_global, "ds": self.step_shared}[prefix](i)

    def step_scalar(self, i):
        name, o = i.name, i.operands
        bits = 64 if name.endswith("64") else 32
        word = name.split("_")[1]
        if name.startswith("s_load_dword"):
            size = 4 * int(name[13:] or 1)
            data = self.memory.load(self.get(o[1], 64) + self.get(o[2]), size)
            return self.put(o[0], int.from_bytes(data, "little"), 8 * size)
        if name == "s_getpc_b64":
            return self.put(o[0], i.next, 64)
        if name.endswith("_saveexec_b64"):
            before, source = self.active(), self.get(o[1], 64)
            mask = {"and": source & before, "andn2": source & ~before, "or": source | before}[word]
            self.put(o[0], before, 64)
            self.put("exec", mask, 64)
            self.condition = int(mask & MASK64 != 0)
        elif word in ("cmp", "cmpk"):
            a, b = (self.get(x, bits) for x in o)
            if "_i" in name:
                a, b = signed(a, bits), signed(b, bits)
            self.condition = int(COMPARE[name.split("_")[2]](a, b))
        elif word in ("bitcmp0", "bitcmp1"):
            self.condition = int((self.get(o[0]) >> (self.get(o[1]) & 31) & 1) == int(word[-1]))
        elif word in LOGIC:
            b = self.get(o[2], bits) & (bits - 1 if word in ("lshl", "lshr") else MASK64)
            x = LOGIC[word](self.get(o[1], bits), b) & ((1 << bits) - 1)
            self.put(o[0], x, bits)
            self.condition = int(x != 0)
        else:
            source_bits = 64 if name == "s_ff1_i32_b64" else bits
            x, condition = SCALAR[name](*(self.get(x, source_bits) for x in o[1:]), self.condition)
            self.put(o[0], x & MASK64, bits)
            self.condition = self.condition if condition is None else condition

    def source(self, i, number, operand, bits=32, kind="u"):
        x = self.get(operand, bits, kind)
        select = i.modifiers.get(f"src{number}_sel", "DWORD")
        if select != "DWORD":
            width = 8 if select.startswith("BYTE") else 16
            x = x >> width * int(select[-1]) & ((1 << width) - 1)
            if operand.startswith("sext("):
                x = signed(x, width) & MASK32
        return x

    def step_vector(self, i):
        name, o = i.name, i.operands
        on = self.bit("exec")
        if name in ("v_readfirstlane_b32", "v_readlane_b32"):
            return self.put(o[0], self.get(o[1]))
        if name.startswith("v_cmp_"):
            _, _, how, kind = name.split("_")
            bits = int(kind[1:])
            a, b = (self.source(i, n, x, max(bits, 32), kind) & ((1 << bits) - 1) for n, x in enumerate(o[1:]))
            if kind[0] == "i":
                a, b = signed(a, bits), signed(b, bits)
            elif kind == "f32":
                a, b = f32(a), f32(b)
            return self.put(o[0], (on & int(COMPARE[how](a, b))) << self.lane, 64)
        bits = 64 if name.endswith(("b64", "u64", "f64", "u64_u32")) or name in PACKED else 32
        result, out = self.result(i, name, o)
        if out is not None:
            self.put(o[1], (on & out) << self.lane, 64)
        if on:
            select = i.modifiers.get("dst_sel", "DWORD")
            if select != "DWORD":  # the rest becomes 0: UNUSED_PAD
                width = 8 if select.startswith("BYTE") else 16
                result = (result & ((1 << width) - 1)) << width * int(select[-1])
            self.put(o[0], result, bits)

    def result(self, i, name, o):
        """Of a vector instruction; and a carry, or None."""
        if name in PACKED:
            return self.packed(i, name, o), None
        if re.match(r"v_(add|sub)", name) and "_co_" in name:
            a, b = self.source(i, 0, o[2]), self.source(i, 1, o[3])
            if "rev" in name:
                a, b = b, a
            by = self.bit(o[4]) if len(o) > 4 else 0
            return carry(a + b + by if name.startswith("v_add") else a - b - by)
        if name == "v_cndmask_b32":
            return (self.source(i, 1, o[2]) if self.bit(o[3]) else self.source(i, 0, o[1])), None
        if name == "v_mad_u64_u32":
            x = self.get(o[2]) * self.get(o[3]) + self.get(o[4], 64)
            return x & MASK64, int(x > MASK64)
        if name == "v_div_scale_f32": # as where nothing must be scaled
            return self.get(o[2]), 0
        if name == "v_fmac_f32":
            return bits32(f32(self.get(o[1])) * f32(self.get(o[2])) + f32(self.get(o[0]))), None
        if name in ("v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32"):
            below = (1 << self.lane) - 1
            mask = self.get(o[1]) & (below if "lo" in name else below >> 32) & MASK32
            return bin(mask).count("1") + self.get(o[2]), None
        wide = [name.endswith("64") and not (n == 0 and "rev" in name) for n in range(len(o) - 1)]
        if name == "v_lshl_add_u64":
            wide[1] = False
        sources = [self.source(i, n, x, 64 if w else 32, "f64" if name.endswith("f64") else "u")
                   for n, (x, w) in enumerate(zip(o[1:], wide))]
        x = VECTOR[name](*sources)
        if i.modifiers["clamp"]:
            x = min(max(x, 0), MASK32)
        return x & MASK64, None

    def packed(self, i, name, o):
        def flags(modifier, default):
            text = i.modifiers.get(modifier)
            return [int(x) for x in text[1:-1].split(",")] if text else [default] * 3
        halves = []
        for half, select, negative in ((0, flags("op_sel", 0), flags("neg_lo", 0)),
                                       (1, flags("op_sel_hi", 1), flags("neg_hi", 0))):
            values = []
            for n, operand in enumerate(o[1:]):
                word = self.get(operand, 64) >> 32 * select[n] & MASK32
                values.append(f32(word ^ negative[n] << 31))
            halves.append(bits32(PACKED[name](*values)))
        return halves[1] << 32 | halves[0]

    def address(self, i, vector, scalar):
        offset = int(i.modifiers.get("offset", "0"))
        if scalar == "off":
            return self.get(vector, 64) + offset
        return self.get(scalar, 64) + self.get(vector) + offset

    def step_global(self, i):
        if not self.bit("exec"):
            return
        what, o = i.name.split("_"), i.operands
        if what[1] == "atomic":
            return
        size = SIZES[what[2]]
        if what[1] == "load":
            data = self.memory.load(self.address(i, o[1], o[2]), size)
            self.counted["loaded"] += size
            value = int.from_bytes(data, "little", signed=what[2] == "sbyte")
            return self.put(o[0], value, 8 * max(size, 4))
        at = self.address(i, o[0], o[2])
        data = (self.get(o[1], 8 * max(size, 4)) >> (16 if "hi" in what else 0)) & ((1 << 8 * size) - 1)
        self.counted["stored"] += size
        self.memory.store(at, data.to_bytes(size, "little"))
        self.stored.update(zip(range(at, at + size), data.to_bytes(size, "little")))

    def step_shared(self, i):
        if not self.bit("exec"):
            return
        _, what, kind = i.name.split("_")
        o = i.operands
        if what == "bpermute":
            return self.put(o[0], self.get(o[2]))
        size = SIZES[kind]
        at = self.get(o[1] if what.startswith("read") else o[0])
        if what.startswith(("write2", "read2")):
            step = size * (64 if what.endswith("st64") else 1)
            places = [at + step * int(i.modifiers.get("offset" + n, "0")) for n in "01"]
            if what.startswith("read2"):
                both = b"".join(self.shared[place:place + size] for place in places)
                return self.put(o[0], int.from_bytes(both, "little"), 16 * size)
            for n, place in enumerate(places):
                self.share(place, self.get(o[1 + n], 8 * size), size)
        elif what == "write":
            self.share(at + int(i.modifiers.get("offset", "0")), self.get(o[1], 8 * size), size)
        else:
            at += int(i.modifiers.get("offset", "0"))
            self.put(o[0], int.from_bytes(self.shared[at:at + size], "little"), 8 * size)

    def share(self, at, value, size):
        self.shared[at:at + size] = value.to_bytes(size, "little")


def follow(code, memory, arguments, block, threads=1, behind=None):
    """Runs the first lanes of a block, only `behind` of them behind the first barrier; counts of the first, and the bytes
    that all stored by their address."""
    start, instructions = code
    base = memory.add(1 << 44, max(len(arguments), 1))
    memory.store(base, arguments)
    shared = bytearray(65536)
    lanes = [Lane(instructions, memory, shared, base, block, thread) for thread in range(threads)]
    running = [lane.run(start) for lane in lanes]
    while running:  # as far as the next barrier
        running = [r for r in running if next(r, "end") != "end"][:behind]
    c = lanes[0].counted
    stored = {at: byte for lane in lanes for at, byte in lane.stored.items()}
    return Count(c["vector"], c["vector"] + 3 * c["slow"], c["scalar"] + c["load"], c["memory"], c["shared"],
                 c["loaded"], c["stored"]), stored


# ---- What is counted ----

SRC, DST, SCALES, NANS = 1 << 40, 2 << 40, 3 << 40, 5 << 40
ZEROS, ORDER = 6 << 40, 7 << 40  # of packed integers
BIG = 1 << 24                # elements, or rows
LIMITS = {"F64": 0x7FF << 52}  # of what is rounded: no number here comes near it; otherwise F32's
FLOATS = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ".split()
NARROW = "F8_E8M0 F6_E2M3 F6_E3M2 F4".split()
# The code of 1, and bits of the mantissa: one more above them is the code of 2.
ONE = {"F64": (0x3FF << 52, 52), "F32": (0x3F800000, 23), "F16": (0x3C00, 10), "BF16": (0x3F80, 7),
       "F8_E4M3": (0x38, 3), "F8_E5M2": (0x3C, 2), "F8_E4M3FNUZ": (0x40, 3), "F8_E5M2FNUZ": (0x40, 2),
       "F8_E8M0": (127, 0), "F6_E2M3": (8, 3), "F6_E3M2": (12, 2), "F4": (2, 1)}
ROWS_DIMS = 7

# A kernel's run: its name, its arguments, how often it counts; what its source repeats, and what its destination must
# (None: nothing is stored there); bytes, or a function of the offset. How many lanes work on the result of the first; how
# many of them are followed behind the barrier, if not all.
Step = collections.namedtuple("Step", "kernel arguments times source target threads behind", defaults=[1, None])
Case = collections.namedtuple("Case", "name bytes steps")  # bytes that all of it moves for a lane


def number(name):
    return check_isa.NUMBERS[name]


def bits_of(name):
    return int(8 * check_isa.SIZES[number(name)])


def divisor(value):
    """As divide.h makes it."""
    shift = value.bit_length() - 1
    magic = ((2 << shift) - value) * (1 << 64) // value + 1 if value & (value - 1) else 0
    return struct.pack("<QQI4x", value, magic & MASK64, shift)


def divisor31(value):
    """The same of Divisor31."""
    shift = (value - 1).bit_length()
    return struct.pack("<III", value, -(-(1 << (31 + shift)) // value), shift)


def words(*values):
    return struct.pack(f"<{len(values)}Q", *values)


def codes(name, *numbers):
    """Bytes of codes, four of them or as many as there are, the first low."""
    bits, n = bits_of(name), len(numbers)
    return sum(code << bits * i for i, code in enumerate(numbers)).to_bytes(bits * n // 8, "little")


def one_two(name, times=1):
    """1 and 2 in turns, times a power of two."""
    one, mantissa = ONE[name]
    step = 1 << mantissa
    first = one + (times.bit_length() - 1) * step
    return codes(name, *[first, first + step] * 2)


TEXT = bytes(range(1, 254))  # for copies: of no length that vectors have


def vector(src, dst):
    """Bytes that a lane moves: 16 on the wider side."""
    a, b = bits_of(src), bits_of(dst)
    return 16 // (max(a, b) // 8) * (a + b) / 8


def cast(src, dst):
    arguments = words(SRC, DST, BIG, LIMITS.get(src, LIMITS.get(dst, 0x7F800000)), 0)
    return Case(f"cast {src}->{dst}", vector(src, dst),
                [Step(f"Cast<{number(src)}, {number(dst)}>", arguments, 1, one_two(src), one_two(dst))])


def realign():
    moved = TEXT[3:] + TEXT[:3]
    return Case("realign, 3 bytes off", 32, [Step("Cast<5, 5>", words(SRC + 3, DST, BIG, 0, 0), 1, TEXT, moved)])


def rows(name, src, dst, cols, src_step, dst_step):
    """Rows of so many elements, steps in elements too."""
    a, b = bits_of(src) // 8, bits_of(dst) // 8
    strides = words(src_step * a, *[0] * (ROWS_DIMS - 1), dst_step * b, *[0] * (ROWS_DIMS - 1))
    box = (struct.pack("<I4x", 1) + divisor(BIG // 1024) + bytes(24 * (ROWS_DIMS - 1)) + divisor31(BIG // 1024) +
           bytes(12 * (ROWS_DIMS - 1) + 4) + strides + words(BIG // 1024))
    width = 16 // max(a, b)
    arguments = (words(SRC, DST, cols, 0x7F800000, SRC + BIG * a * 4) + box + divisor(cols // width) +
                 divisor31(cols // width) + struct.pack("<II4x", False, True) + words(0))
    copy = src == dst
    return Case(f"{name}{'' if copy else f' {src}->{dst}'}", vector(src, dst),
                [Step(f"Rows<{number(src)}, {number(dst)}>", arguments, 1, bytes([7]) if copy else one_two(src),
                      bytes([7]) if copy else one_two(dst))])


def transpose(src, dst, kernel=None):
    a, b, side = bits_of(src) // 8, bits_of(dst) // 8, 4096
    width = 8 if (a, b) == (1, 8) else 16 // a
    across, down = side // (8 * width), side // (128 // b)
    arguments = (words(SRC, DST, side, side, side * a, side * b, 0, 0, 0x7F800000, SRC + side * side * a, 1) +
                 divisor(across * down) + divisor(across) + struct.pack("<?3xII4x", True, 16, 0) + words(0))
    threads = 8 * 32 // (1 if b < 4 else b // 4)

    def matrix(name, row_is_first):
        """1 or 2, in no pattern that a tile has."""
        size, two = bits_of(name) // 8, one_two(name)

        def byte(offset):
            x, y = divmod(offset // size, side)
            row, col = (x, y) if row_is_first else (y, x)
            return two[(row * row * 5 + col * 3 + row * col // 7) % 2 * size + offset % size]
        return byte
    return Case(f"transpose {src}{'' if src == dst else '->' + dst}", 8 * width * 128 // b * (a + b) / threads,
                [Step(f"Transpose<{number(kernel or src)}, {number(kernel or dst)}>", arguments, 1, matrix(src, True),
                      matrix(dst, False), threads)])


def scaled(kind, src, dst, block_rows, block_cols, *, rows=4096, cols=4096, scale="F32"):
    """One scale for block_rows x block_cols; each is 2."""
    one = (block_rows, block_cols) == (rows, cols)
    sides = (cols, block_rows, block_cols)
    arguments = (words(SRC, DST, SCALES) + struct.pack("<I4x", rows * cols) + words(0, 0, 0, 0) +
                 b"".join(map(divisor, sides)) + b"".join(map(divisor31, sides)) + bytes(4) +
                 words(-(-cols // block_cols)) + struct.pack("<i????", number(scale), one, True, False, True) + words(0))
    a, b = bits_of(src), bits_of(dst)
    source = bytes([1]) if src == "I8" else one_two(src)
    target = codes(dst, (ONE[dst][0] + (1 << ONE[dst][1]))) if src == "I8" else one_two(dst, 2)
    return Case(f"{kind}, {src} x {scale}->{dst}", 128 // b * (a + b) / 8,
                [Step(f"Scaled<{number(src)}, {number(dst)}>", arguments, 1, source, target)])


def columns(src, dst, cols=4096):
    """A scale for each column; each is 2."""
    arguments = words(SRC, DST, SCALES, BIG, 0) + divisor(cols) + struct.pack("<i4x", number("F32")) + words(0)
    a, b = bits_of(src), bits_of(dst)
    return Case(f"scale column, {src} x F32->{dst}", 128 // b * (a + b) / 8,
                [Step(f"Columns<{number(src)}, {number(dst)}>", arguments, 1, one_two(src), one_two(dst, 2))])


def nvfp4(dst, *, rows=4096, cols=4096, group=16):
    """Scales of E4M3, each 2, under 1 for all."""
    arguments = (words(SRC, DST, SCALES, SCALES + (1 << 30), 0) + struct.pack("<I4x", rows * cols) + divisor(group) +
                 divisor31(group) + struct.pack("<I???5x", False, True, False, True) + words(0))
    b = bits_of(dst)
    return Case(f"NVFP4, groups of {group}, F4->{dst}", 128 // b * (4 + b) / 8,
                [Step(f"Nvfp4<{number(dst)}>", arguments, 1, one_two("F4"), one_two(dst, 2))])


def bnb4(dst, *, nested, block=64):
    """A table of 2s; scales, that are nested or not, are 2 too: 2 x 2 x 1 + 0."""
    maps = SCALES + (1 << 28)
    arguments = (words(SRC, DST, maps, SCALES, SCALES + (1 << 29) if nested else 0, maps if nested else 0, 0, 0) +
                 struct.pack("<I4x", BIG) + divisor(block) + divisor(256) + divisor31(block) + divisor31(256) +
                 struct.pack("<II??6x", 0, 0, True, True) + words(0))
    b = bits_of(dst)
    return Case(f"bnb4{', nested' if nested else ''}, F4->{dst}", 128 // b * (4 + b) / 8,
                [Step(f"Bnb4<{number(dst)}>", arguments, 1, one_two("F4"), codes(dst, ONE[dst][0] + (3 if nested else 2) *
                                                                                 (1 << ONE[dst][1])))])


def affine(kind, src, dst, block_rows, block_cols, *, over_127=False, zeros=False):
    """Codes are 1 (I8), or 1 and 2, scales 2, zero points 0: they double, or are divided."""
    arguments = (words(SRC, DST, SCALES, SCALES + (1 << 29) if zeros else 0, 0, 4096 * 4096) + divisor(4096) +
                 divisor(block_rows) + divisor(block_cols) + words(-(-4096 // block_cols)) +
                 struct.pack("<iI", number("F32"), 0x3F800000 if over_127 else 0) + words(0))
    a, b = bits_of(src), bits_of(dst)
    source = bytes([1]) if src == "I8" else codes(src, *[ONE[src][0] + (1 << ONE[src][1]), ONE[src][0] + (2 << ONE[src][1])] * 2)
    target = codes(dst, (ONE[dst][0] + (1 << ONE[dst][1]))) if src == "I8" else one_two(dst)
    return Case(f"{kind}, {src}->{dst}", 128 // b * (a + b) / 8,
                [Step(f"Affine<{number(src)}, {number(dst)}>", arguments, 1, source, target)])


def mixed(index):
    """Words of packed codes: any."""
    return (index * 0x9E3779B1 ^ index >> 7) * 0x85EBCA6B >> 3 & MASK32


def stream(first, step, bits, k):
    """Code k of the stream of bits that words first, first + step, ... are."""
    word, shift = divmod(bits * k, 32)
    return (mixed(first + step * word) | mixed(first + step * (word + 1)) << 32) >> shift & ((1 << bits) - 1)


def awq(i, row):
    """AWQ's code of a row in word i."""
    return mixed(i) >> 4 * (0, 4, 1, 5, 2, 6, 3, 7)[row % 8] & 15


# Of layouts: kernel (what is behind its bits and its target), steps of scales, flags, code, zero point, what is added to it.
LAYOUTS = {
    "gptq": ("Tile", ", true", lambda rows, groups: (1, rows), 1 << 6,
             lambda bits, rows, cols, row, col: stream(row, rows, bits, col),
             lambda bits, rows, groups, row, group: stream(group * (rows * bits // 32), 1, bits, row) + 1),
    "awq": ("Tile", ", false", lambda rows, groups: (1, rows), 1 << 3,
            lambda bits, rows, cols, row, col: awq(col * (rows // 8) + row // 8, row),
            lambda bits, rows, groups, row, group: awq(group * (rows // 8) + row // 8, row)),
    "pack-quantized": ("Rows", "", lambda rows, groups: (groups, 1), 1 << 4,
                       lambda bits, rows, cols, row, col: stream(row * (cols * bits // 32), 1, bits, col),
                       lambda bits, rows, groups, row, group: stream(group, groups, bits, row)),
    "two rows a byte": ("Pairs", "", lambda rows, groups: (groups, 1), 1 << 5,
                        lambda bits, rows, cols, row, col: (mixed((row // 2 * cols + col) // 4) >> col % 4 * 8 + row % 2 * 4 & 15
                                                            ^ 8),
                        None),
}


def packed(layout, bits, dst, scale, *, zeros=True, order=False, rows=4096, cols=14336, group=128):
    """Any codes and zero points, scales that are 2; a block of lanes where it has a tile in shared memory."""
    kernel, last, steps, flags, code, zero = LAYOUTS[layout]
    zeros, groups, width = zeros and zero is not None, cols // group, bits_of(dst) // 8
    kind = (0 if not zeros else 3 if kernel == "Rows" else 2)
    fixed = (1 << (bits - 1)) if not zeros else int(layout == "gptq")
    step = 1 if kernel == "Rows" else rows * bits // 32
    matrix = (words(SRC, DST, SCALES, ZEROS if zeros else 0, ORDER if order else 0, rows, cols, 0,
                    rows * cols // 2 if kernel == "Pairs" else rows * cols * bits // 32, *steps(rows, groups),
                    groups if kind == 3 else 1, step) + divisor(group) +
              struct.pack("<iIIiiI??6x", fixed, 0, 0x4B400000 | 8 * (kernel == "Pairs"), number(scale), kind, flags, True, not order))
    if kernel == "Tile":
        along = layout == "gptq"
        wide, tile_cols = (64, 128 if bits == 3 else 512 // bits) if along else (16, 128)
        across = rows // wide if along else rows // 8 // wide
        each, threads = wide * tile_cols // 8 // 256 * (8 if along else 64), 256
        arguments = matrix + words(rows if along else rows // 8, 0, -(-cols // tile_cols)) + divisor(across) + words(0)
    else:
        own = words(cols * bits // 32, 0, rows - 1) if kernel == "Rows" else words(0, rows // 2 - 1)
        each, threads = (8 if kernel == "Rows" else 16), 1
        arguments = matrix + own + divisor(cols // 8) + words(0)

    def group_of(col):
        return col * 5003 % cols // group if order else col // group

    def source(offset):
        return mixed(offset // 4) >> 8 * (offset % 4)

    def target(offset):
        row, col = divmod(offset // width, cols)
        minus = zero(bits, rows, groups, row, group_of(col)) if zeros else 1 << (bits - 1)
        return encode_small(dst, 2 * (code(bits, rows, cols, row, col) - minus)) >> 8 * (offset % width) & 255

    name = f"Packed{kernel}<{'' if kernel == 'Pairs' else f'{bits}, '}{number(dst)}{last}>"
    how = ", zero points" * (zeros and layout == "pack-quantized") + ", act-order" * order
    return Case(f"{layout}, {bits} bits{how} x {scale}->{dst}", each * (bits / 8 + width),
                [Step(name, arguments, 1, (source, lambda offset: group_of(offset // 4) >> 8 * (offset % 4)), target, threads,
                      9)])


def encode_small(name, x):
    """The code of a whole number that the type can represent."""
    bits = bits32(float(x))
    if name == "F16":
        return struct.unpack("<H", struct.pack("<e", float(x)))[0]
    return bits >> 16 if name == "BF16" else bits


# Half the largest code and the largest, and what it stands for.
LARGEST = {"F8_E4M3": (b"\x76\x7e", 448), "F8_E5M2": (b"\x77\x7b", 57344), "F8_E4M3FNUZ": (b"\x76\x7e", 224)}


def quantize(kind, src, dst, threads, tile, rows, cols):
    """Eight vectors a thread. The largest number is 2: codes are M / 2 and M."""
    height, width = tile
    arguments = (words(SRC, DST, SCALES, NANS, rows, cols, height, width) + divisor(cols // width) +
                 struct.pack("<I?3x", 128 // bits_of(src), True) + words(0))
    return Case(f"quantize {kind}, {src}->{dst}", 8 * (16 + 128 / bits_of(src)),
                [Step(f"Tile<{number(src)}, {number(dst)}, {threads}>", arguments, 1, one_two(src),
                      LARGEST[dst][0])])


def quantize_tensor(src, dst):
    """Eight vectors are read for the maximum, twice four are made codes."""
    return Case(f"quantize tensor, {src}->{dst}", 8 * (32 + 128 / bits_of(src)), [
        Step(f"Amax<{number(src)}, {number(dst)}>", words(SRC, DST, BIG, SCALES, NANS, 0), 1, one_two(src), None),
        Step(f"Encode<{number(src)}, {number(dst)}>", words(SRC, DST, BIG, SCALES, 0), 2, one_two(src),
             LARGEST[dst][0])])


def fnuz():
    arguments = words(SRC, DST, BIG, NANS) + struct.pack("<I4x", 0x7E) + words(0)
    return Case("fnuz F8_E4M3", 32, [Step("Fnuz", arguments, 1, bytes([0x38, 0x80, 0xB8]), bytes([0x38, 0, 0xB8]))])


def cases():
    plain = ("F32", "F16", "BF16")
    yield from (cast(a, b) for a in FLOATS for b in FLOATS if a != b)
    yield from (cast(a, b) for a in NARROW for b in plain)
    yield realign()
    yield rows("slice, rows of 1536 bytes", "U8", "U8", 1536, 4096, 1536)
    yield rows("pack, rows of 1536 bytes", "U8", "U8", 1536, 1536, 4096)
    yield rows("every second row of 1536 bytes", "U8", "U8", 1536, 3072, 1536)
    yield rows("slice, rows of 768 elements", "BF16", "F16", 768, 2048, 768)
    for name, kernel in (("F8_E4M3", "U8"), ("BF16", "U16"), ("F32", "U32"), ("F64", "U64")):
        yield transpose(name, name, kernel)
    yield transpose("BF16", "F16")
    yield transpose("F8_E4M3", "BF16")
    for src in ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "I8", "F4"):
        for dst in plain if src in ("F8_E4M3", "F4") else ("BF16",):
            yield scaled("scale tensor", src, dst, 4096, 4096)
            yield scaled("scale row", src, dst, 1, 4096)
            yield scaled("scale group of 32", src, dst, 1, 32, scale="F8_E8M0")
            yield scaled("scale block", src, dst, 128, 128)
    yield scaled("scale block, 7168 columns", "F8_E4M3", "BF16", 128, 128, cols=7168)
    yield from (columns("F8_E4M3", dst) for dst in plain)
    yield nvfp4("BF16")
    for dst in plain:
        yield bnb4(dst, nested=False)
        yield bnb4(dst, nested=True)
        yield affine("zero points a row", "I8", dst, 1, 4096, zeros=True)
        yield affine("over 127 a row", "I8", dst, 1, 4096, over_127=True)
    for dst in plain:
        yield packed("gptq", 4, dst, "F16")
        yield packed("awq", 4, dst, "F16")
        yield packed("pack-quantized", 4, dst, "BF16", zeros=False)
    for bits in (2, 3, 8):
        yield packed("gptq", bits, "BF16", "F16")
    for bits in (3, 8):
        yield packed("pack-quantized", bits, "BF16", "BF16", zeros=False)
    yield packed("pack-quantized", 4, "BF16", "BF16")
    yield packed("gptq", 4, "BF16", "F16", order=True)
    yield packed("two rows a byte", 4, "BF16", "BF16")
    yield affine("divided by blocks", "F8_E4M3", "BF16", 128, 128)
    for src in plain:
        for dst in ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ"):
            threads = 256 * bits_of(src) // 16
            yield quantize_tensor(src, dst)
            yield quantize("row", src, dst, threads // 4, (1, 4096), 4096, 4096)
            yield quantize("block", src, dst, threads, (128, 128), 4096, 4096)
    yield fnuz()


def at_offset(what):
    return what if callable(what) else lambda offset: what[offset % len(what)]


def buffers(step):
    """The memory that a step sees. Scales are 2, but what Encode finds is that of a largest 2."""
    memory = Memory()
    scale = step.kernel.startswith("Scaled<") and struct.unpack_from("<i", step.arguments, 184)[0]
    each = b"\x80" if scale == number("F8_E8M0") else struct.pack("<f", 2)
    if step.kernel.startswith("Nvfp4<"):
        each = b"\x40"
    if step.kernel.startswith("Encode<"):
        target = int(re.search(r", (\d+)>", step.kernel)[1])
        each = struct.pack("<f", 2 / next(m for name, (_, m) in LARGEST.items() if number(name) == target))
    source = step.source
    if step.kernel.startswith("Packed"):  # scales of 16 bits
        (source, group), each = source, b"\0\x40"
        memory.add(ZEROS, 1 << 34, at_offset(source))
        memory.add(ORDER, 1 << 34, at_offset(group))
    for base, pattern in ((SRC, source), (SCALES, each)):
        memory.add(base, 1 << 34, at_offset(pattern))
    memory.add(DST, 1 << 34)
    memory.add(NANS, 8)
    # One scale for all, of NVFP4: 1.
    memory.store(SCALES + (1 << 30), struct.pack("<f", 1))
    return memory


def count_step(kernels, step):
    """Of a lane of a block in the middle of the tensor. The first: it also makes the block's scale."""
    if step.kernel not in kernels:
        raise SystemExit(f"no kernel {step.kernel}: the list of cases does not fit the sources")
    count, stored = follow(kernels[step.kernel], buffers(step), step.arguments, 9, step.threads, step.behind)
    expected = at_offset(step.target or b"\0")
    for at, byte in stored.items():
        if DST <= at < SCALES and byte != expected(at - DST):
            raise SystemExit(f"{step.kernel}: {byte:#x} at {at - DST:#x} of the destination is wrong")
    return count


def count_case(kernels, case):
    counts = [[step.times * x for x in count_step(kernels, step)] for step in case.steps]
    total = Count(*map(sum, zip(*counts)))
    if total.loaded + total.stored < case.bytes:
        raise SystemExit(f"{case.name}: {total.loaded} bytes read and {total.stored} written, not {case.bytes:g}")
    return total


# Lane operations for each byte, while memory moves it.
BUDGET = LANE_OPERATIONS / MEMORY


def shares(case, count):
    """Bytes a vector instruction; time at issue, of one lane by the whole GPU; its share of the time at memory."""
    slots = max(count.passes, count.scalar)
    return case.bytes / count.vector, slots / LANE_OPERATIONS, slots / (BUDGET * case.bytes)


def line(case, count):
    each, issue, ratio = shares(case, count)
    verdict = f"memory, {1 / ratio:.1f}" if ratio < 1 else f"issue, {ratio:.1f}"
    cells = [f"{case.bytes:g}", count.vector, count.passes, count.scalar, count.memory, count.shared, f"{each:.2f}",
             f"{1e12 * issue:.1f}", f"{1e12 * case.bytes / MEMORY:.1f}"]
    return f"{case.name:42}" + "".join(f"{cell:>9}" for cell in cells) + f"  {verdict}"


# Lines of the table in docs/measuring.md: every case is in one.
GROUPS = [
    ("F64 → all others", r"cast F64->"), ("all others → F64", r"cast \w+->F64"),
    ("F16, BF16 → F32", r"cast B?F16->F32"), ("F32 → F16, BF16", r"cast F32->B?F16"),
    ("F32 → 8 bits", r"cast F32->F8"),
    ("BF16 → F16", r"cast BF16->F16"), ("F16 → BF16", r"cast F16->BF16"),
    ("BF16 → 8 bits", r"cast BF16->F8"), ("F16 → 8 bits", r"cast F16->F8"),
    ("8-bit floats, E8M0, F6, F4 → F32", r"cast F[468]\w+->F32|cast F4->F32"),
    ("F8_E8M0 → BF16, F16", r"cast F8_E8M0->B?F16"),
    ("8-bit floats → BF16", r"cast F8_E[45]\w+->BF16"), ("8-bit floats → F16", r"cast F8_E[45]\w+->F16"),
    ("F6, F4 → BF16", r"cast F[46]\w*->BF16"), ("F6, F4 → F16", r"cast F[46]\w*->F16"),
    ("8-bit float → 8-bit float", r"cast F8\w+->F8"), ("OCP → FNUZ, bits kept", r"fnuz"), ("realign", r"realign"),
    ("slice, pack, every second row", r"(slice|pack|every).*bytes$"), ("slice, BF16 → F16", r"slice.*->"),
    ("transpose, 1 and 2 bytes", r"transpose (F8_E4M3|BF16)$"), ("transpose, 4 and 8 bytes", r"transpose F(32|64)$"),
    ("transpose, BF16 → F16", r"transpose BF16->F16"), ("transpose, F8_E4M3 → BF16", r"transpose F8_E4M3->"),
    ("8-bit float × scale → F32", r"scale.*, F8\w+ x.*->F32"),
    ("8-bit float × scale → BF16", r"scale.*, F8\w+ x.*->BF16"),
    ("8-bit float × scale → F16", r"scale.*, F8\w+ x.*->F16"), ("I8 × scale → BF16", r"scale.*, I8 "),
    ("F4 × scale → F32", r"scale.*, F4 x.*->F32"), ("F4 × scale → BF16", r"(scale.*, F4 x|NVFP4).*->BF16"),
    ("F4 × scale → F16", r"scale.*, F4 x.*->F16"),
    ("bitsandbytes' 4 bits → F32", r"bnb4.*->F32"), ("bitsandbytes' 4 bits → BF16", r"bnb4.*->BF16"),
    ("bitsandbytes' 4 bits → F16", r"bnb4.*->F16"), ("I8 with zero points, over 127 → F32", r"(zero|over).*I8->F32"),
    ("I8 with zero points, over 127 → BF16", r"(zero|over).*I8->BF16"),
    ("I8 with zero points, over 127 → F16", r"(zero|over).*I8->F16"),
    ("GPTQ → F32", r"gptq.*s x.*->F32"), ("GPTQ → BF16", r"gptq.*s x.*->BF16"), ("GPTQ → F16", r"gptq.*s x.*->F16"),
    ("GPTQ, act-order → BF16", r"gptq.*order"),
    ("AWQ → F32", r"awq.*->F32"), ("AWQ → BF16", r"awq.*->BF16"), ("AWQ → F16", r"awq.*->F16"),
    ("pack-quantized → F32", r"pack-.*->F32"), ("pack-quantized → BF16", r"pack-.*->BF16"),
    ("pack-quantized → F16", r"pack-.*->F16"), ("int4, two rows a byte → BF16", r"two rows"),
    ("F8_E4M3 ÷ scale → BF16", r"divided"),
    *((f"quantize {src}, {kind}", f"quantize ({kind.replace(', ', '|')}), {src}-")
      for src in ("F32", "BF16", "F16") for kind in ("tensor", "row, block")),
]


def table(counted):
    """Markdown, of groups; from the least to the most."""
    def span(values, form):
        low, high = (format(f(values), form) for f in (min, max))
        return low if low == high else f"{low}–{high}"
    print("| kernel | bytes a lane | vector instructions | bytes an instruction | issue : memory | bound by |")
    print("|---|---:|---:|---:|---:|---|")
    left = dict(counted)
    for label, pattern in GROUPS:
        found = [case for case in left if re.match(pattern, case)]
        rows = [left.pop(case) for case in found]
        each, _, ratios = zip(*(shares(*row) for row in rows))
        bound = "memory" if max(ratios) < 0.95 else "issue" if min(ratios) > 1.05 else "both"
        print("|", " | ".join([label, span([c.bytes for c, _ in rows], "g"), span([n.vector for _, n in rows], "d"),
                               span(each, ".2f"), span(ratios, ".2f"), bound]), "|")
    if left:
        raise SystemExit(f"in no line of the table: {', '.join(left)}")


HEAD = ["bytes", "vector", "passes", "scalar", "memory", "shared", "bytes/v", "issue", "at 5.3", "bound by"]


def load_kernels(tools, files):
    """Code by short name of all kernels for gfx942."""
    kernels = {}
    with tempfile.TemporaryDirectory(dir=check_isa.REPO / "build") as folder:
        for file in files:
            for n, (processor, data) in enumerate(check_isa.code_objects(file)):
                if processor not in (None, "gfx942"):
                    continue
                path = pathlib.Path(folder, f"{file.name}.{n}.co")
                path.write_bytes(data)
                text = tools("llvm-objdump", "-d", "--no-show-raw-insn", str(path.relative_to(check_isa.REPO)))
                found = parse(text)
                names = tools("llvm-cxxfilt", input="\n".join(found) + "\n").splitlines()
                for name, code in zip(names, found.values()):
                    kernels[re.sub(r"(\d)u\b", r"\1", check_isa.short(name))] = code
    return kernels


# ---- Itself ----

LOOP = """
0000000000000100 <loop>:
	s_load_dwordx2 s[4:5], s[0:1], 0x8 // 000000000100: 0
	s_mov_b32 s3, 0 // 000000000108: 0
	v_mov_b32_e32 v1, 0 // 00000000010C: 0
	v_add_u32_e32 v1, 3, v1 // 000000000110: 0
	s_add_i32 s3, s3, 1 // 000000000114: 0
	s_cmp_lt_u32 s3, 5 // 000000000118: 0
	s_cbranch_scc1 65532 // 00000000011C: 0 <loop+0x10>
	v_cmp_gt_u32_e32 vcc, 20, v1 // 000000000120: 0
	s_and_saveexec_b64 s[6:7], vcc // 000000000124: 0
	s_cbranch_execz 2 // 000000000128: 0 <loop+0x34>
	v_rcp_f32_e32 v2, 1.0 // 00000000012C: 0
	global_store_dword v3, v1, s[4:5] offset:16 // 000000000130: 0
	v_add_u32_e32 v1, 3, v1 // 000000000134: 0
	s_endpgm // 000000000138: 0
"""


def self_test():
    """A loop of five rounds, a branch that is not taken (15 < 20), an instruction that takes four times as long."""
    def run(text):
        memory = Memory()
        memory.add(DST, 64)
        return follow(parse(text)["loop"], memory, words(0, DST), 0)
    count, stored = run(LOOP)
    expected = Count(vector=1 + 5 + 1 + 1 + 1, passes=9 + 3, scalar=1 + 1 + 10 + 1, memory=1, shared=0, loaded=0,
                     stored=4)
    assert count == expected, (count, expected)
    assert stored == dict(zip(range(DST + 16, DST + 20), b"\x0f\0\0\0")), stored
    skipped, nothing = run(LOOP.replace("vcc, 20,", "vcc, 15,"))  # 15 > 15 is false: over the store
    assert skipped == expected._replace(vector=8, passes=8, memory=0, stored=0) and not nothing, skipped
    assert divisor(7)[8:16] == words(0x2492492492492493) and divisor(64) == struct.pack("<QQI4x", 64, 0, 6)
    for broken, why in ((LOOP.replace("s3, 5", "s3, 0x7fffffff"), "no end"),
                        (LOOP.replace("offset:16", "offset:61"), "outside"),
                        (LOOP.replace("v_rcp_f32_e32", "v_unknown_f32"), "not understood")):
        try:
            run(broken)
        except SystemExit as error:
            assert why in str(error), error
        else:
            raise AssertionError(f"not refused: {why}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="", help="what the LLVM tools are called behind")
    parser.add_argument("--table", action="store_true", help="Markdown of groups, as in docs/measuring.md")
    parser.add_argument("--filter", default="", help="cases with this in their name")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    args = parser.parse_args()
    if args.self_test:
        return self_test()
    kernels = load_kernels(check_isa.Tools(args.run), args.files)
    counted = {c.name: (c, count_case(kernels, c)) for c in cases() if args.filter in c.name}
    if args.table:
        return table(counted)
    print("Calculated from machine code, not measured. Times in 1e-12 s, for a lane by a whole MI300X.")
    print(f"{'':42}" + "".join(f"{h:>9}" for h in HEAD))
    for case, count in counted.values():
        print(line(case, count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
