"""Owns what the tests of `compare` share: tiny networks and data of every task, trained for a moment.

A `Problem` holds Python objects; `CODE` is a file of targets for the command line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ensemblekit import ModelOptions
from ensemblekit.commands.compare import CompareOptions, CompareResult, compare

Weights = dict[str, torch.Tensor]
Array = np.ndarray[Any, Any]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Problem:
    """A task with its data and the snapshots of a short run.

    Attributes:
        task: As `compare` calls it.
        make: The network.
        data: Each split as `compare` takes it.
        loss: Of the network's outputs for a batch of that split.
        weights: The snapshots.
        options: What the model options need besides.
    """

    task: str
    make: Callable[[], nn.Module]
    data: dict[str, Any]
    weights: tuple[Weights, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------ networks


def mlp(classes: int = 4, *, norm: bool = True) -> nn.Module:
    layers = [nn.Linear(5, 12), *([nn.BatchNorm1d(12)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(12, classes))


class Outputs:
    """What transformers' models return, as far as anyone looks at it."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.loss = None
        self.logits = logits


class Wrapped(nn.Module):
    """The network with its logits in something else."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.net = mlp()
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.net(x))


class Flat(nn.Module):
    """One output a sample, without an axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[:, 0]


class Segments(nn.Module):
    """A convolution or two; every second pixel only where `stride` is 2."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, stride=stride),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 3, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Causal(nn.Module):
    """Position t sees the mean of what stands up to t."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.head = nn.Linear(16, 7)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Outputs:
        seen = self.embed(input_ids)
        steps = torch.arange(1, seen.shape[1] + 1)[None, :, None]
        return Outputs(self.head(torch.cat([seen, seen.cumsum(1) / steps], dim=2)))


# ---------------------------------------------------------------------------------- data


def generator(split: str) -> torch.Generator:
    return torch.Generator().manual_seed(100 + SPLITS.index(split))


