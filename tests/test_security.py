"""The guard as a client meets it: real uvicorn workers, real sockets, real files of keys."""

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
from support import Server, publish_board

from product_recs.web.security import SCOPES, Keys, add_key, remove_key

ROOT = Path(__file__).resolve().parents[1]
APPLICATION = """
import asyncio, os
from pathlib import Path
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from product_recs.core.settings import Settings
from product_recs.web.security import Guard, describe_keys
from product_recs.web.problems import RequestLog, http_problem, log_to_stdout, parameter_problem

def create_app():
    app, settings = FastAPI(), Settings()
    log_to_stdout()

    @app.get("/health/live")
    async def live(): return {"pid": os.getpid()}
    @app.get("/recommend/{user}")
    async def recommend(user: int, wait: float = 0):
        await asyncio.sleep(wait)
        return user
    @app.post("/recommend")
    async def recommend_many(request: Request): return len(await request.body())
    @app.post("/events")
    async def events(body: dict): return body
    @app.post("/raw/events")
    async def raw(request: Request): return len(await request.body())
    @app.post("/model/reload")
    async def reload(): return "reloaded"
    @app.get("/fault")
    async def fault(): raise RuntimeError("a fault of ours")

    app.add_exception_handler(HTTPException, http_problem)
    app.add_exception_handler(RequestValidationError, parameter_problem)
    describe_keys(app)
    app.add_middleware(Guard, settings=settings, shared_folder=Path(os.environ["SHARED"]))
    app.add_middleware(RequestLog)
    return app
"""


class Service:
    """The small application in uvicorn, in processes of its own."""

    def __init__(self, folder, workers=1, bind="127.0.0.1", **settings):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "guarded.py").write_text(APPLICATION)
        self.log, self.keys_file = folder / "log", folder / "keys.json"
        self.keys = {scope: add_key(self.keys_file, scope, scope) for scope in SCOPES}
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PRODUCT_RECS_")}
        environment |= {
            "PYTHONPATH": f"{ROOT}:{folder}",
            "SHARED": str(folder),
            "PRODUCT_RECS_API_KEYS_FILE": str(self.keys_file),
        }
        environment |= {f"PRODUCT_RECS_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-m", "uvicorn", "guarded:create_app", "--factory", "--no-access-log"]
        command += ["--host", bind, "--port", str(self.port), "--workers", str(workers)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=self.log.open("w"),
            stderr=(folder / "err").open("w"),
            stdin=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx2.Client(base_url=self.url, timeout=20)
        end = time.monotonic() + 60
        while True:
            try:
                self.client.get("/health/live")
                break
            except httpx2.TransportError:
                assert self.process.poll() is None and time.monotonic() < end, (folder / "err").read_text()
                time.sleep(0.05)

    def sign(self, scope):
        return {"Authorization": f"Bearer {self.keys[scope]}"}

    def close(self):
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def lines(self):
        time.sleep(0.1)  # a client may have its answer a moment before the line is written
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Service(
        tmp_path_factory.mktemp("guarded"), auth="on", max_body_bytes=2000, cors_origins='["https://shop.example"]'
    )
    yield service
    service.close()


def problem(answer, status):
    assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json", answer.text
    assert set(answer.json()) == {"type", "title", "status", "detail", "instance"} and answer.json()["status"] == status
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"
    return answer.json()["detail"]


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/recommend/1", "read"),
        ("POST", "/recommend", "read"),
        ("POST", "/events", "write"),
        ("POST", "/model/reload", "admin"),
        ("GET", "/nowhere", "read"),
    ],
)
def test_each_scope_opens_what_it_says(service, method, path, needed):
    body = {"json": {}} if method == "POST" else {}
    statuses = {200, 404}
    for scope in SCOPES:
        answer = service.client.request(method, path, headers=service.sign(scope), **body)
        if SCOPES.index(scope) >= SCOPES.index(needed):
            assert answer.status_code in statuses
        else:
            assert needed in problem(answer, 403) and f'scope="{needed}"' in answer.headers["www-authenticate"]
    assert "API key" in problem(service.client.request(method, path, **body), 401)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer pr_nonsense"},
        {"Authorization": "Basic YTpi"},
        {"X-API-Key": ""},
        {"X-API-Key": "x" * 5000},
        {"X-API-Key": b"\xff\xfe\x80"},
        {"Authorization": b"Bearer \xe2\x82\xac"},
    ],
)
def test_what_is_no_key_is_refused(service, headers):
    answer = service.client.get("/recommend/1", headers=headers)
    problem(answer, 401)
    assert answer.headers["www-authenticate"].startswith('Bearer realm="product_recs"')


