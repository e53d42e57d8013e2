"""One id has one form, whatever carries it: written by real writers, read by the ingest."""

import csv
import json
import sqlite3
from decimal import Decimal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy import text as sql
from support import new_database

from product_recs.core.errors import IngestError
from product_recs.core.ids import IdError, id_key
from product_recs.ingest import ingest

LOOSE = {"progress": False, "now": "2026-06-01", "max_reject_share": 1.0}


def has_key(id):
    try:
        return bool(id_key(id))
    except IdError:
        return False


whole = st.one_of(
    st.integers(-20, 20),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**20 + 1, 2**64 - 1]),
)
text = st.one_of(
    st.text(
        st.characters(codec="utf-8", exclude_characters="\x7f", exclude_categories=["Cc", "Cs"]),
        min_size=1,
        max_size=12,
    ).filter(has_key),
    st.from_regex(r"[A-Z][0-9]{1,3}|0[0-9]{1,4}|[0-9]{1,3}\.[0-9]{1,2}|-0|1e3", fullmatch=True),
)


def spelled(id, draw):
    "An id as a file of text may have it."
    return f"{id}.0" if isinstance(id, int) and draw(st.booleans()) else str(id)


# --- the writers: rows of (user, item) -------------------------------------------------------------------------------


def to_csv(path, rows, header, draw):
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(header)
        out.writerows([spelled(id, draw) for id in row] for row in rows)
    return path.with_suffix(".csv"), {}


def to_json(path, rows, header, draw):
    def value(id):
        if not isinstance(id, int) or draw(st.booleans()):
            return spelled(id, draw)
        return float(id) if abs(id) < 2**53 and draw(st.booleans()) else id

    lines = [json.dumps(dict(zip(header, map(value, row))), ensure_ascii=draw(st.booleans())) for row in rows]
    path.with_suffix(".jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path.with_suffix(".jsonl"), {}


def to_parquet(path, rows, header, draw):
    def column(ids):
        types = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
        if all(isinstance(id, int) for id in ids):
            largest, least = max(ids), min(ids)
            types += [
                type
                for type, low, high in (
                    (pa.int8(), -(2**7), 2**7),
                    (pa.int64(), -(2**63), 2**63),
                    (pa.uint64(), 0, 2**64),
                    (pa.float64(), 1 - 2**53, 2**53),
                    (pa.float32(), 1 - 2**24, 2**24),
                    (pa.decimal128(38, 0), -(10**38), 10**38),
                    (pa.decimal128(38, 2), -(10**36), 10**36),
                )
                if low <= least and largest < high
            ]
        type = draw(st.sampled_from(types))
        if pa.types.is_decimal(type):
            return pa.array([Decimal(id) for id in ids], type)
        if pa.types.is_dictionary(type):
            return pa.array([spelled(id, draw) for id in ids]).dictionary_encode()
        return pa.array([spelled(id, draw) for id in ids] if type in types[:2] else ids, type)

    pq.write_table(
        pa.table({name: column(list(ids)) for name, ids in zip(header, zip(*rows))}), path.with_suffix(".parquet")
    )
    return path.with_suffix(".parquet"), {}


def to_sql(path, rows, header, draw):
    def value(id):
        if not isinstance(id, int) or not -(2**63) <= id < 2**63 or draw(st.booleans()):
            return spelled(id, draw)
        return float(id) if abs(id) < 2**53 and draw(st.booleans()) else id

    with sqlite3.connect(path.with_suffix(".db")) as database:
        database.execute(f"CREATE TABLE t ({', '.join(header)})")
        database.executemany(
            f"INSERT INTO t VALUES ({', '.join('?' * len(header))})", [[value(id) for id in row] for row in rows]
        )
    database.close()
    return f"sqlite:///{path.with_suffix('.db')}", {"query": "SELECT * FROM t"}


def kept(out, table, column):
    return [
        key
        for (key,) in duckdb.execute(
            f"SELECT CAST({column} AS VARCHAR) FROM '{out}/{table}.parquet' ORDER BY 1"
        ).fetchall()
    ]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.data(),
    st.lists(st.tuples(st.one_of(whole, text), st.one_of(whole, text)), min_size=1, max_size=8),
    st.sampled_from([to_csv, to_json, to_parquet, to_sql]),
    st.sampled_from([to_csv, to_json, to_parquet]),
    st.sampled_from([to_csv, to_json, to_parquet]),
)
def test_ids_come_back_as_their_keys_and_tables_join(tmp_path_factory, data, rows, log, products, users):
    folder, out = tmp_path_factory.mktemp("ids"), tmp_path_factory.mktemp("out") / "out"
    source, options = log(folder / "log", rows, ["user_id", "item_id"], data.draw)
    people, goods = (
        [[user] for user in {id_key(user): user for user, _ in rows}.values()],
        [[item] for item in {id_key(item): item for _, item in rows}.values()],
    )
    tables = {
        "products": products(folder / "products", goods, ["item_id"], data.draw)[0],
        "users": users(folder / "users", people, ["user_id"], data.draw)[0],
    }
    ledger = ingest(source, out, **options, **tables, **LOOSE)
    assert ledger.rows_kept == len(rows) and not ledger.reasons
    assert kept(out, "interactions", "user_id") == sorted(id_key(user) for user, _ in rows)
    assert kept(out, "interactions", "item_id") == sorted(id_key(item) for _, item in rows)
    assert kept(out, "products", "item_id") == sorted({id_key(item) for _, item in rows})
    assert kept(out, "users", "user_id") == sorted({id_key(user) for user, _ in rows})


