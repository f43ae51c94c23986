"""The fastest way to run an ensemble in torch: right, and never worse than the loop by choice."""

from __future__ import annotations

import pytest
import torch

from ensemblekit import EnsembleModule, FusedEnsemble, Head, fastest
from ensemblekit.latency import Effort, Latency
from ensemblekit.runtimes import choosing, unavailable
from tests.architectures import ARCHITECTURES, members

SHORT = Effort(seconds=0.1, least=3, warm_up_s=0.05)


@pytest.mark.parametrize("name", ["mlp", "resnet", "gru", "dict_input"])
def test_it_gives_what_the_loop_gives(name: str) -> None:
    architecture = ARCHITECTURES[name]
    ensemble, head = members(architecture, 3), Head(architecture.task, "mean")
    given = architecture.inputs(4, 1)
    loop = EnsembleModule(ensemble, head).eval()
    with torch.inference_mode():
        if isinstance(given, dict):
            made, wanted = fastest(ensemble, head, effort=SHORT, **given), loop(**given)
            got = made(**given)
        else:
            made, wanted = fastest(ensemble, head, *given, effort=SHORT), loop(*given)
            got = made(*given)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    if name == "gru":  # vmap has no rule for it
        assert isinstance(made, EnsembleModule)


@pytest.mark.parametrize("fused_ms, kind", [(0.5, FusedEnsemble), (0.99, EnsembleModule)])
def test_the_loop_is_left_for_a_real_gain_only(
    monkeypatch: pytest.MonkeyPatch, fused_ms: float, kind: type
) -> None:
    def measure(runs: dict[int, object], **_: object) -> dict[int, Latency]:
        times = {0: 1.0, 1: fused_ms}  # the loop comes first
        return {n: Latency(1, 1, 9, times[n], times[n], times[n], times[n], 0.0, 0.0) for n in runs}

    monkeypatch.setattr(choosing, "measure", measure)
    architecture = ARCHITECTURES["mlp"]
    made = fastest(
        members(architecture, 2), Head("classification", "mean"), *architecture.inputs(2, 0)
    )
    assert type(made) is kind


@pytest.mark.skipif(unavailable("torch-compile", torch.device("cpu")) is not None, reason="no C++")
def test_compiled_ways_take_part() -> None:
    architecture = ARCHITECTURES["mlp"]
    ensemble, head = members(architecture, 3), Head("classification", "mean")
    given = architecture.inputs(4, 1)
    seen: list[int] = []

    def measure(runs: dict[int, object], **_: object) -> dict[int, Latency]:
        seen.extend(runs)
        times = [1.0, 0.9, 0.8, 0.3]  # the loop, fused, and both compiled
        return {n: Latency(1, 1, 9, times[n], times[n], times[n], times[n], 0.0, 0.0) for n in runs}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "measure", measure)
        made = fastest(ensemble, head, *given, compiled=True)
    assert seen == [0, 1, 2, 3]
    assert not isinstance(made, FusedEnsemble)  # but what the compiler made of it
    with torch.inference_mode():
        wanted = EnsembleModule(ensemble, head).eval()(*given)
        torch.testing.assert_close(made(*given), wanted, rtol=1e-4, atol=1e-4)


def test_a_single_member_is_its_own_loop() -> None:
    architecture = ARCHITECTURES["mlp"]
    made = fastest(members(architecture, 1), Head("classification"), *architecture.inputs(2, 0))
    assert isinstance(made, EnsembleModule)


def test_a_fused_module_that_is_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(FusedEnsemble):
        def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            return super().forward(*args, **kwargs) + 1

    monkeypatch.setattr(choosing, "FusedEnsemble", Wrong)
    architecture = ARCHITECTURES["mlp"]
    made = fastest(
        members(architecture, 2), Head("classification", "mean"), *architecture.inputs(2, 0)
    )
    assert isinstance(made, EnsembleModule)
