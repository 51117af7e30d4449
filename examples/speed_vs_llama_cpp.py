"""Measure nanollama beside llama.cpp: same file, same number of threads, taking turns.

python examples/speed_vs_llama_cpp.py [NUM_PROMPT NUM_DECODE ROUNDS [MODEL]]

llama.cpp comes from the package xllamacpp (`pip install xllamacpp`); without it, the script
measures nanollama alone. Single figures depend on the machine and the hour; compare only ratios of
figures taken moments apart. llama.cpp runs in a process of its own, because two thread pools in one
process would slow each other down.
"""

import importlib.util
import math
import multiprocessing
import statistics
import sys

import torch

from nanollama import LLM, GenerationRequest, SamplingParams


def load_peer(path, num_ctx, num_threads):
    global server
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = path, num_ctx, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = num_threads
    server = xllamacpp.Server(settings)
    print("llama.cpp:", xllamacpp.get_system_info(), flush=True)


def peer_speeds(prompt, num_decode):
    options = {"n_predict": num_decode, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    timings = server.handle_completions({"prompt": prompt, **options})["timings"]
    return timings["prompt_per_second"], timings["predicted_per_second"]


def own_speeds(prompt, num_decode):
    params = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=num_decode, ignore_eos=True)
    usage = llm.complete(GenerationRequest(prompt=prompt, params=params)).usage
    return len(prompt) / usage.prefill_s, (num_decode - 1) / usage.decode_s


if __name__ == "__main__":
    num_prompt, num_decode, num_rounds = (int(n) for n in sys.argv[1:4] or (512, 64, 5))
    llm = LLM(sys.argv[4] if len(sys.argv) > 4 else "smollm2", parallel=1)
    start = (str(llm.checkpoint.path), num_prompt + num_decode + 8, torch.get_num_threads())
    has_peer = importlib.util.find_spec("xllamacpp") is not None
    peer = multiprocessing.get_context("spawn").Pool(1, load_peer, start) if has_peer else None
    rounds = []
    for n in range(num_rounds + 1):
        prompt = [1000 * n + 100 + i % 900 for i in range(num_prompt)]  # new to every cache
        a, b = peer.apply(peer_speeds, (prompt, num_decode)) if peer else (math.nan, math.nan)
        x, y = own_speeds(prompt, num_decode)
        if n > 0:  # the first round warms both up
            rounds.append((x / a, y / b))
            print(f"nanollama {x:6.0f} {y:6.1f}   llama.cpp {a:6.0f} {b:6.1f}   tokens/s")
    prefill, decode = (statistics.median(column) for column in zip(*rounds))
    print(f"nanollama / llama.cpp, median: prefill {prefill:.2f}, decode {decode:.2f}")
