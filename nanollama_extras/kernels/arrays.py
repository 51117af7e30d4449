"""Buffers and views by NumPy, so that a model on native kernels runs without importing torch.

The native backend computes in C, and asks torch for memory and for views of it. `torch` and `F` of
this module have that much of torch's names. They stand where a module of nanollama says `torch`,
until something reads another name of torch's, or a Tensor's: then torch is imported, takes their
place everywhere, and gets Tensors made here as its own, in the same memory. So a model can do all
that it could with torch; only the import (a second, 200 MB) waits until there is a use for it.
On a busy machine, the threads of a torch that is imported later do not spin.

Seam       `LazyModule` of nanollama.py takes `stand_in`, and an LLM calls `settle`, which decides
           before anything is loaded. Where torch is imported already, torch is used.
Imports    kernels.native, in `settle` alone; modules that a model's family names.
Remove     delete this file and `arrays` in kernels.native, kernels.fine, kernels.floats and
           files.gguf_blocks, which import torch instead.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import nanollama
from nanollama import ExtraError, KernelError, PackageError, extra, library, preferred


def numpy_of_one_thread() -> Any:
    """NumPy, whose OpenBLAS gets no threads: kernels do the products, and idle threads spin for
    milliseconds. Raises PackageError."""
    name = "OPENBLAS_NUM_THREADS"
    given = os.environ.get(name)
    os.environ.setdefault(name, "1")
    try:
        return library("numpy")
    finally:
        if given is None:  # torch may have an OpenBLAS, too, which needs its threads
            del os.environ[name]


if TYPE_CHECKING:
    import numpy as np

    from nanollama import Checkpoint, EngineConfig
else:
    np = numpy_of_one_thread()

ALIGNMENT = 64  # bytes: a register, and a line of the processor's cache; as torch's memory
# Files that drivers of accelerators make; torch alone knows whether it can use one.
GPU_FILES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")


class Dtype:
    """A type of numbers."""

    def __init__(self, name: str, storage: str = "") -> None:
        self.name, self.storage = name, np.dtype(storage or name)
        self.itemsize = self.storage.itemsize
        self.is_floating_point = "float" in name

    def __repr__(self) -> str:
        return f"torch.{self.name}"

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)  # also of torch's

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def now(self) -> Any:
        """torch's dtype, if torch is imported; else this one"""
        return getattr(library("torch"), self.name) if "torch" in sys.modules else self


NAMES = "float64 float32 float16 int64 int32 int16 int8 uint8 bool"
DTYPES = {name: Dtype(name) for name in NAMES.split()}
OF_STORAGE = {dtype.storage: dtype for dtype in DTYPES.values()}
DTYPES["bfloat16"] = BFLOAT16 = Dtype("bfloat16", "uint16")  # which NumPy does not have
FLOAT32, INT64, UINT8 = (DTYPES[name] for name in ("float32", "int64", "uint8"))


def own_dtype(dtype: Any) -> Dtype:
    """The Dtype of a dtype, which may be torch's."""
    return dtype if isinstance(dtype, Dtype) else DTYPES[str(dtype).removeprefix("torch.")]


class Device(str):
    """The CPU; torch takes it as the name of a device."""

    __slots__ = ()
    type = property(str)
    index: Any = None


CPU = Device("cpu")
_only_kernels = threading.local()


def computes() -> None:
    """Raises KernelError in a block of `only_kernels`."""
    if getattr(_only_kernels, "is_on", False):
        raise KernelError("an operation on arrays is not a native kernel")


