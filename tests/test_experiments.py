"""Experiments: who is in which arm, two models in one service, the same lists in a batch, and figures that hold."""

import itertools
import json
import subprocess
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import duckdb
import numpy as np
import pytest
from support import (
    BIN, ROOT, Server, both, bundle_by_hand, call, new_database, once_today, publish_board, start_postgres, until,
)  # fmt: skip

from product_recs.answer import explore
from product_recs.answer.experiments import experiments_of, read_experiments, versions_in_use
from product_recs.bundle.files import publish
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.documents import read_yaml
from product_recs.core.settings import Settings
from product_recs.feedback.records import Impression, NewEvent
from product_recs.feedback.store import Store
from product_recs.jobs.batch import Question, open_arms, open_for_batch, write_batch
from product_recs.jobs.experiment import (
    Metric,
    NoOutcome,
    evaluate_trial,
    explored_places,
    trial_sentences,
    user_outcomes,
    value_of_choice,
)
from product_recs.jobs.lift import Group, all_looks, compare, ratio_p_of_all_looks, simulate_looks
from product_recs.web.monitor import Metrics
from product_recs.web.service import Service

NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
USERS = range(1, 25)


def two_models(folder):
    "The live model, and an older one that lists the items of the other taste; both know the same users."
    users, items = range(1, 25), range(101, 125)
    taste = np.arange(24) % 2
    factors, seen = np.eye(2, dtype=np.float32)[taste], np.zeros((24, 24), np.float32)
    seen[np.arange(24), (np.arange(24) + 2) % 24] = 1
    snapshot = once_today(seen, seen.sum(0).astype(np.int32))
    columns = {"popularity": seen.sum(0).astype(np.int32)}
    turned = bundle_by_hand(
        folder / "models",
        user_factors=factors[:, ::-1],
        item_factors=factors,
        snapshot=snapshot,
        users=users,
        items=items,
        item_columns=columns,
        version="other",
    )
    live = publish_board(folder / "models", version="mine")
    return live.name, turned.name


def write(folder, text):
    (folder / "experiments.yaml").write_text(text)
    return folder / "experiments.yaml"


HALVES = """
experiments:
  - name: taste
    arms:
      - {name: control, share: 0.5}
      - {name: other, share: 0.5, model: %s}
"""


def arm_of(headers):
    return headers.get("x-recommendation-experiment")


# --- assignment


def test_shares_are_those_of_the_file_for_any_kind_of_id():
    book = read_experiments(
        read_yaml(
            "experiments: [{name: a, users: [0, 0.5], arms: [{name: x, share: 0.2}, {name: y, share: 0.6}]}, "
            "{name: b, users: [0.5, 1], arms: [{name: z, share: 1}]}]",
            "x",
        )
    )
    for ids in (range(30_000), [f"user-{k}" for k in range(30_000)]):
        counts = Counter(arm and arm.label for arm in (book.arm_of(id, NOON) for id in ids))
        for label, share in (("a=x", 0.1), ("a=y", 0.3), ("b=z", 0.5), (None, 0.1)):
            assert abs(counts[label] / 30_000 - share) < 5 * (share * (1 - share) / 30_000) ** 0.5, (label, counts)


def test_another_process_deals_the_same(tmp_path):
    file = write(tmp_path, HALVES % "live")
    book = experiments_of(file)
    expected = [book.arm_of(user, NOON).name for user in range(200)]
    command = [str(BIN / "product-recs"), "experiment", "assign", "--file", str(file), "--json"]
    run = subprocess.run([*command, *map(str, range(200))], capture_output=True, text=True, check=True, cwd=ROOT)
    assert [row["arm"] for row in json.loads(run.stdout)] == expected and {*expected} == {"control", "other"}


