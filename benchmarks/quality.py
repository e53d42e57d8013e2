"""How good are this project's models on a public train/test pair, beside the published figures?

    python benchmarks/quality.py FOLDER [--models als,chebycf,graph,blend] [--served] [--users 4000]
    [--out benchmarks/results]

FOLDER holds train.parquet and test.parquet with the columns user_id and item_id, no times; or warm_test.parquet and
warm_validation.parquet in place of test.parquet, as the splits of cold items have them. Protocol of the LightGCN
papers: learn from all of train, rank all items minus the user's train items, mean over the users with test items;
Recall@20 divides by the number of test items, NDCG@20 is binary with its ideal cut at 20. Items that only the test
knows count as missed.

Parameters, and members and weights of the blend, are chosen on a fifth of each user's train items, held out as the test
of the papers was (or on the validation of the folder), by NDCG@20 of --users of the users: one parameter after the
other takes the best of a few values, until none gets better. Where new pairs go to popular items more than old ones
did, a draw at random is the wrong validation, so it can be tilted: an item's chance is its popularity to the power
--tilt. Where the Recall@20 of popularity is published for the test, as it is for Gowalla, the tilt is the one of five
with which popularity does as well on what is held out; else it is 0. Then each model learns from all of train, and the
test judges it, once. A model that starts at random is fitted again with another seed and judged on --users of the
users.

--served writes each fitted model as a bundle into a temporary folder, opens it, and asks for the lists of 2,000 users
in blocks, which must be those that were judged, and of 500 users one at a time, which must be the same and whose
milliseconds it takes with one BLAS thread; another list ends the run with an error. The table goes to standard output
and to a Markdown file in --out, the figures to a JSON file beside it. Rows of models that a run leaves out stay as an
earlier run found them, and each row says when that was.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from public import Choosing, metrics_of, read_log
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
from product_recs.data.tasks import Task, hold_out
from product_recs.evaluation.competition import Fits
from product_recs.evaluation.metrics import bootstrap_means, find_hits, interval, paired_bootstrap
from product_recs.evaluation.mixing import choose_mix, pool_of
from product_recs.inference import recommend_many
from product_recs.models.all import from_recipe
from product_recs.models.als import ALS
from product_recs.models.baselines import Popularity
from product_recs.models.blend import ScoreBlend
from product_recs.models.interface import Model, recipe, size_of, top_lists, with_parts
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
    remedy = "name a folder with train.parquet and test.parquet (make bench-quality DATA=folder)"
    return read_log(path, ["user_id", "item_id"], remedy)[["user_id", "item_id"]].drop_duplicates()


def read(folder: Path) -> tuple[csr_matrix, csr_matrix, csr_matrix | None]:
    "Train, test and, where the folder has one, validation as matrices over the ids of all, in ascending order of id."
    warm = (folder / "warm_test.parquet").exists()
    names = ("train", "warm_test", "warm_validation") if warm else ("train", "test")
    parts = [read_pairs(folder / f"{name}.parquet") for name in names]
    users, items = (np.unique(np.concatenate([part[column] for part in parts])) for column in ("user_id", "item_id"))

    def matrix(pairs: pd.DataFrame) -> csr_matrix:
        places = np.searchsorted(users, pairs.user_id), np.searchsorted(items, pairs.item_id)
        return csr_matrix((np.ones(len(pairs), np.float32), places), shape=(len(users), len(items)))

    train, test, *rest = map(matrix, parts)
    return train, test, rest[0] if rest else None


def snapshot_of(train: csr_matrix) -> Snapshot:
    ages = train.copy()
    ages.data = np.zeros_like(train.data)
    return Snapshot(until=None, confidence=train, counts=train, age_days=ages)


class Family(NamedTuple):
    "A model and the values among which its parameters are chosen; the first are where the choice begins."

    kind: type[Model]
    grid: dict[str, tuple]


ALS_GRID = {
    "regularization": (100.0, 50.0, 150.0),
    "user_power": (0.25, 0.0, 0.5),
    "item_power": (0.25, 0.0, 0.5),
    "alpha": (33.0, 15.0, 70.0),
    "iterations": (8, 12),
    "unobserved_weight": (1.0,),
    "nu": (0.0,),
}
FAMILIES = {
    "popularity": Family(Popularity, {}),
    "cosine": Family(ItemCosine, {"neighbours": (100, 30, 300)}),
    "bm25": Family(ItemBM25, {"k1": (1.2, 10.0, 100.0), "b": (0.75, 0.25), "neighbours": (100, 30, 300)}),
    "graph": Family(
        ItemGraph,
        {
            "from_power": (0.5, 0.4, 0.6),
            "user_power": (0.75, 0.5, 1.0),
            "to_power": (0.2, 0.1, 0.3),
            "neighbours": (300,),
        },
    ),
    "implicit": Family(
        ALS,
        {
            "regularization": (10.0, 1.0, 100.0),
            "alpha": (10.0, 1.0, 33.0),
            "factors": (128, 256),
            "iterations": (15,),
            "solver": ("implicit",),
        },
    ),
    "als": Family(ALS, {"factors": (512, 256)} | ALS_GRID),
    "als-1024": Family(ALS, {"factors": (1024,)}),  # and the other parameters as chosen for 512
    "low-pass": Family(LowPass, {"factors": (512, 256, 1024)}),
    "chebycf": Family(
        ChebyCF,
        {"flatness": (1.5, 1.0, 2.0), "ideal": (0.2, 0.0, 0.5), "item_power": (0.4, 0.3, 0.5), "factors": (512,)},
    ),
    "ease": Family(EASE, {"regularization": (300.0, 1000.0, 100.0)}),
}
USUAL = ("popularity", "cosine", "bm25", "graph", "implicit", "als", "als-1024", "chebycf", "blend")
MEMBERS = ("als-1024", "als", "chebycf", "graph", "low-pass", "ease")  # of the blend, those that are named
TILTS, SHARE = (0.0, 0.1, 0.2, 0.3, 0.4), 0.2


def some(targets: csr_matrix, most: int, seed: int) -> np.ndarray:
    "Users with targets, ascending; a sample where there are more."
    rows = np.flatnonzero(np.diff(targets.indptr))
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def validation(train: csr_matrix, tilt: float | None, published: float, seed: int) -> tuple[Snapshot, csr_matrix, str]:
    "What parameters are chosen on: the past, what is held out, and how that was drawn."

    def popularity(tilt: float) -> float:
        past, targets = hold_out(train, SHARE, tilt, seed)
        model = Popularity().fit(snapshot_of(past))
        return float(metrics_of(model, targets, some(targets, 5000, seed), K, ("recall",)).mean())

    words = ""
    if tilt is None and published:
        recalls = {each: popularity(each) for each in TILTS}
        tilt = min(recalls, key=lambda each: abs(recalls[each] - published))
        tried = ", ".join(f"{recall:.4f} with {each:g}" for each, recall in recalls.items())
        words = f": popularity has a Recall@20 of {tried}, and {published:.4f} is published for the test"
    past, held = hold_out(train, SHARE, tilt or 0.0, seed)
    return snapshot_of(past), held, f"a fifth of train, tilt {tilt or 0:g}{words}"


def chosen_models(names: list[str], choosing: Choosing, options: argparse.Namespace) -> dict[str, Model | str]:
    "The models of a table, not fitted; a text says why there is none."
    models = {}
    for name in (bar := tqdm([name for name in names if name != "blend"], unit="model", desc="choosing")):
        bar.set_postfix_str(name)
        family = FAMILIES[name]
        grid = dict(family.grid)
        if name == "als-1024" and "als" in models:
            grid = {key: (value,) for key, value in models["als"].parameters.items()} | grid
        elif name == "als-1024":
            grid |= {key: values[:1] for key, values in ALS_GRID.items()}
        if "factors" in grid and options.factors:
            grid["factors"] = (options.factors,)
        if name == "ease" and options.ease_max_size:
            grid["max_size"] = (options.ease_max_size,)
        try:
            models[name] = family.kind(**choosing.best(name, family.kind, grid))
        except ProductRecsError as error:
            models[name] = str(error)
    if "blend" in names:
        members = [models[name] for name in MEMBERS if isinstance(models.get(name), Model)]
        models["blend"] = mixed(members, choosing) if len(members) > 1 else "a blend needs two of its members"
    return models


def mixed(members: list[Model], choosing: Choosing) -> Model:
    "At most three of the members, by what they bring together on the validation items."
    fits = Fits(choosing.snapshot)
    fitted = [fits.fit(model) for model in tqdm(members, unit="model", desc="members of the blend")]
    task = Task(DISCOVERY, choosing.users, choosing.targets[choosing.users], True, {})
    mix = choose_mix([pool_of(fitted, task, 3 * K)], k=K, most=3)
    blend = mix.blend(members)
    choosing.values["blend"] = choosing.judged(fits.fit(blend))
    print(f"{blend.name}: NDCG@{K} {choosing.values['blend']:.4f} on validation", file=sys.stderr)
    return blend


def with_seed(model: Model, seed: int) -> Model | None:
    "The same model, not fitted, with another start; None: it has none."
    parts = [with_seed(part, seed) or part for part in model.parts]
    given = recipe(model)
    if "seed" in given["parameters"]:
        given = given | {"parameters": given["parameters"] | {"seed": seed}}
    elif all(new is part for new, part in zip(parts, model.parts)):
        return None
    return from_recipe(given, parts)


def judge(model: Model, fits: Fits, targets: csr_matrix, options: argparse.Namespace) -> dict:
    "Fit, rank and measure one model; its parts are fitted once for all rows of the table."
    started = time.perf_counter()
    fitted, rows = fits.fit(model), some(targets, targets.shape[0], 0)
    with tqdm(total=len(rows), desc=model.name, unit=" lists", mininterval=1, leave=False) as bar:
        lists = top_lists(fitted, rows, K, advance=bar.update)[0]
    hits = find_hits(lists, targets[rows])
    values = np.column_stack([hits.metric(name, K) for name in ("recall", "ndcg")])
    low, high = interval(bootstrap_means(values, 1000, 0))
    seconds, again = time.perf_counter() - started, with_seed(model, options.seed + 1)
    result = {
        "model": model.name, "recall": values[:, 0].mean(), "ndcg": values[:, 1].mean(), "low": low.tolist(),
        "high": high.tolist(), "train_seconds": fits.spent(model), "total_seconds": seconds, "users": len(rows),
        "served": serve(fitted, targets, rows, lists) if options.served else None, "by_user": values[:, 1],
    }  # fmt: skip
    if again is not None:
        asked = some(targets, options.users, options.seed)
        other = metrics_of(Fits(fits.snapshot).fit(again), targets, asked, K, ("recall", "ndcg")).mean(axis=0)
        result["other_seed"] = (other - values[np.isin(rows, asked)].mean(axis=0)).tolist()
    return result


def serve(model: Model, targets: csr_matrix, rows: np.ndarray, judged: np.ndarray) -> dict:
    "How many lists of a bundle of the model are others than those judged, and milliseconds of one answer."
    ids, places = [IdTable(np.arange(size)) for size in targets.shape], np.random.default_rng(0).permutation(len(rows))
    with tempfile.TemporaryDirectory() as folder:
        tasks = {DISCOVERY: model, NEXT_PURCHASE: "a pair of files without times has none"}
        path = write_bundle(
            Path(folder), models=tasks, snapshot=model.snapshot, users=ids[0], items=ids[1], user_columns={},
            item_columns={}, parameters={}, data={}, metrics={},
        )  # fmt: skip
        recommender = Recommender(ReadyModel(open_bundle(Path(folder), path.name)).prepare())
        blocks, alone = places[:2000], places[:510]
        answers = recommend_many(recommender, rows[blocks].tolist(), K)
        different = sum(
            answer.rows != [row for row in judged[place] if row >= 0] for answer, place in zip(answers, blocks)
        )
        times = []
        with one_blas_thread():
            for answer, place in zip(answers, alone):
                since = time.perf_counter()
                single = recommender.recommend(int(rows[place]), K)
                times.append(1e3 * (time.perf_counter() - since))
                different += single.items != answer.items
    times = times[10:]  # the first are not counted
    return {
        "blocks": len(blocks), "alone": len(alone), "other_lists": different, "p50": float(np.median(times)),
        "p99": float(np.quantile(times, 0.99)), "megabytes": size_of(model) / 1e6, "user_bytes": sum(
            part.user_factors[:1].nbytes for part in with_parts(model) if hasattr(part, "user_factors")
        ),
    }  # fmt: skip


def compared(result: dict, earlier: list[dict], by_user: dict) -> str:
    "A blend, or ALS, against whom it has to beat, by a paired bootstrap over the users."
    if result["model"].startswith("ALS,"):
        rivals = [each for each in earlier if each["model"].startswith("ALS of implicit")]
    else:
        rivals = sorted(earlier, key=lambda each: each["validation"])[-1:] if "+" in result["model"] else []
    if not rivals:
        return ""
    rival = rivals[0]["model"]
    pair = paired_bootstrap(by_user[result["model"]], by_user[rival])
    return f"{result['model']} minus {rival}: {pair.difference:+.4f} ({pair.low:+.4f} to {pair.high:+.4f})"


def parameters_of(model: Model) -> str:
    "As the table prints them; a blend has its weights in its name."
    if isinstance(model, ScoreBlend):
        return "of the rows above"
    return ", ".join(f"{name} {value}" for name, value in model.parameters.items()) or "none"


def name_of(model: Model) -> str:
    "As the table prints it: ALS stands there with two numbers of factors, and by two solvers."
    if not isinstance(model, ALS):
        return model.name
    return f"ALS{' of implicit' * (model.parameters['solver'] == 'implicit')}, {model.parameters['factors']} factors"


def markdown(results: list[dict], facts: dict) -> str:
    "Ours and, where they are of the same split, the published ones, by ascending NDCG."
    rows = [
        (
            r["recall"], r["ndcg"], f"**{r['model']}**", f"{r['validation']:.4f}",
            f"{(r['high'][1] - r['low'][1]) / 2:.4f}",
            f"{r['other_seed'][1]:+.4f}" if "other_seed" in r else "", f"{r['train_seconds']:.1f}",
            r["parameters"], r["measured"],
        )
        for r in results
    ]  # fmt: skip
    if facts["published"]:
        rows += [(recall, ndcg, name, "", "", "", "", source, "") for name, recall, ndcg, source in PUBLISHED]
    lines = [
        f"{facts['users']:,} users, {facts['items']:,} items, {facts['pairs']:,} pairs in train, {facts['judged']:,} "
        "judged by (test). Models of this project are bold.",
        "",
        f"Parameters were chosen by {facts['chosen_on']:,} users on {facts['drawn']}.",
        "",
        "| model | Recall@20 | NDCG@20 | NDCG on validation | ± of NDCG | NDCG with another seed | training, s "
        "| parameters, or source | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {recall:.4f} | {ndcg:.4f} | {' | '.join(rest)} |"
        for recall, ndcg, name, *rest in sorted(rows, key=lambda row: row[1::-1])
    ]
    lines += ["", *dict.fromkeys(f"- {r['measured']}: {r['command']}" for r in results)]
    if pairs := [r["better_than"] for r in results if r.get("better_than")]:
        lines += ["", "Differences of NDCG@20 on the test, users paired, with the interval of a bootstrap, 95 %:", ""]
        lines += [f"- {pair}" for pair in pairs]
    if answered := [r for r in results if r.get("served")]:
        served = answered[-1]["served"]
        lines += [
            "",
            "Served: the same models written as bundles, opened, and asked by `recommend_many` for "
            f"{served['blocks']:,} users, and by `Recommender.recommend` for {served['alone']:,} of them, one at a "
            "time with one BLAS thread. All lists are those that were judged.",
            "",
            "| bundle of | p50 of an answer, ms | p99, ms | model, MB | of it a user, bytes |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {served['p50']:.2f} | {served['p99']:.2f} | {served['megabytes']:.0f} "
                f"| {served['user_bytes']} |"
                for name, served in ((r["model"], r["served"]) for r in answered)
            ),
        ]
    return "\n".join(lines) + (
        "\n\n± is half the interval of a bootstrap over users, 95 %. With another seed: the difference on a sample of "
        "users. Training seconds are of one run, parts of a blend included, and hold for the machine and its load.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--models",
        default=",".join(USUAL),
        help="by commas; also low-pass and ease, which takes memory and minutes (default: %(default)s)",
    )
    parser.add_argument("--users", type=int, default=4000, help="that parameters are chosen on (default: %(default)s)")
    parser.add_argument(
        "--tilt",
        type=float,
        help="of what is held out: 0 draws at random, more prefers popular items (default: by popularity, else 0)",
    )
    parser.add_argument("--served", action="store_true", help="also ask a bundle of each model")
    parser.add_argument("--factors", type=int, default=0, help="of every model that has some; 0: as the models have it")
    parser.add_argument(
        "--ease-max-size", type=int, default=30_000, help="of the fewer of users and items; 29,858 take 3.6 GB"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    names = [name for name in [*FAMILIES, "blend"] if name in options.models.split(",")]
    if unknown := set(options.models.split(",")) - set(names):
        parser.error(f"--models: unknown {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}, blend")
    train, targets, given_validation = read(options.folder)
    shape = (*train.shape, train.nnz, targets.nnz)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"quality-{options.folder.resolve().name}"
    given = shlex.join("FOLDER" if part == str(options.folder) else part for part in sys.argv[1:])
    file, command = stem.with_suffix(".json"), f"`python benchmarks/quality.py {given}`"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    earlier = [row for row in earlier if "validation" in row]  # chosen as it is today
    published = PUBLISHED[0][1] if shape == GOWALLA else 0.0
    if given_validation is None:
        past, held, drawn = validation(train, options.tilt, published, options.seed)
    else:
        past, held, drawn = snapshot_of(train), given_validation, "the validation of the folder"
    print(drawn, file=sys.stderr)
    choosing = Choosing(past, held, some(held, options.users, options.seed), K)
    models = chosen_models(names, choosing, options)
    facts = dict(zip(("users", "items", "pairs", "judged"), shape)) | {
        "published": bool(published), "chosen_on": len(choosing.users), "drawn": drawn,
    }  # fmt: skip
    left_out = [f"{name} is left out: {why}" for name, why in models.items() if isinstance(why, str)]
    fits, results, table, by_user = Fits(snapshot_of(train)), [], "", {}
    for name in (bar := tqdm([name for name in names if isinstance(models[name], Model)], unit="model")):
        bar.set_postfix_str(name)
        model = models[name]
        result = judge(model, fits, targets, options) | {
            "parameters": parameters_of(model), "validation": choosing.values[name], "command": command,
            "measured": date.today().isoformat(), "model": name_of(model),
        }  # fmt: skip
        by_user[result["model"]] = result.pop("by_user")
        result["better_than"] = compared(result, results, by_user)
        results.append(result)
        if options.served and result["served"]["other_lists"]:
            sys.exit(f"{name}: {result['served']['other_lists']} lists of a bundle are others than those judged")
        bar.write(
            f"{name:14s} Recall@20 {result['recall']:.4f}  NDCG@20 {result['ndcg']:.4f}  "
            f"{result['train_seconds']:.0f} s",
            file=sys.stderr,
        )
        rows = results + [row for row in earlier if row["model"] not in {result["model"] for result in results}]
        table = markdown(rows, facts) + "".join(f"\n{line}\n" for line in left_out)
        # after each model: a run that is stopped leaves what it found
        stem.with_suffix(".md").write_text(table, encoding="utf-8")
        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for line in left_out:
        print(line, file=sys.stderr)
    if not results:
        sys.exit("no model could be fitted")
    print(table)


if __name__ == "__main__":
    main()
