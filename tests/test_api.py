"""The service as a client meets it: a real uvicorn in a process of its own, real sockets, known right answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from support import N, Server, cause_of, problem, publish_board

from product_recs.bundle.files import current_version
from product_recs.web.schemas import DetailedRecommendationList, DetailedSimilarList

ROOT = Path(__file__).resolve().parents[1]
LOG_KEYS = {"time", "request_id", "method", "route", "status", "ms", "model_version", "source", "experiment"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    publish_board(folder / "models")
    with Server(folder, folder / "models", max_n=50) as running:
        yield running


# --- answers ---------------------------------------------------------------------------------------------------------


def test_each_user_gets_the_one_right_item(server):
    for k in range(N):
        status, headers, body = server.get(f"/recommend/{k + 1}?n=1")
        assert status == 200 and body == {"user_id": k + 1, "recommendations": [k + 101]}
    assert headers["content-type"] == "application/json"
    assert headers["x-recommendation-source"] == "personalised" and "x-recommendation-shortfall" not in headers
    assert headers["x-model-version"] == server.get("/model")[2]["version"]


def test_ten_are_the_default_and_too_few_are_explained(server):
    assert len(server.get("/recommend/1")[2]["recommendations"]) == 10
    status, headers, body = server.get("/recommend/1?n=50")
    # 24 items less the 11 that the user has seen
    assert len(body["recommendations"]) == 13 and set(body) == {"user_id", "recommendations"}
    assert headers["x-recommendation-shortfall"] == "only 13 of 50: 11 items already seen"


def test_detail_says_the_same_with_titles(server):
    _, headers, plain = server.get("/recommend/3?n=4")
    _, _, body = server.get("/recommend/3?n=4&detail=true")
    assert set(body) == {"user_id", "recommendations", "source", "model", "model_version", "shortfall", "items"}
    assert body["model"] == headers["x-recommendation-model"] == "ALS"
    assert {k: body[k] for k in plain} == plain and DetailedRecommendationList(**body)
    assert (body["source"], body["model_version"], body["shortfall"]) == (
        "personalised",
        headers["x-model-version"],
        None,
    )
    assert [item["rank"] for item in body["items"]] == [1, 2, 3, 4]
    assert [item["item_id"] for item in body["items"]] == plain["recommendations"]
    first = body["items"][0]
    reasons = first.pop("reasons")
    assert {reason["item_id"] % 2 for reason in reasons} == {1}  # things of the same taste speak for it
    assert first == {
        "rank": 1,
        "item_id": 103,
        "score": 1.0,
        "title": "Thing 2",
        "attributes": {"popularity": 11, "category": "even", "price": None, "first_seen": "2026-01-02T03:04:05"},
        "rules": [],
    }
    assert server.get("/recommend/3?n=50&detail=1")[2]["shortfall"] == "only 13 of 50: 11 items already seen"


def test_unknown_users_get_what_is_popular(server):
    for user, echo in (
        ("nobody", "nobody"),
        ("999", 999),
        ("007", "007"),
        ("9" * 19, "9" * 19),
        ("9" * 40, "9" * 40),
        ("-1", -1),
    ):
        status, headers, body = server.get(f"/recommend/{user}?n=3")
        assert status == 200 and body["recommendations"] == [101, 102, 103] and str(body["user_id"]) == str(echo)
        assert headers["x-recommendation-source"] == "popular"


def test_similar_items(server):
    status, headers, body = server.get("/similar/101?n=2")
    assert (
        status == 200
        and body == {"item_id": 101, "similar": [103, 105]}
        and headers["x-recommendation-source"] == "similar"
    )
    detailed = server.get("/similar/101?n=50&detail=true")[2]
    assert DetailedSimilarList(**detailed) and 101 not in detailed["similar"] and len(detailed["similar"]) == N - 1
    assert detailed["items"][0]["score"] == 1.0 and detailed["shortfall"] == "only 23 of 50: 1 item asked about"


def test_health_and_model(server):
    assert server.get("/health/live")[2] == {"status": "live"}
    status, headers, body = server.get("/health/ready")
    facts = server.get("/model")[2]
    assert status == 200 and body == {"status": "ready", "model_version": facts["version"], "store": "open"}
    assert facts["shape"] == {"users": N, "items": N, "seen": N * (N // 2 - 1), "left_out": 0}
    assert facts["models"]["discovery"] == {"name": "ALS", "part": "als"}
    assert facts["parts"]["als"]["parameters"]["factors"] == 2
    assert facts["metrics"] == {"loss": None} and "files" not in facts


def test_head_is_get_without_the_body(server):
    for path in ("/recommend/1?n=3", "/health/ready", "/docs", "/openapi.json", "/similar/999", "/nowhere"):
        got, head = server.get(path), server.get(path, "HEAD")
        assert head[0] == got[0] and head[2] == b""
        assert all(head[1][name] == got[1][name] for name in ("content-type", "content-length"))


def test_docs_need_no_internet(server):
    status, _, page = server.get("/docs")
    assert status == 200
    sources = [
        part.split('"')[0].split("'")[0]
        for attribute in ('src="', 'href="', "src='")
        for part in page.decode().split(attribute)[1:]
    ]
    assert len(sources) >= 2 and all(source.startswith("/") for source in sources)
    for source in sources:
        assert server.get(source)[0] == 200
    assert any(len(server.get(source)[2]) > 500_000 for source in sources)
    assert b"https://" not in page


def test_the_examples_of_the_description_run(tmp_path):
    publish_board(tmp_path / "models")
    with Server(tmp_path, tmp_path / "models") as server:  # the examples forget a user and sell an item out
        run_examples(server)


def run_examples(server):
    ran = 0
    for path, methods in server.get("/openapi.json")[2]["paths"].items():
        for method, facts in methods.items():
            url, query = path, []
            for parameter in facts.get("parameters", []):
                for example in parameter.get("examples", {}).values():
                    if isinstance(example, dict) and parameter["in"] == "path":
                        url = url.replace("{" + parameter["name"] + "}", example["value"])
                    elif isinstance(example, dict):
                        query.append(f"{parameter['name']}={example['value']}")
            content = facts.get("requestBody", {}).get("content", {}).get("application/json", {})
            bodies = [example["value"] for example in content.get("examples", {}).values()] or content.get(
                "schema", {}
            ).get("examples", [])
            if method == "post" and not bodies and content:
                name = content["schema"]["$ref"].rsplit("/", 1)[1]
                bodies = server.get("/openapi.json")[2]["components"]["schemas"][name]["examples"]
            for body in bodies or [None]:
                answer = server.ask(method.upper(), url + ("?" + "&".join(query) if query else ""), body)
                assert answer[0] == 200, (method, url, body, answer)
                ran += 1
    assert ran == 29


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", ["0", "-1", "abc", "51", "NaN", "1.5", "1e3", "", "9" * 5000, "%00", "true", "Infinity"])
@pytest.mark.parametrize("path", ["/recommend/1", "/similar/101"])
def test_a_bad_n_is_named(server, path, n):
    errors = problem(server.get(f"{path}?n={n}"), 422).errors
    assert [(error["in"], error["field"]) for error in errors] == [("query", "n")] and errors[0]["message"]


def test_each_bad_parameter_is_named(server):
    document = problem(server.get("/recommend/1?n=0&detail=perhaps"), 422)
    assert {error["field"] for error in document.errors} == {"n", "detail"} and "n:" in document.detail


def test_unknown_item_path_and_method(server):
    unknown = problem(server.get("/similar/999"), 404)
    assert "999" in unknown.detail and unknown.title == "Not Found" and unknown.instance == "/similar/999"
    for path in ("/nowhere", "/recommend/", "/recommend/1/extra", "/%00", "/static-offline-docs/nothing.js"):
        problem(server.get(path), 404)
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = server.get("/recommend/1", method)
        assert method in problem(answer, 405).detail and "GET" in answer[1]["allow"]


HOSTILE = [
    "%00",
    "%0a%0d",
    "..%2f..%2fetc%2fpasswd",
    "%2F",
    "a%2Fb",
    "%25",
    "%",
    "%zz",
    "%ff%fe",
    "%ED%A0%80",
    "%F0%9F%8D%8E",
    quote("é✓"),
    "x" * 10_000,
    "9" * 10_000,
    "'%20OR%201=1--",
    "%3Cscript%3E",
    "-0",
    "+1",
    "1.5",
    "%20",
    "%D9%A1",
    "null",
    "true",
    "{user_id}",
    "1;2",
    "%7B%7D",
    "~",
    ".",
]


@pytest.mark.parametrize("id", HOSTILE, ids=lambda id: id[:20])
def test_no_id_breaks_it(server, id):
    status, headers, body = server.get(f"/recommend/{id}?n=2")
    assert status == 200 and headers["x-recommendation-source"] == "popular" and body["recommendations"] == [101, 102]
    problem(server.get(f"/similar/{id}"), 404)


def test_it_still_answers_after_garbage(server):
    for garbage in (
        b"\x00\xff\x00\r\n\r\n",
        b"GET /recommend/1 HTTP/9.9\r\n\r\n",
        b"GET \xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"x" * 200_000,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            try:
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                assert b" 500 " not in connection.recv(65536).split(b"\r\n")[0]
            except OSError:  # it has hung up already
                pass
    assert server.get("/recommend/1?n=1")[2]["recommendations"] == [101]


# --- the log ---------------------------------------------------------------------------------------------------------


def test_each_request_is_one_line(server):
    time.sleep(0.2)
    before = len(server.lines())
    asked = [
        ("/recommend/secret-person?n=1", "GET"),
        ("/similar/999", "GET"),
        ("/nowhere/else", "GET"),
        ("/recommend/1?n=0", "GET"),
        ("/recommend/2", "HEAD"),
    ]
    ids = [server.get(path, method)[1]["x-request-id"] for path, method in asked]
    lines = server.lines(before + len(asked))[before:]
    assert len(lines) == len(asked) and all(set(line) == LOG_KEYS for line in lines)
    assert [line["request_id"] for line in lines] == ids and len(set(ids)) == len(ids)
    assert [line["status"] for line in lines] == [200, 404, 404, 422, 200]
    assert [line["route"] for line in lines] == [
        "/recommend/{user_id}",
        "/similar/{item_id}",
        None,
        "/recommend/{user_id}",
        "/recommend/{user_id}",
    ]
    assert [line["source"] for line in lines] == ["popular", None, None, None, "personalised"] and lines[4][
        "method"
    ] == "HEAD"
    assert lines[0]["model_version"] and all(0 <= line["ms"] < 10_000 for line in lines)
    assert "secret-person" not in server.stdout.read_text()


def test_a_sane_request_id_is_taken_over(server):
    assert server.get("/health/live", headers={"X-Request-ID": "shop-42.a_b"})[1]["x-request-id"] == "shop-42.a_b"
    for bad in ("", "two words", "a" * 129, '{"x":1}', "\xff"):
        assert len(server.get("/health/live", headers={"X-Request-ID": bad})[1]["x-request-id"]) == 32


# --- ids, models, processes ------------------------------------------------------------------------------------------


def test_text_ids_stay_text(tmp_path):
    users = ["001", "a b", "a/b", "u1", "é✓"]
    items = ["101", "i/1", "i2", "i3", "🍎"]
    publish_board(tmp_path / "models", users, items)
    with Server(tmp_path, tmp_path / "models") as server:
        for user, item in zip(users, items):
            status, headers, body = server.get(f"/recommend/{quote(user, safe='')}?n=1")
            assert status == 200 and headers["x-recommendation-source"] == "personalised"
            assert body == {"user_id": user, "recommendations": [item]}
            assert server.get(f"/similar/{quote(item, safe='')}?n=1")[2]["item_id"] == item
        assert server.get("/recommend/1")[1]["x-recommendation-source"] == "popular"


def test_a_model_that_comes_later_is_found(tmp_path):
    models = tmp_path / "models"
    with Server(tmp_path, models) as server:
        for path in ("/health/ready", "/recommend/1", "/similar/101", "/model"):
            answer = server.get(path)
            assert "no model is live" in problem(answer, 503).detail and answer[1]["retry-after"]
            assert str(models) in cause_of(server, answer)
        assert problem(server.get("/recommend/1?n=0"), 422)
        damaged = publish_board(models)
        whole = (damaged / "als.item_factors.npy").read_bytes()
        (damaged / "als.item_factors.npy").write_bytes(whole[:-8])
        refused = server.get("/health/ready")
        assert f"model {damaged.name} cannot be used" in problem(refused, 503).detail
        assert str(models) not in refused[2]["detail"]
        assert "als.item_factors.npy" in cause_of(server, refused)
        (damaged / "als.item_factors.npy").write_bytes(whole)
        assert server.get("/health/ready")[0] == 200
        assert server.get("/recommend/1?n=1")[2]["recommendations"] == [101]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://shopuser:geheim@127.0.0.1:1/shopdb",
        "sqlite:////proc/nowhere/feedback.db",
    ],
)
def test_a_503_says_nothing_of_the_database_and_the_log_says_all(tmp_path, url):
    """Host, port, user, file: a stranger learns none of them; the log has the cause under the request id."""
    publish_board(tmp_path / "models")
    with Server(tmp_path, tmp_path / "models", database_url=url) as server:
        asks = [
            ("POST", "/events", {"user_id": 1, "item_id": 101}),
            ("DELETE", "/users/1", None),
            ("GET", "/users/1/history", None),
            ("POST", "/availability", {"items": [{"item_id": 101, "available": True}]}),
        ]
        for method, path, body in asks:
            answer = server.ask(method, path, body)
            assert "nothing was taken" in problem(answer, 503).detail and answer[1]["retry-after"] == "5"
            reply = json.dumps(answer[2]) + json.dumps(answer[1])
            secrets = ("shopuser", "geheim", "shopdb", "127.0.0.1", "psycopg", "nowhere", "refused", "sqlite")
            assert not any(word in reply for word in secrets)
            cause = cause_of(server, answer)
            assert ("127.0.0.1" in cause and "shopuser" in cause or "/proc/nowhere" in cause) and "geheim" not in cause


def ask_all(server, requests):
    """Many clients at once, each with the right answer in hand."""

    def ask(k):
        user = k % N
        if k % 5 == 4:
            return server.get(f"/similar/{user + 101}?n=1")[2] == {
                "item_id": user + 101,
                "similar": [101 + user % 2 if user > 1 else user + 103],
            }
        return server.get(f"/recommend/{user + 1}?n=1")[2] == {"user_id": user + 1, "recommendations": [user + 101]}

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, range(requests)))


def test_many_clients_at_once(server):
    time.sleep(0.2)
    before = len(server.lines())
    right = ask_all(server, 600)
    assert all(right) and len(right) == 600
    assert len(server.lines(before + 600)) == before + 600


def test_two_workers(tmp_path):
    publish_board(tmp_path / "models")
    with Server(tmp_path, tmp_path / "models", workers=2) as server:
        assert all(ask_all(server, 200))
        processes = psutil.Process(server.process.pid).children(recursive=True)
        # the second worker may still be opening its model when the first has answered everything
        end = time.monotonic() + 30
        while (
            opened := sum(any("als.item_factors.npy" in m.path for m in p.memory_maps()) for p in processes)
        ) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        assert opened == 2
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert all(set(line) == LOG_KEYS for line in server.lines())


def test_sigterm_lets_a_request_end(tmp_path):
    publish_board(tmp_path / "models")
    with Server(tmp_path, tmp_path / "models") as server:
        with ThreadPoolExecutor(4) as pool:
            pending = [pool.submit(server.get, f"/recommend/{1 + k % N}?n=1") for k in range(40)]
            time.sleep(0.05)
            server.process.send_signal(signal.SIGTERM)
            ended = [f.result() for f in pending if not isinstance(f.exception(), OSError)]
        assert all(status == 200 for status, _, _ in ended)
        server.process.wait(20)
    assert "Traceback" not in server.stderr.read_text()


def test_a_taken_port_is_one_clear_sentence(tmp_path, server):
    run = subprocess.run(
        [sys.executable, "-c", "from product_recs.web.server import serve; serve()"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "PRODUCT_RECS_PORT": str(server.port), "PRODUCT_RECS_MODELS_DIR": str(tmp_path)},
    )
    assert (
        run.returncode != 0
        and f"port {server.port}" in run.stderr
        and "in use" in run.stderr
        and "--port" in run.stderr
    )


def test_the_version_served_is_the_current_one(tmp_path):
    publish_board(tmp_path / "models")
    second = publish_board(tmp_path / "models", range(1, 7), range(201, 207))
    with Server(tmp_path, tmp_path / "models") as server:
        assert current_version(tmp_path / "models") == second.name == server.get("/model")[2]["version"]
        assert server.get("/recommend/1?n=1")[2]["recommendations"] == [201]
