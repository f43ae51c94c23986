"""From what was typed to the places that may hold a snapshot; nothing is dropped unseen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemblekit.errors import UsageError
from ensemblekit.walk import Place, places, unmatched


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run as trainers leave it."""
    made = tmp_path / "run"
    for name in (
        *("net-1.pt", "net-2.pt", "net-10.pt", "best.ckpt", "epoch=1.safetensors", "LICENSE"),
        *("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "config.json"),
        *("README.md", "events.out.tfevents.1", ".hidden.pt", "old/net-0.pt", "old/notes.txt"),
    ):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(b"x")
    monkeypatch.chdir(made)
    return made


def names(found: list[Place]) -> list[str]:
    return sorted(place.name for place in found)


def test_folder(folder: Path) -> None:
    found, passed = places([folder])
    assert names(found) == [
        *("LICENSE", "best.ckpt", "epoch=1.safetensors", "net-1.pt", "net-10.pt", "net-2.pt"),
        "old/net-0.pt",
    ]
    assert {place.name for place in found if not place.claims} == {"LICENSE"}
    assert all(place.found_in == folder for place in found)
    assert sorted(item.name for item in passed) == [
        *(".hidden.pt", "README.md", "config.json", "events.out.tfevents.1", "old/notes.txt"),
        *("optimizer.pt", "rng_state_0.pth", "scheduler.pt", "training_args.bin"),
    ]
    assert {item.reason for item in passed} == {"not a checkpoint"}


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("net-1.pt", ["net-1.pt"]),
        ("optimizer.pt", ["optimizer.pt"]),
        ("README.md", ["README.md"]),
        ("net-*.pt", ["net-1.pt", "net-10.pt", "net-2.pt"]),
        ("net-?.pt", ["net-1.pt", "net-2.pt"]),
        ("net-[12].pt", ["net-1.pt", "net-2.pt"]),
        ("**/net-0.pt", ["old/net-0.pt"]),
        ("*.md", None),
        ("none-*.pt", None),
    ],
)
@pytest.mark.usefixtures("folder")
def test_files_and_globs(argument: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(UsageError, match="no file matches"):
            places([argument])
        return
    found, passed = places([argument])
    assert names(found) == expected
    assert passed == []
    assert all(place.claims and place.found_in is None for place in found)


def test_glob_that_matches_folders(folder: Path) -> None:
    found, _ = places([str(folder.parent / "r*")])
    assert len(found) == 7


def test_name_with_magic_letters(folder: Path) -> None:
    (folder / "a[1].pt").touch()
    assert names(places(["a[1].pt"])[0]) == ["a[1].pt"]


@pytest.mark.usefixtures("folder")
def test_missing_file_shows_what_is_there() -> None:
    with pytest.raises(UsageError, match=r"net-3\.pt: no such file or folder") as caught:
        places(["net-3.pt"])
    assert "LICENSE" in str(caught.value.hint)


@pytest.mark.usefixtures("folder")
def test_named_twice_counts_once() -> None:
    found, _ = places(["net-1.pt", Path("net-1.pt").absolute(), ".", "net-*.pt"])
    assert len([place for place in found if place.path.name == "net-1.pt"]) == 1
    assert len(found) == 7


@pytest.mark.parametrize(
    "exclude, left",
    [
        (["net-*"], ["best.ckpt", "epoch=1.safetensors"]),
        (["old/*", "*.ckpt"], ["epoch=1.safetensors", "net-1.pt", "net-10.pt", "net-2.pt"]),
        (["*"], []),
        (["nothing"], None),
    ],
)
def test_exclude(folder: Path, exclude: list[str], left: list[str] | None) -> None:
    found, passed = places([folder], exclude=["LICENSE", *exclude])
    if left is not None:
        assert names(found) == left
    gone = [item for item in passed if item.reason.startswith("excluded by")]
    assert len(found) + len(gone) == 7


def test_sharded_folder_is_one_place(folder: Path) -> None:
    step = folder / "checkpoint-5"
    step.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (step / name).touch()
    (step / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors",'
        ' "b": "model-00002-of-00002.safetensors"}}'
    )
    found, _ = places([folder])
    assert [place.path for place in found if "checkpoint" in place.name] == [step]
    direct, _ = places([step])
    assert [(place.path, place.found_in) for place in direct] == [(step, None)]


def test_endless_links_end(folder: Path) -> None:
    (folder / "loop").symlink_to(".")
    (folder / "self").symlink_to("self")
    found, _ = places([folder])
    assert names(found).count("net-1.pt") == 1
    assert "self" in names(found)


def test_link_to_a_file_is_a_place(folder: Path) -> None:
    (folder / "last.pt").symlink_to("net-10.pt")
    assert "last.pt" in names(places([folder])[0])


def hidden(folder: Path) -> str:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "net-9.pt").touch()
    return ".cache"


def linked(folder: Path) -> str:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "net-9.pt").touch()
    (folder / "more").symlink_to(elsewhere)
    return "more"


def deep(folder: Path) -> str:
    low = folder.joinpath(*"abcdefgh")
    low.mkdir(parents=True)
    (low / "net-9.pt").touch()
    return "a/b"


@pytest.mark.parametrize("make", [hidden, linked, deep], ids=["hidden", "linked", "deep"])
def test_folders_are_dropped_without_a_word(folder: Path, make: Callable[[Path], str]) -> None:
    """Hidden, linked and very deep folders are neither searched nor noted."""
    start = make(folder)
    found, passed = places([folder])
    seen = [place.name for place in found] + [item.name for item in passed]
    assert any(name.startswith(start) for name in seen)


def test_order_of_arguments_does_not_matter(folder: Path) -> None:
    files = [os.fspath(p) for p in folder.glob("net-*.pt")]
    one, _ = places(files)
    other, _ = places(files[::-1])
    assert {p.path for p in one} == {p.path for p in other}


MANIFEST = '{\n  "ensemblekit": true,\n  "output": "net.pt"\n}\n'


def test_manifests_among_named_files(folder: Path) -> None:
    """As a shell gives them for `run/*`; any other JSON file that is named is a wrong argument."""
    (folder / "net.pt.json").write_text(MANIFEST)
    found, passed = places(["net-1.pt", "net.pt.json", "config.json"])
    assert names(found) == ["config.json", "net-1.pt"]
    assert [(item.name, item.reason) for item in passed] == [
        ("net.pt.json", "what we noted of an output")
    ]


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}", "[1]", '{"other": 1, "ensemblekit": true}', '"ensemblekit"', "\x00" * 99],
)
def test_other_files_of_such_names(folder: Path, text: str) -> None:
    (folder / "net.pt.json").write_text(text)
    found, passed = places(["net.pt.json"])
    assert names(found) == ["net.pt.json"]
    assert passed == []


def test_a_pipe_named_like_a_manifest(folder: Path) -> None:
    """Looking into it does not wait for a writer."""
    os.mkfifo(folder / "net.pt.json")
    assert names(places(["net.pt.json"])[0]) == ["net.pt.json"]


def test_patterns_that_match_nothing(folder: Path) -> None:
    patterns = ["net-*", "READ*", "old/*", "*.bin", "nothing", "net-1"]
    found, passed = places([folder], exclude=patterns)
    assert unmatched(patterns, [*found, *passed]) == ["nothing", "net-1"]
