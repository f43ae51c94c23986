"""The demo's folder: made, made again, and nobody's work lost."""

from pathlib import Path

import pytest

from ensemblekit.commands.demo import prepare
from ensemblekit.errors import UsageError


def test_a_folder_with_something_in_it_needs_force(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        prepare(tmp_path, force=False)
    prepare(tmp_path, force=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_edited_files_are_kept_under_another_name(tmp_path: Path) -> None:
    prepare(tmp_path, force=False)
    ours = (tmp_path / "train.py").read_bytes()
    for text in ("first", "second"):
        (tmp_path / "train.py").write_text(text)
        prepare(tmp_path, force=True)
    prepare(tmp_path, force=True)
    assert (tmp_path / "train.py").read_bytes() == ours
    kept = {p.name: p.read_text() for p in tmp_path.glob("*.edited-*")}
    assert kept == {"train.py.edited-1": "first", "train.py.edited-2": "second"}
