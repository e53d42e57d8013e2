"""Dense columns: vectors that a shop brings, from every kind of file to the bundle and the service, bit by bit."""

import csv
import json
import time

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, text

from product_recs.api import create_app
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.errors import EvaluateError, IngestError, ProductRecsError
from product_recs.core.settings import Settings
from product_recs.data.arrays import load_table, save_table
from product_recs.evaluation.segments import user_segments
from product_recs.features import build_features
from product_recs.ingest import ingest
from product_recs.jobs.init import propose
from product_recs.train import train_bundle

QUIET = {"progress": False, "now": "2026-06-01", "max_reject_share": 1.0}
ITEMS, WIDTH, GAP, COLD = [*range(1, 13)], 24, 3, 12  # the last of them is sold to nobody
VECTORS = np.random.default_rng(1).normal(size=(len(ITEMS), WIDTH)).astype(np.float32)
VECTORS[0, :4] = [0, -0.0, 1e-40, 3.4e38]  # zeros with a sign, a subnormal number, a large one
VECTORS[ITEMS.index(GAP)] = np.nan
ROWS = [None if item == GAP else vector for item, vector in zip(ITEMS, VECTORS)]


def log(folder):
    rows = [
        (user, item, f"2026-01-{1 + (user * 7 + item) % 28:02}T10:00:00")
        for user in range(1, 25)
        for item in ITEMS
        if item != COLD and (user + item) % 3
    ]
    with open(folder / "log.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "timestamp"), *rows])
    return folder / "log.csv"


# --- the ways in which a file has them -------------------------------------------------------------------------------


def parquet_list(folder, rows, type=None):
    path = folder / "p.parquet"
    values = [None if row is None else [*map(float, row)] for row in rows]
    vectors = pa.array(values, type or pa.list_(pa.float64()))
    pq.write_table(pa.table({"item_id": ITEMS[: len(rows)], "vector": vectors}), path)
    return {"products": path}


def parquet_float(folder, rows):
    return parquet_list(folder, rows, pa.list_(pa.float32()))


def parquet_fixed(folder, rows):
    return parquet_list(folder, rows, pa.list_(pa.float32(), WIDTH))


def pandas_parquet(folder, rows):
    rows = [None if row is None else row.astype(float) for row in rows]
    pd.DataFrame({"item_id": ITEMS[: len(rows)], "vector": rows}).to_parquet(folder / "p.parquet")
    return {"products": folder / "p.parquet"}


def json_lines(folder, rows):
    lines = [{"item_id": item, "vector": None if row is None else [*map(float, row)]} for item, row in zip(ITEMS, rows)]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"products": folder / "p.jsonl"}


def csv_file(folder, rows, shown):
    with open(folder / "p.csv", "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["item_id", "vector"])
        out.writerows((item, "" if row is None else shown(row)) for item, row in zip(ITEMS, rows))
    return {"products": folder / "p.csv"}


def csv_json(folder, rows):
    return csv_file(folder, rows, lambda row: json.dumps([*map(float, row)]))


def csv_spaces(folder, rows):
    return csv_file(folder, rows, lambda row: " ".join(map(str, row.tolist())))


def csv_semicolons(folder, rows):
    return csv_file(folder, rows, lambda row: ";".join(map(str, row.tolist())))


def csv_decimal_comma(folder, rows):
    return csv_file(folder, rows, lambda row: ";".join(map(str, row.tolist())).replace(".", ","))


def csv_postgresql(folder, rows):
    return csv_file(folder, rows, lambda row: "{" + ",".join(map(str, row.tolist())) + "}")


def csv_numpy(folder, rows):
    with np.printoptions(precision=17, threshold=10**6, floatmode="unique"):
        return csv_file(folder, rows, str)  # [ 0.1 -0.2 ...] over several lines


def excel(folder, rows):
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["item_id", "vector"])
    for item, row in zip(ITEMS, rows):
        book.active.append([item, None if row is None else json.dumps([*map(float, row)])])
    book.save(folder / "p.xlsx")
    return {"products": folder / "p.xlsx"}


