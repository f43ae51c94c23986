"""Owns the stream of batches: from a Dataset, a pair of arrays or an iterable to `Batch`.

Input: what a data target returned, or what a Python caller hands over.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ensemblekit.errors import InputError, UsageError

LABEL_KEYS = ("labels", "label", "y", "target")


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        inputs: Positional arguments of the model, or keyword arguments when it is a dict.
        target: Labels, None where the data have none.
        size: Samples.
    """

    inputs: tuple[Any, ...] | dict[str, Any]
    target: torch.Tensor | None
    size: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        if isinstance(self.inputs, dict):
            inputs: Any = {key: _move(value, device) for key, value in self.inputs.items()}
        else:
            inputs = tuple(_move(value, device) for value in self.inputs)
        return Batch(inputs, _move(self.target, device), self.size)

    def call(self, model: torch.nn.Module) -> Any:
        """The model's outputs for this batch."""
        if isinstance(self.inputs, dict):
            return model(**self.inputs)
        return model(*self.inputs)


@dataclass(frozen=True)
class Plan:
    """How to walk through data.

    Attributes:
        batch_size: Samples in a batch of map-style data; iterables bring their own.
        shuffle_seed: Seed of a random order of map-style data, None for the stored order.
        limit: At most so many samples, a seeded random subset of map-style data.
        workers: Processes that load map-style data.
    """

    batch_size: int = 128
    shuffle_seed: int | None = None
    limit: int | None = None
    workers: int = 0


def count(data: Any, plan: Plan) -> int | None:
    """Samples that `batches` will give, None where an iterable does not tell."""
    total = _length(data)
    if total is None or plan.limit is None:
        return total
    return min(total, plan.limit)


def batches(data: Any, plan: Plan) -> Iterator[Batch]:
    """Batches of `data`; the last one of map-style data is never a single sample.

    Raises:
        InputError: The data are empty, or a batch has no known form.
    """
    empty = True
    done = 0
    for raw in _raw_batches(data, plan):
        batch = as_batch(raw)
        empty = False
        yield batch
        done += batch.size
        if plan.limit is not None and done >= plan.limit:
            return
    if empty:
        raise InputError("the data are empty: no batch came out of them")


def as_batch(raw: Any) -> Batch:
    """A user's batch in the one form we use.

    Raises:
        InputError: It is neither a tensor, a tuple nor a dict.
    """
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        label = next((key for key in LABEL_KEYS if key in raw), None)
        inputs: Any = {str(k): _tensor(v) for k, v in raw.items() if k != label}
        target = None if label is None else _tensor(raw[label])
        values = list(inputs.values())
    elif isinstance(raw, tuple | list) and raw:
        parts = [_tensor(part) for part in raw]
        inputs, target = (tuple(parts[:-1]), parts[-1]) if len(parts) > 1 else ((parts[0],), None)
        values = list(inputs)
    elif isinstance(raw, torch.Tensor | np.ndarray):
        inputs, target = (_tensor(raw),), None
        values = list(inputs)
    else:
        raise InputError(
            f"a batch is a {type(raw).__name__}; expected (x, y), (x1, ..., xn, y), or a dict "
            f"with the label under {', '.join(LABEL_KEYS)}"
        )
    sizes = [len(v) for v in values if isinstance(v, torch.Tensor) and v.ndim]
    if not sizes:
        raise InputError("a batch holds no tensor to count samples in")
    return Batch(inputs, target, sizes[0])


def _raw_batches(data: Any, plan: Plan) -> Iterable[Any]:
    if _is_arrays(data):
        return _array_batches(data, plan)
    if _is_map_style(data):
        loader: Any = torch.utils.data.DataLoader(
            data, batch_sampler=_index_batches(len(data), plan), num_workers=plan.workers
        )
        batches_of_indices: Iterator[Any] = iter(loader)
        return batches_of_indices
    if isinstance(data, Iterable):
        return data
    raise UsageError(
        f"the data are a {type(data).__name__}; expected a Dataset, a pair of equal-length arrays "
        "or an iterable of batches"
    )


def _array_batches(data: Sequence[Any], plan: Plan) -> Iterator[Any]:
    arrays = [_tensor(part) for part in data]
    for indices in _index_batches(len(arrays[0]), plan):
        yield tuple(part[indices] for part in arrays)


def _index_batches(total: int, plan: Plan) -> list[list[int]]:
    seed = plan.shuffle_seed
    indices = np.arange(total)
    if plan.limit is not None and plan.limit < total:
        chosen = np.random.default_rng(seed or 0).permutation(total)[: plan.limit]
        indices = chosen if seed is not None else np.sort(chosen)
    elif seed is not None:
        indices = np.random.default_rng(seed).permutation(total)
    found: list[list[int]] = [
        indices[start : start + plan.batch_size].tolist()
        for start in range(0, len(indices), plan.batch_size)
    ]
    if len(found) > 1 and len(found[-1]) == 1:  # BatchNorm cannot see one sample's statistics
        found[-2:] = [found[-2] + found[-1]]
    return found


def _length(data: Any) -> int | None:
    if _is_arrays(data):
        return len(data[0])
    if _is_map_style(data):
        return len(data)
    dataset = getattr(data, "dataset", None)  # a DataLoader: its length is in batches
    return len(dataset) if isinstance(dataset, Sized) else None


def _is_arrays(data: Any) -> bool:
    """A tuple or list of at least two arrays of equal length."""
    if not isinstance(data, tuple | list) or len(data) < 2:
        return False
    if not all(isinstance(part, torch.Tensor | np.ndarray) and part.ndim for part in data):
        return False
    lengths = {len(part) for part in data}
    if len(lengths) > 1:
        raise InputError(f"arrays of different lengths: {sorted(lengths)}")
    return True


def _is_map_style(data: Any) -> bool:
    if isinstance(data, torch.utils.data.DataLoader | Mapping | list | tuple):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype == np.float64:
            value = value.astype(np.float32)  # torch's default; models are rarely double
        return torch.from_numpy(np.ascontiguousarray(value))
    return value


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
