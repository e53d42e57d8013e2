"""Figures, tables and pages of a report at 3, 30 and 300 groups, 10 and 10 million rows, with long names and with none;
in the light, in the dark, on paper and on a telephone."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from product_recs.core.plots import PALETTE, bars, clashes, curves, drawing, histograms, points, scatter, timeline
from product_recs.core.text import natural_order, shown_table
from product_recs.jobs.reports import to_html

LONG = "an endless name of a department $x^{$ _ <b> that differs at its end: "
MANY = 10_000_000


def linear(parts):
    "Red, green and blue of a screen, 0 to 1, as amounts of light."
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def named(count, long):
    return [f"{LONG if long else 'g'}{place}" for place in range(count)]


def of_groups(names):
    "A figure with an interval for each name, of 6 to ten million users, for two models."
    rng = np.random.default_rng(0)
    rows = [
        {"group": name, "series": series, "value": value, "low": value - 0.1, "high": value + 0.1, "size": size}
        for name, size in zip(names, np.geomspace(6, MANY, max(len(names), 1)).astype(int))
        for series, value in zip((f"ALS {LONG}", "popularity"), rng.random(2))
    ]
    return pd.DataFrame(rows, columns=["group", "series", "value", "low", "high", "size"])


def of_days(days, kinds=1, rows=10, start="2026-01-01"):
    "So many rows a day, of each kind."
    times = pd.date_range(start, periods=days)
    names = [f"{LONG}{kind}" for kind in range(kinds)]
    return pd.DataFrame({"time": np.tile(times, kinds), "rows": rows, "kind": np.repeat(np.array(names, object), days)})


def every_kind(groups, long, rows):
    "One figure of each kind."
    names = named(groups, long)
    figures = of_groups(names)
    k = [1, 5, 10, 50]
    lines = {name: (k, np.linspace(0, 1, 4) * place / max(groups, 1)) for place, name in enumerate(names)}
    places = pd.DataFrame({"x": np.linspace(1, rows, groups), "y": np.linspace(0, 1, groups) ** 2, "name": names})
    panels = "Discovery (new to the user)", "Next purchase (any item)"
    yield "bars", bars(dict.fromkeys(names, rows), f"Rows by {LONG}")
    yield "points", points(dict.fromkeys(panels, figures), "NDCG@10", f"By {LONG}")
    yield "points of panels apart", points({panels[0]: figures, panels[1]: figures.iloc[2:]}, "NDCG@10")
    yield "curves", curves(dict.fromkeys(panels, lines), "k", "NDCG@k", f"By {LONG}", names[:2], log=True, ticks=k)
    yield "curves with a legend", curves(dict.fromkeys(panels, lines), "k", "y", "", names[:5], ends=False)
    yield "scatter", scatter(dict.fromkeys(panels, places), "coverage, %", "NDCG@10", LONG, names[:2], log="x")
    yield "points without names", scatter({"": places[["x", "y"]]}, "coverage, %", "NDCG@10", log="xy")
    yield "timeline", timeline(of_days(200, groups, rows), LONG, marked={"validation": ("2026-06-01", None)})
    counts = np.geomspace(1, rows, groups).astype(int)
    yield "histograms", histograms({f"{LONG}{n}": (counts, "items of the user", "users") for n in range(3)}, LONG)


@pytest.mark.parametrize(
    ("groups", "long", "rows"),
    [(1, False, 10), (3, True, MANY), (30, False, MANY), (30, True, 10), (300, False, 10), (300, True, MANY)],
)
def test_no_word_touches_another_or_leaves_the_figure(groups, long, rows):
    wrong = {kind: problems[:4] for kind, picture in every_kind(groups, long, rows) if (problems := clashes(picture))}
    assert wrong == {}


def test_without_data_there_are_words_and_no_picture():
    for kind, picture in every_kind(0, False, 10):
        assert picture.figure is None and set(picture._repr_mimebundle_()) == {"text/plain"}, kind


def test_the_check_finds_what_lies_on_each_other_and_outside():
    with drawing("", height=2) as crowded:
        [ax] = crowded.axes
        ax.set_xticks(range(40), [f"a long label {place}" for place in range(40)])
        ax.text(2, 0.5, "far away", transform=ax.transAxes, in_layout=False)
    problems = clashes(crowded)
    assert "'far away' outside" in problems and "'a long label 0' on 'a long label 1'" in problems


@pytest.mark.parametrize(
    ("days", "unit"), [(1, "day"), (3, "day"), (100, "day"), (400, "week"), (1500, "month"), (7305, "month")]
)
def test_a_gap_in_a_timeline_is_a_gap_and_nothing_else_is(days, unit):
    log = of_days(days, start="2024-01-01").drop(columns="kind")  # a Monday, and the first of a month and a year
    whole = timeline(log)
    assert f"by {unit}" in whole.axes[-1].get_xlabel() and "without" not in repr(whole)
    steps, pale = (patch.get_data().values for patch in whole.axes[0].patches[:2])
    assert np.nansum(steps) + np.nansum(pale) == log["rows"].sum()
    assert (np.isnan(steps) == ~np.isnan(pale)).all()  # each period is drawn once
    if days < 100:
        return
    width = {"day": 1, "week": 7, "month": 31}[unit]
    gap = timeline(log[~log["time"].between("2024-02-01", pd.Timestamp("2024-02-01") + pd.Timedelta(days=5 * width))])
    steps, pale = (patch.get_data().values for patch in gap.axes[0].patches[:2])
    missing = np.isnan(steps) & np.isnan(pale)
    assert missing.any() and f"{missing.sum()} {unit}" in repr(gap) and not missing[0] and not missing[-1]


def test_a_period_in_which_the_log_ends_is_pale_and_marked_periods_are_not():
    log = of_days(200, start="2024-01-01").drop(columns="kind")
    picture = timeline(log, marked={"validation": ("2024-05-01", "2024-06-15"), "test": ("2024-06-15", None)})
    _, pale = (patch.get_data().values for patch in picture.axes[0].patches[:2])
    assert np.flatnonzero(~np.isnan(pale)).tolist() == [len(pale) - 1] and "Pale: the last week" in repr(picture)
    words = {text.get_text() for text in picture.axes[0].texts}
    words |= {text.get_text() for legend in picture.figure.legends for text in legend.get_texts()}
    assert {"validation", "test"} <= words


def test_groups_have_their_natural_order_and_only_those_with_one_are_joined():
    ages = ["60-64", "<25", "unknown", "65+", "25-34"]
    for names, wanted, joined in (
        (ages, ["<25", "25-34", "60-64", "65+", "unknown"], True),
        ([10, 9, 100], ["9", "10", "100"], True),
        (["bread", "milk", "tea"], ["tea", "milk", "bread"], False),  # by size
    ):
        ax = points({"": of_groups(names)}, "NDCG@10").axes[0]
        assert [label.get_text() for label in ax.get_yticklabels()] == wanted
        assert any(len(line.get_xdata()) > 2 for line in ax.lines) == joined
    assert natural_order(["a10", "a2", "B1"]) == ["a2", "a10", "B1"]


def test_colours_are_told_apart_by_the_colour_blind_and_in_grey():
    # what protanopes, deuteranopes and tritanopes see (Machado, Oliveira and Fernandes 2009, severity 1)
    seen_by = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    for kind, matrix in seen_by.items():
        seen = [np.array(matrix) @ linear(np.array(to_rgb(colour))) for colour in PALETTE]
        nearest = min(np.linalg.norm(a - b) for place, a in enumerate(seen) for b in seen[place + 1 :])
        assert nearest > 0.1, kind


def test_a_table_is_for_people():
    frame = pd.DataFrame(
        {
            "item_id": [1469307],
            "rows_rejected": [1469307],
            "coverage": [0.30646],
            "path": [Path("data/a.csv")],
        }
    )
    html = shown_table(frame, percent=["coverage"]).html
    for text in (">1469307<", ">1,469,307<", ">30.6%<", ">rows rejected<", ">data/a.csv<"):
        assert text in html
    assert "Path(" not in html and ">0<" not in html


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "A report with everything that can be wide, empty or coloured."
    folder = tmp_path_factory.mktemp("report")
    output = nbformat.v4.new_output
    bundle, about = points({"Discovery": of_groups(named(5, True))}, "NDCG@10", f"For whom {LONG}")._repr_mimebundle_()
    wide = shown_table(pd.DataFrame({f"column_{place}": [f"a value {place}"] for place in range(40)}), "Wide")
    bar = "blend: 100%|███| 16/16 [00:08<00:00, 1.9 models/s]"
    code = [
        ("n = 1", [], ["parameters"]),
        ("quiet = True", [], []),
        ("bar()", [output("stream", name="stderr", text=text) for text in (f"\r{bar}", "\n")], []),
        ("show()", [output("display_data", bundle, metadata=about)], []),
        ("table()", [output("display_data", {"text/html": wide.html, "text/plain": "Wide"})], []),
        ("path()", [output("execute_result", {"text/plain": f"PosixPath('{Path.cwd()}/data')"})], []),
        ("thing()", [output("execute_result", {"text/plain": "<a.Thing object at 0x7f0a1b>"})], []),
        ("words()", [output("display_data", {"text/markdown": "- **ALS** wins."})], ["verdict"]),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n> A promise.\n\nWords."),
        nbformat.v4.new_code_cell("def f(): pass"),
        nbformat.v4.new_markdown_cell(f"## Run\n\n| {' | '.join('abcdefgh' * 9)} |\n|{'---|' * 72}\n\n`{'x' * 300}`"),
        *(
            nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": tags})
            for source, outputs, tags in code
        ),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "report.ipynb")
    return to_html(folder / "report.ipynb", folder / "report.html", "report")


def test_a_page_has_no_empty_boxes_bars_or_reprs(page):
    text = page.read_text()
    for unwanted in ("PosixPath", "models/s", "object at 0x"):
        assert unwanted not in text, unwanted
    # `def f`, and one for each output that says something; the silent cells are in the fold of the next one
    assert text.count('class="code"') == 1 + 4
    assert "@media print" in text and "prefers-color-scheme: dark" in text
    assert text.index("<strong>ALS</strong> wins.") < text.index(">Run") < text.rindex("<strong>ALS</strong> wins.")


def opened(browser, page, **options):
    tab = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options}).new_page()
    tab.goto(page.as_uri())
    return tab


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_page(browser, page, width):
    tab = opened(browser, page, viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    # what is wide is pushed aside in its own box, in which all of it is reached
    table = tab.locator("table", has_text="Wide")
    box = table.locator("xpath=ancestor::*[contains(@class, 'jp-OutputArea-output')]")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX") == "auto"
    picture = tab.locator(".figure img")
    assert picture.bounding_box()["width"] >= min(640, width) and "For whom" in picture.get_attribute("alt")


def contrast(tab, selector):
    "The WCAG contrast of an element's text with the ground that it stands on."
    colours = tab.locator(selector).first.evaluate(
        """element => {
            const text = getComputedStyle(element).color
            let ground = element
            while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement
            return [text, getComputedStyle(ground).backgroundColor] }"""
    )
    lights = []
    for colour in colours:
        shares = colour.startswith("color(srgb")  # what color-mix gives: shares of one, not 0 to 255
        parts = np.array([float(part) for part in re.findall(r"[\d.]+(?:e-?\d+)?", colour)[:3]])
        lights.append(linear(parts if shares else parts / 255) @ [0.2126, 0.7152, 0.0722])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_the_light_and_in_the_dark(browser, page, scheme):
    tab = opened(browser, page, color_scheme=scheme)
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    for selector in ("h1", "p", "td", "th", "caption", "summary", ".found li", "details.parameters .highlight span.n"):
        assert contrast(tab, selector) > 4.5, selector
    turned = tab.locator(".figure img").evaluate("picture => getComputedStyle(picture).filter")
    assert ("invert" in turned) == (scheme == "dark")


def test_paper_has_no_folded_code_and_cuts_nothing(browser, page):
    tab = opened(browser, page, color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.locator("details.code, details.definitions").evaluate_all(
        "folds => folds.every(fold => getComputedStyle(fold).display === 'none')"
    )
    assert tab.locator("tr, .figure").evaluate_all(
        "parts => parts.every(part => getComputedStyle(part).breakInside === 'avoid')"
    )
    assert tab.locator(".figure img").evaluate("picture => getComputedStyle(picture).filter") == "none"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator("table", has_text="Wide").is_visible()
