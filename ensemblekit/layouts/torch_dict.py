"""Owns hand-written checkpoints: a dict with the model under one key and facts beside it.

Input: a tree whose outermost object is a dict with weights under a key that people use for them.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ensemblekit.containers import Inert, Tree
from ensemblekit.layouts import Facts, Role, Weights
from ensemblekit.layouts.tensors import facts_in, make_weights, tensors_in

_MODEL_KEYS = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module"),
    *("weights", "params"),
)
_NOT_WEIGHTS = ("optim", "sched", "scaler", "rng", "random", "loss", "criterion", "callbacks")


def match(tree: Tree, path: Path) -> bool:
    """Whether a value of the outermost dict is a state dict or a module."""
    return isinstance(tree.root, dict) and bool(holders(tree.root))


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """Every set of weights by the key under which it stands."""
    return other_weights(tree.root, known=())


def facts(tree: Tree, path: Path) -> Facts:
    """What stands beside the weights."""
    return facts_in(tree.root)


def other_weights(root: dict[Any, Any], *, known: Collection[str]) -> dict[str, Weights]:
    """Sets of weights at the top that are not `known` yet, as far as they can be read."""
    found: dict[str, Weights] = {}
    for key, leaves in holders(root).items():
        if key not in known:
            role = role_of(key)
            found[key] = make_weights(leaves, role, is_average=role == "swa")
    unread = [key for key in root if isinstance(key, str) and _is_unread_average(key, root[key])]
    if unread and found:
        text = (
            f"the moving average under '{unread[0]}' is a list without names and cannot be read; "
            "the raw model is taken"
        )
        found = {key: replace(w, warnings=(*w.warnings, text)) for key, w in found.items()}
    return found


def holders(root: dict[Any, Any]) -> dict[str, dict[str, Any]]:
    """State dicts and modules at the top, by key."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in root.items():
        if not isinstance(value, dict | Inert) or not isinstance(key, str):
            continue
        if any(part in key.lower() for part in _NOT_WEIGHTS):
            continue
        leaves = tensors_in(value)
        if leaves is not None:
            found[key] = leaves
    return found


def role_of(key: str) -> Role:
    """What people mean by the key: `model`, `model-ema`, `netEMA`, `swa_model`."""
    words = words_in(key)
    if "ema" in words or key in ("averaged_model", "model_averaged"):
        return "ema"
    if "swa" in words:
        return "swa"
    return "model" if key in _MODEL_KEYS else "other"


def words_in(text: str) -> list[str]:
    """The words of a name in any of the usual spellings, in lower case.

    >>> words_in("netEMA_last-2")
    ['net', 'ema', 'last']
    """
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text)]


def _is_unread_average(key: str, value: Any) -> bool:
    return role_of(key) == "ema" and isinstance(value, dict) and tensors_in(value) is None
