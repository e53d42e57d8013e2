"""The metrics against three implementations that share no code with them: one in plain Python, NIST's trec_eval, and
scikit-learn."""

import math

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from support import plain_metrics

from product_recs.evaluation import metrics
from product_recs.search.top_n import top_n

CUT_OFFS = (1, 2, 3, 5, 10)


def random_case(seed, users=60, n_items=40, length=10):
    "Ranked lists cut at random lengths, and targets where some users have none and some more than the cut-off."
    rng = np.random.default_rng(seed)
    lists = np.full((users, length), -1, np.int32)
    for user in range(users):
        size = rng.integers(0, length + 1)
        lists[user, :size] = rng.permutation(n_items)[:size]
    dense = (rng.random((users, n_items)) < rng.choice([0, 0.02, 0.2, 0.9], users)[:, None]) * rng.integers(
        1, 5, (users, n_items)
    )
    return lists, csr_matrix(dense.astype(np.float32))


def tied_case():
    "Scores full of ties, ranked by the project's own rule (lower row first)."
    rng = np.random.default_rng(7)
    scores = rng.integers(0, 3, (50, 30)).astype(np.float32)
    lists, _ = top_n(scores.copy(), 10)
    expected = [sorted(range(30), key=lambda item: (-scores[user, item], item))[:10] for user in range(50)]
    assert lists.tolist() == expected
    return lists, csr_matrix((rng.random((50, 30)) < 0.2).astype(np.float32))


CASES = {
    **{f"random {seed}": lambda seed=seed: random_case(seed) for seed in range(5)},
    "nobody has a relevant item": lambda: (np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]] * 3), csr_matrix((3, 12))),
    "fewer candidates than k": lambda: (
        np.array([[2, 0] + [-1] * 8, [1] + [-1] * 9, [-1] * 10]),
        csr_matrix(np.ones((3, 3))),
    ),
    "one user": lambda: (
        np.array([[3, 1, 4, 0, 5, 9, 2, 6, 8, 7]]),
        csr_matrix(([1.0, 1.0], ([0, 0], [4, 7])), shape=(1, 10)),
    ),
    "one item": lambda: (np.array([[0] + [-1] * 9]), csr_matrix(np.ones((1, 1)))),
    "ties": tied_case,
    "everything is relevant": lambda: (np.tile(np.arange(10), (4, 1)), csr_matrix(np.ones((4, 10)))),
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_plain_python(case):
    lists, targets = CASES[case]()
    wanted = [set(targets[user].indices.tolist()) for user in range(len(lists))]
    hits = metrics.find_hits(lists, targets)
    assert hits.left_out == sum(not w for w in wanted)
    assert hits.rows.tolist() == [user for user, w in enumerate(wanted) if w]
    for k in CUT_OFFS:
        expected = [e for ranked, w in zip(lists.tolist(), wanted) if (e := plain_metrics(ranked, w, k))]
        for name in metrics.METRICS:
            np.testing.assert_allclose(
                hits.metric(name, k), [e[name] for e in expected], atol=1e-6, err_msg=f"{name}@{k}"
            )


