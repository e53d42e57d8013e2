"""The shape of the package beyond what .importlinter says: its floors, its private names, its notebooks."""

import ast
import json
from functools import cache

import grimp
import pytest
from support import ROOT

PACKAGE = ROOT / "product_recs"
GENERATED = ("__init__.py", "_modidx.py")
MODULES = [path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts and path.name not in GENERATED]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_no_circle_and_few_floors():
    graph = grimp.build_graph("product_recs", cache_dir=None)
    modules = {name_of(path) for path in MODULES}
    on_the_way = []

    @cache
    def floor(module):
        assert module not in on_the_way, f"a circle: {' -> '.join([*on_the_way, module])}"
        on_the_way.append(module)
        below = [floor(other) for other in graph.find_modules_directly_imported_by(module) if other in modules]
        on_the_way.pop()
        return 1 + max(below, default=0)

    floors = {module: floor(module) for module in modules}
    assert len(floors) > 70 and floors["product_recs.core.errors"] == 1
    highest = max(floors.values())
    assert highest <= 10, sorted(module for module in floors if floors[module] == highest)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_private_names_stay_at_home(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("product_recs")):
            private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"]
            assert not private, f"line {node.lineno} imports {', '.join(private)} of {node.module}"


def test_each_module_has_the_notebook_of_its_name():
    story = {path.stem[3:]: path for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert len(story) == 6
    for path in MODULES:
        inside = path.relative_to(PACKAGE).with_suffix(".ipynb")
        assert (ROOT / "nbs" / inside).exists() or inside.stem in story, path
    notebooks = {path.relative_to(ROOT / "nbs").with_suffix("") for path in (ROOT / "nbs").glob("*/*.ipynb")}
    assert notebooks == {path.relative_to(PACKAGE).with_suffix("") for path in MODULES if path.parent != PACKAGE}


def test_a_class_has_a_name_of_its_own():
    "Two classes of one name are two meanings of one word, and the reference cannot tell which one a signature means."
    homes = {}
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name_of(path))
    assert len(homes) > 100 and not {name: modules for name, modules in homes.items() if len(modules) > 1}


EMPTY_NAMES = {"who", "told", "had", "there", "kept", "found", "at", "one"}
WRITTEN = [path for folder in ("tests", "tools", "benchmarks") for path in (ROOT / folder).glob("*.py")]


def cells_of(path):
    "The code of a notebook, cell by cell, without lines for the shell; of another file the whole."
    if path.suffix == ".py":
        return [path.read_text(encoding="utf-8")]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [source for source in code if not source.lstrip().startswith(("!", "%"))]


@pytest.mark.parametrize(
    "path", [*(ROOT / "nbs").rglob("*.ipynb"), *WRITTEN], ids=lambda path: str(path.relative_to(ROOT))
)
def test_local_names_say_what_they_hold(path):
    for source in cells_of(path):
        for node in ast.walk(ast.parse(source)):
            stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            name = node.id if stored else node.arg if isinstance(node, ast.arg) else None
            assert name not in EMPTY_NAMES, (
                f"{name!r} does not say what it holds: {source.splitlines()[node.lineno - 1]}"
            )
