"""The promotion gate with real bundles: what is better goes live, what is worse or broken does not, a person may
overrule it on the record, and a gate that dies has changed nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from support import ROOT, call, fresh_project, only_the_jobs, with_texts

from product_recs.bundle.files import current_version, previous_versions, publish, read_manifest, verify_files
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.versions import version_facts
from product_recs.core.settings import Settings
from product_recs.features import build_features
from product_recs.ingest import ingest
from product_recs.jobs.cli import main
from product_recs.jobs.criteria import ASK, HOLD, Criteria, GoldenUser
from product_recs.jobs.gate import HELD, NEEDS_A_PERSON, PROMOTED, gate, settle
from product_recs.jobs.registry import Registry
from product_recs.jobs.tracking import connected, is_installed, tracking_of
from product_recs.train import train_bundle

QUICK = Criteria(bootstrap=200, sample=40)
LOG, PRODUCTS = ROOT / "data/interactions.csv", ROOT / "data/products.csv"


def features_in(root, name, log=LOG, products=PRODUCTS, **more):
    "A run of that name as `product-recs run` leaves it."
    folder = root / "data" / "processed" / name
    ingest(log, folder, products=products, progress=False)
    return build_features(folder, folder / "features", **more)


def trained(root, features, **parameters):
    "A bundle that is not live."
    given = {"factors": 16, "iterations": 6, "next_model": "buy again", "seed": 0, "publish_it": False}
    return train_bundle(features, root / "models", progress=False, num_threads=1, **given | parameters)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Last night's model, which knows all but the last week, and three of tonight."
    root = tmp_path_factory.mktemp("shop")
    (root / "settings.ini").touch()
    before = os.environ.get("PRODUCT_RECS_ROOT")
    os.environ["PRODUCT_RECS_ROOT"] = str(root)
    log = pd.read_csv(LOG)
    log[log.timestamp < "2026-06-23"].to_csv(root / "yesterday.csv", index=False)
    champion = trained(root, features_in(root, "shop", root / "yesterday.csv"), factors=4)
    features = features_in(root, "shop")  # tonight, under the same name
    same, better = (trained(root, features, factors=factors) for factors in (4, 24))
    worse = trained(root, features, model="recent popularity")
    publish(root / "models", champion)
    yield SimpleNamespace(root=root, champion=champion, same=same, better=better, worse=worse, features=features)
    if before is None:
        del os.environ["PRODUCT_RECS_ROOT"]
    else:
        os.environ["PRODUCT_RECS_ROOT"] = before


@pytest.fixture
def shop(made, tmp_path, monkeypatch):
    "The same with a folder of models of its own."
    shutil.copytree(made.root / "models", tmp_path / "models")
    monkeypatch.setenv("PRODUCT_RECS_DATABASE_URL", "")
    return SimpleNamespace(**{**vars(made), "models": tmp_path / "models"})


def judged(shop, challenger, criteria=QUICK, **more):
    return settle(gate(challenger, models_dir=shop.models, criteria=criteria, progress=False, **more), shop.models)


def finding(result, name, what=""):
    return next(criterion for criterion in result.findings if criterion.name == name and what in (criterion.what, ""))


def unchanged(shop):
    assert current_version(shop.models) == shop.champion and previous_versions(shop.models) == []
    open_bundle(shop.models, verify=True)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_the_recipe_of_yesterday_on_the_data_of_today_goes_live(shop):
    assert read_manifest(shop.models / shop.same)["data"]["fingerprint"] != read_manifest(shop.models / shop.champion)[
        "data"
    ]["fingerprint"]
    result = judged(shop, shop.same)
    assert result.verdict == PROMOTED and result.exit_code == 0 and result.published, result.reasons
    assert result.run == "shop" and not result.differ and "only the data are newer" in result.reasons[0]
    assert finding(result, "comparison", "discovery").value == finding(result, "comparison", "discovery").champion
    assert current_version(shop.models) == shop.same and previous_versions(shop.models) == [shop.champion]


def test_a_better_model_is_promoted_and_live(shop):
    result = judged(shop, shop.better)
    assert result.verdict == PROMOTED and current_version(shop.models) == shop.better
    assert finding(result, "comparison", "discovery").low > 0 and "significantly better" in result.reasons[0]
    assert result.differ["ALS: factors"] == (24, 4)
    record = read_manifest(shop.models / shop.better)["metrics"]["gate"]
    assert record == json.loads(json.dumps(result.record)) and record["against"] == shop.champion
    assert record["tasks"]["discovery"]["low"] > 0 and record["at"].endswith("+00:00")
    verify_files(shop.models / shop.better)
    [facts] = [facts for facts in version_facts(shop.models) if facts["version"] == shop.better]
    assert facts["mark"] == "live" and facts["gate"]["verdict"] == PROMOTED


def test_a_worse_model_is_held(shop):
    result = judged(shop, shop.worse)
    assert result.verdict == HELD and result.exit_code == 4 and not result.published
    broken = {criterion.name for criterion in result.findings if criterion.follows == HOLD}
    assert {"comparison", "coverage"} <= broken and "significantly worse" in result.reasons[0]
    unchanged(shop)
    assert [facts["mark"] for facts in version_facts(shop.models) if facts["version"] == shop.worse] == ["held"]


def test_a_model_with_a_task_less_is_held(shop, made):
    version = trained(made.root, made.features, next_model="none")
    shutil.move(made.root / "models" / version, shop.models / version)
    result = judged(shop, version)
    assert result.verdict == HELD and "has no model for it" in finding(result, "tasks").sentence
    unchanged(shop)


def cut(path):
    with open(path / "als.item_factors.npy", "r+b") as file:
        file.truncate(300)
    return "als.item_factors.npy"


def flipped(path):
    raw = bytearray((path / "als.item_factors.npy").read_bytes())
    raw[-3] ^= 1
    (path / "als.item_factors.npy").write_bytes(raw)
    return "sha256"


def without_a_file(path):
    (path / "items.parquet").unlink()
    return "items.parquet"


def not_a_number(path):
    "Written in good order, hashes and all."
    import hashlib

    file = path / "als.item_factors.npy"
    factors = np.load(file)
    factors[3, 2] = np.nan
    np.save(file, factors)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    verify_files(path)
    return "1 of the 2,880 numbers of item_factors are not finite"


@pytest.mark.parametrize("harm", [cut, flipped, without_a_file, not_a_number])
def test_a_broken_model_is_held_and_the_old_one_stays(shop, harm):
    words = harm(shop.models / shop.better)
    result = judged(shop, shop.better)
    assert result.verdict == HELD and words in result.reasons[0], result.reasons
    assert read_manifest(shop.models / shop.better)["metrics"]["gate"]["verdict"] == HELD
    unchanged(shop)


def test_a_model_whose_manifest_is_gone_to_pieces_is_held(shop):
    (shop.models / shop.better / "manifest.json").write_text('{"format": 2')
    result = judged(shop, shop.better)
    assert result.verdict == HELD and "manifest.json" in result.reasons[0]
    unchanged(shop)


def test_a_champion_that_is_broken_is_for_a_person(shop):
    cut(shop.models / shop.champion)
    result = judged(shop, shop.better)
    assert result.verdict == NEEDS_A_PERSON and "cannot be compared with" in result.reasons[0]
    assert current_version(shop.models) == shop.champion


def test_too_few_users_are_for_a_person(shop):
    result = judged(shop, shop.better, Criteria(bootstrap=50, sample=5, min_users=5000))
    assert result.verdict == NEEDS_A_PERSON and result.exit_code == 3
    assert all("too few users" in reason for reason in result.reasons)
    unchanged(shop)
    assert [facts["mark"] for facts in version_facts(shop.models) if facts["version"] == shop.better] == ["waits"]


def test_lists_that_became_short_hold_a_model(shop, made, tmp_path):
    products = pd.read_csv(PRODUCTS)
    products.available = products.index < 8
    products.to_csv(tmp_path / "products.csv", index=False)
    features = features_in(tmp_path, "shop", products=tmp_path / "products.csv")
    version = trained(made.root, features, factors=24)
    shutil.move(made.root / "models" / version, shop.models / version)
    result = judged(shop, version, features=features)
    assert finding(result, "shortfall", "discovery").value > 0.9 and finding(result, "shortfall").follows == HOLD
    assert result.verdict == HELD
    unchanged(shop)


def test_without_a_champion_popularity_is_the_measure(shop):
    (shop.models / "current").unlink()
    result = judged(shop, shop.better)
    assert result.verdict == PROMOTED and result.champion is None and current_version(shop.models) == shop.better
    (shop.models / "current").unlink()
    few = judged(shop, shop.better, Criteria(bootstrap=50, min_users=5000))
    assert few.verdict == NEEDS_A_PERSON and "too few users" in few.reasons[0]


def test_a_model_that_popularity_beats_is_for_a_person(tmp_path):
    "A shop in which everybody takes the same few things, and a model that learned nothing."
    rng, rows = np.random.default_rng(0), []
    for user in range(300):
        for item in rng.choice(40, 12, replace=False, p=np.r_[np.full(8, 0.1), np.full(32, 0.2 / 32)]):
            rows.append((user, item, f"2026-0{rng.integers(1, 7)}-{rng.integers(10, 28)}"))
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    log.to_csv(tmp_path / "log.csv", index=False)
    features = features_in(tmp_path, "shop", tmp_path / "log.csv", products="")
    version = trained(tmp_path, features, factors=1, iterations=1, regularization=1e6, next_model="none", seed=3)
    result = gate(version, models_dir=tmp_path / "models", criteria=QUICK, features=features, progress=False)
    against = finding(result, "popularity", "discovery")
    assert against.high < 0 and against.follows == ASK, against
    assert result.verdict == NEEDS_A_PERSON and "worse than popularity" in result.reasons[0]


# --- golden users -----------------------------------------------------------------------------------------------------


def test_golden_users_are_asked_through_the_real_answer(shop, tmp_path):
    with_rules = {"rules_file": str(tmp_path / "rules.yaml")}
    (tmp_path / "rules.yaml").write_text("rules:\n- {name: first, pin: 1, items: [133]}\n")
    golden = Criteria(bootstrap=50, sample=5, golden_users=(GoldenUser(1, must=(133,)), GoldenUser(1, must_not=(105,))))
    without = gate(shop.same, models_dir=shop.models, criteria=golden, progress=False)
    assert without.verdict == HELD and "missing" in without.reasons[0] and "(133)" in without.reasons[0]
    result = gate(shop.same, models_dir=shop.models, criteria=golden, serving=with_rules, progress=False)
    assert result.verdict == PROMOTED and result.golden[0].items[0] == 133
    turned = Criteria(bootstrap=50, sample=5, golden_users=(GoldenUser(1, must_not=(133,)),))
    held = judged(shop, shop.same, turned, serving=with_rules)
    assert held.verdict == HELD and "must not be there" in held.reasons[0]
    unchanged(shop)


def test_a_shop_whose_ids_are_texts(tmp_path):
    log, products = (with_texts(path, tmp_path / path.name) for path in (LOG, PRODUCTS))
    features = features_in(tmp_path, "shop", log, products)
    champion, challenger = (trained(tmp_path, features, factors=factors) for factors in (4, 16))
    publish(tmp_path / "models", champion)
    golden = (GoldenUser("u 1", must_not=("i/105",)), GoldenUser("u 0", must_not=("i/105",)))
    options = {"models_dir": tmp_path / "models", "features": features, "progress": False}
    result = gate(challenger, criteria=Criteria(bootstrap=50, sample=20, golden_users=golden), **options)
    assert [bool(user.unknown) for user in result.golden] == [False, True] and len(result.golden[0].items) == 10
    assert result.verdict == NEEDS_A_PERSON and result.reasons == (
        "Golden user u 0 cannot be judged: the model does not know the user.",
    )


def test_a_log_without_times_is_judged_by_hidden_items(tmp_path):
    pd.read_csv(LOG).drop(columns="timestamp").to_csv(tmp_path / "log.csv", index=False)
    features = features_in(tmp_path, "shop", tmp_path / "log.csv")
    champion, challenger = (trained(tmp_path, features, factors=factors, next_model="none") for factors in (4, 16))
    publish(tmp_path / "models", champion)
    result = gate(challenger, models_dir=tmp_path / "models", criteria=QUICK, features=features, progress=False)
    assert [criterion.what for criterion in result.findings if criterion.name == "comparison"] == ["discovery"]
    assert not finding(result, "cold_users").judged and result.verdict in (PROMOTED, NEEDS_A_PERSON)


def test_a_model_of_unknown_interactions_is_for_a_person(shop):
    "The run is gone, so nothing can be fitted again; what can be looked at is."
    manifest = json.loads((shop.models / shop.better / "manifest.json").read_text())
    manifest["data"]["fingerprint"] = "gone"
    (shop.models / shop.better / "manifest.json").write_text(json.dumps(manifest))
    result = judged(shop, shop.better)
    assert result.verdict == NEEDS_A_PERSON and "Nothing could be judged: no run in" in result.reasons[0]
    assert finding(result, "integrity").judged and finding(result, "shortfall").judged
    unchanged(shop)


# --- a person ---------------------------------------------------------------------------------------------------------


def test_a_person_overrules_the_gate_on_the_record(shop, capsys):
    options = ["--models-dir", str(shop.models)]
    judged(shop, shop.worse)
    for words in (["publish", shop.worse], ["publish", shop.worse, "--by", "Ada"], ["rollback", shop.worse]):
        assert main([*words, *options]) == 1
        said = capsys.readouterr().err
        assert "was held by the gate" in said and "--by NAME --reason TEXT" in said
    assert main(["publish", shop.worse, "--by", "NAME", "--reason", "TEXT", *options]) == 1  # as it was printed
    unchanged(shop)
    assert main(["models", *options]) == 0
    listed = capsys.readouterr().out
    assert "held by the gate: Discovery" in listed and "--by NAME --reason TEXT" in listed
    assert main(["publish", shop.worse, "--by", "Ada", "--reason", "Easter: only these are left", *options]) == 0
    assert current_version(shop.models) == shop.worse
    [record] = read_manifest(shop.models / shop.worse)["metrics"]["overrides"]
    assert record["by"] == "Ada" and record["reason"] == "Easter: only these are left" and record["verdict"] == HELD
    assert record["at"] and "significantly worse" in record["against"][0]
    capsys.readouterr()
    assert main(["models", *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "published by Ada, " in shown and "the gate had held it: Easter: only these are left" in shown
    verify_files(shop.models / shop.worse)
    assert main(["rollback", *options]) == 0 and current_version(shop.models) == shop.champion
    assert main(["rollback", shop.worse, *options]) == 1  # it was live, and was taken back


def test_nothing_speaks_against_a_promoted_model(shop):
    result = gate(shop.better, models_dir=shop.models, criteria=QUICK, progress=False)
    assert not settle(result, shop.models, publish_it=False).published
    unchanged(shop)
    assert main(["publish", shop.better, "--models-dir", str(shop.models)]) == 0
    assert "overrides" not in read_manifest(shop.models / shop.better)["metrics"]


def test_a_broken_model_is_published_by_nobody(shop, capsys):
    cut(shop.models / shop.better)
    judged(shop, shop.better)
    words = ["publish", shop.better, "--by", "Ada", "--reason", "now", "--models-dir", str(shop.models)]
    assert main(words) == 1 and "copy is incomplete" in capsys.readouterr().err
    assert "overrides" not in read_manifest(shop.models / shop.better)["metrics"]
    unchanged(shop)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_judges_publishes_and_holds(tmp_path, monkeypatch):
    root = fresh_project(tmp_path)
    monkeypatch.setenv("PRODUCT_RECS_ROOT", str(root))
    monkeypatch.setenv("PRODUCT_RECS_MLFLOW", "on" if is_installed() else "off")
    only_the_jobs(root)
    features = features_in(root, "shop")
    champion = trained(root, features, factors=4)
    publish(root / "models", champion)
    better = trained(root, features)
    golden = "[{user: 1, must_not: [105], note: tea}]"
    (root / "gate.yaml").write_text(f"bootstrap: 200\nsample: 40\ngolden_users: {golden}\n")
    done = call(root, "product-recs", "gate", "--criteria", "gate.yaml", "--quiet")
    assert done.returncode == 0 and done.stdout.startswith(f"Promoted: model {better} against {champion}"), done.stderr
    assert current_version(root / "models") == better
    if is_installed():
        with connected(tracking := tracking_of(Settings())) as client:
            live = Registry(client, tracking).find("@champion")
            assert live.version == better and live.tags["gate.verdict"] == PROMOTED
            assert live.tags["gate.against"] == champion
            [run] = client.search_runs(
                [client.get_experiment_by_name("product-recs").experiment_id], "attributes.run_name = 'gate'"
            )
            assert run.data.tags["kind"] == "gate" and "gate/exit_code" in run.data.metrics
            files = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "reports")}
            assert files == {"gate.html", "metrics.json"}
    worse = trained(root, features, model="recent popularity")
    done = call(root, "product-recs", "gate", "--criteria", "gate.yaml", "--quiet", "--dry-run")
    assert done.returncode == 4 and done.stdout.startswith(f"Held: model {worse}"), done.stdout + done.stderr
    assert f"product-recs publish {worse} --by NAME --reason TEXT" in done.stderr
    page = (root / "reports/gate/gate.html").read_text()
    metrics = json.loads((root / "reports/gate/metrics.json").read_text())["gate"]
    assert metrics["verdict"] == HELD and metrics["exit_code"] == 4 and metrics["criteria"]["sample"] == 40
    head = page[: page.index("How this notebook works")] if "How this notebook works" in page else page
    assert "Held" in head and "significantly worse" in head and "data:image/png" in page and "Golden user 1" in page
    assert "✗ held" in page and "not finite" not in head
    assert current_version(root / "models") == better and "This was a dry run" in head
    assert "gate" not in read_manifest(root / "models" / worse)["metrics"]  # nothing was written
    again = call(root, "product-recs", "gate", "--challenger", better)
    assert again.returncode == 1 and "is live already" in again.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("guardrails: {covrage: {most_loss: 0.1}}", "did you mean 'coverage'?"),
        ("tolerance: lots", "tolerance='lots'"),
        ("golden_users: [{user: 1, must: [1], mustnt: [2]}]", "user 1: there is no key 'mustnt'; did you mean"),
        ("k: [", "not readable as YAML"),
    ],
)
def test_a_mistake_in_the_criteria_ends_the_command_before_anything_is_fitted(shop, tmp_path, capsys, text, says):
    (tmp_path / "gate.yaml").write_text(text)
    words = ["gate", "--challenger", shop.better, "--criteria", str(tmp_path / "gate.yaml")]
    assert main([*words, "--models-dir", str(shop.models)]) == 1
    said = capsys.readouterr().err
    assert says in said and "gate.yaml" in said
    assert "gate" not in read_manifest(shop.models / shop.better)["metrics"]
    unchanged(shop)


# --- a gate that dies -------------------------------------------------------------------------------------------------

CHILD = """
import sys
from product_recs.jobs.criteria import Criteria
from product_recs.jobs import gate as gates
if sys.argv[3] == "before": gates.publish = lambda *given: __import__("os")._exit(9)
print("begins", flush=True)
result = gates.gate(sys.argv[1], models_dir=sys.argv[2], criteria=Criteria(bootstrap=200, sample=40), progress=False)
print(gates.settle(result, sys.argv[2]).verdict, flush=True)
"""


def child(shop, when="never"):
    words = [sys.executable, "-c", CHILD, shop.better, str(shop.models), when]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=shop.root)


@pytest.mark.slow
def test_a_gate_that_is_killed_changes_nothing_and_finishes_the_next_time(shop):
    moments = random.Random(5)
    for _ in range(4):
        process = child(shop)
        assert process.stdout.readline() == "begins\n"
        time.sleep(moments.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        live = current_version(shop.models)
        if live == shop.better:  # it was quicker
            assert read_manifest(shop.models / live)["metrics"]["gate"]["verdict"] == PROMOTED
            return
        unchanged(shop)
        verify_files(shop.models / shop.better)
    process = child(shop)
    assert process.communicate()[0].split()[-1] == PROMOTED and current_version(shop.models) == shop.better


def test_killed_between_verdict_and_publishing_the_old_model_is_live(shop):
    process = child(shop, "before")
    process.communicate()
    assert process.returncode == 9
    assert read_manifest(shop.models / shop.better)["metrics"]["gate"]["verdict"] == PROMOTED
    unchanged(shop)
    assert judged(shop, shop.better).published and current_version(shop.models) == shop.better
