"""A shop whose model places new products, from its files to the answers of a real service: cold, posted, taken back."""

import csv
import random

import pytest
from support import Server, until

from product_recs.answer.recommender import open_recommender
from product_recs.bundle.files import publish
from product_recs.bundle.live import rollback
from product_recs.bundle.opening import open_bundle
from product_recs.features import build_features
from product_recs.inference import recommend_many
from product_recs.ingest import ingest
from product_recs.train import train_bundle

TEA, COFFEE = range(101, 113), range(121, 133)
OLD, YOUNG = range(1, 61), range(61, 121)  # the old drink tea, the young coffee
COLD_TEA, COLD_COFFEE, ODD, POSTED = 201, 202, 203, 900


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def files(folder):
    "A log of two tastes over half a year, products of two categories with three new ones, and users of two ages."
    draw, log = random.Random(3), []
    for user in (*OLD, *YOUNG):
        own = TEA if user in OLD else COFFEE
        log += [(user, item, f"2026-0{draw.randint(1, 6)}-{draw.randint(1, 28):02}") for item in draw.choices(own, k=9)]
    kinds = ((TEA, "Leaf", "tea", "Elm", 4), (COFFEE, "Bean", "coffee", "Oak", 9))
    products = [(item, f"{name} blend {item}", *facts) for own, name, *facts in kinds for item in own]
    products += [(COLD_TEA, "Leaf first flush", "tea", "Elm", 5), (COLD_COFFEE, "Bean dark", "coffee", "Oak", 8),
                 (ODD, "", "", "", "")]  # fmt: skip
    users = [(user, "old" if user in OLD else "young") for user in (*OLD, *YOUNG)] + [(500, "young")]
    write(folder / "log.csv", ["user_id", "item_id", "timestamp"], log)
    write(folder / "products.csv", ["item_id", "title", "category", "brand", "price"], products)
    write(folder / "users.csv", ["user_id", "age"], users)


def trained(folder, name, feedback="", **parameters):
    "A version of the shop's files, not live yet."
    ingest(folder / "log.csv", folder / name, products=folder / "products.csv", users=folder / "users.csv",
           feedback=feedback, progress=False, now="2026-07-01")  # fmt: skip
    features = build_features(folder / name, folder / name / "features")
    given = {"factors": 6, "model": "ALS", "next_model": "ALS + habits", "content": "always"} | parameters
    return train_bundle(features, folder / "models", False, given.pop("model"), given.pop("next_model"),
                        progress=False, **given)[0]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    files(folder)
    plain = trained(folder, "plain", content="none")
    placing = trained(folder, "first", next_model="ALS + content + habits")
    publish(folder / "models", plain)
    publish(folder / "models", placing)
    with Server(folder, folder / "models", watch_seconds=0.1, impressions=0) as server:
        server.folder, server.plain, server.placing = folder, plain, placing
        yield server


def ask(server, user, n=8, **body):
    status, _, answer = server.ask("POST", "/recommend", {"users": [user], "n": n, **body})
    assert status == 200, answer
    return answer["results"][0]


def listed(server, user, n=8, **body):
    return ask(server, user, n, **body)["recommendations"]


def tell(server, item=POSTED, **attributes):
    body = {"items": [{"item_id": item, "attributes": attributes}]}
    status, _, answer = server.ask("POST", "/items", body)
    assert status == 200 and answer["rejected"] == 0, answer
    return answer["results"][0]


@pytest.fixture
def posted(shop):
    "A tea that came today."
    result = tell(shop, title="Leaf of today", category="tea", brand="Elm", price=4.5)
    assert result["placed"] is True
    yield POSTED
    shop.ask("DELETE", f"/items/{POSTED}")


def share(server, item, users, **body):
    "How many of the users have an item among their first eight that they did not have."
    return sum(item in listed(server, user, **body) for user in users) / len(users)


def test_the_bundle_has_a_hybrid_for_each_task(shop):
    models = open_bundle(shop.folder / "models").models
    assert [model.name for model in models.values()] == ["ALS + content", "ALS + content + habits"]
    assert all(model.places_items for model in models.values())


def test_a_product_without_a_buyer_is_recommended_to_whom_it_suits(shop):
    some_old, some_young = [*OLD][:20], [*YOUNG][:20]
    assert share(shop, COLD_TEA, some_old) > 0.5 and share(shop, COLD_TEA, some_young) == 0
    assert share(shop, COLD_COFFEE, some_young) > 0.5 and share(shop, COLD_COFFEE, some_old) == 0
    assert share(shop, ODD, [*some_old, *some_young]) == 0, "nothing is known of it"
    status, _, answer = shop.get(f"/similar/{COLD_TEA}?n=6")
    assert status == 200 and set(answer["similar"]) <= {*TEA}
    status, _, answer = shop.get(f"/similar/{TEA[0]}?n=12")
    assert COLD_TEA in answer["similar"]


