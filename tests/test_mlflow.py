"""Runs and models in MLflow: without a server, with a real one, with one that is away, and services that follow."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
from support import BIN, ROOT, Server, call, fresh_project, only_the_jobs, publish_board, until

from product_recs.bundle.files import annotate, list_versions, live_version, read_manifest
from product_recs.core.settings import Settings
from product_recs.jobs.follow import Follower
from product_recs.jobs.registry import Registry, promote, register
from product_recs.jobs.tracking import Tracking, connected, is_installed, tracking_of

pytestmark = pytest.mark.skipif(not is_installed(), reason="there is no MLflow: pip install 'product-recs[mlflow]'")
CHAMPION = "models:/product-recs@champion"
KERNEL = {"name": "python3", "display_name": "python3", "language": "python"}
QUICK = (
    "run", "--quiet", "-p", "model=popularity", "-p", "next_model=popularity", "-p", "models=popularity",
    "-p", "cold=no", "-p", "bootstrap=50", "-p", "diversity=[]",
)  # fmt: skip


def full_mlflow():
    """The program `mlflow` of an environment that has its server; ours has the client alone. Where there is none, it is
    installed into .venv-mlflow, once."""
    own = ROOT / ".venv-mlflow" / "bin" / "mlflow"
    for program in (os.environ.get("MLFLOW"), own, shutil.which("mlflow", path=os.environ.get("PATH", ""))):
        if program and Path(program).exists():
            python = Path(program).with_name("python")
            probe = subprocess.run([python, "-c", "import flask, mlflow"], capture_output=True, timeout=120)
            if probe.returncode == 0:
                return str(program)
    subprocess.run([sys.executable, "-m", "venv", own.parents[1]], check=True, timeout=120)
    pip = [own.with_name("python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "mlflow>=3.17"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"the server of MLflow cannot be installed: {done.stderr[-300:]}")
    return str(own)


class MLflow:
    "A server on loopback: SQLite, and its own store of artifacts."

    def __init__(self, folder):
        self.program, self.folder, self.process = full_mlflow(), folder, None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [
            self.program, "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            stdout=(self.folder / "server.log").open("a"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        until(self.answers, 300)  # the server imports for half a minute on a busy machine
        return self

    def answers(self):
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=20) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self):
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
        self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = MLflow(tmp_path_factory.mktemp("mlflow"))
    try:
        yield started.start()
    finally:
        started.kill()


@pytest.fixture(autouse=True)
def no_other_server(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def registry_at(uri, name="product-recs"):
    tracking = Tracking(uri, model=name)
    with connected(tracking) as client:
        yield Registry(client, tracking)


def logged(client, name):
    "The one run of this name."
    experiment = client.get_experiment_by_name("product-recs")
    [run] = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return run


def artifacts(client, run, folder):
    return {Path(file.path).name for file in client.list_artifacts(run.info.run_id, folder)}


def test_nobody_asked(tmp_path):
    "MLflow is installed, and nobody has named a server or made the store: nothing is written, nothing imported."
    publish_board(tmp_path / "models")
    other = publish_board(tmp_path / "models").name
    program = (
        "import sys; from product_recs.jobs.cli import main; "
        f"code = main(['rollback']) or main(['publish', {other!r}]); print(code, 'mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=os.environ | {"PRODUCT_RECS_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 False" and done.stderr == ""
    assert not (tmp_path / "mlruns").exists()


@pytest.fixture(scope="module")
def project(tmp_path_factory, server):
    "A project whose run went to the server."
    root = fresh_project(tmp_path_factory.mktemp("kept"))
    only_the_jobs(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        done = call(root, "product-recs", "run", "--quiet", "--name", "nightly")
    assert done.returncode == 0, done.stderr
    return root, done


@pytest.mark.slow
def test_a_run_is_logged_whole(project, server):
    root, done = project
    version = live_version(root / "models")
    said = [line for line in done.stderr.splitlines() if "signaler.cpp" not in line]  # ZeroMQ, when a kernel ends
    assert len(said) == 1 and "Warning" not in done.stderr, done.stderr
    assert f"Kept in MLflow at {server.uri}: version 1 of product-recs is @champion" in done.stderr
    metrics = json.loads((root / "reports/nightly/metrics.json").read_text())
    with registry_at(server.uri) as registry:
        run = logged(registry.client, "nightly")
        assert run.info.status == "FINISHED" and run.data.tags["kind"] == "run"
        assert version in run.data.tags["mlflow.note.content"]
        assert run.data.params["03_train.factors"] == "64" and run.data.params["01_ingest.run"] == "nightly"
        evaluated = metrics["04_evaluate"]
        served = evaluated["served"]["discovery"]["model"]
        [row] = [
            row
            for row in evaluated["table"]
            if (row["task"], row["model"], row["metric"], row["k"]) == ("discovery", served, "ndcg", 10)
        ]
        for side, name in (("value", ""), ("low", "_low"), ("high", "_high")):
            assert run.data.metrics[f"discovery/ndcg_at_10{name}"] == pytest.approx(row[side])
        judged = {(row["task"], row["model"], row["metric"], row["k"]) for row in evaluated["table"]}
        names = [name for name in run.data.metrics if "/models/" in name and not name.endswith(("_low", "_high"))]
        assert len(names) == len(judged)
        fingerprint = metrics["01_ingest"]["fingerprint"]
        assert run.data.tags["data_fingerprint"] == fingerprint
        assert fingerprint.startswith(run.inputs.dataset_inputs[0].dataset.digest)
        assert {"index.html", "01_ingest.html", "04_evaluate.html", "metrics.json", "evaluation.csv"} <= artifacts(
            registry.client, run, "reports"
        )
        plots = artifacts(registry.client, run, "plots")
        assert Counter(name.split("-")[0] for name in plots)["04_evaluate"] >= 5
        champion = registry.find("@champion")
        assert (champion.version, champion.run_id, champion.aliases) == (version, run.info.run_id, ("champion",))
        assert champion.tags["data_fingerprint"] == fingerprint and champion.tags["model.discovery"] == served


@pytest.mark.slow
def test_the_bundle_holds_no_pickle(project, server):
    stored = [path for path in (server.folder / "artifacts").rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in stored)
    assert [path for path in stored if path.suffix in (".pkl", ".pickle", ".joblib")] == []
    [model] = [path for path in stored if path.name == "MLmodel"]
    assert "mlflow.pyfunc.loaders.code_model" in model.read_text() and "python_model.pkl" not in model.read_text()


@pytest.mark.slow
def test_predict_is_what_the_service_answers(project, server, tmp_path, monkeypatch):
    root, _ = project
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    import mlflow

    mlflow.set_tracking_uri(server.uri)
    try:
        model = mlflow.pyfunc.load_model(CHAMPION)
    finally:
        mlflow.set_tracking_uri(None)
    users = [*range(1, 361, 7), 999_999]  # and a stranger
    table = pd.DataFrame({"user_id": users})
    with Server(tmp_path, root / "models") as service:
        for params in (
            {},
            {"n": 3},
            {"n": 20, "task": "next_purchase"},
            {"n": 7, "diversity": 0.5},
            {"include_seen": True},
        ):
            asked = {"n": 10, **params}
            include = asked.pop("include_seen", False)
            query = "&".join(f"{name}={value}" for name, value in asked.items())
            expected = [service.get(f"/recommend/{user}?{query}")[2] for user in users]
            if include:
                body = {"users": users, "n": 10, "filters": {"exclude_seen": False}}
                expected = service.ask("POST", "/recommend", body)[2]["results"]
                expected = [{name: result[name] for name in ("user_id", "recommendations")} for result in expected]
            assert model.predict(table, params=params) == expected, params
        assert service.get("/recommend/1?n=10")[2] != expected[0]  # what user 1 has had is in this one


@pytest.mark.slow
def test_a_comparison_is_a_run_too(project, server, monkeypatch):
    root, _ = project
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    version = live_version(root / "models")
    done = call(root, "product-recs", "evaluate", "--compare", version, version, "--quiet")
    assert done.returncode == 0 and "Kept in MLflow" in done.stderr, done.stderr
    with registry_at(server.uri) as registry:
        run = logged(registry.client, f"{version} against {version}")
        assert run.data.metrics["discovery/difference/ndcg_at_10"] == 0 and run.data.params["run"] == "nightly"
        assert artifacts(registry.client, run, "reports") == {"comparison.txt"}


@pytest.mark.slow
def test_without_a_server_and_back_again(tmp_path, monkeypatch):
    "The store of the project; the alias follows `run`, `publish` and `rollback`, and the gate's verdict is a tag."
    root = fresh_project(tmp_path)
    only_the_jobs(root)
    monkeypatch.setenv("PRODUCT_RECS_MLFLOW", "on")
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(root))
    done = call(root, "product-recs", *QUICK, "--name", "first")
    assert done.returncode == 0 and "version 1 of product-recs is @champion" in done.stderr, done.stderr
    monkeypatch.delenv("PRODUCT_RECS_MLFLOW")  # the store is there now, so it is used
    first = live_version(root / "models")
    failed = call(root, "product-recs", "run", "--quiet", "--name", "broken", "-p", "source=nowhere.csv")
    assert failed.returncode == 1 and "Kept in MLflow" in failed.stderr
    annotate(root / "models" / first, {"gate": {"verdict": "promoted", "reasons": ["It is better."], "by": "gate"}})
    second = publish_board(root / "models").name
    annotate(root / "models" / second, {"gate": {"verdict": "held", "reasons": ["It is a toy."]}})
    listed = {}

    def look():
        with connected(tracking := tracking_of(Settings())) as client:
            registry = Registry(client, tracking)
            listed.update({entry.version: entry for entry in registry.versions()})
            return registry.aliases()

    said = call(root, "product-recs", "rollback", first)
    assert "In MLflow version 1 of product-recs is @champion" in said.stderr and look() == {"champion": 1}
    registered = call(root, "product-recs", "registry", "register", second)
    assert registered.returncode == 0 and look() == {"champion": 1, "challenger": 2}
    assert listed[first].tags["gate.verdict"] == "promoted" and listed[second].tags["gate.reasons"] == "It is a toy."
    assert call(root, "product-recs", "publish", second).returncode == 1 and look() == {"champion": 1, "challenger": 2}
    decided = call(root, "product-recs", "publish", second, "--by", "Ada", "--reason", "a toy is wanted")
    assert decided.returncode == 0 and look() == {"champion": 2}
    back = call(root, "product-recs", "rollback")
    assert back.returncode == 0 and look() == {"champion": 1}, (back.stdout, back.stderr, listed)
    table = call(root, "product-recs", "registry", "list").stdout
    assert re.search(rf"1  {first} .*@champion", table) and "gate: held (It is a toy.)" in table
    with connected(tracking_of(Settings())) as client:
        assert logged(client, "broken").info.status == "FAILED" and logged(client, "first").info.status == "FINISHED"
    assert not (root / "mlflow.db").exists() and (root / "mlruns/mlflow.db").exists()


def test_a_registry_that_is_away_fails_no_run(tmp_path, monkeypatch):
    root = fresh_project(tmp_path)
    only_the_jobs(root)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://shop:secret@127.0.0.1:{port}")
    done = call(root, "product-recs", *QUICK, "--name", "alone")
    version = live_version(root / "models")
    assert done.returncode == 0 and version
    note = f"note: MLflow has not been told: MLflow at http://***@127.0.0.1:{port}: Connection refused."
    assert note in done.stderr and f"product-recs registry register {version}" in done.stderr, done.stderr
    assert "secret" not in done.stderr + done.stdout
    back = call(root, "product-recs", "publish", publish_board(root / "models").name)
    assert back.returncode == 0
    for verb in (("list",), ("promote", version), ("pull",)):
        refused = call(root, "product-recs", "registry", *verb)
        assert refused.returncode == 1 and "Connection refused" in refused.stderr and "Traceback" not in refused.stderr


def has_protobuf(process):
    "Has it imported MLflow? Its client maps the compiled part of protobuf, and nothing of ours does."
    return any("google/_upb" in mapped.path for mapped in process.memory_maps())


class Shoppers:
    "Ask all the time, and keep what was not a 200."

    def __init__(self, service):
        self.service, self.failed, self.versions, self.ended = service, [], Counter(), threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(number,)) for number in range(2)]

    def ask(self, number):
        user = number
        while not self.ended.is_set():
            user = user % 20 + 1
            try:
                status, headers, _ = self.service.get(f"/recommend/{user}?n=1")
            except OSError as error:
                status, headers = str(error), {}
            self.versions[headers.get("x-model-version")] += 1
            if status != 200:
                self.failed.append(status)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.slow
def test_two_workers_follow_an_alias(server, tmp_path, monkeypatch):
    """It moves while shoppers ask; the server is killed, and comes back; a rollback by hand stays; no request fails."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    trainer, shop, name = tmp_path / "trainer", tmp_path / "shop", "followed"
    first = publish_board(trainer).name
    second, third = (publish_board(trainer, range(1, size), range(101, 100 + size)).name for size in (23, 21))

    def move(version):
        with registry_at(server.uri, name) as registry:
            promote(registry, register(registry, trainer / version))

    move(first)
    command = [str(BIN / "product-recs"), "serve"]
    follow = {"follow": f"models:/{name}@champion", "follow_seconds": 0.2, "root": tmp_path}

    def all_answer(service, version):
        return all(service.get(f"/recommend/{user}")[1].get("x-model-version") == version for user in range(1, 20))

    with Server(tmp_path, shop, workers=2, command=command, **follow) as service:
        until(lambda: all_answer(service, first), 60)
        with Shoppers(service) as shoppers:
            move(second)
            until(lambda: all_answer(service, second), 60)
            family = psutil.Process(service.process.pid).children(recursive=True)
            following = [process for process in family if "follow_beside" in " ".join(process.cmdline())]
            others = [psutil.Process(service.process.pid), *(process for process in family if process not in following)]
            assert len(following) == 1 and has_protobuf(following[0])
            assert len(others) >= 3 and not any(map(has_protobuf, others))

            server.kill()
            until(lambda: "is not followed now" in service.stderr.read_text(), 60)
            rolled = call(tmp_path, "product-recs", "rollback", "--models-dir", str(shop))
            assert rolled.returncode == 0 and "MLflow has not been told" in rolled.stderr
            until(lambda: all_answer(service, first), 30)
            server.start()
            until(lambda: "can be followed again" in service.stderr.read_text(), 90)
            assert live_version(shop) == first  # by hand, and the alias has not moved since
            following[0].kill()  # it is started again
            move(third)
            until(lambda: all_answer(service, third), 90)
        assert shoppers.failed == [] and {first, second, third} <= set(shoppers.versions)
        [follower] = [
            process
            for process in psutil.Process(service.process.pid).children(recursive=True)
            if "follow_beside" in " ".join(process.cmdline())
        ]
    until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE, 20)


