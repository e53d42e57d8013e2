"""All that is known of a person, from a real service and from the command line, in SQLite and in PostgreSQL."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from support import BIN, ROOT, Server, problem, publish_board, until

from product_recs.features import build_features
from product_recs.feedback.records import Impression, NewEvent
from product_recs.feedback.store import Store
from product_recs.ingest import ingest
from product_recs.train import train_bundle
from product_recs.web.schemas import PersonExport
from product_recs.web.security import add_key


def export(server, user, **options):
    status, headers, body = server.get(f"/users/{user}/export", **options)
    assert status == 200 and headers["content-type"] == "application/json" and headers["cache-control"] == "no-store"
    PersonExport(**body)
    return body


def command(folder, *words, **settings):
    environment = {"PATH": str(BIN), "PYTHONPATH": str(ROOT), "PRODUCT_RECS_ROOT": str(folder)}
    environment |= {f"PRODUCT_RECS_{name.upper()}": str(value) for name, value in settings.items()}
    call = [sys.executable, "-c", "from product_recs.jobs.cli import main; raise SystemExit(main())", *words]
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_everything_is_there_and_after_the_deletion_nothing(tmp_path, url, opened):
    publish_board(tmp_path / "models", data={"ends": "2026-01-31T00:00:00"})
    store = opened(Store(url))
    with Server(tmp_path, tmp_path / "models", workers=2, database_url=url) as server:
        events = [
            {"user_id": 1, "item_id": 102, "event": "cart", "timestamp": "2026-02-01T10:00:00+09:00"},
            {"user_id": "1.0", "item_id": 104, "event": "deny"},
            {"user_id": 2, "item_id": 103},
        ]
        assert server.ask("POST", "/events", {"events": events})[0] == 200
        lists = [server.get("/recommend/1?n=3")[2]["recommendations"] for _ in range(2)]
        server.get("/recommend/2")
        until(lambda: len(store.impressions(10)) == 3)
        known = export(server, 1)
        assert known["user_id"] == 1 and known["spellings"] == ["1"] and known["forgotten"] is None
        assert [(event["item_id"], event["event"]) for event in known["events"]] == [(102, "cart"), (104, "deny")]
        assert known["events"][0]["happened"] == "2026-02-01T01:00:00+00:00" and known["denied"] == [104]
        assert [impression["items"] for impression in known["impressions"]] == lists
        assert known["impressions"][0]["task"] == "discovery"
        model = known["model"]
        assert model["known"] and model["used"] and len(model["history"]) == 11 and not model["left_out"]
        assert model["history"][0]["title"].startswith("Thing") and model["counted"] == {"popularity": 11}
        assert model["computed"] == {"discovery": {"model": model["computed"]["discovery"]["model"], "numbers": 2}}
        assert "factors" not in json.dumps(known)
        # nobody, in any form, is an empty export
        for stranger in ("999", "n%C3%A9mo", "a%2Fb"):
            empty = export(server, stranger)
            assert empty["events"] == empty["impressions"] == empty["denied"] == [] and not empty["model"]["known"]
        problem(server.get("/users/%00/export"), 422)
        assert command(tmp_path, "export", "1", database_url=url, models_dir=tmp_path / "models").returncode == 0
        assert server.ask("DELETE", "/users/1")[2]["events_deleted"] == 2
        gone = export(server, 1)
        assert gone["forgotten"] and gone["events"] == gone["impressions"] == gone["denied"] == []
        assert gone["model"]["used"] is False and len(gone["model"]["history"]) == 11
        assert len(export(server, 2)["events"]) == 1
        # who comes back has what they did since
        server.ask("POST", "/events", {"events": [{"user_id": 1, "item_id": 106}]})
        back = export(server, 1)
        assert [event["item_id"] for event in back["events"]] == [106] and back["forgotten"] == gone["forgotten"]
    done = command(tmp_path, "export", "1", "--out", "one.json", database_url=url, models_dir=tmp_path / "models")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "one.json").read_text())
    assert written["events"] == back["events"] and (tmp_path / "one.json").stat().st_mode & 0o777 == 0o600


def test_all_spellings_are_one_person(tmp_path, url, opened):
    rules = {"ingest": {"normalise_ids": ["case", "zeros"]}}
    users = [f"User{k}" for k in range(6)]
    publish_board(tmp_path / "models", users=users, items=[f"A{k}" for k in range(6)], parameters=rules)
    store = opened(Store(url))
    store.add_events([NewEvent("USER1", "a2"), NewEvent("user1", "A3"), NewEvent("User11", "A1")])
    store.add_impressions([Impression("r", "uSER1", "v", "popular", ["a1"], store.cut(0))])
    with Server(tmp_path, tmp_path / "models", database_url=url) as server:
        known = export(server, "uSeR1")
        assert known["user_id"] == "User1" and [event["item_id"] for event in known["events"]] == ["A2", "A3"]
        assert known["impressions"][0]["items"] == ["A1"] and len(known["model"]["history"]) == 2
        assert server.ask("DELETE", "/users/USER1")[0] == 200
        gone = export(server, "user1")
        assert gone["forgotten"] and gone["events"] == gone["impressions"] == []
        assert len(export(server, "USER11")["events"]) == 1


@pytest.mark.slow
def test_a_large_export_comes_in_pieces_and_a_store_that_is_away_is_an_error(tmp_path, opened):
    publish_board(tmp_path / "models")
    url = f"sqlite:///{tmp_path}/feedback.db"
    store = opened(Store(url))
    store.add_impressions([Impression(f"r{k}", 5, "v", "popular", range(100), store.cut(0)) for k in range(3000)])
    with Server(tmp_path, tmp_path / "models", database_url=url) as server:
        status, headers, body = server.get("/users/5/export")
        assert status == 200 and len(body["impressions"]) == 3000 and "content-length" not in headers
        assert [impression["request_id"] for impression in body["impressions"]] == [f"r{k}" for k in range(3000)]
        assert server.get("/users/5/export", method="HEAD")[2] == b""
    (tmp_path / "file").touch()
    with Server(tmp_path, tmp_path / "models", database_url=f"sqlite:///{tmp_path}/file/no.db") as server:
        problem(server.get("/users/5/export"), 503)
    with Server(tmp_path, tmp_path / "none", database_url="") as server:
        assert export(server, 5)["model"] is None


def test_who_may_read_it(tmp_path):
    "It takes what deleting takes; a page of another site gets nothing where there are no keys."
    publish_board(tmp_path / "models")
    keys = {scope: add_key(tmp_path / "keys.json", scope, scope) for scope in ("read", "write", "admin")}
    with Server(tmp_path, tmp_path / "models", auth="on", api_keys_file=tmp_path / "keys.json") as server:
        for path in ("/users/1/export", "/users/1/export?x=1"):
            problem(server.get(path), 401)
            problem(server.get(path, headers={"X-API-Key": keys["read"]}), 403)
            assert server.get(path, headers={"X-API-Key": keys["read"]}, method="HEAD")[0] == 403
            for scope in ("write", "admin"):
                assert server.get(path, headers={"X-API-Key": keys[scope]})[0] == 200
        assert server.get("/users/1/history", headers={"X-API-Key": keys["read"]})[0] == 200
    with Server(tmp_path, tmp_path / "models", auth="off") as server:
        problem(server.get("/users/1/export", headers={"Sec-Fetch-Site": "cross-site"}), 403)
        assert server.get("/users/1/export", headers={"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_what_was_left_out_and_what_the_users_file_says(tmp_path):
    rows = [(1, 10, 0)] + [(user, 10 + (user * step) % 7, step) for user in range(2, 40) for step in range(1, 5)]
    log = [(user, item, pd.Timestamp("2026-01-01") + pd.Timedelta(days=day)) for user, item, day in rows]
    pd.DataFrame(log, columns=["user_id", "item_id", "timestamp"]).to_csv(tmp_path / "log.csv", index=False)
    users = pd.DataFrame({"user_id": [*range(2, 40), 77], "town": ["Oslo"] * 39, "age": range(20, 59)})
    users.to_csv(tmp_path / "users.csv", index=False)
    ingest(tmp_path / "log.csv", tmp_path / "run", users=tmp_path / "users.csv", progress=False)
    features = build_features(tmp_path / "run", tmp_path / "run" / "features", min_user_items=2, min_item_users=2)
    fit = {"factors": 4, "iterations": 3, "num_threads": 1, "next_model": "none", "progress": False}
    train_bundle(features, tmp_path / "models", publish_it=True, **fit)
    with Server(tmp_path, tmp_path / "models") as server:
        few, some, cold = (export(server, user)["model"] for user in (1, 2, 77))
    assert few["known"] and few["history"] == [] and [item["item_id"] for item in few["left_out"]] == [10]
    assert few["left_out"][0]["last"].startswith("2026-01-01") and few["computed"] == {}
    assert some["attributes"] == {"town": "Oslo", "age": 20} and len(some["history"]) >= 2
    assert some["computed"]["discovery"]["numbers"] == 4 and some["segment"]["users"] >= 20
    assert cold["known"] and cold["history"] == [] and cold["attributes"]["town"] == "Oslo"


@pytest.mark.parametrize("words", [(), ("--out", "x/y.json")])
def test_the_verb_without_a_model_and_without_a_store(tmp_path, words):
    done = command(tmp_path, "export", "-5", *words)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "x" / "y.json").read_text() if words else done.stdout
    assert json.loads(text)["user_id"] == -5 and not (tmp_path / "data").exists()
    wrong = command(tmp_path, "export", "null", *words)
    assert wrong.returncode == 1 and "user_id" in wrong.stderr
