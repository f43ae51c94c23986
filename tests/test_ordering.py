"""What numbers in names say of where snapshots stand."""

from pathlib import Path

import numpy as np
import pytest

from ensemblekit import average
from ensemblekit.discovery import discover

from .helpers import write_safetensors


def named(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        write_safetensors(folder / f"{name}.safetensors", {"w": np.full(3, k, np.float32)})
    return folder


@pytest.mark.parametrize(
    "names, places",
    [
        (["epoch=0-step=500", "epoch=0-step=1000", "epoch=1-step=1500"], [500, 1000, 1500]),
        (["epoch=0-step=500", "epoch=1-step=1000", "epoch=2-step=1500"], [0, 1, 2]),
        (["epoch_1_iter_50", "epoch_2_iter_50", "epoch_3_iter_50"], [1, 2, 3]),
        (["net-1-93", "net-2-91", "net-3-95"], [1, 2, 3]),
    ],
)
def test_the_number_that_tells_the_order(
    tmp_path: Path, names: list[str], places: list[int]
) -> None:
    found = discover(named(tmp_path, *names))
    assert [s.numbers[0] for s in found.snapshots] == places
    assert found.warnings == ()


def test_the_same_epoch_is_not_the_same_place(tmp_path: Path) -> None:
    """No number alone tells the order here, and yet nothing repeats."""
    names = ["epoch_1_iter_50", "epoch_1_iter_90", "epoch_2_iter_50"]
    found = discover(named(tmp_path, *names))
    assert [s.path.stem for s in found.snapshots] == names
    assert found.warnings == ()


def test_distances_in_steps_reach_the_rules(tmp_path: Path) -> None:
    steps = (500, 1000, 1500, 4000)
    epochs = (0, 0, 1, 1)
    names = [f"epoch={e}-step={s}" for e, s in zip(epochs, steps, strict=True)]
    one = average(named(tmp_path / "a", *names), method="wsm-linear")
    other = average(named(tmp_path / "b", *(f"step_{s}" for s in steps)), method="wsm-linear")
    assert [s["coefficient"] for s in one.snapshots] == [s["coefficient"] for s in other.snapshots]
    assert [s["step"] for s in one.snapshots] == list(steps)
