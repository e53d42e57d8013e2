"""A workspace from a package: what the wheel holds, from an export to a list, from one release to the next."""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import exports
import pytest
import yaml
from commands import wrong_with
from support import ROOT, only_the_jobs

from product_recs.core.paths import MARKER
from product_recs.jobs.merging import notebook_text

TESTS = Path(__file__).parent
MAIN = "import sys; from product_recs.jobs.cli import main; sys.exit(main())"


@pytest.fixture(scope="session")
def package(wheel, tmp_path_factory):
    "The folder of an installed package; what it needs is there already."
    home = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(home), str(wheel)], check=True, timeout=300, capture_output=True)
    return home


@pytest.fixture(scope="session")
def newer(package, tmp_path_factory):
    "The package of a newer release, in which a notebook, a text and a template are different."
    home = tmp_path_factory.mktemp("newer") / "site"
    shutil.copytree(package, home)
    (home / "product_recs/__init__.py").write_text('__version__ = "9.0.0"\n')
    templates = home / "product_recs/jobs/workspace"
    path = templates / "nbs/01_ingest.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"].append("\n\nA sentence of the newer release.")
    path.write_text(json.dumps(notebook, indent=1))
    for name, before, after in (("README.md", "Made by", "Built by"), ("compose.yaml", "20s", "30s")):
        text = (templates / name).read_text()
        assert before in text
        (templates / name).write_text(text.replace(before, after))
    (templates / "dot_gitignore").unlink()
    (templates / "new.txt").write_text("of @NAME@\n")
    return home


def typed(package, folder, *words, code=0):
    "What a command of an installed package prints."
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRODUCT_RECS_")}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *words],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(package)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_holds_the_notebooks_that_run_and_none_of_their_outputs(wheel):
    inside = "product_recs/jobs/workspace/"
    with zipfile.ZipFile(wheel) as archive:
        files = {name.removeprefix(inside): name for name in archive.namelist() if name.startswith(inside)}
        notebooks = {name: json.loads(archive.read(path)) for name, path in files.items() if name.endswith(".ipynb")}
    assert {"nbs/01_ingest.ipynb", "nbs/05_inference.ipynb", "nbs/jobs/gate.ipynb", "nbs/jobs/batch.ipynb"} <= {
        *notebooks
    }
    assert not {"nbs/06_api.ipynb", "nbs/models/als.ipynb", "nbs/jobs/cli.ipynb"} & {*notebooks}, (
        "a change would be lost"
    )
    assert {"Dockerfile", "compose.yaml", "requirements.txt", "data/interactions.csv"} <= {*files}
    assert {"examples/gate.yaml", "examples/daily/crontab", "examples/daily/cronjob.yaml"} <= {*files}
    for name, notebook in notebooks.items():
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"]), name
        assert any("parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"]), name
        own = json.loads((ROOT / name).read_text())
        assert [cell["source"] for cell in own["cells"] if cell["cell_type"] == "code"] == [
            cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"
        ]
        text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#:\s]+)(?=[)#])", text):
            assert os.path.normpath(os.path.join(os.path.dirname(name), target)) in files, (name, target)


def test_from_an_empty_folder_to_a_list_with_a_changed_notebook(package, tmp_path):
    export = exports.EXPORTS["european"](tmp_path)
    assert "`product-recs init my-shop` makes a folder" in typed(package, tmp_path, "run", code=1)
    said = typed(package, tmp_path, "init", "tee", "--source", *export.sources)
    shop = tmp_path / "tee"
    assert "is a workspace now" in said and "cd tee && product-recs run -f shop.yaml --name shop" in said
    parameters = yaml.safe_load((shop / "shop.yaml").read_text())
    assert parameters["source"] == "data/exports/verkauf.csv" and parameters["columns"]["user_id"] == "Kundennummer"
    assert re.search(r"#   Kundennummer +\S.* user_id\n", (shop / "shop.yaml").read_text())
    assert "is there already" in typed(package, tmp_path, "init", "tee", "--source", *export.sources, code=1)

    only_the_jobs(shop)
    path = shop / "nbs/01_ingest.ipynb"
    path.write_text(path.read_text().replace("What became of the rows", "Was aus den Zeilen wurde"))
    given = ("-f", "shop.yaml", "--name", "shop", "-p", "model", "popularity", "--publish", "--quiet")
    said = typed(package, shop / "nbs/jobs", "run", *given)
    assert (
        "Run shop succeeded" in said
        and "Was aus den Zeilen wurde" in (shop / "reports/shop/01_ingest.html").read_text()
    )
    assert "popular" in typed(package, shop / "data", "recommend", export.user(7), "-n", "3")
    listed = json.loads(typed(package, shop, "recommend", export.user(7), "--json"))
    assert len(listed["recommendations"]) == 10 and (shop / "models").is_dir() and not (shop / "nbs/models").exists()


