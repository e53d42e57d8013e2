"""The best 10 of the whole catalogue without what was seen: for many users beside the bare matrix product, for one user
beside one pass over the factors.

    python benchmarks/ranking.py [--sizes 23000x64,50000x128,1000000x64] [--rounds 5] [--factors shop,gaussian]
    [--write]

Factors: `shop` from six iterations of ALS on generated purchases (power-law popularity, tastes by group), `gaussian`
independent normal
numbers, the hardest case for a search that lets go of items early. The same arrays, float32, for all arms; every
measurement is a
process of its own, the arms alternate, and a small first call is not counted.

Many users (a sample, 8 or 20 thousand): `product` is `x[block] @ y.T` in blocks of 256 users into the same memory, once
with BLAS
threads for all cores, once with a block for each core and one BLAS thread in it; ratios are to the quicker of the two.
It ranks nothing
and filters nothing. `implicit` is `recommend(users, seen, N=10, filter_already_liked_items=True)`, likewise with its
own threads or with
those of BLAS; the quicker one counts. `ours` is `Searcher.top(users, 10, exclude=seen, threads=0)`; packing the items
is apart.

One user of a million items: 300 users, one question at a time, in one process. The pass is `y @ x`, with one BLAS
thread and with all, and so
is `implicit`; the quicker one counts. Every arm's lists are compared with ours: scores to 1e-4 of the largest, items
where scores are not tied.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(os.environ.get("BENCH_RESULTS", ROOT / "benchmarks/results"))
N, MANY = 10, 100_000  # with as many items or more, one user at a time
ARMS = {
    "product, BLAS threads": "product",
    "product, own threads": "product",
    "implicit, own threads": "implicit",
    "implicit, BLAS threads": "implicit",
    "ours": "ours",
}
ALONE = {
    "pass, all BLAS threads": "pass",
    "pass, one BLAS thread": "pass",
    "implicit, all BLAS threads": "implicit",
    "implicit, one BLAS thread": "implicit",
    "ours": "ours",
}


def make(kind, items, factors, users, folder):
    "Write factors and seen items of a sample of users; the seconds of the fit."
    rng, started = np.random.default_rng(1), time.perf_counter()
    if kind == "gaussian":
        x, y = (rng.standard_normal((rows, factors), dtype=np.float32) for rows in (users, items))
        seen = csr_matrix(
            (np.ones(20 * users, np.float32), (np.repeat(np.arange(users), 20), rng.integers(items, size=20 * users))),
            shape=(users, items),
        )
    else:
        from training import shop

        from product_recs.models.solver import RotatedALS

        matrix, _, _ = shop(
            5 * items if items >= MANY else 30 * items, users=5 * items if items < MANY else items // 5, items=items
        )
        model = RotatedALS(matrix, factors, 5.0, 4.0)
        for _ in range(6):
            model.step()
        sample = np.sort(rng.permutation(np.flatnonzero(np.diff(matrix.indptr)))[:users])
        x, y, seen = model.x[sample, :factors], model.y[:, :factors], matrix[sample]
    for name, array in (("x", x), ("y", y), ("indptr", seen.indptr), ("indices", seen.indices)):
        np.save(folder / f"{name}.npy", np.ascontiguousarray(array))
    return time.perf_counter() - started


def load(folder):
    x, y, indptr, indices = (np.load(Path(folder) / f"{name}.npy") for name in ("x", "y", "indptr", "indices"))
    return x, y, csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=(len(x), len(y)))


def memory(name):
    "VmRSS, or VmHWM (the highest so far), in MB."
    return next(
        int(line.split()[1]) / 1e3
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith(name)
    )


def prepared(arm, x, y):
    "A function of users and what they have seen -> items and scores, and the seconds it took to make it."
    cores, started = os.cpu_count(), time.perf_counter()
    if arm.startswith("ours"):
        from product_recs.search.exact import Searcher

        searcher = Searcher(y)
        return lambda users, seen: searcher.top(users, N, exclude=seen, threads=0), time.perf_counter() - started
    if arm.startswith("implicit"):
        from implicit.cpu.als import AlternatingLeastSquares

        model = AlternatingLeastSquares(factors=y.shape[1], num_threads=1 if "BLAS" in arm else cores)
        model.item_factors = y

        def recommend(users, seen):
            model.user_factors = users
            return model.recommend(np.arange(len(users)), seen, N=N, filter_already_liked_items=True)

        return recommend, 0.0
    rooms = [np.empty((256, len(y)), np.float32) for _ in range(1 if "BLAS" in arm else cores)]

    def product(users, _):
        def blocks(number):
            for first in range(256 * number, len(users), 256 * len(rooms)):
                block = users[first : first + 256]
                np.matmul(block, y.T, out=rooms[number][: len(block)])

        with ThreadPoolExecutor(len(rooms)) as pool:
            list(pool.map(blocks, range(len(rooms))))

    return product, 0.0


def many(arm, folder):
    "One arm over all users of the sample."
    x, y, seen = load(folder)
    before = memory("VmRSS")
    run, packing = prepared(arm, x, y)
    run(x[:512], seen[:512])
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak of memory begins anew
    since, spent = time.perf_counter(), sum(os.times()[:2])
    lists = run(x, seen)
    result = {
        "seconds": time.perf_counter() - since,
        "cpu": sum(os.times()[:2]) - spent,
        "packing": packing,
        "megabytes": memory("VmHWM") - before,
        "users": len(x),
    }
    if lists is not None:
        np.savez(Path(folder) / f"{ARMS[arm]}.npz", items=lists[0], scores=lists[1])
    return result


def alone(folder):
    "All arms, one user at a time, alternating: milliseconds."
    from threadpoolctl import threadpool_limits

    x, y, seen = load(folder)
    runs, answers, times = (
        {arm: prepared(arm, x, y)[0] for arm in ALONE if not arm.startswith("pass")},
        {},
        {arm: [] for arm in ALONE},
    )
    for user in range(len(x)):
        for arm in ALONE:
            with threadpool_limits(os.cpu_count() if "all" in arm else 1, "blas"):
                vector, row = x[user : user + 1], seen[user]
                since = time.perf_counter()
                answer = y @ x[user] if arm.startswith("pass") else runs[arm](vector, row)
                times[arm].append((time.perf_counter() - since) * 1e3)
            if not arm.startswith("pass"):
                answers.setdefault(arm, []).append(answer)
    for arm, pairs in answers.items():
        np.savez(
            Path(folder) / f"{ALONE[arm]}.npz",
            items=np.concatenate([f[0] for f in pairs]),
            scores=np.concatenate([f[1] for f in pairs]),
        )
    return {arm: values[3:] for arm, values in times.items()}


def agreement(folder):
    "Share of the lists of implicit that are ours: scores to 1e-4 of the largest, items but for ties."
    ours, theirs = (np.load(folder / f"{arm}.npz") for arm in ("ours", "implicit"))
    near = 1e-4 * np.abs(ours["scores"]).max(axis=1, keepdims=True)
    scores = np.abs(ours["scores"] - theirs["scores"]) <= near
    gap = np.diff(ours["scores"], axis=1, prepend=np.inf, append=-np.inf)
    tied = (np.abs(gap[:, :-1]) <= near) | (np.abs(gap[:, 1:]) <= near)
    tied[:, -1] = True  # the eleventh may be as good
    return float((scores & (tied | (ours["items"] == theirs["items"]))).all(axis=1).mean())


def start(arm, folder, threads):
    command = [sys.executable, __file__, "--worker", arm, "--folder", str(folder)]
    environment = (
        os.environ
        | {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")}
        | {"PYTHONPATH": str(ROOT)}
    )
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(rows, base):
    rounds = sorted(a / b for a, b in zip(rows, base))
    return [statistics.median(rounds), rounds[0], rounds[-1]]


def quickest(arms, name, value):
    "Of the arms that begin with a name, the one with the smallest median."
    return min(
        (arm for arm in arms if arm.startswith(name)),
        key=lambda arm: statistics.median(value(row) for row in arms[arm]),
    )


def compare(size, kind, options):
    items, factors = map(int, size.split("x"))
    one_by_one = items >= MANY
    users = options.users or (303 if one_by_one else 8_000 if items * factors > 3e6 else 20_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(kind, items, factors, users, folder)
        result = {
            "kind": kind,
            "items": items,
            "factors": factors,
            "users": users,
            "one by one": one_by_one,
            "arms": {},
        }
        if one_by_one:
            runs = start("alone", folder, os.cpu_count())
            base = quickest(runs, "pass", lambda row: row)
            for arm, times in runs.items():
                result["arms"][arm] = {
                    "p50": statistics.median(times),
                    "p95": float(np.percentile(times, 95)),
                    "ratio": [statistics.median(times) / statistics.median(runs[base])],
                }
        else:
            runs = {arm: [] for arm in ARMS}
            for number in range(options.rounds):
                for arm in list(ARMS)[:: 1 if number % 2 == 0 else -1]:
                    runs[arm].append(start(arm, folder, os.cpu_count() if arm.endswith("BLAS threads") else 1))
            base = quickest(runs, "product", lambda row: row["seconds"])
            for arm, rows in runs.items():
                middle = {
                    name: statistics.median(row[name] for row in rows)
                    for name in ("seconds", "cpu", "packing", "megabytes")
                }
                result["arms"][arm] = middle | {
                    "ratio": ratios([row["seconds"] for row in rows], [row["seconds"] for row in runs[base]]),
                    "rounds": len(rows),
                }
        result |= {"base": base, "same lists": agreement(folder)}
    return result


def title(result):
    return f"{result['items']:,} items x {result['factors']} factors, {result['kind']}"


def spread(ratio):
    return f"{ratio[0]:.2f}" + (f" ({ratio[1]:.2f} to {ratio[2]:.2f})" if len(ratio) > 1 else "")


def tables(results):
    lines = [
        f"The best {N} of all items, seen items filtered; {os.cpu_count()} cores. Made by `make bench-ranking`; "
        f"`benchmarks/ranking.py` says how.",
        "",
    ]
    many, single = ([result for result in results if result["one by one"] is alone] for alone in (False, True))
    if many:
        lines += [
            "Many users. Ratio: to the quicker bare matrix product, median of the rounds (smallest to largest); below "
            "1 the search is quicker than a product that ranks nothing.",
            "",
            "| data | users | arm | rounds | seconds | CPU seconds | users a second | times the product | MB beyond "
            "the factors | packing, s | lists equal to ours |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for result in many:
            for arm, row in result["arms"].items():
                same = f"{result['same lists']:.2%}" if arm.startswith("implicit") else ""
                lines.append(
                    f"| {title(result)} | {result['users']:,} | {arm} | {row['rounds']} | {row['seconds']:.2f} | "
                    f"{row['cpu']:.2f} | {result['users'] / row['seconds']:,.0f} | {spread(row['ratio'])} "
                    f"| {row['megabytes']:.0f} | {format(row['packing'], '.2f') if arm == 'ours' else ''} | {same} |"
                )
    if single:
        lines += [
            "",
            "One user at a time. Ratio: of the medians, to the quicker pass over the factors.",
            "",
            "| data | users | arm | p50, ms | p95, ms | times one pass | lists equal to ours |",
            "|---|---|---|---|---|---|---|",
        ]
        for result in single:
            for arm, row in result["arms"].items():
                lines.append(
                    f"| {title(result)} | {result['users'] - 3:,} | {arm} | {row['p50']:.2f} | {row['p95']:.2f} | "
                    f"{spread(row['ratio'])} | "
                    f"{format(result['same lists'], '.2%') if arm.startswith('implicit') else ''} |"
                )
    return "\n".join(lines) + "\n"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(9, 0.7 * len(results) + 1.2))
    for place, result in enumerate(results):
        best = quickest({arm: [row["ratio"][0]] for arm, row in result["arms"].items()}, "implicit", float)
        for shift, arm, colour, label in ((-0.19, best, "#b9b9b9", "implicit"), (0.19, "ours", "#1f77b4", "ours")):
            ratio = result["arms"][arm]["ratio"][0]
            ax.barh(place + shift, ratio - 1, 0.36, left=1, color=colour, label=label if place == 0 else None)
            ax.text(
                ratio, place + shift, f" {ratio:.2g} ", va="center", ha="left" if ratio > 1 else "right", fontsize=9
            )
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(
        range(len(results)),
        [title(result).replace(" factors", "") + (", one user" if result["one by one"] else "") for result in results],
    )
    ax.invert_yaxis()
    shown = [row["ratio"][0] for result in results for row in result["arms"].values()]
    ax.set(
        xscale="log",
        xlim=(min(shown) / 2, 6),
        xlabel="time ÷ bare matrix product (one user: ÷ one pass over the factors)",
    )
    marks = [mark for mark in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if mark >= min(shown) / 2]
    ax.set_xticks(marks, [f"{mark:g}" for mark in marks])
    ax.minorticks_off()
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(options):
    results = []
    for size in options.sizes.split(","):
        for kind in options.factors.split(","):
            results.append(compare(size, kind, options))
            print(tables(results[-1:]), flush=True)
    if not options.write:
        return
    out = RESULTS
    old = json.loads((out / "ranking.json").read_text(encoding="utf-8")) if (out / "ranking.json").exists() else []
    key = lambda result: (result["one by one"], result["items"], result["factors"], result["kind"] == "gaussian")
    results = sorted(
        {key(result): result for result in [*old, *results]}.values(), key=key
    )  # results of other sizes stay
    (out / "ranking.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "ranking.md").write_text(tables(results), encoding="utf-8")
    plot(results, out / "ranking.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="23000x64,50000x128,1000000x64", help="items x factors")
    parser.add_argument("--factors", default="shop,gaussian")
    parser.add_argument("--users", type=int, default=0, help="0: 20,000, 8,000 above 3 million factors, 300 one by one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep table, figures and plot under benchmarks/results/")
    for name in ("--worker", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(alone(given.folder) if given.worker == "alone" else many(given.worker, given.folder)))
    else:
        main(given)