def test_the_answer_to_why_adds_up(shop):
    user = next(user for user in OLD if COLD_TEA in listed(shop, user))
    status, _, answer = shop.get(f"/explain/{user}/{COLD_TEA}")
    assert status == 200 and answer["recommended"] and answer["rule"] is None
    assert {reason["item_id"] for reason in answer["why"]} <= {*TEA}
    taste = sum(reason["contribution"] for reason in answer["why"]) + answer["other"]
    assert taste == pytest.approx(answer["signals"]["taste"], abs=1e-4)
    assert sum(answer["signals"].values()) == pytest.approx(answer["score"], abs=1e-4)
    assert shop.get(f"/explain/{user}/{COLD_COFFEE}")[2]["rank"] > answer["rank"]
    assert "same category" in answer["in_common"] and answer["in_common"].endswith("in common with what you had")


def test_a_posted_product_is_recommended_and_obeys_every_rule(shop, posted):
    fan = next(user for user in OLD if posted in listed(shop, user))
    assert posted in listed(shop, fan, filters={"where": {"category": ["tea"]}})
    assert posted not in listed(shop, fan, 24, filters={"where": {"category": ["coffee"]}})
    assert posted not in listed(shop, fan, 30, filters={"deny": [posted]})
    assert listed(shop, fan, filters={"allow": [posted]}) == [posted]
    assert shop.ask("POST", "/availability", {"items": [{"item_id": posted, "available": False}]})[0] == 200
    until(lambda: posted not in listed(shop, fan, 30))
    assert shop.ask("POST", "/availability", {"items": [{"item_id": posted, "available": True}]})[0] == 200
    until(lambda: posted in listed(shop, fan))
    tell(shop, title="Bean of today", category="coffee", brand="Oak", price=9)
    until(lambda: share(shop, posted, [*YOUNG][:20]) > 0.3)
    assert share(shop, posted, [*OLD][:20]) == 0, "it is a coffee now"
    assert shop.ask("DELETE", f"/items/{posted}")[0] == 200
    until(lambda: posted not in listed(shop, 70, 30))
    assert shop.get(f"/items/{posted}")[0] == 404


def test_a_guest_of_whom_only_attributes_are_known(shop, posted):
    for age, own, cold in (("old", TEA, COLD_TEA), ("young", COFFEE, COLD_COFFEE)):
        answer = shop.ask("POST", "/recommend", {"n": 8, "attributes": {"age": age}})[2]["results"][0]
        assert answer["source"] == "content" and set(answer["recommendations"]) <= {*own, cold, posted}
        body = {"n": 4, "attributes": {"age": age}, "task": "next_purchase"}
        answer = shop.ask("POST", "/recommend", body)[2]["results"][0]
        assert answer["source"] == "content" and set(answer["recommendations"]) <= {*own, cold, posted}
    answer = ask(shop, 500)
    assert answer["source"] == "content" and set(answer["recommendations"]) <= {*COFFEE, COLD_COFFEE}
    status, _, answer = shop.ask("POST", "/recommend", {"n": 8, "events": [{"item_id": posted}]})
    answer = answer["results"][0]
    assert answer["source"] == "session" and set(answer["recommendations"]) <= {*TEA, COLD_TEA}


def test_the_next_purchase_has_habits_and_new_products(shop, posted):
    status, headers, answer = shop.get("/recommend/5?task=next_purchase&n=24")
    assert status == 200 and headers["x-recommendation-source"] == "next_purchase"
    assert headers["x-recommendation-model"] == "ALS + content + habits"
    places = {item: place for place, item in enumerate(answer["recommendations"])}
    assert posted in places and places[posted] < min(places[item] for item in COFFEE if item in places)
    assert {*answer["recommendations"][:9]} <= {*TEA, COLD_TEA, posted}


def test_a_batch_is_what_the_service_answers(shop):
    users = [*range(1, 121, 7), 500, "nobody"]
    with open_recommender(shop.folder / "models") as recommender:
        lists = {task: recommend_many(recommender, users, 8, task) for task in ("discovery", "next_purchase")}
    for task, many in lists.items():
        for user, expected in zip(users, many, strict=True):
            answer = shop.get(f"/recommend/{user}?task={task}&n=8&detail=true")[2]
            assert answer["recommendations"] == expected.items and answer["source"] == expected.source, (task, user)
            assert [line["score"] for line in answer["items"]] == pytest.approx(expected.scores, rel=1e-4, abs=1e-5)


def test_what_was_posted_stays_through_training_and_rollback(shop, posted):
    models = shop.folder / "models"
    live = lambda: shop.get("/health/ready")[2]["model_version"]  # noqa: E731
    fan = next(user for user in OLD if posted in listed(shop, user))
    again = trained(shop.folder, "again", feedback=f"sqlite:///{shop.folder}/feedback.db",
                    next_model="ALS + content + habits")  # fmt: skip
    assert open_bundle(models, again).told(posted)["title"] == "Leaf of today"
    publish(models, again)
    until(lambda: live() == again)
    assert share(shop, posted, [fan, *OLD][:20]) > 0.3
    rollback(models, shop.plain)
    until(lambda: live() == shop.plain)
    assert posted not in listed(shop, fan, 30) and COLD_TEA not in listed(shop, fan, 30)
    assert {posted, COLD_TEA, COLD_COFFEE} <= {*shop.get("/new?n=10")[2]["recommendations"]}
    assert shop.get(f"/items/{posted}")[2]["title"] == "Leaf of today"
    assert shop.get(f"/recommend/{fan}")[1]["x-recommendation-model"] == "ALS"
    publish(models, shop.placing)
    until(lambda: live() == shop.placing)
    assert posted in listed(shop, fan)
