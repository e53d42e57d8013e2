"""Columns of the products and users files: whatever a shop exports, sold and unsold items say the same, under their own
names."""

import csv
import datetime as dt
import json
import logging
import random
from decimal import Decimal
from urllib.parse import quote

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from support import Server, problem

from product_recs.api import create_app
from product_recs.core.columns import Columns
from product_recs.core.errors import IngestError
from product_recs.core.settings import Settings
from product_recs.features import build_features
from product_recs.ingest import ingest
from product_recs.train import train_bundle

QUIET = {"progress": False, "now": "2026-06-01", "max_reject_share": 1.0}
SOLD, UNSOLD, GAP = 1, 2, 3  # the first two have the same values; the third has none and is sold too
COUNTED = {"popularity", "first_seen", "last_seen"}


def write_log(folder):
    draw = random.Random(3)
    rows = [
        (user, item, f"2026-01-{draw.randint(1, 28):02}T10:00:00")
        for user in range(1, 25)
        for item in (SOLD, GAP, 11, 12, 13, 14)
        if draw.random() < 0.7
    ]
    (folder / "log.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows), encoding="utf-8"
    )
    return folder / "log.csv"


def make_model(folder, products=None, users=None, **options):
    "The pipeline on a small log with these tables."
    tables = {name: table for name, table in (("products", products), ("users", users)) if table is not None}
    ingest(write_log(folder), folder / "in", **tables, **QUIET, **options)
    build = build_features(folder / "in", folder / "features")
    train_bundle(build, folder / "models", publish_it=True, factors=2, iterations=1, next_model="none", progress=False)
    return folder / "models"


def facts(get, item):
    "What the service says of an item without what it counts and what names it: as the exact text of its JSON."
    title, attributes = (
        item["title"],
        {name: value for name, value in item["attributes"].items() if name not in COUNTED},
    )
    return json.dumps([title, attributes], sort_keys=True)


# --- every type of a database ----------------------------------------------------------------------------------------

TYPES = {
    "TINYINT": "7",
    "SMALLINT": "-7",
    "INTEGER": "7",
    "BIGINT": "9007199254740993",
    "UTINYINT": "7",
    "USMALLINT": "7",
    "UINTEGER": "7",
    "UBIGINT": "18446744073709551615",
    "HUGEINT": "12",
    "DECIMAL(10,2)": "2.50",
    "DECIMAL(18,0)": "5",
    "DECIMAL(38,18)": "19.99",
    "DECIMAL(38,3)": "123456789012345678901.5",
    "FLOAT": "0.1",
    "DOUBLE": "0.1",
    "BOOLEAN": "true",
    "DATE": "'2026-01-02'",
    "TIMESTAMP": "'2026-01-02 03:04:05.25'",
    "TIMESTAMP_S": "'2026-01-02 03:04:05'",
    "TIMESTAMP_NS": "'2026-01-02 03:04:05.123456789'",
    "TIMESTAMPTZ": "'2026-01-02 03:04:05+02'",
    "TIME": "'10:00'",
    "TIMETZ": "'10:00:00+02'",
    "INTERVAL": "'3 days'",
    "UUID": "'6f0a5f0e-0000-4000-8000-000000000001'",
    "BLOB": "'ab'",
    "BIT": "'0101'",
    "VARCHAR": "'nan'",
    "ENUM('x', 'y')": "'x'",
    "INTEGER[]": "[1, 2]",
    "STRUCT(a INTEGER, b VARCHAR)": "{'a': 1, 'b': 'é'}",
    "MAP(VARCHAR, INTEGER)": "MAP {'k': 1}",
    "VARCHAR[][]": "[['a'], []]",
    "JSON": "'{\"a\": 1}'",
}
JSON_VALUES = {
    "BIGINT": 9007199254740993,
    "UBIGINT": "18446744073709551615",
    "DECIMAL(10,2)": 2.5,
    "DECIMAL(38,18)": 19.99,
    "DECIMAL(38,3)": "123456789012345678901.5",
    "FLOAT": 0.1,
    "BOOLEAN": True,
    "DATE": "2026-01-02T00:00:00",
    "TIMESTAMP": "2026-01-02T03:04:05.250000",
    "TIMESTAMPTZ": "2026-01-02T01:04:05",
    "TIME": "10:00:00",
    "INTERVAL": "3 days",
    "BLOB": "ab",
    "INTEGER[]": "[1,2]",
    "MAP(VARCHAR, INTEGER)": '{"k":1}',
    "VARCHAR": "nan",
}


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    "A server whose products and users have a column of each type; the unsold twin's users are strangers."
    folder = tmp_path_factory.mktemp("typed")
    columns = ", ".join(f"CAST({value} AS {type}) AS {json.dumps(type)}" for type, value in TYPES.items())
    for key, table in (("item_id", "products"), ("user_id", "users")):
        duckdb.execute(
            f"COPY (SELECT * FROM (SELECT unnest([{SOLD}, {UNSOLD}, 900]) AS {key}, {columns}) UNION ALL BY NAME "
            f"SELECT {GAP} AS {key}) TO '{folder}/{table}.parquet' (FORMAT parquet)"
        )
    with Server(folder, make_model(folder, folder / "products.parquet", folder / "users.parquet")) as server:
        yield server


