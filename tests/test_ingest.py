"""Bad input through the public function: what is kept, what is rejected and why, and what the errors say."""

import csv
import gzip
import json
import os
import random
import sqlite3
from multiprocessing import get_context

import duckdb
import pytest

from product_recs.core.errors import IngestError
from product_recs.ingest import ensure_ingested, ingest, open_ledger

HEADER = "user_id,item_id,event,quantity,timestamp\n"
GOOD = "1,101,view,1,2026-01-01\n2,102,cart,1,2026-01-02\n3,103,purchase,2,2026-01-03\n"
LOOSE = {"max_reject_share": 1.0, "progress": False, "now": "2026-06-01"}


@pytest.fixture
def write(tmp_path):
    def write(content, name="log.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def take(tmp_path):
    "Ingest; return the kept rows, the rejects as (line, column, value, reason), and the ledger."

    def take(source, **options):
        out = tmp_path / "out"
        ledger = ingest(source, out, **(LOOSE | options))
        assert ledger.rows_read == ledger.rows_kept + ledger.rows_rejected + ledger.duplicates_merged
        assert sum(ledger.reasons.values()) == ledger.rows_rejected
        return rows(out), rejects(out), ledger

    return take


def rows(out, columns="user_id, item_id, event, quantity, CAST(timestamp AS VARCHAR)", table="interactions"):
    return duckdb.execute(f"SELECT {columns} FROM '{out}/{table}.parquet'").fetchall()


def rejects(out):
    with open(out / "rejects.csv", newline="") as file:
        return [(int(row["line"]), row["column"], row["value"], row["reason"]) for row in csv.DictReader(file)]


def users(events):
    return [row[0] for row in events]


def refused(source, out, **options):
    with pytest.raises(IngestError) as error:
        ingest(source, out, **({"progress": False, "now": "2026-06-01"} | options))
    assert not (out / "interactions.parquet").exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.") and path.is_dir()], (
        "a temporary folder was left"
    )
    assert "Traceback" not in str(error.value) and len(str(error.value).splitlines()) <= 6
    return str(error.value)


# ---------------------------------------------------------------- the whole file


@pytest.mark.parametrize(
    "content, options, expected",
    [
        ("customer,item_id\n1,101\n", {}, ["log.csv", "'user_id'", "Found: customer, item_id"]),
        ("CustomerID,sku\n1,101\n", {}, ["Perhaps: columns={'user_id': 'CustomerID', 'item_id': 'sku'}"]),
        ("a,b\n1,101\n", {"columns": {"user_id": "a", "item_id": "c"}}, ["no column 'c'", "Found: a, b"]),
        ("a,b\n1,101\n", {"columns": {"user": "a"}}, ["'user'", "none of ours"]),
        ("", {}, ["log.csv", "is empty"]),
        (HEADER, {}, ["no rows"]),
        ("\n" + HEADER + GOOD, {}, ["line 1 is blank"]),
        ("user_id,item_id,item_id\n1,2,3\n", {}, ["same column twice: item_id"]),
        ("user_id,item_id\r1,2\r", {}, ["carriage return"]),
        ((HEADER + GOOD).encode("utf-16"), {}, ['encoding="utf-16"']),
        ((HEADER + GOOD).encode("utf-16-le"), {}, ['encoding="utf-16"']),
        (HEADER + GOOD, {"encoding": "utf-88"}, ["'utf-88' is not known"]),
        (HEADER + GOOD, {"delimiter": ";;"}, ["one character"]),
        (HEADER + GOOD, {"on_error": "stop"}, ['"skip" or "fail"']),
        (HEADER + GOOD, {"max_reject_share": 7}, ["from 0 to 1"]),
        (HEADER + GOOD, {"memory_limit": "lots"}, ["memory_limit", "2GB"]),
        (HEADER + GOOD, {"events": []}, ["events is empty"]),
        (HEADER + GOOD, {"query": "select 1"}, ["is for a database URL"]),
        (HEADER + ",1,view,1,\n" * 3, {"max_reject_share": 1.0}, ["all 3 rows are bad", "blank id"]),
    ],
)
def test_refused_files(content, options, expected, write, tmp_path):
    message = refused(write(content), tmp_path / "out", **options)
    for part in expected:
        assert part in message, message


