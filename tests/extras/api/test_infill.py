"""llama.cpp's /infill: its fields, and the text of a gap."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from puppets import write
from serving import Live, serving

from nanollama import LLM
from nanollama_extras.answers.fim import MARKS

GAP = {"input_prefix": "return ", "input_suffix": " # done", "temperature": 0}
SCRIPT = [MARKS[0].middle, "x", "+", "\n", "1"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    path = write(tmp_path_factory.mktemp("coder"), SCRIPT, control=MARKS[0])
    with serving(lambda: LLM(path)) as live:
        yield live


def fill(live: Live, **fields: Any) -> Any:
    response = live.http.post("/infill", json={**GAP, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_answer_is_llama_cpps(live: Live) -> None:
    answer = fill(live, n_predict=16, input_extra=[{"filename": "a.py", "text": "x = 1"}])
    assert (answer["content"], answer["stop"], answer["stop_type"]) == ("x+\n1", True, "eos")
    assert (answer["tokens_predicted"], answer["has_new_line"]) == (5, True)
    spelled = "<|repo_name|>repository\n<|file_sep|>a.py\nx = 1<|file_sep|>file\n"
    spelled += "<|fim_prefix|>return <|fim_suffix|> # done<|fim_middle|>"
    assert answer["tokens_evaluated"] == len(live.pool.llm().encode(spelled))
    assert answer["model"] == "model"


def test_the_prompt_begins_the_gap(live: Live) -> None:
    assert fill(live, prompt="x")["content"] == "+\n1"


@pytest.mark.parametrize(
    ("fields", "content", "kind", "word"),
    [
        ({"n_predict": 2}, "x+", "limit", ""),
        ({"stop": ["\n"]}, "x+", "word", "\n"),
        ({"n_predict": 0}, "", "limit", ""),
    ],
)
def test_an_answer_says_why_it_ends(
    live: Live, fields: dict[str, Any], content: str, kind: str, word: str
) -> None:
    answer = fill(live, **fields)
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == (
        content, kind, word,
    )  # fmt: skip


def test_the_events_add_up_to_the_answer(live: Live) -> None:
    lines = live.http.post("/infill", json={**GAP, "stream": True}).text.split("\n\n")[:-1]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["content"] for event in events) == "x+\n1"
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


def test_an_answer_has_the_fields_that_an_editor_wants(live: Live) -> None:
    wanted = ["content", "timings/prompt_n", "unknown/field"]
    answer = fill(live, response_fields=wanted)
    assert sorted(answer) == ["content", "timings/prompt_n"]


def test_an_editors_usual_fields_are_named_where_they_have_no_effect(live: Live) -> None:
    fields = {"id_slot": 0, "n_indent": 4, "samplers": ["top_k"], "t_max_predict_ms": 500}
    response = live.http.post("/infill", json={**GAP, **fields, "unknown": 1})
    assert response.status_code == 200
    named = set(response.headers["x-nanollama-ignored"].split(", "))
    assert named == {*fields, "unknown"}


def test_files_leave_room_for_the_gap(live: Live) -> None:
    files = [{"filename": f"{i}.py", "text": "x" * 100} for i in range(40)]
    answer = fill(live, input_extra=files, n_predict=100)
    assert answer["content"] == "x+\n1"
    assert 200 < answer["tokens_evaluated"] <= 512 - 100


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_prefix": None}, "input_prefix"),
        ({"input_suffix": None}, "input_suffix"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        ({"input_extra": ["a"]}, "input_extra[0]"),
        ({"response_fields": [1]}, "response_fields"),
    ],
)
def test_a_wrong_field_is_named(live: Live, fields: dict[str, Any], param: str) -> None:
    response = live.http.post("/infill", json={**GAP, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_prompt_beyond_the_context_is_refused(live: Live) -> None:
    response = live.http.post("/infill", json={**GAP, "input_prefix": "x" * 600})
    assert response.json()["error"]["code"] == "context_length_exceeded"
