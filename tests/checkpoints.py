"""How the tests make checkpoints with torch, and how they compare what was read with it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemblekit import containers, layouts
from ensemblekit.containers import TensorSpec, Tree, read_array
from ensemblekit.files import Source
from ensemblekit.layouts import Reading

State = dict[str, Tensor]


def state(step: float = 0, *, seed: int = 0, noise: float = 0.1, width: int = 16) -> State:
    """Snapshot number `step` of a small network: near its siblings, different from each."""
    base, own = torch.Generator().manual_seed(seed), torch.Generator()
    own.manual_seed(int(step * 1000) + 7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=base) + noise * torch.randn(*shape, generator=own)

    return {
        "conv.weight": draw(width, 3, 3, 3),
        "bn.weight": draw(width),
        "bn.running_mean": draw(width),
        "bn.running_var": 1 + draw(width).abs(),
        "bn.num_batches_tracked": torch.tensor(int(step * 100)),
        "fc.weight": draw(10, width),
        "fc.bias": draw(10),
    }


def mean(states: list[State], *, dtype: torch.dtype = torch.float32) -> State:
    """The mean by key, in `dtype` arithmetic, in the type of the first."""
    first = states[0]
    return {
        key: torch.stack([s[key].to(dtype) for s in states]).mean(0).to(first[key].dtype)
        for key in first
    }


def save(value: Any, path: Path, **options: Any) -> Path:
    """`torch.save`, folders made on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, **options)
    return path


def tree_of(path: Path) -> Tree:
    """What the container holds."""
    return containers.read(Source(path))


def reading_of(path: Path) -> Reading:
    """What the layout makes of it."""
    return layouts.interpret(tree_of(path), path)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements in C order, as they would lie in a file."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return bytes(plain.clone(memory_format=torch.contiguous_format).untyped_storage())


def assert_same(spec: object, tensor: Tensor) -> None:
    """The description and its values are the tensor's, bit for bit."""
    assert isinstance(spec, TensorSpec), spec
    assert f"torch.{spec.dtype}" == str(tensor.dtype)
    assert spec.shape == tuple(tensor.shape)
    array = read_array(spec)
    assert array.shape == tuple(tensor.shape)
    assert array.tobytes() == tensor_bytes(tensor)


def assert_same_tensors(specs: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Same keys in the same order, and every tensor the same."""
    assert list(specs) == list(tensors)
    for key, tensor in tensors.items():
        assert_same(specs[key], tensor)


def any_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """A tensor of any dtype, filled with bits that are all different from zero somewhere."""
    item = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape, dtype=int)) * item
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count)
    flat = torch.from_numpy(raw.astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls complex32 experimental
        return flat.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def round_trip(value: Any, **options: Any) -> Any:
    """What torch.load makes of it."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
