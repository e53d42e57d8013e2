"""One generated shop, exported as many shop systems would export it.

The shop has four tastes: each user buys nearly only tea, mugs, lamps or books. So a sensible list for a tea drinker is
a list of teas that they have not bought, whatever the export looks like. `test_exports.py` asks for exactly that, and
`make exports` writes what a person sees on the way there.
"""

import csv
import json
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import openpyxl

KINDS = {"tea": "Tea", "mug": "Mug", "lamp": "Lamp", "book": "Book"}
PER_KIND, USERS = 16, 240
START = datetime(2025, 3, 3, 9)


@dataclass(frozen=True)
class Sale:
    order: int
    user: int  # from 0; the taste is the remainder by four
    item: int  # from 0; the kind likewise
    quantity: int
    time: datetime

    @property
    def kind(self) -> str:
        return list(KINDS)[self.item % 4]

    @property
    def title(self) -> str:
        return f"{KINDS[self.kind]} No. {self.item // 4 + 1}"

    @property
    def price(self) -> float:
        return 2.5 + self.item % 7


def shop(seed: int = 0) -> list[Sale]:
    "Orders of half a year, in the order of time."
    draw, sales = random.Random(seed), []
    for user in range(USERS):
        own = [item for item in range(4 * PER_KIND) if item % 4 == user % 4]
        for item in draw.sample(own, draw.randint(6, 11)) + draw.sample(range(4 * PER_KIND), 1):
            time = START + timedelta(minutes=draw.randrange(180 * 24 * 60))
            sales.append((time, user, item, draw.choice([1, 1, 1, 2, 6])))
    return [
        Sale(536000 + order, user, item, quantity, time)
        for order, (time, user, item, quantity) in enumerate(sorted(sales))
    ]


@dataclass
class Export:
    "Files of one system, the command that looks at them, and how to read the lists."

    name: str
    about: str
    sources: list[str]  # arguments of `init`
    options: list[str] = field(default_factory=list)  # of `init`
    more: list[str] = field(default_factory=list)  # lines that a person adds after what `init` said
    user: Callable[[int], str] = str  # number -> the id of the user, as a URL has it
    item: Callable[[int], str] = str  # likewise
    never: tuple = ()  # ids that no list may have
    says: tuple = ()  # what `init` or the run has to say


def write_csv(path: Path, header: list[str], rows, delimiter: str = ",", **options) -> None:
    with open(path, "w", newline="", encoding=options.get("encoding", "utf-8")) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def european(folder: Path) -> Export:
    rows = [
        (
            s.order,
            f"K{s.user:05}",
            f"A-{s.item:04}",
            s.title,
            f"{s.quantity},0",
            f"{s.time:%d.%m.%Y %H:%M}",
            f"{s.price:.2f}".replace(".", ","),
        )
        for s in shop()
    ]
    header = ["Bestellung", "Kundennummer", "Artikelnummer", "Bezeichnung", "Menge", "Datum", "Preis"]
    write_csv(folder / "verkauf.csv", header, rows, ";", encoding="utf-8-sig")
    return Export(
        "two_commas",
        "A German shop: semicolons, decimal commas, 24.10.2025.",
        ["verkauf.csv"],
        user=lambda n: f"K{n:05}",
        item=lambda n: f"A-{n:04}",
        says=("read day first", "decimal comma"),
    )


def american(folder: Path) -> Export:
    for number, half in enumerate((shop()[:900], shop()[900:]), 1):
        rows = [(s.order, s.user + 1, 1000 + s.item, s.quantity, f"{s.time:%m/%d/%Y %I:%M %p}") for s in half]
        write_csv(folder / f"orders-{number}.csv", ["Order ID", "Customer Id", "Product Id", "Qty", "Order Date"], rows)
    rows = [
        (1000 + item, f"{KINDS[list(KINDS)[item % 4]]} No. {item // 4 + 1}", "No" if item == 5 else "Yes")
        for item in range(4 * PER_KIND)
    ]
    write_csv(folder / "catalog.csv", ["Product Id", "Product Name", "In Stock"], rows)
    return Export(
        "two_calendars",
        "An American shop: 10/24/2025 02:30 PM, a catalogue with words for availability.",
        ["orders-*.csv"],
        ["--products", "catalog.csv"],
        user=lambda n: str(n + 1),
        item=lambda n: str(1000 + n),
        never=("1005",),
        says=("read month first",),
    )


