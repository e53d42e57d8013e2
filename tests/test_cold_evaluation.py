"""The evaluation of products without buyers and of people without a past: right by hand, and blind to the future."""

import json

import numpy as np
import pandas as pd
import pytest
from support import call, fresh_project, only_the_jobs

from product_recs.core.errors import EvaluateError
from product_recs.data.tasks import BY_USER
from product_recs.evaluation.cold import (
    CATALOGUE,
    EVENTS,
    IN_BAND,
    NEW_ITEMS,
    NEW_USERS,
    PLACES,
    SOLD,
    catalogue_past,
    cold_verdicts,
    described,
    evaluate_cold,
    judge_guests,
)
from product_recs.features import build_features
from product_recs.ingest import ingest
from product_recs.models.als import ALS
from product_recs.models.baselines import Popularity
from product_recs.models.interface import Model

SPLIT = {"validation_from": "2026-02-01", "test_from": "2026-03-01"}


class SameColour(Model):
    "An item scores the share of the user's items that have its colour; of equals the lower row."

    name, places_items = "same colour", True

    def _fit(self, snapshot):
        colours = np.array([str(value) for value in snapshot.item_columns["colour"]])
        self.alike = (colours[:, None] == colours).astype(np.float32)
        self.candidates = np.ones(len(colours), bool)
        self.seen = snapshot

    def scores(self, representations):
        histories = representations.matrix(np.ones_like(representations.confidence), len(self.alike))
        return np.asarray(histories @ self.alike, np.float32) / np.maximum(np.diff(representations.indptr), 1)[:, None]


def rows(*given):
    "user, item, day of the year; one purchase each."
    table = pd.DataFrame(given, columns=["user_id", "item_id", "day"])
    times = pd.Timestamp("2026-01-01") + pd.to_timedelta(table.pop("day"), unit="D")
    return table.assign(event="purchase", timestamp=times.dt.strftime("%Y-%m-%dT%H:%M:%S"))


def features_of(folder, log, products=None, users=None, **parameters):
    folder.mkdir(parents=True, exist_ok=True)
    files = {"log": log, "products": products, "users": users}
    for name, table in files.items():
        if table is not None:
            table.to_csv(folder / f"{name}.csv", index=False)
    paths = {name: folder / f"{name}.csv" for name in ("products", "users") if files[name] is not None}
    ingest(folder / "log.csv", folder / "run", progress=False, **paths)
    return build_features(folder / "run", folder / "features", **(SPLIT | parameters))


PRODUCTS = pd.DataFrame({"item_id": [1, 2, 3, 4, 5, 6], "colour": ["red", "blue", "red", "blue", "red", "blue"]})
# before the split item 1 has two buyers, 2 has two; 3 and 4 are first sold after it; 5 and 6 never
TINY = rows(
    *[(11, 1, 5), (12, 1, 6), (13, 2, 7), (14, 2, 8), (14, 2, 35)],
    *[(11, 3, 70), (12, 4, 71), (13, 4, 72), (13, 1, 73), (99, 3, 74)],
)


def test_ranks_by_hand(tmp_path):
    features = features_of(tmp_path, TINY, PRODUCTS)
    past, future, _ = catalogue_past(features)
    assert past.counts.shape[1] == future.shape[1] == 6 and past.popularity.tolist() == [2, 2, 0, 0, 0, 0]
    cold = evaluate_cold(features, [SameColour()], bootstrap=20, progress=False)
    new = cold.table[(cold.table.part == NEW_ITEMS) & (cold.table.model == "same colour")]
    sold = new[new.group == SOLD].set_index(["metric", "k"])
    new = new[new.group == "all"].set_index(["metric", "k"])
    assert set(new.users) == {3} and set(new.targets) == {3} and set(new.candidates) == {4}  # 99 has no past
    # candidates 3 4 5 6: user 11 (red) ranks 3 5 4 6, user 12 (red) the same and wanted 4, user 13 (blue) 4 6 3 5
    assert new.value["recall", 50] == 1 and np.isclose(new.value["ndcg", 20], (1 + 1 / np.log2(4) + 1) / 3)
    # candidates 3 4: user 12 has 4 second, the others what they wanted first
    assert set(sold.candidates) == {2} and np.isclose(sold.value["ndcg", 20], (1 + 1 / np.log2(3) + 1) / 3)
    # the whole catalogue without what each has: user 12 gets 3 5 2 4 6, user 13 gets 4 6 1 3 5
    places = {user: 1 / np.log2(1 + place) for user, place in {11: 1, 12: 4, 13: 1}.items()}
    assert np.isclose(cold.value(CATALOGUE, "0", "same colour", "ndcg", 20), np.mean(list(places.values())))
    assert np.isclose(cold.value(CATALOGUE, "1 to 5", "same colour", "ndcg", 20), 1 / np.log2(1 + 3))
    assert np.isclose(cold.value(CATALOGUE, "0", "same colour", PLACES, 20), 4 / 5)
    # among items with 1 to 5 buyers only item 1 is left for user 13
    assert cold.value(IN_BAND, "1 to 5", "same colour", "ndcg", 20) == 1
    assert cold.value(NEW_ITEMS, "all", "popularity", "hit_rate", 20) == 0


