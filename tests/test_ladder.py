"""Every list, for everybody and under every combination of rules, against a slow reference that is plainly right."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from support import ready_by_hand, ready_in_memory

from product_recs.answer.ladder import SEGMENT_USERS, Request, answer, content_scores, segment_scores
from product_recs.answer.lists import popular_items, similar_items
from product_recs.answer.person import person_now, score_person
from product_recs.answer.recommender import Recommender
from product_recs.answer.rules import Filters, best_allowed, rule_out
from product_recs.bundle.catalogue import Attributes, Catalogue
from product_recs.bundle.checkerboard import model_by_hand
from product_recs.core.errors import ProductRecsError, UnknownItem
from product_recs.core.events import Event, UserState
from product_recs.core.ids import IdTable
from product_recs.data.snapshots import Snapshot
from product_recs.inference import recommend_many
from product_recs.models.baselines import BuyAgain, Popularity
from product_recs.models.blend import HabitBlend, ScoreBlend
from product_recs.models.item_item import EASE, ItemCosine, ItemGraph
from product_recs.models.signals import SIGNALS, BlendWeights

WORDS = ["tea", "coffee", "mug", None]
NUMBERS = [0.0, 1.0, 2.5, None]
WEIGHTS = BlendWeights(dict.fromkeys(SIGNALS, 0.0) | {"taste": 1.0, "own": 1.0, "count": 1.0}, -1.0, 30.0, 30.0, {})
LEARNED = (
    Popularity(),
    BuyAgain(),
    ItemGraph(num_threads=1),
    EASE(1),
    ScoreBlend([EASE(2), ItemCosine(num_threads=1)]),
)
CALM = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# ---- random shops and questions


@st.composite
def shops(draw):
    "A bundle in memory: many equal scores, unknown attributes, items without interactions, users without factors."
    n_items, n_users, texts = draw(st.integers(1, 14)), draw(st.integers(1, 6)), draw(st.booleans())
    column = lambda values: draw(st.lists(st.sampled_from(values), min_size=n_items, max_size=n_items))
    matrix = lambda rows, low: np.array(
        draw(st.lists(st.lists(st.integers(low, 2), min_size=2, max_size=2), min_size=rows, max_size=rows)), np.float32
    ).reshape(rows, 2)
    seen = np.array(
        [draw(st.lists(st.sampled_from([0, 0, 1]), min_size=n_items, max_size=n_items)) for _ in range(n_users)],
        np.float32,
    )
    ids = sorted(f"i{i}" for i in range(n_items)) if texts else list(range(10, 10 + n_items))
    items = {
        "popularity": seen.sum(axis=0).astype(int),
        "category": np.array(column(WORDS), object),
        "brand": np.array(column(["Elm", "Fir"]), object),
        "price": np.array(column(NUMBERS), float),
        "organic": np.array(column([True, False, None]), object),
    }
    if draw(st.booleans()):
        items["available"] = np.array(column([True, True, False]))
    users = {
        "popularity": seen.sum(axis=1).astype(int),
        "age": np.array(
            draw(st.lists(st.sampled_from(["young", "old", None]), min_size=n_users, max_size=n_users)), object
        ),
    }
    sparse = csr_matrix(seen)
    snapshot = Snapshot(None, sparse, sparse.copy(), sparse * 0)
    user_factors = matrix(n_users, -1) * seen.any(axis=1)[:, None]  # as a fit leaves users without interactions
    by_hand = model_by_hand(user_factors, matrix(n_items, -1), snapshot, regularization=0.5, alpha=2.0)
    # two of three shops have factors; the others any other model that can be fitted on them
    discovery = draw(st.sampled_from([by_hand] * 2 * len(LEARNED) + [*LEARNED])) if seen.any() else by_hand
    if discovery is not by_hand:
        discovery = discovery.fit(snapshot)
    habits = HabitBlend(discovery, weights=WEIGHTS).fit(snapshot)
    return ready_in_memory(
        {"discovery": discovery, "next_purchase": habits},
        snapshot,
        IdTable([f"u{u}" for u in range(n_users)] if texts else range(n_users)),
        IdTable(ids),
        users,
        items,
    )


def filters(ids):
    some = st.lists(st.sampled_from(ids), max_size=4)
    values = {
        "category": st.lists(st.sampled_from(["tea", "coffee", "mug", "cocoa"]), max_size=3),
        "organic": st.lists(st.booleans(), max_size=2),
        "price": st.lists(st.sampled_from([0, 1.0, 2.5, 99]), max_size=3)
        | st.fixed_dictionaries({"min": st.sampled_from([0, 1])}, optional={"max": st.sampled_from([1, 2.5])}),
    }
    return st.builds(
        Filters,
        st.sampled_from([None, True, False]),
        some | some.map(set),
        st.none() | some,
        st.fixed_dictionaries({}, optional=values),
        st.fixed_dictionaries(
            {}, optional={"category": st.integers(1, 3), "brand": st.integers(1, 3), "price": st.integers(1, 2)}
        ),
    )


@st.composite
def questions(draw):
    model = draw(shops())
    known = [model.bundle.items[row] for row in range(len(model.bundle.items))]
    ids = [*known, 999, "nothing"]
    events = st.lists(st.builds(Event, st.sampled_from(ids), st.sampled_from(["view", "purchase"])), max_size=3)
    users = [None, "nobody", 77, *(model.bundle.users[row] for row in range(len(model.bundle.users)))]
    some = st.frozensets(st.sampled_from(ids), max_size=3)
    state = st.builds(UserState, events.map(tuple), some, st.booleans())
    return model, Request(
        draw(st.sampled_from(users)),
        draw(st.integers(1, 16)),
        draw(st.sampled_from(["discovery", "next_purchase"])),
        draw(events),
        draw(filters(ids)),
        draw(state),
        draw(some),
        draw(some),
        draw(st.sampled_from([{}, {"age": "young"}, {"age": "nobody's"}])),
    )


# ---- the reference: one item at a time


def same(value, wanted):
    return value is not None and value == value and value == wanted


def first_reason(model, request, row, seen, asked_about=None):
    "Why this item may not come, or None; max_per aside."
    bundle, id, rules = model.bundle, model.bundle.items[row], request.filters
    known = model.model(request.task).candidates[row]
    listed = bool(bundle.item_columns["available"][row]) if "available" in bundle.item_columns else True
    if (
        not known
        or bundle.item_columns["popularity"][row] == 0
        or not (listed or id in request.available)
    ):
        return "not available or without interactions"
    if id in request.unavailable:
        return "not available at the moment"
    if row == asked_about:
        return "asked about"
    if row in seen:
        return "already seen"
    if id in rules.deny or id in request.state.denied:
        return "denied"
    if rules.allow is not None and id not in rules.allow:
        return "not in the list of allowed items"
    for name, wanted in rules.where.items():
        value = bundle.item_columns[name][row]
        if isinstance(wanted, dict):
            fits = value == value and wanted.get("min", -math.inf) <= value <= wanted.get("max", math.inf)
        else:
            fits = any(same(value, choice) for choice in wanted)
        if not fits:
            return f"outside the filter on '{name}'"
    return None


def reference(model, request, scores, seen=(), asked_about=None, unlike=None):
    "Items, scores and shortfall, from a walk down all scores."
    bundle, rules = model.bundle, request.filters
    reasons, taken, count = {}, [], {}
    walk = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    for row in walk:
        reason = first_reason(model, request, row, seen, asked_about)
        if reason is None and unlike is not None and unlike[row]:
            reason = "with nothing in common"
        if reason is None:
            kinds = [(name, bundle.item_columns[name][row]) for name in rules.max_per]
            kinds = [(name, value) for name, value in kinds if same(value, value)]
            full = [name for name, value in kinds if count.get((name, value), 0) >= rules.max_per[name]]
            if full:
                reason = "full"
            elif len(taken) < request.n:
                taken.append(row)
                for kind in kinds:
                    count[kind] = count.get(kind, 0) + 1
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
    return [bundle.items[row] for row in taken], [scores[row] for row in taken], reasons


def check(model, request, result, scores, seen=(), asked_about=None, unlike=None):
    "What must hold for every list."
    items, expected, reasons = reference(model, request, scores, seen, asked_about, unlike)
    assert result.items == items
    assert np.allclose(result.scores, expected, atol=1e-5)
    assert [model.bundle.items[row] for row in result.rows] == items
    assert len(set(result.items)) == len(result.items) <= request.n
    assert all(a >= b for a, b in zip(result.scores, result.scores[1:]))
    assert (result.shortfall is None) == (len(result) == request.n)
    if result.shortfall is None:
        return
    stated = re.fullmatch(rf"only {len(result)} of {request.n}: (.+)", result.shortfall)[1]
    if "no more items" in stated:
        assert not reasons
        return
    counts = {}
    for part in re.split(r", (?=\d)", stated):
        number, reason = re.fullmatch(r"([\d,]+) items? (.+)", part).groups()
        reason = "full" if reason.startswith("beyond ") else reason
        counts[reason] = counts.get(reason, 0) + int(number)
    assert counts == reasons  # every item that is missing is counted once, under the rule that took it
    assert sum(counts.values()) + len(result) == len(model.bundle.items)


def trained_row(model, request):
    row = None if request.state.forgotten or request.user is None else model.bundle.users.row(request.user)
    return row if row is not None and len(model.bundle.history(row).items) else None


# ---- the ladder


@CALM
@given(questions())
def test_every_list_is_the_one_of_the_reference(question):
    model, request = question
    before = [array.copy() for array in (model.popularity, model.candidates, model.catalogue.blocked)]
    result, asked = answer(model, request), model.model(request.task)
    person = person_now(model, request.user, request.state, request.session, request.task)
    if person.representation is not None:
        scores = score_person(model, person)
        assert result.model == asked.name
        assert result.source == (
            "popular"
            if not asked.personal
            else "session"
            if trained_row(model, request) is None
            else "next_purchase"
            if request.task == "next_purchase"
            else "personalised"
        )
    elif result.source == "content":
        scores = content_scores(model, person.items, person.history.confidence)
    elif "category" in request.filters.where and any(model.bundle.item_columns["category"]):
        assert result.source == "segment"
    else:
        assert result.source == "popular"  # these shops are too small for a segment of users
    if person.representation is None and result.source in ("segment", "popular"):
        scores = model.bundle.item_columns["popularity"]
    exclude = request.filters.exclude_seen if request.filters.exclude_seen is not None else request.task == "discovery"
    check(model, request, result, np.asarray(scores, float).tolist(), set(person.items.tolist()) if exclude else ())
    assert answer(model, request) == result
    assert all((a == b).all() for a, b in zip(before, (model.popularity, model.candidates, model.catalogue.blocked)))


@CALM
@given(questions())
def test_what_is_known_decides_the_rung(question):
    model, request = question
    bundle, asked = model.bundle, model.model(request.task)
    trained = trained_row(model, request) is not None
    person = person_now(model, request.user, request.state, request.session, request.task)
    in_hand = [
        event.item_id
        for event in (*request.state.events, *request.session)
        if bundle.items.row(event.item_id) is not None
    ]
    source = answer(model, request).source
    tells = bool(in_hand) and bool(asked.knows(asked.fold_in(person.history))[0])  # else the items say nothing
    if not asked.personal:
        assert (person.representation is None) <= (source in ("content", "segment", "popular"))
    elif trained and not in_hand:
        known = asked.knows(asked.users(np.array([person.row])))[0]
        assert known == (source == ("personalised" if request.task == "discovery" else "next_purchase"))
    elif trained:
        assert tells == (source in ("personalised", "next_purchase"))
    else:
        assert tells == (source == "session")
    if source == "content":
        assert len(person.items)
    if request.state.forgotten:
        assert source not in ("personalised", "next_purchase")


@CALM
@given(shops(), st.integers(1, 16), st.booleans())
def test_lists_of_many_are_those_of_one(model, n, exclude):
    rules, recommender = Filters(exclude_seen=exclude), Recommender(model)
    users = [*(model.bundle.users[row] for row in range(len(model.bundle.users))), "nobody at all"]
    many = recommend_many(recommender, users, n, filters=rules)
    for user, answers in zip(users, many):
        expected = answer(model, Request(user, n, filters=Filters(exclude_seen=None if exclude else False)))
        assert answers.items == expected.items and answers.source == expected.source
        assert answers.shortfall == expected.shortfall and np.allclose(answers.scores, expected.scores, atol=1e-5)
        assert recommender.recommend(user, n, filters=rules) == answer(model, Request(user, n, filters=rules))
    assert answer(model, Request(None, n)) == popular_items(model, n) == recommender.recommend("nobody at all", n)


@CALM
@given(questions())
def test_similar_and_popular_items_keep_the_same_rules(question):
    model, request = question
    feed = {"filters": request.filters, "unavailable": request.unavailable, "available": request.available}
    nobody = replace(request, state=UserState())
    check(model, nobody, popular_items(model, request.n, **feed), model.bundle.item_columns["popularity"].tolist())
    for row in range(len(model.bundle.items)):
        result = similar_items(model, model.bundle.items[row], request.n, **feed)
        asked = model.model()
        if not asked.candidates[row]:
            assert not result.items and "no interactions" in result.shortfall
            continue
        alike = asked.similarities(row)
        check(model, nobody, result, alike.tolist(), asked_about=row, unlike=np.isneginf(alike))
    with pytest.raises(UnknownItem):
        similar_items(model, "no such item", **feed)


# ---- single parts


@CALM
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, -math.inf, math.nan]), max_size=200), st.integers(1, 30), st.data()
)
def test_the_limit_is_right_however_often_the_slice_must_grow(scores, n, data):
    size = len(scores)
    kinds = {
        name: np.array(
            data.draw(
                st.lists(
                    st.sampled_from(["a", "b", "c", None][: data.draw(st.integers(1, 4))]), min_size=size, max_size=size
                )
            ),
            object,
        )
        for name in ("one", "two")
    }
    limits = data.draw(st.fixed_dictionaries({"one": st.integers(1, 4)}, optional={"two": st.integers(1, 40)}))
    catalogue = Catalogue(IdTable(range(size)), kinds, np.ones(size, bool))
    rows, best, shortfall = best_allowed(catalogue, np.array(scores, np.float32), n, [], limits)
    count, expected = {}, []
    for row in sorted((row for row in range(size) if scores[row] > -math.inf), key=lambda row: (-scores[row], row)):
        groups = [(name, kinds[name][row]) for name in limits if kinds[name][row] is not None]
        if len(expected) < n and all(count.get(group, 0) < limits[group[0]] for group in groups):
            expected.append(row)
            for group in groups:
                count[group] = count.get(group, 0) + 1
    assert rows == expected and best == [scores[row] for row in expected] and (shortfall is None) == (len(rows) == n)


def test_a_full_category_of_thousands_is_passed_over():
    "Ten thousand items of one brand score best; the list needs those behind them."
    size = 20_000
    brand = np.array(["Elm"] * 19_990 + [f"b{i}" for i in range(10)], object)
    catalogue = Catalogue(IdTable(range(size)), {"brand": brand}, np.ones(size, bool))
    rows, _, shortfall = best_allowed(catalogue, -np.arange(size, dtype=np.float32), 10, [], {"brand": 2})
    assert rows == [0, 1, *range(19_990, 19_998)] and shortfall is None
    rows, _, shortfall = best_allowed(catalogue, -np.arange(size, dtype=np.float32), 13, [], {"brand": 2})
    assert len(rows) == 12 and shortfall == "only 12 of 13: 19,988 items beyond 2 of one 'brand'"


@CALM
@given(st.lists(st.sampled_from([*WORDS, "é", ""]), max_size=30), st.lists(st.sampled_from(["tea", "é", "", "none"])))
def test_codes_find_what_equality_finds(values, wanted):
    table = Attributes({"c": np.array(values, object)})
    assert table.match("c", wanted).tolist() == [value is not None and value in wanted for value in values]


@CALM
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from([2**53, 2**53 + 1])),
    st.integers(-(2**70), 2**70),
    st.integers(-(2**70), 2**70),
)
@example([2**53, 2**53 + 1], 2**53 + 1, 2**53 + 1)
def test_whole_numbers_are_compared_exactly(values, low, high):
    table, (low, high) = Attributes({"c": np.array(values, np.int64)}), sorted((low, high))
    assert table.match("c", [low, high]).tolist() == [value in (low, high) for value in values]
    assert table.match("c", {"min": low, "max": high}).tolist() == [low <= value <= high for value in values]


@CALM
@given(shops(), st.data())
def test_content_counts_what_is_shared(model, data):
    columns, size = model.bundle.item_columns, len(model.bundle.items)
    hand = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True))
    match = [
        sum(
            math.log(size / sum(same(other, value) for other in columns[name]))
            for mine in hand
            for name in ("brand", "category", "organic")
            if same(value := columns[name][row], columns[name][mine])
        )
        for row in range(size)
    ]
    scores = content_scores(model, np.array(hand), np.ones(len(hand)))
    if scores is None:
        assert not any(value > 1e-9 for row, value in enumerate(match) if model.candidates[row])
        return
    top = 1 + max(columns["popularity"])
    for a in range(size):
        assert 0 <= scores[a] - math.floor(scores[a]) < 1 and (scores[a] >= 1) == (match[a] > 1e-9)
        assert np.isclose(scores[a] % 1, columns["popularity"][a] / top)
        for b in range(size):
            if match[a] > match[b] + 1e-6:
                assert math.floor(scores[a]) > math.floor(scores[b])


@CALM
@given(shops(), st.data())
def test_a_described_item_counts_like_one_of_the_model(model, data):
    columns, nothing = model.bundle.item_columns, np.empty(0, np.int64)
    hand = data.draw(st.lists(st.integers(0, len(model.bundle.items) - 1), min_size=1, max_size=3))
    described = [{name: columns[name][row] for name in ("brand", "category", "organic")} for row in hand]
    by_row, by_words = (
        content_scores(model, np.array(hand), np.ones(len(hand))),
        content_scores(model, nothing, nothing, described),
    )
    assert (by_row is None) == (by_words is None) and (by_row is None or np.allclose(by_row, by_words))
    result = answer(model, Request(None, 3, session=[Event("brand new")], new_items={"brand new": described[0]}))
    scores = content_scores(model, nothing, nothing, described[:1])
    assert result.source == ("popular" if scores is None else "content")
    check(model, Request(None, 3), result, (model.popularity if scores is None else scores).tolist())


def test_many_threads_with_different_feeds_get_what_one_gets_alone():
    rng, size = np.random.default_rng(3), 400
    columns = {
        "popularity": rng.integers(1, 9, size),
        "category": rng.choice(["tea", "mug", "pot"], size).astype(object),
    }
    users = {"age": rng.choice(["young", "old"], 60).astype(object)}
    sparse = csr_matrix((rng.random((60, size)) < 0.05).astype(np.float32))
    factors = [rng.normal(size=(rows, 4)).astype(np.float32) for rows in (60, size)]

    def fresh():
        return ready_by_hand(*factors, sparse, users, columns)

    feeds = [frozenset(rng.integers(0, size, 150).tolist()) for _ in range(4)]
    asked = [
        Request(
            user if user % 3 else None,
            8,
            filters=Filters(where={"category": ["tea"]}) if user % 2 else Filters(max_per={"category": 2}),
            unavailable=feeds[user % 4],
            attributes={"age": ("young", "old")[user % 2]},
        )
        for user in range(60)
    ] * 5
    alone = [answer(fresh(), request) for request in asked]
    together = fresh()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda request: answer(together, request), asked)) == alone


def test_a_segment_counts_its_own_users_and_no_small_one_is_used():
    rng = np.random.default_rng(5)
    n_users, n_items = 90, 12
    seen = (rng.random((n_users, n_items)) < 0.3).astype(np.float32)
    users = {
        "age": rng.choice(["young", "old", "rare"], n_users, p=[0.5, 0.4, 0.1]).astype(object),
        "town": rng.choice(["Rome", "Oslo", "Bonn"], n_users).astype(object),
    }
    factors = [rng.normal(size=(rows, 3)).astype(np.float32) for rows in (n_users, n_items)]
    model = ready_by_hand(*factors, csr_matrix(seen), users, {"popularity": seen.sum(axis=0).astype(int)})
    used = set()
    for age in ("young", "old", "rare", "unheard of", None):
        for town in ("Rome", "Oslo", "Bonn", None):
            agree = [(users["age"][u] == age) + (users["town"][u] == town) for u in range(n_users)]
            people = next(
                (
                    [u for u in range(n_users) if agree[u] >= level]
                    for level in (2, 1)
                    if sum(a >= level for a in agree) >= SEGMENT_USERS
                ),
                None,
            )
            scores = segment_scores(model, {"age": age, "town": town})
            used.add(None if people is None else len(people))
            if people is None:
                assert scores is None
                continue
            assert np.floor(scores).tolist() == seen[people].sum(axis=0).tolist()
            result = answer(model, Request(None, 5, attributes={"age": age, "town": town}))
            assert result.source == "segment" and result.rows == np.argsort(-scores, kind="stable")[:5].tolist()
    assert None in used and len(used) > 3


def test_of_a_large_segment_some_are_counted_evenly_spread(monkeypatch):
    monkeypatch.setattr("product_recs.answer.ladder.SEGMENT_SAMPLE", 10)
    seen = np.eye(95, dtype=np.float32)
    ages = {"age": np.array(["old"] * 95, object)}
    model = ready_by_hand(seen, seen, csr_matrix(seen), ages, {"popularity": np.ones(95, int)})
    assert np.flatnonzero(np.floor(segment_scores(model, {"age": "old"}))).tolist() == list(range(0, 95, 10))


@pytest.mark.parametrize(
    "rules, words",
    [
        (Filters(where={"colour": ["red"]}), ["where", "'colour'", "'category'"]),
        (Filters(max_per={"colour": 1}), ["max_per", "'colour'", "'category'"]),
        (Filters(where={"category": [1]}), ["'category'", "text"]),
        (Filters(where={"price": ["1"]}), ["'price'", "numbers"]),
        (Filters(where={"category": {"min": 1}}), ["'category'", "range"]),
    ],
)
def test_a_wrong_filter_is_named_on_every_rung(rules, words):
    column = np.array(["tea", "mug"], object)
    identity = np.eye(2, dtype=np.float32)
    items = {"popularity": np.ones(2, int), "category": column, "price": np.ones(2)}
    model = ready_by_hand(identity, identity, csr_matrix(identity), {"age": column}, items)
    for ask in (
        lambda: answer(model, Request(1, filters=rules)),
        lambda: answer(model, Request(None, filters=rules)),
        lambda: popular_items(model, filters=rules),
        lambda: similar_items(model, 1, filters=rules),
        lambda: rule_out(model.catalogue, rules),
    ):
        with pytest.raises(ProductRecsError) as error:
            ask()
        assert all(word in str(error.value) for word in words)
