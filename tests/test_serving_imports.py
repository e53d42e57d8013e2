"""The service needs its own few requirements and nothing else: no training, no tables, no notebooks."""

import shlex
import subprocess
import sys
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest
from support import Server, publish_board

ROOT = Path(__file__).resolve().parents[1]
UNWANTED = (
    "implicit",
    "pandas",
    "papermill",
    "nbdev",
    "nbconvert",
    "nbformat",
    "jupyter",
    "IPython",
    "ipykernel",
    "matplotlib",
    "pyarrow",
    "faiss",
    "mlflow",
)


def imported_by(statement):
    "Modules that a fresh process has after an import."
    program = f"{statement}; import sys; print(*sorted(sys.modules), sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(run.stdout.split())


def rooms(modules):
    "The rooms, and the notebooks of the story, that these modules are of."
    return {module.split(".")[1] for module in modules if module.startswith("product_recs.")}


def unwanted(modules):
    return [m for m in modules if m.split(".")[0].lower().startswith(tuple(u.lower() for u in UNWANTED))]


def test_the_service_imports_nothing_of_training_or_notebooks():
    modules = imported_by("import product_recs.api")
    assert "product_recs.answer.ladder" in modules and unwanted(modules) == []
    assert rooms(modules).isdisjoint({"ingest", "features", "train", "evaluate", "evaluation", "jobs"})


def test_the_feedback_store_needs_only_what_the_service_has():
    modules = imported_by("import product_recs.feedback.store, product_recs.feedback.changes")
    assert unwanted(modules) == [] and rooms(modules) == {"core", "feedback"}


@pytest.mark.parametrize("module", ["train", "features", "ingest", "evaluate"])
def test_a_training_without_feedback_brings_no_database(module):
    "The store and SQLAlchemy cost time and memory; they are imported where feedback or a database is read."
    program = f"import sys, product_recs.{module}; print(*sys.modules, sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    modules = run.stdout.split()
    assert f"product_recs.{module}" in modules
    assert [m for m in modules if m.split(".")[0] in ("sqlalchemy", "alembic", "psycopg")] == []
    assert [m for m in modules if m.startswith("product_recs.feedback")] == []


def test_importing_the_service_does_no_work(tmp_path):
    program = "import threading, product_recs.api, os; print(threading.active_count(), os.listdir('.'))"
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "",
        "PRODUCT_RECS_PORT": "not a number",
        "PRODUCT_RECS_MODELS_DIR": "/nowhere",
    }
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=environment,
    )
    assert run.stdout.split() == ["1", "[]"]


@pytest.fixture(scope="module")
def serving_venv(wheel, tmp_path_factory):
    "An environment with what settings.ini calls the requirements of serving, and the project without its own."
    home = tmp_path_factory.mktemp("serving") / "venv"
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    venv.create(home, with_pip=True)
    pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *shlex.split(settings["DEFAULT"]["serve_requirements"])], check=True, timeout=600)
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, timeout=600)
    return home


@pytest.mark.slow
def test_the_requirements_of_serving_are_enough(serving_venv, tmp_path):
    listed = subprocess.run(
        [serving_venv / "bin/python", "-m", "pip", "list", "--format=freeze"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    installed = {line.split("==")[0].lower() for line in listed.stdout.split()}
    assert installed.isdisjoint({u.lower() for u in UNWANTED}) and "fastapi" in installed
    publish_board(tmp_path / "models")
    with Server(tmp_path, tmp_path / "models", command=[serving_venv / "bin/product-recs", "serve"]) as server:
        assert server.get("/recommend/1?n=1")[2] == {"user_id": 1, "recommendations": [101]}
        assert (
            server.get("/similar/101?n=1&detail=true")[0]
            == server.get("/docs")[0]
            == server.get("/health/ready")[0]
            == 200
        )


def test_without_mlflow_nothing_is_said_and_following_is_refused(serving_venv, tmp_path):
    "The extra `mlflow` is not there: publishing is silent about it, even beside a server, unless it is asked for."
    first, second = (publish_board(tmp_path / "models").name for _ in range(2))
    environment = {"PATH": "", "PRODUCT_RECS_ROOT": str(tmp_path), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}

    def product_recs(*words, **settings):
        return subprocess.run(
            [serving_venv / "bin/product-recs", *words],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=environment | {f"PRODUCT_RECS_{name.upper()}": value for name, value in settings.items()},
        )

    for words in (["rollback"], ["publish", second]):
        done = product_recs(*words)
        assert done.returncode == 0 and done.stderr == ""
    done = product_recs("publish", first, mlflow="on")
    assert done.returncode == 0 and "pip install 'product-recs[mlflow]'" in done.stderr
    for words, settings in (
        (("serve",), {"follow": "models:/product-recs@champion"}),
        (("registry", "list"), {}),
        (("registry", "follow"), {}),
    ):
        done = product_recs(*words, **settings)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr == (
            "product-recs: this needs MLflow, which is not installed: pip install 'product-recs[mlflow]'\n"
        )


def test_the_installed_package_brings_the_migrations(serving_venv, tmp_path):
    program = (
        "import sys; from product_recs.feedback.records import NewEvent; "
        "from product_recs.feedback.store import Store; "
        "store = Store(sys.argv[1]); print(store.add_events([NewEvent(1, 101)]), store.history(1)[0].item_id)"
    )
    command = [serving_venv / "bin/python", "-c", program, f"sqlite:///{tmp_path}/feedback.db"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60, env={"PATH": ""}
    )
    assert run.stdout.split() == ["['accepted']", "101"]
