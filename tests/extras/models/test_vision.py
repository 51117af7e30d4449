"""Images in messages against transformers, for every family that reads them."""

from __future__ import annotations

import importlib
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
import vision_models
from vision_models import FAMILIES, picture

import nanollama
from nanollama import LLM, Batch, Completion, GenerationRequest, RequestError
from nanollama_extras.answers import images
from nanollama_extras.commands.details import tower_size
from nanollama_extras.models.vision_towers import open_processor

ROW_INFO = {"lfm2_vl": {"return_row_col_info": True}}
A, B, C = picture(40, 23), picture(17, 64), picture(64, 64)


def part(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def turns(*pictures: Any) -> list[dict[str, Any]]:
    """A picture between texts, then perhaps two more in another turn."""
    first, *more = pictures
    messages = [
        {"role": "system", "content": "look at it"},
        {"role": "user", "content": [text("what is "), part(first), text(" this?")]},
    ]
    if more:
        asked = [part(more[0]), text(" and "), *map(part, more[1:]), text("\nthose?")]
        messages += [{"role": "assistant", "content": "a fox"}, {"role": "user", "content": asked}]
    return messages


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """saved(family) -> the directory of a tiny model, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = vision_models.save(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


def prompt(llm: LLM, messages: list[dict[str, Any]]) -> list[int]:
    return llm.prepare(GenerationRequest(messages=messages)).ids


@torch.inference_mode()
def logits(llm: LLM, ids: list[int], chunk: int = 10_000) -> torch.Tensor:
    """Logits (T, V) after each token of a prompt, which is read in pieces."""
    decoder = llm.engine.decoder
    cache = decoder.new_cache(1, chunk)
    cache.start(0, 0, 0, ids)
    found = []
    for start in range(0, len(ids), chunk):
        new = ids[start : start + chunk]
        cache.reserve(0, start + len(new))
        batch = Batch([(0, start, new, len(new))], decoder.device, decoder.row_tile)
        found.append(decoder(batch, cache))
    return torch.cat(found)


class Judge:
    """transformers' model and processor, which gets all images of a text at once."""

    def __init__(self, path: Path, family: str) -> None:
        self.model, self.processor = oracle.load(path), open_processor(path, family)

    def inputs(self, llm: LLM, messages: list[dict[str, Any]]) -> dict[str, Any]:
        pictures = [p["image"].pixels for m in messages for p in m["content"] if "image" in p]
        words = llm.template.render(messages)
        options: Any = {"return_tensors": "pt", "add_special_tokens": False}
        return dict(self.processor(images=pictures, text=[words], **options))

    @torch.inference_mode()
    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        found: torch.Tensor = self.model(**inputs, use_cache=False).logits[0]
        return found

    @torch.inference_mode()
    def greedy(self, inputs: dict[str, Any], count: int) -> list[int]:
        """With a cache, whose positions go on after an image."""
        options: Any = {"max_new_tokens": count, "do_sample": False}
        self.model.generation_config.eos_token_id = None
        found = self.model.generate(**inputs, **options)
        ids: list[int] = found[0, inputs["input_ids"].shape[1] :].tolist()
        return ids


def as_theirs(token_id: int, llm: LLM) -> int:
    """A row of an image has the id of a placeholder there, and in some families of padding here."""
    return llm.vision.tower.image_id if hasattr(token_id, "vector") else token_id


@pytest.fixture
def masks_of_gemma4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tokens of an image see each other in windows only, as in Gemma 4 and in Google's own
    code: https://github.com/huggingface/transformers/issues/46711 left out this model."""
    name = "transformers.models.gemma4_unified.modeling_gemma4_unified"
    module: Any = importlib.import_module(name)
    plain = module.create_masks_for_generate

    def masks(block_sequence_ids: Any = None, **given: Any) -> Any:
        if block_sequence_ids is None or (block_sequence_ids < 0).all():
            return plain(**given)
        return module.create_masks_for_vision_model(block_sequence_ids=block_sequence_ids, **given)

    monkeypatch.setattr(module, "create_masks_for_generate", masks)


@pytest.mark.usefixtures("masks_of_gemma4")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(saved: Any, family: str) -> None:
    path = saved(family)
    judge = Judge(path, family.partition("-")[0])
    for kernels in ("torch", "native"):
        llm = LLM(path, kernels=kernels)
        for messages in (turns(A), turns(B, A, C)):
            inputs, ids = judge.inputs(llm, messages), prompt(llm, messages)
            assert [as_theirs(i, llm) for i in ids] == inputs["input_ids"][0].tolist()
            expected = judge.logits(inputs)
            assert expected.std() > 0.5
            scale = float(expected.abs().max())
            torch.testing.assert_close(logits(llm, ids), expected, rtol=0, atol=1e-4 * scale)
            answer = llm.complete(GenerationRequest(messages=messages, params=oracle.GREEDY))
            assert answer.token_ids == judge.greedy(inputs, 24)
            assert answer.usage.prompt_tokens == len(ids)


# ---- pieces, company, prefixes -------------------------------------------------------------------

KINDS = ("smolvlm", "gemma3", "gemma4-whole", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


def request(messages: list[dict[str, Any]], **params: Any) -> GenerationRequest:
    return GenerationRequest(messages=messages, params=replace(oracle.GREEDY, **params))


def told(answer: Any) -> tuple[list[int], list[float]]:
    return answer.token_ids, [entry.logprob for entry in answer.logprobs]


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("family", KINDS)
def test_a_prompt_in_pieces_or_in_company_is_the_same(
    saved: Any, family: str, kernels: str
) -> None:
    """A piece may end in an image's midst unless its tokens see each other."""
    asked = [request(turns(*p), max_tokens=6, logprobs=0) for p in ((A,), (B, A, C), (C,))]
    asked.append(request([{"role": "user", "content": "what is a fox?"}], max_tokens=6, logprobs=0))
    alone = [told(LLM(saved(family), kernels=kernels).complete(each)) for each in asked]
    for options in ({"prefill_chunk": 7, "parallel": 2}, {"prefill_chunk": 100, "parallel": 4}):
        llm = LLM(saved(family), kernels=kernels, **options)
        deltas = list(llm.stream(asked))
        answers = [Completion.of([d for d in deltas if d.index == i]) for i in range(len(asked))]
        assert [told(answer) for answer in answers] == alone


@pytest.mark.parametrize("family", KINDS)
def test_prefixes_are_reused_with_the_same_images_only(saved: Any, family: str) -> None:
    llm, first = LLM(saved(family), parallel=2), request(turns(A), logprobs=0)
    cold = llm.complete(first)
    again = llm.complete(first)
    assert again.usage.cached_tokens > cold.usage.prompt_tokens - 16  # states are kept at turns
    assert told(again) == told(cold)
    assert llm.vision.num_encoded == 1
    other = picture(*A.pixels.size, seed=1)
    changed = request(turns(other), logprobs=0)
    warm, fresh = llm.complete(changed), LLM(saved(family)).complete(changed)
    ids = prompt(llm, turns(other))
    start = next(i for i, token_id in enumerate(ids) if hasattr(token_id, "vector"))
    assert warm.usage.prompt_tokens == cold.usage.prompt_tokens
    assert warm.usage.cached_tokens <= start
    assert told(warm) == told(fresh)
    assert llm.vision.num_encoded == 2


@pytest.mark.parametrize("family", KINDS)
def test_the_next_turn_goes_on_after_the_images_of_the_last(saved: Any, family: str) -> None:
    llm, messages = LLM(saved(family)), turns(A)
    before = llm.complete(request(messages, max_tokens=3))
    messages += [
        {"role": "assistant", "content": before.text},
        {"role": "user", "content": [text("and this "), part(B), text("?")]},
    ]
    warm = llm.complete(request(messages, logprobs=0))
    cold = LLM(saved(family)).complete(request(messages, logprobs=0))
    assert warm.usage.cached_tokens > before.usage.prompt_tokens - 20
    assert told(warm) == told(cold)
    assert llm.vision.num_encoded == 2


def test_encoded_images_are_kept_within_a_budget(saved: Any) -> None:
    llm = LLM(saved("smolvlm"))
    for image in (A, B, A):
        prompt(llm, turns(image))
    kept = llm.vision.kept
    assert (llm.vision.num_encoded, [*kept.images]) == (2, [B.digest, A.digest])
    kept.most_bytes = kept.images[A.digest].nbytes
    prompt(llm, turns(C))
    assert [*kept.images] == [C.digest]


def test_only_requests_with_new_images_wait_for_an_image(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other answers go on while an image is encoded, those about images that are kept, too."""
    llm, begun, end = LLM(saved("smolvlm")), threading.Event(), threading.Event()
    prompt(llm, turns(A))
    encode = llm.vision.tower.encode

    def slow(*about: Any) -> Any:
        begun.set()
        assert end.wait(60)
        return encode(*about)

    monkeypatch.setattr(llm.vision.tower, "encode", slow)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(llm.complete, request(turns(B), max_tokens=3)) for _ in range(2)]
        assert begun.wait(60)
        done = llm.complete(request([{"role": "user", "content": "what?"}], max_tokens=3))
        seen = llm.complete(request(turns(A), max_tokens=3))
        assert not any(future.done() for future in asked)
        end.set()
        answers = [future.result() for future in asked]
    assert len(done.token_ids) == len(seen.token_ids) == 3
    assert answers[0].token_ids == answers[1].token_ids
    assert llm.vision.num_encoded == 2


# ---- what a message may have ---------------------------------------------------------------------


def test_a_name_of_a_placeholder_in_a_message_is_text(saved: Any) -> None:
    llm = LLM(saved("qwen2_5_vl"))
    spelled = "what is <|vision_start|><|image_pad|><|vision_end|>?"
    ids = prompt(llm, [{"role": "user", "content": [text(spelled), part(A)]}])
    image_id = llm.tokenizer.control["<|image_pad|>"]
    rows = [token_id for token_id in ids if hasattr(token_id, "vector")]
    assert len(rows) == ids.count(image_id) + len(rows)
    assert len(rows) == len(llm.vision.kept.images[A.digest].rows)
    assert (
        spelled
        in llm.prepare(
            GenerationRequest(messages=[{"role": "user", "content": spelled}])
        ).prompt_text
    )


def test_the_library_takes_paths_bytes_and_images(saved: Any, tmp_path: Path) -> None:
    llm, file = LLM(saved("smolvlm")), tmp_path / "a.png"
    A.pixels.save(file)
    given = [file, str(file), file.read_bytes(), A.pixels, images.data_url(file.read_bytes())]
    answers = [
        llm.chat([{"role": "user", "content": [part(each), text("what?")]}], max_tokens=4, seed=1)
        for each in given
    ]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    with pytest.raises(RequestError, match=r"none\.png: cannot be read"):
        llm.chat([{"role": "user", "content": [part("none.png")]}])


def test_a_model_without_eyes_says_so(saved: Any, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="reads"):
        LLM(tiny("Llama")).complete(request(turns(A)))
    path = shutil.copytree(saved("smolvlm"), tmp_path / "model")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (path / name).unlink()
    with pytest.raises(RequestError, match=r"no preprocessor_config\.json"):
        LLM(path).complete(request(turns(A)))


def test_show_counts_the_part_that_reads_images(saved: Any, tiny: Any) -> None:
    path = saved("smolvlm")
    whole = nanollama.read_safetensors(path / "model.safetensors").values()
    text_part = nanollama.open_checkpoint(path)
    num_parameters, num_bytes = tower_size(text_part)
    assert num_parameters == sum(math.prod(t.shape) for t in whole) - text_part.num_parameters > 0
    assert num_bytes == sum(t.nbytes for t in whole) - text_part.num_bytes
    assert tower_size(nanollama.open_checkpoint(tiny("Llama"))) == (0, 0)


def test_a_template_that_leaves_images_out_is_an_error(saved: Any) -> None:
    llm = LLM(saved("smolvlm"), template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(RequestError, match="template takes no images"):
        llm.complete(request(turns(A)))


def test_sizes_that_a_processor_refuses_are_the_requests_error(saved: Any) -> None:
    with pytest.raises(RequestError, match=r"images\[0\], of 900x1 pixels, is refused"):
        LLM(saved("qwen2_5_vl")).complete(request(turns(picture(900, 1))))


def test_published_configs_leave_sizes_out() -> None:
    """Of LLaVA 1.5 7B and of Pixtral 12B."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05}
    llava = {"model_type": "llava", "text_config": {**text, "vocab_size": 32064}}
    config = nanollama.model_config(llava, "config.json")
    assert (config.n_embd, config.n_ff, config.n_layers, config.n_heads) == (4096, 11008, 32, 32)
    assert (config.n_kv_heads, config.n_vocab, config.n_ctx) == (32, 32064, 4096)
    text = {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "num_hidden_layers": 40}
    text |= {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 131072}
    config = nanollama.model_config({"model_type": "llava", "text_config": text}, "config.json")
    assert (config.n_heads, config.n_kv_heads, config.n_layers) == (32, 8, 40)


def test_older_files_of_llava_have_no_settings_of_the_processor(saved: Any, tmp_path: Path) -> None:
    path = shutil.copytree(saved("llava"), tmp_path / "old")
    (path / "processor_config.json").write_text("{}")
    assert prompt(LLM(path), turns(A)) == prompt(LLM(saved("llava")), turns(A))


@pytest.mark.parametrize("family", ["lfm2_vl", "gemma4_unified"])
def test_pixels_are_those_of_torchvision(saved: Any, family: str) -> None:
    """But for the rounding of resized ones, of which torchvision's differ by 1 of 255."""
    pytest.importorskip("torchvision")
    ours = open_processor(saved(family), family)
    kind = getattr(transformers, f"{FAMILIES[family]['kind']}ImageProcessor")
    theirs = kind(**FAMILIES[family]["pixels"])
    for image in (A, B, C, picture(150, 90), picture(30, 300)):
        found = ours.image_processor([[image.pixels]], return_tensors="pt")
        expected = theirs([[image.pixels]], return_tensors="pt", **ROW_INFO.get(family, {}))
        for name in expected:
            one, other = (torch.as_tensor(each[name]).float() for each in (found, expected))
            torch.testing.assert_close(one, other, rtol=0, atol=2.1 / 127.5)


def test_the_text_of_a_pixtral_image_is_that_of_transformers(saved: Any) -> None:
    pytest.importorskip("torchvision")
    path = saved("mistral3")
    theirs = transformers.AutoProcessor.from_pretrained(path, backend="pil")
    for image in (A, B, C):
        options: Any = {"return_tensors": "pt", "add_special_tokens": False}
        one, other = (
            judge(images=[image.pixels], text=["[IMG]"], **options)
            for judge in (theirs, open_processor(path, "mistral3"))
        )
        for name in ("input_ids", "pixel_values", "image_sizes"):
            assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))


def test_the_older_flat_config_is_the_same_model(saved: Any, tmp_path: Path) -> None:
    def flat(config: dict[str, Any]) -> None:
        inner = config.pop("text_config")
        config.update({key: value for key, value in inner.items() if key != "model_type"})
        rope = dict(config.pop("rope_parameters"))
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}

    old = oracle.rewritten(saved("qwen2_5_vl"), tmp_path / "old", flat)
    answers = [LLM(each).complete(request(turns(B, A))) for each in (old, saved("qwen2_5_vl"))]
    assert answers[0].token_ids == answers[1].token_ids
