"""What does /recommend cost beside an empty FastAPI route? Both under one uvicorn worker each, alternating, in one run.

    python benchmarks/serving.py [--rounds 5] [--seconds 4] [--connections 1 16]     (needs wrk: apt-get install wrk)

The model is random, 2,500 users x 25,000 items x 64 factors, 200 seen items a user: the ranking's cost does not depend on the values.
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
request = function() k = k + 1; return wrk.format("GET", prefix .. (k % 2500 + 1)) end
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


def start(target: str, folder: Path, *options: str) -> tuple[subprocess.Popen, int]:
    port = free_port("127.0.0.1", 0)
    command = [sys.executable, "-m", "uvicorn", target, "--port", str(port), "--no-access-log", "--log-level", "warning", *options]
    environment = os.environ | {"PRODUCT_RECS_MODELS_DIR": str(folder / "models"), "PYTHONPATH": str(folder)}
    process = subprocess.Popen(command, env=environment, stdout=open(folder / f"{port}.log", "w"))
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json").read()
            return process, port
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise SystemExit(f"{target} did not start")


def milliseconds(text: str) -> float:
    return float(re.match(r"[\d.]+", text)[0]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[re.search(r"[a-z]+$", text)[0]]


def load(folder: Path, port: int, path: str, connections: int, seconds: float) -> tuple[float, float, float]:
    "Requests a second, p50 and p99 in milliseconds."
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(folder / "walk.lua"), f"http://127.0.0.1:{port}", "--", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in text, text
    return float(re.search(r"Requests/sec:\s+(\S+)", text)[1]), *(milliseconds(re.search(rf"(?m)^\s+{share}%\s+(\S+)", text)[1]) for share in (50, 99))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=int, default=4)
parser.add_argument("--connections", type=int, nargs="+", default=[1, 16])
options = parser.parse_args()
if shutil.which("wrk") is None:
    sys.exit("benchmarks/serving.py needs wrk, such as Debian's package of that name")
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "empty_route.py").write_text(EMPTY)
    (folder / "walk.lua").write_text(LUA)
    make_model(folder / "models")
    servers = {"empty FastAPI route": (*start("empty_route:app", folder), "/empty/"), "/recommend/{user_id}": (*start("product_recs.api:create_app", folder, "--factory"), "/recommend/")}
    try:
        print("| connections | route | requests/s | p50 ms | p99 ms | share of the empty route |\n|---|---|---|---|---|---|")
        for connections in options.connections:
            found = {name: [] for name in servers}
            for number in range(options.rounds + 1):
                for name, (_, port, path) in servers.items():
                    measured = load(folder, port, path, connections, options.seconds if number else 1)
                    found[name] += [measured] * (number > 0)  # the first round warms up
            empty = [rate for rate, _, _ in found["empty FastAPI route"]]
            for name, rows in found.items():
                share = statistics.median(row[0] / base for row, base in zip(rows, empty))
                rate, p50, p99 = (statistics.median(column) for column in zip(*rows))
                print(f"| {connections} | {name} | {rate:,.0f} | {p50:.2f} | {p99:.2f} | {share:.0%} |")
    finally:
        for process, _, _ in servers.values():
            process.terminate()