@pytest.mark.parametrize("case", CASES)
def test_parity_with_trec_eval(case):
    """trec_eval divides average precision by all relevant items; here it is min(k, relevant), as for NDCG.
    Its reciprocal rank has no cut-off, so only lists of the whole length are compared."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    lists, targets = CASES[case]()
    judged = [user for user in range(len(lists)) if targets[user].nnz]
    if not judged:
        pytest.skip("no user has a relevant item")
    truth = {str(user): {f"i{item}": 1 for item in targets[user].indices} for user in judged}
    lengths = {user: int((lists[user] >= 0).sum()) for user in judged}
    runs = {
        str(user): {f"i{item}": float(-place) for place, item in enumerate(lists[user]) if item >= 0} for user in judged
    }
    cuts = ",".join(map(str, CUT_OFFS))
    result = pytrec_eval.RelevanceEvaluator(
        truth, {f"ndcg_cut.{cuts}", f"map_cut.{cuts}", f"recall.{cuts}", f"P.{cuts}", f"success.{cuts}", "recip_rank"}
    ).evaluate(runs)
    hits = metrics.find_hits(lists, targets)
    names = {"ndcg": "ndcg_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}
    for row, user in enumerate(judged):
        if not lengths[user]:
            continue  # trec_eval leaves out a user with an empty list; here the user scores 0
        theirs = result[str(user)]
        for k in CUT_OFFS:
            for ours, name in names.items():
                assert hits.metric(ours, k)[row] == pytest.approx(theirs[f"{name}_{k}"], abs=1e-6), (ours, k, user)
            scaled = theirs[f"map_cut_{k}"] * hits.relevant[row] / min(k, hits.relevant[row])
            assert hits.metric("map", k)[row] == pytest.approx(scaled, abs=1e-6), ("map", k, user)
        assert hits.metric("mrr", lists.shape[1])[row] == pytest.approx(theirs["recip_rank"], abs=1e-6), user


def with_scikit_learn(ranked, relevant, k):
    """The metrics of one user by scikit-learn, which scores items instead of taking lists.
    Items it is not shown must not fill up a short list: k irrelevant ones stand between the list and the rest."""
    sk = pytest.importorskip("sklearn.metrics")
    shown = [item for item in ranked if item >= 0]
    rest = sorted(relevant - set(shown))
    truth = np.array([item in relevant for item in shown] + [False] * (k + 1) + [True] * len(rest))
    score = -np.arange(len(truth), dtype=float)
    chosen = np.arange(len(truth)) < min(k, len(shown))
    top, most = truth[: min(k, len(shown))], min(k, len(relevant))
    first = np.zeros(len(truth), bool)
    if top.any():
        first[top.argmax()] = True
    count = int(top.sum())
    recall = sk.recall_score(truth, chosen)
    return {
        "ndcg": sk.ndcg_score([truth], [score], k=k, ignore_ties=True),
        "recall": recall,
        "recall_capped": recall * len(relevant) / most,
        "precision": sk.precision_score(truth, chosen, zero_division=0)
        * chosen.sum()
        / k,  # theirs divides by the length of the list
        "hit_rate": float(sk.jaccard_score(truth, chosen) > 0),
        "map": sk.average_precision_score(top, score[: len(top)]) * count / most
        if count
        else 0.0,  # theirs divides by what was found
        "mrr": sk.label_ranking_average_precision_score([first], [score]) if count else 0.0,
    }


@pytest.mark.parametrize("case", CASES)
def test_parity_with_scikit_learn(case):
    lists, targets = CASES[case]()
    hits = metrics.find_hits(lists, targets)
    assert set(metrics.METRICS) == set(with_scikit_learn([0], {0}, 1)), "a metric that scikit-learn has not judged"
    if not len(hits.rows):
        return
    for k in (1, 3, 10):
        theirs = [
            with_scikit_learn(lists[row].tolist(), set(targets[row].indices.tolist()), k) for row in hits.rows[:12]
        ]  # it takes milliseconds a user
        for name in metrics.METRICS:
            np.testing.assert_allclose(
                hits.metric(name, k)[:12], [t[name] for t in theirs], atol=1e-6, err_msg=f"{name}@{k}"
            )


def test_lists_alone_against_plain_python():
    lists, targets = random_case(11)
    n_users, n_items = 80, targets.shape[1]
    dense = np.random.default_rng(3).random((n_users, n_items)) < 0.15
    dense[:, 5] = False  # an item that nobody has
    owned = csr_matrix(dense.astype(np.float32))
    popularity = np.bincount(owned.indices, minlength=n_items)
    categories = np.random.default_rng(4).integers(-1, 4, n_items)
    candidates = popularity > 0
    columns = owned.toarray().astype(bool)
    for k in CUT_OFFS:
        rows = [[item for item in row[:k] if item >= 0] for row in lists.tolist()]
        novelty = [
            np.mean([-math.log2(max(popularity[i], 1) / n_users) for i in row]) if row else math.nan for row in rows
        ]
        np.testing.assert_allclose(metrics.novelty(lists, k, popularity, n_users), novelty, atol=1e-6)

        def mean_difference(row, alike):
            pairs = [(a, b) for place, a in enumerate(row) for b in row[place + 1 :]]
            return 1 - sum(alike(a, b) for a, b in pairs) / len(pairs) if pairs else math.nan

        def same(a, b):
            return categories[a] == categories[b] >= 0

        def cosine(a, b):
            both = (columns[:, a] & columns[:, b]).sum()
            return both / math.sqrt(popularity[a] * popularity[b]) if both else 0.0

        np.testing.assert_allclose(
            metrics.category_diversity(lists, k, categories), [mean_difference(r, same) for r in rows], atol=1e-6
        )
        for block in (7, 256):
            np.testing.assert_allclose(
                metrics.cosine_diversity(lists, k, owned, block=block),
                [mean_difference(r, cosine) for r in rows],
                atol=1e-6,
            )

        shown = metrics.exposure(lists, k, n_items)
        assert shown.tolist() == [sum(item in row for row in rows) for item in range(n_items)]
        x = shown[candidates]
        assert metrics.coverage(shown, candidates) == pytest.approx(sum(v > 0 for v in x) / len(x))
        by_pairs = sum(abs(int(a) - int(b)) for a in x for b in x) / (
            2 * len(x) * x.sum()
        )  # Gini by its other definition
        assert metrics.gini(shown, candidates) == pytest.approx(by_pairs)


def test_unsorted_targets_and_explicit_zeros_change_nothing():
    lists, targets = random_case(2)
    shuffled = targets.copy()
    for row in range(shuffled.shape[0]):
        part = slice(shuffled.indptr[row], shuffled.indptr[row + 1])
        shuffled.indices[part] = shuffled.indices[part][::-1].copy()
    shuffled.has_sorted_indices = False
    before = shuffled.indices.copy()
    with_zeros = targets.tocoo()
    with_zeros = csr_matrix(
        (np.r_[with_zeros.data, [0] * 40], (np.r_[with_zeros.row, [0] * 40], np.r_[with_zeros.col, range(40)])),
        shape=targets.shape,
    )
    hits, same, zeros = (metrics.find_hits(lists, t) for t in (targets, shuffled, with_zeros))
    assert np.array_equal(hits.hits, zeros.hits) and np.array_equal(hits.relevant, zeros.relevant)
    assert np.array_equal(hits.hits, same.hits) and np.array_equal(hits.relevant, same.relevant)
    assert np.array_equal(shuffled.indices, before), "the caller's matrix must stay as it is"


@pytest.mark.parametrize("k", [0, -1, 11])
def test_a_cut_off_outside_the_list_is_refused(k):
    lists, targets = random_case(1)
    with pytest.raises(ValueError, match="k must be from 1 to"):
        metrics.find_hits(lists, targets).metric("ndcg", k)


def test_bootstrap_against_a_loop():
    values = np.random.default_rng(0).random(37)
    rng = np.random.default_rng(9)
    expected = [values[rng.integers(0, 37, 37)].mean() for _ in range(25)]
    np.testing.assert_allclose(metrics.bootstrap_means(values, 25, seed=9), expected, atol=1e-12)
    with pytest.raises(ValueError, match="no users"):
        metrics.bootstrap_means(np.empty(0))


def test_bootstrap_interval_holds_the_truth_about_95_times_in_100():
    inside = 0
    for seed in range(200):
        sample = np.random.default_rng(seed).random(150) < 0.3
        low, high = metrics.interval(metrics.bootstrap_means(sample, 300, seed))
        inside += low <= 0.3 <= high
    assert 180 <= inside <= 199
