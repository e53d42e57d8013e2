"""A product that the shop tells of is there within a second, in every worker, and stays through everything that happens
to a service: two worker processes, a real SQLite file and a real PostgreSQL."""

import json
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import duckdb
import pytest
from fastapi.testclient import TestClient
from support import N, Server, both, new_database, one, problem, publish_board, train, until

from product_recs.api import create_app
from product_recs.bundle.files import publish
from product_recs.bundle.live import rollback
from product_recs.bundle.opening import open_bundle
from product_recs.core.settings import Settings
from product_recs.feedback.store import Store
from product_recs.web import service as web_service
from product_recs.web.security import add_key

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # platformdirs, where there is no XDG_RUNTIME_DIR
STORES = ["sqlite", "postgresql"]
ROAST = {"title": "Dark roast", "category": "even", "price": 7.5}


def url_of(kind, folder, request):
    return f"sqlite:///{folder}/feedback.db" if kind == "sqlite" else new_database(request.getfixturevalue("postgres"))


@contextmanager
def serving(folder, url, **settings):
    "Two workers on the models of a folder."
    more = {"workers": 2, "database_url": url, "watch_seconds": 0.1, "impressions": 0, **settings}
    with Server(folder, folder / "models", **more) as server:
        server.models, server.url = folder / "models", url
        both(server, "/health/live")
        yield server


