"""The batch: every list that the service gives, whatever kills it, wherever it goes."""

import gzip
import json
import multiprocessing
import os
import random
import sqlite3
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from batch_child import make
from sqlalchemy import create_engine, text
from support import (
    N,
    call,
    described_models,
    every_model,
    fresh_project,
    publish_board,
    random_log,
    ready_in_memory,
    until,
)

from product_recs.answer.merchandise import read_rules
from product_recs.answer.placing import fit_rules
from product_recs.answer.recommender import Recommender, open_recommender
from product_recs.answer.rules import Filters
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.credentials import CredentialError
from product_recs.core.errors import ProductRecsError
from product_recs.core.events import UNCHANGED, Event, UserState
from product_recs.core.files import locked
from product_recs.core.ids import IdTable
from product_recs.feedback.changes import Availability, Changes
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
from product_recs.inference import recommend_many
from product_recs.jobs.batch import BatchError, Question, audience_table, list_table, open_for_batch, write_batch

USERS, ITEMS, TWO = 60, 80, Question(n=2)
MODELS = every_model() | described_models()


def rows_of(folder):
    return duckdb.connect().execute(f"SELECT * FROM read_parquet('{folder}/part-*.parquet')").fetchall()


@pytest.fixture
def board(tmp_path):
    "A checkerboard, and its folder."
    publish_board(tmp_path / "models")
    with open_recommender(tmp_path / "models") as recommender:
        yield tmp_path, recommender


# --- the same lists


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n", [3, ITEMS + 5])
def test_a_batch_of_any_model_has_the_lists_of_the_ladder(name, n):
    "Also where less is left than was asked, and where a filter leaves little."
    log, model = random_log(USERS, ITEMS, seed=5), MODELS[name]
    task = NEXT_PURCHASE if name.endswith(NEXT_PURCHASE) else DISCOVERY
    columns = {"popularity": log.popularity.astype(np.int32), "category": log.item_columns["category"]}
    people = {"popularity": np.diff(log.counts.indptr)}
    ready = ready_in_memory(
        {task: model.fit(log)}, log, IdTable(range(USERS)), IdTable(range(ITEMS)), people, columns
    )
    rules = {"rules": [{"name": "out", "exclude": True, "items": [4, 5]}]}
    recommender = Recommender(ready, rules=fit_rules(read_rules(rules), ready))
    users = [*range(USERS), 1000, "nobody"]
    for filters in (Filters(), Filters(allow=range(0, ITEMS, 9)), Filters(where={"category": ["tea"]}, deny=[3])):
        question = Question(n=n, task=task, filters=filters)
        table, tally, _ = list_table(recommender, users, question)
        listed = {user: [] for user in users}
        for user, item, score, source in zip(*(table[key] for key in ("user_id", "item_id", "score", "source"))):
            listed[user].append((item, score, source))
        single = [recommender.recommend(user, n, task, filters=filters) for user in users]
        assert recommend_many(recommender, users, n, task, filters=filters) == single or n == 3
        for user, answer in zip(users, single):
            items, scores = [item for item, _, _ in listed[user]], [score for _, score, _ in listed[user]]
            assert items == answer.items and np.allclose(scores, answer.scores, atol=1e-4), (user, filters)
            assert {source for _, _, source in listed[user]} <= {answer.source}
        assert sum(short for _, short, _ in tally.values()) == sum(answer.shortfall is not None for answer in single)


