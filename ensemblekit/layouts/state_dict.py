"""Owns bare state dicts: the outermost object maps names to tensors.

Input: a tree of safetensors, of a sharded folder, or of `torch.save(model.state_dict())`.
"""

from pathlib import Path

from ensemblekit.containers import Tree
from ensemblekit.layouts import Facts, Role, Weights
from ensemblekit.layouts.tensors import facts_in, has_weights, make_weights, tensors_in
from ensemblekit.layouts.torch_dict import holders


def match(tree: Tree, path: Path) -> bool:
    """Whether the outermost dict holds floating-point tensors, and no state dicts beside them."""
    if not isinstance(tree.root, dict) or holders(tree.root):
        return False
    return has_weights(tree.root) or tensors_in(tree.root) is not None


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """The one set of weights."""
    is_average = "n_averaged" in tree.root  # torch's AveragedModel
    role: Role = "swa" if is_average else "model"
    leaves = tensors_in(tree.root) or {}
    return {"model": make_weights(leaves, role, is_average=is_average)}


def facts(tree: Tree, path: Path) -> Facts:
    """A bare state dict says nothing about itself, unless scalars stand among its tensors."""
    plain = {k: v for k, v in tree.root.items() if isinstance(v, int | float)}
    return facts_in(plain)
