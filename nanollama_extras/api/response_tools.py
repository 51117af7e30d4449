"""Tools of the Responses API as functions of a chat, and calls of these as the API's items.

    {type: custom, name, format}      a function with one text; its format is a pattern of that text
    {type: namespace, name, tools}    the functions inside, as NAMESPACE.NAME
    local_shell, shell, apply_patch   functions, whose schemas OpenAI has given them
    web_search, mcp, ..               left out: OpenAI's servers run these

Seam       api.responses calls `read_tools` for a body and `CallItem` for each call in an answer.
           A grammar becomes a pattern in answers.lark_regex; where it cannot, answers.lark_json
           is asked for.
Remove     delete this file together with api/responses.py.
Spec       https://developers.openai.com/api/reference/resources/responses
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanollama import RequestError, check_type, excerpt, extra, log, refuse
from nanollama_extras.answers.lark_regex import LOOKAROUND, NotRegularError, as_regex

if TYPE_CHECKING:
    from nanollama import Fields, Json

MOST_NAME_CHARS = 64  # of a function
SLASH = r"\x2f"  # in an expression of a grammar, which ends at /
INPUT = "input"  # the only argument of a function that stands for a custom tool
TEXT: Json = {"type": "string"}
COUNT: Json = {"type": "integer", "minimum": 0}
LIST: Json = {"type": "array", "items": TEXT}


def object_schema(required: str, **properties: Json) -> Json:
    """The schema of an object; `required` names properties, with spaces between them."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


