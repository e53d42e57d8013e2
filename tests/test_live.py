"""Models change while they answer: real bundles, published and broken on disk, while threads and processes read."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import bundle_by_hand, once_today

from product_recs.answer.recommender import Recommender
from product_recs.bundle.files import current_version, previous_versions, publish
from product_recs.bundle.live import LiveModel, NoModel, Reload, rollback
from product_recs.bundle.versions import version_facts
from product_recs.bundle.ready import ReadyModel
from product_recs.core.errors import BundleError
from product_recs.core.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
ITEMS = 2000


def write(models_dir, version, best):
    """A model that recommends item `best` to its one user."""
    factors = np.full((ITEMS, 8), 0.01, np.float32)
    factors[best - 1] = 1
    return bundle_by_hand(
        models_dir,
        user_factors=np.ones((1, 8)),
        item_factors=factors,
        snapshot=once_today(np.arange(ITEMS)[None] == 0, np.ones(ITEMS, int)),
        users=[7],
        items=range(1, ITEMS + 1),
        version=version,
    )


def live_model(models_dir, **options):
    return LiveModel(models_dir, lambda bundle: ReadyModel(bundle).prepare(), watch_seconds=0.01, **options)


def until(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def models(tmp_path):
    write(tmp_path, "v1", 11)
    publish(tmp_path, "v1")
    return tmp_path


@pytest.fixture
def live(models):
    live = live_model(models)
    live.start()
    yield live
    live.stop()


def test_threads_that_answer_never_see_a_mixture_or_an_error(models, live):
    """Each answer is the one of the model that it names, through eight swaps, while old folders are deleted."""
    expected, wrong, counts, end = {"v1": 11}, [], {}, threading.Event()

    def ask():
        while not end.is_set():
            model = live.get()
            try:
                item, version = Recommender(model).recommend(7, 1).items[0], model.bundle.version
            except Exception as error:
                wrong.append(error)
                return
            if expected[version] != item:
                wrong.append((version, item))
            counts[version] = counts.get(version, 0) + 1

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    versions = ["v1"]
    for k in range(2, 10):
        version, expected[f"v{k}"] = f"v{k}", 10 + k
        write(models, version, 10 + k)
        publish(models, version)
        versions.append(version)
        assert until(lambda: live.version == versions[-1]), live.refused
        if k > 3:
            shutil.rmtree(models / f"v{k - 2}")
        assert until(lambda: counts.get(versions[-1])), "nobody was answered by the new model"
    end.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and set(counts) == set(versions)


@pytest.mark.parametrize(
    "name",
    [
        "als.item_factors.npy",
        "als.user_factors.npy",
        "seen_indices.npy",
        "seen_data.npy",
        "items.parquet",
        "users.parquet",
        "manifest.json",
    ],
)
def test_a_bundle_damaged_in_any_file_is_refused_and_the_old_model_answers(models, live, name):
    path = write(models, "v2", 12)
    if name == "manifest.json":
        (path / name).write_text((path / name).read_text()[:-100])
        atomic_write(models / "current", "v2\n")
    else:
        flip(path / name)
        with pytest.raises(BundleError):
            publish(models, "v2")
        atomic_write(models / "current", "v2\n")
    assert until(lambda: live.refused is not None)
    assert live.refused.version == "v2" and name in live.refused.error
    assert live.version == "v1" and Recommender(live.get()).recommend(7, 1).items == [11]
    publish(models, "v1")
    assert until(lambda: live.refused is None) and live.version == "v1"


def test_a_broken_bundle_is_tried_once_and_again_when_it_changes_or_somebody_asks(models, live):
    path, results = write(models, "v2", 12), []
    content = (path / "als.item_factors.npy").read_bytes()
    live.listen(results.append)
    flip(path / "als.item_factors.npy")
    atomic_write(models / "current", "v2\n")
    assert until(lambda: results)
    time.sleep(0.2)  # twenty looks
    assert [result.status for result in results] == ["refused"]
    assert live.reload().status == "refused" and len(results) == 2 and live.version == "v1"
    (path / "als.item_factors.npy").write_bytes(content)
    assert until(lambda: live.version == "v2") and live.refused is None
    assert live.reload() == Reload("unchanged", "v2") and results[-1] == Reload("reloaded", "v2")


def test_a_copy_that_comes_after_current_is_taken_up_when_it_is_complete(models, live, tmp_path_factory):
    """What a slow copy to another host looks like: the name first, then one file after another."""
    path = write(tmp_path_factory.mktemp("elsewhere"), "v2", 12)
    atomic_write(models / "current", "v2\n")
    assert until(lambda: live.refused is not None) and live.version == "v1"
    (models / "v2").mkdir()
    for file in sorted(path.iterdir(), key=lambda file: file.name != "manifest.json"):
        assert live.version == "v1" and Recommender(live.get()).recommend(7, 1).items == [11]
        shutil.copy(file, models / "v2")
        time.sleep(0.03)
    assert until(lambda: live.version == "v2") and live.refused is None
    assert Recommender(live.get()).recommend(7, 1).items == [12]


@pytest.mark.parametrize("content", [b"", b"..", b"v9\n", b"v1\x00", b"\xff\xfe", None])
def test_whatever_stands_in_current_the_model_goes_on(models, live, content):
    current = models / "current"
    if content is None:
        current.unlink()
    else:
        atomic_write(current, content)
    assert until(lambda: live.refused is not None) and live.refused.error
    assert live.version == "v1" and Recommender(live.get()).recommend(7, 1).items == [11]
    write(models, "v2", 12)
    current.unlink(missing_ok=True)
    publish(models, "v2")
    assert until(lambda: live.version == "v2") and live.refused is None


def test_the_first_model_is_taken_up_while_waiting(tmp_path):
    live = live_model(tmp_path / "models")
    live.start()
    try:
        with pytest.raises(NoModel, match="no model is live"):
            live.get()
        write(tmp_path / "models", "v1", 11)
        publish(tmp_path / "models", "v1")
        assert until(lambda: live.version == "v1") and Recommender(live.get()).recommend(7, 1).items == [11]
    finally:
        live.stop()


def test_a_worker_that_starts_while_current_is_broken_answers_as_the_others(models):
    path = write(models, "v2", 12)
    publish(models, "v2")
    flip(path / "seen_data.npy")
    live = live_model(models)
    live.start()
    try:
        assert live.version == "v1" and Recommender(live.get()).recommend(7, 1).items == [11]
        assert live.refused.version == "v2" and "seen_data.npy" in live.refused.error
    finally:
        live.stop()


def test_a_folder_without_one_usable_model_says_why(models, caplog):
    flip(models / "v1" / "als.item_factors.npy")
    live = live_model(models)
    with caplog.at_level(logging.ERROR, "product_recs.live"):
        live.look()
    with pytest.raises(NoModel, match=r"als\.item_factors\.npy.*sha256") as raised:
        live.get()
    assert raised.value.public == "model v1 cannot be used"
    assert "there is no other" in caplog.text


def test_short_of_open_files_for_a_moment_refuses_no_good_model(models, live):
    """The process has no file left when the second model comes; when it has some again, nobody has to do anything."""
    results, held = [], []
    live.listen(results.append)
    write(models, "v2", 12)
    (models / "next").write_text("v2\n")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        os.rename(models / "next", models / "current")
        assert until(lambda: results)
        assert results[0].status == "refused" and "Too many open files" in results[0].error
        assert live.version == "v1" and Recommender(live.get()).recommend(7, 1).items == [11]
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert until(lambda: live.version == "v2") and live.refused is None
    assert Recommender(live.get()).recommend(7, 1).items == [12]


def test_a_failing_preparation_is_tried_less_and_less_and_logged_once(models, caplog):
    """Pauses of minutes, so that no try comes by itself here; the time of the next one tells the pause."""

    def cannot(bundle):
        raise MemoryError("no room")

    live, pauses = LiveModel(models, cannot, watch_seconds=100, retry_seconds=1000), []
    with caplog.at_level(logging.ERROR, "product_recs.live"):
        for _ in range(7):
            live._schedule.again_at = 0  # the pause is over
            live._look()
            pauses.append(live._schedule.again_at - time.monotonic())
            live._look()  # and now it is not
    assert [round(pause, -2) for pause in pauses] == [100, 200, 400, 800, 1000, 1000, 1000]
    assert [record.message.count("no room") for record in caplog.records] == [1]
    since = live.refused.since
    assert live.reload().status == "refused" and live.refused.since == since
    live.prepare = lambda bundle: ReadyModel(bundle).prepare()
    assert (
        live.reload() == Reload("reloaded", "v1") and live.refused is None and live._schedule.again_at == float("inf")
    )


def test_what_else_lies_in_the_folder_hides_no_model_and_stops_no_way_back(models, live):
    """Another tool's manifests, half copies, files and a `current` that somebody spoilt."""
    write(models, "v2", 12)
    publish(models, "v2")
    assert until(lambda: live.version == "v2")
    for name, content in {
        "tool": '{"format": 3}',
        "older": '{"format": 1}',
        "list": "[1]",
        "text": "no json",
        "a b": "{}",
    }.items():
        (models / name).mkdir()
        (models / name / "manifest.json").write_text(content)
    (models / "dir" / "manifest.json").mkdir(parents=True)
    (models / "empty").mkdir()
    (models / "notes.txt").write_text("x")
    whole = json.loads((models / "v1" / "manifest.json").read_text())
    parts = {"shape": {"users": "many"}, "files": {"a": 1}, "path": {"../a": {"bytes": 1, "sha256": ""}}}
    for name, part in parts.items():
        (models / name).mkdir()
        (models / name / "manifest.json").write_text(
            json.dumps(whole | {"shape" if name == "shape" else "files": part})
        )
    usable = [(model["mark"], model["version"]) for model in version_facts(models) if "error" not in model]
    assert usable == [("live", "v2"), ("-1", "v1")]
    for name in ("tool", "older", "list", "text", "shape", "files", "path", "a b", "empty"):
        with pytest.raises(BundleError):
            publish(models, name)
    atomic_write(models / "current", "../v1\n")
    atomic_write(models / "previous", "../v1\ntool\nno such\nv1\n")
    assert previous_versions(models) == ["tool", "v1"]
    assert rollback(models, "v1") == "v1" and current_version(models) == "v1"
    assert until(lambda: live.version == "v1")


