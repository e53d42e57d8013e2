"""A real Prometheus with the committed configuration watches two real workers, and each trouble that can be made here
raises its alert; the others are in ops/alerts_test.yml, which promtool runs."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
import pytest
import yaml
from support import Server, both, new_database, publish_board, start_postgres

from product_recs.bundle.files import publish
from product_recs.core.files import atomic_write
from product_recs.jobs.checks import Check
from product_recs.jobs.monitor import keep_verdicts
from product_recs.web.security import add_key

ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "ops"
PROMETHEUS, PROMTOOL = (os.environ.get(name.upper()) or shutil.which(name) for name in ("prometheus", "promtool"))
pytestmark = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL),
    reason="there is no prometheus with promtool; apt-get install prometheus, or set PROMETHEUS and PROMTOOL",
)


def the_rules():
    return [rule for group in yaml.safe_load((OPS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def promtool(*arguments, text=None):
    "promtool, which must find nothing at all to say against it."
    ended = subprocess.run([PROMTOOL, *map(str, arguments)], input=text, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


class Prometheus:
    "Prometheus with ops/prometheus.yml: another target, key and folder of rules, and intervals of a second."

    def __init__(self, folder, target, key):
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        (folder / "key").write_text(key)
        rules = yaml.safe_load((OPS / "alerts.yml").read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                if "for" in rule:
                    rule["for"] = "3s"
        (folder / "alerts.yml").write_text(yaml.safe_dump(rules))
        settings = yaml.safe_load((OPS / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(folder / Path(name).name) for name in settings["rule_files"]]
        [scrape] = settings["scrape_configs"]
        scrape["authorization"]["credentials_file"] = str(folder / "key")
        [scrape["static_configs"][0]["targets"]] = [[target]]
        self.config, self.log = folder / "prometheus.yml", folder / "log"
        self.config.write_text(yaml.safe_dump(settings))
        command = [PROMETHEUS, f"--config.file={self.config}", f"--storage.tsdb.path={folder / 'data'}"]
        self.process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"],
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def api(self, path, **query):
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def query(self, expression):
        return self.api("query", query=expression)["result"]

    def firing(self):
        return {
            alert["labels"]["alertname"]: alert["annotations"]
            for alert in self.api("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def until(self, condition, meanwhile=lambda: None, seconds=120):
        "Wait for what Prometheus must come to see; something may be done all the while."
        end = time.monotonic() + seconds
        while not (result := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, (self.firing(), self.api("targets")["activeTargets"])
            meanwhile()
            time.sleep(0.2)
        return result

    def fires(self, *names, **how):
        self.until(lambda: {*names} <= {*self.firing()}, **how)
        return self.firing()

    def is_silent(self, *names):
        self.until(lambda: not {*names} & {*self.firing()})

    def __enter__(self):
        end = time.monotonic() + 60
        while True:
            try:
                self.api("status/runtimeinfo")
                return self
            except (OSError, AssertionError):
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
                time.sleep(0.1)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


class Watched:
    "Two workers with keys and a PostgreSQL store, and the Prometheus that watches them."

    def __init__(self, folder, postgres):
        self.folder, self.models, keys = folder, folder / "models", folder / "keys.json"
        publish_board(self.models, version="first")
        self.key, scraping = add_key(keys, "shop", "admin"), add_key(keys, "prometheus", "read")
        self.server = Server(
            folder,
            self.models,
            workers=2,
            auth="on",
            api_keys_file=keys,
            database_url=new_database(postgres),
            watch_seconds=0.1,
            rate_limit=0,
        )
        self.prometheus = Prometheus(folder / "prometheus", f"127.0.0.1:{self.server.port}", scraping)

    def ask(self, method, path, body=None):
        return self.server.ask(method, path, body, {"X-API-Key": self.key})

    def workers(self):
        children = psutil.Process(self.server.process.pid).children()

        def is_worker(child):
            try:
                return "spawn_main" in " ".join(child.cmdline())
            except psutil.Error:  # it has died meanwhile
                return False

        return [child for child in children if is_worker(child)]

    def publish(self, version, change=lambda path: None):
        "Make a model live that is changed before anybody sees it, by a hand that checks nothing."
        made = publish_board(self.folder / "elsewhere", version=version)
        change(made)
        shutil.copytree(made, self.models / version)
        atomic_write(self.models / "current", version)

    def traffic(self):
        "A bit of everything that is counted."
        for user in (1, 2, 2, "nobody"):
            assert self.ask("GET", f"/recommend/{user}?n=3")[0] == 200
        assert self.ask("POST", "/recommend", {"users": [1, 3], "n": 3})[0] == 200
        assert self.ask("POST", "/recommend", {"users": [1], "n": 24})[0] == 200  # there are not so many: a shortfall
        assert self.ask("POST", "/events", {"events": [{"user_id": 5, "item_id": 101}]})[0] == 200
        assert self.ask("POST", "/items", {"items": [{"item_id": 900, "title": "New"}]})[0] == 200
        assert self.ask("GET", "/no/such/path")[0] == 404


@pytest.fixture(scope="module")
def watched(tmp_path_factory, postgres):
    watched = Watched(tmp_path_factory.mktemp("watched"), postgres)
    with watched.server, watched.prometheus:
        yield watched


# the tests below run in this order: each makes one trouble and ends it, and the last ones take the service down


def test_a_healthy_service_raises_no_alarm(watched):
    prometheus = watched.prometheus
    prometheus.until(lambda: prometheus.query("sum_over_time(up[1m]) >= 10"), meanwhile=watched.traffic)
    [target] = prometheus.api("targets")["activeTargets"]
    assert target["labels"]["job"] == "product_recs" and target["health"] == "up", target
    rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in the_rules()]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    assert prometheus.firing() == {}
    assert prometheus.query("product_recs_build_info")[0]["value"][1] == "1"
    assert prometheus.query("product_recs_workers")[0]["value"][1] == "2"
    assert prometheus.query("product_recs_model_items")[0]["value"][1] == "24"
    assert prometheus.query("product_recs_store_up")[0]["metric"]["database"] == "postgresql"


def test_promtool_finds_nothing_to_say(watched):
    status, _, text = watched.ask("GET", "/metrics")
    done = promtool("check", "metrics", text=text.decode())
    assert status == 200 and done.stdout + done.stderr == ""
    names = [line.split()[2] for line in text.decode().splitlines() if line.startswith("# HELP")]
    assert len(names) == len({*names}) and all(name.startswith("product_recs_") for name in names)
    helps = [line.split(maxsplit=3) for line in text.decode().splitlines() if line.startswith("# HELP")]
    assert all(len(words) == 4 and "Multiprocess" not in words[3] for words in helps), helps
    promtool("check", "rules", OPS / "alerts.yml")
    promtool("check", "config", "--syntax-only", OPS / "prometheus.yml")
    promtool("check", "config", watched.prometheus.config)


def test_the_unit_tests_of_the_alerts_know_each_of_them():
    promtool("test", "rules", OPS / "alerts_test.yml")
    checks = [
        check
        for test in yaml.safe_load((OPS / "alerts_test.yml").read_text())["tests"]
        for check in test["alert_rule_test"]
    ]
    for rule in the_rules():
        tried = [bool(check["exp_alerts"]) for check in checks if check["alertname"] == rule["alert"]]
        waits = "for" in rule
        assert tried.count(True) == 1 and tried.count(False) == 1 + waits, rule["alert"]


def test_each_expression_of_the_dashboard_has_a_value(watched):
    dashboard = json.loads((OPS / "grafana/dashboards/product_recs.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    expressions += [note["expr"].removesuffix(" > 0") for note in dashboard["annotations"]["list"]]
    assert len(expressions) > 25
    for expression in expressions:
        rows = watched.prometheus.query(expression.replace("$__rate_interval", "1m"))
        assert any(row["value"][1] != "NaN" for row in rows), (expression, rows)  # NaN: a route that nobody asked
    shown = {panel["title"]: panel["targets"] for panel in dashboard["panels"] if panel.get("targets")}
    [workers] = watched.prometheus.query(shown["Workers"][0]["expr"])
    assert workers["value"][1] == "2"


def test_an_old_model(watched):
    def aged(path):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["created_at"] = (datetime.now(timezone.utc) - timedelta(days=20)).isoformat(timespec="seconds")
        (path / "manifest.json").write_text(json.dumps(manifest))

    watched.publish("old", aged)
    assert "trained 20d 0h" in watched.prometheus.fires("ModelTooOld")["ModelTooOld"]["summary"]
    watched.publish("fresh")
    watched.prometheus.is_silent("ModelTooOld")


def test_what_the_monitor_found(watched):
    then = datetime.now(timezone.utc) - timedelta(days=3)
    odd = [Check("events", "stop", "No event.", group="input", value=0), Check("hours", "look", "Odd.", group="input")]
    keep_verdicts(watched.models, odd, ["input"], then, scheduled=True)
    alerts = watched.prometheus.fires("MonitorStop", "MonitorLook", "MonitorSilent")
    assert alerts["MonitorStop"]["summary"] == "events (input): going on would do harm"
    assert alerts["MonitorSilent"]["summary"].startswith("The monitor has not judged input for 3d 0h")
    text = watched.ask("GET", "/metrics")[2].decode()
    assert 'product_recs_check_level{check="events",group="input"} 2.0' in text
    promtool("check", "metrics", text=text)
    keep_verdicts(
        watched.models, [replace(check, level="fine") for check in odd], ["input"], datetime.now(timezone.utc), True
    )
    watched.prometheus.is_silent("MonitorStop", "MonitorLook", "MonitorSilent")


def test_a_broken_model(watched):
    watched.publish("broken", lambda path: os.truncate(next(path.glob("*item_factors.npy")), 100))
    watched.prometheus.fires("ModelRefused")
    assert watched.ask("GET", "/recommend/1")[1]["x-model-version"] == "fresh"
    publish(watched.models, "fresh")
    watched.prometheus.is_silent("ModelRefused")


def test_a_worker_that_hangs_at_the_model_before(watched):
    hanging = watched.workers()[0]
    hanging.send_signal(signal.SIGSTOP)
    try:
        watched.publish("newer")
        assert "2 models" in watched.prometheus.fires("WorkersDisagree")["WorkersDisagree"]["summary"]
    finally:
        hanging.send_signal(signal.SIGCONT)
    watched.prometheus.is_silent("WorkersDisagree")


def test_slow_answers(watched):
    "A request lasts until its body has come; these bodies come slowly."
    body = json.dumps({"users": [1], "n": 3}).encode()

    def ask_slowly(_):
        connection = http.client.HTTPConnection("127.0.0.1", watched.server.port, timeout=60)
        connection.putrequest("POST", "/recommend")
        connection.putheader("X-API-Key", watched.key)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:5])
        time.sleep(1.5)
        connection.send(body[5:])
        answer = connection.getresponse()
        answer.read(), connection.close()
        return answer.status

    def many_ask_slowly():
        with ThreadPoolExecutor(20) as pool:
            assert {*pool.map(ask_slowly, range(20))} == {200}

    watched.prometheus.fires("SlowAnswers", meanwhile=many_ask_slowly)


def test_a_stopped_database(watched, postgres):
    "What cannot be written waits in memory, up to a limit; then it is dropped, and that is told."
    prometheus = watched.prometheus
    postgres.stop()
    try:
        alerts = prometheus.fires(
            "StoreDown",
            "StoreFails",
            meanwhile=lambda: watched.ask("POST", "/events", {"events": [{"user_id": 5, "item_id": 103}]}),
        )
        assert "postgresql" in alerts["StoreDown"]["summary"]
        many = {"users": [f"guest {k}" for k in range(1000)], "n": 1}
        key = {"X-API-Key": watched.key}
        prometheus.fires("ImpressionsDropped", meanwhile=lambda: both(watched.server, "/recommend", "POST", many, key))
    finally:
        start_postgres(postgres)
    prometheus.is_silent("StoreDown")
    prometheus.until(lambda: prometheus.query('product_recs_impressions_total{result="written"} > 20000'))


def test_workers_that_die_and_find_no_model(watched):
    prometheus = watched.prometheus
    prometheus.until(lambda: prometheus.query("product_recs_workers == 2"))  # a change is one from what was seen
    (watched.models / "current").unlink()
    born = "changes(product_recs_worker_start_timestamp_seconds[15m])"
    for kill in range(1, 5):
        alive = prometheus.until(lambda: len(workers := watched.workers()) == 2 and workers)
        alive[kill % 2].kill()
        prometheus.until(lambda kill=kill: prometheus.query(f"{born} >= {kill}"))
    names = "WorkersRestart", "NoModel", "ManyFailures"
    alerts = prometheus.fires(*names, meanwhile=lambda: watched.ask("GET", "/recommend/1"))
    assert "times in a quarter of an hour" in alerts["WorkersRestart"]["summary"]
    assert prometheus.query("product_recs_model_workers") == []
    publish(watched.models, "first")
    prometheus.is_silent("NoModel")


def test_a_service_that_is_gone(watched):
    watched.server.process.send_signal(signal.SIGTERM)
    assert watched.server.process.wait(60) == 0
    watched.prometheus.fires("ServiceDown")
    seen = {*watched.prometheus.firing()}
    assert "NoModel" not in seen, "who does not answer is said to be down, and nothing else"
