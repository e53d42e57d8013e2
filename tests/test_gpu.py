"""The code for a graphics card, without one: beside the compiled kernels with NumPy, and as a whole on a card that is
emulated (`card.py`). What no test here can say is whether a real card does the same, and how fast."""

import ast
import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from card import CXX, Card, CardArray
from fastapi.testclient import TestClient
from scipy.sparse import csr_matrix
from scipy.sparse import random as random_matrix

from product_recs.api import create_app
from product_recs.bundle.files import publish
from product_recs.core.device import Device, DeviceError, open_device
from product_recs.core.settings import Settings
from product_recs.features import ensure_features
from product_recs.models.als import fit_als
from product_recs.models.array_solver import (
    KERNEL,
    ArrayALS,
    FusedCells,
    PaddedCells,
    MemoryPlan,
    kernel_options,
    memory_plan,
)
from product_recs.models.solver import RotatedALS
from product_recs.search.array_search import ArraySearcher, tiles_of
from product_recs.search.exact import Searcher
from product_recs.train import train_bundle

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(not CXX, reason="there is no g++ here")


def shop(users=3000, items=500, full=0.02):
    "Short rows and long ones, empty ones, an item that nearly everybody has, and a user who has everything."
    matrix = random_matrix(users, items, full, format="lil", random_state=1, dtype=np.float32)
    matrix[: users * 5 // 6, 7], matrix[5], matrix[users - 1] = 1, 1, 0
    matrix = csr_matrix(matrix)
    matrix.eliminate_zeros()
    matrix.data = np.random.default_rng(1).choice([0.5, 0.9, 1.0, 3.0, 40.0], matrix.nnz).astype(np.float32)
    return matrix


def trained(kind, matrix, iterations=8, factors=24, **options):
    model = kind(matrix, factors, **{"regularization": 8.0} | options)
    for _ in range(iterations):
        model.step()
    model.solve_users()
    return model


def apart(ours, theirs):
    "The largest difference of two scores, beside the largest score."
    scores = [model.user_factors @ model.item_factors.T for model in (ours, theirs)]
    return np.abs(scores[0] - scores[1]).max() / np.abs(scores[1]).max()


OBJECTIVES = [{}, {"nu": 0.5, "regularization": 0.5}, {"unobserved_weight": 0.3}, {"cg_steps": 5, "alpha": 3.0}]


@pytest.mark.parametrize("options", OBJECTIVES)
def test_eight_iterations_end_where_those_of_the_kernels_do(options):
    matrix = shop()
    ours, theirs = (trained(kind, matrix, **options) for kind in (ArrayALS, RotatedALS))
    assert apart(ours, theirs) < 1e-5
    assert np.isclose(ours.loss(), theirs.loss(), rtol=1e-6) and not ours.user_factors[2999].any()


@pytest.mark.parametrize("width", [(-12, 0), (-6, 3), (0, 8), (0, 12)])
def test_confidences_of_any_size_leave_finite_factors(width):
    "Rows that float32 cannot solve are solved in float64, one by one."
    rng = np.random.default_rng(3)
    matrix = shop(60, 40, 0.4)
    matrix.data = (10 ** rng.uniform(*width, matrix.nnz)).astype(np.float32)
    for factors in (3, 40):
        ours, theirs = (trained(kind, matrix, 3, factors) for kind in (ArrayALS, RotatedALS))
        for model in (ours, theirs):
            assert np.isfinite(model.user_factors).all() and np.isfinite(model.loss())
        assert np.isclose(ours.loss(), theirs.loss(), rtol=1e-3)


def test_what_does_not_fit_is_streamed_and_gives_the_same_bits():
    "On a card of 20 MB, of which the cells alone would take half."
    matrix = random_matrix(6000, 2000, 0.05, format="csr", random_state=1, dtype=np.float32)
    small = Device("numpy", free=20_000_000)
    plan = memory_plan(small, *matrix.shape, matrix.nnz, 24)
    assert plan.streamed and plan.bytes <= 0.9 * small.free < plan.bytes + 16 * matrix.nnz
    streamed, resident = (
        trained(ArrayALS, matrix, 2, plan=given) for given in (plan, MemoryPlan(False, plan.numbers, plan.bytes))
    )
    assert streamed.users.resident is None and resident.users.resident is not None
    assert np.array_equal(streamed.user_factors, resident.user_factors)
    assert np.array_equal(streamed.item_factors, resident.item_factors)


def test_a_fit_ends_before_it_begins_where_the_factors_do_not_fit(monkeypatch):
    "`auto` trains on the processor and says why, `cuda` refuses and says why."
    matrix = shop(300, 100)
    for module in ("core.device", "models.als"):
        monkeypatch.setattr(
            f"product_recs.{module}.open_device",
            lambda asked: Device("cuda", card="a card", free=1_000_000, asked=asked),
        )
    few = {"factors": 8, "iterations": 2, "progress": False}
    model = fit_als(matrix, device="auto", **few)
    assert model.device.facts()["used"] == "cpu" and "counted on" in model.device.reason
    assert np.array_equal(model.item_factors, fit_als(matrix, **few, device="auto").item_factors)
    with pytest.raises(DeviceError, match="device=cuda: 300 users and 100 items with 8 factors need"):
        fit_als(matrix, device="cuda", **few)


@needs_compiler
@pytest.mark.parametrize("factors", [1, 20, 64, 100])
def test_the_kernel_s_own_source_gives_the_sums(tmp_path, factors):
    "Rows of one cell, of some, and of several blocks."
    rng, counts = np.random.default_rng(factors), np.array([1, 2, 33, 512, 513, 1200])
    starts, cells, rows = np.cumsum(counts) - counts, int(counts.sum()), len(counts)
    given = (
        rng.normal(size=(50, factors)).astype(np.float32),
        rng.integers(0, 50, cells).astype(np.int32),
        rng.uniform(0.1, 9, cells).astype(np.float32),
        starts,
        counts,
    )
    x, scale = rng.normal(size=(rows, factors)).astype(np.float32), rng.uniform(0.5, 1, (rows, 1)).astype(np.float32)
    card = Card(tmp_path)
    fused = FusedCells(card, *map(card.asarray, given), 1200, 1.5, 0.25)
    padded = PaddedCells(np, *given, 1200, 1.5, 0.25)
    for first, second in ((1, -1), (0, 1)):
        ours, theirs = (
            fused.sums(card.asarray(x), card.asarray(scale), first, second).get(),
            padded.sums(x, scale, first, second),
        )
        assert np.abs(ours - theirs).max() < 2e-6 * np.abs(theirs).max()
    assert np.array_equal(fused.heaviest().get(), padded.heaviest()) and card.launches == 2


@needs_compiler
@pytest.mark.parametrize("streamed", [False, True])
def test_a_whole_training_on_an_emulated_card(tmp_path, streamed):
    "Nothing of the card meets anything of this machine, the kernel is launched, and the model is the same."
    matrix, card = shop(60, 40, 0.25), Card(tmp_path)
    matrix.data[matrix.indptr[5]] = 1e9  # a hard row: the user who has everything
    device = Device("cuda", card, "card for tests", 8 << 30, "cuda")
    ours, theirs = (
        trained(ArrayALS, matrix, 1, 9, device=device, plan=MemoryPlan(streamed, 2048, 0)),
        trained(RotatedALS, matrix, 1, 9),
    )
    assert isinstance(ours.x, CardArray) and card.launches > 50
    assert apart(ours, theirs) < 1e-5 and np.isclose(ours.loss(), theirs.loss(), rtol=1e-5)


def test_no_more_memory_is_taken_than_was_foreseen(tmp_path):
    "The bytes of all arrays on the card, at their most, without the kernel's part."
    matrix = random_matrix(6000, 1000, 0.02, format="csr", random_state=1, dtype=np.float32)
    for free, streamed in ((40_000_000, False), (13_600_000, True)):
        card = Card(tmp_path)
        device = Device("numpy", card, "card for tests", free, "cuda")
        plan = memory_plan(device, *matrix.shape, matrix.nnz, 16)
        assert plan.streamed is streamed and plan.bytes <= 0.9 * free
        model = ArrayALS(matrix, 16, 8.0, device=device)
        model.step()
        model.loss()
        assert card.peak <= plan.bytes, (card.peak, plan)


def test_lists_of_an_emulated_card_are_those_of_the_kernels(tmp_path):
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(size, 16)).astype(np.float32) for size in (200, 3000))
    seen, closed = csr_matrix(rng.random((200, 3000)) < 0.02), np.array([5, 2999])
    expected = Searcher(items).top(users, 10, seen, closed)
    card = Card(tmp_path)
    for tiles in ((3000, 1 << 20), (700, 1 << 17)):
        device = Device("cuda", card, "card for tests", 8 << 30, "cuda")
        found_items, scores = ArraySearcher(items, device=device, tiles=tiles).top(users, 10, seen, closed)
        assert np.array_equal(found_items, expected[0]) and np.allclose(scores, expected[1], rtol=1e-5)
    free = 100_000_000
    device = Device("cuda", card := Card(tmp_path), "card for tests", free, "cuda")
    tile, at_once = tiles_of(device, 3000, 16)
    ArraySearcher(items, device=device).top(np.tile(users, (10, 1)), 10)
    assert tile == 3000 and at_once > 3000 and card.peak < 0.9 * free


