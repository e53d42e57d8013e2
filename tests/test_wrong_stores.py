"""Databases that cannot be a feedback store: the service starts, recommends from its model, and says what is wrong;
nothing is half taken."""

import asyncio
import os
import subprocess
import sys

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from support import database_numbers, new_database, publish_board

from product_recs.api import create_app
from product_recs.core.errors import StoreError
from product_recs.core.settings import Settings
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # platformdirs, where there is no XDG_RUNTIME_DIR


def in_encoding(encoding):
    def make(server):
        name = f"encoded_{next(database_numbers)}"
        server.psql(f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
        return server.get_uri(database=name)

    return make


def without_rights(server):
    "Whoever connects may neither make tables nor see any."
    address, role = new_database(server), f"poor_{next(database_numbers)}"
    server.psql(f"CREATE ROLE {role} LOGIN")
    return address.replace("postgres:@", f"{role}:@")


def read_only(server, full=False):
    "A replica, or a database whose administrator has closed it for writing."
    address = new_database(server)
    if full:
        Store(address).open().close()
    server.psql(f"ALTER DATABASE {make_url(address).database} SET default_transaction_read_only = on")
    return address


def of_a_newer_version(server):
    address = new_database(server)
    with Store(address) as store, store.transaction("test", write=True) as connection:
        connection.execute(text("UPDATE product_recs_feedback_version SET version_num = '9999'"))
    return address


def with_another_application(server):
    "Its own table has the name of one of ours."
    address = new_database(server)
    server.psql(f"\\c {make_url(address).database}\nCREATE TABLE events (id int)")
    return address


DATABASES = {
    "SQL_ASCII": (in_encoding("SQL_ASCII"), "encoding SQL_ASCII"),
    "LATIN1": (in_encoding("LATIN1"), "encoding LATIN1"),
    "no rights": (without_rights, "permission denied"),
    "read-only and empty": (read_only, "read-only transaction"),
    "a newer version": (of_a_newer_version, "9999"),
    "another application": (with_another_application, "already exists"),
    "not there": (lambda server: server.get_uri(database="nowhere"), "does not exist"),
}


@pytest.mark.parametrize("kind", DATABASES)
def test_a_database_that_cannot_be_used(tmp_path, postgres, caplog, kind):
    make, reason = DATABASES[kind]
    goes_on_and_says_why(tmp_path, make(postgres), reason, caplog)


FILES = {
    "no database": (lambda path: path.write_bytes(b"whatever the name says " * 100), "file is not a database"),
    "a folder": (lambda path: path.mkdir(), "unable to open"),
    "below a file": (lambda path: path.parent.rmdir() or path.parent.touch(), "exists"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_used(tmp_path, caplog, kind):
    (tmp_path / "store").mkdir()
    make, reason = FILES[kind]
    make(tmp_path / "store" / "feedback.db")
    goes_on_and_says_why(tmp_path, f"sqlite:///{tmp_path}/store/feedback.db", reason, caplog)


def test_a_folder_that_may_not_be_written_to(tmp_path, caplog):
    "Not even root may make files in this one."
    goes_on_and_says_why(tmp_path, "sqlite:////proc/feedback/feedback.db", "No such file", caplog)


def goes_on_and_says_why(folder, address, reason, caplog):
    "All of the service, in this process."
    publish_board(folder / "models")
    app = create_app(Settings(models_dir=folder / "models", database_url=address, auth="off", log_level="WARNING"))
    service = app.state.service
    service.start()
    try:
        assert any("No feedback store" in record.message and reason in record.message for record in caplog.records), (
            caplog.text
        )
        with pytest.raises(StoreError, match=reason):
            service.desk.store.add_events([NewEvent(1, 101)])

        async def ask():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                answer = await client.get("/recommend/1?n=1")
                assert answer.json()["recommendations"] == [101] and answer.headers["x-feedback-stale"] == "true"
                refused = await client.post("/events", json={"user_id": 1, "item_id": 101})
                assert refused.status_code == 503 and refused.headers["content-type"] == "application/problem+json"
                assert reason not in refused.text and make_url(address).database not in refused.text
                ready = await client.get("/health/ready")
                assert ready.status_code == 200 and ready.json()["store"] == "away"

        asyncio.run(ask())
        assert reason in service.desk.changes.error
    finally:
        service.stop()


def test_a_database_that_only_refuses_to_write_is_read(tmp_path, postgres):
    "What was stored before counts; a new event is refused, not lost."
    address = new_database(postgres)
    with Store(address) as store:
        store.add_events([NewEvent(1, 101)])
    postgres.psql(f"ALTER DATABASE {make_url(address).database} SET default_transaction_read_only = on")
    with Store(address) as store:
        assert [event.item_id for event in store.history(1)] == ["101"]
        with pytest.raises(StoreError, match="read-only transaction"):
            store.add_events([NewEvent(1, 102)])


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_client_that_asks_for_another_encoding_gets_text_all_the_same(postgres, encoding):
    "PGCLIENTENCODING stands in many a profile."
    program = """
import sys
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
with Store(sys.argv[1]) as store:
    store.add_events([NewEvent("日本 é", "ü")])
    print(ascii(store.history("日本 é")[0].item_id))
"""
    environment = os.environ | {"PGCLIENTENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", program, new_database(postgres)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "'\\xfc'\n", done.stderr
