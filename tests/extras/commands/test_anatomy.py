"""`explain`: its counts are those of transformers and of the loaded model, its drawings the code's
own, and of a model on the hub it reads headers only."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import gguf_files
import oracle
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from torch.utils.flop_counter import FlopCounterMode

import nanollama
from nanollama import LLM, EngineConfig, open_checkpoint
from nanollama_extras.commands import anatomy, bench
from nanollama_extras.files import headers
from nanollama_extras.models.dissection import dissect, kernel_lines
from nanollama_extras.models.part_times import part_times
from nanollama_extras.models.sketch import sketch

CHROMIUM = shutil.which("chromium")
Tiny = Callable[..., Path]
Json = dict[str, Any]
KINDS: dict[str, tuple[str, Json]] = {
    "dense": ("Llama", {"tie_word_embeddings": False}),
    "tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "moe": families.ROWS["qwen2_moe"],
    "hybrid": families.ROWS["qwen3_next"],
    "mamba": families.ROWS["granitemoehybrid"],
    "mla": families.ROWS["deepseek_v3"],
    "gemma": families.ROWS["gemma2"],
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def path_of(kind: str, tiny: Tiny) -> Path:
    name, overrides = KINDS[kind]
    return tiny(name, **overrides)


def dissected(path: Path, depth: int = 0, **options: Any) -> Json:
    checkpoint = open_checkpoint(path)
    return dissect(checkpoint, *sketch(checkpoint, EngineConfig(**options)), depth)


def matrix_bytes(decoder: nanollama.Decoder) -> int:
    return sum({id(each): each.nbytes for each in oracle.matrices(decoder)}.values())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of the machine that take no time."""
    monkeypatch.setattr(bench, "BANDWIDTH_S", 0.001)
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 1 << 16)
    monkeypatch.setattr(anatomy, "ARITHMETIC_S", 0.001)


@pytest.fixture
def explain(quick: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*argv: object) -> str:
        assert nanollama.main(["explain", *map(str, argv)]) == 0
        return capsys.readouterr().out

    return run


# ---- counts --------------------------------------------------------------------------------------


@every_kind
def test_parameters_are_those_of_transformers(kind: str, tiny: Tiny) -> None:
    import transformers

    path = path_of(kind, tiny)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path)
    tensors = {t.data_ptr(): t.numel() for t in model.state_dict().values()}
    found = dissected(path)
    assert found["weights"]["parameters"] == sum(tensors.values())
    rows = [row for group in found["groups"] for row in group["tensors"] * len(group["layers"])]
    assert sum(row["parameters"] for row in rows + found["outside"]) == sum(tensors.values())


def test_parameters_of_a_gguf_are_those_of_its_tensors(tiny: Tiny, tmp_path: Path) -> None:
    file, _ = gguf_files.convert(tiny("Qwen3", head_dim=32), tmp_path / "model.gguf", "Q8_0")
    checkpoint = open_checkpoint(file)
    assert dissected(file)["weights"]["parameters"] == checkpoint.num_parameters


@every_kind
@pytest.mark.parametrize("options", [{"kernels": "torch"}, {}, {"quantize": "q4"}], ids=str)
def test_bytes_are_those_of_the_loaded_model(kind: str, options: Json, tiny: Tiny) -> None:
    path = path_of(kind, tiny)
    decoder, weights = sketch(open_checkpoint(path), EngineConfig(**options))
    sketched = matrix_bytes(decoder)
    assert sketched == matrix_bytes(LLM(path, **options).engine.decoder)
    assert sketched <= sum(taken.num_bytes for taken in weights.taken.values())


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS", "BF16"])
def test_bytes_of_a_gguf_are_those_of_the_loaded_model(
    type_name: str, kernels: str, tiny: Tiny, tmp_path: Path
) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    path = tiny("Llama", **shape, vocab_size=330)  # no multiple of 16 rows
    file, _ = gguf_files.convert(path, tmp_path / "model.gguf", type_name)
    decoder, _ = sketch(open_checkpoint(file), EngineConfig(kernels=kernels))
    assert matrix_bytes(decoder) == matrix_bytes(LLM(file, kernels=kernels).engine.decoder)


