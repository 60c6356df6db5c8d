#!/usr/bin/env python3
"""Compares the header reader with the reference (PyPI's safetensors) on generated and mutated files.

    headers.py --verdict build/bin/header_verdict [--count 10000] [--seed 1]

Half of the cases come from a generator of valid files with odd but lawful spelling; the others get one
to three faults: wrong values, repeated or missing fields, changed bytes, cut or grown files. Verdicts must be
equal, for accepted files also names, dtypes, shapes, offsets and metadata. Where the reference accepts
what docs/format.md refuses on purpose, the rule is recognised here, from the case alone.
"""

import argparse
import collections
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

import safetensors
from safetensors import safe_open

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64
}
NUMBERS = [
    "0", "1", "2", "3", "2.0", "2e0", "2E+0", "-0", "-1", "0.0", "1e-0", "01", "+1", "1.", ".5", "-", "0x2",
    "1e", "18446744073709551615", "18446744073709551616", "9223372036854775808", "99999999999999999999999",
    '"1"', "true", "null", "[1]", "{}", "NaN", "Infinity", "1_0", ""
]
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"true", b"0", b"-", b".", b"e9", b" ", b"\n",
    b"\0", b"\x0c", b"\xc2\xa0", b"\xef\xbb\xbf", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    b"\\u0000", b"\\ud800", b"\\udc00", b"\\ud83d\\ude00", b"dtype", b"__metadata__", b"/**/", b"//", b"'",
    b"\x7f", b"\x1f"
]


class Raw(bytes):
    """JSON text as it is."""


class Object(list):
    """Pairs of key and value."""


