"""`.ckpt`: Lightning's container, the newest snapshot's hyper-parameters, and what is left behind."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemblekit import average
from ensemblekit.writers import Content
from ensemblekit.writers.lightning import layout

from ..checkpoints import reading_of
from ..helpers import make_arrays, run, write_series
from .filling import raw_bits, write

HYPER = {
    "lr": 0.1,
    "layers": [16, 32],
    "name": "net é",
    "deep": {"a": {"b": (1, None, True)}},
    "seed": 1 << 40,
}


def opened(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def checkpoint(step: int, **more: Any) -> dict[str, Any]:
    return {
        "epoch": step,
        "global_step": 100 * step,
        "pytorch-lightning_version": f"2.{step}.0",
        "state_dict": {"net.weight": torch.full((2, 3), float(step))},
        "loops": {"state": torch.ones(3)},
        "callbacks": {"ModelCheckpoint": {"monitor": "val_loss"}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [],
        **more,
    }


def saved(folder: Path, *values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, value in enumerate(values, 1):
        torch.save(value, folder / f"epoch={k}.ckpt")
    return folder


def of(folder: Path, **more: Any) -> Path:
    """Two checkpoints, the newest of them with more."""
    return saved(folder, checkpoint(1, hyper_parameters={"lr": 9}), checkpoint(2, **more))


def test_container(tmp_path: Path) -> None:
    run_ = of(tmp_path / "run", hparams_name="kwargs", hyper_parameters=HYPER)
    result = average(run_, tmp_path / "out.ckpt")
    assert result.warnings == ()
    found = opened(tmp_path / "out.ckpt")
    weights = found.pop("state_dict")
    assert found == {
        "epoch": 2,
        "global_step": 200,
        "pytorch-lightning_version": "2.2.0",
        "hparams_name": "kwargs",
        "hyper_parameters": HYPER,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    assert weights["net.weight"].tolist() == [[1.5] * 3] * 2


def test_datamodule(tmp_path: Path) -> None:
    more = {"datamodule_hparams_name": "kwargs", "datamodule_hyper_parameters": {"batch": 8}}
    average(of(tmp_path / "run", **more), tmp_path / "out.ckpt")
    found = opened(tmp_path / "out.ckpt")
    assert {key: found[key] for key in more} == more


def test_read_again(tmp_path: Path) -> None:
    average(of(tmp_path / "run", hyper_parameters=HYPER), tmp_path / "out.ckpt")
    reading = reading_of(tmp_path / "out.ckpt")
    assert reading.layout == "lightning"
    assert (reading.facts.step, reading.facts.epoch) == (200, 2)
    again = average(tmp_path / "out.ckpt", tmp_path / "again.ckpt")
    assert again.warnings == ()
    first, second = opened(tmp_path / "out.ckpt"), opened(tmp_path / "again.ckpt")
    assert first.pop("state_dict").keys() == second.pop("state_dict").keys()
    assert first == second


def test_out_of_plain_weights(tmp_path: Path) -> None:
    """Nothing is known of a network whose checkpoints are not Lightning's."""
    average(write_series(tmp_path / "run"), tmp_path / "out.ckpt")
    found = opened(tmp_path / "out.ckpt")
    assert found.pop("state_dict").keys() == make_arrays(1).keys()
    assert found.pop("pytorch-lightning_version")
    assert found == {
        "epoch": 0, "global_step": 0, "loops": {}, "callbacks": {}, "optimizer_states": [],
        "lr_schedulers": [],
    }  # fmt: skip


class Setting:
    """Of the user's own code."""


LEFT: dict[str, Any] = {
    "object": Setting(),
    "tensor": torch.ones(2),
    "bytes": b"abc",
    "complex": 1j,
    "dtype": torch.float16,
    "function": len,
    "in-list": [Setting(), 1],
}


