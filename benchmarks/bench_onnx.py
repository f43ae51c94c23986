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
from networks import ViT, resnet20, resnet50
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
