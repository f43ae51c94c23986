"""Owns a candidate as one `nn.Module`: M members and how their outputs become one.

Input: members in eval mode, a task and a combiner. Everything that is exported is compared with
this module; it runs its members one after the other, in plain torch.

Legend of shapes: M members, N samples, C classes, labels or values; `...` are positions of dense
tasks, in the place where the model has them.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ensemblekit import combiners
from ensemblekit.build import plain_attention
from ensemblekit.errors import UsageError, one_of
from ensemblekit.tasks import logits_of

OUTPUT_KINDS = ("logits", "probabilities")
_OF_CLASSES = ("classification", "segmentation", "tokens")


@dataclass(frozen=True)
class Head:
    """What happens to the outputs of M members.

    Attributes:
        task: One of `tasks.TASKS`.
        combiner: One of `combiners.COMBINERS`; None where there is one member.
        params: The combiner's fitted numbers.
        kind: `logits` or `probabilities`. The logits of an ensemble are log-probabilities (of
            labels: log-odds), so that softmax (sigmoid) gives its probabilities, as with one model.

    Raises:
        UsageError: No such kind, or probabilities of outputs that have none.
    """

    task: str
    combiner: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "logits"

    def __post_init__(self) -> None:
        one_of(self.kind, OUTPUT_KINDS, what="--output-kind")
        if self.combiner is not None:
            tasks = combiners.combiner(self.combiner).tasks
            if self.task not in tasks:
                raise UsageError(
                    f"the combiner '{self.combiner}' is none for {self.task}; it is for "
                    f"{', '.join(tasks)}",
                    hint="--combiner mean",
                )
        if self.kind == "logits":
            return
        if self.task == "regression":
            raise UsageError("--output-kind probabilities: a regression has none")
        if self.combiner is not None and not combiners.combiner(self.combiner).likelihood:
            raise UsageError(
                f"--output-kind probabilities: the combiner '{self.combiner}' gives scores, not "
                "probabilities"
            )

    @property
    def output_name(self) -> str:
        """The name of the output: what it means."""
        return "output" if self.task == "regression" else self.kind

    @property
    def plain(self) -> bool:
        """Whether a single member's output is the output."""
        return self.combiner is None and self.kind == "logits"

    @property
    def class_axis(self) -> int:
        """The axis of classes in an output of one member."""
        return -1 if self.task == "tokens" else 1

    def __call__(self, logits_MNC: torch.Tensor) -> torch.Tensor:
        """One output (N, C, ...) of the members' raw outputs (M, N, C, ...)."""
        if self.combiner is None:
            made = logits_MNC[0]
        else:
            outputs = logits_MNC
            if self.task in _OF_CLASSES:
                axis = self.class_axis if self.class_axis < 0 else self.class_axis + 1
                outputs = torch.log_softmax(logits_MNC, dim=axis)
            made = combiners.combine(self.combiner, outputs, self.params, self.task)
        if self.kind == "logits":
            return made
        if self.task == "multilabel":
            return torch.sigmoid(made)
        return torch.softmax(made, dim=self.class_axis)


class EnsembleModule(nn.Module):
    """M members and a head as one module; takes what one member takes.

    Args:
        members: In eval mode.
        head: How their outputs become one.
        logits: Entry of a dict output that holds the logits.
    """

    def __init__(
        self, members: Sequence[nn.Module], head: Head, *, logits: str | None = None
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.head = head
        self.logits = logits

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The combined output (N, C, ...)."""
        outputs = [logits_of(member(*args, **kwargs), self.logits) for member in self.members]
        if self.head.plain:
            return outputs[0]
        return self.head(torch.stack(outputs))


class StreamedEnsemble(EnsembleModule):
    """The loop with each member on a CUDA stream of its own, so that small kernels overlap."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The combined output (N, C, ...)."""
        here = torch.cuda.current_stream()
        outputs = []
        for member, stream in zip(self.members, self._streams(here.device), strict=True):
            stream.wait_stream(here)  # the inputs are there
            with torch.cuda.stream(stream):
                outputs.append(logits_of(member(*args, **kwargs), self.logits))
        for output, stream in zip(outputs, self._streams(here.device), strict=True):
            here.wait_stream(stream)
            output.record_stream(here)  # its memory is not given away while we read it
        return outputs[0] if self.head.plain else self.head(torch.stack(outputs))

    def _streams(self, device: torch.device) -> list[torch.cuda.Stream]:
        known: dict[torch.device, list[torch.cuda.Stream]] = self.__dict__.setdefault("_made", {})
        if device not in known:
            known[device] = [torch.cuda.Stream(device) for _ in self.members]  # type: ignore[no-untyped-call]
        return known[device]


class FusedEnsemble(nn.Module):
    """M members of one architecture as one call: weights stacked, `torch.func.vmap` over them.

    What is bitwise equal in all members, such as a frozen trunk, is kept once, and what depends on
    nothing else runs once.

    Args:
        members: In eval mode, with equal shapes.
        head: How their outputs become one.
        logits: Entry of a dict output that holds the logits.
    """

    def __init__(
        self, members: Sequence[nn.Module], head: Head, *, logits: str | None = None
    ) -> None:
        super().__init__()
        self.head = head
        self.logits = logits
        states = [dict([*m.named_parameters(), *m.named_buffers()]) for m in members]
        self._axes: dict[str, int | None] = {}
        for place, name in enumerate(states[0]):  # names with dots are no names of buffers
            values = [state[name].detach() for state in states]
            shared = all(torch.equal(value, values[0]) for value in values)
            self._axes[name] = None if shared else 0
            self.register_buffer(f"held_{place}", values[0] if shared else torch.stack(values))
        self._count = len(members)
        # `.to("meta")` would untie what is tied; in a list: no part of the state
        bare: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False)
            for p in members[0].parameters()
        }
        bare |= {id(b): b.detach().to("meta") for b in members[0].buffers()}
        self._skeleton = [copy.deepcopy(members[0], bare)]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The combined output (N, C, ...)."""
        held = {name: getattr(self, f"held_{n}") for n, name in enumerate(self._axes)}

        def one(state: dict[str, torch.Tensor]) -> torch.Tensor:
            made = torch.func.functional_call(self._skeleton[0], state, args, kwargs)
            return logits_of(made, self.logits)

        # vmap has no rule for torch's fused attention layer; a compiler takes it apart itself
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else plain_attention():
            if 0 in self._axes.values():
                over = torch.func.vmap(one, in_dims=(self._axes,), randomness="same")
                outputs_MNC = over(held)
            else:  # all members are the same one
                output = one(held)
                outputs_MNC = output.expand(self._count, *output.shape)
        return outputs_MNC[0] if self.head.plain else self.head(outputs_MNC)


class OneOutput(nn.Module):
    """A model whose only output is its logits, with the forward's own parameter names gone.

    Args:
        model: Any model.
        logits: Entry of a dict output that holds the logits.
        names: Names of the inputs, in order, where they are keywords of the model; None where
            they are positional.
    """

    def __init__(
        self, model: nn.Module, *, logits: str | None = None, names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.logits = logits
        self.names = None if names is None else tuple(names)

    def forward(self, *args: Any) -> torch.Tensor:
        """The logits alone."""
        if self.names is None:
            return logits_of(self.model(*args), self.logits)
        return logits_of(self.model(**dict(zip(self.names, args, strict=True))), self.logits)


class HeadModule(nn.Module):
    """A head as a module, so that it can be exported like any other."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """One output of the members' raw outputs (M, N, C, ...)."""
        return self.head(args[0])
