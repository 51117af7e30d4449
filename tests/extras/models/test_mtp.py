"""Heads that predict further tokens: the same text, and the guesses that transformers' layers make.

transformers has no such head: here, one is made of its layers, as vLLM's qwen3_5_mtp.py does it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf_files
import oracle
import pytest
import safetensors.torch
import torch
from families import ROWS
from oracle import Tiny, rewritten
from traffic import assert_company_changes_nothing

import nanollama
from nanollama import (
    LLM,
    Backend,
    CheckpointError,
    EngineConfig,
    GenerationRequest,
    RequestError,
    SamplingParams,
    open_checkpoint,
)
from nanollama_extras.commands.details import weight_bytes
from nanollama_extras.models import mtp, recurrent

FAMILIES = ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"]
MADE = Callable[[str], Path]
FREE = {"temperature": 0.0, "repeat_penalty": 1.0}


class Reference:
    """A model with a head of random weights, both by transformers' own layers."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(5)
        self.model = oracle.load(path)
        self.config = self.model.config
        module = sys.modules[type(self.model).__module__]
        name = type(self.model).__name__.removesuffix("ForCausalLM")
        C, kinds = self.config.hidden_size, self.config.layer_types
        norm, layer = getattr(module, f"{name}RMSNorm"), getattr(module, f"{name}DecoderLayer")
        self.parts = torch.nn.ModuleDict(
            {
                "fc": torch.nn.Linear(2 * C, C, bias=False),
                "pre_fc_norm_embedding": norm(C),
                "pre_fc_norm_hidden": norm(C),
                "norm": norm(C),
                "layers": torch.nn.ModuleList([layer(self.config, kinds.index("full_attention"))]),
            }
        ).eval()
        for parameter in self.parts.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"mtp.{name}": tensor.clone() for name, tensor in self.parts.state_dict().items()}

    @torch.inference_mode()
    def guesses(self, ids: list[int], num: int) -> list[int]:
        """The next tokens but one after each state, the last of which follow the text."""
        parts, model = self.parts, self.model.model
        states, next_ids = model(torch.tensor([ids])).last_hidden_state[0, :-1], ids[1:]
        for _ in range(num):
            embedded = parts["pre_fc_norm_embedding"](model.embed_tokens(torch.tensor(next_ids)))
            both = torch.cat((embedded, parts["pre_fc_norm_hidden"](states)), dim=1)
            x = parts["fc"](both)[None]
            turned = model.rotary_emb(x, torch.arange(len(next_ids))[None])
            mask = torch.full((len(next_ids),) * 2, -torch.inf).triu(1)[None, None]
            layer = parts["layers"][0]
            y = layer(x, position_embeddings=turned, attention_mask=mask)
            last = parts["norm"](y)[0, -1:]
            next_ids = [*next_ids, int(self.model.lm_head(last).argmax())]
            states = torch.cat((states, last))
        return next_ids[-num:]


