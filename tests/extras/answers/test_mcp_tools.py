"""--mcp: tools of MCP servers, in programs and over HTTP, asked for, run, and told to the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn
from command_line import share_kernels
from mcp_server import ENTRY as PLAIN
from scripted_program import DRIVER
from serving import url_in, wait_until

import nanollama
from nanollama import Delta, GenerationRequest, PackageError, UsageError
from nanollama_extras.answers import mcp_tools
from nanollama_extras.answers.mcp_tools import ServerEntry, distinct_names, read_servers
from nanollama_extras.answers.tools import TOOL_FORMATS

mcpserver: Any = pytest.importorskip("mcp.server.mcpserver")
pexpect: Any = pytest.importorskip("pexpect")

THINGS = """
import os
from mcp.server.mcpserver import Image, MCPServer
server = MCPServer("things")

@server.tool()
def weather(city: str, days: int = 1) -> str:
    "The weather somewhere.\\nIn detail."
    return f"sunny in {city} for {days}"

@server.tool()
def place(name: str) -> dict[str, int]:
    return {"population": 137}

@server.tool(structured_output=False)
def picture() -> list:
    return ["a cat", Image(data=b"12345", format="png"), "or a dog"]

@server.tool()
def fail() -> str:
    raise ValueError("no")

@server.tool()
def environment() -> str:
    return " ".join(sorted(os.environ))

@server.tool()
def long() -> str:
    return "x" * 100_000

server.run()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mcp")


