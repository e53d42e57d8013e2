"""One door: the service over HTTP, the command line and the batch give one list to one user at one moment."""

import json
import subprocess
import sys
from collections import Counter

import duckdb
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from support import ROOT, Server

from product_recs.answer.recommender import open_recommender
from product_recs.bundle.checkerboard import publish_checkerboard
from product_recs.core.columns import TASKS
from product_recs.core.ids import IdTable
from product_recs.data.arrays import save_table
from product_recs.data.left_out import LeftOut
from product_recs.inference import recommend_many
from product_recs.jobs.batch import Question, write_batch
from product_recs.jobs.cli import main
from product_recs.models.signals import SIGNALS, BlendWeights

N = 60  # users, and items 101 to 160; the even ones are tea, the odd ones coffee
TRAINED, LEFT_OUT, COLD = range(1, N + 1), 501, 700
EVERYBODY = [*range(1, N + 1, 19), 2, 3, 4, 5, 6, LEFT_OUT, COLD, 999, "nobody", "guest"]
ITEMS = [101, 102, 900, 905]  # the last two are in the products file only
WEIGHTS = dict(zip(SIGNALS, (0.5, -0.2, 0.3, 1.0, 0.7, 0.9, -0.4, 0.2, 0.3, -0.1, 0.2)))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A model with histories, a blend, cold items and users, and a user whom the minimum counts left out."
    folder = tmp_path_factory.mktemp("door")
    kinds = np.array(["coffee", "tea"] * (N // 2), object)
    cold_items, cold_users = folder / "cold_items.parquet", folder / "cold_users.parquet"
    save_table(cold_items, {"item_id": np.array([900, 905]), "category": np.array(["tea", "coffee"], object)})
    save_table(cold_users, {"user_id": np.array([COLD]), "age": np.array(["young"], object)})
    pairs = csr_matrix(([1.0, 2.0], ([0, 0], [2, N])), shape=(1, N + 1), dtype=np.float32)
    draw = np.random.default_rng(1)

    def ages(seen):
        ages = seen.copy()
        ages.data = draw.integers(0, 90, seen.nnz).astype(np.float32)
        return ages

    def counts(seen):
        counts = seen.copy()
        counts.data = draw.integers(1, 5, seen.nnz).astype(np.float32)
        return counts

    publish_checkerboard(
        folder / "models",
        N,
        item_columns={"category": kinds, "price": np.arange(float(N))},
        user_columns={"age": np.array(["old", "young"] * (N // 2), object)},
        counts=counts,
        age_days=ages,
        habits=BlendWeights(WEIGHTS, -2.0, 30.0, 30.0, {}),
        cold_items=cold_items,
        cold_users=cold_users,
        left_out=LeftOut(N, IdTable([LEFT_OUT]), IdTable([905]), pairs, pairs.copy(), pairs * 0, pairs * 0),
    )
    with Server(folder, folder / "models") as server:
        yield folder, server


def over_http(server, n):
    lists = {}
    for user in EVERYBODY:
        for task in TASKS:
            status, headers, body = server.get(f"/recommend/{user}?n={n}&task={task}&detail=true")
            assert status == 200, body
            made_by = headers["x-recommendation-source"], headers["x-recommendation-model"]
            assert made_by == (body["source"], body["model"])
            scores = [item["score"] for item in body["items"]]
            lists[user, task] = made_by, body["recommendations"], scores, body["shortfall"]
    for item in ITEMS:
        status, headers, body = server.get(f"/similar/{item}?n={n}&detail=true")
        assert status == 200, body
        made_by = body["source"], headers["x-recommendation-model"]
        lists["similar", item] = made_by, body["similar"]
    return lists


def on_the_command_line(capsys, n):
    def ask(*words):
        assert main([*words, "-n", str(n), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    lists = {}
    for user in EVERYBODY:
        for task in TASKS:
            answer = ask("recommend", str(user), "--task", task)
            ranking = tuple(answer[name] for name in ("recommendations", "scores", "shortfall"))
            lists[user, task] = (answer["source"], answer["made_by"]), *ranking
    for item in ITEMS:
        answer = ask("similar", str(item))
        lists["similar", item] = (answer["source"], answer["made_by"]), answer["recommendations"]
    return lists


def in_batches(recommender, file, n, task, served):
    "Many, and all, are told what each is told alone."
    for user, answer in zip(EVERYBODY, recommend_many(recommender, EVERYBODY, n, task)):
        made_by, items, scores, shortfall = served[user, task]
        outcome = (answer.source, answer.model), answer.items, answer.shortfall
        assert outcome == (made_by, items, shortfall), (user, task)
        assert np.allclose(answer.scores, scores, atol=1e-5), (user, task)
    gone = served[4, "discovery"][0][0] == "popular"  # 4 asked to be forgotten, and others have come
    everybody = {*map(str, (*TRAINED, LEFT_OUT, COLD))} - {"4"} | {"999", "guest"} if gone else None
    for users in ("all", EVERYBODY):
        made = write_batch(recommender, Question(n=n, task=task), file, users, part=16, progress=False).manifest
        written = rows_of(file, "user_id", "item_id")
        if users == "all":
            assert made["asked"] == (64 if gone else 62) and made["forgotten"] == gone
            assert written.keys() == (everybody or {*map(str, (*TRAINED, LEFT_OUT, COLD))})
        else:
            assert made["asked"] == len({*EVERYBODY}) and made["forgotten"] == 0
            short = {user for user in EVERYBODY if served[user, task][3]}
            assert made["short"] == len(short)
            rungs = [served[user, task][0][0] for user in {*EVERYBODY}]
            assert {rung: facts["lists"] for rung, facts in made["rungs"].items()} == dict(Counter(rungs))
        for user in EVERYBODY:
            (source, _), items, scores, _ = served[user, task]
            if str(user) not in written:
                assert users == "all" and (user in (4, 999, "nobody", "guest")) or not items, (user, task)
                continue
            row = written[str(user)]
            assert row[:2] == (items, {source}) and np.allclose(row[2], scores, atol=1e-5), (user, task)


def rows_of(folder, key, items):
    query = (
        f"SELECT CAST({key} AS VARCHAR), list({items} ORDER BY rank), list(DISTINCT source), list(score ORDER BY rank) "
        f"FROM read_parquet('{folder}/*.parquet') GROUP BY 1"
    )
    return {
        asked: (ids, {*sources}, scores) for asked, ids, sources, scores in duckdb.connect().execute(query).fetchall()
    }


def similar_in_a_batch(recommender, folder, n, served):
    write_batch(recommender, Question("similar", n=n), folder, part=16, progress=False)
    written = rows_of(folder, "item_id", "similar_id")
    for item in ITEMS:
        (source, _), items = served["similar", item][:2]
        assert written.get(str(item), ([], {source}))[:2] == (items, {source}), item


def compare(folder, server, capsys, n):
    "The lists, which are the same from each side."
    served, asked = over_http(server, n), on_the_command_line(capsys, n)
    assert served.keys() == asked.keys()
    for question, (made_by, items, *more) in served.items():
        assert (made_by, items) == asked[question][:2], question
        if more:
            assert np.allclose(more[0], asked[question][2], atol=1e-5) and more[1] == asked[question][3], question
    with open_recommender(folder / "models", f"sqlite:///{folder}/feedback.db") as recommender:
        for task in TASKS:
            in_batches(recommender, folder / task, n, task, served)
        similar_in_a_batch(recommender, folder / "similar", n, served)
    return served


@pytest.mark.parametrize("n", [5, 45])  # 45: more than a user has left
def test_every_door_gives_the_same_list(shop, capsys, monkeypatch, n):
    folder, server = shop
    monkeypatch.setenv("PRODUCT_RECS_MODELS_DIR", str(folder / "models"))
    monkeypatch.setenv("PRODUCT_RECS_DATABASE_URL", f"sqlite:///{folder}/feedback.db")
    before = compare(folder, server, capsys, n)
    sources = {source for (source, _), *_ in before.values()}
    if n == 5:  # nobody has told anything yet
        assert sources == {"personalised", "next_purchase", "session", "segment", "popular", "similar", "content"}
        assert before[LEFT_OUT, "discovery"][0] == ("session", "ALS")
        assert before[COLD, "discovery"][0] == ("segment", "segment")
        makers = {made_by for (_, task), (made_by, *_) in before.items() if task == "next_purchase"}
        assert ("next_purchase", "ALS + habits") in makers and ("popular", "popularity") in makers
    events = [
        {"user_id": 1, "item_id": 101, "event": "deny"},
        {"user_id": 2, "item_id": 101},
        {"user_id": 2, "item_id": 103},
        {"user_id": 3, "item_id": 900},
        {"user_id": LEFT_OUT, "item_id": 104},
        {"user_id": COLD, "item_id": 106},
        {"user_id": 999, "item_id": 900},
        {"user_id": "guest", "item_id": 102},
    ]
    assert server.ask("POST", "/events", {"events": events})[0] == 200
    availability = [{"item_id": item, "available": False} for item in (102, 105, 107)]
    assert server.ask("POST", "/availability", {"items": availability})[0] == 200
    assert server.ask("DELETE", "/users/4")[0] == 200
    after = compare(folder, server, capsys, n)
    assert all(not {102, 105, 107} & set(answer[1]) for answer in after.values())
    assert 101 not in after[1, "discovery"][1] and after[4, "discovery"][0][0] == "popular"
    assert {101, 103}.isdisjoint(after[2, "discovery"][1]) and after[999, "discovery"][0][0] == "content"
    assert after["guest", "discovery"][0] == after[COLD, "discovery"][0] == ("session", "ALS")
    changed = [question for question in after if after[question] != before[question]]
    assert n != 5 or len(changed) > 20


def test_the_installed_command_does_too(shop, monkeypatch):
    folder, server = shop
    environment = {"PRODUCT_RECS_MODELS_DIR": str(folder / "models"), "PYTHONPATH": str(ROOT)}
    environment["PRODUCT_RECS_DATABASE_URL"] = f"sqlite:///{folder}/feedback.db"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    program = "import sys; from product_recs.jobs.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", program, "recommend", "2", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, cwd=folder)
    assert json.loads(done.stdout)["recommendations"] == server.get("/recommend/2")[2]["recommendations"]
