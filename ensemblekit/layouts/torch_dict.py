"""Owns hand-written checkpoints: a dict with the model under one key and facts beside it.

Input: a tree whose outermost object is a dict with weights under a key that people use for them.
"""

from pathlib import Path
from typing import Any

from ensemblekit.containers import Tree
from ensemblekit.layouts import Facts, Role, Weights
from ensemblekit.layouts.tensors import facts_in, make_weights, tensors_in

_MODEL_KEYS = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module"),
    *("weights", "params"),
)
_NOT_WEIGHTS = ("optim", "sched", "scaler", "rng", "random", "loss", "criterion", "callbacks")


def match(tree: Tree, path: Path) -> bool:
    """Whether a value of the outermost dict is a state dict or a module."""
    return isinstance(tree.root, dict) and bool(_holders(tree.root))


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """Every set of weights by the key under which it stands."""
    found: dict[str, Weights] = {}
    for key, leaves in _holders(tree.root).items():
        role = _role(key)
        found[key] = make_weights(leaves, role, is_average=role == "swa")
    return found


def facts(tree: Tree, path: Path) -> Facts:
    """What stands beside the weights."""
    return facts_in(tree.root)


def _holders(root: dict[Any, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in root.items():
        if not isinstance(key, str) or any(part in key.lower() for part in _NOT_WEIGHTS):
            continue
        leaves = tensors_in(value)
        if leaves is not None:
            found[key] = leaves
    known = {key: leaves for key, leaves in found.items() if _role(key) != "other"}
    return known or found


def _role(key: str) -> Role:
    words = key.lower().split("_")
    if "ema" in words or key in ("averaged_model", "model_averaged"):
        return "ema"
    if "swa" in words:
        return "swa"
    return "model" if key in _MODEL_KEYS else "other"
