"""Products that the shop adds between two trainings, with a model that places them and with one that does not."""

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from support import N, publish_board, weights

from product_recs.answer.ladder import Request, answer, score_request
from product_recs.answer.new import new_for
from product_recs.answer.recommender import Recommender, open_recommender
from product_recs.answer.rules import Filters
from product_recs.bundle.catalogue import NOT_A_CANDIDATE, rows_of
from product_recs.bundle.cold import ColdTable
from product_recs.bundle.extended import extended
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE, Columns
from product_recs.core.events import Event, UserState
from product_recs.core.ids import FOLDS, IdTable, LongerIds, folded
from product_recs.data.arrays import save_table
from product_recs.data.left_out import LeftOut
from product_recs.feedback.changes import NOTHING_CHANGED
from product_recs.inference import recommend_many
from product_recs.jobs.batch import Question, write_batch
from product_recs.models.als import ALS
from product_recs.models.blend import HabitBlend
from product_recs.web.details import explained, ranked, ranked_new
from product_recs.web.items import find_items, item_facts

COLD = {
    "item_id": np.array([900, 901]),
    "title": np.array(["Cold even", "Cold odd"], object),
    "category": np.array(["even", "odd"], object),
    "price": np.array([4.0, np.nan]),
    Columns.FileRow: np.array([7, 3]),
}
POSTED = {
    "1000": {"category": "even", "title": "Brand new even", "price": 3, "roast": "dark"},
    "1001": {"category": "odd", "title": "Brand new odd", "price": 8.5, "available": True},
    "101": {"price": 77},
}


class ByCategory(ALS):
    """An ALS that takes a new item for a trained one of its category, a little less of it, and a guest whose taste is
    told for a user with that taste."""

    places_items = True

    def widened(self, snapshot):
        longer = np.zeros((len(snapshot.popularity), self.item_factors.shape[1]), np.float32)
        longer[: len(self.item_factors)] = self.item_factors
        kinds, trained = snapshot.item_columns["category"], snapshot.popularity > 0
        for row in snapshot.changed_rows[~trained[snapshot.changed_rows]]:
            same = np.flatnonzero(trained & (kinds == kinds[row]))
            longer[row] = longer[same[0]] * np.float32(0.9) if len(same) else 0
        arrays = {"user_factors": self.user_factors, "item_factors": longer}
        other = self.from_arrays(arrays, snapshot)
        other.candidates = longer.any(axis=1)
        return other

    def fold_in(self, histories):
        factors = super().fold_in(histories)
        for place, about in enumerate(histories.about or ()):
            same = np.flatnonzero(self.snapshot.user_columns["taste"] == about.get("taste"))
            if not factors[place].any() and len(same):
                factors[place] = self.user_factors[same[0]]
        return factors


