"""Numbers at the edge: parameters from their smallest to their largest, in every form in which they are handed over."""

import json
import os
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import features_of_log, fresh_project, only_the_jobs

from product_recs.answer.person import confidence_with
from product_recs.bundle.opening import open_bundle
from product_recs.core.columns import DISCOVERY
from product_recs.core.errors import FeatureError, TrainError
from product_recs.core.events import Event
from product_recs.core.parameters import ParameterError, declared_defaults, typed, typed_parameters
from product_recs.features import build_features
from product_recs.jobs.weights import weigh
from product_recs.models.als import PLAIN_DEFAULTS, PLAIN_OBJECTIVE, completed, fit_als
from product_recs.models.foldin import Solver
from product_recs.train import train_bundle

JOBS = ("01_ingest", "02_features", "03_train", "04_evaluate", "05_inference", "jobs/weights", "jobs/tune")
SNAPSHOTS = ("train", "train_validation", "all")
BIN = Path(sys.executable).parent
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def log_of(seed, rows, days, users=8, items=6):
    "A log of some hours or of many years; pairs have old and new rows, so that no snapshot knows all of them."
    rng = np.random.default_rng(seed)
    times = pd.Timestamp("2026-01-01") - pd.to_timedelta(rng.uniform(0, days, rows), unit="D")
    return pd.DataFrame(
        {
            "user_id": rng.integers(1, users + 1, rows),
            "item_id": rng.integers(10, 10 + items, rows),
            "event": rng.choice(["view", "cart", "purchase"], rows),
            "quantity": rng.choice([1, 2, 1000], rows),
            "timestamp": times.floor("s"),
        }
    )