def with_tensors(path: Path, target: Path, more: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint with other tensors, whose config says that it has a head."""
    made = rewritten(path, target, lambda config: config.update(mtp_num_hidden_layers=1))
    tensors = safetensors.torch.load_file(made / "model.safetensors")
    safetensors.torch.save_file({**tensors, **more}, made / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> MADE:
    """made(variant) -> a checkpoint with a head of random weights."""
    known: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in known:
            name, overrides = ROWS[variant]
            path = tiny(name, **overrides, max_position_embeddings=4096)
            target = tmp_path_factory.mktemp(variant) / "made"
            known[variant] = with_tensors(path, target, Reference(path).tensors)
        return known[variant]

    return make


def with_knowledge(path: Path, target: Path, share: float) -> Path:
    """A model whose layers change the embedding of the last token by a share of what they did, and
    a head that knows which token would follow if they changed nothing."""
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    outputs = ("o_proj.weight", "down_proj.weight", "out_proj.weight")
    new = {name: share * t for name, t in tensors.items() if name.endswith(outputs)}
    new |= {name: 0 * t for name, t in new.items() if name.startswith("mtp")}
    C = len(tensors["mtp.norm.weight"])
    new["mtp.fc.weight"] = torch.cat((torch.eye(C), torch.zeros(C, C)), dim=1)
    new["mtp.pre_fc_norm_embedding.weight"] = torch.zeros(C)
    new["mtp.norm.weight"] = tensors["model.norm.weight"]
    return with_tensors(path, target, new)


@pytest.fixture(scope="module")
def knowing(made: MADE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head that is right at times."""
    target = tmp_path_factory.mktemp("knowing") / "made"
    return with_knowledge(made("qwen3_5_text"), target, 0.01)


def request(seed: int, num: int = 40, **params: Any) -> GenerationRequest:
    ids = [token if token > 3 else 4 for token in oracle.random_ids(20, seed=seed)]
    given = {"ignore_eos": True, "max_tokens": num, "seed": seed, **params}
    return GenerationRequest(ids, params=SamplingParams(**given))


def drafts(llm: LLM, one: GenerationRequest) -> list[tuple[list[int], list[int]]]:
    """Each draft of an answer, with the text that it follows."""
    seq, found = llm.start(one), []
    while seq.finish_reason is None:
        before = list(seq.token_ids)
        llm.engine.step()
        found += [(before, list(seq.draft))] if seq.draft else []
    return found


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are as long as they may be, however wrong the last ones were."""
    monkeypatch.setattr(mtp.HeadDrafter, "learn", lambda *_: None)
    monkeypatch.setitem(mtp.LIMITS, "cpu", (4, 0.0))


# ---- the guesses ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_guesses_are_those_of_transformers_layers(
    made: MADE, tiny: Tiny, variant: str, kernels: str
) -> None:
    name, overrides = ROWS[variant]
    reference = Reference(tiny(name, **overrides, max_position_embeddings=4096))
    llm = LLM(made(variant), lookup="mtp", kernels=kernels, prefill_chunk=7)
    found = drafts(llm, request(3, 8, **FREE))
    assert len(found) >= 4
    assert max(len(draft) for _, draft in found) == 3
    for ids, draft in found:
        assert draft == reference.guesses(ids, len(draft))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("variant", FAMILIES)
def test_a_gguf_file_drafts_the_same(made: MADE, tmp_path: Path, variant: str) -> None:
    path = made(variant)
    file = gguf_files.convert(path, tmp_path / "model.gguf")[0]
    one = request(4, 12, **FREE)
    assert drafts(LLM(file, lookup="mtp"), one) == drafts(LLM(path, lookup="mtp"), one) != []


def test_a_head_that_knows_the_text_is_always_right(made: MADE, tmp_path: Path) -> None:
    path = with_knowledge(made("qwen3_5_text"), tmp_path / "first", 0)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    sure = {"lm_head.weight": 1000 * tensors["lm_head.weight"]}
    llm = LLM(with_tensors(path, tmp_path / "made", sure), lookup="mtp")
    usage = llm.complete(request(1, 61, **FREE)).usage
    assert usage.accepted_tokens == usage.drafted_tokens == 45  # of every four tokens, three
    assert "drafts: 45 of 45 right" in nanollama.speed_line(llm.engine.stats)


# ---- the text ------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "greedy": FREE,
    "hot": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repeat_penalty": 1.0},
    "penalties": {"temperature": 0.6, "presence_penalty": 0.5, "repeat_penalty": 1.1},
    "constraint": {"temperature": 0.7, "regex": "[a-f]{30}", "ignore_eos": False},
}
OPTIONS: list[dict[str, Any]] = [
    {"kernels": "torch"},
    {"kernels": "native"},
    {"kernels": "native", "quantize": "q8"},
    {"kernels": "native", "quantize": "q4", "kv_dtype": "q8"},
]


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts for several sequences, as on a GPU."""
    monkeypatch.setitem(mtp.LIMITS, "cpu", (16, 0.0))


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_the_text_is_the_same_alone_and_in_a_batch(knowing: Path, options: dict[str, Any]) -> None:
    requests = [request(seed, **kind) for seed in range(3) for kind in KINDS.values()]
    plain, llm = (LLM(knowing, parallel=5, lookup=n, **options) for n in (0, "mtp"))
    expected = []
    for one in requests:
        plain.engine.forget()
        expected.append(plain.complete(one).token_ids)
    for one, ids in zip(requests, expected):
        assert llm.complete(one).token_ids == ids
    answers: list[list[int | None]] = [[] for _ in requests]
    for delta in llm.stream(requests):  # warm, and with neighbours
        answers[delta.index].append(delta.token_id)
    assert answers == expected
    stats = llm.engine.stats
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("options", OPTIONS[:3], ids=lambda o: "-".join(o.values()))
def test_requests_that_come_and_go_get_the_answers_that_each_gets_alone(
    knowing: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent, "SAVE_EVERY", 32)
    llm = assert_company_changes_nothing(knowing, 400, **options, lookup="mtp")
    assert 20 < llm.engine.stats.accepted_tokens < llm.engine.stats.drafted_tokens


@pytest.mark.usefixtures("eager")
def test_few_rows_are_guessed_on_a_cpu(knowing: Path) -> None:
    llm = LLM(knowing, lookup="mtp", parallel=4)
    for num, most in ((1, 3), (2, 1), (3, 0)):
        running = [llm.start(request(seed, 30, **FREE)) for seed in range(num)]
        drafted = []
        while llm.engine.has_work:
            is_full = len([seq for seq in running if not seq.finish_reason]) == num
            llm.engine.step()
            drafted += [len(seq.draft) for seq in running] if is_full else []
        assert max(drafted) == most


def test_an_unlikely_guess_ends_a_draft_and_the_next_waits() -> None:
    drafter = mtp.HeadDrafter(cast("Any", None))
    seq: Any = SimpleNamespace(token_ids=[5] * 10, max_length=100)
    assert drafter.begin(seq, 3) == 3
    assert drafter.take(7, 0.9, 0.6)
    assert drafter.take(8, 0.8, 0.6)
    assert not drafter.take(9, 0.7, 0.6)
    assert drafter.guess(seq.token_ids, 3) == [7, 8]
    asked = []
    for _ in range(40):
        seq.token_ids.append(5)
        if drafter.begin(seq, 3):
            asked.append(len(seq.token_ids))
            assert not drafter.take(7, 0.5, 0.6)
            assert drafter.guess(seq.token_ids, 3) == []
    assert asked == [11, 12, 14, 18, 26, 42]


def test_probabilities_are_those_of_a_softmax() -> None:
    scores = torch.randn(3, 50) * 4
    ids, shares = mtp.likeliest(scores)
    best = scores.softmax(dim=1).max(dim=1)
    assert ids == best.indices.tolist()
    assert shares == pytest.approx(best.values.tolist())


@pytest.mark.usefixtures("many_rows")
def test_a_next_turn_is_guessed_from_a_warm_cache(knowing: Path) -> None:
    llm = LLM(knowing, lookup="mtp", parallel=1)
    first = llm.complete(request(2, **FREE))
    turn = [*request(2).prompt, *first.token_ids, 5, 6, 7]
    params = SamplingParams(max_tokens=40, ignore_eos=True, **FREE)
    warm = llm.complete(GenerationRequest(turn, params=params))
    llm.engine.forget()
    cold = llm.complete(GenerationRequest(turn, params=params))
    assert warm.token_ids == cold.token_ids
    assert warm.usage.cached_tokens > 50
    assert cold.usage.cached_tokens == 0
    assert warm.usage.accepted_tokens > 0


# ---- files, memory, errors -----------------------------------------------------------------------


def test_the_head_takes_memory_with_the_option_only(
    made: MADE, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = made("qwen3_5_text"), set[str]()
    take = nanollama.Weights._read

    def spy(weights: Any, name: str, *rows: Any) -> Any:
        read.add(weights.source)
        return take(weights, name, *rows)

    monkeypatch.setattr(nanollama.Weights, "_read", spy)
    checkpoint = open_checkpoint(path)
    own = [each for name, each in checkpoint.tensors.items() if name.startswith("mtp.")]
    backend = Backend(torch.device("cpu"), torch.float32, "torch")
    both = checkpoint, mtp.with_head(checkpoint)
    sizes = [weight_bytes(each, EngineConfig(), backend) for each in both]
    assert sizes[1] - sizes[0] == sum(tensor.nbytes for tensor in own) > 0  # of type F32
    plain = LLM(path)
    assert read == {str(path)}
    llm = LLM(path, lookup="mtp")
    assert read == {str(path), f"{path}: MTP head"}
    sizes = [each.engine.decoder.config.kv_bytes(64, "float32") for each in (plain, llm)]
    assert sizes[1] - sizes[0] == 64 * 2 * 2 * 32 * 4  # keys and values of one more layer


def test_show_tells_of_the_head(made: MADE, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    for path, has_head in ((made("qwen3_5_text"), True), (tiny("Llama"), False)):
        assert nanollama.main(["show", str(path)]) == 0
        assert ("one that drafts (--lookup mtp)" in capsys.readouterr().out) == has_head


def test_a_model_without_a_head_says_so(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny("Llama")
    assert nanollama.main(["--model", str(path), "--prompt", "x", "--lookup", "mtp"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {path}: --lookup mtp needs the multi-token-prediction head of a Qwen3.5 or "
        "Qwen3-Next, which is not in it; --lookup N drafts from the text so far"
    )
    with pytest.raises(RequestError, match="which is not in it"):
        LLM(path, lookup="mtp")


def test_a_head_of_another_shape_is_refused(made: MADE, tmp_path: Path) -> None:
    path = with_tensors(
        made("qwen3_5_text"), tmp_path / "made", {"mtp.fc.weight": torch.ones(2, 2)}
    )
    LLM(path)
    with pytest.raises(CheckpointError, match=r"MTP head: tensor .*fc.weight has shape \(2, 2\)"):
        LLM(path, lookup="mtp")
