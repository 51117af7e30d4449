"""Section 7: the Modelfile: directives, errors with their lines, and the order of precedence."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import nanollama
from nanollama import Modelfile, ModelfileError, parse_modelfile

HERE = Path("dir/Modelfile")


def test_every_directive_is_read() -> None:
    text = '''
# a comment
FROM org/name:Q4_K_M
tokenizer org/other
Draft org/small
Parameter temperature 0.5
PARAMETER\ttop_k\t7
PARAMETER stop "User: "
PARAMETER stop """a
b"""
system "You are kind."
TEMPLATE """
{{ messages }}
"""
MESSAGE user How do you do?
message ASSISTANT """Fine.
   # not a comment
Thanks."""
LICENSE """MIT"""
'''
    assert parse_modelfile(text, HERE) == Modelfile(
        model="org/name:Q4_K_M",
        tokenizer="org/other",
        draft="org/small",
        system="You are kind.",
        template="{{ messages }}",
        license="MIT",
        parameters={"temperature": 0.5, "top_k": 7, "stop": ("User: ", "a\nb")},
        messages=(
            {"role": "user", "content": "How do you do?"},
            {"role": "assistant", "content": "Fine.\n   # not a comment\nThanks."},
        ),
    )


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("temperature 0.2", "temperature", 0.2),
        ("temp 0", "temperature", 0.0),
        ("top_k 10", "top_k", 10),
        ("TOP-P 0.8", "top_p", 0.8),
        ("min_p 0.05", "min_p", 0.05),
        ("repeat_penalty 1.3", "repeat_penalty", 1.3),
        ("repeat_last_n -1", "repeat_last_n", -1),
        ("presence_penalty 1.5", "presence_penalty", 1.5),
        ("frequency_penalty -1", "frequency_penalty", -1.0),
        ("seed 42", "seed", 42),
        ("max_tokens 9", "max_tokens", 9),
        ("num_predict 9", "max_tokens", 9),
        ("num_predict -1", "max_tokens", None),
        ("ctx 512", "ctx", 512),
        ("num_ctx 512", "ctx", 512),
        ("threads 2", "threads", 2),
        ("num_thread 2", "threads", 2),
        ("stop END", "stop", ("END",)),
        ('stop "<|im_end|>"', "stop", ("<|im_end|>",)),
    ],
)
def test_parameters_have_our_names_and_ollamas(line: str, field: str, value: Any) -> None:
    assert parse_modelfile(f"PARAMETER {line}", HERE).parameters == {field: value}


def test_ollamas_parameters_without_effect_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Those of Ollama's api/types.go, and of its older releases."""
    nanollama.warn_once.cache_clear()
    numbers = "num_keep num_batch num_gpu main_gpu mirostat_tau mirostat_eta".split()
    booleans = "use_mmap use_mlock low_vram f16_kv numa vocab_only penalize_newline".split()
    off = {"mirostat": "0", "tfs_z": "1.0", "typical_p": "1"}
    lines = [f"PARAMETER {name} 4" for name in numbers]
    lines += [f"PARAMETER {name} {word}" for name in booleans for word in ("true", "False")]
    lines += [f"PARAMETER {name} {value}" for name, value in off.items()]
    read = parse_modelfile("\n".join([*lines, "PARAMETER NUM-GPU 9", "PARAMETER top_k 3"]), HERE)
    assert read == Modelfile(parameters={"top_k": 3})
    names = [*numbers, *booleans, *off]
    assert caplog.messages == [f"the parameter {name} has no effect here" for name in names]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("\n\nADAPTR x", 3, "unknown directive 'ADAPTR'; known: FROM, TOKENIZER, ADAPTER"),
        ("FROM a\nPARAMETER temprature 1", 2, "did you mean temperature?"),
        ("PARAMETER microstat 1", 1, "unknown parameter 'microstat'; known: temperature, "),
        ("PARAMETER mirostat 2", 1, "mirostat 2 is not supported; leave it out, or set it to 0"),
        ("PARAMETER tfs_z 0.5", 1, "tfs_z 0.5 is not supported; leave it out, or set it to 1"),
        ("PARAMETER typical_p 0.9", 1, "typical_p 0.9 is not supported"),
        ("PARAMETER num_gpu many", 1, "num_gpu is 'many'; a number, true or false is needed"),
        ("PARAMETER temperature hot", 1, "temperature is 'hot'; it must be a number"),
        ("PARAMETER top_k 1.5", 1, "top_k is '1.5'; it must be an integer"),
        ("PARAMETER temperature -1", 1, "it must be a number between 0 and 100"),
        ("PARAMETER temperature nan", 1, "temperature is nan"),
        ("PARAMETER num_ctx 0", 1, "ctx is 0"),
        ("PARAMETER temperature", 1, "PARAMETER temperature needs a value"),
        ("PARAMETER", 1, "PARAMETER needs a value"),
        ('PARAMETER stop ""', 1, "PARAMETER stop needs a value"),
        ("FROM", 1, "FROM needs a value"),
        ("SYSTEM   \n", 1, "SYSTEM needs a value"),
        ("MESSAGE tool x", 1, "MESSAGE role 'tool'; use system, user or assistant"),
        ("MESSAGE user", 1, "MESSAGE user needs a value"),
        ('FROM a\nSYSTEM """never\nclosed', 2, 'this """ is never closed'),
        ('FROM a\nSYSTEM """x""" y', 2, 'this """ is never closed'),
        ('SYSTEM "x\ny', 1, 'this " is never closed'),
        ("TEMPLATE {{ .Prompt }}", 1, "this is a Go template; write it in Jinja"),
        ("TEMPLATE {{- if .System }}x{{ end }}", 1, "Go template"),
    ],
)
def test_an_error_names_the_line(text: str, line: int, message: str) -> None:
    with pytest.raises(ModelfileError) as error:
        parse_modelfile(text, HERE)
    assert str(error.value).startswith(f"{HERE}:{line}: ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_paths_count_from_the_modelfile(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")

    def model(value: str) -> str | None:
        return parse_modelfile(f"FROM {value}", tmp_path / "Modelfile").model

    assert model("weights.gguf") == str(tmp_path / "weights.gguf")
    assert model('"weights.gguf"') == str(tmp_path / "weights.gguf")
    assert model("./absent.gguf") == str(tmp_path / "absent.gguf")
    assert model("/absent.gguf") == "/absent.gguf"
    assert model("org/name") == "org/name"
    assert model("smollm2") == "smollm2"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_files_of_other_systems_are_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "Modelfile"
    text = 'FROM smollm2\r\nSYSTEM """one\r\ntwö"""\r\n'
    path.write_bytes(("\ufeff" * encoding.startswith("utf-16") + text).encode(encoding))
    modelfile = nanollama.read_modelfile(path)
    assert (modelfile.model, modelfile.system) == ("smollm2", "one\ntwö")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('"one line"', "one line"),
        ('"two\nlines"', "two\nlines"),
        ('"a "quoted" word"', 'a "quoted" word'),
        ('"""a""" and """b"""', 'a""" and """b'),
        ('""', ""),
        ('""""""', ""),
        ('"', None),
    ],
)
def test_quotes_end_where_a_line_ends_with_them_as_in_ollama(value: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(ModelfileError, match="never closed"):
            parse_modelfile(f"SYSTEM {value}\nTOKENIZER x", HERE)
    else:
        modelfile = parse_modelfile(f"SYSTEM {value}\nTOKENIZER x", HERE)
        assert (modelfile.system, modelfile.tokenizer) == (text, "x")


@pytest.mark.parametrize("kind", ["missing", "directory", "binary"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "Modelfile"
    if kind == "directory":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"FROM \xff\xfe")
    with pytest.raises(ModelfileError, match=r"Modelfile: (cannot be read: |is not UTF-8)"):
        nanollama.read_modelfile(path)


WORDS = st.sampled_from(
    [*nanollama.DIRECTIVES, "#", '"', '"""', "\n", " ", "\t", "stop", "num_ctx", "~\0", "user", "1"]
)


@given(st.text() | st.lists(WORDS | st.text(max_size=3), max_size=30).map(" ".join))
@example("FROM ~\0")
@example("\x85\u2028\x0cFROM x")
def test_any_text_is_read_or_refused_with_its_line(text: str) -> None:
    with contextlib.suppress(ModelfileError):
        parse_modelfile(text, HERE)


LINES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters='"\n\r'))


