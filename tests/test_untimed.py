"""A log without timestamps: items are hidden by user, nothing leaks, and every page says what its figures are worth."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import QUICK as LITTLE
from support import call, every_model, features_of_log, fresh_project, only_the_jobs

from product_recs.bundle.files import current_version, read_manifest
from product_recs.core.errors import EvaluateError, FeatureError, NothingToJudge
from product_recs.core.paths import project_root
from product_recs.data.tasks import how_judged, make_task, past_and_future
from product_recs.evaluation.competition import compete, usual_candidates, worse_than_popularity
from product_recs.evaluation.judge import evaluate
from product_recs.evaluation.segments import by_segment
from product_recs.features import JUDGED_ITEMS, build_features, split_warnings
from product_recs.jobs.weights import weigh, weightings
from product_recs.models.all import all_models
from product_recs.models.als import ALS
from product_recs.models.baselines import Popularity
from product_recs.models.blend_weights import learn_weights
from product_recs.models.interface import top_lists
from product_recs.train import train_bundle

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
LOGS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 25)), min_size=1, max_size=150)


def log_of(rows):
    "Pairs as a log; some stand in it several times."
    return pd.DataFrame(rows, columns=["user_id", "item_id"])


def counts_of(rows):
    return {pair: rows.count(pair) for pair in rows}


def pairs_of(features, matrix):
    "(user, item) -> value, by their ids."
    users, items = matrix.nonzero()
    return {
        (features.users[user], features.items[item]): matrix[user, item]
        for user, item in zip(users.tolist(), items.tolist())
    }


@FEW
@given(LOGS, st.sampled_from([0, 0.1, 0.25, 1 / 3]), st.integers(0, 5))
def test_every_pair_is_learned_from_or_hidden_once_with_all_of_its_rows(tmp_path_factory, rows, share, seed):
    features = features_of_log(log_of(rows), tmp_path_factory.mktemp("log"), split_share=share, split_seed=seed)
    learned, validation, test, both, whole = (
        pairs_of(features, matrix)
        for matrix in (
            features.train.counts,
            features.validation,
            features.test,
            features.train_validation.counts,
            features.all.counts,
        )
    )
    assert not learned.keys() & validation.keys() and not both.keys() & test.keys()
    assert learned | validation == both and both | test == whole == counts_of(rows)
    for user in {user for user, _ in rows}:
        count, *hidden = (sum(person == user for person, _ in pairs) for pairs in (whole, validation, test))
        assert hidden == [max(1, int(share * count + 1e-9))] * 2 if count >= JUDGED_ITEMS else hidden == [0, 0]
    assert (features.split == {}) == (not test)
    for past, future in ((features.train, features.validation), (features.train_validation, features.test)):
        assert past.counts.multiply(future).nnz == 0


@FEW
@given(LOGS, st.integers(0, 99), st.integers(1, 3), st.integers(1, 3))
def test_the_order_of_the_rows_changes_nothing_and_minimum_counts_leak_nothing(
    tmp_path_factory, rows, seed, least_items, least_users
):
    folder = tmp_path_factory.mktemp("log")
    parameters = dict(min_user_items=least_items, min_item_users=least_users, split_seed=seed)
    (folder / "other").mkdir()
    shuffled = log_of(rows).sample(frac=1, random_state=seed)
    try:
        features = features_of_log(log_of(rows), folder, **parameters)
    except FeatureError as error:
        assert "no pair is left" in str(error)
        return
    again = features_of_log(shuffled, folder / "other", **parameters)
    for name in ("train", "train_validation", "all"):
        for value in ("confidence", "counts", "age_days"):
            matrix, other = (getattr(getattr(made, name), value) for made in (features, again))
            assert (matrix != other).nnz == 0, (name, value)
    assert (features.validation != again.validation).nnz == (features.test != again.test).nnz == 0
    assert features.split == again.split
    for past, future in ((features.train, features.validation), (features.train_validation, features.test)):
        assert past.counts.multiply(future).nnz == 0


@pytest.fixture(scope="module")
def log():
    return pd.read_csv(project_root() / "data/interactions.csv")


@pytest.fixture(scope="module")
def features(log, tmp_path_factory):
    return features_of_log(log.drop(columns="timestamp"), tmp_path_factory.mktemp("untimed"), half_life_days=30)


def test_a_seed_is_a_draw(features, tmp_path):
    first, same, other = (
        build_features(features.interactions, tmp_path / str(place), split_seed=seed)
        for place, seed in enumerate((7, 7, 8))
    )
    assert (first.test != same.test).nnz == 0 and first.split["seed"] == 7
    assert (first.test != other.test).nnz > 0.5 * first.test.nnz
    assert first.test.nnz == other.test.nnz and (first.all.counts != other.all.counts).nnz == 0


def test_which_log_is_split_how(log, tmp_path):
    names = iter(range(99))

    def split(log, **parameters):
        folder = tmp_path / str(next(names))
        folder.mkdir()
        return features_of_log(log, folder, **parameters)

    one_day = log.assign(timestamp="2026-01-05T10:00:00")
    partly = log.assign(timestamp=log.timestamp.where(log.index % 10 > 0))
    assert "by" not in split(log).split and split(one_day).split["by"] == "user"
    assert split(log, split="user").split["by"] == "user" and split(log, split="none").split == {}
    timed = split(partly)
    assert "by" not in timed.split and timed.test.nnz
    [warning] = split_warnings(timed)
    assert warning.startswith(f"{len(range(0, len(log), 10)):,} of {len(log):,} rows have no timestamp")
    for wrong, parameters, words in (
        (log.drop(columns="timestamp"), {"split": "time"}, "have no timestamps; name the column of the time"),
        (one_day, {"split": "time"}, "within a day"),
        (log, {"split": "user", "test_from": "2026-06-01"}, "take split time"),
        (log, {"split": "none", "validation_from": "2026-06-01"}, "take split time"),
        (log.drop(columns="timestamp"), {"test_from": "2026-06-01"}, "need timestamps"),
        (log, {"split": "random"}, "auto, time, user, none"),
        (log, {"split_share": 0.5}, "split_share=0.5"),
        (log, {"split_seed": 1.5}, "split_seed=1.5"),
    ):
        with pytest.raises(FeatureError, match=words):
            split(wrong, **parameters)


def test_the_checkerboard_is_solved(tmp_path):
    "Everybody has every item of their colour; what is hidden of them is the only one that is new and of the colour."
    user, item = np.nonzero(np.add.outer(np.arange(30), np.arange(30)) % 2 == 0)
    board = features_of_log(log_of(list(zip((user + 1).tolist(), (item + 1).tolist()))), tmp_path, split_share=0)
    assert np.diff(board.test.indptr).tolist() == [1] * 30
    als = ALS(factors=2, regularization=0.1, num_threads=1)
    models = [*(model for model in usual_candidates(all_models()) if model.name not in ("ALS", "weighted ALS")), als]
    result = evaluate(board, models, k=[1], progress=False, bootstrap=50)
    assert set(result.tasks) == {"discovery"} and result.facts["users"] == {"discovery": 30}
    for name in ("ALS", "item-item cosine", "item-item BM25", "item graph", "EASE"):
        assert result.value("discovery", name, "precision", 1) == 1, name
    assert result.value("discovery", "popularity", "precision", 1) < 0.3
    contest = compete(board, [Popularity(), als], k=2, combine=False, progress=False, bootstrap=100)
    assert contest.winner.name == "ALS" and "users with hidden items" in contest.sentence
    assert worse_than_popularity(board, als) is None


@pytest.mark.parametrize("name", every_model())
def test_every_model_learns_without_times(features, name):
    assert not features.train.age_days.data.any()
    model = every_model()[name].fit(features.train)
    rows = np.flatnonzero(np.diff(features.train.counts.indptr))[:60]
    scores = model.scores(model.users(rows))
    assert np.isfinite(scores[:, model.candidates]).all()
    lists, values = top_lists(model, rows, 10, exclude_seen=True)
    assert (lists >= 0).all() and np.isfinite(values).all()


def test_recent_popularity_is_popularity_and_habits_learn_for_discovery(features):
    candidates = usual_candidates(all_models({"factors": 8, "iterations": 3}))
    result = evaluate(features, candidates, k=[10], progress=False, bootstrap=10)
    with_interval = result.table[~result.table.metric.isin(["coverage", "gini"])]
    assert np.isfinite(with_interval[["value", "low", "high"]]).all().all()
    recent, all_time = (result.value("discovery", name, "ndcg", 10) for name in ("recent popularity", "popularity"))
    assert abs(recent - all_time) < 0.02  # one counts interactions, the other users
    assert (result.table.split == "by user").all()
    learned = learn_weights(features, ALS(factors=8, iterations=3, num_threads=1), "discovery")
    assert np.isfinite([*learned.weights.weights.values(), learned.weights.intercept]).all()
    past, future, _ = past_and_future(features)
    judged = make_task(past, future, "discovery")
    assert np.isfinite(top_lists(learned.fit(past), judged.rows, 10, True)[1]).all()
    segments = by_segment(result, features, bootstrap=10)
    assert set(segments.segment) == {"activity", "item popularity"} and np.isfinite(segments.value).all()


def test_the_next_purchase_is_refused_in_words(features):
    for judge in (
        lambda: evaluate(features, [Popularity()], tasks=["next_purchase"], progress=False),
        lambda: compete(features, [Popularity()], "next_purchase", progress=False),
        lambda: past_and_future(features, "validation", ["next_purchase"]),
    ):
        with pytest.raises(NothingToJudge, match="hidden whole"):
            judge()
    with pytest.raises(EvaluateError, match="task must be one of"):
        evaluate(features, [Popularity()], tasks=["tomorrow"], progress=False)


def test_weightings_are_those_of_the_features(log, tmp_path):
    "With times and without, a half-life counts back from the end of the log, and what is hidden is in no sum."
    for name, rows in (("timed", log), ("untimed", log.drop(columns="timestamp"))):
        (tmp_path / name).mkdir()
        mixed = dict(event_weights={"cart": 3, "purchase": 8}, quantity="log1p", half_life_days=20, weighting="bm25")
        made = features_of_log(rows, tmp_path / name, split="user", min_item_users=5, **mixed)
        for snapshot in ("train", "train_validation"):
            again = weigh(made, {"mixed": mixed} | weightings(), snapshot)["mixed"].confidence.toarray()
            assert np.allclose(again, getattr(made, snapshot).confidence.toarray(), rtol=1e-5), (name, snapshot)


def test_a_model_that_popularity_beats_is_not_published(tmp_path):
    rng = np.random.default_rng(0)
    chance = np.r_[np.linspace(0.9, 0.3, 12), np.full(60, 0.03)]
    users, items = np.nonzero(rng.random((150, len(chance))) < chance)
    shop = features_of_log(log_of(list(zip((users + 1).tolist(), (items + 101).tolist()))), tmp_path)
    absurd = dict(factors=1, regularization=1e6, iterations=1, next_model="none", progress=False)
    version, trained = train_bundle(shop, tmp_path / "models", **absurd)
    assert "ALS is worse than popularity by 0." in trained.worse[0] and current_version(tmp_path / "models") is None
    assert trained.notes == [how_judged(shop.split)["note"]]
    assert read_manifest(tmp_path / "models" / version)["metrics"]["judged"]["by"] == "user"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of the sample without its times, and a search of parameters on it."
    root = fresh_project(tmp_path_factory.mktemp("untimed"))
    only_the_jobs(root)
    log = pd.read_csv(root / "data/interactions.csv").drop(columns="timestamp")
    log.to_csv(root / "log.csv", index=False)
    (root / "shop.yaml").write_text(
        f"source: {root / 'log.csv'}\nfactors: 8\niterations: 4\ncandidates: popularity, ALS, EASE\n"
        "models: popularity, recent popularity, ALS, EASE\n"
    )
    (root / "little.yaml").write_text(LITTLE)
    run = call(root, "product-recs", "run", "--name", "shop", "--quiet", "--file", "shop.yaml")
    after_run = {name: (root / "reports/shop" / name).read_text() for name in ("metrics.json", "index.html")}
    both = ["--file", "shop.yaml", "--file", "little.yaml"]
    tuned = call(root, "product-recs", "tune", "--name", "shop", "--quiet", *both)
    return root, run, tuned, after_run


@pytest.mark.slow
def test_a_log_without_times_is_judged_and_tuned_end_to_end(finished):
    root, run, tuned, after_run = finished
    assert run.returncode == 0 and "is live" in run.stdout, run.stderr + run.stdout
    assert tuned.returncode == 0 and "Discovery: tuning " in tuned.stdout, tuned.stderr
    metrics = json.loads((root / "reports/shop/metrics.json").read_text()) | json.loads(after_run["metrics.json"])
    assert {step: facts["status"] for step, facts in metrics["run"]["steps"].items()}["04_evaluate"] == "done"
    note = how_judged({"by": "user"})["note"]
    for section in ("02_features", "03_train", "04_evaluate", "tune", "weights"):
        assert metrics[section]["judged"] == how_judged({"by": "user"}), section
    assert metrics["02_features"]["warnings"] == [note] and metrics["02_features"]["split"]["by"] == "user"
    notes = metrics["03_train"]["notes"]
    assert notes[0] == note and "There is no model for the next purchase: the next purchase is not judged" in notes[1]
    assert " ".join(run.stdout.split()).count(note) == 1, "said by two steps, told once"
    served = metrics["04_evaluate"]["served"]["discovery"]
    assert served["model"] in ("ALS", "EASE") and served["beats_popularity"]["low"] > 0
    assert set(metrics["03_train"]["competition"]) == {"discovery"} == set(metrics["04_evaluate"]["facts"]["users"])
    assert not metrics["tune"]["tasks"].keys() - {"discovery"} and set(metrics["weights"]["winner"]) == {"discovery"}
    assert note in (root / "reports/shop/best_discovery.yaml").read_text()


def test_every_page_of_such_a_run_says_what_its_figures_are_worth(finished):
    root, _, _, after_run = finished
    pages = {path.stem: path.read_text() for path in (root / "reports/shop").glob("*.html")}
    assert len(pages) == 8  # of the run and of the tuning, and the index
    judged = ("02_features", "03_train", "04_evaluate", "weights", "tune", "index")
    for page, text in [*((name, pages[name]) for name in judged), ("index of the run", after_run["index.html"])]:
        assert "these figures are optimistic" in text, page
        assert '<div class="failed">' not in text, page
    manifest = read_manifest(root / "models" / current_version(root / "models"))
    assert manifest["metrics"]["judged"]["by"] == manifest["metrics"]["evaluation"]["judged"]["by"] == "user"
    assert manifest["models"]["next_purchase"]["missing"].startswith("the next purchase is not judged")
    current = manifest["version"]
    compared = call(root, "product-recs", "evaluate", "--quiet", "--compare", current, current)
    assert compared.returncode == 0 and "these figures are optimistic" in compared.stdout, compared.stderr
    assert "Next purchase" not in compared.stdout
    answer = call(root, "product-recs", "evaluate", "--quiet", "--json", "--compare", current, current)
    assert json.loads(answer.stdout)["judged"]["by"] == "user", answer.stderr
