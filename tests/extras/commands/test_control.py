"""ps, stop, cp and create: models of a server, and models of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ran
from serving import serving

import nanollama

pytestmark = pytest.mark.usefixtures("empty_caches")
Run = Callable[..., Ran]


def test_ps_lists_what_a_server_has_loaded(cli: Run, tiny_llm: nanollama.LLM) -> None:
    with serving(lambda: tiny_llm, model_id="fox") as live:
        ran = cli("ps", "--url", live.url)
    head, row = ran.out.splitlines()
    assert head.split() == ["NAME", "SIZE", "DEVICE", "CONTEXT", "STAYS"]
    assert row.startswith("fox ")
    assert row.split()[3:5] == ["cpu", "256"]


def test_stop_unloads_a_model(cli: Run, tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny()), model_id="fox") as live:
        assert cli("stop", "fox:latest", "--url", live.url).code == 0
        assert cli("ps", "--url", live.url).out.count("\n") == 1
        ran = cli("stop", "fox", "--url", live.url)
        assert ran.err.splitlines()[-1] == "error: fox: not loaded; loaded: nothing"


def test_a_server_that_refuses_is_one_line(cli: Run, tiny_llm: nanollama.LLM) -> None:
    with serving(lambda: tiny_llm, api_keys=("secret",)) as live:
        assert "this server needs its API key" in cli("ps", "--url", live.url).err
        assert cli("ps", "--url", live.url, "--api-key", "secret").code == 0


def test_without_a_server_the_error_says_how_to_start_one(cli: Run) -> None:
    error = cli("ps", "--url", "http://127.0.0.1:9").error
    assert "no server answers at http://127.0.0.1:9" in error
    assert "start one with: nanollama.py serve" in error


def test_a_model_gets_a_second_name(cli: Run, tiny: Callable[..., Path]) -> None:
    assert cli("cp", tiny(), "mine").code == 0
    assert "mine" in cli("ls").out
    flags = ("fox", "--temp", "0", "--max-tokens", "4")
    assert cli("run", "mine", *flags).out == cli("run", tiny(), *flags).out
    assert cli("cp", "mine", "mine:two").code == 0
    assert cli("run", "mine:two", *flags).out == cli("run", tiny(), *flags).out
    assert cli("rm", "mine", "--yes").code == 0
    assert cli("cp", "absent", "b").error.endswith("get it with: nanollama.py pull absent")


def test_a_model_is_made_from_a_modelfile(
    cli: Run, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Modelfile: cannot be read" in cli("create", "mine").error
    Path("Modelfile").write_text(f"FROM {tiny()}\nSYSTEM Hi\nPARAMETER num_predict 3\n")
    assert cli("create", "mine").code == 0
    Path("second").write_text("FROM mine\nPARAMETER temperature 0\n")
    assert cli("create", "two", "-f", "second").code == 0
    made = nanollama.ModelStore().modelfile("two")
    assert made
    assert (made.model, made.system) == (str(tiny()), "Hi")
    assert made.parameters == {"max_tokens": 3, "temperature": 0.0}
    assert cli("run", "two", "fox").out.count("\n") >= 1
    assert "is a model already" in cli("create", "smollm2", "-f", "second").error


def test_a_modelfile_without_from_makes_nothing(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "Modelfile"
    path.write_text("SYSTEM Hi\n")
    ran = cli("create", "mine", "-f", path)
    assert (ran.code, ran.err.splitlines()[0]) == (2, f"error: {path}: has no FROM")
