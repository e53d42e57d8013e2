"""Requests that no friendly client sends: each has one right answer, and after all of them the service still answers,
in the same memory.

`python tests/test_hostile.py` prints them with their answers as a Markdown table."""

import gzip
import http.client
import json
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from support import Server, publish_board

EVENT = {"user_id": 1, "item_id": 101, "event": "view", "quantity": 1}
HUGE = 10_000_000
GOOD = {
    "/recommend": {"users": [1]},
    "/events": EVENT,
    "/availability": {"items": [{"item_id": 101, "available": True}]},
}


@dataclass
class Hostile:
    "A request as the bytes that go over the wire, and what must come back."

    name: str
    data: bytes
    status: int
    detail: str = ""  # in the answer
    method: str = "GET"
    check: Callable | None = None  # of headers and body
    big: bool = False  # too long to be sent a thousand times
    group: str = ""


def send(port, case):
    "The answer to raw bytes: status, headers, body."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(case.data)
        except ConnectionError:
            pass  # it has answered already and does not want the rest
        answer = http.client.HTTPResponse(connection, method=case.method)
        answer.begin()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def request(method, path, body=None, *headers, host="localhost", kind="application/json", length=None):
    "One HTTP request."
    payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), f"Host: {host}".encode()]
    if body is not None:
        lines += [f"Content-Type: {kind}".encode()] * (kind is not None) + [
            f"Content-Length: {len(payload) if length is None else length}".encode()
        ]
    lines += [header.encode("latin-1") for header in headers]
    return b"\r\n".join([*lines, b"", payload])


def chunked(body, size=65536):
    "A body in chunks."
    return (
        b"".join(
            b"%x\r\n%b\r\n" % (len(part), part)
            for part in (body[start : start + size] for start in range(0, len(body), size))
        )
        + b"0\r\n\r\n"
    )


def in_chunks(path, body):
    return request("POST", path, None, "Content-Type: application/json", "Transfer-Encoding: chunked") + chunked(body)


def short(text):
    "A long text as the table shows it."
    return text if len(text) <= 60 else f"{text[:20]}... ({len(text):,} characters)"


# --- numbers, JSON and bodies ----------------------------------------------------------------------------------------


def of_numbers():
    for n in (
        "99999999999999999999",
        "-1",
        "0",
        "NaN",
        "1e400",
        "-0.0",
        "Infinity",
        "1" * 5000,
        "%00",
        "0x10",
        "%D9%A1",
    ):
        yield Hostile(f"`?n={short(n)}`", request("GET", f"/recommend/1?n={n}"), 422, "n:")
    for n in ("99999999999999999999", "-1", "NaN", "1e400", "1.5", '"5"', "true", "null", "[]", "1" * 5000):
        yield Hostile(
            f'`{{"n": {short(n)}}}`',
            request("POST", "/recommend", f'{{"n": {n}}}'.encode()),
            400 if len(n) > 100 else 422,
        )
    for path in ("/similar/101", "/popular"):
        yield Hostile(f"`{path}?n=1e400`", request("GET", f"{path}?n=1e400"), 422, "n:")
    for path in ("/users", "/items", "/users/1/history"):
        yield Hostile(f"`{path}?limit=-1`", request("GET", f"{path}?limit=-1&query=a"), 422, "limit:")