@pytest.mark.parametrize("owners", [False, True])
def test_an_audience_has_whoever_would_see_the_item_first(owners):
    "By the place of the item in everybody's whole list, with news, denials, wishes, rules and a filter."
    log = random_log(USERS, ITEMS, seed=8)
    model = MODELS["ALS"].fit(log)
    columns = {"popularity": log.popularity.astype(np.int32)}
    people = {"popularity": np.diff(log.counts.indptr), "town": log.user_columns["town"]}
    ready = ready_in_memory(
        {DISCOVERY: model}, log, IdTable(range(USERS)), IdTable(range(ITEMS)), people, columns
    )
    rules = {"rules": [{"name": "not in Rome", "exclude": True, "items": [2], "users": {"town": ["Rome"]}}]}

    class Told:
        "Feedback in memory."

        shelf = Availability(frozenset({"9"}), frozenset(), 1)
        states = {
            5: UserState((Event(3), Event(4)), frozenset(), False, 1),
            6: UserState((), frozenset({"2"}), False, 1),
            7: UserState((), frozenset(), True, 1),
            1000: UserState((Event(1), Event(6)), frozenset(), False, 1),
        }
        stale = False

        def look(self, user):
            return self.states.get(user, UNCHANGED)

        state = look

        def availability(self):
            return self.shelf

    recommender = Recommender(ready, Told(), fit_rules(read_rules(rules), ready))
    users, filters = [*range(USERS), 1000, "nobody"], Filters(deny=[12])
    question = Question("audience", items=[2, 3], n=20, filters=filters, owners=owners)
    table, _ = audience_table(recommender, users, question)
    for item in (2, 3):
        expected = {}
        for user in users:
            seen = Filters(deny=[12], exclude_seen=None)
            answer = recommender.recommend(user, ITEMS, filters=seen)
            history = {*recommender.person(recommender.request(user)).seen.tolist()}
            if owners and item in history:  # the place that it would have: nothing else that they had is counted
                free = Filters(deny=[12, *(history - {item})], exclude_seen=False)
                answer = recommender.recommend(user, ITEMS, filters=free)
            if item in answer.items and answer.source in ("personalised", "session"):
                expected[user] = answer.items.index(item) + 1
        rows = zip(table["item_id"], table["user_id"], table["rank"])
        mine = [(user, rank) for product, user, rank in rows if product == item]
        assert len(mine) == min(20, len(expected)) and all(expected[user] == rank for user, rank in mine)
        assert [rank for _, rank in mine] == sorted(expected.values())[: len(mine)]
        assert 7 not in dict(mine) and (item != 2 or 6 not in expected)
        assert (5 in expected) == (owners or item != 3) or item == 2


# --- killed

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["batch_child"])


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A model, a store with news, and a file of users: some known, some new, one forgotten."
    folder = tmp_path_factory.mktemp("killed")
    publish_board(folder / "models")
    url = f"sqlite:///{folder}/feedback.db"
    with Store(url).open() as store:
        store.add_events([NewEvent(1, 101, "deny"), NewEvent(2, 103), NewEvent(77, 104), NewEvent("guest", 106)])
        store.set_availability({105: False})
        store.forget(5)
    (folder / "users.txt").write_text("\n".join(map(str, [*range(1, N + 1), 77, "guest", *range(1000, 1900)])))
    return folder, url


def started(shop, kind, out):
    folder, url = shop
    words = kind, str(folder / "models"), url, str(folder / "users.txt"), str(out), os.environ["PRODUCT_RECS_ROOT"]
    child = FORKED.Process(target=make, args=words)
    child.start()
    return child


def ended_well(child):
    child.join()
    return child.exitcode == 0


def outcome(kind, goal, out):
    "All that was written, without the moments."
    if goal == "folder":
        manifest = json.loads((out / "manifest.json").read_text())
        files = {path.name: path.read_bytes() for path in out.glob("part-*.parquet")} or rows_of_file(out)
    elif goal == "csv":
        manifest = json.loads(out.with_name(out.name + ".manifest.json").read_text())
        files = gzip.open(out).read()
    else:
        with sqlite3.connect(goal) as connection:
            files = connection.execute("SELECT * FROM recommendations").fetchall()
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        assert tables == [("recommendations",)]
        manifest = {}
    facts = ("rungs", "short", "empty", "forgotten", "rows", "asked", "audiences", "columns", "feedback")
    return files, {name: manifest.get(name) for name in facts}


def rows_of_file(folder):
    return duckdb.connect().execute(f"SELECT * FROM read_parquet('{folder}/*.parquet')").fetchall()


KILLED = [("lists", "folder"), ("lists", "csv"), ("lists", "table"), ("audience", "folder"), ("similar", "folder")]