def points(split: str, classes: int = 4, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    own, centres = generator(split), torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    y = torch.randint(0, classes, (count,), generator=own)
    return centres[y] + 1.3 * torch.randn(count, 5, generator=own), y


def labels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = points(split)
    mixing = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(len(x), 3, generator=generator(split))
    return x, (x @ mixing + noise > 0.3).float()


def values(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = points(split)
    mixing = torch.randn(5, 2, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(len(x), 2, generator=generator(split))
    return x, (x @ mixing).sin() * torch.tensor([1.0, 3.0]) + 10 + 0.3 * noise


def one_value(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = values(split)
    return x, y[:, 0]


def pictures(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    own = generator(split)
    x = torch.randn(24, 2, 8, 8, generator=own)
    smooth = F.avg_pool2d(x, 3, 1, 1)
    y = (smooth[:, 0] > 0.1).long() + (smooth[:, 1] > 0.2).long()
    y[torch.rand(y.shape, generator=own) < 0.1] = 255
    return x, y


def texts(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (N, T), and how many of each text count."""
    own = generator(split)
    ids = torch.randint(0, 7, (60, 1), generator=own)
    for _ in range(7):
        jump = (torch.rand(60, 1, generator=own) < 0.3).long()
        ids = torch.cat([ids, (ids[:, -1:] * 2 + 1 + jump) % 7], dim=1)
    return ids, torch.randint(4, 9, (60,), generator=own)


def text_dicts(split: str) -> list[dict[str, torch.Tensor]]:
    """As a collator for causal models makes them: labels are the ids, padding is -100."""
    ids, sizes = texts(split)
    mask = torch.arange(ids.shape[1]) < sizes[:, None]
    truth = torch.where(mask, ids, -100)
    parts = zip(ids.split(16), mask.long().split(16), truth.split(16), strict=True)
    return [{"input_ids": i, "attention_mask": m, "labels": t} for i, m, t in parts]


def text_pairs(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As nanoGPT makes them: the label of a position is the next id."""
    ids, sizes = texts(split)
    truth = ids[:, 1:].clone()
    truth[torch.arange(truth.shape[1]) >= sizes[:, None] - 1] = -100
    return ids[:, :-1], truth


def batched(data: Any) -> list[Any]:
    """What the network is called with, and the labels."""
    if isinstance(data, list):
        return [({k: v for k, v in one.items() if k != "labels"}, one["labels"]) for one in data]
    size = 20 if len(data[0]) > 100 else 4
    return [((x,), y) for x, y in zip(*(part.split(size) for part in data), strict=True)]


def call(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The logits, whatever they are wrapped in."""
    found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    if isinstance(found, dict):
        found = found["logits"] if "logits" in found else found["heads"]
    if isinstance(found, tuple):
        found = found[0]
    return getattr(found, "logits", found)


def raw(model: nn.Module, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of a whole split, float64."""
    model.eval()
    with torch.no_grad():
        pairs = [(call(model, inputs).double(), truth) for inputs, truth in batched(data)]
    return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def rows(task: str, logits: torch.Tensor, truth: torch.Tensor, *, shift: bool = False) -> Any:
    """Logits (R, C) of every row that counts, and its label; R as long as there are labels."""
    if task == "segmentation":
        if logits.shape[2:] != truth.shape[1:]:
            logits = F.interpolate(logits, size=truth.shape[1:], mode="bilinear")
        logits, truth = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]), truth.flatten()
        return logits[truth != 255], truth[truth != 255]
    if task == "tokens":
        if shift:
            logits, truth = logits[:, :-1], truth[:, 1:]
        logits, truth = logits.reshape(-1, logits.shape[-1]), truth.flatten()
        return logits[truth != -100], truth[truth != -100]
    if task in ("multilabel", "regression") and logits.ndim == 1:
        return logits[:, None], truth.reshape(len(truth), 1)
    return logits, truth


def loss(task: str, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    if task == "regression":
        return F.mse_loss(logits, truth.to(logits.dtype))
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype))
    return F.cross_entropy(logits, truth)


def trained(problem: Problem, *, snapshots: int = 4, seed: int = 0, lr: float = 0.1) -> Problem:
    """The problem with the snapshots of a run: one each epoch, after the first."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = problem.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8)
        found: list[Weights] = []
        for epoch in range(snapshots + 1):
            model.train()
            for inputs, truth in batched(problem.data["train"]):
                optimizer.zero_grad()
                shift = isinstance(inputs, dict)
                made = rows(problem.task, call(model, inputs), truth, shift=shift)
                loss(problem.task, *made).backward()
                optimizer.step()
            if epoch:
                found.append({k: v.clone() for k, v in model.state_dict().items()})
    return Problem(problem.task, problem.make, problem.data, tuple(found), problem.options)


def _of(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    return {split: function(split, **arguments) for split in SPLITS}


_IGNORE = {"ignore_index": 255}
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "classes": lambda: Problem("classification", mlp, _of(points)),
    "binary": lambda: Problem("classification", lambda: mlp(2), _of(points, classes=2)),
    "dict": lambda: Problem(
        "classification", lambda: Wrapped(lambda z: {"other": z[:, :1], "logits": z}), _of(points)
    ),
    "named dict": lambda: Problem(
        "classification",
        lambda: Wrapped(lambda z: {"logit_scale": z.mean(), "heads": z}),
        _of(points),
        options={"logits": "heads"},
    ),
    "tuple": lambda: Problem(
        "classification", lambda: Wrapped(lambda z: (z, z.mean())), _of(points)
    ),
    "object": lambda: Problem("classification", lambda: Wrapped(Outputs), _of(points)),
    "multilabel": lambda: Problem("multilabel", lambda: mlp(3), _of(labels)),
    "regression": lambda: Problem("regression", lambda: mlp(2), _of(values)),
    "one value": lambda: Problem("regression", Flat, _of(one_value)),
    "segmentation": lambda: Problem("segmentation", Segments, _of(pictures), options=_IGNORE),
    "half size": lambda: Problem(
        "segmentation", lambda: Segments(2), _of(pictures), options=_IGNORE
    ),
    "token dicts": lambda: Problem("tokens", Causal, _of(text_dicts)),
    "token pairs": lambda: Problem("tokens", Causal, _of(text_pairs)),
}


@functools.cache
def problem(name: str, snapshots: int = 4) -> Problem:
    """One of `PROBLEMS`, trained; made once."""
    made = PROBLEMS[name]()
    rate = {"regression": 0.01, "tokens": 1.0}.get(made.task, 0.1)
    return trained(made, snapshots=snapshots, lr=rate)


def save(folder: Path, weights: Sequence[Weights]) -> Path:
    folder.mkdir(parents=True)
    for number, state in enumerate(weights, start=1):
        torch.save({"step": 100 * number, "state_dict": state}, folder / f"snap_{number}.pt")
    return folder


def compared(
    folder: Path,
    one: Problem,
    output: Path | None = None,
    *,
    data: dict[str, Any] | None = None,
    without: Sequence[str] = (),
    force: bool = False,
    model: dict[str, Any] | None = None,
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> CompareResult:
    """`compare` on the problem's snapshots, which are put into `folder`; nothing is cached."""
    if not folder.exists():
        save(folder, one.weights)
    given = {f"{split}_data": d for split, d in (data or one.data).items() if split not in without}
    result = compare(
        folder,
        output,
        model=ModelOptions(model=one.make(), device="cpu", **given, **one.options, **(model or {})),
        options=CompareOptions(**{"cache_bytes": 0} | options),
        force=force,
        announce=announce,
    )
    assert result is not None
    return result


# ------------------------------------------------------------- figures, written down plainly


def softmax(logits: torch.Tensor) -> Array:
    return torch.softmax(logits, dim=1).numpy()


def logits_of(one: Problem, weights: Sequence[Weights], split: str) -> tuple[list[Any], Array]:
    """Of each member logits (R, C) in float64, and the labels."""
    found, truth = [], None
    for state in weights:
        model = one.make()
        model.load_state_dict(state)
        shift = isinstance(one.data[split], list)
        made, truth = rows(one.task, *raw(model, one.data[split]), shift=shift)
        found.append(made)
    assert truth is not None
    return found, truth.numpy()


def figures(one: Problem, weights: Sequence[Weights], split: str) -> dict[str, float]:
    """What one model, or the mean prediction of several, gets on a split."""
    found, truth = logits_of(one, weights, split)
    return FIGURES[one.task](found, truth)


def class_figures(found: Sequence[torch.Tensor], truth: Array) -> dict[str, float]:
    p = np.mean([softmax(z) for z in found], axis=0)
    right = p.argmax(1) == truth
    own = p[np.arange(len(p)), truth]
    confidence = p.max(1)
    edges = np.linspace(0, 1, 16)
    ece = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    hot = np.eye(p.shape[1])[truth]
    made = {
        "accuracy": right.mean(),
        "nll": -np.log(own).mean(),
        "brier": ((p - hot) ** 2).sum(1).mean(),
        "ece": ece,
    }
    if p.shape[1] == 2:
        above, below = p[truth == 1, 1], p[truth == 0, 1]
        made["auroc"] = np.mean(
            (above[:, None] > below) + 0.5 * (above[:, None] == below)
        )  # Mann-Whitney
    if len(found) > 1:
        decided = [softmax(z).argmax(1) for z in found]
        pairs = [(a, b) for a in range(len(found)) for b in range(a)]
        made["disagreement"] = np.mean([(decided[a] != decided[b]).mean() for a, b in pairs])

        def entropy(q: Array) -> float:
            return float(-(q * np.log(q)).sum(1).mean())

        made["mutual_information"] = entropy(p) - np.mean([entropy(softmax(z)) for z in found])
    return {name: float(value) for name, value in made.items()}


def label_figures(found: Sequence[torch.Tensor], truth: Array) -> dict[str, float]:
    p = np.mean([torch.sigmoid(z).numpy() for z in found], axis=0)
    right = (p > 0.5) == truth.astype(bool)
    own = np.where(truth.astype(bool), p, 1 - p)
    areas = []
    for column, true in zip(p.T, truth.T.astype(bool), strict=True):
        above, below = column[true], column[~true]
        areas.append(np.mean((above[:, None] > below) + 0.5 * (above[:, None] == below)))
    made = {
        "accuracy": right.mean(),
        "exact_match": right.all(1).mean(),
        "nll": -np.log(own).mean(),
        "brier": ((p - truth) ** 2).mean(),
        "auroc": np.mean(areas),
    }
    return {name: float(value) for name, value in made.items()}


def value_figures(found: Sequence[torch.Tensor], truth: Array) -> dict[str, float]:
    error = np.mean([z.numpy() for z in found], axis=0) - truth
    spread = ((truth - truth.mean(0)) ** 2).mean(0)
    return {
        "mse": float((error**2).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "mae": float(np.abs(error).mean()),
        "r2": float((1 - (error**2).mean(0) / spread).mean()),
    }


def pixel_figures(found: Sequence[torch.Tensor], truth: Array) -> dict[str, float]:
    p = np.mean([softmax(z) for z in found], axis=0)
    said = p.argmax(1)
    each = []
    for c in range(p.shape[1]):
        union = ((said == c) | (truth == c)).sum()
        if union:
            each.append(((said == c) & (truth == c)).sum() / union)
    own = p[np.arange(len(p)), truth]
    return {
        "miou": float(np.mean(each)),
        "accuracy": float((said == truth).mean()),
        "nll": float(-np.log(own).mean()),
    }


def token_figures(found: Sequence[torch.Tensor], truth: Array) -> dict[str, float]:
    p = np.mean([softmax(z) for z in found], axis=0)
    nll = float(-np.log(p[np.arange(len(p)), truth]).mean())
    made = {"nll": nll, "perplexity": float(np.exp(nll))}
    return made | ({"accuracy": float((p.argmax(1) == truth).mean())} if len(found) == 1 else {})


FIGURES: dict[str, Callable[[Sequence[torch.Tensor], Array], dict[str, float]]] = {
    "classification": class_figures,
    "multilabel": label_figures,
    "regression": value_figures,
    "segmentation": pixel_figures,
    "tokens": token_figures,
}


# ------------------------------------------------------------- targets for the command line

CODE = '''
import os
import time
from pathlib import Path

import torch
from torch import nn

SPLITS = ["train", "val", "test"]


def data(split, n=200):
    own = torch.Generator().manual_seed(100 + SPLITS.index(split))
    centres = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    y = torch.randint(0, 4, (n,), generator=own)
    return centres[y] + 1.3 * torch.randn(n, 5, generator=own), y


def mlp(classes=4, inputs=5, norm=True, last=0):
    layers = [nn.Linear(inputs, 12), *([nn.BatchNorm1d(12)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, *[nn.Identity()] * last, nn.Linear(12, classes))


class NotANumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
        for n, layer in enumerate(self.net):
            self.add_module(str(n), layer)
        del self.net

    def forward(self, x):
        for n in range(4):
            x = getattr(self, str(n))(x)
        return x + float("nan")


class Counting(nn.Sequential):
    """Notes which snapshot saw which batch; the first number of a batch is its own."""

    def __init__(self):
        super().__init__(*mlp(norm=False))

    def forward(self, x):
        with open(os.environ["CALLS"], "a") as file:
            file.write(f"{float(self[0].weight.sum()):.6f} {len(x)} {float(x[0, 0]):.6f}\\n")
        return super().forward(x)


def slowly(split):
    """Batches of 10; sleeps as long as the environment says."""
    x, y = data(split)
    for n, (inputs, labels) in enumerate(zip(x.split(10), y.split(10))):
        time.sleep(float(os.environ.get("NAP", "0")))
        yield inputs, labels


def wide(split):
    x, y = data(split)
    return torch.cat([x, x], 1), y


def beyond(split):
    x, y = data(split)
    return x, y + 1


def below(split):
    x, y = data(split)
    return x, y - 1


def beyond_late(split):
    x, y = data(split)
    return x, torch.cat([y[:150], y[150:] + 4])


def few(split):
    return data(split, 3)


def none(split):
    x, y = data(split)
    return x[:0], y[:0]


def no_batches(split):
    return []


def loader(split, shuffle=False, drop_last=False):
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data(split)), batch_size=64, shuffle=shuffle,
        drop_last=drop_last)


class Noisy(torch.utils.data.Dataset):
    """Random augmentation, as training data have it."""

    def __init__(self, split):
        self.x, self.y = data(split)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + torch.randn(5), self.y[index]


def not_numbers(split):
    x, y = data(split)
    x[150] = float("nan")
    return x, y


def unlabelled(split):
    return data(split)[0]


def half_labels(split):
    x, y = data(split)
    return x, y.float() / 3


def raises(split):
    raise ValueError("the images are gone")


def number(split):
    return 7


def share(outputs, labels):
    """A user's own metric: accuracy by another name."""
    return float((outputs.argmax(1) == labels).mean())


def broken(outputs, labels):
    raise ValueError("this metric is broken")
'''
