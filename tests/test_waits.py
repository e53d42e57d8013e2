"""Nothing on the event loop waits or reads, the memory for events has an end, and what is replaced while others look is
replaced whole."""

import asyncio
import random
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import duckdb
import httpx
import numpy as np
import pytest
from sqlalchemy import text
from support import new_database, publish_board, until

from product_recs.api import create_app
from product_recs.bundle import cold
from product_recs.bundle.live import Reload
from product_recs.core.events import UNCHANGED
from product_recs.core.settings import Settings
from product_recs.data.arrays import save_table
from product_recs.feedback.changes import Changes
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
from product_recs.web.cache import Kept
from product_recs.web.security import Guard, add_key, remove_key
from product_recs.web.service import Service

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # platformdirs, where there is no XDG_RUNTIME_DIR


@pytest.fixture
def models(tmp_path):
    publish_board(tmp_path / "models")
    return tmp_path / "models"


def settings_of(models, url, **more):
    return Settings(models_dir=models, database_url=url, auth="off", log_level="ERROR", impressions=0, **more)


class Beats:
    "A task on the loop that counts its turns and keeps the longest pause between two of them."

    def __init__(self):
        self.count, self.longest, self.task = 0, 0.0, None

    async def run(self):
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.count, self.longest, last = self.count + 1, max(self.longest, now - last), now

    async def __aenter__(self):
        self.task = asyncio.create_task(self.run())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()

    async def more(self, turns):
        "Wait until the task had so many further turns; a loop that is held up gives it none."
        goal = self.count + turns
        while self.count < goal:
            await asyncio.sleep(0)


@contextmanager
def locked_clock(store):
    "The database is there and does not answer: another session has locked the table that each reading begins with."
    with store.transaction("hold", write=True) as connection:
        connection.execute(text("LOCK TABLE clock IN ACCESS EXCLUSIVE MODE"))
        yield


# --- the loop --------------------------------------------------------------------------------------------------------

ROUTES = [
    ("GET", "/recommend/1", None),
    ("GET", "/recommend/99", None),
    ("POST", "/recommend", {"users": [1, 2]}),
    ("POST", "/recommend", {}),
    ("GET", "/similar/101", None),
    ("GET", "/popular", None),
    ("GET", "/new?user_id=1", None),
    ("GET", "/explain/1/101", None),
    ("GET", "/users/1/history", None),
    ("GET", "/items/101", None),
]


def test_a_request_that_waits_for_a_slow_database_holds_up_nobody(models, postgres, opened, record_property):
    "Each route waits for an event that was accepted a moment ago; meanwhile the loop goes on; then the event counts."
    address = new_database(postgres)
    other = opened(Store(address).open())
    app = create_app(settings_of(models, address))
    service = app.state.service
    service.desk.changes.wait, service.desk.changes._follower.poll = 5, 60

    async def ask(client, done, method, path, body):
        answer = await client.request(method, path, json=body)
        done.append((path, answer.status_code, answer.headers.get("x-feedback-stale")))

    async def run():
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
            Beats() as beats,
        ):
            assert (await client.get("/recommend/1?n=1")).json()["recommendations"] == [101]  # and now it is kept
            done, locked, free = [], threading.Event(), threading.Event()

            def hold():
                other.add_events([NewEvent(1, 101)])
                with locked_clock(other):
                    other.counter.bump()  # as of a further commit
                    locked.set()
                    free.wait(60)

            holder = threading.Thread(target=hold)
            holder.start()
            await asyncio.to_thread(locked.wait, 60)
            asks = [
                asyncio.create_task(ask(client, done, *route)) for route in [("GET", "/recommend/1?n=1", None), *ROUTES]
            ]
            try:
                await beats.more(50)
                assert done == [] and service.desk.changes.behind
                assert (
                    (await client.get("/health/live")).status_code
                    == (await client.get("/health/ready")).status_code
                    == 200
                )
                beats.longest = 0.0
                await beats.more(50)
                assert done == []
                record_property("longest pause of the loop in ms", round(1000 * beats.longest, 1))
            finally:
                free.set()
            await asyncio.gather(*asks)
            await asyncio.to_thread(holder.join)
            assert len(done) == len(ROUTES) + 1 and {(status, stale) for _, status, stale in done} == {(200, None)}
            assert (await client.get("/recommend/1?n=1")).json()["recommendations"] != [101]

    service.start()
    try:
        asyncio.run(run())
    finally:
        service.stop()


