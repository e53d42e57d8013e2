"""What does /recommend cost beside an empty FastAPI route? All under uvicorn with the same number of workers,
alternating, in one run.

    python benchmarks/serving.py [--models-dir models] [--workers 2] [--rounds 5] [--seconds 4] [--connections 16]
    [--write]   (needs wrk: apt-get install wrk)

Three services: an empty FastAPI route; ours as it is deployed, with request log, figures and impressions, where most
questions have been asked
before; and ours with `cache_size` 0, where every list is ranked anew. Then the memory of 1, 2 and 4 workers after each
has answered: what is
shared counts once (PSS), so four workers must need less than four times one.

Without --models-dir the model is random, 2,500 users x 25,000 items x 64 factors, 200 seen items a user: the cost does
not depend on the values.
"""

import argparse
import json
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

from product_recs.bundle.checkerboard import model_by_hand
from product_recs.bundle.files import publish, write_bundle
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.ids import IdTable
from product_recs.data.snapshots import Snapshot
from product_recs.web.server import bindable

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
    matrix = csr_matrix(
        (np.ones(len(columns), np.float32), columns, np.arange(0, len(columns) + 1, seen)), shape=(users, items)
    )
    matrix.sum_duplicates()
    popularity = np.bincount(matrix.indices, minlength=items)
    snapshot = Snapshot(None, matrix, matrix, matrix * 0, popularity)
    vectors = (rng.normal(size=(rows, factors)).astype(np.float32) for rows in (users, items))
    path = write_bundle(
        folder, models={DISCOVERY: model_by_hand(*vectors, snapshot), NEXT_PURCHASE: "it was made by hand"},
        snapshot=snapshot, users=IdTable(np.arange(1, users + 1)), items=IdTable(np.arange(101, 101 + items)),
        user_columns={}, item_columns={"popularity": popularity}, parameters={}, data={}, metrics={},
    )  # fmt: skip
    publish(folder, path.name)


def start(command: list[str], folder: Path, **settings) -> tuple[subprocess.Popen, int]:
    "A service in a process of its own, as soon as it answers."
    port, _ = bindable("127.0.0.1", 0)
    environment = (
        os.environ
        | {"PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}"}
        | {f"PRODUCT_RECS_{name.upper()}": str(value) for name, value in {**settings, "port": port}.items()}
    )
    process = subprocess.Popen(
        [*command, *(["--port", str(port)] if "uvicorn" in command else [])],
        env=environment,
        stdout=open(folder / f"{port}.log", "w", encoding="utf-8"),
        stderr=subprocess.STDOUT,
    )
    for _ in range(1200):  # a busy machine takes its time
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json").read()
            return process, port
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise SystemExit(f"{command} did not start:\n" + (folder / f"{port}.log").read_text(encoding="utf-8")[-2000:])


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(30)


def memory(process: subprocess.Popen) -> float:
    "MB of a service and its workers; what they share counts once."
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.memory_full_info().pss for member in family) / 1e6


