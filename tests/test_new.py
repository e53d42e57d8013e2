"""`GET /new` shows what came last: by the day that the products file tells, or by the order of its rows."""

import csv
import datetime as dt
import random

import pytest
from fastapi.testclient import TestClient

from product_recs.api import create_app
from product_recs.core.settings import Settings
from product_recs.features import build_features
from product_recs.ingest import ingest
from product_recs.train import train_bundle

TEA, COFFEE = range(101, 109), range(111, 119)
TODAY = dt.date.today()
COLD = [  # id, title, category, brand, colour, days since the release; None: no day
    (305, "Amazon fee", "odd", "Elm", "grey", 400),
    (301, "Tea 101", "tea", "Elm", "green", 5),  # the title of an item that tea drinkers have
    (302, "Smoked tea", "tea", "Oak", "black", 50),
    (307, "smoked  TEA", "tea", "Oak", "black", 40),
    (303, "Iced coffee", "coffee", "Oak", "brown", 20),
    (306, "Coffee of next year", "coffee", "Oak", "brown", -300),
    (304, "Mug", "odd", "Oak", "white", None),
    (308, "Sold out", "tea", "Oak", "black", 1),
    (309, "Lookalike", "coffee", "Fir", "brown", 2),  # the same in three columns as every coffee
]


def make(folder, dated=True):
    "A live model of 60 users, 16 items and what is new."
    draw = random.Random(1)
    log = [
        (user, item, f"2026-01-{draw.randint(1, 28):02}")
        for user in range(1, 61)
        for item in draw.sample(TEA if user <= 30 else COFFEE, 6)
    ]
    log += [(user, 101, "2026-01-09") for user in range(1, 31)]
    rows = [(item, f"Tea {item}", "tea", "Elm", "green", "2020-01-01", "true") for item in TEA]
    rows += [(item, f"Coffee {item}", "coffee", "Fir", "brown", "2020-01-01", "true") for item in COFFEE]
    for item, title, category, brand, colour, days in COLD:
        day = "" if days is None else (TODAY - dt.timedelta(days)).isoformat()
        rows.append((item, title, category, brand, colour, day, "false" if item == 308 else "true"))
    names = ["item_id", "title", "category", "brand", "colour", "Release date" if dated else "day", "available"]
    for name, header, table in (
        ("log.csv", ["user_id", "item_id", "timestamp"], log),
        ("products.csv", names, rows),
    ):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *table])
    ingest(folder / "log.csv", folder / "run", products=folder / "products.csv", now="2026-02-01", progress=False)
    features = build_features(folder / "run", folder / "run" / "features")
    train_bundle(features, folder / "models", publish_it=True, next_model="none", factors=4, progress=False)
    settings = Settings(
        models_dir=folder / "models", log_level="ERROR", auth="off", database_url=f"sqlite:///{folder}/feedback.db"
    )
    return TestClient(create_app(settings), base_url="http://localhost")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with make(tmp_path_factory.mktemp("dated")) as client:
        yield client


def new(client, query=""):
    answer = client.get(f"/new?n=20&detail=true{query}")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [line["item_id"] for line in body["items"]] == body["recommendations"]
    return body


def test_a_guest_sees_the_newest_first_and_one_of_a_title(shop):
    body = new(shop)
    assert body["recommendations"] == [309, 301, 303, 307, 305, 304]
    assert body["source"] == "new" and body["order"] == "the newest first by 'Release date'"
    assert {line["score"] for line in body["items"]} == {None}


def test_a_user_sees_what_fits_and_no_twin_of_what_they_own_first(shop):
    tea, coffee = new(shop, "&user_id=1"), new(shop, "&user_id=40")
    assert tea["source"] == "content" and tea["recommendations"][0] == 307, "not 301, whose title they have"
    assert tea["recommendations"][-1] == 301 and 302 not in tea["recommendations"]
    assert coffee["recommendations"][0] == 303 and coffee["recommendations"][-1] == 309, "309 is every coffee again"
    for body in (tea, coffee):
        scores = [line["score"] for line in body["items"]]
        known = [score for score in scores if score is not None]
        assert known and scores == [*sorted(known, reverse=True), *[None] * (len(scores) - len(known))]
        assert body["order"].startswith("by what they have in common") and "'Release date'" in body["order"]
        assert not {306, 308} & {*body["recommendations"]}, "not released yet, sold out"


def test_what_the_shop_sells_already_is_there_and_is_not_the_newest(shop):
    assert shop.post("/availability", json={"items": [{"item_id": 306, "available": True}]}).status_code == 200
    assert new(shop)["recommendations"] == [309, 301, 303, 307, 305, 304, 306]
    assert new(shop, "&category=coffee")["recommendations"] == [309, 303, 306]
    shop.post("/availability", json={"items": [{"item_id": item, "available": False} for item in (306, 309)]})
    assert new(shop)["recommendations"] == [301, 303, 307, 305, 304]
    shop.post("/events", json={"user_id": 700, "item_id": 301, "event": "view"})
    assert 301 not in new(shop, "&user_id=700")["recommendations"]


def test_without_a_day_the_last_rows_of_the_file_come_first(tmp_path):
    with make(tmp_path, dated=False) as client:
        body = new(client)
        assert body["recommendations"] == [309, 304, 306, 303, 307, 301, 305]
        assert body["order"].startswith("the last rows of the products file first") and "Amazon" not in body["order"]
        assert new(client, "&user_id=1")["recommendations"][0] == 307
