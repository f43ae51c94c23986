"""Every reported figure against torchmetrics, scikit-learn and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
import torchmetrics.classification as tmc
import torchmetrics.regression as tmr
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax
from sklearn import metrics as sk

from ensemblekit import metrics
from ensemblekit.evaluation import calibrated_nll, figures, with_auroc
from ensemblekit.predictions import Predictions
from ensemblekit.rivals import find_rivals
from ensemblekit.scoring import Mix, Scores, combined_log_probs, score
from ensemblekit.tasks import Form

torch.set_num_threads(1)

Array = np.ndarray
MIXES = {
    "single": Mix((1,)),
    "mean": Mix((0, 1, 2), "mean"),
    "weighted": Mix((0, 2), "weighted", {"weights": [0.3, 0.7]}),
}
ALL = {**MIXES, "mean-logits": Mix((0, 1, 2), "mean-logits")}


def classes(count: int, rows: int = 600, *, seed: int = 0, scale: float = 2.0) -> Predictions:
    """Three members that are right more often than not."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, count, rows)
    logits = scale * (rng.normal(size=(3, rows, count)) + np.eye(count)[truth])
    logs = log_softmax(logits, axis=2).astype(np.float32)
    return Predictions(Form("classification", count), tuple(logs), None, truth, None)


def probabilities(predictions: Predictions, mix: Mix) -> Array:
    """Of the mix, in float64."""
    logs = np.stack([predictions.outputs[m] for m in mix.members]).astype(np.float64)
    if mix.combiner == "mean-logits":
        probs = np.exp(log_softmax(logs.mean(axis=0), axis=1))
    else:
        weights = np.full(len(logs), 1 / len(logs))
        if mix.combiner == "weighted":
            assert mix.params is not None
            weights = np.array(mix.params["weights"])
        probs = np.tensordot(weights, np.exp(logs), axes=1)
    found: Array = probs / probs.sum(axis=1, keepdims=True)
    return found


def measured(predictions: Predictions, mix: Mix) -> tuple[dict[str, Any], Scores]:
    (scores,) = score(predictions, [mix])
    found = figures(predictions.form.task, scores)
    with_auroc(found, predictions.form.task, scores, predictions.targets)
    return found, scores


def of(metric: torchmetrics.Metric, said: Any, truth: Any) -> float:
    """What torchmetrics says, fed in two pieces."""
    said, truth = torch.as_tensor(said), torch.as_tensor(truth)
    half = len(said) // 2
    metric.update(said[:half], truth[:half])
    metric.update(said[half:], truth[half:])
    return float(metric.compute())


@pytest.mark.parametrize("mix", ALL)
@pytest.mark.parametrize("count", [2, 3, 10])
class TestClassification:
    def test_accuracy_and_top5(self, count: int, mix: str) -> None:
        predictions = classes(count)
        found, _ = measured(predictions, ALL[mix])
        probs, truth = probabilities(predictions, ALL[mix]), predictions.targets
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, probs.argmax(1)))
        assert found["accuracy"] == pytest.approx(
            of(tmc.MulticlassAccuracy(count, average="micro"), probs, truth), abs=1e-6
        )
        assert ("top5" in found) == (count > 5)
        if count > 5:
            assert found["top5"] == pytest.approx(sk.top_k_accuracy_score(truth, probs, k=5))
            metric = tmc.MulticlassAccuracy(count, average="micro", top_k=5)
            assert found["top5"] == pytest.approx(of(metric, probs, truth), abs=1e-6)

    def test_nll_and_brier(self, count: int, mix: str) -> None:
        predictions = classes(count)
        found, _ = measured(predictions, ALL[mix])
        probs, truth = probabilities(predictions, ALL[mix]), predictions.targets
        wanted = sk.log_loss(truth, probs, labels=np.arange(count))
        assert found["nll"] == pytest.approx(wanted, rel=1e-6)
        brier = ((probs - np.eye(count)[truth]) ** 2).sum(axis=1).mean()
        assert found["brier"] == pytest.approx(brier, rel=1e-6)
        if count == 2:  # scikit-learn counts one of the two classes
            half = sk.brier_score_loss(truth, probs[:, 1])
            assert found["brier"] == pytest.approx(2 * half, rel=1e-6)

    def test_calibration(self, count: int, mix: str) -> None:
        predictions = classes(count)
        found, _ = measured(predictions, ALL[mix])
        probs, truth = probabilities(predictions, ALL[mix]), predictions.targets
        metric = tmc.MulticlassCalibrationError(count, n_bins=15, norm="l1")
        assert found["ece"] == pytest.approx(of(metric, probs, truth), abs=1e-6)
        confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == truth
        order = np.argsort(confidence)
        bins = zip(
            np.array_split(confidence[order], 15), np.array_split(correct[order], 15), strict=True
        )
        adaptive = sum(len(c) * abs(c.mean() - right.mean()) for c, right in bins) / len(truth)
        assert found["ece_adaptive"] == pytest.approx(adaptive, abs=1e-6)

    def test_auroc(self, count: int, mix: str) -> None:
        predictions = classes(count)
        found, _ = measured(predictions, ALL[mix])
        assert ("auroc" in found) == (count == 2)
        if count == 2:
            positive = probabilities(predictions, ALL[mix])[:, 1]
            wanted = sk.roc_auc_score(predictions.targets, positive)
            assert found["auroc"] == pytest.approx(wanted, abs=1e-6)
            assert found["auroc"] == pytest.approx(
                of(tmc.BinaryAUROC(), positive, predictions.targets), abs=1e-5
            )


