"""Owns the way from cached predictions to what is known of each item: right or wrong, how likely.

Input: `Predictions` of a pool of members, and mixes of them. One walk over the predictions serves
all mixes: weighted means of probabilities are rows of one matrix product.

Legend of shapes: M members of the pool, R rows, N items, C classes, S mixes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ensemblekit import combiners
from ensemblekit.errors import InputError
from ensemblekit.predictions import Kept, Predictions
from ensemblekit.rivals import Rivals

_BLOCK = 1 << 23  # elements of one piece of work
_TOP = 5
_ENTROPY_UP_TO = 1 << 28  # elements of all mixes beyond which their entropies are left out


@dataclass(frozen=True)
class Mix:
    """A combination of members of a pool.

    Attributes:
        members: Indices into the pool.
        combiner: None for a single member.
        params: Its fitted numbers.
    """

    members: tuple[int, ...]
    combiner: str | None = None
    params: Mapping[str, Any] | None = None

    def weights(self, pool: int) -> npt.NDArray[np.float64] | None:
        """As weights over the pool, for a weighted mean; None for other combiners."""
        found = np.zeros(pool)
        if self.combiner in (None, "mean"):
            share: Any = np.full(len(self.members), 1.0 / len(self.members))
        elif self.combiner == "weighted":
            assert self.params is not None
            share = np.array(self.params["weights"])
        else:
            return None
        np.add.at(found, list(self.members), share)
        return found


Scores = dict[str, npt.NDArray[Any]]
"""Columns of items, as `metrics.Items`, and `confidence` and `decided` for classification."""


def score(predictions: Predictions, mixes: Sequence[Mix]) -> list[Scores]:
    """What is known of each item under each mix.

    Raises:
        InputError: A combiner that this task does not have.
    """
    task = predictions.form.task
    if not mixes:
        return []
    for mix in mixes:
        if mix.combiner is not None and task not in combiners.combiner(mix.combiner).tasks:
            raise InputError(f"combiner '{mix.combiner}' is not defined for {task}")
    return _SCORES[task](predictions, mixes)


# ------------------------------------------------------------------------ classification


def _classes(predictions: Predictions, mixes: Sequence[Mix]) -> list[Scores]:
    used = sorted({m for mix in mixes for m in mix.members})
    place = {m: at for at, m in enumerate(used)}
    outputs = [predictions.outputs[m] for m in used]
    mixes = [Mix(tuple(place[m] for m in x.members), x.combiner, x.params) for x in mixes]
    pool, rows, classes = len(used), len(predictions.targets), predictions.form.classes
    with_entropy = rows * classes * len(mixes) <= _ENTROPY_UP_TO
    parts: list[list[Scores]] = [[] for _ in mixes]
    step = max(16, _BLOCK // (max(pool, len(mixes), 1) * classes))
    weights = [None if len(mix.members) == 1 else mix.weights(pool) for mix in mixes]
    for first in range(0, rows, step):
        block = slice(first, first + step)
        log_probs_MRC = _stacked(outputs, block)
        targets_R = torch.from_numpy(predictions.targets[block])
        probs_MRC = log_probs_MRC.exp()
        true_MR = log_probs_MRC.gather(2, targets_R.expand(pool, -1)[..., None])[..., 0].double()
        entropy_MR = _entropy(probs_MRC) if with_entropy else None
        decided_MR = log_probs_MRC.argmax(2)
        blocks = _linear_mixes(probs_MRC, weights)
        for s, mix in enumerate(mixes):
            if len(mix.members) == 1 and mix.combiner in (None, "mean"):
                m = mix.members[0]
                found = _known(probs_MRC[m], targets_R, true_MR[m], decided_MR[m])
            elif (weight := weights[s]) is not None:
                with np.errstate(divide="ignore"):
                    logs_M = torch.from_numpy(np.log(weight))
                true_R = torch.logsumexp(true_MR + logs_M[:, None], dim=0)
                found = _known(blocks[s], targets_R, true_R, blocks[s].argmax(1))
            else:
                found = _combined(log_probs_MRC[list(mix.members)], targets_R, mix)
            if len(mix.members) > 1:
                members = list(dict.fromkeys(mix.members))
                found["disagreement"] = _disagreement(decided_MR[members])
                if entropy_MR is not None and "probs" in found:
                    share_M = weights[s]
                    if share_M is None:
                        share_M = np.bincount(mix.members, minlength=pool) / len(mix.members)
                    mean_R = torch.from_numpy(share_M).to(entropy_MR.dtype) @ entropy_MR
                    found["information"] = _entropy(found["probs"]) - mean_R
            found.pop("probs", None)
            parts[s].append({name: np.asarray(value) for name, value in found.items()})
    return [
        {name: np.concatenate([part[name] for part in one]) for name in one[0]} for one in parts
    ]


def _linear_mixes(
    probs_MRC: torch.Tensor, weights: Sequence[npt.NDArray[np.float64] | None]
) -> dict[int, torch.Tensor]:
    """All weighted means by one matrix product."""
    rows = {s: weight for s, weight in enumerate(weights) if weight is not None}
    if not rows:
        return {}
    matrix_SM = torch.from_numpy(np.stack(list(rows.values()))).float()
    mixed = (matrix_SM @ probs_MRC.flatten(1)).view(len(rows), *probs_MRC.shape[1:])
    return dict(zip(rows, mixed, strict=True))


def _known(
    probs_RC: torch.Tensor, targets_R: torch.Tensor, true_R: torch.Tensor, decided_R: torch.Tensor
) -> dict[str, Any]:
    """What the figures of a classification need of each row."""
    truth_R1 = targets_R[:, None]
    prob_R = probs_RC.gather(1, truth_R1)[:, 0]
    found: dict[str, Any] = {
        "rows": torch.ones(len(targets_R)),
        "correct": decided_R == targets_R,
        "decided": decided_R,
        "log_prob": true_R,
        "brier": (probs_RC * probs_RC).sum(1).double() - 2 * prob_R.double() + 1,
        "confidence": probs_RC.gather(1, decided_R[:, None])[:, 0].double(),
        "probs": probs_RC,
    }
    if probs_RC.shape[1] > _TOP:
        found["top5"] = _among_top(probs_RC, prob_R)
    if probs_RC.shape[1] == 2:
        found["positive"] = probs_RC[:, 1]
    return found


def _combined(log_probs_MRC: torch.Tensor, targets_R: torch.Tensor, mix: Mix) -> dict[str, Any]:
    made_RC = combiners.combine(mix.combiner, log_probs_MRC, mix.params, "classification")
    assert mix.combiner is not None
    if combiners.combiner(mix.combiner).likelihood:
        true_R = made_RC.gather(1, targets_R[:, None])[:, 0].double()
        return _known(made_RC.exp(), targets_R, true_R, made_RC.argmax(1))
    decided_R = made_RC.argmax(1)
    found: dict[str, Any] = {
        "rows": torch.ones(len(targets_R)),
        "correct": decided_R == targets_R,
        "decided": decided_R,
    }
    if made_RC.shape[1] > _TOP:
        found["top5"] = _among_top(made_RC, made_RC.gather(1, targets_R[:, None])[:, 0])
    if made_RC.shape[1] == 2:
        found["positive"] = made_RC[:, 1] - made_RC[:, 0]
    return found


def _among_top(outputs_RC: torch.Tensor, true_R: torch.Tensor) -> torch.Tensor:
    """Whether fewer than five classes are more probable than the true one."""
    return (outputs_RC > true_R[:, None]).sum(1) < _TOP


def _entropy(probs: torch.Tensor) -> torch.Tensor:
    return -torch.xlogy(probs, probs).sum(-1)


def _disagreement(decided_MR: torch.Tensor) -> torch.Tensor:
    """Share of pairs of members that decide differently, by row."""
    members = len(decided_MR)
    pairs = members * (members - 1) / 2
    differ_R = torch.zeros(decided_MR.shape[1])
    for m in range(1, members):
        differ_R += (decided_MR[m] != decided_MR[:m]).sum(0)
    return differ_R / max(pairs, 1)


def combined_log_probs(predictions: Predictions, mix: Mix) -> torch.Tensor:
    """The combined outputs (R, C) of one mix, whole, for figures that need them."""
    arrays = [predictions.outputs[m] for m in mix.members]
    step = max(1, _BLOCK // (len(arrays) * predictions.form.classes))
    parts = []
    for first in range(0, len(predictions.targets), step):
        block_MRC = _stacked(arrays, slice(first, first + step))
        parts.append(combiners.combine(mix.combiner, block_MRC, mix.params, predictions.form.task))
    return torch.cat(parts)


def _stacked(arrays: Sequence[Kept], block: slice) -> torch.Tensor:
    """A block of rows of several members as one float32 tensor."""
    return torch.stack([torch.from_numpy(np.asarray(a[block], np.float32)) for a in arrays])


# --------------------------------------------------------------------------- other tasks


def _segments(predictions: Predictions, mixes: Sequence[Mix]) -> list[Scores]:
    rivals = predictions.rivals
    assert rivals is not None
    assert predictions.sizes_N is not None
    classes = predictions.form.classes
    sizes_N = predictions.sizes_N
    item_R = np.repeat(np.arange(len(sizes_N)), sizes_N)
    found = []
    for mix in mixes:
        weight = mix.weights(len(rivals.true_MR))
        assert weight is not None
        log_prob_R, decided_R = _decide(rivals, weight)
        right_R = decided_R == rivals.targets_R
        inter_NC = _table(item_R[right_R], rivals.targets_R[right_R], len(sizes_N), classes)
        truth_NC = _table(item_R, rivals.targets_R, len(sizes_N), classes)
        said_NC = _table(item_R, decided_R, len(sizes_N), classes)
        found.append(
            {
                "rows": sizes_N,
                "correct": np.bincount(item_R, right_R, len(sizes_N)),
                "log_prob": np.bincount(item_R, log_prob_R, len(sizes_N)),
                "inter_C": inter_NC,
                "union_C": truth_NC + said_NC - inter_NC,
            }
        )
    return found


def _decide(
    rivals: Rivals, weights_M: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Log-probability of the true class, and the most probable class, of one weighted mean."""
    used = weights_M > 0
    true_MR = rivals.true_MR[used].astype(np.float64)
    logs_M = np.log(weights_M[used])
    log_prob_R = np.logaddexp.reduce(true_MR + logs_M[:, None], axis=0)
    prob_R = weights_M[used] @ np.exp(true_MR)
    prob_Q = weights_M[used] @ np.exp(rivals.rivals_MQ[used].astype(np.float64))
    rows_Q = rivals.rows_Q
    decided_R = rivals.targets_R.copy()
    # rivals by row, then from the least to the most probable, ties from high to low class: the
    # last one written is the winner
    order = np.lexsort((-rivals.classes_Q, prob_Q, rows_Q))
    top_R = np.full(len(decided_R), -1, dtype=np.int64)
    top_R[rows_Q[order]] = order
    has = top_R >= 0
    best = top_R[has]
    ahead = prob_Q[best] > prob_R[has]
    ahead |= (prob_Q[best] == prob_R[has]) & (rivals.classes_Q[best] < decided_R[has])
    decided_R[np.nonzero(has)[0][ahead]] = rivals.classes_Q[best[ahead]]
    return log_prob_R, decided_R


