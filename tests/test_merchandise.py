"""Rules of the shop: what they may never do, and that every door shows the same list."""

import json
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from math import inf

import duckdb
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import SMALL, Server, problem, publish_board, random_log, ready_in_memory, until, weights

from product_recs.answer.ladder import Request, answer, score_request
from product_recs.answer.merchandise import RuleError, read_rules
from product_recs.answer.placing import fit_rules, pushed
from product_recs.answer.recommender import Recommender, open_recommender
from product_recs.answer.rules import Filters
from product_recs.api import create_app
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.events import Event, UserState
from product_recs.core.ids import IdTable
from product_recs.core.settings import Settings
from product_recs.feedback.changes import Changes
from product_recs.feedback.store import Store
from product_recs.inference import recommend_many
from product_recs.jobs.batch import Question, write_batch
from product_recs.models.als import ALS
from product_recs.models.blend import HabitBlend
from product_recs.web.security import add_key

ITEMS, USERS = 40, 30
NOW = datetime(2026, 6, 15, tzinfo=timezone.utc)


def shop():
    "A trained shop: two tasks, categories, prices of which some are unknown, sold-out items, members."
    snapshot = random_log(USERS, ITEMS, seed=3)
    als = ALS(**SMALL).fit(snapshot)
    habits = HabitBlend(als, NEXT_PURCHASE, weights(NEXT_PURCHASE)).fit(snapshot)
    place = np.arange(ITEMS)
    columns = {
        "popularity": snapshot.popularity.astype(np.int32),
        "category": np.array(["tea", "coffee", "mugs", None], object)[place % 4],
        "price": np.where(place % 5, place / 2, np.nan),
        "available": place % 11 != 7,
    }
    people = {
        "popularity": np.diff(snapshot.counts.indptr),
        "age": np.array(["young", "old", None], object)[np.arange(USERS) % 3],
        "club": np.arange(USERS) % 2 == 0,
    }
    models = {DISCOVERY: als, NEXT_PURCHASE: habits}
    return ready_in_memory(models, snapshot, IdTable(range(USERS)), IdTable(range(100, 100 + ITEMS)), people, columns)


MODEL = shop()
IDS = st.integers(95, 100 + ITEMS + 5)  # some are not there
WHERE = st.sampled_from(
    [
        {"category": ["tea"]},
        {"category": ["coffee", "mugs"]},
        {"price": {"max": 8}},
        {"price": {"min": 15}},
        {"colour": ["red"]},
    ]
)
SOME = st.lists(IDS, min_size=1, max_size=6, unique=True)


@st.composite
def rule(draw, number):
    action = draw(st.sampled_from(["pin", "boost", "bury", "exclude"]))
    given_rule = {"name": f"rule {number}"}
    which = draw(st.sampled_from(["items", "where", "both"]))
    if which != "where":
        given_rule["items"] = draw(SOME)
    if which != "items":
        given_rule["where"] = draw(WHERE)
    if action == "pin":
        given_rule["pin"] = draw(st.integers(1, 12))
    else:
        given_rule[action] = True if action == "exclude" else draw(st.floats(0.1, 3))
    if draw(st.booleans()):
        given_rule["users"] = draw(st.sampled_from([{"age": ["old"]}, {"club": [True]}, {"shoe": [42]}]))
    if draw(st.booleans()):
        given_rule["places"] = draw(st.sampled_from([["home"], ["cart", "mail"]]))
    if draw(st.booleans()):
        given_rule["tasks"] = [draw(st.sampled_from([DISCOVERY, NEXT_PURCHASE]))]
    return given_rule


@st.composite
def documents(draw):
    rules, share = [], draw(st.sampled_from([0, 0.2, 0.5, 1]))
    for number in range(draw(st.integers(0, 6))):
        candidate = draw(rule(number))
        try:
            read_rules({"rules": [*rules, candidate]})
        except RuleError as error:
            assert "is taken by" in str(error)  # two pins that meet
        else:
            rules.append(candidate)
    return {"rules": rules, "boosted_share": share}


