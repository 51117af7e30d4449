"""A scripted server for the tests of other programs: `TestServer`, `--script`, the pytest fixture.

Adds an engine that reads its tokens from a script, and a layer around the server that records the
requests and breaks answers off where the script says so. Scripted tool calls need answers.tools.
It imports neither torch nor NumPy.

Seam: an `LLM` that a `ModelSource` loads; middleware of `Models`; `PUBLIC_EXTRAS`. To remove
it, delete this file, its rows in PUBLIC_EXTRAS, and --script.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
import secrets
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import uvicorn
import yaml
from starlette.datastructures import Headers
from starlette.middleware import Middleware

from nanollama import (
    LLM,
    ChatTemplate,
    Delta,
    Engine,
    EngineStats,
    GenerationRequest,
    Json,
    Models,
    ModelSource,
    NanollamaError,
    Prepared,
    RequestError,
    Scheduler,
    Sequence,
    ServerConfig,
    TextFiles,
    TokenLogprobs,
    UsageError,
    WireError,
    __version__,
    as_json,
    check_type,
    create_app,
    encode_chat,
    extra,
    library,
    listen,
    message_text,
    open_model,
    parse_json,
    preferred,
    read_fields,
    refuse,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from nanollama import Constraint, Settings, Tokenizer
    from nanollama_extras.answers.tools import Calls

SECRET = re.compile("auth|cookie|api-?key|token|secret|password")  # in the name of a header
MAX_RECORDED_REQUESTS, MAX_RECORDED_BYTES = 256, 1 << 20  # the bytes are those of one body

SCRIPT_FIELDS = {  # of an answer -> JSON type
    "match": "string",  # the answer to every question that contains this; others go in order
    "text": "string",
    "reasoning": "string",
    "tool_calls": "array",  # of {name, arguments}
    "finish_reason": "string",
    "delay": "number",  # seconds before the first token
    "token_delay": "number",  # seconds before each later token
    "error": "integer",  # an HTTP status; its text is `message`
    "message": "string",
    "malformed_after": "integer",  # tokens, before an event that is not JSON
    "cut_after": "integer",  # tokens, before the connection ends
}


class Fault(NanollamaError):
    """An answer breaks off here, as its script says: with an event that is not JSON, or (`is_cut`)
    with the end of the connection. `FaultLayer` carries it out."""

    MARK = f"scripted fault {secrets.token_hex(8)}"  # no answer contains it by chance

    def __init__(self, is_cut: bool) -> None:
        super().__init__(f"{self.MARK}: {'cut' if is_cut else 'torn'}")
        self.is_cut = is_cut


class Script:
    """The answers of a scripted server: one after the other, and the last one from then on.

    Raises UsageError, naming the answer, for one that cannot be played."""

    def __init__(self, answers: Any) -> None:
        given = answers if isinstance(answers, list) else [answers]
        answers = [{"text": one} if isinstance(one, str) else one for one in given]
        for number, answer in enumerate(answers, 1):
            try:
                check_answer(answer)
            except RequestError as error:
                raise UsageError(f"answer {number} of the script: {error}") from None
        self.matching: list[Json] = [answer for answer in answers if "match" in answer]
        self.others: deque[Json] = deque(answer for answer in answers if "match" not in answer)

    def next(self, question: str) -> Json:
        """The answer to a question. Raises WireError where the script has none."""
        found = next((answer for answer in self.matching if answer["match"] in question), None)
        if found is None and not self.others:
            raise WireError(500, "no_answer", "the script has no answer to this request")
        return found or (self.others[0] if len(self.others) == 1 else self.others.popleft())


def check_answer(answer: Any) -> None:
    """Raise RequestError for an answer that cannot be played."""
    check_type("it", answer, "object")
    _, unknown = read_fields(answer, SCRIPT_FIELDS)
    if unknown:
        refuse(f"{unknown[0]} is not known; known: {', '.join(SCRIPT_FIELDS)}", "it")
    for call in answer.get("tool_calls", []):
        check_type("a tool call", call, "object")
        check_type("a tool call's name", call.get("name"), "string")
    for name in ("delay", "token_delay"):
        if not 0 <= answer.get(name, 0) <= threading.TIMEOUT_MAX:
            refuse(f"{name} is {answer[name]}; it must be at least 0", "it")
    if not 400 <= answer.get("error", 400) <= 599:
        refuse(f"error is {answer['error']}; it must be from 400 to 599", "it")


def read_script(path: Path) -> Script:
    """A script from a YAML or JSON file. Raises UsageError."""
    try:
        return Script(yaml.safe_load(path.read_text(encoding="utf-8")) or [])
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: is neither YAML nor JSON: {reason}") from None


class WordTokenizer:
    """A Tokenizer without a vocabulary: a token is a word and the space before it. There are tokens
    for a turn and for a gap."""

    control: Mapping[str, int] = {}
    ADDED = ("<|im_start|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    added: Mapping[str, int] = {word: i for i, word in enumerate(ADDED, 1)}
    text = TextFiles("script")
    end_ids: frozenset[int] = frozenset()
    strips_space = False
    MAX_WORDS = num_tokens = 1 << 16  # beyond, words share an id

    def __init__(self) -> None:
        self.ids: dict[str, int] = {"": 0, **self.added}
        self.words = [*self.ids]

    def encode(self, text: str, *_: bool, **__: bool) -> list[int]:
        words = re.findall(r"\s?[^\s]+|\s", text)
        for word in words:
            if word not in self.ids and len(self.words) < self.MAX_WORDS:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return [self.ids.get(word, 0) for word in words]

    spell = encode

    def piece(self, token_id: int) -> str:
        return self.words[token_id] if 0 <= token_id < len(self.words) else ""

    def token_bytes(self, token_id: int) -> bytes:
        return self.piece(token_id).encode("utf-8", errors="replace")

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(map(self.piece, ids))


class ScriptEngine(Engine):
    """An Engine that plays scripted answers, without a model or tensors."""

    def __init__(self) -> None:
        self.n_ctx, self.n_vocab, self.is_capped = 1 << 20, WordTokenizer.MAX_WORDS, False
        self.num_slots, self.stats, self.lock = 64, EngineStats(), threading.RLock()
        self.scheduler = Scheduler(self.num_slots, 1, 0, lambda slot, num, length: num)
        self.cache = cast("Any", types.SimpleNamespace(nbytes=0))
        self.decode_steps = None
        device = {"device": "none", "kernels": "script", "kv_dtype": "none"}
        self.decoder = cast("Any", types.SimpleNamespace(**device))
        self.plays: dict[Sequence, tuple[Json, deque[int]]] = {}

    def step(self) -> None:
        """Add a token to each sequence whose delay is over; sleep a little while none is."""
        while admitted := self.scheduler.admit():
            admitted[0].num_cached = 0
        now = time.perf_counter()
        due = {seq: self.due_s(seq) for seq in self.scheduler.running}
        if due and min(due.values()) > now:
            time.sleep(min(0.005, min(due.values()) - now))  # a new request may be due earlier
        for seq in [seq for seq, at in due.items() if at <= now]:
            seq.outbox.append(self.play(seq))
            self.stats.decode_tokens += 1
            if seq.finish_reason:
                self.cancel(seq)

    def due_s(self, seq: Sequence) -> float:
        """When the next token of a sequence comes, on time.perf_counter's clock."""
        answer, num = self.plays[seq][0], seq.num_generated
        return float(seq.started_s + answer.get("delay", 0) + num * answer.get("token_delay", 0))

    def play(self, seq: Sequence) -> Delta:
        """The next token of an answer, its end, or the fault that the script puts there."""
        answer, ids = self.plays[seq]
        for name in ("cut_after", "malformed_after"):
            if answer.get(name) == seq.num_generated:
                seq.finish_reason = "error"
                return Delta(seq.index, finish_reason="error", error=Fault(name == "cut_after"))
        logprobs = None if seq.params.logprobs is None else TokenLogprobs(0.0)
        is_end = not ids
        delta = seq.append(0 if is_end else ids.popleft(), logprobs, is_end)
        reason = answer.get("finish_reason")
        seq.finish_reason = reason if reason and delta.finish_reason else delta.finish_reason
        return dataclasses.replace(delta, finish_reason=seq.finish_reason)

    def cancel(self, seq: Sequence) -> None:
        super().cancel(seq)
        self.plays.pop(seq, None)


