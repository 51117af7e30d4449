"""POST /v1/responses/compact: a long conversation as the user's messages and a summary of the rest,
which a client sends in its place from then on.

The model writes the summary. It goes out sealed, in an item that api.response_input reads.

Seam       api.responses calls `summary_request` and `compacted`. It imports api.response_input for
           the beginning of a summary, and api.sealed.
Remove     delete this file together with api/responses.py.
Spec       https://developers.openai.com/api/docs/guides/conversation-state
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from nanollama import message_text, read_fields, refuse, table
from nanollama_extras.api.response_input import SUMMARY
from nanollama_extras.api.sealed import seal

if TYPE_CHECKING:
    from nanollama import Fields, Json
    from nanollama_extras.api.responses import ResponseReply

COMPACT_FIELDS = table(
    string_or_array="input", string="model instructions previous_response_id", object="reasoning"
)
MOST_TOKENS = 2048  # of a summary
PROMPT = (
    "Summarize this conversation for an assistant that will continue it and sees the user's "
    "messages, but nothing else. Name the goals, the decisions, the facts and files that were "
    "found, the results of tools, the open problems and the next step. Write the summary alone."
)


def summary_request(body: Fields, strict: bool) -> tuple[Json, tuple[str, ...]]:
    """The body of /v1/responses that asks for the summary, and the fields without effect. Raises
    RequestError."""
    given, ignored = read_fields(body, COMPACT_FIELDS, strict)
    items = given.get("input", [])
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not items and "previous_response_id" not in given:
        refuse("input is missing or empty", "input", "missing_required_parameter")
    question = {"role": "user", "content": PROMPT}
    return {**given, "input": [*items, question], "max_output_tokens": MOST_TOKENS}, ignored


def compacted(reply: ResponseReply) -> Json:
    """The finished answer with the summary as the answer to the client."""
    messages = (reply.wire.requests[0].messages or [])[:-1]  # without PROMPT
    head = {"type": "message", "status": "completed", "role": "user"}
    items: list[Json] = [
        {"id": new_id("msg"), **head, "content": item_parts(message["content"])}
        for message in messages
        # an earlier summary is replaced by this one
        if message["role"] == "user" and not message_text(message).startswith(SUMMARY)
    ]
    summary = seal(reply.text["content"] or reply.text["thought"])
    items.append({"id": new_id("cmp"), "type": "compaction", "encrypted_content": summary})
    names = ("id", "created_at", "usage")
    own = {name: reply.body[name] for name in names}
    return {**own, "object": "response.compaction", "output": items}


def item_parts(content: Any) -> list[Json]:
    """The content of a user's message as parts of an item."""
    text = [{"type": "text", "text": content}]
    parts: list[Json] = text if isinstance(content, str) else content
    return [
        {"type": "input_text", "text": part["text"]}
        if "text" in part
        else {"type": "input_image", "image_url": part["image_url"]["url"]}
        for part in parts
    ]


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
