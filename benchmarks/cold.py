"""How good are the models where little is known: products without buyers, few buyers, people without a past?

    python benchmarks/cold.py citeulike FOLDER [--vectors FILE.npy]   (a public log of articles, with published figures)
    python benchmarks/cold.py groceries                               (the sample that `make data` writes)
    python benchmarks/cold.py cost                                    (seconds and memory on the same sample)
    [--models "ALS + content, weighted ALS + content"] [--quick] [--out benchmarks/results]

CITEULIKE. FOLDER holds train, warm_validation, warm_test, cold_validation and cold_test.parquet with the columns
user_id and item_id, and items.parquet with item_id and title; no item of the cold files is in train. FILE.npy has one
row of numbers for each row of items.parquet: sentence vectors of the titles, say; they are a dense column beside the
titles.
Cold: the candidates are all items that are not in train, without the user's own pairs of cold_validation; everybody in
cold_test is judged. Warm: the candidates are the items of train without the user's train items. NDCG@20 is binary with
its ideal cut at min(20, relevant).

GROCERIES. A year of baskets, split by time as examples/complete_journey.yaml has it, without a minimum of buyers: this
is the evaluation that `product-recs run` shows in its report. COST: what training and serving take on the same data,
with the parameters that GROCERIES has chosen; it wants a quiet machine.

Parameters are chosen on the validation files, or on the validation period, one after the other from the grids below,
and the test judges once. Models are found by their names.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from datetime import date
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pandas as pd
import serving
from scipy.sparse import csr_matrix
from tqdm import tqdm
from training_fit import forget_peak, memory

from product_recs.bundle.files import publish, write_bundle
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.errors import ProductRecsError
from product_recs.core.plots import curves
from product_recs.core.text import with_interval
from product_recs.data.artifact import open_features
from product_recs.data.snapshots import Snapshot
from product_recs.evaluation.cold import (
    CATALOGUE,
    IN_BAND,
    NEW_ITEMS,
    NEW_USERS,
    PLACES,
    SOLD,
    Cold,
    catalogue_past,
    cold_verdicts,
    crossover,
    evaluate_cold,
    judge_guests,
    lists_among,
)
from product_recs.evaluation.metrics import bootstrap_means, compared, find_hits, interval, paired_bootstrap
from product_recs.features import build_features
from product_recs.ingest import ingest
from product_recs.models.all import all_models, fit_sharing, named
from product_recs.models.als import ALS, WeightedALS
from product_recs.models.interface import Model, recipe, size_of

SAMPLE = 1000  # people by whom parameters are chosen
ROOT = Path(__file__).resolve().parents[1]
SERVE = [sys.executable, "-c", "from product_recs.web.server import serve; serve()"]
MODELS = "ALS, weighted ALS, content neighbours, ALS + content, weighted ALS + content"
# parameter -> values; of a description also by what it is chosen: items with buyers, items without, items with few of
# them, or people without a past; one after the other, and all of it twice
ALS_GRID = {
    "ALS": {"alpha": (10.0, 20.0, 40.0, 80.0), "regularization": (2.0, 5.0, 10.0, 20.0), "factors": (128, 256)},
    "weighted ALS": {
        "regularization": (0.001, 0.002, 0.003, 0.006, 0.01),
        "unobserved_weight": (0.01, 0.02, 0.03, 0.06),
        "factors": (128, 256),
    },
}
START = {
    "ALS": {"factors": 128, "regularization": 5.0, "alpha": 40.0, "iterations": 10, "seed": 0},
    "weighted ALS": {
        "factors": 128, "regularization": 0.003, "alpha": 1.0, "iterations": 10, "seed": 0, "nu": 1.0,
        "unobserved_weight": 0.03,
    },
}  # fmt: skip
CONTENT_GRID = {
    "joint": ("all", (0.0, 2.0)),
    "ridge": ("cold", (0.1, 0.3, 1.0)),
    "profile": ("cold", (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)),
    "item_evidence": ("few", (0.0, 0.5, 1.0, 3.0)),
    "attributes": ("people", (0.0, 0.5)),
    "user_evidence": ("people", (1.0, 10.0, 30.0)),
}
LEARNED = ("joint", "ridge")  # what the arrays of a fit depend on
# P@20, NDCG@20 of the same cold protocol, but for the users
PUBLISHED = [
    ("DropoutNet", 0.0407, 0.1180, "300 features of the texts"),
    ("GAR", 0.0429, 0.1260, "300 features of the texts"),
    ("Heater", 0.0449, 0.1326, "300 features of the texts"),
]
SOURCE = "tables in the README of GAR (SIGIR 2022), which judges 2,000 of the users"
CUTS = (("precision", 20), ("ndcg", 20), ("recall", 20), ("recall", 100))
# of examples/complete_journey.yaml, with all products, however few their buyers
GROCERIES = dict(
    event_weights={"purchase": 1.0}, weighting="log1p", validation_from="2017-09-01", test_from="2017-11-01"
)
GROCERY_ALS = dict(factors=128, regularization=21.45, alpha=0.9967, iterations=20, seed=0)


def changed(model: Model, **parameters) -> Model:
    "The same kind of model with other parameters."
    return type(model)(*model.parts, **{**model.parameters, **parameters})


def model_of(name: str, als: dict, content: dict) -> Model:
    "A model by its name, whose ALS has the parameters that were chosen; raises `ProductRecsError` for an unknown one."
    known = [model for model in all_models(als.get("ALS")) if model.name != "weighted ALS"]
    made = named(name, [*known, WeightedALS(**als.get("weighted ALS", {}))])
    return changed(made, **content.get(name, {})) if content.get(name) else made


def chosen(start: dict, grid: dict, judged, rounds: int = 2) -> dict:
    """The best of a grid, one parameter after the other; `judged(parameters, name)` is a figure, by what the parameter
    of that name is chosen."""
    best, seen = dict(start), {}

    def figure(parameters: dict, name: str) -> float:
        key = (json.dumps(parameters, sort_keys=True), name)
        if key not in seen:
            seen[key] = judged(parameters, name)
        return seen[key]

    for _ in range(rounds):
        before = dict(best)
        for name, values in grid.items():
            best[name] = max(values, key=lambda value: figure({**best, name: value}, name))
        if best == before:
            break
    return best


def fit_apart(model: Model, snapshot: Snapshot, fitted: dict) -> Model:
    """Fit a model. Its parts are kept in `fitted` for the next one of the same parts, and of models with parts the last
    one: another that would learn the same takes its arrays."""
    key = json.dumps([recipe(model.parts[0]), [model.parameters.get(name) for name in LEARNED]] if model.parts else [])
    if key != "[]" and fitted.get("last", ("",))[0] == key:
        twin = fitted["last"][1]
        return changed(model).from_arrays(twin.to_arrays(), snapshot, twin.parts)
    fitted.pop("last", None)
    learned = fit_sharing(model, snapshot, fitted)
    for name in [name for name, trained in fitted.items() if trained.parts]:
        del fitted[name]
    if model.parts:
        fitted["last"] = key, learned
    return learned


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(out: Path, name: str, text: str, figures: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    (out / f"{name}.json").write_text(json.dumps(figures, indent=2, default=float) + "\n", encoding="utf-8")
    print(f"{text}\nWritten to {out / name}.md and {name}.json")


# ------------------------------------------------------------------------------------------- articles with cold items


class Articles:
    "The five files as matrices, and the two protocols."

    def __init__(self, folder: Path, vectors: Path | None):
        names = ("train", "warm_validation", "warm_test", "cold_validation", "cold_test")
        for name in (*names, "items"):
            if not (folder / f"{name}.parquet").exists():
                sys.exit(f"{folder / name}.parquet: the file is missing; see the head of {Path(__file__).name}")
        pairs = {name: pd.read_parquet(folder / f"{name}.parquet")[["user_id", "item_id"]] for name in names}
        table = pd.read_parquet(folder / "items.parquet")
        dense = None
        if vectors is not None:
            dense = np.load(vectors).astype(np.float32)
            if dense.ndim != 2 or len(dense) != len(table):
                sys.exit(f"{vectors}: {dense.shape} numbers for {len(table):,} rows of items.parquet")
            dense = dense[np.argsort(table.item_id.to_numpy(), kind="stable")]
        table = table.sort_values("item_id", kind="stable")
        users, items = np.unique(np.concatenate([part.user_id for part in pairs.values()])), table.item_id.to_numpy()

        def matrix(part: pd.DataFrame) -> csr_matrix:
            places = np.searchsorted(users, part.user_id), np.searchsorted(items, part.item_id)
            return csr_matrix((np.ones(len(part), np.float32), places), shape=(len(users), len(items)))

        self.pairs = {name: matrix(part) for name, part in pairs.items()}
        train = self.pairs["train"]
        ages = train.copy()
        ages.data = np.zeros_like(train.data)
        columns = {"title": table.title.to_numpy(object)} | ({} if dense is None else {"vector": dense})
        self.snapshot = Snapshot(None, train, train, ages, item_columns=columns)
        self.warm = self.snapshot.popularity > 0
        cold = np.concatenate([self.pairs["cold_validation"].indices, self.pairs["cold_test"].indices])
        if self.warm[cold].any():
            sys.exit("items of the cold files are in train; these are not the files of a cold protocol")

    def hits(self, model: Model, which: str):
        "Hits of a fitted model by one of the files."
        targets, warm = self.pairs[which], which.startswith("warm")
        rows = np.flatnonzero(np.diff(targets.indptr))
        if which.endswith("validation") and len(rows) > SAMPLE:  # the same people for all that is compared
            rows = np.sort(np.random.default_rng(0).choice(rows, SAMPLE, replace=False))
        own = self.pairs["cold_validation"] if which == "cold_test" else self.pairs["train"]
        most = max(k for _, k in CUTS)
        [lists] = lists_among(model, [(rows, self.warm == warm)], most, own)
        return find_hits(lists, targets[rows])


def citeulike(options) -> None:
    articles = Articles(options.folder, options.vectors)
    fitted, als, content, rows = {}, {}, {}, []
    grid = {name: (values if not options.quick else {"factors": (128,)}) for name, values in ALS_GRID.items()}

    def figure(model: Model, which: str) -> float:
        learned = fit_apart(model, articles.snapshot, fitted)
        return float(articles.hits(learned, f"{which}_validation").metric("ndcg", 20).mean())

    for kind in (ALS, WeightedALS):
        name = kind.name
        als[name] = chosen(START[name], grid[name], lambda given, _, kind=kind: figure(kind(**given), "warm"))
        fitted.clear()
        print(f"{name}: {als[name]}", file=sys.stderr)
    names = [name.strip() for name in options.models.split(",")]
    for name in (bar := tqdm(names, unit="model")):
        bar.set_postfix_str(name)
        model = model_of(name, als, {})
        on_top = (
            {}
            if options.quick
            else {p: v for p, (by, v) in CONTENT_GRID.items() if p in model.parameters and by != "people"}
        )
        if on_top and model.parts:
            content[name] = chosen(
                {p: model.parameters[p] for p in on_top},
                on_top,
                lambda given, p, model=model: figure(
                    changed(model, **given), "cold" if CONTENT_GRID[p][0] == "cold" else "warm"
                ),
                rounds=1,
            )
            print(f"{name}: {content[name]}", file=sys.stderr)
        rows.append(judged(articles, model_of(name, als, content), als, content))
    text, figures = articles_page(articles, rows, options)
    write(options.out, "cold-citeulike" if options.vectors is None else "cold-citeulike-vectors", text, figures)


def judged(articles: Articles, model: Model, als: dict, content: dict) -> dict:
    "Figures on both test files, and what the fit took."
    started = time.perf_counter()
    fitted = model.fit(articles.snapshot)
    seconds = time.perf_counter() - started
    hits = {which: articles.hits(fitted, f"{which}_test") for which in ("cold", "warm")}
    parameters = {name: value for name, value in als.items() if name in model.name.split(" + ")}
    return {"model": model.name, "seconds": seconds, "hits": hits, "megabytes": size_of(fitted) / 1e6,
            "parameters": {**parameters, **content.get(model.name, {})}}  # fmt: skip


def articles_page(articles: Articles, rows: list[dict], options) -> tuple[str, dict]:
    "The page in Markdown, and its figures."
    models = []
    for row in rows:
        entry = {"model": row["model"], "parameters": row["parameters"], "fit_seconds": row["seconds"],
                 "megabytes": row["megabytes"]}  # fmt: skip
        for which, hits in row["hits"].items():
            values = np.column_stack([hits.metric(name, k) for name, k in CUTS])
            low, high = interval(bootstrap_means(values, 1000, 0))
            entry[which] = {"users": len(values)} | {
                f"{name}@{k}": [float(values[:, column].mean()), float(low[column]), float(high[column])]
                for column, (name, k) in enumerate(CUTS)
            }
        models.append(entry)
    titles = "titles" if options.vectors is None else "titles and vectors"

    def shown(entry: dict, which: str, metric: str) -> str:
        return with_interval(*entry[which][metric], places=4)

    cold = [
        (entry["cold"]["ndcg@20"][0], [f"**{entry['model']}**", titles if "content" in entry["model"] else "none",
         *(shown(entry, "cold", m) for m in ("precision@20", "ndcg@20", "recall@20", "recall@100"))])
        for entry in models
    ]  # fmt: skip
    cold += [(ndcg, [name, what, f"{p:.4f}", f"{ndcg:.4f}", "", ""]) for name, p, ndcg, what in PUBLISHED]
    cold = [line for _, line in sorted(cold, key=lambda pair: -pair[0])]
    warm = [[f"**{entry['model']}**", *(shown(entry, "warm", m) for m in ("ndcg@20", "recall@20")),
             f"{entry['fit_seconds']:.1f}", f"{entry['megabytes']:.1f}"] for entry in models]  # fmt: skip
    sentences = [line for row in rows for line in against_its_part(row, rows)]
    parts = articles.pairs
    text = f"""# CiteULike-a with cold items

