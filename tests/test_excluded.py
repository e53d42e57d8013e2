"""What a shop excludes is in no list of any model, and in the history of whoever had it."""

import json
import random
import shutil
import time

import numpy as np
import pytest
from support import Server, call, every_model, problem

from product_recs.answer.recommender import Recommender
from product_recs.bundle.files import publish, version_of, write_bundle
from product_recs.bundle.live import rollback
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE, Columns
from product_recs.core.errors import FeatureError
from product_recs.data.arrays import load_table, save_table
from product_recs.features import build_features, ensure_features
from product_recs.answer.rules import Filters
from product_recs.inference import recommend_many
from product_recs.jobs.batch import Question, write_batch
from product_recs.ingest import ingest
from product_recs.models.blend import HabitBlend
from product_recs.models.content_neighbours import ContentNeighbours
from product_recs.models.hybrid import Hybrid
from product_recs.train import ensure_bundle, train_bundle

TEA, COFFEE = range(101, 109), range(111, 119)
POSTAGE, CARD, SAMPLE = 900, 901, 902  # bought by all, by user 99 alone, by nobody
EXCLUDED = {POSTAGE: "postage", CARD: "gift cards", SAMPLE: None}
MODELS = every_model() | {"content neighbours": ContentNeighbours(), "ALS + content": Hybrid(every_model()["ALS"])}
NAMES = [name for name, model in MODELS.items() if model.tasks is None]