def test_paths_that_cannot_be_read(write, tmp_path):
    out = tmp_path / "out"
    assert "No file matches" in refused(tmp_path / "none-*.csv", out)
    assert "no such file" in refused(tmp_path / "none.csv", out)
    assert "is a folder" in refused(tmp_path, out)
    message = refused(write("x", "log.docx"), out)
    assert "ending .docx is not known" in message and ".parquet" in message and ".jsonl" in message
    assert "not a readable Parquet file" in refused(write("x", "log.parquet"), out)
    assert "one JSON list" in refused(write('[{"user_id": 1, "item_id": 2}]', "log.json"), out)
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    assert "cannot be read" in refused(loop, out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(write, tmp_path):
    path = write(HEADER + GOOD)
    path.chmod(0)
    assert "cannot be read" in refused(path, tmp_path / "out")


def test_truncated_gzip(write, tmp_path):
    whole = gzip.compress((HEADER + GOOD * 500).encode())
    assert "cut short" in refused(write(whole[:-9], "log.csv.gz"), tmp_path / "out")
    assert "broken" in refused(write(HEADER + GOOD, "plain.csv.gz"), tmp_path / "out")


@pytest.mark.parametrize("change, expected", [("append", "changed while"), ("vanish", "vanished")])
def test_file_changes_half_way(change, expected, write, tmp_path, monkeypatch):
    import product_recs.data.sources as sources

    path, real = write(HEADER + GOOD), sources.count_lines

    def meanwhile(*arguments):
        if change == "vanish":
            path.unlink()
        answer = real(*arguments) if path.exists() else (4, False)
        if change == "append":
            path.write_text(HEADER + GOOD * 2)
        return answer

    monkeypatch.setattr(sources, "count_lines", meanwhile)
    assert expected in refused(path, tmp_path / "out")


def test_truncated_parquet(write, tmp_path):
    duckdb.execute(f"COPY (SELECT i AS user_id, i AS item_id FROM range(1000) t(i)) TO '{tmp_path}/log.parquet'")
    write((tmp_path / "log.parquet").read_bytes()[:-50], "log.parquet")
    assert "not a readable Parquet file" in refused(tmp_path / "log.parquet", tmp_path / "out")


# ---------------------------------------------------------------- the shape of lines


def test_ragged_and_blank_lines(write, take):
    events, bad, ledger = take(
        write(
            HEADER + "1,101,view,1,2026-01-01\n\n2,102\n3,103,view,1,2026-01-03,x,y\n   \n4,104,view,1,2026-01-04\n\n"
        )
    )
    assert users(events) == [1, 4] and ledger.rows_read == 4
    assert [(line, reason) for line, _, _, reason in bad] == [
        (4, "too few fields (2 instead of 5)"),
        (5, "too many fields (7 instead of 5)"),
    ]


def test_stray_quote_does_not_swallow_the_next_lines(write, take):
    text = (
        HEADER
        + '1,"101,view,1,2026-01-01\n2,102,view,1,2026-01-02\n3,103,view,1,2026-01-03\n'
        + '4,104",view,1,2026-01-04\n5,105,view,1,2026-01-05\n'
    )
    events, bad, _ = take(write(text))
    assert users(events) == [2, 3, 5]
    assert [(line, reason) for line, _, _, reason in bad] == [
        (2, "quote opened but not closed"),
        (5, "quote or control character in the id"),
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('9,"101,view,1,2026-01-01', "quote opened but not closed"),
        ('9,"101"x,view,1,2026-01-01', "text after a closing quote"),
        ('9,10"1,view,1,2026-01-01', "quote or control character in the id"),
        ('9,"10\n1",view,1,2026-01-01', "quote opened but not closed"),
        ("9,10\0001,view,1,2026-01-01", "NUL byte"),
        ("9,10\r1,view,1,2026-01-01", "line break inside a value"),
        ('9,"' + "x" * 200_000 + '",view,1,2026-01-01', "id longer than 256 characters"),
        ("9," + "x" * 1_100_000 + ",view,1,2026-01-01", "id longer than 256 characters"),
        ("9," + "x" * 1_100_000 + ",view,1", "line longer than 1 MiB"),
    ],
)
def test_broken_line_among_good_ones(line, reason, write, take):
    events, bad, _ = take(
        write(HEADER + "1,101,view,1,2026-01-01\n" + line + "\n" + GOOD.replace("1,101,view", "7,107,view"))
    )
    assert users(events) == [1, 2, 3, 7]
    assert (bad[0][0], bad[0][3]) == (3, reason)


