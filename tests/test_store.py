"""The feedback store on a real SQLite file and a real PostgreSQL: concurrent writers, dying processes, stopped
databases, migrations, and the loop back into training."""

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from importlib.resources import files
from pathlib import Path

import duckdb
import pytest
from sqlalchemy import create_engine, inspect, select, text, update
from support import start_postgres, until

from product_recs.bundle.opening import open_bundle
from product_recs.core.errors import StoreError
from product_recs.features import build_features
from product_recs.feedback.changes import Changes
from product_recs.feedback.connection import VERSION_TABLE, Counter, migrate
from product_recs.feedback.impressions import ImpressionLog
from product_recs.feedback.records import DENIED, EVENTS, FORGOTTEN, NewEvent, from_micros
from product_recs.feedback.store import Store, tick
from product_recs.ingest import ingest
from product_recs.train import train_bundle

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # platformdirs, where there is no XDG_RUNTIME_DIR


def python(program, *arguments, **options):
    "Another process with the package."
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def age(store, seconds):
    "Make all events older, as if time had passed."
    with store.transaction("test", write=True) as connection:
        connection.execute(update(EVENTS).values(received_at=EVENTS.c.received_at - round(seconds * 1e6)))


POST = """
import random, sys
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
url, seed = sys.argv[1], int(sys.argv[2])
events = [NewEvent(n % 7, n, key=f"k{n}") for n in range(300)]
random.Random(seed).shuffle(events)
with Store(url) as store:
    statuses = [status for start in range(0, 300, 10) for status in store.add_events(events[start:start + 10])]
print(statuses.count("accepted"), statuses.count("duplicate"))
"""


