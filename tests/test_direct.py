"""A plain question answered directly is what the framework answers: the same status, headers and body."""

import asyncio
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import publish_board

from product_recs.api import create_app
from product_recs.core.settings import Settings
from product_recs.web import direct

OWN = {b"x-request-id", b"date"}  # differ from one request to the next


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("direct")
    publish_board(folder / "models")
    app = create_app(Settings(
        models_dir=folder / "models", database_url=f"sqlite:///{folder}/feedback.db", auth="off", max_n=20,
        cache_size=0, log_level="ERROR",
    ))  # fmt: skip
    app.state.service.start()
    yield app
    app.state.service.stop()


def asked(app, path, query, method="GET"):
    "Status, headers without those that differ each time, body, and how the log calls the route."
    sent, line = [], {}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode("latin-1", "replace"), "root_path": "",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": line,
    }  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, body = sent[0], b"".join(message.get("body", b"") for message in sent[1:])
    headers = sorted((name, value) for name, value in start["headers"] if name not in OWN)
    return start["status"], headers, re.sub(rb'"request_id": ?"[^"]*"', b"", body)


def both_ways(app, monkeypatch, *question):
    "The answer as it is, and the answer of the framework alone."
    as_it_is = asked(app, *question)
    with monkeypatch.context() as patch:
        patch.setattr(direct, "read_plain", lambda query, most: None)
        return as_it_is, asked(app, *question)


@pytest.mark.parametrize("query", [
    "", "n=3", "n=20", "n=1&task=discovery", "detail=true&n=2", "detail=false", "place=home", "place=a.b-c_d",
    "task=next_purchase", "n=21", "n=0", "n=-1", "n=abc", "n=1.0", "n=+3", "n=%33", "n=3&n=4", "n=", "n", "&", "x=1",
    "detail=yes", "detail=2", "task=", "task=both", "place=", "diversity=0.5", "diversity=2", "explore=0.1", "n=3;x",
    "n=3&", "N=3", "place=" + "a" * 101, "n=9999999999999999999", "n=\xb2", "n=3#", "detail=True",
])  # fmt: skip
@pytest.mark.parametrize("path", ["/recommend/1", "/recommend/nobody", "/recommend/007"])
def test_the_same_answer_both_ways(board, monkeypatch, path, query):
    directly, by_framework = both_ways(board, monkeypatch, path, query)
    assert directly == by_framework


@pytest.mark.parametrize("path", [
    "/recommend/", "/recommend/1/", "/recommend/1/2", "/recommend", "/recommend/%31", "/recommend/a%2Fb",
    "/RECOMMEND/1", "/recommend/" + "9" * 2000, "/recommend/ü", "/recommend/1%00", "/static/recommend/1",
])  # fmt: skip
def test_the_same_answer_for_every_path(board, monkeypatch, path):
    directly, by_framework = both_ways(board, monkeypatch, path, "n=2")
    assert directly == by_framework


def test_other_methods_are_the_frameworks(board, monkeypatch):
    for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        directly, by_framework = both_ways(board, monkeypatch, "/recommend/1", "n=2", method)
        assert directly == by_framework


PARTS = st.sampled_from(["n", "detail", "task", "place", "diversity", "x", "", "N"])
TEXTS = st.one_of(
    st.sampled_from(["1", "5", "20", "21", "0", "true", "false", "1e1", "discovery", "next_purchase", "home", "", "+"]),
    st.text(alphabet="0123456789abt.-_=%+ &;", max_size=6),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PARTS, TEXTS), max_size=4))
def test_the_same_answer_for_any_query(board, parts):
    query = "&".join(f"{name}={text}" for name, text in parts)
    with pytest.MonkeyPatch.context() as patch:
        directly, by_framework = both_ways(board, patch, "/recommend/3", query)
    assert directly == by_framework


def test_an_error_inside_is_told_as_the_framework_tells_it(board, monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr("product_recs.api.respond", broken)
    status, _, body = asked(board, "/recommend/1", "n=2")
    assert status == 500 and json.loads(body)["status"] == 500