ASKED = st.fixed_dictionaries(
    {
        "user": st.one_of(st.none(), st.integers(0, USERS + 1)),
        "n": st.integers(1, 15),
        "task": st.sampled_from([DISCOVERY, NEXT_PURCHASE]),
        "session": st.lists(st.integers(100, 100 + ITEMS), max_size=2).map(lambda ids: tuple(map(Event, ids))),
        "filters": st.builds(
            Filters,
            deny=st.lists(IDS, max_size=3),
            allow=st.one_of(st.none(), st.lists(IDS, min_size=10, max_size=30)),
            where=st.sampled_from([{}, {"category": ["tea", "coffee"]}, {"price": {"max": 12}}]),
            max_per=st.sampled_from([{}, {"category": 1}, {"category": 2}]),
        ),
        "state": st.lists(IDS, max_size=3).map(lambda ids: UserState(denied=frozenset(map(str, ids)))),
        "unavailable": st.frozensets(IDS.map(str), max_size=3),
        "attributes": st.sampled_from([{}, {"age": "old"}, {"club": True}]),
        "place": st.sampled_from([None, "home", "cart"]),
        "diversity": st.sampled_from([0, 0, 0.4, 1]),
    }
)
much = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def forbidden(scored):
    "Rows that anything forbids, but for items that nobody has had and that can be bought: those may be pinned."
    gone = np.zeros(ITEMS, bool)
    for _, rows in scored.ruled_out:
        gone[rows] = True
    return gone


@much
@given(documents(), ASKED)
def test_no_rule_brings_back_what_is_forbidden(document, asked):
    rules = fit_rules(read_rules(document), MODEL)
    request = Request(**asked, rules=rules)
    scored, result = score_request(MODEL, request), answer(MODEL, request)
    gone, new = forbidden(scored), ~MODEL.catalogue.known & MODEL.catalogue.offered
    pinned = {row for _, part, _ in scored.applied.pins for row in part.rows}
    for row in result.rows:
        if gone[row]:  # a new item that a pin names, and that nothing but its newness forbids
            reasons = {reason for reason, rows in scored.ruled_out if row in rows}
            assert new[row] and row in pinned and reasons == {"not available or without interactions"}
    assert len(set(result.rows)) == len(result.rows) <= asked["n"]
    assert (result.shortfall is None) == (len(result) == asked["n"])
    for column, most in asked["filters"].max_per.items():
        values = [MODEL.bundle.item_columns[column][row] for row in result.rows]
        assert all(values.count(value) <= most for value in values if value is not None)
    for name in (name for names in (result.rules or {}).values() for name in names):
        assert name in scored.applied.names


@much
@given(documents(), ASKED)
def test_a_list_is_as_long_with_rules_as_without_but_for_what_they_exclude(document, asked):
    asked = asked | {"filters": replace(asked["filters"], max_per={})}
    request = Request(**asked, rules=fit_rules(read_rules(document), MODEL))
    scored = score_request(MODEL, request)
    left = int((~forbidden(scored) & (scored.scores > -inf)).sum())
    result = answer(MODEL, request)
    assert min(left, request.n) <= len(result) <= request.n


