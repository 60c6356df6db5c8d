"""As much of fst.h and dlpack.h as the tests need, through ctypes."""
import ctypes
from ctypes import (CFUNCTYPE, POINTER, Structure, byref, c_char, c_char_p, c_double, c_int, c_int32, c_int64,
                    c_size_t, c_uint, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p, py_object)

DEVICE_CPU = 1


def device_gpu(index):
    return 2 + index


class Error(Structure):
    _fields_ = [("status", c_int), ("code", c_int), ("file", c_int), ("offset", c_int64),
                ("path", c_char * 256), ("text", c_char * 512)]


class Progress(Structure):
    _fields_ = [("bytes_done", c_uint64), ("bytes_total", c_uint64), ("seconds", c_double)]


class Options(Structure):
    _fields_ = [("size", c_size_t), ("cast", c_int), ("device", c_int), ("flags", c_uint),
                ("threads", c_uint), ("slot_bytes", c_size_t),
                ("progress", CFUNCTYPE(c_int, c_void_p, POINTER(Progress))), ("progress_arg", c_void_p),
                ("cancel", POINTER(c_int))]


class Tensor(Structure):
    _fields_ = [("name", c_char_p), ("dtype", c_int), ("stored_dtype", c_int), ("ndim", c_size_t),
                ("shape", POINTER(c_uint64)), ("data", c_void_p), ("nbytes", c_uint64), ("file", c_int),
                ("file_offset", c_uint64), ("file_nbytes", c_uint64), ("reserved", c_uint64 * 8)]


class DLTensor(Structure):
    _fields_ = [("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
                ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16), ("shape", POINTER(c_int64)),
                ("strides", POINTER(c_int64)), ("byte_offset", c_uint64)]


class DLManagedTensorVersioned(Structure):
    pass


Deleter = CFUNCTYPE(None, POINTER(DLManagedTensorVersioned))
DLManagedTensorVersioned._fields_ = [("major", c_uint32), ("minor", c_uint32), ("manager_ctx", c_void_p),
                                     ("deleter", Deleter), ("flags", c_uint64), ("dl_tensor", DLTensor)]


class FstError(Exception):
    def __init__(self, name, text):
        super().__init__(f"{name}: {text}")
        self.name = name


class Library:
    def __init__(self, path):
        self.dll = dll = ctypes.CDLL(path)
        for name, result, arguments in (
                ("fst_last_error", POINTER(Error), []),
                ("fst_status_name", c_char_p, [c_int]),
                ("fst_dtype_name", c_char_p, [c_int]),
                ("fst_dtype_from_name", c_int, [c_char_p]),
                ("fst_load", c_int, [POINTER(c_char_p), POINTER(Options), POINTER(c_void_p), POINTER(Error)]),
                ("fst_open", c_int, [POINTER(c_char_p), POINTER(Options), POINTER(c_void_p), POINTER(Error)]),
                ("fst_model_free", None, [c_void_p]),
                ("fst_model_count", c_size_t, [c_void_p]),
                ("fst_model_at", c_int, [c_void_p, c_size_t, POINTER(Tensor)]),
                ("fst_model_dlpack", c_int, [c_void_p, c_size_t, POINTER(POINTER(DLManagedTensorVersioned))]),
                ("fst_release_cached", None, [])):
            function = getattr(dll, name)
            function.restype, function.argtypes = result, arguments

    def check(self, status):
        if status:
            text = self.dll.fst_last_error().contents.text.decode()
            raise FstError(self.dll.fst_status_name(status).decode(), text)

    def open(self, *paths):
        return Model(self, self.dll.fst_open, paths, Options(size=ctypes.sizeof(Options)))

    def load(self, *paths, device=DEVICE_CPU, cast=None):
        options = Options(size=ctypes.sizeof(Options), device=device)
        if cast:
            options.cast = self.dll.fst_dtype_from_name(cast.encode())
        return Model(self, self.dll.fst_load, paths, options)


class Model:
    def __init__(self, library, call, paths, options):
        self.library = library
        self.handle = c_void_p()
        files = (c_char_p * (len(paths) + 1))(*[str(path).encode() for path in paths])
        library.check(call(files, byref(options), byref(self.handle), None))
        self.index = {}
        for i in range(library.dll.fst_model_count(self.handle)):
            self.index[self.at(i).name.decode()] = i

    def at(self, i):
        tensor = Tensor()
        self.library.check(self.library.dll.fst_model_at(self.handle, i, byref(tensor)))
        return tensor

    def find(self, name):
        return self.at(self.index[name])

    def export(self, name):
        managed = POINTER(DLManagedTensorVersioned)()
        status = self.library.dll.fst_model_dlpack(self.handle, self.index[name], byref(managed))
        self.library.check(status)
        return Export(managed)

    def free(self):
        self.library.dll.fst_model_free(self.handle)
        self.handle = None


# ---- Capsules ------------------------------------------------------------------------------------

NAME = b"dltensor_versioned"  # a capsule keeps the pointer alone: this must stay

new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = py_object, [c_void_p, c_char_p, c_void_p]
capsule_valid = ctypes.pythonapi.PyCapsule_IsValid
capsule_valid.restype, capsule_valid.argtypes = c_int, [c_void_p, c_char_p]
capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype, capsule_pointer.argtypes = c_void_p, [c_void_p, c_char_p]


class Export:
    """A tensor on its way to one consumer. `deleted` counts the calls of its deleter.

    The capsule has no destructor: in Python one would run while the consumer's exception is pending. So
    `close` is for what nobody consumed."""

    _deleters = []  # consumers may hold these to the end of the process

    def __init__(self, managed):
        self.managed = managed
        self.capsule = new_capsule(ctypes.cast(managed, c_void_p), NAME, None)
        tensor = managed.contents.dl_tensor
        self.device = tensor.device_type, tensor.device_id
        self.deleted = counter = [0]
        original = Deleter(ctypes.cast(managed.contents.deleter, c_void_p).value)

        def counting(it):
            counter[0] += 1
            original(it)

        managed.contents.deleter = Deleter(counting)
        Export._deleters.append(managed.contents.deleter)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        # `stream` needs nothing: the data is ready.
        if max_version is None or max_version[0] < 1:
            raise BufferError("only DLPack 1.x and later")
        if copy or dl_device not in (None, self.device):
            raise BufferError("only as it is, where it is")
        return self.capsule

    def close(self):
        """Deletes the tensor if no consumer took it: a consumer gives the capsule another name."""
        if capsule_valid(id(self.capsule), NAME):
            self.managed.contents.deleter(self.managed)
            self.capsule = None


def read_capsule(capsule):
    """The managed tensor in a capsule, still the capsule's."""
    return ctypes.cast(capsule_pointer(id(capsule), NAME), POINTER(DLManagedTensorVersioned)).contents
