"""Images from each client to a tiny model with vision: answers, counts, capabilities, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import vision_models
from command_line import Ran
from serving import Live, serving
from test_image_parts import CLIENTS, encoded, png, url

import nanollama
from nanollama_extras.api.shelf import open_shelf

SHORT = {"max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.save(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def live(model: Path) -> Iterator[Live]:
    flags = ["--serve", "--model", str(model), "--kernels", "torch", "--max-tokens", "4"]
    settings = nanollama.read_settings(nanollama.build_parser().parse_args(flags))
    models = open_shelf(settings, nanollama.ServerConfig(any_model=True))
    with serving(models=models) as live:
        yield live


def chat(live: Live, *parts: Any, **fields: Any) -> Any:
    """The answer to a message with these parts: texts, and widths of images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url(part)}}
        for part in parts
    ]
    body = {"messages": [{"role": "user", "content": content}], **SHORT, **fields}
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("name", CLIENTS)
def test_each_client_is_answered(live: Live, name: str) -> None:
    assert isinstance(CLIENTS[name][0](live.url), str)


def test_usage_counts_images_and_their_prefix_is_reused(live: Live) -> None:
    text = chat(live, "What is this?")["usage"]["prompt_tokens"]
    first = chat(live, 30, "What is this?")
    again = chat(live, 30, "What is this?")
    two = chat(live, 30, 50, "What is this?")
    other = chat(live, 31, "What is this?")
    counts = [one["usage"]["prompt_tokens"] for one in (first, again, two, other)]
    assert text < counts[0] == counts[1] < counts[2]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (again, other)]
    assert cached[0] == counts[0] - 1
    assert cached[1] < text  # another image, of the same size
    assert again["choices"] == first["choices"]


def test_counts_agree_among_the_apis(live: Live) -> None:
    client = anthropic.Anthropic(base_url=live.url, api_key="x")
    source: Any = {"type": "base64", "media_type": "image/png", "data": encoded(40)}
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]
    messages: Any = [{"role": "user", "content": content}]
    counted = client.messages.count_tokens(model="m", messages=messages).input_tokens
    usage = client.messages.create(model="m", max_tokens=2, messages=messages).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    assert chat(live, 40, "What?")["usage"]["prompt_tokens"] == counted
    body = {"messages": [{"role": "user", "content": "What?", "images": [encoded(40)]}]}
    options: Any = {"stream": False, "options": {"num_predict": 2}}
    answer = live.http.post("/api/chat", json={"model": "m", **body, **options}).json()
    assert answer["prompt_eval_count"] == counted
    parts = [{"type": "image_url", "image_url": {"url": url(40)}}, content[1]]
    asked = {"messages": [{"role": "user", "content": parts}], "with_pieces": True}
    tokens = live.http.post("/tokenize", json=asked).json()
    assert (tokens["count"], len(tokens["tokens"])) == (counted, counted)
    shown = live.http.post("/apply-template", json=asked).json()
    assert len(shown["pieces"]) == counted


def test_a_stream_and_several_choices(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="x")
    parts = [{"type": "image_url", "image_url": {"url": url(20)}}]
    messages: Any = [{"role": "user", "content": parts}]
    chunks = list(
        client.chat.completions.create(
            model="m", messages=messages, max_tokens=3, n=2, stream=True, seed=1
        )
    )
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}


def test_the_capability_is_listed(live: Live) -> None:
    (row,) = live.http.get("/v1/models").json()["data"]
    assert row["architecture"]["input_modalities"] == ["text", "image"]
    shown = live.http.post("/api/show", json={"model": row["id"]}).json()
    assert "vision" in shown["capabilities"]


def test_an_image_that_the_model_cannot_read_is_a_400(live: Live) -> None:
    part = {"type": "image_url", "image_url": {"url": url(900)}}  # 900 x 4 pixels
    body = {"messages": [{"role": "user", "content": [part]}], **SHORT}
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert "images[0]" in answer.json()["error"]["message"]


# ---- the command line ----------------------------------------------------------------------------


def test_a_prompt_a_record_and_a_log(
    cli: Callable[..., Ran], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))
    photo, record, log = (tmp_path / name for name in ("a.png", "r.jsonl", "talks.db"))
    photo.write_bytes(png(30))
    flags = ("--image", photo, "--temp", "0", "--max-tokens", "3", "--kernels", "torch")
    ran = cli("run", model, "What?", *flags, "--record", record, "--log", log)
    assert ran.code == 0, ran.err
    assert "prefill: " in ran.err
    assert not any(words in ran.err for words in ("Loading weights", "LOAD REPORT"))
    data = encoded(30)[40:60].encode()
    assert json.loads(record.read_text().splitlines()[1])["ids"]
    assert data not in record.read_bytes() + log.read_bytes()
    listed = cli("logs", "last", "--log", log)
    assert "user: [image]\nWhat?" in listed.out


def test_lines_of_a_batch_file_have_images(
    cli: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    photo, lines = tmp_path / "a.png", tmp_path / "in.jsonl"
    photo.write_bytes(png(30))
    flags = ("--temp", "0", "--max-tokens", "3", "--kernels", "torch", "--quiet")
    parts = [
        {"type": "image_url", "image_url": {"url": url(30)}},
        {"type": "text", "text": "What?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}]}
    broken = json.dumps({"body": body}).replace("base64,", "base64,AAAA")
    lines.write_text("\n".join([json.dumps({"custom_id": "x", "body": body}), broken]))
    ran = cli("--model", model, "--batch-file", lines, "--output", "-", *flags)
    first, second = map(json.loads, ran.out.splitlines())
    alone = cli("--model", model, "--prompt", "What?", "--image", photo, *flags)
    assert (ran.code, first["text"]) == (1, alone.out.removesuffix("\n"))
    assert (first["custom_id"], first["prompt"]) == ("x", "[image]\nWhat?")
    assert "messages[0].content[0] is not an image" in second["error"]


def test_a_conversation_keeps_its_images(
    cli: Callable[..., Ran], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    Path("my cat.png").write_bytes(png(30))
    lines = ["/image my\\ cat.png What?", f"'{tmp_path}/my cat.png' And this?", "/save talk.json"]
    lines += ["/load talk.json", "/retry", "/prompt", "/image none.png"]
    flags = ("--temp", "0", "--max-tokens", "3", "--kernels", "torch")
    ran = cli("chat", model, *flags, stdin="\n".join(lines).encode())
    assert ran.code == 0, ran.err
    assert ran.err.count("image: my cat.png") == 2
    assert "none.png: no such image; give the path of a PNG" in ran.err
    talk = json.loads(Path("talk.json").read_text())["messages"]
    assert [len(m["content"]) for m in talk if m["role"] == "user"] == [2, 2]
    assert ran.err.count("<|vision_start|>") == 2
