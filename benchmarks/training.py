"""How long does a fit take, beside libraries with compiled ALS? Ratios of one run, alternating, the same objective for
all.

    python benchmarks/training.py [--sizes cj,0.1,1,10] [--factors 64,128,256] [--rounds 3] [--iterations 15] [--gowalla
    FOLDER] [--write]
    python benchmarks/training.py --scale [--write]

The arms: `rotated` (product_recs.models.solver), `implicit`, and where .venv-bench has them `irspack`
(CG, its default) and Spark MLlib:
`python3 -m venv .venv-bench && .venv-bench/bin/pip install irspack threadpoolctl pyspark pandas`. Every fit is a
process of its own;
BLAS has one thread in each, the row solvers have all cores. Data: the groceries (`make data`; the last two months are
held out),
generated shops with power-law popularity, tastes by group and about six pairs a user (sizes in millions of pairs; one
pair of
each of 2,000 users is held out), and Gowalla where its folder is given. NDCG@10 is taken after an iteration, outside
the clock.
Seconds to an NDCG: until the first iteration with 99 % of what every arm has at its end, the setup included. Memory:
the highest
beyond the data. CPU seconds (user and system, all threads) stand beside wall seconds, because a machine that is shared
with other
work lengthens the latter. Spark is timed with 64 factors on up to a million pairs, and is not judged.

Large fits have fewer rounds and iterations, and above five million pairs only 64 factors, so that the default takes
some ten
minutes; --full has them all. --scale measures seconds an iteration and memory from 0.1 to 10 million pairs, and for 50
million
of 1,000,000 users and 100,000 items.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".venv-bench/bin/python"
SHOP = {"regularization": 5.0, "alpha": 4.0}
GROCERIES = {
    "regularization": 40.0,
    "alpha": 2.0,
}  # on the logarithm of counts: every confidence is above 1, as irspack's form needs
MANY = 1_000_000, 100_000  # users and items of the largest
GOWALLA = {"regularization": 30.0, "alpha": 33.0}  # chosen on held-out train pairs, as benchmarks/quality.py does


def shop(pairs, seed=0, users=0, items=0, groups=50):
    """Users who mostly buy within two groups of products; the train matrix and one pair of each of some users. About
    six pairs a
    user, or as many as it takes where the numbers of users and items are given."""
    rng = np.random.default_rng(seed)
    share = 1.4 * pairs / (7 * users) if users else 1  # some are drawn twice
    users, items = users or max(100, int(pairs / 5.7)), items or max(100, int(9 * pairs**0.58))
    n = np.minimum((rng.pareto(1.5, users) * 3 + 1) * share, items // 4).astype(np.int64)
    u = np.repeat(np.arange(users, dtype=np.int32), n)
    popularity, group = 1 / np.arange(1, items + 1) ** 0.8, rng.integers(groups, size=items)
    order = np.argsort(group, kind="stable")
    ends, summed = (
        np.searchsorted(group[order], np.arange(groups + 1)),
        np.concatenate([[0], np.cumsum(popularity[order])]),
    )
    mine = rng.integers(groups, size=(users, 2))[u, rng.integers(2, size=len(u))]
    low, high, draw = summed[ends[mine]], summed[ends[mine + 1]], rng.random(len(u))
    points = np.where(rng.random(len(u)) < 0.7, low + draw * (high - low), draw * summed[-1])
    matrix = csr_matrix(
        (np.ones(len(u), np.float32), (u, order[np.clip(np.searchsorted(summed, points) - 1, 0, items - 1)])),
        shape=(users, items),
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1
    judged = rng.permutation(np.flatnonzero(np.diff(matrix.indptr) >= 3))[:2000]
    out = matrix.indptr[judged] + rng.integers(np.diff(matrix.indptr)[judged])
    held = csr_matrix(
        (np.ones(len(judged), np.float32), (np.arange(len(judged)), matrix.indices[out])), shape=(len(judged), items)
    )
    matrix.data[out] = 0
    matrix.eliminate_zeros()
    return matrix, judged, held


def groceries():
    "The training part, and what is new for each household in the last two months."
    from product_recs.data.tasks import past_and_future
    from product_recs.features import ensure_features
    from product_recs.ingest import ensure_ingested

    ensure_ingested("training", source="data/complete_journey/interactions.csv", products="", users="")
    features = ensure_features("training", min_item_users=5, event_weights={"purchase": 1}, weighting="log1p")
    past, future, _ = past_and_future(features, "test")
    taken, future = past.confidence.tocsr(), csr_matrix(future)
    new = (future > 0).astype(np.float32) - (future > 0).astype(np.float32).multiply(taken > 0)
    new = csr_matrix(new)
    new.eliminate_zeros()
    judged = np.flatnonzero((np.diff(new.indptr) > 0) & (np.diff(taken.indptr) > 0))[:2000]
    return taken, judged, new[judged]


def gowalla(folder):
    "Train, and what 2,000 of the users have in the test."
    import pandas as pd

    train, test = (pd.read_parquet(Path(folder) / f"{name}.parquet") for name in ("train", "test"))
    shape = tuple(int(max(train[column].max(), test[column].max())) + 1 for column in ("user_id", "item_id"))
    train, test = (
        csr_matrix((np.ones(len(pairs), np.float32), (pairs.user_id, pairs.item_id)), shape=shape)
        for pairs in (train, test)
    )
    judged = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(np.diff(test.indptr)))[:2000])
    return train, judged, test[judged]


def save(file, train, judged, held):
    np.savez(
        file,
        judged=judged,
        **{
            f"{n}_{part}": value
            for n, m in (("train", train), ("held", held))
            for part, value in (("data", m.data), ("indices", m.indices), ("indptr", m.indptr), ("shape", m.shape))
        },
    )
    return f"{train.shape[0]:,} users, {train.shape[1]:,} items, {train.nnz:,} pairs"


def has(module):
    return BENCH.exists() and subprocess.run([BENCH, "-c", f"import {module}"], capture_output=True).returncode == 0


def measure(arm, file, factors, iterations, parameters):
    python = BENCH if arm in ("irspack", "spark") else sys.executable
    command = [
        str(python),
        str(ROOT / "benchmarks/training_fit.py"),
        arm,
        str(file),
        "--factors",
        str(factors),
        "--iterations",
        str(iterations),
        "--regularization",
        str(parameters["regularization"]),
        "--alpha",
        str(parameters["alpha"]),
    ]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(f"the fit by {arm} failed: {done.stderr.strip()[-2000:] or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def facts(fit, target):
    "Seconds an iteration, seconds to the target, both as wall and CPU; final quality, memory."
    rows = fit["rows"]
    each = [[rows[i][c] - rows[i - 1][c] for i in range(1, len(rows))] for c in (0, 1)]
    first = next((row for row in rows if row[2] is not None and row[2] >= target), (None,) * 3)
    return {
        "wall": statistics.median(each[0]),
        "cpu": statistics.mean(each[1]),
        "wall to NDCG": first[0],
        "cpu to NDCG": first[1],
        "NDCG": rows[-1][2],
        "megabytes": fit["megabytes"],
    }


def middle(rounds, name, form):
    "Median of the rounds, as text."
    values = [row[name] for row in rounds if row[name] is not None]
    return format(statistics.median(values), form) if values else "–"


def spread(ours, theirs, name):
    "Times slower than ours: median, smallest and largest of the pairs."
    ratios = sorted(b[name] / a[name] for a, b in zip(ours, theirs) if a[name] and b[name])
    if not ratios:
        return "–"
    return f"{statistics.median(ratios):.1f}" + (f" ({ratios[0]:.1f} to {ratios[-1]:.1f})" if len(ratios) > 1 else "")


def table(results):
    lines = [
        "| data | factors | arm | rounds | NDCG@10 | best on the way | s an iteration | CPU s an iteration | s to 99 "
        "% | CPU s to 99 % | an iteration, times ours | CPU an iteration, times ours | to 99 %, times ours | CPU to "
        "99 %, times ours | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ours = result["arms"]["rotated"]
        for arm, rounds in result["arms"].items():
            seen = [row[2] for row in result["curves"].get(arm, ()) if row[2] is not None]  # of the first round
            best = f"{max(seen):.4f}" if seen else "–"
            figures = [
                middle(rounds, name, form)
                for name, form in (
                    ("NDCG", ".4f"),
                    ("wall", ".3f"),
                    ("cpu", ".3f"),
                    ("wall to NDCG", ".2f"),
                    ("cpu to NDCG", ".2f"),
                )
            ]
            figures.insert(1, best)
            ratios = [
                spread(ours, rounds, name) if arm != "rotated" else "1"
                for name in ("wall", "cpu", "wall to NDCG", "cpu to NDCG")
            ]
            megabytes = middle(rounds, "megabytes", ".0f")
            cells = [result["data"], str(result["factors"]), arm, str(len(rounds)), *figures, *ratios, megabytes]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn(path, panels):
    "One panel for each (title, curves by name, axes); two or three beside each other."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns + (1.5 if columns == 1 else 0), 3.6 * rows), squeeze=False
    )
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (title, curves, options) in zip(axes.flat, panels):
        for name, (x, y) in curves.items():
            ax.plot(x, y, marker="o", markersize=3, label=name)
        ax.set(**options)
        ax.set_title(title, fontsize=9)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def of_size(size, options):
    "Data, parameters and name of a size."
    if size == "cj":
        return groceries(), GROCERIES, "groceries"
    if size == "gowalla":
        return gowalla(options.gowalla), GOWALLA, "Gowalla"
    return shop(float(size) * 1e6), SHOP, "shop"


def compare(options):
    "The table of all arms."
    here = [
        arm
        for arm, module in (("rotated", None), ("implicit", None), ("irspack", "irspack"), ("spark", "pyspark"))
        if module is None or has(module)
    ]
    sizes, results = options.sizes.split(",") + ["gowalla"] * bool(options.gowalla), []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            data, parameters, kind = of_size(size, options)
            name, file, pairs = (
                f"{kind}: {save(Path(folder) / 'data.npz', *data)}",
                Path(folder) / "data.npz",
                data[0].nnz,
            )
            for factors in map(int, options.factors.split(",")):
                large = not options.full and pairs * factors > 1e8
                if large and pairs > 5e6 and factors > 64:
                    continue
                iterations = min(options.iterations, 8) if large and pairs > 5e6 else options.iterations
                arms = [arm for arm in here if arm != "spark" or factors == 64 and pairs < 2e6]
                fits = {arm: [] for arm in arms}
                for number in range(1 if large else options.rounds):
                    for arm in arms if number % 2 == 0 else arms[::-1]:
                        if arm != "spark" or number == 0:
                            fits[arm].append(
                                measure(arm, file, factors, 3 if arm == "spark" else iterations, parameters)
                            )
                target = 0.99 * min(
                    fit["rows"][-1][2] for arm, rounds in fits.items() for fit in rounds if arm != "spark"
                )
                results.append(
                    {
                        "data": name,
                        "factors": factors,
                        "iterations": iterations,
                        "arms": {arm: [facts(fit, target) for fit in rounds] for arm, rounds in fits.items()},
                        "curves": {arm: rounds[0]["rows"] for arm, rounds in fits.items() if arm != "spark"},
                    }
                )
                print(table(results[-1:]), flush=True)
    out = Path(os.environ.get("BENCH_RESULTS", ROOT / "benchmarks/results"))
    if options.write:  # results of other sizes stay
        old = (
            json.loads((out / "training.json").read_text(encoding="utf-8")) if (out / "training.json").exists() else []
        )
        mine = {(result["data"], result["factors"]): result for result in [*old, *results]}
        results = sorted(
            mine.values(),
            key=lambda result: (
                result["data"].split(":")[0],
                int(result["data"].split()[-2].replace(",", "")),
                result["factors"],
            ),
        )
        (out / "training.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        axes = {"xscale": "log", "xlabel": "seconds", "ylabel": "NDCG@10"}
        drawn(
            out / "training.png",
            [
                (
                    f"{result['data']}\n{result['factors']} factors",
                    {
                        arm: tuple(zip(*[(row[0], row[2]) for row in rows if row[2] is not None]))
                        for arm, rows in result["curves"].items()
                    },
                    axes,
                )
                for result in results
            ],
        )
    text = (
        "The same objective and parameters for all arms but Spark, whose regularization grows with the row and which "
        "is not judged; "
        f"{os.cpu_count()} cores. Ratios: median of the rounds (smallest to largest). Nothing was tuned for a size: "
        f"where the best on the way is far above the end, the fit learns the noise, and an arm may never reach "
        f"another's best. Made by `make bench-training`.\n\n{table(results)}\n"
    )
    if options.write:
        (out / "training.md").write_text(text, encoding="utf-8")
    print("\n" + text)


def scale(options):
    "Seconds an iteration and memory against the number of pairs."
    lines, results = (
        [
            "| users | items | pairs | arm | s an iteration | ns a pair | peak MB of the process |",
            "|---|---|---|---|---|---|---|",
        ],
        [],
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in options.scale.split(","):
            large = float(size) >= 50
            train, _, _ = shop(float(size) * 1e6, 0, *(MANY if large else ()))
            nobody = np.zeros(0, np.int64)
            save(Path(folder) / "data.npz", train, nobody, train[nobody])
            for arm in ("rotated", "implicit"):
                fit = measure(arm, Path(folder) / "data.npz", 64, 3 if large else 5, SHOP)
                seconds = facts(fit, 0)["wall"]
                results.append(
                    {
                        "users": train.shape[0],
                        "items": train.shape[1],
                        "pairs": train.nnz,
                        "arm": arm,
                        "seconds": seconds,
                        "peak": fit["peak"],
                    }
                )
                lines.append(
                    f"| {train.shape[0]:,} | {train.shape[1]:,} | {train.nnz:,} | {arm} | {seconds:.3f} | "
                    f"{1e9 * seconds / train.nnz:.0f} | {fit['peak']:,.0f} |"
                )
                print(lines[-1], flush=True)
            del train
    text = (
        f"Median of the iterations of one fit with 64 factors; {os.cpu_count()} cores. Up to 10 million pairs users "
        f"and items grow with the pairs. Made by `benchmarks/training.py --scale`.\n\n" + "\n".join(lines) + "\n"
    )
    print("\n" + text)
    if options.write:
        out = Path(os.environ.get("BENCH_RESULTS", ROOT / "benchmarks/results"))
        (out / "training-scale.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (out / "training-scale.md").write_text(text, encoding="utf-8")
        curves = {
            name: tuple(zip(*points))
            for arm in ("rotated", "implicit")
            for name, wanted in (
                (arm, lambda row: row["users"] != MANY[0]),
                (f"{arm}, {MANY[0]:,} users", lambda row: row["users"] == MANY[0]),
            )
            if (points := [(row["pairs"], row["seconds"]) for row in results if row["arm"] == arm and wanted(row)])
        }
        x, y = (np.array(part) for part in curves["rotated"])
        curves["in proportion"] = (x, y[-1] * x / x[-1])
        drawn(
            out / "training-scale.png",
            [
                (
                    "64 factors",
                    curves,
                    {
                        "xscale": "log",
                        "yscale": "log",
                        "xlabel": "interactions (pairs)",
                        "ylabel": "seconds an iteration",
                    },
                )
            ],
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="cj,0.1,1,10", help="cj and millions of pairs")
    parser.add_argument("--factors", default="64,128,256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--gowalla", metavar="FOLDER", help="with train.parquet and test.parquet")
    parser.add_argument("--full", action="store_true", help="all rounds and iterations for the large fits too: hours")
    parser.add_argument(
        "--scale",
        nargs="?",
        const="0.1,0.3,1,3,10,50",
        metavar="SIZES",
        help="seconds an iteration and memory by size instead",
    )
    parser.add_argument("--write", action="store_true", help="keep table, figures and plot under benchmarks/results/")
    given = parser.parse_args()
    (scale if given.scale else compare)(given)