def test_a_reader_in_another_process_sees_every_version_whole(models, tmp_path):
    """A process that is told nothing but the folder prints each version with its item."""
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from product_recs.bundle.ready import ReadyModel; from product_recs.answer.recommender import Recommender
from product_recs.bundle.live import LiveModel
live = LiveModel({str(models)!r}, lambda bundle: ReadyModel(bundle).prepare(), 0.005)
answer = lambda: Recommender(live.get()).recommend(7, 1)
live.listen(lambda result: print(result.status, result.version, answer().items[0], flush=True))
live.start()
time.sleep(60)
"""
    output = tmp_path / "reader.log"
    with output.open("w") as file:
        reader = subprocess.Popen(
            [sys.executable, "-c", program], stdout=file, env={**os.environ, "PRODUCT_RECS_ROOT": str(tmp_path)}
        )
    try:
        assert until(lambda: output.read_text() == "reloaded v1 11\n", 30), output.read_text()
        for k in range(2, 6):
            write(models, f"v{k}", 10 + k)
            publish(models, f"v{k}")
            line = f"reloaded v{k} {10 + k}\n"
            assert until(lambda line=line: line in output.read_text()), output.read_text()
        assert rollback(models) == "v4" and until(lambda: output.read_text().endswith("reloaded v4 14\n"))
    finally:
        reader.send_signal(signal.SIGKILL)
        reader.wait()
    assert "refused" not in output.read_text()


def test_history_of_publishing(models):
    assert previous_versions(models) == []
    for k in range(2, 15):
        write(models, f"v{k}", 11)
        publish(models, f"v{k}")
    assert previous_versions(models) == [f"v{k}" for k in range(13, 3, -1)], "ten are remembered"
    assert rollback(models) == "v13" and rollback(models) == "v12", "the second step goes further back, not forward"
    shutil.rmtree(models / "v11")
    assert rollback(models) == "v10", "a deleted version is passed over"
    flip(models / "v9" / "als.item_factors.npy")
    with pytest.raises(BundleError, match="sha256"):
        rollback(models)
    assert current_version(models) == "v10" and rollback(models, "v8") == "v8"
    publish(models, "v8")
    assert previous_versions(models) == ["v7", "v6", "v5", "v4"], "publishing the live version again changes nothing"


def test_command_goes_back(models):
    write(models, "v2", 12)
    publish(models, "v2")
    program = "import sys; from product_recs.jobs.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments, "--models-dir", str(models)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )

    listed = json.loads(run("models", "--json").stdout)
    assert [(model["mark"], model["version"]) for model in listed] == [("live", "v2"), ("-1", "v1")]
    back = run("rollback")
    assert back.returncode == 0 and current_version(models) == "v1" and "v1 is live again" in back.stdout
    again = run("rollback")
    assert again.returncode == 1 and "no earlier version" in again.stderr and current_version(models) == "v1"
    assert run("rollback", "v2").returncode == 0 and current_version(models) == "v2"
