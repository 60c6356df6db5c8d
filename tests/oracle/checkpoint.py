#!/usr/bin/env python3
"""Writes checkpoints to load: by seed, with Python's own library alone, without the library under test.

    checkpoint.py mixed OUT --bytes 1e9 --tensors 500 --odd-header [--castable]
        all 22 dtypes, special values, empty and scalar tensors (--castable: without F4 and F6, which are cast to
        F32, F16 and BF16 alone)
    checkpoint.py llama OUTDIR --bytes 14e9 --dtype bf16 --files 4
        Llama 3 8B's names and shapes, as many layers as fit, cut into files with an index
    checkpoint.py fp8 OUTDIR --bytes 4e9 --files 4
        DeepSeek V3's layers, as many as fit: F8_E4M3 weights, none of them NaN, F32 scales for 128 x 128, norms and
        embeddings in BF16; config.json and other files beside them
    checkpoint.py mxfp4 OUTDIR --bytes 4e9 --files 4
        gpt-oss' layers, as many as fit: experts in MXFP4, biases and attention in BF16; config.json
    checkpoint.py gptq OUTDIR --bytes 4e9 --files 4
        Llama 3 70B's layers in GPTQ of 4 bits, groups of 128, no act-order; norms and embeddings in BF16; config.json
    checkpoint.py many OUTDIR --tensors 20000 --bytes-each 4096 --dtype bf16 --files 2
        many small tensors
"""
import argparse
import json
import os
import random
import struct

BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
        "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
        "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}
SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")

# Zeros, the smallest and largest subnormal and normal numbers, infinities, NaNs with payloads: positive; the
# same with a sign follow.
SPECIAL = {
    "F16": ("<H", 15, [0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7FFF]),
    "BF16": ("<H", 15, [0, 1, 0x7F, 0x80, 0x3F80, 0x43E0, 0x43E8, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF]),
    "F32": ("<I", 31, [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F808000, 0x43E80000, 0x477FEFFF, 0x477FF000,
                       0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]),
    "F64": ("<Q", 63, [0, 1, (1 << 52) - 1, 1 << 52, 0x3FF0000000000000, 0x3FF0008000000001, 0x3690000000000000,
                       0x47EFFFFFE0000000, 0x47EFFFFFF0000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000,
                       0x7FF0000000000001, 0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF]),
}
# What the most significant byte of "near" values becomes: a sign and an exponent around 1.
NEAR = {"F16": range(0x30, 0x48), "BF16": range(0x3A, 0x45), "F32": range(0x3A, 0x45), "F64": range(0x3F, 0x41)}

PAGE = 32 << 20
GROUP = 128  # of GPTQ


def bias(page, dtype):
    """The page with every element's top byte moved near 1, so that most elements are in range everywhere."""
    near, step = list(NEAR[dtype]), BITS[dtype] // 8
    table = bytes((i & 0x80) | near[i % len(near)] for i in range(256))
    page = bytearray(page)
    page[step - 1::step] = bytes(page[step - 1::step]).translate(table)
    return bytes(page)