{parts["train"].shape[0]:,} users, {parts["train"].shape[1]:,} articles, of which {int((~articles.warm).sum()):,} are
cold: nobody has them in the {parts["train"].nnz:,} pairs of the training. Models of this project are bold; parameters
were chosen on the validation files alone. In brackets: 95 % intervals over users. What an article is known by:
{titles}; no tags, since those who saved an article wrote them.

## Cold: {models[0]["cold"]["users"]:,} users, candidates are the articles that nobody has

{markdown(["model", "content", "P@20", "NDCG@20", "Recall@20", "Recall@100"], cold)}
Published figures: {SOURCE}.

## Warm: {models[0]["warm"]["users"]:,} users, candidates are the articles of the training

{markdown(["model", "NDCG@20", "Recall@20", "fit, seconds", "MB"], warm)}
{"".join(f"- {sentence}.{chr(10)}" for sentence in sentences)}
## Parameters

{"".join(f"- {entry['model']}: {json.dumps(entry['parameters'])}{chr(10)}" for entry in models)}
Measured {date.today().isoformat()}: `make bench-cold DATA=FOLDER{" VECTORS=FILE.npy" if options.vectors else ""}`.
"""
    return text, {"measured": date.today().isoformat(), "content": titles, "models": models}


def against_its_part(row: dict, rows: list[dict]) -> list[str]:
    "A model with content beside the same without it, on warm items."
    without = row["model"].removesuffix(" + content")
    part = next((other for other in rows if other["model"] == without != row["model"]), None)
    if part is None:
        return []
    values = [side["hits"]["warm"].metric("ndcg", 20) for side in (row, part)]
    return [f"Warm: {compared(row['model'], without, paired_bootstrap(*values), 'NDCG@20')}"]


# ----------------------------------------------------------------------------------------------------------- groceries


def grocery_features(folder: Path):
    source = ROOT / "data/complete_journey"
    if not (source / "interactions.csv").exists():
        sys.exit(f"{source}: the sample is missing; write it with make data")
    ingest(
        source / "interactions.csv", folder / "run", products=source / "products.csv", users=source / "users.csv",
        progress=False,
    )  # fmt: skip
    return build_features(folder / "run", folder / "features", **GROCERIES)


def grocery_content(features, name: str, als: dict, quick: bool) -> dict:
    """Parameters of the description, on the validation period: by recall@50 of products without buyers, or with 1 to 20
    of them, or NDCG@20 of people without a past."""
    model = model_of(name, als, {})
    grid = {p: v for p, (_, v) in CONTENT_GRID.items() if p in model.parameters}
    if quick or not grid or not model.parts:
        return {}
    past, future, since = catalogue_past(features, "validation")
    few = (past.popularity > 0) & (past.popularity <= 20)
    among = {"cold": past.popularity == 0, "few": few, "all": past.popularity > 0}
    new_to_them = csr_matrix((future > 0) - (future > 0).multiply(past.counts > 0)).astype(np.float32)
    people = np.flatnonzero((np.diff(past.counts.indptr) > 0) & (np.diff(future.indptr) > 0))
    rows = np.sort(np.random.default_rng(0).choice(people, min(SAMPLE, len(people)), replace=False))
    fitted = {}

    def figure(given: dict, parameter: str) -> float:
        by, trial = CONTENT_GRID[parameter][0], changed(model, **given)
        if by == "people":
            judged = judge_guests(features, past, since, [trial], until=GROCERIES["test_from"], guests=300, bootstrap=1)
            ndcg = judged.table[judged.table.metric == "ndcg"]
            return float(ndcg.value.mean())
        [lists] = lists_among(fit_apart(trial, past, fitted), [(rows, among[by])])
        return float(find_hits(lists, new_to_them[rows].multiply(among[by])).metric("recall", 50).mean())

    return chosen({p: model.parameters[p] for p in grid}, grid, figure, rounds=1)


def groceries(options) -> None:
    names = [name.strip() for name in options.models.split(",")]
    als = {"ALS": GROCERY_ALS, "weighted ALS": GROCERY_ALS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        features = grocery_features(folder)
        content = {name: grocery_content(features, name, als, options.quick) for name in names}
        print(json.dumps(content), file=sys.stderr)
        models = [model_of(name, als, content) for name in names]
        cold = evaluate_cold(features, models, max_users=500 if options.quick else 0)
    own = next((name for name in reversed(names) if name.endswith("+ content")), names[0])
    pictures = draw(cold, own, names, options.out)
    text, figures = groceries_page(cold, own, names, content, pictures)
    write(options.out, "cold-groceries", text, figures)


def costs(options) -> None:
    "What ALS costs alone, and with content."
    file, names, als = options.out / "cold-groceries.json", ["ALS", "ALS + content"], {"ALS": GROCERY_ALS}
    if not file.exists():
        sys.exit(f"{file}: the parameters of the description are missing; run groceries first")
    content = json.loads(file.read_text(encoding="utf-8"))["content"]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        features = grocery_features(folder)
        spent = [cost(features, name, als, content, folder) for name in names]
        asked = [served(features, name, als, content, folder) for name in names]
    figures = {"measured": date.today().isoformat(), "load_before": load, "costs": spent, "served": asked}
    write(options.out, "cold-cost", costs_page(spent, asked, content, load), figures)


def costs_page(costs: list[dict], asked: list[dict], content: dict, load: float) -> str:
    spent = [[f"**{row['model']}**", f"{row['seconds']:.1f}", f"{row['peak_mb'] - row['before_mb']:.0f}",
              f"{row['model_mb']:.0f}", f"{row['list_ms']:.2f}"] for row in costs]  # fmt: skip
    rates = [[f"**{row['model']}**", *(f"{row[key]:.0f}" for key in ("similar_cold", "similar_warm", "guest")),
              f"{row['memory_mb']:.0f}"] for row in asked]  # fmt: skip
    head = ["model", "/similar, no buyers", "/similar, with buyers", "/recommend, guest with attributes", "memory, MB"]
    return f"""# Groceries: what placing new products costs

