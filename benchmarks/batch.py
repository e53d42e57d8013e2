"""Lists for a million users: users a second and peak memory of the batch, beside the bare search of the same lists.

    python benchmarks/batch.py [--users 1000000] [--items 50000] [--factors 64] [-n 10] [--rounds 1]

A bundle of random factors with interactions by a power law is written to a temporary folder. The search and the batch
run in processes of their own, one after the other in each round, so that the peak memory is each one's own. The search
keeps nothing of what it finds; the batch writes it to Parquet, with hashes. The peak has the pages of the mapped model
in it, whose size stands beside.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from scipy.sparse import csr_matrix

from product_recs.answer.recommender import open_recommender
from product_recs.bundle.checkerboard import model_by_hand
from product_recs.bundle.files import publish, write_bundle
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.ids import IdTable
from product_recs.data.snapshots import Snapshot
from product_recs.inference import BLOCK, top_rows
from product_recs.jobs.batch import Question, write_batch


def power_law(rng: np.random.Generator, users: int, items: int, each: int) -> csr_matrix:
    "About `each` interactions a user, on items whose popularity falls as 1 / rank."
    weight = 1 / np.arange(1, items + 1)
    count = rng.poisson(each, users) + 1
    item = np.searchsorted(np.cumsum(weight) / weight.sum(), rng.random(count.sum()), side="right").clip(max=items - 1)
    ends = np.concatenate([[0], np.cumsum(count)])
    matrix = csr_matrix((np.ones(len(item), np.float32), item.astype(np.int32), ends), shape=(users, items))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def generate(folder: Path, users: int, items: int, factors: int) -> None:
    "A live bundle of random factors."
    rng = np.random.default_rng(0)
    seen = power_law(rng, users, items, 10)
    x, y = (rng.normal(size=(size, factors)).astype(np.float32) for size in (users, items))
    popularity = np.bincount(seen.indices, minlength=items).astype(np.int32)
    snapshot = Snapshot(None, seen, seen, seen * 0, popularity)
    path = write_bundle(
        folder,
        models={DISCOVERY: model_by_hand(x, y, snapshot), NEXT_PURCHASE: "it is generated"},
        snapshot=snapshot,
        users=IdTable(np.arange(users)),
        items=IdTable(np.arange(items)),
        user_columns={"popularity": np.diff(seen.indptr).astype(np.int32)},
        item_columns={"popularity": popularity},
        parameters={},
        data={},
        metrics={},
    )
    publish(folder, path.name)


def measured(what: str, folder: Path, n: int) -> dict:
    "Seconds and peak memory of this process."
    with open_recommender(folder / "models") as recommender:
        model = recommender.model
        top_rows(model, np.arange(1), n)  # what is made once
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, perf_counter()
        if what == "batch":
            write_batch(recommender, Question(n=n), folder / "lists", fresh=True, progress=False)
        else:
            users = len(model.bundle.users)
            for begin in range(0, users, BLOCK):
                top_rows(model, np.arange(begin, min(begin + BLOCK, users)), n)
        seconds = perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "before": before / 2**20, "peak": peak / 2**20}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--users", type=int, nargs="+", default=[1_000_000])
parser.add_argument("--items", type=int, default=50_000)
parser.add_argument("--factors", type=int, default=64)
parser.add_argument("-n", type=int, default=10)
parser.add_argument("--rounds", type=int, default=1)
parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
options = parser.parse_args()
if options.child:
    print(json.dumps(measured(options.child[0], Path(options.child[1]), options.n)))
    sys.exit()
print(f"{options.items:,} items, {options.factors} factors, lists of {options.n}, {os.cpu_count()} cores\n")
print("| users | what | seconds | users a second | peak, GB | of it before, GB | model on disk, GB |")
print("|---|---|---|---|---|---|---|", flush=True)
for users in options.users:
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(workspace)
        generate(folder / "models", users, options.items, options.factors)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30
        for _ in range(options.rounds):
            for what in ("search", "batch"):
                command = [sys.executable, __file__, "-n", str(options.n), "--child", what, str(folder)]
                run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"| {users:,} | {what} | {run['seconds']:.1f} | {users / run['seconds']:,.0f} | {run['peak']:.2f} "
                    f"| {run['before']:.2f} | {size:.2f} |",
                    flush=True,
                )
