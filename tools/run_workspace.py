"""From a built package and an empty folder to lists and the next release: every command, and what it printed.

The result is docs/how-to/alone-from-a-package.md. Two releases are built, the second with changed files, and the
first is installed into an environment that has nothing else. Run it with `make workspace`; it takes a quarter of an
hour.
"""

import csv
import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "how-to" / "alone-from-a-package.md"


def source_tree(folder: Path) -> Path:
    "What a commit of this working copy would hold."
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def built(source: Path, target: Path) -> Path:
    "A wheel; a second one of the same folder takes the kernels that are compiled there already."
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the package cannot be built:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    [wheel] = target.glob("*.whl")
    return wheel


def next_release(source: Path) -> None:
    "Make the sources those of a newer release, with a change in a notebook, in the README and in the Dockerfile."
    settings = source / "settings.ini"
    newer = re.sub(r"(?m)^version = .*", "version = 0.2.0", settings.read_text(encoding="utf-8"))
    settings.write_text(newer, encoding="utf-8")
    init = source / "product_recs" / "__init__.py"
    newer = re.sub(r'__version__ = ".*?"', '__version__ = "0.2.0"', init.read_text(encoding="utf-8"))
    init.write_text(newer, encoding="utf-8")
    path = source / "nbs" / "01_ingest.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"][0]["source"].append("\n\nA sentence that the newer release has.")
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, before, after in (
        ("README.md", "Made by `product-recs init`; everything", "`product-recs init` has made it; everything"),
        ("compose.yaml", "stop_grace_period: 20s", "stop_grace_period: 30s"),
    ):
        file = source / "product_recs" / "jobs" / "workspace" / name
        assert before in file.read_text(encoding="utf-8"), name
        file.write_text(file.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")


def export(path: Path) -> None:
    "A till's export: six kinds of tea, each customer with one they like, and columns as the shop calls them."
    chance = random.Random(1)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Bon", "Kundennummer", "Artikelnummer", "Bezeichnung", "Menge", "Kaufdatum", "Filiale"])
        for number in range(6000):
            user = chance.randrange(400)
            kind = user % 6 if chance.random() < 0.85 else chance.randrange(6)
            item = kind * 20 + min(int(chance.expovariate(0.2)), 19)
            day = datetime.date(2025, 1, 1) + datetime.timedelta(days=chance.randrange(300))
            rows.writerow(
                [number + 1, 10000 + user, f"A-{item:03}", f"Tee Nr. {item}", 1 + chance.randrange(3)]
                + [day.strftime("%d.%m.%Y"), chance.choice("NSW")]
            )


class Shell:
    "A person's terminal: an environment with one package in it, and a folder."

    def __init__(self, folder: Path, bin: Path):
        self.folder, self.parts, self.versions = folder, [], []
        proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        home = folder.parent / "home"
        home.mkdir()
        self.environment = proxies | {
            "PATH": f"{bin}:/usr/bin:/bin",
            "HOME": str(home),
            "COLUMNS": "100",
            "LANG": "C.UTF-8",
        }

    def told(self, text: str) -> str:
        text = text.replace(f"{self.folder}/", "").replace(str(self.folder), "~")
        for version in re.findall(r"\d{8}T\d{6}[.\d]*-[0-9a-f]+", text):
            if version not in self.versions:
                self.versions.append(version)
        for number, version in enumerate(self.versions, start=1):
            text = text.replace(version, f"VERSION-{number}")
        return re.sub(r"\bin \d+ (minutes?|seconds?)( \d+ seconds?)?", "in some time", text)

    def prose(self, text: str) -> None:
        self.parts.append(text)

    def type(self, command: str, code: int = 0, within: str = "", quiet: bool = False, lines: int = 60) -> str:
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder / within,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(f"  {time.monotonic() - started:6.1f} s  {command[:90]}", flush=True)
        if done.returncode != code:
            raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}")
        text = "" if quiet else self.told(done.stdout).rstrip()
        if len(rows := text.splitlines()) > lines:
            text = "\n".join([*rows[: lines - 1], f"... ({len(rows) - lines + 1} more lines)"])
        self.parts.append(f"```console\n$ {self.told(command)}\n{text}".rstrip() + "\n```")
        return done.stdout


