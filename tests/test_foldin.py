"""A user's newer events through the whole path: the log that a customer writes, features, training, bundle, fold-in,
explanation."""

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
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE, TASKS
from product_recs.core.events import Event, UserState
from product_recs.core.paths import project_root
from product_recs.models.als import PLAIN_DEFAULTS, fit_als
from product_recs.models.foldin import Solver, fold_in
from product_recs.models.weighting import bm25
from product_recs.train import train_bundle

QUICK = {"factors": 16, "iterations": 5, "num_threads": 1, "progress": False}
NEVER_NAMED = "wishlist"


@pytest.fixture(scope="module")
def log():
    "The committed sample; with quantities, so that they can matter."
    log = pd.read_csv(project_root() / "data/interactions.csv", parse_dates=["timestamp"])
    return log.assign(quantity=np.random.default_rng(0).integers(1, 5, len(log)))


def model_of(log, folder, next_model="none", **parameters):
    features = features_of_log(log, folder, **parameters)
    als = QUICK | PLAIN_DEFAULTS
    version, _ = train_bundle(features, folder / "models", publish_it=True, next_model=next_model, **als)
    return features, ReadyModel(open_bundle(folder / "models", version, verify=True))


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    return model_of(log, tmp_path_factory.mktemp("trained"), next_model="ALS + habits")


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
        assert now.history.counts.tolist() == later.all.counts[later.users.row(int(user))].data.tolist()
        plain = PLAIN_DEFAULTS["regularization"], PLAIN_DEFAULTS["alpha"]
        solved = fold_in(model.model().item_factors, wanted, *plain)
        np.testing.assert_allclose(now.representation, solved, rtol=1e-3, atol=1e-5)


def bm25_with(sums, reference):
    "BM25 of some sums, with the rarity and the mean of others; from two calls of the real one."
    k1, b, total = 100.0, 0.8, np.asarray(reference.sum(axis=1)).ravel()
    flat = reference.copy()
    flat.data[:] = 1
    users = np.repeat(np.arange(len(total)), np.diff(flat.indptr))
    length = 1 - b + b * np.diff(flat.indptr) / np.diff(flat.indptr).mean()
    rarity = np.zeros(sums.shape[1])
    rarity[flat.indices] = bm25(flat).data * (k1 * length[users] + 1) / (k1 + 1)
    weights = sums.copy()
    users = np.repeat(np.arange(sums.shape[0]), np.diff(sums.indptr))
    length = 1 - b + b * np.asarray(sums.sum(axis=1)).ravel() / total.mean()
    weights.data = sums.data * (k1 + 1) / (k1 * length[users] + sums.data) * rarity[sums.indices]
    return weights


def test_who_has_no_news_is_answered_as_before(trained):
    features, model = trained
    als, everybody = model.model(), np.arange(len(model.bundle.users))
    np.testing.assert_allclose(als.fold_in(features.all.histories(everybody)), als.user_factors, rtol=1e-5, atol=1e-6)
    for row in everybody:
        user, history = model.bundle.users[row], model.bundle.history(row)
        for task in TASKS:
            calm, asked = person_now(model, user, task=task), model.model(task)
            assert not calm.news and np.array_equal(calm.items, history.items)
            scores = asked.scores(asked.users(np.array([row])))[0]
            np.testing.assert_array_equal(score_person(model, calm)[model.candidates], scores[model.candidates])
            folded = asked.scores(asked.fold_in(history))[0]
            np.testing.assert_allclose(folded, scores, rtol=1e-4, atol=1e-5)
        calm = person_now(model, user)
        solved = als.solver.solve(*confidence_with(model.bundle, row, ()))
        assert np.linalg.norm(solved - calm.representation[0]) <= 1e-5 * np.linalg.norm(solved)
    best = np.argsort(-np.where(model.candidates, score_person(model, calm), -np.inf), kind="stable")[:5]
    listed = Recommender(model).recommend(user, 5, filters=Filters(exclude_seen=False))
    assert listed.items == model.bundle.items.take(best)


@pytest.mark.parametrize("solver", ["implicit", "rotated"])
@pytest.mark.parametrize("alpha, regularization", [(1.0, 20.0), (40.0, 0.1), (0.3, 1.0)])
def test_trained_factors_are_those_that_one_by_one_solves_give(trained, solver, alpha, regularization):
    features = trained[0]
    confidence = features.all.confidence.copy()
    confidence.data *= np.float32(0.5)  # below and above the weight of an untaken item
    model = fit_als(confidence, **QUICK, solver=solver, alpha=alpha, regularization=regularization)
    reference = Solver(model.item_factors, regularization, alpha)
    expected = np.array([reference.solve(row.indices, row.data) for row in confidence])
    assert (np.linalg.norm(model.user_factors - expected, axis=1) <= 1e-5 * np.linalg.norm(expected, axis=1)).all()


