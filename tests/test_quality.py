"""benchmarks/quality.py as a user starts it: a folder of two Parquet files in, a table out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(folder, *options):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/quality.py", folder, "--out", folder / "out", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkerboard of 40 users with ids of their own; the test holds each user's own item. One more user likes an item
    that only the test knows."""
    folder = tmp_path_factory.mktemp("board")
    user, item = np.nonzero((np.add.outer(np.arange(40), np.arange(40)) % 2 == 0) & ~np.eye(40, dtype=bool))
    pd.DataFrame({"user_id": user * 10, "item_id": item + 1000}).to_parquet(folder / "train.parquet")
    pd.DataFrame({"user_id": [*np.arange(40) * 10, 10], "item_id": [*np.arange(40) + 1000, 5000]}).to_parquet(
        folder / "test.parquet"
    )
    return folder


def test_models_solve_the_board_and_popularity_counts_by_definition(folder):
    done = run(
        folder,
        "--models",
        "popularity,cosine,graph,weighted-als,low-pass,chebycf,blend,blend-chebycf,ease,blend-ease",
        "--factors",
        "4",
        "--patterns",
        "2",
        "--chebycf-patterns",
        "2",
        "--regularization",
        "1",
    )
    assert done.returncode == 0, done.stderr
    results = {
        result["model"]: result for result in json.loads((folder / "out" / f"quality-{folder.name}.json").read_text())
    }
    best = (39 + 1 / 2) / 40  # the one user with an unknown item finds one of two
    for name in (
        "item-item cosine",
        "item graph",
        "weighted ALS",
        "low-pass",
        "ChebyCF",
        "0.5 weighted ALS + 0.3 ChebyCF + 0.2 item graph",
        "EASE",
        "0.45 weighted ALS + 0.4 item graph + 0.15 low-pass",
        "0.4 weighted ALS + 0.11 item graph + 0.17 low-pass + 0.32 EASE",
    ):
        assert results[name]["recall"] == pytest.approx(best), name
    assert results["popularity"]["ndcg"] < results["EASE"]["ndcg"]
    assert all(result["users"] == 40 for result in results.values())
    table = (folder / "out" / f"quality-{folder.name}.md").read_text()
    assert "| **item graph** |" in table and table.strip() in done.stdout
    assert "SimpleX" not in table  # the published figures are of another split


def test_validation_takes_nothing_from_the_test(folder):
    done = run(folder, "--models", "popularity,ease", "--validate", "--ease-max-size", "30")
    assert done.returncode == 0, done.stderr
    assert (
        "40 users and 40 items have a past, and the limit max_size is 30" in done.stderr
        and "ease is left out" in done.stderr
    )
    table = (folder / "out" / f"quality-{folder.name}-validation.md").read_text()
    assert "a tenth of train, held out" in table and "680 pairs in train, 80 judged" in table


@pytest.mark.parametrize(
    "options, message",
    [(["--models", "popularity,magic"], "unknown magic; there are popularity, cosine"), ([], "the file is missing")],
)
def test_mistakes_are_named(tmp_path, options, message):
    done = run(tmp_path, *options)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_a_bundle_of_a_model_answers_the_same_lists(folder):
    out = folder / "served"
    models = ["--models", "graph,weighted-als,chebycf", "--factors", "4", "--chebycf-patterns", "2"]
    done = run(folder, *models, "--served", "--out", out)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / f"quality-{folder.name}.json").read_text())
    assert len(results) == 3
    for result in results:
        served = result["served"]
        assert served["megabytes"] > 0 and (served["user_bytes"] > 0) == ("ALS" in result["model"])
        assert served["other lists"] == 0 and 0 < served["p50"] <= served["p99"]
        assert abs(served["recall"] - result["recall"]) < 1e-9 and abs(served["ndcg"] - result["ndcg"]) < 1e-9
    assert "Served:" in done.stdout


def test_rows_of_models_that_a_run_leaves_out_stay(folder):
    out = folder / "twice"
    for models in ("popularity,cosine", "graph"):
        done = run(folder, "--models", models, "--out", out)
        assert done.returncode == 0, done.stderr
    results = json.loads((out / f"quality-{folder.name}.json").read_text())
    assert {result["model"] for result in results} == {"popularity", "item-item cosine", "item graph"}
    assert all(result["command"].startswith("`python benchmarks/quality.py ") for result in results)