class Tensor:
    """A NumPy array with the part of torch.Tensor's interface that needs no arithmetic."""

    __slots__ = ("__weakref__", "array", "kind", "pointer")

    def __init__(self, array: Any, kind: Dtype | None = None) -> None:
        self.array, self.kind, self.pointer = array, kind or OF_STORAGE[array.dtype], 0

    # ---- torch ----

    def real(self) -> Any:
        """torch's tensor in the same memory. Imports torch."""
        computes()
        torch = import_torch()
        if self.kind is BFLOAT16:
            return torch.from_numpy(self.array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self.array)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Called by torch's functions that get such a Tensor."""
        return function(*real_of(args), **real_of(kwargs or {}))

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        array = self.float().array if self.kind is BFLOAT16 else self.array
        return array if dtype is None else array.astype(dtype)

    # ---- size and place ----

    dtype = property(lambda self: self.kind.now)
    device = CPU
    shape = property(lambda self: self.array.shape)
    nbytes = property(lambda self: self.array.nbytes)

    def size(self, dim: int) -> int:
        return int(self.array.shape[dim])

    def dim(self) -> int:
        return int(self.array.ndim)

    def numel(self) -> int:
        return int(self.array.size)

    def __len__(self) -> int:
        return len(self.array)

    def data_ptr(self) -> int:
        """The address of the first element"""
        if not self.pointer:
            self.pointer = self.array.__array_interface__["data"][0]
        return self.pointer

    def is_contiguous(self) -> bool:
        return bool(self.array.flags.c_contiguous)

    def is_floating_point(self) -> bool:
        return self.kind.is_floating_point

    # ---- views ----

    def __getitem__(self, index: Any) -> Tensor:
        index = plain_index(index)
        if isinstance(index, np.ndarray):
            computes()
        return Tensor(np.asarray(self.array[index]), self.kind)

    def view(self, *shape: Any) -> Tensor:
        if isinstance(shape[0], int | tuple | list):
            return self.reshape(*shape)
        kind = own_dtype(shape[0])
        return Tensor(self.array.view(kind.storage), kind)

    def reshape(self, *shape: Any) -> Tensor:
        return Tensor(self.array.reshape(sizes(shape)), self.kind)

    def flatten(self, start: int = 0, end: int = -1) -> Tensor:
        shape = self.array.shape
        end %= max(len(shape), 1)
        return self.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])

    def unsqueeze(self, dim: int) -> Tensor:
        return Tensor(np.expand_dims(self.array, dim), self.kind)

    def numpy(self) -> Any:
        return self.array if self.kind is not BFLOAT16 else self.real().numpy()

    def cpu(self) -> Tensor:
        return self

    # ---- copies ----

    def __setitem__(self, index: Any, value: Any) -> None:
        computes()
        own = isinstance(value, Tensor) and value.kind is self.kind  # the same bits
        self.array[plain_index(index)] = value.array if own else np.asarray(value)

    def copy_(self, other: Any) -> Tensor:
        self[...] = other
        return self

    def contiguous(self) -> Tensor:
        return self if self.array.flags.c_contiguous else self.clone()

    def clone(self) -> Tensor:
        return copied(self.array, self.kind)

    def to(self, *targets: Any, device: Any = None, dtype: Any = None) -> Tensor:
        """As torch's, with a dtype or the CPU, in any order"""
        for target in (*targets, device, dtype):
            if target is not None and not isinstance(target, str) and not hasattr(target, "type"):
                return self.cast(own_dtype(target))
        return self

    def float(self) -> Tensor:
        return self.cast(FLOAT32)

    def cast(self, kind: Dtype) -> Tensor:
        if kind is self.kind:
            return self
        array = self.array
        if self.kind is BFLOAT16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if kind is BFLOAT16:  # rounded to even, and NaN stays NaN
            array = np.asarray(array, np.float32)
            bits = array.view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            array = np.where(np.isnan(array), 0x7FC0, rounded)
        return copied(array, kind)

    def calculated(self, function: Callable[[Any, Any], Any], other: Any, swaps: bool) -> Any:
        """function(self, other) of numbers in float32; of others by torch"""
        is_own = isinstance(other, Tensor)
        if not is_own and hasattr(other, "__torch_function__"):
            return NotImplemented
        is_plain = isinstance(other, int | float) or (is_own and other.kind is FLOAT32)
        if self.kind is not FLOAT32 or not is_plain:
            pair = (other, self.real()) if swaps else (self.real(), other)
            return function(*real_of(pair))
        computes()
        pair = (self.array, other.array if is_own else np.float32(other))
        return Tensor(function(*(pair[::-1] if swaps else pair)))

    def __add__(self, other: Any) -> Any:
        return self.calculated(operator.add, other, False)

    def __sub__(self, other: Any) -> Any:
        return self.calculated(operator.sub, other, False)

    def __mul__(self, other: Any) -> Any:
        return self.calculated(operator.mul, other, False)

    def __truediv__(self, other: Any) -> Any:
        return self.calculated(operator.truediv, other, False)

    def __radd__(self, other: Any) -> Any:
        return self.calculated(operator.add, other, True)

    def __rsub__(self, other: Any) -> Any:
        return self.calculated(operator.sub, other, True)

    def __rmul__(self, other: Any) -> Any:
        return self.calculated(operator.mul, other, True)

    def __rtruediv__(self, other: Any) -> Any:
        return self.calculated(operator.truediv, other, True)

    def clamp(self, low: Any, high: Any) -> Tensor:
        computes()
        return Tensor(np.clip(self.array, low, high), self.kind)


