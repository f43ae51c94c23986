"""Latency of one model, an average and ensembles, on every runtime of this machine.

    python benchmarks/bench_latency.py [--device cpu|cuda] [--image N] [--quick] [--json FILE]

For a ResNet-18-like, a ResNet-50-like, a ViT-S-like network and an MLP: one member (which is what an
average costs, too) and ensembles of 2, 5 and 10, batch sizes 1, 8 and 64. Each row is
`ensemblekit bench`'s: all candidates and runtimes of one batch size take turns. `--quick` leaves out
the two large networks and batch 64.

The figures at the end are ratios: the best way to run an ensemble over the plain loop, and over one
member in its best way; and what `ensemblekit.fastest` chose among the ways of torch, measured again
beside the loop.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import ViT, resnet18, resnet50
from torch import nn

from ensemblekit import EnsembleModule, Head, ModelOptions, fastest
from ensemblekit.commands.bench import BenchOptions, bench, best_rows
from ensemblekit.latency import Effort, measure
from ensemblekit.runtimes.torch_eager import device_clock


def vit_s() -> nn.Module:
    """ViT-S's width and depth, on 65 tokens."""
    return ViT(width=384, depth=12, heads=6)


def mlp() -> nn.Module:
    """Three layers of 512."""
    return nn.Sequential(
        nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int | str, ...]]] = {
    "resnet18": (resnet18, (3, "image", "image")),
    "resnet50": (resnet50, (3, "image", "image")),
    "vit_s": (vit_s, (3, 32, 32)),
    "mlp": (mlp, (128,)),
}
QUICK = ("vit_s", "mlp")
SIZES = (2, 5, 10)


def snapshots(first: nn.Module, count: int) -> list[nn.Module]:
    """Networks like the first, each a little different in every tensor."""
    found = []
    for _ in range(count):
        model = copy.deepcopy(first)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1 + 0.05 * torch.rand_like(tensor)).add_(0.01)
        found.append(model.eval())
    return found


def choice(members: list[nn.Module], x: torch.Tensor, seconds: float) -> dict[str, Any]:
    """What `fastest` takes for these inputs, and its time over the loop's in turns of its own."""
    head = Head("classification", "mean")
    effort = Effort(seconds=2 * seconds, error=0.005, least=3, warm_up_s=seconds)
    taken, loop = fastest(members, head, x, effort=effort), EnsembleModule(members, head).eval()
    with torch.inference_mode():
        times = measure(
            {"taken": lambda: taken(x), "loop": lambda: loop(x)},
            clock=device_clock(x.device),
            batch_size=len(x),
            effort=effort,
        )
    return {
        "chosen": type(taken).__name__,
        "chosen_over_loop": times["taken"].p50_ms / times["loop"].p50_ms,
    }


def measured(
    name: str, device: str, batches: tuple[int, ...], seconds: float, image: int
) -> dict[str, Any]:
    """All rows of one network."""
    build, kind = NETWORKS[name]
    sizes = [image if n == "image" else int(n) for n in kind]
    port = f"input:float32[batch,{','.join(map(str, sizes))}]"
    torch.manual_seed(0)
    first = build()
    members = snapshots(first, max(SIZES))
    with tempfile.TemporaryDirectory() as folder:
        for k, model in enumerate(members):
            torch.save({"state_dict": model.state_dict(), "epoch": k}, f"{folder}/m_{k:02}.pt")
        result = bench(
            folder,
            model=ModelOptions(model=first, device=device, task="classification"),
            options=BenchOptions(
                members=SIZES,
                batches=batches,
                inputs=(port,),
                effort=Effort(seconds=seconds, least=5, warm_up_s=seconds),
            ),
        )
    found: dict[str, Any] = {"input": port, "rows": [row.to_json() for row in result.rows]}
    found["summary"] = list(result.summary)
    found["environment"] = result.environment
    ratios = {}
    for size in batches:
        best = best_rows(result.rows, size)
        loops = {
            row.candidate: row.latency.p50_ms
            for row in result.rows
            if row.runtime == "torch" and row.batch_size == size and row.latency is not None
        }
        one = best.get("single")
        for count in SIZES:
            row = best.get(f"ensemble of {count}")
            if row is None or row.latency is None or one is None or one.latency is None:
                continue
            key = f"{name}_k{count}_batch{size}"
            ratios[f"{key}_best_over_loop"] = row.latency.p50_ms / loops[row.candidate]
            ratios[f"{key}_best_over_one"] = row.latency.p50_ms / one.latency.p50_ms
            ratios[f"{key}_best"] = f"{row.runtime}, {row.execution}"
            placed = [model.to(device) for model in members[:count]]
            x = torch.randn(size, *sizes, device=device)
            for what, value in choice(placed, x, seconds).items():
                ratios[f"{key}_{what}"] = value
    return {**found, "ratios": ratios}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image", type=int, default=224, help="Pixels a side, of the ResNets.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default=None, help="Only these, separated by commas.")
    parser.add_argument("--seconds", type=float, default=0.5, help="For each row.")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    names = arguments.networks.split(",") if arguments.networks else list(NETWORKS)
    if arguments.quick:
        names = [name for name in names if name in QUICK]
    batches = (1, 8) if arguments.quick else (1, 8, 64)
    found = {}
    for name in names:
        found[name] = measured(name, arguments.device, batches, arguments.seconds, arguments.image)
        for row in found[name]["rows"]:
            shown = row["error"] or f"{row['p50_ms']:.3f} ms"
            words = (name, row["candidate"], row["runtime"], row["execution"], row["batch_size"])
            sys.stdout.write(" ".join(map(str, (*words, shown))) + "\n")
        for key, value in found[name]["ratios"].items():
            sys.stdout.write(f"{key:44} {value}\n")
        sys.stdout.flush()
        if arguments.json:  # after each: a large network may be too much for the machine
            Path(arguments.json).write_text(
                json.dumps({"benchmark": "bench_latency", **found}, indent=1) + "\n",
                encoding="utf-8",
            )


if __name__ == "__main__":
    main()
