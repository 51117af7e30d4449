"""The methods of `LLM` that a Python program uses, beyond `start`, `stream` and `complete`.

Adds       `LLM.chat`, `LLM.astream`, requests made of texts, messages and fields, `LLM.render` and
           others. Most are a line here, and are defined in the extra that each one names, such as
           models.tracing.
Seam       `LLM.__getattr__` of nanollama.py looks a method up in `Library`; type checkers see
           `Library` as a base class of LLM.
Remove     delete this file; these methods then say that they need it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nanollama import (
    GenerationRequest,
    Prepared,
    RequestError,
    SamplingParams,
    extra,
    notify,
    options_of,
    public_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nanollama import LLM, AnyRequest, Completion, Decoder, Delta
    from nanollama_extras.models.tracing import Hook

REQUEST_FIELDS = tuple(GenerationRequest.__dataclass_fields__)


def find(llm: LLM, name: str) -> Any:
    """The method or property `name` of an LLM. Raises AttributeError, with the closest name."""
    if (found := vars(Library).get(name)) is not None:
        return found.__get__(llm)
    close = difflib.get_close_matches(name, [*vars(Library), *dir(llm)], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise AttributeError(f"an LLM has no attribute {name!r}{hint}")


def describe(llm: LLM) -> str:
    """One line for `repr`: the model, its size, its context and its kernels."""
    if "checkpoint" not in vars(llm):  # a script's
        return object.__repr__(llm)
    checkpoint, engine = llm.checkpoint, llm.engine
    size = f"{checkpoint.num_parameters / 1e6:.0f}M parameters in {checkpoint.quantization}"
    about = f"{llm.config.model_type}, {size}, {engine.n_ctx} tokens, {engine.decoder.kernels}"
    return f"<LLM {public_name(str(checkpoint.path))}: {about}>"


def is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def request_fields(given: Any) -> dict[str, Any]:
    """A prompt, a conversation or fields of a request, as fields of a request."""
    if isinstance(given, Mapping):
        return {"messages": [given]} if is_message(given) else dict(given)
    if isinstance(given, (list, tuple)) and given and all(map(is_message, given)):
        return {"messages": list(given)}
    return {"prompt": given}


def opened_image(part: Any) -> Any:
    """A part of a message; if it is an image as a path, a URL, the bytes of a file or an object of
    Pillow, one that messages may have. Raises RequestError."""
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return part
    images, value = extra("answers.images", "an image in a message"), part.get("image")
    if isinstance(value, str) and value.partition(":")[0].lower() in ("data", "http", "https"):
        return {"type": "image_url", "image_url": {"url": value}}
    name = value if isinstance(value, (str, Path)) else "the image"
    if isinstance(value, (str, Path)):
        try:
            value = Path(value).read_bytes()
        except OSError as error:
            raise RequestError(f"{name}: cannot be read: {error.strerror}", "messages") from None
    if isinstance(value, (bytes, bytearray)):
        return {"type": "image", "image": images.read_picture(bytes(value), str(name))}
    if isinstance(value, images.pillow().Image):
        images.check_size(value.size, name)
        pixels = images.as_rgb(images.upright(value))
        digest = hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()
        return {"type": "image", "image": images.Picture(digest, pixels)}
    return part


def with_images(message: Any) -> Any:
    """A message whose images may be paths and the like."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [opened_image(part) for part in content]}


def make_request(llm: LLM, given: Any, params: Mapping[str, Any]) -> AnyRequest:
    """As `Library.request`."""
    if isinstance(given, (GenerationRequest, Prepared)):
        if params:
            raise RequestError(
                f"{', '.join(params)} beside a whole request; put them into its params", "params"
            )
        return given
    fields = {**request_fields(given), **params}
    own = {name: fields.pop(name) for name in REQUEST_FIELDS if name in fields}
    known = options_of(SamplingParams)
    if "params" in own and fields:
        raise RequestError(f"{', '.join(fields)} beside params; put them into params", "params")
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *REQUEST_FIELDS], n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise RequestError(f"a request has no field {name!r}; {hint}", name)
    if isinstance(own.get("messages"), list):
        own["messages"] = [with_images(message) for message in own["messages"]]
    if isinstance(stop := fields.get("stop"), str):
        fields["stop"] = (stop,)
    return GenerationRequest(**{"params": SamplingParams(**{**llm.sampling, **fields}), **own})


