"""A user's newer events through the whole path: the log that a customer writes, features, training, bundle, fold-in,
explanation."""

import json
from datetime import timedelta, timezone

import numpy as np
import pandas as pd
import pytest
from support import features_of_log

from product_recs.answer.explain import why, why_not
from product_recs.answer.lists import similar_items
from product_recs.answer.person import confidence_with, person_now, score_person
from product_recs.answer.recommender import Recommender
from product_recs.answer.rules import Filters
from product_recs.bundle.catalogue import SEEN
from product_recs.bundle.files import publish
from product_recs.bundle.ready import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.events import Event, UserState
from product_recs.core.paths import project_root
from product_recs.models.als import fit_als
from product_recs.models.foldin import Solver, fold_in
from product_recs.models.signals import BlendError, score_users
from product_recs.models.weighting import bm25
from product_recs.train import train_bundle

QUICK = {"factors": 16, "iterations": 5, "num_threads": 1, "progress": False}
NEVER_NAMED = "wishlist"


@pytest.fixture(scope="module")
def log():
    "The committed sample; with quantities, so that they can matter."
    log = pd.read_csv(project_root() / "data/interactions.csv", parse_dates=["timestamp"])
    return log.assign(quantity=np.random.default_rng(0).integers(1, 5, len(log)))


def model_of(log, folder, blend=False, **parameters):
    features = features_of_log(log, folder, **parameters)
    version, _ = train_bundle(features, folder / "models", publish_it=True, blend=blend, **QUICK)
    return features, ReadyModel(open_bundle(folder / "models", version, verify=True))


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    return model_of(log, tmp_path_factory.mktemp("trained"), blend=True)


@pytest.fixture(scope="module")
def model(trained):
    return trained[1]


def news_for(log, users, seed=1):
    "Twelve new events of each user, some on items they know, all at the end of the log, a second apart."
    random, ends = np.random.default_rng(seed), log.timestamp.max()
    items, kinds = log.item_id.unique(), ["view", "cart", "purchase", NEVER_NAMED]
    rows = []
    for user in users:
        own = log.item_id[log.user_id == user].unique()
        for item in [*random.choice(items, 8, replace=False), *random.choice(own, 3), random.choice(items)]:
            rows.append(
                (
                    user,
                    item,
                    str(random.choice(kinds)),
                    int(random.integers(1, 9)),
                    ends - timedelta(seconds=len(rows) % 60),
                )
            )
    return pd.DataFrame(rows, columns=["user_id", "item_id", "event", "quantity", "timestamp"]).drop_duplicates()


def as_events(news):
    return tuple(
        Event(int(e.item_id), e.event, float(e.quantity), e.timestamp.to_pydatetime().replace(tzinfo=timezone.utc))
        for e in news.itertuples()
    )


WEIGHTINGS = [
    dict(),
    dict(weighting="log1p", quantity="log1p"),
    dict(weighting="binary"),
    dict(quantity="none", half_life_days=20.0),
    dict(weighting="log1p", event_weights={"purchase": 3, "view": 0.5}),
    dict(weighting="bm25"),
    dict(weighting="bm25", quantity="none", half_life_days=30.0),
]


@pytest.mark.parametrize("parameters", WEIGHTINGS, ids=str)
def test_new_events_weigh_what_they_would_have_weighed_in_training(log, tmp_path, parameters):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    users = log.user_id.unique()[:25]
    news = news_for(log, users)
    features, model = model_of(log, tmp_path / "before", **parameters)
    sums = parameters | {"weighting": "none"} if parameters.get("weighting") == "bm25" else parameters
    later = features_of_log(pd.concat([log, news]), tmp_path / "after", **sums)
    assert later.items.ids.tolist() == features.items.ids.tolist()
    expected = later.all.confidence
    if sums is not parameters:  # the rarity of the items and the mean stay the model's own
        expected = bm25_with(expected, features_of_log(log, tmp_path / "before", **sums).all.confidence)
    for user in users:
        row, events = features.users.row(int(user)), as_events(news[news.user_id == user])
        items, confidence = confidence_with(model.bundle, row, events)
        wanted = expected[later.users.row(int(user))]
        assert items.tolist() == wanted.indices.tolist()
        np.testing.assert_allclose(confidence, wanted.data, rtol=2e-4)
        now = person_now(model, int(user), UserState(events))
        assert now.counts.tolist() == later.all.counts[later.users.row(int(user))].data.tolist()
        np.testing.assert_allclose(now.vector, fold_in(model.item_factors, wanted, 20.0, 1.0)[0], rtol=1e-3, atol=1e-5)


