#!/usr/bin/env python3
"""fst beside other loaders: the same files, the same machine, alternating runs, one table.

    peers.py [--device cuda|cpu] [--lib LIBFST.SO] [--libraries A,B] [--casts D,E|none] [--rounds N] [--warm N]
             [--tmpfs DIR] [--cold auto|drop|advise] [--threads N] [--budget SECONDS] [--ranks N] [--json FILE] [--table]
             PATH...
    peers.py --table FILE.json...
    peers.py --carry DIR

PATH is a .safetensors file or a directory of them: one checkpoint each. A measurement is a process of its own: one
library, one case; it imports the library and makes the device's context, then loads once ('first') and N times more
(warm). Libraries take turns, round by round; reported are medians. Cases: where the files are (`page cache` or `tmpfs`,
as the path's file system is; --tmpfs DIR copies them there too; --cold empties the page cache before every load, by
drop_caches or else by fadvise) and what becomes of the tensors: as is, or each of --casts (by default BF16 to F16 and
F8_E4M3, F32 to BF16, F16 to BF16). Other libraries cast with torch, tensor by tensor, as each comes out of the library.

Seconds are from the call to tensors usable (synchronised). Device memory is sampled from outside the loading threads
(NVML in a process of its own, else the driver in a thread), beyond what was in use before the first load. After the
timing, a checksum of every tensor, made on the device, is compared with that of --reference (safetensors; with torch's cast
after it). fst's casts saturate and its NaN has one code, torch's do not: weights that hold NaN or numbers out of the
target's range differ there. A library that is missing, fails or takes over --limit seconds is listed with its error.
Exit code 0; 1 when bytes are wrong, fst itself failed, or nothing was measured; 2 for bad arguments.

With --ranks N each measurement is N processes, which load their parts of a Llama-shaped checkpoint for tensor parallelism at
the same time, rank i on GPU i (or they share those that there are). fst and safetensors (get_slice) read for themselves,
fastsafetensors' ranks read files in turns and scatter (get_sharded), InstantTensor's share all of it in a process group, and each
keeps its part of every tensor. Seconds are from the first beginning to the last end.

The JSON is bench_load's, with `library` in every run, and `right`, `error`, `note`; ceilings are measured in the same
rounds: `h2d_gb_per_s`, `page_cache_gb_per_s`, `tmpfs_gb_per_s` (on a GPU: into a ring of fst's shape; on the CPU: into
memory touched before, `..._fresh_...` into memory that is not), `direct_gb_per_s` (with --cold).

The libraries come from PyPI. safetensors, fastsafetensors, instanttensor and runai read with O_DIRECT or not as they
choose; NAME-buffered is told to use the page cache. --carry DIR downloads what a GPU machine with Python 3.12 and
torch, but no network, lacks (10.2 MB in all); install with `pip install --no-index --no-deps --target SITE DIR/*.whl`:

    fastsafetensors-0.5.0-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl   2,731,897 bytes
    instanttensor-0.2.2-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl     6,522,862
    runai_model_streamer-0.17.0-py3-none-manylinux_2_30_x86_64.whl                        767,860
    humanize-4.17.0-py3-none-any.whl (runai imports it)                                   133,715

safetensors 0.8.0 (516,040 bytes) is expected there; nothing else is imported by them but torch and numpy.
"""
import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MIB = 1 << 20
HERE = os.path.dirname(os.path.abspath(__file__))
WHEELS = ["fastsafetensors==0.5.0", "instanttensor==0.2.2", "runai-model-streamer==0.17.0", "humanize==4.17.0"]
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (30, 28, 27, 17)] + ["manylinux2014_x86_64"]
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
               "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
               "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2", "I64": "int64", "I32": "int32", "I16": "int16",
               "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
               "C64": "complex64"}
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
CASTS = {"BF16": ["F16", "F8_E4M3"], "F32": ["BF16"], "F16": ["BF16"]}


def note(*words):
    print("peers:", *words, file=sys.stderr, flush=True)


def no_use(text):
    note(text)
    sys.exit(2)


def digits(number):
    return float(f"{number:.5g}")


# ---- Files ----

def checkpoint_files(path):
    if os.path.isdir(path):
        found = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
        return [os.path.join(path, name) for name in found]
    return [path] if os.path.isfile(path) else []


def read_header(path):
    """Name -> (dtype, shape, first byte, bytes)."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], 8 + length + t["data_offsets"][0], t["data_offsets"][1] - t["data_offsets"][0])
            for name, t in table.items()}


def main_dtype(files):
    """The dtype that most bytes have."""
    held = {}
    for path in files:
        for dtype, _, _, nbytes in read_header(path).values():
            held[dtype] = held.get(dtype, 0) + nbytes
    return max(held, key=held.get)


def in_memory(path):
    """Whether the file system of `path` is memory: the longest mount point above it."""
    path, best, kind = os.path.realpath(path), "", ""
    with open("/proc/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            _, point, what = line.split()[:3]
            if len(point) >= len(best) and (path + "/").startswith(point.rstrip("/") + "/"):
                best, kind = point, what
    return kind in ("tmpfs", "ramfs")


LOWEST_BIT = bytes(i & 1 for i in range(256))


def cached_share(files):
    """How much of the files is in the page cache, as mincore says."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = pages = 0
    for path in files:
        size = os.path.getsize(path)
        if not size:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            count = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
            states = (ctypes.c_ubyte * count)()
            first = ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), states)
            del first
            if failed:
                return None
            resident += bytes(states).translate(LOWEST_BIT).count(1)
            pages += count
    return resident / pages if pages else 1.0


