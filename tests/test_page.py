"""The page as a person meets it: a real browser, a real service, found by the names and roles that a screen reader
hears."""

import http.client
import os
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from support import Server, bundle_by_hand, publish_board, train

from product_recs.bundle.files import publish
from product_recs.core.columns import DISCOVERY, NEXT_PURCHASE
from product_recs.data.snapshots import Snapshot
from product_recs.models.blend import HabitBlend
from product_recs.models.signals import SIGNALS, BlendWeights

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested in a browser")
expect = playwright.expect

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no browser at {CHROMIUM}; set CHROMIUM")

EACH = 12  # coffees, and as many teas; 6 lovers of each
FIRST = 2**53 + 1  # the first coffee's id: JavaScript's own numbers end before it
COFFEE = [f"Coffee {k}" for k in range(EACH)]
TEA = ['<img src=x onerror="window.harmed = 1"><b>Tea</b> 0', *(f"Tea {k}" for k in range(1, EACH))]


def publish_shop(models_dir, **columns):
    """Persons 1 to 6 drink coffee, 7 to 12 tea; the k-th has had 6 kinds of their drink, from number 2 k on, each of
    them k + 1 times. Items may have further columns."""
    taste, place = np.repeat([0, 1], EACH), np.tile(np.arange(EACH), 2)
    lover, start = np.repeat([0, 1], 6), np.tile(np.arange(6), 2)
    owned = (lover[:, None] == taste) & ((place - 2 * start[:, None]) % EACH < 6)
    seen = csr_matrix(owned.astype(np.float32))
    counts = csr_matrix(seen.multiply((start + 1)[:, None]).astype(np.float32))
    age = csr_matrix(seen.multiply(1 + place[None]).astype(np.float32))
    shop = Snapshot(None, seen, counts, age, owned.sum(axis=0).astype(np.int32))
    weights = BlendWeights(
        {name: {"taste": 0.5, "own": 3.0, "count": 0.5}.get(name, 0.0) for name in SIGNALS}, -1.0, 30.0, 30.0, {}
    )
    path = bundle_by_hand(
        models_dir,
        user_factors=np.eye(2, dtype=np.float32)[lover],
        item_factors=np.eye(2, dtype=np.float32)[taste],
        snapshot=shop,
        als={"regularization": 0.01, "alpha": 1.0, "iterations": 1},
        models=lambda als: {DISCOVERY: als, NEXT_PURCHASE: HabitBlend(als, NEXT_PURCHASE, weights).fit(shop)},
        users=range(1, 13),
        items=FIRST + np.arange(2 * EACH),
        user_columns={"popularity": owned.sum(axis=1).astype(np.int32)},
        item_columns={
            "popularity": shop.popularity,
            "title": np.array(COFFEE + TEA, object),
            "category": np.repeat(np.array(["HOT COFFEE", "TEA"], object), EACH),
            "price": np.arange(2 * EACH) / 4,
            **columns,
        },
        data={"fingerprint": "none", "starts": "2026-01-01T00:00:00", "ends": "2026-02-01T00:00:00"},
        parameters={
            "features": {
                "event_weights": {"purchase": 1, "cart": 1},
                "quantity": "ignore",
                "half_life_days": 0,
                "weighting": "none",
                "min_user_items": 1,
                "min_item_users": 1,
            },
        },
        metrics={
            "evaluation": {
                "split": "2026-01-20T00:00:00",
                "discovery_hit_rate@10": 0.5,
                "next_purchase_hit_rate@10": 0.75,
            }
        },
    )
    publish(models_dir, path.name)
    return path


