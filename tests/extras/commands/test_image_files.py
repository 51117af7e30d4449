"""--image and /image: files on the command line, and those that are dropped on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran
from PIL import Image

import nanollama
from nanollama_extras.commands.images import dropped, file_parts

Run = Callable[..., Ran]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "my photo's.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cat.jpg"
    Image.new("RGB", (8, 6), "red").save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "{quoted}",
        "{escaped}",
        "{url}",
        "{escaped} What is this?",
        "What is this? {quoted}",
        "{url}   What is this?",
    ],
)
def test_a_dropped_file_is_found(photo: Path, text: str) -> None:
    escaped = str(photo).replace(" ", "\\ ").replace("'", "\\'")
    spelled = {"quoted": f'"{photo}"', "escaped": escaped, "url": photo.as_uri()}
    rest = "What is this?" if "What" in text else ""
    assert dropped(text.format(**spelled)) == ([str(photo)], rest)


def test_several_files_keep_their_order(plain: Path) -> None:
    assert dropped("./cat.jpg ~/cat.jpg Compare. ./cat.jpg") == (
        ["./cat.jpg", "~/cat.jpg", "./cat.jpg"],
        "Compare.",
    )


@pytest.mark.parametrize(
    "text",
    [
        "Describe cat.jpg",
        "cat.jpg",
        "/load ./cat.jpg",
        "./dog.jpg",
        "Look at ./cat.jpg in the middle",
        "./",
        "",
        "'unclosed ./cat",
        "file://",
        "/ .png",
        "./cat.jpg\0",
    ],
)
def test_other_text_stays_as_it_is(plain: Path, text: str) -> None:
    assert dropped(text) == ([], text)


def test_a_command_takes_bare_names(plain: Path) -> None:
    assert dropped("cat.jpg", is_whole=True) == (["cat.jpg"], "")
    assert dropped("cat.jpg What?", is_whole=True) == (["cat.jpg"], "What?")
    assert dropped("dog.jpg What?", is_whole=True)[0] == []


def test_a_file_becomes_a_part(photo: Path) -> None:
    (part,) = file_parts([str(photo)])
    assert part["image_url"]["url"].startswith("data:image;base64,iVBORw0KGgo")
    with pytest.raises(nanollama.RequestError, match=r"none\.png: cannot be read"):
        file_parts(["none.png"])


def test_a_model_without_vision_refuses_a_file_in_one_line(
    cli: Run, tiny: Callable[..., Path], photo: Path
) -> None:
    for words in (
        ("run", tiny(), "--image", photo, "What?"),
        ("--model", tiny(), "--prompt", "What?", "--image", photo),
    ):
        ran = cli(*words)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith("error: messages[0] has an image: llama: this model reads no ")
        assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--prompt", "x", "--image", "none.png"), "none.png: cannot be read"),
        (("--serve", "--image", "a.png"), "--image needs --prompt or --interactive"),
        (("--batch-file", "x", "--image", "a.png"), "--image needs --prompt or --interactive"),
    ],
)
def test_what_is_wrong_with_an_image_is_said_before_the_model_is_loaded(
    cli: Run, flags: Any, problem: str
) -> None:
    ran = cli("--model", "no-such-model", *flags)
    assert ran.code in (1, 2)
    assert problem in ran.err
