"""The index of a very large catalogue, whole: in a bundle, opened, asked, damaged, missing, shared, and killed while it
is built."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import bundle_by_hand, once_today

from product_recs.answer.ladder import Request, answer
from product_recs.answer.recommender import Recommender
from product_recs.answer.rules import Filters
from product_recs.bundle.files import list_versions, publish
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.live import LiveModel
from product_recs.bundle.ready import ReadyModel
from product_recs.core.errors import BundleError
from product_recs.core.events import UserState
from product_recs.core.settings import Settings
from product_recs.inference import recommend_many
from product_recs.search.exact import Searcher
from product_recs.search.index import INDEX_FILE, NearestItems, build_index

ROOT = Path(__file__).resolve().parents[1]
USERS, ITEMS, FACTORS = 800, 20_000, 32
DATA = f"""
import numpy as np
from scipy.sparse import csr_matrix
def data(users={USERS}, items={ITEMS}, factors={FACTORS}):
    rng = np.random.default_rng(0)
    normed = lambda array: (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)
    centres = normed(rng.standard_normal((200, factors)))
    y = normed(centres[rng.integers(200, size=items)] + 0.1 * rng.standard_normal((items, factors)))
    x = normed(centres[rng.integers(200, size=users)] + 0.5 * centres[rng.integers(200, size=users)])
    y[::50] = 0  # nobody has them
    rows = np.repeat(np.arange(users), 20)
    best = np.concatenate([np.argpartition(-(y @ u), 40)[:40][::2] for u in x])
    return x, y, csr_matrix((np.ones(len(rows), np.float32), (rows, best)), shape=(users, items))
