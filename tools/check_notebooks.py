"""Fail on the notebook mistakes that no other check sees; each message names the notebook and the cell.

Use: python tools/check_notebooks.py [NOTEBOOK ...]     (default: all in nbs/)
"""

import ast
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
MAX_LINES = 60  # of a code cell: the shape of a page, not a taste; most cells have fewer than 25
MAX_RUN = 3  # code cells in a row without prose
KERNEL = {"name": "python3", "display_name": "python3", "language": "python"}
JOBS = {"01_ingest", "02_features", "03_train", "04_evaluate", "05_inference", "jobs/weights", "jobs/tune",
        "jobs/batch", "jobs/diff", "jobs/experiment", "jobs/gate", "jobs/monitor", "jobs/daily", "jobs/clean"}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def directives(text: str) -> set[str]:
    return {
        word for line in text.splitlines() if line.startswith("#|") for word in line[2:].replace(":", " ").split()[:1]
    }


def parse(text: str) -> ast.Module:
    "The cell as Python; magics and shell lines are left out."
    return ast.parse("\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in text.splitlines()))


def is_import(node: ast.stmt) -> bool:
    "An import, or one that is guarded by try or with."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return True
    return isinstance(node, (ast.Try, ast.With)) and any(is_import(child) for child in node.body)


def only_holds_data(node: ast.stmt) -> bool:
    "A dataclass, a model of fields or an exception: there is no body that could be wrong."
    if not isinstance(node, ast.ClassDef):
        return False
    marks = {
        child.id
        for base in (*node.decorator_list, *node.bases)
        for child in ast.walk(base)
        if isinstance(child, ast.Name)
    }
    return (
        bool(marks & {"dataclass", "BaseModel", "NamedTuple"}) or any(mark.endswith("Error") for mark in marks)
    ) and not any(isinstance(child, ast.FunctionDef) and not child.decorator_list for child in node.body)


def unescaped(tree: ast.Module) -> list[str]:
    "Ways to show data that take its characters for markup."
    faults = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "style"
            and not (isinstance(node.value, ast.Name) and node.value.id in ("plt", "matplotlib"))
        ):
            faults.append("`.style` shows a table without escaping it; use shown_table of core/text")
        called = node.func if isinstance(node, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if name in ("HTML", "display_html", "SVG", "display_svg", "Javascript"):
            faults.append(f"`{name}(...)` shows markup; use shown_table of core/text for data")
        if name == "to_html" and any(keyword.arg == "escape" for keyword in node.keywords):
            faults.append("`to_html(escape=...)`; data stays escaped")
    return faults


def public_names(tree: ast.Module) -> dict[str, ast.stmt]:
    return {
        node.name: node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }


def check(path: Path) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells, complaints = notebook["cells"], []
    book = path.resolve().relative_to(root / "nbs").with_suffix("").as_posix()

    def complain(number: int, text: str) -> None:
        complaints.append(f"{book}, cell {number + 1}: {text}")

    if notebook["metadata"].get("kernelspec") != KERNEL:
        complain(-1, f"kernelspec must be {KERNEL}")
    exports_to = [line[1] for cell in cells if (line := re.match(r"#\|\s*default_exp\s+(\S+)", source(cell)))]
    if book != "index" and exports_to != [module := re.sub(r"^\d\d_", "", book).replace("/", ".")]:
        complain(-1, f"a notebook has the name of its module: `#| default_exp {module}`, not {exports_to}")
    first = source(cells[0])
    if cells[0]["cell_type"] != "markdown" or not first.startswith("# ") or "\n> " not in first:
        complain(0, "the first cell must be a title and a one-line `>` promise")

    in_a_row, code, prose, exported, checked, tagged, run_at = 0, 0, 0, {}, set(), [], None
    for number, cell in enumerate(cells):
        text = source(cell)
        if cell["cell_type"] == "markdown":
            in_a_row, prose = 0, prose + len(text.split())
            if re.match(r"#+ Run\b", text):
                run_at = number
            continue
        if cell["cell_type"] != "code" or not text.strip() or directives(text) & {"default_exp", "hide"}:
            continue
        in_a_row += 1
        if in_a_row > MAX_RUN:
            complain(number, f"more than {MAX_RUN} code cells in a row; say why first")
        if len(text.splitlines()) > MAX_LINES:
            complain(number, f"{len(text.splitlines())} lines; split it (at most {MAX_LINES})")
        if "parameters" in cell["metadata"].get("tags", []):
            tagged.append(number)
        if re.search(r"\bnbdev_export\s*\(", text):
            complain(number, "nbdev_export() in a notebook: a job would rewrite the package")
        try:
            tree = parse(text)
        except SyntaxError as error:
            complain(number, f"not Python: {error}")
            continue
        for problem in unescaped(tree):
            complain(number, problem)
        is_exported = "export" in directives(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(name.name == "*" for name in node.names):
                complain(number, "`import *`; name what you use")
        imports = [is_import(node) for node in tree.body]
        if (
            is_exported
            and any(imports)
            and any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body)
            and imports[0]
            and not isinstance(tree.body[0], ast.With)
        ):
            complain(number, "imports and definitions in one exported cell; nbdev wants them apart")
        if is_exported:
            code += len(text.splitlines())
            for name, node in public_names(tree).items():
                if not only_holds_data(node):
                    exported[name] = number
                if ast.get_docstring(node) is None:
                    complain(number, f"{name} has no docstring")
        elif not directives(text) & {"eval", "notest", "slow"} and any(
            isinstance(node, (ast.Assert, ast.Raise)) for node in ast.walk(tree)
        ):
            # a name counts as checked where it takes part in a cell that asserts something
            checked |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
                node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            }

    # a helper of the notebook's own that is called in an asserting cell checks what it calls
    helpers = {}
    for cell in cells:
        if cell["cell_type"] == "code" and "export" not in directives(source(cell)):
            try:
                for node in ast.walk(parse(source(cell))):
                    if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.Assign)):
                        names = (
                            [node.name]
                            if isinstance(node, ast.FunctionDef)
                            else [
                                target.id
                                for target in getattr(node, "targets", [])
                                for target in ast.walk(target)
                                if isinstance(target, ast.Name)
                            ]
                        )
                        for name in names:
                            helpers.setdefault(name, set()).update(
                                {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
                            )
            except SyntaxError:
                continue
    while more := {name for helper in checked & set(helpers) for name in helpers[helper]} - checked:
        checked |= more
    for name, number in exported.items():
        if name not in checked:
            complain(number, f"{name} is exported, and no evaluated cell with an assertion uses it")

    if book in JOBS:
        if len(tagged) != 1:
            complain(-1, f"{len(tagged)} cells tagged `parameters`; papermill needs exactly one")
        elif run_at is None or tagged[0] < run_at:
            complain(tagged[0], "the parameters must come after the heading `## Run`")
        else:
            for node in parse(source(cells[tagged[0]])).body:
                try:
                    ast.literal_eval(node.value)
                except (ValueError, AttributeError):
                    complain(
                        tagged[0], "parameters must be literal assignments: papermill reads them without running them"
                    )
    elif tagged:
        complain(tagged[0], "a `parameters` cell in a notebook that is no job")
    if path.stem != "index" and prose < 1.5 * code:
        complain(-1, f"{prose} words of prose for {code} exported lines; explain more (3 words for 2 lines at least)")
    return complaints


paths = [Path(name) for name in sys.argv[1:]] or sorted((root / "nbs").rglob("*.ipynb"))
problems = [problem for path in paths for problem in check(path)]
print(*problems, sep="\n")
if problems:
    sys.exit(f"problems: {len(problems)}, in {len(paths)} notebooks")
print(f"{len(paths)} notebooks keep the rules.")
