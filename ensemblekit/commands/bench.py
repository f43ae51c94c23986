"""Owns `bench`: latency, throughput and memory of candidates, on every runtime that was asked for.

Input: checkpoints and a model. All candidates and runtimes of one batch size take turns.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ensemblekit import environment
from ensemblekit.candidates import Candidate, mean_row, one_hot
from ensemblekit.combiners import combiner as known_combiner
from ensemblekit.commands.subject import ExportOptions, Subject, subject
from ensemblekit.discovery import discover
from ensemblekit.distributed import one_process
from ensemblekit.errors import EnsembleKitError, MachineError, UsageError, one_of
from ensemblekit.latency import Effort, Latency, measure, ratio
from ensemblekit.options import PRECISIONS, ModelOptions, Progress
from ensemblekit.runtimes import RUNTIMES, Session, Work, sessions, unavailable
from ensemblekit.runtimes.onnx_runtime import check_provider
from ensemblekit.runtimes.torch_eager import HALVES, tf32
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet

SECONDS = 0.5  # for one row, by default
AGREES = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 5e-2, "bf16": 2e-1}  # of the largest output
_COLD_BYTES = 256 << 20  # written between runs to push everything out of the caches


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        candidate: (name, comparison.json) of a candidate that `compare` measured.
        ensemble: All checkpoints as one ensemble, and nothing else.
        coefficients: One average with these weights, and nothing else.
        combiner: Of ensembles.
        members: Sizes of ensembles; all checkpoints when empty.
        runtimes: Names; all that can run here when empty.
        precisions: Of the members.
        batches: Batch sizes.
        provider: Of ONNX Runtime; follows the device when None.
        threads: Of one operator on the CPU.
        effort: How long to measure one row.
        cold: Clear caches between runs.
        max_latency_ms: Report the throughput of the largest batch within this latency.
        inputs: What `--input` says.
    """

    candidate: tuple[str, str] | None = None
    ensemble: bool = False
    coefficients: Sequence[float] | None = None
    combiner: str = "mean"
    members: Sequence[int] = ()
    runtimes: Sequence[str] = ()
    precisions: Sequence[str] = ("fp32",)
    batches: Sequence[int] = (1, 8)
    provider: str | None = None
    threads: int | None = None
    effort: Effort = field(default_factory=lambda: Effort(seconds=SECONDS))
    cold: bool = False
    max_latency_ms: float | None = None
    inputs: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.runtimes:
            one_of(name, RUNTIMES, what="runtime")
        for name in self.precisions:
            one_of(name, PRECISIONS, what="precision")
        for size in (*self.batches, *self.members):
            if size < 1:
                raise UsageError(f"{size} is no number of samples or members")
        for name in ("runtimes", "precisions", "batches", "members"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least 1")
        if self.max_latency_ms is not None and not self.max_latency_ms > 0:
            raise UsageError(f"--max-latency-ms {self.max_latency_ms:g}: must be more than 0")
        if not self.batches:
            raise UsageError("--batches: at least one batch size")
        kinds = (self.candidate is not None, self.ensemble, self.coefficients is not None)
        if sum(kinds) > 1:
            raise UsageError("only one of --candidate, --ensemble and --coefficients")


@dataclass(frozen=True)
class Row:
    """One line: a candidate on a runtime at a batch size; `latency` or `error`."""

    candidate: str
    members: int
    runtime: str
    execution: str | None
    provider: str | None
    device: str
    precision: str
    batch_size: int
    latency: Latency | None = None
    peak_memory_bytes: int | None = None
    max_rel_diff: float | None = None
    agrees: bool | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The contract's keys; None where nothing was measured."""
        found = dict(vars(self))
        latency = found.pop("latency")
        names = ("warmup", "iterations", "mean_ms", "p50_ms", "p95_ms", "p99_ms", "outliers")
        for name in names:
            found[name] = None if latency is None else getattr(latency, name)
        found["median_error"] = None if latency is None else latency.error
        found["throughput_per_s"] = None if latency is None else latency.throughput_per_s
        return found


@dataclass(frozen=True)
class BenchResult:
    """What `bench --json` prints."""

    rows: tuple[Row, ...]
    summary: tuple[str, ...]
    environment: dict[str, Any]
    warnings: tuple[str, ...]
    targets: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema_version": 1,
            "measurements": [row.to_json() for row in self.rows],
            "summary": list(self.summary),
            "within_latency": list(self.targets),
            "environment": self.environment,
            "warnings": list(self.warnings),
        }


