"""`bench`: every row is a real time of outputs that are right, and what fails does not stop the rest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.benchmark import Timer

import ensemblekit.commands.bench as commands
from ensemblekit import ModelOptions
from ensemblekit.commands.bench import AGREES, BenchOptions, BenchResult, Row, bench, best_rows
from ensemblekit.errors import InputError, MachineError, UsageError
from ensemblekit.latency import Effort, measure, wall_clock
from ensemblekit.runtimes import Session, Work
from ensemblekit.runtimes import sessions as real_sessions
from tests import comparing
from tests.comparing import Weights, save
from tests.exporting import Words, randomised

torch.set_num_threads(1)

SHORT = Effort(seconds=0.01, least=3, warm_up_s=0.01)
INPUT = ("x:float32[batch,5]",)
CONTRACT = {
    "candidate", "runtime", "provider", "device", "precision", "batch_size", "warmup",
    "iterations", "mean_ms", "p50_ms", "p95_ms", "p99_ms", "throughput_per_s",
    "peak_memory_bytes",
}  # fmt: skip


def plain() -> nn.Module:
    return comparing.mlp(norm=False)


def benched(
    folder: Path,
    make: Any = plain,
    weights: Sequence[Weights] | None = None,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> BenchResult:
    """`bench` of three snapshots, as quick as can be."""
    if not (folder / "ckpts").exists():
        save(folder / "ckpts", weights or randomised(make))
    return bench(
        folder / "ckpts",
        model=ModelOptions(**{"model": make(), "device": "cpu"} | (model or {})),
        options=BenchOptions(
            **{"inputs": INPUT, "runtimes": ("torch",), "batches": (1,), "effort": SHORT} | options
        ),
    )


def names(result: BenchResult) -> list[str]:
    return list(dict.fromkeys(row.candidate for row in result.rows))


def timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.latency is not None]


# ------------------------------------------------------------------------------ what works


def test_default_candidates(tmp_path: Path) -> None:
    result = benched(tmp_path, batches=(1, 8))
    assert names(result) == ["single", "average", "ensemble of 3"]
    assert [(r.candidate, r.members, r.batch_size) for r in result.rows] == [
        (name, members, size)
        for size in (1, 8)
        for name, members in (("single", 1), ("average", 1), ("ensemble of 3", 3))
    ]
    assert len(result.summary) == 2
    assert result.summary[0].startswith("batch 1: ")
    assert " x faster than ensemble of 3 (torch, fp32)" in result.summary[0]


def test_json_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    value = benched(tmp_path).to_json()
    assert value["schema_version"] == 1
    assert value.keys() >= {"measurements", "environment", "summary", "warnings", "within_latency"}
    for one in value["measurements"]:
        assert one.keys() >= CONTRACT
        assert one["throughput_per_s"] == pytest.approx(one["batch_size"] / one["p50_ms"] * 1000)
        assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"]
        assert one["iterations"] >= 3
        assert one["warmup"] >= 1
        assert (one["device"], one["provider"], one["precision"]) == ("cpu", "cpu", "fp32")
        assert one["peak_memory_bytes"] is None
    facts = value["environment"]
    assert facts.keys() >= {"torch", "python", "device", "device_name", "threads", "caches"}
    assert facts["caches"] == "warm"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_rows_say_what_the_plain_loop_says(tmp_path: Path, precision: str) -> None:
    result = benched(
        tmp_path, runtimes=("torch", "torch-fused", "onnxruntime"), batches=(1, 5),
        precisions=(precision,),
    )  # fmt: skip
    assert [r.runtime for r in result.rows if r.members == 3] == [
        "torch", "torch-fused", "onnxruntime",
    ] * 2  # fmt: skip
    assert not [r for r in result.rows if r.members == 1 and r.runtime == "torch-fused"]
    for row in result.rows:
        assert row.precision == precision
        if precision == "bf16" and row.runtime == "onnxruntime":
            assert row.error is not None  # no kernels on the CPU
            continue
        assert row.error is None
        assert row.agrees is True
        assert row.max_rel_diff is not None
        assert row.max_rel_diff <= AGREES[precision]
        if precision != "fp32":
            assert row.max_rel_diff > 0


def test_members_sweep(tmp_path: Path) -> None:
    result = benched(tmp_path, members=(1, 2, 3))
    assert names(result) == ["single", "average", "ensemble of 2", "ensemble of 3"]


def test_the_ensemble_alone(tmp_path: Path) -> None:
    result = benched(tmp_path, ensemble=True)
    assert [(r.candidate, r.members) for r in result.rows] == [("ensemble of 3", 3)]
    assert result.summary == ()


def test_one_average_alone(tmp_path: Path) -> None:
    result = benched(tmp_path, coefficients=(1.0, 2.0, 3.0))
    assert [row.members for row in result.rows] == [1]


def test_one_checkpoint(tmp_path: Path) -> None:
    result = benched(tmp_path, weights=randomised(plain, 1))
    assert [(r.candidate, r.members) for r in result.rows] == [("single", 1)]


def test_batch_norm(tmp_path: Path) -> None:
    """Averaged statistics: the time does not depend on them, and no data are asked for."""
    result = benched(tmp_path, comparing.mlp)
    assert names(result) == ["single", "average", "ensemble of 3"]
    assert all(row.agrees for row in result.rows)
    assert not [text for text in result.warnings if "statistics" in text]


def test_tokens_and_data(tmp_path: Path) -> None:
    """More samples than one batch of the data has."""
    ids = torch.randint(0, 9, (6, 7), generator=torch.Generator().manual_seed(0))
    data = [(ids, ids.sum(1) % 4)]
    result = benched(
        tmp_path, Words, model={"val_data": data}, inputs=(), batches=(16,),
        runtimes=("torch", "onnxruntime"),
    )  # fmt: skip
    assert all(row.agrees for row in result.rows)


@pytest.mark.slow
def test_torch_compile(tmp_path: Path) -> None:
    result = benched(tmp_path, ensemble=True, runtimes=("torch", "torch-compile"))
    assert [r.execution for r in result.rows if r.runtime == "torch-compile"] == ["loop", "fused"]
    assert all(row.agrees for row in result.rows)


def test_threads_are_set_and_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    result = benched(tmp_path, threads=before + 1)
    assert result.environment["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_cold_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_COLD_BYTES", 1 << 20)
    cleared: list[int] = []
    real = commands._cold

    def counting(device: torch.device) -> Callable[[], Any]:
        clear = real(device)
        return lambda: (cleared.append(1), clear())

    monkeypatch.setattr(commands, "_cold", counting)
    result = benched(tmp_path, cold=True)
    assert result.environment["caches"] == "cleared between runs"
    assert len(cleared) == sum(row.latency.iterations for row in timed(result.rows) if row.latency)


def test_the_highest_throughput_within_a_latency(tmp_path: Path) -> None:
    result = benched(tmp_path, batches=(1, 64), max_latency_ms=1e6)
    assert [(t["candidate"], t["batch_size"], t["runtime"]) for t in result.targets] == [
        (name, 64, "torch") for name in names(result)
    ]
    for target in result.targets:
        best = max(
            r.latency.throughput_per_s
            for r in result.rows
            if r.latency is not None and r.candidate == target["candidate"]
        )
        assert target["throughput_per_s"] == best
    none = benched(tmp_path, max_latency_ms=1e-9)
    assert all(t["throughput_per_s"] is t["batch_size"] is None for t in none.targets)
    assert len(none.targets) == 3


def test_the_checkpoints_models_are_left_alone(tmp_path: Path) -> None:
    model = plain()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    benched(tmp_path, model={"model": model}, precisions=("fp16",), runtimes=("torch-fused",))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ------------------------------------------------------------------------------ what fails


def changed(session: Session, prepare: Callable[..., Any]) -> Session:
    return dataclasses.replace(session, prepare=functools.partial(prepare, session.prepare))


def change(monkeypatch: pytest.MonkeyPatch, runtime: str, prepare: Callable[..., Any]) -> None:
    """Sessions of a runtime whose `prepare` is `prepare(its own, batch)`."""

    def opened(name: str, work: Work) -> list[Session]:
        found = real_sessions(name, work)
        return [changed(one, prepare) for one in found] if name == runtime else found

    monkeypatch.setattr(commands, "sessions", opened)


@pytest.mark.parametrize("wrong", [lambda v: v + v.abs().max(), lambda v: v * float("nan")])
def test_other_outputs_are_told_and_never_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], Any]
) -> None:
    def prepare(own: Any, batch: Any) -> Callable[[], Any]:
        made = wrong(own(batch)())
        return lambda: made  # at once

    change(monkeypatch, "torch-fused", prepare)
    result = benched(tmp_path, runtimes=("torch", "torch-fused"), max_latency_ms=1e6)
    (row,) = [row for row in result.rows if row.runtime == "torch-fused"]
    assert row.agrees is False
    assert row.error is None
    assert row.latency is not None
    slow = next(r for r in result.rows if r.members == 3 and r.runtime == "torch")
    assert slow.latency is not None
    assert row.latency.p50_ms < slow.latency.p50_ms
    assert best_rows(result.rows, 1)["ensemble of 3"] is slow
    assert not [text for text in result.summary if "torch-fused" in text]
    assert {target["runtime"] for target in result.targets} == {"torch"}
    assert [text for text in result.warnings if "torch-fused" in text and "outputs differ" in text]


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("\nno kernel for this\nand more"), "no kernel for this"),
        (InputError("the model has no idea"), "the model has no idea"),
        (ValueError(), "ValueError"),
    ],
    ids=["cuda", "memory", "runtime", "input", "wordless"],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_batch_size_that_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, late: bool
) -> None:
    def prepare(own: Any, batch: Any) -> Callable[[], Any]:
        def run() -> Any:
            raise error

        if batch.size == 8:
            if not late:
                raise error
            return run
        ready: Callable[[], Any] = own(batch)
        return ready

    change(monkeypatch, "torch-fused", prepare)
    result = benched(tmp_path, runtimes=("torch", "torch-fused"), batches=(1, 8, 9))
    failed = [row for row in result.rows if row.error is not None]
    assert [(r.runtime, r.batch_size, r.error) for r in failed] == [("torch-fused", 8, said)]
    assert failed[0].latency is None
    assert len(timed(result.rows)) == len(result.rows) - 1 == 11


class Branches(nn.Sequential):
    """Control flow on values: vmap has no way."""

    def __init__(self) -> None:
        super().__init__(*plain())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x)
        return out if float(out.sum()) < 1e9 else -out


def test_members_that_cannot_be_fused(tmp_path: Path) -> None:
    result = benched(tmp_path, Branches, runtimes=("torch", "torch-fused"), batches=(1, 2))
    failed = [row for row in result.rows if row.error is not None]
    assert [(r.candidate, r.runtime, r.batch_size) for r in failed] == [
        ("ensemble of 3", "torch-fused", 1), ("ensemble of 3", "torch-fused", 2),
    ]  # fmt: skip
    assert all("cannot be fused" in str(row.error) for row in failed)
    assert len(timed(result.rows)) == 6


def test_nothing_measured_is_the_machines_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(own: Any, batch: Any) -> Callable[[], Any]:
        raise MemoryError

    change(monkeypatch, "torch", prepare)
    with pytest.raises(MachineError, match="nothing could be measured: out of memory"):
        benched(tmp_path)


def test_a_runtime_without_anything_to_run(tmp_path: Path) -> None:
    """A single network has no members to fuse."""
    with pytest.raises((UsageError, MachineError), match=r"torch-fused|nothing"):
        benched(tmp_path, weights=randomised(plain, 1), runtimes=("torch-fused",))


@pytest.mark.parametrize("options", [{}, {"members": (1,)}])
def test_an_ensemble_of_one(tmp_path: Path, options: dict[str, Any]) -> None:
    count = 3 if options else 1
    try:
        result = benched(tmp_path, weights=randomised(plain, count), ensemble=True, **options)
    except UsageError:
        return
    assert [row.members for row in result.rows] == [1]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"runtimes": ("tourch",)}, "unknown runtime 'tourch'; valid: torch, "),
        ({"precisions": ("fp33",)}, "unknown precision 'fp33'"),
        ({"batches": (0,)}, "0 is no number of samples"),
        ({"batches": ()}, "at least one batch size"),
        ({"members": (4,)}, "--members 4: there are 3 checkpoints"),
        ({"ensemble": True, "coefficients": (1.0,)}, "only one of"),
        ({"threads": 0}, "threads"),
        ({"threads": -3}, "threads"),
        ({"max_latency_ms": float("nan")}, "latency"),
        ({"max_latency_ms": -1.0}, "latency"),
        ({"coefficients": (1.0, 2.0)}, "2 coefficients for 3 snapshots"),
        ({"combiner": "nope"}, "unknown combiner 'nope'"),
        ({"combiner": "stack-ridge"}, "fitted on data"),
        ({"combiner": "stack-ridge", "ensemble": True}, "fitted on data"),
        ({"combiner": "ridge"}, "ridge"),
    ],
)
def test_wrong_usage(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        benched(tmp_path, **options)


# --------------------------------------------------------------------------- a second clock


def test_the_same_as_torchs_own_timer() -> None:
    """By turns, since others work on this machine, too."""
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(768, 768), nn.ReLU())]
    model, x = nn.Sequential(*layers).eval(), torch.randn(64, 768)
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    timer = Timer("run()", globals={"run": run}, num_threads=1)
    effort = Effort(seconds=0.25, error=0.0, least=20, warm_up_s=0.1)
    try:
        ours, theirs = [], []
        for turn in range(15):
            found = measure({"model": run}, clock=wall_clock(), batch_size=64, effort=effort)
            ours.append(found["model"].p50_ms)
            theirs.append(1000 * timer.blocked_autorange(min_run_time=0.25).median)
            # Others only ever make a turn slower: the least disturbed one of each side.
            if turn >= 2 and abs(min(ours) / min(theirs) - 1) < 0.05:
                return
        pytest.fail(f"ours {ours} ms, torch's {theirs} ms")
    finally:
        torch.set_num_threads(before)