@pytest.mark.slow
def test_a_service_that_dies_takes_the_follower_along(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    publish_board(tmp_path / "models")
    follow = {"follow": "models:/nobody@champion", "follow_seconds": 0.2}
    with Server(tmp_path, tmp_path / "models", command=[str(BIN / "product-recs"), "serve"], **follow) as service:
        until(lambda: "points to nothing in MLflow" in service.stderr.read_text(), 60)
        assert service.get("/recommend/1?n=1")[2] == {"user_id": 1, "recommendations": [101]}
        [follower] = psutil.Process(service.process.pid).children()
        service.process.kill()
        until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE, 20)


@pytest.mark.slow
def test_a_damaged_bundle_is_not_taken_up(server, tmp_path):
    trainer = tmp_path / "trainer"
    good = publish_board(trainer).name
    bad = publish_board(trainer, range(1, 23), range(101, 123)).name
    with registry_at(server.uri, "damaged") as registry:
        for version in (good, bad):
            register(registry, trainer / version)
        promote(registry, registry.find(good))
    follower = Follower("models:/damaged@champion", tmp_path / "shop", Tracking(server.uri))
    assert follower.look() == good
    [stored] = [path for path in (server.folder / "artifacts").rglob("items.parquet") if path.parent.name == bad]
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with registry_at(server.uri, "damaged") as registry:
        promote(registry, registry.find(bad))
    with pytest.raises(Exception, match="sha256"):
        follower.look()
    assert live_version(tmp_path / "shop") == good and list_versions(tmp_path / "shop") == [good]
    stored.write_bytes(whole)  # somebody has repaired it
    assert follower.look() == bad and read_manifest(tmp_path / "shop" / bad)["version"] == bad
