"""A conversation that grows: each turn reuses the keys and values of the turns before it.

python examples/chat_history.py

Every request sends the whole conversation again. `cached_tokens` counts the prompt tokens that the
engine found in its KV cache, so that only the rest had to be processed.
"""

from nanollama import LLM, GenerationRequest, SamplingParams

llm = LLM("smollm2")
params = SamplingParams(temperature=0, max_tokens=24)
messages = []
for question in ("What is the capital of France?", "And of Italy?", "And of Japan?"):
    messages.append({"role": "user", "content": question})
    answer = llm.complete(GenerationRequest(messages=messages, params=params))
    messages.append({"role": "assistant", "content": answer.text})
    usage = answer.usage
    print(f"you    {question}\nmodel  {answer.text.strip()}")
    print(f"       {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached")