@much
@given(documents(), ASKED)
def test_boosts_are_bounded_and_pins_stand_where_they_are_told(document, asked):
    request = Request(**asked | {"diversity": 0}, rules=fit_rules(read_rules(document), MODEL))
    scored, result = score_request(MODEL, request), answer(MODEL, request)
    applied = scored.applied
    finite = scored.scores > -inf
    raised = pushed(scored.scores, MODEL.candidates, applied)[finite]
    spread = scored.scores[MODEL.candidates & finite].std(dtype=np.float64) or 1.0
    assert (np.abs(raised - scored.scores[finite]) <= 3 * spread * (1 + 1e-5)).all()
    lifted, buried = (
        {row for part, strength in applied.pushes if strength * sign > 0 for row in part.rows} for sign in (1, -1)
    )
    for place, part, which in applied.pins:
        if part.rule.items and place <= len(result.rows) and part.rows[which] == result.rows[place - 1]:
            assert part.rule.name in result.rules[result.items[place - 1]]
    assume(not lifted & buried and not asked["filters"].max_per)
    calm = [entry for entry in document["rules"] if "boost" not in entry]
    without = answer(MODEL, replace(request, rules=fit_rules(read_rules({"rules": calm}), MODEL)))
    pinned = {entry["name"] for entry in document["rules"] if "pin" in entry}
    free = [row for row, item in zip(result.rows, result.items) if not pinned & {*(result.rules or {}).get(item, ())}]
    entrants = [row for row in free if row in lifted and row not in without.rows]
    share = document["boosted_share"]
    most = max(1, int(share * request.n + 1e-9)) if share else 0
    # more than their share come only where nothing else is left that may be shown
    assert len(entrants) <= most or not {*without.rows} - {*result.rows}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    documents(),
    st.sampled_from([DISCOVERY, NEXT_PURCHASE]),
    st.sampled_from([None, "home"]),
    st.permutations(range(6)),
)
def test_the_order_of_rules_without_pins_does_not_matter_and_batch_is_as_one_by_one(document, task, place, order):
    recommender = Recommender(MODEL, rules=fit_rules(read_rules(document), MODEL))
    users = [*range(USERS), "nobody"]
    many = recommend_many(recommender, users, 6, task, place=place)
    for user, batch in zip(users, many):
        single = recommender.recommend(user, 6, task, place=place)
        # a block of users is multiplied at once, which rounds in another way
        assert replace(batch, scores=[]) == replace(single, scores=[])
        assert np.allclose(batch.scores, single.scores, atol=1e-5)
    calm = [entry for entry in document["rules"] if "pin" not in entry]
    turned = [calm[number] for number in order if number < len(calm)]
    left, right = (Recommender(MODEL, rules=fit_rules(read_rules({"rules": rules}), MODEL)) for rules in (calm, turned))
    for user in users[:6]:
        assert left.recommend(user, 8, task, place=place).items == right.recommend(user, 8, task, place=place).items


def test_a_rule_that_does_not_apply_costs_nothing():
    "The exact search answers, and no score of all items is ever made; a boost needs them."

    class Searching(ALS):
        def scores(self, representations):
            raise LookupError("all items are scored")

    searching = Searching(**SMALL).fit(random_log(USERS, ITEMS, seed=3))
    bundle = replace(MODEL.bundle, models={DISCOVERY: searching})
    model = type(MODEL)(bundle)
    ask = lambda **more: answer(model, Request(5, 5, **more))
    plain = ask()
    boost = {"name": "a", "boost": 1, "items": [101]}
    for document in (
        {"rules": []}, {"rules": [boost | {"places": ["home"]}]}, {"rules": [boost | {"users": {"age": ["young"]}}]},
        {"rules": [boost | {"tasks": [NEXT_PURCHASE]}]},
    ):  # fmt: skip
        assert ask(rules=fit_rules(read_rules(document), model)) == plain
    gone = plain.items[0]
    out = fit_rules(read_rules({"rules": [{"name": "x", "exclude": True, "items": [gone]}]}), model)
    assert ask(rules=out).items[:4] == plain.items[1:]
    assert set(ask(diversity=0.5).items) <= set(answer(model, Request(5, 25)).items)
    with pytest.raises(LookupError):
        ask(rules=fit_rules(read_rules({"rules": [boost]}), model))


def test_a_new_item_may_be_pinned_and_nothing_else_brings_it():
    new = next(row for row in np.flatnonzero(~MODEL.catalogue.known) if MODEL.catalogue.offered[row])
    item = MODEL.bundle.items[int(new)]
    pin = fit_rules(read_rules({"rules": [{"name": "new", "pin": 2, "items": [item]}]}), MODEL)
    boost = fit_rules(read_rules({"rules": [{"name": "new", "boost": 3, "items": [item]}]}), MODEL)
    assert answer(MODEL, Request(5, 4, rules=pin)).items[1] == item
    assert item not in answer(MODEL, Request(5, ITEMS, rules=boost)).items
    sold_out = answer(MODEL, Request(5, 4, rules=pin, unavailable=frozenset([str(item)])))
    assert item not in sold_out.items and "not available at the moment" in sold_out.undone[0]


# --- the service -----------------------------------------------------------------------------------------------------

