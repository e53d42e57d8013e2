"""The job `monitor`: what the command says of planted days, its report, the file beside the models, and what a running
service tells of it."""

import json
import re
import shutil
import subprocess
from datetime import datetime, timedelta, timezone

import duckdb
import pytest
from support import Server, call, fresh_project, only_the_jobs, publish_board, train

from product_recs.bundle.files import live_version
from product_recs.core.errors import IngestError
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
from product_recs.jobs.checks import Check
from product_recs.jobs.monitor import Limits, keep_verdicts, look_at_input, staleness_checks
from product_recs.web.monitor import VERDICTS, read_verdicts
from product_recs.web.security import add_key

PROMTOOL = shutil.which("promtool")
LAST_WEEK = "2026-06-23"  # of the sample


def change(log, query):
    "Replace the interactions of a run by what a query makes of them."
    with duckdb.connect() as con:
        con.execute(f"CREATE TABLE log AS SELECT * FROM '{log}'")
        con.execute(f"COPY ({query}) TO '{log}' (FORMAT parquet)")


def named(checks):
    return {check["name"]: check for check in checks}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A project with a live model that has learned the sample but for its last week."
    root = fresh_project(tmp_path_factory.mktemp("shop"))
    only_the_jobs(root)
    version = train(root)
    processed = root / "data/processed/sample"
    processed.parent.mkdir(parents=True)
    shutil.copytree(root / "interactions", processed)
    manifest = root / "models" / version / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["data"] |= {"run": "sample", "last_timestamp": "2026-06-22T23:59:59"}
    manifest.write_text(json.dumps(facts))
    return root


@pytest.fixture
def log(shop):
    "The interactions of the run, which are as they were afterwards."
    path = shop / "data/processed/sample/interactions.parquet"
    shutil.copy(path, shop / "whole.parquet")
    yield path
    shutil.copy(shop / "whole.parquet", path)


def test_sound_days_are_fine(shop):
    done = call(shop, "product-recs", "monitor", "--name", "sample", "--parts", "input", "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("✓ fine: ") and "reports/monitor/monitor.html" in done.stdout
    said = json.loads((shop / "reports/monitor/metrics.json").read_text())["monitor"]
    assert said["verdict"] == "fine" and said["exit_code"] == 0 and said["parts"] == ["input"]
    assert len(said["days"]) == 7 and min(said["days"]) == LAST_WEEK and {*said["days"].values()} == {"fine"}
    assert {"events", "own items", "products: price"} <= {*named(said["checks"])}
    assert {check["group"] for check in said["checks"]} == {"input"}
    page = (shop / "reports/monitor/monitor.html").read_text()
    assert 'class="found found-fine"' in page and "All is well" in page and "<script" not in page


@pytest.mark.slow
def test_a_broken_day_ends_the_command_with_4_and_names_the_day(shop, log):
    change(log, "SELECT * FROM log WHERE timestamp::DATE <> DATE '2026-06-25' OR hash(user_id, item_id) % 12 = 0")
    prom = shop / "textfile/shop.prom"
    arguments = ("monitor", "--parts", "input", "--textfile", str(prom), "--quiet")
    done = call(shop, "product-recs", *arguments)
    assert done.returncode == 4, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("✗ events: Thursday 2026-06-25: ")
    assert "--accept 2026-06-25" in " ".join(map(str.strip, lines[1:]))
    page = (shop / "reports/monitor/monitor.html").read_text()
    assert 'class="found found-stop"' in page and "Thursday 2026-06-25" in page
    assert page.index("<strong>Stop.</strong>") < page.index("How this notebook works")
    text = prom.read_text()
    assert 'product_recs_check_level{check="events",group="input"} 2.0' in text
    if PROMTOOL:
        lint = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True)
        assert lint.returncode == 0 and lint.stdout + lint.stderr == ""
    accepted = call(shop, "product-recs", *arguments, "--accept", "2026-06-25", "--json")
    said = json.loads(accepted.stdout)
    assert accepted.returncode == 0 and said["verdict"] == "fine" and "2026-06-25" not in said["days"]
    assert 'group="input"} 2.0' not in prom.read_text() and "monitor_timestamp_seconds{" not in prom.read_text()
    # days as the report prints them for weeks, and by a scheduler, of whose silence an alert speaks
    week = ("--accept", "2026-06-24/2026-06-26", "-p", "scheduled", "true")
    accepted = call(shop, "product-recs", *arguments, *week)
    assert accepted.returncode == 0 and "2026-06-25" not in accepted.stdout, accepted.stdout + accepted.stderr
    assert 'product_recs_monitor_timestamp_seconds{group="input"}' in prom.read_text()