The sample of the Complete Journey, all products, {GROCERY_ALS["factors"]} factors. A fit on everything known, in a
process of its own: seconds, memory on top of the data, size of what was learned, and milliseconds of one list.

{markdown(["model", "seconds", "memory, MB", "learned, MB", "list, ms"], spent)}
One worker of the service without a cache, requests a second on one connection; memory is that of the worker after
them.

{markdown(head, rates)}
Parameters of the description, as [cold-groceries.md](cold-groceries.md) chose them: {json.dumps(content)}. Measured
{date.today().isoformat()} on {os.cpu_count()} cores, load before {load:.1f}: `python benchmarks/cold.py cost`, the last
part of `make bench-cold`.
"""


def in_child(arguments: list[str]) -> dict:
    "What a process of its own says in its last line."
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ProductRecsError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def cost(features, name: str, als: dict, content: dict, folder: Path) -> dict:
    "Seconds and the peak of memory of a fit on everything, in a process of its own."
    given = json.dumps({"als": als, "content": content})
    return {"model": name} | in_child(["fit", str(features.path), name, given])


def fit(options) -> None:
    "The inner command: fit a model on everything that the features have, and say what that took."
    given, features = json.loads(options.given), open_features(Path(options.features))
    forget_peak()
    before = memory("VmRSS")
    started = time.perf_counter()
    fitted = model_of(options.name, given["als"], given["content"]).fit(features.all)
    seconds = time.perf_counter() - started
    peak = memory("VmHWM")
    users, times = fitted.snapshot.counts.shape[0], []
    for row in np.random.default_rng(0).choice(users, 200):
        started = time.perf_counter()
        fitted.top(fitted.users(np.array([row])), 10, fitted.snapshot.counts[[row]])
        times.append(1e3 * (time.perf_counter() - started))
    print(json.dumps({"seconds": seconds, "before_mb": before, "peak_mb": peak, "model_mb": size_of(fitted) / 1e6,
                      "list_ms": statistics.median(times)}))  # fmt: skip


def served(features, name: str, als: dict, content: dict, folder: Path, seconds: float = 5.0) -> dict:
    "Requests a second, one after the other, of one worker without a cache, and its memory."
    fitted = model_of(name, als, content).fit(features.all)
    models_dir = folder / f"served {name}"
    path = write_bundle(
        models_dir, models={DISCOVERY: fitted, NEXT_PURCHASE: "it is not measured"}, snapshot=features.all,
        users=features.users, items=features.items, user_columns=features.user_columns,
        item_columns=features.item_columns, parameters={"features": features.parameters}, data={}, metrics={},
        cold_items=features.cold_items, cold_users=features.cold_users,
    )  # fmt: skip
    publish(models_dir, path.name)
    cold_ids = pd.read_parquet(features.cold_items).item_id.sample(300, random_state=0).tolist()
    warm_ids = [features.items[int(row)] for row in np.random.default_rng(0).choice(len(features.items), 300)]
    people = pd.read_csv(ROOT / "data/complete_journey/users.csv").drop(columns="user_id").astype(object)
    guests = [{k: v for k, v in row.items() if v == v} for row in people.sample(300, random_state=0).to_dict("records")]
    process, port = serving.start(SERVE, folder, models_dir=models_dir, database_url="", cache_size=0, workers=1)
    try:
        similar = lambda item: ("GET", f"/similar/{urllib.parse.quote(str(item))}", None)
        guest = lambda about: ("POST", "/recommend", json.dumps({"attributes": about}))
        result = {
            "model": name,
            "similar_cold": rate(port, [similar(item) for item in cold_ids], seconds),
            "similar_warm": rate(port, [similar(item) for item in warm_ids], seconds),
            "guest": rate(port, [guest(about) for about in guests], seconds),
            "memory_mb": serving.memory(process),
        }
    finally:
        serving.stop(process)
    return result


def rate(port: int, questions: list[tuple], seconds: float) -> float:
    "Questions a second on one connection, the first fifty not counted."
    connection, asked, started = HTTPConnection("127.0.0.1", port), 0, 0.0
    while not started or time.perf_counter() - started < seconds:
        method, path, body = questions[asked % len(questions)]
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise ProductRecsError(f"{method} {path}: {answer.status} {text[:300]!r}")
        asked += 1
        if asked == 50:
            started = time.perf_counter()
    return (asked - 50) / (time.perf_counter() - started)


def draw(cold: Cold, own: str, names: list[str], out: Path) -> list[str]:
    "The pictures of the crossover; their files."
    out.mkdir(parents=True, exist_ok=True)
    part, files = own.removesuffix(" + content"), []
    others = (part, "content neighbours", "popularity in the category")
    beside = [name for name in others if name in cold.models(CATALOGUE)]
    for what, where, metric, k, along, title in (
        ("band", IN_BAND, "recall", 50, "buyers before the split, from", "Recall@50 among the items of a band"),
        ("catalogue", CATALOGUE, "recall", 50, "buyers before the split, from", "Recall@50 in the whole catalogue"),
        ("people", NEW_USERS, "ndcg", 20, "events that are known", "NDCG@20 of new users"),
    ):
        lines, ticks = crossover(cold, where, metric, k)
        if len(ticks) < 2:
            continue
        picture = curves({"": lines}, along, title.split()[0], title, [own, *beside], log=True, ticks=ticks)
        (out / f"cold-groceries-{what}.png").write_bytes(picture.png())
        files.append(f"cold-groceries-{what}.png")
    return files


def groups_table(cold: Cold, part: str, metric: str, k: int, groups: list[str]) -> str:
    "Models in rows, groups in columns, with intervals."
    rows = cold.table[(cold.table.part == part) & (cold.table.metric == metric) & (cold.table.k == k)]
    present = [group for group in groups if group in set(rows.group)]
    cells = {(row.model, row.group): with_interval(row.value, row.low, row.high, 4) for row in rows.itertuples()}
    sizes = {row.group: row for row in rows.drop_duplicates("group").itertuples()}
    head = ["model", *(f"{group} ({sizes[group].users:,} users)" for group in present)]
    return markdown(head, [[f"**{model}**", *(cells.get((model, group), "") for group in present)]
                           for model in cold.models(part)])  # fmt: skip


def groceries_page(cold: Cold, own: str, names, content, pictures) -> tuple[str, dict]:
    part = own.removesuffix(" + content")
    bands, lengths = list(cold.facts["bands"]), list(cold.facts.get("events", {}))
    items, people = ("popularity in the category", "content neighbours"), ("popularity", part)
    beside = {NEW_ITEMS: items, IN_BAND: items, CATALOGUE: (part,), NEW_USERS: people}
    sentences = [
        said
        for rival in dict.fromkeys((*items, *people))
        for said in cold_verdicts(cold, own, [rival])
        if rival in beside[said[1]["part"]]
    ]
    sentences.sort(key=lambda said: list(beside).index(said[1]["part"]))
    new = cold.table[cold.table.part == NEW_ITEMS].iloc[0]
    text = f"""# Groceries: few buyers, no buyers, no past

