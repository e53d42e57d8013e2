"""A driver of a standalone cluster in a process of its own: ALS and a batch by Spark, while the test kills a worker."""

import sys
from pathlib import Path

import numpy as np
from scipy.sparse import load_npz

from product_recs.jobs.batch import Helpers, Question, open_for_batch, write_batch
from product_recs.models.shards import FitPlan, Sharding, fit_sharded
from product_recs.models.spark import spark_engine


def main(url, folder, models):
    folder = Path(folder)
    options = {"spark.executor.memory": "512m", "spark.executor.cores": "1", "spark.driver.host": "127.0.0.1",
               "spark.driver.bindAddress": "127.0.0.1", "spark.worker.timeout": "10"}  # fmt: skip
    with spark_engine(url, options) as engine:
        (folder / "slots").write_text(str(engine.slots))
        say = lambda iteration, loss: (folder / f"iteration-{iteration}").touch()
        plan = FitPlan(factors=16, iterations=8, regularization=3.0, alpha=2.0)
        users, items, _ = fit_sharded(load_npz(folder / "confidence.npz"), plan, Sharding(engine, str(folder)), say)
        np.savez(folder / "factors.npz", users=users, items=items)
        with open_for_batch(models, feedback="") as recommender:
            write_batch(recommender, Question(n=5), folder / "lists", part=8, progress=False,
                        helpers=Helpers(engine, models, ""))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