def test_lines_are_physical_lines_whatever_the_quoting(write, take):
    text = (
        'user_id,item_id,note\n1,101,"two\nlines"\n\n,102,"a ""quoted"" '
        'word"\n3,,"three\n\nlines"\n4,104,plain\nnan,105,x\n'
    )
    events, bad, _ = take(write(text))
    assert users(events) == [1, 4]
    assert [(line, column) for line, column, _, _ in bad] == [(5, "user_id"), (6, "item_id"), (10, "user_id")]


def test_everything_quoted(write, take):
    text = (
        '"user_id","item_id","event"\n'
        + "".join(f'"{user}","{user + 100}","view"\n' for user in range(1, 50))
        + '"","1","view"\n'
    )
    events, bad, _ = take(write(text))
    assert users(events) == list(range(1, 50)) and bad == [(51, "user_id", "", "blank id")]


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_delimiters_are_found(delimiter, write, take):
    events, bad, _ = take(write((HEADER + GOOD).replace(",", delimiter)))
    assert users(events) == [1, 2, 3] and not bad


def test_delimiter_given(write, take):
    events, _, _ = take(write((HEADER + GOOD).replace(",", "~")), delimiter="~")
    assert users(events) == [1, 2, 3]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + (HEADER + GOOD).encode(),
        (HEADER + GOOD).replace("\n", "\r\n").encode(),
        (HEADER + GOOD).rstrip("\n").encode(),
        b"\xef\xbb\xbf" + (HEADER + GOOD + ",,,\n").replace("\n", "\r\n").encode(),
        (HEADER + GOOD).replace("\n", "\r\n", 2).encode(),
    ],
    ids=["bom", "crlf", "no last newline", "bom, crlf and a ragged line", "mixed line ends"],
)
def test_marks_and_line_ends(content, write, take):
    assert users(take(write(content))[0]) == [1, 2, 3]


# ---------------------------------------------------------------- encodings


def test_not_utf8(write, take, tmp_path):
    text = "user_id,item_id\n" + "".join(f"user{number},item{number}\n" for number in range(98)) + "Zoë,item1\n"
    events, bad, _ = take(write(text.encode("latin-1")), max_reject_share=0.05)
    assert len(events) == 98 and bad == [(100, "", "Zo\\xeb,item1", "not valid text in this encoding")]
    message = refused(write(("user_id,item_id\n" + "Zoë,item1\n" * 9).encode("latin-1")), tmp_path / "other")
    assert 'encoding="latin-1"' in message and "line 2" in message


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-8-sig"])
def test_encoding_given(encoding, write, take):
    events, bad, _ = take(write("user_id,item_id\r\nZoë,über\r\n,x\r\n".encode(encoding)), encoding=encoding)
    assert events[0][:2] == ("Zoë", "über") and bad == [(3, "user_id", "", "blank id")]