def _table(
    item_R: npt.NDArray[np.int64], class_R: npt.NDArray[np.int64], items: int, classes: int
) -> npt.NDArray[np.int64]:
    flat = np.bincount(item_R * classes + class_R, minlength=items * classes)
    return flat.reshape(items, classes)


def _tokens(predictions: Predictions, mixes: Sequence[Mix]) -> list[Scores]:
    assert predictions.sizes_N is not None
    sizes_N = predictions.sizes_N
    item_R = np.repeat(np.arange(len(sizes_N)), sizes_N)
    found = []
    for mix in mixes:
        weight = mix.weights(len(predictions.outputs))
        assert weight is not None
        used = np.nonzero(weight)[0]
        true_MR = np.stack([predictions.outputs[m][:][:, 0].astype(np.float64) for m in used])
        true_R = np.logaddexp.reduce(true_MR + np.log(weight[used])[:, None], axis=0)
        scores: Scores = {
            "rows": sizes_N,
            "log_prob": np.bincount(item_R, true_R, len(sizes_N)),
        }
        if len(used) == 1:  # whether the mean of several is right is not kept
            right_R = predictions.outputs[used[0]][:][:, 1].astype(np.float64)
            scores["correct"] = np.bincount(item_R, right_R, len(sizes_N))
        found.append(scores)
    return found