def of_json():
    deep = b"[" * 100_000
    for path in ("/recommend", "/events", "/availability"):
        yield Hostile(f"100,000 open brackets to {path}", request("POST", path, deep), 400)
        yield Hostile(
            f"100,000 nested objects to {path}", request("POST", path, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), 400
        )
        yield Hostile(f"UTF-8 that is none to {path}", request("POST", path, b'{"users": ["\xff\xfe"]}'), 400)
        yield Hostile(
            f"UTF-16 to {path}",
            request("POST", path, '{"users": [1]}'.encode("utf-16")),
            {"/recommend": 200, "/events": 200, "/availability": 422}[path],
        )
        yield Hostile(
            f"a byte order mark before JSON to {path}",
            request("POST", path, b"\xef\xbb\xbf" + json.dumps(GOOD[path]).encode()),
            200,
        )
        yield Hostile(f"NaN to {path}", request("POST", path, b'{"n": NaN}'), 200 if path == "/events" else 422)
        yield Hostile(f"no JSON to {path}", request("POST", path, b"n=10"), 400)
        yield Hostile(f"half a JSON document to {path}", request("POST", path, b'{"users": [1'), 400)
        yield Hostile(f"an empty body to {path}", request("POST", path, b""), 400)
        yield Hostile(f"no content type to {path}", request("POST", path, {}, kind=None), 415)
        yield Hostile(f"text/plain to {path}", request("POST", path, {}, kind="text/plain"), 415)
        yield Hostile(f"a form to {path}", request("POST", path, b"a=b", kind="application/x-www-form-urlencoded"), 415)
        yield Hostile(
            f"a gzip body to {path}",
            request("POST", path, gzip.compress(json.dumps(EVENT).encode()), "Content-Encoding: gzip"),
            415,
        )
        yield Hostile(f"a list to {path}", request("POST", path, []), 422)
        yield Hostile(f"null to {path}", request("POST", path, b"null"), 422)
        yield Hostile(
            f"a key that is a lone surrogate to {path}",
            request("POST", path, b'{"\\ud800": 1}'),
            200 if path == "/events" else 422,
        )
        yield Hostile(f"10 MB to {path}", request("POST", path, b" " * HUGE), 413, big=True)
        yield Hostile(f"10 MB in chunks to {path}", in_chunks(path, b" " * HUGE), 413, big=True)
        yield Hostile(f"10 MB announced and not sent to {path}", request("POST", path, b"{", length=HUGE), 413)
    yield Hostile(
        "a lone surrogate as a user", request("POST", "/recommend", b'{"users": ["\\ud800"]}'), 422, "users.0"
    )
    yield Hostile("NUL in a user id", request("POST", "/recommend", b'{"users": ["a\\u0000b"]}'), 422)
    yield Hostile(
        "the same key twice in an object",
        request("POST", "/recommend", b'{"n": 3, "n": 2}'),
        200,
        check=lambda _, body: len(body["results"][0]["recommendations"]) == 2,
    )
    yield Hostile(
        "good JSON in chunks of 3 bytes",
        request("POST", "/recommend", None, "Content-Type: application/json", "Transfer-Encoding: chunked")
        + chunked(b'{"n": 2}', 3),
        200,
    )
    ids = [1] * 10_000
    yield Hostile(
        "10,000 ids in `allow` and in `deny`",
        request("POST", "/recommend", {"filters": {"allow": ids, "deny": ids}}),
        200,
    )
    yield Hostile(
        "10,001 ids in `deny`", request("POST", "/recommend", {"filters": {"deny": [1] * 10_001}}), 422, "filters.deny"
    )
    yield Hostile("10,001 events", request("POST", "/events", {"events": [EVENT] * 10_001}), 422, "10,001", big=True)
    yield Hostile("1,001 users", request("POST", "/recommend", {"users": list(range(1001))}), 422, "users")
    yield Hostile(
        "1,001 items to /availability",
        request("POST", "/availability", {"items": [{"item_id": 1, "available": True}] * 1001}),
        422,
        "items",
    )
    yield Hostile(
        "`where` with a number of 30 digits",
        request("POST", "/recommend", b'{"filters": {"where": {"price": [1%s]}}}' % (b"0" * 30)),
        200,
    )
    yield Hostile(
        "`where` up to 1e308", request("POST", "/recommend", b'{"filters": {"where": {"price": {"max": 1e308}}}}'), 200
    )
    yield Hostile(
        "`where` up to a number of 400 digits",
        request("POST", "/recommend", b'{"filters": {"where": {"price": {"max": 1%s}}}}' % (b"0" * 400)),
        422,
        "price",
    )
    yield Hostile(
        "`where` up to 1e400",
        request("POST", "/recommend", b'{"filters": {"where": {"price": {"max": 1e400}}}}'),
        422,
        "price",
    )
    yield Hostile(
        "`max_per` of 30 digits",
        request("POST", "/recommend", b'{"filters": {"max_per": {"category": 1%s}}}' % (b"0" * 30)),
        200,
    )
    yield Hostile(
        "`where` on a column that is not there",
        request("POST", "/recommend", {"filters": {"where": {"__class__": [1]}}}),
        422,
        "__class__",
    )
    yield Hostile(
        "`where` with a lone surrogate as a column",
        request("POST", "/recommend", b'{"filters": {"where": {"\\ud800": [1]}}}'),
        422,
    )
    yield Hostile(
        "`where` with a range upside down",
        request("POST", "/recommend", {"filters": {"where": {"price": {"min": 2, "max": 1}}}}),
        422,
        "price",
    )