@pytest.mark.parametrize("name", sorted(LEFT))
def test_what_is_not_plain_is_left_and_named(tmp_path: Path, name: str) -> None:
    hyper = {"lr": 0.1, "deep": {"odd": LEFT[name], "fine": 3}}
    result = average(of(tmp_path / "run", hyper_parameters=hyper), tmp_path / "out.ckpt")
    assert opened(tmp_path / "out.ckpt")["hyper_parameters"] == {"lr": 0.1, "deep": {"fine": 3}}
    [warning] = result.warnings
    assert "not carried along" in warning
    assert "hyper_parameters.deep.odd" in warning


@pytest.mark.parametrize("digits", [254, 300, 1024])
def test_integers_too_large_for_the_format(tmp_path: Path, digits: int) -> None:
    hyper = {"lr": 0.1, "seed": 1 << (8 * digits - 2)}
    result = average(of(tmp_path / "run", hyper_parameters=hyper), tmp_path / "out.ckpt")
    found = opened(tmp_path / "out.ckpt")
    fits = digits == 254
    assert found["hyper_parameters"] == (hyper if fits else {"lr": 0.1})
    assert [w for w in result.warnings if "not carried along" in w and "seed" in w] == list(
        result.warnings
    )
    assert len(result.warnings) == (0 if fits else 1)


def test_said_on_the_command_line(tmp_path: Path) -> None:
    of(tmp_path / "run", hyper_parameters={"lr": 0.1, "odd": Setting()})
    done = run("average", "run", "-o", "out.ckpt", cwd=tmp_path)
    assert done.returncode == 0
    assert "not carried along" in done.stderr
    assert "hyper_parameters.odd" in done.stderr
    assert run("average", "run", "-o", "b.ckpt", "--strict", cwd=tmp_path).returncode == 5
    assert not (tmp_path / "b.ckpt").exists()


def test_a_namespace_as_a_whole(tmp_path: Path) -> None:
    """Lightning takes a dict there, or nothing at all: `None` would stop it."""
    hyper = argparse.Namespace(lr=0.1, odd=Setting())
    result = average(of(tmp_path / "run", hyper_parameters=hyper), tmp_path / "out.ckpt")
    found = opened(tmp_path / "out.ckpt")
    assert "hyper_parameters" not in found or isinstance(found["hyper_parameters"], dict)
    assert any("hyper_parameters" in warning for warning in result.warnings)


def shared(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Callable[[], Any]] = {
    "cycle": cycle,
    "shared": lambda: shared(60),
    "deep": lambda: nested(300),
    "integer": lambda: 1 << 4000,
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_values_that_have_no_end(tmp_path: Path, name: str) -> None:
    """They are left and named, or refused; no traceback, and in the time of any other file."""
    of(tmp_path / "run", hyper_parameters={"lr": 0.1, "odd": HOSTILE[name]()})
    done = run("average", "run", "-o", "out.ckpt", cwd=tmp_path, timeout_s=10)
    assert done.returncode in (0, 3)
    if done.returncode == 0:
        assert opened(tmp_path / "out.ckpt")["hyper_parameters"]["lr"] == 0.1


def test_tied_and_odd_tensors(tmp_path: Path) -> None:
    table = raw_bits("bfloat16", (4, 3))
    arrays = {("a", "bfloat16"): table, ("b", "bfloat16"): table, ("n", "int64"): np.array(3)}
    write(tmp_path / "out.ckpt", arrays, ties=[("a", "b")], document={"epoch": 4})
    found = opened(tmp_path / "out.ckpt")
    assert found["epoch"] == 4
    assert found["state_dict"]["a"].data_ptr() == found["state_dict"]["b"].data_ptr()
    assert found["state_dict"]["n"].item() == 3


def test_no_gaps() -> None:
    made = layout(Content({"w": ((3,), "float32")}, document={"hyper_parameters": HYPER}))
    parts = [(start, len(data)) for start, data in made.frame({"w": 1})]
    end = 0
    for start, nbytes in sorted([*parts, *made.places.values()]):
        assert start == end
        end += nbytes
