"""Every runtime keeps its contract, and members run as one call say what they say in a loop."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ensemblekit.batches import Batch
from ensemblekit.ensemble_module import EnsembleModule, FusedEnsemble, Head
from ensemblekit.errors import UnsupportedError, UsageError
from ensemblekit.runtimes import RUNTIMES, Session, Work, runtime, sessions, unavailable
from tests.architectures import ARCHITECTURES, Architecture, Inputs, members

torch.set_num_threads(1)

CPU = torch.device("cpu")
LOGITS = {"dict_input": "logits"}  # whose output is a dict
# of torch 2.13 on the CPU: no rule and no fallback
NOT_FUSED = {"gru": "Batching rule not implemented for aten::gru.input"}


def head(architecture: Architecture) -> Head:
    return Head(architecture.task, "mean")


def called(module: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    return made


def work(architecture: Architecture, count: int = 3, precision: str = "fp32") -> Work:
    inputs = architecture.inputs(4, 3)
    return Work(
        members(architecture, count),
        head(architecture) if count > 1 else Head(architecture.task),
        Batch(inputs, None, 4),
        CPU,
        precision,
        LOGITS.get(architecture.name),
    )


@pytest.mark.parametrize("name", RUNTIMES)
def test_contract(name: str) -> None:
    module = runtime(name)
    assert list(inspect.signature(module.unavailable).parameters) in (["device"], ["_"])
    assert list(inspect.signature(module.open_sessions).parameters) == ["work"]
    reason = unavailable(name, CPU)
    assert reason is None or (reason and "\n" not in reason)


def test_unknown() -> None:
    with pytest.raises(UsageError, match="unknown runtime 'tourch'; valid: torch, "):
        runtime("tourch")


@pytest.mark.parametrize("name", ["torch", "torch-fused", "onnxruntime"])
@pytest.mark.parametrize("count", [1, 3])
def test_sessions_say_what_members_say(name: str, count: int) -> None:
    one = work(ARCHITECTURES["mlp"], count)
    if name == "torch-fused" and count == 1:
        assert sessions(name, one) == []
        return
    opened = sessions(name, one)
    assert len(opened) == 1
    (session,) = opened
    assert isinstance(session, Session)
    assert session.runtime == name
    assert session.provider == "cpu"
    assert session.execution in ("loop", "fused", "graph")
    for size in (1, 2, 9):  # more samples than the example has
        batch = one.example.sized(size)
        loop = EnsembleModule(one.members, one.head)
        wanted = called(loop, batch.inputs).numpy()
        run = session.prepare(batch)
        got = run()
        value = got.numpy() if isinstance(got, torch.Tensor) else got.copy_outputs_to_cpu()[0]
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
        again = run()  # inputs stay in place
        repeated = (
            again.numpy() if isinstance(again, torch.Tensor) else again.copy_outputs_to_cpu()[0]
        )
        np.testing.assert_array_equal(repeated, value)
        assert session.clock(run) > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["torch", "torch-fused"])
def test_half_precisions_leave_the_members_alone(name: str, precision: str) -> None:
    one = work(ARCHITECTURES["mlp"], precision=precision)
    (session,) = sessions(name, one)
    got = session.prepare(one.example)()
    assert all(p.dtype == torch.float32 for m in one.members for p in m.parameters())
    wanted = called(EnsembleModule(one.members, one.head), one.example.inputs)
    assert 0 < float((got.float() - wanted).abs().max() / wanted.abs().max()) < 0.1


class Waits(nn.Linear):
    """Control flow on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if float(out.sum()) < 1e9 else -out


def test_what_cannot_be_fused_is_said() -> None:
    two = [Waits(5, 3).eval(), Waits(5, 3).eval()]
    batch = Batch((torch.randn(4, 5),), None, 4)
    with pytest.raises(UnsupportedError, match="these members cannot be fused: "):
        sessions("torch-fused", Work(two, Head("classification", "mean"), batch, CPU))


# torch says so of attention, which it runs one member after the other
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_is_the_loop(name: str) -> None:
    """12 networks of the kinds people train; inputs that calibrated none of them."""
    architecture = ARCHITECTURES[name]
    every, logits = members(architecture, 3), LOGITS.get(name)
    fused = FusedEnsemble(every, head(architecture), logits=logits).eval()
    loop = EnsembleModule(every, head(architecture), logits=logits).eval()
    inputs = architecture.inputs(5, 11)
    if name in NOT_FUSED:
        with pytest.raises(RuntimeError, match=NOT_FUSED[name]):
            called(fused, inputs)
        return
    wanted, got = called(loop, inputs), called(fused, inputs)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
    assert bool((got.argmax(-1) == wanted.argmax(-1)).all())


def test_fused_leaves_the_members_alone() -> None:
    every = members(ARCHITECTURES["resnet"], 2)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in every]
    fused = FusedEnsemble(every, Head("classification", "mean")).eval()
    called(fused, ARCHITECTURES["resnet"].inputs(2, 0))
    for model, state in zip(every, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad and p.device == CPU for p in model.parameters())
    assert not list(fused.parameters())  # weights are stacked, and nothing else is kept


def test_what_members_share_runs_once() -> None:
    """A frozen trunk under vmap: K members cost one trunk and K heads, in work and in memory."""
    trunk = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
    every = [nn.Sequential(trunk, nn.Linear(64, 8)).eval() for _ in range(4)]
    head_of, x = Head("classification", "mean"), torch.randn(16, 32)
    fused = FusedEnsemble([copy.deepcopy(m) for m in every], head_of).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        got = fused(x)
    assert counter.get_total_flops() == 2 * 16 * (32 * 64 + 4 * 64 * 8)
    held = sum(value.numel() for value in fused.state_dict().values())
    assert held == 32 * 64 + 64 + 4 * (64 * 8 + 8)
    torch.testing.assert_close(got, called(EnsembleModule(every, head_of), (x,)))


def test_members_that_are_all_the_same() -> None:
    every = [copy.deepcopy(m) for m in 3 * members(ARCHITECTURES["mlp"], 1)]
    fused = FusedEnsemble(every, Head("classification", "mean")).eval()
    inputs = ARCHITECTURES["mlp"].inputs(4, 0)
    wanted = called(EnsembleModule(every, Head("classification", "mean")), inputs)
    torch.testing.assert_close(called(fused, inputs), wanted)
