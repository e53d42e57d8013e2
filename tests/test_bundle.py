"""Bundles of every kind of model, damaged in every file and at every place of the manifest: a damage is named, and no
other error than that comes out."""

import copy
import json
import shutil

import numpy as np
import pytest
from support import once_today

from product_recs.bundle.files import list_versions, publish, write_bundle
from product_recs.bundle.opening import open_bundle
from product_recs.bundle.ready import ReadyModel
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.core.errors import BundleError, ProductRecsError
from product_recs.core.ids import IdTable
from product_recs.data.snapshots import NOBODY
from product_recs.models.als import ALS, WeightedALS
from product_recs.models.baselines import BuyAgain, RecentPopularity
from product_recs.models.blend import HabitBlend, ScoreBlend
from product_recs.models.item_item import EASE, ItemBM25
from product_recs.models.signals import SIGNALS, BlendWeights
from product_recs.models.spectral import LowPass

USERS, ITEMS = 30, 40
WEIGHTS = BlendWeights(dict.fromkeys(SIGNALS, 0.5), -2.0, 30.0, 30.0, {})
SMALL = {"factors": 4, "iterations": 2, "num_threads": 1}


@pytest.fixture(scope="module")
def snapshot():
    random = np.random.default_rng(0)
    return once_today(random.random((USERS, ITEMS)) < 0.2)


def write(folder, snapshot, models, version="v1"):
    return write_bundle(
        folder,
        models=models,
        snapshot=snapshot,
        users=IdTable(range(USERS)),
        items=IdTable(range(100, 100 + ITEMS)),
        user_columns={},
        item_columns={},
        parameters={"ingest": {"max_quantity": 10.0}},
        data={"run": "shop"},
        metrics={},
        version=version,
    )


@pytest.fixture(scope="module")
def whole(snapshot, tmp_path_factory):
    "Two models over shared parts, with every kind of array in them."
    parts = [model.fit(snapshot) for model in (ALS(**SMALL), ItemBM25(num_threads=1), EASE(10), RecentPopularity())]
    mixed = ScoreBlend([*parts, WeightedALS(**SMALL), LowPass(4), BuyAgain()]).fit(snapshot)
    habits = HabitBlend(parts[0], NEXT_PURCHASE, WEIGHTS).fit(snapshot)
    return write(tmp_path_factory.mktemp("whole"), snapshot, {DISCOVERY: mixed, NEXT_PURCHASE: habits})


@pytest.fixture
def damaged(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "v1")


def test_every_file_is_watched(whole, damaged):
    ReadyModel(open_bundle(damaged.parent, "v1", verify=True)).prepare()
    names = [file.name for file in whole.iterdir() if file.name != "manifest.json"]
    assert len(names) >= 20
    for name in names:
        content = (damaged / name).read_bytes()
        for changed, verify in ((content[:-1], False), (content[:-1] + bytes([content[-1] ^ 1]), True), (None, False)):
            (damaged / name).unlink()
            if changed is not None:
                (damaged / name).write_bytes(changed)
                with pytest.raises(BundleError, match=name):
                    publish(damaged.parent, "v1")
            with pytest.raises(BundleError, match=name):
                open_bundle(damaged.parent, "v1", verify=verify)
            (damaged / name).write_bytes(content)
    assert open_bundle(damaged.parent, "v1", verify=True).version == "v1"


@pytest.mark.parametrize("change", ["fewer", "float64", "scalar", "empty", "text"])
def test_an_array_of_another_shape_or_type_is_named_or_answers(damaged, change):
    "As by a writer with a mistake: size and hash are those of the manifest, the array is not what it was."
    manifest = json.loads((damaged / "manifest.json").read_text())
    for file in [name for name in manifest["files"] if name.endswith(".npy")]:
        array = np.load(damaged / file)
        wrong = {
            "fewer": lambda array: array[:-1],
            "float64": lambda array: array.astype(np.float64) + 0.5,
            "scalar": lambda array: np.float32(1),
            "empty": lambda array: array[:0],
            "text": lambda array: array.astype(str),
        }[change](array)
        np.save(damaged / file, wrong)
        size = {"bytes": (damaged / file).stat().st_size}
        edited = manifest | {"files": manifest["files"] | {file: manifest["files"][file] | size}}
        (damaged / "manifest.json").write_text(json.dumps(edited))
        try:
            ReadyModel(open_bundle(damaged.parent, "v1")).prepare()
        except BundleError as error:
            assert "train again" in str(error) or "do not make a matrix" in str(error) or file in str(error), error
        else:  # values may be anything, also numbers with more digits
            assert change == "float64" or "scale" in file or "gain" in file, file
        np.save(damaged / file, array)


def places(value, place=()):
    "Every place in a manifest, but for the sizes and hashes of the files."
    yield place
    if isinstance(value, dict) and place != ("files",):
        for name, inner in value.items():
            yield from places(inner, (*place, name))
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*place, number))


JUNK = [None, -1, "x", True, float("nan"), [], {}, [{}], {"a": 1}]


def test_whatever_stands_in_a_manifest_no_other_error_comes_out(snapshot, tmp_path):
    als, bm25 = ALS(**SMALL).fit(snapshot), ItemBM25(num_threads=1).fit(snapshot)
    habits = HabitBlend(als, NEXT_PURCHASE, WEIGHTS).fit(snapshot)
    damaged = write(tmp_path, snapshot, {DISCOVERY: ScoreBlend([als, bm25]).fit(snapshot), NEXT_PURCHASE: habits})
    whole, seen = json.loads((damaged / "manifest.json").read_text()), 0
    for place in [place for place in places(whole) if place]:
        for junk in (*JUNK, ...):
            edited = copy.deepcopy(whole)
            holder = edited
            for name in place[:-1]:
                holder = holder[name]
            if junk is ...:
                del holder[place[-1]]
            else:
                holder[place[-1]] = junk
            (damaged / "manifest.json").write_text(json.dumps(edited))
            try:
                ready = ReadyModel(open_bundle(damaged.parent, "v1")).prepare()
                for model in ready.answering.values():
                    model.top(model.fold_in(NOBODY), 3)
            except ProductRecsError as error:
                assert isinstance(error, BundleError) and str(damaged) in str(error), (place, junk, error)
                seen += 1
            except Exception as error:
                raise AssertionError((place, junk)) from error
    assert seen > 200


def test_models_of_one_name_and_shared_parts(snapshot, tmp_path):
    first, other = (ALS(**SMALL | {"seed": seed}).fit(snapshot) for seed in (1, 2))
    both = ScoreBlend([first, other]).fit(snapshot)
    path = write(tmp_path, snapshot, {DISCOVERY: both, NEXT_PURCHASE: HabitBlend(other, weights=WEIGHTS).fit(snapshot)})
    bundle = open_bundle(tmp_path, "v1", verify=True)
    assert list(bundle.manifest["parts"]) == ["als", "als-2", "als-als", "als-habits"]
    assert (
        len([*path.glob("*.user_factors.npy")]) == 2 and bundle.model(NEXT_PURCHASE).parts[0] is bundle.model().parts[1]
    )
    for name, factors in (("als", first), ("als-2", other)):
        assert np.array_equal(np.load(path / f"{name}.user_factors.npy"), factors.user_factors)
    assert list_versions(tmp_path) == ["v1"]