def test_bytes_that_the_given_encoding_does_not_know(write, take):
    events, bad, _ = take(write(b"user_id,item_id\n\x80uro,1\n\x81x,2\n"), encoding="cp1252")
    assert users(events) == ["€uro"] and [(line, reason) for line, _, _, reason in bad] == [
        (3, "not valid text in this encoding")
    ]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("value", ["NaN", "nan", "null", "NULL", "None", "<NA>", "", "   ", "NA", "\u00a0"])
def test_blank_ids(value, write, take):
    events, bad, _ = take(write(f"user_id,item_id\n1,101\n{value},102\n3,{value}\n"))
    assert users(events) == [1] and [(line, column, reason) for line, column, _, reason in bad] == [
        (3, "user_id", "blank id"),
        (4, "item_id", "blank id"),
    ]


@pytest.mark.parametrize(
    "value, reason",
    [
        ("-1", "quantity is not above 0"),
        ("0", "quantity is not above 0"),
        ("1000.5", "quantity above 1000"),
        ("1e9", "quantity above 1000"),
        ("NaN", "quantity is not a number"),
        ("inf", "quantity is not a number"),
        ("-inf", "quantity is not a number"),
        ("two", "quantity is not a number"),
        ("1_0", "quantity is not a number"),
    ],
)
def test_bad_quantity(value, reason, write, take):
    events, bad, _ = take(write(HEADER + GOOD + f"9,109,view,{value},2026-01-01\n"))
    shown = "'-inf" if value == "-inf" else value  # to a spreadsheet it would be a formula
    assert users(events) == [1, 2, 3] and bad == [(5, "quantity", shown, reason)]


def test_quantity_blank_and_limit(write, take):
    events, bad, _ = take(write("user_id,item_id,quantity\n1,101,\n2,102, 2.5 \n3,103,5000\n"), max_quantity=5000)
    assert [row[3] for row in events] == [1, 2.5, 5000] and not bad


@pytest.mark.parametrize(
    "value, expected",
    [
        ("2026-01-02T03:04:05Z", "2026-01-02 03:04:05"),
        ("2026-01-02T03:04:05+02:00", "2026-01-02 01:04:05"),
        ("2026-01-02 03:04:05 -0530", "2026-01-02 08:34:05"),
        ("2026-01-02T03:04:05.25", "2026-01-02 03:04:05.25"),
        ("2026-01-02", "2026-01-02 00:00:00"),
        ("1767323045", "2026-01-02 03:04:05"),
        ("1767323045000", "2026-01-02 03:04:05"),
        ("1767323045.0", "2026-01-02 03:04:05"),
        ("20260102", "2026-01-02 00:00:00"),
        ("", None),
        ("NaN", None),
    ],
)
def test_timestamps(value, expected, write, take):
    events, bad, _ = take(write(f"user_id,item_id,timestamp\n1,101,{value}\n"))
    assert not bad and events[0][4] == expected


@pytest.mark.parametrize(
    "value, reason",
    [
        ("soon", "timestamp not understood"),
        ("2026-13-01", "timestamp not understood"),
        ("31/31/2025", "timestamp not understood"),
        ("infinity", "timestamp not understood"),
        ("9e99", "timestamp not understood"),
        ("2026-06-02T00:00:01", "timestamp in the future"),
        ("2999-01-01", "timestamp in the future"),
        ("9999999999", "timestamp in the future"),
    ],
)
def test_bad_timestamps(value, reason, write, take):
    events, bad, _ = take(write(HEADER + GOOD + f"9,109,view,1,{value}\n"))
    assert users(events) == [1, 2, 3] and bad == [(5, "timestamp", value, reason)]


