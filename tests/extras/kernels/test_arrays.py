"""Models on native kernels without torch: the same answers, and buffers that act as torch's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import without_torch

import nanollama
from nanollama_extras.files import mapped
from nanollama_extras.kernels import arrays
from nanollama_extras.kernels.arrays import Tensor

ROOT = Path(__file__).parents[3]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def models(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Tiny models: two GGUF files, and a directory in bfloat16"""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    llama = tiny("Llama", **sizes, rope_parameters=LLAMA3)
    made = [
        gguf_files.convert(llama, folder / "llama.gguf", "Q4_0")[0],
        gguf_files.convert(tiny("Gemma3Text", **sizes), folder / "gemma3.gguf", "Q6_K")[0],
    ]
    half = folder / "half"
    half.mkdir()
    for file in llama.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(llama / "model.safetensors")
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    safetensors.torch.save_file(weights, half / "model.safetensors")
    return [*made, half]


def test_each_mode_answers_without_torch_as_with_it(models: list[Path], tmp_path: Path) -> None:
    """Bit for bit, in one program, which then imports torch for another model."""
    script = str(Path(without_torch.__file__))
    ran = subprocess.run(
        [sys.executable, script, str(tmp_path), *map(str, models)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    *without, both, before, width, shape, n_vocab = json.loads(ran.stdout)
    for path, answers in zip(models, without):
        assert not answers.pop("torch"), path
        assert answers == json.loads(json.dumps(without_torch.all_answers(path, tmp_path)))
    assert both[1] == before  # by the model that was loaded without torch
    assert width == 256
    assert shape == [len(before), n_vocab]


# ---- buffers -------------------------------------------------------------------------------------

FLOATS = np.linspace(-3, 70000, 24, dtype=np.float32).reshape(2, 3, 4)
USES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "views": lambda lib, F, x: x[1:].view(-1, 4).flatten().unsqueeze(1),
    "bytes": lambda lib, F, x: x.view(lib.uint8),
    "flattened in part": lambda lib, F, x: x.flatten(1),
    "padded": lambda lib, F, x: F.pad(x, (0, 0, 1, 2)),
    "padded with ones": lambda lib, F, x: F.pad(x, (1, 0), value=1.0),
    "float16": lambda lib, F, x: x.to(lib.float16),
    "bfloat16 and back": lambda lib, F, x: x.to(lib.bfloat16).float(),
    "bits of bfloat16": lambda lib, F, x: x.to(lib.bfloat16).view(lib.int16),
    "to": lambda lib, F, x: x.to(lib.device("cpu"), lib.int32),
    "numbers": lambda lib, F, x: (1 - x) * x / 3 + 2 * x - x / (x + 0.5),
    "clamped": lambda lib, F, x: (x / 8).clamp(0, 1),
    "written": lambda lib, F, x: lib.zeros(2, 3, 4, dtype=lib.uint8).copy_(x[:, :, :1] / 1000),
    "rows": lambda lib, F, x: x[np.array([1, 0, 1])],
    "rows by a tensor": lambda lib, F, x: x[lib.tensor([1, 0])],
    "arange": lambda lib, F, x: lib.arange(2, 9, 3),
    "filled": lambda lib, F, x: lib.full((2, 3), 0.1),
    "of a list": lambda lib, F, x: lib.tensor([0.1, 2]),
    "of integers": lambda lib, F, x: lib.tensor([1, 2]),
    "split": lambda lib, F, x: lib.split(x.flatten(0, 1), [1, 5])[1],
    "contiguous": lambda lib, F, x: x[:, 1:2].contiguous(),
    "a name of torch's alone": lambda lib, F, x: x.softmax(-1).sum(0),
}


@pytest.mark.parametrize("use", USES)
def test_buffers_act_as_those_of_torch(use: str) -> None:
    """With the stand-ins, and with Tensors made before torch was imported."""
    light, plain = arrays.from_numpy(FLOATS.copy()), torch.from_numpy(FLOATS.copy())
    wanted = USES[use](torch, F, plain)
    own = USES[use](arrays.STAND_INS["torch"], arrays.STAND_INS["torch.nn.functional"], light)
    assert str(own.dtype) == str(wanted.dtype)
    assert np.array_equal(np.asarray(own), wanted.numpy())
    assert own.shape == wanted.shape
    mixed = USES[use](torch, F, light)
    assert torch.equal(torch.as_tensor(np.asarray(mixed)), wanted)


def test_torch_takes_these_tensors() -> None:
    x, y = arrays.from_numpy(FLOATS.copy()), torch.ones(2, 3, 4)
    assert torch.equal(torch.cat([x, y]), torch.cat([torch.from_numpy(FLOATS), y]))
    assert torch.equal(y + x, x + y)
    y[:1] = x[:1]
    assert torch.equal(y[0], torch.from_numpy(FLOATS[0]))
    x[:] = y
    assert isinstance(x, Tensor)
    assert x.array[1, 0, 0] == 1
    assert F.linear(y, x[0]).shape == (2, 3, 3)


def test_memory_is_aligned() -> None:
    for make in (arrays.empty, arrays.zeros):
        for size in (0, 1, 7, 100_000):
            made = make(size, 3, dtype=torch.int16)
            assert made.data_ptr() % arrays.ALIGNMENT == 0
            assert made[1:].data_ptr() == made.data_ptr() + 6 or size < 2


def test_only_kernels_may_compute() -> None:
    x = arrays.zeros(4)
    with arrays.only_kernels():
        x[1:].view(3, 1)
        for compute in (lambda: x + 1, x.clone, lambda: x.exp(), lambda: x[np.array([1])]):
            with pytest.raises(nanollama.KernelError):
                compute()


def test_threads_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch; print(torch.get_num_threads())"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert arrays.default_threads() == int(ran.stdout)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert arrays.default_threads() == 3


def test_a_mapped_file_is_as_safetensors_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"odd": torch.randn(3, dtype=torch.float16), "b": torch.randn(3, 5).bfloat16()}
    made |= {"a": torch.randn(4, 3), "none": torch.zeros(0, 3)}
    safetensors.torch.save_file(made, tmp_path / "x")
    whole = safetensors.safe_open(tmp_path / "x", framework="np")
    opened = mapped.MappedFile(tmp_path / "x", whole)
    for name, tensor in made.items():
        assert torch.equal(opened.get_tensor(name), tensor)
        assert torch.equal(opened.get_slice(name)[1:2], tensor[1:2])
