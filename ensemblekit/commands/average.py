"""Owns `average`: from checkpoints to one verified file, with statistics that fit its weights.

Input: paths, a rule, and optionally a model and data. Without them nothing here imports torch;
with them the parts below the line are imported inside the functions that need them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit import __version__, averaging, writers
from ensemblekit.candidates import BatchNorm, Candidate, Row, mean_row
from ensemblekit.containers import read_array
from ensemblekit.discovery import discover
from ensemblekit.dtypes import narrow
from ensemblekit.errors import (
    CheckFailedError,
    IncompatibleError,
    NotFiniteError,
    UsageError,
    listing,
    one_of,
)
from ensemblekit.files import Source, check_output, sha256
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet, position
from ensemblekit.state import Similarity, materialize, weighted_sums

SAME_BASIN = 0.8  # two seeds measured 0.05 to 0.46, snapshots of one run 0.85 and more
BN_POLICIES = ("auto", "recompute", "average", "error")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

Progress = Callable[[str, int, int | None], None]
"""`progress(what, done, total)`; total is None where it is not known."""


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
        limit: At most so many samples of every data set.
        batch_size: Samples in a batch; below 128 the statistics of deeper layers suffer.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `mps`.
        precision: `fp32`, `tf32`, `bf16`, `fp16`.
        workers: Data-loading processes.
        seed: Order of the training samples.
        logits: Entry of a dict output that holds the logits.
    """

    model: Any = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    train_data: Any = None
    val_data: Any = None
    test_data: Any = None
    bn_samples: int = 50_000
    limit: int | None = None
    batch_size: int = 128
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0
    seed: int = 0
    logits: str | None = None

    def __post_init__(self) -> None:
        one_of(self.precision, PRECISIONS, what="precision")
        for name in ("bn_samples", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        data = [n for n in ("train_data", "val_data", "test_data") if getattr(self, n) is not None]
        if data and self.model is None:
            raise UsageError(
                f"--{data[0].replace('_', '-')} needs a model to run it through",
                hint="--model FILE.py:NAME",
            )


@dataclass(frozen=True)
class Evaluation:
    """Quality of one candidate on one split."""

    candidate: str
    batch_norm: str
    split: str
    samples: int
    accuracy: float
    nll: float


@dataclass(frozen=True)
class AverageResult:
    """What `average` did; `to_json` is the contract's object.

    Attributes:
        output: The file, None for a dry run or an average kept in memory.
        sha256: Of the output.
        method: The averaging rule.
        snapshots: path, step, coefficient of each, in canonical order.
        skipped: path and reason of each file left out.
        tensors: In the output.
        parameters: In the output, tied ones once.
        batch_norm: layers, policy, samples.
        evaluation: With val or test data: each snapshot and the average.
        warnings: What a user should know.
        cosines: Of each snapshot to the mean of the others.
        up_to_date: The output was there already and nothing was written.
        state: The averaged weights, when no output was asked for.
    """

    output: str | None
    sha256: str | None
    method: str
    snapshots: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    tensors: int
    parameters: int
    batch_norm: dict[str, Any]
    evaluation: tuple[Evaluation, ...] = ()
    warnings: tuple[str, ...] = ()
    cosines: tuple[float, ...] = ()
    up_to_date: bool = False
    state: dict[str, npt.NDArray[Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the weights."""
        shown = asdict(replace(self, state=None))
        shown.pop("state")
        return {"schema_version": 1, **shown}


@dataclass
class _Measured:
    """What the model had to say: statistics to write, figures, notes."""

    policy: BatchNorm
    statistics: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    samples: int = 0
    evaluation: list[Evaluation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def average(
    checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "uniform",
    rule_options: Mapping[str, Any] | None = None,
    selection: Selection | None = None,
    model: ModelOptions | None = None,
    bn: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> AverageResult:
    """Average the weights of snapshots into one model.

    Args:
        checkpoints: Files, folders, globs.
        output: The file to write; None keeps the average in memory (`result.state`).
        method: Name of an averaging rule.
        rule_options: Its options.
        selection: Which weights and which snapshots.
        model: Model and data, for BatchNorm and for figures.
        bn: `auto` recomputes BatchNorm statistics when there is training data, and keeps the
            better of recomputed and averaged ones when there is validation data; `recompute`
            insists, `average` never does, `error` refuses to leave them averaged.
        force: Replace an existing output.
        dry_run: Say what would be done.
        strict: A warning is a failed check.
        command: What to note as the command in the manifest.
        progress: Told how far the work is.

    Raises:
        UsageError: Options that do not fit, an output that exists.
        InputError: Checkpoints, model or data that cannot be used.
        MachineError: The machine said no.
        CheckFailedError: `strict` and a warning, or `bn="error"` and statistics that do not fit.
    """
    options = model or ModelOptions()
    one_of(bn, BN_POLICIES, what="--bn policy")
    paths = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    path = None if output is None else Path(output)
    if path is not None:
        writers.check_format(path)
    snapshots = discover(*paths, selection=selection)
    row = averaging.rule(method)(snapshots, **(rule_options or {}))
    warnings = list(snapshots.warnings)
    plan = _plan_bn(snapshots, row, bn, options, warnings)
    result = _described(snapshots, row, method, plan)
    inputs = [source.path for s in snapshots.snapshots for source in s.sources]
    if path is not None and not (force and dry_run):
        if not force and (done := _up_to_date(path, snapshots, row, result, bn, options)):
            return done
        check_output(path, inputs=inputs, force=force)
    if dry_run:
        return replace(result, output=output and str(output), warnings=tuple(warnings))
    if options.model is not None:
        measured = _measure(snapshots, row, plan, bn, options, progress)
    else:
        measured = _Measured("averaged" if plan.stale else "none")
    warnings += measured.warnings
    return _made(
        replace(result, batch_norm=_bn_json(plan, measured)),
        _Output(path, snapshots, row, measured, warnings, strict, force, tuple(command)),
        bn,
        options,
    )


@dataclass(frozen=True)
class _BnPlan:
    """Which normalisation layers there are, and what is to happen to them.

    Attributes:
        layers: All with running statistics.
        frozen: Those whose statistics are equal in all snapshots.
        stale: The averaged statistics will not fit the averaged weights.
        recompute: There are data to make new ones from.
    """

    layers: tuple[str, ...]
    frozen: tuple[str, ...]
    stale: bool
    recompute: bool


def _plan_bn(
    snapshots: SnapshotSet, row: Row, bn: str, options: ModelOptions, warnings: list[str]
) -> _BnPlan:
    layers = snapshots.norm_layers
    mixed = row.only is None
    frozen = tuple(name for name in layers if mixed and _frozen(snapshots, name))
    live = len(layers) - len(frozen)
    stale = mixed and live > 0
    has_data = options.model is not None and options.train_data is not None
    if bn == "recompute" and not has_data:
        raise UsageError(
            "--bn recompute needs a model and training data",
            hint="--model FILE.py:NAME --train-data FILE.py:NAME",
        )
    wanted = bn in ("auto", "recompute", "error") and has_data and live > 0
    recompute = wanted and (stale or bn == "recompute")
    if stale and not recompute and bn != "average":
        advice = (
            "add --model FILE.py:NAME --train-data FILE.py:NAME to recompute them, "
            "or --bn average to accept them"
        )
        text = (
            f"{live} BatchNorm layers keep averaged statistics, which seldom fit averaged weights"
        )
        if bn == "error":
            raise CheckFailedError(f"--bn error: {text}", hint=advice)
        warnings.append(f"{text}; {advice}")
    return _BnPlan(layers, frozen, stale, recompute)


def _frozen(snapshots: SnapshotSet, layer: str) -> bool:
    prefix = f"{layer}." if layer else ""
    for key in (f"{prefix}running_mean", f"{prefix}running_var"):
        first, *others = (read_array(s.tensors[key]).tobytes() for s in snapshots.snapshots)
        if any(other != first for other in others):
            return False
    return len(snapshots) > 1


def _described(snapshots: SnapshotSet, row: Row, method: str, plan: _BnPlan) -> AverageResult:
    used = tuple(
        {
            "path": str(snapshot.path),
            "step": position(snapshot, snapshots.ordered_by),
            "coefficient": weight,
            "weights": snapshot.variant,
        }
        for snapshot, weight in zip(snapshots.snapshots, row.weights, strict=True)
    )
    return AverageResult(
        output=None,
        sha256=None,
        method=method,
        snapshots=used,
        skipped=tuple({"path": s.name, "reason": s.reason} for s in snapshots.skipped),
        tensors=len(snapshots.first.tensors),
        parameters=snapshots.first.parameters,
        batch_norm=_bn_json(plan, None),
    )


def _bn_json(plan: _BnPlan, measured: _Measured | None) -> dict[str, Any]:
    planned = "recomputed" if plan.recompute else "averaged" if plan.stale else "none"
    return {
        "layers": len(plan.layers),
        "frozen": len(plan.frozen),
        "policy": measured.policy if measured else planned,
        "samples": measured.samples if measured else 0,
    }


# --- the file


@dataclass(frozen=True)
class _Output:
    """Everything that goes into the output file and its manifest."""

    path: Path | None
    snapshots: SnapshotSet
    row: Row
    measured: _Measured
    warnings: list[str]
    strict: bool
    force: bool
    command: tuple[str, ...]

    def fill(self, sink: Callable[[str, int, npt.NDArray[np.uint8]], None]) -> Similarity:
        """Give every tensor to `sink`; checks that need the tensors happen on the way."""
        statistics = self.measured.statistics

        def unless_replaced(key: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
            if key not in statistics:
                sink(key, offset, data)

        similarity = weighted_sums(
            self.snapshots, [self.row], [unless_replaced], replaced=frozenset(statistics)
        )
        for key, values in statistics.items():
            sink(key, 0, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        self.warnings.extend(_basin_warnings(self.snapshots, similarity))
        if self.strict and self.warnings:
            raise CheckFailedError(f"--strict: {self.warnings[0]}")
        return similarity


def _made(
    result: AverageResult, out: _Output, bn: str, options: ModelOptions
) -> AverageResult:
    similarity: list[Similarity] = []
    if out.path is None:
        first = out.snapshots.first
        state = {key: np.empty(s.shape, s.type.numpy) for key, s in first.tensors.items()}
        flat = {key: array.reshape(-1).view(np.uint8) for key, array in state.items()}

        def keep(key: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
            flat[key][offset : offset + data.size] = data

        similarity.append(out.fill(keep))
        digest = None
    else:
        state = None
        request = _request(out.snapshots, out.row, result.method, bn, options)
        digest = writers.save(
            out.path,
            out.snapshots.first.signature,
            _metadata(out.snapshots, out.row, result),
            lambda sink: similarity.append(out.fill(sink)),
            lambda digest: _manifest(result, out, digest, request),
            inputs=[source.path for s in out.snapshots.snapshots for source in s.sources],
            force=out.force,
        )
    return replace(
        result,
        output=None if out.path is None else str(out.path),
        sha256=digest,
        evaluation=tuple(out.measured.evaluation),
        warnings=tuple(out.warnings),
        cosines=similarity[0].cosines,
        state=state,
    )


def _basin_warnings(snapshots: SnapshotSet, similarity: Similarity) -> list[str]:
    found = []
    low = min(similarity.cosines)
    if low < SAME_BASIN:
        name = snapshots.snapshots[similarity.cosines.index(low)].name
        found.append(
            f"different basins: {name} has cosine {low:.2f} to the mean of the others "
            f"(one run has {SAME_BASIN} and more); their average is probably worse than each of "
            "them. Ensemble their predictions instead, or average snapshots of one run"
        )
    for name, key, ratio in similarity.outliers[:3]:
        found.append(f"{name}: '{key}' has {ratio:.2g} times the norm of its siblings")
    return found


def _metadata(snapshots: SnapshotSet, row: Row, result: AverageResult) -> dict[str, str]:
    """Facts that travel inside the file; nothing in them depends on the order of naming."""
    facts = {
        "version": __version__,
        "method": result.method,
        "snapshots": [
            {"file": s.path.name, "step": step["step"], "coefficient": step["coefficient"]}
            for s, step in zip(snapshots.snapshots, result.snapshots, strict=True)
        ],
        "batch_norm": result.batch_norm,
    }
    metadata = {"ensemblekit": json.dumps(facts)}
    if snapshots.first.ties:
        metadata["tied"] = json.dumps(snapshots.first.ties)
    return metadata


def _manifest(
    result: AverageResult, out: _Output, digest: str, request: dict[str, Any]
) -> dict[str, Any]:
    assert out.path is not None
    candidate = Candidate("average", (out.row,), (out.measured.policy,))
    shown = replace(
        result,
        output=str(out.path),
        sha256=digest,
        evaluation=tuple(out.measured.evaluation),
        warnings=tuple(out.warnings),
    )
    return {
        **shown.to_json(),
        "candidate": candidate.to_json(),
        "ordered_by": out.snapshots.ordered_by,
        "versions": {"ensemblekit": __version__, "numpy": np.__version__},
        "command": list(out.command),
        "request": request,
    }


def _request(
    snapshots: SnapshotSet, row: Row, method: str, bn: str, options: ModelOptions
) -> dict[str, Any]:
    """What determines the output: the same request over the same inputs gives the same file."""
    sources = [source for s in snapshots.snapshots for source in s.sources]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(sha256, sources))
    return {
        "inputs": [
            {"file": str(source.path), "sha256": digest}
            for source, digest in zip(sources, digests, strict=True)
        ],
        "weights": [s.variant for s in snapshots.snapshots],
        "method": method,
        "coefficients": [*row.coefficients, row.divisor],
        "bn": bn,
        "model": _options_digest(options) if options.model is not None else None,
        "version": __version__,
    }


def _options_digest(options: ModelOptions) -> str:
    """Digest of targets, of the files behind them, and of every setting."""
    from ensemblekit.targets import fingerprint

    parts = []
    for name, value in sorted(vars(options).items()):
        is_target = name in ("model", "train_data", "val_data", "test_data")
        shown = fingerprint(value) if is_target and isinstance(value, str) else repr(value)
        parts.append(f"{name}={shown}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _up_to_date(
    path: Path,
    snapshots: SnapshotSet,
    row: Row,
    result: AverageResult,
    bn: str,
    options: ModelOptions,
) -> AverageResult | None:
    """The result of the earlier identical command, if its output is still there and whole."""
    manifest = writers.read_manifest(path)
    if manifest is None or not path.is_file():
        return None
    if manifest.get("request") != json.loads(
        json.dumps(_request(snapshots, row, result.method, bn, options))
    ):
        return None
    if manifest.get("sha256") != sha256(Source(path)):
        return None
    return replace(
        result,
        output=str(path),
        sha256=manifest["sha256"],
        batch_norm=manifest["batch_norm"],
        evaluation=tuple(Evaluation(**e) for e in manifest["evaluation"]),
        warnings=tuple(manifest["warnings"]),
        up_to_date=True,
    )


# --- the model: imported only when there is one


def _measure(
    snapshots: SnapshotSet,
    row: Row,
    plan: _BnPlan,
    bn: str,
    options: ModelOptions,
    progress: Progress | None,
) -> _Measured:
    """Recompute statistics, evaluate the members and the average, choose on validation data."""
    from ensemblekit import build
    from ensemblekit.targets import load_model

    found = _Measured("averaged" if plan.stale else "none")
    model = options.model
    if isinstance(model, str):
        model = load_model(model, options.model_args)
    model = model.to(build.device_from_name(options.device))
    runner = _Runner(model, options, progress)
    for snapshot in snapshots.snapshots if runner.splits else ():
        (arrays,), _ = materialize(SnapshotSet((snapshot,)), [mean_row(1)])
        build.load_weights(model, arrays)
        found.evaluation += runner.evaluate(snapshot.name, "own")
    (arrays,), _ = materialize(snapshots, [row])
    mapping = build.load_weights(model, arrays)
    averaged = runner.evaluate("average", found.policy)
    found.evaluation += averaged
    if plan.recompute:
        statistics, samples, notes = _recomputed(runner, plan, arrays, mapping)
        recomputed = runner.evaluate("average", "recomputed")
        found.evaluation += recomputed
        found.warnings += notes
        if bn != "auto" or not _worse_on_val(recomputed, averaged):
            found.policy, found.statistics, found.samples = "recomputed", statistics, samples
    found.warnings += _quality_warnings(found)
    return found


def _recomputed(
    runner: "_Runner",
    plan: _BnPlan,
    arrays: Mapping[str, npt.NDArray[Any]],
    mapping: Mapping[str, str],
) -> tuple[dict[str, npt.NDArray[Any]], int, list[str]]:
    """Statistics by the snapshots' keys, rounded as they will be stored, and put in the model."""
    from ensemblekit import build

    outcome = runner.recompute({_model_layer(mapping, name) for name in plan.frozen})
    by_key = {own: key for key, own in mapping.items()}
    statistics = {}
    for own, values in outcome.statistics.items():
        if own not in by_key:
            raise IncompatibleError(f"the model's statistics '{own}' are not in the checkpoints")
        key = by_key[own]
        rounded = narrow(values.numpy(), arrays[key].dtype).reshape(arrays[key].shape)
        if not np.isfinite(rounded.astype(np.float64)).all():
            raise NotFiniteError(f"'{key}': the recomputed statistics do not fit its dtype")
        statistics[key] = rounded
    runner.set_buffers({mapping[key]: build.to_torch(v) for key, v in statistics.items()})
    notes = list(outcome.warnings)
    if outcome.kept:
        notes.append(
            f"{len(outcome.kept)} BatchNorm layers have the same statistics in all snapshots: "
            f"they were frozen, and are kept ({listing(outcome.kept, limit=3)})"
        )
    return statistics, outcome.samples, notes


def _model_layer(mapping: Mapping[str, str], layer: str) -> str:
    """The model's name of a normalisation layer of the snapshots."""
    prefix = f"{layer}." if layer else ""
    return mapping[f"{prefix}running_mean"].removesuffix("running_mean").removesuffix(".")


class _Runner:
    """A model on its device and the data, loaded once."""

    def __init__(self, model: Any, options: ModelOptions, progress: Progress | None) -> None:
        from ensemblekit import build

        self.model = model
        self.options = options
        self.progress = progress
        self.device = build.device_from_name(options.device)
        self.splits = {
            split: self._load(data, split)
            for split, data in (("val", options.val_data), ("test", options.test_data))
            if data is not None
        }

    def evaluate(self, candidate: str, batch_norm: str) -> list[Evaluation]:
        """Accuracy and NLL of the model as it is, on every labelled split."""
        from ensemblekit import metrics
        from ensemblekit.batches import Plan, batches
        from ensemblekit.predict import predict

        found = []
        plan = Plan(self.options.batch_size, None, self.options.limit, self.options.workers)
        for split, data in self.splits.items():
            if self.progress is not None:
                self.progress(f"evaluating {candidate} on {split}", 0, None)
            predictions = predict(
                self.model,
                batches(data, plan),
                device=self.device,
                autocast=self._autocast(),
                logits_key=self.options.logits,
            )
            found.append(
                Evaluation(
                    candidate,
                    batch_norm,
                    split,
                    len(predictions.targets_N),
                    metrics.accuracy(predictions),
                    metrics.nll(predictions),
                )
            )
        return found

    def recompute(self, frozen: set[str]) -> Any:
        """New BatchNorm statistics from the training data."""
        from ensemblekit.batches import Plan, batches, count
        from ensemblekit.batchnorm import recompute_bn

        options = self.options
        limit = min(options.bn_samples, options.limit or options.bn_samples)
        plan = Plan(options.batch_size, options.seed, limit, options.workers)
        data = self._load(options.train_data, "train")
        total = count(data, plan)

        def report(done: int) -> None:
            if self.progress is not None:
                self.progress("recomputing BatchNorm", done, total)

        return recompute_bn(
            self.model,
            batches(data, plan),
            frozen=frozen,
            device=self.device,
            autocast=self._autocast(),
            progress=report,
        )

    def set_buffers(self, values: Mapping[str, Any]) -> None:
        """Copy values into the model's buffers."""
        buffers = dict(self.model.named_buffers())
        for key, value in values.items():
            buffers[key].copy_(value)

    def _load(self, data: Any, split: str) -> Any:
        from ensemblekit.targets import load_data

        return load_data(data, split) if isinstance(data, str) else data

    def _autocast(self) -> Any:
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.precision)


def _worse_on_val(recomputed: list[Evaluation], averaged: list[Evaluation]) -> bool:
    val = [e.nll for e in (*recomputed, *averaged) if e.split == "val"]
    return len(val) == 2 and val[0] > val[1]


def _quality_warnings(found: _Measured) -> list[str]:
    """The average against its worst member, on validation data where there are any."""
    splits = [e.split for e in found.evaluation]
    if not splits:
        return []
    split = "val" if "val" in splits else "test"
    members = [e for e in found.evaluation if e.split == split and e.candidate != "average"]
    final = [
        e
        for e in found.evaluation
        if e.split == split and e.candidate == "average" and e.batch_norm == found.policy
    ]
    worst = min(members, key=lambda e: e.accuracy)
    if not final or final[0].accuracy >= worst.accuracy:
        return []
    return [
        f"the average is worse than its worst member on {split}: accuracy "
        f"{final[0].accuracy:.4f} against {worst.accuracy:.4f} ({worst.candidate}); do not ship "
        "it. Average fewer, later snapshots (--last N), or ensemble their predictions"
    ]

