"""The command line in a process of its own, with a model whose answers are given."""

from __future__ import annotations

DRIVER = """
import sys
import nanollama
answers = {answers!r}
def stream(self, request):
    yield nanollama.Delta(0, answers.pop(0), finish_reason="stop")
nanollama.LLM.stream = stream
sys.exit(nanollama.main(sys.argv[1:]))
"""