# Tools that have a schema of OpenAI's -> their description and arguments
KNOWN_TOOLS: dict[str, tuple[str, Json]] = {
    "local_shell": (
        "Run a command, given as a list of words, on the user's machine.",
        object_schema("command", command=LIST, working_directory=TEXT, timeout_ms=COUNT),
    ),
    "shell": (
        "Run shell commands on the user's machine.",
        object_schema("commands", commands=LIST, timeout_ms=COUNT, max_output_length=COUNT),
    ),
    "apply_patch": (
        "Create, update or delete a file. A diff has a line for each line of the file: + and the "
        "new text, - and the old text, or a space and the text that stays.",
        object_schema(
            "type path",
            type={"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
            path=TEXT,
            diff=TEXT,
        ),
    ),
}
# Tools that only OpenAI's servers, or a search of the client's, can run
HOSTED = frozenset(
    "web_search web_search_preview file_search code_interpreter computer computer_use_preview mcp "
    "image_generation tool_search programmatic_tool_calling".split()
)
CALLS = {  # type of a tool -> of an item that calls it
    "function": "function_call",
    "custom": "custom_tool_call",
    "local_shell": "local_shell_call",
    "shell": "shell_call",
    "apply_patch": "apply_patch_call",
}
ITEM_PREFIXES = {
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "local_shell_call": "lsh",
    "shell_call": "sh",
    "apply_patch_call": "apc",
}


def chat_name(name: str, namespace: Any = None) -> str:
    """The name of a function for the model, with its namespace; a long one gets a short end."""
    whole = f"{namespace}.{name}" if namespace else name
    if len(whole) <= MOST_NAME_CHARS:
        return whole
    digest = hashlib.sha256(whole.encode("utf-8", errors="replace")).hexdigest()[:8]
    return f"{whole[: MOST_NAME_CHARS - 9]}_{digest}"


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that an answer may call. kind: its type."""

    kind: str
    name: str
    namespace: str | None = None


@dataclass(slots=True)
class ToolSet:
    """The tools of a body. functions: as a chat has them. places: the place of each in the body.
    tools: each by the name of its function. ignored: what had no effect."""

    functions: list[Json] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    tools: dict[str, Tool] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def add(self, tool: Any, place: str, strict: bool, namespace: str | None = None) -> None:
        """Add a tool of a body. strict: refuse one that cannot be run here. Raises RequestError."""
        check_type(place, tool, "object")
        check_type(f"{place}.type", kind := tool.get("type"), "string")
        if kind == "namespace" and namespace is None:
            check_type(f"{place}.name", name := tool.get("name"), "string")
            check_type(f"{place}.tools", inner := tool.get("tools"), "array")
            for i, one in enumerate(inner):
                self.add(one, f"{place}.tools[{i}]", strict, name)
        elif kind in ("function", "custom"):
            check_type(f"{place}.name", tool.get("name"), "string")
            made = self.custom(tool, place, strict) if kind == "custom" else own_function(tool)
            self.offer(Tool(kind, tool["name"], namespace), made, place)
        elif kind in KNOWN_TOOLS:
            description, schema = KNOWN_TOOLS[kind]
            made = {"description": description, "parameters": schema}
            self.offer(Tool(kind, kind, namespace), made, place)
        elif kind in HOSTED and not strict:
            self.ignored.append(f"tools.{kind}")
        else:
            known = "function, custom, namespace, local_shell, shell and apply_patch are supported"
            refuse(f"{place} is of type {excerpt(kind)}; {known}", place)

    def offer(self, tool: Tool, made: Json, place: str) -> None:
        name = chat_name(tool.name, tool.namespace)
        self.tools[name] = tool
        self.functions.append({"type": "function", "function": {**made, "name": name}})
        self.places.append(place)

    def custom(self, tool: Json, place: str, strict: bool) -> Json:
        """The function that a custom tool is for the model. Raises RequestError for its format if
        strict."""
        text = dict(TEXT)
        form = tool.get("format") or {"type": "text"}
        check_type(f"{place}.format", form, "object")
        if form.get("type") == "grammar":
            check_type(f"{place}.format.definition", source := form.get("definition"), "string")
            try:
                text |= keywords(str(source), form.get("syntax") == "regex")
            except NotRegularError as error:
                message = f"{place}.format cannot be enforced: {error}"
                if strict:
                    refuse(message, f"{place}.format")
                log.warning(message)
                self.ignored.append(f"{place}.format")
        schema = object_schema(INPUT, **{INPUT: text})
        return {"description": tool.get("description") or "", "parameters": schema}

    def choice(self, value: Any) -> Any:
        """`tool_choice` as a chat has it. Raises RequestError for a tool that is not offered."""
        if not isinstance(value, dict):
            return value
        check_type("tool_choice.type", kind := value.get("type"), "string")
        if kind == "allowed_tools":
            listed = value.get("tools", [])
            check_type("tool_choice.tools", listed, "array")
            chosen = [self.choice(one) for one in listed]
            return {"type": kind, kind: {"mode": value.get("mode"), "tools": chosen}}
        if kind not in CALLS:
            refuse(f"tool_choice is {excerpt(value)}, which is not supported", "tool_choice")
        name = value.get("name") if kind in ("function", "custom") else kind
        check_type("tool_choice.name", name, "string")
        function = {"name": chat_name(str(name), value.get("namespace"))}
        return {"type": "function", "function": function}


def keywords(source: str, is_regex: bool) -> Json:
    """The keywords of a schema for the texts of a grammar, or of an expression. Raises
    NotRegularError."""
    if is_regex and not LOOKAROUND.search(source):
        return {"pattern": f"^(?:{source})$"}
    grammar = f"start: /{source.replace('/', SLASH)}/" if is_regex else source
    try:
        return {"pattern": f"^(?:{as_regex(grammar)})$"}
    except NotRegularError:
        lark = extra("answers.lark_json", "a grammar that no expression stands for")
        return dict(lark.keyword(grammar))


def own_function(tool: Json) -> Json:
    """The fields of a function, without those of the list that it stands in."""
    names = ("description", "parameters", "strict")
    return {name: tool[name] for name in names if tool.get(name) is not None}


def read_tools(given: Fields, strict: bool) -> ToolSet:
    """The tools of a body, and those that its input brings (`additional_tools`). Raises
    RequestError."""
    found = ToolSet()
    for i, tool in enumerate(given.get("tools", [])):
        found.add(tool, f"tools[{i}]", strict)
    items = given.get("input")
    for i, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict) and item.get("type") == "additional_tools":
            check_type(f"input[{i}].tools", item.get("tools"), "array")
            for j, tool in enumerate(item["tools"]):
                found.add(tool, f"input[{i}].tools[{j}]", strict)
    return found


def in_own_words(error: RequestError, tools: ToolSet) -> RequestError:
    """An error about a function of the chat, as one about its place in the body."""
    place = error.param or ""
    match = re.match(r"tools\[(\d+)\](\.function)?", place)
    if match and int(match[1]) < len(tools.places):
        own = tools.places[int(match[1])] + place[match.end() :]
        error.args, error.param = (str(error).replace(place, own),), own
    return error


class TextArgument:
    """Reads the text of a custom tool from the arguments of its call, as they come."""

    BEGIN = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
    # characters and whole escapes; both halves of a pair come together
    CERTAIN = re.compile(
        r'(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
        r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4})*"
    )

    def __init__(self) -> None:
        self.held, self.is_begun = "", False

    def read(self, arguments: str) -> str:
        """The next part of the arguments -> the text that it adds."""
        self.held += arguments
        if not self.is_begun:
            match = self.BEGIN.match(self.held)
            if match is None:
                return ""
            self.is_begun, self.held = True, self.held[match.end() :]
        match = self.CERTAIN.match(self.held)
        assert match is not None
        self.held = self.held[match.end() :]
        return str(json.loads(f'"{match[0]}"', strict=False))


class CallItem:
    """The item of a call, while its arguments come."""

    def __init__(self, tool: Tool, call_id: str) -> None:
        self.tool, self.arguments, self.text = tool, "", TextArgument()
        kind = CALLS[tool.kind]
        head = {"id": f"{ITEM_PREFIXES[kind]}_{secrets.token_hex(12)}", "type": kind}
        self.item: Json = {**head, "status": "in_progress", "call_id": call_id}
        if tool.kind in ("function", "custom"):
            name = {"namespace": tool.namespace} if tool.namespace else {}
            field_name = "arguments" if tool.kind == "function" else INPUT
            self.item |= {**name, "name": tool.name, field_name: ""}
        else:
            self.fill({})

    def push(self, arguments: str) -> tuple[str, str] | None:
        """Add a part of the arguments -> the kind of event that it makes, with its text."""
        self.arguments += arguments
        if self.tool.kind == "function":
            self.item["arguments"] += arguments
            return "function_call_arguments.delta", arguments
        if self.tool.kind == "custom" and (text := self.text.read(arguments)):
            self.item[INPUT] += text
            return "custom_tool_call_input.delta", text
        return None

    def end(self) -> tuple[str, Json] | None:
        """Complete the item -> the kind of event that says so, with its fields."""
        if self.tool.kind == "function":
            fields = {name: self.item[name] for name in ("name", "arguments")}
            return "function_call_arguments.done", fields
        if self.tool.kind == "custom":
            return "custom_tool_call_input.done", {INPUT: self.item[INPUT]}
        tools = extra("answers.tools", "a tool call")
        self.fill(tools.arguments_object(self.arguments))
        return None

    def fill(self, arguments: Json) -> None:
        """Write the arguments into the item of a tool whose schema OpenAI has given."""
        if self.tool.kind == "apply_patch":
            self.item["operation"] = {"type": "update_file", "path": "", "diff": "", **arguments}
        elif self.tool.kind == "local_shell":
            self.item["action"] = {"type": "exec", "command": [], "env": {}, **arguments}
        else:
            limits = {"timeout_ms": None, "max_output_length": None}
            self.item["action"] = {"commands": [], **limits, **arguments}