def test_open_paths_ask_for_nothing_and_tricks_open_nothing(service):
    for path in ("/health/live", "/docs", "/openapi.json"):
        assert service.client.get(path).status_code == 200
    for path in (
        "/static/../recommend/1",
        "//recommend/1",
        "/health/live/../../recommend/1",
        "/recommend/1#/docs",
        "/%72ecommend/1",
        "/recommend/1?/static/",
        "/static%2f../recommend/1",
        "/./recommend/1",
    ):
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)  # sends a path as it is
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status in (400, 401, 404) and answer.read() != b"1", path
        connection.close()


def test_a_key_in_the_address_is_no_key_and_no_key_is_ever_logged(service):
    key = service.keys["admin"]
    for path in (f"/recommend/1?api_key={key}", f"/recommend/1?access_token={key}"):
        problem(service.client.get(path), 401)
    assert service.client.get("/recommend/1", headers={"X-API-Key": key}).json() == 1
    text = service.log.read_text() + (service.log.parent / "err").read_text()
    assert all(key not in text for key in service.keys.values())


def test_head_and_the_request_log_see_what_was_refused(service):
    answer = service.client.head("/recommend/1", headers={"X-Request-ID": "refused-head"})
    assert answer.status_code == 401 and answer.content == b""
    answer = service.client.head("/recommend/1", headers=service.sign("read"))
    assert answer.status_code == 200 and answer.content == b"" and answer.headers["content-length"] == "1"
    line = next(line for line in service.lines() if line["request_id"] == "refused-head")
    assert line["status"] == 401 and line["method"] == "HEAD" and line["ms"] >= 0


def test_keys_come_and_go_without_a_restart(service):
    key = add_key(service.keys_file, "guest", "read")

    def status():
        return service.client.get("/recommend/1", headers={"X-API-Key": key}).status_code

    end = time.monotonic() + 10
    while status() != 200 and time.monotonic() < end:
        time.sleep(0.05)
    assert status() == 200
    remove_key(service.keys_file, "guest")
    end = time.monotonic() + 10
    while status() != 401 and time.monotonic() < end:
        time.sleep(0.05)
    assert status() == 401 and service.client.get("/recommend/1", headers=service.sign("read")).status_code == 200


def test_keys_added_at_the_same_moment_are_all_kept(tmp_path):
    file = tmp_path / "keys.json"
    program = (
        "import sys; from product_recs.web.security import add_key; [add_key(sys.argv[1], f'{sys.argv[2]}{k}') for k "
        "in range(10)]"
    )
    adding = [
        subprocess.Popen([sys.executable, "-c", program, file, name], env={**os.environ, "PYTHONPATH": str(ROOT)})
        for name in "abc"
    ]
    assert [process.wait(60) for process in adding] == [0, 0, 0]
    keys = json.loads(file.read_text())["keys"]
    assert len({key["name"] for key in keys}) == 30 and file.stat().st_mode & 0o777 == 0o600


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/recommend", "/raw/events", "/events"])
def test_a_body_beyond_the_limit_is_refused_however_it_comes(service, path):
    headers = service.sign("write") | {"Content-Type": "application/json"}
    body = b'{"a": "' + b"x" * 1990 + b'"}'
    assert len(body) == 1999
    for good in (body, iter([body[:700], body[700:]])):
        assert service.client.post(path, content=good, headers=headers).status_code == 200
    for bad in (body + b"  ", iter([body[:700], body[700:], b"  "]), iter([b" " * 1000] * 50)):
        assert "2,000" in problem(service.client.post(path, content=bad, headers=headers), 413)
    assert service.client.get("/recommend/1", headers=headers).json() == 1, "the connection is still of use"


