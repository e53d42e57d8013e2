"""What a user had is never new to them, whoever and whatever the minimum counts leave out of the training."""

import time

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from product_recs.answer.recommender import Recommender
from product_recs.api import create_app
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.errors import FeatureError, NothingToJudge
from product_recs.core.settings import Settings
from product_recs.data.arrays import load_table
from product_recs.data.tasks import make_task, past_and_future
from product_recs.features import build_features
from product_recs.inference import recommend_many
from product_recs.jobs.batch import Question, write_batch
from product_recs.ingest import ingest
from product_recs.train import train_bundle

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def trained(folder, rows, texts=False, **parameters):
    "A live model of pairs with days; the products file has every item and two that nobody has bought."
    write = (lambda prefix, id: f"{prefix}{id}") if texts else lambda prefix, id: id
    log = pd.DataFrame(
        [
            (write("u", user), write("i", item), pd.Timestamp("2026-01-01") + pd.Timedelta(days=day))
            for user, item, day in rows
        ],
        columns=["user_id", "item_id", "timestamp"],
    )
    items = sorted({item for _, item, _ in rows} | {998, 999})
    pd.DataFrame(
        {
            "item_id": [write("i", item) for item in items],
            "title": [f"Thing {item}" for item in items],
            "category": [f"shelf {item % 3}" for item in items],
        }
    ).to_csv(folder / "products.csv", index=False)
    log.to_csv(folder / "log.csv", index=False)
    ingest(folder / "log.csv", folder / "run", products=folder / "products.csv", progress=False)
    features = build_features(folder / "run", folder / "run" / "features", **parameters)
    version, _ = train_bundle(
        features,
        folder / "models",
        publish_it=True,
        next_model="none",
        factors=4,
        iterations=3,
        num_threads=1,
        progress=False,
    )
    return log, features, open_bundle(folder / "models", version, verify=True)


def serving(folder, **options):
    return TestClient(
        create_app(
            Settings(models_dir=folder / "models", log_level="ERROR", auth="off", **{"database_url": ""} | options)
        ),
        base_url="http://localhost",
    )


def own_of(log):
    return {user: set(part.item_id.tolist()) for user, part in log.groupby("user_id")}


