"""Bodies of Anthropic's Messages API as bodies of OpenAI's chat.

    system, messages ─> messages    tools, tool_choice ─> tools, tool_choice    the rest by name

Two requests of one conversation must begin with the same prompt, or the prefix cache is of no use.
So a block about billing is left out, the marks of `cache_control` change nothing, and a tool that
is loaded later is described where the conversation refers to it, not in the list at the beginning.

Seam       api.anthropic calls `chat_body`. Sealed thoughts are read by api.sealed.
Remove     delete this file together with api/anthropic.py.
Spec       https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from nanollama import SAMPLING_FIELDS, RequestError, check_type, excerpt, extra, log, refuse, table
from nanollama_extras.api.sealed import unseal

if TYPE_CHECKING:
    from nanollama import Fields, Json

# The fields that have an effect, those of nanollama's own API included
COUNT_FIELDS = table(
    string="model",
    array="messages tools",
    string_or_array="system",
    object="thinking output_config output_format tool_choice thread",
)
OWN_FIELDS = {
    name: kind
    for name, kind in SAMPLING_FIELDS.items()
    if name not in ("stop", "logit_bias", "max_tokens", "thinking_budget")
}
FIELDS = table(
    COUNT_FIELDS, OWN_FIELDS, integer="max_tokens", array="stop_sequences", boolean="stream"
)
# Anthropic's fields that are accepted without effect
WITHOUT_EFFECT = table(
    object="metadata context_management",
    string="service_tier inference_geo speed container",
    array="safeguards mcp_servers",
)
BILLING = "x-anthropic-billing-header:"  # begins a text that differs in each conversation
# Tools whose schema a client need not send: type without its date -> properties, required ones
FILE_TOOL: Json = {
    "path": {"type": "string"},
    "view_range": {"type": "array", "items": {"type": "integer"}},
    "file_text": {"type": "string"},
    "old_str": {"type": "string"},
    "new_str": {"type": "string"},
    "insert_line": {"type": "integer"},
    "insert_text": {"type": "string"},
}
COMMANDS = ["view", "create", "str_replace", "insert"]
MEMORY: Json = {
    "command": {"type": "string", "enum": [*COMMANDS, "delete", "rename"]},
    **FILE_TOOL,
    "old_path": {"type": "string"},
    "new_path": {"type": "string"},
}
CLIENT_TOOLS: dict[str, tuple[str, Json, list[str]]] = {
    "bash": (
        "Run a command in a shell that keeps its state; restart starts the shell anew.",
        {"command": {"type": "string"}, "restart": {"type": "boolean"}},
        [],
    ),
    "text_editor": (
        "View, create and edit files.",
        {"command": {"type": "string", "enum": COMMANDS}, **FILE_TOOL},
        ["command", "path"],
    ),
    "memory": ("View, create and edit files of notes.", MEMORY, ["command"]),
}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Place in a chat -> its place in a body of this API, for errors
PLACES = (
    (r"^tools\[(\d+)\]\.function\.parameters", r"tools.\1.input_schema"),
    (r"^tools\[(\d+)\]\.function", r"tools.\1"),
    (r"^stop\b", "stop_sequences"),
    (r"^response_format(\.json_schema)?", "output_config.format.schema"),
    (r"^reasoning_effort", "output_config.effort"),
    (r"^thinking_budget", "thinking.budget_tokens"),
)


def invalid(place: str, problem: str) -> NoReturn:
    """Raise RequestError as Anthropic words it: the place, a colon, the problem."""
    refuse(f"{place}: {problem}", place)


@dataclass(frozen=True, slots=True)
class ToolList:
    """The tools of a body. offered: those that an answer may call, as a chat has them; a tool with
    `defer_loading` is not described at the beginning. places: the index of each in the body.
    hosted: the types of tools that only Anthropic can run."""

    offered: list[Json] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)
    hosted: list[str] = dataclasses.field(default_factory=list)

    def described(self, name: str) -> str:
        """The description of a tool for the place that refers to it."""
        functions = (tool["function"] for tool in self.offered if tool.get("defer_loading"))
        found = next((function for function in functions if function["name"] == name), None)
        if found is None:
            return f"The tool {name} can be called."
        text = json.dumps(found, ensure_ascii=False)
        return f"From now on, this tool can be called:\n{text}"


def read_tools(given: Fields, tools: ToolList) -> None:
    """Fill the list with the tools of a body. Raises RequestError."""
    named = references(given.get("messages"))
    for i, tool in enumerate(given.get("tools", [])):
        check_type(f"tools.{i}", tool, "object")
        kind = tool.get("type") or "custom"
        check_type(f"tools.{i}.type", kind, "string")
        function = client_function(tool, kind)
        if function is None:
            tools.hosted.append(kind)
        elif not tool.get("defer_loading") or tool.get("name") in named:
            late = {"defer_loading": True} if tool.get("defer_loading") else {}
            tools.offered.append({"type": "function", "function": function, **late})
            tools.places.append(i)


def client_function(tool: Json, kind: str) -> Json | None:
    """The function that a tool is for the model; None for one that Anthropic's servers run."""
    if kind == "custom":
        fields = {"name": "name", "description": "description", "input_schema": "parameters"}
        function = {to: tool[name] for name, to in fields.items() if tool.get(name) is not None}
        return {**function, "strict": True} if tool.get("strict") else function
    found = CLIENT_TOOLS.get(re.sub(r"_\d{8}$", "", kind))
    if found is None:
        return None
    description, properties, needed = found
    schema = {"type": "object", "properties": properties, "required": needed}
    return {"name": tool.get("name"), "description": description, "parameters": schema}


