"""Several workers, watched from outside: their numbers add up, dead ones are replaced, and what they say can be read by
a program."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import httpx2
import psutil
import pytest
import yaml

from product_recs.jobs.checks import Check
from product_recs.jobs.monitor import keep_verdicts
from product_recs.web.monitor import verdict_text
from product_recs.web.security import add_key

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = "product_recs_http_requests_total"
APPLICATION = """
import asyncio, os
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from product_recs.core.settings import Settings
from product_recs.web.monitor import Metrics, log_config, shared_folder, workers_folder
from product_recs.web.security import Guard
from product_recs.web.problems import RequestLog, http_problem, log_to_stdout, parameter_problem

def create_app():
    app, settings, metrics = FastAPI(), Settings(), Metrics()
    log_to_stdout()
    metrics.model.taken_up("v1", "2026-01-01T00:00:00+00:00", 7, 5)

    @app.get("/health/live")
    async def live(): return os.getpid()
    @app.get("/recommend/{user}")
    async def recommend(user: int, wait: float = 0):
        if wait:
            with open(os.environ["TMPDIR"] + "/begun", "a") as file: file.write("x")
            await asyncio.sleep(wait)
        metrics.recommended("personalised")
        metrics.cache(True)
        return os.getpid()
    @app.post("/events")
    async def events(body: dict): metrics.events("accepted")
    @app.get("/fault")
    async def fault(): raise RuntimeError("a fault of ours")
    @app.get("/metrics")
    def scrape(): return Response(metrics.body(), media_type=metrics.content_type)
    @app.post("/fall-behind")
    async def fall_behind():
        (
            metrics.store_error("add_events"),
            metrics.store_up("sqlite", False),
            metrics.impressions("dropped"),
            metrics.model.reload("refused"),
            metrics.recommended("popular", True),
        )

    app.add_exception_handler(HTTPException, http_problem)
    app.add_exception_handler(RequestValidationError, parameter_problem)
    app.add_middleware(Guard, settings=settings, shared_folder=workers_folder())
    app.add_middleware(
        RequestLog,
        observe=lambda line, seconds: metrics.observe(line["route"], line["method"], line["status"] or 499, seconds),
    )
    return app

if __name__ == "__main__":
    import sys, uvicorn
    with shared_folder(int(sys.argv[2])):
        uvicorn.run(
            "watched:create_app",
            factory=True,
            port=int(sys.argv[1]),
            workers=int(sys.argv[2]),
            access_log=False,
            log_config=log_config("INFO"),
            timeout_graceful_shutdown=10,
            timeout_worker_healthcheck=30,
        )