def test_growing_and_reordering_moves_nobody_who_was_in():
    def arms(text):
        book = read_experiments(read_yaml(f"experiments: [{{name: a, arms: [{text}]}}]", "x"))
        return [(arm := book.arm_of(user, NOON)) and arm.name for user in range(5000)]

    small = arms("{name: x, share: 0.1}, {name: y, share: 0.1}")
    assert arms("{name: y, share: 0.1}, {name: x, share: 0.1}") == small
    large = arms("{name: x, share: 0.4}, {name: y, share: 0.4}")
    assert all(now == before for before, now in zip(small, large) if before)


# --- the service


@pytest.mark.parametrize("workers", [2])
def test_two_workers_answer_each_user_by_their_arm(tmp_path, url, workers):
    "Header, impression, log, explanation, many users at once; and the batch has the same lists."
    live, other = two_models(tmp_path)
    file = write(tmp_path, HALVES % other)
    settings = {"database_url": url, "experiments_file": file, "watch_seconds": 0.1}
    lists, labels = {}, {}
    with Server(tmp_path, tmp_path / "models", workers=workers, **settings) as server:
        events = [{"user_id": 3, "item_id": 103}, {"user_id": 4, "item_id": 104}]
        assert server.ask("POST", "/events", {"events": events})[0] == 200
        for user in USERS:
            for _, headers, body in [*both(server, f"/recommend/{user}?n=4"), *both(server, f"/recommend/{user}?n=4")]:
                assert lists.setdefault(user, body["recommendations"]) == body["recommendations"]
                assert labels.setdefault(user, arm_of(headers)) == arm_of(headers)
                assert headers["x-model-version"] == (other if arm_of(headers) == "taste=other" else live)
            explained = server.get(f"/explain/{user}/{lists[user][0]}")
            assert arm_of(explained[1]) == labels[user] and explained[2]["rank"] == 1
        assert {*labels.values()} == {"taste=control", "taste=other"}
        status, headers, body = server.ask("POST", "/recommend", {"users": [*USERS], "n": 4})
        assert status == 200 and {*arm_of(headers).split(",")} == {*labels.values()}
        assert [result["recommendations"] for result in body["results"]] == [*lists.values()]
        assert [result["experiment"] for result in body["results"]] == [*labels.values()]
        guest = server.ask("POST", "/recommend", {"n": 4})
        assert arm_of(guest[1]) is None and "experiment" not in guest[2]["results"][0]
        assert arm_of(server.get("/similar/101")[1]) is None
        logged = [line["experiment"] for line in server.lines() if line["route"] == "/recommend/{user_id}"]
        assert {*logged} == {*labels.values()}
    with Store(url).open() as store:
        shown = [impression for impression in store.impressions(10_000) if impression.user_id is not None]
        assert {impression.user_id: f"{impression.experiment}={impression.arm}" for impression in shown} == {
            str(user): label for user, label in labels.items()
        }
        assert {(impression.arm, impression.model_version) for impression in shown} == {
            ("control", live),
            ("other", other),
        }
    with (
        open_for_batch(tmp_path / "models", feedback=url) as recommender,
        open_arms(recommender, file, tmp_path / "models", url) as arms,
    ):
        write_batch(recommender, Question(n=4, arms=arms), tmp_path / "lists", [*USERS], part=7, progress=False)
    query = f"SELECT user_id, item_id, experiment || '=' || arm FROM '{tmp_path}/lists/*.parquet'"
    rows = duckdb.execute(query).fetchall()
    for user in USERS:
        assert [item for person, item, _ in rows if person == user] == lists[user]
        assert {label for person, _, label in rows if person == user} == {labels[user]}


