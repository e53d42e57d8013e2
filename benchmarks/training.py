"""How long does a fit take, beside two libraries with compiled ALS? Ratios of one run, alternating, the same objective for all.

    python benchmarks/training.py [--sizes cj,0.1,1] [--factors 64,128] [--rounds 3] [--iterations 15] [--write]

The arms: `rotated` (product_recs.solver), `implicit`, and `irspack` (CG, its default) where .venv-bench has it:
`python3 -m venv .venv-bench && .venv-bench/bin/pip install irspack threadpoolctl`. Every fit is a process of its own; BLAS has
one thread in each, the row solvers have all cores. Data: the groceries (`make data`; the last two months are held out), and
generated shops with power-law popularity, tastes by group and about six pairs a user (sizes in millions of pairs; one pair of
each of 5,000 users is held out). NDCG@10 is taken after each iteration, outside the clock. Seconds to an NDCG: until the first
iteration with 99 % of what every arm has at its end, the setup included. CPU seconds (user and system, all threads) stand beside
wall seconds, because a machine that is shared with other work lengthens the latter.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

ROOT = Path(__file__).resolve().parents[1]
IRSPACK = ROOT / ".venv-bench/bin/python"
SHOP = {"regularization": 5.0, "alpha": 4.0}
GROCERIES = {"regularization": 40.0, "alpha": 2.0}  # on the logarithm of counts: every confidence is above 1, as irspack's form needs


def shop(pairs, seed=0, groups=50):
    "Users who mostly buy within two groups of products; the train matrix and one pair of each of some users."
    rng = np.random.default_rng(seed)
    users, items = max(100, int(pairs / 5.7)), max(100, int(9 * pairs**0.58))
    n = np.minimum(rng.pareto(1.5, users) * 3 + 1, items // 4).astype(np.int64)
    u = np.repeat(np.arange(users, dtype=np.int32), n)
    popularity, group = 1 / np.arange(1, items + 1) ** 0.8, rng.integers(groups, size=items)
    order = np.argsort(group, kind="stable")
    ends, summed = np.searchsorted(group[order], np.arange(groups + 1)), np.concatenate([[0], np.cumsum(popularity[order])])
    mine = rng.integers(groups, size=(users, 2))[u, rng.integers(2, size=len(u))]
    low, high, draw = summed[ends[mine]], summed[ends[mine + 1]], rng.random(len(u))
    at = np.where(rng.random(len(u)) < 0.7, low + draw * (high - low), draw * summed[-1])
    matrix = csr_matrix((np.ones(len(u), np.float32), (u, order[np.clip(np.searchsorted(summed, at) - 1, 0, items - 1)])), shape=(users, items))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    judged = rng.permutation(np.flatnonzero(np.diff(matrix.indptr) >= 3))[:5000]
    out = matrix.indptr[judged] + rng.integers(np.diff(matrix.indptr)[judged])
    held = csr_matrix((np.ones(len(judged), np.float32), (np.arange(len(judged)), matrix.indices[out])), shape=(len(judged), items))
    matrix.data[out] = 0
    matrix.eliminate_zeros()
    return matrix, judged, held


def groceries():
    "The training part, and what is new for each household in the last two months."
    from product_recs.evaluate import past_and_future
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


def ndcg(users, items, seen, held, k=10):
    "Mean NDCG@k over the whole catalogue without what was seen."
    discount, values = 1 / np.log2(np.arange(2, k + 2)), []
    for start in range(0, len(users), 250):
        scores = users[start:start + 250] @ items.T
        part = seen[start:start + 250]
        scores[np.repeat(np.arange(part.shape[0]), np.diff(part.indptr)), part.indices] = -np.inf
        top = np.argpartition(-scores, k, axis=1)[:, :k]
        top = np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable"), 1)
        hits = np.take_along_axis(held[start:start + 250].toarray() > 0, top, 1)
        best = np.cumsum(discount)[np.minimum(np.diff(held[start:start + 250].indptr), k) - 1]
        values.append((hits * discount).sum(axis=1) / best)
    return float(np.concatenate(values).mean())


class Clock:
    "Time and quality after each iteration; what happens inside of `look` does not count."
    def __init__(self, judge):
        self.judge, self.rows, self.wall, self.cpu = judge, [], 0.0, 0.0
        self.start()

    def start(self):
        self.since, self.spent = time.perf_counter(), sum(os.times()[:2])

    def look(self, users, items):
        self.wall += time.perf_counter() - self.since
        self.cpu += sum(os.times()[:2]) - self.spent
        self.rows.append((self.wall, self.cpu, self.judge(users, items)))
        self.start()


def fit(arm, matrix, factors, regularization, alpha, iterations, judge):
    "Fit with one arm; the clock."
    threads = os.cpu_count()
    if arm == "rotated":
        from product_recs.solver import RotatedALS
        clock = Clock(judge)
        model = RotatedALS(matrix, factors, regularization, alpha)
        for _ in range(iterations):
            model.step()
            clock.look(model.x[:, :factors], model.y[:, :factors])
    elif arm == "implicit":
        from implicit.cpu.als import AlternatingLeastSquares
        clock = Clock(judge)
        model = AlternatingLeastSquares(factors=factors, regularization=regularization, alpha=alpha, iterations=iterations, random_state=0, num_threads=threads)
        model.fit(matrix, show_progress=False, callback=lambda *_: clock.look(model.user_factors, model.item_factors))
    else:
        from irspack import IALSRecommender
        clock = Clock(judge)
        extra = matrix.copy()  # its weight of a taken pair is 1 + this
        extra.data = alpha * extra.data - 1
        model = IALSRecommender(extra, n_components=factors, alpha0=1.0, reg=regularization, nu=0.0, loss_type="ORIGINAL", solver_type="CG", n_threads=threads, random_seed=0)
        model.start_learning()
        for _ in range(iterations):
            model.run_epoch()
            clock.look(model.get_user_embedding(), model.get_item_embedding())
    return clock


def work(arm, file, factors, iterations, regularization, alpha):
    "One fit, in a process of its own: a line of JSON."
    from threadpoolctl import threadpool_limits
    data = np.load(file)
    matrix, held = (csr_matrix((data[n + "data"], data[n + "indices"], data[n + "indptr"]), shape=data[n + "shape"]) for n in ("train_", "held_"))
    judged = data["judged"]
    seen = matrix[judged]
    if arm == "implicit":
        import implicit.cpu.als  # noqa: F401  its BLAS is held too
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
    with threadpool_limits(1, "blas"):
        clock = fit(arm, matrix, factors, regularization, alpha, iterations, lambda x, y: ndcg(x[judged], y, seen, held))
    print(json.dumps({"rows": clock.rows, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before}))


def measure(arm, file, factors, iterations, parameters):
    python = IRSPACK if arm == "irspack" else sys.executable
    command = [str(python), __file__, "--worker", arm, "--file", str(file), "--factors", str(factors), "--iterations", str(iterations),
               "--regularization", str(parameters["regularization"]), "--alpha", str(parameters["alpha"])]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout.splitlines()[-1])


def facts(found, target):
    "Seconds an iteration, seconds to the target, both as wall and CPU; final quality, memory."
    rows = found["rows"]
    each = [[rows[i][c] - rows[i - 1][c] for i in range(1, len(rows))] for c in (0, 1)]
    there = next((row for row in rows if row[2] >= target), (float("nan"),) * 3)
    return {"wall": statistics.median(each[0]), "cpu": statistics.mean(each[1]), "wall to NDCG": there[0], "cpu to NDCG": there[1], "NDCG": rows[-1][2], "megabytes": found["megabytes"]}


def spread(ours, theirs):
    "Times slower than ours: median, smallest and largest of the pairs."
    ratios = sorted(b / a for a, b in zip(ours, theirs) if a > 0 and b > 0)
    return f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})" if ratios else "not reached"


def table(results):
    lines = ["| data | factors | arm | rounds | NDCG@10 | s an iteration | CPU s an iteration | CPU s to 99 % | CPU an iteration, times ours | CPU to 99 %, times ours | wall to 99 %, times ours | peak MB |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for result in results:
        ours = result["arms"]["rotated"]
        for arm, rounds in result["arms"].items():
            column = lambda name, of=rounds: [row[name] for row in of]
            middle = lambda name, of=rounds: statistics.median(row[name] for row in of)
            ratios = [spread(column(name, ours), column(name)) if arm != "rotated" else "1" for name in ("cpu", "cpu to NDCG", "wall to NDCG")]
            lines.append(f"| {result['data']} | {result['factors']} | {arm} | {len(rounds)} | {middle('NDCG'):.4f} | {middle('wall'):.3f} | {middle('cpu'):.3f} | {middle('cpu to NDCG'):.2f} | {' | '.join(ratios)} | {middle('megabytes'):.0f} |")
    return "\n".join(lines)


def plot(results, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = -(-len(results) // 3)
    fig, axes = plt.subplots(rows, 3, figsize=(12.6, 3.6 * rows), squeeze=False)
    for ax in axes.flat[len(results):]:
        ax.axis("off")
    for ax, result in zip(axes.flat, results):
        for arm, rows in result["curves"].items():
            ax.plot([row[1] for row in rows], [row[2] for row in rows], marker="o", markersize=3, label=arm)
        ax.set(xscale="log", xlabel="CPU seconds", ylabel="NDCG@10", title=f"{result['data']}\n{result['factors']} factors")
        ax.title.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(options):
    arms = [arm for arm in ("rotated", "implicit", "irspack") if arm != "irspack" or IRSPACK.exists()]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            train, judged, held = groceries() if size == "cj" else shop(float(size) * 1e6)
            name = f"{'groceries' if size == 'cj' else 'shop'}: {train.shape[0]:,} users, {train.shape[1]:,} items, {train.nnz:,} pairs"
            file = Path(folder) / f"{size}.npz"
            np.savez(file, judged=judged, **{f"{n}_{part}": value for n, m in (("train", train), ("held", held)) for part, value in (("data", m.data), ("indices", m.indices), ("indptr", m.indptr), ("shape", m.shape))})
            for factors in map(int, options.factors.split(",")):
                found = {arm: [] for arm in arms}
                for number in range(options.rounds):
                    for arm in arms if number % 2 == 0 else arms[::-1]:
                        found[arm].append(measure(arm, file, factors, options.iterations, GROCERIES if size == "cj" else SHOP))
                target = 0.99 * min(one["rows"][-1][2] for rounds in found.values() for one in rounds)
                results.append({"data": name, "factors": factors, "iterations": options.iterations, "rounds": options.rounds, "arms": {arm: [facts(one, target) for one in rounds] for arm, rounds in found.items()}, "curves": {arm: rounds[0]["rows"] for arm, rounds in found.items()}})
                print(table(results[-1:]), flush=True)
    out = ROOT / "benchmarks/results"
    if options.write:  # results of other sizes stay
        old = json.loads((out / "training.json").read_text()) if (out / "training.json").exists() else []
        mine = {(result["data"], result["factors"]): result for result in [*old, *results]}
        results = sorted(mine.values(), key=lambda result: (result["data"].split(":")[0], int(result["data"].split()[-2].replace(",", "")), result["factors"]))
        (out / "training.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, out / "training.png")
    text = f"The same objective and parameters for all arms; {os.cpu_count()} cores. Ratios: median of the rounds (smallest to largest). Made by `make bench-training`.\n\n{table(results)}\n"
    if options.write:
        (out / "training.md").write_text(text)
    print("\n" + text)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sizes", default="cj,0.1,1,10", help="cj and millions of pairs")
parser.add_argument("--factors", default="64,128,256")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--iterations", type=int, default=15)
parser.add_argument("--write", action="store_true", help="keep table, figures and plot under benchmarks/results/")
for name in ("--worker", "--file", "--regularization", "--alpha"):
    parser.add_argument(name, help=argparse.SUPPRESS)
given = parser.parse_args()
if given.worker:
    work(given.worker, given.file, int(given.factors), given.iterations, float(given.regularization), float(given.alpha))
else:
    main(given)
