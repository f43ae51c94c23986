"""Owns the options around a model and its data, shared by the commands that run one.

Input: flags, or a Python caller's objects.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ensemblekit.errors import UsageError, one_of

Progress = Callable[[str, int, int | None], None]
"""`progress(what, done, total)`; total is None where it is not known."""

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class ModelOptions:
    """The model, the data, and how to run them; targets or Python objects.

    Attributes:
        model: A target such as `train.py:Net`, or an `nn.Module`.
        model_args: Arguments of the model target.
        train_data: What BatchNorm statistics are recomputed on, with the training's augmentation.
        val_data: What choices are made on.
        test_data: What is only reported.
        bn_samples: At most so many training samples.
        bn_layerwise: BatchNorm statistics one layer after the other: exact, and slow.
        channels_last: Recompute them with convolutions in that memory format.
        limit: At most so many samples of every data set.
        batch_size: Samples in a batch; below 128 the statistics of deeper layers suffer.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `mps`.
        precision: `fp32`, `tf32`, `bf16`, `fp16`.
        workers: Data-loading processes.
        seed: Order of the training samples.
        logits: Entry of a dict output that holds the logits.
        task: What outputs and labels are; `auto` looks at the first batch.
        ignore_index: Label of pixels or tokens that do not count.
    """

    model: Any = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    train_data: Any = None
    val_data: Any = None
    test_data: Any = None
    bn_samples: int = 50_000
    bn_layerwise: bool = False
    channels_last: bool = False
    limit: int | None = None
    batch_size: int = 128
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0
    seed: int = 0
    logits: str | None = None
    task: str = "auto"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        one_of(self.precision, PRECISIONS, what="precision")
        least = {"bn_samples": 1, "limit": 1, "batch_size": 1, "workers": 0, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {bound}")

    def with_model_from(self, hints: Sequence[str | None]) -> "ModelOptions":
        """These options; without a model but with data, the model that the checkpoints name.

        Args:
            hints: What each snapshot says its model is.

        Raises:
            UsageError: There are data, and neither the user nor the checkpoints name a model.
        """
        data = [n for n in ("train_data", "val_data", "test_data") if getattr(self, n) is not None]
        if self.model is not None or not data:
            return self
        named = {hint for hint in hints if hint and hint.startswith(("timm:", "torchvision:"))}
        if len(named) == 1:
            return replace(self, model=named.pop())
        raise UsageError(
            f"--{data[0].replace('_', '-')} needs a model to run it through",
            hint="--model FILE.py:NAME",
        )