def write(path: Path, **servers: Any) -> str:
    path.write_text(json.dumps({"mcpServers": servers}), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def far() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server over HTTP: its address, and the headers of each request."""
    server, headers = mcpserver.MCPServer("far"), list[dict[str, str]]()
    server.tool(name="add.two")(add)
    inner = server.streamable_http_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers.append({key.decode(): value.decode() for key, value in scope["headers"]})
        await inner(scope, receive, send)

    listener = nanollama.listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: running.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/mcp", headers
    running.should_exit = True
    thread.join()


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture(scope="module")
def file(folder: Path, far: Any) -> str:
    """A file with one server of each kind."""
    (folder / "things.py").write_text(THINGS, encoding="utf-8")
    things = {"command": sys.executable, "args": [str(folder / "things.py")], "env": {"OWN": "1"}}
    there = {"url": far[0], "headers": {"Authorization": "Bearer secret"}}
    return write(folder / "mcp.json", things=things, plain=PLAIN, far=there)


@pytest.fixture(scope="module")
def servers(file: str) -> Iterator[mcp_tools.Servers]:
    opened = mcp_tools.open_servers(file)
    yield opened
    opened.close()


@pytest.fixture
def call(servers: mcp_tools.Servers) -> Callable[..., str]:
    tools = servers.tools(taken=["place"])

    def run(tool: str, /, **arguments: Any) -> str:
        return servers.call(tools[tool], arguments)

    return run


# ---- servers and results -------------------------------------------------------------------------


def test_the_tools_of_all_servers_are_listed(servers: mcp_tools.Servers) -> None:
    tools = servers.tools(taken=["place"])
    assert list(tools) == [
        *("things__weather", "things__place", "picture", "fail", "environment", "long"),
        *("plain__weather", "pid", "crash", "never", "torn", "add_two"),
    ]
    shown = tools["things__weather"].definition("w")["function"]
    assert (shown["name"], shown["description"]) == ("w", "The weather somewhere.\nIn detail.")
    assert shown["parameters"]["properties"]["city"]["type"] == "string"
    assert shown["parameters"]["required"] == ["city"]


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("things__weather", {"city": "Bern", "days": 2}, "sunny in Bern for 2"),
        ("plain__weather", {"city": "Oslo"}, "snow in Oslo"),
        ("add_two", {"a": 2, "b": 3}, "5"),
        ("picture", {}, "a cat\n[image, image/png, 5 bytes: not shown]\nor a dog"),
        ("things__place", {"name": "Bern"}, '{\n  "population": 137\n}'),
        ("long", {}, "x" * 20_000 + "\n[80000 more characters are left out]"),
    ],
)
def test_a_result_is_text(
    call: Callable[..., str], name: str, arguments: dict[str, Any], result: str
) -> None:
    assert call(name, **arguments) == result


def test_a_result_of_values_alone_is_json() -> None:
    types: Any = pytest.importorskip("mcp_types")
    result = types.CallToolResult(content=[], structured_content={"a": "é"})
    assert mcp_tools.result_text(result) == '{"a": "é"}'
    assert mcp_tools.result_text(types.CallToolResult(content=[])) == "(no text)"
    link = types.ResourceLink(name="Notes", uri="file:///notes.txt")
    blob = types.BlobResourceContents(uri="file:///a", blob="MTIz", mime_type="a/b")
    text = types.TextResourceContents(uri="file:///b", text="hello")
    parts = [types.EmbeddedResource(resource=part) for part in (blob, text)]
    shown = mcp_tools.result_text(types.CallToolResult(content=[link, *parts]))
    assert shown == "[Notes: file:///notes.txt]\n[file:///a, a/b, 3 bytes: not shown]\nhello"


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("fail", {}, "Error executing tool fail"),
        ("things__weather", {"town": "Bern"}, "Field required"),
        ("add_two", {"a": "x", "b": 1}, "valid integer"),
        ("torn", {}, "list"),
    ],
)
def test_an_error_is_a_text(
    call: Callable[..., str], name: str, arguments: dict[str, Any], reason: str
) -> None:
    text = call(name, **arguments)
    assert text.startswith("Error: ")
    assert reason in text


def test_a_call_that_never_ends_is_given_up(
    call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_tools, "CALL_S", 0.2)
    assert call("never") == "Error: no result came in 0.2 s"
    monkeypatch.undo()
    assert call("plain__weather", city="Oslo") == "snow in Oslo"


def test_programs_get_a_small_environment_and_addresses_their_headers(
    call: Callable[..., str], far: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = call("environment").split()
    assert "OWN" in names
    assert not [name for name in names if name.startswith(("PYTEST", "PYTHONPATH"))]
    assert {headers["authorization"] for headers in far[1]} == {"Bearer secret"}


def test_a_server_that_crashes_costs_only_its_own_tools(tmp_path: Path) -> None:
    opened = mcp_tools.open_servers(write(tmp_path / "mcp.json", a=PLAIN, b=PLAIN))
    tools = opened.tools()
    pids = [int(opened.call(tools[f"{name}__pid"], {})) for name in "ab"]
    for name in ("a__crash", "a__weather"):
        text = opened.call(tools[name], {})
        assert text.startswith("Error: ")
        assert "closed" in text
    assert opened.call(tools["b__weather"], {"city": "Oslo"}) == "snow in Oslo"
    opened.close()
    for pid in pids:  # no process is left, nor a zombie
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert opened.call(tools["b__weather"], {}).startswith("Error: ")


def test_a_server_that_cannot_start_is_one_warning(
    tmp_path: Path, far: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mcp_tools, "START_S", 2.0)
    path = write(
        tmp_path / "mcp.json",
        missing={"command": "no-such-program"},
        ends={"command": sys.executable, "args": ["-c", "print('hello')"]},
        mute={**PLAIN, "args": [*PLAIN["args"], "mute"]},
        odd={**PLAIN, "args": [*PLAIN["args"], "odd"]},
        gone={"url": "http://127.0.0.1:9/mcp"},
        wrong={"url": f"{far[0]}/nothing"},
        old={"url": "http://127.0.0.1:9/sse", "type": "sse"},
        there=PLAIN,
    )
    opened = mcp_tools.open_servers(path)
    tools = opened.tools()
    assert list(tools) == ["weather", "pid", "crash", "never", "torn"]
    opened.close()
    told = [record.message for record in caplog.records if record.name == nanollama.log.name]
    lines = {line.split()[2]: line for line in told if "MCP server" in line}
    assert lines.keys() == {"missing", "ends", "mute", "odd", "gone", "wrong", "old"}
    assert "no-such-program: No such file" in lines["missing"]
    assert "--verbose shows what it prints" in lines["ends"]
    assert "no list of tools came in 2 s" in lines["mute"]
    assert "valid list" in lines["odd"]
    assert "connection" in lines["gone"]
    assert lines["wrong"].endswith("Not Found (HTTP status 404)")
    assert "its transport is 'sse'" in lines["old"]
    (left_out,) = [line for line in told if line not in lines.values()]
    assert left_out.startswith("MCP tool 'broad' is left out: its schema cannot be used: at /prop")


def test_a_signal_ends_the_servers_too(tmp_path: Path) -> None:
    """Even a program that goes on without its client."""
    plain = {**PLAIN, "args": [*PLAIN["args"], "stubborn"]}
    path = write(tmp_path / "mcp.json", plain=plain)
    code = (
        "import sys; from nanollama_extras.answers.mcp_tools import open_servers\n"
        "servers = open_servers(sys.argv[1])\n"
        "print(servers.call(servers.tools()['pid'], {}), flush=True); sys.stdin.read()"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(nanollama.__file__).parent)},
    )
    assert program.stdout
    pid = int(program.stdout.readline())
    program.send_signal(signal.SIGTERM)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_servers_end_with_a_server_that_lends_their_tools(tmp_path: Path) -> None:
    script = tmp_path / "script.yaml"
    script.write_text("Hi", encoding="utf-8")
    path = write(tmp_path / "mcp.json", plain=PLAIN)
    words = ["--serve", "--port", "0", "--script", str(script), "--mcp", path]
    program = subprocess.Popen(
        [sys.executable, "-m", "nanollama", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(nanollama.__file__).parent)},
    )
    assert program.stderr
    url = url_in(next(line for line in program.stderr if "http://" in line))
    answer = httpx.post(f"{url}/tools/call", json={"name": "pid"}, headers={"origin": url})
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 0, errors
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(answer.json()["content"]), 0)


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", 'needs {"mcpServers"'),
        ('{"mcpServers": []}', 'needs {"mcpServers"'),
        ('{"mcpServers": {}}', "no server that is not disabled"),
        ('{"mcpServers": {"a": {"command": "x", "disabled": true}}}', "no server that is not"),
        ('{"mcpServers": {"a": 1}}', "mcpServers.a is 1; an object is needed"),
        ('{"mcpServers": {"a": {}}}', 'mcpServers.a needs "command"'),
        ('{"mcpServers": {"a": {"url": "x"}}}', "a.url is 'x'; an address with http://"),
        ('{"mcpServers": {"a": {"command": ["x"]}}}', "a.command is ['x']; a string"),
        ('{"mcpServers": {"a": {"command": "x", "args": [1]}}}', "a.args is [1]; a list of"),
        ('{"mcpServers": {"a": {"command": "x", "args": "y"}}}', "a.args is 'y'; a list of"),
        ('{"mcpServers": {"a": {"command": "x", "env": {"b": 1}}}}', "a.env is {'b': 1}; an obj"),
        ('{"mcpServers": {"a": {"url": "x", "headers": []}}}', "a.headers is []; an object of"),
        ('{"mcpServers": {"a": {"command": "x", "disabled": 1}}}', "a.disabled is 1; true or"),
        ('{"mcpServers": {"a": {"url": "http://b", "type": "stdio"}}}', 'a needs "command"'),
        ('{"mcpServers": {"a": {"command": "${NONE_OF_IT}"}}}', "a.command: ${NONE_OF_IT} is"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    path = tmp_path / "mcp.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_servers(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "problem"), [(None, "mcp cannot be imported"), (ModuleType("mcp"), "needs mcp 2")]
)
def test_a_package_that_is_missing_or_old_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, problem: str
) -> None:
    path = write(tmp_path / "mcp.json", plain=PLAIN)
    monkeypatch.setitem(sys.modules, "mcp", module)
    with pytest.raises(PackageError, match=problem) as caught:
        mcp_tools.open_servers(path)
    assert str(caught.value).endswith('pip install ".[mcp]"')


def test_the_forms_of_other_clients_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOKEN", "abc")
    monkeypatch.delenv("NONE_OF_IT", raising=False)
    path = tmp_path / "mcp.json"
    body = {
        "a": {"command": "x", "args": ["${TOKEN}", "b"], "env": {"T": "${NONE_OF_IT:-d}"}},
        "b": {"type": "streamable-http", "url": "https://b/mcp", "headers": {"K": "${env:TOKEN}"}},
        "c": {"type": "stdio", "command": "y", "cwd": "/", "autoApprove": [], "timeout": 3},
        "d": {"disabled": True},
    }
    path.write_text(json.dumps({"servers": body}), encoding="utf-8-sig")
    assert read_servers(str(path)) == [
        ServerEntry("a", "x", ("abc", "b"), {"T": "d"}),
        ServerEntry("b", url="https://b/mcp", headers={"K": "abc"}),
        ServerEntry("c", "y", cwd="/"),
    ]
    assert caplog.messages == [f"{path}: servers.c: without effect here: autoApprove, timeout"]


@pytest.mark.parametrize(
    ("tools", "taken", "names"),
    [
        ([("a", "x"), ("b", "y")], [], ["x", "y"]),
        ([("a", "x"), ("b", "x"), ("b", "y")], [], ["a__x", "b__x", "y"]),
        ([("a", "x")], ["x"], ["a__x"]),
        ([("a", "x"), ("a", "x")], [], ["a__x", "a__x_2"]),
        ([("my server", "get.it"), ("b", "é")], ["_"], ["get_it", "b___"]),
        ([("a", "x" * 80), ("b", "x" * 80)], [], ["a__" + "x" * 61, "b__" + "x" * 61]),
        ([("a" * 70, "x"), ("a" * 70, "x")], [], ["a" * 64, "a" * 60 + "_2"]),
    ],
)
def test_names_are_distinct(
    tools: list[tuple[str, str]], taken: list[str], names: list[str]
) -> None:
    assert distinct_names(tools, taken) == names


# ---- modes ---------------------------------------------------------------------------------------


def spelled(name: str, **arguments: Any) -> str:
    return TOOL_FORMATS["hermes"].spell([(name, json.dumps(arguments))])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[GenerationRequest]]:
    """script(answer, ..): what the model says, turn by turn -> the requests it gets."""

    def install(*answers: str) -> list[GenerationRequest]:
        left, asked = list(answers), list[GenerationRequest]()

        def stream(self: nanollama.LLM, prepared: nanollama.Prepared) -> Iterator[Delta]:
            asked.append(prepared.request)
            yield Delta(0, left.pop(0), finish_reason="stop")

        monkeypatch.setattr(nanollama.LLM, "stream", stream)
        return asked

    return install


def test_a_prompt_has_the_tools_of_servers_and_of_a_file(
    tiny: Callable[..., Path],
    file: str,
    servers: mcp_tools.Servers,
    script: Callable[..., list[GenerationRequest]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def place() -> str:\n    return 'here'\n", encoding="utf-8")
    calls = [spelled("things__weather", city="Bern"), spelled("place"), spelled("fail")]
    asked = script(*calls, "It is sunny.")
    model = str(tiny(max_position_embeddings=4096))
    words = ["--model", model, "--chat", "--prompt", "Weather?", "--tools", str(own)]
    assert nanollama.main([*words, "--mcp", file, "--yes-tools"]) == 0
    out, err = capsys.readouterr()
    assert out == "It is sunny.\n"
    assert 'things__weather(city="Bern") on things -> ' in err
    names = [tool["function"]["name"] for tool in asked[0].tools or ()]
    assert names == ["place", *servers.tools(taken=["place"])]
    results = [m["content"] for m in asked[-1].messages or () if m["role"] == "tool"]
    assert results == ["sunny in Bern for 1", "here", "Error: Error executing tool fail"]


def test_no_call_is_run_where_the_user_cannot_be_asked(
    tiny: Callable[..., Path],
    file: str,
    servers: mcp_tools.Servers,
    script: Callable[..., list[GenerationRequest]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = script(spelled("plain__weather", city="Bern"), "Then not.")
    model = str(tiny(max_position_embeddings=4096))
    assert nanollama.main(["--model", model, "--chat", "--prompt", "Hm?", "--mcp", file]) == 0
    assert (asked[1].messages or [])[-1]["content"] == "The user did not allow this call."
    assert "was not run: no terminal to ask on" in capsys.readouterr().err


def test_a_wrong_command_line_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mcp.json"
    path.write_text("{}")
    for words in (["--chat", "--prompt", "x"], ["--interactive"], ["--serve"]):
        assert nanollama.main([*words, "--mcp", str(path)]) == 2
        line, _ = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}: needs ")
    assert nanollama.main(["--prompt", "x", "--mcp", str(path)]) == 2
    assert "--mcp needs" in capsys.readouterr().err


def test_in_a_conversation_each_call_is_asked_for(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Yes, then no, then one that Ctrl-C ends; and the server ends with the program."""
    answers = [spelled("pid"), "That.", spelled("weather", city="Oslo"), "No.", spelled("never")]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(answers=answers))
    path = write(tmp_path / "mcp.json", plain=PLAIN)
    words = [str(driver), "--model", str(tiny()), "--interactive", "--mcp", path]
    env = {**os.environ, "PYTHONPATH": str(Path(nanollama.__file__).parent)}
    env |= {"TERM": "dumb", "NANOLLAMA_CACHE": str(tmp_path)}
    share_kernels(tmp_path)
    child = pexpect.spawn(sys.executable, words, encoding="utf-8", timeout=120, env=env)
    try:
        child.expect(">>> ")
        child.sendline("/tools")
        child.expect_exact("weather")
        child.expect_exact("never")
        child.sendline("Which?")
        child.expect_exact("Run pid() on plain? [y/N] ")
        child.sendline("y")
        child.expect(r"pid\(\) on plain -> '(\d+)'")
        pid = int(child.match[1])
        child.expect_exact("That.")
        child.sendline("Weather?")
        child.expect_exact('Run weather(city="Oslo") on plain? [y/N] ')
        child.sendline("n")
        child.expect_exact("was not run")
        child.expect_exact("No.")
        child.sendline("More?")
        child.expect_exact("Run never() on plain? [y/N] ")
        child.sendline("y")
        child.expect("y")
        child.sendintr()
        child.expect_exact("(Ctrl-D or /quit leaves)")
        os.kill(pid, 0)
        child.sendline("/quit")
        child.expect(pexpect.EOF)
        assert "Traceback" not in child.before
    finally:
        child.close(force=True)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
