"""`lens`: its numbers are the model's, in the terminal, as JSON and in the picture."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nanollama
from nanollama import LLM
from nanollama_extras.commands.lens import lens_rows, looked_into, picture, token_names

CHROMIUM = shutil.which("chromium")
TEXT = "the quick fox"
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def lens(capsys: pytest.CaptureFixture[str], *flags: Any) -> str:
    assert nanollama.main(["lens", TEXT, *map(str, flags)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("options", [{"kernels": "torch"}, {"quantize": "q8"}])
def test_the_last_row_is_what_the_model_says_bit_for_bit(
    options: dict[str, Any], tiny: Callable[..., Path]
) -> None:
    llm = LLM(tiny("Llama"), **options)
    ids = llm.encode(TEXT)
    rows = lens_rows(llm, ids, 3)
    assert [len(row) for row in rows] == [len(ids)] * (llm.config.n_layers + 1)
    top = llm.logits(ids).softmax(dim=-1).topk(3, dim=-1)
    names = [token_names(llm, row) for row in top.indices.tolist()]
    assert [[name for name, _ in cell] for cell in rows[-1]] == names
    assert [[p for _, p in cell] for cell in rows[-1]] == top.values.tolist()


def test_the_table_has_a_line_for_each_layer(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lens(capsys, "--model", tiny("Llama"), "--attention", "1", "--top", 2)
    lines = shown.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["embedding", "layer 0", "layer 1"]
    assert re.search(r"\nnext: '.*' [\d.]+%, '.*' [\d.]+%\n", shown)
    assert "attention of layer 1, mean of all heads" in shown
    assert "\x1b" not in shown


def test_a_mixture_shows_its_experts(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lens(capsys, "--model", tiny("Qwen3Moe", **MIXTURE), "--kernels", "torch")
    assert len(re.findall(r"(?m)^layer [01] +\d \(\d+%\)  \d \(\d+%\)$", shown)) == 2


def test_json_has_all_numbers(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Llama")
    found = json.loads(lens(capsys, "--model", path, "--json", "--top", 2, "--kernels", "torch"))
    num = len(LLM(path).encode(TEXT))
    assert len(found["tokens"]) == len(found["lens"][0]) == num
    assert [len(found["lens"]), len(found["lens"][0][0])] == [3, 2]
    assert [len(found["patterns"]["1"]), len(found["patterns"]["1"][0])] == [4, num]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top", "0"], "--top is 0; it must be between 1 and 100"),
        (["--attention", "x"], "--attention is x; give a layer and a head, as in 3.0"),
        (["--attention", "7"], "--attention 7: layers with attention are 0, 1; each has 4 heads"),
        (["--html", "."], ".: cannot be written: "),
        (["--attention", "0.9"], "--attention 0.9: layers with attention are 0, 1"),
    ],
)
def test_a_wrong_flag_is_a_usage_error(
    flags: list[str], message: str, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = nanollama.main(["lens", TEXT, "--model", str(tiny("Llama")), *flags])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_long_for_a_picture_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "lens.html"
    flags = ["lens", "z" * 300, "--model", str(tiny("Llama", max_position_embeddings=512))]
    assert nanollama.main([*flags, "--html", str(target)]) == 2
    assert "a picture holds 256" in capsys.readouterr().err
    assert not target.exists()


def test_a_picture_loads_nothing_and_holds_no_markup_of_the_text(tiny_llm: LLM) -> None:
    page = picture(looked_into(tiny_llm, tiny_llm.encode("</script><b>"), 2, True))
    assert page.count("</script>") == 2
    assert not re.search(r"(src|href)=|https?://|@import", page)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_a_browser_shows_the_picture(tiny: Callable[..., Path], tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    llm = LLM(tiny("Qwen3Moe", **MIXTURE), kernels="torch")
    seen = looked_into(llm, llm.encode(TEXT), 3, True)
    file = tmp_path / "lens.html"
    file.write_text(picture(seen), encoding="utf-8")
    problems: list[str] = []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(file.as_uri())
        assert page.locator("#lens tbody tr").count() == 3
        cell = page.locator("#lens tbody tr").last.locator("td").last
        cell.focus()
        best = page.locator("#candidates").inner_text().splitlines()
        assert best[0].startswith("layer 1, after ")
        assert len(best) == 4
        page.locator("#layer").select_option("1")
        page.locator("#head").select_option("2")
        row = page.locator("#pattern tbody tr").last.locator("td")
        row.first.focus()
        weight = seen["patterns"]["1"][2][-1][0]
        shown = page.locator("#weight").inner_text()
        assert abs(float(shown.rsplit(" ", 2)[-2]) / 100 - weight) < 0.006
        assert page.locator("#router tbody tr").count() == 2
        browser.close()
    assert problems == []
