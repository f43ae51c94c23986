"""The page of `bench`: what it says, that nothing missing or hostile breaks it, in a browser too."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemblekit.reports.latency import page

from .browser import CHROMIUM, DRIVER, Browser
from .comparisons import HOSTILE
from .test_reports import Page

Json = dict[str, Any]


def row(
    candidate: str, members: int, runtime: str, size: int, p50_ms: float | None, **rest: Any
) -> Json:
    timed = p50_ms is not None
    return {
        "candidate": candidate,
        "members": members,
        "runtime": runtime,
        "execution": {"torch-fused": "fused", "onnxruntime": "graph"}.get(runtime, "loop"),
        "provider": "cpu",
        "device": "cpu",
        "precision": "fp32",
        "batch_size": size,
        "peak_memory_bytes": None,
        "max_rel_diff": 1.5e-7 if timed else None,
        "agrees": True if timed else None,
        "error": None if timed else "out of memory",
        "warmup": 6 if timed else None,
        "iterations": 640 if timed else None,
        "mean_ms": p50_ms,
        "p50_ms": p50_ms,
        "p95_ms": None if p50_ms is None else 1.25 * p50_ms,
        "p99_ms": None if p50_ms is None else 1.5 * p50_ms,
        "outliers": 0.0,
        "median_error": 0.004 if timed else None,
        "throughput_per_s": size / p50_ms * 1000 if p50_ms else None,
        **rest,
    }


def usual() -> Json:
    """Three candidates at two batch sizes; one that lies, and one that does not fit."""
    rows = []
    for size in (1, 8):
        rows += [
            row("single", 1, "torch", size, 0.5 * size),
            row("single", 1, "onnxruntime", size, 0.25 * size),
            row("average", 1, "torch", size, 0.51 * size),
            row("ensemble of 3", 3, "torch", size, 1.5 * size),
            row("ensemble of 3", 3, "torch-fused", size, 0.9 * size),
            row("ensemble of 3", 3, "onnxruntime", size, 0.01, agrees=False, max_rel_diff=0.5),
        ]
    rows[-2] = row("ensemble of 3", 3, "torch-fused", 8, None)
    return {
        "schema_version": 1,
        "measurements": rows,
        "summary": [(
            "batch 1: single (onnxruntime, fp32) is\n"
            "  2.04 +- 0.01 x faster than average (torch, fp32)\n"
            "  3.60 +- 0.02 x faster than ensemble of 3 (torch-fused, fp32)"
        )],
        "within_latency": [
            {"candidate": "single", "max_latency_ms": 5.0, "batch_size": 8,
             "runtime": "onnxruntime", "throughput_per_s": 4000.0},
            {"candidate": "average", "max_latency_ms": 5.0, "batch_size": None,
             "runtime": None, "throughput_per_s": None},
        ],
        "environment": {"torch": "2.13.0", "device": "cpu", "threads": 1, "note": None},
        "warnings": ["the machine is busy"],
    }  # fmt: skip


def sections(text: str) -> list[str]:
    return re.findall(r'<section[^>]*id="(\w+)"', text)


def marks(text: str, figure: str) -> list[str]:
    """Tooltips of the points of a plot."""
    found = re.search(f'<section[^>]*id="{figure}".*?</section>', text, re.DOTALL)
    assert found is not None
    return re.findall(r"<path[^>]*><title>(.*?)</title>", found[0])


def texts(text: str) -> str:
    return " ".join(Page(text).texts)


def test_what_it_says() -> None:
    text = page(usual())
    said = texts(text)
    assert sections(text) == [
        "summary", "batches", "members", "measurements", "warnings", "environment",
    ]  # fmt: skip
    assert "<h1>Fastest at batch size 1: single on onnxruntime, fp32, 0.25 ms</h1>" in text
    assert "3 candidates, 3 runtimes, batch sizes 1, 8, cpu" in said
    assert "<li>2.04 ± 0.01 x faster than average (torch, fp32)</li>" in text
    assert "single within 5 ms: 4,000 samples/s at batch size 8 on onnxruntime" in said
    assert "average within 5 ms: no row keeps it" in said
    assert "the machine is busy" in said
    assert "2.13.0" in said
    assert said.count(" failed") == 1
    assert "out of memory" in said
    assert said.count("other outputs") == 2
    assert "outputs differ from the plain loop's by 5.0e-01 of the largest" in said
    assert "peak memory" not in said  # no row has any


def test_lines_take_the_fastest_runtime_that_agrees() -> None:
    text = page(usual())
    assert marks(text, "batches") == [
        "single, batch size 1: 0.25 ms (onnxruntime, fp32)",
        "single, batch size 8: 2 ms (onnxruntime, fp32)",
        "average, batch size 1: 0.51 ms (torch, fp32)",
        "average, batch size 8: 4.08 ms (torch, fp32)",
        "ensemble of 3, batch size 1: 0.9 ms (torch-fused, fp32)",
        "ensemble of 3, batch size 8: 12 ms (torch, fp32)",  # the fused one did not fit
    ]
    assert marks(text, "members") == [
        "single, batch size 1: 0.25 ms (onnxruntime, fp32)",
        "ensemble of 3, batch size 1: 0.9 ms (torch-fused, fp32)",
        "single, batch size 8: 2 ms (onnxruntime, fp32)",
        "ensemble of 3, batch size 8: 12 ms (torch, fp32)",
    ]


def test_one_batch_size_has_a_line_for_each_runtime() -> None:
    given = usual()
    given["measurements"] = [r for r in given["measurements"] if r["batch_size"] == 1]
    text = page(given)
    part = text[text.index('id="members"') : text.index('id="measurements"')]
    assert re.findall(r"</svg>([^<]+)</li>", part) == [
        "torch, fp32", "onnxruntime, fp32", "torch-fused, fp32",
    ]  # fmt: skip


def test_one_number_of_members_has_no_plot_of_them() -> None:
    given = usual()
    given["measurements"] = [r for r in given["measurements"] if r["members"] == 1]
    assert "members" not in sections(page(given))


def test_sixteen_lines_differ() -> None:
    rows = [row(f"ensemble of {k}", k, "torch", 1, 0.1 * k) for k in range(1, 17)]
    text = page({"measurements": rows})
    part = text[text.index('id="batches"') : text.index('id="members"')]
    listed = part[part.index('<ul class="key"') :]
    keys = re.findall(r'<path d="([^"]+)"[^>]*class="([^"]+)"', listed)
    assert len(keys) == len(set(keys)) == 16


def test_ticks_are_the_measured_sizes() -> None:
    rows = [row("single", 1, "torch", size, 1.0 + size) for size in (1, 3, 700, 701, 4096)]
    text = page({"measurements": rows})
    part = text[text.index('id="batches"') : text.index('id="measurements"')]
    numbers = re.findall(r'<text[^>]*text-anchor="middle"[^>]*>([^<]+)</text>', part)
    assert numbers == ["1", "3", "700", "4,096"]  # 701 would stand over 700


def test_the_policy_lets_only_our_style_and_script_run() -> None:
    text = page(usual())
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert found is not None
    policy = found[1].replace("&#x27;", "'")
    assert policy.startswith("default-src 'none'")
    for name in ("style", "script"):
        body = re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
        assert body is not None
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(?:src|href)=[\"'](?!#)", text)
    assert " style=" not in text


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"measurements": None, "summary": None, "warnings": None, "environment": None},
        {"measurements": [], "summary": [], "within_latency": [], "environment": {}},
        {"measurements": [{}]},
        {"measurements": [dict.fromkeys(row("a", 1, "torch", 1, 1.0))]},
        {"measurements": [None, 3, "row"], "summary": [None], "within_latency": [{}]},
        {"measurements": [row("a", 1, "torch", 1, float("nan"))]},
        {"measurements": [row("a", 1, "torch", 1, 0.0)]},
    ],
    ids=["empty", "none", "lists", "no keys", "no values", "other things", "nan", "zero"],
)
def test_missing_values(given: Json) -> None:
    text = page(given)
    Page(text)
    assert "Nothing could be measured" in text
    assert "None" not in texts(text)
    assert "nan" not in texts(text).replace("dominant", "")


@pytest.mark.parametrize("key", row("single", 1, "torch", 1, 1.0))
def test_any_key_may_be_absent_or_none(key: str) -> None:
    absent, none = usual(), usual()
    for one in absent["measurements"]:
        del one[key]
    for one in none["measurements"]:
        one[key] = None
    for given in (absent, none):
        text = page(json.loads(json.dumps(given)))
        Page(text)
        assert ">None<" not in text


def test_all_rows_failed() -> None:
    rows = [row(name, 1, "torch", 1, None) for name in ("single", "average")]
    text = page({"measurements": rows})
    assert sections(text) == ["summary", "measurements"]
    assert "<h1>Nothing could be measured</h1>" in text
    assert text.count(">failed<") == 2
    assert "<figure" not in text


def test_no_row_agrees() -> None:
    text = page({"measurements": [row("a", 1, "torch", 1, 1.0, agrees=False, max_rel_diff=None)]})
    assert "<h1>No outputs agree with the plain loop&#x27;s</h1>" in text
    assert "or are no numbers" in text
    assert "<figure" not in text


def test_one_row() -> None:
    text = page({"measurements": [row("single", 1, "torch", 1, 0.00123)]})
    assert "<h1>Fastest at batch size 1: single on torch, fp32, 0.00123 ms</h1>" in text
    assert len(marks(text, "batches")) == 1
    assert "There are no two candidates to compare." in text


def test_memory_provider_and_precision_are_told_where_they_say_something() -> None:
    rows = [
        row("a", 2, "torch", 1, 1.0, device="cuda:0", provider="cuda", peak_memory_bytes=3e8),
        row("a", 2, "onnxruntime", 1, 1.0, device="cuda:0", provider="tensorrt", precision="fp16"),
        row("a", 2, "torch-compile", 1, 1.0, device="cuda:0", provider="cuda", execution="fused"),
    ]
    said = texts(page({"measurements": rows}))
    assert "300 MB" in said
    assert "onnxruntime, tensorrt, fp16" in said
    assert "torch-compile, fused, fp32" in said
    assert "torch, fp32" in said


def hostile() -> Json:
    given = usual()
    for one, name in zip(given["measurements"], HOSTILE, strict=False):
        one |= {"candidate": name, "runtime": name, "precision": name, "device": name}
    given["measurements"][0]["error"] = HOSTILE[0]
    given["summary"] = given["warnings"] = list(HOSTILE)
    given["environment"] = {name: name for name in HOSTILE}
    given["within_latency"][0] |= {"candidate": HOSTILE[0], "runtime": HOSTILE[0]}
    return given


def test_markup_in_names_is_text() -> None:
    text = page(hostile())
    found = Page(text)
    names = [name for name, _ in found.tags]
    assert names.count("script") == 1
    assert {"img", "a", "svg"} & set(names) <= {"a", "svg"}
    assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
    assert "\x1b" not in text


# ------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)
@pytest.mark.parametrize("make", [usual, hostile])
def test_in_a_browser(browser: Browser, tmp_path: Path, make: Any) -> None:
    file = tmp_path / "bench.html"
    file.write_text(page(make()), encoding="utf-8")
    for width, dark in ((1200, False), (360, True)):
        browser.look(width=width, dark=dark)
        browser.open(file)
        assert browser.log("browser") == []
        assert browser.requests() == [file.as_uri()]
        assert browser.run("return document.scripts.length") == 1
        assert browser.run("return document.images.length") == 0
        assert browser.run("return document.documentElement.scrollWidth - innerWidth") <= 0
        sizes = browser.run(
            "return [...document.querySelectorAll('figure > svg')]"
            ".map(s => [s.getBoundingClientRect().width, s.getBBox().height])"
        )
        assert len(sizes) == 2
        assert all(w > 300 and h > 200 for w, h in sizes)
        outside = browser.run(
            "return [...document.querySelectorAll('figure > svg text')].filter(t => {"
            "const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();"
            "return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 ||"
            "a.bottom > b.bottom + 1}).map(t => t.textContent)"
        )
        assert outside == []
        colour = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (colour != "rgb(255, 255, 255)") is dark
