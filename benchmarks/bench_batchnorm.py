"""Time of `recompute_bn` beside torch's `update_bn`, on a ResNet-20 and random 32x32 images.

    python benchmarks/bench_batchnorm.py [--samples 1024] [--batch-size 128] [--repeats 7]

Both see the same batches in memory; runs alternate, and the median of each is shown. The plain
forward pass in eval mode is the floor of what any such method can take.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import ensemblekit
from ensemblekit.batches import as_batch
from ensemblekit.batchnorm import recompute_bn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, section 4.2, option A)."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        missing = out.shape[1] - short.shape[1]
        return torch.relu(out + nn.functional.pad(short, (0, 0, 0, 0, 0, missing)))


def resnet20() -> nn.Sequential:
    """19 convolutions, 19 BatchNorm layers, one linear layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inside = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for number in range(3):
            layers.append(Block(inside, width, stride if number == 0 else 1))
            inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def seconds(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Wall time of one call."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = resnet20().to(device)
    x = torch.randn(options.samples, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    parts = list(x.to(device).split(options.batch_size))

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            for part in parts:
                model(part)

    calls: dict[str, Callable[[], object]] = {
        "forward pass, eval mode": forward,
        "torch update_bn": lambda: update_bn(parts, model),
        "ensemblekit recompute_bn": lambda: recompute_bn(
            model, [as_batch(part) for part in parts], device=device
        ),
        "the same, bf16": lambda: recompute_bn(
            model, [as_batch(part) for part in parts], device=device, autocast=torch.bfloat16
        ),
        "the same, channels_last": lambda: recompute_bn(
            model, [as_batch(part) for part in parts], device=device, channels_last=True
        ),
        "the same, both": lambda: recompute_bn(
            model,
            [as_batch(part) for part in parts],
            device=device,
            autocast=torch.bfloat16,
            channels_last=True,
        ),
    }
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(options.repeats + 1):
        for name, call in calls.items():
            taken = seconds(call, synchronize)
            if round_number:  # the first round warms up
                times[name].append(taken)
    median = {name: statistics.median(values) for name, values in times.items()}
    base = median["torch update_bn"]
    print(f"{options.samples} images in batches of {options.batch_size}, {device}")  # noqa: T201
    print(f"{'':26}{'median ms':>11}{'min':>9}{'max':>9}{'ratio':>8}")  # noqa: T201
    for name, values in times.items():
        row = f"{median[name] * 1e3:11.1f}{min(values) * 1e3:9.1f}{max(values) * 1e3:9.1f}"
        print(f"{name:26}{row}{median[name] / base:8.2f}")  # noqa: T201
    facts = {
        "benchmark": "batchnorm",
        "ratio": round(median["ensemblekit recompute_bn"] / base, 3),
        "ratio_bf16_channels_last": round(median["the same, both"] / base, 3),
        "median_s": {name: round(value, 4) for name, value in median.items()},
        **vars(options),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ensemblekit": ensemblekit.__version__,
        "system": f"{sys.platform} {platform.release()}",
    }
    print(json.dumps(facts))  # noqa: T201


if __name__ == "__main__":
    main()