def test_events(write, take):
    text = "user_id,item_id,event\n1,101,VIEW\n2,102, Cart \n3,103,refund\n4,104,\n"
    events, bad, _ = take(write(text))
    assert [row[2] for row in events] == ["view", "cart"]
    assert bad == [(4, "event", "refund", "unknown event"), (5, "event", "", "blank event")]
    assert len(take(write(text), events=["view", "cart", "Refund"])[0]) == 3
    assert take(write("user_id,item_id\n1,101\n"))[0] == [(1, 101, "purchase", 1.0, None)]


# ---------------------------------------------------------------- ids


def test_leading_zeros_make_a_column_text(write, take):
    events, _, ledger = take(write("user_id,item_id\n1,101\n007,101\n2,102\n"))
    assert users(events) == ["007", "1", "2"] and [row[1] for row in events] == [101, 101, 102]
    assert any(
        "user_id is text because 1 of 3" in warning and "'007'" in warning and "line 3" in warning
        for warning in ledger.warnings
    )


def test_ids_with_point_zero(write, take):
    assert take(write("user_id,item_id\n1.0,101.0\n2.0,102.0\n,103.0\n"))[0] == [
        (1, 101, "purchase", 1.0, None),
        (2, 102, "purchase", 1.0, None),
    ]


def test_a_rejected_id_does_not_change_the_type(write, take):
    assert users(take(write(HEADER + GOOD + "abc,109,refund,1,\n"))[0]) == [1, 2, 3]


def test_long_and_huge_ids(write, take):
    events, bad, _ = take(write(f"user_id,item_id\n{'x' * 256},101\n{'y' * 257},102\n9223372036854775808,103\n"))
    assert set(users(events)) == {"x" * 256, "9223372036854775808"} and [(row[0], row[3]) for row in bad] == [
        (3, "id longer than 256 characters")
    ]


def test_json_mixes_numbers_and_text(write, take):
    lines = [
        {"user_id": 1, "item_id": 5},
        {"user_id": "1", "item_id": 5.0},
        {"user_id": 2, "item_id": 6, "timestamp": "2026-01-01T00:00:00+01:00"},
    ]
    events, _, ledger = take(write("\n".join(map(json.dumps, lines)), "log.jsonl"))
    assert events == [
        ("1", 5, "purchase", 1.0, None),
        ("1", 5, "purchase", 1.0, None),
        ("2", 6, "purchase", 1.0, "2025-12-31 23:00:00"),
    ]
    assert ledger.users == 2 and any(
        "user_id is a number in some rows and text in others" in warning for warning in ledger.warnings
    )


def test_json_types_and_faults(write, take):
    text = (
        '{"user_id": "1", "item_id": 5}\n\n{"user_id": "2"}\nnot json\n[1]\n{"user_id": {"a": 1}, "item_id": '
        '5}\n{"user_id": "3", "item_id": NaN}\n{"user_id": "4", "item_id": 7, "quantity": 2}\n'
    )
    events, bad, _ = take(write(text, "log.jsonl"))
    assert [(row[0], row[1], row[3]) for row in events] == [("1", 5, 1.0), ("4", 7, 2.0)]
    assert [(line, column, reason) for line, column, _, reason in bad] == [
        (3, "item_id", "blank id"),
        (4, "", "not a json object".replace("json", "JSON")),
        (5, "", "not a JSON object"),
        (6, "user_id", "id is not a number or a text"),
        (7, "item_id", "blank id"),
    ]


def test_parquet_keeps_types(take, tmp_path):
    duckdb.execute(
        f"COPY (SELECT * FROM (VALUES ('1', 5.0::DOUBLE, TIMESTAMPTZ '2026-01-01 00:00:00+01'), ('2', NULL, NULL), "
        f"('3', 7, NULL)) t(user_id, item_id, timestamp)) TO '{tmp_path}/log.parquet'"
    )
    events, bad, _ = take(tmp_path / "log.parquet")
    assert events == [("1", 5, "purchase", 1.0, "2025-12-31 23:00:00"), ("3", 7, "purchase", 1.0, None)] and bad == [
        (2, "item_id", "", "blank id")
    ]


