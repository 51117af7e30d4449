"""What a run of the command line in this process left."""

from __future__ import annotations

from typing import Any, NamedTuple


class Ran(NamedTuple):
    code: Any
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr, which is an error; nothing else came of the run."""
        assert self.code == 1
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line