def run_server(folder, models_dir, **settings):
    server = Server(folder, models_dir, database_url=f"sqlite:///{folder}/feedback.db", **settings)
    server.port = settings.get("port", server.port)
    return server


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    publish_shop(folder / "models")
    with run_server(folder, folder / "models") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A tab of its own that keeps what it asked for and what went wrong."""

    def __init__(self, browser, base, **options):
        self.base = base
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.wrong, self.asked = [], []
        self.page.on(
            "console", lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def go(self, fragment=""):
        self.page.goto(self.base + fragment)
        return self.page

    def person(self, fragment):
        self.go(fragment)
        self.ready()
        return self.page

    def ready(self):
        expect(titles(self.page).first).to_be_visible()
        expect(self.page.get_by_role("region", name="Recommended")).not_to_have_attribute("aria-busy", "true")


@pytest.fixture
def visit(browser, service):
    opened = Visit(browser, f"http://127.0.0.1:{service.port}/")
    yield opened
    opened.context.close()
    assert opened.wrong == []
    assert {url.split("/")[2] for url in opened.asked} == {f"127.0.0.1:{service.port}"}


def titles(page):
    return page.get_by_role("list", name="Recommendations").get_by_role("heading", level=3)


def names(page):
    return titles(page).all_inner_texts()


def line(page, list_name, title):
    return (
        page.get_by_role("list", name=list_name)
        .get_by_role("listitem")
        .filter(has=page.get_by_role("button", name=title, exact=True))
    )


def step(page):
    return page.get_by_role("list", name="Ways to find an answer").locator("[aria-current=step]")


def said(page, text):
    expect(page.get_by_role("status").get_by_text(text)).to_be_visible()


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_a_person_is_shown_with_names_reasons_history_and_rung(visit, service):
    page = visit.person("#user=1")
    expect(page.get_by_role("heading", level=1, name="Person 1")).to_be_visible()
    expect(page).to_have_title("Person 1 · Recommendations")
    items = service.get("/recommend/1?n=12&detail=true")[2]["items"]
    assert names(page) == [item["title"] for item in items] == COFFEE[6:] + TEA[:6]
    first = page.get_by_role("list", name="Recommendations").get_by_role("listitem").first
    expect(first).to_contain_text("Hot coffee")
    expect(first).to_contain_text("Because you had Coffee")
    expect(step(page)).to_have_text("Personal")
    history = page.get_by_role("list", name="What this person had")
    assert set(history.get_by_role("button").all_inner_texts()) == set(COFFEE[:6])
    facts = page.get_by_role("region", name="The model")
    for text in (service.get("/model")[2]["version"], "Jan 1, 2026 to Feb 1, 2026", "bought by 75% of the people"):
        expect(facts).to_contain_text(text)


def test_titles_from_the_data_are_never_markup(visit):
    page = visit.person("#user=1")
    page.get_by_role("button", name=TEA[0], exact=True).click()
    expect(page.get_by_role("dialog").get_by_role("heading", level=2)).to_have_text(TEA[0])
    assert page.evaluate("window.harmed === undefined && !document.querySelector('main img, dialog img')")


def test_both_tasks_have_an_address_and_the_back_button_works(visit):
    page = visit.person("#user=3&task=next_purchase")
    tasks = page.get_by_role("group", name="Task")
    expect(tasks.get_by_role("radio", name="Next purchase")).to_be_checked()
    expect(step(page)).to_have_text("Next purchase")
    # what a person had before comes first here
    assert set(names(page)[:6]) == set(COFFEE[4:10])
    expect(page.get_by_text(re.compile("^You had it 3 times, last on 2[2-7] Jan$"))).to_have_count(6)
    card = page.get_by_role("list", name="Recommendations").get_by_role("listitem")
    expect(card.filter(has_text="Coffee 4").first).to_contain_text("You had it 3 times, last on 27 Jan")
    expect(page.get_by_text(re.compile(r"^12 items in \d+ ms, by ALS \+ habits$"))).to_be_visible()
    tasks.get_by_role("radio", name="Something new").check()
    expect(page).to_have_url(re.compile("#user=3$"))
    expect(page.get_by_text(re.compile(r"^12 items in \d+ ms, by ALS$"))).to_be_visible()
    expect(step(page)).to_have_text("Personal")
    assert set(names(page)[:6]) == set(COFFEE) - set(COFFEE[4:10])
    page.go_back()
    expect(tasks.get_by_role("radio", name="Next purchase")).to_be_checked()
    expect(step(page)).to_have_text("Next purchase")


def test_a_person_is_picked_typed_or_a_guest(visit, service):
    page = visit.person("")
    # without an address: somebody who is known
    first = str(service.get("/users?limit=20")[2]["users"][0])
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Person {first}")
    page.get_by_role("group", name="Some people").get_by_role("button", name="2", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Person 2")
    expect(page.get_by_role("button", name="2", exact=True)).to_have_attribute("aria-pressed", "true")
    box = page.get_by_role("combobox", name="Choose a person")
    box.fill("no/body é?")
    box.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Person no/body é?")
    expect(step(page)).to_have_text("Popular")
    expect(page.get_by_text("The model does not know this person")).to_be_visible()
    visit.ready()
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("Person no/body é?")
    page.get_by_role("button", name="Start as a guest").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("A guest")
    expect(page).to_have_url(re.compile("#guest$"))


def test_the_live_figures_are_those_of_the_service(visit, service):
    page = visit.person("#user=1")
    live = page.get_by_role("region", name="Right now")
    asked = live.get_by_role("definition").first
    expect(asked).to_have_text(re.compile(r"^[1-9][\d,]*$"))
    before = int(asked.inner_text().replace(",", ""))
    service.get("/recommend/2?n=1")
    expect(asked).not_to_have_text(str(before), timeout=15_000)
    expect(live).to_contain_text("Personal")
    expect(live.get_by_text(re.compile(r"^[\d.]+ m?s$"))).to_have_count(2)
    live.get_by_role("switch", name="Live").uncheck()


# --- what it does ----------------------------------------------------------------------------------------------------


def test_what_goes_into_the_basket_changes_the_list_at_once(visit, service):
    page = visit.person("#user=4")
    wanted = names(page)[8]
    assert wanted in TEA
    add = page.get_by_role("button", name=f"Add to basket: {wanted}", exact=True)
    add.focus()
    add.press("Enter")
    said(page, re.compile(rf"{re.escape(wanted)} is in the basket. \d+ new recommendations?\."))
    expect(line(page, "In the basket", wanted)).to_be_visible()
    assert wanted not in names(page) and len(names(page)) == 12
    expect(page.get_by_text("New", exact=True).first).to_be_visible()
    # the focus went to the card that took the place
    assert page.evaluate("document.activeElement.closest('#list > li') !== null")
    expect(line(page, "What this person had", wanted)).to_contain_text("Cart")
    event = service.get("/users/4/history")[2]["history"][0]
    assert (event["title"], event["event"], event["origin"]) == (wanted, "cart", "feedback")
    assert event["item_id"] == FIRST + EACH + TEA.index(wanted)


def test_not_interested_is_kept_and_can_be_taken_back(visit, service):
    page = visit.person("#user=5")
    unwanted = names(page)[0]
    id = service.get("/recommend/5?n=1")[2]["recommendations"][0]
    page.get_by_role("button", name=f"Not interested: {unwanted}", exact=True).click()
    said(page, f"{unwanted} will not come again.")
    assert unwanted not in names(page)
    assert id not in service.get("/recommend/5?n=24")[2]["recommendations"]
    page.reload()
    visit.ready()
    page.get_by_role("button", name=f"Undo not interested: {unwanted}", exact=True).click()
    said(page, f"{unwanted} may come again.")
    assert unwanted in names(page)
    assert id in service.get("/recommend/5?n=24")[2]["recommendations"]
    # out of the basket again: a known person's event cannot be unsaid, so the item is denied
    page.get_by_role("button", name=f"Add to basket: {unwanted}", exact=True).click()
    page.get_by_role("list", name="In the basket").get_by_role(
        "button", name=f"Remove from basket: {unwanted}", exact=True
    ).click()
    expect(line(page, "Not interested", unwanted)).to_be_visible()
    assert id not in service.get("/recommend/5?n=24")[2]["recommendations"]


def test_a_guest_is_known_by_the_basket_alone(visit):
    page = visit.person("#guest")
    expect(step(page)).to_have_text("Popular")
    expect(page.get_by_text("A guest has none.")).to_be_visible()
    page.get_by_role("searchbox", name="Find an item").fill("tea")
    results = page.get_by_role("list", name="Items found")
    expect(results.get_by_role("listitem")).to_have_count(8)
    results.get_by_role("button", name="Add to basket: Tea 3", exact=True).click()
    expect(step(page)).to_have_text("This visit")
    assert set(names(page)[:11]) == set(TEA) - {"Tea 3"}
    expect(results.get_by_text("In basket")).to_be_visible()
    page.reload()
    expect(step(page)).to_have_text("This visit")
    page.get_by_role("button", name="Not interested: Tea 5", exact=True).click()
    expect(line(page, "Not interested", "Tea 5")).to_be_visible()
    expect(
        page.get_by_role("list", name="Recommendations").get_by_role("button", name="Tea 5", exact=True)
    ).to_have_count(0)
    page.get_by_role("button", name="Remove from basket: Tea 3", exact=True).click()
    expect(step(page)).to_have_text("Popular")
    expect(page.get_by_text("Empty. Add an item")).to_be_visible()


def test_the_hint_of_the_search_is_a_word_of_this_shop(visit):
    page = visit.person("#user=2")
    box = page.get_by_role("searchbox", name="Find an item")
    expect(box).to_have_attribute("placeholder", re.compile("^for example [a-z]+$"))
    word = box.get_attribute("placeholder").rpartition(" ")[2]
    assert word in " ".join(COFFEE + TEA).lower().split()
    box.fill(word)
    result = page.get_by_role("list", name="Items found").get_by_role("listitem").first
    expect(result.get_by_role("button").first).to_have_text(re.compile(rf"\b{word}\b", re.I))


def test_a_shop_without_titles_gets_no_hint(browser, tmp_path):
    publish_board(tmp_path / "models", item_columns={})
    with run_server(tmp_path, tmp_path / "models") as server:
        opened = Visit(browser, f"http://127.0.0.1:{server.port}/")
        page = opened.person("#user=2")
        expect(titles(page).first).to_have_text(re.compile("^Item 1"))
        expect(page.get_by_role("searchbox", name="Find an item")).to_have_attribute("placeholder", "")
        opened.context.close()


def test_a_search_without_a_hit_says_so(visit):
    page = visit.person("#guest")
    page.get_by_role("searchbox", name="Find an item").fill("<b>soap & water</b>")
    expect(page.get_by_text("No item has “<b>soap & water</b>” in its name.")).to_be_visible()


def test_why_why_not_and_similar_items(visit):
    page = visit.person("#user=2")
    opener = page.get_by_role("list", name="Recommendations").get_by_role("button", name="Coffee 9", exact=True)
    opener.click()
    dialog = page.get_by_role("dialog", name="Coffee 9")
    expect(dialog.get_by_role("heading", level=2)).to_be_focused()
    why = dialog.get_by_role("region", name="Why, or why not")
    expect(why).to_contain_text("Recommended: number")
    expect(why.get_by_role("listitem").first).to_contain_text(re.compile(r"Coffee [2-7].*%", re.S))
    expect(dialog.get_by_role("region", name="Facts")).to_contain_text("2.25")
    other = dialog.get_by_role("list", name="Similar items").get_by_role("button").first
    title = other.inner_text()
    assert title in COFFEE
    other.click()
    expect(page.get_by_role("dialog", name=title)).to_be_visible()
    page.get_by_role("button", name="Back").click()
    expect(dialog).to_be_visible()
    dialog.get_by_role("button", name="Not interested").click()
    expect(dialog.get_by_role("status")).to_contain_text("Coffee 9 will not come again.")
    expect(why).to_contain_text("Left out: it is marked as not interesting.")
    dialog.get_by_role("button", name="Undo “not interested”").click()
    expect(why).to_contain_text("Recommended: number")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    # its card was drawn anew meanwhile
    expect(opener).to_be_focused()
    opener.click()
    page.get_by_role("button", name="Close").click()
    expect(opener).to_be_focused()
    line(page, "What this person had", "Coffee 3").get_by_role("button").click()
    expect(page.get_by_role("region", name="Why, or why not")).to_contain_text(
        "Left out: this person has had it already."
    )


def test_why_a_next_purchase_tells_the_habit_and_what_the_score_is_made_of(visit, service):
    page = visit.person("#user=3&task=next_purchase")
    page.get_by_role("list", name="Recommendations").get_by_role("button", name="Coffee 4", exact=True).click()
    why = page.get_by_role("dialog", name="Coffee 4").get_by_role("region", name="Why, or why not")
    expect(why).to_contain_text("This person had it 3 times, last on 27 Jan.")
    expect(why.get_by_role("heading", name="What the score is made of")).to_be_visible()
    expect(why.get_by_role("heading", name="Where the taste comes from")).to_be_visible()
    signals = service.get(f"/explain/3/{FIRST + 4}?task=next_purchase")[2]["signals"]
    rows = why.get_by_role("list").first.get_by_role("listitem")
    intercept = signals.pop("intercept")
    assert intercept == -1  # which all items have in common, and the page leaves out
    expect(rows).to_have_count(sum(abs(value) > 1e-4 for value in signals.values()))


def test_a_person_is_forgotten_after_a_question(visit, service):
    page = visit.person("#user=11")
    page.get_by_role("button", name=f"Add to basket: {names(page)[0]}", exact=True).click()
    expect(page.get_by_role("list", name="In the basket").get_by_role("listitem")).to_have_count(1)
    page.get_by_role("button", name="Forget this person").click()
    question = page.get_by_role("dialog", name="Forget person 11?")
    expect(question.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Enter")
    expect(question).to_be_hidden()
    assert len(service.get("/users/11/history")[2]["history"]) == 7
    page.get_by_role("button", name="Forget this person").click()
    question.get_by_role("button", name="Forget for good").click()
    said(page, re.compile("Person 11 is forgotten."))
    expect(step(page)).to_have_text("Popular")
    expect(page.get_by_text("Empty. Add an item")).to_be_visible()
    expect(page.get_by_role("region", name="History")).to_contain_text("Nothing is known of this person.")
    assert service.get("/users/11/history")[2]["history"] == []
    assert (
        service.get("/recommend/11?n=24")[2]["recommendations"]
        == service.get("/recommend/nobody?n=24")[2]["recommendations"]
    )


# --- when something is amiss -----------------------------------------------------------------------------------------


def test_a_service_without_a_model_says_so_and_recovers_by_itself(browser, tmp_path):
    with run_server(tmp_path, tmp_path / "models") as server:
        visit = Visit(browser, f"http://127.0.0.1:{server.port}/")
        page = visit.go("#user=1")
        banner = page.get_by_role("alert")
        expect(banner).to_contain_text("Not ready.")
        expect(banner).to_contain_text("No model is live")
        expect(page.get_by_text("No recommendations for now")).to_be_visible()
        publish_shop(tmp_path / "models")
        expect(titles(page)).to_have_count(12, timeout=30_000)
        expect(banner).to_be_hidden()
        visit.context.close()


def test_a_service_that_went_away_is_found_again(browser, tmp_path):
    publish_shop(tmp_path / "models")
    with run_server(tmp_path, tmp_path / "models") as server:
        visit, port = Visit(browser, f"http://127.0.0.1:{server.port}/"), server.port
        page = visit.person("#user=1")
    page.get_by_role("radio", name="Next purchase").check()
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    page.get_by_role("button", name="Try now").click()
    expect(page.get_by_role("alert")).to_be_visible()
    with run_server(tmp_path, tmp_path / "models", port=port):
        expect(step(page)).to_have_text("Next purchase", timeout=30_000)
        expect(page.get_by_role("alert")).to_be_hidden()
        visit.context.close()


def new_key(folder, scope):
    """A key of the service, made as its owner makes one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PRODUCT_RECS_API_KEYS_FILE": str(folder / "keys.json")}
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from product_recs.jobs.cli import main; main()",
            "keys",
            "add",
            scope,
            "--scope",
            scope,
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return re.search(r"pr_[\w-]{32,}", run.stdout)[0]


