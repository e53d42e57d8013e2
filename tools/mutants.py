"""Does every exported function have a check that fails when it does nothing?

For each public function and method, its body becomes `return None` in a copy of its notebook, and the notebook is run.
What its notebook does not notice is then tried on the tests that name it, with the package changed in a copy. What
neither notices is printed, and the exit code is 1.

    python tools/mutants.py                                # all notebooks (about an hour on two cores)
    python tools/mutants.py nbs/models/als.ipynb           # one
    python tools/mutants.py --notebooks-only --workers 4
"""

import argparse
import ast
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import nbformat
from tqdm import tqdm

root = Path(__file__).resolve().parent.parent
NOTEBOOK_SECONDS, TEST_SECONDS = 120, 600  # a function that returns nothing can make a loop endless: that is noticed


class Mutant(NamedTuple):
    notebook: str  # relative to the root
    cell: int
    name: str  # function, or Class.method
    first: int  # line of the body in the cell, from 1
    last: int


def has_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    "Would `return None` change it?"
    body = function.body[ast.get_docstring(function, clean=False) is not None :]
    return any(not isinstance(node, ast.Pass) and not (isinstance(node, ast.Raise) and len(body) == 1) for node in body)


def functions(tree: ast.Module):
    "Name and definition of every public function and method."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, kinds):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{child.name}", child) for child in node.body if isinstance(child, kinds))


def mutants_of(path: Path) -> list[Mutant]:
    mutants = []
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type != "code" or not re.search(r"^#\|\s*export\b", cell.source, re.M):
            continue
        for name, node in functions(ast.parse(cell.source)):
            if not any(part.startswith("_") for part in name.split(".")) and has_body(node):
                mutants.append(
                    Mutant(str(path.relative_to(root)), number, name, node.body[0].lineno, node.body[-1].end_lineno)
                )
    return mutants


def without_body(source: str, mutant: Mutant) -> str:
    "The source with `return None` in place of the body."
    lines = source.splitlines()
    first = lines[mutant.first - 1]
    head = first[: len(first) - len(first.lstrip())]
    same_line = re.match(r"\s*(async )?def ", first) is not None
    if same_line:  # the body stands behind the colon
        node = next(n for name, n in functions(ast.parse(source)) if name == mutant.name)
        head = first[: node.body[0].col_offset]
    return "\n".join([*lines[: mutant.first - 1], f"{head}return None", *lines[mutant.last :]])


def project(folder: Path) -> Path:
    "What the notebooks and tests need of a clone; what they write stays in the copy."
    for name in ("nbs", "product_recs", "tests", "tools", "benchmarks", "examples", "ops", "data/interactions.csv"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy2
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(root / name, folder / name)
    for path in root.glob("*"):
        if path.is_file():
            shutil.copy2(path, folder / path.name)
    shutil.copy2(root / "data/products.csv", folder / "data/products.csv")
    return folder


def run_notebook(path: Path) -> None:
    "In a process of its own group: run a notebook as nbdev_test does; the exit code says whether it passed."
    os.setsid()
    signal.alarm(NOTEBOOK_SECONDS)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=["notest", "slow"], showerr=False)
    os._exit(0 if passed else 1)


def passes(folder: Path, notebook: str) -> bool:
    child = multiprocessing.get_context("fork").Process(target=run_notebook, args=(folder / notebook,))
    child.start()
    child.join(NOTEBOOK_SECONDS + 10)
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.join()
    return child.exitcode == 0


def noticed_by_notebook(mutant: Mutant | str) -> bool:
    "Does the notebook fail with the mutant? With a name alone: does it fail as it is?"
    notebook = mutant if isinstance(mutant, str) else mutant.notebook
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(root / "nbs", folder / "nbs")
        for name in ("settings.ini", "data/interactions.csv", "data/products.csv"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy2(root / name, folder / name)
        if not isinstance(mutant, str):
            book = nbformat.read(folder / notebook, as_version=4)
            book.cells[mutant.cell].source = without_body(book.cells[mutant.cell].source, mutant)
            nbformat.write(book, folder / notebook)
        return not passes(folder, notebook)


def noticed_by_tests(mutant: Mutant) -> str | None:
    "The first test file that names the function and fails with the mutant."
    name = mutant.name.split(".")[-1]
    named = [
        path
        for path in sorted((root / "tests").glob("test_*.py"))
        if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))
    ]
    if not named:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        folder = project(Path(temporary))
        book = nbformat.read(folder / mutant.notebook, as_version=4)
        module = next(
            match[1] for cell in book.cells if (match := re.match(r"#\|\s*default_exp\s+(\S+)", cell.source.strip()))
        )
        exported = folder / "product_recs" / (module.replace(".", "/") + ".py")
        source = exported.read_text(encoding="utf-8")
        node = next(node for name, node in functions(ast.parse(source)) if name == mutant.name)
        place = mutant._replace(first=node.body[0].lineno, last=node.body[-1].end_lineno)
        exported.write_text(without_body(source, place) + "\n", encoding="utf-8")
        for path in named:
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{path.name}"]
            environment = {**os.environ, "PYTHONPATH": str(folder), "PRODUCT_RECS_ROOT": str(folder)}
            try:
                done = subprocess.run(
                    [*command, f"--basetemp={temporary}/pytest"],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    timeout=TEST_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return path.name
            if done.returncode == 1:
                return path.name
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="default: all in nbs/")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--notebooks-only", action="store_true", help="do not try the tests on what a notebook misses")
    given = parser.parse_args()
    paths = [Path(name).resolve() for name in given.notebooks] or sorted((root / "nbs").rglob("*.ipynb"))
    mutants = [mutant for path in paths for mutant in mutants_of(path)]
    # in the parent, so that each child has them already
    from multiprocessing.pool import ThreadPool

    import duckdb  # noqa: E401, F401

    with ThreadPool(given.workers) as pool:
        names = sorted({mutant.notebook for mutant in mutants})
        fails = list(tqdm(pool.imap(noticed_by_notebook, names), "notebooks as they are", len(names)))
        broken = [name for name, failed in zip(names, fails) if failed]
        if broken:
            sys.exit("These notebooks fail as they are; mend them first:\n" + "\n".join(broken))
        noticed = list(tqdm(pool.imap(noticed_by_notebook, mutants), "without their bodies", len(mutants)))
        missed = [mutant for mutant, seen in zip(mutants, noticed) if not seen]
        tests = [None] * len(missed)
        if not given.notebooks_only:
            tests = list(tqdm(pool.imap(noticed_by_tests, missed), "by the tests", len(missed)))
    for mutant, test in zip(missed, tests):
        print(f"{mutant.notebook}: {mutant.name}: {f'noticed by {test}' if test else 'NOTICED BY NOTHING'}")
    unnoticed = tests.count(None)
    print(f"{len(mutants)} functions, {len(mutants) - len(missed)} noticed by their notebook, "
          f"{len(missed) - unnoticed} by a test, {unnoticed} by nothing")  # fmt: skip
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
