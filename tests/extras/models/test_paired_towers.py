"""Images for models in GGUF, whose image part is a file of its own, against the same models in
safetensors, which test_vision.py compares with transformers."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import mmproj_files
import pytest
import torch
import vision_models
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vision import A, B, C, as_theirs, logits, prompt, request, turns

import nanollama
from nanollama import LLM, CheckpointError, RequestError
from nanollama_extras.api import blobs
from nanollama_extras.commands.details import tower_size
from nanollama_extras.files import mmproj
from nanollama_extras.models import paired_towers, vision, vision_towers

FAMILIES = ("smolvlm", "gemma3", "gemma4", "gemma4-whole", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
FAMILIES += ("qwen2_vl", "qwen2_5_vl", "gemma4_unified")
# Gemma 4's files leave out how many rows an image may have: 280, as that of its hub files
SOFT_TOKENS = {"pixels": {**vision_models.GEMMA4["pixels"], "max_soft_tokens": 280}}
PLACES = {"position_embedding_size": 300}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """pair(family) -> the directory of a tiny model, and its text in GGUF beside the image part."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            source = tmp_path_factory.mktemp(family)
            with pytest.MonkeyPatch.context() as patch:
                if family.startswith("gemma4"):
                    row = vision_models.FAMILIES[family]
                    whole = {"use_clipped_linears": True, "standardize": True}
                    own = {**row["vision"], **(whole if family == "gemma4" else {})}
                    own |= PLACES if family != "gemma4_unified" else {}
                    changed = {**row, **SOFT_TOKENS, "vision": own}
                    patch.setitem(vision_models.FAMILIES, family, changed)
                vision_models.save(source, family)
            made[family] = source, mmproj_files.write_pair(source, tmp_path_factory.mktemp("pair"))
        return made[family]

    return make


