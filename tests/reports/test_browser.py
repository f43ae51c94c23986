"""report.html in a real browser: it draws, sorts, fits a phone, turns dark, and loads nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemblekit.reports import render

from .browser import CHROMIUM, DRIVER, ENTER, Browser
from .comparisons import COMPARISONS, from_json

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)

FIRST_COLUMN = "return [...document.querySelectorAll('#candidates-table tbody th')].map(c => c.firstChild.data)"
GAIN = "#candidates-table th:nth-child(4)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name in COMPARISONS:
        found[name] = folder / f"{name}.html"
        found[name].write_text(render("report.html", from_json(name)), encoding="utf-8")
    return found


@pytest.fixture
def usual(browser: Browser, pages: dict[str, Path]) -> Browser:
    browser.look()
    browser.open(pages["classification"])
    return browser


def column(browser: Browser, number: int) -> list[Any]:
    cells = f"#candidates-table tbody tr:not([hidden]) :nth-child({number}):is(td, th)"
    return list(
        browser.run(
            f"return [...document.querySelectorAll('{cells}')]"
            ".map(c => 'value' in c.dataset ? Number(c.dataset.value) : null)"
        )
    )


@pytest.mark.parametrize("name", COMPARISONS)
def test_loads_alone_and_without_errors(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.look()
    browser.open(pages[name])
    assert browser.log("browser") == []
    assert browser.requests() == [pages[name].as_uri()]


@pytest.mark.parametrize("name, plots", [("classification", 6), ("many", 6), ("regression", 3)])
def test_plots_have_a_size(browser: Browser, pages: dict[str, Path], name: str, plots: int) -> None:
    browser.look()
    browser.open(pages[name])
    sizes = browser.run(
        "return [...document.querySelectorAll('figure > svg')]"
        ".map(s => [s.getBoundingClientRect().width, s.getBBox().height])"
    )
    assert len(sizes) == plots
    assert all(width > 300 and height > 200 for width, height in sizes)


@pytest.mark.parametrize("name", COMPARISONS)
def test_texts_stay_inside_of_plots(browser: Browser, pages: dict[str, Path], name: str) -> None:
    for width in (360, 1200):
        browser.look(width=width)
        browser.open(pages[name])
        outside = browser.run(
            "return [...document.querySelectorAll('figure > svg text')].filter(t => {"
            "const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();"
            "return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 ||"
            "a.bottom > b.bottom + 1}).map(t => t.textContent)"
        )
        assert outside == []


def test_table_sorts_by_click(usual: Browser) -> None:
    best_first = usual.run(FIRST_COLUMN)
    usual.click(f"{GAIN} button")
    assert usual.run(f"return document.querySelector('{GAIN}').ariaSort") == "descending"
    gains = column(usual, 4)
    known = [gain for gain in gains if gain is not None]
    assert known == sorted(known, reverse=True)
    assert gains[-1] is None  # the baseline has no gain over itself
    usual.click(f"{GAIN} button")
    assert usual.run(f"return document.querySelector('{GAIN}').ariaSort") == "ascending"
    known = [gain for gain in column(usual, 4) if gain is not None]
    assert known == sorted(known)
    assert sorted(usual.run(FIRST_COLUMN)) == sorted(best_first)


def test_table_sorts_by_keyboard(usual: Browser) -> None:
    usual.press("#candidates-table th:first-child button", ENTER)
    assert usual.run("return document.activeElement.textContent") == "candidate"
    assert usual.run("return document.querySelectorAll('[aria-sort]').length") == 1
    names = usual.run(FIRST_COLUMN)
    assert names.index("ensemble, best 2") < names.index("ensemble, best 10")
    outline = usual.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_filter_by_kind(usual: Browser) -> None:
    usual.press(".tools select", "single")
    shown = usual.run(
        "return [...document.querySelectorAll('#candidates-table tbody tr')]"
        ".filter(r => r.offsetHeight).map(r => r.dataset.kind)"
    )
    assert shown == ["single"] * 10
    assert usual.run("return document.querySelector('[role=status]').textContent") == (
        "10 of 53 shown"
    )


def test_command_is_copied_or_selected(usual: Browser) -> None:
    usual.click("#decision .copy button")
    done = "return document.querySelector('#decision .copy button').textContent"
    patience = time.monotonic() + 10  # the clipboard answers in its own time
    while usual.run(done) == "Copy" and time.monotonic() < patience:
        time.sleep(0.05)
    assert usual.run(done) in ("Copied", "Selected")
    assert usual.run("return getSelection().toString()").startswith("ensemblekit average")


@pytest.mark.parametrize("name", COMPARISONS)
def test_phone_scrolls_only_downwards(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.look(width=360)
    browser.open(pages[name])
    assert browser.run("return innerWidth") == 360
    assert browser.run("return document.documentElement.scrollWidth") == 360
    assert browser.run("scrollTo(50, 0); return scrollX") == 0


def brightness(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_can_be_read(browser: Browser, pages: dict[str, Path], dark: bool) -> None:
    browser.look(dark=dark)
    browser.open(pages["classification"])
    page = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (brightness(page) < 0.1) is dark
    panel = browser.run(
        "return getComputedStyle(document.querySelector('#decision')).backgroundColor"
    )
    texts = ["body", "header p", "nav a", "small", "dt", "dd", "figcaption", "th button"]
    for css in texts:
        colour = browser.run(f"return getComputedStyle(document.querySelector('{css}')).color")
        assert min(contrast(colour, page), contrast(colour, panel)) >= 4.5, css
    for css in [".mark.single", ".mark.averaged", ".mark.ensemble", ".line.s1", ".line.s2"]:
        what = "stroke" if css.startswith(".line") else "fill"
        colour = browser.run(f"return getComputedStyle(document.querySelector('{css}')).{what}")
        assert contrast(colour, page) >= 3, css
    badge = "getComputedStyle(document.querySelector('.badge.ships'))"
    colours = browser.run(f"return [{badge}.color, {badge}.backgroundColor]")
    assert contrast(*colours) >= 4.5
    cell = "getComputedStyle(document.querySelector('rect.h7'))"
    label = "getComputedStyle(document.querySelector('rect + text'))"
    assert contrast(*browser.run(f"return [{cell}.fill, {label}.fill]")) >= 4.5


def test_print_is_light_and_complete(browser: Browser, pages: dict[str, Path]) -> None:
    browser.look(dark=True, media="print")
    browser.open(pages["many"])
    page = browser.run("return getComputedStyle(document.body).getPropertyValue('--page')")
    assert page.strip() == "#ffffff"
    box = "document.querySelector('.scroll')"
    assert browser.run(f"return {box}.scrollHeight <= {box}.clientHeight + 2")


def test_hostile_names_do_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    browser.look()
    browser.open(pages["hostile"])
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return document.images.length") == 0
    assert "<script>alert(1)</script>" in browser.run(FIRST_COLUMN)


def test_skip_link_shows_when_focused(usual: Browser) -> None:
    place = "const r = document.querySelector('.skip').getBoundingClientRect(); return r.left"
    assert usual.run(place) < 0
    usual.run("document.querySelector('.skip').focus()")
    assert usual.run(place) >= 0
