"""What became of what was shown: rates against a known truth, the rules of attribution, checks of shops that are quiet
and of shops that are not; in SQLite and in PostgreSQL."""

import json
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from support import Server, publish_board, until

from product_recs.feedback.records import Impression, NewEvent
from product_recs.feedback.store import Store
from product_recs.jobs.checks import FINE, LOOK, STOP, worst
from product_recs.jobs.shown import (
    outcome_checks,
    outcome_figures,
    outcome_picture,
    outcome_table,
    serving_checks,
    serving_figures,
)

END = datetime(2026, 3, 29, tzinfo=timezone.utc)
WEEK, DAY, HOUR = timedelta(days=7), timedelta(days=1), timedelta(hours=1)
LATER = END + timedelta(days=60)


def shown(user, moment, items, model="v1", rung="personalised", **more):
    return Impression("r", user, model, rung, items, moment, **more)


def view(user, moment, item, event="view"):
    return NewEvent(user, item, event, timestamp=moment)


def near(row, truth):
    "Is the truth at most some three and a half standard deviations away, and is the interval a narrow one?"
    return abs(row.rate - truth) < 0.9 * (row.high - row.low) < 0.06


def rates(figures):
    return figures.rates.set_index(["by", "group", "what"])


def test_intervals_cover_the_truth_although_users_hang_together(url, opened):
    """40 models, each with 50 users of its own; a fifth of the users clicks half of their lists, the others 2 %. An
    interval of independent lists would cover the truth in about half of the cases."""
    rng, store = np.random.default_rng(5), opened(Store(url))
    lists, events, naive = [], [], 0
    truth = 0.2 * 0.5 + 0.8 * 0.02
    for model in range(40):
        clicks = 0
        chances = np.where(rng.random(50) < 0.2, 0.5, 0.02)
        for user, chance in enumerate(chances):
            for number in range(12):
                moment, item = END - WEEK + number * 13 * HOUR, f"{number}"
                lists.append(shown(f"{model}-{user}", moment, [item, "other"], f"v{model}"))
                if rng.random() < chance:
                    clicks += 1
                    events.append(view(f"{model}-{user}", moment + HOUR, item))
        share = clicks / 600
        naive += abs(share - truth) < 1.96 * np.sqrt(share * (1 - share) / 600)
    store.add_impressions(lists)
    store.add_events(events)
    figures = outcome_figures(store, END - WEEK, END, DAY, now=LATER)
    models = figures.rates[(figures.rates.by == "model") & (figures.rates.what == "click")]
    covered = int(((models.low < truth) & (models.high > truth)).sum())
    assert len(models) == 40 and models.lists.tolist() == [600] * 40 and models.users.tolist() == [50] * 40
    assert covered >= 35 and naive <= 30, (covered, naive)
    whole = rates(figures).loc[("all", "all lists", "click")]
    assert whole.hits == len(events) and whole.low < truth < whole.high
    assert rates(figures).loc[("position", 2, "click")].rate == 0


def test_rates_by_position_rung_task_and_experiment(url, opened):
    rng, store = np.random.default_rng(2), opened(Store(url))
    chances = {"personalised": (0.4, 0.2, 0.1), "popular": (0.2, 0.1, 0.0)}
    lists, events = [], []
    for user in range(300):
        for number in range(8):
            rung, arm = ("personalised", "popular")[number % 2], "AB"[user % 2]
            moment = END - WEEK + timedelta(hours=20 * number, minutes=user)
            items = [f"{number}.{place}" for place in range(3)]
            more = {"experiment": "tea", "arm": arm} if user < 200 else {}
            lists.append(shown(user, moment, items, rung=rung, task="discovery" if number < 4 else None, **more))
            for item, chance in zip(items, chances[rung], strict=True):
                if rng.random() < chance:
                    events.append(view(user, moment + HOUR, item, "purchase" if rng.random() < 0.25 else "view"))
    store.add_impressions(lists)
    store.add_events(events)
    figures = outcome_figures(store, END - WEEK, END, DAY, now=LATER)
    rate = rates(figures)
    for place, chance in enumerate((0.3, 0.15, 0.05), 1):
        for what, part in (("click", 0.75), ("purchase", 0.25)):
            row = rate.loc[("position", place, what)]
            assert row.lists == 2400 and near(row, chance * part), row
    for rung, each in chances.items():
        row, none = rate.loc[("rung", rung, "click")], np.prod([1 - 0.75 * chance for chance in each])
        assert row.lists == 1200 and near(row, 1 - none), row
    assert {group for by, group, _ in rate.index if by == "experiment"} == {"tea: A", "tea: B"}
    assert rate.loc[("experiment", "tea: A", "click")].users == 100
    assert rate.loc[("task", "discovery", "click")].lists == rate.loc[("task", "unknown", "click")].lists == 1200
    table = outcome_table(figures, "position").frame
    assert table.position.tolist() == ["1", "2", "3"] and outcome_picture(figures).figure is not None