The sample of the Complete Journey, split at {cold.facts["split"][:10]}; attributes are title, category, department,
brand and manufacturer of the products, and those of the third of the households that told them. In brackets: 95 %
intervals over users. The data is simulated or comes from a retailer, its sources disagree; it serves to compare
methods.

{"".join(f"- {note}{chr(10)}" for note in cold.notes)}
## New products

{new.users:,} users took {new.targets:,} times one of the {new.candidates:,} products that nobody had before the split;
*sold later* are those that somebody took afterwards, which nobody could know then. Recall@50:

{groups_table(cold, NEW_ITEMS, "recall", 50, ["all", SOLD])}
NDCG@20:

{groups_table(cold, NEW_ITEMS, "ndcg", 20, ["all", SOLD])}

## By buyers before the split

Recall@50 among the items of the band:

{groups_table(cold, IN_BAND, "recall", 50, bands)}
Recall@50 in the whole catalogue:

{groups_table(cold, CATALOGUE, "recall", 50, bands)}
Share of the first 20 places that the band gets:

{groups_table(cold, CATALOGUE, PLACES, 20, bands)}
NDCG@20 in the whole catalogue, all targets:

{groups_table(cold, CATALOGUE, "ndcg", 20, ["all"])}
## New users, by the events that are known

NDCG@20:

