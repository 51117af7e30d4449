"""Several models behind one server: loaded when asked for, unloaded when idle or in the way."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf_files
import httpx
import pytest
import safetensors
from serving import Live, serving, wait_until

import nanollama
from nanollama import RequestError
from nanollama_extras.api import shelf as api
from nanollama_extras.api.shelf import KEEP_ALIVE_S, ServedModel, parse_duration

LONG = {"max_tokens": 200, "ignore_eos": True, "stream": True}


@dataclass
class Shelf:
    """Models to serve, each of which takes 10 bytes. `loads` are the names of those loaded, in
    order; a name in `held` waits before it is."""

    directory: Path
    loads: list[str] = field(default_factory=list)
    held: dict[str, threading.Event] = field(default_factory=dict)

    def source(self, name: str) -> ServedModel:
        def load() -> nanollama.LLM:
            self.loads.append(name)
            if name in self.held:
                self.held[name].wait()
            if name == "broken":
                raise nanollama.CheckpointError("broken: not a model")
            if name == "huge":
                raise MemoryError("no room\nat all")
            return nanollama.LLM(self.directory, parallel=2)

        return ServedModel(name, load, {"seed": 1}, need_bytes=lambda: 10)

    def models(self, *names: str, keep_alive: str | None = None, **fields: Any) -> api.Shelf:
        named = {name: self.source(name) for name in names}
        return api.Shelf(named, nanollama.ServerConfig(keep_alive=keep_alive), **fields)


@pytest.fixture
def shelf(tiny: Callable[..., Path]) -> Shelf:
    return Shelf(tiny())


def states(live: Live) -> dict[str, str]:
    return {m["id"]: m["state"] for m in live.http.get("/v1/models").json()["data"]}


def loaded(live: Live) -> set[str]:
    return {name for name, state in states(live).items() if state == "loaded"}


def ask(live: Live, model: str, **fields: Any) -> httpx.Response:
    return live.text(model=model, max_tokens=2, **fields)


def test_a_model_is_loaded_when_it_is_asked_for(shelf: Shelf) -> None:
    with serving(models=shelf.models("a", "b")) as live:
        assert live.http.get("/health").json()["ready"]
        assert states(live) == {"a": "unloaded", "b": "unloaded"}
        answer = ask(live, "b")
        assert (answer.status_code, answer.json()["model"]) == (200, "b")
        assert states(live) == {"b": "loaded", "a": "unloaded"}
        assert ask(live, "b:latest").json()["model"] == "b:latest"  # Ollama's name for the same
        assert shelf.loads == ["b"]
        assert live.http.get("/v1/models/b").json()["max_model_len"] == 256
        assert {row["model"] for row in live.http.get("/stats").json()["workers"]} == {"b"}
        assert live.text(max_tokens=1).json()["model"] == "b"  # none named: the one last used
        assert ask(live, "c").json()["error"]["code"] == "model_not_found"


def settings(*argv: str) -> nanollama.Settings:
    parser = nanollama.build_parser()
    return nanollama.read_settings(parser.parse_args(["--serve", *argv]))


def listed(models: nanollama.Models) -> dict[str, Any]:
    with serving(models=models, ready=False) as live:
        return {row.pop("id"): row for row in live.http.get("/v1/models").json()["data"]}


def test_the_context_of_a_model_that_is_not_loaded_is_that_of_its_files(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder, file = tiny(max_position_embeddings=128), tmp_path / "file.gguf"
    file.write_bytes(gguf_files.smallest()[0])
    argv = ("--model", str(folder), "--model", str(file))
    known = listed(api.open_shelf(settings(*argv), nanollama.ServerConfig()))
    capped = listed(api.open_shelf(settings(*argv, "--ctx", "100"), nanollama.ServerConfig()))
    for name, trained in ((folder.name, 128), ("file", 64)):
        for rows, n_ctx in ((known, trained), (capped, min(trained, 100))):
            row = rows[name]
            assert (row["state"], row["max_model_len"]) == ("unloaded", n_ctx)
            assert row["context_length"] == row["meta"]["n_ctx"] == n_ctx
            assert row["meta"]["n_ctx_train"] == trained
    with safetensors.safe_open(folder / "model.safetensors", "pt") as opened:
        num = sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
    assert known[folder.name]["meta"]["n_params"] == num
    assert known["file"]["meta"]["n_vocab"] == 4


def test_a_loaded_model_has_the_same_fields(shelf: Shelf) -> None:
    with serving(models=shelf.models("a", "b")) as live:
        ask(live, "b")
        row = live.http.get("/v1/models/b").json()
    assert row["max_model_len"] == row["context_length"] == row["meta"]["n_ctx"] == 256
    assert row["meta"]["n_vocab"] == nanollama.open_checkpoint(shelf.directory).config.n_vocab


def test_files_are_read_once_for_each_of_their_versions(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny(max_position_embeddings=128), tmp_path / "model"))
    opened: list[Path] = []

    def open_checkpoint(path: Path) -> nanollama.Checkpoint:
        opened.append(path)
        return nanollama.open_checkpoint(path)

    monkeypatch.setattr(api, "open_checkpoint", open_checkpoint)
    models = api.open_shelf(
        settings("--model", str(folder), "--model", "other"), nanollama.ServerConfig()
    )
    config = folder / "config.json"
    with serving(models=models) as live:

        def n_ctx() -> Any:
            return live.http.get("/v1/models/model").json()["max_model_len"]

        assert (n_ctx(), n_ctx(), opened) == (128, 128, [folder])
        config.write_text(config.read_text().replace("128", "96"))
        assert (n_ctx(), n_ctx(), opened) == (96, 96, [folder, folder])
        config.write_text("{")
        row = live.http.get("/v1/models/model").json()
    assert "max_model_len" not in row
    assert row["state"] == "unloaded"


def test_those_who_ask_for_one_model_wait_for_one_load(shelf: Shelf) -> None:
    shelf.held["a"] = threading.Event()
    with serving(models=shelf.models("a", "b")) as live, ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(ask, live, "a") for _ in range(3)]
        wait_until(lambda: shelf.loads == ["a"])
        wait_until(lambda: live.pool.num_waiting == 3)
        assert ask(live, "b").status_code == 200  # nobody else waits
        assert states(live)["a"] == "loading"
        shelf.held["a"].set()
        texts = {answer.result().json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        assert shelf.loads == ["a", "b"]


@pytest.mark.parametrize(("name", "told"), [("broken", "not a model"), ("huge", "MemoryError: no")])
def test_a_load_that_fails_is_its_callers_error_alone(shelf: Shelf, name: str, told: str) -> None:
    with serving(models=shelf.models("a", name)) as live:
        assert ask(live, "a").status_code == 200
        for num in (1, 2):  # a later request tries again
            answer = ask(live, name)
            assert answer.status_code == 500
            assert told in answer.json()["error"]["message"]
            assert shelf.loads == ["a", *[name] * num]
        assert ask(live, "a").status_code == 200
        assert not live.failures
        assert states(live) == {"a": "loaded", name: "unloaded"}


def test_an_idle_model_leaves_after_its_time(shelf: Shelf) -> None:
    with serving(models=shelf.models("a", keep_alive="100ms")) as live:
        wait_until(lambda: states(live) == {"a": "loaded"})
        ask(live, "a")
        threads = list(live.pool.workers)
        wait_until(lambda: states(live) == {"a": "unloaded"})
        wait_until(lambda: not any(thread.is_alive() for thread in threads))
        assert live.http.get("/health").json()["ready"]
        assert ask(live, "a").status_code == 200
        assert shelf.loads == ["a", "a"]


def test_a_model_that_answers_stays_until_it_is_done(shelf: Shelf) -> None:
    with serving(models=shelf.models("a", "b", keep_alive="0")) as live:
        with live.http.stream("POST", "/v1/completions", json={"prompt": "a", **LONG}) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: {")]
        assert len(lines) > 100
        wait_until(lambda: not loaded(live))


def test_a_model_that_left_is_gone_from_memory(shelf: Shelf) -> None:
    with serving(models=shelf.models("a", "b")) as live:
        ask(live, "a", structured_outputs={"regex": "[a-z]{3}"})
        llm = live.pool.llm()
        parts = [llm, llm.engine, llm.engine.decoder, llm.tokenizer, llm.grammars]
        left = [weakref.ref(part) for part in parts]
        del llm, parts
        gc.disable()  # it would hide that they hold each other
        try:
            live.http.post("/api/generate", json={"model": "a", "keep_alive": 0})
            wait_until(lambda: not any(ref() for ref in left))
        finally:
            gc.enable()


def test_who_comes_as_a_model_leaves_gets_it_loaded_again(shelf: Shelf) -> None:
    with serving(models=shelf.models("a", "b", keep_alive="0")) as live:
        for _ in range(3):
            assert ask(live, "a").status_code == 200
        with ThreadPoolExecutor(4) as threads:
            answers = threads.map(lambda i: ask(live, "ab"[i % 2]).status_code, range(12))
            assert set(answers) == {200}
        wait_until(lambda: not loaded(live))


def test_one_model_that_is_named_stays_for_ever(shelf: Shelf) -> None:
    with serving(models=shelf.models("a")) as live:
        ask(live, "a")
        assert live.pool.keep_s == float("inf")
        assert live.pool.timer is None
    with serving(models=shelf.models("a", "b")) as live:
        ask(live, "a")
        assert live.pool.keep_s == KEEP_ALIVE_S
        assert live.pool.timer is not None


@pytest.fixture
def narrow(shelf: Shelf) -> Iterator[Live]:
    """A server with memory for two models at a time."""

    def free_bytes() -> float:
        return 20 - 10 * len(live.models.workers)

    with serving(models=shelf.models(*"abcd", free_bytes=free_bytes)) as live:
        yield live


def test_the_idle_model_least_recently_used_leaves_for_another(narrow: Live) -> None:
    for name in "aba":
        ask(narrow, name)
    assert ask(narrow, "c").status_code == 200
    assert loaded(narrow) == {"a", "c"}
    assert ask(narrow, "d").status_code == 200
    assert loaded(narrow) == {"c", "d"}


def test_a_busy_model_is_waited_for(narrow: Live) -> None:
    engines = []
    for name in "ab":
        ask(narrow, name)
        engines.append(narrow.models.pools[name].llm().engine)
    go = threading.Event()
    for engine in engines:
        step = engine.step
        engine.step = lambda step=step: go.wait() and step()
    with ThreadPoolExecutor(3) as threads:
        busy = [threads.submit(ask, narrow, name) for name in "ab"]
        wait_until(lambda: sum(w.num_sequences for w in narrow.models.workers) == 2)
        other = threads.submit(ask, narrow, "c")
        wait_until(lambda: "c" in narrow.models.pools)
        time.sleep(0.05)
        assert states(narrow)["c"] == "loading"
        go.set()
        assert other.result().status_code == 200
        assert [answer.result().status_code for answer in busy] == [200, 200]
    assert "c" in loaded(narrow)
    assert len(loaded(narrow)) == 2


def test_a_server_that_closes_leaves_no_thread(shelf: Shelf) -> None:
    before = threading.active_count()
    with serving(models=shelf.models("a", "b")) as live:
        for name in "ab":
            ask(live, name)
        workers = live.models.workers
    assert not any(worker.is_alive() for worker in workers)
    wait_until(lambda: threading.active_count() <= before + 1)


# ---- what --serve serves -------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(nanollama, "serve", lambda *args: calls.append(args))
    return calls


def test_models_named_on_the_command_line_and_no_others(
    served: list[Any], tiny: Callable[..., Path]
) -> None:
    paths = [str(tiny()), str(tiny("Qwen2"))]
    flags = ["--serve", "--model", paths[0], "--model", paths[1], "--keep-alive", "90s"]
    assert nanollama.main(flags) == 0
    (models,) = served[0]
    assert list(models.named) == [Path(path).name for path in paths]
    assert models.keep_s == 90
    assert models.free_bytes() > 0
    assert asyncio.run(models.find("smollm2")) is None
    for path, source in zip(paths, models.named.values()):
        assert str(source.load().checkpoint.path) == path
        assert 100_000 < source.need_bytes() < 1_000_000


def test_without_a_model_those_in_the_cache_and_no_path(
    served: list[Any], smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tiny: Callable[..., Path],
) -> None:  # fmt: skip
    assert nanollama.main(["--serve", "--temp", "0"]) == 0
    library = served[0][0].library
    assert "smollm2" in library.names()
    source = library.find("smollm2")
    assert source.sampling == {"temperature": 0.0}
    assert source.need_bytes() > smollm2.stat().st_size
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").symlink_to(tiny())
    monkeypatch.chdir(tmp_path)
    for name in (
        "org/model",
        str(tiny()),
        "./org/model",
        "org/../org/model",
        "..",
        "\0",
        "a/b.gguf",
    ):
        assert library.find(name) is None


def test_several_models_are_for_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert nanollama.main(["--prompt", "a", "--model", "x/y", "--model", "smollm2"]) == 2
    assert "several --model need --serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("5m", 300), ("30s", 30), ("0", 0), ("1h30m", 5400), ("500ms", 0.5), (10, 10)],
        *[(1.5, 1.5), ("-1", float("inf")), (-1, float("inf")), ("-1m", float("inf"))],
    ],
)
def test_durations(text: Any, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", ["", "m", "5 m", "5x", True, [], "1" * 50, "nan", float("nan")])
def test_what_is_no_duration_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="keep_alive"):
        parse_duration(value)
