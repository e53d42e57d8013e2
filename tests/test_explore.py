"""Exploration through the service: which places, which items, what is logged, and that the log can be believed."""

import csv
import json
import random
import sqlite3
import threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from fastapi.testclient import TestClient
from scipy.stats import chi2

from product_recs.answer.explore import Exploration, this_day
from product_recs.answer.recommender import Recommender
from product_recs.api import create_app
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.settings import Settings
from product_recs.data.arrays import load_table
from product_recs.features import build_features
from product_recs.inference import recommend_many
from product_recs.jobs.batch import Question, write_batch
from product_recs.ingest import ingest
from product_recs.train import train_bundle

KNOWN, RARE, COLD = range(101, 131), range(201, 221), 301  # nobody has had the last one
KINDS = ("tea", "coffee", "cocoa")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A live model of 80 users: 30 items that many have, 20 that one to three have, one that nobody has."
    folder, draw = tmp_path_factory.mktemp("explore"), random.Random(3)
    log = [(user, item) for user in range(1, 81) for item in draw.sample(KNOWN, 10)]
    log += [(user, item) for item in RARE for user in draw.sample(range(1, 81), 1 + item % 3)]
    products = [(item, f"Item {item}", KINDS[item % 3], item % 7 + 1) for item in (*KNOWN, *RARE, COLD)]
    for name, header, rows in (
        ("log.csv", ["user_id", "item_id"], log),
        ("products.csv", ["item_id", "title", "category", "price"], products),
    ):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    ingest(folder / "log.csv", folder / "run", products=folder / "products.csv", progress=False)
    features = build_features(folder / "run", folder / "run" / "features")
    train_bundle(features, folder / "models", publish_it=True, next_model="none", factors=6, progress=False)
    return folder / "models"


@contextmanager
def shop(models, folder, **settings):
    "The service on a feedback store of its own."
    settings = Settings(
        models_dir=models,
        log_level="ERROR",
        auth="off",
        database_url=f"sqlite:///{folder}/feedback.db",
        **{"explore": 0.2, "explore_below": 5, **settings},
    )
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        yield client


def logged(folder):
    "Rung, items and propensities of all impressions, as the database has them; call it when the service has stopped."
    with sqlite3.connect(folder / "feedback.db") as database:
        rows = database.execute("SELECT source, items, propensities FROM impressions ORDER BY id").fetchall()
    return [
        (source, json.loads(items), None if chances is None else json.loads(chances)) for source, items, chances in rows
    ]