def references(messages: Any) -> set[str]:
    """The names of the tools that results refer to."""
    contents = [m.get("content") for m in messages or () if isinstance(m, dict)]
    blocks = [b for content in contents if isinstance(content, list) for b in content]
    inner = [b.get("content") for b in blocks if isinstance(b, dict)]
    parts = [part for content in inner if isinstance(content, list) for part in content]
    names = [
        part.get("tool_name")
        for part in parts
        if isinstance(part, dict) and part.get("type") == "tool_reference"
    ]
    return {name for name in names if isinstance(name, str)}


def chat_body(given: Fields, tools: ToolList) -> Json:
    """The fields of a body as those of /v1/chat/completions. Raises RequestError."""
    shared = ("model", "stream", "max_tokens", *OWN_FIELDS)
    body: Json = {name: given[name] for name in shared if name in given}
    body["messages"] = [*read_system(given.get("system")), *read_messages(given, tools)]
    if "stop_sequences" in given:
        body["stop"] = given["stop_sequences"]
    if tools.offered:
        body["tools"] = tools.offered
    if "tool_choice" in given:
        body |= read_choice(given["tool_choice"], tools)
    body |= read_thinking(given)
    last = body["messages"][-1]
    if last["role"] == "assistant" and not last.get("tool_calls"):
        body["continue_final_message"] = True
    return body