class Source:
    """Bytes for tensors: pieces of one random page, each from another place in it."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.bits = self.random.randbytes(PAGE)
        self.pages = {}

    def page(self, dtype, near):
        if dtype == "BOOL":
            near = True
        elif dtype not in NEAR or not near:
            return self.bits
        if dtype not in self.pages:
            self.pages[dtype] = bytes(b & 1 for b in self.bits) if dtype == "BOOL" else bias(self.bits, dtype)
        return self.pages[dtype]

    def pieces(self, dtype, nbytes, near=True):
        page = memoryview(self.page(dtype, near))
        step = max(1, BITS[dtype] // 8)
        while nbytes:
            start = self.random.randrange(PAGE // step // 2) * step
            piece = page[start:start + min(nbytes, PAGE // 2)]
            nbytes -= len(piece)
            yield piece

    def codes(self, nbytes):
        """Of F8_E4M3, without NaN."""
        return self.translated("codes", (i & 0xFE if i & 0x7F == 0x7F else i for i in range(256)), nbytes)

    def exponents(self, nbytes):
        """Of F8_E8M0: 2^-15 to 1."""
        return self.translated("exponents", (112 + i % 16 for i in range(256)), nbytes)

    def translated(self, name, table, nbytes):
        if name not in self.pages:
            self.pages[name] = self.bits.translate(bytes(table))
        page = memoryview(self.pages[name])
        while nbytes:
            start = self.random.randrange(PAGE // 2)
            piece = page[start:start + min(nbytes, PAGE // 2)]
            nbytes -= len(piece)
            yield piece

    def sprinkled(self, dtype, nbytes, near):
        """With special values: at the start, at the end, and here and there."""
        data = bytearray(b"".join(self.pieces(dtype, nbytes, near)))
        if dtype not in SPECIAL:
            return data
        code, sign, codes = SPECIAL[dtype]
        step = BITS[dtype] // 8
        codes = codes + [c | 1 << sign for c in codes]
        count = nbytes // step
        for i in range(min(len(codes), count)):
            for at in (i, count - 1 - i, self.random.randrange(count)):
                struct.pack_into(code, data, at * step, codes[(i + at) % len(codes)])
        return data


def header(tensors, metadata=None, odd=False):
    """The length and the JSON for [(name, dtype, shape, nbytes)], in this order. `odd`: data starts misaligned."""
    table, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, dtype, shape, nbytes in tensors:
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 + (5 if odd else 0))
    return struct.pack("<Q", len(text)) + text


def nbytes_of(dtype, shape):
    count = 1
    for extent in shape:
        count *= extent
    return count * BITS[dtype] // 8


def mixed_tensors(pick, dtypes, count, nbytes):
    weights = [pick.random() ** 3 + 0.02 for _ in range(count)]
    scale, tensors = nbytes / sum(weights), []
    for i, weight in enumerate(weights):
        dtype = dtypes[i % len(dtypes)]
        elements = max(8, int(weight * scale) * 8 // BITS[dtype])
        inner = 8 * pick.randrange(1, 1 + min(64, elements // 8)) if dtype in SUB_BYTE else pick.randrange(1, 1025)
        inner = min(inner, elements)
        shape = [elements // inner, inner]
        if i % 50 == 17:
            shape = [3, 0, 5]
        elif i % 50 == 34 and dtype not in SUB_BYTE:
            shape = []
        elif i % 5 == 0:
            shape.insert(pick.randrange(3), 1)
        tensors.append((f"model.layers.{i}.{dtype.lower()}.weight", dtype, shape, nbytes_of(dtype, shape)))
    return tensors


def mixed(args):
    source = Source(args.seed)
    dtypes = [d for d in BITS if not (args.castable and d in SUB_BYTE)]
    tensors = mixed_tensors(source.random, dtypes, args.tensors, int(args.bytes))
    with open(args.out, "wb") as file:
        file.write(header(tensors, {"format": "pt", "seed": str(args.seed)}, args.odd_header))
        for i, (_, dtype, _, nbytes) in enumerate(tensors):
            file.write(source.sprinkled(dtype, nbytes, near=i // len(dtypes) % 2 == 1))


def llama_tensors(nbytes, dtype):
    """Layers of the 8B model; for a small checkpoint, of one that is narrower by a power of two."""
    def layer(i, d):
        hidden, wide, kv = 4096 // d, 14336 // d, 1024 // d
        shapes = {"self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden],
                  "self_attn.v_proj": [kv, hidden], "self_attn.o_proj": [hidden, hidden],
                  "mlp.gate_proj": [wide, hidden], "mlp.up_proj": [wide, hidden], "mlp.down_proj": [hidden, wide],
                  "input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
        return [(f"model.layers.{i}.{name}.weight", shape) for name, shape in shapes.items()]

    def ends(d):
        return [("model.embed_tokens.weight", [128256 // d, 4096 // d]), ("model.norm.weight", [4096 // d]),
                ("lm_head.weight", [128256 // d, 4096 // d])]

    def total(shapes):
        return sum(nbytes_of(dtype, shape) for _, shape in shapes)

    d = 1
    while d < 64 and total(ends(d)) + total(layer(0, d)) > nbytes:
        d *= 2
    count = max(1, (nbytes - total(ends(d))) // total(layer(0, d)))
    first, norm, last = ends(d)
    shapes = [first] + [t for i in range(count) for t in layer(i, d)] + [norm, last]
    return [(name, dtype, shape, nbytes_of(dtype, shape)) for name, shape in shapes]


def pieces_of(source, name, dtype, shape, nbytes):
    if dtype == "F8_E4M3":
        return source.codes(nbytes)
    if name.endswith("_scales"):
        return source.exponents(nbytes)
    if name.endswith(".g_idx"):
        return [struct.pack(f"<{shape[0]}i", *(i // GROUP for i in range(shape[0])))]
    return source.pieces(dtype, nbytes)


def write_shards(args, tensors):
    """Cuts the list into files of about the same size, beside an index."""
    source = Source(args.seed)
    os.makedirs(args.out, exist_ok=True)
    total = sum(t[3] for t in tensors)
    shards, done = [[] for _ in range(args.files)], 0
    for tensor in tensors:
        middle = done + tensor[3] // 2
        shards[min(args.files - 1, middle * args.files // max(total, 1))].append(tensor)
        done += tensor[3]
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{args.files:05}.safetensors"
        weight_map.update((tensor[0], name) for tensor in shard)
        with open(os.path.join(args.out, name), "wb") as file:
            file.write(header(shard, {"format": "pt"}))
            for name_, dtype, shape, nbytes in shard:
                for piece in pieces_of(source, name_, dtype, shape, nbytes):
                    file.write(piece)
    with open(os.path.join(args.out, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file)


def llama(args):
    write_shards(args, llama_tensors(int(args.bytes), args.dtype.upper()))


def fp8_tensors(nbytes):
    """Layers of V3 with some of its experts; for a small checkpoint, of one that is narrower by a power of two."""
    def weight(name, rows, cols):
        return [(f"{name}.weight", "F8_E4M3", [rows, cols]),
                (f"{name}.weight_scale_inv", "F32", [-(-rows // 128), -(-cols // 128)])]

    def layer(i, d):
        hidden, inner, name = 7168 // d, 2048 // d, f"model.layers.{i}"
        attention = {"q_a_proj": (1536 // d, hidden), "kv_a_proj_with_mqa": (576 // d, hidden), "o_proj": (hidden, 16384 // d)}
        tensors = [(f"{name}.input_layernorm.weight", "BF16", [hidden])]
        for part, shape in attention.items():
            tensors += weight(f"{name}.self_attn.{part}", *shape)
        tensors += [(f"{name}.mlp.gate.weight", "BF16", [256 // d, hidden])]
        for expert in range(8):
            for part, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
                tensors += weight(f"{name}.mlp.experts.{expert}.{part}", *shape)
        return tensors

    def ends(d):
        return [("model.embed_tokens.weight", "BF16", [32768 // d, 7168 // d]), ("model.norm.weight", "BF16", [7168 // d])]

    def total(shapes):
        return sum(nbytes_of(dtype, shape) for _, dtype, shape in shapes)

    d = 1
    while d < 64 and total(ends(d)) + total(layer(0, d)) > nbytes:
        d *= 2
    count = max(1, round((nbytes - total(ends(d))) / total(layer(0, d))))
    first, norm = ends(d)
    shapes = [first] + [t for i in range(count) for t in layer(i, d)] + [norm]
    return [(name, dtype, shape, nbytes_of(dtype, shape)) for name, dtype, shape in shapes]


def fp8(args):
    write_shards(args, fp8_tensors(int(args.bytes)))
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "rms_norm_eps": 1e-06,
              "rope_scaling": {"mscale": 1.0, "factor": 40}, "torch_dtype": "bfloat16",
              "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                      "weight_block_size": [128, 128]}}
    others = {"config.json": json.dumps(config, indent=2), "tokenizer.json": "{}", "generation_config.json": "{}",
              "modeling_deepseek.py": "pass\n"}
    for name, text in others.items():
        with open(os.path.join(args.out, name), "w") as file:
            file.write(text)


def sized(shapes):
    return [(name, dtype, shape, nbytes_of(dtype, shape)) for name, dtype, shape in shapes]


def repeated(nbytes, layer, ends):
    """As many layers as fit, of a model that is narrower by a power of two when none does."""
    d = 1
    while d < 64 and sum(t[3] for t in sized(ends(d) + layer(0, d))) > nbytes:
        d *= 2
    count = max(1, round((nbytes - sum(t[3] for t in sized(ends(d)))) / sum(t[3] for t in sized(layer(0, d)))))
    return sized(ends(d) + [t for i in range(count) for t in layer(i, d)])


def write_config(args, model_type, quantization):
    with open(os.path.join(args.out, "config.json"), "w") as file:
        json.dump({"model_type": model_type, "torch_dtype": "bfloat16", "quantization_config": quantization}, file, indent=2)


def mxfp4(args):
    def layer(i, d):
        hidden, wide, name, experts = 2880 // d // 32 * 32, 2880 // d // 32 * 32, f"model.layers.{i}", max(32 // d, 1)
        tensors = [(f"{name}.input_layernorm.weight", "BF16", [hidden])]
        for part, rows, cols in (("q_proj", 4096 // d, hidden), ("k_proj", 512 // d, hidden), ("v_proj", 512 // d, hidden),
                                 ("o_proj", hidden, 4096 // d)):
            tensors += [(f"{name}.self_attn.{part}.weight", "BF16", [rows, cols]), (f"{name}.self_attn.{part}.bias", "BF16", [rows])]
        for part, rows, cols in (("gate_up_proj", 2 * wide, hidden), ("down_proj", hidden, wide)):
            tensors += [(f"{name}.mlp.experts.{part}_blocks", "U8", [experts, rows, cols // 32, 16]),
                        (f"{name}.mlp.experts.{part}_scales", "U8", [experts, rows, cols // 32]),
                        (f"{name}.mlp.experts.{part}_bias", "BF16", [experts, rows])]
        return tensors

    def ends(d):
        hidden = 2880 // d // 32 * 32
        return [("model.embed_tokens.weight", "BF16", [32768 // d, hidden]), ("model.norm.weight", "BF16", [hidden])]

    write_shards(args, repeated(int(args.bytes), layer, ends))
    write_config(args, "gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn",
                                   "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]})


def gptq(args):
    def layer(i, d):
        hidden, wide, kv, name = 8192 // d, 28672 // d, 1024 // d, f"model.layers.{i}"
        tensors = [(f"{name}.{norm}.weight", "BF16", [hidden]) for norm in ("input_layernorm", "post_attention_layernorm")]
        for part, cols, rows in (("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", hidden, kv),
                                 ("self_attn.v_proj", hidden, kv), ("self_attn.o_proj", hidden, hidden),
                                 ("mlp.gate_proj", hidden, wide), ("mlp.up_proj", hidden, wide), ("mlp.down_proj", wide, hidden)):
            tensors += [(f"{name}.{part}.g_idx", "I32", [cols]), (f"{name}.{part}.qweight", "I32", [cols // 8, rows]),
                        (f"{name}.{part}.qzeros", "I32", [cols // GROUP, rows // 8]),
                        (f"{name}.{part}.scales", "F16", [cols // GROUP, rows])]
        return tensors

    def ends(d):
        return [("model.embed_tokens.weight", "BF16", [32768 // d, 8192 // d]), ("model.norm.weight", "BF16", [8192 // d])]

    write_shards(args, repeated(int(args.bytes), layer, ends))
    write_config(args, "llama", {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False,
                                 "checkpoint_format": "gptq"})


def many(args):
    dtype = args.dtype.upper()
    count = args.bytes_each * 8 // BITS[dtype]
    write_shards(args, [(f"t.{i}.weight", dtype, [count], nbytes_of(dtype, [count])) for i in range(args.tensors)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, run in (("mixed", mixed), ("llama", llama), ("fp8", fp8), ("mxfp4", mxfp4), ("gptq", gptq), ("many", many)):
        options = kinds.add_parser(kind)
        options.set_defaults(run=run)
        options.add_argument("out")
        options.add_argument("--seed", type=int, default=1)
        if kind != "many":
            options.add_argument("--bytes", type=float, default=1e9)
        if kind in ("mixed", "many"):
            options.add_argument("--tensors", type=int, default=500)
        if kind != "mixed":
            options.add_argument("--dtype", default="bf16", choices=[d.lower() for d in BITS])
            options.add_argument("--files", type=int, default=1)
    kinds.choices["mixed"].add_argument("--odd-header", action="store_true")
    kinds.choices["mixed"].add_argument("--castable", action="store_true")
    kinds.choices["many"].add_argument("--bytes-each", type=int, default=4096)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