@QUICK
@given(
    st.integers(0, 999),
    st.integers(3, 120),
    st.sampled_from([0.1, 3, 100, 9000]),
    st.sampled_from([0, 1e-4, 0.01, 1, 30, 1e4, 1e6]),
    st.sampled_from(["none", "log1p", "binary", "bm25"]),
    st.sampled_from(["ignore", "none", "log1p"]),
    st.sampled_from([{}, {"view": 1e-6, "purchase": 1e6}, {"view": 1, "cart": 2, "purchase": 4}]),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_every_pair_of_every_snapshot_has_a_finite_and_positive_confidence(
    tmp_path_factory, seed, rows, days, half_life, weighting, quantity, weights, users, items
):
    folder = tmp_path_factory.mktemp("features")
    parameters = dict(
        half_life_days=half_life,
        weighting=weighting,
        quantity=quantity,
        event_weights=weights,
        min_user_items=users,
        min_item_users=items,
    )
    try:
        features = features_of_log(log_of(seed, rows, days), folder, **parameters)
    except FeatureError as error:
        assert "no pair is left with min_user_items" in str(error)
        return
    candidate = {name: parameters[name] for name in ("half_life_days", "weighting", "quantity", "event_weights")}
    for name in SNAPSHOTS:
        snapshot = getattr(features, name)
        for values in (snapshot.confidence.data, weigh(features, {"it": candidate}, name)["it"].confidence.data):
            assert np.isfinite(values).all() and (values > 0).all(), name
        assert np.isfinite(snapshot.age_days.data).all() and (snapshot.age_days.data >= 0).all()
    version, _ = train_bundle(
        features, folder / "models", next_model="none", factors=4, iterations=2, num_threads=1, progress=False
    )
    bundle = open_bundle(folder / "models", version)
    model = bundle.model(DISCOVERY)
    assert np.isfinite(model.user_factors).all() and np.isfinite(model.item_factors).all()
    for row in (0, len(bundle.users) - 1, None):
        confidence = confidence_with(
            bundle, row, [Event(bundle.items[0], "purchase", 1000), Event(bundle.items[len(bundle.items) - 1], "view")]
        )[1]
        assert np.isfinite(confidence).all() and (confidence > 0).all()


@pytest.mark.parametrize("weighting", ["none", "log1p", "binary", "bm25"])
@pytest.mark.parametrize("days, half_life", [(0.1, 1e-4), (100, 1e-4), (9000, 0.01), (9000, 1e6)])
def test_a_decay_to_nothing_and_rows_from_after_the_snapshot_leave_positive_confidences(
    tmp_path, days, half_life, weighting
):
    features = features_of_log(log_of(5, 200, days), tmp_path, half_life_days=half_life, weighting=weighting)
    assert (days < 1) == (features.split.get("by") == "user")
    for name in SNAPSHOTS:
        snapshot = getattr(features, name)
        assert (
            np.isfinite(snapshot.confidence.data).all()
            and (snapshot.confidence.data > 0).all()
            and (snapshot.age_days.data >= 0).all()
        ), name
    if days < 1 and weighting == "none":  # minutes make a difference also where there is no split
        assert features.all.confidence.data.max() > 1e6 * features.all.confidence.data.min()


@pytest.mark.parametrize(
    "parameters",
    [
        dict(regularization=0),
        dict(regularization=1e12),
        dict(alpha=1e-12),
        dict(alpha=1e12),
        dict(factors=1),
        dict(factors=300),
        dict(factors=300, regularization=0),
        dict(iterations=1),
        dict(seed=2**32 - 1),
        dict(cg_steps=500),
        dict(nu=1),
        dict(unobserved_weight=1e-12),
        dict(unobserved_weight=1e12),
    ],
    ids=str,
)
@pytest.mark.parametrize("solver", ["rotated", "implicit"])
def test_training_at_the_ends_of_each_parameter(tmp_path, solver, parameters):
    if solver == "implicit" and {"nu", "unobserved_weight", "cg_steps"} & set(parameters):
        pytest.skip("implicit has no such parameter")
    features = features_of_log(log_of(1, 400, 100, users=30, items=40), tmp_path)
    try:
        model = fit_als(
            features.all.confidence,
            **{"factors": 8, "iterations": 4} | parameters,
            solver=solver,
            num_threads=2,
            progress=False,
        )
    except TrainError as error:
        assert next(iter(parameters)) in str(error), error
        return
    used = completed(parameters | {"solver": solver})
    objective = {name: used[name] for name in PLAIN_OBJECTIVE}
    fold_in_solver = Solver(model.item_factors, used["regularization"], used["alpha"], **objective)
    assert np.isfinite([fold_in_solver.solve(row.indices, row.data) for row in features.all.confidence]).all()
    assert (
        np.isfinite(model.user_factors).all()
        and np.isfinite(model.item_factors).all()
        and np.isfinite([loss for _, loss in model.losses]).all()
    )


WRONG = [float("nan"), float("inf"), -float("inf"), True, "many", None, -5, [1], np.float64("nan")]


@pytest.mark.parametrize("name", ["half_life_days", "min_user_items", "min_item_users"])
def test_a_wrong_number_of_the_features_is_named(tmp_path, name):
    features = features_of_log(log_of(1, 40, 3), tmp_path)
    for value in [*WRONG, "3"]:
        with pytest.raises(FeatureError, match=name):
            build_features(features.interactions, tmp_path / "other", **{name: value})
    assert json.dumps(
        build_features(
            features.interactions,
            tmp_path / "other",
            **{name: np.int64(2) if name != "half_life_days" else np.float32(2)},
        ).parameters
    )


@pytest.mark.parametrize(
    "name",
    [
        "factors",
        "regularization",
        "alpha",
        "iterations",
        "seed",
        "num_threads",
        "loss_every",
        "unobserved_weight",
        "nu",
        "cg_steps",
        "user_power",
        "item_power",
    ],
)
def test_a_wrong_number_of_the_training_is_named(tmp_path, name):
    confidence = features_of_log(log_of(1, 40, 3), tmp_path).all.confidence
    for value in [*WRONG, "3"]:
        if value is None and name in PLAIN_DEFAULTS:
            continue  # not given
        with pytest.raises(TrainError, match=name):
            fit_als(confidence, **{name: value}, progress=False)


@pytest.mark.parametrize(
    "moment",
    [
        "2025-12-10T00:00:00Z",
        "2025-12-10",
        " 2025-12-10 00:00 ",
        "2025-12-10T02:00:00+02:00",
        date(2025, 12, 10),
        datetime(2025, 12, 10),
    ],
)
def test_a_moment_means_the_same_in_every_form(tmp_path, moment):
    features = features_of_log(log_of(1, 300, 100), tmp_path, validation_from=moment)
    assert features.split["validation_from"] == "2025-12-10T00:00:00"


@pytest.mark.parametrize(
    "dates",
    [
        dict(validation_from="soon"),
        dict(test_from="2026-02-30"),
        dict(test_from="99999-01-01"),
        dict(validation_from=None),
        dict(validation_from="0001-01-01"),
        dict(validation_from="2025-12-30", test_from="2025-12-20"),
        dict(validation_from="9999-12-31T23:59:59-14:00"),
    ],
    ids=str,
)
def test_a_moment_that_cannot_be_is_refused_by_name(tmp_path, dates):
    with pytest.raises(FeatureError, match=next(iter(dates))):
        features_of_log(log_of(1, 300, 100), tmp_path, **dates)


def forms_of(default):
    "What somebody may write for a default, and how papermill, YAML and Python hand it over."
    yield default
    yield str(default)
    if isinstance(default, (list, dict)):
        yield json.dumps(default)
        yield str(default).replace("'", "")
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        yield f"{default:e}"
        yield np.float64(default)
        yield float(default)


@pytest.mark.parametrize("job", JOBS)
def test_every_declared_parameter_takes_its_value_in_every_form(job):
    for name, default in declared_defaults(job).items():
        for form in forms_of(default):
            value = typed(name, form, default)
            assert value == default and type(value) in (type(default), float), (name, form, value)
        for wrong in (
            object(),
            {1: 2},
            float("nan") if not isinstance(default, (str, bool, list)) else None,
        ):
            with pytest.raises(ParameterError, match=name):
                typed(name, wrong, default)
        if isinstance(default, str):
            assert (
                typed(name, 20260101, default) == "20260101" and typed(name, date(2026, 1, 2), default) == "2026-01-02"
            )
    assert typed_parameters(job, declared_defaults(job)) == declared_defaults(job)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = fresh_project(tmp_path_factory.mktemp("project"))
    only_the_jobs(root)
    (root / "reports").mkdir()
    return root


def papermill(root, job, *options):
    return subprocess.run(
        [
            str(BIN / "papermill"),
            f"nbs/{job}.ipynb",
            f"reports/{job}.ipynb",
            "--log-level",
            "ERROR",
            "--no-progress-bar",
            *options,
        ],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PRODUCT_RECS_ROOT": str(root)},
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def pairs(**parameters):
    return [part for name, value in parameters.items() for part in ("-p", name, value)]


@pytest.mark.slow
def test_papermill_s_own_forms_of_values_work(project):
    rows = [
        f"{user},{10 + (user * step) % 7},{datetime(2026, 1, 1) + timedelta(days=step)}"
        for user in range(1, 9)
        for step in range(1, 40)
    ]
    (project / "shop.csv").write_text("\n".join(["customer,sku,at", *rows]))
    common = pairs(run="20260101", report_dir="2026")
    columns = pairs(
        source="shop.csv",
        products="",
        columns='{"user_id": "customer", "item_id": "sku", "timestamp": "at"}',
        events="purchase",
        max_quantity="1e3",
        max_reject_share="0",
    )
    (project / "more.yaml").write_text(
        "validation_from: 2026-01-25\ntest_from: 2026-02-01T00:00:00Z\nhalf_life_days: 1e2\n"
    )
    for job, options in (
        ("01_ingest", columns),
        ("02_features", [*pairs(event_weights="{'purchase': '3'}", min_user_items="1.0"), "-f", "more.yaml"]),
        ("03_train", pairs(regularization="1e-3", factors="4", iterations="3", publish_bundle="True", model="ALS")),
    ):
        done = papermill(project, job, *common, *options)
        assert done.returncode == 0, done.stderr[-1500:]
    metrics = json.loads((project / "2026/metrics.json").read_text())
    assert (
        metrics["02_features"]["split"]["test_from"] == "2026-02-01T00:00:00"
        and metrics["02_features"]["split"]["validation_from"] == "2026-01-25T00:00:00"
    )
    manifest = json.loads(next((project / "models").glob("*/manifest.json")).read_text())
    assert (
        manifest["parameters"]["als"]["regularization"] == 0.001
        and manifest["parameters"]["features"]["event_weights"] == {"purchase": 3}
        and manifest["data"]["run"] == "20260101"
    )


@pytest.mark.parametrize(
    "job, name, value",
    [
        ("01_ingest", "columns", "user_id"),
        ("01_ingest", "max_reject_share", "40"),
        ("02_features", "half_life_days", "-1"),
        ("02_features", "validation_from", "soon"),
        ("03_train", "factors", "many"),
        ("03_train", "publish_bundle", "perhaps"),
        ("03_train", "nu", "2"),
    ],
)
def test_papermill_is_told_by_name_what_a_parameter_may_be(project, job, name, value):
    done = papermill(project, job, "-p", name, value)
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode and name in error and "must be" in error, error