def spelled_calls(template: ChatTemplate, calls: list[tuple[str, str]]) -> str:
    """Calls, each a name and JSON, as a model with this template writes them."""
    style = extra("answers.tools", "a scripted tool call").tool_style(template)
    return str(style.form.spell(calls))


def noted(llm: LLM, request: GenerationRequest) -> GenerationRequest:
    """The request with a note in the place of each image. Raises RequestError for one that cannot
    be read."""
    if request.messages is None:
        return request
    note: Any = preferred("answers.images", "noted", lambda _, messages: messages)
    return dataclasses.replace(request, messages=note(llm, request.messages))


class ScriptLLM(LLM):
    """An LLM whose answers a script gives."""

    def __init__(self, script: Script) -> None:
        self.script, self.engine = script, ScriptEngine()
        self.plays = self.engine.plays
        self.tokenizer = cast("Tokenizer", WordTokenizer())
        self.template = ChatTemplate(TextFiles("script"))
        self.sampling = {}
        self.vision = encode_chat  # images are notes before it is called

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the code: there are no weights."""
        return f"fp_{__version__}"

    def encode_request(self, request: GenerationRequest) -> tuple[list[int], str]:
        """As of any model; the word [image] stands in the place of each image."""
        return super().encode_request(noted(self, request))

    def constraint(
        self, request: GenerationRequest, ids: list[int], calls: Calls | None
    ) -> Constraint | None:
        """None: the script's answer comes as it is, whatever the request wants of it."""
        return None

    def start(
        self, request: GenerationRequest | Prepared, index: int = 0, logprobs_from: int = 1
    ) -> Sequence:
        """Begin the next answer of the script. Raises the error that it names."""
        prepared = request if isinstance(request, Prepared) else self.prepare(request)
        request = prepared.request
        if request.embed:
            raise RequestError("a script has no embeddings; --model tiny-random has", "input")
        said = request.messages
        answer = self.script.next(message_text(said[-1]) if said else str(request.prompt or ""))
        if status := answer.get("error"):
            code = "rate_limit_exceeded" if status == 429 else "scripted"
            raise WireError(status, code, answer.get("message", "the script says so"))
        seq = super().start(prepared, index, logprobs_from)
        calls = [
            (c["name"], json.dumps(c.get("arguments", {}))) for c in answer.get("tool_calls", [])
        ]
        thought = f"<think>{answer['reasoning']}</think>" if "reasoning" in answer else ""
        spelled = spelled_calls(self.template, calls) if calls else ""
        text = thought + answer.get("text", "") + spelled
        self.plays[seq] = answer, deque(self.tokenizer.encode(text))
        return seq