"""


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return result


class Service:
    """The small application, its workers and its logs."""

    def __init__(self, folder, workers=2):
        self.folder, self.tmp, self.workers = folder, folder / "tmp", workers
        self.tmp.mkdir(parents=True)
        (folder / "watched.py").write_text(APPLICATION)
        self.key = add_key(folder / "keys.json", "prometheus", "read")
        self.writer = add_key(folder / "keys.json", "shop", "admin")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PRODUCT_RECS_")}
        environment |= {
            "PYTHONPATH": f"{ROOT}:{folder}",
            "TMPDIR": str(self.tmp),
            "PRODUCT_RECS_AUTH": "on",
            "PRODUCT_RECS_API_KEYS_FILE": str(folder / "keys.json"),
        }
        command = [sys.executable, str(folder / "watched.py"), str(self.port), str(workers)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=(folder / "out").open("w"),
            stderr=(folder / "err").open("w"),
            stdin=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        assert wait_for(lambda: len(self.alive()) == workers, 60), (folder / "err").read_text()

    def alive(self):
        """Process ids that answer, each asked over a connection of its own."""
        processes = set()
        for _ in range(12):
            try:
                processes.add(self.get("/health/live").json())
            except httpx2.TransportError:
                assert self.process.poll() is None, (self.folder / "err").read_text()
        return processes

    def get(self, path, key=None, method="GET", **options):
        with httpx2.Client(base_url=self.url, timeout=30) as client:
            return client.request(method, path, headers={"X-API-Key": key or self.key}, **options)

    def numbers(self):
        answer = self.get("/metrics")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        }

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("watched"))
    yield service
    service.stop()


def requests(numbers):
    counts = Counter()
    for name, value in numbers.items():
        if match := re.fullmatch(rf'{REQUESTS}\{{method="(\w+)",route="([^"]+)",status="(\d+)"\}}', name):
            counts[match.groups()] = value
    return counts


def test_every_request_to_every_worker_is_counted_once(service):
    before, pids = service.numbers(), Counter()
    for k in range(60):
        pids[service.get(f"/recommend/{k}").json()] += 1
    for _ in range(3):
        assert service.get("/recommend/x").status_code == 422
        assert service.get("/recommend/1", key="wrong").status_code == 401
        assert service.get("/events", method="POST", json={}).status_code == 403
        assert service.get("/fault").status_code == 500
        assert service.get("/no/such/path").status_code == 404
        assert service.get("/events", key=service.writer, method="POST", content=b"x" * 2_000_000).status_code == 413
    after = service.numbers()
    assert len(pids) == 2, pids
    counted = requests(after) - requests(before)
    assert counted == {
        ("GET", "/recommend/{user}", "200"): 60,
        ("GET", "/recommend/{user}", "422"): 3,
        ("GET", "other", "401"): 3,
        ("POST", "other", "403"): 3,
        ("GET", "/fault", "500"): 3,
        ("GET", "other", "404"): 3,
        ("POST", "other", "413"): 3,
        ("GET", "/metrics", "200"): 1,
    }
    name = 'product_recs_http_request_duration_seconds_count{route="/recommend/{user}"}'
    assert after[name] - before.get(name, 0) == 63
    assert (
        after['product_recs_recommendations_total{source="personalised"}']
        - before.get('product_recs_recommendations_total{source="personalised"}', 0)
        == 60
    )
    assert after["product_recs_workers"] == after['product_recs_model_workers{version="v1"}'] == 2


def test_every_line_of_the_logs_is_json(service):
    service.get("/fault")
    out = wait_for(lambda: (service.folder / "out").read_text().splitlines())
    lines = [json.loads(line) for line in out]
    assert {"request_id", "status", "route"} <= set(lines[0])
    assert any(line["status"] == 401 for line in lines) or service.get("/recommend/1", key="wrong").status_code == 401
    operation = [json.loads(line) for line in (service.folder / "err").read_text().splitlines()]
    assert any("Uvicorn running" in line["message"] for line in operation) and {
        line["logger"] for line in operation
    } >= {"uvicorn.error"}
    assert service.key not in (service.folder / "out").read_text() + (service.folder / "err").read_text()


def test_a_killed_worker_is_replaced_and_its_counts_stay(service):
    for k in range(10):
        service.get(f"/recommend/{k}")
    before, pids = service.numbers(), service.alive()
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    answered = [service.get("/recommend/1").status_code for _ in range(20) if not time.sleep(0.02)]
    assert set(answered) == {200}, "new connections go to the other worker"
    assert wait_for(lambda: len(service.alive() - {victim}) == 2), (service.folder / "err").read_text()
    after = wait_for(lambda: (numbers := service.numbers())["product_recs_workers"] == 2 and numbers)
    name = ("GET", "/recommend/{user}", "200")
    assert requests(after)[name] == requests(before)[name] + 20, "what the dead worker counted is kept"
    assert after['product_recs_model_workers{version="v1"}'] == 2
    assert any("died" in json.loads(line)["message"] for line in (service.folder / "err").read_text().splitlines())


def series(expression):
    """Names of metrics and of labels in a PromQL expression."""
    bare = re.sub(r'"[^"]*"', '""', re.sub(r"\[[^\]]*\]", "", expression))
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", bare)) | {
        label.strip() for grouping in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", bare) for label in grouping.split(",")
    }
    words = set(re.findall(r"\b[a-z_]\w*\b(?!\s*\()", re.sub(r"\b(?:by|on)\s*\([^)]*\)|\{[^}]*\}", " ", bare)))
    return words - {"or", "and", "unless"}, labels


def test_the_dashboard_and_the_alerts_ask_for_what_there_is(service, tmp_path):
    assert (
        service.get("/recommend/1").status_code == 200
        and service.get("/fall-behind", key=service.writer, method="POST").status_code == 200
    )
    # what `product-recs monitor` has judged stands beside the models, of which this application has none
    groups = keep_verdicts(
        tmp_path, [Check("events", "fine", "As ever.", group="input")], ["input"], datetime.now(timezone.utc), True
    )
    judged = [line.rsplit(" ", 1)[0] for line in verdict_text(groups).splitlines() if not line.startswith("#")]
    metrics = [*service.numbers(), *judged]
    names = {name.split("{")[0] for name in metrics} | {"up"}
    labels = {label for name in metrics for label in re.findall(r'(\w+)="', name)} | {"job", "instance"}
    dashboard = json.loads((ROOT / "ops/grafana/dashboards/product_recs.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])] + [
        note["expr"] for note in dashboard["annotations"]["list"]
    ]
    rules = [
        rule for group in yaml.safe_load((ROOT / "ops/alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]
    used = set()
    for expression in shown + [rule["expr"] for rule in rules]:
        asked, by = series(expression)
        assert asked and asked <= names and by <= labels, (expression, asked - names, by - labels)
        assert expression.count("(") == expression.count(")"), expression
        used |= {name.removesuffix("_bucket") for name in asked}
    kinds = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in names}
    assert kinds - used == set(), "everything that is counted is shown"
    assert all(rule["annotations"]["action"] for rule in rules)
    legends = {
        label
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"])
    }
    assert legends <= labels
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]), "ids of panels are unique"


def test_compose_and_its_files_belong_together():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]
    for name, service in services.items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in compose["volumes"], (name, mount)
        assert set(service.get("depends_on", {})) <= set(services)
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy" and "healthcheck" in services[needed]
    text = (ROOT / "compose.yaml").read_text()
    variables = set(re.findall(r"\$\{(\w+)", text))
    assert variables == set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert all(f"${{{name}:?" in text for name in variables if name.endswith("PASSWORD")), (
        "there is no default password"
    )
    scrape = yaml.safe_load((ROOT / "ops/prometheus.yml").read_text())
    source = yaml.safe_load((ROOT / "ops/grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][
        0
    ]
    dashboard = json.loads((ROOT / "ops/grafana/dashboards/product_recs.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel} == {
        source["uid"]
    } and "//prometheus:" in source["url"]
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["api:8000"]
    assert (
        scrape["scrape_configs"][0]["authorization"]["credentials_file"]
        == f"/run/secrets/{services['prometheus']['secrets'][0]}"
    )


def test_sigterm_finishes_what_runs_and_leaves_nothing(tmp_path):
    service, answers = Service(tmp_path / "ending"), []
    assert [path for path in service.tmp.iterdir() if path.name.startswith("product_recs-")]
    threads = [
        threading.Thread(target=lambda: answers.append(service.get("/recommend/1?wait=2").status_code))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: (service.tmp / "begun").exists() and len((service.tmp / "begun").read_text()) == 6)
    children = psutil.Process(service.process.pid).children(recursive=True)
    service.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert service.process.wait(30) == 0 and answers == [200] * 6
    assert len(children) >= 2 and psutil.wait_procs(children, timeout=20)[1] == []
    assert not [path for path in service.tmp.iterdir() if path.name.startswith("product_recs-")], (
        "the folder of the workers is gone"
    )


def test_one_worker_counts_without_a_folder(tmp_path):
    service = Service(tmp_path / "alone", workers=1)
    try:
        assert service.get("/recommend/1").status_code == 200
        numbers = service.numbers()
        assert (
            requests(numbers)[("GET", "/recommend/{user}", "200")] == 1
            and numbers["product_recs_workers"] == 1
            and 'product_recs_model_trained_timestamp_seconds{version="v1"}' in numbers
        )
        assert not [path for path in service.tmp.iterdir() if path.name.startswith("product_recs-")]
    finally:
        service.stop()