def test_which_list_an_event_belongs_to(url, opened):
    "Late, early, of a guest, of somebody else, on another item, twice, and of two lists only the newer one."
    store, moment = opened(Store(url)), END - 3 * DAY
    tokyo, new_york = timezone(timedelta(hours=9)), timezone(timedelta(hours=-5))
    store.add_impressions(
        [
            shown("two", moment, [1, 2], "old"),
            shown("two", moment + HOUR, [2, 1], "new"),
            shown("between", moment, [1], "old"),
            shown("between", moment + 2 * HOUR, [1], "new"),
            shown("late", moment, [1], "old"),
            shown("just", moment, [1], "old"),
            shown("early", moment, [1], "old"),
            shown("other item", moment, [1], "old"),
            shown(None, moment, [1], "old"),
            shown("tokyo", moment, [1], "old"),
            shown("york", moment, [1], "old"),
            shown("number", moment, [101], "old"),
        ]
    )
    store.add_events(
        [
            view("two", moment + 2 * HOUR, 1),
            view("two", moment + 3 * HOUR, 1),  # the second click of one list counts once
            view("between", moment + HOUR, 1),  # before the newer list
            view("late", moment + DAY + timedelta(seconds=1), 1),
            view("just", moment + DAY, 1),
            view("early", moment - timedelta(seconds=1), 1),
            view("other item", moment + HOUR, 2),
            view("other person", moment + HOUR, 1),
            # the clock of the wall says nine hours more, and is not nine hours later
            NewEvent("tokyo", 1, "view", timestamp=(moment + HOUR).astimezone(tokyo)),
            NewEvent("york", 1, "view", timestamp=(moment - HOUR).astimezone(new_york)),
            view("number", moment + HOUR, "101.0"),
        ]
    )
    figures = outcome_figures(store, END - WEEK, END, DAY, now=LATER)
    rate = rates(figures)
    old, new = (rate.loc[("model", model, "click")] for model in ("old", "new"))
    assert (old.lists, old.hits) == (9, 4)  # between, just, tokyo, number
    assert (new.lists, new.hits) == (2, 1) and figures.guests == 1
    assert rate.loc[("position", 2, "click")].hits == 1  # item 1 stood second in the newer list
    # a period that ends between both lists: the click belongs to the newer one, which is not counted
    part = rates(outcome_figures(store, moment - HOUR, moment + timedelta(minutes=30), DAY, now=LATER))
    assert part.loc[("model", "old", "click")].hits == 4 and ("model", "new", "click") not in part.index
    # the same moments, written in the time of another place
    same = outcome_figures(store, (END - WEEK).astimezone(tokyo), END.astimezone(new_york), DAY, now=LATER)
    assert same.rates.equals(figures.rates)


def test_of_the_forgotten_nothing_counts_and_spellings_are_one(url, opened):
    store, moment = opened(Store(url)), END - 2 * DAY
    store.add_impressions([shown(user, moment, ["A1"]) for user in ("eva", "Eva", "adam", "kim")])
    store.add_events([view(user, moment + HOUR, "a1") for user in ("EVA", "adam", "kim")])
    plain, folded = (
        rates(outcome_figures(store, END - WEEK, END, DAY, now=LATER, folds=folds)).loc[("all", "all lists", "click")]
        for folds in ((), ("case",))
    )
    assert (plain.hits, plain.users) == (0, 4) and (folded.hits, folded.users, folded.lists) == (3, 3, 4)
    store.forget("adam")
    store.add_impressions([shown("adam", moment, ["A1"])])  # from before the wish: it is not kept
    after = rates(outcome_figures(store, END - WEEK, END, DAY, now=LATER, folds=["case"]))
    assert after.loc[("all", "all lists", "click")][["lists", "users", "hits"]].tolist() == [3, 2, 2]


