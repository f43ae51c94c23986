"""Owns timm: `checkpoint-N.pth.tar`, `last`, `model_best`, `recovery-*`.

Input: a dict with `arch` and `state_dict`; `state_dict_ema` is what timm validates and deploys.
"""

from typing import Any

from ensemblekit.layouts.dialect import dialect


def _hint(root: dict[Any, Any]) -> str | None:
    arch = root.get("arch")
    return f"timm:{arch}" if isinstance(arch, str) else None


match, weights, facts = dialect(
    marks=("arch", "state_dict", "version"),
    weights={"state_dict_ema": "ema", "state_dict": "model"},
    metrics={"metric": "metric"},
    hint=_hint,
)
