"""The evaluation on a log that went through ingest and features: no leak, the right targets, bounded memory."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import random as random_sparse
from support import features_of_log, plain_metrics

from product_recs.core.errors import EvaluateError
from product_recs.core.paths import project_root
from product_recs.data.snapshots import Snapshot
from product_recs.evaluation.competition import compete
from product_recs.evaluation.judge import evaluate
from product_recs.models.als import ALS
from product_recs.models.baselines import Popularity, baselines
from product_recs.models.blend import ScoreBlend
from product_recs.models.interface import top_lists

SPLIT = {"validation_from": "2026-05-25", "test_from": "2026-06-10"}


@pytest.fixture(scope="module")
def log():
    return pd.read_csv(project_root() / "data/interactions.csv")


@pytest.fixture(scope="module")
def features(log, tmp_path_factory):
    return features_of_log(log, tmp_path_factory.mktemp("clean"), **SPLIT)


def models():
    return [*baselines(), ALS(factors=8, num_threads=1)]


def by_id(features, scores):
    return pd.DataFrame(
        scores,
        index=features.users.take(np.arange(len(features.users))),
        columns=features.items.take(np.arange(len(features.items))),
    )


@pytest.mark.parametrize("new_ids", [False, True])
def test_what_follows_the_split_changes_no_score(log, features, tmp_path, new_ids):
    "Poison in the log itself, so that a leak in the features shows too."
    rng = np.random.default_rng(0)
    after = log.timestamp >= SPLIT["test_from"]
    poison = log[after].copy()
    for column in ("user_id", "item_id"):
        known = log.loc[~after, column].unique()
        poison[column] = rng.choice([*known, *(known.max() + np.arange(1, 40))] if new_ids else known, len(poison))
    poison["event"] = "purchase"
    poison = pd.concat([log[~after], log[after] if not new_ids else None, poison, poison.assign(quantity=7)])
    poisoned = features_of_log(poison, tmp_path, **SPLIT)
    assert poisoned.fingerprint != features.fingerprint and poisoned.test.sum() > features.test.sum()
    for ours, theirs in zip(models(), models()):
        if new_ids and ours.name == "ALS":
            continue  # more columns: another random start
        ours, theirs = ours.fit(features.train_validation), theirs.fit(poisoned.train_validation)
        a, b = (
            by_id(f, model.scores(model.users(np.arange(len(f.users)))))
            for f, model in ((features, ours), (poisoned, theirs))
        )
        users = features.users.take(np.flatnonzero(np.diff(features.train_validation.counts.indptr)))
        items = features.items.take(np.flatnonzero(ours.candidates))
        np.testing.assert_array_equal(a.loc[users, items], b.loc[users, items], err_msg=ours.name)
        assert items == poisoned.items.take(np.flatnonzero(theirs.candidates)), ours.name


def test_the_table_against_a_loop_over_the_log(log, features):
    "Popularity in plain Python: sets of ids straight from the log, one user and one item at a time."
    past, future = log[log.timestamp < SPLIT["test_from"]], log[log.timestamp >= SPLIT["test_from"]]
    own, then = (part.groupby("user_id").item_id.agg(set).to_dict() for part in (past, future))
    buyers = past.groupby("item_id").user_id.nunique().to_dict()
    ranked = sorted(buyers, key=lambda item: (-buyers[item], item))
    evaluation = evaluate(features, [Popularity()], k=(1, 10), progress=False, bootstrap=20)
    for task, new_only in (("discovery", True), ("next_purchase", False)):
        for k in (1, 10):
            each = []
            for user in sorted(set(own) & set(then)):
                relevant = {item for item in then[user] if item in buyers and not (new_only and item in own[user])}
                figures = plain_metrics([item for item in ranked if not (new_only and item in own[user])], relevant, k)
                if figures:
                    each.append(figures)
            assert evaluation.facts["users"][task] == len(each)
            for name in each[0]:
                assert evaluation.value(task, "popularity", name, k) == pytest.approx(
                    np.mean([e[name] for e in each]), abs=1e-9
                ), (task, name, k)
    new_items = future.item_id.isin(set(log.item_id) - set(buyers))
    assert evaluation.facts["cold_items"] == pytest.approx(new_items.mean())
    assert evaluation.facts["cold_users"] == pytest.approx((~future.user_id.isin(own)).mean())


def test_the_size_of_the_blocks_changes_nothing(features):
    first, second = (
        evaluate(features, models(), k=(5, 10), block=block, progress=False, bootstrap=20).table for block in (1024, 17)
    )
    rows = ["task", "model", "metric", "k", "value"]
    exact = ~first.model.isin(["ALS", "item-item cosine"])  # a product of other blocks may round differently
    pd.testing.assert_frame_equal(first[exact][rows], second[exact][rows])
    np.testing.assert_allclose(first.value, second.value, atol=5e-3)


def test_where_nothing_is_split_it_says_what_to_do(log, tmp_path):
    features = features_of_log(log.drop(columns="timestamp"), tmp_path, split="none")
    with pytest.raises(EvaluateError, match="02_features with split auto needs timestamps"):
        evaluate(features, [Popularity()], progress=False)


def test_a_user_without_a_past_or_an_unknown_item_breaks_nothing(features):
    nobody = replace(features, test=features.test * 0)
    with pytest.raises(EvaluateError, match="choose another split date"):
        evaluate(nobody, [Popularity()], progress=False)


def test_what_is_given_stays_as_it_is_and_shared_parts_are_fitted_once(features, monkeypatch):
    fits = []
    monkeypatch.setattr(ALS, "_fit", lambda self, snapshot, fit=ALS._fit: (fits.append(1), fit(self, snapshot))[1])
    als = ALS(factors=4, iterations=2, num_threads=1)
    both = ScoreBlend([als, Popularity()])
    evaluation = evaluate(features, [als, both], k=[5], tasks=["discovery"], progress=False, bootstrap=10)
    assert len(fits) == 1 and not hasattr(als, "snapshot") and both.parts[0] is als
    assert {name for _, name in evaluation.hits} == {"ALS", "ALS + popularity"}


def test_the_test_period_has_no_say_in_a_competition(features):
    "Noise in place of the test period, and of everything that ends after it: the same figures and the same winner."
    noise = random_sparse(*features.test.shape, density=0.2, format="csr", dtype=np.float32, random_state=1)
    elsewhere = replace(features.all, confidence=noise, counts=noise, age_days=noise, span_days=noise)
    poisoned = replace(features, test=noise, all=elsewhere, train_validation=elsewhere)
    settings = {"progress": False, "bootstrap": 50}
    candidates = [*baselines(), ALS(factors=8, num_threads=1)]
    for task in ("discovery", "next_purchase"):
        first, second = (compete(f, candidates, task, **settings) for f in (features, poisoned))
        columns = ["model", "value", "low", "high", "difference", "eligible", "work"]
        pd.testing.assert_frame_equal(first.table[columns], second.table[columns])
        assert first.winner.name == second.winner.name and first.winner.parameters == second.winner.parameters


def test_memory_stays_far_below_users_times_items():
    users, items = 6000, 20_000  # 480 MB as one float32 matrix
    counts = random_sparse(users, items, density=0.0005, format="csr", dtype=np.float32, random_state=1)
    model = Popularity().fit(Snapshot(None, counts, counts, counts))
    tracemalloc.start()
    top_lists(model, np.arange(users), 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250e6, f"{peak / 1e6:.0f} MB"
