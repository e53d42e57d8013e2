"""A remedy can be followed: what a message names is a parameter, an option, a verb or a setting of this project."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import typer

from product_recs.core.settings import Settings
from product_recs.jobs.cli import app
from product_recs.jobs.pipeline import STEPS, TUNE_STEPS
from product_recs.models.all import KINDS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {
    step: next(path for path in (ROOT / f"nbs/{step}.ipynb", ROOT / f"nbs/jobs/{step}.ipynb") if path.exists())
    for step in dict.fromkeys((*STEPS, *TUNE_STEPS, "batch", "clean", "daily", "diff", "experiment", "gate", "monitor"))
}
# what looks like `name=value` and is none of ours: where it stands -> why
FOREIGN = {
    "index": "to_csv(index=False) of pandas",
    **dict.fromkeys(("auto_detect", "file_row_number", "filename", "header", "quote"), "an option of DuckDB, in SQL"),
    "realm": "a part of the header WWW-Authenticate",
    "error": "a part of the header WWW-Authenticate",
    "scope": "a part of the header WWW-Authenticate",
    "force-reinstall": "an option of pip",
    "task": "a part of a request; the route and the command refuse it by this name",
    "version": "an option of the command itself",
    "name": "a part of the header X-Recommendation-Experiment",
    **dict.fromkeys(("stdout", "no-index"), "an option of git"),
    **dict.fromkeys(("mode", "uri"), "a part of a URL of SQLite"),
    **dict.fromkeys(("baseline", "lift", "looks", "power", "variance"), "options of `experiment plan`"),
    "copy": "an option of init, as --copy and --no-copy",
    "no-copy": "an option of init, as --copy and --no-copy",
}
# follows "raise", "set" ... without being a name
WORDS = {"a", "an", "the", "it", "them", "its", "their", "your", "by", "of", "case", "one", "so", "some"}
# SQL, HTML and CSS are no messages
CODE = re.compile(r"\s*(SELECT|COPY|CREATE|WITH|INSERT|UPDATE|, file_row)|.*<([a-z]+|\{\})[ >]|.*\{[^}]*:[^}]*;", re.S)
WORDS |= {"center", "left", "right"}  # places of a legend


def cells(path):
    return json.loads(path.read_text())["cells"]


def job_parameters():
    parameters = set()
    for path in NOTEBOOKS.values():
        declared = next(cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", []))
        parameters |= {node.targets[0].id for node in ast.parse("".join(declared["source"])).body}
    return parameters


def verbs():
    "Verb -> its options."
    command = typer.main.get_command(app)
    options = {}
    for name, verb in command.commands.items():
        parts = [verb, *getattr(verb, "commands", {}).values()]
        options[name] = {
            option
            for part in parts
            for parameter in part.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        options[name] |= {"--help", "-h"}
    return options


def settings():
    own = {"PRODUCT_RECS_ROOT", "PRODUCT_RECS_KERNEL_LOCK"}  # read where there are no settings
    return {f"PRODUCT_RECS_{name.upper()}" for name in Settings.model_fields} | own


def texts(tree):
    "Every text of a module, with {} for what is filled in, and its line; docstrings are none."
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr):
            skipped.add(id(node.body[0].value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(value) for value in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(value.value if isinstance(value, ast.Constant) else "{}" for value in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def said():
    "Place -> text of every message of the package, and of what the jobs print and say in their Run parts."
    for path in sorted((ROOT / "product_recs").rglob("*.py")):
        if path.name == "_modidx.py":
            continue
        for line, text in texts(ast.parse(path.read_text())):
            if not CODE.match(text):
                yield f"{path.relative_to(ROOT)}:{line}", text
    for step, path in NOTEBOOKS.items():
        parts = cells(path)
        first = next(number for number, cell in enumerate(parts) if "parameters" in cell["metadata"].get("tags", []))
        for number, cell in enumerate(parts[first:], first):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                yield f"{step}, cell {number}", " ".join(re.findall(r"`[^`]*`", source))
            elif "parameters" not in cell["metadata"].get("tags", []):
                for line, text in texts(ast.parse(source)):
                    if not CODE.match(text):
                        yield f"{step}, cell {number}:{line}", text


def unknown(text, parameters, options, names):
    "What a text names that is not there."
    known, missing = set(parameters), []
    if "model_parameters" in text:  # then those of the models can be followed
        for kind in KINDS.values():
            known |= set(inspect.signature(kind.__init__).parameters)
    every = {option for of_verb in options.values() for option in of_verb}
    for name in re.findall(r"(?<![\w.{-])([a-z][a-z_]+)=(?!=)", text):
        if name not in known and name not in FOREIGN:
            missing.append(f"{name}=")
    for name in re.findall(r"\b(?:[Rr]aise|[Ll]ower|[Ss]et|[Pp]ass) `?([a-z][a-z_]*)(?![\w=])", text):
        if name not in known | WORDS:
            missing.append(name)
    for name in re.findall(r"(?<![\w-])-p '?([a-z][a-z_]*)", text):
        if name not in parameters:
            missing.append(f"-p {name}")
    for verb, rest in re.findall(r"product-recs ([a-z]+)([^\n`;]*)", text):
        if f"product-recs {verb}" in ("product-recs knows",):  # the name of the program in a sentence
            continue
        if verb not in options:
            missing.append(f"product-recs {verb}")
        else:
            wanted = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest)
            missing += [f"{verb} {option}" for option in wanted if option not in options[verb]]
    if "product-recs" not in text:
        wanted = re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
        missing += [option for option in wanted if option not in every and option[2:] not in FOREIGN]
    for setting in re.findall(r"PRODUCT_RECS_[A-Z_]*[A-Z]\b", text):
        if setting not in names:
            missing.append(setting)
    return missing


def test_every_remedy_names_what_is_there():
    parameters, options, names = job_parameters(), verbs(), settings()
    places = [(place, text, lost) for place, text in said() if (lost := unknown(text, parameters, options, names))]
    assert not places, "\n".join(f"{place}: {', '.join(lost)}: {text[:160]}" for place, text, lost in places)


@pytest.mark.parametrize(
    "text, lost",
    [
        ("raise max_size where there is memory", ["max_size"]),
        ("-p model EASE -p model_parameters '{max_size: 3}'; raise max_size", []),
        ("pass columns={...}, or raise it", []),
        ("lower learning_rate=0.1", ["learning_rate="]),
        ("-p factor 8", ["-p factor"]),
        ("see `product-recs fly`", ["product-recs fly"]),
        ("`product-recs serve --name x`", ["serve --name"]),
        ("choose another --port or --pear", ["--pear"]),
        ("set PRODUCT_RECS_INDEX=auto, or PRODUCT_RECS_COLOUR", ["PRODUCT_RECS_COLOUR"]),
    ],
)
def test_the_check_finds_what_is_not_there(text, lost):
    assert unknown(text, job_parameters(), verbs(), settings()) == lost


def test_commands_of_make_are_there():
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M)
    for place, text in said():
        for target in re.findall(r"`make ([a-z-]+)`", text):
            assert target in targets, f"{place}: make {target}"
