"""From a CSV to the matrices of 02_features, beside what one would write with DuckDB alone; one run, alternating.

    python benchmarks/ingest.py [--rows 10000000] [--rounds 3] [--ids number|text] [--bad 0] [--folder FOLDER] [--write]

Bare DuckDB reads the file with known types, numbers the ids, groups by user and item, sorts, and makes one CSR matrix.
It checks
nothing and writes nothing. Ours checks every value, merges repeated deliveries, fingerprints and writes the
interactions as Parquet
(`ingest`), then makes and writes the matrices of all three snapshots, both targets and the id tables
(`build_features`).
Each measurement is a process of its own; seconds and processor seconds leave the imports out, the peak of memory has
everything in it.
`--bad` is the number of lines with a fault. The log is made up: users and items by a power law, times over a year, to
the second.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import duckdb

WEIGHTS = "CASE event WHEN 'view' THEN 1.0 WHEN 'cart' THEN 2.0 WHEN 'purchase' THEN 4.0 ELSE 1.0 END"


def make_log(path, rows, ids, bad):
    "A CSV of `rows` interactions; every (rows/bad)-th has a quantity that is no number."
    name = "'{0}' || {1}" if ids == "text" else "{1}"
    quantity = (
        f"CASE WHEN n % {max(rows // bad, 1)} = 1 THEN 'two' ELSE (1 + floor(3*pow(random(), 4)))::INT::VARCHAR END"
        if bad
        else "(1 + floor(3*pow(random(), 4)))::INT"
    )
    with duckdb.connect() as con:
        con.execute("SET threads = 1; SELECT setseed(0.5)")  # one thread: the same file each time
        con.execute(f"""COPY (SELECT
            {name.format("user-", f"(1 + floor({max(rows // 50, 10)}*pow(random(), 1.5)))::INT")} AS user_id,
            {name.format("item-", f"(1001 + floor({max(rows // 200, 10)}*pow(random(), 3)))::INT")} AS item_id,
            CASE WHEN random() < 0.7 THEN 'view' WHEN random() < 0.6 THEN 'cart' ELSE 'purchase' END AS event,
            {quantity} AS quantity,
            strftime(TIMESTAMP '2025-01-01' + to_seconds((random()*31536000)::INT), '%Y-%m-%dT%H:%M:%S') AS timestamp
            FROM range({rows}) t(n)) TO '{path}' (HEADER)""")


def bare(path, folder, ids, limit):
    "What one would write with DuckDB alone."
    import numpy as np
    from scipy.sparse import csr_matrix

    kind = "VARCHAR" if ids == "text" else "BIGINT"
    with duckdb.connect(config={"memory_limit": limit, "temp_directory": str(folder)}) as con:
        types = {"user_id": kind, "item_id": kind, "event": "VARCHAR", "quantity": "VARCHAR", "timestamp": "TIMESTAMP"}
        con.execute(
            f"CREATE TABLE log AS FROM read_csv('{path}', header=true, auto_detect=false, delim=',', columns={types})"
        )
        for side in ("user", "item"):
            con.execute(
                f"CREATE TABLE {side}s AS SELECT {side}_id, (row_number() OVER (ORDER BY {side}_id) - 1)::INTEGER AS "
                f"row FROM (SELECT DISTINCT {side}_id FROM log)"
            )
        pairs = con.execute(f"""SELECT u.row AS user, i.row AS item, sum({WEIGHTS})::FLOAT AS confidence FROM log JOIN
            users u USING (user_id)
            JOIN items i USING (item_id) GROUP BY u.row, i.row ORDER BY u.row, i.row""").fetchnumpy()
    indptr = np.append(0, np.cumsum(np.bincount(pairs["user"])))
    return csr_matrix((pairs["confidence"], pairs["item"], indptr)).nnz, {}


def ours(path, folder, ids, limit):
    "The same with every guarantee."
    from product_recs.features import build_features
    from product_recs.ingest import ingest

    started, spent = time.perf_counter(), time.process_time()
    ledger = ingest(path, folder / "run", memory_limit=limit, progress=False)
    assert ledger.rows_read == ledger.rows_kept + ledger.rows_rejected + ledger.duplicates_merged
    stages = {"ingest": (time.perf_counter() - started, time.process_time() - spent)}
    features = build_features(folder / "run", folder / "run/features", memory_limit=limit)
    return features.all.confidence.nnz, stages


def measure(what, path, options):
    "Run one side in a process of its own; its answer, with the peak of its memory in bytes."
    import psutil

    command = [
        sys.executable,
        __file__,
        "--child",
        what,
        "--folder",
        str(path),
        "--ids",
        options.ids,
        "--memory-limit",
        options.memory_limit,
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0]

    def sample():
        try:
            process = psutil.Process(child.pid)
            while child.poll() is None:
                peak[0] = max(peak[0], process.memory_info().rss)
                time.sleep(0.02)
        except psutil.Error:
            pass

    watch = threading.Thread(target=sample)
    watch.start()
    out, _ = child.communicate()
    watch.join()
    if child.returncode:
        sys.exit(f"{what} failed")
    return json.loads(out) | {"peak": peak[0]}


def child(what, path, options):
    import product_recs.features  # noqa: F401  (imports are not measured)
    import product_recs.ingest  # noqa: F401

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        pairs, stages = {"bare": bare, "ours": ours}[what](path, Path(folder), options.ids, options.memory_limit)
        seconds, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        print(
            json.dumps(
                {
                    "pairs": pairs,
                    "seconds": seconds,
                    "processor": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
                    "stages": stages,
                }
            )
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ids", choices=("number", "text"), default="number")
    parser.add_argument("--bad", type=int, default=0)
    parser.add_argument("--memory-limit", default="2GB", help="of DuckDB, for both")
    parser.add_argument(
        "--folder", type=Path, help="where the log goes for the time of the run; default: the system's temporary folder"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="keep table, figures and plot under benchmarks/results/")
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.folder, options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "log.csv"
        make_log(path, options.rows, options.ids, options.bad)
        measurements = {"bare": [], "ours": []}
        for _ in range(options.rounds):
            for what in measurements:
                measurements[what].append(measure(what, path, options))
        pairs = {what: runs[0]["pairs"] for what, runs in measurements.items()}
        if not options.bad and pairs["bare"] != pairs["ours"]:
            sys.exit(f"the two disagree: {pairs}")
        result = {
            "rows": options.rows,
            "ids": options.ids,
            "bad": options.bad,
            "megabytes": path.stat().st_size / 1e6,
            "duckdb": duckdb.__version__,
            "found": measurements,
        }
    print(table([result]))
    if not options.write:
        return
    out = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
    old = json.loads((out / "ingest.json").read_text(encoding="utf-8")) if (out / "ingest.json").exists() else []
    key = lambda result: (result["rows"], result["ids"], result["bad"])
    results = sorted(
        {key(result): result for result in [*old, result]}.values(), key=key
    )  # results of other files stay
    (out / "ingest.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "ingest.md").write_text(table(results), encoding="utf-8")
    plot(results, out / "ingest.png")


def ratios(result, measured):
    "Ours / bare: median, smallest and largest of the rounds."
    rounds = sorted(
        mine[measured] / theirs[measured] for mine, theirs in zip(result["found"]["ours"], result["found"]["bare"])
    )
    return statistics.median(rounds), rounds[0], rounds[-1]


def middle(runs, measured):
    return statistics.median(run[measured] for run in runs)


def title(result):
    bad = f", {result['bad']:,} bad" if result["bad"] else ""
    return f"{result['rows']:,} rows ({result['megabytes']:,.0f} MB), ids: {result['ids']}{bad}"


def table(results):
    lines = [
        f"From CSV to matrices, {os.cpu_count()} cores, DuckDB {results[-1]['duckdb']}. Ratios: median of the rounds "
        f"(smallest to largest). Bare DuckDB checks nothing and writes nothing; ours checks every value, merges "
        f"repeated deliveries, "
        "fingerprints, and writes the interactions, three snapshots and two targets. Made by `make bench-ingest`.",
        "",
        "| data | what | rounds | seconds | CPU seconds | seconds, ours / bare | CPU seconds, ours / bare | peak of "
        "memory, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for what, runs in result["found"].items():
            against = (
                [
                    f"{median:.2f} ({low:.2f} to {high:.2f})"
                    for median, low, high in (ratios(result, measured) for measured in ("seconds", "processor"))
                ]
                if what == "ours"
                else ["", ""]
            )
            lines.append(
                f"| {title(result)} | {what} | {len(runs)} | {middle(runs, 'seconds'):.1f} | "
                f"{middle(runs, 'processor'):.1f} | {' | '.join(against)} | "
                f"{max(run['peak'] for run in runs) / 2**30:.2f} |"
            )
        ingested = [run["stages"]["ingest"] for run in result["found"]["ours"]]
        lines.append(
            f"| {title(result)} | of ours, ingest | {len(ingested)} | "
            f"{statistics.median(seconds for seconds, _ in ingested):.1f} | "
            f"{statistics.median(used for _, used in ingested):.1f} | | | |"
        )
    return "\n".join(lines) + "\n"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 0.8 * len(results) + 1.4), sharey=True)
    for ax, measured, label in zip(axes, ("seconds", "processor"), ("seconds", "CPU seconds")):
        for place, result in enumerate(results):
            first = statistics.median(
                run["stages"]["ingest"][measured == "processor"] for run in result["found"]["ours"]
            )
            bare, ours = (middle(result["found"][what], measured) for what in ("bare", "ours"))
            for shift, left, width, colour, name in (
                (-0.19, 0, bare, "#b9b9b9", "bare DuckDB"),
                (0.19, 0, first, "#1f77b4", "ours: check, merge, write"),
                (0.19, first, ours - first, "#9ecae1", "ours: matrices"),
            ):
                ax.barh(place + shift, width, 0.36, left=left, color=colour, label=name if place == 0 else None)
            ax.text(ours, place + 0.19, f" {ours / bare:.2f} times", va="center", fontsize=9)
        ax.set_xlabel(label)
        ax.margins(x=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(results)), [title(result).replace("), ", ")\n") for result in results])
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="upper center", ncols=3)
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.3 / fig.get_figheight()))
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
