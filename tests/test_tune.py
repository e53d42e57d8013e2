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
from product_recs.jobs.tune import (
    as_trial,
    choose_candidates,
    finished,
    open_study,
    past_searches,
    pose,
    search,
    search_tasks,
    starting_points,
)


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
            in ("max_trials", "max_factors", "max_iterations", "max_users", "test_seeds", "bootstrap")
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


def test_a_second_call_goes_on(tuned):
    _, ((out, first), (_, second)) = tuned
    a, b = (metrics["tune"]["tasks"]["discovery"] for metrics in (first, second))
    assert (a["earlier_trials"], a["trials"], b["earlier_trials"], b["trials"]) == (0, 4, 4, 8) and a["study"] == b[
        "study"
    ]
    assert [metrics["tune"]["parameters"]["budget_minutes"] for metrics in (first, second)] == [3, 4]
    assert (
        b["validation_ndcg"] >= a["validation_ndcg"] >= max(a["starting_points"].values())
        and len(a["starting_points"]) >= 2
    )
    assert a["sentence"] in out and "best_discovery.yaml" in out
    assert a["ended"]["sentence"] in out and a["ended"]["by"] == "trials" and a["ended"]["trials"] == 4
    assert [entry["trials"] for entry in b["history"]] == [4, 4] and a["history"] == b["history"][:1]
    assert all(edge["sentence"] in out for edge in a["edges"])


def test_the_winner_meets_what_a_shop_has_already(tuned):
    _, ((_, first), _) = tuned
    task = first["tune"]["tasks"]["discovery"]
    names = [row["name"] for row in task["test"]]
    assert names[0] == "tuned" and {"popularity", "buy again", *task["roles"]} <= set(names) and len(task["roles"]) == 1
    assert [row["name"] for row in task["validation"]] == names == sorted(names, key=names.index)
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


class Clock:
    "A clock on which each look takes a while."

    def __init__(self, step):
        self.seconds, self.step = 0, step

    def __call__(self):
        self.seconds += self.step
        return self.seconds


def test_the_minutes_are_used(tmp_path, problem_of):
    "Twice the time is twice the trials; no number of trials ends a search early, and tasks share what is left."
    problem, *first = problem_of(ensure_features("sample"))
    made = {}
    for minutes in (2, 4):
        clock = Clock(3)
        done = search(tmp_path / f"{minutes}.db", problem, *first, budget_minutes=minutes, progress=False, clock=clock)
        longest = max(trial.user_attrs["seconds"] for trial in finished(done.study)) + 5 * clock.step
        assert done.ended == "time" and minutes * 60 <= clock.seconds <= minutes * 60 + longest
        assert (
            done.made
            == len(finished(done.study))
            == past_searches(tmp_path / f"{minutes}.db", "discovery")[0]["trials"]
        )
        made[minutes] = done.made
    assert 1.5 * made[2] < made[4] < 3 * made[2]
    clock, tasks = Clock(3), dict.fromkeys(("one", "two", "three"), problem)
    shared = search_tasks(
        tmp_path / "tasks.db",
        tasks,
        *(dict.fromkeys(tasks, each) for each in first),
        budget_minutes=6,
        progress=False,
        clock=clock,
    )
    assert all(each.ended == "time" for each in shared.values()) and 360 <= clock.seconds <= 360 + longest + 30


