"""ALS and lists by Spark: in local mode, as the job's parameters, and on a cluster whose workers are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest
from scipy.sparse import csr_matrix, save_npz
from spark_cluster import cluster, kill
from support import (
    ROOT, bare_environment, call, fresh_project, pairs_of_many_blocks, publish_board, train, until,
)  # fmt: skip

from product_recs.bundle.opening import open_bundle
from product_recs.core.errors import TrainError
from product_recs.features import build_features
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
from product_recs.ingest import ingest
from product_recs.jobs.batch import BatchError, Helpers, Question, open_for_batch, write_batch
from product_recs.models.als import fit_als
from product_recs.models.interface import top_lists
from product_recs.models.shards import (
    OneProcess,
    FitPlan,
    ShardedFit,
    ShardFolder,
    Sharding,
    fit_sharded,
    fitted_factors,
    remove_from,
    run_fit,
    sharding,
    write_matrix,
)
from product_recs.models.solver import RotatedALS
from product_recs.models.spark import engine_named, spark_engine, spark_missing, write_matrix_by
from product_recs.models.spark_pairs import pairs_of_log

needs_spark = pytest.mark.skipif(bool(spark_missing()), reason=spark_missing() or "it is there")


@pytest.fixture(scope="module")
def engine():
    "One session for the file: it takes seconds to start."
    with spark_engine("local[2]", {"spark.sql.shuffle.partitions": 4}) as started:
        yield started


@pytest.fixture(scope="module")
def confidence():
    return pairs_of_many_blocks()


def rows_of(folder):
    return duckdb.sql(f"SELECT * FROM read_parquet('{folder}/*.parquet') ORDER BY user_id, rank").fetchall()


@needs_spark
def test_the_factors_are_those_of_one_process(engine, confidence, tmp_path):
    alone = RotatedALS(confidence, 16, 3.0, 2.0, num_threads=1, unobserved_weight=0.4, nu=0.2)
    for _ in range(3):
        alone.step()
    alone.solve_users()
    plan = FitPlan(factors=16, iterations=3, regularization=3.0, alpha=2.0, nu=0.2, unobserved_weight=0.4)
    users, items, losses = fit_sharded(confidence, plan, Sharding(engine, str(tmp_path), 3))
    assert np.abs(users - alone.user_factors).max() < 1e-4
    assert np.abs(items - alone.item_factors).max() < 1e-4
    assert losses[-1][1] == pytest.approx(alone.loss(), rel=1e-5) and not [*tmp_path.glob("als-*")]


@needs_spark
def test_the_defaults_of_als(engine, confidence, tmp_path):
    with sharding(engine, tmp_path):
        by_spark = fit_als(confidence, iterations=2, progress=False)
    alone = fit_als(confidence, iterations=2, solver="rotated", progress=False)
    assert by_spark.parameters == alone.parameters and by_spark.scale == alone.scale
    scores = [model.user_factors[:500] @ model.item_factors.T for model in (by_spark, alone)]
    assert np.abs(scores[0] - scores[1]).max() < 1e-4 * np.abs(scores[1]).max()


@needs_spark
def test_a_log_by_spark_is_the_log_of_the_features(engine, tmp_path):
    "The same ids, confidences and factors, from what the ingest wrote."
    ingest(ROOT / "data/interactions.csv", tmp_path / "run", progress=False)
    log = engine.session.read.parquet(str(tmp_path / "run/interactions.parquet"))
    for given in ({}, {"half_life_days": 30, "weighting": "log1p", "quantity": "log1p", "min_item_users": 40,
                       "min_user_items": 8}):  # fmt: skip
        features = build_features(tmp_path / "run", tmp_path / "features", **given)
        made = pairs_of_log(engine, log, **given)
        expected = features.all.confidence
        assert made.shape == expected.shape
        rows = made.pairs.toArrow()
        user, item, value = (rows[name].to_numpy() for name in ("user", "item", "confidence"))
        by_spark = csr_matrix((value, (user, item)), shape=made.shape)
        assert by_spark.nnz == expected.nnz and abs(by_spark - expected).max() < 1e-5 * expected.max()
        for side, ids in (("user", features.users), ("item", features.items)):
            frame = getattr(made, f"{side}s").orderBy("row").toArrow()
            assert frame[f"{side}_id"].to_pylist() == ids.ids.tolist()
    folder, plan = ShardFolder(tmp_path / "fit"), FitPlan(factors=8, iterations=3)
    write_matrix_by(engine, made.pairs, made.shape, folder, 2)
    fit = ShardedFit(folder, plan, engine)
    run_fit(fit)
    alone = RotatedALS(expected, 8, num_threads=1)
    for _ in range(3):
        alone.step()
    alone.solve_users()
    users, items = fitted_factors(fit)
    assert np.abs(users @ items.T - alone.user_factors @ alone.item_factors.T).max() < 1e-4


@needs_spark
def test_a_failure_comes_back_as_a_sentence(engine, confidence, tmp_path):
    with pytest.raises(TrainError, match=r"failed 3 times: FileNotFoundError.*What is done is kept"):
        fit_without_pairs(confidence, Sharding(engine, str(tmp_path)))


def fit_without_pairs(confidence, use):
    "The matrix of the workers is not there: the folder is not the same for all."
    folder = ShardFolder(f"{use.place}/fit")
    write_matrix(folder, confidence, 2)
    remove_from(folder, "matrix")
    run_fit(ShardedFit(folder, FitPlan(factors=8, iterations=1), use.engine))


@needs_spark
def test_the_lists_are_those_of_one_process(engine, tmp_path):
    publish_board(tmp_path / "models", range(1, 121), range(1001, 1121))
    store = f"sqlite:///{tmp_path}/feedback.db"
    with Store(store).open() as opened:
        opened.add_events([NewEvent(1, 1003, "deny"), NewEvent(77, 1002), NewEvent(9999, 1004)])
        opened.set_availability({1005: False})
    helpers = Helpers(engine, tmp_path / "models", store)
    asked = {"part": 25, "progress": False}
    with open_for_batch(tmp_path / "models", feedback=store) as live:
        for question in (Question(n=5), Question("similar", n=4), Question("audience", n=7, items=[1001, 1002])):
            alone, helped = tmp_path / f"{question.kind}-alone", tmp_path / f"{question.kind}-helped"
            expected = write_batch(live, question, alone, **asked).manifest
            manifest = write_batch(live, question, helped, helpers=helpers, **asked).manifest
            rows = duckdb.sql(f"FROM read_parquet('{alone}/*.parquet', filename=false)").fetchall()
            assert rows and rows == duckdb.sql(f"FROM read_parquet('{helped}/*.parquet')").fetchall()
            assert manifest["rungs"] == expected["rungs"] and manifest["audiences"] == expected["audiences"]
        with pytest.raises(BatchError, match="another feedback store than the driver"):
            write_batch(live, Question(n=5), tmp_path / "x", helpers=Helpers(engine, tmp_path / "models", ""), **asked)


@needs_spark
def test_the_job_takes_an_engine(tmp_path):
    project = fresh_project(tmp_path)
    version_of_local = train(tmp_path / "alone", next_model="none", iterations=3, loss_every=5)
    local = open_bundle(tmp_path / "alone/models", version_of_local)
    assert local.manifest["metrics"]["engine"] == {"name": "local"}
    parameters = ["model=ALS", "next_model=none", "factors=8", "iterations=3", "publish_bundle=False", "engine=spark",
                  "spark_master=local[2]"]  # fmt: skip
    words = [word for text in parameters for word in ("-p", *text.split("=", 1))]
    done = call(project, "papermill", "nbs/03_train.ipynb", "out.ipynb", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    version = json.loads((project / "reports/sample/metrics.json").read_text())["03_train"]["version"]
    spark = open_bundle(project / "models", version, verify=True)
    facts = spark.manifest["metrics"]["engine"]
    assert (facts["name"], facts["master"], facts["slots"]) == ("spark", "local[2]", 2)
    assert spark.manifest["parts"].keys() == local.manifest["parts"].keys()
    assert spark.model().parameters == local.model().parameters
    assert {*spark.manifest["files"]} == {*local.manifest["files"]}
    users = np.arange(len(local.users))
    assert np.array_equal(top_lists(spark.model(), users, 10)[0], top_lists(local.model(), users, 10)[0])
    assert not [*(project / "data/shards").glob("als-*")]


@pytest.mark.slow
@needs_spark
def test_workers_are_killed(confidence, tmp_path):
    "One in the middle of ALS and, with another in its place, one in the middle of a batch: all comes out the same."
    save_npz(tmp_path / "confidence.npz", confidence)
    publish_board(tmp_path / "models", range(1, 241), range(1001, 1241))
    with cluster(tmp_path) as running:
        environment = bare_environment(PRODUCT_RECS_ROOT=str(tmp_path), PYTHONPATH=str(ROOT))
        environment["PYSPARK_PYTHON"] = sys.executable
        with open(tmp_path / "driver.log", "wb") as log:
            driver = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("spark_child.py")), running.url, str(tmp_path),
                 str(tmp_path / "models")],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            going_on = lambda name: driver.poll() is not None or [*tmp_path.glob(name)]
            until(lambda: going_on("iteration-3"), 90)
            kill(running.workers[0])
            running.add()
            until(lambda: going_on(".lists.work/part-00002.json"), 120)
            kill(running.workers[1])
            assert driver.wait(120) == 0, (tmp_path / "driver.log").read_text()[-3000:]
        finally:
            driver.kill()
    plan = FitPlan(factors=16, iterations=8, regularization=3.0, alpha=2.0)
    alone = fit_sharded(confidence, plan, Sharding(OneProcess(), str(tmp_path / "alone")))
    factors = np.load(tmp_path / "factors.npz")
    assert np.array_equal(factors["users"], alone[0]) and np.array_equal(factors["items"], alone[1])
    with open_for_batch(tmp_path / "models", feedback="") as live:
        write_batch(live, Question(n=5), tmp_path / "lists-alone", progress=False)
    assert rows_of(tmp_path / "lists") == rows_of(tmp_path / "lists-alone")


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(TrainError, match=r"engine='spark': .*(install Java 17|pip install 'product-recs\[spark\]')"):
        with engine_named("spark"):
            pass
    old = tmp_path / "bin/java"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    os.chmod(old, 0o755)
    assert "pip install" in spark_missing() or "is Java 11, and Spark needs 17; install Java 17" in spark_missing()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"engine": "dask"}, "engine='dask': must be local or spark"),
        ({"engine": "spark", "master": "yarn://x"}, "spark_master='yarn://x': must be local"),
        ({"engine": "spark", "options": {"memory": "2g"}}, r"spark_options\['memory'\]"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(TrainError, match=message):
        with engine_named(**parameters):
            pass
