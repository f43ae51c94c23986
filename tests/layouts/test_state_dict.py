"""Bare state dicts: own keys under every wrapper, ties, extras, element types."""

from __future__ import annotations

from collections import OrderedDict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ensemblekit.layouts.tensors import own_keys

from ..checkpoints import State, assert_same_tensors, reading_of, save, state

WRAPPERS = ["", "module.", "_orig_mod."]
PREFIXES = ["".join(parts) for depth in range(4) for parts in product(WRAPPERS[1:], repeat=depth)]


def prefixed(tensors: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapper_prefixes(prefix: str, tmp_path: Path) -> None:
    reading = reading_of(save(prefixed(state(), prefix), tmp_path / "file.pt"))
    assert reading.layout == "state-dict"
    assert list(reading.weights) == ["model"]
    assert_same_tensors(reading.weights["model"].tensors, state())


@pytest.mark.parametrize("prefix", PREFIXES[1:7])
def test_wrapper_prefixes_below_a_key(prefix: str, tmp_path: Path) -> None:
    reading = reading_of(save({"model": prefixed(state(), prefix)}, tmp_path / "file.pt"))
    assert_same_tensors(reading.weights["model"].tensors, state())


KEYS: dict[str, tuple[list[str], list[str]]] = {
    "compiled-part": (["net._orig_mod.fc.weight", "head.bias"], ["net.fc.weight", "head.bias"]),
    "compiled-parts": (["a._orig_mod.w", "b._orig_mod.w"], ["a.w", "b.w"]),
    "fsdp": (["_fsdp_wrapped_module.a._fsdp_wrapped_module.w"], ["a.w"]),
    "checkpointed": (["a._checkpoint_wrapped_module.w", "b.w"], ["a.w", "b.w"]),
    "own-prefix-stays": (["model.a.w", "model.b.w"], ["model.a.w", "model.b.w"]),
    "net-stays": (["net.a", "net.b"], ["net.a", "net.b"]),
    "own-module-attribute": (["module.a.w", "head.w"], ["module.a.w", "head.w"]),
    "own-name-below": (["module.net.module.w"], ["net.module.w"]),
    "name-is-module": (["module"], ["module"]),
    "clash": (["a._orig_mod.w", "a.w"], ["a._orig_mod.w", "a.w"]),
    "counter": (["n_averaged", "module.w"], ["w"]),
    "counter-and-wrapper": (["n_averaged", "module.module.w"], ["w"]),
    "counter-of-ones-own": (["n_averaged", "w"], ["n_averaged", "w"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_own_keys(name: str) -> None:
    keys, expected = KEYS[name]
    assert list(own_keys(keys).values()) == expected


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_averaged_model_inside_of_a_wrapper(prefix: str) -> None:
    """The counter is looked for before the wrappers are off."""
    assert list(own_keys([f"{prefix}n_averaged", f"{prefix}module.fc.w"]).values()) == ["fc.w"]


NAMES = st.lists(st.sampled_from(["a", "b", "conv", "0", "module", "net", "weight"]), min_size=1)


@given(st.lists(NAMES.map(".".join), min_size=1, unique=True), st.sampled_from(PREFIXES))
def test_keys_stay_apart(keys: list[str], prefix: str) -> None:
    wrapped = [prefix + key for key in keys]
    found = own_keys(wrapped)
    assert list(found) == wrapped
    assert len(set(found.values())) == len(keys)
    assert list(found.values()) == list(own_keys(keys).values())


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_averaged_model_alone(tmp_path: Path) -> None:
    average = AveragedModel(net())
    average.update_parameters(net())
    reading = reading_of(save(average.state_dict(), tmp_path / "file.pt"))
    tensors = reading.weights["model"].tensors
    assert_same_tensors(tensors, average.module.state_dict())
    assert reading.weights["model"].extras == ()


def test_compiled_and_data_parallel_modules(tmp_path: Path) -> None:
    """`torch.compile` gives its prefix without compiling anything."""
    plain = net()
    parallel = nn.DataParallel(plain)
    wrappers: list[Any] = [parallel, torch.compile(plain), torch.compile(parallel)]
    for i, wrapped in enumerate(wrappers):
        path = save(wrapped.state_dict(), tmp_path / f"{i}.pt")
        assert any(key.startswith(("module.", "_orig_mod.")) for key in wrapped.state_dict())
        assert_same_tensors(reading_of(path).weights["model"].tensors, plain.state_dict())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_element_types(dtype: torch.dtype, ending: str, tmp_path: Path) -> None:
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state().items()}
    path = tmp_path / f"file.{ending}"
    if ending == "pt":
        save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    found = reading_of(path).weights["model"].tensors
    assert_same_tensors({key: found[key] for key in tensors}, tensors)


def test_ties(tmp_path: Path) -> None:
    table, other = torch.randn(5, 3), torch.randn(5, 3)
    value = {"head.w": table, "embed.w": table, "other": other, "view": table[1:], "t": table.t()}
    weights = reading_of(save(value, tmp_path / "file.pt")).weights["model"]
    assert weights.ties == (("embed.w", "head.w"),)


def test_empty_tensors_are_not_tied(tmp_path: Path) -> None:
    value = {"a": torch.empty(0), "b": torch.empty(0), "w": torch.ones(1)}
    assert reading_of(save(value, tmp_path / "file.pt")).weights["model"].ties == ()


def test_extra_state_is_named(tmp_path: Path) -> None:
    value = OrderedDict(state())
    value["fc._extra_state"] = {"scale": 1.0}  # type: ignore[assignment]
    weights = reading_of(save(value, tmp_path / "file.pt")).weights["model"]
    assert weights.extras == ("fc._extra_state",)
    assert_same_tensors(weights.tensors, state())


def test_scalars_among_the_tensors_are_facts(tmp_path: Path) -> None:
    reading = reading_of(save({**state(), "epoch": 7, "step": 70}, tmp_path / "file.pt"))
    assert (reading.facts.epoch, reading.facts.step) == (7, 70)
    assert "epoch" not in reading.weights["model"].tensors


def test_output_of_ours_is_an_average(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(state(), path, metadata={"ensemblekit": "{}"})
    weights = reading_of(path).weights["model"]
    assert (weights.role, weights.is_average) == ("swa", True)
