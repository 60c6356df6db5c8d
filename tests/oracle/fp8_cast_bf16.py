#!/usr/bin/env python3
"""What is usual: a checkpoint directory in block FP8 becomes one in BF16, by PyTorch and safetensors, file by file. It
does what DeepSeek's script of this name does, on the CPU, and is what `fst convert` is measured against.

    fp8_cast_bf16.py IN OUT [--threads N]

Prints a line of JSON: seconds, from the first file's opening to the index in place.
"""
import argparse
import json
import os
import shutil
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK = 128
SUFFIX = "_scale_inv"


def dequantize(weight, scale):
    rows, cols = weight.shape
    scale = scale.float().repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)[:rows, :cols]
    return (weight.float() * scale).to(torch.bfloat16)


def convert(source, target):
    index_name = "model.safetensors.index.json"
    with open(os.path.join(source, index_name)) as file:
        weight_map = json.load(file)["weight_map"]
    opened = {name: safe_open(os.path.join(source, name), framework="pt") for name in sorted(set(weight_map.values()))}
    new_map, total = {}, 0
    for shard, file in opened.items():
        tensors = {}
        for name in file.keys():
            if name.endswith(SUFFIX):
                continue
            tensor = file.get_tensor(name)
            if name + SUFFIX in weight_map:
                tensor = dequantize(tensor, opened[weight_map[name + SUFFIX]].get_tensor(name + SUFFIX))
            tensors[name] = tensor.contiguous()
            new_map[name] = shard
            total += tensor.numel() * tensor.element_size()
        save_file(tensors, os.path.join(target, shard), metadata={"format": "pt"})
    for name in os.listdir(source):
        if not name.endswith((".safetensors", index_name)) and name != "config.json":
            shutil.copy(os.path.join(source, name), target)
    with open(os.path.join(target, index_name), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": new_map}, file, indent=2)
    with open(os.path.join(source, "config.json")) as file:
        config = json.load(file)
    config.pop("quantization_config", None)
    config["torch_dtype"] = "bfloat16"
    with open(os.path.join(target, "config.json"), "w") as file:
        json.dump(config, file, indent=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    os.makedirs(args.target, exist_ok=True)
    start = time.perf_counter()
    convert(args.source, args.target)
    print(json.dumps({"seconds": time.perf_counter() - start, "torch": torch.__version__,
                      "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
