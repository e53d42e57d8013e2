"""The order of a session matters: what a guest had last counts most, and the served list is the one that is judged."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from support import Server

from product_recs.bundle.files import publish, write_bundle
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.ids import IdTable
from product_recs.data.checkerboard import snapshot_of
from product_recs.data.snapshots import Histories
from product_recs.models.als import ALS
from product_recs.models.blend import ScoreBlend
from product_recs.models.interface import top_lists
from product_recs.models.order import OrderWeighted
from product_recs.models.transitions import Transitions

ITEMS, PEOPLE, N = 24, 200, 5


@pytest.fixture(scope="module")
def snapshot():
    "Everybody goes on from item to item, mostly to the next one, and lacks some."
    rng = np.random.default_rng(0)
    ages = np.full((PEOPLE, ITEMS), -1.0)
    for person in range(PEOPLE):
        way = (rng.integers(ITEMS) + np.cumsum(rng.choice([1, 1, 1, 2, 5], rng.integers(3, 9)))) % ITEMS
        ages[person, way] = np.arange(len(way))[::-1]
    return snapshot_of(ages >= 0, ages)


@pytest.fixture(scope="module")
def model(snapshot):
    als = ALS(factors=8, iterations=5, alpha=10, regularization=1)
    by_order = [OrderWeighted(Transitions(), 0.5), OrderWeighted(als, 0.6)]
    return ScoreBlend(by_order, [0.7, 0.3]).fit(snapshot)


@pytest.fixture(scope="module")
def server(tmp_path_factory, model, snapshot):
    folder = tmp_path_factory.mktemp("order")
    version = write_bundle(
        folder / "models",
        models={DISCOVERY: model, NEXT_PURCHASE: "no baskets"},
        snapshot=snapshot,
        users=IdTable(range(1, PEOPLE + 1)),
        items=IdTable(range(101, 101 + ITEMS)),
        user_columns={},
        item_columns={"popularity": snapshot.popularity},
        parameters={},
        data={},
        metrics={},
    )
    publish(folder / "models", version.name)
    with Server(folder, folder / "models", cache_size=0) as running:
        yield running


def asked(server, items, **more):
    "The list for a guest who had these items, one after the other."
    events = [{"item_id": 101 + item, "event": "purchase"} for item in items]
    status, headers, answer = server.ask("POST", "/recommend", {"events": events, "n": N, **more})
    assert status == 200, answer
    [result] = answer["results"]
    assert result["source"] == ("session" if "users" not in more else "personalised")
    return result["recommendations"]


def expected(model, way):
    "The same by the model alone, the order written as ages."
    items = np.unique(way).astype(np.int32)
    ages = np.array([way[::-1].index(item) for item in items], np.float32)
    ones = np.ones(len(items), np.float32)
    history = Histories(np.array([0, len(items)]), items, ones, ones, ages)
    lists, _ = model.top(model.fold_in(history), N, (history.indptr, history.items))
    return [101 + item for item in lists[0].tolist()]


def test_the_order_of_a_session_is_its_order(server, model):
    lists = {way: asked(server, way) for way in itertools.permutations((2, 9, 17))}
    assert {way: expected(model, list(way)) for way in lists} == lists
    assert len({tuple(items) for items in lists.values()}) > 3
    assert all(items[0] == 101 + way[-1] + 1 for way, items in lists.items())  # what follows the last one


def test_the_history_of_a_user_as_a_session_gets_the_list_that_is_judged(server, model, snapshot):
    judged = top_lists(model, np.arange(PEOPLE), N)[0]
    for person in range(0, PEOPLE, 7):
        history = snapshot.history(person)
        way = history.items[np.argsort(-history.age_days)].tolist()
        assert asked(server, way) == [101 + item for item in judged[person]], person


def test_what_comes_since_the_training_is_newer_than_the_rest(server, model, snapshot):
    person, history = 3, snapshot.history(3)
    news = [item for item in range(ITEMS) if item not in history.items][:2]
    for new in (news, news[::-1]):
        items = np.sort(np.append(history.items, new)).astype(np.int32)
        ages = np.zeros(len(items), np.float32)
        ages[np.searchsorted(items, history.items)] = history.age_days + 2
        ages[np.searchsorted(items, new)] = [1, 0]
        ones = np.ones(len(items), np.float32)
        longer = replace(
            history, indptr=np.array([0, len(items)]), items=items, confidence=ones, counts=ones, age_days=ages
        )
        lists, _ = model.top(model.fold_in(longer), N, (longer.indptr, longer.items))
        assert asked(server, new, users=[person + 1]) == [101 + item for item in lists[0].tolist()]


def test_stored_events_have_the_order_of_their_times(server, model):
    for place, moment in ((17, "10:00"), (2, "12:00"), (9, "11:00")):  # they need not arrive in order
        event = {"user_id": 9001, "item_id": 101 + place, "timestamp": f"2026-01-05T{moment}:00Z"}
        assert server.ask("POST", "/events", event)[2]["accepted"] == 1
    status, _, answer = server.get(f"/recommend/9001?n={N}")
    assert status == 200 and answer["recommendations"] == expected(model, [17, 9, 2])
    basket = {"timestamp": "2026-01-06T10:00:00Z", "user_id": 9002}
    for item in (2, 9):
        assert server.ask("POST", "/events", basket | {"item_id": 101 + item})[2]["accepted"] == 1
    together = server.get(f"/recommend/9002?n={N}")[2]["recommendations"]
    ones, items = np.ones(2, np.float32), np.array([2, 9], np.int32)
    at_once = Histories(np.array([0, 2]), items, ones, ones, 0 * ones)
    lists, _ = model.top(model.fold_in(at_once), N, (at_once.indptr, at_once.items))
    assert together == [101 + item for item in lists[0].tolist()]
