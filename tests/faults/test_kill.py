"""A run that is killed, interrupted or refused by the disk at any write, fsync or rename.

Its input is `kill_driver`, which tries every such call in turn.
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

OUTPUT, MANIFEST = "averaged.safetensors", "averaged.safetensors.json"
CODES = {"kill": -9, "full": 4, "interrupt": 130, "terminate": 143}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("latin-1")).hexdigest()


def matching(files: dict[str, str]) -> bool:
    return json.loads(files[MANIFEST])["sha256"] == digest(files[OUTPUT])


@pytest.fixture(scope="module", params=sorted(CODES))
def attempts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp(request.param)
    write_series(folder / "ckpts")
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), request.param, str(folder)],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout)
    failed = [row["old"] for row in found if row["code"]]
    assert failed.count(True) >= 8, "head, three tensors, manifest, two fsyncs, two renames"
    return request.param, found


def name(row: dict[str, Any]) -> str:
    return f"call {row['nth']}, {'over an old output' if row['old'] else 'no output before'}"


def test_the_output_is_the_old_one_or_the_new_one(
    attempts: tuple[str, list[dict[str, Any]]],
) -> None:
    kind, found = attempts
    for row in found:
        assert row["code"] in (0, CODES[kind]), name(row)
        old, new = row["before"].get(OUTPUT), row["finished"][OUTPUT]
        assert row["after"].get(OUTPUT) in (old, new), name(row)


def test_the_same_command_finishes(attempts: tuple[str, list[dict[str, Any]]]) -> None:
    _, found = attempts
    [output] = {row["finished"][OUTPUT] for row in found}
    assert output
    for row in found:
        assert row["again"] == 0, name(row)
        assert matching(row["finished"]), name(row)


def test_what_is_left_behind(attempts: tuple[str, list[dict[str, Any]]]) -> None:
    """Nothing, but for SIGKILL, after which no one can clean up; and that is hidden."""
    kind, found = attempts
    for row in found:
        rest = row["after"].keys() - {OUTPUT, MANIFEST}
        assert kind == "kill" or not rest, name(row)
        assert all(file.startswith(".averaged") and file.endswith(".tmp") for file in rest)


def test_an_error_does_not_part_output_and_manifest(
    attempts: tuple[str, list[dict[str, Any]]],
) -> None:
    """Who is told that nothing happened finds both as they were, or both new."""
    kind, found = attempts
    if kind == "kill":
        pytest.skip("between two renames no one can help; the next run repairs it")
    for row in found:
        files = row["after"]
        assert (OUTPUT in files) == (MANIFEST in files), name(row)
        assert OUTPUT not in files or matching(files), name(row)


def test_leftovers_are_no_checkpoints(tmp_path: Path) -> None:
    from ensemblekit import average

    folder = write_series(tmp_path / "ckpts")
    good = (folder / "snap_1.safetensors").read_bytes()
    (folder / ".averaged.safetensors.0123456789ab.tmp").write_bytes(good[:-100])
    result = average(folder, folder / OUTPUT)
    assert len(result.snapshots) == 3