def sqlite(folder, rows):
    url = f"sqlite:///{folder}/shop.db"
    fill(url, "TEXT", rows, lambda row: json.dumps([*map(float, row)]))
    return {"products": url, "products_query": "SELECT * FROM p"}


def fill(url, type, rows, value):
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE p (item_id BIGINT, vector {type})"))
        for item, row in zip(ITEMS, rows):
            given = {"id": item, "v": None if row is None else value(row)}
            connection.execute(text("INSERT INTO p VALUES (:id, :v)"), given)
    engine.dispose()


SOURCES = [parquet_list, parquet_float, parquet_fixed, pandas_parquet, json_lines, csv_json, csv_spaces, csv_semicolons,
           csv_decimal_comma, csv_postgresql, csv_numpy, excel, sqlite]  # fmt: skip


def ingested(folder, **tables):
    "The column `vector` as an ingest writes it, in the order of the items."
    ledger = ingest(log(folder), folder / "in", **tables, **QUIET)
    assert ledger.tables["products"]["rows_kept"] == ledger.tables["products"]["rows_read"]
    return in_order(folder)


def in_order(folder):
    written = load_table(folder / "in/products.parquet")
    return written["vector"][np.argsort(written["item_id"])]


def same_bits(vectors, other):
    return np.array_equal(vectors.view(np.uint32), other.view(np.uint32)) if vectors.shape == other.shape else False


def without_gap(vectors):
    return vectors[np.array(ITEMS) != GAP]


@pytest.mark.parametrize("source", SOURCES)
def test_vectors_of_every_file_come_in_bit_by_bit(source, tmp_path):
    vectors = ingested(tmp_path, **source(tmp_path, ROWS))
    assert vectors.dtype == np.float32 and vectors.shape == VECTORS.shape
    assert np.isnan(vectors[ITEMS.index(GAP)]).all()
    assert same_bits(without_gap(vectors), without_gap(VECTORS))
    [(kind,)] = duckdb.sql(f"SELECT DISTINCT typeof(vector) FROM '{tmp_path}/in/products.parquet'").fetchall()
    assert kind == "FLOAT[]"


@pytest.mark.parametrize("type", ["REAL[]", "DOUBLE PRECISION[]", "JSONB", "TEXT"])
def test_vectors_of_postgresql_come_in_bit_by_bit(type, tmp_path, postgres_url):
    as_json = lambda row: json.dumps([*map(float, row)])
    fill(postgres_url, type, ROWS, (lambda row: [*map(float, row)]) if "[]" in type else as_json)
    vectors = ingested(tmp_path, products=postgres_url, products_query="SELECT * FROM p")
    expected = without_gap(VECTORS) + (0 if type == "JSONB" else -0.0)  # a JSONB has no zero below zero
    assert same_bits(without_gap(vectors), expected)


# --- what is wrong with a row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [source for source in SOURCES if source is not parquet_fixed])
@pytest.mark.parametrize(
    "vector, words",
    [
        (VECTORS[1][:-1], f"holds {WIDTH - 1} numbers, where {len(ITEMS) - 2} rows hold {WIDTH} numbers"),
        (np.append(VECTORS[1], 1), f"holds {WIDTH + 1} numbers"),
        (np.where(np.arange(WIDTH) == 5, np.nan, VECTORS[1]), "a number that is not finite"),
        (np.where(np.arange(WIDTH) == 5, np.inf, VECTORS[1]), "a number that is not finite"),
        (np.where(np.arange(WIDTH) == 5, 1e300, VECTORS[1].astype(float)), "a number that is not finite"),
    ],
    ids=["short", "long", "nan", "infinite", "beyond 32 bits"],
)
def test_one_bad_vector_is_refused_with_its_row(source, vector, words, tmp_path):
    rows = [vector if item == 2 else row for item, row in zip(ITEMS, ROWS)]
    with pytest.raises(IngestError) as refused:
        ingested(tmp_path, **source(tmp_path, rows))
    message = str(refused.value)
    assert words in message and "column 'vector'" in message and "a row without a vector is normal" in message
    place = "row" if source in (parquet_list, parquet_float, pandas_parquet, excel) else "line"
    line = {parquet_list: 2, parquet_float: 2, pandas_parquet: 2, json_lines: 2, sqlite: 2}.get(source, 3)
    if source is not csv_numpy:  # a vector takes several lines there
        assert f"{place} {line}:" in message
    assert not (tmp_path / "in").exists()


