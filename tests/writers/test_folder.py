"""Folders: shards and index, what travels along, replaced as a whole, taken up where they stopped."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ensemblekit import average
from ensemblekit.atomic import AtomicFile
from ensemblekit.errors import EnsembleKitError, MachineError, UsageError
from ensemblekit.writers import Content, digest, folder, manifest_path, read_manifest
from ensemblekit.writers.folder import companions, save_folder, shards

from ..helpers import Array, contents, make_arrays, sha256, write_safetensors, write_series
from .filling import Arrays, Sink

ARRAYS: dict[str, Array] = {
    "embed": np.arange(1000, dtype=np.float32),
    "layer.weight": np.arange(500, dtype=np.float32),
    "layer.bias": np.arange(10, dtype=np.float32),
    "empty": np.empty((0, 3), np.float32),
    "counter": np.array(7, np.int64),
    "head": np.arange(700, dtype=np.float32),
}
SIGNATURE = {k: (a.shape, a.dtype.name) for k, a in ARRAYS.items()}
SMALL = 3000  # bytes of a shard: four of them
CONFIG = {"model_type": "bert", "dtype": "float32"}


def put(
    path: Path, filler: Arrays | None = None, arrays: dict[str, Array] = ARRAYS, **changes: Any
) -> str:
    options = {"shard_bytes": SMALL, "request": "a" * 64, "inputs": [], "force": False, **changes}
    content = options.pop("content", None) or Content(
        {k: (a.shape, a.dtype.name) for k, a in arrays.items()}, metadata={"ensemblekit": "{}"}
    )
    return save_folder(
        path, content, filler or Arrays(arrays), lambda digest: {"sha256": digest}, **options
    )


def read(path: Path) -> dict[str, Array]:
    """All tensors, the way the index says."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return dict(load_file(path / "model.safetensors"))
    where = json.loads(index.read_text())["weight_map"]
    return {key: load_file(path / name)[key] for key, name in where.items()}


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def same(found: dict[str, Array], expected: dict[str, Array] = ARRAYS) -> bool:
    bits = {k: (a.dtype, a.shape, a.tobytes()) for k, a in expected.items()}
    return {k: (a.dtype, a.shape, a.tobytes()) for k, a in found.items()} == bits


# ---------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("limit, count", [(10**9, 1), (SMALL, 3), (1, 6)])
def test_round_trip(tmp_path: Path, limit: int, count: int) -> None:
    out = tmp_path / "out"
    filler = Arrays(ARRAYS)
    found = put(out, filler, shard_bytes=limit)
    assert same(read(out))
    assert found == digest(out)
    assert filler.finished == 1
    files = [name for name in names(out) if name.endswith(".safetensors")]
    assert len(files) == count
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["sha256"] == found
    assert manifest["files"] == {name: sha256(out / name) for name in names(out)}
    assert names(tmp_path) == ["out", "out.json"]


def test_shards_are_cut_in_order_at_the_limit() -> None:
    plan = shards(Content(SIGNATURE), SMALL)
    assert list(plan) == [
        f"model-{n:05}-of-{len(plan):05}.safetensors" for n in range(1, len(plan) + 1)
    ]
    assert [key for keys in plan.values() for key in keys] == list(ARRAYS)
    for keys in plan.values():
        assert len(keys) == 1 or sum(ARRAYS[k].nbytes for k in keys) <= SMALL
    assert len(shards(Content(SIGNATURE), 10**6)) == 1
    exact = sum(array.nbytes for array in ARRAYS.values())
    assert len(shards(Content(SIGNATURE), exact)) == 1
    assert len(shards(Content(SIGNATURE), exact - 1)) == 2


def test_index(tmp_path: Path) -> None:
    put(tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in ARRAYS.values())}
    assert list(index["weight_map"]) == list(ARRAYS)
    assert set(index["weight_map"].values()) | {"model.safetensors.index.json"} == set(
        names(tmp_path / "out")
    )


TRAVEL: dict[str, dict[str, Any]] = {
    "config.json": CONFIG,
    "generation_config.json": {"top_k": 3},
    "tokenizer.json": {"version": "1.0"},
    "tokenizer_config.json": {"a": 1},
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "vocab.json": {"a": 0},
    "preprocessor_config.json": {"size": 8},
}
STAY = ["optimizer.pt", "trainer_state.json", "training_args.bin", "README.md", "scheduler.pt"]