def test_a_key_is_asked_for_and_kept_in_this_tab_only(browser, tmp_path):
    publish_shop(tmp_path / "models")
    reader, writer = new_key(tmp_path, "read"), new_key(tmp_path, "write")
    with run_server(tmp_path, tmp_path / "models", auth="on", api_keys_file=tmp_path / "keys.json") as server:
        visit = Visit(browser, f"http://127.0.0.1:{server.port}/")
        page = visit.go("#user=1")
        field = page.get_by_role("textbox", name="API key")
        expect(page.get_by_role("heading", name="This service asks for a key")).to_be_visible()
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.get_by_role("heading", name="The key was not accepted")).to_be_visible()
        field.fill(reader)
        field.press("Enter")
        visit.ready()
        expect(field).to_be_hidden()
        wanted = names(page)[0]
        page.get_by_role("button", name=f"Add to basket: {wanted}", exact=True).click()
        said(page, "Not saved. Not allowed")
        expect(page.get_by_text("Empty. Add an item")).to_be_visible()
        page.get_by_role("button", name="API key").click()
        field.fill(writer)
        page.get_by_role("button", name="Use this key").click()
        visit.ready()
        page.get_by_role("button", name=f"Add to basket: {wanted}", exact=True).click()
        expect(line(page, "In the basket", wanted)).to_be_visible()
        assert page.evaluate("localStorage.length") == 0 and visit.context.cookies() == []
        assert not any(key in url for key in (reader, writer) for url in visit.asked)
        page.reload()
        visit.ready()
        visit.context.close()


