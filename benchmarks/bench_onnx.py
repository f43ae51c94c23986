"""One-file ONNX ensembles beside the loop in torch, and what the export itself costs.

    python benchmarks/bench_onnx.py [--part ensemble|export|trunk|average] [--json FILE]

All timings of a part are made in turns in one process: torch eager and ONNX Runtime with the same
number of threads, idle threads waiting passively, batch size 1, medians.

ensemble  Five members as one file beside the eager loop over the same members: a ResNet-20-like
          and a ViT-like network; fused and not.
export    Ten ResNet-20-like members: our export beside torch.onnx.export of the module that holds
          all ten.
trunk     Five members that differ in their last block only: the file that shares the trunk beside
          the same file without sharing, and beside one member.
average   One ResNet-50-like model in ONNX Runtime beside torch eager.
"""

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from bench_batchnorm import resnet20
from torch import nn

import ensemblekit
from ensemblekit.ensemble_module import EnsembleModule, Head
from ensemblekit.environment import block
from ensemblekit.graphs import saving
from ensemblekit.graphs.making import Made, Maker
from ensemblekit.graphs.template import Interface, Port, export_whole
from ensemblekit.runtimes.onnx_runtime import Session

HEAD = Head("classification", "mean")
SINGLE = Head("classification")


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        return torch.relu(self.body(x) + self.short(x))


def resnet50() -> nn.Module:
    """ResNet-50's shape: 25.6 million parameters, 224 x 224 images."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for place in range(blocks):
            layers.append(Bottleneck(inputs, 64 << stage, 2 if stage and not place else 1))
            inputs = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        n, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, c))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """ViT-Ti's width on 32 x 32 images in patches of 4: 65 tokens."""

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.place = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the class token."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


def neighbours(first: nn.Module, count: int, *, own: Callable[[str], bool]) -> list[nn.Module]:
    """Copies whose entries differ where `own` says so; no entry is 0 or 1 throughout."""
    generator = torch.Generator().manual_seed(0)
    made = []
    with torch.no_grad():
        for tensor in (*first.parameters(), *first.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator))
        for _ in range(count):
            model = copy.deepcopy(first).eval()
            for key, tensor in model.state_dict().items():
                if tensor.is_floating_point() and own(key):
                    tensor.mul_(1 + 0.02 * torch.rand(tensor.shape, generator=generator))
            made.append(model)
    return made


def interface(shape: Sequence[int]) -> Interface:
    """One image."""
    return Interface((Port("input", "float32", ("batch", *shape)),), None, "logits")


def session(made: Made, folder: Path, name: str) -> Session:
    """The graph, ready to run."""
    saving.save(made.model, folder / name)
    return Session(folder / name)


def medians(runs: dict[str, Callable[[], object]], seconds: float = 4.0) -> dict[str, float]:
    """Milliseconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter_ns()
            run()
            times[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: float(np.median(own)) for name, own in times.items()}


def eager(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A run of the module in plain torch."""

    def run() -> object:
        with torch.inference_mode():
            return module(x)

    return run


def ensemble(folder: Path) -> dict[str, float]:
    """Five members, batch 1."""
    found = {}
    for name, first in (("resnet20", resnet20()), ("vit", ViT())):
        members = neighbours(first, 5, own=lambda _: True)
        x = torch.randn(1, 3, 32, 32)
        maker = Maker(members, HEAD, [torch.randn(3, 3, 32, 32)], interface((3, 32, 32)))
        plain = session(maker.make(), folder, "plain.onnx")
        fused = session(maker.make(fuse=True), folder, "fused.onnx")
        loop = EnsembleModule(members, HEAD).eval()
        want = loop(x).detach().numpy()
        for one in (plain, fused):
            assert np.abs(one.run({"input": x})[0] - want).max() < 1e-4
        ms = medians(
            {
                "loop": eager(loop, x),
                "one": eager(members[0], x),
                "plain": lambda s=plain, x=x: s.run({"input": x}),
                "fused": lambda s=fused, x=x: s.run({"input": x}),
            }
        )
        best = min(ms["plain"], ms["fused"])
        found |= {f"{name}_k5_{key}_ms": value for key, value in ms.items()}
        found[f"{name}_k5_file_faster_than_eager_loop"] = ms["loop"] / best
        found[f"{name}_k5_fused_over_plain"] = ms["fused"] / ms["plain"]
    return found