class FaultLayer:
    """ASGI middleware that records requests, shows them at /_test/requests, and carries out faults.

    requests: {method, path, headers, body} of each request whose body was read, oldest first; the
    body is None where it is no JSON or too long. Headers with a client's secrets are left out."""

    def __init__(self, app: ASGIApp, requests: deque[Json]) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] == "/_test/requests" and scope["method"] in ("GET", "DELETE"):
            response = as_json({"requests": list(self.requests)})
            if scope["method"] == "DELETE":
                self.requests.clear()
            await response(scope, receive, send)
        else:
            await self.run(scope, self.recorded(scope, receive), send)

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. A fault of a whole answer arrives as the exception, one of a stream as
        an error event."""
        has_started = False

        async def send_on(message: Message) -> None:
            nonlocal has_started
            body: bytes = message.get("body", b"")
            if Fault.MARK.encode() in body:
                if str(Fault(is_cut=True)).encode() in body:
                    raise Fault(is_cut=True)  # the server closes a connection whose answer fails
                start, end = body.index(b"{"), len(body.rstrip(b"\n"))
                message = {**message, "body": body[:start] + b'{"torn": "' + body[end:]}
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Fault as fault:
            if has_started:
                raise
            await send_torn(send, fault.is_cut)

    def recorded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, which records the request once its whole body was read."""
        body = bytearray()

        async def receive_on() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                if len(body) <= MAX_RECORDED_BYTES:
                    body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    self.record(scope, body)
            return message

        return receive_on

    def record(self, scope: Scope, body: bytearray) -> None:
        value = None
        if len(body) <= MAX_RECORDED_BYTES:
            with contextlib.suppress(ValueError):
                value = parse_json(body)
        entry = {"method": scope["method"], "path": scope["path"], "body": value}
        headers = {k: v for k, v in Headers(scope=scope).items() if not SECRET.search(k)}
        self.requests.append({**entry, "headers": headers})


