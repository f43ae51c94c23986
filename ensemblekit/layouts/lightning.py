"""Owns Lightning: `epoch=E-step=S.ckpt`, `last.ckpt`, with its EMA and SWA callbacks.

Input: a dict with `pytorch-lightning_version`. With WeightAveraging the `state_dict` is the average
already and the raw model is `current_model_state`; StochasticWeightAveraging keeps a running average
among the callbacks' states.
"""

from pathlib import Path
from typing import Any

from ensemblekit.containers import Tree
from ensemblekit.layouts import Facts, Weights
from ensemblekit.layouts.tensors import facts_in, make_weights, number, tensors_in
from ensemblekit.layouts.torch_dict import other_weights, role_of

_MARK = "pytorch-lightning_version"


def match(tree: Tree, path: Path) -> bool:
    """Whether Lightning wrote it."""
    root = tree.root
    return isinstance(root, dict) and _MARK in root and bool(tensors_in(root.get("state_dict")))


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """The LightningModule's weights, the raw ones beside an average, and a running average."""
    root = tree.root
    averaged = "averaging_state" in root or "current_model_state" in root
    found = {"state_dict": make_weights(root["state_dict"], "ema" if averaged else "model")}
    raw = tensors_in(root.get("current_model_state"))
    if raw:
        found["current_model_state"] = make_weights(raw, "model")
    for state in _callbacks(root).values():
        running = tensors_in(state.get("average_model_state")) if isinstance(state, dict) else None
        if running:
            found["average_model_state"] = make_weights(running, "swa", is_average=True)
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(key, str) and role_of(key) == "ema" and (ema := tensors_in(value)):
                found[key] = make_weights(ema, "ema")
    return {**found, **other_weights(root, known=found)}


def facts(tree: Tree, path: Path) -> Facts:
    """Epoch, step, and the score that ModelCheckpoint monitored."""
    usual = facts_in(tree.root)
    metrics = {}
    for state in _callbacks(tree.root).values():
        monitor = state.get("monitor") if isinstance(state, dict) else None
        score = number(state.get("current_score")) if isinstance(state, dict) else None
        if isinstance(monitor, str) and score is not None:
            metrics[monitor] = score
    return Facts(usual.step, usual.epoch, _lr(tree.root) or usual.lr, metrics)


def _callbacks(root: dict[Any, Any]) -> dict[Any, Any]:
    callbacks = root.get("callbacks")
    return callbacks if isinstance(callbacks, dict) else {}


def _lr(root: dict[Any, Any]) -> float | None:
    states = root.get("optimizer_states")
    return facts_in({"optimizer": states}).lr if isinstance(states, list) else None
