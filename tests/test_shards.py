"""ALS in shards, by processes that are killed; no cluster is needed."""

import multiprocessing
import time

import numpy as np
import pytest
from support import pairs_of_many_blocks, until

from product_recs.models.shards import (
    OneProcess,
    FitPlan,
    ShardedFit,
    ShardFolder,
    fitted_factors,
    run_fit,
    write_matrix,
)
from product_recs.models.solver import RotatedALS

PLAN = FitPlan(factors=16, iterations=6, regularization=3.0, alpha=2.0, nu=0.2, unobserved_weight=0.4)
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def confidence():
    return pairs_of_many_blocks()


def fit_in(place, confidence, engine=None):
    folder = ShardFolder(place)
    if folder.note("matrix.json") is None:
        write_matrix(folder, confidence, 3)
    fit = ShardedFit(folder, PLAN, engine or OneProcess())
    return run_fit(fit), fitted_factors(fit)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, confidence):
    return fit_in(tmp_path_factory.mktemp("shards"), confidence)


def same(left, right):
    return left[0] == right[0] and all(np.array_equal(*pair) for pair in zip(left[1], right[1], strict=True))


def test_many_shards_are_one_process(confidence, undisturbed):
    alone = RotatedALS(confidence, 16, 3.0, 2.0, num_threads=1, unobserved_weight=0.4, nu=0.2)
    for _ in range(PLAN.iterations):
        alone.step()
    alone.solve_users()
    _, (user_factors, item_factors) = undisturbed
    assert np.abs(user_factors - alone.user_factors).max() < 1e-4
    assert np.abs(item_factors - alone.item_factors).max() < 1e-4


@pytest.mark.parametrize("wait", (0.02, 0.06, 0.15))
def test_killed_again_and_again(tmp_path, confidence, undisturbed, wait):
    for number in range(5):  # the last ones find more done, and are killed later
        process = FORK.Process(target=fit_in, args=(tmp_path, confidence))
        process.start()
        time.sleep(wait * (number + 1))
        process.kill()
        process.join()
    assert same(fit_in(tmp_path, confidence), undisturbed)


def test_what_was_finished_is_not_done_again(tmp_path, confidence, undisturbed):
    process = FORK.Process(target=fit_in, args=(tmp_path, confidence))
    process.start()
    until(lambda: (tmp_path / "halves/0006/half.json").exists())
    process.kill()
    process.join()
    finished = max(int(path.parent.name) for path in tmp_path.glob("halves/*/half.json"))

    class Counting(OneProcess):
        calls = []

        def run(self, task, numbers):
            self.calls += [(task.args[1], number) for number in numbers]
            super().run(task, numbers)

    assert same(fit_in(tmp_path, confidence, Counting()), undisturbed)
    assert Counting.calls and min(half for half, _ in Counting.calls) == finished + 1


def test_two_workers_do_the_same_shard(tmp_path, confidence, undisturbed):
    "As Spark's speculation does: both write the same files, and each is whole."

    class Twice(OneProcess):
        def run(self, task, numbers):
            for number in numbers:
                rival = FORK.Process(target=task, args=(number,))
                rival.start()
                task(number)
                rival.join()
                assert rival.exitcode == 0

    assert same(fit_in(tmp_path, confidence, Twice()), undisturbed)
