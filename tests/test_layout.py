"""The shape of the sources: size, contents, banners, section order, imports, hints, lengths."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import nanollama

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "nanollama.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
RULE = "# " + "=" * 98
MAX_LINES, MAX_BYTES = 7_220, 345_098  # of nanollama.py: lower them freely, never raise them
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, FUNCTION)]
FIELDS = ["In", "Out", "In, out", "Idea", "Invariant", "Extend", "Spec", "Paper", "Papers"]


@dataclass(frozen=True)
class Section:
    """A banner and the lines from it to the next one (line numbers count from 1)."""

    number: int
    name: str
    title: str
    banner: list[str]
    start: int
    end: int

    @property
    def heading(self) -> str:
        return f"{self.number} {self.name}: {self.title}"

    @property
    def fields(self) -> list[str]:
        found = (re.match(r"#   (\w[\w, ]*?)  +\S", line) for line in self.banner)
        return [match[1] for match in found if match]


@dataclass(frozen=True)
class Extra:
    """A module of nanollama_extras; `name` is what the core's `extra` takes, as in "api.ollama"."""

    name: str
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    def imported_modules(self) -> set[str]:
        """Dotted names of everything that the module imports, at any depth."""
        imported: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        return imported


def read_extras() -> list[Extra]:
    folder = ROOT / "nanollama_extras"
    return [
        Extra(".".join(path.relative_to(folder).with_suffix("").parts), path.read_text("utf-8"))
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__init__.py"
    ]


EXTRAS = read_extras()
every_extra = pytest.mark.parametrize("module", EXTRAS, ids=lambda module: module.name)


def read_sections() -> list[Section]:
    heads = [i for i, line in enumerate(LINES) if re.match(r"# \d+ [A-Z]+: ", line)]
    sections = []
    for head, following in zip(heads, [*heads[1:], len(LINES) + 1]):
        match = re.fullmatch(r"# (\d+) ([A-Z]+): (.+)", LINES[head])
        assert match, LINES[head]
        close = LINES.index(RULE, head)
        assert LINES[head - 1] == RULE, f"no rule above {LINES[head]}"
        sections.append(
            Section(
                number=int(match[1]),
                name=match[2],
                title=match[3],
                banner=LINES[head + 1 : close],
                start=head,
                end=following - 1,
            )
        )
    return sections


SECTIONS = read_sections()


def section_of(line: int) -> Section | None:
    """The section that holds a line; None for the head of the file."""
    return next((s for s in reversed(SECTIONS) if s.start <= line), None)


def statements() -> Iterator[tuple[Section | None, ast.stmt, symtable.SymbolTable]]:
    """Each top-level statement with its section and its symbols."""
    for node in TREE.body:
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)])
        text = "\n".join(LINES[first - 1 : node.end_lineno])
        yield section_of(first), node, symtable.symtable(text, "nanollama.py", "exec")


def names_used(table: symtable.SymbolTable) -> set[str]:
    """Names that a statement reads from the module's namespace, annotations included."""
    top = table.get_type() == "module"
    used = {
        s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())
    }
    return used.union(*map(names_used, table.get_children()))


def names_bound(table: symtable.SymbolTable) -> set[str]:
    symbols = table.get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}


def test_the_core_only_shrinks() -> None:
    """The aim is 7,500 lines and 350,000 bytes; a new capability is a module of extras."""
    lines, size = len(LINES), len(SOURCE.encode())
    assert lines <= MAX_LINES, f"nanollama.py has {lines} lines; {MAX_LINES} are allowed"
    assert size <= MAX_BYTES, f"nanollama.py has {size} bytes; {MAX_BYTES} are allowed"


def test_the_core_imports_no_extra_while_it_is_imported() -> None:
    hints = [
        n for n in TREE.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    ]
    unread = {child for node in hints for part in node.body for child in ast.walk(part)}
    statements = [n for n in ast.walk(TREE) if isinstance(n, (ast.Import, ast.ImportFrom))]
    imports = [ast.unparse(n) for n in statements if n not in unread]
    assert not [line for line in imports if "nanollama_extras" in line]
    code = "import nanollama, sys; print([n for n in sys.modules if n.startswith('nanollama_')])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


