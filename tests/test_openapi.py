"""The service against its own description: thousands of requests made from the OpenAPI document, good ones and bad
ones, to real servers with trained models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import Server, train

from product_recs.web.security import add_key

SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
# Events and products are answered 200 with what became of each, also where each is bad;
# and a product that was not taken is not there afterwards.
# Whoever was forgotten is answered like somebody unknown, and an item of the model outlives what was told of it:
# that is no use of what was deleted.
# The check positive_data_acceptance is left out: no schema says which columns a model has, or which ids a store takes.
CONFIG = """
[[operations]]
include-name = "POST /events"
[operations.checks]
negative_data_rejection.enabled = false
[[operations]]
include-name = "POST /items"
[operations.checks]
negative_data_rejection.enabled = false
"""


def run(folder, server, examples, *options, key=None):
    "What schemathesis found: its report, and its words about failures."
    (folder / "schemathesis.toml").write_text(CONFIG)
    header = [] if key is None else ["--header", f"Authorization: Bearer {key}"]
    done = subprocess.run(
        [
            SCHEMATHESIS,
            "--config-file",
            folder / "schemathesis.toml",
            "run",
            f"http://127.0.0.1:{server.port}/openapi.json",
            "--max-examples",
            str(examples),
            "--seed",
            "20260101",
            "--exclude-checks",
            # who was forgotten has a history that says so, and no 404
            "positive_data_acceptance,ensure_resource_availability,use_after_free",
            "--continue-on-failure",
            "--report",
            "json",
            "--report-json-path",
            folder / "report.json",
            *header,
            *options,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert (folder / "report.json").exists(), done.stdout + done.stderr
    return json.loads((folder / "report.json").read_text()), done.stdout


def conforms(server, report, words, least):
    "Every operation was tested, nothing failed, and no line of the server's log is a fault."
    assert report["failures"] == report["errors"] == [], words[-6000:]
    assert (
        report["operations"]["tested"] == report["operations"]["total"] == 26 and report["stop_reason"] == "completed"
    )
    assert (
        all(phase["status"] in ("success", "skip") for phase in report["phases"].values())
        and report["test_cases"]["generated"] >= least
    )
    lines = server.lines(least)
    assert [line for line in lines if line["status"] is None or line["status"] >= 500] == []
    seen = {(line["route"], line["status"]) for line in lines}
    good = {route for route, status in seen if status == 200}
    assert {
        "/recommend",
        "/recommend/{user_id}",
        "/similar/{item_id}",
        "/explain/{user_id}/{item_id}",
        "/events",
        "/availability",
        "/users/{user_id}",
        "/users/{user_id}/history",
        "/users/{user_id}/export",
        "/items/{item_id}",
    } <= good
    return seen


@pytest.mark.parametrize("ids", ["numbers", "texts"])
def test_the_service_does_what_its_description_says(tmp_path, ids):
    train(tmp_path, ids == "texts")
    with Server(tmp_path, tmp_path / "models") as server:
        if ids == "texts":  # the examples of the description are ids of the sample
            assert (
                server.get("/similar/i%2F101?n=1")[0]
                == server.get("/items/i%2F101")[0]
                == server.get("/explain/u%201/i%2F101")[0]
                == 200
            )
        report, words = run(tmp_path, server, 15)
        seen = conforms(server, report, words, 1000)
        assert {("/recommend", 422), ("/recommend", 415), ("/events", 400), ("/recommend/{user_id}", 422)} <= seen


def test_with_api_keys(tmp_path):
    """With every scope all of the above; without a key and with one that may read only, the refusals are those of the
    description too."""
    train(tmp_path)
    keys = {scope: add_key(tmp_path / "keys.json", scope, scope) for scope in ("read", "admin")}
    with Server(tmp_path, tmp_path / "models", auth="on", api_keys_file=tmp_path / "keys.json") as server:
        seen = conforms(
            server, *run(tmp_path, server, 5, "--phases", "examples,coverage,fuzzing", key=keys["admin"]), 500
        )
        assert {status for _, status in seen} >= {200, 401, 422}
    with Server(tmp_path, tmp_path / "models", auth="on", api_keys_file=tmp_path / "keys.json") as server:
        for key, status in ((keys["read"], 403), (None, 401)):
            report, words = run(
                tmp_path,
                server,
                3,
                "--phases",
                "examples,fuzzing",
                "--exclude-checks",
                "positive_data_acceptance,negative_data_rejection,ensure_resource_availability",
                key=key,
            )
            assert report["failures"] == report["errors"] == [], words[-6000:]
            assert any(line["status"] == status for line in server.lines())


def test_without_a_model_and_without_a_store(tmp_path):
    "503 is the answer of the description where there is nothing to answer from; it is never 500."
    (tmp_path / "file").touch()
    with Server(tmp_path, tmp_path / "models", database_url=f"sqlite:///{tmp_path}/file/feedback.db") as server:
        report, words = run(
            tmp_path,
            server,
            5,
            "--phases",
            "examples,fuzzing",
            "--exclude-checks",
            "not_a_server_error,positive_data_acceptance,ensure_resource_availability",
        )
        assert report["failures"] == report["errors"] == [], words[-6000:]
        assert {line["status"] for line in server.lines() if (line["status"] or 500) >= 500} == {503}
