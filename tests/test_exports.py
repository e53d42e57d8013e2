"""Many exports of one shop, each from `init` to a served list: nobody renames a column or converts a date."""

import os
from pathlib import Path

import exports
import pytest
import yaml
from fastapi.testclient import TestClient

from product_recs.api import create_app
from product_recs.core.settings import Settings
from product_recs.features import ensure_features
from product_recs.ingest import ensure_ingested, open_ledger
from product_recs.jobs.cli import main, read_parameters
from product_recs.train import train_bundle


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project: what `init` and the ingest call the root."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(tmp_path))
    return tmp_path


def test_the_shop_is_the_same_each_time():
    sales = exports.shop()
    assert sales == exports.shop() and len(sales) > 1500 and len({sale.user for sale in sales}) == exports.USERS
    assert sum(sale.user % 4 == sale.item % 4 for sale in sales) > 0.85 * len(sales)


@pytest.mark.parametrize("name", exports.EXPORTS)
def test_from_an_export_to_a_served_list(name, project, capsys):
    export = exports.EXPORTS[name](project)
    assert main(["init", "--source", *export.sources, *export.options, "--out", "shop.yaml"]) == 0
    said = capsys.readouterr().out
    assert f"Written to {project}/shop.yaml" in said and "not found" not in said
    with open(project / "shop.yaml", "a") as file:
        file.writelines(f"{line}\n" for line in export.more)
    parameters = read_parameters("shop.yaml")
    lines = [line for line in (project / "shop.yaml").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(parameters) <= 6, lines
    folder = ensure_ingested("shop", **parameters)
    ledger = open_ledger(folder)
    said += " ".join([*ledger.warnings, *ledger.reasons])
    for words in export.says:
        assert words in said, said
    features = ensure_features("shop")
    assert features.split, "the times were understood, so the log has a later part to judge by"
    bundle = project / "models"
    version, _ = train_bundle(features, bundle, model="weighted ALS", progress=False)  # the log is dense
    with TestClient(
        create_app(Settings(models_dir=project / "models", database_url="", log_level="ERROR", auth="off")),
        base_url="http://localhost",
    ) as client:
        good = []
        for number in range(0, exports.USERS, 24):
            answer = client.get(f"/recommend/{export.user(number)}?n=5&include_seen=false")
            assert answer.headers["X-Model-Version"] == version and answer.headers["X-Recommendation-Source"] == (
                "personalised"
            ), answer.headers
            listed = [str(item) for item in answer.json()["recommendations"]]
            own = {export.item(item) for item in range(4 * exports.PER_KIND) if item % 4 == number % 4}
            good.append(len(own & set(listed)) / 5)
            assert len(listed) == 5 and not {*export.never} & {*listed}
        assert sum(good) / len(good) > 0.8, good
    assert os.getcwd() != project and Path("shop.yaml").exists() is False


def test_a_file_of_parameters_is_valid_yaml_with_the_command_that_wrote_it(project, capsys):
    exports.EXPORTS["european"](project)
    assert main(["init", "--source", "verkauf.csv", "--out", "shop.yaml"]) == 0
    text = (project / "shop.yaml").read_text()
    assert text.startswith("# written by: product-recs init --source verkauf.csv --out shop.yaml\n")
    assert yaml.safe_load(text)["columns"]["user_id"] == "Kundennummer"
    assert main(["init", "--source", "verkauf.csv", "--out", "shop.yaml"]) == 1 and "--force" in capsys.readouterr().err