def hugging_face(path: Path, seed: int, **arrays: Array) -> Path:
    path.mkdir(parents=True)
    write_safetensors(path / "model.safetensors", {**make_arrays(seed), **arrays}, {"format": "pt"})
    for name, value in TRAVEL.items():
        (path / name).write_text(
            json.dumps({**value, "of": seed} if name != "config.json" else value)
        )
    for name in ("merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja"):
        (path / name).write_text(f"{name} of {seed}\n")
    for name in STAY:
        (path / name).write_text("{}")
    return path


def test_companions_travel(tmp_path: Path) -> None:
    for k in (1, 2):
        hugging_face(tmp_path / f"run/checkpoint-{k}", k)
    out = tmp_path / "out"
    average(tmp_path / "run", out)
    expected = {*TRAVEL, "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja"}
    assert set(names(out)) == {*expected, "model.safetensors"}
    for name in expected:
        newest = tmp_path / "run/checkpoint-2" / name
        assert (out / name).read_bytes() == newest.read_bytes(), name


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_configuration_follows_the_type(tmp_path: Path, name: str) -> None:
    for k in (1, 2):
        folder = hugging_face(tmp_path / f"run/checkpoint-{k}", k)
        config = {"model_type": "é", name: "float32", "n": 1.5}
        (folder / "config.json").write_text(json.dumps(config))
    average(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found == {"model_type": "é", name: "bfloat16", "n": 1.5}


def test_links_to_companions_are_followed(tmp_path: Path) -> None:
    """As in the cache of Hugging Face's hub."""
    folder = hugging_face(tmp_path / "run/checkpoint-1", 1)
    (folder / "tokenizer.json").rename(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to("../../blob")
    average(folder, tmp_path / "out")
    copied = tmp_path / "out/tokenizer.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (tmp_path / "blob").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        *(pytest.param(text) for text in ("[]", "3", "[" * 100_000)),
        *("{", "", "\udcff"),
    ],
    ids=["list", "number", "deep", "cut", "empty", "bytes"],
)
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    """It travels as it is; whoever opens it will say so."""
    folder = hugging_face(tmp_path / "run/checkpoint-1", 1)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    average(folder, tmp_path / "out", dtype="float16")
    found = (tmp_path / "out/config.json").read_bytes()
    assert found == text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_companion_that_leads_nowhere(tmp_path: Path, name: str) -> None:
    folder = hugging_face(tmp_path / "run/checkpoint-1", 1)
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    with contextlib.suppress(EnsembleKitError):
        average(folder, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_another_companion_is_another_output(tmp_path: Path, name: str) -> None:
    """The same weights with a mended tokenizer are not up to date."""
    folder = hugging_face(tmp_path / "run/checkpoint-1", 1)
    average(folder, tmp_path / "out")
    assert average(folder, tmp_path / "out").up_to_date
    (folder / name).write_text('{"mended": true}')
    with pytest.raises(UsageError, match="exists"):
        average(folder, tmp_path / "out")
    average(folder, tmp_path / "out", force=True)
    assert (tmp_path / "out" / name).read_text() == '{"mended": true}'


def test_tied_tensors_are_written_once_beside_a_configuration(tmp_path: Path) -> None:
    ties = [("embed", "head")]
    arrays = dict.fromkeys(("embed", "middle", "head"), ARRAYS["embed"])
    signature = {k: (a.shape, "float32") for k, a in arrays.items()}
    config = tmp_path / "config.json"
    config.write_text("{}")
    loose = Content(signature, ties=ties)
    beside = Content(signature, ties=ties, copies={config: {}})
    put(tmp_path / "plain", arrays=arrays, content=loose)
    put(tmp_path / "model", arrays=arrays, content=beside)
    assert list(read(tmp_path / "plain")) == ["embed", "middle", "head"]
    assert list(read(tmp_path / "model")) == ["embed", "middle"]


def test_similarity_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    """Tied tensors count once, whether or not they come into one file."""
    import torch

    (tmp_path / "run").mkdir()
    for k in range(3):
        torch.manual_seed(k)
        table = 0.2 * torch.randn(8, 20) + torch.arange(20)
        state = {"embed": table, "mid": torch.randn(30) + 3, "head": table}
        torch.save(state, tmp_path / f"run/snap_{k}.pt")
    whole = average(tmp_path / "run", tmp_path / "whole")
    parts = average(tmp_path / "run", tmp_path / "parts", shard_bytes=500)
    assert whole.cosines == pytest.approx(parts.cosines, abs=1e-12)


# ------------------------------------------------------------------------- what may be replaced


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    put(tmp_path / "out")
    assert same(read(tmp_path / "out"))
    assert names(tmp_path) == ["out", "out.json"]


def test_an_output_exists(tmp_path: Path) -> None:
    put(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        put(tmp_path / "out", request="b" * 64)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("limits", [(SMALL, 10**9), (10**9, SMALL), (SMALL, SMALL)])
def test_replaced_as_a_whole(tmp_path: Path, limits: tuple[int, int]) -> None:
    out = tmp_path / "out"
    put(out, shard_bytes=limits[0])
    other = {key: array[::-1].copy() if array.ndim else array for key, array in ARRAYS.items()}
    found = put(out, arrays=other, shard_bytes=limits[1], force=True, request="b" * 64)
    assert same(read(out), other)
    assert digest(out) == found
    manifest = read_manifest(out)
    assert manifest is not None
    assert set(manifest["files"]) == set(names(out))
    assert names(tmp_path) == ["out", "out.json"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("extra", ["notes.txt", "sub/notes.txt", ".hidden"])
def test_files_of_others_are_not_lost(tmp_path: Path, extra: str, *, force: bool) -> None:
    out = tmp_path / "out"
    put(out)
    (out / extra).parent.mkdir(exist_ok=True)
    (out / extra).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(UsageError):
        put(out, force=force, request="b" * 64)
    assert contents(tmp_path) == before
    assert not [name for name in names(tmp_path) if name.endswith(".partial")]


def test_files_of_others_without_a_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out)
    manifest_path(out).unlink()
    with pytest.raises(UsageError, match="not ours"):
        put(out, force=True)
    assert same(read(out))


@pytest.mark.parametrize(
    "value",
    [
        *(pytest.param(value) for value in (None, 3)),
        *("text", [3], {"a": 1}, "absent"),
    ],
)
def test_edited_manifest(tmp_path: Path, value: object) -> None:
    out = tmp_path / "out"
    put(out)
    manifest = json.loads(manifest_path(out).read_text())
    if value == "absent":
        del manifest["files"]
    else:
        manifest["files"] = value
    manifest_path(out).write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="not ours"):
        put(out, force=True, request="b" * 64)
    assert same(read(out))


@pytest.mark.parametrize(
    "force",
    [
        pytest.param(False),
        True,
    ],
)
def test_a_folder_inside_an_output(tmp_path: Path, *, force: bool) -> None:
    """Also where the command would ask first whether the output is up to date."""
    run = write_series(tmp_path / "run")
    average(run, tmp_path / "out")
    (tmp_path / "out/sub").mkdir()
    with pytest.raises(UsageError):
        average(run, tmp_path / "out", force=force)


def test_an_input_is_not_replaced(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "run/checkpoint-1", 1)
    before = contents(tmp_path)
    for out in (folder, tmp_path / "run", tmp_path):
        with pytest.raises(UsageError, match=r"input|not ours"):
            average(folder, out, force=True)
    assert contents(tmp_path) == before
    link = tmp_path / "link"
    link.symlink_to("run/checkpoint-1")
    with pytest.raises(UsageError, match=r"input|not ours|link"):
        average(folder, link, force=True)
    assert contents(tmp_path / "run") == {
        name.removeprefix("run/"): value for name, value in before.items()
    }


def test_a_hard_link_to_an_input(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    average(run, tmp_path / "out")
    source = tmp_path / "out/model.safetensors"
    (run / "snap_9.safetensors").hardlink_to(source)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="input"):
        average(run / "snap_9.safetensors", tmp_path / "out", force=True)
    assert contents(tmp_path) == before


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UsageError, match="is a file"):
        put(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("filled", [False, True])
def test_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, filled: bool) -> None:
    """It cannot change its name: said before any work is done."""
    out, run = tmp_path / "my out", write_series(tmp_path / "run")
    if filled:
        put(out)
    else:
        out.mkdir()
    before = contents(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    filler = Arrays(ARRAYS)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(UsageError, match="mount point") as raised:
            average(run, out, force=True, **options)  # type: ignore[arg-type]
        assert raised.value.hint == f"-o '{out}/averaged'"
    with pytest.raises(UsageError, match="mount point"):
        put(out, filler, force=True, request="b" * 64)
    assert filler.asked == []
    assert contents(tmp_path) == before
    assert not partials(tmp_path)


@pytest.mark.parametrize(
    "filled",
    [
        pytest.param(False),
        True,
    ],
)
def test_a_link_to_a_folder(tmp_path: Path, *, filled: bool) -> None:
    """Either refused with nothing changed, or followed; never an error after the fact."""
    real, link = tmp_path / "real", tmp_path / "link"
    if filled:
        put(real)
    else:
        real.mkdir()
    link.symlink_to("real")
    before = contents(tmp_path)
    try:
        put(link, force=True, request="b" * 64)
    except UsageError:
        assert contents(tmp_path) == before
        assert link.is_symlink()
    else:
        assert same(read(link))
    assert not [name for name in names(tmp_path) if name.endswith(".partial")]


# --------------------------------------------------------------------- stopped, and taken up again


class Stopped(Arrays):
    """Is interrupted before the n-th shard, or within it."""

    def __init__(self, nth: int, error: BaseException, *, within: bool = False) -> None:
        super().__init__(ARRAYS)
        self.nth, self.error, self.within = nth, error, within

    def fill(self, sink: Sink, keys: Collection[str] | None = None) -> None:
        if len(self.asked) == self.nth:
            if self.within:
                super().fill(sink, list(keys or ())[:1])
            raise self.error
        super().fill(sink, keys)


def partials(path: Path) -> list[Path]:
    return sorted(path.glob(".*.partial"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)], ids=["int", "exit"])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
def test_the_same_request_goes_on(
    tmp_path: Path, nth: int, error: BaseException, *, within: bool
) -> None:
    out = tmp_path / "out"
    with pytest.raises(type(error)) as raised:
        put(out, Stopped(nth, error, within=within))
    assert any("goes on" in note for note in raised.value.__notes__)
    [partial] = partials(tmp_path)
    assert not out.exists()
    done = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in partial.glob("model-*")}
    assert len(done) == nth
    assert not [n for n in names(partial) if n.endswith(".tmp")]
    filler = Arrays(ARRAYS)
    put(out, filler)
    assert len(filler.asked) == 3 - nth, "finished shards are not filled again"
    found = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("model-*")}
    assert done.items() <= found.items(), "nor written again"
    assert filler.notes() == {key: array.size for key, array in ARRAYS.items()}
    fresh = put(tmp_path / "fresh")
    assert digest(out) == fresh
    assert names(tmp_path) == ["fresh", "fresh.json", "out", "out.json"]


