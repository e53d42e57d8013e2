"""Cleaning beside what works: real services, writers and publishers; nothing that is live or in use goes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from support import ROOT, Server, call, fresh_project, only_the_jobs, publish_board, until

from product_recs.bundle.files import hold, list_versions, live_version, previous_versions, publish, remove_unused
from product_recs.bundle.opening import open_bundle
from product_recs.core.errors import BundleError
from product_recs.feedback.records import Impression, NewEvent
from product_recs.feedback.store import Store
from product_recs.jobs.clean import clean, old_models, unfinished


def old(store, days, count, start=0):
    moment = store.cut(0) - timedelta(days=days)
    return [Impression(f"r{k}", k % 9, "v", "popular", (1, 2), moment) for k in range(start, start + count)]


def nothing(folder, **more):
    "Options of a cleaning that looks at nothing but this folder."
    places = {name: folder / name for name in ("reports", "data")}
    return places | {"progress": False} | more


def test_impressions_go_while_others_write(url, opened):
    "Writers and readers go on in two threads; all of theirs is there in the end, and all of the old is gone."
    store, other = opened(Store(url)), opened(Store(url))
    for start in range(0, 20_000, 10_000):
        store.add_impressions(old(store, 100, 10_000, start))
    store.add_impressions(old(store, 80, 50))
    failures, added, done = [], [0], threading.Event()

    def write():
        while not done.is_set():
            try:
                other.add_events([NewEvent(1, added[0])])
                other.add_impressions(old(other, 0, 1))
                added[0] += 1
                time.sleep(0.002)  # as requests leave pauses
            except Exception as error:
                failures.append(error)
                return

    writer = threading.Thread(target=write)
    writer.start()
    until(lambda: added[0] > 1)
    batches = []

    def between(rows):  # nothing is locked here, so others get on
        batches.append(added[0])
        until(lambda: failures or added[0] > batches[-1])

    deleted = store.delete_impressions(store.cut(0) - timedelta(days=90), done=between)
    done.set()
    writer.join()
    assert not failures and deleted == 20_000 and len(batches) >= 3
    assert store.impressions_before(store.cut(0) - timedelta(days=79))[0] == 50
    assert len(list(store.read_events())) == added[0] and len(store.impressions(10**6)) == added[0] + 50
    assert store.delete_impressions(store.cut(0) - timedelta(days=90)) == 0


def test_two_cleanings_at_once_share_the_work(url, opened):
    stores = [opened(Store(url)) for _ in range(2)]
    stores[0].add_impressions(old(stores[0], 100, 8000))
    before, deleted = stores[0].cut(0) - timedelta(days=90), []
    threads = [
        threading.Thread(target=lambda store=store: deleted.append(store.delete_impressions(before)))
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(deleted) == 8000 and stores[0].impressions() == []


def test_a_worker_keeps_the_model_that_it_answers_from(tmp_path):
    """The service has not looked for a newer model yet: its own is neither live nor the way back nor among the newest,
    and stays. Once it has taken up the live one, the old one goes, and no request fails."""
    models = tmp_path / "models"
    first = publish_board(models).name
    with Server(tmp_path, models, watch_seconds=3600) as server:
        answer = server.get("/recommend/1?n=1")
        assert answer[1]["x-model-version"] == first
        later = [publish_board(models).name for _ in range(4)]
        done = clean(models, 1, **nothing(tmp_path))
        assert list_versions(models) == [first, *later[-2:]] and done.stays[first] == "a process has it open"
        assert done.stays[later[-2]] == "rollback goes back to it" and done.stays[later[-1]] == "it is live"
        assert server.get("/recommend/1?n=1")[2] == answer[2]
        assert server.get("/items/101")[0] == server.get("/similar/101")[0] == server.get("/users/1/export")[0] == 200
        assert server.ask("POST", "/model/reload")[0] == 200
        assert server.get("/recommend/1?n=1")[1]["x-model-version"] == later[-1]

        def gone():  # the garbage of a worker is collected now and then
            server.get("/recommend/2")
            clean(models, 1, **nothing(tmp_path))
            return list_versions(models) == later[-2:]

        until(gone, 60)
        assert server.get("/recommend/1?n=1")[2] == answer[2]
    assert live_version(models) == later[-1] and previous_versions(models)[0] == later[-2]


def test_who_publishes_meanwhile_has_a_whole_bundle_or_an_error(tmp_path):
    "One thread goes from version to version by hand while another deletes all that it may."
    versions = [publish_board(tmp_path).name for _ in range(12)]
    done, errors = threading.Event(), []

    def publishing():
        for version in versions[:-3]:
            try:
                publish(tmp_path, version)
            except BundleError as error:
                errors.append(str(error))
            if live_version(tmp_path) not in list_versions(tmp_path):
                errors.append("what is live is not there")
        done.set()

    thread = threading.Thread(target=publishing)
    thread.start()
    while not done.is_set():
        for version in versions:
            remove_unused(tmp_path, version)
    thread.join()
    for version in versions:
        remove_unused(tmp_path, version)
    assert "what is live is not there" not in errors
    assert open_bundle(tmp_path, verify=True).version == live_version(tmp_path)
    left = {live_version(tmp_path), *previous_versions(tmp_path)[:1]}
    assert {*list_versions(tmp_path)} == left and not [path for path in tmp_path.glob(".*") if path.is_dir()]


def test_a_killed_cleaning_has_broken_nothing(tmp_path):
    versions = [publish_board(tmp_path / "models").name for _ in range(10)]
    program = f"""
