"""Why averaging failed: each cause is made on purpose, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ensemblekit import ModelOptions
from ensemblekit.commands.compare import CompareOptions, compare

torch.set_num_threads(1)
State = dict[str, torch.Tensor]
CENTRES = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def data(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed({"train": 10, "val": 11, "test": 12}[split])
    y = torch.arange(600) % 6
    y = y[torch.randperm(600, generator=generator)]
    return CENTRES[y] + 0.9 * torch.randn(600, 16, generator=generator), y


def net(*, norm: bool = True, depth: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for level in range(depth):
        layers += [nn.Linear(32 if level else 16, 32), *([nn.BatchNorm1d(32)] if norm else [])]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(32, 6))


def train(
    seed: int, *, norm: bool = True, depth: int = 1, snapshots: int = 4, lr: float = 0.02
) -> list[State]:
    torch.manual_seed(seed)
    model, (x, y) = net(norm=norm, depth=depth).train(), data("train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for epoch in range(14 + snapshots):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if epoch < 14 else lr
        for index in torch.randperm(600).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
        if epoch >= 14:
            found.append({k: v.clone() for k, v in model.state_dict().items()})
    return found


def diagnosed(
    tmp_path: Path,
    states: list[State],
    *,
    norm: bool = True,
    depth: int = 1,
    rates: list[float] | None = None,
    with_train: bool = True,
    val: Any = None,
    model: nn.Module | None = None,
    safetensors: bool = False,
) -> dict[str, Any] | None:
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for k, state in enumerate(states):
        value: dict[str, Any] = {"state_dict": state, "epoch": k}
        if rates is not None:
            value["optimizer"] = {"state": {}, "param_groups": [{"lr": rates[k], "params": []}]}
        if safetensors:
            save_file(state, folder / f"model_{k}.safetensors")
        else:
            torch.save(value, folder / f"model_{k}.pt")
    options = ModelOptions(
        model=model or net(norm=norm, depth=depth),
        train_data=data("train") if with_train else None,
        val_data=val or data("val"),
        test_data=data("test"),
        device="cpu",
    )
    found = compare(
        folder,
        model=options,
        options=CompareOptions(candidates="singles,averages", cache_bytes=0),
    )
    assert found is not None
    diagnosis: dict[str, Any] | None = found.comparison["diagnosis"]
    assert (diagnosis is None) == (
        not any(": " in w and "Next:" in w for w in found.comparison["warnings"])
    )
    return diagnosis


def permuted(state: State, seed: int) -> State:
    """The same function with its hidden units in another order."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    last = max(int(key.split(".")[0]) for key in state)
    return {
        key: value[:, order]
        if key == f"{last}.weight"
        else value[order]
        if value.ndim and len(value) == 32
        else value
        for key, value in state.items()
    }


def test_a_run_that_averages_well(tmp_path: Path) -> None:
    assert diagnosed(tmp_path, train(0)) is None


@pytest.mark.parametrize("norm", [True, False])
def test_two_seeds(tmp_path: Path, norm: bool) -> None:
    states = [train(seed, norm=norm, snapshots=1)[-1] for seed in range(3)]
    found = diagnosed(tmp_path, states, norm=norm)
    assert found is not None
    assert found["verdict"] == "different basins"
    positions = [point["position"] for point in found["path"]]
    assert positions == [0.0, 0.25, 0.5, 0.75, 1.0]
    ends = [found["path"][0], found["path"][-1]]
    assert all(p["metric_averaged_bn"] > found["path"][2]["metric_averaged_bn"] for p in ends)
    assert "ensemble" in found["next"]


@pytest.mark.parametrize("norm", [True, False])
def test_permuted_channels(tmp_path: Path, norm: bool) -> None:
    states = train(0, norm=norm, snapshots=3)
    found = diagnosed(
        tmp_path, [states[0], permuted(states[1], 1), permuted(states[2], 2)], norm=norm
    )
    assert found is not None
    assert found["verdict"] == "permuted"


