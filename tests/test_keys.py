"""A person and an item keep their key whatever model is live: none, one whose ids are numbers or texts, a retrained
one."""

import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import duckdb
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import update
from support import bundle_by_hand, once_today

from product_recs.api import create_app
from product_recs.bundle.files import publish
from product_recs.core.ids import id_key
from product_recs.core.settings import Settings
from product_recs.features import build_features
from product_recs.feedback.records import EVENTS, FORGOTTEN
from product_recs.feedback.store import Store
from product_recs.ingest import ingest
from product_recs.train import train_bundle

PEOPLE, THINGS = [str(n) for n in range(1, 9)], [str(n) for n in range(10, 20)]
TEXT_PERSON, TEXT_THING = "a7", "b7"
BOUGHT = {
    person: {THINGS[(index + step) % len(THINGS)] for step in (0, 1, 3)} for index, person in enumerate(PEOPLE)
} | {TEXT_PERSON: {"10", TEXT_THING}}
"""what each had before the service began: in the models made by hand, and in the shop's files"""
TRIED = st.sampled_from([*PEOPLE[:3], TEXT_PERSON])  # few, so that things meet
ITEMS = st.sampled_from([*THINGS[:5], TEXT_THING])
CARRIER = st.sampled_from(["number", "text", "pandas"])


def carried(key, carrier):
    "An id as some program writes it."
    if not key.isdigit() or carrier == "text":
        return key
    return int(key) if carrier == "number" else f"{key}.0"


def by_hand(folder, kind):
    "A model that knows nothing of the store, with ids of one kind."
    texts = kind == "texts"
    people, things = (
        sorted([*PEOPLE, TEXT_PERSON] if texts else PEOPLE),
        sorted([*THINGS, TEXT_THING] if texts else THINGS),
    )
    seen = np.array([[float(thing in BOUGHT[person]) for thing in things] for person in people], np.float32)
    random = np.random.default_rng(0)
    ids = lambda keys: keys if texts else [int(key) for key in keys]
    return bundle_by_hand(
        folder,
        user_factors=random.normal(size=(len(people), 4)),
        item_factors=random.normal(size=(len(things), 4)),
        snapshot=once_today(seen),
        users=ids(people),
        items=ids(things),
        als={"regularization": 1.0},
        version=kind,
    ).name


