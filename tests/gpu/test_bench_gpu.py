"""Runtimes and the stopwatch on a GPU; skipped without CUDA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ensemblekit.batches import as_batch
from ensemblekit.ensemble_module import EnsembleModule, Head, StreamedEnsemble
from ensemblekit.latency import Effort, cuda_clock, measure
from ensemblekit.runtimes import RUNTIMES, Work, sessions, unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def members(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    first = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 196, 8)
    )
    found = []
    for _ in range(count):
        model = copy.deepcopy(first)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        found.append(model.cuda().eval())
    return found


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", [name for name in RUNTIMES if name != "onnxruntime"])
def test_runtimes_agree_with_the_loop(name: str, precision: str) -> None:
    device = torch.device("cuda")
    if (reason := unavailable(name, device)) is not None:
        pytest.skip(reason)
    ensemble, head = members(3), Head("classification", "mean")
    batch = as_batch((torch.randn(5, 3, 16, 16), torch.zeros(5)))
    with torch.inference_mode():
        wanted = EnsembleModule(ensemble, head)(batch.inputs[0].cuda())
    for session in sessions(name, Work(ensemble, head, batch, device, precision)):
        got = session.prepare(batch)()
        torch.cuda.synchronize()
        error = (got.float() - wanted).abs().max() / wanted.abs().max()
        assert error < {"fp32": 1e-4, "tf32": 1e-2}.get(precision, 5e-2)


def test_a_graph_is_captured_for_its_own_inputs() -> None:
    ensemble, head = members(2), Head("classification", "mean")
    work = Work(
        ensemble, head, as_batch((torch.randn(4, 3, 16, 16), torch.zeros(4))), torch.device("cuda")
    )
    for session in sessions("torch-cudagraph", work):
        for seed in (1, 2):
            torch.manual_seed(seed)
            batch = as_batch((torch.randn(4, 3, 16, 16), torch.zeros(4)))
            with torch.inference_mode():
                wanted = EnsembleModule(ensemble, head)(batch.inputs[0].cuda())
            got = session.prepare(batch)()
            torch.cuda.synchronize()
            assert torch.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("delay_ms", [0.5, 2.0, 10.0])
def test_a_kernel_of_known_length_is_measured(delay_ms: float) -> None:
    """The GPU's own clock tells how many cycles a millisecond has."""
    device = torch.device("cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    torch.cuda.synchronize()
    start.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    torch.cuda.synchronize()
    cycles = int(100_000_000 / start.elapsed_time(end) * delay_ms)
    effort = Effort(seconds=1.0, least=20, error=0.0)
    found = measure(
        {"sleep": lambda: torch.cuda._sleep(cycles)},
        clock=cuda_clock(device),
        batch_size=1,
        effort=effort,
    )
    assert found["sleep"].p50_ms == pytest.approx(delay_ms, rel=0.03)


def test_against_tritons_benchmark() -> None:
    testing = pytest.importorskip("triton.testing")
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).cuda().eval()
    x = torch.randn(32, 64, 64, 64, device="cuda")

    def run() -> object:
        with torch.inference_mode():
            return model(x)

    ours = measure({"model": run}, clock=cuda_clock(torch.device("cuda")), batch_size=32)
    theirs = testing.do_bench(run, return_mode="median")
    assert ours["model"].p50_ms == pytest.approx(theirs, rel=0.05)


def test_members_on_streams_are_the_loop() -> None:
    ensemble, head = members(4), Head("classification", "mean")
    streamed, loop = StreamedEnsemble(ensemble, head), EnsembleModule(ensemble, head)
    with torch.inference_mode():
        for seed in range(20):  # memory is reused from run to run
            torch.manual_seed(seed)
            x = torch.randn(8, 3, 16, 16, device="cuda")
            torch.testing.assert_close(streamed(x), loop(x))
