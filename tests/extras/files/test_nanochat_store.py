"""The checkpoint that is chosen from nanochat's own directory by source, tag and step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import nanollama


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "nanochat"


@pytest.fixture
def many(base: Path) -> Path:
    for place in ("chatsft_checkpoints/d4", "chatsft_checkpoints/d12", "base_checkpoints/d4"):
        (base / place).mkdir(parents=True)
        for step in (5, 100, 20):
            (base / place / f"model_{step:06d}.pt").touch()
    (base / "chatsft_checkpoints/d12/model_000900_backup.pt").touch()
    (base / "chatsft_checkpoints/notes.txt").touch()
    for number, tag in enumerate(("big", "odd", "more")):
        (base / "chatrl_checkpoints" / tag).mkdir(parents=True)
        (base / "chatrl_checkpoints" / tag / "model_000001.pt").touch()
        os.utime(base / "chatrl_checkpoints" / tag, (0, 100 * (number != 1) + number))
    return base


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "chatsft_checkpoints/d12/model_000100.pt"),
        ("-s 20", "chatsft_checkpoints/d12/model_000020.pt"),
        ("-g d4 --step 5", "chatsft_checkpoints/d4/model_000005.pt"),
        ("-i base", "base_checkpoints/d4/model_000100.pt"),
        ("--source rl", "chatrl_checkpoints/more/model_000001.pt"),
        ("-i rl --model-tag odd", "chatrl_checkpoints/odd/model_000001.pt"),
    ],
)
def test_source_tag_and_step_choose_as_in_nanochat(
    flags: str, expected: str, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(many))
    parser = nanollama.build_parser()
    for model in (["--model", "nanochat"], ["--model", str(many)], [] if flags else None):
        if model is None or (not model and not flags):
            continue
        args = parser.parse_args(["-p", "x", *model, *flags.split()])
        settings = nanollama.read_settings(args)
        assert nanollama.ModelStore().find(settings.model) == many / expected


def test_the_guides_name_of_the_directory_is_known_and_the_default_is_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ".cache" / "nanochat" / "sft_checkpoints" / "d2"
    home.mkdir(parents=True)
    (home / "model_000003.pt").touch()
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nanollama.ModelStore().find("nanochat") == home / "model_000003.pt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-i mid", "no checkpoints of source mid; there is: base, rl, sft"),
        ("-g d5", "no model tag d5; there is: d12, d4"),
        ("-g d4 -s 21", "no step 21; there is: 5, 20, 100"),
        ("--model smollm2 -s 3", "choose one of nanochat's models; smollm2 is neither"),
        ("--model nanochat --revision x", "--revision goes with a hub model"),
    ],
)
def test_what_is_not_there_is_named(
    flags: str,
    message: str,
    many: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(many))
    assert nanollama.main(["-p", "x", *flags.split()]) in (1, 2)
    assert message in capsys.readouterr().err
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(many / "nowhere"))
    assert nanollama.main(["show", "nanochat"]) == 1
    assert "no checkpoints of source sft; there is: nothing" in capsys.readouterr().err
