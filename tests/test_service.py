"""What the service promises over HTTP: two worker processes, a trained model, and a feedback store in a real SQLite
file and in a real PostgreSQL."""

import json
import shutil
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from fastapi.testclient import TestClient
from scipy.sparse import csr_matrix
from support import Server, both, new_database, one, problem, train, until

from product_recs.answer.ladder import Request, answer
from product_recs.api import create_app
from product_recs.bundle.checkerboard import publish_checkerboard
from product_recs.bundle.files import current_version, publish
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.live import rollback
from product_recs.bundle.ready import ReadyModel
from product_recs.core.ids import IdTable
from product_recs.core.settings import Settings
from product_recs.data.arrays import save_table
from product_recs.data.left_out import LeftOut
from product_recs.models.foldin import Solver
from product_recs.web.security import add_key

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # platformdirs, where there is no XDG_RUNTIME_DIR
STORES = ["sqlite", "postgresql"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder of models with two versions of different taste; the first is live."
    folder = tmp_path_factory.mktemp("trained")
    first, second = train(folder), train(folder, factors=12, iterations=2)
    publish(folder / "models", first)
    return folder / "models", first, second


def url_of(kind, folder, request):
    return f"sqlite:///{folder}/feedback.db" if kind == "sqlite" else new_database(request.getfixturevalue("postgres"))


@contextmanager
def serving(folder, trained, url, **settings):
    "Two workers on a copy of the models."
    shutil.copytree(trained[0], folder / "models", symlinks=True)
    with Server(
        folder, folder / "models", **{"workers": 2, "database_url": url, "watch_seconds": 0.1, **settings}
    ) as server:
        server.models, server.url = folder / "models", url
        both(server, "/health/live")
        yield server


@pytest.fixture(scope="module", params=STORES)
def shop(request, tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("shop")
    with serving(folder, trained, url_of(request.param, folder, request)) as server:
        yield server


def lists(server, user, **more):
    "What both workers recommend to a user: source and items."
    result = one(server, "/recommend", "POST", {"users": [user], "n": 10, **more})["results"][0]
    return result["source"], result["recommendations"]


def post(server, *events):
    status, _, body = server.ask("POST", "/events", {"events": list(events)})
    assert status == 200 and body["rejected"] == 0, body
    return [result["status"] for result in body["results"]]


def event(user, item, event="purchase", **more):
    return {"user_id": user, "item_id": item, "event": event, **more}


# --- feedback --------------------------------------------------------------------------------------------------------


def test_an_event_counts_at_the_next_request_in_every_worker(shop):
    source, before = lists(shop, 11)
    assert source == "personalised" and len(before) == 10 and one(shop, "/recommend/11")["recommendations"] == before
    assert post(shop, event(11, before[0])) == ["accepted"]
    assert before[0] not in one(shop, "/recommend/11")["recommendations"] and before[0] not in lists(shop, 11)[1]
    assert lists(shop, 7001)[0] == "popular"
    for item in before[:3]:
        post(shop, event(7001, item, "cart"))
        source, items = lists(shop, 7001)
        assert source == "session" and item not in items and len(items) == 10
    assert [
        (line["item_id"], line["event"], line["origin"]) for line in one(shop, "/users/7001/history")["history"]
    ] == [(item, "cart", "feedback") for item in before[2::-1]]


def test_a_key_counts_once_whichever_workers_get_it(shop):
    body = {"events": [event(7002, item, key=f"order-1-{item}") for item in (101, 102, 103)]}
    with ThreadPoolExecutor(8) as pool:
        answers = [
            *pool.map(lambda _: shop.ask("POST", "/events", body), range(16)),
            *both(shop, "/events", "POST", body),
        ]
    statuses = Counter(result["status"] for _, _, body in answers for result in body["results"])
    assert (
        statuses["accepted"] == 3
        and statuses["duplicate"] == 3 * (len(answers) - 1)
        and set(statuses) == {"accepted", "duplicate"}
    )
    assert len(one(shop, "/users/7002/history")["history"]) == 3
    status, _, mixed = shop.ask(
        "POST",
        "/events",
        {"events": [event(7002, 104, key="new"), event(7002, 105, quantity=-1), event(7002, 101, key="order-1-101")]},
    )
    assert (
        status == 200
        and [result["status"] for result in mixed["results"]] == ["accepted", "rejected", "duplicate"]
        and "quantity" in mixed["results"][1]["error"]
    )


def test_what_a_user_denies_never_comes(shop):
    _, before = lists(shop, 12)
    post(shop, event(12, before[0], "deny"), event(12, before[1], "deny"))
    assert not {*before[:2]} & {*lists(shop, 12)[1]} and not {*before[:2]} & {
        *one(shop, "/recommend/12?task=next_purchase")["recommendations"]
    }
    assert "denied" in one(shop, f"/explain/12/{before[0]}")["rule"]
    post(shop, event(12, before[0], "undeny"), event(12, before[1], "undeny"))
    assert lists(shop, 12)[1] == before


def test_a_forgotten_user_is_a_stranger_in_every_worker(shop):
    post(shop, event(13, 101), event(13, 102, "deny"))
    record = one(shop, "/users/13/history")
    assert record["known"] and {line["origin"] for line in record["history"]} == {"model", "feedback"}
    status, _, body = shop.ask("DELETE", "/users/13")
    assert status == 200 and body == {"user_id": 13, "forgotten": True, "events_deleted": 2}
    assert one(shop, "/users/13/history") == {"user_id": 13, "known": False, "forgotten": True, "history": []}
    popular = one(shop, "/popular?n=10")["recommendations"]
    assert lists(shop, 13) == ("popular", popular) and one(shop, "/recommend/13")["recommendations"] == popular
    assert shop.ask("DELETE", "/users/13")[2]["events_deleted"] == 0
    post(shop, event(13, popular[0]))
    source, items = lists(shop, 13)
    assert source == "session" and popular[0] not in items
    assert [line["item_id"] for line in one(shop, "/users/13/history")["history"]] == [popular[0]]


def test_what_is_sold_out_is_recommended_to_nobody(shop):
    before, popular = {user: lists(shop, user)[1] for user in (14, 15)}, one(shop, "/popular?n=1")["recommendations"]
    gone = [before[14][0], before[15][0], popular[0]]
    tell = lambda available: shop.ask(
        "POST", "/availability", {"items": [{"item_id": item, "available": available} for item in gone]}
    )
    assert tell(False)[2] == {"changed": len({*gone})} and tell(False)[2] == {"changed": 0}
    for path in (
        "/recommend/14",
        "/recommend/15",
        "/recommend/8999",
        "/popular",
        f"/similar/{before[14][1]}?n=100",
        "/recommend/14?task=next_purchase&n=100",
    ):
        body = one(shop, path)
        assert not {*gone} & {*body.get("recommendations", body.get("similar"))}
    assert (
        one(shop, f"/items/{gone[0]}")["available"] is False
        and "not available" in one(shop, f"/explain/14/{gone[0]}")["rule"]
    )
    tell(True)
    assert one(shop, f"/items/{gone[0]}")["available"] and {user: lists(shop, user)[1] for user in (14, 15)} == before


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_guest_is_answered_from_the_session_alone(shop):
    session = [{"item_id": 101, "event": "cart"}, {"item_id": 102}]
    result = one(shop, "/recommend", "POST", {"events": session, "n": 5, "detail": True})["results"][0]
    assert (
        result["user_id"] is None
        and result["source"] == "session"
        and not {101, 102} & {*result["recommendations"]}
        and len(result["items"]) == 5
    )
    assert {reason["item_id"] for item in result["items"] for reason in item["reasons"]} <= {101, 102}
    assert one(shop, "/recommend", "POST", {"n": 5})["results"][0]["source"] == "popular"
    # the same as events: what a stranger did in the store
    post(shop, event(7003, 101, "cart"), event(7003, 102, "view"))
    assert lists(shop, 7003, n=5)[1] == result["recommendations"]


def test_filters_hold_together(shop):
    facts = {item: one_item for item in range(101, 221) if (one_item := shop.get(f"/items/{item}")[2]["attributes"])}
    categories = sorted({attributes["category"] for attributes in facts.values()})
    free = lists(shop, 16, n=100)[1]
    rules = {
        "where": {"category": categories[:2], "price": {"min": 3, "max": 30}},
        "max_per": {"category": 4},
        "deny": free[:2],
        "allow": list(range(101, 200)),
    }
    fits = lambda item: (
        facts[item]["category"] in categories[:2]
        and 3 <= facts[item]["price"] <= 30
        and item not in free[:2]
        and item < 200
    )
    expected, count = [], Counter()
    for item in filter(fits, free):
        if count[facts[item]["category"]] < 4:
            expected.append(item)
            count[facts[item]["category"]] += 1
    result = one(shop, "/recommend", "POST", {"users": [16], "n": 20, "filters": rules})["results"][0]
    assert (
        result["recommendations"] == expected
        and 0 < len(expected) <= 8
        and result["shortfall"].startswith(f"only {len(expected)} of 20: ")
    )
    problem(shop.ask("POST", "/recommend", {"filters": {"where": {"colour": ["red"]}}}), 422)


def test_many_users_are_answered_in_the_order_asked(shop):
    users = [17, 9_000_001, 18, 17]
    results = one(shop, "/recommend", "POST", {"users": users, "n": 7})["results"]
    assert [result["user_id"] for result in results] == users and [result["source"] for result in results] == [
        "personalised",
        "popular",
        "personalised",
        "personalised",
    ]
    assert [result["recommendations"] for result in results] == [
        one(shop, f"/recommend/{user}?n=7")["recommendations"] for user in users
    ]


@pytest.mark.parametrize("task", ["discovery", "next_purchase"])
def test_an_explanation_adds_up(shop, task):
    detail = one(shop, f"/recommend/19?n=10&detail=true&task={task}")
    assert detail["source"] == ("personalised" if task == "discovery" else "next_purchase")
    for item in detail["items"]:
        explanation = one(shop, f"/explain/19/{item['item_id']}?task={task}")
        assert (explanation["rank"], explanation["recommended"], explanation["rule"], explanation["title"]) == (
            item["rank"],
            True,
            None,
            item["title"],
        )
        assert explanation["score"] == pytest.approx(item["score"], rel=1e-3, abs=1e-4)
        affinity = sum(reason["contribution"] for reason in explanation["why"]) + explanation["other"]
        assert (affinity if task == "discovery" else sum(explanation["signals"].values())) == pytest.approx(
            explanation["score"], rel=1e-3, abs=1e-3
        )
    own = next(
        line["item_id"]
        for line in one(shop, "/users/19/history")["history"]
        if shop.get(f"/items/{line['item_id']}")[2]["available"]
    )
    explanation = one(shop, f"/explain/19/{own}?task={task}")
    assert explanation["rule"] == ("already seen" if task == "discovery" else None) and explanation["rank"] == (
        None if task == "discovery" else explanation["rank"]
    )


def test_metrics_add_up_both_workers(shop):
    def figures():
        lines = (
            line.rsplit(" ", 1) for line in shop.get("/metrics")[2].decode().splitlines() if not line.startswith("#")
        )
        return {name: float(value) for name, value in lines}

    count = 'product_recs_http_requests_total{method="GET",route="/similar/{item_id}",status="200"}'
    before = figures()
    asked = len(both(shop, "/similar/101"))
    until(lambda: figures().get(count, 0) - before.get(count, 0) == asked)
    after = figures()
    assert (
        after["product_recs_workers"] == 2
        and sum(value for name, value in after.items() if name.startswith("product_recs_model_workers{")) == 2
    )
    post(shop, event(7004, 101))
    name = 'product_recs_feedback_events_total{result="accepted"}'
    until(lambda: figures()[name] == after[name] + 1)


# --- models ----------------------------------------------------------------------------------------------------------


def in_process(models_dir, version, users, n=10):
    model = ReadyModel(open_bundle(models_dir, version)).prepare()
    return {user: answer(model, Request(user, n)).items for user in users}


def test_a_new_model_is_taken_up_while_requests_run(tmp_path, trained):
    "Each answer is that of the version which it names, whole, in both workers and on the three ways to ask."
    _, first, second = trained
    users = list(range(1, 31))
    right = {version: in_process(trained[0], version, users) for version in (first, second)}
    assert sum(right[first][user] != right[second][user] for user in users) > 15
    with serving(tmp_path, trained, f"sqlite:///{tmp_path}/feedback.db") as server:
        seen, ended = Counter(), threading.Event()

        def ask(worker):
            wrong, k = [], worker
            while not ended.is_set():
                user, k = users[k % len(users)], k + 1
                if k % 3 == 0:
                    status, headers, body = server.ask("POST", "/recommend", {"users": [user, users[0]]})
                    pairs = [
                        (result["user_id"], result["model_version"], result["recommendations"])
                        for result in body["results"]
                    ]
                    assert {version for _, version, _ in pairs} == {headers["x-model-version"]}
                else:
                    status, headers, body = server.get(f"/recommend/{user}" + ("?detail=true" if k % 3 == 1 else ""))
                    pairs = [(user, headers["x-model-version"], body["recommendations"])]
                    assert body.get("model_version", headers["x-model-version"]) == headers["x-model-version"]
                wrong += [pair for pair in pairs if status != 200 or right[pair[1]][pair[0]] != pair[2]]
                seen[headers["x-model-version"], headers["x-request-id"][:24]] += 1
            return wrong

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask, k * 5) for k in range(6)]
            try:
                for version in (second, first, second):
                    publish(server.models, version)
                    until(
                        lambda version=version: all(
                            headers["x-model-version"] == version for _, headers, _ in both(server, "/health/ready")
                        )
                    )
            finally:
                ended.set()
            assert [future.result() for future in asking] == [[]] * 6
        assert len(seen) == 4 and min(seen.values()) > 0


