"""A quarter of nights: a shop whose events arrive day by day, `daily` each night, and eight things that go wrong.

    python benchmarks/quarter.py                  # 91 days of the groceries (`make data` first); about an hour
    python benchmarks/quarter.py --days 30        # the first month of it, with the faults planted in it

A household sample of the groceries, with ids that are texts with leading zeros (so that a feed can lose them), is cut:
the first half year is the log, and each day of the quarter after it is sent to `POST /events` of two running workers.
Then `product-recs daily` runs as a scheduler would start it. All the time customers ask for lists; each answer that is
not 200 is counted. Where a night asks for a person, the script does what its console proposes.

The table, the picture and the figures go to benchmarks/results/quarter.md, quarter.png and quarter.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import psutil

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support import bare_environment, fresh_project, only_the_jobs  # noqa: E402

from product_recs.bundle.files import live_version  # noqa: E402
from product_recs.jobs.nights import nights_of  # noqa: E402

PROGRAM = Path(sys.executable).with_name("product-recs")
RESULTS = ROOT / "benchmarks" / "results"
WEAK, GOOD, BAD = (f"next_model={name}" for name in ("popularity", "buy again", "recent popularity"))
PLANTED = {  # day of the quarter -> what happens on it
    8: "user ids shuffled", 12: "a tenth of the volume", 16: "ids without leading zeros", 20: "a better model",
    24: "a worse model", 28: "the trainer is killed", 32: "the disk is full", 36: "the registry is down",
}  # fmt: skip


def sample_of(households: int, seed: int) -> pd.DataFrame:
    "Part of the groceries, moved so that 30 September was yesterday, and what follows left out; ids are padded texts."
    path = ROOT / "data/complete_journey/interactions.csv"
    if not path.exists():
        sys.exit(f"{path} is not there: make data")
    log = pd.read_csv(path, usecols=["user_id", "item_id", "quantity", "timestamp"], parse_dates=["timestamp"])
    users = np.random.default_rng(seed).choice(log.user_id.unique(), households, replace=False)
    log = log[log.user_id.isin(users) & log.quantity.between(1, 1000)].copy()
    shift = pd.Timestamp(date.today()) - pd.Timedelta(days=1) - pd.Timestamp("2017-09-30")
    for name, width in (("user_id", 6), ("item_id", 8)):
        log[name] = log[name].astype(str).str.zfill(width)
    log["timestamp"] += shift
    return log[log.timestamp < pd.Timestamp(date.today())].sort_values("timestamp", kind="stable")


class Shop:
    "A project folder, two workers, and customers who ask."

    def __init__(self, folder: Path, log: pd.DataFrame, start: pd.Timestamp, full_disk: bool):
        self.root, self.tmpfs, self.answers = fresh_project(folder), False, Counter()
        only_the_jobs(self.root)
        (self.root / "models").mkdir(exist_ok=True)
        if full_disk and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(self.root / "models")], capture_output=True
        ).returncode:  # fmt: skip
            self.tmpfs = True
        log[log.timestamp < start].to_csv(self.root / "log.csv", index=False)
        own = {"source": "log.csv", "products": "", "models": "popularity", "cold": "no", "bootstrap": 200}
        own |= {"diversity": [], "min_item_users": 3, "model": "recent popularity", "habits": False, "k": [10, 20]}
        beside = {"monitor": {"max_data_days": 1000}}  # its days are over; they pass in minutes
        for file, parameters in (("shop.yaml", own), ("night.yaml", beside)):
            lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in parameters.items())
            (self.root / file).write_text(lines, encoding="utf-8")
        (self.root / "gate.yaml").write_text("bootstrap: 300\nsample: 100\nmin_users: 50\n", encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.environment = bare_environment(
            PRODUCT_RECS_ROOT=str(self.root), PRODUCT_RECS_PORT=str(self.port), PRODUCT_RECS_WORKERS="2",
            PRODUCT_RECS_DATABASE_URL=f"sqlite:///{self.root}/feedback.db", PRODUCT_RECS_LOG_LEVEL="ERROR",
        )  # fmt: skip
        self.users, self.stop = log.user_id.unique(), threading.Event()

    def serve(self) -> None:
        log = (self.root / "service.log").open("w", encoding="utf-8")
        self.service = subprocess.Popen([PROGRAM, "serve"], cwd=self.root, env=self.environment, stdout=log, stderr=log)
        for _ in range(600):
            try:
                if self.ask("/health/live")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        threading.Thread(target=self._customers, daemon=True).start()

    def ask(self, path: str, body: object = None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"} if data else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _customers(self) -> None:
        "Ten lists a second, for the whole quarter."
        rng = np.random.default_rng(0)
        while not self.stop.wait(0.1):
            if live_version(self.root / "models") is None:
                continue  # the shop has not opened yet
            try:
                status, _ = self.ask(f"/recommend/{rng.choice(self.users)}")
            except OSError as error:
                status = type(error).__name__
            self.answers[status] += 1

    def send(self, events: pd.DataFrame, day: int) -> None:
        "The events of a day, in requests of 500."
        rows = [
            {"user_id": row.user_id, "item_id": row.item_id, "event": "purchase", "quantity": float(row.quantity),
             "timestamp": row.timestamp.isoformat() + "Z", "key": f"{day}-{number}"}
            for number, row in enumerate(events.itertuples())
        ]  # fmt: skip
        for start in range(0, len(rows), 500):
            status, answer = self.ask("/events", {"events": rows[start : start + 500]})
            if status not in (200, 202):
                raise AssertionError(f"day {day}: POST /events answered {status}: {answer[:300]}")
        time.sleep(2.2)  # what a night takes in ends two seconds before it begins

    def command(self, *words: str, parameters=(), kill: str = "", **environment: str) -> tuple[int, str, float]:
        "A night, or a decision; with `kill`, the kernel of that step is killed."
        pairs = [word for pair in parameters for word in ("-p", pair)]
        command = [PROGRAM, "daily", "-f", "shop.yaml", "-f", "night.yaml", "--name", "quarter", "--quiet",
                   "--gate", "gate.yaml", *pairs]  # fmt: skip
        started = time.monotonic()
        process = subprocess.Popen(
            [*command, *words], cwd=self.root, env=self.environment | environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if kill:
            threading.Thread(target=self._kill, args=(process, kill), daemon=True).start()
        said, _ = process.communicate(timeout=1800)
        return process.returncode, said, time.monotonic() - started

    def _kill(self, process: subprocess.Popen, step: str) -> None:
        "Kill the process that executes a step, as the system does where memory runs out."
        while process.poll() is None:
            night = self.last()
            if night and night.steps.get(step, {}).get("state") == "running":
                time.sleep(0.5)
                workers = psutil.Process(process.pid).children(recursive=True)
                for worker in sorted(workers, key=lambda worker: worker.create_time())[-1:]:
                    worker.send_signal(signal.SIGKILL)
                return
            time.sleep(0.05)

    def last(self):
        nights = nights_of(self.root / "reports/daily/quarter")
        return nights[-1] if nights else None

    def close(self) -> None:
        self.stop.set()
        if hasattr(self, "service"):
            self.service.send_signal(signal.SIGTERM)
            self.service.wait(30)
        if self.tmpfs:
            subprocess.run(["umount", "-l", str(self.root / "models")], check=False)


def changed(events: pd.DataFrame, planted: str, rng: np.random.Generator) -> pd.DataFrame:
    "The events of a day, as the fault leaves them."
    events = events.copy()
    if planted == "user ids shuffled":
        events["user_id"] = rng.permutation(events.user_id.to_numpy())
    elif planted == "a tenth of the volume":
        events = events.sample(frac=0.1, random_state=0).sort_index()
    elif planted == "ids without leading zeros":
        events["item_id"] = events.item_id.str.lstrip("0")
    return events


class Registry:
    "A real MLflow server, if one is installed beside this environment."

    def __init__(self, folder: Path):
        self.program = ROOT / ".venv-mlflow/bin/mlflow"
        self.folder, self.process = folder, None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.environment = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port}"}

    def start(self) -> None:
        if not self.program.exists():
            return
        self.process = subprocess.Popen(
            [self.program, "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
             "--artifacts-destination", str(self.folder / "artifacts")],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def first_line(said: str) -> str:
    return next((line for line in said.splitlines() if line.strip()), "")[:240]


class Quarter:
    "The days, the nights, and what became of them."

    def __init__(self, shop: Shop, log: pd.DataFrame, start: pd.Timestamp, registry: Registry):
        self.shop, self.log, self.start, self.registry = shop, log, start, registry
        self.rng, self.parameters, self.nights = np.random.default_rng(1), (WEAK,), []

    def night(self, day: int, note: str = "", *words: str, **options) -> int:
        "One run of `daily`, written down."
        parameters = options.pop("parameters", self.parameters)
        before = self.shop.last()
        code, said, seconds = self.shop.command(*words, parameters=parameters, **options)
        night = self.shop.last()
        if night and before and (night.name, night.starts) == (before.name, before.starts):
            night = None  # it ended before a night began, and the latest one is yesterday's
        self.nights.append({
            "day": day, "planted": PLANTED.get(day, ""), "note": note, "exit": code, "seconds": round(seconds, 1),
            "status": night.status if night else "", "headline": night.headline if night else first_line(said),
            "live": live_version(self.shop.root / "models"), "said": said[-2000:],
            "steps": {name: {"state": step["state"], "says": step.get("says", "")} for name, step in
                      (night.steps if night else {}).items()},
        })  # fmt: skip
        print(f"day {day:>2} {PLANTED.get(day, ''):<26} {note:<24} exit {code} {seconds:5.1f} s  "
              f"{self.nights[-1]['headline'][:150]}", flush=True)  # fmt: skip
        return code

    def decide(self, day: int, option: str, reason: str) -> None:
        moment = f"{(self.start + pd.Timedelta(days=day - 1)).date()}"
        code, said, _ = self.shop.command(option, moment, "--by", "Ada", "--reason", reason)
        if code:
            raise AssertionError(f"{option} {moment}: {said}")

    def day(self, day: int) -> None:
        planted = PLANTED.get(day, "")
        begins = self.start + pd.Timedelta(days=day - 1)
        events = self.log[(self.log.timestamp >= begins) & (self.log.timestamp < begins + pd.Timedelta(days=1))]
        self.shop.send(changed(events, planted, self.rng), day)
        if planted == "a better model":
            self.parameters = (GOOD,)
        if planted == "a worse model":
            self.night(day, parameters=(BAD,))
            return
        if planted == "the trainer is killed":
            self.night(day, kill="03_train")
            self.night(day, "started again")
            return
        if planted == "the disk is full":
            if not self.shop.tmpfs:
                self.night(day, "not planted: no small disk")
                return
            filler = self.shop.root / "models" / ".filler"
            free = shutil.disk_usage(filler.parent).free
            filler.write_bytes(bytes(max(free - 20_000, 0)))
            self.night(day)
            filler.unlink()
            self.night(day, "after room was made")
            return
        if planted == "the registry is down":
            if not self.registry.program.exists():
                self.night(day, "not planted: no registry")
                return
            self.registry.start()
            self.night(day, "it is up", **self.registry.environment)
            self.registry.stop()
            self.night(day, "it is down", "--force", **self.registry.environment)
            return
        code = self.night(day)
        if code == 4 and self.nights[-1]["status"] == "stopped":
            accept = planted == "a tenth of the volume"
            self.decide(day, "--accept" if accept else "--leave-out", "a holiday" if accept else "a broken feed")
            self.night(day, "accepted" if accept else "left out")


def table(nights: list[dict]) -> str:
    lines = ["| day | planted | exit | what happened |", "|---|---|---|---|"]
    for night in nights:
        if night["planted"]:
            note = f" ({night['note']})" if night["note"] else ""
            lines.append(f"| {night['day']} | {night['planted']}{note} | {night['exit']} | {night['headline']} |")
    return "\n".join(lines)


COLOURS = {"promoted": "#0072B2", "held": "#E69F00", "needs a person": "#E69F00", "stopped": "#D55E00",
           "failed": "#CC79A7", "nothing new": "#999999"}  # fmt: skip


def picture(nights: list[dict], path: Path) -> None:
    "One mark a night, by what became of it; the planted days are named."
    figure, ax = plt.subplots(figsize=(10, 3.2), constrained_layout=True)
    rows = ["promoted", "held", "needs a person", "stopped", "failed", "nothing new"]
    rows = [row for row in rows if any(night["status"] == row for night in nights)]
    for row in rows:
        days = [night["day"] for night in nights if night["status"] == row]
        ax.scatter(days, [rows.index(row)] * len(days), s=26, color=COLOURS[row], label=row, zorder=3)
    planted = [night for night in nights if night["planted"] and not night["note"].startswith("not planted")]
    for day in sorted({night["day"] for night in planted}):
        ax.axvline(day, color="#8a939c", lw=0.8, ls=":")
        ax.text(day, -0.75, PLANTED[day], rotation=28, ha="left", va="bottom", fontsize=8, color="#52606d")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -2.2)
    ax.set_xlabel("day of the quarter")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(quarter: Quarter, options: argparse.Namespace, seconds: float, folder: Path) -> None:
    nights, answers = quarter.nights, dict(quarter.shop.answers)
    other = sum(count for status, count in answers.items() if status != 200)
    counts = Counter(night["status"] for night in nights)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "days": nights[-1]["day"],
        "households": options.households,
        "seconds": round(seconds),
        "answers": answers,
        "statuses": dict(counts),
        "nights": [{k: v for k, v in night.items() if k != "said"} for night in nights],
    }
    (folder / "quarter.json").write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
    picture(nights, folder / "quarter.png")
    each = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    median = float(np.median([night["seconds"] for night in nights]))
    minutes = seconds / 60
    (folder / "quarter.md").write_text(f"""# A quarter of nights

