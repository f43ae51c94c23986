"""The networks that exports are tested with: members differ, and none of them is trivial."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.architectures import ARCHITECTURES, CLASSES, VOCABULARY, Inputs, logits, members

torch.set_num_threads(1)
each = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.cache
def made(name: str, *, frozen: bool = False) -> Sequence[nn.Module]:
    return tuple(members(ARCHITECTURES[name], 3, frozen=frozen))


def states(name: str, *, frozen: bool = False) -> list[dict[str, torch.Tensor]]:
    return [model.state_dict() for model in made(name, frozen=frozen)]


def is_head(name: str, key: str) -> bool:
    return key.startswith(ARCHITECTURES[name].head_prefixes)


def predicted(model: nn.Module, inputs: Inputs) -> set[int]:
    return set(logits(model, inputs).argmax(-1).flatten().tolist())


def row(inputs: Inputs, index: int) -> Inputs:
    part = slice(index, index + 1)
    if isinstance(inputs, dict):
        return {key: value[part] for key, value in inputs.items()}
    return tuple(value[part] for value in inputs)


def test_there_are_twelve() -> None:
    assert set(ARCHITECTURES) == {
        *("resnet", "preact_resnet", "vgg", "densenet", "mobilenet", "convnext", "vit", "gpt"),
        *("gru", "mlp", "multi_input", "dict_input"),
    }


@each
def test_small_and_of_the_right_shape(name: str) -> None:
    one = ARCHITECTURES[name]
    assert one.name == name
    assert sum(p.numel() for p in one.build().parameters()) < 300_000
    said = logits(made(name)[0], one.inputs(3, 1))
    assert said.dtype == torch.float32
    if one.task == "tokens":
        assert said.shape == (3, 12, VOCABULARY)
    else:
        assert said.shape == (3, CLASSES)


@each
@pytest.mark.parametrize("frozen", [False, True])
def test_members_predict_many_classes(name: str, frozen: bool) -> None:
    for seed in (0, 5):
        inputs = ARCHITECTURES[name].inputs(64, seed)
        for model in made(name, frozen=frozen):
            assert not any(module.training for module in model.modules())
            assert len(predicted(model, inputs)) >= 5
            assert 1 < float(logits(model, inputs).std()) < 8


@each
def test_their_mean_predicts_many_classes(name: str) -> None:
    model = ARCHITECTURES[name].build().eval()
    every = states(name)
    model.load_state_dict(
        {
            key: torch.stack([state[key] for state in every]).mean(0)
            if value.is_floating_point()
            else value
            for key, value in every[0].items()
        }
    )
    assert len(predicted(model, ARCHITECTURES[name].inputs(64, 0))) >= 5


@each
def test_members_are_neighbours(name: str) -> None:
    """Every parameter and statistic differs, by little; constants and integers do not."""
    one, other, _ = states(name)
    statistics = ("running_mean", "running_var")
    learned = dict(made(name)[0].named_parameters(remove_duplicate=False))
    heads = ARCHITECTURES[name].head_prefixes[-1]
    for key, value in one.items():
        if key not in learned and not key.endswith(statistics):
            assert torch.equal(value, other[key]), key
            continue
        assert value.is_floating_point()
        assert not torch.equal(value, other[key]), key
        if not key.startswith(heads) and not key.endswith("running_mean"):
            # heads are centred in each member; means move by a share of the spread
            far = float((value - other[key]).norm() / value.norm())
            assert 0.02 < far < 0.3, (key, far)
        assert not key.endswith("running_var") or float(value.min()) > 0
    first, second = (logits(m, ARCHITECTURES[name].inputs(64, 0)) for m in made(name)[:2])
    assert float((first - second).abs().max()) > 0.1


@each
def test_nothing_is_trivial(name: str) -> None:
    """What folding and fusing must get right: no scale of one, no mean of zero, no tensor of zeros."""
    model = made(name)[0]
    for key, value in model.named_parameters():
        assert float(value.detach().square().mean()) > 1e-3, key
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert float(module.weight.detach().min()) >= 0.2
            assert float(module.running_mean.abs().max()) > 0.01
            assert float((module.running_var - 1).abs().max()) > 0.05


@each
def test_frozen_trunks_are_the_same(name: str) -> None:
    one, *others = states(name, frozen=True)
    heads = [key for key in one if is_head(name, key)]
    assert 0 < len(heads) < len(one)
    for prefix in ARCHITECTURES[name].head_prefixes:
        assert any(key.startswith(prefix) for key in heads), prefix
    for other in others:
        for key, value in one.items():
            if not is_head(name, key):
                assert torch.equal(value, other[key]), key
            elif "num_batches" not in key:
                assert not torch.equal(value, other[key]), key


def test_tied_weights_stay_tied() -> None:
    for frozen in (False, True):
        for model in made("gpt", frozen=frozen):
            assert model.get_parameter("lm_head.weight") is model.get_parameter("wte.weight")


def test_the_language_model_is_causal() -> None:
    inputs = ARCHITECTURES["gpt"].inputs(4, 0)
    assert isinstance(inputs, tuple)
    (ids,) = inputs
    later = ids.clone()
    later[:, 7:] = (later[:, 7:] + 1) % VOCABULARY
    one, other = (logits(made("gpt")[0], (given,)) for given in (ids, later))
    torch.testing.assert_close(one[:, :7], other[:, :7], rtol=0, atol=1e-5)
    assert float((one[:, 7:] - other[:, 7:]).abs().max()) > 0.1


def test_padding_does_not_count() -> None:
    inputs = ARCHITECTURES["dict_input"].inputs(8, 0)
    assert isinstance(inputs, dict)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert 0 < int(mask.sum()) < mask.numel()
    model = made("dict_input")[0]
    noise: dict[str, Any] = {"input_ids": torch.where(mask > 0, ids, 17), "attention_mask": mask}
    torch.testing.assert_close(logits(model, inputs), logits(model, noise), rtol=0, atol=1e-5)


@each
def test_evaluation_is_deterministic(name: str) -> None:
    inputs = ARCHITECTURES[name].inputs(7, 3)
    model = made(name)[0]
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    again = members(ARCHITECTURES[name], 1)[0]
    assert torch.equal(logits(model, inputs), logits(again, ARCHITECTURES[name].inputs(7, 3)))


@each
def test_rows_are_independent(name: str) -> None:
    inputs = ARCHITECTURES[name].inputs(7, 3)
    for model in made(name):
        alone = torch.cat([logits(model, row(inputs, index)) for index in range(7)])
        torch.testing.assert_close(logits(model, inputs), alone, rtol=1e-5, atol=1e-5)
