"""What a model with content promises beside what every model does: of new products, changed ones, and new people."""

from dataclasses import replace

import numpy as np
import pytest
from support import described_items, described_models, random_log, train

from product_recs.bundle.opening import open_bundle
from product_recs.data.artifact import open_features
from product_recs.data.snapshots import NOBODY, Histories
from product_recs.models import hybrid_weights
from product_recs.models.als import ALS
from product_recs.models.blend import HabitBlend
from product_recs.models.hybrid import Hybrid

USERS, ITEMS, NEW = 220, 150, 6
MODELS = described_models()
every = pytest.mark.parametrize("name", MODELS)
ROWS = np.arange(60)


@pytest.fixture(scope="module")
def fitted():
    "A function that fits a model once."
    made, log = {}, random_log(USERS, ITEMS, 1)

    def of(name):
        return made[name] if name in made else made.setdefault(name, MODELS[name].fit(log))

    return of


def longer(snapshot, changed=(), unknown=0):
    """The snapshot with new items behind the others, twins of items 0, 1, ... in every column, and `unknown` ones of
    which nothing is known; `changed` items have the columns of their successor."""
    n, columns = snapshot.counts.shape[1], dict(snapshot.item_columns)
    twins = np.concatenate([np.arange(NEW), np.full(unknown, n - 1)]).astype(int)  # nothing is known of the last one
    moved = np.arange(n)
    moved[list(changed)] += 1
    columns = {name: values[np.concatenate([moved, twins])] for name, values in columns.items()}
    rows = np.concatenate([np.array(changed, int), n + np.arange(len(twins))])
    return snapshot.widened(columns, n + len(twins), rows)


def close(scores, other):
    return np.allclose(scores, other, rtol=1e-4, atol=1e-4)


def session(*items):
    ones = np.ones(len(items), np.float32)
    return Histories(np.array([0, len(items)]), np.sort(np.array(items, np.int32)), ones, ones, ones)


def core(model):
    return model.parts[0] if isinstance(model, HabitBlend) else model


@every
def test_new_products_stand_behind_the_others_and_change_nothing_for_them(fitted, name):
    model = fitted(name)
    wide = model.widened(longer(model.snapshot, unknown=1))
    before, after = model.scores(model.users(ROWS)), wide.scores(wide.users(ROWS))
    assert after.shape == (len(ROWS), ITEMS + NEW + 1) and after.dtype == np.float32 and np.isfinite(after).all()
    assert close(before, after[:, :ITEMS])
    assert np.array_equal(wide.candidates[:ITEMS], model.candidates) and not wide.candidates[-1]
    described = core(model).candidates[:NEW]  # what is known of an item, its twin has
    assert np.array_equal(wide.candidates[ITEMS:-1], described | wide.candidates[ITEMS:-1]) and described.any()
    free = wide.top(wide.users(ROWS), ITEMS + NEW + 1)[0]
    assert set(np.unique(free)) - {-1} == set(np.flatnonzero(wide.candidates))
    own = wide.snapshot.counts[ROWS]
    closed = np.array([ITEMS, 3])
    items = wide.top(wide.users(ROWS), ITEMS, own, closed)[0]
    assert not np.isin(items, closed).any() and np.isin(items, ITEMS + 1 + np.arange(NEW - 1)).any()


@every
def test_twice_is_once_and_the_first_stays_as_it_was(fitted, name):
    model = fitted(name)
    before = model.scores(model.users(ROWS))
    first = longer(model.snapshot)
    whole = longer(model.snapshot, changed=[20, 30], unknown=2)
    once, twice = model.widened(whole), model.widened(first).widened(whole)
    again = model.widened(first)
    users = ROWS
    assert close(once.scores(once.users(users)), twice.scores(twice.users(users)))
    assert np.array_equal(once.candidates, twice.candidates)
    assert close(once.similarities(ITEMS), twice.similarities(ITEMS))
    assert again.scores(again.users(users)).shape[1] == ITEMS + NEW
    assert np.array_equal(model.scores(model.users(users)), before)


@every
def test_changed_attributes_count_where_the_buyers_do_not_speak(fitted, name):
    model = fitted(name)
    rare = np.flatnonzero((model.popularity > 0) & (model.popularity < 4))
    rare = [int(item) for item in rare[rare < ITEMS - 2] if core(model).candidates[item]][:3]
    assert rare
    wide = model.widened(longer(model.snapshot, changed=rare))
    before, after = model.scores(model.users(ROWS)), wide.scores(wide.users(ROWS))[:, :ITEMS]
    rest = np.setdiff1d(np.arange(ITEMS), rare)
    made_of_buyers = name == "blend + content"  # one buyer is enough there: item_evidence is 0
    if isinstance(model, HabitBlend):  # the spread of the tastes is another one, and with it what they count
        assert (np.abs(before - after)[:, rare] > 1e-3).any()
    elif not isinstance(model, Hybrid) or model.parts[0].name != "content neighbours":
        users = [u for u in ROWS if not np.isin(model.snapshot.history(u).items, rare).any()]
        assert close(before[np.ix_(users, rest)], after[np.ix_(users, rest)])
        assert close(before[:, rare], after[:, rare]) == made_of_buyers