def test_a_broken_model_is_refused_and_shown_and_an_earlier_one_is_one_command_away(tmp_path, trained):
    _, first, second = trained
    with serving(tmp_path, trained, "") as server:
        publish(server.models, second)
        versions = lambda: {
            (body["version"], (body["refused"] or {}).get("version")) for _, _, body in both(server, "/model")
        }
        until(lambda: versions() == {(second, None)})
        broken = "29990101T000000-broken00"
        shutil.copytree(server.models / second, server.models / broken)
        manifest = json.loads((server.models / second / "manifest.json").read_text())
        (server.models / broken / "manifest.json").write_text(json.dumps(manifest | {"version": broken}))
        factors = bytearray((server.models / broken / "als.item_factors.npy").read_bytes())
        factors[-3] ^= 1
        (server.models / broken / "als.item_factors.npy").write_bytes(factors)
        (server.models / "current").write_text(broken + "\n")
        until(lambda: versions() == {(second, broken)})
        assert "als.item_factors.npy" in server.get("/model")[2]["refused"]["error"]
        assert {body["status"] for _, _, body in both(server, "/model/reload", "POST")} == {"refused"}
        assert {status for status, _, _ in both(server, "/health/ready")} == {200} and one(server, "/recommend/1")[
            "recommendations"
        ] == in_process(server.models, second, [1])[1]
        assert rollback(server.models, first) == first
        until(lambda: versions() == {(first, None)})
        assert one(server, "/recommend/1")["recommendations"] == in_process(server.models, first, [1])[1]
        answer = server.ask("POST", "/events", event(1, 101))  # a service without a store
        assert "PRODUCT_RECS_DATABASE_URL" in problem(answer, 503).detail


