"""Prompts with a gap: their ids are those of the whole text, in which the tokens are spelled."""

from __future__ import annotations

from pathlib import Path

import pytest
from puppets import CONTROL, write
from serving import serving

from nanollama import LLM, RequestError
from nanollama_extras.answers.fim import TOKENS, fill_ids

FORMS = [pytest.param(form, id=form[0]) for form in TOKENS]


def puppet(path: Path, form: tuple[str, ...]) -> LLM:
    """A model that answers "x", "+", "1" after its last token for a gap."""
    script = [form[2], "x", "+", "1"]
    return LLM(write(path, script, control=form))


@pytest.mark.parametrize("form", FORMS)
def test_the_ids_are_those_of_the_spelled_text(tmp_path: Path, form: tuple[str, ...]) -> None:
    tokenizer = puppet(tmp_path, form).tokenizer
    text = f"{form[0]}def f(): {form[1]} # end{form[2]}"
    assert fill_ids(tokenizer, "def f(): ", " # end") == tokenizer.encode(text)


def test_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    tokenizer = puppet(tmp_path, TOKENS[0]).tokenizer
    ids = fill_ids(tokenizer, f"a{TOKENS[0][2]}b", CONTROL[0])
    marks = {tokenizer.added[word] for word in (*TOKENS[0], *CONTROL)}
    assert [i in marks for i in ids].count(True) == 3


def test_the_gap_is_filled_over_ollamas_api(tmp_path: Path) -> None:
    llm = puppet(tmp_path, TOKENS[0])
    body = {"model": "model", "prompt": "return ", "suffix": " # done", "stream": False}
    with serving(lambda: llm) as live:
        answer = live.http.post("/api/generate", json={**body, "options": {"temperature": 0}})
    assert answer.json()["response"] == "x+1"


def test_a_model_without_such_tokens_says_so(tmp_path: Path) -> None:
    llm = LLM(write(tmp_path, ["x"]))
    with pytest.raises(RequestError, match="suffix cannot be used") as error:
        fill_ids(llm.tokenizer, "a", "b")
    assert error.value.param == "suffix"
