"""Take the exports of a generated shop from `init` to a list, by the command alone, and write what a person sees.

The result is examples/exports/README.md. Each export gets a project of its own with nothing in it but the notebooks, so
what is printed is what a stranger sees in the first hour. Run it with `make exports`; it takes some minutes.
"""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from exports import EXPORTS, USERS  # noqa: E402
from support import bare_environment, fresh_project  # noqa: E402

HEAD = """# Many exports, many first hours

One generated shop, as many shop systems would export it, and what `product-recs` says on the way from file to list.
Nobody has renamed a column, converted a date or cleaned an id beforehand. Written by `make exports`; the shop and its
exports are in [tests/exports.py](../../tests/exports.py), and `tests/test_exports.py` asks each of the lists
whether it is sensible.
"""


def typed(folder: Path, words: list[str]) -> tuple[str, int]:
    "What a command prints, as in a terminal; and its exit code."
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    done = subprocess.run(
        command,
        cwd=folder,
        env=bare_environment(PRODUCT_RECS_ROOT=str(folder), COLUMNS="110"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    text = done.stdout.replace(f"{folder}/", "").rstrip()
    return re.sub(r"\d{8}T\d{6}[.\d]*-[0-9a-f]+", "VERSION", text), done.returncode


def transcript(name: str, folder: Path) -> str:
    "One export, from its files to a list."
    export = EXPORTS[name](fresh_project(folder))
    files = "\n".join(
        f"- `{path.name}`: {first_lines(path)}"
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "settings.ini"
    )
    parts = [f"## {export.name.replace('_', ' ').capitalize()}\n\n{export.about}"]
    user = export.user(7)
    steps = [["product-recs", "init", "--source", *export.sources, *export.options]]
    steps.append(["product-recs", "run", "-f", "shop.yaml", "--name", "shop", "--quiet"])
    steps.append(["product-recs", "recommend", user, "-n", "5"])
    for words in steps:
        started = time.perf_counter()
        text, code = typed(folder, words)
        if code:
            raise SystemExit(f"{name}: {shlex.join(words)} ended with {code}:\n{text}")
        print(f"  {words[1]:<10} {time.perf_counter() - started:6.1f} s", flush=True)
        parts.append(f"```console\n$ {shlex.join(words)}\n{text}\n```")
        if words[1] == "init":
            if export.more:
                with open(folder / "shop.yaml", "a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in export.more)
            added = " The last line is added by a person, because of what `init` said." if export.more else ""
            yaml = (folder / "shop.yaml").read_text(encoding="utf-8").rstrip()
            parts.append(f"The file that it wrote.{added}\n\n```yaml\n{yaml}\n```")
    return "\n\n".join([parts[0], files, *parts[1:]])


def first_lines(path: Path) -> str:
    "The first two lines of a text file, or what it is."
    if path.suffix not in (".csv", ".jsonl"):
        return {".xlsx": "a workbook", ".parquet": "a Parquet file", ".db": "a SQLite database"}.get(path.suffix, "")
    with open(path, "rb") as file:
        lines = [next(file) for _ in range(2)]
    try:
        text = [line.decode("utf-8-sig") for line in lines]
    except UnicodeDecodeError:
        text = [line.decode("cp1252") for line in lines]
    return " / ".join(f"`{line.strip()}`" for line in text)


def main() -> None:
    chosen = sys.argv[1:] or list(EXPORTS)
    pages = []
    for name in chosen:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            pages.append(transcript(name, Path(folder).resolve()))
    if chosen == list(EXPORTS):
        target = ROOT / "examples" / "exports" / "README.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n\n".join([HEAD, *pages]) + "\n", encoding="utf-8")
        print(f"written: {target.relative_to(ROOT)}, {USERS} users")


if __name__ == "__main__":
    main()
