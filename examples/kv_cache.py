"""Time the same generation with a cache of keys and values and without one.

python examples/kv_cache.py [NUM_TOKENS]

Without a cache, every step runs the whole text so far through the model. Only the last token is
new; the keys and values of all earlier tokens are the same as in the step before. For T tokens, the
model processes 1 + 2 + .. + T tokens instead of T, and each step takes longer than the one before.
"""

import sys
import time

from nanollama import LLM, GenerationRequest, SamplingParams

num_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 64
llm = LLM("smollm2", parallel=1)
prompt = llm.encode("A token is a piece of text. A language model reads tokens and")
greedy = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=num_tokens, ignore_eos=True)
llm.complete(GenerationRequest(prompt, params=greedy))  # warms up
llm.engine.forget()

cached_s, started = [], time.perf_counter()
cached = []
for delta in llm.stream(GenerationRequest(prompt, params=greedy)):
    cached.append(delta.token_id)
    cached_s.append(time.perf_counter() - started)

ids, naive_s, num_processed, started = list(prompt), [], 0, time.perf_counter()
for _ in range(num_tokens):
    logits = llm.logits(ids)[-1]  # (V,), from a pass over the whole text
    num_processed += len(ids)
    ids.append(int(logits.argmax()))
    naive_s.append(time.perf_counter() - started)

print("tokens    with a cache      without")
for count in range(num_tokens // 4, num_tokens + 1, num_tokens // 4):
    print(f"{count:6}  {cached_s[count - 1]:10.2f} s  {naive_s[count - 1]:10.2f} s")
print(f"tokens that went through the model: {len(prompt) + num_tokens - 1}, {num_processed}")
print(
    f"the same text: {cached == ids[len(prompt) :]}   {naive_s[-1] / cached_s[-1]:.1f} times faster"
)
print(llm.decode(cached))
