"""`nanollama verify`: compares a model with transformers, which reads the same files.

The reference is made here, where transformers is installed, or read from a file that
--save-reference wrote elsewhere.

Seam: Command (the row "verify" of COMMANDS in nanollama.py). To remove it, delete this
module and that row.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import (
    REPACK,
    CheckpointError,
    GenerationRequest,
    LazyModule,
    LogitsError,
    ModelStore,
    RequestError,
    SamplingParams,
    TemplateError,
    UsageError,
    add_model_options,
    command_parser,
    common_prefix,
    excerpt,
    first_line,
    human_bytes,
    library,
    log,
    open_checkpoint,
    option_group,
    read_settings,
)

if TYPE_CHECKING:
    import safetensors.torch
    import torch
    from torch import Tensor

    from nanollama import LLM, Fields, Json
else:  # --help and usage errors do without these
    safetensors = LazyModule("safetensors", "torch")
    torch = LazyModule("torch")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest differences between a model and its reference."""

    reason: str
    error: float  # largest of a logit
    divergence: float  # mean Kullback-Leibler divergence in nats
    agreement: float  # least share of tokens with the same likeliest next token
    layer: float  # relative error of a layer's output; only names the first place that differs


# Measured: tiny models in float32 differ by less than 1e-4; SmolLM2-135M in Q4_1 by 0.003 nats.
TOLERANCES = {
    "float32": Tolerance("float32 on both sides", 0.01, 1e-5, 0.99, 1e-3),
    "16 bits": Tolerance("16-bit numbers here", 2.0, 0.02, 0.9, 0.1),
    "packed": Tolerance("the same packed weights, 8-bit activations here", 4.0, 0.03, 0.85, 0.3),
    "q8": Tolerance("8-bit weights here, others in the reference", 4.0, 0.05, 0.85, 0.3),
    "q4": Tolerance("4-bit weights here, others in the reference", 10.0, 0.5, 0.6, 1.0),
}


VERIFY_TEXTS = (
    "Hello, world!",
    "  two spaces,\ttab\n\n\nlines \r\n and an end  ",
    "I'm sure they'll say it's 1234567890 or 3.14159 (±0.5 %).",
    "def f(x):\n    return x ** 2  # squared\n",
    "L'été, naïveté, Übergröße, smørrebrød, żółw",
    "Съешь же ещё этих мягких французских булок",
    "敏捷的棕色狐狸跳过懒狗。いろはにほへと 다람쥐 헌 쳇바퀴",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "😀 👩‍👩‍👧‍👦 🇫🇷 e\u0301 \ufb01 \u200b \u00a0 \x07 \x00",
    "<s> </s> <|im_start|> <|endoftext|> [INST] <bos> <|eot_id|> <think>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa        ........----____====",
    '{"a": [1, 2.5e-3, null], "b": "\\u00e9\\n"} https://example.org/?q=a%20b&c=d#e',
)


VERIFY_CHATS: tuple[list[Json], ...] = (
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi \n"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three é 日本"},
    ],
)


VERIFY_PROMPTS = (
    "The history of science is the study of the development of science, including both the natural "
    "and social sciences. In the year 1687, Isaac Newton published his Principia, in which he",
    "import math\n\ndef area(radius):\n    return math.pi * radius ** 2\n\nprint(area(2.5))\n"
    "# Voilà une réponse : 19.63. 日本語もどうぞ",
)


VERIFY_TOKENS = 48  # at most, of a prompt


VERIFY_GREEDY = 16  # tokens to generate


VERIFY_TOP = 64  # largest logits to keep per token; as many more are spread over the vocabulary


VERIFY_STREAM = 1 << 15  # numbers to keep of the layers' inputs, per prompt


def spread(num: int, most: int) -> Tensor:
    """At most `most` indices, evenly spread over `num`."""
    return torch.arange(min(num, most)) * num // min(num, most)