@pytest.mark.slow
@pytest.mark.parametrize("kind, goal", KILLED)
def test_killed_at_random_moments_it_ends_as_if_nobody_had(shop, tmp_path, kind, goal, monkeypatch):
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(tmp_path))  # where the work of a table lies
    names = {"folder": ("calm", "killed"), "csv": ("calm.csv.gz", "killed.csv.gz"), "table": ("calm.db", "killed.db")}
    calm, killed = (tmp_path / name for name in names[goal])
    shown = (lambda path: f"sqlite:///{path}") if goal == "table" else str
    for _ in range(2):  # the first one starts what the others are forked from
        begin = time.monotonic()
        assert ended_well(started(shop, kind, shown(calm)))
        seconds = time.monotonic() - begin
    wanted = outcome(kind, calm if goal == "table" else goal, calm)
    draw, kills, progress = random.Random(kind + goal), 0, set()
    while kills < (20 if (kind, goal) == KILLED[0] else 5):
        child = started(shop, kind, shown(killed))
        time.sleep(draw.uniform(0, seconds))
        child.kill()
        ended = ended_well(child)
        kills += not ended
        for state in tmp_path.rglob("state.json"):
            progress.add(len(json.loads(state.read_text())["parts"]))
        if ended:
            assert outcome(kind, killed if goal == "table" else goal, killed) == wanted
    assert ended_well(started(shop, kind, shown(killed)))
    assert outcome(kind, killed if goal == "table" else goal, killed) == wanted
    assert len(progress) > 2 or (kind, goal) != KILLED[0], "it was never killed in the middle"
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".work", ".half", ".old"))]


def test_what_goes_on_and_what_begins_anew(board, monkeypatch):
    folder, recommender = board
    out, users = folder / "lists", folder / "users.csv"
    users.write_text("user_id\n" + "\n".join(map(str, range(1, 13))))
    state = folder / ".lists.work" / "state.json"

    def broken(question=TWO, parts=2, **more):
        "Work that broke off after some parts."
        import product_recs.jobs.batch as module

        original, made = module._write_part, []

        def fails(*given):
            if len(made) == parts:
                raise KeyboardInterrupt
            made.append(1)
            return original(*given)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_write_part", fails)
            with pytest.raises(KeyboardInterrupt):
                write_batch(recommender, question, out, str(users), part=3, progress=False, **more)
        assert len(json.loads(state.read_text())["parts"]) == parts

    def again(question=TWO, part=3, **more):
        made = write_batch(recommender, question, out, str(users), part=part, progress=False, **more).manifest
        assert rows_of(out) == [
            (user, rank, item, score, "personalised")
            for user in range(1, made["asked"] + 1)
            for rank, (item, score) in enumerate(zip(*(lambda a: (a.items, a.scores))(
                recommender.recommend(user, question.n, filters=question.filters))), 1)
        ]  # fmt: skip
        return made["parts_taken_up"]

    broken()
    assert again() == 2 and not state.exists()
    for other in (Question(n=3), Question(n=2, filters=Filters(deny=[102]))):
        broken()
        assert again(other) == 0
    broken()
    assert again(part=4) == 0
    broken()
    assert again(fresh=True) == 0
    broken()
    users.write_text("user_id\n" + "\n".join(map(str, range(1, 11))))  # others are asked now
    assert again() == 0
    broken()
    old = json.loads(state.read_text()) | {"moment": "2026-01-01T00:00:00+00:00"}
    state.write_text(json.dumps(old))
    assert again() == 0
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9] + b"123456789")):
        broken()
        damage(folder / ".lists.work" / "part-00001.parquet")
        assert again() == 1
    broken()
    state.write_text("{")
    assert again() == 0


def test_a_second_one_waits_and_then_says_so(board):
    folder, recommender = board
    with locked(folder / ".lists.lock"), pytest.raises(BatchError, match="another batch"):
        write_batch(recommender, Question(n=2), folder / "lists", progress=False)
    assert write_batch(recommender, Question(n=2), folder / "lists", progress=False).manifest["rows"] == 2 * N