@given(st.lists(LINES, min_size=1).map("\n".join).filter(str.strip))
def test_a_block_keeps_its_text(text: str) -> None:
    for kind, directive in (("system", "SYSTEM"), ("template", "TEMPLATE")):
        with contextlib.suppress(ModelfileError):  # it may happen to be a Go template
            modelfile = parse_modelfile(f'{directive} """\n{text}\n"""', HERE)
            assert getattr(modelfile, kind) == text


# ---- precedence ----------------------------------------------------------------------------------


def settings(tmp_path: Path, text: str, *flags: str) -> nanollama.Settings:
    path = tmp_path / "Modelfile"
    path.write_text(text)
    parser = nanollama.build_parser()
    args = parser.parse_args(["--prompt", "x", "--modelfile", str(path), *flags])
    return nanollama.read_settings(args)


def test_a_flag_wins_over_the_modelfile_over_the_model_over_the_built_in(tmp_path: Path) -> None:
    text = "FROM smollm2\nPARAMETER top_k 5\nPARAMETER top_p 0.5\nPARAMETER num_ctx 99\nSYSTEM A"
    given = settings(tmp_path, text, "--top-k", "4")
    chosen = given.sampling({"top_k": 6, "top_p": 0.6, "min_p": 0.1})
    assert chosen["top_k"] == (4, "flag")
    assert chosen["top_p"] == (0.5, "Modelfile")
    assert chosen["min_p"] == (0.1, "model")
    assert chosen["temperature"] == (0.7, "built-in")
    names = ("model", "system", "ctx")
    file = [("smollm2", "Modelfile"), ("A", "Modelfile"), (99, "Modelfile")]
    assert [given.value(name) for name in names] == file
    given = settings(tmp_path, text, "--model", "org/x", "--system", "B", "--ctx", "50")
    assert [given.value(name) for name in names] == [("org/x", "flag"), ("B", "flag"), (50, "flag")]


