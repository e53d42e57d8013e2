"""ALS by our kernels over Spark, by Spark's MLlib, and in one process: seconds an iteration and memory, by size.

    python benchmarks/spark.py [--sizes 1,5,50] [--iterations 3] [--write]
    python benchmarks/spark.py --kill [--write]

Generated interactions lie in Parquet: users and products as for `benchmarks/training.py --scale`, popularity with a
long tail, 64 factors. Each arm is a process of its own, so that its memory can be read. `ours` is Spark in local[2]:
Spark cuts the pairs into shards of both sides, then `models/shards` fits; the JVM has at most 2 GiB, and the table
has the largest Python worker beside it. `MLlib` reads the same pairs; its time is the difference of two fits with
one and three iterations, it has another objective (its regularization grows with the row, no weight of
untaken cells), and it is left out above `--mllib` million pairs. `one` is `RotatedALS` on both cores, in memory.

`--kill` fits the first of the sizes on a standalone cluster on loopback, a master and two workers with 2 GiB each,
kills one worker with -9 in the middle, and holds the factors against those of one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SIZES = {1: (100_000, 20_000), 5: (400_000, 50_000), 50: (1_000_000, 100_000)}  # million pairs -> users, items
OBJECTIVE = {"factors": 64, "regularization": 20.0, "alpha": 1.0}


def generate(folder, millions):
    "Parquet files of pairs; the same numbers each time."
    import pyarrow as pa
    from pyarrow import parquet

    users, items = SIZES[millions]
    draw, wanted, step = np.random.default_rng(millions), int(1.12 * millions * 1e6 / users), 50_000
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, users, step):
        target = folder / f"pairs-{start:07}.parquet"
        count = draw.poisson(wanted, step) + 1
        user = np.repeat(np.arange(start, start + step), count)
        item = (items * draw.random(len(user)) ** 2.5).astype(np.int64)
        pairs = np.unique(user * items + item)
        columns = {"user": (pairs // items).astype(np.int32), "item": (pairs % items).astype(np.int32),
                   "confidence": draw.integers(1, 6, len(pairs)).astype(np.float32)}  # fmt: skip
        parquet.write_table(pa.table(columns), target, row_group_size=500_000)
    return folder


def read(folder, millions):
    "All pairs in memory."
    from pyarrow import parquet
    from scipy.sparse import csr_matrix

    table = parquet.read_table(folder)
    user, item, value = (table[name].to_numpy() for name in ("user", "item", "confidence"))
    del table
    return csr_matrix((value, (user, item)), shape=SIZES[millions])


class Watch(threading.Thread):
    "The largest memory of each process below this one, by whether it is a JVM, in MB; twice a second."

    def __init__(self):
        super().__init__(daemon=True)
        self.peaks = {"java": 0.0, "python": 0.0}
        self.start()

    def run(self):
        import psutil

        while True:
            for process in psutil.Process().children(recursive=True):
                try:
                    kind = "java" if "java" in process.name() else "python"
                    memory = process.memory_full_info()
                    self.peaks[kind] = max(self.peaks[kind], (memory.uss if kind == "python" else memory.rss) / 1e6)
                except psutil.Error:
                    pass
            time.sleep(0.5)


def peak_of_self():
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


class Clock:
    "Wall and CPU seconds of each iteration, of this process and all below it."

    def __init__(self):
        self.marks = []
        self.look()

    def look(self, *_):
        import psutil

        spent = sum(psutil.Process().cpu_times()[:2])
        for process in psutil.Process().children(recursive=True):
            try:
                spent += sum(process.cpu_times()[:2])
            except psutil.Error:
                pass
        self.marks.append((time.perf_counter(), spent))

    def medians(self, first=0):
        wall, cpu = np.median(np.diff(self.marks[first:], axis=0), axis=0)
        return {"seconds": float(wall), "cpu": float(cpu)}


def one(folder, millions, iterations):
    from product_recs.models.solver import RotatedALS

    matrix, began = read(folder, millions), time.perf_counter()
    model = RotatedALS(matrix, **OBJECTIVE)
    setup, clock = time.perf_counter() - began, Clock()
    for _ in range(iterations):
        model.step()
        clock.look()
    return {"pairs": int(matrix.nnz), "setup": setup, "driver": peak_of_self()} | clock.medians()


SETTINGS = {"spark.driver.memory": "2g", "spark.sql.shuffle.partitions": "8"}


def ours(folder, millions, iterations, place):
    from product_recs.models.shards import PAIRS_OF_A_SHARD, FitPlan, ShardedFit, ShardFolder, run_fit
    from product_recs.models.spark import spark_engine, write_matrix_by

    watch = Watch()
    with spark_engine("local[2]", SETTINGS) as engine:
        began, shards = time.perf_counter(), ShardFolder(place)
        pairs = engine.session.read.parquet(str(folder))
        wanted = max(4, -(-int(millions * 1e6) // PAIRS_OF_A_SHARD))
        note = write_matrix_by(engine, pairs, SIZES[millions], shards, wanted)
        setup, clock = time.perf_counter() - began, Clock()
        # the first one has the walk before it
        run_fit(ShardedFit(shards, FitPlan(**OBJECTIVE, iterations=iterations + 1, loss_every=0), engine), clock.look)
    peaks = {"jvm": watch.peaks["java"], "worker": watch.peaks["python"], "driver": peak_of_self()}
    return {"pairs": note["pairs"], "setup": setup, "shards": wanted} | clock.medians(1) | peaks


def mllib(folder, millions, iterations):
    from pyspark.ml.recommendation import ALS

    from product_recs.models.spark import spark_engine

    watch, clocks = Watch(), []
    with spark_engine("local[2]", SETTINGS | {"spark.driver.memory": "8g"}) as engine:
        pairs = engine.session.read.parquet(str(folder)).cache()
        count = pairs.count()
        for number in (2, 1, 3):  # the first one compiles
            clocks.append(Clock())
            ALS(userCol="user", itemCol="item", ratingCol="confidence", rank=64, maxIter=number, implicitPrefs=True,
                regParam=0.1, alpha=1.0, seed=0).fit(pairs)  # fmt: skip
            clocks[-1].look()
    _, single, more = (clock.medians() for clock in clocks)
    spent = {name: (more[name] - single[name]) / 2 for name in single}
    return {"pairs": count, "setup": None, "jvm": watch.peaks["java"], "driver": peak_of_self()} | spent


def cluster_fit(folder, millions, url, place):
    "A driver of the standalone cluster."
    from product_recs.models.shards import FitPlan, ShardedFit, ShardFolder, fitted_factors, run_fit
    from product_recs.models.spark import spark_engine, write_matrix_by

    options = SETTINGS | {"spark.executor.memory": "1g", "spark.executor.cores": "1", "spark.driver.host": "127.0.0.1",
                          "spark.driver.bindAddress": "127.0.0.1"}  # fmt: skip
    with spark_engine(url, options) as engine:
        shards = ShardFolder(place)
        write_matrix_by(engine, engine.session.read.parquet(str(folder)), SIZES[millions], shards, 4)
        fit = ShardedFit(shards, FitPlan(**OBJECTIVE, iterations=4, loss_every=0), engine)
        run_fit(fit)
        users, items = fitted_factors(fit)
    np.savez(Path(place) / "factors.npz", users=users, items=items)
    return {"halves": fit.seconds}


def killed(folder, millions):
    "One worker of two is killed in the middle of ALS."
    from spark_cluster import cluster, kill
    from support import until

    from product_recs.models.solver import RotatedALS

    with tempfile.TemporaryDirectory() as work, cluster(Path(work), memory="2g") as running:
        place = Path(work) / "fit"
        command = [sys.executable, __file__, "--arm", "cluster", "--sizes", str(millions), "--data", str(folder),
                   "--place", str(place), "--url", running.url]  # fmt: skip
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        done = place / "halves/0006/half.json"
        until(lambda: done.exists() or driver.poll() is not None, 900)
        kill(running.workers[0])
        line = driver.communicate(timeout=1800)[0].splitlines()[-1]
        factors = np.load(place / "factors.npz")
        users, items = factors["users"], factors["items"]
        alive = running.alive()
    alone = RotatedALS(read(folder, millions), **OBJECTIVE, num_threads=2)
    for _ in range(4):
        alone.step()
    alone.solve_users()
    difference = max(np.abs(users - alone.user_factors).max(), np.abs(items - alone.item_factors).max())
    return {"workers_at_the_end": alive, "largest_difference": float(difference),
            "halves": json.loads(line)["halves"], "millions": millions}  # fmt: skip


def measure(arm, millions, data, iterations):
    with tempfile.TemporaryDirectory(dir=data.parent) as place:
        command = [sys.executable, __file__, "--arm", arm, "--sizes", str(millions), "--data", str(data),
                   "--place", place, "--iterations", str(iterations)]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{arm} with {millions} million pairs ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def page(figures):
    lines = [
        "# ALS over Spark",
        "",
        f"Made by `make bench-spark` on {figures['cores']} cores, which other work shared, with 64 factors; "
        f"medians of {figures['iterations']} iterations. CPU seconds are those of all processes of an arm. `ours` and "
        f"MLlib are Spark {figures['spark']} in local[2]; the JVM of `ours` may have 2 GiB, that of MLlib 8. Setup is "
        "what comes before the first iteration: for `ours` Spark's cut into shards, for one process the transposed "
        "matrix. MB are the peak of the JVM, of the largest Python worker and of the driver. MLlib has another "
        "objective, and was left out where it would take hours.",
        "",
        "| million pairs | arm | s an iteration | CPU s | CPU ns a pair | setup, s | JVM, MB | worker, MB "
        "| driver, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shown = lambda value, form=",.0f": "" if value is None else format(value, form)
    for row in sorted(figures.get("rows", ()), key=lambda row: row["pairs"]):
        lines.append(
            f"| {row['pairs'] / 1e6:.1f} | {row['arm']} | {row['seconds']:.2f} | {row['cpu']:.2f} | "
            f"{row['cpu'] / row['pairs'] * 1e9:.0f} | {shown(row['setup'], '.1f')} | {shown(row.get('jvm'))} | "
            f"{shown(row.get('worker'))} | {shown(row['driver'])} |"
        )
    if kill := figures.get("kill"):
        lines += [
            "",
            "**A worker killed.** A standalone master and two workers on loopback, "
            f"{kill['millions']} million pairs, one worker killed with -9 in the middle of the second iteration: the "
            "fit went on with the other, and its factors differ from those of one process by at most "
            f"{kill['largest_difference']:.1e}.",
        ]
    lines += ["", "One process wins as long as the matrix fits into its memory; Spark is for what does not."]
    return "\n".join(lines) + "\n"


def keep(figures, options):
    if not options.write:
        return
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "spark.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (out / "spark.md").write_text(page(figures), encoding="utf-8")


def main(options):
    sizes = [int(size) for size in options.sizes.split(",")]
    if options.arm:
        given = Path(options.data), sizes[0]
        if options.arm == "cluster":
            result = cluster_fit(*given, options.url, options.place)
        elif options.arm == "ours":
            result = ours(*given, options.iterations, options.place)
        else:
            result = {"one": one, "mllib": mllib}[options.arm](*given, options.iterations)
        return print(json.dumps(result))
    from product_recs.models.spark import spark_missing

    if missing := spark_missing():
        raise SystemExit(f"Spark cannot be measured: {missing}")
    import pyspark

    file = Path(options.out) / "spark.json"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    figures |= {"cores": os.cpu_count(), "spark": pyspark.__version__, "iterations": options.iterations}
    data = Path(options.data or ROOT / "build/bench/spark")
    if options.kill:
        figures["kill"] = killed(generate(data / str(sizes[0]), sizes[0]), sizes[0])
    else:
        figures["rows"] = []
        arms = [(millions, arm) for millions in sizes for arm in ("one", "ours")]
        for millions, arm in [*arms, *((millions, "mllib") for millions in sizes if millions <= options.mllib)]:
            row = {"arm": {"one": "one process", "mllib": "MLlib"}.get(arm, arm)}
            row |= measure(arm, millions, generate(data / str(millions), millions), options.iterations)
            figures["rows"].append(row)
            print(f"{millions:3} million pairs, {row['arm']:12} {row['seconds']:8.2f} s an iteration", flush=True)
            keep(figures, options)
    keep(figures, options)
    print(page(figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,5,50", help="million pairs: 1, 5, 50")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--mllib", type=int, default=1, help="largest size for MLlib, million pairs")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results"))
    parser.add_argument("--data", default="")
    parser.add_argument("--arm", choices=("one", "ours", "mllib", "cluster"), help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    main(parser.parse_args())