class Shop(RuleBasedStateMachine):
    "The real service over HTTP, a real SQLite store, real trainings; beside it a plain account of what was said."

    @initialize()
    def open(self):
        self.folder = Path(tempfile.mkdtemp())
        self.url = f"sqlite:///{self.folder}/feedback.db"
        for kind in ("numbers", "texts"):
            by_hand(self.folder / "models", kind)
            rows = [
                (person, thing)
                for person, things in BOUGHT.items()
                for thing in sorted(things)
                if kind == "texts" or person.isdigit() and thing.isdigit()
            ]
            dated = [
                f"{person}{'.0' if kind == 'texts' and person == '2' else ''},{thing},2026-01-{1 + index % 28:02}"
                for index, (person, thing) in enumerate(rows)
            ]
            (self.folder / f"{kind}.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(dated) + "\n")
        (self.folder / "none").mkdir()
        self.events, self.denied, self.gone, self.forgotten = defaultdict(list), defaultdict(set), {}, set()
        self.client, self.trainings = None, 0
        self.start("none")

    def start(self, kind):
        "A service of its own on no model, or on one that is published first."
        self.stop()
        if kind != "none":
            publish(self.folder / "models", kind)
        folder = self.folder / ("none" if kind == "none" else "models")
        self.kind, self.client = (
            kind,
            TestClient(
                create_app(
                    Settings(models_dir=folder, database_url=self.url, log_level="ERROR", auth="off", watch_seconds=60)
                ),
                base_url="http://localhost",
            ),
        )
        self.client.__enter__()

    def stop(self):
        if self.client:
            self.client.__exit__(None, None, None)
            self.client = None

    def teardown(self):
        if hasattr(self, "folder"):
            self.stop()
            shutil.rmtree(self.folder)

    def live(self):
        return None if self.kind == "none" else self.client.app.state.service.live.get().bundle

    @rule(kind=st.sampled_from(["none", "numbers", "texts"]))
    def restart(self, kind):
        self.start(kind)

    @rule(kind=st.sampled_from(["numbers", "texts"]))
    def swap(self, kind):
        "Under the running service, where it has a model."
        if self.kind == "none":
            return self.start(kind)
        publish(self.folder / "models", kind)
        assert self.client.post("/model/reload").json()["model_version"] == kind
        self.kind = kind

    @rule(
        user=TRIED,
        item=ITEMS,
        name=st.sampled_from(["purchase", "view", "deny", "deny", "undeny"]),
        by=CARRIER,
        of=CARRIER,
    )
    def tell(self, user, item, name, by, of):
        answer = self.client.post(
            "/events", json={"user_id": carried(user, by), "item_id": carried(item, of), "event": name}
        ).json()
        numbers = self.live().rules.numbers if self.live() else ()
        refused = name in ("purchase", "view") and not (user.isdigit() and item.isdigit()) and len(numbers) > 0
        assert answer["accepted"] == (not refused) and (not refused or "id is text" in answer["results"][0]["error"])
        if name in ("deny", "undeny"):
            (set.add if name == "deny" else set.discard)(self.denied[user], item)
        elif not refused:
            self.events[user].append(item)

    @rule(item=ITEMS, available=st.booleans(), of=CARRIER)
    def sell(self, item, available, of):
        assert (
            self.client.post(
                "/availability", json={"items": [{"item_id": carried(item, of), "available": available}]}
            ).status_code
            == 200
        )
        self.gone[item] = not available

    @rule(user=TRIED, by=CARRIER)
    def forget(self, user, by):
        answer = self.client.delete(f"/users/{carried(user, by)}").json()
        assert answer["forgotten"] and answer["events_deleted"] >= len(self.events[user])
        self.events.pop(user, None), self.denied.pop(user, None), self.forgotten.add(user)

    @rule(kind=st.sampled_from(["numbers", "texts"]))
    def retrain(self, kind):
        "By the real ingest and the real training, with what the store has; then the new model answers."
        self.stop()
        with (
            Store(self.url) as store,
            store.transaction("test", write=True) as connection,
        ):  # a cut lies two seconds back: here it all came a while ago
            connection.execute(update(EVENTS).values(received_at=EVENTS.c.received_at - 10_000_000))
            connection.execute(update(FORGOTTEN).values(at=FORGOTTEN.c.at - 10_000_000))
        self.trainings += 1
        run = self.folder / f"run{self.trainings}"
        ledger = ingest(self.folder / f"{kind}.csv", run, feedback=self.url, max_reject_share=1, progress=False)
        fits = lambda key: kind == "texts" or key.isdigit()
        with duckdb.connect() as con:
            rows = con.execute(f"SELECT user_id, item_id FROM '{run}/interactions.parquet'").fetchall()
        learned = defaultdict(set)
        for user, item in rows:
            assert isinstance(user, str) == isinstance(item, str) == (kind == "texts")
            learned[id_key(user)].add(id_key(item))
        for user in {*BOUGHT, *self.events}:
            feedback = {item for item in self.events[user] if fits(user) and fits(item)}
            before = (
                {item for item in BOUGHT.get(user, ()) if fits(user) and fits(item)}
                if user not in self.forgotten
                else set()
            )
            assert learned[user] == feedback | before, (user, "is what training learned and what was told")
        lost = [item for user, items in self.events.items() for item in items if not (fits(user) and fits(item))]
        assert ledger.rows_rejected == len(lost), "what is left out is counted"
        version, _ = train_bundle(
            build_features(run, run / "features"),
            self.folder / "models",
            factors=4,
            iterations=2,
            num_threads=1,
            next_model="none",
            progress=False,
        )
        self.start(version)

    @invariant()
    def everybody_is_known_by_key(self):
        if not getattr(self, "client", None):
            return
        bundle = self.live()
        for index, user in enumerate((*PEOPLE[:3], TEXT_PERSON)):
            asked = carried(user, ("number", "text", "pandas")[(index + len(self.events[user])) % 3])
            state = self.client.app.state.service.desk.changes.state(asked)
            assert state.denied == self.denied[user]
            answer = self.client.get(f"/users/{asked}/history?limit=1000").json()
            shows_numbers = bundle is None or bundle.users.is_int
            assert answer["user_id"] == (int(user) if shows_numbers and user.isdigit() else user)
            history = {id_key(line["item_id"]) for line in answer["history"] if line["event"] not in ("deny", "undeny")}
            trained = (
                {id_key(item) for item in bundle.items.take(bundle.history(row).items)}
                if bundle and (row := bundle.users.row(user)) is not None
                else set()
            )
            if user in self.forgotten:
                assert history == {*self.events[user]}, "a forgotten person came back"
            else:
                assert history == {*self.events[user]} | trained
            if bundle is None:
                continue
            items = [id_key(item) for item in self.client.get(f"/recommend/{asked}?n=50").json()["recommendations"]]
            assert len({*items}) == len(items) and not {*items} & self.denied[user]
            assert not {*items} & {item for item, gone in self.gone.items() if gone}
            assert not {*items} & {item for item in history if bundle.rules.fits("user_id", user)}


Shop.TestCase.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=[*HealthCheck]
)
test_a_key_means_the_same_through_every_change_of_models = Shop.TestCase


@pytest.mark.parametrize("kind", ["numbers", "texts"])
@pytest.mark.parametrize("by", ["number", "text", "pandas"])
def test_a_wish_without_a_model_is_kept_by_every_training(tmp_path, kind, by):
    "What was seen: an event was taken as a number, the wish as a text, and the training learned the forgotten."
    shop = Shop()
    shop.open()
    try:
        shop.tell("1", "15", "purchase", "number", "number")
        shop.tell("2", "14", "deny", "number", "pandas")
        shop.forget("1", by)
        shop.retrain(kind)
        shop.everybody_is_known_by_key()
        assert shop.live().users.row("1") is None and shop.client.app.state.service.desk.changes.state("2").denied == {
            "14"
        }
    finally:
        shop.teardown()