@pytest.mark.parametrize("kind", STORES)
def test_what_users_did_becomes_part_of_the_next_model(kind, request, tmp_path, trained):
    "Events come over HTTP, are ingested with the log, trained and published; from then on they are no news."
    url = url_of(kind, tmp_path, request)
    with serving(tmp_path, trained, url) as server:
        bought = lists(server, 1)[1][:3]
        post(
            server, *[event(7100, item, timestamp="2026-01-05T12:00:00Z") for item in bought], event(7100, 101, "deny")
        )
        assert server.ask("DELETE", "/users/20")[0] == 200
        source, before = lists(server, 7100)
        assert source == "session" and not {*bought, 101} & {*before}
        time.sleep(2.1)  # what is younger than two seconds waits for the training after this one
        (tmp_path / "next").mkdir()
        version = train(tmp_path / "next", feedback=url)
        shutil.copytree(tmp_path / "next/models" / version, server.models / version)
        publish(server.models, version)
        until(lambda: all(headers["x-model-version"] == version for _, headers, _ in both(server, "/health/ready")))
        assert (
            server.get("/model")[2]["data"]["feedback_until"] and one(server, "/users?limit=1")["total"] == 360
        )  # one is new, one is forgotten
        source, after = lists(server, 7100)
        expected = [item for item in in_process(server.models, version, [7100], 11)[7100] if item != 101][:10]
        assert (source, after) == ("personalised", expected)
        record = one(server, "/users/7100/history")
        assert record["known"] and Counter(line["item_id"] for line in record["history"]) == Counter(
            [*bought, 101]
        )  # each thing once
        assert lists(server, 20)[0] == "popular"
        post(server, event(7100, after[0]))
        assert after[0] not in lists(server, 7100)[1]