{nights[-1]["day"]} days of {options.households} households of the groceries, sent to `POST /events` of two workers
day by day; `product-recs daily` after each. {len(nights)} nights ({each}), {median:.0f} seconds each, {minutes:.0f}
minutes in all. Customers asked {sum(answers.values()):,} times meanwhile; {other} answers were not 200. Made by
`python benchmarks/quarter.py`.

{table(nights)}

![Each night by what became of it](quarter.png)
""", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=91)
    parser.add_argument("--first", type=int, default=1, help="day to begin with; those before are in the log")
    parser.add_argument("--households", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    # a job in the background is not told of Ctrl-C: a stop writes the days so far as well
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = sample_of(options.households, options.seed)
    start = pd.Timestamp(date.today() - timedelta(days=91))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="quarter") as name:
        folder = Path(name).resolve()
        shop = Shop(folder / "shop", log, start + pd.Timedelta(days=options.first - 1), full_disk=True)
        registry = Registry(folder)
        quarter = Quarter(shop, log, start, registry)
        try:
            code, said, _ = shop.command(parameters=(WEAK,))
            if live_version(shop.root / "models") is None:
                print(said)
                subprocess.run([PROGRAM, "publish", quarter.shop.last().facts["version"], "--by", "Ada", "--reason",
                                "the first model"], cwd=shop.root, env=shop.environment, check=True)  # fmt: skip
            shop.serve()
            for day in range(options.first, options.first + options.days):
                quarter.day(day)
        except KeyboardInterrupt:
            print("interrupted: the days so far are written")
        finally:
            registry.stop()
            shop.close()
            if quarter.nights:
                write(quarter, options, time.monotonic() - started, options.write)
    print((options.write / "quarter.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
