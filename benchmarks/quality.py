"""How good are this project's models on a public train/test pair, beside the published figures?

    python benchmarks/quality.py FOLDER [--models weighted-als,blend] [--factors 512] [--validate] [--served]
    [--out benchmarks/results]

FOLDER holds train.parquet and test.parquet with the columns user_id and item_id, no times. Protocol of the LightGCN
papers: learn
from all of train, rank all items minus the user's train items, mean over the users with test items; Recall@20 divides
by the number
of test items, NDCG@20 is binary with its ideal cut at 20. Items that only the test knows count as missed.

--validate judges on a tenth of each user's train items (seeded, rounded) instead of the test: choose
parameters there, and only there. Where popularity is published to do better on the test than on a tenth drawn at
random, the test
holds more of the popular items; --tilt draws an item with a chance proportional to its popularity to that power, until
popularity does as well.

--served writes each fitted model as a bundle into a temporary folder, opens it, and judges the lists that the service
makes of it: those of all users in blocks, and those of 500 users one at a time, which must be the same and whose
milliseconds it takes with one BLAS thread. Figures that differ from those before by more than 0.00005 end the run with
an error. The table goes to standard output and to a Markdown file in --out, the figures to a JSON file
beside it. Rows of models that a run leaves out stay as an earlier run found them, and each row says when that was.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from tqdm import tqdm

from product_recs.answer.recommender import Recommender
from product_recs.bundle.files import write_bundle
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.errors import ProductRecsError
from product_recs.core.ids import IdTable
from product_recs.core.kernels import one_blas_thread
from product_recs.data.snapshots import Snapshot
from product_recs.data.tasks import hold_out
from product_recs.evaluation.metrics import bootstrap_means, find_hits, interval
from product_recs.inference import recommend_many
from product_recs.models.all import fit_sharing
from product_recs.models.als import ALS, WeightedALS
from product_recs.models.baselines import Popularity
from product_recs.models.blend import ScoreBlend
from product_recs.models.bpr import BPR
from product_recs.models.interface import Model, size_of, top_lists, with_parts
from product_recs.models.item_item import EASE, ItemBM25, ItemCosine, ItemGraph
from product_recs.models.spectral import ChebyCF, LowPass

K = 20
# Recall@20, NDCG@20 as published for the split of the LightGCN paper of Gowalla (29,858 users, 40,981 items, 1,027,370
# pairs)
BARS = "BARS leaderboard, gowalla_m1"
PUBLISHED = [
    ("ItemPop", 0.0416, 0.0317, BARS),
    ("ItemCF", 0.1570, 0.1214, BARS),
    ("MF-BPR", 0.1627, 0.1378, BARS),
    ("SLIM", 0.1699, 0.1382, BARS),
    ("YoutubeDNN", 0.1754, 0.1473, BARS),
    ("EASE", 0.1765, 0.1467, BARS),
    ("LightGCN", 0.1820, 0.1547, BARS),
    ("LightGCN", 0.1830, 0.1554, "README of UltraGCN"),
    ("GF-CF", 0.1849, 0.1518, BARS),
    ("UltraGCN", 0.1862, 0.1580, BARS),
    ("SimpleX", 0.1872, 0.1557, BARS),
    ("PGSP", 0.1917, 0.1606, "Liu and others, WWW 2023"),
    ("BSPM", 0.1921, 0.1597, "Choi and others, SIGIR 2023"),
    ("ChebyCF", 0.1941, 0.1616, "Kim and others, SIGIR 2025, and README of ChebyCF"),
]
GOWALLA = (29_858, 40_981, 810_128, 217_242)


def read_pairs(path: Path) -> pd.DataFrame:
    if not path.exists():
        sys.exit(
            f"{path}: the file is missing; name a folder with train.parquet and test.parquet (make bench-quality "
            f"DATA=folder)"
        )
    pairs = pd.read_parquet(path)
    if missing := {"user_id", "item_id"} - set(pairs.columns):
        sys.exit(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(map(str, pairs.columns))}")
    pairs = pairs[["user_id", "item_id"]].drop_duplicates()
    if pairs.empty or pairs.isna().any(axis=None):
        sys.exit(f"{path}: {'no rows' if pairs.empty else 'ids are missing in some rows'}")
    return pairs


def read(folder: Path) -> tuple[csr_matrix, csr_matrix]:
    "Train and test as matrices over the ids of both, in ascending order of id."
    train, test = (read_pairs(folder / f"{name}.parquet") for name in ("train", "test"))
    users, items = (np.unique(np.concatenate([train[column], test[column]])) for column in ("user_id", "item_id"))

    def matrix(pairs: pd.DataFrame) -> csr_matrix:
        places = np.searchsorted(users, pairs.user_id), np.searchsorted(items, pairs.item_id)
        return csr_matrix((np.ones(len(pairs), np.float32), places), shape=(len(users), len(items)))

    return matrix(train), matrix(test)


def snapshot_of(train: csr_matrix) -> Snapshot:
    ages = train.copy()
    ages.data = np.zeros_like(train.data)
    return Snapshot(until=None, confidence=train, counts=train, age_days=ages)


def all_models(options: argparse.Namespace) -> dict:
    "Key of the command line -> (model, its parameters as the table prints them)."
    als = dict(
        factors=options.factors,
        alpha=options.alpha,
        regularization=options.regularization,
        iterations=options.iterations,
        seed=options.seed,
    )
    bm25, bpr = (
        dict(neighbours=100, k1=1.2, b=0.75),
        dict(factors=128, learning_rate=0.05, regularization=0.01, iterations=200, num_threads=0),
    )
    own = dict(
        user_power=options.user_power,
        item_power=options.item_power,
        alpha=options.weighted_alpha,
        regularization=options.weighted_regularization,
        unobserved_weight=options.unobserved_weight,
        nu=options.nu,
    )
    graph = dict(zip(("from_power", "user_power", "to_power"), options.graph), neighbours=options.neighbours)
    weighted, walks = WeightedALS(**als | own), ItemGraph(**graph)
    low = dict(factors=options.patterns, seed=options.seed)
    spectrum = dict(zip(("flatness", "ideal", "item_power"), options.chebycf)) | dict(
        factors=options.chebycf_patterns, seed=options.seed
    )
    whole, smooth, ease = ChebyCF(**spectrum), LowPass(**low), EASE(options.ease_regularization, options.ease_max_size)
    return {
        "popularity": (Popularity(), {}),
        "cosine": (ItemCosine(100), {"neighbours": 100}),
        "bm25": (ItemBM25(**bm25), bm25),
        "bpr": (BPR(**bpr), bpr),
        "graph": (walks, graph),
        "als": (ALS(**als), als),
        "weighted-als": (weighted, als | own),
        "low-pass": (smooth, low),
        "chebycf": (whole, spectrum),
        "ease": (ease, {"regularization": options.ease_regularization}),
        "blend": (ScoreBlend([weighted, walks, smooth], options.blend), {"weights": list(options.blend)}),
        "blend-chebycf": (
            ScoreBlend([weighted, whole, walks], options.blend_chebycf),
            {"weights": list(options.blend_chebycf)},
        ),
        "blend-ease": (
            ScoreBlend([weighted, walks, smooth, ease], options.blend_ease),
            {"weights": list(options.blend_ease)},
        ),
    }


def judge(model: Model, train: Snapshot, targets: csr_matrix, fitted: dict, served: bool) -> dict:
    "Fit, rank and measure one model; its parts are fitted once for all rows of the table."
    started = time.perf_counter()
    model = fit_sharing(model, train, fitted)
    seconds = time.perf_counter() - started
    rows = np.flatnonzero(np.diff(targets.indptr))
    with tqdm(total=len(rows), desc=model.name, unit=" lists", mininterval=1, leave=False) as bar:
        hits = find_hits(top_lists(model, rows, K, advance=bar.update)[0], targets[rows])
    values = np.column_stack([hits.metric(name, K) for name in ("recall", "ndcg")])
    low, high = interval(bootstrap_means(values, 1000, 0))
    return {
        "model": model.name,
        "recall": values[:, 0].mean(),
        "ndcg": values[:, 1].mean(),
        "low": low.tolist(),
        "high": high.tolist(),
        "train_seconds": seconds,
        "total_seconds": time.perf_counter() - started,
        "users": len(rows),
        "served": serve(model, targets) if served else None,
    }


def serve(model: Model, targets: csr_matrix) -> dict:
    "Recall and NDCG of the lists that a bundle of the model gives, and milliseconds of one answer."
    rows, ids = np.flatnonzero(np.diff(targets.indptr)), [IdTable(np.arange(size)) for size in targets.shape]
    with tempfile.TemporaryDirectory() as folder:
        tasks = {DISCOVERY: model, NEXT_PURCHASE: "a pair of files without times has none"}
        path = write_bundle(
            Path(folder), models=tasks, snapshot=model.snapshot, users=ids[0], items=ids[1], user_columns={},
            item_columns={}, parameters={}, data={}, metrics={},
        )  # fmt: skip
        recommender = Recommender(ReadyModel(open_bundle(Path(folder), path.name)).prepare())
        answers = recommend_many(recommender, rows.tolist(), K)
        lists = np.array([answer.rows + [-1] * (K - len(answer)) for answer in answers], np.int32)
        hits, times, other = find_hits(lists, targets[rows]), [], 0
        with one_blas_thread():
            for place in np.random.default_rng(0).permutation(len(rows))[:510].tolist():
                since = time.perf_counter()
                answer = recommender.recommend(int(rows[place]), K)
                times.append(1e3 * (time.perf_counter() - since))
                other += answer.items != answers[place].items
    times = times[10:]  # the first are not counted
    return {
        "recall": hits.metric("recall", K).mean(), "ndcg": hits.metric("ndcg", K).mean(), "other lists": other,
        "p50": float(np.median(times)), "p99": float(np.quantile(times, 0.99)),
        "megabytes": size_of(model) / 1e6, "user_bytes": sum(
            part.user_factors[:1].nbytes for part in with_parts(model) if hasattr(part, "user_factors")
        ),
    }  # fmt: skip


def numbers(count: int) -> Callable:
    "A parser of so many numbers by commas."

    def parse(text: str) -> tuple[float, ...]:
        figures = tuple(float(part) for part in text.split(","))
        if len(figures) != count:
            raise argparse.ArgumentTypeError(f"{count} numbers by commas, not {text!r}")
        return figures

    return parse


def difference(result: dict) -> str:
    "What a bundle of the model answers otherwise than the model; empty: nothing."
    served = result["served"]
    if served["other lists"]:
        return f"{served['other lists']} of 510 lists are others one at a time than in a block"
    if max(abs(result[name] - served[name]) for name in ("recall", "ndcg")) > 5e-5:
        return f"served it has Recall@20 {served['recall']:.5f} and NDCG@20 {served['ndcg']:.5f}"
    return ""


def as_text(parameters: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items()) or "none"


def markdown(results: list[dict], shape: tuple, judged_by: str, with_published: bool) -> str:
    "Ours and, where they are of the same split, the published ones, by ascending NDCG."
    rows = [
        (
            r["recall"],
            r["ndcg"],
            f"**{r['model']}**",
            f"{r['train_seconds']:.1f}",
            as_text(r["parameters"]),
            r["measured"],
        )
        for r in results
    ]
    if with_published:
        rows += [(recall, ndcg, name, "", source, "") for name, recall, ndcg, source in PUBLISHED]
    lines = [
        f"{shape[0]:,} users, {shape[1]:,} items, {shape[2]:,} pairs in train, {shape[3]:,} judged by ({judged_by}); "
        f"{results[0]['users']:,} users.",
        "Models of this project are bold.",
        "",
        "| model | Recall@20 | NDCG@20 | training, seconds | parameters, or source | measured |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {recall:.4f} | {ndcg:.4f} | {seconds} | {note} | {measured} |"
        for recall, ndcg, name, seconds, note, measured in sorted(rows, key=lambda row: row[:2])
    ]
    lines += ["", *(f"- {command}" for command in dict.fromkeys(f"{r['measured']}: {r['command']}" for r in results))]
    answered = [
        f"| {r['model']} | {r['served']['recall']:.4f} | {r['served']['ndcg']:.4f} | {r['served']['p50']:.2f} | "
        f"{r['served']['p99']:.2f} | {r['served'].get('megabytes', float('nan')):.0f} | "
        f"{r['served'].get('user_bytes', '')} |".replace("nan", "")
        for r in results
        if r.get("served")
    ]
    if answered:
        lines += [
            "",
            "Served: the same models written as bundles, opened, and asked by `recommend_many` for all users, and by "
            "`Recommender.recommend` for 500 of them, one at a time with one BLAS thread. The lists are the same.",
            "",
            "| bundle of | Recall@20 | NDCG@20 | p50 of an answer, ms | p99, ms | model, MB | of it a user, bytes |",
            "|---|---|---|---|---|---|---|",
            *answered,
        ]
    half = max((high - low) / 2 for r in results for low, high in zip(r["low"], r["high"]))
    return (
        "\n".join(lines) + f"\n\nBootstrap over users, 95 %: each of our figures is within {half:.4f} or less. "
        "Training seconds are of one run and hold for the machine and its load.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--models",
        default="popularity,cosine,bm25,graph,als,weighted-als,low-pass,chebycf,blend,blend-chebycf",
        help="by commas; also bpr, ease and blend-ease (default: %(default)s)",
    )
    parser.add_argument(
        "--validate", action="store_true", help="judge on a held-out tenth of train, to choose parameters"
    )
    parser.add_argument(
        "--tilt", type=float, default=0.0, help="of --validate: 0 draws at random, more prefers popular items"
    )
    parser.add_argument("--served", action="store_true", help="also judge the lists of a bundle of each model")
    parser.add_argument("--factors", type=int, default=512)
    parser.add_argument("--alpha", type=float, default=33.0)
    parser.add_argument("--regularization", type=float, default=30.0)
    parser.add_argument("--iterations", type=int, default=8)
    for name, usual in (("user-power", 0.0), ("item-power", 0.1), ("weighted-alpha", 1.0), ("nu", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=usual, help="of weighted ALS")
    for name, usual in (("weighted-regularization", 0.003), ("unobserved-weight", 0.03)):
        parser.add_argument(f"--{name}", type=float, default=usual, help="of weighted ALS")
    parser.add_argument(
        "--graph",
        type=numbers(3),
        default=(0.5, 0.75, 0.2),
        help="from_power,user_power,to_power of the item graph (default: 0.5,0.75,0.2)",
    )
    parser.add_argument("--neighbours", type=int, default=300, help="of the item graph")
    parser.add_argument("--patterns", type=int, default=1024, help="of low-pass")
    parser.add_argument(
        "--blend", type=numbers(3), default=(0.45, 0.40, 0.15), help="weights of weighted ALS, item graph and low-pass"
    )
    parser.add_argument(
        "--chebycf",
        type=numbers(3),
        default=(1.5, 0.2, 0.4),
        help="flatness,ideal,item_power of ChebyCF (default: 1.5,0.2,0.4)",
    )
    parser.add_argument("--chebycf-patterns", type=int, default=512, help="of ChebyCF")
    parser.add_argument(
        "--blend-chebycf",
        type=numbers(3),
        default=(0.5, 0.3, 0.2),
        help="weights of weighted ALS, ChebyCF and item graph",
    )
    parser.add_argument(
        "--blend-ease", type=numbers(4), default=(0.40, 0.11, 0.17, 0.32), help="the same, with EASE as the fourth"
    )
    parser.add_argument("--ease-regularization", type=float, default=300.0)
    parser.add_argument(
        "--ease-max-size", type=int, default=30_000, help="of the fewer of users and items; 29,858 take 3.6 GB"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    models, names = all_models(options), options.models.split(",")
    if unknown := [name for name in names if name not in models]:
        parser.error(f"--models: unknown {', '.join(unknown)}; there are {', '.join(models)}")
    train, targets = read(options.folder)
    shape = (*train.shape, train.nnz, targets.nnz)
    if options.validate:
        train, targets = hold_out(train, tilt=options.tilt)
    judged_by = (
        f"a tenth of train, held out{f', tilt {options.tilt}' if options.tilt else ''}" if options.validate else "test"
    )
    sizes, published = (*train.shape, train.nnz, targets.nnz), shape == GOWALLA and not options.validate
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"quality-{options.folder.resolve().name}{'-validation' if options.validate else ''}"
    given = shlex.join("FOLDER" if part == str(options.folder) else part for part in sys.argv[1:])
    file, command = stem.with_suffix(".json"), f"`python benchmarks/quality.py {given}`"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    snapshot, results, left_out, fit_alone, fitted = snapshot_of(train), [], [], {}, {}
    for name in (bar := tqdm(names, unit="model")):
        bar.set_postfix_str(name)
        model, parameters = models[name]
        try:
            result = judge(model, snapshot, targets, fitted, options.served)
        except ProductRecsError as error:
            left_out.append(f"{name} is left out: {error}")
            bar.write(left_out[-1], file=sys.stderr)
            continue
        fit_alone[model.name] = result["train_seconds"]
        result["train_seconds"] += sum(fit_alone.get(part.name, 0.0) for part in model.parts)  # fitted for a row above
        results.append({**result, "parameters": parameters, "measured": date.today().isoformat(), "command": command})
        if options.served and (wrong := difference(result)):
            sys.exit(f"{name}: {wrong}")
        bar.write(
            f"{name:14s} Recall@20 {result['recall']:.4f}  NDCG@20 {result['ndcg']:.4f}  "
            f"{result['train_seconds']:.0f} s",
            file=sys.stderr,
        )
        rows = results + [row for row in earlier if row["model"] not in {result["model"] for result in results}]
        table = markdown(rows, sizes, judged_by, published) + "".join(f"\n{line}\n" for line in left_out)
        stem.with_suffix(".md").write_text(
            table, encoding="utf-8"
        )  # after each model: a run that is stopped leaves what it found
        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if not results:
        sys.exit("no model could be fitted")
    table = markdown(rows, sizes, judged_by, published) + "".join(f"\n{line}\n" for line in left_out)
    stem.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nWritten to {stem}.md and {stem.name}.json")


if __name__ == "__main__":
    main()