def test_the_card_is_opened_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", Card(tmp_path))
    for asked in ("auto", "cuda"):
        device = open_device(asked)
        assert device.facts() == {"asked": asked, "used": "cuda", "card": "card for tests"} and device.free > 1 << 32


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    "One shop, trained by the kernels and by the code for the card."
    folder = tmp_path_factory.mktemp("models")
    features = ensure_features("sample")
    given = {"factors": 16, "iterations": 8, "solver": "rotated", "next_model": "none", "progress": False}
    return folder, [train_bundle(features, folder, False, device=device, **given)[0] for device in ("cpu", "numpy")]


def test_the_service_answers_the_same_from_a_bundle_that_the_code_for_the_card_made(bundles):
    folder, versions = bundles
    answers = []
    for version in versions:
        publish(folder, version)
        settings = Settings(models_dir=folder, auth="off", database_url="", rules_file="")
        with TestClient(create_app(settings), base_url="http://localhost") as client:
            lists = [client.get(f"/recommend/{user}?n=10") for user in range(1, 60)]
            assert {answer.status_code for answer in lists} == {200}
            assert {answer.headers["X-Model-Version"] for answer in lists} == {version}
            answers.append([answer.json()["recommendations"] for answer in lists])
    assert answers[0] == answers[1] and len(answers[0][0]) == 10


