"""Hand-written checkpoints: a dict with the model under one key and facts beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ensemblekit.errors import UnsupportedError
from ensemblekit.layouts import NoWeightsError, choose

from ..checkpoints import assert_same_tensors, reading_of, save, state

KEYS = [
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module"),
    *("weights", "params"),
]
EMA_KEYS = [
    *("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_model_state_dict"),
    *("model_ema_state_dict", "ema_params", "ema_weights", "averaged_model"),
]


def optimizer_state(lr: float = 0.125) -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=lr)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_model_key(key: str, beside: bool, tmp_path: Path) -> None:
    extra = {"epoch": 3, "optimizer": optimizer_state(), "rng_state": torch.get_rng_state()}
    value = {key: state(), **(extra if beside else {})}
    path = save(value, tmp_path / "file.pt")
    reading = reading_of(path)
    assert list(reading.weights) == [key]
    assert reading.weights[key].role == "model"
    assert_same_tensors(reading.weights[key].tensors, state())
    for wanted in ("auto", "model", key):
        assert choose(reading.weights, wanted, path) == key


@pytest.mark.parametrize("key", ["generator", "encoder", "student", "my_weights_v2"])
def test_unknown_key_that_stands_alone(key: str, tmp_path: Path) -> None:
    path = save({key: state(), "epoch": 1}, tmp_path / "file.pt")
    reading = reading_of(path)
    assert choose(reading.weights, "auto", path) == key
    assert_same_tensors(reading.weights[key].tensors, state())


@pytest.mark.parametrize("key", KEYS[:4])
@pytest.mark.parametrize("ema", EMA_KEYS)
def test_moving_average_beside_the_model(key: str, ema: str, tmp_path: Path) -> None:
    path = save({key: state(1), ema: state(2), "step": 5}, tmp_path / "file.pt")
    found = reading_of(path).weights
    assert {name: weights.role for name, weights in found.items()} == {key: "model", ema: "ema"}
    assert not any(weights.is_average for weights in found.values())
    for wanted, expected in (("auto", ema), ("ema", ema), ("model", key), (key, key), (ema, ema)):
        assert choose(found, wanted, path) == expected
    assert_same_tensors(found[key].tensors, state(1))
    assert_same_tensors(found[ema].tensors, state(2))


@pytest.mark.parametrize("inner", ["module", "shadow", "state_dict", "model", "params"])
def test_moving_average_with_facts_of_its_own(inner: str, tmp_path: Path) -> None:
    value = {"model": state(1), "ema": {"decay": 0.999, "num_updates": 9, inner: state(2)}}
    path = save(value, tmp_path / "file.pt")
    found = reading_of(path).weights
    assert choose(found, "auto", path) == "ema"
    assert_same_tensors(found["ema"].tensors, state(2))


@pytest.mark.parametrize("key", ["params_ema", "ema_net", "model_averaged", "netG_ema"])
def test_other_names_of_moving_averages(key: str, tmp_path: Path) -> None:
    """With a known key beside it, other weights are dropped without a word."""
    found = reading_of(save({"params": state(1), key: state(2)}, tmp_path / "file.pt")).weights
    assert key in found


@pytest.mark.parametrize("key", ["swa", "swa_model", "swa_state_dict", "model_swa"])
def test_running_average_is_left_alone(key: str, tmp_path: Path) -> None:
    path = save({"model": state(1), key: state(2)}, tmp_path / "file.pt")
    found = reading_of(path).weights
    assert found[key].is_average
    assert choose(found, "auto", path) == "model"
    assert choose(found, "swa", path) == key
    alone = save({key: state(2), "epoch": 4}, tmp_path / "alone.pt")
    assert choose(reading_of(alone).weights, "auto", alone) == key


class Net(nn.Module):
    """Small, with all that a state dict can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)


def averaged(*, buffers: bool = False, ema: bool = False) -> tuple[Net, AveragedModel]:
    net = Net()
    moving: Any = get_ema_multi_avg_fn
    average = (
        AveragedModel(net, multi_avg_fn=moving(0.9), use_buffers=buffers)
        if ema
        else AveragedModel(net, use_buffers=buffers)
    )
    for _ in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(net)
    return net, average


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
def test_averaged_model_beside_the_model(ema: bool, buffers: bool, tmp_path: Path) -> None:
    net, average = averaged(buffers=buffers, ema=ema)
    value = {"model": net.state_dict(), "ema": average.state_dict(), "step": 3}
    path = save(value, tmp_path / "file.pt")
    found = reading_of(path).weights
    assert choose(found, "auto", path) == "ema"
    assert_same_tensors(found["ema"].tensors, average.module.state_dict())
    assert_same_tensors(found["model"].tensors, net.state_dict())