@pytest.mark.parametrize("samples", [16, 100, 599])
def test_ece_of_any_number_of_samples(samples: int) -> None:
    rng = np.random.default_rng(samples)
    confidence = rng.beta(5, 1, samples)
    correct = rng.uniform(size=samples) < confidence
    probs = torch.from_numpy(np.stack([1 - confidence, confidence], axis=1))
    truth = np.where(correct, probs.argmax(1), 1 - probs.argmax(1))
    metric = tmc.MulticlassCalibrationError(2, n_bins=15)
    top = probs.amax(1).numpy()
    assert metrics.ece(top, correct) == pytest.approx(of(metric, probs, truth), abs=1e-6)


@pytest.mark.parametrize("mix", ["mean", "weighted"])
def test_uncertainty_by_its_definition(mix: str) -> None:
    """Entropy of the mean less the mean entropy: information that the members have on top."""
    predictions, chosen = classes(4), ALL[mix]
    found, _ = measured(predictions, chosen)
    logs = np.stack([predictions.outputs[m] for m in chosen.members]).astype(np.float64)
    weights = np.full(len(logs), 1 / len(logs))
    if chosen.params is not None:
        weights = np.array(chosen.params["weights"])
    mean = np.tensordot(weights, np.exp(logs), axes=1)
    each = -(np.exp(logs) * logs).sum(axis=2)
    wanted = (-(mean * np.log(mean)).sum(axis=1) - weights @ each).mean()
    assert wanted >= 0
    assert found["mutual_information"] == pytest.approx(wanted, abs=1e-5)
    said = logs.argmax(axis=2)
    pairs = [(a, b) for a in range(len(said)) for b in range(a)]
    differ = np.mean([(said[a] != said[b]).mean() for a, b in pairs])
    assert found["disagreement"] == pytest.approx(differ)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_calibrated_nll_is_that_of_two_folds(scale: float, seed: int) -> None:
    predictions = classes(4, 301, seed=seed, scale=scale)
    log_probs = combined_log_probs(predictions, MIXES["mean"])
    logits, truth = log_probs.double().numpy(), predictions.targets
    found, temperature = calibrated_nll(log_probs, truth, seed=seed)

    def loss(inside: Array, t: float) -> float:
        made = log_softmax(logits[inside] / t, axis=1)
        return float(-made[np.arange(inside.sum()), truth[inside]].sum())

    fold = np.random.default_rng(seed).permutation(301) % 2 == 1
    total, temperatures = 0.0, []
    for inside in (fold, ~fold):
        best = minimize_scalar(
            lambda t, other=~inside: loss(other, np.exp(t)),
            bounds=(np.log(0.05), np.log(20)),
            method="bounded",
            options={"xatol": 1e-9},
        )
        total += loss(inside, np.exp(best.x))
        temperatures.append(np.exp(best.x))
    assert found == pytest.approx(total / 301, rel=1e-6)
    assert temperature == pytest.approx(np.mean(temperatures), rel=1e-4)


