"""Workbooks as a person has them, through the public ingest: what is kept, what is refused, and what is said."""

import csv
import os
import subprocess
import sys
import zipfile
from datetime import date, datetime, timedelta

import duckdb
import pytest
from openpyxl import Workbook
from openpyxl.workbook.protection import WorkbookProtection

from product_recs.core.errors import IngestError
from product_recs.data.excel import fetch_sheet
from product_recs.ingest import ingest

LOOSE = {"max_reject_share": 1.0, "progress": False, "now": "2026-06-01"}
COLUMNS = ["user_id", "item_id", "event", "quantity", "timestamp"]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="log.xlsx", formats=None, finish=lambda book: None):
        book = Workbook()
        for row in rows:
            book.active.append(row)
        for cell, text in (formats or {}).items():
            book.active[cell].number_format = text
        finish(book)
        book.save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def take(tmp_path):
    "Ingest; the kept rows, the rejects as (line, column, value, reason), and the ledger."

    def take(source, **options):
        out = tmp_path / "out"
        ledger = ingest(source, out, **(LOOSE | options))
        assert ledger.rows_read == ledger.rows_kept + ledger.rows_rejected + ledger.duplicates_merged
        columns = "user_id, item_id, event, quantity, CAST(timestamp AS VARCHAR)"
        good = duckdb.execute(f"SELECT {columns} FROM '{out}/interactions.parquet'").fetchall()
        with open(out / "rejects.csv", newline="") as file:
            bad = [(int(row["line"]), row["column"], row["value"], row["reason"]) for row in csv.DictReader(file)]
        return good, bad, ledger

    return take


def refused(source, out, **options):
    with pytest.raises(IngestError) as error:
        ingest(source, out, **(LOOSE | options))
    return str(error.value)


def read(path, sheet="", wanted=COLUMNS, attributes=False):
    "A sheet alone: what is known of it, and the staged rows."
    staged = path.parent / "staged.csv"
    known = fetch_sheet(
        path,
        path.name,
        sheet,
        lambda names: {name: name for name in names if attributes or name in wanted},
        ["user_id", "item_id"],
        staged,
        attributes=attributes,
        progress=False,
    )
    with open(staged, encoding="utf-8", newline="") as file:
        return known, list(csv.reader(file))


def test_an_export_is_the_same_as_its_csv(write, take, tmp_path):
    day = datetime(2026, 1, 1, 12)
    log = [(n % 7, 100 + n % 11, "purchase", 1 + n % 3, day + timedelta(hours=n)) for n in range(300)]
    sheet, _, of_sheet = take(write([COLUMNS, *log]))
    text = "\n".join(",".join(str(value) for value in row) for row in [COLUMNS, *log])
    (tmp_path / "log.csv").write_text(text)
    plain, _, of_csv = take(tmp_path / "log.csv")
    assert sheet == plain and len(sheet) == 300 and of_sheet.fingerprint == of_csv.fingerprint


def test_odd_rows_are_rejected_with_their_row(write, take):
    rows = [
        [],
        ["user_id", "item_id", "timestamp"],
        [1, 101, date(2026, 1, 5)],
        [],
        [True, 101, None],
        ["#REF!", 101, None],
        [2.0**60, 101, None],
        [1, date(2026, 3, 1), None],
        [2, 102, "#N/A"],
        [None, 102, None],
        [3, 103.0, datetime(2026, 1, 5, 7, 30)],
        [],
        [" "],
    ]
    good, bad, ledger = take(write(rows))
    assert good == [(1, 101, "purchase", 1.0, "2026-01-05 00:00:00"), (3, 103, "purchase", 1.0, "2026-01-05 07:30:00")]
    assert bad == [
        (5, "user_id", "true", "id is not a number or a text"),
        (6, "user_id", "#REF!", "an error in the sheet"),
        (7, "user_id", "1.152921504606847e+18", "number too large to be kept exactly"),
        (8, "item_id", "2026-03-01", "Excel has made a date of this id"),
        (9, "timestamp", "#N/A", "an error in the sheet"),
        (10, "user_id", "", "blank id"),
    ]


def test_zeros_that_a_format_shows_are_kept(write, take):
    good, _, _ = take(
        write([["user_id", "item_id"], [7, 123], [8, 45678]], formats={"B2": "00000", "B3": "00000"}),
    )
    assert [row[1] for row in good] == ["00123", "45678"]