def serve_and_ask(shell: Shell, user: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["bash", "-c", f"exec product-recs serve --port {port}"],
        cwd=shell.folder / "tea",
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        shell.parts.append("```console\n$ product-recs serve &\n```")
        shell.type(f"curl -s 'http://127.0.0.1:{port}/recommend/{user}?n=3'", within="tea")
        shell.type(f"curl -s 'http://127.0.0.1:{port}/health/ready'", within="tea")
        shell.parts = [part.replace(f":{port}/", ":8000/") for part in shell.parts]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


HEAD = """# Alone from a package

Without a clone of this project: an empty folder, an environment that has nothing but the package, and an export whose
columns are called as the shop calls them. Every command that was typed is here, with what it printed. Written by
`make workspace`, which builds two releases, so that the last part can go from one to the next.
"""


def walk(shell: Shell, first: Path, second: Path) -> None:
    shell.prose("## Install\n\nThe extra `jobs` brings papermill, the kernel that it starts, and what reports need.")
    venv.create(shell.folder / "venv", with_pip=True)
    shell.parts.append("```console\n$ python -m venv venv && source venv/bin/activate\n```")
    shell.type(f"pip install --quiet './{first.name}[jobs]' 2>/dev/null", quiet=True)
    shell.type("product-recs run", code=1)
    shell.prose("## A workspace from an export")
    shell.type("head -3 verkauf.csv")
    shell.prose(
        "In a terminal `init` asks which column is which, and Enter takes the guess. With `--yes`, or where nobody "
        "sits at a terminal, it takes what it found; `-p columns '{user_id: Kundennummer}'` says so beforehand."
    )
    shell.type("product-recs init tea --source verkauf.csv --yes")
    shell.prose("Everything is in the folder, and each file is there to be read and changed.")
    shell.type("ls -A . nbs nbs/jobs", within="tea")
    shell.type("cat shop.yaml", within="tea")
    shell.prose("## From the log to lists\n\nFrom here on all commands are typed in `tea`, or any folder below it.")
    shell.type("product-recs run -f shop.yaml --name shop --quiet", within="tea")
    shell.type("product-recs recommend 10001 -n 3", within="tea")
    shell.type("product-recs similar A-020 -n 3", within="tea/nbs")
    serve_and_ask(shell, "10001")
    shell.prose(
        "## Changing a notebook\n\nThe jobs run the notebooks of this folder. A heading is changed, and the next run "
        "has it."
    )
    shell.type("sed -i 's/What became of the rows/Was aus den Zeilen wurde/' nbs/01_ingest.ipynb", within="tea")
    shell.type("product-recs run -f shop.yaml -p model ALS --name als --quiet --publish", within="tea", lines=8)
    shell.type("grep -c 'Was aus den Zeilen wurde' reports/als/01_ingest.html", within="tea")
    shell.prose("papermill alone does the same with one notebook.")
    shell.type(
        "papermill --no-progress-bar nbs/05_inference.ipynb reports/mine.ipynb -p run als -p report_dir reports/mine "
        "2>/dev/null && ls reports",
        within="tea",
    )
    shell.prose("## The other verbs")
    versions = sorted(path.name for path in (shell.folder / "tea/models").iterdir() if path.is_dir())
    shell.type("product-recs models", within="tea")
    shell.type(f"product-recs evaluate --compare {versions[0]} current --quiet", within="tea", lines=25)
    shell.type(
        "product-recs batch -n 5 --out data/batch/lists.csv --quiet && head -3 data/batch/lists.csv", within="tea"
    )
    shell.type(f"product-recs diff --new {versions[0]} --quiet", within="tea", lines=20)
    shell.prose(
        "The golden users of the example file are two of the sample, whom this shop does not have: a shop names its "
        "own."
    )
    shell.type(
        f"product-recs gate --challenger {versions[0]} --criteria examples/gate.yaml --dry-run --quiet"
        ' || echo "exit code $?"',
        within="tea",
        lines=25,
    )
    update(shell, second)


def update(shell: Shell, second: Path) -> None:
    shell.prose(
        "## A newer release\n\nThe newer release has a sentence more in `nbs/01_ingest.ipynb`, of which a heading was "
        "changed above, and another time limit in `compose.yaml`. In `README.md` it has changed a line that is "
        "changed here, too."
    )
    shell.type("sed -i 's/^Made by .*/The shop of tea. Everything/' README.md", within="tea")
    shell.type(f"pip install --quiet --upgrade './{second.name}[jobs]' 2>/dev/null", quiet=True)
    shell.type("product-recs init --update", within="tea")
    shell.type(
        "grep -c 'Was aus den Zeilen wurde' nbs/01_ingest.ipynb; grep -c 'the newer release has' nbs/01_ingest.ipynb",
        within="tea",
    )
    shell.type("git diff --no-index README.md README.md.new | tail -n +5", within="tea", lines=20)
    shell.prose("The shop's own sentence stays, so the file beside it goes. A second update changes nothing.")
    shell.type("rm README.md.new && product-recs init --update", within="tea")
    shell.type("product-recs recommend 10001 -n 3", within="tea")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        source = source_tree(work / "source")
        first = built(source, work / "first")
        next_release(source)
        second = built(source, work / "second")
        print(f"built: {first.name}, {first.stat().st_size / 1e6:.2f} MB, and {second.name}", flush=True)
        shop = work / "shop"
        shop.mkdir()
        for wheel in (first, second):
            shutil.copy(wheel, shop)
        export(shop / "verkauf.csv")
        shell = Shell(shop, shop / "venv/bin")
        walk(shell, first, second)
        megabytes = first.stat().st_size / 1e6
        size = f"The wheel has {megabytes:.1f} MB, with the notebooks of a workspace and the sample in it."
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text("\n\n".join([HEAD.rstrip(), size, *shell.parts]) + "\n", encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
