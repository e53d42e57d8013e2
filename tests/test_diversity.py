"""Variety: what it may change, that every door gives the same, and what it costs."""

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from support import SMALL, publish_board, random_log, ready_in_memory

from product_recs.answer.diversity import POOL, Likeness, diversify
from product_recs.answer.ladder import Request, answer
from product_recs.answer.recommender import Recommender
from product_recs.answer.rules import Filters
from product_recs.api import create_app
from product_recs.core.columns import DISCOVERY
from product_recs.core.errors import ProductRecsError
from product_recs.core.events import Event
from product_recs.core.ids import IdTable
from product_recs.core.settings import Settings
from product_recs.data.tasks import make_task
from product_recs.evaluate import price_of_diversity
from product_recs.inference import recommend_many
from product_recs.models.als import ALS
from product_recs.models.baselines import Popularity

USERS, ITEMS = 60, 80
LOG = random_log(USERS, ITEMS, seed=11)
KINDS = np.array(["tea", "coffee", "mugs", None], object)[np.arange(ITEMS) // 4 % 4]


def served(model):
    columns = {"popularity": LOG.popularity.astype(np.int32), "category": KINDS}
    people = {"popularity": np.diff(LOG.counts.indptr)}
    return ready_in_memory(
        {DISCOVERY: model.fit(LOG)}, LOG, IdTable(range(USERS)), IdTable(range(ITEMS)), people, columns
    )


MODELS = {"factors": served(ALS(**SMALL)), "counts": served(Popularity())}
ASKED = st.fixed_dictionaries(
    {
        "user": st.one_of(st.none(), st.integers(0, USERS + 1)),
        "n": st.integers(1, 20),
        "session": st.lists(st.integers(0, ITEMS - 1), max_size=2).map(lambda ids: tuple(map(Event, ids))),
        "filters": st.builds(Filters, deny=st.lists(st.integers(0, ITEMS), max_size=5),
                             max_per=st.sampled_from([{}, {"category": 2}])),
    }
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*MODELS]), ASKED, st.floats(0, 1))
def test_a_varied_list_is_made_of_the_best_and_as_long(which, asked, diversity):
    model = MODELS[which]
    plain, varied = answer(model, Request(**asked)), answer(model, Request(**asked, diversity=diversity))
    pool = answer(model, Request(**asked | {"n": POOL * asked["n"]}))
    assert len(varied) == len(plain) and varied.shortfall == plain.shortfall and varied.source == plain.source
    assert {*varied.items} <= {*pool.items} and varied.items[:1] == plain.items[:1]
    of_pool = dict(zip(pool.items, pool.scores))
    assert np.allclose(varied.scores, [of_pool[item] for item in varied.items], atol=1e-5)
    if diversity == 0:
        assert varied == plain


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.floats(0.01, 1))
def test_each_place_is_the_best_by_the_definition(seed, n, diversity):
    rng = np.random.default_rng(seed)
    rows, scores = rng.permutation(ITEMS)[:40], np.sort(rng.normal(size=40))[::-1]
    likeness = Likeness(MODELS["factors"].model(), None)
    places = diversify(rows, scores, n, diversity, likeness)
    alike = likeness.between(rows, rows)
    worth = (scores - scores[-1]) / (scores[0] - scores[-1])
    left, chosen = [*range(40)], []
    for place in places:
        value = [(1 - diversity) * worth[row] - diversity * max(alike[row, chosen], default=0) for row in left]
        assert (1 - diversity) * worth[place] - diversity * max(alike[place, chosen], default=0) >= max(value) - 1e-9
        left.remove(place)
        chosen.append(place)
    assert len({*places}) == len(places) == n


@pytest.mark.parametrize("which", MODELS)
def test_batch_is_as_one_by_one(which):
    recommender = Recommender(MODELS[which])
    users = [*range(USERS), "nobody"]
    for diversity in (0.3, 1):
        many = recommend_many(recommender, users, 7, diversity=diversity)
        assert [ranking.items for ranking in many] == [
            recommender.recommend(user, 7, diversity=diversity).items for user in users
        ]


def test_without_factors_the_category_decides():
    ranking = answer(MODELS["counts"], Request(None, 3, diversity=1))
    kinds = [KINDS[item] for item in ranking.items]
    assert len({*kinds}) == 3 and kinds != [KINDS[item] for item in answer(MODELS["counts"], Request(None, 3)).items]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), "much", True])
def test_what_is_no_share_is_refused(wrong):
    with pytest.raises(ProductRecsError, match="diversity"):
        Request(1, diversity=wrong)


def test_the_request_or_else_the_setting_says(tmp_path):
    publish_board(tmp_path)
    options = {"auth": "off", "log_level": "ERROR", "database_url": "", "models_dir": tmp_path}
    with (
        TestClient(create_app(Settings(**options)), base_url="http://localhost") as plain,
        TestClient(create_app(Settings(**options, diversity=1)), base_url="http://localhost") as varied,
    ):
        ask = lambda client, **query: client.get("/recommend/1", params={"n": 3, **query}).json()["recommendations"]
        post = lambda client, **body: client.post("/recommend", json={"users": [1], "n": 3, **body}).json()["results"][
            0
        ]
        assert ask(plain) == ask(varied, diversity=0) == post(varied, diversity=0)["recommendations"]
        assert (
            ask(plain, diversity=1) == ask(varied) == post(varied)["recommendations"] != ask(plain, diversity=0.0)[::-1]
        )
        for wrong in ("2", "-1", "nan", "x"):
            assert plain.get("/recommend/1", params={"diversity": wrong}).status_code == 422
        explained = plain.get("/explain/1/101", params={"diversity": 1}).json()
        assert explained["rank"] == 1 and explained["recommended"]


def test_the_report_says_what_it_costs():
    "Judged on pairs taken out of the log: NDCG falls, the lists become less alike, and 0 is the list without it."
    rng = np.random.default_rng(0)
    hidden = csr_matrix((LOG.counts.toarray() == 0) * (rng.random((USERS, ITEMS)) < 0.2), dtype=np.float32)
    task = make_task(LOG, hidden, DISCOVERY)
    codes = np.array([-1 if kind is None else ord(kind[0]) - 99 for kind in KINDS])
    price = price_of_diversity(ALS(**SMALL).fit(LOG), task, [0.2, 0.5, 1.0], 10, codes, bootstrap=100)
    assert price.diversity.tolist() == [0, 0.2, 0.5, 1] and price.difference[0] == 0
    assert np.allclose(price.difference, price.ndcg - price.ndcg[0]) and (price.low <= price.high).all()
    assert price.unlike.is_monotonic_increasing and price.unlike.iloc[-1] > price.unlike[0] + 0.05