def cancelling(folder: Path) -> Export:
    rows = []
    for s in shop():
        rows.append(
            (
                s.order,
                f"{20000 + s.item}{'A' if s.item % 3 else ''}",
                s.title.upper(),
                s.quantity,
                f"{s.time:%Y-%m-%d %H:%M:%S}",
                s.price,
                12000 + s.user,
                "United Kingdom",
            )
        )
        if s.order % 12 == 0:
            back = s.time + timedelta(days=2)
            rows.append(
                (
                    f"C{s.order}",
                    rows[-1][1],
                    s.title.upper(),
                    -s.quantity,
                    f"{back:%Y-%m-%d %H:%M:%S}",
                    s.price,
                    12000 + s.user,
                    "United Kingdom",
                )
            )
        if s.order % 5 == 0:
            rows.append((s.order, "POST", "POSTAGE", 1, f"{s.time:%Y-%m-%d %H:%M:%S}", 18.0, 12000 + s.user, "France"))
    header = ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"]
    write_csv(folder / "online_retail.csv", header, rows)
    return Export(
        "returns_and_postage",
        "A wholesaler: cancelled invoices, postage among the products, titles in the log.",
        ["online_retail.csv"],
        more=["exclude_items: [POST]"],
        user=lambda n: str(12000 + n),
        item=lambda n: f"{20000 + n}{'A' if n % 3 else ''}",
        never=("POST",),
        says=("Rows that are returns", "Are these products? POST (POSTAGE)"),
    )


def fees(folder: Path) -> Export:
    rows = []
    for s in shop():
        email, time = f"user{s.user}@example.com", f"{s.time:%Y-%m-%d %H:%M:%S} +0100"
        rows.append((f"#{s.order}", email, time, s.quantity, s.title, f"SKU{s.item:03}", s.price))
        if s.order % 7 == 0:
            rows.append((f"#{s.order}", email, time, 1, "Gift Card", "GIFT", 25.0))
        if s.order % 9 == 0:
            rows.append((f"#{s.order}", email, time, 1, "Shipping fee", "SHIP", 4.9))
    header = ["Name", "Email", "Created at", "Lineitem quantity", "Lineitem name", "Lineitem sku", "Lineitem price"]
    write_csv(folder / "orders_export.csv", header, rows)
    return Export(
        "fees",
        "A hosted shop: one line an item of an order, e-mail addresses as users, gift cards and fees.",
        ["orders_export.csv"],
        more=["exclude_items: [GIFT, SHIP]"],
        user=lambda n: f"user{n}@example.com",
        item=lambda n: f"SKU{n:03}",
        never=("GIFT", "SHIP"),
        says=("Are these products?", "Gift Card"),
    )


def workbook(folder: Path) -> Export:
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Orders")
    sheet.append(["Order", "Customer", "SKU", "Product Name", "Units", "Date"])
    for s in shop():
        sheet.append([s.order, s.user + 1, f"{s.item:05}", s.title, s.quantity, s.time])
    book.save(folder / "orders.xlsx")
    return Export(
        "excel",
        "A workbook: dates as dates, article numbers as text with their zeros.",
        ["orders.xlsx"],
        user=lambda n: str(n + 1),
        item=lambda n: f"{n:05}",
    )


def json_lines(folder: Path) -> Export:
    draw = random.Random(1)
    with open(folder / "events.jsonl", "w") as file:
        for s in shop():
            event = {
                "userId": f"u-{s.user}",
                "productId": f"p-{s.item}",
                "type": "order",
                "ts": s.time.timestamp() * 1000,
            }
            if draw.random() < 0.5:
                event["qty"] = s.quantity
            if draw.random() < 0.02:
                del event["productId"]
            file.write(json.dumps(event) + "\n")
    return Export(
        "json_lines",
        "A backend's own log: JSON lines, times in milliseconds, keys that some lines lack.",
        ["events.jsonl"],
        user=lambda n: f"u-{n}",
        item=lambda n: f"p-{n}",
        says=("blank id",),
    )


