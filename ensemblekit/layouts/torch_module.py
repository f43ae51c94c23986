"""Owns whole pickled modules: `torch.save(model)`, whose class need not exist here.

Input: a tree whose outermost object is an inert `nn.Module`.
"""

from pathlib import Path

from ensemblekit.containers import Tree
from ensemblekit.layouts import Facts, Weights
from ensemblekit.layouts.tensors import is_module, make_weights, module_leaves


def match(tree: Tree, path: Path) -> bool:
    """Whether the outermost object was a module."""
    return is_module(tree.root)


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """What the module's `state_dict()` would hold."""
    return {"model": make_weights(module_leaves(tree.root), "model")}


def facts(tree: Tree, path: Path) -> Facts:
    """A module knows its class only."""
    return Facts(model_hint=tree.root.cls)