def test_a_refused_upload_is_answered_before_it_is_sent(service):
    with socket.create_connection(("127.0.0.1", service.port)) as raw:
        raw.sendall(
            b"POST /events HTTP/1.1\r\nHost: x\r\nX-API-Key: "
            + service.keys["write"].encode()
            + b"\r\nContent-Length: 999999999999\r\n\r\n{"
        )
        assert b" 413 " in raw.recv(65536)
    with socket.create_connection(("127.0.0.1", service.port)) as raw:
        raw.sendall(
            b"POST /events HTTP/1.1\r\nHost: x\r\nX-API-Key: "
            + service.keys["write"].encode()
            + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(3):
            raw.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert b" 413 " in raw.recv(65536), "an endless upload ends at the limit"


def test_a_stranger_is_refused_before_the_body(service):
    with socket.create_connection(("127.0.0.1", service.port)) as raw:
        raw.sendall(b"POST /events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b" 401 " in raw.recv(65536)


def test_a_client_that_goes_away_in_the_middle_leaves_the_service_well(service):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", service.port)) as raw:
            raw.sendall(
                b"POST /events HTTP/1.1\r\nHost: x\r\nX-API-Key: "
                + service.keys["write"].encode()
                + b"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"
            )
    assert service.client.post("/events", json={"a": 1}, headers=service.sign("write")).json() == {"a": 1}


# --- browsers --------------------------------------------------------------------------------------------------------


def test_a_browser_may_call_from_the_named_origin_alone(service):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    yes = service.client.options("/events", headers=ask | {"Origin": "https://shop.example"})
    assert yes.status_code == 200 and yes.headers["access-control-allow-origin"] == "https://shop.example"
    assert (
        "POST" in yes.headers["access-control-allow-methods"]
        and "authorization" in yes.headers["access-control-allow-headers"].lower()
    )
    no = service.client.options("/events", headers=ask | {"Origin": "https://evil.example"})
    assert no.status_code == 400 and "access-control-allow-origin" not in no.headers
    refused = service.client.get("/recommend/1", headers={"Origin": "https://shop.example"})
    assert problem(refused, 401) and refused.headers["access-control-allow-origin"] == "https://shop.example", (
        "the page can read why"
    )
    answer = service.client.get("/recommend/1", headers=service.sign("read") | {"Origin": "https://shop.example"})
    assert (
        "X-Model-Version" in answer.headers["access-control-expose-headers"]
        and "access-control-allow-credentials" not in answer.headers
    )


def test_headers_that_browsers_heed(service):
    answer = service.client.get("/recommend/1", headers=service.sign("read"))
    assert answer.headers["cache-control"] == "no-store" and answer.headers["x-frame-options"] == "DENY"
    assert (
        "default-src 'self';" in answer.headers["content-security-policy"]
        and "unsafe" not in answer.headers["content-security-policy"]
        and "script-src 'self' 'unsafe-inline'" in service.client.get("/docs").headers["content-security-policy"]
    )
    assert "server" not in answer.headers or "product" not in answer.headers["server"]


def test_without_keys_a_page_of_another_site_changes_nothing(tmp_path):
    service = Service(tmp_path / "open", auth="off")
    try:
        assert service.client.post("/events", json={}).status_code == 200
        answer = service.client.post("/events", json={}, headers={"Origin": "https://evil.example"})
        assert "another site" in problem(answer, 403)
        assert "another site" in problem(
            service.client.post(
                "/events", json={}, headers={"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
            ),
            403,
        )
        assert service.client.get("/recommend/1", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200
    finally:
        service.close()


# --- who can reach it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_another_server_than_serve_asks_for_keys(tmp_path, host):
    """The settings say nothing of the socket that uvicorn was told to bind; with `auth=auto` that means keys."""
    service = Service(tmp_path / "auto", auth="auto", bind=host, host="127.0.0.1")
    try:
        asks = (("GET", "/recommend/1"), ("POST", "/events"), ("DELETE", "/users/1"), ("POST", "/model/reload"))
        for method, path in asks:
            assert "API key" in problem(service.client.request(method, path), 401)
        assert service.client.get("/recommend/1", headers=service.sign("read")).status_code == 200
    finally:
        service.close()


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"workers": 2}, False),
        ({"host": "0.0.0.0", "workers": 2}, True),
        ({"auth": "on"}, True),
        ({"host": "0.0.0.0", "auth": "off"}, False),
    ],
)
def test_serve_asks_for_keys_where_others_can_reach_it(tmp_path, settings, asked):
    with Server(tmp_path, tmp_path / "models", api_keys_file=tmp_path / "keys.json", **settings) as server:
        for method, path in (("DELETE", "/users/1"), ("GET", "/recommend/1"), ("GET", "/metrics")):
            assert (server.ask(method, path)[0] == 401) == asked


