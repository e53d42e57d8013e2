"The documentation: what its pages say exists, the reference is whole, and links lead somewhere."

import json
import posixpath
import re
import shlex
import sys
from collections import Counter

import nbformat
import pytest
from commands import commands, parameters, verbs, wrong_with
from support import ROOT

from product_recs.api import create_app
from product_recs.core.settings import Settings
from product_recs.jobs.pipeline import STEPS, step_notebook

sys.path.insert(0, str(ROOT / "tools"))

import check_links  # noqa: E402
import docs_api  # noqa: E402
import docs_reference  # noqa: E402
import make_docs  # noqa: E402

WORKSPACE = ROOT / "product_recs/jobs/workspace/README.md"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", WORKSPACE,
                *(page for folder in ("docs", "examples") for page in (ROOT / folder).rglob("*.md"))])  # fmt: skip
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@PAGE
def test_commands_of_a_page_exist(page):
    for words, whole in commands(page.read_text()):
        assert not (wrong := wrong_with(words, whole)), f"{page.name}: product-recs {shlex.join(words)}: {wrong}"


def test_commands_of_the_notebooks_exist():
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for words, whole in commands(cell.source) if cell.cell_type == "markdown" else ():
                assert not wrong_with(words, whole), f"{path.name}: product-recs {shlex.join(words)}"


def test_a_command_that_nobody_could_type_is_noticed():
    page = """`product-recs dayly` and `product-recs publish`; `product-recs run -p factor 3`

    product-recs daily --criteria gate.yaml

```sh
product-recs recommend 1 -n five   # a comment
docker run shop product-recs batch --file
product-recs publish
docker build -t product-recs .
```
"""
    assert [wrong_with(*command).split(":")[0] for command in commands(page)] == [
        "recommend", "batch", "publish", "daily", "product-recs dayly", "", "-p factor"]  # fmt: skip
    assert all(not wrong_with(words, whole) for words, whole in commands("`product-recs init a --source b.csv c.csv`"))


@PAGE
def test_settings_and_routes_of_a_page_exist(page, tmp_path):
    text = page.read_text()
    settings = {f"PRODUCT_RECS_{name.upper()}" for name in Settings.model_fields}
    settings |= {"PRODUCT_RECS_ROOT", "PRODUCT_RECS_SERVE"}  # where the project is, and what tests ask
    assert set(re.findall(r"PRODUCT_RECS_[A-Z_]+[A-Z]", text)) <= settings
    served = create_app(Settings(auth="off", database_url="", models_dir=tmp_path)).openapi()["paths"]
    for method, path in re.findall(r"`(GET|POST|PUT|DELETE) (/[^\s`?]*)", text):
        fits = [known for known in served if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", known), path)]
        assert any(method.lower() in served[known] for known in fits), f"{page.name}: {method} {path}"


def test_all_links_lead_somewhere_and_a_dead_one_is_found(tmp_path, monkeypatch):
    problems, pages = check_links.check_sources()
    assert not problems and pages > 100
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "# A Page\n\n[here](#a-page) [gone](gone.md) [no place](#b) [made](reference/http.md) [out](../../x)\n"
    )
    monkeypatch.setattr(check_links, "ROOT", tmp_path)
    assert [problem.split(": ", 1)[1] for problem in check_links.check_sources()[0]] == [
        "gone.md: there is no such file",
        "#b: there is no heading #b",
        "../../x: leads out of the project",
    ]
    (tmp_path / "README.md").write_text("[made](docs/reference/http.md)\n")
    assert any("is written when the site is built" in problem for problem in check_links.check_sources()[0])


