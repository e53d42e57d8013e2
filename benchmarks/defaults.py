"""Which parameters do well on every log, and not only on one? The evidence behind the defaults of the models.

    python benchmarks/defaults.py [FOLDER ...] [--minutes 30] [--families als,bm25,graph,ease] [--write]

Logs of different shapes: the groceries (`make data`), the sample, generated shops with latent tastes (few items, short
histories, a season that ends, long baskets, counts, popularity), and public folders that are named: train.parquet with
warm_validation.parquet or alone (a seeded tenth of each user's items is held out), or interactions.parquet with a
position (the last item of each user is the test and is left out, the one before it is judged).

Every log is judged on its validation part alone, by NDCG@10 of items that are new to the user. Points of a seeded
search are the same for all logs, one after the other, so that a run may end at any time: --minutes is a budget, and the
next run goes on where this one ended (build/defaults-*.json; --fresh begins again). A point that was judged on every
log is a candidate. The loss of a point on a log is what it lacks of the best that any point of its family has there,
as a share. The proposed default is the point with the smallest worst loss; the check beside it leaves each log out,
chooses by the others, and says what that choice loses on the one that was left out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from quality import read_pairs
from scipy.sparse import csr_matrix
from tqdm import tqdm

from product_recs.data.snapshots import Snapshot
from product_recs.data.tasks import hold_out, make_task, past_and_future
from product_recs.core.columns import DISCOVERY
from product_recs.core.errors import ProductRecsError
from product_recs.evaluation.metrics import bootstrap_means, find_hits, interval
from product_recs.features import ensure_features
from product_recs.ingest import ensure_ingested
from product_recs.models.als import ALS, ScaledALS, WeightedALS
from product_recs.models.baselines import Popularity
from product_recs.models.interface import Model, top_lists
from product_recs.models.item_item import EASE, ItemBM25, ItemGraph

K, ROOT = 10, Path(__file__).resolve().parents[1]
EASE_SIZE = 3000  # of the fewer of users and items; beyond it a search over EASE takes hours


@dataclass(frozen=True)
class Log:
    name: str
    shape: str  # in words
    past: Snapshot
    rows: np.ndarray  # of the users who are judged
    targets: csr_matrix  # what is relevant to them


def snapshot_of(counts: csr_matrix) -> Snapshot:
    ages = counts.copy()
    ages.data = np.zeros_like(ages.data)
    return Snapshot(until=None, confidence=counts, counts=counts, age_days=ages)


def log_of(name: str, about: str, past: csr_matrix, future: csr_matrix, users: int, judged: int) -> Log:
    "A part of the users, drawn, and the items that they had."
    draw = np.random.default_rng(0)
    active = np.flatnonzero(np.diff(past.indptr))
    active = np.sort(draw.permutation(active)[:users])
    past, future = past[active], future[active]
    items = np.flatnonzero(np.bincount(past.indices, minlength=past.shape[1]))
    past, future = (csr_matrix(part[:, items], dtype=np.float32) for part in (past, future))
    for part in (past, future):
        part.sort_indices()
    task = make_task(snapshot_of(past), future, DISCOVERY, max_users=judged)
    each = np.diff(past.indptr)
    shape = (
        f"{about}; {past.shape[0]:,} users, {past.shape[1]:,} items, {np.median(each):.0f} each, "
        f"{past.nnz / np.prod(past.shape):.2%} filled"
    )
    return Log(name, shape, snapshot_of(past), task.rows, task.targets)


# name -> users, items, median items of a user, spread of that, strength of the taste, of the popularity, counts, season
SHOPS = {
    "few items": ("assortment of 60", 2500, 60, 5, 0.5, 1.0, 0.5, False, 0.0),
    "short": ("one to four purchases", 6000, 900, 2, 0.5, 2.0, 0.7, False, 0.0),
    "season": ("the popular items of the past are not those of the future", 2500, 1500, 12, 0.8, 1.5, 1.0, False, 1.0),
    "long baskets": ("a wholesaler", 700, 3000, 150, 0.6, 1.2, 1.0, False, 0.0),
    "counts": ("repeated purchases count", 2000, 1200, 15, 0.9, 1.2, 0.8, True, 0.0),
    "popular": ("popularity says nearly all", 3000, 800, 8, 0.7, 0.5, 1.4, False, 0.0),
}


def generated(name: str) -> tuple[str, csr_matrix, csr_matrix]:
    """A shop of people and products with latent tastes: what it is, the past and the future. The chance of an item is
    a softmax of taste and popularity, drawn without replacement (Gumbel); a fifth of each person's items is the
    future."""
    about, users, items, median, spread, taste, popular, counted, season = SHOPS[name]
    draw = np.random.default_rng(sum(map(ord, name)))
    people, products = draw.normal(size=(users, 12)), draw.normal(size=(items, 12)) / np.sqrt(12)
    kinds = draw.normal(size=(25, 12)) / np.sqrt(12)
    products = 0.8 * kinds[draw.integers(25, size=items)] * np.sqrt(2) + 0.5 * products
    bias = -popular * np.log(1 + draw.permutation(items))
    likes = 2 * taste * people @ products.T + bias
    size = np.clip(median * draw.lognormal(0, spread, users), 2, items // 3).round().astype(int)
    keys = likes + draw.gumbel(size=likes.shape)
    order = np.argsort(-keys, axis=1)[:, : size.max()]
    taken = np.arange(order.shape[1]) < size[:, None]
    user, item = np.nonzero(taken)[0], order[taken]
    values = (1.0 + draw.poisson(draw.lognormal(0, 1, len(user))) if counted else np.ones(len(user))).astype(np.float32)
    later = draw.random(len(user)) < 0.2
    later[np.searchsorted(user, np.arange(users))] = False  # everybody has a past
    if season:  # what sells in the future has other favourites
        now = likes - bias - season * popular * np.log(1 + draw.permutation(items)) + draw.gumbel(size=likes.shape)
        place = np.arange(len(user)) - np.searchsorted(user, user)
        item = np.where(later, np.argsort(-now, axis=1)[user, place], item)
    past, future = (
        csr_matrix((values[part], (user[part], item[part])), shape=(users, items)) for part in (~later, later)
    )
    return about, past, future


def shop_log(run: str, source: str, about: str) -> tuple[str, csr_matrix, csr_matrix]:
    ensure_ingested(run, source=source, products="", users="")
    features = ensure_features(run, min_item_users=5 if "groceries" in run else 1)
    past, future, _ = past_and_future(features, "validation", [DISCOVERY])
    return about, past.confidence, csr_matrix(future)


def folder_log(folder: Path) -> tuple[str, csr_matrix, csr_matrix]:
    "A public log; its test is not read, or left out."
    if (folder / "interactions.parquet").exists():
        pairs = pd.read_parquet(folder / "interactions.parquet")
        back = pairs.groupby("user_id").position.transform("max") - pairs.position
        parts, about = (pairs[back > 1], pairs[back == 1]), "sequences, the last item but one is judged"
    elif (folder / "warm_validation.parquet").exists():
        parts = read_pairs(folder / "train.parquet"), read_pairs(folder / "warm_validation.parquet")
        about = "pairs, the validation of its protocol"
    else:
        parts, about = (read_pairs(folder / "train.parquet"), None), "pairs, a tenth held out"
    known = pd.concat([part for part in parts if part is not None])
    users, items = np.unique(known.user_id), np.unique(known.item_id)

    def matrix(part: pd.DataFrame) -> csr_matrix:
        places = np.searchsorted(users, part.user_id), np.searchsorted(items, part.item_id)
        return csr_matrix((np.ones(len(part), np.float32), places), shape=(len(users), len(items)))

    return about, *(hold_out(matrix(parts[0])) if parts[1] is None else map(matrix, parts))


def all_logs(folders: list[Path], users: int, judged: int) -> list[Log]:
    sample = str(ROOT / "data/interactions.csv")
    makers = {"sample": partial(shop_log, "defaults-sample", sample, "the committed sample, views and carts")}
    groceries = ROOT / "data/complete_journey/interactions.csv"
    if groceries.exists():
        makers["groceries"] = partial(shop_log, "defaults-groceries", str(groceries), "counts of purchases by time")
    else:
        print("the groceries are left out: make data", file=sys.stderr)
    makers |= {name: partial(generated, name) for name in SHOPS}
    makers |= {folder.resolve().name: partial(folder_log, folder) for folder in folders}
    logs = []
    for name, make in tqdm(makers.items(), desc="logs"):
        about, past, future = make()
        # a household has hundreds of items: fewer of them are as many pairs
        most = users // 2 if name == "groceries" else users
        logs.append(log_of(name, about, past, future, most, judged))
    return logs


def drawn_als(draw: np.random.Generator) -> dict:
    "A point of the search; confidences are as they are, since `alpha` is the same as 1 / `unobserved_weight`."
    nu, weight = float(draw.choice([0.0, 0.5, 1.0, 1.0])), 10 ** draw.uniform(-2, 0)
    low, high = {0.0: (-0.5, 2.3), 0.5: (-2, 0.3), 1.0: (-3.3, -1)}[nu]
    ridge = 10 ** draw.uniform(low, high) * (weight if nu == 0 else 1)
    powers = float(draw.choice([0, 0, 0.25, 0.5])), float(draw.choice([0, 0, 0.1, 0.3, 0.5]))
    return {
        "factors": 64, "regularization": float(f"{ridge:.2g}"), "alpha": 1.0, "iterations": 10, "nu": nu,
        "unobserved_weight": float(f"{weight:.2g}"), "user_power": powers[0], "item_power": powers[1],
    }  # fmt: skip


def near_als(point: Mapping, draw: np.random.Generator) -> dict:
    "Another point near to one."
    changed = {
        name: float(f"{point.get(name, 1.0) * 10 ** draw.uniform(-0.35, 0.35):.2g}")
        for name in ("regularization", "unobserved_weight")
    }
    steps = {
        name: float(np.clip(point.get(name, 0.0) + draw.choice([-0.2, -0.1, 0, 0.1, 0.2]), 0, 1)).__round__(2)
        for name in ("user_power", "item_power")
    }
    return {**point, **changed, **steps}


NAMED = {
    "implicit's defaults": {"factors": 100, "regularization": 0.01, "alpha": 1.0, "iterations": 15,
                            "solver": "implicit"},
    "plain, strong": {"factors": 64, "regularization": 20.0, "alpha": 1.0, "iterations": 15},
    "weighted, strong": {"factors": 64, "regularization": 20.0, "alpha": 1.0, "iterations": 15, "user_power": 0.3,
                         "item_power": 0.1},
    "scaled": {"factors": 64, "regularization": 0.01, "alpha": 1.0, "iterations": 15, "unobserved_weight": 0.1,
               "nu": 1.0},
}  # fmt: skip
# regularization, unobserved weight, power of the user: a grid where the search found points good on nearly all logs
BETWEEN = [(6.0, 0.2, 0.4), (5.0, 0.1, 0.5), (5.0, 0.2, 0.25), (10.0, 0.3, 0.5), (3.5, 0.1, 0.25), (7.0, 0.1, 0.5)]
FAMILIES = {
    "als": ALS,
    "bm25": ItemBM25,
    "graph": ItemGraph,
    "ease": EASE,
}


def usual(family: str) -> dict[str, dict]:
    "Points with a name: what a package has without being asked."
    kinds = {"ALS": ALS, "weighted ALS": WeightedALS, "scaled ALS": ScaledALS} if family == "als" else {}
    kinds = kinds or {"default": FAMILIES[family]}
    points = {name: settings(kind()) for name, kind in kinds.items()} | (NAMED if family == "als" else {})
    return {name: json.loads(key_of("", family, point))[2] for name, point in points.items()}


def settings(model: Model) -> dict:
    return {name: value for name, value in model.parameters.items() if name not in ("seed", "num_threads", "max_size")}


def points_of(family: str, points: int) -> Iterator[dict]:
    "The search, in its order."
    draw = np.random.default_rng(7)
    yield from usual(family).values()
    if family == "als":
        for _ in range(points):
            yield drawn_als(draw)
    elif family == "bm25":
        grid = [(k1, b, n) for n in (100, 300) for k1 in (0.4, 1.2, 3.0) for b in (0.2, 0.5, 0.75, 1.0)]
        yield from ({"k1": k1, "b": b, "neighbours": n} for k1, b, n in grid)
    elif family == "graph":
        powers = [(a, u, c) for a in (0.3, 0.5, 0.7) for u in (0.5, 0.75, 1.0) for c in (0.1, 0.2, 0.4)]
        yield from ({"from_power": a, "user_power": u, "to_power": c, "neighbours": 300} for a, u, c in powers)
    else:
        yield from ({"regularization": float(ridge)} for ridge in (5, 20, 50, 100, 200, 300, 500, 1000, 2000))


def key_of(log: str, family: str, point: Mapping) -> str:
    plain = {"solver": "auto", "unobserved_weight": 1.0, "nu": 0.0, "user_power": 0.0, "item_power": 0.0}
    point = {name: value for name, value in point.items() if value != plain.get(name, ...)}
    return json.dumps([log, family, point], sort_keys=True)


def judge(model: Model, log: Log) -> dict:
    started = time.process_time()
    model = model.fit(log.past)
    values = find_hits(top_lists(model, log.rows, K)[0], log.targets).metric("ndcg", K)
    low, high = interval(bootstrap_means(values[:, None], 500, 0))
    return {
        "ndcg": float(values.mean()), "low": float(low[0]), "high": float(high[0]),
        "seconds": round(time.process_time() - started, 2),
    }  # fmt: skip


class Search:
    "What was judged so far, on disk after each point, until the time is over."

    def __init__(self, file: Path, logs: list[Log], minutes: float):
        self.file, self.logs, self.until = file, logs, time.monotonic() + 60 * minutes
        self.judged = {}
        for key, figures in (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}).items():
            self.judged[key_of(*json.loads(key))] = figures

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def judge(self, family: str, point: dict, give_up: float = 1.0) -> None:
        "On every log, small ones first, until one loses more than `give_up`: then it cannot be the proposed one."
        best = self.best_values(family)
        for log in sorted(self.logs, key=lambda log: log.past.counts.nnz):
            key = key_of(log.name, family, point)
            if self.over or (family == "ease" and min(log.past.counts.shape) > EASE_SIZE):
                continue
            if key not in self.judged:
                self.judged[key] = self._judged(family, point, log)
            if self.judged[key]["ndcg"] < (1 - give_up) * best.get(log.name, 0):
                break
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.judged, indent=0) + "\n", encoding="utf-8")

    def _judged(self, family: str, point: dict, log: Log) -> dict:
        more = {} if family in ("popularity", "ease") else {"num_threads": 1}
        model = Popularity() if family == "popularity" else FAMILIES[family](**point, **more)
        try:
            return judge(model, log)
        except ProductRecsError as error:  # such as factors that became infinite
            return {"ndcg": 0.0, "low": 0.0, "high": 0.0, "seconds": 0.0, "failed": str(error)}

    def best_values(self, family: str) -> dict[str, float]:
        "The best figure that any point of a family has on each log."
        best = {}
        for key, figures in self.judged.items():
            log, kind, _ = json.loads(key)
            if kind == family:
                best[log] = max(best.get(log, 0.0), figures["ndcg"])
        return best

    def table(self, family: str) -> tuple[list[str], list[dict], np.ndarray]:
        "Names of the logs, points that were judged on all of them, and their figures (logs, points)."
        by_point = {}
        for key, figures in self.judged.items():
            log, kind, point = json.loads(key)
            if kind == family:
                by_point.setdefault(json.dumps(point, sort_keys=True), {})[log] = figures["ndcg"]
        here = {log.name for log in self.logs}
        most = max((len(here & set(each)) for each in by_point.values()), default=0)
        points = [point for point, each in by_point.items() if len(here & set(each)) == most > 0]
        logs = [log.name for log in self.logs if points and log.name in by_point[points[0]]]
        points = [point for point in points if set(logs) <= set(by_point[point])]
        figures = np.array([[by_point[point][log] for point in points] for log in logs]).reshape(len(logs), len(points))
        return logs, [json.loads(point) for point in points], figures

    def best(self, family: str, nu: float | None = None) -> tuple[dict, float]:
        "The point with the smallest worst loss (of those with this `nu`), and that loss."
        _, points, figures = self.table(family)
        worst = losses(figures).max(axis=0)
        places = [place for place, point in enumerate(points) if nu is None or point.get("nu", 0.0) == nu]
        place = min(places, key=lambda place: worst[place])
        return points[place], float(worst[place])


def losses(figures: np.ndarray) -> np.ndarray:
    "What each point (column) lacks of the best of its log (row), as a share."
    return 1 - figures / np.maximum(figures.max(axis=1, keepdims=True), 1e-12)


def search(records: Search, family: str, points: int, near: int) -> None:
    "The points of a family, and for ALS some near the best so far (with nu 1 and 0 in turns), and it with other sizes."
    for point in tqdm(list(points_of(family, points)), desc=family):
        records.judge(family, point)
    if family != "als" or records.over:
        return
    for ridge, weight, power in BETWEEN:
        point = {"factors": 64, "regularization": ridge, "alpha": 1.0, "iterations": 10, "unobserved_weight": weight,
                 "user_power": power}  # fmt: skip
        records.judge(family, point, give_up=records.best(family)[1])
    draw = np.random.default_rng(8)
    for turn in tqdm(range(near), desc="near the best"):
        point, _ = records.best(family, (1.0, 0.0)[turn % 2])
        records.judge(family, near_als(point, draw), give_up=records.best(family)[1])
    for changed in ({"factors": 32}, {"factors": 128}, {"iterations": 15}):
        records.judge(family, records.best(family)[0] | changed)


def as_text(point: Mapping) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in point.items() if name != "solver")  # fmt: skip


def left_out(figures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "For each log: the point that is chosen by the others, and what it loses there."
    lost, rows = losses(figures), np.arange(len(figures))
    chosen = np.array([losses(np.delete(figures, row, 0)).max(axis=0).argmin() for row in rows])
    return chosen, lost[rows, chosen]


def team(figures: np.ndarray, size: int = 3) -> list[int]:
    "Points of which the best does well on every log: the proposed one first, then what helps most (worst, then mean)."
    lost, members = losses(figures), []
    while len(members) < size:
        together = [np.minimum.reduce([lost[:, point], *lost[:, members].T]) for point in range(lost.shape[1])]
        members.append(min(range(len(together)), key=lambda point: (together[point].max(), together[point].mean())))
    return members


def section(records: Search, family: str) -> list[str]:
    "What a family's search says."
    logs, points, figures = records.table(family)
    if len(points) < 2:
        return []
    lost, named = losses(figures), {name: as_text(point) for name, point in usual(family).items()}
    texts = [as_text(point) for point in points]
    columns = {name: texts.index(text) for name, text in named.items() if text in texts}
    proposed = int(lost.max(axis=0).argmin())
    chosen, alone = left_out(figures)
    popularity = [records.judged.get(key_of(log, "popularity", {}), {}).get("ndcg", float("nan")) for log in logs]
    head = ["log", "popularity", *columns, "proposed", "best known", "left out"]
    shown = [*columns.values(), proposed]
    lines = [f"## {family}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, log in enumerate(logs):
        cells = [f"{figures[row, column]:.4f} ({lost[row, column]:.0%})" for column in shown]
        lines.append(
            f"| {log} | {popularity[row]:.4f} | {' | '.join(cells)} | {figures[row].max():.4f} | {alone[row]:.0%} |"
        )
    worst = [f"**{lost[:, column].max():.0%}**, {lost[:, column].mean():.0%}" for column in shown]
    lines += [f"| worst loss, mean | | {' | '.join(worst)} | | **{alone.max():.0%}**, {alone.mean():.0%} |", ""]
    lines += [f"Proposed: {texts[proposed]}. {len(points):,} points were judged on all of {len(logs)} logs.", ""]
    better = [
        f"- {texts[point]}: worst {lost[:, point].max():.0%}, mean {lost[:, point].mean():.0%}"
        for point in np.argsort(lost.max(axis=0), kind="stable")[:5]
    ]
    members = team(figures)
    together = lost[:, members].min(axis=1)
    three = [f"- {texts[point]}" for point in members]
    best = [f"- {log}: {texts[int(figures[row].argmax())]}" for row, log in enumerate(logs)]
    lines += ["The five with the smallest worst loss:", "", *better, ""]
    least = f"{together.max():.0%} (mean {together.mean():.0%})"
    lines += [f"Three of which the best loses at most {least}:", "", *three, ""]
    return [*lines, "The best of each log:", "", *best, ""]


def page(records: Search, families: list[str], command: str) -> str:
    logs = [f"| {log.name} | {log.shape} | {len(log.rows):,} |" for log in records.logs]
    parts = [line for family in families for line in section(records, family)]
    return "\n".join([
        "# Defaults", "",
        f"`{command}`. NDCG@{K} of discovery on validation; in brackets the loss to the best known point of the "
        "family on that log. *left out*: the loss of the point that is chosen by the other logs alone; the points "
        "near the best were drawn, and bad ones given up, with all logs in view, so it is a lower bound.", "",
        "| log | shape | users judged |", "|---|---|---|", *logs, "", *parts,
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="public logs")
    parser.add_argument("--minutes", type=float, default=30, help="of the search; a later run goes on")
    parser.add_argument("--families", default=",".join(FAMILIES), help="by commas (default: %(default)s)")
    parser.add_argument("--points", type=int, default=16, help="of the search over ALS")
    parser.add_argument("--near", type=int, default=40, help="points near the best of these")
    parser.add_argument("--users", type=int, default=3000, help="of a log, drawn")
    parser.add_argument("--judged", type=int, default=1000, help="users who are judged, at most")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs judged")
    parser.add_argument("--write", action="store_true", help="the page goes to benchmarks/results/defaults.md")
    options = parser.parse_args()
    families = options.families.split(",")
    if unknown := sorted(set(families) - set(FAMILIES)):
        parser.error(f"--families: unknown {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    if missing := [str(folder) for folder in options.folders if not folder.is_dir()]:
        parser.error(f"{missing[0]}: no such folder")
    file = ROOT / f"build/defaults-{options.users}-{options.judged}.json"  # other sizes are other logs
    if options.fresh:
        file.unlink(missing_ok=True)
    records = Search(file, all_logs(options.folders, options.users, options.judged), options.minutes)
    records.judge("popularity", {})
    for family in families:
        search(records, family, options.points, options.near)
    more = "".join(f" --{name} {getattr(options, name)}" for name in ("points", "near", "users", "judged"))
    text = page(records, families, f"python benchmarks/defaults.py FOLDER ...{more} --families {options.families}")
    print(text)
    if options.write:
        (Path(__file__).parent / "results/defaults.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
