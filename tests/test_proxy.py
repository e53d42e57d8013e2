"""The service behind a real nginx, with TLS and under a prefix: the configuration is the documented one, with other
ports and paths."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
from support import Server, publish_board

from product_recs.web.security import add_key

ROOT = Path(__file__).resolve().parents[1]
NGINX = os.environ.get("NGINX") or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PREFIX = "/recommender"
pytestmark = pytest.mark.skipif(NGINX is None, reason="there is no nginx; apt-get install nginx, or set NGINX")
WRAPPER = (
    ("user root;" if os.geteuid() == 0 else "")
    + """
daemon off; pid {0}/nginx.pid; error_log {0}/error.log; worker_processes 1; events {{}}
http {{ access_log off; client_body_temp_path {0}/a; proxy_temp_path {0}/b;
  fastcgi_temp_path {0}/c; uwsgi_temp_path {0}/d; scgi_temp_path {0}/e; include {0}/service.conf; }}
"""
)


def free():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Nginx:
    "nginx with ops/nginx.conf in front of a port of this machine."

    def __init__(self, folder, upstream, strip=False):
        folder.mkdir()
        self.folder, self.port = folder, free()
        self.base = f"https://localhost:{self.port}{PREFIX}/"
        certificate = [
            "-keyout",
            folder / "key.pem",
            "-out",
            folder / "cert.pem",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,DNS:shop.example",
        ]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *certificate], check=True, capture_output=True
        )
        conf = (ROOT / "ops/nginx.conf").read_text()
        changes = {
            "127.0.0.1:8000": f"127.0.0.1:{upstream}",
            "listen 443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "server_name shop.example": "server_name localhost shop.example",
            "/etc/ssl/certs/shop.example.pem": f"{folder}/cert.pem",
            "/etc/ssl/private/shop.example.key": f"{folder}/key.pem",
        }
        for old, new in {
            **changes,
            **({"proxy_pass http://product_recs;": "proxy_pass http://product_recs/;"} if strip else {}),
        }.items():
            assert conf.count(old) == 1, old
            conf = conf.replace(old, new)
        (folder / "service.conf").write_text(conf)
        (folder / "nginx.conf").write_text(WRAPPER.format(folder))
        folder.chmod(0o755)
        self.trust = ssl.create_default_context(cafile=folder / "cert.pem")

    def __enter__(self):
        self.process = subprocess.Popen(
            [NGINX, "-c", self.folder / "nginx.conf", "-e", self.folder / "error.log"], stderr=subprocess.PIPE
        )
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return self
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, self.process.stderr.read()
                time.sleep(0.02)

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)

    def ask(self, path, method="GET", body=None, source="127.0.0.1", **headers):
        """Status, headers and body; the path is what stands behind the prefix, or the whole one where it begins with
        two slashes."""
        connection = http.client.HTTPSConnection(
            "localhost", self.port, timeout=20, context=self.trust, source_address=(source, 0)
        )
        try:
            connection.request(
                method,
                path[1:] if path.startswith("//") else PREFIX + path,
                body,
                {"Content-Type": "application/json"}
                | {name.replace("_", "-"): value for name, value in headers.items()},
            )
            answer = connection.getresponse()
            content, fields = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
            return (
                answer.status,
                fields,
                json.loads(content)
                if content and "json" in fields.get("content-type", "")
                else content.decode("utf-8", "replace"),
            )
        finally:
            connection.close()


@pytest.fixture(scope="module", params=["the prefix goes on", "the prefix is taken away"])
def shop(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxy")
    publish_board(folder / "models", items=["a/b", *(f"i{number}" for number in range(101, 124))])
    key = add_key(folder / "keys.json", "all", "admin")
    with (
        Server(folder, folder / "models", auth="on", api_keys_file=folder / "keys.json", root_path=PREFIX) as server,
        Nginx(folder / "nginx", server.port, strip=request.param.endswith("away")) as nginx,
    ):
        nginx.server, nginx.key, nginx.keeps = server, key, not request.param.endswith("away")
        yield nginx


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found += [
            value for name, value in attributes if name in ("href", "src") and not value.startswith(("#", "data:"))
        ]


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_whatever_a_page_loads_lies_under_the_prefix(shop, page):
    status, _, text = shop.ask(page)
    assert status == 200
    links = [*Links(text).found, *re.findall(r"url: *['\"]([^'\"]+)", text)]
    if page == "/":
        links += re.findall(r"import[^'\"]*['\"]([^'\"]+)", shop.ask("/static/app.js")[2])
    assert len(links) >= 4
    for link in links:
        target = urlsplit(urljoin(f"{shop.base}{page[1:]}", link))
        assert target.port == shop.port and target.path.startswith(f"{PREFIX}/"), link
        assert shop.ask("/" + target.path)[0] == 200, link
    assert any(link.endswith("openapi.json") for link in links) or page == "/"


def test_the_service_answers_under_the_prefix_as_without(shop):
    sign = {"X_API_Key": shop.key}
    direct = lambda path, method="GET", body=None: shop.server.ask(method, path, body, {"X-API-Key": shop.key})
    for path in ("/recommend/1?n=3", "/similar/i101?n=2", "/popular", "/items/i101", "/users"):
        assert shop.ask(path, **sign)[2] == direct(path)[2] and shop.ask(path)[0] == 401
    assert shop.ask("/recommend/1?n=3", **sign)[2]["recommendations"][0] == "a/b"
    assert shop.ask("/openapi.json")[2]["servers"] == [{"url": PREFIX}]
    assert shop.ask("/nowhere", **sign)[2]["instance"] == f"{PREFIX}/nowhere"
    assert shop.ask("/recommend/1", "HEAD", **sign)[0] == 200
    moved = shop.ask(f"/{PREFIX}")
    assert moved[0] == 308 and moved[1]["location"].endswith(f"{PREFIX}/")
    assert shop.ask("/events", "POST", json.dumps({"user_id": 1, "item_id": "i102"}), **sign)[2]["accepted"] == 1
    assert shop.ask("/users/1", "DELETE", **sign)[2]["forgotten"] and shop.ask("/metrics", **sign)[0] == 200
    large = shop.ask("/events", "POST", b" " * 2_000_000, **sign)
    assert large[0] == 413 and "1,000,000" in large[2]["detail"]
    if shop.keeps:  # what a proxy decodes when it changes the path, nobody can undo
        assert (
            shop.ask("/items/a%2Fb", **sign)[2]["item_id"] == shop.ask("/similar/a%2Fb", **sign)[2]["item_id"] == "a/b"
        )


def test_the_rate_counts_clients_and_believes_only_the_proxy(tmp_path):
    publish_board(tmp_path / "models")
    with (
        Server(
            tmp_path,
            tmp_path / "models",
            auth="off",
            allowed_hosts='["shop.example"]',
            root_path=PREFIX,
            rate_limit=0.001,
        ) as server,
        Nginx(tmp_path / "nginx", server.port) as nginx,
    ):

        def status(source, **more):
            return nginx.ask("/popular", source=source, Host="shop.example", **more)[0]

        assert [status("127.0.0.5"), status("127.0.0.5"), status("127.0.0.6"), status("127.0.0.6")] == [
            200,
            429,
            200,
            429,
        ]
        assert status("127.0.0.5", X_Forwarded_For="10.9.9.9") == 429, "the proxy overwrites what the client claims"


def test_whom_the_settings_do_not_name_is_not_believed(tmp_path):
    publish_board(tmp_path / "models")
    with Server(tmp_path, tmp_path / "models", rate_limit=0.001, forwarded_allow_ips='["192.0.2.1"]') as server:
        assert [server.get("/popular", headers={"X-Forwarded-For": f"10.0.0.{number}"})[0] for number in range(3)] == [
            200,
            429,
            429,
        ]
    with Server(tmp_path, tmp_path / "models", rate_limit=0.001, forwarded_allow_ips='["127.0.0.0/8"]') as server:
        assert [server.get("/popular", headers={"X-Forwarded-For": f"10.0.0.{number}"})[0] for number in range(3)] == [
            200,
            200,
            200,
        ]


def test_without_keys_a_service_behind_a_proxy_answers_to_no_public_name(tmp_path):
    "Bound to a loopback address, and yet the world is at the door: the host that nginx hands on gives it away."
    publish_board(tmp_path / "models")
    with (
        Server(tmp_path, tmp_path / "models", root_path=PREFIX) as server,
        Nginx(tmp_path / "nginx", server.port) as nginx,
    ):
        assert (
            nginx.ask("/recommend/1", Host="shop.example")[0]
            == nginx.ask("/users/1", "DELETE", Host="shop.example")[0]
            == 403
        )
        assert nginx.ask("/recommend/1", Host="localhost")[0] == 200


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no browser at {CHROMIUM}; set CHROMIUM")
def test_a_browser_uses_the_page_and_the_documentation(shop):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(ignore_https_errors=True).new_page()
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on(
            "response",
            lambda answer: (
                wrong.append((answer.status, answer.url)) if answer.status >= 400 and answer.status != 401 else None
            ),
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(shop.base)
        page.get_by_label("API key").fill(shop.key)
        page.get_by_role("button", name="Use this key").click()
        playwright.expect(page.get_by_role("list", name="Recommendations").get_by_role("heading").first).to_be_visible()
        page.get_by_role("link", name="API docs").click()
        playwright.expect(page.get_by_text("The best items for a user")).to_be_visible()
        page.get_by_text("The process answers").click()
        page.get_by_role("button", name="Execute").click()
        playwright.expect(page.locator(".live-responses-table tbody .response-col_status").first).to_contain_text("200")
        browser.close()
    assert not wrong
    assert f"{shop.base}openapi.json" in asked and f"{shop.base}health/live" in asked
    assert [url for url in asked if not url.startswith((shop.base, "data:", "blob:"))] == []
