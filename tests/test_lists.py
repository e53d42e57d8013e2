"""Lists of texts: from every file to the column that a model takes apart, and no title that falls apart."""

import json

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from product_recs.core.errors import IngestError
from product_recs.data.lists import as_lists
from product_recs.ingest import ingest

TAGS = {1: ["tea", "grün, bio", 'a "quote"'], 2: [], 3: None, 4: ["tea", "🙂"]}
QUIET = {"progress": False, "now": "2026-06-01"}


def stored(folder, products, **options):
    "The column `tags` by item, as an ingest writes it."
    (folder / "log.csv").write_text("user_id,item_id\n1,1\n1,2\n2,3\n2,4\n", encoding="utf-8")
    ingest(folder / "log.csv", folder / "in", products=products, **QUIET, **options)
    rows = duckdb.sql(f"SELECT item_id, tags FROM '{folder}/in/products.parquet' ORDER BY 1").fetchall()
    return dict(rows)


def parquet(folder):
    path = folder / "p.parquet"
    table = pa.table({"item_id": [*TAGS], "tags": pa.array(TAGS.values(), pa.list_(pa.string()))})
    pq.write_table(table, path)
    return path, {}


def json_lines(folder):
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps({"item_id": id, "tags": tags}) + "\n" for id, tags in TAGS.items()))
    return path, {}


def json_in_csv(folder):
    import csv

    path = folder / "p.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["item_id", "tags"])
        for id, tags in TAGS.items():
            out.writerow([id, "" if tags is None else json.dumps(tags, ensure_ascii=False)])
    return path, {}


def sqlite(folder):
    url = f"sqlite:///{folder}/shop.db"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE p (item_id INTEGER, tags TEXT)"))
        for id, tags in TAGS.items():
            value = None if tags is None else json.dumps(tags)
            connection.execute(text("INSERT INTO p VALUES (:id, :tags)"), {"id": id, "tags": value})
    engine.dispose()
    return url, {"products_query": "SELECT * FROM p"}


@pytest.mark.parametrize("source", [parquet, json_lines, json_in_csv, sqlite])
def test_lists_of_every_file_are_the_same_lists(source, tmp_path):
    products, options = source(tmp_path)
    tags = stored(tmp_path, products, **options)
    lists, way = as_lists(np.array([tags[id] for id in TAGS], object))
    assert way == "json"
    assert lists == [None if value is None else tuple(value) for value in TAGS.values()]


@pytest.mark.parametrize("type", ["TEXT[]", "JSONB", "JSON"])
def test_lists_of_postgresql_are_the_same_lists(type, tmp_path, postgres_url):
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE p (item_id BIGINT, tags {type})"))
        for id, tags in TAGS.items():
            value = tags if type == "TEXT[]" or tags is None else json.dumps(tags)
            connection.execute(text("INSERT INTO p VALUES (:id, :tags)"), {"id": id, "tags": value})
    engine.dispose()
    tags = stored(tmp_path, postgres_url, products_query="SELECT * FROM p")
    lists, _ = as_lists(np.array([tags[id] for id in TAGS], object))
    assert lists == [None if value is None else tuple(value) for value in TAGS.values()]


def test_a_table_in_a_database_needs_its_query(tmp_path):
    url, _ = sqlite(tmp_path)
    with pytest.raises(IngestError, match="pass products_query="):
        stored(tmp_path, url)
    products, _ = json_lines(tmp_path)
    with pytest.raises(IngestError, match="products_query is for products in a database"):
        stored(tmp_path, products, products_query="SELECT 1")


LETTERS = st.characters(codec="utf-8", exclude_characters='|;,"', exclude_categories=("Z", "C"))
WORD = st.text(LETTERS, min_size=1, max_size=9)


@given(st.lists(st.lists(WORD, max_size=5), min_size=1, max_size=20))
def test_any_words_come_back_from_json(rows):
    lists, way = as_lists(np.array([json.dumps(row) for row in rows] + [None], object)[:])
    assert way == "json" and lists == [*(tuple(dict.fromkeys(row)) for row in rows), None]


@given(st.lists(WORD, min_size=4, max_size=6, unique=True), st.sampled_from("|;"), st.randoms(use_true_random=False))
def test_words_that_come_again_come_back_from_one_separator(words, separator, draw):
    rows = [draw.sample(words, draw.randint(2, 4)) for _ in range(30)]
    lists, way = as_lists(np.array([separator.join(row) for row in rows], object))
    assert way == separator and lists == [tuple(row) for row in rows]


def test_ordinary_text_is_no_list():
    shop = [f"Kaffee Nr. {number}, gemahlen, {number} g" for number in range(200)]
    for texts in (
        shop,
        [f"{title} | Unser Laden" for title in shop],
        [f"{title}; neu" for title in shop],
        ["Wien, Österreich", "Graz, Österreich", "Bonn, Deutschland"] * 50,
        ["1,5", "2,5", "1,5, 2,5, 1,5"] * 50,
        ["[nur ein Titel]"] * 9,
        ["", None] * 9,
        [f"{number}" for number in range(99)],
    ):
        assert as_lists(np.array(texts, object)) is None, texts[:2]


def test_the_order_of_the_rows_decides_nothing():
    rows = ["red|blue", "red", "blue|green", None, "green|red|blue"]
    lists, _ = as_lists(np.array(rows, object))
    again, _ = as_lists(np.array(rows[::-1], object))
    assert again[::-1] == lists


def test_many_titles_are_looked_at_in_seconds():
    import time

    titles = np.array([f"Mug {number}, white, with a handle, {number} ml" for number in range(200_000)], object)
    began = time.process_time()
    assert as_lists(titles) is None
    assert time.process_time() - began < 10
