"""Section 2: config.json in both spellings against transformers, and values that make no sense."""

from __future__ import annotations

import copy
import functools
import json
import re
from typing import Any

import families
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats_fuzz import places

import nanollama
from nanollama import CheckpointError, EngineConfig, RequestError, SamplingParams, model_config
from nanollama_extras.models import ropes
from nanollama_extras.models.routing import Routing

DIMENSIONS = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SAME = {"kimi_k2": "deepseek_v3"}  # as transformers calls it
CONFIGS = {
    name: transformers.CONFIG_MAPPING[SAME.get(name, name)] for name in nanollama.all_families()
}
# what a family's config must say to be supported
GIVEN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "bitnet": {"num_key_value_heads": 4},  # 5 do not divide the heads
    # columns of a head that time, height and width share
    "qwen2_vl_text": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "qwen2_5_vl_text": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "glm4v_moe_text": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "glm4v_text": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},  # 15 are more than there are
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16}
    | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention"]},
}


def of(model_type: str = "llama", **values: Any) -> nanollama.ModelConfig:
    return model_config({"model_type": model_type, **DIMENSIONS, **values}, "dir/config.json")


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Each layer's window as transformers' modelling code reads its config; 0: without keys."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or None
    by_kind = {"sliding_attention": window, "full_attention": None}
    by_kind["hybrid"] = None
    by_kind["chunked_attention"] = getattr(config, "attention_chunk_size", None)
    return tuple(by_kind.get(kind, 0) for kind in kinds)


def assert_equal_configs(ours: nanollama.ModelConfig, theirs: Any) -> None:
    layers = getattr(theirs, "per_layer_config", None) or [theirs]
    last, first = (layers[i] for i in (len(layers) - 1, 0))
    if ours.window_heads:
        assert ours.window_heads == (first.num_key_value_heads, first.head_dim)
    head_dim, is_latent = getattr(last, "head_dim", None), hasattr(theirs, "kv_lora_rank")
    if is_latent:
        assert (ours.n_kv_heads, ours.kv_planes) == (1, 1)
        assert ours.head_dim == theirs.kv_lora_rank + theirs.qk_rope_head_dim
        assert ours.rope["n_rot"] == theirs.qk_rope_head_dim
        s, names = ours.own["latent"], ("q_lora_rank", "qk_nope_head_dim", "v_head_dim")
        assert (s.q_latent, s.nope, s.v_dim) == tuple(getattr(theirs, name) for name in names)
    else:
        assert ours.n_kv_heads == last.num_key_value_heads
        assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.n_ctx == theirs.max_position_embeddings
    eps = (
        getattr(theirs, key, None)
        for key in "rms_norm_eps layer_norm_eps norm_epsilon norm_eps layer_norm_epsilon".split()
    )
    assert ours.norm_eps == next(filter(None, eps))
    assert ours.tie_embeddings == getattr(theirs, "tie_word_embeddings", False)
    assert ours.windows == windows_of(theirs)
    kinds, rope = nanollama.LAYER_TYPES, getattr(theirs, "rope_parameters", {})
    nested = [rope[kind] for kind in kinds] if kinds[0] in rope else [rope]
    for our_rope, their_rope in zip(ours.ropes, nested):
        read = their_rope.keys() - {"type", "max_position_embeddings"}
        read -= {"partial_rotary_factor"} if is_latent else set()
        read -= {"rope_type"} if our_rope["rope_type"] == "mrope" else set()  # theirs is default
        assert {key: our_rope[key] for key in read} == {key: their_rope[key] for key in read}
    assert ours.attn_softcap == (getattr(theirs, "attn_logit_softcapping", 0) or 0)
    assert ours.logit_softcap == (getattr(theirs, "final_logit_softcapping", 0) or 0)
    if experts := ours.experts:
        assert experts.count == getattr(theirs, "num_experts", None) or theirs.num_local_experts
        assert experts.num_used == theirs.num_experts_per_tok
        assert experts.n_ff == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        is_plain = not {"input_jitter_noise", "moe_layers"} & {*vars(theirs)}
        assert experts.renormalized == getattr(theirs, "norm_topk_prob", is_plain)
        shared = getattr(theirs, "shared_expert_intermediate_size", 0)
        names = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
        num_dense = sum(getattr(theirs, name, 0) for name in names)
        blocks = getattr(theirs, "layers_block_type", [])
        if "moe" in blocks:
            num_dense = len(blocks) - blocks.count("moe")
        num_dense += getattr(theirs, "mlp_layer_types", []).count("dense")
        assert (experts.n_ff_shared, len(experts.layers)) == (shared, ours.n_layers - num_dense)
        router = ours.own.get("routing", Routing())
        names = ("n_shared_experts", "moe_num_shared_experts")
        num_shared = sum(getattr(theirs, name, 0) for name in names) + hasattr(theirs, "moe_layers")
        names = ("moe_shared_expert_intermediate_size", "shared_intermediate_size")
        widths = [vars(theirs)[name] for name in names if name in vars(theirs)]
        assert router.n_ff_shared == (widths[0] if widths else num_shared * experts.n_ff)
        assert router.factor == getattr(theirs, "routed_scaling_factor", 1)
        assert router.num_groups == (getattr(theirs, "n_group", 1) or 1)
        assert router.groups_used == (getattr(theirs, "topk_group", 1) or 1)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_a_config_leaves_out_is_as_in_transformers(model_type: str) -> None:
    given = GIVEN.get(model_type, {})
    assert_equal_configs(of(model_type, **given), CONFIGS[model_type](**{**DIMENSIONS, **given}))


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {"num_key_value_heads": None, "head_dim": None, "sliding_window": 8}),
        ("mistral", {"sliding_window": None, "head_dim": None}),
        ("qwen2", {"num_key_value_heads": None}),
        ("mistral", {"sliding_window": 8, "num_key_value_heads": 4, "head_dim": 16}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        ("qwen3", {"rope_theta": 1e6, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    ],
)
def test_given_values_and_nulls_are_read_as_in_transformers(
    model_type: str, values: dict[str, Any]
) -> None:
    theirs = CONFIGS[model_type](**DIMENSIONS, **values)
    if model_type == "llama":  # llama has no window, whatever its config.json says
        theirs.sliding_window = None
    assert_equal_configs(of(model_type, **values), theirs)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_both_spellings_of_rope_are_one(kind: str) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    new = of(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling})
    old = of(rope_theta=5e5, rope_scaling={kind: "yarn", **scaling}, torch_dtype="float32")
    assert new == old


