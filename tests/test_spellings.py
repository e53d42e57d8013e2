"""A run that merged spellings of one id takes any of them at every door, and answers with the spelling of its log."""

import json
import time

import numpy as np
import pytest
from support import N, Server, call, problem, publish_board

from product_recs.answer.recommender import open_recommender
from product_recs.data.arrays import save_table
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
from product_recs.inference import recommend_many

USERS = [f"U {number:02}A" for number in range(1, N + 1)]
ITEMS = [f"845{number:02}A" for number in range(1, N + 1)]
RULES = {"ingest": {"normalise_ids": ["case", "space"], "numbers": []}}
MINE, OTHER = "u 01a", "U01A"  # two spellings of the first user, neither of them the log's


def board(folder, version, parameters=RULES, **more):
    cold = folder / "cold.parquet"
    save_table(cold, {"item_id": np.array(["NEW 1", "NEW 2"], object), "title": np.array(["Pot", "Pan"], object)})
    save_table(
        folder / "fees.parquet",
        {"item_id": np.array(["POST"], object), "excluded": np.array(["postage"], object)},
    )
    return publish_board(
        folder / "models",
        USERS,
        ITEMS,
        parameters=parameters,
        version=version,
        cold_items=cold,
        excluded_items=folder / "fees.parquet",
        **more,
    )


@pytest.fixture
def shop(tmp_path):
    board(tmp_path, "folded")
    with Server(tmp_path, tmp_path / "models") as server:
        yield server, tmp_path


def path(id):
    return id.replace(" ", "%20")


def test_every_door_takes_any_spelling(shop):
    server, folder = shop
    for spelling in (MINE, OTHER, USERS[0]):
        status, headers, body = server.get(f"/recommend/{path(spelling)}?n=1")
        assert body == {"user_id": USERS[0], "recommendations": [ITEMS[0]]}
        assert headers["x-recommendation-source"] == "personalised"
    assert server.get(f"/similar/{ITEMS[0].lower()}?n=1")[2]["item_id"] == ITEMS[0]
    assert server.get(f"/items/{path('84501 a')}")[2]["item_id"] == ITEMS[0]
    assert server.get("/items?query=84501a")[2]["items"][0]["item_id"] == ITEMS[0]
    facts = server.get("/items/new1")[2]
    assert (facts["item_id"], facts["title"]) == ("NEW 1", "Pot")
    assert server.get("/items/post")[2]["excluded"] == "postage"
    why = server.get(f"/explain/{path(MINE)}/{ITEMS[0].lower()}")[2]
    assert (why["user_id"], why["item_id"], why["rank"]) == (USERS[0], ITEMS[0], 1)
    assert server.get(f"/users/{path(MINE)}/history")[2]["known"]
    ask = lambda **body: server.ask("POST", "/recommend", body)[2]["results"]
    mine, other = ask(users=[MINE, OTHER], n=1)
    assert mine == other and mine["user_id"] == USERS[0] and mine["recommendations"] == [ITEMS[0]]
    assert ITEMS[0] not in ask(users=[MINE], n=3, filters={"deny": ["84501 a"]})[0]["recommendations"]
    assert ask(users=[MINE], filters={"allow": ["84501a"]})[0]["recommendations"] == [ITEMS[0]]
    session = ask(events=[{"item_id": ITEMS[1].lower()}], n=1)[0]
    assert session["source"] == "session" and session["recommendations"][0] in ITEMS[3::2]
    problem(server.get("/items/84599z"), 404)
    assert server.get("/recommend/New%20One?n=1")[2]["user_id"] == "New One"
    command = ["product-recs", "recommend", MINE, "-n", "1", "--json", "--models-dir", str(folder / "models")]
    assert json.loads(call(folder, *command).stdout)["recommendations"] == [ITEMS[0]]
    command = ["product-recs", "similar", ITEMS[0].lower(), "--json", "--models-dir", str(folder / "models")]
    assert json.loads(call(folder, *command).stdout)["item_id"] == ITEMS[0]
    with open_recommender(folder / "models", f"sqlite:///{folder}/feedback.db") as recommender:
        assert [answer.items for answer in recommend_many(recommender, [MINE, OTHER], 1)] == [[ITEMS[0]]] * 2


