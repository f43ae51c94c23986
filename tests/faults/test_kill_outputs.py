"""As `test_kill`, for the other outputs: a file of torch, a folder, a folder of several shards.

The old output is one file in one folder, so that a sharded one replaces files of other names.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..helpers import environment, write_series

CODES = {"kill": -9, "full": 4, "terminate": 143}
OUTPUTS: dict[str, tuple[str, ...]] = {
    "file": ("averaged.pt",),
    "folder": ("averaged",),
    "shards": ("averaged", "--max-shard-size", "300B"),
}
CASES = [
    ("kill", "file"),
    ("kill", "folder"),
    ("kill", "shards"),
    ("full", "shards"),  # where there was no output before
    ("terminate", "shards"),
]
Row = dict[str, Any]
Files = dict[str, str]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def attempts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, list[Row]]:
    kind, output = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-{output}")
    write_series(folder / "ckpts")
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), kind, str(folder), *OUTPUTS[output]],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found: list[Row] = json.loads(done.stdout)
    failed = [row for row in found if row["code"]]
    assert len(failed) >= {"file": 8, "folder": 14, "shards": 20}[output]
    return kind, OUTPUTS[output][0], found


def say(row: Row) -> str:
    return f"call {row['nth']}, {'over an old output' if row['old'] else 'no output before'}"


def shown(files: Files, name: str) -> Files:
    """The output alone, by names within it."""
    return {key: files[key] for key in files if key == name or key.startswith(f"{name}/")}


def others(files: Files, name: str) -> set[str]:
    """First part of the name of whatever is neither output nor manifest."""
    tops = {key.partition("/")[0] for key in files}
    return tops - {name, f"{name}.json"}


def matching(files: Files, name: str) -> bool:
    """Whether output and manifest belong together."""
    digests = {
        key.removeprefix(f"{name}/"): hashlib.sha256(text.encode("latin-1")).hexdigest()
        for key, text in shown(files, name).items()
    }
    if name in digests:
        found = digests[name]
    else:
        lines = "".join(f"{digests[key]}  {key}\n" for key in sorted(digests))
        found = hashlib.sha256(lines.encode()).hexdigest()
    return bool(json.loads(files[f"{name}.json"])["sha256"] == found)


def test_the_output_is_the_old_one_or_the_new_one(attempts: tuple[str, str, list[Row]]) -> None:
    kind, name, found = attempts
    new = shown(found[-1]["finished"], name)
    assert new
    for row in found:
        assert row["code"] in (0, CODES[kind]), say(row)
        assert shown(row["after"], name) in (shown(row["before"], name), new), say(row)


def test_the_same_command_finishes(attempts: tuple[str, str, list[Row]]) -> None:
    kind, name, found = attempts
    new = shown(found[-1]["finished"], name)
    for row in found:
        assert row["again"] == 0, say(row)
        assert shown(row["finished"], name) == new, say(row)
        assert matching(row["finished"], name), say(row)
        rest = others(row["finished"], name)
        assert not rest or kind == "kill", say(row)
        assert not [file for file in rest if not file.endswith(".tmp")], "parts are cleared away"


def test_what_is_left_behind(attempts: tuple[str, str, list[Row]]) -> None:
    """Hidden parts between two shards when stopped; after SIGKILL whatever there was, hidden."""
    kind, name, found = attempts
    for row in found:
        rest = others(row["after"], name)
        parts = {file for file in rest if file.endswith(".partial")}
        assert all(file.startswith(f".{name}.") for file in rest), say(row)
        if kind == "full":
            assert not rest, say(row)
        elif kind == "kill":
            assert rest - parts <= {file for file in rest if file.endswith(".tmp")}, say(row)
        else:
            assert rest == parts, say(row)
            assert len(parts) <= 1
            held = {file for file in row["after"] if file.partition("/")[0] in parts}
            assert not [file for file in held if file.endswith((".tmp", "/"))], say(row)


def test_an_error_does_not_part_output_and_manifest(attempts: tuple[str, str, list[Row]]) -> None:
    kind, name, found = attempts
    if kind == "kill":
        pytest.skip("between two renames no one can help; the next run repairs it")
    for row in found:
        there = bool(shown(row["after"], name))
        assert there == (f"{name}.json" in row["after"]), say(row)
        assert not there or matching(row["after"], name), say(row)


def test_finished_parts_are_taken_up(attempts: tuple[str, str, list[Row]]) -> None:
    """Some run of those that were stopped left parts; what it left is in the output."""
    kind, name, found = attempts
    if kind == "full" or name == "averaged.pt":
        pytest.skip("leaves no parts")
    left = 0
    for row in found:
        parts = {
            key.rpartition("/")[2]: text
            for key, text in row["after"].items()
            if ".partial/model-" in key and not key.endswith(".tmp")
        }
        left += bool(parts)
        for key, text in parts.items():
            assert row["finished"].get(f"{name}/{key}") == text or not row["old"], say(row)
    assert left or len(shown(found[-1]["finished"], name)) == 1
