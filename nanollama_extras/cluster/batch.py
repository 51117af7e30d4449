"""`--batch-file IN --output OUT --ray`: a file of prompts answered by engines that Ray places.

   IN ──> rows ──> blocks ──> actors, one engine each ──> slices ──> OUT.parts ──> OUT

An engine answers a block slice by slice; a slice has as many rows as it runs at once. Ray Data
starts the actors, hands each of them two blocks, so that rows of one take the places of those of
the other that are done, and repeats the blocks of an actor that dies. Only the process that was
started reads IN and writes OUT.

Seam       cluster.options calls `run`. It imports cluster.batch_files, cluster.options,
           commands.batch_lines and commands.json_lines.
Remove     delete this module; --batch-file then does not go with --ray.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nanollama import (
    ALIASES,
    MAX_PARALLEL,
    TINY_RANDOM,
    BatchRow,
    Modelfile,
    NanollamaError,
    Settings,
    UsageError,
    answer_rows,
    first_line,
    local_path,
    log,
    printable,
)
from nanollama_extras.cluster.batch_files import Parts, read_prompts
from nanollama_extras.cluster.options import LOCAL, import_ray
from nanollama_extras.commands.batch_lines import BodyText, LineSettings, json_row
from nanollama_extras.commands.json_lines import json_line

if TYPE_CHECKING:
    from nanollama import Json

BLOCKS_AT_ONCE = 2  # of an actor: the second fills places that the first no longer needs
MAX_SLICES = 64  # of a block: more cost little, but are all repeated where an actor dies
BLOCKS_EACH = 8  # for an actor, where there are few rows: the last to end leaves the others idle
# Options that change no answer: a second run may have others
FREE_OPTIONS = frozenset(
    "batch_file output unordered ray replicas num_cpus num_gpus verbose threads parallel device "
    "force prefill_chunk max_gap state_mb prompt_cache prompt_cache_mb packed_cache "
    "packed_cache_mb quiet log log_json words".split()
)


# ---- an engine -----------------------------------------------------------------------------------


def packed(settings: Settings) -> Json:
    """Settings as plain values for another process, which may have another working directory."""
    values, modelfile = plain(settings.args), dataclasses.asdict(settings.modelfile)
    values["models"] = [absolute(model) for model in values["models"]]
    values |= {name: absolute(values[name]) for name in ("tokenizer", "adapter", "draft")}
    values["threads"] = num_cpus(settings)
    for name in filter(values.get, ("prompt_cache", "packed_cache")):  # which may not exist yet
        values[name] = os.path.abspath(os.path.expanduser(values[name]))
    return {"args": values, "modelfile": modelfile, "flags": settings.flags}


def plain(args: argparse.Namespace) -> Json:
    """The values of options; `enter` holds functions, and is none."""
    return {name: value for name, value in vars(args).items() if name != "enter"}


def absolute(reference: Any) -> Any:
    """A path without the working directory; other references as they are."""
    is_name = not reference or reference in (*ALIASES, TINY_RANDOM)
    path = None if is_name else local_path(reference)
    return str(path.absolute()) if path else reference


class Answerer:
    """An actor: an engine that answers slices of rows. The first error that concerns all rows is
    its answer to every slice, because Ray would start the actor again and again."""

    def __init__(self, options: Json) -> None:
        args = argparse.Namespace(**options["args"])
        self.settings = LineSettings(args, Modelfile(**options["modelfile"]), options["flags"])
        try:
            self.llm = self.settings.load()
        except NanollamaError as error:
            self.error: NanollamaError | None = error
        else:
            self.error = None

    def __call__(self, table: Any) -> Any:
        """Rows of `line`, and `prompt` or `json` -> a row with all `answers`, JSON lines, or with
        an error."""
        import pyarrow

        rows = [
            json_row(row["line"], row["json"].encode())
            if row["json"]
            else BatchRow(row["line"], row["prompt"])
            for row in table.to_pylist()
        ]
        try:
            if self.error:
                raise self.error
            request = functools.partial(self.settings.request, llm=self.llm)
            answers = answer_rows(rows, self.llm, request, self.settings.args.hide_thinking)
            return pyarrow.table({"answers": [[json_line(row) for row in answers]]})
        except NanollamaError as error:
            return pyarrow.table({"error": [str(error)], "exit_code": [error.exit_code]})


# ---- Ray -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(ray: Any, settings: Settings) -> Iterator[None]:
    """Use Ray at the address of --ray, or start it on this machine. Raises UsageError."""
    address, is_started = settings.args.ray, ray.is_initialized()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    own: Json = {"include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        if not is_started:
            ray.init(logging_level="warning", log_to_driver=settings.args.verbose, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray: {address} cannot be reached: {first_line(error)}") from None
    try:
        yield
    finally:
        if not is_started:
            ray.shutdown()


def check_room(ray: Any, settings: Settings) -> None:
    """Refuse more engines than this machine has cores for; another cluster may still grow."""
    (least, _), per_actor = replicas(settings), num_cpus(settings)
    cores = int(ray.cluster_resources().get("CPU", 0))
    if least * per_actor <= cores:
        return
    problem = f"{least} replicas of {per_actor} cores need more than the {cores} that Ray has"
    if settings.args.ray == LOCAL:
        raise UsageError(f"{problem}; lower --replicas or --num-cpus")
    log.warning(f"{problem}; waiting for more")


def replicas(settings: Settings) -> tuple[int, int]:
    return settings.args.replicas or (1, 1)


def num_cpus(settings: Settings) -> int:
    return int(settings.args.num_cpus or settings.value("threads")[0] or 1)


def slice_rows(settings: Settings) -> int:
    """The rows of a slice."""
    return settings.engine().parallel or MAX_PARALLEL


def blocks(settings: Settings, rows: list[BatchRow]) -> list[Any]:
    """The rows as tables of whole slices."""
    import pyarrow

    _, most = replicas(settings)
    num_slices = len(rows) // (slice_rows(settings) * most * BLOCKS_EACH)
    size = slice_rows(settings) * min(max(num_slices, 1), MAX_SLICES)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    texts = [(name, pyarrow.string()) for name in ("prompt", "json")]
    columns = pyarrow.schema([("line", pyarrow.int64()), *texts])
    return [pyarrow.Table.from_pylist([*map(row_fields, part)], columns) for part in parts]


def row_fields(row: BatchRow) -> Json:
    """A row of a block: a prompt, or the JSON line that has more than that."""
    if isinstance(row.prompt, BodyText):
        return {"line": row.line, "json": row.prompt.line}
    return {"line": row.line, "prompt": row.prompt}


def answered(ray: Any, settings: Settings, rows: list[BatchRow]) -> Iterator[list[str]]:
    """JSON lines of the rows' answers, slice by slice, as they are done. Raises NanollamaError."""
    least, most = replicas(settings)
    pool = ray.data.ActorPoolStrategy(
        min_size=least,
        max_size=most,
        max_tasks_in_flight_per_actor=2 * BLOCKS_AT_ONCE,
        max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
        enable_true_multi_threading=True,
    )
    answers = ray.data.from_arrow(blocks(settings, rows)).map_batches(
        Answerer,
        fn_constructor_args=(packed(settings),),
        compute=pool,
        batch_size=slice_rows(settings),
        batch_format="pyarrow",
        num_cpus=num_cpus(settings),
        num_gpus=settings.args.num_gpus or 0,
    )
    answers.context.target_max_block_size = 1  # every slice is handed on at once
    for table in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in table.to_pylist():
            if "error" in row:
                raise_error(row)
            yield row["answers"]


