"""Owns PEFT adapters: `adapter_model.safetensors` or `.bin` with `adapter_config.json` beside it.

Input: a state dict of low-rank factors. An average of factors is not the average of what they make.
"""

from dataclasses import replace
from pathlib import Path

from ensemblekit.containers import Tree
from ensemblekit.layouts import Facts, Weights, state_dict, transformers

_WARNING = (
    "LoRA adapters: the mean of A times the mean of B is not the mean of the products BA. Snapshots "
    "of one run are close enough for it to be useful; to be exact, merge each adapter into its base "
    "model first and average those"
)


def match(tree: Tree, path: Path) -> bool:
    """Whether the file is an adapter."""
    named = path.name.startswith("adapter_model.")
    low_rank = any(".lora_" in str(key) for key in tree.root) if _is_dict(tree) else False
    return state_dict.match(tree, path) and (named or low_rank)


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """The adapter's tensors, with the warning."""
    found = state_dict.weights(tree, path)
    return {name: replace(w, warnings=(_WARNING,)) for name, w in found.items()}


def facts(tree: Tree, path: Path) -> Facts:
    """From the trainer's state, where there is one."""
    return transformers.facts(tree, path)


def _is_dict(tree: Tree) -> bool:
    return isinstance(tree.root, dict)
