"""LLM.trace and LLM.hooks: values against transformers, and neighbours that stay as they are."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from families import ALL
from torch import Tensor

from nanollama import LLM, GenerationRequest, RequestError, SamplingParams
from nanollama_extras.models.tracing import unembed

FAMILIES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "olmo2", "gpt_oss"]
IDS = oracle.random_ids(23, seed=4)
WHAT = ("resid", "attn", "mlp", "q", "k", "v", "patterns", "router", "logits")
PLAIN = ("resid", "attn", "mlp")
PARAMS = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=10, ignore_eos=True)


def load(kind: str, tiny: oracle.Tiny, **options: Any) -> tuple[LLM, Any]:
    name, overrides = ALL[kind]
    path = tiny(name, **overrides)
    return LLM(path, **{"kernels": "torch", "parallel": 4, **options}), path


def reference(path: Any) -> dict[str, Any]:
    """transformers' tensors for IDS under our names; those it does not have are left out."""
    model = oracle.load(path)
    found: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[name] = output

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(keep(f"attn.{i}"))
        layer.mlp.register_forward_hook(keep(f"mlp.{i}"))
        layer.self_attn.v_proj.register_forward_hook(keep(f"v.{i}"))
        if router := getattr(layer.mlp, "gate", getattr(layer.mlp, "router", None)):
            router.register_forward_hook(keep(f"router.{i}"))
    with torch.inference_mode():
        out = model(torch.tensor([IDS]), output_hidden_states=True, output_attentions=True)
    heads = model.config.num_key_value_heads
    last = len(model.model.layers)
    clean: dict[str, Any] = {f"logits.{last}": out.logits[0]}
    for name, value in found.items():
        kind = name.partition(".")[0]
        if kind == "router":
            clean[name] = value
            continue
        tensor = value[0] if isinstance(value, tuple) else value
        tensor = tensor.reshape(len(IDS), -1)
        clean[name] = tensor.unflatten(1, (heads, -1)) if kind == "v" else tensor
    for i in range(last):  # the last of hidden_states is normed
        clean[f"resid.{i}"] = out.hidden_states[i][0]
        clean[f"patterns.{i}"] = out.attentions[i][0]
    return clean


def router_of(value: Any, num_experts: int) -> Tensor:
    """The weight of each expert (T, E), of what a router of transformers returns."""
    parts = [part for part in value if isinstance(part, Tensor)]
    chosen = next(part for part in parts if not part.is_floating_point())
    weights = next(p for p in parts[::-1] if p.is_floating_point() and p.shape == chosen.shape)
    return torch.zeros(len(chosen), num_experts).scatter(1, chosen, weights.float())


