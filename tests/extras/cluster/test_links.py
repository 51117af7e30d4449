"""The connection between a front and a replica, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

import nanollama
from nanollama_extras.cluster import front
from nanollama_extras.cluster import replica as replicas
from nanollama_extras.cluster.calls import KEY, Address, Call, Head, Part
from nanollama_extras.cluster.links import Answer, Links, LostError
from nanollama_extras.cluster.replica import FrontChannel, Replica

App = Callable[[Any, Any, Any], Awaitable[None]]
GET = Call("GET", "/x", b"", (), b"asked")
HEADERS = [(b"kind", b"any"), (b"request-id", b"7")]
START = {"type": "http.response.start", "status": 200, "headers": HEADERS}
HEAD = Head(200, ((b"kind", b"any"),))


def body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def listening(app: App, name: str = "one") -> Replica:
    """A replica of an application alone."""
    replica = object.__new__(Replica)
    replica.app, replica.channels, replica.name = app, set(), name  # type: ignore[assignment]
    await replica.listen("127.0.0.1")
    return replica


@contextlib.asynccontextmanager
async def linked(app: App) -> AsyncIterator[tuple[Links, Replica]]:
    """A front's connections, and the replica at the other end of the only one."""
    replica = await listening(app)

    async def ask(_: str) -> Address:
        return replica.address

    links = Links(lambda: ("one",), ask)
    watching = asyncio.ensure_future(links.watch())
    await until(links.names)
    yield links, replica
    watching.cancel()
    replica.server.close()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def parts_of(answer: Answer) -> list[Any]:
    found = []
    while (item := await answer.next()) is not None:
        found.append(item)
    return found


async def test_an_application_answers_calls_at_the_same_time() -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(scope["path"].encode()))
        await asyncio.sleep(0)
        await send(body((await receive())["body"]))

    async with linked(echo) as (links, _):
        calls = [Call("POST", f"/{i}", b"", (), bytes([i])) for i in range(20)]
        answers = [links.channels["one"].begin(call) for call in calls]
        for call, answer in zip(calls, answers):
            first, *rest = await parts_of(answer)
            assert first == Part(call.path.encode(), HEAD)
            assert rest == [call.body]
        assert not links.channels["one"].answers


async def test_parts_of_one_turn_of_the_loop_are_one_message() -> None:
    step, flushed = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await step.wait()
        await send(body(b"token"))

    async with linked(app) as (links, replica):
        answers = [links.channels["one"].begin(GET) for _ in range(9)]
        await until(lambda: replica.num_calls == 9)
        (channel,) = replica.channels
        channel.transport = _Spy(channel.transport, flushed)
        step.set()
        for answer in answers:
            assert await parts_of(answer) == [Part(b"token", HEAD)]
    assert len(flushed) == 1


class _Spy:
    """A transport that counts writes."""

    def __init__(self, transport: Any, written: list[bytes]) -> None:
        self.transport, self.written = transport, written

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self.transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


async def test_a_client_that_goes_ends_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    async def polite(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        seen.append((await receive())["type"])

    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(replicas, "CANCEL_S", 0.0)
    for app in (polite, deaf):
        async with linked(app) as (links, replica):
            answer = links.channels["one"].begin(GET)
            await until(lambda: replica.num_calls)
            answer.close()
            await until(lambda: not replica.num_calls)
    assert seen == ["http.disconnect"]


async def test_an_application_that_fails_ends_its_call_alone() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"half"))
        raise ValueError(scope["path"])

    async with linked(app) as (links, _):
        for _ in range(2):
            answer = links.channels["one"].begin(GET)
            assert await answer.next() == Part(b"half", HEAD)
            with pytest.raises(RuntimeError, match="ValueError: /x"):
                await answer.next()
        assert links.names()


async def test_a_replica_that_ends_loses_its_calls_and_is_passed_over() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async with linked(app) as (links, replica):
        answer = links.channels["one"].begin(GET)
        await until(lambda: replica.num_calls)
        (channel,) = replica.channels
        replica.server.close()
        channel.transport.abort()
        with pytest.raises(LostError):
            await answer.next()
        assert not links.names()


