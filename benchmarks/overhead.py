"""How much time does this project add to the libraries that it stands on? Ratios of one run, alternating, BLAS held for
both.

    python benchmarks/overhead.py [--rounds 5]

Training: `train.fit_als` against a bare `implicit` fit, on the Complete Journey where `make data` has written it, else
on the
committed sample; `train_bundle` also writes and verifies the bundle. The serving figures come from
benchmarks/serving.py.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from implicit.cpu.als import AlternatingLeastSquares

from product_recs.core.kernels import one_blas_thread
from product_recs.core.paths import resolve_path
from product_recs.features import ensure_features
from product_recs.ingest import ensure_ingested
from product_recs.models.als import fit_als
from product_recs.models.solver import int32_matrix
from product_recs.train import train_bundle

PARAMETERS = {"factors": 64, "regularization": 30.0, "iterations": 15}


def bare(confidence):
    "What one would write with implicit alone."
    with one_blas_thread():
        AlternatingLeastSquares(**PARAMETERS, random_state=0).fit(confidence, show_progress=False)


def seconds(call, *arguments, **options):
    started = time.perf_counter()
    call(*arguments, **options)
    return time.perf_counter() - started


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=5)
rounds = parser.parse_args().rounds
if resolve_path("data/complete_journey/interactions.csv").exists():
    ensure_ingested("overhead", source="data/complete_journey/interactions.csv", products="", users="")
    features = ensure_features("overhead", min_item_users=5, event_weights={"purchase": 1})
else:
    features = ensure_features("sample")
matrix = int32_matrix(features.all.confidence)
print(f"{matrix.shape[0]:,} users, {matrix.shape[1]:,} items, {matrix.nnz:,} pairs, {PARAMETERS}")
bare(matrix)  # warm up
fits, bundles, plain = [], [], []
given = {"publish_it": True, "next_model": "none", "index": "exact", "progress": False, **PARAMETERS}
with tempfile.TemporaryDirectory() as folder:
    for number in range(rounds):
        plain.append(seconds(bare, matrix))
        fits.append(seconds(fit_als, matrix, **PARAMETERS))
        bundles.append(seconds(train_bundle, features, Path(folder) / str(number), **given))
print("\n| what | median seconds | times the bare fit (median of pairs, smallest to largest) |\n|---|---|---|")
for name, times in (
    ("implicit, bare", plain),
    ("fit_als: checks, progress, loss every 5th iteration", fits),
    ("train_bundle: fit, write, hash, publish", bundles),
):
    ratios = sorted(ours / theirs for ours, theirs in zip(times, plain))
    print(
        f"| {name} | {statistics.median(times):.2f} | {statistics.median(ratios):.3f} ({ratios[0]:.3f} to "
        f"{ratios[-1]:.3f}) |"
    )
