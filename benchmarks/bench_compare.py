"""Time and memory of `ensemblekit compare` beside the work it cannot do without.

    python benchmarks/bench_compare.py [--part cost|subsets|size] [--images 2000]

Three parts, each with its own ratios; one JSON line at the end, a table before it.

cost     Ten ResNet-20 snapshots (random weights: the time is the same), 2 x `--images` images.
         Whole-process time of `compare --candidates singles,ensembles` and of the default set,
         beside the bare forward and BatchNorm passes in one loop over batches in memory, and
         beside ten processes that each load one checkpoint and evaluate it.
subsets  Accuracy and NLL of all 2^K - 1 subsets from predictions, beside the scoring of the one
         full ensemble (exp, mean, log, argmax in torch), and beside the naive loop over subsets.
size     `compare` at the size of ImageNet's validation set: 50,000 samples, 1,000 classes, ten
         members (linear models, so that predictions dominate): time and peak memory.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import resnet20

import ensemblekit
from ensemblekit.rivals import all_subset_weights, find_rivals, score_mixes, subsets

MEMBERS = 10
BATCH = 128

MODEL = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np, torch
from networks import resnet20

def net():
    return resnet20()

def data(split):
    z = np.load({data!r})
    return torch.from_numpy(z["x_" + split]), torch.from_numpy(z["y_" + split])
"""

ONE = """
import sys, torch
sys.path.insert(0, {work!r})
import target
model = target.net()
model.load_state_dict(torch.load(sys.argv[1])["state_dict"])
model.eval()
for split in ("val", "test"):
    x, y = target.data(split)
    with torch.inference_mode():
        z = torch.cat([model(b) for b in x.split({batch})])
    print(split, float((z.argmax(1) == y).float().mean()),
          float(torch.nn.functional.cross_entropy(z, y)))
"""

LINEAR = """
import numpy as np, torch

def net():
    return torch.nn.Linear(64, 1000)

def data(split):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, 64, generator=generator)
    y = torch.randint(0, 1000, (50_000,), generator=generator)
    return centres[y] + 1.2 * torch.randn(50_000, 64, generator=generator), y
"""


def timed(call: Callable[[], Any], *, least: int = 1, seconds: float = 0.0) -> float:
    """The best of several runs, in seconds."""
    best, end, done = float("inf"), time.perf_counter() + seconds, 0
    while done < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        done += 1
    return best


def run(argv: list[str], cwd: Path) -> float:
    """Wall time of a process that must succeed."""
    start = time.perf_counter()
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - start


