"""A checkpoint that is cut, overwritten, replaced, deleted or still growing while it is read.

Its input is `change_driver`, which makes the change at every read in turn; the 0th comes never.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..helpers import environment
from . import archives
from .cases import safetensors_file, torch_file

WRITERS: dict[str, Callable[[int], bytes]] = {
    "a.pt": torch_file,
    "a.safetensors": safetensors_file,
    "legacy.pt": archives.legacy_file,
    "raw.pkl": archives.raw_file,
}
KINDS = ("truncate", "empty", "overwrite", "replace", "delete", "grow")
RUNS = [(kind, "a.safetensors") for kind in KINDS]
RUNS += [
    (kind, name)
    for name in WRITERS
    for kind in ("truncate", "overwrite")
    if (kind, name) not in RUNS
]


def attempts(kind: str, name: str, folder: Path) -> list[dict[str, Any]]:
    stem, _, suffix = name.partition(".")
    names = [f"{stem}_{step}.{suffix}" for step in (1, 2)]
    (folder / "good").mkdir()
    for step, file in enumerate(names, 1):
        (folder / "good" / file).write_bytes(WRITERS[name](step))
    (folder / "other").write_bytes(WRITERS[name](3))
    driver = Path(__file__).with_name("change_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), kind, str(folder), names[1]],
        capture_output=True, text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind, name", RUNS)
def test_change_at_any_read(kind: str, name: str, tmp_path: Path) -> None:
    """The average of what was there first, or an error and no output; never a mixture.

    At the first read the changed file is not open yet: a sound one in its place is simply taken.
    """
    found = attempts(kind, name, tmp_path)
    honest, *changed = found
    assert honest["code"] == 0
    assert len(changed) > 5, "the driver sees the reads"
    for row in changed:
        assert row["code"] in (0, 3), row
        sound = (
            {honest["output"]} if kind != "replace" else {honest["output"], changed[0]["output"]}
        )
        assert row["output"] in (sound if row["code"] == 0 else {None}), row
        assert row["code"] == 0 or not row["left"], row
    refused = [row for row in changed if row["code"] == 3]
    assert refused or kind == "delete"