{groups_table(cold, NEW_USERS, "ndcg", 20, lengths)}
Recall@50:

{groups_table(cold, NEW_USERS, "recall", 50, lengths)}
{"".join(f"![]({file}){chr(10)}{chr(10)}" for file in pictures)}
## In words

{"".join(f"- {sentence}{chr(10)}" for sentence in dict.fromkeys(sentence for sentence, _ in sentences))}
Parameters of the description, chosen on the validation period: {json.dumps(content)}.
Measured {date.today().isoformat()} on {os.cpu_count()} cores: `make bench-cold`.
"""
    table = cold.table.to_dict("records")
    figures = {"measured": date.today().isoformat(), "facts": cold.facts, "table": table, "content": content,
               "comparisons": [comparison for _, comparison in sentences]}  # fmt: skip
    return text, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {name: commands.add_parser(name) for name in ("citeulike", "groceries", "cost", "fit")}
    parts["citeulike"].add_argument("folder", type=Path)
    parts["citeulike"].add_argument("--vectors", type=Path, default=None)
    for name in ("citeulike", "groceries"):
        parts[name].add_argument("--models", default=MODELS)
        parts[name].add_argument("--quick", action="store_true", help="no search of parameters, fewer users")
        parts[name].add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parts["cost"].add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    for argument in ("features", "name", "given"):
        parts["fit"].add_argument(argument)
    options = parser.parse_args()
    try:
        {"citeulike": citeulike, "groceries": groceries, "cost": costs, "fit": fit}[options.command](options)
    except ProductRecsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
