"""Owns timm: `checkpoint-N.pth.tar`, `last`, `model_best`, `recovery-*`.

Input: a dict with `arch` and `state_dict`; `state_dict_ema` is what timm validates and deploys.
"""

from typing import Any

from ensemblekit.layouts.dialect import at, dialect


def _hint(root: dict[Any, Any]) -> str | None:
    arch = root.get("arch")
    if not isinstance(arch, str):
        return None
    given = {name: at(root, f"args.{name}") for name in ("num_classes", "in_chans")}
    query = "&".join(f"{name}={value}" for name, value in given.items() if isinstance(value, int))
    return f"timm:{arch}?{query}" if query else f"timm:{arch}"


match, weights, facts = dialect(
    marks=("arch", "state_dict", "version"),
    weights={"state_dict_ema": "ema", "state_dict": "model"},
    metrics={"metric": "metric"},
    hint=_hint,
)