def bm25_with(sums, reference):
    "BM25 of some sums, with the rarity and the mean of others; from two calls of the real one."
    k1, b, total = 100.0, 0.8, np.asarray(reference.sum(axis=1)).ravel()
    flat = reference.copy()
    flat.data[:] = 1
    users = np.repeat(np.arange(len(total)), np.diff(flat.indptr))
    length = 1 - b + b * np.diff(flat.indptr) / np.diff(flat.indptr).mean()
    rarity = np.zeros(sums.shape[1])
    rarity[flat.indices] = bm25(flat).data * (k1 * length[users] + 1) / (k1 + 1)
    found = sums.copy()
    users = np.repeat(np.arange(sums.shape[0]), np.diff(sums.indptr))
    length = 1 - b + b * np.asarray(sums.sum(axis=1)).ravel() / total.mean()
    found.data = sums.data * (k1 + 1) / (k1 * length[users] + sums.data) * rarity[sums.indices]
    return found


def test_who_has_no_news_is_answered_as_before(trained):
    features, model = trained
    bundle, solver = model.bundle, model.solver
    again = fold_in(bundle.item_factors, features.all.confidence, 20.0, 1.0, num_threads=2)
    np.testing.assert_allclose(again, bundle.user_factors, rtol=1e-5, atol=1e-6)
    for row in range(len(bundle.users)):
        user = bundle.users[row]
        calm = person_now(model, user)
        assert (
            not calm.fresh
            and np.array_equal(calm.vector, bundle.user_factors[row])
            and np.array_equal(calm.seen, bundle.seen[row].indices)
        )
        solved = solver.solve(*confidence_with(bundle, row, ()))
        assert np.linalg.norm(solved - calm.vector) <= 1e-5 * np.linalg.norm(calm.vector)
        np.testing.assert_array_equal(
            score_person(model, calm, "next_purchase"), score_users(model.signals, np.array([row]))[0]
        )
    assert Recommender(model).recommend(user, 5, filters=Filters(exclude_seen=False)).items == bundle.items.take(
        np.argsort(-np.where(model.candidates, score_person(model, calm), -np.inf), kind="stable")[:5]
    )


@pytest.mark.parametrize("solver", ["implicit", "rotated"])
@pytest.mark.parametrize("alpha, regularization", [(1.0, 20.0), (40.0, 0.1), (0.3, 1.0)])
def test_trained_factors_are_those_that_one_by_one_solves_give(trained, solver, alpha, regularization):
    features, _ = trained
    confidence = features.all.confidence.copy()
    confidence.data *= np.float32(0.5)  # below and above the weight of an untaken item
    model = fit_als(confidence, **QUICK, solver=solver, alpha=alpha, regularization=regularization)
    one = Solver(model.item_factors, regularization, alpha)
    expected = np.array([one.solve(row.indices, row.data) for row in confidence])
    assert (np.linalg.norm(model.user_factors - expected, axis=1) <= 1e-5 * np.linalg.norm(expected, axis=1)).all()


def test_an_event_speaks_for_what_is_like_it(model):
    random = np.random.default_rng(3)
    for row in range(0, len(model.bundle.users), 5):
        calm = person_now(model, model.bundle.users[row])
        new = model.bundle.items[int(random.choice(np.setdiff1d(np.flatnonzero(model.candidates), calm.seen)))]
        gain = score_person(model, person_now(model, model.bundle.users[row], UserState((Event(new),)))) - score_person(
            model, calm
        )
        alike = [model.bundle.items.row(item) for item in similar_items(model, new, 5).items]
        assert gain[model.bundle.items.row(new)] > 0 and gain[alike].mean() > gain.mean()
        # one event in the store is one in the request
        same = person_now(model, model.bundle.users[row], session=[Event(new)])
        assert np.array_equal(same.vector, person_now(model, model.bundle.users[row], UserState((Event(new),))).vector)