def plain_index(index: Any) -> Any:
    """An index with arrays for tensors, also torch's"""
    if isinstance(index, tuple):
        return tuple(map(plain_index, index))
    return np.asarray(index) if hasattr(index, "__torch_function__") else index


def real_of(value: Any) -> Any:
    """`value` with torch's tensors and dtypes for those of this module, also in a list or dict"""
    if isinstance(value, Tensor):
        return value.real()
    if isinstance(value, Dtype):
        return getattr(import_torch(), value.name)
    if isinstance(value, list | tuple):
        made = [real_of(each) for each in value]
        return made if isinstance(value, list) else tuple(made)
    return {k: real_of(v) for k, v in value.items()} if isinstance(value, dict) else value


# ---- functions -----------------------------------------------------------------------------------


def sizes(shape: Any) -> Any:
    """The shape in `2, 3` or `(2, 3)`"""
    return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape


def new(make: Callable[..., Any], shape: Any, dtype: Any) -> Tensor:
    """A Tensor in memory that np.empty or np.zeros makes."""
    kind = own_dtype(dtype)
    memory = make(math.prod(shape) * kind.itemsize + ALIGNMENT - 1, np.uint8)
    address = memory.__array_interface__["data"][0]
    at = -address % ALIGNMENT
    made = Tensor(np.ndarray(shape, kind.storage, memory, at), kind)
    made.pointer = address + at
    return made


def empty(*shape: Any, dtype: Any = FLOAT32, device: Any = None) -> Any:
    if make := getattr(_only_kernels, "empty", None):
        return make(*shape, dtype=dtype)
    return new(np.empty, sizes(shape), dtype)


def zeros(*shape: Any, dtype: Any = FLOAT32, device: Any = None) -> Tensor:
    return new(np.zeros, sizes(shape), dtype)


def full(shape: Any, value: Any, dtype: Any = FLOAT32, device: Any = None) -> Tensor:
    made = empty(*shape, dtype=dtype)
    made.array[...] = value
    return made


def copied(array: Any, kind: Dtype) -> Tensor:
    computes()
    made = empty(*array.shape, dtype=kind)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity, as torch has it
        made.array[...] = array
    return made


def empty_like(x: Tensor) -> Tensor:
    return empty(*x.shape, dtype=x.kind)


def tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
    """As torch's. A Batch begins here, so where torch was imported meanwhile, it takes over now and
    not in the middle of a step: it would take these Tensors, as an index, for lists of numbers."""
    if "torch" in sys.modules:
        return import_torch().tensor(data, dtype=real_of(dtype), device=device)
    array = np.asarray(data)
    if dtype is None:
        kind = FLOAT32 if array.dtype.kind == "f" or not array.size else OF_STORAGE[array.dtype]
        return copied(array, kind)
    return copied(array, own_dtype(dtype))


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    """`data` itself where it is an array of that type."""
    x = data if isinstance(data, Tensor) else from_numpy(np.asarray(data))
    return x if dtype is None else x.cast(own_dtype(dtype))


def from_numpy(array: Any) -> Tensor:
    return Tensor(np.asarray(array))


def frombuffer(buffer: Any, dtype: Any) -> Tensor:
    kind = own_dtype(dtype)
    return Tensor(np.frombuffer(buffer, kind.storage), kind)


