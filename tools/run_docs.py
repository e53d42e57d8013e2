"""Run the commands of the pages in docs/ and write what they print below them, so that the pages stay true.

A page asks for a project by a comment:

- `<!-- project: sample -->`: a copy of a folder with a live model of the committed sample;
- `<!-- project: served -->`: the same, and what six weeks of an experiment left in its feedback store;
- `<!-- project: nights -->`: a log that gets a file a day, and parameters of a nightly job; no model yet;
- `<!-- project: shop -->`: the exports of a generated shop, no model yet.

In a fence `console`, each line that begins with `$ ` is typed in that folder (it goes on below where it ends in a
backslash or a comma), and the lines after it are replaced by what is printed. A command that fails ends the run, unless
`echo $?` follows, which prints its exit code. A command that ends in ` &` goes on in the background and is ended with
its page; `<!-- $ command -->` is typed and not shown. `--sample FOLDER` takes a folder that has such a model already.
"""

import argparse
import csv
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
from exports import american  # noqa: E402
from support import bare_environment, fresh_project  # noqa: E402

from product_recs.answer.experiments import experiments_of  # noqa: E402
from product_recs.bundle.files import live_version  # noqa: E402
from product_recs.feedback.records import Impression, NewEvent  # noqa: E402
from product_recs.feedback.store import Store  # noqa: E402

BLOCK = re.compile(r"^```console\n(.*?)^```$|^<!-- \$ (.*?) -->$", re.M | re.S)
PORT = "8000"  # as the pages write it; what is typed has a free one


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Terminal:
    "A folder in which commands are typed, and what goes on in its background."

    def __init__(self, folder: Path):
        self.folder, self.port, self.background, self.code = folder, free_port(), [], 0
        # what is typed deletes rows and models: a store or a registry of whoever starts this must not be reached
        self.environment = bare_environment(
            PRODUCT_RECS_ROOT=str(folder), COLUMNS="100", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )

    def type(self, command: str, may_fail: bool = False) -> str:
        "What a command prints; raises SystemExit where it fails and may not."
        typed = command.replace(f":{PORT}", f":{self.port}")
        options = dict(cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        if command.endswith(" &"):
            log = open(self.folder / "background.log", "wb")  # noqa: SIM115 - as long as the process
            words = ["env", *shlex.split(typed[:-2])]
            started = subprocess.Popen(
                words, stdout=log, **options | {"env": self.environment | {"PRODUCT_RECS_PORT": self.port}}
            )
            self.background.append(started)
            self.wait(started)
            return ""
        after = f"(exit {self.code}); {typed}"  # for `echo $?`
        done = subprocess.run(["bash", "-c", after], stdout=subprocess.PIPE, text=True, **options)
        self.code = done.returncode
        if done.returncode and not may_fail:
            raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}")
        return self.shown(done.stdout)

    def wait(self, process: subprocess.Popen) -> None:
        "Until the service answers."
        until = time.monotonic() + 300  # a machine may have much else to do
        while time.monotonic() < until and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise SystemExit("the service did not start:\n" + (self.folder / "background.log").read_text(encoding="utf-8"))

    def shown(self, text: str) -> str:
        "What differs from run to run and from machine to machine, under one name."
        text = text.replace(f"{self.folder}/", "").replace(str(self.folder), ".").replace(f":{self.port}", f":{PORT}")
        text = re.sub(r"\d{8}T\d{6}[.\d]*-[0-9a-f]+(?=  )", lambda match: "VERSION".ljust(len(match.group())), text)
        text = re.sub(r"\d{8}T\d{6}[.\d]*-[0-9a-f]+", "VERSION", text)
        text = re.sub(r"(succeeded in) [\d,.]+ (seconds|minutes)", r"\1 N seconds", text)
        text = re.sub(r"(?m)^date: .*\r?\n", "", text.replace("\r\n", "\n"))
        return "\n".join(line.rstrip() for line in text.rstrip().splitlines())

    def close(self) -> None:
        for process in self.background:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def with_output(terminal: Terminal, match: re.Match) -> str:
    "A fence with what its commands print now."
    if match.group(2):
        terminal.type(match.group(2))
        return match.group()
    lines = []
    commands = re.findall(r"^\$ (.*(?:(?<=[\\,])\n    .*)*)$", match.group(1), re.M)
    for command, following in zip(commands, [*commands[1:], ""]):
        print(f"  $ {command}", flush=True)
        lines += [f"$ {command}", terminal.type(command, may_fail=following == "echo $?")]
    return "```console\n" + "".join(f"{line}\n" for line in lines if line) + "```"


