"""Every model of the report, served from a bundle: over HTTP each is what the evaluation judged."""

import re
import threading
import time

import numpy as np
import pytest
from support import Server, described_models, every_model, random_log

from product_recs.bundle.files import publish, write_bundle
from product_recs.bundle.live import rollback
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE, TASKS
from product_recs.core.ids import IdTable
from product_recs.models.blend import HabitBlend

USERS, ITEMS, N = 220, 150, 10
MODELS = every_model() | described_models()
WEIGHTS = next(model.weights for model in MODELS.values() if isinstance(model, HabitBlend))
NAMES = [name for name, model in MODELS.items() if not isinstance(model, HabitBlend)]


def both_tasks(model, snapshot):
    "The model for discovery, and with habits (of made-up weights) for the next purchase; or for this one alone."
    if model.tasks == (NEXT_PURCHASE,):
        return {DISCOVERY: MODELS["ALS"].fit(snapshot), NEXT_PURCHASE: model}
    return {DISCOVERY: model, NEXT_PURCHASE: HabitBlend(model, NEXT_PURCHASE, WEIGHTS).fit(snapshot)}


def write_models(folder, models, snapshot):
    "A bundle of these models by task, not yet live; its version."
    columns = {
        "popularity": snapshot.popularity.astype(np.int32),
        "title": np.array([f"Item {row}" for row in range(ITEMS)], object),
        "category": np.array(["tea", "coffee", "mugs"] * (ITEMS // 3), object),
    }
    return write_bundle(
        folder,
        models=models,
        snapshot=snapshot,
        users=IdTable(range(1, USERS + 1)),
        items=IdTable(range(1001, 1001 + ITEMS)),
        user_columns={"popularity": np.diff(snapshot.counts.indptr).astype(np.int32)},
        item_columns=columns,
        parameters={},
        data={"ends": "2026-12-31T00:00:00"},
        metrics={},
    ).name


def taken_up(server, version):
    "Wait until the service answers by it."
    deadline = time.monotonic() + 30
    while server.get("/health/ready")[1].get("x-model-version") != version:
        assert time.monotonic() < deadline, "the service did not take the model up"
        time.sleep(0.02)
    return version


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "A service that takes up one model after the other; what is published, and the snapshot."
    folder, snapshot = tmp_path_factory.mktemp("served"), random_log(USERS, ITEMS, 1)

    def put(models):
        version = write_models(folder / "models", models, snapshot)
        publish(folder / "models", version)
        return taken_up(server, version)

    with Server(folder, folder / "models", cache_size=0, max_n=200) as server:
        yield server, put, snapshot


def offline(model, rows, task, snapshot):
    "The lists that an evaluation judges, as ids."
    forbidden = snapshot.counts[rows] if task == DISCOVERY else None
    lists, _ = model.top(model.users(rows), N, forbidden, threads=0)
    return [[1001 + item for item in items if item >= 0] for items in lists.tolist()]


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
        assert {result["source"] for result in answer["results"]} == {rung}
        expected = offline(model, rows, task, snapshot)
        assert [result["recommendations"] for result in answer["results"]] == expected
        for place in (1, 7, 100):
            user = int(rows[place]) + 1
            status, headers, single = server.get(f"/recommend/{user}?n={N}&task={task}")
            assert single == {"user_id": user, "recommendations": expected[place]}
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
            status, headers, explanation = server.get(f"/explain/{user}/{best[place]['item_id']}?task={task}")
            assert status == 200 and headers["x-recommendation-model"] == explanation["model"] == models[task].name
            assert np.isclose(explanation["score"], best[place]["score"], atol=1e-4, rtol=1e-4)
            parts = sum(reason["contribution"] for reason in explanation["why"]) + explanation["other"]
            if explanation["signals"]:
                assert np.isclose(sum(explanation["signals"].values()), explanation["score"], atol=1e-4, rtol=1e-4)
                assert np.isclose(parts, explanation["signals"].get("taste", 0.0), atol=1e-4, rtol=1e-4)
            else:
                assert np.isclose(parts, explanation["score"], atol=1e-4, rtol=1e-4)
            assert explanation["rank"] == best[place]["rank"] and explanation["recommended"]

    status, headers, like = server.get("/similar/1001?n=5&detail=true")
    assert status == 200 and headers["x-recommendation-model"] == model.name
    assert 1001 not in like["similar"] and len(like["similar"]) == 5 and headers["x-recommendation-source"] == "similar"
    scores = [item["score"] for item in like["items"]]
    assert scores == sorted(scores, reverse=True)
    guest = server.ask("POST", "/recommend", {"events": [{"item_id": 1004, "event": "view"}], "n": 5})[2]["results"][0]
    assert guest["source"] == ("session" if model.personal else "popular") and 1004 not in guest["recommendations"]


def hits(server):
    "Answers that were sent again, so far."
    figures = server.get("/metrics")[2]
    return int(float(re.search(rb'product_recs_cache_requests_total{result="hit"} (\S+)', figures)[1]))


def test_no_answer_mixes_tasks_or_models_while_they_change(tmp_path):
    """A bundle of ALS and one of other families, each with a model of its own for each task, take turns while people
    ask; answers are kept. Whatever an answer says made it, did make it."""
    snapshot, folder = random_log(USERS, ITEMS, 1), tmp_path / "models"
    als, ease, graph = (MODELS[name].fit(snapshot) for name in ("ALS", "EASE", "item graph"))
    by_version = {}
    for models in (both_tasks(als, snapshot), both_tasks(graph, snapshot) | {DISCOVERY: ease}):
        by_version[write_models(folder, models, snapshot)] = models
    first, second = by_version
    publish(folder, first)
    rows = np.flatnonzero(np.diff(snapshot.counts.indptr))[:12]
    right = {
        (version, task, int(row) + 1): (model.name, items)
        for version, models in by_version.items()
        for task, model in models.items()
        for row, items in zip(rows, offline(model, rows, task, snapshot))
    }
    names = {version: [models[task].name for task in TASKS] for version, models in by_version.items()}
    assert names == {first: ["ALS", "ALS + habits"], second: ["EASE", "item graph + habits"]}
    for task in TASKS:  # it would not show where the two models have one list
        for user in rows + 1:
            assert right[first, task, user][1] != right[second, task, user][1]

    def ask(server, user, task):
        status, headers, answer = server.get(f"/recommend/{user}?n={N}&task={task}")
        version, name = headers["x-model-version"], headers["x-recommendation-model"]
        assert status == 200 and headers["x-recommendation-source"] == ("personalised" if task == DISCOVERY else task)
        assert (name, answer["recommendations"]) == right[version, task, user], (version, task, user)
        return version

    def everybody(server):
        return {ask(server, int(user), task) for user in rows + 1 for task in TASKS}

    with Server(tmp_path, folder) as server:
        assert everybody(server) == everybody(server) == {first}
        assert hits(server) == 2 * len(rows)  # the second time each was a kept answer
        wrong, answers, end = [], {first: 0, second: 0}, threading.Event()

        def visitors(seed):
            draw = np.random.default_rng(seed)
            while not end.is_set() and not wrong:
                try:
                    answers[ask(server, int(draw.choice(rows)) + 1, TASKS[draw.integers(2)])] += 1
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=visitors, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for turn in range(6):
            if turn % 2 == 0:
                publish(folder, second)
                live = second
            else:
                live = rollback(folder)
                assert live == first
            taken_up(server, live)
            before = answers[live]
            deadline = time.monotonic() + 20
            while answers[live] < before + 30 and not wrong and time.monotonic() < deadline:
                time.sleep(0.01)
        end.set()
        for thread in threads:
            thread.join()
        assert wrong == [] and min(answers.values()) > 60, (wrong, answers)
        hits_before = hits(server)
        assert everybody(server) == everybody(server) == {first}
        assert hits(server) >= hits_before + 2 * len(rows)
        rollback(folder, second)
        taken_up(server, second)
        assert everybody(server) == everybody(server) == {second}
        body = {"users": (rows + 1).tolist(), "n": N, "task": NEXT_PURCHASE}
        _, headers, answer = server.ask("POST", "/recommend", body)
        assert headers["x-recommendation-model"] == "item graph + habits"
        for result in answer["results"]:
            assert result["recommendations"] == right[second, NEXT_PURCHASE, result["user_id"]][1]
