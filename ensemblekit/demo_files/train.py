"""Train a small network on handwritten digits and save a snapshot at the end of each cycle.

Run it:            python train.py --seed 0 --out ckpts
Then average:      ensemblekit average ckpts/

The recipe is the one of Snapshot Ensembles (Huang et al., 2017) and Stochastic Weight
Averaging (Izmailov et al., 2018). One long cycle brings the network to a good region. Then
short cycles follow: each raises the learning rate, which moves the weights to another place
in that region, and lowers it again. The end of each short cycle is saved. The snapshots lie
around a better point than any of them, and their average comes close to it.

`Net` and `data` are all that ensemblekit needs from this file (see ensemblekit.toml).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

SPLIT_SIZES = {"train": 797, "val": 400, "test": 600}  # of the 1797 images
BACKGROUND = -1.0  # the value of an empty pixel after normalisation

BATCH_SIZE = 32
FIRST_CYCLE_EPOCHS = 30  # not saved: the network is still on its way
CYCLE_EPOCHS = 5
CYCLES = 6  # each ends with a snapshot
MAX_LR = 0.25
MIN_LR = 0.15  # far from zero: snapshots that differ leave an average something to gain
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


class Net(nn.Module):
    """Three convolutions with BatchNorm for images of shape (N, 1, 8, 8); 10 logits."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, 10) for images of shape (N, 1, 8, 8)."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


def data(split: str) -> tuple[Tensor, Tensor]:
    """Return the images (N, 1, 8, 8), in [-1, 1], and the labels (N,) of one split.

    The splits are the same for every training seed: snapshots of different runs can be
    compared on the same test images, and no training image is ever among them.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLIT_SIZES)}")
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1  # pixels are 0 to 16
    y = torch.from_numpy(labels).long()

    train, rest = train_test_split(
        range(len(y)), train_size=SPLIT_SIZES["train"], stratify=labels, random_state=0
    )
    val, test = train_test_split(
        rest, train_size=SPLIT_SIZES["val"], stratify=labels[rest], random_state=0
    )
    chosen = {"train": train, "val": val, "test": test}[split]
    return x[chosen], y[chosen]


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by -1, 0 or 1 pixel in both directions, chosen at random."""
    padded = F.pad(x, (1, 1, 1, 1), value=BACKGROUND)
    top, left = torch.randint(0, 3, (2, len(x)), generator=generator)
    pixel = torch.arange(8)
    rows = (top[:, None] + pixel)[:, :, None]
    columns = (left[:, None] + pixel)[:, None, :]
    image = torch.arange(len(x))[:, None, None]
    return padded[image, 0, rows, columns].unsqueeze(1)


def batches(x: Tensor, y: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled, augmented batches of equal size."""
    order = torch.randperm(len(x), generator=generator)
    for start in range(0, len(x) - BATCH_SIZE + 1, BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield shifted(x[chosen], generator), y[chosen]


def cosine(progress: float) -> float:
    """Return the learning rate at `progress` of a cycle: MAX_LR at 0, MIN_LR at 1."""
    return MIN_LR + (MAX_LR - MIN_LR) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that the network classifies correctly."""
    net.eval()
    return float((net(x).argmax(dim=1) == y).double().mean())


def train(seed: int, out: Path) -> None:
    """Train one network and write `out/cycle_1.pt`, `out/cycle_2.pt`, ..."""
    torch.manual_seed(seed)  # the initial weights
    generator = torch.Generator().manual_seed(seed)  # the order of images and their shifts
    out.mkdir(parents=True, exist_ok=True)

    x, y = data("train")
    x_val, y_val = data("val")
    net = Net()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=MAX_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps_per_epoch = len(x) // BATCH_SIZE
    epoch = step = 0
    lr, loss_sum = MAX_LR, 0.0

    for cycle in range(CYCLES + 1):
        epochs = CYCLE_EPOCHS if cycle else FIRST_CYCLE_EPOCHS
        steps = epochs * steps_per_epoch
        first_step = step
        for _ in range(epochs):
            net.train()
            loss_sum = 0.0
            for images, labels in batches(x, y, generator):
                step += 1
                lr = cosine((step - first_step) / steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = F.cross_entropy(net(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.item()
            epoch += 1

        train_loss = loss_sum / steps_per_epoch  # of the cycle's last epoch
        val_acc = accuracy(net, x_val, y_val)
        print(f"cycle {cycle}  lr {lr:.3f}  train loss {train_loss:.4f}  val acc {val_acc:.4f}")
        if cycle == 0:
            continue  # the long first cycle is not saved
        snapshot = {
            "model": net.state_dict(),
            "epoch": epoch,
            "step": step,
            "lr": lr,
            "train_loss": train_loss,
            "val_acc": val_acc,
            "seed": seed,
        }
        torch.save(snapshot, out / f"cycle_{cycle}.pt")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train on digits; save one snapshot a cycle.")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default 0)")
    parser.add_argument("--out", type=Path, default=Path("ckpts"), help="folder (default ckpts)")
    args = parser.parse_args()
    train(args.seed, args.out)


if __name__ == "__main__":
    main()