def conversation(messages: Any) -> list[dict[str, Any]]:
    """A text, a message or a list of both, as messages: a text is the user's."""
    listed: list[Any] = [messages] if isinstance(messages, (str, Mapping)) else list(messages)
    return [{"role": "user", "content": m} if isinstance(m, str) else m for m in listed]


class Library:
    """Methods of LLM; `self` is the LLM."""

    def request(self, request: Any, **params: Any) -> AnyRequest:
        """A request made of a text, token ids, a message, a list of messages or a dict with fields
        of GenerationRequest and SamplingParams. `params` are such fields, too. Those left out are
        the model's own, from its files, else the defaults, as on the command line.

        A whole request is returned as it is. Raises RequestError for an unknown field."""
        return make_request(cast("LLM", self), request, params)

    def chat(self, messages: Any, **params: Any) -> Completion:
        """The whole answer to a conversation: a text, a message, or a list of both. A part
        {"type": "image", "image": ..} of a message is a path, a URL, the bytes of a file, or an
        image of Pillow. `params` as in `request`. Raises RequestError."""
        llm = cast("LLM", self)
        return llm.complete({"messages": conversation(messages)}, **params)

    def astream(self, requests: Any, **params: Any) -> AsyncIterator[Delta]:
        """As `LLM.stream`, for `async for`. Leaving the loop early cancels all that still run."""
        return extra("answers.async_llm", "LLM.astream").astream(self, requests, **params)

    @property
    def decoder(self) -> Decoder:
        """The model's modules. A program may replace any layer, module or tensor in them: the next
        step runs the new one, and reuses nothing that was computed before."""
        return extra("models.parts", "LLM.decoder").opened(self)

    def trace(
        self,
        text: str | list[int],
        layers: Iterable[int] | None = None,
        what: Iterable[str] = ("resid", "attn", "mlp"),
    ) -> dict[str, Tensor]:
        """What the model computes while it reads a text or ids: name -> tensor, as in `attn.3`.
        `what` may have resid, attn, mlp, q, k, v, patterns, router and logits, whose shapes
        models.tracing lists. `layers`: all, or some, counted from the end if below 0; resid.i is
        the input of layer i, and resid.L the last layer's output. Raises RequestError."""
        return extra("models.tracing", "LLM.trace").trace(self, text, layers, what)

    def hooks(self, functions: Mapping[str, Hook]) -> contextlib.AbstractContextManager[None]:
        """In the block, requests of this thread or task call functions for tensors: the key is a
        name as in `trace`, or a pattern such as `mlp.*`. A function gets a copy of the tensor, with
        the rows of new tokens, and a Place (name, kind, layer, positions), and returns None or
        another tensor to compute with. Other requests of a batch stay as they are. Raises
        RequestError."""
        return extra("models.tracing", "LLM.hooks").hooks(self, functions)

    def forget(self) -> None:
        """Reuse nothing that has been computed so far, as after a change of a weight in place."""
        engine = cast("LLM", self).engine
        engine.forget()
        notify("answers.prompt_cache", "leave", engine)

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """Messages -> the text of the prompt, by the model's chat template."""
        template_kwargs["add_generation_prompt"] = add_generation_prompt
        return cast("LLM", self).template.prompt(messages, tools, **template_kwargs)

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        """The ids of a request's prompt. Raises RequestError."""
        return cast("LLM", self).encode_request(request)[0]

    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits (T, V) float32 after each of T ids. Raises RequestError."""
        return extra("answers.scores", "LLM.logits").logits(self, token_ids)

    def score(self, texts: Iterable[tuple[list[int], int]]) -> Iterator[tuple[int, list[float]]]:
        """The index and the log-probabilities of each (ids, start), as `answers.scores.score`."""
        return extra("answers.scores", "LLM.score").score(self, texts)

    def embed(self, texts: Iterable[str | list[int]]) -> list[list[float]]:
        """An embedding of unit length for each text. Raises RequestError."""
        return extra("answers.embeddings", "an embedding").embed(self, texts)