class Proxy(BaseHTTPRequestHandler):
    """A reverse proxy that gives the service the prefix /shop, which the service itself does not see."""

    target = 0

    def do_GET(self):
        self._forward("GET")

    def do_POST(self):
        self._forward("POST")

    def do_DELETE(self):
        self._forward("DELETE")

    def _forward(self, method):
        if not self.path.startswith("/shop/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=20)
        connection.request(
            method, self.path.removeprefix("/shop"), body, {"Content-Type": self.headers.get("content-type", "")}
        )
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_behind_a_path_prefix(browser, service):
    handler = type("ToService", (Proxy,), {"target": service.port})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        visit = Visit(browser, f"http://127.0.0.1:{proxy.server_port}/shop/")
        page = visit.person("#guest")
        page.get_by_role("button", name="Add to basket: Coffee 5", exact=True).click()
        expect(step(page)).to_have_text("This visit")
        assert visit.wrong == [] and all("/shop/" in url for url in visit.asked)
        visit.context.close()
    finally:
        proxy.shutdown()
        proxy.server_close()


# --- for everybody ---------------------------------------------------------------------------------------------------

CHECKS = r"""() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = colour => { const [r, g, b] = colour.map(v => { v /= 255;
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + .05) / (y + .05); };
  const ground = element => { const layers = []; for (let e = element; e;
    e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); layers.push(c);
    if (c[3] === 1) break; }
    return layers.reverse().reduce((under, top) => over(top, under),
      rgba(matchMedia('(prefers-color-scheme: dark)').matches ? '#000' : '#fff')); };
  const seen = element => { const box = element.getBoundingClientRect();
    return element.checkVisibility({visibilityProperty: true}) && box.width > 1 && box.height > 1; };
  const scope = document.querySelector('dialog[open]') ?? document;
  const weak = [], tooSmall = [];
  const judge = (element, colour, background, what) => {
    const style = getComputedStyle(element), size = parseFloat(style.fontSize),
      large = size >= 24 || size >= 18.66 && parseInt(style.fontWeight) >= 700;
    const found = contrast(over(rgba(colour), background), background);
    if (found < (large ? 3 : 4.5)) weak.push(`${found.toFixed(2)} ${what}`);
  };
  const walker = document.createTreeWalker(scope === document ? document.body : scope, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
    const hidden = element.closest('.hide, noscript, script, option') || element.matches(':disabled');
    if (!text || !seen(element) || hidden) continue;
    judge(element, getComputedStyle(element).color, ground(element), text.slice(0, 40));
    const tile = element.closest('.tile');
    if (tile) judge(element, getComputedStyle(element).color, rgba(getComputedStyle(tile.querySelector('svg')).fill),
      `tile ${tile.className} ${text}`);
  }
  for (const field of scope.querySelectorAll('input[placeholder]')) if (seen(field)) judge(field,
    getComputedStyle(field, '::placeholder').color, ground(field), field.placeholder);
  // the edge of a field must be seen too
  for (const field of scope.querySelectorAll('input:not([type=radio], [type=checkbox])')) if (seen(field)) {
    const found = contrast(rgba(getComputedStyle(field).borderColor), ground(field.parentElement));
      if (found < 3) weak.push(`${found.toFixed(2)} edge of ${field.id}`); }
  for (const control of scope.querySelectorAll('button, a[href], input, summary')) {
    const box = (control.closest('label') ?? control).getBoundingClientRect();
    if (seen(control) && !control.closest('p') &&
      (box.width < 24 || box.height < 24)) tooSmall.push(control.outerHTML.slice(0, 80));
  }
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  const levels = [...scope.querySelectorAll('h1, h2, h3, h4')].filter(seen).map(e => Number(e.tagName[1]));
  return {weak, tooSmall, twice: ids.filter((id, at) => ids.indexOf(id) !== at), levels,
          inline: [...document.querySelectorAll('[onclick], [onload], style, script:not([src])')].length,
            width: [document.documentElement.scrollWidth, innerWidth]};
}"""
CONTROLS = {
    "button",
    "link",
    "textbox",
    "searchbox",
    "combobox",
    "radio",
    "checkbox",
    "switch",
    "dialog",
    "region",
    "listbox",
}


def audit(page):
    """What a checker of accessibility looks for, from the browser's own accessibility tree and the computed styles."""
    report = page.evaluate(CHECKS)
    assert report["weak"] == [] and report["tooSmall"] == [] and report["twice"] == [] and report["inline"] == 0
    assert report["width"][0] <= report["width"][1]
    # no heading skips a level, the first one aside
    assert all(after <= before + 1 for before, after in zip(report["levels"], report["levels"][1:])), report["levels"]
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") in CONTROLS]
    assert len(controls) >= 3
    assert [node["role"]["value"] for node in controls if not node.get("name", {}).get("value", "").strip()] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (360, 740)], ids=["desktop", "phone"])
