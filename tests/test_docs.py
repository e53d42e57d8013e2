"The documentation: what its pages say exists, the reference is whole, and links lead somewhere."

import json
import re
import shlex
import sys

import nbformat
import pytest
import typer
from support import ROOT

from product_recs.api import create_app
from product_recs.core.settings import Settings
from product_recs.jobs.cli import app
from product_recs.jobs.pipeline import STEPS, step_notebook

sys.path.insert(0, str(ROOT / "tools"))

import check_links  # noqa: E402
import docs_api  # noqa: E402
import docs_reference  # noqa: E402
import make_docs  # noqa: E402

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def commands(text):
    "The commands of `product-recs` in the fences of a page, without what follows a pipe or a comment."
    for fence in re.findall(r"^```(?:sh|console)\n(.*?)^```$", text, re.M | re.S):
        for line in fence.splitlines():
            if match := re.search(r"(?:^|[/\s])product-recs (\S.*)", line.removeprefix("$ ")):
                if not line.startswith(("docker", " ", "  ")):
                    words = shlex.split(match.group(1), comments=True)
                    yield words[: next((place for place, word in enumerate(words) if word in ("|", "&", ">")), None)]


def parameters():
    "Names of the parameters of all jobs."
    names = set()
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if "parameters" in cell.metadata.get("tags", []):
                names |= set(re.findall(r"^(\w+)\s*=", cell.source, re.M))
    return names


@PAGE
def test_commands_of_a_page_exist(page):
    known = parameters()
    for words in commands(page.read_text()):
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, f"{page.name}: product-recs {words[0]}"
            command, words = command.commands[words[0]], words[1:]
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        for place, word in enumerate(words):
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert word in options, f"{page.name}: {command.name} {word}"
            if word == "-p":
                assert words[place + 1] in known, f"{page.name}: -p {words[place + 1]}"


@PAGE
def test_settings_and_routes_of_a_page_exist(page, tmp_path):
    text = page.read_text()
    settings = {f"PRODUCT_RECS_{name.upper()}" for name in Settings.model_fields} | {"PRODUCT_RECS_ROOT"}
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
    verbs = typer.main.get_command(app).commands
    assert all(f"## product-recs {name}\n" in pages["command"] for name in verbs) and "batch" in verbs
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


def test_the_readme_is_a_screen_and_a_half():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 900
    for word in ("make run", "make serve", "/recommend/1", "docs/tutorial.md", "docs/how-to/own-log.md"):
        assert word in text
