"""One fit by one library, in a process of its own: `training.py` starts it and reads the line of JSON that it prints.

It needs NumPy, SciPy, threadpoolctl and the library, so that it also runs in the environment of the peers.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

THREADS = os.cpu_count() or 1


def ndcg(users, items, seen, held, k=10):
    "Mean NDCG@k over the whole catalogue without what was seen."
    discount, values = 1 / np.log2(np.arange(2, k + 2)), []
    for start in range(0, len(users), 250):
        scores = users[start : start + 250] @ items.T
        part = seen[start : start + 250]
        scores[np.repeat(np.arange(part.shape[0]), np.diff(part.indptr)), part.indices] = -np.inf
        top = np.argpartition(-scores, k, axis=1)[:, :k]
        top = np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable"), 1)
        hits = np.take_along_axis(held[start : start + 250].toarray() > 0, top, 1)
        best = np.cumsum(discount)[np.minimum(np.diff(held[start : start + 250].indptr), k) - 1]
        values.append((hits * discount).sum(axis=1) / best)
    return float(np.concatenate(values).mean())


def memory(name, process="self"):
    "VmRSS or VmHWM (the highest so far) of a process, in MB."
    return next(
        int(line.split()[1]) / 1e3
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        if line.startswith(name)
    )


def forget_peak():
    "VmHWM begins anew, so that judging does not count as memory of the fit."
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Clock:
    "Time, quality and memory after each iteration; what happens inside of `look` does not count."

    def __init__(self, judge, iterations):
        self.judge, self.last, self.rows, self.wall, self.cpu = judge, iterations, [], 0.0, 0.0
        forget_peak()
        self.before, self.peak = memory("VmRSS"), 0.0
        self.start()

    def start(self):
        self.since, self.spent = time.perf_counter(), sum(os.times()[:2])

    def look(self, users, items):
        self.wall += time.perf_counter() - self.since
        self.cpu += sum(os.times()[:2]) - self.spent
        self.peak = max(self.peak, memory("VmHWM"))
        done = len(self.rows) + 1
        judged = self.judge and (done <= 8 or done % 3 == 0 or done == self.last)
        self.rows.append((self.wall, self.cpu, self.judge(users(), items()) if judged else None))
        forget_peak()
        self.start()


def rotated(clock, matrix, factors, regularization, alpha, iterations):
    from product_recs.models.solver import RotatedALS

    clock = clock()
    model = RotatedALS(matrix, factors, regularization, alpha)
    for _ in range(iterations):
        model.step()
        clock.look(lambda: model.x[:, :factors], lambda: model.y[:, :factors])
    return clock


def implicit(clock, matrix, factors, regularization, alpha, iterations):
    from implicit.cpu.als import AlternatingLeastSquares

    clock = clock()
    model = AlternatingLeastSquares(
        factors=factors,
        regularization=regularization,
        alpha=alpha,
        iterations=iterations,
        random_state=0,
        num_threads=THREADS,
    )
    model.fit(
        matrix,
        show_progress=False,
        callback=lambda *_: clock.look(lambda: model.user_factors, lambda: model.item_factors),
    )
    return clock


def irspack(clock, matrix, factors, regularization, alpha, iterations):
    from irspack import IALSRecommender

    clock = clock()
    extra = matrix.copy()  # its weight of a taken pair is 1 + this
    extra.data = alpha * extra.data - 1
    model = IALSRecommender(
        extra,
        n_components=factors,
        alpha0=1.0,
        reg=regularization,
        nu=0.0,
        loss_type="ORIGINAL",
        solver_type="CG",
        n_threads=THREADS,
        random_seed=0,
    )
    model.start_learning()
    for _ in range(iterations):
        model.run_epoch()
        clock.look(model.get_user_embedding, model.get_item_embedding)
    return clock


def spark(matrix, factors, regularization, alpha, iterations):
    """Seconds an iteration of Spark MLlib, from fits of one and of several iterations: it shows no factors in between,
    and its
    regularization grows with the row, so it does not reach the others' model and is not judged."""
    import pandas as pd
    from pyspark.ml.recommendation import ALS
    from pyspark.sql import SparkSession

    with tempfile.TemporaryDirectory() as folder:
        users = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        pd.DataFrame({"user": users, "item": matrix.indices, "rating": alpha * matrix.data - 1}).to_csv(
            f"{folder}/pairs.csv", index=False
        )
        session = (
            SparkSession.builder.master(f"local[{THREADS}]")
            .config("spark.driver.memory", "8g")
            .config("spark.ui.enabled", "false")
            .config("spark.sql.shuffle.partitions", 2 * THREADS)
            .getOrCreate()
        )
        session.sparkContext.setLogLevel("OFF")
        machine = session._jvm.java.lang.ProcessHandle.current().pid()
        pairs = session.read.csv(f"{folder}/pairs.csv", header=True, schema="user int, item int, rating float").cache()
        pairs.count()

        def fit(number):
            spent, since = (
                sum(
                    map(int, Path(f"/proc/{machine}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[11:13])
                ),
                time.perf_counter(),
            )
            ALS(
                rank=factors,
                maxIter=number,
                regParam=regularization * matrix.shape[0] / matrix.nnz,
                implicitPrefs=True,
                alpha=1.0,
                seed=0,
            ).fit(pairs)
            wall = time.perf_counter() - since
            return wall, (
                sum(
                    map(int, Path(f"/proc/{machine}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[11:13])
                )
                - spent
            ) / os.sysconf("SC_CLK_TCK")

        fit(1)  # compiles
        single, more = fit(1), fit(1 + iterations)
        peak = memory("VmHWM", machine)
        session.stop()
    return {
        "rows": [
            [first + i * (last - first) / iterations for first, last in zip(single, more)] + [None]
            for i in range(iterations + 1)
        ],
        "megabytes": peak,
        "peak": peak,
    }


def main(options):
    from threadpoolctl import threadpool_limits

    data = np.load(options.file)
    matrix, held = (
        csr_matrix((data[n + "data"], data[n + "indices"], data[n + "indptr"]), shape=data[n + "shape"])
        for n in ("train_", "held_")
    )
    given = matrix, options.factors, options.regularization, options.alpha, options.iterations
    if options.arm == "spark":
        result = spark(*given)
    else:
        if options.arm == "implicit":
            import implicit.cpu.als  # noqa: F401  its BLAS is held too
        judged = data["judged"]
        seen = matrix[judged]
        with threadpool_limits(1, "blas"):

            def judge(x, y):
                return ndcg(x[judged], y, seen, held)

            clock = globals()[options.arm](lambda: Clock(judge if len(judged) else None, options.iterations), *given)
        result = {"rows": clock.rows, "megabytes": clock.peak - clock.before, "peak": clock.peak}
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=("rotated", "implicit", "irspack", "spark"))
    parser.add_argument("file")
    for name, kind in (("factors", int), ("iterations", int), ("regularization", float), ("alpha", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    main(parser.parse_args())
