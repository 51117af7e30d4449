"""The X-ray of an answer in the terminal: shades and marks, /why, /branch."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran, share_kernels
from families import ROWS

import nanollama
from nanollama import LLM, AnswerSplitter, Delta, GenerationRequest, SamplingParams, TokenLogprobs
from nanollama_extras.answers.stages import look, probe_request
from nanollama_extras.commands.xray import Fork, Token, Watched, XrayPrinter, forked

MARK = re.compile("‹[0-9]+›")
STYLE = re.compile(r"\x1b\[[0-9;]*m")


# ---- shades --------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(texts: list[tuple[str, float]], llm: LLM, out: Any, hides: bool = False) -> str:
    """What is written for deltas with texts and probabilities."""
    printer = XrayPrinter(llm, AnswerSplitter(keep_tags=True), hides, out)
    for i, (text, share) in enumerate(texts):
        logprobs = TokenLogprobs(float(nanollama.np.log(share)), ((99, -0.1),))
        printer.push(Delta(0, text, i, logprobs, "stop" if i == len(texts) - 1 else None))
    assert printer.text["content"] == "".join(text for text, _ in texts if "think" not in text)
    return str(out.getvalue())


SAID = [("The", 0.95), (" ca", 0.6), ("pital", 0.05), (" is\n", 0.3), ("", 0.9), ("é", 0.01)]


def test_marks_are_behind_surprising_tokens(tiny_llm: LLM) -> None:
    assert printed(SAID, tiny_llm, io.StringIO()) == "The capital‹3› is\né‹6›"


def test_a_terminal_shades_each_token(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = printed(SAID, tiny_llm, Terminal())
    assert STYLE.sub("", shown) == "The capital‹3› is\né‹6›"
    assert shown.startswith("\x1b[30;48;5;194mThe\x1b[0m\x1b[30;48;5;157m ca\x1b[0m")
    assert "\x1b[0m\n\x1b" in shown  # no colour runs on to the end of a row
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(SAID, tiny_llm, Terminal()) == "The capital‹3› is\né‹6›"


def test_texts_that_are_held_back_keep_their_tokens(tiny_llm: LLM) -> None:
    """The splitter waits for the end of what may be a tag."""
    said = [("a", 0.05), ("<th", 0.9), ("in", 0.9), (" b", 0.05), ("c", 0.9)]
    assert printed(said, tiny_llm, io.StringIO()) == "a‹1›<thin b‹4›c"


def test_hidden_thoughts_leave_no_marks(tiny_llm: LLM) -> None:
    said = [("<think>", 0.05), ("think", 0.05), ("</think>", 0.05), ("b", 0.05)]
    assert printed(said, tiny_llm, io.StringIO(), hides=True) == "b‹4›"


def test_explain_leaves_the_text_as_it_is(cli: Callable[..., Ran], tiny: Any) -> None:
    flags = ("--model", tiny(), "--prompt", "the fox", "--temp", 0, "--max-tokens", 6)
    plain, ran = cli(*flags), cli(*flags, "--explain")
    assert MARK.sub("", ran.out) == plain.out
    assert re.search(r"\[\d tokens, perplexity \d+\.\d\d, \d surprising\]", ran.err)
    assert re.search(r"^‹\d› '.*' \d\.\d%; likelier: '.*' \d+\.\d%", ran.err, re.M)


@pytest.mark.parametrize("mode", [("--batch-file", __file__), ("--serve",), ("--embed",)])
def test_explain_needs_one_answer(mode: tuple[str, ...], cli: Callable[..., Ran]) -> None:
    prompt = ("--prompt", "x") if mode == ("--embed",) else ()
    ran = cli("--model", "tiny-random", "--explain", *mode, *prompt)
    assert (ran.code, "--explain needs --prompt or --interactive" in ran.err) == (2, True)


# ---- branches ------------------------------------------------------------------------------------


def forcing(ids: list[int]) -> Any:
    """A sampler that takes these ids first, one step at a time."""

    def sampler(seq: nanollama.Sequence, logits: Any) -> int:
        at = seq.num_generated
        return ids[at] if at < len(ids) else seq.choose(logits)

    return sampler


@pytest.mark.parametrize("settings", [{}, {"presence_penalty": 1.5}, {"regex": "[a-h]{12}"}])
@pytest.mark.parametrize("number", [1, 4])
def test_a_branch_equals_a_fresh_run_with_its_prefix_forced(
    number: int, settings: dict[str, Any], tiny_llm: LLM
) -> None:
    values: dict[str, Any] = {"seed": 5, "max_tokens": 12, "logprobs": 5, **settings}
    request = GenerationRequest("the quick fox", params=SamplingParams(**values))
    made = tiny_llm.prepare(request)
    first = tiny_llm.complete(made)
    tokens = [Token(i, *one) for i, one in enumerate(zip(first.token_ids, first.logprobs), 1)]
    form = made.form.constraint.copy() if made.form.constraint else None
    for token in tokens[: number - 1] if form else ():
        form.push(token.token_id)
    own = first.token_ids[number - 1]
    fits = range(320) if form is None else form.allowed().nonzero()[0].tolist()
    other = next(i for i in fits if i not in (own, *tiny_llm.engine.end_ids))
    tiny_llm.forget()
    tiny_llm.complete(made)
    fork = Fork(tokens[: number - 1], [other], 5)
    branch = nanollama.Completion.of(list(forked(tiny_llm, made, fork)))
    prefix = [*first.token_ids[: number - 1], other]
    params = SamplingParams(**values, sampler=forcing(prefix))
    fresh = tiny_llm.complete(GenerationRequest("the quick fox", params=params))
    assert branch.token_ids == fresh.token_ids
    assert (branch.text, branch.finish_reason) == (fresh.text, fresh.finish_reason)
    assert branch.logprobs[: number - 1] == first.logprobs[: number - 1]
    assert branch.usage.cached_tokens == len(made.ids) + number - 2
    assert branch.usage.completion_tokens == len(fresh.token_ids)


def test_a_model_with_states_goes_on_from_a_saved_one(tiny: Any) -> None:
    """Its states cannot be cut: what follows the last saved one is read again."""
    name, shape = ROWS["lfm2"]
    llm = LLM(tiny(name, **shape, max_position_embeddings=4096), kernels="torch", lookup=4)
    values: dict[str, Any] = {"seed": 5, "max_tokens": 12, "logprobs": 2}
    request = GenerationRequest("the quick fox " * 9, params=SamplingParams(**values))
    made = llm.prepare(request)
    first = llm.complete(made)
    ids = first.token_ids
    tokens = [Token(i, *one) for i, one in enumerate(zip(ids, first.logprobs), 1)]
    assert [look(llm, probe_request(request, made.ids, ids[:i])).drawn for i in (0, 9)] == [
        ids[0],
        ids[9],
    ]
    branch = nanollama.Completion.of([*forked(llm, made, Fork(tokens[:7], [ids[0]], 5))])
    assert 0 < branch.usage.cached_tokens < len(made.ids) + 7
    params = SamplingParams(**values, sampler=forcing([*ids[:7], ids[0]]))
    llm.forget()
    fresh = llm.complete(GenerationRequest("the quick fox " * 9, params=params))
    assert branch.token_ids == fresh.token_ids


def test_a_branch_that_the_form_forbids_is_refused(tiny_llm: LLM) -> None:
    params = SamplingParams(seed=5, regex="[a-h]{4}", logprobs=5)
    made = tiny_llm.prepare(GenerationRequest("the fox", params=params))
    z = tiny_llm.encode("z", False)
    with pytest.raises(nanollama.RequestError, match="does not fit the form of the answer"):
        list(forked(tiny_llm, made, Fork([], z, 5)))


# ---- the conversation ----------------------------------------------------------------------------


@pytest.fixture
def talk(cli: Callable[..., Ran], tiny: Any, tmp_path: Path, monkeypatch: Any) -> Any:
    """talk(*lines, flags=()) -> what a conversation over a pipe prints."""
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, flags: tuple[str, ...] = ()) -> Ran:
        own = ("--temp", "0.9", "--seed", "3", "--max-tokens", "6", "--quiet", *flags)
        text = "".join(f"{line}\n" for line in lines).encode()
        return cli("--interactive", "--model", tiny(), *own, stdin=text)

    return run


def test_why_shows_the_candidates_through_every_stage(talk: Any) -> None:
    ran = talk("/explain", "fox", "/why", "/why 2")
    assert re.search(r"^!?1 '.*' .*%  !?2 '", ran.err, re.M)
    head, table = ran.err.split("token 2: ")[1].split("\n", 1)
    assert re.match(r"'.+' \(id \d+\), .*%, rank \d+ of 320, surprise \d+\.\d bits", head)
    assert re.search(
        r"^ +logits +repeat 1\.1 +temperature 0\.9 +top-k 50 +top-p 0\.9$", table, re.M
    )
    assert re.search(r"^tokens left +320 +320 +320 +50 +\d+$", table, re.M)
    assert len(re.findall(r"^> ", table, re.M)) == 1
    assert "the sampler itself draws" not in ran.err


def test_branch_goes_on_from_another_token(talk: Any) -> None:
    lines = "fox", "/why", "/branch 3 65", "/why", "/why 3", "/save talk.json"
    ran = talk(*lines, flags=("--explain",))
    before = re.findall(r"^(!?1 .*?)  !?3 ", ran.err, re.M)
    assert len(before) == 2
    assert before[0] == before[1]
    (cached,) = re.findall(r"\(token 3 replaced; (\d+) of (\d+) tokens before it cached", ran.err)
    assert int(cached[0]) == int(cached[1]) - 1
    assert re.search(r"^token 3: .* \(id 65\)", ran.err, re.M)
    assert re.search(r"^\(the sampler itself draws '.*' here\)$", ran.err, re.M)
    assert "saved 2 messages" in ran.err


def test_a_branch_keeps_the_seed_of_its_answer(tiny_llm: LLM) -> None:
    """With the token that was there anyway, it is the same answer, though no seed was given."""
    watched = Watched(tiny_llm)
    request = GenerationRequest("the fox", params=SamplingParams(logprobs=5, max_tokens=8))
    first = [*watched.stream(watched.prepare(request))]
    assert watched.answer
    kept, own = watched.answer.tokens[:2], watched.answer.tokens[2].token_id
    watched.fork = Fork(kept, [own], watched.answer.prepared.request.params.seed)
    again = [*watched.stream(watched.prepare(request))]
    assert [delta.token_id for delta in again] == [delta.token_id for delta in first]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("/why 1",), "answers are not explained; /explain turns that on"),
        (("/explain", "/why 1"), "there is no answer yet that was explained"),
        (("/explain", "fox", "/why 9"), "there is no token 9; the answer has 1 to 6"),
        (("/explain", "fox", "/branch x"), "there is no token x; the answer has 1 to 6"),
        (("/explain", "fox", "/branch 2"), "/branch needs a number and a token"),
        (("/explain", "fox", "/branch 2 99999"), "token id 99999 is outside the vocabulary"),
        (("/explain", "fox", "/undo", "/branch 2 5"), "/branch goes on from the last answer"),
        (("/explain", "fox", "/continue", "/branch 2 5"), "/branch goes on from the last answer"),
        (("/explain", "fox", "/explain", "/why 1"), "answers are not explained"),
    ],
)
def test_mistakes_are_named(lines: tuple[str, ...], message: str, talk: Any) -> None:
    assert f"error: {message}" in talk(*lines).err


def test_another_model_is_explained_too(talk: Any, tiny: Any) -> None:
    ran = talk("fox", f"/model {tiny('Qwen3', head_dim=32)}", "dog", "/why 1", flags=("--explain",))
    assert "token 1: " in ran.err


def test_branches_are_not_recorded(talk: Any, tmp_path: Path) -> None:
    """What was forced could not be replayed."""
    file = tmp_path / "answers.jsonl"
    ran = talk("fox", "/branch 3 65", "/why 2", flags=("--explain", "--record", str(file)))
    assert "tokens before it cached" in ran.err
    assert len(file.read_text().splitlines()) == 2  # of the model, and of the first answer


# ---- a pseudo-terminal ---------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_recording_of_a_terminal(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import pexpect

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    share_kernels(tmp_path / "own")
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))
    flags = "--temp 0 --max-tokens 40 --threads 1 --kernels torch --quiet --explain"
    command = [nanollama.__file__, "run", str(tiny()), *flags.split()]
    child = pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=120)
    child.setwinsize(24, 60)
    child.expect_exact(">>> ")
    child.send("fox\r")
    child.expect_exact("[40 tokens, perplexity")
    shown = child.before
    assert re.search(r"\x1b\[30;48;5;\d+m[^\x1b]+\x1b\[0m", shown)
    numbers = [*map(int, re.findall("‹([0-9]+)›", shown))]
    assert numbers == sorted(numbers)
    assert 0 < len({*numbers}) <= 40
    rows = STYLE.sub("", shown).split("\r\n")
    assert max(len(row.rpartition("\x1b[K")[2]) for row in rows) < 60
    child.expect_exact(">>> ")
    child.send("/why 1\r")
    child.expect(r"token 1: .* rank 1 of 320")
    child.expect_exact(">>> ")
    child.send("/branch 2 65\r")
    child.expect_exact("(token 2 replaced; ")
    child.expect_exact(">>> ")
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.close()
