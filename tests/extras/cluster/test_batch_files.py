"""Files of prompts and answers, and the folder of parts between them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from nanollama import BatchRow, Delta, NanollamaError, RequestError, Usage, UsageError
from nanollama_extras.cluster.batch_files import Parts, read_prompts
from nanollama_extras.commands.json_lines import json_line, open_output

RUN = {"temperature": 0.0, "input": "abc"}


def line(number: int, error: str = "") -> str:
    row = BatchRow(number, f"prompt {number}", RequestError(error) if error else None)
    if not error:
        row.last = Delta(0, "", finish_reason="stop", usage=Usage(5, number, 0, 0.0, 0.5, 1.5))
    return json_line(row)


@pytest.fixture(params=["local", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output on this machine, and one that cannot be appended to."""
    return f"memory://{uuid.uuid4()}/out" if request.param == "memory" else str(tmp_path / "out")


def content(url: str) -> bytes:
    data: bytes = fsspec.open(url, "rb").open().read()
    return data


def exists(url: str) -> bool:
    fs, path = fsspec.core.url_to_fs(url)
    return bool(fs.exists(path))


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [str, lambda path: f"file://{path}"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", "one\r\n\n  \ntwo ∞\n".encode()),
        ("a.jsonl", '{"prompt": "one", "id": 1}\n\n\n"two ∞"\n'.encode()),
        ("a.ndjson", '\ufeff"one"\n\n\n{"prompt": "two \\u221e"}'.encode()),
    ],
)
def test_prompts_are_the_lines_of_a_file(
    tmp_path: Path, name: str, data: bytes, place: Callable[[Path], str]
) -> None:
    (tmp_path / name).write_bytes(data)
    rows, digest = read_prompts(place(tmp_path / name))
    assert [(row.line, row.prompt) for row in rows] == [(1, "one"), (4, "two ∞")]
    assert digest != read_prompts(place(tmp_path / name))[1][::-1]


