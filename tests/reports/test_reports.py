"""The three reports: what they say, and that hostile or missing data neither break nor fool them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from ensemblekit.errors import UsageError
from ensemblekit.reports import REPORTS, render

from .comparisons import COMPARISONS, HOSTILE, Json, classification, from_json, hostile, tiny

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements of a page: names, attributes, texts; raises where they are not well nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        self.inside[self.open[-1] if self.open else ""] = data


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def without_code(markdown: str) -> str:
    return re.sub(r"^(`{3,})sh$.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def table(markdown: str) -> list[list[str]]:
    lines = [line for line in without_code(markdown).splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("report", REPORTS)
def test_every_report_of_everything(report: str, name: str) -> None:
    text = render(report, from_json(name))
    assert text.endswith("\n")
    text.encode()


def test_unknown_report() -> None:
    with pytest.raises(UsageError, match=r"unknown report 'report.htm'; valid: report.html") as e:
        render("report.htm", {})
    assert e.value.hint == "did you mean 'report.html'?"


@pytest.mark.parametrize("report", REPORTS)
def test_the_comparison_is_left_alone(report: str) -> None:
    given, same = classification(), classification()
    assert render(report, given) == render(report, same)
    assert given == same


@pytest.mark.parametrize("key", classification())
@pytest.mark.parametrize("value", [None, [], {}, "text", 3], ids=repr)
@pytest.mark.parametrize("report", REPORTS)
def test_any_part_may_be_missing_or_odd(report: str, key: str, value: Any) -> None:
    assert render(report, {**classification(random_rows=0), key: value})


@pytest.mark.parametrize("report", REPORTS)
def test_any_part_of_a_candidate_may_be_missing(report: str) -> None:
    for key in classification()["candidates"][0]:
        given = classification(random_rows=0)
        for candidate in given["candidates"]:
            candidate[key] = None
        assert render(report, given)


def test_not_a_number_is_missing() -> None:
    given = classification(random_rows=0)
    for candidate in given["candidates"]:
        candidate["evaluation"].update(accuracy=float("nan"), nll=float("inf"))
    for report in REPORTS:
        assert not re.search(r"\b(nan|inf)\b", render(report, given).lower())


@pytest.mark.parametrize("name", COMPARISONS)
def test_page_is_well_formed_and_loads_nothing(name: str) -> None:
    page = Page(render("report.html", from_json(name)))
    attributes = [(key, value) for _, found in page.tags for key, value in found.items()]
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "link", "iframe", "object", "use"})
    assert not [key for key, _ in attributes if key.startswith("on") or key in ("src", "style")]
    links = [value for key, value in attributes if key in ("href", "xlink:href", "action")]
    ids = [value for key, value in attributes if key == "id"]
    assert links
    assert {f"#{name}" for name in ids} >= set(links)
    assert len(ids) == len(set(ids))
    css = page.inside["style"]
    assert not re.search(r"url\(|@import|https?:", css)
    assert "http" not in page.inside["script"]


def test_policy_allows_only_our_style_and_script() -> None:
    page = Page(render("report.html", hostile()))
    policies = [found["content"] for tag, found in page.tags if "http-equiv" in found]
    hashed = {
        tag: base64.b64encode(hashlib.sha256(page.inside[tag].encode()).digest()).decode()
        for tag in ("style", "script")
    }
    allowed = "; ".join(f"{tag}-src 'sha256-{digest}'" for tag, digest in hashed.items())
    assert policies == [f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"]
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_hostile_names_are_text() -> None:
    plain, odd = (Page(render("report.html", make())) for make in (no_names, hostile))
    assert {tag for tag, _ in odd.tags} == {tag for tag, _ in plain.tags}
    for name in HOSTILE[:2]:
        assert name in odd.texts
    text = "".join(odd.texts)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\udc80]", text)
    assert r"\u202egnp.exe\udc80" in text


def no_names() -> Json:
    return {**hostile(), "command": ["ensemblekit"]}


def sections(text: str) -> list[str]:
    return [str(found["id"]) for tag, found in Page(text).tags if tag == "section"]


def test_sections_in_order() -> None:
    every = ["decision", "pareto", "candidates", "growth", "reliability", "agreement", "timeline"]
    every += ["diagnosis", "warnings", "provenance"]
    assert sections(render("report.html", classification())) == every
    without = {"reliability", "agreement", "diagnosis"}
    found = sections(render("report.html", from_json("regression")))
    assert found == [name for name in every if name not in without]
    assert sections(render("report.html", tiny())) == ["decision", "candidates", "provenance"]


def test_page_says_what_ships() -> None:
    given = classification()
    page = Page(render("report.html", given))
    ship = given["decision"]["ship"]
    assert given["decision"]["headline"] in page.texts
    assert f"{ship} (averaged)" in page.texts
    marked = [found["class"] for tag, found in page.tags if tag == "tr" and "class" in found]
    assert sorted(marked, key=str) == ["baseline", "ships"]
    command = next(text for text in page.texts if text.startswith("ensemblekit average"))
    assert f"--candidate '{ship}'" in command


@pytest.mark.parametrize("report", ["report.html", "report.md"])
def test_nothing_fits(report: str) -> None:
    assert "no candidate fits the budget" in render(report, tiny())


@pytest.mark.parametrize("report", ["report.html", "report.md"])
def test_too_few_data(report: str) -> None:
    given = classification()
    given["decision"].update(enough_data=False, samples_needed=41000, real=False)
    text = render(report, given)
    assert "41,000 samples would do" in text
    assert "not told apart from none" in text


def test_shares_are_shown_as_percent_and_errors_are_not() -> None:
    given = classification()
    share = given["candidates"][0]["evaluation"]["accuracy"]
    assert f"{100 * share:.2f}%" in render("report.html", given)
    text = render("report.html", from_json("regression"))
    assert "rmse (val)" in text
    shown = "".join(Page(text.replace(Page(text).inside["style"], "")).texts)
    assert set(re.findall(r"([\d.]+)%", shown)) <= {"95", "0.5"}  # intervals, the margin


def test_cost_without_latency() -> None:
    text = render("report.html", from_json("regression"))
    assert "Latency was not measured" in text
    assert "models that run at inference" in text


def test_crowd_names_only_what_matters() -> None:
    given = from_json("many")
    text = render("report.html", given)
    labels = re.findall(r'class="label(?: strong)?">([^<]*)</text>', text)
    special = {c["name"] for c in given["candidates"] if c["pareto"]}
    special |= {given["baseline"], given["decision"]["ship"]}
    assert given["decision"]["ship"] in labels
    assert given["baseline"] in labels
    assert special >= set(labels)


@pytest.mark.parametrize("name", [name for name in COMPARISONS if name != "empty"])
def test_markdown_tables_have_equal_columns(name: str) -> None:
    given = from_json(name)
    found = table(render("report.md", given))
    assert len(found) == len(given["candidates"]) + 2
    assert len({len(row) for row in found}) == 1


def test_markdown_shows_names_as_they_are() -> None:
    text = render("report.md", hostile())
    assert r"a\|b \`c\` \*d\* \[e\](http\://example.com)" in text
    assert r"line one line two\\r \| x \|" in text
    assert {r"- \+1+1", r"- \-2"} <= set(text.splitlines())
    assert "<" not in without_code(text).replace(r"\<", "")


@pytest.mark.parametrize("name", COMPARISONS)
def test_csv_parses_back(name: str) -> None:
    given = from_json(name)
    header, *body = rows(render("candidates.csv", given))
    assert len(body) == len(given.get("candidates", []))
    assert {len(row) for row in body} <= {len(header)}
    assert len(set(header)) == len(header)
    assert (header[0], header[-1]) == ("name", "cost_flops")


def test_csv_has_every_figure() -> None:
    given = classification()
    header, *body = rows(render("candidates.csv", given))
    for row, candidate in zip(body, given["candidates"], strict=True):
        cells = dict(zip(header, row, strict=True))
        val, test = candidate["evaluations"]
        assert float(cells["val_accuracy"]) == val["accuracy"]
        assert float(cells["test_nll"]) == test["nll"]
        ends = [float(cells["test_accuracy_low"]), float(cells["test_accuracy_high"])]
        assert ends == test["accuracy_ci"]
        assert cells["gain"] == (
            "" if candidate["gain"] is None else str(candidate["gain"]["value"])
        )
        assert float(cells["latency_p50_ms"]) == candidate["latency"]["p50_ms"]
        assert cells["cost_bytes"] == str(candidate["cost"]["bytes"])
    marks = [dict(zip(header, row, strict=True)) for row in body]
    assert [c["name"] for c in marks if c["shipped"] == "true"] == [given["decision"]["ship"]]
    assert [c["name"] for c in marks if c["baseline"] == "true"] == [given["baseline"]]


def test_csv_columns_do_not_depend_on_the_order_of_candidates() -> None:
    given = classification()
    del given["candidates"][0]["evaluations"][0]["brier"]
    header = rows(render("candidates.csv", given))[0]
    places = [header.index(name) for name in ("val_brier", "test_accuracy", "gain_metric")]
    assert places == sorted(places)


def test_csv_holds_no_formulas() -> None:
    given = hostile()
    given["data"]["choosing"]["split"] = "=1+1"
    for candidate in given["candidates"]:
        candidate["evaluations"][0]["split"] = "=1+1"
    header, *body = rows(render("candidates.csv", given))
    numeric = re.compile(r"-?[\d.]+(e[-+]?\d+)?")
    for cell in [cell for row in [header, *body] for cell in row]:
        assert numeric.fullmatch(cell) or not cell.lstrip().startswith(("=", "+", "-", "@"))
    names = [row[0] for row in body]
    assert '\'=HYPERLINK("http://example.com")' in names
    assert "'+1+1" in names