def test_a_word_among_vectors_is_refused_and_an_empty_list_is_unknown(tmp_path):
    table = csv_json(tmp_path, ROWS)
    lines = table["products"].read_text().splitlines()
    table["products"].write_text("\n".join([*lines[:5], "5,there is no picture of it", *lines[6:]]) + "\n")
    with pytest.raises(IngestError, match="line 6: .*'there is no picture of it', which is no list"):
        ingested(tmp_path, **table)
    table["products"].write_text("\n".join([*lines[:5], "5,[]", *lines[6:]]) + "\n")
    assert np.isnan(ingested(tmp_path, **table)[4]).all()


def test_files_of_one_table_agree(tmp_path):
    first = csv_json(tmp_path, ROWS)["products"]
    second = tmp_path / "q.jsonl"
    second.write_text(json.dumps({"item_id": 99, "vector": VECTORS[0].tolist()}) + "\n")
    ingest(log(tmp_path), tmp_path / "in", products=[first, second], **QUIET)
    assert same_bits(in_order(tmp_path)[-1], VECTORS[0])
    second.write_text(json.dumps({"item_id": 99, "vector": VECTORS[0][:20].tolist()}) + "\n")
    with pytest.raises(IngestError, match=f"{WIDTH} numbers in each row of .*p.csv, and 20 numbers in each row of .*q"):
        ingest(log(tmp_path), tmp_path / "in", products=[first, second], **QUIET)


@pytest.mark.parametrize(
    "texts",
    [
        ["36 37 38 39 40 41 42 43"] * 12,
        ["[1, 2, 3]"] * 12,
        [str([*range(1000 + item, 1010 + item)]) for item in ITEMS],  # other products
        ['["1", "2", "3", "4", "5", "6", "7", "8"]'] * 12,
        ["2024-01-02 03:04:05.5"] * 12,
        ["1,2,3,4,5,6,7,8"] * 12,
        [str([0.5] * (5 + item)) for item in ITEMS],  # of many lengths
        [f"a title with {item} 0.5 1.5 2.5 3.5 4.5 5.5 6.5 7.5" for item in ITEMS],
    ],
)
def test_other_text_stays_text(texts, tmp_path):
    rows = [(item, words) for item, words in zip(ITEMS, texts)]
    with open(tmp_path / "p.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("item_id", "vector"), *rows])
    ingest(log(tmp_path), tmp_path / "in", products=tmp_path / "p.csv", **QUIET)
    written = duckdb.sql(f"SELECT item_id, vector FROM '{tmp_path}/in/products.parquet' ORDER BY 1").fetchall()
    assert written == rows


def test_a_title_is_never_a_vector(tmp_path):
    table = csv_json(tmp_path, ROWS)
    ingest(log(tmp_path), tmp_path / "in", **table, product_columns={"title": "vector"}, **QUIET)
    written = load_table(tmp_path / "in/products.parquet")
    assert isinstance(written["title"][0], str)


# --- through the pipeline --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A log, a products file and a users file with vectors, and the model of them."
    folder = tmp_path_factory.mktemp("dense")
    titles = pa.array([f"thing {item}" for item in ITEMS])
    vectors = pa.array([None if row is None else row.tolist() for row in ROWS], pa.list_(pa.float32()))
    pq.write_table(pa.table({"item_id": ITEMS, "title": titles, "vector": vectors}), folder / "p.parquet")
    tastes = [{"user_id": user, "taste": [user + place / 8 for place in range(8)]} for user in (*range(1, 25), 900)]
    (folder / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tastes))
    ingest(log(folder), folder / "in", products=folder / "p.parquet", users=folder / "u.jsonl", **QUIET)
    features = build_features(folder / "in", folder / "features")
    small = {"factors": 2, "iterations": 1, "next_model": "none", "progress": False}
    train_bundle(features, folder / "models", publish_it=True, **small)
    return folder, features


