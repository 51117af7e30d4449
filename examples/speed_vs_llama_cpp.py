"""Measure nanollama beside llama.cpp: same file, same threads, same run.

python examples/speed_vs_llama_cpp.py [NUM_PROMPT NUM_DECODE ROUNDS [MODEL]]

llama.cpp comes from the package xllamacpp (`pip install xllamacpp`); without it only nanollama is
measured. Single figures depend on the machine and the hour; what counts is the ratio of two figures
taken moments apart, so the two alternate and the median ratio is printed.
"""

import math
import statistics
import sys

import torch

from nanollama import LLM, GenerationRequest, SamplingParams

num_prompt, num_decode, num_rounds = (int(n) for n in sys.argv[1:4] or (512, 64, 5))
llm = LLM(sys.argv[4] if len(sys.argv) > 4 else "smollm2", parallel=1)
params = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=num_decode, ignore_eos=True)


def ours(prompt):
    """Prefill and decode, tokens per second, of nanollama."""
    usage = llm.complete(GenerationRequest(prompt=prompt, params=params)).usage
    assert usage.cached_tokens == 0
    return num_prompt / usage.prefill_s, (num_decode - 1) / usage.decode_s


def theirs(prompt):
    """The same of llama.cpp."""
    options = {"n_predict": num_decode, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    timings = server.handle_completions({"prompt": prompt, **options})["timings"]
    return timings["prompt_per_second"], timings["predicted_per_second"]


try:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(llm.checkpoint.path)
    settings.n_ctx, settings.n_parallel = num_prompt + num_decode + 8, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(settings)
    print("llama.cpp:", xllamacpp.get_system_info())
except ImportError:
    server = None
    print("xllamacpp is not installed: measuring nanollama alone")
ratios = []
for n in range(num_rounds + 1):
    prompt = [1000 * n + 100 + i % 900 for i in range(num_prompt)]  # new to every cache
    mine, peer = ours(prompt), theirs(prompt) if server else (math.nan, math.nan)
    if n > 0:  # the first round warms both up
        ratios.append([a / b for a, b in zip(mine, peer)])
        print(f"nanollama {mine[0]:6.0f} {mine[1]:6.1f}   llama.cpp {peer[0]:6.0f} {peer[1]:6.1f}")
if server:
    prefill, decode = (statistics.median(column) for column in zip(*ratios))
    print(f"nanollama / llama.cpp: prefill {prefill:.2f}, decode {decode:.2f} (median of ratios)")
