"""`bench`: real runs of a tiny model through the command line, and what its figures count."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch

import nanollama
from nanollama import LLM
from nanollama_extras.commands import bench as bench_command


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_command, "BANDWIDTH_BYTES", 1 << 22)


def bench(capsys: pytest.CaptureFixture[str], *flags: Any) -> str:
    assert nanollama.main(["bench", *map(str, flags)]) == 0
    return capsys.readouterr().out


def test_the_help_has_the_short_flag_of_the_depth(cli: Callable[..., Any]) -> None:
    text = cli("bench", "--help").out
    assert "-d, --depth N,.." in text
    assert "-d, --dtype" not in text


def test_the_table_has_a_row_for_each_combination(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [tiny("Llama"), "-p", "16,30", "-n", 4, "-d", "0,9", "-b", "1,3", "-r", 2]
    head, *rows, last = bench(capsys, *flags).splitlines()
    assert head.split() == "TEST BATCH DEPTH TOKENS/S READS BANDWIDTH REACHED".split()
    expected = [
        (test, batch, depth) for batch in "13" for depth in "09" for test in ("pp16", "pp30", "tg4")
    ]
    assert [tuple(row.split()[:3]) for row in rows] == expected
    for row in rows:
        assert re.search(r" [\d.]+ ± [\d.]+", row)
        is_decode = row.startswith("tg")
        assert bool(re.search(r"B/s +[\d.]+ .B/s +\d+%$", row)) == is_decode
    assert re.search(r" \(F32\), cpu, 1 threads, peak memory [\d.]+ [MG]B$", last)


def test_json_holds_every_figure(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny("Llama"))
    flags = ["--model", model, "-p", 20, "-n", 6, "-d", 40, "-b", 2, "-r", 3, "--json"]
    found = json.loads(bench(capsys, *flags, "--quantize", "q8", "--threads", 1))
    prefill, decode = found.pop("results")
    assert found.pop("peak_memory_bytes") > 1 << 26  # torch alone takes more
    assert found.pop("weight_bytes") > 0
    assert found.pop("kernels").startswith("native (")
    assert found.pop("kv_dtype") == "float16"
    assert found.pop("threads") == found.pop("decode_threads") == 1
    assert found == {"model": model, "quantization": "F32 to q8", "device": "cpu"}
    for row, test in ((prefill, "pp20"), (decode, "tg6")):
        assert (row["test"], row["batch"], row["depth"]) == (test, 2, 40)
        samples = torch.tensor(row["samples"], dtype=torch.float64)
        assert len(samples) == 3
        assert row["tokens_per_s"] == pytest.approx(float(samples.mean()))
        assert row["stddev"] == pytest.approx(float(samples.std()))
    steps_per_s = decode["tokens_per_s"] / 2
    assert decode["bytes_per_s"] == pytest.approx(decode["bytes_per_step"] * steps_per_s)
    reached = decode["bytes_per_s"] / decode["read_bandwidth"]
    assert decode["bandwidth_fraction"] == pytest.approx(reached)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_every_matrix_but_a_table_of_its_own(
    tied: bool, tiny: Callable[..., Path]
) -> None:
    decoder = LLM(tiny("Llama", tie_word_embeddings=tied), quantize="q8").engine.decoder
    matrices = {id(matrix): matrix for matrix in oracle.matrices(decoder)}
    table = 0 if tied else decoder.embed_tokens.nbytes
    assert bench_command.weight_bytes(decoder) == sum(m.nbytes for m in matrices.values()) - table


def test_prompts_are_new_each_time_and_their_depth_is_there_before(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny("Llama"), parallel=3)
    measured = bench_command.Bench(llm)
    runs: list[tuple[list[list[int]], int, int, int]] = []
    run = measured.run

    def spy(prompts: list[list[int]], num_gen: int) -> tuple[float, int]:
        before = nanollama.dataclasses.replace(llm.engine.stats)
        seconds, num_steps = run(prompts, num_gen)
        done = llm.engine.stats.since(before)
        runs.append((prompts, done.prefill_tokens, done.decode_tokens, num_steps))
        return seconds, num_steps

    monkeypatch.setattr(measured, "run", spy)
    measured.prefill(3, 50, 20, 2)
    measured.decode(3, 50, 7, 2)
    fills, timed = runs[::2], runs[1::2]
    assert [fill[1:3] for fill in fills] == [(150, 0)] + [(3, 0)] * 5  # read once
    assert [one[1:] for one in timed] == [(60, 0, 1)] * 3 + [(3, 18, 7)] * 3
    for (whole, *_), (beginnings, *_) in zip(timed, fills):
        assert [ids[:50] for ids in whole] == beginnings
    prompts = [tuple(ids[50:]) for whole, *_ in timed[:3] for ids in whole]
    assert len(set(prompts)) == len(prompts)


def test_the_bytes_of_a_step_are_weights_and_the_keys_and_values_at_that_depth(
    tiny: Callable[..., Path],
) -> None:
    llm = LLM(tiny("Llama"), parallel=2)
    row = bench_command.Bench(llm).decode(2, 100, 9, 1)
    kv_bytes = 2 * 2 * 2 * 16 * 4 * (100 + 5)  # keys and values, layers, heads, width, float32
    assert row["bytes_per_step"] == bench_command.weight_bytes(llm.engine.decoder) + 2 * kv_bytes


def test_zero_leaves_a_kind_of_test_out(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for num_prompt, num_gen, test in ((0, 3, "tg3"), (9, 0, "pp9")):
        flags = ["--model", tiny("Llama"), "-r", 1, "-p", num_prompt, "-n", num_gen]
        _, row, _ = bench(capsys, *flags).splitlines()
        assert row.split()[0] == test


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-p x", "argument -p/--prompt-tokens: 'x' is not whole numbers from 0 up"),
        ("-n 1,,2", "argument -n/--gen-tokens: '1,,2' is not whole numbers"),
        ("-n -1", "argument -n/--gen-tokens"),
        ("-d 1.5", "argument -d/--depth: '1.5' is not whole numbers"),
        ("-b 0", "argument -b/--batch: '0' is not whole numbers from 1 up"),
        ("-b 4,0", "argument -b/--batch: '4,0' is not whole numbers from 1 up"),
        ("-b 5000", "parallel is 5000; it must be an integer between 1 and 4096"),
        ("-r 0", "repetitions is 0; it must be at least 1"),
        ("-r x", "argument -r/--repetitions: invalid int value: 'x'"),
        ("-p 0 -n 0", "leave nothing to measure"),
        ("--threads 0", "threads is 0"),
        ("--temp 1", "unrecognized arguments: --temp"),
    ],
)
def test_a_bad_value_is_a_usage_error_of_one_line(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nanollama.main(["bench", *flags.split()]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert message in error
    assert hint == "see: nanollama.py bench --help"


def test_what_the_context_cannot_hold_is_a_usage_error(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["bench", "--model", str(tiny("Llama")), "-d", "240", "-p", "16", "-n", "4"]
    assert nanollama.main(flags) == 2
    error, _ = capsys.readouterr().err.splitlines()
    assert error == "error: the test needs 257 tokens; the context holds 256"
    assert nanollama.main([*flags[:-3], "15", "-n", "4", "-r", "1"]) == 0


def test_the_peak_of_memory_is_the_systems_without_the_buffer(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # on Linux, parents' too
    assert 1 << 26 < bench_command.peak_memory() < most + (1 << 24)  # kernels count loosely
    for before, after, expected in ((500, 900, 500), (500, 5_000_000, 5_000_000 - (1 << 22))):
        peaks = iter([before, after])
        monkeypatch.setattr(bench_command, "peak_memory", lambda peaks=peaks: next(peaks))
        assert bench_command.Bench(tiny_llm).peak_memory() == expected


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_read_bandwidth_is_bytes_over_time_for_as_long_as_it_takes(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = nanollama.pick_backend(kernels, torch.device("cpu"), torch.float32)
    times = iter([10.0, 10.2, 10.4, 10.8])
    monkeypatch.setattr(bench_command.time, "perf_counter", lambda: next(times))
    assert bench_command.read_bandwidth(torch.ones(250), backend) == pytest.approx(3 * 1000 / 0.8)
