"""The choice of a replica, without Ray."""

from __future__ import annotations

from typing import Any

import pytest

from nanollama_extras.cluster.placement import BLOCK, SLACK, Placement, beginning

NAMES = ("a", "b", "c")


def chat(*turns: str, system: str = "Be brief.", **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    return {"messages": [{"role": "system", "content": system}, *messages], **fields}


def send(placement: Placement, body: dict[str, Any], **headers: str) -> str:
    """The replica that gets a request, which ends at once."""
    start = beginning(body, headers)
    name = placement.pick(start)
    placement.note(start, name)
    return name


def test_a_chat_stays_where_it_began() -> None:
    placement = Placement(lambda: NAMES)
    chats = [[f"question {i}", "x" * 3 * BLOCK, "and then?"] for i in range(30)]
    first = [send(placement, chat(*turns[:1])) for turns in chats]
    assert [send(placement, chat(*turns)) for turns in chats] == first
    assert {first.count(name) for name in NAMES} == {10}  # though all have one system prompt


def test_chats_of_another_model_are_other_chats() -> None:
    placement = Placement(lambda: NAMES)
    names = {send(placement, chat("hello", model=model)) for model in "xyz"}
    assert names == set(NAMES)


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_texts_that_begin_alike_go_to_one_replica(field: str) -> None:
    placement = Placement(lambda: NAMES)
    names = {send(placement, {field: "long " * BLOCK + str(i)}) for i in range(9)}
    assert len(names) == 1


def test_a_session_stays_whatever_its_text() -> None:
    placement = Placement(lambda: NAMES)
    headers = {"x-session-id": "1"}
    assert len({send(placement, chat(str(i)), **headers) for i in range(6)}) == 1
    cached = {"prompt_cache_key": "k"}
    assert len({send(placement, chat(str(i), **cached)) for i in range(6)}) == 1


def test_one_hot_prompt_does_not_drown_a_replica() -> None:
    placement = Placement(lambda: NAMES)
    start = beginning(chat("the same"), {})
    for _ in range(60):
        name = placement.pick(start)
        placement.note(start, name)
        placement.begin(name)
        assert max(placement.loads.values()) <= min(placement.loads[n] for n in NAMES) + SLACK + 1


def test_replicas_that_are_gone_or_full_are_passed_over() -> None:
    live = list(NAMES)
    placement = Placement(lambda: tuple(live))
    name = send(placement, chat("hello"))
    start = beginning(chat("hello"), {})
    assert placement.pick(start, {name}) != name
    live.remove(name)
    assert placement.pick(start) in live
    assert placement.pick(start, set(live)) == ""


def test_loads_of_replicas_that_are_gone_leave_nothing() -> None:
    placement = Placement(lambda: NAMES)
    placement.begin("a")
    placement.end("a")
    assert not placement.loads


@pytest.mark.parametrize(
    "body", [{}, {"messages": 3}, {"messages": [1, None]}, {"prompt": [1, 2]}, {"model": {}}]
)
def test_a_body_that_is_wrong_has_a_beginning_too(body: dict[str, Any]) -> None:
    assert beginning(body, {}) == beginning(body, {})
