"""The CPU backend: packed weights, norms, attention and mixtures of experts by kernels in C.

Seam: `Backend` of nanollama.py. `pick_backend` calls `make_backend` here for models on the CPU.
native.c is compiled once for the machine it runs on; the library stays in nanollama's cache.
Memory is that of kernels.arrays, which is torch's once torch is imported.
To remove the feature, delete native.py and native.c: models then run on torch's own operations.

A PackedLinear's rows, 16 at a time, become blocks that the kernels read from front to back:

  block   [ 16 rows x one group of columns | 16 scales | 16 offsets, if any ]    float16 scales

  4 bits  word i of row r holds columns 4i .. 4i+3 in its low nibbles, and half a group on in its
          high ones; 8 bits: columns 4i .. 4i+3, 128 added

          [ row 0 word 0 | row 1 word 0 | .. | row 15 word 0 ]  64 bytes: one vector register,
          [ row 0 word 1 | row 1 word 1 | .. | row 15 word 1 ]  a lane for each row

Weights with blocks of their own, as those of kernels.fine, have `layout` and `fill`.

One instruction multiplies 16 rows by 4 activations, which are int8 with a scale for each group of
32 and the same for all lanes, so no sum ever runs across lanes. A token's arithmetic is the same
whatever else is in the call: tiles only repeat it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nanollama import (
    KV_BLOCK,
    ROW_TILE,
    Backend,
    Batch,
    KernelError,
    KVCache,
    MoE,
    Norm,
    PackedLinear,
    Projection,
    Rotation,
    cache_root,
    first_line,
    log,
    operand,
    preferred,
    round_up,
)
from nanollama_extras.kernels.arrays import FLOAT32, F, longer, only_kernels, torch

if TYPE_CHECKING:
    from torch import Tensor

    from nanollama import Attention, Decoder, DecodeSteps, ModelConfig

SOURCE = Path(__file__).with_name("native.c").read_text(encoding="utf-8")
THIS_CPU = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
KERNEL_FLAGS = ("-O3", "-ffp-contract=off", "-fPIC", "-shared", THIS_CPU)
BLOCK_ROWS = 16
LOAD_WEIGHTS = 1 << 19  # weights repacked at a time

# ---- the C interface -----------------------------------------------------------------------------
#
#   native.c declares the structures that its kernels take; their ctypes twins are made from those
#   declarations, and calls name each field. When the library is compiled, the sizes and offsets
#   that ctypes computes are asserted in C.

C_TYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float}


def c_fields(declarations: str) -> list[tuple[str, Any]]:
    """`const float *x, eps;` -> [("x", c_void_p), ("eps", c_float)]"""
    fields: list[tuple[str, Any]] = []
    for declaration in filter(None, map(str.strip, declarations.split(";"))):
        kind, names = declaration.removeprefix("const ").split(maxsplit=1)
        for name in names.split(","):
            word = name.split("*")[-1].strip()
            fields.append((word, ctypes.c_void_p if "*" in name else C_TYPES[kind]))
    return fields


def read_structures(source: str) -> dict[str, Any]:
    """A ctypes twin for each `typedef struct { .. } NAME;` of numbers and pointers. With __slots__,
    an unknown keyword is an error."""
    plain = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    return {
        name: type(name, (ctypes.Structure,), {"_fields_": c_fields(declarations), "__slots__": ()})
        for declarations, name in re.findall(r"typedef struct \{([^{}[\]]*)\} (\w+);", plain)
    }


def read_numbers(source: str) -> dict[str, int]:
    """The value of each name in `enum { .. }`"""
    lists = re.findall(r"enum \{([^{}]*)\}", source)
    return {name.strip(): i for names in lists for i, name in enumerate(names.split(","))}


STRUCTURES, NUMBERS = read_structures(SOURCE), read_numbers(SOURCE)
KERNELS = tuple(name.removesuffix("_call") for name in STRUCTURES if name.endswith("_call"))


def layout_assertions() -> str:
    """C that does not compile unless it lays out its structures as ctypes does."""
    lines = ["\n#include <stddef.h>"]
    for name, twin in STRUCTURES.items():
        sizes = {f"sizeof({name})": ctypes.sizeof(twin)}
        sizes |= {
            f"offsetof({name}, {field})": getattr(twin, field).offset for field, _ in twin._fields_
        }
        lines += [f'_Static_assert({c} == {size}, "{c}");' for c, size in sizes.items()]
    return "\n".join(lines) + "\n"


# ---- compiling and loading -----------------------------------------------------------------------


def cpu_features() -> str:
    """The lines of /proc/cpuinfo that `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    words = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(words)}))


COMPILES = "compiling the kernels for this CPU; the next start finds them"


def find_compiler() -> str:
    """The system's C compiler. Raises KernelError."""
    names = (os.environ.get("CC", ""), "gcc", "cc", "clang")
    for path in filter(None, map(shutil.which, filter(None, names))):
        return path
    raise KernelError("no C compiler was found (the environment's CC, gcc, cc or clang)")


def compile_kernels(target: Path, flags: tuple[str, ...], source: str | None = None) -> None:
    """C -> a shared library. Raises KernelError with the compiler's first error, and OSError where
    the folder cannot be written."""
    compiler = find_compiler()
    c_file = target.with_suffix(".c")
    c_file.write_text(source or SOURCE + layout_assertions(), encoding="utf-8")
    command = (compiler, *flags, "-w", str(c_file), "-o", str(target), "-lm", "-lpthread")
    environment = {**os.environ, "TMPDIR": str(target.parent)}
    try:
        with preferred("commands.status", "activity", contextlib.nullcontext)(COMPILES):
            ran = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=300,
                env=environment,
                errors="replace",
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{compiler} does not run: {first_line(error)}") from None
    if ran.returncode:
        if full := re.search("No space left|quota exceeded|Read-only file system", ran.stderr):
            raise OSError(f"{target.parent}: {full[0]}")
        errors = [line for line in ran.stderr.splitlines() if "error" in line.lower()]
        message = (errors or ran.stderr.splitlines() or [f"exit code {ran.returncode}"])[0]
        raise KernelError(f"{compiler} cannot compile the kernels: {message}")


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def is_safe(path: Path, is_leaf: bool = True) -> bool:
    """True where only this user and root can change a file or folder, or put another in its place:
    neither it nor its parents may be writable by others, except that a parent may be sticky, like
    /tmp."""
    if not hasattr(os, "geteuid"):  # on Windows, a user's folders are private
        return True
    found = path.lstat()
    owners = {os.geteuid()} if is_leaf else {os.geteuid(), 0}
    is_sticky = not is_leaf and found.st_mode & stat.S_ISVTX
    if stat.S_ISLNK(found.st_mode) or found.st_uid not in owners:
        return False
    by_group = found.st_mode & stat.S_IWGRP and not is_own_group(found.st_gid)
    if (by_group or found.st_mode & stat.S_IWOTH) and not is_sticky:
        return False
    return path.parent == path or is_safe(path.parent, is_leaf=False)


def is_own_group(gid: int) -> bool:
    """True for a group of this user alone, by the name that systems give such a group."""
    import grp
    import pwd

    with contextlib.suppress(KeyError):
        name, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
        return group.gr_name == name and set(group.gr_mem) <= {name}
    return False


def private_folder(folder: Path) -> Path | None:
    """Make a folder that only this user can write, and return its real path. None where another
    user could change what is in it."""
    folder = folder.parent.resolve() / folder.name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not folder.is_symlink() and is_owned(folder):
            folder.chmod(0o700)  # what another user left in it is not theirs to change now
        return folder if is_safe(folder) else None
    except OSError:
        return None


def is_owned(path: Path) -> bool:
    return not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid()


def temporary_folders() -> list[Path]:
    """Folders in which a private one can be made, most wanted first."""
    names = [os.environ.get(name, "") for name in ("TMPDIR", "TEMP", "XDG_RUNTIME_DIR")]
    folders = [Path(name).resolve() for name in (*names, "/tmp", "/var/tmp", "/dev/shm") if name]
    return [path for path in dict.fromkeys(folders) if path.is_dir() and is_safe(path, False)]


def load_kernels() -> ctypes.CDLL:
    """The compiled kernels. Raises KernelError."""
    return _load_kernels(KERNEL_FLAGS)


@functools.cache
def _load_kernels(flags: tuple[str, ...]) -> ctypes.CDLL:
    """The compiled kernels, from the cache or compiled now.

    The file's name holds a hash of all that the library depends on, and one of its content, since
    loading a damaged file would crash. It appears in the cache in one move, so that processes that
    start together never see half a file. Where the cache is full, cannot be written or may not hold
    programs, or where another user could write it, a temporary folder is tried."""
    compiler = find_compiler()
    stamp = os.stat(compiler)
    source = SOURCE + layout_assertions()
    origin = (source, compiler, stamp.st_size, stamp.st_mtime_ns, flags, cpu_features())
    key = short_hash(repr(origin).encode())
    cache = private_folder(cache_root() / "kernels")
    if cache and (library := cached_kernels(cache, key)):
        return library
    problem: Exception = KernelError("there is no folder that only this user can write")
    for place in (*((cache,) if cache else ()), *temporary_folders()):
        try:
            with tempfile.TemporaryDirectory(prefix="nanollama-", dir=place) as folder:
                built = Path(folder) / f"{key}.so"
                compile_kernels(built, flags)
                library = declare_kernels(ctypes.CDLL(str(built)))
                if cache and place == cache:
                    built.chmod(0o700)
                    os.replace(built, cache / f"{key}-{short_hash(built.read_bytes())}.so")
                return library
        except (OSError, AttributeError) as error:
            problem = error
    raise KernelError(
        f"the compiled kernels do not load: {first_line(problem)}; point NANOLLAMA_CACHE or TMPDIR "
        "to a folder of yours from which programs may run"
    )


def cached_kernels(cache: Path, key: str) -> ctypes.CDLL | None:
    """The library that an earlier run left; None without one that is whole and this user's."""
    for path in cache.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError, AttributeError):  # a file that does not load
            if is_safe(path) and path.stem == f"{key}-{short_hash(path.read_bytes())}":
                return declare_kernels(ctypes.CDLL(str(path)))
    return None


def declare_kernels(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the arguments: an address, and how many rows and threads."""
    for name in (*KERNELS, "read_all", "multiply_all", "checksum", "replay"):
        function = getattr(library, name)
        num_numbers = {"checksum": 1, "replay": 3}.get(name, 2)
        function.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * num_numbers
        function.restype = None if name in (*KERNELS, "replay") else ctypes.c_int64
    library.run_step.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.run_step.restype = ctypes.c_int64
    library.path.restype = ctypes.c_char_p
    return library


# ---- calls, and recorded lists of calls ----------------------------------------------------------

_recording = threading.local()


def run_kernel(name: str, out: Tensor, **fields: Any) -> Tensor:
    """Run a kernel with the fields of its structure NAME_call, or note the call if this thread
    records calls. Tensors must be contiguous; the rows of `out` are the tokens -> out"""
    addresses = {
        key: value.data_ptr() if hasattr(value, "data_ptr") else value
        for key, value in fields.items()
    }
    call = STRUCTURES[f"{name}_call"](out=out.data_ptr(), **addresses)
    kernel, recorded = getattr(load_kernels(), name), getattr(_recording, "calls", None)
    if recorded is None:
        kernel(ctypes.byref(call), out.numel() // out.size(-1), torch.get_num_threads())
    else:
        recorded.append((kernel, call))
        keep_alive((out, *fields.values()), *_recording.live)
    return out


def keep_alive(values: Iterable[Any], live: list[Any], arena: Any) -> None:
    """Add the tensors among values, but results in an arena."""
    tensors = (value for value in values if hasattr(value, "data_ptr"))
    live += [x for x in tensors if arena is None or not arena.owns(x)]


def num_recorded() -> int:
    """Calls that this thread has noted so far, if it records calls."""
    return len(getattr(_recording, "calls", ()))


class KernelCalls:
    """The kernel calls of a function, to be run again and again without any Python in between.

    They read and write the same tensors each time, as many rows of them as `run` is given; those of
    the result are in `result`."""

    def __init__(self, function: Callable[[], Tensor], arena: Any = None) -> None:
        """Note the kernels that `function` calls; none is run. Results lie in an Arena of
        kernels.recorded, if there is one. Raises KernelError if `function` computes anything in
        another way, since that would be missing afterwards."""
        calls: list[tuple[Any, ctypes.Structure]] = []
        live: list[Any] = []  # tensors whose addresses are in the calls
        _recording.calls, _recording.live = calls, (live, arena)
        try:
            with only_kernels(arena and arena.empty):
                self.result = function()
        finally:
            del _recording.calls
        self.live = live, calls, arena
        step = STRUCTURES["step"]
        steps = [
            step(run=ctypes.cast(kernel, ctypes.c_void_p).value, call=ctypes.addressof(call))
            for kernel, call in calls
        ]
        self.steps, self.replay = (step * len(steps))(*steps), load_kernels().replay
        self.address = ctypes.addressof(self.steps)

    def run(self, num_rows: int, first: int = 0, last: int = 0, threads: int = 0) -> None:
        """Run the calls from `first` to `last` (not included; 0: all), on `threads` threads."""
        num = (last or len(self.steps)) - first
        address = self.address + first * ctypes.sizeof(self.steps._type_)
        self.replay(address, num, num_rows, threads or torch.get_num_threads())


# ---- matrices ------------------------------------------------------------------------------------


def weight_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    memory = preferred("kernels.memory", "large_pages", None)
    return cast("Tensor", memory(shape, dtype)) if memory else torch.empty(shape, dtype=dtype)


def weight_blocks(
    shape: tuple[int, ...], dtype: torch.dtype, fields: dict[str, Any], kept: Any
) -> tuple[Tensor, bool]:
    """Memory for a weight's blocks, and whether they are there already."""
    found = kept and kept.take(shape, dtype, fields)
    if found is not None:
        return found, True
    memory = weight_memory(shape, dtype)
    if kept:
        kept.add(memory, fields)
    return memory, False


class NativeLinear:
    """A packed weight (rows, cols) in the kernels' layout; filled from PackedLinears, some rows at
    a time, so that a file's bytes and the blocks are never in memory together as a whole.

    blocks (rows / 16, G, block_bytes) uint8, the last rows padded with zeros; `kept` is a LaidOut
    of kernels.laid_out, which may have them from an earlier start"""

    def __init__(
        self,
        shape: tuple[int, int],
        read_rows: Callable[[slice], PackedLinear],
        bias: Tensor | None,
        kept: Any = None,
    ) -> None:
        self.shape, self.bias = shape, bias
        num_rows, num_cols = shape
        first = read_rows(slice(0, 1))
        self.fields, num_bytes = layout(first)
        num_blocks = round_up(num_rows, BLOCK_ROWS) // BLOCK_ROWS
        blocks_shape = (num_blocks, num_cols // self.fields["group"], num_bytes)
        self.blocks, is_filled = weight_blocks(blocks_shape, torch.uint8, self.fields, kept)
        if is_filled:
            return
        step = getattr(first, "load_weights", LOAD_WEIGHTS) // num_cols
        step = round_up(max(1, step), BLOCK_ROWS)
        for start in range(0, num_rows, step):
            packed = read_rows(slice(start, min(start + step, num_rows)))
            fill_blocks(self.blocks[start // BLOCK_ROWS :][: step // BLOCK_ROWS], packed)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    @functools.cached_property
    def matrix(self) -> Any:
        """The C structure; valid as long as this object and its bias live."""
        return STRUCTURES["matrix"](
            blocks=self.blocks.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            rows=self.shape[0],
            cols=self.shape[1],
            block_bytes=self.blocks.shape[-1],
            **{
                key: value.data_ptr() if hasattr(value, "data_ptr") else value
                for key, value in self.fields.items()
            },
        )

    def rows(self, index: Tensor, factor: float = 1) -> Tensor:
        """The weight's rows at `index` (N,), times `factor` -> (N, cols)"""
        out = torch.empty(len(index), self.shape[1])
        return run_kernel("gather", out, m=ctypes.addressof(self.matrix), ids=index, factor=factor)

    def dequantize(self) -> Tensor:
        """The float weight (rows, cols)"""
        return self.rows(torch.arange(self.shape[0]))


def layout(packed: Any) -> tuple[dict[str, Any], int]:
    """The fields of `matrix` that tell a weight's layout, and the bytes of a block."""
    if hasattr(packed, "layout"):
        return cast("tuple[dict[str, Any], int]", packed.layout(NUMBERS))
    group, has_offset = packed.shape[1] // packed.q.shape[1], packed.offset is not None
    fields = {"bits": packed.bits, "group": group, "has_offset": has_offset}
    fields["is_float"] = packed.float4
    return fields, BLOCK_ROWS * (group * packed.bits // 8 + 2 + 2 * has_offset)


def padded(packed: PackedLinear, num_rows: int) -> PackedLinear:
    """The same weight with rows of zeros up to `num_rows`."""
    num_missing = num_rows - len(packed.q)
    longer = lambda part: F.pad(part, (0,) * (2 * part.dim() - 1) + (num_missing,))  # noqa: E731
    return packed._changed(longer, packed.dtype)


def fill_blocks(blocks: Tensor, packed: Any) -> None:
    """Copy rows into blocks (rows / 16, G, block_bytes), in the layout drawn above."""
    if hasattr(packed, "fill"):
        packed.fill(blocks)
        return
    num_blocks, num_groups, _ = blocks.shape
    if len(packed.q) % BLOCK_ROWS:
        packed = padded(packed, num_blocks * BLOCK_ROWS)  # rows that do not exist have scale 0
    q = packed.q if packed.bits == 4 else packed.q.view(torch.uint8) ^ 128
    words = q.view(torch.int32).view(num_blocks, BLOCK_ROWS, num_groups, -1).permute(0, 2, 3, 1)
    at = words[0, 0].numel() * 4
    blocks[..., :at].view(torch.int32).view(words.shape).copy_(words)
    for part in (packed.scale, packed.offset):
        if part is not None:
            lanes = part.view(num_blocks, BLOCK_ROWS, num_groups).transpose(1, 2)
            blocks[..., at : at + 2 * BLOCK_ROWS].view(torch.float16).copy_(lanes)
            at += 2 * BLOCK_ROWS


ACT_NUMBERS = ("alpha_p", "alpha_n", "beta", "least")  # behind the name `xielu`


class NativeProjection(Projection):
    """Projection in one kernel call."""

    def __init__(self, parts: list[NativeLinear]) -> None:
        super().__init__(parts)
        self.matrices = (STRUCTURES["matrix"] * len(parts))(*(part.matrix for part in parts))
        self.address = ctypes.addressof(self.matrices)
        self.num_rows = sum(part.shape[0] for part in parts)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        act: str = "",
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        fused = norm if norm is not None and not norm.is_centred else None
        if norm is not None and fused is None:
            x, act = operand(x, norm, act), ""
        kind, *numbers = act.split() or ("norm" if fused else "plain",)
        return run_kernel(
            "linear",
            torch.empty(x.size(0), self.num_rows) if out is None else out,
            **dict(zip(ACT_NUMBERS, map(float, numbers))),
            parts=self.address,
            num_parts=len(self.parts),
            x=x,
            norm=fused and fused.weight,
            residual=residual,
            before=NUMBERS[kind.upper()],
            eps=fused.eps if fused else 0.0,
        )

    def rows(self, index: Tensor, factor: float = 1) -> Tensor:
        rows: Tensor = self.parts[0].rows(index, factor)
        return rows


class ExpertsCall:
    """The fields of the kernel `experts` that stay the same for a mixture of experts."""

    def __init__(self, moe: MoE) -> None:
        shared = [moe.shared_expert] if moe.shared_expert else []
        mlps, self.projections = [*moe.experts, *shared], self.projections_of(moe)
        gate_ups = address_table(self.projections[: len(mlps)])
        downs = address_table(self.projections[len(mlps) :])
        self.fields: dict[str, Any] = {}  # empty if not all matrices are native
        if gate_ups is None or downs is None:
            return
        self.tables = gate_ups, downs  # their addresses are in the fields
        config, mlp, routing = moe.config, mlps[0], getattr(moe, "routing", None)
        self.fields = {
            "gate_ups": ctypes.addressof(gate_ups),
            "downs": ctypes.addressof(downs),
            "num_parts": len(mlp.gate_up_proj.parts),
            "num_experts": len(moe.experts),
            "num_used": config.num_used,
            "num_shared": len(shared),
            "is_renormalized": config.renormalized,
            "before": NUMBERS[mlp.act.upper()],
            "scoring": NUMBERS[routing.scoring.upper() if routing else "SOFTMAX"],
            "factor": 1.0,
        }
        if routing:
            names = "num_groups groups_used group_best scales_input factor least jitter".split()
            self.fields |= {name: getattr(routing, name) for name in names}

    @staticmethod
    def projections_of(moe: MoE) -> list[Projection]:
        """Those of all experts: first `gate_up_proj`, then `down_proj`."""
        mlps = [*moe.experts, *([moe.shared_expert] if moe.shared_expert else [])]
        return [*(mlp.gate_up_proj for mlp in mlps), *(mlp.down_proj for mlp in mlps)]


def address_table(projections: list[Projection]) -> ctypes.Array[ctypes.c_void_p] | None:
    """The addresses of each projection's matrices, if all are native; none for one whose
    `address` is None, whose expert another process has (cluster.shards)."""
    addresses = [p.address for p in projections if hasattr(p, "address")]
    all_native = len(addresses) == len(projections)
    return (ctypes.c_void_p * len(addresses))(*addresses) if all_native else None


# ---- attention -----------------------------------------------------------------------------------


def value_dim(config: ModelConfig) -> int:
    """Columns of a value: those of a key but for latent attention (models.mla)."""
    shape = config.own.get("latent")
    return int(shape.latent) if shape else config.head_dim


class NativeKVCache(KVCache):
    """KVCache in the layout that the kernel reads; 16 positions make a block."""

    tile = KV_BLOCK
    has_readers = True  # layers may read the keys and values of another one
    kinds = ("float32", "float16", "q8")

    def reserve(self, slot: int, num_tokens: int) -> None:
        """As in KVCache. A strip has room for its whole text at once, since memory is taken only
        where it is written."""
        length = max(num_tokens, len(self.texts[slot]))
        for strips, most in ((self.strips, 2**62), (self.rings, self.ring)):
            capacity = strips[slot].shape[3]
            if min(num_tokens, most) > capacity and strips[slot].shape[1]:
                wanted = min(round_up(max(length, 2 * capacity), self.tile), most)
                strips[slot] = longer(strips[slot], wanted)
        super().reserve(slot, num_tokens)

    def start(self, source: int, target: int, num_tokens: int, token_ids: list[int]) -> None:
        """As in KVCache; a step ahead may be writing to the target's old text."""
        load_kernels().stop_ahead()
        super().start(source, target, num_tokens, token_ids)

    def attend(self, attn: Attention, qkv: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        in_ring, index = self.places[attn.index]
        strips = self.rings if in_ring else self.strips
        spans = batch.memo.get(("spans", in_ring))
        if spans is None:
            self.new_tables(batch, len(batch.spans))
            self.fill(batch)
            spans = batch.memo["spans", in_ring]
        config = self.config
        return run_kernel(
            "attention",
            torch.empty(qkv.size(0), config.n_heads * value_dim(config)),
            qkv=qkv,
            cos=rotation.cos,
            sin=rotation.sin,
            q_scale=rotation.q_scale,
            q_norm=attn.q_norm and attn.q_norm.weight,
            k_norm=attn.k_norm and attn.k_norm.weight,
            sinks=attn.sinks,
            spans=ctypes.addressof(spans),
            norms=NUMBERS[(config.qk_norm or "head").upper()],
            norms_values=hasattr(attn, "v_norm"),
            is_reader=getattr(attn, "is_reader", False),
            layer=index,
            n_layers=strips[0].shape[1],
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            value_dim=value_dim(config),
            window=getattr(config.windows[attn.index], "signed", config.windows[attn.index]) or 0,
            ring=self.ring // KV_BLOCK if in_ring else 2**62,
            kind=NUMBERS[self.kv_dtype.upper()],
            block_bytes=KV_BLOCK * strips[0].shape[4],
            eps=config.norm_eps,
            scale=config.attn_scale or 0.0,
            softcap=config.attn_softcap,
        )

    def new_tables(self, batch: Batch, num_spans: int) -> None:
        """Put tables for `num_spans` spans into a batch, as the kernel reads them; the last span is
        followed by one without tokens."""
        load_kernels().stop_ahead()
        for in_ring in (False, True):
            batch.memo["spans", in_ring] = (STRUCTURES["span"] * (num_spans + 1))()

    def fill(self, batch: Batch) -> None:
        """Write a batch's spans into its tables."""
        for in_ring, strips in ((False, self.strips), (True, self.rings))[: 1 + bool(self.ring)]:
            table = batch.memo["spans", in_ring]
            for row, span in enumerate(batch.spans):
                strip = strips[span.slot]
                table[row] = STRUCTURES["span"](
                    strip=strip.data_ptr(),
                    num_blocks=strip.shape[3] // KV_BLOCK,
                    start=span.start,
                    num_new=span.num_new,
                    row=span.row,
                    is_whole=span.is_whole,
                )
            table[len(batch.spans)].num_new = 0


# ---- the backend ---------------------------------------------------------------------------------


class NativeBackend(Backend):
    """Weights, norms, attention and experts by kernels in C, in float32; the rest by torch.

    `dtype` is that of float weights and, where it has 16 bits, of keys and values; weights that a
    file has in 16 bits keep their own."""

    run_kernel = staticmethod(run_kernel)
    arrays = np  # torch would wake its threads, which then take a core from the kernels
    rounds_activations = True
    dtype: Any = property(lambda self: FLOAT32.now, lambda *_: None)

    def __init__(self, device: torch.device, dtype: torch.dtype, description: str) -> None:
        super().__init__(device, torch.float32, description)
        self.float_dtype, self.floats = dtype, list[NativeLinear]()
        self.new_floats: Any = preferred("kernels.floats", "FloatLinear", None)
        self.calls: weakref.WeakKeyDictionary[MoE, ExpertsCall] = weakref.WeakKeyDictionary()
        self.kept: Any = None  # blocks that kernels.laid_out has in a file

    def row_tile(self, has_float_weights: bool) -> int:
        return ROW_TILE if has_float_weights else 1

    def kv_dtype(self, wanted: str, has_packed_weights: bool) -> str:
        """Beside weights of few bits and activations of 8, half precision is exact enough."""
        is_exact = self.float_dtype == torch.float32 and not has_packed_weights
        if wanted == "auto" and not is_exact:
            return "float16"
        return super().kv_dtype(wanted, has_packed_weights)

    def pack(
        self,
        shape: tuple[int, int],
        read_rows: Callable[[slice], PackedLinear | Tensor],
        bias: Tensor | None,
        is_table: bool,
    ) -> Any:
        read: Any = read_rows
        if isinstance(read(slice(0, 1)), PackedLinear):
            return NativeLinear(shape, read, bias, self.kept)
        if self.new_floats is None or shape[1] % 16:
            return super().pack(shape, read, bias, is_table)
        self.floats.append(self.new_floats(shape, read, bias, self.float_dtype, self.kept))
        return self.floats[-1]

    def float_bytes(self, kind: str) -> int:
        stays = self.new_floats and kind in ("F16", "BF16")
        return 2 if stays else (self.float_dtype if self.new_floats else self.dtype).itemsize

    def linear(self, parts: list[Any]) -> Projection:
        is_native = [isinstance(part, NativeLinear) for part in parts]
        if all(is_native):
            return NativeProjection(parts)
        return Projection(
            [NativeProjection([p]) if native else p for p, native in zip(parts, is_native)]
        )

    def experts(self, moe: MoE, x: Tensor, residual: Tensor | None, *routed: Tensor) -> Tensor:
        call = self.calls.get(moe)
        if call is None or call.projections != ExpertsCall.projections_of(moe):  # one is replaced
            call = self.calls[moe] = ExpertsCall(moe)
        if not call.fields:
            return super().experts(moe, x, residual, *routed)
        return run_kernel(
            "experts",
            torch.empty(x.size(0), x.size(1)),
            x=x,
            residual=residual,
            gate=moe.gate.weight,
            bias=moe.gate.bias,
            shared_gate=moe.shared_expert_gate,
            routed=routed[0] if routed else None,
            correction=getattr(moe, "correction", None),
            scales=getattr(moe, "scales", None),
            cols=x.size(1),
            **call.fields,
        )

    def norm(self, norm: Norm, x: Tensor, residual: Tensor | None) -> Tensor:
        num_cols = len(norm.weight)
        if num_cols % 16:
            return super().norm(norm, x, residual)
        return run_kernel(
            "norm",
            torch.empty(x.shape),
            x=x.contiguous(),
            weight=norm.weight,
            bias=norm.bias,
            residual=residual,
            cols=num_cols,
            is_centred=norm.is_centred,
            eps=norm.eps,
        )

    def new_cache(
        self, config: ModelConfig, num_slots: int, kv_dtype: str, most_new: int
    ) -> KVCache:
        if self.kept:
            self.kept.save()  # the weights are complete
        D = config.head_dim
        if D % 16 or value_dim(config) % 16 or D > 576 or kv_dtype not in NativeKVCache.kinds:
            return super().new_cache(config, num_slots, kv_dtype, most_new)
        return NativeKVCache(config, num_slots, kv_dtype, self.device, most_new)

    def state_table(self, spans: Iterable[Any]) -> Any:
        """StateSpans of models.recurrent as kernels read them."""
        kind = STRUCTURES["state_span"]
        rows = [kind(state=s.state.data_ptr(), num_new=s.num_new, row=s.row) for s in spans]
        return (kind * (len(rows) + 1))(*rows)

    def array(self, x: Tensor) -> Any:
        return x.numpy()

    def capped(self, scores: Tensor, scale: float, cap: float) -> Tensor:
        logits = scores.numpy() * np.float32(scale)
        return torch.from_numpy(cap * np.tanh(logits / cap) if cap else logits)

    def record(self, decoder: Decoder, cache: KVCache, compile: bool) -> DecodeSteps | None:
        super().record(decoder, cache, compile)
        try:
            new: Any = preferred("kernels.recorded", "recorded_steps", lambda *_: None)
            return cast("DecodeSteps | None", new(decoder, cache))
        except KernelError as error:
            log.debug(f"decode steps are not recorded: {error}")
            return None

    def read_all(self, buffer: Tensor) -> None:
        load_kernels().read_all(buffer.data_ptr(), buffer.nbytes, torch.get_num_threads())


def make_backend(device: torch.device, dtype: torch.dtype, reason: str = "") -> NativeBackend:
    """Raises KernelError where the kernels cannot be compiled or loaded."""
    note = "" if dtype == torch.float32 else ", in float32"
    return NativeBackend(device, dtype, f"native ({load_kernels().path().decode()}){note}")