def test_only_the_products_of_the_log_are_candidates_on_request(tmp_path):
    features = features_of(tmp_path, TINY, PRODUCTS)
    cold = evaluate_cold(features, [SameColour()], never_sold=False, bootstrap=5, progress=False)
    assert set(cold.table[cold.table.part == NEW_ITEMS].candidates) == {2}
    figures = [cold.value(NEW_ITEMS, "all", "same colour", "ndcg", 20), (1 + 1 / np.log2(3) + 1) / 3]
    assert np.isclose(*figures)


def shop(seed=0, users=60, items=40):
    "Everybody buys one colour; a fifth of the items comes after the split, some are never sold."
    rng = np.random.default_rng(seed)
    table = []
    for user in range(users):
        for day in rng.uniform(0, 90, 30):
            sold = items if day > 59 else items * 4 // 5
            alike = [item for item in range(sold) if item % 3 == user % 3 or rng.random() < 0.1]
            table.append((user + 100, rng.choice(alike) + 1, day))
    # two thirds of the items have a taste too
    products = pd.DataFrame({"item_id": np.arange(1, items + 6)})
    products["colour"] = np.array(["red", "green", "blue"])[(products.item_id - 1) % 3]
    people = pd.DataFrame({"user_id": np.arange(users) + 100, "taste": np.arange(users) % 3})
    return rows(*table), products, people


def test_nothing_after_the_split_changes_a_fit_or_a_list(tmp_path):
    "Other rows after the split, new users and new items among them: every score of the past stays what it was."
    log, products, people = shop()
    before = log[log.timestamp < SPLIT["test_from"]]
    rng = np.random.default_rng(1)
    people_later, items_later = rng.integers(100, 190, 900).tolist(), rng.integers(1, 46, 900).tolist()
    other = rows(*zip(people_later, items_later, 60 + rng.uniform(0, 29, 900)))
    scores = []
    for name, later in (("one", log[log.timestamp >= SPLIT["test_from"]]), ("two", other)):
        features = features_of(tmp_path / name, pd.concat([before, later]), products, people)
        past, _, _ = catalogue_past(features)
        assert not {"popularity", "first_seen", "last_seen"} & {*past.item_columns, *past.user_columns}
        known = np.flatnonzero(np.diff(past.counts.indptr))
        people_of = features.users.ids[known]
        never = pd.read_parquet(features.cold_items).item_id if features.cold_items else []
        catalogue = [*features.items.ids, *never]
        assert sorted(catalogue) == list(range(1, 46))
        of_models = []
        for model in (SameColour(), ALS(factors=6, num_threads=1)):
            fitted = model.fit(past)
            of_models.append(pd.DataFrame(fitted.scores(fitted.users(known)), people_of, catalogue).sort_index(axis=1))
        scores.append(of_models)
    for first, second in zip(*scores):
        assert first.index.equals(second.index)
        assert np.allclose(first, second, atol=1e-5)


def test_people_are_taken_out_of_the_past_before_a_fit(tmp_path):
    log, products, people = shop()
    features = features_of(tmp_path, log, products, people)
    past, _, since = catalogue_past(features)
    spy = SameColour()
    fitted = []
    spy.fit = lambda snapshot: fitted.append(snapshot) or SameColour.fit(SameColour(), snapshot)
    cold = judge_guests(features, past, since, [spy], guests=7, bootstrap=5, events=(0, 1, 3))
    [seen] = fitted
    gone = (np.diff(past.counts.indptr) > 0) & (np.diff(seen.counts.indptr) == 0)
    assert gone.sum() == 7 and seen.counts.nnz < past.counts.nnz and "7 had a past" in cold.notes[0]
    assert set(cold.table.users) == {7} and cold.groups(NEW_USERS) == ["0", "1", "3"]
    rest = ~gone
    assert (seen.counts[rest] != past.counts[rest]).nnz == 0


def test_parameters_are_chosen_without_the_test_period(tmp_path):
    "The validation period ends where the test period begins, also for people whose events are read one by one."
    log, products, people = shop()
    cut = log[log.timestamp < SPLIT["test_from"]]
    last = pd.concat([cut, rows((100, 1, 59.9), (100, 2, 61))])  # the period needs an end
    tables = []
    for name, table in (("whole", log), ("cut", last)):
        features = features_of(tmp_path / name, table, products, people)
        judged = evaluate_cold(
            features, [SameColour()], period="validation", events=(0, 1), bootstrap=5, never_sold=False, progress=False
        )
        tables.append(judged.table[(judged.table.part == NEW_USERS) & (judged.table.model == "popularity")])
    assert len(tables[0]) and tables[0].targets.max() == tables[1].targets.max()