def test_zeros_that_excel_has_lost_are_named(write):
    known, rows = read(write([["user_id", "item_id"], [1, "00123"], [2, 456]]))
    assert rows == [["2", "1", "00123"], ["3", "2", "456"]] and known.kinds["item_id"] == "mixed"
    [warning] = known.warnings
    assert "column 'item_id': 1 ids have leading zeros ('00123' in row 2) and 1 are numbers ('456' in row 3)" in warning
    assert read(write([["user_id", "item_id"], [1, "00123"], [2, "456"]]))[0].warnings == []


def test_merged_cells_are_named(write):
    rows = [["user_id", "item_id"], [1, 5], [None, 6], [2, 7]]
    known, _ = read(write(rows, finish=lambda book: book.active.merge_cells("A2:A3")))
    assert len(known.warnings) == 1 and "the sheet has 1 merged ranges" in known.warnings[0]
    assert read(write(rows))[0].warnings == []


def test_dates_of_both_systems(write):
    rows = [["user_id", "item_id", "timestamp"], [1, 5, date(2026, 1, 5)], [1, 6, datetime(2026, 1, 5, 23, 59, 59)]]

    def of_a_mac(book):
        book.epoch = datetime(1904, 1, 1)

    for finish in (lambda book: None, of_a_mac):
        _, staged = read(write(rows, finish=finish))
        assert [row[3] for row in staged] == ["2026-01-05", "2026-01-05T23:59:59"]
    with zipfile.ZipFile(write(rows, finish=of_a_mac)) as book:
        assert b'date1904="1"' in book.read("xl/workbook.xml")