def drop_caches(files, how):
    """Empties the page cache, or has the kernel forget these files. Returns what was done."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if how != "advise":
        try:
            with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
                file.write("1")
            return "drop_caches"
        except OSError as error:
            if how == "drop":
                raise RuntimeError(f"the page cache cannot be dropped: {error.strerror}") from error
    return "fadvise"


def read_parallel(files, threads, chunk, target, direct=False):
    """Every byte of the files by preadv in `threads` threads; target(thread, turn, position, size) is where to."""
    fds = [os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for path in files]
    chunks, position = [], 0
    for fd, path in zip(fds, files):
        size = os.path.getsize(path)
        chunks += [(fd, at, min(chunk, size - at), position + at) for at in range(0, size, chunk)]
        position += (size + 4095) // 4096 * 4096
    failed, work = [], iter(chunks)  # next() of a list's iterator is one step under the GIL

    def run(thread):
        try:
            for turn, (fd, at, size, where) in enumerate(work):
                if os.preadv(fd, [target(thread, turn, where, (size + 4095) // 4096 * 4096 if direct else size)], at) < size:
                    raise RuntimeError("a short read")
        except (OSError, RuntimeError) as error:
            failed.append(error)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in fds:
        os.close(fd)
    if failed:
        raise failed[0]


# ---- Parts ----

PARTS = [(r"\.(q|k|v|gate|up)_proj\.weight$", 0), (r"\.(o|down)_proj\.weight$", 1), (r"(^|\.)(embed_tokens|lm_head)\.weight$", 0)]


def part_of(name, shape, rank, ranks):
    """(dimension, begin, end) of a rank's part, as torch.chunk has it; None: every rank has all."""
    dim = next((dim for pattern, dim in PARTS if re.search(pattern, name)), None)
    if dim is None:
        return None
    each = -(-shape[dim] // ranks)
    return dim, min(rank * each, shape[dim]), min((rank + 1) * each, shape[dim])


# ---- Checksums: words of 8 bytes, each times a number that belongs to its place, added up ----

FACTOR, START, MASK = 0x9E3779B97F4A7C15, 0x632BE59BD9B4E019, (1 << 64) - 1


def plain_checksum(data):
    data = bytes(data) + bytes(-len(data) % 8)
    words = memoryview(data).cast("Q")
    return f"{sum(w * ((i * FACTOR + START) & MASK | 1) for i, w in enumerate(words)) & MASK:016x}"


def signed(number):
    return number - (1 << 64) if number >> 63 else number


def torch_checksums(torch, tensors):
    """The same of uint8 tensors of one dimension, on their device, 32 MiB at a time."""
    sums = []
    for data in tensors:
        total = torch.zeros((), dtype=torch.int64, device=data.device)
        for at in range(0, data.numel(), 32 * MIB):
            part = data[at:at + 32 * MIB]
            if part.numel() % 8:
                part = torch.nn.functional.pad(part, (0, -part.numel() % 8))
            if part.data_ptr() % 8 or part.storage_offset() % 8:
                part = part.clone()
            words = part.view(torch.int64)
            places = torch.arange(at // 8, at // 8 + words.numel(), dtype=torch.int64, device=data.device)
            total = total + (words * (places * signed(FACTOR) + signed(START) | 1)).sum()
        sums.append(total)
    return [f"{s & MASK:016x}" for s in torch.stack(sums).tolist()] if sums else []


# ---- Libraries ----

class Library:
    """What is measured. `start` imports it and makes the context, untimed; `load` is timed, with `wait`."""
    env = {}                   # of its process
    devices = ("cuda", "cpu")
    package = None             # whose version is reported
    not_on = ()                # places where it does the same as its namesake
    rate = None                # GB/s, of a ceiling that has its own count
    loads_parts = False        # it has `load_part`

    def __init__(self, spec):
        self.spec, self.device, self.kept = spec, spec["device"], None
        self.cuda = self.device != "cpu"
        self.threads = spec.get("threads") or 0
        self.torch = None

    def start(self):
        import torch
        self.torch = torch
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.zeros(1, device=self.device)
        self.names = {getattr(torch, t): n for n, t in TORCH_NAMES.items() if hasattr(torch, t)}
        self.floats = {getattr(torch, TORCH_NAMES[n]) for n in FLOATS if hasattr(torch, TORCH_NAMES[n])}

    def version(self):
        return importlib.metadata.version(self.package) if self.package else None

    def target(self, cast):
        return getattr(self.torch, TORCH_NAMES[cast]) if cast else None

    def cast(self, tensor, target):
        return tensor.to(target) if target is not None and tensor.dtype in self.floats else tensor

    def load(self, files, cast):
        raise NotImplementedError

    def load_part(self, files, cast):
        """The same of a rank's part of each tensor."""
        raise NotImplementedError

    def part(self, name, shape):
        return part_of(name, list(shape), self.spec["rank"], self.spec["ranks"])

    def join(self):
        """A process group of all ranks."""
        import torch.distributed
        torch.distributed.init_process_group("nccl" if self.cuda else "gloo", init_method="file://" + self.spec["group"],
                                             rank=self.spec["rank"], world_size=self.spec["ranks"])
        return torch.distributed.group.WORLD

    def wait(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def facts(self):
        """More about the last load, for the JSON."""
        return {}

    def checksums(self, result):
        """Name -> [dtype, shape, checksum]."""
        flat = [t.contiguous().reshape(-1).view(self.torch.uint8) for t in result.values()]
        sums = torch_checksums(self.torch, flat)
        return {name: [self.names[t.dtype], list(t.shape), s] for (name, t), s in zip(result.items(), sums)}

    def free(self, result):
        result.clear()


class Safetensors(Library):
    package = "safetensors"
    loads_parts = True

    def start(self):
        super().start()
        import safetensors.torch
        self.load_file, self.open = safetensors.torch.load_file, safetensors.safe_open

    def load(self, files, cast):
        target, tensors = self.target(cast), {}
        for path in files:
            part = self.load_file(path, device=self.device)
            for name in list(part):
                tensors[name] = self.cast(part.pop(name), target)
        return tensors

    def load_part(self, files, cast):
        target, tensors = self.target(cast), {}
        for path in files:
            with self.open(path, framework="pt", device=self.device) as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    cut = self.part(name, part.get_shape())
                    if cut is None:
                        tensor = file.get_tensor(name)
                    else:
                        tensor = part[cut[1]:cut[2]] if cut[0] == 0 else part[:, cut[1]:cut[2]]
                    tensors[name] = self.cast(tensor, target)
        return tensors

    def facts(self):
        if self.cuda or self.spec["cast"] or self.spec["ranks"]:
            return {}
        return {"note": "maps the files: nothing is read before it is touched"}


class Fastsafetensors(Library):
    package = "fastsafetensors"
    loads_parts = True

    def start(self):
        super().start()
        from fastsafetensors import SafeTensorsFileLoader
        self.loader = SafeTensorsFileLoader
        self.group = self.join() if self.spec["ranks"] else None

    def load(self, files, cast):
        target, threads = self.target(cast), self.threads or min(16, os.cpu_count())
        loader = self.loader(None, device=self.device, nogds=True, max_threads=threads)
        self.kept = [loader]
        loader.add_filenames({0: list(files)})
        buffers = loader.copy_files_to_device()
        self.kept.insert(0, buffers)
        return {name: self.cast(buffers.get_tensor(name), target) for name in loader.get_keys()}

    def load_part(self, files, cast):
        target, threads, ranks = self.target(cast), self.threads or min(16, os.cpu_count()), self.spec["ranks"]
        loader = self.loader(self.group, device=self.device, nogds=True, max_threads=threads)
        self.kept = [loader]
        loader.add_filenames({rank: list(files[rank::ranks]) for rank in range(ranks)})
        buffers = loader.copy_files_to_device()
        self.kept.insert(0, buffers)
        tensors = {}
        for name in sorted(loader.get_keys()):  # the same order on all ranks: these are collective
            cut = self.part(name, loader.get_shape(name))
            tensor = buffers.get_tensor(name) if cut is None else buffers.get_sharded(name, cut[0])
            tensors[name] = self.cast(tensor, target)
        return tensors

    def free(self, result):
        result.clear()
        for part in self.kept:
            part.close()
        self.kept = None


class FastsafetensorsBuffered(Fastsafetensors):
    env = {"FASTSAFETENSORS_ODIRECT": "0"}
    not_on = ("tmpfs",)


class InstantTensor(Library):
    package = "instanttensor"
    devices = ("cuda",)
    loads_parts = True

    def start(self):
        super().start()
        import instanttensor
        self.module, self.options = instanttensor, {}
        self.group = self.join() if self.spec["ranks"] else None

    def load_part(self, files, cast):
        target, tensors = self.target(cast), {}
        with self.module.safe_open(list(files), framework="pt", device=self.device, copy=False, process_group=self.group,
                                   **self.options) as file:
            for name, tensor in file.tensors():  # whole, in memory that is used again
                cut = self.part(name, tensor.shape)
                part = tensor if cut is None else tensor.narrow(cut[0], cut[1], cut[2] - cut[1])
                made = self.cast(part, target)
                tensors[name] = made.clone(memory_format=self.torch.contiguous_format) if made is part else made
        return tensors

    def load(self, files, cast):
        target, tensors = self.target(cast), {}
        # What is cast is consumed at once: no need for the library's own copy.
        with self.module.safe_open(list(files), framework="pt", device=self.device, copy=not cast, **self.options) as file:
            for name, tensor in file.tensors():
                made = self.cast(tensor, target)
                tensors[name] = made.clone() if cast and made is tensor else made
        return tensors


class InstantTensorBuffered(InstantTensor):
    not_on = ("tmpfs",)

    def start(self):
        super().start()
        self.options = {"backend": self.module.BackendPolicy.BUFFERED}


class Runai(Library):
    package = "runai-model-streamer"

    def start(self):
        super().start()
        from runai_model_streamer import SafetensorsStreamer
        self.streamer = SafetensorsStreamer

    def load(self, files, cast):
        target, tensors = self.target(cast), {}
        with self.streamer() as streamer:
            streamer.stream_files(list(files), device=self.device)
            for name, tensor in streamer.get_tensors():
                tensors[name] = self.cast(tensor, target)
        return tensors


class RunaiBuffered(Runai):
    env = {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}


class DeviceBytes:
    """Device memory that is not torch's, as torch takes it."""

    def __init__(self, address, nbytes):
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


class Fst(Library):
    """Ours, through ctypes. torch is there for the context and the checksums alone; the CPU device does without."""
    loads_parts = True

    def start(self):
        if self.cuda:
            super().start()
        else:
            try:
                super().start()
            except ImportError:
                pass
        sys.path.insert(0, os.path.join(HERE, os.pardir, "tests", "consumers"))
        import fst_ctypes
        self.api, self.types = fst_ctypes.Library(self.spec["lib"]), fst_ctypes
        self.api.dll.fst_version.restype = ctypes.c_char_p

    def version(self):
        return self.api.dll.fst_version().decode()

    def load_part(self, files, cast):
        class Options(self.types.Options):  # with what follows in fst.h
            _fields_ = [("reader", ctypes.c_int), ("cache", ctypes.c_int), ("others", ctypes.c_void_p * 6),
                        ("memory_bytes", ctypes.c_uint64), ("scale", ctypes.c_int), ("rank", ctypes.c_uint),
                        ("ranks", ctypes.c_uint), ("shards", ctypes.c_void_p), ("read", ctypes.c_int)]
        self.api.dll.fst_shard_rules.restype = ctypes.c_void_p
        return self.load_with(Options(rank=self.spec["rank"], ranks=self.spec["ranks"],
                                      shards=self.api.dll.fst_shard_rules()), files, cast)

    def load(self, files, cast):
        return self.load_with(self.types.Options(), files, cast)

    def load_with(self, options, files, cast):
        options.size, options.threads = ctypes.sizeof(options), self.threads
        options.device = self.types.device_gpu(int((self.device + ":0").split(":")[1])) if self.cuda else 1
        if cast:
            options.cast = self.api.dll.fst_dtype_from_name(cast.encode())
        paths = (ctypes.c_char_p * (len(files) + 1))(*[os.fsencode(path) for path in files])
        model = ctypes.c_void_p()
        self.api.check(self.api.dll.fst_load(paths, ctypes.byref(options), ctypes.byref(model), None))
        self.kept = self.stats(model)
        return model

    def stats(self, model):
        class Stats(ctypes.Structure):
            _fields_ = [("size", ctypes.c_size_t), ("bytes_read", ctypes.c_uint64), ("bytes_out", ctypes.c_uint64),
                        ("seconds", ctypes.c_double), ("device", ctypes.c_char_p), ("device_name", ctypes.c_char_p),
                        ("device_reason", ctypes.c_char_p), ("limit", ctypes.c_char_p),
                        ("peak_device_bytes", ctypes.c_uint64), ("pinned_bytes", ctypes.c_uint64),
                        ("threads", ctypes.c_uint), ("slots", ctypes.c_uint), ("slot_bytes", ctypes.c_size_t)]
        stats = Stats(size=ctypes.sizeof(Stats))
        self.api.dll.fst_model_stats.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.api.check(self.api.dll.fst_model_stats(model, ctypes.byref(stats)))
        return {"pinned_bytes": stats.pinned_bytes, "limit": stats.limit.decode(), "threads": stats.threads,
                "slots": stats.slots, "slot_bytes": stats.slot_bytes, "on": stats.device.decode()}

    def facts(self):
        return self.kept

    def bytes_of(self, tensor):
        if not tensor.nbytes:
            return b""
        if self.cuda:
            return self.torch.as_tensor(DeviceBytes(tensor.data, tensor.nbytes), device=self.device)
        return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data)).cast("B")

    def checksums(self, result):
        heads, data = [], []
        for i in range(self.api.dll.fst_model_count(result)):
            tensor = self.types.Tensor()
            self.api.check(self.api.dll.fst_model_at(result, i, ctypes.byref(tensor)))
            dtype = self.api.dll.fst_dtype_name(tensor.dtype).decode()
            heads.append((tensor.name.decode(), dtype, [tensor.shape[d] for d in range(tensor.ndim)]))
            data.append(self.bytes_of(tensor))
        if self.torch:
            u8 = self.torch.uint8
            data = [d if hasattr(d, "numel") else self.torch.frombuffer(d, dtype=u8) if len(d) else
                    self.torch.zeros(0, dtype=u8, device=self.device) for d in data]
            sums = torch_checksums(self.torch, data)
        else:
            sums = [plain_checksum(d) for d in data]
        return {name: [dtype, shape, s] for (name, dtype, shape), s in zip(heads, sums)}

    def free(self, result):
        self.api.dll.fst_model_free(result)


# ---- Ceilings: measured like libraries ----

class Reading(Library):
    """pread of all files: on a GPU machine into a ring of fst's shape, on the CPU into memory touched before."""
    fresh = direct = False

    def start(self):
        shape = self.spec.get("shape") or {}
        self.threads = shape.get("threads") or self.threads or min(12, os.cpu_count())
        self.chunk = max(shape.get("slot_bytes") or 4 * MIB, MIB)
        self.slots = max((shape.get("slots") or 0) // self.threads, 1) if shape else 2
        ring = self.chunk * self.slots * self.threads
        whole = sum((os.path.getsize(path) + 4095) // 4096 * 4096 for path in self.spec["files"])
        self.room = ring if self.cuda or self.direct else whole
        self.memory = None if self.fresh else self.touched()

    def touched(self):
        memory = mmap.mmap(-1, max(self.room, 1))
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1
        return memory

    def load(self, files, cast):
        memory = self.memory or mmap.mmap(-1, max(self.room, 1))
        view = memoryview(memory)

        def ring(thread, turn, _, size):
            at = (thread * self.slots + turn % self.slots) * self.chunk
            return view[at:at + size]

        def whole(_, __, position, size):
            return view[position:position + size]

        read_parallel(files, self.threads, self.chunk, ring if self.cuda or self.direct else whole, self.direct)
        view.release()
        return memory

    def wait(self):
        pass

    def checksums(self, result):
        return {}

    def free(self, result):
        if self.fresh:
            result.close()


class ReadingFresh(Reading):
    fresh = True
    devices = ("cpu",)


class ReadingDirect(Reading):
    direct = True


class HostToDevice(Library):
    """The best of 2, 4, 8, 16 MB pieces on 1, 2, 4 streams, from pinned memory."""
    devices = ("cuda",)

    def load(self, files, cast):
        torch, room, best = self.torch, 64 * MIB, 0.0
        if not self.kept:
            host = torch.empty(room, dtype=torch.uint8, pin_memory=True)
            self.kept = (host, torch.empty(room, dtype=torch.uint8, device=self.device))
        host, device = self.kept
        for piece in (2000000, 4000000, 8000000, 16000000):
            for count in (1, 2, 4):
                streams = [torch.cuda.Stream() for _ in range(count)]
                torch.cuda.synchronize()
                start, done = time.perf_counter(), 0
                for turn in range((1 << 30) // piece):
                    at = turn % (room // piece) * piece
                    with torch.cuda.stream(streams[turn % count]):
                        device[at:at + piece].copy_(host[at:at + piece], non_blocking=True)
                    done += piece
                torch.cuda.synchronize()
                best = max(best, done / (time.perf_counter() - start) / 1e9)
        self.rate = best
        return {}

    def checksums(self, result):
        return {}


LIBRARIES = {"fst": Fst, "safetensors": Safetensors, "fastsafetensors": Fastsafetensors,
             "fastsafetensors-buffered": FastsafetensorsBuffered, "instanttensor": InstantTensor,
             "instanttensor-buffered": InstantTensorBuffered, "runai": Runai, "runai-buffered": RunaiBuffered}
CEILINGS = {"reading": Reading, "reading fresh": ReadingFresh, "reading direct": ReadingDirect, "h2d": HostToDevice}


def more_libraries(path):
    """LIBRARIES of a Python file: name -> class, as here."""
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("peers_loaders", path))
    module.__spec__.loader.exec_module(module)
    return module.LIBRARIES


# ---- One measurement, in its own process ----

class Sampler:
    """The most device memory in use since the start, beyond what was in use then."""

    def __init__(self, torch, device):
        self.torch, self.device, self.process, self.quit = torch, device, None, threading.Event()
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--sample", f"GPU-{uuid}"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline().strip() == "ready":
            return
        self.process.communicate()
        self.process, self.base = None, self.used()
        self.most = self.base
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def used(self):
        free, total = self.torch.cuda.mem_get_info(self.device)
        return total - free

    def run(self):
        while not self.quit.wait(0.002):
            self.most = max(self.most, self.used())

    def stop(self):
        if self.process:
            return int(self.process.communicate()[0])
        self.quit.set()
        self.thread.join()
        return max(self.most, self.used()) - self.base


def run_sample(uuid):
    """Until standard input ends; prints the most that was in use beyond the start, in bytes."""
    class Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return
    device, memory = ctypes.c_void_p(), Memory()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)):
        return

    def used():
        return 0 if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) else memory.used

    base = most = used()
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    print("ready", flush=True)
    while not done.wait(0.001):
        most = max(most, used())
    print(max(most, used()) - base)


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def host_memory(key):
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def meet(spec, turn):
    """All ranks go on at once, to a millisecond."""
    def place(rank):
        return f"{spec['group']}-{turn}-{rank}"

    with open(place(spec["rank"]), "w", encoding="ascii"):
        pass
    while not all(os.path.exists(place(rank)) for rank in range(spec["ranks"])):
        time.sleep(0.0002)


def run_measurement(spec):
    classes = {**LIBRARIES, **CEILINGS, **(more_libraries(spec["loaders"]) if spec["loaders"] else {})}
    library = classes[spec["library"]](spec)
    files, cast, loads = spec["files"], spec["cast"], []
    load = library.load_part if spec["ranks"] else library.load
    library.start()
    sampler = Sampler(library.torch, spec["device"]) if library.cuda and library.torch else None
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # VmHWM starts again
    except OSError:
        pass
    resident = host_memory("VmRSS")
    for turn in range(1 + spec["warm"]):
        if spec["cold"]:
            drop_caches(files, spec["cold"])
        if spec["ranks"]:
            meet(spec, turn)
        cpu, start = cpu_seconds(), time.perf_counter()
        result = load(files, cast)
        library.wait()
        seconds = time.perf_counter() - start
        loads.append({"started": start, "seconds": seconds, "cpu_seconds": cpu_seconds() - cpu, "rate": library.rate})
        if turn < spec["warm"]:
            library.free(result)
            del result
            gc.collect()
    peak = sampler.stop() if sampler else None
    out = {"loads": loads, "peak_device_bytes": peak, "peak_host_bytes": max(host_memory("VmHWM") - resident, 0),
           "version": library.version(), **library.facts()}
    out["torch"] = library.torch.__version__ if library.torch else None
    out["gpu"] = library.torch.cuda.get_device_name(spec["device"]) if sampler else None
    out["checksums"] = library.checksums(result) if spec["check"] else None
    library.free(result)
    return out


def run_child(text):
    spec = json.loads(text)
    try:
        out = run_measurement(spec)
    except Exception as error:  # whatever a library raises is what the table says of it
        out = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
    with open(spec["out"], "w", encoding="utf-8") as file:
        json.dump(out, file)
    sys.stdout.flush()
    os._exit(0 if "error" not in out or not spec["ranks"] else 1)  # what was measured is written: a library that crashes on its way out does not matter


def together(outs):
    """What all ranks did, as one measurement."""
    loads = []
    for turn in zip(*(out["loads"] for out in outs)):
        begin, end = min(l["started"] for l in turn), max(l["started"] + l["seconds"] for l in turn)
        loads.append({"seconds": end - begin, "cpu_seconds": sum(l["cpu_seconds"] for l in turn), "rate": None})
    peaks = [out["peak_device_bytes"] for out in outs if out["peak_device_bytes"] is not None]
    sums = {f"{name} of rank {out['rank']}": s for out in outs for name, s in (out["checksums"] or {}).items()}
    return {**outs[0], "loads": loads, "peak_device_bytes": max(peaks) if peaks else None,
            "peak_host_bytes": max(out["peak_host_bytes"] for out in outs),
            "checksums": sums if outs[0]["checksums"] is not None else None}


# ---- All of them ----

class Session:
    def __init__(self, options):
        self.options, self.classes = options, dict(LIBRARIES)
        if options.loaders:
            self.classes.update(more_libraries(options.loaders))
        all_names = [n for n, c in self.classes.items() if not options.ranks or c.loads_parts]
        self.names = options.libraries.split(",") if options.libraries else all_names
        unknown = [name for name in self.names if name not in self.classes]
        if unknown:
            no_use(f"no library {unknown[0]}; there are: {', '.join(self.classes)}")
        self.measured, self.order, self.left_out, self.ceilings = {}, [], [], {}
        self.versions, self.facts, self.shape, self.sizes, self.gpus = {}, {}, None, {}, None
        self.suffix = f", {options.ranks} ranks" if options.ranks else ""
        self.scratch = tempfile.mkdtemp(prefix="fst-peers-")
        self.end = time.monotonic() + options.budget if options.budget else None

    def measure(self, name, case, files, cast, cold, check):
        o = self.options
        spec = {"library": name, "files": files, "cast": cast, "device": o.device, "threads": o.threads, "lib": o.lib,
                "warm": min(o.warm, 1) if cold else o.warm, "cold": cold, "check": check, "loaders": o.loaders,
                "shape": self.shape, "out": os.path.join(self.scratch, "out.json")}
        spec.update(ranks=0)
        cls = self.classes.get(name) or CEILINGS[name]
        if o.ranks and name not in CEILINGS:
            return self.measure_ranks(spec, cls)
        with open(os.path.join(self.scratch, "log"), "w+b") as log:
            child = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--child", json.dumps(spec)],
                                     stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **cls.env})
            try:
                status = child.wait(timeout=o.limit)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                return {"error": f"took longer than {o.limit:g} s"}
            except BaseException:
                child.kill()
                raise
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
        if status or not os.path.exists(spec["out"]):
            how = f"signal {-status}" if status < 0 else f"status {status}"
            return {"error": f"ended with {how}" + (f": {said[-1][:300]}" if said else "")}
        with open(spec["out"], encoding="utf-8") as file:
            out = json.load(file)
        os.unlink(spec["out"])
        return out

    def device_of(self, rank):
        """All GPUs in turns."""
        if self.options.device == "cpu":
            return "cpu"
        if self.gpus is None:
            done = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], capture_output=True,
                                  text=True, check=False)
            self.gpus = int(done.stdout) if done.returncode == 0 else 0
        return f"cuda:{rank % max(self.gpus, 1)}"

    def measure_ranks(self, spec, cls):
        """The same by processes that are ranks of one group."""
        if not cls.loads_parts:
            return {"error": "loads no parts"}
        folder = tempfile.mkdtemp(dir=self.scratch)
        children, outs = [], []
        end = time.monotonic() + self.options.limit
        try:
            for rank in range(self.options.ranks):
                mine = {**spec, "ranks": self.options.ranks, "rank": rank, "device": self.device_of(rank),
                        "group": os.path.join(folder, "group"), "out": os.path.join(folder, f"{rank}.json")}
                children.append(subprocess.Popen([sys.executable, os.path.abspath(__file__), "--child", json.dumps(mine)],
                                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                                 env={**os.environ, **cls.env}))
            while any(c.poll() is None for c in children) and not any(c.poll() for c in children) and time.monotonic() < end:
                time.sleep(0.01)
            late = time.monotonic() >= end
        finally:
            for child in children:  # the others would wait for one that failed
                child.kill()
                child.wait()
        for rank in range(self.options.ranks):
            path = os.path.join(folder, f"{rank}.json")
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    outs.append({**json.load(file), "rank": rank})
        shutil.rmtree(folder, ignore_errors=True)
        failed = next((o for o in outs if "error" in o), None)
        if failed:
            return {"error": f"rank {failed['rank']}: {failed['error']}"}
        if len(outs) < self.options.ranks:
            return {"error": f"took longer than {self.options.limit:g} s" if late else "a rank ended without a word"}
        return together(outs)

    def take(self, name, place, case, files, cast, cold, round_):
        """One measurement into `measured`, or why there is none."""
        if self.end and time.monotonic() > self.end:
            self.left_out.append({"library": name, "case": case, "round": round_ + 1})
            return
        runs = self.measured.setdefault((case, name), [])
        if any("error" in r for r in runs):
            return  # once is enough
        if cold is None and place == "page cache" and (cached_share(files) or 0) < 0.999:
            for path in files:
                with open(path, "rb", buffering=0) as file:
                    while file.read(16 * MIB):
                        pass
        checked = any(r.get("checksums") is not None for r in runs)
        out = self.measure(name, case, files, cast, cold, not checked)
        runs.append(out)
        if name == "fst" and "error" not in out:
            self.shape = {key: out[key] for key in ("threads", "slots", "slot_bytes")}
            self.facts.update(on=out["on"], gpu=out["gpu"])
        if "error" not in out:
            self.versions[name] = out["version"]
            if out["torch"]:
                self.versions["torch"] = out["torch"]
        shown = out.get("error") or ", ".join(f"{x['seconds']:.3f}" for x in out["loads"])
        note(f"round {round_ + 1}, {case}, {name}: {shown}")

    def ceiling(self, key, name, files, cold):
        if self.end and time.monotonic() > self.end:
            return
        out = self.measure(name, key, files, None, cold, False)
        if "error" in out:
            note(f"ceiling {key}: {out['error']}")
            return
        total = sum(os.path.getsize(path) for path in files)
        rates = [load["rate"] or total / load["seconds"] / 1e9 for load in out["loads"]]
        self.ceilings.setdefault(key, []).extend(rates[1:] or rates)

    def checkpoint(self, label, places, casts):
        """All rounds of one checkpoint; `places` are (place, files, cold)."""
        for round_ in range(self.options.rounds):
            for place, files, cold in places:
                self.sizes.update({f"{place} {label} {what}{self.suffix}": sum(map(os.path.getsize, files))
                                   for what in ["as is"] + [f"to {c}" for c in casts]})
                for cast in [None] + ([] if cold else casts):
                    case = f"{place} {label} " + (f"to {cast}" if cast else "as is") + self.suffix
                    if case not in self.order:
                        self.order.append(case)
                    at = round_ % len(self.names)
                    for name in self.names[at:] + self.names[:at]:
                        cls = self.classes[name]
                        if self.options.device.split(":")[0] not in cls.devices:
                            self.measured[case, name] = [{"error": f"has no {self.options.device} device"}]
                        elif place not in cls.not_on:
                            self.take(name, place, case, files, cast, cold, round_)
                self.place_ceilings(place, files, cold)

    def place_ceilings(self, place, files, cold):
        key = place.replace(" ", "_")
        if cold:
            self.ceiling("direct_gb_per_s", "reading direct", files, cold)
            return
        self.ceiling(f"{key}_gb_per_s", "reading", files, None)
        if self.options.device == "cpu":
            self.ceiling(f"{key}_fresh_gb_per_s", "reading fresh", files, None)
        else:
            self.ceiling("h2d_gb_per_s", "h2d", files, None)

    def all_checkpoints(self):
        o, labels = self.options, set()
        for path in o.paths:
            files = checkpoint_files(path)
            label = main_dtype(files)
            casts = CASTS.get(label, []) if o.casts is None else [c for c in o.casts if c != label]
            if label in labels:
                label = f"{label} {os.path.basename(os.path.normpath(path))}"
            labels.add(label)
            here = "tmpfs" if in_memory(files[0]) else "page cache"
            places = [(here, files, None)]
            if o.cold and here != "tmpfs":
                places.append(("cold", files, o.cold))
            with tempfile.TemporaryDirectory(prefix="fst-peers-", dir=o.tmpfs or self.scratch) as copy:
                if o.tmpfs and here != "tmpfs":
                    places.insert(1, ("tmpfs", [shutil.copy(f, copy) for f in files], None))
                self.checkpoint(label, places, casts)

    # ---- Reports ----

    def ceiling_of(self, case):
        if self.options.ranks:
            return None  # of as many links and threads as there are ranks: not measured here
        place = next(p for p in ("page cache", "tmpfs", "cold") if case.startswith(p))
        key = "direct_gb_per_s" if place == "cold" else f"{place.replace(' ', '_')}_gb_per_s"
        held = [statistics.median(self.ceilings[k]) for k in (key, "h2d_gb_per_s") if k in self.ceilings]
        return min(held) if key in self.ceilings else None

    def verdict(self, case, name):
        """Whether the bytes are the reference's: True, False with the difference, None with why it is not known."""
        def sums(who):
            return next((r["checksums"] for r in self.measured.get((case, who), []) if r.get("checksums") is not None), None)
        want, got = sums(self.options.reference), sums(name)
        if want is None or got is None:
            return None, f"not compared: no checksums of {self.options.reference if want is None else name}"
        wrong = [n for n in list(want) + [n for n in got if n not in want] if want.get(n) != got.get(n)]
        if not wrong:
            return True, None
        return False, f"{len(wrong)} of {len(want)} tensors differ from {self.options.reference}'s, the first is {wrong[0]}: " \
                      f"{got.get(wrong[0])} instead of {want.get(wrong[0])}"

    def run_of(self, case, name, first):
        outs = self.measured[case, name]
        out = {"library": name, "case": ("first " if first else "") + case, "seconds": None, "gb_per_s": None,
               "share_of_ceiling": None, "peak_device_bytes": None, "pinned_bytes": None, "cpu_seconds": None}
        failed = next((o["error"] for o in outs if "error" in o), None)
        if failed:
            return {**out, "error": failed}
        loads = [load for o in outs for load in (o["loads"][:1] if first else o["loads"][1:])]
        if not loads:
            return None
        seconds, ceiling = statistics.median(load["seconds"] for load in loads), self.ceiling_of(case)
        rate = self.sizes[case] / seconds / 1e9
        right, why = self.verdict(case, name)
        peaks = [o["peak_device_bytes"] for o in outs if o["peak_device_bytes"] is not None]
        out.update(seconds=round(seconds, 6), gb_per_s=digits(rate),
                   share_of_ceiling=digits(rate / ceiling) if ceiling else None,
                   peak_device_bytes=max(peaks) if peaks else None, pinned_bytes=outs[0].get("pinned_bytes"),
                   cpu_seconds=round(statistics.median(load["cpu_seconds"] for load in loads), 6),
                   peak_host_bytes=max(o["peak_host_bytes"] for o in outs), file_bytes=self.sizes[case],
                   all_seconds=[round(load["seconds"], 6) for load in loads], right=right)
        if outs[0].get("note"):
            out["share_of_ceiling"] = None
        for key, value in (("limit", outs[0].get("limit")), ("note", outs[0].get("note")), ("difference", why)):
            if value:
                out[key] = value
        return out

    def report(self):
        runs = [self.run_of(case, name, first) for case in self.order for name in self.names
                if self.measured.get((case, name)) for first in (True, False)]
        o = self.options
        return {"machine": machine(self.facts.get("gpu")), "device": self.facts.get("on") or o.device,
                "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": commit(),
                "versions": self.versions, "reference": o.reference, "rounds": o.rounds, "warm": o.warm,
                "threads": o.threads or None, "cold_by": o.cold, "ring": self.shape,
                "ceilings": {key: digits(statistics.median(rates)) for key, rates in self.ceilings.items()},
                "left_out": self.left_out, "runs": [run for run in runs if run]}