@pytest.fixture(scope="module", params=STORES)
def shop(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    publish_board(folder / "models")
    with serving(folder, url_of(request.param, folder, request)) as server:
        yield server


def tell(server, *products):
    "What became of each product, after checking that none was rejected."
    body = {"items": [{"item_id": item, "attributes": attributes} for item, attributes in products]}
    status, _, answer = server.ask("POST", "/items", body)
    assert status == 200 and answer["rejected"] == 0, answer
    return [result["status"] for result in answer["results"]]


def everywhere(server, condition, path, seconds=1.0):
    "Wait until the answers of both workers fulfil a condition, a second at most; a loaded machine gets more."
    began = time.monotonic()
    until(lambda: all(condition(status, body) for status, _, body in both(server, path)))
    if os.getloadavg()[0] < (os.cpu_count() or 1):
        assert time.monotonic() - began < seconds
    return both(server, path)[0][2]


def there(server, item, **attributes):
    "Both workers know the item, and these attributes."

    def shown(status, body):
        return status == 200 and {"title": body["title"], **body["attributes"]}.items() >= attributes.items()

    return everywhere(server, shown, f"/items/{item}")


def gone(server, item):
    return everywhere(server, lambda status, body: status == 404, f"/items/{item}")


# --- told, changed, taken back ---------------------------------------------------------------------------------------


def test_a_product_is_known_to_both_workers_and_taken_back(shop):
    assert tell(shop, (900, ROAST), ("901.0", {"title": "Filter"})) == ["accepted", "accepted"]
    assert there(shop, 900, **ROAST)["available"] and there(shop, 901, title="Filter")
    similar = everywhere(shop, lambda status, body: status == 200, "/similar/900?n=3")
    assert len(similar["similar"]) == 3 and {item % 2 for item in similar["similar"]} == {
        1
    }  # even tastes: 101, 103, ...
    assert tell(shop, ("900", dict(reversed(ROAST.items()))), (901, {"title": "Filter"})) == ["unchanged", "unchanged"]
    assert tell(shop, (900, {"title": "Light roast", "available": False})) == ["accepted"]
    assert not there(shop, 900, title="Light roast", available=False)["available"]
    assert (
        "price" not in one(shop, "/items/900")["attributes"] or one(shop, "/items/900")["attributes"]["price"] is None
    )
    status, _, body = shop.ask("DELETE", "/items/900")
    assert (status, body) == (200, {"item_id": 900, "deleted": True, "remains": "nothing"})
    gone(shop, 900)
    problem(shop.ask("DELETE", "/items/900"), 404)
    problem(shop.ask("DELETE", "/items/101"), 404)  # of the model, and nothing was told of it
    assert tell(shop, (900, ROAST)) == ["accepted"] and there(shop, 900, **ROAST)
    for item in (900, 901):
        assert shop.ask("DELETE", f"/items/{item}")[0] == 200


def test_what_was_told_of_a_known_item_beats_the_products_file(shop):
    assert tell(shop, (102, {"title": "Another name", "price": None})) == ["accepted"]
    there(shop, 102, title="Another name", price=None, category="odd")
    listed = one(shop, "/recommend/2?n=1&detail=true")["items"][0]
    assert (listed["item_id"], listed["title"]) == (102, "Another name")
    assert shop.ask("DELETE", "/items/102")[2]["remains"] == "interactions"
    there(shop, 102, title="Thing 1", price=2.5)


def test_one_product_is_judged_alone(shop):
    items = [
        {"item_id": 910, "attributes": {"title": "Good", "colour": "red"}},
        {"item_id": "a text", "attributes": {}},
        {"item_id": 911, "attributes": {"price": "dear"}},
        {"item_id": 912, "attributes": {"TITLE": "Case"}},
        {"item_id": 910, "attributes": {"title": "Last"}},
        {"item_id": 913},
        {"item_id": 914, "attributes": {"popularity": 7}},
    ]
    status, _, answer = shop.ask("POST", "/items", {"items": items})
    assert status == 200 and (answer["accepted"], answer["unchanged"], answer["rejected"]) == (1, 0, 6)
    errors = [result.get("error", "") for result in answer["results"]]
    hints = ["comes again", "whole numbers", "'price'", "writes 'title'", "", "item_id and attributes", "counted"]
    assert all(hint in error for hint, error in zip(hints, errors, strict=True)) and not errors[4]
    assert answer["results"][4] == {"index": 4, "item_id": 910, "status": "accepted", "placed": False}
    assert "/new" in answer["where"]
    status, _, answer = shop.ask("POST", "/items", {"items": items[:1]})
    assert answer["results"][0]["note"] == "ignored by the model that answers: colour"
    there(shop, 910, title="Good")
    assert shop.ask("DELETE", "/items/910")[0] == 200
    for item in range(910, 915):
        gone(shop, item)


def test_a_hostile_request_breaks_nothing(shop):
    def of(attributes, item="920"):
        return b'{"items": [{"item_id": %s, "attributes": %s}]}' % (item.encode(), attributes)

    rejected = [
        of(b'{"x": NaN}'), of(b'{"x": 1e400}'), of(b'{"x": -Infinity}'), of(b'{"x": 1' + b"0" * 4000 + b"}"),
        of(b'{"x": "\\ud83d"}'), of(b'{"x": "\\u0000"}'), of(b'{"x\\u0000": 1}'), of(b'{"x": {"y": 1}}'),
        of(b"[]"), of(b"{}", '"a\\u0000"'), of(b"{}", "true"), of(b"{}", "null"), of(b"{}", "1.5"), of(b"{}", '""'),
        of(b"{}", '"nan"'), of(b"{}", '"' + "9" * 300 + '"'), of(b'{"x": "%s"}' % (b"a" * 20_000)), of(b"null"),
        b'{"items": [null, 1, []]}',
        of(json.dumps({str(k): k for k in range(101)}).encode()), of(json.dumps({"x": [0.5] * 9000}).encode()),
    ]  # fmt: skip
    for body in rejected:
        status, _, answer = shop.ask("POST", "/items", body)
        assert status == 200 and answer["rejected"] == len(answer["results"]) and answer["accepted"] == 0, body[:200]
        assert all(result["error"] and len(result["error"]) <= 500 for result in answer["results"])
    deep = b'{"items": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    refused = {b"": 400, b"{": 400, b"\xff": 400, deep: 400, b"[]": 422, b'{"items": []}': 422, b'{"items": {}}': 422,
               b'{"items": [1], "x": 1}': 422, b'{"items": [%s1]}' % (b"1," * 1000): 422,
               b" " * 1_000_001: 413}  # fmt: skip
    for body, status in refused.items():
        problem(shop.ask("POST", "/items", body), status)
    problem(shop.ask("POST", "/items", b"{}", {"Content-Type": "text/plain"}), 415)
    for path in ("%00", "%ff", "a" * 5000, "..%2F..", "%F0%9F%8D%B5", "nan"):
        assert shop.ask("DELETE", f"/items/{path}")[0] in (404, 422)
    gone(shop, 920)
    assert shop.get("/model")[2]["products"]["told"] == 0
    kind = "煎茶 🍵 \u202e'; DROP TABLE products; --"
    assert tell(shop, (920, {"title": kind, "category": "ﷺ", kind.replace("\u202e", ""): [kind]})) == ["accepted"]
    there(shop, 920, title=kind)
    assert shop.ask("DELETE", "/items/920")[0] == 200
    assert one(shop, "/recommend/1?n=1")["recommendations"] == [101]


def renewals(server):
    figures = server.get("/metrics")[2].decode()
    return float(re.search(r'product_recs_model_reloads_total\{result="renewed"\} (\S+)', figures)[1])


def test_a_burst_is_taken_up_by_a_few_renewals(shop):
    before, items = renewals(shop), range(10_000, 11_000)
    with ThreadPoolExecutor(8) as pool:
        posted = [pool.submit(tell, shop, (item, {"title": f"Thing {item}"})) for item in items]
        answers = [shop.get("/recommend/1?n=1")[2]["recommendations"] for _ in range(200)]
        assert all(future.result() == ["accepted"] for future in posted)
    assert answers == [[101]] * 200
    for item in (items[0], items[500], items[-1]):
        there(shop, item, title=f"Thing {item}")
    facts = {"told": 1000, "since_training": 1000, "taken_up": True}
    until(lambda: all(body["products"] == facts for _, _, body in both(shop, "/model")))
    assert renewals(shop) - before < 250, "of both workers"
    with Store(shop.url) as store:
        assert store.delete_products(items) == 1000
    gone(shop, items[-1])