def test_attributes_keep_their_types(write, tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id\n1,007\n2,8\n")
    products = [
        ["item_id", "price", "name", "since", "sold", "stock", "code"],
        ["007", 1.5, "A", date(2026, 1, 5), True, 3, "0001"],
        ["8", 2, "NA", None, False, "#REF!", 2],
    ]
    ingest(log, tmp_path / "out", products=write(products, "products.xlsx"), **LOOSE)
    table = f"'{tmp_path}/out/products.parquet'"
    types = {name: kind for name, kind, *_ in duckdb.execute(f"DESCRIBE SELECT * FROM {table}").fetchall()}
    assert [types[name] for name in products[0]] == [
        "VARCHAR",
        "DOUBLE",
        "VARCHAR",
        "TIMESTAMP",
        "BOOLEAN",
        "BIGINT",
        "VARCHAR",
    ]
    stored = duckdb.execute(f"SELECT {', '.join(products[0])} FROM {table} ORDER BY item_id").fetchall()
    assert stored[0] == ("007", 1.5, "A", datetime(2026, 1, 5), True, 3, "0001")
    assert stored[1] == ("8", 2.0, "NA", None, False, None, "2")
    products[1].append("a note")
    error = refused(log, tmp_path / "out", products=write(products, "products.xlsx"))
    assert "column H has no name, but row 2 has a value there" in error


def test_sheets(write, tmp_path):
    def more(book):
        book.active.sheet_state = "hidden"
        for name in ("January", "February"):
            book.create_sheet(name).append(COLUMNS)
            book[name].append([name, 5])

    path = write([["settings"], ["of the export"]], finish=more)
    known, rows = read(path)
    assert rows[0][1] == "January" and "The others are 'February'" in known.warnings[0]
    known, rows = read(path, "February")
    assert rows[0][1] == "February" and known.warnings == []
    with pytest.raises(IngestError, match="Its sheets are 'Sheet', 'January', 'February'. Did you mean 'February'?"):
        read(path, "february")


def test_what_cannot_be_read_is_said(write, tmp_path):
    out = tmp_path / "out"
    assert "sheet 'Sheet' is empty" in refused(write([]), out)
    assert "the header has the same column twice: item_id" in refused(write([[*COLUMNS, "item_id"], [1, 2]]), out)
    error = refused(write([["Sales of 2026"], [], COLUMNS, [1, 2]]), out)
    assert "there is no column" in error and "The names are those of row 1 of sheet 'Sheet'" in error
    error = refused(write([COLUMNS, [1, 2], [1, "=A2+1"]]), out)
    assert "cell B3 is a formula without a value" in error and "save it" in error
    (tmp_path / "old.xls").write_bytes(b"")
    assert "save it as Excel Workbook (.xlsx)" in refused(tmp_path / "old.xls", out)
    whole = write([COLUMNS, *([n, n] for n in range(5000))])
    for content, said in [
        (whole.read_bytes()[:-200], "broken or cut short"),
        (whole.read_bytes()[: whole.stat().st_size // 2], "broken or cut short"),
        (b"", "the file is empty"),
        (b"user_id,item_id\n1,2\n", "is not an Excel workbook"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(4096), "old format .xls"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le"), "has a password"),
    ]:
        (tmp_path / "wrong.xlsx").write_bytes(content)
        assert said in refused(tmp_path / "wrong.xlsx", out), said
    assert not (out / "interactions.parquet").exists()


def test_damage_inside_of_the_sheet(write, tmp_path):
    path = write([COLUMNS, *([n, n] for n in range(5000))])
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as book:
        part = book.getinfo("xl/worksheets/sheet1.xml")
    middle = part.header_offset + part.compress_size // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    assert "broken or cut short" in refused(path, tmp_path / "out")


def test_a_protected_sheet_can_be_read(write):
    def lock(book):
        book.security = WorkbookProtection(workbookPassword="1234", lockStructure=True)
        book.active.protection.set_password("1234")

    assert read(write([COLUMNS, [1, 2]], finish=lock))[1][0][:3] == ["2", "1", "2"]


def replaced(path, sheet):
    "A workbook in which the XML of the sheet is another one, written piece by piece."
    out = path.with_name("made.xlsx")
    with zipfile.ZipFile(path) as book, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for part in book.namelist():
            if part != "xl/worksheets/sheet1.xml":
                made.writestr(part, book.read(part))
        with made.open("xl/worksheets/sheet1.xml", "w") as file:
            for piece in sheet:
                file.write(piece.encode())
    return out


def sheet_of(rows):
    yield '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    yield from rows
    yield "</sheetData></worksheet>"


def cells(row, values):
    kind = {str: 't="str"', int: ""}
    parts = (f'<c r="{chr(65 + n)}{row}" {kind[type(value)]}><v>{value}</v></c>' for n, value in enumerate(values))
    return f'<row r="{row}" spans="1:6" ht="15" customHeight="1">{"".join(parts)}</row>'


MEASURE = """
import resource, sys
from pathlib import Path
from product_recs.data.excel import fetch_sheet
import openpyxl.reader.excel
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, path = memory(), Path(sys.argv[1])
match = lambda names: {name: name for name in names}
fetch_sheet(path, path.name, "", match, ["user_id", "item_id"], path.with_suffix(".csv"), progress=False)
print(memory() - before)
"""


def test_memory_does_not_grow_with_the_sheet(write):
    small = write([COLUMNS])
    rows = (
        cells(n + 2, [n % 5000, f"{n % 3000:05d}", "purchase", 1, f"2026-01-01T{n % 24:02d}"]) for n in range(200_000)
    )
    path = replaced(small, sheet_of([cells(1, COLUMNS), *rows]))
    done = subprocess.run([sys.executable, "-c", MEASURE, path], text=True, capture_output=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 25, "MiB for 200,000 rows; a list of their cells would be several hundred"
    assert sum(1 for _ in open(path.with_suffix(".csv"))) == 200_000


def test_bombs_and_entities(write, tmp_path):
    small, out = write([COLUMNS]), tmp_path / "out"
    blanks = replaced(small, sheet_of(" " * (1 << 20) for _ in range(80)))
    assert "unpacks to 80 MiB" in refused(blanks, out)
    laughs = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
    assert "broken or cut short" in refused(replaced(small, [laughs, *sheet_of([])]), out)
    assert "broken or cut short" in refused(replaced(small, sheet_of(["<row><c t='str'><v>", "x" * (2 << 20)])), out)
    far = f'{cells(1, COLUMNS)}<row r="99999999999"><c r="A9"><v>1</v></c><c r="B9"><v>2</v></c></row>'
    known, rows = read(replaced(small, sheet_of([far])))
    assert len(rows) == 1 and "the sheet is full" in known.warnings[0]