def arange(*extent: int, dtype: Any = INT64, device: Any = None) -> Tensor:
    return copied(np.arange(*extent), own_dtype(dtype))


def split(x: Tensor, parts: Sequence[int]) -> list[Tensor]:
    if len(parts) == 1:  # after a step of one sequence, when caches hold weights, each call counts
        return [x]
    return [x[end - size : end] for end, size in zip(itertools.accumulate(parts), parts)]


def equal(a: Tensor, b: Tensor) -> bool:
    return bool(np.array_equal(a.array, b.array))


def pad(x: Any, widths: Sequence[int], mode: str = "constant", value: float = 0) -> Any:
    """As torch.nn.functional.pad: `widths` begins with the last dimension."""
    if mode != "constant" or min(widths) < 0 or not isinstance(x, Tensor):
        return library("torch.nn.functional").pad(real_of(x), widths, mode, value)
    computes()
    pairs = list(zip(widths[::2], widths[1::2]))[::-1]
    pairs = [(0, 0)] * (x.dim() - len(pairs)) + pairs
    shape = [before + n + after for n, (before, after) in zip(x.shape, pairs)]
    made = full(shape, value, x.kind) if value else zeros(*shape, dtype=x.kind)
    made.array[tuple(slice(at, at + n) for n, (at, _) in zip(x.shape, pairs))] = x.array
    return made


def longer(strip: Any, capacity: int) -> Any:
    """A strip with zeros up to `capacity`. The system gives their memory when it is written."""
    shape = (*strip.shape[:3], capacity, strip.shape[4])
    memory = np.zeros(math.prod(shape) + 63, np.uint8)
    start = -memory.ctypes.data % 64  # the first byte of a cache line
    new = torch.from_numpy(memory[start : start + math.prod(shape)]).view(shape)
    new[:, :, :, : strip.shape[3]] = strip
    return new


# ---- threads -------------------------------------------------------------------------------------


class Threads:
    """How many kernels run on"""

    count = 0  # until `get_num_threads`
    is_given = False  # by the option of the latest model


def set_num_threads(count: int) -> None:
    Threads.count = count


def get_num_threads() -> int:
    Threads.count = Threads.count or default_threads()
    return Threads.count


def from_environment() -> int:
    """The number of threads in the environment's variables; 0 for none."""
    given = (os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    return next((int(count) for count in given if count.isdecimal() and int(count)), 0)


def default_threads() -> int:
    """As many as torch's: OMP_NUM_THREADS, or the cores that this program may use, of which two
    hyperthreads are one."""
    if count := from_environment():
        return count
    if not hasattr(os, "sched_getaffinity"):  # not there on macOS and Windows
        return os.cpu_count() or 1
    usable, cores = os.sched_getaffinity(0), set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            return len(usable)
    return max(1, len(cores))


# ---- in torch's place ----------------------------------------------------------------------------


class StandIn:
    """Some names of a module. Reading another one imports torch."""

    def __init__(self, path: str, **names: Any) -> None:
        self.path = path
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        import_torch()
        return getattr(library(self.path), name)


def may_have_gpu() -> bool:
    """Whether torch must say which devices there are."""
    is_linux = sys.platform == "linux"
    return not is_linux or any(next(Path("/dev").glob(name), None) for name in GPU_FILES)


TORCH_NAMES: dict[str, Any] = {
    **DTYPES,
    **{f.__name__: f for f in (empty, zeros, full, empty_like, tensor, as_tensor, from_numpy)},
    **{f.__name__: f for f in (arange, frombuffer, split, equal, set_num_threads, get_num_threads)},
    "device": Device,
    "inference_mode": contextlib.nullcontext,
}
if not may_have_gpu():
    mps = SimpleNamespace(is_available=lambda: False)
    TORCH_NAMES |= {"backends": SimpleNamespace(mps=mps)}
    TORCH_NAMES |= {"cuda": SimpleNamespace(device_count=lambda: 0)}
STAND_INS = {
    "torch": StandIn("torch", **TORCH_NAMES),
    "torch.nn.functional": StandIn("torch.nn.functional", pad=pad),
}


# Torch's threads spin before they sleep; not so where others use half the cores.
with contextlib.suppress(OSError, IndexError, ValueError):
    _others = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
    if 2 * _others >= (os.cpu_count() or 1) and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "0")