class Named(nn.Module):
    """The same network with names whose alphabetical order is not that of the layers."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.stem, *rest, self.classifier = net(norm=norm, depth=2)
        self.middle = nn.Sequential(*rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.classifier(self.middle(self.stem(x)))
        return out

    @staticmethod
    def named(state: State, seed: int | None = None) -> State:
        """What `net` calls 0, 1, ...; with a seed both hidden layers are in another order."""
        generator = torch.Generator().manual_seed(seed or 0)
        orders = torch.stack([torch.randperm(32, generator=generator) for _ in range(2)])
        first, second = torch.arange(32).expand(2, 32) if seed is None else orders
        last = max(int(key.split(".")[0]) for key in state)
        middle = min(int(k.split(".")[0]) for k, v in state.items() if v.shape == (32, 32))
        found: State = {}
        for key, value in state.items():
            number, what = key.split(".")
            place = int(number)
            if place in (middle, last) and what == "weight":
                value = value[:, first if place == middle else second]  # noqa: PLW2901
            if place < last and value.ndim:
                value = value[first if place < middle else second]  # noqa: PLW2901
            name = {0: "stem", last: "classifier"}.get(place, f"middle.{place - 1}")
            found[f"{name}.{what}"] = value.contiguous()
        return found


@pytest.mark.parametrize("norm", [True, False])
def test_permuted_channels_of_files_in_alphabetical_order(tmp_path: Path, norm: bool) -> None:
    """A .safetensors file has the head first, and layers whose inputs are permuted as well."""
    states = train(0, norm=norm, depth=2, snapshots=3)
    orders = (None, 1, 2)
    states = [Named.named(s, seed) for s, seed in zip(states, orders, strict=True)]
    model = Named(norm=norm)
    found = diagnosed(tmp_path, states, model=model, safetensors=True)
    keys = [
        k for k, v in load_file(tmp_path / "ckpts" / "model_0.safetensors").items() if v.ndim > 1
    ]
    assert keys[0] == "classifier.weight"
    assert keys[-1] == "stem.weight"
    assert found is not None
    assert found["verdict"] == "permuted"
    ends = [found["path"][0], found["path"][-1]]
    assert all(p["metric_averaged_bn"] > 0.8 for p in ends)


def test_stale_statistics(tmp_path: Path) -> None:
    """Good weights, and statistics that do not fit their mean."""
    states = train(0, depth=4, snapshots=12)
    for level in range(4):  # a scale that BatchNorm takes away: the function is the same
        for key, power in (("weight", 1), ("bias", 1), ("running_mean", 1), ("running_var", 2)):
            name = f"{3 * level + (power == 2 or key == 'running_mean')}.{key}"
            states[0][name] = states[0][name] * 30.0**power
    found = diagnosed(tmp_path, states, depth=4, with_train=False)
    assert found is not None
    assert found["verdict"] == "stale BatchNorm"
    assert "--train-data" in found["next"]


def test_a_member_at_the_maximum_rate(tmp_path: Path) -> None:
    states = train(0, snapshots=5)
    wild = {
        key: value + 1.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        if value.is_floating_point() and "running" not in key
        else value
        for key, value in states[2].items()
    }
    states[2] = wild
    found = diagnosed(tmp_path, states, rates=[0.01, 0.01, 0.5, 0.01, 0.01])
    assert found is None or found["verdict"] == "maximum-LR member"
    if found is not None:
        assert "model_2.pt" in found["next"]


def test_a_weak_member(tmp_path: Path) -> None:
    states = train(0, snapshots=4, norm=False)
    generator = torch.Generator().manual_seed(3)
    states[0] = {k: 6 * torch.randn(v.shape, generator=generator) for k, v in states[0].items()}
    found = diagnosed(tmp_path, states, norm=False)
    assert found is not None
    assert found["verdict"] == "weak members"
    assert "--exclude 'model_0.pt'" in found["next"]


def test_labels_of_something_else(tmp_path: Path) -> None:
    x, y = data("val")
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(5))]
    found = diagnosed(tmp_path, train(0), val=(x, shuffled))
    assert found is not None
    assert found["verdict"] == "mismatched model"


def test_a_diagnosis_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemblekit.commands import compare as module
    from ensemblekit.errors import InputError

    def fails(*_: Any) -> None:
        raise InputError("no")

    monkeypatch.setattr(module, "diagnose", fails)
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for k, state in enumerate(train(0)):
        torch.save({"state_dict": state, "epoch": k}, folder / f"model_{k}.pt")
    options = ModelOptions(model=net(), val_data=data("val"), test_data=data("test"), device="cpu")
    found = compare(folder, model=options, options=CompareOptions(cache_bytes=0))
    assert found is not None
    assert found.comparison["decision"]["ship"]
    assert any("could not be told" in text for text in found.comparison["warnings"])


def test_statistics_of_the_diagnosis_are_of_the_choosing_data(tmp_path: Path) -> None:
    """A target that has a training split is not asked for it."""
    asked: list[str] = []

    def spied(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(split)
        return data(split)

    states = [train(seed, snapshots=1)[-1] for seed in range(3)]
    assert diagnosed(tmp_path, states, with_train=False, val=spied("val")) is not None
    assert set(asked) == {"val"}
