"""Write README.md from nbs/index.ipynb as it was last run; with --check, fail where the two differ.

Cells marked `#| hide` stay out. Links and pictures, which count from nbs/ in the notebook, are made to count from the
root.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
notebook.metadata["language_info"] = {"name": "python"}  # of the code fences
notebook.cells = [cell for cell in notebook.cells if "#| hide" not in cell.source]
text, _ = MarkdownExporter().from_notebook_node(notebook)
text = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
text = "\n".join(line.rstrip() for line in text.splitlines()).strip()
text = re.sub(r"\n{3,}", "\n\n", text) + "\n"
readme = root / "README.md"
if "--check" not in sys.argv:
    readme.write_text(text, encoding="utf-8")
elif readme.read_text(encoding="utf-8") != text:
    sys.exit("README.md is not what nbs/index.ipynb says; run `make readme` and commit it")
