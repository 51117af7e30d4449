"""The names of models for clients: no path of the machine is in any answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import httpx
import pytest
from serving import Live, serving

import nanollama
from nanollama import public_name
from nanollama_extras.api.shelf import DIRECTORIES, open_shelf, public_names

USER = [{"role": "user", "content": "hello"}]


def served(*flags: str, open_models: Any = open_shelf) -> nanollama.Models:
    """The models of a command line."""
    parser = nanollama.build_parser()
    args = parser.parse_args(["--serve", "--kernels", "torch", *flags])
    config = nanollama.ServerConfig(**nanollama.given_flags(args, nanollama.ServerConfig))
    return open_models(nanollama.read_settings(args), config)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """A GGUF file, two directories of one name, a damaged file, and a Modelfile."""
    folder = tmp_path_factory.mktemp("secret") / "of mine"
    shutil.copytree(tiny(), folder / "a" / "twin")
    shutil.copytree(tiny(), folder / "b" / "twin")
    gguf_files.convert(tiny(), folder / "single.gguf")
    (folder / "broken.gguf").write_bytes(b"GGUF\x03")
    (folder / "Modelfile").write_text("FROM ./single.gguf\nTOKENIZER ./a/twin\nSYSTEM Be kind.\n")
    return folder


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    """A server of five models, of which two cannot be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        paths = [folder / "single.gguf", "a/twin", folder / "b" / "twin", "./broken.gguf"]
        flags = [word for path in (*paths, folder / "gone.gguf") for word in ("--model", str(path))]
        with serving(models=served(*flags)) as live:
            yield live


def ask_everything(http: httpx.Client, name: str) -> dict[str, httpx.Response]:
    """The answer of each route that shows or takes the name of a model."""
    chat = {"model": name, "messages": USER, "max_tokens": 1, "stream": False}
    text = {"model": name, "prompt": "a", "input": "a", "max_tokens": 1, "stream": False}
    responses = {"model": name, "input": "a", "max_output_tokens": 1}
    bodies: dict[str, Any] = {
        "/v1/chat/completions": chat,
        "/chat/completions": chat,
        "/v1/completions": text,
        "/v1/embeddings": {"model": name, "input": "a"},
        "/v1/responses": responses,
        "/tokenize": text,
        "/apply-template": chat,
        "/api/chat": {**chat, "options": {"num_predict": 1}},
        "/api/generate": {**text, "options": {"num_predict": 1}},
        "/api/embed": {"model": name, "input": "a"},
        "/api/show": {"model": name},
        "/api/delete": {"model": name},
        "/api/create": {"model": name, "from": name},
    }
    posted = {path: http.post(path, json=body) for path, body in bodies.items()}
    gets = "/v1/models /api/tags /api/ps /stats /metrics /health /openapi.json /v1/capabilities"
    got = {path: http.get(path) for path in [*gets.split(), f"/v1/models/{name}", "/"]}
    return posted | got


@pytest.mark.parametrize("name", ["single", "twin", "twin-2", "broken", "gone", "nothing"])
def test_no_answer_has_a_path(live: Live, folder: Path, name: str) -> None:
    for path, response in ask_everything(live.http, name).items():
        for part in ("of mine", str(folder), str(folder.parent), "./broken", "a/twin"):
            assert part not in response.text, path
            assert part not in str(response.headers), path


def test_a_model_is_served_under_its_stem_on_every_api(live: Live, folder: Path) -> None:
    names = ["single", "twin", "twin-2", "broken", "gone"]
    assert {m["id"] for m in live.http.get("/v1/models").json()["data"]} == set(names)
    for name in (*names[:3], "single:latest", "hf.co/single", "huggingface.co/twin:latest"):
        answers = ask_everything(live.http, name)
        assert {path for path, answer in answers.items() if answer.status_code != 200} <= {
            "/api/delete", "/api/create", f"/v1/models/{name}"
        }  # fmt: skip
        assert answers["/v1/chat/completions"].json()["model"] == name
    listed = {m["name"] for m in live.http.get("/api/tags").json()["models"]}
    assert listed == {"single", "twin", "twin-2"}
    assert live.http.post("/api/show", json={"model": "single"}).json()["modelfile"] == (
        "FROM single\n"
    )
    for path in (folder / "single.gguf", "a/twin", "./a/twin", "single.gguf"):
        assert live.chat(model=str(path)).status_code == 404