PIN = {"name": "week's offer", "pin": 1, "items": [110], "places": ["home"]}
SALE = {"name": "summer sale", "boost": 3, "items": [112, 114], "from": "2026-06-01", "until": "2026-06-15"}
OUT = {"name": "not for members", "exclude": True, "items": [102, 104], "users": {"club": [True]}}
BOARD = {"user_columns": {"popularity": np.full(24, 11), "club": np.arange(24) % 3 == 0}}


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def client(tmp_path):
    publish_board(tmp_path / "models", **BOARD)
    clock = Clock(NOW)
    options = {"auth": "off", "log_level": "ERROR", "database_url": f"sqlite:///{tmp_path}/feedback.db"}
    app = create_app(Settings(models_dir=tmp_path / "models", **options), now=clock)
    with TestClient(app, base_url="http://localhost") as opened:
        opened.clock, opened.app_service, opened.folder = clock, app.state.service, tmp_path
        yield opened


def listed(client, user, **query):
    return client.get(f"/recommend/{user}", params={"n": 4, **query}).json()["recommendations"]


def test_a_sale_begins_and_ends_by_the_clock_also_in_kept_answers(client):
    before = listed(client, 1)
    client.put("/rules", json={"rules": [SALE]})
    during = listed(client, 1)
    assert during != before and {112, 114} & {*during} and listed(client, 1) == during
    client.clock.now = datetime(2026, 6, 15, 23, 59, 59, tzinfo=timezone.utc)
    assert listed(client, 1) == during
    client.clock.now += timedelta(seconds=1)
    assert listed(client, 1) == before
    state = client.get("/rules").json()["rules"][0]
    assert not state["active"] and state["why"] == "it ended 2026-06-16 00:00 UTC"
    client.clock.now = NOW
    assert listed(client, 1) == during


def test_every_door_gives_the_same_list(client, opened):
    document = {"rules": [PIN, SALE | {"from": "2020-01-01", "until": "2099-01-01"}, OUT]}
    answer = client.put("/rules", json=document)
    assert answer.status_code == 200
    users, folder = [*range(1, 25), 999], client.folder
    posted = client.post("/recommend", json={"users": users, "n": 4, "place": "home"}).json()["results"]
    by_post = [result["recommendations"] for result in posted]
    assert by_post == [listed(client, user, place="home") for user in users]
    detailed = client.get("/recommend/1", params={"n": 4, "place": "home", "detail": True}).json()
    assert [item["rules"] for item in detailed["items"]][0] == ["week's offer"]
    url = f"sqlite:///{folder}/feedback.db"
    with open_recommender(folder / "models", url) as batch:
        assert [result.items for result in recommend_many(batch, users, 4, place="home")] == by_post
        write_batch(batch, Question(n=4, place="home"), folder / "all", [*range(1, 25)], progress=False)
    rows = duckdb.sql(f"SELECT user_id, item_id FROM '{folder}/all/*.parquet' ORDER BY user_id, rank").fetchall()
    assert [[item for user, item in rows if user == wanted] for wanted in range(1, 25)] == by_post[:-1]
    members = [user for user in range(1, 25) if (user - 1) % 3 == 0]
    assert all(not {102, 104} & {*by_post[user - 1]} for user in members)
    assert any({102, 104} & {*by_post[user - 1]} for user in range(1, 25) if user not in members)
    guests = [
        client.post("/recommend", json={"n": 24, "attributes": attributes}).json()["results"][0]["recommendations"]
        for attributes in ({}, {"club": True})
    ]
    assert {102, 104} <= {*guests[0]} and not {102, 104} & {*guests[1]}


def test_rules_are_named_in_explanations_and_impressions(client):
    client.put("/rules", json={"rules": [PIN, SALE, {"name": "gone", "exclude": True, "items": [101]}]})
    reasons = lambda item: client.get(f"/explain/1/{item}", params={"place": "home"}).json()
    assert reasons(110)["rules"] == ['pinned to place 1 by the rule "week\'s offer"'] and reasons(110)["rank"] == 1
    assert reasons(101)["rule"] == "excluded by the rule 'gone'" and reasons(101)["rank"] is None
    assert "moved up by the rule 'summer sale'" in reasons(112)["rules"]
    short = client.get("/recommend/1", params={"n": 24})
    assert "1 item excluded by the rule 'gone'" in short.headers["x-recommendation-shortfall"]
    listed(client, 1, place="home")
    listed(client, 1, place="home")  # a kept answer is shown again
    client.put("/rules", json={"rules": []})
    listed(client, 3)
    client.app_service.desk.impressions.close()
    shown = client.app_service.desk.store.impressions(3)
    assert [impression.rules for impression in shown][0] is None
    assert [impression.rules["110"] for impression in shown[1:]] == [["week's offer"]] * 2
    assert {*shown[1].rules} <= {*shown[1].items}