# --- the store goes away ---------------------------------------------------------------------------------------------


def refused_then_counted(server, stop, start):
    """Recommendations go on while the store is away; events are refused with 503, and accepted when it is back, without
    a restart."""
    post(server, event(7201, 101))
    before = lists(server, 7201)
    stop()
    answers = both(server, "/recommend/7201")
    assert {status for status, _, _ in answers} == {200} and all(
        body["recommendations"] == before[1] for _, _, body in answers
    )
    body = {"events": [event(7201, before[1][0], key="while-away")]}
    refused = server.ask("POST", "/events", body)
    assert "nothing was taken" in problem(refused, 503).detail and int(refused[1]["retry-after"]) > 0
    problem(server.ask("POST", "/availability", {"items": [{"item_id": 101, "available": False}]}), 503)
    problem(server.ask("DELETE", "/users/7201"), 503)
    assert one(server, "/recommend/1")["recommendations"] and server.get("/health/ready")[0] == 200
    start()
    until(lambda: server.ask("POST", "/events", body)[0] == 200)
    until(lambda: all(body["store"] == "open" for _, _, body in both(server, "/health/ready")))
    # a worker that reconnects may need longer than the 0.2 s that a request waits for it
    until(lambda: all(before[1][0] not in body["recommendations"] for _, _, body in both(server, "/recommend/7201")))
    assert lists(server, 7201)[0] == "session"
    assert [line["item_id"] for line in one(server, "/users/7201/history")["history"]] == [before[1][0], 101]