FACTS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "step": ({"step": 12}, "step", 12),
    "global-step": ({"global_step": 12}, "step", 12),
    "iteration": ({"iteration": 12}, "step", 12),
    "step-tensor": ({"step": torch.tensor(12)}, "step", 12),
    "step-numpy": ({"step": np.int64(12)}, "step", 12),
    "step-float": ({"step": 12.0}, "step", 12),
    "step-text": ({"step": "12"}, "step", None),
    "step-nan": ({"step": float("nan")}, "step", None),
    "step-huge": ({"step": 10**400}, "step", None),
    "step-bool": ({"step": True}, "step", None),
    "none": ({}, "step", None),
    "epoch": ({"epoch": 3}, "epoch", 3),
    "epoch-fraction": ({"epoch": 2.5}, "epoch", 2.5),
    "epoch-numpy": ({"epoch": np.float32(2.5)}, "epoch", 2.5),
    "epoch-tensor": ({"epoch": torch.tensor([2.5])}, "epoch", 2.5),
    "lr": ({"lr": 0.1}, "lr", 0.1),
    "lr-of-the-optimizer": ({"optimizer": optimizer_state(0.125)}, "lr", 0.125),
    "lr-of-several": ({"optimizers": [optimizer_state(0.125), optimizer_state(0.5)]}, "lr", 0.125),
    "lr-named-oddly": ({"optim_g": optimizer_state(0.125)}, "lr", 0.125),
    "metric": ({"val_acc": 0.9}, "metrics", {"val_acc": 0.9}),
    "metric-tensor": ({"val_acc": torch.tensor(0.5)}, "metrics", {"val_acc": 0.5}),
    "metric-bfloat16": (
        {"acc": torch.tensor(0.5, dtype=torch.bfloat16)}, "metrics", {"acc": 0.5},
    ),
    "metric-numpy": ({"best_acc": np.float64(0.5)}, "metrics", {"best_acc": 0.5}),
    "metrics": ({"metrics": {"acc": 0.5, "name": "x"}}, "metrics", {"acc": 0.5}),
    "metric-and-others": (
        {"acc": 0.5, "epoch": 1, "step": 2, "lr": 3.0, "seed": 4, "done": True, "curve": [1]},
        "metrics",
        {"acc": 0.5},
    ),
    "metric-of-many-elements": ({"acc": torch.ones(3)}, "metrics", {}),
    "metric-complex": ({"acc": torch.tensor(1j)}, "metrics", {}),
    "architecture": ({"arch": "resnet50"}, "model_hint", "resnet50"),
    "architecture-of-another-kind": ({"arch": {"depth": 3}}, "model_hint", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str, tmp_path: Path) -> None:
    beside, attribute, expected = FACTS[name]
    facts = reading_of(save({"model": state(), **beside}, tmp_path / "file.pt")).facts
    assert getattr(facts, attribute) == expected


def test_two_networks(tmp_path: Path) -> None:
    path = save({"generator": state(1), "discriminator": state(2)}, tmp_path / "file.pt")
    found = reading_of(path).weights
    for wanted in ("auto", "model", "ema", "nonsense"):
        with pytest.raises(UnsupportedError, match=r"generator, discriminator") as caught:
            choose(found, wanted, path)
        assert "--weights generator" in str(caught.value.hint)
    assert choose(found, "discriminator", path) == "discriminator"
    assert_same_tensors(found["discriminator"].tensors, state(2))


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "criterion", "loss_fn", "amp_scaler"])
def test_weights_of_tools_are_no_model(key: str, tmp_path: Path) -> None:
    value = {"state_dict": state(), key: {"weight": torch.ones(3)}}
    assert list(reading_of(save(value, tmp_path / "file.pt")).weights) == ["state_dict"]


@pytest.mark.parametrize(
    "make",
    [
        optimizer_state,
        lambda: {"base_lrs": [0.1], "last_epoch": 3},
        lambda: {"scale": 65536.0, "growth_factor": 2.0},
        lambda: {
            "python": (3, (1,)),
            "numpy": np.arange(3),
            "torch_manual_seed": torch.get_rng_state(),
        },
    ],
)
def test_state_of_tools(make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(NoWeightsError):
        reading_of(save(make(), tmp_path / "file.pt"))


@pytest.mark.parametrize(
    "value",
    [{}, [], None, 3, "text", {"a": 1}, [torch.ones(3)], {"model": {}}, {1: {"a": torch.ones(1)}}],
    ids=repr,
)
def test_no_weights(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        reading_of(save(value, tmp_path / "file.pt"))


def test_whole_modules_under_keys(tmp_path: Path) -> None:
    net, average = averaged()
    path = save({"model": net, "ema": average, "epoch": 1}, tmp_path / "file.pt")
    found = reading_of(path).weights
    assert choose(found, "auto", path) == "ema"
    assert_same_tensors(found["model"].tensors, net.state_dict())
    assert_same_tensors(found["ema"].tensors, average.module.state_dict())
