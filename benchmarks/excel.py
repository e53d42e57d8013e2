"""Memory and time of reading a sheet of 500,000 rows and 6 columns: openpyxl, python-calamine, and `data/excel`.

    python benchmarks/excel.py [--rows 500000]

Each reads the same generated file in a process of its own and turns every cell into a value; `data/excel` also writes
the CSV file. Seconds are of the CPU, memory is what the process needs above its imports. python-calamine is no
dependency: without it (pip install python-calamine) its line is left out.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

COLUMNS = ["invoice", "customer", "item_id", "event", "quantity", "timestamp"]


def write(path, rows):
    "Sales: texts with leading zeros, numbers and dates."
    from openpyxl import Workbook

    book, rng, start = Workbook(write_only=True), random.Random(0), datetime(2024, 1, 1)
    sheet = book.create_sheet("Sales")
    sheet.append(COLUMNS)
    for row in range(rows):
        ids = f"{row // 5:08d}", rng.randrange(20_000), f"{rng.randrange(5000):05d}"
        sheet.append([*ids, "purchase", rng.randrange(1, 9), start + timedelta(minutes=row)])
    book.save(path)


def openpyxl(path):
    from openpyxl import load_workbook

    yield
    sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
    sheet.reset_dimensions()
    yield sum(1 for _ in sheet.iter_rows(values_only=True))


def calamine(path):
    from python_calamine import CalamineWorkbook

    yield
    yield sum(1 for _ in CalamineWorkbook.from_path(path).get_sheet_by_index(0).iter_rows())


def ours(path):
    import openpyxl.reader.excel  # noqa: F401

    from product_recs.data.excel import fetch_sheet

    def match(names):
        return {name: name for name in names}

    yield
    fetch_sheet(path, path.name, "", match, ["customer", "item_id"], path.with_suffix(".csv"), progress=False)
    yield sum(1 for _ in open(path.with_suffix(".csv"), encoding="utf-8")) + 1


READERS = {"openpyxl": openpyxl, "python-calamine": calamine, "data/excel": ours}


def measure(name, path):
    "Print what one reader needs."

    def memory():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    reader = READERS[name](path)
    next(reader)
    before, started = memory(), time.process_time()
    rows = next(reader)
    print(f"{name:16} {rows:9,} rows {time.process_time() - started:6.1f} s {memory() - before:6.0f} MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], Path(options.one[1]))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sales.xlsx"
        write(path, options.rows)
        for name in READERS:
            done = subprocess.run([sys.executable, __file__, "--one", name, path], text=True, capture_output=True)
            print(done.stdout.strip() or f"{name:16} left out: {done.stderr.strip().splitlines()[-1]}", flush=True)