def test_a_stopped_postgresql_is_survived(tmp_path, trained, postgres):
    with serving(tmp_path, trained, new_database(postgres)) as server:
        refused_then_counted(server, postgres.stop, postgres.start)


def test_a_locked_sqlite_file_is_survived(tmp_path, trained):
    "Another program holds the file; that is what being away looks like here."
    with serving(tmp_path, trained, f"sqlite:///{tmp_path}/feedback.db") as server:
        holder = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None, check_same_thread=False)
        refused_then_counted(server, lambda: holder.execute("BEGIN IMMEDIATE"), lambda: holder.execute("ROLLBACK"))
        holder.close()


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_open_what_their_scope_says_in_every_worker(tmp_path, trained):
    keys = {scope: add_key(tmp_path / "keys.json", scope, scope) for scope in ("read", "write", "admin")}
    with serving(
        tmp_path, trained, f"sqlite:///{tmp_path}/feedback.db", auth="on", api_keys_file=tmp_path / "keys.json"
    ) as server:
        asks = [
            ("GET", "/recommend/1", None, 0),
            ("POST", "/recommend", {}, 0),
            ("GET", "/metrics", None, 0),
            ("GET", "/model", None, 0),
            ("POST", "/events", event(1, 101, key="k"), 1),
            ("DELETE", "/users/21", None, 1),
            ("POST", "/availability", {"items": [{"item_id": 101, "available": True}]}, 1),
            ("POST", "/model/reload", None, 2),
        ]
        for method, path, body, needed in asks:
            assert {status for status, _, _ in both(server, path, method, body)} == {401}
            for level, key in enumerate(keys.values()):
                answers = both(server, path, method, body, {"Authorization": f"Bearer {key}"})
                assert {status for status, _, _ in answers} == {200 if level >= needed else 403}, (method, path, level)
        unknown = server.ask("GET", "/recommend/1", headers={"X-API-Key": "pr_nonsense"})
        assert problem(unknown, 401) and "invalid_token" in unknown[1]["www-authenticate"]
        assert server.get("/health/live")[0] == server.get("/")[0] == server.get("/openapi.json")[0] == 200
        added = add_key(tmp_path / "keys.json", "late", "read")
        until(lambda: {status for status, _, _ in both(server, "/recommend/1", headers={"X-API-Key": added})} == {200})
    assert not any(key in server.stdout.read_text() + server.stderr.read_text() for key in keys.values())
    assert current_version(server.models) == trained[1]


