"""Owns what the tests of `export` and `verify` share: networks, targets, and the file run plainly.

A file is run with ONNX Runtime alone and compared with sums written down here, not with the library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from ensemblekit import ModelOptions
from ensemblekit.commands.export import ExportOptions, ExportResult, export
from tests import comparing
from tests.comparing import Array, Problem, Weights, save

RESULT = {
    "schema_version", "output", "sha256", "opset", "inputs", "outputs", "verification",
    "candidate", "snapshots", "warnings", "attempts", "exporter", "precision",
}  # fmt: skip
VERIFICATION = {
    "provider", "samples", "batch_sizes", "max_abs_diff", "decision_flips", "metric_torch",
    "metric_onnx", "passed",
}  # fmt: skip


# ------------------------------------------------------------------------------ networks


class Pictures(nn.Module):
    """A convolution with BatchNorm that can be folded, and one statistic a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Named(nn.Module):
    """Inputs by name, as dict batches have them; the second may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(2, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.first(left) - 2 * self.second(right)


class Words(nn.Module):
    """Classes of token ids (N, T), of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids).mean(1) * 3)


def pictures(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    own, centres = comparing.generator(split), torch.tensor([[1.0, -1], [-1, 1], [1, 1]])
    y = torch.randint(0, 3, (90,), generator=own)
    return centres[y][:, :, None, None] + torch.randn(90, 2, 6, 6, generator=own), y


def pairs(split: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches of two inputs and labels."""
    x, y = comparing.points(split)
    return [(a, a[:, :2] + 1, b) for a, b in zip(x.split(50), y.split(50), strict=True)]


def dicts(split: str) -> list[dict[str, torch.Tensor]]:
    """The same by name."""
    return [{"left": a, "right": b, "labels": y} for a, b, y in pairs(split)]


def words(split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of texts of different lengths."""
    own = comparing.generator(split)
    sizes = (5, 9, 12)
    ids = [torch.randint(0, 9, (40, t), generator=own) for t in sizes]
    return [(one, one.sum(1) % 4) for one in ids]


def randomised(make: Any, count: int = 3, *, seed: int = 0, spread: float = 0.3) -> list[Weights]:
    """Snapshots around one point."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        centre = make().state_dict()
        return [
            {
                k: v + spread * v.std().nan_to_num(1) * torch.randn_like(v)
                if v.is_floating_point() and not k.endswith("running_var")
                else v.clone()
                for k, v in centre.items()
            }
            for _ in range(count)
        ]


# --------------------------------------------------------------------- sums written down


def average(weights: Sequence[Weights], coefficients: Sequence[float] | None = None) -> Weights:
    """Weights averaged in float64; counters take the newest."""
    numbers = coefficients or [1.0] * len(weights)
    total = sum(numbers)
    made = {}
    for key, last in weights[-1].items():
        if last.is_floating_point():
            mixed = sum(c * w[key].double() for c, w in zip(numbers, weights, strict=True)) / total
            made[key] = mixed.to(last.dtype)  # type: ignore[union-attr]
        else:
            made[key] = last
    return made


def model_of(make: Any, weights: Weights) -> nn.Module:
    model = make().eval()
    model.load_state_dict(weights)
    return model


def recomputed(make: Any, weights: Weights, x: torch.Tensor) -> Weights:
    """The one BatchNorm layer with mean and population variance over all of `x`."""
    model = model_of(make, weights).double()
    (name, layer), *more = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert not more
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x.double())
    handle.remove()
    values = seen[0].transpose(0, 1).flatten(1)
    return {
        **weights,
        f"{name}.running_mean": values.mean(1).float(),
        f"{name}.running_var": values.var(1, unbiased=False).float(),
    }


def outputs(make: Any, weights: Weights, *inputs: torch.Tensor) -> Array:
    with torch.no_grad():
        return comparing.call(model_of(make, weights).double(), _double(inputs)).numpy()


def _double(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def softmax(logits: Array, axis: int = 1) -> Array:
    shifted = np.exp(logits - logits.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))


# ------------------------------------------------------------------------ the file itself


def onnx_run(path: Path | str, *inputs: torch.Tensor, **named: torch.Tensor) -> Array:
    """What the file says, by nothing but ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = dict(zip((i.name for i in session.get_inputs()), inputs, strict=False)) | named
    (made,) = session.run(None, {k: v.numpy() for k, v in feed.items()})
    return made.astype(np.float64)


def facts(path: Path | str) -> dict[str, str]:
    model = onnx.load(str(path), load_external_data=False)
    return {p.key: p.value for p in model.metadata_props}


def contract(path: Path | str) -> list[tuple[str, str, list[int | str]]]:
    """Names, types and sizes that a service relies on."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [(s.name, s.type, s.shape) for s in (*session.get_inputs(), *session.get_outputs())]


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def exported(
    folder: Path,
    one: Problem,
    name: str = "model.onnx",
    *,
    data: Sequence[str] = ("val",),
    model: Mapping[str, Any] | None = None,
    checkpoints: Any = None,
    **options: Any,
) -> tuple[Path, ExportResult]:
    """`export` on the problem's snapshots, which are put into `folder/ckpts`; the result as JSON."""
    if not (folder / "ckpts").exists():
        save(folder / "ckpts", one.weights)
    path = folder / name
    given = {f"{split}_data": one.data[split] for split in data}
    own = {k: options.pop(k) for k in ("selection", "force", "dry_run", "strict") if k in options}
    result = export(
        checkpoints or folder / "ckpts",
        path,
        model=ModelOptions(**{"model": one.make(), "device": "cpu"} | given | one.options | dict(model or {})),
        options=ExportOptions(**{"fuse": "off"} | options),
        **own,
    )  # fmt: skip
    return path, ExportResult(
        **{
            k: v
            for k, v in json.loads(json.dumps(result.to_json())).items()
            if k != "schema_version"
        }
    )


def manifest(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_text())
    return value


# ------------------------------------------------------------- targets for the command line

CODE = (
    comparing.CODE
    + '''

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(2, 4)

    def forward(self, left, right):
        return self.first(left) - 2 * self.second(right)


class Plain(nn.Sequential):
    """No BatchNorm: an average of it needs no data."""

    def __init__(self):
        super().__init__(*mlp(norm=False))


class Frozen(Plain):
    """The batch size becomes a number of the graph."""

    def forward(self, x):
        out = super().forward(x)
        return out.reshape(int(torch.tensor(len(x))), 4)


class FrozenSteps(Plain):
    """A loop over the samples."""

    def forward(self, x):
        out = super().forward(x)
        return torch.stack([out[n] for n in range(len(x))])


class Branches(Plain):
    """Control flow on values."""

    def forward(self, x):
        out = super().forward(x)
        if float(out.sum()) > 1e9:
            return out * int(out.argmax())
        return out.numpy().tolist() and out


class Raises(Plain):
    def forward(self, x):
        raise RuntimeError("the model has no idea")


class NaN(Plain):
    def forward(self, x):
        return super().forward(x) + float("nan")


class Chatty(Plain):
    def forward(self, x):
        print("the model says hello")
        return super().forward(x)


def napping(split):
    """Batches of 10; says that it has begun, and sleeps as long as the environment says."""
    x, y = data(split)
    for inputs, labels in zip(x.split(10), y.split(10)):
        yield inputs, labels
        Path("begun").write_text("")
        time.sleep(float(os.environ.get("NAP", "0")))


def values(split):
    x, y = data(split)
    return x, x[:, :4] * 2
'''
)
