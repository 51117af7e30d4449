"""The options of a cluster, without one."""

from __future__ import annotations

import sys

import pytest

import nanollama


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt x --ray", "--ray needs --serve"),
        ("--serve --ray localhost:1", "--ray: localhost:1 cannot be reached: "),
        ("--serve --ray ray://127.0.0.1:1", "--ray: ray://127.0.0.1:1 cannot be reached: "),
        ("--serve --ray --tensor-parallel 2", "--ray and --tensor-parallel do not go together"),
        ("--serve --replicas 2", "--replicas, --num-cpus and --unordered need --ray"),
        ("--prompt x --num-cpus 2", "--replicas, --num-cpus and --unordered need --ray"),
        ("--serve --ray --replicas 3:2", "--replicas is 3:2; give MIN:MAX, such as 1:4"),
        ("--serve --ray --replicas 0", "--replicas is 0; give MIN:MAX"),
        ("--serve --ray --replicas many", "--replicas is many; give MIN:MAX"),
    ],
)
def test_options_that_cannot_run(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = nanollama.main(flags.split())
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_without_ray_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert nanollama.main(["--serve", "--ray", "local", "--replicas", "1:2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ray cannot be imported: ")
    assert error.endswith('run: pip install ".[cluster]"\n')
    assert error.count("\n") == 1