class Maker:
    """Makes one file."""

    def __init__(self, rng):
        self.rng = rng
        self.plain = rng.random() < 0.5  # no odd spelling

    def chance(self, p):
        return self.rng.random() < p

    # ---- spelling

    def space(self):
        if self.plain or self.chance(0.8):
            return b""
        return b"".join(self.rng.choice([b" ", b"\t", b"\n", b"\r"]) for _ in range(self.rng.randint(1, 3)))

    def string(self, text):
        out = []
        for c in text:
            code = ord(c)
            if code < 0x20 or c in '"\\' or (not self.plain and self.chance(0.1)):
                short = {"\n": b"\\n", "\t": b"\\t", '"': b'\\"', "\\": b"\\\\", "/": b"\\/"}.get(c)
                if short and self.chance(0.5):
                    out.append(short)
                    continue
                units = struct.unpack("<%dH" % (len(c.encode("utf-16-le")) // 2), c.encode("utf-16-le"))
                form = "\\u%04x" if self.chance(0.5) else "\\u%04X"
                out.append("".join(form % unit for unit in units).encode())
            else:
                out.append(c.encode())
        return b'"' + b"".join(out) + b'"'

    def emit(self, value):
        s = self.space
        if isinstance(value, Raw):
            return bytes(value)
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, Object):
            pairs = [s() + self.emit(k) + s() + b":" + s() + self.emit(v) + s() for k, v in value]
            return b"{" + b",".join(pairs) + b"}"
        if isinstance(value, (list, tuple)):
            return b"[" + b",".join(s() + self.emit(v) + s() for v in value) + b"]"
        return json.dumps(value).encode()

    # ---- parts

    def name(self):
        kind = self.rng.random()
        if kind < 0.7:
            return "layers.%d.%s" % (self.rng.randint(0, 99), self.rng.choice(["weight", "bias", "q", "k"]))
        if kind < 0.75:
            return ""
        alphabet = 'ab"\\/\n\t\x01\x7f\u0080\u00e9\u07ff\u0800\u20ac\ufeff\uffff'
        alphabet += "\U00010000\U0001f600\U0010ffff"
        return "".join(self.rng.choice(alphabet) for _ in range(self.rng.randint(1, 8)))

    def number(self):
        """A JSON number, often near the end of a double's range."""
        rng = self.rng
        digits = str(rng.randint(1, 9)) + "".join(rng.choice("0123456789") for _ in range(rng.randint(0, 24)))
        if self.chance(0.4):
            digits = rng.choice([
                "17976931348623157", "17976931348623158", "17976931348623159", "18446744073709551615",
                "18446744073709551616", "1844674407370955161", "0"
            ]) + rng.choice(["", "0", "5", "81"])
            digits = digits.lstrip("0") or "0"
        zeros = "0" * rng.choice([0, 0, 0, 1, 280, 292, 300]) if digits != "0" else ""
        fraction = ""
        if self.chance(0.5):
            fraction = "." + "".join(rng.choice("0123456789") for _ in range(rng.choice([1, 3, 20, 30])))
            if self.chance(0.3):
                fraction = "." + "0" * rng.choice([1, 20, 310]) + fraction[1:]
        exponent = ""
        if self.chance(0.7):
            size = len(digits) + len(zeros)
            power = rng.choice([309 - size, 308 - size, 310 - size, 308, 0, 2**31 - 1, 2**31, 10**20, 400])
            exponent = rng.choice("eE") + rng.choice(["", "+", "-", ""]) + str(abs(power)).zfill(
                rng.choice([1, 5]))
        return Raw((rng.choice(["", "-"]) + digits + zeros + fraction + exponent).encode())

    def ignored(self, depth=0):
        rng = self.rng
        kind = rng.random()
        if kind < 0.25:
            return self.number()
        if kind < 0.4:
            return self.name()
        if kind < 0.5:
            return rng.choice([None, True, False, 0, 1.5, -2])
        if kind < 0.6 and depth == 0:
            levels = rng.choice([1, 60, 120, 124, 125, 126, 127, 200])
            left, right = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[1,{"":', b"}]")])
            if len(right) == 2:
                levels //= 2
            return Raw(left * levels + b"1" + right * levels)
        if kind < 0.8 and depth < 4:
            return [self.ignored(depth + 1) for _ in range(rng.randint(0, 3))]
        if depth < 4:
            return Object(
                (rng.choice(["a", "dtype", "b"]), self.ignored(depth + 1)) for _ in range(rng.randint(0, 3)))
        return "x"

    def metadata(self):
        kind = self.rng.random()
        if kind < 0.15:
            return None
        pairs = Object((self.name(), self.name()) for _ in range(self.rng.randint(0, 4)))
        if pairs and self.chance(0.3):
            pairs.append((self.rng.choice(pairs)[0], "again"))
        if self.chance(0.2):
            pairs.append(("nul\0", "\0"))
        return pairs

    def shape(self, bits):
        rng = self.rng
        shape = [rng.choice([0, 1, 1, 2, 3, 4, 5, 8]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4]))]
        if self.chance(0.03):
            shape = [1] * rng.choice([63, 64])
        if self.chance(0.04):
            shape = [0, rng.choice([2**63, 2**64 - 1, 2**61])]
            rng.shuffle(shape)
        product = 1
        for extent in shape:
            product *= extent
        if product * bits % 8 and self.chance(0.95):
            shape.append(8)
            product *= 8
        return shape, product * bits // 8

    def tensors(self):
        """Records in the order of their data, offsets filled in."""
        rng, end, out, names = self.rng, 0, [], set()
        for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4, 6])):
            dtype = rng.choice(list(BITS))
            shape, size = self.shape(BITS[dtype])
            name = self.name()
            while name in names:
                name += "+"
            names.add(name)
            out.append({"name": name, "dtype": dtype, "shape": shape, "data_offsets": [end, end + size]})
            end += size
        return out, end

    # ---- faults in the values

    def bad_number(self):
        return Raw(self.rng.choice(NUMBERS).encode())

    def fault(self, tensors):
        """Changes one record, or adds one."""
        rng = self.rng
        if not tensors:
            return
        t = rng.choice(tensors)
        kind = rng.randint(0, 18)
        if kind == 0 and t["shape"] and isinstance(t["shape"], list):
            t["shape"][rng.randrange(len(t["shape"]))] = self.bad_number()
        elif kind == 1 and isinstance(t["data_offsets"], list) and t["data_offsets"]:
            t["data_offsets"][rng.randrange(len(t["data_offsets"]))] = self.bad_number()
        elif kind == 2 and isinstance(t["data_offsets"], list):
            t["data_offsets"] = rng.choice([
                t["data_offsets"][::-1], t["data_offsets"][:1], t["data_offsets"] + [0], [], None,
                Object(), "0", [t["data_offsets"]]
            ])
        elif kind == 3:
            t["data_offsets"] = [
                v + rng.choice([-1, 0, 1]) if isinstance(v, int) else v for v in t["data_offsets"] or []
            ]
        elif kind == 4:
            t["dtype"] = rng.choice([
                "u8", "F8_E4M3FN", "F128", "", "U8 ", None, 1, [], ["U8"],
                Object(),
                Object([("U8", 1)]),
                Object([("U8", None), ("I8", None)]), "C128", "F6", "U8\0"
            ])
        elif kind == 5:
            t["dtype"] = Object([(t["dtype"], None)]) if isinstance(t["dtype"], str) else None
        elif kind == 6:
            ones = [1] * rng.randint(60, 70)
            t["shape"] = ones + t["shape"] if isinstance(t["shape"], list) else ones
        elif kind == 7:
            t["shape"] = rng.choice([[2**40, 2**40, 0], [0, 2**40, 2**40], [2**40, 0, 2**40], [2**32, 2**32],
                                     [2**61], [0, 2**64 - 1, 2], [2**64 - 1, 0], [2**63, 2, 0], None,
                                     Object(), 3, "3", [[3]]])
            if self.chance(0.8):
                t["data_offsets"] = [t["data_offsets"][0] if t["data_offsets"] else 0] * 2
                tensors[:] = [t]
        elif kind == 8:
            t["dtype"] = rng.choice(list(BITS))
        elif kind == 9:
            del t[rng.choice(["dtype", "shape", "data_offsets"])]
            t.setdefault("dtype", Raw(b'"U8"'))
            t.setdefault("shape", [1])
            t.setdefault("data_offsets", [0, 1])
            t["drop"] = rng.choice(["dtype", "shape", "data_offsets"])
        elif kind == 10:
            t["twice"] = rng.choice(["dtype", "shape", "data_offsets", "other"])
        elif kind == 11:
            t["form"] = rng.choice(["list", "list", "list+", "list-", "null", "string", "number", "empty"])
        elif kind == 12:
            tensors.append(dict(t))
        elif kind == 13:
            t["name"] = rng.choice(["\0", "a\0", "\0" + t["name"], t["name"] + "\0b"])
        elif kind == 14:
            t["ignored"] = Raw(b'"' + rng.choice(TOKENS) + b'"')
        elif kind == 15:  # a hole, an overlap: this range and all behind it move
            move, begin = rng.choice([-2, -1, 1, 2]), (t["data_offsets"] or [0])[0]
            for other in tensors:
                both = other["data_offsets"]
                plain = isinstance(both, list) and all(isinstance(v, int) for v in both + [begin])
                if plain and min(both + [begin]) >= begin:
                    other["data_offsets"] = [max(0, v + move) for v in both]
        elif kind == 16:
            t["shape"] = rng.choice([[0, 2**40, 2**40], [2**40, 0, 2**40], [0, 2**63, 2]])
            t["data_offsets"] = [0, 0]
        else:
            t["shape"] = (t["shape"] or []) + [rng.choice([0, 1, 2, 7])] if isinstance(t["shape"],
                                                                                       list) else []

    def record(self, t):
        """The value of one tensor."""
        form = t.get("form")
        fields = ["dtype", "shape", "data_offsets"]
        if form:
            as_list = [t[f] for f in fields]
            return {
                "list": as_list,
                "list+": as_list + [0],
                "list-": as_list[:2],
                "null": None,
                "string": "U8",
                "number": 1,
                "empty": Object()
            }[form]
        pairs = Object((f, t[f]) for f in fields if f != t.get("drop"))
        if t.get("twice"):
            pairs.append((t["twice"], t.get(t["twice"])))
            pairs.append((t["twice"], t.get(t["twice"]))) if t["twice"] == "other" else None
        if "ignored" in t:
            pairs.append(("ignored", t["ignored"]))
        while self.chance(0.15):
            pairs.append((self.rng.choice(["x", "", "Dtype", "shape ", "data_offset",
                                           "__metadata__"]), self.ignored()))
        if self.chance(0.3):
            self.rng.shuffle(pairs)
        return pairs

    # ---- faults in the text

    def mutate(self, text):
        rng = self.rng
        at = rng.randint(0, len(text))
        kind = rng.randint(0, 8)
        if kind == 8:
            spots = [i for i, c in enumerate(text) if c in b"]}"] or [at]
            at = rng.choice(spots)
            return text[:at] + b"," + text[at:]
        if kind == 0:
            return text[:at] + bytes([rng.randrange(256)]) + text[at + 1:]
        if kind == 1:
            return text[:at] + text[at + rng.randint(1, 4):]
        if kind == 2:
            return text[:at] + rng.choice(TOKENS) + text[at:]
        if kind == 3:
            return text[:at]
        if kind == 4:
            token = rng.choice(TOKENS)
            return text[:at] + token + text[at + len(token):]
        if kind == 5:
            return rng.choice([token + text for token in TOKENS] + [text + token for token in TOKENS])
        if kind == 6:
            other = rng.randint(0, len(text))
            return text[:at] + text[min(at, other):max(at, other)] + text[at:]
        spots = [i for i, c in enumerate(text) if chr(c).isdigit()]
        if not spots:
            return text
        at = rng.choice(spots)
        return text[:at] + rng.choice(NUMBERS).encode() + text[at + 1:]

    def make(self):
        rng = self.rng
        tensors, size = self.tensors()
        faults = rng.choice(["", "", "", "", "value", "value", "value", "text", "text", "file"])
        if faults == "value":
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                self.fault(tensors)
            if self.chance(
                    0.8):  # keep the file as long as the offsets say: other rules than its length decide
                ends = [
                    t["data_offsets"][1] for t in tensors
                    if isinstance(t["data_offsets"], list) and len(t["data_offsets"]) == 2
                    and isinstance(t["data_offsets"][1], int) and 0 <= t["data_offsets"][1] < 10**5
                ]
                size = max(ends, default=0)
        if self.chance(0.5):
            rng.shuffle(tensors)
        root = Object((t["name"], self.record(t)) for t in tensors)
        if self.chance(0.5):
            root.insert(rng.randint(0, len(root)), ("__metadata__", self.metadata()))
            if faults == "value" and self.chance(0.15):
                root.insert(rng.randint(0, len(root)), ("__metadata__", rng.choice([None, Object()])))
            if faults == "value" and self.chance(0.15):
                root.append(
                    ("__metadata__", rng.choice([[], "", 1,
                                                 Object([("a", 1)]),
                                                 Object([("a", None)]), True])))
        text = self.space() + self.emit(root) + self.space() + b" " * rng.choice([0, 0, 0, 1, 7])
        if faults == "text":
            for _ in range(rng.choice([1, 1, 2, 3])):
                text = self.mutate(text)
        length = len(text)
        data = bytes((i * 7 + i // 256) % 256 for i in range(size))
        if faults == "file":
            kind = rng.randint(0, 4)
            if kind == 0:
                data = data + b"\0" * rng.randint(1, 3)
            elif kind == 1:
                data = data[:max(0, len(data) - rng.randint(1, 3))]
            elif kind == 2:
                length = max(0, length + rng.choice([-2, -1, 1, 2, 100, -length]))
            elif kind == 3:
                length = rng.choice([10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1, 2**64 - 8])
            else:
                out = struct.pack("<Q", length) + text + data
                return out[:rng.randint(0, min(len(out), rng.choice([7, 8, 9, len(out)])))]
        return struct.pack("<Q", length) + text + data


class Pairs(list):
    """An object as the checker below reads it."""


def product_overflows(shape):
    product = 1
    for extent in shape:
        product *= max(1, int(extent))
    return product >= 2**64


def purposes(case):
    """Of a file that the reference accepts: the rules of docs/format.md by which it is refused on
    purpose, and the statuses that go with them."""
    length = struct.unpack("<Q", case[:8])[0]
    root = json.loads(case[8:8 + length], object_pairs_hook=Pairs, parse_int=str, parse_float=str)
    tensors = [(k, v) for k, v in root if k != "__metadata__"]
    names = [k for k, _ in tensors]
    found = {}
    if len(set(names)) < len(names):
        found["name twice"] = "FST_E_DUPLICATE"
    if any("\0" in name for name in names):
        found["NUL in a name"] = "FST_E_NAME"
    for _, value in tensors:
        fields = dict(value) if isinstance(value, Pairs) else dict(zip(["dtype", "shape"], value))
        if not isinstance(value, Pairs) or isinstance(fields["dtype"], Pairs):
            found["tensor as array, dtype as map"] = "FST_E_HEADER"
        if len(fields["shape"]) > 64:
            found["over 64 dimensions"] = "FST_E_SHAPE"
        if product_overflows(fields["shape"]):
            found["product overflows in some order"] = "FST_E_SHAPE"
    return found


CERTAIN = {
    "header too small": "FST_E_TRUNCATED",
    "header too large": "FST_E_HEADER_SIZE",
    "invalid header length": "FST_E_TRUNCATED",
    "invalid UTF-8": "FST_E_UTF8"
}


def reference(case, path):
    """None and the message, or the table as header_verdict prints it, and the metadata."""
    try:
        tensors = dict(safetensors.deserialize(case))
    except safetensors.SafetensorError as error:
        return None, str(error)
    with open(path, "wb") as file:
        file.write(case)
    with safe_open(path, framework="np") as file:
        order, metadata = file.offset_keys(), file.metadata()
    start = 8 + struct.unpack("<Q", case[:8])[0]
    out, end = [], 0
    for name in order:
        info = tensors[name]
        begin, end = end, end + len(info["data"])
        assert bytes(info["data"]) == case[start + begin:start + end], "the order is not the data's"
        shape = "x".join(str(extent) for extent in info["shape"])
        out.append("%s,%s,%s,%d,%d" % (name.encode().hex(), info["dtype"], shape, begin, end))
    assert len(out) == len(tensors)
    return out, metadata


def ours(line):
    """Likewise of a line of header_verdict."""
    words = line.split(" ")
    if words[0] != "FST_OK":
        return None, words[0]
    if words[-1] == "-":
        return words[1:-1], None
    pairs = [pair.split("=") for pair in words[-1][1:].split(";")[:-1]]
    keys = [bytes.fromhex(key).decode() for key, _ in pairs]
    assert len(set(keys)) == len(keys), "a key of __metadata__ is there twice"
    return words[1:-1], {key: bytes.fromhex(value).decode() for key, (_, value) in zip(keys, pairs)}


def ties(table):
    """The reference leaves tensors of the same range in any order."""
    return sorted(table, key=lambda row: (*map(int, row.split(",")[3:]), row))


def difference(case, line, path, counts):
    """What is wrong with our verdict, or None."""
    table, rest = reference(case, path)
    my_table, my_rest = ours(line)
    if table is None:
        counts["refused by both: " + my_rest if my_table is None else "different"] += 1
        certain = [status for text, status in CERTAIN.items() if text in rest]
        if my_table is not None or (certain and my_rest != certain[0]):
            return "the reference refuses (%s)" % rest
        return None
    found = purposes(case)
    if found:
        counts.update("on purpose: " + rule for rule in found)
        counts["refused on purpose"] += 1
        return None if my_rest in found.values() else "to be refused on purpose: %s" % found
    counts["accepted by both" if my_table is not None else "different"] += 1
    if my_table is None or ties(table) != ties(my_table) or rest != my_rest:
        return "the reference accepts: %s %s" % (table, rest)
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--verdict", required=True, help="the program header_verdict")
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", nargs="*", default=[], help="more cases: files to judge")
    args = parser.parse_args()
    cases = [Maker(random.Random(args.seed * 1000003 + i)).make() for i in range(args.count)]
    for name in args.files:
        with open(name, "rb") as file:
            cases.append(file.read())
    counts, wrong = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cases")
        with open(path, "wb") as file:
            for case in cases:
                file.write(struct.pack("<Q", len(case)) + case)
        run = subprocess.run([args.verdict, path], stdout=subprocess.PIPE, text=True, check=False)
        lines = run.stdout.splitlines()
        if run.returncode or len(lines) != len(cases):
            print("header_verdict ended with %d after %d of %d cases" %
                  (run.returncode, len(lines), len(cases)))
            print("the case:", cases[min(len(lines), len(cases) - 1)])
            return 1
        for i, (case, line) in enumerate(zip(cases, lines)):
            problem = difference(case, line, os.path.join(folder, "case"), counts)
            if problem:
                wrong += 1
                if wrong <= 20:
                    print("seed %d case %d: %s\n  ours: %s\n  file: %r" %
                          (args.seed, i, problem, line, case[:3000]))
    for what, count in sorted(counts.items()):
        print("%7d  %s" % (count, what))
    print("%d cases, %d differences" % (len(cases), wrong))
    # A generator that no longer reaches the rules would compare nothing.
    kinds = sum(1 for what in counts if what.startswith("refused by both"))
    rules = sum(1 for what in counts if what.startswith("on purpose"))
    if args.count >= 10000 and (counts["accepted by both"] < args.count // 4 or kinds < 10 or rules < 5):
        print("the cases are too much alike")
        return 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