def test_a_row_without_a_prompt_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n{"text": "x"}\n[1]\n{"prompt"\n"\xff"\n' + b"[" * 99_999)
    rows, _ = read_prompts(str(path))
    assert [row.prompt for row in rows] == ["x", *[None] * 5]
    errors = [str(row.error) for row in rows[1:]]
    assert {error[:32] for error in errors[:2]} == {'the line has no text as "prompt"'}
    assert all(error.startswith("the line is not valid JSON: ") for error in errors[2:])


def test_prompts_of_a_parquet_file_are_its_column_prompt(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [7, 8, 9], "prompt": ["one", None, "three"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    rows, _ = read_prompts(str(tmp_path / "a.parquet"))
    assert [(r.line, r.prompt, bool(r.error)) for r in rows] == [
        (1, "one", False),
        (2, None, True),
        (3, "three", False),
    ]
    parquet.write_table(table.drop_columns(["prompt"]), tmp_path / "b.parquet")
    with pytest.raises(RequestError, match=r"b\.parquet: has no column prompt, but id$"):
        read_prompts(str(tmp_path / "b.parquet"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(RequestError, match=r"c\.parquet: cannot be read: "):
        read_prompts(str(tmp_path / "c.parquet"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "absent.jsonl: cannot be read: No such file or directory"),
        ("memory://absent.jsonl", "memory://absent.jsonl: cannot be read: "),
        ("nowhere://a.jsonl", "nowhere://a.jsonl: cannot be read: Protocol not known"),
        (".", ".: cannot be read: Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        read_prompts(name)
    assert str(raised.value).startswith(message)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(RequestError, match="holds no prompts"):
        read_prompts(str(tmp_path / "a.jsonl"))


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_ordered", "order"), [(True, [1, 2, 3]), (False, [3, 1, 2])])
def test_parts_become_the_output_at_the_end(
    target: str, is_ordered: bool, order: list[int]
) -> None:
    with Parts(target, RUN) as parts:
        parts.add([line(3)])
        parts.add([line(1), line(2, "failed")])
        assert not exists(target)
        assert parts.merge(is_ordered) == (3, 1)
    lines = [line(1), line(2, "failed"), line(3)]
    assert content(target).decode() == "".join(lines[number - 1] for number in order)
    assert not exists(f"{target}.parts")


def test_a_run_knows_the_lines_of_an_earlier_one(target: str) -> None:
    with Parts(target, RUN) as parts:
        parts.add([line(2), line(1)])
    with Parts(target, RUN) as parts:
        assert parts.lines() == {1, 2}
        parts.add([line(3)])
        assert parts.merge(is_ordered=True) == (3, 0)
    assert content(target).decode() == line(1) + line(2) + line(3)


def test_a_line_that_was_being_written_is_none(target: str) -> None:
    with Parts(target, RUN) as parts:
        parts.add([line(1), line(2)[:-9]])
    with Parts(target, RUN) as parts:
        assert parts.lines() == {1}
        parts.add([line(2)])
        parts.merge(is_ordered=False)
    assert content(target).decode() == line(1) + line(2)


def test_answers_of_another_run_are_left_alone(target: str) -> None:
    with Parts(target, RUN) as parts:
        parts.add([line(1)])
    message = r"out\.parts holds the answers of a run with another input; "
    with pytest.raises(UsageError, match=message), Parts(target, {**RUN, "input": "def"}):
        pass
    with Parts(target, RUN) as parts:
        assert parts.lines() == {1}


def test_a_run_without_answers_leaves_nothing(target: str) -> None:
    with Parts(target, RUN):
        assert exists(f"{target}.parts/run.json")
    assert not exists(f"{target}.parts")


def test_a_run_that_was_killed_before_its_first_answer_binds_no_other(target: str) -> None:
    with Parts(target, RUN) as parts:
        parts.fs.pipe_file(f"{parts.folder}/run.json", b'{"temperature"')
        other = Parts(target, {**RUN, "input": "def"})
        other.check_run()
        assert json.loads(other.fs.cat_file(f"{parts.folder}/run.json"))["input"] == "def"


def test_two_runs_do_not_write_the_same_output(tmp_path: Path) -> None:
    target = str(tmp_path / "out")
    with (
        Parts(target, RUN),
        pytest.raises(UsageError, match="another run writes it"),
        Parts(target, RUN),
    ):
        pass


def test_no_folder_is_made_for_an_output(tmp_path: Path) -> None:
    """As `open_output` of a batch on one machine."""
    target = str(tmp_path / "absent" / "out.jsonl")
    with pytest.raises(RequestError) as alone:
        open_output(target)
    with pytest.raises(RequestError) as ours, Parts(target, RUN):
        pass
    assert str(ours.value) == str(alone.value)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", ["", "absent/dir\0/out", "nowhere://out"])
def test_an_output_that_cannot_be_written_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NanollamaError, match="cannot be written: "), Parts(name or ".", RUN):
        pass


def test_a_parquet_output_has_a_column_for_each_field(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    target = str(tmp_path / "out.parquet")
    with Parts(target, RUN) as parts:
        parts.add([line(2, "failed"), line(1)])
        parts.merge(is_ordered=True)
    table: Any = parquet.read_table(target)
    names = "line custom_id prompt text error finish_reason usage"
    assert table.column_names == names.split()
    rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
    assert rows == [json.loads(line(1)), json.loads(line(2, "failed"))]


def test_a_lone_surrogate_of_a_custom_id_becomes_a_question_mark_in_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with Parts(target := str(tmp_path / "out.parquet"), RUN) as parts:
        parts.add([line(1).replace('"prompt"', r'"custom_id": "\ud800a", "prompt"', 1)])
        parts.merge(is_ordered=True)
    assert parquet.read_table(target)["custom_id"].to_pylist() == ["?a"]