def test_an_update_keeps_every_edit_and_says_what_it_did(package, newer, tmp_path):
    typed(package, tmp_path, "init", "Tea & Co")
    shop = tmp_path / "Tea & Co"
    assert "name: tea-co" in (shop / "compose.yaml").read_text()
    notebook = shop / "nbs/01_ingest.ipynb"
    notebook.write_text(notebook.read_text().replace("What became of the rows", "My heading"))
    readme = (shop / "README.md").read_text().replace("Made by", "Ours, made by")
    (shop / "README.md").write_text(readme)
    (shop / "examples/gate.yaml").write_text("metric: recall\n")
    (shop / "nbs/jobs/tune.ipynb").unlink()
    (shop / "new.txt").write_text("a file of our own\n")
    said = typed(newer, shop / "nbs", "init", "--update")
    remarks = dict(re.findall(r"^  (\S+) {2,}(.+)$", said, re.MULTILINE))
    assert remarks == {
        "nbs/01_ingest.ipynb": "has your change and the new one's",
        "README.md": "yours stays; the new one lies beside it",
        "new.txt": "yours stays; the new one lies beside it",
        "examples/gate.yaml": "yours stays; the release has not changed it",
        "nbs/jobs/tune.ipynb": "stays deleted",
        "compose.yaml": "replaced by the new one",
        "requirements.txt": "replaced by the new one",
        ".gitignore": "removed: the release has it no more",
    }
    text = notebook_text(json.loads(notebook.read_text()))
    assert "My heading" in text and "A sentence of the newer release." in text
    assert (shop / "README.md").read_text() == readme and "Built by" in (shop / "README.md.new").read_text()
    assert (shop / "new.txt").read_text() == "a file of our own\n"
    assert (shop / "new.txt.new").read_text() == "of tea-co\n"
    assert "product-recs[jobs]==9.0.0" in (shop / "requirements.txt").read_text()
    assert not (shop / "nbs/jobs/tune.ipynb").exists() and "30s" in (shop / "compose.yaml").read_text()
    assert "git diff --no-index README.md README.md.new" in said and "to 9.0.0" in said
    for name in ("README.md.new", "new.txt.new"):
        (shop / name).unlink()
    typed(newer, shop, "init", "--update")
    assert not (shop / "README.md.new").exists(), "whoever deletes it has decided"