# ---------------------------------------------------------------- duplicates, shares, failing


def test_repeated_deliveries_are_merged(write, take):
    text = (
        HEADER
        + "1,101,view,1,2026-01-01T10:00:00Z\n1,101,View,1.0,2026-01-01T11:00:00+01:00\n"
        + "1,101,view,2,2026-01-01T10:00:00Z\n5,105,view,1,\n5,105,view,1,\n"
    )
    events, _, ledger = take(write(text))
    assert len(events) == 4 and ledger.duplicates_merged == 1 and sum(row[0] == 5 for row in events) == 2
    assert any("2 of 5 rows have no timestamp" in warning for warning in ledger.warnings)


def test_fail_on_the_first_bad_row_keeps_the_earlier_result(write, tmp_path):
    out = tmp_path / "out"
    ingest(write(HEADER + GOOD), out, progress=False)
    before = (out / "ledger.json").read_bytes()
    path = write(HEADER + GOOD * 50 + "9,109,view,-1,2026-01-01\n,1,view,1,\n")
    with pytest.raises(IngestError) as error:
        ingest(path, out, on_error="fail", progress=False)
    assert "log.csv, line 152, column quantity: quantity is not above 0: '-1'" in str(
        error.value
    ) and "Nothing was written" in str(error.value)
    assert (out / "ledger.json").read_bytes() == before and len(rows(out)) == 3
    assert ingest(path, out, progress=False).rows_rejected == 2


def test_too_many_rejects(write, tmp_path):
    path = write(HEADER + GOOD * 10 + "9,109,refund,1,\n" * 3 + "9,109,view,soon,\n")
    message = refused(path, tmp_path / "out")
    assert (
        "4 of 34 rows" in message
        and "11.8%" in message
        and "3 x unknown event" in message
        and "line 32: 'refund'" in message
        and "events=[...]" in message
    )
    assert ingest(path, tmp_path / "out", max_reject_share=0.2, progress=False).rows_rejected == 4


# ---------------------------------------------------------------- many files, databases, tables


def test_glob_of_many_kinds(write, take, tmp_path):
    write(HEADER + GOOD, "a-1.csv")
    write(gzip.compress(b"item_id;user_id\n104;4\n;5\n"), "a-2.csv.gz")
    write('{"user_id": 6, "item_id": 106}\n', "a-3.jsonl")
    events, bad, ledger = take(tmp_path / "a-*")
    assert users(events) == [1, 2, 3, 4, 6] and bad == [(3, "item_id", "", "blank id")]
    assert [(os.path.basename(file["file"]), file["rows_read"], file["rows_rejected"]) for file in ledger.files] == [
        ("a-1.csv", 3, 0),
        ("a-2.csv.gz", 2, 1),
        ("a-3.jsonl", 1, 0),
    ]


def test_names_with_pattern_characters(write, take):
    assert users(take(write(HEADER + GOOD, "log[1] it's.csv"))[0]) == [1, 2, 3]


def test_mapping_and_hint_for_an_optional_column(write, take):
    text = "customer;sku;event_type;when\n1;101;cart;2026-01-01\n"
    path = write(text)
    events, _, ledger = take(path, columns={"user_id": "customer", "item_id": "sku"})
    assert events[0][2] == "purchase" and any("'event': 'event_type'" in warning for warning in ledger.warnings)
    assert take(path, columns={"user_id": "customer", "item_id": "sku", "event": "event_type", "timestamp": "when"})[
        0
    ] == [(1, 101, "cart", 1.0, "2026-01-01 00:00:00")]


