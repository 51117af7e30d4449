"""`--embed`: the embedding of a prompt, or of each line of a batch file, as a JSON array.

Seam: the CLI calls `run(settings) -> exit code` in place of an answer. To remove it, delete this
module and the flag.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

from nanollama import (
    BatchRow,
    GenerationRequest,
    UsageError,
    answer_rows,
    log,
    read_rows,
    read_text,
)

if TYPE_CHECKING:
    from nanollama import Settings


def run(settings: Settings) -> int:
    """Print the embeddings. Returns the exit code: 1 where a line of the batch file failed. Raises
    UsageError."""
    args = settings.args
    is_batch = args.batch_file is not None
    if args.prompt is None and not is_batch:
        raise UsageError("--embed needs --prompt or --batch-file")
    text = read_text("-") if args.prompt == "-" else args.prompt
    rows = read_rows(args.batch_file) if is_batch else [BatchRow(1, text)]
    for row in answer_rows(rows, settings.load(), functools.partial(GenerationRequest, embed=True)):
        if row.error and not is_batch:
            raise row.error
        if row.error:
            log.error(f"line {row.line}: {row.error}")
        print(json.dumps(row.last.embedding if row.last else None))
    return 1 if any(row.error for row in rows) else 0