def test_every_type_says_the_same_of_sold_and_unsold_items(typed):
    sold, unsold, gap = (typed.get(f"/items/{item}")[2] for item in (SOLD, UNSOLD, GAP))
    assert facts(typed, sold) == facts(typed, unsold) and set(sold["attributes"]) - COUNTED == set(TYPES) == set(
        unsold["attributes"]
    )
    assert {type: unsold["attributes"][type] for type in JSON_VALUES} == JSON_VALUES
    assert all(gap["attributes"][type] is None for type in TYPES)
    new = typed.get("/new?n=10&detail=true")[2]["items"]
    assert facts(typed, next(line for line in new if line["item_id"] == UNSOLD)) == facts(typed, unsold)
    detail = typed.get("/recommend/nobody?n=10&detail=true")[2]["items"]
    similar = typed.get("/similar/11?n=10&detail=true")[2]["items"]
    for lines in (detail, similar):
        assert facts(typed, next(line for line in lines if line["item_id"] == SOLD)) == facts(typed, sold)
    raw = typed.ask("GET", "/items/1", headers={"Accept": "application/json"})[2]
    assert type(raw["attributes"]["BIGINT"]) is int and type(raw["attributes"]["TINYINT"]) is int


def test_no_answer_fails_because_of_a_column_type(typed):
    assert (
        typed.ask("POST", "/events", {"user_id": 700, "item_id": UNSOLD})[0] == 200
    )  # saw an unsold item, with all its types
    for path in (
        "/recommend/700?detail=true",
        "/recommend/900?detail=true",
        "/similar/2?detail=true",
        "/new?user_id=700&detail=true",
        "/new?user_id=1",
        "/explain/700/1",
        "/explain/900/1",
        "/users/700/history",
    ):
        status, _, body = typed.get(path)
        assert status == 200, (path, body)
    status, _, body = typed.ask(
        "POST", "/recommend", {"users": [900, 701], "events": [{"item_id": UNSOLD}], "detail": True}
    )
    assert status == 200, body


@pytest.mark.parametrize("type", TYPES)
def test_a_filter_takes_the_value_that_an_answer_gave(type, typed):
    value = typed.get(f"/items/{UNSOLD}")[2]["attributes"][type]
    where = lambda rule: typed.ask("POST", "/recommend", {"n": 10, "filters": {"where": {type: rule}}})
    status, _, body = where([value])
    assert status == 200 and body["results"][0]["recommendations"] == [SOLD], body
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        assert where({"min": value, "max": value})[2]["results"][0]["recommendations"] == [SOLD]
        assert (
            where({"min": value + 1})[2]["results"][0]["recommendations"]
            == []
            == where({"max": value - 1})[2]["results"][0]["recommendations"]
        )


@pytest.mark.parametrize(
    "categories, wanted, other",
    [
        (["10", "10", "", "20"], "10", "30"),
        (["1.5", "1.5", "", "2"], "1.5", "7"),
        (["true", "true", "", "false"], "true", "false"),
        (["a", "a", "", "b"], "a", "c"),
    ],
)
def test_a_shop_may_number_its_categories(categories, wanted, other, tmp_path):
    (tmp_path / "p.csv").write_text(
        "item_id,category\n"
        + "".join(f"{item},{category}\n" for item, category in zip((SOLD, UNSOLD, GAP, 11), categories))
    )
    with TestClient(
        create_app(
            Settings(
                models_dir=make_model(tmp_path, tmp_path / "p.csv"), log_level="ERROR", auth="off", database_url=""
            )
        ),
        base_url="http://localhost",
    ) as client:
        assert client.get(f"/new?category={wanted}").json()["recommendations"] == [UNSOLD] and client.get(
            f"/popular?category={wanted}"
        ).json()["recommendations"] == [SOLD]
        assert (
            client.get(f"/new?category={other}").json()["recommendations"] == []
            and client.get(f"/popular?category={other}&n=9").json()["recommendations"] == [[], [11]][other == "false"]
        )