@pytest.mark.parametrize("kind", FAMILIES)
def test_traced_tensors_are_those_of_transformers(kind: str, tiny: oracle.Tiny) -> None:
    llm, path = load(kind, tiny)
    has_router = llm.config.experts is not None
    found = llm.trace(IDS, what=[w for w in WHAT if has_router or w != "router"])
    expected = reference(path)
    compared = set()
    for name, theirs in expected.items():
        ours, part = found[name], name.partition(".")[0]
        theirs = router_of(theirs, ours.shape[1]) if part == "router" else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4, msg=lambda m, n=name: n + m)
        compared.add(part)
    assert compared >= {"resid", "attn", "mlp", "v", "patterns", "logits"}
    assert ("router" in compared) == has_router
    last = llm.config.n_layers
    torch.testing.assert_close(
        unembed(llm.decoder, found[f"resid.{last}"]), found[f"logits.{last}"], rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_patterns_follow_from_queries_and_keys_and_give_the_values(
    kind: str, tiny: oracle.Tiny
) -> None:
    llm, _ = load(kind, tiny)
    found = llm.trace(IDS, what=("q", "k", "v", "patterns"))
    config = llm.config
    for i in range(config.n_layers):
        q, k = (
            found[f"q.{i}"],
            found[f"k.{i}"].repeat_interleave(config.n_heads // config.n_kv_heads, 1),
        )
        scores = torch.einsum("thd,shd->hts", q, k) * (config.attn_scale or q.shape[2] ** -0.5)
        weights = found[f"patterns.{i}"]
        seen = weights > 0
        ratio = torch.where(seen, weights.log() - scores, torch.nan)
        shift = ratio.nanmean(dim=-1, keepdim=True)  # of each softmax
        assert torch.nan_to_num(ratio - shift).abs().max() < 1e-3
        assert (seen.sum(-1) <= torch.arange(1, len(IDS) + 1)).all(), "no token looks ahead"


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3_text"])
def test_a_trace_is_what_the_model_computes_bit_for_bit(
    kind: str, kernels: str, tiny: oracle.Tiny
) -> None:
    quantize = "q8" if kernels == "native" else None
    llm, _ = load(kind, tiny, kernels=kernels, quantize=quantize, prefill_chunk=8)
    logits = llm.logits(IDS)
    last = llm.config.n_layers
    found = llm.trace(IDS, what=(*PLAIN, "logits"))
    assert torch.equal(found[f"logits.{last}"], logits)
    assert torch.equal(unembed(llm.decoder, found[f"resid.{last}"]), logits)
    whole = llm.trace(IDS, what=("patterns", "q", "logits"))
    if kernels == "torch":
        assert torch.equal(whole[f"logits.{last}"], logits)
    torch.testing.assert_close(whole[f"logits.{last}"], logits, rtol=0, atol=0.05)


def test_names_layers_and_shapes(tiny: oracle.Tiny) -> None:
    llm, _ = load("llama", tiny)
    found = llm.trace("the quick fox", layers=[1, -2], what=("resid", "q", "patterns"))
    T = len(llm.encode("the quick fox"))
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    one = {"resid": (T, 64), "q": (T, 4, 16), "patterns": (4, T, T)}
    assert shapes == {f"{kind}.{i}": shape for i in (0, 1) for kind, shape in one.items()}
    assert {n.partition(".")[0] for n in llm.trace([5, 6])} == set(PLAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": ("router",)}, "this model has no 'router'; it has resid, attn, mlp, q, k, v"),
        ({"what": ("resids",)}, "no 'resids'"),
        ({"layers": [3]}, "layer 3 is not one of 0 to 2"),
    ],
)
def test_what_a_model_does_not_have_cannot_be_traced(
    options: dict[str, Any], message: str, tiny: oracle.Tiny
) -> None:
    llm, _ = load("llama", tiny)
    with pytest.raises(RequestError, match=message):
        llm.trace(IDS, **options)
    for ids in ([], [320]):
        with pytest.raises(RequestError):
            llm.trace(ids)


# ---- hooks ---------------------------------------------------------------------------------------


def answer(llm: LLM, ids: list[int] = IDS) -> list[int]:
    return llm.complete(GenerationRequest(ids, params=PARAMS)).token_ids


WAYS: list[dict[str, Any]] = [{"kernels": "torch"}, {"kernels": "native", "quantize": "q8"}]


@pytest.mark.parametrize("options", WAYS, ids=["torch", "native"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3_text"])
def test_hooks_that_look_see_each_token_once_and_change_nothing(
    kind: str, options: dict[str, Any], tiny: oracle.Tiny
) -> None:
    llm, _ = load(kind, tiny, **options, prefill_chunk=8)
    expected, rows = answer(llm), []
    with llm.hooks({"resid.1": lambda x, at: rows.append((x, at))}):
        assert answer(llm) == expected
    positions = [p for _, at in rows for p in at.positions]
    assert positions == list(range(len(IDS) + PARAMS.max_tokens - 1))  # type: ignore[operator]
    traced = llm.trace([*IDS, *expected[:-1]], layers=[1], what=["resid"])["resid.1"]
    assert torch.equal(torch.cat([x for x, _ in rows]), traced)
    assert answer(llm) == expected
    assert len(rows) == len({id(x) for x, _ in rows}), "the block has ended"


@pytest.mark.parametrize("options", WAYS, ids=["torch", "native"])
@pytest.mark.parametrize(
    "name", ["resid.1", "attn.0", "mlp.1", "q.0", "k.1", "v.0", "patterns.1", "logits.2"]
)
def test_a_hook_may_replace_a_tensor(name: str, options: dict[str, Any], tiny: oracle.Tiny) -> None:
    llm, _ = load("llama", tiny, **options)
    plain = llm.trace(IDS, what=["logits"])["logits.2"]
    changed: dict[str, Tensor] = {}
    with llm.hooks({name: lambda x, at: -x}):
        changed = llm.trace(IDS, what=["logits"])
        other = answer(llm)
    assert not torch.equal(changed["logits.2"], plain)
    assert answer(llm) != other
    with llm.hooks({name: lambda x, at: x.clone()}):
        same = llm.trace(IDS, what=["logits"])["logits.2"]
    torch.testing.assert_close(same, plain, rtol=0, atol=0.05)


def test_a_head_that_is_ablated_is_a_head_whose_output_is_zero(tiny: oracle.Tiny) -> None:
    llm, path = load("llama", tiny)
    model = oracle.load(path)

    def without_head(module: Any, inputs: Any) -> Any:
        x = inputs[0].clone()
        x[..., 16:32] = 0
        return (x,)

    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(without_head)

    def ablate(x: Tensor, at: Any) -> Tensor:
        x[1] = 0
        return x

    with llm.hooks({"patterns.0": ablate}):
        found = llm.trace(IDS, what=["logits"])["logits.2"]
    torch.testing.assert_close(found, oracle.logits(model, IDS), rtol=0, atol=1e-4)


def test_a_patched_layer_carries_the_rest_of_another_text(tiny: oracle.Tiny) -> None:
    """The stream of one text in the place of another one gives the first one's logits."""
    llm, _ = load("llama", tiny)
    other = oracle.random_ids(len(IDS), seed=9)
    stream = llm.trace(other, what=["resid", "logits"])
    with llm.hooks(
        {"resid.1": lambda x, at: stream["resid.1"][at.positions.start : at.positions.stop]}
    ):
        patched = llm.trace(IDS, what=["logits"])
    assert torch.equal(patched["logits.2"], stream["logits.2"])


def test_a_router_may_be_told_which_experts_to_ask(tiny: oracle.Tiny) -> None:
    llm, _ = load("qwen3_moe", tiny)

    def first_two(x: Tensor, at: Any) -> Tensor:
        shares = torch.zeros_like(x)
        shares[:, :2] = 0.5
        return shares

    with llm.hooks({"router.*": first_two}):
        found = llm.trace(IDS, what=["router"])
    assert all(
        (shares[:, :2] == 0.5).all() and not shares[:, 2:].any() for shares in found.values()
    )


@pytest.mark.parametrize("options", WAYS, ids=["torch", "native"])
def test_neighbours_in_a_batch_stay_the_same_bit_for_bit(
    options: dict[str, Any], tiny: oracle.Tiny
) -> None:
    llm, _ = load("qwen3_moe", tiny, **options)
    params = SamplingParams(seed=1, max_tokens=12, logprobs=3, ignore_eos=True)
    requests = [
        GenerationRequest(oracle.random_ids(9 + i, seed=i), params=params) for i in range(3)
    ]
    expected = [llm.complete(r) for r in requests]
    llm.forget()
    sequences = [llm.start(request, i) for i, request in enumerate(requests[:2])]
    with llm.hooks({"resid.1": lambda x, at: -x, "router.0": lambda x, at: x.flip(1)}):
        hooked = llm.start(requests[2], 2)
    while llm.engine.has_work:
        llm.engine.step()
    for seq, alone in zip(sequences, expected):
        deltas = [d for d in seq.take() if d.token_id is not None]
        assert [d.token_id for d in deltas] == alone.token_ids
        assert [d.logprobs for d in deltas] == alone.logprobs
    assert [d.token_id for d in hooked.take()] != expected[2].token_ids
    again = llm.complete(requests[2])
    assert (again.token_ids, again.usage.cached_tokens) == (expected[2].token_ids, 0)


def test_an_error_of_a_hook_ends_its_own_request(tiny: oracle.Tiny) -> None:
    llm, _ = load("llama", tiny)
    expected = answer(llm)

    def broken(x: Tensor, at: Any) -> None:
        if at.positions.start >= len(IDS):
            raise ValueError("no more")

    neighbour = llm.start(GenerationRequest(IDS, params=PARAMS))
    with (
        llm.hooks({"mlp.0": broken}),
        pytest.raises(RequestError, match="a hook failed: ValueError"),
    ):
        answer(llm)
    while llm.engine.has_work:
        llm.engine.step()
    assert [d.token_id for d in neighbour.take()] == expected
    with (
        llm.hooks({"mlp.0": lambda x, at: x[:, :3]}),
        pytest.raises(RequestError, match=r"a hook of mlp.0 gives \(23, 3\) for \(23, 64\)"),
    ):
        answer(llm)
    with (
        pytest.raises(RequestError, match=r"no tensor is called 'mpl\.0'"),
        llm.hooks({"mpl.0": broken}),
    ):
        pass


def test_hooks_of_other_threads_and_models_do_not_count(tiny: oracle.Tiny) -> None:
    from concurrent.futures import ThreadPoolExecutor

    llm, path = load("llama", tiny)
    other, expected = LLM(path, kernels="torch"), answer(llm)
    with llm.hooks({"resid.0": lambda x, at: x * 0}), ThreadPoolExecutor(1) as pool:
        assert pool.submit(answer, llm).result() == expected
        assert answer(other) == expected
        assert answer(llm) != expected
    assert answer(llm) == expected


def test_embeddings_pass_through_hooks(tiny: oracle.Tiny) -> None:
    llm, _ = load("llama", tiny)
    (plain,) = llm.embed([IDS])
    with llm.hooks({"resid.2": lambda x, at: x.clone()}):
        assert llm.embed([IDS]) == [plain]
    with llm.hooks({"resid.2": lambda x, at: x.flip(1)}):
        assert llm.embed([IDS]) != [plain]


@pytest.mark.parametrize(
    "kind",
    [
        k
        for k in ALL
        if k
        in ("falcon_h1", "qwen3_next", "gemma3n_text", "gemma4_text", "deepseek_v3", "nemotron_h")
    ],
)
def test_other_kinds_of_layers_are_traced_too(kind: str, tiny: oracle.Tiny) -> None:
    llm, _ = load(kind, tiny)
    last = llm.config.n_layers
    found = llm.trace(IDS, what=("resid", "logits"))
    torch.testing.assert_close(found[f"logits.{last}"], llm.logits(IDS), rtol=0, atol=1e-4)
    with llm.hooks({"*.1": lambda x, at: None}):
        assert answer(llm) == answer(llm)