def test_a_model_that_breaks_fails_no_request(tmp_path):
    "Missing, then there, then broken in the file; the arm says so on the health route, in the log and the gauge."
    live, other = two_models(tmp_path)
    (tmp_path / "models" / other).rename(tmp_path / "elsewhere")
    file = write(tmp_path, HALVES % other)

    def state(server):
        ready = server.get("/health/ready")[2].get("experiments")
        [experiment] = server.get("/model")[2]["experiments"]["experiments"]
        return ready, [arm["answers_from_live_because"] for arm in experiment["arms"]]

    def gauge(server):
        text, name = server.get("/metrics")[2].decode(), "product_recs_experiment_arms_on_live_model "
        return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])

    def ask():
        answers = {}
        for user in USERS:
            status, headers, _ = server.get(f"/recommend/{user}")
            assert status == 200
            answers[user] = arm_of(headers), headers["x-model-version"]
        return answers

    with Server(tmp_path, tmp_path / "models", experiments_file=file, watch_seconds=0.05) as server:
        fallen = ask()
        assert {version for _, version in fallen.values()} == {live} and len({*fallen.values()}) == 2
        ready, why = state(server)
        assert ready == "1 arm answered by the live model" and why[0] is None and f"no version {other}" in why[1]
        until(lambda: gauge(server) == 1)
        (tmp_path / "elsewhere").rename(tmp_path / "models" / other)
        until(lambda: state(server) == (None, [None, None]))
        good = ask()
        assert {version for _, version in good.values()} == {live, other}
        assert {user: arm for user, (arm, _) in good.items()} == {user: arm for user, (arm, _) in fallen.items()}
        file.write_text(HALVES.replace("share", "shaer") % other)
        until(lambda: "did you mean 'share'" in (server.get("/model")[2]["experiments"]["error"] or ""))
        assert ask() == good
        write(tmp_path, HALVES % "live" + "    end: 2020-01-01\n")
        until(lambda: arm_of(server.get("/recommend/1")[1]) is None)
        assert {arm for arm, _ in ask().values()} == {None}
        publish(tmp_path / "models", other)
        until(lambda: server.get("/recommend/1")[1]["x-model-version"] == other)
        assert "answers from the live model" in server.stderr.read_text()
    assert versions_in_use(experiments_of(write(tmp_path, HALVES % live)), tmp_path / "models") == {live, other}


def test_what_an_arm_says_counts_where_the_request_is_silent(tmp_path):
    "A task that no model answers is not heeded, and fails nobody."
    two_models(tmp_path)
    text = "experiments: [{name: t, arms: [{name: next, share: 0.5, task: next_purchase}, {name: d, share: 0.5, %s}]}]"
    file = write(tmp_path, text % "diversity: 1")
    with Server(tmp_path, tmp_path / "models", experiments_file=file, watch_seconds=0.05) as server:
        answers = {user: server.get(f"/recommend/{user}?n=5") for user in USERS}
        assert {status for status, _, _ in answers.values()} == {200}
        for user, (_, headers, body) in answers.items():
            varied = 1 if arm_of(headers) == "t=d" else 0
            plain = server.get(f"/recommend/{user}?n=5&diversity={varied}")[2]
            assert plain["recommendations"] == body["recommendations"]
        assert server.get("/health/ready")[2]["experiments"] == "1 arm answered by the live model"


