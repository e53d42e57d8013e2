"""What does /recommend cost beside an empty FastAPI route? All under uvicorn with the same number of workers, alternating, in one run.

    python benchmarks/serving.py [--models-dir models] [--workers 2] [--rounds 5] [--seconds 4] [--connections 16]   (needs wrk: apt-get install wrk)

Three services: an empty FastAPI route; ours as it is deployed, with request log, figures and impressions, where most questions have been asked
before; and ours with `cache_size` 0, where every list is ranked anew. Then the memory of 1, 2 and 4 workers after each has answered: what is
shared counts once (PSS), so four workers must need less than four times one.

Without --models-dir the model is random, 2,500 users x 25,000 items x 64 factors, 200 seen items a user: the cost does not depend on the values.
"""
import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
from scipy.sparse import csr_matrix

from product_recs.api import free_port
from product_recs.bundle import publish, write_bundle
from product_recs.core import IdTable

EMPTY = """
from fastapi import FastAPI
app = FastAPI()
@app.get("/empty/{user_id}")
async def empty(user_id: str): return {}
"""
LUA = """
local k = 0
init = function(arguments) prefix = arguments[1] end
request = function() k = k + 1; return wrk.format("GET", prefix .. (k % 2400 + 1)) end
"""


def make_model(folder: Path) -> None:
    rng = np.random.default_rng(0)
    users, items, factors, seen = 2_500, 25_000, 64, 200
    columns = np.sort(rng.integers(0, items, (users, seen)), axis=1).astype(np.int32).ravel()
    matrix = csr_matrix((np.ones(len(columns), np.float32), columns, np.arange(0, len(columns) + 1, seen)), shape=(users, items))
    matrix.sum_duplicates()
    popularity = np.bincount(matrix.indices, minlength=items)
    path = write_bundle(
        folder, user_factors=rng.normal(size=(users, factors)), item_factors=rng.normal(size=(items, factors)), seen=matrix, users=IdTable(np.arange(1, users + 1)),
        items=IdTable(np.arange(101, 101 + items)), user_columns={}, item_columns={"popularity": popularity}, algorithm="random", parameters={}, data={}, metrics={},
    )  # fmt: skip
    publish(folder, path.name)


def start(command: list[str], folder: Path, **settings) -> tuple[subprocess.Popen, int]:
    "A service in a process of its own, as soon as it answers."
    port = free_port("127.0.0.1", 0)
    environment = os.environ | {"PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}"} | {f"PRODUCT_RECS_{name.upper()}": str(value) for name, value in {**settings, "port": port}.items()}
    process = subprocess.Popen([*command, *(["--port", str(port)] if "uvicorn" in command else [])], env=environment, stdout=open(folder / f"{port}.log", "w"), stderr=subprocess.STDOUT)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json").read()
            return process, port
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise SystemExit(f"{command} did not start:\n" + (folder / f"{port}.log").read_text()[-2000:])


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(30)


def memory(process: subprocess.Popen) -> float:
    "MB of a service and its workers; what they share counts once."
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(one.memory_full_info().pss for one in family) / 1e6


def milliseconds(text: str) -> float:
    return float(re.match(r"[\d.]+", text)[0]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[re.search(r"[a-z]+$", text)[0]]


def load(folder: Path, port: int, path: str, connections: int, seconds: float) -> tuple[float, float, float]:
    "Requests a second, p50 and p99 in milliseconds."
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(folder / "walk.lua"), f"http://127.0.0.1:{port}", "--", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in text, text
    return float(re.search(r"Requests/sec:\s+(\S+)", text)[1]), *(milliseconds(re.search(rf"(?m)^\s+{share}%\s+(\S+)", text)[1]) for share in (50, 99))


SERVE = [sys.executable, "-c", "from product_recs.api import serve; serve()"]


def throughput(folder: Path, options) -> None:
    "The table of requests a second."
    empty = [sys.executable, "-m", "uvicorn", "empty_route:app", "--no-access-log", "--log-level", "warning", "--workers", str(options.workers)]
    ours = {"models_dir": options.models_dir, "workers": options.workers}
    servers = {
        "empty FastAPI route": (*start(empty, folder), "/empty/"),
        "/recommend/{user_id}": (*start(SERVE, folder, database_url=f"sqlite:///{folder}/a.db", **ours), "/recommend/"),
        "the same, cache_size 0": (*start(SERVE, folder, database_url=f"sqlite:///{folder}/b.db", cache_size=0, **ours), "/recommend/"),
    }
    try:
        print("| connections | route | requests/s | p50 ms | p99 ms | share of the empty route |\n|---|---|---|---|---|---|", flush=True)
        for connections in options.connections:
            found = {name: [] for name in servers}
            for number in range(-2, options.rounds):  # two rounds to warm up: each worker keeps its own answers
                for name, (_, port, path) in servers.items():
                    measured = load(folder, port, path, connections, options.seconds)
                    found[name] += [measured] * (number >= 0)
            base = [rate for rate, _, _ in found["empty FastAPI route"]]
            for name, rows in found.items():
                shares = sorted(row[0] / other for row, other in zip(rows, base))
                rate, p50, p99 = (statistics.median(column) for column in zip(*rows))
                print(f"| {connections} | {name} | {rate:,.0f} | {p50:.2f} | {p99:.2f} | {statistics.median(shares):.0%} ({shares[0]:.0%} to {shares[-1]:.0%}) |", flush=True)
    finally:
        for process, _, _ in servers.values():
            stop(process)


def memories(folder: Path, options) -> None:
    "The table of memory."
    print("\n| workers | MB, what is shared counts once |\n|---|---|")
    for workers in (1, 2, 4):
        process, port = start(SERVE, folder, models_dir=options.models_dir, workers=workers, database_url=f"sqlite:///{folder}/c.db")
        load(folder, port, "/recommend/", 16, 5)
        print(f"| {workers} | {memory(process):,.0f} |", flush=True)
        stop(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", help="folder of bundles whose users have numbers from 1 (default: a random model)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--connections", type=int, nargs="+", default=[16])
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("benchmarks/serving.py needs wrk, such as Debian's package of that name")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty_route.py").write_text(EMPTY)
        (folder / "walk.lua").write_text(LUA)
        if options.models_dir is None:
            options.models_dir = folder / "models"
            make_model(options.models_dir)
        options.models_dir = Path(options.models_dir).resolve()
        throughput(folder, options)
        memories(folder, options)


if __name__ == "__main__":
    main()
