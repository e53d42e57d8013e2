"""One set of rules: POST /events takes what the next training learns, row by row, and what the fold-in counts."""

import csv
import math
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import duckdb
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from product_recs.answer.person import person_now
from product_recs.api import create_app
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.errors import FeedbackError, IngestError
from product_recs.core.events import KNOWN_EVENTS, EventRules
from product_recs.core.ids import key_or_none
from product_recs.core.settings import Settings
from product_recs.features import build_features
from product_recs.feedback.records import EVENTS, NewEvent
from product_recs.feedback.store import Store
from product_recs.ingest import ingest, open_ledger
from product_recs.train import train_bundle

QUICK = {"factors": 4, "iterations": 2, "num_threads": 1, "next_model": "none", "progress": False}
NOW = datetime(2026, 6, 1, tzinfo=timezone.utc)
IDS = st.sampled_from(
    ["1", "7", "7.0", "-3", "0", "007", "a7", "nan", "", "x" * 256, "x" * 257, 'a"b', str(2**63), str(2**63 - 1), "ä"]
)
NAMES = st.sampled_from([*KNOWN_EVENTS, "subscribe", "add to cart", "it's", ""])
QUANTITIES = st.one_of(
    st.floats(width=64),
    st.sampled_from([0.0, -0.0, 5e-324, 1.0, 1000.0, 1000.0000000001, 2.5, 1e300, math.inf, math.nan]),
    st.integers(-3, 2000).map(float),
)
MOMENTS = st.one_of(st.none(), st.datetimes(datetime(1000, 1, 1), datetime(2999, 1, 1)),
                    st.sampled_from([datetime(1970, 1, 1), datetime(1969, 12, 31, 23, 59, 59),
                                     datetime(2026, 6, 2), datetime(2026, 6, 2, 0, 0, 1)]))  # fmt: skip
ROWS = st.lists(st.tuples(IDS, IDS, NAMES, QUANTITIES, MOMENTS), min_size=1, max_size=30)
RULES = st.sampled_from([EventRules(), EventRules(("add to cart", "it's", "view"), 2.5), EventRules(("rating",), 1e9)])
slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def judged(rules, user, item, event, quantity, moment):
    "Column of the fault in Python; None for a good row."
    for column, id in (("user_id", user), ("item_id", item)):
        if key_or_none(id) is None:
            return column
    moment = moment and moment.replace(tzinfo=timezone.utc)
    row = SimpleNamespace(
        user_id=key_or_none(user), item_id=key_or_none(item), event=event, quantity=quantity, timestamp=moment
    )
    fault = rules.fault(row, NOW + timedelta(days=1))
    return fault and fault[0]


@slow
@given(rows=ROWS, rules=RULES)
@example(rows=[("1", "1", "view", 1.0, datetime(1969, 12, 31, 23, 59, 59))], rules=EventRules())
def test_a_file_is_judged_as_an_event_is(tmp_path, rows, rules):
    "The real ingest and the check in Python refuse the same rows, each for the same column."
    log = tmp_path / "log.csv"
    with open(log, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["user_id", "item_id", "event", "quantity", "timestamp"])
        for user, item, event, quantity, moment in [*rows, ("1", "1", rules.events[0], 1.0, None)]:
            out.writerow([user, item, event, repr(quantity), moment and moment.isoformat()])
    ledger = ingest(
        log,
        tmp_path / "run",
        events=rules.events,
        max_quantity=rules.max_quantity,
        max_reject_share=1,
        returns="ignore",  # a store has no quantity below 0
        now=NOW,
        progress=False,
    )
    with open(tmp_path / "run/rejects.csv", newline="", encoding="utf-8") as file:
        rejects = {int(row["line"]): row["column"] for row in csv.DictReader(file)}
    columns = {line: judged(rules, *row) for line, row in enumerate(rows, 2)}
    assert rejects == {line: column for line, column in columns.items() if column}
    assert ledger.rows_read == len(rows) + 1 == ledger.rows_kept + ledger.rows_rejected + ledger.duplicates_merged
    assert EventRules(**open_ledger(tmp_path / "run").rules) == EventRules(
        tuple(sorted(rules.events)), rules.max_quantity, ledger.rules["numbers"]
    )