def write(path, header, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return path


def exclude(folder, items=EXCLUDED):
    "The list as the ingest leaves it."
    ids = sorted(items)
    reasons = np.array([items[item] for item in ids], object)
    save_table(folder / "excluded.parquet", {"item_id": np.array(ids), "reason": reasons})


def ingested(folder, out, fees=True):
    draw = random.Random(3)
    log = [
        (user, item, f"2026-01-{draw.randint(1, 28):02}T10:00:00")
        for user in range(1, 61)
        for item in draw.sample(TEA if user <= 30 else COFFEE, 5)
    ]
    if fees:
        log += [(user, POSTAGE, f"2026-01-{1 + user % 28:02}T11:00:00") for user in range(1, 61)]
        log += [(user, POSTAGE, "2026-02-20T11:00:00") for user in range(1, 6)]
        log += [(99, CARD, "2026-01-15T10:00:00"), (99, POSTAGE, "2026-01-15T10:00:00")]
    products = [(item, f"Drink {item}", "tea" if item in TEA else "coffee", "true") for item in (*TEA, *COFFEE)]
    products += [(201, "Drink of tomorrow", "tea", "true"), (202, "Other drink", "coffee", "true")]
    products += [(POSTAGE, "Drink postage", "fees", "true"), (CARD, "Gift card", "fees", "true")]
    products += [(SAMPLE, "Drink sample", "tea", "true")]
    ingest(
        write(folder / "log.csv", ["user_id", "item_id", "timestamp"], log),
        out,
        products=write(folder / "products.csv", ["item_id", "title", "category", "available"], products),
        now="2026-03-01",
        progress=False,
    )
    return out


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "Features of a shop with three excluded items."
    folder = tmp_path_factory.mktemp("shop")
    ingested(folder, folder / "run")
    exclude(folder / "run")
    return build_features(folder / "run", folder / "run" / "features")


def bundle_of(models_dir, features, model):
    "A model for discovery, and with habits of made-up weights for the next purchase; its version."
    weights = next(blend.weights for blend in MODELS.values() if isinstance(blend, HabitBlend))
    fitted = model.fit(features.all)
    return write_bundle(
        models_dir,
        models={DISCOVERY: fitted, NEXT_PURCHASE: HabitBlend(fitted, NEXT_PURCHASE, weights).fit(features.all)},
        snapshot=features.all,
        users=features.users,
        items=features.items,
        user_columns=features.user_columns,
        item_columns=features.item_columns,
        parameters={"features": features.parameters},
        data={"ends": features.split["ends"]},
        metrics={},
        cold_items=features.cold_items,
        left_out=features.left_out,
        excluded_items=features.excluded_items,
    ).name


@pytest.fixture(scope="module")
def served(shop, tmp_path_factory):
    "A service that takes up one model after the other."
    folder = tmp_path_factory.mktemp("served")

    def put(version):
        publish(folder / "models", version)
        taken_up(server, version)

    with Server(folder, folder / "models", cache_size=0) as server:
        yield server, put, folder / "models"


def taken_up(server, version):
    deadline = time.monotonic() + 30
    while server.get("/health/ready")[1].get("x-model-version") != version:
        assert time.monotonic() < deadline, "the service did not take the model up"
        time.sleep(0.02)


def every_list(server):
    "The items of every kind of list that the service makes."
    lists = {}
    for user in (1, 2, 40, 99, 1000):
        for task in (DISCOVERY, NEXT_PURCHASE):
            lists[f"recommend {user} {task}"] = server.get(f"/recommend/{user}?n=50&task={task}")[2]["recommendations"]
        lists[f"new {user}"] = server.get(f"/new?n=50&user_id={user}")[2]["recommendations"]
    for item in (101, 111, 201, POSTAGE, CARD, SAMPLE):
        lists[f"similar {item}"] = server.get(f"/similar/{item}?n=50")[2]["similar"]
    lists["popular"] = server.get("/popular?n=50")[2]["recommendations"]
    lists["new"] = server.get("/new?n=50")[2]["recommendations"]
    for words in ("drink", "gift", POSTAGE, CARD, SAMPLE):
        lists[f"search {words}"] = [product["item_id"] for product in server.get(f"/items?query={words}")[2]["items"]]
    bodies = [
        {"users": [1, 40, 99, 1000], "filters": {"exclude_seen": False}},
        {"users": [1, 40, 99, 1000], "filters": {"allow": [*EXCLUDED], "exclude_seen": False}},
        {"users": [1, 99], "filters": {"allow": [*EXCLUDED, 101, 111]}, "task": NEXT_PURCHASE},
        {"filters": {"max_per": {"category": 5}}},
        {"events": [{"item_id": POSTAGE}], "items": {str(POSTAGE): {"category": "tea"}}},
        {"events": [{"item_id": POSTAGE}, {"item_id": 101}]},
    ]
    for number, body in enumerate(bodies):
        answer = server.ask("POST", "/recommend", {"n": 50, **body})[2]["results"]
        lists |= {f"body {number} {result['user_id']}": result["recommendations"] for result in answer}
    return lists


@pytest.mark.parametrize("name", NAMES)
def test_no_list_of_any_model_has_an_excluded_item(shop, served, name, tmp_path):
    server, put, models_dir = served
    version = bundle_of(models_dir, shop, MODELS[name])
    put(version)
    lists = every_list(server)
    assert all(not {*EXCLUDED} & {*items} for items in lists.values()), lists
    assert lists["recommend 1 discovery"] and lists["popular"] and {201, 202} == {*lists["new"]}
    assert lists["body 1 1"] == [] == lists[f"similar {CARD}"] and lists["body 0 99"] == lists["body 0 1000"]
    recommender = Recommender(ReadyModel(open_bundle(models_dir, version, verify=True)))
    for task in (DISCOVERY, NEXT_PURCHASE):
        asked = Question(n=50, task=task, filters=Filters(exclude_seen=False))
        write_batch(recommender, asked, tmp_path / "all", progress=False)
        batch = load_table(tmp_path / "all" / "part-00000.parquet")
        assert len(batch["item_id"]) and not {*EXCLUDED} & {*batch["item_id"].tolist()}
        assert 99 in batch["user_id"], "who had gift cards only is no user of the model, and a customer all the same"
        for answer in recommend_many(recommender, [1, 40, 99, 1000], 50, task):
            assert len(answer) and not {*EXCLUDED} & {*answer.items}


def test_the_features_are_those_of_a_log_without_the_excluded_rows(shop, tmp_path):
    ingested(tmp_path, tmp_path / "plain", fees=False)
    plain = build_features(tmp_path / "plain", tmp_path / "plain" / "features")
    assert plain.users.ids.tolist() == shop.users.ids.tolist() and plain.items.ids.tolist() == shop.items.ids.tolist()
    for name in ("train", "train_validation", "all"):
        for value in ("confidence", "counts", "age_days"):
            same = getattr(getattr(plain, name), value) != getattr(getattr(shop, name), value)
            assert same.nnz == 0, (name, value)
    assert (plain.test != shop.test).nnz == 0 and (plain.validation != shop.validation).nnz == 0
    assert plain.split == shop.split and plain.item_columns.keys() == shop.item_columns.keys()
    for table in ("item_columns", "user_columns"):
        for column in Columns.Counted:
            assert (getattr(plain, table)[column] == getattr(shop, table)[column]).all()
    assert len(plain.left_out) == 0 and len(shop.left_out) == 62


def test_a_history_has_them_with_their_titles_and_no_reason_names_them(shop, served):
    server, put, models_dir = served
    put(bundle_of(models_dir, shop, MODELS["ALS"]))
    history = server.get("/users/99/history")[2]
    assert history["known"] and {(line["item_id"], line["title"]) for line in history["history"]} == {
        (POSTAGE, "Drink postage"),
        (CARD, "Gift card"),
    }
    first = server.get("/users/1/history?limit=1")[2]["history"][0]
    assert first["item_id"] == POSTAGE and first["interactions"] == 2 and first["last"].startswith("2026-02-20")
    assert server.get("/recommend/99")[1]["x-recommendation-source"] == "popular"
    assert server.get("/recommend/99")[2]["recommendations"] == server.get("/recommend/1000")[2]["recommendations"]
    for user in (1, 40):
        for task in (DISCOVERY, NEXT_PURCHASE):
            for line in server.get(f"/recommend/{user}?detail=true&task={task}&n=20")[2]["items"]:
                assert not {*EXCLUDED} & {reason["item_id"] for reason in line["reasons"]}
    assert not {*EXCLUDED} & {part["item_id"] for part in server.get("/explain/1/101")[2]["why"]}
    assert "excluded (gift cards)" in problem(server.get(f"/explain/1/{CARD}"), 404).detail
    facts = server.get(f"/items/{CARD}")[2]
    assert (facts["title"], facts["excluded"]) == ("Gift card", "gift cards") and "excluded" not in facts["attributes"]
    assert server.get(f"/items/{SAMPLE}")[2]["excluded"] == "by the shop"
    assert server.get("/items/101")[2]["excluded"] is None
    assert "excluded (postage)" in server.get(f"/similar/{POSTAGE}")[1]["x-recommendation-shortfall"]


def test_an_event_on_an_excluded_item_is_kept_and_changes_no_list(shop, tmp_path):
    version = bundle_of(tmp_path / "models", shop, MODELS["ALS"])
    publish(tmp_path / "models", version)
    with Server(tmp_path, tmp_path / "models") as server:
        before = every_list(server)
        events = [{"user_id": user, "item_id": item} for user in (1, 40, 99, 1000) for item in EXCLUDED]
        events += [{"user_id": 2, "item_id": POSTAGE, "event": "deny"}]
        assert server.ask("POST", "/events", {"events": events})[2]["accepted"] == len(events)
        available = {"items": [{"item_id": item, "available": True} for item in EXCLUDED]}
        assert server.ask("POST", "/availability", available)[0] == 200
        assert every_list(server) == before
        lines = server.get("/users/1000/history")[2]["history"]
        assert {line["item_id"] for line in lines} == {*EXCLUDED} and {line["origin"] for line in lines} == {"feedback"}
        assert {line["title"] for line in lines} == {"Drink postage", "Gift card", "Drink sample"}


def test_a_rollback_to_a_bundle_without_exclusions_and_back(shop, served, tmp_path):
    server, put, models_dir = served
    plain = shutil.copytree(shop.interactions, tmp_path / "plain")
    (plain / "excluded.parquet").unlink()
    features = build_features(plain, tmp_path / "plain_features")
    assert features.exclusions is None and POSTAGE in features.items.ids
    old = bundle_of(models_dir, features, MODELS["popularity"])
    new = bundle_of(models_dir, shop, MODELS["popularity"])
    put(old)
    assert server.get("/popular?n=1")[2]["recommendations"] == [POSTAGE]
    put(new)
    assert POSTAGE not in server.get("/popular?n=50")[2]["recommendations"]
    assert rollback(models_dir) == old
    taken_up(server, old)
    assert server.get("/popular?n=1")[2]["recommendations"] == [POSTAGE]
    assert server.get(f"/items/{POSTAGE}")[2]["excluded"] is None
    put(new)
    assert server.get(f"/items/{POSTAGE}")[2]["excluded"] == "postage"


def test_another_list_makes_the_features_and_the_model_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(tmp_path))
    run = tmp_path / "data" / "processed" / "fees"
    ingested(tmp_path, run)
    whole = ensure_features("fees")
    made = whole.path.stat().st_mtime_ns
    assert POSTAGE in whole.items.ids and ensure_features("fees").path.stat().st_mtime_ns == made
    first = ensure_bundle("fees", tmp_path / "models")
    assert ensure_bundle("fees", tmp_path / "models") == first
    exclude(run, {POSTAGE: "postage"})
    less = ensure_features("fees")
    assert POSTAGE not in less.items.ids and CARD in less.items.ids and less.exclusions
    assert ensure_features("fees").exclusions == less.exclusions
    second = ensure_bundle("fees", tmp_path / "models")
    assert second != first == version_of(tmp_path / "models", whole.fingerprint, exclusions=None)
    exclude(run, {CARD: "gift cards"})
    assert POSTAGE in ensure_features("fees").items.ids
    exclude(run, dict.fromkeys((*TEA, *COFFEE, POSTAGE, CARD), "all"))
    with pytest.raises(FeatureError, match="exclude_items"):
        ensure_features("fees")


def test_the_command_line_and_minimum_counts(tmp_path):
    ingested(tmp_path, tmp_path / "run")
    exclude(tmp_path / "run")
    # nobody has six items without the postage
    with pytest.raises(FeatureError, match="no pair is left"):
        build_features(tmp_path / "run", tmp_path / "run" / "none", min_user_items=6)
    features = build_features(tmp_path / "run", tmp_path / "run" / "features", min_user_items=5, min_item_users=2)
    assert POSTAGE in features.left_out.of(1).others and features.left_out.of(99).others == [POSTAGE, CARD]
    train_bundle(features, tmp_path / "models", publish_it=True, factors=4, iterations=2, progress=False)
    ask = lambda *words: call(tmp_path, "product-recs", *words, "--models-dir", str(tmp_path / "models"))
    for words in (("recommend", "99"), ("recommend", "1", "--include-seen")):
        answer = ask(*words, "-n", "50", "--json")
        assert answer.returncode == 0, answer.stderr
        assert not {*EXCLUDED} & {*json.loads(answer.stdout)["recommendations"]}
    like = ask("similar", str(CARD))
    assert like.returncode == 0 and "Gift card" in like.stdout and "excluded (gift cards)" in like.stdout
