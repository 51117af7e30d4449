"""Print the token that the model would predict if it stopped after each layer.

python examples/logit_lens.py

The logit lens applies the final norm and head to the residual stream between layers
(https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).
"""

from nanollama import LLM

llm = LLM("smollm2")
decoder = llm.engine.decoder


def spy(layer, number):
    """Wrap `layer` so that it prints the token that the last position's stream (C,) decodes to."""

    def call(x, *rest):
        x = layer(x, *rest)
        last = decoder.norm(x[num_tokens - 1 : num_tokens])
        token_id = int(decoder.lm_head(last).argmax())
        print(f"after layer {number:2}  {llm.decode([token_id])!r}")
        return x

    return call


ids = llm.encode("The opposite of hot is")
num_tokens = len(ids)
decoder.layers = [spy(layer, i) for i, layer in enumerate(decoder.layers)]
llm.logits(ids)
