"""Run the engine by hand: one call of `step` is one forward pass for all running requests.

python examples/engine_loop.py

A second request joins while the engine answers the first one (continuous batching): in one step,
the model processes one token of the first request and the whole prompt of the second.
"""

from nanollama import LLM, GenerationRequest, SamplingParams

llm = LLM("smollm2")
params = SamplingParams(temperature=0, max_tokens=8)
running = [llm.start(GenerationRequest(prompt="The sun rises in the", params=params), index=0)]
step = 0
while running:
    if step == 3:
        late = GenerationRequest(prompt="The capital of Italy is", params=params)
        running.append(llm.start(late, index=1))
    llm.engine.step()
    for seq in running:
        for delta in seq.take():
            done = f"  <- {delta.finish_reason}" if delta.finish_reason else ""
            print(f"step {step:2}  request {delta.index}  {delta.text!r}{done}")
    running = [seq for seq in running if seq.finish_reason is None]
    step += 1