def test_each_key_counts_once_however_many_processes_post_it(url, opened):
    "Two processes start on an empty store at once, so they also race for creating the tables."
    processes = [python(POST, url, seed) for seed in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    counts = [tuple(map(int, out.split())) for out, _ in answers]
    assert sum(accepted for accepted, _ in counts) == 300 and all(sum(pair) == 300 for pair in counts)
    events = list(opened(Store(url)).read_events())
    assert sorted(int(event.item_id) for event in events) == list(range(300))
    moments = [event.received_at for event in events]
    assert moments == sorted(moments), "the order of seq is not the order of acceptance"


ENDLESS = """
import itertools, sys
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
store = Store(sys.argv[1])
for n in itertools.count():
    store.add_events([NewEvent(1, n, key=f"{n}-{part}") for part in "ab"])
    print(n, flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_accepted(url, opened):
    process = python(ENDLESS, url)
    accepted = [int(process.stdout.readline()) for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    accepted += [int(line) for line in process.stdout.read().splitlines() if line.strip()]
    process.communicate()
    store = opened(Store(url))
    items = [int(event.item_id) for event in store.read_events()]
    assert accepted == list(range(len(accepted))) and set(accepted) <= set(items)
    assert all(items.count(n) == 2 for n in set(items)), "half of a list was kept"
    assert store.add_events([NewEvent(1, 0, key="0-a"), NewEvent(1, -1)]) == [
        "duplicate",
        "accepted",
    ]  # and no lock is left


WORKER = """
import sys
from product_recs.feedback.changes import Changes
from product_recs.feedback.store import Store
changes = Changes(Store(sys.argv[1]), wait=30, poll=3600).start()
print("ready", flush=True)
for line in sys.stdin:
    state = changes.state(int(line))
    print(len(state.events), sorted(state.denied), state.forgotten, flush=True)
"""


def test_feedback_counts_at_the_next_request_in_every_process(url, opened):
    "The workers poll once an hour here, so only the counter can tell them."
    store = opened(Store(url).open())
    workers = [python(WORKER, url) for _ in range(2)]
    try:
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2

        def ask(user):
            for worker in workers:
                worker.stdin.write(f"{user}\n")
                worker.stdin.flush()
            return {worker.stdout.readline().strip() for worker in workers}

        for n in range(1, 26):
            store.add_events([NewEvent(1, n)])
            assert ask(1) == {f"{n} [] False"}
        store.add_events([NewEvent(1, 5, "deny")])
        assert ask(1) == {"25 ['5'] False"} and ask(2) == {"0 [] False"}
        store.forget(1)
        assert ask(1) == {"0 [] True"}
    finally:
        for worker in workers:
            worker.communicate(timeout=20)


def test_ids_are_found_by_their_key_whoever_writes_them(url, opened):
    store = opened(Store(url))
    ids = [1, -1, 2**63 - 1, -(2**63), 10**30, "01", "i1", "s1", "1e3", "1.50", "ä ☕ 日本", "a'b;--", "%", "x" * 256]
    keys = [str(id) for id in ids]
    store.add_events([NewEvent(f"{id}.0" if isinstance(id, int) else id, id) for id in ids])
    assert [(event.user_id, event.item_id) for event in store.read_events()] == [(key, key) for key in keys]
    changes = opened(Changes(store, wait=30).start())
    for id, key in zip(ids, keys):
        for written in [id, key, f"{key}.0"] if isinstance(id, int) else [id]:
            assert (
                len(store.history(written)) == 1 == len(changes.state(written).events)
                and changes.state(written).events[0].item_id == key
            )
    assert store.set_availability(dict.fromkeys(ids, False)) == len(ids) and store.availability() == dict.fromkeys(
        keys, False
    )
    assert store.set_availability({"1.0": False, "-1": True}) == 1
    assert changes.availability()[:2] == ({*keys} - {"-1"}, {"-1"})
    deleted = store.forget("1.0")
    assert (
        deleted == 1
        and changes.state(1).forgotten
        and list(store.forgotten()) == ["1"]
        and not changes.state("01").forgotten
    )


def test_moments_and_quantities_come_back_to_the_microsecond(url, opened):
    store = opened(Store(url))
    moments = [
        datetime(1970, 1, 1, tzinfo=timezone.utc),
        datetime(2026, 3, 29, 1, 59, 59, 999999, tzinfo=timezone.utc),
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-11, minutes=-30))),
    ]
    store.add_events([NewEvent(1, n, "cart", 0.1 * n + 1e-9, moment) for n, moment in enumerate(moments, 1)])
    assert [(event.timestamp, event.quantity) for event in store.read_events()] == [
        (moment, 0.1 * n + 1e-9) for n, moment in enumerate(moments, 1)
    ]


def test_a_cut_waits_for_whoever_is_writing(url, opened):
    """Otherwise an event could be accepted with a moment before the cut after training has read: it would be in no
    model and new to none."""
    store, cuts, begun = opened(Store(url).open()), [], threading.Event()

    def cut():
        begun.set()
        cuts.append(store.cut(0))

    thread = threading.Thread(target=cut)
    with store.transaction("test", write=True) as connection:
        _, micros = tick(connection, 1)
        thread.start()
        begun.wait()
        thread.join(0.3)
        assert thread.is_alive() and not cuts
    thread.join()
    assert cuts[0] >= from_micros(micros)
    assert store.add_events([NewEvent(1, 1)]) == ["accepted"] and store.history(1)[0].received_at >= cuts[0]


def test_a_list_is_kept_whole_or_not_at_all(url, opened):
    store = opened(Store(url))
    store.add_events([NewEvent(1, 1, key="a")])
    before, bad = store.counter.value, NewEvent(1, 2, key="b")
    object.__setattr__(bad, "event", None)  # what no check let through: the database refuses it
    with pytest.raises(StoreError, match="add_events"):
        store.add_events([NewEvent(1, 3, key="c"), bad])
    assert [event.item_id for event in store.read_events()] == ["1"] and store.counter.value == before


def test_random_feedback_is_followed_without_a_gap(url, opened):
    "A view that followed every change, one that reads only now, and a plain account in Python agree."
    store, draw = opened(Store(url)), random.Random(5)
    follower = opened(Changes(store, wait=30).start())
    account, denied, forgotten = {}, {}, set()
    for step in range(120):
        user, item = draw.randrange(4), draw.randrange(6)
        kind = draw.choice(
            ["purchase", "cart", "deny", "undeny", "forget"]
            if step % 10 == 0
            else ["purchase", "cart", "deny", "undeny"]
        )
        if kind == "forget":
            store.forget(user)
            forgotten.add(user)
            account.pop(user, None), denied.pop(user, None)
        else:
            store.add_events([NewEvent(user, item, kind)])
            if kind in ("purchase", "cart"):
                account.setdefault(user, []).append((str(item), kind))
            else:
                (set.add if kind == "deny" else set.discard)(denied.setdefault(user, set()), str(item))
        if step % 7 == 0:
            assert [(event.item_id, event.event) for event in follower.state(user).events] == account.get(user, [])
    for changes in (follower, opened(Changes(store, wait=30).start())):
        for user in range(4):
            state = changes.state(user)
            assert [(event.item_id, event.event) for event in state.events] == account.get(user, [])
            assert state.denied == denied.get(user, set()) and state.forgotten is (user in forgotten)


def test_another_machine_is_followed_by_asking(url, tmp_path, opened):
    "A machine of its own has a counter of its own."
    store, other = opened(Store(url).open()), opened(Store(url))
    other._counter = Counter(tmp_path / "counter")
    changes = opened(Changes(store, wait=30, poll=0.05).start())
    other.add_events([NewEvent(1, 101)])
    until(lambda: changes.state(1).events)
    assert store.counter.value == 0


def test_a_stopped_database_is_survived(postgres, postgres_url, opened):
    store = opened(Store(postgres_url))
    store.add_events([NewEvent(1, 101)])
    changes, log = opened(Changes(store, wait=30, poll=0.1).start()), opened(ImpressionLog(store, every=0.05).start())
    postgres.stop()
    try:
        with pytest.raises(StoreError) as error:
            store.add_events([NewEvent(1, 102, key="again")])
        assert "add_events" in str(error.value)
        until(lambda: changes.stale)
        assert (
            [event.item_id for event in changes.state(1).events] == ["101"] and changes.failures == 1 and changes.error
        )
        log.add("r1", 1, "v1", "popular", [101])
        asleep = opened(Changes(Store(postgres_url), poll=0.1).start())  # a worker that starts meanwhile
        assert asleep.stale and asleep.state(1).events == ()
        time.sleep(0.3)
    finally:
        start_postgres(postgres)
    assert store.add_events([NewEvent(1, 102, key="again")]) == ["accepted"]
    for view in (changes, asleep):
        until(lambda view=view: not view.stale)
        until(lambda view=view: len(view.state(1).events) == 2)
    assert changes.error is None and changes.failures == 1
    until(lambda: log.written == 1)
    assert log.dropped == 0 and store.impressions()[0].request_id == "r1"


def test_a_silent_database_delays_one_request_only(postgres_url, opened):
    "Another session holds the table: the database is there and does not answer."
    store, other = opened(Store(postgres_url)), opened(Store(postgres_url))
    store.add_events([NewEvent(1, 101)])
    changes = opened(Changes(store, poll=0.05).start())
    waits, ask = [], changes._follower.ask
    changes._follower.ask = lambda: (waits.append(changes.wait), ask())[1]
    with other.transaction("hold", write=True) as connection:
        connection.execute(text("LOCK TABLE clock IN ACCESS EXCLUSIVE MODE"))
        store.counter.bump()  # as after a commit
        for _ in range(50):
            assert [event.item_id for event in changes.state(1).events] == ["101"]
        assert waits == [0.2] and changes.stale and "in time" in changes.error
    until(lambda: not changes.stale)
    store.add_events([NewEvent(1, 102)])
    until(lambda: [event.item_id for event in changes.state(1).events] == ["101", "102"])


def test_a_broken_sqlite_file_is_an_error_and_mends(tmp_path, opened):
    path = tmp_path / "feedback.db"
    store = opened(Store(f"sqlite:///{path}"))
    store.add_events([NewEvent(1, 101)])
    store.close()
    content = path.read_bytes()
    path.write_bytes(b"not a database, whatever the name says" * 100)
    changes = opened(Changes(store, wait=30, poll=0.05).start())
    assert changes.stale and "not a database" in changes.error and changes.state(1).events == ()
    path.write_bytes(content)
    until(lambda: not changes.stale)
    assert [event.item_id for event in changes.state(1).events] == ["101"]


def test_a_backup_is_noticed(tmp_path, opened):
    "A file from before is put back while the service is stopped on the database side: the numbers begin lower."
    path = tmp_path / "feedback.db"
    store = opened(Store(f"sqlite:///{path}"))
    store.add_events([NewEvent(1, 101)])
    store.close()
    backup = path.read_bytes()
    store.add_events([NewEvent(1, 102), NewEvent(2, 103)])
    changes = opened(Changes(store, wait=30, poll=0.05).start())
    assert len(changes.state(1).events) == 2
    changes._follower.store = Store(f"sqlite:///{tmp_path}/restored.db")
    (tmp_path / "restored.db").write_bytes(backup)
    until(lambda: len(changes.state(1).events) == 1)
    assert changes.state(2).events == ()
    changes._follower.store.close()


NEXT = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0005", "0004"
def upgrade():
    op.create_table("later", sa.Column("id", sa.Integer, primary_key=True))
    op.add_column("events", sa.Column("channel", sa.Text))
    {last}
"""


def scripts(folder, last="pass"):
    "The migrations of a next release."
    shutil.copytree(
        files("product_recs") / "feedback" / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "versions/0005_next.py").write_text(NEXT.format(last=last))
    return folder


def test_a_next_version_is_migrated_with_its_rows(url, tmp_path, opened):
    store = opened(Store(url))
    store.add_events([NewEvent(1, 101, key="a"), NewEvent("guest", 102)])
    before = list(store.read_events())
    assert migrate(store._engine) == "0004"
    assert migrate(store._engine, scripts(tmp_path / "next")) == "0005"
    assert {"later", VERSION_TABLE} <= set(inspect(store._engine).get_table_names())
    assert list(store.read_events()) == before and store.add_events([NewEvent(1, 101, key="a"), NewEvent(1, 103)]) == [
        "duplicate",
        "accepted",
    ]
    with pytest.raises(StoreError, match="version 0005 .* knows 0004; update product-recs"):
        Store(url).open()


def test_a_migration_that_fails_changes_nothing(url, tmp_path, opened):
    store = opened(Store(url))
    store.add_events([NewEvent(1, 101)])
    with pytest.raises(ZeroDivisionError):
        migrate(store._engine, scripts(tmp_path / "broken", last="1 / 0"))
    assert "later" not in inspect(store._engine).get_table_names()
    assert "channel" not in [column["name"] for column in inspect(store._engine).get_columns("events")]
    assert migrate(store._engine) == "0004" and len(list(store.read_events())) == 1


def first_version(url, folder):
    "An empty store as the first release left it."
    shutil.copytree(
        files("product_recs") / "feedback" / "migrations",
        folder,
        ignore=lambda _, names: {"__pycache__", "0002_keys.py", "0003_products.py", "0004_experiments.py"} & {*names},
    )
    store = Store(url)
    engine = create_engine(store.url)
    assert migrate(engine, folder) == "0001"
    return store, engine


def test_ids_with_a_type_become_keys_and_the_forgotten_stay_forgotten(url, tmp_path, opened):
    "i12, s12 and s12.0 were three people. What one of them had is put together, and what a wish had missed goes."
    store, engine = first_version(url, tmp_path / "scripts")
    opened(store)
    events = [(1, "i12", "i5", "view"), (2, "s12", "s6.0", "cart"), (3, "s12.0", "s07", "view"),
              (4, "sanna", "sx.0", "view"), (5, "i-3", "i0", "view"),
              (6, "i12", "i5", "deny"), (7, "s12", "s5", "undeny"),  # the last word
              (8, "i12", "i6", "deny"), (9, "s12.0", "s6", "deny"),  # said twice
              (10, "i9", "i1", "view"), (11, "i9", "i1", "deny"), (13, "i9", "i2", "view"), (14, "i9", "i3", "deny"),
              (15, "s8", "i1", "view"), (17, "i8", "i1", "view"), (19, "s8", "i2", "view")]  # fmt: skip
    with engine.begin() as connection:

        def put(table, **columns):
            names = ", ".join(columns)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES (:{', :'.join(columns)})"), columns)

        for seq, user, item, event in events:
            put(
                "events",
                seq=seq,
                key=f"k{seq}",
                user_id=user,
                item_id=item,
                event=event,
                quantity=1,
                at=seq,
                received_at=seq,
            )
        for user, item in (
            ("i12", "i5"),
            ("i12", "i6"),
            ("s12.0", "s6"),
            ("i9", "i1"),
            ("i9", "i3"),
            ("sbert", "i1"),
            ("i8", "i7"),
        ):
            put("denied", user_id=user, item_id=item)
        for user, seq in (("s9", 12), ("i8", 16), ("s8", 18)):
            put("forgotten", user_id=user, at=seq, seq=seq)
        for item, available, seq in (("i5", True, 20), ("s5", True, 21), ("s5.0", False, 22), ("sA7", True, 23)):
            put("availability", item_id=item, available=available, at=seq, seq=seq)
        for moment, user, items in (
            (11, "i9", "[1]"),
            (13, "i9", '[2, "2.0", "A7"]'),
            (14, None, "[]"),
            (19, "s12.0", '["5"]'),
            (17, "i8", "[1]"),
        ):
            put(
                "impressions",
                at=moment,
                request_id=f"r{moment}",
                user_id=user,
                model_version="v",
                source="popular",
                items=items,
            )
        connection.execute(text("UPDATE clock SET seq = 23, at = 23"))
    engine.dispose()

    assert migrate(store.open()._engine) == "0004"
    assert [(event.seq, event.user_id, event.item_id) for event in store.read_events()] == [
        (1, "12", "5"), (2, "12", "6"), (3, "12", "07"), (4, "anna", "x.0"), (5, "-3", "0"), (13, "9", "2"),
        (19, "8", "2")]  # fmt: skip
    with store.transaction("test") as connection:
        assert sorted(connection.execute(select(DENIED)).all()) == [("12", "6"), ("9", "3"), ("bert", "1")]
        assert sorted(connection.execute(select(FORGOTTEN.c.user_id, FORGOTTEN.c.seq)).all()) == [("8", 18), ("9", 12)]
    assert store.availability() == {"5": False, "A7": True}
    assert [(row.request_id, row.user_id, row.items) for row in store.impressions()[::-1]] == [
        ("r13", "9", ("2", "2", "A7")),
        ("r14", None, ()),
        ("r19", "12", ("5",)),
    ]
    changes = opened(Changes(store, wait=30).start())
    assert (
        changes.state(9).forgotten
        and changes.state("9").denied == {"3"}
        and [event.item_id for event in changes.state("9.0").events] == ["2"]
    )
    assert changes.availability()[:2] == ({"5"}, {"A7"}) and len(changes.state(12).events) == 3
    assert store.add_events([NewEvent(12, 5, key="k1"), NewEvent(12, 5)]) == ["duplicate", "accepted"]


LOG = "user_id,item_id,event,timestamp\n" + "".join(
    f"{user},{item},purchase,2026-01-{1 + (user * 7 + item) % 28:02}\n"
    for user in range(1, 13)
    for item in range(101, 113)
    if (user + item) % 2
)


def test_what_was_accepted_is_in_the_next_model_and_new_to_no_one(url, tmp_path, opened):
    """The loop: a model serves, events come, one user wants to be forgotten, the next model is trained, the workers
    turn to it."""
    store, log = opened(Store(url)), tmp_path / "log.csv"
    log.write_text(LOG)

    def train(name):
        ledger = ingest(log, tmp_path / name, feedback=url, max_reject_share=0.4, progress=False)
        assert (
            ledger.rows_read
            == ledger.rows_kept + ledger.rows_rejected + ledger.duplicates_merged + ledger.rows_forgotten
        )
        version, _ = train_bundle(
            build_features(tmp_path / name, tmp_path / f"{name}-features"),
            tmp_path / "models",
            factors=4,
            iterations=2,
            next_model="none",
            progress=False,
        )
        return ledger, open_bundle(tmp_path / "models", version)

    store.open()
    ledger, first = train("first")
    assert (ledger.rows_read, ledger.rows_forgotten) == (72, 0) and first.users.row(99) is None
    changes = opened(Changes(store, first.manifest["data"]["feedback_until"], wait=30).start())
    store.add_events(
        [NewEvent(99, 101, "cart", 2), NewEvent(99, 103), NewEvent(1, 101, "deny"), NewEvent("a guest", 101)]
    )
    store.forget(2)
    assert len(changes.state(99).events) == 2 and changes.state(2).forgotten
    time.sleep(2.1)  # what is younger than two seconds waits for the training after this one
    ledger, second = train("second")
    assert (
        ledger.rows_read == 75
        and ledger.reasons == {"id is text, but those of the source are numbers": 1}
        and ledger.rows_forgotten == 6
    )
    assert {file["role"]: file["rows_read"] for file in ledger.files} == {"interactions": 72, "feedback": 3}
    row = second.users.row(99)
    assert (
        sorted(second.items.take(second.history(row).items)) == [101, 103]
        and second.users.row(2) is None
        and second.users.row("a guest") is None
    )
    changes.use(second.manifest["data"]["feedback_until"])
    assert changes.state(99).events == () and changes.state(1).denied == {"101"}
    store.add_events([NewEvent(99, 105), NewEvent(2, 105)])
    assert (
        [event.item_id for event in changes.state(99).events]
        == ["105"]
        == [event.item_id for event in changes.state(2).events]
    )
    changes.use(first.manifest["data"]["feedback_until"])  # a rollback: the events and the wish are new again
    assert changes.state(2).forgotten


def test_events_alone_make_a_model(url, tmp_path, opened):
    store = opened(Store(url))
    store.add_events(
        [
            NewEvent(f"u{user}", item, "view", timestamp=datetime(2026, 1, 1 + user))
            for user in range(6)
            for item in range(4)
            if (user + item) % 2
        ]
    )
    age(store, 10)
    ledger = ingest("", tmp_path / "alone", feedback=url, progress=False)
    assert (ledger.rows_kept, ledger.users, ledger.items) == (12, 6, 4)
    with duckdb.connect() as con:
        assert con.execute(
            f"SELECT DISTINCT typeof(user_id), typeof(item_id) FROM '{tmp_path}/alone/interactions.parquet'"
        ).fetchall() == [("VARCHAR", "BIGINT")]
    assert len(build_features(tmp_path / "alone", tmp_path / "features").users) == 6


def test_a_forgotten_user_leaves_no_row_in_the_database(url, opened):
    store = opened(Store(url))
    store.add_events([NewEvent("anna", 101), NewEvent("anna", 102, "deny"), NewEvent("bert", 101)])
    log = ImpressionLog(store)
    log.add("r1", "anna", "v1", "popular", [101])
    log.close()
    log.add("r2", "anna", "v1", "popular", [101])  # still waiting when the wish comes
    deleted = store.forget("anna")
    assert deleted == 2
    log.close()
    with store.transaction("test") as connection:
        for table in inspect(connection).get_table_names():
            rows = [str(tuple(row)) for row in connection.execute(text(f"SELECT * FROM {table}"))]
            assert ("anna" in "".join(rows)) == (table == "forgotten"), table
        assert connection.execute(select(EVENTS.c.user_id)).scalars().all() == ["bert"]