@every_extra
def test_an_extra_says_its_seam_and_how_to_remove_it(module: Extra) -> None:
    assert re.search(r"\bSeam\b", module.docstring), "name the seam that the module uses"
    assert re.search(r"\b[Rr]emove\b", module.docstring), "say how to remove the module"
    assert len(module.source.splitlines()) <= 800


@every_extra
def test_an_extra_imports_another_only_when_its_docstring_says_so(module: Extra) -> None:
    others = [other.name for other in EXTRAS if other.name != module.name]
    for name in module.imported_modules():
        path = name.removeprefix("nanollama_extras.")
        if path == name:
            continue
        imported = [other for other in others if f"{path}.".startswith(f"{other}.")]
        assert imported, f"{name} is not a module of nanollama_extras"
        assert any(other in module.docstring for other in imported), f"{name} is not in it"


@every_extra
def test_an_extra_imports_libraries_themselves(module: Extra) -> None:
    """And not the core's lazy stand-ins for them, which replace themselves in the core only."""
    lazy = {
        target.id
        for node in ast.walk(TREE)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("LazyModule(")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert {"torch", "np"} <= lazy
    from_core = {n for n in module.imported_modules() if n.startswith("nanollama.")}
    used = {ast.unparse(n) for n in ast.walk(module.tree) if isinstance(n, ast.Attribute)}
    assert not (from_core | used) & {f"nanollama.{name}" for name in lazy}


def test_the_table_of_contents_equals_the_banners() -> None:
    contents = re.findall(r"^    (\d+ [A-Z]+: .+)$", nanollama.__doc__ or "", re.MULTILINE)
    assert contents == [section.heading for section in SECTIONS]
    numbers = [section.number for section in SECTIONS]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.name)
def test_a_banner_has_the_agreed_fields(section: Section) -> None:
    fields = section.fields
    assert set(fields) <= set(FIELDS), fields
    assert fields == sorted(fields, key=FIELDS.index), "fields in the agreed order"
    assert {"Idea", "Invariant", "Extend"} <= set(fields)
    assert section.name == "GROUND" or fields[:2] == ["In", "Out"] or fields[0] == "In, out"
    if section.name not in ("GROUND", "CLI"):
        assert "https://" in "\n".join(LINES[section.start : section.end]), "a link to the source"


def test_a_section_uses_only_itself_and_the_sections_above_it() -> None:
    bound: dict[str, int] = {}
    used: list[tuple[str, int, int]] = []
    for section, node, table in statements():
        number = section.number if section else 0
        bound |= {name: max(number, bound.get(name, 0)) for name in names_bound(table)}
        used += [(name, number, node.lineno) for name in names_used(table)]
    known = set(bound) | set(dir(__builtins__)) | set(dir(__import__("builtins")))
    assert not {name for name, _, _ in used} - known - {"__file__", "__name__", "__doc__"}
    forward = [
        f"line {line}, section {number}: {name} of section {bound[name]}"
        for name, number, line in used
        if bound.get(name, 0) > number
    ]
    assert not forward, "\n".join(forward)