def read_thinking(given: Fields) -> Json:
    """The fields of a chat about thoughts and the form of the answer."""
    thinking, output = given.get("thinking", {}), given.get("output_config", {})
    body: Json = {}
    kind = thinking.get("type")
    if thinking and kind not in ("enabled", "disabled", "adaptive", "between_tools"):
        invalid("thinking.type", "Input should be 'enabled', 'disabled' or 'adaptive'")
    if effort := output.get("effort"):
        check_type("output_config.effort", effort, "string")
        if kind != "disabled":
            body["reasoning_effort"] = effort
    if kind == "enabled" and "budget_tokens" in thinking:
        check_type("thinking.budget_tokens", thinking["budget_tokens"], "integer")
        body["thinking_budget"] = thinking["budget_tokens"]
    if kind in ("enabled", "disabled"):
        body["chat_template_kwargs"] = {"enable_thinking": kind == "enabled"}
    form = output.get("format") or given.get("output_format")
    if form is not None:
        if not isinstance(form, dict) or form.get("type") != "json_schema":
            place = "output_config.format" if output.get("format") else "output_format"
            invalid(place, "an object of type 'json_schema' is needed")
        schema = {"name": "answer", "schema": form.get("schema"), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def read_choice(choice: Fields, tools: ToolList) -> Json:
    """`tool_choice` as a chat has it."""
    kind = choice.get("type")
    body: Json = {}
    if kind == "tool":
        check_type("tool_choice.name", name := choice.get("name"), "string")
        body["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif isinstance(kind, str) and kind in TOOL_CHOICES:
        if tools.offered or kind == "any":
            body["tool_choice"] = TOOL_CHOICES[kind]
    else:
        invalid("tool_choice.type", "Input should be 'auto', 'any', 'tool' or 'none'")
    if choice.get("disable_parallel_tool_use"):
        body["parallel_tool_calls"] = False
    return body


# ---- messages ------------------------------------------------------------------------------------


def read_system(system: Any) -> list[Json]:
    """The system message of `system`, without a text about billing."""
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system or []
    texts = [block_text(block, f"system.{i}") for i, block in enumerate(blocks)]
    if texts and texts[0].startswith(BILLING):
        first, _, rest = texts[0].partition("\n")
        log.info(f"left out of the prompt: {excerpt(first)}")
        texts[0] = rest.lstrip("\n")
    text = join_texts(texts)
    return [{"role": "system", "content": text}] if text else []


def join_texts(texts: list[str]) -> str:
    """Texts of several blocks, each on a line of its own."""
    return "\n".join(text for text in texts if text)


def block_text(block: Any, place: str) -> str:
    """The text of a block of type text. Raises RequestError for any other."""
    check_type(place, block, "object")
    if block.get("type") != "text":
        invalid(place, f"{excerpt(block.get('type'))} blocks are not supported here, only text")
    check_type(f"{place}.text", text := block.get("text"), "string")
    return str(text)


def read_messages(given: Fields, tools: ToolList) -> list[Json]:
    """`messages` as those of a chat. Raises RequestError, which names the place."""
    if not given.get("messages"):
        invalid("messages", "at least one message is required")
    messages: list[Json] = []
    for i, message in enumerate(given["messages"]):
        place = f"messages.{i}"
        check_type(place, message, "object")
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        check_type(f"{place}.content", blocks, "array")
        role = message.get("role")
        if role == "assistant":
            messages.append(read_answer(blocks, f"{place}.content"))
        elif role in ("user", "system"):
            messages += read_question(role, blocks, f"{place}.content", tools)
        else:
            invalid(f"{place}.role", "Input should be 'user' or 'assistant'")
    return messages


def read_answer(blocks: list[Any], place: str) -> Json:
    """A message of the assistant: text, thoughts and calls."""
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for i, block in enumerate(blocks):
        at = f"{place}.{i}"
        check_type(at, block, "object")
        kind = block.get("type")
        if kind == "thinking":
            thought = block.get("thinking") or unseal(block.get("signature")) or ""
            check_type(f"{at}.thinking", thought, "string")
            thoughts.append(thought)
        elif kind == "tool_use":
            for name in ("id", "name"):
                check_type(f"{at}.{name}", block.get(name), "string")
            function = {"name": block["name"], "arguments": block.get("input") or {}}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind != "redacted_thinking":  # nobody here can read these
            texts.append(block_text(block, at))
    message: Json = {"role": "assistant", "content": "".join(texts)}
    if thought := "\n".join(filter(None, thoughts)):
        message["reasoning_content"] = thought
    return {**message, "tool_calls": calls} if calls else message


def read_question(role: str, blocks: list[Any], place: str, tools: ToolList) -> list[Json]:
    """The messages of a user's or system message: a result of a call is one of its own."""
    messages, parts = list[dict[str, Any]](), list[Any]()

    def end_text() -> None:
        if parts or not messages:
            messages.append({"role": role, "content": joined_parts(parts)})
            parts.clear()

    for i, block in enumerate(blocks):
        at = f"{place}.{i}"
        check_type(at, block, "object")
        if role == "user" and block.get("type") == "tool_result":
            if parts:
                end_text()
            check_type(f"{at}.tool_use_id", block.get("tool_use_id"), "string")
            content = result_content(block, at, tools)
            result = {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}
            messages.append(result)
        else:
            parts.append(block_part(block, at, role == "user"))
    end_text()
    return messages


def result_content(block: Json, place: str, tools: ToolList) -> Any:
    """The content of a tool_result. The text of an error says so."""
    content = block.get("content") or ""
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    check_type(f"{place}.content", given, "array")
    parts: list[Any] = []
    for i, part in enumerate(given):
        if isinstance(part, dict) and part.get("type") == "tool_reference":
            parts.append(tools.described(str(part.get("tool_name"))))
        else:
            parts.append(block_part(part, f"{place}.content.{i}"))
    text = join_texts([part for part in parts if isinstance(part, str)])
    says_so = re.match(r"\W*(tool_use_)?error\b", text, re.IGNORECASE)
    if says_so or not block.get("is_error"):
        return joined_parts(parts)
    return joined_parts(["Error: ", *parts]) if has_images(parts) else f"Error: {text}"


def has_images(parts: list[Any]) -> bool:
    return not all(isinstance(part, str) for part in parts)


def joined_parts(parts: list[Any]) -> Any:
    """Texts and images of several blocks as the content of a message: a text where no image is."""
    if not has_images(parts):
        return join_texts(parts)
    content: list[Any] = []
    for is_text, run in itertools.groupby(parts, lambda part: isinstance(part, str)):
        found = list(run)
        text = join_texts(found) if is_text else ""
        content += [{"type": "text", "text": text}] * bool(text) if is_text else found
    return content


def block_part(block: Any, place: str, may_show: bool = True) -> Any:
    """The text of a block, or its image as a part of a message. Raises RequestError."""
    check_type(place, block, "object")
    if block.get("type") != "image" or not may_show:
        return block_text(block, place)
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else source
    if kind not in ("base64", "url"):
        invalid(f"{place}.source", "an object of type 'base64' or 'url' is needed")
    images = extra("answers.images", "an image")
    if kind == "base64":
        return images.base64_part(source.get("data"), f"{place}.source.data")
    check_type(f"{place}.source.url", source.get("url"), "string")
    return images.image_part(source["url"], f"{place}.source.url")


def in_own_words(error: RequestError, tools: ToolList) -> RequestError:
    """An error about a field of the chat, as one about the field of this API."""
    place = error.param or ""
    if match := re.match(r"tools\[(\d+)\]", place):
        index = tools.places[int(match[1])] if int(match[1]) < len(tools.places) else match[1]
        place = f"tools[{index}]{place[match.end() :]}"
    for pattern, own in PLACES:
        place = re.sub(pattern, own, place)
    error.args = (str(error).replace(error.param or "\0", place),)
    error.param = place or None
    return error