def test_users_that_were_mixed_up_and_an_empty_feed_of_products(shop, log):
    day = "timestamp::DATE >= DATE '2026-06-27'"
    rows = "SELECT *, row_number() OVER (ORDER BY {}) AS n FROM log WHERE " + day
    change(
        log,
        f"SELECT * FROM log WHERE NOT ({day}) UNION ALL BY NAME SELECT b.user_id, a.item_id, a.event, a.quantity, "
        f"a.timestamp FROM ({rows.format('timestamp, item_id')}) a JOIN "
        f"({rows.format('hash(user_id, item_id, timestamp)')}) b USING (n)",
    )
    models, processed = shop / "models", shop / "data/processed/sample"
    assert "own items" in [check.name for check in look_at_input(processed, models).checks if check.level == "stop"]
    table = processed / "products.parquet"
    shutil.copy(table, shop / "products.parquet")
    try:
        change(table, "SELECT * REPLACE (NULL::VARCHAR AS category) FROM log")
        checks = {check.name: check for check in look_at_input(processed, models).checks}
        assert checks["products: category"].level == "stop" and checks["products: price"].level == "fine"
        assert "items have lost their category" in checks["products: category"].says
        assert "accepted_attributes" in checks["products: category"].remedy
        meant = look_at_input(processed, models, accepted_attributes=["category"]).checks
        assert "products: category" not in {check.name for check in meant}
    finally:
        shutil.copy(shop / "products.parquet", table)