def witness_encoder(path: Path) -> tuple[str, Callable[[str], list[int]]] | None:
    """What a tokenizer was made from, and its ids of a text without tokens around it: SentencePiece
    with tokenizer.model, else the tokenizers library with tokenizer.json. None without either."""
    model, file = path / "tokenizer.model", path / "tokenizer.json"
    with contextlib.suppress(Exception):  # no library, or a file of another kind
        processor = library("sentencepiece").SentencePieceProcessor(model_file=str(model))
        return "SentencePiece", processor.encode
    with contextlib.suppress(Exception):
        plain = library("tokenizers").Tokenizer.from_file(str(file))
        return "tokenizer.json", lambda text: plain.encode(text, add_special_tokens=False).ids
    return None


def witness_ids(tokenizer: Any, path: Path) -> list[tuple[str, list[int]] | None]:
    """A second opinion on each text, with the tokens that transformers puts around it. None for a
    text that spells an added token, which SentencePiece does not know."""
    if not (found := witness_encoder(path)):
        return []
    name, encode = found
    added = [word for word in (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens) if word]
    opinions: list[tuple[str, list[int]] | None] = []
    for text in VERIFY_TEXTS:
        theirs, own = list(tokenizer(text).input_ids), list(encode(text))
        before = theirs[:1] if theirs[:1] == [tokenizer.bos_token_id] else []
        after = theirs[-1:] if theirs[-1:] == [tokenizer.eos_token_id] else []
        spelled = any(word in text for word in added)
        opinions.append(None if spelled else (name, before + own + after))
    return opinions