def test_lists_whose_window_is_open_do_not_count(url, opened):
    store = opened(Store(url))
    store.add_impressions([shown(1, END - hours * HOUR, [1]) for hours in range(1, 49)])
    figures = outcome_figures(store, END - DAY, END, DAY, now=END)
    assert figures.moved == DAY and figures.until == END - DAY
    assert rates(figures).loc[("all", "all lists", "click")].lists == 24
    names = outcome_figures(store, END - DAY, END, HOUR, now=LATER, clicks=["open"], purchases=[])
    assert names.rates.hits.sum() == 0


def shop(store, days=35, users=120, chance=0.2, last_week=1.0, day_to_day=0.0, seed=0):
    "One list a day and user; `day_to_day` moves all users of a day together."
    rng, lists, events = np.random.default_rng(seed), [], []
    taste = rng.beta(2, 2 / chance - 2, users)
    for day in range(days):
        weather = np.exp(rng.normal(0, day_to_day)) * (last_week if day >= days - 7 else 1)
        for user in range(users):
            moment = END - timedelta(days=days - day) + timedelta(minutes=int(rng.integers(0, 1380)))
            lists.append(shown(user, moment, [f"{day}", "x"], rung=("personalised", "popular")[user % 4 == 0]))
            if rng.random() < taste[user] * weather:
                events.append(view(user, moment + HOUR, f"{day}"))
    store.add_impressions(lists)
    store.add_events(events)
    return store


def test_a_quiet_shop_does_not_cry_wolf_and_a_fall_is_found(tmp_path, opened):
    given = {"window": DAY, "now": LATER}
    alarms = 0
    for seed in range(12):
        weather = 0.25 * (seed % 2)
        quiet = shop(opened(Store(f"sqlite:///{tmp_path}/{seed}.db")), day_to_day=weather, seed=seed)
        alarms += worst(outcome_checks(quiet, END - WEEK, END, **given)) != FINE
    assert alarms <= 2
    less = shop(opened(Store(f"sqlite:///{tmp_path}/less.db")), last_week=0.7, users=300)
    broken = shop(opened(Store(f"sqlite:///{tmp_path}/broken.db")), last_week=0.05)
    few = shop(opened(Store(f"sqlite:///{tmp_path}/few.db")), last_week=0.05, users=10)
    checks = {check.name: check for check in outcome_checks(less, END - WEEK, END, **given)}
    assert checks["clicks"].level == LOOK and checks["clicks"].group == "outcome" and checks["clicks"].remedy
    assert checks["clicks"].value < checks["clicks"].low < checks["clicks"].high
    assert "does the shop send" in checks["purchases"].says
    assert worst(outcome_checks(broken, END - WEEK, END, **given)) == STOP
    little = outcome_checks(few, END - WEEK, END, **given)
    assert worst(little) == FINE and "too little data" in little[0].says
    young = outcome_checks(shop(opened(Store(f"sqlite:///{tmp_path}/y.db")), days=7), END - WEEK, END, **given)
    assert worst(young) == FINE and "no lists from before" in young[0].says


