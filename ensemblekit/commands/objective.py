"""Owns the figure that `average` chooses by: the task's first figure of a row on validation data.

Input: snapshots, a model and data. Each row is run once.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

from ensemblekit import metrics
from ensemblekit.cache import Cache
from ensemblekit.candidates import BatchNorm, Member, Row
from ensemblekit.commands.bn_plan import frozen_layers
from ensemblekit.distributed import world
from ensemblekit.evaluation import Measure
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.scoring import Mix, score
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.workbench import Workbench

_NO_LIMIT = 1 << 62


class ValidationObjective:
    """The objective of averaging rules: see `averaging.Objective`. Close it after use."""

    def __init__(
        self,
        snapshots: SnapshotSet,
        bn: str,
        options: ModelOptions,
        progress: Progress | None = None,
    ) -> None:
        self.snapshots = snapshots
        self.options = replace(options, test_data=None)
        self.progress = progress
        self.frozen = frozen_layers(snapshots)
        self.policy: BatchNorm = "none"
        if len(snapshots.norm_layers) > len(self.frozen):
            recompute = options.train_data is not None and bn != "average"
            self.policy = "recomputed" if recompute else "averaged"
        self._known: dict[Row, float] = {}
        self._open = ExitStack()

    def value(self, row: Row) -> float:
        """The figure on validation data, higher is better."""
        if row not in self._known:
            self._known[row] = self._run(row)
        return self._known[row]

    def close(self) -> None:
        """Let go of data and models, if there are any yet."""
        self._open.close()

    @cached_property
    def _bench(self) -> Workbench:
        return Workbench(
            self.snapshots,
            self.options,
            cache=self._open.enter_context(Cache(None, _NO_LIMIT)),
            frozen=self.frozen,
            world=self._open.enter_context(world()),
            progress=self.progress,
        )

    def _run(self, row: Row) -> float:
        member = Member(row, self.policy if row.only is None else "none")
        bench, found = self._bench, None
        bench.predict([member])
        if bench.world.rank == 0:
            assert bench.form is not None
            (scores,) = score(bench.predictions([member], "val"), [Mix((0,))])
            found = Measure(metrics.OF_TASK[bench.form.task][0]).goodness(scores)
        value = bench.world.from_first(found)
        assert value is not None
        return value