def reference_tokenizer(tokenizer: Any, path: Path) -> Json:
    """The texts and conversations as transformers' tokenizer renders them; None for an error."""
    chats: list[str | None] = []
    for messages in VERIFY_CHATS if tokenizer.chat_template else ():
        try:
            chats.append(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except Exception:  # a template can fail in any way Python can
            chats.append(None)
    return {
        "texts": [tokenizer(text).input_ids for text in VERIFY_TEXTS],
        "witness": witness_ids(tokenizer, path),
        "chats": chats,
        "prompts": [tokenizer(text).input_ids[:VERIFY_TOKENS] for text in VERIFY_PROMPTS],
    }


def first_stream(x: Tensor, num_dims: int = 3) -> Tensor:
    """x, or the first of several streams between layers (AltUp), which have one dimension more."""
    return x[0] if x.dim() > num_dims else x


def reference_run(model: Any, ids: list[int]) -> tuple[dict[str, Tensor], list[int], list[float]]:
    """Run a prompt through transformers' model. Returns the tensors (logits, their ids, logsumexp,
    streams: each layer's input, and the last norm's input and output), the greedy continuation, and
    the lead of each of its logits."""
    ends: list[Tensor] = []  # of the last norm; nanochat's norms the embeddings, too
    hook = model.get_decoder().norm.register_forward_hook(
        lambda norm, args, output: ends.extend((args[0], output))
    )
    out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    hook.remove()
    logits = out.logits[0].float()
    layers = map(first_stream, [*out.hidden_states[:-1], *ends[-2:]])
    streams = torch.stack([*layers])[:, 0].float()  # (L + 2, T, C)
    top = logits.topk(min(VERIFY_TOP, logits.size(1))).indices  # (T, K), the likeliest first
    others = spread(logits.size(1), VERIFY_TOP).expand(len(ids), -1)
    saved_ids = torch.cat((top, others), dim=1)
    num_streams, _, width = streams.shape
    channels = spread(width, max(4, VERIFY_STREAM // (num_streams * len(ids))))
    tensors = {
        "ids": saved_ids.int(),
        "logits": logits.gather(1, saved_ids),
        "total": logits.logsumexp(1),
        "streams": streams[:, :, channels],
    }
    tokens, margins = list(ids), []
    for _ in range(VERIFY_GREEDY):
        values, best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        tokens.append(int(best[0]))
        margins.append(float(values[0] - values[1]))
    return tensors, tokens[len(ids) :], margins


def make_reference(
    path: Path, tokenizer_path: Path, adapter: str | None = None
) -> tuple[Json, dict[str, Tensor]]:
    """Run a model in transformers, in float32. Returns a description and tensors. Raises
    PackageError without transformers, CheckpointError if it cannot load the model."""

    transformers = library(
        "transformers",
        install='pip install ".[verify]", or give --reference FILE, made where it is installed',
    )

    def load(kind: Any, source: Path, **options: Any) -> Any:
        if source.suffix == ".pt":
            raise CheckpointError(
                f"{path}: transformers does not read nanochat's own files; give --reference FILE, "
                "made from the model's Hugging Face form"
            )
        if source.is_file():
            source, options = source.parent, {**options, "gguf_file": source.name}
        try:
            options |= {
                "local_files_only": True,
                "trust_remote_code": False,
            }  # it asks no questions
            return kind.from_pretrained(source, **options)
        except Exception as error:  # of any kind: there is no reference then
            raise CheckpointError(
                f"{path}: transformers {transformers.__version__} cannot load this: "
                f"{first_line(error)}; give --reference FILE, made from another form of the model"
            ) from None

    transformers.utils.logging.set_verbosity_error()
    about = reference_tokenizer(load(transformers.AutoTokenizer, tokenizer_path), tokenizer_path)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = load(transformers.AutoModelForCausalLM, path, **options)
    if adapter:
        try:
            model.load_adapter(os.path.expanduser(adapter))
        except Exception as error:  # peft is missing or fails
            raise CheckpointError(f"{adapter}: PEFT cannot load it: {first_line(error)}") from None
    model.eval()
    tensors: dict[str, Tensor] = {}
    about |= {"greedy": [], "margins": [], "weights": open_checkpoint(path).quantization}
    about["made_by"] = f"transformers {transformers.__version__}"
    with torch.inference_mode():
        for number, ids in enumerate(about["prompts"]):
            run_tensors, tokens, margins = reference_run(model, ids)
            tensors |= {
                f"{number}.{name}": value.contiguous() for name, value in run_tensors.items()
            }
            about["greedy"].append(tokens)
            about["margins"].append(margins)
    return about, tensors


def read_reference(path: Path) -> tuple[Json, dict[str, Tensor]]:
    """A reference that --save-reference wrote. Raises RequestError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["nanollama"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, or any error of a damaged file
        raise RequestError(f"{path}: not a saved reference: {first_line(error)}") from None


def traced_logits(llm: LLM, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Logits (T, V), and the streams (L + 2, T, C) as `reference_run` has them"""
    decoder: Any = llm.engine.decoder
    layers, hidden, streams = decoder.layers, decoder.hidden, []

    def keep(x: Tensor) -> None:
        streams.append(first_stream(x, 2)[: len(ids)].float().cpu())

    def traced(layer: Any) -> Callable[..., Any]:
        def call(x: Tensor, *rest: Any) -> Any:
            keep(x)
            return layer(x, *rest)

        return call

    def traced_hidden(*batch: Any) -> Tensor:
        x: Tensor = hidden(*batch)
        keep(x)
        keep(decoder.norm(x))
        return x

    decoder.layers, decoder.hidden = [traced(layer) for layer in layers], traced_hidden
    try:
        return llm.logits(ids).cpu(), torch.stack(streams)
    finally:
        decoder.layers = layers
        del decoder.hidden  # the class has its own


def compare_prompt(llm: LLM, ids: list[int], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The differences from the reference for each token (T,) of a prompt: of logits, of
    probabilities in nats, of the likeliest token; and for each stream and token (L + 2, T)."""

    def chances(logits: Tensor, total: Tensor) -> Tensor:
        """Probabilities of the likeliest tokens, and the sum of all others."""
        p = (logits[:, :VERIFY_TOP].double() - total.double().unsqueeze(1)).exp()
        return torch.cat((p, (1 - p.sum(1, keepdim=True)).clamp_min(1e-9)), dim=1)

    logits, streams = traced_logits(llm, ids)
    saved_ids = reference["ids"].long()
    own_logits = logits.gather(1, saved_ids)
    p = chances(reference["logits"], reference["total"])
    q = chances(own_logits, logits.logsumexp(1))
    others = reference["streams"]  # older files end with the last layer's input
    own = streams[: len(others), :, spread(streams.size(2), others.size(2))]
    sizes, their_sizes = (x.norm(dim=2, keepdim=True).clamp_min(1e-12) for x in (own, others))
    # layers are compared by direction: some families scale the stream in another way, which norms
    # undo; the last norm's output is not
    sizes[llm.config.n_layers + 1 :] = their_sizes[llm.config.n_layers + 1 :]
    return {
        "errors": (own_logits - reference["logits"]).abs().amax(1),
        "divergences": (p * (p / q).log()).sum(1),
        "agrees": logits.argmax(1) == saved_ids[:, 0],
        "streams": (own / sizes - others / their_sizes).norm(dim=2),
    }


def first_place(differences: Mapping[str, Tensor], limit: Tolerance, n_layers: int) -> Json:
    """The first place whose output differs: the embedding, a layer, the final norm, or the head if
    only logits differ; and the first token whose prediction differs. None where all agree."""
    # `~(a <= b)` and not `a > b`: NaN differs, too
    bad_streams = (~(differences["streams"] <= limit.layer)).any(1).nonzero()
    bad_logits = ~(differences["errors"] <= limit.error)
    bad_tokens = (bad_logits | ~differences["agrees"]).nonzero()
    names = ["embedding", *(f"layer {i}" for i in range(n_layers)), "final norm"]
    place = names[int(bad_streams[0])] if len(bad_streams) else None
    return {
        "place": place or ("head" if bad_logits.any() else None),
        "token": int(bad_tokens[0]) if len(bad_tokens) else None,
    }


def greedy_tokens(llm: LLM, ids: list[int]) -> list[int]:
    """The model's greedy continuation; empty if the model computes NaN."""
    params = SamplingParams(
        temperature=0, repeat_penalty=1, ignore_eos=True, max_tokens=VERIFY_GREEDY
    )
    with contextlib.suppress(LogitsError):
        return llm.complete(GenerationRequest(ids, params=params)).token_ids
    return []


def compare_text(llm: LLM, about: Fields) -> Json:
    """The texts with other ids, and the conversations with another prompt. `deviates` tells for
    each text which side differs from what the tokenizer was made from; a text on which transformers
    alone does so is no failure."""
    texts, deviates = [], {}
    opinions = about.get("witness") or [None] * len(VERIFY_TEXTS)
    for text, theirs, opinion in zip(VERIFY_TEXTS, about["texts"], opinions):
        if (ours := llm.encode(text)) == theirs:
            continue
        name, ids = opinion or ("", None)
        if ids in (ours, theirs):
            side = "transformers" if ids == ours else "nanollama"
            deviates[text] = f"{side} deviates from {name}"
        if ids != ours:
            texts.append(text)
    chats = []
    for messages, expected in zip(VERIFY_CHATS, about["chats"]):
        with contextlib.suppress(TemplateError):
            # where transformers refuses, a prompt of another shape is right
            if expected is not None and llm.template.prompt(messages) != expected:
                chats.append(messages)
    return {"texts": texts, "deviates": deviates, "chats": chats, "num_chats": len(about["chats"])}


def pick_tolerance(llm: LLM, quantize: str | None, about: Fields) -> Tolerance:
    kind, decoder = llm.checkpoint.quantization, llm.engine.decoder
    if kind in REPACK and kind != about["weights"]:
        return TOLERANCES["q4" if kind.startswith("Q4") else "q8"]
    is_packed = any(tensor.is_packed for tensor in llm.checkpoint.tensors.values())
    if is_packed and decoder.backend.rounds_activations:
        return TOLERANCES["packed"]
    exact = (decoder.dtype, decoder.kv_dtype) == (torch.float32, "float32")
    return TOLERANCES[quantize or ("float32" if exact else "16 bits")]


def compare(llm: LLM, about: Fields, tensors: Mapping[str, Tensor], limit: Tolerance) -> Json:
    """Compare the model with a reference. Returns the differences and whether they pass."""
    prompts, greedy, places = [], [], []
    for number, ids in enumerate(about["prompts"]):
        reference = {
            n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{number}.")
        }
        prompts.append(compare_prompt(llm, ids, reference))
        places.append(first_place(prompts[-1], limit, llm.config.n_layers))
        num_same = common_prefix(greedy_tokens(llm, ids), about["greedy"][number])
        margin = about["margins"][number][num_same] if num_same < VERIFY_GREEDY else None
        greedy.append({"same": num_same, "margin": margin})
    joined = {name: torch.cat([f[name].flatten() for f in prompts]) for name in prompts[0]}
    result = {
        **compare_text(llm, about),
        "error": float(joined["errors"].max()),
        "divergence": float(joined["divergences"].mean()),
        "agreement": float(joined["agrees"].float().mean()),
        "layer_error": float(joined["streams"].max()),
        "first": places,
        "greedy": greedy,
    }
    is_near = all(g["margin"] is None or g["margin"] <= 2 * limit.error for g in greedy)
    result["passed"] = bool(
        is_near
        and not (result["texts"] or result["chats"])
        and result["error"] <= limit.error  # False for NaN
        and result["divergence"] <= limit.divergence
        and result["agreement"] >= limit.agreement
    )
    return result


def verify_lines(result: Fields, limit: Tolerance) -> Iterator[str]:
    """The result as text."""
    num_texts, num_chats = len(VERIFY_TEXTS), result["num_chats"]
    sides = dict.fromkeys(result["texts"], "") | result["deviates"]
    yield f"tokenization   {num_texts - len(sides)} of {num_texts} texts equal"
    for text, side in sides.items():
        yield f"               differs: {excerpt(text)}" + (f" ({side})" if side else "")
    yield f"template       {num_chats - len(result['chats'])} of {num_chats} conversations equal"
    yield from (f"               differs: {excerpt(chat)}" for chat in result["chats"])
    yield f"logits         largest error {result['error']:.2g} (at most {limit.error:g})"
    kl = f"{result['divergence']:.2g} nats (at most {limit.divergence:g})"
    yield f"               KL divergence {kl}"
    top = f"{result['agreement']:.1%} of tokens (at least {limit.agreement:.0%})"
    yield f"               same likeliest next token at {top}"
    yield f"layers         largest relative error {result['layer_error']:.2g}"
    for number, place in enumerate(result["first"]):
        token = None if place["token"] is None else f"token {place['token']}"
        if words := [word for word in (place["place"], token) if word]:
            yield f"               prompt {number} first differs at {', '.join(words)}"
    same = ", ".join(str(g["same"]) for g in result["greedy"])
    yield f"greedy         {same} of {VERIFY_GREEDY} tokens equal"
    yield f"{'pass' if result['passed'] else 'FAIL'}           {limit.reason}"


def run(argv: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = command_parser("verify")
    parser.add_argument("ref", nargs="?", metavar="MODEL")
    add_model_options(parser)
    add = option_group(parser, "verify")
    add("--save-reference FILE", "write the results of transformers to a file", Path)
    add("--reference FILE", "compare with such a file", Path)
    add("--json", "print one JSON object", action="store_true")
    args = parser.parse_args(argv)
    args.prefill_chunk = None
    settings = read_settings(args)
    if args.save_reference and not os.access(args.save_reference.resolve().parent, os.W_OK):
        raise UsageError(f"{args.save_reference}: its directory does not exist or is not writable")
    if args.reference and not args.save_reference:
        about, tensors = read_reference(args.reference)
    else:
        path = ModelStore().resolve(settings.model, args.revision)
        other = settings.value("tokenizer")[0]
        text = ModelStore().resolve(other) if other else path
        about, tensors = make_reference(path, text, settings.value("adapter")[0])
    if args.save_reference:
        raw = safetensors.torch.save(tensors, {"nanollama": json.dumps(about)})
        args.save_reference.write_bytes(raw)
        log.warning(f"{args.save_reference}: {human_bytes(args.save_reference.stat().st_size)}")
        return 0
    llm = settings.load()
    limit = pick_tolerance(llm, args.quantize, about)
    try:
        result = compare(llm, about, tensors, limit)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"the reference is of another model: {first_line(error)}") from None
    if args.json:
        print(json.dumps({"model": settings.model, "reference": about["made_by"], **result}))
    else:
        print(f"{settings.model} against {about['made_by']}, kernels {llm.engine.decoder.kernels}")
        print("\n".join(verify_lines(result, limit)))
    return 0 if result["passed"] else 1