def stand_in(path: str) -> Any:
    """What stands in for the module `path` of torch; the module itself once torch is imported."""
    return library(path) if "torch" in sys.modules else STAND_INS[path]


torch: Any = stand_in("torch")
F: Any = stand_in("torch.nn.functional")


def import_torch() -> Any:
    """Import torch, and put it in the place of its stand-ins in all modules of nanollama."""
    torch = library("torch")
    if F is not STAND_INS["torch.nn.functional"]:
        return torch
    if Threads.count:
        torch.set_num_threads(Threads.count)
    modules = [m for name, m in sys.modules.copy().items() if name.startswith("nanollama")]
    for path, own in STAND_INS.items():
        for module in modules:
            for name, value in vars(module).copy().items():
                if value is own:
                    setattr(module, name, library(path))
    return torch


@contextlib.contextmanager
def only_kernels(empty: Any = None) -> Iterator[None]:
    """Raises KernelError where the block computes anything by other means than native kernels.
    `empty` stands for torch's own."""
    _only_kernels.is_on, _only_kernels.empty = True, empty and outside(empty)
    try:
        with torch_watch() if "torch" in sys.modules else contextlib.nullcontext():
            yield
    finally:
        _only_kernels.is_on, _only_kernels.empty = False, None


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as if called outside of `only_kernels`"""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = vars(_only_kernels).copy()
        _only_kernels.is_on, _only_kernels.empty = False, None
        try:
            return function(*args, **kwargs)
        finally:
            vars(_only_kernels).update(before)

    return call


# functions that look at a tensor, or at a part of it, without computing anything
HARMLESS = tuple("__get__ __getitem__ __len__ contiguous data_ptr float numel size".split())


def torch_watch() -> Any:
    """`only_kernels` for torch's functions."""
    import torch

    def address(x: Any) -> int:
        return int(x.untyped_storage().data_ptr())

    class Watch(torch.overrides.TorchFunctionMode):  # a TorchDispatchMode imports for a second
        def __torch_function__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            own = _only_kernels.empty if op is torch.empty else None
            result = (own or op)(*args, **kwargs or {})
            is_harmless = op is torch.empty or op.__name__ in HARMLESS
            if is_harmless and isinstance(result, torch.Tensor) and op is not torch.empty:
                is_harmless = address(result) == address(args[0])  # a view
            if not is_harmless:
                raise KernelError(f"{op.__name__} is not a native kernel")
            return result

    return Watch()


# ---- the decision --------------------------------------------------------------------------------


def is_awaited() -> bool:
    """Whether a module, such as that of the command that runs, will import torch."""
    extras = (m for name, m in sys.modules.copy().items() if name.startswith("nanollama_extras"))
    return any(isinstance(vars(m).get("torch"), nanollama.LazyModule) for m in extras if m)


def settle(checkpoint: Checkpoint, config: EngineConfig, adapter: Any) -> None:
    """Import torch for a model that needs it, before anything is loaded: an option, a width that
    the kernels do not have, or a module of its family, which imports torch. Note whether the
    number of threads is given."""
    Threads.is_given = config.threads is not None
    own, row = checkpoint.config, nanollama.find_family(checkpoint.config.model_type)
    options = adapter or config.quantize or config.kernels == "torch"
    has_own = nanollama.BACKENDS["cpu"] != "kernels.native"
    has_vision = preferred("models.vision", "has_vision", lambda _: False)(checkpoint)
    needs_torch = options or has_own or has_vision or own.head_dim % 16 or own.n_embd % 16
    try:
        if not needs_torch:
            extra("kernels.native", "fast arithmetic").load_kernels()
            modules = [row.decoder.partition(":")[0], "models.layers" if own.norm != "rms" else ""]
            for path in filter(None, modules):
                extra(path, own.model_type)
    except (ExtraError, KernelError, PackageError, OSError, AttributeError):
        needs_torch = True  # which says what is missing
    if needs_torch or is_awaited() or "torch" in sys.modules:
        import_torch()