@slow
@given(rows=ROWS, rules=RULES, text=st.booleans())
def test_what_a_store_holds_is_judged_as_the_rules_of_the_run_say(tmp_path, rows, rules, text):
    "Events that were accepted under other rules are rejected for the reason of the door; the others are learned."
    url, log = f"sqlite:///{tmp_path}/feedback.db", tmp_path / "log.csv"
    for file in tmp_path.glob("feedback.db*"):
        file.unlink()
    log.write_text(f"user_id,item_id,event\n{'u1' if text else 1},{'i1' if text else 1},{rules.events[0]}\n")
    with Store(url) as store:
        events = []
        for user, item, event, quantity, moment in rows:
            try:
                events.append(NewEvent(user, item, event, quantity, moment))
            except FeedbackError as error:  # no run would take it
                assert (
                    judged(EventRules(None, math.inf), user, item, event, quantity, moment) == str(error).split(":")[0]
                    or moment
                    and moment > datetime(2026, 6, 1)
                )
        store.add_events(events)
        with store.transaction("test", write=True) as connection:
            connection.execute(update(EVENTS).values(received_at=EVENTS.c.received_at - 10_000_000))
    ledger = ingest(
        log,
        tmp_path / "run",
        feedback=url,
        events=rules.events,
        max_quantity=rules.max_quantity,
        max_reject_share=1,
        progress=False,
    )
    assert ledger.rules["numbers"] == ([] if text else ["user_id", "item_id"])
    rules = EventRules(**ledger.rules)
    with open(tmp_path / "run/rejects.csv", newline="", encoding="utf-8") as file:
        rejects = {int(row["line"]): (row["column"], row["reason"]) for row in csv.DictReader(file)}
    faults = {seq: rules.fault(event) for seq, event in enumerate(events, 1)}
    assert rejects == {seq: fault for seq, fault in faults.items() if fault}
    assert all(rules.counts(event) == (seq not in rejects) for seq, event in enumerate(events, 1))


LOG = "user_id,item_id,event,timestamp\n" + "".join(
    f"{user},{item},purchase,2026-01-{1 + (user * 7 + item) % 28:02}\n"
    for user in range(1, 13)
    for item in range(101, 113)
    if (user + item) % 2
)


def age(store):
    with store.transaction("test", write=True) as connection:
        connection.execute(update(EVENTS).values(received_at=EVENTS.c.received_at - 10_000_000))


def trained(tmp_path, name, url="", **parameters):
    ledger = ingest(tmp_path / "log.csv", tmp_path / name, feedback=url, progress=False, **parameters)
    version, _ = train_bundle(
        build_features(tmp_path / name, tmp_path / f"{name}-features"), tmp_path / "models", publish_it=True, **QUICK
    )
    return ledger, open_bundle(tmp_path / "models", version)