def parquet_categories(folder: Path) -> Export:
    with duckdb.connect() as con:
        con.execute("CREATE TABLE t (customer_key VARCHAR, product_key VARCHAR, action VARCHAR, occurred TIMESTAMP)")
        rows = [(f"c{s.user}", f"x{s.item}", "purchase" if s.order % 3 else "view", s.time) for s in shop()]
        con.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", rows)
        con.execute("CREATE TYPE act AS ENUM (SELECT DISTINCT action FROM t)")
        con.execute("ALTER TABLE t ALTER action TYPE act")
        con.execute(f"COPY t TO '{folder}/facts.parquet' (FORMAT parquet)")
    return Export(
        "parquet",
        "A warehouse: Parquet with an enumeration of actions and typed times.",
        ["facts.parquet"],
        user=lambda n: f"c{n}",
        item=lambda n: f"x{n}",
    )


def database_view(folder: Path) -> Export:
    with sqlite3.connect(folder / "shop.db") as database:
        database.execute("CREATE TABLE orders (id INTEGER, customer_id INTEGER, placed_at TEXT)")
        database.execute("CREATE TABLE order_lines (order_id INTEGER, article_no TEXT, pieces INTEGER)")
        for s in shop():
            database.execute("INSERT INTO orders VALUES (?, ?, ?)", (s.order, s.user, s.time.isoformat()))
            database.execute("INSERT INTO order_lines VALUES (?, ?, ?)", (s.order, f"{s.item:03}", s.quantity))
        database.execute(
            "CREATE VIEW sales AS SELECT customer_id, article_no, pieces, placed_at FROM order_lines "
            "JOIN orders ON orders.id = order_id"
        )
    database.close()
    return Export(
        "database",
        "A view in the shop's database.",
        ["sqlite:///shop.db"],
        ["--query", "SELECT * FROM sales"],
        item=lambda n: f"{n:03}",
    )


def split_files(folder: Path) -> Export:
    sales = shop()
    rows = [
        (
            s.order,
            f"{84000 + s.item}{'A' if s.order % 9 == 0 else 'a'}",
            s.quantity,
            f"{s.time:%d/%m/%Y %H:%M}",
            100 + s.user,
        )
        for s in sales
    ]
    first, second = ([row for s, row in zip(sales, rows) if (s.time.day <= 12) == early] for early in (True, False))
    write_csv(folder / "a.csv", ["Invoice", "StockCode", "Quantity", "InvoiceDate", "CustomerID"], first)
    write_csv(folder / "b.csv", ["Invoice", "StockCode", "Quantity", "InvoiceDate", "Customer ID"], second)
    return Export(
        "split_files",
        "Two files of one year with other headers; the first shows only days up to the twelfth.",
        ["a.csv", "b.csv"],
        more=["normalise_ids: case"],
        user=lambda n: str(100 + n),
        item=lambda n: f"{84000 + n}a",
        says=("All dates are read day first", "differ from another in case alone"),
    )


def event_stream(folder: Path) -> Export:
    rows = []
    for s in shop():
        seconds = int(s.time.timestamp() * 1000)
        steps = ["view", "addtocart", "transaction"]
        rows += [(seconds + 60_000 * step, s.user, name, s.item) for step, name in enumerate(steps)]
        if s.order % 4 == 0:
            rows.append((seconds, s.user, "view", (s.item + 4) % (4 * PER_KIND)))
    write_csv(folder / "events.csv", ["timestamp", "visitorid", "event", "itemid"], rows)
    return Export("event_stream", "A tracker: views, carts and transactions in milliseconds.", ["events.csv"])


def till_receipts(folder: Path) -> Export:
    rows = [
        (
            s.order,
            f"{s.time:%d.%m.%y}",
            f"{s.time:%H:%M}",
            "" if s.order % 5 == 0 else f"{20000000 + s.user}",
            f"{4000000000000 + 17 * s.item}",
            f"Größe {s.title}",
            f"{s.quantity},00",
        )
        for s in shop()
    ]
    header = ["Bon-Nr.", "Datum", "Uhrzeit", "Kundenkarte", "EAN", "Artikelbezeichnung", "Menge"]
    write_csv(folder / "kasse.csv", header, rows, ";", encoding="cp1252")
    return Export(
        "till_receipts",
        "A till in the code page of Windows; a fifth of the customers shows no card, and years have two digits.",
        ["kasse.csv"],
        user=lambda n: str(20000000 + n),
        item=lambda n: str(4000000000000 + 17 * n),
        says=("is read as cp1252", "They can teach nothing", "read day first"),
    )


