"""benchmarks/sequence.py as a user starts it: a log of sequences in, a page out; and what the service answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent


def run(folder, *options):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/sequence.py", folder, "--out", folder / "out", *options],
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_who_goes_round_a_circle_goes_on(tmp_path):
    "What comes next is the next item of forty, from wherever somebody began, and popularity knows nothing of it."
    rng, rows = np.random.default_rng(0), []
    for user in range(150):
        start, length = rng.integers(40), rng.integers(5, 9)
        rows += [(user * 3, 1000 + (start + step) % 40, step) for step in range(length)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "position"]).sample(frac=1, random_state=1)
    log.to_parquet(tmp_path / "interactions.parquet")
    done = run(tmp_path, "--users", "60", "--served")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"out/sequence-{tmp_path.name}.json").read_text())
    figures = {row["model"]: row["ndcg"] for row in result["rows"]}
    best = max(value for name, value in figures.items() if name.startswith("transitions (step"))
    assert best > 0.95 > 0.5 > figures["popularity"] and result["chosen_on"] == 60 and not result["published"]
    served = [row["served"] for row in result["rows"] if "served" in row]
    assert len(served) == 4 and all(words.startswith("150 of 150") for words in served)
    page = (tmp_path / f"out/sequence-{tmp_path.name}.md").read_text()
    assert "| transitions (step" in page and "S3-Rec" not in page and page.strip() in done.stdout


def test_a_folder_without_an_order_is_refused(tmp_path):
    assert "the file is missing" in run(tmp_path).stderr
    pd.DataFrame({"user_id": [1], "item_id": [2]}).to_parquet(tmp_path / "interactions.parquet")
    done = run(tmp_path)
    assert done.returncode and "no column position; it has user_id, item_id" in done.stderr