def milliseconds(text: str) -> float:
    return float(re.match(r"[\d.]+", text)[0]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[re.search(r"[a-z]+$", text)[0]]


def load(folder: Path, port: int, path: str, connections: int, seconds: float) -> tuple[float, float, float]:
    "Requests a second, p50 and p99 in milliseconds."
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "--latency",
        "-s",
        str(folder / "walk.lua"),
        f"http://127.0.0.1:{port}",
        "--",
        path,
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in text, text
    return float(re.search(r"Requests/sec:\s+(\S+)", text)[1]), *(
        milliseconds(re.search(rf"(?m)^\s+{share}%\s+(\S+)", text)[1]) for share in (50, 99)
    )


EMPTY_ROUTE = "empty FastAPI route"
SERVE = [sys.executable, "-c", "from product_recs.web.server import serve; serve()"]


def throughput(folder: Path, options) -> list[dict]:
    "Requests a second and milliseconds of each service in each round."
    empty = [
        sys.executable,
        "-m",
        "uvicorn",
        "empty_route:app",
        "--no-access-log",
        "--log-level",
        "warning",
        "--workers",
        str(options.workers),
    ]
    ours = {"models_dir": options.models_dir, "workers": options.workers}
    servers = {
        EMPTY_ROUTE: (*start(empty, folder), "/empty/"),
        "/recommend/{user_id}": (*start(SERVE, folder, database_url=f"sqlite:///{folder}/a.db", **ours), "/recommend/"),
        "the same, cache_size 0": (
            *start(SERVE, folder, database_url=f"sqlite:///{folder}/b.db", cache_size=0, **ours),
            "/recommend/",
        ),
    }
    cases = []
    try:
        for connections in options.connections:
            rounds = {name: [] for name in servers}
            for number in range(-2, options.rounds):  # two rounds to warm up: each worker keeps its own answers
                for name, (_, port, path) in servers.items():
                    measured = load(folder, port, path, connections, options.seconds)
                    rounds[name] += [measured] * (number >= 0)
            cases.append({"connections": connections, "rounds": rounds})
    finally:
        for process, _, _ in servers.values():
            stop(process)
    return cases


def memories(folder: Path, options) -> dict[int, float]:
    "MB by number of workers."
    sizes = {}
    for workers in (1, 2, 4):
        process, port = start(
            SERVE, folder, models_dir=options.models_dir, workers=workers, database_url=f"sqlite:///{folder}/c.db"
        )
        load(folder, port, "/recommend/", 16, 5)
        sizes[workers] = memory(process)
        stop(process)
    return sizes


def shares(rounds: dict) -> dict[str, list[float]]:
    "Of each service, its requests a second / those of the empty route: median, smallest and largest."
    ratios = {
        name: sorted(row[0] / other[0] for row, other in zip(rows, rounds[EMPTY_ROUTE]))
        for name, rows in rounds.items()
    }
    return {name: [statistics.median(rows), rows[0], rows[-1]] for name, rows in ratios.items()}


def tables(result: dict) -> str:
    lines = [
        f"{result['workers']} workers, {result['model']}; {os.cpu_count()} cores, which the clients share. Shares: "
        f"median of the rounds (smallest to largest). Made by `make bench-serving`.",
        "",
        "| connections | route | rounds | requests/s | p50 ms | p99 ms | share of the empty route |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["throughput"]:
        for name, rows in case["rounds"].items():
            rate, p50, p99 = (statistics.median(column) for column in zip(*rows))
            share, low, high = shares(case["rounds"])[name]
            lines.append(
                f"| {case['connections']} | {name} | {len(rows)} | {rate:,.0f} | {p50:.2f} | {p99:.2f} | {share:.0%} "
                f"({low:.0%} to {high:.0%}) |"
            )
    lines += [
        "",
        "| workers | MB, what is shared counts once |",
        "|---|---|",
        *(f"| {workers} | {megabytes:,.0f} |" for workers, megabytes in result["memory"].items()),
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), gridspec_kw={"width_ratios": [2, 1]})
    rounds = result["throughput"][0]["rounds"]
    for place, (name, rows) in enumerate(rounds.items()):
        rate, share = statistics.median(row[0] for row in rows), shares(rounds)[name][0]
        left.barh(place, rate, 0.6, color="#b9b9b9" if name == EMPTY_ROUTE else "#1f77b4")
        left.text(
            rate, place, f" {rate:,.0f}" + (f" ({share:.0%})" if name != EMPTY_ROUTE else ""), va="center", fontsize=9
        )
    left.set_yticks(range(len(rounds)), list(rounds))
    left.invert_yaxis()
    left.margins(x=0.25)
    left.set_xlabel(
        f"requests a second, {result['throughput'][0]['connections']} connections, {result['workers']} workers"
    )
    right.bar([str(workers) for workers in result["memory"]], list(result["memory"].values()), 0.6, color="#1f77b4")
    for place, megabytes in enumerate(result["memory"].values()):
        right.text(place, megabytes, f"{megabytes:,.0f}", ha="center", va="bottom", fontsize=9)
    right.margins(y=0.15)
    right.set(xlabel="workers", ylabel="MB")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models-dir", help="folder of bundles whose users have numbers from 1 (default: a random model)"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--connections", type=int, nargs="+", default=[16])
    parser.add_argument("--write", action="store_true", help="keep table, figures and plot under benchmarks/results/")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("benchmarks/serving.py needs wrk, such as Debian's package of that name")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty_route.py").write_text(EMPTY, encoding="utf-8")
        (folder / "walk.lua").write_text(LUA, encoding="utf-8")
        model = "a random model" if options.models_dir is None else f"the model in {options.models_dir}"
        if options.models_dir is None:
            options.models_dir = folder / "models"
            make_model(options.models_dir)
        options.models_dir = Path(options.models_dir).resolve()
        result = {
            "workers": options.workers,
            "model": model,
            "throughput": throughput(folder, options),
            "memory": memories(folder, options),
        }
    print(tables(result))
    if options.write:
        out = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
        (out / "serving.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "serving.md").write_text(tables(result), encoding="utf-8")
        plot(result, out / "serving.png")


if __name__ == "__main__":
    main()