def test_guests_by_the_events_that_are_known(tmp_path):
    "One event tells the colour, so the figure rises from none to one; attributes tell it without any."
    log, products, people = shop()
    features = features_of(tmp_path, log, products, people)
    cold = evaluate_cold(features, [SameColour()], guests=30, bootstrap=50, events=(0, 1, 3), progress=False)
    figure = lambda model, known: cold.value(NEW_USERS, known, model, "ndcg", 20)
    assert figure("same colour", "0") == figure("popularity", "0") == figure("popularity", "3")
    assert figure("same colour", "1") > 1.2 * figure("popularity", "1")
    # too few of a kind: 60 users, 12 taken out
    assert figure("popularity in the segment", "0") == figure("popularity", "0")
    said = cold_verdicts(cold, "same colour", ["popularity"])
    assert any(figures["group"] == "1" and figures["low"] > 0 for _, figures in said)


def test_the_same_seed_gives_the_same_figures(tmp_path):
    log, products, people = shop(users=30)
    features = features_of(tmp_path, log, products, people)
    first, second = (evaluate_cold(features, [SameColour()], bootstrap=5, progress=False, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first.table, second.table)
    assert first.notes == second.notes
    other = evaluate_cold(features, [SameColour()], bootstrap=5, progress=False, seed=4)
    assert not other.table.value.equals(first.table.value)


def test_a_log_without_a_products_file_says_what_is_missing(tmp_path):
    features = features_of(tmp_path, shop()[0])
    cold = evaluate_cold(features, [ALS(factors=4, num_threads=1)], bootstrap=5, progress=False)
    assert NEW_ITEMS not in set(cold.table.part) and "0" not in cold.groups(CATALOGUE)
    assert "Give 01_ingest a products file" in cold.notes[0]
    assert {IN_BAND, CATALOGUE, NEW_USERS} == set(cold.table.part) and set(cold.table.model) == {"popularity", "ALS"}


def test_a_hold_out_by_user_judges_bands_only(tmp_path):
    log, products, _ = shop()
    features = features_of(tmp_path, log.drop(columns="timestamp"), products, **dict.fromkeys(SPLIT, ""), split="user")
    cold = evaluate_cold(features, [SameColour()], bootstrap=5, progress=False)
    assert set(cold.table.part) == {IN_BAND, CATALOGUE} and cold.facts["split"] == BY_USER
    assert sum("hidden by user" in note for note in cold.notes) == 2


def test_hardly_anybody_stays_for_long(tmp_path):
    "Where nobody has more than ten events after the split, shorter sessions are judged and a note says so."
    log, products, people = shop()
    later = log.timestamp >= SPLIT["test_from"]
    few = pd.concat([log[~later], log[later].groupby("user_id").head(5)])
    cold = evaluate_cold(features_of(tmp_path, few, products, people), [], bootstrap=5, progress=False)
    assert cold.groups(NEW_USERS) == ["0", "1", "3"] and any("Hardly anybody" in note for note in cold.notes)
    assert EVENTS[-1] == 10


def test_models_need_names_of_their_own(tmp_path):
    features = features_of(tmp_path, TINY, PRODUCTS)
    with pytest.raises(EvaluateError, match="names of their own"):
        evaluate_cold(features, [Popularity(), Popularity()], progress=False)
    assert described(catalogue_past(features)[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("products", [True, False])
def test_the_job_judges_the_cold_where_there_are_attributes(tmp_path, products):
    root = fresh_project(tmp_path / "project")
    only_the_jobs(root)
    log, table, people = shop()
    log.to_csv(root / "log.csv", index=False)
    table.to_csv(root / "things.csv", index=False)
    source = ["-p", "source", "log.csv", *(["-p", "products", "things.csv"] if products else [])]
    small = ["-p", "factors", "8", "-p", "iterations", "3", "-p", "bootstrap", "50", "-p", "candidates", "ALS"]
    split = [word for name, moment in SPLIT.items() for word in ("-p", name, moment)]
    done = call(root, "product-recs", "run", "--name", "shop", "--quiet", *source, *small, *split, "-p", "models",
                "popularity, ALS", "-p", "habits", "false")  # fmt: skip
    assert done.returncode in (0, 3), done.stderr + done.stdout
    report = root / "reports/shop"
    metrics = json.loads((report / "metrics.json").read_text())["04_evaluate"]
    assert metrics["parameters"]["cold"] == "auto"
    if not products:
        assert not (report / "cold.csv").exists() and "products file" in metrics["cold"]["notes"][0]
        return
    judged = pd.read_csv(report / "cold.csv", keep_default_na=False)
    assert set(judged.part) == {NEW_ITEMS, IN_BAND, CATALOGUE, NEW_USERS} and metrics["cold"]["comparisons"]
    page = (report / "04_evaluate.html").read_text()
    assert "New products, NDCG@20" in page and "In the whole catalogue: who shows them at all?" in page
    assert '<div class="failed">' not in page