# --- what happens to a service ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORES)
def test_it_stays_through_kill_reload_rollback_and_restart(kind, request, tmp_path):
    import psutil

    first = publish_board(tmp_path / "models", version="first").name
    url = url_of(kind, tmp_path, request)
    with serving(tmp_path, url) as server:
        assert tell(server, (900, ROAST)) == ["accepted"]
        there(server, 900, **ROAST)
        seen, ended = [], threading.Event()

        def ask():
            while not ended.is_set():
                seen.append(server.get("/items/900")[0])

        asking = threading.Thread(target=ask)
        asking.start()
        second = publish_board(server.models, version="second").name
        until(lambda: {body["model_version"] for _, _, body in both(server, "/health/ready")} == {second})
        assert there(server, 900, **ROAST)
        assert rollback(server.models) == first
        until(lambda: {body["model_version"] for _, _, body in both(server, "/health/ready")} == {first})
        assert server.ask("POST", "/model/reload")[0] == 200 and there(server, 900, **ROAST)
        ended.set()
        asking.join()
        assert set(seen) == {200} and len(seen) > 10, "there was no moment without it"
        workers = psutil.Process(server.process.pid).children(recursive=True)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        server.process.kill()
        psutil.wait_procs(workers, 10)
    with serving(tmp_path, url) as server:
        assert there(server, 900, **ROAST) and tell(server, (900, ROAST)) == ["unchanged"]
        assert server.ask("DELETE", "/items/900")[0] == 200
        gone(server, 900)
    with serving(tmp_path, url) as server:
        gone(server, 900)


@pytest.mark.parametrize("kind", STORES)
def test_the_next_training_takes_it_in(kind, request, tmp_path):
    url = url_of(kind, tmp_path, request)
    (tmp_path / "first").mkdir()
    train(tmp_path / "first")
    shutil.copytree(tmp_path / "first/models", tmp_path / "models", symlinks=True)
    with serving(tmp_path, url) as server:
        assert tell(server, (900001, ROAST | {"colour": "brown"}), (101, {"title": "Another name"})) == ["accepted"] * 2

        def trained(name):
            (tmp_path / name).mkdir()
            version = train(tmp_path / name, feedback=url)
            shutil.copytree(tmp_path / name / "models" / version, server.models / version)
            publish(server.models, version)
            until(lambda: {body["model_version"] for _, _, body in both(server, "/health/ready")} == {version})
            ledger = json.loads((tmp_path / name / "interactions/ledger.json").read_text())
            return open_bundle(server.models, version), ledger

        bundle, ledger = trained("second")
        counts = ledger["tables"]["products"]
        assert (counts["rows_told"], counts["rows_changed"]) == (1, 1)
        assert counts["rows_kept"] == counts["rows_read"] + 1
        assert any("service was told of: 1 new" in warning for warning in ledger["warnings"])
        cold = bundle.told(900001)
        assert (cold["title"], cold["price"], cold["colour"]) == ("Dark roast", 7.5, "brown")
        assert bundle.item_columns["title"][bundle.items.row(101)] == "Another name"
        assert there(server, 900001, **ROAST, colour="brown") and there(server, 101, title="Another name")
        facts = server.get("/model")[2]["products"]
        assert facts["told"] == 2 and facts["taken_up"]
        assert server.ask("DELETE", "/items/900001")[2]["remains"] == "products file"  # until the next training
        assert server.ask("DELETE", "/items/101")[2]["remains"] == "interactions"
        bundle, ledger = trained("third")
        assert bundle.told(900001) is None and bundle.item_columns["title"][bundle.items.row(101)] != "Another name"
        assert "rows_told" not in ledger["tables"]["products"]
        gone(server, 900001)


@pytest.mark.parametrize("kind", STORES)
def test_a_product_waits_for_the_first_model(kind, request, tmp_path):
    (tmp_path / "models").mkdir()
    with serving(tmp_path, url_of(kind, tmp_path, request)) as server:
        status, _, answer = server.ask("POST", "/items", {"items": [{"item_id": 900, "attributes": ROAST}]})
        assert status == 200 and answer["accepted"] == 1 and not answer["taken_up"] and "no model" in answer["where"]
        assert "placed" not in answer["results"][0]
        problem(server.get("/items/900"), 503)
        publish_board(server.models)
        until(lambda: all(status == 200 for status, _, _ in both(server, "/health/ready")))
        assert there(server, 900, **ROAST)


