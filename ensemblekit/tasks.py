"""Owns what a model's outputs mean: classification here, other tasks beside it later.

Input: raw outputs of a forward pass and labels.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ensemblekit.errors import InputError, NotFiniteError, listing

_LOGITS_KEYS = ("logits", "out", "output", "pred", "predictions")


def logits_of(outputs: Any, key: str | None = None) -> torch.Tensor:
    """The logits in a model's outputs: a tensor, the first of a tuple, or one entry of a dict.

    Raises:
        InputError: There is no such entry.
    """
    if isinstance(outputs, Mapping):
        names = [key] if key else [k for k in _LOGITS_KEYS if k in outputs][:1]
        if not names or names[0] not in outputs:
            raise InputError(
                f"the model's outputs are a dict with {listing(outputs, limit=8)}; "
                f"none of them is {key or 'called logits'}",
                hint="name the entry: --logits KEY",
            )
        outputs = outputs[names[0]]
    elif isinstance(outputs, tuple | list) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, torch.Tensor):
        raise InputError(f"the model's output is a {type(outputs).__name__}, expected a tensor")
    return outputs


def class_log_probs(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Log-probabilities (samples, classes) of a classification batch, in float32.

    Raises:
        InputError: Shapes or labels that are not a classification's.
        NotFiniteError: NaN in the logits.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(
            f"the model's output has shape {tuple(logits.shape)}; classification expects "
            "(samples, classes) with at least 2 classes"
        )
    if labels is None:
        raise InputError("the data have no labels; accuracy and NLL need them")
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit an output "
            f"of shape {tuple(logits.shape)}; expected one integer a sample"
        )
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise InputError(
            f"labels run from {low} to {high}, the model has classes 0 to {logits.shape[1] - 1}"
        )
    log_probs = torch.log_softmax(logits.float(), dim=1)
    if torch.isnan(log_probs).any():  # of NaN, or of Inf, which is no probability either
        raise NotFiniteError("the model's output contains NaN or Inf")
    return log_probs