"""
exec(DATA)


@pytest.fixture(scope="module")
def parts():
    x, y, seen = data()  # noqa: F821
    seen.sort_indices()
    popularity = np.where(y.any(axis=1), 1 + np.bincount(seen.indices, minlength=ITEMS), 0)
    columns = {
        "popularity": popularity,
        "brand": np.array(["plain", "fine", "rare"], object)[np.minimum(np.arange(ITEMS) % 100, 2)],
        "available": np.arange(ITEMS) % 10 != 3,
    }
    return {
        "user_factors": x,
        "item_factors": y,
        "snapshot": once_today(seen, popularity),
        "users": range(USERS),
        "items": range(ITEMS),
        "user_columns": {"popularity": np.full(USERS, 20)},
        "item_columns": columns,
        "als": {"regularization": 0.1, "alpha": 1.0},
    }


@pytest.fixture(scope="module")
def built(parts):
    return build_index(
        parts["item_factors"],
        parts["item_factors"].any(axis=1),
        parts["user_factors"],
        parts["snapshot"].confidence,
        enough=100_000,
        progress=False,
    )


@pytest.fixture
def models(parts, built, tmp_path):
    bundle_by_hand(tmp_path, **parts, index=built[1], index_data=built[0], version="indexed")
    bundle_by_hand(tmp_path, **parts, index={"missing": "few items"}, version="plain")
    publish(tmp_path, "indexed")
    return tmp_path


@pytest.fixture(scope="module")
def two(parts, built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    bundle_by_hand(folder, **parts, index=built[1], index_data=built[0], version="indexed")
    return [ReadyModel(open_bundle(folder, "indexed"), index).prepare() for index in ("auto", "exact")]


def test_the_measured_recall_is_that_of_the_answers(two, built):
    near, exact = two
    assert isinstance(near.model().search, NearestItems) and isinstance(exact.model().search, Searcher)
    shares = []
    for user in range(USERS):
        mine, right = Recommender(near).recommend(user, 10), Recommender(exact).recommend(user, 10)
        assert len(mine) == 10 and mine.source == "personalised"
        scores = near.model().item_factors[mine.rows] @ near.model().user_factors[user]
        assert np.allclose(mine.scores, scores, rtol=1e-5) and mine.scores == sorted(mine.scores, reverse=True)
        shares.append(len(set(mine.items) & set(right.items)) / 10)
    assert np.mean(shares) >= 0.95 and abs(np.mean(shares) - built[1]["recall_at_10"]) < 0.02
    many = [recommend_many(Recommender(model), range(50)) for model in (near, exact)]
    assert many[0] == many[1]  # many are searched exactly


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.sampled_from([0, 3, 200, 4000]),
    st.sampled_from([0, 100, 3000]),
    st.sampled_from([None, {"brand": ["rare"]}, {"brand": ["fine"]}]),
    st.booleans(),
    st.sampled_from([None, 1, 30]),
)
def test_an_item_that_is_ruled_out_never_comes_and_the_list_is_as_long_as_the_exact_one(
    two, seed, n, denied, gone, include, exclude_seen, allow
):
    near, exact = two
    rng = np.random.default_rng(seed)
    user = int(rng.integers(USERS))
    liked = np.argsort(-(near.model().item_factors @ near.model().user_factors[user]))
    filters = Filters(
        exclude_seen=exclude_seen,
        deny=tuple(liked[:denied].tolist()),
        where=include or {},
        allow=None if allow is None else tuple(rng.permutation(ITEMS)[:allow].tolist()),
    )
    unavailable = frozenset(liked[denied : denied + gone].tolist())
    request = Request(
        user, n, filters=filters, unavailable=unavailable, state=UserState(denied=frozenset(liked[:7].tolist()))
    )
    mine, right = answer(near, request), answer(exact, request)
    assert len(mine) == len(right) and mine.shortfall == right.shortfall and len(set(mine.items)) == len(mine)
    out = (
        set(filters.deny)
        | unavailable
        | set(liked[:7].tolist())
        | (set(near.bundle.history(near.bundle.users.row(user)).items.tolist()) if exclude_seen else set())
    )
    assert not out & set(mine.items)
    assert all(item % 50 and item % 10 != 3 for item in mine.items)
    assert include is None or all(
        item % 100 == 1 if include == {"brand": ["fine"]} else item % 100 >= 2 for item in mine.items
    )
    assert allow is None or set(mine.items) <= set(filters.allow)


def test_a_damaged_index_is_refused_and_the_old_model_goes_on(models, parts, built):
    live = LiveModel(models, lambda bundle: ReadyModel(bundle).prepare())
    live.start()
    live.stop()
    whole = built[0].tobytes()
    for damage, words in (
        (lambda file: file.write_bytes(whole[:-100]), "the copy is incomplete"),
        (lambda file: file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])), "sha256"),
        (lambda file: file.unlink(), "missing"),
    ):
        bundle_by_hand(models, **parts, index=built[1], index_data=built[0], version="next")
        damage(models / "next" / INDEX_FILE)
        (models / "current").write_text("next\n")
        result = live.reload()
        assert result.status == "refused" and words in result.error and INDEX_FILE in result.error
        assert live.version == "indexed" and len(Recommender(live.get()).recommend(3, 10)) == 10
        for file in (models / "next").iterdir():
            file.unlink()
        (models / "next").rmdir()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"IwSq" + bytes(5000)])
def test_what_is_no_index_though_the_manifest_says_so_is_named(models, parts, built, content):
    bundle_by_hand(models, **parts, index=built[1], index_data=np.frombuffer(content, np.uint8), version="rubbish")
    with pytest.raises(BundleError, match=INDEX_FILE):
        ReadyModel(open_bundle(models, "rubbish", verify=True)).prepare()
    assert len(Recommender(ReadyModel(open_bundle(models, "rubbish"), "exact")).recommend(3, 10)) == 10


def test_a_bundle_from_before_there_were_indexes_opens(models):
    manifest = models / "plain" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"index": {\n    "missing": "few items"\n  },\n', ""))
    bundle = open_bundle(models, "plain", verify=True)
    assert "index" not in bundle.manifest and len(Recommender(ReadyModel(bundle)).recommend(3, 10)) == 10
    with pytest.raises(BundleError, match="before there were any.*train with index=approximate"):
        ReadyModel(bundle, "approximate").prepare()


def test_the_setting_of_the_service(models, monkeypatch):
    from fastapi.testclient import TestClient

    from product_recs.api import create_app

    monkeypatch.setenv("PRODUCT_RECS_INDEX", "approximate")
    options = {"models_dir": models, "database_url": "", "auth": "off"}
    with TestClient(create_app(Settings(**options)), base_url="http://localhost") as client:
        approximate = client.get("/recommend/5?n=10").json()["recommendations"]
    with TestClient(create_app(Settings(**options, index="exact")), base_url="http://localhost") as client:
        assert len(set(client.get("/recommend/5?n=10").json()["recommendations"]) & set(approximate)) >= 8
    publish(models, "plain", previous=[])
    with TestClient(create_app(Settings(**options)), base_url="http://localhost") as client:
        ready = client.get("/health/ready")
        assert ready.status_code == 503 and "model plain cannot be used" in ready.text
        refused = client.app.state.service.live.refused.error
        assert "index='approximate', but this model has none (few items)" in refused


def test_threads_share_an_index(two):
    from concurrent.futures import ThreadPoolExecutor

    near, _ = two

    def ask(user):
        return Recommender(near).recommend(user, 10, filters=Filters(deny=range(user)))

    alone = [ask(user) for user in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(200))) == alone


def run(program, **more):
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, **more
    )


def test_without_the_library_everything_is_exact_and_says_how_to_get_it(models):
    program = f"""