async def send_torn(send: Send, is_cut: bool) -> None:
    """Send an answer that is not JSON; with `is_cut`, one that also ends before its length."""
    body = b'{"torn": "'
    length = str(999 if is_cut else len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": is_cut})


def middleware(requests: deque[Json] | None = None) -> list[Middleware]:
    """The layer of a scripted server, for `Models`; it records into `requests`."""
    logging.getLogger("uvicorn.error").addFilter(is_unscripted)
    recorded = deque[Json](maxlen=MAX_RECORDED_REQUESTS) if requests is None else requests
    return [Middleware(FaultLayer, requests=recorded)]


def is_unscripted(record: logging.LogRecord) -> bool:
    """False for uvicorn's complaint about a connection that a script cut."""
    return "without completing response" not in record.getMessage()


def scripted_models(
    load: Callable[[], LLM], name: str, config: ServerConfig, requests: deque[Json] | None = None
) -> Models:
    """The model of a scripted server, whose requests are recorded."""
    shelf = preferred("api.shelf", "Shelf", Models)
    return shelf({name: ModelSource(name, load)}, config, middleware=middleware(requests))


def open_models(settings: Settings, config: ServerConfig) -> Models:
    """What `--script FILE`, or `--model tiny-random`, serves. Raises UsageError."""
    if settings.args.script:
        script = read_script(settings.args.script)
        name = (*config.served_names, "script")[0]
        return scripted_models(lambda: ScriptLLM(script), name, config)
    models = preferred("api.shelf", "open_shelf", open_model)(settings, config)
    models.middleware = middleware()
    return models


class TestServer:
    """A scripted server in a thread of this process, for the tests of programs that call one.

        with TestServer("Hello!", {"error": 429}) as server:
            client = openai.OpenAI(base_url=server.base_url, api_key="any")

    `answers` replaces the script; `requests` has the requests that came in, each with its body.
    `from nanollama import test_server` gives a pytest fixture of the same kind. Raises UsageError
    for a script that cannot be played."""

    __test__ = False  # not a test itself

    def __init__(self, *answers: str | Json) -> None:
        self.script = Script(list(answers) or ["Hello!"])
        self.requests: deque[Json] = deque(maxlen=MAX_RECORDED_REQUESTS)
        self._llm: ScriptLLM | None = None
        config = ServerConfig(any_model=True)
        self._models = scripted_models(self._load, "test-model", config, self.requests)
        self._app = create_app(self._models)

    def _load(self) -> LLM:
        self._llm = ScriptLLM(self.script)
        return self._llm

    def answers(self, *answers: str | Json) -> None:
        """Replace the script, and forget the requests so far."""
        self.script = Script(list(answers))
        if self._llm is not None:
            self._llm.script = self.script
        self.requests.clear()

    def __enter__(self) -> TestServer:
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.base_url = f"{self.url}/v1"
        settings = uvicorn.Config(
            self._app, log_config=None, proxy_headers=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(settings)
        run = functools.partial(self._server.run, sockets=[listener])
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        while not (self._server.started and self._models.ready) and self._thread.is_alive():
            time.sleep(0.001)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()


@lru_cache(maxsize=1)
def shared_test_server() -> TestServer:
    """One server for all tests of a process."""
    return TestServer().__enter__()


def make_fixture() -> Any:
    """`test_server`, a pytest fixture; pytest is imported only when a program reads that name."""
    pytest = library("pytest", install="pip install pytest")

    @pytest.fixture  # type: ignore[untyped-decorator]
    def test_server() -> TestServer:
        """A TestServer that answers "Hello!" until its `answers` are given."""
        server = shared_test_server()
        server.answers("Hello!")
        return server

    return test_server


def __getattr__(name: str) -> Any:
    if name == "test_server":
        return make_fixture()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
