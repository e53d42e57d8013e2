"""Days that are broken are told from ordinary ones: in generated shops of several sizes, and by the figure that should
find them; a quiet shop does not cry wolf."""

import math
from datetime import date, datetime, timedelta

import duckdb
import numpy as np
import pandas as pd
import pytest

from product_recs.jobs.checks import worst
from product_recs.jobs.drift import (
    DriftError,
    NoTimes,
    attribute_checks,
    day_figures,
    divergence,
    holm,
    input_checks,
    judge_days,
)
from product_recs.jobs.monitor import look_at_input, stopped_days

START, DAYS = date(2026, 1, 5), 75
LAST = START + timedelta(days=DAYS - 1)
WEEKDAY = np.array([1.0, 0.9, 0.9, 1.0, 1.2, 1.5, 1.3])


def a_shop(seed, a_day, days=DAYS, growth=0.3):
    "Users who come back for their own items, weekdays, days that differ, growth, new users and new items."
    rng = np.random.default_rng(seed)
    users, items = max(20, a_day // 2), max(100, 2 * a_day)
    day_numbers = np.arange(days)
    rate = a_day * WEEKDAY[day_numbers % 7] * (1 + growth * day_numbers / days) * np.exp(rng.normal(0, 0.12, days))
    day = np.repeat(day_numbers, rng.poisson(rate))
    n = len(day)
    known = 0.6 + 0.4 * day / days  # of the users and items: the others come later
    user = (rng.random(n) * users * known).astype(int)
    own = rng.integers(0, items * 6 // 10, (users, 5))[user, rng.integers(0, 5, n)]
    popular = (rng.random(n) ** 3 * items * known).astype(int)
    item = np.where(rng.random(n) < 0.5, own, popular)
    hour = np.clip(rng.normal(14 + (day % 7 == 6), 3.5, n), 0, 23.99)
    return pd.DataFrame(
        {
            "user_id": [f"u{number:06}" for number in user],
            "item_id": [f"{number:08}" for number in item],
            "event": rng.choice(["view", "cart", "purchase"], n, p=[0.62, 0.23, 0.15]),
            "quantity": rng.integers(1, 4, n).astype(float),
            "timestamp": pd.Timestamp(START) + pd.to_timedelta(day, "D") + pd.to_timedelta(hour, "h"),
        }
    )


def products_of(log):
    items = sorted(set(log.item_id))
    return pd.DataFrame(
        {"item_id": items, "title": "thing", "category": [f"group {int(item) % 9}" for item in items], "price": 1.0}
    )


def write(folder, log, products=None):
    folder.mkdir(parents=True, exist_ok=True)
    log = log.astype({"timestamp": "datetime64[us]"})
    with duckdb.connect() as con:
        con.register("log", log)
        con.execute(f"COPY log TO '{folder}/interactions.parquet' (FORMAT parquet)")
        if products is not None:
            con.register("products", products)
            con.execute(f"COPY products TO '{folder}/products.parquet' (FORMAT parquet)")
    return folder


def checks(folder, since=LAST, until=datetime(LAST.year, LAST.month, LAST.day) + timedelta(days=1), **options):
    figures = day_figures(folder, since, until=until, **options)
    return {check.name: check for check in input_checks(figures, judge_days(figures, since))}


def not_fine(findings):
    return {name: check.says for name, check in findings.items() if check.level != "fine"}


@pytest.mark.parametrize("a_day", [20, 300, 5000])
def test_ordinary_days_are_quiet(tmp_path, a_day):
    "47 days of each of several shops, each judged by those before it."
    levels, odd = [], {}
    for seed in range(4 if a_day < 1000 else 1):
        log = a_shop(seed, a_day)
        since = START + timedelta(days=28)
        figures = day_figures(write(tmp_path / str(seed), log, products_of(log)), since, period="day")
        for day, findings in judge_days(figures, since).items():
            levels.append(worst(findings))
            odd |= {(seed, check.name, day): check.says for check in findings if check.level != "fine"}
    assert len(levels) >= 47 and levels.count("stop") == 0, odd
    assert levels.count("look") <= 0.02 * len(levels), odd


def lost_zeros(log, last):
    return log.assign(item_id=log.item_id.where(~last, log.item_id.str.lstrip("0").replace("", "0")))


def shuffled(log, last):
    users = log.user_id.copy()
    users[last] = np.random.default_rng(1).permutation(users[last])
    return log.assign(user_id=users)


def again(log, last):
    later = log[last].assign(timestamp=log.timestamp[last] + pd.Timedelta(minutes=-1))
    return pd.concat([log, later])


def yesterdays(log, last):
    before = (log.timestamp >= pd.Timestamp(LAST) - pd.Timedelta(days=1)) & ~last
    return pd.concat([log[~last], log[before].assign(timestamp=log.timestamp[before] + pd.Timedelta(days=1))])


def turned(log, last):
    other = {"view": "purchase", "cart": "cart", "purchase": "view"}
    return log.assign(event=log.event.where(~last, log.event.map(other)))


def new_items(log, last):
    return log.assign(item_id=log.item_id.where(~last, "9" + log.item_id.str[1:]))


def with_tenfold(log, last):
    return log.assign(quantity=log.quantity.where(~last, log.quantity * 100))


def in_another_zone(log, last):
    hours = (log.timestamp.dt.hour + 9) % 24
    moved = log.timestamp.dt.normalize() + pd.to_timedelta(hours, "h")
    return log.assign(timestamp=log.timestamp.where(~last, moved))


def a_tenth(log, last):
    return log[~last | (np.random.default_rng(0).random(len(log)) < 0.1)]


PLANTED = {
    "own items": (shuffled, "of what users took is of their own items"),
    "events": (a_tenth, " events; "),
    "spelling of items": (lost_zeros, "of the items are known in another spelling"),
    "kinds of event": (turned, "(usually 62%)"),
    "new items": (new_items, "of the items had never been there before"),
    "rows sent twice": (again, "of the rows stand there already"),
    "copy of an earlier day": (yesterdays, "on one of the seven days before"),
    "quantities": (with_tenfold, "over 100 has"),
    "hours": (in_another_zone, "of the events (usually"),
}


@pytest.mark.parametrize("a_day", [300, 1000])
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_day_is_stopped_by_its_figure(tmp_path, name, a_day):
    log, (change, words) = a_shop(5, a_day), PLANTED[name]
    broken = change(log, log.timestamp >= pd.Timestamp(LAST))
    findings = checks(write(tmp_path, broken, products_of(log)), LAST - timedelta(days=4))
    assert findings[name].level == "stop", (findings[name].says, not_fine(findings))
    assert words in findings[name].says and f"{LAST}" in findings[name].says and findings[name].remedy
    assert {str(LAST)} == {check.says.split(":")[0].split()[-1] for check in findings.values() if check.level != "fine"}


def test_the_smallest_shop_sees_a_day_that_is_missing(tmp_path):
    log = a_shop(3, 20)
    findings = checks(write(tmp_path, log[log.timestamp < pd.Timestamp(LAST)]))
    assert findings["events"].level == "stop" and findings["events"].value == 0
    sunday_only = checks(write(tmp_path, log))
    assert not not_fine(sunday_only)


def test_a_gap_that_later_days_have_closed_is_a_look(tmp_path):
    log = a_shop(3, 300)
    hole = (log.timestamp >= pd.Timestamp(LAST) - pd.Timedelta(days=3)) & (
        log.timestamp < pd.Timestamp(LAST) - pd.Timedelta(days=2)
    )
    findings = checks(write(tmp_path, log[~hole]), LAST - timedelta(days=5))
    assert not_fine(findings).keys() == {"events"} and findings["events"].level == "look"


def test_attributes_that_are_missing_on_a_day(tmp_path):
    log = a_shop(2, 300)
    broken = new_items(log, log.timestamp >= pd.Timestamp(LAST))  # new items, and the products know nothing of them
    findings = checks(write(tmp_path, broken, products_of(log)))
    assert findings["no category"].level == findings["no price"].level == "stop"
    assert "100% of the items that were sold have no category" in findings["no category"].says


def test_an_empty_feed_of_products_is_seen_beside_the_model(tmp_path):
    log = a_shop(2, 300)
    table = products_of(log)
    write(tmp_path / "model", log, table.rename(columns={"title": "title"}))
    write(tmp_path / "run", log, table.assign(category=None, price=np.nan))
    findings = {
        check.name: check
        for check in attribute_checks(tmp_path / "run/products.parquet", tmp_path / "model/products.parquet")
    }
    assert {name: check.level for name, check in findings.items()} == {
        "products: title": "fine",
        "products: category": "stop",
        "products: price": "stop",
    }
    assert f"{len(table):,} of {len(table):,} items have lost their category" in findings["products: category"].says


def test_a_day_that_somebody_accepted_is_neither_judged_nor_a_measure(tmp_path):
    log = a_shop(4, 300)
    last = log.timestamp >= pd.Timestamp(LAST) - pd.Timedelta(days=1)
    sale = pd.concat([log] + [log[last & (log.timestamp < pd.Timestamp(LAST))].assign(quantity=9.0)] * 4)
    figures = day_figures(write(tmp_path, sale), LAST - timedelta(days=1), until=datetime(2026, 3, 21))
    day = LAST - timedelta(days=1)
    judged = judge_days(figures, day)
    assert worst(judged[day]) == "stop" and worst(judged[LAST]) == "fine"
    accepted = judge_days(figures, day, accepted={day})
    assert list(accepted) == [LAST] and worst(accepted[LAST]) == "fine"


def test_a_second_broken_day_is_not_measured_by_the_first(tmp_path):
    log = a_shop(4, 300)
    two = log.timestamp >= pd.Timestamp(LAST) - pd.Timedelta(days=1)
    figures = day_figures(write(tmp_path, a_tenth(log, two)), LAST - timedelta(days=1), until=datetime(2026, 3, 21))
    judged = judge_days(figures, LAST - timedelta(days=1))
    assert [worst(findings) for findings in judged.values()] == ["stop", "stop"]


def test_a_day_that_has_only_begun_is_compared_with_the_same_hours(tmp_path):
    log = a_shop(6, 500)
    morning = log[log.timestamp < pd.Timestamp(LAST) + pd.Timedelta(hours=11)]
    folder = write(tmp_path, morning)
    begun = checks(folder, until=None)
    assert not not_fine(begun) and "until 1" in begun["events"].says
    whole = checks(folder)
    assert whole["events"].level in ("look", "stop") and whole["hours"].level != "fine"


def test_logs_that_say_little(tmp_path):
    log = a_shop(1, 200)
    first = log[log.timestamp < pd.Timestamp(START) + pd.Timedelta(days=1)]
    one_day = checks(write(tmp_path / "day", first), START, None)
    assert list(one_day) == ["history"] and one_day["history"].level == "fine"
    one_user = checks(write(tmp_path / "user", log.assign(user_id="me")))
    assert not not_fine(one_user) and one_user["new users"].value == 0
    nothing_new = checks(write(tmp_path / "old", log), LAST + timedelta(days=1), None)
    assert list(nothing_new) == ["new events"] and nothing_new["new events"].level == "fine"
    with pytest.raises(NoTimes, match="no event of the log has a time".capitalize()):
        day_figures(write(tmp_path / "timeless", log.assign(timestamp=pd.NaT)))
    with pytest.raises(NoTimes):
        day_figures(write(tmp_path / "empty", log.head(0)))
    with pytest.raises(DriftError, match="Run 01_ingest first"):
        day_figures(tmp_path / "nowhere")


def test_a_shop_with_two_events_a_day_is_judged_by_the_week(tmp_path):
    log = a_shop(8, 2, days=280, growth=0)
    figures = day_figures(write(tmp_path, log))
    assert figures.step == 7 and {day.weekday() for day in figures.days} == {0}
    judged = judge_days(figures, figures.days[-7])
    assert len(judged) == 7 and {worst(findings) for findings in judged.values()} == {"fine"}
    assert next(iter(judged.values()))[0].says.startswith("The week of ")


@pytest.mark.parametrize("over", range(7))  # days of the week that has begun
def test_a_week_that_has_begun_is_compared_with_as_many_days_of_the_others(tmp_path, over):
    log = a_shop(3, 4, days=280 + over + 1, growth=0)
    last = log.timestamp.max().normalize()
    folder = write(tmp_path, log)
    report = look_at_input(folder, tmp_path / "models", since=str(last.date()))  # as on each night: the new day
    assert list(report.judged) == [(last - timedelta(days=over)).date()] and worst(report.checks) == "fine", (
        report.checks
    )
    parts = log[log.timestamp.between(last - timedelta(days=over), last - timedelta(microseconds=1))]
    events = next(check for check in report.checks if check.name == "events")
    assert events.value == len(parts)


def test_every_broken_week_is_named_by_its_days_and_can_be_accepted(tmp_path):
    log = a_shop(3, 4, days=280, growth=0)
    week = START + timedelta(days=266)  # of two, each with a twentieth of its events
    broken = log[(log.timestamp < str(week)) | (np.arange(len(log)) % 20 == 0)]
    asked = {"since": str(week), "until": str(week + timedelta(days=14)), "period": "week"}
    report = look_at_input(write(tmp_path, broken), tmp_path / "models", **asked)
    ranges = [f"{day}/{day + timedelta(days=6)}" for day in (week, week + timedelta(days=7))]
    assert stopped_days(report) == ranges
    remedies = " ".join(check.remedy for check in report.checks)
    assert any(f"--accept {span}" in remedies for span in ranges)
    again = look_at_input(tmp_path, tmp_path / "models", **asked, accepted=ranges)
    assert stopped_days(again) == [] and worst(again.checks) == "fine"


def test_names_of_the_data_are_data(tmp_path):
    log = a_shop(2, 200)
    odd = 'no {value}"; DROP TABLE log; --'
    table = products_of(log).rename(columns={"price": odd})
    findings = checks(write(tmp_path, log.assign(event=log.event.str.replace("cart", "<b>{usual}</b>")), table))
    assert f"have no {odd}" in findings[f"no {odd}"].says and not not_fine(findings)


def test_a_day_is_judged_the_same_whichever_days_are_judged_with_it(tmp_path):
    log = a_shop(9, 300)
    folder = write(tmp_path, log)
    figures = day_figures(folder, LAST - timedelta(days=6))
    several, alone = judge_days(figures, LAST - timedelta(days=6)), judge_days(figures, LAST)
    assert several[LAST] == alone[LAST] and figures.volume.sum() == len(log[log.timestamp >= str(figures.days[0])])


def test_the_measures_have_their_known_values():
    assert divergence(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0
    by_hand = 0.5 * math.log2(1 / 0.75) + 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    assert divergence(np.array([1.0, 0]), np.array([0.5, 0.5])) == pytest.approx(by_hand)
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