SHOP = (
    [(1, 10, 0)]
    + [(user, 10 + (user * step) % 7, step) for user in range(2, 12) for step in range(1, 5)]
    + [(40, 99, 3), (40, 10, 5), (40, 11, 6)]
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    return folder, *trained(folder, SHOP, min_user_items=2, min_item_users=2)


def test_a_user_of_one_item_is_folded_in_like_a_session_of_it(shop):
    folder, _, _, bundle = shop
    with serving(folder) as service:
        left_out = service.get("/recommend/1")
        session = service.post("/recommend", json={"events": [{"item_id": 10}], "n": 10}).json()["results"][0]
        assert left_out.headers["X-Recommendation-Source"] == "session" and 10 not in left_out.json()["recommendations"]
        assert left_out.json()["recommendations"] == session["recommendations"] and bundle.users.row(1) is None
        why = service.get("/explain/1/11").json()
        assert [part["item_id"] for part in why["why"]] == [10]
        assert service.get("/explain/1/10").json()["rule"] == "already seen"
        history = service.get("/users/1/history").json()
        assert history["known"] and [line["item_id"] for line in history["history"]] == [10]
        many = service.post("/recommend", json={"users": [1, 40, 77]}).json()
        assert 10 not in many["results"][0]["recommendations"] and many["results"][2]["source"] == "popular"
    assert 10 not in Recommender(ReadyModel(bundle)).recommend(1).items


def test_an_item_of_one_user_is_not_new_to_them_and_new_to_others(shop):
    folder, _, _, bundle = shop
    with serving(folder) as service:
        assert set(service.get("/new?user_id=40").json()["recommendations"]) == {998, 999}
        assert (
            set(service.get("/new?user_id=2").json()["recommendations"]) == {99, 998, 999}
            and bundle.items.row(99) is None
        )
        lines = service.get("/users/40/history").json()["history"]
        assert [(line["item_id"], line["title"], line["interactions"]) for line in lines] == [
            (11, "Thing 11", 1),
            (10, "Thing 10", 1),
            (99, "Thing 99", 1),
        ]


def test_nothing_of_a_forgotten_user_remains(shop, tmp_path):
    folder, *_ = shop
    with serving(folder, database_url=f"sqlite:///{tmp_path}/feedback.db") as service:
        deleted = [service.delete(f"/users/{user}").status_code for user in (1, 40)]
        assert deleted == [200, 200]
        assert (
            10 in service.get("/recommend/1").json()["recommendations"]
            and service.get("/recommend/1").headers["X-Recommendation-Source"] == "popular"
        )
        assert 99 in service.get("/new?user_id=40").json()["recommendations"]
        assert all(
            not service.get(f"/users/{user}/history").json()["known"]
            and not service.get(f"/users/{user}/history").json()["history"]
            for user in (1, 40)
        )
        (tmp_path / "again").mkdir()
    ingest(folder / "log.csv", tmp_path / "again", feedback=f"sqlite:///{tmp_path}/feedback.db", progress=False)
    left_out = build_features(
        tmp_path / "again", tmp_path / "again" / "features", min_user_items=2, min_item_users=2
    ).left_out
    assert not len(left_out.of(1).items) and not left_out.of(40).others and 99 not in left_out.items.ids


def test_feedback_on_an_item_that_was_left_out_counts_before_and_after_the_next_training(shop, tmp_path):
    folder, *_ = shop
    url = f"sqlite:///{tmp_path}/feedback.db"
    with serving(folder, database_url=url) as service:
        assert service.post("/events", json={"user_id": 2, "item_id": 99}).json()["accepted"] == 1
        assert service.post("/events", json={"user_id": 1, "item_id": 12}).json()["accepted"] == 1
        assert 99 not in service.get("/new?user_id=2").json()["recommendations"]
        recommended = service.get("/recommend/1")
        assert not {10, 12} & set(recommended.json()["recommendations"]) and {
            line["item_id"] for line in service.get("/users/1/history").json()["history"]
        } == {10, 12}
    time.sleep(2.1)  # what is younger than two seconds waits for the training after this one
    ingest(folder / "log.csv", tmp_path / "run", products=folder / "products.csv", feedback=url, progress=False)
    features = build_features(tmp_path / "run", tmp_path / "run" / "features", min_user_items=3, min_item_users=3)
    train_bundle(
        features,
        tmp_path / "models",
        publish_it=True,
        next_model="none",
        factors=4,
        iterations=3,
        num_threads=1,
        progress=False,
    )
    with serving(tmp_path, database_url=url) as service:
        assert 99 not in service.get("/new?user_id=2").json()["recommendations"] and not {10, 12} & set(
            service.get("/recommend/1").json()["recommendations"]
        )
        history = service.get("/users/1/history").json()["history"]
        assert sorted(line["item_id"] for line in history) == [10, 12] and {line["origin"] for line in history} == {
            "model"
        }


LOGS = st.lists(st.tuples(st.integers(1, 9), st.integers(10, 18), st.integers(0, 30)), min_size=4, max_size=60)


@QUICK
@given(
    LOGS,
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["none", "bm25", "log1p"]),
    st.sampled_from([0, 0.001, 30]),
)
def test_no_list_of_new_things_has_an_item_of_the_user_s_own_log(
    tmp_path_factory, rows, users, items, texts, weighting, half_life
):
    folder = tmp_path_factory.mktemp("small")
    try:
        log, features, bundle = trained(
            folder,
            rows,
            texts,
            min_user_items=users,
            min_item_users=items,
            weighting=weighting,
            half_life_days=half_life,
        )
    except FeatureError as error:
        assert "no pair is left" in str(error)
        return
    own = own_of(log)
    everybody = [*own, "guest" if texts else 777]
    with serving(folder) as service:
        for user in own:
            offered = (
                service.get(f"/recommend/{user}?n=20").json()["recommendations"]
                + service.get(f"/new?user_id={user}&n=20").json()["recommendations"]
            )
            assert not own[user] & set(offered), (user, offered)
            assert {line["item_id"] for line in service.get(f"/users/{user}/history").json()["history"]} == own[user]
        results = service.post("/recommend", json={"users": everybody, "n": 20}).json()["results"]
        assert all(not own.get(result["user_id"], set()) & set(result["recommendations"]) for result in results)
    model, listed = ReadyModel(bundle), set()  # who is left something that they have not had
    for user, answer in zip(everybody, recommend_many(Recommender(model), everybody, 20)):
        assert not own.get(user, set()) & set(answer.items)
        listed |= {user} if answer.items else set()
    for user in everybody:
        assert not own.get(user, set()) & set(Recommender(model).recommend(user, 20).items)
    write_batch(Recommender(ReadyModel(bundle)), Question(n=20), folder / "all", progress=False)
    lists = load_table(folder / "all" / "part-00000.parquet")
    assert set(lists["user_id"].tolist()) == listed - {"guest", 777}
    assert all(item not in own[user] for user, item in zip(lists["user_id"].tolist(), lists["item_id"].tolist()))
    pairs = len(log.drop_duplicates(["user_id", "item_id"]))
    assert len(features.left_out) + features.all.confidence.nnz == pairs and bundle.manifest["shape"][
        "left_out"
    ] == len(features.left_out)


@QUICK
@given(LOGS, st.integers(1, 4), st.integers(1, 4))
def test_no_target_of_discovery_was_had_before(tmp_path_factory, rows, users, items):
    folder = tmp_path_factory.mktemp("judged")
    try:
        log, features, _ = trained(folder, rows, min_user_items=users, min_item_users=items)
    except FeatureError:
        return
    if "validation_from" not in features.split:  # of one day; `test_untimed.py` has the hold-out by user
        return
    for period in ("test", "validation"):
        past, future, since = past_and_future(features, period)
        try:
            task = make_task(past, future, "discovery")
        except NothingToJudge:
            continue
        before = own_of(log[log.timestamp < pd.Timestamp(since)])
        for row, targets in zip(task.rows, task.targets):
            assert not before.get(features.users[row], set()) & set(features.items.take(targets.indices))
    assert np.isfinite(features.all.confidence.data).all()
