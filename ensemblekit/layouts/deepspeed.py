"""Owns DeepSpeed: `global_stepN/mp_rank_00_model_states.pt` of ZeRO stages 0 to 2.

Input: a dict with `module` and `ds_version`. Stage 3 leaves empty tensors in it; they are refused.
"""

from pathlib import Path

from ensemblekit.containers import TensorSpec, Tree
from ensemblekit.errors import UnsupportedError
from ensemblekit.layouts import Weights
from ensemblekit.layouts.dialect import dialect

match, _weights, facts = dialect(
    marks=("module", "ds_version"),
    weights={"module": "model"},
    step="global_steps",
    metrics={},
)


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """The module's weights.

    Raises:
        UnsupportedError: ZeRO-3: the parameters lie in the shards of the ranks.
    """
    found = _weights(tree, path)
    tensors = found["module"].tensors.values()
    empty = [spec for spec in tensors if isinstance(spec, TensorSpec) and spec.size == 0]
    if "zero_pp_rank" in path.name or (empty and len(empty) * 2 > len(tensors)):
        raise UnsupportedError(
            f"{path}: is one rank of a ZeRO-3 checkpoint: its parameters are empty placeholders",
            hint=f"gather them: python zero_to_fp32.py {path.parent.parent} gathered/",
        )
    return found