def test_an_event_speaks_for_what_is_like_it(model):
    random = np.random.default_rng(3)
    for row in range(0, len(model.bundle.users), 5):
        calm = person_now(model, model.bundle.users[row])
        new = model.bundle.items[int(random.choice(np.setdiff1d(np.flatnonzero(model.candidates), calm.items)))]
        gain = score_person(model, person_now(model, model.bundle.users[row], UserState((Event(new),)))) - score_person(
            model, calm
        )
        alike = [model.bundle.items.row(item) for item in similar_items(model, new, 5).items]
        assert gain[model.bundle.items.row(new)] > 0 and gain[alike].mean() > gain.mean()
        # one event in the store is one in the request
        same = person_now(model, model.bundle.users[row], session=[Event(new)])
        stored = person_now(model, model.bundle.users[row], UserState((Event(new),)))
        assert np.array_equal(same.representation, stored.representation)


def test_the_order_and_the_place_of_events_do_not_matter(model):
    user, events = model.bundle.users[4], tuple(Event(model.bundle.items[row], quantity=2) for row in (3, 9, 3, 12))
    whole = person_now(model, user, UserState(events))
    for other in (
        person_now(model, user, UserState(events[::-1])),
        person_now(model, user, UserState(events[:2]), events[2:]),
        person_now(model, user, session=[*events, Event(-1)]),
    ):
        np.testing.assert_allclose(other.representation, whole.representation, rtol=1e-5, atol=1e-7)
        assert other.items.tolist() == whole.items.tolist()
        assert other.history.counts.tolist() == whole.history.counts.tolist()
    assert other.unknown == 1 and whole.unknown == 0


def test_nothing_of_the_forgotten_is_used(model):
    events = (Event(model.bundle.items[5]), Event(model.bundle.items[6]))
    for user in model.bundle.users.take(np.arange(0, 40, 7)):
        assert person_now(model, user, UserState(forgotten=True)).representation is None
        back = person_now(model, user, UserState(events, forgotten=True))
        guest = person_now(model, None, session=events)
        assert np.array_equal(back.representation, guest.representation) and back.row is None
        assert np.array_equal(back.items, guest.items)


def test_explanations_add_up(model):
    news = UserState((Event(model.bundle.items[5]), Event(model.bundle.items[40], "view")))
    for row in range(0, len(model.bundle.users), 9):
        for given in ((model.bundle.users[row],), (model.bundle.users[row], news), (None, news)):
            person, buyer = (person_now(model, *given, task=task) for task in (DISCOVERY, NEXT_PURCHASE))
            scores, next_scores = score_person(model, person), score_person(model, buyer)
            for item in (0, 5, 17, 40):
                taste, next_one = why(model, person, item), why(model, buyer, item)
                size = np.abs(taste.contributions).sum()
                assert abs(taste.contributions.sum() - scores[item]) <= 1e-4 * size
                assert abs(taste.other) <= 1e-4 * size and not taste.signals
                assert (
                    sorted(taste.items.tolist()) == person.items.tolist() and (np.diff(taste.contributions) <= 0).all()
                )
                assert sum(next_one.signals.values()) == pytest.approx(next_scores[item], abs=1e-4)
            place = why_not(model, person, int(person.items[0]), [(SEEN, person.items)], scores)
            assert place.rule == SEEN and place.candidates == len(model.bundle.items) - len(person.items)
            free = np.setdiff1d(np.arange(len(model.bundle.items)), person.items)
            order = free[np.argsort(-scores[free], kind="stable")]
            assert [why_not(model, person, int(item), [(SEEN, person.items)], scores).rank for item in order[:5]] == [
                1,
                2,
                3,
                4,
                5,
            ]


def test_the_exact_pass_changes_with_nothing_but_seed_and_data(trained):
    features, model = trained
    for threads in (1, 2, 3):
        again = fit_als(features.all.confidence, **QUICK | PLAIN_DEFAULTS | {"num_threads": threads})
        assert np.array_equal(again.user_factors, model.model().user_factors)
        assert np.array_equal(again.item_factors, model.model().item_factors)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("ALS", {"unobserved_weight": 0.1, "nu": 0.5, "regularization": 0.5}),
        ("weighted ALS", {"user_power": 0.5, "item_power": 0.3}),
        ("scaled ALS", {}),
        ("BPR", {"factors": 8, "iterations": 20}),
    ],
    ids=str,
)
def test_each_objective_is_folded_in_as_it_was_trained(log, tmp_path, name, parameters):
    "Trained, written, opened: the histories of the bundle give what the training found, and news change the answer."
    features = features_of_log(log, tmp_path)
    als = {**QUICK} if name != "BPR" else {"progress": False}
    version, _ = train_bundle(
        features, tmp_path / "models", model=name, next_model="none", model_parameters=parameters, **als
    )
    model = ReadyModel(open_bundle(tmp_path / "models", version, verify=True))
    served, everybody = model.model(), np.arange(len(model.bundle.users))
    trained = served.users(everybody)
    length = np.linalg.norm(trained, axis=1)
    for folded in (
        served.fold_in(features.all.histories(everybody)),
        np.concatenate([served.fold_in(model.bundle.history(row)) for row in everybody]),
    ):
        assert (np.linalg.norm(folded - trained, axis=1) <= 1e-5 * length).all()
    calm = person_now(model, model.bundle.users[3])
    new = model.bundle.items[int(np.setdiff1d(np.flatnonzero(served.candidates), calm.items)[0])]
    moved = person_now(model, model.bundle.users[3], UserState((Event(new),)))
    assert not np.allclose(moved.representation, calm.representation, rtol=1e-3)