def _labels(predictions: Predictions, mixes: Sequence[Mix]) -> list[Scores]:
    targets_RC = torch.from_numpy(predictions.targets)
    sign_RC = torch.where(targets_RC.bool(), 1.0, -1.0)
    # one number for all labels of a row: a sum that wraps around, different for different sets
    span = np.iinfo(np.int64)
    codes = np.random.default_rng(0).integers(span.min, span.max, targets_RC.shape[1])
    codes_C = torch.from_numpy(codes)
    found = []
    for mix in mixes:
        logits_RC = combined_log_probs(predictions, mix)
        right_RC = (logits_RC > 0) == targets_RC.bool()
        scores: dict[str, Any] = {
            "rows": torch.ones(len(targets_RC)),
            "correct": right_RC.double().mean(1),
            "exact": right_RC.all(1),
            "positive": logits_RC,
            "decided": (logits_RC > 0).long() @ codes_C,
        }
        if mix.combiner is None or combiners.combiner(mix.combiner).likelihood:
            loss_RC = torch.nn.functional.logsigmoid(sign_RC * logits_RC).double()
            scores["log_prob"] = loss_RC.mean(1)
            wrong_RC = torch.sigmoid(logits_RC.double()) - targets_RC
            scores["brier"] = (wrong_RC**2).mean(1)
        found.append({name: np.asarray(value) for name, value in scores.items()})
    return found


def _values(predictions: Predictions, mixes: Sequence[Mix]) -> list[Scores]:
    targets_RC = predictions.targets.astype(np.float64)
    middle = targets_RC.mean(axis=0)
    found = []
    for mix in mixes:
        made_RC = combined_log_probs(predictions, mix).double().numpy()
        errors_RC = (made_RC - targets_RC) ** 2
        found.append(
            {
                "rows": np.ones(len(targets_RC)),
                "squared": errors_RC.mean(axis=1),
                "absolute": np.abs(made_RC - targets_RC).mean(axis=1),
                "errors_C": errors_RC,
                "targets_C": targets_RC - middle,
            }
        )
    return found


_SCORES = {
    "classification": _classes,
    "segmentation": _segments,
    "tokens": _tokens,
    "multilabel": _labels,
    "regression": _values,
}
