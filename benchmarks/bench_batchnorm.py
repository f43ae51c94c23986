"""Time and accuracy of `recompute_bn` beside its peers, on random images.

    python benchmarks/bench_batchnorm.py [--networks resnet20,resnet50] [--repeats 7] [--json FILE]

resnet20  1,024 images of 32 x 32 in batches of 128.
resnet50  32 images of 224 x 224 in batches of 16.

Peers are torch's `update_bn` and fvcore's PreciseBN, which is measured where fvcore is installed
(`pip install -c constraints.txt fvcore`, which keeps torch as it is) and says "not measured"
elsewhere. All see the same batches in memory; runs alternate, and the median of each is shown. The
plain forward pass in eval mode is the floor of what any such method can take, in float32 and in
bfloat16 with channels_last.

Accuracy is the largest distance, over channels and layers, from the population statistics of the
same batches in float64: of running means in standard deviations, of running variances relative. It
is zero for none, because models and buffers are float32. With `--samples 1000`, which batches of 128
do not divide, it also shows who gives a short last batch the weight of a full one.
"""

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from networks import resnet20, resnet50
from torch import nn
from torch.optim.swa_utils import update_bn

import ensemblekit
from ensemblekit.batches import as_batch
from ensemblekit.batchnorm import recompute_bn

FLOOR = "forward pass, eval mode"
HALF_FLOOR = "the same, bf16 + channels_last"
TORCH = "torch update_bn"
FVCORE = "fvcore PreciseBN"
OURS = "ensemblekit recompute_bn"
BOTH = "the same, both"

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "resnet20": (resnet20, 32, 1024, 128),  # pixels, images, images in a batch
    "resnet50": (resnet50, 224, 32, 16),
}


