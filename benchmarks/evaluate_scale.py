"""How much memory and time does the evaluation take as users grow? Random factors, targets by a power law; figures of
one run.

    python benchmarks/evaluate_scale.py [--users 20000 100000] [--items 50000] [--factors 64]

Each size runs in a process of its own, so that its peak memory is its own. Beside the evaluation stands the bare matrix
product of the
same blocks, the work that scoring every item would be. Of the memory, the factors and the log itself are shown apart.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from scipy.sparse import csr_matrix

from product_recs.core.ids import IdTable
from product_recs.core.kernels import one_blas_thread
from product_recs.data.artifact import Features
from product_recs.data.snapshots import Snapshot
from product_recs.evaluation.judge import evaluate
from product_recs.models.factors import FactorModel

K = 50


class RandomFactors(FactorModel):
    "What ALS is when it ranks: two matrices of factors."

    name = "random factors"

    def __init__(self, user_factors, item_factors):
        super().__init__()
        self.given = {"user_factors": user_factors, "item_factors": item_factors}

    def _fit(self, snapshot):
        self.set_arrays(**self.given)


def power_law(rng, users, items, each):
    "About `each` interactions a user, on items whose popularity falls as 1 / rank."
    weight = 1 / np.arange(1, items + 1)
    count = rng.poisson(each, users) + 1
    item = np.searchsorted(np.cumsum(weight) / weight.sum(), rng.random(count.sum()), side="right").clip(max=items - 1)
    matrix = csr_matrix(
        (
            np.ones(len(item), np.float32),
            item.astype(np.int32),
            np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        ),
        shape=(users, items),
    )
    matrix.sum_duplicates()
    return matrix


def gigabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def one_size(users, items, factors, task, bootstrap):
    rng = np.random.default_rng(0)
    past, future = power_law(rng, users, items, 10), power_law(rng, users, items, 5)
    x, y = (rng.normal(size=(n, factors)).astype(np.float32) for n in (users, items))
    known = Snapshot("2026-02-01", past, past, past)
    split = {"starts": "2026-01-01", "validation_from": "2026-01-20", "test_from": "2026-02-01", "ends": "2026-03-01"}
    features = Features(
        IdTable(np.arange(users)),
        IdTable(np.arange(items)),
        known,
        known,
        known,
        future,
        future,
        split,
        {},
        "random",
        {},
        {},
        None,
        None,
    )
    before = gigabytes()
    with one_blas_thread():
        block = max(1, min(1024, 8_000_000 // items))
        start = perf_counter()
        with ThreadPoolExecutor() as threads:  # all cores, as the ranking has
            for _ in threads.map(lambda begin: (x[begin : begin + block] @ y.T)[0, 0], range(0, users, block)):
                pass
        product = perf_counter() - start
        start = perf_counter()
        evaluation = evaluate(
            features,
            [RandomFactors(x, y)],
            (1, 10, K),
            [task],
            bootstrap=bootstrap,
            progress=False,
            categories=np.arange(items) % 20,
        )
        whole = perf_counter() - start
    return {
        "users": users,
        "judged": evaluation.facts["users"][task],
        "before": before,
        "peak": gigabytes(),
        "product": product,
        "rank": float(evaluation.seconds[task].iloc[0]),
        "whole": whole,
    }


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--users", type=int, nargs="+", default=[20_000, 100_000])
parser.add_argument("--items", type=int, default=50_000)
parser.add_argument("--factors", type=int, default=64)
parser.add_argument("--task", default="discovery", choices=("discovery", "next_purchase"))
parser.add_argument("--bootstrap", type=int, default=100)
parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
options = parser.parse_args()
if options.child:
    print(json.dumps(one_size(options.users[0], options.items, options.factors, options.task, options.bootstrap)))
    sys.exit()
print(
    f"{options.items:,} items, {options.factors} factors, {options.task}, lists of {K}, {options.bootstrap} resamples, "
    f"{os.cpu_count()} cores\n"
)
print(
    "| users | users × items as float32, GB | peak, GB | of it before the evaluation, GB | bare product, s | ranking, "
    "s | whole evaluation, s | whole ÷ bare product |\n|---|---|---|---|---|---|---|---|",
    flush=True,
)
for users in options.users:
    command = [
        sys.executable,
        __file__,
        "--child",
        "--users",
        str(users),
        "--items",
        str(options.items),
        "--factors",
        str(options.factors),
        "--task",
        options.task,
        "--bootstrap",
        str(options.bootstrap),
    ]
    size = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(
        f"| {users:,} | {users * options.items * 4 / 2**30:,.1f} | {size['peak']:.2f} | {size['before']:.2f} | "
        f"{size['product']:.1f} | {size['rank']:.1f} | "
        f"{size['whole']:.1f} | {size['whole'] / size['product']:.1f} |",
        flush=True,
    )