def test_a_wrong_document_changes_nothing_and_says_what_to_write(client):
    client.put("/rules", json={"rules": [PIN]})
    for wrong, words in (
        ({"rules": [PIN | {"pin": 0}]}, 'rule "week\'s offer": pin: 0 is no place'),
        ({"rules": [PIN | {"palces": ["home"]}]}, "did you mean 'places'"),
        ({"rules": [SALE | {"until": "31.8."}]}, "until: '31.8.' is no date; write it as"),
        ({"rules": [PIN, PIN | {"name": "b"}]}, "place 1 is taken by rule"),
        ({"rule": []}, "did you mean 'rules'"),
        ({"rules": [PIN | {"items": [110], "where": {"price": {"max": 1e999}}}]}, "no file can hold"),
    ):
        refused = client.put("/rules", content=json.dumps(wrong), headers={"content-type": "application/json"})
        assert refused.status_code == 422 and words in refused.json()["detail"], refused.json()
        tried = client.post("/rules/preview", content=json.dumps({"document": wrong}),
                            headers={"content-type": "application/json"})  # fmt: skip
        assert tried.status_code == 422 and words in tried.json()["detail"]
    assert client.get("/rules").json()["document"] == {"rules": [PIN]}
    warned = client.put("/rules", json={"rules": [PIN | {"where": {"colour": ["red"]}}, OUT | {"items": [999]}]}).json()
    assert len(warned["warnings"]) == 2 and "'colour'" in warned["warnings"][0] and "999" in warned["warnings"][1]
    assert client.get("/rules").json()["warnings"] == warned["warnings"]


def test_a_preview_stores_nothing(client):
    document = {"rules": [PIN, SALE | {"from": "2027-01-01", "until": "2027-01-31"}]}
    tried = client.post("/rules/preview", json={"users": [1], "n": 4, "place": "home", "document": document}).json()
    assert tried["after"][0]["item_id"] == 110 and tried["before"][0]["item_id"] == 101
    assert tried["rules"][1]["why"].startswith("it begins 2027-01-01")
    later = {"users": [1], "n": 4, "document": document, "at": "2027-01-15T12:00:00+02:00"}
    tried = client.post("/rules/preview", json=later).json()
    assert {112, 114} & {line["item_id"] for line in tried["after"]}
    assert tried["rules"][0]["why"] == "it is for the place home"
    seen = client.post("/rules/preview", json={"users": [1], "document": {"rules": [PIN | {"items": [103]}]},
                                               "place": "home"}).json()  # fmt: skip
    assert seen["undone"] == ['rule "week\'s offer": pin to place 1: item 103 is already seen']
    assert client.get("/rules").json()["source"] == "none"
    client.app_service.desk.impressions.close()
    assert client.app_service.desk.store.impressions() == []


def test_the_store_keeps_rules_and_every_reader_sees_them(url, opened):
    store = opened(Store(url).open())
    readers = [opened(Changes(opened(Store(url).open())).start()) for _ in range(2)]
    document = {"rules": [PIN | {"name": "Tee für alle 🍵"}]}
    assert store.set_rules(document) and not store.set_rules(document)
    for reader in readers:
        until(lambda reader=reader: reader.merchandise.document == document, 3)
    assert store.rules() == document and opened(Changes(store).start()).merchandise.document == document
    assert store.set_rules(None) and store.rules() is None
    for reader in readers:
        until(lambda reader=reader: reader.merchandise.document is None, 3)


