"""What every model promises, asked of all of them on one random log: what is judged offline is what is served."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from support import described_models, every_model, ordered_models, random_log

from product_recs.data.snapshots import NOBODY, PAIR_VALUES, Histories
from product_recs.models.all import from_recipe
from product_recs.models.blend import HabitBlend
from product_recs.models.hybrid import Hybrid
from product_recs.models.interface import recipe
from product_recs.models.interface import similar, size_of
from product_recs.models.item_item import EASE
from product_recs.models.order import OrderWeighted, order_weights
from product_recs.search.top_n import top_n

USERS, ITEMS, N = 220, 150, 10
MODELS = every_model() | described_models() | ordered_models()
WIDE = {"EASE by users": EASE(40), "EASE by users, by order": OrderWeighted(EASE(40), 0.8, 90)}
ASKED = [*MODELS, *WIDE]
every = pytest.mark.parametrize("name", ASKED)


def frozen(model):
    "The model over read-only arrays, as those of a bundle are."
    parts = [frozen(part) for part in model.parts]
    arrays = {name: np.array(array) for name, array in model.to_arrays().items()}
    for array in arrays.values():
        array.flags.writeable = False
    return from_recipe(recipe(model), parts).from_arrays(arrays, model.snapshot, parts)


@pytest.fixture(scope="module")
def logs():
    "More users than items; and fewer, which EASE treats in another way."
    return {"tall": random_log(USERS, ITEMS, 1), "wide": random_log(90, 200, 2), "other": random_log(USERS, ITEMS, 3)}


@pytest.fixture(scope="module")
def fitted(logs):
    "A function that fits a model once."
    made = {}

    def of(name):
        if name not in made:
            made[name] = frozen((MODELS | WIDE)[name].fit(logs["wide" if name in WIDE else "tall"]))
        return made[name]

    return of


def users_of(model) -> np.ndarray:
    return np.arange(min(200, model.snapshot.counts.shape[0]))


def strangers(model, m: int = 25) -> Histories:
    "Histories that the training never saw, that of nobody and of an item without a past among them."
    rng, n = np.random.default_rng(7), model.snapshot.counts.shape[1]
    histories = [np.sort(rng.choice(n, rng.integers(1, 12), replace=False)) for _ in range(m - 2)]
    histories = [*histories, np.empty(0, int), np.array([n - 1])]
    items = np.concatenate(histories).astype(np.int32)
    values = (rng.uniform(0.2, 3, len(items)), rng.integers(1, 9, len(items)), rng.integers(0, 90, len(items)))
    return Histories(
        np.concatenate([[0], np.cumsum([len(own) for own in histories])]),
        items,
        *(value.astype(np.float32) for value in values),
        span_days=rng.integers(0, 200, len(items)).astype(np.float32),
    )


def one_of(histories: Histories, place: int) -> Histories:
    part = slice(histories.indptr[place], histories.indptr[place + 1])
    values = (getattr(histories, name)[part] for name in ("items", *PAIR_VALUES))
    return Histories(np.array([0, part.stop - part.start]), **dict(zip(("items", *PAIR_VALUES), values)))


def told_of(model, representations) -> np.ndarray | bool:
    "Whether the users file says something about each of them; only a hybrid listens, alone or under habits."
    if isinstance(model, HabitBlend):
        return told_of(model.parts[0], representations.taste)
    if isinstance(model, OrderWeighted):
        return told_of(model.parts[0], representations)
    return np.diff(representations.about.indptr) > 0 if isinstance(model, Hybrid) else False


def size(scores: np.ndarray) -> np.ndarray:
    "Of the scores of each user, that rounding is measured against."
    return np.abs(scores).max(axis=1, keepdims=True) + 1


@every
def test_an_unchanged_history_is_folded_in_to_what_the_training_found(fitted, name):
    model = fitted(name)
    rows = users_of(model)
    histories = model.snapshot.histories(rows)
    trained, folded = model.users(rows), model.fold_in(histories)
    scores = model.scores(trained)
    assert scores.dtype == np.float32 and scores.shape == (len(rows), len(model.candidates))
    assert (np.abs(model.scores(folded) - scores) / size(scores)).max() < 2e-5
    assert np.array_equal(model.knows(trained), model.knows(folded))
    assert np.array_equal(model.knows(trained), (np.diff(histories.indptr) > 0) | told_of(model, trained))


def same_lists(lists: tuple, wanted: tuple, scores: np.ndarray, tolerance: float = 2e-6) -> None:
    "Two lists of the same users; items may change places only where rounding decides between their scores."
    assert np.allclose(lists[1], wanted[1], rtol=1e-5, atol=1e-5)
    for user, place in zip(*np.nonzero(lists[0] != wanted[0]), strict=True):
        score, expected = scores[user, lists[0][user, place]], scores[user, wanted[0][user, place]]
        assert abs(score - expected) <= tolerance * size(scores)[user, 0], (user, place, score, expected)


@every
def test_users_one_at_a_time_get_what_a_block_gets(fitted, name):
    model = fitted(name)
    rows = users_of(model)
    own = model.snapshot.counts[rows]
    block = model.users(rows)
    lists, scores = model.top(block, N, own, closed=np.array([2, 5])), model.scores(block)
    for place, row in enumerate(rows):
        user = model.users(np.array([row]))
        items, best = model.top(user, N, own[place], closed=np.array([2, 5]))
        assert items[0].tolist() == lists[0][place].tolist(), row
        assert np.allclose(best[0], lists[1][place], rtol=1e-5, atol=1e-6)
        assert np.allclose(model.scores(user)[0], scores[place], rtol=1e-5, atol=1e-5)
    for n, forbidden in ((400, own), (400, None), (3, None)):  # more than there are; whatever they have
        items = model.top(model.users(rows[:40]), n, None if forbidden is None else forbidden[:40])[0]
        for place, row in enumerate(rows[:40]):
            excluded = None if forbidden is None else forbidden[place]
            single = model.top(model.users(np.array([row])), n, excluded)[0][0]
            where = np.flatnonzero(single != items[place])  # a product of matrices rounds as its size wants
            assert not len(where) or model.places_items, (n, row)
            assert np.allclose(scores[place][single[where]], scores[place][items[place][where]], atol=1e-6), (n, row)


@every
def test_strangers_one_at_a_time_get_what_a_block_gets(fitted, name):
    model = fitted(name)
    people = strangers(model)
    block = model.fold_in(people)
    lists, scores = model.top(block, N), model.scores(block)
    assert np.isfinite(scores).all()
    one_by_one = [model.top(model.fold_in(one_of(people, place)), N) for place in range(len(people))]
    same_lists(tuple(np.concatenate(parts) for parts in zip(*one_by_one, strict=True)), lists, scores)
    nobody = model.fold_in(NOBODY)
    assert model.scores(nobody).shape == (1, len(model.candidates)) and not model.knows(nobody)[0]
    assert model.knows(block).tolist() == [True] * (len(people) - 2) + [False] * 2  # nothing, and nothing with a past


@pytest.mark.parametrize("n", [1, N, 400])
@every
def test_the_best_are_the_best_of_all_scores(fitted, name, n):
    model = fitted(name)
    rows = users_of(model)
    own, closed = model.snapshot.counts[rows], np.array([0, 4, 9])
    block = model.users(rows)
    scores = model.scores(block)
    open_ = model.candidates.copy()
    open_[closed] = False
    wanted = top_n(scores.copy(), n, exclude=own, candidates=open_)
    for forbidden in (own, (own.indptr, own.indices)):
        lists = model.top(block, n, forbidden, closed, threads=2)
        assert lists[0].dtype == np.int32 and lists[1].dtype == np.float32 and lists[0].shape == (len(rows), n)
        assert np.array_equal(lists[0] < 0, wanted[0] < 0) and np.array_equal(np.isneginf(lists[1]), lists[0] < 0)
        same_lists(lists, wanted, scores)
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in lists[0])
    assert (
        not (np.isin(lists[0], closed)).any() and not own[np.nonzero(lists[0] >= 0)[0], lists[0][lists[0] >= 0]].any()
    )
    free = model.top(block, n)
    same_lists(free, top_n(scores.copy(), n, candidates=model.candidates), scores)
    assert not (free[0] == len(model.candidates) - 1).any()  # nobody ever had it


@every
def test_contributions_add_up_to_the_score(fitted, name):
    model = fitted(name)
    people = strangers(model)
    histories = [model.snapshot.histories(np.array([row])) for row in (0, 1, 2, 17, 60)]
    for history in [*histories, *(one_of(people, place) for place in (0, 5, len(people) - 2, len(people) - 1))]:
        scores = model.scores(model.fold_in(history))[0]
        for item in [*history.items[:4], 0, 3, 50, len(scores) - 2, len(scores) - 1]:
            reasons = model.contributions(history, int(item))
            tolerance = 1e-4 * (1 + np.abs(scores).max())
            assert abs(reasons.score - scores[item]) < tolerance, (item, reasons, scores[item])
            assert abs(reasons.parts.sum() + sum(reasons.signals.values()) - reasons.score) < 1e-9 * (
                1 + abs(reasons.score)
            )
            assert len(reasons.items) == len(reasons.parts) and np.isin(reasons.items, history.items).all()
            assert all(isinstance(value, float) for value in reasons.signals.values())


@every
def test_reasons_for_a_list_fold_nobody_in_again(fitted, name, monkeypatch):
    model = fitted(name)
    history = model.snapshot.histories(np.array([17]))
    users, items = model.fold_in(history), range(0, len(model.candidates), 10)
    wanted = [model.contributions(history, item) for item in items]

    def parts_of(model):
        return [model, *(inner for part in model.parts for inner in parts_of(part))]

    for part in parts_of(model):
        monkeypatch.setattr(part, "fold_in", lambda histories: pytest.fail("somebody was folded in again"))
    for item, expected in zip(items, wanted):
        reasons = model.contributions(history, item, users)
        assert np.isclose(reasons.score, expected.score) and np.allclose(reasons.parts, expected.parts)


@every
def test_stored_and_mapped_it_gives_the_same_lists(fitted, name, tmp_path):
    model = fitted(name)

    def stored(model, folder):
        folder.mkdir()
        parts = [stored(part, folder / str(place)) for place, part in enumerate(model.parts)]
        mapped = {}
        for key, array in model.to_arrays().items():
            np.save(folder / f"{key}.npy", array, allow_pickle=False)
            mapped[key] = np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        made = json.loads(json.dumps({"kind": recipe(model)["kind"], "parameters": model.parameters}))
        return from_recipe(made, parts).from_arrays(mapped, model.snapshot, parts)

    opened, rows = stored(model, tmp_path / "model"), users_of(model)
    for array, expected in zip(opened.top(opened.users(rows), N), model.top(model.users(rows), N), strict=True):
        assert np.array_equal(array, expected)
    assert np.array_equal(opened.scores(opened.users(rows)), model.scores(model.users(rows)))
    assert size_of(opened) == size_of(model) and opened.work == model.work > 0
    assert opened.name == model.name


@every
def test_a_fit_leaves_the_recipe_and_earlier_fits_as_they_are(fitted, logs, name):
    made = (MODELS | WIDE)[name]
    before, rows = json.dumps(recipe(made)), np.arange(30)
    first = made.fit(logs["tall"])
    lists, scores = first.top(first.users(rows), N), first.scores(first.users(rows))
    second = made.fit(logs["other"])
    again = first.fit(logs["other"])
    assert first is not made and second is not first and again is not first and not hasattr(made, "snapshot")
    assert json.dumps(recipe(made)) == before
    assert np.array_equal(first.top(first.users(rows), N)[0], lists[0])
    assert np.array_equal(first.scores(first.users(rows)), scores)
    assert not np.array_equal(second.scores(second.users(rows)), scores)
    assert np.array_equal(again.scores(again.users(rows)), second.scores(second.users(rows)))
    assert np.array_equal(again.top(again.users(rows), N)[0], second.top(second.users(rows), N)[0])


@every
def test_eight_threads_get_what_one_gets(fitted, name):
    model, rows = fitted(name), np.arange(40)
    fresh = from_recipe(recipe(model), model.parts).from_arrays(model.to_arrays(), model.snapshot, model.parts)

    def ask(row):  # the first ones meet everything that is made when it is first needed
        users, history = fresh.users(np.array([row])), model.snapshot.histories(np.array([row]))
        arrays = [fresh.top(users, N)[0][0], fresh.similarities(int(row)), fresh.scores(users)[0]]
        arrays += [fresh.scores(fresh.fold_in(history))[0], fresh.contributions(history, 3).parts]
        return [array.tolist() for array in arrays]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, rows))
    assert answers == [ask(row) for row in rows]


@every
def test_the_recipe_is_json_and_makes_the_same_model(name):
    made = (MODELS | WIDE)[name]
    text = json.dumps(recipe(made), allow_nan=False)
    again = from_recipe(json.loads(text))
    assert type(again) is type(made) and json.dumps(recipe(again)) == text
    assert again.name == made.name and again.tasks == made.tasks


@every
def test_similar_items_are_candidates_and_never_the_item_itself(fitted, name):
    model = fitted(name)
    items = np.arange(len(model.candidates))
    neighbours, alike = similar(model, items, N)
    assert neighbours.shape == alike.shape == (len(items), N) and (neighbours >= 0).any()
    assert not (neighbours == items[:, None]).any()
    assert model.candidates[neighbours[neighbours >= 0]].all() and np.array_equal(np.isneginf(alike), neighbours < 0)
    assert (np.diff(np.where(neighbours >= 0, alike, -1e30), axis=1) <= 0).all()
    assert (neighbours[-1] < 0).all()  # nobody had it: there is nothing it is like


@every
def test_arrays_that_do_not_fit_are_refused(fitted, name):
    model = fitted(name)
    arrays = model.to_arrays()
    for key, array in arrays.items():
        for wrong in (array[:-1], np.concatenate([array, array[-1:]]), array[..., None]):
            with pytest.raises(ValueError):
                from_recipe(recipe(model), model.parts).from_arrays(arrays | {key: wrong}, model.snapshot, model.parts)


@every
def test_moments_are_those_of_the_scores_over_the_candidates(fitted, name):
    model = fitted(name)
    users = model.users(users_of(model))
    scores = model.scores(users)
    mean, spread = model.moments(users, scores)
    known = scores[:, model.candidates].astype(np.float64)
    assert np.allclose(mean, known.mean(axis=1), atol=1e-5 * size(scores)[:, 0])
    flat = known.std(axis=1) < 1e-6
    assert np.allclose(spread[~flat], known.std(axis=1)[~flat], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ASKED if name.endswith(", by order")])
def test_the_order_counts_and_needs_no_fit_of_its_own(fitted, name):
    ordered = fitted(name)
    part, rows = ordered.parts[0], users_of(ordered)
    histories = ordered.snapshot.histories(rows)
    weights = order_weights(histories, 0.8, 90)
    by_hand = part.fold_in(replace(histories, weights=weights))
    scores = ordered.scores(ordered.users(rows))
    assert np.array_equal(scores, part.scores(by_hand)) and not ordered.to_arrays()
    undated = replace(histories, age_days=0 * histories.age_days)
    same = part.scores(part.fold_in(undated))
    assert np.array_equal(ordered.scores(ordered.fold_in(undated)), same)
    assert np.array_equal(scores, same) == (not part.personal)
    busy = int(np.argmax(np.diff(histories.indptr)))
    history, last = one_of(histories, busy), histories.indptr[busy + 1] - histories.indptr[busy] - 1
    came = replace(history, age_days=0 * history.age_days, positions=np.arange(last + 1, dtype=np.int32))
    dated = replace(history, age_days=np.arange(last, -1, -1).astype(np.float32))  # the same order, written as ages
    step = OrderWeighted(part, 0.8).fit(ordered.snapshot)
    if not name.startswith(("buy again", "user neighbours")):  # which look at the ages beside the weights
        assert np.allclose(step.scores(step.fold_in(came)), step.scores(step.fold_in(dated)), atol=1e-5)
