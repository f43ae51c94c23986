"""Weights into a module: dtypes, prefixes, ties, and what does not fit."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from ensemblekit.build import device_from_name, key_map, load_weights, to_torch
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import IncompatibleError, MachineError, UsageError

Arrays = dict[str, np.ndarray[Any, Any]]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Extra(nn.Linear):
    """Keeps something that is no tensor in its state dict."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: object) -> None:
        pass


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(4, 5))


def weights_of(model: nn.Module, *, add: str = "", cut: str = "") -> Arrays:
    """The model's weights plus one, by keys with a prefix added or taken off."""
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    return {add + key.removeprefix(cut): (value + 1).numpy() for key, value in state.items()}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_every_dtype_crosses(name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[name].numpy
    bits = np.random.default_rng(0).integers(0, 2, [*shape, dtype.itemsize], np.uint8)
    array = bits.view(dtype).reshape(shape)
    tensor = to_torch(array)
    assert tensor.dtype == getattr(torch, name)
    assert tuple(tensor.shape) == shape
    back = tensor.reshape(-1).contiguous().view(torch.uint8).numpy()
    assert back.tobytes() == array.tobytes()


def test_values_cross_and_share_memory() -> None:
    array = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    tensor = to_torch(array)
    assert tensor.tolist() == [1.5, -2.0]
    array[0] = 3
    assert tensor[0] == 3


@pytest.mark.parametrize("add", ["", "model.", "net.", "a.b.c."])
def test_a_prefix_in_the_file_is_taken_off(add: str) -> None:
    model = net()
    arrays = weights_of(model, add=add)
    mapping = load_weights(model, arrays)
    assert set(mapping) == set(arrays)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k.removeprefix(add): v.tolist() for k, v in arrays.items()
    }
    assert not model.training


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prefix_in_the_model_is_added(depth: int) -> None:
    model = net()
    for _ in range(depth):
        model = nn.Sequential(model)
    arrays = weights_of(model, cut="0." * depth)
    assert "1.running_mean" in arrays
    load_weights(model, arrays)
    assert model.state_dict()["0." * depth + "1.running_mean"].tolist() == [1, 1, 1]


def test_counters_are_optional() -> None:
    model = net()
    arrays = weights_of(model)
    del arrays["1.num_batches_tracked"]
    assert "1.num_batches_tracked" not in load_weights(model, arrays)


@pytest.mark.parametrize("missing", ["embed.weight", "head.weight"])
def test_one_of_two_tied_keys_is_enough(missing: str) -> None:
    model = Tied()
    arrays = {k: v for k, v in weights_of(model).items() if k != missing}
    load_weights(model, arrays)
    assert model.embed.weight.tolist() == next(iter(arrays.values())).tolist()
    assert model.head.weight is model.embed.weight


def test_a_module_with_extra_state() -> None:
    model = nn.Sequential(Extra(2, 2))
    load_weights(model, weights_of(model))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"2.weight": None}, ("1 keys of the model are not in it", "2.weight")),
        ({"9.weight": np.ones(1)}, ("1 of its keys are not in the model", "9.weight")),
        (
            {"2.weight": None, "2.bias": None, "fc.weight": np.ones(2), "fc.bias": np.ones(2)},
            ("2 keys of the model", "2.bias", "2.weight", "2 of its keys", "fc.weight"),
        ),
        ({"0.weight": np.ones((3, 3, 1, 1))}, ("'0.weight'", "(3, 3, 1, 1)", "(3, 2, 1, 1)")),
        ({"1.running_var": None}, ("1.running_var",)),
    ],
)
def test_what_does_not_fit_is_listed(change: dict[str, Any], words: tuple[str, ...]) -> None:
    model = net()
    arrays = {k: v for k, v in (weights_of(model) | change).items() if v is not None}
    with pytest.raises(IncompatibleError) as caught:
        load_weights(model, arrays)
    assert caught.value.exit_code == 3
    assert "--model" in str(caught.value.hint)
    assert not [word for word in words if word not in caught.value.message], caught.value.message


def test_a_long_list_is_cut() -> None:
    with pytest.raises(IncompatibleError, match="more"):
        key_map(net(), [f"other.{n}" for n in range(1000)])


def test_the_models_dtype_stays() -> None:
    model = nn.Linear(2, 2).double()
    load_weights(model, {k: v.astype(ml_dtypes.bfloat16) for k, v in weights_of(model).items()})
    assert model.weight.dtype == torch.float64


def test_scalars_and_buffers() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.register_buffer("table", torch.arange(3))
    model.register_buffer("fresh", torch.ones(2), persistent=False)
    load_weights(model, {"scale": np.array(2.0, np.float32), "table": np.array([3, 4, 5])})
    assert model.scale.item() == 2
    assert model.get_buffer("table").tolist() == [3, 4, 5]


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_devices(name: str) -> None:
    assert device_from_name(name).type in ("cpu", "cuda")


@pytest.mark.parametrize(
    "name, error",
    [
        ("gpu", UsageError),
        ("", UsageError),
        ("cuda:99", MachineError),
        ("meta", MachineError),
        ("cuda:x", UsageError),
    ],
)
def test_devices_that_are_not_there(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        device_from_name(name)