LOST = "number too large to be kept exactly"


def rejects(source, tmp_path, **options):
    ingest(source, tmp_path / "out", **options, **LOOSE)
    with open(tmp_path / "out/rejects.csv", encoding="utf-8", newline="") as file:
        return [(int(row["line"]), row["column"], row["value"], row["reason"]) for row in csv.DictReader(file)], kept(
            tmp_path / "out", "interactions", "user_id"
        )


def test_json_numbers_that_lost_their_digits(tmp_path):
    lines = [
        '{"user_id": 1e30, "item_id": 1}',
        '{"user_id": 123456789012345678901, "item_id": 9007199254740993.0}',
        '{"user_id": 7, "item_id": -Infinity}',
        '{"user_id": 123456789012345678901, "item_id": 2}',
        '{"user_id": 1.2e1, "item_id": 2}',
        '{"user_id": 12, "item_id": 123456789012345678902}',
        '{"user_id": true, "item_id": 2}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    bad, good = rejects(tmp_path / "log.jsonl", tmp_path)
    assert bad == [
        (1, "user_id", "1e30", LOST),
        (2, "item_id", "9007199254740992.0", LOST),
        (3, "item_id", "'-Infinity", LOST),
        (7, "user_id", "true", "id is not a number or a text"),
    ]
    assert good == ["12", "12", "123456789012345678901"]


def test_parquet_floats_that_lost_their_digits(tmp_path):
    pq.write_table(
        pa.table(
            {
                "user_id": pa.array([2.0**53, 2.0**53 - 1, None, float("nan"), float("inf"), 4.0]),
                "item_id": pa.array([2.0**24, 2.0, 3.0, 4.0, 2.0**25, 2.0**24 - 1], pa.float32()),
            }
        ),
        tmp_path / "log.parquet",
    )
    bad, good = rejects(tmp_path / "log.parquet", tmp_path)
    assert [(line, column, reason) for line, column, _, reason in sorted(bad)] == [
        (1, "user_id", LOST),
        (3, "user_id", "blank id"),
        (4, "user_id", "blank id"),
        (5, "user_id", LOST),
    ]
    assert good == ["4", "9007199254740991"] and kept(tmp_path / "out", "interactions", "item_id") == ["16777215", "2"]


def test_a_parquet_log_with_a_column_that_has_duckdbs_own_name(tmp_path):
    pq.write_table(
        pa.table({"user_id": [2.0**60, 5.0, None], "item_id": ["a", "b", "c"], "File_Row_Number": [7, 8, 9]}),
        tmp_path / "log.parquet",
    )
    bad, good = rejects(tmp_path / "log.parquet", tmp_path)
    assert [(line, reason) for line, _, _, reason in bad] == [(1, LOST), (3, "blank id")] and good == ["5"]


def test_values_of_a_database_that_are_no_ids(tmp_path):
    with sqlite3.connect(tmp_path / "shop.db") as database:
        database.execute("CREATE TABLE t (user_id, item_id)")
        database.executemany(
            "INSERT INTO t VALUES (?, ?)",
            [(2.0**53, 1), (b"caf\xc3\xa9", 1), (b"\xff", 1), (10.0, 1), ("10.0", 1), (10, 1), (None, 1)],
        )
    database.close()
    bad, good = rejects(f"sqlite:///{tmp_path}/shop.db", tmp_path, query="SELECT * FROM t")
    assert sorted((line, reason) for line, _, _, reason in bad) == [
        (1, LOST),
        (3, "id is not a number or a text"),
        (7, "blank id"),
    ] and good == ["10", "10", "10", "café"]


def test_ids_of_the_types_of_postgresql(postgres, tmp_path):
    url = new_database(postgres)
    engine = create_engine(url)
    uuid = "6f0a5f0e-0000-4000-8000-000000000001"
    with engine.begin() as connection:
        connection.execute(
            sql(
                "CREATE TABLE t (user_id NUMERIC(30, 2), item_id UUID, big BIGINT, real REAL, double DOUBLE PRECISION, "
                "bytes BYTEA, yes BOOLEAN)"
            )
        )
        connection.execute(
            sql(
                f"INSERT INTO t VALUES (12.00, '{uuid}', 7, 7, 7, 'caf\\303\\251', true), (123456789012345678901.50, "
                f"'{uuid}', 7, 7, 9007199254740992, '\\377', NULL)"
            )
        )
    engine.dispose()
    assert (
        rejects(url, tmp_path, query="SELECT user_id, item_id FROM t") == ([], ["12", "123456789012345678901.5"])
        and kept(tmp_path / "out", "interactions", "item_id") == [uuid] * 2
    )
    assert rejects(url, tmp_path, query="SELECT big AS user_id, real AS item_id FROM t") == ([], ["7", "7"]) and kept(
        tmp_path / "out", "interactions", "item_id"
    ) == ["7", "7"]
    bad, good = rejects(url, tmp_path, query="SELECT double AS user_id, big AS item_id FROM t")
    assert [(line, reason) for line, _, _, reason in bad] == [(2, LOST)] and good == ["7"]
    bad, good = rejects(url, tmp_path, query="SELECT bytes AS user_id, big AS item_id FROM t")
    assert [(line, reason) for line, _, _, reason in bad] == [(2, "id is not a number or a text")] and good == ["café"]
    with pytest.raises(IngestError, match="all 2 rows are bad"):
        ingest(url, tmp_path / "none", query="SELECT yes AS user_id, big AS item_id FROM t", **LOOSE)


@pytest.mark.parametrize("type", [pa.bool_(), pa.date32(), pa.list_(pa.int64())])
def test_a_parquet_column_that_holds_no_ids_is_refused_by_name(type, tmp_path):
    pq.write_table(pa.table({"user_id": pa.array([None], type), "item_id": [1]}), tmp_path / "log.parquet")
    with pytest.raises(IngestError, match="column 'user_id' holds .*whole number or a text"):
        ingest(tmp_path / "log.parquet", tmp_path / "out", **LOOSE)


@pytest.mark.parametrize(
    "users, kinds",
    [
        (["10", "10.0", "A7"], ["10", "10", "A7"]),
        (["10", "10.0"], ["10", "10"]),
        (["007", "7.0", "7"], ["007", "7", "7"]),
    ],
)
def test_a_text_column_has_one_form_of_a_number(users, kinds, tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n" + "".join(f"{user},{user}\n" for user in users))
    (tmp_path / "p.csv").write_text("item_id,title\n" + "".join(f"{user},{user}\n" for user in users))
    ledger = ingest(tmp_path / "log.csv", tmp_path / "out", products=tmp_path / "p.csv", **LOOSE)
    assert kept(tmp_path / "out", "interactions", "user_id") == kinds and kept(
        tmp_path / "out", "products", "item_id"
    ) == sorted(set(kinds))
    assert ledger.tables["products"]["duplicates_merged"] == len(kinds) - len(set(kinds))


@settings(max_examples=200, deadline=None)
@given(st.one_of(whole, text))
@example("10.0")
def test_a_key_is_its_own_key(id):
    assert id_key(id_key(id)) == id_key(id)
