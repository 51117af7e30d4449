"""`nanollama completion SHELL`: completion of verbs, flags, their values and models in bash, zsh
and fish.

Seam       Command (the row "completion" of COMMANDS in nanollama.py). The scripts that it prints
           ask `nanollama completion --words ..` for the candidates, which come from the help of a
           verb (commands.help) and from the list of models.
Remove     delete this file and that row.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

import nanollama
from nanollama import COMMANDS, ModelStore, NanollamaError, UsageError, command_parser, put
from nanollama_extras.commands.help import VERBS, full_help

BASH = """\
_nanollama() {
    local IFS=$' \\t\\n' line=${COMP_LINE:0:COMP_POINT}
    local words=($line)
    [[ $line == *' ' ]] && words+=('')
    local last=${words[${#words[@]} - 1]}
    local before=${last%"${last##*[:=]}"}
    IFS=$'\\n'
    COMPREPLY=($(nanollama completion --words "${words[@]:1}" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o default -F _nanollama nanollama
"""
ZSH = """\
#compdef nanollama
_nanollama() {
    local -a found
    found=("${(@f)$(nanollama completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n $found ]]; then compadd -a found; else _files; fi
}
compdef _nanollama nanollama
"""
FISH = """\
function __nanollama
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l found (nanollama completion --words $words[2..-1] "$word" 2>/dev/null)
    if set -q found[1]
        printf '%s\\n' $found
    else
        __fish_complete_path "$word"
    end
end
complete -c nanollama -f -a '(__nanollama)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
HOW = {
    "bash": 'eval "$(nanollama completion bash)"  # in ~/.bashrc',
    "zsh": 'eval "$(nanollama completion zsh)"  # in ~/.zshrc, after compinit',
    "fish": "nanollama completion fish | source  # in ~/.config/fish/config.fish",
}
TAKE_MODEL = [verb for verb, (takes, _) in VERBS.items() if takes.strip("[").startswith("MODEL")]
MODEL_FLAGS = ("--model", "--tokenizer")
CLIENTS = "claude codex opencode qwen-code".split()


def help_of(words: list[str]) -> str:
    """The help of the verb that the words begin with, or of all modes."""
    if not words or words[0] not in COMMANDS:
        return full_help(nanollama.build_parser())
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        nanollama.run([words[0], "--help"])
    return out.getvalue()


def flags_of(text: str) -> dict[str, list[str]]:
    """Flag -> the values between which it chooses, read from a text of help."""
    found: dict[str, list[str]] = {}
    for line in re.findall(r"(?m)^  (-[^\n]*?)(?:  |$)", text):
        choices = re.search(r"\{(.+?)\}", line)
        for flag in re.findall(r"(?:^|, )(--?[A-Za-z][\w-]*)", line):
            found[flag] = choices[1].split(",") if choices else []
    return found


def models() -> list[str]:
    """The models on this machine."""
    return [model.id for model in ModelStore().models()]


def candidates(words: list[str]) -> Iterator[str]:
    """Everything that may stand in the place of the last word. Nothing: names of files may."""
    *before, word = words or [""]
    last = before[-1] if before else ""
    if not before:
        yield from COMMANDS
    if last in MODEL_FLAGS:
        yield from models()
    elif last.startswith("-") and (choices := flags_of(help_of(before)).get(last)):
        yield from choices
    elif word.startswith("-"):
        yield from (flag for flag in flags_of(help_of(before)) if flag.startswith("--"))
    elif before == ["completion"]:
        yield from SCRIPTS
    elif before == ["launch"]:
        yield from CLIENTS
    elif before and before[0] in TAKE_MODEL and (len(before) == 1 or before[0] == "serve"):
        yield from models()


def complete(argv: list[str]) -> int:
    """Print the candidates that begin with the last word, one on each line."""
    with contextlib.suppress(NanollamaError, OSError):
        found = dict.fromkeys(name for name in candidates(argv) if name.startswith(argv[-1]))
        put("".join(f"{name}\n" for name in found))
    return 0


def run(argv: list[str]) -> int:
    """The command."""
    if argv[:1] == ["--words"]:
        return complete(argv[1:] or [""])
    parser = command_parser("completion")
    parser.epilog = "".join(f"{line}\n" for line in HOW.values())
    parser.add_argument("shell", nargs="?", metavar="SHELL", help="bash, zsh or fish")
    shell = parser.parse_args(argv).shell
    if shell not in SCRIPTS:
        raise UsageError(f"give a shell: {', '.join(SCRIPTS)}")
    put(SCRIPTS[shell])
    return 0
