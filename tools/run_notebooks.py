"""Run every notebook and keep its outputs, cleaned of what differs from machine to machine.

Paths of this machine become short, and of a progress bar the last state stays. A job notebook is run as a test runs it
(IN_TEST=1): it does not replace the live model.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

from product_recs.jobs.reports import joined_streams

root = Path(__file__).resolve().parent.parent
os.environ["IN_TEST"] = "1"
# notebooks write and delete: a store or a registry of whoever starts this must not be reached
for name in [name for name in os.environ if name.startswith(("PRODUCT_RECS_", "MLFLOW_"))]:
    del os.environ[name]


def fresh_copy(folder: Path) -> Path:
    "What a clone holds: no model and no features of this machine may find their way into an output."
    for name in ("settings.ini", "data/interactions.csv", "data/products.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)
    for name in ("nbs", "examples"):
        shutil.copytree(root / name, folder / name)
    return folder


def without_paths(text: str) -> str:
    text = text.replace(f"{copy}/", "").replace(str(copy), ".")
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/tmp\w+", "/tmp/example", text)
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py", "/tmp/cell.py", text)
    return text.replace(f"{root}/", "").replace(str(root), ".").replace(str(Path.home()), "~")


paths = [Path(name).resolve() for name in sys.argv[1:]] or sorted((root / "nbs").rglob("*.ipynb"))
temporary = tempfile.TemporaryDirectory()
copy = fresh_copy(Path(temporary.name).resolve())
for path in (bar := tqdm(paths)):
    bar.set_postfix_str(path.stem)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str((copy / path.relative_to(root)).parent)}},
        extra_arguments=["--IPKernelApp.log_level=50"],
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined_streams(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = without_paths(output.text)
                for kind, value in output.get("data", {}).items():
                    if kind.startswith("text/"):
                        output.data[kind] = without_paths(value)
    nbformat.write(notebook, path)
