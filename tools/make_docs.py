"""Build the documentation site from docs/ and the notebooks into build/site; no notebook is run and nothing is fetched.

The pages keep their places in the repository (docs/how-to/serve.md, nbs/models/als.ipynb), so that a link between two
files leads to the same place on the site, on a code host and in an editor. `tools/docs_reference.py` writes the
reference from the code, and a table of contents holds what is there.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from check_links import GENERATED, check_site
from docs_api import api_of
from docs_reference import reference_pages

ROOT = Path(__file__).resolve().parent.parent
SOURCE, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"

# the rooms in the order of the house, from the ground up: what is said of each on its page
ROOMS = {
    "core": (
        "Core",
        "Names, errors, settings, paths, files that nobody reads half, ids, events and their rules, SQL, "
        "compiled kernels, and words and figures for people. Every other room stands on this one.",
    ),
    "search": ("Search", "The best N of many: of a block of scores, by inner product, by an index."),
    "feedback": (
        "Feedback",
        "What users do while the service runs, and what they were shown: a SQLite file, or PostgreSQL.",
    ),
    "data": (
        "Data",
        "From the export of a shop, as it is, to snapshots that know nothing of the future; and the tasks "
        "by which a model is judged.",
    ),
    "models": (
        "Models",
        "One interface, and the families behind it: ALS, item-item, spectral, BPR, counts, blends of "
        "them, and what places products that nobody has bought.",
    ),
    "bundle": ("Bundle", "The model on disk, opened, in use, and replaced while it answers."),
    "evaluation": (
        "Evaluation",
        "How good is it? Metrics with written definitions, intervals, segments, and the "
        "competition that decides what is served.",
    ),
    "answer": (
        "Answer",
        "One request, one list: the person, the filters, the rung that answers, the shop's rules, and the explanation.",
    ),
    "web": ("Web", "What stands around the answer in a service: routes, keys, kept answers, figures, errors."),
    "jobs": (
        "Jobs",
        "The pipeline, its reports, the search of parameters, the gate, lists for everybody, and the "
        "command `product-recs`.",
    ),
}
COPIED = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/**/README.md", "benchmarks/results/*.md")
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"(^(`{3,}|~{3,}).*?^\2|`[^`\n]+`)", re.M | re.S)


def outside_code(function, text: str) -> str:
    "The text with `function` applied to what is neither a fence nor a code span."
    parts, last = [], 0
    for match in CODE.finditer(text):
        parts += [function(text[last : match.start()]), match.group()]
        last = match.end()
    return "".join([*parts, function(text[last:])])


class Sources:
    "The folder that Sphinx reads: pages at the places that they have in the repository."

    def __init__(self, folder: Path):
        self.folder = folder
        self.wanted: set[str] = set()  # files that pages link to and that are no pages
        self.written: set[Path] = set()

    def put(self, name: str, content: bytes) -> None:
        "Write a file where it has changed: Sphinx reads again what is newer than its last look."
        path = self.folder / name
        self.written.add(path)
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def write(self, name: str, text: str) -> None:
        self.put(name, self.led(name, text).encode())

    def copy(self, name: str) -> None:
        self.put(name, (ROOT / name).read_bytes())

    def led(self, name: str, text: str) -> str:
        "The text of a page with its links as the site needs them."
        return outside_code(lambda part: LINK.sub(lambda match: self._target(name, match), part), text)

    def remove_others(self) -> None:
        "Delete what an earlier build wrote and this one did not."
        for path in [path for path in self.folder.rglob("*") if path.is_file()]:
            if path not in self.written:
                path.unlink()

    def _target(self, page: str, match: re.Match) -> str:
        "A link as the site needs it: of a folder, its overview; of another file, a copy to download."
        target, anchor = match.group(1), (match.group(2) or "").lower()
        path = (ROOT / page).parent.joinpath(target).resolve()
        if not path.is_relative_to(ROOT):
            return target + anchor
        name = path.relative_to(ROOT).as_posix()
        if name in ("README.md", "nbs/index.ipynb"):
            return self._relative(page, "index.md") + anchor
        if name == "nbs" or name.removeprefix("nbs/") in ROOMS:
            return self._relative(page, f"{name}/index.md" if name == "nbs" else f"{name}/overview.md")
        if path.is_dir():
            return self._relative(page, "nbs/index.md")
        if path.is_file() and path.suffix not in (".md", ".ipynb"):
            self.wanted.add(name)
        return target + anchor

    @staticmethod
    def _relative(page: str, name: str) -> str:
        return "../" * page.count("/") + name


def title_and_promise(path: Path) -> tuple[str, str]:
    "The heading of a notebook, and the line that says what it is for."
    first = nbformat.read(path, as_version=4).cells[0].source
    promise = re.search(r"^> (.+(?:\n> .+)*)", first, re.M)
    return first.splitlines()[0].lstrip("# "), promise.group(1).replace("\n> ", " ") if promise else ""


def text_cell(text: str, name: str) -> nbformat.NotebookNode:
    "A cell of text that is the same at each build."
    return nbformat.from_dict({"cell_type": "markdown", "id": name, "metadata": {}, "source": text})


def only_imports(source: str) -> bool:
    "Is a cell nothing but imports?"
    try:
        return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)
    except SyntaxError:  # a line for the shell
        return False


def add_notebook(sources: Sources, name: str) -> None:
    "A notebook as a page: hidden cells out, exported ones marked, and at the end what the module offers."
    notebook = nbformat.read(ROOT / name, as_version=4)
    module, exported, cells = "", [], []
    for cell in notebook.cells:
        directives = re.findall(r"^#\|\s*(\w+)\s*(\S*)", cell.source, re.M) if cell.cell_type == "code" else []
        words = {word for word, _ in directives}
        module = next((value for word, value in directives if word == "default_exp"), module)
        if words & {"hide", "default_exp"} or not cell.source.strip():
            continue
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            if "export" in words:
                exported.append(cell.source)
                tags = [*tags, "exported"]
            if only_imports(cell.source):  # folded: a reader wants them seldom
                words_of = {"code_prompt_show": "Imports", "code_prompt_hide": "Imports"}
                cell.metadata = nbformat.from_dict({"tags": [*tags, "hide-input"], "mystnb": words_of})
            else:
                cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cells.append(cell)
    notebook.cells = cells
    if module:
        api = api_of(f"product_recs.{module}", exported)
        where = f"Module `product_recs.{module}`" + (" · [what it offers](#api-reference)" if api else "")
        cells.insert(1, text_cell(f":::{{div}} module-line\n{where}\n:::", "module"))
        if api:
            cells.append(text_cell(f"## API reference\n\n{api}", "api"))
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = sources.led(name, cell.source)
    sources.put(name, nbformat.writes(notebook).encode())


def overview(sources: Sources, room: str, notebooks: list[Path]) -> None:
    "The page of a room: what is in it, and each notebook with its promise."
    title, about = ROOMS.get(room, (room.capitalize(), ""))
    rows = "\n".join(f"| [{head}]({path.name}) | {promise} |" for path, (head, promise) in notebooks)
    toc = "\n".join(f"{head} <{path.stem}>" for path, (head, _) in notebooks)
    sources.write(
        f"nbs/{room}/overview.md",
        f"# {title}\n\n{about}\n\n| notebook | |\n|---|---|\n{rows}\n\n```{{toctree}}\n:hidden:\n{toc}\n```\n",
    )


def add_house(sources: Sources) -> None:
    "All notebooks, the page of each room, and the story."
    rooms: dict[str, list] = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        name = path.relative_to(ROOT).as_posix()
        if name == "nbs/index.ipynb" or ".ipynb_checkpoints" in name:
            continue
        add_notebook(sources, name)
        room = "" if path.parent.name == "nbs" else path.parent.relative_to(ROOT / "nbs").as_posix()
        rooms.setdefault(room, []).append((path, title_and_promise(path)))
    story = rooms.pop("")
    order = [*(room for room in ROOMS if room in rooms), *(room for room in rooms if room not in ROOMS)]
    for room in order:
        overview(sources, room, rooms[room])
    chapters = "\n".join(f"| [{head}]({path.name}) | {promise} |" for path, (head, promise) in story)
    stands = "\n".join(
        f"| [{ROOMS.get(room, (room,))[0]}]({room}/overview.md) | {ROOMS.get(room, ('', ''))[1]} | {len(rooms[room])} |"
        for room in order
    )
    toc = "\n".join([*(f"{head} <{path.stem}>" for path, (head, _) in story), *(f"{room}/overview" for room in order)])
    head = (ROOT / "docs" / "house.md").read_text(encoding="utf-8").rstrip()
    sources.write(
        "nbs/index.md",
        f"{head}\n\n## The story\n\n| notebook | |\n|---|---|\n{chapters}\n\n## The rooms\n\n"
        f"| room | what is in it | notebooks |\n|---|---|--:|\n{stands}\n\n```{{toctree}}\n:hidden:\n{toc}\n```\n",
    )


def section(sources: Sources, folder: str, order: list[str]) -> list[str]:
    "Pages of a section, those of `order` first; the table of contents is what is there."
    present = sorted(path.stem for path in sources.written if path.parent == sources.folder / "docs" / folder)
    first = [name for name in order if name in present]
    return [f"docs/{folder}/{name}" for name in [*first, *(name for name in present if name not in first)]]


def first_lines(path: Path) -> tuple[str, str]:
    "The title of a page in Markdown, and the sentences below it."
    text = path.read_text(encoding="utf-8")
    title, _, rest = text.removeprefix("\ufeff").partition("\n")
    return title.lstrip("# "), rest.strip().split("\n\n")[0].replace("\n", " ")


HOW_TO = [
    "own-log",
    "serve",
    "feedback",
    "cold-start",
    "rules",
    "tune",
    "evaluate",
    "gate",
    "experiments",
    "batch",
    "daily",
    "monitor",
    "doctor",
    "privacy",
    "registry",
    "prometheus",
    "notebooks-as-jobs",
]


def index_of(sources: Sources, folder: str, title: str, about: str, names: list[str]) -> None:
    "The first page of a section: its pages, each with its first sentence."
    rows = []
    for name in names:
        head, says = first_lines(sources.folder / f"{name}.md")
        says = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", says)
        sentence = re.match(r".+?[.:](?= |$)", says)
        rows.append(f"| [{head}]({Path(name).name}.md) | {(sentence.group() if sentence else says).rstrip(':')} |")
    toc = "\n".join(Path(name).name for name in names)
    table = "| | |\n|---|---|\n" + "\n".join(rows)
    sources.write(
        f"docs/{folder}/index.md", f"# {title}\n\n{about}\n\n{table}\n\n```{{toctree}}\n:hidden:\n{toc}\n```\n"
    )


def assemble(folder: Path = SOURCE) -> Sources:
    "Everything that Sphinx reads."
    sources = Sources(folder)
    add_house(sources)
    for path in sorted((ROOT / "docs").rglob("*.md")):
        name = path.relative_to(ROOT).as_posix()
        if name not in ("docs/index.md", "docs/house.md"):
            sources.write(name, path.read_text(encoding="utf-8"))
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            if name == "benchmarks/results/README.md":
                pages = sorted(other.stem for other in path.parent.glob("*.md") if other.stem != "README")
                text += "\n```{toctree}\n:hidden:\n" + "\n".join(pages) + "\n```\n"
            if not text.startswith("# "):
                text = f"# Figures: {path.stem.replace('-', ' ')}\n\n{text}"
            sources.write(name, text)
    reference = reference_pages()
    assert set(reference) == set(GENERATED), "tools/check_links.py names the pages of the reference"
    for name, text in reference.items():
        sources.write(f"docs/reference/{name}.md", text)
    index_of(
        sources,
        "how-to",
        "How-to guides",
        "Each page is one task, with the commands that do it.",
        section(sources, "how-to", HOW_TO),
    )
    index_of(
        sources,
        "reference",
        "Reference",
        "Written from the code at each build, so it cannot be out of step.",
        section(sources, "reference", list(reference)),
    )
    index_of(
        sources,
        "explanation",
        "Explanation",
        "Why it is built as it is. Each page leads to the notebooks that show it on data.",
        section(sources, "explanation", ["choice-of-model", "trusted-evaluation"]),
    )
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    home = re.sub(r"(\]\(|:link: |^<img src=\")(?!https?:|#|\.\./)(?=[\w-]+[/.])", r"\1docs/", home, flags=re.M)
    more = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    more = "".join(f"docs/{name}\n" for name in more if f"docs/{name}\n" not in home and name not in ("index", "house"))
    home = home.replace("docs/reference/index\n", f"docs/reference/index\n{more}", 1)
    home = re.sub(r"^(:link: .*)\.md$", r"\1.html", home, flags=re.M)
    sources.write("index.md", home.replace("](../", "](").replace("<../", "<").replace(":link: ../", ":link: "))
    for picture in [*ROOT.glob("nbs/images/*"), *ROOT.glob("benchmarks/results/*.png"), *ROOT.glob("docs/images/*")]:
        sources.copy(picture.relative_to(ROOT).as_posix())
    for name in sources.wanted:
        sources.copy(name)
    sources.remove_others()
    return sources


def remove_stale_pages(sources: Sources, site: Path) -> None:
    "Delete pages whose source is gone; search, index and the like have none."
    for page in [page for room in ("docs", "nbs", "examples", "benchmarks") for page in (site / room).rglob("*.html")]:
        name = page.relative_to(site).with_suffix("")
        if not any((sources.folder / name).with_suffix(kind).is_file() for kind in (".md", ".ipynb")):
            page.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", action="store_true", help="only write what Sphinx reads, to build/docs")
    parser.add_argument("--fresh", action="store_true", help="build all pages, also those that have not changed")
    given = parser.parse_args()
    sources = assemble()
    if given.sources:
        return
    if given.fresh:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.rmtree(ROOT / "build" / "doctrees", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-j",
        "auto",
        "-c",
        str(ROOT / "docs"),
        "-d",
        str(ROOT / "build" / "doctrees"),
        str(SOURCE),
        str(SITE),
    ]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(code)
    remove_stale_pages(sources, SITE)
    problems, number = check_site(SITE)
    if problems:
        sys.exit("\n".join(problems) + f"\ndead links: {len(problems)}")
    print(
        f"{number} pages in {SITE.relative_to(ROOT)}/, every link leads somewhere; open "
        f"{SITE.relative_to(ROOT)}/index.html, or `make docs-serve`"
    )


if __name__ == "__main__":
    main()