def test_features_and_bundle_hold_the_same_vectors(shop):
    folder, features = shop
    rows = [ITEMS.index(item) for item in features.items.ids]
    bundle = open_bundle(folder / "models", verify=True)
    for columns in (features.item_columns, bundle.item_columns):
        assert columns["vector"].dtype == np.float32
        assert np.array_equal(columns["vector"], VECTORS[rows], equal_nan=True)
    for columns in (features.user_columns, bundle.user_columns):
        expected = features.users.ids[:, None] + np.arange(8) / 8
        assert np.array_equal(columns["taste"], expected.astype(np.float32))


def test_cold_rows_keep_their_vectors(shop):
    bundle = open_bundle(shop[0] / "models")
    assert bundle.cold_items.types["vector"] == "FLOAT[]"
    attributes = bundle.told(COLD)
    assert same_bits(attributes["vector"], VECTORS[ITEMS.index(COLD)]) and attributes["title"] == "thing 12"
    assert bundle.cold_users.get(900)["taste"].tolist() == [900 + place / 8 for place in range(8)]


def test_nothing_filters_or_groups_by_a_vector(shop):
    folder, features = shop
    model = ReadyModel(open_bundle(folder / "models")).prepare()
    assert "vector" not in model.catalogue.attributes.kinds and "taste" not in model.user_attributes.kinds
    with pytest.raises(ProductRecsError, match=f"'vector' holds lists of {WIDTH} numbers, and nothing can be filtered"):
        model.catalogue.attributes.match("vector", [1])
    with pytest.raises(EvaluateError, match="'taste': lists of numbers make no groups"):
        user_segments(features, np.arange(3), segment_by="taste")
    with pytest.raises(IngestError, match="'vector' holds lists of numbers, and no product is excluded"):
        tables = {"products": folder / "p.parquet", "exclude_items": [{"vector": "*"}]}
        ingest(log(folder), folder / "other", **tables, **QUIET)


def test_the_service_answers_with_vectors_in_its_files(shop):
    settings = Settings(models_dir=shop[0] / "models", log_level="ERROR", auth="off", database_url="")
    shown, paths = f"[{WIDTH} numbers]", ("recommend/900", "similar/1", f"similar/{COLD}", "new", "new?user_id=1")
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        for item, words in ((1, shown), (COLD, shown), (GAP, None)):
            answer = client.get(f"/items/{item}")
            assert answer.status_code == 200 and answer.json()["attributes"]["vector"] == words, answer.text
        answer = client.get("/recommend/1", params={"detail": "true"})
        listed = answer.json()["items"]
        assert {item["attributes"]["vector"] for item in listed} <= {shown, None} and len(listed) > 0
        for path in (*paths, "items?query=thing"):
            assert client.get(f"/{path}").status_code == 200, path
        body = {"events": [{"item_id": COLD, "event": "view"}]}
        assert client.post("/recommend", json=body).status_code == 200
        for filters in ({"where": {"vector": [1]}}, {"max_per": {"vector": 1}}):
            refused = client.post("/recommend", json={"users": [1], "filters": filters})
            assert refused.status_code == 422 and "nothing can be filtered by it" in refused.text, refused.text


def test_init_says_which_columns_are_vectors(shop):
    folder, _ = shop
    notes = propose([str(folder / "log.csv")], products=str(folder / "p.parquet"), users=str(folder / "u.jsonl")).notes
    assert any("products: vectors" in note and "stand in vector." in note for note in notes)
    assert any("users: vectors" in note and "stand in taste." in note for note in notes)


# --- large -----------------------------------------------------------------------------------------------------------


def test_a_large_column_is_written_and_read_without_an_object_for_each_number(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(100_000, 96)).astype(np.float32)
    vectors[::7] = np.nan
    began = time.process_time()
    save_table(tmp_path / "t.parquet", {"item_id": np.arange(len(vectors)), "vector": vectors})
    back = load_table(tmp_path / "t.parquet")
    assert time.process_time() - began < 20
    assert np.array_equal(back["vector"], vectors, equal_nan=True)