def test_an_update_that_is_killed_is_ended_by_the_next(package, newer, tmp_path):
    typed(package, tmp_path, "init", "tea")
    (tmp_path / "tea/README.md").write_text(
        (tmp_path / "tea/README.md").read_text().replace("Made by", "Ours, made by")
    )
    done = subprocess.run(
        [sys.executable, TESTS / "update_child.py", tmp_path / "tea", newer / "product_recs/jobs/workspace", "40"],
        env=os.environ | {"PYTHONPATH": str(newer)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["killed"] == 40 and said["operations"] > 60 and said["different"] == [], said


def test_what_cannot_be_is_said_with_the_remedy(package, tmp_path):
    (tmp_path / "export.csv").write_text("user_id,item_id\n1,2\n")
    assert "product-recs init --source export.csv" in typed(package, tmp_path, "init", "export.csv", code=1)
    assert "is no workspace; `product-recs init FOLDER` makes one" in typed(
        package, tmp_path, "init", "--update", code=1
    )
    assert "FOLDER" in typed(package, tmp_path, "init", code=2) and not (tmp_path / MARKER).exists()
    typed(package, tmp_path, "init", "tea")
    assert "init --update" in typed(package, tmp_path, "init", "tea", code=1)
    assert "no such file" in typed(package, tmp_path, "init", "coffee", "--source", "no.csv", code=1)
    assert not (tmp_path / "coffee").exists(), "nothing is written before the export was read"


def test_a_person_at_a_terminal_is_asked(package, tmp_path):
    rows = "".join(f"{number % 9},{number % 7},{number % 5}\n" for number in range(60))
    (tmp_path / "export.csv").write_text("customer,sku,shelf\n" + rows)
    child, terminal = pty.fork()
    if not child:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(package)
        os.execv(sys.executable, [sys.executable, "-c", MAIN, "init", "--source", "export.csv"])
    # the customer is right, the item is not; a column that is not there is asked for again
    os.write(terminal, b"\nshelves\nshelf\n\n\n\n")
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:  # the end of a terminal on Linux
        pass
    _, status = os.waitpid(child, 0)
    assert status == 0, said
    assert b"there is no 'shelves'; there are customer, sku, shelf" in said and b"user_id: who" in said
    assert yaml.safe_load((tmp_path / "shop.yaml").read_text())["columns"] == {
        "user_id": "customer",
        "item_id": "shelf",
    }


def test_what_containers_and_workflows_name_is_in_the_workspace(package, wheel, tmp_path):
    typed(package, tmp_path, "init", "tea")
    shop = tmp_path / "tea"
    ignored = (shop / ".dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", (shop / "Dockerfile").read_text(), re.MULTILINE):
        assert list(shop.glob(sources)) and f"!{sources}" in ignored, sources
    compose = yaml.safe_load((shop / "compose.yaml").read_text())
    assert {*compose["services"]} == {"api", "train", "postgres"} and compose["name"] == "tea"
    dockerfile = (shop / "Dockerfile").read_text()
    targets = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    assert {service["build"]["target"] for service in compose["services"].values() if "build" in service} < {*targets}
    started = [json.loads(words) for words in re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)]
    started += [[re.sub(r"\$\{\w+:-(.+)\}", r"\1", word) for word in service["command"]]
                for service in compose["services"].values() if "command" in service]  # fmt: skip
    for path in shop.glob(".github/workflows/*.yml"):
        workflow = yaml.safe_load(path.read_text())
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        started += [shlex.split(step["run"]) for step in steps if "run" in step]
    rest = [words for words in started if words[0] != "product-recs"]
    assert len(started) - len(rest) >= 7
    for words in started:
        assert words in rest or not wrong_with(words[1:]), (words, wrong_with(words[1:]))
    decision = ["xargs", "product-recs", "<<<", "$DECISION"]
    assert all(words[:2] == ["pip", "install"] or words == decision for words in rest), rest

    # what a night leaves is kept whatever its exit code, and comes back before the next one
    steps = yaml.safe_load((shop / ".github/workflows/train.yml").read_text())["jobs"]["shop"]["steps"]
    place = {step.get("uses", step.get("run")).split("@")[0]: number for number, step in enumerate(steps)}
    restored, saved = (steps[place[f"actions/cache/{what}"]] for what in ("restore", "save"))
    assert saved["if"] == "always()" and saved["with"]["path"] == restored["with"]["path"]
    assert saved["with"]["path"].split() == ["models", "data/processed", "reports/daily"]
    [night] = [number for command, number in place.items() if "daily" in command]
    assert place["actions/cache/restore"] < night < place["actions/cache/save"]
    assert all(step["if"] == "always()" for step in steps if step.get("uses", "").startswith("actions/upload"))
    [copy] = shop.glob("wheels/*.whl")
    assert copy.read_bytes() == wheel.read_bytes(), "it was installed from a file, and no index may have it"