def shop(folder, cold=True, **more):
    "The checkerboard, whose first user has even items, as a ready model that places nothing."
    taste = np.array(["even", "odd"], object)[np.arange(N) % 2]
    columns = {"popularity": np.full(N, N // 2 - 1, np.int32), "taste": taste}
    if cold:
        save_table(Path(folder) / "cold.parquet", COLD)
        more["cold_items"] = Path(folder) / "cold.parquet"
    path = publish_board(Path(folder) / "models", user_columns=columns, **more)
    return ReadyModel(open_bundle(path.parent)).prepare()


def placing(plain, **more):
    "The same shop with a model that places items, and habits on top of it."
    als = plain.bundle.models[DISCOVERY]
    place = ByCategory(**als.parameters).from_arrays(als.to_arrays(), plain.bundle.snapshot)
    habits = HabitBlend(place, NEXT_PURCHASE, weights(NEXT_PURCHASE)).fit(plain.bundle.snapshot)
    models = {DISCOVERY: place, NEXT_PURCHASE: habits}
    return ReadyModel(replace(plain.bundle, models=models, **more)).prepare()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def today(plain):
    return extended(placing(plain), POSTED).prepare()


def ask(model, user=None, n=3, task=DISCOVERY, **more):
    return answer(model, Request(user, n, task, **more))


def test_a_new_product_is_recommended_to_whom_it_suits(today):
    even, odd = ask(today, 1), ask(today, 2)
    assert even.items == [101, 900, 1000] and odd.items == [102, 901, 1001], "their own item, then what is like theirs"
    assert even.source == "personalised" and even.model == "ALS" and even.shortfall is None
    assert today.bundle.items.take(np.array(even.rows)) == even.items
    first = ranked(today, even)[2]
    assert first["title"] == "Brand new even" and first["attributes"]["roast"] == "dark" and len(first["reasons"]) == 3
    assert first["attributes"]["popularity"] == 0 and first["attributes"]["price"] == 3.0
    assert all(reason["item_id"] % 2 for reason in first["reasons"]), "because of the even items, 103 and on"


def test_similar_and_explained(today):
    recommender = Recommender(today)
    like = recommender.similar(1000, N)
    assert like.source == "similar" and {101, 103, 900} <= {*like.items} and 1000 not in like.items
    assert like.items.index(900) < like.items.index(102)
    assert {900, 1000} <= {*recommender.similar(101, N // 2 + 1).items}
    facts = explained(today, Request(1, 10), 1000)
    assert facts["rank"] == 3 and facts["recommended"] and facts["rule"] is None and facts["title"] == "Brand new even"
    assert np.isclose(sum(part["contribution"] for part in facts["why"]) + facts["other"], facts["score"], atol=1e-5)


def test_every_rule_holds_for_new_products(today):
    rules = lambda **more: ask(today, 1, filters=Filters(**more)).items
    assert rules(where={"roast": ["dark"]}) == [1000] and rules(where={"price": {"max": 3.5}})[0] == 1000
    assert rules(where={"price": {"min": 70}}) == [101], "its new price"
    assert rules(deny=["1000"])[2] != 1000 and rules(allow=[1000, "901", 5]) == [1000, 901]
    assert rules(max_per={"category": 1}) == [101, 102] and rules(max_per={"roast": 1})[:3] == [101, 900, 1000]
    assert ask(today, 1, state=UserState(denied=frozenset(["1000"]))).items[:2] == [101, 900]
    assert 1000 not in ask(today, 1, N, state=UserState(denied=frozenset(["1000"]))).items
    assert 1000 not in ask(today, 1, N, unavailable=frozenset(["1000"])).items
    sold_out = extended(today_base(today), {"1000": POSTED["1000"] | {"available": False}})
    assert 1000 not in ask(sold_out, 1, N).items
    assert 1000 in ask(sold_out, 1, N, available=frozenset(["1000"])).items
    assert ask(today, 1, session=[Event(1000)]).items == [101, 900, 102], "seen"


def today_base(today):
    "The same models over the catalogue of the training."
    bundle = open_bundle(today.bundle.path.parent)
    return placing(ReadyModel(bundle))


def test_the_next_purchase_knows_new_products(today):
    due = ask(today, 1, 2 * N, NEXT_PURCHASE)
    assert (
        due.source == "next_purchase" and {1000, 1001} <= {*due.items} and due.items.index(1000) < due.items.index(1001)
    )
    bought = ask(today, 1, 2 * N, NEXT_PURCHASE, session=[Event(1000)] * 3)
    assert bought.items.index(1000) < due.items.index(1000), "it is a habit now"
    facts = explained(today, Request(1, 10, NEXT_PURCHASE, session=[Event(1000)]), 1000)
    assert facts["habit"].startswith("once") and facts["signals"]["own"] > 0


def test_a_session_of_new_items_only(today):
    reply = ask(today, session=[Event(1000)])
    assert reply.source == "session" and all(item % 2 or item == 900 for item in reply.items)
    assert 1000 not in reply.items and reply.person.items.tolist() == [N + 2]


def test_somebody_of_whom_only_attributes_are_known(today, tmp_path):
    reply = ask(today, attributes={"taste": "odd"})
    assert reply.source == "content" and reply.model == "ALS" and set(reply.items) <= {*range(102, 130, 2), 901, 1001}
    assert ask(today, attributes={"taste": None}).source == "popular" == ask(today, attributes={"taste": "none"}).source
    assert explained(today, Request(attributes={"taste": "odd"}), 1001)["source"] == "content"
    save_table(tmp_path / "users.parquet", {"user_id": np.array([77]), "taste": np.array(["odd"], object)})
    bundle = replace(today.bundle, cold_users=ColdTable(tmp_path / "users.parquet", "user_id"))
    known = ReadyModel(bundle).prepare()
    recommender = Recommender(known)
    request = recommender.request(77, 3)
    person = recommender.person(request)
    assert recommender.takes_long(request, person) and recommender.answer(request, person) == ask(known, 77)
    assert ask(known, 77).items == reply.items and ask(known, 77).source == "content"
    assert ask(known, 77, attributes={"taste": "even"}).items != reply.items, "the request knows better"
    assert ask(known, 77, state=UserState(forgotten=True)).source == "popular"
    assert score_request(known, Request(77)).source == "content" and ask(known, 1).source == "personalised"
    assert ask(known, 77, session=[Event(101)]).source == "session"


def test_what_the_training_left_out_is_seen_all_the_same(plain):
    "User 1 has bought 900, which too few have to be in the training."
    pair = csr_matrix(([1.0], ([0], [N])), (1, N + 1), dtype=np.float32)
    left_out = LeftOut(N, IdTable([1]), IdTable([900]), pair, pair, pair * 0, pair * 0)
    model = extended(placing(plain, left_out=left_out), POSTED)
    assert ask(model, 1).items == [101, 1000, 102] and 901 in ask(model, 2).items
    recommender = Recommender(model)
    assert recommend_many(recommender, range(1, N + 1), 4) == [
        recommender.recommend(user, 4) for user in range(1, N + 1)
    ]


@pytest.mark.parametrize("places, task", [(True, DISCOVERY), (True, NEXT_PURCHASE), (False, DISCOVERY)])
def test_the_batch_is_the_same_as_one_by_one(plain, places, task, tmp_path):
    model = extended(placing(plain) if places else plain, POSTED).prepare()
    recommender = Recommender(model)
    users = [*range(1, N + 1), "nobody"]
    for n in (1, 5, N + 2, 2 * N):
        single = [recommender.recommend(user, n, task) for user in users]
        assert recommend_many(recommender, users, n, task) == single
        write_batch(recommender, Question(n=n, task=task), tmp_path / "lists", users, progress=False)
        rows = duckdb.execute(f"SELECT user_id, item_id FROM '{tmp_path}/lists/*.parquet'")
        assert rows.fetchall() == [(str(user), item) for user, reply in zip(users, single) for item in reply.items]
    if places:
        assert any(item >= 900 for reply in single for item in reply.items)


# --- a model that places nothing


def test_a_model_that_places_nothing_answers_as_before(plain):
    wide = extended(plain, POSTED).prepare()
    assert np.shares_memory(wide.model().parts[0].item_factors, plain.model().item_factors)
    assert wide.model().parts[0] is plain.model() and wide.bundle.items.ids[N:].tolist() == [1000, 1001]
    for user in (*range(1, N + 1), None, "nobody"):
        for more in ({}, {"session": [Event(105)]}, {"filters": Filters(deny=[103])}):
            assert ask(wide, user, 5, **more).items == ask(plain, user, 5, **more).items
    assert not wide.candidates[N:].any() and ask(wide, 1, 2 * N).items == ask(plain, 1, 2 * N).items


def test_and_new_products_are_there_by_their_attributes(plain):
    wide = extended(plain, POSTED).prepare()
    recommender = Recommender(wide)
    like = recommender.similar(1000, N)
    assert like.source == "content" and set(like.items) == {*range(101, 101 + N, 2)}
    assert recommender.similar(900, N).items == like.items, "the cold one of the file"
    facts = explained(wide, Request(1, 10), 1000)
    assert facts["rule"] == NOT_A_CANDIDATE and facts["rank"] is facts["score"] is None and facts["why"] == []
    known = recommender.request(None, 5, session=[Event(1000)], new_items={1000: {"price": 5}})
    assert recommender.answer(known).source == "content"
    assert set(recommender.answer(known).items) <= {*range(101, 101 + N, 2)} and recommender.person(known).unknown == 1
    assert recommender.recommend(None, 5, session=[Event(1000), Event(101)]).source == "session"
    assert item_facts(wide, 1000, NOTHING_CHANGED)["available"] and item_facts(wide, "1001", NOTHING_CHANGED)["item_id"]
    assert item_facts(wide, 1000, NOTHING_CHANGED)["attributes"]["roast"] == "dark"
    assert item_facts(wide, 101, NOTHING_CHANGED)["attributes"]["price"] == 77


@pytest.mark.parametrize("places", [True, False])
def test_new_and_the_search_list_what_nobody_has(plain, places):
    model = extended(placing(plain) if places else plain, POSTED).prepare()
    fresh = new_for(model, Request(n=9))
    assert fresh.items == [1001, 1000, 900, 901] and fresh.source == "new", "what the shop told last comes first"
    mine = new_for(model, Request(1, 9))
    assert mine.source == "content" and mine.items[:2] == [1000, 900] and mine.scores[0] > 0 == mine.scores[2]
    assert [line["title"] for line in ranked_new(model, mine)][:2] == ["Brand new even", "Cold even"]
    assert ranked_new(model, mine)[0]["attributes"]["price"] == 3.0
    assert new_for(model, Request(n=9), "odd").items == [1001, 901]
    assert 1000 not in new_for(model, Request(n=9, session=[Event(1000)])).items
    hits = lambda words, limit=20: [item["item_id"] for item in find_items(model, words, limit)]
    assert hits("brand new") == [1000, 1001] and hits("even") == hits("EVEN") and set(hits("cold")) == {900, 901}
    assert hits("odd") == ([901, 1001] if places else [1001, 901]) and hits("odd", 1) == hits("odd")[:1]
    assert hits("1000") == [1000] and hits("thing 3") == [104]
    popular = Recommender(model).popular(2 * N)
    assert set(popular.items) == {*range(101, 101 + N)}
    assert ("4 items that nobody has" if places else NOT_A_CANDIDATE) in popular.shortfall


def test_products_of_the_file_take_what_was_told(plain):
    for model in (plain, placing(plain)):
        wide = extended(model, {"900": {"price": 1, "category": "odd"}}).prepare()
        row = wide.bundle.items.row(900)
        assert wide.bundle.item_columns["title"][row] == "Cold even" and wide.bundle.item_columns["price"][row] == 1
        assert wide.bundle.cold_items.get(900) == {"title": "Cold even", "category": "odd", "price": 1.0}
        assert new_for(wide, Request(n=9), "odd").items == [900, 901], "in the order of the file"
    assert 900 in ask(wide, 2).items and 900 not in ask(wide, 1).items, "it is placed by its new category"


def test_what_was_deleted_is_as_if_it_had_never_been_told(plain):
    model = placing(plain)
    before, with_it, after = extended(model, {}), extended(model, POSTED), extended(model, dict.fromkeys(POSTED))
    assert after is before and len(with_it.bundle.items) == len(before.bundle.items) + 2
    assert before.bundle.item_columns["price"][0] != 77 == with_it.bundle.item_columns["price"][0]
    assert extended(plain, dict.fromkeys(POSTED)) is plain
    assert ask(before, 1) == ask(extended(placing(plain), {}), 1)


def test_a_bundle_without_a_products_file(tmp_path):
    bare = shop(tmp_path, cold=False, item_columns={"popularity": np.full(N, N // 2 - 1, np.int32)})
    model = extended(bare, {"1000": {"title": "First of all", "category": "tea"}, "1001": {}}).prepare()
    assert new_for(model, Request(n=5)).items == [1001, 1000] and model.bundle.cold_items.get(1001) is not None
    assert item_facts(model, 1000, NOTHING_CHANGED)["title"] == "First of all"
    assert ask(model, 1).items == ask(bare, 1).items and extended(bare, {}) is bare


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_cold_file_that_cannot_be_read(plain, tmp_path, damage, caplog):
    file = tmp_path / "cold.parquet"
    save_table(file, COLD)
    bundle = replace(plain.bundle, cold_items=ColdTable(file, "item_id"))
    model = placing(ReadyModel(bundle), cold_items=bundle.cold_items)
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-30])
    wide = extended(model, POSTED).prepare()
    assert ask(wide, 1).items == [101, 1000, 102] and "cannot be read" in caplog.text
    assert new_for(wide, Request(n=5)).items == [1001, 1000] and new_for(model, Request(n=5)).items == []
    assert Recommender(wide).similar(1000, 3).source == "similar"
    file.write_bytes(whole)
    assert 900 in ask(extended(model, POSTED), 1).items, "it is tried again"


def test_ids_that_cannot_be_of_this_model(plain):
    wide = extended(plain, {"A-7": {"category": "odd"}, "12345678901234567890123": {}, "": {}, "1000.0": {}})
    assert wide.bundle.items.ids[N:].tolist() == [1000]


def test_an_open_recommender_has_the_catalogue_of_its_products(tmp_path, plain):
    with open_recommender(plain.bundle.path.parent) as opened:
        assert opened.model.bundle.items.ids.tolist() == plain.bundle.items.ids.tolist()
        assert opened.recommend(1, 5) == ask(opened.model, 1, 5)


# --- by properties

KEYS = {
    "ints": st.integers(1, 60).map(str),
    "texts": st.text("aB 0", min_size=1, max_size=3).filter(lambda text: text == text.strip() and text),
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*KEYS]), st.data())
def test_a_longer_table_of_ids_is_a_dictionary(kind, data):
    folds = data.draw(st.sampled_from([(), ("case",), FOLDS])) if kind == "texts" else ()
    keys = data.draw(st.lists(KEYS[kind], unique_by=lambda key: folded(key, folds), max_size=12))
    ids = [int(key) for key in keys] if kind == "ints" else keys
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), min_size=2, max_size=2)))
    base = np.array(sorted(ids[: cuts[0]]), np.int64 if kind == "ints" else object)
    table = LongerIds(LongerIds(IdTable(base, folds), ids[cuts[0] : cuts[1]]), ids[cuts[1] :])
    order = [*base.tolist(), *ids[cuts[0] :]]
    by_key = {folded(str(id), folds): row for row, id in enumerate(order)}
    assert table.ids.tolist() == order == [table[row] for row in range(len(table))] and len(table) == len(order)
    asked = data.draw(st.lists(KEYS[kind], max_size=8)) + keys
    rows = [by_key.get(folded(key, folds)) for key in asked]
    assert [table.row(key) for key in asked] == rows
    assert rows_of(table, asked).tolist() == sorted({row for row in rows if row is not None})
    assert [table.shown(key) for key, row in zip(asked, rows) if row is not None] == [
        order[row] for row in rows if row is not None
    ]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.lists(st.integers())
)
WORDS = st.dictionaries(st.sampled_from(["title", "Category", "price", "first_seen", "popularity", "x", "é"]), VALUES)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.booleans(), st.data())
def test_whatever_is_told_all_answers_hold(tmp_path_factory, places, texts, data):
    key = KEYS["texts"] if texts else st.integers(95, 130).map(str)
    products = data.draw(st.dictionaries(key, st.one_of(st.none(), WORDS), max_size=6))
    folder = tmp_path_factory.mktemp("any")
    ids = {"items": [f"i{row:03}" for row in range(N)], "parameters": {"ingest": {"normalise_ids": list(FOLDS)}}}
    plain = shop(folder, cold=not texts, **(ids if texts else {}))
    wide = extended(placing(plain) if places else plain, products).prepare()
    bundle = wide.bundle
    posted = {key: words for key, words in products.items() if words is not None}
    folds = bundle.items.folds
    assert {folded(str(id), folds) for id in bundle.items.ids.tolist()} == {
        *(folded(str(id), folds) for id in plain.bundle.items.ids.tolist()),
        *(folded(key, folds) for key in posted),
        *(("900", "901") if places and not texts else ()),
    }
    assert {len(values) for values in bundle.item_columns.values()} == {len(bundle.items)}
    assert bundle.item_columns["popularity"][len(plain.bundle.items) :].tolist() == [0] * (len(bundle.items) - N)
    for name, kind in wide.catalogue.attributes.kinds.items():
        values = [value for value in wide.catalogue.attributes.coded(name)[1] if value is not None]
        if kind != "nothing" and values:
            assert wide.catalogue.attributes.match(name, values[:1]).any()
    recommender = Recommender(wide)
    users = [plain.bundle.users[0], "nobody"]
    assert recommend_many(recommender, users, 4) == [recommender.recommend(user, 4) for user in users]
    if not places:
        assert recommender.recommend(users[0], 4).items == ask(plain, users[0], 4).items
    for key in posted:
        assert explained(wide, Request(users[0], 4), key)["item_id"] == key and item_facts(wide, key, NOTHING_CHANGED)
        recommender.similar(key, 3)
        find_items(wide, key, 5)
    assert len(new_for(wide, Request(users[0], 99)).items) <= len(posted) + 2
