"The commands that pages, examples and workflows name, read as `product-recs` would read them."

import re
import shlex
from functools import cache

import nbformat
import typer
from support import ROOT

from product_recs.jobs.cli import app

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"(?:^|[/\s(])product-recs (\S.*)")


@cache
def verbs():
    "The command, of which one asks for a verb's options."
    return typer.main.get_command(app)


@cache
def parameters():
    "Names of the parameters of all jobs."
    names = set()
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if "parameters" in cell.metadata.get("tags", []):
                names |= set(re.findall(r"^(\w+)\s*=", cell.source, re.M))
    return names


def words_of(text):
    "The words of a command, without what follows a pipe or a comment; None where there is none in a line of a shell."
    if not (match := COMMAND.search(text)):
        return None
    words = shlex.split(match.group(1), comments=True)
    return words[: next((k for k, word in enumerate(words) if word in ("|", "||", "&&", "&", ">")), None)]


def commands(text):
    "Each command of a page as words, and whether it is whole: what stands in a code span need not be."
    for language, fence in FENCE.findall(text):
        if language in ("sh", "console"):
            for line in re.sub(r"\\\n\s*", "", fence).splitlines():
                words = words_of(line.removeprefix("$ ")) if not line.startswith(" ") else None
                if words and not (line.startswith("docker") and words[0] not in verbs().commands):
                    yield words, True
    prose = FENCE.sub("", text)
    for line in re.findall(r"^    (product-recs .*)$", prose, re.M):
        yield words_of(line), True
    for span in re.findall(r"(?<!`)`product-recs ([^`]+)`", prose):
        yield words_of(f"product-recs {' '.join(span.split())}"), False


def wrong_with(words, whole=True):
    "What `product-recs` would say against a command, by its own options; empty where it would take it."
    command, words, name = verbs(), [*words], "product-recs"
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"{name} {words[0]}: no such verb"
        command, name, words = command.commands[words[0]], words[0], words[1:]
    rest = []
    while words:
        word = words.pop(0)
        if word in ("-p", "--parameter"):  # the command joins the pair before its options are read
            if words and words[0] not in parameters():
                return f"-p {words[0]}: no such parameter"
            words = words[2:]
        elif word == "--source" and name == "init":  # a shell writes a pattern out so
            while words and not words[0].startswith("-"):
                rest += [word, words.pop(0)]
        else:
            rest.append(word)
    if hasattr(command, "commands"):
        options = {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}
        return f"{name}: no option {min({*rest} - options)}" if {*rest} - options else ""
    if {"-h", "--help"} & {*rest}:
        return ""
    try:
        command.make_context(name, rest)
    except Exception as error:
        missing = type(error).__name__ in ("MissingParameter", "BadOptionUsage")
        if not hasattr(error, "show") or whole or not missing:
            return f"{name}: {getattr(error, 'message', '') or error}"
    return ""
