"""--tensor-parallel: two processes answer as one does, token for token; models and options that
cannot be split are refused in one line; a process that dies ends the others."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import oracle
import pytest
import split_ranks
import torch
from families import ROWS
from oracle import Tiny

import nanollama
from nanollama import LLM, PackedLinear, TensorSource
from nanollama_extras.cluster import shards, tensor_parallel
from nanollama_extras.cluster.shards import Share, SplitError
from nanollama_extras.kernels import native
from nanollama_extras.models import families

ROOT = Path(__file__).parents[3]
PROMPTS = [oracle.random_ids(count, seed=count) for count in (40, 25, 33)]
WIDE: dict[str, Any] = {"head_dim": 32, "intermediate_size": 128}
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MOE: dict[str, Any] = {**EXPERTS, "num_experts": 5, "head_dim": 32, "norm_topk_prob": True}
SHARED = {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 96}
THREE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llama": ("Llama", WIDE, "", {}),
    "llama torch": ("Llama", WIDE, "", {"kernels": "torch"}),
    "llama biases tied": ("Llama", BIASES | {"tie_word_embeddings": True}, "", {}),
    "qwen3": ("Qwen3", WIDE, "", {"lookup": 4}),
    "qwen3 moe": ("Qwen3Moe", MOE, "", {}),
    "qwen3 moe torch": ("Qwen3Moe", MOE, "", {"kernels": "torch"}),
    "qwen2 moe": ("Qwen2Moe", SHARED | {"use_sliding_window": False}, "", {}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 8}, "", {}),
    "cohere2": (*ROWS["cohere2"], "", {}),
    "glm4 moe": (*ROWS["glm4_moe"], "", {}),
    "gpt-oss": (*ROWS["gpt_oss"], "", {}),
    "q8": ("Llama", WIDE, "", {"quantize": "q8"}),
    "q8 torch": ("Llama", WIDE, "", {"quantize": "q8", "kernels": "torch"}),
    "q8 biases": (
        "Llama",
        WIDE | {"mlp_bias": True, "attention_bias": True},
        "",
        {"quantize": "q8"},
    ),
    "Q4_0 gemma3": ("Gemma3Text", {**WIDE, "sliding_window": 8}, "Q4_0", {}),
    "Q8_0": ("Llama", WIDE, "Q8_0", {}),
    "Q4_0": ("Llama", WIDE, "Q4_0", {}),
    "Q4_0 torch": ("Llama", WIDE, "Q4_0", {"kernels": "torch"}),
    "Q8_0 moe": ("Qwen3Moe", MOE, "Q8_0", {}),
    "Q4_0 moe": ("Qwen3Moe", MOE, "Q4_0", {}),
    "image qwen3 vl": (
        "Qwen3VLText",
        {**WIDE, "num_hidden_layers": 3, "rope_parameters": THREE},
        "",
        {},
    ),
    "image gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 8}, "", {}),
}
# Native kernels round activations to 8 bits for packed weights. The sums of a mixture are added in
# another order, which moves a value that is on the edge between two of them to the other one; all
# other sums are those of one process.
ROUNDED = ("Q8_0 moe", "Q4_0 moe")
EXACT = ("q8", "q8 biases", "Q8_0", "Q4_0", "Q4_0 gemma3")
Pair = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """The outcome of each model, whole and in two processes; torchrun starts once."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    jobs: list[tuple[Path, dict[str, Any]]] = []
    for label, (name, overrides, kind, options) in MODELS.items():
        path = tiny(name, **overrides)
        if kind:
            path, _ = gguf_files.convert(path, folder / f"{label}.gguf", kind)
        jobs.append((path, options))
    has_image = [label.startswith("image") for label in MODELS]
    lines = [json.dumps([str(job[0]), job[1], PROMPTS, has]) for job, has in zip(jobs, has_image)]
    (folder / "jobs").write_text("\n".join(lines))
    command = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    program = str(Path(split_ranks.__file__))
    ran = subprocess.Popen(
        [sys.executable, *command, program, str(folder / "jobs")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    whole = [
        split_ranks.outcome(LLM(path, **options), PROMPTS, has)
        for (path, options), has in zip(jobs, has_image)
    ]
    stdout, stderr = ran.communicate(timeout=300)
    assert ran.returncode == 0, stderr
    split = [json.loads(line) for line in stdout.splitlines()]
    return dict(zip(MODELS, zip(whole, split, strict=True), strict=True))


def same_until_unsure(whole: split_ranks.Answer, split: split_ranks.Answer, margin: float) -> int:
    """The number of tokens before the first that one process chose by less than `margin`: to that
    point the answers must agree."""
    sure = list(itertools.takewhile(lambda entry: entry[1] > margin, whole))
    assert [token_id for token_id, _ in split[: len(sure)]] == [token_id for token_id, _ in sure]
    return len(sure)


@pytest.mark.parametrize("label", MODELS)
def test_two_processes_answer_as_one_does(label: str, outcomes: dict[str, Pair]) -> None:
    """Alone, with neighbours, and from the cache's prefix; at each position of a prompt."""
    whole, split = outcomes[label]
    margin, nearness, least = (0.05, 0.1, 10) if label in ROUNDED else (2e-4, 1e-4, 100)
    pairs = list(zip(whole["answers"], split["answers"], strict=True))
    num_compared = [same_until_unsure(*pair, margin) for pair in pairs]
    assert sum(num_compared) >= least, num_compared
    assert whole["cached"] == split["cached"] > len(PROMPTS[0])
    logits, other_logits = (torch.tensor(found["logits"]) for found in (whole, split))
    torch.testing.assert_close(logits, other_logits, atol=nearness, rtol=0)
    best = logits.topk(2).values
    is_sure = best[:, 0] - best[:, 1] > margin
    assert is_sure.sum() >= 30
    assert torch.equal(logits.argmax(1)[is_sure], other_logits.argmax(1)[is_sure])


@pytest.mark.parametrize("label", EXACT)
def test_sums_of_rounded_activations_are_those_of_one_process(
    label: str, outcomes: dict[str, Pair]
) -> None:
    whole, split = outcomes[label]
    assert split["logits"] == whole["logits"]
    assert split["answers"] == json.loads(json.dumps(whole["answers"]))


def test_each_process_holds_its_part_only(outcomes: dict[str, Pair]) -> None:
    for label, (whole, split) in outcomes.items():  # rows of floats are padded to blocks of 32
        assert 1 <= 2 * split["bytes"] / whole["bytes"] < 1.25, label


def test_process_0_cannot_compute_alone(outcomes: dict[str, Pair]) -> None:
    """The others would not take part, and it would wait for them."""
    errors = {split["error"] for _, split in outcomes.values()}
    assert errors == {"a model over several processes cannot do this"}


# ---- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(*argv): the error of a command line, without the line that names its help"""

    def run(*argv: object) -> str:
        capsys.readouterr()  # of the programs that made the models
        assert nanollama.main(list(map(str, argv))) in (1, 2)
        line, *hint = capsys.readouterr().err.splitlines()
        assert all(row.startswith("see: ") for row in hint)
        return line.removeprefix("error: ")

    return run


def test_models_that_cannot_be_split_are_refused(refused: Callable[..., str], tiny: Tiny) -> None:
    heads, (name, row) = {"num_attention_heads": 8, "num_key_value_heads": 4}, ROWS["lfm2"]
    for path, count, reason in (
        (tiny("Llama", **heads), 3, "3 processes: it has 8 heads; it can be over 2, 4"),
        (tiny("Llama"), 4, "4 processes: it has 2 key/value heads; it can be over 2"),
        (tiny("Olmo2"), 2, "2 processes: a norm of all heads together cannot be split yet"),
        (tiny(name, **row), 2, "2 processes: short convolutions cannot be split yet"),
    ):
        line = refused("--model", path, "--tensor-parallel", count, "--prompt", "x")
        assert line.endswith(f" cannot be split over {reason}")


def test_options_that_do_not_fit_are_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, reason in (
        ("--prompt x --tensor-parallel 0", "it must be at least 1"),
        ("--serve --tensor-parallel 2", "--serve needs exactly one --model with it"),
        ("--prompt x --tensor-parallel 2 --adapter a", "--adapter cannot be used with it yet"),
        ("--prompt x --tensor-parallel 2 --draft a", "--draft cannot be used with it yet"),
        ("--prompt x --tensor-parallel 2 --lookup mtp", "--lookup mtp cannot be used with it yet"),
    ):
        assert refused(*words.split()) == f"--tensor-parallel: {reason}"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    error = "--tensor-parallel is 2, and torchrun has started 4"
    assert refused("--prompt", "x", "--tensor-parallel", 2) == error


def test_every_family_is_split_or_named() -> None:
    """The layers of a family that cannot be split have a name for the error."""
    rows = {**nanollama.FAMILIES, **families.FAMILIES}
    own = {row.decoder for row in rows.values()} - {*shards.SPLITTABLE}
    assert {place.partition(":")[0] for place in own} == shards.LAYERS.keys()


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pick, chosen = tensor_parallel.pick_device, list[int]()
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick(None, 1) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (pick(None, 1), pick("cuda", 0), pick("cpu", 3)) == ("cuda:1", "cuda:0", "cpu")
    assert chosen == [1, 0]
    with pytest.raises(nanollama.UsageError, match="needs a GPU of its own, and there are 2"):
        pick(None, 2)


# ---- parts of tensors ----------------------------------------------------------------------------


def source(weight: torch.Tensor | PackedLinear) -> tuple[TensorSource, list[Any]]:
    """A tensor, and the list of what is read of it."""
    read: list[Any] = []

    def load(at: Any = slice(None)) -> torch.Tensor | PackedLinear:
        read.append(at)
        return weight[at] if isinstance(weight, torch.Tensor) else weight.select(at)

    return TensorSource(tuple(weight.shape), "F32", 0, load, isinstance(weight, PackedLinear)), read


def test_the_parts_of_a_matrix_make_it_up() -> None:
    weight = torch.randn(12, 192, generator=torch.Generator().manual_seed(0))
    for whole, (name, dim) in itertools.product(
        (weight, nanollama.quantize(weight, 8), nanollama.quantize(weight, 4)),
        (("model.layers.0.self_attn.k_proj", 0), ("model.layers.0.mlp.down_proj", 1)),
    ):
        tensor, read = source(whole)
        parts = [
            shards.part_of(f"{name}.weight", tensor, Share(rank, 3), None) for rank in range(3)
        ]
        loaded = [part.load() for part in parts]
        assert [tuple(part.shape) for part in loaded] == [part.shape for part in parts]
        assert torch.equal(torch.cat(list(map(floats_of, loaded)), dim), floats_of(whole))
        if dim == 0:
            assert read == [slice(0, 4), slice(4, 8), slice(8, 12)]


def test_rows_of_a_part() -> None:
    tensor, _ = source(torch.arange(24.0).view(12, 2))
    part = shards.rows_of(tensor, range(4, 8))
    assert torch.equal(part.load(slice(1, 9)), part.load(torch.tensor([1, 2, 3])))
    assert part.load(slice(1, 2)).tolist() == [[10.0, 11.0]]


def test_packed_columns_are_cut_between_groups() -> None:
    tensor, _ = source(nanollama.quantize(torch.ones(4, 96), 8))
    name = "model.layers.0.self_attn.o_proj.weight"
    problem = "has 96 columns, 48 for each of 2 processes; packed ones are cut at multiples of 32"
    with pytest.raises(SplitError, match=problem):
        shards.part_of(name, tensor, Share(0, 2), None)
    floats, _ = source(torch.ones(4, 96))
    assert shards.part_of(name, floats, Share(1, 2), None).shape == (4, 48)
    with pytest.raises(SplitError, match=problem):
        shards.part_of(name, floats, Share(0, 2), bits=8)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K", "IQ4_XS"])
def test_columns_of_a_gguf_are_read_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that are read, of 768 columns in blocks of up to 256, and what they hold."""
    path, random = tmp_path / "one.gguf", np.random.default_rng(0)
    weight = random.normal(size=(6, 768)).astype(np.float32)
    raw = gguf_files.encode(weight, gguf_files.Kind[kind], random)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=gguf_files.Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = nanollama.read_gguf(path)[1]["blk.0.ffn_down.weight"]
    load, read = nanollama._load_gguf, []

    def spy(data: Any, *rest: Any) -> Any:
        read.append(data.nbytes)
        return load(data, *rest)

    monkeypatch.setattr(nanollama, "_load_gguf", spy)
    tensor = dataclasses.replace(tensor, load=functools.partial(spy, *tensor.load.args))
    for size in (3, 4):
        read.clear()
        parts = [shards.columns_of(tensor, Share(rank, size).of(768)) for rank in range(size)]
        floats = [floats_of(part.load(slice(1, 5))) for part in parts]
        block = gguf.GGML_QUANT_SIZES[gguf_files.Kind[kind]][0]
        num_blocks = [
            -(-(rank + 1) * (768 // size) // block) - rank * (768 // size) // block
            for rank in range(size)
        ]
        assert read == [4 * tensor.nbytes // 6 * n // (768 // block) for n in num_blocks]
        assert torch.equal(torch.cat(floats, 1), floats_of(load(*tensor.load.args))[1:5])


def floats_of(weight: torch.Tensor | PackedLinear) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


def test_a_bias_is_added_once() -> None:
    tensor, _ = source(torch.ones(6))
    name = "model.layers.1.mlp.down_proj.bias"
    parts = [shards.part_of(name, tensor, Share(rank, 2), None).load() for rank in range(2)]
    assert torch.equal(torch.stack(parts).sum(0), torch.ones(6))


def test_memory_counts_the_caches_of_all_processes_of_a_machine(tiny_llm: LLM) -> None:
    config = dataclasses.replace(tiny_llm.config)
    part = shards.split_config(config, Share(0, 2), num_sharing=2)
    assert (part.n_heads, part.n_kv_heads, part.n_ff) == (2, 1, 48)
    assert part.kv_bytes(100, "float32") == config.kv_bytes(100, "float32")


def test_the_kernel_of_experts_leaves_those_of_other_processes_out(
    tiny: Tiny, tmp_path: Path
) -> None:
    path, _ = gguf_files.convert(tiny("Qwen3Moe", **MOE), tmp_path / "moe.gguf", "Q8_0")
    moe: Any = LLM(path).engine.decoder.layers[0].mlp
    absent = copy.copy(moe.experts[0])
    absent.gate_up_proj = shards.Absent({"gate_proj": 32, "up_proj": 32})
    absent.down_proj = shards.Absent({"down_proj": 64})
    x, parts = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), []
    for kept in ({0, 1}, {2, 3, 4}):
        part = copy.copy(moe)
        part.experts = [mlp if i in kept else absent for i, mlp in enumerate(moe.experts)]
        assert native.ExpertsCall(part).fields
        parts.append(part(x, None))
    assert parts[0].any()
    torch.testing.assert_close(parts[0] + parts[1], moe(x, None))


# ---- the command line ----------------------------------------------------------------------------


def children(pid: int) -> dict[str, int]:
    """The processes that torchrun has started, by their rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_text().split("\0")
        except OSError:
            continue
        if parent == pid:
            found |= {v[5:]: int(path.name) for v in variables if v.startswith("RANK=")}
    return found


@pytest.fixture
def conversation(tiny: Tiny) -> Iterator[subprocess.Popen[str]]:
    options = "--tensor-parallel 2 --threads 1 --interactive --temp 0 --max-tokens 6".split()
    with subprocess.Popen(
        [sys.executable, "-m", "nanollama", "--model", tiny("Llama"), *options],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        yield program
        program.kill()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_process_that_dies_ends_the_others(conversation: subprocess.Popen[str]) -> None:
    assert conversation.stdin
    assert conversation.stdout
    conversation.stdin.write("hello\n")
    conversation.stdin.flush()
    assert conversation.stdout.read(1)  # of the answer
    ranks = children(conversation.pid)
    assert sorted(ranks) == ["0", "1"]
    os.kill(ranks["1"], signal.SIGKILL)
    _, stderr = conversation.communicate("again\n", timeout=60)
    assert conversation.returncode == 1
    assert "Traceback" not in stderr
    assert "error: signal 9 ended process 1 of 2, and with it the others" in stderr
    deadline = time.monotonic() + 30
    while Path(f"/proc/{ranks['0']}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
