"""Owns combiners: how the outputs of M members become one, in torch, as they are exported.

Input: outputs as `Form.outputs` gives them. A combiner is a `fit` on choosing data, whose plain
numbers go into the candidate, and a `combine` with these numbers.

Legend of shapes: M members, R rows, C classes, labels or values. Outputs are log-probabilities of
classes, logits of labels, or values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ensemblekit.errors import one_of

Params = Mapping[str, Any]

_FIT_UP_TO = 1 << 24  # outputs of all members that a temperature is fitted on
_LEAST_LOG = -30.0  # log-probabilities that a stacking model sees, in the fit and afterwards
_FEATURES_AT_MOST = 2048  # of a stacking model; beyond it the fit takes minutes


@dataclass(frozen=True)
class Combiner:
    """One way to combine.

    Attributes:
        tasks: Where it is defined.
        likelihood: Its outputs are probabilities: NLL and calibration mean something.
        linear: A weighted mean of probabilities (or values): exact from true class and rivals.
        fitted: It has numbers that are fitted on labels.
        combine: `combine(outputs_MRC, params, task) -> outputs_RC`.
        fit: `fit(outputs, targets, task) -> params` from M outputs (R, C) that may lie on disk; None
            where nothing is fitted, and it returns None where it cannot be.
    """

    tasks: tuple[str, ...]
    likelihood: bool
    linear: bool
    combine: Callable[[torch.Tensor, Params, str], torch.Tensor]
    fit: Callable[[Sequence[Any], npt.NDArray[Any], str], dict[str, Any] | None] | None = None

    @property
    def fitted(self) -> bool:
        """Whether labels take part."""
        return self.fit is not None


def combiner(name: str) -> Combiner:
    """The combiner of that name; `soft-vote` is another word for `mean`.

    Raises:
        UsageError: There is none.
    """
    name = "mean" if name == "soft-vote" else name
    return COMBINERS[one_of(name, COMBINERS, what="combiner")]


def combine(
    name: str | None, outputs_MRC: torch.Tensor, params: Params | None, task: str
) -> torch.Tensor:
    """One output (R, C) of M; a single member is returned as it is."""
    if name is None:
        return outputs_MRC[0]
    return combiner(name).combine(outputs_MRC, params or {}, task)


# ------------------------------------------------------------------------------- means


def _mean(outputs_MRC: torch.Tensor, _: Params, task: str) -> torch.Tensor:
    """p = 1/M sum_m p_m; of values the mean."""
    members = len(outputs_MRC)
    weights_M = torch.full((members,), 1.0 / members, device=outputs_MRC.device)
    return _mix(outputs_MRC, weights_M, task)


def _weighted(outputs_MRC: torch.Tensor, params: Params, task: str) -> torch.Tensor:
    """p = sum_m w_m p_m with w on the simplex."""
    weights_M = torch.as_tensor(params["weights"], dtype=torch.float32, device=outputs_MRC.device)
    return _mix(outputs_MRC, weights_M, task)


def _mix(outputs_MRC: torch.Tensor, weights_M: torch.Tensor, task: str) -> torch.Tensor:
    shape = (-1, *[1] * (outputs_MRC.ndim - 1))
    if task == "regression":
        return (outputs_MRC * weights_M.view(shape)).sum(0)
    logs_M = torch.log(weights_M).view(shape)
    if task == "multilabel":
        yes = torch.logsumexp(torch.nn.functional.logsigmoid(outputs_MRC) + logs_M, dim=0)
        no = torch.logsumexp(torch.nn.functional.logsigmoid(-outputs_MRC) + logs_M, dim=0)
        return yes - no
    return torch.logsumexp(outputs_MRC + logs_M, dim=0)


def _mean_logits(outputs_MRC: torch.Tensor, _: Params, task: str) -> torch.Tensor:
    """The normalised geometric mean of probabilities."""
    mean_RC = outputs_MRC.mean(0)
    return mean_RC if task == "multilabel" else torch.log_softmax(mean_RC, dim=-1)


def _vote(outputs_MRC: torch.Tensor, _: Params, task: str) -> torch.Tensor:
    """Votes of the members; the mean probability, below one vote, decides ties."""
    members = len(outputs_MRC)
    if task == "multilabel":
        votes_RC = (outputs_MRC > 0).float().sum(0) / members - 0.5
        return votes_RC + 0.5 / members * (torch.sigmoid(outputs_MRC).mean(0) - 0.5)
    votes_MRC = torch.nn.functional.one_hot(outputs_MRC.argmax(-1), outputs_MRC.shape[-1])
    return votes_MRC.float().sum(0) + 0.5 * outputs_MRC.exp().mean(0)


# ------------------------------------------------------------------------- temperature


def _temperature(outputs_MRC: torch.Tensor, params: Params, task: str) -> torch.Tensor:
    """The mean's logits divided by T (Guo 2017), after combining (Ashukha 2020)."""
    mean_RC = _mean(outputs_MRC, {}, task) / params["temperature"]
    return mean_RC if task == "multilabel" else torch.log_softmax(mean_RC, dim=-1)


