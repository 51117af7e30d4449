"""Fixtures that several test files share: the real SmolLM2, and tiny checkpoints."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs one process per core
os.environ.setdefault("RAY_worker_niceness", "0")  # or Ray's processes wait for other tests

import hypothesis
import torch
from command_line import Ran, share_kernels
from huggingface_hub import constants
from scheduling import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401 (hooks)

import nanollama
from nanollama import test_server  # noqa: F401 (a fixture)

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or programs ignore Ctrl-C too
if not torch.cuda.is_available():  # to be said before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
# the same examples in every run, and no test that fails because the machine was busy, or because
# hypothesis writes its tables of Unicode in a fresh checkout
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _logging_of_one_test_only() -> Iterator[None]:
    """`main` logs to the stderr of its test, which is closed afterwards."""
    yield
    nanollama.log.handlers.clear()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A model that an earlier test loaded may have set more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct GGUF, fetched once and kept in the user's cache."""
    return nanollama.ModelStore().resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2_llm(smollm2: Path) -> nanollama.LLM:
    """SmolLM2 loaded once per test process. Tests must not rely on its prefix cache being cold."""
    return nanollama.LLM(smollm2, parallel=4)


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


# families whose text part transformers runs in a multimodal model only -> its classes
MULTIMODAL = {
    "Qwen3VLText": "Qwen3VL",
    "Qwen3VLMoeText": "Qwen3VLMoe",
    "MuseGlimmerText": "MuseGlimmer",
}

UNLISTED = ("Mistral4",)  # families that AutoModelForCausalLM does not know


def multimodal_config(name: str, text: Any) -> Any:
    """The config of a multimodal model with a tiny part for images."""
    import transformers

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": text.hidden_size, "deepstack_visual_indexes": [0]}
    kind = getattr(transformers, f"{MULTIMODAL[name]}Config")
    if name == "MuseGlimmerText":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        vision |= {"num_hidden_layers": 1}
        widths = {"out_hidden_size": 64, "projector_hidden_size": 16}
        return kind(text_config=text.to_dict(), vision_config=vision, **widths)
    return kind(text_config=text.to_dict(), vision_config=vision)


def save_tiny_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 320 tokens: <s>, </s>, ChatML's markers, 256 bytes, some merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog; what is the capital of France? " * 20
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny("Llama", rope_theta=..) -> the directory of a tiny random checkpoint.

    The name is the prefix of transformers' Config class. Equal calls share it."""
    made: dict[str, Path] = {}

    def make(name: str = "Llama", **overrides: Any) -> Path:
        key = name + repr(sorted(overrides.items()))
        if key not in made:
            import transformers

            config = getattr(transformers, f"{name}Config")(**{**TINY, **overrides})
            torch.manual_seed(0)
            auto: Any = transformers.AutoModelForCausalLM
            if name in MULTIMODAL:
                config, auto = (
                    multimodal_config(name, config),
                    transformers.AutoModelForMultimodalLM,
                )
            if name in UNLISTED:
                model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            else:
                model = auto.from_config(config).eval()
            for part, parameter in model.named_parameters():  # large enough that every term matters
                plus_one = name.startswith(("Qwen3_5", "Qwen3Next")) and "linear_attn" not in part
                plus_one |= name == "MuseGlimmerText" and "layernorm" in part
                mean = float("norm" in part and not plus_one)  # of weights that 1 is added to
                torch.nn.init.normal_(parameter, mean=mean, std=0.2)
            for part, buffer in model.named_buffers():
                if part.endswith(("bias", "layer_scalar")):  # a router's, a layer's
                    torch.nn.init.normal_(buffer, mean=float("scalar" in part), std=0.2)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            save_tiny_tokenizer(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llm(tiny: Callable[..., Path]) -> nanollama.LLM:
    """A tiny random Llama, loaded."""
    return nanollama.LLM(tiny("Llama"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray that this process has started, to which tests may add nodes. The six cores of its first
    node are what Ray counts."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 200 * 1024 * 1024}
    node = {"num_cpus": 6, "include_dashboard": False, **memory}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def ray_address(ray_cluster: Any) -> str:
    """The address of a Ray that this process has started."""
    address: str = ray_cluster.address
    return address


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches without models, but with compiled kernels for other processes."""
    share_kernels(tmp_path / "own")
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """cli(*argv, stdin=b"") runs `main` in this process."""

    def run(*argv: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()  # what making a model has printed
        code: Any
        try:
            code = nanollama.main([str(argument) for argument in argv])
        except SystemExit as exited:
            code = exited.code
        return Ran(code, *capsys.readouterr())

    return run
