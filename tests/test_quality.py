"""benchmarks/quality.py as a user starts it: a folder of two Parquet files in, a table out."""

import json
import re
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
    names = "popularity,cosine,bm25,graph,implicit,als,als-1024,low-pass,chebycf,ease,blend"
    done = run(folder, "--models", names, "--factors", "2")
    assert done.returncode == 0, done.stderr
    results = {
        result["model"]: result for result in json.loads((folder / "out" / f"quality-{folder.name}.json").read_text())
    }
    best = (39 + 1 / 2) / 40  # the one user with an unknown item finds one of two
    assert set(results) >= {"item graph", "ALS, 2 factors", "ALS of implicit, 2 factors", "low-pass", "ChebyCF", "EASE"}
    assert all(result["recall"] == pytest.approx(best) for name, result in results.items() if name != "popularity")
    assert results["popularity"]["ndcg"] < results["EASE"]["ndcg"]
    assert all(result["users"] == 40 for result in results.values())
    table = (folder / "out" / f"quality-{folder.name}.md").read_text()
    assert "| **item graph** |" in table and table.strip() in done.stdout
    assert "ALS, 2 factors minus ALS of implicit, 2 factors: +0.0000" in table
    assert "SimpleX" not in table  # the published figures are of another split


def test_parameters_are_chosen_without_the_test(folder, tmp_path):
    "What is chosen on the validation is the same when the test is another one."
    chosen = {}
    for name, keep in (("all", 41), ("half", 20)):
        other = tmp_path / name
        other.mkdir()
        pd.read_parquet(folder / "train.parquet").to_parquet(other / "train.parquet")
        pd.read_parquet(folder / "test.parquet").head(keep).to_parquet(other / "test.parquet")
        done = run(other, "--models", "graph,ease", "--tilt", "0.2", "--ease-max-size", "30")
        assert done.returncode == 0, done.stderr
        chosen[name] = re.findall("graph: .* on validation, best of .*", done.stderr)
        assert "40 users and 40 items have a past, and the limit max_size is 30" in done.stdout
        assert "ease is left out" in done.stdout and "tilt 0.2" in done.stdout
    assert chosen["all"] == chosen["half"] and len(chosen["all"]) == 1


@pytest.mark.parametrize(
    "options, message",
    [(["--models", "popularity,magic"], "unknown magic; there are popularity, cosine"), ([], "the file is missing")],
)
def test_mistakes_are_named(tmp_path, options, message):
    done = run(tmp_path, *options)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_a_bundle_of_a_model_answers_the_same_lists(folder):
    out = folder / "served"
    done = run(folder, "--models", "graph,als,chebycf", "--factors", "4", "--served", "--out", out)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / f"quality-{folder.name}.json").read_text())
    assert len(results) == 3
    for result in results:
        served = result["served"]
        assert served["megabytes"] > 0 and (served["user_bytes"] > 0) == ("ALS" in result["model"])
        assert served["other_lists"] == 0 and served["blocks"] == 40 and 0 < served["p50"] <= served["p99"]
        assert ("other_seed" in result) == (result["model"] != "item graph")
    assert "Served:" in done.stdout


def test_rows_of_models_that_a_run_leaves_out_stay(folder):
    out = folder / "twice"
    for models in ("popularity,cosine", "graph"):
        done = run(folder, "--models", models, "--out", out)
        assert done.returncode == 0, done.stderr
    results = json.loads((out / f"quality-{folder.name}.json").read_text())
    assert {result["model"] for result in results} == {"popularity", "item-item cosine", "item graph"}
    assert all(result["command"].startswith("`python benchmarks/quality.py ") for result in results)