def sap_items(folder: Path) -> Export:
    rows = []
    for s in shop():
        line = [f"{s.order:010}", f"{4711 + s.user:010}", f"{100000 + s.item:018}", f"{s.time:%Y%m%d}"]
        rows.append([*line, f"{s.quantity},000"])
        if s.order % 40 == 0:
            rows.append([*line, f"{s.quantity},000-"])  # credited
    write_csv(folder / "vbap.txt", ["VBELN", "KUNNR", "MATNR", "ERDAT", "KWMENG"], rows, ";")
    return Export(
        "sap_items",
        "An ERP: its own field names, ids with leading zeros, 20250303, and a minus behind the number.",
        ["vbap.txt"],
        user=lambda n: f"{4711 + n:010}",
        item=lambda n: f"{100000 + n:018}",
        says=("decimal comma", "Rows that are returns"),
    )


def order_lines(folder: Path) -> Export:
    rows = [(s.order, 1 + s.user, f"S{s.item}", s.title, f"{s.time:%d %b %Y}", "complete") for s in shop()]
    rows += [(s.order, 0, f"S{s.item}", s.title, f"{s.time:%d %b %Y}", "complete") for s in shop()[::8]]
    rows += [(s.order, 1 + s.user, "GHOST", "Never sent", f"{s.time:%d %b %Y}", "canceled") for s in shop()[::9]]
    header = ["item_id", "order_id", "customer_id", "sku", "name", "bought_when", "order_status"]
    write_csv(folder / "sales_order_item.csv", header, [(number, *row) for number, row in enumerate(rows, 1)])
    return Export(
        "order_lines",
        "A table of order lines: item_id numbers the rows, guests are customer 0, some orders were cancelled.",
        ["sales_order_item.csv"],
        user=lambda n: str(1 + n),
        item=lambda n: f"S{n}",
        never=("GHOST",),
        says=("item_id is another one in each row", "One user, 0, has", "order_status is canceled are left out"),
    )


def nested_events(folder: Path) -> Export:
    with open(folder / "orders.jsonl", "w") as file:
        for s in shop():
            event = {"customer": {"id": f"c{s.user}", "tags": []}, "product": {"sku": f"p{s.item}", "name": s.title}}
            file.write(json.dumps({"ts": int(s.time.timestamp() * 1000), **event}) + "\n")
    return Export(
        "nested_events",
        "A stream of events with objects inside objects.",
        ["orders.jsonl"],
        user=lambda n: f"c{n}",
        item=lambda n: f"p{n}",
    )


def months_abroad(folder: Path) -> Export:
    months = "janv. févr. mars avr. mai juin juil. août sept. oct. nov. déc.".split()
    rows = [
        (f"{s.time.day} {months[s.time.month - 1]} {s.time.year}", f"{s.user:05}", f"{s.item:04}", s.quantity)
        for s in shop()
    ]
    for number, padded in enumerate((True, False)):
        part = rows[:1200] if padded else [(day, int(u), int(i), q) for day, u, i, q in rows[1200:]]
        write_csv(folder / f"ventes-{number}.csv", ["Date", "Client", "Code produit", "Qté"], part, encoding="cp1252")
    return Export(
        "months_abroad",
        "Two French files: months in words, and ids that lost their leading zeros in the second.",
        ["ventes-0.csv", "ventes-1.csv"],
        more=["normalise_ids: zeros"],
        user=lambda n: str(n),
        item=lambda n: f"{n:04}",
        says=("is read as cp1252", "differ from another in leading zeros alone"),
    )


EXPORTS = {
    writer.__name__: writer
    for writer in (
        european,
        american,
        cancelling,
        fees,
        workbook,
        json_lines,
        parquet_categories,
        database_view,
        split_files,
        event_stream,
        till_receipts,
        sap_items,
        order_lines,
        nested_events,
        months_abroad,
    )
}