def images(count: int = 5, *, seed: int = 0) -> tuple[Predictions, Array]:
    """Maps of three members, and their log-probabilities (M, N, C, H, W)."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, count - 1, (6, 9, 8))  # the last class never occurs
    logits = rng.normal(size=(3, 6, count, 9, 8)) + np.moveaxis(np.eye(count)[truth], -1, 1)
    logits[:, :, count - 1] -= 50  # and is never predicted
    logs = log_softmax(logits, axis=2)
    flat = np.moveaxis(logs, 2, -1).reshape(3, -1, count)
    form = Form("segmentation", count)
    rivals = find_rivals(flat, truth.reshape(-1))
    return Predictions(form, (), rivals, truth.reshape(-1), np.full(6, 72)), logs


@pytest.mark.parametrize("mix", MIXES)
def test_segmentation(mix: str) -> None:
    predictions, logs = images()
    found, _ = measured(predictions, MIXES[mix])
    weights = MIXES[mix].weights(3)
    assert weights is not None
    probs = np.tensordot(weights, np.exp(logs), axes=1)
    said, truth = probs.argmax(axis=1).reshape(-1), predictions.targets
    wanted = sk.jaccard_score(truth, said, average="macro", labels=np.unique([truth, said]))
    assert found["miou"] == pytest.approx(wanted)
    metric = tmc.MulticlassJaccardIndex(5, average="none")
    metric.update(torch.from_numpy(said), torch.from_numpy(truth))
    assert found["miou"] == pytest.approx(float(metric.compute()[:4].mean()), abs=1e-6)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, said))
    flat = np.moveaxis(probs, 1, -1).reshape(-1, 5)
    assert found["nll"] == pytest.approx(sk.log_loss(truth, flat, labels=np.arange(5)), rel=1e-6)


def test_tokens() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(7, 11, 13)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 13, (7, 11)))
    labels[2, 4:] = -100
    kept = labels != -100
    logs = logits.log_softmax(-1)[kept]
    true = logs.gather(1, labels[kept][:, None])[:, 0]
    right = logs.argmax(1) == labels[kept]
    outputs = torch.stack([true, right.float()], dim=1).numpy()
    sizes = kept.sum(1).numpy()
    predictions = Predictions(
        Form("tokens", 13), (outputs,), None, labels[kept].numpy(), sizes.astype(np.int64)
    )
    found, _ = measured(predictions, Mix((0,)))
    perplexity = torchmetrics.text.Perplexity(ignore_index=-100)
    assert found["perplexity"] == pytest.approx(of(perplexity, logits, labels), rel=1e-5)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert found["nll"] == pytest.approx(float(wanted), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))


@pytest.mark.parametrize("mix", ALL)
def test_multilabel(mix: str) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (400, 4)).astype(np.uint8)
    logits = (rng.normal(size=(3, 400, 4)) * 2 + 2 * truth - 1).astype(np.float32)
    predictions = Predictions(Form("multilabel", 4), tuple(logits), None, truth, None)
    found, _ = measured(predictions, ALL[mix])
    each = np.stack([logits[m] for m in ALL[mix].members]).astype(np.float64)
    if mix == "mean-logits":
        probs = expit(each.mean(axis=0))
    else:
        weights = ALL[mix].weights(3)
        assert weights is not None
        probs = np.tensordot(weights[list(ALL[mix].members)], expit(each), axes=1)
    said = torch.from_numpy(probs)
    assert found["accuracy"] == pytest.approx(
        of(tmc.MultilabelAccuracy(4, average="micro"), said, truth.astype(np.int64)), abs=1e-6
    )
    assert found["accuracy"] == pytest.approx(1 - sk.hamming_loss(truth, probs > 0.5))
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(truth, probs > 0.5))
    assert found["exact_match"] == pytest.approx(
        of(tmc.MultilabelExactMatch(4), said, truth.astype(np.int64)), abs=1e-6
    )
    columns = range(4)
    losses = [sk.log_loss(truth[:, c], probs[:, c]) for c in columns]
    assert found["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    briers = [sk.brier_score_loss(truth[:, c], probs[:, c]) for c in columns]
    assert found["brier"] == pytest.approx(np.mean(briers), rel=1e-5)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(truth, probs), abs=1e-6)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_regression(mix: str, columns: int, offset: float) -> None:
    """Values far from zero, too: the spread is a small difference of large squares."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(500, columns)).astype(np.float32) * 3 + np.float32(offset)
    made = (truth + rng.normal(size=(3, 500, columns))).astype(np.float32)
    predictions = Predictions(Form("regression", columns), tuple(made), None, truth, None)
    found, _ = measured(predictions, MIXES[mix])
    weights = MIXES[mix].weights(3)
    assert weights is not None
    said = np.tensordot(weights, made.astype(np.float64), axes=1)
    true = truth.astype(np.float64)
    close = 1e-5 if offset == 0 else 3e-3  # a float32 mean near 1e5 is known to 0.008
    assert found["mse"] == pytest.approx(sk.mean_squared_error(true, said), rel=close)
    assert found["rmse"] == pytest.approx(np.sqrt(sk.mean_squared_error(true, said)), rel=close)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(true, said), rel=close)
    assert found["r2"] == pytest.approx(sk.r2_score(true, said), rel=close)
    if offset == 0:
        pairs = torch.from_numpy(said), torch.from_numpy(true)
        assert found["mse"] == pytest.approx(of(tmr.MeanSquaredError(), *pairs), rel=1e-5)
        assert found["mae"] == pytest.approx(of(tmr.MeanAbsoluteError(), *pairs), rel=1e-5)
        assert found["r2"] == pytest.approx(of(tmr.R2Score(), *pairs), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_auroc_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 5, 80) / 4, rng.integers(0, 2, 80)
    wanted = of(tmc.BinaryAUROC(), scores, truth)
    assert metrics.auroc(scores, truth) == pytest.approx(wanted, abs=1e-6)