@every_kind
def test_bytes_of_keys_values_and_states_are_those_of_the_cache(kind: str, tiny: Tiny) -> None:
    path = path_of(kind, tiny)
    llm = LLM(path, parallel=1)
    found, cache = dissected(path), llm.engine.decoder.new_cache(1)
    sizes = []
    for num_tokens in (512, 1024):
        cache.reserve(0, num_tokens)
        sizes.append(cache.nbytes)
    assert (sizes[1] - sizes[0]) / 512 == found["kv"]["bytes_per_token"]
    assert 4 * getattr(cache, "num_floats", 0) == found["kv"]["state_bytes"]
    assert (found["kernels"], found["kv_dtype"]) == (
        llm.engine.decoder.kernels,
        llm.engine.decoder.kv_dtype,
    )


@pytest.mark.parametrize("kind", ["dense", "tied"])
def test_multiply_adds_are_half_of_the_operations_that_torch_counts(kind: str, tiny: Tiny) -> None:
    import transformers

    path = path_of(kind, tiny)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(path, attn_implementation="eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.tensor([[5]]), use_cache=False)
    assert dissected(path, depth=1)["token"]["multiply_adds"] == counter.get_total_flops() / 2


def test_a_token_reads_the_experts_that_it_uses(tiny: Tiny) -> None:
    found = dissected(path_of("moe", tiny), kernels="torch")
    experts = found["parts"]["experts"]
    assert experts["used_parameters"] * 3 == experts["parameters"]  # 2 of 6
    assert experts["read_bytes"] * 3 == experts["bytes"]
    table = found["parts"]["embedding"]
    assert table["read_bytes"] * found["vocabulary"] == table["bytes"]


def test_a_token_reads_what_bench_says(tiny: Tiny) -> None:
    path = path_of("dense", tiny)
    decoder = LLM(path, quantize="q8").engine.decoder
    found = dissected(path, depth=100, quantize="q8")["parts"]
    products = [found[name]["read_bytes"] for name in ("attention", "MLP", "head")]
    keys = decoder.config.kv_bytes(100, decoder.kv_dtype)
    assert sum(products) - keys == bench.weight_bytes(decoder)


# ---- drawings and code ---------------------------------------------------------------------------


def layer_drawing(path: Path) -> str:
    return "\n".join(anatomy.drawing(dissected(path, kernels="torch")["groups"][0]))


def test_a_layer_is_drawn_as_it_is_connected(tiny: Tiny) -> None:
    shown = re.sub(r"  \[.*\]", "", layer_drawing(path_of("dense", tiny)))
    assert (
        shown
        == """\
  x
  |
  +---.
  |   | input_layernorm
  |   | attention: 4 heads over 2 key/value heads of 16
  |   |   q_proj | k_proj | v_proj  64 -> 64 + 32 + 32
  |   |   softmax(q k) v over all tokens so far
  |   |   o_proj  64 -> 64
  +<--'  added
  |
  +---.
  |   | post_attention_layernorm
  |   | MLP (swiglu)
  |   |   gate_proj | up_proj  64 -> 96 + 96
  |   |   down_proj  96 -> 64
  +<--'  added
  v"""
    )


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("olmo2", "  |   | post_self_attn_layernorm\n  +<--'  added"),
        ("cohere2", "  |  (reads what the branch above reads)\n  |   .\n  |   | input_layernorm"),
        ("mistral", "softmax(q k) v over the last 8 tokens"),
        ("qwen3_next", "gated delta net"),
        ("qwen3_next", "the best 2 of 5: gate_proj | up_proj"),
        ("deepseek_v3", "k_b_proj  32 -> 64, for each of 4 heads"),
        ("falcon_h1", "mamba: mamba2"),
        ("nemotron_h", "a state of"),
        ("gemma3n_text", "blocks, which this layer connects by arithmetic of its own:"),
    ],
)
def test_a_drawing_has_the_parts_of_the_family(name: str, line: str, tiny: Tiny) -> None:
    prefix, overrides = families.ROWS[name]
    assert line in layer_drawing(tiny(prefix, **overrides))