from product_recs.jobs.clean import clean
print("ready", flush=True)
clean({str(tmp_path / "models")!r}, 1, reports={str(tmp_path)!r}, data={str(tmp_path)!r}, progress=False)
"""
    for wait in (0.0, 0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for version in list_versions(tmp_path / "models"):  # what is there is whole
            open_bundle(tmp_path / "models", version, verify=True)
        assert live_version(tmp_path / "models") == versions[-1]
    for path in (tmp_path / "models").glob(".*"):
        os.utime(path, (0, 0))
        for inner in path.rglob("*"):
            os.utime(inner, (0, 0))
    clean(tmp_path / "models", 1, **nothing(tmp_path))
    assert list_versions(tmp_path / "models") == versions[-2:]
    assert {path.name for path in (tmp_path / "models").iterdir()} == {*versions[-2:], "current", "previous"}


def test_who_waits_who_is_named_and_a_registry_that_is_away(tmp_path, monkeypatch):
    models = tmp_path / "models"
    versions = [publish_board(models).name for _ in range(5)]
    newer = publish_board(models, metrics={"needs_a_person": ["look"]}).name
    newest = publish_board(models).name
    publish(models, versions[4])
    publish(models, versions[3])
    held = hold(models / versions[2])
    (tmp_path / "experiments.yaml").write_text(
        "experiments: [{name: new, arms: [{name: a, share: 0.5}, "
        f"{{name: b, share: 0.5, model: '{versions[1]}'}}]}}]"
    )
    places = nothing(tmp_path, experiments=tmp_path / "experiments.yaml")
    done = clean(models, 1, **places, dry_run=True)
    assert [model.path.name for model in done.gone] == [versions[0]] and list_versions(models)[0] == versions[0]
    assert done.stays[newer] == "it waits for a person" and done.stays[newest] == "it is the newest"
    assert done.stays[versions[2]] == "a process has it open" and "experiments.yaml" in done.stays[versions[1]]
    assert clean(models, 0, **places).gone == []
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("PRODUCT_RECS_MLFLOW", "on")
    away = clean(models, 1, **places)
    assert away.gone == [] and "No model is deleted" in away.trouble[0] and len(list_versions(models)) == 7
    monkeypatch.setenv("PRODUCT_RECS_MLFLOW", "off")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert [model.path.name for model in clean(models, 1, **places).gone] == [versions[0]]
    del held
    assert [model.path.name for model in old_models(models, 1)[0]] == versions[1:3]


def test_what_cannot_be_cleaned_holds_up_nothing_else(tmp_path, opened):
    "A store that is no database, and a folder that is a file."
    (tmp_path / "feedback.db").write_text("no database at all, and long enough to be looked at" * 100)
    (tmp_path / "reports").write_text("a file")
    versions = [publish_board(tmp_path / "models").name for _ in range(4)]
    store = opened(Store(f"sqlite:///{tmp_path}/feedback.db"))
    done = clean(tmp_path / "models", 1, store, **nothing(tmp_path))
    assert list_versions(tmp_path / "models") == versions[-2:] and len(done.trouble) == 1
    assert done.trouble[0].startswith("Impressions: feedback store") and done.impressions == 0


def test_a_folder_that_nobody_may_look_into_and_one_with_a_date():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        closed, dated = folder / ".shop.abcd1234" / "closed", folder / ".shop.20260301"  # somebody's copy
        closed.mkdir(parents=True)
        dated.mkdir()
        closed.chmod(0)
        for path in (closed, closed.parent, dated):
            os.utime(path, (0, 0))
        try:
            if os.getuid() == 0:
                os.seteuid(65534)  # root looks everywhere
            assert [leftover.path for leftover in unfinished([folder])] == [closed.parent]
        finally:
            os.seteuid(os.getuid())
            closed.chmod(0o755)


def test_the_verb(tmp_path):
    root = fresh_project(tmp_path)
    only_the_jobs(root)
    versions = [publish_board(root / "models").name for _ in range(4)]
    with Store(f"sqlite:///{root}/data/feedback.db") as store:
        store.add_impressions([*old(store, 100, 30), *old(store, 10, 20)])
    half = root / "data" / "processed" / ".shop.abcd1234"
    half.mkdir(parents=True)
    os.utime(half, (0, 0))
    looked = call(root, "product-recs", "clean", "--dry-run", "--keep-models", "2", "--quiet")
    assert looked.returncode == 0 and "would go" in looked.stdout and versions[1] in looked.stdout, looked.stderr
    assert list_versions(root / "models") == versions and half.exists()
    done = call(root, "product-recs", "clean", "--keep-models", "2", "--quiet")
    assert done.returncode == 0 and "30 impressions, 2 models and 1 unfinished folder deleted" in done.stdout
    section = json.loads((root / "reports" / "clean" / "metrics.json").read_text())["clean"]
    assert section["impressions_deleted"] == 30 and section["models_deleted"] == versions[:2]
    assert section["leftovers_deleted"] == [str(half)] and not section["trouble"] and not section["dry_run"]
    assert list_versions(root / "models") == versions[2:] and (root / "reports" / "clean" / "clean.html").exists()
    wrong = call(root, "product-recs", "clean", "--keep-models", "-1")
    assert wrong.returncode == 2
