"""Statistics and predictions on an accelerator, beside those of the CPU."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ensemblekit.batches import Plan, batches
from ensemblekit.batchnorm import norm_layers, recompute_bn

from ..passes import log_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 4, (517,), generator=generator)
    return torch.randn(517, 3, 16, 16, generator=generator) + y.view(-1, 1, 1, 1), y


PLAN = Plan(batch_size=128, shuffle_seed=0)


def test_the_first_layer_holds_the_population_of_its_inputs() -> None:
    model = network().cuda()
    seen: list[torch.Tensor] = []
    hook = model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].double().cpu()))
    recompute_bn(model, batches(data(), PLAN), device="cuda")
    hook.remove()
    values = torch.cat(seen).transpose(0, 1).reshape(8, -1).numpy()
    np.testing.assert_allclose(model[1].running_mean.double().cpu(), values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(model[1].running_var.double().cpu(), values.var(1), rtol=1e-6)


@pytest.mark.parametrize(
    "autocast, within",
    [(None, 1e-2), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)],  # convolutions may use TF32
    ids=["plain", "bf16", "fp16"],
)
def test_statistics_are_those_of_the_cpu(autocast: torch.dtype | None, within: float) -> None:
    model = network()
    twin = copy.deepcopy(model).cuda()
    wanted = recompute_bn(model, batches(data(), PLAN)).statistics
    outcome = recompute_bn(twin, batches(data(), PLAN), device="cuda", autocast=autocast)
    assert all(layer.running_mean.is_cuda for layer in norm_layers(twin).values())
    for key, values in wanted.items():
        found = outcome.statistics[key]
        assert found.device.type == "cpu"
        assert float((found - values).norm() / values.norm()) < within, key


def test_predictions_are_those_of_the_cpu() -> None:
    model = network().eval()
    wanted = log_probs(model, batches(data(), Plan(100)), classes=4)
    found = log_probs(model.cuda(), batches(data(), Plan(100)), classes=4, device="cuda")
    assert float((found - wanted).abs().max()) < 1e-2