def seconds(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Wall time of one call."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def precise_bn(model: nn.Module, parts: Sequence[torch.Tensor]) -> Callable[[], object] | None:
    """A call of fvcore's PreciseBN, None where fvcore does not import."""
    try:
        from fvcore.nn.precise_bn import update_bn_stats
    except ImportError:
        return None

    def call() -> None:
        model.train()  # it takes the layers that are in train mode, and leaves all flags alone
        update_bn_stats(model, parts, num_iters=len(parts))  # else it wants 200 batches

    return call


def population(
    model: nn.Module, parts: Sequence[torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance of all values that each BatchNorm layer sees, in float64 on the CPU.

    One reference fits all: each method has the earlier layers normalise by their own batch while
    later ones are looked at, and so does this. What that differs from inference, where they
    normalise by the finished statistics, is no method's error here.
    """
    twin = copy.deepcopy(model).cpu().double().train()
    layers = {m: name for name, m in twin.named_modules() if isinstance(m, nn.BatchNorm2d)}
    sums: dict[str, Any] = dict.fromkeys(layers.values(), 0)

    def see(layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        x = args[0].transpose(0, 1).flatten(1)
        counts = torch.full_like(x[:, 0], x.shape[1])
        sums[layers[layer]] += torch.stack([counts, x.sum(1), x.square().sum(1)])

    for layer in layers:
        layer.register_forward_pre_hook(see)
    with torch.no_grad():
        for part in parts:
            twin(part.cpu().double())
    found = {}
    for name, (counts, values, squares) in sums.items():
        mean = values / counts
        found[name] = mean, squares / counts - mean**2
    return found


def distances(
    model: nn.Module, wanted: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float, float]:
    """The largest of running means in standard deviations, and of running variances, relative."""
    means, variances = [], []
    for name, (mean, var) in wanted.items():
        layer = model.get_submodule(name)
        means.append(((layer.running_mean.cpu().double() - mean) / var.sqrt()).abs().max())
        variances.append((layer.running_var.cpu().double() / var - 1).abs().max())
    return float(max(means)), float(max(variances))


def forward_pass(
    model: nn.Module, parts: Sequence[torch.Tensor], half: torch.dtype | None
) -> Callable[[], object]:
    """A call that runs the network and looks at nothing."""

    def call() -> None:
        model.eval()
        kind = parts[0].device.type
        with torch.no_grad(), torch.autocast(kind, half, half is not None):
            for part in parts:
                model(part)

    return call


def contenders(
    model: nn.Module, parts: Sequence[torch.Tensor], device: torch.device
) -> dict[str, Callable[[], object] | None]:
    """What is measured, by name; None where it does not import."""
    last = torch.channels_last
    twin = copy.deepcopy(model).to(memory_format=last)
    in_last = [part.contiguous(memory_format=last) for part in parts]

    def ours(**options: Any) -> Callable[[], object]:
        return lambda: recompute_bn(
            model, [as_batch(part) for part in parts], device=device, **options
        )

    return {
        FLOOR: forward_pass(model, parts, None),
        HALF_FLOOR: forward_pass(twin, in_last, torch.bfloat16),
        TORCH: lambda: update_bn(parts, model),
        FVCORE: precise_bn(model, parts),
        OURS: ours(),
        "the same, bf16": ours(autocast=torch.bfloat16),
        "the same, channels_last": ours(channels_last=True),
        BOTH: ours(autocast=torch.bfloat16, channels_last=True),
    }


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Print the table of one network and return its figures."""
    make, pixels, samples, batch_size = NETWORKS[name]
    samples = options.samples or samples
    torch.manual_seed(0)
    model = make().to(device)
    x = torch.randn(samples, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    parts = list(x.to(device).split(batch_size))
    calls = contenders(model, parts, device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wanted = population(model, parts)
    times: dict[str, list[float]] = {each: [] for each, call in calls.items() if call is not None}
    off: dict[str, tuple[float, float]] = {}
    for round_number in range(options.repeats + 1):
        for label, call in calls.items():
            if call is None:
                continue
            taken = seconds(call, synchronize)
            if round_number:  # the first round warms up
                times[label].append(taken)
            elif label not in (FLOOR, HALF_FLOOR):
                off[label] = distances(model, wanted)
    median = {each: statistics.median(values) for each, values in times.items()}
    base = median[TORCH]
    print(f"{samples} images of {pixels} px in batches of {batch_size}, {device}")  # noqa: T201
    heads = f"{'median ms':>11}{'min':>9}{'max':>9}{'ratio':>8}{'mean off':>11}{'var off':>11}"
    print(f"{'':30}{heads}")  # noqa: T201
    for label in calls:
        if label not in times:
            print(f"{label:30}{'not measured':>14}")  # noqa: T201
            continue
        values = times[label]
        row = f"{median[label] * 1e3:11.1f}{min(values) * 1e3:9.1f}{max(values) * 1e3:9.1f}"
        row += f"{median[label] / base:8.2f}"
        row += "".join(f"{value:11.1e}" for value in off.get(label, ()))
        print(f"{label:30}{row}")  # noqa: T201
    print()  # noqa: T201
    return {
        "samples": samples,
        "pixels": pixels,
        "batch_size": batch_size,
        "ratio": round(median[OURS] / base, 3),
        "ratio_bf16_channels_last": round(median[BOTH] / base, 3),
        "ratio_of_its_forward_pass": round(median[HALF_FLOOR] / base, 3),
        "ratio_to_fvcore": round(median[OURS] / median[FVCORE], 3) if FVCORE in median else None,
        "median_s": {each: round(median[each], 4) if each in median else None for each in calls},
        "mean_off_std": {
            each: float(f"{off[each][0]:.2e}") if each in off else None for each in calls
        },
        "var_off_relative": {
            each: float(f"{off[each][1]:.2e}") if each in off else None for each in calls
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--samples", type=int, help="instead of each network's own number")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the line of JSON to this file, too")
    options = parser.parse_args()
    device = torch.device(options.device)
    found = {name: measure(name, options, device) for name in options.networks.split(",")}
    compared = any(figures["ratio_to_fvcore"] is not None for figures in found.values())
    facts = {
        "benchmark": "batchnorm",
        "networks": found,
        "repeats": options.repeats,
        "device": options.device,
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fvcore": importlib.metadata.version("fvcore") if compared else None,
        "ensemblekit": ensemblekit.__version__,
        "system": f"{sys.platform} {platform.release()}",
    }
    line = json.dumps(facts)
    print(line)  # noqa: T201
    if options.json is not None:
        options.json.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