def test_what_the_model_of_an_arm_cannot_do_the_live_model_does(tmp_path):
    "A task and a column that the older model does not have; what the live model refuses is refused to everybody."
    _, other = two_models(tmp_path)
    publish_board(tmp_path / "models", version="new", models=lambda model: {DISCOVERY: model, NEXT_PURCHASE: model})
    file, even = write(tmp_path, HALVES % other), {"where": {"category": ["even"]}}
    with Server(tmp_path, tmp_path / "models", experiments_file=file, watch_seconds=0.05) as server:
        first = {user: server.get(f"/recommend/{user}") for user in USERS}
        assert {headers["x-model-version"] for _, headers, _ in first.values()} == {"new", other}
        for user, (_, headers, _) in first.items():
            for _ in range(2):
                status, fields, _ = server.get(f"/recommend/{user}?task=next_purchase")
                assert (status, fields["x-model-version"], arm_of(fields)) == (200, "new", arm_of(headers))
            assert server.get(f"/explain/{user}/101?task=next_purchase")[0] == 200
            assert server.get(f"/new?user_id={user}&category=even")[0] == 200
            assert server.get(f"/new?user_id={user}&category=blue")[0] == server.get("/new?category=blue")[0]
            assert server.get(f"/recommend/{user}")[1]["x-model-version"] == headers["x-model-version"]
        _, _, body = server.ask("POST", "/recommend", {"users": [*USERS], "filters": even})
        assert [result["user_id"] for result in body["results"]] == [*USERS]
        for result in body["results"]:
            assert result["model_version"] == "new" and {item % 2 for item in result["recommendations"]} == {1}
            assert result["experiment"] == arm_of(first[result["user_id"]][1])
        _, headers, body = server.ask("POST", "/recommend", {"users": [*USERS]})
        assert [result["recommendations"] for result in body["results"]] == [
            answer["recommendations"] for _, _, answer in first.values()
        ]
        assert {*headers["x-model-version"].split(",")} == {"new", other}
        unknown = {"users": [*USERS], "filters": {"where": {"colour": ["red"]}}}
        assert server.ask("POST", "/recommend", unknown)[0] == 422
        bought = [server.get(f"/recommend/{user}?n=4&task=next_purchase")[2]["recommendations"] for user in USERS]
    question = Question(n=4, task=NEXT_PURCHASE)
    with (
        open_for_batch(tmp_path / "models", feedback="") as recommender,
        open_arms(recommender, file, tmp_path / "models", "", ["task"], question=question) as arms,
    ):
        made = write_batch(recommender, replace(question, arms=arms), tmp_path / "lists", [*USERS], progress=False)
    assert made.manifest["experiments"]["taste=other"]["model_version"] == "new"
    query = f"SELECT user_id, item_id FROM '{tmp_path}/lists/*.parquet' ORDER BY user_id, rank"
    rows = duckdb.execute(query).fetchall()
    assert [[item for person, item in rows if person == user] for user in USERS] == bought


def test_an_arm_answers_nobody_before_it_knows_who_is_forgotten(tmp_path, postgres):
    "The database goes away, then the experiment starts; the live model knows who is forgotten, and answers."
    live, other = two_models(tmp_path)
    file = write(tmp_path, "experiments: []")
    settings = Settings(
        models_dir=tmp_path / "models",
        database_url=new_database(postgres),
        experiments_file=str(file),
        watch_seconds=0.05,
    )
    service = Service(settings).start()
    try:
        for user in USERS:
            service.desk.store.forget(user)
        until(lambda: all((state := service.desk.view.look(user)) and state.forgotten for user in USERS))
        postgres.stop()
        try:
            write(tmp_path, HALVES % other)
            until(lambda: service.arms.opened)
            served = {user: service.answers.served(user) for user in USERS}
            assert {serving.arm.name for serving in served.values()} == {"control", "other"}
            assert {serving.model.bundle.version for serving in served.values()} == {live}
            assert all(serving.view.look(user).forgotten for user, serving in served.items())
        finally:
            start_postgres(postgres)
        until(lambda: {service.answers.served(user).model.bundle.version for user in USERS} == {live, other})
        assert all(service.answers.served(user).view.look(user).forgotten for user in USERS)
    finally:
        service.stop()


def test_what_exploration_needs_is_there_before_a_renewed_model_answers(tmp_path):
    "An arm explores, the settings do not; the shop tells of a product, and no request computes what is new then."
    two_models(tmp_path)
    file = write(tmp_path, "experiments: [{name: e, arms: [{name: curious, share: 1, explore: 0.3}]}]")
    url = f"sqlite:///{tmp_path}/feedback.db"
    service = Service(
        Settings(models_dir=tmp_path / "models", database_url=url, experiments_file=str(file), watch_seconds=0.05)
    ).start()
    try:
        before = service.live.get()
        service.desk.store.set_products({900: {"title": "Dark roast"}})
        until(lambda: service.live.get() is not before)
        for model in service.models:
            assert all(asked in explore._KEPT for asked in model.answering.values())
    finally:
        service.stop()