class OnTheLoop:
    """What the thread of the loop did that could make it wait: databases, files, waiting for other threads. Everything
    is done as ever."""

    waits = None  # only while a request of the test is answered

    def __init__(self, monkeypatch):
        self.thread = threading.get_ident()
        for owner, name in (
            (Store, "transaction"),
            (cold._File, "ask"),
            (duckdb, "connect"),
            (threading.Condition, "wait"),
        ):
            monkeypatch.setattr(owner, name, self.spied(name, getattr(owner, name)))
        OnTheLoop.current = self
        if not OnTheLoop.hooked:
            sys.addaudithook(lambda event, _: event == "open" and OnTheLoop.current.note("open"))
            OnTheLoop.hooked = True

    current, hooked = None, False

    def spied(self, name, function):
        def call(*given, **more):
            if name != "wait" or given[1:] != (0,):  # an executor looks so for an idle thread
                self.note(name)
            return function(*given, **more)

        return call

    def note(self, what):
        if self.waits is None or threading.get_ident() != self.thread:
            return
        frame, stack = sys._getframe(1), []
        while frame is not None:
            stack.append((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        if not any(name == "start" and file.endswith("threading.py") for file, name in stack):  # a thread that begins
            self.waits.append(
                (what, [f"{Path(file).name}: {name}" for file, name in stack if "product_recs" in file][:3])
            )


@pytest.mark.parametrize("limit", [1, 100_000])
def test_no_route_reads_or_waits_on_the_loop(tmp_path, monkeypatch, opened, limit):
    "Users with events in memory and not, guests, items that only a file knows, keys, the page: all of it."
    models = tmp_path / "models"
    save_table(
        tmp_path / "items.parquet", {"item_id": np.array([900, 901]), "title": np.array(["New", "Newer"], object)}
    )
    save_table(tmp_path / "users.parquet", {"user_id": np.array([70, 71]), "town": np.array(["Rome", "Bern"], object)})
    publish_board(models, cold_items=tmp_path / "items.parquet", cold_users=tmp_path / "users.parquet")
    other = opened(Store(f"sqlite:///{tmp_path}/feedback.db").open())
    other.add_events([NewEvent(user, 101 + user) for user in (1, 2, 3, 50)])
    app = create_app(settings_of(models, f"sqlite:///{tmp_path}/feedback.db", events_in_memory=limit))
    service = app.state.service
    service.desk.changes.wait = 60

    def asks(turn):
        "What was read once is in memory: the second time it is another user and another item that only a file knows."
        new, stranger = 900 + turn, 70 + turn
        return [
            *ROUTES,
            ("GET", "/recommend/1", None),
            ("GET", "/recommend/50?detail=true", None),
            ("GET", f"/recommend/{stranger}", None),
            ("POST", "/recommend", {"events": [{"item_id": new}], "detail": True}),
            ("POST", "/recommend", {"users": [stranger]}),
            ("GET", f"/similar/{new}", None),
            ("GET", f"/items/{new}", None),
            ("GET", "/items?query=new", None),
            ("GET", "/users", None),
            ("GET", "/health/live", None),
            ("GET", "/health/ready", None),
            ("GET", "/model", None),
            ("GET", "/metrics", None),
            ("POST", "/model/reload", None),
            ("GET", "/", None),
            ("GET", "/docs", None),
            ("GET", "/openapi.json", None),
            ("GET", "/static/app.js", None),
            ("POST", "/events", {"user_id": 1, "item_id": 103}),
            ("GET", "/recommend/1", None),
            ("POST", "/availability", {"items": [{"item_id": 101, "available": False}]}),
            ("GET", "/popular", None),
            ("DELETE", "/users/2", None),
            ("GET", "/recommend/2", None),
        ]

    async def run():
        spy = OnTheLoop(monkeypatch)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            for turn in range(2):  # the first request of a kind may import a module
                for method, path, body in asks(turn)[::-1]:  # those that read before those that have read it
                    spy.waits = [] if turn else None
                    answer = await client.request(method, path, json=body)
                    waits, spy.waits = spy.waits, None
                    assert answer.status_code in (200, 404), (method, path, answer.text)
                    assert not waits, (method, path, waits)

    service.start()
    try:
        asyncio.run(run())
    finally:
        service.stop()


def test_the_file_of_keys_is_read_in_a_thread(tmp_path, monkeypatch):
    first, second = add_key(tmp_path / "keys.json", "first"), None
    sent = []

    async def behind(scope, receive, send):
        sent.append(scope["api_key_name"])

    async def refuse(message):
        sent.append(message.get("status"))

    guard = Guard(behind, Settings(auth="on", api_keys_file=tmp_path / "keys.json"))
    second = add_key(tmp_path / "keys.json", "second")
    remove_key(tmp_path / "keys.json", "first")

    async def run():
        spy = OnTheLoop(monkeypatch)
        for key in (first, second):
            guard.keys._next_look, spy.waits = 0, []  # as if a second had passed
            scope = {
                "type": "http",
                "method": "GET",
                "path": "/recommend/1",
                "raw_path": b"/recommend/1",
                "headers": [(b"x-api-key", key.encode())],
            }
            await guard(scope, None, refuse)
            assert spy.waits == []

    asyncio.run(run())
    assert sent == [401, None, "second"]


# --- the memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 7, 40, 100_000])
@pytest.mark.parametrize("seed", range(3))
def test_a_view_with_a_limit_knows_what_one_without_knows(url, opened, most, seed):
    """Events, denials, wishes, new models, rollbacks, a thread that was away: whatever is in memory, each user is told
    the same."""
    chance, store = random.Random(seed), opened(Store(url))
    store.open()
    changes = opened(Changes(store, wait=60, poll=3600, most=most).start())
    users, cuts, until_now = [str(user) for user in range(12)], [None], None
    for _ in range(25):
        what = chance.random()
        if what < 0.6:
            kinds = ["view", "cart", "purchase", "purchase", "deny", "undeny"]
            store.add_events(
                [
                    NewEvent(chance.choice(users), chance.randrange(5), chance.choice(kinds))
                    for _ in range(chance.randrange(1, 9))
                ]
            )
        elif what < 0.7:
            store.forget(chance.choice(users))
        elif what < 0.8:
            store.set_availability({chance.randrange(5): chance.random() < 0.5})
        else:
            cuts.append(store.cut(0).isoformat())
            time.sleep(0.0001)  # the next event has a later microsecond
            until_now = chance.choice(cuts)
            changes.use(until_now)
        for user in chance.sample(users, 3):
            changes.state(user)
        people = changes._follower.memory.view.people
        assert people.size == sum(max(1, len(person.received)) for person in people.by_key.values()) <= most
        if chance.random() < 0.3:
            truth = Changes(store, until_now, wait=60, most=10**6).start()
            truth.close()
            states = asyncio.run(all_states(changes, users))
            for user, state in zip(users, states):
                expected = truth.state(user)
                for answer in (state, changes.state(user)):
                    assert (answer.events, answer.denied, answer.forgotten) == (
                        expected.events[-most:],
                        expected.denied,
                        expected.forgotten,
                    ), user
            assert changes.availability()[:2] == truth.availability()[:2]
    assert changes.failures == 0


async def all_states(changes, users):
    await changes.catch_up()
    return await changes.states(users)


def test_who_did_nothing_costs_the_database_nothing(tmp_path, opened, monkeypatch):
    "And who did something costs one question, once."
    store = opened(Store(f"sqlite:///{tmp_path}/feedback.db"))
    store.add_events([NewEvent(f"busy {number % 50}", number) for number in range(500)])
    changes, asked = opened(Changes(store, wait=60, poll=3600, most=100).start()), []
    transaction = store.transaction
    monkeypatch.setattr(
        store, "transaction", lambda operation, **more: (asked.append(operation), transaction(operation, **more))[1]
    )
    for number in range(1000):
        assert changes.state(f"quiet {number}") is UNCHANGED
    assert asked == []
    for _ in range(3):
        assert len(changes.state("busy 3").events) == 10
    assert asked == ["events of users"]
    assert (
        changes._follower.memory.view.people.size <= 100
        and len(asyncio.run(all_states(changes, [f"busy {number}" for number in range(50)]))[0].events) == 10
    )
    assert asked == ["events of users"] * 2 and changes._follower.memory.view.people.size <= 100


def test_who_asked_last_stays_in_memory(tmp_path, opened):
    store = opened(Store(f"sqlite:///{tmp_path}/feedback.db"))
    changes = opened(Changes(store, wait=60, poll=3600, most=10).start())
    for user in "abcdefghi":
        store.add_events([NewEvent(user, 101)])
        changes.state(user)
    changes.state("a")
    store.add_events([NewEvent("j", 101), NewEvent("k", 101)])
    changes.state("k")
    people = {*changes._follower.memory.view.people.by_key}
    assert {"a", "i", "j", "k"} <= people and "b" not in people and changes.state("b").events


def test_rules_hold_while_the_database_is_away_and_events_come_back(tmp_path, opened):
    """A user whose events are not in memory: what is denied stays denied, who is forgotten stays so, and the answer
    says that it is stale."""
    store = opened(Store(f"sqlite:///{tmp_path}/feedback.db"))
    store.add_events(
        [NewEvent("a", item, "purchase") for item in range(5)] + [NewEvent("a", 9, "deny"), NewEvent("b", 1)]
    )
    store.forget("gone")
    changes = opened(Changes(store, wait=60, poll=3600, most=3).start())
    changes.state("b")
    assert "a" not in changes._follower.memory.view.people.by_key
    changes._follower.store = Store(f"sqlite:///{tmp_path}/feedback.db/none.db")
    for known in (changes.state("a"), asyncio.run(changes.states(["a"]))[0]):
        assert known.events == () and known.denied == {"9"} and changes.stale and "open" in changes.error
    assert changes.state("gone").forgotten and len(changes.state("b").events) == 1 and changes.failures == 1
    changes._follower.store, changes._follower.poll = store, 0.01
    changes._follower.ask()
    until(lambda: not changes.stale)
    assert [event.item_id for event in changes.state("a").events] == ["2", "3", "4"] and changes.state("a").denied == {
        "9"
    }


# --- the kept answers ------------------------------------------------------------------------------------------------


def test_a_swap_in_the_middle_of_keeping_an_answer_leaves_a_count_that_is_right(models):
    """The watcher's thread takes up a model between the two steps of `put`; afterwards the bytes are those of the
    answers."""
    service, swaps = Service(settings_of(models, "", cache_size=5)), []
    service.start()
    try:

        class Body(bytes):
            def __len__(self):
                if question in service.kept._kept and not swaps:  # it stands in the dict and is not yet counted
                    swaps.append(service.kept)
                    other = threading.Thread(target=service._swapped, args=[Reload("reloaded", service.live.version)])
                    other.start()
                    other.join()
                return bytes.__len__(self)

        question = (b"/recommend/1", b"")
        service.kept.put(
            question, Kept(service.live.get(), 1, UNCHANGED, None, [], Body(b"x" * 1000), ("popular", [], False))
        )
        assert len(swaps) == 1
        for cache in (service.kept, *swaps):
            assert cache.bytes == sum(bytes.__len__(answer.body) for answer in cache._kept.values())
            cache.most_bytes = 1500
            for number in range(
                9
            ):  # with a count that is too high this empties the dict, and then there is nothing left to drop
                cache.put(
                    (b"/recommend/%d" % number, b""),
                    Kept(service.live.get(), 1, UNCHANGED, None, [], b"x" * 1000, ("popular", [], False)),
                )
            assert cache.bytes == 1000 and len(cache._kept) == 1
    finally:
        service.stop()
