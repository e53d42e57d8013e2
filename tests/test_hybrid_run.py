"""`product-recs run` with a model that places new products: what is trained, and what its report says in words."""

import html
import json
import re

import pytest
from support import call, fresh_project, only_the_jobs

from product_recs.bundle.files import read_manifest
from product_recs.bundle.opening import open_bundle

RUNS = {
    "named": ("-p", "model", "ALS + content", "-p", "next_model", "none"),
    "auto": ("-p", "model", "ALS", "-p", "next_model", "ALS + habits", "-p", "content", "auto"),
    "none": ("-p", "model", "ALS", "-p", "next_model", "none"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = fresh_project(tmp_path_factory.mktemp("placing"))
    only_the_jobs(root)
    with (root / "data/products.csv").open("a") as file:  # two that nobody has
        columns = (root / "data/products.csv").read_text().splitlines()[0].split(",")
        for item in (900001, 900002):
            words = {"item_id": str(item), "title": "Dark roast coffee", "category": "coffee"}
            file.write(",".join(words.get(name, "") for name in columns) + "\n")
    return root


@pytest.mark.parametrize("name", RUNS)
def test_a_run_places_new_products_and_says_so(project, name):
    done = call(project, "product-recs", "run", "--name", name, "--publish", "-p", "factors", "8", *RUNS[name])
    assert done.returncode == 0, done.stderr + done.stdout
    metrics = json.loads((project / "reports" / name / "metrics.json").read_text())["03_train"]
    page = (project / "reports" / name / "03_train.html").read_text()
    words = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
    bundle = open_bundle(project / "models", metrics["version"])
    places = {task: model.places_items for task, model in bundle.models.items()}
    if name == "none":
        assert not any(places.values()) and "not placed" in words and metrics["places_new_products"] == {}
        return
    if name == "named":
        assert metrics["models"] == {"discovery": "ALS + content"}
    else:  # both tasks were judged with new products among what people took, and the notes tell the outcome
        said = [note for note in metrics["notes"] if "with new products among what people took" in note]
        assert len(said) == 2 and all("placed" in note or "kept as it was" in note for note in said)
        assert all(note.split(";")[0] in words for note in said)
    for task, place in places.items():
        assert place == ("content" in metrics["models"][task])
    if any(places.values()):
        assert "New products are placed by ALS + content: 2 products" in words and "category" in words
        assert "How much descriptions count" in words and "item_evidence" in words
        [parameters] = metrics["places_new_products"].values()
        assert set(parameters) >= {"profile", "level", "item_evidence", "user_evidence", "attributes"}
    manifest = read_manifest(project / "models" / metrics["version"])
    assert {task: facts["name"] for task, facts in manifest["models"].items() if "name" in facts} == metrics["models"]
