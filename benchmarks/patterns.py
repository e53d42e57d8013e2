"""How are the largest singular vectors of a sparse matrix found the quickest, and how exactly?

    python benchmarks/patterns.py FOLDER [--patterns 256] [--ways krylov-16,arpack]

FOLDER holds train.parquet with the columns user_id and item_id. The matrix is the one that the spectral filters take
apart. A way is `krylov-N` (this project's, with N products), `subspace-N` (subspace iteration with N passes, as
randomised SVDs have it), `arpack` (scipy's svds) or `eigsh` (of the matrix times its transpose). Printed are the
seconds of the clock and of the processor, and the energy: the sum of the squared singular values that the vectors hold.
BLAS has one thread.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from quality import read_pairs, snapshot_of
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, eigsh, svds

from product_recs.core.kernels import one_blas_thread
from product_recs.models.spectral import right_singular, scaled_pairs


def subspace(matrix: csr_matrix, count: int, passes: int) -> np.ndarray:
    size = min(count + count // 8 + 8, *matrix.shape)
    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], size), dtype=np.float32)
    for _ in range(passes):
        basis = np.linalg.qr(matrix.T @ (matrix @ basis))[0]
    image = matrix @ basis
    return basis @ np.linalg.eigh(image.T @ image)[1][:, ::-1][:, :count]


def by_eigsh(matrix: csr_matrix, count: int) -> np.ndarray:
    turned, size = csr_matrix(matrix.T), matrix.shape[0]
    gram = LinearOperator((size, size), matvec=lambda vector: matrix @ (turned @ vector), dtype=np.float32)
    values, vectors = eigsh(gram, k=count, v0=np.random.default_rng(0).random(size).astype(np.float32))
    return (turned @ vectors) / np.sqrt(values).astype(np.float32)


def vectors_of(way: str, matrix: csr_matrix, count: int) -> np.ndarray:
    "The right singular vectors (items, count) by one of the ways."
    name, _, number = way.partition("-")
    if name == "krylov":
        return right_singular(matrix, count, int(number))[0]
    if name == "subspace":
        return subspace(matrix, count, int(number))
    if way == "arpack":
        return svds(matrix, k=count, solver="arpack", v0=np.ones(min(matrix.shape), np.float32))[2].T
    if way == "eigsh":
        return by_eigsh(matrix, count)
    raise SystemExit(f"--ways: unknown {way}; there are krylov-N, subspace-N, arpack and eigsh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patterns", type=int, default=256)
    parser.add_argument("--ways", default="krylov-8,krylov-12,krylov-16,subspace-5,arpack,eigsh", help="by commas")
    options = parser.parse_args()
    pairs = read_pairs(options.folder / "train.parquet")
    users, items = (np.unique(pairs[column], return_inverse=True)[1] for column in ("user_id", "item_id"))
    matrix = scaled_pairs(snapshot_of(csr_matrix((np.ones(len(pairs), np.float32), (users, items)))))
    print(f"| {options.patterns} patterns by | seconds | of the processor | energy |\n|---|---|---|---|")
    for way in options.ways.split(","):
        clock, processor = time.perf_counter(), time.process_time()
        with one_blas_thread():
            vectors = vectors_of(way, matrix, options.patterns)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        energy = np.sum((matrix @ vectors) ** 2, dtype=np.float64)
        print(f"| {way} | {clock:.1f} | {processor:.1f} | {energy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