def test_keys_and_a_store_are_needed(tmp_path):
    publish_board(tmp_path / "models")
    keys = {scope: add_key(tmp_path / "keys.json", scope, scope) for scope in ("read", "write")}
    body = {"items": [{"item_id": 900, "attributes": ROAST}]}
    with Server(tmp_path, tmp_path / "models", auth="on", api_keys_file=tmp_path / "keys.json") as server:
        for method, path, sent in (("POST", "/items", body), ("DELETE", "/items/900", None)):
            problem(server.ask(method, path, sent), 401)
            problem(server.ask(method, path, sent, {"X-API-Key": keys["read"]}), 403)
            assert server.ask(method, path, sent, {"X-API-Key": keys["write"]})[0] == 200
    (tmp_path / "without").mkdir()
    with Server(tmp_path / "without", tmp_path / "models", database_url="") as server:
        assert "DATABASE_URL" in problem(server.ask("POST", "/items", body), 503).detail
        assert "DATABASE_URL" in problem(server.ask("DELETE", "/items/900"), 503).detail


# --- in one process --------------------------------------------------------------------------------------------------


def in_process(folder, **board):
    publish_board(folder / "models", **board)
    settings = Settings(models_dir=folder / "models", log_level="ERROR", auth="off",
                        database_url=f"sqlite:///{folder}/feedback.db")  # fmt: skip
    return TestClient(create_app(settings), base_url="http://localhost")


def test_a_renewal_that_fails_leaves_what_is_there_and_is_tried_again(tmp_path, monkeypatch):
    whole, tries = web_service.extended, []
    with in_process(tmp_path) as client:
        tell_one = lambda item: client.post("/items", json={"items": [{"item_id": item, "attributes": ROAST}]}).json()  # noqa: E731
        assert tell_one(900)["taken_up"] and client.get("/items/900").status_code == 200

        def broken(model, products):
            tries.append(len(products))
            if len(tries) < 3:
                raise MemoryError("no room")
            return whole(model, products)

        monkeypatch.setattr(web_service, "extended", broken)
        answer = tell_one(901)
        assert answer["accepted"] == 1 and not answer["taken_up"]
        assert client.get("/items/900").status_code == 200 and client.get("/recommend/1?n=1").status_code == 200
        until(lambda: client.get("/items/901").status_code == 200)
        assert tries == [2, 2, 2] and 'result="renewal_failed"} 2.0' in client.get("/metrics").text
        assert client.get("/model").json()["products"] == {"told": 2, "since_training": 2, "taken_up": True}


def test_two_spellings_are_one_product(tmp_path):
    items = sorted(f"SKU-{k:02}" for k in range(N))
    rules = {"events": ["purchase", "view"], "max_quantity": 1000, "normalise_ids": ["case"]}
    with in_process(tmp_path, items=items, parameters={"ingest": rules}) as client:
        posted = [
            client.post("/items", json={"items": [{"item_id": item, "attributes": {"title": title}}]}).json()
            for item, title in (("Mug-1", "A"), ("MUG-1", "B"), ("sku-00", "C"))
        ]
        assert [answer["accepted"] for answer in posted] == [1, 1, 1]
        assert {client.get(f"/items/{item}").json()["title"] for item in ("MUG-1", "SKU-00")} == {"B", "C"}
        assert client.get("/model").json()["products"]["told"] == 2
        deleted = [client.delete(f"/items/{item}").status_code for item in ("mug-1", "SKU-00")]
        assert deleted == [200, 200]
        assert client.get("/items/MUG-1").status_code == 404
        assert client.get("/items/SKU-00").json()["title"] == "Thing 0"


def test_ids_of_text_are_taken_as_they_are_and_a_log_without_products_gets_a_table(tmp_path):
    from product_recs.ingest import ingest

    store_url = f"sqlite:///{tmp_path}/feedback.db"
    with in_process(tmp_path, items=sorted(f"thing/{k:02} é" for k in range(N))) as client:
        answer = client.post("/items", json={"items": [{"item_id": "ほうじ茶/1 ", "attributes": {}},
                                                       {"item_id": "ほうじ茶/1", "attributes": ROAST}]})  # fmt: skip
        assert [result["status"] for result in answer.json()["results"]] == ["rejected", "accepted"]
        assert client.get("/items/%E3%81%BB%E3%81%86%E3%81%98%E8%8C%B6%2F1").json()["title"] == "Dark roast"
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,thing/01 é\n2,thing/02 é\n")
    ledger = ingest(tmp_path / "log.csv", tmp_path / "run", feedback=store_url, progress=False, max_reject_share=1)
    rows = duckdb.sql(f"SELECT item_id, title, price FROM '{tmp_path}/run/products.parquet'").fetchall()
    assert rows == [("ほうじ茶/1", "Dark roast", 7.5)] and ledger.tables["products"]["rows_told"] == 1