# --- any header, any values, any format ------------------------------------------------------------------------------

RESERVED = {"item_id", *Columns.Counted, "title", ""}
AWKWARD = [
    'width (")',
    "line",
    "line_",
    "_line",
    "_file",
    "row",
    "id",
    "select",
    "from",
    "c0",
    "c1",
    "file",
    "score",
    "value",
    "user_id",
    "it's",
    "größe",
    "a.b",
    "x" * 300,
    ";--",
    "{}",
    "%s",
    "\\",
    "/",
    "~",
    "$",
    "[0]",
    "*",
    "?",
    "ИМЯ",
    "file_row_number",
]
header = st.one_of(
    st.sampled_from(AWKWARD),
    st.text(
        st.characters(codec="utf-8", exclude_characters="\x7f", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8
    ).filter(lambda name: name == name.strip("\ufeff \xa0").strip() and name),
)
words = st.text(st.characters(codec="utf-8", exclude_characters="\x00\x85", exclude_categories=["Cs"]), max_size=10)
moments = st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30))
KINDS = {
    "whole": st.integers(-(2**63), 2**63 - 1),
    "long": st.integers(-(10**25), 10**25),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "yes": st.booleans(),
    "word": words,
    "time": moments,
    "day": st.dates(),
    "decimal": st.decimals(-(10**8), 10**8, places=4),
    "list": st.lists(st.integers(-5, 5), max_size=3),
    "blank": st.none(),
}


@st.composite
def tables(draw):
    "Headers, their kinds, and the values of the twins."
    names = draw(st.lists(header, min_size=1, max_size=5, unique_by=str.lower))
    kinds = [draw(st.sampled_from(list(KINDS))) for name in names]
    return {
        name: (kind, draw(st.one_of(KINDS[kind], KINDS[kind], st.none())))
        for name, kind in zip(names, kinds)
        if name.lower() not in RESERVED
    }


def to_parquet(path, table):
    types = {
        "whole": pa.int64(),
        "long": pa.decimal128(38, 0),
        "number": pa.float64(),
        "yes": pa.bool_(),
        "word": pa.string(),
        "time": pa.timestamp("us"),
        "day": pa.date32(),
        "decimal": pa.decimal128(20, 4),
        "list": pa.list_(pa.int64()),
        "blank": pa.null(),
    }

    def column(kind, value):
        return pa.array([value if value is None or kind != "long" else Decimal(value)] * 2 + [None], types[kind])

    pq.write_table(
        pa.table([pa.array([SOLD, UNSOLD, GAP]), *(column(*cell) for cell in table.values())], ["item_id", *table]),
        path.with_suffix(".parquet"),
    )
    return path.with_suffix(".parquet")


def as_text(value):
    return (
        ""
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else value.isoformat()
        if hasattr(value, "isoformat")
        else str(value)
    )


def to_csv(path, table):
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["item_id", *table])
        for item in (SOLD, UNSOLD, GAP):
            out.writerow([item, *("" if item == GAP else as_text(value) for _, value in table.values())])
    return path.with_suffix(".csv")