def test_stopped_before_the_first_shard(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "out", Stopped(0, KeyboardInterrupt(), within=True))
    assert not names(tmp_path)


@pytest.mark.parametrize("error", [OSError("x"), RuntimeError("x"), MachineError("x")])
def test_an_error_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        put(tmp_path / "out", Stopped(2, error))
    assert not names(tmp_path)


def damage(path: Path, how: str) -> None:
    if how == "bit":
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "gone":
        path.unlink()
    else:
        path.write_text(how)


@pytest.mark.parametrize("how", ["bit", "cut", "gone", "", "{", "[]", "null", '{"files": 3}'])
@pytest.mark.parametrize("file", ["model-00001-of-00003.safetensors", "progress.json"])
def test_damaged_parts_are_made_again(tmp_path: Path, file: str, how: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        put(out, Stopped(2, KeyboardInterrupt()))
    damage(partials(tmp_path)[0] / file, how)
    put(out)
    assert same(read(out))
    assert digest(out) == put(tmp_path / "fresh")
    assert not partials(tmp_path)


def test_a_folder_among_the_parts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        put(out, Stopped(2, KeyboardInterrupt()))
    (partials(tmp_path)[0] / "stray/deep").mkdir(parents=True)
    put(out)
    assert "stray" not in names(out)
    assert same(read(out))


@pytest.mark.parametrize("name", [".model-00003-of-00003.safetensors.0123456789ab.tmp", "stray"])
def test_leftovers_among_the_parts_are_not_shown(tmp_path: Path, name: str) -> None:
    """After SIGKILL within a shard its temporary file stands beside the finished ones."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        put(out, Stopped(2, KeyboardInterrupt()))
    (partials(tmp_path)[0] / name).write_bytes(b"half")
    put(out)
    assert name not in names(out)
    assert digest(out) == put(tmp_path / "fresh")


def test_another_request_does_not_take_them_up_but_clears_them_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        put(out, Stopped(2, KeyboardInterrupt()))
    filler = Arrays(ARRAYS)
    put(out, filler, request="b" * 64)
    assert len(filler.asked) == 3
    assert names(tmp_path) == ["out", "out.json"]


@pytest.mark.parametrize(
    "name",
    [
        ".out.v2.0123456789ab.partial",
        ".out.0123456789a.partial",
        ".out.0123456789abc.partial",
        ".out.0123456789AB.partial",
        ".outer.0123456789ab.partial",
        "out.0123456789ab.partial",
    ],
)
def test_folders_that_only_look_like_parts_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "progress.json").write_text("{}")
    put(tmp_path / "out")
    assert (tmp_path / name / "progress.json").exists()


def test_what_has_the_name_of_parts_and_is_no_folder(tmp_path: Path) -> None:
    """Nothing waits for a FIFO, and no link is followed."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("")
    (tmp_path / ".out.000000000001.partial").symlink_to("nowhere")
    (tmp_path / ".out.000000000002.partial").symlink_to("precious")
    os.mkfifo(tmp_path / ".out.000000000003.partial")
    (tmp_path / ".out.000000000004.partial").write_text("")
    (tmp_path / ".out.000000000005.partial").mkdir()
    put(tmp_path / "out")
    assert same(read(tmp_path / "out"))
    assert (tmp_path / "precious/file").exists()
    assert not (tmp_path / ".out.000000000005.partial").exists()


def test_parts_of_names_with_magic_letters(tmp_path: Path) -> None:
    for name in (".o[1]*.0123456789ab.partial", ".o1x.0123456789ab.partial"):
        (tmp_path / name).mkdir()
    put(tmp_path / "o[1]*")
    assert names(tmp_path) == [".o1x.0123456789ab.partial", "o[1]*", "o[1]*.json"]


def test_a_folder_that_one_may_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of others cannot be found there; the output is in place all the same."""
    honest = Path.iterdir

    def iterdir(self: Path) -> Iterator[Path]:
        if self == tmp_path:
            raise PermissionError(errno.EACCES, "no")
        return honest(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    put(tmp_path / "out")
    monkeypatch.undo()
    assert same(read(tmp_path / "out"))


def test_parts_of_other_names_stay(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "mine", Stopped(2, KeyboardInterrupt()))
    put(tmp_path / "yours", request="b" * 64)
    assert len(partials(tmp_path)) == 1


def test_parts_that_someone_works_on_stay(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "out", Stopped(2, KeyboardInterrupt()))
    [partial] = partials(tmp_path)
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(MachineError, match="another process is writing"):
            put(tmp_path / "out")
        assert partial.exists()
        put(tmp_path / "out", request="b" * 64)
        assert partial.exists()
    finally:
        os.close(descriptor)
    put(tmp_path / "out", request="c" * 64, force=True)
    assert not partials(tmp_path)


def test_parts_are_no_checkpoints(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        put(run / "out", Stopped(2, KeyboardInterrupt()))
    assert len(average(run).snapshots) == 3


def test_a_disk_that_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AtomicFile.write_at

    def lossy(self: AtomicFile, data: bytes | memoryview, offset: int) -> None:
        raw = bytearray(data)
        if len(raw) == 1000 and offset > 2000:
            raw[17] ^= 4
        honest(self, bytes(raw), offset)

    monkeypatch.setattr(AtomicFile, "write_at", lossy)
    with pytest.raises(MachineError, match="other bytes"):
        put(tmp_path / "out")
    assert not names(tmp_path)


def test_killed_between_manifest_and_folder(tmp_path: Path) -> None:
    """The new manifest beside the old folder, of other files: --force goes on from there."""
    out = tmp_path / "out"
    put(out)
    put(tmp_path / "new", shard_bytes=10**9)
    new = json.loads(manifest_path(tmp_path / "new").read_bytes())
    new["replaces"] = names(out)  # as the manifest of a run that replaces these says
    manifest_path(out).write_text(json.dumps(new))
    put(out, shard_bytes=10**9, force=True)
    assert names(out) == ["model.safetensors"]


def test_companions_of_a_folder(tmp_path: Path) -> None:
    made = hugging_face(tmp_path / "one", 1)
    (made / "tokenizer.model").mkdir()
    os.mkfifo(made / "vocab.bin")
    found = companions(made, "bfloat16")
    assert {p.name for p in found} == {
        *TRAVEL, "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja"
    }  # fmt: skip
    assert {p.name: c for p, c in found.items() if c} == {
        "config.json": {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    }
    assert not any(companions(made, None).values())


def test_default_size() -> None:
    assert folder.SHARD_BYTES == 5 * 10**9