def test_without_the_store_it_stops_and_goes_on_later(board, opened):
    folder, _ = board
    path = folder / "feedback.db"
    store = opened(Store(f"sqlite:///{path}").open())
    store.add_events([NewEvent(1, 101, "deny")])
    with open_for_batch(folder / "models", feedback=f"sqlite:///{path}") as live:
        with sqlite3.connect(path) as connection:
            connection.execute("ALTER TABLE denied RENAME TO away")
            connection.execute("ALTER TABLE clock RENAME TO away2")
        store.counter.bump()
        until(lambda: live.changes.stale)
        with pytest.raises(BatchError, match="denied"):
            write_batch(live, Question(n=2), folder / "lists", progress=False)
        assert not (folder / "lists").exists()
        with sqlite3.connect(path) as connection:
            connection.execute("ALTER TABLE away RENAME TO denied")
            connection.execute("ALTER TABLE away2 RENAME TO clock")
        until(lambda: not live.changes.stale)
        write_batch(live, Question(n=2), folder / "lists", progress=False)
    assert 101 not in [item for user, _, item, *_ in rows_of(folder / "lists") if user == 1]


# --- where lists go


def test_a_reader_of_the_table_finds_the_old_lists_or_the_new_ones(board, url, monkeypatch):
    folder, recommender = board
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(folder))
    goal = url.replace("feedback.db", "lists.db")
    write_batch(recommender, Question(n=3), goal, table="mail", progress=False)
    engine = create_engine(goal.replace("postgresql://", "postgresql+psycopg://"))
    readings, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            with engine.connect() as connection:
                readings.append(connection.execute(text("SELECT count(*), max(rank) FROM mail")).one())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for n in (5, 2, 4, 3):
            write_batch(recommender, Question(n=n), goal, table="mail", progress=False)
    finally:
        ended.set()
        reader.join()
    assert {tuple(reading) for reading in readings} <= {(n * N, n) for n in (5, 2, 4, 3)} and len(readings) > 4
    with engine.begin() as connection:
        lists = connection.execute(text("SELECT * FROM mail ORDER BY user_id, rank")).all()
        assert [row[:3] for row in lists[:3]] == [(1, rank, item) for rank, item in
                                                 enumerate(recommender.recommend(1, 3).items, 1)]  # fmt: skip
        connection.execute(text("CREATE TABLE sales (user_id INTEGER, rank INTEGER, price INTEGER)"))
        connection.execute(text("INSERT INTO sales VALUES (1, 2, 3)"))
    with pytest.raises(BatchError, match="no batch made it"):
        write_batch(recommender, Question(n=2), goal, table="sales", progress=False)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT * FROM sales")).all() == [(1, 2, 3)]
    if goal.startswith("postgresql"):
        with engine.begin() as connection:
            connection.execute(text("CREATE VIEW shown AS SELECT * FROM mail"))
            connection.execute(text("CREATE SCHEMA shop"))
        with pytest.raises(BatchError, match="refused"):  # the view would lose its table
            write_batch(recommender, Question(n=2), goal, table="mail", progress=False)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM shown")).scalar() == 3 * N
        write_batch(recommender, Question(n=2), goal, table="shop.mail", progress=False)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM shop.mail")).scalar() == 2 * N
    engine.dispose()


