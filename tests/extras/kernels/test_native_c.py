"""native.c as C: no warning from any compiler at hand, and formatted as .clang-format says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nanollama import NanollamaError
from nanollama_extras.kernels import native

SOURCE = Path(native.__file__).with_name("native.c")
WARNINGS = "-Wall -Wextra -Werror -ffp-contract=off".split()
STAGES = {"gcc": ["-O1", "-S"], "clang": ["-fsyntax-only"]}  # clang warns before it optimizes
CPUS = [
    native.THIS_CPU,
    *(["-march=haswell", "-march=alderlake", "-march=x86-64"] if native.THIS_CPU[2] == "a" else []),
]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("compiler", STAGES)
def test_it_compiles_without_a_warning(compiler: str, cpu: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    whole = tmp_path / "native.c"
    whole.write_text(native.SOURCE + native.layout_assertions())
    command = [compiler, *WARNINGS, *STAGES[compiler], cpu, str(whole)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_it_is_formatted() -> None:
    if shutil.which("clang-format") is None:
        pytest.skip("there is no clang-format")
    command = ["clang-format", "--dry-run", "--Werror", "--style=file", str(SOURCE)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert max(map(len, native.SOURCE.splitlines())) <= 100


def test_the_structures_are_those_of_c() -> None:
    twin = native.STRUCTURES["linear_call"]
    assert [name for name, _ in twin._fields_][:4] == ["parts", "num_parts", "x", "norm"]
    own = {"delta_net", "mamba2", "short_conv", "few_rows", "sigmoid_gate", "product"}
    own |= {"head_linear", "latent_heads", "lay_floats", "lay_blocks"}
    own |= {"altup_predict", "altup_correct", "match_scale", "cut_gates"}
    assert set(native.KERNELS) == {"linear", "gather", "norm", "experts", "attention", *own}
    assert native.NUMBERS["NORM"] == 1
    with pytest.raises(AttributeError):
        twin(no_such_field=1)


def test_a_structure_that_differs_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = native.SOURCE.replace("int64_t num_parts;\n", "int64_t num_parts, more;\n", 1)
    assert other != native.SOURCE
    assertions = native.layout_assertions().replace("== 16,", "== 24,", 1)
    for source in (other + native.layout_assertions(), native.SOURCE + assertions):
        with pytest.raises(NanollamaError, match=r"cannot compile the kernels: .*error"):
            native.compile_kernels(tmp_path / "x.so", ("-O0", "-shared", "-fPIC"), source)