def image_part(path: Path) -> Path:
    return next(path.parent.glob("mmproj-*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_the_safetensors(pair: Any, family: str) -> None:
    source, path = pair(family)
    models = LLM(source), LLM(path)
    for messages in (turns(A), turns(B, A, C)):
        ids = [prompt(llm, messages) for llm in models]
        expected, found = (logits(llm, own) for llm, own in zip(models, ids))
        assert [as_theirs(i, models[1]) for i in ids[1]] == [
            as_theirs(i, models[0]) for i in ids[0]
        ]
        assert expected.std() > 0.5
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)
    answers = [llm.complete(request(turns(A))).token_ids for llm in models]
    assert answers[0] == answers[1]


def test_a_text_says_which_layers_take_more_of_an_image(pair: Any) -> None:
    """llama.cpp refuses a pair in which these numbers differ."""
    metadata = nanollama.read_gguf(pair("qwen3_vl")[1])[0]
    assert metadata["qwen3vl.n_deepstack_layers"] == 2
    assert metadata["qwen3vl.rope.dimension_sections"] == [6, 5, 5, 0]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_other_types_of_tensors_give_about_the_same_rows(
    pair: Any, kind: str, tmp_path: Path
) -> None:
    source, path = pair("smolvlm")
    text = shutil.copy(path, tmp_path)
    mmproj_files.write_image_part(source, tmp_path / f"mmproj-{kind}.gguf", kind)
    rows = []
    for each in (path, text):
        llm = LLM(each)
        prompt(llm, turns(A))
        rows.append(llm.vision.kept.images[A.digest].rows)
    error = (rows[1] - rows[0]).std() / rows[0].std()
    assert 0 < error < (0.05 if kind == "Q8_0" else 0.02)


def test_the_two_steps_of_mlps_may_have_each_others_names(pair: Any, tmp_path: Path) -> None:
    """As in files that were made before July 2025."""
    text = Path(shutil.copy(pair("gemma3")[1], tmp_path))
    file = shutil.copy(image_part(pair("gemma3")[1]), tmp_path)
    other = {"up": "down", "down": "up"}
    swap = functools.partial(re.sub, r"(?<=ffn_)(up|down)", lambda found: other[found[0]])
    mmproj_files.rewritten(Path(file), {}, rename=swap)
    answers = [LLM(each).complete(request(turns(A))) for each in (text, pair("gemma3")[1])]
    assert answers[0].token_ids == answers[1].token_ids


def test_show_counts_the_image_part(pair: Any, tmp_path: Path) -> None:
    source, text = pair("smolvlm")
    counted = [tower_size(nanollama.open_checkpoint(path)) for path in (source, text)]
    assert counted[0][0] == counted[1][0] > 0
    alone = Path(shutil.copy(text, tmp_path))
    assert tower_size(nanollama.open_checkpoint(alone)) == (0, 0)
    elsewhere = str(image_part(text))
    assert tower_size(nanollama.open_checkpoint(alone), elsewhere) == counted[1]


# ---- which file goes with a model ----------------------------------------------------------------


def refusal(llm: LLM) -> str:
    with pytest.raises(RequestError) as error:
        llm.complete(request(turns(A)))
    return str(error.value)


def test_a_model_without_its_image_part_says_what_is_missing(pair: Any, tmp_path: Path) -> None:
    text = Path(shutil.copy(pair("smolvlm")[1], tmp_path))
    llm = LLM(text)
    assert "no image part (mmproj-*.gguf) beside it" in refusal(llm)
    assert llm.complete(request([{"role": "user", "content": "what?"}], max_tokens=2)).token_ids
    elsewhere = str(image_part(pair("smolvlm")[1]))
    assert LLM(text, mmproj=elsewhere).complete(request(turns(A))).token_ids


def test_of_several_image_parts_the_first_that_fits_is_taken(pair: Any, tmp_path: Path) -> None:
    text = Path(shutil.copy(pair("smolvlm")[1], tmp_path))
    shutil.copy(image_part(pair("gemma3")[1]), tmp_path / "mmproj-other-F16.gguf")
    for kind in ("Q8_0", "F32", "BF16"):
        shutil.copy(image_part(pair("smolvlm")[1]), tmp_path / f"mmproj-own-{kind}.gguf")
    found = mmproj.find_pair(nanollama.open_checkpoint(text))
    assert found.path.name == "mmproj-own-BF16.gguf"
    assert vision.has_vision(nanollama.open_checkpoint(text))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip.projector_type": "pixtral"}, "projector type 'pixtral' is not supported"),
        ({"clip.projector_type": "gemma3"}, "goes with gemma3_text, and model.gguf is llama"),
        (
            {"clip.vision.projection_dim": 2048},
            "projection_dim is 2048; 64, the width of model.gguf",
        ),
        ({"general.architecture": "llama"}, "general.architecture is 'llama'; clip"),
    ],
)
def test_an_image_part_of_another_model_is_refused_by_name(
    pair: Any, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    text = Path(shutil.copy(pair("smolvlm")[1], tmp_path))
    file = Path(shutil.copy(image_part(pair("smolvlm")[1]), tmp_path))
    mmproj_files.rewritten(file, changed)
    refused = refusal(LLM(text))
    assert "image: mmproj-model-F32.gguf: " in refused
    assert message in refused
    with pytest.raises(CheckpointError, match=r"mmproj-model-F32\.gguf: ") as error:
        LLM(text, mmproj=str(file))
    assert message in str(error.value)


def test_mmproj_needs_a_file_and_a_model_in_gguf(pair: Any, tmp_path: Path) -> None:
    source, text = pair("smolvlm")
    with pytest.raises(CheckpointError, match="goes with a model in GGUF"):
        LLM(source, mmproj=str(image_part(text)))
    for name, problem in (
        ("none.gguf", "none.gguf: cannot be read: No such file"),
        ("", "Is a dir"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            LLM(text, mmproj=str(tmp_path / name))


def test_a_modelfile_names_the_image_part_by_a_second_from(pair: Any, tmp_path: Path) -> None:
    text = shutil.copy(pair("smolvlm")[1], tmp_path / "text.gguf")
    file = tmp_path / "Modelfile"
    file.write_text(f"FROM ./{Path(text).name}\nFROM {image_part(pair('smolvlm')[1])}\n")
    picture = tmp_path / "a.png"
    A.pixels.save(picture)
    options = ["--modelfile", str(file), "--image", str(picture), "-m", "2", "--quiet"]
    assert nanollama.main(["--prompt", "what?", *options]) == 0
    parsed = nanollama.read_modelfile(file)
    written = nanollama.extra("api.ollama_models", "a Modelfile").format_modelfile(parsed)
    assert nanollama.parse_modelfile(written, tmp_path / "Modelfile") == parsed


def test_a_model_created_of_two_files_reads_images(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path))
    text, files = pair("smolvlm")[1], {}
    for file in (image_part(text), text):
        files[file.name] = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
        blob = blobs.blob_path(files[file.name])
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
    path = blobs.made_of_files(files)
    assert path.name == "model.gguf"
    assert vision.has_vision(nanollama.open_checkpoint(path))


# ---- damage --------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from([0, 1, 2, 3, 7, 2**16, 2**31 - 1, -1.0, 0.0, 1e30, True, "x", [1.0], ["x"]]),
)


@settings(max_examples=25)
@given(data=st.data())
def test_a_damaged_image_part_is_refused_in_one_line(
    pair: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    family = data.draw(st.sampled_from(["smolvlm", "gemma3", "gemma4", "qwen3_vl"]))
    text = nanollama.open_checkpoint(pair(family)[1])
    file = tmp_path_factory.mktemp("damaged") / "mmproj.gguf"
    shutil.copy(image_part(pair(family)[1]), file)
    whole = mmproj.open_pair(text, file)
    keys = [key for key in whole.metadata if key.startswith("clip.")]
    changed, tensors = {}, {}
    if data.draw(st.booleans()):
        changed[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    else:
        name = data.draw(st.sampled_from(sorted(whole.tensors)))
        array = whole.tensors[name].load().numpy()
        shapes = [None, array[: len(array) // 2], array.reshape(-1), array.T, array[None]]
        tensors[name] = data.draw(st.sampled_from([s for s in shapes if s is None or s.size]))
    mmproj_files.rewritten(file, changed, tensors)
    problem = ""
    try:
        with vision_towers.errors_of_files(file):
            paired_towers.open_pair(mmproj.open_pair(text, file), torch.float32)
    except CheckpointError as error:
        problem = str(error)
    assert "\n" not in problem
    assert len(problem) < 500
    assert not problem or "mmproj.gguf" in problem


def test_the_start_of_a_file_is_refused_in_one_line(pair: Any, tmp_path: Path) -> None:
    text = Path(shutil.copy(pair("smolvlm")[1], tmp_path))
    whole = image_part(pair("smolvlm")[1]).read_bytes()
    for size in (0, 3, 100, len(whole) // 2):
        (tmp_path / "mmproj.gguf").write_bytes(whole[:size])
        assert "\n" not in refusal(LLM(text))


def test_a_vocabulary_without_the_placeholder_is_named(pair: Any) -> None:
    checkpoint = nanollama.open_checkpoint(pair("smolvlm")[1])
    checkpoint.text.gguf["tokens"].remove("<image>")
    with pytest.raises(CheckpointError, match=r"vocabulary of model\.gguf has no <image>"):
        mmproj.find_pair(checkpoint)


def test_which_image_part_of_a_repo_is_fetched() -> None:
    hub = nanollama.parse_hub_ref("org/name:Q4_K_M")
    names = ["a-Q4_K_M.gguf", "mmproj-F32.gguf", "mmproj-F16.gguf", "sub/mmproj-BF16.gguf"]
    assert mmproj.model_files(hub, names) == ["mmproj-F16.gguf", "a-Q4_K_M.gguf"]
    names = ["Q4_K_M/a-Q4_K_M.gguf", "mmproj-BF16.gguf"]
    assert mmproj.model_files(hub, names) == ["mmproj-BF16.gguf", "Q4_K_M/a-Q4_K_M.gguf"]
    assert mmproj.model_files(hub, names[:1]) == names[:1]