def test_the_order_and_the_place_of_events_do_not_matter(model):
    user, events = model.bundle.users[4], tuple(Event(model.bundle.items[row], quantity=2) for row in (3, 9, 3, 12))
    whole = person_now(model, user, UserState(events))
    for other in (
        person_now(model, user, UserState(events[::-1])),
        person_now(model, user, UserState(events[:2]), events[2:]),
        person_now(model, user, session=[*events, Event(-1)]),
    ):
        np.testing.assert_allclose(other.vector, whole.vector, rtol=1e-5, atol=1e-7)
        assert other.items.tolist() == whole.items.tolist() and other.counts.tolist() == whole.counts.tolist()
    assert other.unknown == 1 and whole.unknown == 0


def test_nothing_of_the_forgotten_is_used(model):
    events = (Event(model.bundle.items[5]), Event(model.bundle.items[6]))
    for user in model.bundle.users.take(np.arange(0, 40, 7)):
        assert person_now(model, user, UserState(forgotten=True)).vector is None
        back = person_now(model, user, UserState(events, forgotten=True))
        guest = person_now(model, None, session=events)
        assert np.array_equal(back.vector, guest.vector) and np.array_equal(back.seen, guest.seen) and back.row is None


def test_explanations_add_up(model):
    news = UserState((Event(model.bundle.items[5]), Event(model.bundle.items[40], "view")))
    for row in range(0, len(model.bundle.users), 9):
        for who in (
            person_now(model, model.bundle.users[row]),
            person_now(model, model.bundle.users[row], news),
            person_now(model, None, news),
        ):
            scores = {task: score_person(model, who, task) for task in ("discovery", "next_purchase")}
            for item in (0, 5, 17, 40):
                taste, next_one = why(model, who, item), why(model, who, item, "next_purchase")
                size = np.abs(taste.contributions).sum()
                assert (
                    abs(taste.contributions.sum() - scores["discovery"][item]) <= 1e-4 * size
                    and abs(taste.other) <= 1e-4 * size
                )
                assert sorted(taste.items.tolist()) == who.items.tolist() and (np.diff(taste.contributions) <= 0).all()
                assert sum(next_one.signals.values()) == pytest.approx(scores["next_purchase"][item], abs=1e-4)
            place = why_not(model, who, int(who.seen[0]), [(SEEN, who.seen)], scores["discovery"])
            assert place.rule == SEEN and place.candidates == len(model.bundle.items) - len(who.seen)
            free = np.setdiff1d(np.arange(len(model.bundle.items)), who.seen)
            order = free[np.argsort(-scores["discovery"][free], kind="stable")]
            assert [
                why_not(model, who, int(item), [(SEEN, who.seen)], scores["discovery"]).rank for item in order[:5]
            ] == [1, 2, 3, 4, 5]


def test_the_exact_pass_changes_with_nothing_but_seed_and_data(trained):
    features, model = trained
    for threads in (1, 2, 3):
        again = fit_als(features.all.confidence, **QUICK | {"num_threads": threads})
        assert np.array_equal(again.user_factors, model.user_factors) and np.array_equal(
            again.item_factors, model.item_factors
        )


def test_an_older_bundle_still_answers(log, tmp_path):
    """Without a blend, without history, without the parameters of the features: as bundles once were, or as somebody
    made one by hand."""
    features, new = model_of(log, tmp_path, weighting="bm25")
    path = new.bundle.path
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["blend"], manifest["data"]["mean_total"], manifest["parameters"]["features"]["quantity"]
    for name in ("seen_counts.npy", "seen_age_days.npy"):
        del manifest["files"][name]
        (path / name).unlink()
    for parameters in (manifest["parameters"], {"factors": 16}):
        (path / "manifest.json").write_text(json.dumps(manifest | {"parameters": parameters}))
        publish(path.parent, path.name)
        old = ReadyModel(open_bundle(path.parent, verify=True)).prepare()
        user, item = (
            old.bundle.users[2],
            old.bundle.items[int(np.setdiff1d(np.arange(30), person_now(old, old.bundle.users[2]).seen)[0])],
        )
        now = person_now(old, user, UserState((Event(item),)))
        gain = score_person(old, now) - score_person(old, person_now(old, user))
        assert gain[old.bundle.items.row(item)] > 0 and now.counts is None
        assert abs(why(old, now, 3).other) < 1e-4
        with pytest.raises(BlendError, match="without a blend"):
            score_person(old, now, "next_purchase")
