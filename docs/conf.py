"""The settings of the documentation site; `make docs` builds it from build/docs (tools/make_docs.py)."""

from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

_root = Path(__file__).resolve().parent.parent
_facts = ConfigParser(delimiters=["="], interpolation=None)
_facts.read(_root / "settings.ini", encoding="utf-8")

project, version = _facts["DEFAULT"]["title"], _facts["DEFAULT"]["version"]
author = copyright = _facts["DEFAULT"]["copyright"]
language = "en"

extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design"]
nb_execution_mode = "off"  # the committed outputs are shown; a build runs no notebook
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
myst_dmath_allow_digits = False
python_maximum_signature_line_length = 90
add_module_names = False
toc_object_entries = False
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "_static" / "scorer.js")
html_favicon = "_static/mark.svg"
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "sidebar_hide_name": False,
    "light_logo": "mark.svg",
    "dark_logo": "mark.svg",
    "light_css_variables": {
        "color-brand-primary": "#1f6f5c",
        "color-brand-content": "#1f6f5c",
        "color-brand-visited": "#1f6f5c",
    },
    "dark_css_variables": {
        "color-brand-primary": "#5fc3a6",
        "color-brand-content": "#5fc3a6",
        "color-brand-visited": "#5fc3a6",
    },
}
pygments_style, pygments_dark_style = "friendly", "github-dark"
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
html_math_renderer = "mathml"


def _formula(node, display: str) -> str:
    return convert(node.astext(), display=display)


def _inline(translator, node) -> None:
    translator.body.append(_formula(node, "inline"))
    raise nodes.SkipNode


def _block(translator, node) -> None:
    translator.body.append(f'<div class="math">{_formula(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    "Formulas become MathML, which browsers draw without a script."
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