def test_the_embedding_length_before_scaling_defaults_to_the_full_context() -> None:
    config = of(rope_scaling={"type": "yarn", "factor": 2.0}, max_position_embeddings=77)
    assert config.rope["original_max_position_embeddings"] == 77
    config = of(
        rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 5},
        original_max_position_embeddings=9,
    )
    assert config.rope["original_max_position_embeddings"] == 9


def test_an_unsupported_architecture_is_refused_with_the_supported_ones() -> None:
    for raw in ({"model_type": "mamba"}, {}, {"model_type": ["llama"]}):
        with pytest.raises(CheckpointError, match=r"x\.json: model_type .* llama, .* qwen2"):
            model_config(raw, "x.json")


def test_what_the_arithmetic_does_not_cover_is_refused_by_name() -> None:
    for values, named in [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.2}, "rope turns 1 of the 8 columns"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope_section is None"),
        ({"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ({"quantization_config": {"quant_method": "vptq"}}, "quantization_config .*vptq"),
    ]:
        with pytest.raises(CheckpointError, match=named):
            of(**values)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": "256"}, "hidden_size is '256'"),
        ({"hidden_size": 256.0}, "hidden_size is 256.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 16}, "head_dim is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647"),
        ({"head_dim": 2**31 - 2}, "head_dim is 2147483646"),
        ({"head_dim": 7}, "width must be even"),
        ({"num_key_value_heads": 3}, "32 heads .* over 3 key/value heads"),
        ({"num_attention_heads": list(range(10**6))}, r"num_attention_heads is \[0, 1, 2, 3, 4, 5"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; a number from 1e-15 to 1e15 is needed"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; a number above 1 is needed"),
        ({"rope_scaling": "yarn"}, "rope_parameters is 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {**YARN, "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {**YARN, "beta_fast": "32"}}, "beta_fast is '32'"),
        ({"rope_scaling": {**YARN, "attention_factor": -1}}, "attention_factor is -1"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "low_freq_factor is above"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type \['yarn'\]"),
        ({"quantization_config": {"quant_method": []}}, "quantization_config"),
        ({"quantization_config": [1]}, r"quantization_config \[1\]"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_its_file(
    values: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=r"^dir/config\.json: .*" + named) as caught:
        of(**values)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sliding_window": "8"}, "sliding_window '8'"),
        ({"sliding_window": -1}, "sliding_window -1"),
        ({"sliding_window": 8, "max_window_layers": "2"}, "from layer '2'"),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
        ({"sliding_window": 8, "layer_types": ["chunked"] * 3}, "layer_types"),
        ({"sliding_window": 8, "layer_types": [[]] * 3}, "layer_types"),
    ],
)
def test_windows_that_make_no_sense_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        of("mistral", **values)


@pytest.mark.parametrize(
    ("rope", "n_ctx"),
    [
        ({"type": "linear", "factor": 4.0}, 2048),
        ({"type": "dynamic", "factor": 4.0}, 2048),
        ({"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"type": "yarn", "factor": 4.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({**LLAMA3, "original_max_position_embeddings": 128}, 512),
        ({"type": "linear", "factor": 1e9}, 2**31 - 1),
        (None, 512),
    ],
)
def test_a_factor_stretches_the_original_context(rope: Any, n_ctx: int) -> None:
    assert of("qwen2", rope_scaling=rope, max_position_embeddings=512).n_ctx == n_ctx


def test_the_context_of_gemma_3_is_the_stretched_one() -> None:
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    for rope in (linear, {"full_attention": linear, "sliding_attention": {"rope_theta": 1e4}}):
        config = of("gemma3_text", rope_parameters=rope, max_position_embeddings=4096)
        assert (config.n_ctx, len(config.ropes)) == (4096, 2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ROPE = st.sampled_from([*nanollama.ROPE_NUMBERS, *ropes.NUMBERS]).flatmap(
    lambda kind: st.fixed_dictionaries(
        {"rope_type": st.just(kind), "factor": st.floats() | st.integers()},
        optional={
            key: st.floats() | JSON
            for key in (
                "rope_theta low_freq_factor high_freq_factor original_max_position_embeddings "
                "beta_fast beta_slow attention_factor mscale mscale_all_dim truncate alpha "
                "partial_rotary_factor llama_4_scaling_beta short_factor long_factor"
            ).split()
        },
    )
)
KEYS = st.sampled_from(
    [
        *DIMENSIONS,
        *"model_type num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta "
        "rope_scaling rope_parameters partial_rotary_factor sliding_window use_sliding_window "
        "max_window_layers layer_types tie_word_embeddings attention_bias mlp_bias hidden_act "
        "original_max_position_embeddings quantization_config num_experts num_local_experts "
        "num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size norm_topk_prob "
        "mlp_only_layers decoder_sparse_step no_rope_layers no_rope_layer_interval logit_scale "
        "logits_scaling embedding_multiplier residual_multiplier attention_multiplier "
        "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping text_config "
        "sliding_window_pattern rope_local_base_freq layer_norm_eps hidden_activation".split(),
    ]
)


@settings(max_examples=400)
@given(st.sampled_from(list(CONFIGS)), st.dictionaries(KEYS, JSON, max_size=4), st.none() | ROPE)
def test_any_config_is_either_usable_or_refused_in_one_line(
    model_type: str, values: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    if rope is not None:
        values["rope_parameters"] = rope
    values.setdefault("model_type", model_type)
    try:
        config = model_config({**DIMENSIONS, **values}, "dir/config.json")
    except CheckpointError as error:
        message = str(error)
    else:
        message = "dir/config.json: usable"
        for parameters in config.ropes:
            rope = nanollama.make_rope(parameters, config.head_dim)
            assert torch.isfinite(rope.freqs).all()
            assert ((rope.scales > 0) & (rope.scales < float("inf"))).all()
        assert len(config.windows) == len(config.layer_ropes) == config.n_layers
        assert config.rope["n_rot"] <= config.head_dim
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message


def saved_config(name: str) -> Any:
    """The config.json of a tiny model of a family."""
    kind, values = families.ALL[name]
    theirs = getattr(transformers, f"{kind}Config")(**{**DIMENSIONS, **SMALL, **values})
    return json.loads(theirs.to_json_string(use_diff=False))


SAVED = {name: saved_config(name) for name in families.ALL}
ODD = JSON | st.sampled_from(
    [10**400, 2**70, -1, 1e300, {"rope_type": []}, {"full_attention": 5, "sliding_attention": {}}]
)


@pytest.mark.parametrize("is_version_4", [False, True])
@settings(max_examples=400)
@given(st.sampled_from([*SAVED]), st.data())
def test_any_value_anywhere_in_a_familys_config_is_usable_or_refused(
    is_version_4: bool, name: str, data: st.DataObject
) -> None:
    raw = copy.deepcopy(SAVED[name])
    if is_version_4:  # rope_theta beside rope_scaling
        rope = raw["rope_scaling"] = raw.pop("rope_parameters", {})
        raw["rope_theta"] = rope.pop("rope_theta", 1e4)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(sorted(list(places(raw))[1:], key=repr)))
        parent = functools.reduce(lambda value, key: value[key], place[:-1], raw)
        parent[place[-1]] = copy.deepcopy(data.draw(ODD))
    message = "config.json: usable"
    try:
        config = model_config(raw, "config.json")
        for parameters in config.ropes:
            nanollama.make_rope(parameters, config.head_dim)
    except CheckpointError as error:
        message = str(error)
    assert re.fullmatch("config.json: .{3,900}", message)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "rope",
    [
        5,
        [],
        "yarn",
        {"full_attention": 5},
        {"full_attention": {"rope_theta": 1e4}, "sliding_attention": [1]},
        {"full_attention": "yarn", "sliding_attention": {}},
    ],
)
def test_a_rope_that_is_no_object_is_named(key: str, rope: Any) -> None:
    values = {key: rope} if rope else {key: [1]}
    with pytest.raises(CheckpointError, match=r"^dir/config.json: rope_parameters is .* an object"):
        of("qwen2", **values)


def test_the_size_of_keys_and_values_counts_both() -> None:
    assert of(num_key_value_heads=4).kv_bytes(10, "float16") == 2 * 3 * 4 * 8 * 10 * 2
    assert of(num_key_value_heads=4).kv_bytes(10, "q8") == 2 * 3 * 4 * (8 + 2) * 10


# ---- SamplingParams and EngineConfig -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("min_p", -1),
        ("repeat_penalty", 0),
        ("repeat_last_n", -2),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("inf")),
        ("seed", 2**64),
        ("seed", 1.0),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("stop", "text"),
        ("stop", ("",)),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_sampling_values_that_make_no_sense_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_the_limits_of_sampling_values_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repeat_penalty=1, repeat_last_n=-1)
    SamplingParams(
        seed=2**64 - 1, max_tokens=None, logprobs=0, stop=("a", "b"), logit_bias={0: -100}
    )


def test_minus_one_is_a_random_seed_and_no_top_k() -> None:
    """As in vLLM, Ollama and llama.cpp."""
    params = SamplingParams(seed=-1, top_k=-1)
    assert (params.seed, params.top_k) == (None, 0)
    nanollama.set_parameter(fields := {}, "seed", "-1")
    assert fields == {"seed": -1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int8"),
        ("quantize", "q2"),
        ("ctx", 0),
        ("parallel", -1),
        ("prefill_chunk", 0),
        ("threads", 0),
    ],
)
def test_engine_values_that_make_no_sense_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is {value!r}"):
        EngineConfig(**{name: value})


def test_a_config_saved_by_transformers_reads_back_as_it_was(tmp_path: Any) -> None:
    for model_type, make in CONFIGS.items():
        theirs = make(**{**DIMENSIONS, "rope_theta": 12345.0, **GIVEN.get(model_type, {})})
        theirs.save_pretrained(tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
        ours = model_config(raw, "config.json")
        if model_type == "llama":
            theirs.sliding_window = None
        assert_equal_configs(ours, theirs)