def test_everybody_can_use_it(browser, service, scheme, size):
    visit = Visit(
        browser,
        f"http://127.0.0.1:{service.port}/",
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,
    )
    page = visit.person("#user=7&task=next_purchase")
    expect(page.get_by_role("list", name="What this person had").get_by_role("listitem")).to_have_count(6)
    audit(page)
    page.get_by_role("searchbox", name="Find an item").fill("coffee 1")
    page.get_by_role("button", name="Add to basket: Coffee 1", exact=True).first.click()
    expect(page.get_by_role("list", name="In the basket").get_by_role("listitem")).to_have_count(1)
    page.get_by_role("button", name="API key").click()
    audit(page)
    titles(page).first.get_by_role("button").click()
    expect(page.get_by_role("list", name="Similar items")).to_be_visible()
    expect(page.get_by_role("region", name="Why, or why not").get_by_role("listitem").first).to_be_visible()
    audit(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Forget this person").click()
    audit(page)
    assert visit.wrong == []
    visit.context.close()


def test_landmarks_and_the_order_of_the_keyboard(visit):
    page = visit.person("#user=8")
    for role in ("banner", "main", "contentinfo", "navigation", "search"):
        expect(page.get_by_role(role)).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the recommendations")).to_be_focused()
    order = []
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break  # past the last one
        order.append(
            page.evaluate(
                "(e => e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText)(document.activeElement)"
            ).strip()
        )
        assert page.evaluate(
            "(s => s.outlineStyle !== 'none' || getComputedStyle(document.activeElement, '::after').outlineStyle !== "
            "'none' || document.activeElement.matches('[type=radio]'))(getComputedStyle(document.activeElement))"
        ), order[-1]
    top = names(page)[0]
    wanted = [
        "API key",
        "API docs",
        "Choose a person",
        "Show",
        "Start as a guest",
        "Something new",
        top,
        f"Add to basket: {top}",
        f"Not interested: {top}",
        "Find an item",
        "Forget this person…",
    ]
    assert [order.index(name) for name in wanted] == sorted(order.index(name) for name in wanted)
    # the link skips what stands before the list, and leaves the address as it is
    page.get_by_role("link", name="Skip to the recommendations").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Recommended")).to_be_focused()
    expect(page).to_have_url(re.compile("#user=8$"))


def test_nothing_scrolls_sideways_on_the_smallest_screens(browser, service):
    for width in (320, 360, 600, 861, 1081):
        visit = Visit(browser, f"http://127.0.0.1:{service.port}/", viewport={"width": width, "height": 700})
        page = visit.person("#user=9")
        page.get_by_role("combobox", name="Choose a person").fill("a" * 80)
        page.get_by_role("button", name="Show").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("aaaa")
        visit.ready()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        visit.context.close()


def test_the_policy_allows_nothing_from_elsewhere_and_nothing_inline(service):
    for path, kind in (
        ("/", "text/html"),
        ("/static/app.js", "text/javascript"),
        ("/static/style.css", "text/css"),
        ("/static/icon.svg", "image/svg+xml"),
    ):
        status, headers, body = service.get(path)
        assert (
            status == 200
            and headers["content-type"].startswith(kind)
            and headers["x-content-type-options"] == "nosniff"
        )
        assert re.findall(rb"""(?:src|href|url\()=?["']?(?:https?:)?//""", body) == []
    policy = service.get("/")[1]["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    for path in ("/static/nothing.js", "/static/../core.py", "/static/%2e%2e/core.py", "/static/..%2fcore.py"):
        assert service.get(path)[0] == 404


@pytest.mark.slow
def test_a_built_wheel_holds_the_page(wheel):
    assert {f"product_recs/web/page/{name}" for name in ("index.html", "app.js", "style.css", "icon.svg")} <= set(
        zipfile.ZipFile(wheel).namelist()
    )


# --- the rules of the shop -------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path, browser):
    publish_shop(tmp_path / "models")
    with run_server(tmp_path, tmp_path / "models") as running:
        opened = Visit(browser, f"http://127.0.0.1:{running.port}/")
        yield opened, running
        opened.context.close()
        # a refused document is a 422, which the browser notes
        assert [text for text in opened.wrong if "422" not in text] == []


def side(page, name):
    return page.get_by_role("list", name=name).get_by_role("listitem")


def test_a_rule_is_written_tried_and_saved(shop):
    visit, service = shop
    page = visit.person("#user=1")
    rules = page.get_by_role("region", name="Rules of the shop")
    expect(rules).to_contain_text("None. Lists are as the model makes them.")
    editor = rules.get_by_role("textbox", name="Document, as JSON")
    tea = FIRST + EACH + 3
    editor.fill(f'{{"rules": [{{"name": "tea on top", "pin": 1, "items": [{tea}], "places": ["home"]}}]}}')
    expect(rules).to_contain_text("These rules are sound. They are not saved yet.")
    expect(rules).to_contain_text("“tea on top” does nothing here: it is for the place home.")
    rules.get_by_role("textbox", name="Place").fill("home")
    expect(side(page, "With these rules").first).to_contain_text("Tea 3")
    expect(side(page, "With these rules").first).to_contain_text("tea on top")
    expect(side(page, "Without rules").first).to_contain_text("Coffee 6")
    assert service.get("/rules")[2]["source"] == "none"
    rules.get_by_role("button", name="Save for all customers").click()
    said(page, "The rules are saved.")
    expect(rules.get_by_role("list", name="Rules", exact=True)).to_contain_text(f"Place 1: item {tea}")
    document = service.get("/rules")[2]["document"]
    assert document["rules"][0]["items"] == [tea]  # above what JavaScript's own numbers hold
    assert service.get("/recommend/1?n=1&place=home")[2]["recommendations"] == [tea]
    rules.get_by_role("button", name="Take away").click()
    said(page, "Taken away.")
    assert service.get("/rules")[2]["source"] == "none"


def test_a_slip_of_the_pen_is_told_and_not_saved(shop):
    visit, service = shop
    page = visit.person("#user=1")
    rules = page.get_by_role("region", name="Rules of the shop")
    editor = rules.get_by_role("textbox", name="Document, as JSON")
    editor.fill('{"rules": [{"name": "top", "pin": 0, "items": [1]}]}')
    expect(rules.get_by_role("status")).to_have_text(re.compile("Rule 'top': pin: 0 is no place"))
    expect(editor).to_have_attribute("aria-invalid", "true")
    editor.fill('{"rules": [')
    expect(rules.get_by_role("status")).to_contain_text("Not readable as JSON")
    rules.get_by_role("button", name="Undo changes").click()
    rules.get_by_role("button", name="+ Boost").click()
    expect(editor).to_have_value(re.compile("summer sale"))
    expect(editor).to_have_attribute("aria-invalid", "false")
    assert service.get("/rules")[2]["source"] == "none"


def test_a_list_says_which_rule_worked_on_it(shop):
    visit, service = shop
    tea = FIRST + EACH + 3
    assert service.ask("PUT", "/rules", {"rules": [{"name": "<b>tea</b> on top", "pin": 1, "items": [tea]}]})[0] == 200
    page = visit.person("#user=1")
    expect(page.get_by_role("list", name="Recommendations").get_by_role("listitem").first).to_contain_text(
        "<b>tea</b> on top"
    )
    page.get_by_role("button", name="Tea 3", exact=True).first.click()
    expect(page.get_by_role("dialog")).to_contain_text("Pinned to place 1 by the rule")
    assert page.evaluate(
        "![...document.querySelectorAll('.cards .ruled, .ruled-list, .rules')].some(one => one.querySelector('b'))"
    )


# --- a product that is added by hand ---------------------------------------------------------------------------------

NEW = 900001
HARM = '<img src=x onerror="window.harmed = 1">'


@pytest.fixture(scope="module")
def placing_models(tmp_path_factory):
    "A model of the sample that scores items by their attributes."
    folder = tmp_path_factory.mktemp("placing")
    train(folder, content="always", next_model="none")
    return folder / "models"


@pytest.fixture(scope="module")
def garden(tmp_path_factory, placing_models):
    with run_server(tmp_path_factory.mktemp("garden"), placing_models) as running:
        yield running


@pytest.fixture
def gardener(browser, garden):
    opened = Visit(browser, f"http://127.0.0.1:{garden.port}/")
    yield opened
    opened.context.close()
    assert opened.wrong == []


def describe(page, **fields):
    "Fill in the form; the fields are there as soon as it is in sight."
    form = page.get_by_role("region", name="New product")
    form.scroll_into_view_if_needed()
    for label, value in fields.items():
        form.get_by_label(label.replace("_", " "), exact=True).fill(str(value))
    return form


def reached(service):
    "Place of the new item in the list of each person of the page's sample who has it."
    users = service.get("/users?limit=200")[2]["users"]
    results = service.ask("POST", "/recommend", {"users": users, "n": 20})[2]["results"]
    lists = {result["user_id"]: result["recommendations"] for result in results}
    return {user: items.index(NEW) + 1 for user, items in lists.items() if NEW in items}


def test_a_product_added_by_hand_shows_whom_it_reaches_until_it_is_deleted(gardener, garden):
    page = gardener.person("#user=2")
    form = describe(page, Item_id=NEW, Title="Herb scissors", Category="garden", Brand="Dogwood", Price=12.5)
    assert "garden" in form.locator("datalist option").evaluate_all("all => all.map(one => one.value)")
    form.get_by_role("button", name="Add", exact=True).click()
    expect(form.get_by_role("status")).to_have_text("Herb scissors is added.")
    expect(form).to_contain_text("Accepted and placed.")
    similar = form.get_by_role("list", name="Similar items").get_by_role("listitem")
    titles = [item["title"] for item in garden.get(f"/similar/{NEW}?n=6&detail=true")[2]["items"]]
    expect(similar.get_by_role("button")).to_have_text(titles)
    # the table is what the service answers, the best places first
    places = reached(garden)
    rows = form.get_by_role("table", name="Whom it reaches").get_by_role("row")
    expect(rows).to_have_count(11)
    shown = [row.split("\t")[:2] for row in rows.all_inner_texts()[1:]]
    assert all(places[int(person)] == int(place) for person, place in shown)
    assert [int(place) for _, place in shown] == sorted(places.values())[:10]
    expect(form).to_contain_text(f"{len(places)} · ")
    form.get_by_role("button", name=f"Show all {len(places)}").click()
    expect(rows).to_have_count(len(places) + 1)
    # what it has in common with what the first of them had: things of the garden
    person = int(shown[0][0])
    why = [reason for reason in garden.get(f"/explain/{person}/{NEW}")[2]["why"] if reason["contribution"] > 0][:2]
    expect(rows.nth(1)).to_contain_text(f"They had {why[0]['title']} and {why[1]['title']}.")
    facts = [garden.get(f"/items/{reason['item_id']}")[2]["attributes"] for reason in why]
    assert [fact["category"] for fact in facts] == ["garden"] * 2
    # another kind reaches others, and none once it is deleted
    describe(page, Category="coffee", Title="Dark roast").get_by_role("button", name="Change").click()
    expect(form.get_by_role("status")).to_have_text("Dark roast is changed.")
    expect(form).to_contain_text("of 360 people asked")
    assert reached(garden).keys() != places.keys()
    form.get_by_role("button", name="Delete").click()
    expect(form).to_contain_text("Gone. The search does not find it, and none of 200 people has it in their list.")
    expect(form.get_by_role("table")).to_have_count(0)
    assert reached(garden) == {} and garden.get(f"/items/{NEW}")[0] == 404


def test_a_product_that_is_refused_says_which_field_is_wrong(gardener, garden):
    page = gardener.person("#user=2")
    form = describe(page, Item_id=NEW, Price="cheap")
    form.get_by_role("button", name="Add", exact=True).click()
    expect(form.get_by_role("status")).to_have_text("Not added: see “Price”.")
    price = form.get_by_label("Price", exact=True)
    expect(price).to_be_focused()
    expect(price).to_have_attribute("aria-invalid", "true")
    expect(form).to_contain_text("Must be a number, and not below 0.")
    describe(page, Item_id="ten").get_by_role("button", name="Add", exact=True).click()
    expect(form.get_by_role("status")).to_have_text("Not added: see “Price”.")
    describe(page, Price=3).get_by_role("button", name="Add", exact=True).click()
    expect(form.get_by_label("Item id")).to_have_attribute("aria-invalid", "true")
    expect(form).to_contain_text("Is text, but the ids of this run are whole numbers")
    describe(page, Item_id="").get_by_role("button", name="Add", exact=True).click()
    expect(form).to_contain_text("An id is needed")
    # an id that somebody has is known before anything is told of it
    describe(page, Item_id=101, Price="")
    expect(form).to_contain_text("Known already as “Classic Espresso Beans”.")
    expect(form.get_by_label("Brand", exact=True)).to_have_value("Elm")
    assert garden.get("/model")[2]["products"]["told"] == 0


def test_an_item_that_is_shown_to_learn_about_it_says_so(browser, placing_models, tmp_path):
    with run_server(tmp_path, placing_models, explore=0.3) as running:
        explored = []
        for user in range(1, 30):
            items = running.get(f"/recommend/{user}?n=12&detail=true")[2]["items"]
            if explored := [item["title"] for item in items if item.get("explored")]:
                break
        visit = Visit(browser, f"http://127.0.0.1:{running.port}/")
        page = visit.person(f"#user={user}")
        page.get_by_role("button", name=explored[0], exact=True).first.click()
        expect(page.get_by_role("dialog")).to_contain_text("Shown to learn about it")
        visit.context.close()


def test_names_and_values_of_a_new_product_are_never_markup(browser, tmp_path):
    publish_shop(tmp_path / "models", **{f"taste {HARM}": np.array([HARM, "mild"] * EACH, object)})
    with run_server(tmp_path, tmp_path / "models") as running:
        visit = Visit(browser, f"http://127.0.0.1:{running.port}/")
        page = visit.person("#user=1")
        form = describe(page, **{"Item_id": NEW, "Title": f"Tea {HARM}", f"Taste {HARM.lower()}": HARM})
        assert HARM in form.locator("datalist option").evaluate_all("all => all.map(one => one.value)")
        form.get_by_role("button", name="Add", exact=True).click()
        # this model knows items by who had them
        expect(form).to_contain_text("The model that answers does not score it")
        expect(form).to_contain_text("Nobody of them has it in their list.")
        expect(form.get_by_role("status")).to_have_text(f"Tea {HARM} is added.")
        expect(form.get_by_role("definition").filter(has_text=HARM)).to_have_count(2)
        form.get_by_role("button", name="Delete").click()
        expect(form).to_contain_text("Gone.")
        # its name stands in the message of what is wrong with it
        describe(page, **{f"Taste {HARM.lower()}": "x" * 20_000}).get_by_role("button", name="Add", exact=True).click()
        expect(form.get_by_role("status")).to_have_text(f"Not added: see “Taste {HARM.lower()}”.")
        assert page.evaluate("window.harmed === undefined && !document.querySelector('main img, dialog img')")
        assert visit.wrong == []
        visit.context.close()
