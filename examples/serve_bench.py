"""Measure OpenAI-compatible servers under load: tokens per second and latencies.

nanollama --serve --model smollm2 --parallel 16 &
python examples/serve_bench.py http://127.0.0.1:8000/v1 [URL ..] [--clients 1 4 16 32]

Prints the time to the first token and the time between tokens, too. Every client sends one request
after another, each with a prompt that is new to every cache, and reads the stream. Servers take
turns at each number of clients, so that one run compares them.

Without a pause between a client's requests, the server is never idle, and the times of an answer
only share what its speed leaves: clients / (answers per second). With --pause SECONDS, a client
waits between its requests, half to one and a half times as long, the first one too.

With --agent WORDS it measures the first request of a coding agent: a system prompt of so many words
and 20 tools, new to every cache, then the next request of the same conversation. An answer has one
token, so that its time is the time to the first token.
"""

import argparse
import itertools
import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("urls", nargs="+", metavar="URL", help="base URL, usually ending in /v1")
parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
parser.add_argument("--requests", type=int, default=3, help="requests per client")
parser.add_argument("--prompt-words", type=int, default=100)
parser.add_argument("--max-tokens", type=int, default=64)
parser.add_argument("--pause", type=float, default=0, metavar="SECONDS", help="before a request")
parser.add_argument("--agent", type=int, metavar="WORDS", help="the first request of an agent")
parser.add_argument("--api-key", default="none")
args = parser.parse_args()


def post(url, path, body=None):
    headers = {"Authorization": f"Bearer {args.api_key}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body else None
    return urllib.request.urlopen(urllib.request.Request(url + path, data, headers))


def stream(url, model, number):
    """One request -> (tokens of prompt and answer, seconds to the first, those between others)."""
    words = " ".join(str(number * 7919 + i * 31) for i in range(args.prompt_words))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Go on: {words}"}],
        "max_tokens": args.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,  # servers that know this field give answers of equal length
    }
    time.sleep(args.pause * (0.5 + random.Random(number).random()))
    started = time.perf_counter()
    with post(url, "/chat/completions", body) as response:
        # parsed afterwards: clients share a core with the server
        lines = [(time.perf_counter(), line) for line in response if line.startswith(b"data: {")]
    times, usage = [], None
    for at, line in lines:
        event = json.loads(line[6:])
        usage = event.get("usage") or usage
        deltas = [choice["delta"] for choice in event["choices"]]
        if any(delta.get("content") or delta.get("reasoning_content") for delta in deltas):
            times.append(at)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    num_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    return num_tokens, times[0] - started, gaps


def agent_body(model, number):
    """The first request of an agent, with `args.agent` words of instructions."""
    nouns = "file folder branch commit test error line function class module".split()
    verbs = "Read Search Edit Run Check Move Open Compare".split()
    words = [
        f"{verbs[(i * i + number) % 8]} the {nouns[i * 7 % 10]}" for i in range(args.agent // 3)
    ]
    path = {"type": "string", "description": "an absolute path"}
    schema = {"type": "object", "properties": {"path": path, "limit": {"type": "integer"}}}
    tools = [
        {"name": f"{verb.lower()}_{noun}", "description": f"{verb} a {noun}", "parameters": schema}
        for verb, noun in itertools.product(verbs[:2], nouns)
    ]
    return {
        "model": model,
        "messages": [
            {"role": "system", "content": f"Task {number}. " + ". ".join(words)},
            {"role": "user", "content": "List the files."},
        ],
        "tools": [{"type": "function", "function": tool} for tool in tools],
        "max_tokens": 1,
    }


def answer_time(url, body):
    """Seconds that the answer takes, the tokens of the prompt, and how many of them were cached"""
    started = time.perf_counter()
    with post(url, "/chat/completions", body) as response:
        usage = json.load(response)["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return time.perf_counter() - started, usage["prompt_tokens"], cached


def measure_agent(number):
    print("prompt tokens  cached   seconds   server")
    for url in args.urls:
        body = agent_body(models[url], number)
        for _ in range(2):
            seconds, num_tokens, num_cached = answer_time(url, body)
            print(f"{num_tokens:13d}{num_cached:8d}{seconds:10.2f}   {url}")
            turn = {"role": "assistant", "content": "."}, {"role": "user", "content": "Go on."}
            body["messages"].extend(turn)


def percentiles(seconds):
    ordered = sorted(seconds) or [0.0]
    marks = [ordered[min(int(len(ordered) * p), len(ordered) - 1)] for p in (0.5, 0.9, 0.99)]
    return " ".join(f"{1000 * mark:8.1f}" for mark in marks)


def measure_load(number):
    print(" " * 33 + "  first token, ms".ljust(29) + "  between tokens, ms")
    columns = "      p50      p90      p99   "
    print("clients  prompt  tokens/s  failed" + columns + columns + "  server")
    for num_clients in args.clients:
        for url in args.urls:
            numbers = range(number, number := number + num_clients * args.requests)
            started = time.perf_counter()
            with ThreadPoolExecutor(num_clients) as threads:
                futures = [threads.submit(stream, url, models[url], n) for n in numbers]
            seconds = time.perf_counter() - started
            errors = [future.exception() for future in futures if future.exception()]
            done = [future.result() for future in futures if not future.exception()]
            prompts, answers = (sum(column) for column in zip(*(tokens for tokens, _, _ in done)))
            first = percentiles([first for _, first, _ in done])
            between = percentiles([gap for _, _, gaps in done for gap in gaps])
            sizes = f"{num_clients:7d}{prompts // len(done):8d}{answers / seconds:10.1f}"
            print(f"{sizes}{len(errors):8d}   {first}   {between}   {url}", flush=True)
            if errors:
                print(f"        one of the failures: {errors[0]!r}")


try:
    models = {url: json.load(post(url, "/models"))["data"][0]["id"] for url in args.urls}
except OSError as error:
    parser.error(f"a server does not answer: {error}")
number = time.time_ns() % 10**9  # a second run uses new prompts
(measure_agent if args.agent else measure_load)(number)
