"""Owns torchvision's reference scripts: `model_N.pth`, `checkpoint.pth`.

Input: a dict with `model`, `lr_scheduler` and the script's `args`; `model_ema` is an AveragedModel.
"""

from typing import Any

from ensemblekit.layouts.dialect import at, dialect


def _hint(root: dict[Any, Any]) -> str | None:
    name = at(root, "args.model")
    return f"torchvision:{name}" if isinstance(name, str) else None


match, weights, facts = dialect(
    marks=("model", "lr_scheduler", "args"),
    weights={"model_ema": "ema", "model": "model"},
    metrics={},
    hint=_hint,
)
