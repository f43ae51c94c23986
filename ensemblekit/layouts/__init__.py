"""Owns the meaning of what writers put into containers: which tensors are weights, what is known.

Input: a `Tree`. A layout module offers `match(tree, path) -> bool`,
`weights(tree, path) -> dict[str, Weights]` and `facts(tree, path) -> Facts`; the first match of
the registry counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ensemblekit.containers import TensorSpec, Tree, Unusable
from ensemblekit.errors import UnsupportedError

LAYOUTS: dict[str, str] = {
    "lightning": "ensemblekit.layouts.lightning",
    "timm": "ensemblekit.layouts.timm",
    "torchvision": "ensemblekit.layouts.torchvision",
    "ultralytics": "ensemblekit.layouts.ultralytics",
    "mmengine": "ensemblekit.layouts.mmengine",
    "deepspeed": "ensemblekit.layouts.deepspeed",
    "fairseq": "ensemblekit.layouts.fairseq",
    "nanogpt": "ensemblekit.layouts.nanogpt",
    "composer": "ensemblekit.layouts.composer",
    "detectron2": "ensemblekit.layouts.detectron2",
    "open-clip": "ensemblekit.layouts.open_clip",
    "ignite": "ensemblekit.layouts.ignite",
    "fastai": "ensemblekit.layouts.fastai",
    "swa-repo": "ensemblekit.layouts.swa_repo",
    "peft": "ensemblekit.layouts.peft",
    "transformers": "ensemblekit.layouts.transformers",
    "torch-dict": "ensemblekit.layouts.torch_dict",
    "torch-module": "ensemblekit.layouts.torch_module",
    "state-dict": "ensemblekit.layouts.state_dict",
}

# Optimizers, schedulers, gradient scalers and random states are known by these.
_SIDE_KEYS = (
    *("param_groups", "base_lrs", "last_epoch", "growth_factor", "exp_avg"),
    "optimizer_state_dict",  # DeepSpeed's ranks
)

OUR_METADATA = "ensemblekit"  # in a file's metadata: it is an average already

Role = Literal["model", "ema", "swa", "other"]


@dataclass(frozen=True)
class Weights:
    """One set of weights in a file.

    Attributes:
        tensors: By the network's own keys, wrapper prefixes taken off.
        role: What they are: the raw model, a moving average, a running average, or unknown.
        ties: Groups of keys that share one storage.
        extras: Keys that hold no tensor (`_extra_state`) and cannot be averaged.
        is_average: They are already a mean over the run, not one more snapshot of it.
        warnings: What a user who averages such weights should know.
    """

    tensors: Mapping[str, TensorSpec | Unusable]
    role: Role
    ties: tuple[tuple[str, ...], ...] = ()
    extras: tuple[str, ...] = ()
    is_average: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a file says about itself; None where it says nothing.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs done, fractions allowed.
        lr: Learning rate of the first parameter group.
        metrics: Scores by the writer's names.
        model_hint: Name of the architecture.
    """

    step: int | None = None
    epoch: float | None = None
    lr: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    model_hint: str | None = None


class Reading(NamedTuple):
    """A file understood: by which layout, with which weights, and what it says about itself."""

    layout: str
    weights: dict[str, Weights]
    facts: Facts


def interpret(tree: Tree, path: Path) -> Reading:
    """Find the weights and facts in a tree.

    Raises:
        NoWeightsError: It holds the state of an optimizer or the like.
        UnsupportedError: It holds no weights that we recognise.
    """
    for name, module_name in LAYOUTS.items():
        layout = import_module(module_name)
        if layout.match(tree, path):
            found: dict[str, Weights] = layout.weights(tree, path)
            if OUR_METADATA in tree.metadata:
                found = {k: replace(w, role="swa", is_average=True) for k, w in found.items()}
            return Reading(name, found, layout.facts(tree, path))
    if _is_side_state(tree.root):
        raise NoWeightsError(f"{path}: holds the state of a tool, no model weights")
    raise UnsupportedError(
        f"{path}: holds no model weights that we recognise",
        hint="leave it out with --exclude, or save the weights: "
        "torch.save(model.state_dict(), path)",
    )


class NoWeightsError(UnsupportedError):
    """A sound file that tools write beside the weights, such as an optimizer's state."""


def _is_side_state(root: Any) -> bool:
    keys = {*_SIDE_KEYS, "python", "numpy", "random_state", "torch_manual_seed"}
    if not isinstance(root, dict):
        return False
    found = {key for key in root if isinstance(key, str)}
    return not keys.isdisjoint(found) or (bool(found) and found <= {"optimizer", "optimizers"})


def choose(weights: Mapping[str, Weights], wanted: str, path: Path) -> str:
    """Name of the set of weights that `--weights` means in this file.

    `auto` takes what the writing tool would deploy: a moving average where there is one, else
    the raw model. A running average of the run (SWA) is left alone while there is a raw model.

    Raises:
        UnsupportedError: There is no such set, or several and nothing says which.
    """
    names = list(weights)
    if wanted in weights:
        return wanted
    roles = ("ema", "model") if wanted == "auto" else (wanted,)
    for role in roles:
        matching = [name for name in names if weights[name].role == role]
        if len(matching) == 1:
            return matching[0]
        if matching:
            break
    if wanted == "auto" and len(names) == 1:
        return names[0]
    if wanted == "auto":
        raise UnsupportedError(
            f"{path}: holds several sets of weights ({', '.join(names)}) and nothing says which "
            "one is the model",
            hint=f"choose one: --weights {names[0]}",
        )
    raise UnsupportedError(
        f"{path}: has no weights '{wanted}'; it has {', '.join(names)}",
        hint=f"choose one of them: --weights {names[0]}",
    )
