"""--record and `replay`: what is kept, that it is the same again, and how differences are told."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import serving

import nanollama
from nanollama import LLM, GenerationRequest, RequestError, SamplingParams
from nanollama_extras.commands import record, replay

PARAMS = [
    SamplingParams(max_tokens=12),  # no seed: the one that was drawn is kept
    SamplingParams(max_tokens=9, temperature=1.3, top_p=0.8, seed=7, frequency_penalty=0.5),
    SamplingParams(max_tokens=20, temperature=0, repeat_penalty=1.3, logit_bias={5: 2.5}),
    SamplingParams(max_tokens=15, top_k=3, min_p=0.05, seed=2**63, stop=("e",)),
]


def requests() -> list[GenerationRequest]:
    return [GenerationRequest(f"the fox {i}", params=params) for i, params in enumerate(PARAMS)]


@pytest.fixture
def recorded(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A file with an answer for each of PARAMS."""
    path = tmp_path / "answers.jsonl"
    list(LLM(tiny("Llama"), record=str(path)).stream(requests()))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def replayed(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, list[Any]]:
    code = nanollama.main(["replay", *map(str, flags), "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_record_has_the_tokens_and_log_probabilities_of_a_run_without_it(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    params = SamplingParams(max_tokens=10, seed=3, logprobs=20)
    request = GenerationRequest("the quick", params=params)
    plain = LLM(tiny("Llama")).complete(request)
    llm = LLM(tiny("Llama"), record=str(path))
    assert llm.complete(request).token_ids == plain.token_ids
    about, row = rows_of(path)
    assert about["model"] == str(tiny("Llama"))
    assert about["fingerprint"] == llm.fingerprint
    assert row["run"] == about["run"]
    assert row["ids"] == llm.encode("the quick")
    assert row["answer"] == plain.token_ids
    assert (row["seed"], row["finish_reason"]) == (3, plain.finish_reason)
    assert row["logprobs"] == [
        [entry.logprob, [list(pair) for pair in entry.top]] for entry in plain.logprobs
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("flags", [[], ["--threads", "1", "--parallel", "1"], ["--lookup"]])
def test_a_replay_with_the_same_model_finds_nothing(
    recorded: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, [result] = replayed(capsys, recorded, *flags)
    assert code == 0
    assert len(result["answers"]) == len(PARAMS)
    for row in result["answers"]:
        assert row["first_difference"] is None
        assert max(row["kl"]) < 1e-6
        assert row["agreement"] == 1


def test_the_report_says_equal(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nanollama.main(["replay", str(recorded)]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 answers equal" in out
    assert out.endswith("equal\n")


def test_another_precision_is_measured_at_each_position(
    recorded: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, [result] = replayed(capsys, recorded, "--quantize", "q4")
    other, reference = LLM(tiny("Llama"), quantize="q4"), LLM(tiny("Llama"))
    num_different = 0
    for row, kept in zip(result["answers"], rows_of(recorded)[1:]):
        ids, start = kept["ids"] + kept["answer"][:-1], len(kept["ids"]) - 1
        p, q = (llm.logits(ids)[start:].double().log_softmax(-1) for llm in (reference, other))
        whole = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        assert max(row["kl"]) > 0
        assert all(kl <= float(most) + 1e-6 for kl, most in zip(row["kl"], whole))
        assert row["agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
        num_different += row["first_difference"] is not None
    assert code == int(num_different > 0)


def test_a_bound_on_the_divergence_decides_instead(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replayed(capsys, recorded, "--quantize", "q4", "--max-kl", "1e-9")[0] == 1
    assert replayed(capsys, recorded, "--quantize", "q4", "--max-kl", "50")[0] == 0


def test_the_first_token_that_differs_is_named(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(recorded)
    rows[2]["answer"][4] = (rows[2]["answer"][4] + 1) % 50
    recorded.write_text("\n".join(map(json.dumps, rows)))
    code, [result] = replayed(capsys, recorded)
    assert code == 1
    assert [row["first_difference"] for row in result["answers"]] == [None, 4, None, None]


def test_the_divergence_of_all_tokens_but_the_likeliest_counts_as_one() -> None:
    p, q = (torch.tensor(x).double().log() for x in ([0.5, 0.3, 0.1, 0.1], [0.25, 0.25, 0.4, 0.1]))
    top = [(0, math.log(0.5)), (1, math.log(0.3))]
    expected = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert replay.top_divergence(top, q) == pytest.approx(expected)
    whole = float((p.exp() * (p - q)).sum())
    assert replay.top_divergence([*enumerate(p.tolist())], q) == pytest.approx(whole)
    assert replay.top_divergence([*enumerate(p.tolist())], p) == 0


def test_a_constrained_answer_is_compared_but_not_generated_again(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"
    params = SamplingParams(max_tokens=8, regex="[a-z]{1,4}")
    LLM(tiny("Llama"), record=str(path)).complete(GenerationRequest("x", params=params))
    code, [result] = replayed(capsys, path)
    assert code == 0
    assert [row["is_generated"] for row in result["answers"]] == [False]


def test_a_cancelled_answer_is_kept_as_far_as_it_came(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"
    params = SamplingParams(max_tokens=50, ignore_eos=True, seed=1)
    stream = LLM(tiny("Llama"), record=str(path)).stream(GenerationRequest("x", params=params))
    for _ in range(3):
        next(stream)
    stream.close()
    [row] = rows_of(path)[1:]
    assert (len(row["answer"]), row["finish_reason"]) == (3, "cancelled")
    assert replayed(capsys, path)[0] == 0


def test_a_server_records_answers_and_no_keys(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with serving(lambda: LLM(tiny("Llama"), record=str(path)), api_keys=("secret-key",)) as live:
        live.http.headers["authorization"] = "Bearer secret-key"
        assert live.text("the fox", max_tokens=5).status_code == 200
        assert live.text("the fox", max_tokens=5).status_code == 200
    assert len(rows_of(path)) == 3
    assert "secret-key" not in path.read_text()


def test_every_run_in_a_file_is_replayed(
    recorded: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny("Llama", rope_theta=5e5)
    assert (
        nanollama.main(["-p", "hello", "--model", str(other), "-m", "5", "--record", str(recorded)])
        == 0
    )
    capsys.readouterr()
    code, results = replayed(capsys, recorded)
    assert code == 0
    assert [len(result["answers"]) for result in results] == [len(PARAMS), 1]


def test_a_full_file_ends_the_recording_not_the_answers(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MOST_BYTES", 20_000)
    path = tmp_path / "answers.jsonl"
    llm = LLM(tiny("Llama"), record=str(path))
    for request in requests() * 3:
        llm.complete(request)
    assert 0 < path.stat().st_size <= 20_000
    assert replay.read_record(str(path))


def test_a_file_that_cannot_be_written_is_one_line(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing" / "answers.jsonl"
    assert nanollama.main(["-p", "x", "--model", str(tiny("Llama")), "--record", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--record {path}: No such file or directory" in error


def test_a_model_with_fewer_tokens_is_refused(
    recorded: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(recorded)
    rows[1]["answer"][0] = 10**6
    recorded.write_text("\n".join(map(json.dumps, rows)))
    assert nanollama.main(["replay", str(recorded)]) == 1
    assert "line 2: a token is outside the model's vocabulary" in capsys.readouterr().err


LINES = st.dictionaries(
    st.sampled_from("run model ids answer logprobs seed params is_constrained seconds".split()),
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(["r", "m"]),
        lambda each: st.lists(each, max_size=3) | st.dictionaries(st.just("stop"), each),
        max_leaves=6,
    ),
)


@given(st.lists(LINES.map(json.dumps) | st.text(), max_size=4))
def test_any_other_file_is_refused_by_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"other-{os.getpid()}.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    with pytest.raises(RequestError, match=r"is not a line that --record writes|holds no answers"):
        replay.read_record(str(path))