def _fit_temperature(
    outputs: Sequence[Any], targets: npt.NDArray[Any], task: str
) -> dict[str, Any]:
    rows = _some_rows(len(targets), len(outputs) * outputs[0].shape[1])
    outputs_MRC = _whole(outputs, rows)
    mean_RC = _mean(torch.from_numpy(outputs_MRC), {}, task)
    return {"temperature": best_temperature(mean_RC, torch.from_numpy(targets[rows]), task)}


def _some_rows(rows: int, width: int) -> npt.NDArray[np.int64]:
    """All rows, or a seeded draw of them that is enough for one number."""
    most = max(2000, _FIT_UP_TO // width)
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def _whole(outputs: Sequence[Any], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Some rows of all members as one array (M, R, C)."""
    return np.stack([_rows(one, rows) for one in outputs]).astype(np.float32)


def _rows(one: Any, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    if isinstance(one, np.ndarray):
        return one[rows]
    return np.asarray(one.array[one.rows[rows]])


def best_temperature(logits_RC: torch.Tensor, targets: torch.Tensor, task: str) -> float:
    """The T > 0 that gives the smallest NLL of softmax(logits / T); 0.05 to 20.

    The NLL is convex in 1/T, so Newton's steps on it find the minimum.
    """
    z_RC = logits_RC.double()
    z_RC = torch.where(torch.isfinite(z_RC), z_RC, torch.full_like(z_RC, -1e4))
    if task == "multilabel":
        z_RC = z_RC.reshape(-1, 1)
        z_RC = torch.cat([torch.zeros_like(z_RC), z_RC], dim=1)
        targets = targets.reshape(-1)
    else:
        z_RC = z_RC - z_RC.amax(1, keepdim=True)
    true_R = z_RC.gather(1, targets.long()[:, None])[:, 0]
    beta = 1.0
    for _ in range(25):
        p_RC = torch.softmax(beta * z_RC, dim=1)
        mean_R = (p_RC * z_RC).sum(1)
        slope = float((mean_R - true_R).mean())
        curve = float(((p_RC * z_RC**2).sum(1) - mean_R**2).mean())
        step = slope / max(curve, 1e-12)
        new = min(max(beta - step, beta / 2), beta * 2)  # far from the minimum: halve or double
        new = min(max(new, 0.05), 20.0)
        if abs(new - beta) < 1e-7 * beta:
            break
        beta = new
    return 1.0 / beta


# ---------------------------------------------------------------------------- stacking


def _stack(outputs_MRC: torch.Tensor, params: Params, task: str) -> torch.Tensor:
    """A linear model over all members' outputs."""
    features_RF = outputs_MRC.movedim(0, 1).flatten(1)
    if params.get("of") == "probabilities":
        features_RF = features_RF.exp()
    elif params.get("of") == "log-probabilities":
        features_RF = features_RF.clamp(min=_LEAST_LOG)
    coef = torch.as_tensor(params["coef"], dtype=torch.float32, device=features_RF.device)
    intercept = torch.as_tensor(params["intercept"], dtype=torch.float32, device=coef.device)
    made_RC = features_RF @ coef.T + intercept
    return (
        torch.log_softmax(made_RC, dim=-1) if params.get("of") == "log-probabilities" else made_RC
    )


def _fit_ridge_classes(
    outputs: Sequence[Any], targets: npt.NDArray[Any], task: str
) -> dict[str, Any] | None:
    """Ridge regression of one-hot targets on probabilities; alpha by leave-one-out."""
    from sklearn.linear_model import RidgeCV

    features_RF = _features(outputs)
    if features_RF is None:
        return None
    features_RF = np.exp(features_RF)
    hot_RC = np.eye(outputs[0].shape[1])[targets]
    found = RidgeCV(alphas=np.logspace(-2, 4, 13)).fit(features_RF, hot_RC)
    return {
        "of": "probabilities",
        "coef": found.coef_.tolist(),
        "intercept": found.intercept_.tolist(),
    }


def _fit_logistic(
    outputs: Sequence[Any], targets: npt.NDArray[Any], task: str
) -> dict[str, Any] | None:
    """Multinomial logistic regression on log-probabilities, L2 with C = 0.01."""
    from sklearn.linear_model import LogisticRegression

    features_RF = _features(outputs)
    if features_RF is None:
        return None
    features_RF = np.maximum(features_RF, _LEAST_LOG)
    classes = outputs[0].shape[1]
    if len(np.unique(targets)) < classes:
        return None  # a class that was never seen would have no coefficients
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that stops early is a fit all the same
        middle_F = features_RF.mean(axis=0)
        model = LogisticRegression(C=0.01, solver="newton-cg", tol=1e-3)
        found = model.fit(features_RF - middle_F, targets)
    coef, intercept = found.coef_, found.intercept_ - found.coef_ @ middle_F
    if len(coef) == 1:  # two classes: one column stands for both
        coef, intercept = np.stack([-coef[0] / 2, coef[0] / 2]), np.array([-1, 1]) * intercept / 2
    return {
        "of": "log-probabilities",
        "coef": coef.tolist(),
        "intercept": intercept.tolist(),
    }


def _fit_ridge_values(
    outputs: Sequence[Any], targets: npt.NDArray[Any], task: str
) -> dict[str, Any] | None:
    """Ridge regression of the targets on all members' values; alpha by leave-one-out."""
    from sklearn.linear_model import RidgeCV

    features_RF = _features(outputs)
    if features_RF is None:
        return None
    found = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(features_RF, targets)
    coef = np.atleast_2d(found.coef_)
    return {"coef": coef.tolist(), "intercept": np.atleast_1d(found.intercept_).tolist()}


def _features(outputs: Sequence[Any]) -> npt.NDArray[np.float64] | None:
    """All members' outputs side by side, (R, M x C); None where a fit would be too wide."""
    rows, classes = outputs[0].shape
    if len(outputs) * classes > _FEATURES_AT_MOST or rows < 2 * classes:
        return None
    return np.concatenate([one[:].astype(np.float64) for one in outputs], axis=1)


_LIKELY = ("classification", "segmentation", "tokens", "multilabel")
_WHOLE = ("classification", "multilabel")  # tasks whose outputs are kept whole

COMBINERS: dict[str, Combiner] = {
    "mean": Combiner((*_LIKELY, "regression"), True, True, _mean),
    "mean-logits": Combiner(_WHOLE, True, False, _mean_logits),
    "vote": Combiner(_WHOLE, False, False, _vote),
    "weighted": Combiner((*_LIKELY, "regression"), True, True, _weighted),
    "temperature": Combiner(_WHOLE, True, False, _temperature, _fit_temperature),
    "stack-ridge": Combiner(("classification",), False, False, _stack, _fit_ridge_classes),
    "stack-logistic": Combiner(("classification",), True, False, _stack, _fit_logistic),
    "ridge": Combiner(("regression",), True, False, _stack, _fit_ridge_values),
}
