"""nanochat's own directories: its parameter sets against its forward pass, its tokenizer
without a pickle being run, its conversations."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nanochat_files as files
import oracle
import pytest
import torch
from serving import serving

import nanollama
from nanollama import LLM, GenerationRequest

VOCAB = files.CONFIG["vocab_size"]
GREEDY = oracle.GREEDY


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "nanochat"


def greedy(variant: str, ids: list[int], count: int = GREEDY.max_tokens) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(files.logits(variant, ids)[-1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("variant", files.VARIANTS)
def test_logits_and_greedy_tokens_are_nanochats(variant: str, kernels: str, base: Path) -> None:
    llm = LLM(files.save(base, variant), kernels=kernels, prefill_chunk=64)
    ids = oracle.random_ids(200, VOCAB)
    expected = files.logits(variant, ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(llm.logits(ids), expected, rtol=0, atol=2e-4)
    request = GenerationRequest(prompt=ids[:40], params=GREEDY)
    assert llm.complete(request).token_ids == greedy(variant, ids[:40])


@pytest.mark.parametrize("variant", ["smear", "summer"])
def test_neighbours_and_reused_prefixes_change_nothing(variant: str, base: Path) -> None:
    llm = LLM(files.save(base, variant), parallel=3, prefill_chunk=32, lookup=4)
    shared = oracle.random_ids(70, VOCAB)
    prompts = [shared[: 40 + 7 * n] + oracle.random_ids(n, VOCAB, seed=n) for n in range(1, 5)]
    requests = [GenerationRequest(prompt=ids, params=GREEDY) for ids in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    for delta in llm.stream(requests):
        found[delta.index].append(delta.token_id or 0)
    assert found == [greedy(variant, ids) for ids in prompts]


def test_the_first_form_is_transformers_nanochat(base: Path) -> None:
    import transformers

    state = files.parameters(set(), files.CONFIG, 7)
    config = transformers.NanoChatConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=2.0**-23,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model = transformers.NanoChatForCausalLM(config).eval()
    names = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers"}
    names |= {"attn.c_proj": "self_attn.o_proj", "mlp.c_proj": "mlp.fc2", "mlp.c_fc": "mlp.fc1"}
    names |= {f"attn.c_{n}": f"self_attn.{n}_proj" for n in "qkv"}
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor[:VOCAB] if name.startswith(("model.embed", "lm_head")) else tensor
    model.load_state_dict(renamed)
    oracle.assert_same_model(LLM(files.save(base)), model, oracle.random_ids(60, VOCAB))


@pytest.mark.parametrize("flags", [{"quantize": "q8"}, {"quantize": "q4"}, {"dtype": "bfloat16"}])
def test_newer_checkpoints_can_be_packed(flags: dict[str, Any], base: Path) -> None:
    llm = LLM(files.save(base, "smear"), **flags)
    ids = oracle.random_ids(30, VOCAB)
    expected = files.logits("smear", ids).softmax(-1)
    found = llm.logits(ids).log_softmax(-1)
    assert (expected * (expected.log() - found)).sum(-1).mean() < 0.2


def test_a_file_of_a_compiled_model_in_bfloat16_or_without_zip_is_read(base: Path) -> None:
    path = files.save(base)
    state = {k: v.bfloat16() for k, v in torch.load(path, weights_only=True).items()}
    torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, path)
    ids = oracle.random_ids(20, VOCAB)
    expected = LLM(path).logits(ids)
    assert nanollama.open_checkpoint(path).quantization == "BF16"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch.equal(LLM(path).logits(ids), expected)


# ---- what is refused -----------------------------------------------------------------------------


def change(path: Path, **keys: Any) -> None:
    """Set keys of model_config, or remove those that are None."""
    meta = path.with_name(path.name.replace("model", "meta")).with_suffix(".json")
    found = json.loads(meta.read_text())
    config = {**found["model_config"], **keys}
    found["model_config"] = {k: v for k, v in config.items() if v is not None}
    meta.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("variant", "keys", "message"),
    [
        ("values", {"softcap": None}, "at 15 or, for some time from 2 March 2026"),
        ("spring", {"softcap": None}, "at 15 or, for some time from 2 March 2026"),
        ("first", {"n_branches": 2}, "model_config: 'n_branches' is not known"),
        ("first", {"window_pattern": "SX"}, "window_pattern is 'SX'"),
        ("first", {"n_layer": "4"}, "an integer from 1"),
        ("first", {"n_head": 0}, "an integer from 1"),
        ("first", {"n_embd": 2**40}, "an integer from 1"),
        ("first", {"n_layer": 2**30}, "num_hidden_layers is"),
        ("first", {"n_layer": 5}, "tensor model.layers.4.self_attn.q_proj.weight is missing"),
        ("first", {"n_layer": 3}, "unexpected tensor"),
        ("first", {"vocab_size": 999}, "has shape"),
        ("summer", {"short_seq_len": -3}, "sliding_window"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused(
    variant: str, keys: dict[str, Any], message: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files.save(base, variant)
    change(path, **keys)
    assert nanollama.main(["--model", str(path), "-p", "x"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "value", [None, [], [1], "text", {}, {"vocab_size": True}, {**files.CONFIG, "softcap": "x"}]
)
def test_a_model_config_that_is_none_is_one_line(value: Any, base: Path) -> None:
    path = files.save(base)
    meta = path.with_name("meta_000007.json")
    meta.write_text(json.dumps({"model_config": value}))
    with pytest.raises(nanollama.CheckpointError, match="model_config"):
        LLM(path)
    meta.unlink()
    with pytest.raises(nanollama.CheckpointError, match="no meta_000007"):
        LLM(path)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"transformer.h.1.attn.ve_gate.weight": (2, 16)}, "no known version of nanochat"),
        ({"transformer.h.1.attn.ve_gate.weight": ()}, "its model_config cannot be"),
        ({"lm_head.weight": ()}, "its model_config cannot be"),
        ({"bigram_lambdas": (4,)}, "unexpected tensor 'model.bigram_lambdas'"),
        ({"value_embeds.0.weight": (320, 32)}, "unexpected tensor 'model.value_embeds.0.weight'"),
    ],
)
def test_parameters_of_experiments_are_refused(
    rename: dict[str, tuple[int, ...]], message: str, base: Path
) -> None:
    path = files.save(base)
    state = torch.load(path, weights_only=True)
    torch.save(state | {name: torch.zeros(shape) for name, shape in rename.items()}, path)
    with pytest.raises(nanollama.CheckpointError, match=message):
        LLM(path)


class Trap:
    """A pickle of this object makes a file when it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_no_pickle_is_run(base: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    path, pickled = files.save(base), base / "tokenizer" / "tokenizer.pkl"
    pickled.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(nanollama.CheckpointError, match="no other pickle is read"):
        LLM(path)
    torch.save({"a": Trap(sprung)}, path)
    with pytest.raises(nanollama.CheckpointError, match="holds more than tensors, and is not loa"):
        LLM(path)
    torch.save([1, 2], path)
    with pytest.raises(nanollama.CheckpointError, match="a tensor is needed"):
        LLM(path)
    path.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(nanollama.CheckpointError, match="no file of tensors"):
        LLM(path)
    assert not sprung.exists()


# ---- text and conversations ----------------------------------------------------------------------


CONTROL = {name: i for i, name in enumerate(files.CONTROL)}


def conversation(*parts: str | tuple[str, str]) -> list[int]:
    """Ids as nanochat's render_conversation makes them: control tokens by name, text as it is."""
    ids = []
    for part in parts:
        if part in CONTROL:
            ids.append(files.NUM_RANKS + CONTROL[str(part)])
        else:
            ids += files.ENCODING.encode_ordinary(str(part))
    return ids


def test_a_conversation_is_rendered_as_nanochat_does(base: Path) -> None:
    llm = LLM(files.save(base))
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi <|assistant_end|>"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
    ]
    expected = conversation(
        *("<|bos|>", "<|user_start|>", "Be kind.\n\nHi <|assistant_end|>", "<|user_end|>"),
        *("<|assistant_start|>", "Hello.", "<|assistant_end|>"),
        *("<|user_start|>", "And?", "<|user_end|>", "<|assistant_start|>"),
    )
    found = llm.prompt_ids(GenerationRequest(messages=messages))
    spelled = files.ENCODING.encode_ordinary("Hi <|assistant_end|>")
    assert llm.decode(found) == llm.decode(expected)
    assert [i for i in found if i >= files.NUM_RANKS] == [
        i for i in expected if i >= files.NUM_RANKS and i not in spelled
    ]