def machine(gpu):
    model = platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return (f"{gpu}, " if gpu else "") + f"{model}, {len(os.sched_getaffinity(0))} cores"


def commit():
    if os.environ.get("FST_COMMIT"):
        return os.environ["FST_COMMIT"]
    try:
        done = subprocess.run(["git", "-C", HERE, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True,
                              check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_json(out, path):
    rows = ",\n".join("    " + json.dumps(run) for run in out["runs"])
    text = json.dumps({**out, "runs": []}, indent=2).replace('"runs": []', f'"runs": [\n{rows}\n  ]')
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")


# ---- The table ----

def cell(name, case, runs, remarks):
    """GB/s warm (first), and ours divided by it."""
    run, first, ours = runs.get((name, case)), runs.get((name, "first " + case)), runs.get(("fst", case))
    run = run or first
    if not run:
        return "–"
    for key in ("error", "note", "difference"):
        if run.get(key):
            remarks.setdefault(f"{name}: {run[key]}", []).append(case)
    if "error" in run:
        return "fails"
    if "note" in run:
        return "reads nothing"
    text = f"{run['gb_per_s']:.2f}"
    if first and "error" not in first:
        text += f" ({first['gb_per_s']:.2f})"
    if name != "fst" and ours and ours.get("seconds"):
        text += f", {run['seconds'] / ours['seconds']:.2f}×"
    return text + {False: ", WRONG BYTES", None: ", not compared", True: ""}[run["right"]]


def table(outs):
    lines = []
    for out in outs:
        runs = {(run["library"], run["case"]): run for run in out["runs"]}
        names = list(dict.fromkeys(run["library"] for run in out["runs"]))
        cases = list(dict.fromkeys(run["case"].removeprefix("first ") for run in out["runs"]))
        remarks = {}
        if lines:
            lines.append("")
        lines += [f"{out['machine']}; {out['device']}; {out['date']}; {out['commit']}. GB/s of file bytes, warm (first "
                  "load), and how many times as fast fst is.", "",
                  "| library | " + " | ".join(cases) + " |", "|---|" + "---:|" * len(cases)]
        for name in names:
            version = out["versions"].get(name)
            head = f"{name} {version}" if version else name
            lines.append(f"| {head} | " + " | ".join(cell(name, case, runs, remarks) for case in cases) + " |")
        lines.append("")
        lines.append("Ceilings: " + ", ".join(f"{k.removesuffix('_gb_per_s').replace('_', ' ')} {v:.2f} GB/s"
                                              for k, v in out["ceilings"].items()) + ".")
        lines += [f"- {remark} ({', '.join(where)})" for remark, where in remarks.items()]
        lacking = {}
        for left in out["left_out"]:
            lacking.setdefault(left["case"], []).append(f"{left['library']} in round {left['round']}")
        lines += [f"- left out of {case}, no time: {', '.join(what)}" for case, what in lacking.items()]
    return "\n".join(lines)


def run_carry(directory):
    options = [word for p in PLATFORMS for word in ("--platform", p)]
    for wheel in WHEELS:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                               "--python-version", "3.12", "--implementation", "cp", *options, "-d", directory, wheel],
                              check=False)
        if done.returncode:
            note(f"pip has no {wheel}")
            return 1
    total = 0
    for name in sorted(n for n in os.listdir(directory) if n.endswith(".whl")):
        size = os.path.getsize(os.path.join(directory, name))
        total += size
        print(f"{size:>10,} {name}")
    print(f"{total:>10,} bytes")
    return 0