@pytest.mark.parametrize(
    "name", ["..\\x", "a%2Fb", "name.1234abcd~", "a/b/c", "\\\\host\\share\\f"]
)
def test_no_name_leads_out_of_the_folder_of_modelfiles(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = nanollama.ModelStore(tmp_path)
    outside = tmp_path / "outside"
    outside.write_text("FROM smollm2\n")
    monkeypatch.setattr(nanollama.ModelStore, "modelfile_path", lambda self, name: outside)
    assert store.modelfile(name) is None
    assert store.modelfile("name:tag") == Modelfile(model="smollm2")


def test_without_flag_and_modelfile_the_default_model_is_used(tmp_path: Path) -> None:
    default = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert settings(tmp_path, "").value("model") == (default, "built-in")
    assert settings(tmp_path, "").value("system") == (None, "built-in")


def test_a_conversation_starts_with_the_system_prompt_and_the_messages(tmp_path: Path) -> None:
    text = "SYSTEM Be brief.\nMESSAGE user Hi\nMESSAGE assistant Hello"
    assert settings(tmp_path, text).messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]


def test_the_example_is_read_and_runs(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(nanollama.__file__).parent / "Modelfile.example"
    modelfile = nanollama.read_modelfile(path)
    assert modelfile.model == "smollm2"
    assert modelfile.parameters["max_tokens"] == 120
    assert modelfile.messages
    command = ["--modelfile", str(path), "--chat", "--temp", "0", "--max-tokens", "3"]
    assert nanollama.main([*command, "--prompt", "What is the capital of France?"]) == 0
    assert capsys.readouterr().out.startswith("The capital of")
