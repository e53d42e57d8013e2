"""What several test files share: a project of its own, a model whose answers are known, the service, databases."""

import csv
import http.client
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
from scipy.sparse import csr_matrix

from product_recs.bundle.checkerboard import model_by_hand
from product_recs.bundle.files import publish, write_bundle
from product_recs.bundle.ready import Bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.ids import IdTable
from product_recs.data.snapshots import Snapshot, csr_of
from product_recs.features import build_features
from product_recs.ingest import ingest
from product_recs.models.all import all_models
from product_recs.models.als import ALS
from product_recs.models.blend import HabitBlend, ScoreBlend
from product_recs.models.bpr import BPR
from product_recs.models.content_neighbours import ContentNeighbours
from product_recs.models.hybrid import Hybrid
from product_recs.models.item_item import EASE, ItemBM25, ItemCosine, ItemGraph
from product_recs.models.order import OrderWeighted
from product_recs.models.signals import OWN, SIGNALS, BlendWeights
from product_recs.models.spectral import ChebyCF, LowPass
from product_recs.web.problems import Problem

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
database_numbers = itertools.count()


def fresh_project(folder: Path) -> Path:
    "What a clone holds: notebooks, settings and the committed sample; no models, reports or features."
    for name in ("nbs", "settings.ini", "data/interactions.csv", "data/products.csv"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, target)
    return folder


