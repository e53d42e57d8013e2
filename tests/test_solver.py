"""The trainer's own solver as a whole: the same model on any number of threads and through the NumPy path, interrupts,
and an installation without a compiler."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse import random as random_matrix
from support import build_wheel

from product_recs.data.checkerboard import snapshot_of
from product_recs.models.als import ALS, ScaledALS, WeightedALS, fit_als
from product_recs.models.foldin import Solver, fold_in
from product_recs.models.solver import RotatedALS, native_kernels, solve_rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shop():
    "Short rows and long ones, empty ones, an item that nearly everybody has."
    rng = np.random.default_rng(1)
    matrix = random_matrix(3000, 500, 0.02, format="lil", random_state=1, dtype=np.float32)
    matrix[:2600, 7] = 1
    matrix[5] = 1
    matrix[2999] = 0
    matrix = csr_matrix(matrix)
    matrix.eliminate_zeros()
    matrix.data = rng.choice([0.5, 0.9, 1.0, 3.0, 40.0], matrix.nnz).astype(np.float32)
    return matrix


@pytest.mark.parametrize("options", [{}, {"nu": 0.5, "regularization": 0.5}, {"unobserved_weight": 0.3}])
def test_kernels_and_numpy_end_in_the_same_model(shop, options):
    options = {"factors": 24, "regularization": 8.0} | options
    models = [
        RotatedALS(shop, **options, native=native, num_threads=2)
        for native in ([True] if native_kernels() else []) + [False]
    ]
    for model in models:
        for _ in range(3):
            model.step()
        model.solve_users()
    losses = [model.loss() for model in models]
    assert np.allclose(losses, losses[0], rtol=1e-5)
    scores = [model.user_factors @ model.item_factors.T for model in models]
    assert all(np.abs(score - scores[0]).max() < 5e-3 for score in scores)
    assert not models[0].user_factors[2999].any()


def test_threads_change_nothing_and_the_service_would_solve_the_same(shop):
    single, many = (
        fit_als(
            shop, factors=20, regularization=8.0, iterations=4, solver="rotated", num_threads=threads, progress=False
        )
        for threads in (1, 5)
    )
    assert (
        np.array_equal(single.user_factors, many.user_factors)
        and np.array_equal(single.item_factors, many.item_factors)
        and single.losses == many.losses
    )
    solver = Solver(single.item_factors, 8.0, 1.0)
    expected = np.array([solver.solve(row.indices, row.data) for row in shop])
    assert (np.linalg.norm(single.user_factors - expected, axis=1) <= 1e-5 * np.linalg.norm(expected, axis=1)).all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("nu", [0, 0.5, 1])
@pytest.mark.parametrize("unobserved", [1, 0.1, 3])
def test_fold_in_ends_where_training_does(shop, unobserved, nu, native):
    "For a block and for one user at a time, with short rows, long ones and one that weighs ten thousand times as much."
    if native and native_kernels() is None:
        pytest.skip("there are no kernels here")
    shop, objective = shop[:400].copy(), {"unobserved_weight": unobserved, "nu": nu}
    shop.data[shop.indptr[7] : shop.indptr[7] + 3] = 1e4
    regularization = 8.0 if nu == 0 else 0.1
    model = RotatedALS(shop, 24, regularization, native=native, num_threads=2, **objective)
    for _ in range(3):
        model.step()
    model.solve_users()
    users, items = model.user_factors, model.item_factors
    solver = Solver(items, regularization, 1.0, **objective)
    for folded in (
        fold_in(items, shop, regularization, 1.0, **objective),
        solve_rows(items, shop, regularization, native=native, **objective),
        np.array([solver.solve(row.indices, row.data) for row in shop]),
    ):
        assert (np.linalg.norm(folded - users, axis=1) <= 2e-5 * np.linalg.norm(users, axis=1)).all()


def test_without_kernels_every_model_of_the_family_trains_and_folds_in(shop, monkeypatch):
    for module in ("als", "solver"):
        monkeypatch.setattr(f"product_recs.models.{module}.native_kernels", lambda: None)
    shop = snapshot_of(shop[:200].toarray())
    few = {"factors": 8, "iterations": 2}
    expected = {ALS: "implicit", WeightedALS: "implicit", ScaledALS: "rotated"}
    models = [kind(**few).fit(shop) for kind in expected]
    assert [model.parameters["solver"] for model in models] == list(expected.values())
    models.append(ALS(**few, nu=0.5, regularization=0.5).fit(shop))
    assert models[-1].parameters["solver"] == "rotated"
    for model in models:
        far = np.linalg.norm(model.fold_in(shop.histories(np.arange(200))) - model.user_factors, axis=1)
        assert (far <= 1e-5 * np.linalg.norm(model.user_factors, axis=1)).all()


def test_the_loss_never_rises_and_ends_no_higher_than_that_of_implicit(shop):
    losses = {
        solver: fit_als(
            shop, factors=16, regularization=8.0, iterations=40, loss_every=1, solver=solver, progress=False
        ).losses
        for solver in ("implicit", "rotated")
    }
    values = [loss for _, loss in losses["rotated"]]
    assert len(values) == 40 and all(later <= earlier * (1 + 1e-5) for earlier, later in zip(values, values[1:]))
    assert values[-1] <= losses["implicit"][-1][1] * 1.001


def ours():
    """The threads, without the one that tqdm begins with the first bar of a process."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}


