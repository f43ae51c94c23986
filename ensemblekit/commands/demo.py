"""Owns the demo: a folder with a training script, its snapshots, and what one does with them.

Input: the files in `demo_files/`, which travel with the package.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from ensemblekit.commands.report_folder import read_comparison
from ensemblekit.errors import UsageError

_SOURCES = Path(__file__).parent.parent / "demo_files"
_FILES = ("train.py", "ensemblekit.toml")
_MADE = ("ckpts/*.pt", "averaged.safetensors", "averaged.safetensors.json", "model.onnx*")


@dataclass(frozen=True)
class Step:
    """One command of the demo: what it is for, how a user types it, how it is run here."""

    purpose: str
    typed: str
    argv: tuple[str, ...]


def prepare(folder: Path, *, force: bool) -> None:
    """Copy the demo's files into `folder` and clear what an earlier run made there.

    Raises:
        UsageError: The folder holds something and `force` is not given, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", hint="name a folder: ensemblekit demo DIR")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UsageError(
            f"folder {folder} exists and is not empty",
            hint="--force runs the demo in it again, or name another folder",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _MADE:
        for old in folder.glob(pattern):
            old.unlink()
    if read_comparison(folder / "comparison") is not None:
        shutil.rmtree(folder / "comparison")
    for name in _FILES:
        ours, theirs = _SOURCES / name, folder / name
        if theirs.exists() and theirs.read_bytes() != ours.read_bytes():
            kept = (theirs.with_name(f"{name}.edited-{n}") for n in count(1))
            theirs.rename(next(path for path in kept if not path.exists()))  # it is someone's work
        shutil.copyfile(ours, theirs)


def steps(seed: int) -> list[Step]:
    """What the demo runs, in its folder, in this order."""
    ensemblekit = (sys.executable, "-m", "ensemblekit")
    return [
        Step(
            "Train a small network; each cycle of the learning rate ends with a snapshot.",
            f"python train.py --seed {seed} --out ckpts",
            (sys.executable, "train.py", "--seed", str(seed), "--out", "ckpts"),
        ),
        Step(
            "See what the folder holds.",
            "ensemblekit inspect ckpts/",
            (*ensemblekit, "inspect", "ckpts/"),
        ),
        Step(
            "Average the snapshots; ensemblekit.toml names the model and the data.",
            "ensemblekit average ckpts/",
            (*ensemblekit, "average", "ckpts/"),
        ),
        Step(
            "Compare snapshots, averages and ensembles, and decide what to ship.",
            "ensemblekit compare ckpts/",
            (*ensemblekit, "compare", "ckpts/"),
        ),
        Step(
            "Export the average as ONNX; the file is run beside the model before it appears.",
            "ensemblekit export averaged.safetensors -o model.onnx",
            (*ensemblekit, "export", "averaged.safetensors", "-o", "model.onnx"),
        ),
    ]


def environment() -> dict[str, str]:
    """The environment of the steps: one thread, for a network so small that more only wait."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