def test_users_of_a_query_and_no_password_anywhere(board, monkeypatch):
    folder, recommender = board
    with sqlite3.connect(folder / "crm.db") as connection:
        connection.execute("CREATE TABLE people (id TEXT, mail INTEGER)")
        connection.executemany("INSERT INTO people VALUES (?, ?)", [("7", 1), ("3", 1), ("4", 0), ("new", 1)])
    crm = f"sqlite:///{folder}/crm.db"
    out = folder / "lists"
    write_batch(recommender, Question(n=2), out, crm, "SELECT id FROM people WHERE mail = 1", progress=False)
    assert [user for user, rank, *_ in rows_of(out) if rank == 1] == ["7", "3", "new"]
    with pytest.raises(ProductRecsError, match="query"):
        write_batch(recommender, Question(n=2), out, crm, progress=False)
    with pytest.raises(ProductRecsError, match="expected one column"):
        write_batch(recommender, Question(n=2), out, crm, "SELECT id, mail FROM people", progress=False)
    secret = "postgresql://me:hush-hush@127.0.0.1:1/shop"
    monkeypatch.setenv("SHOP_DB", secret)
    for given in (secret, "env:SHOP_DB"):
        for users, goal in ((given, out), ("all", given)):
            with pytest.raises(ProductRecsError) as raised:
                write_batch(recommender, Question(n=2), goal, users, "SELECT 1 AS user_id", progress=False)
            assert "hush" not in str(raised.value) and "127.0.0.1" in str(raised.value)
    left = [path for path in folder.rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    assert left == []
    with pytest.raises(CredentialError):
        write_batch(recommender, Question(n=2), "env:NOT_THERE", progress=False)


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("semicolons.csv", "name;user_id\nAnn;3\nBob;4\n", [3, 4]),
        ("none.csv", "3\n4\n", [3, 4]),
        ("header.csv", "customer\n3\n4\n", [3, 4]),
        ("bom.csv", "\ufeffuser_id\n3\n", [3]),
        ("quoted.csv", '"user_id","x"\n"3","a,b"\n', [3]),
        ("windows.txt", "3\r\n4\r\n\r\n", [3, 4]),
    ],
)
def test_files_of_users(board, name, content, wanted):
    folder, recommender = board
    (folder / name).write_bytes(content.encode())
    with gzip.open(folder / f"{name}.gz", "wb") as file:
        file.write(content.encode())
    for path in (folder / name, folder / f"{name}.gz"):
        write_batch(recommender, Question(n=1), folder / "lists", str(path), progress=False)
        assert [row[0] for row in rows_of(folder / "lists")] == wanted, path


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("two.csv", b"a,b\n1,2\n", "expected one column"),
        ("empty.csv", b"", "nobody"),
        ("header.csv", b"user_id\n", "nobody"),
        ("blank.txt", b"nan\nnull\n", "nobody"),
        ("latin.txt", "Jos\u00e9".encode("latin-1"), "UTF-8"),
        ("no.parquet", b"PAR1", "Parquet"),
    ],
)
def test_a_file_that_says_nothing_is_refused_and_nothing_is_lost(board, name, content, said):
    folder, recommender = board
    write_batch(recommender, Question(n=1), folder / "lists", progress=False)
    before = rows_of(folder / "lists")
    (folder / name).write_bytes(content)
    with pytest.raises(BatchError, match=said):
        write_batch(recommender, Question(n=1), folder / "lists", str(folder / name), progress=False)
    assert rows_of(folder / "lists") == before


# --- the command


def test_the_command(tmp_path):
    root = fresh_project(tmp_path / "shop")
    publish_board(root / "models")
    (root / "campaign.csv").write_text("user_id\n1\n2\nnobody\n")
    done = call(root, "product-recs", "batch", "--users", "campaign.csv", "--out", "out/mail.csv", "-n", "3", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "9 rows for 3 users" in done.stdout and "1 popular" in done.stdout
    lines = (root / "out/mail.csv").read_text().splitlines()
    assert lines[0] == "user_id,rank,item_id,score,source" and lines[1].startswith("1,1,101,") and len(lines) == 10
    assert (root / "reports/batch/batch.html").exists()
    assert json.loads((root / "reports/batch/metrics.json").read_text())["batch"]["manifest"]["rows"] == 9
    done = call(root, "product-recs", "batch", "--audience", "101", "-n", "2", "--quiet")
    assert done.returncode == 0 and "2 for item 101" in done.stdout, done.stderr
    assert [row[:4] for row in rows_of_file(root / "data/batch/audience")][0] == (101, 1, 1, 1)
    words = ["-p", "filters", "{where: {price: {max: 2}}}", "--out", "models", "--quiet"]
    done = call(root, "product-recs", "batch", *words)
    assert done.returncode == 1 and "no batch made it" in done.stderr and "Traceback" not in done.stderr
    assert Path(root / "models/current").exists()


def test_people_of_the_store(tmp_path, opened):
    "Whoever came with the feedback is asked for once, however the store spells them."
    store = opened(Store(f"sqlite:///{tmp_path}/feedback.db").open())
    store.add_events([NewEvent("Ann", 1), NewEvent("ann", 2), NewEvent("Bob", 1, "deny"), NewEvent(7, 1)])
    store.forget(7)
    changes = opened(Changes(store, folds=["case"]).start())
    assert sorted(user.lower() for user in changes.people()) == ["ann", "bob"]
    assert sorted(opened(Changes(store).start()).people()) == ["Ann", "Bob", "ann"]