import logging, sys
sys.modules["faiss"] = None  # an import of it fails, as where it is not installed
logging.basicConfig()
from product_recs.bundle.opening import open_bundle
from product_recs.core.errors import BundleError, TrainError
from product_recs.bundle.ready import ReadyModel
from product_recs.answer.recommender import Recommender
from product_recs.search.index import build_index, check_index
from product_recs.search.exact import Searcher
bundle = open_bundle({str(models)!r}, "indexed", verify=True)
model = ReadyModel(bundle).prepare()
als, seen = bundle.model(), bundle.snapshot.confidence
assert isinstance(model.model().search, Searcher) and len(Recommender(model).recommend(3, 10)) == 10
possible = als.item_factors.any(axis=1)
found, facts = build_index(als.item_factors, possible, als.user_factors, seen, enough=100_000)
assert found is None and "pip install 'product-recs[index]'" in facts["missing"], facts
prepare = lambda: ReadyModel(bundle, "approximate").prepare()
for call, error in ((prepare, BundleError), (lambda: check_index("approximate"), TrainError)):
    try: call()
    except error as told: assert "pip install 'product-recs[index]'" in str(told)
    else: raise AssertionError
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert "searching exactly. pip install 'product-recs[index]'" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_processes_share_one_mapped_index(models):
    program = f"""
import sys
from product_recs.bundle.opening import open_bundle
from product_recs.answer.recommender import Recommender
from product_recs.bundle.ready import ReadyModel
model = ReadyModel(open_bundle({str(models)!r})).prepare()
print([Recommender(model).recommend(user, 10).items for user in range(20)], flush=True)
sys.stdin.readline()
print(*(line for line in open("/proc/self/maps") if "{INDEX_FILE}" in line), flush=True)
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    lists = [worker.stdout.readline() for worker in workers]  # both have opened it now
    maps = [worker.communicate("\n", timeout=60)[0].split() for worker in workers]
    assert lists[0] == lists[1] and len(eval(lists[0])) == 20
    assert all(line[1] == "r--s" for line in maps)  # read-only and shared: one copy in memory
    assert maps[0][3:5] == maps[1][3:5]  # the same file


def test_a_build_that_is_killed_leaves_no_model(tmp_path):
    program = (
        DATA
        + f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from support import bundle_by_hand, once_today
from product_recs.search.index import build_index
x, y, seen = data(300, 300_000)
print("building", flush=True)
found, facts = build_index(y, y.any(axis=1), x, seen, index="approximate")
bundle_by_hand(Path({str(tmp_path)!r}), user_factors=x, item_factors=y, snapshot=once_today(seen), users=range(300),
               items=range(300_000), index=facts, index_data=found)
print("written")
"""
    )
    worker = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "building\n"
    time.sleep(0.3)
    os.kill(worker.pid, signal.SIGKILL)
    assert "written" not in worker.communicate(timeout=60)[0]
    assert list_versions(tmp_path) == [] and list(tmp_path.iterdir()) == []
