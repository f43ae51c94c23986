"""Owns what a model's outputs and labels mean: classes, dense classes, tokens, labels, values.

Input: raw outputs of a forward pass and a batch. `detect` looks at the first batch, once; the
`Form` it gives turns every batch into rows: outputs that mean the same for every model, and targets.

Legend of shapes: N samples, R rows (the unit that has one target: a sample, pixel or token),
C classes, labels or values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ensemblekit.batches import Batch
from ensemblekit.errors import InputError, NotFiniteError, listing, one_of

TASKS = ("classification", "segmentation", "tokens", "multilabel", "regression")
IGNORED = -100  # torch's own default of `ignore_index`

_LOGITS_KEYS = ("logits", "out", "output", "pred", "predictions")


@dataclass(frozen=True)
class Form:
    """What outputs and labels of this model and these data are.

    Attributes:
        task: One of `TASKS`.
        classes: Classes, labels or values in an output.
        shifted: Tokens only: the label of position t is what the output at t - 1 predicts.
        ignore_index: Label of rows that do not count.
        logits_key: Entry of a dict output that holds the logits.
    """

    task: str
    classes: int
    shifted: bool = False
    ignore_index: int = IGNORED
    logits_key: str | None = None

    @property
    def dense(self) -> bool:
        """Whether a sample has many rows."""
        return self.task in ("segmentation", "tokens")

    def targets(self, batch: Batch) -> "Targets":
        """The targets of a batch, one a row; ignored rows are left out.

        Raises:
            InputError: Labels that are not this task's.
        """
        labels = _labels(batch)
        if self.task == "tokens" and self.shifted:
            labels = labels[:, 1:]
        if self.dense:
            kept_NP = labels.flatten(1) != self.ignore_index
            targets_R = labels.flatten(1)[kept_NP].long()
            _check_labels(
                targets_R, self.classes, hint="rows without a class: --ignore-index LABEL"
            )
            return Targets(targets_R, kept_NP.sum(1))
        if self.task == "multilabel":
            if not bool(((labels == 0) | (labels == 1)).all()):
                raise InputError("multilabel labels are 0 or 1, found other values")
            return Targets(_columns(labels).to(torch.uint8))
        if self.task == "regression":
            return Targets(_finite(_columns(labels), "the labels contain NaN or Inf"))
        if labels.ndim != 1 or labels.is_floating_point():
            raise InputError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype}; classification "
                "expects one integer a sample"
            )
        _check_labels(labels, self.classes)
        return Targets(labels.long())

    def outputs(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """What a member says about each row, float32 (R, C).

        Log-probabilities of classes; logits of labels (multilabel); values (regression).

        Raises:
            InputError: Shapes that are not this task's.
            NotFiniteError: NaN in the outputs.
        """
        logits, labels = logits_of(outputs, self.logits_key), _labels(batch)
        made_RC = _OUTPUTS[self.task](self, logits, labels)
        if made_RC.shape[1] != self.classes:
            raise InputError(
                f"the model's outputs have {made_RC.shape[1]} classes here and "
                f"{self.classes} in the first batch: members do not fit together"
            )
        return made_RC

    def loss(self, outputs_RC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss over rows: NLL, of labels their mean, of values the squared error."""
        functional = torch.nn.functional
        if self.task == "regression":
            return ((outputs_RC - targets) ** 2).mean(1).sum()
        if self.task == "multilabel":
            each = functional.binary_cross_entropy_with_logits(
                outputs_RC, targets.to(outputs_RC.dtype), reduction="none"
            )
            return each.mean(1).sum()
        return functional.nll_loss(outputs_RC, targets, reduction="sum")


@dataclass(frozen=True)
class Targets:
    """What is true of each row.

    Attributes:
        values_R: Classes (R,), or labels and values (R, C).
        sizes_N: Rows of each sample; None where each has one.
    """

    values_R: torch.Tensor
    sizes_N: torch.Tensor | None = None


def detect(
    outputs: Any,
    batch: Batch,
    *,
    task: str = "auto",
    logits_key: str | None = None,
    ignore_index: int = IGNORED,
) -> Form:
    """What task a model and its data are for, from the first batch.

    Raises:
        UsageError: No such task.
        InputError: The shapes fit none, or not the task that was named.
    """
    one_of(task, ("auto", *TASKS), what="task")
    logits, labels = logits_of(outputs, logits_key), batch.target
    if labels is None:
        raise InputError(
            "the data have no labels; every figure needs them",
            hint=f"a batch is (x, y), or a dict with one of labels, label, y, target; "
            f"found {sorted(batch.inputs) if isinstance(batch.inputs, dict) else 'inputs alone'}",
        )
    if task == "auto":
        task = _guess(logits, labels)
    classes = 1 if logits.ndim == 1 else logits.shape[-1] if task == "tokens" else logits.shape[1]
    shifted = task == "tokens" and _labels_are_inputs(batch, ignore_index)
    return Form(task, int(classes), shifted, ignore_index, logits_key)


