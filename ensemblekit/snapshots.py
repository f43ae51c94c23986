"""Owns snapshots: one set of weights of one moment of a run, and the ordered set of them.

Input: tensor descriptions from `containers` and `layouts`; `discovery` makes them from paths.
"""

import glob
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ensemblekit.containers import TensorSpec
from ensemblekit.errors import IncompatibleError, InputError, listing
from ensemblekit.files import Source, sha256
from ensemblekit.layouts import Facts, Role
from ensemblekit.tables import TensorTable

Signature = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One set of weights, described; it holds no tensors.

    Attributes:
        path: The file, or the folder of a sharded checkpoint.
        name: The path as shown.
        format: Container and layout.
        variant: Which of the file's sets of weights this is.
        role: What that set is: the raw model, a moving average, a running one, unknown.
        available: All sets in the file.
        tensors: By the network's own keys.
        ties: Groups of keys that share one storage.
        facts: What the file says about itself.
        extras: Keys without tensors, which an average cannot carry.
        is_average: Already a mean over the run.
        sources: The files that hold it.
        numbers: The numbers in its name that not all others share; the order is taken from them
            when the files are silent.
        found_in: The folder argument under which it was found, None when it was named itself.
        warnings: What a user who averages such weights should know.
    """

    path: Path
    name: str
    format: str
    variant: str
    role: Role
    available: tuple[str, ...]
    tensors: Mapping[str, TensorSpec]
    ties: tuple[tuple[str, ...], ...]
    facts: Facts
    extras: tuple[str, ...]
    is_average: bool
    sources: tuple[Source, ...]
    numbers: tuple[int, ...]
    found_in: Path | None
    warnings: tuple[str, ...] = ()

    @property
    def signature(self) -> Signature:
        """Shape and dtype by key: what two snapshots must share to have an average."""
        if isinstance(self.tensors, TensorTable):
            return self.tensors.form.signature
        return {key: (spec.shape, spec.dtype) for key, spec in self.tensors.items()}

    @property
    def parameters(self) -> int:
        """Elements of all floating-point tensors but normalisation statistics, tied ones once."""
        twins = {key for group in self.ties for key in group[1:]}
        return sum(
            spec.size
            for key, spec in self.tensors.items()
            if spec.type.kind in ("float", "complex")
            and key not in twins
            and not key.endswith(("running_mean", "running_var"))
        )

    def digest(self) -> str:
        """SHA-256 of the file; of a list of names and digests when there are several files."""
        if len(self.sources) == 1:
            return sha256(self.sources[0])
        lines = sorted(f"{source.path.name}\0{sha256(source)}\n" for source in self.sources)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Skipped:
    """Something in the folder that is not averaged, and why."""

    path: Path
    name: str
    reason: str
    snapshot: Snapshot | None = None


def skipped(snapshot: Snapshot, reason: str) -> Skipped:
    """A snapshot that is left out."""
    return Skipped(snapshot.path, snapshot.name, reason, snapshot)


@dataclass(frozen=True)
class SnapshotSet:
    """Snapshots that fit together, in canonical order.

    Attributes:
        snapshots: At least one.
        skipped: What was found beside them.
        warnings: What a user should know.
        ordered_by: `step`, `epoch`, `number` (in the name) or `content`.
    """

    snapshots: tuple[Snapshot, ...]
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()
    ordered_by: str = "content"

    def __post_init__(self) -> None:
        if not self.snapshots:
            raise InputError("no snapshots", hint="name files or folders of checkpoints")
        check_same_signature(self.snapshots)

    def __len__(self) -> int:
        return len(self.snapshots)

    @property
    def first(self) -> Snapshot:
        """The snapshot whose signature and ties stand for all."""
        return self.snapshots[0]

    @cached_property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of keys that share one storage in every snapshot."""
        if not all(s.ties for s in self.snapshots):
            return ()
        homes = [{key: g for g in s.ties for key in g} for s in self.snapshots]
        groups: dict[Any, list[str]] = defaultdict(list)
        for key in self.first.tensors:
            groups[tuple(home.get(key) for home in homes)].append(key)
        return tuple(
            tuple(sorted(keys))
            for place, keys in groups.items()
            if len(keys) > 1 and None not in place
        )

    @property
    def norm_layers(self) -> tuple[str, ...]:
        """Prefixes of the layers that keep running statistics."""
        keys = self.first.tensors
        found = (k.removesuffix("running_mean") for k in keys if k.endswith("running_mean"))
        return tuple(sorted(p.removesuffix(".") for p in found if f"{p}running_var" in keys))


def position(snapshot: Snapshot, ordered_by: str) -> float | None:
    """Where in the run the snapshot stands, in the unit of the order."""
    if ordered_by == "step":
        return snapshot.facts.step
    if ordered_by == "epoch":
        return snapshot.facts.epoch
    return float(snapshot.numbers[0]) if ordered_by == "number" and snapshot.numbers else None


def check_same_signature(snapshots: Sequence[Snapshot]) -> None:
    """Raise unless all snapshots have the same keys, shapes and dtypes.

    Raises:
        IncompatibleError: Lists what differs between the first and the first that differs.
    """
    if not snapshots:
        return
    signatures = [snapshot.signature for snapshot in snapshots]
    if len({id(signature) for signature in signatures}) == 1:
        return
    groups: dict[frozenset[Any], list[Snapshot]] = defaultdict(list)
    for snapshot, signature in zip(snapshots, signatures, strict=True):
        groups[frozenset(signature.items())].append(snapshot)
    if len(groups) == 1:
        return
    common, *others = sorted(groups.values(), key=len, reverse=True)
    reference, odd = common[0], others[0][0]
    raise IncompatibleError(
        f"{odd.path} does not fit {reference.path}: {_differences(reference, odd)}",
        hint=f"average snapshots of one network; leave others out, such as --exclude '{glob.escape(odd.name)}'",
    )


def _differences(reference: Snapshot, odd: Snapshot) -> str:
    expected, found = reference.signature, odd.signature
    parts = []
    if missing := [k for k in expected if k not in found]:
        parts.append(f"{len(missing)} keys missing ({listing(missing)})")
    if unknown := [k for k in found if k not in expected]:
        parts.append(f"{len(unknown)} keys not expected ({listing(unknown)})")
    for index, what in ((0, "shape"), (1, "dtype")):
        wrong = [k for k in expected if k in found and expected[k][index] != found[k][index]]
        if wrong:
            shown = (f"'{k}' {found[k][index]} instead of {expected[k][index]}" for k in wrong)
            parts.append(f"{what} differs for {listing(shown)}")
    return "; ".join(parts)
