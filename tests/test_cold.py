"""Products that nobody has bought and users who have bought nothing, from the files to the answers of a real server."""

import csv
import json
import random
import shutil

import pytest
from support import Server, problem

from product_recs.bundle.files import verify_files
from product_recs.bundle.opening import open_bundle
from product_recs.core.errors import BundleError
from product_recs.features import build_features
from product_recs.ingest import ingest
from product_recs.train import train_bundle

TEA, COFFEE = range(101, 109), range(111, 119)
OLD, YOUNG = range(1, 41), range(41, 81)  # the old drink tea, the young coffee


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The pipeline on a log of 80 people and 16 items, with five products and two users that have no interactions."""
    folder, draw = tmp_path_factory.mktemp("cold"), random.Random(5)
    log = [
        (user, item, f"2026-01-{draw.randint(1, 28):02}T10:00:00")
        for user in (*OLD, *YOUNG)
        for item in draw.sample(TEA if user in OLD else COFFEE, 5)
    ]
    log.append((1, 204, "2026-01-03T10:00:00"))  # one buyer: not enough to be in the model
    products = [(item, f"Tea {item}", "tea", "Elm" if item % 2 else "Fir", 2.5, "true") for item in TEA] + [
        (item, f"Coffee {item}", "coffee", "Oak", 5, "true") for item in COFFEE
    ]
    products += [
        (201, "Green tea, new", "tea", "Fir", 3, "true"),
        (202, "Cold coffee", "coffee", "", 4, "false"),
        (203, "Umbrella", "", "", 9, ""),
        (204, "Rare tea", "tea", "", 90, "true"),
        (205, "O'Neill's 100%_tea", "tea", "", 1, ""),
    ]
    users = [(user, "old" if user in OLD else "young", "Rome") for user in (*OLD, *YOUNG)] + [
        (900, "young", ""),
        (901, "", ""),
    ]
    ingest(
        write(folder / "log.csv", ["user_id", "item_id", "timestamp"], log),
        folder / "in",
        products=write(
            folder / "products.csv", ["item_id", "title", "category", "brand", "price", "available"], products
        ),
        users=write(folder / "users.csv", ["user_id", "age", "town"], users),
        progress=False,
        now="2026-02-01",
    )
    features = build_features(folder / "in", folder / "features", min_item_users=2)
    train_bundle(features, folder / "models", publish_it=True, factors=8, progress=False)
    return folder / "models"


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("service"), models) as running:
        yield running


def recommend(server, **body):
    status, _, answer = server.ask("POST", "/recommend", {"n": 4, **body})
    assert status == 200, answer
    return [(result["source"], result["recommendations"]) for result in answer["results"]]


def test_the_bundle_holds_exactly_the_rows_without_a_place_in_the_model(models):
    bundle = open_bundle(models, verify=True)
    assert bundle.cold_items.ids.ids.tolist() == [201, 202, 203, 204, 205] and bundle.cold_users.ids.ids.tolist() == [
        900,
        901,
    ]
    assert not set(bundle.cold_items.ids.ids) & set(bundle.items.ids) and len(bundle.items) == 16
    assert bundle.cold_items.get(201) == {
        "title": "Green tea, new",
        "category": "tea",
        "brand": "Fir",
        "price": 3.0,
        "available": True,
    }
    assert {"cold_items.parquet", "cold_users.parquet"} <= set(bundle.manifest["files"])


def test_a_changed_cold_file_is_refused(models, tmp_path):
    copy = shutil.copytree(models, tmp_path / "models")
    file = copy / open_bundle(copy).version / "cold_users.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(BundleError, match="cold_users.parquet.*sha256"):
        verify_files(file.parent)


def test_an_old_bundle_without_cold_files_is_served(models, tmp_path):
    copy = shutil.copytree(models, tmp_path / "models")
    folder = copy / open_bundle(copy).version
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("cold_items.parquet", "cold_users.parquet"):
        (folder / name).unlink()
        del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with Server(tmp_path, copy) as old:
        problem(old.get("/items/201"), 404)
        problem(old.get("/similar/201"), 404)
        assert old.get("/recommend/900")[1]["x-recommendation-source"] == "popular"
        assert recommend(old, events=[{"item_id": 201}])[0][0] == "popular"
        assert recommend(old, events=[{"item_id": 201}], items={"201": {"brand": "Oak"}})[0][0] == "content"


def test_a_session_on_a_new_item_gives_what_it_has_in_common(server):
    ((source, items),) = recommend(server, events=[{"item_id": 201, "event": "cart"}])
    assert source == "content" and set(items) == {item for item in TEA if item % 2 == 0}  # tea and Fir
    ((source, items),) = recommend(server, events=[{"item_id": "204"}], n=8)
    assert source == "content" and set(items) == set(TEA)
    assert recommend(server, events=[{"item_id": 203}])[0][0] == "popular"  # nothing is told of it but its title
    assert (
        recommend(server, events=[{"item_id": 201}, {"item_id": 111}])[0][0] == "session"
    )  # the model knows one of them
    users = recommend(server, users=[1, 900, "nobody"], events=[{"item_id": 201}])
    assert [source for source, _ in users] == ["personalised", "content", "content"]


def test_a_stored_event_on_a_new_item_counts_at_the_next_request(server):
    assert server.get("/recommend/7000")[1]["x-recommendation-source"] == "popular"
    assert server.ask("POST", "/events", {"user_id": 7000, "item_id": 202})[2]["accepted"] == 1
    status, headers, body = server.get("/recommend/7000?n=8&detail=true")
    assert headers["x-recommendation-source"] == "content" == body["source"] and set(body["recommendations"]) == set(
        COFFEE
    )
    assert server.get("/explain/7000/111")[2]["source"] == "content"
    assert server.get("/users/7000/history")[2]["history"][0]["title"] == "Cold coffee"


def test_a_user_of_the_users_file_gets_what_their_peers_have(server):
    status, headers, body = server.get("/recommend/900?n=8")
    assert headers["x-recommendation-source"] == "segment" and set(body["recommendations"]) == set(COFFEE)
    assert server.get("/recommend/901")[1]["x-recommendation-source"] == "popular"
    ((source, items),) = recommend(server, users=[900], attributes={"age": "old"}, n=8)
    assert source == "segment" and set(items) == set(TEA)  # the request knows better
    assert server.ask("DELETE", "/users/900")[0] == 200
    assert server.get("/recommend/900?n=8")[1]["x-recommendation-source"] == "popular", (
        "nothing may be used of somebody who is forgotten"
    )


def test_a_request_describes_guests_and_new_items(server):
    assert recommend(server, attributes={"age": "young"}, n=8)[0][0] == "segment"
    assert set(recommend(server, attributes={"age": "young", "town": None}, n=8)[0][1]) == set(COFFEE)
    assert recommend(server, attributes={"age": "unheard of"})[0][0] == "popular"
    ((source, items),) = recommend(
        server, events=[{"item_id": 999}], items={"999": {"category": "coffee", "price": 3}}, n=8
    )
    assert source == "content" and set(items) == set(COFFEE)
    ((source, items),) = recommend(
        server, events=[{"item_id": 201}], items={"201": {"category": None, "brand": "Oak"}}, n=8
    )
    assert source == "content" and set(items) == set(COFFEE)  # the request knows better than the file
    assert recommend(server, users=[1], attributes={"age": "young"})[0][0] == "personalised"
    assert recommend(server, items={"999": {"category": "coffee"}})[0][0] == "popular"  # told of, but not in hand


@pytest.mark.parametrize(
    "body, words",
    [
        ({"attributes": {"shoe": "42"}}, ("attributes", "'shoe'", "age")),
        ({"attributes": {"age": 42}}, ("attributes", "'age'", "42")),
        ({"attributes": {"popularity": 3}}, ("'popularity'",)),
        ({"items": {"999": {"colour": "red"}}}, ("items", "'999'", "'colour'", "brand")),
        ({"items": {"999": {"category": True}}}, ("'category'", "True")),
        ({"items": {"999": {"price": "3"}}}, ("'price'", "'3'")),
        ({"items": {"999": {"category": ["tea"]}}}, ("category",)),
        ({"items": {"999": "tea"}}, ("items",)),
        ({"items": [{"item_id": 9}]}, ("items",)),
        ({"attributes": ["old"]}, ("attributes",)),
    ],
)
def test_a_wrong_description_is_refused_by_name(server, body, words):
    document = problem(server.ask("POST", "/recommend", body), 422)
    for word in words:
        assert word in document.detail or word in str(document.errors), document


def test_similar_to_a_new_item(server):
    status, headers, body = server.get("/similar/201?n=4&detail=true")
    assert (
        status == 200
        and headers["x-recommendation-source"] == "content" == body["source"]
        and set(body["similar"]) == {102, 104, 106, 108}
    )
    status, headers, body = server.get("/similar/204?n=20")
    assert (
        set(body["similar"]) == set(TEA) and "8 items with nothing in common" in headers["x-recommendation-shortfall"]
    )
    assert server.get("/similar/203")[2]["similar"] == []
    assert server.get("/similar/101")[1]["x-recommendation-source"] == "similar"
    problem(server.get("/similar/999"), 404)


def test_items_and_the_search_know_new_items(server):
    status, _, body = server.get("/items/201")
    assert body == {
        "item_id": 201,
        "title": "Green tea, new",
        "attributes": {"category": "tea", "brand": "Fir", "price": 3.0, "available": True},
        "excluded": None,
        "available": True,
    }
    assert [server.get(f"/items/{item}")[2]["available"] for item in (202, 203, 204)] == [False, True, True]
    server.ask(
        "POST", "/availability", {"items": [{"item_id": 202, "available": True}, {"item_id": 203, "available": False}]}
    )
    assert [server.get(f"/items/{item}")[2]["available"] for item in (202, 203)] == [True, False]
    problem(server.get("/items/999"), 404)
    search = lambda query, limit=20: [
        item["item_id"] for item in server.get(f"/items?query={query}&limit={limit}")[2]["items"]
    ]
    assert set(search("tea")[:8]) == set(TEA) and search("tea")[8:] == [201, 204] and len(search("tea", 9)) == 9
    assert search("new+green") == [201] and search("203") == [203] and search("umb", 1) == [203]
    assert search("100%25") == [205] and search("o%27neill") == [205] and search("%25") == []


def test_new_items_for_somebody(server):
    server.ask(
        "POST", "/availability", {"items": [{"item_id": 202, "available": False}, {"item_id": 203, "available": True}]}
    )
    new = lambda query="", n=5: server.get(f"/new?n={n}{query}")
    status, headers, body = new("&user_id=41")  # drinks coffee, and the only new coffee cannot be bought
    assert status == 200 and headers["x-recommendation-source"] == "new" and body["user_id"] == 41
    assert body["recommendations"] == [205, 204, 203, 201] and body["shortfall"].startswith("only 4 of 5")
    assert body["order"].startswith("the last rows of the products file first")
    server.ask("POST", "/availability", {"items": [{"item_id": 202, "available": True}]})
    assert (
        new("&user_id=41", 1)[2]["recommendations"] == [202]
        and new("&user_id=41")[1]["x-recommendation-source"] == "content"
    )
    body = new("&user_id=2&detail=true")[2]
    assert (
        body["source"] == "content"
        and body["recommendations"][0] == 201
        and set(body["recommendations"][1:3]) == {204, 205}
    )
    assert (
        [line["rank"] for line in body["items"]] == [1, 2, 3, 4, 5]
        and body["items"][0]["title"] == "Green tea, new"
        and body["items"][0]["score"] > body["items"][1]["score"]
        and body["items"][4]["score"] is None
    )
    assert (
        new("&user_id=2&category=coffee")[2]["recommendations"] == [202]
        and new("&category=none")[2]["recommendations"] == []
    )
    assert new()[2]["source"] == "new" and new("", 2)[2]["shortfall"] is None
    assert server.ask("POST", "/events", {"user_id": 2, "item_id": 201})[0] == 200
    assert 201 not in new("&user_id=2")[2]["recommendations"], "they have it"
    server.ask("POST", "/events", {"user_id": 2, "item_id": 204, "event": "deny"})
    assert 204 not in new("&user_id=2")[2]["recommendations"]
    problem(server.get("/new?n=0"), 422)