def test_the_built_site_is_searched_for_dead_links_and_foreign_scripts(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#x">b</a><a href="#top">a</a>')
    (tmp_path / "b.html").write_text('<script src="https://cdn.example/x.js"></script><a href="c.html">c</a>')
    assert check_links.check_site(tmp_path)[0] == [
        "a.html: b.html#x: there is no such place",
        "b.html: https://cdn.example/x.js: is fetched from elsewhere",
        "b.html: c.html: there is no such file",
    ]


def test_the_reference_is_whole(tmp_path):
    pages = docs_reference.reference_pages()
    assert list(pages) == list(check_links.GENERATED)
    assert all(f"`PRODUCT_RECS_{name.upper()}`" in pages["settings"] for name in Settings.model_fields)
    assert all(f"| `{name}` |" in pages["parameters"] for name in parameters())
    served = create_app(Settings(auth="off", database_url="", models_dir=tmp_path)).openapi()
    for path, methods in served["paths"].items():
        assert all(f"### {method.upper()} {path}\n" in pages["http"] for method in methods)
    assert all(f"### {name}\n" in pages["http"] for name in served["components"]["schemas"])
    names = verbs().commands
    assert all(f"## product-recs {name}\n" in pages["command"] for name in names) and "batch" in names
    shown = set(re.findall(r"product_recs_\w+", pages["prometheus"]))
    asked = set(re.findall(r"product_recs_\w+", (ROOT / "ops" / "alerts.yml").read_text()))
    assert {re.sub("_bucket$", "", name) for name in asked} <= shown
    assert "`ndcg@k`" in pages["metrics"] and "`gini`" in pages["metrics"]


BREW = """def brew(
    leaves:int, # grams
    water:float=1.0, # litres
)->float: # minutes
    "Make tea."
    return 1.0
"""
POT = """class Pot:
    "Holds tea."
    size:int # cups
    def pour(self,
        cups:int, # how many
    )->int: # left
        "Pour."
        return 0
    def _spill(self): pass
"""


def test_docments_become_the_reference_of_a_module():
    text = docs_api.api_of("shop.tea", [BREW, POT, "def _hidden(): pass"])
    assert "{py:module} shop.tea" in text
    assert "{py:function} brew(leaves: int, water: float=1.0) -> float\n\nMake tea.\n\n" in text
    assert "- `leaves`: grams\n- `water`: litres\n- *returns* minutes" in text
    assert "{py:class} Pot\n\nHolds tea.\n\n- `size: int`: cups" in text
    assert "{py:method} pour(cups: int) -> int\n\nPour.\n\n- `cups`: how many\n- *returns* left" in text
    assert "_spill" not in text and "_hidden" not in text


def test_every_notebook_is_a_page_without_hidden_cells_or_directives(tmp_path):
    sources = make_docs.assemble(tmp_path)
    notebooks = {path.relative_to(ROOT) for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_c" not in str(path)}
    pages = {path.relative_to(tmp_path) for path in sources.written if path.suffix == ".ipynb"}
    assert pages == {path for path in notebooks if path.name != "index.ipynb" or len(path.parts) > 2}
    for page in pages:
        before = json.loads((ROOT / page).read_text())["cells"]
        after = json.loads((tmp_path / page).read_text())["cells"]
        assert not any("#|" in line[:2] for cell in after if cell["cell_type"] == "code" for line in cell["source"])
        code = [(cell, "".join(cell["source"])) for cell in before if cell["cell_type"] == "code"]
        shown = [cell for cell, text in code if text.strip() and not text.startswith(("#| hide", "#| default_exp"))]
        assert [cell["outputs"] for cell in shown] == [cell["outputs"] for cell in after if cell["cell_type"] == "code"]
    house, guides = (tmp_path / "nbs/index.md").read_text(), (tmp_path / "docs/how-to/index.md").read_text()
    assert all(step_notebook(ROOT / "nbs", step).name in house for step in STEPS)
    for room in {path.parent for path in notebooks if path.parent.name != "nbs"}:
        overview = (tmp_path / room / "overview.md").read_text()
        assert all(f"({path.name})" in overview for path in notebooks if path.parent == room)
    assert all(f"({path.name})" in guides for path in (ROOT / "docs" / "how-to").glob("*.md"))


def test_every_page_stands_in_one_table_of_contents(tmp_path):
    "Sphinx ends the build at a page that no table of contents names."
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in make_docs.assemble(tmp_path).written
             if path.suffix in (".md", ".ipynb")}  # fmt: skip
    named = Counter()
    for path in tmp_path.rglob("*.md"):
        folder = path.parent.relative_to(tmp_path).as_posix()
        for block in re.findall(r"^```\{toctree\}\n((?::[^\n]*\n)*)(.*?)^```$", path.read_text(), re.M | re.S):
            entries = [re.sub(r"^.* <(.+)>$", r"\1", line) for line in block[1].splitlines() if line]
            named.update(posixpath.normpath(posixpath.join(folder, entry)) for entry in entries)
    assert {*named} == pages - {"index"} and max(named.values()) == 1, {*named} ^ pages


def test_the_readme_is_a_screen_and_a_half():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 900
    for word in ("make run", "make serve", "/recommend/1", "docs/tutorial.md", "docs/how-to/own-log.md"):
        assert word in text