def cost(images: int, turns: int) -> dict[str, float]:
    """Compare beside its passes alone."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        generator = torch.Generator().manual_seed(0)
        arrays = {}
        for split in ("val", "test", "train"):
            arrays["x_" + split] = torch.randn(images, 3, 32, 32, generator=generator).numpy()
            arrays["y_" + split] = torch.randint(0, 10, (images,), generator=generator).numpy()
        np.savez(work / "data.npz", **arrays)
        (work / "ckpts").mkdir()
        models = []
        first = resnet20().state_dict()
        for k in range(MEMBERS):  # neighbours, as snapshots are
            state = {
                key: v * (1 + 0.01 * torch.rand(v.shape, generator=generator))
                if v.is_floating_point()
                else v.clone()
                for key, v in first.items()
            }
            torch.save({"state_dict": state, "epoch": k}, work / "ckpts" / f"model_{k:02}.pt")
            model = resnet20()
            model.load_state_dict(state)
            models.append(model.eval())
        here = str(Path(__file__).resolve().parent)
        (work / "target.py").write_text(
            MODEL.format(folder=here, data=str(work / "data.npz")), encoding="utf-8"
        )
        (work / "one.py").write_text(ONE.format(work=str(work), batch=BATCH), encoding="utf-8")
        x = torch.from_numpy(arrays["x_val"])

        def forward() -> None:
            with torch.inference_mode():
                for batch in x.split(BATCH):
                    for model in models:
                        model(batch)

        def batch_norm() -> None:
            model = resnet20().train()
            with torch.no_grad():
                for batch in x.split(BATCH):
                    model(batch)

        def gradient() -> None:
            model = resnet20().eval()
            for batch in x.split(BATCH):
                model(batch).sum().backward()

        ensemblekit_ = [sys.executable, "-m", "ensemblekit", "-q", "compare", "ckpts", "--force"]
        targets = ["--model", "target.py:net", "--val-data", "target.py:data"]
        targets += ["--test-data", "target.py:data", "--cache-size", "0"]
        narrow = [*ensemblekit_, *targets, "-o", "narrow", "--candidates", "singles,ensembles"]
        whole = [*ensemblekit_, *targets, "-o", "whole", "--train-data", "target.py:data"]
        # In turns, and the best of each: the machine's speed changes from minute to minute.
        best: dict[str, float] = {}
        works: dict[str, Callable[[], float]] = {
            "forward": lambda: timed(forward) / MEMBERS,
            "narrow": lambda: run(narrow, work),
            "batch_norm": lambda: timed(batch_norm),
            "gradient": lambda: timed(gradient),
            "whole": lambda: run(whole, work),
        }
        for _ in range(turns):
            for name_, turn in works.items():
                best[name_] = min(turn(), best.get(name_, float("inf")))
        forward_s, narrow_s, whole_s = best["forward"], best["narrow"], best["whole"]
        batch_norm_s, gradient_s = best["batch_norm"], best["gradient"]
        passes = json.loads((work / "whole" / "comparison.json").read_text())["passes"]
        separate_s = sum(
            run([sys.executable, "one.py", str(path)], work)
            for path in sorted((work / "ckpts").iterdir())
        )
    alone_s = 2 * MEMBERS * forward_s
    whole_alone_s = (
        passes["forward"] * forward_s
        + passes["batch_norm"] * batch_norm_s
        + passes["gradient"] * gradient_s
    )
    return {
        "forward_pass_s": forward_s,
        "batch_norm_pass_s": batch_norm_s,
        "singles_and_ensembles_s": narrow_s,
        "over_forward_passes_alone": narrow_s / alone_s,
        "over_ten_processes": narrow_s / separate_s,
        "default_set_s": whole_s,
        "default_forward_passes": passes["forward"],
        "default_batch_norm_passes": passes["batch_norm"],
        "default_gradient_passes": passes["gradient"],
        "default_over_its_passes_alone": whole_s / whole_alone_s,
    }


def all_subsets() -> dict[str, float]:
    """All subsets beside one full ensemble, and beside the naive loop."""
    found: dict[str, float] = {}
    for samples, classes in ((4_000, 10), (50_000, 100), (50_000, 1000)):
        for members in (8, 10):
            generator = np.random.default_rng(0)
            logits = generator.normal(size=(samples, classes)).astype(np.float32) * 2
            truth = generator.integers(0, classes, samples)
            logits[np.arange(samples), truth] += 8 if classes == 10 else 9.5
            noise = generator.normal(size=(members, samples, classes)).astype(np.float32)
            log_probs = torch.log_softmax(torch.from_numpy(logits + 1.2 * noise), -1)
            del noise
            targets = torch.from_numpy(truth)

            def score(
                chosen: list[int], lp: torch.Tensor = log_probs, y: torch.Tensor = targets
            ) -> tuple[int, float]:
                mean = lp[chosen].exp().mean(0)
                true = mean.gather(1, y[:, None])[:, 0]
                return int((mean.argmax(1) == y).sum()), float(-true.double().log().mean())

            def every(
                lp: torch.Tensor = log_probs, y: np.ndarray[Any, Any] = truth, m: int = members
            ) -> Any:
                return score_mixes(find_rivals(list(lp.numpy()), y), all_subset_weights(m))

            whole = list(range(members))
            assert every().correct_S[-1] == score(whole)[0]
            full_s = timed(lambda: score(whole), least=3, seconds=1.0)  # noqa: B023
            every_s = timed(every, least=2, seconds=1.0)
            chosen = list(subsets(members))[:: 1 if classes == 10 else 31]
            naive_s = timed(lambda: [score(list(c)) for c in chosen])  # noqa: B023
            naive_s *= (2**members - 1) / len(chosen)
            name = f"{samples}x{classes}_k{members}"
            found[f"{name}_all_subsets_s"] = every_s
            found[f"{name}_over_full_ensemble"] = every_s / full_s
            found[f"{name}_over_naive_loop"] = every_s / naive_s
    return found


def size() -> dict[str, float]:
    """Compare with 50,000 x 1,000 x 10 outputs."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "target.py").write_text(LINEAR, encoding="utf-8")
        (work / "ckpts").mkdir()
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(1000, 64, generator=generator)
        for k in range(MEMBERS):
            weight = centres + 0.5 * torch.randn(1000, 64, generator=generator)
            state = {"weight": weight, "bias": -0.5 * (weight**2).sum(1)}
            torch.save({"state_dict": state, "epoch": k}, work / "ckpts" / f"model_{k:02}.pt")
        argv = [sys.executable, "-m", "ensemblekit", "-q", "compare", "ckpts", "-o", "out"]
        argv += ["--model", "target.py:net", "--val-data", "target.py:data"]
        argv += ["--cache-dir", "cache", "--batch-size", "500"]
        argv += ["--candidates", "singles,averages,ensembles,combiners"]
        wall_s = run(argv, work)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        again_s = run([*argv, "--force"], work)
        kept = sum(path.stat().st_size for path in (work / "cache").rglob("*") if path.is_file())
    return {
        "imagenet_size_s": wall_s,
        "imagenet_size_again_from_cache_s": again_s,
        "imagenet_size_peak_bytes": peak,
        "imagenet_size_cache_bytes": kept,
    }


def main() -> None:
    """Run the parts and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["cost", "subsets", "size"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "size": size,
        "subsets": all_subsets,
        "cost": lambda: cost(arguments.images, arguments.turns),
    }
    found: dict[str, float] = {}
    for name, part in parts.items():
        if arguments.part in (None, name):
            found |= part()
    for key, value in found.items():
        sys.stdout.write(f"{key:42} {value:,.4g}\n")
    environment = {
        "benchmark": "bench_compare",
        "ensemblekit": ensemblekit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "images": arguments.images,
    }
    sys.stdout.write(json.dumps({**environment, **found}) + "\n")


if __name__ == "__main__":
    main()