# --- the report


def fill(store, rates, daily=40, days=15, seed=0, lose=0.0):
    "An experiment in the store whose truth is known; of arm b a part of the users may be missing."
    rng, shown, events = np.random.default_rng(seed), [], []
    numbers = itertools.count()
    for day, (arm, rate), _ in itertools.product(range(days), rates.items(), range(daily)):
        user, moment = next(numbers), NOON + timedelta(days=day, seconds=int(rng.integers(0, 40_000)))
        if arm == "b" and rng.random() < lose:
            continue
        shown.append(
            Impression(f"r{user}", user, f"v{arm}", "popular", (1, 2), moment, None, None, "discovery", "e", arm)
        )
        if rng.random() < rate:
            events.append(NewEvent(user, 2, timestamp=moment + timedelta(hours=2)))
        if rng.random() < 0.3:
            events.append(NewEvent(user, 3, timestamp=moment + timedelta(hours=3)))  # it was not shown
            events.append(NewEvent(user, 2, timestamp=moment - timedelta(hours=3)))  # before it was shown
            events.append(NewEvent(user, 1, timestamp=moment + timedelta(days=9)))  # too late
    store.add_impressions(shown)
    store.add_events(events)
    return events


def test_outcomes_of_the_store_are_counted_once_and_a_planted_lift_is_found(url):
    with Store(url).open() as store:
        events = fill(store, {"a": 0.1, "b": 0.3})
        until_then = NOON + timedelta(days=60)
        measured = [Metric.of("users: purchase"), Metric.of("events: purchase")]
        users = user_outcomes(store, "e", measured, 7, until=until_then)
        shown = {impression.user_id: impression for impression in store.impressions(10_000)}
        counted = {event.user_id for event in events if timedelta(hours=1) <
                   event.timestamp - shown[event.user_id].shown_at < timedelta(hours=2, seconds=1)}
        assert {*users.index[users["users with a purchase"] == 1]} == counted and len(users) == 1200
        assert users["purchases a user"].sum() == len(counted)
        trial = evaluate_trial("e", users, {"a": 1, "b": 1}, "a", measured, until=until_then)
        assert trial_sentences(trial)[0].startswith("`b` is better than `a` in users with a purchase")
        assert {check.level for check in trial.checks} == {"fine"}
        with pytest.raises(NoOutcome, match="'f'"):
            user_outcomes(store, "f", measured)


def test_users_that_one_arm_loses_are_noticed(tmp_path):
    with Store(f"sqlite:///{tmp_path}/feedback.db").open() as store:
        fill(store, {"a": 0.2, "b": 0.2}, lose=0.35)
        users = user_outcomes(store, "e", [Metric("purchase")], until=NOON + timedelta(days=60))
    trial = evaluate_trial("e", users, {"a": 0.5, "b": 0.5}, "a", [Metric("purchase")], until=NOON + timedelta(days=60))
    assert trial.checks[0].level == "stop" and trial_sentences(trial)[0].startswith("Nothing may be concluded")


def test_explored_places_come_back_with_chance_and_outcome(url):
    with Store(url).open() as store:
        facts = ("v", "personalised", (1, 2), NOON)
        chances = {2: 0.25}, None, "discovery"
        store.add_impressions([Impression(f"r{user}", user, *facts, *chances) for user in range(300)])
        store.add_impressions([Impression("again", 0, *facts, *chances), Impression("plain", 1, *facts)])
        store.add_events([NewEvent(user, 2, timestamp=NOON + timedelta(days=1)) for user in range(0, 300, 3)])
        places = explored_places(store, until=NOON + timedelta(days=30))
    assert len(places) == 300 and set(places.propensity) == {0.25} and places.outcome.sum() == 100
    good = value_of_choice(places, {str(user): ["2"] for user in range(0, 300, 2)})
    assert good.places == 150 and good.low < 1 / 3 < good.high and good.effective == pytest.approx(150)
    assert "effective sample size is 3" in value_of_choice(places, {"0": ["2"], "3": ["2"], "6": ["2"]}).refused