WRONG = {
    "a text": "x",
    "a list": [],
    "an object": {},
    "true": True,
    "null": None,
    "1.5": 1.5,
    "a number as text": "1",
    "10**30": 10**30,
}
TAKEN = {  # what each field takes of them
    "users": {"null"},
    "users.0": {"a text", "a number as text", "10**30"},
    "n": set(),
    "task": {"null"},  # the one of the user's arm, or discovery
    "events": {"a list"},
    "detail": {"true"},
    "filters": {"an object"},
    "events.0.item_id": {"a text", "a number as text", "10**30"},
    "events.0.event": {"a text", "a number as text"},
    "events.0.quantity": {"1.5", "10**30"},
    "filters.exclude_seen": {"true", "null"},
    "filters.deny": {"a list"},
    "filters.deny.0": {"a text", "a number as text", "10**30"},
    "filters.allow": {"a list", "null"},
    "filters.where": {"an object"},
    "filters.where.price": {"a list", "an object"},
    "filters.max_per": {"an object"},
    "filters.max_per.category": {"10**30"},
    "filters.where.price.min": {"1.5", "null", "10**30"},
}
"""fields of POST /recommend, by path"""


def at(path, value):
    "An object that has one value at a path such as `filters.deny.0`."
    for name in reversed(path.split(".")):
        value = [value] if name == "0" else {name: value}
    return value


def of_types():
    for path, taken in TAKEN.items():
        for what, value in WRONG.items():
            if what not in taken:
                yield Hostile(
                    f"`{path}` is {what}",
                    request("POST", "/recommend", at(path, value)),
                    422,
                    path.split(".")[0] if path.startswith("filters.where.price") else path,
                )
    good = {
        "user_id": {"a text", "a number as text", "10**30"},
        "item_id": {"a text", "a number as text", "10**30"},
        "event": {"a text"},
        "quantity": {"1.5"},
        "timestamp": {"null"},
        "key": {"a text", "a number as text", "null"},
    }
    for field, taken in good.items():
        for what, value in WRONG.items():
            if what not in taken:
                yield Hostile(
                    f"/events: `{field}` is {what}",
                    request("POST", "/events", EVENT | {field: value}),
                    200,
                    check=lambda _, body, field=field: (
                        body["rejected"] == 1 == len(body["results"]) and field in body["results"][0]["error"]
                    ),
                )
    for field, value in {
        "user_id": "a\0b",
        "item_id": " ",
        "event": "BUY NOW",
        "quantity": 0,
        "timestamp": "2999-01-01",
        "key": "two words",
        "extra": 1,
    }.items():
        yield Hostile(
            f"/events: `{field}` is {value!r}",
            request("POST", "/events", EVENT | {field: value}),
            200,
            check=lambda _, body, field=field: body["rejected"] == 1 and field in body["results"][0]["error"],
        )
    for field in ("item_id", "available"):
        for what, value in WRONG.items():
            if not (field == "item_id" and ("text" in what or what == "10**30")) and not (
                field == "available" and what == "true"
            ):
                yield Hostile(
                    f"/availability: `{field}` is {what}",
                    request("POST", "/availability", {"items": [{"item_id": 101, "available": True} | {field: value}]}),
                    422,
                    f"items.0.{field}",
                )


# --- paths, methods and headers --------------------------------------------------------------------------------------


