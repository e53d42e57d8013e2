"""The doctor as a script asks it: exit codes, real services, real databases, and nothing that it leaves behind."""

import json
import os
import socket
import subprocess
import threading
from contextlib import contextmanager, suppress

import pytest
from support import BIN, Server, publish_board

from product_recs.bundle.files import publish
from product_recs.feedback.connection import VERSION_TABLE, store_url
from product_recs.feedback.store import Store
from product_recs.jobs.answered import AnsweredError, read_metrics
from product_recs.jobs.doctor import store_checks

QUIET = {"PRODUCT_RECS_PORT": "0", "PRODUCT_RECS_MLFLOW": "off"}


def ask(root, *words, code=0, **environment):
    "What the doctor says as JSON, after a look at its exit code."
    done = subprocess.run(
        [BIN / "product-recs", "doctor", "--json", *words],
        env=os.environ | {"PRODUCT_RECS_ROOT": str(root)} | QUIET | environment,
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    said = json.loads(done.stdout)
    return said, {check["name"]: check for check in said["checks"]}


@pytest.fixture
def shop(tmp_path):
    publish_board(tmp_path / "models")
    (tmp_path / "log.csv").write_text(
        "customer,sku,day\n" + "".join(f"{n % 40},{n * n % 30},2026-01-{1 + n // 20:02}\n" for n in range(400))
    )
    (tmp_path / "shop.yaml").write_text(f"source: {tmp_path}/log.csv\ncolumns: {{user_id: customer, item_id: sku}}\n")
    return tmp_path


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_healthy_shop(shop):
    before = files_of(shop)
    said, checks = ask(shop, "--file", "shop.yaml", "--thorough")
    assert said["verdict"] == "fine" and files_of(shop) == before
    assert "has 400 rows, 40 users" in checks["data"]["says"] and "every byte" in checks["live model"]["says"]
    assert checks["memory of a run"]["value"] < checks["memory of a run"]["high"]


def test_what_stops(shop):
    (shop / "log.csv").write_text("buyer,sku\n1,2\n")
    (shop / "models" / "current").write_text("gone\n")
    (shop / "api_keys.json").write_text("[]")
    said, checks = ask(shop, "--file", "shop.yaml", code=4)
    stopped = {name for name, check in checks.items() if check["level"] == "stop"}
    assert {"data", "live model", "API keys"} == stopped
    assert "log.csv: there is no column 'customer'" in checks["data"]["says"]
    assert all(checks[name]["remedy"] for name in stopped) and said["headline"].startswith("3 of ")


def test_what_somebody_should_see(shop):
    said, checks = ask(shop, code=3, PRODUCT_RECS_RULES_FILE="rules.yaml", PRODUCT_RECS_WORKER="3")
    assert {name for name, check in checks.items() if check["level"] == "look"} == {"rules", "settings"}
    assert "PRODUCT_RECS_WORKERS is" in checks["settings"]["says"]


@contextmanager
def another_language():
    "The port of a program that does not speak HTTP."
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            with suppress(OSError):  # closed
                while True:
                    with server.accept()[0] as guest:
                        guest.recv(4096)
                        guest.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=greet, daemon=True).start()
        yield server.getsockname()[1]


def test_who_has_the_port(shop):
    with Server(shop, shop / "models") as server:
        own = {"PORT": str(server.port), "DATABASE_URL": f"sqlite:///{shop}/feedback.db"}
        _, checks = ask(shop, **{f"PRODUCT_RECS_{name}": value for name, value in own.items()})
        assert "A service answers" in checks["port"]["says"]
        assert "Its tables have version" in checks["feedback store"]["says"]
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        _, checks = ask(shop, code=3, PRODUCT_RECS_PORT=str(somebody.getsockname()[1]))
        assert "cannot be bound" in checks["port"]["says"]
    with another_language() as port:
        _, checks = ask(shop, code=3, PRODUCT_RECS_PORT=str(port))
        assert "cannot be bound" in checks["port"]["says"]
        with pytest.raises(AnsweredError, match="SSH-2.0"):
            read_metrics([f"http://127.0.0.1:{port}/metrics"])


def test_a_terminal(shop):
    done = subprocess.run(
        [BIN / "product-recs", "doctor"], env=os.environ | {"PRODUCT_RECS_ROOT": str(shop), "COLUMNS": "60"} | QUIET,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("✓ fine: versions, kernels")
    assert max(map(len, done.stdout.splitlines())) <= 60


def test_a_store_is_looked_at_and_nothing_else(url, opened):
    assert store_checks(url)[0][0].level == "fine"  # before the first service
    store = opened(Store(url))
    store.cut()  # its clock ticks
    [check], moments = store_checks(url)
    assert check.level == "fine" and "the feedback store" in moments
    with store.transaction("test", write=True) as connection:
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '0002'")
    [check], _ = store_checks(url)
    assert check.level == "fine" and "version 0002 and are brought to" in check.says
    with store.transaction("test") as connection:
        assert connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar() == "0002"


def test_a_store_in_a_folder_with_an_odd_name(tmp_path, opened):
    folder = tmp_path / "shop #1"
    folder.mkdir()
    opened(Store(f"sqlite:///{folder}/feedback.db")).cut()
    [check], moments = store_checks(f"sqlite:///{folder}/feedback.db")
    assert "Its tables have version" in check.says and moments


def test_a_password_stays_secret(postgres_url):
    wrong = store_url(postgres_url).set(username="shop", password="hunter2", host="127.0.0.1", port=1)
    [check], _ = store_checks(wrong.render_as_string(hide_password=False))
    assert check.level == "stop" and "hunter2" not in check.says + check.remedy


def test_a_model_of_another_release(shop):
    path = publish_board(shop / "models")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["libraries"]["product-recs"] = "99.1.0"
    (path / "manifest.json").write_text(json.dumps(manifest))
    publish(shop / "models", path.name)
    _, checks = ask(shop, code=3)
    assert "trained by product-recs 99.1.0" in checks["version of the model"]["says"]
    assert "way back" not in checks
