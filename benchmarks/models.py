"""What does it cost to serve each model? All that there are, fitted on one shop and each served from a bundle of its
own, beside ALS.

    python benchmarks/models.py [--users 30000] [--items 8000] [--rounds 3] [--seconds 2] [--models "ALS,EASE"]
    [--write]   (needs wrk: apt-get install wrk)

The shop is generated as for benchmarks/training.py: power-law popularity, tastes by group, about ten pairs a user; how
often and how long ago each pair was is drawn at random. Nothing is said of quality here; the reports of a run and
benchmarks/quality.py do that. Every model answers `GET /recommend/{user_id}` with `cache_size` 0 from one worker, so
every list is ranked anew; a model of the next purchase answers that task. All workers stand ready and are asked in
turn, round by round, so that a ratio compares what was measured within seconds. Requests a second are of 16
connections, milliseconds of one; the CPU milliseconds of a request are those that the worker used, and other work on
the machine disturbs them least. The fold-in of an event is measured in the process of the script, with one BLAS
thread: a user of the training buys one more thing, and becomes somebody who can be scored.

Memory: that of the one worker after it answered, and the part of it that is no mapped file, which each further worker
adds; the files of the bundle are shared.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from scipy.sparse import csr_matrix
from serving import LUA, SERVE, load, start, stop
from training import shop

from product_recs.answer.recommender import Recommender
from product_recs.bundle.files import publish, write_bundle
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE, TASKS
from product_recs.core.events import Event
from product_recs.core.ids import IdTable
from product_recs.core.kernels import one_blas_thread
from product_recs.data.snapshots import Snapshot, csr_of
from product_recs.models.all import all_models, named
from product_recs.models.baselines import BuyAgain, SameForAll
from product_recs.models.blend import HabitBlend, ScoreBlend
from product_recs.models.bpr import BPR
from product_recs.models.factors import FactorModel
from product_recs.models.interface import size_of
from product_recs.models.item_item import EASE, ItemItem
from product_recs.models.signals import SIGNALS, BlendWeights

BLENDS = ("weighted ALS + item graph + low-pass", "ALS + habits")
FAMILIES = (
    (FactorModel, "factors"),
    (ItemItem, "item-item"),
    (EASE, "regression"),
    ((SameForAll, BuyAgain), "counts"),
    ((HabitBlend, ScoreBlend), "blend"),
)
BASE = "ALS"


def snapshot_of(users: int, items: int) -> Snapshot:
    "A shop, with counts from 1 to 3 and days from 0 to 364."
    taken, rng = shop(10 * users, users=users, items=items)[0], np.random.default_rng(1)
    taken = csr_matrix(taken, dtype=np.float32)
    counts, days = (
        csr_of(taken.shape, taken.indptr, taken.indices, values.astype(np.float32))
        for values in (rng.integers(1, 4, taken.nnz), rng.integers(0, 365, taken.nnz))
    )
    return Snapshot(None, counts, counts, days)


def models_of(iterations: int) -> list:
    "All models, not fitted; the weights of the habits are given, as their values cost nothing."
    models = [BPR(iterations=iterations) if model.name == "BPR" else model for model in all_models()]
    weights = BlendWeights(dict.fromkeys(SIGNALS, 1.0), 0.0, 30.0, 30.0, {})
    blends = [named(name, models) for name in BLENDS]
    return models + [HabitBlend(blend.parts[0], NEXT_PURCHASE, weights) if blend.tasks else blend for blend in blends]


def family(model) -> str:
    return next(name for kind, name in FAMILIES if isinstance(model, kind))


def task_of(model) -> str:
    return (model.tasks or [DISCOVERY])[0]


def publish_model(folder: Path, model, snapshot: Snapshot) -> None:
    "A bundle in which one model answers all that it can."
    users, items = (np.arange(1, size + 1) for size in snapshot.counts.shape)
    tasks = dict.fromkeys(TASKS, "it is not measured") | {task_of(model): model}
    path = write_bundle(
        folder, models=tasks, snapshot=snapshot, users=IdTable(users), items=IdTable(items),
        user_columns={}, item_columns={}, parameters={}, data={}, metrics={},
    )  # fmt: skip
    publish(folder, path.name)


def fold_in(folder: Path, task: str, users: int, items: int) -> float:
    "Milliseconds until a user with a new event can be scored; the median of 300."
    recommender, rng, times = Recommender(ReadyModel(open_bundle(folder)).prepare()), np.random.default_rng(2), []
    with one_blas_thread():
        for number in range(-20, 300):  # the first are not counted
            user, event = int(rng.integers(1, users + 1)), Event(item_id=int(rng.integers(1, items + 1)))
            since = time.perf_counter()
            recommender.person(recommender.request(user, task=task, session=[event]))
            times += [1e3 * (time.perf_counter() - since)] * (number >= 0)
    return statistics.median(times)


def memory(process) -> tuple[float, float]:
    "MB of a worker, and of them what is no mapped file."
    facts = psutil.Process(process.pid).memory_info()
    return facts.rss / 1e6, (facts.rss - facts.shared) / 1e6


def spent(process) -> float:
    "CPU seconds of a worker so far."
    return sum(psutil.Process(process.pid).cpu_times()[:2])


def prepare(folder: Path, model, snapshot: Snapshot) -> dict:
    "Fit one model, write its bundle and fold in."
    started = time.perf_counter()
    fitted = model.fit(snapshot)
    seconds, models_dir = time.perf_counter() - started, folder / model.name.replace(" ", "-")
    publish_model(models_dir, fitted, snapshot)
    task = task_of(model)
    return {
        "model": model.name, "family": family(model), "task": task, "models_dir": str(models_dir), "fit": seconds,
        "megabytes": size_of(fitted) / 1e6, "fold_in": fold_in(models_dir, task, *snapshot.counts.shape),
    }  # fmt: skip


def measure(folder: Path, rows: list[dict], options) -> None:
    "Ask all models in turn; what was found is added to their rows."
    servers = {
        row["model"]: start(SERVE, folder, database_url=f"sqlite:///{folder}/{place}.db", cache_size=0, workers=1,
                            models_dir=row["models_dir"])
        for place, row in enumerate(rows)
    }  # fmt: skip
    try:
        for number in range(-1, options.rounds):  # one round to warm up
            for row in rows:
                process, port = servers[row["model"]]
                script, before = folder / row["task"], spent(process)
                rate, _, _ = load(script, port, "/recommend/", 16, options.seconds)
                cpu = 1e3 * (spent(process) - before) / (rate * options.seconds)
                _, p50, p99 = load(script, port, "/recommend/", 1, options.seconds)
                if number >= 0:
                    row.setdefault("rounds", []).append({"rate": rate, "cpu": cpu, "p50": p50, "p99": p99})
        for row in rows:
            row["worker"], row["own"] = memory(servers[row["model"]][0])
    finally:
        for process, _ in servers.values():
            stop(process)


def ratios(result: dict, row: dict, name: str) -> list[float]:
    "A figure ÷ that of ALS in the same round: median, smallest and largest."
    base = next(model for model in result["models"] if model["model"] == BASE)
    rounds = sorted(mine[name] / other[name] for mine, other in zip(row["rounds"], base["rounds"]))
    return [statistics.median(rounds), rounds[0], rounds[-1]]


def spread(ratio: list[float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def table(result: dict) -> str:
    lines = [
        f"{result['users']:,} users, {result['items']:,} items, {result['pairs']:,} pairs. Each model is served by one "
        f"worker; {os.cpu_count()} cores, which the clients and the other workers share: seconds do not travel, and "
        f"ratios are noisy. Median of {len(result['models'][0]['rounds'])} rounds of {result['seconds']} seconds "
        f"(smallest to largest); BPR had {result['iterations']} passes. Made by `make bench-models`; "
        "`benchmarks/models.py` says how.",
        "",
        "| model | family | CPU ms a request | ÷ ALS | requests/s | ÷ ALS | p50 ms | p99 ms | fold-in of an event, ms "
        "| model, MB | worker, MB | of it no mapped file | fit, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["models"], key=lambda row: ratios(result, row, "cpu")):
        rate, cpu, p50, p99 = (
            statistics.median(figures[name] for figures in row["rounds"]) for name in ("rate", "cpu", "p50", "p99")
        )
        shown = row["model"] + (", next purchase" if row["task"] == NEXT_PURCHASE else "")
        lines.append(
            f"| {shown} | {row['family']} | {cpu:.2f} | {spread(ratios(result, row, 'cpu'))} | {rate:,.0f} | "
            f"{spread(ratios(result, row, 'rate'))} | {p50:.2f} | {p99:.2f} | {row['fold_in']:.2f} | "
            f"{row['megabytes']:.1f} | {row['worker']:.0f} | {row['own']:.0f} | {row['fit']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=30_000)
    parser.add_argument("--items", type=int, default=8_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=20, help="of BPR")
    parser.add_argument("--models", default="", help="names by commas, with ALS among them (default: all)")
    parser.add_argument("--write", action="store_true", help="keep table and figures under benchmarks/results/")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("benchmarks/models.py needs wrk, such as Debian's package of that name")
    models = models_of(options.iterations)
    asked = [name.strip() for name in options.models.split(",") if name.strip()] or [model.name for model in models]
    if BASE not in asked or {*asked} - {model.name for model in models}:
        parser.error(f"--models: ALS and others of: {', '.join(model.name for model in models)}")
    snapshot = snapshot_of(options.users, options.items)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in TASKS:
            (folder / task).mkdir()
            walk = LUA.replace("(k % 2400 + 1))", f'(k % 2400 + 1) .. "?task={task}")')
            (folder / task / "walk.lua").write_text(walk, encoding="utf-8")
        rows = [prepare(folder, model, snapshot) for model in models if model.name in asked]
        measure(folder, rows, options)
    for row in rows:
        del row["models_dir"]
    result = {
        "users": options.users, "items": options.items, "pairs": snapshot.counts.nnz, "seconds": options.seconds,
        "iterations": options.iterations, "models": rows,
    }  # fmt: skip
    print(table(result))
    if options.write:
        out = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
        (out / "models.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "models.md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
