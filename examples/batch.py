"""Answer several prompts at once, each with its own parameters.

python examples/batch.py

All prompts share every forward pass of the model. Rows of a batch do not influence each other: with
a seed, each request gets the text that it would get alone.
"""

from nanollama import LLM, GenerationRequest, SamplingParams

llm = LLM("smollm2")
prompts = {
    "The capital of Italy is": SamplingParams(temperature=0, max_tokens=2),
    "Once upon a time, a robot": SamplingParams(temperature=1.0, seed=1, max_tokens=12),
    "One, two, three,": SamplingParams(temperature=0, repeat_penalty=1.0, stop=(" seven",)),
}
texts = ["" for _ in prompts]
requests = [GenerationRequest(prompt=text, params=params) for text, params in prompts.items()]
for delta in llm.stream(requests):
    texts[delta.index] += delta.text
    if delta.finish_reason:
        print(f"request {delta.index} is done ({delta.finish_reason})")
for prompt, text in zip(prompts, texts):
    print(f"{prompt!r} -> {text!r}")
