"""Fail on dead links between the pages: files and headings that Markdown files and notebooks point to.

With a folder of built pages (python tools/check_links.py build/site) the links of the site are looked at instead, and
anything that a browser would fetch from elsewhere is a mistake.
"""

import html
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/results/*.md", "nbs/**/*.ipynb")
GENERATED = ("command", "settings", "parameters", "http", "metrics", "prometheus")  # docs/reference/*.md, at each build
FETCHED = re.compile(r'<(?:script|img|iframe|source|link)\b[^>]*?\s(?:src|href)="((?:https?:)?//[^"]+)"')
MARKDOWN = MarkdownIt("commonmark").enable("table")


def text_of(path: Path) -> str:
    "The Markdown of a page; of a notebook, of all its cells of text."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def slug(title: str) -> str:
    "The anchor of a heading, as code hosts and the site make it."
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


class Pages:
    "Pages that were read, each once."

    def __init__(self):
        self.read: dict[Path, tuple[list[str], set[str]]] = {}

    def links_and_anchors(self, path: Path) -> tuple[list[str], set[str]]:
        if path not in self.read:
            links, anchors, tokens = [], set(), MARKDOWN.parse(text_of(path))
            for before, token in zip([None, *tokens], tokens):
                for child in token.children or []:
                    links += [child.attrs[name] for name in ("href", "src") if name in child.attrs]
                if before is not None and before.type == "heading_open":
                    words = "".join(child.content for child in token.children if child.type in ("text", "code_inline"))
                    number = sum(known == slug(words) or known.startswith(f"{slug(words)}-") for known in anchors)
                    anchors |= {slug(words), *([f"{slug(words)}-{number}"] if number else [])}
            self.read[path] = links, anchors
        return self.read[path]

    def problem(self, page: Path, link: str) -> str:
        "What is wrong with a link; empty where nothing is."
        target, _, anchor = unquote(link).partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.is_relative_to(ROOT):
            return "leads out of the project"
        name = path.relative_to(ROOT).as_posix()
        if re.fullmatch(rf"docs/reference/({'|'.join(GENERATED)})\.md", name):
            of_docs = page.is_relative_to(ROOT / "docs")
            return "" if of_docs else "is written when the site is built; link to the notebook that it comes from"
        if not path.exists():
            return "there is no such file"
        if anchor and path.suffix in (".md", ".ipynb") and anchor not in self.links_and_anchors(path)[1]:
            return f"there is no heading #{anchor}"
        return ""


def check_sources() -> tuple[list[str], int]:
    "Problems, and how many pages were looked at."
    pages, problems = Pages(), []
    paths = sorted({path for pattern in PAGES for path in ROOT.glob(pattern) if ".ipynb_checkpoints" not in path.parts})
    for path in paths:
        for link in pages.links_and_anchors(path)[0]:
            if not re.match(r"[a-z][a-z0-9+.-]*:", link) and (wrong := pages.problem(path, link)):
                problems.append(f"{path.relative_to(ROOT)}: {link}: {wrong}")
    return problems, len(paths)


def check_site(site: Path) -> tuple[list[str], int]:
    "Problems of the built pages, and how many there are."
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}
    ids = {path: set(re.findall(r'\sid="([^"]+)"', text)) for path, text in pages.items()}
    problems = []
    for path, text in pages.items():
        name = path.relative_to(site)
        body = re.sub(r"<pre>.*?</pre>|<script>.*?</script>", "", text, flags=re.S)
        for source in FETCHED.findall(text):
            problems.append(f"{name}: {source}: is fetched from elsewhere")
        for link in dict.fromkeys(re.findall(r'\s(?:href|src)="([^"]+)"', body)):
            if re.match(r"[a-z][a-z0-9+.-]*:", link):
                continue
            target, _, anchor = unquote(html.unescape(link)).partition("#")
            goal = (path.parent / target.split("?")[0]).resolve() if target else path
            if not goal.exists():
                problems.append(f"{name}: {link}: there is no such file")
            elif anchor and goal in ids and anchor not in ids[goal]:
                problems.append(f"{name}: {link}: there is no such place")
    for style in site.rglob("*.css"):
        for source in re.findall(r"url\([\"']?((?:https?:)?//[^)\"']+)", style.read_text(encoding="utf-8")):
            problems.append(f"{style.relative_to(site)}: {source}: is fetched from elsewhere")
    return problems, len(pages)


def main() -> None:
    problems, number = check_site(Path(sys.argv[1]).resolve()) if sys.argv[1:] else check_sources()
    print(*problems, sep="\n", end="\n" if problems else "")
    if problems:
        sys.exit(f"dead links: {len(problems)}, in {number} pages")
    print(f"The links of {number} pages lead somewhere.")


if __name__ == "__main__":
    main()
