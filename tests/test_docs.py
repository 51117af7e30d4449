"""The documentation is true: commands run, transcripts match, tables equal the code, links work."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
import torch
from command_line import share_kernels
from pages import BLOCKS, ROOT, TEXTS, anchor, blocks, codes, headings, lines, prose, table
from serving import serving
from test_layout import SECTIONS, tomllib

import nanollama
from nanollama_extras.files import gguf_blocks, gguf_types

SHELL = lines("sh")
# Cannot run here: installs into this environment, the tests themselves, tools that are not ours.
NOT_RUN = {
    'pip install . && nanollama run smollm2 "Name the capital of France." --temp 0',
    "pip install torch --index-url https://download.pytorch.org/whl/cpu && pip install .",
    "uv venv && . .venv/bin/activate && uv pip install . --torch-backend cpu",
    'uv run nanollama.py run smollm2 "Name the capital of France." --temp 0',
    'pip install -e ".[test]" && python -m pytest',
    "ruff check && ruff format --check && mypy",
    "nanollama --serve --model smollm2",  # it would not end; `test_a_request_..` asks it
    "nanollama --serve --model smollm2 --model Qwen/Qwen3-0.6B --keep-alive 10m",
    "nanollama --serve",
    *(
        line
        for line in SHELL
        if re.search("docker |kubectl |--ray|--tensor-par|torchrun|--compare", line)
    ),
}


def downloads(command: str) -> bool:
    """Whether a command asks for a model that only the hub has: these are parsed, not run."""
    return any(nanollama.parse_hub_ref(word) for word in shlex.split(command))


@pytest.fixture
def desk(tmp_path: Path, smollm2: Path) -> Path:
    """A directory with the repository's files in it, and a cache with SmolLM2."""
    for name in ("nanollama.py", "Modelfile.example", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    model = tmp_path / "cache" / "models" / "smollm2" / smollm2.name
    model.parent.mkdir(parents=True)
    try:
        os.link(smollm2.resolve(), model)
    except OSError:  # another file system
        shutil.copyfile(smollm2, model)
    share_kernels(tmp_path / "cache")
    (tmp_path / "bin").mkdir()
    for name, script in {"python": "", "nanollama": ROOT / "nanollama.py"}.items():
        command = tmp_path / "bin" / name  # `nanollama` as `pip install .` makes it
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {script} "$@"\n')
        command.chmod(0o755)
    return tmp_path


def environment(desk: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{desk / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NANOLLAMA_CACHE": str(desk / "cache"),
        "HF_HOME": str(desk / "hub"),
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
        "COLUMNS": "120",
    }


def shell(desk: Path, command: str) -> str:
    """What a command prints, standard error included. It must succeed."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=desk,
        env=environment(desk),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def converse(desk: Path, command: str, lines: list[str]) -> str:
    """What a terminal shows of an interactive command that is typed these lines."""
    child = pexpect.spawn(
        "bash", ["-c", command], cwd=desk, env=environment(desk), encoding="utf-8", timeout=120
    )
    child.setwinsize(50, 200)
    shown = ""
    for line in lines:
        child.expect(r"(?m)^(>>>|\.\.\.) ")
        shown += child.before + child.after
        child.sendline(line)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    return (shown + child.before).replace("\r", "")


def normal(text: str, desk: Path) -> str:
    """Text without what differs from run to run or CPU to CPU: paths, dates, speeds."""
    text = text.replace(str(desk / "cache"), "/home/you/.cache/nanollama")
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", text)
    text = re.sub(r"@ [\d.]+ t/s", "@ SPEED t/s", text)
    text = re.sub(r'_s": [\d.e-]+', '_s": SECONDS', text)
    text = re.sub(r"native \([^)]+\)", "native (PATH)", text)
    text = re.sub(r"(?m)^((?:pp|tg)\d+ +\d+ +\d+) .* ± .*$", r"\1 MEASURED", text)
    text = re.sub(r"(?m)^threads +\d.*$", "threads  MACHINE", text)
    text = re.sub(r"\d+ threads( \(.*\))?, peak memory [\d.]+ [MG]B", "MACHINE", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.mark.parametrize("command", [c for c in SHELL if c not in NOT_RUN and not downloads(c)])
def test_a_command_runs(command: str, desk: Path) -> None:
    assert shell(desk, command).strip()


@pytest.mark.parametrize("command", [c for c in SHELL if c in NOT_RUN or downloads(c)])
def test_a_command_that_cannot_run_here_is_understood(command: str) -> None:
    for part in command.split(" && "):
        match = re.match(r"(?:python |uv run )?nanollama(?:\.py)? (.*)", part)
        if match and (words := shlex.split(match[1]))[0] not in nanollama.COMMANDS:
            nanollama.build_parser().parse_args(words)


def test_the_list_of_commands_that_do_not_run_is_current() -> None:
    assert set(SHELL) >= NOT_RUN


def run_transcript(block: str, desk: Path) -> None:
    """Run the commands of a transcript, and compare what they print with what it shows."""
    for part in re.split(r"(?m)^\$ ", block)[1:]:
        command, _, expected = part.partition("\n")
        if "--interactive" in command:
            typed = re.findall(r"(?m)^(?:>>>|\.\.\.) ?(.*)$", expected)
            shown = converse(desk, command, typed)
        else:
            shown = shell(desk, command)
        assert normal(shown, desk) == normal(expected, desk)


@pytest.mark.parametrize("block", blocks("console"))
def test_a_transcript_is_what_the_commands_print(block: str, desk: Path) -> None:
    kernels = nanollama.pick_backend("auto", torch.device("cpu"), torch.float32).describe()
    if "native (" in block and not kernels.startswith("native"):
        pytest.skip(kernels)
    run_transcript(block, desk)


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_prints_what_its_comments_say(block: str, desk: Path) -> None:
    (desk / "block.py").write_text(block, encoding="utf-8")
    shown = shell(desk, "python block.py").splitlines()
    assert shown == re.findall(r"(?m)^print\(.*\)  # (.*)$", block)


@pytest.fixture(scope="module")
def server_url(smollm2: Path) -> Iterator[str]:
    """The address of a server that was started as README says."""
    with serving(lambda: nanollama.LLM(smollm2), model_id="smollm2") as live:
        yield live.url


@pytest.mark.parametrize("command", lines("bash"))
def test_a_request_is_answered(command: str, desk: Path, server_url: str) -> None:
    command = command.replace("http://127.0.0.1:8000", server_url)
    answer = shell(desk, command.replace("curl ", "curl -sS --fail-with-body "))
    assert answer.strip()
    assert not re.search('"error": ["{]', answer)


@pytest.mark.parametrize("block", blocks("py"))
def test_an_sdk_block_prints_what_its_comments_say(block: str, desk: Path, server_url: str) -> None:
    source = block.replace("http://127.0.0.1:8000", server_url)
    (desk / "block.py").write_text(source, encoding="utf-8")
    shown = shell(desk, "python block.py").splitlines()
    assert shown[:1] == re.findall(r"(?m)^print\(.*\)  # (.*)$", block)
    assert "".join(shown[1:]).strip()  # then a stream


@pytest.mark.parametrize("block", blocks("modelfile"))
def test_a_modelfile_is_one(block: str) -> None:
    modelfile = nanollama.parse_modelfile(block, Path("Modelfile"))
    assert modelfile.model
    assert modelfile.parameters
    assert modelfile.system


# ---- tables --------------------------------------------------------------------------------------


def default_of(action: argparse.Action) -> object:
    """What holds when a flag is not given."""
    if action.dest == "models":
        return nanollama.DEFAULT_MODEL
    owners = [nanollama.SamplingParams(), nanollama.EngineConfig(), nanollama.ServerConfig()]
    return next((getattr(o, action.dest) for o in owners if hasattr(o, action.dest)), None)


def test_the_table_of_flags_is_the_parsers() -> None:
    actions = {a.option_strings[0]: a for a in nanollama.build_parser()._actions}
    rows = {codes(row[0])[0].split()[0]: row for row in table("Flags")}
    assert list(rows) == [flag for flag in actions if flag not in ("-h", "--version")]
    for flag, (spelled, default, meaning) in rows.items():
        assert [s.split()[0] for s in codes(spelled)] == actions[flag].option_strings
        value = default_of(actions[flag])
        known = value not in (None, (), {}) and value is not False
        assert codes(default) == ([str(value)] if known else []), f"the default of {flag}"
        assert meaning


def test_the_table_of_families_is_the_codes() -> None:
    listed = {codes(row[0])[0]: codes(row[2]) for row in table("Families")}
    families = nanollama.all_families()
    assert sorted(listed) == sorted(families)
    assert listed == {name: families[name].gguf.split() for name in listed}


def test_the_gguf_types_that_stay_packed_are_the_codes() -> None:
    (packed,) = filter(
        None, (re.search(r"stay packed in memory:\s+(.*?)\.", t, re.DOTALL) for t in TEXTS.values())
    )
    assert codes(packed[1]) == list(nanollama.REPACK)


def test_the_table_of_bits_in_memory_is_the_codes() -> None:
    listed = {codes(row[0])[0]: (float(row[1]), float(row[2])) for row in table("Bits in memory")}
    types = {**nanollama.GGUF_TYPES, **gguf_types.TYPES, **gguf_blocks.TYPES}
    kinds = {kind.name: kind for kind in types.values() if kind.unpack}
    assert sorted(listed) == sorted(kinds)
    for name, kind in kinds.items():
        packed = kind.unpack(torch.zeros(1, 1, kind.num_bytes, dtype=torch.uint8))
        bits = [8 * num_bytes / kind.width for num_bytes in (kind.num_bytes, packed.nbytes)]
        assert listed[name] == tuple(math.floor(100 * n + 0.5) / 100 for n in bits), name


def test_every_form_of_a_reference_is_understood() -> None:
    for row in table("References"):
        for reference in codes(row[1]):
            local = reference.startswith((".", "/", "~"))
            known = (*nanollama.ALIASES, "nanochat")
            assert local or reference in known or nanollama.parse_hub_ref(reference)


def test_the_table_of_dependencies_is_the_project_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [codes(row[0])[0] for row in table("Dependencies")]
    assert listed == [re.split(r"[><=]", name)[0] for name in project["dependencies"]]


def test_the_table_of_sections_is_the_files() -> None:
    listed = [f"{row[0]} {row[1]}" for row in table("Sections")]
    assert listed == [f"{section.number} {section.name}" for section in SECTIONS]


def test_the_table_of_extras_is_the_folders() -> None:
    folder = ROOT / "nanollama_extras"
    modules = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.py"))]
    listed = [codes(row[0])[0] for row in table("Extras")]
    assert listed == [name for name in modules if not name.endswith("__init__.py")]


def test_the_tables_of_the_seams_exist() -> None:
    for _, _, name, *_ in table("Seams"):
        assert not name or hasattr(nanollama, codes(name)[0])


def test_the_commands_of_the_repl_are_listed() -> None:
    talk = nanollama.extra("commands.conversation", "the test").Conversation
    own = {name[3:] for name in dir(talk) if name.startswith("do_")}
    listed = {code.split()[0][1:] for row in table("A conversation") for code in codes(row[0])}
    assert own <= listed


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(TEXTS[page])):
        if "://" in link:
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if fragment:
            assert fragment in map(anchor, headings(TEXTS[target])), link


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.stem)
def test_names_of_the_code_exist(page: Path) -> None:
    for name in codes(prose(TEXTS[page])):
        if re.fullmatch(r"[A-Z][A-Za-z]+[a-z][A-Z]\w*", name):
            assert hasattr(nanollama, name), name


def test_ci_runs_the_readmes_own_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    found = subprocess.run(
        ["bash", str(script), "--print-command"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() in SHELL
    assert "pytest" in found.stdout


def test_the_front_page_is_short_and_links_to_every_other_page() -> None:
    readme = TEXTS[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 250
    assert all(f"(docs/{page.name})" in readme for page in TEXTS if page.parent != ROOT)


def test_each_of_the_ten_experiments_is_short() -> None:
    found = [block.text for block in BLOCKS if block.page == "learn"]
    assert len(found) == len(headings(TEXTS[ROOT / "docs" / "learn.md"])) - 1 == 10
    assert all(len([line for line in text.splitlines() if line]) < 20 for text in found)


def test_every_command_is_documented() -> None:
    for name in nanollama.COMMANDS:
        assert any(f"nanollama {name}" in text for text in TEXTS.values()), name
