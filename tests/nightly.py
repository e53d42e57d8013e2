"""A shop whose nights are simulated: a project with quick parameters, and its days."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
from support import BIN, ROOT, bare_environment, fresh_project, only_the_jobs

from product_recs.bundle.files import live_version, previous_versions, read_manifest
from product_recs.jobs.nights import nights_of

QUICK = {
    "source": "log.csv", "products": "data/products.csv", "model": "popularity", "next_model": "none",
    "models": "popularity", "cold": "no", "bootstrap": 50, "diversity": [], "half_life_days": 0,
}  # fmt: skip
BESIDE = {"monitor": {"max_data_days": 10_000}}  # the sample's days are over
KERNEL = {"name": "python3", "display_name": "python3", "language": "python"}

def plant(root: Path, name: str, parameters: str, *code: str) -> None:
    "A small notebook in place of a job, with the same contract."
    cells = [
        nbformat.v4.new_markdown_cell(f"# {name}\n\n> A stand-in.\n\n## Run"),
        nbformat.v4.new_code_cell(parameters),
    ]
    cells[1].metadata["tags"] = ["parameters"]
    cells += [nbformat.v4.new_code_cell(source) for source in code]
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), root / "nbs/jobs" / f"{name}.ipynb"
    )


def shop(folder: Path, until: str = "2026-06-23", **more) -> Path:
    "A project whose log ends before a day; shop.yaml is for a run too, night.yaml has what only a night takes."
    root = fresh_project(folder)
    only_the_jobs(root)
    write_log(root, log_until(until))
    for name, parameters in (("shop.yaml", QUICK | more), ("night.yaml", BESIDE)):
        (root / name).write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in parameters.items()))
    (root / "gate.yaml").write_text("bootstrap: 100\nsample: 30\nmin_users: 5\n")
    (root / "batch.yaml").write_text("out: data/batch/mail\nn: 5\n")
    return root


def log_until(day: str) -> pd.DataFrame:
    log = pd.read_csv(ROOT / "data/interactions.csv")
    return log[log.timestamp < day]


def day_of(day: str) -> pd.DataFrame:
    log = pd.read_csv(ROOT / "data/interactions.csv")
    return log[log.timestamp.str[:10] == day]


def write_log(root: Path, log: pd.DataFrame) -> None:
    log.to_csv(root / "log.csv.new", index=False)
    os.replace(root / "log.csv.new", root / "log.csv")


def environment(root: Path, store: str = "", **more: str) -> dict:
    return bare_environment(PRODUCT_RECS_ROOT=str(root), PRODUCT_RECS_DATABASE_URL=store, **more)


def command(*more: str) -> list[str]:
    words = ["daily", "-f", "shop.yaml", "-f", "night.yaml", "--name", "shop", "--quiet"]
    return [str(BIN / "product-recs"), *words, *more]


NIGHT = ("--gate", "gate.yaml", "--batch", "batch.yaml")


def run_night(root: Path, *more: str, env: dict | None = None) -> subprocess.CompletedProcess:
    "A whole night, as a scheduler starts it."
    return subprocess.run(
        command(*NIGHT, *more), cwd=root, env=env or environment(root), capture_output=True, text=True, timeout=600,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def latest(root: Path):
    return nights_of(root / "reports/daily/shop")[-1]


def result(root: Path) -> dict:
    "What must be the same however often a night was killed: arrays, verdict, what is live, lists, and no rest."
    models = root / "models"
    live = live_version(models)
    manifest = read_manifest(models / live)
    lists = sorted((root / "data/batch/mail").glob("*.parquet"))
    batch = pd.concat([pd.read_parquet(path) for path in lists]) if lists else pd.DataFrame()
    columns = [name for name in ("user_id", "rank", "item_id") if name in batch]
    rest = [path.name for folder in (models, root / "data/processed") for path in folder.iterdir()
            if path.name.startswith(".") and not path.name.endswith(".lock")]  # fmt: skip
    night = latest(root)
    return {
        "arrays": {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".npy")},
        "verdict": manifest["metrics"].get("gate", {}).get("verdict"),
        "status": night.status,
        "states": {step: record["state"] for step, record in night.steps.items()},
        "live is tonight's": night.facts.get("version") == live,
        "versions": len([path for path in models.iterdir() if (path / "manifest.json").exists()]),
        "before": len(previous_versions(models)),
        "rows": batch[columns].sort_values(columns).to_numpy().tolist() if columns else [],
        "rest": rest,
    }


def family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_at(root: Path, seconds: float, *more: str) -> bool:
    "Start a night and kill its process group after some seconds; was it still at work?"
    process = subprocess.Popen(
        command(*NIGHT, *more), cwd=root, env=environment(root), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    "Until something is so, while a process works."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, "it never came"
        time.sleep(0.02)


def shuffled(day: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    "A day whose users are nobody's: ids of another system."
    rng = np.random.default_rng(seed)
    return day.assign(user_id=rng.integers(5_000_000, 5_000_200, len(day)))
