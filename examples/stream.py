"""Print a chat answer while the model writes it.

python examples/stream.py
"""

from nanollama import LLM, GenerationRequest, SamplingParams

llm = LLM("smollm2")
request = GenerationRequest(
    messages=[
        {"role": "system", "content": "You are a terse assistant."},
        {"role": "user", "content": "Name three primary colours."},
    ],
    params=SamplingParams(temperature=0, max_tokens=40),
)
for delta in llm.stream(request):
    print(delta.text, end="", flush=True)
    if delta.usage:  # only the last delta has usage and a finish reason
        print(f"\n{delta.finish_reason}: {delta.usage.completion_tokens} tokens")
