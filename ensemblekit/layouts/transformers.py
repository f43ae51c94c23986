"""Owns Hugging Face checkpoints: `checkpoint-STEP/` with weights, `config.json`, `trainer_state.json`.

Input: a state dict that lies in such a folder; the facts stand in the JSON files beside it.
"""

import json
from pathlib import Path
from typing import Any

from ensemblekit.containers import Tree
from ensemblekit.errors import EnsembleKitError
from ensemblekit.files import Source
from ensemblekit.layouts import Facts, Weights, state_dict
from ensemblekit.layouts.tensors import number

_MAX_JSON = 64 << 20


def match(tree: Tree, path: Path) -> bool:
    """Whether weights lie beside a `config.json` of a model or a trainer's state."""
    folder = _folder(path)
    if not state_dict.match(tree, path):
        return False
    if (folder / "trainer_state.json").is_file():
        return True
    return "model_type" in _json(folder / "config.json")


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """All tensors."""
    return state_dict.weights(tree, path)


def facts(tree: Tree, path: Path) -> Facts:
    """Step, epoch, learning rate and the evaluation of that step, from the trainer's state."""
    folder = _folder(path)
    state = _json(folder / "trainer_state.json")
    step = number(state.get("global_step"))
    logs = [log for log in state.get("log_history") or [] if isinstance(log, dict)]
    metrics: dict[str, float] = {}
    lr = None
    for log in logs:
        lr = number(log.get("learning_rate")) or lr
        if number(log.get("step")) == step:
            scores = {name: number(value) for name, value in log.items() if "eval_" in str(name)}
            metrics.update({name: score for name, score in scores.items() if score is not None})
    return Facts(
        step=None if step is None else int(step),
        epoch=number(state.get("epoch")),
        lr=lr,
        metrics=metrics,
        model_hint=f"hf:{folder}" if _json(folder / "config.json") else None,
    )


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; facts are extra, so a broken file means there are none."""
    try:
        source = Source(path)
        value = json.loads(source.read(0, min(source.size, _MAX_JSON)))
    except (EnsembleKitError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