EXPERIMENT = """experiments:
  - name: varied-lists
    arms:
      - {name: control, share: 0.5}
      - {name: varied, share: 0.5, diversity: 0.3}
"""


def fill_store(folder: Path, days: int = 42, users: int = 3000) -> None:
    "Six weeks in which customers saw their list once and one in ten bought; of the arm `varied`, one in five."
    book, rng = experiments_of(folder / "experiments.yaml"), np.random.default_rng(1)
    start = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=days)
    shown, events, version = [], [], live_version(folder / "models")
    for number in range(users):
        user, moment = number + 1, start + timedelta(days=days) * number / users
        arm = book.arm_of(user, moment)
        items = tuple(int(item) for item in rng.permutation(range(101, 121))[:5])
        known = (version, "personalised" if user <= 360 else "popular", items, moment)
        shown.append(Impression(f"r{number}", user, *known, task="discovery", experiment=arm.experiment, arm=arm.name))
        if rng.random() < (0.2 if arm.name == "varied" else 0.1):
            events.append(NewEvent(user, items[0], timestamp=moment + timedelta(minutes=20), key=f"order-{number}"))
        if rng.random() < 0.3:
            events.append(
                NewEvent(user, items[1], "view", timestamp=moment + timedelta(minutes=10), key=f"view-{number}")
            )
    with Store(f"sqlite:///{folder}/data/feedback.db").open() as store:
        store.add_impressions(shown)
        store.add_events(events)


NIGHTLY = """source: log/*.csv
products: data/products.csv
model: ALS
next_model: none
cold: "no"
bootstrap: 50
"""
BESIDE = """gate: gate.yaml                   # thresholds and golden users
monitor: {max_data_days: 100000}  # the sample ended long ago
"""


def fill_log(folder: Path) -> None:
    "The sample up to a day in `log/`; in `later/` the two days after it, the second with ids of another system."
    with open(folder / "data/interactions.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    rng, column = np.random.default_rng(0), head.index("timestamp")
    days = {"log/until-22.csv": [row for row in rows if row[column] < "2026-06-23"]}
    days |= {
        f"later/{day}.csv": [row for row in rows if row[column][:10] == day] for day in ("2026-06-23", "2026-06-24")
    }
    for row in days["later/2026-06-24.csv"]:
        row[head.index("user_id")] = int(rng.integers(5_000_000, 5_000_200))
    for name, day_rows in days.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *day_rows])
    (folder / "shop.yaml").write_text(NIGHTLY, encoding="utf-8")
    (folder / "night.yaml").write_text(BESIDE, encoding="utf-8")
    (folder / "gate.yaml").write_text("min_users: 5\n", encoding="utf-8")  # the sample is small


def project(kind: str, folder: Path, folders: dict[str, Path]) -> Path:
    "A new folder with what a page starts from."
    if kind == "shop":
        american(fresh_project(folder))
        return folder
    if kind == "nights":
        fill_log(fresh_project(folder))
        return folder
    if "sample" not in folders:
        folders["sample"] = Path(tempfile.mkdtemp()).resolve()
        Terminal(fresh_project(folders["sample"])).type("product-recs run --name sample --quiet")
    shutil.copytree(folders["sample"], folder, dirs_exist_ok=True, symlinks=True)
    if kind == "served":
        (folder / "experiments.yaml").write_text(EXPERIMENT, encoding="utf-8")
        fill_store(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python tools/run_docs.py docs/tutorial.md     (`make docs-run`: all pages, some minutes)",
    )
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="default: all pages of docs/")
    parser.add_argument("--sample", type=Path, metavar="FOLDER", help="a project with a live model of the sample")
    given = parser.parse_args()
    pages = [page.resolve() for page in given.pages] or sorted((ROOT / "docs").rglob("*.md"))
    folders = {"sample": given.sample.resolve()} if given.sample else {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if not (asked := re.search(r"<!-- project: (sample|served|nights|shop) -->", text)):
            continue
        print(page.relative_to(ROOT), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            terminal = Terminal(project(asked.group(1), Path(folder).resolve(), folders))
            try:
                written = BLOCK.sub(lambda match, terminal=terminal: with_output(terminal, match), text)
            finally:
                terminal.close()
        page.write_text(written, encoding="utf-8")
    if not given.sample:
        for folder in folders.values():
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
