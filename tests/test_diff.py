"""Two releases side by side: the same customers, the same door, and what a merchandiser is told."""

import json

import pytest
from support import call, fresh_project, only_the_jobs, train

from product_recs.answer.recommender import open_recommender
from product_recs.bundle.checkerboard import publish_checkerboard
from product_recs.core.ids import id_key
from product_recs.jobs.diff import DiffError, group_changes, release_diff, shared_users


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A project with two models of the sample; the weaker one is live."
    root = fresh_project(tmp_path_factory.mktemp("shop"))
    only_the_jobs(root)
    old = train(root, factors=2)
    (root / "interactions").rename(root / "first")
    new = train(root, factors=16, iterations=6)
    return root, old, new


def test_every_figure_is_that_of_the_lists_that_are_served(shop):
    root, old, new = shop
    with (
        open_recommender(root / "models", version=old) as before,
        open_recommender(root / "models", version=new) as after,
    ):
        diff = release_diff(before, after, n=5)
        for row in diff.users.sample(20, random_state=0).itertuples():
            lists = [[id_key(item) for item in release.recommend(row.user, 5).items] for release in (before, after)]
            assert [row.old, row.new] == lists
            assert row.overlap == len({*lists[0]} & {*lists[1]}) / 5
        served = [item for row in diff.users.itertuples() for item in row.new]
    assert diff.items.new.sum() == len(served) and diff.items.new.to_dict() == {
        key: served.count(key) for key in diff.items.index
    }
    assert 0 < diff.users.overlap.mean() < 1 and diff.facts["asked"] == diff.facts["both"] == len(diff.users)
    changes = group_changes(diff, "category")
    assert changes.old.sum() == pytest.approx(1) and changes.difference.sum() == pytest.approx(0)
    by_hand = diff.items.groupby("category").new.sum() / diff.items.new.sum()
    assert changes.new.to_dict() == pytest.approx(by_hand.to_dict())


def test_a_sample_of_customers_is_the_same_for_the_same_seed(shop):
    root, old, new = shop
    with open_recommender(root / "models", version=old) as a, open_recommender(root / "models", version=new) as b:
        samples = [shared_users(a.model.bundle, b.model.bundle, most=30, seed=seed)[0] for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2] and len(samples[0]) == len(set(samples[0])) == 30


def test_models_of_different_shops_are_refused(tmp_path):
    for name, text in (("numbers", False), ("texts", True)):
        publish_checkerboard(tmp_path / name, text_ids=text)
    with open_recommender(tmp_path / "numbers") as a, open_recommender(tmp_path / "texts") as b:
        with pytest.raises(DiffError, match="no customer in common"):
            release_diff(a, b)
        assert (release_diff(b, b, n=2).users.overlap == 1).all()


def test_the_command_writes_a_page_for_a_phone(shop):
    root, old, new = shop
    done = call(root, "product-recs", "diff", "--quiet", "-n", "5")
    assert done.returncode == 0, done.stderr
    assert "Of 5 places in a list" in done.stdout and "reports/diff/diff.html" in done.stdout
    metrics = json.loads((root / "reports/diff/metrics.json").read_text())["diff"]
    # `train` made the newer one live last; the other is then the newest that is not
    assert {metrics["parameters"]["old"], metrics["parameters"]["new"]} == {old, new}
    page = (root / "reports/diff/diff.html").read_text()
    assert "width=device-width" in page and "Customer" in page and "<script" not in page
    assert "http" not in page.split("<body")[1].replace("http://www.w3.org", "")
    refused = call(root, "product-recs", "diff", "--quiet", "--new", "20200101T000000-00000000")
    assert refused.returncode == 1 and "20200101T000000-00000000" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_without_a_live_model_it_says_what_to_name(tmp_path):
    root = fresh_project(tmp_path)
    only_the_jobs(root)
    done = call(root, "product-recs", "diff", "--quiet")
    assert done.returncode == 1 and "no model is live" in done.stderr and "VERSION" in done.stderr
