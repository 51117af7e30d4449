"""Ollama's parameters that have no effect here: in a Modelfile, after /set, and in requests.

Seam       `nanollama.set_parameter` asks `has_no_effect` about a name that it does not know; the
           dialect in api/ollama.py reads WITHOUT_EFFECT.
Remove     delete this file together with api/ollama.py; these names are then unknown.
Source     https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx, and api/types.go of
           earlier releases
"""

from __future__ import annotations

from nanollama import RequestError, excerpt, warn_once

# Parameter -> the values that are accepted, which ask for nothing; () for any number or boolean
WITHOUT_EFFECT: dict[str, tuple[float, ...]] = {
    **dict.fromkeys("num_batch num_gpu main_gpu num_keep use_mmap use_mlock low_vram".split(), ()),
    **dict.fromkeys("numa f16_kv vocab_only logits_all embedding_only".split(), ()),
    **dict.fromkeys("penalize_newline mirostat_tau mirostat_eta".split(), ()),
    "mirostat": (0,),
    "tfs_z": (1,),
    "typical_p": (1,),
}


def has_no_effect(name: str, text: str) -> bool:
    """Whether a parameter is one that has no effect here, which is said once. Raises RequestError
    for a value that would need an effect, or that is neither a number nor a boolean."""
    if name not in WITHOUT_EFFECT:
        return False
    accepted = WITHOUT_EFFECT[name]
    try:
        value = float({"true": "1", "false": "0"}.get(text.lower(), text))
    except ValueError:
        message = f"{name} is {excerpt(text)}; a number, true or false is needed"
        raise RequestError(message, name) from None
    if accepted and value not in accepted:
        problem = f"{name} {text} is not supported; leave it out, or set it to {accepted[0]}"
        raise RequestError(problem, name)
    warn_once(f"the parameter {name} has no effect here")
    return True