def test_serving_is_judged_by_the_days_before(url, opened, tmp_path):
    store = shop(opened(Store(url)), days=21)
    live = publish_board(tmp_path / "models")

    def levels(since=END - WEEK, until=END, **more):
        return {check.name: check for check in serving_checks(store, tmp_path / "models", since, until, **more)}

    calm = levels()
    assert worst(calm.values()) == FINE and {check.group for check in calm.values()} == {"serving"}
    assert "120 a day" in calm["lists a day"].says and "not looked at" in calm["requests"].says
    assert levels(END - 5 * DAY, END + 2 * DAY)["lists a day"].level == STOP
    store.add_impressions([shown(None, END - (k % 160) * HOUR - HOUR, ["x"], rung="popular") for k in range(5000)])
    store.add_impressions([shown(1, END - (k % 160) * HOUR - HOUR, [], rung="popular") for k in range(500)])
    odd = levels()
    assert odd["guests"].level == odd["empty lists"].level == odd["concentration"].level == LOOK
    assert odd["rung personalised"].level == STOP and odd["rung popular"].level == LOOK
    figures = serving_figures(store, END - WEEK, END)
    assert figures.days.lists[-7:].sum() == 7 * 120 + 5500 and figures.items == 8
    assert figures.rungs.loc[-20].to_dict() == {"personalised": 90, "popular": 30}
    soon = datetime.now(timezone.utc) + HOUR
    store.add_impressions([shown(1, soon, [1], "v1"), shown(1, soon, [1], live.name)])
    assert levels(soon - HOUR, soon + HOUR)["live model"].level == LOOK
    store.add_impressions([shown(1, soon, [1], "v2", experiment="tea", arm="b")])
    assert "v2" not in levels(soon - HOUR, soon + HOUR)["live model"].says


def test_requests_of_a_real_service(tmp_path):
    "Two workers: what they answered is read from their figures, from behind a key, and from the log."
    from product_recs.web.security import add_key

    publish_board(tmp_path / "models")
    key = add_key(tmp_path / "keys.json", "monitor", "read")
    began = datetime.now(timezone.utc) - timedelta(minutes=1)
    settings = {"auth": "on", "api_keys_file": tmp_path / "keys.json"}
    with Server(tmp_path, tmp_path / "models", workers=2, **settings) as server:
        sign = {"Authorization": f"Bearer {key}"}
        for k in range(150):
            assert server.get(f"/recommend/{k % 24 + 1}?n={3 if k % 3 else 50}", headers=sign)[0] == 200
        address, log = f"http://127.0.0.1:{server.port}/metrics", str(server.stdout)
        store = Store(f"sqlite:///{tmp_path}/feedback.db")
        until(lambda: len(store.impressions(1000)) == 150)
        end = datetime.now(timezone.utc) + timedelta(minutes=1)

        def checked(**more):
            checks = serving_checks(store, tmp_path / "models", began, end, slow_ms=60_000, **more)
            return {check.name: check for check in checks}

        asked, logged = checked(metrics_urls=[address], api_key=key), checked(request_logs=[log])
        assert asked["errors"].level == asked["latency"].level == FINE and "150 requests" in asked["latency"].says
        assert asked["short lists"].level == LOOK and abs(asked["short lists"].value - 1 / 3) < 0.01
        assert "150 requests" in logged["latency"].says and logged["errors"].value == 0
        assert "Unauthorized" in checked(metrics_urls=[address])["requests"].says
        assert "no such log" in checked(request_logs=[f"{log}.1"])["requests"].says
        assert asked["live model"].level == FINE and asked["live model"].value == 150
        store.close()
    with open(log, "a") as file:
        moment = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": moment, "route": "/recommend/{user_id}", "status": 500, "ms": 90_000.0}
        file.writelines([json.dumps(line) + "\n"] * 40)
    broken = checked(request_logs=[log])
    assert broken["errors"].level == STOP and broken["latency"].level == LOOK


@pytest.mark.parametrize("lists", [60_000])
def test_many_lists_come_by_pages(tmp_path, opened, lists):
    "More lists than a page holds are all counted, with a small limit of memory."
    store = opened(Store(f"sqlite:///{tmp_path}/many.db"))
    for start in range(0, lists, 20_000):
        rows = range(start, start + 20_000)
        store.add_impressions([shown(k % 5000, END - DAY - timedelta(seconds=k), [k % 97, "x"]) for k in rows])
    figures = outcome_figures(store, END - WEEK, END, HOUR, now=LATER, memory_limit="200MB")
    assert rates(figures).loc[("all", "all lists", "click")][["lists", "users"]].tolist() == [lists, 5000]
