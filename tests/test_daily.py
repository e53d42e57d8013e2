"""Whole nights as a scheduler starts them: what is new comes in, bad data stop, a worse model is held, a kill at any
moment changes nothing, and somebody who reads the page knows what to do."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import yaml
from commands import words_of, wrong_with
from nightly import (
    NIGHT, command, day_of, environment, family, kill_at, latest, log_until, plant, result, run_night, shop, shuffled,
    wait_for, write_log,
)  # fmt: skip
from support import ROOT, Server, call

from product_recs.bundle.files import list_versions, live_version, read_manifest
from product_recs.data.ledger import open_ledger
from product_recs.jobs.nights import decisions_of, nights_of, who_works

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are copies on Linux alone")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A shop after its first night."
    root = shop(tmp_path_factory.mktemp("shop"))
    done = run_night(root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done


@pytest.fixture
def copy(first, tmp_path):
    "The same, for a test that changes it."
    return shutil.copytree(first[0], tmp_path / "shop", symlinks=True)


def tell(root, *words):
    return call(root, "product-recs", "daily", "--name", "shop", *words)


def files_of(root):
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*")}


def flat(done):
    "What the console said, without its line ends."
    return " ".join(done.stdout.split())


def test_first_night_trains_publishes_and_writes_lists(first):
    root, done = first
    assert "was judged and is live" in flat(done) and done.stderr == ""
    night = latest(root)
    states = {step: record["state"] for step, record in night.steps.items()}
    before = ["01_ingest", "input", "02_features", "03_train", "04_evaluate", "05_inference"]
    assert [*states] == [*before, "gate", "diff", "batch", "outcome", "clean"]
    assert {step for step, state in states.items() if state != "done"} == {"diff"}
    assert live_version(root / "models") == night.facts["version"]
    outcome = result(root)
    assert outcome["verdict"] == "promoted" and outcome["rest"] == [] and len(outcome["rows"]) == 5 * 359
    page = (root / "reports/daily/shop/index.html").read_text()
    for link in re.findall(r'href="([^"]+)"', page):
        assert (root / "reports/daily/shop" / link).exists(), link
    assert "<script" not in page and "src=" not in page
    for record in night.steps.values():
        assert not record.get("page") or (night.folder / record["page"]).exists()


def test_a_second_start_finds_nothing_new(copy):
    before = result(copy)
    done = run_night(copy)
    assert done.returncode == 0 and "Nothing new since the night" in flat(done)
    assert {**result(copy), "status": 0, "states": 0, "live is tonight's": 0} == {
        **before, "status": 0, "states": 0, "live is tonight's": 0}  # fmt: skip
    night = latest(copy)
    assert len(list_versions(copy / "models")) == 1 and night.status == "nothing new"
    assert [*night.steps] == ["01_ingest", "outcome", "clean"]  # what customers see, and what is too old


@pytest.mark.slow
def test_a_feed_that_has_stopped_is_told(copy):
    "Its days are long over, and nothing new comes: each night says so, by its exit code, too."
    done = run_night(copy, "-p", "monitor", "{max_data_days: 7}")
    assert done.returncode == 4 and "Nothing new since the night" in flat(done), done.stdout + done.stderr
    assert "Somebody should look at the outcome." in flat(done) and "The last event that it learned was" in flat(done)
    verdicts = json.loads((copy / "models/monitor.json").read_text())["groups"]
    assert {group for group, verdict in verdicts.items() if "scheduled" in verdict} == {"input", "staleness"}
    assert verdicts["input"]["at"] >= latest(copy).started[:19]  # the verdict on the data still holds
    page = (copy / "reports/daily/shop/index.html").read_text()
    assert 'class="outcome tone-wait"' in page


@pytest.mark.slow
def test_dry_run_says_what_would_be_and_touches_nothing(copy):
    half = copy / "models" / ".daily-shop"
    half.mkdir()
    before = files_of(copy)
    done = run_night(copy, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.strip().splitlines())
    assert lines["Lock"] == "free" and lines["Live model"] == live_version(copy / "models")
    assert lines["Deletes"] == str(half) and "03_train" in lines["Steps"] and "batch" in lines["Steps"]
    assert files_of(copy) == before
    wrong = run_night(copy, "--dry-run", "-p", "factor=3")
    assert wrong.returncode == 1 and "no notebook has a parameter 'factor'" in wrong.stderr
    for job, name in (("monitor", "parts"), ("monitor", "scheduled"), ("gate", "dry_run")):  # would pass a broken day
        asked = ("-f", "shop.yaml", "--name", "shop", "--dry-run", "-p", f"{job}={{{name}: []}}")
        wrong = call(copy, "product-recs", "daily", *asked)
        assert wrong.returncode == 1 and f"{job}: '{name}' is set by the night itself" in wrong.stderr, wrong.stderr
    assert files_of(copy) == before


@pytest.mark.slow
def test_bad_day_stops_until_a_person_decides(copy, monkeypatch):
    "The rows of a day are of another system's users."
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(copy))
    live, good, bad = live_version(copy / "models"), day_of("2026-06-23"), shuffled(day_of("2026-06-24"))
    write_log(copy, pd.concat([log_until("2026-06-23"), good, bad]))
    for _ in range(2):  # every night
        done = run_night(copy)
        assert done.returncode == 4, done.stdout + done.stderr
        assert "2026-06-24 cannot be trusted" in flat(done) and "2026-06-23" not in done.stdout
        assert live_version(copy / "models") == live and len(list_versions(copy / "models")) == 1
    night = latest(copy)
    assert [*night.steps] == ["01_ingest", "input", "outcome", "clean"] and night.steps["input"]["state"] == "stopped"
    page = (copy / "reports/daily/shop/index.html").read_text()
    commands = [words for _, words in night.facts["next"]]
    assert all(words in done.stdout and words in page for words in commands)
    accept, leave_out, again = map(shlex.split, commands)
    refused = call(copy, *accept)  # as printed, with NAME and TEXT
    assert refused.returncode == 1 and "say who decides" in refused.stderr and decisions_of("shop") == {}
    sure = {"NAME": "Ada", "TEXT": "ids of another system"}
    decision = call(copy, *[sure.get(word, word) for word in leave_out])
    assert decision.returncode == 0 and decisions_of("shop")["2026-06-24"].by == "Ada", decision.stderr
    assert again[:4] == ["product-recs", "daily", "--name", "shop"]
    done = call(copy, *again, "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr
    ledger = open_ledger(copy / "data/processed/shop")
    assert ledger.rows_left_out == len(bad) and ledger.rows_kept == 11_280 + len(good)
    assert ledger.rows_read == ledger.rows_kept + ledger.rows_left_out
    assert read_manifest(copy / "models" / live_version(copy / "models"))["data"]["last_timestamp"] < "2026-06-24"
    assert live_version(copy / "models") != live and decisions_of("shop")["2026-06-24"].reason == sure["TEXT"]
    # the other answer: the day was as it was
    assert tell(copy, "--accept", "2026-06-24", "--by", "Bob", "--reason", "a new market").returncode == 0
    done = call(copy, *again, "--quiet")
    assert done.returncode in (0, 3, 4) and "cannot be trusted" not in done.stdout, done.stderr
    ledger = open_ledger(copy / "data/processed/shop")
    assert ledger.rows_left_out == 0 and ledger.rows_kept == 11_280 + len(good) + len(bad)
    assert latest(copy).steps["input"]["state"] == "done"


@pytest.mark.slow
def test_gate_holds_a_worse_model(tmp_path):
    "The model before knows the shop; tonight's is the best sellers alone."
    root = shop(tmp_path / "shop", model="item-item cosine")
    done = run_night(root)
    assert done.returncode == 0, done.stdout + done.stderr
    live = live_version(root / "models")
    write_log(root, log_until("2026-06-24"))
    done = run_night(root, "-p", "model=popularity")
    night = latest(root)
    assert done.returncode == 4 and night.status == "held", done.stdout + done.stderr
    assert live_version(root / "models") == live and f"Model {live} stays live" in flat(done)
    assert "publish it all the same" in done.stdout and night.steps["diff"]["state"] == "done"
    made = json.loads((root / "data/batch/mail/manifest.json").read_text())["model_version"]
    assert made == live  # the lists are of what is live
    again = run_night(root, "-p", "model=popularity")
    assert again.returncode == 0 and "Nothing new" in flat(again)


@pytest.mark.slow
def test_events_of_the_service_are_trained_on_the_next_night(first, copy, tmp_path):
    "What a real service was told between two nights."
    store = f"sqlite:///{tmp_path}/feedback.db"
    day = day_of("2026-06-23")
    (tmp_path / "service").mkdir()
    with Server(tmp_path / "service", copy / "models", database_url=store) as server:
        events = [{"user_id": int(row.user_id), "item_id": int(row.item_id), "event": row.event,
                   "timestamp": row.timestamp} for row in day.itertuples()]  # fmt: skip
        status, _, body = server.ask("POST", "/events", events)
        if status == 422:
            status, _, body = server.ask("POST", "/events", {"events": events})
        assert status in (200, 201, 202), body
        time.sleep(2.5)  # the ingest takes what is older than two seconds
        would = run_night(copy, "--dry-run", env=environment(copy, store))
        assert f"New in the feedback of the service: {len(day)} events" in would.stdout, would.stdout
        done = run_night(copy, env=environment(copy, store))
        assert done.returncode in (0, 3), done.stdout + done.stderr
        night = latest(copy)
        assert night.facts["new"] == len(day) and night.steps["clean"]["state"] == "done"
        assert night.steps["outcome"]["state"] == night.steps["diff"]["state"] == "done"
        judged = json.loads((night.folder / "outcome/metrics.json").read_text())["monitor"]
        assert judged["parts"] == ["staleness", "serving", "outcome"]
        version = live_version(copy / "models")
        assert version == night.facts["version"]
        assert read_manifest(copy / "models" / version)["data"]["last_timestamp"] >= "2026-06-23"
        end = time.monotonic() + 20
        while server.get("/recommend/1")[1]["x-model-version"] != version:
            assert time.monotonic() < end, "the service did not take it up"
            time.sleep(0.1)


@pytest.mark.slow
def test_two_nights_at_once_and_a_lock_that_is_left(copy):
    write_log(copy, log_until("2026-06-24"))
    lock = copy / "reports/daily/shop/lock.json"
    process = subprocess.Popen(command(*NIGHT), cwd=copy, env=environment(copy), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    wait_for(lambda: who_works(lock) is not None, process)
    other = run_night(copy)
    assert other.returncode == 5 and f"process {process.pid} of" in other.stderr and "since" in other.stderr
    would = run_night(copy, "--dry-run")
    assert f"held by process {process.pid}" in would.stdout
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run_night(copy)
    assert done.returncode == 0 and f"taken over from process {process.pid}" in flat(done)
    assert who_works(lock) is None and lock.read_text() == ""


@pytest.mark.slow
@linux
def test_killed_trainer_fails_in_words_and_the_next_start_goes_on(copy):
    live = live_version(copy / "models")
    write_log(copy, log_until("2026-06-24"))
    process = subprocess.Popen(command(*NIGHT), cwd=copy, env=environment(copy), stdin=subprocess.DEVNULL, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def training():
        return latest(copy).steps.get("03_train", {}).get("state") == "running" and kernels_of(process)

    wait_for(training, process)
    for kernel in kernels_of(process):
        kernel.kill()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "memory of the machine ran out" in " ".join(out.split()), out
    assert live_version(copy / "models") == live and latest(copy).status == "failed"
    done = run_night(copy)
    night = latest(copy)
    assert done.returncode == 0 and night.starts == 2 and "It was interrupted 1 time" in flat(done)
    assert len(nights_of(copy / "reports/daily/shop")) == 2 and result(copy)["rest"] == []


def kernels_of(process):
    "Leaders of sessions of their own among its descendants."
    return [child for child in family(process) if os.getsid(child.pid) == child.pid and child.pid != process.pid]


def test_step_that_fails_outside_of_a_notebook_fails_the_night(copy):
    "The monitor says what nobody understands."
    write_log(copy, log_until("2026-06-24"))
    declared = 'run = ""\nmodels_dir = ""\nreport_dir = ""\nparts = ""\naccepted = []\nscheduled = False'
    declared += "\nmax_data_days = 7.0"
    plant(copy, "monitor", declared, "1/0")
    done = run_night(copy)
    assert (
        done.returncode == 1 and "ZeroDivisionError" in done.stdout and "failed in the step Input checks" in done.stdout
    )
    assert "03_train" not in latest(copy).steps and live_version(copy / "models")


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="a small disk of its own needs root")
def test_full_disk_leaves_the_live_model(copy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (copy / "models").rglob("*")) + 40_000
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        shutil.copytree(copy / "models", disk / "models")
        live = live_version(disk / "models")
        write_log(copy, log_until("2026-06-24"))
        done = run_night(copy, "--models-dir", str(disk / "models"))
        assert done.returncode == 1 and "disk is full" in flat(done), done.stdout + done.stderr
        assert live_version(disk / "models") == live and list_versions(disk / "models") == [live]
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        done = run_night(copy, "--models-dir", str(disk / "models"))
        assert done.returncode == 0 and latest(copy).starts == 2, done.stdout + done.stderr
        assert live_version(disk / "models") != live and not list((disk / "models").glob(".*-shop"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_registry_that_is_down_is_said_and_changes_nothing(copy):
    pytest.importorskip("mlflow")
    write_log(copy, log_until("2026-06-24"))
    away = environment(copy, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    done = run_night(copy, env=away)
    assert done.returncode == 3 and "MLflow has not been told" in flat(done), done.stderr
    assert "No model is deleted" in flat(done)  # nobody can say which ones an alias names
    assert live_version(copy / "models") == latest(copy).facts["version"]


@pytest.mark.slow
def test_killed_at_three_moments_ends_as_if_nothing_had_been(copy, tmp_path):
    write_log(copy, log_until("2026-06-24"))
    undisturbed, started = shutil.copytree(copy, tmp_path / "undisturbed"), time.monotonic()
    assert run_night(undisturbed).returncode == 0
    lasts, expected, draw = time.monotonic() - started, result(undisturbed), random.Random(7)
    killed, resumable = 0, False
    for part in range(3):
        if kill_at(copy, lasts * (part + draw.random()) / 3 * 0.9):
            killed += 1
            resumable |= latest(copy).status == "" and latest(copy).is_done("01_ingest")
    assert killed, "no kill came while a night was at work"
    done = run_night(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    nights = nights_of(copy / "reports/daily/shop")
    assert not resumable or max(night.starts for night in nights) > 1, "a night began anew after a kill"
    outcome = result(copy)
    if "Nothing new" in flat(done):  # the last kill came after the end
        outcome |= {name: expected[name] for name in ("status", "states", "live is tonight's")}
    assert outcome == expected
    assert not [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(copy)]


EXAMPLES = ROOT / "examples" / "daily"


def test_the_commands_of_the_schedulers_are_the_same_and_would_run(tmp_path):
    "One command in three forms, with options that it has."
    [line] = re.findall(r"(?m)^[\d*].*$", (EXAMPLES / "crontab").read_text())
    assert re.match(r"\d+ \d+ \* \* \* cd /srv/shop && product-recs ", line), line
    [unit] = re.findall(r"(?m)^ExecStart=(.+)$", (EXAMPLES / "product-recs-daily.service").read_text())
    assert unit.startswith("/srv/shop/.venv/bin/product-recs ")
    container = kubernetes_container()
    nights = [words_of(line.split("&& ")[1]), words_of(unit), container["command"][1:]]
    assert container["command"][0] == "product-recs" and nights[0] == nights[1] == nights[2], nights
    assert nights[0][0] == "daily" and not wrong_with(nights[0]), wrong_with(nights[0])


def kubernetes_container():
    documents = [document for document in yaml.safe_load_all((EXAMPLES / "cronjob.yaml").read_text()) if document]
    [job] = [document for document in documents if document["kind"] == "CronJob"]
    assert job["spec"]["concurrencyPolicy"] == "Forbid" and job["spec"]["jobTemplate"]["spec"]["backoffLimit"] == 0
    [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return container


def test_the_job_of_kubernetes_is_valid_and_stands_on_the_image_of_a_workspace():
    container = kubernetes_container()
    assert container["resources"]["limits"]["memory"]
    dockerfile = (ROOT / "product_recs/jobs/workspace/Dockerfile").read_text()
    [folder] = re.findall(r"(?m)^WORKDIR (\S+)$", dockerfile)
    assert re.search(r"(?m)^FROM base AS jobs$", dockerfile) and "workingDir" not in container
    # what is copied into the image is not hidden by a volume, and what a night writes survives it
    mounts = {mount["mountPath"]: mount["subPath"] for mount in container["volumeMounts"]}
    assert mounts == {f"{folder}/{name}": name for name in ("data", "models", "reports")}
    validate = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all((EXAMPLES / "cronjob.yaml").read_text()):
        validate.validate(document, "1.31", strict=True)


def test_systemd_takes_the_units(tmp_path):
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("there is no systemd-analyze")
    program = tmp_path / "product-recs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in ("product-recs-daily.service", "product-recs-daily.timer"):
        text = (EXAMPLES / name).read_text()
        (tmp_path / name).write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", text))
    checked = subprocess.run([analyze, "verify", "--man=no", *map(str, tmp_path.glob("product-recs-daily.*"))],
                             capture_output=True, text=True)  # fmt: skip
    assert checked.returncode == 0 and "product-recs-daily" not in checked.stderr, checked.stderr