def bare_environment(**more: str) -> dict[str, str]:
    """The environment without the settings of whoever starts this: their store, models and registry are not reached by
    what a test, a page or a measurement types."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PRODUCT_RECS_", "MLFLOW_"))} | more


def call(root: Path, *command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=root,
        env=os.environ | {"PRODUCT_RECS_ROOT": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        **options,
    )


def build_wheel(folder: Path, **environment) -> Path:
    "A wheel of this package, with kernels where there is a compiler."
    source = folder / "source"
    source.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("data/interactions.csv", "data/products.csv", "examples/gate.yaml"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "examples/daily", source / "examples/daily")
    shutil.copytree(ROOT / "nbs", source / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(
        ROOT / "product_recs", source / "product_recs", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=source, env=os.environ | environment, check=True, capture_output=True, timeout=300)
    [wheel] = folder.glob("*.whl")
    return wheel


QUICK = (
    "max_trials: 8\ncandidates: [popularity, EASE, item graph]\nmax_factors: 16\nmax_iterations: 10\n"
    "half_lives: [30]\nstrengths: [1]\nseeds: [0]\nlab_factors: "
    "8\nlab_iterations: 3\nmax_users: 100\ntest_seeds: [0]\nbootstrap: 100\n"
)


def only_the_jobs(root):
    """Take the examples between the definitions out of the notebooks: they are run by nbdev_test, and here they are
    most of the time."""
    for path in (*root.glob("nbs/*_*.ipynb"), *root.glob("nbs/jobs/*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        first = next(
            (place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])), 0
        )
        exported = {
            place
            for place, cell in enumerate(notebook.cells)
            if "#| export" in cell.source
            or all(
                line.startswith(("import ", "from ", "    ", ")", "#|")) for line in cell.source.splitlines() if line
            )
        }
        notebook.cells = [
            cell
            for place, cell in enumerate(notebook.cells)
            if place >= first or cell.cell_type == "markdown" or place in exported
        ]
        nbformat.write(notebook, path)


def ready_in_memory(models, snapshot, users, items, user_columns, item_columns, **more):
    "A model in use of fitted models by task, without files."
    manifest = {"version": "v", "data": {}, "parameters": {}, "models": {}, "parts": {}}
    bundle = Bundle(Path("."), manifest, models, snapshot, users, items, user_columns, item_columns, **more)
    return ReadyModel(bundle).prepare()


def ready_by_hand(user_factors, item_factors, seen, user_columns, item_columns):
    "A model in use of factors, ids counted from 0."
    snapshot = Snapshot(None, seen, seen, seen * 0, item_columns["popularity"])
    users, items = (IdTable(range(size)) for size in seen.shape)
    by_hand = {DISCOVERY: model_by_hand(user_factors, item_factors, snapshot)}
    return ready_in_memory(by_hand, snapshot, users, items, user_columns, item_columns)


def features_of_log(log, folder, **parameters):
    log.to_csv(folder / "log.csv", index=False)
    ingest(folder / "log.csv", folder / "run", progress=False)
    return build_features(folder / "run", folder / "run" / "features", **parameters)


def train(folder, text=False, feedback="", **parameters):
    "A model of the sample with a blend; with `text`, its ids are texts with a slash and a space."
    from product_recs.train import train_bundle  # late: most tests publish a model by hand, and need no training

    source, products = ROOT / "data/interactions.csv", ROOT / "data/products.csv"
    if text:
        source, products = (with_texts(path, folder / path.name) for path in (source, products))
    ingest(source, folder / "interactions", products=products, feedback=feedback, progress=False)
    version, _ = train_bundle(
        build_features(folder / "interactions", folder / "features"),
        folder / "models",
        progress=False,
        publish_it=True,
        **{"factors": 8, "iterations": 4, **parameters},
    )
    return version


def with_texts(path, copy):
    with open(path, newline="") as source, open(copy, "w", newline="") as target:
        rows, out = csv.DictReader(source), None
        for row in rows:
            row |= {name: before + row[name] for name, before in (("user_id", "u "), ("item_id", "i/")) if name in row}
            if out is None:
                out = csv.DictWriter(target, row)
                out.writeheader()
            out.writerow(row)
    return copy


def plain_metrics(ranked, relevant, k):
    "All metrics of one user by their definitions, place by place; None where the user cannot be judged."
    if not relevant:
        return None
    hits, precisions, gain, first = 0, 0.0, 0.0, 0.0
    for place, item in enumerate(ranked[:k], start=1):
        if item in relevant:
            hits += 1
            precisions += hits / place
            gain += 1 / math.log2(place + 1)
            if hits == 1:
                first = 1 / place
    most = min(k, len(relevant))
    return {
        "recall": hits / len(relevant),
        "recall_capped": hits / most,
        "precision": hits / k,
        "hit_rate": float(hits > 0),
        "ndcg": gain / sum(1 / math.log2(place + 1) for place in range(1, most + 1)),
        "map": precisions / most,
        "mrr": first,
    }


N = 24  # users and items of the checkerboard


def once_today(seen, popularity=None):
    "What a model by hand learned from: each pair happened once, today."
    seen = csr_matrix(seen, dtype=np.float32)
    return Snapshot(None, seen, seen, seen * 0, popularity)


def bundle_by_hand(models_dir, *, user_factors, item_factors, snapshot, users, items, als=None, models=None, **more):
    """A bundle whose factors are given, not yet live; `als` are parameters of the model, and `models` makes of it the
    models by task."""
    factors = (np.asarray(array, np.float32) for array in (user_factors, item_factors))
    model = model_by_hand(*factors, snapshot, **als or {})
    given = {"user_columns": {}, "item_columns": {}, "parameters": {}, "data": {}, "metrics": {}} | more
    return write_bundle(
        models_dir,
        models=models(model) if models else {DISCOVERY: model, NEXT_PURCHASE: "it was made by hand"},
        snapshot=snapshot,
        users=IdTable(users),
        items=IdTable(items),
        **given,
    )


def publish_board(models_dir, users=range(1, N + 1), items=range(101, 101 + N), **more):
    "A checkerboard: the k-th user has seen every item of their taste but the k-th, the one right answer."
    taste = np.arange(len(users)) % 2
    factors = np.eye(2, dtype=np.float32)[taste]
    seen = ((taste[:, None] == taste) & ~np.eye(len(users), dtype=bool)).astype(np.float32)
    columns = {
        "popularity": seen.sum(axis=0).astype(np.int32),
        "title": np.array([f"Thing {k}" for k in range(len(items))], object),
        "category": np.array(["even", "odd"], object)[taste],
        "price": np.where(taste, 2.5, np.nan),
        "first_seen": np.full(len(items), np.datetime64("2026-01-02T03:04:05")),
    }
    given = {
        "user_columns": {"popularity": seen.sum(axis=1).astype(np.int32)},
        "item_columns": columns,
        "data": {"fingerprint": "none"},
        "metrics": {"loss": float("nan")},
    }
    path = bundle_by_hand(
        models_dir,
        user_factors=factors,
        item_factors=factors,
        snapshot=once_today(seen, columns["popularity"]),
        users=users,
        items=items,
        **given | more,
    )
    publish(models_dir, path.name)
    return path


class Server:
    """`serve` in a process of its own, on a free port, with its standard output in a file."""

    def __init__(self, folder, models_dir, workers=1, command=None, **settings):
        self.stdout, self.stderr = folder / "stdout.log", folder / "stderr.log"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        settings = {
            "models_dir": models_dir,
            "port": self.port,
            "workers": workers,
            "database_url": f"sqlite:///{folder}/feedback.db",
            **settings,
        }
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PRODUCT_RECS_")}
        environment |= {f"PRODUCT_RECS_{name.upper()}": str(value) for name, value in settings.items()}
        if (
            command is None and "PRODUCT_RECS_SERVE" in os.environ
        ):  # the service of an image, say: the same tests, another command
            command = shlex.split(os.environ["PRODUCT_RECS_SERVE"])
            for path in (folder, *folder.parents[:2]):
                path.chmod(0o755)
            subprocess.run(["chmod", "-R", "a+rwX", folder], check=True)  # it may run as another user
        elif command is None:
            command, environment["PYTHONPATH"] = (
                [sys.executable, "-c", "from product_recs.web.server import serve; serve()"],
                str(ROOT),
            )
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.stdout.open("w"),
            stderr=self.stderr.open("w"),
        )

    def __enter__(self):
        deadline = time.monotonic() + 60
        while True:
            try:
                if self.get("/health/live")[0] == 200:
                    return self
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError("the service did not start:\n" + self.stderr.read_text())
            time.sleep(0.05)

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise

    def get(self, path, method="GET", headers=None):
        """Status, headers (lower case) and body; JSON comes parsed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, headers=headers or {})
            answer = connection.getresponse()
            body = answer.read()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return (
                answer.status,
                fields,
                json.loads(body) if body and "json" in fields.get("content-type", "") else body,
            )
        finally:
            connection.close()

    def ask(self, method, path, body=None, headers=None):
        """Like `get`, with a body that is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            payload = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
            connection.request(
                method,
                path,
                payload,
                ({} if payload is None else {"Content-Type": "application/json"}) | (headers or {}),
            )
            answer = connection.getresponse()
            content = answer.read()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return (
                answer.status,
                fields,
                json.loads(content) if content and "json" in fields.get("content-type", "") else content,
            )
        finally:
            connection.close()

    def lines(self, atleast=0):
        """The log; a client may have its answer a moment before the line is written."""
        deadline = time.monotonic() + 5
        while len(lines := self.stdout.read_text().splitlines()) < atleast and time.monotonic() < deadline:
            time.sleep(0.02)
        return [json.loads(line) for line in lines]


def problem(answer, status):
    """The problem document of an answer, after checking its form."""
    code, headers, body = answer
    assert code == status and headers["content-type"] == "application/problem+json", answer
    assert set(body) - {"errors"} == {"type", "title", "status", "detail", "instance"} and body["status"] == status
    assert headers["x-request-id"] and body["detail"]
    return Problem(**body)


def cause_of(server, answer):
    """What the log has under the request id of an answer, which the document names."""
    id = answer[1]["x-request-id"]
    assert f"request id {id}" in answer[2]["detail"]
    lines = server.lines()
    while id not in {line["request_id"] for line in lines}:
        lines = server.lines(len(lines) + 1)
    return next(line["error"] for line in lines if line["request_id"] == id)


def both(server, path, method="GET", body=None, headers=None):
    "The answers of both workers, each over a connection that it keeps; the first part of a request id is the worker."
    payload, sent = (
        None if body is None else json.dumps(body),
        ({} if body is None else {"Content-Type": "application/json"}) | (headers or {}),
    )
    if not hasattr(server, "kept"):
        server.kept = {}
    answers = []
    for worker, connection in list(server.kept.items()):
        try:
            answers.append(talk(connection, method, path, payload, sent))
        except (OSError, http.client.HTTPException):  # hung up after some idle seconds
            connection.close()
            del server.kept[worker]
    end = time.monotonic() + 60
    while len(server.kept) < 2:
        assert time.monotonic() < end, "one worker got all connections"
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        answer = talk(connection, method, path, payload, sent)
        if (worker := answer[1]["x-request-id"][:24]) in server.kept:
            connection.close()
        else:
            server.kept[worker] = connection
        answers.append(answer)
    return answers


def talk(connection, method, path, payload, headers):
    connection.request(method, path, payload, headers)
    answer = connection.getresponse()
    content, fields = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, fields, json.loads(content) if "json" in fields["content-type"] else content


def one(server, path, method="GET", body=None, headers=None):
    "The one body that both workers answer with 200."
    answers = both(server, path, method, body, headers)
    assert {status for status, _, _ in answers} == {200}, answers[0]
    bodies = {json.dumps(body, sort_keys=True) for _, _, body in answers}
    assert len(bodies) == 1, bodies
    return answers[0][2]


def new_database(server):
    name = f"shop_{next(database_numbers)}"
    server.psql(f"CREATE DATABASE {name}")
    return server.get_uri(database=name)


def until(condition, seconds=20):
    "Wait for something that another thread or process brings about."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def start_postgres(server):
    "Its own limit of ten seconds can be too short on a machine that has much else to do."
    for last in (False, False, True):
        try:
            return server.start()
        except (subprocess.SubprocessError, AssertionError):  # the second: it is there, and not ready yet
            if last:
                raise


def pairs_of_many_blocks() -> csr_matrix:
    "Confidences of so many users and items that both sides have several blocks of factors."
    draw = np.random.default_rng(3)
    pairs = np.unique(draw.integers(0, 9_000, 60_000) * 5_000 + draw.zipf(1.4, 60_000) % 5_000)
    values = draw.integers(1, 6, len(pairs)).astype(np.float32)
    return csr_matrix((values, divmod(pairs, 5_000)), shape=(9_000, 5_000))


# every kind of model, on one random log

SMALL = {"factors": 8, "regularization": 2.0, "iterations": 4, "num_threads": 1}
FEW = {"neighbours": 6, "num_threads": 1}  # so few that most items are nobody's neighbours


def read_only(matrix: csr_matrix) -> csr_matrix:
    "As a bundle maps it."
    for array in (matrix.data, matrix.indices, matrix.indptr):
        array.flags.writeable = False
    return matrix


def random_log(users: int, items: int, seed: int) -> Snapshot:
    """Popular and rare items, busy users and such with one item; user 0 has nothing, user 1 alone has the last item but
    one, and nobody has the last item."""
    rng = np.random.default_rng(seed)
    popularity, activity = 1 / np.arange(1, items + 1) ** 0.8, rng.lognormal(0, 1, users)
    chance = 12 * users * np.outer(activity, popularity) / (activity.sum() * popularity.sum())
    counts = rng.poisson(np.minimum(chance, 6)) * rng.integers(1, 4, (users, items))
    counts[0], counts[:, -2:], counts[1, [3, 7]] = 0, 0, 1
    counts[1, -2] = 5
    counts = csr_matrix(counts, dtype=np.float32)
    weights = (np.log1p(counts.data) * rng.uniform(0.5, 2, counts.nnz)).astype(np.float32)
    ages = rng.integers(0, 300, counts.nnz).astype(np.float32)
    values = (weights, counts.data, ages)
    matrices = (read_only(csr_of(counts.shape, counts.indptr.copy(), counts.indices.copy(), v)) for v in values)
    columns = {"item_columns": described_items(items, seed), "user_columns": described_users(users, seed)}
    spans = np.where(counts.data > 1, rng.integers(0, 300, counts.nnz), 0).astype(np.float32)
    spans = read_only(csr_of(counts.shape, counts.indptr.copy(), counts.indices.copy(), spans))
    return Snapshot(None, *matrices, **columns, span_days=spans)


def described_items(items: int, seed: int) -> dict:
    "Columns of every kind with gaps: texts, tags, numbers, yes and no, vectors; of the last item nothing is known."
    rng = np.random.default_rng(seed + 100)
    kinds = np.array(["coffee", "tea", "mug", "gift"], object)
    kind, known = rng.integers(0, 4, items), rng.random((6, items)) < 0.85
    known[:, -1] = False
    colours = rng.choice(["red", "blue", "grey"], items)
    columns = {
        "category": kinds[kind],
        "title": np.array([f"{colours[k]} {kinds[kind[k]]} no {k % 9}" for k in range(items)], object),
        "tags": np.array([f"{colours[k]}|{kinds[kind[k]]}|{k % 5}" for k in range(items)], object),
        "price": np.where(known[3], (3 * kind + rng.gamma(2, 2, items)).round(2), np.nan),
        "organic": rng.integers(0, 2, items).astype(bool).astype(object),
        "vector": (np.eye(4)[kind] + rng.normal(0, 0.3, (items, 4))).astype(np.float32),
        "available": np.full(items, None, object),
    }
    for place, name in enumerate(("category", "title", "tags", "price", "organic")):
        if name != "price":
            columns[name][~known[place]] = None
    columns["vector"][~known[5]] = np.nan
    return columns


def described_users(users: int, seed: int) -> dict:
    "What is told of users, with gaps; of user 0 nothing."
    rng = np.random.default_rng(seed + 200)
    known = rng.random((2, users)) < 0.8
    known[:, 0] = False
    town = np.array(["Rome", "Oslo", "Lima"], object)[rng.integers(0, 3, users)]
    return {
        "town": np.where(known[0], town, None),
        "age": np.where(known[1], rng.integers(18, 80, users), np.nan),
    }


def weights(task: str) -> BlendWeights:
    "What a training might have found; what the user had is of no use for a discovery."
    learned = [0.9, 0.4, 0.3, 0.5, 0.7, 1.1, 0.2, 0.6, 0.3, -0.1, -0.4]
    of_signal = {
        name: 0.0 if task == DISCOVERY and name in OWN else value for name, value in zip(SIGNALS, learned, strict=True)
    }
    return BlendWeights(of_signal, -3.0, 30.0, 60.0, {"users": 12})


def every_model() -> dict:
    "Not fitted, by a name for the test."
    models = {model.name: model for model in all_models(SMALL, half_life_days=20)}
    models |= {
        "low-pass": LowPass(12),
        "ChebyCF": ChebyCF(12),
        "ChebyCF by a polynomial": ChebyCF(0, order=8, item_power=0.5),
        "BPR": BPR(8, iterations=15),
        "EASE": EASE(40),
        "few cosines": ItemCosine(**FEW),
        "few BM25": ItemBM25(**FEW),
        "all equal to one": ALS(**SMALL | {"unobserved_weight": 0.3, "nu": 0.5, "solver": "rotated"}),
    }
    als, graph, bpr = models["ALS"], models["item graph"], models["BPR"]
    models["blend"] = ScoreBlend([models["weighted ALS"], graph], [0.7, 0.3])
    models["blend of blends"] = ScoreBlend([ScoreBlend([als, EASE(40)]), models["buy again"], ItemGraph(**FEW)])
    models["blend with BPR"] = ScoreBlend([bpr, als])
    for task in (DISCOVERY, NEXT_PURCHASE):
        for part in (als, graph, models["blend"], models["popularity"]):
            models[f"{part.name} + habits, {task}"] = HabitBlend(part, task, weights(task))
    return models


def ordered_models() -> dict:
    "Every family by the order of the histories, alone and inside of what is made of others."
    models = every_model() | {"content neighbours": ContentNeighbours(), "ALS + content": Hybrid(ALS(**SMALL))}
    plain = [name for name in models if "habits" not in name and "few" not in name]
    ordered = {f"{name}, by order": OrderWeighted(models[name], 0.8, 90) for name in plain}
    ordered["by step alone"] = OrderWeighted(models["transitions"], 0.5)
    ordered["by age alone"] = OrderWeighted(models["ALS"], half_life_days=40)
    als, following = OrderWeighted(models["weighted ALS"], 0.7), OrderWeighted(models["transitions"], 0.6)
    ordered["blend of ordered"] = ScoreBlend([als, following, models["item graph"]], [0.5, 0.3, 0.2])
    ordered["ordered + content"] = Hybrid(als)
    ordered["ordered blend + content"] = Hybrid(ordered["blend of ordered"], profile=1)
    for part in (als, ordered["blend of ordered"]):
        ordered[f"{part.name} + habits"] = HabitBlend(part, NEXT_PURCHASE, weights(NEXT_PURCHASE))
    return ordered


def described_models() -> dict:
    "Those that learn from what items are, over one model with factors, several, and none; for `random_log`."
    models = every_model()
    models["content neighbours"] = ContentNeighbours()
    made = {
        "content neighbours": models["content neighbours"],
        "ALS + content": Hybrid(models["ALS"]),
        "weighted ALS + content, jointly": Hybrid(models["weighted ALS"], joint=2),
        "blend + content, jointly": Hybrid(models["blend"], joint=1),
        "low-pass + content": Hybrid(models["low-pass"], item_evidence=10, level=0.75, profile=1.5),
        "BPR + content": Hybrid(models["BPR"], user_evidence=4, attributes=1, interaction_power=0.5),
        "blend + content": Hybrid(models["blend"], item_evidence=0, user_evidence=0),
        "blend of blends + content": Hybrid(models["blend of blends"], profile=0, attributes=0),
        "item-item cosine + content": Hybrid(models["few cosines"]),
        "popularity + content": Hybrid(models["popularity"], item_evidence=30),
        "content neighbours + content": Hybrid(models["content neighbours"]),
    }
    for task in (DISCOVERY, NEXT_PURCHASE):
        made[f"ALS + content + habits, {task}"] = HabitBlend(made["ALS + content"], task, weights(task))
    return made