# What a section may use, by name; a module that is not listed is free.
TENSOR_SECTIONS = {"QUANT", "KERNELS", "MODEL", "FORMATS", "SAMPLING", "ENGINE", "CLI"}
ALLOWED = {
    **dict.fromkeys(("torch", "F", "Tensor"), TENSOR_SECTIONS),
    "np": {"FORMATS", "KERNELS", "MODEL", "SAMPLING"},
    "gguf": {"FORMATS"},
    "safetensors": {"FORMATS", "MODEL", "CLI"},
    "huggingface_hub": {"STORE"},
    "zipfile": {"FORMATS", "STORE"},
    "subprocess": {"STORE", "KERNELS"},
    "tokenizers": {"TOKENIZER"},
    "jinja2": {"CHAT"},
    "tqdm": {"CLI"},
    "argparse": {"CLI"},
    "print": {"CLI"},
    "input": {"CLI"},
    "asyncio": {"SERVER"},
    "starlette": {"SERVER"},
    "uvicorn": {"SERVER", "CLI"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_a_module_is_used_only_where_it_belongs(name: str) -> None:
    places = {
        section.name
        for section, node, table in statements()
        if section and name in names_used(table) and name not in names_bound(table)
    }
    assert places <= ALLOWED[name]


def test_only_the_command_line_touches_stdin_and_stdout() -> None:
    places = {
        (section.name, node.lineno)
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stdin")
        if (section := section_of(node.lineno)) and section.name != "CLI"
    }
    assert not places


def test_functions_import_nothing_but_what_some_machines_lack() -> None:
    inside = {
        alias.name
        for function in FUNCTIONS
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert inside <= {"readline", "resource"}


@pytest.mark.parametrize("name", nanollama.__all__)
def test_a_public_name_exists_and_is_documented(name: str) -> None:
    assert hasattr(nanollama, name)
    home = nanollama.PUBLIC_EXTRAS.get(name)
    body = next(e.tree for e in EXTRAS if e.name == home).body if home else TREE.body
    nodes = [n for n in body if getattr(n, "name", None) == name]
    assert nodes, f"{name} is not defined in {home or 'nanollama.py'}"
    assert ast.get_docstring(nodes[0])
    undocumented = [
        part.name
        for part in ast.iter_child_nodes(nodes[0])
        if isinstance(part, ast.FunctionDef)
        and not part.name.startswith("_")
        and not part.decorator_list  # a property's name and type say what it is
        and not ast.get_docstring(part)
    ]
    assert not undocumented


def test_public_names_are_listed_in_order_and_the_errors_are_drawn() -> None:
    assert nanollama.__all__ == sorted(nanollama.__all__, key=lambda n: (not n.isupper(), n))
    drawn = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    ground = [n for n in TREE.body if section_of(n.lineno) == SECTIONS[0]]
    for name in (n.name for n in ground if isinstance(n, ast.ClassDef) and "Error" in n.name):
        status = getattr(nanollama, name).status
        assert re.search(rf"\b{name} +{status}\b", drawn), f"{name} {status} is not in the tree"


CORE = Extra("nanollama", SOURCE)
every_module = pytest.mark.parametrize("module", [CORE, *EXTRAS], ids=lambda module: module.name)


@every_module
def test_every_function_has_type_hints(module: Extra) -> None:
    missing = []
    for f in (node for node in ast.walk(module.tree) if isinstance(node, FUNCTION)):
        a = f.args
        args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        bare = [x.arg for x in args if x.annotation is None and x.arg not in ("self", "cls")]
        if bare or f.returns is None:
            missing.append(f"line {f.lineno}: {f.name} {bare}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("modules", [[CORE], EXTRAS], ids=["core", "extras"])
def test_functions_are_short(modules: list[Extra]) -> None:
    nodes = [(module.name, node) for module in modules for node in ast.walk(module.tree)]
    lengths = {
        f"{name}.{node.name}:{node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for name, node in nodes
        if isinstance(node, FUNCTION)
    }
    long = {name: n for name, n in lengths.items() if n > 40}
    assert statistics.mean(lengths.values() or [0]) < 15
    assert len(long) <= 0.03 * len(lengths), long
    assert max(lengths.values(), default=0) <= 100, long
    classes = [node for _, node in nodes if isinstance(node, ast.ClassDef)]
    assert max(((n.end_lineno or 0) - n.lineno for n in classes), default=0) < 300


@every_module
def test_lines_are_short_and_nothing_is_left_to_do(module: Extra) -> None:
    lines = module.source.splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", module.source)


def test_letters_in_shape_comments_are_in_the_glossary() -> None:
    glossary = (nanollama.__doc__ or "").partition("Letters in shape comments")[2]
    known = set(re.findall(r"(?:^    |  )([A-Z]|Hkv) (?=\w)", glossary, re.MULTILINE))
    assert {"N", "B", "S", "C", "H", "Hkv", "D", "F", "V", "L", "G"} <= known
    unknown = {}
    for number, line in enumerate(LINES, 1):
        for shape in re.findall(r"\(((?:[\w/*+ ]+, ?)+[\w/*+ ]*)\)", line.partition("#")[2]):
            letters = set(re.findall(r"\b([A-Z]|Hkv)\b", shape)) - known
            if letters:
                unknown[number] = letters
    assert not unknown


def test_the_inline_metadata_equals_the_project_file() -> None:
    """`uv run nanollama.py` and `pip install .` install the same things."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", SOURCE)
    assert block
    script = tomllib.loads("".join(line[2:] + "\n" for line in block[1].splitlines()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert script["dependencies"] == project["dependencies"]
    assert script["requires-python"] == project["requires-python"]
