"""Owns predictions as everything after the forward pass sees them: lazily read, cut, put in order.

Input: logs that `predict` has filled; `workbench` makes the objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit.rivals import Rivals
from ensemblekit.tasks import Form

_ROWS_BLOCK = 1 << 22  # elements read at once


class Picked:
    """Some rows of an array that may lie on disk; only the slices asked for are read."""

    def __init__(self, array: Any, rows: npt.NDArray[np.int64]) -> None:
        self.array = array
        self.rows = rows
        self.shape = (len(rows), *array.shape[1:])
        self.dtype = array.dtype

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self.array[self.rows[index]]
        return found

    def __len__(self) -> int:
        return len(self.rows)


Kept = npt.NDArray[Any] | Picked
"""Outputs of a member (R, C); `kept[start:stop]` gives an array."""


def true_outputs(kept: Kept, targets_R: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The entry of each row's target."""
    step = max(1, _ROWS_BLOCK // max(kept.shape[1], 1))
    parts = [
        np.take_along_axis(kept[i : i + step], targets_R[i : i + step, None], axis=1)[:, 0]
        for i in range(0, len(targets_R), step)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Predictions:
    """What members said about every row of a split.

    Attributes:
        form: What the outputs are.
        outputs: Of each member (R, C), as `Form.outputs` gives them; tokens (R, 2): log-probability
            of the true class, and whether it is the most probable. Empty for segmentation.
        rivals: For segmentation: the true class and its rivals, of all members.
        targets: One a row.
        sizes_N: Rows of each sample; None where each has one.
    """

    form: Form
    outputs: tuple[Kept, ...]
    rivals: Rivals | None
    targets: npt.NDArray[Any]
    sizes_N: npt.NDArray[np.int64] | None

    @property
    def samples(self) -> int:
        """Items of the data set."""
        return len(self.targets) if self.sizes_N is None else len(self.sizes_N)

    @property
    def members(self) -> int:
        """M."""
        return len(self.outputs) if self.rivals is None else len(self.rivals.true_MR)

    def of(self, members: Sequence[int]) -> "Predictions":
        """Some of the members, in the order given."""
        rivals = None if self.rivals is None else self.rivals.members(members)
        outputs = () if rivals is not None else tuple(self.outputs[m] for m in members)
        return replace(self, outputs=outputs, rivals=rivals)

    def part(self, mask_N: npt.NDArray[np.bool_]) -> "Predictions":
        """Some of the samples; nothing is copied before it is looked at."""
        mask_R = mask_N if self.sizes_N is None else np.repeat(mask_N, self.sizes_N)
        rows = np.nonzero(mask_R)[0]
        return Predictions(
            self.form,
            tuple(
                Picked(kept.array, kept.rows[rows])
                if isinstance(kept, Picked)
                else Picked(kept, rows)
                for kept in self.outputs
            ),
            None if self.rivals is None else self.rivals.rows(mask_R),
            self.targets[mask_R],
            None if self.sizes_N is None else self.sizes_N[mask_N],
        )
