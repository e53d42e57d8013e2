"""The blend for the next purchase: nothing of the test period is in it, the service gives the same scores, and it beats
its parts."""

import json

import numpy as np
import pandas as pd
import pytest
from test_api import Server, problem
from test_evaluate import features_of

from product_recs.models.als import ALS
from product_recs.models.baselines import BuyAgain, Popularity
from product_recs.models.blend import Blend, learn_weights
from product_recs.bundle.files import open_bundle, publish
from product_recs.jobs.compare import compare_bundles
from product_recs.core.errors import BundleError
from product_recs.core.paths import project_root
from product_recs.core.errors import EvaluateError
from product_recs.evaluation.judge import evaluate
from product_recs.bundle.ready import ReadyModel
from product_recs.answer.recommender import Recommender
from product_recs.evaluation.segments import by_segment
from product_recs.models.signals import BlendError
from product_recs.train import train_bundle

SPLIT = {"validation_from": "2026-05-25", "test_from": "2026-06-10"}
QUICK = {"factors": 8, "iterations": 5, "num_threads": 1}


@pytest.fixture(scope="module")
def log():
    return pd.read_csv(project_root() / "data/interactions.csv")


@pytest.fixture(scope="module")
def features(log, tmp_path_factory):
    return features_of(log, tmp_path_factory.mktemp("blend"), **SPLIT)


@pytest.fixture(scope="module")
def bundle(features, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    train_bundle(features, models, progress=False, **QUICK)
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
    poisoned = features_of(pd.concat([log, poison, poison.assign(quantity=7)]), tmp_path, **SPLIT)
    assert poisoned.fingerprint != features.fingerprint and poisoned.test.sum() > features.test.sum()
    ours, theirs = (Blend(f, **QUICK).fit(f.train_validation) for f in (features, poisoned))
    assert ours.weights == theirs.weights
    users = np.flatnonzero(np.diff(features.train_validation.counts.indptr))
    same = [poisoned.users.row(user) for user in features.users.take(users)]
    items = [poisoned.items.row(item) for item in features.items.take(np.flatnonzero(ours.candidates))]
    assert np.array_equal(ours.score(users)[:, ours.candidates], theirs.score(np.array(same))[:, items])


def test_the_weights_know_the_validation_period_only(features):
    "Interactions after the validation period may be anything."
    from dataclasses import replace

    weights = learn_weights(features, **QUICK)
    nothing = features.test * 0
    assert (
        learn_weights(replace(features, test=nothing, all=features.train, train_validation=features.train), **QUICK)
        == weights
    )
    assert weights.facts["from"][:10] == SPLIT["validation_from"] and weights.facts["until"][:10] == SPLIT["test_from"]
    with pytest.raises(BlendError, match="cannot be judged by that period"):
        evaluate(features, [Blend(features, **QUICK)], [5], ["next_purchase"], period="validation", progress=False)


def test_it_beats_its_parts_where_habits_change(tmp_path):
    features = features_of(habits(), tmp_path, validation_from="2026-08-01", test_from="2026-09-05")
    als = ALS(**QUICK, regularization=1.0)
    found = evaluate(
        features, [Popularity(), BuyAgain(), als, Blend(features, als=als)], [5, 10], progress=False, bootstrap=300
    )
    best = found.best("next_purchase", "ndcg", 5, without="blend")
    assert found.compare("next_purchase", "blend", best, "ndcg", 5, 300).low > 0.05
    assert not any(task == "discovery" and model == "blend" for task, model in found.hits)
    table = by_segment(found, features, k=5, bootstrap=20)
    assert set(table.segment) == {"activity", "tenure", "item popularity"} and (table.users > 0).all()
    with pytest.raises(EvaluateError, match="no such column"):
        by_segment(found, features, "age")


def test_the_bundle_gives_the_scores_of_the_recommender(features, bundle):
    blend = Blend(features, **QUICK).fit(features.all)
    assert bundle.manifest["blend"] == blend.weights.to_json()
    model = ReadyModel(bundle).prepare()
    for row in range(0, len(bundle.users), 7):
        expected = blend.score(np.array([row]))[0]
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


def test_a_bundle_without_a_blend_is_as_good_as_before(features, tmp_path):
    version, _ = train_bundle(features, tmp_path / "models", blend=False, progress=False, **QUICK)
    path = tmp_path / "models" / version
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["blend"]  # as bundles were written before there was a blend
    for name in ("seen_counts.npy", "seen_age_days.npy"):
        del manifest["files"][name]
        (path / name).unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))
    publish(tmp_path / "models", version)
    old = open_bundle(tmp_path / "models", verify=True)
    assert old.counts is None and old.age_days is None
    with Server(tmp_path, tmp_path / "models") as server:
        assert server.get("/recommend/1?n=3")[0] == 200
        assert "without a blend; train again" in problem(server.get("/recommend/1?n=3&task=next_purchase"), 422).detail


def test_without_timestamps_training_says_why_there_is_no_blend(log, tmp_path):
    features = features_of(log.drop(columns="timestamp"), tmp_path)
    train_bundle(features, tmp_path / "models", progress=False, **QUICK)
    with pytest.raises(BlendError, match="no time split"):
        Recommender(ReadyModel(open_bundle(tmp_path / "models"))).recommend(1, task="next_purchase")


def test_damage_is_named(bundle, tmp_path):
    import shutil

    for name in ("seen_counts.npy", "seen_age_days.npy"):
        copy = tmp_path / name
        shutil.copytree(bundle.path, copy / bundle.version)
        (copy / bundle.version / name).unlink()
        with pytest.raises(BundleError, match=name):
            open_bundle(copy, bundle.version)


def test_bundles_of_other_interactions_are_not_compared(log, features, bundle, tmp_path):
    other = features_of(log[log.index % 2 == 0], tmp_path, **SPLIT)
    second, _ = train_bundle(other, bundle.path.parent, publish_it=False, blend=False, progress=False, **QUICK)
    with pytest.raises(EvaluateError, match="different interactions"):
        compare_bundles("current", second, models_dir=bundle.path.parent, progress=False)