def test_an_interrupt_ends_the_fit_and_leaves_no_thread(shop):
    before = ours()
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fit_als(shop, factors=64, iterations=10_000, loss_every=0, solver="rotated", progress=False)
    timer.join()
    deadline = time.monotonic() + 20
    while ours() != before and time.monotonic() < deadline:  # one that was told to end may take a moment
        time.sleep(0.02)
    assert ours() == before


def test_an_interrupt_at_any_moment_is_only_an_interrupt():
    "One that comes while a thread is being started loses sight of it; the thread must not read what has gone."
    program = """import os, random, signal, threading, numpy as np, scipy.sparse as s
from product_recs.models.als import fit_als
signal.signal(signal.SIGINT, signal.default_int_handler)
matrix, rng, interrupted = (
    s.random(3000, 500, 0.02, format="csr", random_state=1, dtype=np.float32),
    random.Random(0),
    0,
)
for _ in range(150):
    timer = threading.Timer(0.02 + rng.random()*0.08, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        fit_als(matrix, factors=64, iterations=10_000, loss_every=0, solver="rotated", progress=False)
    except KeyboardInterrupt:
        interrupted += 1
    timer.join()
print(interrupted)"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.split() == ["150"], run.stderr[-2000:]


def test_without_a_compiler_the_package_is_built_and_trains(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path, CC="false")) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    program = """import numpy as np, scipy.sparse as s
from product_recs.models.solver import native_kernels, RotatedALS
model = RotatedALS(s.csr_matrix(np.eye(9, dtype=np.float32)), 4)
model.step()
print(native_kernels(), model.loss() > 0)"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    assert run.stdout.split() == ["None", "True"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc") and not shutil.which("cc"), reason="there is no compiler here")
def test_a_wheel_with_kernels_serves_every_python(wheel, tmp_path):
    assert "cp310-abi3" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(name for name in archive.namelist() if name.endswith(".so")) == [
            "product_recs/_als.abi3.so",
            "product_recs/_search.abi3.so",
        ]
        archive.extractall(tmp_path / "site")
    program = (
        "from product_recs.core.kernels import compiled; print(compiled('_als') is not None, compiled('_search') is "
        "not None)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    assert run.stdout.split() == ["True", "True"], run.stderr


WIDTHS = ((0, 0), (-12, 0), (-6, 3), (0, 8), (-12, 12))  # powers of ten of the confidences


def wide_shop(seed, users, items, full, width, outliers):
    "Confidences over many orders of magnitude; with `outliers` all are 1 but a few."
    rng = np.random.default_rng(seed)
    taken = rng.random((users, items)) < full
    taken[0, 0] = True
    values = 10 ** rng.uniform(*width, taken.shape)
    if outliers:
        values = np.where(rng.random(taken.shape) < 0.03, 10.0 ** width[1], 1)
    return csr_matrix(np.where(taken, values, 0).astype(np.float32))


def by_the_book(confidence, factors, regularization):
    "Each row's solution, and its matrix, in float64 and without squaring what is heavy."
    for row in confidence.toarray().astype(float):
        weight = np.where(row > 0, row, 1.0)
        rows = np.vstack([np.sqrt(weight)[:, None] * factors, np.sqrt(regularization) * np.eye(factors.shape[1])])
        wanted = np.append(np.where(row > 0, np.sqrt(weight), 0), np.zeros(factors.shape[1]))
        yield np.linalg.lstsq(rows, wanted, rcond=None)[0], rows.T @ rows, row > 0


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 1000),
    st.integers(1, 50),
    st.integers(1, 120),
    st.sampled_from([0.02, 0.2, 0.6, 1.0]),
    st.sampled_from(WIDTHS),
    st.booleans(),
    st.sampled_from([1, 3, 16, 17, 40, 130]),
    st.sampled_from([0, 1e-6, 1e-2, 1, 20, 1e6]),
    st.integers(1, 2),
    st.booleans(),
)
def test_no_confidence_and_no_regularization_makes_a_factor_infinite(
    seed, users, items, full, width, outliers, factors, regularization, threads, native
):
    """Where what all rows share leaves a solution, scores over all items are right to 5 per mille, and one by one to 2
    in 100,000."""
    native = native and native_kernels() is not None
    confidence = wide_shop(seed, users, items, full, width, outliers)
    model = RotatedALS(confidence, factors, regularization, seed=seed, num_threads=threads, native=native)
    for _ in range(3):
        model.step()
    model.solve_users()
    assert np.isfinite(model.user_factors).all() and np.isfinite(model.item_factors).all() and np.isfinite(model.loss())
    fixed = np.random.default_rng(seed).standard_normal((items, factors), np.float32) / np.sqrt(np.float32(factors))
    solved, solver = (
        solve_rows(fixed, confidence, regularization, num_threads=threads, native=native),
        Solver(fixed, regularization, 1.0),
    )
    shared = fixed.T.astype(float) @ fixed + regularization * np.eye(factors)
    assert np.isfinite(solved).all()
    if np.linalg.cond(shared) > 1e5:
        return
    root = np.linalg.inv(np.linalg.cholesky(shared))
    for row, (exact, matrix, taken) in enumerate(by_the_book(confidence, fixed.astype(float), regularization)):
        if not taken.any() or np.linalg.eigvalsh(root @ matrix @ root.T)[0] < 1e-3:
            continue
        single = solver.solve(np.flatnonzero(taken), confidence[row].data)
        for name, x in (("rows", solved[row]), ("one", single)):
            error = x - exact
            tolerance = 5e-3 if name == "rows" else 2e-5
            assert error @ shared @ error <= tolerance**2 * (exact @ shared @ exact), (name, row)


