"""What `make lowest` installs is what pyproject.toml promises."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_lowest_versions_are_the_promised_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(project["dependencies"]), re.M))
    assert len(promised) == len(project["dependencies"])
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() == promised.keys()
    for name in promised.keys() - {"torch"}:
        parts = [version.split(".") for version in (promised[name], pins[name])]
        least, pinned = ([int(n) for n in [*part, "0", "0"][:3]] for part in parts)
        assert pinned == least, name


def test_the_usual_torch_is_taken() -> None:
    """Older CPU builds are not on the package index."""
    texts = [(ROOT / f"constraints{kind}.txt").read_text() for kind in ("", "-lowest")]
    versions = [re.findall(r"^torch==(\S+)$", text, re.M) for text in texts]
    assert versions[0] == versions[1]
    assert len(versions[0]) == 1