def test_every_family_can_be_explained(tiny: Tiny) -> None:
    """Those whose tiny models other tests have made."""
    for name in (
        "gemma3n_text",
        "gemma4_text",
        "lfm2",
        "nanochat",
        "llama4_text",
        "gpt_oss",
        "apertus",
        "bitnet",
    ):
        prefix, overrides = families.ROWS[name]
        found = dissected(tiny(prefix, **overrides), depth=4)
        assert all(group["blocks"] for group in found["groups"])


def test_places_in_the_code_are_right(tiny: Tiny) -> None:
    root = Path(nanollama.__file__).parent
    found = dissected(path_of("mla", tiny))
    block = found["groups"][0]["blocks"]["self_attn"]
    for place, text in (
        (block["code"], "def __call__("),
        (kernel_lines()["linear"], "void linear("),
        (found["decoder"]["code"], "def hidden("),
    ):
        file, _, line = place.rpartition(":")
        assert text in (root / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert block["code"].startswith("nanollama_extras/models/mla.py:")


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("kind", ["dense", "moe", "hybrid", "mla"])
def test_the_parts_of_a_step_are_timed(kind: str, kernels: str, tiny: Tiny) -> None:
    llm = LLM(path_of(kind, tiny), kernels=kernels, parallel=1)
    before = llm.complete("the quick", max_tokens=4, temperature=0).text
    found = part_times(llm, 20, num_rounds=2)
    assert min(part["seconds"] for part in found["parts"].values()) > 0
    mixers = [name.partition(", over keys")[0] for name in found["parts"] if "over keys" in name]
    assert len(mixers) == 1
    assert {"embedding", "head", f"{mixers[0]}, its matrices"} <= {*found["parts"]}
    assert found["step_s"] > 0
    if llm.engine.decode_steps:
        assert "recorded" in found["method"]
        names = {name for part in found["parts"].values() for name in part["kernels"]}
        assert {"linear", "attention", "gather"} <= names
    assert llm.complete("the quick", max_tokens=4, temperature=0).text == before


def test_the_command_prints_all_of_it(explain: Callable[..., str], tiny: Tiny) -> None:
    shown = explain(path_of("moe", tiny), "--run", "--depth", 20)
    for line in (
        r"parameters    [\d.]+ k, [\d.]+ k for each token",
        r"memory        .*/s: at most [\d.]+ tokens/s",
        r"bound         [\d.]+ tokens/s, by (memory|arithmetic)",
        r"reached       [\d.]+ tokens/s, \d+% of the bound",
        r"sampler, scheduler and Python +[\d.]+ +\d+%",
        r"experts +[\d.]+ k",
        r"layers 0, 2 \(2\): DecoderLayer  \[nanollama.py:\d+\]",
        r"  mlp.experts.\*.gate_proj.weight +6 of 32 x 64 +F32",
    ):
        assert re.search(f"(?m)^{line}", shown), line


def test_json_has_all_numbers(explain: Callable[..., str], tiny: Tiny) -> None:
    found = json.loads(explain(path_of("dense", tiny), "--json", "--depth", 3))
    token, bound = found["token"], found["bound"]
    assert token["depth"] == 3
    assert bound["memory_tokens_per_s"] == bound["read_bandwidth"] / token["read_bytes"]
    assert bound["tokens_per_s"] == min(
        bound["memory_tokens_per_s"], bound["arithmetic_tokens_per_s"]
    )
    assert [group["layers"] for group in found["groups"]] == [[0, 1]]
    assert sum(p["parameters"] for p in found["parts"].values()) == found["weights"]["parameters"]


def test_a_wrong_depth_is_a_usage_error(
    quick: None, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(path_of("dense", tiny))
    for flags, message in (
        (["--depth", "-1"], "--depth is -1; it must be between 0 and"),
        (["--depth", "250", "--run"], "--depth 250 leaves no room in a context of 256"),
        (["--html", "."], ".: cannot be written: "),
    ):
        assert nanollama.main(["explain", path, *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_page_loads_nothing_and_holds_no_markup_of_the_name(
    explain: Callable[..., str], tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "<b>"
    folder.symlink_to(path_of("dense", tiny))
    explain(folder, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert not re.search(r"(src|href)=|https?://|@import|<b>", page)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_the_page(
    theme: Any, explain: Callable[..., str], tiny: Tiny, tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    explain(path_of("moe", tiny), "--run", "--depth", 8, "--html", tmp_path / "page.html")
    problems: list[str] = []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=theme)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        assert page.locator("#parts tbody tr").first.locator("th").inner_text() == "experts"
        assert "tokens/s" in page.locator("#bound").inner_text()
        assert page.locator("#times tbody tr").count() >= 4
        assert page.locator("pre").count() == 2
        page.locator("summary").first.click()
        assert page.locator("details table").first.is_visible()
        browser.close()
    assert problems == []


# ---- models that are not here --------------------------------------------------------------------


@pytest.fixture
def hub(empty_caches: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        url = server.url
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        new_api = functools.partial(headers.HfApi, endpoint=url)
        monkeypatch.setattr(headers, "HfApi", new_api)
        yield server


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def without_place(found: Json) -> Json:
    return {key: value for key, value in found.items() if key not in ("model", "fetched_bytes")}


@pytest.mark.parametrize("kind", ["dense", "mla"])
def test_of_a_remote_model_only_headers_are_read(
    kind: str, tiny: Tiny, hub: HubServer, explain: Callable[..., str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(anatomy, "bound", lambda *_: {})
    path = path_of(kind, tiny)
    files = contents(path)
    hub.add("org/tiny", files)
    found = json.loads(explain("org/tiny", "--json"))
    small = len(files["config.json"]) + len(files["generation_config.json"])
    assert found["fetched_bytes"] == header_bytes(files["model.safetensors"]) + small
    assert hub.fetched() == {"config.json", "generation_config.json", "model.safetensors"}
    assert hub.sent["model.safetensors"] == header_bytes(files["model.safetensors"])
    assert without_place(found) == without_place(json.loads(explain(path, "--json")))


def test_shards_are_read_by_their_headers(tiny: Tiny, hub: HubServer, tmp_path: Path) -> None:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    auto.from_pretrained(path_of("dense", tiny)).save_pretrained(tmp_path, max_shard_size="100KB")
    files = {**contents(tmp_path), "tokenizer.json": b"{}"}
    hub.add("org/shards", files)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    checkpoint, _ = headers.open_remote("org/shards")
    assert checkpoint.num_parameters == open_checkpoint(path_of("dense", tiny)).num_parameters
    assert {name: hub.sent[name] for name in shards} == {
        name: header_bytes(files[name]) for name in shards
    }


def test_of_a_remote_gguf_the_header_is_read(tiny: Tiny, hub: HubServer, tmp_path: Path) -> None:
    path = tiny("Llama", vocab_size=330, hidden_size=256, intermediate_size=2048)
    file, _ = gguf_files.convert(path, tmp_path / "model.gguf")
    hub.add("org/gguf", {"model.gguf": file.read_bytes()})
    checkpoint, num_bytes = headers.open_remote("org/gguf/model.gguf")
    assert num_bytes < headers.CHUNK + len(headers.gguf_header(iter([file.read_bytes()])))
    assert num_bytes < file.stat().st_size / 10
    local = open_checkpoint(file)
    assert {n: (t.shape, t.kind) for n, t in checkpoint.tensors.items()} == {
        n: (t.shape, t.kind) for n, t in local.tensors.items()
    }
    assert checkpoint.config == local.config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.gguf": b"PK\3\4" * 40}, "not a GGUF file: it starts with b'PK"),
        ({"model.gguf": b"GGUF\3\0\0\0" + b"\xff" * 40}, "truncated or corrupt"),
        ({"model.safetensors": b"\xff" * 64}, "org/bad: model.safetensors is not a safetensors"),
    ],
)
def test_a_damaged_remote_file_is_one_line(
    files: dict[str, bytes], message: str, hub: HubServer
) -> None:
    whole = {"config.json": b"{}", "tokenizer.json": b"{}"} if "model.gguf" not in files else {}
    hub.add("org/bad", files | whole)
    with pytest.raises(nanollama.CheckpointError, match=re.escape(message)) as error:
        headers.open_remote("org/bad")
    assert len(str(error.value).splitlines()) == 1


def test_a_name_that_is_no_model_is_refused(empty_caches: None) -> None:
    with pytest.raises(nanollama.ModelNotFoundError):
        headers.open_remote("no model")
