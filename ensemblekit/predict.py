"""Owns the forward pass that accuracy is measured on; nothing else runs a model over labels.

Input: a ready module and batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ensemblekit.batches import Batch, forward
from ensemblekit.errors import InputError
from ensemblekit.tasks import class_log_probs, logits_of


@dataclass(frozen=True)
class Predictions:
    """What one member said about each sample.

    Attributes:
        log_probs_NC: Log-probabilities, float32, on the CPU.
        targets_N: Labels.
    """

    log_probs_NC: torch.Tensor
    targets_N: torch.Tensor


def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    logits_key: str | None = None,
) -> Predictions:
    """Predict every sample once, in eval mode; the model's flags are as before afterwards.

    Raises:
        InputError: The data do not fit the model, or are empty.
        NotFiniteError: NaN in the outputs.
    """
    device = torch.device(device)
    log_probs: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, autocast, autocast is not None):
            for batch in batches:
                moved = batch.to(device)
                logits = logits_of(forward(model, moved), logits_key)
                log_probs.append(class_log_probs(logits, moved.target).cpu())
                assert batch.target is not None
                targets.append(batch.target.cpu())
    finally:
        for module, flag in flags.items():
            module.training = flag
    if not log_probs:
        raise InputError("the data are empty: there is nothing to predict")
    return Predictions(torch.cat(log_probs), torch.cat(targets))