def bench(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    model: ModelOptions,
    options: BenchOptions | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure candidates of some checkpoints.

    Args:
        checkpoints: Files, folders and globs.
        model: The model, and data or none.
        options: What to measure.
        selection: Which snapshots take part.
        progress: Told what is being done.

    Raises:
        UsageError: Options that do not fit.
        InputError: Checkpoints, model or data that cannot be used.
        MachineError: The device, or a runtime or provider that was named, is not there.
    """
    one_process("bench")
    options = options or BenchOptions()
    paths = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    snapshots = discover(*paths, selection=selection)
    subjects = _subjects(snapshots, model, options, progress)
    device = next(iter(subjects.values())).bench.device
    names = _runtimes(options, device)
    with _threads(options.threads):
        before = environment.gpu_state(device)
        rows = []
        for precision in options.precisions:
            rows += _measured(subjects, names, precision, device, options, progress)
        after = environment.gpu_state(device)
        facts = {**_environment(device, options), "gpu_before": before, "gpu_after": after}
    warnings = list(
        dict.fromkeys(w for s in subjects.values() for w in s.warnings if "keep" not in w)
    )
    disturbed = [r for r in rows if r.latency is not None and r.latency.disturbed]
    if disturbed:
        worst = max(r.latency.outliers for r in disturbed if r.latency is not None)
        warnings.append(
            f"{len(disturbed)} of {len(rows)} rows have runs far above the others (up to {worst:.0%} "
            "of a row): something else may be running on this machine"
        )
    warnings += [
        f"{row.candidate} on {row.runtime} ({row.precision}): outputs differ from the plain loop's by "
        f"{row.max_rel_diff:.1e} of the largest"
        for row in rows
        if row.agrees is False
    ]
    if after is not None and after["throttled"]:
        warnings.append("the GPU was throttled at the end: it was too hot, or had too little power")
    if all(row.latency is None for row in rows):
        if not rows:
            raise UsageError(
                f"--runtime {','.join(names)}: a single network has no members to fuse"
            )
        raise MachineError(f"nothing could be measured: {rows[0].error}")
    return BenchResult(
        tuple(rows), tuple(_summary(rows)), facts, tuple(warnings), tuple(_within(rows, options))
    )


def _subjects(
    snapshots: SnapshotSet, model: ModelOptions, options: BenchOptions, progress: Progress | None
) -> dict[str, Subject]:
    """The candidates, by name, ready to run."""
    common = ExportOptions(
        candidate=options.candidate,
        ensemble=options.ensemble,
        coefficients=options.coefficients,
        combiner=options.combiner if options.ensemble else "mean",
        inputs=options.inputs,
        bn="average",
    )
    known = known_combiner(options.combiner)
    if options.candidate is None and (known.fit is not None or options.combiner == "weighted"):
        raise UsageError(
            f"--combiner {options.combiner} has numbers that are fitted on data",
            hint="ensemblekit compare fits them; then --candidate NAME --from comparison.json",
        )
    count = len(snapshots)
    for size in options.members:
        if size > count:
            raise UsageError(f"--members {size}: there are {count} checkpoints")
    if options.candidate is not None or options.coefficients is not None:
        found = subject(snapshots, model, common, progress)
        return {found.candidate.name: found}
    wanted: dict[str, Candidate] = {}
    if not options.ensemble:
        newest = one_hot(count - 1, count)
        wanted["single"] = Candidate("single", (newest,), ("none",))
        if count > 1:
            policy: Any = "averaged" if snapshots.norm_layers else "none"
            wanted["average"] = Candidate("average", (mean_row(count),), (policy,))
    for size in options.members or ([count] if count > 1 else []):
        rows = tuple(one_hot(k, count) for k in range(size))
        if size > 1:
            wanted[f"ensemble of {size}"] = Candidate(
                f"ensemble of {size}", rows, tuple("none" for _ in rows), options.combiner
            )
    if not wanted:
        raise UsageError("--ensemble: an ensemble has two members at least")
    bare = replace(common, ensemble=False, combiner="mean")
    return {
        name: subject(snapshots, model, bare, progress, candidate=candidate)
        for name, candidate in wanted.items()
    }


def _runtimes(options: BenchOptions, device: torch.device) -> list[str]:
    """Those that were named, which must run here, or all that do."""
    if options.provider is not None:
        check_provider(options.provider)
    if device.type != "cuda" and "tf32" in options.precisions:
        raise MachineError("tf32 is a precision of GPUs")
    if options.runtimes:
        for name in options.runtimes:
            reason = unavailable(name, device)
            if reason is not None:
                raise MachineError(f"runtime '{name}' cannot run here: {reason}")
        return list(options.runtimes)
    return [name for name in RUNTIMES if unavailable(name, device) is None]


def _measured(
    subjects: Mapping[str, Subject],
    names: Sequence[str],
    precision: str,
    device: torch.device,
    options: BenchOptions,
    progress: Progress | None,
) -> list[Row]:
    """All rows of one precision: sessions are opened once, batch sizes follow each other."""
    say = progress or (lambda what, done, total: None)
    rows: list[Row] = []
    with tf32(on=precision == "tf32"):
        opened: list[tuple[str, Session]] = []
        for name, runtime in itertools.product(subjects, names):
            say(f"preparing {name} on {runtime}", 0, None)
            blank = _blank(subjects[name], name, runtime, precision, device)
            try:
                work = _work(subjects[name], precision, device, options)
                opened += [(name, session) for session in sessions(runtime, work)]
            except (EnsembleKitError, torch.OutOfMemoryError, MemoryError) as error:
                if options.runtimes and isinstance(error, MachineError):
                    raise
                rows += [replace(blank(size), error=_words(error)) for size in options.batches]
            except Exception as error:  # noqa: BLE001  # exporters and compilers raise anything
                rows += [replace(blank(size), error=_words(error)) for size in options.batches]
        for size in options.batches:
            rows += _at_size(subjects, opened, size, precision, device, options, say)
    order = list(subjects)
    rows.sort(key=lambda r: (r.batch_size, order.index(r.candidate), names.index(r.runtime)))
    return rows


def _blank(
    found: Subject, name: str, runtime: str, precision: str, device: torch.device
) -> Callable[[int], Row]:
    def row(size: int) -> Row:
        return Row(
            name, len(found.candidate.rows), runtime, None, None, str(device), precision, size
        )

    return row


def _work(found: Subject, precision: str, device: torch.device, options: BenchOptions) -> Work:
    provider = options.provider or ("cuda" if device.type == "cuda" else "cpu")
    return Work(
        found.members,
        found.head,
        found.samples.first,
        device,
        precision,
        found.bench.options.logits,
        provider,
        options.threads or torch.get_num_threads(),
    )


def _at_size(
    subjects: Mapping[str, Subject],
    opened: Sequence[tuple[str, Session]],
    size: int,
    precision: str,
    device: torch.device,
    options: BenchOptions,
    say: Callable[[str, int, int | None], None],
) -> list[Row]:
    """Every session at one batch size, in turns."""
    rows: dict[int, Row] = {}
    failures: dict[int, str] = {}
    runs: dict[int, Callable[[], Any]] = {}
    clocks = {}
    for place, (name, session) in enumerate(opened):
        found = subjects[name]
        say(f"warming up {name} on {session.runtime} at batch {size}", place, len(opened))
        row = replace(
            _blank(found, name, session.runtime, precision, device)(size),
            execution=session.execution,
            provider=session.provider,
        )
        try:
            batch = found.samples.first.sized(size)
            run = session.prepare(batch)
            peak, output = _first_run(run, session, found, device)
            difference = _difference(found.module, batch, output, device)
        except (EnsembleKitError, torch.OutOfMemoryError, MemoryError) as error:
            rows[place] = replace(row, error=_words(error))
            continue
        except Exception as error:  # noqa: BLE001  # compilers raise anything; the others go on
            rows[place] = replace(row, error=_words(error))
            continue
        runs[place] = _guarded(place, run, failures)
        clocks[place] = session.clock
        rows[place] = replace(
            row,
            peak_memory_bytes=peak,
            max_rel_diff=difference,
            agrees=difference <= AGREES[precision],
        )
    say(f"measuring at batch {size}", 0, None)
    effort = replace(options.effort, seconds=options.effort.seconds * max(1, len(runs)))
    by_run = {id(run): place for place, run in runs.items()}
    timed = measure(
        runs,
        clock=lambda run: clocks[by_run[id(run)]](run),
        batch_size=size,
        effort=effort,
        between=_cold(device) if options.cold else None,
    )
    for place, latency in timed.items():
        failed = failures.get(place)
        rows[place] = replace(
            rows[place], latency=None if failed else latency, error=failed or rows[place].error
        )
    return list(rows.values())


def _guarded(place: int, run: Callable[[], Any], failures: dict[int, str]) -> Callable[[], Any]:
    """A run whose failure, in the middle of the turns, ends its own row only."""

    def guarded() -> Any:
        if place in failures:
            return None
        try:
            return run()
        except Exception as error:  # noqa: BLE001  # out of memory at the second run, for one
            failures[place] = _words(error)

    return guarded


def _first_run(
    run: Callable[[], Any], session: Session, found: Subject, device: torch.device
) -> tuple[int | None, Any]:
    """The output, and the GPU memory of this row alone: its weights and what the run adds.

    None where torch does not see it: on a CPU, in ONNX Runtime, in a captured graph's own pool.
    """
    if device.type != "cuda" or session.runtime in ("onnxruntime", "torch-cudagraph"):
        return None, run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = run()
    torch.cuda.synchronize(device)
    added = torch.cuda.max_memory_allocated(device) - before
    size = 2 if session.precision in HALVES else 4
    weights = sum(
        size * value.numel() for member in found.members for value in member.state_dict().values()
    )
    return added + weights, output


def _difference(module: nn.Module, batch: Any, output: Any, device: torch.device) -> float:
    """Largest difference from the plain loop in float32, over its largest output."""
    from ensemblekit.batches import forward

    with tf32(on=False), torch.inference_mode():
        wanted = forward(module, batch.to(device)).float().cpu().numpy()
    if isinstance(output, torch.Tensor):
        got = output.float().cpu().numpy()
    else:  # an IO binding of ONNX Runtime
        got = np.asarray(output.copy_outputs_to_cpu()[0], np.float32)
    finite = np.isfinite(wanted) & np.isfinite(got)
    if np.isnan(wanted).any() or (np.isfinite(wanted) != np.isfinite(got)).any():
        return float("inf")
    largest = np.abs(wanted[finite]).max(initial=0.0)
    return float(np.abs(wanted[finite] - got[finite]).max(initial=0.0) / max(float(largest), 1e-30))


def _cold(device: torch.device) -> Callable[[], Any]:
    filler = torch.zeros(_COLD_BYTES // 4, device=device)
    return filler.zero_


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment(device: torch.device, options: BenchOptions) -> dict[str, Any]:
    return {
        **environment.block(),
        "device": str(device),
        "device_name": environment.device_name(device),
        "threads": torch.get_num_threads(),
        "caches": "cleared between runs" if options.cold else "warm",
        "timed": "from the call until the output is there; inputs and outputs stay on the device",
    }


def _words(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    text = error.message if isinstance(error, EnsembleKitError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def best_rows(rows: Sequence[Row], size: int) -> dict[str, Row]:
    """The fastest row of each candidate at a batch size that agrees with the plain loop."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.latency is None or row.batch_size != size or not row.agrees:
            continue
        known = found.get(row.candidate)
        if known is None or known.latency is None or row.latency.p50_ms < known.latency.p50_ms:
            found[row.candidate] = row
    return found


def _summary(rows: Sequence[Row]) -> list[str]:
    """How the candidates compare at each batch size, each in its fastest way."""
    words = []
    for size in dict.fromkeys(row.batch_size for row in rows):
        best = sorted(
            best_rows(rows, size).values(), key=lambda r: r.latency.p50_ms if r.latency else 0
        )
        if len(best) < 2:
            continue
        first, *others = best
        assert first.latency is not None
        lines = [f"batch {size}: {first.candidate} ({_how(first)}) is"]
        for row in others:
            assert row.latency is not None
            times, error = ratio(row.latency, first.latency)
            lines.append(
                f"  {times:.2f} +- {2 * error:.2f} x faster than {row.candidate} ({_how(row)})"
            )
        words.append("\n".join(lines))
    return words


def _how(row: Row) -> str:
    execution = "" if row.execution in (None, "graph", "loop") else f", {row.execution}"
    return f"{row.runtime}{execution}, {row.precision}"


def _within(rows: Sequence[Row], options: BenchOptions) -> list[dict[str, Any]]:
    """The highest throughput of each candidate whose p95 keeps the latency target."""
    limit = options.max_latency_ms
    if limit is None:
        return []
    found = []
    for name in dict.fromkeys(row.candidate for row in rows):
        fit = [
            row
            for row in rows
            if row.candidate == name
            and row.latency is not None
            and row.agrees
            and row.latency.p95_ms <= limit
        ]
        best = max(fit, key=lambda r: r.latency.throughput_per_s if r.latency else 0, default=None)
        found.append(
            {
                "candidate": name,
                "max_latency_ms": limit,
                "batch_size": None if best is None else best.batch_size,
                "runtime": None if best is None else best.runtime,
                "throughput_per_s": None
                if best is None or best.latency is None
                else best.latency.throughput_per_s,
            }
        )
    return found