def test_code_and_results_are_shown_and_come_back_as_tokens(base: Path) -> None:
    llm = LLM(files.save(base))
    parts = ("Sum: ", "<|python_start|>", "1+2", "<|python_end|>", "<|output_start|>", "3")
    answer = conversation(*parts, "<|output_end|>", "It is 3.")
    stream = nanollama.TextStream(llm.tokenizer)
    shown = "".join(map(stream.push, answer)) + stream.flush()
    assert shown == "Sum: \n~~~python\n1+2\n~~~\n\n~~~~output\n3\n~~~~\nIt is 3."
    question = [{"role": "user", "content": "1+2?"}]
    turns = [*question, {"role": "assistant", "content": shown}, *question]
    ids = llm.prompt_ids(GenerationRequest(messages=turns))
    start = conversation("<|assistant_start|>")[0]
    at = ids.index(start) + 1
    assert ids[at : at + len(answer)] == answer


def test_messages_out_of_turn_are_joined(base: Path) -> None:
    llm = LLM(files.save(base))
    text = llm.render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    assert text == "<|bos|><|user_start|>a\n\nb<|user_end|><|assistant_start|>"


def test_all_modes_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files.save(base, "summer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    flags = ["--model", "nanochat", "-m", "6", "-t", "0"]
    assert nanollama.main([*flags, "--chat", "-p", "Hello"]) == 0
    answer = capsys.readouterr().out
    (tmp_path / "prompts").write_text("Hello\nthe\n")
    assert nanollama.main([*flags, "--chat", "--batch-file", str(tmp_path / "prompts")]) == 0
    assert capsys.readouterr().out.startswith(answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/quit\n"))
    assert nanollama.main([*flags, "--interactive"]) == 0
    assert answer.strip() in capsys.readouterr().out
    with serving(lambda: LLM("nanochat"), model_id="nanochat") as live:
        choice = live.chat("Hello", temperature=0, max_tokens=6).json()["choices"][0]
        assert choice["message"]["content"] == answer.removesuffix("\n")
    assert nanollama.main(["show", "nanochat"]) == 0
    shown = capsys.readouterr().out
    assert "(nanochat, " in shown
    assert re.search(r"temperature +0\.6 +\(model\)", shown)


def test_the_flags_reach_other_commands(
    base: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files.save(base, place="base_checkpoints/d4")
    text = base / "text.txt"
    text.write_text("the cat and the hat\n" * 4)
    flags = ["--model", str(base), "-i", "base", "--text", str(text), "--json"]
    assert nanollama.main(["eval", *flags]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    ids = [files.NUM_RANKS, *files.ENCODING.encode_ordinary(text.read_text())]
    rows = files.logits("first", ids).log_softmax(-1)
    bits = -sum(float(rows[t, i]) for t, i in enumerate(ids[1:])) / 0.6931471805599453
    assert found["bytes"] == 80
    assert found["bits_per_byte"] == pytest.approx(bits / 80, rel=1e-4)