def export(folder: Path) -> dict[str, float]:
    """Ten members: our export, and torch's of the whole module."""
    members = neighbours(resnet20(), 10, own=lambda _: True)
    example = torch.randn(3, 3, 32, 32)
    ports = interface((3, 32, 32))
    Maker(members[:1], SINGLE, [example], ports)  # imports, which both need
    start = time.perf_counter()
    made = Maker(members, HEAD, [example], ports).make()
    saving.save(made.model, folder / "ours.onnx")
    ours_s = time.perf_counter() - start
    start = time.perf_counter()
    whole = export_whole(EnsembleModule(members, HEAD), [example], ports)
    saving.save(whole, folder / "direct.onnx")
    direct_s = time.perf_counter() - start
    return {"k10_ours_s": ours_s, "k10_direct_s": direct_s, "k10_over_direct": ours_s / direct_s}


def trunk(folder: Path) -> dict[str, float]:
    """Five members whose trunk is frozen."""
    first = resnet20()
    last = sorted({key.split(".")[0] for key in first.state_dict()}, key=int)[-2:]

    def own(key: str) -> bool:
        return key.split(".", maxsplit=1)[0] in last

    members = neighbours(first, 5, own=own)
    apart = neighbours(first, 5, own=lambda _: True)
    x = torch.randn(1, 3, 32, 32)
    example, ports = [torch.randn(3, 3, 32, 32)], interface((3, 32, 32))
    shared = Maker(members, HEAD, example, ports).make()
    whole = Maker(apart, HEAD, example, ports).make()
    one = Maker(members[:1], SINGLE, example, ports).make()
    sessions = {
        name: session(made, folder, f"{name}.onnx")
        for name, made in {"shared": shared, "whole": whole, "one": one}.items()
    }
    ms = medians({name: lambda s=s: s.run({"input": x}) for name, s in sessions.items()})
    return {
        **{f"trunk_{name}_ms": value for name, value in ms.items()},
        "trunk_nodes_shared": shared.nodes,
        "trunk_nodes_whole": whole.nodes,
        "trunk_nodes_one": one.nodes,
        "trunk_shared_over_whole": ms["shared"] / ms["whole"],
        "trunk_shared_over_one": ms["shared"] / ms["one"],
    }


def average(folder: Path) -> dict[str, float]:
    """One ResNet-50-like model."""
    (model,) = neighbours(resnet50(), 1, own=lambda _: True)
    x = torch.randn(1, 3, 224, 224)
    maker = Maker([model], SINGLE, [torch.randn(2, 3, 224, 224)], interface((3, 224, 224)))
    folded = session(maker.make(), folder, "folded.onnx")
    plain = session(maker.make(fold=False), folder, "plain.onnx")
    ms = medians(
        {
            "eager": eager(model, x),
            "folded": lambda: folded.run({"input": x}),
            "plain": lambda: plain.run({"input": x}),
        },
        seconds=12.0,
    )
    return {
        **{f"resnet50_{name}_ms": value for name, value in ms.items()},
        "resnet50_file_faster_than_eager": ms["eager"] / min(ms["folded"], ms["plain"]),
        "resnet50_folded_over_plain": ms["folded"] / ms["plain"],
    }


PARTS = {"ensemble": ensemble, "export": export, "trunk": trunk, "average": average}


def main() -> None:
    """Run the parts and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS))
    parser.add_argument("--json", metavar="FILE", help="Also write the figures there.")
    arguments = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for part, run in PARTS.items():
            if arguments.part in (None, part):
                found |= run(Path(name))
    for key, value in found.items():
        sys.stdout.write(f"{key:42} {value:,.4g}\n")
    facts = {
        "benchmark": "bench_onnx",
        "ensemblekit": ensemblekit.__version__,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "environment": block(),
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**facts, **found}, indent=1) + "\n")
    sys.stdout.write(json.dumps({**facts, **found}) + "\n")


if __name__ == "__main__":
    main()
