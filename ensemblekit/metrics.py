"""Owns the formulas of quality: functions of log-probabilities and labels.

Input: `Predictions`. Sums run in float64.
"""

import torch

from ensemblekit.predict import Predictions


def correct(predictions: Predictions) -> int:
    """Samples whose most probable class is the label; ties go to the lower class."""
    return int((predictions.log_probs_NC.argmax(1) == predictions.targets_N.long()).sum())


def accuracy(predictions: Predictions) -> float:
    """Share of correct samples, 0 to 1."""
    return correct(predictions) / len(predictions.targets_N)


def nll(predictions: Predictions) -> float:
    """Mean negative log-likelihood of the labels in nats: -1/N sum_n log p_n(y_n)."""
    chosen_N = predictions.log_probs_NC.gather(1, predictions.targets_N[:, None].long())
    return float(-chosen_N.to(torch.float64).mean())
