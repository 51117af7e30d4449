"""Prompts with a gap: their ids are those of the whole text, in which the tokens are spelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from puppets import CONTROL, write
from serving import serving

import nanollama
from nanollama import LLM, GenerationRequest, RequestError, SamplingParams, Tokenizer
from nanollama_extras.answers.fim import MARKS, Gap, Marks

FORMS = [pytest.param(form, id=" ".join(filter(None, form))) for form in MARKS]
QWEN, CODEGEMMA, PLAIN = MARKS[:3]


def puppet(path: Path, form: Marks, in_text: bool = False) -> LLM:
    """A model that answers "x", "+", "1" after its last token for a gap. Its tokens for a gap are
    control tokens, or user-defined ones."""
    words = [word for word in form if word]
    added: dict[str, Any] = {"user" if in_text else "control": words}
    return LLM(write(path, [form.middle, "x", "+", "1"], **added))


def filled(llm: LLM, prompt: str | list[int], suffix: str, **params: Any) -> list[int]:
    request = GenerationRequest(prompt, suffix=suffix, params=SamplingParams(**params))
    return llm.encode_request(request)[0]


@pytest.mark.parametrize("in_text", [False, True], ids=["control", "user-defined"])
@pytest.mark.parametrize("form", FORMS)
def test_the_ids_are_those_of_the_spelled_text(tmp_path: Path, form: Marks, in_text: bool) -> None:
    llm = puppet(tmp_path, form, in_text)
    text = f"{form.prefix}def f(): {form.suffix} # end{form.middle}"
    assert filled(llm, "def f(): ", " # end") == llm.tokenizer.encode(text)


@pytest.mark.parametrize("in_text", [False, True], ids=["control", "user-defined"])
def test_tokens_in_a_text_are_text(tmp_path: Path, in_text: bool) -> None:
    llm = puppet(tmp_path, QWEN, in_text)
    ids = filled(llm, f"a{QWEN.middle}b", CONTROL[0])
    marks = {llm.tokenizer.added[word] for word in (*QWEN, *CONTROL)}
    assert [i in marks for i in ids].count(True) == 3
    assert llm.decode([i for i in ids if i not in marks]) == f"a{QWEN.middle}b{CONTROL[0]}"


def test_ids_before_a_gap_stay_as_they_are(tmp_path: Path) -> None:
    llm = puppet(tmp_path, QWEN)
    assert filled(llm, [7, 8], "c")[1:3] == [7, 8]


@pytest.mark.parametrize(
    ("form", "spelled"),
    [
        (QWEN, "<|repo_name|>repository\n<|file_sep|>a.py\nx = 1<|file_sep|>b.py\ny = 2"
               "<|file_sep|>file\n<|fim_prefix|>p<|fim_suffix|>s<|fim_middle|>q"),
        (CODEGEMMA, "<|file_separator|>a.py\nx = 1<|file_separator|>b.py\ny = 2"
                    "<|file_separator|>file\n<|fim_prefix|>p<|fim_suffix|>s<|fim_middle|>q"),
        (PLAIN, "\n\n--- snippet ---\n\nx = 1\n\n--- snippet ---\n\ny = 2"
                "<|fim_prefix|>p<|fim_suffix|>s<|fim_middle|>q"),
    ],
)  # fmt: skip
def test_other_files_come_first(tmp_path: Path, form: Marks, spelled: str) -> None:
    tokenizer = puppet(tmp_path, form).tokenizer
    files = [("a.py", "x = 1"), ("b.py", "y = 2")]
    assert Gap(tokenizer).fill("p", "s", "q", files) == tokenizer.encode(spelled)


def test_the_last_files_stay_where_room_is_short(tmp_path: Path) -> None:
    tokenizer = puppet(tmp_path, QWEN).tokenizer
    files = [(f"{name}.py", f"{name * 20}") for name in "abcd"]
    whole, none = Gap(tokenizer).fill("p", "s", "", files), Gap(tokenizer).fill("p", "s")
    for room in range(len(whole) + 2):
        ids = Gap(tokenizer).fill("p", "s", "", files, room)
        assert ids == none or len(ids) <= room
        assert ids[-len(none) :] == none
        kept = [name for name in "abcd" if name * 20 in tokenizer.decode(ids)]
        assert kept == list("abcd")[4 - len(kept) :]
    assert len(kept) == 4


def test_a_gguf_file_names_its_tokens() -> None:
    words = ["<A>", "<B>", "<C>", "<P>", "<R>", "<S>"]
    alphabet = list(nanollama.byte_alphabet())
    keys = [f"tokenizer.ggml.fim_{name}_token_id" for name in "pre suf mid pad rep sep".split()]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*alphabet, *words],
        "tokenizer.ggml.token_type": [1] * len(alphabet) + [3] * len(words),
        "tokenizer.ggml.merges": [],
        **{key: 256 + i for i, key in enumerate(keys)},
    }
    tokenizer = Tokenizer(nanollama._gguf_text(metadata, "model.gguf"))
    assert Gap(tokenizer).marks == Marks("<A>", "<B>", "<C>", "<R>", "<S>")
    ids = Gap(tokenizer).fill("p", "s", files=[("a", "b")])
    assert ids == tokenizer.encode("<R>repository\n<S>a\nb<S>file\n<A>p<B>s<C>")
    assert Gap(tokenizer).ends == ("<R>", "<S>", "<P>")


def test_the_gap_is_filled_by_text_completions(tmp_path: Path) -> None:
    llm = puppet(tmp_path, QWEN)
    body = {"suffix": " # done", "temperature": 0}
    with serving(lambda: llm) as live:
        plain, echoed = (
            live.text("return ", **body, echo=echo).json()["choices"][0] for echo in (False, True)
        )
        both = live.text(["a", "b"], **body, n=2).json()
        refused = live.text("a", **body, echo=True, logprobs=1)
        unfilled = live.text("return ", suffix="", temperature=0, max_tokens=3).json()
    assert (plain["text"], plain["finish_reason"]) == ("x+1", "stop")
    assert echoed["text"] == "return x+1"
    assert [choice["text"] for choice in both["choices"]] == ["x+1"] * 4
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")
    assert unfilled["usage"]["prompt_tokens"] == len("return ")


@pytest.mark.parametrize("form", [QWEN, CODEGEMMA, MARKS[3]])
def test_the_next_file_ends_an_answer(tmp_path: Path, form: Marks) -> None:
    words = [word for word in form if word]
    llm = LLM(write(tmp_path, [form.middle, "x", form.file, "y"], user=words))
    request = GenerationRequest("a", suffix="b", params=SamplingParams(temperature=0))
    answer = llm.complete(request)
    assert (answer.text, answer.finish_reason) == ("x", "stop")


def test_a_long_suffix_is_refused_by_its_beginning(tmp_path: Path) -> None:
    llm = puppet(tmp_path, QWEN)
    with serving(lambda: llm) as live:
        error = live.text("a", suffix="b" * 100_000).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_the_gap_is_filled_over_ollamas_api(tmp_path: Path) -> None:
    llm = puppet(tmp_path, QWEN)
    body = {"model": "model", "prompt": "return ", "suffix": " # done", "stream": False}
    with serving(lambda: llm) as live:
        answer = live.http.post("/api/generate", json={**body, "options": {"temperature": 0}})
    assert answer.json()["response"] == "x+1"


def test_a_model_without_such_tokens_says_so(tmp_path: Path) -> None:
    llm = LLM(write(tmp_path, ["x"]))
    with pytest.raises(RequestError, match="suffix cannot be used") as error:
        filled(llm, "a", "b")
    assert error.value.param == "suffix"
    fields = {"model": "model", "prompt": "a", "suffix": "b"}
    with serving(lambda: llm) as live:
        text = live.http.post("/v1/completions", json=fields)
        ollama = live.http.post("/api/generate", json=fields)
        infill = live.http.post("/infill", json={"input_prefix": "a", "input_suffix": "b"})
    assert {text.status_code, ollama.status_code, infill.status_code} == {400}
    assert text.json()["error"]["param"] == "suffix"
    messages = [text.json()["error"]["message"], ollama.json()["error"]]
    for message in (*messages, infill.json()["error"]["message"]):
        assert message.startswith("suffix cannot be used")
