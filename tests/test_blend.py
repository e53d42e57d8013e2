"""The blend for the next purchase: nothing of the test period is in it, the service gives the same scores, and it beats
its parts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support import Server, features_of_log, problem

from product_recs.answer.recommender import Recommender
from product_recs.bundle.files import publish, write_bundle
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.errors import BundleError, EvaluateError, NoModelForTask
from product_recs.core.paths import project_root
from product_recs.evaluation.judge import evaluate
from product_recs.evaluation.segments import by_segment
from product_recs.models.als import ALS
from product_recs.models.baselines import BuyAgain, Popularity
from product_recs.models.blend import HabitBlend
from product_recs.models.blend_weights import learn_weights
from product_recs.models.item_item import ItemBM25
from product_recs.models.signals import BlendError

SPLIT = {"validation_from": "2026-05-25", "test_from": "2026-06-10"}
QUICK = {"factors": 8, "iterations": 5, "num_threads": 1}


@pytest.fixture(scope="module")
def log():
    return pd.read_csv(project_root() / "data/interactions.csv")


@pytest.fixture(scope="module")
def features(log, tmp_path_factory):
    return features_of_log(log, tmp_path_factory.mktemp("blend"), **SPLIT)


def write(features, models_dir, models, **more):
    "A bundle of everything known, live."
    path = write_bundle(
        models_dir,
        models=models,
        snapshot=features.all,
        users=features.users,
        items=features.items,
        user_columns=features.user_columns,
        item_columns=features.item_columns,
        parameters={"features": features.parameters, "ingest": features.rules},
        data={"run": "shop", "fingerprint": features.fingerprint, **features.split},
        metrics={},
        **more,
    )
    publish(models_dir, path.name)
    return path


@pytest.fixture(scope="module")
def blend(features):
    "Fitted on everything, over ALS."
    return learn_weights(features, ALS(**QUICK)).fit(features.all)


@pytest.fixture(scope="module")
def bundle(features, blend, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    write(features, models, {DISCOVERY: blend.parts[0], NEXT_PURCHASE: blend})
    return open_bundle(models, verify=True)


def habits(users=120, items=60, weeks=40):
    """Each user buys three items in most weeks, drops one for another now and then, and tries things of one department
    in four."""
    rng, rows = np.random.default_rng(1), []
    for user in range(users):
        department = np.arange(user % 4, items, 4)
        own, ends = rng.choice(department, 3, replace=False), rng.integers(4, 20, 3)
        for week in range(weeks):
            for over in np.flatnonzero(ends == week):
                own[over], ends[over] = rng.choice(np.setdiff1d(department, own)), week + rng.integers(12, 24)
            bought = [item for item in own if rng.random() < 0.6] + (
                [rng.choice(department)] if rng.random() < 0.4 else []
            )
            rows += [
                (user + 1, item + 101, pd.Timestamp("2026-01-01") + pd.Timedelta(days=7 * week + int(rng.integers(7))))
                for item in bought
            ]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


def test_what_follows_the_split_changes_neither_weights_nor_scores(log, features, tmp_path):
    "Poison in the log itself: other users and items meet in the test period, and more often."
    rng = np.random.default_rng(0)
    after = log.timestamp >= SPLIT["test_from"]
    poison = log[after].copy()
    for column in ("user_id", "item_id"):
        poison[column] = rng.permutation(rng.choice(log.loc[~after, column].unique(), len(poison)))
    poisoned = features_of_log(pd.concat([log, poison, poison.assign(quantity=7)]), tmp_path, **SPLIT)
    assert poisoned.fingerprint != features.fingerprint and poisoned.test.sum() > features.test.sum()
    ours, theirs = (learn_weights(f, ALS(**QUICK)).fit(f.train_validation) for f in (features, poisoned))
    assert ours.weights == theirs.weights
    users = np.flatnonzero(np.diff(features.train_validation.counts.indptr))
    same = [poisoned.users.row(user) for user in features.users.take(users)]
    items = [poisoned.items.row(item) for item in features.items.take(np.flatnonzero(ours.candidates))]
    scores = [model.scores(model.users(rows)) for model, rows in ((ours, users), (theirs, np.array(same)))]
    assert np.array_equal(scores[0][:, ours.candidates], scores[1][:, items])


@pytest.mark.parametrize("task", [NEXT_PURCHASE, DISCOVERY])
@pytest.mark.parametrize("taste", [ALS(**QUICK), ItemBM25(num_threads=1)], ids=lambda model: model.name)
def test_the_weights_know_the_validation_period_only(features, taste, task):
    "Interactions after the validation period may be anything."
    weights = learn_weights(features, taste, task).weights
    nothing = features.test * 0
    other = replace(features, test=nothing, all=features.train, train_validation=features.train)
    assert learn_weights(other, taste, task).weights == weights
    assert weights.facts["from"][:10] == SPLIT["validation_from"] and weights.facts["until"][:10] == SPLIT["test_from"]


def test_it_beats_its_parts_where_habits_change(tmp_path):
    features = features_of_log(habits(), tmp_path, validation_from="2026-08-01", test_from="2026-09-05")
    als = ALS(**QUICK, regularization=1.0)
    models = [Popularity(), BuyAgain(), als, learn_weights(features, als)]
    evaluation = evaluate(features, models, [5, 10], progress=False, bootstrap=300)
    best = evaluation.best("next_purchase", "ndcg", 5, without="ALS + habits")
    assert evaluation.compare("next_purchase", "ALS + habits", best, "ndcg", 5, 300).low > 0.05
    assert not any(task == "discovery" and "habits" in model for task, model in evaluation.hits)
    table = by_segment(evaluation, features, k=5, bootstrap=20)
    assert set(table.segment) == {"activity", "tenure", "item popularity"} and (table.users > 0).all()
    with pytest.raises(EvaluateError, match="no such column"):
        by_segment(evaluation, features, "age")


def test_the_bundle_gives_the_scores_of_the_recommender(blend, bundle):
    assert bundle.model(NEXT_PURCHASE).weights == blend.weights
    model = ReadyModel(bundle).prepare()
    for row in range(0, len(bundle.users), 7):
        expected = blend.scores(blend.users(np.array([row])))[0]
        answer = Recommender(model).recommend(bundle.users[row], 50, "next_purchase")
        assert answer.source == "next_purchase" and len(answer) == 50
        got = np.array([bundle.items.row(item) for item in answer.items])
        np.testing.assert_allclose(answer.scores, expected[got], atol=1e-4)
        assert answer.scores[-1] >= np.sort(np.where(model.candidates, expected, -np.inf))[-50] - 1e-4


def test_over_http(bundle, tmp_path):
    with Server(tmp_path, bundle.path.parent) as server:
        user = bundle.users[3]
        expected = Recommender(ReadyModel(bundle)).recommend(user, 5, "next_purchase")
        status, headers, body = server.get(f"/recommend/{user}?n=5&task=next_purchase")
        assert (
            status == 200
            and body == {"user_id": user, "recommendations": expected.items}
            and headers["x-recommendation-source"] == "next_purchase"
        )
        assert server.get(f"/recommend/{user}?n=5")[1]["x-recommendation-source"] == "personalised"
        unknown = server.get("/recommend/987654?n=5&task=next_purchase")
        assert (
            unknown[0] == 200
            and unknown[1]["x-recommendation-source"] == "popular"
            and len(unknown[2]["recommendations"]) == 5
        )
        assert "task" in problem(server.get(f"/recommend/{user}?task=yesterday"), 422).detail


def test_a_bundle_without_a_model_for_the_next_purchase_answers_the_rest_and_says_why(features, blend, tmp_path):
    write(features, tmp_path / "models", {DISCOVERY: blend.parts[0], NEXT_PURCHASE: "nobody asked for habits"})
    with pytest.raises(NoModelForTask, match="nobody asked for habits"):
        Recommender(ReadyModel(open_bundle(tmp_path / "models"))).recommend(1, task="next_purchase")
    with Server(tmp_path, tmp_path / "models") as server:
        assert server.get("/recommend/1?n=3")[0] == 200
        assert "nobody asked for habits" in problem(server.get("/recommend/1?n=3&task=next_purchase"), 422).detail


def test_without_timestamps_there_is_no_next_purchase_to_learn_from(log, tmp_path):
    features = features_of_log(log.drop(columns="timestamp"), tmp_path)
    with pytest.raises(BlendError, match="hidden whole"):
        learn_weights(features, ALS(**QUICK))


def test_a_discovery_with_popularity_is_served_like_any_other(features, blend, tmp_path):
    "One part, two blends over it, one for each task."
    weights = learn_weights(features, blend.parts[0].fit(features.train), DISCOVERY).weights
    new = HabitBlend(blend.parts[0], DISCOVERY, weights).fit(features.all)
    path = write(features, tmp_path, {DISCOVERY: new, NEXT_PURCHASE: blend})
    model = ReadyModel(open_bundle(tmp_path, verify=True)).prepare()
    assert list(model.bundle.manifest["parts"]) == ["als", "als-habits", "als-habits-2"]
    assert len([*path.glob("*.user_factors.npy")]) == 1
    for row in range(0, len(features.users), 40):
        answer = Recommender(model).recommend(features.users[row], 5)
        seen = features.all.counts[[row]]
        expected = new.top(new.users(np.array([row])), 5, seen, np.flatnonzero(~model.candidates))[0][0]
        assert answer.items == features.items.take(expected[expected >= 0])


def test_damage_is_named(bundle, tmp_path):
    import shutil

    for name in ("seen_counts.npy", "seen_age_days.npy", "seen_span_days.npy"):
        copy = tmp_path / name
        shutil.copytree(bundle.path, copy / bundle.version)
        (copy / bundle.version / name).unlink()
        with pytest.raises(BundleError, match=name):
            open_bundle(copy, bundle.version)


def test_bundles_of_other_interactions_are_not_compared(log, features, tmp_path):
    from product_recs.jobs.compare import compare_bundles  # the other tests need nothing of the jobs

    other = features_of_log(log[log.index % 2 == 0], tmp_path, **SPLIT)
    als = ALS(**QUICK)
    models = tmp_path / "models"
    first = write(features, models, {DISCOVERY: als.fit(features.all)})
    write(other, models, {DISCOVERY: als.fit(other.all)})
    with pytest.raises(EvaluateError, match="different interactions"):
        compare_bundles("current", first.name, models_dir=models, progress=False)
