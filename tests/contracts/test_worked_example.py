"""What CONTRIBUTING tells someone who adds a layout or a rule is done here, word for word."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemblekit import Selection, average, averaging, discover, layouts
from ensemblekit.candidates import Row
from ensemblekit.containers import CONTAINERS, FOLDERS
from ensemblekit.errors import UnsupportedError
from ensemblekit.layouts import LAYOUTS

from ..checkpoints import assert_same_tensors, tensor_bytes
from ..helpers import ROOT, read_set, write_series
from ..layouts import writers

GENERAL = "torch-dict"  # the first of the layouts that match nearly everything


def blocks(heading: str) -> list[str]:
    """The code under a heading of CONTRIBUTING, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    _, found, section = text.partition(f"### {heading}\n")
    assert found, heading
    section = re.split(r"^#{1,3} ", section, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def rows(title: str) -> dict[str, list[str]]:
    """The table under a title of docs/layouts.md, by the first cell."""
    text = (ROOT / "docs/layouts.md").read_text().partition(f"## {title}\n")[2]
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return {cells[0]: cells for cells in map(cells_of, lines)}


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


@pytest.mark.parametrize("name", [*CONTAINERS, *FOLDERS])
def test_every_container_is_documented(name: str) -> None:
    assert f"`{name}`" in rows("Containers")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_documented(name: str) -> None:
    cells = rows("Layouts")[f"`{name}`"]
    assert len(cells) == 5
    assert all(cells[1:4])


def test_nothing_else_is_documented() -> None:
    for title, names in (("Containers", [*CONTAINERS, *FOLDERS]), ("Layouts", [*LAYOUTS])):
        documented = [cell for cell in rows(title) if cell.startswith("`")]
        assert sorted(documented) == sorted(f"`{name}`" for name in names)


def overlay(package: Any, file: str, source: str, patch: pytest.MonkeyPatch, folder: Path) -> str:
    """Put a new file beside the package's own ones, and return its name."""
    folder.mkdir()
    (folder / file).write_text(source)
    patch.setattr(package, "__path__", [*package.__path__, str(folder)])
    name = f"{package.__name__}.{Path(file).stem}"
    patch.setitem(sys.modules, name, None)  # what the import puts there is taken away again
    del sys.modules[name]
    return name


def test_a_new_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line, row, fixture = blocks("Example: a layout")
    run = tmp_path / "run"
    run.mkdir()
    namespace = dict(vars(writers))
    with monkeypatch.context() as patch:
        patch.setitem(writers.WRITERS, "orrery", None)
        exec(compile(ast.parse(fixture), "fixture", "exec"), namespace)
        expected = writers.WRITERS["orrery"].build(run)

    with pytest.raises(UnsupportedError):  # nothing says which of the two is the model
        discover(run)

    entry = ast.literal_eval("{" + line + "}")
    module = overlay(layouts, "orrery.py", code, monkeypatch, tmp_path / "new")
    assert entry == {"orrery": module}
    assert len(line.strip().splitlines()) == len(row.strip().splitlines()) == 1
    names = list(LAYOUTS)
    above = {name: LAYOUTS[name] for name in names[: names.index(GENERAL)]}
    monkeypatch.setattr(layouts, "LAYOUTS", {**above, **entry, **LAYOUTS})
    assert cells_of(row)[0] == "`orrery`"
    assert len(cells_of(row)) == 5

    found = discover(run)
    assert [s.name for s in found.snapshots] == list(expected.names)
    assert {s.format for s in found.snapshots} == {"torch-zip/orrery"}
    for snapshot, weights in zip(found.snapshots, expected.states, strict=True):
        assert_same_tensors(snapshot.tensors, weights)
    for attribute, values in expected.facts.items():
        assert [getattr(s.facts, attribute) for s in found.snapshots] == values
    for wanted, states in ((None, expected.states), ("model", expected.model)):
        made = average(run, selection=Selection(weights=wanted or "auto")).state
        assert made is not None
        for key, tensor in writers.mean_of(*states).items():
            assert np.ascontiguousarray(made[key]).tobytes() == tensor_bytes(tensor)


def test_a_new_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = blocks("Example: an averaging rule")
    run = write_series(tmp_path / "run")
    module = overlay(averaging, "rising.py", code, monkeypatch, tmp_path / "new")
    entry = ast.literal_eval("{" + line + "}")
    assert entry == {"rising": f"{module}:rising"}
    monkeypatch.setattr(averaging, "RULES", {**averaging.RULES, **entry})
    rule = averaging.rule("rising")
    assert rule(read_set(*sorted(run.iterdir()))) == Row((1.0, 2.0, 3.0), 6.0)
    made = average(run, method="rising", rule_options={"power": 0}).state
    uniform = average(run).state
    assert made is not None
    assert uniform is not None
    for key, array in uniform.items():
        np.testing.assert_array_equal(made[key], array)
