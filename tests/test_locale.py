"""The same data give the same result on a machine whose locale is Latin-1, or none at all."""

import ast
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    *ROOT.glob("product_recs/**/*.py"),
    *ROOT.glob("tools/*.py"),
    *ROOT.glob("benchmarks/*.py"),
    ROOT / "setup.py",
]

USERS, ITEMS = ["Zoë", "Øystein", "Łukasz", "山田", "ann"], ["café", "Größe 1", "€5", "茶", "plain"]
LOG = [
    (user, item, f"2026-01-{day:02}T00:00:00")
    for day, (user, item) in enumerate(((u, i) for u in USERS for i in ITEMS if (u, i) != ("ann", "茶")), 1)
]

PROGRAM = """
import json, locale, sys
from pathlib import Path
from sqlalchemy import update
from product_recs.bundle.opening import open_bundle
from product_recs.data.arrays import load_table
from product_recs.core.errors import IngestError
from product_recs.features import build_features
from product_recs.ingest import ingest, open_ledger
from product_recs.feedback.records import EVENTS
from product_recs.feedback.records import NewEvent
from product_recs.feedback.store import Store
from product_recs.train import train_bundle

folder, out = next(Path("in").glob("gr*")), Path("out")  # the locale has its own idea of this name
kinds = json.loads(sys.argv[1])
found = {"encoding": locale.getpreferredencoding(False)}
for name, options in kinds.items():
    source = options.pop("source") if "source" in options else folder/name
    options |= {table: str(folder/options[table]) for table in ("products", "users") if table in options}
    if name == "feedback":
        with Store(options["feedback"]) as store:
            store.add_events([NewEvent("Łukasz", "€5"), NewEvent("山田", "茶")])
            with store.transaction("test", write=True) as connection:
                connection.execute(update(EVENTS).values(received_at=EVENTS.c.received_at - 10_000_000))
    ledger = ingest(
        source,
        out / name,
        progress=False,
        now="2026-12-01" if name != "feedback" else None,
        max_reject_share=1.0,
        **options,
    )
    tables = {
        table: {
            column: [str(value) for value in values]
            for column, values in load_table(out / name / f"{table}.parquet").items()
            if column != "timestamp" or name != "feedback"
        }
        for table in ("interactions", "products", "users")
        if (out / name / f"{table}.parquet").exists()
    }
    found[name] = {
        "rows": ledger.rows_kept,
        "reasons": ledger.reasons,
        "rejects": (out / name / "rejects.csv").read_text(encoding="utf-8").splitlines()[1:],
        **tables,
    }
    assert open_ledger(out/name).rows_kept == ledger.rows_kept
build_features(out/"log.csv", out/"features")
train_bundle(
    build_features(out / "log.csv", out / "features"),
    out / "models",
    publish_it=True,
    factors=2,
    iterations=2,
    next_model="none",
    progress=False,
)
found["titles"] = sorted(open_bundle(out/"models").item_columns["title"].tolist(), key=str)
Path("found.json").write_text(json.dumps(found), encoding="utf-8")
"""


@pytest.fixture(scope="module")
def latin(tmp_path_factory):
    "A folder with a Latin-1 locale of our own, made by Debian's `localedef`."
    folder = tmp_path_factory.mktemp("locale")
    try:
        made = subprocess.run(
            ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", folder / "de_DE.ISO-8859-1"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("this machine has no localedef")
    if not (folder / "de_DE.ISO-8859-1").exists():
        pytest.skip(f"this machine cannot make a Latin-1 locale: {made.stderr}")
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"}


@pytest.fixture(params=["latin", "C"])
def place(request):
    "Environment variables, and the encoding that Python then takes for text."
    if request.param == "latin":
        return request.getfixturevalue("latin"), "ISO-8859-1"
    return {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ANSI_X3.4-1968"


def lay_out(root):
    "One file of each kind in a folder whose name is not ASCII; the kinds with the options of their ingest."
    import duckdb

    folder = root / "in" / "größe €"
    folder.mkdir(parents=True)
    lines = [",".join(row) for row in LOG]
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(lines) + "\n", encoding="utf-8")
    (folder / "breaks.csv").write_text(
        "user_id,item_id,timestamp,note\n" + "".join(f'{line},"größer\nals €"\n' for line in lines) + "Zoë\n",
        encoding="utf-8",
    )
    latin = [line for line in lines if line.encode("latin-1", "ignore").decode("latin-1") == line]
    (folder / "latin.csv").write_text(
        "user_id,item_id,timestamp\n" + "\n".join(latin) + "\n,Größe,\n", encoding="latin-1"
    )
    (folder / "log.jsonl").write_text(
        "".join(json.dumps({"user_id": u, "item_id": i, "timestamp": t}, ensure_ascii=False) + "\n" for u, i, t in LOG)
        + '{"user_id": "Zoë"\n',
        encoding="utf-8",
    )
    duckdb.execute("CREATE OR REPLACE TABLE log (user_id VARCHAR, item_id VARCHAR, timestamp VARCHAR)")
    duckdb.executemany("INSERT INTO log VALUES (?, ?, ?)", LOG)
    duckdb.execute(f"COPY log TO '{folder}/log.parquet'")
    with sqlite3.connect(root / "shop.db") as database:
        database.execute("CREATE TABLE log (user_id, item_id, timestamp)")
        database.executemany("INSERT INTO log VALUES (?, ?, ?)", LOG)
    database.close()
    (folder / "products.csv").write_text(
        "item_id,title,größe (€)\n"
        + "".join(f'{item},"Titel\n{item}",{number}\n' for number, item in enumerate(ITEMS)),
        encoding="utf-8",
    )
    (folder / "users.jsonl").write_text(
        "".join(json.dumps({"user_id": user, "Straße": f"{user}straße"}, ensure_ascii=False) + "\n" for user in USERS),
        encoding="utf-8",
    )
    tables = {"products": "products.csv", "users": "users.jsonl"}
    return {
        "log.csv": tables,
        "breaks.csv": {},
        "latin.csv": {"encoding": "latin-1"},
        "log.jsonl": tables,
        "log.parquet": tables,
        "sql": {"source": "sqlite:///shop.db", "query": "select * from log where item_id <> 'größe'"},
        "feedback": {"source": "", "feedback": "sqlite:///feedback.db"},
    }


def ingested(root, **environment):
    "What the program found there."
    kinds = lay_out(root)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "LANG", "PYTHONUTF8", "PYTHONIOENCODING"))
    } | environment
    environment |= {"PRODUCT_RECS_ROOT": str(root), "PYTHONPATH": str(ROOT)}
    (root / "program.py").write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py", json.dumps(kinds)], cwd=root, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return json.loads((root / "found.json").read_text(encoding="utf-8")), environment


