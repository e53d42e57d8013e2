"""A payload in every field of every input stays text in reports, notebooks, plots and spreadsheets and browsers."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from support import QUICK, call, fresh_project, only_the_jobs

from product_recs.core.text import read_cell
from product_recs.jobs.reports import CONTENT_POLICY, to_html

HARM = "<img src=x onerror=window.harmed=1>"  # no slash, so a file and a run can be called so too
WORSE = f"\"'></td></script><svg onload='window.harmed=1'><script>window.harmed=1</script>{HARM}"
MATH = "$x^{$ & <b>5</b> $"
FORMULA = '=HYPERLINK("http://evil.example","x")'
BARE = "</td></script><svg onload=window.harmed=1><script>window.harmed=1</script>"  # ids take no quotes
PIPELINE = ("01_ingest", "02_features", "03_train", "04_evaluate", "05_inference")


class Page(HTMLParser):
    "Elements with their attributes, and the text."

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("style", "title"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        self.text.append(data)


def foreign(text):
    "Elements and attributes that a payload made."
    page = Page(text)
    wrong = [
        (tag, attributes) for tag, attributes in page.elements if any(name.startswith("on") for name in attributes)
    ]
    wrong += [
        (tag, attributes)
        for tag, attributes in page.elements
        if tag in ("script", "svg", "iframe", "object", "form", "input", "link", "base")
    ]
    wrong += [
        (tag, attributes)
        for tag, attributes in page.elements
        if tag == "img" and not (attributes.get("src") or "").startswith("data:image/png;base64,")
    ]
    wrong += [
        (tag, attributes)
        for tag, attributes in page.elements
        if tag == "a" and re.match(r"\s*(javascript|data):", attributes.get("href") or "")
    ]
    return wrong, "".join(page.text)


def write_inputs(root):
    "A shop in which everything that has a name has a bad one."
    log, products, users = root / f"{HARM}.csv", root / f"products {HARM}.csv", root / f"users {HARM}.csv"
    with open(root / "data" / "interactions.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:4000]
    person = lambda user: f"{user}{HARM}" if int(user) % 2 else f"=A1+{user}"
    thing = lambda item: f"{item}{BARE}" if int(item) % 2 else f"{MATH}{item}"
    with open(log, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow([f"who {HARM}", f"what {HARM}", f"how {HARM}", f"when {HARM}", f"many {HARM}"])
        for row in rows:
            event = HARM if row["event"] == "view" else MATH.lower() if row["event"] == "cart" else row["event"]
            out.writerow([person(row["user_id"]), thing(row["item_id"]), event, row["timestamp"], 1])
        for bad in (HARM, FORMULA, MATH, "-3"):
            out.writerow([person("1"), thing("101"), "purchase", "2025-06-01", bad])
        out.writerow([person("1"), thing("101"), WORSE, "2025-06-01", 1])
    with open(root / "data" / "products.csv", newline="") as file:
        known = list(csv.DictReader(file))
    with open(products, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["item_id", "title", "category", "brand", "price", f"extra {HARM}"])
        for place, row in enumerate(known):
            names = (HARM, WORSE, MATH, FORMULA, "_hidden", "two\nlines", "$x^{$")
            out.writerow(
                [
                    thing(row["item_id"]),
                    f"{names[place % 7]} {row['item_id']}",
                    names[int(row["item_id"]) % 5],
                    f"{HARM} & co",
                    1.5,
                    WORSE,
                ]
            )
    with open(users, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["user_id", f"kind {HARM}"])
        out.writerows(
            [person(user), (HARM, MATH, FORMULA)[int(user) % 3]] for user in sorted({row["user_id"] for row in rows})
        )
    parameters = {
        "source": log.name,
        "products": products.name,
        "users": users.name,
        "events": [HARM, MATH.lower(), "purchase"],
        "returns": "ignore",  # "-3" is a fault
        "columns": {
            "user_id": f"who {HARM}",
            "item_id": f"what {HARM}",
            "event": f"how {HARM}",
            "timestamp": f"when {HARM}",
            "quantity": f"many {HARM}",
        },
        "event_weights": {HARM: 2, "purchase": 4},
        "segment_by": f"kind {HARM}",
        "user": person("1"),
        "iterations": 4,
        "factors": 16,
        "bootstrap": 50,
        "models": ["popularity", "item-item cosine", "ALS"],
        "candidates": ["popularity", "ALS", "ALS + habits"],
    }
    (root / "shop.yaml").write_text(json.dumps(parameters))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = fresh_project(tmp_path_factory.mktemp("shop"))
    only_the_jobs(root)
    write_inputs(root)
    (root / "quick.yaml").write_text(QUICK)
    spoken = []
    for verb, name, more, code in (
        ("run", HARM, (), 0),
        ("tune", HARM, ("-f", "quick.yaml", "--minutes", "1"), 0),
        ("run", "strict", ("-p", "on_error", "fail"), 1),
        ("run", "wrong", ("-p", "columns", json.dumps({"user_id": HARM})), 1),
    ):
        done = call(root, "product-recs", verb, "--name", name, "-f", "shop.yaml", *more, "--quiet")
        assert done.returncode == code, done.stdout + done.stderr
        spoken.append(done.stdout + done.stderr)
    return root, spoken


def pages(root):
    return sorted((root / "reports").rglob("*.html"))


def test_every_report_shows_the_payload_as_text(shop):
    root, _ = shop
    findings = {f"{path.parent.name}/{path.name}": foreign(path.read_text()) for path in pages(root)}
    assert {f"{HARM}/{name}.html" for name in (*PIPELINE, "weights", "tune", "index")} | {
        "strict/01_ingest.html",
        "strict/index.html",
        "wrong/index.html",
    } <= set(findings)
    assert {name: wrong for name, (wrong, _) in findings.items() if wrong} == {}
    for name in ("01_ingest", "02_features", "03_train", "05_inference", "index"):
        assert HARM in findings[f"{HARM}/{name}.html"][1], f"{name} does not show it at all"
    assert HARM in findings["strict/index.html"][1] and HARM in findings["wrong/index.html"][1]
    for path in pages(root):
        policies = [
            attributes
            for tag, attributes in Page(path.read_text()).elements
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
        ]
        assert [policy["content"] for policy in policies] == [CONTENT_POLICY]


def test_the_outputs_of_the_executed_notebooks_are_text(shop):
    root, _ = shop
    seen = 0
    for path in sorted((root / "reports").rglob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                assert set(output.get("data", {})) <= {"text/plain", "text/html", "text/markdown", "image/png"}
                for kind in ("text/html", "text/markdown"):
                    wrong, _ = foreign(output.get("data", {}).get(kind, ""))
                    assert wrong == [], f"{path.name}: {wrong}"
                seen += "text/html" in output.get("data", {})
    assert seen > 20


def test_spreadsheets_meet_no_formula_and_programs_the_original(shop):
    root, _ = shop
    data, reports = root / "data" / "processed" / HARM, root / "reports" / HARM
    files = [data / "rejects.csv", reports / "evaluation.csv", reports / "segments.csv"]
    for path in files:
        with open(path, newline="") as file:
            for row in csv.reader(file):
                for cell in row:
                    assert not re.match(r"[=+\-@\t\r\n]", cell) or re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", cell), (
                        path.name,
                        cell,
                    )
    with open(files[0], newline="") as file:
        values = {read_cell(row["value"]) for row in csv.DictReader(file)}
    assert {HARM, FORMULA, MATH, "-3"} <= values
    groups = pd.read_csv(files[2]).group.map(lambda group: read_cell(str(group)))
    assert {HARM, MATH, FORMULA} <= set(groups)


def visit(browser, address, wait=0.0, ready=None):
    "What a page asked for and did, and its text; it is so tall that a lab draws every cell."
    context = browser.new_context(viewport={"width": 1200, "height": 9000 if ready else 900})
    page, asked, dialogs, said = context.new_page(), [], [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: said.append(message.text))
    page.goto(address)
    if ready:
        page.wait_for_selector(ready, timeout=60_000, state="attached")
    page.wait_for_timeout(1000 * wait)
    harmed, shown = page.evaluate("window.harmed"), page.locator("body").text_content()
    context.close()
    return {
        "harmed": harmed,
        "asked": [url for url in asked if not url.startswith("data:")],
        "dialogs": dialogs,
        "said": said,
        "shown": shown,
    }


def test_a_browser_runs_nothing_and_loads_nothing(shop, browser):
    root, _ = shop
    for path in pages(root):
        seen = visit(browser, path.as_uri())
        assert (seen["harmed"], seen["dialogs"], seen["asked"], seen["said"]) == (None, [], [path.as_uri()], []), path


def test_the_policy_holds_where_a_notebook_shows_markup_of_its_own(tmp_path, browser):
    output = nbformat.v4.new_output(
        "display_data",
        {
            "text/html": WORSE
            + "<img src='http://127.0.0.1:9/x.png'><b>shown</b><form action='http://127.0.0.1:9/'></form>",
            "text/plain": "x",
        },
    )
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Title\n\n## Run"),
            nbformat.v4.new_code_cell("show()", outputs=[output]),
        ]
    )
    nbformat.write(notebook, tmp_path / "own.ipynb")
    page = to_html(tmp_path / "own.ipynb", tmp_path / "own.html", "own")
    seen = visit(browser, page.as_uri(), wait=0.5)
    assert seen["harmed"] is None and seen["dialogs"] == [] and "shown" in seen["shown"]
    assert any("Content Security Policy" in line for line in seen["said"])
    # the same page without the policy does harm, so the browser would
    open_page = tmp_path / "open.html"
    open_page.write_text(page.read_text().replace(CONTENT_POLICY, ""))
    assert visit(browser, open_page.as_uri(), wait=0.5)["harmed"] == 1


@pytest.fixture(scope="module")
def lab(shop):
    "A real JupyterLab on the reports."
    pytest.importorskip("jupyterlab")
    root, _ = shop
    folder = root / "lab"
    folder.mkdir()
    for name in (
        "01_ingest",
        "02_features",
        "05_inference",
    ):  # as a run left them; a lab's address does not like the name of the run
        shutil.copy(root / "reports" / HARM / f"{name}.ipynb", folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false"},
    }
    for plugin, values in settings.items():
        file = root / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        f"--notebook-dir={folder}",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=(root / "lab.log").open("w"),
        stdin=subprocess.DEVNULL,
        env=os.environ
        | {
            "HOME": str(folder),
            "JUPYTER_CONFIG_DIR": str(root / "config"),
            "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        },
    )
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < end, (root / "lab.log").read_text()
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def test_jupyterlab_shows_the_executed_notebooks_as_text(lab, browser):
    for name in ("01_ingest", "02_features", "05_inference"):
        seen = visit(browser, f"{lab}/lab/tree/{name}.ipynb?reset", wait=4, ready=".jp-OutputArea-output table")
        assert seen["harmed"] is None and seen["dialogs"] == [] and HARM in seen["shown"], name
        assert {url.split("/")[2] for url in seen["asked"] if url.startswith("http")} == {lab.split("/")[2]}
    assert "$x^{$" in seen["shown"]