@pytest.mark.parametrize("solver", ["implicit", "rotated"])
@pytest.mark.parametrize("big", [1e8, 1e10, 1e12])
def test_one_user_with_an_absurd_confidence_spoils_nobody(shop, solver, big):
    shop = shop[:600, :200].copy()
    shop.data[shop.indptr[3] : shop.indptr[4]] = big
    for seed in range(8 if solver == "rotated" else 2):
        model = fit_als(
            shop, factors=16, regularization=20.0, iterations=6, seed=seed, solver=solver, num_threads=2, progress=False
        )
        scores = model.user_factors @ model.item_factors.T
        assert (
            np.isfinite(scores).all()
            and np.abs(scores[3, shop[3].indices] - 1).max() < 0.05
            and np.abs(scores).max() < 100
        )


def test_no_row_of_an_ordinary_shop_leaves_the_kernels(shop, monkeypatch):
    """A confidence of 1 is that of an unobserved cell, which is no reason to solve a row in float64: that takes a
    hundred times as long."""
    if native_kernels() is None:
        pytest.skip("there are no kernels here")
    seen = []
    monkeypatch.setattr(
        "product_recs.models.solver._hard_rows", lambda side, fixed, solved, rows, *given: seen.append(len(rows))
    )
    ones = csr_matrix((np.ones_like(shop.data), shop.indices, shop.indptr), shape=shop.shape)
    for confidence in (shop, ones):
        model = RotatedALS(confidence, 64, 20.0, seed=0, num_threads=2, native=True)
        for _ in range(4):
            model.step()
    assert len(seen) >= 16 and sum(seen) == 0
