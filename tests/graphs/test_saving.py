"""Owns the proof that files appear whole, in order, or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from ensemblekit.errors import InputError, MachineError
from ensemblekit.files import Source, sha256
from ensemblekit.graphs import saving
from tests.graphs.building import session, template

WEIGHT = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


def model(scale: float = 1.0) -> ir.Model:

    one = template(
        "h = MatMul (x, w) y = Add (h, b)",
        ports={"x": "float[N, 64]"},
        weights={"w": "float[64, 64]", "b": "float[64]"},
        output="float[N, 64] y",
    )
    for value in list(one.graph.inputs)[1:]:
        assert value.shape is not None
        shape = value.shape.numpy()
        array = scale * WEIGHT if len(shape) == 2 else np.full(shape, scale, np.float32)
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        one.graph.inputs.remove(value)
        one.graph.register_initializer(value)
    return one.model


def said(path: Path) -> npt.NDArray[Any]:
    import onnxruntime

    ready = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = ready.run(None, {"x": np.eye(3, 64, dtype=np.float32)})
    return np.asarray(found)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_small_models_are_one_file(tmp_path: Path) -> None:
    saving.save(model(), tmp_path / "net.onnx")
    assert names(tmp_path) == ["net.onnx"]
    np.testing.assert_allclose(said(tmp_path / "net.onnx"), WEIGHT[:3] + 1)


def test_large_ones_have_their_weights_beside_them(tmp_path: Path) -> None:
    one = model()
    saving.save(one, tmp_path / "net.onnx", external_above=0)
    assert names(tmp_path) == ["net.onnx", "net.onnx.data"]
    assert (tmp_path / "net.onnx").stat().st_size < 2000
    assert (tmp_path / "net.onnx.data").stat().st_size >= WEIGHT.nbytes
    np.testing.assert_allclose(said(tmp_path / "net.onnx"), WEIGHT[:3] + 1)
    loaded = onnx.load(str(tmp_path / "net.onnx"), load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in loaded.graph.initializer
    }
    assert places["w"]["location"] == "net.onnx.data"
    assert not places["b"]  # small tensors stay in the graph
    saving.save(one, tmp_path / "again.onnx")  # the model itself was not changed
    np.testing.assert_allclose(said(tmp_path / "again.onnx"), WEIGHT[:3] + 1)
    session(one)


def test_the_threshold_is_all_weights_together(tmp_path: Path) -> None:
    size = WEIGHT.nbytes + 64 * 4
    saving.save(model(), tmp_path / "at.onnx", external_above=size)
    saving.save(model(), tmp_path / "above.onnx", external_above=size - 1)
    assert names(tmp_path) == ["above.onnx", "above.onnx.data", "at.onnx"]


def test_a_workshop_is_gone_afterwards(tmp_path: Path) -> None:
    with saving.workshop(tmp_path / "net.onnx") as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".")
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, SystemExit])
def test_a_workshop_is_gone_after_an_exception(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), saving.workshop(tmp_path / "net.onnx") as folder:  # noqa: PT012  # it is about what happens inside
        (folder / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_workshops_of_one_output_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    with saving.workshop(out) as one, saving.workshop(out) as other:
        assert one != other


def test_a_workshop_in_no_folder(tmp_path: Path) -> None:
    with (
        pytest.raises((MachineError, InputError), match="cannot create"),
        saving.workshop(tmp_path / "missing" / "net.onnx"),
    ):
        pytest.fail("there is no folder")


def published(output: Path, scale: float, *, external: bool) -> None:
    with saving.workshop(output) as folder:
        made = folder / output.name
        saving.save(model(scale), made, external_above=0 if external else 1 << 40)
        saving.publish(made, output, {"scale": scale})


@pytest.mark.parametrize("external", [False, True])
def test_a_file_is_published_with_its_manifest(tmp_path: Path, external: bool) -> None:
    output = tmp_path / "net.onnx"
    published(output, 2.0, external=external)
    data = ["net.onnx.data"] if external else []
    visible = [name for name in names(tmp_path) if not name.startswith(".")]
    assert visible == ["net.onnx", *data, "net.onnx.json"]
    assert json.loads((tmp_path / "net.onnx.json").read_text()) == {"scale": 2.0}
    np.testing.assert_allclose(said(output), 2 * WEIGHT[:3] + 2)
    assert saving.digest(output) == sha256(Source(output))


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_an_older_file_is_replaced_as_a_whole(tmp_path: Path, before: bool, after: bool) -> None:
    output = tmp_path / "net.onnx"
    published(output, 1.0, external=before)
    published(output, 3.0, external=after)
    np.testing.assert_allclose(said(output), 3 * WEIGHT[:3] + 3)
    assert (tmp_path / "net.onnx.data").exists() == after
    assert json.loads((tmp_path / "net.onnx.json").read_text()) == {"scale": 3.0}


def test_data_come_before_the_graph_and_the_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    synced: list[str] = []
    replace, sync = Path.replace, saving._sync

    def watched(self: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return replace(self, target)

    def seen(path: Path) -> None:
        assert not order, "all are on the disk before the first appears"
        synced.append(path.name)
        sync(path)

    monkeypatch.setattr(Path, "replace", watched)
    monkeypatch.setattr(saving, "_sync", seen)
    published(tmp_path / "net.onnx", 1.0, external=True)
    assert order == synced == ["net.onnx.data", "net.onnx", "net.onnx.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_machine_that_says_no_while_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(MachineError, match="cannot write"):
        published(tmp_path / "net.onnx", 1.0, external=False)
    assert not [name for name in names(tmp_path) if "net.onnx" in name]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_machine_that_says_no_while_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, nth: int
) -> None:
    """Nothing without its parts: no graph whose data are missing, no manifest without a graph."""
    replace = Path.replace
    done: list[Path] = []

    def failing(self: Path, target: Path) -> Path:
        if len(done) == nth:
            raise OSError(errno.ENOSPC, "no")
        done.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(MachineError, match="cannot write"):
        published(tmp_path / "net.onnx", 1.0, external=external)
    left = [name for name in names(tmp_path) if not name.startswith(".")]
    assert "net.onnx.json" not in left
    assert ("net.onnx" in left) == (nth == 1 and not external)
    assert not list(tmp_path.glob(".net.onnx.*.tmp"))