@pytest.mark.parametrize("cold", [False, True])
def test_a_request_looks_its_user_up_once_and_folds_in_once(tmp_path, monkeypatch, cold):
    "From the path to the list with reasons: one look-up of the user, one solve, also for somebody with news."
    more = {}
    if cold:  # rows of people and things without interactions, and somebody whom the minimum counts left out
        save_table(tmp_path / "people.parquet", {"user_id": np.array([60]), "town": np.array(["Rome"], object)})
        save_table(tmp_path / "things.parquet", {"item_id": np.array([900]), "title": np.array(["new"], object)})
        matrix = csr_matrix(([1.0], ([0], [2])), shape=(1, 13), dtype=np.float32)
        more = {
            "cold_users": tmp_path / "people.parquet",
            "cold_items": tmp_path / "things.parquet",
            "left_out": LeftOut(12, IdTable([77]), IdTable([901]), matrix, matrix, matrix * 0, matrix * 0),
            "counts": lambda seen: seen,
            "age_days": lambda seen: seen * 0,
        }
    version = publish_checkerboard(tmp_path / "models", **more)
    settings = Settings(
        models_dir=tmp_path / "models", auth="off", log_level="ERROR", database_url=f"sqlite:///{tmp_path}/f.db"
    )
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        service, calls = client.app.state.service, []
        bundle = service.live.get().bundle
        names = {id(bundle.users): "row", id(bundle.left_out.users): "left out"}
        row, solve = IdTable.row, Solver.solve

        def counted_row(table, user):
            calls.extend([names[id(table)]] if id(table) in names else [])
            return row(table, user)

        def counted_solve(solver, *history):
            calls.append("solve")
            return solve(solver, *history)

        monkeypatch.setattr(IdTable, "row", counted_row)
        monkeypatch.setattr(Solver, "solve", counted_solve)
        assert client.post("/events", json={"user_id": 1, "item_id": 102}).json()["accepted"] == 1
        for path, expected in (
            ("/recommend/1", {"row": 1, "solve": 1}),
            ("/recommend/1?detail=true", {"row": 1, "solve": 1}),
            ("/recommend/1?detail=true", {}),  # this answer is kept
            ("/recommend/2?detail=true", {"row": 1}),  # nothing is new of this user
            ("/recommend/nobody?detail=true", {"row": 1}),
            ("/recommend/60", {"row": 1}),
            ("/recommend/77", {"row": 1, "solve": 1} if cold else {"row": 1}),
        ):
            calls.clear()
            answer = client.get(path)
            assert answer.status_code == 200 and answer.headers["x-model-version"] == version
            counts = Counter(calls)
            left_out = counts.pop("left out", 0)
            assert left_out <= 1 and counts == expected, path
        assert client.get("/recommend/1?detail=true").json()["items"][0]["reasons"]
