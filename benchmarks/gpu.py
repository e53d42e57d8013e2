"""Training and lists on a graphics card beside this machine's processor, in one run of at most so many minutes.

    benchmarks/gpu.sh [--minutes 8] [--out folder]             on a machine with a card of NVIDIA and CuPy
    benchmarks/gpu.sh --module numpy --quick                   the same steps without a card, in a tiny size

First it checks that the card does the same as the compiled kernels: the sums of the kernel, a training of eight
iterations, cells that are streamed, lists. Then it measures: seconds an iteration with 64, 128 and 256 factors on one
and on fifty million pairs, beside our C on all cores and, where its libraries are there, `implicit` on the card; lists
for a million users. What does not fit into the time is left out and named. After each step the figures so far are
written to `gpu.json` and `gpu.md` in the folder, so that a run that is cut off leaves what it had. It ends with 1 where
a check failed. It needs NumPy, SciPy, threadpoolctl and CuPy; nothing is downloaded.

The training that is checked has the plain objective with regularization 20. Where factors are held less, as with
regularization 5 on these logs without any taste, eight iterations carry the rounding of float32 to a thousandth of the
largest score: the compiled kernels and their own NumPy version differ by as much. The losses agree all the same.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import traceback
from pathlib import Path
from time import perf_counter

import numpy as np
from scipy.sparse import csr_matrix

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from product_recs.core.device import DeviceError, open_device  # noqa: E402
from product_recs.core.kernels import compiled  # noqa: E402
from product_recs.models.array_solver import (  # noqa: E402
    ArrayALS,
    FusedCells,
    PaddedCells,
    MemoryPlan,
    memory_plan,
    on_host,
)
from product_recs.models.solver import RotatedALS  # noqa: E402
from product_recs.search.array_search import ArraySearcher  # noqa: E402
from product_recs.search.exact import Searcher  # noqa: E402

ALS = {"regularization": 20.0, "alpha": 1.0}


def shop(pairs: int, users: int, items: int, seed: int = 0) -> csr_matrix:
    "About so many pairs; users by a log-normal, items by 1 / rank."
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 1, users)
    counts = np.maximum(1, rng.poisson(sizes * pairs / sizes.sum()))
    reach = np.cumsum(1 / np.arange(1, items + 1) ** 0.9)
    item = np.searchsorted(reach, rng.random(counts.sum(), np.float32) * reach[-1]).clip(max=items - 1)
    matrix = csr_matrix(
        (np.ones(len(item), np.float32), item.astype(np.int32), np.concatenate([[0], np.cumsum(counts)])),
        shape=(users, items),
    )
    matrix.sum_duplicates()
    return matrix


class Run:
    "The device, the clock, and the figures so far."

    def __init__(self, options):
        self.started, self.options = perf_counter(), options
        self.device = open_device(options.module)
        self.arm = "the card" if self.device.name == "cuda" else "its code with NumPy"
        self.folder = Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.figures = {"facts": self.facts(), "checks": [], "training": [], "lists": [], "left_out": []}

    def facts(self) -> dict:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        card = {"device": self.device.name, "card": self.device.card or "none", "free_gb": self.device.free / 1e9}
        if self.device.name == "cuda":
            cupy = self.device.module
            card |= {"cupy": cupy.__version__, "cuda": cupy.cuda.runtime.runtimeGetVersion()}
            card["driver"] = cupy.cuda.runtime.driverGetVersion()
        return card | {
            "processor": processor(),
            "cores": cores,
            "kernels": compiled("_als") is not None,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "quick": self.options.quick,
        }

    def left(self) -> float:
        "Seconds."
        return 60 * self.options.minutes - (perf_counter() - self.started)

    def wait(self) -> None:
        "For what the card has still to do."
        if self.device.name == "cuda":
            self.device.module.cuda.get_current_stream().synchronize()

    def write(self) -> None:
        self.figures["seconds"] = perf_counter() - self.started
        (self.folder / "gpu.json").write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
        (self.folder / "gpu.md").write_text(page(self.figures), encoding="utf-8")

    def step(self, name: str, seconds: float, work) -> None:
        "Do it, if there are as many seconds; a failure is written down and does not end the run."
        if self.left() < seconds:
            self.figures["left_out"].append(
                f"{name}: it wants {seconds:.0f} s, and {max(0, self.left()):.0f} s are left"
            )
        else:
            print(f"{perf_counter() - self.started:6.1f} s  {name}", flush=True)
            try:
                work()
            except Exception as error:  # the other steps are worth having
                traceback.print_exc()
                self.figures["left_out"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                if name.startswith("check"):
                    self.check(name, False, f"{type(error).__name__}: {str(error)[:300]}")
            if self.device.name == "cuda":
                self.device.module.get_default_memory_pool().free_all_blocks()
        self.write()

    def check(self, name: str, passed: bool, figure: str) -> None:
        print(f"          {'passed' if passed else 'FAILED'}: {figure}", flush=True)
        self.figures["checks"].append({"check": name, "passed": bool(passed), "figure": figure})


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def iterated(model, steps: int = 8):
    for _ in range(steps):
        model.step()
    model.solve_users()
    return model


def check_kernel(run: Run) -> None:
    "The kernel beside the same sums by operations of the array module."
    xp, rng = run.device.module, np.random.default_rng(0)
    counts = np.concatenate([rng.integers(1, 60, 500), [511, 512, 513, 5000]])
    starts, cells, worst = np.cumsum(counts) - counts, int(counts.sum()), 0.0
    for factors in (20, 64, 128, 256):
        fixed, x = (rng.normal(size=(size, factors)).astype(np.float32) for size in (3000, len(counts)))
        given = (fixed, rng.integers(0, 3000, cells).astype(np.int32), rng.uniform(0.1, 9, cells).astype(np.float32))
        arrays = [xp.asarray(part) for part in (*given, starts, counts)]
        scale = xp.ones((len(counts), 1), np.float32)
        kind = FusedCells if run.device.name == "cuda" else PaddedCells
        ours = on_host(kind(xp, *arrays, 5000, 1.5, 0.25).sums(xp.asarray(x), scale, 1, -1))
        theirs = PaddedCells(np, *given, starts, counts, 5000, 1.5, 0.25).sums(
            x, np.ones((len(counts), 1), np.float32), 1, -1
        )
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    run.check("check the kernel", worst < 1e-5, f"sums differ by {worst:.1e} of the largest")


def check_training(run: Run) -> None:
    "Eight iterations beside the compiled kernels, twice, and with the cells streamed."
    matrix = shop(*((20_000, 600, 300) if run.options.quick else (300_000, 8000, 4000)))
    plan = memory_plan(run.device, *matrix.shape, matrix.nnz, 64)
    factors = 16 if run.options.quick else 64
    ours, again, streamed = (
        iterated(ArrayALS(matrix, factors, **ALS, device=run.device, plan=given))
        for given in (plan, plan, MemoryPlan(True, plan.numbers, 0))
    )
    theirs = iterated(RotatedALS(matrix, factors, **ALS))
    scores = [model.user_factors[:2000] @ model.item_factors.T for model in (ours, theirs)]
    apart = float(np.linalg.norm(scores[0] - scores[1]) / np.linalg.norm(scores[1]))
    loss = abs(ours.loss() / theirs.loss() - 1)
    run.check(
        "check the training",
        apart < 1e-5 and loss < 1e-5,
        f"scores differ by {apart:.1e} of their size, losses by {loss:.1e}",
    )
    same = np.array_equal(ours.item_factors, again.item_factors)
    run.check("check a second run", same, "the same bits" if same else "other bits")
    same = np.allclose(ours.item_factors, streamed.item_factors, atol=1e-6)
    run.check("check streamed cells", same, "the same factors" if same else "other factors")


def check_lists(run: Run) -> None:
    rng, (m, n) = np.random.default_rng(0), (300, 2000) if run.options.quick else (3000, 40_000)
    users, items = (rng.normal(size=(size, 64)).astype(np.float32) for size in (m, n))
    seen = csr_matrix((np.ones(20 * m, bool), rng.integers(0, n, 20 * m), np.arange(0, 20 * m + 1, 20)), shape=(m, n))
    ours, theirs = ArraySearcher(items, device=run.device).top(users, 10, seen), Searcher(items).top(users, 10, seen)
    apart, same = float(np.abs(ours[1] - theirs[1]).max()), float((ours[0] == theirs[0]).mean())
    run.check(
        "check the lists", apart < 1e-3 and same > 0.999, f"{same:.2%} of the places are equal, scores to {apart:.1e}"
    )


def seconds_a_step(model, wait, most: float, steps: int = 3) -> float:
    "The least of some iterations after one that warms up, within so many seconds."
    begin, least = perf_counter(), float("inf")
    for round_ in range(1 + steps):
        start = perf_counter()
        model.step()
        wait()
        if round_:
            least = min(least, perf_counter() - start)
        if round_ and perf_counter() - begin > most:
            break
    return least


def train(run: Run, name: str, matrix: csr_matrix, factors: int, arms: tuple, most: float) -> None:
    for arm in arms:
        start = perf_counter()
        row = {"arm": arm, "log": name, "pairs": int(matrix.nnz), "factors": factors}
        if arm == run.arm:
            model = ArrayALS(matrix, factors, **ALS, device=open_device(run.options.module))
            run.wait()
            row |= {"streamed": model.plan.streamed, "foreseen_gb": model.plan.bytes / 1e9}
        else:
            model = RotatedALS(matrix, factors, **ALS)
        row["ready"] = perf_counter() - start
        row["seconds"] = seconds_a_step(model, run.wait, most)
        run.figures["training"].append(row)
        print(f"          {arm}: {row['seconds']:.4f} s an iteration", flush=True)
        del model


def train_implicit(run: Run, name: str, matrix: csr_matrix, factors: int, iterations: int = 5) -> None:
    "`implicit`'s ALS on the card: from the end of its first iteration to that of its last."
    if not importlib.import_module("implicit.gpu").HAS_CUDA:
        raise ImportError("implicit says that it has no CUDA; its libraries are missing")
    kind = importlib.import_module("implicit.gpu.als").AlternatingLeastSquares
    model, ends, start = kind(factors=factors, iterations=iterations, **ALS), [], perf_counter()
    model.fit(matrix, show_progress=False, callback=lambda *_: ends.append(perf_counter()))
    model.item_factors.to_numpy()  # waits for the card
    seconds = (perf_counter() - ends[0]) / (iterations - 1)
    row = {"arm": "implicit on the card", "log": name, "pairs": int(matrix.nnz), "factors": factors}
    run.figures["training"].append(row | {"ready": ends[0] - start, "seconds": seconds})


def lists(run: Run, users: int, items: int, factors: int, n: int = 10) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(size, factors)).astype(np.float32) for size in (users, items))
    y *= (1 / np.arange(1, items + 1) ** 0.3)[:, None].astype(np.float32)  # lengths that differ, as after ALS
    block = 1 << 16
    for arm, searcher in (
        (run.arm, lambda: ArraySearcher(y, device=run.device)),
        ("our C", lambda: Searcher(y)),
    ):
        search = searcher()
        search.top(x[:1024], n, threads=0)
        start, done = perf_counter(), 0
        while done < users and perf_counter() - start < 45:
            search.top(x[done : done + block], n, threads=0)
            done = min(users, done + block)
        row = {"arm": arm, "users": done, "items": items, "factors": factors, "seconds": perf_counter() - start}
        run.figures["lists"].append(row)
        print(f"          {arm}: {done / row['seconds']:,.0f} users a second", flush=True)


def page(figures: dict) -> str:
    facts, lines = figures["facts"], ["# On a graphics card", ""]
    if facts["device"] != "cuda":
        lines += [
            "**Without a card**: the code for the card ran with NumPy. These figures say nothing about a card.",
            "",
        ]
    known = [f"{name} {value}" for name, value in facts.items() if name not in ("quick", "free_gb")]
    lines += [f"`benchmarks/gpu.sh`, {figures.get('seconds', 0):.0f} seconds. {', '.join(known)}.", ""]
    lines += ["| check | | |", "|---|---|---|"]
    lines += [
        f"| {row['check']} | {'passed' if row['passed'] else '**failed**'} | {row['figure']} |"
        for row in figures["checks"]
    ]
    lines += [
        "",
        "| log | pairs | factors | arm | seconds an iteration | until the first |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["training"]:
        arm = f"{row['arm']}, streamed" if row.get("streamed") else row["arm"]
        speed = f"{row['seconds']:.4f} | {row['ready']:.1f} s"
        lines.append(f"| {row['log']} | {row['pairs']:,} | {row['factors']} | {arm} | {speed} |")
    lines += ["", "| lists | items | factors | arm | users a second |", "|---|---|---|---|---|"]
    for row in figures["lists"]:
        speed = row["users"] / row["seconds"]
        lines.append(f"| {row['users']:,} users | {row['items']:,} | {row['factors']} | {row['arm']} | {speed:,.0f} |")
    return "\n".join([*lines, "", *(f"- Left out: {why}" for why in figures["left_out"]), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", choices=("cuda", "numpy"), default="cuda", help="numpy: without a card")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do the steps work?")
    parser.add_argument("--minutes", type=float, default=8.0, help="at most, about")
    parser.add_argument("--out", default=str(ROOT / "build/bench/gpu"), help="folder of gpu.json and gpu.md")
    options = parser.parse_args()
    try:
        run = Run(options)
    except DeviceError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(run.figures["facts"]), flush=True)
    run.step("check the kernel", 5, lambda: check_kernel(run))
    run.step("check the training", 20, lambda: check_training(run))
    run.step("check the lists", 10, lambda: check_lists(run))
    sizes = [(20_000, 500, 200)] if options.quick else [(1_000_000, 50_000, 20_000), (50_000_000, 1_000_000, 100_000)]
    widths, both = (16, 24) if options.quick else (64, 128, 256), (run.arm, "our C")
    matrices = {}
    for pairs, users, items in sizes:
        name = f"{pairs // 1_000_000} million pairs" if pairs >= 1_000_000 else f"{pairs:,} pairs"
        run.step(f"generate {name}", pairs / 1e6, lambda: matrices.update({name: shop(pairs, users, items)}))  # noqa: B023
        for factors in widths if name in matrices else ():
            wanted, given = pairs * factors / 5e7 + 5, (name, matrices[name], factors)
            run.step(f"train {name}, {factors} factors", wanted, lambda: train(run, *given, both, wanted / 3))  # noqa: B023
        if pairs == sizes[0][0]:
            size = (3000, 500, 16) if options.quick else (1_000_000, 50_000, 64)
            run.step("lists", 1 if options.quick else 60, lambda: lists(run, *size))  # noqa: B023
    for name, matrix in matrices.items() if run.device.name == "cuda" else ():
        run.step(f"implicit on the card, {name}", 20, lambda: train_implicit(run, name, matrix, widths[0]))  # noqa: B023
    print((run.folder / "gpu.md").read_text(encoding="utf-8"))
    return int(not all(check["passed"] for check in run.figures["checks"]))


if __name__ == "__main__":
    sys.exit(main())
