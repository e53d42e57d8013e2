"""Tuning as a user runs it: goes on where it was, survives kill -9, never mixes data, and its answer runs."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest
import yaml
from support import QUICK, call, fresh_project, only_the_jobs

from product_recs.bundle.opening import open_bundle
from product_recs.features import build_features, ensure_features
from product_recs.ingest import ingest
from product_recs.jobs.halving import Record, past_searches
from product_recs.jobs.tune import Judge, choose_candidates, entrants_of, pose, search_tasks, tuned_models
from product_recs.jobs.weights import FEATURE_NAMES
from product_recs.models.interface import with_parts


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "A project that was tuned twice, by the command and by papermill, with what each said."
    root = fresh_project(tmp_path_factory.mktemp("tune"))
    only_the_jobs(root)
    (root / "quick.yaml").write_text(QUICK)
    said = []
    papermill = (
        "papermill",
        "nbs/jobs/tune.ipynb",
        "reports/again.ipynb",
        "-f",
        "tune.yaml",
        "-p",
        "budget_minutes",
        "4",
    )
    (root / "tune.yaml").write_text(
        "".join(
            line + "\n"
            for line in QUICK.splitlines()
            if line.split(":")[0]
            in ("max_trials", "candidates", "max_factors", "max_iterations", "max_users", "test_seeds", "bootstrap")
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # of the processes, in all tests of this file
        for command in (
            ("product-recs", "tune", "--name", "sample", "-f", "quick.yaml", "--minutes", "3", "--quiet"),
            papermill,
        ):
            done = call(root, *command)
            assert done.returncode == 0, done.stderr
            said.append((done.stdout, json.loads((root / "reports" / "sample" / "metrics.json").read_text())))
        yield root, said


@pytest.mark.slow
def test_a_second_call_goes_on(tuned):
    _, ((out, first), (_, second)) = tuned
    a, b = (metrics["tune"]["tasks"]["discovery"] for metrics in (first, second))
    assert (a["earlier_trials"], a["trials"], b["earlier_trials"], b["trials"]) == (0, 8, 8, 16)
    assert a["study"] == b["study"]
    assert [metrics["tune"]["parameters"]["budget_minutes"] for metrics in (first, second)] == [3, 4]
    starts = [value for origin, value in a["starting_points"].items() if origin.startswith("EASE: ")]
    assert b["validation_ndcg"]["EASE"] >= a["validation_ndcg"]["EASE"] >= max(starts)
    assert a["sentence"] in out and "best_discovery.yaml" in out
    assert a["ended"]["sentence"] in out and a["ended"]["by"] == "trials" and a["ended"]["trials"] == 8
    assert [entry["trials"] for entry in b["history"]] == [8, 8] and a["history"] == b["history"][:1]
    assert all(edge["sentence"] in out for edge in a["edges"])
    assert sum(row["trials"] for row in b["budget"]) == 16 and len(b["competition"]["windows"]) > 1


def test_the_winner_meets_what_a_shop_has_already(tuned):
    _, ((_, first), _) = tuned
    task = first["tune"]["tasks"]["discovery"]
    names = [row["name"] for row in task["test"]]
    assert names[0] == f"tuned {task['competition']['winner']}"
    assert {"popularity", "buy again", *task["roles"]} <= set(names) and len(task["roles"]) == 1
    assert {row["model"] for row in task["figures"]} == set(names)
    values = [row["test"] for row in task["figures"]]
    assert values == sorted(values, reverse=True)
    [served] = [row for row in task["test"] if row["name"] in task["roles"]]
    worth = (
        "was worth it"
        if served["lead_low"] > 0
        else "was not worth it"
        if served["lead_high"] < 0
        else "changes little"
    )
    assert f"Discovery: tuning {worth}: " in task["sentence"] and served["name"] in task["sentence"]


def test_the_answer_runs_and_the_reports_stay(tuned):
    root, (_, (_, metrics)) = tuned
    best = yaml.safe_load((root / "data/processed/sample/best_discovery.yaml").read_text())
    task = metrics["tune"]["tasks"]["discovery"]
    assert best == task["best"] == yaml.safe_load((root / "reports/sample/best_discovery.yaml").read_text())
    (root / "yours.yaml").write_text("model: ALS\nfactors: 3\nbootstrap: 100\nmodels: [popularity, ALS]\n")
    files = ("-f", "yours.yaml", "-f", "data/processed/sample/best_discovery.yaml")
    done = call(root, "product-recs", "run", "--name", "sample", *files, "--quiet")
    assert done.returncode == 0, done.stderr
    bundle = open_bundle(root / "models")
    served, features = bundle.model("discovery"), bundle.manifest["parameters"]["features"]
    assert served.name == best["model"] == task["competition"]["winner"]
    singles = {part.name: part.parameters for part in with_parts(served) if not part.parts}
    assert best["model_parameters"] and all(
        singles[name] | given == singles[name] for name, given in best["model_parameters"].items()
    )
    assert all(features[name] == value for name, value in best.items() if name in FEATURE_NAMES)
    page = (root / "reports/sample/index.html").read_text()
    assert "tune.html" in page and "04_evaluate.html" in page and (root / "reports/sample/weights.html").exists()
    assert (root / "data/processed/sample/tune.db").exists()


def test_a_wrong_value_of_the_file_is_named(tmp_path):
    root = fresh_project(tmp_path)
    only_the_jobs(root)
    (root / "wrong.yaml").write_text("model: EASE + item graph\nmodel_parameters: {EASE: {regularization: much}}\n")
    done = call(root, "product-recs", "run", "--name", "wrong", "-f", "wrong.yaml", "--quiet")
    assert done.returncode == 1 and "model_parameters['EASE']['regularization']='much': must be" in done.stderr, done


class Clock:
    "A clock on which each look takes a while."

    def __init__(self, step):
        self.seconds, self.step = 0, step

    def __call__(self):
        self.seconds += self.step
        return self.seconds


@pytest.fixture(scope="module")
def problem_of():
    def make(features, **options):
        candidates = choose_candidates(features, ["discovery"], top=1)
        problem = pose(features, "discovery", candidates, max_users=100, windows=1, **options)
        entrants = entrants_of(problem, candidates="EASE, item graph, ALS", max_factors=16, max_iterations=10)
        return {"discovery": problem}, {"discovery": entrants}

    return make


def test_the_minutes_are_used(tmp_path, problem_of):
    "Twice the time is about twice the trials; tasks share what is left."
    problems, entrants = problem_of(ensure_features("sample"))
    made = {}
    for minutes in (2, 4):
        clock = Clock(2)
        done = search_tasks(
            tmp_path / f"{minutes}.db", problems, entrants, budget_minutes=minutes, progress=False, clock=clock
        )["discovery"]
        assert done.ended == "time" and minutes * 60 - 12 <= clock.seconds <= minutes * 60 + 12
        assert done.made == len(done.looks) == past_searches(tmp_path / f"{minutes}.db", "discovery")[0]["trials"]
        made[minutes] = done.made
    assert 1.5 * made[2] < made[4] < 3 * made[2]


def test_a_look_of_an_earlier_search_is_the_model_that_was_judged(tmp_path):
    "What is in use, the lab's order and a limit of memory may change between two searches in one file."
    features = ensure_features("sample")
    names = choose_candidates(features, ["discovery"])

    def searched(candidates, parameters, most, asked="EASE, ALS"):
        problem = pose(features, "discovery", candidates, max_users=100, windows=1)
        given = {"EASE": parameters} if parameters else {}
        entrants = entrants_of(problem, model_parameters=given, candidates=asked, max_factors=16, max_iterations=5)
        done = search_tasks(
            tmp_path / "tune.db", {"discovery": problem}, {"discovery": entrants}, max_trials=most, progress=False
        )["discovery"]
        return problem, entrants, done

    _, _, first = searched(names, {"regularization": 9}, 8)
    for parameters in ({"regularization": 700}, {}):
        problem, entrants, done = searched(dict(reversed(names.items())), parameters, 4)
        assert done.earlier >= 8 and done.looks[: len(first.looks)] == first.looks
        yours = next(look for look in done.looks if look.point == {"regularization": 9} and look.contender == "EASE")
        assert yours.origin == "yours"
        [alone] = [entrant for entrant in entrants if entrant.model.name == "EASE"]
        model, look = tuned_models(problem, [alone], [yours], problem.own)["EASE"]
        assert model.parameters["regularization"] == 9 and look is yours
        assert Judge(problem, entrants)("EASE", yours.point, 0, "yours") == pytest.approx(yours.value, abs=1e-9)
    _, _, refused = searched(names, {"max_size": 5}, 2, "EASE")
    assert refused.earlier == 0 and not any(look.fits for look in refused.looks)
    _, _, raised = searched(names, {"max_size": 30_000}, 2, "EASE")
    assert raised.earlier == 0 and all(look.fits for look in raised.looks)


SCRIPT = """
import sys
from product_recs.data.artifact import open_features
from product_recs.jobs.tune import *
features = open_features(sys.argv[1])
candidates = choose_candidates(features, ["discovery"], top=1)
problem = pose(features, "discovery", candidates, max_users=100, windows=1)
entrants = entrants_of(problem, candidates="EASE, item graph, ALS", max_factors=16, max_iterations=10)
search_tasks(sys.argv[2], {"discovery": problem}, {"discovery": entrants}, max_trials=1000, progress=False)
"""


def test_kill_9_loses_the_look_in_hand_alone(tmp_path, problem_of):
    "Killed in the middle of its work, a search has every look that it had told, and goes on after them."
    root, rng = fresh_project(tmp_path), random.Random(0)
    features = build_features(ingested(root), root / "features")
    for _ in range(2):
        before = count(root / "tune.db")
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(root / "features"), str(root / "tune.db")],
            env=os.environ | {"PRODUCT_RECS_ROOT": str(root)},
        )
        end = time.monotonic() + 120
        while count(root / "tune.db") < before + 3 and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    problems, entrants = problem_of(features)
    known = count(root / "tune.db")
    last = search_tasks(root / "tune.db", problems, entrants, max_trials=2, progress=False)["discovery"]
    assert known >= 6 and last.earlier == known and len(last.looks) == known + 2 == count(root / "tune.db")
    places = [(look.contender, str(look.point), look.rung) for look in last.looks]
    assert len(set(places)) == len(places)  # nothing is judged twice
    history = past_searches(root / "tune.db", "discovery")
    assert [entry["ended"] for entry in history] == ["interrupted", "interrupted", "trials"]
    contenders = [entrant.contender for entrant in entrants["discovery"]]
    again = Record(root / "tune.db", problems["discovery"].name, contenders, 1)
    assert again.looks == last.looks


def ingested(root):
    ingest(root / "data/interactions.csv", root / "run", products=root / "data/products.csv", progress=False)
    return root / "run"


def count(file):
    "Looks in the file; 0 before there is one."
    try:  # not read-only: what a killed process left half written has to be rolled back
        with sqlite3.connect(f"file:{file}?mode=rw", uri=True) as database:
            return database.execute("SELECT count(*) FROM trials").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_other_data_and_other_rules_have_studies_of_their_own(tmp_path, problem_of):
    root = fresh_project(tmp_path)
    features = build_features(ingested(root), root / "features")
    log = (root / "data/interactions.csv").read_text().splitlines()
    (root / "data/interactions.csv").write_text("\n".join(log[:-1]) + "\n")
    other = build_features(ingested(root), root / "other")

    def name_of(data, **options):
        return problem_of(data, **options)[0]["discovery"].name

    names = {
        name_of(features),
        name_of(other),
        name_of(features, cut_off=5),
        name_of(features, seed=1),
        name_of(build_features(root / "run", root / "fewer", min_item_users=3)),
    }
    assert len(names) == 5
    for data in (features, other):
        search_tasks(root / "tune.db", *problem_of(data), max_trials=2, progress=False)
    studies = optuna.get_all_study_names(f"sqlite:///{root / 'tune.db'}")
    assert {name_of(data) for data in (features, other)} <= set(studies) and len(studies) == 8


def test_two_searches_in_one_file_are_refused(tmp_path, problem_of):
    import fcntl

    problems, entrants = problem_of(ensure_features("sample"))
    with open(tmp_path / ".tune.db.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Exception, match="another search is going on"):
            search_tasks(tmp_path / "tune.db", problems, entrants, progress=False)