@pytest.fixture
def shop(tmp_path):
    with sqlite3.connect(tmp_path / "shop.db") as database:
        database.execute("CREATE TABLE sales (customer INTEGER, sku TEXT, kind TEXT, at TEXT)")
        database.executemany(
            "INSERT INTO sales VALUES (?, ?, ?, ?)",
            [
                (number % 500 + 1, f"{number % 90:03}", "view", f"2026-01-01T{number % 24:02}:00:00")
                for number in range(60_000)
            ],
        )
        database.execute("INSERT INTO sales VALUES (NULL, 'x', 'view', NULL)")
    database.close()
    return f"sqlite:///{tmp_path}/shop.db"


def test_database(shop, take, tmp_path):
    query = "SELECT customer AS user_id, sku AS item_id, kind AS event, at AS timestamp, '10:30' AS note FROM sales"
    events, bad, ledger = take(shop, query=query)
    assert ledger.rows_read == 60_001 and bad == [(60_001, "user_id", "", "blank id")]
    assert events[0][:2] == (1, "000") and ledger.users == 500 and ledger.items == 90
    out = tmp_path / "other"
    assert "no such table: sails" in refused(shop, out, query="SELECT * FROM sails")
    assert "needs a query" in refused(shop, out)
    assert "Found: customer, sku" in refused(shop, out, query="SELECT customer, sku FROM sales")
    assert (
        "no such SQLite database" in refused(f"sqlite:///{tmp_path}/no.db", out, query="SELECT 1")
        and not (tmp_path / "no.db").exists()
    )
    assert "database URL cannot be used" in refused("oracel://x", out, query="SELECT 1")
    assert "secret" not in refused("postgresql+psycopg://me:secret@localhost:1/x", out, query="SELECT 1")


def test_products_and_users(write, take, tmp_path):
    log = write(HEADER + GOOD)
    products = write(
        'item_id,title,price,zip,available,line\n101,"A, b",1.50,01234,True,1\n101,New,2,01234,False,2\n'
        '999,"two\nlines",,00001,True,3\nabc,bad,1,1,True,4\n,none,1,1,True,5\n',
        "products.csv",
    )
    people = write('{"user_id": 1, "segment": "x"}\n{"user_id": "2", "segment": "y"}\n', "people.jsonl")
    _, bad, ledger = take(log, products=products, users=people)
    assert rows(tmp_path / "out", "item_id, title, price, zip, available, line", "products") == [
        (101, "New", 2.0, "01234", False, 2),
        (999, "two\nlines", None, "00001", True, 3),
    ]
    assert rows(tmp_path / "out", "*", "users") == [(1, "x"), (2, "y")]
    assert [(line, reason) for line, _, _, reason in bad] == [
        (6, "id is no integer, but those of the interactions are"),
        (7, "blank id"),
    ]
    assert (
        ledger.tables["products"] == dict(rows_read=5, rows_kept=2, rows_rejected=2, duplicates_merged=1)
        and ledger.rows_rejected == 0
    )


def test_products_faults(write, tmp_path):
    log, out = write(HEADER + GOOD), tmp_path / "out"
    assert "no such file" in refused(log, out, products=tmp_path / "none.csv")
    assert "product_columns={'item_id': 'sku'}" in refused(
        log, out, products=write("sku,title\n1,x\n", "products.csv")
    )
    assert "1 of 2 rows of" in refused(log, out, products=write("item_id,title\n101,x\n,y\n", "products.csv"))
    assert "line 3, column item_id" in refused(
        log, out, products=write("item_id,title\n101,x\n,y\n", "products.csv"), on_error="fail"
    )


def test_text_ids_make_product_ids_text(write, take, tmp_path):
    take(write("user_id,item_id\n1,A1\n2,102\n"), products=write("item_id,title\n102,x\n", "products.csv"))
    assert rows(tmp_path / "out", "item_id, title", "products") == [("102", "x")]


# ---------------------------------------------------------------- properties and concurrency