def raise_error(fields: Json) -> None:
    """Raise the error of an engine."""
    error = NanollamaError(fields["error"])
    error.exit_code = fields["exit_code"]
    raise error


# ---- the mode ------------------------------------------------------------------------------------


def what_decides(settings: Settings, digest: str) -> Json:
    """What the answers depend on: a second run goes on only where it is the same."""
    args = {k: v for k, v in plain(settings.args).items() if k not in FREE_OPTIONS}
    fields = {**args, **settings.flags, "modelfile": dataclasses.asdict(settings.modelfile)}
    fields |= {"input": digest}
    return {name: json.loads(json.dumps(value, default=str)) for name, value in fields.items()}


def take(lines: list[str], parts: Parts, known: set[int]) -> None:
    """Add answers to the parts, and name the failed ones, as a batch on one machine does. An actor
    that died may have answered some of them before."""
    fields = [(json.loads(line), line) for line in lines]
    new = [(row, line) for row, line in fields if row["line"] not in known]
    parts.add([line for _, line in new])
    known.update(row["line"] for row, _ in new)
    for row, _ in new:
        if "error" in row:
            log.warning(printable(f"line {row['line']}: {row['error']}"))


def write_answers(ray: Any, settings: Settings, rows: list[BatchRow], parts: Parts) -> None:
    """Answer the rows that no part has yet."""
    known = parts.lines()
    rest = [row for row in rows if row.line not in known]
    if known:
        log.warning(f"{len(known)} of {len(rows)} lines have been answered before")
    take([json_line(row) for row in rest if row.error], parts, known)
    if not (rest := [row for row in rest if not row.error]):
        return
    with connected(ray, settings):
        check_room(ray, settings)
        for lines in answered(ray, settings, rest):
            take(lines, parts, known)


def run(settings: Settings) -> int:
    """--batch-file with --ray. Returns the exit code: 1 where a line failed. Raises
    NanollamaError."""
    args, start = settings.args, time.monotonic()
    if args.output in (None, "-"):
        raise UsageError("--batch-file with --ray needs --output FILE")
    ray = import_ray("data")
    rows, digest = read_prompts(args.batch_file)
    with Parts(args.output, what_decides(settings, digest)) as parts:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                write_answers(ray, settings, rows, parts)
        except ray.exceptions.RayError as error:
            problem = f"Ray: {first_line(error)}"
            raise NanollamaError(f"{problem}; the same command goes on where it ended") from None
        count, failed = parts.merge(is_ordered=not args.unordered)
    log.warning(f"[{count} lines, {failed} failed | {time.monotonic() - start:.0f} s]")
    return 1 if failed else 0
