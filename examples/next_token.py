"""Print the likeliest next tokens after a sentence, and the perplexity of a text.

python examples/next_token.py
"""

import math

from nanollama import LLM

llm = LLM("smollm2")

logits = llm.logits(llm.encode("The Eiffel Tower is in the city of"))  # (T, V)
probs, ids = logits[-1].softmax(-1).topk(5)
for p, token_id in zip(probs.tolist(), ids.tolist()):
    print(f"{p:6.1%}  {llm.decode([token_id])!r}")

for text in (
    "Four score and seven years ago our fathers brought forth on this continent a new nation.",
    "Nation new a continent this on forth brought fathers our ago years seven and score four.",
):
    ids = llm.encode(text)
    logprobs = llm.logits(ids).log_softmax(-1)
    # row t predicts token t + 1
    picked = [float(logprobs[t, ids[t + 1]]) for t in range(len(ids) - 1)]
    print(f"perplexity {math.exp(-sum(picked) / len(picked)):7.1f}  {text}")