def test_two_workers_and_a_file(tmp_path, url):
    "A change is in every worker within a second; a broken edit of the file keeps the last good rules."
    publish_board(tmp_path / "models")
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n  - {name: from the file, pin: 1, items: [110]}\n")
    with Server(tmp_path, tmp_path / "models", workers=2, database_url=url, rules_file=file) as server:
        first = lambda: server.get("/recommend/1?n=1")[2]["recommendations"]

        def all_say(items, seconds=2.0):
            "So many answers in a row, of new connections, that both workers were asked."
            until(lambda: all(first() == items for _ in range(24)), seconds + 18)

        all_say([110])
        assert server.get("/rules")[2]["source"] == "file"
        assert server.ask("PUT", "/rules", {"rules": [{"name": "by hand", "pin": 1, "items": [112]}]})[0] == 200
        all_say([112])
        state = server.get("/rules")[2]
        assert state["source"] == "database" and state["overruled"] == str(file)
        file.write_text("rules: [{name: from the file, pin: 0, items: [114]}]\n")
        assert server.ask("DELETE", "/rules")[2]["source"] == "file"
        all_say([110])
        until(lambda: "pin: 0 is no place" in (server.get("/rules")[2]["error"] or ""), 5)
        all_say([110])
        file.write_text("rules: [{name: from the file, pin: 1, items: [114]}]\n")
        all_say([114])
        assert any("pin: 0 is no place" in line for line in server.stderr.read_text().splitlines())


def test_who_may_change_rules(tmp_path):
    publish_board(tmp_path / "models")
    keys = {scope: add_key(tmp_path / "keys.json", scope, scope) for scope in ("read", "write", "admin")}
    with Server(tmp_path, tmp_path / "models", auth="on", api_keys_file=tmp_path / "keys.json") as server:
        ask = lambda method, path, scope, body=None: server.ask(
            method, path, body, {"Authorization": f"Bearer {keys[scope]}"}
        )
        assert problem(ask("PUT", "/rules", "write", {"rules": []}), 403).detail
        assert ask("PUT", "/rules", "admin", {"rules": [PIN]})[0] == ask("GET", "/rules", "read")[0] == 200
        assert ask("POST", "/rules/preview", "read", {"users": [1]})[0] == 200
        assert problem(ask("DELETE", "/rules", "write"), 403).detail and ask("DELETE", "/rules", "admin")[0] == 200


def test_rules_change_while_lists_are_made(client):
    "No list mixes two documents, and none fails."
    both = [{"rules": [PIN | {"places": ["home"], "items": [item]}]} for item in (110, 112)]
    client.put("/rules", json=both[0])
    wrong, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            response = client.get("/recommend/1", params={"n": 3, "place": "home"})
            if response.status_code != 200 or response.json()["recommendations"][0] not in (110, 112):
                wrong.append(response.text)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for turn in range(20):
        answer = client.put("/rules", json=both[turn % 2])
        assert answer.status_code == 200
        assert listed(client, 1, place="home")[0] == (110, 112)[turn % 2]
    stop.set()
    for asker in askers:
        asker.join()
    assert wrong == []


def test_rules_wait_for_a_model_and_hold_for_the_next(tmp_path):
    "Rules are taken without a model; a model that has the items and columns brings no warning, and one without does."
    (tmp_path / "models").mkdir()
    options = {"auth": "off", "log_level": "ERROR", "database_url": f"sqlite:///{tmp_path}/feedback.db"}
    app = create_app(Settings(models_dir=tmp_path / "models", **options))
    with TestClient(app, base_url="http://localhost") as client:
        put = client.put("/rules", json={"rules": [PIN, {"name": "w", "bury": 1, "items": [123]}]})
        assert put.status_code == 200 and put.json()["warnings"] == [] and put.json()["rules"][0]["items"] is None
        publish_board(tmp_path / "models")
        assert client.post("/model/reload").json()["status"] == "reloaded"
        assert client.get("/rules").json()["warnings"] == [] and listed(client, 1, place="home")[0] == 110
        publish_board(tmp_path / "models", users=range(1, 21), items=range(101, 121))
        assert client.post("/model/reload").json()["status"] == "reloaded"
        assert "123 is not in this model" in client.get("/rules").json()["warnings"][0]
        assert listed(client, 1, place="home")[0] == 110