def test_what_is_told_in_one_spelling_holds_for_all(shop):
    server, folder = shop
    events = [
        {"user_id": MINE, "item_id": "84501a"},
        {"user_id": OTHER, "item_id": "84503 A", "event": "deny"},
        {"user_id": "Stranger", "item_id": ITEMS[1].lower()},
        {"user_id": "STRANGER", "item_id": ITEMS[3]},
        {"user_id": MINE, "item_id": "post"},
    ]
    assert server.ask("POST", "/events", {"events": events})[2]["accepted"] == 5
    for spelling in (MINE, OTHER, USERS[0]):
        assert ITEMS[0] not in server.get(f"/recommend/{path(spelling)}?n={N}")[2]["recommendations"]
        lines = server.get(f"/users/{path(spelling)}/history")[2]["history"]
        assert {line["item_id"] for line in lines if line["origin"] == "feedback"} == {ITEMS[0], ITEMS[2], "POST"}
        rule = server.get(f"/explain/{path(spelling)}/{ITEMS[2]}?task=discovery")[2]["rule"]
        assert rule in ("already seen", "denied")
    for spelling in ("stranger", "STRANGER", "Stran ger"):
        _, headers, body = server.get(f"/recommend/{path(spelling)}?n={N}")
        assert headers["x-recommendation-source"] == "session"
        assert not {ITEMS[1], ITEMS[3]} & {*body["recommendations"]}
        assert len(server.get(f"/users/{path(spelling)}/history")[2]["history"]) == 2
    available = {"items": [{"item_id": "84505 a", "available": False}, {"item_id": "new1", "available": False}]}
    assert server.ask("POST", "/availability", available)[2]["changed"] == 2
    assert ITEMS[4] not in server.get(f"/popular?n={N}")[2]["recommendations"]
    assert [server.get(f"/items/{item}")[2]["available"] for item in (ITEMS[4], "84505a", "NEW%201")] == [False] * 3
    assert server.get("/new")[2]["recommendations"] == ["NEW 2"]
    gone = server.ask("DELETE", f"/users/{path('U 01 a')}")[2]
    assert gone["user_id"] == USERS[0] and gone["events_deleted"] == 3
    for spelling in (MINE, OTHER, USERS[0]):
        assert server.get(f"/users/{path(spelling)}/history")[2] == {
            "user_id": USERS[0],
            "known": False,
            "forgotten": True,
            "history": [],
        }
    assert server.ask("DELETE", "/users/STRANGER")[2]["events_deleted"] == 2
    assert server.get("/recommend/Stranger")[1]["x-recommendation-source"] == "popular"


def test_without_such_rules_spellings_are_different_ids_and_a_swap_changes_it_at_once(tmp_path):
    with Store(f"sqlite:///{tmp_path}/feedback.db") as store:
        store.add_events([NewEvent(MINE, ITEMS[0]), NewEvent(USERS[0], ITEMS[2], "deny")])
    board(tmp_path, "exact", {})
    with Server(tmp_path, tmp_path / "models") as server:
        assert server.get(f"/recommend/{path(MINE)}?n=1")[1]["x-recommendation-source"] == "session"
        assert server.get(f"/recommend/{path(USERS[0])}?n=1")[2]["recommendations"] == [ITEMS[0]]
        problem(server.get(f"/items/{ITEMS[0].lower()}"), 404)
        board(tmp_path, "folded")
        deadline = time.monotonic() + 30
        while server.get("/health/ready")[1]["x-model-version"] != "folded":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for spelling in (MINE, USERS[0]):
            assert ITEMS[0] not in server.get(f"/recommend/{path(spelling)}?n={N}")[2]["recommendations"]
        assert server.get(f"/items/{ITEMS[0].lower()}")[2]["item_id"] == ITEMS[0]
