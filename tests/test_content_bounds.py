"""Whatever stands in a products file, a vocabulary is learned of it in bounded time and memory, and describes it."""

import datetime as dt
import json
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from product_recs.models.content import Content, ContentMatrix, learn_content

N = 40


def texts(*values):
    return np.resize(np.array([*values, None], object)[:-1], N)


ODD = {
    "languages": texts("Dark roast café", "濃い コーヒー 豆", "кофе тёмной обжарки", "커피 원두"),
    "right to left": texts("قهوة داكنة محمصة", "קפה קלוי כהה", "قهوة"),
    "emoji": texts("☕ dark 🍵", "🍵 ☕", "👩‍👩‍👧 tea", "🇮🇹 tea ☕"),
    "controls": texts("a\u202eb c", "\u200b \u200b x", "e\u0301 tea", "ﷺ tea"),
    "empty": texts("", "   ", "\n\t"),
    "huge": texts("dark roast " * 10_000, "x" * 100_000, "tea " * 25_000, "é" * 100_000),
    "unique": np.array([f"SKU-{k:05}" for k in range(N)], object),
    "unique words": np.array([f"{k}only {k}mine" for k in range(N)], object),  # their grams are not
    "nothing": np.full(N, None, object),
    "nans": np.full(N, np.nan),
    "infinite": np.resize([np.inf, -np.inf, np.nan, 1.0, 2.0, 2.0], N),
    "far": np.resize([1e308, -1e308, 1e300, 3.0], N),
    "mixed": np.resize(np.array([1, 2.5, "x", float("inf"), float("nan"), None, 10**400, True], object), N),
    "yes as text": texts("true", "False", "TRUE", "no"),
    "yes": np.resize(np.array([True, False, None], object), N),
    "bools": np.resize([True, False], N),
    "days": np.resize(np.array(["2026-01-02", "NaT"], "datetime64[D]"), N),
    "days as text": texts("2026-01-02", "2026-01-03 10:00:00"),
    "day objects": texts(dt.date(2026, 1, 2), dt.datetime(2026, 1, 2, 3)),
    "tags": texts('["hot", "new"]', "[]", '["hot", null, 3]', "[" * 3000),
    "one": np.resize([7], N),
    "dense": np.resize(np.float32([1, 0, np.nan, np.inf, 0, 0]), (N, 2)),
    "dense unknown": np.full((N, 3), np.nan, np.float32),
}


def whole(columns, n):
    "A vocabulary that was stored and read, after checking what every description promises."
    content = learn_content(columns, n)
    matrix = content.described(columns, n)
    again = Content.from_json(json.loads(json.dumps(content.to_json(), allow_nan=False)))
    assert isinstance(matrix, ContentMatrix) and matrix.sparse.shape[0] == len(matrix.dense) == n
    assert np.isfinite(matrix.sparse.data).all() and np.isfinite(matrix.dense).all()
    length = np.asarray(matrix.sparse.multiply(matrix.sparse).sum(axis=1)).ravel() + (matrix.dense**2).sum(axis=1)
    assert np.all(np.isclose(length, 1, atol=1e-4) | (length == 0))
    same = again.described(columns, n)
    assert (same.sparse != matrix.sparse).nnz == 0 and np.array_equal(same.dense, matrix.dense)
    for row in (0, n - 1):  # one product alone is described as it is among the others
        single = again.described({name: values[row : row + 1] for name, values in columns.items()}, 1)
        assert np.allclose(single.vector(0), matrix.vector(row), atol=1e-6)
    assert all(len(content.name(feature)) < 400 for feature in range(len(content)))
    return content


@pytest.mark.parametrize("name", ODD)
def test_an_odd_column_is_described_or_says_nothing(name):
    content = whole({name: ODD[name]}, N)
    silent = {"empty", "unique", "nothing", "nans", "days", "dense unknown"}
    assert (len(content) == 0) == (name in silent), [content.name(k) for k in range(len(content))]


def test_odd_columns_together_and_described_by_another_kind():
    content = whole(ODD, N)
    for other in ODD.values():  # a column that came back with other values
        if other.ndim == 1:
            matrix = content.described(dict.fromkeys(ODD, other), N)
            assert np.isfinite(matrix.sparse.data).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.text(max_size=40) | st.booleans() | st.integers() | st.floats(), min_size=1, max_size=9))
def test_any_values(values):
    column = np.empty(len(values), object)
    column[:] = values
    whole({"any": column, "text": np.array([str(value) for value in values], object)}, len(values))


@pytest.mark.slow
def test_many_columns_of_many_words_stay_within_bounds():
    rng, n = np.random.default_rng(0), 700
    letters = np.array([*"abcdefghijklmnopqrstuvwxyz"])
    words = np.array(["".join(rng.choice(letters, 7)) for _ in range(3000)], object)
    columns = {f"c{k}": np.array([" ".join(row) for row in rng.choice(words, (n, 8))], object) for k in range(20)}
    tracemalloc.start()
    began = time.monotonic()
    content = learn_content(columns, n)
    matrix = content.described(columns, n)
    seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(content) <= 200_000 + 20 * 50 * 2 and {block.column for block in content.blocks} == {*columns}
    assert matrix.known.all() and peak < 500_000_000 and seconds < 120


@pytest.mark.slow
def test_a_table_of_long_descriptions_is_cut_by_its_size():
    rng, n = np.random.default_rng(1), 1000
    text = np.array([" ".join(f"w{k}" for k in row) for row in rng.integers(0, 3000, (n, 4000))], object)
    long = {block.kind: block.longest for block in learn_content({"text": text}, n).blocks}
    assert long == {"word": 2000, "gram": 2000}
    many = np.resize(text[:10], 290_000)
    long = {block.kind: block.longest for block in learn_content({"text": many}, len(many)).blocks}
    assert long["word"] == 400_000_000 // len(many) and long["gram"] == 50_000_000 // len(many)
