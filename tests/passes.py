"""How the tests run a pass: models that are ready, batches, and logs in a folder of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ensemblekit.batches import Batch
from ensemblekit.cache import Log
from ensemblekit.predict import Keep, Seen, run_pass
from ensemblekit.tasks import Form


def passed(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    form: Form,
    *,
    device: str = "cpu",
    **options: Any,
) -> tuple[list[torch.Tensor], Seen]:
    """What every model says about every row, and what the walk saw."""
    keep = Keep(form, "float32", jointly=False)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs = [Log(folder / str(m)) for m in range(len(models))]
        for log in logs:
            stack.callback(log.close)
        seen = run_pass(
            logs,
            lambda m, _: models[m],
            1,
            batches,
            keep,
            device=torch.device(device),
            **options,
        )
        assert seen is not None
        assert all(log.complete for log in logs)
        outputs = [torch.from_numpy(np.array(log.rows("float32", keep.width))) for log in logs]
    return outputs, seen


def log_probs(
    model: nn.Module, batches: Iterable[Batch], *, classes: int = 3, **options: Any
) -> torch.Tensor:
    """Log-probabilities (samples, classes) of one classifier."""
    key = options.pop("logits_key", None)
    form = Form("classification", classes, logits_key=key)
    ((found,), _) = passed([model], batches, form, **options)
    return found
