"""Stop strings and thoughts in whole answers of models whose answers are known."""

from __future__ import annotations

from pathlib import Path

import openai
import puppets
import pytest
from serving import serving

from nanollama import LLM, GenerationRequest, SamplingParams

USER = [{"role": "user", "content": "Hi"}]


def answer(llm: LLM, stop: tuple[str, ...] = ()) -> tuple[str, str, str | None]:
    """(thoughts, content, finish_reason)"""
    params = SamplingParams(temperature=0, repeat_penalty=1, stop=stop, max_tokens=20)
    prepared = llm.prepare(GenerationRequest(messages=USER, params=params))
    splitter, done = prepared.splitter(), llm.complete(prepared)
    pieces = [*splitter.push(done.text), *splitter.flush()]
    thoughts, content = (
        "".join(piece.text for piece in pieces if piece.kind == kind)
        for kind in ("thought", "content")
    )
    return thoughts, content, done.finish_reason


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("<|user|>", "Answer."),
        (".<|user|>", "Answer"),
        ("<|user|> me", "Answer."),
        ("<|user|><|user|>", "Answer. me too"),
        ("too", "Answer. me "),
    ],
)
def test_a_control_token_may_be_part_of_a_stop_string(
    stop: str, expected: str, tmp_path: Path
) -> None:
    script = ["Answer", ".", "<|user|>", " me", " too"]
    llm = LLM(puppets.write(tmp_path, script, control=["<|user|>", "<|user|>x"]))
    assert answer(llm, (stop,)) == ("", expected, "stop")
    assert answer(llm) == ("", "Answer. me too", "stop")


TAGS = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
]


@pytest.mark.parametrize(("begin", "end"), TAGS)
@pytest.mark.parametrize("kind", ["control", "user"])
def test_thoughts_are_split_off_and_hold_no_stop_string(
    begin: str, end: str, kind: str, tmp_path: Path
) -> None:
    script = [begin, "So", " a", " STOP", " there", end, "Four", "!", " ST", "OP", " and"]
    tags: dict[str, list[str]] = {kind: [begin, end]}
    llm = LLM(puppets.write(tmp_path, script, **tags))  # type: ignore[arg-type]
    assert answer(llm, (" STOP",)) == ("So a STOP there", "Four!", "stop")
    assert answer(llm) == ("So a STOP there", "Four! STOP and", "stop")


def test_tokens_of_thoughts_are_counted(tmp_path: Path) -> None:
    thought = ["<think>", "So", " there", "</think>"]
    path = puppets.write(tmp_path, [*thought, "Four", "!"], control=["<think>", "</think>"])
    with serving(lambda: LLM(path)) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any")
        chat = {"model": "model", "messages": USER, "temperature": 0}
        whole = client.chat.completions.create(**chat, n=2).usage
        stream = client.chat.completions.create(
            **chat, n=2, stream=True, stream_options={"include_usage": True}
        )
        for usage in (whole, list(stream)[-1].usage):
            assert usage.completion_tokens == 2 * (len(thought) + 3)  # with <|im_end|>
            assert usage.completion_tokens_details.reasoning_tokens == 2 * len(thought)
        response = client.responses.create(model="model", input="Hi", temperature=0)
        assert response.usage.output_tokens_details.reasoning_tokens == len(thought)
        text = client.completions.create(model="model", prompt="Hi", temperature=0)
        assert text.usage.completion_tokens_details.reasoning_tokens == 0
