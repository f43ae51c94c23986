"""Owns targets that count: which member saw which samples, and how often samples were read.

The model's `head.bias[0]` tells members apart, and the first column of the inputs tells samples
apart, so a test can say who saw what.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

FORWARD: list[tuple[float, tuple[int, ...]]] = []  # member, samples: of each call
READ: Counter[tuple[str, int]] = Counter()  # split, sample
LIMITS: dict[str, float] = {}  # "forward" or "read": how many may still happen


def reset() -> None:
    """Forget what was counted."""
    FORWARD.clear()
    READ.clear()
    LIMITS.clear()


def seen(member: float) -> list[int]:
    """The samples that a member saw, in order."""
    return [n for who, samples in FORWARD for n in samples if abs(who - member) < 1e-6]


def _spend(what: str) -> None:
    if what in LIMITS:
        LIMITS[what] -= 1
        if LIMITS[what] < 0:
            raise KeyboardInterrupt


class Net(nn.Module):
    """Four inputs, one BatchNorm layer, dropout."""

    def __init__(self, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(4, width)
        self.bn = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.bn.training:
            _spend("forward")
            FORWARD.append((float(self.head.bias[0].detach()), tuple(int(n) for n in x[:, 0])))
        x = torch.cat([x[:, 1:], x[:, 1:2]], dim=1)
        out: torch.Tensor = self.head(self.drop(torch.relu(self.bn(self.fc(x)))))
        return out


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, Any]]):
    """Samples of an .npz, whose reads are counted."""

    def __init__(self, path: Path) -> None:
        self.split = path.stem
        with np.load(path) as arrays:
            self.x, self.y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        _spend("read")
        READ[self.split, index] += 1
        return self.x[index], self.y[index]
