"""Section 1: modules that wait, the error tree, words for numbers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nanollama
from nanollama import LazyModule, NanollamaError


def error_classes(base: type[NanollamaError] = NanollamaError) -> Iterator[type[NanollamaError]]:
    """The core's error classes."""
    yield base
    for child in base.__subclasses__():
        if child.__module__ == base.__module__:
            yield from error_classes(child)


def test_the_documentation_shows_the_tree_of_errors() -> None:
    drawn = {}
    path: list[str] = []
    page = (Path(__file__).parents[1] / "docs" / "library.md").read_text(encoding="utf-8")
    block = page.partition("## Errors")[2].partition("```text\n")[2].partition("```")[0]
    for indent, name, status in re.findall(r"^([ │├└─]*)(\w+) +(\d{3})", block, re.MULTILINE):
        path[len(indent) // 4 :] = [name]
        drawn[name] = (path[-2] if len(path) > 1 else "Exception", int(status))
    real = {c.__name__: (c.__base__.__name__, c.status) for c in error_classes() if c.__base__}
    assert drawn == real


def test_only_usage_errors_and_missing_extras_exit_with_2() -> None:
    codes = {c.__name__: c.exit_code for c in error_classes()}
    assert {name for name, code in codes.items() if code != 1} == {"UsageError", "ExtraError"}
    assert codes["UsageError"] == 2


def test_a_module_is_imported_when_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xml.sax", "xml.sax.saxutils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(nanollama, "sax", LazyModule("xml.sax", "saxutils"), raising=False)
    assert "xml.sax" not in sys.modules
    assert nanollama.sax.saxutils.escape("<") == "&lt;"
    assert nanollama.sax is sys.modules["xml.sax"]  # the stand-in has given up its place


def test_a_name_that_a_module_does_not_have_is_reported() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = LazyModule("json").no_such_name


def run_where(finder: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that asks `finder`, the body of a function of `name`, first for each module."""
    head = f"""
import os, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        {finder}
sys.meta_path.insert(0, Finder)
import nanollama
"""
    return subprocess.run([sys.executable, "-c", head + program], capture_output=True, text=True)


def answer(model: Path) -> str:
    """A program that answers, with torch"""
    argv = ["--model", str(model), "--chat", "--prompt", "Hi", "--kernels", "torch"]
    return f"sys.exit(nanollama.main({argv}))"


def test_whatever_package_is_missing_is_named_with_what_to_run() -> None:
    program = """
for lazy in [item for item in vars(nanollama).values() if type(item) is nanollama.LazyModule]:
    try:
        lazy.name
    except nanollama.PackageError as error:
        print(error)
    except AttributeError:  # of one that Python has
        pass
"""
    here = "{'nanollama', 'nanollama_extras', *sys.stdlib_module_names}"
    missing = f"if name.split('.')[0] not in {here}: raise ImportError('no ' + name)"
    ran = run_where(missing, program)
    lines = ran.stdout.splitlines()
    assert len(lines) >= 9, ran
    for line in lines:
        pattern = r"(\w+) cannot be imported: no \1(\.\w+)*; in the directory .*, run: pip .*"
        assert re.fullmatch(pattern, line)
    installs = [line.partition("run: ")[2] for line in lines]
    assert installs.count("pip install .") == len(lines)


@pytest.mark.parametrize("package", ["torch", "numpy", "safetensors", "tokenizers", "jinja2"])
def test_a_missing_package_is_one_line_on_the_command_line(
    package: str, tiny: Callable[..., Path]
) -> None:
    missing = f"if name == {package!r}: raise ModuleNotFoundError('No module named ' + name)"
    ran = run_where(missing, answer(tiny()))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(
        rf"error: (\S+: )?{package} cannot be imported: No module named {package}; "
        r"in the directory of nanollama\.py, run: pip install \.",
        ran.stderr.splitlines()[-1],  # without numpy, torch warns
    )
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("yaml", ["--serve", "--script", "x.yaml"]),
        ("prometheus_client", ["--serve", "--port", "0", "--model", "tiny-random"]),
        ("torch", ["bench", "--model", "tiny-random"]),
    ],
)
def test_a_package_that_an_extra_misses_is_one_line(package: str, arguments: list[str]) -> None:
    missing = (
        f"if name == {package!r}: raise ModuleNotFoundError('No module named ' + name, name=name)"
    )
    ran = run_where(missing, f"sys.exit(nanollama.main({arguments}))")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "Traceback" not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert re.search(rf"error: .*{package},? .*cannot be imported: .*run: pip install \.$", last)


def test_ctrl_c_while_a_module_is_imported_waits_for_the_whole_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deaf.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    pass\nvalue = 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        _ = LazyModule("deaf").value
    assert sys.modules.pop("deaf").value == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_modules_are_imported_ends_with_130(tiny: Callable[..., Path]) -> None:
    ran = run_where("if name == 'torch': os.kill(os.getpid(), signal.SIGINT)", answer(tiny()))
    assert (ran.returncode, ran.stderr) == (130, "interrupted\n")


def test_light_commands_import_nothing_heavy() -> None:
    """Run where nothing is imported yet: torch would cost each of these seconds."""
    program = """
import contextlib, sys, nanollama
for argv in (["--help"], ["--version"], ["list"], ["rm", "no/such"], ["--prompt"], ["unknown"],
             ["pull", "smolm2"], ["show", "no/such"], ["list", "--help"],
             ["--temp", "-1", "-p", "x"], ["--prompt", "x", "--modelfile", "no/such"]):
    with contextlib.suppress(SystemExit):
        nanollama.main(argv)
heavy = {"torch", "transformers", "numpy", "gguf", "safetensors", "tokenizers", "jinja2",
         "starlette", "uvicorn"}
print(*sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stderr.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (1536, "1.5 KB"),
        (98_362_432, "98.4 MB"),
        (2.5e9, "2.5 GB"),
        (1.5e15, "1500.0 TB"),
    ],
)
def test_bytes_are_written_as_disks_count_them(num_bytes: float, text: str) -> None:
    assert nanollama.human_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("message", "line"),
    [("one\ntwo", "one"), ("\n\n  two \n", "two"), ("", "ValueError"), ("x" * 900, "x" * 400)],
)
def test_of_an_error_the_first_line_is_shown(message: str, line: str) -> None:
    assert nanollama.first_line(ValueError(message)) == line


@pytest.mark.parametrize(("n", "multiple", "result"), [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16)])
def test_round_up(n: int, multiple: int, result: int) -> None:
    assert nanollama.round_up(n, multiple) == result


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="Linux tells what runs")
def test_threads_do_not_spin_where_others_use_the_cores() -> None:
    shown = "import nanollama, os; nanollama.torch.float32; print(os.environ.get('GOMP_SPINCOUNT'))"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        for added, expected in (({}, "0"), ({names[1]: "active"}, "None"), ({names[0]: "9"}, "9")):
            command = [sys.executable, "-c", shown]
            ran = subprocess.run(
                command,
                env=environ | added,
                cwd=Path(nanollama.__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            )
            assert ran.stdout.strip() == expected
    finally:
        for process in busy:
            process.kill()
            process.wait()
