"""Every model of the report, served from a bundle: over HTTP each is what the evaluation judged."""

import time

import numpy as np
import pytest
from support import Server, every_model, random_log

from product_recs.bundle.files import publish, write_bundle
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.ids import IdTable
from product_recs.models.blend import HabitBlend

USERS, ITEMS, N = 220, 150, 10
MODELS = every_model()
NAMES = [name for name, model in MODELS.items() if model.tasks is None]


def both_tasks(model, snapshot):
    "The model for discovery, and with habits (of made-up weights) for the next purchase."
    weights = next(blend.weights for blend in MODELS.values() if blend.tasks == (NEXT_PURCHASE,))
    return {DISCOVERY: model, NEXT_PURCHASE: HabitBlend(model, NEXT_PURCHASE, weights).fit(snapshot)}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "A service that takes up one model after the other; what is published, and the snapshot."
    folder, snapshot = tmp_path_factory.mktemp("served"), random_log(USERS, ITEMS, 1)
    popularity = snapshot.popularity
    columns = {
        "popularity": popularity.astype(np.int32),
        "title": np.array([f"Item {row}" for row in range(ITEMS)], object),
        "category": np.array(["tea", "coffee", "mugs"] * (ITEMS // 3), object),
    }

    def put(models):
        path = write_bundle(
            folder / "models",
            models=models,
            snapshot=snapshot,
            users=IdTable(range(1, USERS + 1)),
            items=IdTable(range(1001, 1001 + ITEMS)),
            user_columns={"popularity": np.diff(snapshot.counts.indptr).astype(np.int32)},
            item_columns=columns,
            parameters={},
            data={"ends": "2026-12-31T00:00:00"},
            metrics={},
        )
        publish(folder / "models", path.name)
        deadline = time.monotonic() + 30
        while server.get("/health/ready")[1].get("x-model-version") != path.name:
            assert time.monotonic() < deadline, "the service did not take the model up"
            time.sleep(0.02)
        return path.name

    with Server(folder, folder / "models", cache_size=0, max_n=200) as server:
        yield server, put, snapshot


def offline(model, rows, task, snapshot):
    "The lists that an evaluation judges, as ids."
    forbidden = snapshot.counts[rows] if task == DISCOVERY else None
    lists, _ = model.top(model.users(rows), N, forbidden, threads=0)
    return [[1001 + item for item in one if item >= 0] for one in lists.tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_judged_is_served(served, name):
    server, put, snapshot = served
    models = both_tasks(MODELS[name].fit(snapshot), snapshot)
    version = put(models)
    rows = np.flatnonzero(np.diff(snapshot.counts.indptr))[:200]  # who has no history is not judged
    assert len(rows) == 200
    for task, model in models.items():
        body = {"users": (rows + 1).tolist(), "n": N, "task": task}
        status, headers, answer = server.ask("POST", "/recommend", body)
        assert status == 200 and headers["x-model-version"] == version
        assert headers["x-recommendation-model"] == model.name
        rung = "popular" if not model.personal else "personalised" if task == DISCOVERY else "next_purchase"
        assert {one["source"] for one in answer["results"]} == {rung}
        expected = offline(model, rows, task, snapshot)
        assert [one["recommendations"] for one in answer["results"]] == expected
        for place in (1, 7, 100):
            user = int(rows[place]) + 1
            status, headers, one = server.get(f"/recommend/{user}?n={N}&task={task}")
            assert one == {"user_id": user, "recommendations": expected[place]}
            assert headers["x-recommendation-model"] == model.name


@pytest.mark.parametrize("name", NAMES)
def test_events_filters_reasons_and_similar_items(served, name):
    server, put, snapshot = served
    models = both_tasks(MODELS[name].fit(snapshot), snapshot)
    put(models)
    user, model = 31, models[DISCOVERY]
    status, _, before = server.get(f"/recommend/{user}?n={N}&detail=true")
    assert before["model"] == model.name
    bought = before["recommendations"][0]
    event = {"user_id": user, "item_id": bought, "event": "purchase"}
    assert server.ask("POST", "/events", event)[2]["accepted"] == 1
    after = server.get(f"/recommend/{user}?n={N}")[2]["recommendations"]
    assert bought not in after and after != before["recommendations"]
    due = server.get(f"/recommend/{user}?n=200&task=next_purchase&detail=true")[2]
    assert bought in due["recommendations"]  # a habit now

    rules = {"deny": after[:2], "where": {"category": ["tea"]}, "max_per": {"category": 4}}
    filtered = server.ask("POST", "/recommend", {"users": [user], "n": N, "filters": rules})[2]["results"][0]
    assert len(filtered["recommendations"]) == 4 and not set(filtered["recommendations"]) & {bought, *after[:2]}
    assert all((item - 1001) % 3 == 0 for item in filtered["recommendations"]) and filtered["shortfall"]

    for task in (DISCOVERY, NEXT_PURCHASE):
        best = server.get(f"/recommend/{user}?n={N}&task={task}&detail=true")[2]["items"]
        for place in (0, N - 1):
            status, headers, told = server.get(f"/explain/{user}/{best[place]['item_id']}?task={task}")
            assert status == 200 and headers["x-recommendation-model"] == told["model"] == models[task].name
            assert np.isclose(told["score"], best[place]["score"], atol=1e-4, rtol=1e-4)
            parts = sum(one["contribution"] for one in told["why"]) + told["other"]
            if told["signals"]:
                assert np.isclose(sum(told["signals"].values()), told["score"], atol=1e-4, rtol=1e-4)
                assert np.isclose(parts, told["signals"].get("taste", 0.0), atol=1e-4, rtol=1e-4)
            else:
                assert np.isclose(parts, told["score"], atol=1e-4, rtol=1e-4)
            assert told["rank"] == best[place]["rank"] and told["recommended"]

    status, headers, like = server.get("/similar/1001?n=5&detail=true")
    assert status == 200 and headers["x-recommendation-model"] == model.name
    assert 1001 not in like["similar"] and len(like["similar"]) == 5 and headers["x-recommendation-source"] == "similar"
    scores = [one["score"] for one in like["items"]]
    assert scores == sorted(scores, reverse=True)
    guest = server.ask("POST", "/recommend", {"events": [{"item_id": 1004, "event": "view"}], "n": 5})[2]["results"][0]
    assert guest["source"] == ("session" if model.personal else "popular") and 1004 not in guest["recommendations"]
