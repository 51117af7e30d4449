"""Items of the Responses API as messages of a chat.

Items that belong to one turn of the assistant share a message: a thought, a text, its calls.

Seam       api.responses calls `response_input` for the input of a body, and `add_item` for the
           items of an answer that a later response goes on from. Thoughts that a client keeps are
           read by api.sealed, names and arguments of calls are those of api.response_tools.
Remove     delete this file together with api/responses.py.
Spec       https://developers.openai.com/api/reference/resources/responses
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nanollama import check_type, excerpt, extra, joined_text, refuse
from nanollama_extras.api.response_tools import INPUT, chat_name
from nanollama_extras.api.sealed import unseal

if TYPE_CHECKING:
    from nanollama import Fields, Json

SUMMARY = "A summary of the conversation so far:\n"
# items of calls that no function of this API's clients makes -> the name of their function
CALL_NAMES = {
    "local_shell_call": "local_shell",
    "shell_call": "shell",
    "apply_patch_call": "apply_patch",
}
TEXTS = ("input_text", "output_text")  # types of parts
OUTPUTS = {
    "function_call_output",
    "custom_tool_call_output",
    *(f"{kind}_output" for kind in CALL_NAMES),
}


def response_input(value: Any, earlier_items: Fields) -> list[Json]:
    """`input` as messages of a chat. earlier_items: output items of earlier responses by id. Raises
    RequestError, which names the item."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages: list[Json] = []
    for i, item in enumerate(value):
        check_type(f"input[{i}]", item, "object")
        if item.get("type") == "item_reference":
            check_type(f"input[{i}].id", item.get("id"), "string")
            if item["id"] not in earlier_items:
                refuse(
                    f"input[{i}] refers to {excerpt(item.get('id'))}, which is not stored", "input"
                )
            item = earlier_items[item["id"]]
        add_item(messages, item, f"input[{i}]")
    return without_lone_thoughts(messages)


def without_lone_thoughts(messages: list[Json]) -> list[Json]:
    """The messages without thoughts that neither a text nor a call follows."""
    return [
        m for m in messages if m.keys() != {"role", "content", "reasoning_content"} or m["content"]
    ]


def add_item(messages: list[Json], item: Fields, where: str) -> None:
    """Add an item to the messages."""
    kind = "message" if item.get("type") is None else item["type"]
    check_type(f"{where}.type", kind, "string")
    if kind == "message":
        content, role = item_content(item, "content", where), item.get("role")
        last = messages[-1] if messages else {}
        if role == "assistant" and is_thought(last):
            last["content"] = content
        else:
            messages.append({"role": role, "content": content})
    elif kind == "reasoning":
        if thought := thought_text(item):
            messages.append({"role": "assistant", "content": None, "reasoning_content": thought})
    elif kind in OUTPUTS:
        check_type(f"{where}.call_id", item.get("call_id"), "string")
        text = output_text(item, where)
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
    elif kind in ("compaction", "compaction_summary"):
        if summary := unseal(item.get("encrypted_content")):
            messages.append({"role": "user", "content": SUMMARY + summary})
    elif kind in ("function_call", "custom_tool_call") or kind in CALL_NAMES:
        add_call(messages, item, where)
    elif kind != "additional_tools":  # read_tools takes these
        refuse(f"{where} is of type {excerpt(kind)}, which is not supported", where)


def is_thought(message: Fields) -> bool:
    """Whether a message has a thought, and no text yet."""
    is_open = message.get("content") is None and "tool_calls" not in message
    return is_open and "reasoning_content" in message


def thought_text(item: Fields) -> str:
    """The thought of a reasoning item; '' for one that only OpenAI's servers can read."""
    if (text := unseal(item.get("encrypted_content"))) is not None:
        return text
    for name in ("content", "summary"):
        parts = item.get(name)
        texts = (
            [p.get("text") for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
        )
        if text := "\n".join(t for t in texts if isinstance(t, str) and t):
            return text
    return ""


def add_call(messages: list[Json], item: Fields, where: str) -> None:
    """Add a call to the message of its turn."""
    kind = str(item.get("type"))
    check_type(f"{where}.call_id", item.get("call_id"), "string")
    name: Any = CALL_NAMES.get(kind, item.get("name"))
    check_type(f"{where}.name", name, "string")
    arguments: Any = item.get("arguments")
    if kind == "custom_tool_call":
        arguments = {INPUT: item.get("input") or ""}
    elif kind in CALL_NAMES:
        fields = item.get("operation" if kind == "apply_patch_call" else "action") or {}
        check_type(where, fields, "object")
        hidden = ("type", "env") if kind == "local_shell_call" else ()
        arguments = {k: v for k, v in fields.items() if v is not None and k not in hidden}
    function = {"name": chat_name(name, item.get("namespace")), "arguments": arguments}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def output_text(item: Fields, where: str) -> Any:
    """The content of a call's result: as text, in parts, or what a shell wrote."""
    value = item.get("output")
    if item.get("type") == "shell_call_output" and isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if item.get("type") == "apply_patch_call_output" and value is None:
        return str(item.get("status") or "completed")
    return item_content(item, "output", where)


def item_content(item: Fields, name: str, where: str) -> Any:
    """A field of an item as the content of a message: its text, or parts where it has images. The
    parts are those of a chat under other names. Raises RequestError."""
    content = item.get(name)
    if not isinstance(content, list):
        return joined_text(content, f"{where}.{name}")
    parts = [chat_part(part, f"{where}.{name}[{i}]") for i, part in enumerate(content)]
    text = joined_text(parts, f"{where}.{name}")
    return parts if any("image_url" in part for part in parts) else text


def chat_part(part: Any, where: str) -> Any:
    """A part of an item as a chat has it. Raises RequestError for an image without a URL."""
    if not isinstance(part, dict):
        return part  # `joined_text` refuses it
    kind = part.get("type")
    if kind == "input_image":
        if not isinstance(part.get("image_url"), str):
            refuse(f"{where} has no image_url; give the image as a data: URL", where)
        return extra("answers.images", "an image").image_part(part["image_url"], where)
    return {"type": "text", "text": part.get("text")} if kind in TEXTS else part
