"""The verbs: run, chat, serve, batch and embed; and the help that explains them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran

import nanollama
from nanollama_extras.commands import help as screens

GREEDY = ("--temp", "0", "--max-tokens", "6")
pytestmark = pytest.mark.usefixtures("empty_caches")
Run = Callable[..., Ran]


@pytest.fixture(params=["words", "stdin", "both"])
def prompt(request: pytest.FixtureRequest) -> tuple[list[str], bytes, str]:
    """Words of a command line, what is piped in, and the message that they make."""
    return {
        "words": (["the", "quick"], b"", "the quick"),
        "stdin": ([], b"the quick\n", "the quick"),
        "both": (["Translate:"], b"the quick\nbrown\n", "Translate:\n\nthe quick\nbrown"),
    }[request.param]


def test_run_answers_the_words_and_what_is_piped_in(
    cli: Run, tiny: Callable[..., Path], prompt: tuple[list[str], bytes, str]
) -> None:
    words, stdin, message = prompt
    ran = cli("run", tiny(), *words, *GREEDY, stdin=stdin)
    same = cli("--model", tiny(), "--chat", "--prompt", message, *GREEDY)
    assert (ran.code, ran.out) == (0, same.out)
    assert ran.err.splitlines()[-1].startswith("[prefill: ")


def test_flags_may_stand_between_the_words(cli: Run, tiny: Callable[..., Path]) -> None:
    expected = cli("run", tiny(), "the", "quick", *GREEDY).out
    assert cli("run", *GREEDY, tiny(), "the quick").out == expected
    assert cli("run", tiny(), *GREEDY, "the", "--seed", "1", "quick").out == expected
    assert cli("run", "--model", tiny(), *GREEDY, "the quick").out == expected
    assert cli("run", tiny(), *GREEDY, "--", "the quick").out == expected


def test_run_without_a_limit_answers_up_to_the_context(cli: Run, tiny: Callable[..., Path]) -> None:
    never = [f"--logit-bias={end}=-100" for end in (1, 3)]
    ran = cli("run", tiny(), "fox", "--temp", "0", *never)
    assert ran.code == 0
    notice = re.search(r"\[cut at (\d+) tokens, where the context ends\]", ran.err)
    assert notice
    assert int(notice[1]) > 200
    prompted = cli("--model", tiny(), "--chat", "--prompt", "fox", "--temp", "0", *never)
    assert "[cut at 200 tokens; --max-tokens N]" in prompted.err
    modelfile = tiny().parent / "limit.mf"
    modelfile.write_text(f"FROM {tiny()}\nPARAMETER num_predict 7\n")
    ran = cli("run", "--modelfile", modelfile, "fox", "--temp", "0", *never)
    assert "[cut at 7 tokens; --max-tokens N]" in ran.err


def test_chat_answers_one_message_a_line(cli: Run, tiny: Callable[..., Path]) -> None:
    flags = (*GREEDY, "--stop", "\n")
    ran = cli("chat", tiny(), *flags, stdin=b"fox\ndog\n")
    same = cli("--interactive", "--model", tiny(), *flags, stdin=b"fox\ndog\n")
    assert (ran.code, ran.out) == (0, same.out)


def test_batch_answers_each_line_as_a_message(
    cli: Run, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("fox\nthe quick\n")
    ran = cli("batch", tiny(), path, *GREEDY)
    same = cli("--model", tiny(), "--batch-file", path, "--chat", *GREEDY)
    assert (ran.code, ran.out) == (0, same.out)
    lines = cli("batch", tiny(), path, *GREEDY, "--output", "-").out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["fox", "the quick"]
    assert " of 2 answers are cut; --max-tokens N]" in cli("batch", tiny(), path, *GREEDY).err


def test_embed_prints_the_vector_of_a_text(cli: Run, tiny: Callable[..., Path]) -> None:
    expected = cli("--embed", "--model", tiny(), "--prompt", "the quick").out
    assert cli("embed", tiny(), "the", "quick").out == expected
    assert cli("embed", tiny(), stdin=b"the quick\n").out == expected


def test_serve_names_its_models_as_words(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []

    def run_serve(settings: nanollama.Settings) -> int:
        served.append(settings.args)
        return 0

    monkeypatch.setattr(nanollama, "run_serve", run_serve)
    for argv, models in (("a b", ["a", "b"]), ("", []), ("a --model b --port 3", ["a", "b"])):
        assert nanollama.main(["serve", *argv.split()]) == 0
        assert served[-1].models == models
        assert served[-1].serve
    assert served[-1].port == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("run", "give a MODEL, as in smollm2 or org/name"),
        ("run a", "there is no prompt, and standard input is empty"),
        ("chat a b", "unexpected words: b; run MODEL PROMPT takes a prompt"),
        ("batch a", "give one FILE with a prompt on each line"),
        ("embed a", "give a TEXT, or --batch-file FILE, or pipe a text in"),
        ("run a --port 3", "unrecognized arguments: --port 3"),
        ("serve a --chat", "unrecognized arguments: --chat"),
        ("run a b --max-token 3", "unrecognized arguments: --max-token 3; did you mean"),
        ("completion", "give a shell: bash, zsh, fish"),
        ("lsit", "unknown command 'lsit'; did you mean list?"),
        ("smollm2", "unknown command 'smollm2'; "),
    ],
)
def test_a_usage_error_is_two_lines(cli: Run, argv: str, message: str) -> None:
    ran = cli(*argv.split())
    assert (ran.code, ran.out) == (2, "")
    error, hint = ran.err.splitlines()
    assert error.startswith(f"error: {message}")
    verb = argv.split()[0]
    named = f"nanollama.py {verb}" if verb in nanollama.COMMANDS else "nanollama.py"
    assert hint == f"see: {named} --help"


# ---- help ----------------------------------------------------------------------------------------


def test_the_main_help_is_one_screen(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("--help").out.splitlines()
    assert len(lines) <= 52
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert all(flag in text for flag in (*screens.POPULAR, *screens.MODES))
    assert all(re.search(rf"\b{name}\b", text) for name in nanollama.COMMANDS)
    assert len(screens.POPULAR) == 15


def test_every_verb_has_a_line_of_help() -> None:
    assert set(screens.VERBS) == set(nanollama.COMMANDS)


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?m)(?:^  |, )(--?[A-Za-z][\w-]*)", text))


def test_the_help_of_run_has_its_groups_alone(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nanollama", "run", "--help"])
    text = cli("run", "--help").out
    assert text.startswith("usage: nanollama.py run MODEL [PROMPT ..] [options]\n")
    assert {"--temp", "--ctx", "--system", "--grammar"} <= flags(text)
    assert not {"--port", "--batch-file", "--serve"} & flags(text)


def test_flags_of_nanochat_are_in_the_help_of_its_models_alone(
    cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = {"-i", "-g", "-s", "-d", "--source", "--model-tag", "--step"}
    (tmp_path / "base_checkpoints").mkdir()
    for words, shown in (
        (["run", "smollm2"], False),
        (["run", "nanochat"], True),
        (["run", str(tmp_path)], True),
        (["show", "nanochat"], True),
        (["--help-all"], True),
        ([], False),
    ):
        argv = [*words, *["--help"] * ("--help-all" not in words)]
        monkeypatch.setattr(sys, "argv", ["nanollama", *argv])
        found = flags(cli(*argv).out) & own
        assert found == (own if shown else set()), argv


def test_help_all_has_every_flag(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nanollama", "--help-all"])
    shown = flags(cli("--help-all").out)
    known = set(nanollama.build_parser()._option_string_actions)
    assert shown == known