def of_paths():
    for path in (
        "/%2e%2e/%2e%2e/etc/passwd",
        "/../../etc/passwd",
        "/static/../api.py",
        "/static/%2e%2e/api.py",
        "/static/..%2fapi.py",
        "/static/..%5capi.py",
        "/static/%00",
        "/static//etc/passwd",
        "/static/",
        "/static",
        "/static/" + "a" * 5000,
        "//",
        "//metrics",
        "/recommend//1",
        "/recommend/1/",
        "/%2f",
        "/\\..\\..\\windows",
        "/;/",
        "/%",
        "/%zz",
        "/recommend/1%2f..%2f..%2fmetrics/x",
    ):
        yield Hostile(f"`{short(path)}`", request("GET", path), 404)
    for path in (
        "/recommend/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/recommend/..",
        "/recommend/a%00b",
        "/recommend/%ED%A0%80",
        "/recommend/%ff",
        "/recommend/\\",
        "/recommend/" + "x" * 60_000,
    ):
        yield Hostile(f"`{short(path)}`, a user like any other", request("GET", path), 200)
    long = "x" * 5000
    for id in ("a%00b/history", "%20/history", f"{long}/history", "%00/export", f"{long}/export"):
        path = f"/users/{id}"
        yield Hostile(f"`{short(path)}`", request("GET", path), 422, "user_id")
    for path in ("/users/a%00b", "/users/null", "/users/%ED%A0%80%22"):
        yield Hostile(f"`DELETE {path}`", request("DELETE", path), 422, "user_id", "DELETE")
    for path in ("/items/%00", "/similar/%00", "/explain/1/%00", "/items/" + "9" * 5000):
        yield Hostile(f"`{short(path)}`", request("GET", path), 404)
    yield Hostile(
        "`/popular?category=%00`",
        request("GET", "/popular?category=%00"),
        200,
        check=lambda _, body: body["recommendations"] == [],
    )
    yield Hostile(
        "`/popular?category=%0d%0aX-Evil:1`",
        request("GET", "/popular?category=%0d%0aX-Evil:1"),
        200,
        check=lambda headers, _: "x-evil" not in headers,
    )
    yield Hostile("`/items?query=%00`", request("GET", "/items?query=%00"), 200)
    yield Hostile("`/items?query=` of 201 letters", request("GET", "/items?query=" + "a" * 201), 422)
    yield Hostile("the same parameter twice: `?n=1&n=2`", request("GET", "/recommend/1?n=1&n=2"), 200)
    yield Hostile("10,000 parameters", request("GET", "/recommend/1?" + "a=1&" * 10_000), 200)
    yield Hostile("a path of 10 MB", request("GET", "/recommend/" + "x" * HUGE), 431, big=True)
    yield Hostile("a raw space in the path", b"GET /recommend/a b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400)
    yield Hostile("raw bytes above 127 in the path", b"GET /recommend/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400)
    yield Hostile("a raw NUL in the path", b"GET /recommend/\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400)
    yield Hostile("a whole URL as the path", request("GET", "http://evil.example/health/live"), 200)


ROUTES = {
    "/recommend/1": "GET",
    "/recommend": "POST",
    "/similar/101": "GET",
    "/popular": "GET",
    "/new": "GET",
    "/explain/1/101": "GET",
    "/events": "POST",
    "/availability": "POST",
    "/users": "GET",
    "/users/1": "DELETE",
    "/users/1/history": "GET",
    "/users/1/export": "GET",
    "/items/101": "GET DELETE",
    "/items?query=thing": "GET POST",
    "/rules": "GET PUT DELETE",
    "/rules/preview": "POST",
    "/model": "GET",
    "/model/reload": "POST",
    "/health/live": "GET",
    "/health/ready": "GET",
    "/metrics": "GET",
    "/monitor": "GET",
    "/": "GET",
    "/docs": "GET",
    "/openapi.json": "GET",
    "/static/app.js": "GET",
}


def of_methods():
    for path, methods in ROUTES.items():
        right = methods.split()
        for method in ("HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "POST", "GET", "PROPFIND"):
            if method not in right:
                head = method == "HEAD" and "GET" in right
                yield Hostile(
                    f"`{method} {path}`",
                    request(method, path),
                    200 if head else 405,
                    "" if head else method,
                    method,
                    check=lambda headers, body, right=right, head=head: (
                        body == b"" if head else all(verb in headers["allow"] for verb in right)
                    ),
                )
    yield Hostile("`OPTIONS *`", request("OPTIONS", "*"), 404, method="OPTIONS")
    yield Hostile("`CONNECT evil.example:443`", request("CONNECT", "evil.example:443"), 400, method="GET")
    yield Hostile("a method that does not exist", request("BREW", "/recommend/1"), 400)


def of_headers():
    def unseen(word):
        return lambda headers, body: (
            word not in json.dumps(headers).lower()
            and word not in (body if isinstance(body, bytes) else json.dumps(body).encode()).decode().lower()
        )

    forged = ("X-Forwarded-Host: evil.example", "X-Forwarded-Prefix: /evil.example")
    for path, status in (
        ("/recommend/1", 200),
        ("/docs", 200),
        ("/", 200),
        ("/nowhere", 404),
        ("/static", 404),
        ("/openapi.json", 200),
    ):
        yield Hostile(
            f"a forged `X-Forwarded-Host` for {path}",
            request("GET", path, None, *forged),
            status,
            check=unseen("evil.example"),
        )
    for path, status in (
        ("/recommend/1", 403),
        ("/metrics", 403),
        ("/docs", 200),
        ("/", 200),
        ("/nowhere", 403),
        ("/openapi.json", 200),
    ):
        yield Hostile(f"another `Host` for {path}", request("GET", path, None, host="evil.example"), status)
    for host in (
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "0.0.0.0",
        "2130706433",
        "[::]",
        "localhost:1:2",
        "evil@localhost",
    ):
        yield Hostile(
            f"`Host: {host}`", request("GET", "/recommend/1", None, host=host), 403, "PRODUCT_RECS_ALLOWED_HOSTS"
        )
    yield Hostile("no `Host` for data", b"GET /recommend/1 HTTP/1.1\r\n\r\n", 403)
    yield Hostile("no `Host` at all", b"GET /health/live HTTP/1.1\r\n\r\n", 200)
    yield Hostile("a `Host` of rubbish", request("GET", "/docs", host='"><script>'), 200, check=unseen('"><script>'))
    yield Hostile(
        "CRLF in `X-Request-ID`",
        request("GET", "/health/live", None, "X-Request-ID: a\r\nX-Evil: 1"),
        200,
        check=lambda headers, _: "x-evil" not in headers,
    )
    yield Hostile(
        "a bare CR in `X-Request-ID`", request("GET", "/health/live", None, "X-Request-ID: a\rX-Evil: 1"), 400
    )
    yield Hostile(
        "%0d%0a in `X-Request-ID`",
        request("GET", "/health/live", None, "X-Request-ID: a%0d%0aX-Evil:1"),
        200,
        check=lambda headers, _: len(headers["x-request-id"]) == 32 and "x-evil" not in headers,
    )
    yield Hostile(
        "two `X-Request-ID`", request("GET", "/health/live", None, "X-Request-ID: one", "X-Request-ID: two"), 200
    )
    yield Hostile(
        "`X-Request-ID` of 100,000 letters",
        request("GET", "/health/live", None, "X-Request-ID: " + "a" * 100_000),
        431,
        big=True,
    )
    yield Hostile(
        "10,000 headers", request("GET", "/health/live", None, *(f"X-{k}: 1" for k in range(10_000))), 431, big=True
    )
    yield Hostile("a header of 10 MB", request("GET", "/health/live", None, "X-Long: " + "a" * HUGE), 431, big=True)
    yield Hostile(
        "a page of another site that changes something",
        request("POST", "/events", EVENT, "Origin: https://evil.example", "Sec-Fetch-Site: cross-site"),
        403,
    )
    yield Hostile(
        "a websocket",
        request(
            "GET",
            "/recommend/1",
            None,
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version: 13",
        ),
        200,
    )
    yield Hostile(
        "`Expect: 100-continue` and too large a body",
        request("POST", "/recommend", b"{", "Expect: 100-continue", length=HUGE),
        413,
    )
    yield Hostile(
        "`Range` of a page",
        request("GET", "/static/app.js", None, "Range: bytes=999999999-"),
        416,
        check=lambda headers, _: headers["content-range"].startswith("bytes */"),
    )


def of_smuggling():
    body = b'{"n": 2}'
    for name, headers in {
        "`Content-Length` and `Transfer-Encoding`": ("Content-Length: 4", "Transfer-Encoding: chunked"),
        "`Transfer-Encoding` and `Content-Length`": ("Transfer-Encoding: chunked", "Content-Length: 4"),
        "two different `Content-Length`": ("Content-Length: 8", "Content-Length: 4"),
        "the same `Content-Length` twice": ("Content-Length: 8", "Content-Length: 8"),
        "`Content-Length: -1`": ("Content-Length: -1",),
        "`Content-Length: +8`": ("Content-Length: +8",),
        "`Content-Length: 0x8`": ("Content-Length: 0x8",),
        "`Content-Length` of 30 digits": ("Content-Length: " + "9" * 30,),
        "`Content-Length: 8, 8`": ("Content-Length: 8, 8",),
        "`Transfer-Encoding: chunked, identity`": ("Transfer-Encoding: chunked, identity",),
        "a space before the colon": ("Content-Length : 8",),
        "a folded `Transfer-Encoding`": ("Transfer-Encoding:\r\n chunked", "Content-Length: 4"),
        "`Transfer-Encoding: xchunked`": ("Transfer-Encoding: xchunked", "Content-Length: 8"),
    }.items():
        yield Hostile(
            name,
            request("POST", "/recommend", None, "Content-Type: application/json", *headers) + body,
            400,
            method="POST",
        )
    for name, tail in {
        "a chunk whose size is no number": b"zz\r\n{}\r\n0\r\n\r\n",
        "a chunk longer than it says": b"1\r\n{}\r\n0\r\n\r\n",
        "a chunk of 20 hex digits": b"f" * 20 + b"\r\n{}",
    }.items():
        yield Hostile(
            name,
            request("POST", "/recommend", None, "Content-Type: application/json", "Transfer-Encoding: chunked") + tail,
            400,
            method="POST",
        )
    yield Hostile("HTTP/9.9", b"GET /health/live HTTP/9.9\r\nHost: localhost\r\n\r\n", 400)
    yield Hostile("HTTP/2 with prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400)
    yield Hostile("the hello of TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400)


GROUPS = {
    "numbers": of_numbers,
    "json": of_json,
    "types": of_types,
    "paths": of_paths,
    "methods": of_methods,
    "headers": of_headers,
    "smuggling": of_smuggling,
}
CASES = [replace(case, group=name) for name, group in GROUPS.items() for case in group()]


# --- the tests -------------------------------------------------------------------------------------------------------

NO_HTTP = b"Invalid HTTP request received."  # what uvicorn says itself


def fault(case, answer):
    "What is wrong with an answer; empty where nothing is."
    status, headers, content = answer
    try:
        body = json.loads(content) if content and "json" in headers.get("content-type", "") else content
    except ValueError:
        return "the body is not the JSON that it says it is"
    if status != case.status:
        return f"{status} in place of {case.status}: {content[:200]}"
    if (
        status >= 400 and status != 416 and content != NO_HTTP and case.method != "HEAD"
    ):  # 416 comes from the framework's server of files
        if (
            headers["content-type"] != "application/problem+json"
            or not headers["x-request-id"]
            or body["status"] != status
            or not body["detail"]
        ):
            return f"no problem document: {headers} {content[:200]}"
    if status < 400 and "x-request-id" not in headers:
        return "no request id"
    if case.method != "HEAD" and case.detail not in content.decode():
        return f"{case.detail!r} is not named: {content[:300]}"
    return "" if case.check is None or case.check(headers, body) else f"the answer is wrong: {headers} {content[:300]}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    publish_board(folder / "models")
    with Server(folder, folder / "models") as running:
        yield running


def whole(server):
    "It answers what is right, to a user whom no hostile request was about."
    return server.get("/recommend/4?n=1")[2]["recommendations"] == [104] and server.get("/health/ready")[0] == 200


@pytest.mark.parametrize("group", GROUPS)
def test_each_has_its_one_answer(server, group):
    faults = {
        case.name: flaw for case in CASES if case.group == group and (flaw := fault(case, send(server.port, case)))
    }
    assert not faults
    assert whole(server)


def test_no_request_made_a_fault(server):
    "Whatever came before: no line of the log is a fault of ours."
    assert [line for line in server.lines() if line["status"] is None or line["status"] >= 500 or "error" in line] == []
    assert "Traceback" not in server.stderr.read_text()


def test_clients_that_never_finish_hold_nobody_up(server):
    "300 connections stop in the middle of a head or of a body; another client is answered all the same."
    halves = [
        b"GET /recommend/1 HTTP/1.1\r\nHost: x",
        request("POST", "/recommend", b'{"n"', length=100),
        request("POST", "/events", None, "Transfer-Encoding: chunked") + b"5\r\n{",
    ]
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(300)]
    try:
        for k, connection in enumerate(slow):
            connection.sendall(halves[k % 3])
        for user in range(3, 13):
            assert server.get(f"/recommend/{user}?n=1")[2] == {"user_id": user, "recommendations": [100 + user]}
        slow[1].sendall(b": 2}" + b" " * 92)  # one goes on after all
        assert slow[1].recv(1000).startswith(b"HTTP/1.1 200 OK")
    finally:
        for connection in slow:
            connection.close()
    assert whole(server)


def test_a_body_in_many_parts_is_no_long_head(server):
    "`BoundedHttp.on_body` begins the count of unfinished bytes anew, and hands the body on."
    events = [{"user_id": 1, "item_id": 101, "key": f"part-{number}-{'x' * 90}"} for number in range(900)]
    body = json.dumps({"events": events}).encode()
    assert len(body) > 100_000  # more than a head may have
    head = f"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n")
        for start in range(0, len(body), 4096):
            connection.sendall(body[start : start + 4096])
            time.sleep(0.001)
        answer = http.client.HTTPResponse(connection, method="POST")
        answer.begin()
        assert answer.status == 200 and json.loads(answer.read())["accepted"] == len(events)


def test_one_connection_keeps_its_order(server):
    "Requests that come in one piece are answered one after the other, each with its own answer."
    asked = [request("GET", f"/recommend/{user}?n=1", None, f"X-Request-ID: r{user}") for user in range(3, 13)]
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"".join(asked))
        stream = connection.makefile("rb")
        for user in range(3, 13):
            assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = http.client.parse_headers(stream)
            body = json.loads(stream.read(int(headers["content-length"])))
            assert body == {"user_id": user, "recommendations": [100 + user]} and headers["x-request-id"] == f"r{user}"


def test_memory_stays(server):
    "2,000 hostile requests after 2,000 hostile requests need no more memory; the allowance is what an allocator keeps."
    small = [case for case in CASES if not case.big]
    process = psutil.Process(server.process.pid)

    def many():
        for k in range(2000):
            send(server.port, small[k % len(small)])
        return process.memory_info().rss

    before = many()
    assert many() - before < 16_000_000
    assert process.num_fds() < 100 and whole(server)


def main():
    "The table for a note."
    with tempfile.TemporaryDirectory() as name:
        publish_board(Path(name) / "models")
        with Server(Path(name), Path(name) / "models") as server:
            print("| group | request | answer |\n|---|---|---|")
            for case in CASES:
                answer = send(server.port, case)
                status, _, content = answer
                said = (
                    NO_HTTP.decode()
                    if content == NO_HTTP
                    else json.loads(content)["detail"]
                    if b'"detail"' in content[:200] and status >= 400
                    else ""
                )
                print(
                    f"| {case.group} | {case.name.replace('|', chr(92) + '|')} | {status} "
                    f"{short(said).replace('|', '/')}{' WRONG' if fault(case, answer) else ''} |"
                )


if __name__ == "__main__":
    main()