def test_a_log_with_nothing_new_and_one_without_times(shop, log):
    change(log, f"SELECT * FROM log WHERE timestamp < '{LAST_WEEK}'")
    done = call(shop, "product-recs", "monitor", "--parts", "input", "--quiet", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and "newer" in named(said["checks"])["new events"]["says"] and said["days"] == {}
    change(log, "SELECT * REPLACE (NULL::TIMESTAMP AS timestamp) FROM log")
    done = call(shop, "product-recs", "monitor", "--parts", "input", "--quiet", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and "No event of the log has a time" in named(said["checks"])["days"]["says"]


def test_a_missing_feed_is_seen_where_somebody_says_up_to_when(shop, log):
    done = call(shop, "product-recs", "monitor", "--parts", "input", "--quiet", "-p", "until", "2026-07-01T00:00:00")
    assert done.returncode == 4 and "Tuesday 2026-06-30: 0 events" in done.stdout


def test_mistakes_are_said_before_anything_runs(shop):
    for arguments, words in (
        (("--parts", "inputs"), "must be all, or some of input, staleness"),
        (("--accept", "monday"), "--accept: 'monday' is no day"),
        (("--accept", "2026-11-29/2026-11-23"), "is no day and no range of days"),  # it ends before it begins
        (("--since", "2026-13-01"), "must be a day, such as"),
    ):
        done = call(shop, "product-recs", "monitor", *arguments)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    done = call(shop, "product-recs", "monitor", "--name", "nobody", "--parts", "input", "--quiet")
    assert done.returncode == 1 and "Run 01_ingest first" in done.stderr
    assert call(shop, "product-recs", "monitor", "--no-such-option").returncode == 2
    for wrong in ("yesterday", "2026-11-29/2026-11-23"):
        with pytest.raises(IngestError, match="accepted"):
            look_at_input(shop / "data/processed/sample", shop / "models", accepted=[wrong])


def test_what_is_stale_is_told_beside_its_limit(shop, tmp_path):
    models = shop / "models"
    version = live_version(models)
    made = datetime.fromisoformat(json.loads((models / version / "manifest.json").read_text())["created_at"])
    data = datetime(2026, 6, 22, 23, 59, 59, tzinfo=timezone.utc)
    lists = tmp_path / "lists"
    lists.mkdir()
    facts = {"moment": (made + timedelta(hours=1)).isoformat(), "model_version": version}
    (lists / "manifest.json").write_text(json.dumps(facts))
    fresh = Limits(data_days=(made - data) / timedelta(days=1) + 5)

    def levels(now, store=None, limits=fresh):
        return {check.name: check.level for check in staleness_checks(models, now, store, lists, limits)}

    assert {*levels(made + timedelta(days=2)).values()} == {"fine"}
    assert levels(made + timedelta(days=20))["age of the live model"] == "look"
    old = levels(made + timedelta(days=60))
    assert old["age of the live model"] == old["lists of the last batch"] == "stop"
    with Store(f"sqlite:///{tmp_path}/feedback.db") as store:
        store.add_events([NewEvent(1, item) for item in range(30)])
        few, many = (levels(made, store, Limits(unlearned=n))["events not learned"] for n in (20, 5))
    assert (few, many) == ("look", "stop")
    (lists / "manifest.json").write_text(json.dumps(facts | {"model_version": "another"}))
    assert levels(made + timedelta(days=1))["lists of the last batch"] == "look"
    (lists / "manifest.json").write_text("half a manif")
    assert levels(made + timedelta(days=1))["lists of the last batch"] == "look"


def test_a_store_that_is_away_is_a_finding_and_the_report_is_written(shop):
    earlier = [Check("events", "fine", "As ever.", group="input")]
    keep_verdicts(shop / "models", earlier, ["input"], datetime.now(timezone.utc))
    done = call(
        shop, "product-recs", "monitor", "--parts", "staleness", "--quiet", "--json",
        "-p", "feedback", "postgresql://shop:secret@127.0.0.1:1/none",
    )  # fmt: skip
    said = json.loads(done.stdout)
    away = named(said["checks"])["feedback store"]
    assert away["level"] == "look" and "secret" not in done.stdout + done.stderr
    assert (shop / "reports/monitor/monitor.html").exists() and "secret" not in (
        shop / "reports/monitor/monitor.html"
    ).read_text()
    verdicts = read_verdicts(shop / "models" / VERDICTS)
    assert {"input", "staleness"} <= {*verdicts}  # the other part's verdicts are still there


def test_a_running_service_tells_what_was_found(tmp_path):
    models, keys = tmp_path / "models", tmp_path / "keys.json"
    publish_board(models, version="first")
    reads = {"X-API-Key": add_key(keys, "page", "read")}
    with Server(tmp_path, models, workers=2, auth="on", api_keys_file=keys) as server:
        assert server.ask("GET", "/monitor", None, {})[0] == 401
        assert server.ask("GET", "/monitor", None, reads)[2] == {"groups": {}}
        assert "check_level" not in server.ask("GET", "/metrics", None, reads)[2].decode()
        now = datetime.now(timezone.utc)
        checks = [Check("events", "stop", "Friday: 3 events.", "Call the shop.", "input", 3, 90, 110)]
        keep_verdicts(models, checks, ["input"], now)
        for _ in range(4):  # whichever worker answers
            part = server.ask("GET", "/monitor", None, reads)[2]["groups"]["input"]
            assert part["checks"][0]["says"] == "Friday: 3 events." and part["at"] == now.isoformat(timespec="seconds")
            text = server.ask("GET", "/metrics", None, reads)[2].decode()
            assert len(re.findall(r'^product_recs_check_level\{check="events",group="input"\} 2\.0$', text, re.M)) == 1
            assert 'product_recs_check_value{check="events",group="input"} 3.0' in text
        (models / VERDICTS).write_text('{"groups": {"input": {"at"')  # by a hand that writes no whole files
        assert server.ask("GET", "/monitor", None, reads)[2] == {"groups": {}}
        assert server.ask("GET", "/metrics", None, reads)[0] == 200