# ---- Arguments ----

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH")
    parser.add_argument("--device", default="cuda:0", help="cpu, cuda or cuda:N (default cuda:0)")
    parser.add_argument("--lib", default=os.path.join(HERE, os.pardir, "build", "release", "lib", "libfst.so"))
    parser.add_argument("--libraries", help=f"of {','.join(LIBRARIES)}; default all")
    parser.add_argument("--casts", help="to these dtypes, by commas; none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=3, help="loads after the first in each process")
    parser.add_argument("--tmpfs", metavar="DIR", help="also from a copy there")
    parser.add_argument("--cold", choices=("auto", "drop", "advise"), help="also with an empty page cache")
    parser.add_argument("--threads", type=int, default=0, help="of fst, torch and fastsafetensors; 0: as each chooses")
    parser.add_argument("--budget", type=float, default=0, help="seconds after which no measurement begins")
    parser.add_argument("--limit", type=float, default=180, help="seconds that one measurement may take")
    parser.add_argument("--reference", default="safetensors", help="whose bytes are right")
    parser.add_argument("--loaders", metavar="FILE.py", help="more libraries: its LIBRARIES, name -> class")
    parser.add_argument("--ranks", type=int, default=0, help="parts for tensor parallelism, by as many processes")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--carry", metavar="DIR")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    return parser.parse_args()


def check_arguments(o):
    if not o.paths:
        no_use("name a checkpoint, or --table with JSON files, or --carry DIR")
    if o.rounds < 1 or o.warm < 0 or o.threads < 0 or o.limit <= 0 or o.budget < 0:
        no_use("--rounds is at least 1, --limit more than 0, the others are not negative")
    if o.ranks < 0 or o.ranks > 64 or (o.ranks and o.cold):
        no_use("--ranks is at most 64, and goes without --cold: ranks would drop one another's files")
    o.device = "cuda:0" if o.device == "cuda" else o.device
    if o.device != "cpu" and not (o.device.startswith("cuda:") and o.device[5:].isdigit()):
        no_use(f"no device {o.device}: cpu, cuda or cuda:N")
    if o.casts is not None:
        o.casts = [c.upper() for c in o.casts.split(",") if c and c != "none"]
        for cast in o.casts:
            if cast not in FLOATS:
                no_use(f"no cast to {cast}: {', '.join(sorted(FLOATS))}")
    for path in o.paths:
        if not checkpoint_files(path):
            no_use(f"{path} is no .safetensors file, nor a directory with any")
    if o.tmpfs and not (os.path.isdir(o.tmpfs) and in_memory(o.tmpfs)):
        no_use(f"{o.tmpfs} is no directory in memory")
    if o.loaders and not os.path.isfile(o.loaders):
        no_use(f"there is no {o.loaders}")


def tables_of(paths):
    outs = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                outs.append(json.load(file))
        except (OSError, ValueError) as error:
            no_use(f"{path}: {error}")
    print(table(outs))


def main():
    options = arguments()
    if options.child:
        run_child(options.child)
    if options.sample:
        run_sample(options.sample)
        return 0
    if options.carry:
        return run_carry(options.carry)
    if options.table and options.paths and all(path.endswith(".json") for path in options.paths):
        tables_of(options.paths)
        return 0
    check_arguments(options)
    session = Session(options)
    try:
        session.all_checkpoints()
    finally:
        shutil.rmtree(session.scratch, ignore_errors=True)
    out = session.report()
    if options.json:
        write_json(out, options.json)
    if options.table or not options.json:
        print(table([out]))
    bad = [run for run in out["runs"] if run.get("right") is False or (run["library"] == "fst" and "error" in run)]
    for run in bad:
        note(f"{run['library']}, {run['case']}: {run.get('error') or run['difference']}")
    return 1 if bad or not any(run["seconds"] for run in out["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