def to_json(path, table):
    def plain(value):
        return value if isinstance(value, (int, float, str, list, type(None))) else as_text(value)

    rows = [
        {"item_id": item} | {name: None if item == GAP else plain(value) for name, (_, value) in table.items()}
        for item in (SOLD, UNSOLD, GAP)
    ]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.with_suffix(".jsonl")


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # an example takes half a second
@given(tables(), st.sampled_from([to_parquet, to_csv, to_json]))
@example({'width (")': ("whole", 2**53 + 1), "line": ("yes", True), "line_": ("decimal", Decimal("2.5000"))}, to_csv)
@example({name: ("word", name) for name in AWKWARD}, to_csv)
@example(dict.fromkeys(AWKWARD, ("long", 10**25 - 1)), to_json)
@example(dict.fromkeys(AWKWARD, ("day", dt.date(2026, 1, 2))), to_parquet)
def test_any_table_says_the_same_of_a_sold_and_an_unsold_twin(tmp_path_factory, table, write):
    folder = tmp_path_factory.mktemp("table")
    models = make_model(folder, write(folder / "products", table))
    with TestClient(
        create_app(Settings(models_dir=models, log_level="ERROR", auth="off", database_url="")),
        base_url="http://localhost",
    ) as client:
        sold, unsold = (client.get(f"/items/{item}").json() for item in (SOLD, UNSOLD))
        assert facts(client, sold) == facts(client, unsold) and set(unsold["attributes"]) == set(table)
        detail = {item["item_id"]: item for item in client.get("/recommend/nobody?n=9&detail=true").json()["items"]}
        new = {item["item_id"]: item for item in client.get("/new?n=9&detail=true").json()["items"]}
        assert facts(client, detail[SOLD]) == facts(client, new[UNSOLD]) == facts(client, unsold)
        for path in (f"/similar/{UNSOLD}?detail=true", f"/explain/1/{SOLD}", "/items?query=a"):
            assert client.get(path).status_code == 200
        for name, (kind, value) in table.items():
            served = unsold["attributes"][name]
            if kind in ("whole", "yes", "number"):
                assert served == value and (kind == "number" or type(served) is type(value)), (name, served, value)
            if kind == "long" and value is not None:
                assert str(served) == str(value), "no digit is lost"
            if served is None:
                continue
            answer = client.post("/recommend", json={"n": 9, "filters": {"where": {name: [served]}}})
            assert answer.status_code == 200 and SOLD in answer.json()["results"][0]["recommendations"], answer.json()


# --- names that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header, words",
    [
        ("item_id,", ["column 2 has no name", "index=False"]),
        ("item_id,title,Title", ["same column twice", "Rename"]),
        ("item_id,popularity", ["'popularity' cannot be", "Rename"]),
        ("item_id,First_Seen", ["'First_Seen'"]),
        ("item_id,last_seen", ["'last_seen'"]),
        ("sku,item_id", ["'sku' is the item_id"]),
        ('item_id,"a\tb"', ["control character"]),
    ],
)
def test_a_name_that_cannot_be_is_refused_by_name(header, words, tmp_path):
    (tmp_path / "log.csv").write_text("user_id,sku\n1,1\n" if header.startswith("sku") else "user_id,item_id\n1,1\n")
    (tmp_path / "p.csv").write_text(f"{header}\n" + ",".join("1" for _ in header.split(",")) + "\n")
    with pytest.raises(IngestError) as error:
        ingest(
            tmp_path / "log.csv",
            tmp_path / "out",
            products=tmp_path / "p.csv",
            columns={"item_id": "sku"} if header.startswith("sku") else {},
            **QUIET,
        )
    assert all(word in str(error.value) for word in ["p.csv", *words]), error.value


@pytest.mark.parametrize(
    "make",
    [
        lambda path: pq.write_table(
            pa.table([[1], ["a"], ["b"]], ["item_id", "title", "Title"]), path.with_suffix(".parquet")
        ),
        lambda path: pq.write_table(
            pa.table([[1], ["a"], ["b"]], ["item_id", "title", "title"]), path.with_suffix(".parquet")
        ),
        lambda path: path.with_suffix(".jsonl").write_text(
            '{"item_id": 1, "title": "a"}\n{"item_id": 2, "Title": "b"}\n'
        ),
    ],
)
def test_two_names_that_differ_in_case_are_refused_in_every_format(make, tmp_path):
    make(tmp_path / "p")
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,1\n")
    with pytest.raises(IngestError, match="differ in case only|two columns 'title'"):
        ingest(tmp_path / "log.csv", tmp_path / "out", products=str(tmp_path / "p.*"), **QUIET)