def test_the_answer_runs_and_the_reports_stay(tuned):
    root, (_, (_, metrics)) = tuned
    best = yaml.safe_load((root / "data/processed/sample/best_discovery.yaml").read_text())
    assert (
        best
        == metrics["tune"]["tasks"]["discovery"]["best"]
        == yaml.safe_load((root / "reports/sample/best_discovery.yaml").read_text())
    )
    (root / "yours.yaml").write_text("model: ALS\nfactors: 3\nbootstrap: 100\nmodels: [popularity, ALS]\n")
    done = call(
        root,
        "product-recs",
        "run",
        "--name",
        "sample",
        "-f",
        "yours.yaml",
        "-f",
        "data/processed/sample/best_discovery.yaml",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    bundle = open_bundle(root / "models")
    taken = bundle.manifest["parameters"]["features"] | bundle.model("discovery").parameters
    assert taken | best == taken
    judged = json.loads((root / "reports/sample/metrics.json").read_text())["04_evaluate"]["table"]
    # those that were named, what is served for the next purchase, and the simple ones beside it
    assert {row["model"] for row in judged} == {"popularity", "buy again", "ALS", "ALS + habits"}
    page = (root / "reports/sample/index.html").read_text()
    assert "tune.html" in page and "04_evaluate.html" in page and (root / "reports/sample/weights.html").exists()
    assert (root / "data/processed/sample/tune.db").exists()


@pytest.fixture(scope="module")
def problem_of():
    def make(features, **options):
        candidates = choose_candidates(features, "discovery", top=1)
        problem = pose(features, "discovery", candidates, max_factors=16, max_iterations=10, max_users=100, **options)
        points = starting_points(features, "discovery")
        return (
            problem,
            {name: as_trial(features, problem, point) for name, point in points.items()},
            {name: point["iterations"] for name, point in points.items()},
        )

    return make


def test_kill_9_leaves_a_study_that_goes_on(tmp_path, problem_of):
    "Killed twice and more in the middle of its work, the sequence of trials is still the one of an undisturbed search."
    root, rng = fresh_project(tmp_path), random.Random(0)
    features = build_features(ingested(root), root / "features")
    script = """
import sys
from product_recs.data.artifact import open_features
from product_recs.jobs.tune import *
features = open_features(sys.argv[1])
problem = pose(
    features,
    "discovery",
    choose_candidates(features, "discovery", top=1),
    max_factors=16,
    max_iterations=10,
    max_users=100,
)
points = starting_points(features, "discovery")
search(
    sys.argv[2],
    problem,
    {name: as_trial(features, problem, point) for name, point in points.items()},
    {name: point["iterations"] for name, point in points.items()},
    max_trials=1000,
    progress=False,
)
"""
    killed_in_a_trial, kills = 0, 0
    while (
        kills < 2 or not killed_in_a_trial
    ):  # a trial takes some hundredths of a second, so a kill may come just after it
        assert kills < 20, "the kills never hit a trial that was being made"
        before = count(root / "tune.db")
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(root / "features"), str(root / "tune.db")],
            env=os.environ | {"PRODUCT_RECS_ROOT": str(root)},
        )
        end = time.monotonic() + 90
        while (
            count(root / "tune.db") < before + 2 or not count(root / "tune.db", "RUNNING")
        ) and time.monotonic() < end:
            assert process.poll() is None
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        killed_in_a_trial += count(root / "tune.db", "RUNNING") > 0
    problem, *first = problem_of(features)
    before = len(finished(open_study(root / "tune.db", problem)))
    last = search(root / "tune.db", problem, *first, max_trials=2, progress=False)
    study = last.study
    known = past_searches(root / "tune.db", "discovery")
    assert [entry["ended"] for entry in known] == ["interrupted"] * (len(known) - 1) + ["trials"]
    assert last.earlier == before and len(finished(study)) == before + 2 and not count(root / "tune.db", "RUNNING")
    whole = search(root / "whole.db", problem, *first, max_trials=before + 2, progress=False).study
    assert [(trial.params, trial.value) for trial in finished(study)] == [
        (trial.params, trial.value) for trial in finished(whole)
    ]


def ingested(root):
    ingest(root / "data/interactions.csv", root / "run", products=root / "data/products.csv", progress=False)
    return root / "run"


def count(file, *states):
    "Trials in the file, by state; 0 before there is one."
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
            rows = database.execute("SELECT state FROM trials").fetchall()
    except sqlite3.OperationalError:
        return 0
    return sum(state in (states or ("COMPLETE", "PRUNED")) for (state,) in rows)


def test_other_data_and_other_rules_have_studies_of_their_own(tmp_path, problem_of):
    root = fresh_project(tmp_path)
    features = build_features(ingested(root), root / "features")
    log = (root / "data/interactions.csv").read_text().splitlines()
    (root / "data/interactions.csv").write_text("\n".join(log[:-1]) + "\n")
    other = build_features(ingested(root), root / "other")
    names = {
        problem_of(features)[0].study_name,
        problem_of(other)[0].study_name,
        problem_of(features, cut_off=5)[0].study_name,
        problem_of(features, seed=1)[0].study_name,
        problem_of(build_features(root / "run", root / "other", min_item_users=3))[0].study_name,
    }
    assert len(names) == 5
    for data in (features, other):
        search(root / "tune.db", *problem_of(data), max_trials=2, progress=False)
    assert sorted(optuna.get_all_study_names(f"sqlite:///{root / 'tune.db'}")) == sorted(
        {problem_of(data)[0].study_name for data in (features, other)}
    )


def test_two_searches_in_one_file_are_refused(tmp_path, problem_of):
    import fcntl

    features = ensure_features("sample")
    open_study(tmp_path / "tune.db", problem_of(features)[0])
    with open(tmp_path / ".tune.db.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Exception, match="another search is going on"):
            search(tmp_path / "tune.db", *problem_of(features), progress=False)
