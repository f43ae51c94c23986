"""`recompute_bn` against float64 population statistics, and against torch's `update_bn`."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ensemblekit.batches import Plan, as_batch, batches
from ensemblekit.batchnorm import norm_layers, recompute_bn

torch.set_num_threads(1)

Array = np.ndarray[Any, np.dtype[np.float64]]
KEYS = ("running_mean", "running_var")


class Residual(nn.Module):
    """Two normalised convolutions around a shortcut, with dropout between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, momentum=None),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=True),
        nn.BatchNorm2d(6),
        Residual(6),
        Residual(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(6, affine=False),
        nn.Linear(6, 4),
    )


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each class has its own brightness and contrast, so batches of one class mislead."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (count,), generator=generator)
    x = torch.randn(count, 3, 10, 10, generator=generator)
    return x * (1 + y.view(-1, 1, 1, 1)) + 2 * y.view(-1, 1, 1, 1), y


def reference(model: nn.Module, parts: Sequence[torch.Tensor]) -> dict[str, tuple[Array, Array]]:
    """The same pass written down plainly: keep every input, then numpy over all of them."""
    model = copy.deepcopy(model).eval()
    inputs: dict[str, list[Array]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            kept = inputs.setdefault(name, [])
            module.register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0].double().numpy())
            )
    with torch.no_grad():
        for part in parts:
            model(part)
    flat = {
        name: np.concatenate([a.swapaxes(0, 1).reshape(a.shape[1], -1) for a in kept], axis=1)
        for name, kept in inputs.items()
    }
    return {name: (values.mean(1), values.var(1)) for name, values in flat.items()}


def off(layer: nn.Module, wanted: tuple[Array, Array]) -> list[float]:
    """Relative distance of mean and variance."""
    found = [getattr(layer, key).double().numpy() for key in KEYS]
    return [
        float(np.linalg.norm(f - w) / np.linalg.norm(w)) for f, w in zip(found, wanted, strict=True)
    ]


ORDERS = {"shuffled": False, "class-sorted": True}
CASES = [
    pytest.param(count, order, id=f"{count}-{order}")
    for count in (512, 517)  # in batches of 128: even, and a last batch of 5
    for order in ORDERS
]


@pytest.mark.parametrize("count, order", CASES)
def test_all_layers_equal_the_reference(count: int, order: str) -> None:
    x, y = images(count)
    if ORDERS[order]:
        x = x[y.argsort(stable=True)]
    parts = torch.split(x, 128)
    model = network()
    wanted = reference(model, parts)
    recompute_bn(model, [as_batch(part) for part in parts])
    layers = norm_layers(model)
    assert list(layers) == list(wanted)
    assert len(layers) == 6
    errors = {name: max(off(layer, wanted[name])) for name, layer in layers.items()}
    assert errors["1"] < 1e-6
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("count, order", [c for c in CASES if c.id != "512-shuffled"])
def test_the_first_layer_holds_the_population_where_torch_does_not(count: int, order: str) -> None:
    x, y = images(count)
    if ORDERS[order]:
        x = x[y.argsort(stable=True)]
    ours, theirs = network().eval(), network().eval()
    with torch.no_grad():
        seen = ours[0](x).double().numpy().swapaxes(0, 1).reshape(6, -1)
    wanted = seen.mean(1), seen.var(1)
    recompute_bn(ours, [as_batch(part) for part in torch.split(x, 128)])
    update_bn(torch.split(x, 128), theirs)
    assert max(off(ours[1], wanted)) < 1e-6
    assert max(off(theirs[1], wanted)) > 5e-3


def test_the_stored_order_of_the_data_does_not_matter_to_the_first_layer() -> None:
    x, y = images(300)
    order = y.argsort(stable=True)
    plan = Plan(batch_size=64, shuffle_seed=0)
    found = [
        recompute_bn(network(), batches(data, plan)).statistics["1.running_var"]
        for data in ((x, y), (x[order], y[order]))
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-7)


def test_class_sorted_map_style_data_are_mixed_for_the_deeper_layers() -> None:
    x, y = images(400)
    order = y.argsort(stable=True)
    plan = Plan(batch_size=100, shuffle_seed=0)
    mixed = recompute_bn(network(), batches((x, y), plan)).statistics
    outcome = recompute_bn(network(), batches((x[order], y[order]), plan))
    assert not outcome.warnings
    for key, wanted in mixed.items():
        assert float((outcome.statistics[key] - wanted).norm() / wanted.norm()) < 0.1, key


def test_full_batch_statistics_are_those_of_torchs_train_mode() -> None:
    """In float64: a mean near zero has no relative error worth its name in float32, its distance in
    standard deviations has."""
    x, _ = images(200)
    ours, theirs = network().eval(), network().eval().double()
    recompute_bn(ours, [as_batch(x)])
    for layer in norm_layers(theirs).values():
        layer.train()
        layer.momentum = 1.0
    with torch.no_grad():
        theirs(x.double())
    for name, layer in norm_layers(theirs).items():
        values = 200 * (64 if name.startswith(("1", "2", "3")) else 1)
        var = (layer.running_var * (values - 1) / values).numpy()
        mean, own = layer.running_mean.numpy(), norm_layers(ours)[name]
        assert np.abs(own.running_mean.numpy() - mean).max() < 1e-6 * np.sqrt(var.max()), name
        np.testing.assert_allclose(own.running_var.numpy(), var, rtol=1e-6, err_msg=name)