@every
def test_contributions_of_new_items_and_sessions_of_them_add_up(fitted, name):
    model = fitted(name)
    wide = model.widened(longer(model.snapshot, changed=[20], unknown=1))
    new = ITEMS + int(np.flatnonzero(wide.candidates[ITEMS:])[0])
    for history in (session(new), session(2, 20, new), session(ITEMS + NEW), model.snapshot.history(17), NOBODY):
        scores = wide.scores(wide.fold_in(history))[0]
        for item in (0, 20, new, ITEMS + 1, ITEMS - 1, ITEMS + NEW):
            cause = wide.contributions(history, item)
            assert abs(cause.score - scores[item]) < 1e-4 * (1 + np.abs(scores).max()), (history.items, item)
            assert abs(cause.parts.sum() + sum(cause.signals.values()) - cause.score) < 1e-9 * (1 + abs(cause.score))
            assert np.isin(cause.items, history.items).all()


@every
def test_a_session_of_new_products_only_is_known_and_led_to_their_like(fitted, name):
    model = fitted(name)
    wide = model.widened(longer(model.snapshot, unknown=1))
    new = ITEMS + np.flatnonzero(wide.candidates[ITEMS:])
    assert wide.knows(wide.fold_in(session(*new))).all()
    assert not wide.knows(wide.fold_in(session(ITEMS + NEW))).any() and not wide.knows(wide.fold_in(NOBODY)).any()
    alike = wide.similarities(int(new[0]))
    twin = int(new[0]) - ITEMS
    if isinstance(core(model), Hybrid):
        assert np.isfinite(alike[twin])
    both = Histories(np.array([0, 1, 1, 3]), np.array([new[0], 4, new[-1]], np.int32), *(np.ones(3, np.float32),) * 3)
    block = wide.scores(wide.fold_in(both))
    for place, history in enumerate((session(new[0]), NOBODY, session(4, new[-1]))):
        assert close(block[place], wide.scores(wide.fold_in(history))[0])


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if isinstance(model, Hybrid)])
def test_what_a_guest_tells_counts_as_the_users_file_does(fitted, name):
    model = fitted(name)
    columns, counts = model.snapshot.user_columns, model.snapshot.counts
    about = lambda *attributes: replace(NOBODY, about=attributes)  # noqa: E731
    rome, nothing, odd = ({"town": "Rome"}, None, {"town": "Atlantis", "age": None, "planet": "Mars"})
    assert model.knows(model.fold_in(about(rome)))[0]
    assert not model.knows(model.fold_in(about(nothing)))[0] and not model.knows(model.fold_in(about(odd)))[0]
    row = next(
        row for row in range(USERS) if columns["town"][row] == "Rome" and columns["age"][row] != columns["age"][row]
    )
    known = model.snapshot.history(row)
    guest = replace(known, rows=None, about=(rome,))
    assert close(model.scores(model.fold_in(known)), model.scores(model.fold_in(guest)))
    start = model.scores(model.fold_in(about(rome)))[0]
    empty = model.scores(model.fold_in(NOBODY))[0]
    assert close(start, empty) == (model.parameters["attributes"] == 0)
    if model.parameters["attributes"]:  # what people of Rome have more often than others gains most
        romans = columns["town"] == "Rome"
        owned = counts.toarray() > 0
        lift = np.log((owned[romans].sum(axis=0) + 5) / (owned.sum(axis=0) * romans.mean() + 5))
        popular = np.flatnonzero(model.popularity > 10)
        assert np.corrcoef((start - empty)[popular], lift[popular])[0, 1] > 0.9
    nobody = np.empty(0, np.float32)
    block = Histories(np.zeros(4, np.int64), np.empty(0, np.int32), *(nobody,) * 3, about=(rome, nothing, odd))
    assert close(model.scores(model.fold_in(block)), np.stack([start, empty, empty]))


def test_a_file_that_says_nothing_is_refused_with_a_remedy():
    from product_recs.core.errors import TrainError

    log = random_log(USERS, ITEMS, 1)
    plain = replace(log, item_columns={"sku": np.array([f"A{k}" for k in range(ITEMS)], object)})
    for model in (MODELS["ALS + content"], MODELS["content neighbours"]):
        with pytest.raises(TrainError, match="category"):
            model.fit(plain)
        assert "no products file" in model.refusal(replace(log, item_columns=None))
    assert set(described_items(9, 1)) >= {"title", "vector"}


def test_what_was_learned_jointly_is_written_and_served(tmp_path, monkeypatch):
    monkeypatch.setitem(hybrid_weights.TRIED, "joint", (2.0,))
    version = train(tmp_path, model="ALS + content", next_model="none")
    bundle = open_bundle(tmp_path / "models", version, verify=True)
    model, features = bundle.model(), open_features(tmp_path / "features")
    assert model.name == "ALS + content" and model.parameters["joint"] == 2
    assert np.isfinite(bundle.manifest["metrics"]["loss"])
    again = Hybrid(ALS(**model.parts[0].parameters), **model.parameters).fit(features.all)
    alone = ALS(**model.parts[0].parameters).fit(features.all)
    assert np.allclose(model.parts[0].item_factors, again.parts[0].item_factors, atol=1e-5)
    assert not np.allclose(model.parts[0].item_factors, alone.item_factors, atol=1e-2)
    rows = np.arange(50)
    assert np.allclose(model.scores(model.users(rows)), again.scores(again.users(rows)), atol=1e-4)