CUPY_WORDS = re.compile(r"\b(?:xp|self\.xp|cells\.xp|search\.xp)\.(\w+)")


def test_every_function_that_is_asked_of_cupy_is_there():
    cupy = pytest.importorskip("cupy")
    for name in ("models/array_solver.py", "search/array_search.py"):
        words = set(CUPY_WORDS.findall((ROOT / "product_recs" / name).read_text(encoding="utf-8")))
        assert len(words) > 10 and not [word for word in words if not hasattr(cupy, word)]
    tree = ast.parse((ROOT / "product_recs/core/device.py").read_text(encoding="utf-8"))
    paths = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for path in (path for path in paths if re.fullmatch(r"cupy(\.\w+)+", path)):
        here = cupy
        for word in path.split(".")[1:]:
            here = getattr(here, word)


def test_nvidia_s_compiler_takes_the_kernel():
    "For every generation of cards that the compiler knows; it needs no card."
    try:
        folder = Path(next(iter(importlib.import_module("nvidia").__path__)))
        library = ctypes.CDLL(str(next(folder.rglob("libnvrtc.so*"))))
    except (ImportError, StopIteration, OSError):
        pytest.skip("NVIDIA's compiler is not installed: pip install nvidia-cuda-nvrtc")
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    generations = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(generations)
    for generation in generations:
        for factors in (1, 64, 256, 4096):
            options = [f"--gpu-architecture=sm_{generation}", *kernel_options(factors)]
            program, size = ctypes.c_void_p(), ctypes.c_size_t()
            library.nvrtcCreateProgram(ctypes.byref(program), KERNEL.encode(), b"kernel.cu", 0, None, None)
            words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = library.nvrtcCompileProgram(program, len(options), words)
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            assert not failed and not log.value, (generation, factors, log.value)


def test_the_script_for_a_machine_with_a_card_runs_to_its_end_without_one(tmp_path):
    command = ["benchmarks/gpu.sh", "--module", "numpy", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    figures = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert len(figures["checks"]) == 5 and all(check["passed"] for check in figures["checks"])
    assert len(figures["training"]) == 4 and len(figures["lists"]) == 2 and figures["left_out"] == []
    assert "**Without a card**" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