def get(client, path):
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(client, **body):
    answer = client.post("/recommend", json={"n": 10, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def explored_of(body):
    "Item -> propensity of the explored lines of a detailed list."
    return {line["item_id"]: line["propensity"] for line in body["items"] if line["explored"]}


def test_off_is_the_default_and_changes_nothing(models, tmp_path):
    with shop(models, tmp_path, explore=0) as client:
        body = get(client, "/recommend/1?detail=true")
        assert len(body["items"]) == 10 and not {"explored", "propensity"} & set(body["items"][0])
        plain = Recommender(ReadyModel(open_bundle(models))).recommend(1, 10)
        assert body["recommendations"] == plain.items and get(client, "/recommend/1?explore=0")["recommendations"]
        for answer in (client.get("/recommend/1?explore=0.1"), client.post("/recommend", json={"explore": 0.1})):
            assert answer.status_code == 422 and "explore" in answer.json()["errors"][0]["field"]
        assert get(client, f"/explain/1/{plain.items[0]}")["explored"] is None
    assert [chances for *_, chances in logged(tmp_path)] == [None] * 2  # NULL, not the JSON null


def test_two_of_ten_places_and_the_log_says_with_which_chance(models, tmp_path):
    with shop(models, tmp_path, explore=0) as client:
        greedy = get(client, "/recommend/1")["recommendations"]
    with shop(models, tmp_path) as client:
        body = get(client, "/recommend/1?detail=true")
        again = get(client, "/recommend/1?detail=true")  # kept
        plain = get(client, "/recommend/1")
        [posted] = post(client, users=[1], detail=True)
        fewer, none, short = (get(client, f"/recommend/1?{query}") for query in ("explore=0.1", "explore=0", "n=4"))
        figures = client.get("/metrics").text
        for answer in (client.get("/recommend/1?explore=0.3"), client.post("/recommend", json={"explore": 0.3})):
            assert answer.status_code == 422 and "explore" in answer.json()["errors"][0]["field"]
    with shop(models, tmp_path) as client:
        assert get(client, "/recommend/1")["recommendations"] == body["recommendations"]  # of another process, too
    tried = explored_of(body)
    assert [line["rank"] for line in body["items"] if line["explored"]] == [4, 8] and set(tried) <= set(RARE)
    assert all(0 < chance < 1 for chance in tried.values())
    assert all(line["propensity"] == 1 for line in body["items"] if not line["explored"])
    assert [item for item in body["recommendations"] if item not in tried] == greedy[:8]
    assert body == again and plain["recommendations"] == posted["recommendations"] == body["recommendations"]
    assert posted["items"] == body["items"]
    assert 'product_recs_cache_requests_total{result="hit"} 1.0' in figures, "the second one was a kept answer"
    assert none["recommendations"] == greedy and short["recommendations"] == greedy[:4]  # a fifth of four is none
    assert len(set(fewer["recommendations"]) & set(RARE)) == 1 + len(set(greedy[:9]) & set(RARE))
    lines = logged(tmp_path)
    as_keys = {str(item): chance for item, chance in tried.items()}
    assert [chances for *_, chances in lines[1:5]] == [as_keys] * 4, "the kept answer as well"
    assert list(map(int, lines[1][1])) == body["recommendations"]
    assert len(lines[5][2]) == 1 and [chances for *_, chances in lines[6:8]] == [None, None]


def test_a_list_holds_for_a_day(models, tmp_path, monkeypatch):
    lists = []
    with shop(models, tmp_path) as client:
        for day in ("1", "1", "2", "3", "1"):
            monkeypatch.setattr("product_recs.web.service.this_day", lambda day=day: day)
            lists.append(get(client, "/recommend/2")["recommendations"])
    assert lists[0] == lists[1] == lists[4] and len({tuple(items) for items in lists}) == 3


def test_the_draws_are_as_often_as_the_log_says_and_an_estimate_from_it_is_right(models, tmp_path):
    with shop(models, tmp_path) as client:
        for _ in range(1500):
            post(client, events=[{"item_id": 101}, {"item_id": 104}])
        for _ in range(3):
            post(client)  # of a guest nothing is known: popular
    lines = logged(tmp_path)
    assert {(source, chances is None) for source, _, chances in lines} == {("session", False), ("popular", True)}
    lists = [(items, chances) for source, items, chances in lines if source == "session"]
    counts, chances = Counter(), {}
    for items, logged_chances in lists:
        assert len(logged_chances) == 2
        for item, chance in logged_chances.items():
            counts[items.index(item), item] += 1
            assert chances.setdefault((items.index(item), item), chance) == chance
    for place in (3, 7):
        pairs = [pair for pair in chances if pair[0] == place]
        seen, expected = (np.array([of[pair] for pair in pairs]) for of in (counts, chances))
        assert np.isclose(expected.sum(), 1), "every item that could come has come"
        expected = expected * len(lists)
        assert chi2.sf(((seen - expected) ** 2 / expected).sum(), len(pairs) - 1) > 1e-4
    # clicks with a known chance, the better the more often an item is shown: what would showing all alike bring?
    rng, candidates = np.random.default_rng(0), sorted({item for _, item in chances})
    often = Counter(item for (_, item), count in counts.items() for _ in range(count))
    appeal = {item: 0.6 * rank / len(often) for rank, (item, _) in enumerate(often.most_common()[::-1])}
    clicks = [
        (rng.random() < appeal[item], chance) for _, logged_chances in lists for item, chance in logged_chances.items()
    ]
    estimates = np.array([click / len(candidates) / chance for click, chance in clicks])
    truth, error = np.mean(list(appeal.values())), estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - truth) < 3.5 * error < 0.1
    assert np.mean([click for click, _ in clicks]) > truth + 3 * error, "without the propensities it is wrong"


def test_nothing_that_a_rule_removed_comes_back(models, tmp_path):
    denied, sold_out, kept_away = RARE[:3], RARE[3:6], RARE[6:9]
    with shop(models, tmp_path, explore=0.5) as client:
        for item in denied:
            client.post("/events", json={"user_id": 5, "item_id": item, "event": "deny"})
        client.post("/availability", json={"items": [{"item_id": item, "available": False} for item in sold_out]})
        history = {line["item_id"] for line in get(client, "/users/5/history")["history"]}
        for number in range(60):
            rules = {"deny": list(kept_away), "where": {"price": {"min": 2}}, "max_per": {"category": 4}}
            [result] = post(client, users=[5], events=[{"item_id": 110 + number % 9}], filters=rules, detail=True)
            items = result["recommendations"]
            assert len(items) == len(set(items)) == 10 and explored_of(result) and not result["items"][0]["explored"]
            assert not {*denied, *sold_out, *kept_away, *history} & {*items}
            assert all(line["attributes"]["price"] >= 2 for line in result["items"])
            assert max(Counter(line["attributes"]["category"] for line in result["items"]).values()) <= 4
            [only] = post(client, users=[5], filters={"allow": [*RARE[8:12], *KNOWN]}, detail=True)
            assert set(explored_of(only)) <= set(RARE[8:12])
        everything = post(client, users=[5], n=100, detail=True)[0]
        assert everything["shortfall"].startswith("only ") and "explored" not in everything["items"][0]


def test_the_rung_content_explores_and_segment_and_popular_do_not(models, tmp_path):
    with shop(models, tmp_path) as client:
        [content] = post(client, events=[{"item_id": COLD}], detail=True)
        assert content["source"] == "content" and len(explored_of(content)) == 2 and len(content["items"]) == 10
        for query in ({}, {"filters": {"where": {"category": ["tea"]}}}):
            [result] = post(client, detail=True, **query)
            assert result["source"] in ("popular", "segment") and "explored" not in result["items"][0]
    assert [source for source, _, chances in logged(tmp_path) if chances] == ["content"]


def test_explain_says_it_in_words(models, tmp_path):
    with shop(models, tmp_path) as client:
        body = get(client, "/recommend/7?detail=true")
        for item in explored_of(body):
            buyers = 1 + item % 3
            people = "1 person has" if buyers == 1 else f"{buyers} people have"
            facts = get(client, f"/explain/7/{item}")
            assert facts["recommended"] and facts["explored"] == f"shown to learn about it: {people} it so far"
        first = get(client, f"/explain/7/{body['recommendations'][0]}")
        assert first["recommended"] and first["explored"] is None
        greedy = get(client, "/recommend/7?explore=0")["recommendations"]
        gone = [item for item in greedy if item not in body["recommendations"]]
        assert gone and not any(get(client, f"/explain/7/{item}")["recommended"] for item in gone)


def test_the_batch_draws_as_the_service_does(models, tmp_path):
    recommender = Recommender(ReadyModel(open_bundle(models)).prepare())
    users, today = [*range(1, 21), "nobody"], Exploration(0.2, 5, this_day())
    lists = recommend_many(recommender, users, 10, explore=today)
    with shop(models, tmp_path) as client:
        over_http = [get(client, f"/recommend/{user}")["recommendations"] for user in users]
    assert [answer.items for answer in lists] == over_http
    assert [len(answer.propensities or {}) for answer in lists] == [2] * 20 + [0]
    write_batch(recommender, Question(explore=today), tmp_path / "lists", progress=False)
    table = load_table(tmp_path / "lists" / "part-00000.parquet")
    rows = table["user_id"] == 1
    assert table["item_id"][rows].tolist() == over_http[0]
    chances = table["propensity"][rows].astype(float)
    assert np.flatnonzero(np.isfinite(chances)).tolist() == [3, 7]
    assert np.allclose(chances[[3, 7]], list(lists[0].propensities.values()))


def test_rules_and_a_posted_product_beside_exploration(models, tmp_path):
    "A product of the day is pinned where exploration would be; what rules exclude or bury is not tried out."
    buried, excluded = [*RARE[:5]], [*RARE[5:10]]
    rules = [
        {"name": "launch", "pin": 4, "items": [900]},
        {"name": "old stock", "bury": 2, "items": buried},
        {"name": "recalled", "exclude": True, "items": excluded},
        {"name": "sale", "boost": 1, "items": [*KNOWN[:4]]},
    ]
    with shop(models, tmp_path) as client:
        greedy = get(client, "/recommend/1?detail=true")
        assert [line["rank"] for line in greedy["items"] if line["explored"]] == [4, 8]
        answer = client.put("/rules", json={"rules": rules})
        assert answer.status_code == 200
        assert get(client, "/recommend/1?explore=0")["recommendations"][3] != 900  # nobody knows it yet
        product = {"items": [{"item_id": 900, "attributes": {"title": "Dark roast", "category": "coffee", "price": 5}}]}
        assert client.post("/items", json=product).json()["taken_up"]
        before = get(client, "/recommend/1?explore=0&detail=true")
        body, again = (get(client, "/recommend/1?detail=true") for _ in range(2))  # the second one is kept
        [posted] = post(client, users=[1], detail=True)
        lists = [result["recommendations"] for result in post(client, users=[*range(1, 81)])]
        [varied] = post(client, users=[1], detail=True, diversity=1)
        [elsewhere] = post(client, users=[1], filters={"deny": [900]})
        pinned, tried = (get(client, f"/explain/1/{item}") for item in (900, [*explored_of(body)][0]))
    chances = explored_of(body)
    assert body == again and posted["items"] == body["items"]
    assert len(chances) == 2 and 900 not in chances and set(chances) <= {*RARE[10:]}
    for result in (body, varied, before):
        assert (
            result["recommendations"][3] == 900
            and result["items"][3]["rules"] == ["launch"]
            and len(result["items"]) == 10
        )
        assert result["items"][3]["title"] == "Dark roast" and result["items"][3].get("propensity", 1) == 1
    assert explored_of(varied) and varied["recommendations"] != body["recommendations"]
    assert 900 not in elsewhere["recommendations"]
    left = [item for item in before["recommendations"] if item in body["recommendations"]]
    assert [item for item in body["recommendations"] if item not in chances] == left  # the last ones gave way
    assert all(items[3] == 900 and not {*buried, *excluded} & {*items} for items in lists)
    assert pinned["rules"] == ["pinned to place 4 by the rule 'launch'"] and pinned["explored"] is None
    assert tried["recommended"] and "shown to learn about it" in tried["explored"]
    with sqlite3.connect(tmp_path / "feedback.db") as database:
        rows = database.execute("SELECT items, propensities, rules FROM impressions WHERE user_id = '1'").fetchall()
    named = {str(line["item_id"]): line["rules"] for line in body["items"] if line["rules"]}
    noted = [tuple(json.loads(value) for value in row) for row in rows if row[1] and row[2]]
    as_shown = ([str(item) for item in body["recommendations"]], {str(item): chances[item] for item in chances}, named)
    assert noted.count(as_shown) == 4 and named["900"] == ["launch"]  # made, kept, posted alone and among all


def test_no_list_fails_while_products_come_and_rules_change(models, tmp_path):
    "Every list has the rules on its own model: those who ask meanwhile notice nothing of a renewal."
    wrong, stop = [], threading.Event()
    with shop(models, tmp_path) as client:

        def put(item):
            rules = [{"name": "first", "pin": 1, "items": [item]}, {"name": "out", "exclude": True, "items": [RARE[0]]}]
            return client.put("/rules", json={"rules": rules})

        history = {line["item_id"] for user in (1, 2) for line in get(client, f"/users/{user}/history")["history"]}
        first = [item for item in KNOWN if item not in history][:2]
        put(first[0])

        def ask(user):
            while not stop.is_set():
                response = client.get(f"/recommend/{user}")
                if response.status_code != 200 or response.json()["recommendations"][0] not in first:
                    wrong.append(response.text)

        askers = [threading.Thread(target=ask, args=[user]) for user in (1, 2, "nobody")]
        for asker in askers:
            asker.start()
        for turn in range(15):
            product = {"items": [{"item_id": 900 + turn, "attributes": {"title": f"Product {turn}"}}]}
            assert client.post("/items", json=product).status_code == 200
            assert put(first[turn % 2]).status_code == 200
            assert get(client, "/recommend/1")["recommendations"][0] == first[turn % 2]
        stop.set()
        for asker in askers:
            asker.join()
    assert wrong == []