def test_parts_of_a_table_that_call_a_column_by_two_cases_are_refused(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,1\n")
    (tmp_path / "p-1.csv").write_text("item_id,colour\n1,a\n")
    (tmp_path / "p-2.csv").write_text("item_id,Colour\n2,b\n")
    with pytest.raises(IngestError, match="p-2.csv: the columns 'colour' and 'Colour' differ in case only"):
        ingest(tmp_path / "log.csv", tmp_path / "out", products=str(tmp_path / "p-*.csv"), **QUIET)


def test_a_table_in_parts_of_several_formats(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,1\n")
    (tmp_path / "p-1.csv").write_text("item_id,price,zip,new\n1,2,01234,\n")
    (tmp_path / "p-2.jsonl").write_text('{"new": true, "zip": 12345, "item_id": 2, "price": 2.5}\n')
    pq.write_table(
        pa.table(
            {"item_id": [3.0, None], "price": pa.array([Decimal("6.50"), None], pa.decimal128(6, 2)), "size": [9, None]}
        ),
        tmp_path / "p-3.parquet",
    )
    ledger = ingest(tmp_path / "log.csv", tmp_path / "out", products=str(tmp_path / "p-*"), **QUIET)
    assert duckdb.execute(f"SELECT * FROM '{tmp_path}/out/products.parquet'").fetchall() == [
        (1, 2.0, "01234", None, None),
        (2, 2.5, "12345", True, None),
        (3, 6.5, None, None, 9),
    ]
    assert ledger.tables["products"]["rows_rejected"] == 1


def test_ids_under_another_name_beside_a_column_id(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,sku\n1,101\n")
    (tmp_path / "p.csv").write_text("id,sku,title\n7,101,x\n8,102,y\n")
    (tmp_path / "u.csv").write_text("user_id,id,item_id\n1,7,z\n")
    ingest(
        tmp_path / "log.csv",
        tmp_path / "out",
        columns={"item_id": "sku"},
        products=tmp_path / "p.csv",
        users=tmp_path / "u.csv",
        **QUIET,
    )
    assert duckdb.execute(f"SELECT * FROM '{tmp_path}/out/products.parquet'").df().to_dict("list") == {
        "item_id": [101, 102],
        "id": [7, 8],
        "title": ["x", "y"],
    }
    assert duckdb.execute(f"SELECT * FROM '{tmp_path}/out/users.parquet'").df().to_dict("list") == {
        "user_id": [1],
        "id": [7],
        "item_id": ["z"],
    }


# --- what is said ----------------------------------------------------------------------------------------------------


def test_a_picture_is_refused_by_the_name_of_its_column(tmp_path):
    pq.write_table(pa.table({"item_id": [1, 2], "photo (small)": [b"\xff\xd8", None]}), tmp_path / "p.parquet")
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,1\n")
    with pytest.raises(
        IngestError, match=r"p.parquet: column 'photo \(small\)' holds BLOB that is no text. Leave it out"
    ):
        ingest(tmp_path / "log.csv", tmp_path / "out", products=tmp_path / "p.parquet", **QUIET)


def said(error):
    return not any(word in str(error) for word in ("Error:", "DuckDB", "LINE 1", "SELECT", "Candidate", "Binder"))


def test_memory_is_only_named_where_it_was_short(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "product_recs.sql")
    with (tmp_path / "log.csv").open("w", encoding="utf-8") as file:
        file.write("user_id,item_id\n")
        file.writelines(f"user-{number}-{number * 7919 % 1000003},item-{number % 5003}\n" for number in range(300_000))
    with pytest.raises(IngestError) as error:
        ingest(tmp_path / "log.csv", tmp_path / "out", memory_limit="12MB", **QUIET)
    assert "memory was short. Try a larger memory_limit (now 12MB)" in str(error.value) and said(error.value)
    assert any("Out of Memory" in record.message for record in caplog.records), "the log at DEBUG has what DuckDB said"
    with pytest.raises(IngestError) as error:
        ingest(tmp_path / "log.csv", tmp_path / "out", memory_limit="lots", **QUIET)
    assert "memory_limit='lots' is not understood" in str(error.value) and said(error.value)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(IngestError) as error:
        ingest(write_log(tmp_path), tmp_path / "out", products=tmp_path / "p.parquet", **QUIET)
    assert (
        "p.parquet: this is not a readable Parquet file" in str(error.value)
        and "memory_limit" not in str(error.value)
        and said(error.value)
    )


def test_a_name_in_a_problem_is_the_shops_own(typed):
    assert (
        "'width (\")'"
        in problem(typed.ask("POST", "/recommend", {"filters": {"where": {'width (")': [1]}}}), 422).detail
    )
    assert typed.get(f"/popular?category={quote('a')}")[0] == 422  # there is no such column