def test_what_the_service_accepts_the_next_training_learns(tmp_path):
    "The whole loop: rules of the run in the manifest, the door, the fold-in, the next ledger."
    (tmp_path / "log.csv").write_text(LOG)
    url = f"sqlite:///{tmp_path}/feedback.db"
    _, bundle = trained(tmp_path, "first", events=["purchase", "wishlist"], max_quantity=5)
    assert bundle.manifest["parameters"]["ingest"] == {
        "events": ["purchase", "wishlist"],
        "max_quantity": 5,
        "numbers": ["user_id", "item_id"],
        "normalise_ids": [],
    }
    tried = [("purchase", 1, 5, None), ("wishlist", "1.0", 1, None), ("subscribe", 1, 1, "event"),
             ("cart", 1, 1, "event"), ("purchase", 1, 6, "quantity"),
             ("purchase", "anna", 1, "user_id"), ("deny", "anna", 6, None), ("undeny", 1, 5000, None)]  # fmt: skip
    with TestClient(
        create_app(Settings(models_dir=tmp_path / "models", database_url=url, log_level="ERROR", auth="off")),
        base_url="http://localhost",
    ) as client:
        for name, user, quantity, fault in tried:
            body = {"user_id": user, "item_id": 101, "event": name, "quantity": quantity}
            answer = client.post("/events", json=body).json()
            assert answer["rejected"] == bool(fault) and (
                not fault or answer["results"][0]["error"].startswith(f"{fault}: ")
            ), answer
            if user == 1 and name not in ("deny", "undeny"):
                session = client.post(
                    "/recommend", json={"events": [{name: value for name, value in body.items() if name != "user_id"}]}
                )
                assert session.status_code == (422 if fault else 200) and (
                    not fault or session.json()["detail"].startswith(f"events.0.{fault}: ")
                )
        assert (
            client.post("/events", json={"user_id": 1, "item_id": "a7"})
            .json()["results"][0]["error"]
            .startswith("item_id: id is text")
        )
        assert client.post("/availability", json={"items": [{"item_id": "a7", "available": False}]}).status_code == 200
        before = client.app.state.service.desk.changes.state(1)
    with Store(url) as store:
        assert len(list(store.read_events())) == 2
        age(store)
    model = ReadyModel(bundle).prepare()
    ledger, second = trained(tmp_path, "second", url, events=["purchase", "wishlist"], max_quantity=5, on_error="fail")
    assert ledger.rows_rejected == 0 and ledger.rows_read == 74
    # an event that is known and has no weight of its own weighs 1, in training and in the fold-in
    now, learned = person_now(model, 1, before), second.history(second.users.row(1))
    assert bundle.items.take(now.items) == second.items.take(learned.items)
    np.testing.assert_allclose(now.history.confidence, learned.confidence, rtol=1e-6)
    place = now.items.tolist().index(model.bundle.items.row(101))
    assert now.history.confidence[place] == 4 + 1  # one purchase and one wish


def test_what_was_accepted_under_other_rules_is_told_and_not_counted(tmp_path):
    "No model is live, the defaults hold; then a run with stricter rules comes."
    (tmp_path / "log.csv").write_text(LOG)
    url = f"sqlite:///{tmp_path}/feedback.db"
    with TestClient(
        create_app(Settings(models_dir=tmp_path / "models", database_url=url, log_level="ERROR", auth="off")),
        base_url="http://localhost",
    ) as client:
        events = [
            {"user_id": 1, "item_id": 102, "event": "rating"},
            {"user_id": 1, "item_id": 103, "quantity": 900},
            {"user_id": 1, "item_id": 105},
            {"user_id": "anna", "item_id": 105},
        ]
        assert (
            client.post(
                "/events", json={"events": [*events, {"user_id": 1, "item_id": 101, "event": "subscribe"}]}
            ).json()["accepted"]
            == 4
        )
        with Store(url) as store:
            age(store)
        with pytest.raises(IngestError, match="3 of 4 rows of the feedback store are bad"):
            trained(tmp_path, "strict", url, events=["purchase"], max_quantity=10)
        ledger, bundle = trained(tmp_path, "strict", url, events=["purchase"], max_quantity=10, max_reject_share=0.75)
        assert ledger.reasons == {
            "unknown event": 1,
            "quantity above 10": 1,
            "id is text, but those of the source are numbers": 1,
        }
        client.post("/model/reload")
        history = client.get("/users/1/history").json()["history"]
        items = {line["item_id"] for line in history if line["origin"] == "feedback"}
        assert items == {102, 103}, "a history shows what is stored"
        _, older = trained(tmp_path, "older", events=["purchase"], max_quantity=10)  # all that is stored is new to it
        client.post("/model/reload")
        state = client.app.state.service.desk.changes.state
        now = person_now(ReadyModel(older).prepare(), 1, state(1))
        assert (
            len(state(1).events) == 3
            and [event.item_id for event in now.news] == ["105"]
            and older.items.take(now.items) == bundle.items.take(bundle.history(bundle.users.row(1)).items)
        )
        np.testing.assert_allclose(now.history.confidence, bundle.history(bundle.users.row(1)).confidence, rtol=1e-6)
        assert (
            len(state("anna").events) == 1
            and person_now(ReadyModel(older).prepare(), "anna", state("anna")).representation is None
        )
    with duckdb.connect() as con:
        assert con.execute(
            f"SELECT count(*) FROM '{tmp_path}/strict/interactions.parquet' WHERE event <> 'purchase' OR quantity > 10"
        ).fetchone() == (0,)