@pytest.mark.slow
def test_the_report_runs_as_a_job_and_its_exit_code_says_what_it_found(tmp_path):
    url = f"sqlite:///{tmp_path}/feedback.db"
    with Store(url).open() as store:
        fill(store, {"control": 0.1, "other": 0.3})
    file = write(tmp_path, "experiments: [{name: e, arms: [{name: control, share: 0.5}, {name: other, share: 0.5}]}]")
    command = ["product-recs", "experiment", "report", "e", "--file", str(file), "--quiet"]
    given = ["-p", "feedback", url, "-p", "until", "2026-06-01"]
    run = call(ROOT, *command, *given)
    assert run.returncode == 0 and "`other` is better than `control`" in run.stdout, run.stderr
    lost = write(tmp_path, "experiments: [{name: e, arms: [{name: control, share: 0.8}, {name: other, share: 0.2}]}]")
    run = call(ROOT, *command[:5], str(lost), "--quiet", *given)
    assert run.returncode == 4 and "Nothing may be concluded" in run.stdout, run.stderr


# --- the figures


def test_looking_every_day_finds_nothing_where_nothing_is():
    "500 A/A experiments, looked at daily; the usual interval shows why that matters."
    quiet = simulate_looks([0.1, 0.1], runs=500, days=28)
    assert quiet["always"].any(1).mean() <= 0.05 and quiet["holds"].all(1).mean() >= 0.95
    assert quiet["once"].any(1).mean() > 0.15


def test_a_planted_lift_is_found_and_the_band_holds_the_truth_on_all_days():
    planted = simulate_looks([0.1, 0.12], runs=500, days=100, planned=15_000, seed=1)
    assert planted["always"].any(1).mean() > 0.85 and planted["holds"].all(1).mean() >= 0.95


def test_numbers_a_user_with_a_long_tail_hold_too():
    "Purchases a user: many have none, a few have many."
    rng, wrong, runs = np.random.default_rng(2), 0, 300
    for _ in range(runs):
        values = [rng.negative_binomial(0.15, 0.15 / 0.35, (28, 100)) for _ in range(2)]
        sums = [(value.sum(1).cumsum(), (value**2).sum(1).cumsum()) for value in values]
        users = 100 * np.arange(1, 29)
        days = compare(*(Group.of_sums(users, *pair) for pair in sums), all_looks(2 * users))
        wrong += bool(((days.low > 0) | (days.high < 0)).any())
    assert wrong / runs <= 0.05


def test_a_planted_mismatch_of_the_arms_is_found_and_a_fair_one_is_not():
    rng = np.random.default_rng(3)
    fair = rng.binomial(200, 0.5, (500, 28)).cumsum(1)
    users = 200 * np.arange(1, 29)
    p = np.array([ratio_p_of_all_looks(np.stack([counts, users - counts], -1), [1, 1])[-1] for counts in fair])
    assert (p < 0.01).mean() <= 0.01
    lost = rng.binomial(200, 0.46, (100, 28)).cumsum(1)
    p = np.array([ratio_p_of_all_looks(np.stack([counts, users - counts], -1), [1, 1])[-1] for counts in lost])
    assert (p < 0.001).mean() > 0.9


def test_a_service_without_experiments_says_nothing_of_them(tmp_path):
    publish_board(tmp_path / "models")
    with Server(tmp_path, tmp_path / "models") as server:
        answer = server.get("/recommend/1")
        assert arm_of(answer[1]) is None
        assert server.get("/model")[2]["experiments"] == {"error": None, "experiments": []}
        assert "experiments" not in server.get("/health/ready")[2]
    assert b"experiment_arms_on_live_model 0.0" in Metrics().body()
