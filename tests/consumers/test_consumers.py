#!/usr/bin/env python3
"""Real loads by libfst, their tensors handed through DLPack to consumers that are not ours.

    python3 test_consumers.py --library PATH/libfst.so PART [unittest's arguments]

PART is `numpy` (with a reader of the capsule for the types that no consumer knows), `pytorch` or `device` (PyTorch on
GPU $FST_TEST_DEVICE). A part whose consumer is not there is skipped as a whole, exit status 77; with FST_TEST_DEVICE
set it fails instead. What is expected comes from the reference: it writes the files and reads their bytes.
"""
import argparse
import ctypes
import gc
import json
import math
import os
import pathlib
import struct
import sys
import tempfile
import threading
import unittest

import numpy as np
import safetensors

import fst_ctypes
from fst_ctypes import DEVICE_CPU, FstError, device_gpu

TEST_DEVICE = os.environ.get("FST_TEST_DEVICE")
SKIPPED = 77

library = torch = None  # set by main

KDL_CPU, KDL_CUDA, KDL_ROCM = 1, 2, 10

# dtype: name for the reference's writer, bits, DLPack's code, bits and lanes (dlpack.h 1.1)
DTYPES = {
    "BOOL": ("bool", 8, 6, 8, 1),
    "F4": ("float4_e2m1fn_x2", 4, 17, 4, 2),
    "F6_E2M3": (None, 6, 15, 6, 1),  # the reference reads F6 but has no name to write it by
    "F6_E3M2": (None, 6, 16, 6, 1),
    "U8": ("uint8", 8, 1, 8, 1),
    "I8": ("int8", 8, 0, 8, 1),
    "F8_E5M2": ("float8_e5m2", 8, 12, 8, 1),
    "F8_E4M3": ("float8_e4m3fn", 8, 10, 8, 1),
    "F8_E8M0": ("float8_e8m0fnu", 8, 14, 8, 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8, 11, 8, 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8, 13, 8, 1),
    "I16": ("int16", 16, 0, 16, 1),
    "U16": ("uint16", 16, 1, 16, 1),
    "F16": ("float16", 16, 2, 16, 1),
    "BF16": ("bfloat16", 16, 4, 16, 1),
    "I32": ("int32", 32, 0, 32, 1),
    "U32": ("uint32", 32, 1, 32, 1),
    "F32": ("float32", 32, 2, 32, 1),
    "C64": ("complex64", 64, 5, 64, 1),
    "F64": ("float64", 64, 2, 64, 1),
    "I64": ("int64", 64, 0, 64, 1),
    "U64": ("uint64", 64, 1, 64, 1),
}
NUMPY_DTYPES = ["BOOL", "U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
TORCH_DTYPES = [name for name in DTYPES if not name.startswith("F6")]

SHAPES = {"matrix": (6, 8), "deep": (2, 1, 3, 4), "vector": (5,), "scalar": (), "empty": (3, 0, 2),
          "large": (300, 1000)}


def tensors_of_all_dtypes():
    """name -> (dtype, shape, bytes), every bit pattern allowed but in BOOL."""
    random = np.random.default_rng(2)
    made = {}
    for dtype, (_, bits, *_) in DTYPES.items():
        for kind, shape in SHAPES.items():
            if math.prod(shape) * bits % 8 or (dtype == "F4" and not shape):
                continue
            values = 2 if dtype == "BOOL" else 256
            data = random.integers(0, values, math.prod(shape) * bits // 8, np.uint8)
            made[f"{dtype}.{kind}"] = dtype, shape, data
    return made


def write_by_reference(path, tensors):
    specs = {}
    for name, (dtype, shape, data) in tensors.items():
        # F4's writer takes PyTorch's shape, in pairs.
        shape = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
        specs[name] = safetensors.TensorSpec(dtype=DTYPES[dtype][0], shape=shape, data_ptr=data.ctypes.data,
                                             data_len=data.nbytes)
    path.write_bytes(safetensors.serialize(specs, None))


def write_by_hand(path, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    text = json.dumps(header).encode()
    data = b"".join(data.tobytes() for *_, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_zeros(path, count):
    """One F32 tensor "big", as a file with a hole for its data."""
    text = json.dumps({"big": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 4 * count)


def row_major(shape):
    strides, stride = [], 1
    for extent in reversed(shape):
        strides.insert(0, stride)
        stride *= max(extent, 1)
    return tuple(strides)


class Case(unittest.TestCase):
    """Every dtype in two files, and what the reference reads from them."""

    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory(prefix="fst-consumers-")
        folder = pathlib.Path(cls.directory.name)
        tensors = tensors_of_all_dtypes()
        cls.files = [folder / "reference.safetensors", folder / "f6.safetensors"]
        write_by_reference(cls.files[0], {n: t for n, t in tensors.items() if not n.startswith("F6")})
        write_by_hand(cls.files[1], {n: t for n, t in tensors.items() if n.startswith("F6")})
        cls.expected = {}
        for path in cls.files:
            for name, tensor in safetensors.deserialize(path.read_bytes()):
                cls.expected[name] = tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])
        assert cls.expected.keys() == tensors.keys()

    @classmethod
    def tearDownClass(cls):
        cls.directory.cleanup()

    def path(self, name):
        return pathlib.Path(self.directory.name) / name

    def load(self, **options):
        model = library.load(*self.files, **options)
        self.addCleanup(model.free)
        return model

    def of(self, dtypes):
        return ((name, *rest) for name, rest in self.expected.items() if rest[0] in dtypes)

    def check_deleted(self, exports, times=1):
        gc.collect()
        self.assertEqual([export.deleted[0] for export in exports], [times] * len(exports))


class Capsules(Case):
    """The reader of the capsule: every dtype, field by field."""

    def test_fields_and_bytes_of_every_dtype(self):
        model = self.load()
        self.assertEqual(model.index.keys(), self.expected.keys())
        exports = []
        for name, dtype, shape, data in self.of(DTYPES):
            with self.subTest(name):
                exports.append(model.export(name))
                capsule = exports[-1].__dlpack__(max_version=(1, 0))
                managed = fst_ctypes.read_capsule(capsule)
                tensor = managed.dl_tensor
                _, _, code, bits, lanes = DTYPES[dtype]
                if lanes == 2:
                    shape = (*shape[:-1], shape[-1] // 2)
                self.assertEqual((managed.major, managed.flags, tensor.byte_offset), (1, 0, 0))
                self.assertGreaterEqual(managed.minor, 1)  # the first with these codes
                self.assertEqual((tensor.device_type, tensor.device_id), (KDL_CPU, 0))
                self.assertEqual((tensor.code, tensor.bits, tensor.lanes), (code, bits, lanes))
                self.assertEqual(tensor.ndim, len(shape))
                self.assertTrue(tensor.shape and tensor.strides)
                self.assertEqual(tuple(tensor.shape[: tensor.ndim]), shape)
                self.assertEqual(tuple(tensor.strides[: tensor.ndim]), row_major(shape))
                if data:
                    self.assertEqual(tensor.data % 256, 0)
                    self.assertEqual(ctypes.string_at(tensor.data, len(data)), data)
                else:
                    self.assertIsNone(tensor.data)
        self.check_deleted(exports, 0)
        for export in exports:
            export.close()
        self.check_deleted(exports)

    def test_f4_that_cannot_be_paired(self):
        path = self.path("odd.safetensors")
        data = np.arange(3, dtype=np.uint8)
        write_by_hand(path, {"odd": ("F4", (2, 3), data)})
        model = library.load(path)
        self.addCleanup(model.free)
        with self.assertRaises(FstError) as caught:
            model.export("odd")
        self.assertEqual(caught.exception.name, "FST_E_DLPACK")
        self.assertIn('"odd"', str(caught.exception))
        self.assertEqual(ctypes.string_at(model.find("odd").data, 3), data.tobytes())  # fst_tensor has it

    def test_opened_model_exports_nothing(self):
        model = library.open(*self.files)
        self.addCleanup(model.free)
        for name in self.expected:
            with self.subTest(name), self.assertRaises(FstError) as caught:
                model.export(name)
            self.assertEqual(caught.exception.name, "FST_E_NO_DATA")


class NumPy(Case):
    def test_values(self):
        model = self.load()
        for name, dtype, shape, data in self.of(NUMPY_DTYPES):
            with self.subTest(name):
                export = model.export(name)
                array = np.from_dlpack(export)
                self.assertEqual((array.dtype, array.shape), (np.dtype(DTYPES[dtype][0]), shape))
                self.assertEqual(array.tobytes(), data)
                if data:
                    self.assertEqual(array.ctypes.data, model.find(name).data)  # no copy
                    self.assertTrue(array.flags.writeable)                      # flags 0: not read-only
                    self.assertTrue(array.flags.c_contiguous)
                del array
                self.check_deleted([export])

    def test_cast_values(self):
        path = self.path("cast.safetensors")
        values = np.linspace(-1000, 1000, 10001, dtype=np.float32)
        write_by_reference(path, {"x": ("F32", values.shape, values)})
        model = library.load(path, cast="F16")
        self.addCleanup(model.free)
        np.testing.assert_array_equal(np.from_dlpack(model.export("x")), values.astype(np.float16))

    def test_refused_export_deletes_once(self):
        """NumPy has no F8: it must raise, and let go of the tensor."""
        model = self.load()
        export = model.export("F8_E4M3.matrix")
        with self.assertRaises((BufferError, RuntimeError, TypeError)):
            np.from_dlpack(export)
        export.close()
        self.check_deleted([export])


def mapped_bytes(start, size):
    """How much of an address range is memory at present."""
    total = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            total += max(0, min(last, start + size) - max(first, start))
    return total


class BigCase(Case):
    """On the CPU device a block is memory of its own: present in the process while anybody needs it."""

    SIZE = 64 << 20  # large beside what Python itself might map into the same place

    def setUp(self):
        path = self.path("big.safetensors")
        write_zeros(path, self.SIZE // 4)
        self.model = library.load(path)
        self.address = self.model.find("big").data
        self.check_present()

    def check_present(self):
        self.assertEqual(mapped_bytes(self.address, self.SIZE), self.SIZE)

    def check_gone(self):
        gc.collect()
        self.assertLess(mapped_bytes(self.address, self.SIZE), self.SIZE // 4)


class Lifetime(BigCase):
    def test_model_alone(self):
        self.model.free()
        self.check_gone()

    def test_model_freed_first(self):
        export = self.model.export("big")
        array = np.from_dlpack(export)
        self.model.free()
        self.check_present()
        self.assertEqual(array.sum(), 0)
        array[:] = 1
        self.assertEqual(array.sum(), self.SIZE // 4)
        del array
        self.check_deleted([export])
        self.check_gone()

    def test_model_freed_last(self):
        export = self.model.export("big")
        array = np.from_dlpack(export)
        del array
        self.check_deleted([export])
        self.check_present()
        self.model.free()
        self.check_gone()

    def test_freed_with_the_last_of_several(self):
        exports = [self.model.export("big") for _ in range(4)]
        arrays = [np.from_dlpack(export) for export in exports]
        self.model.free()
        while arrays:
            self.check_present()
            arrays.pop()
        self.check_deleted(exports)
        self.check_gone()

    def test_view_keeps_it(self):
        array = np.from_dlpack(self.model.export("big"))
        view = array[10:20]
        self.model.free()
        del array
        self.check_present()
        self.assertEqual(view.sum(), 0)
        del view
        self.check_gone()

    def test_capsule_nobody_consumed(self):
        export = self.model.export("big")
        self.model.free()
        self.check_present()
        export.close()
        self.check_deleted([export])
        self.check_gone()

    def test_deleted_in_other_threads(self):
        exports = [self.model.export("big") for _ in range(8)]
        arrays = [[np.from_dlpack(export)] for export in exports]
        self.model.free()
        start = threading.Barrier(len(arrays))

        def drop(holder):
            start.wait()
            holder.pop()

        threads = [threading.Thread(target=drop, args=(holder,)) for holder in arrays]
        self.check_present()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.check_deleted(exports)
        self.check_gone()


class PyTorchCases:
    """What holds for PyTorch on any device. `device` and `placed` are the subclasses'."""

    def test_values(self):
        model = self.load(device=self.device)
        for name, dtype, shape, data in self.of(TORCH_DTYPES):
            with self.subTest(name):
                export = model.export(name)
                tensor = torch.from_dlpack(export)
                if dtype == "F4":
                    shape = (*shape[:-1], shape[-1] // 2)
                self.assertEqual(tensor.dtype, getattr(torch, DTYPES[dtype][0]))
                self.assertEqual(tuple(tensor.shape), shape)
                self.assertEqual(tensor.device, self.placed)
                self.assertTrue(tensor.is_contiguous())
                if data:
                    self.assertEqual(tensor.data_ptr(), model.find(name).data)
                    whole = tensor.reshape(-1)  # a scalar cannot be viewed as bytes
                    self.assertEqual(whole.view(torch.uint8).cpu().numpy().tobytes(), data)
                    del whole
                del tensor
                self.check_deleted([export])

    def test_model_freed_first(self):
        model = library.load(*self.files, device=self.device)
        names = [name for name, *_ in self.of(TORCH_DTYPES)]
        exports = [model.export(name) for name in names]
        tensors = [torch.from_dlpack(export) for export in exports]
        model.free()
        for name, tensor in zip(names, tensors):
            data = tensor.reshape(-1).view(torch.uint8).cpu().numpy().tobytes() if tensor.numel() else b""
            self.assertEqual(data, self.expected[name][2], name)
        self.check_deleted(exports, 0)
        del tensors, tensor
        self.check_deleted(exports)

    def test_f6_is_refused_and_deleted_once(self):
        export = self.load(device=self.device).export("F6_E2M3.matrix")
        with self.assertRaises((BufferError, RuntimeError)):
            torch.from_dlpack(export)
        export.close()
        self.check_deleted([export])

    def test_cast_values(self):
        path = self.path("torch-cast.safetensors")
        values = torch.linspace(-1000, 1000, 100003, dtype=torch.float32)
        write_by_reference(path, {"x": ("F32", tuple(values.shape), values.numpy())})
        model = library.load(path, device=self.device, cast="BF16")
        self.addCleanup(model.free)
        self.assertTrue(torch.equal(torch.from_dlpack(model.export("x")).cpu(), values.bfloat16()))


class PyTorchLifetime(BigCase):
    def test_model_freed_first(self):
        export = self.model.export("big")
        tensor = torch.from_dlpack(export)
        view = tensor[5:]
        self.model.free()
        del tensor
        self.check_present()
        self.assertEqual(view.sum().item(), 0)
        del view
        self.check_deleted([export])
        self.check_gone()


class PyTorchCpu(PyTorchCases, Case):
    device = DEVICE_CPU

    @property
    def placed(self):
        return torch.device("cpu")


class PyTorchDevice(PyTorchCases, Case):
    @property
    def index(self):
        return int(TEST_DEVICE)

    @property
    def device(self):
        return device_gpu(self.index)

    @property
    def placed(self):
        return torch.device("cuda", self.index)  # PyTorch's name on AMD too

    def test_device_type(self):
        kind = self.load(device=self.device).export("F32.matrix").__dlpack_device__()
        self.assertEqual(kind, (KDL_ROCM if torch.version.hip else KDL_CUDA, self.index))

    def free_bytes(self):
        """The driver's word. What is freed in the order of a stream goes back when that is waited for."""
        torch.cuda.synchronize(self.index)
        return torch.cuda.mem_get_info(self.index)[0]

    def test_memory_is_freed_with_the_last_tensor(self):
        size = 1 << 30
        path = self.path("big.safetensors")
        write_zeros(path, size // 4)
        warm = library.load(path, device=self.device)  # context, kernels and rings exist from here on
        torch.from_dlpack(warm.export("big")).sum().item()
        warm.free()
        before = self.free_bytes()
        model = library.load(path, device=self.device)
        self.assertLess(self.free_bytes(), before - size * 3 // 4)
        export = model.export("big")
        tensor = torch.from_dlpack(export)
        model.free()
        self.assertLess(self.free_bytes(), before - size * 3 // 4)
        self.assertEqual(tensor.sum().item(), 0)
        del tensor
        self.check_deleted([export])
        self.assertGreater(self.free_bytes(), before - size // 4)


PARTS = {"numpy": [Capsules, NumPy, Lifetime], "pytorch": [PyTorchCpu, PyTorchLifetime], "device": [PyTorchDevice]}


def why_not(part):
    """Why a part cannot run here, or None; with FST_TEST_DEVICE every part must."""
    global torch
    if part == "device" and TEST_DEVICE is None:
        return "FST_TEST_DEVICE is not set"
    if part != "numpy":
        try:
            import torch
        except ImportError:
            if TEST_DEVICE is not None:
                raise
            return "no PyTorch"
    return None


def main():
    global library
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--library", required=True)
    parser.add_argument("part", choices=PARTS)
    arguments, rest = parser.parse_known_args()
    reason = why_not(arguments.part)
    if reason:
        print("skipped:", reason)
        sys.exit(SKIPPED)
    library = fst_ctypes.Library(os.path.abspath(arguments.library))
    cases = [case.__name__ for case in PARTS[arguments.part]]
    unittest.main(argv=[sys.argv[0], *([] if any(not r.startswith("-") for r in rest) else cases), *rest])


if __name__ == "__main__":
    main()