def _guess(logits: torch.Tensor, labels: torch.Tensor) -> str:
    whole = not labels.is_floating_point()
    if logits.ndim == 4 and labels.ndim == 3 and whole:
        return "segmentation"
    if logits.ndim == 3 and labels.ndim == 2 and whole:
        return "tokens"
    if logits.ndim == 2 and logits.shape[1] > 1 and labels.ndim == 1 and whole:
        return "classification"
    columns = logits if logits.ndim == 2 else logits[:, None]
    if logits.ndim in (1, 2) and labels.numel() == columns.numel():
        binary = bool(((labels == 0) | (labels == 1)).all())
        if binary and columns.shape[1] > 2 and bool((labels.sum(1) == 1).all()) and len(labels) > 1:
            raise InputError(
                "every row of the labels has exactly one 1: they look like one-hot classes",
                hint="return class indices, labels.argmax(1); or --task multilabel if they are labels",
            )
        return "multilabel" if binary else "regression"
    raise InputError(
        f"outputs of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} "
        f"({labels.dtype}) fit no task",
        hint="classification: (N, C) and (N); segmentation: (N, C, H, W) and (N, H, W); tokens: "
        "(N, T, C) and (N, T); multilabel and regression: both (N, C). Or name it: --task",
    )


def _labels_are_inputs(batch: Batch, ignore_index: int) -> bool:
    """Whether labels are the input ids themselves, as transformers' causal models take them."""
    labels = batch.target
    assert labels is not None
    named = batch.inputs.values() if isinstance(batch.inputs, dict) else batch.inputs
    for value in named:
        if isinstance(value, torch.Tensor) and value.shape == labels.shape:
            kept = labels != ignore_index
            if bool(kept.any()) and bool((value[kept] == labels[kept]).all()):
                return True
    return False


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
    elif key is not None and hasattr(outputs, key):
        outputs = getattr(outputs, key)
    elif isinstance(outputs, tuple | list) and outputs:
        outputs = outputs[0]
    elif not isinstance(outputs, torch.Tensor) and hasattr(outputs, "logits"):
        outputs = outputs.logits
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
    _check_labels(labels, logits.shape[1])
    return _log_softmax(logits)


def _log_softmax(logits_RC: torch.Tensor) -> torch.Tensor:
    log_probs_RC = torch.log_softmax(logits_RC.float(), dim=1)
    if torch.isnan(log_probs_RC).any():  # of NaN, or of Inf, which is no probability either
        raise NotFiniteError("the model's output contains NaN or Inf")
    return log_probs_RC


def _check_labels(labels: torch.Tensor, classes: int, *, hint: str | None = None) -> None:
    if labels.numel() == 0:
        return
    labels = labels.long()  # torch has no minimum of unsigned integers
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"labels run from {low} to {high}, the model has classes 0 to {classes - 1}",
            hint=hint or "check the labels, and --model-arg for the number of classes",
        )


def _classification(form: Form, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return class_log_probs(logits, labels)


def _segmentation(form: Form, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if logits.ndim != 4 or labels.ndim != 3 or len(labels) != len(logits):
        raise _wrong_shapes("segmentation", "(N, C, H, W) and (N, H, W)", logits, labels)
    if logits.shape[2:] != labels.shape[1:]:  # many networks predict at a fraction of the size
        logits = torch.nn.functional.interpolate(
            logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False
        )
    logits_NPC = logits.movedim(1, -1).flatten(1, 2)
    return _log_softmax(logits_NPC[labels.flatten(1) != form.ignore_index])


def _tokens(form: Form, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise _wrong_shapes("tokens", "(N, T, C) and (N, T)", logits, labels)
    if form.shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return _log_softmax(logits[labels != form.ignore_index])


def _columnwise(form: Form, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    outputs_NC = _columns(logits)
    if outputs_NC.shape != _columns(labels).shape:
        raise _wrong_shapes(form.task, "both (N, C)", logits, labels)
    return _finite(outputs_NC, "the model's output contains NaN or Inf")


def _labels(batch: Batch) -> torch.Tensor:
    if batch.target is None:
        raise InputError("the data have no labels; every figure needs them")
    return batch.target


def _columns(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def _finite(values: torch.Tensor, otherwise: str) -> torch.Tensor:
    values = values.float()
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError(otherwise)
    return values


def _wrong_shapes(task: str, wanted: str, logits: torch.Tensor, labels: torch.Tensor) -> InputError:
    return InputError(
        f"{task} expects outputs and labels of shapes {wanted}; found {tuple(logits.shape)} and "
        f"{tuple(labels.shape)} ({labels.dtype})",
        hint="check the data target, or name another --task",
    )


_OUTPUTS: dict[str, Callable[[Form, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "classification": _classification,
    "segmentation": _segmentation,
    "tokens": _tokens,
    "multilabel": _columnwise,
    "regression": _columnwise,
}
