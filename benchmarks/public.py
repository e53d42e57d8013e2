"""What the scripts on public data share: reading a folder, and choosing parameters on held-out items."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from tqdm import tqdm

from product_recs.data.snapshots import Snapshot
from product_recs.evaluation.metrics import find_hits
from product_recs.models.all import fit_sharing
from product_recs.models.interface import Model, top_lists


def read_log(path: Path, columns: list[str], remedy: str) -> pd.DataFrame:
    "A Parquet file that has these columns; the program ends with what is wrong where it has not."
    if not path.exists():
        sys.exit(f"{path}: the file is missing; {remedy}")
    log = pd.read_parquet(path)
    if missing := [column for column in columns if column not in log]:
        sys.exit(f"{path}: no column {', '.join(missing)}; it has {', '.join(map(str, log.columns))}")
    if log.empty or log[columns].isna().any(axis=None):
        sys.exit(f"{path}: {'no rows' if log.empty else 'ids are missing in some rows'}")
    return log


def metrics_of(model: Model, targets: csr_matrix, users: np.ndarray, k: int, names: tuple[str, ...], advance=None):
    "A row a user, a column a metric."
    hits = find_hits(top_lists(model, users, k, advance=advance)[0], targets[users])
    return np.column_stack([hits.metric(name, k) for name in names])


class Choosing:
    "Parameters by the NDCG of some users' held-out items."

    def __init__(self, snapshot: Snapshot, targets: csr_matrix, users: np.ndarray, k: int):
        self.snapshot, self.targets, self.users, self.k = snapshot, targets, users, k
        self.fitted, self.tried, self.values = {}, {}, {}

    def value(self, model: Model) -> float:
        "Mean NDCG; the models of a search are not kept, their parts are."
        parts = dict(self.fitted)
        fitted = fit_sharing(model, self.snapshot, parts)
        if model.parts:
            self.fitted = {key: part for key, part in parts.items() if part is not fitted}
        return self.judged(fitted)

    def judged(self, fitted: Model) -> float:
        "Mean NDCG of a model that was fitted on the snapshot."
        return float(metrics_of(fitted, self.targets, self.users, self.k, ("ndcg",)).mean())

    def best(self, name: str, make: Callable[..., Model], grid: dict[str, tuple]) -> dict:
        "One parameter after the other takes the best of its values, until none gets better."
        chosen, seen = {key: values[0] for key, values in grid.items()}, {}

        def worth(parameters: dict) -> float:
            key = json.dumps(parameters)
            if key not in seen:
                seen[key] = self.value(make(**parameters))
                bar.update()
            return seen[key]

        with tqdm(desc=name, unit=" fits", leave=False) as bar:
            for _ in range(4):
                before = dict(chosen)
                for key, values in grid.items():
                    chosen[key] = max(values, key=lambda value: worth(chosen | {key: value}))
                if chosen == before:
                    break
        self.tried[name], self.values[name] = len(seen), worth(chosen)
        best = f"NDCG@{self.k} {worth(chosen):.4f}"
        tqdm.write(f"{name}: {chosen}, {best} on validation, best of {len(seen)}", file=sys.stderr)
        return chosen
