"""Owns the common shape of training tools' checkpoints: a dict with known keys.

Input: a description of one tool's dialect. `dialect(...)` makes the three functions of a layout out
of it, so that a layout of this shape is a description and nothing else.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ensemblekit.containers import Inert, Tree
from ensemblekit.layouts import Facts, Role, Weights
from ensemblekit.layouts.tensors import facts_in, make_weights, number, tensors_in
from ensemblekit.layouts.torch_dict import other_weights

Match = Callable[[Tree, Path], bool]
FindWeights = Callable[[Tree, Path], dict[str, Weights]]
FindFacts = Callable[[Tree, Path], Facts]


def dialect(
    *,
    marks: tuple[str, ...],
    weights: Mapping[str, Role],
    step: str | None = None,
    epoch: str | None = None,
    lr: str | None = None,
    metrics: Mapping[str, str] | None = None,
    hint: Callable[[dict[Any, Any]], str | None] | None = None,
) -> tuple[Match, FindWeights, FindFacts]:
    """`match`, `weights` and `facts` of a layout.

    Places are dotted paths from the outermost dict, through dicts, lists (`-1`) and attributes.

    Args:
        marks: Places that must exist; together they occur with this tool only.
        weights: Places of sets of weights and what they are; those that are absent are left out.
        step: Place of the optimizer steps; default: found by its usual names.
        epoch: Place of the epoch; default: likewise.
        lr: Place of the learning rate; default: the optimizer's.
        metrics: Names of scores and their places; default: numbers at the top.
        hint: The model target that the checkpoint names, if it does.
    """

    def match(tree: Tree, path: Path) -> bool:
        if not isinstance(tree.root, dict) or any(at(tree.root, mark) is None for mark in marks):
            return False
        return any(tensors_in(at(tree.root, place)) for place in weights)

    def find_weights(tree: Tree, path: Path) -> dict[str, Weights]:
        found = {}
        for place, role in weights.items():
            leaves = tensors_in(at(tree.root, place))
            if leaves:
                found[place] = make_weights(leaves, role, is_average=role == "swa")
        return {**found, **other_weights(tree.root, known=found)}

    def find_facts(tree: Tree, path: Path) -> Facts:
        usual = facts_in(tree.root)
        steps = number(at(tree.root, step)) if step else usual.step
        return Facts(
            step=None if steps is None else int(steps),
            epoch=number(at(tree.root, epoch)) if epoch else usual.epoch,
            lr=number(at(tree.root, lr)) if lr else usual.lr,
            metrics=usual.metrics if metrics is None else _scores(tree.root, metrics),
            model_hint=hint(tree.root) if hint else usual.model_hint,
        )

    return match, find_weights, find_facts


def at(value: Any, place: str) -> Any:
    """What lies at a dotted path, None where there is nothing.

    >>> at({"meta": {"epoch": 3}, "losses": [5, 4]}, "losses.-1")
    4
    """
    for part in place.split("."):
        if isinstance(value, Inert):
            value = value.attributes() or dict(value.mapping)
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.lstrip("-").isdecimal():
            value = value[int(part)] if -len(value) <= int(part) < len(value) else None
        else:
            return None
    return value


def _scores(root: dict[Any, Any], metrics: Mapping[str, str]) -> dict[str, float]:
    found = {name: number(at(root, place)) for name, place in metrics.items()}
    return {name: score for name, score in found.items() if score is not None}
