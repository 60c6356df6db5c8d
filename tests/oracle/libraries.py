#!/usr/bin/env python3
"""Small quantized checkpoints by the libraries that write them, and what these make of them again.

    libraries.py DIRECTORY [NAME]...

Each case writes DIRECTORY/NAME: model.safetensors, config.json, expected.safetensors (the dense weights, in the
precision that the format's arithmetic is stated in), and a line in DIRECTORY/versions.json. tests/oracle_data.c loads
them. Run by hand, in an environment that has the libraries; what cannot run says why and is left out.
docs/quantized.md has the table.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

CASES = {}


def case(*names, package):
    def add(function):
        for name in names:
            CASES[name] = (function, package)
        return function
    return add


def weight(rows, cols, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, cols, generator=generator) * 0.05).to(dtype)


# ---- compressed-tensors ----

COMPRESSED = {
    "ct-fp8-channel": ("float-quantized", dict(num_bits=8, type="float", strategy="channel", symmetric=True)),
    "ct-fp8-tensor": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor", symmetric=True)),
    "ct-fp8-block": ("float-quantized", dict(num_bits=8, type="float", strategy="block", symmetric=True,
                                             block_structure=[16, 32])),
    "ct-int8-channel": ("int-quantized", dict(num_bits=8, type="int", strategy="channel", symmetric=True)),
    "ct-int8-zeros": ("int-quantized", dict(num_bits=8, type="int", strategy="channel", symmetric=False)),
    "ct-packed-3": ("pack-quantized", dict(num_bits=3, type="int", strategy="group", group_size=32, symmetric=True)),
    "ct-packed-4": ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)),
    "ct-packed-4-zeros": ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=32,
                                                 symmetric=False)),
    "ct-packed-8": ("pack-quantized", dict(num_bits=8, type="int", strategy="channel", symmetric=True)),
    "ct-nvfp4": ("nvfp4-pack-quantized", dict(num_bits=4, type="float", strategy="tensor_group", group_size=16,
                                              symmetric=True)),
    "ct-mxfp4": ("mxfp4-pack-quantized", dict(num_bits=4, type="float", strategy="group", group_size=32,
                                              symmetric=True, scale_dtype=torch.uint8)),
    "ct-mxfp8": ("mxfp8-quantized", dict(num_bits=8, type="float", strategy="group", group_size=32, symmetric=True,
                                         scale_dtype=torch.uint8)),
}


def groups_of(w, args):
    rows, cols = w.shape
    if args.strategy == "tensor":
        return w.reshape(1, -1), (1,)
    if args.strategy == "channel":
        return w, (rows, 1)
    if args.strategy == "block":
        height, width = args.block_structure
        tiles = w.reshape(rows // height, height, cols // width, width).transpose(1, 2)
        return tiles.reshape(-1, height * width), (rows // height, cols // width)
    return w.reshape(-1, args.group_size), (rows, cols // args.group_size)


def compressed(name):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    format, fields = COMPRESSED[name]
    args = QuantizationArgs(**fields)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = weight(48, 96, torch.bfloat16)
    flat, shape = groups_of(w, args)
    state = {"weight": w}
    extra = {}
    if format.startswith("nvfp4"):
        extra["global_scale"] = state["weight_global_scale"] = (448 * 6 / w.abs().max()).float().reshape(1)
    scale, zero = calculate_qparams(flat.amin(1), flat.amax(1), args, **extra)
    state["weight_scale"] = scale.reshape(shape)
    if not args.symmetric:
        state["weight_zero_point"] = zero.reshape(shape).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(state, scheme)
    again = compressor.decompress(dict(packed), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {
        "targets": ["Linear"], "format": format, "weights": json.loads(args.model_dump_json(exclude_none=True))}}}
    return {f"m.{k}": v for k, v in packed.items()}, {"m.weight": again}, config


for _name in COMPRESSED:
    CASES[_name] = (lambda _name=_name: compressed(_name), "compressed-tensors")


# ---- bitsandbytes ----

def bnb4(kind, nested, dtype, storage=torch.uint8, block=64):
    import bitsandbytes.functional as bnb
    w = weight(40, 104, dtype)
    codes, state = bnb.quantize_4bit(w, blocksize=block, compress_statistics=nested, quant_type=kind,
                                     quant_storage=storage)
    tensors = {"m.weight": codes, **{f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    return tensors, {"m.weight": bnb.dequantize_4bit(codes, state)}, {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested}


for _name, _arguments in {"bnb-nf4": ("nf4", False, torch.float32), "bnb-nf4-nested": ("nf4", True, torch.float32),
                          "bnb-nf4-bf16": ("nf4", True, torch.bfloat16, torch.bfloat16),
                          "bnb-fp4": ("fp4", False, torch.float32),
                          "bnb-fp4-nested": ("fp4", True, torch.float16, torch.uint8, 128)}.items():
    CASES[_name] = (lambda _a=_arguments: bnb4(*_a), "bitsandbytes")


@case("bnb-int8", package="bitsandbytes")
def bnb8():
    import bitsandbytes.functional as bnb
    codes, scb, _ = bnb.int8_vectorwise_quant(weight(40, 96, torch.float16))
    dense = bnb.int8_vectorwise_dequant(codes, scb)
    return ({"m.weight": codes, "m.SCB": scb, "m.weight_format": torch.tensor(0, dtype=torch.uint8)},
            {"m.weight": dense}, {"quant_method": "bitsandbytes", "load_in_8bit": True})


# ---- transformers ----

@case("hf-mxfp4", package="transformers")
def mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, 12, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, 12, 3), dtype=torch.uint8, generator=generator)
    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    return ({"e.down_proj_blocks": blocks, "e.down_proj_scales": scales},
            {"e.down_proj": dense.transpose(1, 2).contiguous()}, {"quant_method": "mxfp4"})


def finegrained(codes, scales, config):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    dense = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    return {"m.weight": codes, "m.weight_scale_inv": scales}, {"m.weight": dense}, config


@case("hf-fp8-block", package="transformers")
def fp8_block():
    scales = weight(3, 2, seed=5).abs() * 0.01
    return finegrained((weight(96, 128) * 2000).to(torch.float8_e4m3fn), scales,
                       {"quant_method": "fp8", "weight_block_size": [32, 64]})


@case("hf-fp8-e8m0", package="transformers")
def fp8_powers():
    scales = torch.tensor([[118, 120], [121, 117], [119, 116]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return finegrained((weight(96, 128) * 2000).to(torch.float8_e4m3fn), scales,
                       {"quant_method": "fp8", "weight_block_size": [32, 64], "scale_fmt": "ue8m0"})


@case("hf-fp4-experts", package="transformers")
def fp4_experts():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (24, 48), dtype=torch.int8, generator=generator)
    scales = torch.randint(110, 130, (24, 3), dtype=torch.uint8, generator=generator).view(torch.float8_e8m0fnu)
    dense = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    return {"w1.weight": codes, "w1.scale": scales}, {"w1.weight": dense}, {"quant_method": "fp8", "expert_dtype": "fp4"}


# ---- GPTQModel, AutoAWQ ----

def inverse(method, block=None):
    from gptqmodel.nn_modules.qlinear.fp8 import quantize_fp8_weight
    from gptqmodel.quantization.dtype import dequantize_fp8
    codes, scales = quantize_fp8_weight(weight(32, 64), weight_scale_method=method, weight_block_size=block)
    dense = dequantize_fp8(codes, scale_inv=scales, axis=None if block else 0, target_dtype=torch.float32)
    return ({"m.weight": codes, "m.weight_scale_inv": scales}, {"m.weight": dense},
            {"quant_method": "fp8", "weight_scale_semantics": "inverse", **({"weight_block_size": block} if block else {})})


for _name, _arguments in {"gptqmodel-fp8-tensor": ("tensor",), "gptqmodel-fp8-row": ("row",),
                          "gptqmodel-fp8-block": ("block", [16, 32])}.items():
    CASES[_name] = (lambda _a=_arguments: inverse(*_a), "gptqmodel")


def gptq(bits, shuffled=False):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    rows, cols, group = 32, 64, 32
    linear = torch.nn.Linear(cols, rows, bias=False, dtype=torch.float16)
    w = linear.weight.data = weight(rows, cols, torch.float16)
    order = torch.arange(cols, dtype=torch.int32) // group
    if shuffled:
        order = order[torch.randperm(cols, generator=torch.Generator().manual_seed(2))]
    most = 2 ** bits - 1
    scales = torch.stack([(w[:, order == g].float().amax(1) - w[:, order == g].float().amin(1)) / most
                          for g in range(cols // group)], 1).half()
    zeros = torch.full((rows, cols // group), (most + 1) // 2, dtype=torch.int32)
    q = TorchLinear(bits=bits, group_size=group, sym=True, desc_act=shuffled, in_features=cols, out_features=rows,
                    bias=False, pack_dtype=torch.int32)
    q.pack_original(linear, scales, zeros, order)
    q.post_init()
    tensors = {f"m.{k}": getattr(q, k) for k in ("qweight", "qzeros", "scales", "g_idx")}
    return tensors, {"m.weight": q.dequantize_weight().T.contiguous()}, {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled, "sym": True,
        "checkpoint_format": "gptq_v2", "meta": {"quantizer": ["gptqmodel:" + importlib.metadata.version("gptqmodel")]}}


for _name, _arguments in {f"gptq-{bits}": (bits,) for bits in (2, 3, 4, 8)}.items():
    CASES[_name] = (lambda _a=_arguments: gptq(*_a), "gptqmodel")
CASES["gptq-4-order"] = (lambda: gptq(4, True), "gptqmodel")


@case("awq", package="autoawq")
def awq():
    found = importlib.util.find_spec("awq")  # the file alone: the package itself wants an older transformers
    path = pathlib.Path(found.submodule_search_locations[0]) / "utils/packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    generator = torch.Generator().manual_seed(6)
    words = [torch.randint(-2**31, 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
             for shape in ((64, 4), (2, 4))]
    scales = (weight(2, 32).abs() * 0.1).half()
    dense = packing.dequantize_gemm(*words, scales, 4, 32)
    return ({"m.qweight": words[0], "m.qzeros": words[1], "m.scales": scales}, {"m.weight": dense.T.contiguous()},
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True})


# ---- ModelOpt ----

@case("modelopt-nvfp4", package="nvidia-modelopt")
def modelopt_nvfp4():
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    w = weight(32, 64)
    q, scale, scale2 = NVFP4QTensor.quantize(w, 16)
    dense = q.dequantize(torch.float32, scale=scale, double_scale=scale2, block_sizes={-1: 16})
    return ({"m.weight": q._quantized_data, "m.weight_scale": scale, "m.weight_scale_2": scale2.float()},
            {"m.weight": dense}, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


@case("modelopt-mxfp8", package="nvidia-modelopt")
def modelopt_mxfp8():
    from modelopt.torch.quantization.qtensor import MXFP8QTensor
    w = weight(32, 64, torch.bfloat16)
    q, scale = MXFP8QTensor.quantize(w)[:2]
    dense = q.dequantize(torch.bfloat16, scale=scale)
    return ({"m.weight": q._quantized_data, "m.weight_scale": scale.reshape(32, 2)}, {"m.weight": dense},
            {"quant_method": "modelopt", "quant_algo": "MXFP8"})


# ---- Quark ----

@case("quark-int4", package="amd-quark")
def quark_int4():
    from quark.torch.utils.pack import Pack_4_bits
    pack = Pack_4_bits("per_group", "int4")
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(-8, 8, (32, 64), generator=generator, dtype=torch.int32)
    scales = weight(32, 2).abs() * 0.1
    packed = pack.pack(codes, True)
    again = pack.unpack(packed, True)
    again = again.reshape(64, 32).T if again.shape == (64, 32) else again
    dense = again.float() * scales.repeat_interleave(32, 1)
    return ({"m.weight": packed, "m.weight_scale": scales.T.contiguous()}, {"m.weight": dense.contiguous()},
            {"quant_method": "quark", "export": {"pack_method": "reorder"},
             "global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_group", "group_size": 32}}})


@case("quark-mxfp4", package="amd-quark")
def quark_mxfp4():
    from quark.torch.utils.pack import Pack_fp4
    pack = Pack_fp4("per_group", "fp4")
    generator = torch.Generator().manual_seed(9)
    values = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -.5, -1, -1.5, -2, -3, -4, -6])
    codes = values[torch.randint(0, 15, (8, 64), generator=generator)]
    packed = pack.pack(codes, False)
    if packed.shape != (8, 32):
        raise RuntimeError(f"packed as {tuple(packed.shape)}: not as checkpoints have it")
    scales = torch.randint(110, 130, (8, 2), dtype=torch.uint8, generator=generator)
    dense = pack.unpack(packed, False).float() * torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    return ({"m.weight": packed, "m.weight_scale": scales}, {"m.weight": dense},
            {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "scale_format": "e8m0"}}})


def write(folder, name):
    function, package = CASES[name]
    tensors, expected, config = function()
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in (("model", tensors), ("expected", expected)):
        save_file({k: v.detach().contiguous() for k, v in data.items()}, folder / f"{file}.safetensors")
        if (folder / f"{file}.safetensors").stat().st_size > 65536:
            raise RuntimeError("larger than 64 KiB")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}, default=str) + "\n")
    return f"{package} {importlib.metadata.version(package)}, torch {torch.__version__}"


def main():
    folder, failed = pathlib.Path(sys.argv[1]), 0
    folder.mkdir(parents=True, exist_ok=True)
    versions = folder / "versions.json"
    made = json.loads(versions.read_text()) if versions.exists() else {}
    for name in sys.argv[2:] or CASES:
        try:
            made[name] = write(folder, name)
            print(f"{name}: {made[name]}", flush=True)
        except Exception as error:  # of a library: said, and the others are made
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    versions.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