async def test_a_replica_closes_after_its_last_call() -> None:
    step = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await step.wait()
        await send(START)
        await send(body(b"whole"))

    async with linked(app) as (links, replica):
        answer = links.channels["one"].begin(GET)
        await until(lambda: replica.num_calls)
        closing = asyncio.ensure_future(replica.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        step.set()
        assert await parts_of(answer) == [Part(b"whole", HEAD)]
        await closing
        await until(lambda: not links.names())


class _Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


async def test_a_stranger_is_not_heard() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    replica = await listening(app)
    place = replica.address.host, replica.address.port
    data = pickle.dumps([(0, _Bomb())])
    for key in (b"", b"wrong"):
        reader, writer = await asyncio.open_connection(*place)
        challenge = await reader.readexactly(KEY)
        proof = hmac.digest(key, challenge, "sha256") if key else bytes(KEY)
        writer.write(proof + len(data).to_bytes(4, "big") + data)
        assert await reader.read() == b""
        writer.close()
    replica.server.close()


async def test_messages_may_come_in_any_pieces() -> None:
    channel, got = FrontChannel(object.__new__(Replica)), []
    channel.is_trusted = True
    channel.got = lambda *item: got.append(item)  # type: ignore[method-assign]
    messages = [pickle.dumps([(0, b"a"), (1, b"b")]), pickle.dumps([(2, b"c" * 300)])]
    data = b"".join(len(m).to_bytes(4, "big") + m for m in messages)
    for size in (1, 3, len(data)):
        got.clear()
        for start in range(0, len(data), size):
            channel.data_received(data[start : start + size])
        assert got == [(0, b"a"), (1, b"b"), (2, b"c" * 300)]


@contextlib.asynccontextmanager
async def fronted(**apps: App) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, Replica]]]:
    """A client of a front, and replicas by their names."""
    replicas = {name: await listening(app, name) for name, app in apps.items()}
    models = front.FrontModels({}, nanollama.ServerConfig(), live=lambda: tuple(replicas))
    models.is_loading = False

    async def ask(name: str) -> Address:
        return replicas[name].address

    models.links.ask = ask
    watching = asyncio.ensure_future(models.links.watch())
    await until(lambda: len(models.links.names()) == len(replicas))
    transport = httpx.ASGITransport(nanollama.create_app(models))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield http, replicas
    watching.cancel()
    for replica in replicas.values():
        replica.server.close()


def lose(replica: Replica) -> None:
    """End a replica as a kill does."""
    replica.server.close()
    for channel in replica.channels:
        channel.transport.abort()


async def whole(scope: Any, receive: Any, send: Any) -> None:
    await send(START)
    await send(body(b"whole"))


async def never(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


async def begun(scope: Any, receive: Any, send: Any) -> None:
    await send({**START, "headers": [(b"content-type", b"text/event-stream")]})
    await send(body(b"data: {}\n\n"))
    await asyncio.Event().wait()


async def opened(scope: Any, receive: Any, send: Any) -> None:
    await send({**START, "headers": [(b"content-type", b"text/event-stream")]})
    await send(body(b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'))
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (opened, "whole"),
        (never, "whole"),
        (begun, 'data: {}\n\ndata: {"error": {"message": "the replica has ended'),
    ],
)
async def test_only_an_answer_that_has_begun_is_lost(first: App, answer: str) -> None:
    async with fronted(first=first, second=whole) as (http, replicas):
        asked = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x"}))
        await until(lambda: replicas["first"].num_calls)
        await asyncio.sleep(0.05)
        lose(replicas["first"])
        found = await asked
        assert found.status_code == 200
        assert found.text.startswith(answer)
        assert (await http.post("/v1/completions", json={"prompt": "y"})).text == "whole"


async def test_a_full_replica_is_passed_over_and_the_last_one_says_so() -> None:
    async def full(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "status": 429})
        await send(body(b"full"))

    async with fronted(first=full, second=whole) as (http, _):
        assert (await http.get("/v1/models")).text == "whole"
    async with fronted(first=full, second=full) as (http, _):
        answer = await http.get("/v1/models")
        assert (answer.status_code, answer.text) == (429, "full")


@pytest.mark.parametrize(
    ("timeout_s", "status", "code"), [(0.1, 504, "timeout"), (None, 503, "no_replica")]
)
async def test_a_request_waits_for_a_replica_for_a_time(
    timeout_s: float | None, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "NONE_S", 0.2)
    models = front.FrontModels({}, nanollama.ServerConfig(timeout_s=timeout_s))
    models.is_loading = False
    transport = httpx.ASGITransport(nanollama.create_app(models))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        answer = await http.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
