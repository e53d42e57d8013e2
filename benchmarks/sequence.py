"""What comes next? This project's models on a public log of sequences, beside published figures.

    python benchmarks/sequence.py FOLDER [--served] [--users 5000] [--out benchmarks/results]

FOLDER holds interactions.parquet with the columns user_id, item_id and position (order in time, from 0; or timestamp).
Protocol of the papers on sequences: the last item of each user is the test and the one before it the validation; all
items that the user has not had are ranked, none is sampled; HR@10 and NDCG@10 are means over all users with three
items or more.

Parameters are chosen on the validation items of --users of the users, with everything before them known: one parameter
after the other takes the best of a few values, until none gets better. Then each model learns from all that comes
before the last items, and these judge it, once. --served writes the models into a bundle, starts the service, and asks
POST /recommend for guests whose history is the session of the request: the lists of 500 users must be those that were
judged. The table goes to standard output and to sequence-FOLDER.md in --out, the figures to a JSON file beside it.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
import urllib.request
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from public import Choosing, metrics_of, read_log
from scipy.sparse import csr_matrix
from serving import SERVE, start, stop
from tqdm import tqdm

from product_recs.bundle.files import publish, write_bundle
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.ids import IdTable
from product_recs.data.snapshots import Snapshot
from product_recs.evaluation.competition import Fits, answer_ms
from product_recs.evaluation.metrics import bootstrap_means, interval
from product_recs.models.als import ALS
from product_recs.models.baselines import Popularity
from product_recs.models.blend import ScoreBlend
from product_recs.models.interface import Model, size_of, top_lists
from product_recs.models.item_item import ItemGraph
from product_recs.models.order import OrderWeighted
from product_recs.models.transitions import Transitions

K = 10
# HR@10, NDCG@10 with full ranking as published for the sequences of Amazon Beauty (22,363 users, 12,101 items, 198,502
# rows)
S3_REC = "README of S3-Rec (CIKM 2020)"
PUBLISHED = [
    ("popularity", 0.0152, 0.0068, S3_REC),
    ("GRU4Rec", 0.0283, 0.0137, S3_REC),
    ("BERT4Rec", 0.0347, 0.0170, S3_REC),
    ("HGN", 0.0512, 0.0266, S3_REC),
    ("SASRec", 0.0605, 0.0318, S3_REC),
    ("S3-Rec", 0.0647, 0.0327, S3_REC),
]
BEAUTY = (22_363, 12_101, 198_502)


def read(folder: Path) -> pd.DataFrame:
    "The log with users and items as rows, and how many items of its user come after each; sequences in order."
    path = folder / "interactions.parquet"
    remedy = "name a folder with interactions.parquet (make bench-sequence DATA=...)"
    columns = pq.read_schema(path).names if path.exists() else []
    order = "timestamp" if "timestamp" in columns and "position" not in columns else "position"
    log = read_log(path, ["user_id", "item_id", order], remedy)
    log = log.sort_values(["user_id", order], kind="stable").drop_duplicates(["user_id", "item_id"], keep="last")
    log = log[log.groupby("user_id").item_id.transform("size") >= 3]
    users, items = (pd.factorize(log[column], sort=True)[0] for column in ("user_id", "item_id"))
    after = log.groupby("user_id").cumcount(ascending=False).to_numpy()
    return pd.DataFrame({"user": users, "item": items, "item_id": log.item_id.to_numpy(), "after": after})


def split(log: pd.DataFrame, held: int) -> tuple[Snapshot, csr_matrix]:
    "What comes before the item that is `held` from the end, as if each step were a day; and that item."
    shape = log.user.max() + 1, log.item.max() + 1
    past, target = log[log.after >= held], log[log.after == held - 1]

    def matrix(rows: pd.DataFrame, values: np.ndarray) -> csr_matrix:
        matrix = csr_matrix((values.astype(np.float32), (rows.user, rows.item)), shape=shape)
        matrix.sort_indices()
        return matrix

    ones, ages = matrix(past, np.ones(len(past))), matrix(past, past.after.to_numpy() - held)
    return Snapshot(None, ones, ones, ages), matrix(target, np.ones(len(target)))


STEPS = {"step_decay": (0.7, 0.5, 0.85)}
FAMILIES = {
    "item graph": (
        ItemGraph,
        {"from_power": (0.3, 0.5, 0.1), "to_power": (0.3, 0.2, 0.1), "user_power": (0.25, 0.5, 0.75)},
    ),
    "ALS": (ALS, {"regularization": (30.0, 100.0), "alpha": (33.0,), "factors": (256,), "iterations": (8,)}),
    "transitions": (
        Transitions,
        {
            "from_power": (0.3, 0.1, 0.5),
            "to_power": (0.1, 0.0, 0.2),
            "user_power": (0.5, 0.25, 0.75),
            "distance_decay": (0.85, 0.7, 0.95),
            "window": (20, 50),
        },
    ),
}
SHARES = ((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.5, 0.3, 0.2), (0.8, 0.2, 0.0), (0.7, 0.3, 0.0), (0.8, 0.0, 0.2))


def chosen_models(choosing: Choosing) -> list[tuple[Model, str]]:
    "All rows of the table, not fitted, and how their parameters came about."
    plain, ordered = [(Popularity(), ""), (ALS(), "defaults"), (Transitions(), "defaults")], []
    for name, (kind, grid) in FAMILIES.items():

        def make(step_decay: float, kind: type = kind, **own) -> Model:
            return OrderWeighted(kind(**own), step_decay)

        best = choosing.best(name, make, STEPS | grid)
        words = ", ".join(f"{key} {value:g}" for key, value in best.items() if key != "step_decay")
        plain.append((make(**best | {"step_decay": 1.0}), words))
        ordered.append((make(**best), "the same"))
    graph, als, following = (model for model, _ in ordered)

    def blend(shares: tuple) -> Model:
        members = [(model, share) for model, share in zip((following, als, graph), shares) if share]
        return ScoreBlend(*zip(*members))

    return [*plain, *ordered, (blend(**choosing.best("blend", blend, {"shares": SHARES})), "of the rows above")]


def served_lists(models: list[Model], snapshot: Snapshot, item_ids: np.ndarray, users: np.ndarray, log: pd.DataFrame):
    "The lists that a running service gives to guests, whose session is the history of a user; one row a user."
    for model in models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            version = write_bundle(
                folder / "models", models={DISCOVERY: model, NEXT_PURCHASE: "no baskets"}, snapshot=snapshot,
                users=IdTable(np.arange(1, snapshot.counts.shape[0] + 1)), items=IdTable(item_ids), user_columns={},
                item_columns={"popularity": snapshot.popularity}, parameters={}, data={}, metrics={},
            )  # fmt: skip
            publish(folder / "models", version.name)
            database = f"sqlite:///{folder}/feedback.db"
            process, port = start(SERVE, folder, models_dir=folder / "models", database_url=database, max_batch=1000)
            try:
                lists, times = [], []
                for user in tqdm(users, desc=f"{model.name} over HTTP", unit=" lists", leave=False):
                    session = [{"item_id": int(item), "event": "purchase"} for item in log.loc[[user], "item_id"]]
                    body = json.dumps({"events": session, "n": K}).encode()
                    request = urllib.request.Request(
                        f"http://127.0.0.1:{port}/recommend", body, {"Content-Type": "application/json"}
                    )
                    started = time.perf_counter()
                    with urllib.request.urlopen(request) as answer:
                        result = json.load(answer)["results"][0]
                    times.append(time.perf_counter() - started)
                    lists.append(result["recommendations"])
                yield model, lists, 1000 * float(np.median(times))
            finally:
                stop(process)


def markdown(rows: list[dict], facts: dict) -> str:
    "The page."
    served = any("served" in row for row in rows)
    lines = [
        "# What comes next",
        "",
        f"The log `{facts['folder']}`: {facts['users']:,} users, {facts['items']:,} items, {facts['pairs']:,} pairs. "
        "The last item of each user is the test, the one before it the validation; all items that the user has not "
        "had are ranked. Parameters were chosen by NDCG@10 of the validation items of "
        f"{facts['chosen_on']:,} users, each model by step, and the test judged each row once. "
        "Rows without a step have the parameters that were chosen with it.",
        "",
        f"Made by `{facts['command']}` on {facts['date']}; the choice took {facts['choice_seconds']:.0f} s. Times are "
        "wall clock, beside whatever else the machine did.",
        "",
        "| model | HR@10 | NDCG@10 | 95 % interval of NDCG@10 | fit, s | ms a user | MB |"
        + (" over HTTP |" if served else "") + " parameters |",
        "|---|---|---|---|---|---|---|" + "---|" * (1 + served),
    ]  # fmt: skip
    for row in rows:
        line = (
            f"| {row['model']} | {row['hit_rate']:.4f} | **{row['ndcg']:.4f}** | {row['low']:.4f} to {row['high']:.4f} "
            f"| {row['seconds']:.1f} | {row['ms']:.1f} | {row['megabytes']:.1f} |"
        )
        lines.append(line + (f" {row.get('served', '')} |" if served else "") + f" {row['parameters']} |")
    if facts["published"]:
        lines += ["", "Published, with the same protocol:", "", "| model | HR@10 | NDCG@10 | source |"]
        lines.append("|---|---|---|---|")
        lines += [f"| {name} | {hit:.4f} | {ndcg:.4f} | {source} |" for name, hit, ndcg, source in PUBLISHED]
    if served:
        lines += [
            "",
            "Over HTTP: the list of a guest whose session is the history of the user, from `POST /recommend`; equal "
            "lists of how many users, and the milliseconds of a request, its way included.",
        ]
    return "\n".join(lines) + "\n"


def write(out: Path, rows: list[dict], facts: dict) -> str:
    "Page and figures, as far as they are known; the page."
    page = markdown(rows, facts)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"sequence-{facts['folder']}"
    stem.with_suffix(".md").write_text(page, encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=5000, help="that parameters are chosen on; 0: all")
    parser.add_argument("--served", action="store_true", help="also ask a running service")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    log = read(options.folder)
    before, validation = split(log, 2)
    everybody, rng = np.arange(before.counts.shape[0]), np.random.default_rng(options.seed)
    some = everybody if not options.users else np.sort(rng.permutation(everybody)[: options.users])
    started = time.perf_counter()
    recipes = chosen_models(Choosing(before, validation, some, K))
    choice_seconds = time.perf_counter() - started
    snapshot, targets = split(log, 1)
    rows, models, fits = [], [], Fits(snapshot)
    for recipe, parameters in (bar := tqdm(recipes, unit="model")):
        model = fits.fit(recipe)
        hits, ndcg = metrics_of(model, targets, everybody, K, ("hit_rate", "ndcg")).T
        low, high = interval(bootstrap_means(ndcg, 1000, options.seed))
        rows.append(
            {"model": model.name, "hit_rate": float(hits.mean()), "ndcg": float(ndcg.mean()), "low": float(low),
             "high": float(high), "seconds": fits.spent(recipe), "ms": answer_ms(model, everybody),
             "megabytes": size_of(model) / 1e6, "parameters": parameters}
        )  # fmt: skip
        models.append(model)
        bar.write(f"{model.name}: HR@10 {rows[-1]['hit_rate']:.4f}, NDCG@10 {rows[-1]['ndcg']:.4f}", file=sys.stderr)
    shape = (len(everybody), snapshot.counts.shape[1], len(log))
    given = shlex.join("FOLDER" if part == str(options.folder) else part for part in sys.argv[1:])
    facts = {"folder": options.folder.resolve().name, "users": shape[0], "items": shape[1], "pairs": shape[2],
             "chosen_on": len(some), "command": f"python benchmarks/sequence.py {given}",
             "date": date.today().isoformat(), "choice_seconds": choice_seconds,
             "published": shape == BEAUTY}  # fmt: skip
    page = write(options.out, rows, facts)
    if options.served:
        short = everybody[np.diff(snapshot.counts.indptr) <= 200]  # the most events of a session
        asked = np.sort(rng.choice(short, min(500, len(short)), replace=False))
        past = log[log.after >= 1].set_index("user")
        item_ids = log.drop_duplicates("item").sort_values("item").item_id.to_numpy()
        by_step = [model for model in models if "step" in model.name]
        for model, lists, ms in served_lists(by_step, snapshot, item_ids, asked, past):
            judged = item_ids[top_lists(model, asked, K)[0]].tolist()
            same = sum(list_ == expected for list_, expected in zip(lists, judged))
            row = rows[models.index(model)]
            row |= {"served": f"{same} of {len(asked)}, {ms:.1f} ms", "different": len(asked) - same}
            print(f"{model.name}: {same} of {len(asked)} lists are equal over HTTP", file=sys.stderr)
        page = write(options.out, rows, facts)
    print(page)
    if wrong := [row["model"] for row in rows if row.get("different")]:
        sys.exit(f"over HTTP other lists than those judged: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
