"""The search against scoring everything: generated catalogues, every instruction set, threads, and what a caller may do
to it."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from product_recs.search.exact import Searcher
from product_recs.search.top_n import top_n

VARIANTS = (-1, 0, 1, 2, 3)


@st.composite
def questions(draw):
    "Whole numbers, so that every score is exact and equal ones are frequent."
    m, n_items, f, seed = (
        draw(st.integers(0, 40)),
        draw(st.integers(0, 300)),
        draw(st.integers(1, 140)),
        draw(st.integers(0, 2**32 - 1)),
    )
    rng = np.random.default_rng(seed)
    most = draw(st.sampled_from([1, 3, 100]))
    items, users = (rng.integers(-most, most + 1, (rows, f)).astype(np.float32) for rows in (n_items, m))
    if n_items:
        items[rng.random(n_items) < draw(st.sampled_from([0, 0.5]))] = items[0]
        items *= rng.choice([1, 2, 64], (n_items, 1))
    users[rng.random(m) < 0.1] = 0
    exclude = (
        csr_matrix(rng.random((m, n_items)) < draw(st.sampled_from([0, 0.3, 1])))
        if m and n_items
        else csr_matrix((m, n_items), dtype=bool)
    )
    candidates = None if draw(st.booleans()) else rng.random(n_items) < draw(st.sampled_from([0, 0.5, 1]))
    return users, items, draw(st.integers(1, 60)), exclude, candidates, draw(st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(questions())
def test_every_kernel_gives_the_lists_of_a_full_ranking(question):
    users, items, n, exclude, candidates, threads = question
    lists, scores = top_n(users @ items.T, n, exclude, candidates)
    closed = None if candidates is None or threads % 2 else np.flatnonzero(~candidates)
    for variant in VARIANTS:
        mine = Searcher(items, candidates if closed is None else None, variant).top(users, n, exclude, closed, threads)
        assert np.array_equal(mine[0], lists), variant
        assert np.array_equal(mine[1], scores), variant


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_better_item_is_left_out_whatever_the_scale(scale, variant):
    rng = np.random.default_rng(3)
    items, users = (
        rng.standard_normal((3000, 65)) * np.exp(rng.standard_normal((3000, 1))),
        rng.standard_normal((50, 65)),
    )
    exact = -np.sort(-(users @ items.T), axis=1)[:, :15]
    lists, scores = Searcher((items * scale).astype(np.float32), variant=variant).top(
        (users * scale).astype(np.float32), 15
    )
    assert np.allclose(scores, exact * scale * scale, rtol=1e-5, atol=1e-5 * scale * scale)
    assert all(len(set(row)) == 15 for row in lists.tolist())


def best_scores(users, items, n):
    return -np.sort(-(users.astype(np.float64) @ items.T.astype(np.float64)), axis=1)[:, :n]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["items", "users"])
def test_what_the_codes_cannot_tell_apart_is_ranked_exactly(side, variant):
    """Items that differ by less than a step of their codes; users of whom one strong factor leaves the others no code.
    The other side has codes without a rest."""
    rng = np.random.default_rng(7)
    if side == "items":
        items, users = (
            rng.standard_normal(64) + 0.002 * rng.standard_normal((4000, 64)),
            rng.integers(-127, 128, (200, 64)),
        )
        users[:, 0] = 127
    else:
        items, users = rng.integers(-127, 128, (4000, 64)), 0.3 * rng.standard_normal((200, 64))
        items[:, 0], users[:, 0] = 127, 100
    items, users = items.astype(np.float32), users.astype(np.float32)
    assert np.allclose(
        Searcher(items, variant=variant).top(users, 10)[1],
        best_scores(users, items, 10),
        rtol=1e-5 if side == "users" else 1e-6,
        atol=1e-3,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_walk_goes_on_to_a_shorter_item_that_points_the_right_way(variant):
    "Many long items score 0.98; the best ten are the only ones that are shorter than they, 0.985 long, and score that."
    rng = np.random.default_rng(8)
    x = rng.standard_normal(64)
    x /= np.linalg.norm(x)
    aside = rng.standard_normal((500, 64))
    aside -= (aside @ x)[:, None] * x
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    items = np.concatenate([0.98 * x + np.sqrt(1 - 0.98**2) * aside, np.tile(0.985 * x, (10, 1))]).astype(np.float32)
    lists, scores = Searcher(items, variant=variant).top(x[None].astype(np.float32), 10)
    assert lists[0].tolist() == list(range(500, 510)) and np.allclose(scores, 0.985)


def test_blocks_and_threads_do_not_change_a_list():
    rng = np.random.default_rng(4)
    items, users = (
        rng.standard_normal((5000, 32)).astype(np.float32),
        rng.standard_normal((1500, 32)).astype(np.float32),
    )
    searcher = Searcher(items)
    whole = searcher.top(users, 10)
    for threads in (2, 7):
        again = searcher.top(users, 10, threads=threads)
        assert np.array_equal(whole[0], again[0]) and np.array_equal(whole[1], again[1])
    for row in range(20):
        single = searcher.top(users[row : row + 1], 10)
        assert np.array_equal(single[0][0], whole[0][row]) and np.array_equal(single[1][0], whole[1][row])


def test_exclusions_may_be_given_as_a_pair_and_as_a_slice_of_mapped_arrays(tmp_path):
    rng = np.random.default_rng(5)
    items, users, exclude = (
        rng.standard_normal((500, 8)).astype(np.float32),
        rng.standard_normal((40, 8)).astype(np.float32),
        csr_matrix(rng.random((40, 500)) < 0.2),
    )
    np.save(tmp_path / "items.npy", items)
    mapped = np.load(tmp_path / "items.npy", mmap_mode="r")
    for variant in VARIANTS:
        whole, part = (
            Searcher(of, variant=variant).top(users[:20], 10, given)
            for of, given in ((items, exclude[:20]), (mapped, (exclude.indptr[:21], exclude.indices)))
        )
        assert np.array_equal(whole[0], part[0])
        assert not any(exclude[row, item] for row, listed in enumerate(part[0]) for item in listed)


def test_many_threads_may_ask_one_searcher():
    rng = np.random.default_rng(6)
    items, users = (
        rng.standard_normal((20_000, 48)).astype(np.float32),
        rng.standard_normal((400, 48)).astype(np.float32),
    )
    searcher = Searcher(items)
    alone = searcher.top(users, 10)[0]
    with ThreadPoolExecutor(8) as threads:
        asked = list(
            threads.map(lambda row: searcher.top(users[row : row + 1], 10, closed=alone[row, :3])[0][0], range(400))
        )
    assert all(listed[:7].tolist() == before[3:].tolist() for listed, before in zip(asked, alone))


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_ends_a_long_search():
    program = """import numpy as np, sys
from product_recs.search.exact import Searcher
rng = np.random.default_rng(0)
searcher, users = (
    Searcher(rng.standard_normal((50_000, 64)).astype(np.float32)),
    rng.standard_normal((1_000_000, 64)).astype(np.float32),
)
print("go", flush=True)
searcher.top(users, 10, threads=2)"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "go\n"
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in run.communicate(timeout=30)[1]