def test_a_name_that_was_bound_to_this_machine_by_a_stranger_opens_nothing(tmp_path):
    """DNS rebinding: to the browser page and service are one site; the `Host` alone tells them apart."""
    publish_board(tmp_path / "models")
    with Server(tmp_path, tmp_path / "models") as server:
        own, evil = f"localhost:{server.port}", f"evil.example:{server.port}"
        for _ in range(2):  # the second one is a kept answer
            assert server.get("/recommend/1")[0] == server.get("/recommend/1", headers={"Host": own})[0] == 200
        reads = (("GET", "/recommend/1"), ("GET", "/users/1/history"))
        for method, path in (*reads, ("DELETE", "/users/1"), ("POST", "/events"), ("POST", "/model/reload")):
            same = {"Host": evil, "Origin": f"http://{evil}", "Sec-Fetch-Site": "same-origin"}
            status, headers, body = server.ask(method, path, headers=same)
            assert status == 403 and headers["content-type"] == "application/problem+json"
            assert "evil.example" in body["detail"]
        assert server.get("/health/live", headers={"Host": evil})[0] == 200
        same = {"Host": own, "Origin": f"http://{own}", "Sec-Fetch-Site": "same-origin"}
        assert server.ask("DELETE", "/users/1", headers=same)[2]["forgotten"]
    with Server(tmp_path, tmp_path / "models", allowed_hosts='["shop.internal"]') as server:
        assert server.get("/recommend/1", headers={"Host": "shop.internal"})[0] == 200
        assert server.get("/recommend/1", headers={"Host": "evil.example"})[0] == 403


def test_a_file_of_keys_that_cannot_be_read_for_a_moment_is_read_again(tmp_path, caplog):
    """What was removed meanwhile must not stay a key because the one look at the new file failed."""
    file = tmp_path / "keys.json"
    old, new = add_key(file, "old"), add_key(file, "new")
    keys = Keys(file)
    assert keys.find(old.encode()).name == "old"
    remove_key(file, "old")
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        keys.refresh(), keys.refresh()
        assert keys.find(old.encode()) and [
            record.message.count("Too many open files") for record in caplog.records
        ] == [1]
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    keys.refresh()
    assert keys.find(old.encode()) is None and keys.find(new.encode()).name == "new"


# --- rate ------------------------------------------------------------------------------------------------------------


def test_the_rate_holds_for_all_workers_together(tmp_path):
    "Two workers, each reached over many connections: one rate for each key, and for the address of who guesses keys."
    service = Service(tmp_path / "limited", workers=2, auth="on", rate_limit=5)
    try:
        pids, good, refused, lock = set(), 0, [], threading.Lock()
        began = time.monotonic()

        def ask():
            nonlocal good
            for _ in range(15):
                with httpx2.Client(base_url=service.url, timeout=20) as client:
                    answer, pid = (
                        client.get("/recommend/1", headers=service.sign("read")),
                        client.get("/health/live").json()["pid"],
                    )
                with lock:
                    pids.add(pid)
                    good += answer.status_code == 200
                    refused.extend([answer] if answer.status_code == 429 else [])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        assert len(pids) == 2, "both workers answered"
        assert 5 <= good <= 5 + 5 * seconds + 1, (good, seconds)
        assert (
            refused and "5 requests a second" in problem(refused[0], 429) and refused[0].headers["retry-after"] == "1"
        )
        assert service.client.get("/recommend/1", headers=service.sign("write")).status_code == 200, (
            "another key has its own rate"
        )
        statuses = [
            service.client.get("/recommend/1", headers={"X-API-Key": f"guess {k}"}).status_code for k in range(60)
        ]
        assert set(statuses[:3]) == {401} and 429 in statuses, "guessing is limited by address"
    finally:
        service.close()