def test_an_error_names_the_file_and_the_log_its_path(
    live: Live, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error = live.chat(model="broken").json()["error"]
    assert error["message"].startswith("broken.gguf: ")
    assert f"{folder}/broken.gguf: " in caplog.text
    answer = live.http.post("/api/chat", json={"model": "broken", "messages": USER})
    assert answer.json()["error"].startswith("broken.gguf: ")


def test_a_modelfile_names_no_path(folder: Path) -> None:
    models = served("--modelfile", str(folder / "Modelfile"))
    assert list(models.named) == ["single"]
    with serving(models=models) as live:
        assert live.chat(max_tokens=1).json()["model"] == "single"
        shown = live.http.post("/api/show", json={"model": "single"}).json()
        assert shown["modelfile"].startswith("FROM single\nTOKENIZER")
        assert "twin" in shown["modelfile"]
        assert "mine" not in json.dumps(shown)


def test_the_core_alone_names_its_model_in_the_same_way(folder: Path) -> None:
    flags = ("--model", str(folder / "single.gguf"))
    models = served(*flags, open_models=nanollama.open_model)
    assert list(models.named) == ["single"]
    with serving(models=models) as live:
        for name in ("single", "single:latest", "hf.co/single"):
            assert live.chat(model=name, max_tokens=1).json()["model"] == name
        assert live.chat(model=str(folder / "single.gguf")).status_code == 404
    models = served(*flags, "--alias", "me", open_models=nanollama.open_model)
    assert list(models.named) == ["me"]


@pytest.mark.parametrize("flag", ["--alias", "--served-model-name"])
def test_an_alias_is_the_name_of_its_model(folder: Path, flag: str) -> None:
    paths = ["--model", f"{folder}/a/twin", "--model", f"{folder}/b/twin"]
    assert list(served(*paths, flag, "one", flag, "two").named) == ["one", "two"]
    assert list(served(*paths, flag, "one").named) == ["one", "twin"]
    assert list(served(*paths, flag, "twin").named) == ["twin", "twin-2"]
    with pytest.raises(nanollama.UsageError, match="--alias c has no --model"):
        served(*paths, flag, "a", flag, "b", flag, "c")
    with pytest.raises(nanollama.UsageError, match="--alias"):
        served(flag, "a")
    with serving(models=served(*paths[:2], flag, "me:v1")) as live:
        for name in ("me:v1", "me:v1:latest"):
            assert live.chat(model=name, max_tokens=1).status_code == 200
            chat = {"model": name, "messages": USER, "stream": False}
            assert live.http.post("/api/chat", json=chat).status_code == 200
        assert live.chat(model="twin").status_code == 404


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("smollm2", "smollm2"),
        ("org/name", "org/name"),
        ("org/name:Q4_K_M", "org/name:Q4_K_M"),
        ("org/name/sub/file.gguf", "org/name/sub/file.gguf"),
        ("hf.co/org/name", "org/name"),
        ("https://huggingface.co/org/name:latest", "org/name"),
        ("/no/where/x.gguf", "x"),
        ("/no/where/x.v1-00001-of-00003.gguf", "x.v1"),
        ("/no/where/Name-1.5B/", "Name-1.5B"),
        ("../no/where/x", "x"),
        ("~/x.gguf", "x"),
    ],
)
def test_public_names(reference: str, name: str) -> None:
    assert public_name(reference) == name


def test_the_working_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    assert public_name(".") == "models"
    assert public_name("org/name") == "name"  # a path here goes before the hub's id


def test_names_that_collide_are_numbered() -> None:
    names = ["/a/x.gguf", "/b/x.gguf", "x-2", "/a/x.gguf", "/c/x"]
    assert public_names(names, ()) == {
        "x": "/a/x.gguf", "x-2": "/b/x.gguf", "x-2-2": "x-2", "x-3": "/c/x"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/my models/x.gguf: tensor a/b", "x.gguf: tensor a/b"),
        ("cannot be stored in /home/me/.cache/hf: No space", "cannot be stored in hf: No space"),
        ("No such file: '/home/o'brien/x (1)/m.gguf'", "No such file: 'm.gguf'"),
        ("cannot import y (/usr/lib/python3/y.py)", "cannot import y (y.py)"),
        ("C:\\Users\\me\\x.gguf: bad", "x.gguf: bad"),
        ("~/models/x.gguf: bad", "x.gguf: bad"),
        (
            "org/name/x.gguf at https://hf.co/org/x: no",
            "org/name/x.gguf at https://hf.co/org/x: no",
        ),
        ("not in the cache; POST /api/pull it first", "not in the cache; POST /api/pull it first"),
        ("1 / 2 and/or 3", "1 / 2 and/or 3"),
    ],
)
def test_directories_are_cut_off(text: str, shown: str) -> None:
    assert DIRECTORIES.sub("", text) == shown