def test_permutation_and_splitting_change_nothing(write, take, tmp_path):
    generator = random.Random(0)
    lines = [
        f"{generator.randrange(50)},{generator.randrange(20)},view,{generator.randrange(1, 3)},"
        f"2026-01-{generator.randrange(1, 29):02}T00:00:00\n"
        for _ in range(2000)
    ]
    events, _, ledger = take(write(HEADER + "".join(lines)))
    assert ledger.duplicates_merged == 2000 - len(set(lines))
    generator.shuffle(lines)
    write(HEADER + "".join(lines[:700]), "part-1.csv")
    write(HEADER + "".join(lines[700:]), "part-2.csv")
    again, _, second = take(tmp_path / "part-*.csv")
    assert again == events and second.fingerprint == ledger.fingerprint
    assert take(tmp_path / "part-1.csv")[2].fingerprint != ledger.fingerprint


@pytest.mark.parametrize("prefix", ["", "u"])
def test_lines_of_a_file_that_is_read_by_several_threads(prefix, write, take):
    "Numbers and text; the faults and the first odd id are named with their lines, in a file of 40 MB."
    body = [
        f"{prefix}{number % 50_000},{number % 997},view,1,2026-01-01T00:00:{number % 60:02}\n"
        for number in range(1_200_000)
    ]
    bad = [0, 17, 122_880, 400_001, 777_777, 1_199_999]
    for number in bad:
        body[number] = f"{prefix}{number % 50_000},{number},view,many,2026-01-01\n"
    body[900_000] = f"{prefix}1,x-1,view,1,2026-01-01\n"
    source = write("".join([HEADER, *body]))
    _, rejected, ledger = take(source)
    assert [(line, value) for line, _, value, _ in rejected] == [
        (number + 2, "many") for number in bad
    ] and ledger.files[0]["rows_rejected"] == len(bad)
    warnings = [text for text in ledger.warnings if text.startswith("item_id is text")]
    assert len(warnings) == 1 and "'x-1'" in warnings[0] and "line 900002." in warnings[0], ledger.warnings


def test_careful_and_quick_reading_agree(write, take):
    text = HEADER + "".join(f"{number},{number % 7 + 100},view,1,2026-01-01\n" for number in range(1, 3000))
    events, _, ledger = take(write(text))
    other, bad, second = take(write(text + "1,2\n"))
    assert other == events and second.fingerprint == ledger.fingerprint and [line for line, *_ in bad] == [3001]


def _ingest_many(folder, number):
    for _ in range(5):
        ingest(folder / "log.csv", folder / "out", progress=False)


def _ensure(root, number):
    os.environ["PRODUCT_RECS_ROOT"] = str(root)
    ensure_ingested("race", source="log.csv", progress=False)


@pytest.mark.parametrize("work", [_ingest_many, _ensure])
def test_processes_at_once(work, write, tmp_path):
    write(HEADER + GOOD * 300)
    workers = [get_context("spawn").Process(target=work, args=(tmp_path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    out = tmp_path / "out" if work is _ingest_many else tmp_path / "data/processed/race"
    assert open_ledger(out).rows_kept == 3 and len(rows(out)) == 3
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".") and path.is_dir()]


def test_ensure_ingested(write, tmp_path, monkeypatch):
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(tmp_path))
    with pytest.raises(IngestError, match="data/interactions.csv: there is no such file"):
        ensure_ingested("new")
    with pytest.raises(IngestError, match="name of a folder"):
        ensure_ingested("../x")
    write(HEADER + GOOD)
    out = ensure_ingested("new", source="log.csv", progress=False)
    stamp = os.stat(out / "ledger.json").st_mtime_ns
    assert ensure_ingested("new") == out and os.stat(out / "ledger.json").st_mtime_ns == stamp
    write(HEADER + GOOD + "4,104,view,1,2026-01-04\n")
    assert open_ledger(ensure_ingested("new", progress=False)).rows_kept == 4
    (out / "ledger.json").write_text("{")
    with pytest.raises(IngestError, match="not a ledger"):
        open_ledger(out)