def test_every_kind_of_source_is_the_same_in_every_locale(tmp_path, place):
    variables, encoding = place
    usual, _ = ingested(tmp_path / "usual", LC_ALL="C.UTF-8")
    results, environment = ingested(tmp_path / "there", **variables)
    encodings = usual.pop("encoding").lower(), results.pop("encoding")
    assert encodings == ("utf-8", encoding)
    assert results == usual
    for name, rejects in {"log.csv": 0, "breaks.csv": 1, "log.jsonl": 1, "log.parquet": 0, "sql": 0}.items():
        rows = results[name]["interactions"]
        assert (
            sorted(zip(rows["user_id"], rows["item_id"])) == sorted(row[:2] for row in LOG)
            and len(results[name]["rejects"]) == rejects
        )
    assert (
        results["log.csv"]["products"]["größe (€)"]
        and results["titles"] == sorted(f"Titel\n{item}" for item in ITEMS)
        and "Zoë" in results["latin.csv"]["interactions"]["user_id"]
    )
    assert results["feedback"]["interactions"]["item_id"] == ["€5", "茶"] and results["log.csv"]["users"]["Straße"][
        0
    ].endswith("straße")

    command = ["recommend", "ann", "--models-dir", "out/models"]
    said = subprocess.run(
        [sys.executable, "-c", "from product_recs.jobs.cli import main; raise SystemExit(main())", *command],
        cwd=tmp_path / "there",
        env=environment,
        capture_output=True,
    )
    assert said.returncode == 0 and b"\\u8336" in said.stdout and b"Traceback" not in said.stderr, (
        said.stdout,
        said.stderr,
    )


def locale_dependent(tree):
    "Calls that open a text file in the encoding of the machine."
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "") if method else ""
        words = [
            word.value
            for word in [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
            if isinstance(word, ast.Constant) and isinstance(word.value, str)
        ]
        mode = next((word for word in words if word and set(word) <= set("rwaxbt+")), None)
        of_package = method and getattr(getattr(node.func.value, "func", None), "id", "") == "distribution"
        if name in ("read_text", "write_text", "TextIOWrapper") and not of_package:  # that one knows its encoding
            yield node
        elif name in ("open", "fdopen") and "b" not in (mode or "") and owner != "gzip" and (mode or not method):
            yield node


def test_no_file_is_opened_in_the_encoding_of_the_machine():
    bad = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:90]}"
        for path in SOURCES
        for node in locale_dependent(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not bad, "\n".join(bad)
    tried = {
        "open(x)": 1,
        "open(x, 'w')": 1,
        "x.open('w')": 1,
        "x.read_text()": 1,
        "x.write_text(y)": 1,
        "os.fdopen(d, 'w')": 1,
        "io.TextIOWrapper(b)": 1,
        "open(x, 'rb')": 0,
        "open(x, encoding='utf-8')": 0,
        "store.open()": 0,
        "gzip.open(x, 'rt', encoding='utf-8')": 0,
        "x.open(mode='xb')": 0,
        "open(x, **text)": 0,
    }
    assert {text: len(list(locale_dependent(ast.parse(text)))) for text in tried} == tried
