"""One user of a million items: one pass over the factors, exact search, and the indexes of three libraries.

    python benchmarks/index.py [--items 1000000] [--data shop,directions,noise] [--arms ours,usearch-ip,...] [--write]

The libraries are taken from .venv-bench, which `make bench-index` sets up; the
arm `ours` (exact search, and the index as this project builds it) runs in the environment that runs this script, with
the extra `index`.

Data, 64 factors: `shop`, ALS factors of generated users with power-law popularity and tastes by group; `directions`,
the same item
vectors all of length 1, as of a model trained on cosines; `noise`, independent normal numbers. Items stand in random
order. Questions
are 500 users, one at a time, one thread. Every list is ranked again with the exact float32 vectors, inside of the
clock. A process of
its own for each arm builds with all cores, then alternates the pass over the factors (NumPy, one thread) with its
questions.
`augmented` is the reduction of Bachrach et al. (2014): one more number for each item makes all lengths equal, and the
nearest
vectors are then those of the largest products.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-bench/bin/python"
ARMS = (
    "ours",
    "usearch-ip-f32",
    "usearch-ip-i8",
    "usearch-augmented-f32",
    "faiss-hnsw-ip",
    "faiss-hnsw-augmented",
    "faiss-cells-8bit",
    "voyager-f32",
    "voyager-e4m3",
)
LINKS, EFFORT = 16, 64  # of every graph
BREADTHS, PROBES = (10, 32, 64, 128, 256, 512, 1024), (1, 2, 4, 8, 16, 32, 64, 128, 256)


def shop(items, factors, seed=0, groups=200):
    "Item factors, and the factors of 3,000 users, after 8 iterations of ALS; about 20 pairs an item."
    from scipy.sparse import csr_matrix

    from product_recs.models.solver import RotatedALS

    rng = np.random.default_rng(seed)
    n = np.minimum(rng.pareto(1.5, items) * 12 + 1, 2000).astype(np.int64)
    u = np.repeat(np.arange(items, dtype=np.int32), n)
    popularity, group = 1 / np.arange(1, items + 1) ** 0.8, rng.integers(groups, size=items)
    order = np.argsort(group, kind="stable")
    ends, summed = (
        np.searchsorted(group[order], np.arange(groups + 1)),
        np.concatenate([[0], np.cumsum(popularity[order])]),
    )
    mine = rng.integers(groups, size=(items, 2))[u, rng.integers(2, size=len(u))]
    low, high, draw = summed[ends[mine]], summed[ends[mine + 1]], rng.random(len(u))
    points = np.where(rng.random(len(u)) < 0.7, low + draw * (high - low), draw * summed[-1])
    taken = csr_matrix(
        (np.ones(len(u), np.float32), (u, order[np.clip(np.searchsorted(summed, points) - 1, 0, items - 1)])),
        shape=(items, items),
    )
    taken.sum_duplicates()
    taken.data[:] = 1
    model = RotatedALS(taken, factors, 5.0, 4.0)
    for _ in range(8):
        model.step()
    users = model.user_factors
    return model.item_factors[rng.permutation(items)], users[rng.permutation(np.flatnonzero(users.any(axis=1)))[:3000]]


def write_data(folder, name, items, factors):
    "Item factors, user factors and the right lists of 500 of them."
    if name == "noise":
        rng = np.random.default_rng(0)
        y, x = (
            rng.standard_normal((items, factors), dtype=np.float32),
            rng.standard_normal((3000, factors), dtype=np.float32),
        )
    elif (folder / "shop-items.npy").exists():
        y, x = np.load(folder / "shop-items.npy"), np.load(folder / "shop-users.npy")
    else:
        y, x = shop(items, factors)
        np.save(folder / "shop-items.npy", y)
        np.save(folder / "shop-users.npy", x)
    if name == "directions":
        y = y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)
    right = np.concatenate(
        [np.argpartition(-(x[start : start + 20] @ y.T), 10, axis=1)[:, :10] for start in range(0, 500, 20)]
    )
    for part, array in (("items", y), ("users", x), ("right", right)):
        np.save(folder / f"{name}-{part}.npy", array)


def memory():
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def augmented(y):
    lengths = (y.astype(float) ** 2).sum(axis=1)
    return np.hstack([y, np.sqrt(lengths.max() - lengths)[:, None]]).astype(np.float32)


def usearch(y, metric, kind, file):
    from usearch.index import Index

    wide = metric == "augmented"
    z = augmented(y) if wide else y
    index = Index(
        ndim=z.shape[1], metric="l2sq" if wide else "ip", dtype=kind, connectivity=LINKS, expansion_add=EFFORT
    )
    index.add(np.arange(len(z)), z, threads=os.cpu_count())
    index.save(file)

    def ask(breadth):
        index.expansion_search = breadth
        return lambda x: index.search(
            np.append(x, np.float32(0)) if wide else x, max(10, min(50, breadth))
        ).keys.astype(np.int64)

    return {f"breadth {breadth}": ask(breadth) for breadth in BREADTHS}


def faiss_index(y, kind, metric, file):
    import faiss

    wide = metric == "augmented"
    z, measure = (augmented(y), faiss.METRIC_L2) if wide else (y, faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(os.cpu_count())
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(z.shape[1], LINKS, measure)
        index.hnsw.efConstruction = EFFORT
    else:
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(z.shape[1]),
            z.shape[1],
            1 << int(np.log2(len(z)) / 2),
            faiss.ScalarQuantizer.QT_8bit,
            measure,
            False,
        )
        index.train(z[np.random.default_rng(0).permutation(len(z))[: 100 * index.nlist]])
    index.add(z)
    faiss.write_index(index, file)
    faiss.omp_set_num_threads(1)

    def ask(given, k):
        return lambda x: index.search((np.append(x, np.float32(0)) if wide else x)[None], k, params=given)[1][0]

    if kind == "hnsw":
        return {
            f"breadth {breadth}": ask(faiss.SearchParametersHNSW(efSearch=breadth), max(10, min(50, breadth)))
            for breadth in BREADTHS
        }
    return {f"probes {probes}": ask(faiss.SearchParametersIVF(nprobe=probes), 50) for probes in PROBES}


def voyager_index(y, kind, _, file):
    import voyager

    stored = {"f32": voyager.StorageDataType.Float32, "e4m3": voyager.StorageDataType.E4M3}[kind]
    index = voyager.Index(
        voyager.Space.InnerProduct,
        y.shape[1],
        M=LINKS,
        ef_construction=EFFORT,
        storage_data_type=stored,
        max_elements=len(y),
    )
    index.add_items(y, num_threads=os.cpu_count())
    index.save(file)
    return {
        f"breadth {breadth}": lambda x, breadth=breadth: index.query(x, k=max(10, min(50, breadth)), query_ef=breadth)[
            0
        ].astype(np.int64)
        for breadth in BREADTHS
    }


def ours(y, x, file):
    "Exact search, and the index that the project builds, whether it is worth it or not."
    from scipy.sparse import csr_matrix

    from product_recs.search.exact import Searcher
    from product_recs.search.index import build_index, fill_cells, looked_at

    exact = Searcher(y)
    walked = looked_at(exact, x[:500], exact.top(x[:500], 10)[1][:, -1]).mean()
    _, facts = build_index(
        y, exact.candidates, x, csr_matrix((len(x), len(y)), dtype=np.float32), num_threads=0, progress=False
    )
    started = time.perf_counter()
    cells = fill_cells(y, np.flatnonzero(exact.candidates), progress=False)
    built = time.perf_counter() - started
    import faiss

    from product_recs.search.index import NearestItems

    faiss.write_index(cells, file)
    asks = {"exact": lambda q: exact.top(q[None], 10)[0][0]}

    def ask(search):
        return lambda q: search.top(q[None], 10)[0][0]

    asks |= {f"probes {probes}": ask(NearestItems(exact, cells, probes)) for probes in PROBES}
    return asks, built, {"walk": float(walked), "auto": facts}


def work(arm, folder, name):
    "Build, then ask; a line of JSON."
    folder = Path(folder)
    y, x, right = (np.load(folder / f"{name}-{part}.npy") for part in ("items", "users", "right"))
    file, before, started, more = str(folder / "index"), memory(), time.perf_counter(), {}
    if arm == "ours":
        asks, built, more = ours(y, x, file)
    else:
        library, *kind = arm.split("-")
        made = {
            "usearch": lambda: usearch(y, *kind, file),
            "faiss": lambda: faiss_index(y, kind[0], kind[1], file),
            "voyager": lambda: voyager_index(y, kind[0], None, file),
        }[library]
        asks = made()
        built = time.perf_counter() - started
    held = memory() - before

    def answer(ask, q):
        ids = ask(q)
        ids = ids[ids >= 0]
        return ids[np.argsort(-(y[ids] @ q))[:10]]

    rows = {}
    for setting, ask in asks.items():
        passes, times, lists = [], [], []
        for number, q in enumerate(x[:500]):
            if number % 10 == 0:
                since = time.perf_counter()
                y @ q
                passes.append(time.perf_counter() - since)
            since = time.perf_counter()
            lists.append(ask(q) if arm == "ours" else answer(ask, q))
            times.append(time.perf_counter() - since)
        rows[setting] = {
            "recall": float(np.mean([np.isin(a, b).mean() for a, b in zip(right, lists)])),
            "p50": 1e3 * statistics.median(times),
            "p99": 1e3 * float(np.quantile(times, 0.99)),
            "pass": 1e3 * statistics.median(passes),
        }
    print(json.dumps({"built": built, "megabytes": held, "disk": os.path.getsize(file) / 1e6, "rows": rows, **more}))


def table(results):
    lines = [
        "| data | index | built, s | memory, MB | file, MB | one pass, ms | recall 0.95: p50 / p99, ms | times less "
        "than a pass | recall 0.99: p50 / p99, ms | best recall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        rows = dict(result["rows"])
        exact = rows.pop("exact", None)
        if exact:
            cell = f"{exact['p50']:.3f} / {exact['p99']:.3f}"
            lines.append(
                f"| {result['data']} | none, exact | | | | {exact['pass']:.1f} | {cell} | "
                f"{exact['pass'] / exact['p50']:.0f} | {cell} | 1 |"
            )
        first = {
            wanted: next((row for row in rows.values() if row["recall"] >= wanted), None) for wanted in (0.95, 0.99)
        }
        cells = {
            wanted: "not reached" if row is None else f"{row['p50']:.3f} / {row['p99']:.3f}"
            for wanted, row in first.items()
        }
        ratio = "" if first[0.95] is None else f"{first[0.95]['pass'] / first[0.95]['p50']:.0f}"
        one_pass = statistics.median(row["pass"] for row in rows.values())
        lines.append(
            f"| {result['data']} | {result['arm']} | {result['built']:.0f} | {result['megabytes']:.0f} | "
            f"{result['disk']:.0f} | {one_pass:.1f} | {cells[0.95]} | {ratio} | {cells[0.99]} | "
            f"{max(row['recall'] for row in rows.values()):.3f} |"
        )
    return "\n".join(lines)


def main(options):
    results, out = [], ROOT / "benchmarks/results"
    environment = os.environ | {
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in options.data.split(","):
            write_data(Path(folder), name, options.items, 64)
            for arm in options.arms.split(","):
                command = [
                    sys.executable if arm == "ours" else str(PEERS),
                    __file__,
                    "--worker",
                    arm,
                    "--folder",
                    folder,
                    "--name",
                    name,
                ]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT)
                results.append(
                    {"data": name, "items": options.items, "arm": arm, **json.loads(done.stdout.splitlines()[-1])}
                )
                print(table(results[-1:]), flush=True)
    if options.write:  # results of other data and arms stay
        old = json.loads((out / "index.json").read_text(encoding="utf-8")) if (out / "index.json").exists() else []
        mine = {(result["items"], result["data"], result["arm"]): result for result in [*old, *results]}
        rank = {name: place for place, name in enumerate(("shop", "directions", "noise", *ARMS))}
        results = sorted(mine.values(), key=lambda result: (result["items"], rank[result["data"]], rank[result["arm"]]))
        (out / "index.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    def choice(auto):
        if auto.get("missing"):
            return auto["missing"]
        return f"an index that looks at {auto['looks_at']:,}, recall@10 {auto['recall_at_10']:.3f}"

    said = [
        f"- {result['items']:,} items, {result['data']}: exact search looks at {result['walk']:,.0f}; "
        f"`auto`: {choice(result['auto'])}"
        for result in results
        if "walk" in result
    ]
    text = (
        "\n\n".join(
            [
                f"64 factors, one user at a time, one thread; {os.cpu_count()} cores build. The first setting of each "
                f"index that reaches the recall@10, of 500 users; graphs have {LINKS} links and are built with an "
                f"effort of {EFFORT}. Other work on the machine makes all times longer; the pass beside each row was "
                f"taken in the same process, between its questions. Made by `make bench-index`.",
                *(
                    f"{items:,} items:\n\n" + table([r for r in results if r["items"] == items])
                    for items in sorted({r["items"] for r in results})
                ),
                "\n".join(said),
            ]
        )
        + "\n"
    )
    if options.write:
        (out / "index.md").write_text(text, encoding="utf-8")
    print("\n" + text)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--items", type=int, default=1_000_000)
parser.add_argument("--data", default="shop,directions,noise")
parser.add_argument("--arms", default=",".join(ARMS))
parser.add_argument("--write", action="store_true", help="keep table and figures under benchmarks/results/")
for hidden in ("--worker", "--folder", "--name"):
    parser.add_argument(hidden, help=argparse.SUPPRESS)
given = parser.parse_args()
if given.worker:
    work(given.worker, given.folder, given.name)
else:
    main(given)
